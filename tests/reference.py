"""Two plaintext models over one plan: the float reference, and a fixed-point twin of the secure engine.

`FloatModel` says what the checkpoint means. `FixedModel` does in the clear, in integers modulo 2^64, what the
parties do on shares: the same scales, tables and truncations, so its distance to the float model is the price
of fixed point alone, and its distance to the engine is a bug. Every constant is in `Fixed`.

Both keep a key/value cache: `forward(ids)` continues where the last call ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mimir.model.checkpoint import Floats, Plan, encode

Ints = npt.NDArray[np.int64]
Tap = Callable[[str, Floats], None]  # receives (name of an intermediate value, the value as float)

SAFE_BITS = 62  # a value must keep |z| < 2^62 before its scale is dropped
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
    def forward(self, ids: Sequence[int], tap: Tap | None = None) -> Floats: ...


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


def _visible(rows: int, past: int) -> npt.NDArray[np.bool_]:
    """(rows, past + rows): which cached position each new row may look at."""
    return np.arange(past + rows) <= past + np.arange(rows)[:, None]


class FloatModel:
    """The plan in float32 or float64."""

    def __init__(self, plan: Plan, dtype: npt.DTypeLike = np.float64) -> None:
        self.plan = plan
        self.weights = {name: plan.tensor(name).astype(dtype) for name in plan.names()}
        self.dtype = dtype
        self.reset()

    def reset(self) -> None:
        self.past = 0
        self.keys: list[Any] = [None] * self.plan.layers
        self.values: list[Any] = [None] * self.plan.layers

    def forward(self, ids: Sequence[int], tap: Tap | None = None) -> Floats:
        """Logits (rows, vocab) of every id, appended to the cache."""
        plan, w, rows = self.plan, self.weights, len(ids)
        note = tap or (lambda name, value: None)
        positions = self.past + np.arange(rows)
        if self.past + rows > plan.context:
            raise ValueError(f"context of {plan.context} exceeded")

        def norm(h: Floats) -> Floats:
            square = (h * h).mean(axis=-1, keepdims=True)
            return np.asarray(h / np.sqrt(square + np.asarray(plan.norm_eps, self.dtype)))

        def rotate(x: Floats) -> Floats:
            if plan.positions != "rope":
                return x
            cos, sin = (part.astype(self.dtype) for part in _rotary(plan, positions))
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        h = w["embed"][np.asarray(ids)]
        if plan.positions == "learned":
            h = h + w["pos"][positions]
        note("embed", h)
        see = _visible(rows, self.past)
        for i in range(plan.layers):
            u = norm(h)
            note(f"{i}.norm1", u)
            q, k, v = _split_heads(plan, u @ w[f"{i}.qkv"] + w[f"{i}.qkv_b"])
            q, k = rotate(q), rotate(k)
            if self.past:
                k, v = np.concatenate([self.keys[i], k], axis=1), np.concatenate([self.values[i], v], axis=1)
            self.keys[i], self.values[i] = k, v
            group = plan.heads // plan.kv_heads
            scores = q @ np.repeat(k, group, axis=0).transpose(0, 2, 1)
            note(f"{i}.scores", np.where(see, scores, 0))
            e = np.where(see, np.exp(scores - np.where(see, scores, -np.inf).max(-1, keepdims=True)), 0)
            e = e.astype(self.dtype)
            p = e / e.sum(-1, keepdims=True)
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
        self.past += rows
        return np.asarray(logits, np.float64)


# -- the twin


@dataclass(frozen=True)
class Fixed:
    """Every scale and table size of the twin."""

    f: int = 16  # fixed_point.scale_bits: activations, weights, cache
    rounding: str = (
        "dither"  # of a truncation: "dither" (random carry, as in the engine), "floor" or "nearest"
    )
    rope_scale: int = 16  # of cos and sin
    guard: int = 6  # extra fraction bits of a polynomial's accumulator
    # 1/sqrt(x) and 1/x: the argument is brought to [1, 2), with this many fraction bits, and looked up.
    mantissa_bits: int = 24
    rsqrt_bins: int = 128
    rsqrt_degree: int = 2
    rsqrt_scale: int = 26
    reciprocal_bins: int = 128
    reciprocal_degree: int = 2
    reciprocal_scale: int = 30
    # Softmax: a row is shifted by its maximum rounded down to a multiple of `max_grid`; exp is a table on
    # [max_grid - exp_reach, max_grid), and 0 below.
    max_grid: int = 2
    exp_reach: int = 32
    exp_bins: int = 256
    exp_degree: int = 2
    exp_scale: int = 20
    # Activations: pieces on [-act_reach, act_reach), x above and 0 below.
    act_reach: int = 16
    act_bins: int = 128
    act_degree: int = 3
    seed: int = 1  # of the dither


class Table:
    """Piecewise polynomial on [low, high) in integers: Horner in the remainder, truncating at each step.

    The argument has scale `scale`, the result `out`. Pieces interpolate at Chebyshev nodes, which is within a
    few per cent of minimax at these degrees.
    """

    def __init__(
        self,
        fn: Callable[[Floats], Floats],
        low: float,
        high: float,
        bins: int,
        degree: int,
        scale: int,
        out: int,
        guard: int,
    ) -> None:
        width = (high - low) * 2.0**scale / bins
        self.rest = round(math.log2(width))
        if 2.0**self.rest != width or degree < 0:
            raise ValueError("a bin must be a power of two wide")
        self.low, self.bins, self.guard = round(low * 2**scale), bins, guard
        nodes = 0.5 - 0.5 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
        starts = low + (high - low) / bins * np.arange(bins)
        samples = fn(starts[:, None] + nodes * (high - low) / bins)  # (bins, degree + 1)
        powers = np.linalg.solve(np.vander(nodes, increasing=True), samples.T)  # (degree + 1, bins)
        self.coefficients = np.rint(powers * 2.0 ** (out + guard)).astype(np.int64)

    def __call__(self, x: Ints, truncate: Callable[[Ints, int], Ints]) -> Ints:
        """The caller has made sure that x is in the domain; outside, a table answers garbage."""
        at = x - self.low
        index, v = (at >> self.rest) % self.bins, at & ((1 << self.rest) - 1)
        acc = self.coefficients[-1][index]
        for c in self.coefficients[-2::-1]:
            acc = truncate(acc * v, self.rest) + c[index]
        return truncate(acc, self.guard)


class FixedModel:
    """The plan in integers modulo 2^64, step by step as the engine computes it on shares.

    Raises OverflowError, naming the step, where a value leaves the range that truncation can handle: in the
    engine that would be a wrong result.
    """

    def __init__(self, plan: Plan, fixed: Fixed | None = None) -> None:
        self.plan = plan
        self.fixed = fx = fixed or Fixed()
        d = plan.width
        # Held as float64: below 2^53 the integers are exact, and BLAS is used where a product stays so too.
        # Biases join a product before its truncation, so they carry its scale.
        self.weights = {
            name: encode(plan.tensor(name), 2 * fx.f if name.endswith("_b") else fx.f, name)
            .view(np.int64)
            .astype(np.float64)
            for name in plan.names()
        }
        self.eps = round(d * plan.norm_eps * 2.0 ** (2 * fx.f))
        root = math.sqrt(d)  # r = sqrt(d) / sqrt(sum of squares + d eps)

        def rsqrt(parity: int) -> Table:
            def fn(x: Floats) -> Floats:
                return root / np.sqrt(x * 2.0**parity)

            return Table(fn, 1, 2, fx.rsqrt_bins, fx.rsqrt_degree, fx.mantissa_bits, fx.rsqrt_scale, fx.guard)

        self.rsqrt = rsqrt(0), rsqrt(1)  # by the parity of the exponent
        self.reciprocal = Table(
            np.reciprocal,
            1,
            2,
            fx.reciprocal_bins,
            fx.reciprocal_degree,
            fx.mantissa_bits,
            fx.reciprocal_scale,
            fx.guard,
        )
        self.exp = Table(
            np.exp,
            fx.max_grid - fx.exp_reach,
            fx.max_grid,
            fx.exp_bins,
            fx.exp_degree,
            fx.f,
            fx.exp_scale,
            fx.guard,
        )
        self.act = Table(
            ACTIVATIONS[plan.act],
            -fx.act_reach,
            fx.act_reach,
            fx.act_bins,
            fx.act_degree,
            fx.f,
            fx.f,
            fx.guard,
        )
        self.reset()

    def reset(self) -> None:
        self.past = 0
        self.keys: list[Any] = [None] * self.plan.layers
        self.values: list[Any] = [None] * self.plan.layers
        self.rng = np.random.default_rng(self.fixed.seed)

    # Arithmetic: int64 wraps as the ring does; every function names the step it works for.

    def _fits(self, step: str, largest: float) -> None:
        if not largest < 2.0**SAFE_BITS:
            raise OverflowError(
                f"{step}: a value of 2^{math.log2(largest):.1f} leaves the range of fixed point"
            )

    def _truncate(self, z: Ints, bits: int) -> Ints:
        if bits <= 0:
            return z << -bits
        if self.fixed.rounding == "dither":
            z = z + self.rng.integers(0, 1 << bits, z.shape)
        elif self.fixed.rounding == "nearest":
            z = z + (1 << (bits - 1))
        return z >> bits

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

    def _linear(self, name: str, x: Ints) -> Ints:
        z = self._product(name, x, self.weights[name]) + self.weights[name + "_b"].astype(np.int64)
        return self._truncate(z, self.fixed.f)

    def _mantissa(self, x: Ints) -> tuple[Ints, Ints]:
        """x > 0 as (m, e): m in [2^mantissa_bits, 2^(mantissa_bits+1)), x about m * 2^(e - mantissa_bits)."""
        e = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1
        e -= (x >> np.minimum(e, SAFE_BITS)) == 0  # the conversion rounded up to a power of two
        down = e - self.fixed.mantissa_bits
        return np.where(down >= 0, x >> np.maximum(down, 0), x << np.maximum(-down, 0)), e

    def _scaled(self, y: Ints, down: Ints) -> Ints:
        """y * 2^-down per element, rounding down."""
        return np.where(down >= 0, y >> np.maximum(down, 0), y << np.maximum(-down, 0))

    def _norm(self, step: str, h: Ints) -> Ints:
        fx = self.fixed
        self._fits(step, float((h.astype(np.float64) ** 2).sum(axis=-1).max()))
        s = (h * h).sum(axis=-1) + self.eps  # scale 2f, exact
        if (s <= 0).any():
            raise OverflowError(f"{step}: the norm's sum is not positive")
        m, e = self._mantissa(s)
        e = e - 2 * fx.f
        odd = e & 1
        r = np.where(odd == 1, self.rsqrt[1](m, self._truncate), self.rsqrt[0](m, self._truncate))
        r = self._scaled(r, e >> 1)
        return self._truncate(self._times(step, h, r[:, None]), fx.rsqrt_scale)

    def _rotate(self, step: str, x: Ints, positions: Ints) -> Ints:
        if self.plan.positions != "rope":
            return x
        bits = self.fixed.rope_scale
        cos, sin = (np.rint(part * 2.0**bits).astype(np.int64) for part in _rotary(self.plan, positions))
        a, b = np.split(x, 2, axis=-1)
        z = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        self._fits(step, 2.0**bits * 2 * float(np.abs(x).max()))
        return self._truncate(z, bits)

    def _exp_row(self, step: str, scores: Ints, see: npt.NDArray[np.bool_]) -> Ints:
        """exp of scores (scale 2f) less a row shift, at exp_scale; 0 where not visible."""
        fx = self.fixed
        top = np.where(see, scores, np.iinfo(np.int64).min).max(axis=-1, keepdims=True)
        step_bits = fx.max_grid << (2 * fx.f)
        t = self._truncate(scores - top // step_bits * step_bits, fx.f)
        # The dither may lift the largest by one unit out of the table.
        t = np.minimum(t, (fx.max_grid << fx.f) - 1)
        inside = t >= (fx.max_grid - fx.exp_reach) << fx.f
        return np.where(see & inside, self.exp(np.where(inside, t, 0), self._truncate), 0)

    def _activate(self, x: Ints) -> Ints:
        if self.plan.act == "relu":
            return np.maximum(x, 0)
        edge = self.fixed.act_reach << self.fixed.f
        inside = (x >= -edge) & (x < edge)
        return np.where(inside, self.act(np.where(inside, x, 0), self._truncate), np.maximum(x, 0))

    def forward(self, ids: Sequence[int], tap: Tap | None = None) -> Floats:
        """Logits (rows, vocab) of every id, appended to the cache."""
        plan, fx, rows = self.plan, self.fixed, len(ids)
        f, heads = fx.f, plan.heads
        if self.past + rows > plan.context:
            raise ValueError(f"context of {plan.context} exceeded")

        def note(name: str, value: Ints, scale: int) -> None:
            if tap:
                tap(name, value / 2.0**scale)

        positions = self.past + np.arange(rows)
        h = self.weights["embed"][np.asarray(ids)].astype(np.int64)
        if plan.positions == "learned":
            h = h + self.weights["pos"][positions].astype(np.int64)
        note("embed", h, f)
        see = _visible(rows, self.past)
        for i in range(plan.layers):
            u = self._norm(f"{i}.norm1", h)
            note(f"{i}.norm1", u, f)
            q, k, v = _split_heads(plan, self._linear(f"{i}.qkv", u))
            q, k = self._rotate(f"{i}.q", q, positions), self._rotate(f"{i}.k", k, positions)
            if self.past:
                k, v = np.concatenate([self.keys[i], k], axis=1), np.concatenate([self.values[i], v], axis=1)
            self.keys[i], self.values[i] = k, v
            group = heads // plan.kv_heads
            scores = self._product(f"{i}.scores", q, np.repeat(k, group, axis=0).transpose(0, 2, 1))
            note(f"{i}.scores", np.where(see, scores, 0), 2 * f)
            e = self._exp_row(f"{i}.softmax", scores, see)
            total = e.sum(axis=-1)  # (heads, rows)
            if tap:
                tap(f"{i}.softmax", e / total[..., None])
            z = self._product(f"{i}.attention", e, np.repeat(v, group, axis=0))
            z = self._truncate(z, fx.exp_scale)
            m, up = self._mantissa(total)
            r = self._scaled(self.reciprocal(m, self._truncate), up - fx.exp_scale)
            z = self._truncate(self._times(f"{i}.attention", z, r[..., None]), fx.reciprocal_scale)
            z = z.transpose(1, 0, 2).reshape(rows, -1)
            note(f"{i}.attention", z, f)
            h = h + self._linear(f"{i}.o", z)
            note(f"{i}.residual1", h, f)
            u = self._norm(f"{i}.norm2", h)
            note(f"{i}.norm2", u, f)
            hidden = self._linear(f"{i}.in", u)
            note(f"{i}.hidden", hidden, f)
            a = self._activate(hidden[:, : plan.hidden])
            if plan.act == "silu_glu":
                a = self._truncate(self._times(f"{i}.gate", a, hidden[:, plan.hidden :]), f)
            note(f"{i}.activation", a, f)
            h = h + self._linear(f"{i}.out", a)
            note(f"{i}.residual2", h, f)
        u = self._norm("final norm", h)
        note("final norm", u, f)
        # The logits are compared, never multiplied: no truncation.
        logits = self._product("head", u, self.weights["head"]) + self.weights["head_b"].astype(np.int64)
        note("logits", logits, 2 * f)
        self.past += rows
        return np.asarray(logits / 2.0 ** (2 * f))


# -- what is measured on either


def generate(model: Model, prompt: Sequence[int], count: int, eos: Sequence[int] = ()) -> list[int]:
    """Greedy continuation of at most `count` ids, through the cache; ties go to the smaller id."""
    model.reset()
    out: list[int] = []
    feed = list(prompt)
    while len(out) < count:
        out.append(int(model.forward(feed)[-1].argmax()))
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
