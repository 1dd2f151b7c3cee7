"""Shares of ring elements and of bits, and what can be done to them without a message.

The layers know only `Share`, `Bits` and `Wire`. How a public value enters a share is the backend's
business (`Backend.add_public`), so the same layers run over any backend whose shares are arrays with a
leading axis of components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mimir.mpc.domain import Ring, constant

_NUMBER = int | np.uint64
_ZERO = np.zeros(1, np.uint64)
_ONES = ~_ZERO


class Backend(Protocol):
    """What a sharing scheme supplies to the local arithmetic of shares."""

    @property
    def party(self) -> int: ...

    @property
    def components(self) -> int: ...

    @property
    def one(self) -> Ring:
        """This party's components of the public number 1: v + one k is v plus a public k."""
        ...

    def add_public(self, v: Ring, public: Ring | np.uint64) -> Ring:
        """v plus a public array that broadcasts to the shape of one component."""
        ...

    def xor_public(self, v: Ring, public: Ring | np.uint64) -> Ring:
        """The same over GF(2)."""
        ...


def _ring(x: Any) -> Any:
    return constant(int(x)) if isinstance(x, int) else x


class Share:
    """An array of secret ring elements, as this party's components `v` (components, *shape).

    Linear operations are local. The value cannot be read here: only `doors` opens, and only masked.
    """

    __slots__ = ("bk", "v")
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, v: Ring, bk: Backend) -> None:
        self.v = v
        self.bk = bk

    @property
    def shape(self) -> tuple[int, ...]:
        return self.v.shape[1:]

    @property
    def size(self) -> int:
        return self.v.size // len(self.v)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape}>"

    def __bool__(self) -> bool:
        raise TypeError("a share has no truth value")

    def __eq__(self, other: object) -> bool:
        raise TypeError("shares cannot be compared; open a masked difference instead")

    def __reduce__(self) -> Any:
        raise TypeError("shares are not pickled")

    def __add__(self, o: Share | Ring | _NUMBER) -> Share:
        if isinstance(o, Share):
            return Share(self.v + o.v, self.bk)
        return Share(self.bk.add_public(self.v, _ring(o)), self.bk)

    __radd__ = __add__

    def __sub__(self, o: Share | Ring | _NUMBER) -> Share:
        if isinstance(o, Share):
            return Share(self.v - o.v, self.bk)
        return self + (_ZERO - _ring(o))

    def __rsub__(self, o: Ring | _NUMBER) -> Share:
        return (-self) + o

    def __neg__(self) -> Share:
        return Share(_ZERO - self.v, self.bk)

    def __mul__(self, public: npt.NDArray[Any] | _NUMBER) -> Share:
        return Share(self.v * _ring(public), self.bk)

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> Share:
        key = key if isinstance(key, tuple) else (key,)
        return Share(self.v[(slice(None), *key)], self.bk)

    def reshape(self, *shape: int) -> Share:
        return Share(self.v.reshape(self.v.shape[0], *shape), self.bk)

    def swap(self, a: int, b: int) -> Share:
        """Exchange two axes of the value."""
        return Share(np.swapaxes(self.v, a + 1, b + 1), self.bk)

    def sum(self, axis: int) -> Share:
        axis = axis + 1 if axis >= 0 else axis
        return Share(self.v.sum(axis=axis, dtype=np.uint64), self.bk)

    def repeat(self, count: int, axis: int) -> Share:
        axis = axis + 1 if axis >= 0 else axis
        return Share(np.repeat(self.v, count, axis=axis), self.bk)

    def broadcast(self, *shape: int) -> Share:
        v = self.v.reshape(self.v.shape[0], *([1] * (len(shape) - len(self.shape))), *self.shape)
        return Share(np.broadcast_to(v, (self.v.shape[0], *shape)), self.bk)

    def flat(self) -> Share:
        return self.reshape(-1)


def concat(shares: Sequence[Share], axis: int = 0) -> Share:
    """Join along an axis of the value."""
    if len(shares) == 1:
        return shares[0]
    axis = axis + 1 if axis >= 0 else axis
    return Share(np.concatenate([s.v for s in shares], axis=axis), shares[0].bk)


class Bits(Share):
    """An array of 64-lane words of secret bits, shared over GF(2)."""

    __slots__ = ()

    def __xor__(self, o: Bits | Ring) -> Bits:
        if isinstance(o, Bits):
            return Bits(self.v ^ o.v, self.bk)
        return Bits(self.bk.xor_public(self.v, o), self.bk)

    def __and__(self, public: Ring) -> Bits:
        return Bits(self.v & public, self.bk)

    def __invert__(self) -> Bits:
        return self ^ _ONES

    def __getitem__(self, key: Any) -> Bits:
        return Bits(Share.__getitem__(self, key).v, self.bk)


@dataclass(frozen=True, slots=True, eq=False)
class Wire:
    """x = delta - mask: `delta` is public to all parties, `mask` is preprocessed and used for this wire
    only.
    """

    delta: Ring
    mask: Share
