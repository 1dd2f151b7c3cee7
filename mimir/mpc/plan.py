"""Planning a step without running it: what it will take, how many rounds, how many bytes.

The planner is a backend, doors, store and weights that know only shapes. Running a layer over them records
the demand, so the producer prepares exactly what the layer code asks for and the cost model cannot drift
from the code. It holds no secrets: every array is a single zero, stretched.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from mimir.errors import LocalError
from mimir.mpc import prep
from mimir.mpc.domain import Ring
from mimir.mpc.doors import DIGEST, Masked
from mimir.mpc.ops import Context
from mimir.mpc.prep import Kind
from mimir.mpc.share import Bits, Share

T = TypeVar("T")


def _zeros(*shape: int) -> Ring:
    return np.broadcast_to(np.zeros(1, np.uint64), shape)


class _Shapes:
    """A backend of one component that does nothing."""

    party = 0
    components = 1
    one = np.zeros(1, np.uint64)

    def add_public(self, v: Ring, public: Ring | np.uint64) -> Ring:
        return _zeros(*v.shape)

    def xor_public(self, v: Ring, public: Ring | np.uint64) -> Ring:
        return _zeros(*v.shape)


@dataclass(slots=True)
class Cost:
    """Of one step, online, per party."""

    rounds: int = 0
    sent: int = 0  # bytes, without framing
    opened: int = 0
    demand: dict[Kind, int] = field(default_factory=dict)

    def less(self, o: Cost) -> Cost:
        """What this takes and `o`, a part of it, does not."""
        if any(n > self.demand.get(k, 0) for k, n in o.demand.items()):
            raise LocalError("a plan takes less than a part of it")
        demand = {k: left for k, n in self.demand.items() if (left := n - o.demand.get(k, 0))}
        return Cost(self.rounds - o.rounds, self.sent - o.sent, self.opened - o.opened, demand)

    def add(self, o: Cost, names: Mapping[Kind, Kind]) -> None:
        """Add what `o` takes, of which each kind is called as `names` says."""
        self.rounds += o.rounds
        self.sent += o.sent
        self.opened += o.opened
        prep.add_demand(self.demand, {names[k]: n for k, n in o.demand.items()})


class _CountingDoors:
    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    async def open(self, step: str, *shares: Share) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_bits(self, step: str, *shares: Bits) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_low(self, step: str, width: int, *shares: Share) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares, width)]))[0]

    async def open_all(self, step: str, requests: Sequence[Masked]) -> list[list[Ring]]:
        self.cost.rounds += 1
        self.cost.sent += DIGEST
        for r in requests:
            for s in r.shares:
                self.cost.opened += s.size
                self.cost.sent += 8 * r.words(s)
        return [[np.zeros(s.shape, np.uint64) for s in r.shares] for r in requests]


class _CountingStore:
    def __init__(self, cost: Cost, weights: Mapping[str, tuple[int, int]]) -> None:
        self.cost = cost
        self.weights = weights

    def take(self, kind: Kind, n: int, of: int = 0) -> dict[str, Ring]:
        prep.add_demand(self.cost.demand, {kind: prep.lanes(kind, n)})
        shape = self.weights[kind.name] if isinstance(kind, prep.Weight) else None
        return {name: _zeros(1, *s) for name, s in prep.shapes(kind, n, shape).items()}


class _ShapeWeights:
    def __init__(self, weights: Mapping[str, tuple[int, int]]) -> None:
        self.weights = weights

    def pair(self, name: str) -> tuple[Ring, Ring]:
        z = _zeros(*self.weights[name])
        return z, z


class _PlanContext(Context):
    async def compute(self, work: int, fn: Callable[[], T], shape: tuple[int, ...]) -> Any:
        return _zeros(1, *shape[1:])


def planning(weights: Mapping[str, tuple[int, int]]) -> tuple[Context, Cost]:
    """A context in which to run a step for its cost; `weights` gives the shapes of the weight matrices."""
    cost = Cost()
    ctx = _PlanContext(_Shapes(), _CountingDoors(cost), _CountingStore(cost, weights), _ShapeWeights(weights))
    return ctx, cost


def run(plan: Coroutine[Any, Any, Cost]) -> Cost:
    """Run a planning coroutine, which never waits, to its end: callable from any thread."""
    try:
        plan.send(None)
    except StopIteration as end:
        cost: Cost = end.value
        return cost
    plan.close()
    raise LocalError("planning waited for something")
