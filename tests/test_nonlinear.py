"""What the non-linear functions, the sampler and a whole forward pass are off by, against float64.

Errors have three sources, and the bounds asserted here name them: the polynomial pieces (FIT), the input bits
that a look-up drops (a reading is within two units of 2^low), and truncation (within two units of the
result).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import parties
import pytest
import trio

from mimir.errors import LocalError
from mimir.model import sampling, transformer
from mimir.model.checkpoint import SHORT_SCALE, PlanSpec
from mimir.model.sampling import Sampler
from mimir.model.transformer import Cache
from mimir.mpc import nonlinear, ops, prep
from mimir.mpc.domain import HALF_BITS, RING_BITS, TRUNCATION_BITS, Ring, decode, encode
from mimir.mpc.nonlinear import Scores, Settings
from mimir.mpc.ops import Context
from mimir.mpc.plan import planning
from mimir.mpc.share import Share, concat

Real = npt.NDArray[np.float64]
Op = Callable[..., Awaitable[Any]]


def compute(op: Op, *inputs: Ring, seed: int = 1) -> list[Ring]:
    """Values of the shares that `op(ctx, *shares)` returns."""
    ctx, cost = planning({})

    async def main() -> None:
        await op(ctx, *(ctx.share(np.zeros((1, *x.shape), np.uint64)) for x in inputs))

    trio.run(main)

    async def party(p: parties.Party) -> list[Ring]:
        inner = await p.context(cost.demand)
        out = await op(inner, *(p.share(x, seed + i) for i, x in enumerate(inputs)))
        return [s.v for s in (out if isinstance(out, list | tuple) else [out])]

    results = parties.run_parties(party, seed=b"nonlinear %d" % seed)
    with np.errstate(over="ignore"):
        return [parties.reconstruct(list(each)) for each in zip(*results, strict=True)]


# --- activations --------------------------------------------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[np.float64])
EXACT: dict[str, Callable[[Real], Real]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
# Largest error of the cosines, and of x or 0 beyond the edge, as stated.
FIT = {"silu": (9e-5, 1.3e-4), "gelu": (2.5e-5, 2e-5), "gelu_tanh": (2.5e-5, 2e-5)}
STATED = {"silu": 6e-4, "gelu": 2.8e-4, "gelu_tanh": 2.8e-4}  # of a result at scale 16
NEARER = {"silu": 9e-4, "gelu": 5e-4, "gelu_tanh": 5e-4}  # of one that is chosen before it is truncated
REACH = nonlinear.ACTIVATION_BOUND - 2.0**-16


def test_fit_of_the_cosines() -> None:
    """Up to where a reading of whole numbers may still take x for near; and beyond."""
    for name, f in EXACT.items():
        a = nonlinear.COSINES[name]
        x = np.linspace(a.left - 1 - 3 * 2.0**-nonlinear.ACTIVE_REST, a.right, 20001)
        angles = 2 * math.pi * np.outer(x, a.turns) * 2.0**-nonlinear.WAVE_PERIOD
        fitted = x / 2 + a.constant + np.cos(angles) @ np.array(a.amplitudes)
        assert np.abs(fitted - f(x)).max() < FIT[name][0], name
        ends = np.array([f(x).min(), f(x).max()]) * 2.0 ** (a.scale - nonlinear.MOSTLY_ABOVE)
        assert -0.9 < ends[0] and ends[1] < 2.95, name
        assert f(x).min() > -0.95 * 2.0 ** (nonlinear.CHOSEN_ABOVE - nonlinear.CHOSEN_SCALE), name
        beyond = np.linspace(a.right - 1 - 3 * 2.0**-nonlinear.ACTIVE_REST, 50, 5001)
        below = np.linspace(-50, a.left, 5001)
        assert max(np.abs(f(beyond) - beyond).max(), np.abs(f(below)).max()) < FIT[name][1], name


def activation_points(n: int, seed: int) -> Real:
    """The ends of the domain, the edges, and much near zero."""
    rng = np.random.default_rng(seed)
    edges = np.array(
        [
            a.edge + e
            for a in nonlinear.COSINES.values()
            for e in (-0.01, 0, 0.06, 0.12, 0.19, 0.26, 0.5, 1, 1.05, 1.1, 1.2)
        ]
    )
    near = np.concatenate([edges, -edges, np.arange(-48, 49) / 4])
    step = np.array([-(2.0**-30), 0, 2.0**-30, -0.01, 0.01])
    fixed = (near[:, None] + step).ravel()
    ends = np.array([-REACH, REACH, -REACH + 1, REACH - 1, -200.5, 200.5])
    rest = [rng.uniform(-17, 17, n), rng.uniform(-8, 8, n), rng.uniform(-REACH, REACH, n)]
    return np.clip(np.concatenate([fixed, ends, *rest]), -REACH, REACH)


@pytest.mark.parametrize(("scale", "entering"), [(16, 32), (16, 53), (8, 16), (8, 53), (12, 53), (20, 53)])
@pytest.mark.parametrize("round_trip", [1, 20])
def test_activations_over_their_whole_domain(scale: int, entering: int, round_trip: float) -> None:
    """Of inputs at twice the scale, or as products behind norms; beyond the edge the result is x, or 0."""
    s = Settings(scale, round_trip=round_trip)
    assert entering in (2 * scale, transformer.PRODUCT_SCALE)
    x = encode(activation_points(400, entering), entering)
    real = decode(x, entering)

    async def op(ctx: Context, sx: Share) -> list[Share]:
        return [await nonlinear.activation(ctx, name, sx, name, s, entering) for name in EXACT]

    for (name, f), got in zip(EXACT.items(), compute(op, x), strict=True):
        value = decode(got, scale)
        error = np.abs(value - f(np.maximum(real, -500)))
        bound = (STATED if s.few_rounds else NEARER)[name] + 2 * (2.0**-scale - 2.0**-16)
        assert error.max() < bound, f"{name}: off by {error.max():.2e} at {real[error.argmax()]}"
        beyond = 2 * 2.0**-scale
        assert np.abs(value - real)[real > 20].max() < beyond, name
        assert np.abs(value[real < -20]).max() < (0 if s.few_rounds else beyond) + 2.0**-40, name


def test_products_behind_norms_hold_what_is_promised() -> None:
    """Values up to 2^8, which a truncation takes and a choice can set aside; what loses bits for them; and
    what queries and keys are known modulo holds their scores.
    """
    assert transformer.PRODUCT_SCALE + 8 <= TRUNCATION_BITS
    assert nonlinear.RELU_BOUND <= 2 ** (TRUNCATION_BITS - transformer.RELU_SCALE)
    assert transformer.NORMED_SCALE + transformer.ROTARY_SCALE + 8 <= TRUNCATION_BITS
    assert nonlinear.ACTIVATION_BOUND < 2**8
    assert transformer.PRODUCT_SCALE <= nonlinear.CHOSEN_SCALE
    assert 2.0**62 - 2.0**nonlinear.CHOSEN_ABOVE > nonlinear.ACTIVATION_BOUND * 2.0**nonlinear.CHOSEN_SCALE
    assert transformer.LOGIT_SCALE + sampling.LOGIT_BITS + 2 < RING_BITS
    assert nonlinear.QUOTIENT_SCALE + SHORT_SCALE == transformer.RESIDUAL_SCALE <= TRUNCATION_BITS - 13
    assert 0 < transformer.NORMED_SCALE - transformer.HALF_INPUT <= RING_BITS - HALF_BITS
    known = RING_BITS - (transformer.NORMED_SCALE - transformer.KEY_SCALE)
    assert nonlinear.SCORE_BOUND < 2.0 ** (known - 2 * transformer.KEY_SCALE - 1)
    for scale in range(8, 21):  # an inverse root, from a window's value
        assert 0 < transformer.NORMED_SCALE - scale < nonlinear.HEADROOM - 20


@pytest.mark.parametrize("scale", [8, 13, 16, 20])
def test_relu(scale: int) -> None:
    """max(x, 0), truncated, for x >= 0 and x <= -3 units, and x or 0 between; |x| < 2^11."""
    rng = np.random.default_rng(scale)
    unit, entering = 2.0**-scale, transformer.RELU_SCALE
    bound = nonlinear.RELU_BOUND - 4 * unit
    near = np.arange(-8, 9) * unit
    x = np.concatenate(
        [near, near / 7, [bound, -bound], rng.uniform(-bound, bound, 300), rng.normal(0, 1, 300)]
    )
    x = encode(x, entering)
    real = decode(x, entering)

    async def op(ctx: Context, sx: Share) -> Share:
        return await nonlinear.relu(ctx, "relu", sx.reshape(-1, 1), Settings(scale), entering)

    (got,) = compute(op, x)
    value = decode(got.ravel(), scale)
    assert not value[real <= -3 * unit].any()
    assert (np.abs(value - real)[real >= 0] < 2 * unit).all()
    assert ((value == 0) | (np.abs(value - real) < 2 * unit)).all()


# --- reciprocal and norm ------------------------------------------------------------------------------------

RECIPROCAL = {1: 1.1e-2, 2: 8.5e-4, 3: 1.3e-4}  # relative error, by degree, besides two units of its scale
BELOW = {1: 2e-2, 2: 2.5e-3, 3: 3.2e-4}  # the same between e^-8.75 and e^-8, which few sums reach


def inverse_of(large: Ring, small: Ring) -> Real:
    """What `reciprocals` gives."""
    return decode(large, nonlinear.COARSE_SCALE) + decode(small, nonlinear.FINE_SCALE)


@pytest.mark.parametrize("most", [1, 200, 252, 253, 4000])
def test_reciprocals_as_far_as_sums_of_so_many_keys_go(most: int) -> None:
    """Of fewer windows where there are fewer keys: two rounds for all, and right to the end of each."""
    x = encode(np.array([0.01, 0.5, 1.0, most * 0.37, most]), 24)
    other = encode(np.array([0.02, 7.0]), 24)

    async def op(ctx: Context, sx: Share, sy: Share) -> list[Share]:
        pairs = await nonlinear.reciprocals(ctx, "reciprocal", [(sx, most), (sy, 16)], Settings())
        return [part for pair in pairs for part in pair]

    got = compute(op, x, other)
    for each, pair in zip((x, other), (got[:2], got[2:]), strict=True):
        real = decode(each, 24)
        assert (np.abs(inverse_of(*pair) * real - 1) < 1.3e-4 + 2 * np.maximum(real, 1) * 2.0**-12).all()


def test_quotients() -> None:
    """Rows divided by sums, large and small, to within a few units of 2^-11 of what is divided."""
    rng = np.random.default_rng(4)
    sums = np.exp(np.linspace(-8, 5, 40))
    rows = rng.uniform(-8, 8, (40, 5)) * sums[:, None]
    x, total = encode(rows, 40), encode(sums, 24)

    async def op(ctx: Context, sx: Share, st: Share) -> Share:
        (inverse,) = await nonlinear.reciprocals(ctx, "reciprocal", [(st, 252)], Settings())
        mixed = await ops.truncate(
            ctx, "mix", (sx, 40 - nonlinear.FINE_SCALE), (sx, 40 - nonlinear.COARSE_SCALE)
        )
        return await nonlinear.quotients(ctx, "divide", inverse, mixed)

    (got,) = compute(op, x, total)
    error = np.abs(decode(got, nonlinear.QUOTIENT_SCALE) - rows / sums[:, None])
    assert (error < 8 * 1.3e-4 + 2.0**-12 * (2 + 2 * 8)).all()


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_reciprocal(degree: int) -> None:
    """From the smallest sum, e^-8.75 (the row's maximum at the far end of two coarse bins), to 2^11; of few
    fraction bits where it is above 8/7, of many where it is below, and once or the other.
    """
    low, high = -8.75, 11 * math.log(2)
    edges = 2.0 ** np.arange(-12, 11)
    x = np.concatenate([edges, edges * 0.999, edges * 1.001, np.exp(np.linspace(low, high, 1500)) * 0.9999])
    x = encode(x[(x >= math.exp(low)) & (x < 2**11)], 24)
    real = decode(x, 24)

    async def op(ctx: Context, sx: Share) -> list[Share]:
        return list((await nonlinear.reciprocals(ctx, "reciprocal", [(sx, 2**11)], Settings(16, degree)))[0])

    large, small = compute(op, x)
    assert ((large == 0) != (small == 0)).all()
    assert large[real < 0.74].all() and small[real > 0.9].all()
    unit = np.where(large, 2.0**-nonlinear.COARSE_SCALE, 2.0**-nonlinear.FINE_SCALE)
    error = np.abs(inverse_of(large, small) - 1 / real)
    allowed = np.where(real < math.exp(-8), BELOW[degree], RECIPROCAL[degree]) / real + 2 * unit
    assert (error < allowed).all(), f"off by {(error * real).max():.2e} at {real[(error / allowed).argmax()]}"


def test_reciprocal_of_an_empty_row_is_finite() -> None:
    """A row of padding sums to 0 and its weights are 0; the inverse must not leave the range of a product."""

    async def op(ctx: Context, sx: Share) -> list[Share]:
        return list((await nonlinear.reciprocals(ctx, "reciprocal", [(sx, 1)], Settings()))[0])

    large, small = compute(op, encode(np.array([0.0, 2.0**-24, 2.0**-20, 2.0**-16]), 24))
    assert (np.abs(decode(large, nonlinear.COARSE_SCALE)) < 2.0**17).all() and not small.any()


NORMED = transformer.NORMED_SCALE
NORM_STEPS = [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


@pytest.mark.parametrize(("width", "rows"), [(8, 12), (64, 6), (288, 2), (768, 1)])
@pytest.mark.parametrize(
    ("degree", "eps", "entering"), [(3, 1e-5, 48), (3, 1e-6, 48), (2, 1e-5, 48), (3, 1e-5, 32)]
)
def test_rms_norm(width: int, rows: int, degree: int, eps: float, entering: int) -> None:
    """Rows of root mean square 1e-3 to 1e3, as far as the sum of squares stays below 2^26 at scale 16.

    The relative error of the scaling stays below 1.2e-4 (2.2e-4 for degree 2), and an inverse root that is
    small at its scale adds three units of it; each entry was truncated before.
    """
    s = Settings(16, degree)
    largest = math.sqrt(2.0 ** (nonlinear.NORM_TOP - 32) / width) * 0.99
    sizes = [m for m in NORM_STEPS if m < largest] + [largest]
    rng = np.random.default_rng([width, degree])
    z = rng.standard_normal((len(sizes), rows, width))
    z[:, 0] *= 1e-3
    z[:, 0, 1] = 1  # one outlier carries the row
    z /= np.sqrt((z**2).mean(axis=2, keepdims=True))
    x = encode((z * np.array(sizes)[:, None, None]).reshape(-1, width), entering)
    real = decode(x, entering)

    async def op(ctx: Context, sx: Share) -> Share:
        return await nonlinear.rms_norm(ctx, "norm", sx, entering, eps, s, NORMED)

    (got,) = compute(op, x)
    root = np.sqrt((real**2).mean(axis=1, keepdims=True) + eps)
    want = real / root
    pieces = {2: 2.2e-4, 3: 1.2e-4}[degree]
    if width * eps * 2.0**32 < 2 ** (14 + nonlinear.WINDOW_OVERLAP):
        pieces = 4e-4  # the first window cannot be as fine as eps asks for
    relative = pieces + 3 * 2.0 ** (16 - NORMED) * root
    error = np.abs(decode(got, NORMED) - want)
    allowed = relative * np.abs(want) + (0.5 + 2 / root) * 2.0**-16
    row = (error / allowed).max(axis=1).argmax()
    assert (error < allowed).all(), f"root mean square {root[row, 0]:.3g}: {error[row].max():.2e}"


def test_an_inverse_root_is_read_before_it_is_chosen() -> None:
    ctx, _ = planning({})
    root = nonlinear.InverseRoot("root", ctx.share(np.zeros((1, 2), np.uint64)), 8, 1e-5, Settings())

    async def choose() -> None:
        await root.choose(ctx, 23)

    with pytest.raises(LocalError, match="read before it is chosen"):
        trio.run(choose)


@pytest.mark.parametrize("width", [64, 288])
def test_rms_norm_of_rows_smaller_than_eps(width: int) -> None:
    """Rows whose mean square lies below eps, down to zero, to within 1.5 units, and two before scaling."""
    rng = np.random.default_rng(width)
    sizes = np.array([0, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3])
    x = encode((rng.standard_normal((6, 4, width)) * sizes[:, None, None]).reshape(-1, width), 32)
    real = decode(x, 32)

    async def op(ctx: Context, sx: Share) -> Share:
        return await nonlinear.rms_norm(ctx, "norm", sx, 32, 1e-6, Settings(), NORMED)

    (got,) = compute(op, x)
    root = np.sqrt((real**2).mean(axis=1, keepdims=True) + 1e-6)
    assert (np.abs(decode(got, NORMED) - real / root) < (1.5 + 2 / root) * 2.0**-16).all()


@pytest.mark.parametrize(("scale", "sizes"), [(12, [0.1, 1.0, 30.0, 1000.0]), (20, [0.01, 0.1, 1.0, 30.0])])
def test_rms_norm_at_other_scales(scale: int, sizes: list[float]) -> None:
    rng = np.random.default_rng(scale)
    z = rng.standard_normal((len(sizes), 4, 64))
    x = encode((z * np.array(sizes)[:, None, None]).reshape(-1, 64), 48)
    real = decode(x, 48)

    async def op(ctx: Context, sx: Share) -> Share:
        return await nonlinear.rms_norm(ctx, "norm", sx, 48, 1e-5, Settings(scale), NORMED)

    (got,) = compute(op, x)
    root = np.sqrt((real**2).mean(axis=1, keepdims=True) + 1e-5)
    relative = 1.2e-4 + 3 * 2.0 ** (scale - NORMED) * root
    allowed = relative * np.abs(real / root) + (0.5 + 2 / root) * 2.0**-scale
    assert (np.abs(decode(got, NORMED) - real / root) < allowed).all()


# --- softmax ------------------------------------------------------------------------------------------------


def causal(rows: int, keys: int) -> npt.NDArray[np.bool_]:
    return np.arange(keys)[None, :] <= np.arange(keys - rows, keys)[:, None]


@dataclass
class Soft:
    """Secure weights, their sums and inverses, beside the float softmax over what may be seen."""

    weights: Real
    total: Real
    probabilities: Real
    wanted: Real
    seen: npt.NDArray[np.bool_]


def softmax(
    scores: Real,
    allowed: npt.NDArray[np.bool_],
    valid: Sequence[int] | None,
    s: Settings,
    entering: int | None = None,
) -> Soft:
    entering = 2 * s.scale_bits if entering is None else entering
    if valid is not None:  # as attention gives them: padding has keys of 0, to within a unit
        scores = np.where(
            np.array(valid) == 1, scores, np.random.default_rng(1).uniform(-0.1, 0.1, scores.shape)
        )
    x = encode(scores, entering)

    async def op(ctx: Context, sx: Share, *v: Share) -> list[Share]:
        scores = Scores(sx, entering, allowed.astype(np.uint64), v[0] if v else None, s.few_rounds)
        ((e, total),) = await nonlinear.exponentials(ctx, "softmax", [scores])
        (inverse,) = await nonlinear.reciprocals(ctx, "reciprocal", [(total, scores.keys)], s)
        return [e, total, *inverse]

    e, total, *inverse = compute(op, x, *([] if valid is None else [np.array(valid, np.uint64)]))
    real = decode(x, entering)
    seen = np.broadcast_to(allowed[None], real.shape)
    if valid is not None:
        seen = seen & (np.array(valid) == 1)
    top = np.where(seen, real, -np.inf).max(axis=-1, keepdims=True, initial=-1e9)
    want = np.where(seen, np.exp(np.minimum(real - top, 0)), 0)
    want /= np.maximum(want.sum(axis=-1, keepdims=True), 1e-300)
    got = decode(e, 24)
    return Soft(got, decode(total, 24), got * inverse_of(*inverse)[..., None], want, seen)


# Error of one probability, and of a whole row (sum of absolute errors), and what each key adds to it by its
# rounding: in a row these errors add up in size, in the sum that divides one probability at random.
ONE = {1: 2.5e-2, 2: 2.8e-3, 3: 7e-4}
ROW = {1: 5e-2, 2: 6e-3, 3: 1.5e-3}
PER_KEY = 2e-5  # a weight is a multiple of 2^-24, and a sum may be as small as e^-8


def close(got: Soft, s: Settings, where: str = "") -> None:
    error = np.abs(got.probabilities - got.wanted)
    keys = error.shape[-1]
    hidden = np.abs(got.weights[~got.seen])
    assert hidden.max(initial=0) <= 2.0**-24, f"{where}: weight on what may not be seen"
    rows = got.seen.any(axis=-1)
    assert error[rows].max() < ONE[s.degree] + PER_KEY * math.sqrt(keys), (
        f"{where}: a probability is off by {error[rows].max():.1e}"
    )
    assert error[rows].sum(axis=-1).max() < ROW[s.degree] + PER_KEY * keys, (
        f"{where}: row {error[rows].sum(-1).max():.1e}"
    )
    assert got.total[rows].min() > math.exp(-8.75) * 0.9 and got.total[rows].max() < 2**11


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("keys", [1, 2, 7, 64, 512])
def test_softmax_of_causal_rows(keys: int, degree: int) -> None:
    rows = min(keys, 3)
    rng = np.random.default_rng([keys, degree])
    scores = rng.standard_normal((2, rows, keys)) * np.array([1.0, 6.0])[:, None, None]
    close(softmax(scores, causal(rows, keys), None, Settings(16, degree)), Settings(16, degree))


@pytest.mark.parametrize("keys", [1, 2, 7, 64, 127, 128])
@pytest.mark.parametrize("round_trip", [1, 20])
def test_softmax_of_single_rows(keys: int, round_trip: float) -> None:
    """As in decoding, where counts are tested in the ring, or over GF(2)."""
    rng = np.random.default_rng(keys)
    scores = rng.standard_normal((3, 1, keys)) * np.array([1.0, 6.0, 40.0])[:, None, None]
    s = Settings(round_trip=round_trip)
    close(softmax(scores, np.ones((1, keys), bool), None, s), s)


def test_softmax_of_hard_rows() -> None:
    """Scores in +-60, outliers at the ends of the domain, all equal, all at one end, one step apart."""
    rng = np.random.default_rng(5)
    keys, end = 32, nonlinear.SCORE_BOUND - 0.01
    outlier = rng.standard_normal((2, keys))
    outlier[0, 3], outlier[1, 3], outlier[1, 4] = 59.0, end, -end
    rows = {
        "uniform in 60": rng.uniform(-60, 60, (4, keys)),
        "uniform in the domain": rng.uniform(-end, end, (4, keys)),
        "outlier": outlier,
        "all equal": np.stack([np.full(keys, v) for v in (-end, -60, -4.0, 0.0, 3.999, 4.0, 60, end)]),
        "two ends": np.stack([np.where(np.arange(keys) < m, end, -end) for m in (1, 31)]),
        "far below": np.stack(
            [np.where(np.arange(keys) == 0, 0.0, -d) for d in (10.0, 20.0, 24, 28, 32, 60, 200)]
        ),
        "one step apart": (np.arange(keys) * 2.0**-16)[None] + np.array([[0.0], [-4.0], [3.9999]]),
    }
    scores = np.concatenate(list(rows.values()))[None]
    got = softmax(scores, np.ones(scores.shape[1:], bool), None, Settings())
    at = 0
    for name, part in rows.items():
        cut = slice(at, at + len(part))
        at += len(part)
        close(Soft(*(getattr(got, k)[:, cut] for k in Soft.__dataclass_fields__)), Settings(), name)


@pytest.mark.parametrize("keys", [255, 256])
def test_softmax_counts_every_key(keys: int) -> None:
    """Rows of equal scores at the last number of keys that 8 bits count and the first that they do not: were
    256 counted modulo 2^8, no score would be seen above any threshold below them all.
    """
    scores = np.broadcast_to(np.array([-60.0, 0.0, 60.0])[:, None], (1, 3, keys))
    close(softmax(scores, np.ones((3, keys), bool), None, Settings()), Settings())


@pytest.mark.parametrize("above", [0.0, 3.0, 20.0, 227.0, 245.0, -245.0])
def test_softmax_ignores_padding(above: float) -> None:
    """Padded slots, whose scores are next to 0, lie up to 245 above every valid one, or as far below: they
    have no weight at all, and a row of padding has none.
    """
    rng = np.random.default_rng(int(abs(above)))
    pad, keys = 5, 16
    scores = rng.uniform(-4, 4, (2, keys, keys)) - above
    valid = [0] * pad + [1] * (keys - pad)
    got = softmax(scores, causal(keys, keys), valid, Settings())
    close(got, Settings())
    assert not got.total[:, :pad].any() and not got.weights[~got.seen].any()


def test_softmax_with_gaps_between_prompts() -> None:
    """Padding also inside: valid slots, then the padding of a second prompt, then valid ones."""
    rng = np.random.default_rng(9)
    valid = [0, 1, 1, 1, 0, 0, 1, 1, 1]
    scores = rng.uniform(-30, 30, (3, 4, 9))
    close(softmax(scores, causal(4, 9), valid, Settings()), Settings())


@pytest.mark.parametrize(("scale", "entering"), [(10, 20), (20, 40), (16, 53)])
def test_softmax_at_other_scales(scale: int, entering: int) -> None:
    rng = np.random.default_rng(scale)
    close(
        softmax(
            rng.uniform(-40, 40, (2, 4, 24)), causal(4, 24), [0] * 3 + [1] * 21, Settings(scale), entering
        ),
        Settings(scale),
    )


# --- sampling -----------------------------------------------------------------------------------------------


def choose(logits: Real, sampler: Sampler, seeds: Sequence[bytes], f: int = 16) -> list[int]:
    """Secure choice for every seed, from one sharing of the logits."""
    given: list[bytes] = []

    async def op(ctx: Context, x: Share) -> list[Share]:
        out = []
        for i in range(len(seeds)):

            async def noise(i: int = i) -> bytes:
                return given[i] if given else bytes(32)

            out.append(await sampling.choose(ctx, f"choice {i}", x, sampler, noise))
        return out

    given.extend(seeds)
    return [int(v[0]) % (1 << ops.INDEX_BITS) for v in compute(op, encode(logits, transformer.LOGIT_SCALE))]


def plain_choice(logits: Real, temperature: float, k: int, seed: bytes) -> tuple[int, float]:
    """The same from floats: index, and by how much it won."""
    order = np.argsort(-logits, kind="stable")[:k]
    noise = sampling.gumbel(seed, len(order)).view(np.int64) / 2.0**sampling.NOISE_GRID
    noisy = logits[order] / temperature + noise
    ranked = np.sort(noisy)
    return int(order[noisy.argmax()]), float(ranked[-1] - ranked[-2]) if len(ranked) > 1 else 1.0


def spread_logits(vocab: int, seed: int, top: float) -> Real:
    """Random logits no two of which are so close that fixed point could swap them."""
    rng = np.random.default_rng(seed)
    return np.asarray(
        rng.permutation(np.linspace(-top, top, vocab) + rng.uniform(-0.2, 0.2, vocab) * (2 * top / vocab))
    )


@pytest.mark.parametrize(("vocab", "top"), [(1, 1.0), (2, 5.0), (33, 20.0), (300, 250.0)])
def test_greedy_is_argmax(vocab: int, top: float) -> None:
    for seed in range(2):
        logits = spread_logits(vocab, seed, top)
        assert choose(logits, Sampler("greedy", 1.0, 1, vocab), [b""]) == [int(logits.argmax())]


@pytest.mark.parametrize("gap", [8, 1000])
def test_greedy_tells_near_ties_apart(gap: int) -> None:
    """Logits that differ by 8 units of 2^-10 or more are told apart, wherever the larger stands."""
    for at in (0, 5, 10):
        logits = np.full(11, -3.0)
        logits[at] += gap * 2.0**-sampling.CHOICE_SCALE
        assert choose(logits, Sampler("greedy", 1.0, 1, 11), [b""]) == [at]


@pytest.mark.parametrize(
    ("vocab", "k", "temperature"),
    [(1, 4, 1.0), (5, 1, 0.7), (5, 2, 1.0), (5, 9, 1.3), (40, 6, 0.8), (70, 3, 5.0)],
)
def test_top_k_equals_the_plaintext_choice(vocab: int, k: int, temperature: float) -> None:
    seeds = [bytes([i, vocab, k]) + bytes(29) for i in range(4)]
    logits = spread_logits(vocab, vocab, 6.0)
    got = choose(logits, Sampler("sample", temperature, k, vocab), seeds)
    for seed, token in zip(seeds, got, strict=True):
        want, margin = plain_choice(logits, temperature, min(k, vocab), seed)
        assert margin > 0.01, "pick another seed: this choice is too close to call"
        assert token == want


def test_extreme_logits_stay_in_range() -> None:
    """Logits up to 2^8, set aside one by one: cold, where the largest wins, and so hot that any may."""
    logits = np.array([255.0, -255, 254, 0, -254.5, 253])
    for temperature, runs, different in ((0.05, 2, 1), (256.0, 7, 4)):
        sampler = Sampler("sample", temperature, 6, 6)
        seeds = [bytes([i]) + bytes(31) for i in range(runs)]
        want = [plain_choice(logits, temperature, 6, s)[0] for s in seeds]
        assert choose(logits, sampler, seeds) == want
        assert len(set(want)) >= different, "pick other seeds"


def test_noise_draws_from_the_softmax() -> None:
    """Chi-square of 6,000 plaintext choices against the softmax of the top k: the noise is Gumbel's."""
    logits = np.array([2.0, 1.1, 0.4, 0.35, -1.0, -2.0, 1.9])
    k, temperature, runs = 5, 0.9, 6000
    order = np.argsort(-logits)[:k]
    p = np.exp(logits[order] / temperature)
    p /= p.sum()
    counts = dict.fromkeys(order.tolist(), 0)
    for i in range(runs):
        counts[plain_choice(logits, temperature, k, i.to_bytes(32, "little"))[0]] += 1
    expected = p * runs
    chi = sum((counts[t] - e) ** 2 / e for t, e in zip(order.tolist(), expected, strict=True))
    assert chi < 23.5  # 1e-4 quantile for 4 degrees of freedom
    wrong = np.full(k, runs / k)
    assert sum((counts[t] - e) ** 2 / e for t, e in zip(order.tolist(), wrong, strict=True)) > 500


def test_noise_is_fixed_by_its_seed() -> None:
    a, b = sampling.gumbel(bytes(32), 50), sampling.gumbel(bytes(31) + b"\1", 50)
    assert np.array_equal(a, sampling.gumbel(bytes(32), 50)) and (a != b).sum() > 45
    many = sampling.gumbel(bytes(32), 4000).view(np.int64) / 2.0**sampling.NOISE_GRID
    assert abs(many.mean() - 0.5772) < 0.1 and abs(many.std() - math.pi / math.sqrt(6)) < 0.1
    assert len(np.unique(many)) > 2500, "the grid is too coarse"
    assert np.array_equal(many[:50], a.view(np.int64) / 2.0**sampling.NOISE_GRID)


# --- a whole forward pass -----------------------------------------------------------------------------------

LLAMA = PlanSpec(
    family="llama", layers=2, width=16, heads=4, kv_heads=2, head_dim=4, hidden=24, vocab=40, context=32,
    act="silu_glu", norm_eps=1e-5, positions="rope", rope_theta=10000.0, bos_id=None, eos_ids=(),
)  # fmt: skip
GPT2 = PlanSpec(
    family="gpt2", layers=2, width=12, heads=3, kv_heads=3, head_dim=4, hidden=20, vocab=33, context=24,
    act="gelu", norm_eps=1e-5, positions="learned", rope_theta=None, bos_id=None, eos_ids=(),
)  # fmt: skip
RELU = PlanSpec(
    family="gpt2", layers=1, width=8, heads=2, kv_heads=2, head_dim=4, hidden=16, vocab=20, context=20,
    act="relu", norm_eps=1e-5, positions="learned", rope_theta=None, bos_id=None, eos_ids=(),
)  # fmt: skip


def random_model(spec: PlanSpec, seed: int, attention: float = 1.5) -> dict[str, Real]:
    """Weights with every tensor at work; `attention` widens the scores."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in spec.shapes().items():
        wide = attention if name.endswith(".qkv") else 1.0
        out[name] = rng.standard_normal(shape) * (0.2 if len(shape) == 1 else wide * shape[0] ** -0.5)
    out["embed"] *= spec.vocab**0.5
    if "pos" in out:
        out["pos"] *= spec.context**0.5 * 0.5
    return {name: decode(encode(v, 16), 16) for name, v in out.items()}


def reference(spec: PlanSpec, w: Mapping[str, Real], tokens: Sequence[int]) -> Real:
    """Logits (tokens, vocab) by the formulas of `mimir.model.checkpoint`, without cache or padding."""
    n, hd = len(tokens), spec.head_dim
    h = w["embed"][list(tokens)]
    if spec.positions == "learned":
        h = h + w["pos"][:n]

    def norm(x: Real) -> Real:
        return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + spec.norm_eps))

    def rotate(x: Real) -> Real:
        """Coordinates i and i + hd / 2 of (heads, n, hd) turn by position * theta^(-2i / hd)."""
        if spec.rope_theta is None:
            return x
        angle = np.arange(n)[:, None] * spec.rope_theta ** (-2 * np.arange(hd // 2) / hd)
        pairs = (x[..., : hd // 2] + 1j * x[..., hd // 2 :]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    act = {"gelu": EXACT["gelu"], "gelu_tanh": EXACT["gelu_tanh"], "relu": lambda x: np.maximum(x, 0)}
    for i in range(spec.layers):
        u = norm(h)
        y = (u @ w[f"{i}.qkv"] + w[f"{i}.qkv_b"]).reshape(n, -1, hd).swapaxes(0, 1)
        q, k, v = np.split(y, [spec.heads, spec.heads + spec.kv_heads])
        group = spec.heads // spec.kv_heads
        k, v = (np.repeat(x, group, axis=0) for x in (rotate(k), v))
        scores = np.where(np.tri(n, dtype=bool), rotate(q) @ k.swapaxes(1, 2), -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        h = h + (p @ v).swapaxes(0, 1).reshape(n, -1) @ w[f"{i}.o"] + w[f"{i}.o_b"]
        m = norm(h) @ w[f"{i}.in"] + w[f"{i}.in_b"]
        if spec.act == "silu_glu":
            a = EXACT["silu"](m[:, : spec.hidden]) * m[:, spec.hidden :]
        else:
            a = act[spec.act](m)
        h = h + a @ w[f"{i}.out"] + w[f"{i}.out_b"]
    return np.asarray(norm(h) @ w["head"] + w["head_b"])


@dataclass
class Piece:
    """Rows of one pass: prompt rows with their padding in front, or one decoded token."""

    tokens: list[int]
    pad: int = 0
    decoded: bool = False
    chunks: list[int] = field(default_factory=list)  # row counts the prompt is cut into

    @property
    def rows(self) -> int:
        return self.pad + len(self.tokens)


def secure(spec: PlanSpec, w: Mapping[str, Real], pieces: Sequence[Piece], s: Settings) -> list[Real]:
    """Logits after each piece, computed as a session does: padding in front of prompts, secret positions."""
    shared = parties.share_weights(parties.encoded(spec, w, s.scale_bits))
    plans = []
    first = 0
    for piece in pieces:
        for rows in piece.chunks or [piece.rows]:
            plans.append((first, rows))
            first += rows

    async def plan() -> list[dict[prep.Kind, int]]:
        out = []
        decoded = [p.decoded for p in pieces for _ in (p.chunks or [0])]
        for (at, rows), single in zip(plans, decoded, strict=True):
            cost = await transformer.cost_of(spec, s, at, rows, prompt=not single, sampler=_no_choice)
            out.append(cost.demand)
        return out

    async def _no_choice(ctx: Context, step: str, x: Share) -> None:
        return None

    demands = trio.run(plan)

    async def party(p: parties.Party) -> list[Ring]:
        cache = Cache.empty(spec.layers)
        valid: list[Share] = []
        seen, step, out = 0, 0, []
        for number, piece in enumerate(pieces):
            real = len(piece.tokens)
            token = np.array([0] * piece.pad + piece.tokens, np.uint64)
            position = np.array([0] * piece.pad + list(range(seen, seen + real)), np.uint64)
            flags = np.array([0] * piece.pad + [1] * real, np.uint64)
            seen += real
            seed = 100 * number
            tokens, positions = p.share(token, seed), p.share(position, seed + 1)
            valid.append(p.share(flags, seed + 2))
            if not piece.decoded:
                entering = await p.context(transformer.entry_demand(spec, piece.rows), f"entry {number}")
                entry = transformer.entry(entering, spec, piece.rows)
                kt, kp = transformer.index_bits(spec.vocab), transformer.index_bits(spec.context)
                (at,) = await p.doors.open_low(f"offset {number}", kt, tokens + entry.token["r"])
                (where,) = await p.doors.open_low(f"place {number}", kp, positions + entry.position["r"])
            done = 0
            for rows in piece.chunks or [piece.rows]:
                ctx = await p.context(demands[step], f"step {step}")
                name = f"step {step}"
                if piece.decoded:
                    new = await transformer.reenter(ctx, name, spec, tokens, positions)
                else:
                    cut = slice(done, done + rows)
                    new = await transformer.embed(ctx, name, spec, entry.part(cut), at[cut], where[cut])
                done += rows
                cache.valid = concat(valid)[: cache.length + rows]
                hidden = await transformer.forward(ctx, name, spec, new, [cache], s)
                scores = (await transformer.logits(ctx, name, spec, hidden[-1:], s))[0]
                step += 1
            out.append(scores.v)
        return out

    results = parties.run_parties(party, weights=shared, seed=b"forward")
    scale = transformer.LOGIT_SCALE
    return [decode(parties.reconstruct(list(v)), scale) for v in zip(*results, strict=True)]


def conversation(spec: PlanSpec, pad: int) -> list[Piece]:
    """A prompt in two chunks, two decoded tokens, a second prompt with padding of its own, one more token."""
    rng = np.random.default_rng(spec.vocab)
    tokens = rng.integers(1, spec.vocab, 11).tolist()
    rows = pad + 5
    return [
        Piece(tokens[:5], pad, chunks=[rows // 2, rows - rows // 2]),
        Piece(tokens[5:6], decoded=True),
        Piece(tokens[6:7], decoded=True),
        Piece(tokens[7:10], pad and pad - 1),
        Piece(tokens[10:], decoded=True),
    ]


def against_reference(
    spec: PlanSpec, w: Mapping[str, Real], pieces: Sequence[Piece], s: Settings
) -> list[float]:
    got = secure(spec, w, pieces, s)
    text = [t for p in pieces for t in p.tokens]
    want = reference(spec, w, text)
    ends = np.cumsum([len(p.tokens) for p in pieces]) - 1
    return [float(np.abs(g - want[e]).max()) for g, e in zip(got, ends, strict=True)]


LOGIT_BOUND = 4e-2  # of logits of size 1 to 10; measured: at most 1.5e-2
WIDE = 3.0  # times the usual size of queries and keys: scores reach about 60


@pytest.mark.parametrize("pad", [0, 3], ids=["bare", "padded"])
@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=lambda s: s.family)
def test_forward_agrees_with_the_formulas(spec: PlanSpec, pad: int) -> None:
    """Chunked prefill, decoding, a second prompt, with and without padding: the logits of the bare text."""
    errors = against_reference(spec, random_model(spec, 3), conversation(spec, pad), Settings())
    assert max(errors) < LOGIT_BOUND, errors


@pytest.mark.parametrize("spec", [RELU], ids=["relu"])
def test_forward_with_relu(spec: PlanSpec) -> None:
    errors = against_reference(
        spec, random_model(spec, 4), [Piece([3, 1, 7], 2), Piece([5], decoded=True)], Settings()
    )
    assert max(errors) < LOGIT_BOUND, errors


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=lambda s: s.family)
def test_padding_that_attracts_attention(spec: PlanSpec) -> None:
    """Scores so wide that rows would rather look at padding than at the text: still the text's logits."""
    w = random_model(spec, 5, attention=WIDE)
    errors = against_reference(spec, w, [Piece([4, 9, 2], 4), Piece([7], decoded=True)], Settings())
    assert max(errors) < LOGIT_BOUND, errors
    text = [0, 0, 0, 0, 4, 9, 2]  # the same with the padding believed, to show that the test could fail
    assert np.abs(reference(spec, w, text)[-1] - reference(spec, w, [4, 9, 2])[-1]).max() > 0.1
