"""Verifying the preprocessing ("sacrifice"): relations, coins, one inner product, recursive halving.

Everything a batch contains is stated as *relations* over shares. After the whole batch is fixed the parties
toss a coin, and random linear combinations turn all relations of a batch into one claim <a, w> = c over each
of three extensions: GR(2^64, 48) for ring elements, GR(2^8, 48) for one-hots of bytes, GF(2^64) for bits.

Products of ring elements and AND gates, by far the most, and sums of squares are folded up to 64 to 1 before
they become elements of the extension, 48 or 64 times larger (`_Folding`); vectors times matrices are folded
8 to 1 when half of them have (`_Vectors`). What remains is halved (Boyle et al., CCS 2019) with two extension
elements and two rounds per level, the three side by side; the last few entries are opened under a random
mask.

Coefficients are drawn from the 2^48 elements of GR(2^64, 48) with coordinates 0 and 1. The difference of two
such elements is a unit, so an error, even one in the top bit alone, survives a combination with probability
at most 2^-48; a plain 64-bit coefficient would miss a top-bit error half of the time. One batch errs with
probability at most (2 + 12 + 2 LEVELS + 1) / 2^48 < 2^-41, and a cheater has one try: a failed check ends the
session.

An error that a cheater adds to a product shows up as a residue of the claim that depends on the error and the
coins only, so a failing check says nothing about the secrets (see DESIGN.md for one-hots).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from mimir import kernels
from mimir.errors import LocalError
from mimir.mpc.domain import RING_BITS, Ring, words
from mimir.mpc.doors import Doors
from mimir.mpc.offload import offload, spread
from mimir.mpc.weights import Matrix, combine

DEGREE: Final = 48
_LOW48: Final = np.uint64((1 << DEGREE) - 1)
OPEN_BELOW: Final = 32  # entries at which halving stops and the masked opening takes over
# From so many products, or words of gates, on: so many become one.
FOLD_ROWS: Final = ((1 << 19, 64), (1 << 16, 32), (1 << 12, 16), (0, 8))
AT_ONCE: Final = 1 << 17  # products or words of gates crossed at once (memory: 32 B each)
CLAIMED: Final = 1 << 15  # and turned into claims, which are 48 times as large, at once
ENTRIES: Final = kernels.MAX_ENTRIES  # of a one-hot in a row of its claims
STACKED: Final = 1 << 11  # rows of a stack of matrices that become claims at once
APART: Final = 64  # columns from which on products are folded where they lie
VECTOR_FOLDS: Final = 3  # vectors times matrices: so often halved before their words become elements
VECTOR_COLUMNS: Final = 32  # of these at once: 200 kB of elements
NARROW: Final = 24  # a row of so many products is checked one by one
WORK: Final = 64  # multiplications to fold one product, about
GROUPS: Final = 64  # of elements modulo 2^8 at once: 200 kB of each vector
LEAST_BLOCK: Final = 8  # rows of a claim that are this part of a block, or more, are one by themselves
WHOLE: Final = 1 << 30  # making claims always goes to a thread
LEVELS: Final = 28  # halvings of a recursion at most


class Draw:
    """Public coefficients expanded from one tossed coin."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._stream = 0

    def field(self, n: int) -> Ring:
        """n elements of GF(2^64)."""
        out = np.empty(n, np.uint64)
        self._stream += 1
        kernels.prg(self._seed, self._stream, out)
        return out

    def exceptional(self, n: int) -> Ring:
        """n elements of GR(2^64, 48) with coordinates 0 and 1, packed in the low 48 bits."""
        return self.field(n) & _LOW48


Pair = tuple[Ring, Ring]  # the two components of a share, each its own array, so that folding copies nothing
Sparse = tuple[Ring | None, Ring | None]  # the same of values (n,); None for a component that is zero
Factor = tuple["Values | None", "Values | None"]  # the same, of what may have to be computed first
Terms = list[tuple[Sparse, Sparse]]
_Groups = npt.NDArray[np.uint8]


class Values(Protocol):
    """Values (n,): an array, or what gives any part of one anew, so that less waits for the check."""

    def __getitem__(self, span: slice, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class BitValues:
    """Packed bits as `size` ring elements, times 2^up."""

    packed: Ring
    size: int
    up: int = 0

    def __getitem__(self, span: slice, /) -> Ring:
        first, end, _ = span.indices(self.size)
        low = first // RING_BITS
        found = kernels.bits_to_ring(self.packed[low : words(end)], end - RING_BITS * low)
        return found[first - RING_BITS * low :] << np.uint64(self.up)


@dataclass(frozen=True, slots=True, eq=False)
class Xored:
    """bits - 2 products, or -2 products, modulo 2^(64 - up), for products that are shifted up."""

    bits: BitValues | None
    products: Ring
    up: int = 0

    def __getitem__(self, span: slice, /) -> Ring:
        twice = self.products[span] >> np.uint64(self.up)
        twice += twice
        return (np.zeros(1, np.uint64) if self.bits is None else self.bits[span]) - twice


@dataclass(frozen=True, slots=True, eq=False)
class Negative:
    values: Ring

    def __getitem__(self, span: slice, /) -> Ring:
        return np.zeros(1, np.uint64) - self.values[span]


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Part of <a, w> = c: rows (n, 48) of both components, None for one that is zero, and c (2, 48), unless
    other rows bring it.
    """

    rows: int
    a: Sparse
    w: Sparse
    c: Ring | None = None


class Relation(Protocol):
    def claims(self, draw: Draw) -> Iterator[Claim]: ...


def _each(f: Callable[[Ring], Ring], v: Ring | Pair) -> Pair:
    return f(np.ascontiguousarray(v[0])), f(np.ascontiguousarray(v[1]))


def _scaled(x: Ring, r: Ring) -> Pair:
    return _each(lambda v: kernels.gr_scale01(v, r), x)


def _summed(x: Ring, r: Ring) -> Pair:
    """Sum over the last axis of (2, m, n) with coefficients r: (m, 48)."""
    return _each(lambda v: kernels.gr_combine(v, r), x)


def _total(x: Ring, r: Ring) -> Ring:
    """Sum of (2, n) with coefficients r: (2, 48)."""
    return np.stack(_each(lambda v: kernels.gr_combine(v.reshape(1, -1), r)[0], x))


def _mixed(x: Pair, r: Ring) -> Pair:
    """Rows (n, 48) times coefficients r."""
    return _each(lambda v: kernels.gr_mul01(v, r), x)


def _column_sum(x: Pair) -> Ring:
    return np.stack([v.sum(axis=0, dtype=np.uint64) for v in x])


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """x * y = z, element by element, each (2, n). With y = z = x: x is 0 or 1."""

    x: Ring
    y: Ring
    z: Ring


@dataclass(frozen=True, slots=True, eq=False)
class Dot:
    """sum_t x_t y_t = z, element by element: tuples x and y of as many terms, z (2, n).

    For factors of which some components are zero by their nature, as where a value is one component. These
    are None, and nothing is computed for them; x, which gets the coefficients, had better be the emptier one.
    How many terms there are, and n, is the same at all parties; which components are None is not.
    """

    x: tuple[Factor, ...]
    y: tuple[Factor, ...]
    z: Ring


@dataclass(frozen=True, slots=True, eq=False)
class Complex:
    """(a + i b) (p + i q) = u + i v, element by element: x = (a, b), with -b beside it, y = (p, q) and
    z = (u, v). What is None in a is so in b.

    Two sums of products of the same factors: each of these is blended once, and there are half as many rows
    as for two `Dot`s. With coefficients beta and gamma of their columns, beta (a p - b q) + gamma (a q + b p)
    is p (beta a + gamma b) + q (gamma a - beta b).
    """

    x: tuple[Factor, Factor]
    minus: Factor
    y: tuple[Factor, Factor]
    z: tuple[Ring, Ring]

    @property
    def dots(self) -> tuple[Dot, Dot]:
        (a, b), (p, q), (u, v) = self.x, self.y, self.z
        return Dot((a, self.minus), (p, q), u), Dot((a, b), (q, p), v)


@dataclass(frozen=True, slots=True, eq=False)
class ScalarProduct:
    """s_n * x_nm = z_nm: s (2, n), x and z (2, n, m). One claim a row; narrow rows are cheaper as
    products.
    """

    s: Ring
    x: Ring
    z: Ring

    def products(self) -> Product:
        return Product(np.repeat(self.s, self.x.shape[2], axis=1), self.x, self.z)

    def claims(self, draw: Draw) -> Iterator[Claim]:
        n, m = self.x.shape[1:]
        across, down = draw.exceptional(m), draw.exceptional(n)
        # sum over rows first: sum_m across_m (sum_n down_n z_nm)
        z = _mixed(_each(lambda v: kernels.gr_combine_cols(v, down), self.z), across)
        yield Claim(n, _scaled(self.s, down), _summed(self.x, across), _column_sum(z))


@dataclass(frozen=True, slots=True, eq=False)
class SquareSum:
    """sum_m x_nm^2 = q_n: x (2, n, m), q (2, n)."""

    x: Ring
    q: Ring


@dataclass(frozen=True, slots=True, eq=False)
class MatrixProduct:
    """a @ b = c for stacks: a (2, s, m, k), b two components of s matrices (k, n), c (2, s, m, n).

    Each matrix has coefficients of its own for rows and columns of c: an error in one shows whatever the
    others add to it, so their sum needs no further coefficients. Single rows (m = 1) are for `_Vectors`.
    """

    a: Ring
    b: tuple[Sequence[Matrix] | Ring, Sequence[Matrix] | Ring]
    c: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        s, m, k = self.a.shape[1:]
        rows = draw.exceptional(s * m).reshape(s, m)
        cols = draw.exceptional(s * self.c.shape[3]).reshape(s, -1)
        step = max(1, STACKED // k)
        for at in range(0, s, step):
            some = slice(at, min(at + step, s))
            w = np.empty((2, some.stop - at, k, DEGREE), np.uint64)
            for i, j in itertools.product(range(2), range(some.stop - at)):
                combine(self.b[i][at + j], cols[at + j], w[i, j])
            a, c = self._others(some, rows[some], cols[some])
            yield Claim(len(a[0]), a, (w[0].reshape(-1, DEGREE), w[1].reshape(-1, DEGREE)), c)

    def _others(self, some: slice, rows: Ring, cols: Ring) -> tuple[Pair, Ring]:
        """For some of the matrices, what their combined columns are multiplied by, and what that gives."""
        a, c = self.a[:, some], self.c[:, some]
        factors, sums = [], []
        for j, r in enumerate(rows):
            factors.append(_each(partial(kernels.gr_combine_cols, r=r), a[:, j]))
            sums.append(_mixed(_summed(c[:, j], cols[j]), r))
        return _joined(factors), _column_sum(_joined(sums))


@dataclass(frozen=True, slots=True, eq=False)
class OneHot:
    """Row n of e (2, n, K) is 1 at the index whose bits are b (2, k, n), and 0 elsewhere, given that the
    caller also checks the sum of each row; with a shift, modulo 2^(64 - shift). So b are bits.

    With j_t the bits of j, zeros from log2 K on, (b_t - j_t) e_j = 0 for all t and j: where e_j is odd, and
    by the sum one is, b is j, and then in every other place some b_t - j_t is 1 or -1. In the extension,
    where elements b and j have these bits as coordinates, that is (b - j) e_j = 0; with random q, one claim a
    row: b <q, e> = sum_j j q_j e_j.
    """

    e: npt.NDArray[Any]
    b: Ring
    shift: int = 0

    def _coefficients(self, draw: Draw) -> tuple[Ring, Ring, Ring]:
        """Of entries, of rows; and of entries times their number, general elements (K, 48)."""
        n, size = self.e.shape[1:]
        q, down = draw.exceptional(size), draw.exceptional(n)
        j = np.arange(size, dtype=np.uint64)
        return q, down, kernels.gr_mul01(kernels.gr_scale01(np.ones(size, np.uint64), q), j)

    def claims(self, draw: Draw) -> Iterator[Claim]:
        n, size = self.e.shape[1:]
        q, down, jq = self._coefficients(draw)
        shift = np.uint64(self.shift)  # of one factor: high b e depends on the low bits of both alone
        columns, done = np.zeros((2, size, DEGREE), np.uint64), 0

        def made(rows: slice) -> tuple[Ring, Ring, Ring]:
            a, w = np.empty((2, 2, rows.stop - rows.start, DEGREE), np.uint64)
            some = np.empty_like(columns)
            for i in range(2):
                b = np.ascontiguousarray(self.b[i, :, rows]) << shift
                kernels.gr_hot(a[i], w[i], some[i], self.e[i, rows], b, q, down[rows])
            return a, w, some

        parts = (slice(at, min(at + RING.block, n)) for at in range(0, n, RING.block))
        for a, w, some in spread(partial(made, rows) for rows in parts):
            columns += some
            done += a.shape[1]
            told = np.stack([kernels.gr_inner(v, jq) for v in columns]) << shift if done == n else None
            yield Claim(a.shape[1], (a[0], a[1]), (w[0], w[1]), told)

    def fill(self, out: _Groups, draw: Draw) -> Ring:
        """The same of bytes, modulo 2^8: a and w, both components, as groups (2, 2, n, 48, GROUP); gives c,
        of which the lowest byte counts.
        """
        if self.shift != RING_BITS - 8:
            raise LocalError("one-hots of bytes count modulo 2^8")
        size = self.e.shape[2]
        q, down, jq = self._coefficients(draw)
        columns = np.zeros((2, DEGREE, size), np.uint8)

        def made(at: int) -> npt.NDArray[np.uint8]:
            some = np.empty_like(columns)
            rows, span = slice(at * kernels.GROUP, (at + GROUPS) * kernels.GROUP), slice(at, at + GROUPS)
            for i in range(2):
                b = np.ascontiguousarray(self.b[i, :, rows])
                kernels.gr8_hot(self.e[i, rows], b, q, down[rows], out[0, i, span], out[1, i, span], some[i])
            return some

        for some in spread(partial(made, at) for at in range(0, out.shape[2], GROUPS)):
            columns += some
        return np.stack([kernels.gr_inner(np.ascontiguousarray(v.T).astype(np.uint64), jq) for v in columns])


@dataclass(frozen=True, slots=True, eq=False)
class OneHotPlanes:
    """The same over GF(2), lane by lane: planes e (2, K, w) are 1 where the bits b (2, k, w) say, and 0
    elsewhere, given that the caller also checks the sum of the planes. One claim a lane, whatever K is.
    """

    e: Ring
    b: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        size, n = self.e.shape[1:]
        q, down = draw.field(size), draw.field(RING_BITS * n)
        jq = kernels.gf_mul(q, np.arange(size, dtype=np.uint64))
        columns, done = np.zeros((2, size), np.uint64), 0

        def made(words: slice) -> tuple[Pair, Pair, Ring]:
            lanes = RING_BITS * (words.stop - words.start)
            mine = down[RING_BITS * words.start : RING_BITS * words.stop]
            planes = kernels.bit_slice(mine, RING_BITS)
            a = _each(
                lambda b: kernels.gf_mul(kernels.bit_unslice(np.ascontiguousarray(b[:, words]), lanes), mine),
                self.b,
            )
            w, some = np.zeros((2, lanes), np.uint64), np.empty_like(columns)
            for i, at in itertools.product(range(2), range(0, size, kernels.MAX_ROWS)):
                rows = slice(at, at + kernels.MAX_ROWS)
                x = np.ascontiguousarray(self.e[i, rows, words].T)
                w[i] ^= kernels.gf_blend(x, q[rows])
                some[i, rows] = kernels.gf_combine(x, planes)
            return a, (w[0], w[1]), some

        step = BITS.block // RING_BITS
        for a, w, some in spread(partial(made, slice(at, min(at + step, n))) for at in range(0, n, step)):
            columns ^= some
            done += len(a[0])
            last = done == RING_BITS * n
            told = np.array([kernels.gf_inner(v, jq) for v in columns], np.uint64) if last else None
            yield Claim(len(a[0]), a, w, told)


@dataclass(frozen=True, slots=True, eq=False)
class And:
    """x & y = z for words of bits, each (2, w)."""

    x: Ring
    y: Ring
    z: Ring


class _Galois:
    """Arithmetic over GR(2^64, 48); an element is 48 words."""

    shape: tuple[int, ...] = (DEGREE,)
    block = 512  # rows at once: what is halved and folded by so many still lies in a cache
    lanes = 1  # elements of a claim for a column
    work = DEGREE * DEGREE  # multiplications of one product
    unit = np.eye(1, DEGREE, dtype=np.uint64)

    def challenge(self, draw: Draw) -> int:
        return int(draw.exceptional(1)[0])

    def inner(self, a: Ring, b: Ring) -> Ring:
        return kernels.gr_inner(a, b)

    def times(self, a: Ring, xi: int) -> Ring:
        flat = np.ascontiguousarray(a).reshape(-1, DEGREE)
        return kernels.gr_mul01(flat, np.full(len(flat), xi, np.uint64)).reshape(a.shape)

    def add(self, a: Ring, b: Ring) -> Ring:
        return a + b

    def sub(self, a: Ring, b: Ring) -> Ring:
        return a - b

    def sum(self, a: Ring) -> Ring:
        return a.sum(axis=0, dtype=np.uint64)

    def halves(self, block: _Block) -> Ring:
        return kernels.gr_halves(block.parts, block.rows)

    def folded(self, blocks: Sequence[_Block], xi: int, rows: int) -> tuple[_Block, Ring]:
        """In the memory of the larger one, whose rows come first."""
        first, *others = sorted(blocks, key=lambda block: -block.rows)
        second = others[0] if others else _Block(0, (None, None), (None, None))
        kept = list(first.parts)
        for k, v in enumerate(second.parts):
            if v is not None and kept[k] is None:
                kept[k] = np.zeros((first.rows, *self.shape), np.uint64)
        halves = kernels.gr_fold_block(kept, first.rows, second.parts, second.rows, xi)
        a0, a1, w0, w1 = (v if v is None else v[:rows] for v in kept)
        return _Block(rows, (a0, a1), (w0, w1)), halves

    # folding: blocks of ring words (n, rows), coefficients of columns as 01 elements (n,)

    def coefficients(self, draw: Draw, columns: int) -> Ring:
        return draw.exceptional(columns)

    def cross(self, x: Sequence[Ring], y: Sequence[Ring], coefficients: Ring) -> Ring:
        return kernels.gr_cross(x, y, coefficients)

    def combine(self, z: Ring, coefficients: Ring) -> Ring:
        return kernels.gr_combine_cols(z, coefficients)

    def blend(self, x: Ring, weights: Ring) -> Ring:
        return kernels.matmul(x, weights)

    def mix(self, x: Ring, coefficients: Ring) -> Ring:
        return kernels.gr_mul01(x, coefficients)


class _Binary:
    """Arithmetic over GF(2^64); an element is one word."""

    shape: tuple[int, ...] = ()
    block = 1 << 14
    lanes = RING_BITS
    work = 8
    unit = np.ones(1, np.uint64)

    def challenge(self, draw: Draw) -> int:
        return int(draw.field(1)[0])

    def inner(self, a: Ring, b: Ring) -> Ring:
        return np.array(kernels.gf_inner(a, b), np.uint64)

    def times(self, a: Ring, xi: int) -> Ring:
        return kernels.gf_scale(np.ascontiguousarray(a).reshape(-1), xi).reshape(a.shape)

    def add(self, a: Ring, b: Ring) -> Ring:
        return a ^ b

    sub = add

    def sum(self, a: Ring) -> Ring:
        return np.bitwise_xor.reduce(a, axis=0)

    def halves(self, block: _Block) -> Ring:
        half = block.rows // 2
        a0, a1, w0, w1 = ((v[:half], v[half:] ^ v[:half]) for v in block.parts if v is not None)  # as all are
        return np.stack([_summand(self, (a0[i], a1[i]), (w0[i], w1[i])) for i in range(2)])

    def folded(self, blocks: Sequence[_Block], xi: int, rows: int) -> tuple[_Block, Ring]:
        made = []
        for parts in zip(*(block.parts for block in blocks), strict=True):
            out, at = np.zeros(rows, np.uint64), 0
            for v in parts:
                if v is not None:
                    kernels.gf_fold(v, xi, out=out[at : at + len(v) // 2])
                    at += len(v) // 2
            made.append(out)
        block = _Block(rows, (made[0], made[1]), (made[2], made[3]))
        return block, np.zeros(2, np.uint64) if rows % 2 else self.halves(block)

    # folding: blocks of words of bits (n, rows), coefficients of the 64 lanes of columns as planes (64, n)

    def coefficients(self, draw: Draw, columns: int) -> Ring:
        return kernels.bit_slice(draw.field(RING_BITS * columns), RING_BITS)

    def cross(self, x: Sequence[Ring], y: Sequence[Ring], coefficients: Ring) -> Ring:
        return kernels.gf_cross(x, y, coefficients)

    def combine(self, z: Ring, coefficients: Ring) -> Ring:
        return kernels.gf_combine(z, coefficients)

    def blend(self, x: Ring, weights: Ring) -> Ring:
        return kernels.gf_blend(x, weights)

    def mix(self, x: Ring, coefficients: Ring) -> Ring:
        return kernels.gf_mul(x, kernels.bit_unslice(coefficients, len(x)))


class _Packed:
    """Addition modulo 2^8 of bytes, eight to a word."""

    def add(self, a: Ring, b: Ring) -> Ring:
        return (a.view(np.uint8) + b.view(np.uint8)).view(np.uint64)

    def sub(self, a: Ring, b: Ring) -> Ring:
        return (a.view(np.uint8) - b.view(np.uint8)).view(np.uint64)


Extension = _Galois | _Binary
Shared = Extension | _Packed
RING: Final = _Galois()
BITS: Final = _Binary()
BYTES: Final = _Packed()


def _summand(ext: Extension, x: Pair, y: Pair) -> Ring:
    """A party's part of <x, y>: x_i y_i + x_{i+1} y_i + x_i y_{i+1}, not masked yet."""
    return ext.add(ext.inner(ext.add(x[0], x[1]), y[0]), ext.inner(x[0], y[1]))


def _dots(whole: Dot | Complex) -> Sequence[Dot]:
    return whole.dots if isinstance(whole, Complex) else (whole,)


def _given(f: Callable[[Any], Ring], v: Factor) -> Sparse:
    return None if v[0] is None else f(v[0]), None if v[1] is None else f(v[1])


def _plus(a: Ring | None, b: Ring | None) -> Ring | None:
    return b if a is None else a if b is None else a + b


def _factors(terms: Terms) -> list[Pair]:
    """Pairs of words of which the products add up to this party's part of the sum of all terms."""
    out: list[Pair] = []
    for (x0, x1), (y0, y1) in terms:
        one, other = (
            [(a, b) for a, b in way if a is not None and b is not None]
            for way in (((x0, _plus(y0, y1)), (x1, y0)), ((_plus(x0, x1), y0), (x0, y1)))
        )
        out += one if len(one) <= len(other) else other
    return out


def _point(ext: Extension, variables: int, draw: Draw) -> tuple[list[int], Ring, Ring, npt.NDArray[np.bool_]]:
    """A random point of a cube: its coordinates, the first variable's first; what the value there is of
    values at corners, for a multilinear function, and of values at 0, 1 and infinity of each variable, for
    one of degree 2; and which of the latter are not at corners. Indices are in base 2 and 3, the first
    variable's digit on top.
    """
    xis = []
    corners, values = ext.unit, ext.unit
    inner = np.zeros(1, bool)
    for _ in range(variables):
        xi = ext.challenge(draw)
        high = ext.times(corners, xi)
        corners = _interleaved(ext.sub(corners, high), high)
        high = ext.times(values, xi)
        values = _interleaved(ext.sub(values, high), high, ext.sub(ext.times(high, xi), high))
        inner = np.stack([inner, inner, np.ones_like(inner)], axis=1).reshape(-1)
        xis.append(xi)
    return xis, corners, values, inner


# What one job adds to a claim: columns that are done, rows of each term, terms, and sums at corners. With n
# rows of a `Complex` 2 n columns are done.
_Part = tuple[int, int, Terms, list[Ring]]


class _Folding:
    """Many products and sums of products, or words of AND gates, turned into a claim of `rows` times fewer.

    Products stand in columns of `rows`; a column's coefficient is beta_g, and row i stands at the corner of a
    cube with the binary digits of i. x and y become multilinear functions of the cube, and
    h(xi) = sum_g beta_g x_g(xi) y_g(xi) has degree 2 in each of its variables, so its values at 0, 1 and
    infinity of each variable tell it: those at the corners are combinations of the z, shared already; the
    others, 3^levels - 2^levels, are computed and shared. Coins xi then give one claim, h(xi) as stated is
    sum_g beta_g x_g(xi) y_g(xi). A wrong h survives with probability at most 2 levels / 2^48.

    A sum of products, z = sum_t x_t y_t, differs in nothing but that all its terms stand in columns of the
    same beta, whose sum h takes, and that each is a row of the claim.
    """

    def __init__(
        self, ext: Extension, parts: Sequence[Product | And], draw: Draw, dots: Sequence[Dot | Complex] = ()
    ) -> None:
        sizes = [np.asarray(p.x).size // 2 for p in parts]
        sizes += [len(d.x) * d.z.shape[1] for whole in dots for d in _dots(whole)]
        self._lay(ext, [(p.x, p.y, p.z) for p in parts], _fold_rows(sum(sizes)), dots)
        self._coefficients = ext.coefficients(draw, self.columns)

    def _lay(
        self, ext: Extension, parts: Sequence[tuple[Ring, ...]], rows: int, dots: Sequence[Dot | Complex] = ()
    ) -> None:
        """Long parts are folded where they lie; then come their ends and the short ones, put together; then
        sums of products, each in columns of its own, as zeros are not where they are in others.
        """
        self.ext, self.rows = ext, rows
        flat = [[np.asarray(v).reshape(2, -1) for v in part] for part in parts]
        sizes = [part[0].shape[1] for part in flat]
        whole = [n // rows if n >= APART * rows else 0 for n in sizes]
        self._long = [(part, n) for part, n in zip(flat, whole, strict=True) if n]
        self._short = [[v[:, n * rows :] for v in part] for part, n in zip(flat, whole, strict=True)]
        left = sum(sizes) - rows * sum(whole)
        self._first_dot = sum(whole) + -(-left // rows)
        self._dots = [(d, -(-_dots(d)[0].z.shape[1] // rows)) for d in dots]
        self.columns = self._first_dot + sum(columns * len(_dots(d)) for d, columns in self._dots)

    def _blocks(self, words: int, *which: int) -> Iterator[tuple[Ring, list[Pair]]]:
        """Coefficients, and x, y, z by number, each a pair of (n, rows), for columns of about so many words
        at a time.
        """
        step, at = max(1, words // self.rows), 0
        for part, columns in self._long:
            for lo in range(0, columns, step):
                n = min(step, columns - lo)
                span = slice(lo * self.rows, (lo + n) * self.rows)
                yield (
                    self._of(at, n),
                    [_each(lambda v: v.reshape(-1, self.rows), part[w][:, span]) for w in which],
                )
                at += n
        pieces = ([part[w] for w in which] for part in self._short if part[0].size)
        current, taken = next(pieces, None), 0
        while at < self._first_dot:
            n = min(step, self._first_dot - at)
            out = [np.zeros((2, n * self.rows), np.uint64) for _ in which]
            filled = 0
            while filled < n * self.rows and current is not None:
                take = min(n * self.rows - filled, current[0].shape[1] - taken)
                for to, v in zip(out, current, strict=True):
                    to[:, filled : filled + take] = v[:, taken : taken + take]
                filled, taken = filled + take, taken + take
                if taken == current[0].shape[1]:
                    current, taken = next(pieces, None), 0
            yield self._of(at, n), [_each(lambda v: v.reshape(-1, self.rows), v) for v in out]
            at += n

    def _dot_blocks(self) -> Iterator[tuple[Ring, Terms]]:
        """Coefficients and terms of sums of products, to be crossed: what is not None is (n, rows)."""
        at = self._first_dot
        for dot, columns in ((dot, columns) for whole, columns in self._dots for dot in _dots(whole)):
            for cut, first, n in self._cuts(columns, AT_ONCE):
                terms = [(_given(cut, x), _given(cut, y)) for x, y in zip(dot.x, dot.y, strict=True)]
                yield self._of(at + first, n), terms
            at += columns

    def _cuts(self, columns: int, words: int) -> Iterator[tuple[Callable[[Values], Ring], int, int]]:
        """Of columns of their own about so many words at a time: what cuts them out, the first, how many."""
        step = max(1, words // self.rows)
        for first in range(0, columns, step):
            n = min(step, columns - first)
            yield partial(self._columns, first=first, n=n), first, n

    def _columns(self, v: Values, first: int, n: int) -> Ring:
        """Columns of a component that stands in columns of its own, with zeros after its end: (n, rows)."""
        part: Ring = v[first * self.rows : (first + n) * self.rows]
        if len(part) < n * self.rows:
            part = np.pad(part, (0, n * self.rows - len(part)))
        return np.ascontiguousarray(part).reshape(-1, self.rows)

    def _of(self, at: int, n: int) -> Ring:
        return np.ascontiguousarray(self._coefficients[..., at : at + n])

    def cross(self) -> Ring:
        """This party's summands of the values that are not at corners: (3^levels - 2^levels, ...)."""
        out = np.zeros((kernels.crosses(self.rows), *self.ext.shape), np.uint64)
        products: Iterator[tuple[tuple[Sequence[Ring], Sequence[Ring]], Ring]] = (
            ((x, y), mine) for mine, (x, y) in self._blocks(AT_ONCE, 0, 1)
        )
        for part in spread(
            partial(self.ext.cross, *xy, mine) for xy, mine in itertools.chain(products, self._pairs())
        ):
            out = self.ext.add(out, part)
        return out

    def _pairs(self) -> Iterator[tuple[tuple[Sequence[Ring], Sequence[Ring]], Ring]]:
        """What to cross for sums of products: x0 y0 + x0 y1 + x1 y0 is two products a b + c d if
        x = (a, c) and y = (d, b - d). Where this party has no part in a sum nothing is crossed.
        """
        for mine, terms in self._dot_blocks():
            factors = _factors(terms)
            if len(factors) % 2:
                a, b = factors.pop()
                yield ((a,), (b,)), mine
            for (a, b), (c, d) in zip(factors[::2], factors[1::2], strict=True):
                yield ((a, c), (d, b - d)), mine

    def claims(self, crossed: Ring, draw: Draw) -> Iterator[Claim]:
        """The claim, for values (2, 3^levels - 2^levels, ...) and coins tossed after they were received."""
        ext = self.ext
        _, corners, values, inner = _point(ext, self.rows.bit_length() - 1, draw)
        told = [ext.inner(v, values[inner]) for v in crossed[:, : np.count_nonzero(inner)]]
        at_corners = self._stated_corners(crossed)
        left = self.columns

        def made(mine: Ring, x: Pair, y: Pair, *z: Pair) -> _Part:
            n = len(x[0])
            return n, n * ext.lanes, [claimed(mine, x, y)], [ext.combine(v, mine) for pair in z for v in pair]

        def summed(dot: Dot, cut: Callable[[Values], Ring], mine: Ring) -> _Part:
            terms = [claimed(mine, _given(cut, x), _given(cut, y)) for x, y in zip(dot.x, dot.y, strict=True)]
            return len(mine), len(mine), terms, [ext.combine(cut(v), mine) for v in dot.z]

        def turned(both: Complex, cut: Callable[[Values], Ring], beta: Ring, gamma: Ring) -> _Part:
            (a, b), (p, q) = ([_given(blended, _given(cut, v)) for v in pair] for pair in (both.x, both.y))
            x: list[Ring | None] = [None, None]
            y: list[Ring | None] = [None, None]
            for i, (c, s) in enumerate(zip(a, b, strict=True)):
                if (c is None) != (s is None):
                    raise LocalError("both parts of a complex factor must have the same components")
                if c is not None and s is not None:
                    x[i] = ext.add(ext.mix(c, beta), ext.mix(s, gamma))
                    y[i] = ext.sub(ext.mix(c, gamma), ext.mix(s, beta))
            u, v = both.z
            told = [ext.combine(cut(u[i]), beta) + ext.combine(cut(v[i]), gamma) for i in range(2)]
            n = len(beta)
            return 2 * n, n, [((x[0], x[1]), p), ((y[0], y[1]), q)], told

        def claimed(mine: Ring, x: Sparse, y: Sparse) -> tuple[Sparse, Sparse]:
            return _given(lambda v: ext.mix(blended(v), mine), x), _given(blended, y)

        def blended(v: Ring) -> Ring:
            return ext.blend(v, corners)

        def of_dots() -> Iterator[Callable[[], _Part]]:
            at = self._first_dot
            for dot, columns in self._dots:
                for cut, first, n in self._cuts(columns, CLAIMED):
                    if isinstance(dot, Dot):
                        yield partial(summed, dot, cut, self._of(at + first, n))
                    else:
                        both = self._of(at + first, n), self._of(at + columns + first, n)
                        yield partial(turned, dot, cut, *both)
                at += columns * len(_dots(dot))

        jobs: Iterator[Callable[[], _Part]] = itertools.chain(
            (partial(made, mine, *pairs) for mine, pairs in self._blocks(CLAIMED, *self.claimed)), of_dots()
        )
        for columns, rows, terms, more in spread(jobs):
            if more:
                at_corners = [ext.add(v, part) for v, part in zip(at_corners, more, strict=True)]
            left -= columns
            for a, w in terms[:-1]:
                yield Claim(rows, a, w)
            a, w = terms[-1]
            if left:
                yield Claim(rows, a, w)
                continue
            c = [ext.add(t, ext.inner(v, values[~inner])) for t, v in zip(told, at_corners, strict=True)]
            yield Claim(rows, a, w, np.stack(c))

    claimed: tuple[int, ...] = (0, 1, 2)

    def _stated_corners(self, crossed: Ring) -> list[Ring]:
        """Values at corners before what the blocks add to them."""
        return [np.zeros((self.rows, *self.ext.shape), np.uint64)] * 2


class _Squares(_Folding):
    """Sums of squares, folded in the same way.

    Here the squares themselves are stated nowhere, only their sums. So the values at corners are shared as
    well, and `residue` says that together they are the stated sums, row n with its beta_n. Whoever changes a
    sum must change a corner, and then h is not the polynomial that x gives.

    Corners that a cheater shares when it knows beta may all be wrong by one d with rows d = 0, and d may be
    what a wrong product adds to its claim. So this claim gets a coefficient of its own, tossed afterwards.
    """

    claimed = (0, 0)

    def __init__(self, parts: Sequence[SquareSum], draw: Draw) -> None:
        rows = _fold_rows(sum(p.x.size // 2 for p in parts))
        rows = min(rows, 1 << max(p.x.shape[2] - 1 for p in parts).bit_length())
        padded: list[tuple[Ring, Ring]] = []
        self._sum = np.zeros((2, DEGREE), np.uint64)
        for p in parts:
            columns = -(-p.x.shape[2] // rows)
            beta = draw.exceptional(p.x.shape[1])
            self._sum += _total(p.q, beta)
            wide = np.pad(p.x, [(0, 0), (0, 0), (0, columns * rows - p.x.shape[2])])
            padded.append((wide, np.repeat(beta, columns)))
        padded.sort(key=lambda part: part[1].size < APART)  # as they are laid
        self._lay(RING, [(x,) for x, _ in padded], rows)
        self._coefficients = np.concatenate([c for _, c in padded])

    def cross(self) -> Ring:
        """This party's summands of all values: those off the corners, then those at corners."""
        off = np.zeros((kernels.crosses(self.rows), DEGREE), np.uint64)
        corners = np.zeros((self.rows, DEGREE), np.uint64)

        def made(mine: Ring, x: Pair) -> Pair:
            squares = x[0] * (x[0] + x[1] + x[1])
            return kernels.gr_cross(x, x, mine), kernels.gr_combine_cols(squares, mine)

        for some in spread(partial(made, mine, x) for mine, (x,) in self._blocks(AT_ONCE, 0)):
            off += some[0]
            corners += some[1]
        return np.concatenate([off, corners])

    def residue(self, crossed: Ring) -> Ring:
        """A share (2, 48) that is zero if the corners add up to the stated sums."""
        return crossed[:, -self.rows :].sum(axis=1, dtype=np.uint64) - self._sum

    def _stated_corners(self, crossed: Ring) -> list[Ring]:
        return list(crossed[:, -self.rows :])

    def apart(self, draw: Draw) -> int:
        """The coefficient of this claim."""
        return self.ext.challenge(draw)

    def claims(self, crossed: Ring, draw: Draw) -> Iterator[Claim]:
        gamma, ext = self.apart(draw), self.ext
        for part in super().claims(crossed, draw):
            a = _given(lambda v: ext.times(v, gamma), part.a)
            yield Claim(part.rows, a, part.w, None if part.c is None else ext.times(part.c, gamma))


class _Vectors:
    """Vectors times matrices, as attention has them while decoding, folded 8 to 1.

    Random combinations of a matrix's columns leave <a, w> = c with elements in w, but words in a, and a word
    times an element costs a twentieth of a product of elements. So before words become elements, rows are put
    on a cube, column g and row i as in `_Folding`, and h(xi) = sum_g a_g(xi) w_g(xi). As with squares only
    sums are stated, so the values at corners are shared too, `residue` says that they add up to the sums, and
    the claim has a coefficient of its own. Every matrix has its own column coefficients.
    """

    ext, rows = RING, 1 << VECTOR_FOLDS

    def __init__(self, parts: Sequence[MatrixProduct], draw: Draw) -> None:
        stacks = [(p, p.c.shape[1], p.c.shape[3]) for p in parts]
        self._parts = [(p, draw.exceptional(s * n).reshape(s, n)) for p, s, n in stacks]
        self.columns = sum(len(r) * -(-p.a.shape[3] // self.rows) for p, r in self._parts)
        self._sum = np.zeros((2, DEGREE), np.uint64)
        self._blocks: list[tuple[Pair, Pair]] = []  # a (columns, rows) and w (rows, columns, 48)

    def cross(self) -> Ring:
        """This party's summands of h at 0, 1 and infinity of each variable: (3^folds, 48). Once."""
        pairs = np.zeros((self.rows, self.rows, DEGREE), np.uint64)  # a at one corner times w at another

        def products(a: Pair, w: Pair) -> Ring:
            some = np.zeros_like(pairs)
            for x, y in ((a[0] + a[1], w[0]), (a[0], w[1])):
                kernels.matmul(np.repeat(x.T[None], self.rows, axis=0), y, out=some, add=True)
            return some

        for some in spread(partial(products, a, w) for a, w in self._made()):
            pairs += some
        v = pairs.reshape(*[2] * (2 * VECTOR_FOLDS), DEGREE)
        for variable in range(VECTOR_FOLDS):  # (a_1 - a_0) (w_1 - w_0) is its value at infinity
            v = np.moveaxis(v, (variable, VECTOR_FOLDS), (0, 1))
            v = np.stack([v[0, 0], v[1, 1], v[1, 1] - v[0, 1] - v[1, 0] + v[0, 0]])
            v = np.moveaxis(v, 0, variable)
        return np.ascontiguousarray(v.reshape(-1, DEGREE))

    def _made(self) -> Iterator[tuple[Pair, Pair]]:
        """Columns, some at a time, which are kept; the stated sums are taken on the way."""
        for p, coefficients in self._parts:
            inner = p.a.shape[3]
            columns = -(-inner // self.rows)
            whole = columns * self.rows
            at_once = max(1, VECTOR_COLUMNS // columns)
            for first in range(0, len(coefficients), at_once):
                these = range(first, min(first + at_once, len(coefficients)))
                n = len(these) * columns
                a, w = np.empty((2, n, self.rows), np.uint64), np.empty((2, self.rows, n, DEGREE), np.uint64)
                for to, i in enumerate(these):
                    span = slice(to * columns, (to + 1) * columns)
                    vector = np.zeros((2, whole), np.uint64)
                    vector[:, :inner] = p.a[:, i, 0]
                    a[:, span] = vector.reshape(2, self.rows, -1).swapaxes(1, 2)
                    for component in range(2):
                        e = np.zeros((whole, DEGREE), np.uint64)
                        combine(p.b[component][i], coefficients[i], e[:inner])
                        w[component, :, span] = e.reshape(self.rows, columns, DEGREE)
                    self._sum += _total(p.c[:, i, 0], coefficients[i])
                self._blocks.append(((a[0], a[1]), (w[0], w[1])))
                yield self._blocks[-1]

    def residue(self, values: Ring) -> Ring:
        """A share (2, 48) that is zero if the values at corners add up to the stated sums."""
        at_corners = values.reshape(2, *[3] * VECTOR_FOLDS, DEGREE)[:, *[slice(2)] * VECTOR_FOLDS]
        return at_corners.reshape(2, -1, DEGREE).sum(axis=1, dtype=np.uint64) - self._sum

    def apart(self, draw: Draw) -> int:
        """The coefficient of this claim."""
        return self.ext.challenge(draw)

    def claims(self, values: Ring, draw: Draw) -> Iterator[Claim]:
        """The claim, for shares (2, 3^folds, 48) of the values and coins tossed after they were received."""
        gamma, ext = self.apart(draw), self.ext
        xis, corners, at, _ = _point(ext, VECTOR_FOLDS, draw)
        corners = ext.times(corners, gamma)
        told: Ring | None = np.stack([ext.times(ext.inner(v, at), gamma) for v in values])

        def made(a: Pair, w: Pair) -> tuple[Pair, Pair]:
            halved = [v.reshape(-1, DEGREE) for v in w]
            for xi in xis:
                halved = [kernels.gr_fold(v, xi) for v in halved]
            return _each(lambda v: ext.blend(v, corners), a), (halved[0], halved[1])

        for a, w in spread(partial(made, *block) for block in self._blocks):
            yield Claim(len(a[0]), a, w, told)
            told = None
        self._blocks.clear()


def _fold_rows(total: int) -> int:
    return next(rows for least, rows in FOLD_ROWS if total >= least)


def _joined(parts: Sequence[Pair]) -> Pair:
    """Rows one after another."""
    if len(parts) == 1:
        return parts[0]
    a, b = (np.concatenate([p[i] for p in parts]) for i in range(2))
    return a, b


def _interleaved(*parts: Ring) -> Ring:
    """Element by element: the first of each part, the second of each, and so on."""
    return np.ascontiguousarray(np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Rows of a claim."""

    rows: int
    a: Sparse
    w: Sparse

    @property
    def parts(self) -> tuple[Ring | None, Ring | None, Ring | None, Ring | None]:
        """The components; only claims over the ring have any that are zero."""
        return (*self.a, *self.w)

    def cut(self, start: int, stop: int) -> _Block:
        a, w = (_given(lambda v: v[start:stop], pair) for pair in (self.a, self.w))
        return _Block(stop - start, a, w)


class _Recursion:
    """<a, w> = c, halved until at most OPEN_BELOW entries are left.

    Rows stand in blocks, and the entries of a block are halved by themselves, so that a block is made or
    folded, and halved for the next level, while it lies in a cache. What a block has no component for costs
    nothing; how many rows it has depends on shapes alone, as all parties must pair the same. Claims are
    folded where they lie.
    """

    def __init__(self, ext: Extension, claims: Iterable[Claim]) -> None:
        self.ext = ext
        self.c = np.zeros((2, *ext.shape), np.uint64)
        self._halves = np.zeros((2, *ext.shape), np.uint64)
        self._blocks: list[_Block] = []
        for h in spread(partial(ext.halves, block) for block in self._laid(claims)):
            self._halves = ext.add(self._halves, h)

    def _laid(self, claims: Iterable[Claim]) -> Iterator[_Block]:
        """Lay claims out in blocks; gives those of which halves are wanted."""
        ext = self.ext
        rest: list[_Block] = []  # too few rows for a block
        least = max(ext.block // LEAST_BLOCK, 2 * OPEN_BELOW)  # the first must not look like the end
        for claim in claims:
            if claim.c is not None:
                self.c = ext.add(self.c, claim.c)
            whole = _Block(claim.rows, claim.a, claim.w)
            at = 0
            while (left := whole.rows - at) >= least:
                size = min(left - left % 2, ext.block)
                yield from self._take(whole.cut(at, at + size))
                at += size
            if left:
                rest.append(whole.cut(at, whole.rows))
            if sum(block.rows for block in rest) >= ext.block:
                joined = self._together(rest)
                yield from self._take(joined.cut(0, ext.block))
                rest = [joined.cut(ext.block, joined.rows)]
        if any(block.rows for block in rest):
            joined = self._together(rest)
            last = not self._blocks and joined.rows <= OPEN_BELOW
            yield from self._take(joined if last else self._together([joined], joined.rows % 2))

    def _together(self, blocks: Sequence[_Block], zeros: int = 0) -> _Block:
        """One block of all rows, and so many zeros after them; what has no component has zeros."""
        rows = sum(block.rows for block in blocks) + zeros
        shape = (rows, *self.ext.shape)

        def joined(parts: Sequence[tuple[int, Ring | None]]) -> Ring | None:
            if all(v is None for _, v in parts):
                return None
            out, at = np.zeros(shape, np.uint64), 0
            for count, v in parts:
                if v is not None:
                    out[at : at + count] = v
                at += count
            return out

        a0, a1, w0, w1 = (joined([(block.rows, block.parts[k]) for block in blocks]) for k in range(4))
        return _Block(rows, (a0, a1), (w0, w1))

    def _take(self, block: _Block) -> Iterator[_Block]:
        """Append a block, whose rows are even in number unless no halving follows."""
        self._blocks.append(block)
        if not self.done:
            yield block

    @property
    def length(self) -> int:
        return sum(block.rows for block in self._blocks)

    @property
    def done(self) -> bool:
        return len(self._blocks) == 1 and self._blocks[0].rows <= OPEN_BELOW

    @property
    def cost(self) -> int:
        return 2 * self.length * self.ext.work

    @property
    def over(self) -> Shared:
        """What halves are shared over."""
        return self.ext

    def halves(self) -> Ring:
        """This party's summands of h(0) and of h at infinity, for h(X) = <a_0 + X (a_1 - a_0), w_0 + ...>."""
        return self._halves

    def fold(self, told: Ring, draw: Draw) -> None:
        """Go on at a challenge tossed after `told` (2, 2, ...), the shares of h(0) and h(infinity),
        arrived.
        """
        ext = self.ext
        xi = self._challenged(told, draw)
        before, self._blocks = self._blocks, []
        before.reverse()
        last = len(before) <= 2 and sum(block.rows for block in before) <= 2 * OPEN_BELOW
        self._halves = np.zeros_like(self._halves)

        def jobs() -> Iterator[Callable[[], tuple[_Block, Ring]]]:
            while before:  # so that a block that was folded is free
                pair = [before.pop() for _ in range(min(2, len(before)))]
                rows = sum(block.rows for block in pair) // 2
                yield partial(ext.folded, pair, xi, rows if last else rows + rows % 2)

        for block, halves in spread(jobs()):
            self._blocks.append(block)
            self._halves = ext.add(self._halves, halves)

    def _challenged(self, told: Ring, draw: Draw) -> int:
        """A challenge, at which c is h from now on."""
        ext = self.ext
        xi = ext.challenge(draw)
        h0, h2 = told[:, 0], told[:, 1]
        h1 = ext.sub(self.c, h0)  # <a, w> = h(0) + h(1)
        # h(X) = h0 + (h1 - h0 - h2) X + h2 X^2
        self.c = ext.add(h0, ext.times(ext.add(ext.sub(ext.sub(h1, h0), h2), ext.times(h2, xi)), xi))
        return xi

    @property
    def a(self) -> Pair:
        return self._left(self._blocks[0].a)

    @property
    def w(self) -> Pair:
        return self._left(self._blocks[0].w)

    def _left(self, v: Sparse) -> Pair:
        nothing = np.zeros((self.length, *self.ext.shape), np.uint64)
        return nothing if v[0] is None else v[0], nothing if v[1] is None else v[1]

    def mask(self, random: Ring) -> Ring:
        """Take a random share (2, n, ...) as the mask of a; this party's summand of <mask, w>."""
        self._mask = random
        return _summand(self.ext, (random[0], random[1]), self.w)[None]

    def masked(self, draw: Draw) -> Ring:
        """t a + mask, to be opened, for a challenge t tossed after <mask, w> was shared."""
        self._t = self.ext.challenge(draw)
        return np.stack(
            [self.ext.add(self.ext.times(a, self._t), m) for a, m in zip(self.a, self._mask, strict=True)]
        )

    def residue(self, opened: Ring, product: Ring) -> Ring:
        """A share that is zero iff the claim holds."""
        at = np.stack([self.ext.inner(opened, w) for w in self.w])
        return self.ext.sub(self.ext.sub(at, self.ext.times(self.c, self._t)), product[:, 0])


class _Bytes(_Recursion):
    """The claims of one-hots modulo 2^8, <a, w> = c over GR(2^8, 48): an element is an eighth of one over the
    ring, and groups of elements, lane by lane, are multiplied at some ten times the speed.

    Halves travel as bytes, so that no part of a message is free; of c, in words, the lowest byte counts. When
    one group is left its elements become rows over the ring, a and c times 2^56, and what follows is the
    ring's.
    """

    def __init__(self, hots: Sequence[OneHot], draw: Draw) -> None:
        self.ext = RING
        self.c = np.zeros((2, DEGREE), np.uint64)
        self._blocks = []
        groups = [-(-hot.e.shape[1] // kernels.GROUP) for hot in hots]
        self._groups = self._even(sum(groups))
        at = 0
        for hot, count in zip(hots, groups, strict=True):
            self.c += hot.fill(self._groups[:, :, at : at + count], draw)
            at += count
        self._settle()

    def _even(self, count: int) -> _Groups:
        """Room for so many groups of a and of w, both components, (2, 2, n, 48, GROUP), and a zero one after
        them, if they are an odd number and not one.
        """
        even = count + (count % 2 if count > 1 else 0)
        room = np.empty((2, 2, even, DEGREE, kernels.GROUP), np.uint8)
        room[:, :, count:] = 0
        return room

    def _settle(self) -> None:
        """The halves of what there is; of one group as rows over the ring."""
        count = self._groups.shape[2]
        if count > 1:
            starts = range(0, count // 2, GROUPS)
            self._halves = sum(spread(partial(self._part, at) for at in starts), np.zeros_like(self.c))
            return
        up = np.uint64(RING_BITS - 8)
        a0, a1, w0, w1 = (
            np.ascontiguousarray(v.T).astype(np.uint64) for v in self._groups.reshape(4, DEGREE, -1)
        )
        self.c <<= up
        self._blocks = [_Block(kernels.GROUP, (a0 << up, a1 << up), (w0, w1))]
        self._halves = RING.halves(self._blocks[0])

    def _part(self, at: int) -> Ring:
        """What some pairs of groups add to the halves."""
        half = self._groups.shape[2] // 2
        low = self._groups[:, :, at : min(at + GROUPS, half)]
        upper = self._groups[:, :, half + at : min(half + at + GROUPS, 2 * half)] - low
        out = np.empty((2, DEGREE), np.uint64)
        for to, ((a0, a1), (w0, w1)) in zip(out, (low, upper), strict=True):
            to[:] = kernels.gr8_inner(a0 + a1, w0) + kernels.gr8_inner(a0, w1)
        return out

    @property
    def length(self) -> int:
        return kernels.GROUP * self._groups.shape[2] if not self._blocks else super().length

    @property
    def done(self) -> bool:
        return bool(self._blocks) and super().done

    @property
    def over(self) -> Shared:
        return self.ext if self._blocks else BYTES

    def halves(self) -> Ring:
        return self._halves if self._blocks else self._halves.astype(np.uint8).view(np.uint64)

    def fold(self, told: Ring, draw: Draw) -> None:
        if self._blocks:
            super().fold(told, draw)
            return
        xi = self._challenged(told.view(np.uint8).reshape(2, 2, DEGREE).astype(np.uint64), draw)
        half = self._groups.shape[2] // 2
        before, self._groups = self._groups, self._even(half)
        for to, v in zip(
            self._groups.reshape(4, -1, *before.shape[3:]),
            before.reshape(4, -1, *before.shape[3:]),
            strict=True,
        ):
            kernels.gr8_fold(v, xi, out=to[:half])
        self._settle()


def _claims(
    ext: Extension,
    foldings: Sequence[_Folding | _Vectors],
    values: Sequence[Ring],
    others: Sequence[Relation],
    draw: Draw,
    xi: Draw,
) -> Iterator[Claim]:
    for f, v in zip(foldings, values, strict=True):
        if f.ext is ext:
            yield from f.claims(v, xi)
    for r in others:
        if isinstance(r, OneHotPlanes) == (ext is BITS) and not _of_bytes(r):
            yield from r.claims(draw)


def _of_bytes(r: Relation) -> TypeGuard[OneHot]:
    return isinstance(r, OneHot) and r.e.dtype == np.uint8


def _stated(
    foldings: Sequence[_Folding | _Vectors],
    values: Sequence[Ring],
    others: Sequence[Relation],
    draw: Draw,
    xi: Draw,
) -> list[_Recursion]:
    """All that a batch claims, over each extension one inner product, and one modulo 2^8."""
    made = [_Recursion(ext, _claims(ext, foldings, values, others, draw, xi)) for ext in (RING, BITS)]
    if hots := [r for r in others if _of_bytes(r) and r.e.shape[1]]:
        made.append(_Bytes(hots, draw))
    return [r for r in made if r.length]


async def verify(
    doors: Doors,
    step: str,
    relations: Sequence[Product | Dot | Complex | SquareSum | Relation],
    gates: Sequence[And],
    zeros: Sequence[Ring],
    zero_bits: Sequence[Ring],
) -> None:
    """Verify a whole batch or raise. Call when nothing in the batch will change any more.

    Rounds: 9 + 2 log2(N / 32) for N the most rows over an extension: one for each product, or
    lane of a gate, that folding leaves, and one for each one-hot. Sent: up to 255 kB for the ring's products,
    280 kB for sums of squares, 10 kB for vectors times matrices and 5 kB for gates.
    """
    bk = doors.bk
    coins = await doors.commit(f"{step}/coin", 3 + LEVELS)
    draw = Draw(await coins.toss())
    narrow = [r for r in relations if isinstance(r, ScalarProduct) and r.x.shape[2] <= NARROW]
    products = [r for r in relations if isinstance(r, Product)] + [r.products() for r in narrow]
    dots = [r for r in relations if isinstance(r, Dot | Complex)]
    sums = [r for r in relations if isinstance(r, SquareSum)]
    vectors = [r for r in relations if isinstance(r, MatrixProduct) and r.a.shape[2] == 1]
    aside = [*narrow, *vectors]
    others = [
        r for r in relations if not isinstance(r, Product | Dot | Complex | SquareSum) and r not in aside
    ]
    foldings: list[_Folding | _Vectors] = [_Folding(RING, products, draw, dots)] if products or dots else []
    foldings += [_Folding(BITS, gates, draw)] if gates else []
    foldings += [_Squares(sums, draw)] if sums else []
    foldings += [_Vectors(vectors, draw)] if vectors else []

    async def share(name: str, summands: Sequence[tuple[Shared, Ring]]) -> list[Ring]:
        return await doors.reshare(
            f"{step}/{name}", *(e.add(v, e.sub(*bk.random(*v.shape))) for e, v in summands)
        )

    crossed = [(f.ext, await offload(f.columns * f.rows * WORK, f.cross)) for f in foldings]
    values = await share("cross", crossed)
    xi = Draw(await coins.toss())
    recursions = await offload(WHOLE, partial(_stated, foldings, values, others, draw, xi))
    level = 0
    while live := [r for r in recursions if not r.done]:
        told = await share(f"halve {level}", [(r.over, await offload(r.cost, r.halves)) for r in live])
        challenge = Draw(await coins.toss())
        for r, h in zip(live, told, strict=True):
            await offload(r.cost, partial(r.fold, h, challenge))
        level += 1
    shared = await share("mask", [(r.ext, r.mask(bk.random(*r.a[0].shape))) for r in recursions])
    last = Draw(await coins.toss())
    opened = await doors.open_extension(f"{step}/open", [(r.masked(last), r.ext.add) for r in recursions])
    residues: dict[Extension, list[Ring]] = {RING: [*zeros], BITS: [*zero_bits]}
    for f, v in zip(foldings, values, strict=True):
        if isinstance(f, _Squares | _Vectors):
            residues[RING].append(f.residue(v))
    for r, d, p in zip(recursions, opened, shared, strict=True):
        residues[r.ext].append(r.residue(d, p))
    await doors.assert_zero(f"{step}/zero", residues[RING], residues[BITS])
