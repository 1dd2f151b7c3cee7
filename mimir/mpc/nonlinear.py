"""Non-linear functions: activation, softmax attention weights, reciprocal, root-mean-square norm.

Activations are sums of cosines, which have addition theorems as exponentials do: such functions of c - r are
made of functions of the opened c, and of those of the mask r (ops.wave, ops.decay). Reciprocal and inverse
root see many orders of magnitude: they are piecewise polynomials read in a ladder of windows some octaves
apart, and the highest window that is not empty is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from mimir.errors import LocalError
from mimir.mpc import ops, prep
from mimir.mpc.domain import RING_BITS, Ring, encode
from mimir.mpc.ops import Context, Piecewise
from mimir.mpc.share import Bits, Share, concat

Real = npt.NDArray[np.floating[Any]]
T = TypeVar("T")

WAVE_UNIT: Final = 14  # fraction bits to which an activation's input is read
WAVE_PERIOD: Final = 11  # every cosine of an activation has a period of 2^11 divided by an integer
ACTIVATION_BOUND: Final = 250.0  # of an activation's input
RELU_BOUND: Final = 2**11  # of ReLU's
EXP_BITS: Final = 4  # of the index
EXP_REST: Final = 13
EXP_STRETCH: Final = 25, 5  # scores are read times 25 / 2^5, so that a bin is 2
EXP_WIDTH: Final = 2.56  # of a bin
EXP_RANGE: Final = ((1 << EXP_BITS) - 3) * EXP_WIDTH  # exp is read on [-EXP_RANGE, 0)
EXP: Final = prep.Decay(EXP_REST, EXP_BITS, EXP_WIDTH)
EXP_ROOM: Final = 61  # fraction bits of what is at most 1 and is truncated next
EXP_REACH: Final = 23.5  # further below the shift a weight, less than e^-23.5, may be taken for 0
REACH_REST: Final = 4  # that is told in bins of 2^4 halves, so that it is 0 from EXP_REACH + 8 + 3 / 2 on
REACH_FROM: Final = 123  # the first bin that counts; the last but one must stay in reach of the carry
REACH_LIFT: Final = REACH_FROM * 8 + EXP_REACH
REACH_BITS: Final = 7  # in so many bits
ACTIVE_BITS: Final = 9  # a reading of whole numbers tells where in 2^9 of them an activation's input lies
ACTIVE_REST: Final = 5  # fraction bits of that
CHOSEN_SCALE: Final = 54  # of an activation that is chosen before it is truncated: it is below 2^8,
CHOSEN_ABOVE: Final = CHOSEN_SCALE - 1  # and above -1/2; so is what its cosines give,
CHOSEN_UNIT: Final = 13  # for which their masks have a bit less a component
CHOSEN_LANE: Final = 48  # bits of a value that is chosen
COARSE_BIN: Final = 2  # log2 of the resolution of the row maximum
COARSE_BITS: Final = 7
COARSE_REST: Final = 4
COARSE_LANE: Final = 8  # the maximum's bin is needed modulo so much alone: exp and its reach see no more
COUNT_BITS: Final = 8  # counts of keys up to here are tested by one-hots in the ring, larger ones over GF(2)
SCORE_BOUND: Final = 250.0  # of a score: 2^(COARSE_BIN + COARSE_BITS - 1), less a margin of two bins
EXP_SCALE: Final = 24
INVERSE_SCALE: Final = 24  # a window's value has at most 56 more
FINE_SCALE: Final = 23  # of sum(e v), or of the inverse of sum(e), whichever is small
COARSE_SCALE: Final = 11  # of the other
QUOTIENT_SCALE: Final = FINE_SCALE + COARSE_SCALE
BELOW_ONE: Final = 3  # windows of sums below 1
SUM_BITS: Final = 7  # of the index of a window
NORM_BITS: Final = 8  # windows that are fewer and larger, as they see more octaves
WINDOW_OVERLAP: Final = 3  # octaves that windows have in common
WINDOW_FIRST: Final = 7  # smallest index that counts as not empty
HEADROOM: Final = 60  # a value before truncation stays below 2^60
MOSTLY_ABOVE: Final = 60  # or, if it is hardly ever negative, above -2^60 and below 3 * 2^60


def dither(low: int) -> float:
    """Mean excess, in units of 2^low, of a value read without its `low` lowest bits (ops.drop)."""
    return 1.5 * (1 - 2.0**-low)


@dataclass(frozen=True, slots=True)
class Settings:
    """Tunables of the approximations; equal at all parties (they are in the config digest)."""

    scale_bits: int = 16
    degree: int = 3  # of the pieces of reciprocal and inverse root
    round_trip: float = ops.ROUND_TRIP  # between the parties, in ms: what a round may cost to be saved

    @property
    def rest(self) -> int:
        """Bits of the remainder: as many as the ring has room for."""
        return {1: 14, 2: 14, 3: 12}[self.degree]

    @property
    def few_rounds(self) -> bool:
        """Whether rounds are saved at the price of more preprocessing."""
        return self.round_trip >= ops.APART


def _fit(f: Callable[[Real], Real], left: Real, width: float, degree: int) -> Real:
    """Chebyshev interpolants of f on [left, left + 2 width], in t = (x - left - width) / width: (degree +
    1, n).
    """
    k = np.arange(32)
    nodes = np.cos(np.pi * (k + 0.5) / 32)
    values = f((left[:, None] + width * (1 + nodes[None, :])).ravel()).reshape(len(left), 32)
    cheb = np.polynomial.chebyshev.chebvander(nodes, degree) * (2 / 32)
    cheb[:, 0] /= 2
    c = values @ cheb  # (n, degree + 1), Chebyshev coefficients
    return np.stack(
        [np.pad(q := np.polynomial.chebyshev.cheb2poly(row), (0, degree + 1 - len(q))) for row in c]
    ).T


def _tables(q: Real, scale: int, rest: int) -> Ring:
    """Coefficients in t as ring elements of remainder^d: scale + rest * (degree - d) fraction bits each."""
    degree = len(q) - 1
    return np.stack([encode(q[d], scale + rest * (degree - d)) for d in range(degree + 1)])


@dataclass(frozen=True, slots=True)
class Cosines:
    """An activation between `left` and `right`: x / 2 + constant + sum of amplitude cos(2 pi turns x / 2^11),
    to within 2.5e-5, of SiLU 9e-5. Below `left`, and from a bin of the reach and three of its units below
    `right` on, it is 0 or x to within 2e-5, of SiLU 1.3e-4.

    Frequencies and amplitudes were sought for the least largest error; few are needed since frequencies need
    not be multiples of one another. At `scale` the function lies above -2^MOSTLY_ABOVE and
    below 3 * 2^MOSTLY_ABOVE.
    """

    edge: float
    scale: int
    turns: tuple[int, ...]
    constant: float
    amplitudes: tuple[float, ...]

    @property
    def left(self) -> float:
        return -self.edge

    @property
    def bins(self) -> int:
        """From `left` to `right`."""
        return math.ceil(2 * self.edge + 1 + 3 * 2.0**-ACTIVE_REST)

    @property
    def right(self) -> float:
        return self.left + self.bins


COSINES: Final = {
    "gelu": Cosines(
        4.453125,
        59,
        (133, 382, 622, 869, 1136),
        1.90240963,
        (-1.64017863, -0.20476417, -0.04864172, -0.00811975, -0.00068505),
    ),
    "gelu_tanh": Cosines(
        4.453125,
        59,
        (132, 381, 624, 879, 1167),
        1.918935,
        (-1.6543778, -0.20740953, -0.04879076, -0.00771162, -0.00062123),
    ),
    "silu": Cosines(
        11.453125,
        57,
        (65, 189, 311, 436, 565, 698, 835, 967),
        3.90351139,
        (
            -3.32188321,
            -0.4104742,
            -0.11931511,
            -0.03665878,
            -0.01091528,
            -0.00311633,
            -0.00083798,
            -0.00022315,
        ),
    ),
}


async def activation(ctx: Context, step: str, x: Share, name: str, s: Settings, scale: int) -> Share:
    """SiLU or GELU of x at `scale`, above f and below CHOSEN_SCALE, |x| < ACTIVATION_BOUND, result at scale
    f. Two rounds; four where rounds are not saved.

    What the function is above x / 2 is even, and a sum of cosines near zero; where a second reading, of whole
    numbers, tells that x may lie beyond, the function is x or 0. That is chosen and truncated in one round,
    each of the two by itself; or, for half of what is prepared, chosen first, at a scale that has room for x,
    which costs cosines some accuracy.
    """
    a, to = COSINES[name], s.scale_bits
    flat = x.flat()
    n = flat.shape[0]
    at, unit = (a.scale, prep.UNIT_SCALE) if s.few_rounds else (CHOSEN_SCALE, CHOSEN_UNIT)
    wave = ops.Wave(scale - WAVE_UNIT, WAVE_PERIOD + WAVE_UNIT, a.turns, a.amplitudes, a.constant, at, unit)

    async def near(ctx: Context) -> Share:
        return await ops.wave(ctx, step, flat, wave) + flat * (1 << (at - scale - 1))

    async def sides(ctx: Context) -> list[Bits]:
        first = math.ceil((1 << ACTIVE_BITS - 1) - 4 + a.left)  # the bin that begins at `left`
        lifted = _whole_words(flat + round((first - a.left) * 2**scale))
        return await ops.are_below(
            ctx,
            f"{step}/reach",
            lifted,
            scale - ACTIVE_REST,
            ACTIVE_REST,
            (ACTIVE_BITS,) if s.few_rounds else ops.digits(ACTIVE_BITS),
            (first, first + a.bins),
        )

    y, (left, not_right) = await ops.together(ctx, near, sides)
    # near zero y, right of it x, left of it 0
    bits = ops.joined(Bits(np.stack([(left ^ not_right).v, (~not_right).v], axis=1), ctx.bk), n)
    if s.few_rounds:
        y, line = await ops.truncate_if(
            ctx, f"{step}/truncate", bits, (y, at - to, MOSTLY_ABOVE), (flat, scale - to)
        )
        return (y + line).reshape(*x.shape)
    low, flags = RING_BITS - CHOSEN_LANE, Bits(bits.v[:, None], ctx.bk)
    both = ops.lower(concat([y, flat * (1 << (at - scale))]), low, CHOSEN_LANE).reshape(2 * n, 1)
    chosen, _ = await ops.pick(ctx, f"{step}/choose", flags, both, (CHOSEN_LANE,), CHOSEN_LANE)
    y = (chosen[:n, 0] + chosen[n:, 0]) * (1 << low)
    (y,) = await ops.truncate(ctx, f"{step}/truncate", (y, at - to, CHOSEN_ABOVE))
    return y.reshape(*x.shape)


async def relu(ctx: Context, step: str, x: Share, s: Settings, scale: int) -> Share:
    """max(x, 0) of x at `scale`, above f, |x| < RELU_BOUND, result at scale f. Three rounds."""
    flat, low = x.flat(), scale - s.scale_bits
    width = s.scale_bits + RELU_BOUND.bit_length()
    negative = await ops.is_negative(ctx, f"{step}/sign", _whole_words(flat), low, width)
    (y,) = await ops.truncate_if(ctx, f"{step}/truncate", ~negative, (flat, low))
    return y.reshape(*x.shape)


# --- a ladder of windows -----------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _ladder(
    name: str, f: Callable[[Real], Real], bits: int, base: int, most: int, s: Settings, floor: float
) -> tuple[Piecewise, ...]:
    """Windows of 2^bits bins for integers from 0 to `most`, the first of bins of 2^base; f maps the integer,
    as a real, to the result.
    """
    out = []
    position = base
    j = np.arange(1 << bits)
    while True:
        low = position - s.rest
        if low < 0:
            raise LocalError(f"{name}: the first window lies below the remainder")
        width = 2.0**position
        left = (j - 1) * width - dither(low) * 2.0**low
        first = position == base
        q = _fit(lambda x: f(np.maximum(x, floor)), left, width, s.degree)
        if not first:
            q[:, : WINDOW_FIRST - 1] = 0  # a lower window answers there
        used = q[:, (0 if first else WINDOW_FIRST - 1) :]
        magnitude = math.ceil(math.log2(max(float(np.abs(used).sum(axis=0).max()), 2.0**-30))) + 1
        scale = min(HEADROOM - magnitude, INVERSE_SCALE + 56) - s.rest * s.degree
        flags = (j >= WINDOW_FIRST).astype(np.uint64)[None]
        out.append(Piecewise(low, s.rest, bits, _tables(q, scale, s.rest), flags, scale + s.rest * s.degree))
        if len(out) > 1 and most <= (len(j) - 2) << position:
            return tuple(out)
        position += bits - WINDOW_OVERLAP


async def _climb(
    ctx: Context, step: str, x: Share, ladder: tuple[Piecewise, ...], scales: Sequence[int]
) -> Share:
    """Windows of x (n): (windows, n), of which the highest that is not empty has its value, at its scale, and
    the others 0. Two rounds.
    """
    found = await ops.read(ctx, f"{step}/index", x.flat(), *ladder)
    return await _highest(ctx, step, ladder, found, scales)


async def _highest(
    ctx: Context,
    step: str,
    ladder: tuple[Piecewise, ...],
    found: tuple[Share, Share],
    scales: Sequence[int],
) -> Share:
    """The second round of `_climb`, behind what the first has read."""
    values, flags = found
    drops = [p.scale - scale for p, scale in zip(ladder, scales, strict=True)]
    chosen = await ops.choose(ctx, f"{step}/choose", flags[0][1:].swap(0, 1), values.swap(0, 1), drops)
    return chosen.swap(0, 1)


@lru_cache(maxsize=8)
def _inverse(one: float) -> Callable[[Real], Real]:
    return lambda x: one / x


@lru_cache(maxsize=32)
def _inverse_root(per: float, eps: float) -> Callable[[Real], Real]:
    return lambda x: 1 / np.sqrt(np.maximum(x / per + eps, eps / 4))


SUM_SHIFT: Final = 8  # sums of exponentials are read at scale EXP_SCALE + 8 = 32
SUM_SCALE: Final = EXP_SCALE + SUM_SHIFT
SUM_BASE: Final = 17  # bin of the first window: 2^-15, below e^-8 / 7
NORM_TOP: Final = 58  # sum of squares below 2^(58 - 2f)


def _norm_base(width: int, eps: float, scale: int) -> int:
    """Bin of the first window: an eighth of the eps that is added to the mean square, not below the
    remainder.
    """
    return max(14, math.floor(math.log2(max(eps, 1e-12) * width)) + 2 * scale - WINDOW_OVERLAP)


async def reciprocals(
    ctx: Context, step: str, sums: Sequence[tuple[Share, int]], s: Settings
) -> list[tuple[Share, Share]]:
    """1 / x for each (x, most), x at scale 24 within e^-8 .. most, in one of two places, 0 in the other: of x
    below 1, roughly, in the first, at COARSE_SCALE, else in the second, at FINE_SCALE. Two rounds for all.

    How many windows are read follows from `most` alone; those of as many are read together.
    """
    ladders = [_sum_ladder(most, s) for _, most in sums]
    groups = _places([len(ladder) for ladder in ladders])

    def read(group: list[int]) -> Callable[[Context], Coroutine[Any, Any, Share]]:
        x = concat([sums[i][0].flat() for i in group]) * (1 << SUM_SHIFT)
        ladder = ladders[group[0]]
        scales = [COARSE_SCALE] * BELOW_ONE + [FINE_SCALE] * (len(ladder) - BELOW_ONE)
        return lambda ctx: _climb(ctx, step, x, ladder, scales)

    out: dict[int, tuple[Share, Share]] = {}
    found = await ops.together(ctx, *(read(group) for group in groups.values()))
    for group, windows in zip(groups.values(), found, strict=True):
        sizes = [sums[i][0].size for i in group]
        large, small = (_cut(part.sum(0), sizes) for part in (windows[:BELOW_ONE], windows[BELOW_ONE:]))
        for i, a, b in zip(group, large, small, strict=True):
            out[i] = a.reshape(*sums[i][0].shape), b.reshape(*sums[i][0].shape)
    return [out[i] for i in range(len(sums))]


async def quotients(ctx: Context, step: str, inverse: Sequence[Share], x: Sequence[Share]) -> Share:
    """Rows x (n, d), given at FINE_SCALE and at COARSE_SCALE, times both parts (n) of `reciprocals`: (n, d)
    at QUOTIENT_SCALE. One round.

    A large inverse, of few fraction bits, meets what has many, and a small one what has few: so the product
    needs no truncation, and room is left above it.
    """
    rows = await ops.scale(ctx, step, concat(inverse), concat(x))
    n = x[0].shape[0]
    return rows[:n] + rows[n:]


def _sum_ladder(most: int, s: Settings) -> tuple[Piecewise, ...]:
    """For sums below 252, or further by factors of 16. BELOW_ONE windows are for what is below 7/8."""
    apart = SUM_BITS - WINDOW_OVERLAP
    room = ((1 << SUM_BITS) - 2) << (SUM_BASE + 4 * apart)
    while room < most << SUM_SCALE:
        room <<= apart
    f = _inverse(2.0**SUM_SCALE)
    return _ladder("reciprocal", f, SUM_BITS, SUM_BASE, room, s, 2.0 ** (SUM_BASE - 1))


class InverseRoot:
    """1 / sqrt(mean(x^2) + eps) of rows (n, d) at scale f, by the sums (n) of their squares, in two rounds
    that others can share: `read`, and then `choose`.
    """

    def __init__(self, step: str, squares: Share, width: int, eps: float, s: Settings) -> None:
        f = _inverse_root(width * 4.0**s.scale_bits, eps)
        base = _norm_base(width, eps, s.scale_bits)
        self._step, self._squares = step, squares
        self._ladder = _ladder("inverse root", f, NORM_BITS, base, 1 << NORM_TOP, s, -np.inf)
        self._found: tuple[Share, Share] | None = None

    async def read(self, ctx: Context) -> None:
        self._found = await ops.read(ctx, f"{self._step}/index", self._squares, *self._ladder)

    async def choose(self, ctx: Context, scale: int) -> Share:
        """The roots (n) at `scale`."""
        if self._found is None:
            raise LocalError("an inverse root is read before it is chosen")
        scales = [scale] * len(self._ladder)
        return (await _highest(ctx, self._step, self._ladder, self._found, scales)).sum(0)


async def rms_norm(ctx: Context, step: str, x: Share, scale: int, eps: float, s: Settings, to: int) -> Share:
    """x / sqrt(mean(x^2) + eps) for rows x (n, d) at `scale`, at scale `to`, well above f. Four rounds."""
    rows, squares = await ops.truncate_rows(ctx, f"{step}/x", x, scale - s.scale_bits)
    root = InverseRoot(f"{step}/root", squares, x.shape[1], eps, s)
    await root.read(ctx)
    return await ops.scale(ctx, f"{step}/scale", await root.choose(ctx, to - s.scale_bits), rows)


# --- softmax --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores (heads, rows, keys) at `scale`, at most 53, within +-SCORE_BOUND; which of them are allowed,
    publicly: (rows, keys) of 0 and 1; and which keys are valid, secretly: (keys,) bits, or all of them. What
    is not valid must have a score of 0. Whether rounds are saved is for all of a pass alike.
    """

    values: Share
    scale: int
    allowed: Ring
    valid: Share | None
    few_rounds: bool = True

    @property
    def keys(self) -> int:
        return self.values.shape[2]

    def kept(self, x: Share, *more: int) -> Share:
        """x (heads, rows, keys) and as many axes as there are `more` ones, 0 where not allowed."""
        if self.allowed.all():  # as in the last row, the only one while decoding
            return x
        return x * self.allowed.astype(x.v.dtype, copy=False).reshape(1, *self.allowed.shape, *more)

    @property
    def count_bits(self) -> int:
        """Of a number of keys."""
        return self.keys.bit_length()

    @property
    def counts_in_ring(self) -> bool:
        """Whether counts of keys are tested by one-hots in the ring, or over GF(2) and a round more."""
        return self.few_rounds and self.values.shape[1] == 1 and self.count_bits <= COUNT_BITS


async def exponentials(ctx: Context, step: str, blocks: Sequence[Scores]) -> list[tuple[Share, Share]]:
    """For each block weights e^(score - shift) (heads, rows, keys) at scale 24, 0 where not allowed or not
    valid, and their sums (heads, rows).

    The shift is the row's maximum, rounded up by at most two coarse bins: it is found by counting, for every
    threshold, the valid scores above it, and by testing those counts for zero. What lies more than EXP_REACH
    below the shift may have weight 0, and has from 9.5 further on; a second, coarse reading tells. Blocks
    share the 4 rounds; 5 if one has many rows or keys, or rounds are not saved (`_highest_bins`).
    """
    scale = blocks[0].scale
    half = 1 << (COARSE_BIN + COARSE_BITS - 1)
    raised = concat([b.values.flat() for b in blocks]) + (half << scale)
    invalid = _invalid(blocks)
    shown = raised
    if invalid is not None:  # from the middle down to the lowest bin
        shown = raised - invalid * ((half - 2) << scale)
    one_hots = await _coarse_bins(ctx, step, blocks, shown, scale)
    top = await _highest_bins(ctx, step, blocks, one_hots)
    # maximum < (top + 1) bins: below = score - that, negative
    limit = (top + 1) * (1 << (scale + COARSE_BIN))
    below = shown - concat([_spread(b, part) for b, part in zip(blocks, _by_row(blocks, limit), strict=True)])

    async def value(ctx: Context) -> Share:
        factor, more = EXP_STRETCH
        fine = scale + more
        low = fine + 1 - EXP_REST
        start = -EXP_RANGE - dither(low) * EXP_WIDTH * 2.0**-EXP_REST
        x = below * factor + (((1 << EXP_BITS) - 3) << (fine + 1))
        return await ops.decay(ctx, f"{step}/exp", x, low, EXP, start, EXP_ROOM)

    async def counts(ctx: Context) -> Bits:
        """Whether the weight counts: within reach of the maximum, and valid, which is told by a further
        shift down. The reading has units of 1/2.
        """
        lifted = below + round(REACH_LIFT * 2**scale)
        if invalid is not None:
            lifted = lifted - invalid * (round(REACH_LIFT * 2**scale) - (2 * half << scale))
        (far,) = await ops.are_below(
            ctx, f"{step}/reach", _whole_words(lifted), scale - 1, REACH_REST, (REACH_BITS,), (REACH_FROM,)
        )
        return ~far

    y, keep = await ops.together(ctx, value, counts)
    # Beyond the range this is garbage.
    (e,) = await ops.truncate_if(ctx, f"{step}/truncate", keep, (y, EXP_ROOM - EXP_SCALE, MOSTLY_ABOVE))
    weights = [
        b.kept(part.reshape(*b.values.shape)) for b, part in zip(blocks, _by_score(blocks, e), strict=True)
    ]
    return [(w, w.sum(2)) for w in weights]


def _cut(x: Share, sizes: Sequence[int]) -> list[Share]:
    ends = np.cumsum(sizes)
    return [x[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _by_score(blocks: Sequence[Scores], x: Share) -> list[Share]:
    """Of x, which has an entry for every score of all blocks, each block's part."""
    return _cut(x, [b.values.size for b in blocks])


def _by_row(blocks: Sequence[Scores], x: Share) -> list[Share]:
    """Of x, which has an entry for every row of every head of all blocks, each block's part."""
    return _cut(x, [math.prod(b.values.shape[:2]) for b in blocks])


def _spread(block: Scores, x: Share) -> Share:
    """An entry of x for every row, for every score of it."""
    heads, rows, _ = block.values.shape
    return x.reshape(heads, rows, 1).broadcast(*block.values.shape).flat()


def _invalid(blocks: Sequence[Scores]) -> Share | None:
    """For every score whether its key is not valid, if not all are."""
    if all(b.valid is None for b in blocks):
        return None
    parts = []
    for b in blocks:
        valid = b.valid if b.valid is not None else b.values[0, 0] * 0 + 1
        parts.append((-valid + 1).broadcast(*b.values.shape).flat())
    return concat(parts)


def _places(alike: Sequence[T]) -> dict[T, list[int]]:
    """Where each number stands."""
    out: dict[T, list[int]] = {}
    for i, value in enumerate(alike):
        out.setdefault(value, []).append(i)
    return out


async def _coarse_bins(
    ctx: Context, step: str, blocks: Sequence[Scores], shown: Share, scale: int
) -> list[Share]:
    """For each block one-hots (scores, bins) of its scores. One round.

    How many bits their numbers have follows from the block's own keys: its session has made what is taken for
    it, and knew of no other. Blocks of one lane are read together.
    """
    parts = _by_score(blocks, shown)
    groups = _places([ops.counting_lane(b.keys) for b in blocks])

    def read(lane: int, group: list[int]) -> Callable[[Context], Coroutine[Any, Any, Share]]:
        x, low = concat([parts[i] for i in group]), scale + COARSE_BIN - COARSE_REST
        return lambda ctx: ops.coarse_index(ctx, f"{step}/coarse", x, low, COARSE_REST, COARSE_BITS, lane)

    out = list(parts)
    read_at_once = await ops.together(ctx, *(read(*group) for group in groups.items()))
    for group, hot in zip(groups.values(), read_at_once, strict=True):
        for i, part in zip(group, _by_score([blocks[i] for i in group], hot), strict=True):
            out[i] = part
    return out


async def _highest_bins(
    ctx: Context, step: str, blocks: Sequence[Scores], one_hots: Sequence[Share]
) -> Share:
    """For every row of every head the highest bin that one of its allowed scores lies in, modulo
    2^COARSE_LANE. One round for a row of up to 2^COUNT_BITS - 1 keys, as in decoding, where rounds are saved;
    else two, for a third of the work: where rows or keys are many, processors and bytes take longer than a
    round.
    """
    per_row = []
    for b, hot in zip(blocks, one_hots, strict=True):
        hot = b.kept(hot.reshape(*b.values.shape, -1), 1)
        # How many scores lie in each bin, modulo 2^lane, which is more than there are.
        count = hot.v.sum(axis=3, dtype=hot.v.dtype)
        per_row.append(count.reshape(len(count), -1, 1 << COARSE_BITS))
    counts = per_row[0] if len(per_row) == 1 else np.concatenate(per_row, axis=1)
    at_least = ctx.share(np.cumsum(counts[..., ::-1], axis=-1, dtype=np.uint64)[..., ::-1])[:, 1:]
    # Counts of blocks of about as many keys are tested together.
    tests = _places([(b.count_bits, b.counts_in_ring) for b in blocks])
    parts = _by_row(blocks, at_least)

    def test(group: list[int], bits: int, ring: bool) -> Callable[[Context], Coroutine[Any, Any, Share]]:
        x = concat([parts[i] for i in group]).flat()

        async def in_ring(ctx: Context) -> Share:
            return await ops.is_zero(ctx, f"{step}/counts", x, bits, COARSE_LANE)

        async def in_bits(ctx: Context) -> Share:
            padded = _whole_words(x)
            empty = await ops.are_zero(ctx, f"{step}/counts", padded, bits)
            return (await ops.to_ring(ctx, f"{step}/inject", empty, padded.size))[: x.size]

        return in_ring if ring else in_bits

    empty = await ops.together(ctx, *(test(group, *how) for how, group in tests.items()))
    none: list[Share] = list(parts)
    for group, bits in zip(tests.values(), empty, strict=True):
        rows = bits.reshape(-1, at_least.shape[1])
        for i, part in zip(group, _by_row([blocks[i] for i in group], rows), strict=True):
            none[i] = part
    return -(concat(none).sum(1)) + at_least.shape[1]


def _whole_words(x: Share) -> Share:
    """Zeros after x (n) up to whole words of lanes."""
    return Share(np.pad(x.v, [(0, 0), (0, -x.shape[0] % 64)]), x.bk)
