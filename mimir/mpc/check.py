"""Verifying the preprocessing ("sacrifice"): relations, coins, one inner product, recursive halving.

Everything a batch contains is stated as *relations* over shares. After the whole batch is fixed the parties
toss a coin, and random linear combinations turn all relations of a batch into one claim <a, w> = c over an
extension: GR(2^64, 48) for ring elements, GF(2^64) for bits. Halving (Boyle et al., CCS 2019) needs two
extension elements and two rounds per level; the last few entries are opened under a random mask.

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
from typing import Final, Protocol

import numpy as np

from mimir import kernels
from mimir.mpc.domain import Ring
from mimir.mpc.doors import Coins, Doors
from mimir.mpc.replicated import Replicated

DEGREE: Final = 48
_LOW48: Final = np.uint64((1 << DEGREE) - 1)
OPEN_BELOW: Final = 32  # entries at which halving stops and the masked opening takes over
CLAIMS_PER_CHECK: Final = 1 << 14  # ring claims verified by one recursion (memory: 1.5 kB each)
GATES_PER_CHECK: Final = 1 << 20  # AND gates verified by one recursion (memory: 32 B each)
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


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Part of <a, w> = c: rows (2, n, 48), and c (2, 48)."""

    a: Ring
    w: Ring
    c: Ring


class Relation(Protocol):
    def claims(self, draw: Draw) -> Iterator[Claim]: ...


def _each(f: Callable[[Ring], Ring], v: Ring) -> Ring:
    return np.stack([f(np.ascontiguousarray(v[0])), f(np.ascontiguousarray(v[1]))])


def _lift(x: Ring) -> Ring:
    """Ring elements (2, n) as constants of the extension (2, n, 48)."""
    out = np.zeros((*x.shape, DEGREE), np.uint64)
    out[..., 0] = x
    return out


def _scaled(x: Ring, r: Ring) -> Ring:
    return _each(lambda v: kernels.gr_scale01(v, r), x)


def _summed(x: Ring, r: Ring) -> Ring:
    """Sum over the last axis of (2, m, n) with coefficients r: (2, m, 48)."""
    return _each(lambda v: kernels.gr_combine(v, r), x)


def _summed_rows(x: Ring, r: Ring) -> Ring:
    """Sum over the first value axis of (2, m, n) with coefficients r: (2, n, 48)."""
    return _each(lambda v: kernels.gr_combine_cols(v, r), x)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """x * y = z, element by element, each (2, n). With y = z = x: x is 0 or 1."""

    x: Ring
    y: Ring
    z: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        n = self.x.shape[1]
        for lo in range(0, n, CLAIMS_PER_CHECK):
            hi = min(n, lo + CLAIMS_PER_CHECK)
            r = draw.exceptional(hi - lo)
            c = _summed(self.z[:, None, lo:hi], r)[:, 0]
            yield Claim(_scaled(self.x[:, lo:hi], r), _lift(self.y[:, lo:hi]), c)


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
            z = _each(lambda v, d=down: kernels.gr_mul01(v, d), _summed(self.z[:, lo:hi], across))
            yield Claim(_scaled(self.s[:, lo:hi], down), _summed(self.x[:, lo:hi], across), z.sum(axis=1))


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
            yield Claim(_scaled(x, np.repeat(r, m)), _lift(x), _summed(self.q[:, None, lo:hi], r)[:, 0])


@dataclass(frozen=True, slots=True, eq=False)
class MatrixProduct:
    """a @ b = c for stacks: a (2, s, m, k), b (2, s, k, n), c (2, s, m, n); b may be a pair of mapped arrays."""

    a: Ring
    b: Ring | Sequence[Ring]
    c: Ring

    def claims(self, draw: Draw) -> Iterator[Claim]:
        s, m, k = self.a.shape[1:]
        n = self.c.shape[3]
        rows, cols = draw.exceptional(m), draw.exceptional(n)
        step = max(1, CLAIMS_PER_CHECK // k)
        for lo in range(0, s, step):
            hi = min(s, lo + step)
            mix = draw.exceptional(hi - lo)
            parts_a, parts_w = [], []
            total = np.zeros((2, DEGREE), np.uint64)
            for i in range(lo, hi):
                a = _summed_rows(self.a[:, i], rows)  # (2, k, 48)
                parts_a.append(_each(lambda v, f=mix[i - lo]: kernels.gr_mul01(v, np.full(len(v), f)), a))
                b = [self.b[0][i], self.b[1][i]]
                parts_w.append(np.stack([kernels.gr_combine(v, cols) for v in b]))
                c = _summed(self.c[:, i], cols)  # (2, m, 48)
                c = _each(lambda v: kernels.gr_mul01(v, rows), c).sum(axis=1)[:, None]
                total += _each(lambda v, f=mix[i - lo]: kernels.gr_mul01(v, np.full(1, f)), c)[:, 0]
            # One claim, never split: its parts share one c.
            yield Claim(np.concatenate(parts_a, axis=1), np.concatenate(parts_w, axis=1), total)


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
            a = _each(lambda v, d=down: kernels.gr_mul01(v, d), _summed(e, p))
            s = _each(lambda v: kernels.matmul(v, pq), e)
            yield Claim(a, _summed(e, q), _each(lambda v, d=down: kernels.gr_mul01(v, d), s).sum(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class And:
    """x & y = z for words of bits, each (2, w)."""

    x: Ring
    y: Ring
    z: Ring


class _Galois:
    """Arithmetic of the recursion over GR(2^64, 48)."""

    def challenge(self, seed: bytes) -> int:
        return int(Draw(seed).exceptional(1)[0])

    def inner(self, a: Ring, b: Ring) -> Ring:
        return kernels.gr_inner(a, b)

    def fold(self, a: Ring, xi: int) -> Ring:
        return kernels.gr_fold(a, xi)

    def times(self, a: Ring, xi: int) -> Ring:
        flat = np.ascontiguousarray(a).reshape(-1, DEGREE)
        return kernels.gr_mul01(flat, np.full(len(flat), xi, np.uint64)).reshape(a.shape)

    def public_inner(self, d: Ring, w: Ring) -> Ring:
        return kernels.gr_inner(d, w)

    def add(self, a: Ring, b: Ring) -> Ring:
        return a + b

    def sub(self, a: Ring, b: Ring) -> Ring:
        return a - b


class _Binary:
    """Arithmetic of the recursion over GF(2^64); an element is one word."""

    def challenge(self, seed: bytes) -> int:
        return int(Draw(seed).field(1)[0])

    def inner(self, a: Ring, b: Ring) -> Ring:
        return np.array([kernels.gf_inner(a, b)], np.uint64)

    def fold(self, a: Ring, xi: int) -> Ring:
        return kernels.gf_fold(a, xi)

    def times(self, a: Ring, xi: int) -> Ring:
        return kernels.gf_scale(np.ascontiguousarray(a).reshape(-1), xi).reshape(a.shape)

    def public_inner(self, d: Ring, w: Ring) -> Ring:
        return np.array([kernels.gf_inner(d, w)], np.uint64)

    def add(self, a: Ring, b: Ring) -> Ring:
        return a ^ b

    sub = add


async def _inner_product(
    doors: Doors, step: str, ext: _Galois | _Binary, a: Ring, w: Ring, c: Ring, coins: Coins
) -> Ring:
    """Reduce <a, w> = c (rows on axis 1, components on axis 0) to a share that is zero iff the claim holds."""
    bk = doors.bk
    zero = bk.zero if isinstance(ext, _Galois) else bk.zero_bits

    def summand(x: Ring, y: Ring) -> Ring:
        # x_i y_i + x_{i+1} y_i + x_i y_{i+1}, and a share of zero
        z = ext.add(ext.inner(ext.add(x[0], x[1]), y[0]), ext.inner(x[0], y[1]))
        return ext.add(z, zero(*z.shape))

    level = 0
    while a.shape[1] > OPEN_BELOW:
        if a.shape[1] % 2:
            pad = [(0, 0), (0, 1)] + [(0, 0)] * (a.ndim - 2)
            a, w = np.pad(a, pad), np.pad(w, pad)
        half = a.shape[1] // 2
        low = summand(a[:, :half], w[:, :half])
        slope = summand(ext.sub(a[:, half:], a[:, :half]), ext.sub(w[:, half:], w[:, :half]))
        h0, h2 = await doors.reshare(f"{step}/halve {level}", low, slope)
        xi = ext.challenge(await coins.toss())
        h1 = ext.sub(c, h0)  # <a, w> = h(0) + h(1)
        # h(X) = h0 + (h1 - h0 - h2) X + h2 X^2
        c = ext.add(h0, ext.times(ext.add(ext.sub(ext.sub(h1, h0), h2), ext.times(h2, xi)), xi))
        a = np.stack([ext.fold(a[0], xi), ext.fold(a[1], xi)])
        w = np.stack([ext.fold(w[0], xi), ext.fold(w[1], xi)])
        level += 1
    mask = bk.random(*a.shape[1:])
    (product,) = await doors.reshare(f"{step}/mask", summand(mask, w))
    t = ext.challenge(await coins.toss())
    masked = ext.add(ext.times(a, t), mask)
    lacked = (await doors._open(f"{step}/open", [masked]))[0]
    d = ext.add(ext.add(masked[0], masked[1]), lacked)
    at = np.stack([ext.public_inner(d, np.ascontiguousarray(w[0])), ext.public_inner(d, np.ascontiguousarray(w[1]))])
    return ext.sub(ext.sub(at, ext.times(c, t)), product)


async def verify(
    doors: Doors, step: str, relations: Sequence[Relation], gates: Sequence[And], zeros: Sequence[Ring],
    zero_bits: Sequence[Ring],
) -> None:
    """Verify a whole batch or raise. Call when nothing in the batch will change any more.

    Rounds: 4 + 2 log2(N) per group of 2^14 ring claims or 2^20 gates, and 3 at the ends; under 20 kB a group.
    """
    coins = await doors.commit(f"{step}/coin", 1)
    draw = Draw(await coins.toss())
    residues = list(zeros)
    bit_residues = list(zero_bits)
    for number, group in enumerate(_groups(relations, draw)):
        name = f"{step}/ring {number}"
        levels = await doors.commit(f"{name}/coin", LEVELS)
        a = np.concatenate([x.a for x in group], axis=1)
        w = np.concatenate([x.w for x in group], axis=1)
        c = np.sum(np.stack([x.c for x in group]), axis=0, dtype=np.uint64)
        residues.append(await _inner_product(doors, name, _Galois(), a, w, c, levels))
    for number, (x, y, z) in enumerate(_gate_groups(gates)):
        name = f"{step}/gates {number}"
        levels = await doors.commit(f"{name}/coin", LEVELS)
        r = draw.field(64 * x.shape[1])
        a = np.stack([kernels.gf_select(x[i], r) for i in range(2)])
        w = np.stack([kernels.bits_to_ring(y[i], 64 * y.shape[1]) for i in range(2)])
        ones = np.full(z.shape[1], 2**64 - 1, np.uint64)
        c = np.array([[kernels.gf_select_inner(z[i], ones, r)] for i in range(2)], np.uint64)
        bit_residues.append(await _inner_product(doors, name, _Binary(), a, w, c, levels))
    await doors.assert_zero(f"{step}/zero", residues, bit_residues)


def _groups(relations: Sequence[Relation], draw: Draw) -> Iterator[list[Claim]]:
    group: list[Claim] = []
    size = 0
    for relation in relations:
        for claim in relation.claims(draw):
            n = claim.a.shape[1]
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
    x = np.concatenate([g.x.reshape(2, -1) for g in gates], axis=1)
    y = np.concatenate([g.y.reshape(2, -1) for g in gates], axis=1)
    z = np.concatenate([g.z.reshape(2, -1) for g in gates], axis=1)
    for lo in range(0, x.shape[1], limit):
        hi = lo + limit
        yield tuple(np.ascontiguousarray(v[:, lo:hi]) for v in (x, y, z))  # type: ignore[misc]

