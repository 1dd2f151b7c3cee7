"""The triple producers: they prepare verified material for the steps of sessions, ahead of their turn.

A session's producer has its work as batches in an order all parties know, and stays `ahead` token positions
in front of what has been taken, also while the client reads. What fits one batch is made by the producer
that all sessions of a model share, together with what the others want: a batch costs many rounds, and a block
of products with weights a pass over all weights, however many it is for. What is larger is made in parts, on
the session's own "prep" lane.

Material belongs to one step of one session: it is handed out once, its keys are fresh for the session or for
the sessions that are there, and nothing of it is ever written to disk, so neither a crash nor a reconnect can
make it be used again.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import structlog
import trio
from prometheus_client import Counter, Gauge, Histogram

from mimir.actors import Actor, Reply
from mimir.actors.shared import SharedActor, Waiting
from mimir.errors import LocalError
from mimir.mpc import prep
from mimir.mpc.domain import RING_BITS
from mimir.mpc.doors import Doors
from mimir.mpc.prep import Caches, Demand, Store, Weights
from mimir.net import Transport

log = structlog.get_logger("mimir.triples")

READY = Gauge("mimir_triple_pool_positions", "Token positions of verified material ready to be taken")
MADE = Counter("mimir_triple_batches_total", "Batches of material made and verified")
SECONDS = Histogram("mimir_triple_batch_seconds", "Seconds to make and verify a batch")
SENT = Counter("mimir_triple_sent_bytes_total", "Bytes sent to make material")

# Material made at once at least, or twice as much if it is two tokens'; making it takes up to four times as
# much memory. A batch costs many rounds and calls whatever is in it, so more is better where there is room.
BATCH_BYTES: Final = 80 << 20
BATCH_PART: Final = 12  # of what a session may hold, a batch may be this part
WHOLE: Final = 64  # items; kinds made of bit lanes can only be cut at whole words
TOGETHER_BYTES: Final = 512 << 20  # what is made at once for several sessions, if they may hold so much
KEPT: Final = 1 << 30  # bytes of freed memory that wait for the next batch, at least ...
KEPT_PART: Final = BATCH_PART // 2  # ... or so many times what is made at once
IN_HEAP: Final = 32 << 20  # arrays up to this size, the most that the C library allows, are kept
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # malloc.h
_INT_MAX: Final = (1 << 31) - 1
_kept = KEPT  # as keep_pages has set it


def keep_pages(at_once: int = BATCH_BYTES) -> None:
    """Let the memory of freed arrays wait for the next batch, in the whole process.

    What one token takes is freed again some hundred MB later, and glibc by itself gives back what lies at the
    end of its heap, to be mapped and cleared anew. And it gives each thread a heap, of which none takes what
    another has freed: threads that begin after this share one. Another C library goes on as it does.
    """
    global _kept
    _kept = max(_kept, KEPT_PART * at_once)
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, IN_HEAP)
        if _kept <= _INT_MAX:
            mallopt(_M_TRIM_THRESHOLD, _kept)
        else:  # more than can be told: all of it, whatever an array's size
            mallopt(_M_TRIM_THRESHOLD, -1)
            mallopt(_M_MMAP_MAX, 0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Steps made together: names, what each takes (planned in its turn), and their token positions.

    A step may be made in several batches; the one that names its positions comes last.
    """

    name: str
    steps: tuple[str, ...]
    plan: Callable[[], list[Demand]]
    positions: int
    last: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What a session wants made: steps in their order, what each takes, in how many bytes. Of these some may
    be made first, unless they belong together.
    """

    demands: Sequence[Demand]
    sizes: Sequence[int]
    whole: bool
    caches: Caches
    at_once: int  # bytes that this session may have made at once


class SharedProducer(SharedActor[Order, list[Store]]):
    """Makes material for all sessions of one model at this party that wait for some."""

    WORK = "batch"
    LANE = "prep"
    GRACE = 0.2  # to plan a step

    def __init__(self, transport: Transport, model: str, weights: Weights, *, round_seconds: float) -> None:
        super().__init__(transport, model, round_seconds)
        self._weights = weights

    def _chosen(self, common: Sequence[Waiting[Order, list[Store]]]) -> list[Waiting[Order, list[Store]]]:
        room = _room([waiting.work for waiting in common])
        chosen: list[Waiting[Order, list[Store]]] = []
        for waiting in common:
            order = waiting.work
            room -= sum(order.sizes) if order.whole else order.sizes[0]
            if chosen and room < 0:
                break
            chosen.append(waiting)
        return chosen

    async def _serve(
        self, doors: Doors, step: str, members: Sequence[Waiting[Order, list[Store]]]
    ) -> list[list[Store]]:
        began, sent = time.monotonic(), doors.channel.sent
        orders = [waiting.work for waiting in members]
        counts = allotted(orders)
        demands = [
            prep.owned(demand, owner)
            for owner, (order, count) in enumerate(zip(orders, counts, strict=True))
            for demand in order.demands[:count]
        ]
        keep_pages(sum(sum(order.sizes[:count]) for order, count in zip(orders, counts, strict=True)))
        batch = prep.Batch(doors, self._weights, [order.caches for order in orders])
        stores = iter(prep.split(await prep.produce(batch, step, summed(demands)), demands))
        _note(began, doors.channel.sent - sent, sessions=len(orders), steps=len(demands))
        return [[next(stores) for _ in range(count)] for count in counts]

    def _unwanted(self, result: list[Store]) -> None:
        for store in result:
            store.wipe()


def _room(orders: Sequence[Order]) -> int:
    """Bytes that are made at once for so many."""
    each = [order.at_once for order in orders]
    return max(max(each), min(sum(each), TOGETHER_BYTES))


def allotted(orders: Sequence[Order]) -> list[int]:
    """How many steps of each are made together: one of each, then one more of each while there is room."""
    counts = [len(order.demands) if order.whole else 1 for order in orders]
    room = _room(orders) - sum(sum(o.sizes[:n]) for o, n in zip(orders, counts, strict=True))
    for turn in range(1, max(len(order.demands) for order in orders)):
        more = [i for i, o in enumerate(orders) if counts[i] == turn < len(o.demands)]
        room -= sum(orders[i].sizes[turn] for i in more)
        if room < 0:
            break
        for i in more:
            counts[i] += 1
    return counts


def summed(demands: Sequence[Demand]) -> Demand:
    total: dict[prep.Kind, int] = {}
    for demand in demands:
        prep.add_demand(total, demand)
    return total


def _note(began: float, sent: int, **what: object) -> None:
    """A batch has been made."""
    seconds = time.monotonic() - began
    MADE.inc()
    SECONDS.observe(seconds)
    SENT.inc(sent)
    log.debug("made and verified", seconds=round(seconds, 3), **what)


@dataclass(frozen=True, slots=True)
class Prepare:
    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class Need:
    step: str
    reply: Reply[Store]


@dataclass(slots=True)
class _Ready:
    store: Store
    positions: int = 0


class TripleProducer(Actor[Prepare | Need]):
    """That of one session. Its mailbox is served also while a batch is made."""

    def __init__(
        self,
        doors: Doors,
        weights: Weights,
        shapes: Mapping[str, tuple[int, int]],
        ahead: int,
        at_once: int,
        progress: Callable[[int], Awaitable[None]],
        shared: SharedProducer | None = None,
    ) -> None:
        """`shapes` are those of the weight matrices by name; at most `ahead` positions are kept ready, and a
        step of more than `at_once` bytes is made in parts. Without `shared` everything is made by itself.
        """
        super().__init__()
        self._doors = doors
        self._weights = weights
        self._shapes = shapes
        self.ahead = ahead
        self._at_once = at_once
        self._progress = progress
        self._shared = shared
        self._caches: Caches = {}
        self._todo: deque[Batch] = deque()
        self._begun: dict[str, Store] = {}  # steps of which more is to come
        self._ready: dict[str, _Ready] = {}
        self._waiting: dict[str, Reply[Store]] = {}
        self._changed = trio.Event()
        self._made = 0
        self.spent = {"rounds": 0, "sent": 0}  # of what was made with others, and our part

    async def prepare(self, batches: Sequence[Batch]) -> None:
        """Queue batches. Returns at once."""
        await self.tell(Prepare(tuple(batches)))

    async def need(self, step: str) -> Store:
        """The material of a step, once; waits until it has been made and verified."""
        reply: Reply[Store] = Reply()
        await self.tell(Need(step, reply))
        return await reply.get()

    async def run(self) -> None:
        keep_pages(self._at_once)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._work)
                await super().run()
        finally:
            READY.dec(sum(r.positions for r in self._ready.values()))
            for store in (*(r.store for r in self._ready.values()), *self._begun.values()):
                store.wipe()
            self._ready.clear()
            self._begun.clear()

    async def _work(self) -> None:
        while True:
            with self._shared.coming() if self._shared else nullcontext():
                while self._todo and self._may_start():
                    await self._make(self._todo.popleft())
            self._changed = trio.Event()
            await self._changed.wait()

    def _may_start(self) -> bool:
        stock = sum(r.positions for r in self._ready.values())
        return bool(self._waiting) or not self._ready or stock + self._todo[0].positions <= self.ahead

    async def handle(self, message: Prepare | Need) -> None:
        if isinstance(message, Prepare):
            self._todo.extend(message.batches)
        elif message.step in self._waiting:
            raise LocalError(f"the material of step {message.step} was asked for twice")
        else:
            self._waiting[message.step] = message.reply
            self._deliver()
        self._changed.set()

    def _deliver(self) -> None:
        for step in [s for s in self._waiting if s in self._ready]:
            ready = self._ready.pop(step)
            READY.dec(ready.positions)
            self._waiting.pop(step).set(ready.store)

    async def _make(self, batch: Batch) -> None:
        demands = await trio.to_thread.run_sync(batch.plan)
        sizes = [bytes_of(demand, self._shapes) for demand in demands]
        if self._shared and (len(demands) > 1 or sizes[0] <= self._at_once):
            order = Order(demands, sizes, not batch.last, self._caches, self._at_once)
            served = await self._shared.ask(order, self._doors.channel, batch.name)
            stores = served.result
            self.spent["rounds"] += served.rounds
            self.spent["sent"] += served.sent
            if self._ready and served.members > 1:  # it may lie long: not with that of other sessions
                stores = [store.moved() for store in stores]
        else:
            with self._shared.away() if self._shared else nullcontext():
                stores = await self._alone(batch.name, demands)
        count, each = len(stores), batch.positions // len(batch.steps)
        if rest := batch.steps[count:]:
            left = demands[count:]
            again = Batch(rest[0], rest, lambda: left, each * len(rest))
            self._todo.appendleft(again)
        for step, store in zip(batch.steps[:count], stores, strict=True):
            if step in self._begun:
                store.material |= self._begun.pop(step).material
            if batch.last:
                self._ready[step] = _Ready(store, each)
            else:
                self._begun[step] = store
        self._made += each * count
        READY.inc(each * count)
        self._deliver()
        await self._progress(self._made)

    async def _alone(self, name: str, demands: Sequence[Demand]) -> list[Store]:
        """Made on the session's own lane, in parts where it is much."""
        began, sent = time.monotonic(), self._doors.channel.sent
        total, made = summed(demands), []
        # Steps that were put together are made together.
        cut = parts(total, self._shapes, self._at_once) if len(demands) == 1 else [total]
        for number, part in enumerate(cut):
            work = prep.Batch(self._doors, self._weights, [self._caches])
            step = f"prep/{name}" + (f"/{number}" if number else "")
            made.append(await prep.produce(work, step, part))
        stores = prep.split(prep.join(made), demands)
        _note(began, self._doors.channel.sent - sent, batch=name)
        return stores


def batch_bytes(memory: int) -> int:
    """Material made at once by a session that may hold so much."""
    return max(BATCH_BYTES, memory // BATCH_PART)


def parts(total: Demand, weights: Mapping[str, tuple[int, int]], at_once: int) -> Iterator[Demand]:
    """Cut what is made into parts of about `at_once` bytes, kind after kind in one order. Products with
    weights are not cut, for their check costs the same anew.
    """
    cut = {k: bytes_of({k: n}, weights) for k, n in total.items() if not isinstance(k, prep.Weight)}
    size = sum(cut.values())
    limit = size / max(1, round(size / at_once))
    part: dict[prep.Kind, int] = {k: n for k, n in total.items() if k not in cut}
    filled = 0.0
    for kind in sorted(cut, key=prep.order):
        left, each = total[kind], cut[kind] / max(1, total[kind])
        while left:
            room = math.ceil((limit - filled) / each / WHOLE) * WHOLE
            n = min(left, max(room, WHOLE))
            part[kind] = part.get(kind, 0) + n
            left -= n
            filled += n * each
            if filled >= limit:
                yield part
                part, filled = {}, 0.0
    if part:
        yield part


def bytes_of(demand: Demand, weights: Mapping[str, tuple[int, int]]) -> int:
    """Memory that the material of a demand takes, both components."""
    total = 0
    for kind, n in demand.items():
        shape = weights[kind.name] if isinstance(kind, prep.Weight) else None
        for name, dims in prep.shapes(kind, n, shape).items():
            lane = RING_BITS
            if isinstance(kind, prep.Weight) or (isinstance(kind, prep.Lookup) and name == "e"):
                lane = kind.lane
            size = 2 * lane // 8
            for d in dims:
                size *= d
            total += size
    return total
