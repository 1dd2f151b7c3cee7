"""The triple producer: prepares verified material for the steps of a session, ahead of their turn.

Work comes as batches in an order all parties know; a batch is made by all three in lockstep on the "prep"
lane. The producer stays `ahead` token positions in front of what has been taken, also while the client reads.
Material belongs to one step of one session: it is handed out once, its keys are fresh for the session, and
nothing of it is ever written to disk, so neither a crash nor a reconnect can make it be used again.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
import trio
from prometheus_client import Counter, Gauge, Histogram

from mimir.actors import Actor, Reply
from mimir.errors import LocalError
from mimir.mpc import prep
from mimir.mpc.domain import RING_BITS, Ring
from mimir.mpc.doors import Doors
from mimir.mpc.prep import Demand, Store, Weights

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
KEPT: Final = 1 << 30  # bytes of freed memory that wait for the next batch, at least ...
KEPT_PART: Final = BATCH_PART // 2  # ... or so many batches, which is half of what a session may hold
IN_HEAP: Final = 32 << 20  # arrays up to this size, the most that the C library allows, are kept
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_INT_MAX: Final = (1 << 31) - 1


def keep_pages(at_once: int = BATCH_BYTES) -> None:
    """Let the memory of freed arrays wait for the next batch, in the whole process.

    What one token takes is freed again some hundred MB later, and glibc by itself gives back what lies at the
    end of its heap, to be mapped and cleared anew. Another C library goes on as it does.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, min(max(KEPT, KEPT_PART * at_once), _INT_MAX))


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
    positions: float = 0.0


class TripleProducer(Actor[Prepare | Need]):
    def __init__(
        self,
        doors: Doors,
        weights: Weights,
        shapes: Mapping[str, tuple[int, int]],
        ahead: int,
        at_once: int,
        progress: Callable[[int], Awaitable[None]],
    ) -> None:
        """`shapes` are those of the weight matrices by name; at most `ahead` positions are kept ready, and a
        step of more than `at_once` bytes is made in parts.
        """
        super().__init__()
        self._doors = doors
        self._weights = weights
        self._shapes = shapes
        self.ahead = ahead
        self._at_once = at_once
        self._progress = progress
        self._caches: dict[tuple[str, int], list[Ring]] = {}
        self._todo: deque[Batch] = deque()
        self._begun: dict[str, Store] = {}  # steps of which more is to come
        self._ready: dict[str, _Ready] = {}
        self._waiting: dict[str, Reply[Store]] = {}
        self._made = 0

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
            while True:
                try:
                    while True:
                        self._accept(self._receive.receive_nowait())
                except trio.WouldBlock:
                    pass
                if self._todo and self._may_start():
                    await self._make(self._todo.popleft())
                else:
                    self._accept(await self._receive.receive())
        finally:
            READY.dec(sum(r.positions for r in self._ready.values()))
            for store in (*(r.store for r in self._ready.values()), *self._begun.values()):
                store.wipe()
            self._ready.clear()
            self._begun.clear()

    def _may_start(self) -> bool:
        stock = sum(r.positions for r in self._ready.values())
        return bool(self._waiting) or not self._ready or stock + self._todo[0].positions <= self.ahead

    def _accept(self, message: Prepare | Need) -> None:
        if isinstance(message, Prepare):
            self._todo.extend(message.batches)
            return
        if message.step in self._waiting:
            raise LocalError(f"the material of step {message.step} was asked for twice")
        self._waiting[message.step] = message.reply
        self._deliver()

    def _deliver(self) -> None:
        for step in [s for s in self._waiting if s in self._ready]:
            ready = self._ready.pop(step)
            READY.dec(ready.positions)
            self._waiting.pop(step).set(ready.store)

    async def _make(self, batch: Batch) -> None:
        began, sent = time.monotonic(), self._doors.channel.sent
        demands = await trio.to_thread.run_sync(batch.plan)
        total: dict[prep.Kind, int] = {}
        for demand in demands:
            prep.add_demand(total, demand)
        made = []
        # Steps that were put together are made together.
        cut = parts(total, self._shapes, self._at_once) if len(demands) == 1 else [total]
        for number, part in enumerate(cut):
            work = prep.Batch(self._doors, self._weights, self._caches)
            name = f"prep/{batch.name}" + (f"/{number}" if number else "")
            made.append(await prep.produce(work, name, part))
        material = prep.join(made)
        for step, store in zip(batch.steps, prep.split(material, demands), strict=True):
            if step in self._begun:
                store.material |= self._begun.pop(step).material
            if batch.last:
                self._ready[step] = _Ready(store, batch.positions / len(batch.steps))
            else:
                self._begun[step] = store
        self._made += batch.positions
        seconds = time.monotonic() - began
        READY.inc(batch.positions)
        MADE.inc()
        SECONDS.observe(seconds)
        SENT.inc(self._doors.channel.sent - sent)
        log.debug("made and verified", batch=batch.name, seconds=round(seconds, 3))
        self._deliver()
        await self._progress(self._made)


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
