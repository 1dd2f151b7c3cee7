#!/usr/bin/env python3
"""What the tunnel costs: throughput, round trips and bytes, against the raw link under it.

    sudo python bench/tunnel.py                some two minutes
    sudo python bench/tunnel.py --seconds 1    shorter
    sudo python bench/tunnel.py --out FILE     the result (default: bench/results/tunnel.json)

Two nodes in network namespaces, joined by a bridge. The same client and server, TCP with blocking sockets and
cubic, over four links in turn, the repeats interleaved so that other work on the machine meets all alike:

    raw         the bridge
    tunnel      WireGuard with the configured keys alone
    rotating    as parties run it: WireGuard on interfaces of generations
    relayed     as `tunnel`, but one end in a namespace without network behind the relay of wg/vsock.py, over
                unix streams in the place of vsock; not Nitro hardware

Throughput is one way, from node 0 to node 1. A round trip is a message of so many bytes and one back. Both
ends, the bridge and the relay share this machine's processors, and so do others (`load`): ratios within one
run are what to use. Bytes are counted at node 0's network device, both ways, Ethernet's included, with
segmentation offload set aside so that each packet counts with its headers: what a link sees. `idle` is what
keepalives, pings and the talk of rotation cost when nothing is said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PORT = 7400
PIECE = 256 * 1024
ROUND_BYTES = (64, 8192)
ROUNDS = 300
BULK = 16 << 20
IDLE_SECONDS = 10.0
LINKS = ("raw", "tunnel", "rotating", "relayed")


# --- both ends, run in the namespaces -----------------------------------------------------------------------


def prepare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def serve() -> None:
    """Each connection says what it wants: a size to be echoed in, or 0 for bytes to be counted."""
    with socket.create_server(("0.0.0.0", PORT)) as listener:
        prepare(listener)
        print("ready", flush=True)
        while True:
            sock, _ = listener.accept()
            with sock, suppress(OSError, EOFError):
                prepare(sock)
                size = int.from_bytes(exactly(sock, 4), "big")
                while size:
                    sock.sendall(exactly(sock, size))
                total, buffer = 0, bytearray(PIECE)
                while got := sock.recv_into(buffer):
                    total += got
                sock.sendall(total.to_bytes(8, "big"))


def call(host: str, size: int) -> socket.socket:
    sock = socket.create_connection((host, PORT), timeout=60)
    prepare(sock)
    sock.sendall(size.to_bytes(4, "big"))
    return sock


def rounds(host: str, size: int, number: int) -> dict[str, float]:
    data, times = bytes(size), []
    with call(host, size) as sock:
        for _ in range(number):
            start = time.perf_counter()
            sock.sendall(data)
            exactly(sock, size)
            times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return {"median": statistics.median(times), "p99": times[int(0.99 * number)]}


def bulk(host: str, seconds: float, limit: int) -> dict[str, float]:
    data, sent = bytes(PIECE), 0
    start = time.perf_counter()
    with call(host, 0) as sock:
        while time.perf_counter() - start < seconds and sent < limit:
            sock.sendall(data)
            sent += len(data)
        sock.shutdown(socket.SHUT_WR)
        if int.from_bytes(exactly(sock, 8), "big") != sent:
            raise SystemExit("tunnel: bytes were lost")
    return {"bytes": sent, "mbit": sent * 8 / (time.perf_counter() - start) / 1e6}


# --- the measurement ----------------------------------------------------------------------------------------


class Link:
    """A namespace to call from, the address to call, and the namespace whose device is counted."""

    def __init__(self, client: str, host: str, server: str, counted: str) -> None:
        self.client, self.host, self.server, self.counted = client, host, server, counted

    def ask(self, what: str, *words: object) -> Any:
        command = [
            "ip",
            "netns",
            "exec",
            self.client,
            sys.executable,
            str(HERE / "tunnel.py"),
            "--end",
            what,
            self.host,
        ]
        done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise SystemExit(f"tunnel: {what} over {self.host} failed:\n{done.stderr}")
        return json.loads(done.stdout)

    def count(self) -> int:
        facts = json.loads(
            subprocess.run(
                ["ip", "-n", self.counted, "-s", "-j", "link", "show", "eth0"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )[0]["stats64"]
        return int(facts["rx"]["bytes"] + facts["tx"]["bytes"])


def raised(stack: ExitStack, name: str) -> Link:
    """A network of its own for each link, so that nothing is shared but the machine."""
    from lab import Enclave, Lab

    lab = stack.enter_context(Lab(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
    client, server = lab.namespace(0), lab.namespace(1)
    if name != "raw":
        places, where = {0: ("10.90.0.2", 51820), 1: ("10.90.0.1", 51820)}, None
        if name == "relayed":
            inside = Enclave(lab, 0)
            stack.callback(inside.clear)
            client = where = inside.namespace
            places[0] = ("127.0.0.1", inside.port(1))
        nodes = []
        for index in (0, 1):
            j = 1 - index
            peers = [[j, lab.keys[j].public().hex(), *places[index], [f"10.91.0.{j + 1}/32"]]]
            more = {"rotation": lab.rotation(index)} if name == "rotating" else {}
            nodes.append(lab.start(index, where if index == 0 else None, peers=peers, **more))
        for _ in ("raised", "up"):
            for node in nodes:
                node.hear()
    child = subprocess.Popen(
        ["ip", "netns", "exec", server, sys.executable, str(HERE / "tunnel.py"), "--end", "serve"],
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(child.wait)
    stack.callback(child.kill)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return Link(client, "10.90.0.2" if name == "raw" else "10.91.0.2", server, lab.namespace(0))


def measure(seconds: float, repeats: int) -> dict[str, Any]:
    with ExitStack() as stack:
        links = {name: raised(stack, name) for name in LINKS}
        found: dict[str, Any] = {
            name: {"mbit": [], "rounds_ms": {size: [] for size in ROUND_BYTES}} for name in LINKS
        }
        for _ in range(repeats):
            for name, link in links.items():
                found[name]["mbit"].append(link.ask("bulk", seconds, 1 << 40)["mbit"])
                for size in ROUND_BYTES:
                    found[name]["rounds_ms"][size].append(link.ask("rounds", size, ROUNDS))
        for link in links.values():
            for namespace in (link.counted, link.server):
                subprocess.run(
                    ["ip", "-n", namespace, "link", "set", "eth0", "gso_max_segs", "1"], check=True
                )
        for name, link in links.items():
            quiet = link.count()
            time.sleep(IDLE_SECONDS)
            idle = (link.count() - quiet) / IDLE_SECONDS
            found[name]["idle_bytes_a_second"] = idle
            for what, sent, words in (
                ("bulk", BULK, ("bulk", 600, BULK)),
                ("round", 2 * 64 * ROUNDS, ("rounds", 64, ROUNDS)),
            ):
                before, start = link.count(), time.monotonic()
                link.ask(*words)
                carried = link.count() - before - idle * (time.monotonic() - start)
                found[name][f"{what}_bytes_for_one"] = carried / sent
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| link | Mbit/s | of raw | 64 B there and back, ms (p99) | 8 KiB, ms (p99) "
        "| bytes on the link for one, bulk | in rounds of 64 B | idle B/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    raw = statistics.median(result["links"]["raw"]["mbit"])
    for name, row in result["links"].items():
        mbit = statistics.median(row["mbit"])
        cells = [name, f"{mbit:.0f}", f"{mbit / raw:.3f}"]
        for size in ROUND_BYTES:
            each = row["rounds_ms"][str(size)] if str(size) in row["rounds_ms"] else row["rounds_ms"][size]
            median, p99 = (statistics.median(one[key] for one in each) for key in ("median", "p99"))
            cells.append(f"{median:.2f} ({p99:.2f})")
        cells += [f"{row['bulk_bytes_for_one']:.4f}", f"{row['round_bytes_for_one']:.2f}"]
        cells.append(f"{row['idle_bytes_a_second']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tunnel.json")
    parser.add_argument("--end", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.end:
        case ["serve"]:
            return serve()
        case ["rounds", host, size, number]:
            return print(json.dumps(rounds(host, int(size), int(number))))
        case ["bulk", host, seconds, limit]:
            return print(json.dumps(bulk(host, float(seconds), int(limit))))
    from lab import why_not

    from wg.device import find_userspace

    if reason := why_not():
        raise SystemExit(f"tunnel: {reason}")
    program, before = find_userspace(), os.getloadavg()
    links = measure(options.seconds, options.repeats)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "wireguard-go": ".".join(map(str, program.version)) if program else None,
        "niceness": os.nice(0),
        "load": {"before": before, "after": os.getloadavg()},
        "links": links,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"load {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after; written to {options.out}")


if __name__ == "__main__":
    main()
