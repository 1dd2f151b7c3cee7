"""Verifying the preprocessing ("sacrifice"): relations, coins, one inner product, recursive halving.

Everything a batch contains is stated as *relations* over shares. After the whole batch is fixed the parties
toss a coin, and random linear combinations turn all relations of a batch into one claim <a, w> = c over an
extension: GR(2^64, 48) for ring elements, GF(2^64) for bits. Products of ring elements, by far the most, are
first folded eightfold while they are still plain ring elements, 48 times smaller (`_prefold`). Halving (Boyle
et al., CCS 2019) needs two extension elements and two rounds per level; the last few entries are opened under
a random mask.

Coefficients are drawn from the 2^48 elements of GR(2^64, 48) with coordinates 0 and 1. The difference of two
such elements is a unit, so an error, even one in the top bit alone, survives a combination with probability
at most 2^-48; a plain 64-bit coefficient would miss a top-bit error half of the time. One batch errs with
probability at most (3 + 2 levels + 1) / 2^48 < 2^-42, and a cheater has one try: a failed check ends the
session.

An error that a cheater adds to a product shows up as a residue of the claim that depends on the error and the
coins only, so a failing check says nothing about the secrets (see DESIGN.md for one-hots).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, Protocol

import numpy as np

from mimir import kernels
from mimir.mpc.domain import Ring
from mimir.mpc.doors import Coins, Doors
from mimir.mpc.offload import offload

DEGREE: Final = 48
_LOW48: Final = np.uint64((1 << DEGREE) - 1)
OPEN_BELOW: Final = 32  # entries at which halving stops and the masked opening takes over
BLOCKS: Final = 8  # products are folded so many to one before they become elements of the extension
COLUMNS_AT_ONCE: Final = 1 << 12  # of a prefold (memory: 1 kB each)
CLAIMS_PER_CHECK: Final = 1 << 15  # ring claims verified by one recursion (memory: 1.5 kB each)
GATES_PER_CHECK: Final = 1 << 21  # AND gates verified by one recursion (memory: 32 B each)
GROUP_WORK: Final = 1 << 30  # making the claims of a group always goes to a thread
LEVELS: Final = 24  # coins committed for one recursion: halvings, and one for the final opening


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


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Part of <a, w> = c: rows (n, 48) of both components, and c (2, 48)."""

    a: Pair
    w: Pair
    c: Ring


class Relation(Protocol):
    def claims(self, draw: Draw) -> Iterator[Claim]: ...


def _each(f: Callable[[Ring], Ring], v: Ring | Pair) -> Pair:
    return f(np.ascontiguousarray(v[0])), f(np.ascontiguousarray(v[1]))


def _lift(x: Ring) -> Ring:
    """Ring elements (n,) as constants of the extension (n, 48)."""
    out = np.zeros((*x.shape, DEGREE), np.uint64)
    out[..., 0] = x
    return out


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
class ScalarProduct:
    """s_n * x_nm = z_nm: s (2, n), x and z (2, n, m). One claim a row."""

    s: Ring
    x: Ring
    z: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        across = draw.exceptional(self.x.shape[2])
        n = self.s.shape[1]
        for lo in range(0, n, CLAIMS_PER_CHECK):
            hi = min(n, lo + CLAIMS_PER_CHECK)
            down = draw.exceptional(hi - lo)
            z = _mixed(_summed(self.z[:, lo:hi], across), down)
            yield Claim(_scaled(self.s[:, lo:hi], down), _summed(self.x[:, lo:hi], across), _column_sum(z))


@dataclass(frozen=True, slots=True, eq=False)
class SquareSum:
    """sum_m x_nm^2 = q_n: x (2, n, m), q (2, n)."""

    x: Ring
    q: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        n, m = self.x.shape[1:]
        step = max(1, CLAIMS_PER_CHECK // m)
        for lo in range(0, n, step):
            hi = min(n, lo + step)
            r = draw.exceptional(hi - lo)
            x = self.x[:, lo:hi].reshape(2, -1)
            yield Claim(_scaled(x, np.repeat(r, m)), _each(_lift, x), _total(self.q[:, lo:hi], r))


@dataclass(frozen=True, slots=True, eq=False)
class MatrixProduct:
    """a @ b = c for stacks: a (2, s, m, k), b (2, s, k, n), c (2, s, m, n); b may be a pair of mapped
    arrays.
    """

    a: Ring
    b: Ring | Sequence[Ring]
    c: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        s, m, k = self.a.shape[1:]
        rows, cols = draw.exceptional(m), draw.exceptional(self.c.shape[3])
        step = max(1, CLAIMS_PER_CHECK // k)
        for lo in range(0, s, step):
            hi = min(s, lo + step)
            mix = draw.exceptional(hi - lo)
            parts_a: list[Pair] = []
            parts_w: list[Pair] = []
            total = np.zeros((2, DEGREE), np.uint64)
            for i in range(lo, hi):
                a = _each(lambda v: kernels.gr_combine_cols(v, rows), self.a[:, i])  # (k, 48)
                parts_a.append(_mixed(a, np.full(k, mix[i - lo])))
                parts_w.append(_each(lambda v: kernels.gr_combine(v, cols), (self.b[0][i], self.b[1][i])))
                c = _column_sum(_mixed(_summed(self.c[:, i], cols), rows))
                total += np.concatenate(_mixed((c[:1], c[1:]), np.full(1, mix[i - lo])))
            # One claim, never split: its parts share one c.
            yield Claim(_joined(parts_a), _joined(parts_w), total)


@dataclass(frozen=True, slots=True, eq=False)
class OneHot:
    """Each row of e (2, n, K) has one entry 1 and the rest 0, given that the caller also checks its sum.

    <p, e> <q, e> = <p q, e> for random p, q says e_i e_j = 0 (i != j) and e_i^2 = e_i. One claim a row.
    """

    e: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        n, k = self.e.shape[1:]
        p, q = draw.exceptional(k), draw.exceptional(k)
        pq = kernels.gr_mul01(kernels.gr_scale01(np.ones(k, np.uint64), p), q)  # (k, 48), general elements
        for lo in range(0, n, CLAIMS_PER_CHECK):
            hi = min(n, lo + CLAIMS_PER_CHECK)
            e = self.e[:, lo:hi]
            down = draw.exceptional(hi - lo)
            s = _mixed(_each(lambda v: kernels.matmul(v, pq), e), down)
            yield Claim(_mixed(_summed(e, p), down), _summed(e, q), _column_sum(s))


def _joined(parts: Sequence[Pair], even: bool = False) -> Pair:
    """Rows one after another; with `even`, and zeros after them so that they can be halved down to
    OPEN_BELOW.
    """
    if len(parts) == 1 and not even:
        return parts[0]
    rows = sum(len(p[0]) for p in parts)
    out = []
    for i in range(2):
        joined = np.empty((_halvable(rows) if even else rows, *parts[0][i].shape[1:]), np.uint64)
        at = 0
        for p in parts:
            joined[at : at + len(p[i])] = p[i]
            at += len(p[i])
        joined[at:] = 0
        out.append(joined)
    return out[0], out[1]


def _halvable(rows: int) -> int:
    """The next number that can be halved without rest until it is at most OPEN_BELOW."""
    unit = 1
    while rows > OPEN_BELOW * unit:
        unit *= 2
    return -(-rows // unit) * unit


@dataclass(frozen=True, slots=True, eq=False)
class And:
    """x & y = z for words of bits, each (2, w)."""

    x: Ring
    y: Ring
    z: Ring


class _Galois:
    """Arithmetic of the recursion over GR(2^64, 48)."""

    work = DEGREE * DEGREE  # multiplications of one product

    def challenge(self, seed: bytes) -> int:
        return int(Draw(seed).exceptional(1)[0])

    def inner(self, a: Ring, b: Ring) -> Ring:
        return kernels.gr_inner(a, b)

    def fold(self, a: Ring, xi: int) -> Ring:
        return kernels.gr_fold(a, xi)

    def times(self, a: Ring, xi: int) -> Ring:
        flat = np.ascontiguousarray(a).reshape(-1, DEGREE)
        return kernels.gr_mul01(flat, np.full(len(flat), xi, np.uint64)).reshape(a.shape)

    def add(self, a: Ring, b: Ring) -> Ring:
        return a + b

    def sub(self, a: Ring, b: Ring) -> Ring:
        return a - b


class _Binary:
    """Arithmetic of the recursion over GF(2^64); an element is one word."""

    work = 8

    def challenge(self, seed: bytes) -> int:
        return int(Draw(seed).field(1)[0])

    def inner(self, a: Ring, b: Ring) -> Ring:
        return np.array([kernels.gf_inner(a, b)], np.uint64)

    def fold(self, a: Ring, xi: int) -> Ring:
        return kernels.gf_fold(a, xi)

    def times(self, a: Ring, xi: int) -> Ring:
        return kernels.gf_scale(np.ascontiguousarray(a).reshape(-1), xi).reshape(a.shape)

    def add(self, a: Ring, b: Ring) -> Ring:
        return a ^ b

    sub = add


async def _inner_product(
    doors: Doors, step: str, ext: _Galois | _Binary, a: Pair, w: Pair, c: Ring, coins: Coins
) -> Ring:
    """Reduce <a, w> = c to a share that is zero iff the claim holds."""
    bk = doors.bk
    zero = bk.zero if isinstance(ext, _Galois) else bk.zero_bits

    def summand(x: Pair, y: Pair) -> Ring:
        # x_i y_i + x_{i+1} y_i + x_i y_{i+1}
        return ext.add(ext.inner(ext.add(x[0], x[1]), y[0]), ext.inner(x[0], y[1]))

    level = 0
    while len(a[0]) > OPEN_BELOW:
        half = len(a[0]) // 2
        cost = 4 * half * ext.work

        def halves(a: Pair = a, w: Pair = w, half: int = half) -> tuple[Ring, Ring]:
            low = summand((a[0][:half], a[1][:half]), (w[0][:half], w[1][:half]))
            da = ext.sub(a[0][half:], a[0][:half]), ext.sub(a[1][half:], a[1][:half])
            dw = ext.sub(w[0][half:], w[0][:half]), ext.sub(w[1][half:], w[1][:half])
            return low, summand(da, dw)

        low, slope = await offload(cost, halves)
        shape = low.shape
        h0, h2 = await doors.reshare(
            f"{step}/halve {level}", ext.add(low, zero(*shape)), ext.add(slope, zero(*shape))
        )
        xi = ext.challenge(await coins.toss())
        h1 = ext.sub(c, h0)  # <a, w> = h(0) + h(1)
        # h(X) = h0 + (h1 - h0 - h2) X + h2 X^2
        c = ext.add(h0, ext.times(ext.add(ext.sub(ext.sub(h1, h0), h2), ext.times(h2, xi)), xi))

        def fold(a: Pair = a, w: Pair = w, xi: int = xi) -> tuple[Pair, Pair]:
            return (ext.fold(a[0], xi), ext.fold(a[1], xi)), (ext.fold(w[0], xi), ext.fold(w[1], xi))

        a, w = await offload(cost, fold)
        level += 1
    both = bk.random(*a[0].shape)
    mask = (both[0], both[1])
    product = summand(mask, w)
    (product,) = await doors.reshare(f"{step}/mask", ext.add(product, zero(*product.shape)))
    t = ext.challenge(await coins.toss())
    masked = np.stack([ext.add(ext.times(x, t), m) for x, m in zip(a, mask, strict=True)])
    d = await doors.open_extension(f"{step}/open", masked, ext.add)
    at = np.stack([ext.inner(d, v) for v in w])
    return ext.sub(ext.sub(at, ext.times(c, t)), product)


async def _prefold(
    doors: Doors, step: str, products: Sequence[Product], draw: Draw, coins: Coins
) -> tuple[Claim, Ring]:
    """Turn N products of ring elements into N / 8 rows of one claim, and a share that must be zero. Two
    rounds.

    Blocks i = 0..7 of columns g, coefficients alpha_i beta_g. C_ij = sum_g beta_g x_ig y_jg is shared for all
    pairs (i, j); the products say sum_i alpha_i C_ii = sum alpha_i beta_g z_ig. Then coins xi, eta give
    sum_g beta_g X_g Y_g = sum_ij xi_i eta_j C_ij with X_g = sum_i xi_i x_ig, Y_g = sum_j eta_j y_jg. A
    wrong C
    survives with probability at most 2 / 2^48.
    """
    bk = doors.bk
    x, y, z = (np.concatenate([getattr(p, n).reshape(2, -1) for p in products], axis=1) for n in "xyz")
    columns = -(-x.shape[1] // BLOCKS)
    pad = [(0, 0), (0, BLOCKS * columns - x.shape[1])]
    x, y, z = (np.pad(v, pad).reshape(2, BLOCKS, columns) for v in (x, y, z))
    alpha, beta = draw.exceptional(BLOCKS), draw.exceptional(columns)

    def cross() -> Ring:
        out = np.zeros((BLOCKS * BLOCKS, DEGREE), np.uint64)
        for lo in range(0, columns, COLUMNS_AT_ONCE):
            part = slice(lo, min(columns, lo + COLUMNS_AT_ONCE))
            width = part.stop - lo
            both = x[0, :, part] + x[1, :, part]
            terms = both[:, None] * y[0, None, :, part] + x[0, :, None, part] * y[1, None, :, part]
            out += kernels.gr_combine(terms.reshape(-1, width), beta[part])
        return out

    local = await offload(BLOCKS * x.shape[2] * BLOCKS * 16, cross)
    (c,) = await doors.reshare(f"{step}/cross", local + bk.zero(*local.shape))
    c = c.reshape(2, BLOCKS, BLOCKS, DEGREE)
    diagonal = np.ascontiguousarray(c[:, range(BLOCKS), range(BLOCKS)])
    claimed = _column_sum(_mixed((diagonal[0], diagonal[1]), alpha))
    stated = _column_sum(_mixed(_summed(z, beta), alpha))
    challenge = Draw(await coins.toss())
    xi, eta = challenge.exceptional(BLOCKS), challenge.exceptional(BLOCKS)
    xi_wide = kernels.gr_scale01(np.ones(BLOCKS, np.uint64), xi)
    weights = kernels.gr_mul01(np.repeat(xi_wide, BLOCKS, axis=0), np.tile(eta, BLOCKS))
    target = np.stack([kernels.gr_inner(np.ascontiguousarray(v).reshape(-1, DEGREE), weights) for v in c])

    def fold() -> tuple[Pair, Pair]:
        a = _each(lambda v: kernels.gr_combine_cols(v, xi), x)
        return _mixed(a, beta), _each(lambda v: kernels.gr_combine_cols(v, eta), y)

    a, w = await offload(columns * DEGREE * DEGREE, fold)
    return Claim(a, w, target), claimed - stated


async def verify(
    doors: Doors,
    step: str,
    relations: Sequence[Product | Relation],
    gates: Sequence[And],
    zeros: Sequence[Ring],
    zero_bits: Sequence[Ring],
) -> None:
    """Verify a whole batch or raise. Call when nothing in the batch will change any more.

    Rounds: 4 + 2 log2(N) per group of 2^15 ring claims or 2^21 gates, 2 per 2^18 products, and 6 at the ends;
    under 20 kB a group, 25 kB per 2^18 products.
    """
    products = [r for r in relations if isinstance(r, Product)]
    chunks = list(_chunks(products))
    coins = await doors.commit(f"{step}/coin", 1 + len(chunks))
    draw = Draw(await coins.toss())
    residues = list(zeros)
    bit_residues = list(zero_bits)
    claims: list[Claim] = []
    for number, chunk in enumerate(chunks):
        claim, residue = await _prefold(doors, f"{step}/products {number}", chunk, draw, coins)
        claims.append(claim)
        residues.append(residue)
    others = [r for r in relations if not isinstance(r, Product)]
    made = _groups(claims, others, draw)
    number = 0
    while group := await offload(GROUP_WORK, lambda: next(made, None)):
        name = f"{step}/ring {number}"
        levels = await doors.commit(f"{name}/coin", LEVELS)
        a, w = _joined([x.a for x in group], even=True), _joined([x.w for x in group], even=True)
        c = np.stack([x.c for x in group]).sum(axis=0, dtype=np.uint64).reshape(2, DEGREE)
        residues.append(await _inner_product(doors, name, _Galois(), a, w, c, levels))
        number += 1
    for number, (x, y, z) in enumerate(_gate_groups(gates)):
        name = f"{step}/gates {number}"
        levels = await doors.commit(f"{name}/coin", LEVELS)
        r = draw.field(64 * x.shape[1])

        def spread(x: Ring = x, y: Ring = y, z: Ring = z, r: Ring = r) -> tuple[Pair, Pair, Ring]:
            ones = np.full(z.shape[1], 2**64 - 1, np.uint64)
            a = kernels.gf_select(x[0], r), kernels.gf_select(x[1], r)
            w = kernels.bits_to_ring(y[0], len(r)), kernels.bits_to_ring(y[1], len(r))
            c = np.array([[kernels.gf_select_inner(v, ones, r)] for v in z], np.uint64)
            return a, w, c

        a, w, c = await offload(len(r) * 8, spread)
        bit_residues.append(await _inner_product(doors, name, _Binary(), a, w, c, levels))
    await doors.assert_zero(f"{step}/zero", residues, bit_residues)


def _chunks(products: Sequence[Product]) -> Iterator[list[Product]]:
    """Products in pieces of at most BLOCKS * CLAIMS_PER_CHECK."""
    limit = BLOCKS * CLAIMS_PER_CHECK
    chunk: list[Product] = []
    room = limit
    for p in products:
        x, y, z = (v.reshape(2, -1) for v in (p.x, p.y, p.z))
        at = 0
        while at < x.shape[1]:
            part = slice(at, at + room)
            chunk.append(Product(x[:, part], y[:, part], z[:, part]))
            taken = chunk[-1].x.shape[1]
            at, room = at + taken, room - taken
            if not room:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def _groups(claims: Sequence[Claim], relations: Sequence[Relation], draw: Draw) -> Iterator[list[Claim]]:
    group: list[Claim] = []
    size = 0
    for claim in chain(claims, chain.from_iterable(r.claims(draw) for r in relations)):
        n = len(claim.a[0])
        if group and size + n > CLAIMS_PER_CHECK:
            yield group
            group, size = [], 0
        group.append(claim)
        size += n
    if group:
        yield group


def _gate_groups(gates: Sequence[And]) -> Iterator[tuple[Ring, Ring, Ring]]:
    limit = GATES_PER_CHECK // 64
    if not gates:
        return
    x, y, z = (np.concatenate([getattr(g, n).reshape(2, -1) for g in gates], axis=1) for n in "xyz")
    for lo in range(0, x.shape[1], limit):
        part = slice(lo, min(x.shape[1], lo + limit))
        more = _halvable(64 * (part.stop - lo)) // 64 - (part.stop - lo)
        yield tuple(np.pad(v[:, part], [(0, 0), (0, more)]) for v in (x, y, z))  # type: ignore[misc]
