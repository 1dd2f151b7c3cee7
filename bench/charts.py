#!/usr/bin/env python3
"""Charts of what was measured and of what the cost model says: PNG files of at most 200 kB in bench/results/.

    python bench/charts.py                  from the latest results of scaling.py and peers/compare.py
    python bench/charts.py --results DIR    the folder with them (default: bench/results)

    scaling.png    rounds, megabytes, memory and seconds of a token against context, width, layers, sessions
                   at once and round trip
    peers.png      the blocks under SPU and under Mimir, processor seconds

A chart whose results are not there is left out, and said so. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ModuleNotFoundError:
    raise SystemExit("charts: matplotlib is missing; scripts/setup --extras bench installs it") from None

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LARGEST = 200_000  # bytes of a chart
ONLINE, MADE, OTHER = "#2a6f97", "#e09f3e", "#6c757d"


def latest(folder: Path) -> dict[str, Any] | None:
    """The newest result of a folder, by name."""
    files = sorted(folder.glob("*.json"))
    return json.loads(files[-1].read_text()) if files else None


def scaling(result: dict[str, Any]) -> Any:
    """A column a size; rounds, megabytes, memory, and seconds at either link, where a size has them."""
    online, made = ("online", ONLINE), ("preprocessing", MADE)
    rows = (
        ("rounds", (("rounds online", *online), ("rounds preprocessing", *made))),
        ("MB sent", (("MB online", *online), ("MB preprocessing", *made))),
        ("MiB of arrays", (("MiB of arrays", "in all", OTHER),)),
        ("s, local", (("s online, local", *online), ("s preprocessing, local", *made))),
        ("s, far", (("s online, far", *online), ("s preprocessing, far", *made))),
    )
    sizes = result["sizes"]
    figure, axes = plt.subplots(len(rows), len(sizes), figsize=(12, 11), sharex="col", squeeze=False)
    for column, (size, told) in enumerate(sizes.items()):
        ends = np.linspace(told["x"][0], told["x"][-1], 50)
        for line, (title, curves) in enumerate(rows):
            axis = axes[line][column]
            shown = [c for c in curves if c[0] in told["points"][0]]
            axis.set_visible(bool(shown))
            for name, label, colour in shown:
                axis.plot(told["x"], [p[name] for p in told["points"]], "o", color=colour, label=label)
                t = told["fits"][name]
                a, b = t["constant"], t["slope"]
                larger = name in told.get("larger", ())
                ys = np.maximum(a, b * ends) if larger else a + b * ends
                axis.plot(ends, ys, color=colour, linewidth=0.8)
                if t["bend"] and told["x"][0] < t["bend"] < told["x"][-1]:
                    axis.axvline(t["bend"], color=colour, linewidth=0.6, linestyle=":")
            axis.set_ylim(bottom=0)
            if not column:
                axis.set_ylabel(title)
                axis.legend(frameon=False, fontsize=7)
        axes[-1][column].set_xlabel(size)
    figure.suptitle(
        "One decoded token of GPT-2 small, per party, by the cost model (lines: fits, dotted: their bends)",
        fontsize=10,
    )
    return figure


def peers(result: dict[str, Any]) -> Any:
    """Processor seconds of every block, which do not wait for other work, on a logarithmic axis."""
    rows = result["rows"]
    series = (
        ("SPU, semi-honest", OTHER, [r["spu"]["processor"] for r in rows.values()]),
        ("Mimir online, malicious", ONLINE, [r["mimir"]["online"]["processor"] for r in rows.values()]),
        ("Mimir preprocessing, malicious", MADE, [r["mimir"]["prep"]["processor"] for r in rows.values()]),
    )
    figure, axis = plt.subplots(figsize=(10, 3.6))
    for i, (label, colour, values) in enumerate(series):
        axis.bar([x + 0.27 * (i - 1) for x in range(len(rows))], values, 0.25, color=colour, label=label)
    axis.set_xticks(range(len(rows)), list(rows), fontsize=8)
    axis.set_yscale("log")
    axis.set_ylabel("processor seconds, all three parties")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(f"Measured {result['date'][:10]}, three processes each, loopback", fontsize=10)
    return figure


def save(figure: Any, target: Path) -> None:
    """Write a chart, unless it is larger than a repository should carry."""
    figure.tight_layout()
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=90, metadata={"Software": None})
    plt.close(figure)
    if len(raw.getvalue()) > LARGEST:
        raise SystemExit(
            f"charts: {target.name} would have {len(raw.getvalue())} bytes; the limit is {LARGEST}"
        )
    target.write_bytes(raw.getvalue())
    print(f"{target}: {len(raw.getvalue()) // 1000} kB")


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="charts.py [options]"
    )
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    a = p.parse_args(argv)
    drawn = 0
    for draw in (scaling, peers):
        folder = a.results / draw.__name__
        result = latest(folder)
        if result is None:
            print(f"charts: no results in {folder}", file=sys.stderr)
            continue
        save(draw(result), a.results / f"{draw.__name__}.png")
        drawn += 1
    return 0 if drawn else 2


if __name__ == "__main__":
    sys.exit(main())
