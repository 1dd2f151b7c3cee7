"""The transformer in data order, over shares: one function a layer part, and the cache between them.

Every quantity is a share but for shapes. Scales: values and activations have f fraction bits
(`fixed_point.scale_bits`), keys too or KEY_SCALE. The residual stream has RESIDUAL_SCALE, and is truncated
where a norm opens it. What a norm feeds is a product at PRODUCT_SCALE: with a matrix modulo 2^32
(`PlanSpec.halved`), of whose inputs fewer bits are kept, or with any other before the norm is known. Layer
code knows shares, correlations and openings, and nothing of the backend.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np

from mimir import kernels
from mimir.model.checkpoint import EMBEDDING_SCALE, HALF_SCALE, SHORT_SCALE, PlanSpec
from mimir.mpc import nonlinear, ops, prep
from mimir.mpc.domain import HALF_BITS, RING_BITS, Ring, encode
from mimir.mpc.doors import Masked
from mimir.mpc.nonlinear import Scores, Settings
from mimir.mpc.ops import Beside, Context
from mimir.mpc.plan import Cost, planning
from mimir.mpc.share import Backend, Share, concat
from mimir.mpc.weights import array

ROTARY_SCALE: Final = 14  # fraction bits of sines and cosines
HALF_INPUT: Final = 9  # fraction bits of what is multiplied by a matrix modulo 2^32
# Of such a product, and of those with other matrices behind norms: |y| < 2^8, which is what a truncation
# leaves of 64 bits. Of what ReLU takes |y| < 2^11.
PRODUCT_SCALE: Final = HALF_INPUT + HALF_SCALE + RING_BITS - HALF_BITS
RELU_SCALE: Final = PRODUCT_SCALE - 3
NORMED_SCALE: Final = PRODUCT_SCALE - SHORT_SCALE  # of what a norm gives, or of products cut before it
KEY_SCALE: Final = 14  # of queries and keys that are not rotated, and so known modulo 2^(64 - 25) alone
# Of the residual stream, |h| < 2^13: that of embeddings that were read, and of what `o` makes of quotients.
RESIDUAL_SCALE: Final = EMBEDDING_SCALE + RING_BITS - HALF_BITS
CACHE_ROOM: Final = 64  # positions for which a cache that is full gets room


class Multiply(Protocol):
    """`ops.matmul`, or what calls it."""

    def __call__(
        self,
        ctx: Context,
        step: str,
        *factors: tuple[Share, str],
        low: int | None = None,
        beside: Beside | None = None,
    ) -> Awaitable[Share]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Who runs the two heavy parts of a layer: these functions, or actors that run them."""

    matmul: Multiply = ops.matmul
    exponentials: Callable[[Context, str, Sequence[Scores]], Awaitable[list[tuple[Share, Share]]]] = (
        nonlinear.exponentials
    )


DIRECT: Final = Parts()


def weight_shapes(spec: PlanSpec) -> dict[str, tuple[int, int]]:
    """Shapes (inputs, outputs) of the weight matrices, by name; tables of embeddings count as matrices."""
    d, hd = spec.width, spec.head_dim
    shapes = {"embed": (spec.vocab, d), "head": (d, spec.vocab)}
    if spec.positions == "learned":
        shapes["pos"] = (spec.context, d)
    inner = 2 * spec.hidden if spec.act == "silu_glu" else spec.hidden
    for i in range(spec.layers):
        shapes[f"{i}.qkv"] = (d, (spec.heads + 2 * spec.kv_heads) * hd)
        shapes[f"{i}.o"] = (spec.heads * hd, d)
        shapes[f"{i}.in"] = (d, inner)
        shapes[f"{i}.out"] = (spec.hidden, d)
    return shapes


def index_bits(count: int) -> int:
    """Bits of an index below `count`."""
    return max(1, (count - 1).bit_length())


@dataclass(slots=True)
class LayerCache:
    """Keys or values of one layer: deltas (kv_heads, positions, head_dim) are public, masks are shares.
    Either is one array if there is any.

    Both lie in `room`, (1 + components, kv_heads, positions and some more, head_dim), once there were two
    pieces: a token is written behind the others, which need not be copied for it.
    """

    delta: list[Ring] = field(default_factory=list)
    mask: list[Share] = field(default_factory=list)
    room: Ring | None = None

    def extend(self, delta: Ring, mask: Share) -> tuple[Ring, Share]:
        """Add rows; return everything, joined along the positions. Heads of it are dense."""
        if not self.delta:
            self.delta, self.mask = [delta], [mask]
            return delta, mask
        have = self.delta[0].shape[1]
        end = have + delta.shape[1]
        room = self.room
        if room is None or room.shape[2] < end:
            heads, _, width = delta.shape
            room = np.empty((1 + len(mask.v), heads, end + CACHE_ROOM, width), np.uint64)
            room[0, :, :have], room[1:, :, :have] = self.delta[0], self.mask[0].v
            self.room = room
        room[0, :, have:end], room[1:, :, have:end] = delta, mask.v
        self.delta, self.mask = [room[0, :, :end]], [Share(room[1:, :, :end], mask.bk)]
        return self.delta[0], self.mask[0]


@dataclass(slots=True)
class Cache:
    """What a session keeps between steps: per layer keys and values, and which slots hold real tokens."""

    keys: list[LayerCache]
    values: list[LayerCache]
    valid: Share | None = None  # (slots,), 0 or 1
    length: int = 0

    @classmethod
    def empty(cls, layers: int) -> Cache:
        return cls([LayerCache() for _ in range(layers)], [LayerCache() for _ in range(layers)])

    def admit(self, bk: Backend) -> None:
        """One more slot that holds a token, publicly so."""
        assert self.valid is not None
        one = Share(np.zeros((bk.components, 1), np.uint64), bk) + np.ones(1, np.uint64)
        self.valid = concat([self.valid, one])


@lru_cache(maxsize=8)
def _rotary_table(head_dim: int, theta: float, positions: int) -> Ring:
    """cos and signed sin of every position, side by side (positions, 2 head_dim), for the half-split
    rotation.
    """
    half = head_dim // 2
    angle = np.arange(positions)[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    return encode(np.concatenate([cos, cos, -sin, sin], axis=1), ROTARY_SCALE)


def rotation(ctx: Context, spec: PlanSpec, position: Share) -> Share:
    """Secret cos and sin (n, 2 head_dim) at ROTARY_SCALE of secret positions, one-hots (n, positions).
    Local.
    """
    assert spec.rope_theta is not None
    table = _rotary_table(spec.head_dim, spec.rope_theta, position.shape[1])
    return ctx.share(np.stack([kernels.matmul(np.ascontiguousarray(v), table) for v in position.v]))


async def _rotate(ctx: Context, step: str, x: Share, turn: Share) -> Share:
    """Rotate the last axis of x (heads, rows, head_dim) by secret angles; adds ROTARY_SCALE to the scale.
    One round.
    """
    hd = x.shape[-1]
    half = hd // 2
    swapped = concat([x[..., half:], x[..., :half]], axis=-1)
    cos, sin = turn[:, :hd].broadcast(*x.shape), turn[:, hd:].broadcast(*x.shape)
    a, b = await ops.mul(ctx, step, (x, cos), (swapped, sin))
    return a + b


async def _per_head(
    ctx: Context, left: Ring, mask: Share, right: Ring, cache: Share, z: Share, *, turned: bool = False
) -> Share:
    """(left - mask) @ (right - cache) per head, given z = mask @ cache: left (h, n, k), right (h, k, m), or
    (h, m, k) if it is `turned`, as keys lie. Local.
    """
    h, n, k = left.shape
    m = right.shape[1 if turned else 2]

    def times(a: Ring, b: Ring) -> Ring:
        a = np.ascontiguousarray(a)
        return kernels.matmul_nt(a, b) if turned else kernels.matmul(a, b)

    def local() -> Ring:
        out = np.empty((mask.v.shape[0], h, n, m), np.uint64)
        for s in range(len(out)):
            out[s] = z.v[s] - times(left, cache.v[s])
            out[s] -= times(mask.v[s], right)
        return out

    y = ctx.share(await ctx.compute(4 * h * n * k * m, local, (2, h, n, m)))
    both = await ctx.compute(h * n * k * m, lambda: times(left, right)[None], (1, h, n, m))
    return y + both.reshape(h, n, m)


def _for_heads(cache: tuple[Ring, Share], group: int) -> tuple[Ring, Share]:
    """Deltas and masks (kv_heads, ..), each for the `group` heads that share it."""
    delta, mask = cache
    return cache if group == 1 else (np.repeat(delta, group, axis=0), mask.repeat(group, 0))


async def attention(
    ctx: Context,
    step: str,
    spec: PlanSpec,
    layer: int,
    h: Share,
    turn: Share | None,
    caches: Sequence[Cache],
    fresh: Share | None,
    s: Settings,
    parts: Parts,
) -> Share:
    """Attention of the rows of each cache over everything in it and before them, without the output matrix:
    (n, heads * hd) at QUOTIENT_SCALE. h is the residual stream. `fresh` are bits that tell which of the rows
    hold a token, if not all do: the keys of the others become 0, as do scores with them.
    """
    f = s.scale_bits
    n, hd, heads, kv = h.shape[0], spec.head_dim, spec.heads, spec.kv_heads
    y = await _behind_norm(ctx, f"{step}/qkv", spec, h, f"{layer}.qkv", s, parts, cut=(heads + kv) * hd)
    y = y.reshape(n, heads + 2 * kv, hd).swap(0, 1)  # (heads + 2 kv, n, hd)
    turned, v = y[: heads + kv], y[heads + kv :]
    if turn is not None:
        turned = await _rotate(ctx, f"{step}/rotate", turned, turn)
        (turned,) = await ops.truncate(ctx, f"{step}/qk truncate", (turned, NORMED_SCALE + ROTARY_SCALE - f))
        spare, scale = 0, 2 * f
    else:
        spare = NORMED_SCALE - KEY_SCALE  # room above, which scores do not need
        turned, scale = ops.lower(turned, spare), 2 * KEY_SCALE + spare
    q, k = turned[:heads], turned[heads:]
    if fresh is not None and turn is None:  # a turn has made them 0
        rows = fresh.broadcast(kv, n).flat()
        k = (await ops.scale(ctx, f"{step}/valid", rows, k.reshape(kv * n, hd))).reshape(kv, n, hd)

    each = n // len(caches)
    keys, values = (
        [ctx.take(kind(layer, c.length, each, heads, kv, hd), 1, of=i) for i, c in enumerate(caches)]
        for kind in (prep.Keys, prep.Values)
    )

    async def enter(ctx: Context) -> list[Ring]:
        masked = (x + concat([m[name] for m in keys], axis=1) for x, name in ((q, "x"), (k, "new")))
        return await ctx.doors.open(f"{step}/cache", *masked)

    async def shorten(ctx: Context) -> Share:
        return (await ops.truncate(ctx, f"{step}/v truncate", (v, PRODUCT_SCALE - f)))[0]

    (dq, dk), v = await ops.together(ctx, enter, shorten)
    scores = []
    for i, cache in enumerate(caches):
        own = slice(i * each, (i + 1) * each)
        all_k = _for_heads(cache.keys[layer].extend(dk[:, own], keys[i]["new"]), heads // kv)
        z = await _per_head(ctx, dq[:, own], keys[i]["x"], *all_k, keys[i]["z"], turned=True)
        slots = np.arange(cache.length + each)
        allowed = (slots[None, :] <= slots[cache.length :, None]).astype(np.uint64)
        scores.append(Scores(z * (1 << spare), scale, allowed, cache.valid, s.few_rounds))
    weights = await parts.exponentials(ctx, f"{step}/softmax", scores)

    async def mix(ctx: Context) -> list[Share]:
        new = v + concat([m["new"] for m in values], axis=1)
        *opened, dv = await ctx.doors.open(
            f"{step}/weights", *(e + m["x"] for (e, _), m in zip(weights, values, strict=True)), new
        )
        held = []
        for i, cache in enumerate(caches):
            own = cache.values[layer].extend(dv[:, i * each : (i + 1) * each], values[i]["new"])
            held.append(_for_heads(own, heads // kv))
        y = concat(
            [
                await _per_head(ctx, delta, m["x"], *cached, m["z"])
                for delta, m, cached in zip(opened, values, held, strict=True)
            ],
            axis=1,
        )
        scale = nonlinear.EXP_SCALE + f
        fine, coarse = scale - nonlinear.FINE_SCALE, scale - nonlinear.COARSE_SCALE
        return await ops.truncate(ctx, f"{step}/mix", (y, fine), (y, coarse))

    async def invert(ctx: Context) -> list[Share]:
        sums = [(total, of.keys) for (_, total), of in zip(weights, scores, strict=True)]
        inverses = await nonlinear.reciprocals(ctx, f"{step}/reciprocal", sums, s)
        return [concat(part, axis=1).flat() for part in zip(*inverses, strict=True)]

    mixed, inverse = await ops.together(ctx, mix, invert)
    mixed = [v.reshape(heads * n, hd) for v in mixed]
    out = await nonlinear.quotients(ctx, f"{step}/divide", inverse, mixed)
    return out.reshape(heads, n, hd).swap(0, 1).reshape(n, heads * hd)


def _bias(ctx: Context, name: str) -> Share:
    """A bias as a row (1, m), at the f bits at which it is stored."""
    v = np.stack([array(w) for w in ctx.weights.pair(name)[: ctx.bk.components]])
    return ctx.share(v.reshape(len(v), 1, -1))


async def _behind_norm(
    ctx: Context,
    step: str,
    spec: PlanSpec,
    h: Share,
    name: str,
    s: Settings,
    parts: Parts,
    *,
    to: int = PRODUCT_SCALE,
    cut: int = 0,
) -> Share:
    """The norm of the residual stream h, times a matrix, and its bias: at scale `to`, but for the first `cut`
    columns, which have SHORT_SCALE bits less. Four rounds, five for a matrix modulo 2^32.

    Such a one is multiplied with what the norm gives; others with what it takes, while the inverse root of
    its mean square is read, and then the root with the product. What is cut is truncated while a root is
    chosen.
    """
    f = s.scale_bits
    if spec.halved(name):
        u = await nonlinear.rms_norm(ctx, f"{step}/norm", h, RESIDUAL_SCALE, spec.norm_eps, s, NORMED_SCALE)
        y = await parts.matmul(ctx, step, (u, name), low=NORMED_SCALE - HALF_INPUT)
        return y + _bias(ctx, f"{name}_b") * (1 << (PRODUCT_SCALE - f))
    rows, squares = await ops.truncate_rows(ctx, f"{step}/norm", h, RESIDUAL_SCALE - f)
    root = nonlinear.InverseRoot(f"{step}/root", squares, h.shape[1], spec.norm_eps, s)
    y = await parts.matmul(ctx, step, (rows, name), beside=root.read)
    width, scale = y.shape[1], to - SHORT_SCALE - f

    async def shorten(ctx: Context) -> Share:
        return (await ops.truncate(ctx, f"{step}/cut", (y[:, :cut], SHORT_SCALE)))[0] if cut else y[:, :0]

    r, part = await ops.together(ctx, lambda ctx: root.choose(ctx, scale), shorten)
    y = await ops.scale(ctx, f"{step}/scale", r, concat([part, y[:, cut:]], axis=1))
    above = np.full(width, 1 << (to - f), np.uint64)
    above[:cut] >>= np.uint64(SHORT_SCALE)
    return y + _bias(ctx, f"{name}_b") * above


async def mlp(
    ctx: Context, step: str, spec: PlanSpec, layer: int, h: Share, s: Settings, parts: Parts
) -> Share:
    """The inner part of a block: activation, gated or not, of the norm of h times `in`: (n, hidden)."""
    f, name = s.scale_bits, f"{layer}.in"
    if spec.act == "relu":
        y = await _behind_norm(ctx, f"{step}/in", spec, h, name, s, parts, to=RELU_SCALE)
        return await nonlinear.relu(ctx, f"{step}/relu", y, s, RELU_SCALE)
    y = await _behind_norm(ctx, f"{step}/in", spec, h, name, s, parts)
    if spec.act != "silu_glu":
        return await nonlinear.activation(ctx, f"{step}/{spec.act}", y, spec.act, s, PRODUCT_SCALE)

    async def gating(ctx: Context) -> Share:
        return await nonlinear.activation(ctx, f"{step}/silu", y[:, : spec.hidden], "silu", s, PRODUCT_SCALE)

    async def rising(ctx: Context) -> Share:
        return (await ops.truncate(ctx, f"{step}/up", (y[:, spec.hidden :], PRODUCT_SCALE - f)))[0]

    gate, up = await ops.together(ctx, gating, rising)
    (y,) = await ops.mul(ctx, f"{step}/gate", (gate, up))
    return (await ops.truncate(ctx, f"{step}/gate truncate", (y, f)))[0]


async def forward(
    ctx: Context,
    step: str,
    spec: PlanSpec,
    rows: Rows,
    caches: Sequence[Cache],
    s: Settings,
    parts: Parts = DIRECT,
) -> Share:
    """Blocks over new rows, as many of each cache, which they join. Returns the residual stream (n, d) at
    RESIDUAL_SCALE.
    """
    f, h, turn = s.scale_bits, rows.hidden, rows.turn
    each = h.shape[0] // len(caches)
    fresh = None
    if rows.padded:
        valid = [c.valid[c.length : c.length + each] for c in caches if c.valid is not None]
        fresh = concat(valid) if valid else None
        if turn is not None and fresh is not None:
            turn = await ops.scale(ctx, f"{step}/valid", fresh, turn)
    for layer in range(spec.layers):
        name = f"{step}/layer {layer}"
        a = await attention(ctx, f"{name}/attention", spec, layer, h, turn, caches, fresh, s, parts)
        o = await parts.matmul(ctx, f"{name}/o", (a, f"{layer}.o"))
        h = h + o + _bias(ctx, f"{layer}.o_b") * (1 << (RESIDUAL_SCALE - f))
        m = await mlp(ctx, f"{name}/mlp", spec, layer, h, s, parts)
        m = await parts.matmul(ctx, f"{name}/out", (m, f"{layer}.out"))
        h = h + (m + _bias(ctx, f"{layer}.out_b") * (1 << f)) * (1 << (RESIDUAL_SCALE - 2 * f))
    for cache in caches:
        cache.length += each
    return h


async def logits(
    ctx: Context, step: str, spec: PlanSpec, h: Share, s: Settings, parts: Parts = DIRECT
) -> Share:
    """Logits (n, vocab) at scale LOGIT_SCALE of rows h (n, d)."""
    return await _behind_norm(ctx, f"{step}/head", spec, h, "head", s, parts)


LOGIT_SCALE: Final = PRODUCT_SCALE


@dataclass(frozen=True, slots=True)
class Entry:
    """Prepared one-hots through which secret indices (tokens, positions) enter a step."""

    token: dict[str, Share]
    position: dict[str, Share]

    def part(self, rows: slice) -> Entry:
        """Some of the rows."""
        return Entry(
            {k: v[rows] for k, v in self.token.items()}, {k: v[rows] for k, v in self.position.items()}
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """New rows on their way into the blocks: hidden (n, d) at RESIDUAL_SCALE, and their rotation if any.

    `padded` if some of them may hold no token, as a cache's validity bits then tell.
    """

    hidden: Share
    turn: Share | None
    padded: bool


def entry_demand(spec: PlanSpec, rows: int) -> dict[prep.Kind, int]:
    """What `entry` takes."""
    demand: dict[prep.Kind, int] = {}
    for count in (spec.vocab, spec.context):
        prep.add_demand(demand, {prep.Lookup(0, index_bits(count)): rows})
    return demand


def entry(ctx: Context, spec: PlanSpec, rows: int) -> Entry:
    """Take the one-hots for `rows` tokens. Their masks may be told to the client, or be used to open an
    index.
    """
    token = ctx.take(prep.Lookup(0, index_bits(spec.vocab)), rows)
    return Entry(token, ctx.take(prep.Lookup(0, index_bits(spec.context)), rows))


async def embed(
    ctx: Context,
    step: str,
    spec: PlanSpec,
    e: Entry,
    token_offset: Ring,
    position_offset: Ring,
    parts: Parts = DIRECT,
    *,
    padded: bool = True,
) -> Rows:
    """Embedding and rotation of rows, by public offsets (index + mask) of secret tokens and positions."""
    hot = ops.one_hot(ctx, e.token, token_offset, index_bits(spec.vocab))[:, : spec.vocab]
    at = ops.one_hot(ctx, e.position, position_offset, index_bits(spec.context))[:, : spec.context]
    turned = spec.positions == "rope"
    factors = [(hot, "embed")] if turned else [(hot, "embed"), (at, "pos")]
    h = await parts.matmul(ctx, f"{step}/embed", *factors, low=0)
    return Rows(h, rotation(ctx, spec, at) if turned else None, padded)


async def reenter(
    ctx: Context, step: str, spec: PlanSpec, token: Share, position: Share, parts: Parts = DIRECT
) -> Rows:
    """Secret token indices (n,) at secret positions (n,): all are opened under masks of prepared one-hots."""
    e = entry(ctx, spec, token.size)
    kt, kp = index_bits(spec.vocab), index_bits(spec.context)
    (c,), (p,) = await ctx.doors.open_all(
        f"{step}/index", [Masked([token + e.token["r"]], kt), Masked([position + e.position["r"]], kp)]
    )
    return await embed(ctx, step, spec, e, c, p, parts, padded=False)


def planned_cache(ctx: Context, spec: PlanSpec, length: int) -> Cache:
    """A cache of so many valid slots, of shapes only."""
    cache = Cache.empty(spec.layers)
    for c in (*cache.keys, *cache.values):
        if length:
            rows = np.broadcast_to(np.zeros(1, np.uint64), (spec.kv_heads, length, spec.head_dim))
            c.delta, c.mask = [rows], [ctx.share(rows[None])]
    cache.valid, cache.length = ctx.share(np.zeros((1, length), np.uint64)), length
    return cache


Choose = Callable[[Context, str, Share], Awaitable[Any]]


async def cost_of(
    spec: PlanSpec,
    s: Settings,
    first: int,
    rows: int,
    *,
    prompt: bool,
    sampler: Choose | None = None,
    last: bool = False,
    padded: bool = True,
) -> Cost:
    """Plan one step: `rows` rows from slot `first`. A prompt enters by offsets, a decoded token by its index.

    `last` adds the logits, `sampler` also the choice of a token. All layers are alike, so the third and those
    after it are planned by what the second adds to the first.
    """

    async def of(layers: int) -> Cost:
        return await _cost_of(
            replace(spec, layers=layers),
            s,
            first,
            rows,
            prompt=prompt,
            sampler=sampler,
            last=last,
            padded=padded,
        )

    if spec.layers <= 3:
        return await of(spec.layers)
    one, cost = await of(1), await of(2)
    added = cost.less(one)
    for layer in range(2, spec.layers):
        cost.add(added, {kind: _of_layer(kind, layer) for kind in added.demand})
    return cost


def _of_layer(kind: prep.Kind, layer: int) -> prep.Kind:
    """What the second layer takes, as another layer takes it."""
    if isinstance(kind, prep.Keys):
        return replace(kind, layer=layer)
    if isinstance(kind, prep.Weight):
        return replace(kind, name=f"{layer}.{kind.name.partition('.')[2]}")
    return kind


async def _cost_of(
    spec: PlanSpec,
    s: Settings,
    first: int,
    rows: int,
    *,
    prompt: bool,
    sampler: Choose | None,
    last: bool,
    padded: bool,
) -> Cost:
    """Of every layer of the plan, one after another."""
    shapes = weight_shapes(spec)
    shapes |= {f"{k}_b": (1, v[1]) for k, v in shapes.items() if k not in ("embed", "pos")}
    ctx, cost = planning(shapes)
    cache, zero = planned_cache(ctx, spec, first), np.zeros(rows, np.uint64)
    cache.valid = ctx.share(np.zeros((1, first + rows), np.uint64)) if padded else None
    if prompt:
        outside, _ = planning(shapes)  # the prompt's one-hots are prepared for all its steps at once
        new = await embed(ctx, "plan", spec, entry(outside, spec, rows), zero, zero)
    else:
        index = ctx.share(np.zeros((1, 1), np.uint64))
        new = await reenter(ctx, "plan", spec, index, index)
    h = await forward(ctx, "plan", spec, new, [cache], s)
    if last or sampler is not None:
        scores = await logits(ctx, "plan", spec, h[-1:], s)
        if sampler is not None:
            await sampler(ctx, "plan", scores[0])
    return cost


async def cost_of_choice(spec: PlanSpec, choose: Choose) -> Cost:
    """Plan the choice of a token from logits, which is the same for every step."""
    ctx, cost = planning({})
    await choose(ctx, "plan", ctx.share(np.zeros((1, spec.vocab), np.uint64)))
    return cost
