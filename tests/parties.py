"""Three parties in one process, and a plaintext view of their shares: for tests only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import trio

from mimir.model.checkpoint import PlanSpec
from mimir.mpc import prep
from mimir.mpc.domain import Ring, encode
from mimir.mpc.doors import Doors
from mimir.mpc.ops import Context
from mimir.mpc.replicated import Replicated
from mimir.mpc.share import Share
from mimir.mpc.weights import Matrix
from mimir.net.memory import MemoryNet, Tap

T = TypeVar("T")
SESSION = bytes(range(16))


@dataclass
class DictWeights:
    """Weight shares of one party, from plain dictionaries."""

    tensors: Mapping[str, tuple[Matrix, Matrix]] = field(default_factory=dict)

    def pair(self, name: str) -> tuple[Matrix, Matrix]:
        return self.tensors[name]


@dataclass
class Party:
    index: int
    bk: Replicated
    doors: Doors
    prep_doors: Doors
    weights: DictWeights
    caches: dict[Any, Any] = field(default_factory=dict)

    async def context(self, demand: Mapping[prep.Kind, int], name: str = "batch") -> Context:
        batch = prep.Batch(self.prep_doors, self.weights, [self.caches])
        material = await prep.produce(batch, name, demand)
        return Context(self.bk, self.doors, prep.Store(material), self.weights)

    def share(self, value: Ring, seed: int = 1) -> Share:
        """This party's part of a sharing of `value`, with uniform components from a seed all parties know."""
        rng = np.random.default_rng(seed)
        a = rng.integers(0, 2**64, value.shape, np.uint64)
        b = rng.integers(0, 2**64, value.shape, np.uint64)
        c = [a, b, value - a - b]
        i = self.index
        return Share(np.stack([c[i], c[(i + 1) % 3]]), self.bk)


def encoded(spec: PlanSpec, values: Mapping[str, npt.NDArray[np.float64]], f: int = 16) -> dict[str, Any]:
    """Weights of a model, biases as rows, as they are shared: in words of 64 bits or of 32."""
    out = {}
    for name, v in values.items():
        words = encode(v.reshape(-1, v.shape[-1]), spec.scale(name, f))
        out[name] = words.astype(np.uint32) if spec.halved(name) else words
    return out


def share_weights(values: Mapping[str, Any], seed: int = 7) -> list[DictWeights]:
    """Three parties' shares of weight matrices."""
    rng = np.random.default_rng(seed)
    out: list[dict[str, tuple[Ring, Ring]]] = [{}, {}, {}]
    for name, v in values.items():
        a = rng.integers(0, 2**64, v.shape, np.uint64).astype(v.dtype)
        b = rng.integers(0, 2**64, v.shape, np.uint64).astype(v.dtype)
        c = [a, b, v - a - b]
        for i in range(3):
            out[i][name] = (c[i], c[(i + 1) % 3])
    return [DictWeights(t) for t in out]


def run_parties(
    fn: Callable[[Party], Awaitable[T]],
    *,
    tap: Tap | None = None,
    weights: list[DictWeights] | None = None,
    seed: bytes = b"tests",
    timeout: float = 120.0,
) -> list[T]:
    """Run `fn` at three parties; an error at any of them cancels the rest and is raised."""
    results: dict[int, T] = {}

    async def main() -> None:
        net = MemoryNet(3, tap=tap, seed=seed.ljust(32, b"\0"))

        def lane(i: int, name: str) -> Doors:
            before = net.link_secret(i, (i - 1) % 3, SESSION, f"prf {name}")
            after = net.link_secret(i, (i + 1) % 3, SESSION, f"prf {name}")
            channel = net.channel(i, SESSION, name)
            channel.timeout = timeout
            return Doors(channel, Replicated(i, before, after))

        async def one(i: int) -> None:
            doors, made = lane(i, "online"), lane(i, "prep")
            results[i] = await fn(Party(i, doors.bk, doors, made, (weights or [DictWeights()] * 3)[i]))

        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(one, i)

    trio.run(main)
    return [results[i] for i in range(3)]


def reconstruct(parts: list[Ring]) -> Ring:
    """The value of three parties' components (2, ...), after checking that both holders agree on each."""
    for i in range(3):
        assert np.array_equal(parts[i][1], parts[(i + 1) % 3][0]), "holders disagree about a component"
    return parts[0][0] + parts[1][0] + parts[2][0]


def reconstruct_bits(parts: list[Ring]) -> Ring:
    for i in range(3):
        assert np.array_equal(parts[i][1], parts[(i + 1) % 3][0]), "holders disagree about a component"
    return parts[0][0] ^ parts[1][0] ^ parts[2][0]
