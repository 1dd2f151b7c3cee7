"""Parties in one process: the mesh's rules without sockets, and a tap for tests that cheat.

Every frame passes the same books as on TCP (`wire.Board`, `wire.Lockstep`), and the counters count the bytes
that TCP would have carried. A payload is copied once, so no party sees another's memory.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import trio

from mimir.errors import BadInput, LocalError, PeerError
from mimir.net import ROUND_TIMEOUT, Handler, Payload, wire
from mimir.secret import Secret


@dataclass(frozen=True, slots=True)
class Tapped:
    """A frame on its way, as a tap sees it."""

    sender: int
    receiver: int
    session: bytes
    lane: str
    seq: int
    step: str
    payload: bytearray = field(repr=False)


# What arrives instead of a frame: None for the frame itself, or any number of payloads (sent under the same
# header) and whole `wire.Data` frames.
Tap: TypeAlias = Callable[[Tapped], Sequence[bytes | bytearray | wire.Data] | None]


class MemoryNet:
    """`n` parties joined in memory. `party(i)` is what party i holds; `tap` may change any frame."""

    def __init__(self, n: int = 3, tap: Tap | None = None, seed: bytes | None = None) -> None:
        self.n = n
        self.tap = tap
        self._seed = os.urandom(32) if seed is None else seed
        self._parties = [MemoryParty(self, i) for i in range(n)]
        self._down: set[int] = set()

    def party(self, party: int) -> MemoryParty:
        """The transport of one party."""
        return self._parties[party]

    def channel(self, party: int, session: bytes, lane: str) -> MemoryChannel:
        """Open `party`'s end of a conversation."""
        return self._parties[party].channel(session, lane)

    def link_secret(self, party: int, peer: int, session: bytes, label: str) -> Secret:
        """The secret of the pair for this session and label: the same whichever of the two asks."""
        return self._parties[party].link_secret(peer, session, label)

    def cut(self, a: int, b: int) -> None:
        """Drop the link between two parties for an instant: sessions die, new ones work."""
        self._parties[a]._board.link_down(b, "the link dropped")
        self._parties[b]._board.link_down(a, "the link dropped")

    def kill(self, party: int) -> None:
        """The party is gone until `revive`."""
        self._down.add(party)
        for other in range(self.n):
            if other != party:
                self.cut(party, other)

    def revive(self, party: int) -> None:
        self._down.discard(party)

    def _joined(self, a: int, b: int) -> bool:
        return not (self._down and (a in self._down or b in self._down))

    def _secret(self, a: int, b: int, session: bytes, label: str) -> Secret:
        pair = bytes(sorted((a, b)))
        mac = hmac.new(self._seed, pair + session + label.encode(), hashlib.sha256)
        return Secret(bytearray(mac.digest()))

    def _carry(self, sender: int, receiver: int, frame: wire.Data) -> None:
        if not self._joined(sender, receiver):
            return
        arriving: Sequence[Any] = (frame,)
        if self.tap is not None:
            seen = Tapped(
                sender, receiver, frame.session, frame.lane, frame.seq, frame.step, bytearray(frame.payload)
            )
            changed = self.tap(seen)
            if changed is not None:
                arriving = [
                    c
                    if isinstance(c, wire.Data)
                    else wire.Data(frame.session, frame.lane, frame.seq, frame.step, bytearray(c))
                    for c in changed
                ]
        board = self._parties[receiver]._board
        for item in arriving:
            book, doomed = board.deliver(sender, item)
            if doomed is not None:
                self._spread_abort(receiver, doomed, "abort")
            elif book is not None and not book.missing():
                book.wake()

    def _spread_abort(self, sender: int, session: bytes, why: str) -> None:
        for other in range(self.n):
            if other != sender and self._joined(sender, other):
                failure = wire.aborted(f"party {sender} ended the session: {why}")
                self._parties[other]._board.end(session, failure)


class MemoryParty:
    """One party's transport (see `mimir.net.Transport`)."""

    def __init__(self, net: MemoryNet, party: int) -> None:
        self.party = party
        self.peers = tuple(i for i in range(net.n) if i != party)
        self._net = net
        self._board = wire.Board(party, self.peers)
        self._handlers: dict[str, Handler] = {}

    def channel(self, session: bytes, lane: str) -> MemoryChannel:
        book = self._board.open(session, lane)
        for peer in self.peers:
            if not self._net._joined(self.party, peer):
                book.fail(wire.blame(peer, "there is no link to this party"))
        return MemoryChannel(self._net, self._board, book)

    def link_secret(self, peer: int, session: bytes, label: str) -> Secret:
        if peer not in self.peers:
            raise LocalError(f"party {peer} is no peer of party {self.party}")
        if not self._net._joined(self.party, peer):
            raise PeerError(peer, "link secret", "there is no link to this party")
        self._board.touch(session)
        return self._net._secret(self.party, peer, session, label)

    def on_request(self, kind: str, handler: Handler) -> None:
        if kind in self._handlers:
            raise LocalError(f"requests of kind {kind!r} already have a handler")
        self._handlers[kind] = handler

    async def request(self, peer: int, kind: str, body: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        step = f"request {kind}"
        await trio.lowlevel.checkpoint()
        if not self._net._joined(self.party, peer):
            raise PeerError(peer, step, "there is no link to this party")
        handler = self._net.party(peer)._handlers.get(kind)
        if handler is None:
            raise PeerError(peer, step, "refused: unknown kind of request")
        question = wire.decode_body(wire.encode_body(body))
        with trio.move_on_after(deadline):
            try:
                answer = await handler(self.party, question)
                return wire.decode_body(wire.encode_body(answer))
            except BadInput as exc:
                raise PeerError(peer, step, f"refused: {exc}") from None
            except Exception:  # as on TCP: what a body brings about stays on the other side
                raise PeerError(peer, step, "refused: failed") from None
        raise PeerError(peer, step, f"silent for {deadline:g} s")

    def up(self, peer: int) -> bool:
        return self._net._joined(self.party, peer)

    async def wait_up(self, deadline: float) -> None:
        with trio.move_on_after(deadline):
            while not all(self.up(peer) for peer in self.peers):
                await trio.sleep(0.01)
            return
        down = next(peer for peer in self.peers if not self.up(peer))
        raise PeerError(down, "mesh", f"not up within {deadline:g} s")


class MemoryChannel:
    """One end of a conversation in memory (see `mimir.net.Channel`)."""

    def __init__(self, net: MemoryNet, board: wire.Board, book: wire.Lockstep) -> None:
        self.timeout = ROUND_TIMEOUT
        self.party = book.party
        self.session = book.session
        self.lane = book.lane
        self._net = net
        self._board = board
        self._book = book
        self._changed, self._dead = trio.Event(), trio.Event()
        book.wake = self._wake

    @property
    def rounds(self) -> int:
        return self._book.rounds

    @property
    def sent(self) -> int:
        return self._book.sent

    @property
    def received(self) -> int:
        return self._book.received

    def _wake(self) -> None:
        self._changed.set()
        if self._book.failure is not None:
            self._dead.set()

    async def round(
        self, step: str, send: Mapping[int, Payload], expect: Mapping[int, int]
    ) -> dict[int, bytearray]:
        book = self._book
        seq = book.seq
        out = book.begin(step, send, expect)
        try:
            for peer, _head, views in out:
                payload = bytearray(views[0]) if len(views) == 1 else bytearray().join(views)
                self._net._carry(self.party, peer, wire.Data(book.session, book.lane, seq, step, payload))
            if not book.missing() and book.failure is None:
                await trio.lowlevel.checkpoint()
            with trio.move_on_after(self.timeout):
                while book.missing() and book.failure is None:
                    self._changed = trio.Event()
                    await self._changed.wait()
            if book.failure is None and (silent := book.missing()):
                book.fail(wire.silence(silent, self.timeout))
            return book.finish()
        finally:
            if book.in_round:
                book.broken_off()

    async def failed(self) -> None:
        """Wait until the channel is dead, and raise what killed it."""
        if self._book.failure is None:
            await self._dead.wait()
        self._book.raise_failure()

    async def abort(self, reason_public: str = "abort") -> None:
        self._board.end(self.session, wire.aborted(f"ended here: {reason_public}"))
        self._net._spread_abort(self.party, self.session, reason_public)
        self._board.close(self._book)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self._board.close(self._book)
        await trio.lowlevel.checkpoint()
