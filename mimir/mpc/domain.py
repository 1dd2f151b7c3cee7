"""The ring Z_2^64 and fixed-point numbers in it.

A real x at scale s is the integer round(x * 2^s) in two's complement modulo 2^64. Arrays are uint64 and
C-contiguous; numpy's uint64 arithmetic is arithmetic of the ring.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mimir.errors import LocalError

Ring = npt.NDArray[np.uint64]
U64 = np.uint64
RING_BITS = 64
HALF_BITS = 32  # of the words of weight matrices that are shared modulo 2^32
# A value z must satisfy |z| < 2^TRUNCATION_BITS before its scale is dropped (ops.truncate has exceptions).
TRUNCATION_BITS = 61


def encode(x: Any, scale: int) -> Ring:
    """Nearest integer to x * 2^scale, modulo 2^64. Refuses what does not fit into 63 bits."""
    scaled = np.rint(np.asarray(x, dtype=np.float64) * float(2**scale))
    if not np.all(np.abs(scaled) < 2.0**62):
        raise LocalError("a constant does not fit the ring at this scale")
    return np.ascontiguousarray(scaled.astype(np.int64).view(np.uint64))


def decode(x: Ring, scale: int) -> npt.NDArray[np.float64]:
    """The real that the ring element stands for at this scale."""
    return np.asarray(x).astype(np.uint64).view(np.int64).astype(np.float64) / float(2**scale)


def constant(value: int) -> np.uint64:
    """A Python integer, of either sign, as one ring element."""
    return np.uint64(value & (2**64 - 1))


def words(lanes: int) -> int:
    """How many 64-bit words hold this many bit lanes."""
    return (lanes + 63) // 64
