"""A component of a weight matrix that need not be in memory: an array, or rows made anew whenever it is used.

What is not kept lies on disk, or is a key stream of a seed. Either comes as blocks of rows in one scratch
buffer of about SCRATCH bytes (more where so few rows are wider, or threads share them), so a matrix of any
height is used in so much memory, and results are those of an array, bit for bit. Which blocks, and when,
depends on the shape and the number of threads alone.
Buffers are wiped at the end of a pass and wait for the next: to map new pages costs more than to fill them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mimir import kernels
from mimir.errors import LocalError
from mimir.secret import Pages, ShareSeed

Ring: TypeAlias = npt.NDArray[np.uint64]
Words: TypeAlias = npt.NDArray[Any]  # of 64 bits, or of 32 where a matrix is shared modulo 2^32

SCRATCH: Final = 1 << 20  # bytes; larger blocks leave the cache, smaller ones pay more for each call
SHARED: Final = (
    4  # times as much for threads, of which each has a cache, or a call would be too short for them
)
# Each block reads and writes the whole result once: in blocks of 4 rows of 32,000 words a product of 32 rows
# takes twice as long as in blocks of 16.
LEAST_ROWS: Final = 16
FULL: Final = np.dtype(np.uint64)


class Rows(Protocol):
    """A matrix (k, n), or a vector (n,) as one row, that is made anew for each pass."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # of 64 bits, or of 32

    def blocks(self) -> Iterator[tuple[int, Words]]:
        """All rows in order: the first one's index, and (rows, n), good until the next is asked for.

        The buffer is wiped when the pass ends, at the last row or before. Raises what the source raises.
        """


Matrix: TypeAlias = Words | Rows

_spare: dict[bool, list[Pages]] = {False: [], True: []}  # by whether they are locked: zero, in nobody's use


class KeyStream:
    """A component that is the key stream of a seed."""

    __slots__ = ("_locked", "_seed", "_stream", "dtype", "shape")

    def __init__(
        self,
        seed: ShareSeed,
        stream: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any] = FULL,
        *,
        lock: bool = False,
    ) -> None:
        """`lock` keeps the scratch buffer out of swap."""
        self.shape = shape
        self.dtype = dtype
        self._seed = seed
        self._stream = stream
        self._locked = lock

    def blocks(self) -> Iterator[tuple[int, Words]]:
        width = self.shape[-1]
        words = kernels.BLOCK_BYTES // self.dtype.itemsize  # at whose multiples a block of rows must begin
        # Where rows are of odd width, not every one ends with a block of the key stream.
        step = _rows_at_once(width, self.dtype, words // math.gcd(width, words))
        for first, rows, _ in _scratch(self.shape, self.dtype, step, self._locked):
            with self._seed.reveal_to_kernel() as key:
                kernels.prg(key, self._stream, rows, first * width // words)
            yield first, rows

    def __repr__(self) -> str:
        return f"<KeyStream {self.shape}>"


class Stored:
    """A component that is read from somewhere, in pieces of any length that are its bytes in C order."""

    __slots__ = ("_locked", "_pieces", "dtype", "shape")

    def __init__(
        self,
        pieces: Callable[[], Iterator[memoryview]],
        shape: tuple[int, ...],
        dtype: np.dtype[Any] = FULL,
        *,
        lock: bool = False,
    ) -> None:
        """Each pass calls `pieces`; a piece need only be good until the next is asked for."""
        self.shape = shape
        self.dtype = dtype
        self._pieces = pieces
        self._locked = lock

    def blocks(self) -> Iterator[tuple[int, Words]]:
        pieces, piece = self._pieces(), memoryview(b"")
        step = _rows_at_once(self.shape[-1], self.dtype, 1)
        for first, rows, room in _scratch(self.shape, self.dtype, step, self._locked):
            at, need = 0, rows.nbytes
            while at < need:
                if not piece and not (piece := next(pieces, memoryview(b""))):
                    raise LocalError(f"a stored component is shorter than its shape {self.shape}")
                taken = min(len(piece), need - at)
                room[at : at + taken] = piece[:taken]
                piece, at = piece[taken:], at + taken
            yield first, rows
        for _ in pieces:  # to its end, where it tidies up
            pass

    def __repr__(self) -> str:
        return f"<Stored {self.shape}>"


def _rows_at_once(width: int, dtype: np.dtype[Any], unit: int) -> int:
    """A multiple of `unit`."""
    rows = max(LEAST_ROWS, SCRATCH // (dtype.itemsize * width)) * min(kernels.threads(), SHARED)
    return -(-rows // unit) * unit


def _scratch(
    shape: tuple[int, ...], dtype: np.dtype[Any], step: int, lock: bool
) -> Iterator[tuple[int, Words, memoryview]]:
    """For each block its first row, and room for its rows, as words and as bytes: always the same room."""
    width = shape[-1]
    height = math.prod(shape[:-1])
    count = min(step, height) * width
    pages = _buffer(count * dtype.itemsize, lock)
    words = np.frombuffer(pages, dtype, count).reshape(-1, width)
    try:
        for first in range(0, height, step):
            rows = words[: min(step, height - first)]
            yield first, rows, memoryview(pages)[: rows.nbytes]
    finally:
        kernels.wipe(words)
        _spare[lock].append(pages)


def _buffer(size: int, lock: bool) -> Pages:
    """One that a pass left, or a new one. Those too small are given up, so there are never more of them than
    passes were under way at once, and in the end all are of the largest size.
    """
    while True:
        try:
            pages = _spare[lock].pop()  # of several threads one gets it
        except IndexError:
            return Pages(size, lock=lock)
        if len(pages) >= size:
            return pages


def product(x: Words, w: Matrix, out: Words, *, add: bool = False) -> Words:
    """x (m, k) times w (k, n), written or added to `out` (m, n), which is returned; all of one type."""
    times = kernels.matmul if w.dtype == FULL else kernels.matmul32
    if isinstance(w, np.ndarray):
        return times(x, w, out=out, add=add)
    for first, rows in w.blocks():
        part = np.ascontiguousarray(x[:, first : first + len(rows)])
        times(part, rows, out=out, add=add or first > 0)
    return out


def combine(w: Matrix, r: Ring, out: Ring) -> None:
    """out = sum_j w[i, j] r_j over GR(2^64, 48): w (k, n), r (n,) with coordinates 0 and 1, out (k, 48).

    Words of 32 bits are taken as numbers below 2^32: of what is stated of them only products with multiples
    of 2^32 count.
    """
    combined = kernels.gr_combine if w.dtype == FULL else kernels.gr_combine32
    for first, rows in ((0, np.ascontiguousarray(w)),) if isinstance(w, np.ndarray) else w.blocks():
        combined(rows, r, out=out[first : first + len(rows)])


def array(w: Matrix) -> Words:
    """All of w in memory: for what is small."""
    if isinstance(w, np.ndarray):
        return w
    out = np.empty(w.shape, w.dtype)
    flat = out.reshape(-1, w.shape[-1])
    for first, rows in w.blocks():
        flat[first : first + len(rows)] = rows
    return out
