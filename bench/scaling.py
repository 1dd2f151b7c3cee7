#!/usr/bin/env python3
"""How a decoded token grows with context, width, layers, sessions at once and round trip, by the cost model.

    python bench/scaling.py                 a few minutes of one core; no weights are needed
    python bench/scaling.py --rates FILE    the machine's rates, of `mimir cost --rates`; else measured, 10 s
    python bench/scaling.py --show FILE     print the table of a result again

Each point is a session of one party over shapes (mimir.dryrun), so rounds and bytes are exact, per party,
framing included but for a few bytes (dryrun.run_last); memory is the largest sum of arrays alive at once, the
weights apart. One size changes at a time, the others are those of GPT-2 small at context 128. Along each size
the least-squares line a + b x of every figure is given, and the x at which both parts are equal: well below
it the figure is nearly constant, well above it nearly proportional.

Seconds are the cost model's, from rates of this machine: three parties on its cores ("local"), and the same
behind FAR, milliseconds there and back and Mbit/s each way. They are as good as the rates, so measure on an
idle machine. With the round trip they are a line by construction: processor and link, and half of it a round.

Sessions at once decode as rows of one pass, whose rounds they share and which reads each weight once.
Preprocessing is each session's own, on lanes of its own: a round of one waits for no other session, so what n
sessions share is the processors and the links, and their delays pass side by side. With D the seconds of a
session alone and M its part on the busiest resource, that takes at least max(D, n M) for a token of each; it
bends at D / M sessions (operational analysis of closed queues, Denning and Buzen 1978). Queues and Python's
lock come on top: bench/targets.py measures 8. Their memory adds up.

`charts.py` draws the curves. Results go to bench/results/scaling/ as one JSON file a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache, reduce
from operator import add
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
FAR = cost.Link(20.0, 100.0, parties_here=3)
LINKS = {"local": cost.Link(parties_here=3), "far": FAR}
AT_ONCE = (1, 2, 4, 8)
ROUND_TRIPS = (0, 5, 10, 20, 50, 100)  # ms
EXACT = ("rounds online", "rounds preprocessing", "MB online", "MB preprocessing", "MiB of arrays")
SECONDS = tuple(f"s {lane}, {name}" for name in LINKS for lane in ("online", "preprocessing"))
FIGURES = EXACT + SECONDS


def shaped(size: str, x: int) -> tuple[PlanSpec, int]:
    """The model and the context of a point; a width has heads of 64 and a hidden layer 4 times as wide."""
    if size == "context":
        return SMALL, x
    if size == "width":
        heads = x // SMALL.head_dim
        return replace(SMALL, width=x, heads=heads, kv_heads=heads, hidden=4 * x), CONTEXT
    return replace(SMALL, layers=x), CONTEXT


@lru_cache  # each size passes the same middle
def counted(spec: PlanSpec, context: int) -> dryrun.Run:
    """The last token of a context, over shapes."""
    return dryrun.run_last(spec, Settings(), max_context=context, ahead=TriplePool().min_size)


def parts(run: dryrun.Run, rates: cost.Rates, link: cost.Link) -> dict[str, cost.Part]:
    """What the token takes online, and its part of the preprocessing."""
    online, made = cost.last_token(run)
    each = (cost.part(c, rates, link, n) for c, n in made)
    return {"online": cost.part(online, rates, link), "preprocessing": reduce(add, each)}


def seconds(run: dryrun.Run, rates: cost.Rates) -> dict[str, float]:
    """By the names in SECONDS."""
    return {
        f"s {lane}, {name}": part.seconds
        for name, link in LINKS.items()
        for lane, part in parts(run, rates, link).items()
    }


def point(spec: PlanSpec, context: int, rates: cost.Rates) -> dict[str, float]:
    """Figures of the last token of a context, per party."""
    run = counted(spec, context)
    online, made = cost.last_token(run)
    values = (
        online.rounds,
        cost.each(made, "rounds"),
        online.sent / 1e6,
        cost.each(made, "sent") / 1e6,
        (run.peak + run.pool) / 2**20,
    )
    return dict(zip(EXACT, values, strict=True)) | seconds(run, rates)


def at_once(part: cost.Part, sessions: int) -> float:
    """Seconds in which each of some sessions takes this step once, at least."""
    return max(part.seconds, sessions * max(part.processor, part.link))


def one_pass(c: dryrun.Counts, rows: int) -> dryrun.Counts:
    """Of a pass in which so many sessions decode a token like this one: its rounds and calls, and otherwise
    as much of each; weights are multiplied by all rows at once.
    """
    out = c.copy()
    for name in ("sent", "busiest", "payload", "hashed"):
        setattr(out, name, rows * getattr(c, name))
    out.work = Counter({k: n if k in dryrun.PYTHON else rows * n for k, n in c.work.items()})
    if rows > 1:
        for name in dryrun.STREAMED:
            out.work[name] += out.work.pop(name + dryrun.ONE_ROW, 0)
    return out


def of_sessions(rates: cost.Rates) -> dict[str, Any]:
    """One token of each of 1 to 8 sessions. Online they share a pass; preparing side by side takes the
    larger of a constant and a proportional part.
    """
    run = counted(SMALL, CONTEXT)
    online, _ = cost.last_token(run)
    points: list[dict[str, float]] = [{} for _ in AT_ONCE]
    fits: dict[str, dict[str, float | None]] = {}
    for name, link in LINKS.items():
        making, passing = parts(run, rates, link)["preprocessing"], f"s online, {name}"
        for n, told in zip(AT_ONCE, points, strict=True):
            told[passing] = cost.part(one_pass(online, n), rates, link).seconds
            told[f"s preprocessing, {name}"] = at_once(making, n)
        fits[passing] = fit(AT_ONCE, [p[passing] for p in points])
        busiest = max(making.processor, making.link)
        fits[f"s preprocessing, {name}"] = {
            "constant": making.seconds,
            "slope": busiest,
            "bend": making.seconds / busiest if busiest else None,
            "worst": 0.0,
        }
    for n, told in zip(AT_ONCE, points, strict=True):
        told["MiB of arrays"] = n * (run.peak + run.pool) / 2**20
    fits["MiB of arrays"] = fit(AT_ONCE, [p["MiB of arrays"] for p in points])
    return {
        "x": list(AT_ONCE),
        "points": points,
        "fits": fits,
        "larger": [f"s preprocessing, {name}" for name in LINKS],
    }


def of_round_trips(rates: cost.Rates) -> dict[str, Any]:
    """A token against the round trip in milliseconds, at the rate of FAR."""
    run = counted(SMALL, CONTEXT)
    points = [
        {
            f"s {lane}, far": part.seconds
            for lane, part in parts(run, rates, replace(FAR, rtt=float(rtt))).items()
        }
        for rtt in ROUND_TRIPS
    ]
    fits = {f: fit(ROUND_TRIPS, [p[f] for p in points]) for f in points[0]}
    return {"x": list(ROUND_TRIPS), "points": points, "fits": fits}


def fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float | None]:
    """a + b x, and the x at which both parts are equal, if there is one."""
    b, a = np.polyfit(xs, ys, 1)
    worst = float(np.abs(a + b * np.array(xs) - ys).max() / max(ys))
    bend = float(a / b) if b > 1e-9 and a > 0 else None
    return {"constant": float(a), "slope": float(b), "bend": bend, "worst": worst}


def _line(t: dict[str, Any], last: float, larger: bool) -> str:
    """A fit in words; a bend beyond the last point is none."""

    def said(v: float) -> str:
        return f"{v:.3g}" if v < 1e3 else f"{v:,.0f}"

    a, b = t["constant"], t["slope"]
    bend = f", bends at {said(t['bend'])}" if t["bend"] and t["bend"] < last else ""
    if abs(b) <= 1e-9:
        return said(a)
    if abs(a) <= 1e-9 * abs(b):
        return f"{said(b)} x"
    return f"max({said(a)}, {said(b)} x){bend}" if larger else f"{said(a)} + {said(b)} x{bend}"


def tables(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    out = [
        f"GPT-2 small, one decoded token, per party, at commit {result['commit']}. Rounds, megabytes and "
        f"memory are exact, seconds a model by rates of {result['rates']}: local, and far, {FAR.rtt:g} ms "
        f"there and back (but for the last table) and {FAR.rate:g} Mbit/s each way; all three parties on "
        "this machine's cores.",
        "",
    ]
    for size, told in result["sizes"].items():
        figures = [f for f in FIGURES if f in told["points"][0]]
        out += [f"| {size} | " + " | ".join(figures) + " |", "|--:|" + "--:|" * len(figures)]
        for x, p in zip(told["x"], told["points"], strict=True):
            out.append(f"| {x} | " + " | ".join(f"{p[f]:.4g}" for f in figures) + " |")
        fits, larger = told["fits"], told.get("larger", ())
        cells = [_line(fits[f], told["x"][-1], f in larger) for f in figures]
        out += ["| line | " + " | ".join(cells) + " |", ""]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="scaling.py [options]",
    )
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    p.add_argument("--rates", type=Path, metavar="FILE", help="of this machine, as `mimir cost` keeps them")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the table of this result and end")
    a = p.parse_args(argv)
    if a.show:
        print(tables(json.loads(a.show.read_text())))
        return 0
    now = datetime.now(UTC)
    rates = cost.Rates.read(a.rates) if a.rates else cost.calibrate()
    result: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "rates": f"{rates.cores} cores, {rates.kernels} kernels",
        "sizes": {},
    }
    for size, xs in SIZES.items():
        points = []
        for x in xs:
            print(f"scaling: {size} {x}", file=sys.stderr)
            points.append(point(*shaped(size, x), rates))
        fits = {f: fit(xs, [q[f] for q in points]) for f in FIGURES}
        result["sizes"][size] = {"x": list(xs), "points": points, "fits": fits}
    result["sizes"] |= {"sessions": of_sessions(rates), "round trip, ms": of_round_trips(rates)}
    a.out.mkdir(parents=True, exist_ok=True)
    target = a.out / f"{now:%Y-%m-%d-%H%M}-{result['commit'][:10]}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
