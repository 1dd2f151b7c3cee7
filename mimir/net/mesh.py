"""The mesh: this party's TCP connections to its peers, and the channels that run on them.

To each peer there is one connection per lane, so that bulk preprocessing never delays an online frame. The
party with the lower number calls. The three connections to one peer are a *generation*: they are made
together, the secrets of sessions derive from the control lane's handshake, and if one of them drops, all are
cut and the sessions that relied on them end with `PeerError`. The caller then calls again, with back-off, and
new sessions work.

A round writes straight to both sockets and reads straight from them, in the task that called it; that is
faster than tasks that read and hand over. When several channels wait on one connection, one of them leads: it
reads for all, and passes the lead on when its own frame has come. What the kernel does not take at once goes
to the connection's writer task, so that large frames move in both directions at the same time and three
parties cannot block each other.

Nobody reads an online or prep connection that nobody waits for, except for a glance at each heartbeat: what a
peer sends ahead stays in its socket. The control connection always has a reader.
"""

from __future__ import annotations

import math
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog
import trio

from mimir.errors import BadInput, EnvironmentMissing, LocalError, MimirError, PeerError
from mimir.net import LANES, ROUND_TIMEOUT, Handler, Payload, wire
from mimir.net.identity import Handshake, HandshakeError, Identity, derive
from mimir.secret import LinkSecret, Secret

SOCKET_BUFFER = (
    4 << 20
)  # a round of ordinary size never waits for the peer to read (the kernel may allow less)
LARGE_ROUND = 256 << 10  # bytes to receive from which on both peers are read at the same time
HANDSHAKE_DEADLINE = 10.0  # seconds for a new connection to prove itself
MAX_HANDSHAKES = 16  # connections that may be proving themselves at once; more are closed unheard
CONNECT_DEADLINE = 5.0  # seconds for TCP to connect
HEARTBEAT = 1.0  # seconds between pings
DEAD_AFTER = 20.0  # seconds without a byte from a peer's program after which its connections are cut
FIRST_BACKOFF, MAX_BACKOFF = 0.1, 5.0  # seconds between calls, doubling, with jitter
MAX_REQUESTS = 32  # of one peer being answered at once; more are refused
HANDLER_DEADLINE = 120.0  # seconds an answer may take to make
MAX_QUEUE = 256  # frames waiting for one connection's writer before the peer counts as stuck
READS_PER_TURN = 64  # reads in a row before other tasks get a turn
BYTES_PER_TURN = 2 << 20  # about a millisecond: bulk on one lane must not delay a round on another
_PIECES_PER_WRITE = 64
_LARGE_IOV = 512  # a kernel takes 1024 pieces in one call

log = structlog.get_logger("mimir.net")


Bind = Callable[[trio.socket.SocketType], None]
Admitted = Callable[[int], bool]  # whether a party may have links at this moment


def _everybody(party: int) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class PeerAt:
    """Where a peer listens, and who it must prove to be."""

    party: int
    host: str
    port: int
    identity: bytes  # Ed25519 public key


class _Outgoing:
    """A frame the kernel has not taken whole yet."""

    __slots__ = ("done", "finished", "parts", "started")

    def __init__(self, parts: Sequence[memoryview], started: bool) -> None:
        self.parts = deque(parts)
        self.started = started
        self.finished = False
        self.done = trio.Event()

    def advance(self, n: int) -> None:
        self.started = True
        parts = self.parts
        while parts and n >= parts[0].nbytes:
            n -= parts.popleft().nbytes
        if parts:
            parts[0] = parts[0][n:]
        else:
            self.finish()

    def finish(self) -> None:
        self.finished = True
        self.parts.clear()
        self.done.set()


class _Link:
    """One authenticated connection: one lane to one peer."""

    def __init__(
        self, generation: _Generation, lane: str, sock: socket.socket, decoder: wire.Decoder
    ) -> None:
        self.generation = generation
        self.peer = generation.peer
        self.lane = lane
        self.open = True
        self.sent = self.received = 0
        self._board = generation.mesh.board
        self._sock = sock
        self._decoder = decoder
        self._queue: deque[_Outgoing] = deque()
        self._work = trio.Event()
        self._leader: object | None = None
        self._followers: dict[wire.Lockstep, trio.Event] = {}
        decoder.state = lane

    # sending

    def send(self, head: bytes, views: list[memoryview]) -> _Outgoing | None:
        """Write now what the kernel takes; None if that was all, else what the writer task goes on with."""
        if not self.open:
            return None
        if len(views) > _LARGE_IOV:
            views = [memoryview(b"".join(views))]
        started = 0
        if not self._queue:
            try:
                started = self._sock.sendmsg([head, *views])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as exc:
                self.generation.cut(f"the {self.lane} connection broke: {exc.strerror}")
                return None
            self.sent += started
            if started == len(head) + sum(v.nbytes for v in views):
                return None
        item = _Outgoing([memoryview(head), *views], started > 0)
        if started:
            item.advance(started)
        if len(self._queue) >= MAX_QUEUE:
            self.generation.cut(f"{MAX_QUEUE} frames wait on the {self.lane} connection")
            return None
        self._queue.append(item)
        self._work.set()
        return item

    def send_small(self, frame: wire.Frame) -> None:
        """A whole small frame; nobody waits for it, so it owns its bytes."""
        self.send(wire.encode(frame), [])

    def let_go(self, item: _Outgoing) -> None:
        """The caller's buffers are no longer ours to read: keep a copy of a frame half sent, forget another.

        A frame half sent must be finished, else the connection would be out of step for every session.
        """
        if item.finished:
            return
        if item.started:
            item.parts = deque([memoryview(b"".join(item.parts))])
        else:
            with suppress(ValueError):
                self._queue.remove(item)
            item.finish()

    async def write_loop(self) -> None:
        """Write what `send` could not, for the life of the connection."""
        while self.open:
            if not self._queue:
                self._work = trio.Event()
                await self._work.wait()
                continue
            item = self._queue[0]
            try:
                n = self._sock.sendmsg(list(islice(item.parts, _PIECES_PER_WRITE)))
            except (BlockingIOError, InterruptedError):
                with suppress(trio.ClosedResourceError):  # a nudge, or the end: the loop looks again
                    await trio.lowlevel.wait_writable(self._sock)
                continue
            except OSError as exc:
                self.generation.cut(f"the {self.lane} connection broke: {exc.strerror}")
                return
            self.sent += n
            item.advance(n)
            if item.finished:
                self._queue.popleft()
            await trio.lowlevel.checkpoint()

    # receiving

    def pump(self) -> int:
        """One read, and all frames it completes; 0 if there is nothing to read or the connection is over."""
        if not self.open:
            return 0
        try:
            n = self._sock.recv_into(self._decoder.buffer())
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as exc:
            self.generation.cut(f"the {self.lane} connection broke: {exc.strerror}")
            return 0
        if n == 0:
            self.generation.cut(f"closed the {self.lane} connection")
            return 0
        self.received += n
        self.generation.heard = True
        self._decoder.wrote(n)
        self.drain()
        return n

    def drain(self) -> None:
        """Hand out the frames the decoder holds."""
        try:
            while self.open and (frame := self._decoder.next()) is not None:
                if isinstance(frame, wire.Data):
                    book, doomed = self._board.deliver(self.peer, frame)
                    if book is not None and (event := self._followers.get(book)) is not None:
                        event.set()
                    if doomed is not None:
                        self.generation.mesh.spread_abort(doomed, "abort")
                else:
                    self.generation.control_frame(frame)
        except wire.WireError as exc:
            self.generation.cut(f"garbage on the {self.lane} connection: {exc}", garbage=True)

    async def receive(self, book: wire.Lockstep) -> None:
        """Return when `book` holds a frame from this peer, or has failed. Leads or follows."""
        peer = self.peer
        while not book.arrived(peer) and book.failure is None:
            if self._leader is not None:
                event = self._followers[book] = trio.Event()
                try:
                    await event.wait()
                finally:
                    del self._followers[book]
                    self._pass_on()
                continue
            self._leader = book
            try:
                await self._lead(lambda: book.arrived(peer) or book.failure is not None)
            finally:
                self._leader = None
                self._pass_on()

    def _pass_on(self) -> None:
        # Whoever stops waiting makes sure that somebody reads, also if it was cancelled as it was to lead.
        if self._leader is None:
            for event in self._followers.values():
                event.set()
                break

    async def _lead(self, enough: Callable[[], bool]) -> None:
        turns = volume = 0
        while not enough():
            n = self.pump()
            if n:
                turns, volume = turns + 1, volume + n
                if turns >= READS_PER_TURN or volume >= BYTES_PER_TURN:
                    turns = volume = 0
                    await trio.lowlevel.checkpoint()
            elif not enough():
                turns = volume = 0
                with suppress(trio.ClosedResourceError):  # a nudge, or the end: the loop looks again
                    await trio.lowlevel.wait_readable(self._sock)

    async def read_loop(self) -> None:
        """Lead for the life of the connection: for the control lane, which nobody may have to wait for."""
        self._leader = self
        await self._lead(lambda: not self.open)

    def glance(self) -> None:
        """Read what has come although nobody waits: finds a closed connection, garbage and early frames."""
        if self._leader is None or self._leader is self:
            for _ in range(READS_PER_TURN):
                if not self.pump():
                    break

    def nudge(self, book: wire.Lockstep) -> None:
        """`book` has failed: make its task look, wherever it waits."""
        if self._leader is book and self.open:
            trio.lowlevel.notify_closing(self._sock)
        elif (event := self._followers.get(book)) is not None:
            event.set()

    def close(self) -> None:
        if self.open:
            self.open = False
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
            self._work.set()
            for item in self._queue:
                item.finish()
            self._queue.clear()


class _Generation:
    """The connections to one peer that stand and fall together."""

    def __init__(self, mesh: Mesh, peer: int, ident: bytes, secret: LinkSecret) -> None:
        self.mesh = mesh
        self.peer = peer
        self.ident = ident
        self.secret = secret
        self.links: dict[str, _Link] = {}
        self.alive = True
        self.died = trio.Event()
        self.born = trio.current_time()
        self.heard = True  # since the last look
        self.answering = 0
        self._next_request = 0
        self._asked: dict[int, tuple[trio.Event, list[wire.Reply]]] = {}

    @property
    def whole(self) -> bool:
        return self.alive and len(self.links) == len(LANES)

    def attach(self, lane: str, sock: socket.socket, decoder: wire.Decoder) -> _Link:
        """Take over a connection whose handshake is done."""
        link = self.links[lane] = _Link(self, lane, sock, decoder)
        start = self.mesh.nursery.start_soon
        start(link.write_loop)
        if lane == "control":
            start(link.read_loop)
            start(self._keep_time)
        return link

    def cut(self, why: str, garbage: bool = False) -> None:
        """End all connections of this generation, and with them the sessions that relied on it."""
        if not self.alive:
            return
        self.alive = False
        say = log.warning if garbage or not self.mesh.closing else log.debug
        say("peer cut off" if garbage else "link down", party=self.mesh.party, peer=self.peer, why=why)
        for link in self.links.values():
            link.close()
        self.secret.wipe()
        self.mesh.board.link_down(self.peer, why)
        for event, _box in self._asked.values():
            event.set()
        self.died.set()
        self.mesh.changed()

    async def _keep_time(self) -> None:
        last = self.born
        while self.alive:
            self.links["control"].send_small(wire.Ping())
            await trio.sleep(HEARTBEAT)
            for link in list(self.links.values()):
                link.glance()
            now = trio.current_time()
            if self.heard:
                self.heard, last = False, now
            if now - last > self.mesh.dead_after:
                self.cut(f"silent for {self.mesh.dead_after:g} s")
            elif not self.whole and now - self.born > HANDSHAKE_DEADLINE + CONNECT_DEADLINE:
                self.cut("did not open all lanes")

    def control_frame(self, frame: wire.Frame) -> None:
        """Anything but Data, from an authenticated peer."""
        if isinstance(frame, wire.Abort):
            why = f"party {self.peer} ended the session: {frame.why}"
            log.info("session aborted by peer", party=self.mesh.party, peer=self.peer, why=frame.why)
            self.mesh.board.end(frame.session, wire.aborted(why))
        elif isinstance(frame, wire.Request):
            self._begin_answer(frame)
        elif isinstance(frame, wire.Reply):
            if frame.number >= self._next_request:
                raise wire.WireError("answer to a question never asked")
            asked = self._asked.get(frame.number)  # gone if its deadline has passed
            if asked is not None and not asked[1]:
                asked[1].append(frame)
                asked[0].set()

    def _begin_answer(self, frame: wire.Request) -> None:
        if self.answering >= MAX_REQUESTS:
            self._refuse(frame, f"busy: {MAX_REQUESTS} requests are being answered")
        elif (handler := self.mesh.handlers.get(frame.kind)) is None:
            self._refuse(frame, "unknown kind of request")
        else:
            body = wire.decode_body(frame.payload)
            self.answering += 1
            self.mesh.nursery.start_soon(self._answer, frame, handler, body)

    async def _answer(self, frame: wire.Request, handler: Handler, body: dict[str, Any]) -> None:
        try:
            with trio.move_on_after(HANDLER_DEADLINE):
                try:
                    answer = wire.encode_body(await handler(self.peer, body))
                except BadInput as exc:
                    self._refuse(frame, str(exc))
                except Exception as exc:  # whatever a peer's body brings about must not end the mesh
                    why = str(exc) if isinstance(exc, MimirError) else type(exc).__name__
                    log.warning("request failed", peer=self.peer, kind=frame.kind, error=why)
                    self._refuse(frame, "failed")
                else:
                    self.links["control"].send_small(wire.Reply(frame.number, True, answer))
                return
            self._refuse(frame, "took too long")
        finally:
            self.answering -= 1

    def _refuse(self, frame: wire.Request, why: str) -> None:
        body = wire.encode_body({"why": why[: wire.MAX_TEXT]})
        self.links["control"].send_small(wire.Reply(frame.number, False, body))

    async def ask(self, kind: str, body: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        step = f"request {kind}"
        number, self._next_request = self._next_request, self._next_request + 1
        event = trio.Event()
        box: list[wire.Reply] = []
        self._asked[number] = (event, box)
        try:
            self.links["control"].send_small(wire.Request(number, kind, wire.encode_body(body)))
            with trio.move_on_after(deadline):
                await event.wait()
        finally:
            del self._asked[number]
        if not box:
            raise PeerError(
                self.peer, step, f"silent for {deadline:g} s" if self.alive else "the link dropped"
            )
        try:
            answer = wire.decode_body(box[0].payload)
        except wire.WireError as exc:
            self.cut(f"garbage in an answer: {exc}", garbage=True)
            raise PeerError(self.peer, step, "garbage in the answer") from None
        if not box[0].ok:
            why = answer.get("why")
            raise PeerError(self.peer, step, f"refused: {_printable(why)}")
        return answer


def _printable(text: object) -> str:
    words = text if isinstance(text, str) else "no reason given"
    return "".join(c for c in words if c.isprintable())[: wire.MAX_TEXT]


class Mesh:
    """This party's end of everything (see `mimir.net.Transport`). Made by `open_mesh`."""

    def __init__(
        self,
        party: int,
        identity: Identity,
        peers: Sequence[PeerAt],
        config_digest: bytes,
        handshake_deadline: float,
        nursery: trio.Nursery,
        bind: Bind | None = None,
        dead_after: float = DEAD_AFTER,
        admitted: Admitted = _everybody,
    ) -> None:
        self.party = party
        self.admitted = admitted
        self.dead_after = dead_after
        self.peers = tuple(sorted(peer.party for peer in peers))
        self.board = wire.Board(party, self.peers)
        self.handlers: dict[str, Handler] = {}
        self.nursery = nursery
        self.closing = False
        self._identity = identity
        self._keys = {party: identity.public, **{peer.party: peer.identity for peer in peers}}
        self._config = config_digest
        self._deadline = handshake_deadline
        self._bind = bind
        self._generations: dict[int, _Generation] = {}
        self._handshakes = 0
        self._change = trio.Event()
        self._rounds: set[MeshChannel] = set()  # that wait for something
        self._alarm = trio.CancelScope()  # its deadline is no later than theirs
        self._refused: dict[int, str] = {}  # why a peer is not up, for `wait_up`
        self._jitter = random.Random()  # spreads calls in time; guards nothing

    # what sessions use

    def channel(self, session: bytes, lane: str) -> MeshChannel:
        """Open our end of a conversation; once per session and lane."""
        return MeshChannel(self, self.board.open(session, lane))

    def link_secret(self, peer: int, session: bytes, label: str) -> Secret:
        """32 bytes for this session and label that `peer` derives too, and nobody else can."""
        if peer not in self.peers:
            raise LocalError(f"party {peer} is no peer of party {self.party}")
        self.board.touch(session)
        return derive(self.whole(peer, "link secret").secret, f"session {label}", session)

    def on_request(self, kind: str, handler: Handler) -> None:
        """Answer requests of this kind; one handler per kind."""
        if kind in self.handlers:
            raise LocalError(f"requests of kind {kind!r} already have a handler")
        self.handlers[kind] = handler

    async def request(self, peer: int, kind: str, body: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        """Ask a peer; its answer within `deadline` seconds, or `PeerError`."""
        return await self.whole(peer, f"request {kind}").ask(kind, body, deadline)

    def up(self, peer: int) -> bool:
        """Whether all lanes to this peer stand."""
        generation = self._generations.get(peer)
        return generation is not None and generation.whole

    async def wait_up(self, deadline: float) -> None:
        """Return when every peer is up, or raise `PeerError` naming one that is not and why."""
        with trio.move_on_after(deadline):
            while not all(self.up(peer) for peer in self.peers):
                await self._change.wait()
            return
        down = next((peer for peer in self.peers if not self.up(peer)), None)
        if down is not None:
            why = self._refused.get(down, "it has not called" if down < self.party else "no answer")
            raise PeerError(down, "mesh", f"not up within {deadline:g} s: {why}")

    def cut(self, peer: int, why: str = "cut on our side") -> None:
        """Drop the links to a peer; its sessions end. The mesh makes new links, if the peer is admitted."""
        generation = self._generations.get(peer)
        if generation is not None:
            generation.cut(why)

    def status(self) -> dict[int, dict[str, int | bool]]:
        """Per peer: up, and bytes sent and received since its links were made."""
        out: dict[int, dict[str, int | bool]] = {}
        for peer in self.peers:
            generation = self._generations.get(peer)
            links = generation.links.values() if generation is not None and generation.alive else ()
            out[peer] = {
                "up": self.up(peer),
                "sent": sum(link.sent for link in links),
                "received": sum(link.received for link in links),
            }
        return out

    # what the parts of the mesh use

    def whole(self, peer: int, step: str) -> _Generation:
        """The generation to a peer that is up, or `PeerError`."""
        generation = self._generations.get(peer)
        if generation is None or not generation.whole:
            raise PeerError(peer, step, "there is no link to this party")
        return generation

    def spread_abort(self, session: bytes, why: str) -> None:
        """Tell every peer that can be told that this session is over here."""
        for generation in self._generations.values():
            if generation.alive and "control" in generation.links:
                generation.links["control"].send_small(wire.Abort(session, why))

    def began(self, channel: MeshChannel) -> None:
        """A round waits from now on: it is told once it is `due`."""
        self._rounds.add(channel)
        if channel.due < self._alarm.deadline:
            self._alarm.deadline = channel.due

    def ended(self, channel: MeshChannel) -> None:
        self._rounds.discard(channel)

    async def watch(self) -> None:
        """Keep the deadlines of all rounds, for the life of the mesh.

        Rounds come by the thousand and end in time: the alarm stays where the first of them put it, and is
        moved when it rings. A scope of Trio's for each was a sixth of a round's samples.
        """
        while True:
            first = min((channel.due for channel in self._rounds), default=math.inf)
            with trio.CancelScope(deadline=first) as self._alarm:
                await trio.sleep_forever()
            now = trio.current_time()
            for channel in [c for c in self._rounds if c.due <= now]:
                channel.overdue()
                self.ended(channel)

    def changed(self) -> None:
        """Let everybody who waits look again; also to be called once a peer is admitted."""
        self._change.set()
        self._change = trio.Event()

    def _install(self, hand: Handshake, sock: socket.socket, decoder: wire.Decoder) -> _Link:
        """A connection has proved itself: give it its place. Raises `HandshakeError`, taking nothing."""
        if not self.admitted(hand.peer):
            raise HandshakeError("admission", f"party {hand.peer} is not admitted here")
        if self.closing:  # the proof came when all links had been cut: nobody would close this one
            raise HandshakeError("generation", "this party is leaving")
        if hand.lane == "control":
            old = self._generations.get(hand.peer)
            if old is not None:
                old.cut("called again")  # only the peer itself can have made this handshake
            generation = _Generation(self, hand.peer, hand.transcript, hand.secret())
            self._generations[hand.peer] = generation
        else:
            found = self._generations.get(hand.peer)
            if found is None or not found.alive or found.ident != hand.generation:
                raise HandshakeError("generation", "this lane belongs to a control connection that is over")
            if hand.lane in found.links:
                raise HandshakeError("lane", f"{hand.lane} is open already")
            generation = found
        link = generation.attach(hand.lane, sock, decoder)
        if generation.whole:
            self._refused.pop(hand.peer, None)
            log.info("peer up", party=self.party, peer=hand.peer)
            self.changed()
        return link

    def _handshake(
        self, dial: int | None = None, lane: str = "control", generation: bytes = b""
    ) -> Handshake:
        return Handshake(
            self._identity, self.party, self._keys, self._config, dial=dial, lane=lane, generation=generation
        )

    async def _prove(self, hand: Handshake, sock: socket.socket) -> _Link:
        """Run a handshake on a new connection and install it. The socket is closed on failure."""
        decoder = wire.Decoder("handshake", self.board.headers)
        try:
            for frame in hand.first():
                await _send(sock, wire.encode(frame))
            while True:
                incoming = await _next_frame(sock, decoder)
                answers = hand.receive(incoming)
                if hand.done:
                    break
                for frame in answers:
                    await _send(sock, wire.encode(frame))
            link = self._install(hand, sock, decoder)
            for frame in answers:
                link.send_small(frame)
            link.drain()  # what came together with the last message
            return link
        except BaseException as exc:
            if isinstance(exc, HandshakeError):
                with suppress(OSError):
                    sock.send(wire.encode(hand.refusal(exc)))
            sock.close()
            raise
        finally:
            hand.wipe()

    async def call(self, peer: PeerAt) -> None:
        """Keep the links to a peer of higher number up, for the life of the mesh."""
        backoff = FIRST_BACKOFF
        while True:
            generation = None
            while not self.admitted(peer.party):
                self._refused[peer.party] = "it is not admitted"
                await self._change.wait()
            try:
                for lane in LANES:
                    with trio.fail_after(self._deadline + CONNECT_DEADLINE):
                        sock = await _connect(peer.host, peer.port, self._bind, self.dead_after)
                        ident = b"" if generation is None else generation.ident
                        link = await self._prove(self._handshake(peer.party, lane, ident), sock)
                    generation = link.generation
                    if not generation.alive:
                        break
            except (OSError, MimirError, trio.TooSlowError) as exc:
                why = "no answer in time" if isinstance(exc, trio.TooSlowError) else str(exc)
                if self._refused.get(peer.party) != why:  # once per reason, not once per call
                    log.warning("cannot reach peer", party=self.party, peer=peer.party, why=why)
                self._refused[peer.party] = why
                if generation is not None:
                    generation.cut(f"not all lanes could be opened: {why}")
                self.changed()
            else:
                if generation is not None and generation.whole:
                    born = trio.current_time()
                    await generation.died.wait()
                    if trio.current_time() - born > MAX_BACKOFF:
                        backoff = FIRST_BACKOFF
            await trio.sleep(backoff * self._jitter.uniform(0.5, 1.0))
            backoff = min(2 * backoff, MAX_BACKOFF)

    async def listen(self, listener: trio.SocketListener) -> None:
        """Take calls from peers of lower number, for the life of the mesh."""
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:  # out of file descriptors, or the caller hung up: the next may do better
                log.warning("accept failed", party=self.party, why=exc.strerror)
                await trio.sleep(FIRST_BACKOFF)
                continue
            if self._handshakes >= MAX_HANDSHAKES:
                log.warning("too many connections at once", party=self.party)
                await trio.aclose_forcefully(stream)
                continue
            self._handshakes += 1
            self.nursery.start_soon(self._answer_call, stream)

    async def _answer_call(self, stream: trio.SocketStream) -> None:
        try:
            if self._bind is not None:
                self._bind(stream.socket)  # it may have come before the listener was tied
            sock = _bare(stream.socket, self.dead_after)
        except OSError as exc:
            stream.socket.close()
            log.warning("refused a connection", party=self.party, why=exc.strerror)
            return
        hand = self._handshake()
        try:
            with trio.fail_after(self._deadline):
                await self._prove(hand, sock)
        except (OSError, MimirError, trio.TooSlowError) as exc:
            why = "no proof in time" if isinstance(exc, trio.TooSlowError) else str(exc)
            if hand.peer in self.peers:
                self._refused[hand.peer] = why
            log.warning("connection refused", party=self.party, claims=hand.peer, why=why)
        finally:
            self._handshakes -= 1

    def close(self) -> None:
        self.closing = True
        for generation in self._generations.values():
            generation.cut("we are leaving")


class MeshChannel:
    """One end of a conversation over TCP (see `mimir.net.Channel`)."""

    def __init__(self, mesh: Mesh, book: wire.Lockstep) -> None:
        self.timeout = ROUND_TIMEOUT
        self.due = math.inf  # when the round that waits must have ended
        self.party = book.party
        self.session = book.session
        self.lane = book.lane
        self._mesh = mesh
        self._book = book
        self._links: dict[int, _Link] = {}
        self._waiting: list[tuple[_Link, _Outgoing]] = []
        self._dead = trio.Event()
        book.wake = self._wake
        for peer in mesh.peers:
            try:
                self._links[peer] = mesh.whole(peer, "start").links[wire.lane_kind(book.lane)]
            except PeerError as exc:
                book.fail(wire.blame(peer, exc.why))

    @property
    def rounds(self) -> int:
        """Rounds completed."""
        return self._book.rounds

    @property
    def sent(self) -> int:
        """Bytes sent in rounds, framing included."""
        return self._book.sent

    @property
    def received(self) -> int:
        """Bytes received in rounds, framing included."""
        return self._book.received

    def _wake(self) -> None:
        if self._book.failure is not None:
            self._dead.set()
        for link in self._links.values():
            link.nudge(self._book)
        for _link, item in self._waiting:
            item.done.set()

    async def round(
        self, step: str, send: Mapping[int, Payload], expect: Mapping[int, int]
    ) -> dict[int, bytearray]:
        """One frame to every peer, one from every peer, for the same step."""
        book, links, waiting = self._book, self._links, self._waiting
        out = book.begin(step, send, expect)
        blocked = False
        try:
            for peer, head, views in out:
                item = links[peer].send(head, views)
                if item is not None:
                    waiting.append((links[peer], item))
            missing = book.missing()
            if missing or waiting:
                blocked = True
                self.due = trio.current_time() + self.timeout
                self._mesh.began(self)
                if len(missing) > 1 and sum(expect.values()) >= LARGE_ROUND:
                    async with trio.open_nursery() as nursery:
                        for peer in missing:
                            nursery.start_soon(links[peer].receive, book)
                else:
                    for peer in missing:
                        await links[peer].receive(book)
                for _link, item in waiting:
                    if book.failure is None:
                        await item.done.wait()
            result = book.finish()
            if not blocked:
                await trio.lowlevel.checkpoint()
            return result
        finally:
            self._mesh.ended(self)
            if book.in_round:
                book.broken_off()
            for link, item in waiting:
                link.let_go(item)
            waiting.clear()

    def overdue(self) -> None:
        """The time of the round is over: whoever it waits for is to blame."""
        book = self._book
        if missing := book.missing():
            book.fail(wire.silence(missing, self.timeout))
        for link, item in self._waiting:
            if not item.finished:
                book.fail(wire.blame(link.peer, f"has not taken our frame within {self.timeout:g} s"))

    async def failed(self) -> None:
        """Wait until the channel is dead, and raise what killed it."""
        if self._book.failure is None:
            await self._dead.wait()
        self._book.raise_failure()

    async def abort(self, reason_public: str = "abort") -> None:
        """Kill the session here and at every peer."""
        self._mesh.board.end(self.session, wire.aborted(f"ended here: {reason_public}"))
        self._mesh.spread_abort(self.session, reason_public)
        self._mesh.board.close(self._book)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Let go of this channel only."""
        self._mesh.board.close(self._book)
        await trio.lowlevel.checkpoint()


# --- sockets ---------------------------------------------------------------------------------------------


def _tune(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)


def _bare(sock: trio.socket.SocketType, dead_after: float) -> socket.socket:
    """The standard library's socket, non-blocking: direct calls cost a fraction of Trio's."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # The heartbeat notices a cut tunnel; this keeps the kernel from trying for a quarter of an hour.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(dead_after * 1000))
    bare = socket.socket(fileno=sock.detach())
    bare.setblocking(False)
    return bare


async def _connect(host: str, port: int, bind: Bind | None, dead_after: float) -> socket.socket:
    problem: OSError = OSError(f"{host}: no address")
    for family, kind, proto, _name, address in await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        sock = trio.socket.socket(family, kind, proto)
        try:
            _tune(sock)  # before the connection exists: its window is agreed at the start
            if bind is not None:
                bind(sock)
            with trio.fail_after(CONNECT_DEADLINE):
                await sock.connect(address)
            return _bare(sock, dead_after)
        except trio.TooSlowError:
            problem = OSError(f"{host} port {port}: no answer within {CONNECT_DEADLINE:g} s")
            sock.close()
        except OSError as exc:
            problem = exc
            sock.close()
        except BaseException:
            sock.close()
            raise
    raise problem


async def _send(sock: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        try:
            rest = rest[sock.send(rest) :]
        except (BlockingIOError, InterruptedError):
            await trio.lowlevel.wait_writable(sock)


async def _next_frame(sock: socket.socket, decoder: wire.Decoder) -> wire.Frame:
    while (frame := decoder.next()) is None:
        try:
            n = sock.recv_into(decoder.buffer())
        except (BlockingIOError, InterruptedError):
            await trio.lowlevel.wait_readable(sock)
            continue
        if n == 0:
            raise OSError("the other end hung up")
        decoder.wrote(n)
    return frame


async def open_listeners(host: str, port: int, bind: Bind | None = None) -> list[trio.SocketListener]:
    """Listen for peers; `EnvironmentMissing` says what stands in the way."""
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        raise EnvironmentMissing(
            f"cannot listen on {host} port {port}: {exc.strerror or exc}; is the tunnel up, the port free?"
        ) from None
    for listener in listeners:
        _tune(listener.socket)
        if bind is not None:
            bind(listener.socket)
    return listeners


@asynccontextmanager
async def open_mesh(
    *,
    party: int,
    identity: Identity,
    peers: Sequence[PeerAt],
    config_digest: bytes,
    listen: tuple[str, int] | Sequence[trio.SocketListener],
    protected: bool = True,
    handshake_deadline: float = HANDSHAKE_DEADLINE,
    bind: Bind | None = None,
    dead_after: float = DEAD_AFTER,
    admitted: Admitted = _everybody,
) -> AsyncIterator[Mesh]:
    """Keep connections to all peers for as long as the block runs; use `wait_up` to wait for them.

    `listen` is an address inside the tunnel, or listeners already open, which are closed at the end like
    those opened here. `protected=False` says that there is no tunnel: whoever carries the links can then
    read and change everything on them, and the log says so. `bind` ties every socket to the tunnel, for as
    long as it lives: the kernel would otherwise take packets for the inner address from the underlay as
    well, where nothing protects them. A peer whose program is silent for `dead_after` seconds is cut off,
    and its sessions end. Only peers that are `admitted` get links; whoever stops admitting one has to `cut`
    it.
    """
    if not protected:
        log.warning(
            "NO TUNNEL: links between parties are neither encrypted nor authenticated beyond their start; "
            "whoever sees them can reconstruct every secret",
            party=party,
        )
    try:
        async with trio.open_nursery() as nursery:
            mesh = Mesh(
                party, identity, peers, config_digest, handshake_deadline, nursery, bind, dead_after, admitted
            )
            nursery.start_soon(mesh.watch)
            listeners: Sequence[trio.SocketListener] = () if isinstance(listen, tuple) else listen
            try:
                if any(peer.party < party for peer in peers):  # nobody calls the lowest number
                    if isinstance(listen, tuple):
                        host, port = listen
                        listeners = await open_listeners(host, port, bind)
                    for listener in listeners:
                        nursery.start_soon(mesh.listen, listener)
                for peer in peers:
                    if peer.party > party:
                        nursery.start_soon(mesh.call, peer)
                yield mesh
            finally:
                mesh.close()
                nursery.cancel_scope.cancel()
                for listener in listeners:
                    listener.socket.close()
    except BaseExceptionGroup as group:
        # The nursery wraps the one error of the caller's block; hand it back as it was raised.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
