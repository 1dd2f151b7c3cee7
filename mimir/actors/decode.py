"""The decode actor: the next tokens of all sessions of a model that are ready, by one pass through the model.

A pass reads every weight once for all its rows, and its rows share rounds, frames and calls. What it opens
under masks is what the sessions would open one by one, and each row has its own cache, material and sampler.

Parties get sessions ready in different order, so before a pass each names those that wait with it, and those
named by all three take part. A session may end at any time without harm to others: a pass that has begun goes
on with its row, and needs nothing more of it. Only a party can make a pass fail, and then the sessions in it
end, as they would have one by one.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import structlog
import trio
from prometheus_client import Histogram

from mimir.actors import Actor, Reply, cause_of
from mimir.actors.lane import END_SECONDS, close_lane, open_lane
from mimir.actors.matmul import MatmulActor
from mimir.actors.sampler import Choice, Noise, SamplerActor
from mimir.actors.softmax import SoftmaxActor
from mimir.errors import BadInput, MimirError
from mimir.model import transformer
from mimir.model.checkpoint import PlanSpec
from mimir.model.sampling import Sampler
from mimir.model.transformer import Cache, Parts
from mimir.mpc import prep
from mimir.mpc.domain import U64, Ring
from mimir.mpc.doors import Doors
from mimir.mpc.nonlinear import Settings
from mimir.mpc.ops import Context
from mimir.mpc.prep import Joint, Store, Weights
from mimir.mpc.share import Share, concat
from mimir.net import SESSION_BYTES, Transport
from mimir.net.messages import TOKEN_BITS

log = structlog.get_logger("mimir.decode")

ROWS = Histogram("mimir_pass_rows", "Sessions whose token one pass decoded", buckets=(1, 2, 4, 8, 16, 32))

LEADER: Final = 0  # opens the lane
OPEN_LANE: Final = "decode lane"
ASK_SECONDS: Final = 30.0
LISTED: Final = 64  # rows that a party names at once: as many as it may have sessions
TAG: Final = 16  # bytes that name a session and its token
PATIENCE: Final = 1 / 8  # of what the last pass took: so long the next one waits for those who are late
LEAVING: Final = b"\xff" * TAG  # instead of a name
LEAVE_SECONDS: Final = 0.2
PAUSE: Final = 0.002  # seconds before naming again when no session was named by all, doubled ...
PAUSES: Final = 7  # ... so often at most
MOST_LANES: Final = 3  # that may be lost in a row before anything was decoded ...
LANE_SECONDS: Final = 0.1  # ... after each of which so much longer is waited


@dataclass(slots=True, eq=False)
class Row:
    """What a session brings to a pass: its last token, still to be read, with its position (1,) each; its
    cache and material; how its next token is chosen, and by which noise.
    """

    session: bytes
    step: str  # within the session
    token: Share
    position: Share
    cache: Cache
    store: Store
    sampler: Sampler
    noise: Noise


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """What a pass gives a session: its next token as a share, and its components for the session's clients;
    the rounds of the pass, and this session's part of what was sent.
    """

    index: Share  # (1,)
    components: Ring  # (2, 1)
    rounds: int
    sent: int


class Layers:
    """The actors that run the layers of one lane."""

    def __init__(self) -> None:
        self.matmul, self.softmax, self.sampler = MatmulActor(), SoftmaxActor(), SamplerActor()
        self.parts = Parts(self.matmul.matmul, self.softmax.exponentials)

    def start(self, nursery: trio.Nursery) -> None:
        for actor in (self.matmul, self.softmax, self.sampler):
            nursery.start_soon(actor.run)


async def decode(
    ctx: Context,
    step: str,
    doors: Doors,
    spec: PlanSpec,
    rows: Sequence[Row],
    settings: Settings,
    layers: Layers,
    choices: Sequence[Choice],
) -> tuple[Share, Ring]:
    """One pass: the next token of each row (n,) modulo 2^INDEX_BITS, and its components (2, n) modulo
    2^TOKEN_BITS for the session's clients.
    """
    for row in rows:
        row.cache.admit(ctx.bk)
    tokens, positions = concat([r.token for r in rows]), concat([r.position for r in rows])
    entered = await transformer.reenter(ctx, f"{step}/enter", spec, tokens, positions, layers.parts)
    caches = [row.cache for row in rows]
    hidden = await transformer.forward(ctx, step, spec, entered, caches, settings, layers.parts)
    return await choose(ctx, step, doors, spec, hidden, settings, layers, choices)


async def choose(
    ctx: Context,
    step: str,
    doors: Doors,
    spec: PlanSpec,
    hidden: Share,
    settings: Settings,
    layers: Layers,
    choices: Sequence[Choice],
) -> tuple[Share, Ring]:
    """The token that follows each row of hidden (n, d), as `decode` gives it."""
    logits = await transformer.logits(ctx, step, spec, hidden, settings, layers.parts)
    chosen = await layers.sampler.choose(ctx, step, logits, choices)
    (components,) = await doors.reveal("token", ctx.take(prep.Zero(), chosen.size)["zero"], chosen)
    return chosen, components % U64(1 << TOKEN_BITS)  # what is above means nothing


@dataclass(slots=True, eq=False)
class Waiting:
    """A row in the mailbox, or behind it."""

    row: Row
    reply: Reply[Token]
    tag: bytes = field(init=False)  # the same at all parties, and of no other token of any session
    gone: bool = False

    def __post_init__(self) -> None:
        self.tag = hashlib.sha256(self.row.session + self.row.step.encode()).digest()[:TAG]


class DecodeActor(Actor[Waiting]):
    """Serves all sessions of one model at this party."""

    def __init__(
        self,
        transport: Transport,
        model: str,
        spec: PlanSpec,
        weights: Weights,
        settings: Settings,
        *,
        most: int,
        round_seconds: float,
    ) -> None:
        """`most` rows go through the model together. `spec` is that of the sessions."""
        super().__init__()
        self.transport = transport
        self.model = model
        self._spec = spec
        self._weights = weights
        self._settings = settings
        self._most = most
        self._round_seconds = round_seconds
        self._asked_send, self._asked = trio.open_memory_channel[bytes](1)
        self._waiting: dict[bytes, Waiting] = {}  # in the order of their coming
        self._members: list[Waiting] = []  # in the pass that runs
        self._asked_anew = trio.CancelScope()  # what is given up for another lane
        self._decoding = 0  # sessions that ask for one token after another now
        self._last = 0.0  # seconds of the last pass
        self._decoded = False  # whether the lane has been of use

    # --- for sessions ---------------------------------------------------------------------------------------

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While a session asks for token after token: passes wait for it a little."""
        self._decoding += 1
        try:
            yield
        finally:
            self._decoding -= 1

    async def next(self, row: Row) -> Token:
        """The token after a row's, in the next pass that all three parties have this session ready for.

        Raises what ended the pass. If the caller is cancelled, a pass that has begun goes on with the row.
        """
        waiting = Waiting(row, Reply())
        try:
            await self.tell(waiting)
            return await waiting.reply.get()
        finally:
            waiting.gone = True
            self._waiting.pop(waiting.tag, None)

    def renew(self, peer: int, lane: bytes) -> None:
        """The leader asks to open a lane; the last one asked for counts."""
        if peer != LEADER or len(lane) != SESSION_BYTES:
            raise BadInput(f"only party {LEADER} opens a lane for decoding, by {SESSION_BYTES} bytes")
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
                self._decoded = False
                try:
                    await self._lane()
                except (Exception, BaseExceptionGroup) as error:
                    cause = cause_of(error)
                    if not isinstance(cause, Exception):
                        raise
                    # In a group with it our own end may be lost: the next wait tells it again.
                    lost = 0 if self._decoded else lost + 1
                    self._failed(cause, everybody=lost >= MOST_LANES)
                    await trio.sleep(LANE_SECONDS * lost)
        finally:
            await self._refuse()

    def _failed(self, cause: Exception, *, everybody: bool) -> None:
        """End the sessions of the pass that failed. Who waits gets another lane, unless these were no use."""
        if not isinstance(cause, MimirError):
            log.error("decoding failed by an error of ours", exc_info=cause)
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
            await self.transport.channel(name, "online").abort()

    async def _lane(self) -> None:
        """From the opening of a lane to its end, by a peer that leaves or asks for another one. Raises what
        broke it.
        """
        if self.transport.party == LEADER:
            await self._first()
            name = os.urandom(SESSION_BYTES)
            body = {"model": self.model, "lane": name.hex()}
            for peer in self.transport.peers:
                await self.transport.request(peer, OPEN_LANE, body, ASK_SECONDS)
        else:
            name = await self._asked.receive()
        seconds = self._round_seconds
        with trio.CancelScope() as self._asked_anew:
            doors = await open_lane(self.transport, name, "online", first=seconds, then=seconds)
        if self._asked_anew.cancelled_caught:
            return
        lane = _Lane(doors, Layers(), Noise(doors))
        over = broken = False
        try:
            async with trio.open_nursery() as nursery:
                lane.layers.start(nursery)
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

    async def _leave(self, lane: _Lane, *, over: bool, broken: bool) -> None:
        """Let go of a lane, and tell the peers, who may still be in the last round of the pass before."""
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
        with trio.move_on_after(PATIENCE * self._last):
            while len(self._waiting) < self._decoding:
                self._accept(await self._receive.receive())
        try:
            while True:
                self._accept(self._receive.receive_nowait())
        except trio.WouldBlock:
            pass

    def _accept(self, waiting: Waiting) -> None:
        if not waiting.gone:
            self._waiting[waiting.tag] = waiting

    async def _idle(self, lane: _Lane) -> bool:
        """Until the three have named whom they have: sets the members of a pass, who may be none. True if
        the lane is over, as a peer leaves it or the leader asks for another.
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
            # A tag is new for each token, so nobody comes last for ever. Who has left since then takes part.
            common = set(mine).intersection(*heard)
            self._members = [mine[tag] for tag in sorted(common)[: self._most]]
        return self._asked_anew.cancelled_caught

    async def _name(self, lane: _Lane, tags: Sequence[bytes]) -> list[set[bytes]]:
        """Tell the peers these names, and hear theirs. One round, which waits until they have some."""
        doors = lane.doors
        told = b"".join(tags).ljust(LISTED * TAG, b"\0")
        step = f"pass {lane.number}/names"
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

    # --- a pass ---------------------------------------------------------------------------------------------

    async def _pass(self, lane: _Lane) -> None:
        doors, members = lane.doors, self._members
        began = time.monotonic()
        for waiting in members:
            self._waiting.pop(waiting.tag, None)
        digest = hashlib.sha256(b"".join(waiting.tag for waiting in members)).hexdigest()[:16]
        # Parties that were told different names disagree about the first round's.
        step = f"pass {lane.number - 1} {digest}"
        rows, coin = [waiting.row for waiting in members], _Coin(lane.noise)
        ctx = Context(doors.bk, doors, Joint([row.store for row in rows]), self._weights)
        choices = [coin.choice(row) for row in rows]
        tokens, components = await decode(
            ctx, step, doors, self._spec, rows, self._settings, lane.layers, choices
        )
        self._members, self._decoded = [], True
        self._last = time.monotonic() - began
        ROWS.observe(len(rows))
        rounds, sent = doors.channel.rounds - lane.before[0], doors.channel.sent - lane.before[1]
        log.debug("decoded", rows=len(rows), seconds=round(self._last, 3))
        for i, waiting in enumerate(members):
            part = slice(i, i + 1)
            waiting.reply.set(Token(tokens[part], components[:, part], rounds, sent // len(rows)))


@dataclass(slots=True, eq=False)
class _Lane:
    doors: Doors
    layers: Layers
    noise: Noise
    number: int = 0  # how often names were told
    naming: bool = False
    before: tuple[int, int] = (0, 0)  # rounds and bytes before the last names


class _Coin:
    """One coin of a lane for all rows of a pass, tossed when the first of them wants noise: the own lane of
    its session may have ended at another party.
    """

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._coin: bytes | None = None

    def choice(self, row: Row) -> Choice:
        async def draw() -> bytes:
            if self._coin is None:
                self._coin = await self._noise.draw()
            return hashlib.sha256(b"mimir row" + self._coin + row.session).digest()

        return Choice(row.sampler, row.noise.draw if row.noise.derived else draw)
