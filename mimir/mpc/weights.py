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
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mimir import kernels
from mimir.errors import LocalError
from mimir.secret import Pages, ShareSeed

Ring: TypeAlias = npt.NDArray[np.uint64]

SCRATCH: Final = 1 << 20  # bytes; larger blocks leave the cache, smaller ones pay more for each call
SHARED: Final = (
    4  # times as much for threads, of which each has a cache, or a call would be too short for them
)
# Each block reads and writes the whole result once: in blocks of 4 rows of 32,000 words a product of 32 rows
# takes twice as long as in blocks of 16.
LEAST_ROWS: Final = 16
WORD: Final = 8
STREAM_WORDS: Final = kernels.BLOCK_BYTES // WORD  # at whose multiples a block of rows must begin


class Rows(Protocol):
    """A matrix (k, n), or a vector (n,) as one row, that is made anew for each pass."""

    shape: tuple[int, ...]

    def blocks(self) -> Iterator[tuple[int, Ring]]:
        """All rows in order: the first one's index, and (rows, n), good until the next is asked for.

        The buffer is wiped when the pass ends, at the last row or before. Raises what the source raises.
        """


Matrix: TypeAlias = Ring | Rows

_spare: dict[bool, list[Pages]] = {False: [], True: []}  # by whether they are locked: zero, in nobody's use


class KeyStream:
    """A component that is the key stream of a seed."""

    __slots__ = ("_locked", "_seed", "_stream", "shape")

    def __init__(self, seed: ShareSeed, stream: int, shape: tuple[int, ...], *, lock: bool = False) -> None:
        """`lock` keeps the scratch buffer out of swap."""
        self.shape = shape
        self._seed = seed
        self._stream = stream
        self._locked = lock

    def blocks(self) -> Iterator[tuple[int, Ring]]:
        width = self.shape[-1]
        # Where rows are of odd width, every other one ends with a block of the key stream.
        step = _rows_at_once(width, STREAM_WORDS // math.gcd(width, STREAM_WORDS))
        for first, rows, _ in _scratch(self.shape, step, self._locked):
            with self._seed.reveal_to_kernel() as key:
                kernels.prg(key, self._stream, rows, first * width // STREAM_WORDS)
            yield first, rows

    def __repr__(self) -> str:
        return f"<KeyStream {self.shape}>"


class Stored:
    """A component that is read from somewhere, in pieces of any length that are its bytes in C order."""

    __slots__ = ("_locked", "_pieces", "shape")

    def __init__(
        self, pieces: Callable[[], Iterator[memoryview]], shape: tuple[int, ...], *, lock: bool = False
    ) -> None:
        """Each pass calls `pieces`; a piece need only be good until the next is asked for."""
        self.shape = shape
        self._pieces = pieces
        self._locked = lock

    def blocks(self) -> Iterator[tuple[int, Ring]]:
        pieces, piece = self._pieces(), memoryview(b"")
        for first, rows, room in _scratch(self.shape, _rows_at_once(self.shape[-1], 1), self._locked):
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


def _rows_at_once(width: int, unit: int) -> int:
    """A multiple of `unit`."""
    rows = max(LEAST_ROWS, SCRATCH // (WORD * width)) * min(kernels.threads(), SHARED)
    return -(-rows // unit) * unit


def _scratch(shape: tuple[int, ...], step: int, lock: bool) -> Iterator[tuple[int, Ring, memoryview]]:
    """For each block its first row, and room for its rows, as words and as bytes: always the same room."""
    width = shape[-1]
    height = math.prod(shape[:-1])
    count = min(step, height) * width
    pages = _buffer(count * WORD, lock)
    words = np.frombuffer(pages, "<u8", count).reshape(-1, width)
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


def product(x: Ring, w: Matrix, out: Ring, *, add: bool = False) -> Ring:
    """x (m, k) times w (k, n), written or added to `out` (m, n), which is returned."""
    if isinstance(w, np.ndarray):
        return kernels.matmul(x, w, out=out, add=add)
    for first, rows in w.blocks():
        part = np.ascontiguousarray(x[:, first : first + len(rows)])
        kernels.matmul(part, rows, out=out, add=add or first > 0)
    return out


def combine(w: Matrix, r: Ring, out: Ring) -> None:
    """out = sum_j w[i, j] r_j over GR(2^64, 48): w (k, n), r (n,) with coordinates 0 and 1, out (k, 48)."""
    if isinstance(w, np.ndarray):
        kernels.gr_combine(np.ascontiguousarray(w), r, out=out)
        return
    for first, rows in w.blocks():
        kernels.gr_combine(rows, r, out=out[first : first + len(rows)])


def array(w: Matrix) -> Ring:
    """All of w in memory: for what is small."""
    if isinstance(w, np.ndarray):
        return w
    out = np.empty(w.shape, np.uint64)
    flat = out.reshape(-1, w.shape[-1])
    for first, rows in w.blocks():
        flat[first : first + len(rows)] = rows
    return out
