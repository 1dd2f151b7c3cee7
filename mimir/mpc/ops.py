"""Operations on shares: each takes fresh correlations, opens masked values, finishes locally.

Every message of these functions is an opening (see doors), so what comes out is right or the session has
ended. Costs are stated per element; `rounds` counts lockstep rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast

import numpy as np

from mimir import kernels
from mimir.errors import LocalError
from mimir.mpc import prep, waves
from mimir.mpc.branches import ask, side_by_side
from mimir.mpc.domain import HALF_BITS, RING_BITS, TRUNCATION_BITS, Ring, constant, words
from mimir.mpc.doors import Masked
from mimir.mpc.offload import offload
from mimir.mpc.prep import Kind, Weights
from mimir.mpc.share import Backend, Bits, Share, concat
from mimir.mpc.weights import product

T = TypeVar("T")
Beside: TypeAlias = Callable[["Context"], Coroutine[Any, Any, None]]  # a branch that shares a round


class Opening(Protocol):
    """What operations need of the doors."""

    async def open(self, step: str, *shares: Share) -> list[Ring]: ...

    async def open_bits(self, step: str, *shares: Bits) -> list[Ring]: ...

    async def open_low(self, step: str, width: int, *shares: Share) -> list[Ring]: ...

    async def open_all(self, step: str, requests: Sequence[Masked]) -> list[list[Ring]]: ...


class Material(Protocol):
    def take(self, kind: Kind, n: int, of: int = 0) -> dict[str, Ring]: ...


@dataclass(slots=True)
class Context:
    """Where an operation runs: the backend, the doors, this step's correlations, the weights."""

    bk: Backend
    doors: Opening
    store: Material
    weights: Weights

    def take(self, kind: Kind, n: int, of: int = 0) -> dict[str, Share]:
        """The next n of a kind; `of` tells whose, where they belong to one of several caches."""
        return {k: Share(v, self.bk) for k, v in self.store.take(kind, n, of).items()}

    async def compute(self, work: int, fn: Callable[[], T], shape: tuple[int, ...]) -> T:
        """Run a kernel, in a thread if it is long, so that the mesh keeps time. `shape` is that of its
        result.
        """
        return await offload(work, fn)

    def share(self, v: Ring) -> Share:
        return Share(v, self.bk)


class _Branch:
    """Doors of one branch of `together`: an opening suspends the branch until all branches want one."""

    async def open(self, step: str, *shares: Share) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_bits(self, step: str, *shares: Bits) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_low(self, step: str, width: int, *shares: Share) -> list[Ring]:
        return (await self.open_all(step, [Masked(shares, width)]))[0]

    async def open_all(self, step: str, requests: Sequence[Masked]) -> list[list[Ring]]:
        return await ask((step, requests))


def _joint_name(steps: Sequence[str]) -> str:
    """One name for a shared round: the first step's, and others without the path they share with it."""
    steps = list(dict.fromkeys(steps))
    path = steps[0][: steps[0].rfind("/") + 1]
    while not all(step.startswith(path) for step in steps):
        path = path[: path.rfind("/", 0, -1) + 1]
    shared = len(path)
    return " | ".join([steps[0], *(step[shared:] for step in steps[1:])])


async def together(ctx: Context, *branches: Callable[[Context], Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run branches side by side: the n-th opening of each shares one round, so the longest sets the rounds.

    Branches run one after another between rounds, in their order, so that every party takes the same
    correlations for the same purpose. A branch must not hand its context to an actor.
    """
    inner = replace(ctx, doors=_Branch())

    async def opened(asks: Mapping[int, Any]) -> dict[int, Any]:
        step = _joint_name([step for step, _ in asks.values()])
        flat = [r for _, requests in asks.values() for r in requests]
        values = iter(await ctx.doors.open_all(step, flat))
        return {i: [next(values) for _ in requests] for i, (_, requests) in asks.items()}

    return await side_by_side([branch(inner) for branch in branches], opened)


# What is truncated: x, how many bits f it loses, and `up` where its range is other than with up = 61.
Item: TypeAlias = tuple[Share, int] | tuple[Share, int, int]


async def truncate(ctx: Context, step: str, *items: Item) -> list[Share]:
    """Drop f < 62 bits of each (x, f), for |x| < 2^61 - 2^f - 2^(f - 15): x / 2^f with an error below 2 units
    (2 + 2^-14 for f > 16), mean 0. Of (x, f, up), f <= up < 62, x lies above -2^up and below 2^62 - 2^up by
    as much. One round; 8 bytes, or 80 - f bits for f > 16.

    c = open(x' + r), x' = x + 2^up - 2^f + 1, so that 0 <= x' <= 2^62. The mask is r = 2^62 u + v, u of two
    bits, v the sum of v_i < 2^62 over the integers: x' + v < 2^64 is c - 2^62 u + 2^64 k, where k can be
    nothing but [u > c >> 62]. With d < 3 * 2^f the sum of the low bits of the v_i, floor((x' + d) / 2^f) =
    (c >> f) - base + 2^(64-f) [u > c >> 62] exactly, `base` being the sum of the v_i >> f and 2^(62-f) u: no
    wrong value exists to be unlucky with. d is a public dither that centres the rounding.
    Of more than 16 bits the lowest are dropped from each component without a mask, and do not travel.
    """
    taken = [ctx.take(prep.Trunc(f), x.size) for x, f, *_ in items]
    c = _opened(await ctx.doors.open_all(step, _raised(items, taken)))
    base, over = (concat([p[name] for p in taken]).v for name in ("base", "over"))
    return _split(ctx.share(kernels.trunc(base, over, ctx.bk.one, c, _items(items))), items)


async def truncate_if(ctx: Context, step: str, bits: Bits, *items: Item) -> list[Share]:
    """`truncate` of each item where its bit is set, 0 elsewhere, also where x is out of range. The bits are
    words of lanes, those of the first x first. One round, 8 bytes and a bit an element.

    A truncated value is linear in `base` and `over` of its mask, and their products with a random bit are
    prepared; so bit and value are opened side by side.
    """
    taken = [ctx.take(prep.TruncIf(f), x.size) for x, f, *_ in items]
    ring, base, over, z = (concat([p[name] for p in taken]).v for name in ("ring", "base", "over", "z"))
    masked = Masked([Bits(kernels.bits_mask(bits.v, ring), ctx.bk)])
    *opened, (o,) = await ctx.doors.open_all(step, [*_raised(items, taken), masked])
    y = kernels.trunc_if((ring, base, over, z), ctx.bk.one, o, _opened(opened), _items(items))
    return _split(ctx.share(y), items)


async def truncate_rows(ctx: Context, step: str, x: Share, f: int) -> tuple[Share, Share]:
    """`truncate` x (n, d), and the sums (n) of the squares of what comes out: one round and 8 bytes an
    element for both, which is exact, as both are sums of products with what was prepared, element by element.

    With g that one of `over` which counts, (a - base + b g)^2 = a^2 - 2 a base + base^2 + 2 b (a g - base g)
    + b^2 g, as g^2 = g.
    """
    c = ctx.take(prep.Norm(x.shape[1], f), x.shape[0])
    ((o,),) = await ctx.doors.open_all(step, _raised([(x, f)], [{"r": c["r"].flat()}]))
    material = (c["base"].v, c["over"].v, c["both"].v, c["q"].v)
    rows, squares = kernels.norm(material, ctx.bk.one, o.reshape(x.shape), f, prep.unmasked_bits(f))
    return ctx.share(rows), ctx.share(squares)


def _raised(items: Sequence[Item], taken: Sequence[dict[str, Share]]) -> list[Masked]:
    """What truncations open: x, raised to be positive, under its mask, without the bits that are not masked.

    Components lose those bits, which is made up for in the mean.
    """
    x, r = concat([x.flat() for x, *_ in items]), concat([p["r"] for p in taken])
    v = Share(kernels.trunc_mask(x.v, r.v, x.bk.one, _items(items)), x.bk)
    out, at = [], 0
    for x, f, *_ in items:
        out.append(Masked([v[at : at + x.size]], RING_BITS - prep.unmasked_bits(f)))
        at += x.size
    return out


def _items(items: Sequence[Item]) -> list[tuple[int, int, int, int]]:
    """What kernels ask of truncations: how many elements, bits to drop, of these not masked, and `up`."""
    return [(x.size, f, prep.unmasked_bits(f), up[0] if up else TRUNCATION_BITS) for x, f, *up in items]


def _opened(values: Sequence[Sequence[Ring]]) -> Ring:
    return values[0][0] if len(values) == 1 else np.concatenate([c for (c,) in values])


def _split(y: Share, items: Sequence[Item]) -> list[Share]:
    out, at = [], 0
    for x, *_ in items:
        out.append(y[at : at + x.size].reshape(*x.shape))
        at += x.size
    return out


async def matmul(
    ctx: Context,
    step: str,
    *factors: tuple[Share, str],
    low: int | None = None,
    beside: Beside | None = None,
) -> Share:
    """The sum over (x, name) of x (n, k) times the shared weight matrix `name` (k, m): (n, m) at the sum of
    the scales. One round, 8 bytes an element of x. `beside` is a branch of one round that shares it.

    With `low`, of matrices that are shared modulo 2^32: x loses so many bits, up to 1.5 units of what is
    left, and the product modulo 2^32 comes out times 2^32, as a ring element. 4 bytes.
    """
    if beside is not None:
        y, _ = await together(ctx, lambda ctx: matmul(ctx, step, *factors, low=low), beside)
        return cast(Share, y)
    lane = RING_BITS if low is None else HALF_BITS
    taken = [ctx.take(prep.Weight(name, lane), x.shape[0]) for x, name in factors]
    fitting = [x if low is None else lower(x, low, HALF_BITS) for x, _ in factors]
    shown = [x + c["x"] for x, c in zip(fitting, taken, strict=True)]
    opened = await ctx.doors.open_low(step, lane, *shown)
    pairs = [ctx.weights.pair(name) for _, name in factors]
    n, m = shown[0].shape[0], pairs[0][0].shape[1]

    def local() -> Ring:
        y = np.empty((2, n, m), prep.WORDS[lane])
        for at, (delta, w) in enumerate(zip(opened, pairs, strict=True)):
            d = delta.astype(y.dtype, copy=False)
            for i in range(2):
                product(d, w[i], y[i], add=at > 0)
        for c in taken:
            y -= c["z"].v
        return y if lane == RING_BITS else y.astype(np.uint64) << np.uint64(RING_BITS - lane)

    return ctx.share(await ctx.compute(2 * sum(x.size for x in shown) * m, local, (2, n, m)))


def lower(x: Share, low: int, width: int = RING_BITS) -> Share:
    """x, of either sign, without `low` bits, modulo 2^(64 - low) or 2^width: within 1.5 units of x / 2^low,
    in the mean there. No round.
    """
    return drop(x - 3 * ((1 << low) - 1) // 2, low, min(width, RING_BITS - low))


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


@lru_cache(maxsize=256)
def _products(kind: prep.Ands) -> kernels.Products:
    """Of each monomial, where the planes of its subsets lie, the empty one left out, in binary order."""
    at = {s: i for i, s in enumerate(kind.subsets)}
    return kernels.Products(
        [
            (m, [at[tuple(v for j, v in enumerate(m) if mask >> j & 1)] for mask in range(1, 1 << len(m))])
            for m in kind.monomials
        ]
    )


async def monomials(ctx: Context, step: str, wanted: tuple[tuple[int, ...], ...], bits: Bits) -> Bits:
    """Products over GF(2) of rows of words of bits (variables, n), one for each set of variables wanted:
    (sets, n).

    One round, a bit a variable, however many are multiplied. With o_j = open(b_j ^ x_j) the product of the
    b_j = o_j ^ x_j is a public combination of the prepared products of the x_j.
    """
    kind = prep.Ands(wanted)
    planes = ctx.take(kind, bits.shape[1])["planes"].v
    (o,) = await ctx.doors.open_bits(step, bits ^ Bits(planes[:, : bits.shape[0]], ctx.bk))
    return Bits(kernels.bits_products(planes, ctx.bk.one, o, _products(kind)), ctx.bk)


async def to_ring(ctx: Context, step: str, bits: Bits, n: int) -> Share:
    """Words of bits (w) as n ring elements 0 or 1. One round, one bit each."""
    ring = ctx.take(prep.DaBit(), n)["ring"].v
    (o,) = await ctx.doors.open_bits(step, Bits(kernels.bits_mask(bits.v, ring), ctx.bk))
    return ctx.share(kernels.ring_unmask(ring, ctx.bk.one, o))


def low_bits(x: Share) -> Bits:
    """The lowest bits of each row of x (.., n), as words (.., words): those of its components share them over
    GF(2). No round.
    """
    return Bits(kernels.ring_lsb(np.ascontiguousarray(x.v)), x.bk)


def lanes(bits: Bits, n: int) -> Share:
    """The first n lanes of rows of words of bits (k, w), each in the low bit of a word: (k, n). No round."""
    return Share(kernels.bits_to_ring(np.ascontiguousarray(bits.v[:, :, : words(n)]), n), bits.bk)


def joined(rows: Bits, n: int) -> Bits:
    """Words of the first n lanes of each row of words (k, w), one row after another. No round."""
    return low_bits(lanes(rows, n).flat())


async def pick(
    ctx: Context, step: str, bits: Bits, x: Share, widths: Sequence[int], lane: int
) -> tuple[Share, Share]:
    """x (n, m) where all of some bits are set, 0 elsewhere, for rows of words of bits (flags, w); and the
    product of the bits as ring elements (n). Both are meant modulo 2^lane, and x modulo 2^width, column by
    column; no width is above lane.

    One round, `width` bits an element and `flags` bits a row. A product of opened bits xor random ones is a
    public combination of products of the random ones, of which each subset was prepared, also times the mask.
    """
    n, m = x.shape
    flags = bits.shape[0]
    w = ctx.take(prep.Pick(m, flags, lane), n)["w"].v
    masks = [np.ascontiguousarray(w[:, :, ((m + 1) << f) - 1]) for f in range(flags)]
    shown = np.stack([kernels.bits_mask(bits[f].v, mask) for f, mask in enumerate(masks)], axis=1)
    asked = [Masked([Bits(shown, ctx.bk)])]
    asked += [Masked([x[:, j] + Share(w[:, :, j], ctx.bk)], width) for j, width in enumerate(widths)]
    (o,), *columns = await ctx.doors.open_all(step, asked)
    delta = np.stack([column for (column,) in columns], axis=1)
    found = ctx.share(kernels.ring_pick(w, ctx.bk.one, delta, o))
    return found[:, 1:], found[:, 0]


def drop(x: Share, low: int, width: int) -> Share:
    """x, for 0 <= x < 2^(low + width), without `low` bits, modulo 2^width: 0 to 3 units above x / 2^low, or
    x itself if low is 0. No round.

    Each component loses its low bits, x having been raised by as much as three of them can lose. What comes
    out is one number, however often it is used.
    """
    return Share(kernels.drop(x.flat().v, x.bk.one, (low,), width), x.bk).reshape(*x.shape)


ROUND_TRIP: Final = 20.0  # ms between the parties, if nothing else is said
APART: Final = 5.0  # ms from which on rounds are saved, at the price of more preprocessing


DIGIT: Final = 5  # bits of a digit: with 4 or 6 a comparison takes more ANDs
MOST_DIGITS: Final = 7  # products of more bits take more than larger digits do


def digits(width: int) -> tuple[int, ...]:
    """Sizes of the digits into which a number of so many bits is cut."""
    count = min(-(-width // DIGIT), MOST_DIGITS)
    return tuple(width // count + (i < width % count) for i in range(count))


async def is_zero(ctx: Context, step: str, x: Share, bits: int, lane: int) -> Share:
    """[x = 0] for x (n) in 0 .. 2^bits - 1, modulo 2^lane. One round, 4 bytes."""
    c = ctx.take(prep.Lookup(0, bits, lane), x.size)
    (o,) = await ctx.doors.open_low(step, bits, x + c["r"])
    return Share(c["e"].v[:, np.arange(x.size), o].astype(np.uint64), ctx.bk)


async def are_zero(ctx: Context, step: str, x: Share, bits: int) -> Bits:
    """[x = 0] for x (n) in 0 .. 2^bits - 1, as words: 2^bits bits instead of numbers are prepared for each.
    One round, 4 bytes.
    """
    c = ctx.take(prep.Digits((bits,)), x.shape[0])
    (o,) = await ctx.doors.open_low(step, bits, x + c["r"])
    return Bits(_chosen(c["planes"].v, o), ctx.bk)


def _chosen(planes: Ring, row: Ring) -> Ring:
    """Bit `row[i]` (public) of lane i of planes (components, rows, words), packed: (components, words)."""
    return np.stack([kernels.bit_pick(np.ascontiguousarray(v), row) for v in planes])


async def _at_most(
    ctx: Context, step: str, planes: Ring, sizes: Sequence[int], publics: Sequence[Ring]
) -> list[Bits]:
    """[r <= k] for each public k (n), r by the one-hots of its digits. One round; none for a single digit.

    r <= k if the highest digit that differs is less, or none differs: each of these cases is a product.
    """
    count = len(sizes)
    rows = kernels.bits_at_most(planes, sizes, np.stack(publics))
    result = Bits(rows[:, 0], ctx.bk)  # the highest digit
    if count > 1:
        variables = Bits(rows[:, 1:], ctx.bk).reshape(2 * count - 2, -1)
        products = await monomials(ctx, step, _lesser(count), Bits(variables.v, ctx.bk))
        either = np.bitwise_xor.reduce(products.v, axis=1).reshape(result.v.shape)
        result = Bits(result.v ^ either, ctx.bk)
    return [result[i] for i in range(len(publics))]


def _lesser(count: int) -> tuple[tuple[int, ...], ...]:
    """The cases in which a number of so many digits is less, below the highest one, as products of: equal,
    from the highest digit but the lowest; then less, from the second highest digit.
    """
    return tuple((*range(i), count - 2 + i) for i in range(1, count))


async def are_below(
    ctx: Context,
    step: str,
    x: Share,
    low: int,
    rest: int,
    sizes: tuple[int, ...],
    thresholds: Sequence[int],
) -> list[Bits]:
    """For each t [x < t * 2^(low + rest)], for x (n) in 0 .. 2^(low + rest + bits) - 2^(low + rest) - 3 *
    2^low, as words, where x is not within 2^(low + rest) + 3 * 2^low below that: there, either. `sizes` are
    those of the digits, the lowest first, that the bits are cut into. One round, rest + bits bits; two with
    more than one digit, for which less is prepared.

    The opened value's upper bits, less the mask's, are those of x or one more, as the lower ones carry. 0 < t
    < 2^bits: x < t if the mask's lie within the t values up to the opened ones, modulo 2^bits.
    """
    bits = sum(sizes)
    c = ctx.take(prep.Digits(sizes, rest), x.shape[0])
    (o,) = await ctx.doors.open_low(step, rest + bits, drop(x, low, rest + bits) + c["r"])
    upper = o >> np.uint64(rest)
    below = [(upper - np.uint64(t)) & np.uint64((1 << bits) - 1) for t in thresholds]
    first, *others = await _at_most(ctx, step, c["planes"].v, sizes, [upper, *below])
    return [
        first ^ other ^ kernels.ring_lsb((upper < np.uint64(t)).astype(np.uint64))
        for other, t in zip(others, thresholds, strict=True)
    ]


async def is_negative(ctx: Context, step: str, x: Share, low: int, width: int) -> Bits:
    """[x < 0] for x (n), as words; -3 * 2^low < x < 0 may be taken for zero, x >= 0 never for negative.

    |x| < 2^(low + width - 1) - 3 * 2^low. c = open(x + r); with the digits of r shared, the sign is
    top(c) ^ top(r) ^ [c' < r'] of the lower bits. Two rounds; 4 bytes to a width of 32, else 8, and two bits
    a digit.
    """
    sizes = digits(width - 1)
    c = ctx.take(prep.Digits((*sizes, 1)), x.shape[0])
    (o,) = await ctx.doors.open_low(f"{step}/mask", width, drop(x, low, width) + c["r"])
    planes = c["planes"].v
    lower = o & np.uint64((1 << (width - 1)) - 1)
    (at_most,) = await _at_most(ctx, f"{step}/digits", planes[:, :-2], sizes, [lower])
    top = kernels.ring_lsb(np.ascontiguousarray(o >> np.uint64(width - 1)))
    return ~at_most ^ top ^ Bits(planes[:, -1], ctx.bk)


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
    def kind(self) -> prep.Pieces:
        return prep.Pieces(self.rest, self.bits, self.degree)


@lru_cache(maxsize=64)
def _turned(*pieces: Piecewise) -> Ring:
    """The tables and flags of pieces as `kernels.pieces` wants them."""
    tables = np.stack([np.concatenate([p.tables, p.flags]) for p in pieces])
    back = np.concatenate([tables[:, :, :1], tables[:, :, :0:-1]], axis=2)
    return np.concatenate([back, back], axis=2)


async def read(ctx: Context, step: str, x: Share, *pieces: Piecewise) -> tuple[Share, Share]:
    """Evaluate each piecewise polynomial at x (n): values (pieces, n), and flags (flags, pieces, n). One
    round, 4 bytes a piece up to 32 bits of index and remainder, else 8.

    The pieces have equal shapes. x must lie in [0, 2^(low + rest + bits) - 2^(low + rest) - 3 * 2^low); what
    lies outside reads another piece. What is read is 0 to 3 units of 2^low above x, 1.5 in the mean.
    A piece is read for remainders in (-2^rest, 2^rest) of its index.

    With c = x + r opened, r = 2^rest u + v, the index is c_hi - u and the remainder c_lo - v. Where u points,
    powers of v were prepared, and what each is multiplied by is public for every place.
    """
    p, count, n = pieces[0], len(pieces), x.size
    width = p.rest + p.bits
    c = ctx.take(p.kind, count * n)
    dropped = kernels.drop(x.v, ctx.bk.one, [piece.low for piece in pieces], width)
    (o,) = await ctx.doors.open_low(step, width, ctx.share(dropped).flat() + c["r"])
    turned, flags = _turned(*pieces), len(p.flags)
    e, told = c["e"].reshape(count, n, p.degree + 1, 1 << p.bits).v, o.reshape(count, n)
    work = (p.degree + 3) * e.size
    found = ctx.share(
        await ctx.compute(
            work, lambda: kernels.pieces(e, told, turned, p.rest, flags), (2, 1 + flags, count, n)
        )
    )
    return found[0], found[1:]


async def choose(ctx: Context, step: str, bits: Share, x: Share, drops: Sequence[int]) -> Share:
    """Of values x (n, count) that one of which the last of bits (n, count - 1), shares of 0 or 1, is set, or
    the first if none is, without as many low bits as `drops` says, in its place, and 0 in the others: (n,
    count). As `truncate`, one round, 8 bytes or less a value and a bit.

    Each bit is for the value after the first that has its number. What is not chosen may be out of range. A
    truncated value is linear in `base` and `over` of its mask, of which vectors were prepared that have them
    at a random place and 0 elsewhere; the bits that are opened tell which place means that it is chosen.
    """
    c = ctx.take(prep.Select(tuple(drops)), x.shape[0])
    columns = [_raised([(x[:, w], f)], [{"r": c["r"][:, w]}]) for w, f in enumerate(drops)]
    shown = kernels.bits_mask(low_bits(bits.flat()).v, np.ascontiguousarray(c["ring"].flat().v))
    told, *opened = await ctx.doors.open_all(step, [Masked([Bits(shown, ctx.bk)]), *(m for (m,) in columns)])
    values = np.stack([value for (value,) in opened], axis=1)
    bare = [(f, prep.unmasked_bits(f)) for f in drops]
    return ctx.share(kernels.choose(c["hot"].v, c["z"].v, told[0], values, bare))


@dataclass(frozen=True, slots=True)
class Wave:
    """A sum of cosines: constant + sum of amplitude * cos(2 pi turns x / 2^(low + bits)), with `scale`
    fraction bits.
    """

    low: int  # bits that are dropped of what is read
    bits: int
    turns: tuple[int, ...]
    amplitudes: tuple[float, ...]
    constant: float
    scale: int
    unit: int = prep.UNIT_SCALE  # fraction bits of what masks are made of; see prep.Wave

    @property
    def kind(self) -> prep.Wave:
        return prep.Wave(self.bits, self.turns, self.unit)


async def wave(ctx: Context, step: str, x: Share, w: Wave) -> Share:
    """The sum of cosines of x (n). One round, `bits` bits; what is read is 0 to 3 units of 2^low above x, 1.5
    in the mean, for which the phase makes up.

    cos(c - r) = cos c cos r + sin c sin r: of the opened value c everybody knows cos and sin, and of the mask
    r shares were prepared.
    """
    c = ctx.take(w.kind, x.size)
    (o,) = await ctx.doors.open_low(step, w.bits, drop(x.flat(), w.low, w.bits) + c["r"])
    y = ctx.share(kernels.wave(c["waves"].v, o, _cosines(w)))
    return (y + constant(round(w.constant * 2.0**w.scale))).reshape(*x.shape)


@lru_cache(maxsize=16)
def _cosines(w: Wave) -> kernels.Cosines:
    """Each cosine is turned back by the mean excess of what is read."""
    excess = 1.5 * (1 - 2.0**-w.low)
    back = np.array([(-k * excess * 2.0**-w.bits) % 1.0 for k in w.turns])
    terms = np.array([*waves.circle(back), np.ldexp(w.amplitudes, w.scale - 3 * w.kind.scales)])
    return kernels.Cosines(np.array(w.turns, np.uint64), w.bits, terms, waves.CIRCLE)


async def decay(
    ctx: Context, step: str, x: Share, low: int, kind: prep.Decay, start: float, scale: int
) -> Share:
    """e^(start + w x / 2^(low + rest)) at `scale`, w the `width` of `kind`, for x (n) in 0 .. (2^bits - 3)
    2^(low + rest); elsewhere something else. One round, rest + bits bits. What is read is 0 to 3 units of
    2^low above x, for which `start` must make up.

    With c = x + r opened, r = 2^rest u + v, the upper bits of c, less u, and the lower ones, less v, give x
    whatever carries: where u points, e^-v was prepared, and what it lacks is public for every place.
    """
    c = ctx.take(kind, x.size)
    (o,) = await ctx.doors.open_low(
        step, kind.rest + kind.bits, drop(x.flat(), low, kind.rest + kind.bits) + c["r"]
    )
    return ctx.share(kernels.decay(c["e"].v, o, _bins(kind, start, scale))).reshape(*x.shape)


@lru_cache(maxsize=16)
def _bins(kind: prep.Decay, start: float, scale: int) -> kernels.Bins:
    """Of the middle of each bin the exponential; within it y goes from minus to plus half a bin."""
    middles = [waves.power(start + kind.width * (j - 1)) for j in range(1 << kind.bits)]
    bins = np.ldexp(middles, scale - 3 * prep.FACTOR_SCALE)
    return kernels.Bins(bins, kind.rest, kind.width * 2.0**-kind.rest, kind.width / 2, waves.EXP)


def one_hot(ctx: Context, c: dict[str, Share], opened: Ring, bits: int) -> Share:
    """The prepared one-hot turned by a public offset: row i has its one at (opened - r) mod 2^bits. No
    round.
    """
    index = opened & np.uint64((1 << bits) - 1)
    return ctx.share(kernels.rotate(np.ascontiguousarray(c["e"].v), index))


def counting_lane(most: int) -> int:
    """The fewest bits for the numbers that one-hots are made of, if sums of up to `most` of them shall count:
    8 up to 255, 16 up to 65,535, else 64.
    """
    return next(lane for lane in prep.LANES if most < 1 << lane)


async def coarse_index(ctx: Context, step: str, x: Share, low: int, rest: int, bits: int, lane: int) -> Share:
    """One-hot (*shape, 2^bits) of j, x / 2^(low + rest) within (j - 1 - 3 / 2^rest, j + 1), for x >= 0.

    Its components are meant modulo 2^lane: sums of up to 2^lane - 1 of them count. One round.
    """
    c = ctx.take(prep.Lookup(rest, bits, lane), x.size)
    (o,) = await ctx.doors.open_low(step, rest + bits, drop(x.flat(), low, rest + bits) + c["r"])
    return one_hot(ctx, c, o >> np.uint64(rest), bits).reshape(*x.shape, 1 << bits)


async def argmax(
    ctx: Context, step: str, x: Share, low: int, width: int, round_trip: float = ROUND_TRIP
) -> tuple[Share, Share]:
    """Largest of x (n), and its index, modulo 2^INDEX_BITS: two shares (). The largest is divided by 2^low,
    and meant modulo 2^width (`lift` gives it in the ring).

    x loses `low` bits before it is compared, so values closer than 3 * 2^low may go either way; what is left
    is compared exactly, ties to the lower index. Of more than a hundred values or so the first are compared
    more coarsely, see `Level.coarser`, and ties go anywhere. Differences are below 2^(low + width - 1) - 3 *
    2^(low + coarser).

    A tournament in groups: all pairs of a group are compared at once, the winner beats every other. Rounds: 3
    a level, and one for each product of bits that it takes before the winner is picked; how many levels
    follows from the round trip between the parties, in ms.
    """
    levels = tournament(x.shape[0], round_trip)
    if x.shape[0] > 1 << INDEX_BITS:
        raise LocalError(f"the largest of {x.shape[0]:,} values: at most 2^{INDEX_BITS} have an index")
    if width < CHOICE_WIDTH and any(level.coarser for level in levels):
        raise LocalError(f"so many values are compared at {CHOICE_WIDTH} bits or more, not at {width}")
    value, index = drop(x, low, width), None
    lane = max(INDEX_BITS, -(-width // 8) * 8)
    for number, level in enumerate(levels):
        n, size = value.shape[0], level.size
        groups = n // size
        name, last = f"{step}/level {number}", size - 1
        apart = groups if level.coarser else 1  # between members of a group

        def grouped(v: Share, groups: int = groups, size: int = size, apart: int = apart) -> Share:
            inside = v[: groups * size]
            return inside.reshape(groups, size) if apart == 1 else inside.reshape(size, groups).swap(0, 1)

        v, i = grouped(value), None if index is None else grouped(index)  # indices are public at first
        flags = await _winners(ctx, name, v, width, level)
        steps = [(w[:, :-1] - w[:, -1:]).reshape(groups * last, 1) for w in (v, i) if w is not None]
        widths = (width, INDEX_BITS)[: len(steps)]
        best, won = await pick(ctx, f"{name}/pick", flags, concat(steps, axis=1), widths, lane)
        best = best.reshape(groups, last, len(steps)).sum(1)
        value_to = v[:, -1] + best[:, 0]
        if i is not None:
            index_to = i[:, -1] + best[:, 1]
        else:
            first = np.arange(groups, dtype=np.uint64) * np.uint64(1 if level.coarser else size)
            back = np.arange(size - 1, 0, -1, dtype=np.uint64) * np.uint64(apart)  # from the last of a group
            index_to = (won.reshape(groups, last) * (np.uint64(0) - back)).sum(1) + (first + back[0])
        left = np.arange(groups * size, n, dtype=np.uint64)  # have no group, and go on
        rest = index[groups * size :] if index is not None else value[groups * size :] * 0 + left
        value, index = concat([value_to, value[groups * size :]]), concat([index_to, rest])
    if index is None:  # of one
        index = value * 0
    return value[0], index[0]


async def lift(ctx: Context, step: str, x: Share, width: int) -> Share:
    """x, meant modulo 2^width and signed, |x| < 2^(width - 3) - 2, as a ring element to within 2 units. One
    round.
    """
    up = RING_BITS - width
    return (await truncate(ctx, step, (x * (1 << up), up)))[0]


INDEX_BITS: Final = 24  # of the numbers modulo which an index is found

# What a tournament is chosen by, in bytes: a gate, a product and an injected bit, with the processor time of
# all three parties for preparing them, 6 bytes a microsecond; and a round as its round trip at 100 Mbit/s;
# where parties are apart as ROUND_TRIP at least, and, until there are few enough rounds, more.
_GATE_BYTES: Final = 0.16
_PRODUCT_BYTES: Final = 4
_BIT_BYTES: Final = 5.5
_ROUND_BYTES: Final = 12_500  # a ms, and at least
_DEARER: Final = (1, 2, 4)
_FEW_ROUNDS: Final = 16
_GROUPS: Final = (2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 19, 25, 33)  # sizes that are tried
_WHOLE: Final = 256  # up to so many values may be one group
_PRODUCT: Final = 10  # bits of a product at most: every subset of them is prepared
_FLAGS: Final = 3  # bits by which a value is picked at most
CHOICE_WIDTH: Final = 20  # of the values of a tournament, at least if there are many
_COARSE_BITS: Final = 12  # that are left of a value at least


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a tournament: `size` values of each group are compared, and whether one beats all others
    is a product of size - 1 bits. It is taken in rounds, of so many factors each as `products` says, until
    `flags` bits are left, all of which are set if it wins.

    `coarser` bits more are dropped before values are compared, so that those closer than 3 * 2^coarser may go
    either way. Of n values in groups of g the largest one meets the next by a chance of g / n, and coarser is
    at most log2(n / g) - 5: three such levels, or all, add a tenth to how often the next one wins because
    values are rounded, and the seven of parties on one site a fifth. Members of a group are far apart then,
    since neighbours may have to do with one another, as the tokens of digits do.
    """

    size: int
    flags: int
    products: tuple[int, ...]
    coarser: int

    @property
    def rounds(self) -> int:
        return 3 + len(self.products)


def _coarser(n: int, size: int) -> int:
    return min(max(0, (n // size).bit_length() - 6), CHOICE_WIDTH - _COARSE_BITS)


def _ways(n: int, size: int) -> Iterator[Level]:
    """How the winners of groups may be found."""
    bits, coarser = size - 1, _coarser(n, size)
    for flags in range(1, min(bits, _FLAGS) + 1):
        each = -(-bits // flags)
        root = math.isqrt(each - 1) + 1
        for products in ((), (each,), (root, -(-each // root))):
            if math.prod(products) * flags >= bits and all(1 < p <= _PRODUCT for p in products):
                yield Level(size, flags, products, coarser)


def _level_cost(n: int, level: Level, first: bool, round_bytes: int) -> float:
    groups, beaten = n // level.size, level.size - 1
    width = CHOICE_WIDTH - level.coarser
    variables = 2 * len(digits(width - 1)) - 2
    pairs = groups * level.size * beaten / 2
    cost = pairs * (_comparison_ands(width) * _GATE_BYTES + (width + variables) / 8)
    lanes = level.flags * math.prod(level.products)
    for factors in level.products:
        cost += groups * beaten * lanes / 8  # opened
        lanes //= factors
        cost += groups * beaten * lanes * ((1 << factors) - 1 - factors) * _GATE_BYTES
    columns = 1 if first else 2
    products = (columns + 1 << level.flags) - 1 - columns - level.flags
    picked = products * _PRODUCT_BYTES + level.flags * (_BIT_BYTES + 1 / 8) + columns * CHOICE_WIDTH / 8
    return cost + groups * beaten * picked + level.rounds * round_bytes


@lru_cache(maxsize=4096)
def _cheapest(n: int, first: bool, round_bytes: int) -> tuple[float, tuple[Level, ...]]:
    if n == 1:
        return 0, ()
    options = []
    for size in sorted({s for s in _GROUPS if s < n} | ({n} if n <= _WHOLE else set())):
        ways = ((_level_cost(n, way, first, round_bytes), way) for way in _ways(n, size))
        here, level = min(ways, key=lambda found: found[0])
        rest, levels = _cheapest(n - n // size * (size - 1), False, round_bytes)
        options.append((here + rest, (level, *levels)))
    return min(options, key=lambda found: found[0])


@lru_cache(maxsize=64)
def tournament(n: int, round_trip: float = ROUND_TRIP) -> tuple[Level, ...]:
    """The levels in which the largest of n is found, for parties so many ms apart, there and back."""
    apart = round_trip >= APART
    round_bytes = round(_ROUND_BYTES * max(round_trip, ROUND_TRIP if apart else 1.0))
    for times in _DEARER if apart else (1,):
        _, levels = _cheapest(n, True, times * round_bytes)
        if sum(level.rounds for level in levels) <= _FEW_ROUNDS:
            break
    return levels


@lru_cache(maxsize=64)
def _comparison_ands(width: int) -> int:
    """ANDs that are prepared for the sign of a number of so many bits (`is_negative`)."""
    sizes = digits(width - 1)
    hot = sum((1 << size) - 2 for size in sizes)
    added, span = 2 * width - 3, 1
    while span < width - 1:
        high = [i for i in range(width - 1) if i & span]
        added += len(high) + sum(i >= 2 * span for i in high)
        span *= 2
    kind = prep.Ands(_lesser(len(sizes)))
    return hot + added + (len(kind.subsets) - (2 * len(sizes) - 2) if len(sizes) > 1 else 0)


async def _signs(ctx: Context, step: str, x: Share, width: int) -> Bits:
    """[x < 0], exactly, as words, for x (n) meant modulo 2^width; any n."""
    return await is_negative(ctx, step, _whole_words(x), 0, width)


def _whole_words(x: Share) -> Share:
    """Zeros after x (n) up to whole words of lanes."""
    more = 64 * words(x.shape[0]) - x.shape[0]
    return Share(np.pad(x.v, [(0, 0), (0, more)]), x.bk)


async def _winners(ctx: Context, step: str, v: Share, width: int, level: Level) -> Bits:
    """Bits of each but the last of a row of v (groups, size), meant modulo 2^width, all of which are set if
    it beats all others: (flags, words of groups * (size - 1) lanes).
    """
    groups, size = v.shape
    first, second = np.triu_indices(size, 1)
    width -= level.coarser
    v = drop(v, level.coarser, width)
    lost = await _signs(ctx, f"{step}/compare", (v[:, first] - v[:, second]).flat(), width)
    lost_first = lanes(Bits(lost.v[:, None], ctx.bk), groups * len(first))[0].reshape(groups, len(first))
    pair = np.zeros((size, size), np.int64)
    pair[first, second] = pair[second, first] = np.arange(len(first))
    others = np.array([[b for b in range(size) if b != a] for a in range(size - 1)])
    # A product of more bits than there are has some of them twice.
    others = others[:, np.minimum(np.arange(level.flags * math.prod(level.products)), size - 2)]
    own = np.arange(size - 1)[:, None]
    # What each element does to each of the others, in the low bit: (bits, groups * (size - 1)).
    beats = lost_first[:, pair[own, others]] + (others > own).astype(np.uint64)
    rows = beats.reshape(groups * (size - 1), -1).swap(0, 1)
    for number, factors in enumerate(level.products):
        rows = rows.reshape(factors, -1)
        name = f"{step}/all {number}"
        product = await monomials(ctx, name, (tuple(range(factors)),), low_bits(rows))
        rows = lanes(product, rows.shape[1])
    return low_bits(rows.reshape(level.flags, -1))
