#!/usr/bin/env python3
"""The engine against its twin: logits of three real parties and of tests/reference.py, position by position.

    python bench/positions.py                      every shared checkpoint, under three minutes each
    python bench/positions.py --models NAME ...    some of them
    python bench/positions.py --windows 3          windows of text for each (default 2)
    python bench/positions.py --seed 7             draws other windows (default: drawn, and printed)
    python bench/positions.py --one-site           as with scheduler.round_trip_ms below 5
    python bench/positions.py --show FILE          print the tables of a result again

bench/perplexity.py says what fixed point costs by way of a twin in the clear. This says that the twin is the
engine: windows of the shared text are drawn by the seed, and three whole sessions (session_fixture: three
session actors over memory, their preprocessing, a client that masks its prompt) read them, a prompt of PROMPT
tokens padded to BUCKET, then token by token. Two things are bent, in this process alone: every row that
leaves the last block is sent through the head, and its logits are put together from the parties' components,
of which both holders must have the same; and of a chosen token the engine's index is noted, but the
text's own token goes on (teacher forcing), so that all positions of a window can be compared.

The twin reads the same tokens with the same padding and draws dithers of its own. Two runs cannot agree to
the bit: each truncation is off by up to two units of 2^-16 at random, and the layers carry that on. What
rounding may do to a logit is measured beside: the same twin against TWINS others, which differ in their seed.
An engine that is right lies as far from the twin as these do; what is more than that is a bug, or the tables'
fits, which the twin makes by another method.

Columns. Differences of logits are in units of 2^-16: largest and root mean square over all positions and the
whole vocabulary. "Agree" counts positions at which the engine's choice, by its own argmax, is the twin's
largest logit (in the prompt, where the engine chooses nothing, the largest of its logits is); where it is
not, it lies within the gap that is told. "ln p" is the logarithm of the probability of the token that the
text has next: its largest difference, and the mean as percent of perplexity with its standard error. Windows
in which the twin leaves the range of the engine's tables are counted, and others drawn.

Results go to bench/results/positions/ as one JSON file a run. Nothing is asserted here: tests do that.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import structlog

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

from conftest import find_shared  # noqa: E402
from parties import reconstruct, share_weights  # noqa: E402
from perplexity import text_of  # noqa: E402
from reference import Fixed, FixedModel, gap  # noqa: E402
from run import commit, machine  # noqa: E402
from session_fixture import PARTIES, SETTINGS, Story, hold  # noqa: E402
from session_fixture import run as run_virtual  # noqa: E402

from mimir.model import Plan, Tokenizer, load_checkpoint, sampling, transformer  # noqa: E402
from mimir.model.checkpoint import Floats  # noqa: E402
from mimir.mpc.domain import Ring, decode  # noqa: E402
from mimir.mpc.nonlinear import Settings  # noqa: E402
from mimir.mpc.ops import INDEX_BITS, Context  # noqa: E402
from mimir.mpc.replicated import Replicated  # noqa: E402
from mimir.mpc.share import Share  # noqa: E402
from mimir.net.memory import MemoryNet  # noqa: E402

RESULTS = HERE / "results" / "positions"
UNIT = 2.0**-16  # in which differences of logits are told
BUCKET, PROMPT = 32, 29  # two steps of the engine, and three slots of padding
DECODED = 11  # tokens that are read one by one behind the prompt
WINDOWS = 2
TWINS = 8  # that are compared with the first, for what rounding does
TRIES = 20  # windows that are drawn for one inside the engine's range


@dataclass(frozen=True)
class Reading:
    """What came of one window: logits (positions, vocab) at every token, and the engine's own choices at the
    last of them.
    """

    logits: Floats
    chosen: list[int]


def engine(
    plan: Plan,
    weights: Sequence[Any],
    ids: Sequence[int],
    bucket: int,
    prompt: int,
    settings: Settings = SETTINGS,
) -> Reading:
    """Three sessions over `ids`, the first `prompt` of them padded to `bucket`; the last one is only awaited.

    Raises RuntimeError if a session aborts. Logits are of ids[:-1], choices of ids[prompt - 1 : -1].
    """
    slots = bucket + len(ids) - prompt
    spec = replace(plan.spec, context=slots) if plan.positions == "rope" else plan.spec  # as max_context does
    forced = [int(i) for i in ids[prompt:]]
    rows: list[list[Ring]] = [[] for _ in range(PARTIES)]
    choices: list[list[Ring]] = [[] for _ in range(PARTIES)]
    forward, choose = transformer.forward, sampling.choose

    async def through_the_head(ctx: Context, step: str, spec: Any, *args: Any) -> Share:
        """Planning runs through here as well, so that material for these rows is made like any other."""
        hidden = await forward(ctx, step, spec, *args)
        for i in range(hidden.shape[0]):
            z = await transformer.logits(ctx, f"{step}/row {i}", spec, hidden[i : i + 1], settings)
            if isinstance(ctx.bk, Replicated):
                rows[ctx.bk.party].append(z.v[:, 0])
        return hidden

    async def noted(ctx: Context, *args: Any) -> Share:
        index = await choose(ctx, *args)
        if not isinstance(ctx.bk, Replicated):
            return index
        heard = choices[ctx.bk.party]
        heard.append(index.v)
        return index * 0 + forced[len(heard) - 1]

    async def main() -> Any:
        prompts = (tuple(int(i) for i in ids[:prompt]),)
        story = Story(spec, prompts, bucket, len(forced), settings=settings)
        return await hold(story, MemoryNet(PARTIES), weights)

    with (
        mock.patch.object(transformer, "forward", through_the_head),
        mock.patch.object(sampling, "choose", noted),
    ):
        outcome = run_virtual(main)
    if outcome.tokens != forced:
        raise RuntimeError(f"the session did not go as it was led: {outcome.plain()}")
    scale = transformer.LOGIT_SCALE
    logits = [decode(reconstruct(list(parts)), scale) for parts in zip(*rows, strict=True)]
    chosen = [int(reconstruct(list(parts))[0]) % (1 << INDEX_BITS) for parts in zip(*choices, strict=True)]
    return Reading(np.stack(logits[bucket - prompt :]), chosen)


def twin(plan: Plan, ids: Sequence[int], bucket: int, prompt: int, fixed: Fixed) -> Floats:
    """Logits of ids[:-1] in the clear, after the same padding. Raises OverflowError out of range."""
    model = FixedModel(plan, fixed)
    first = model.forward(ids[:prompt], pad=bucket - prompt)
    return np.concatenate([first, model.forward(ids[prompt:-1])]) if len(ids) > prompt + 1 else first


def log_p(logits: Floats, following: Sequence[int]) -> Floats:
    """ln of the probability of the token that follows each row."""
    top = logits.max(axis=-1, keepdims=True)
    whole = top[:, 0] + np.log(np.exp(logits - top).sum(axis=-1))
    return np.asarray(logits[np.arange(len(logits)), list(following)] - whole)


def beside(
    got: Sequence[Reading],
    want: Sequence[Floats],
    again: Sequence[Sequence[Floats]],
    windows: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """The figures of a checkpoint, window by window: the engine against the twin, and the twin against others
    (`again`) that differ in their dithers.
    """

    def apart(others: Sequence[Sequence[Floats]]) -> tuple[float, float]:
        d = np.stack([np.concatenate(o) - np.concatenate(want) for o in others]) / UNIT
        return float(np.abs(d).max()), math.sqrt(float((d**2).mean()))

    engines = [g.logits for g in got]
    largest, rms = apart([engines])
    own_largest, own_rms = apart(again)
    gaps = []
    for reading, rows in zip(got, want, strict=True):
        read = reading.logits[: len(rows) - len(reading.chosen)].argmax(axis=-1).tolist()
        gaps += [gap(row, token) for row, token in zip(rows, read + reading.chosen, strict=True)]
    d = np.concatenate(
        [log_p(e, ids[1:]) - log_p(w, ids[1:]) for e, w, ids in zip(engines, want, windows, strict=True)]
    )
    return {
        "positions": len(d),
        "chosen": sum(len(g.chosen) for g in got),
        "largest": largest,
        "rms": rms,
        "twins_largest": own_largest,
        "twins_rms": own_rms,
        "agree": sum(g == 0 for g in gaps),
        "largest_gap": max(gaps),
        "nats_largest": float(np.abs(d).max()),
        "percent": 100 * math.expm1(-float(d.mean())),
        "percent_error": 100 * float(d.std(ddof=1)) / math.sqrt(len(d)) if len(d) > 1 else math.nan,
    }


def drawn(
    plan: Plan, ids: Sequence[int], count: int, rng: np.random.Generator, length: int, twin_of: Any
) -> tuple[list[list[int]], list[Floats], int]:
    """Windows of the text within the engine's range, the twin's logits of them, and how many were not."""
    windows: list[list[int]] = []
    logits: list[Floats] = []
    outside = 0
    while len(windows) < count:
        at = int(rng.integers(0, len(ids) - length))
        window = [int(i) for i in ids[at : at + length + 1]]
        try:
            logits.append(twin_of(window))
        except OverflowError:
            outside += 1
            if outside == TRIES * count:
                raise SystemExit(
                    f"positions: {outside} windows left the engine's range and {len(windows)} did not"
                ) from None
            continue
        windows.append(window)
    return windows, logits, outside


def measure(plan: Plan, ids: Sequence[int], windows: int, seed: int, settings: Settings) -> dict[str, Any]:
    """One checkpoint on windows of its text."""
    fixed = Fixed(seed=seed, few_rounds=settings.few_rounds)
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    shape = (BUCKET, PROMPT)
    texts, want, outside = drawn(
        plan, ids, windows, rng, PROMPT + DECODED, lambda w: twin(plan, w, *shape, fixed)
    )
    seeds = range(seed + 1, seed + 1 + TWINS)
    again = [[twin(plan, w, *shape, replace(fixed, seed=s)) for w in texts] for s in seeds]
    weights = share_weights({n: plan.encoded(n, SETTINGS.scale_bits) for n in plan.names()}, seed)
    got = [engine(plan, weights, w, *shape, settings) for w in texts]
    told = beside(got, want, again, texts)
    return told | {"windows": windows, "outside": outside, "seconds": time.monotonic() - began}


def tables(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    where = " --one-site" if result.get("one_site") else ""
    out = [
        f"Measured {result['date'][:10]} at commit {result['commit']} by `bench/positions.py --seed "
        f"{result['seed']}{where}`: three parties against the twin, logits in units of 2^-16.",
        "",
        "| checkpoint | positions | largest difference (of twins) | root mean square (of twins) "
        "| choices agree | ln p of the next token, largest | perplexity | windows drawn anew | s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for p in result["models"]:
        agree = f"{p['agree']} of {p['positions']}"
        if p["largest_gap"]:
            agree += f", else within {p['largest_gap']:.1e}"
        out.append(
            f"| {p['model']} | {p['positions']} | {p['largest']:.0f} ({p['twins_largest']:.0f}) "
            f"| {p['rms']:.1f} ({p['twins_rms']:.1f}) | {agree} | {p['nats_largest']:.1e} "
            f"| {p['percent']:+.4f} % ± {p['percent_error']:.4f} | {p['outside']} | {p['seconds']:.0f} |"
        )
    return "\n".join([*out, ""])


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="positions.py [options]",
    )
    p.add_argument("--models", nargs="+", metavar="NAME", help="of MODELS.json; all if not given")
    p.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help=f"of text each ({WINDOWS})")
    p.add_argument("--seed", type=int, help="of windows, sharing and dithers; drawn if not given")
    p.add_argument("--one-site", action="store_true", help="as with scheduler.round_trip_ms below 5")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the tables of this result and end")
    a = p.parse_args(argv)
    if a.show:
        print(tables(json.loads(a.show.read_text())))
        return 0
    if a.windows < 1:
        p.error("--windows must be at least 1")
    shared = find_shared()
    if shared is None:
        raise SystemExit(
            "positions: the shared checkpoints are not here: set MIMIR_SHARED to their directory"
        )
    listed = json.loads((shared / "models" / "MODELS.json").read_text())["models"]
    names = [m["name"] for m in listed]
    for name in set(a.models or ()) - set(names):
        raise SystemExit(f"positions: {name}: no such model; they are {', '.join(names)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # sessions log each batch
    seed = secrets.randbelow(1 << 31) if a.seed is None else a.seed
    settings = replace(SETTINGS, round_trip=0) if a.one_site else SETTINGS
    print(f"positions: seed {seed}", file=sys.stderr)
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "seed": seed,
        "one_site": a.one_site,
        "models": [],
    }
    for entry in listed:
        if a.models and entry["name"] not in a.models:
            continue
        print(f"positions: {entry['name']}", file=sys.stderr)
        plan = load_checkpoint(shared / "models" / entry["directory"])
        ids = Tokenizer.load(plan.directory).encode(text_of(shared, entry), begin=False)
        result["models"].append({"model": entry["name"], **measure(plan, ids, a.windows, seed, settings)})
    a.out.mkdir(parents=True, exist_ok=True)
    target = a.out / f"{now:%Y-%m-%d-%H%M}-{result['commit'][:10]}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
