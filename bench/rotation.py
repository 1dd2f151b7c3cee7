#!/usr/bin/env python3
"""What a rotation of tunnel keys costs a steady stream: the longest stall over many rotations.

    sudo python bench/rotation.py                   100 rotations, some eight minutes
    sudo python bench/rotation.py --rotations 10    shorter
    sudo python bench/rotation.py --wan 20:100      over the relay: ms round trip, Mbit/s each way
    sudo python bench/rotation.py --out FILE        the result (default: bench/results/rotation.json)

Three nodes in network namespaces, each rotating with both others. Node 0 sends 64 bytes to node 1 each
millisecond over one TCP connection, and node 1 sends them back. First as long a time without rotations as the
rotations will take, then with one rotation after another, each begun when the one before has drained. A stall
is the time between two arrivals. The stream without rotations is the noise floor: what the machine, its other
work and Python do by themselves. The figure to read is the difference of the two; with other work on the
machine (`load`) both are large.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lab import Lab, Node, why_not  # noqa: E402

from wg import relay  # noqa: E402
from wg.device import find_userspace  # noqa: E402

#: A rotation with its drain takes about two seconds on an idle machine; the wait for one is bounded.
SECONDS_A_ROTATION = 2.3
PATIENCE = 60.0


def endpoints(lab: Lab) -> tuple[list[relay.Pair], list[list[Any]]]:
    """The relay's pairs, bootstrap and further generations, and each node's peers behind it."""
    pairs, port = [], itertools.count(41000, 8)
    at = {(a, b): next(port) for a in range(3) for b in range(3) if a != b}
    hub, node = "10.90.0.254", "10.90.0.{}".format
    for a, b in ((0, 1), (0, 2), (1, 2)):
        place = [peer for peer in range(3) if peer != b].index(a)
        for offset in (0, 1 + 2 * place, 2 + 2 * place):
            caller = 51820 if offset == 0 else 0
            pairs.append(
                relay.Pair(
                    f"{hub}:{at[a, b] + offset}",
                    f"{node(a + 1)}:{caller}",
                    f"{hub}:{at[b, a] + offset}",
                    f"{node(b + 1)}:{51820 + offset}",
                )
            )
    peers = [
        [
            [j, lab.keys[j].public().hex(), hub, at[index, j], [f"10.91.0.{j + 1}/32"]]
            for j in range(3)
            if j != index
        ]
        for index in range(3)
    ]
    return pairs, peers


def settled(nodes: list[Node], epoch: int) -> bool:
    for index, node in enumerate(nodes):
        for entry in node.ask("status")["rotations"]:
            if 0 in (index, entry["peer"]) and (entry["epoch"] != epoch or entry["state"] != "steady"):
                return False
    return True


def wait_for(nodes: list[Node], epoch: int) -> None:
    end = time.monotonic() + PATIENCE
    while not settled(nodes, epoch):
        if time.monotonic() > end:
            raise SystemExit(f"rotation: not at epoch {epoch} after {PATIENCE:g} s")
        time.sleep(0.1)


def stream(nodes: list[Node], seconds: float) -> dict[str, Any]:
    nodes[0].ask("stream 10.91.0.2")
    time.sleep(seconds)
    return nodes[0].ask("streamed")


def measure(rotations: int, wan: str | None, folder: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(folder))
        changes: list[dict[str, Any]] = [{} for _ in range(3)]
        if wan is not None:
            pairs, peers = endpoints(lab)
            program = relay.build(folder / "relay")
            prefix = ["ip", "netns", "exec", lab.hub]
            shape = relay.Shape.parse(wan)
            stack.enter_context(relay.Relay(program, shape, pairs, prefix=prefix, fifo=True))
            changes = [{"peers": each} for each in peers]
        nodes = [lab.start(i, rotation=lab.rotation(i), **changes[i]) for i in range(3)]
        for _ in ("raised", "up"):
            for node in nodes:
                node.hear()
        wait_for(nodes, 1)
        without = stream(nodes, rotations * SECONDS_A_ROTATION)
        nodes[0].ask("stream 10.91.0.2")
        start = time.monotonic()
        for number in range(rotations):
            nodes[0].ask("rotate")
            wait_for(nodes, number + 2)
        spent = time.monotonic() - start
        during = nodes[0].ask("streamed")
        aborted = sum(entry["aborted"] for node in nodes for entry in node.ask("status")["rotations"])
    return {"rotations": rotations, "aborted": aborted, "seconds": spent, "none": without, "rotating": during}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rotations", type=int, default=100)
    parser.add_argument("--wan", metavar="RTT_MS[:MBIT]")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "rotation.json")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"rotation: {reason}")
    program = find_userspace()
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.rotations, options.wan, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "wireguard-go": ".".join(map(str, program.version)) if program else None,
        "link": options.wan or "local",
        "load": {"before": before, "after": os.getloadavg()},
        **found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("none", "rotating"):
        figures = result[name]
        print(
            f"{name:9} {figures['sent']} sent, {figures['sent'] - figures['back']} lost, "
            f"longest stall {figures['longest'] * 1e3:.1f} ms, median {figures['median'] * 1e3:.2f} ms"
        )
    print(f"{found['rotations']} rotations in {found['seconds']:.0f} s, {found['aborted']} aborted")
    print(f"load {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after; written to {options.out}")


if __name__ == "__main__":
    main()
