"""Choosing the next token from secret logits: nobody sees a logit, a probability or the choice.

Greedy takes the largest logit, as finely as they are compared (ops.argmax). Sampling takes the k largest in
turn, divides by the temperature, adds Gumbel noise that is public but tossed only after the logits are fixed,
and takes the largest of these: that draws from the softmax of these k logits, and noise independent of the
secrets says nothing about them.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from mimir.model.transformer import LOGIT_SCALE, index_bits
from mimir.mpc import ops, prep
from mimir.mpc.domain import Ring
from mimir.mpc.drbg import HmacDrbg
from mimir.mpc.ops import Context
from mimir.mpc.share import Share, concat

LOGIT_BITS: Final = 8  # a logit stays below 2^8 - 1
CHOICE_SCALE: Final = 10  # fraction bits of logits that are compared: ten times finer than they are good for
WIDTH: Final = CHOICE_SCALE + LOGIT_BITS + 2  # room for differences
ASIDE_WIDTH: Final = WIDTH + 1  # and for those from values set aside
NOISE_SCALE: Final = 10  # fraction bits of 1 / temperature
NOISE_GRID: Final = 12  # noise is rounded to 2^-12, so that libraries that differ in the last digit agree
NOISE_WIDTH: Final = 22  # sign of (logit / temperature + noise) differences below 2^(22 - 1)

Noise = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Sampler:
    """How the token of a session is chosen; public, agreed by all."""

    kind: Literal["greedy", "sample"]
    temperature: float
    topk: int
    vocab: int
    round_trip: float = ops.ROUND_TRIP  # between the parties, in ms (nonlinear.Settings)


def gumbel(seed: bytes, count: int) -> Ring:
    """Public Gumbel noise from joint coins, as integers at scale NOISE_GRID."""
    drbg = HmacDrbg(entropy=seed, nonce=b"mimir gumbel".ljust(16, b"\0"), personalisation=b"")
    raw = np.frombuffer(drbg.generate(8 * count), np.uint64)
    drbg.wipe()
    unit = [((int(u) >> 12) + 0.5) / 2.0**52 for u in raw]
    values = [round(-math.log(-math.log(u)) * 2**NOISE_GRID) for u in unit]
    return np.array([v & (2**64 - 1) for v in values], np.uint64)


async def choose(ctx: Context, step: str, logits: Share, sampler: Sampler, noise: Noise) -> Share:
    """Index (1,), modulo 2^INDEX_BITS, of the next token from logits (vocab,) at LOGIT_SCALE."""
    low = LOGIT_SCALE - CHOICE_SCALE
    if sampler.kind == "greedy":
        _, index = await ops.argmax(ctx, f"{step}/argmax", logits, low, WIDTH, sampler.round_trip)
        return index.reshape(1)
    k = min(sampler.topk, sampler.vocab)
    values: list[Share] = []
    indices: list[Share] = []
    kt = index_bits(sampler.vocab)
    for i in range(k):
        value, index = await ops.argmax(ctx, f"{step}/top {i}", logits, low, ASIDE_WIDTH, sampler.round_trip)
        values.append(value.reshape(1))
        indices.append(index.reshape(1))
        if i + 1 < k:
            c = ctx.take(prep.Lookup(0, kt), 1)
            (o,) = await ctx.doors.open_low(f"{step}/set aside {i}", kt, index.reshape(1) + c["r"])
            hot = ops.one_hot(ctx, c, o, kt)[0, : sampler.vocab]
            logits = logits - hot * (1 << (LOGIT_SCALE + LOGIT_BITS + 1))
    if k == 1:
        return indices[0]
    public = gumbel(await noise(), k)
    inverse = round(2**NOISE_SCALE / sampler.temperature)
    total = CHOICE_SCALE + NOISE_SCALE
    shift = total - NOISE_GRID
    value = await ops.lift(ctx, f"{step}/lift", concat(values), ASIDE_WIDTH)
    noisy = value * inverse + (public << np.uint64(shift) if shift >= 0 else public)
    won = await _largest(ctx, f"{step}/choose", noisy, total, sampler.round_trip)
    (picked,) = await ops.mul(ctx, f"{step}/pick", (won, concat(indices)))
    return picked.sum(0).reshape(1)


async def _largest(ctx: Context, step: str, x: Share, scale: int, round_trip: float) -> Share:
    """One-hot (n,) of the largest of x (n)."""
    _, index = await ops.argmax(ctx, step, x, 0, scale + NOISE_WIDTH, round_trip)
    bits = index_bits(x.shape[0])
    c = ctx.take(prep.Lookup(0, bits), 1)
    (o,) = await ctx.doors.open_low(f"{step}/index", bits, index.reshape(1) + c["r"])
    return ops.one_hot(ctx, c, o, bits)[0, : x.shape[0]]


async def no_noise() -> bytes:
    """For planning, where no coin is tossed."""
    return bytes(32)
