"""Non-linear functions: activation, softmax attention weights, reciprocal, root-mean-square norm.

All are piecewise polynomials looked up under a mask (ops.piecewise). Reciprocal and inverse root see many
orders of magnitude: they are looked up in a ladder of windows three octaves apart, and the highest window
that is not empty is selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mimir.errors import LocalError
from mimir.mpc import ops, prep
from mimir.mpc.domain import Ring, encode
from mimir.mpc.ops import Context, Piecewise
from mimir.mpc.share import Bits, Share

Real = npt.NDArray[np.floating[Any]]

ACTIVATION_BIN: Final = -2  # log2 of the width of a bin of an activation
ACTIVATION_BOUND: Final = 250.0  # of an activation's input
EXP_BIN: Final = -1
EXP_BITS: Final = 6  # range 32
EXP_TOP: Final = 1.0  # exp is looked up on [EXP_TOP - 32, EXP_TOP); it is needed below 0
EXP_REACH: Final = 28  # further below the shift a weight, less than e^-25, is 0
REACH_BITS: Final = 9  # below the shift lies nothing further than 2^9 - REACH_MARGIN
REACH_MARGIN: Final = 4  # units by which the coarse reading may exceed the value, so that it never wraps
COARSE_BIN: Final = 2  # log2 of the resolution of the row maximum
COARSE_BITS: Final = 7
COARSE_REST: Final = 4
SCORE_BOUND: Final = 250.0  # of a score: 2^(COARSE_BIN + COARSE_BITS - 1), less a margin of two bins
EXP_SCALE: Final = 24
MIX_SCALE: Final = 28  # of sum(e v) before division
INVERSE_SCALE: Final = 24
NORM_SCALE: Final = 20  # of an inverse root whose product is multiplied before it is truncated
WINDOW_BITS: Final = 6
WINDOW_STEP: Final = 3  # octaves between windows
WINDOW_FIRST: Final = 7  # smallest index that counts as not empty
HEADROOM: Final = 60  # a value before truncation stays below 2^60
DITHER: Final = 1.0  # mean excess, in units of the dropped scale, of a window read


@dataclass(frozen=True, slots=True)
class Settings:
    """Tunables of the approximations; equal at all parties (they are in the config digest)."""

    scale_bits: int = 16
    degree: int = 3
    bins: int = 128

    @property
    def rest(self) -> int:
        """Bits of the remainder: as many as the ring has room for."""
        return {1: 14, 2: 14, 3: 12}[self.degree]


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


@lru_cache(maxsize=64)
def _piece(
    name: str,
    f: Callable[[Real], Real],
    start: float,
    bin_log: int,
    bits: int,
    in_scale: int,
    degree: int,
    rest: int,
    magnitude: int,
) -> Piecewise:
    """f on [start, start + 2^(bin_log + bits)), input shifted to begin at 0, at `in_scale` fraction bits."""
    low = in_scale + bin_log - rest
    if low < 0:
        raise LocalError(f"{name}: the input scale is too small for its bins")
    width = 2.0**bin_log
    shift = DITHER * 2.0 ** (low - in_scale)
    left = start + (np.arange(1 << bits) - 1) * width - shift
    q = _fit(f, left, width, degree)
    scale = HEADROOM - magnitude - rest * degree
    return Piecewise(
        low, rest, bits, _tables(q, scale, rest), np.zeros((0, 1 << bits), np.uint64), HEADROOM - magnitude
    )


def silu(x: Real) -> Real:
    return x / (1 + np.exp(-np.clip(x, -500, 500)))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Real) -> Real:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_tanh(x: Real) -> Real:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: Final[dict[str, Callable[[Real], Real]]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def activation_bins(name: str, s: Settings) -> int:
    """Bins of an activation's table: GELU is x or 0 to within 1.3e-4 from 4 on, SiLU from 12 on."""
    return s.bins if name == "silu" else s.bins // 2


def activation_piece(name: str, s: Settings) -> Piecewise:
    """Pieces of an activation on [-R, R), R = bins / 8, of an input at twice the scale."""
    bins = activation_bins(name, s)
    r = bins * 2.0**ACTIVATION_BIN / 2
    magnitude = math.ceil(math.log2(r)) + 1
    bits = bins.bit_length() - 1
    return _piece(
        name, ACTIVATIONS[name], -r, ACTIVATION_BIN, bits, 2 * s.scale_bits, s.degree, s.rest, magnitude
    )


async def activation(
    ctx: Context, step: str, x: Share, name: str, s: Settings, *, wide: bool = False
) -> Share:
    """SiLU or GELU of x at scale 2f, |x| < ACTIVATION_BOUND, result at scale f, or 2f if `wide`, which is
    cheaper. Four rounds.

    Pieces cover [-R, R); beyond R - 4 the function is x or 0 to within 1.3e-4, told by a second, coarse
    reading.
    """
    f = s.scale_bits
    p = activation_piece(name, s)
    r = activation_bins(name, s) >> (1 - ACTIVATION_BIN)
    flat = x.flat()
    n = flat.shape[0]

    async def table(ctx: Context) -> list[Share]:
        y = await ops.piecewise(ctx, step, flat + (r << (2 * f)), p)
        if wide:
            return [*await ops.truncate(ctx, f"{step}/truncate", (y, p.scale - 2 * f)), flat]
        return await ops.truncate(ctx, f"{step}/truncate", (y, p.scale - f), (flat, f))

    async def sides(ctx: Context) -> Share:
        half = 1 << (REACH_BITS - 1)
        lifted = _whole_words(flat + (half << (2 * f)))
        # The reading is up to 3 too high: "below 4 - R" is true below 1 - R at the latest, and so on.
        below = await ops.are_below(
            ctx, f"{step}/reach", lifted, 2 * f, REACH_BITS, (half - r + REACH_MARGIN, half + r - 1)
        )
        bits = Bits(np.concatenate([b.v for b in below], axis=1), ctx.bk)
        return await ops.to_ring(ctx, f"{step}/reach inject", bits, 2 * lifted.shape[0])

    (y, line), side = await ops.together(ctx, table, sides)
    lanes = side.shape[0] // 2
    left, not_right = side[:n], side[lanes : lanes + n]
    # left of the table 0, right of it x: y - left y + right (x - y)
    zeroed, moved = await ops.mul(ctx, f"{step}/sides", (left, y), (-not_right + 1, line - y))
    return (y - zeroed + moved).reshape(*x.shape)


async def relu(ctx: Context, step: str, x: Share, s: Settings) -> Share:
    """max(x, 0) of x at scale 2f, and so is the result. Rounds: 8."""
    lanes = 64 * ((x.size + 63) // 64)
    flat = x.flat()
    negative = await ops.is_negative(ctx, f"{step}/sign", _whole_words(flat), s.scale_bits, RELU_WIDTH)
    keep = (-(await ops.to_ring(ctx, f"{step}/inject", negative, lanes)) + 1)[: x.size]
    (y,) = await ops.mul(ctx, f"{step}/keep", (keep, flat))
    return y.reshape(*x.shape)


RELU_WIDTH: Final = 28  # sign of |x| < 2^27 at scale f, that is 2^11


# --- a ladder of windows -----------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _ladder(
    name: str, f: Callable[[Real], Real], base: int, top: int, s: Settings, floor: float
) -> tuple[Piecewise, ...]:
    """Windows for integers in [0, 2^top): bin 2^base, 2^(base + 3), ...; f maps the integer, as a real, to
    the result.
    """
    out = []
    position = base
    j = np.arange(1 << WINDOW_BITS)
    while True:
        last = position + WINDOW_BITS >= top
        low = position - s.rest
        if low < 0:
            raise LocalError(f"{name}: the first window lies below the remainder")
        width = 2.0**position
        left = (j - 1) * width - DITHER * 2.0**low
        first = position == base
        q = _fit(lambda x: f(np.maximum(x, floor)), left, width, s.degree)
        if not first:
            q[:, : WINDOW_FIRST - 1] = 0  # a lower window answers there
        used = q[:, (0 if first else WINDOW_FIRST - 1) :]
        magnitude = math.ceil(math.log2(max(float(np.abs(used).sum(axis=0).max()), 2.0**-30))) + 1
        scale = min(HEADROOM - magnitude, INVERSE_SCALE + 56) - s.rest * s.degree
        flags = (j >= WINDOW_FIRST).astype(np.uint64)[None]
        out.append(
            Piecewise(low, s.rest, WINDOW_BITS, _tables(q, scale, s.rest), flags, scale + s.rest * s.degree)
        )
        if last:
            return tuple(out)
        position += WINDOW_STEP


async def _climb(
    ctx: Context, step: str, x: Share, ladder: tuple[Piecewise, ...], scale: int = INVERSE_SCALE
) -> Share:
    """The value of the highest window that is not empty. Rounds: 2 + the larger of 2 and log2(windows - 1).

    The choice is made while the pieces are evaluated: none[w] says that no window from w on is in use.
    """
    index = await ops.read_index(ctx, f"{step}/index", *((x, p) for p in ladder))

    async def values(ctx: Context) -> list[Share]:
        pieces = await ops.evaluate(ctx, f"{step}/evaluate", index)
        return await ops.truncate(
            ctx,
            f"{step}/truncate",
            *((v, p.scale - scale) for v, p in zip(pieces, ladder, strict=True)),
        )

    async def none_above(ctx: Context) -> list[Share]:
        none = [-(r.flags[0]) + 1 for r in index]
        span = 1
        while span < len(none) - 1:  # suffix products; the lowest window's own is never needed
            at = range(1, len(none) - span)
            products = await ops.mul(ctx, f"{step}/choose {span}", *((none[i], none[i + span]) for i in at))
            none = [none[0], *products, *none[len(none) - span :]]
            span *= 2
        return none

    value, none = await ops.together(ctx, values, none_above)
    # window 0 is chosen if no other is; window w if it is in use and none above it is
    chosen = [none[1]] + [(none[w + 1] if w + 1 < len(none) else 1) - none[w] for w in range(1, len(none))]
    products = await ops.mul(ctx, f"{step}/select", *zip(chosen, value, strict=True))
    total = products[0]
    for p in products[1:]:
        total = total + p
    return total


@lru_cache(maxsize=8)
def _inverse(one: float) -> Callable[[Real], Real]:
    return lambda x: one / x


@lru_cache(maxsize=32)
def _inverse_root(per: float, eps: float) -> Callable[[Real], Real]:
    return lambda x: 1 / np.sqrt(np.maximum(x / per + eps, eps / 4))


SUM_SHIFT: Final = 8  # sums of exponentials are read at scale EXP_SCALE + 8 = 32
SUM_SCALE: Final = EXP_SCALE + SUM_SHIFT
SUM_BASE: Final = 17  # bin of the first window: 2^-15, below e^-8 / 7
SUM_TOP: Final = 43  # sums below 2^11
NORM_TOP: Final = 58  # sum of squares below 2^(58 - 2f)


def _norm_base(width: int, eps: float, scale: int) -> int:
    """Bin of the first window: an eighth of the eps that is added to the mean square, not below the
    remainder.
    """
    return max(14, math.floor(math.log2(max(eps, 1e-12) * width)) + 2 * scale - WINDOW_STEP)


async def reciprocal(ctx: Context, step: str, x: Share, s: Settings) -> Share:
    """1 / x at scale 24 for x at scale 24 within e^-8 .. 2^11."""
    ladder = _ladder("reciprocal", _inverse(2.0**SUM_SCALE), SUM_BASE, SUM_TOP, s, 2.0 ** (SUM_BASE - 1))
    return await _climb(ctx, step, x * (1 << SUM_SHIFT), ladder)


async def rms_norm(
    ctx: Context, step: str, x: Share, eps: float, s: Settings, *, wide: bool = False
) -> Share:
    """x / sqrt(mean(x^2) + eps) for rows x (n, d) at scale f, or f + NORM_SCALE if `wide`. One mask serves
    both uses of x.

    Rounds: 8, one fewer if wide.
    """
    n, d = x.shape
    c = ctx.take(prep.Norm(d), n)
    (dx,) = await ctx.doors.open(f"{step}/x", x + c["x"])
    square = c["q"] - (c["x"] * (dx * np.uint64(2))).sum(1) + (dx * dx).sum(axis=1, dtype=np.uint64)
    f = _inverse_root(d * 4.0**s.scale_bits, eps)
    ladder = _ladder("inverse root", f, _norm_base(d, eps, s.scale_bits), NORM_TOP, s, -np.inf)
    r = await _climb(ctx, f"{step}/root", square, ladder, NORM_SCALE if wide else INVERSE_SCALE)
    (dr,) = await ctx.doors.open(f"{step}/scale", r + c["s"])
    y = c["z"] - c["x"] * dr[:, None] - c["s"].reshape(-1, 1) * dx + dx * dr[:, None]
    if wide:
        return y
    (y,) = await ops.truncate(ctx, f"{step}/truncate", (y, INVERSE_SCALE))
    return y


# --- softmax --------------------------------------------------------------------------------------------


async def exponentials(
    ctx: Context, step: str, scores: Share, allowed: Ring, valid: Share | None, s: Settings
) -> tuple[Share, Share]:
    """Weights e^(score - shift) at scale 24, 0 where not allowed (public) or not valid (secret), and
    their sums.

    scores (heads, rows, keys) at scale 2f within +-SCORE_BOUND; allowed (rows, keys) of 0 and 1; valid
    (keys,) bits. The shift is the row's maximum, rounded up by at most two coarse bins: it is found by
    counting, for every threshold, the valid scores above it, and by testing those counts for zero. What lies
    more than EXP_REACH below the shift has weight 0; a second, coarse reading tells. Rounds: 9, one fewer if
    all are valid.
    """
    scale = 2 * s.scale_bits
    heads, rows, keys = scores.shape
    raised = scores + (1 << (scale + COARSE_BIN + COARSE_BITS - 1))
    shown = raised
    if valid is not None:  # what is not valid falls into the lowest bin
        (shown,) = await ops.mul(ctx, f"{step}/mask", (raised, valid.broadcast(heads, rows, keys)))
    one_hot = await ops.coarse_index(
        ctx, f"{step}/coarse", shown, scale + COARSE_BIN - COARSE_REST, COARSE_REST, COARSE_BITS
    )  # (heads, rows, keys, bins)
    # (heads, rows, bins): how many scores in each bin, modulo 2^16
    per_row = (one_hot * allowed.astype(np.uint16)[None, :, :, None]).sum(2)
    at_least = ctx.share(np.cumsum(per_row.v[..., ::-1], axis=-1, dtype=np.uint64)[..., ::-1])[..., 1:]
    count = at_least.size
    padded = _whole_words(at_least.flat())
    empty = await ops.is_zero(ctx, f"{step}/counts", padded, keys.bit_length())
    none = (await ops.to_ring(ctx, f"{step}/inject", empty, padded.shape[0]))[:count].reshape(heads, rows, -1)
    top = -(none.sum(2)) + none.shape[2]  # index of the highest bin in use
    # maximum < (top + 1) bins: below = score - that, negative
    below = raised - ((top + 1) * (1 << (scale + COARSE_BIN))).reshape(heads, rows, 1).broadcast(
        *scores.shape
    )

    async def value(ctx: Context) -> Share:
        start = EXP_TOP - 2.0 ** (EXP_BITS + EXP_BIN)
        p = _piece("exp", np.exp, start, EXP_BIN, EXP_BITS, scale, s.degree, s.rest, 1)
        return await ops.piecewise(ctx, f"{step}/exp", below - int(start * 2**scale), p)

    async def counts(ctx: Context) -> Share:
        """1 where the weight counts: within reach of the maximum, and valid."""
        lift = (1 << REACH_BITS) - REACH_MARGIN
        lifted = _whole_words((below + (lift << scale)).flat())
        (far,) = await ops.are_below(ctx, f"{step}/reach", lifted, scale, REACH_BITS, [lift - EXP_REACH])
        bit = await ops.to_ring(ctx, f"{step}/reach inject", far, lifted.shape[0])
        near = (-(bit[: below.size]) + 1).reshape(*below.shape)
        if valid is None:
            return near
        (both,) = await ops.mul(ctx, f"{step}/reach valid", (near, valid.broadcast(*below.shape)))
        return both

    e, keep = await ops.together(ctx, value, counts)
    (e,) = await ops.mul(ctx, f"{step}/keep", (e, keep))
    (e,) = await ops.truncate(ctx, f"{step}/truncate", (e, HEADROOM - 1 - EXP_SCALE))
    e = e * allowed[None]
    return e, e.sum(2)


def _whole_words(x: Share) -> Share:
    """Zeros after x (n) up to whole words of lanes."""
    return Share(np.pad(x.v, [(0, 0), (0, -x.shape[0] % 64)]), x.bk)
