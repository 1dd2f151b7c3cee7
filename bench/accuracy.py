#!/usr/bin/env python3
"""How far fixed point is from float, layer by layer, for every shared checkpoint; prints Markdown.

Per checkpoint: the errors of the plaintext fixed-point twin against float64 on the expected greedy
runs, the ranges that scales and tables must hold, and the perplexities against the published ones.

    python bench/accuracy.py [--scale-bits 16] [--models NAME ...] [--no-perplexity] [directory ...]

Further arguments are model directories of one's own; they are run on a fixed prompt, continued greedily.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from conftest import find_shared  # noqa: E402
from reference import Fixed, FixedModel, FloatModel, compare, gap, generate, nats_per_token  # noqa: E402

from mimir.model import Plan, Tokenizer, load_checkpoint  # noqa: E402

CONTINUATION = 50
OWN_PROMPT = "Once upon a time"
SHAKESPEARE_TAIL = 20_000  # characters, as MODELS.json says


def errors(plan: Plan, runs: Sequence[Sequence[int]], fixed: Fixed) -> None:
    try:
        rows = compare(plan, runs, fixed)
    except OverflowError as e:
        print(f"Outside the engine's tables: {e}.")
        return
    print("| value | largest | rms | largest error | rms error |")
    print("|---|--:|--:|--:|--:|")
    for r in rows:
        print(f"| {r.name} | {r.largest:.3f} | {r.rms:.4f} | {r.error_max:.1e} | {r.error_rms:.1e} |")


def ranges(plan: Plan, runs: Sequence[Sequence[int]]) -> None:
    """What the engine's tables see on these runs, in float: the domains they must cover with a margin."""
    model = FloatModel(plan)
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}

    def see(name: str, low: float, high: float) -> None:
        lows[name], highs[name] = min(lows.get(name, low), low), max(highs.get(name, high), high)

    def tap(name: str, value: Any) -> None:
        kind = name.split(".")[-1]
        if kind == "scores":
            rows, keys = value.shape[-2:]
            hidden = np.arange(keys) > keys - rows + np.arange(rows)[:, None]
            top = np.where(hidden, -np.inf, value).max(-1, keepdims=True)
            see("attention score", float(value.min()), float(value.max()))
            see("score less its row's largest", float(np.where(hidden, 0, value - top).min()), 0.0)
            total = np.where(hidden, 0, np.exp(value - top)).sum(-1)
            see("softmax denominator", float(total.min()), float(total.max()))
        elif kind in ("embed", "residual1", "residual2"):
            see("residual", float(value.min()), float(value.max()))
            square = (value**2).mean(-1) + plan.norm_eps
            see("mean square under the root", float(square.min()), float(square.max()))
        elif kind == "hidden":
            inner = value[:, : plan.hidden]
            see("activation input", float(inner.min()), float(inner.max()))
        elif kind in ("attention", "activation", "logits"):
            see({"activation": "activation output", "attention": "attention output"}.get(kind, kind),
                float(value.min()), float(value.max()))  # fmt: skip

    for ids in runs:
        model.reset()
        model.forward(ids, tap)
    print("| range on these runs | from | to |")
    print("|---|--:|--:|")
    for name in lows:
        print(f"| {name} | {lows[name]:.4g} | {highs[name]:.4g} |")


def flips(plan: Plan, prompts: Sequence[dict[str, Any]], fixed: Fixed) -> None:
    """How many ids of each expected continuation the twin gives, and why it stops."""
    twin = FixedModel(plan, fixed)
    print("| prompt | ids equal | smallest float gap on the path | why no further |")
    print("|---|--:|--:|---|")
    for p in prompts:
        want, note, feed = p["greedy_new_ids"], "", p["input_ids"]
        twin.reset()
        same = 0
        for same, token in enumerate([*want, None]):
            if token is None:
                break
            try:
                got = int(twin.forward(feed)[-1].argmax())
            except OverflowError as e:
                note = str(e)
                break
            if got != token:
                logits = FloatModel(plan).forward([*p["input_ids"], *want[:same]])[-1]
                note = f"near-tie, float gap {gap(logits, got):.5f}"
                break
            feed = [token]
        prompt = json.dumps(p["prompt"], ensure_ascii=False)
        print(
            f"| `{prompt}` | {same} of {len(want)} | {p['smallest_top1_minus_top2_over_the_path']} | {note} |"
        )


def perplexity(plan: Plan, shared: Path, entry: dict[str, Any], fixed: Fixed) -> None:
    told = entry["expected"]["reference_nll"]
    text_name = "tinyshakespeare.txt" if "shakespeare" in told["text"] else "tinystories_sample.txt"
    text = (shared / "text" / text_name).read_text("utf-8")
    if "last 20,000" in told["text"]:
        text = text[-SHAKESPEARE_TAIL:]
    ids = Tokenizer.load(plan.directory).encode(text, begin=False)
    print("| model | nats per token | perplexity |")
    print("|---|--:|--:|")
    print(f"| MODELS.json (float32) | {told['nats_per_token']:.5f} | {told['perplexity']:.4f} |")
    for name, model in (("float64", FloatModel(plan)), ("fixed point", FixedModel(plan, fixed))):
        try:
            nats = nats_per_token(model, ids, told["window"], told["tokens_scored"])
            print(f"| {name} | {nats:.5f} | {math.exp(nats):.4f} |")
        except OverflowError as e:
            print(f"| {name} | {e} | |")


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("directories", nargs="*", help="further model directories")
    p.add_argument("--models", nargs="*", help="names from MODELS.json; all if not given")
    p.add_argument("--scale-bits", type=int, default=Fixed.scale_bits)
    p.add_argument("--rounding", choices=("dither", "nearest"), default=Fixed.rounding)
    p.add_argument("--one-site", action="store_true", help="as with scheduler.round_trip_ms below 5")
    p.add_argument("--no-perplexity", action="store_true")
    a = p.parse_args()
    fixed = dataclasses.replace(
        Fixed(), scale_bits=a.scale_bits, rounding=a.rounding, few_rounds=not a.one_site
    )
    where = ", of parties on one site" if a.one_site else ""
    print(f"Fixed point with {fixed.scale_bits} fraction bits, rounding by {fixed.rounding}{where}.\n")

    shared = find_shared()
    listed = json.loads((shared / "models" / "MODELS.json").read_text("utf-8"))["models"] if shared else []
    if not listed and not a.directories:
        print("no checkpoints: set MIMIR_SHARED or name directories", file=sys.stderr)
        return 2
    for entry in listed:
        if a.models is not None and entry["name"] not in a.models:
            continue
        assert shared is not None
        plan = load_checkpoint(shared / "models" / entry["directory"])
        prompts = entry["expected"]["prompts"]
        runs = [q["input_ids"] + q["greedy_new_ids"] for q in prompts]
        print(f"## {entry['name']}\n")
        flips(plan, prompts, fixed)
        print()
        errors(plan, runs, fixed)
        print()
        ranges(plan, runs)
        if not a.no_perplexity:
            print()
            perplexity(plan, shared, entry, fixed)
        print()
    for directory in a.directories:
        plan = load_checkpoint(directory)
        ids = Tokenizer.load(directory, plan.vocab).encode(OWN_PROMPT)
        count = min(CONTINUATION, plan.context - len(ids))
        run = ids + generate(FloatModel(plan), ids, count, plan.eos_ids)
        print(f"## {Path(directory).name}\n")
        errors(plan, [run], fixed)
        print()
        ranges(plan, [run])
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
