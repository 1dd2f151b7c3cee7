"""WireGuard for an enclave that has no network: its datagrams go over streams to a relay on the parent.

A Nitro enclave has vsock and nothing else, and vsock has no datagrams. So WireGuard runs inside, where its
keys are, and takes for each peer's endpoint a port of the enclave's own loopback. There the *enclave* role
waits and hands what it gets to the *parent* role, which sends it on by UDP as if it were the node; and back.
The parent sees ciphertext, sizes and times; it can drop, delay, repeat and invent, as any network can.

    python -m wg.vsock parent --listen ANY:5005 --bind 0.0.0.0:51820 --peer 1=203.0.113.5:51820 --peer 2=...
    python -m wg.vsock enclave --parent 3:5005 --wireguard 127.0.0.1:51820 --peer 1=127.0.0.1:41010 ...

Streams are named CID:PORT (`ANY` listens for all; the parent of every enclave is CID 3). A node has its
configured port and, for rotation, some after it (`wg.rotation`): `--ports` many, at every node alike. So in
the enclave's tunnel configuration peer 1 above is at 127.0.0.1:41010, and each frame says which of the
enclave's ports and which of the peer's it is between, counted from the first.

A frame is a head, `!HHBB`, and bytes: their number, the size of each datagram in them (the last may be
shorter; the kernel hands over a run of datagrams at once, and takes one), the enclave's port, the peer's.
A stream begins with a greeting of the enclave that names the peer. Rules:

1. One stream for each peer, and one bounded queue before it: what does not fit is dropped, as a network does.
   Nothing waits behind it, is reordered, or holds up another peer.
2. Every length is bounded, and a stream that breaks the form is closed. Frames can only name the ports of the
   node and of its configured peers: the parent cannot reach anything else in the enclave, nor the enclave
   anybody else outside.
3. The enclave connects, again and again; a new stream for a peer replaces the one before.
"""

from __future__ import annotations

import argparse
import errno
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import structlog
import trio

from wg.errors import TunnelError, WgError, leaves
from wg.interface import Place, resolve
from wg.rotation import MAX_OFFSET

log = structlog.get_logger("wg.vsock")

GREETING = struct.Struct("!8sBB")  # magic, peer, ports
MAGIC = b"wgrelay1"
HEAD = struct.Struct("!HHBB")
MAX_PAYLOAD = 65507  # of UDP over IPv4
#: The kernel joins at most 128 datagrams (64 before 6.9, and so many may be handed to it on any).
MAX_PIECES, PIECES_AT_ONCE = 128, 64
#: Waiting for a stream; 2 ms at 1 Gbit/s, 20 ms at 100 Mbit/s. More would only add delay.
QUEUE_BYTES = 256 * 1024
RECEIVE_BYTES = 64 * 1024
SOCKET_BUFFER_BYTES = 4 << 20  # as far as the host allows
BURST = 16  # receptions from one socket before others have their turn
GREETING_SECONDS = 5.0
#: Streams that have not said yet for which peer they are.
MAX_STRANGERS = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
REPORT_SECONDS = 10.0
DEFAULT_PORTS = 5  # the configured one, and two for each of two peers
ANY = "ANY"

# From linux/udp.h.
_UDP_SEGMENT, _UDP_GRO = 103, 104
_PLAIN = struct.Struct("=i")


class RelayError(WgError):
    """A stream that breaks the form; says how."""


@dataclass(frozen=True)
class Frame:
    """Datagrams between one port of the enclave and one of the peer, all of `segment` bytes but the last."""

    data: memoryview
    segment: int
    here: int  # the enclave's port, from its first
    there: int  # the peer's

    @property
    def pieces(self) -> int:
        return -(-len(self.data) // self.segment)


def head(frame: Frame) -> bytes:
    return HEAD.pack(len(frame.data), frame.segment, frame.here, frame.there)


class Frames:
    """Bytes in, frames out, without I/O. Raises `RelayError` on what is no frame between known ports."""

    def __init__(self, ports: int) -> None:
        self._ports = ports
        self._rest = bytearray()
        self._due = HEAD.size  # before that many are there, nothing is complete

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """The frames that are complete now. At most one incomplete frame is kept."""
        self._rest += data
        if len(self._rest) < self._due:
            return
        whole, at = memoryview(bytes(self._rest)), 0
        self._due = HEAD.size
        while len(whole) - at >= HEAD.size:
            length, segment, here, there = HEAD.unpack_from(whole, at)
            if not 1 <= segment <= length <= min(MAX_PAYLOAD, segment * MAX_PIECES):
                raise RelayError(f"a frame of {length} bytes in datagrams of {segment}")
            if here >= self._ports or there >= self._ports:
                raise RelayError(f"a frame between ports {here} and {there} of {self._ports}")
            end = at + HEAD.size + length
            if end > len(whole):
                self._due = end - at
                break
            yield Frame(whole[at + HEAD.size : end], segment, here, there)
            at = end
        self._rest = bytearray(whole[at:])


@dataclass(frozen=True)
class Streams:
    """Where streams are made: a socket family, and an address in it."""

    family: int
    address: Any

    @classmethod
    def parse(cls, text: str) -> Streams:
        """From CID:PORT of vsock."""
        cid, _, port = text.partition(":")
        if not (port.isascii() and port.isdigit() and (cid == ANY or (cid.isascii() and cid.isdigit()))):
            raise TunnelError(f"{text!r}: a vsock address is CID:PORT, such as 3:5005, or {ANY}:5005")
        number = socket.VMADDR_CID_ANY if cid == ANY else int(cid)
        if number > 0xFFFFFFFF or int(port) > 0xFFFFFFFF:
            raise TunnelError(f"{text!r}: CID and port are numbers of 32 bits")
        return cls(socket.AF_VSOCK, (number, int(port)))

    def __str__(self) -> str:
        return ":".join(map(str, self.address)) if isinstance(self.address, tuple) else str(self.address)

    async def connect(self) -> trio.socket.SocketType:
        made = trio.socket.socket(self.family, socket.SOCK_STREAM)
        try:
            await made.connect(self.address)
        except BaseException:
            made.close()
            raise
        return made

    async def listen(self) -> trio.socket.SocketType:
        made = trio.socket.socket(self.family, socket.SOCK_STREAM)
        try:
            await made.bind(self.address)
            made.listen()
        except OSError as problem:
            made.close()
            raise TunnelError(f"{self}: cannot listen: {problem.strerror}") from None
        return made


@dataclass
class Counts:
    """Datagrams of one peer: towards the stream, from it, and those that were dropped."""

    towards: int = 0
    back: int = 0
    full: int = 0  # the stream's queue was
    unsent: int = 0  # UDP would not take them
    streams: int = 0


@dataclass(eq=False)
class Link:
    """One peer: its queue, and the stream that it has at the moment."""

    peer: int
    ports: int
    deliver: Callable[[Frame], bool]  # by UDP
    counts: Counts = field(default_factory=Counts)
    _waiting: bytearray = field(default_factory=bytearray)
    #: The frame at its end: where it begins, and of what it may have more.
    _last: tuple[int, int, int, int] | None = None
    _stream: socket.socket | None = None
    _full: trio.Event = field(default_factory=trio.Event)  # the stream is
    _scope: trio.CancelScope | None = None

    def put(self, frame: Frame) -> None:
        """Towards the stream at the next `flush`, or nowhere if it is full or there is none."""
        if self._stream is None or len(self._waiting) + HEAD.size + len(frame.data) > QUEUE_BYTES:
            self.counts.full += frame.pieces
            return
        self._append(frame)
        self.counts.towards += frame.pieces

    def _append(self, frame: Frame) -> None:
        """To the frame before it where it goes on with that: the other end then hands on both at once."""
        kind = (frame.segment, frame.here, frame.there)
        if self._last is not None and self._last[1:] == kind:
            at = self._last[0]
            size = len(self._waiting) - at - HEAD.size
            most = min(frame.segment * PIECES_AT_ONCE, MAX_PAYLOAD)
            if size % frame.segment == 0 and size + len(frame.data) <= most:
                HEAD.pack_into(self._waiting, at, size + len(frame.data), *kind)
                self._waiting += frame.data
                return
        self._last = (len(self._waiting), *kind)
        self._waiting += head(frame) + frame.data

    def flush(self) -> None:
        """Write what the stream takes now; `_empty` goes on with the rest."""
        if self._stream is None or not self._waiting or self._full.is_set():
            return
        try:
            sent = self._stream.send(self._waiting)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(self._waiting)
            with suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)  # `_receive` finds the end, and says so
        del self._waiting[:sent]
        self._last = None
        if self._waiting:
            self._full.set()

    async def serve(self, connection: trio.socket.SocketType) -> str:
        """Move frames until the stream ends or another takes its place; why it did."""
        if self._scope is not None:
            self._scope.cancel()
        # Without trio's own layer, which costs more than the rest.
        stream = socket.socket(fileno=connection.detach())
        stream.setblocking(False)
        scope = self._scope = trio.CancelScope()
        self._stream, self._full = stream, trio.Event()
        self._waiting, self._last = bytearray(), None
        self.counts.streams += 1
        why = "replaced by another"
        try:
            with scope:
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._empty, stream)
                        await self._receive(stream)
                        why = "ended by the other end"
                        nursery.cancel_scope.cancel()
                except* (OSError, RelayError) as problems:
                    why = "; ".join(str(problem) for problem in problems.exceptions)
        finally:
            if self._scope is scope:
                self._scope = self._stream = None
            trio.lowlevel.notify_closing(stream)
            stream.close()
        return why

    async def _empty(self, stream: socket.socket) -> None:
        while True:
            await self._full.wait()
            await trio.lowlevel.wait_writable(stream)
            self._full = trio.Event()
            self.flush()

    async def _receive(self, stream: socket.socket) -> None:
        frames, buffer = Frames(self.ports), bytearray(RECEIVE_BYTES)
        view = memoryview(buffer)
        while True:
            await trio.lowlevel.wait_readable(stream)
            try:
                size = stream.recv_into(buffer)
            except BlockingIOError:
                continue
            if not size:
                return
            for frame in frames.feed(view[:size]):
                if self.deliver(frame):
                    self.counts.back += frame.pieces
                else:
                    self.counts.unsent += frame.pieces


class Port:
    """One UDP port."""

    def __init__(self, place: Place) -> None:
        host, port = place
        family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                self._socket.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
            with suppress(OSError):  # before 5.0: one by one then
                self._socket.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
            self._socket.bind((str(host), port))
        except OSError as problem:
            self.close()
            raise TunnelError(f"UDP {host}:{port}: {problem.strerror}") from None

    def close(self) -> None:
        self._socket.close()

    def send(self, frame: Frame, host: str, port: int) -> bool:
        """Now or never. Whether all went."""
        size, target = frame.segment * PIECES_AT_ONCE, (host, port)
        try:
            for at in range(0, len(frame.data), size):
                self._send(frame.data[at : at + size], frame.segment, target)
        except OSError:  # the buffer is full, or an earlier datagram found nobody
            return False
        return True

    def _send(self, data: memoryview, segment: int, target: tuple[str, int]) -> None:
        if len(data) > segment:
            try:
                extra = (socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", segment))
                self._socket.sendmsg([data], [extra], 0, target)
                return
            except OSError as problem:
                if problem.errno not in (errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP):
                    raise
        for at in range(0, len(data), segment):
            self._socket.sendto(data[at : at + segment], target)

    async def receive(
        self, heard: Callable[[memoryview, int, str, int], None], links: Sequence[Link]
    ) -> None:
        """Hand on all that arrives: datagrams, their size, and from where. It goes to some of `links`."""
        buffer = bytearray(1 << 16)
        view, room = memoryview(buffer).toreadonly(), socket.CMSG_SPACE(_PLAIN.size)
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            for _ in range(BURST):
                try:
                    size, extras, _flags, source = self._socket.recvmsg_into([buffer], room)
                except BlockingIOError:
                    break
                except OSError:  # an ICMP error of an earlier datagram
                    continue
                segment = next(
                    (_PLAIN.unpack(data)[0] for level, kind, data in extras if (level, kind) == _GRO_MESSAGE),
                    size,
                )
                if 0 < size <= MAX_PAYLOAD and size <= segment * MAX_PIECES:
                    heard(view[:size], min(segment, size), source[0], source[1])
            for link in links:
                link.flush()


_GRO_MESSAGE = (socket.IPPROTO_UDP, _UDP_GRO)


async def enclave(
    parent: Streams,
    wireguard: tuple[str, int],
    peers: dict[int, tuple[str, int]],
    ports: int = DEFAULT_PORTS,
    task_status: trio.TaskStatus[dict[int, Counts]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The role inside: be `peers` for the WireGuard at `wireguard`, until cancelled. Reports the counts.

    Each peer has `ports` UDP ports here. Raises `TunnelError` when they cannot be had.
    """
    node = await resolve(*wireguard)
    places = await _places(peers, ports, node)
    with ExitStack() as stack:
        links = []
        async with trio.open_nursery() as nursery:
            for index, (host, base) in places.items():
                own = [_open(stack, (host, base + there)) for there in range(ports)]

                def deliver(frame: Frame, own: list[Port] = own) -> bool:
                    return own[frame.there].send(frame, str(node[0]), node[1] + frame.here)

                link = Link(index, ports, deliver)
                links.append(link)
                for there, port in enumerate(own):

                    def heard(
                        data: memoryview,
                        segment: int,
                        source: str,
                        number: int,
                        link: Link = link,
                        there: int = there,
                    ) -> None:
                        here = number - node[1]
                        if source == str(node[0]) and 0 <= here < ports:
                            link.put(Frame(data, segment, here, there))

                    nursery.start_soon(port.receive, heard, [link])
                nursery.start_soon(_keep_connected, parent, link)
            nursery.start_soon(_report, links)
            task_status.started({link.peer: link.counts for link in links})


async def _keep_connected(parent: Streams, link: Link) -> None:
    pause = FIRST_PAUSE
    while True:
        try:
            stream = await parent.connect()
            await _say(stream, GREETING.pack(MAGIC, link.peer, link.ports))
        except OSError as problem:
            if pause == FIRST_PAUSE:
                log.warning(
                    "no stream to the parent; trying on", at=str(parent), peer=link.peer, why=str(problem)
                )
        else:
            log.info("stream to the parent", at=str(parent), peer=link.peer)
            start = trio.current_time()
            why = await link.serve(stream)
            log.warning("stream to the parent lost", at=str(parent), peer=link.peer, why=why)
            if trio.current_time() - start > LONGEST_PAUSE:
                pause = FIRST_PAUSE
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def _say(stream: trio.socket.SocketType, data: bytes) -> None:
    try:
        while data:
            data = data[await stream.send(data) :]
    except BaseException:
        stream.close()
        raise


async def parent(
    streams: Streams,
    bind: tuple[str, int],
    peers: dict[int, tuple[str, int]],
    ports: int = DEFAULT_PORTS,
    only: int | None = None,
    task_status: trio.TaskStatus[dict[int, Counts]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The role outside: be the node at `bind` for its `peers`, until cancelled. Reports the counts.

    Datagrams from elsewhere than a peer's ports are dropped. With `only`, streams from another CID are
    refused. Raises `TunnelError` when its ports cannot be had.
    """
    node = await resolve(*bind)
    places = await _places(peers, ports, None)
    if any(host.version != node[0].version for host, _ in places.values()):
        raise TunnelError(f"{bind[0]}: the peers' addresses are of another IP version")
    with ExitStack() as stack:
        own = [_open(stack, (node[0], node[1] + here)) for here in range(ports)]
        links: dict[int, Link] = {}
        known: dict[tuple[str, int], tuple[Link, int]] = {}
        for index, (host, base) in places.items():

            def deliver(frame: Frame, host: str = str(host), base: int = base) -> bool:
                return own[frame.here].send(frame, host, base + frame.there)

            links[index] = Link(index, ports, deliver)
            known |= {(str(host), base + there): (links[index], there) for there in range(ports)}
        listener = await streams.listen()
        stack.callback(listener.close)
        async with trio.open_nursery() as nursery:
            for here, port in enumerate(own):

                def heard(data: memoryview, segment: int, source: str, number: int, here: int = here) -> None:
                    if (found := known.get((source, number))) is not None:
                        link, there = found
                        link.put(Frame(data, segment, here, there))

                nursery.start_soon(port.receive, heard, list(links.values()))
            nursery.start_soon(_report, list(links.values()))
            nursery.start_soon(_accept, listener, links, ports, only, nursery)
            task_status.started({index: link.counts for index, link in links.items()})


async def _accept(
    listener: trio.socket.SocketType,
    links: dict[int, Link],
    ports: int,
    only: int | None,
    nursery: trio.Nursery,
) -> None:
    strangers = trio.Semaphore(MAX_STRANGERS)
    while True:
        await strangers.acquire()  # the longest wait is for one greeting
        try:
            stream, _ = await listener.accept()
        except OSError as problem:
            strangers.release()
            log.warning("a stream could not be accepted", why=str(problem))
            await trio.sleep(FIRST_PAUSE)
            continue
        nursery.start_soon(_greet, stream, links, ports, only, strangers)


async def _greet(
    stream: trio.socket.SocketType,
    links: dict[int, Link],
    ports: int,
    only: int | None,
    strangers: trio.Semaphore,
) -> None:
    link, why = None, "it said nothing"
    try:
        with trio.move_on_after(GREETING_SECONDS):
            if only is not None and (cid := stream.getpeername()[0]) != only:
                raise RelayError(f"from CID {cid}, not {only}")
            link = links[await _greeting(stream, links, ports)]
    except (OSError, RelayError) as problem:
        why = str(problem)
    finally:
        strangers.release()
        if link is None:
            stream.close()
    if link is None:
        log.warning("stream refused", why=why)
        return
    log.info("stream of the enclave", peer=link.peer)
    log.info("stream of the enclave over", peer=link.peer, why=await link.serve(stream))


async def _greeting(stream: trio.socket.SocketType, links: dict[int, Link], ports: int) -> int:
    data = b""
    while len(data) < GREETING.size:
        piece = await stream.recv(GREETING.size - len(data))
        if not piece:
            raise RelayError("it ended within its greeting")
        data += piece
    magic, peer, theirs = GREETING.unpack(data)
    if magic != MAGIC:
        raise RelayError("it does not speak this protocol")
    if peer not in links or theirs != ports:
        raise RelayError(f"for peer {peer} with {theirs} ports; known are {sorted(links)} with {ports}")
    return int(peer)


async def _report(links: Sequence[Link]) -> None:
    """Say now and then what was dropped, if anything was."""
    before = dict.fromkeys(links, (0, 0))
    while True:
        await trio.sleep(REPORT_SECONDS)
        for link in links:
            now = link.counts.full, link.counts.unsent
            if now != before[link]:
                before[link] = now
                log.warning("datagrams dropped", peer=link.peer, **vars(link.counts))


def _open(stack: ExitStack, place: Place) -> Port:
    port = Port(place)
    stack.callback(port.close)
    return port


async def _places(peers: dict[int, tuple[str, int]], ports: int, node: Place | None) -> dict[int, Place]:
    """The peers' first ports, all ranges apart from each other and from the node's own."""
    if not 1 <= ports <= MAX_OFFSET + 1:
        raise TunnelError(f"{ports} ports: from 1 to {MAX_OFFSET + 1}")
    found = {index: await resolve(*at) for index, at in peers.items()}
    taken = [*found.values(), *([node] if node is not None else [])]
    for place, (host, base) in enumerate(taken):
        if not 1 <= base <= 65536 - ports:
            raise TunnelError(f"{host}:{base}: {ports} ports are needed from there on")
        for other, its in taken[:place]:
            if other == host and abs(base - its) < ports:
                raise TunnelError(f"{host}:{base} and {other}:{its} are less than {ports} ports apart")
    if not found or any(not 0 <= index <= 255 for index in found):
        raise TunnelError("peers are numbered from 0 to 255, and there is at least one")
    return found


def _at(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise TunnelError(f"{text!r}: an address is HOST:PORT, with brackets around IPv6")
    with suppress(ValueError):
        host = str(ip_address(host.strip("[]")))
    return host, int(port)


def _peers(texts: Sequence[str]) -> dict[int, tuple[str, int]]:
    found = {}
    for text in texts:
        number, equals, at = text.partition("=")
        if not equals or not number.isascii() or not number.isdigit() or int(number) in found:
            raise TunnelError(f"{text!r}: a peer is NUMBER=HOST:PORT, each number once")
        found[int(number)] = _at(at)
    return found


async def _until_told(role: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(role)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()
                return


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wg.vsock", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    roles = parser.add_subparsers(dest="role", required=True, metavar="parent|enclave")
    outside, inside = roles.add_parser("parent"), roles.add_parser("enclave")
    outside.add_argument("--listen", required=True, metavar="CID:PORT")
    outside.add_argument(
        "--bind", required=True, metavar="HOST:PORT", help="the node's UDP port, for its peers"
    )
    outside.add_argument("--only", type=int, metavar="CID", help="of the enclave: others are refused")
    inside.add_argument("--parent", required=True, metavar="CID:PORT")
    inside.add_argument("--wireguard", required=True, metavar="HOST:PORT", help="where WireGuard listens")
    for role in (outside, inside):
        role.add_argument("--peer", action="append", required=True, metavar="NUMBER=HOST:PORT")
        role.add_argument("--ports", type=int, default=DEFAULT_PORTS, help="of every node (default: 5)")
    told = parser.parse_args(words)

    async def run() -> None:
        peers = _peers(told.peer)
        if told.role == "parent":
            await parent(Streams.parse(told.listen), _at(told.bind), peers, told.ports, told.only)
        else:
            await enclave(Streams.parse(told.parent), _at(told.wireguard), peers, told.ports)

    try:
        trio.run(_until_told, run)
    except BaseExceptionGroup as group:
        found = leaves(group)
        if not all(isinstance(problem, WgError) for problem in found):
            raise
        for problem in found:
            print(f"wg.vsock: {problem}", file=sys.stderr)
        return TunnelError.exit_code
    return 0


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    sys.exit(main(sys.argv[1:]))
