#!/usr/bin/env python3
"""What fixed point costs in accuracy: perplexity under the plaintext twin against float64, errors by layer.

    python bench/perplexity.py                         the shared checkpoints and a random GPT-2-small shape
    python bench/perplexity.py --models NAME ...       some of the shared ones
    python bench/perplexity.py --tokens 2048           scored positions of each (default: as in MODELS.json)
    python bench/perplexity.py --no-shape              without the GPT-2-small shape, which takes 4 GB
    python bench/perplexity.py --show FILE             print the tables of a result again

Perplexity: the text of MODELS.json, tokenized without special tokens, in consecutive windows, each from an
empty context, every position scored against its next token. The difference is of perplexities, in percent of
float64's, with the standard error of its mean over windows, which are paired. A window in which a value
leaves the range of the engine's tables is counted and left out of both: there the engine would be wrong.

By layer: the GPT-2-small shape with random weights of a trained model's sizes (scripts/random_checkpoint.py)
on one run of random tokens; both models go through it side by side, so errors add up from layer to layer.

The twin (tests/reference.py) does on integers modulo 2^64 what the parties do on shares: the engine's scales,
table sizes, truncations with a dither of three uniform parts, readings under masks that lose low bits,
windows and reach tests; it stops where a value leaves the range in which the engine is right. It is written
apart from the engine, and tests/test_model.py holds the engine to it. What it does not cover: the fits of the
tables are its own (least squares, where the engine interpolates at Chebyshev nodes: both within the stated
error); dithers are drawn by numpy and not from the masks, so that single values differ by a unit or two; the
choice of a token, where pairs of logits closer than 3 * 2^-10 may swap, and seldom others (DESIGN, Argmax);
and whatever is wrong with the protocol.

Results go to bench/results/accuracy/ as one JSON file a run. Nothing is asserted here: tests do that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

from accuracy import SHAKESPEARE_TAIL  # noqa: E402
from conftest import find_shared  # noqa: E402
from reference import Fixed, FixedModel, FloatModel, compare  # noqa: E402
from run import commit, machine  # noqa: E402

from mimir.model import Plan, Tokenizer, load_checkpoint  # noqa: E402

RESULTS = HERE / "results" / "accuracy"
TARGET = 0.5  # percent of perplexity
SHAPE = "gpt2-small"
SHAPE_TOKENS = 64
BY_LAYER = ("norm1", "scores", "attention", "residual1", "norm2", "activation", "residual2")


def text_of(shared: Path, entry: dict[str, Any]) -> str:
    """The text that MODELS.json scores a checkpoint on."""
    told = entry["expected"]["reference_nll"]["text"]
    shakespeare = "shakespeare" in told
    text = (shared / "text" / ("tinyshakespeare.txt" if shakespeare else "tinystories_sample.txt")).read_text(
        "utf-8"
    )
    return text[-SHAKESPEARE_TAIL:] if shakespeare else text


def nats(model: Any, ids: Sequence[int], window: int) -> list[float | str]:
    """Mean of -ln p(next) of each whole window, from an empty context; or what left the engine's range."""
    out: list[float | str] = []
    for start in range(0, len(ids) - window, window):
        model.reset()
        try:
            z = model.forward(ids[start : start + window])
        except OverflowError as error:
            out.append(str(error))
            continue
        top = z.max(axis=-1, keepdims=True)
        logs = top[:, 0] + np.log(np.exp(z - top).sum(axis=-1))
        out.append(float((logs - z[np.arange(window), list(ids[start + 1 : start + window + 1])]).mean()))
    return out


def perplexity(plan: Plan, ids: Sequence[int], window: int, fixed: Fixed) -> dict[str, Any]:
    """Both perplexities on the same windows: those that stay within the engine's range."""
    began = time.monotonic()
    both = list(
        zip(nats(FloatModel(plan), ids, window), nats(FixedModel(plan, fixed), ids, window), strict=True)
    )
    outside = [why for _, why in both if isinstance(why, str)]
    exact, twin = (
        np.array([pair[i] for pair in both if not isinstance(pair[1], str)], np.float64) for i in (0, 1)
    )
    differences = twin - exact
    error = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.nan
    change = math.expm1(float(differences.mean()))
    return {
        "tokens": len(exact) * window,
        "window": window,
        "windows_outside": len(outside),
        "outside": outside[:4],
        "float64": math.exp(float(np.mean(exact))),
        "fixed": math.exp(float(np.mean(twin))),
        "percent": 100 * change,
        "percent_error": 100 * (1 + change) * error,
        "largest_window_percent": 100 * float(np.abs(np.expm1(differences)).max()),
        "seconds": time.monotonic() - began,
    }


def shape(fixed: Fixed) -> dict[str, Any]:
    """Errors of a random GPT-2-small, value by value."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mimir-bench.") as folder:
        out = Path(folder) / SHAPE
        script = str(ROOT / "scripts" / "random_checkpoint.py")
        subprocess.run(
            [sys.executable, script, "--shape", SHAPE, str(out)], check=True, stdout=subprocess.DEVNULL
        )
        plan = load_checkpoint(out)
        ids = np.random.default_rng(1).integers(3, plan.vocab, SHAPE_TOKENS).tolist()
        rows = compare(plan, [ids], fixed)
    return {
        "shape": SHAPE,
        "tokens": SHAPE_TOKENS,
        "rows": [dataclasses.asdict(r) for r in rows],
        "seconds": time.monotonic() - began,
    }


def tables(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    fixed = result["fixed"]
    where = "" if fixed.get("few_rounds", True) else ", of parties on one site"
    out = [
        f"Measured {result['date'][:10]} at commit {result['commit']} by `bench/perplexity.py`: "
        f"{fixed['scale_bits']} fraction bits, rounding by {fixed['rounding']}{where}.",
        "",
        "| checkpoint | tokens | perplexity, float64 | fixed point | difference | largest in a window "
        "| windows outside the engine's range |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for p in result["perplexity"]:
        kept = "" if abs(p["percent"]) < TARGET else f" (target {TARGET:g} % missed)"
        out.append(
            f"| {p['model']} | {p['tokens']} | {p['float64']:.4f} | {p['fixed']:.4f} "
            f"| {p['percent']:+.4f} % ± {p['percent_error']:.4f}{kept} | {p['largest_window_percent']:.3f} % "
            f"| {p['windows_outside']} of {p['windows_outside'] + p['tokens'] // p['window']} |"
        )
    told = result.get("shape")
    if told:
        rows = {r["name"]: r for r in told["rows"]}
        layers = sorted({int(n.split(".")[0]) for n in rows if n.split(".")[0].isdigit()})
        out += [
            "",
            f"Root mean square error by layer, {told['shape']} with random weights, {told['tokens']} tokens "
            "(in brackets: root mean square of the value itself):",
            "",
            "| layer | " + " | ".join(BY_LAYER) + " |",
            "|--:|" + "---|" * len(BY_LAYER),
        ]
        for i in layers:
            cells = (rows[f"{i}.{name}"] for name in BY_LAYER)
            out.append(
                f"| {i} | " + " | ".join(f"{c['error_rms']:.1e} ({c['rms']:.2g})" for c in cells) + " |"
            )
        last = rows["logits"]
        out += [
            "",
            f"Logits: error {last['error_rms']:.1e}, at most {last['error_max']:.1e}, of values of "
            f"{last['rms']:.2g}, at most {last['largest']:.2g}.",
        ]
    return "\n".join([*out, ""])


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="perplexity.py [options]",
    )
    p.add_argument("--models", nargs="+", metavar="NAME", help="of MODELS.json; all if not given")
    p.add_argument("--tokens", type=int, metavar="N", help="scored positions of each, in whole windows")
    p.add_argument("--scale-bits", type=int, default=Fixed.scale_bits, metavar="F")
    p.add_argument("--rounding", choices=("dither", "nearest"), default=Fixed.rounding)
    p.add_argument("--one-site", action="store_true", help="as with scheduler.round_trip_ms below 5")
    p.add_argument("--no-shape", action="store_true", help=f"without the {SHAPE} shape")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the tables of this result and end")
    a = p.parse_args(argv)
    if a.show:
        print(tables(json.loads(a.show.read_text())))
        return 0
    fixed = dataclasses.replace(
        Fixed(), scale_bits=a.scale_bits, rounding=a.rounding, few_rounds=not a.one_site
    )
    shared = find_shared()
    listed = json.loads((shared / "models" / "MODELS.json").read_text())["models"] if shared else []
    names = [m["name"] for m in listed]
    for name in set(a.models or ()) - set(names):
        raise SystemExit(f"perplexity: {name}: no such model; they are {', '.join(names) or 'not here'}")
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "fixed": {
            "scale_bits": fixed.scale_bits,
            "rounding": fixed.rounding,
            "few_rounds": fixed.few_rounds,
        },
        "perplexity": [],
    }
    for entry in listed:
        if a.models and entry["name"] not in a.models:
            continue
        assert shared is not None
        print(f"perplexity: {entry['name']}", file=sys.stderr)
        plan = load_checkpoint(shared / "models" / entry["directory"])
        told = entry["expected"]["reference_nll"]
        ids = Tokenizer.load(plan.directory).encode(text_of(shared, entry), begin=False)
        ids = ids[: (a.tokens or told["tokens_scored"]) + 1]
        row = perplexity(plan, ids, told["window"], fixed)
        result["perplexity"].append({"model": entry["name"], "text": told["text"], **row})
    if not a.no_shape:
        print(f"perplexity: {SHAPE}, by layer", file=sys.stderr)
        result["shape"] = shape(fixed)
    folder = a.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{now:%Y-%m-%d-%H%M}-{result['commit'][:10]}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
