"""Two plaintext models over one plan: the float reference, and a fixed-point twin of the secure engine.

`FloatModel` says what the checkpoint means. `FixedModel` does in the clear, in integers modulo 2^64, what the
parties do on shares: the same scales, tables and truncations, so its distance to the float model is the price
of fixed point alone, and its distance to the engine is a bug. Every constant is in `Fixed`.

Both keep a key/value cache: `forward(ids)` continues where the last call ended. `pad` counts slots before the
ids that hold no token: as in the engine they are computed as token 0 at position 0, and never attended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mimir.model import transformer
from mimir.model.checkpoint import SHORT_SCALE, Floats, Plan, encode
from mimir.mpc import nonlinear, prep

Ints = npt.NDArray[np.int64]
Tap = Callable[[str, Floats], None]  # receives (name of an intermediate value, the value as float)

SAFE_BITS = 61  # a value must keep |z| < 2^61 before its scale is dropped
EXACT_FLOAT_BITS = 53


def gelu(x: Floats) -> Floats:
    return np.asarray([0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x.ravel()]).reshape(x.shape)


def gelu_tanh(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))))


def silu(x: Floats) -> Floats:
    return x * 0.5 * (1.0 + np.tanh(0.5 * x))  # x / (1 + exp(-x)) without overflow


def relu(x: Floats) -> Floats:
    return np.maximum(x, 0.0)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "silu_glu": silu}


class Model(Protocol):
    plan: Plan

    def reset(self) -> None: ...
    def forward(self, ids: Sequence[int], tap: Tap | None = None, pad: int = 0) -> Floats: ...


def _rotary(plan: Plan, positions: Ints) -> tuple[Floats, Floats]:
    """cos and sin of position * theta^(-2i/head_dim), each (rows, head_dim/2)."""
    assert plan.rope_theta is not None
    frequency = plan.rope_theta ** (-np.arange(0, plan.head_dim, 2) / plan.head_dim)
    angle = positions[:, None] * frequency
    return np.cos(angle), np.sin(angle)


def _split_heads(plan: Plan, z: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """(rows, qkv_width) -> q (heads, rows, hd), k and v (kv_heads, rows, hd)."""
    rows, out, at = len(z), [], 0
    for count in (plan.heads, plan.kv_heads, plan.kv_heads):
        part = z[:, at : at + count * plan.head_dim]
        out.append(part.reshape(rows, count, plan.head_dim).transpose(1, 0, 2))
        at += count * plan.head_dim
    return out


@dataclass
class _Slots:
    """Which slots of the cache hold a token, and what a new row may look at."""

    valid: npt.NDArray[np.bool_]

    @classmethod
    def none(cls) -> _Slots:
        return cls(np.zeros(0, np.bool_))

    def extend(self, plan: Plan, ids: Sequence[int], pad: int) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        """(tokens, positions, visible (rows, slots)) of `pad` empty slots and then `ids`."""
        before, past = int(self.valid.sum()), len(self.valid)
        rows = pad + len(ids)
        if past + rows > plan.context:
            raise ValueError(f"context of {plan.context} exceeded")
        self.valid = np.concatenate([self.valid, np.arange(rows) >= pad])
        slots = past + np.arange(rows)
        tokens = np.concatenate([np.zeros(pad, np.int64), np.asarray(ids, np.int64)])
        positions = np.concatenate([np.zeros(pad, np.int64), before + np.arange(len(ids))])
        return tokens, positions, (np.arange(past + rows) <= slots[:, None]) & self.valid


class FloatModel:
    """The plan in float32 or float64."""

    def __init__(self, plan: Plan, dtype: npt.DTypeLike = np.float64) -> None:
        self.plan = plan
        self.weights = {name: plan.tensor(name).astype(dtype) for name in plan.names()}
        self.dtype = dtype
        self.reset()

    def reset(self) -> None:
        """Forget the cache."""
        self.slots = _Slots.none()
        self.keys: list[Any] = [None] * self.plan.layers
        self.values: list[Any] = [None] * self.plan.layers

    def forward(self, ids: Sequence[int], tap: Tap | None = None, pad: int = 0) -> Floats:
        """Logits (rows, vocab) of every id, appended to the cache."""
        plan, w, rows = self.plan, self.weights, pad + len(ids)
        note = tap or (lambda name, value: None)
        tokens, positions, see = self.slots.extend(plan, ids, pad)

        def norm(h: Floats) -> Floats:
            square = (h * h).mean(axis=-1, keepdims=True)
            return np.asarray(h / np.sqrt(square + np.asarray(plan.norm_eps, self.dtype)))

        def rotate(x: Floats) -> Floats:
            if plan.positions != "rope":
                return x
            cos, sin = (part.astype(self.dtype) for part in _rotary(plan, positions))
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        h = w["embed"][tokens]
        if plan.positions == "learned":
            h = h + w["pos"][positions]
        note("embed", h)
        for i in range(plan.layers):
            u = norm(h)
            note(f"{i}.norm1", u)
            q, k, v = _split_heads(plan, u @ w[f"{i}.qkv"] + w[f"{i}.qkv_b"])
            q, k = rotate(q), rotate(k)
            if self.keys[i] is not None:
                k, v = np.concatenate([self.keys[i], k], axis=1), np.concatenate([self.values[i], v], axis=1)
            self.keys[i], self.values[i] = k, v
            group = plan.heads // plan.kv_heads
            scores = q @ np.repeat(k, group, axis=0).transpose(0, 2, 1)
            note(f"{i}.scores", np.where(see, scores, 0))
            top = np.where(see, scores, -np.inf).max(-1, keepdims=True, initial=-1e30)
            e = np.where(see, np.exp(np.minimum(scores - top, 0)), 0).astype(self.dtype)
            p = e / np.maximum(
                e.sum(-1, keepdims=True), np.finfo(self.dtype).tiny
            )  # an empty slot sees nothing
            note(f"{i}.softmax", p)
            z = (p @ np.repeat(v, group, axis=0)).transpose(1, 0, 2).reshape(rows, -1)
            note(f"{i}.attention", z)
            h = h + (z @ w[f"{i}.o"] + w[f"{i}.o_b"])
            note(f"{i}.residual1", h)
            u = norm(h)
            note(f"{i}.norm2", u)
            m = u @ w[f"{i}.in"] + w[f"{i}.in_b"]
            note(f"{i}.hidden", m)
            a = ACTIVATIONS[plan.act](m[:, : plan.hidden]).astype(self.dtype)
            if plan.act == "silu_glu":
                a = a * m[:, plan.hidden :]
            note(f"{i}.activation", a)
            h = h + (a @ w[f"{i}.out"] + w[f"{i}.out_b"])
            note(f"{i}.residual2", h)
        u = norm(h)
        note("final norm", u)
        logits = u @ w["head"] + w["head_b"]
        note("logits", logits)
        return np.asarray(logits, np.float64)[pad:]


# -- the twin


_SETTINGS = nonlinear.Settings()


@dataclass(frozen=True)
class Fixed:
    """Every scale and table size of the twin.

    The numbers are the engine's, so that they cannot drift; what is done with them is written here anew.
    """

    scale_bits: int = _SETTINGS.scale_bits  # f: activations, weights, cache
    degree: int = _SETTINGS.degree  # cheby.deg
    rounding: str = "dither"  # as the engine's masks do it; "nearest" is its mean, and deterministic
    seed: int = 1  # of the dither
    few_rounds: bool = _SETTINGS.few_rounds  # or an activation is chosen before it is truncated
    wave_unit: int = nonlinear.WAVE_UNIT
    wave_period: int = nonlinear.WAVE_PERIOD
    unit_scale: int = prep.UNIT_SCALE
    chosen_unit: int = nonlinear.CHOSEN_UNIT
    chosen_scale: int = nonlinear.CHOSEN_SCALE
    factor_scale: int = prep.FACTOR_SCALE
    active_rest: int = nonlinear.ACTIVE_REST
    reach_rest: int = nonlinear.REACH_REST
    reach_from: int = nonlinear.REACH_FROM
    reach_lift: float = nonlinear.REACH_LIFT
    exp_bits: int = nonlinear.EXP_BITS
    exp_rest: int = nonlinear.EXP_REST
    exp_stretch: tuple[int, int] = nonlinear.EXP_STRETCH
    exp_room: int = nonlinear.EXP_ROOM
    coarse_bin: int = nonlinear.COARSE_BIN
    coarse_bits: int = nonlinear.COARSE_BITS
    coarse_rest: int = nonlinear.COARSE_REST
    exp_scale: int = nonlinear.EXP_SCALE
    fine_scale: int = nonlinear.FINE_SCALE
    coarse_scale: int = nonlinear.COARSE_SCALE
    below_one: int = nonlinear.BELOW_ONE
    inverse_scale: int = nonlinear.INVERSE_SCALE
    half_input: int = transformer.HALF_INPUT
    product_scale: int = transformer.PRODUCT_SCALE
    relu_scale: int = transformer.RELU_SCALE
    normed_scale: int = transformer.NORMED_SCALE
    key_scale: int = transformer.KEY_SCALE
    short_scale: int = SHORT_SCALE
    residual_scale: int = transformer.RESIDUAL_SCALE
    sum_bits: int = nonlinear.SUM_BITS
    norm_bits: int = nonlinear.NORM_BITS
    window_overlap: int = nonlinear.WINDOW_OVERLAP
    window_first: int = nonlinear.WINDOW_FIRST
    headroom: int = nonlinear.HEADROOM
    sum_shift: int = nonlinear.SUM_SHIFT
    sum_base: int = nonlinear.SUM_BASE
    norm_top: int = nonlinear.NORM_TOP
    rotary_scale: int = transformer.ROTARY_SCALE

    @property
    def rest(self) -> int:
        return nonlinear.Settings(degree=self.degree).rest


@dataclass(frozen=True)
class Pieces:
    """A polynomial per index; coefficient d of remainder^d. The result has `scale` fraction bits."""

    low: int
    rest: int
    bits: int
    tables: Ints  # (degree + 1, 2^bits)
    scale: int


def _mask_reading(x: Ints, low: int, rest: int, rng: np.random.Generator | None) -> tuple[Ints, Ints]:
    """Index and signed remainder of x as read under a mask.

    The three components of x, raised by three units, each lose `low` bits; the mask's remainder carries into
    the index at random. Without `rng`: the mean of the first, and rounding to nearest.
    """
    unit = 1 << low
    if rng is None:
        w = (x + 2 * unit) >> low if low else x
        below = w & ((1 << rest) - 1)
        carry = below >> (rest - 1) if rest else below
    else:
        raised = x + 3 * (unit - 1)
        lost = rng.integers(0, unit, (2, *x.shape)).sum(axis=0)
        w = (raised - lost - ((raised - lost) & (unit - 1))) >> low
        below = w & ((1 << rest) - 1)
        carry = (below + rng.integers(0, 1 << rest, x.shape)) >> rest
    return (w >> rest) + carry, below - (carry << rest)


MEAN_EXCESS = 1.5  # of such a reading, in units of 2^low, less 1.5 units of 1


def pieces(
    fn: Callable[[Floats], Floats],
    start: float,
    width: float,
    bits: int,
    unit: float,
    fx: Fixed,
    *,
    low: int,
    scale: int | None = None,
    first: int = 0,
    rest: int | None = None,
) -> Pieces:
    """fn on [start, start + width * 2^bits), 0 in pieces below `first`; 2^low of the input is worth `unit`.

    A remainder is signed, so piece j serves one bin on either side of start + j * width. Fitted by least
    squares at Chebyshev nodes, which is within a few per cent of minimax at these degrees.
    """
    nodes = np.cos(np.pi * (np.arange(16) + 0.5) / 16)
    centres = start + np.arange(1 << bits) * width - MEAN_EXCESS * (1 - 2.0**-low) * unit
    samples = fn(centres[:, None] + nodes * width)
    weighted = np.linalg.pinv(np.vander(nodes, fx.degree + 1, increasing=True))
    powers = weighted @ samples.T  # (degree + 1, 2^bits), in t = remainder / 2^rest
    powers[:, :first] = 0
    if scale is None:
        magnitude = math.ceil(math.log2(max(float(np.abs(powers).sum(axis=0).max()), 2.0**-30))) + 1
        scale = min(fx.headroom - magnitude, fx.inverse_scale + 56)
    rest = rest or fx.rest
    top = scale - rest * fx.degree
    exponents = top + rest * (fx.degree - np.arange(fx.degree + 1))
    tables = np.rint(powers * 2.0 ** exponents[:, None]).astype(np.int64)
    return Pieces(low, rest, bits, tables, scale)


class FixedModel:
    """The plan in integers modulo 2^64, step by step as the engine computes it on shares.

    Raises OverflowError, naming the step, where a value leaves its table or the range that truncation can
    handle: there the engine's result would be wrong.
    """

    def __init__(self, plan: Plan, fixed: Fixed | None = None) -> None:
        self.plan = plan
        self.fixed = fx = fixed or Fixed()
        d, f = plan.width, fx.scale_bits
        # Held as float64: below 2^53 the integers are exact, and BLAS is used where a product stays so too.
        self.weights = {
            name: encode(plan.tensor(name), plan.scale(name, f), name).view(np.int64).astype(np.float64)
            for name in plan.names()
        }
        self.act = None if plan.act == "relu" else nonlinear.COSINES[plan.act.removesuffix("_glu")]
        self.reciprocal = self._ladder(
            lambda x: 2.0 ** (fx.exp_scale + fx.sum_shift) / np.maximum(x, 2.0 ** (fx.sum_base - 1)),
            fx.sum_bits,
            fx.sum_base,
            fx.exp_scale + fx.sum_shift + 11,  # more windows than a few keys need give the same
        )
        self.rsqrt = self._ladder(
            lambda x: 1 / np.sqrt(np.maximum(x / (d * 4.0**f) + plan.norm_eps, plan.norm_eps / 4)),
            fx.norm_bits,
            max(14, math.floor(math.log2(max(plan.norm_eps, 1e-12) * d)) + 2 * f - fx.window_overlap),
            fx.norm_top,
        )
        self.reset()

    def reset(self) -> None:
        """Forget the cache."""
        self.slots = _Slots.none()
        self.keys: list[Any] = [None] * self.plan.layers
        self.values: list[Any] = [None] * self.plan.layers
        dither = self.fixed.rounding == "dither"
        self.rng = np.random.default_rng(self.fixed.seed) if dither else None

    # Tables.

    def _ladder(self, fn: Callable[[Floats], Floats], bits: int, base: int, top: int) -> list[Pieces]:
        """Windows of integers, some octaves apart; the highest that is not empty answers."""
        fx, at = self.fixed, base
        out: list[Pieces] = []
        while True:
            first = fx.window_first - 1 if out else 0  # below that, a lower window answers
            low = at - fx.rest
            out.append(pieces(fn, 0.0, 2.0**at, bits, 2.0**low, fx, low=low, first=first))
            if (1 << top) <= ((1 << bits) - 2) << at:
                return out
            at += bits - fx.window_overlap

    # Arithmetic: int64 wraps as the ring does; every function names the step it works for.

    def _fits(self, step: str, largest: float) -> None:
        if not largest < 2.0**SAFE_BITS:
            raise OverflowError(
                f"{step}: a value of 2^{math.log2(largest):.1f} leaves the range of fixed point"
            )

    def _truncate(self, z: Ints, bits: int) -> Ints:
        """z / 2^bits to within two units."""
        if self.rng is None:
            return np.asarray((z + (1 << bits >> 1)) >> bits)
        return np.asarray(((z + self.rng.integers(0, 1 << bits, (3, *z.shape)).sum(axis=0)) >> bits) - 1)

    def _product(self, step: str, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Ints:
        """a @ b (batched) modulo 2^64."""
        af, bf = a.astype(np.float64), b.astype(np.float64)
        near = af @ bf
        self._fits(step, float(np.abs(near).max(initial=0.0)))
        if float(np.abs(af).max()) * float(np.abs(bf).sum(axis=-2).max()) < 2.0**EXACT_FLOAT_BITS:
            return near.astype(np.int64)  # every partial sum was exact
        return np.asarray(a.astype(np.int64) @ b.astype(np.int64))

    def _times(self, step: str, a: Ints, b: Ints) -> Ints:
        self._fits(step, float(np.abs(a.astype(np.float64) * b.astype(np.float64)).max()))
        return a * b

    def product_scale(self, name: str) -> int:
        """Of what a matrix behind a norm gives; what is known modulo 2^32 stands 32 bits higher."""
        relu = name.endswith("in") and self.plan.act == "relu"
        return self.fixed.relu_scale if relu else self.fixed.product_scale

    def _behind_norm(self, name: str, h: Ints, tap: Callable[[Ints], None], cut: int = 0) -> Ints:
        """The norm of the residual stream times a matrix, at `product_scale`, but for the first `cut` columns
        at `short_scale` less. `tap` gets the norm, at f and `normed_scale`, or what it is but for the root.
        """
        fx = self.fixed
        to, f = self.product_scale(name), fx.scale_bits
        self._fits(name, float(np.abs(h.astype(np.float64)).max()))
        h = self._truncate(h, fx.residual_scale - f)
        self._fits(name, float((h.astype(np.float64) ** 2).sum(axis=-1).max()))
        r = self._climb(name, (h * h).sum(axis=-1), self.rsqrt, to - fx.short_scale - f)[:, None]
        u = self._times(name, h, r) << (fx.product_scale - to)
        tap(u)
        above = np.full(self.weights[name].shape[1], to - f)
        above[:cut] -= fx.short_scale
        bias = self.weights[f"{name}_b"].astype(np.int64) << above
        if self.plan.halved(name):
            y = (
                self._product(name, self._lowered(u, fx.normed_scale - fx.half_input), self.weights[name])
                << 32
            )
        else:
            y = self._product(name, h, self.weights[name])
            y = np.concatenate([self._truncate(y[:, :cut], fx.short_scale), y[:, cut:]], axis=1)
            y = self._times(name, y, r)
        room = 256 / 255 if name == "head" else 1.0  # for a choice logits must stay below 255
        self._fits(name, room * float(np.abs((y + bias).astype(np.float64)).max()))
        return y + bias

    def _lowered(self, x: Ints, low: int) -> Ints:
        """x without `low` bits, as each component loses them by itself."""
        return _mask_reading(x - 3 * ((1 << low) - 1) // 2, low, 0, self.rng)[0]

    def _linear(self, name: str, x: Ints, scale: int | None = None) -> Ints:
        """x @ W + b at f more than the scale of x, which is f unless said otherwise."""
        bias = self.weights[name + "_b"].astype(np.int64) << (
            self.fixed.scale_bits if scale is None else scale
        )
        return self._product(name, x, self.weights[name]) + bias

    def _lookup(self, step: str, x: Ints, p: Pieces, first: int = 0) -> tuple[Ints, Ints]:
        """(index, value at p.scale) of x raised by `first` bins; what lies outside reads another piece."""
        j, t = _mask_reading(x, p.low, p.rest, self.rng)
        j = j + first
        row = p.tables[:, j % (1 << p.bits)]
        acc = row[-1]
        for c in row[-2::-1]:
            acc = self._times(step, acc, t) + c
        return j, acc

    def _inside(self, step: str, j: Ints, bits: int, used: npt.NDArray[np.bool_] | None = None) -> None:
        outside = (j < 0) | (j >= 1 << bits)
        if used is not None:
            outside &= used
        if outside.any():
            raise OverflowError(f"{step}: {int(outside.sum())} of {j.size} values lie outside the table")

    def _climb(self, step: str, x: Ints, ladder: list[Pieces], scale: int) -> Ints:
        """The value of the highest window that is not empty."""
        fx = self.fixed
        out = np.zeros_like(x)
        for level, p in enumerate(ladder):
            j, value = self._lookup(step, x, p)
            value = self._truncate(value, p.scale - scale)
            out = value if level == 0 else np.where(j % (1 << p.bits) >= fx.window_first, value, out)
        self._inside(step, j, ladder[-1].bits)
        return out

    # Layers.

    def _divide(self, step: str, z: Ints, total: Ints) -> Ints:
        """Rows at exp_scale + f divided by their sums: of two products, one of which has a factor of 0."""
        fx = self.fixed
        x, scale = total << fx.sum_shift, fx.exp_scale + fx.scale_bits
        first, windows = fx.below_one, self.reciprocal
        higher = np.zeros(x.shape, np.bool_)
        for p in windows[first:]:
            j, _ = _mask_reading(x, p.low, p.rest, self.rng)
            higher |= (j >= fx.window_first) & (x < ((1 << p.bits) - 1) << (p.low + p.rest))
        low = np.where(higher, 1 << (fx.sum_base + 4), x)
        large = np.where(higher, 0, self._climb(step, low, windows[:first], fx.coarse_scale))
        small = np.where(higher, self._climb(step, x, windows, fx.fine_scale), 0)
        fine, coarse = (self._truncate(z, scale - to) for to in (fx.fine_scale, fx.coarse_scale))
        return self._times(step, fine, large[..., None]) + self._times(step, coarse, small[..., None])

    def _out_of_attention(self, name: str, z: Ints) -> Ints:
        """What attention gives, times its matrix, at residual_scale."""
        fx = self.fixed
        y = self._product(name, z, self.weights[name])
        return y + (self.weights[f"{name}_b"].astype(np.int64) << (fx.residual_scale - fx.scale_bits))

    def _rotate(self, step: str, x: Ints, positions: Ints) -> Ints:
        """x at normed_scale -> f if it is rotated, else key_scale."""
        fx = self.fixed
        if self.plan.positions != "rope":
            return self._lowered(x, fx.normed_scale - fx.key_scale)
        bits = fx.rotary_scale
        cos, sin = (np.rint(part * 2.0**bits).astype(np.int64) for part in _rotary(self.plan, positions))
        a, b = np.split(x, 2, axis=-1)
        self._fits(step, 2.0**bits * 2 * float(np.abs(x).max()))
        z = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return self._truncate(z, bits + fx.normed_scale - fx.scale_bits)

    @property
    def score_scale(self) -> int:
        return 2 * (self.fixed.scale_bits if self.plan.positions == "rope" else self.fixed.key_scale)

    def _exponentials(self, step: str, scores: Ints, see: npt.NDArray[np.bool_]) -> Ints:
        """e^(score - shift) at exp_scale, 0 where not visible; scores at score_scale."""
        fx, scale = self.fixed, self.score_scale
        half = 1 << (scale + fx.coarse_bin + fx.coarse_bits - 1)
        j, _ = _mask_reading(scores + half, scale + fx.coarse_bin - fx.coarse_rest, fx.coarse_rest, self.rng)
        self._inside(f"{step}: coarse maximum", j, fx.coarse_bits, np.broadcast_to(see, j.shape))
        top = np.where(see, j, 0).max(axis=-1, keepdims=True)
        below = scores + half - ((top + 1) << (scale + fx.coarse_bin))
        lifted = below + round(fx.reach_lift * 2**scale)
        reading, _ = _mask_reading(lifted, scale - 1, fx.reach_rest, self.rng)
        near = see & (reading >= fx.reach_from)
        return np.where(
            near, self._truncate(self._decay(f"{step}: exp", below, near), fx.exp_room - fx.exp_scale), 0
        )

    def _decay(self, step: str, below: Ints, used: npt.NDArray[np.bool_]) -> Ints:
        """e^below at exp_room, for below at score_scale within the range of exp."""
        fx = self.fixed
        factor, more = fx.exp_stretch
        low = self.score_scale + more + 1 - fx.exp_rest
        bins = (1 << fx.exp_bits) - 3
        below = np.where(used, below, 0)
        x, _ = _mask_reading(below * factor + (bins << (low + fx.exp_rest)), low, 0, self.rng)
        if ((x < 0) | (x > (bins << fx.exp_rest) + 2)).any():
            raise OverflowError(f"{step}: a score lies outside the range of exp")
        unit = 2.0 ** (1 + more - fx.exp_rest) / factor
        shift = -bins * 2.0 ** (1 + more) / factor - MEAN_EXCESS * (1 - 2.0**-low) * unit
        if self.rng is None:
            return np.rint(np.exp(x * unit + shift) * 2.0**fx.exp_room).astype(np.int64)
        masks = self.rng.integers(0, 1 << fx.exp_rest, (3, *x.shape))
        scale = 2.0**fx.factor_scale
        product = np.prod(np.rint(np.exp((2.0 ** (fx.exp_rest - 1) - masks) * unit) * scale), axis=0)
        back = (masks.sum(axis=0) - 3 * 2.0 ** (fx.exp_rest - 1)) * unit
        public = np.rint(np.exp(x * unit + shift + back) * 2.0 ** (fx.exp_room - 3 * fx.factor_scale))
        return np.asarray(product.astype(np.int64) * public.astype(np.int64))

    def _activate(self, step: str, x: Ints) -> Ints:
        """Activation of x at product_scale, result at f."""
        fx = self.fixed
        scale = self.product_scale("in")
        if self.act is None:  # relu: the sign is that of what is left without f bits
            reading, _ = _mask_reading(x, scale - fx.scale_bits, 0, self.rng)
            return np.where(reading < 0, 0, self._truncate(x, scale - fx.scale_bits))
        if not np.abs(x).max() < nonlinear.ACTIVATION_BOUND * 2.0**scale:
            raise OverflowError(f"{step}: an activation's input is not within {nonlinear.ACTIVATION_BOUND}")
        lifted = x - round(self.act.left * 2**scale)  # bins from `left` on
        reading, _ = _mask_reading(lifted, scale - fx.active_rest, fx.active_rest, self.rng)
        left, right = reading < 0, reading >= self.act.bins
        at, unit = (self.act.scale, fx.unit_scale) if fx.few_rounds else (fx.chosen_scale, fx.chosen_unit)
        inside = np.where(left | right, 0, x)
        y = self._cosines(inside, scale - fx.wave_unit, self.act, at, unit) + (inside << (at - scale - 1))
        if not fx.few_rounds:  # what is dropped before is far below a unit of f
            chosen = np.where(left, 0, np.where(right, x << (at - scale), y))
            return self._truncate(chosen, at - fx.scale_bits)
        y, x = self._truncate(y, at - fx.scale_bits), self._truncate(x, scale - fx.scale_bits)
        return np.where(left, 0, np.where(right, x, y))

    def _cosines(self, x: Ints, low: int, act: nonlinear.Cosines, at: int, unit: int) -> Ints:
        """The even part of an activation, with `at` fraction bits, of which `unit` are each factor's."""
        fx = self.fixed
        c, _ = _mask_reading(x, low, 0, self.rng)
        shift = MEAN_EXCESS * (1 - 2.0**-low)
        if self.rng is not None:
            masks = self.rng.integers(0, 1 << (fx.wave_unit + fx.wave_period), (3, *x.shape))
            c = c + masks.sum(axis=0)
        y = np.full(x.shape, round(act.constant * 2.0**at), np.int64)
        for i, (k, amplitude) in enumerate(zip(act.turns, act.amplitudes, strict=True)):
            unit_scale = unit + (i == 0)
            angle = 2 * math.pi * k * 2.0 ** -(fx.wave_unit + fx.wave_period)
            if self.rng is None:
                y += np.rint(amplitude * np.cos(angle * (c - shift)) * 2.0**at).astype(np.int64)
                continue
            cos, sin = np.ones(x.shape, np.int64), np.zeros(x.shape, np.int64)
            for mask in masks:
                a, b = (np.rint(f(angle * mask) * 2.0**unit_scale).astype(np.int64) for f in (np.cos, np.sin))
                cos, sin = cos * a - sin * b, cos * b + sin * a
            public = amplitude * 2.0 ** (at - 3 * unit_scale)
            a, b = (np.rint(f(angle * (c - shift)) * public).astype(np.int64) for f in (np.cos, np.sin))
            y += cos * a + sin * b
        return y

    def forward(self, ids: Sequence[int], tap: Tap | None = None, pad: int = 0) -> Floats:
        """Logits (rows, vocab) of every id, appended to the cache."""
        plan, fx, rows = self.plan, self.fixed, pad + len(ids)
        f, heads = fx.scale_bits, plan.heads

        def note(name: str, value: Ints, scale: int) -> None:
            if tap:
                tap(name, value / 2.0**scale)

        def normed(name: str) -> Callable[[Ints], None]:
            return lambda u: note(name, u, fx.normed_scale)

        tokens, positions, see = self.slots.extend(plan, ids, pad)
        h = self.weights["embed"][tokens].astype(np.int64)
        if plan.positions == "learned":
            h = h + self.weights["pos"][positions].astype(np.int64)
        h = h << 32  # known modulo 2^32
        note("embed", h, fx.residual_scale)
        for i in range(plan.layers):
            turned = plan.qkv_width - plan.kv_heads * plan.head_dim
            y = self._behind_norm(f"{i}.qkv", h, normed(f"{i}.norm1"), turned)
            q, k, v = _split_heads(plan, y)
            q, k = self._rotate(f"{i}.q", q, positions), self._rotate(f"{i}.k", k, positions)
            v = self._truncate(v, self.product_scale(f"{i}.qkv") - f)
            if self.keys[i] is not None:
                k, v = np.concatenate([self.keys[i], k], axis=1), np.concatenate([self.values[i], v], axis=1)
            self.keys[i], self.values[i] = k, v
            group = heads // plan.kv_heads
            scores = self._product(f"{i}.scores", q, np.repeat(k, group, axis=0).transpose(0, 2, 1))
            note(f"{i}.scores", np.where(see, scores, 0), self.score_scale)
            e = self._exponentials(f"{i}.softmax", scores, see)
            total = e.sum(axis=-1)  # (heads, rows)
            if tap:
                tap(f"{i}.softmax", e / np.maximum(total, 1)[..., None])
            z = self._product(f"{i}.attention", e, np.repeat(v, group, axis=0))
            z = self._divide(f"{i}.reciprocal", z, total)
            z = z.transpose(1, 0, 2).reshape(rows, -1)
            note(f"{i}.attention", z, fx.fine_scale + fx.coarse_scale)
            h = h + self._out_of_attention(f"{i}.o", z)
            self._fits(f"{i}.residual1", float(np.abs(h.astype(np.float64)).max()))
            note(f"{i}.residual1", h, fx.residual_scale)
            hidden = self._behind_norm(f"{i}.in", h, normed(f"{i}.norm2"))
            scale = self.product_scale(f"{i}.in")
            note(f"{i}.hidden", hidden, scale)
            a = self._activate(f"{i}.activation", hidden[:, : plan.hidden])
            if plan.act == "silu_glu":
                up = self._truncate(hidden[:, plan.hidden :], scale - f)
                a = self._truncate(self._times(f"{i}.gate", a, up), f)
            note(f"{i}.activation", a, f)
            h = h + (self._linear(f"{i}.out", a) << (fx.residual_scale - 2 * f))
            note(f"{i}.residual2", h, fx.residual_scale)
        logits = self._behind_norm(
            "head", h, normed("final norm")
        )  # compared, never multiplied: no truncation
        note("logits", logits, self.product_scale("head"))
        return np.asarray(logits / 2.0 ** self.product_scale("head"))[pad:]


# -- what is measured on either


def generate(
    model: Model, prompt: Sequence[int], count: int, eos: Sequence[int] = (), pad: int = 0
) -> list[int]:
    """Greedy continuation of at most `count` ids, through the cache; ties go to the smaller id."""
    model.reset()
    out: list[int] = []
    feed = list(prompt)
    while len(out) < count:
        out.append(int(model.forward(feed, pad=0 if out else pad)[-1].argmax()))
        if out[-1] in eos:
            break
        feed = out[-1:]
    return out


def gap(logits: Floats, token: int) -> float:
    """How far `token` is below the best logit: 0 for the best one."""
    return float(logits.max() - logits[token])


@dataclass(frozen=True)
class Row:
    """One intermediate value: its size in the float model, and the twin's distance from it."""

    name: str
    largest: float
    rms: float
    error_max: float
    error_rms: float


def compare(plan: Plan, runs: Sequence[Sequence[int]], fixed: Fixed | None = None) -> list[Row]:
    """Run both models over the same ids and compare every tapped value; errors add up as in the engine."""
    exact, twin = FloatModel(plan), FixedModel(plan, fixed)
    sums: dict[str, list[float]] = {}
    for ids in runs:
        want: dict[str, Floats] = {}
        got: dict[str, Floats] = {}
        exact.reset()
        twin.reset()
        exact.forward(ids, want.__setitem__)
        twin.forward(ids, got.__setitem__)
        for name, value in want.items():
            error = got[name] - value
            s = sums.setdefault(name, [0.0, 0.0, 0.0, 0.0, 0.0])
            s[0] = max(s[0], float(np.abs(value).max()))
            s[1] += float((value**2).sum())
            s[2] = max(s[2], float(np.abs(error).max()))
            s[3] += float((error**2).sum())
            s[4] += value.size
    return [Row(n, s[0], math.sqrt(s[1] / s[4]), s[2], math.sqrt(s[3] / s[4])) for n, s in sums.items()]


def nats_per_token(model: Model, ids: Sequence[int], window: int, scored: int) -> float:
    """Mean of -ln p(next) over consecutive windows, each from an empty context."""
    total = 0.0
    for start in range(0, scored, window):
        model.reset()
        z = model.forward(ids[start : start + window])
        top = z.max(axis=-1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(z - top).sum(axis=-1))
        total += float((log_sum - z[np.arange(window), list(ids[start + 1 : start + window + 1])]).sum())
    return total / scored
