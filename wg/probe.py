"""Through the tunnel and back: a bulk transfer with a deadline, and the application's pings.

A tunnel whose MTU is too large for the path under it answers every ping, also at full size, and yet moves no
TCP: its packets become fragments that the path drops. Only a transfer of some size shows it. And a host
sends keepalives and acknowledges TCP for an application that hangs: only its own answer shows that it lives.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import trio

from wg.device import Address
from wg.errors import TunnelError
from wg.interface import PeerWatch

#: More than any first window, so that full-size segments have to be acknowledged on the way.
PROBE_BYTES = 256 * 1024
PROBE_SECONDS = 10.0
_PIECE = 64 * 1024
#: WireGuard's keepalive waits for silence in either direction, so of two ends in step only one would speak; a
#: ping of each application comes more often.
PING_SECONDS = 0.8
_PING, _PONG, _NONCE_BYTES = b"\0", b"\1", 8
#: Answers to the last so many are taken: a round trip may be longer than the time between two.
_PINGS_KEPT = 12


class Inside(Protocol):
    """The inside of a tunnel: an address of ours, and what ties a socket to it."""

    @property
    def interface(self) -> str: ...

    @property
    def address(self) -> Address: ...

    @property
    def mtu(self) -> int: ...

    def bind(self, sock: trio.socket.SocketType) -> None: ...


async def answer_probes(
    tunnel: Inside, port: int, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Listen inside the tunnel and send back what arrives, until cancelled. Reports the port it got."""
    family = socket.AF_INET6 if tunnel.address.version == 6 else socket.AF_INET
    listening = trio.socket.socket(family, socket.SOCK_STREAM)
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tunnel.bind(listening)
        await listening.bind((str(tunnel.address), port))
        listening.listen(8)
        async with trio.open_nursery() as nursery:
            task_status.started(listening.getsockname()[1])
            while True:
                connection, _ = await listening.accept()
                nursery.start_soon(_answer, trio.SocketStream(connection))


async def _answer(stream: trio.SocketStream) -> None:
    with trio.move_on_after(PROBE_SECONDS):
        try:
            async with stream:
                while piece := await stream.receive_some(_PIECE):
                    await stream.send_all(piece)
        except (OSError, trio.BrokenResourceError):
            pass  # the other end gave up; it knows why


async def probe(
    tunnel: Inside, host: Address, port: int, size: int = PROBE_BYTES, seconds: float = PROBE_SECONDS
) -> float:
    """Send `size` random bytes to a peer's `answer_probes` and read them back; the seconds it took.

    Raises `TunnelError` when they do not come back in time or come back changed.
    """
    sent = os.urandom(size)
    start = trio.current_time()
    try:
        with trio.fail_after(seconds):
            digest = await _exchange(tunnel, host, port, sent)
    except trio.TooSlowError:
        raise TunnelError(
            f"{tunnel.interface}: {size} bytes did not pass to {host} and back within {seconds:.0f} s though "
            f"the tunnel is up; is an MTU of {tunnel.mtu} too large for the path?"
        ) from None
    if digest != hashlib.sha256(sent).digest():
        raise TunnelError(f"{tunnel.interface}: bulk probe to {host} came back changed")
    return trio.current_time() - start


async def _exchange(tunnel: Inside, host: Address, port: int, sent: bytes) -> bytes:
    received = hashlib.sha256()
    family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
    connection = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        with connection:
            tunnel.bind(connection)
            await connection.connect((str(host), port))
            stream = trio.SocketStream(connection)

            async def send() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while piece := await stream.receive_some(_PIECE):
                    received.update(piece)
    except* (OSError, trio.BrokenResourceError) as problems:
        raise TunnelError(
            f"{tunnel.interface}: bulk probe to {host} failed: {problems.exceptions[0]}"
        ) from None
    return received.digest()


async def ping(
    tunnel: Inside, port: int, peers: Callable[[], Mapping[str, PeerWatch]], over: Callable[[], bool]
) -> None:
    """Ask the peers at these addresses for a sign of life now and then, and answer theirs, until `over`.

    Nobody is asked before WireGuard has heard from it: who speaks first is decided elsewhere. The answers are
    noted in the watches.
    """
    asked: deque[tuple[str, bytes, float]] = deque(maxlen=0)
    family = socket.AF_INET6 if tunnel.address.version == 6 else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock:
        tunnel.bind(sock)
        await sock.bind((str(tunnel.address), port))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hear, sock, peers, over, lambda: asked)
            while not over():
                now = trio.current_time()
                waiting = {host: watch for host, watch in peers().items() if watch.silent(now) is not None}
                asked = deque(asked, maxlen=_PINGS_KEPT * len(waiting))
                for host, watch in waiting.items():
                    watch.asked(now)
                    nonce = os.urandom(_NONCE_BYTES)
                    asked.append((host, nonce, now))
                    with suppress(OSError):  # the device is being revived, or the other end does not listen
                        await sock.sendto(_PING + nonce, (host, port))
                await trio.sleep(PING_SECONDS)
            nursery.cancel_scope.cancel()


async def _hear(
    sock: trio.socket.SocketType,
    peers: Callable[[], Mapping[str, PeerWatch]],
    over: Callable[[], bool],
    asked: Callable[[], deque[tuple[str, bytes, float]]],
) -> None:
    while True:
        try:
            data, (host, port, *_) = await sock.recvfrom(1 + _NONCE_BYTES + 1)
        except OSError:  # an ICMP error of an earlier datagram
            continue
        kind, nonce = data[:1], data[1:]
        watch = peers().get(host)
        if watch is None or len(nonce) != _NONCE_BYTES or over():
            continue
        if kind == _PING:
            with suppress(OSError):
                await sock.sendto(_PONG + nonce, (host, port))
        elif kind == _PONG:
            for who, sent, when in asked():
                if who == host and sent == nonce:
                    now = trio.current_time()
                    watch.answered(now, now - when)
