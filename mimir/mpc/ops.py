"""Operations on shares: each takes fresh correlations, opens masked values, finishes locally.

Every message of these functions is an opening (see doors), so what comes out is right or the session has
ended. Costs are stated per element; `rounds` counts lockstep rounds.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mimir import kernels
from mimir.mpc import prep
from mimir.mpc.domain import RING_BITS, Ring, constant, words
from mimir.mpc.doors import Masked
from mimir.mpc.offload import offload
from mimir.mpc.prep import Kind, Weights
from mimir.mpc.share import Backend, Bits, Share, concat

T = TypeVar("T")


class Opening(Protocol):
    """What operations need of the doors."""

    async def open(self, step: str, *shares: Share) -> list[Ring]: ...

    async def open_bits(self, step: str, *shares: Bits) -> list[Ring]: ...

    async def open_low(self, step: str, width: int, *shares: Share) -> list[Ring]: ...

    async def open_all(self, step: str, requests: Sequence[Masked]) -> list[list[Ring]]: ...


class Material(Protocol):
    def take(self, kind: Kind, n: int) -> dict[str, Ring]: ...


@dataclass(slots=True)
class Context:
    """Where an operation runs: the backend, the doors, this step's correlations, the weights."""

    bk: Backend
    doors: Opening
    store: Material
    weights: Weights

    def take(self, kind: Kind, n: int) -> dict[str, Share]:
        return {k: Share(v, self.bk) for k, v in self.store.take(kind, n).items()}

    async def compute(self, work: int, fn: Callable[[], T], shape: tuple[int, ...]) -> T:
        """Run a kernel, in a thread if it is long, so that the mesh keeps time. `shape` is that of its
        result.
        """
        return await offload(work, fn)

    def share(self, v: Ring) -> Share:
        return Share(v, self.bk)


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a branch wants opened."""

    step: str
    requests: Sequence[Masked]


class _Branch:
    """Doors of one branch of `together`: an opening suspends the branch until all branches want one."""

    async def open(self, step: str, *shares: Share) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_bits(self, step: str, *shares: Bits) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_low(self, step: str, width: int, *shares: Share) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares, width)]))[0]

    async def open_all(self, step: str, requests: Sequence[Masked]) -> list[list[Ring]]:
        return await _suspend(_Ask(step, requests))


@types.coroutine
def _suspend(ask: _Ask) -> Generator[Any, Any, list[list[Ring]]]:
    return (yield ask)


@types.coroutine
def _advance(flow: Coroutine[Any, Any, Any], answer: Any) -> Generator[Any, Any, tuple[_Ask | None, Any]]:
    """Run a branch to its next opening or its end; whatever else it waits for is passed on to Trio."""
    try:
        trap = flow.send(answer)
        while not isinstance(trap, _Ask):
            try:
                got = yield trap
            except BaseException as error:
                trap = flow.throw(error)
            else:
                trap = flow.send(got)
        return trap, None
    except StopIteration as end:
        return None, end.value


def _joint_name(steps: Sequence[str]) -> str:
    """One name for a shared round: the first step's, and the others without the path they share with it."""
    path = os.path.commonpath([os.path.dirname(step) for step in steps])
    shared = len(path) + 1 if path else 0
    return " | ".join([steps[0], *(step[shared:] for step in steps[1:])])


async def together(ctx: Context, *branches: Callable[[Context], Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run branches side by side: the n-th opening of each shares one round, so the longest sets the rounds.

    Branches run one after another between rounds, in their order, so that every party takes the same
    correlations for the same purpose. A branch must not hand its context to an actor.
    """
    inner = replace(ctx, doors=_Branch())
    flows = [branch(inner) for branch in branches]
    results: list[Any] = [None] * len(flows)
    waiting: dict[int, Any] = dict.fromkeys(range(len(flows)))
    try:
        while waiting:
            asks: dict[int, _Ask] = {}
            for i, answer in waiting.items():
                ask, results[i] = await _advance(flows[i], answer)
                if ask is not None:
                    asks[i] = ask
            if not asks:
                break
            step = _joint_name([a.step for a in asks.values()])
            flat = [r for a in asks.values() for r in a.requests]
            opened = iter(await ctx.doors.open_all(step, flat))
            waiting = {i: [next(opened) for _ in a.requests] for i, a in asks.items()}
    finally:
        for flow in flows:
            flow.close()
    return results


async def truncate(ctx: Context, step: str, *items: tuple[Share, int]) -> list[Share]:
    """Drop f bits of each (x, f), for |x| < 2^62 - 2^f: x / 2^f with an error below 2 units, mean 0. One
    round, 8 bytes.

    Top-bit correction: c = open(x' + r), x' = x + 2^62 - 2^f + 1. With R = r_0 + r_1 + r_2 over the integers,
    U the sum of the r_i >> f, v < 3 * 2^f that of their low bits, and W the number of times R passes 2^64,
    floor((x' + v) / 2^f) = (c >> f) - U + 2^(64-f) (W + top(r) (1 - top(c))) exactly: no wrong value exists
    to be unlucky with. v is a public dither that centres the rounding.
    """
    sizes = [x.size for x, _ in items]
    shift = np.repeat(np.array([f for _, f in items], np.uint64), sizes)
    taken = [ctx.take(prep.Trunc(f), n) for (_, f), n in zip(items, sizes, strict=True)]
    r, high, top, over = (concat([p[name] for p in taken]) for name in ("r", "high", "top", "over"))
    one = np.uint64(1)
    offset = (one << np.uint64(62)) - (one << shift) + one
    (c,) = await ctx.doors.open(step, concat([x.flat() for x, _ in items]) + r + offset)
    wrapped = over + top * (one - (c >> np.uint64(63)))
    public = (c >> shift) - (one << (np.uint64(62) - shift))
    y = wrapped * (one << (np.uint64(RING_BITS) - shift)) - high + public
    out, at = [], 0
    for (x, _), n in zip(items, sizes, strict=True):
        out.append(y[at : at + n].reshape(*x.shape))
        at += n
    return out


async def matmul(ctx: Context, step: str, x: Share, name: str) -> Share:
    """x (n, k) times the shared weight matrix `name` (k, m): (n, m) at the sum of the scales. One round, 8
    k bytes.
    """
    c = ctx.take(prep.Weight(name), x.shape[0])
    (delta,) = await ctx.doors.open(step, x + c["x"])
    w = ctx.weights.pair(name)
    n, k, m = *x.shape, w[0].shape[1]

    def local() -> Ring:
        return np.stack([kernels.matmul(delta, w[0]), kernels.matmul(delta, w[1])])

    y = await ctx.compute(2 * n * k * m, local, (2, n, m))
    return ctx.share(y) - c["z"]


async def mul(ctx: Context, step: str, *pairs: tuple[Share, Share]) -> list[Share]:
    """Products element by element. One round, 16 bytes."""
    total = sum(x.size for x, _ in pairs)
    c = ctx.take(prep.Mul(), total)
    xs = concat([x.flat() for x, _ in pairs])
    ys = concat([y.flat() for _, y in pairs])
    dx, dy = await ctx.doors.open(step, xs + c["x"], ys + c["y"])
    z = c["z"] - c["y"] * dx - c["x"] * dy + dx * dy
    out, at = [], 0
    for x, _ in pairs:
        out.append(z[at : at + x.size].reshape(*x.shape))
        at += x.size
    return out


async def scale(ctx: Context, step: str, s: Share, x: Share) -> Share:
    """s (n) times each row of x (n, m). One round, 8 (m + 1) bytes a row."""
    c = ctx.take(prep.Scale(x.shape[1]), x.shape[0])
    ds, dx = await ctx.doors.open(step, s + c["s"], x + c["x"])
    return c["z"] - c["x"] * ds[:, None] - c["s"].reshape(-1, 1) * dx + dx * ds[:, None]


async def conjunction(ctx: Context, step: str, *pairs: tuple[Bits, Bits]) -> list[Bits]:
    """ANDs of words of bits. One round, two bits a bit."""
    total = sum(x.size for x, _ in pairs)
    c = {k: Bits(v.v, ctx.bk) for k, v in ctx.take(prep.AndTriple(), total).items()}
    xs = Bits(concat([x.flat() for x, _ in pairs]).v, ctx.bk)
    ys = Bits(concat([y.flat() for _, y in pairs]).v, ctx.bk)
    dx, dy = await ctx.doors.open_bits(step, xs ^ c["x"], ys ^ c["y"])
    z = c["z"] ^ (c["y"] & dx) ^ (c["x"] & dy) ^ (dx & dy)
    out, at = [], 0
    for x, _ in pairs:
        out.append(Bits(z.v[:, at : at + x.size].reshape(z.v.shape[0], *x.shape), ctx.bk))
        at += x.size
    return out


async def to_ring(ctx: Context, step: str, bits: Bits, n: int) -> Share:
    """Words of bits (w) as n ring elements 0 or 1. One round, one bit each."""
    c = ctx.take(prep.DaBit(), n)
    mask = Bits(c["planes"].v[:, 0], ctx.bk)
    (o,) = await ctx.doors.open_bits(step, bits ^ mask)
    public = kernels.bits_to_ring(o, n)
    return c["ring"] * (np.uint64(1) - np.uint64(2) * public) + public


async def is_zero(ctx: Context, step: str, x: Share, bits: int) -> Bits:
    """[x = 0] for x (n) in 0 .. 2^bits - 1, as words. One round, 4 bytes."""
    c = ctx.take(prep.Zero(bits), x.shape[0])
    (o,) = await ctx.doors.open_low(step, bits, x + c["r"])
    return Bits(_pick(c["planes"].v, o), ctx.bk)


def _pick(planes: Ring, row: npt.NDArray[Any]) -> Ring:
    """Bit `row[i]` (public) of lane i of planes (components, rows, words), packed: (components, words)."""
    lane = np.arange(len(row))
    chosen = (planes[:, row.astype(np.int64), lane >> 6] >> (lane & 63).astype(np.uint64)) & np.uint64(1)
    return np.stack([kernels.ring_lsb(np.ascontiguousarray(v)) for v in chosen])


async def are_below(
    ctx: Context, step: str, x: Share, low: int, bits: int, thresholds: Sequence[int]
) -> list[Bits]:
    """[x < t * 2^low] for each t, x (n) in 0 .. 2^(low + bits) - 3 * 2^low, as words. One round, 4 or 8
    bytes.

    What is compared may be up to 3 units of 2^low above the floor of x. 0 < t < 2^bits. The indices below a
    threshold are neighbours, so their one-hot bits add up to two bits of its running sum.
    """
    c = ctx.take(prep.Zero(bits, low), x.shape[0])
    (o,) = await ctx.doors.open_low(step, low + bits, x + c["r"])
    index = (o >> np.uint64(low)).astype(np.int64)
    running = np.bitwise_xor.accumulate(c["planes"].v, axis=1)  # bits of "r <= row"
    first = Bits(_pick(running, index), ctx.bk)
    out = []
    for t in thresholds:
        # sum over r in (index - t, index] modulo 2^bits; "r <= 2^bits - 1" always holds
        before = Bits(_pick(running, (index - t) % (1 << bits)), ctx.bk)
        out.append(first ^ before ^ kernels.ring_lsb((index < t).astype(np.uint64)))
    return out


async def is_negative(ctx: Context, step: str, x: Share, low: int, width: int) -> Bits:
    """[x < 0] for x (n), as words; -3 * 2^low < x < 0 may be taken for zero, x >= 0 never for negative.

    |x| < 2^(low + width - 1) - 3 * 2^low.

    c = open(x + r); with the bits of r shared, the sign is top(c) ^ top(r) ^ [c' < r'] of the lower bits, by
    a tree of (less, equal) pairs. Rounds: 1 + log2(width - 1); 8 bytes and 4 bits a bit of width.
    """
    n = x.shape[0]
    c = ctx.take(prep.Compare(low, width), n)
    (o,) = await ctx.doors.open_low(f"{step}/mask", low + width, x + c["r"])
    public = kernels.bit_slice(np.ascontiguousarray(o >> np.uint64(low)), width)  # (width, words)
    r = Bits(c["planes"].v, ctx.bk)
    sign = r[width - 1] ^ public[width - 1]
    less = r[: width - 1] & ~public[: width - 1]
    equal = ~(r[: width - 1] ^ public[: width - 1])
    level = 0
    while less.shape[0] > 1:
        odd = less.shape[0] % 2
        lo, hi = slice(odd, None, 2), slice(odd + 1, None, 2)
        a, b = await conjunction(ctx, f"{step}/tree {level}", (equal[hi], less[lo]), (equal[hi], equal[lo]))
        less, equal = (
            Bits(np.concatenate([less.v[:, :odd], (less[hi] ^ a).v], axis=1), ctx.bk),
            Bits(np.concatenate([equal.v[:, :odd], b.v], axis=1), ctx.bk),
        )
        level += 1
    return sign ^ less[0]


@dataclass(frozen=True, slots=True, eq=False)
class Piecewise:
    """A piecewise polynomial of an index of `bits` bits and a remainder of `rest` bits, above `low`
    dropped bits.

    tables[d] holds the coefficient of remainder^d for every index; the result has `scale` fraction bits.
    Extra tables (flags) are looked up and returned as they are.
    """

    low: int
    rest: int
    bits: int
    tables: Ring  # (degree + 1, 2^bits)
    flags: Ring  # (extra, 2^bits)
    scale: int

    @property
    def degree(self) -> int:
        return self.tables.shape[0] - 1

    @property
    def kind(self) -> prep.Lookup:
        return prep.Lookup(self.low, self.rest, self.bits, self.degree)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A value whose piece has been looked up: coefficients and remainder, ready to be evaluated."""

    shape: tuple[int, ...]
    coefs: Share  # (degree + 1, n)
    flags: list[Share]
    rest: Ring  # public part of the remainder; the remainder is rest - v
    material: dict[str, Share]


async def read_index(ctx: Context, step: str, *items: tuple[Share, Piecewise]) -> list[Read]:
    """Look each x up in its table: coefficients and flags, as shares. One round, 8 bytes.

    x must lie in [0, 2^(low + rest + bits) - 2^(low + rest) - 3 * 2^low); what lies outside reads another
    piece.
    A piece is read for remainders in (-2^rest, 2^rest) of its index.
    """
    cs = [ctx.take(p.kind, x.size) for x, p in items]
    sums = []
    for (x, p), c in zip(items, cs, strict=True):
        total = p.low + p.rest + p.bits
        sums.append((x.flat() + c["r"]) * (1 << (RING_BITS - total)))
    opened = await ctx.doors.open(step, *sums)
    out = []
    for (x, p), c, o in zip(items, cs, opened, strict=True):
        window = o >> np.uint64(RING_BITS - p.rest - p.bits)
        index = window >> np.uint64(p.rest)
        tables = np.concatenate([p.tables, p.flags])
        e = c["e"].v

        def local(e: Ring = e, index: Ring = index, tables: Ring = tables) -> Ring:
            return np.stack([kernels.lookup(np.ascontiguousarray(v), index, tables) for v in e])

        shape = (2, len(tables), x.size)
        looked = ctx.share(await ctx.compute(2 * len(tables) * (x.size << p.bits), local, shape))
        d = p.degree + 1
        flags = [looked[i].reshape(*x.shape) for i in range(d, len(tables))]
        out.append(Read(x.shape, looked[:d], flags, window & np.uint64((1 << p.rest) - 1), c))
    return out


async def evaluate(ctx: Context, step: str, reads: Sequence[Read]) -> list[Share]:
    """Evaluate the pieces that were read, all of one degree. One round, 8 bytes a degree.

    The remainder is t = rest - v. Powers of t are public combinations of powers of v, and their products with
    masks m_i are the same of m_i v^j; all of these are in the material. With delta_i = open(c_i + m_i) for
    each coefficient but the first, c_i t^i = delta_i t^i - m_i t^i.
    """
    degree = reads[0].coefs.shape[0] - 1
    coefs = concat([r.coefs for r in reads], axis=1)  # (degree + 1, n)
    poly = concat([r.material["poly"] for r in reads])  # (n, ..): see prep._powers
    (delta,) = await ctx.doors.open(step, coefs[1:].swap(0, 1) + poly[:, degree : 2 * degree])
    rest = np.concatenate([r.rest for r in reads])
    powers = [np.ones_like(rest)]
    for _ in range(degree):
        powers.append(powers[-1] * rest)
    at = {}  # t^i = sum over j of at[i, j] v^j
    for i in range(1, degree + 1):
        for j in range(i + 1):
            at[i, j] = powers[i - j] * constant(math.comb(i, j) * (-1) ** j)
    told = [sum(delta[:, i - 1] * at[i, j] for i in range(max(j, 1), degree + 1)) for j in range(degree + 1)]
    minus = [-at[i, j] for j in range(degree + 1) for i in range(max(j, 1), degree + 1)]
    value = coefs[0] + (poly * np.stack([*told[1:], *minus], axis=1)).sum(1) + told[0]
    out, first = [], 0
    for r in reads:
        count = len(r.rest)
        out.append(value[first : first + count].reshape(*r.shape))
        first += count
    return out


async def piecewise(ctx: Context, step: str, x: Share, piece: Piecewise) -> Share:
    """The piecewise polynomial of x, at the scale of the piece. Two rounds."""
    (value,) = await evaluate(ctx, f"{step}/evaluate", await read_index(ctx, f"{step}/index", (x, piece)))
    return value


def one_hot(ctx: Context, c: dict[str, Share], opened: Ring, bits: int) -> Share:
    """The prepared one-hot turned by a public offset: row i has its one at (opened - r) mod 2^bits. No
    round.
    """
    index = opened & np.uint64((1 << bits) - 1)
    return ctx.share(np.stack([kernels.rotate(np.ascontiguousarray(v), index) for v in c["e"].v]))


async def coarse_index(ctx: Context, step: str, x: Share, low: int, rest: int, bits: int) -> Share:
    """One-hot (*shape, 2^bits) of j, x / 2^(low + rest) within (j - 1 - 3 / 2^rest, j + 1), for x >= 0.

    Its components are meant modulo 2^16: sums of up to 2^16 - 1 of them count. One round.
    """
    c = ctx.take(prep.Lookup(low, rest, bits, 0, narrow=True), x.size)
    total = low + rest + bits
    (o,) = await ctx.doors.open(step, (x.flat() + c["r"]) * (1 << (RING_BITS - total)))
    return one_hot(ctx, c, o >> np.uint64(RING_BITS - bits), bits).reshape(*x.shape, 1 << bits)


async def argmax(ctx: Context, step: str, x: Share, low: int, width: int) -> tuple[Share, Share]:
    """Largest of x (n), divided by 2^low, and its index, exact ties of low = 0 to the lower index: two
    shares ().

    A tournament in groups: all pairs of a group are compared at once, the winner beats every other. While
    groups are pairs, values closer than 2^(low + 2) may tie, either way. Rounds: about 4 + log2(width) a
    level.
    """
    value, index = x, ctx.share(np.zeros_like(x.v)) + np.arange(x.shape[0], dtype=np.uint64)
    level = 0
    while value.shape[0] > 1:
        n = value.shape[0]
        size = _group(n)
        groups = n // size
        rest = n - groups * size
        name = f"{step}/level {level}"
        if size > 2 and low:
            # Three near-equal values compared with dropped bits could beat one another in a circle.
            (value,) = await truncate(ctx, f"{name}/exact", (value, low))
            low = 0
        v, i = value[: groups * size].reshape(groups, size), index[: groups * size].reshape(groups, size)
        if size == 2:
            lost = await _second_wins(ctx, name, v, low, width)  # (groups,)
            step_of = concat([(x[:, 1] - x[:, 0]).reshape(groups, 1) for x in (v, i)], axis=1)
            best = await scale(ctx, f"{name}/select", lost, step_of)
            best = best + concat([v[:, :1], i[:, :1]], axis=1)
        else:
            won = await _winners(ctx, name, v, low, width)  # (groups, size), one-hot rows
            both = concat([v.reshape(-1, 1), i.reshape(-1, 1)], axis=1)
            best = (await scale(ctx, f"{name}/select", won.flat(), both)).reshape(groups, size, 2).sum(1)
        value, index = (concat([best[:, j], x[n - rest :]]) for j, x in enumerate((value, index)))
        level += 1
    if low:
        (value,) = await truncate(ctx, f"{step}/exact", (value, low))
    return value[0], index[0]


def _group(n: int) -> int:
    """Group size of a tournament level: pairs while there are many, then wider, which costs fewer rounds."""
    for limit, size in ((12, n), (48, 6), (512, 4), (4096, 4)):
        if n <= limit:
            return size
    return 2


async def _second_wins(ctx: Context, step: str, v: Share, low: int, width: int) -> Share:
    """[first < second] of each row of v (groups, 2)."""
    groups = v.shape[0]
    padded = _whole_words(v[:, 0] - v[:, 1])
    lost = await is_negative(ctx, f"{step}/compare", padded, low, width)
    return (await to_ring(ctx, f"{step}/inject", lost, padded.shape[0]))[:groups]


def _whole_words(x: Share) -> Share:
    """Zeros after x (n) up to whole words of lanes."""
    more = 64 * words(x.shape[0]) - x.shape[0]
    return Share(np.pad(x.v, [(0, 0), (0, more)]), x.bk)


async def _winners(ctx: Context, step: str, v: Share, low: int, width: int) -> Share:
    groups, size = v.shape
    first, second = np.triu_indices(size, 1)
    pairs = len(first)
    differences = v[:, first] - v[:, second]  # (groups, pairs)
    n = groups * pairs
    # lanes ordered pair by pair, each pair padded to whole words, so that a pair is a row of words
    lanes = 64 * words(groups)
    padded = np.zeros((differences.v.shape[0], pairs, lanes), np.uint64)
    padded[:, :, :groups] = np.swapaxes(differences.v, 1, 2)
    assert n <= pairs * lanes
    lost = await is_negative(
        ctx, f"{step}/compare", ctx.share(padded.reshape(padded.shape[0], -1)), low, width
    )
    lost = Bits(lost.v.reshape(lost.v.shape[0], pairs, -1), ctx.bk)  # first < second
    beats: list[list[Bits]] = [[] for _ in range(size)]
    for p, (a, b) in enumerate(zip(first, second, strict=True)):
        beats[a].append(~lost[p])
        beats[b].append(lost[p])
    rows = [Bits(np.stack([b.v for b in row], axis=1), ctx.bk) for row in beats]  # (size - 1, words) each
    level = 0
    while rows[0].shape[0] > 1:
        odd = rows[0].shape[0] % 2
        joined = await conjunction(ctx, f"{step}/all {level}", *((r[odd::2], r[odd + 1 :: 2]) for r in rows))
        rows = [
            Bits(np.concatenate([r.v[:, :odd], j.v], axis=1), ctx.bk)
            for r, j in zip(rows, joined, strict=True)
        ]
        level += 1
    won = Bits(np.concatenate([r.v[:, 0] for r in rows], axis=1), ctx.bk)  # (size * words)
    ring = await to_ring(ctx, f"{step}/inject", won, size * lanes)
    return ring.reshape(size, lanes).swap(0, 1)[:groups]
