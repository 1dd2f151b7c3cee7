#!/usr/bin/env python3
"""How rounds, bytes and memory of a decoded token grow with context, width and layers, by the cost model.

    python bench/scaling.py                 a few minutes of one core; no weights are needed
    python bench/scaling.py --show FILE     print the table of a result again

Each point is a session of one party over shapes (mimir.dryrun), so rounds and bytes are exact, per party,
framing included but for a few bytes (dryrun.run_last); memory is the largest sum of arrays alive at once, the
weights apart. One size changes at a time, the others are those of GPT-2 small at context 128. Along each size
the least-squares line a + b x of every figure is given, and the x at which both parts are equal: well below
it the figure is nearly constant, well above it nearly proportional. `charts.py` draws the curves. Results go
to bench/results/scaling/ as one JSON file a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from run import commit  # noqa: E402

from mimir import cost, dryrun  # noqa: E402
from mimir.config import TriplePool  # noqa: E402
from mimir.model.checkpoint import PlanSpec  # noqa: E402
from mimir.mpc.nonlinear import Settings  # noqa: E402

RESULTS = HERE / "results" / "scaling"
CONTEXT = 128
SMALL = PlanSpec(
    family="gpt2",
    layers=12,
    width=768,
    heads=12,
    kv_heads=12,
    head_dim=64,
    hidden=3072,
    vocab=50257,
    context=1024,
    act="gelu_tanh",
    norm_eps=1e-5,
    positions="learned",
    rope_theta=None,
    bos_id=None,
    eos_ids=(),
)
SIZES = {
    "context": (64, 128, 256, 512, 1024),
    "width": (256, 512, 768, 1280),
    "layers": (2, 6, 12, 24),
}
FIGURES = ("rounds online", "rounds preprocessing", "MB online", "MB preprocessing", "MiB of arrays")


def shaped(size: str, x: int) -> tuple[PlanSpec, int]:
    """The model and the context of a point; a width has heads of 64 and a hidden layer 4 times as wide."""
    if size == "context":
        return SMALL, x
    if size == "width":
        heads = x // SMALL.head_dim
        return replace(SMALL, width=x, heads=heads, kv_heads=heads, hidden=4 * x), CONTEXT
    return replace(SMALL, layers=x), CONTEXT


@lru_cache  # each size passes the same middle
def point(spec: PlanSpec, context: int) -> dict[str, float]:
    """Figures of the last token of a context, per party."""
    run = dryrun.run_last(spec, Settings(), max_context=context, ahead=TriplePool().min_size)
    online, made = cost.last_token(run)
    values = (
        online.rounds,
        cost.each(made, "rounds"),
        online.sent / 1e6,
        cost.each(made, "sent") / 1e6,
        (run.peak + run.pool) / 2**20,
    )
    return dict(zip(FIGURES, values, strict=True))


def fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float | None]:
    """a + b x, and the x at which both parts are equal, if there is one."""
    b, a = np.polyfit(xs, ys, 1)
    worst = float(np.abs(a + b * np.array(xs) - ys).max() / max(ys))
    bend = float(a / b) if b > 1e-9 and a > 0 else None
    return {"constant": float(a), "slope": float(b), "bend": bend, "worst": worst}


def tables(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    out = [
        f"GPT-2 small, one decoded token, per party, exact, at commit {result['commit']}:",
        "",
    ]
    for size, told in result["sizes"].items():
        out += [f"| {size} | " + " | ".join(FIGURES) + " |", "|--:|" + "--:|" * len(FIGURES)]
        for x, p in zip(told["x"], told["points"], strict=True):
            out.append(f"| {x} | " + " | ".join(f"{p[f]:.4g}" for f in FIGURES) + " |")
        cells = []
        for f in FIGURES:
            t = told["fits"][f]
            bend = f", bends at {t['bend']:.0f}" if t["bend"] else ""
            grows = abs(t["slope"]) > 1e-9
            cells.append(
                f"{t['constant']:.3g} + {t['slope']:.3g} x{bend}" if grows else f"{t['constant']:.3g}"
            )
        out += ["| line | " + " | ".join(cells) + " |", ""]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="scaling.py [options]",
    )
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the table of this result and end")
    a = p.parse_args(argv)
    if a.show:
        print(tables(json.loads(a.show.read_text())))
        return 0
    now = datetime.now(UTC)
    result: dict[str, Any] = {"date": now.isoformat(timespec="seconds"), "commit": commit(), "sizes": {}}
    for size, xs in SIZES.items():
        points = []
        for x in xs:
            print(f"scaling: {size} {x}", file=sys.stderr)
            points.append(point(*shaped(size, x)))
        fits = {f: fit(xs, [q[f] for q in points]) for f in FIGURES}
        result["sizes"][size] = {"x": list(xs), "points": points, "fits": fits}
    a.out.mkdir(parents=True, exist_ok=True)
    target = a.out / f"{now:%Y-%m-%d-%H%M}-{result['commit'][:10]}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
