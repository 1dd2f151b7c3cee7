"""What serves all sessions of a model at once: work of those that are ready is done together, as one.

Parties get sessions ready in different order, so before each piece of work each names those that wait with
it, and those named by all three take part. A session may end at any time without harm to others: work that
has begun goes on with what it brought, and needs nothing more of it. Only a party can make work fail, and
then the sessions in it end, as they would have one by one.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Final, Generic, TypeVar

import structlog
import trio

from mimir.actors import Actor, Reply, cause_of
from mimir.actors.lane import END_SECONDS, close_lane, open_lane
from mimir.errors import BadInput, MimirError
from mimir.mpc.doors import Doors
from mimir.net import SESSION_BYTES, Channel, Transport

log = structlog.get_logger("mimir.shared")

LEADER: Final = 0  # opens the lane
OPEN_LANE: Final = "shared lane"
ASK_SECONDS: Final = 30.0
LISTED: Final = 64  # sessions that a party names at once: as many as it may have
TAG: Final = 16  # bytes that name a session and its work
PATIENCE: Final = 1 / 8  # of what the last work took: so long the next one waits for those who are late
LEAVING: Final = b"\xff" * TAG  # instead of a name
LEAVE_SECONDS: Final = 0.2
PAUSE: Final = 0.002  # seconds before naming again when no session was named by all, doubled ...
PAUSES: Final = 7  # ... so often at most
MOST_LANES: Final = 3  # that may be lost in a row before anything was done ...
LANE_SECONDS: Final = 0.1  # ... after each of which so much longer is waited

W = TypeVar("W")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Served(Generic[R]):
    """What a session gets; the rounds of the work, this session's part of the bytes sent, and how many
    sessions it was done for.
    """

    result: R
    rounds: int
    sent: int
    members: int


@dataclass(slots=True, eq=False)
class Waiting(Generic[W, R]):
    """A session's work in the mailbox, or behind it."""

    work: W
    tag: bytes  # the same at all parties, and of no other work of any session
    reply: Reply[Served[R]] = field(default_factory=Reply)
    gone: bool = False


@dataclass(slots=True, eq=False)
class Lane:
    doors: Doors
    number: int = 0  # how often names were told
    naming: bool = False
    before: tuple[int, int] = (0, 0)  # rounds and bytes before the last names


class SharedActor(Actor[Waiting[W, R]]):
    """Serves all sessions of one model at this party, by a lane of its own. Subclasses say how."""

    WORK: ClassVar[str]  # what it is called among parties; also the name of the work's steps
    LANE: ClassVar[str]
    GRACE: ClassVar[float] = 0.0  # seconds that those who are late have at least

    def __init__(self, transport: Transport, model: str, round_seconds: float) -> None:
        super().__init__()
        self.transport = transport
        self.model = model
        self._round_seconds = round_seconds
        self._asked_send, self._asked = trio.open_memory_channel[bytes](1)
        self._waiting: dict[bytes, Waiting[W, R]] = {}  # in the order of their coming
        self._members: list[Waiting[W, R]] = []  # in the work that is done
        self._asked_anew = trio.CancelScope()  # what is given up for another lane
        self._coming = 0  # sessions that ask for one thing after another now
        self._last = 0.0  # seconds of the last work
        self._used = False  # whether the lane has been of use

    @abstractmethod
    async def _serve(self, doors: Doors, step: str, members: Sequence[Waiting[W, R]]) -> list[R]:
        """Do the members' work as one. What each of them gets."""

    def _chosen(self, common: Sequence[Waiting[W, R]]) -> list[Waiting[W, R]]:
        """Those who take part, of all who could, at least one; the same at all parties."""
        return list(common)

    def _begin(self, lane: Lane, nursery: trio.Nursery) -> None:
        """A lane has been opened; what runs in this nursery ends with it."""

    def _unwanted(self, result: R) -> None:
        """A session is gone that would have got this."""

    # --- for sessions ---------------------------------------------------------------------------------------

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While a session asks for one thing after another: it is waited for a little."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    @contextmanager
    def away(self) -> Iterator[None]:
        """While such a session is busy with something else."""
        self._coming -= 1
        try:
            yield
        finally:
            self._coming += 1

    async def ask(self, work: W, own: Channel, name: str) -> Served[R]:
        """Have a session's work done with that of others, once all three parties have it; `name` is within
        the session, of which `own` is a channel.

        Raises what ended the work, or the session at another party. If the caller is cancelled, what has
        begun goes on.
        """
        tag = hashlib.sha256(own.session + name.encode()).digest()[:TAG]
        waiting: Waiting[W, R] = Waiting(work, tag)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(own.failed)
                await self.tell(waiting)
                served = await waiting.reply.get()
                nursery.cancel_scope.cancel()
            return served
        except ExceptionGroup as group:
            raise cause_of(group) from None
        finally:
            waiting.gone = True
            self._waiting.pop(waiting.tag, None)

    def renew(self, peer: int, lane: bytes) -> None:
        """The leader asks to open a lane; the last one asked for counts."""
        if peer != LEADER or len(lane) != SESSION_BYTES:
            raise BadInput(f"only party {LEADER} opens a shared lane, by {SESSION_BYTES} bytes")
        try:
            self._asked.receive_nowait()
        except trio.WouldBlock:
            pass
        self._asked_send.send_nowait(lane)
        self._asked_anew.cancel()

    # --- life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        lost = 0
        try:
            while True:
                self._used = False
                try:
                    await self._lane()
                except (Exception, BaseExceptionGroup) as error:
                    cause = cause_of(error)
                    if not isinstance(cause, Exception):
                        raise
                    # In a group with it our own end may be lost: the next wait tells it again.
                    lost = 0 if self._used else lost + 1
                    self._failed(cause, everybody=lost >= MOST_LANES)
                    await trio.sleep(LANE_SECONDS * lost)
        finally:
            await self._refuse()

    def _failed(self, cause: Exception, *, everybody: bool) -> None:
        """End the sessions of the work that failed. Who waits gets another lane, unless these were no use."""
        if not isinstance(cause, MimirError):
            log.error("shared work failed by an error of ours", work=self.WORK, exc_info=cause)
        failed, self._members = self._members, []
        if everybody:
            failed += self._waiting.values()
            self._waiting.clear()
        for waiting in failed:
            waiting.reply.fail(cause)

    async def _refuse(self) -> None:
        """Tell the peers that a lane which was asked for will not be opened here."""
        try:
            name = self._asked.receive_nowait()
        except trio.WouldBlock:
            return
        with trio.move_on_after(END_SECONDS, shield=True), suppress(MimirError):
            await self.transport.channel(name, self.LANE).abort()

    async def _lane(self) -> None:
        """From the opening of a lane to its end, by a peer that leaves or asks for another one. Raises what
        broke it.
        """
        if self.transport.party == LEADER:
            await self._first()
            name = os.urandom(SESSION_BYTES)
            body = {"model": self.model, "work": self.WORK, "lane": name.hex()}
            for peer in self.transport.peers:
                await self.transport.request(peer, OPEN_LANE, body, ASK_SECONDS)
        else:
            name = await self._asked.receive()
        seconds = self._round_seconds
        with trio.CancelScope() as self._asked_anew:
            doors = await open_lane(self.transport, name, self.LANE, first=seconds, then=seconds)
        if self._asked_anew.cancelled_caught:
            return
        lane = Lane(doors)
        over = broken = False
        try:
            async with trio.open_nursery() as nursery:
                self._begin(lane, nursery)
                pauses = 0  # in a row
                while not (over := await self._idle(lane)):
                    if self._members:
                        await self._pass(lane)
                        pauses = 0
                    else:
                        await trio.sleep(PAUSE * 2 ** min(pauses, PAUSES))
                        pauses += 1
                nursery.cancel_scope.cancel()
        except Exception:
            broken = True
            raise
        finally:
            await self._leave(lane, over=over, broken=broken or bool(self._members))

    async def _leave(self, lane: Lane, *, over: bool, broken: bool) -> None:
        """Let go of a lane, and tell the peers, who may still be in the last round of the work before."""
        doors = lane.doors
        with trio.CancelScope(shield=True):
            if lane.naming and not broken and not over:
                await trio.sleep(LEAVE_SECONDS)  # what we named is out: only an abort takes it back
                broken = True
            if not broken and not over:
                with trio.move_on_after(LEAVE_SECONDS), suppress(MimirError):
                    await self._name(lane, [LEAVING])
            await close_lane(doors, abort=broken)

    # --- who takes part -------------------------------------------------------------------------------------

    async def _first(self) -> None:
        """Wait until somebody waits."""
        while not self._waiting:
            self._accept(await self._receive.receive())

    async def _gather(self) -> None:
        """Wait until somebody waits, and a little for others who are at it."""
        await self._first()
        with trio.move_on_after(max(self.GRACE, PATIENCE * self._last)):
            while len(self._waiting) < self._coming:
                self._accept(await self._receive.receive())
        try:
            while True:
                self._accept(self._receive.receive_nowait())
        except trio.WouldBlock:
            pass

    def _accept(self, waiting: Waiting[W, R]) -> None:
        if not waiting.gone:
            self._waiting[waiting.tag] = waiting

    async def _idle(self, lane: Lane) -> bool:
        """Until the three have named whom they have: sets the members, who may be none. True if the lane is
        over, as a peer leaves it or the leader asks for another.
        """
        if self._asked.statistics().current_buffer_used:
            return True
        with trio.CancelScope() as self._asked_anew:
            await self._gather()
            if self.transport.party == LEADER:  # a peer may have lost the lane and wait for another
                self._asked_anew.deadline = trio.current_time() + self._round_seconds
            mine = dict(islice(self._waiting.items(), LISTED))
            heard = await self._name(lane, list(mine))
            if any(LEAVING in names for names in heard):
                return True
            # A tag is new for each work, so nobody comes last for ever. Who has left since then takes part.
            common = sorted(set(mine).intersection(*heard))
            self._members = self._chosen([mine[tag] for tag in common])
        return self._asked_anew.cancelled_caught

    async def _name(self, lane: Lane, tags: Sequence[bytes]) -> list[set[bytes]]:
        """Tell the peers these names, and hear theirs. One round, which waits until they have some."""
        doors = lane.doors
        told = b"".join(tags).ljust(LISTED * TAG, b"\0")
        step = f"{self.WORK} {lane.number}/names"
        lane.number += 1
        lane.naming, lane.before = True, (doors.channel.rounds, doors.channel.sent)
        doors.channel.timeout = math.inf
        heard = await doors.round(
            step, dict.fromkeys(doors.peers, told), dict.fromkeys(doors.peers, len(told))
        )
        doors.channel.timeout = self._round_seconds
        lane.naming = False
        cuts = range(0, len(told), TAG)
        return [{bytes(names[at : at + TAG]) for at in cuts} for names in heard.values()]

    # --- the work -------------------------------------------------------------------------------------------

    async def _pass(self, lane: Lane) -> None:
        doors, members = lane.doors, self._members
        began = time.monotonic()
        for waiting in members:
            self._waiting.pop(waiting.tag, None)
        digest = hashlib.sha256(b"".join(waiting.tag for waiting in members)).hexdigest()[:16]
        # Parties that were told different names disagree about the first round's.
        results = await self._serve(doors, f"{self.WORK} {lane.number - 1} {digest}", members)
        self._members, self._used = [], True
        self._last = time.monotonic() - began
        rounds, sent = doors.channel.rounds - lane.before[0], doors.channel.sent - lane.before[1]
        for waiting, result in zip(members, results, strict=True):
            if waiting.gone:
                self._unwanted(result)
            waiting.reply.set(Served(result, rounds, sent // len(members), len(members)))
