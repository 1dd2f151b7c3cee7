"""A bulk transfer through the tunnel, there and back, with a deadline.

A tunnel whose MTU is too large for the path under it answers every ping, also at full size, and yet moves no
TCP: its packets become fragments that the path drops. Only a transfer of some size shows it.
"""

from __future__ import annotations

import hashlib
import os
import socket
from typing import Protocol

import trio

from wg.device import Address
from wg.errors import TunnelError

#: More than any first window, so that full-size segments have to be acknowledged on the way.
PROBE_BYTES = 256 * 1024
PROBE_SECONDS = 10.0
_PIECE = 64 * 1024


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
