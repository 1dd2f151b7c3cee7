"""One node of a tunnel test: raises its tunnel, answers probes, does what it reads, says JSON lines.

    python tests/tunnel_node.py CONFIG.json

Commands on standard input, one per line: `probe HOST`, `pings HOST COUNT`, `rate HOST SECONDS`, `status`,
`rotate`, `crash WHAT` (at that moment of the next rotation, without a word to anybody), `stream HOST` and
`streamed` (its figures so far, and it ends), `admit PEER KEY [PSK|- [HOST PORT]]`, `expel PEER`, `expel-at
WHAT PEER` (at that moment, as `crash`), `up PEER SECONDS` (wait for it), `said` (what the tunnel has said).
End of input ends the node. With `rotation` in its configuration (seconds, record, seeds of the identities)
the node rotates; with the private key "memory" it makes one; without `wait` it does not wait for its peers.
This runs in a network namespace of its own; see lab.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

import structlog
import trio

from mimir.net.identity import BadSignature, Identity, verify
from mimir.secret import IdentityKey
from wg import PresharedKey, PublicKey, RotationPlan, TunnelConfig, WgError, generate, raise_tunnel
from wg.probe import answer_probes, probe
from wg.tunnel import Tunnel

PROBE_PORT = 7300
RATE_PORT = 7301
STREAM_PORT = 7302
STREAM_BYTES, STREAM_SECONDS = 64, 0.001
PIECE = 256 * 1024


def say(event: str, **what: Any) -> None:
    print(json.dumps({"event": event, **what}), flush=True)


async def listen(tunnel: Tunnel, port: int, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    listener = trio.socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tunnel.bind(listener)
    await listener.bind((str(tunnel.address), port))
    listener.listen(4)
    async with trio.open_nursery() as nursery:
        while True:
            connection, _ = await listener.accept()
            nursery.start_soon(serve, trio.SocketStream(connection))


async def echo(stream: trio.SocketStream) -> None:
    """For `Stream`, at the other end."""
    with suppress(OSError, trio.BrokenResourceError):
        async with stream:
            while piece := await stream.receive_some(PIECE):
                await stream.send_all(piece)


async def swallow_one(stream: trio.SocketStream) -> None:
    """Take bytes as fast as they come, and answer with their number at the end."""
    total = 0
    async with stream:
        while piece := await stream.receive_some(PIECE):
            total += len(piece)
        await stream.send_all(total.to_bytes(8, "little"))


async def rate(tunnel: Tunnel, host: str, seconds: float) -> dict[str, float]:
    connection = trio.socket.socket()
    tunnel.bind(connection)
    await connection.connect((host, RATE_PORT))
    stream = trio.SocketStream(connection)
    piece = bytes(PIECE)
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        await stream.send_all(piece)
    await stream.send_eof()
    answer = bytearray()
    while len(answer) < 8:
        answer += await stream.receive_some(8)
    spent = time.monotonic() - start
    await stream.aclose()
    total = int.from_bytes(answer, "little")
    return {"bytes": total, "seconds": spent, "mbit": total * 8 / spent / 1e6}


async def pings(tunnel: Tunnel, host: str, count: int) -> dict[str, float]:
    """Round trips of 64 bytes over one TCP connection to the other end's probe answerer, in ms."""
    connection = trio.socket.socket()
    tunnel.bind(connection)
    await connection.connect((host, PROBE_PORT))
    stream = trio.SocketStream(connection)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await stream.send_all(bytes(64))
        got = 0
        while got < 64:
            got += len(await stream.receive_some(64 - got))
        times.append((time.perf_counter() - start) * 1e3)
        await trio.sleep(0.005)
    await stream.aclose()
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


class Stream:
    """A message each millisecond over one TCP connection, sent back by the other end. Counts what came."""

    def __init__(self) -> None:
        self.sent = self.back = self.wrong = 0
        self.arrivals: list[float] = []
        self.broken = ""
        self.stop = trio.Event()
        self.over = trio.Event()

    async def run(self, tunnel: Tunnel, host: str) -> None:
        connection = trio.socket.socket()
        tunnel.bind(connection)
        await connection.connect((host, STREAM_PORT))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = trio.SocketStream(connection)
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream)
                rest = b""
                while piece := await stream.receive_some(65536):
                    self.arrivals.append(time.monotonic())
                    rest += piece
                    while len(rest) >= STREAM_BYTES:
                        self.wrong += rest[:STREAM_BYTES] != self.message(self.back)
                        self.back += 1
                        rest = rest[STREAM_BYTES:]
        except* (OSError, trio.BrokenResourceError) as problems:
            self.broken = str(problems.exceptions[0])
        self.over.set()

    async def _send(self, stream: trio.SocketStream) -> None:
        due = trio.current_time()
        while not self.stop.is_set():
            await stream.send_all(self.message(self.sent))
            self.sent += 1
            due += STREAM_SECONDS
            await trio.sleep_until(due)
        await stream.send_eof()

    @staticmethod
    def message(number: int) -> bytes:
        return number.to_bytes(8, "big") * (STREAM_BYTES // 8)

    def figures(self) -> dict[str, Any]:
        gaps = sorted(b - a for a, b in pairwise(self.arrivals))
        return {
            "sent": self.sent,
            "back": self.back,
            "wrong": self.wrong,
            "broken": self.broken,
            "longest": gaps[-1] if gaps else None,
            "median": gaps[len(gaps) // 2] if gaps else None,
            "gaps_ms": [round(gap * 1e3, 2) for gap in gaps[-20:]],
            "last": self.arrivals[-1] if self.arrivals else None,  # of a clock that all processes share
        }


def plan_of(index: int, told: dict[str, Any]) -> RotationPlan:
    """Test identities: every node gets all seeds."""
    identities = [Identity(IdentityKey(bytes.fromhex(seed))) for seed in told["seeds"]]
    return RotationPlan(
        told["seconds"],
        Path(told["record"]),
        identities[index].sign,
        lambda peer, message, signature: verify(identities[peer].public, message, signature),
        (BadSignature,),
        bytes(32),
    )


class Fate:
    """Ends this process outright, or expels a peer, when a rotation comes to the given point."""

    def __init__(self) -> None:
        self.at = self.expel_at = ""
        self.victim = -1
        self.due = trio.Event()
        self.heard: list[tuple[int, str]] = []

    def said(self, peer: int, what: str, epoch: int | None) -> None:
        self.heard.append((peer, what))
        if what == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == self.expel_at and peer == self.victim:
            self.due.set()

    async def expel(self, tunnel: Tunnel) -> None:
        while True:
            await self.due.wait()
            self.expel_at, self.due = "", trio.Event()
            await tunnel.expel(self.victim)
            say("expelled", peer=self.victim)


async def main(path: str) -> None:
    with open(path) as file:
        told = json.load(file)
    wait = told.pop("wait")
    if told["private_key"] == "memory":
        told["private_key"] = generate()
    if "rotation" in told:
        told["rotation"] = plan_of(told["index"], told["rotation"])
    start = time.monotonic()
    config = TunnelConfig.from_text(**told)
    fate = Fate()
    async with raise_tunnel(config, wait=None, said=fate.said) as tunnel, trio.open_nursery() as nursery:
        say(
            "raised",
            seconds=time.monotonic() - start,
            implementation=tunnel.implementation,
            public_key=tunnel.public_key.base64(),
        )
        nursery.start_soon(fate.expel, tunnel)
        await nursery.start(answer_probes, tunnel, PROBE_PORT)
        nursery.start_soon(listen, tunnel, RATE_PORT, swallow_one)
        nursery.start_soon(listen, tunnel, STREAM_PORT, echo)
        if wait is not None:
            await tunnel.wait_up(wait)
            say("up", seconds=time.monotonic() - start)
        commands = trio.lowlevel.FdStream(0)
        rest, stream = b"", Stream()
        while piece := await commands.receive_some(4096):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                match line.decode().split():
                    case ["stream", host]:
                        stream = Stream()
                        nursery.start_soon(stream.run, tunnel, host)
                        say("streaming")
                    case ["crash", what]:
                        fate.at = what
                        say("doomed")
                    case ["expel-at", what, peer]:
                        fate.expel_at, fate.victim = what, int(peer)
                        say("doomed")
                    case ["said"]:
                        say("said", said=fate.heard)
                    case ["streamed"]:
                        stream.stop.set()
                        with trio.move_on_after(20):
                            await stream.over.wait()
                        say("streamed", **stream.figures())
                    case words:
                        await obey(tunnel, words)
        nursery.cancel_scope.cancel()
    say("down")


async def obey(tunnel: Tunnel, words: list[str]) -> None:
    try:
        match words:
            case ["status"]:
                say(
                    "status",
                    peers=[entry.as_dict() for entry in tunnel.status()],
                    lost=tunnel.device_restarts,
                    rotations=[entry.as_dict() for entry in tunnel.rotations()],
                )
            case ["rotate"]:
                tunnel.rotate()
                say("rotating")
            case ["admit", peer, key, *more]:
                preshared = PresharedKey(bytes.fromhex(more[0])) if more and more[0] != "-" else None
                endpoint = (more[1], int(more[2])) if len(more) > 1 else None
                await tunnel.admit(
                    int(peer), PublicKey.from_text(key), preshared=preshared, endpoint=endpoint
                )
                say("admitted", peer=int(peer))
            case ["expel", peer]:
                start = time.monotonic()
                await tunnel.expel(int(peer))
                say("expelled", peer=int(peer), start=start, end=time.monotonic())
            case ["up", peer, seconds]:
                start = time.monotonic()
                await tunnel.wait_up(float(seconds), [int(peer)])
                say("up", seconds=time.monotonic() - start)
            case ["probe", host]:
                say("probe", seconds=await probe(tunnel, ip_address(host), PROBE_PORT))
            case ["pings", host, count]:
                say("pings", **await pings(tunnel, host, int(count)))
            case ["rate", host, seconds]:
                say("rate", **await rate(tunnel, host, float(seconds)))
            case _:
                say("unknown", words=words)
    except (WgError, OSError) as problem:
        say("failed", why=str(problem))


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        trio.run(main, sys.argv[1])
    except WgError as problem:
        say("error", kind=type(problem).__name__, why=str(problem))
        sys.exit(problem.exit_code)
