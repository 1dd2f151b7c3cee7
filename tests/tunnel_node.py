"""One node of a tunnel test: raises its tunnel, answers probes, does what it reads, says JSON lines.

    python tests/tunnel_node.py CONFIG.json

Commands on standard input, one per line: `probe HOST`, `pings HOST COUNT`, `rate HOST SECONDS`, `status`.
End of input ends the node. This runs in a network namespace of its own; see test_wg.py.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time
from ipaddress import ip_address
from typing import Any

import structlog
import trio

from wg import TunnelConfig, WgError, raise_tunnel
from wg.probe import answer_probes, probe
from wg.tunnel import Tunnel

PROBE_PORT = 7300
RATE_PORT = 7301
PIECE = 256 * 1024


def say(event: str, **what: Any) -> None:
    print(json.dumps({"event": event, **what}), flush=True)


async def swallow(tunnel: Tunnel) -> None:
    """Take bytes as fast as they come, and answer with their number at the end."""
    listener = trio.socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tunnel.bind(listener)
    await listener.bind((str(tunnel.address), RATE_PORT))
    listener.listen(4)
    async with trio.open_nursery() as nursery:
        while True:
            connection, _ = await listener.accept()
            nursery.start_soon(swallow_one, trio.SocketStream(connection))


async def swallow_one(stream: trio.SocketStream) -> None:
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


async def main(path: str) -> None:
    with open(path) as file:
        told = json.load(file)
    wait = told.pop("wait")
    start = time.monotonic()
    config = TunnelConfig.from_text(**told)
    async with raise_tunnel(config, wait=None) as tunnel, trio.open_nursery() as nursery:
        say("raised", seconds=time.monotonic() - start, implementation=tunnel.implementation)
        await nursery.start(answer_probes, tunnel, PROBE_PORT)
        nursery.start_soon(swallow, tunnel)
        await tunnel.wait_up(wait)
        say("up", seconds=time.monotonic() - start)
        commands = trio.lowlevel.FdStream(0)
        rest = b""
        while piece := await commands.receive_some(4096):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                await obey(tunnel, line.decode().split())
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
                )
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
