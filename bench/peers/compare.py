#!/usr/bin/env python3
"""The same blocks of a GPT-2 small under Mimir and under SPU, on one machine in one run, and the ratios.

    python bench/peers/compare.py               installs SPU on first use; then some ten minutes on two cores
    python bench/peers/compare.py --env DIR     where SPU's environment is or goes (default: work/peers-spu)
    python bench/peers/compare.py --show FILE   print the table of a result again

What is compared is not alike, so read the ratios with this in mind:

- **Security.** SPU runs ABY3 with three parties, *semi-honest*: a party that deviates from the protocol can
  change the result unnoticed, and learn from it. Mimir is *malicious with abort*: whatever one party does,
  the result is right or there is none. Mimir's online seconds cover what depends on the input; its
  preprocessing, which makes and verifies material and needs no input, can be done before and is shown beside
  it. SPU has no such division in this protocol. "Together" compares everything with everything.
- **Numbers.** Both compute in a 64-bit ring; SPU with 18 fraction bits and its default approximations, Mimir
  with 16 and its own. The largest error against float64 stands in the table.
- **Conditions.** Three processes each, over loopback, without a tunnel for either. SPU is C++, compiles the
  whole block beforehand and its first run is not counted; Mimir is Python around C kernels. Inputs and
  weights are shared before the clock starts. Sent bytes are what passes the loopback interface, headers and
  acknowledgements included, divided by three. As root, each side gets a network namespace of its own, so that
  nothing else is counted; otherwise other programs' loopback traffic is. On a machine with other work to do
  compare the processor seconds, of all three parties together: they do not wait.

Results go to bench/results/peers/ as one JSON file a run. SPU (Apache 2.0) is installed from the package
index into an environment of its own and is no dependency of Mimir; Python 3.11 is needed for its wheel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]

import blocks  # noqa: E402
from run import commit, machine  # noqa: E402

RESULTS = HERE.parent / "results" / "peers"
PACKAGE = "spu"
PYTHON = "python3.11"


def environment(at: Path) -> Path:
    """The interpreter of an environment that has SPU; made and filled on first use."""
    python = at / "bin" / "python"
    if not python.exists():
        found = shutil.which(PYTHON)
        if found is None:
            raise SystemExit(f"peers: SPU's wheel needs {PYTHON}, which is not on the search path")
        print(f"peers: making {at} and installing {PACKAGE} into it", file=sys.stderr)
        subprocess.run([found, "-m", "venv", str(at)], check=True)
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-input", PACKAGE], check=False)
        if done.returncode:
            shutil.rmtree(at)
            raise SystemExit(f"peers: pip could not install {PACKAGE}; its words are above")
    return python


def version(python: Path) -> str:
    said = subprocess.run(
        [str(python), "-c", "import importlib.metadata as m; print(m.version('spu'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if said.returncode:
        raise SystemExit(f"peers: {python} has no {PACKAGE}; remove its environment to have it made anew")
    return said.stdout.strip()


def alone(words: list[str], apart: bool) -> list[str]:
    """The command, in a network namespace of its own if `apart`."""
    own = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    return [*own, *words] if apart else words


def rows_of(python: Path, script: str, apart: bool) -> dict[str, dict[str, Any]]:
    """Run a script of this folder; what it printed, by block."""
    print(f"peers: {script}", file=sys.stderr)
    done = subprocess.run(
        alone([str(python), str(HERE / script)], apart), stdout=subprocess.PIPE, text=True, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"block"')]
    if done.returncode or [r["block"] for r in found] != list(blocks.NAMES):
        raise SystemExit(f"peers: {script} ended with exit status {done.returncode}; see above")
    return {r["block"]: r for r in found}


def tables(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    m = result["machine"]

    def err(value: float | None) -> str:
        return "-" if value is None else f"{value:.1g}"

    out = [
        f"Measured {result['date'][:10]} at commit {result['commit']} by `bench/peers/compare.py`, on "
        f"{m['cores']} cores of {m['processor']} ({m['kernels']} kernels), SPU {result['spu']}; load before, "
        f"between, after: {', '.join(f'{x:.1f}' for x in result['load'])}. Three processes each, loopback, "
        "no tunnel. CPU seconds are of all three together. Ratios are Mimir's figure over SPU's.",
        "",
        "| block | SPU s (semi-honest) | Mimir online s (malicious) | ratio | Mimir prep. s "
        "| together, ratio | SPU CPU s | Mimir online CPU s | ratio | Mimir prep. CPU s "
        "| SPU MB | Mimir online MB | ratio | Mimir prep. MB | error SPU | error Mimir |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in blocks.NAMES:
        spu, ours = result["rows"][name]["spu"], result["rows"][name]["mimir"]
        online, made = ours["online"], ours["prep"]
        out.append(
            f"| {name} | {spu['seconds']:.2f} | {online['seconds']:.2f} "
            f"| {online['seconds'] / spu['seconds']:.2f} | {made['seconds']:.1f} "
            f"| {(online['seconds'] + made['seconds']) / spu['seconds']:.1f} | {spu['processor']:.2f} "
            f"| {online['processor']:.2f} | {online['processor'] / spu['processor']:.2f} "
            f"| {made['processor']:.1f} | {spu['sent'] / 1e6:.2f} "
            f"| {online['sent'] / 1e6:.2f} | {online['sent'] / spu['sent']:.2f} | {made['sent'] / 1e6:.1f} "
            f"| {err(spu['error'])} | {err(ours['error'])} |"
        )
    return "\n".join([*out, ""])


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="compare.py [options]",
    )
    p.add_argument("--env", type=Path, default=ROOT / "work" / "peers-spu", metavar="DIR")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the table of this result and end")
    a = p.parse_args(argv)
    if a.show:
        print(tables(json.loads(a.show.read_text())))
        return 0
    python = environment(a.env)
    apart = os.geteuid() == 0 and shutil.which("unshare") is not None and shutil.which("ip") is not None
    if not apart:
        print("peers: no network namespace: other loopback traffic is counted as well", file=sys.stderr)
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "load": [os.getloadavg()[0]],
        "spu": version(python),
        "apart": apart,
    }
    spu = rows_of(python, "spu_blocks.py", apart)
    result["load"].append(os.getloadavg()[0])
    ours = rows_of(Path(sys.executable), "mimir_blocks.py", apart)
    result["load"].append(os.getloadavg()[0])
    result["rows"] = {name: {"spu": spu[name], "mimir": ours[name]} for name in blocks.NAMES}
    a.out.mkdir(parents=True, exist_ok=True)
    target = a.out / f"{now:%Y-%m-%d-%H%M}-{result['commit'][:10]}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
