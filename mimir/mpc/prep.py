"""Correlations: made by all three parties together, verified, stored, taken once.

There is no dealer. Masks are expanded from pairwise keys; their bits are free because each component is
known to two parties; carries, where any are needed, come from an adder over GF(2); products are made by
resharing and verified by `check` before anything of the batch can be taken. A batch that fails is dropped
whole and ends the session.

A *kind* names one sort of correlation, with everything that fixes its shape:

    Trunc(f)             for ops.truncate: a mask r = 2^62 u + v, v the sum of components over the integers;
                         base, about r / 2^f; and over (3), whether u is above 0, 1 and 2, modulo 2^f
    TruncIf(f)           the same, a random bit, and its products with base and over
    Lookup(b, k, l)      one-hot of k bits, shared modulo 2^l, of a mask with b bits below them
    Pieces(b, k, d)      powers up to d of a remainder of b bits, where index bits point, and 0 elsewhere
    Select(f_0, ..)      masks of truncations, random bits, and where these point what the truncations take
    Wave(b, ks)          cos and sin of k / 2^b turns of a mask, for each k
    Decay(b, k, ..)      e^-v for a remainder v of b bits, where index bits point, and 0 elsewhere
    Digits(k_0, ..)      one-hots of bits of the digits of a value: zero, threshold and sign tests
    Ands(m_0, ..)        random bits and the products that opening bits under them needs for these monomials
    DaBit()              a random bit in both domains
    Pick(m, t, lane)     t random bits, x (m); products of all sets of bits, and x times them, modulo 2^lane
    Mul()                a, b, ab
    Zero()               random components of 0
    Scale(m)             s, x (m), s x
    Norm(m, f)           m of Trunc(f), sum of base^2, base times over
    Weight(name, l)      a mask row and its product with a shared weight matrix, modulo 2^l
    Keys(layer, ...)     masks of new keys and queries and the products with all cached key masks
    Values(layer, ...)   the same for attention weights and values
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import combinations
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import trio

from mimir import kernels
from mimir.errors import LocalError
from mimir.mpc import check
from mimir.mpc.branches import ask, side_by_side
from mimir.mpc.domain import HALF_BITS, RING_BITS, Ring, words
from mimir.mpc.doors import Doors
from mimir.mpc.offload import offload
from mimir.mpc.waves import circle, exponential, fractions, integers
from mimir.mpc.weights import Matrix, product

LANES: Final[dict[int, Any]] = {
    8: np.uint8,
    16: np.uint16,
    RING_BITS: np.uint64,
}  # numbers of one-hots, by bits
WORDS: Final[dict[int, Any]] = {HALF_BITS: np.uint32, RING_BITS: np.uint64}  # of weights, by bits
UNIT_SCALE: Final = 14  # of a component's cos and sin; one more for the first frequency, the largest


# --- kinds -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trunc:
    f: int


@dataclass(frozen=True, slots=True)
class TruncIf:
    f: int


@dataclass(frozen=True, slots=True)
class Lookup:
    rest: int  # bits of the remainder
    bits: int  # bits of the index
    lane: int = RING_BITS  # the one-hot is shared modulo 2^lane: 16 or 8 bits where it only counts


@dataclass(frozen=True, slots=True)
class Pieces:
    rest: int  # bits of the remainder
    bits: int  # bits of the index
    degree: int


@dataclass(frozen=True, slots=True)
class Select:
    drops: tuple[int, ...]  # bits that each of the values loses, of which one is chosen; at least two

    @property
    def sizes(self) -> list[int]:
        """Entries of each value's one-hots: of the bits from its own on, of which the first has none."""
        count = len(self.drops)
        return [1 << (count - max(w, 1)) for w in range(count)]


@dataclass(frozen=True, slots=True)
class Wave:
    bits: int  # of the mask: one turn is 2^bits
    turns: tuple[int, ...]  # the frequencies
    unit: int = UNIT_SCALE  # of a component's cos and sin

    @property
    def scales(self) -> npt.NDArray[np.int64]:
        """Fraction bits of a component's cos and sin, by frequency; a mask's have three times as much."""
        return self.unit + (np.arange(len(self.turns)) == 0)


@dataclass(frozen=True, slots=True)
class Decay:
    rest: int  # bits of a component of the remainder
    bits: int  # bits of the index
    width: float  # what 2^rest of the remainder are worth in the exponent, at most 2.6


@dataclass(frozen=True, slots=True)
class Digits:
    sizes: tuple[int, ...]  # bits of each digit, the lowest first
    rest: int = 0  # bits below them of which there are no planes

    @property
    def width(self) -> int:
        return self.rest + sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Ands:
    monomials: tuple[tuple[int, ...], ...]  # of variables 0, 1, ..; each in rising order

    @property
    def subsets(self) -> tuple[tuple[int, ...], ...]:
        """Every set of variables within a monomial, the single variables first: what has a plane."""
        return _subsets(self.monomials)


@lru_cache(maxsize=256)
def _subsets(monomials: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    found = {s for m in monomials for d in range(1, len(m) + 1) for s in combinations(m, d)}
    return tuple(sorted(found, key=lambda s: (len(s), s)))


@lru_cache(maxsize=256)
def _factors(monomials: tuple[tuple[int, ...], ...]) -> tuple[int, list[tuple[Ring, Ring]]]:
    """How many variables there are; and for each degree from 2 on, which planes are multiplied to make the
    next ones.
    """
    subsets = _subsets(monomials)
    at = {s: i for i, s in enumerate(subsets)}
    sizes = [[s for s in subsets if len(s) == d] for d in range(1, 1 + len(subsets[-1]))]
    return len(sizes[0]), [
        (np.array([at[s[:-1]] for s in sets]), np.array([at[s[-1:]] for s in sets])) for sets in sizes[1:]
    ]


@dataclass(frozen=True, slots=True)
class DaBit:
    pass


@dataclass(frozen=True, slots=True)
class Pick:
    width: int
    flags: int = 1
    lane: int = RING_BITS  # modulo which power of 2 it counts, in whole bytes

    @property
    def size(self) -> int:
        """Numbers a row: for each set of bits their product, but for the empty one's, then x times it."""
        return ((self.width + 1) << self.flags) - 1


@dataclass(frozen=True, slots=True)
class Mul:
    pass


@dataclass(frozen=True, slots=True)
class Zero:
    pass


@dataclass(frozen=True, slots=True)
class Scale:
    width: int


@dataclass(frozen=True, slots=True)
class Norm:
    width: int
    f: int


@dataclass(frozen=True, slots=True)
class Weight:
    name: str
    lane: int = RING_BITS  # bits of the matrix's words


@dataclass(frozen=True, slots=True)
class Keys:
    """For rows first..first+rows of one layer: queries and keys, and queries times all keys up to there."""

    layer: int
    first: int
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    owner: int = 0  # of several sessions whose material is made together; 0 in a session's own


@dataclass(frozen=True, slots=True)
class Values(Keys):
    pass


Kind = (
    Trunc
    | TruncIf
    | Lookup
    | Pieces
    | Select
    | Wave
    | Decay
    | Digits
    | Ands
    | DaBit
    | Pick
    | Mul
    | Zero
    | Scale
    | Norm
    | Weight
    | Keys
)
Demand = Mapping[Kind, int]
Made = dict[Kind, dict[str, Ring]]
Stack = Sequence[Matrix] | Ring  # matrices of one shape
Caches = dict[tuple[str, int], list[Ring]]  # masks of keys and of values by layer, in the order of positions


class Weights(Protocol):
    """Weight shares by name: two components (k, n), each held by this party and one other."""

    def pair(self, name: str) -> tuple[Matrix, Matrix]: ...


# --- making a batch --------------------------------------------------------------------------------


class _Branch(Doors):
    """Doors of one of several makers that share rounds."""

    def __init__(self, doors: Doors) -> None:
        super().__init__(doors.channel, doors.bk)

    async def reshare_apart(self, step: str, *summands: Ring) -> list[tuple[Ring, Ring]]:
        await trio.lowlevel.checkpoint()  # the mesh must keep time while many makers run before a round
        return await ask((step, summands))


@dataclass(slots=True)
class Batch:
    """Correlations in the making, and the relations that must hold before they may be used."""

    doors: Doors
    weights: Weights
    caches: Sequence[Caches]  # masks of the caches that there are, by owner
    out: Made = field(default_factory=dict)
    relations: list[check.Product | check.Dot | check.Complex | check.SquareSum | check.Relation] = field(
        default_factory=list
    )
    gates: list[check.And] = field(default_factory=list)
    zeros: list[Ring] = field(default_factory=list)
    zero_bits: list[Ring] = field(default_factory=list)

    async def mul(self, step: str, x: Ring, y: Ring, lane: int = RING_BITS) -> Ring:
        """The product of shares (2, n), element by element, modulo 2^lane, with its relation. One round."""
        mask = self.doors.bk.zero(*x.shape[1:])
        part = await offload(8 * mask.size, partial(kernels.rss_mul, x, y, mask))
        (z,) = await self.exchange(step, (part, lane))
        self.state_product(x, y, z, lane)
        return z

    def state_product(self, x: Ring, y: Ring, z: Ring, lane: int) -> None:
        """State that z is x y modulo 2^lane, element by element."""
        self.relations.append(check.Product(_up(x, lane), y, _up(z, lane)))

    async def conj(self, step: str, *pairs: tuple[Ring, Ring]) -> list[Ring]:
        """ANDs of words of bits (2, ...), with their relations. One round."""
        solid = [(np.ascontiguousarray(x), np.ascontiguousarray(y)) for x, y in pairs]
        z = await self.ands(step, *solid)
        self.gates.extend(check.And(x, y, r) for (x, y), r in zip(solid, z, strict=True))
        return z

    async def ands(self, step: str, *pairs: tuple[Ring, Ring]) -> list[Ring]:
        """ANDs of words of bits (2, ...), contiguous. Unverified: the caller must state what they are, as
        gates or by a relation. One round.
        """
        masks = [self.doors.bk.zero_bits(*x.shape[1:]) for x, _ in pairs]

        def local() -> list[Ring]:
            return [kernels.rss_and(x, y, mask) for (x, y), mask in zip(pairs, masks, strict=True)]

        summands = await offload(8 * sum(m.size for m in masks), local)
        return await self.doors.reshare(step, *summands)

    async def matmul(self, step: str, a: Ring, b: tuple[Stack, Stack], lane: int = RING_BITS) -> Ring:
        """Stacks a (2, s, m, k) times b, two components of s matrices (k, n), which may each be one array:
        (2, s, m, n) modulo 2^lane, with its relation; a and b are words of so many bits. One round.
        """
        bk, width = self.doors.bk, b[0][0].shape[1]

        def local() -> Ring:
            z = bk.zero(a.shape[1], a.shape[2], width).astype(WORDS[lane], copy=False)
            first, both = a[0], a[0] + a[1]
            if isinstance(b[0], np.ndarray) and isinstance(b[1], np.ndarray):
                kernels.matmul(both, b[0], out=z, add=True)
                return kernels.matmul(first, b[1], out=z, add=True)
            for i in range(a.shape[1]):
                product(both[i], b[0][i], z[i], add=True)
                product(np.ascontiguousarray(first[i]), b[1][i], z[i], add=True)
            return z.astype(np.uint64, copy=False)

        (c,) = await self.exchange(step, (await offload(2 * a.size * width, local), lane))
        self.relations.append(check.MatrixProduct(_up(a, lane), b, _up(c, lane)))
        return c

    # -- bits of masks --

    async def add3(self, step: str, r: Ring, width: int, *, low: int) -> dict[str, Ring]:
        """Bits of r_0 + r_1 + r_2 for components (2, n) below 2^width, modulo 2^width.

        Carry-save: the sum bits of the three are their shares, the majority costs one AND a bit; then a
        prefix adder. Returns, as words of bits (2, ..., w): "sum" (width); for carry out of bit low-1, if low
        is not 0, "carry_a" + "carry_b". Rounds: 2 + log2(width). low is below width.
        """
        s = np.stack([kernels.bit_slice(np.ascontiguousarray(r[i]), width) for i in range(2)])
        if width == 1:
            return {"sum": s}
        bk, nothing = self.doors.bk, np.zeros_like(s[:, :1])
        p0, p1, p2 = (bk.known(i, s[:, :-1]) for i in range(3))  # what leaves the top bit is not needed
        (maj,) = await self.conj(f"{step}/majority", (p0 ^ p2, p1 ^ p2))
        maj = maj ^ p2
        m = np.concatenate([nothing, maj], axis=1)  # the majority, shifted up
        p, g = s ^ m, nothing
        if width > 2:
            (more,) = await self.conj(f"{step}/generate", (s[:, 1:-1], m[:, 1:-1]))
            g = np.concatenate([nothing, more], axis=1)
        carries = await self._prefix(f"{step}/prefix", p[:, :-1], g)  # out of each bit but the top
        out = {"sum": p ^ np.concatenate([nothing, carries], axis=1)}
        if low:
            out["carry_a"] = maj[:, low - 1]
            out["carry_b"] = carries[:, low - 1]
        return out

    async def _prefix(self, step: str, p: Ring, g: Ring) -> Ring:
        """Carries out of every bit (Sklansky): log2 rounds, at most width ANDs each, and fewer where a group
        reaches down to bit 0: whether all of it propagates is not asked again.
        """
        width = p.shape[1]
        span = 1
        p, g = p.copy(), g.copy()
        while span < width:
            hi = np.array([i for i in range(width) if i & span])
            lo = (hi & ~np.int64(2 * span - 1)) + span - 1
            above = hi >= 2 * span
            pairs = [(p[:, hi], g[:, lo]), (p[:, hi[above]], p[:, lo[above]])]
            a, *b = await self.conj(f"{step} {span}", *pairs[: 1 + above.any()])
            g[:, hi] ^= a
            if b:
                p[:, hi[above]] = b[0]
            span *= 2
        return g

    async def deal(self, step: str, own: Ring, lane: int = RING_BITS) -> Ring:
        """Shares (2, 3, ..) of what each party knows of its own block: block j is the `own` (..) of party j,
        modulo 2^lane. That party draws one summand with the next one and sends the other to the one
        before, to which it is masked by a key that this party lacks. A cheater may deal anything.

        One round; 8/3 bytes a shared value in the mean, or as much less as a lane is.
        """
        bk = self.doors.bk
        me, before, after = bk.party, bk.previous, bk.following
        out = np.zeros((2, 3, *own.shape), np.uint64)
        out[0, before], out[1, me] = bk.random(*own.shape)
        (told,) = await self.exchange(step, (own - out[1, me], lane))
        out[0, me], out[1, after] = told
        return out

    async def inject(
        self, step: str, bits: Ring, n: int, *, prove: bool = True, lane: int = RING_BITS
    ) -> Ring:
        """Words of bits (2, j, w) as ring elements (2, j, n), right modulo 2^lane.

        XOR of the three components as ring products, two rounds. The first product is of two components that
        one party knows, so that party deals it, a third of the bits each; the second is with the component
        that it does not know. Both are stated, the second only if `prove`: without the first, errors e and -e
        in the two would cancel exactly when the third component is 0, and a passing check would tell a bit.
        If not `prove`, the caller states that the result is 0 or 1, which shows an error of the second.
        """
        bk = self.doors.bk
        flat = bits.reshape(2, -1, bits.shape[-1])
        size = flat.shape[1] * n
        third = -(-size // 3)
        ring = np.empty((2, 3, third), np.uint64)  # the bits in three blocks, of which zeros fill the last
        for to, of in zip(ring.reshape(2, -1), flat, strict=True):
            kernels.bits_to_ring(np.ascontiguousarray(of), n, out=to[:size].reshape(-1, n))
            to[size:] = 0

        # In block j the factors are components j, j + 1, and then j + 2: of each factor, (slot, block).
        mine = [[(slot, (bk.party + slot - k) % 3) for slot in range(2)] for k in range(3)]
        up = RING_BITS - lane
        packed = kernels.ring_lsb(ring)

        def stated(k: int, block: int, end: int = third) -> check.Factor:
            """Factor k as a share; shifted up so that its product with the second, or with the first
            product, counts modulo 2^lane.
            """
            shift = 0 if k == 1 else up
            a, b = (
                check.BitValues(packed[slot, block], end, shift) if (slot, block) in mine[k] else None
                for slot in range(2)
            )
            return a, b

        def xored(slot: int, block: int, end: int) -> check.Xored:
            """The exclusive or of the first two factors, of which this is a component."""
            known = (slot, block) not in mine[2]
            bits_of = check.BitValues(packed[slot, block], end) if known else None
            return check.Xored(bits_of, both[slot, block, :end], up)

        both = await self.deal(f"{step}/xor 1", ring[0, bk.party] * ring[1, bk.party], lane)
        part = bk.zero(3 * third)[:size]
        blocks = [part[j * third : (j + 1) * third] for j in range(3)]
        (_, a), (_, b) = mine[2]  # where the third factor is known in the first slot, and in the second
        k, m = len(blocks[a]), len(blocks[b])
        blocks[a] += (ring[1, a, :k] - (both[0, a, :k] + both[1, a, :k]) * np.uint64(2)) * ring[0, a, :k]
        blocks[b] += (ring[0, b, :m] - both[0, b, :m] * np.uint64(2)) * ring[1, b, :m]
        x = ring  # and what is known of the third factor
        x -= both
        x -= both
        # Stated with what fills the last block, so that nothing of a message is free to be wrong.
        both <<= np.uint64(up)
        self.relations.extend(check.Dot((stated(0, j),), (stated(1, j),), both[:, j]) for j in range(3))

        (told,) = await self.exchange(f"{step}/xor 2", (part.reshape(-1, n), lane))
        if prove:
            z = _up(told, lane).reshape(2, -1)
            ends = [(j, len(v), slice(j * third, j * third + len(v))) for j, v in enumerate(blocks)]
            self.relations.extend(
                check.Dot((stated(2, j, end),), ((xored(0, j, end), xored(1, j, end)),), z[:, span])
                for j, end, span in ends
            )
        x = x.reshape(2, -1)[:, :size].reshape(2, -1, n)
        x -= told
        x -= told
        self.same_bits(x, flat, n)
        return x.reshape(*bits.shape[:-1], n)

    async def exchange(self, step: str, *summands: tuple[Ring, int]) -> list[Ring]:
        """`reshare` in one round, of which the lowest bits travel, so many as stand beside each summand, in
        whole bytes.
        """
        told = await self.doors.reshare_apart(step, *(_packed(v, lane) for v, lane in summands))
        return [
            np.stack(pair) if lane == RING_BITS else self._unpacked(pair, v.shape, lane)
            for pair, (v, lane) in zip(told, summands, strict=True)
        ]

    def _unpacked(self, told: tuple[Ring, Ring], shape: tuple[int, ...], lane: int) -> Ring:
        """Numbers (2, ..) modulo 2^lane from the words that they travelled in."""
        out = np.empty((2, math.prod(shape)), np.uint64)
        self._filled(told, out.shape[1], lane)
        for to, packed in zip(out, told, strict=True):
            kernels.bytes_unpack(packed, len(to), lane // 8, out=to)
        return out.reshape(2, *shape)

    def _filled(self, told: tuple[Ring, Ring], size: int, lane: int) -> list[npt.NDArray[np.uint8]]:
        """The bytes of the first `size` lanes of both components (w,). States that the others, which fill the
        last word, share zeros: no part of a message is free.
        """
        found = [words.view(np.uint8) for words in told]
        used = size * lane // 8
        rest = np.stack([v[used:] for v in found]).astype(np.uint64)
        if rest.size:
            self.zeros.append(rest << np.uint64(RING_BITS - 8))
        return [v[:used] for v in found]

    def same_bits(self, x: Ring, bits: Ring, n: int) -> None:
        """State that ring elements (2, j, n), known to be 0 or 1, are the bits (2, j, w).

        The low bits of the components of x share its low bit over GF(2), so this costs nothing but a zero
        check.
        """
        low = kernels.ring_lsb(np.ascontiguousarray(x))
        mask = np.full(bits.shape[-1], 2**64 - 1, np.uint64)
        if n % 64:
            mask[-1] = (1 << (n % 64)) - 1
        self.zero_bits.append((low ^ bits) & mask)

    async def one_hot(
        self, step: str, b: Ring, lane: int = RING_BITS, of: Ring | None = None
    ) -> npt.NDArray[Any]:
        """From what shall be bits (2, k, n) as ring elements, one-hots (2, n, 2^k) modulo 2^lane by doubling;
        bit j weighs 2^j. The relations say that the bits are bits, and the one-hots theirs. k - 1 rounds.

        Or, of bits that are bits, vectors that hold a value of (2, n) at their place instead of 1; k rounds.
        Where that is 1 the relation says that bits are bits.
        """
        bk = self.doors.bk
        k, n = b.shape[1:]
        e: npt.NDArray[Any] = np.empty((2, n, 1 << k), LANES[lane])
        shift = np.uint64(RING_BITS - lane)
        if of is None:
            one = bk.add_public(np.zeros((2, n), np.uint64), np.ones(n, np.uint64))
            e[:, :, 0], e[:, :, 1] = (one - b[:, 0]).astype(e.dtype), b[:, 0].astype(e.dtype)
        else:
            one = e[:, :, 0] = of
        for j in range(1 if of is None else 0, k):
            bit = np.ascontiguousarray(b[:, j])
            if lane < RING_BITS:
                await self._double_lanes(f"{step}/double {j}", e, bit, 1 << j)
                continue
            part = bk.zero(n, 1 << j)
            await offload(4 * part.size, partial(kernels.double_part, part, e, bit))
            (high,) = await self.doors.reshare_apart(f"{step}/double {j}", part)
            for i in range(2):
                await offload(part.size, partial(kernels.double, e[i], high[i]))
        self.relations.append(check.OneHot(*self._in_parts(e, b), int(shift)))
        self.zeros.append((e.sum(axis=2, dtype=e.dtype) - one) << shift)  # as no more counts
        return e

    def _in_parts(self, e: npt.NDArray[Any], b: Ring) -> tuple[npt.NDArray[Any], Ring]:
        """One-hots (2, n, 2^k) and their bits (2, k, n) as rows of check.ENTRIES entries at most.

        A long row becomes several, the bits of each less those of its number: where the one lies they are 0.
        """
        n, size = e.shape[1:]
        parts, low = size // check.ENTRIES, check.ENTRIES.bit_length() - 1
        if parts <= 1:
            return e, b
        number = np.tile(np.arange(parts, dtype=np.uint64), n)
        above = np.stack([number >> np.uint64(t) & np.uint64(1) for t in range(b.shape[1] - low)])
        b = np.repeat(b, parts, axis=2)
        b[:, low:] = self.doors.bk.add_public(b[:, low:], np.zeros(1, np.uint64) - above)
        return e.reshape(2, n * parts, check.ENTRIES), b

    async def _double_lanes(self, step: str, e: npt.NDArray[Any], bit: Ring, have: int) -> None:
        """Double the first entries of one-hots of fewer bits than a word has, in which several travel."""
        n, lane = e.shape[1], 8 * e.itemsize
        both = self.doors.bk.random(_lane_words(n * have, lane)).view(e.dtype)
        part = both[0] - both[1]  # a share of zero, lane by lane
        part[n * have :] = 0
        rows = part[: n * have].reshape(n, have)
        await offload(n * have // 2, partial(kernels.double_part, rows, e, bit))
        (high,) = await self.doors.reshare_apart(step, part.view(np.uint64))
        product = self._filled(high, n * have, lane)
        for i in range(2):
            kernels.double(e[i], product[i].view(e.dtype).reshape(n, have))

    async def times(self, step: str, v: Ring, x: Ring, lane: int = RING_BITS) -> Ring:
        """v (2, n) times each row of x (2, n, m) modulo 2^lane, with its relation. One round."""
        (z,) = await self.exchange(step, (await self.scaled(v, x), lane))
        self.state_scaled(v, x, z, lane)
        return z

    async def scaled(self, v: Ring, x: Ring) -> Ring:
        """A party's term of v (2, n) times each row of x (2, n, m)."""
        part = self.doors.bk.zero(*x.shape[1:])
        await offload(4 * part.size, partial(kernels.double_part, part, x, v))
        return part

    def state_scaled(self, v: Ring, x: Ring, z: Ring, lane: int) -> None:
        """State that z is v times each row of x, modulo 2^lane."""
        self.relations.append(check.ScalarProduct(_up(v, lane), x, _up(z, lane)))


def _lane_words(count: int, lane: int) -> int:
    """Words that so many lanes travel in."""
    return -(-count * lane // RING_BITS)


def _up(v: npt.NDArray[Any], lane: int) -> Ring:
    """v shifted up, so that what is stated of it counts modulo 2^lane."""
    return v.astype(np.uint64, copy=False) << np.uint64(RING_BITS - lane) if lane < RING_BITS else v


def _packed(v: Ring, lane: int) -> Ring:
    """The lowest `lane` bits of each, byte after byte, as words; or all of v as it is."""
    if lane == RING_BITS:
        return v
    return kernels.bytes_pack(np.ascontiguousarray(v).reshape(-1), lane // 8)


TRUNCATED_BITS: Final = 16  # of the bits to be dropped so many are masked
MASK_BITS: Final = 62  # of a component of a truncation's mask; two more are random by themselves


def unmasked_bits(f: int) -> int:
    """Low bits that a truncation by f drops from each component by itself, so that their mask is 0."""
    return max(0, f - TRUNCATED_BITS)


def truncation_lane(f: int) -> int:
    """Modulo which power of 2, in whole bytes, the bits of a mask for a truncation by f count: they are
    multiplied by 2^(62-f) or more.
    """
    return -(-(f + RING_BITS - MASK_BITS) // 8) * 8


def _cut(kinds: Mapping[Kind, int], material: dict[str, Ring]) -> Made:
    """Divide what was made together, in order, along the first value axis."""
    out: Made = {}
    at = 0
    for kind, n in kinds.items():
        out[kind] = {name: v[:, at : at + n] for name, v in material.items()}
        at += n
    return out


async def _truncs(b: Batch, kinds: Mapping[Kind, int], lane: int) -> Made:
    """What truncations take whose bits count modulo the same 2^lane, made together: otherwise the shift does
    not matter until the end.

    A mask is r = 2^62 u + v. v is the sum of components below 2^62 over the integers, which nobody has to
    reduce, so nothing carries; u are two bits, random by themselves. Whatever is below 2^62 and masked by r
    is uniform for every party: it lacks a component of v, uniform below 2^62, and does not know u. Since a
    sum with v does not reach 2^64, whether one with r does is told by u and what is opened (ops.truncate).
    Three rounds; three more for products with bits, one for each width of norms, and for each choice one more
    than it has values.
    """
    bk, name = b.doors.bk, f"trunc {lane}"
    shifts = {k: np.tile(np.array(_drops(k), np.uint64), n * _width(k)) for k, n in kinds.items()}
    pairs = {k: len(v) for k, v in shifts.items()}
    n, shift = sum(pairs.values()), np.concatenate(list(shifts.values()))
    bare = np.maximum(shift, np.uint64(TRUNCATED_BITS)) - np.uint64(TRUNCATED_BITS)  # unmasked_bits
    bits = (await b.inject(f"{name}/inject", bk.random(1, words(2 * n)), 2 * n, lane=lane))[:, 0]
    high, low = np.ascontiguousarray(bits[:, :n]), np.ascontiguousarray(bits[:, n:])
    both = await b.mul(f"{name}/both", high, low, lane)
    u = high + high + low
    v = bk.random(n) & np.uint64((1 << MASK_BITS) - 1)
    v = v >> bare << bare
    r = v + (u << np.uint64(MASK_BITS))
    base = (v >> shift) + (u << np.uint64(MASK_BITS) - shift)
    out = _cut(pairs, {"r": r, "base": base, "over": np.stack([high + low - both, high, both], axis=2)})
    chosen: dict[Kind, int] = {k: m for k, m in kinds.items() if isinstance(k, TruncIf)}
    if chosen:
        n = sum(chosen.values())
        ring = np.ascontiguousarray((await b.inject(f"{name}/if", bk.random(1, words(n)), n))[:, 0])
        base, over = (np.concatenate([out[k][part] for k in chosen], axis=1) for part in ("base", "over"))
        factors = [(base[:, :, None], RING_BITS), (over, lane)]
        z = await b.exchange(f"{name}/if", *[(await b.scaled(ring, x), count) for x, count in factors])
        for (x, count), y in zip(factors, z, strict=True):
            b.state_scaled(ring, x, y, count)
        for kind, more in _cut(chosen, {"ring": ring, "z": np.concatenate(z, axis=2)}).items():
            out[kind] |= more
    for norm in [k for k in kinds if isinstance(k, Norm)]:
        out[norm] = await _norm(b, norm, kinds[norm], out[norm])
    for select in [k for k in kinds if isinstance(k, Select)]:
        out[select] = await _select(b, select, kinds[select], out[select])
    return out


def _drops(kind: Kind) -> tuple[int, ...]:
    """Bits that a truncation drops; of several values in turn."""
    match kind:
        case Trunc(f) | TruncIf(f) | Norm(_, f):
            return (f,)
        case Select(drops):
            return drops
    raise LocalError(f"{kind} is no truncation")


def _width(kind: Kind) -> int:
    return kind.width if isinstance(kind, Norm) else 1


async def _select(b: Batch, kind: Select, n: int, pairs: Mapping[str, Ring]) -> dict[str, Ring]:
    """For each value a vector that has `base` and `over` of its mask at the place that random bits point at:
    its own and those of the values after it. Opening the bits of which the last that is set chooses turns
    these places into the one that is meant.

    Vectors of all values are doubled side by side, so the longest sets the rounds.
    """
    count, name = len(kind.drops), f"select {'.'.join(map(str, kind.drops))}"
    r, base = (np.ascontiguousarray(pairs[k]).reshape(2, n, count) for k in ("r", "base"))
    over = np.ascontiguousarray(pairs["over"]).reshape(2, n, count, 3)
    # That these are bits is what the relation of their one-hots says.
    bits = await b.inject(f"{name}/inject", b.doors.bk.random(count - 1, words(n)), n, prove=False)
    terms = np.concatenate([base[..., None], over], axis=3)  # (2, n, count, 4)
    inner = replace(b, doors=_Branch(b.doors))
    flows = [inner.one_hot(f"{name}/hot", bits)]
    for w in range(count):
        own = np.repeat(bits[:, max(w, 1) - 1 :], 4, axis=2)
        of = np.ascontiguousarray(terms[:, :, w]).reshape(2, 4 * n)
        flows.append(inner.one_hot(f"{name}/value {w}", own, of=of))
    hot, *vectors = await side_by_side(flows, partial(_reshared, b.doors))
    hots = [hot]
    while hots[-1].shape[2] > 2:  # without the lowest bit
        hots.append(hots[-1].reshape(2, n, -1, 2).sum(axis=3, dtype=np.uint64))
    return {
        "r": r,
        "ring": np.ascontiguousarray(np.swapaxes(bits, 1, 2)),
        "hot": np.concatenate(hots, axis=2),
        "z": np.concatenate([v.reshape(2, n, -1) for v in vectors], axis=2),
    }


async def _lookup(b: Batch, kind: Lookup, n: int) -> dict[str, Ring]:
    lane = f".lane{kind.lane}" if kind.lane < RING_BITS else ""
    name = f"lookup {kind.rest}.{kind.bits}{lane}"
    r = b.doors.bk.random(n) & np.uint64((1 << (kind.rest + kind.bits)) - 1)
    bits = (await b.add3(name, r, kind.rest + kind.bits, low=0))["sum"][:, kind.rest :]
    # The relation of the one-hot says that the index bits are 0 or 1; their low bits are those shared.
    got = await b.inject(f"{name}/inject", bits, n, prove=False, lane=kind.lane)
    return {"r": r, "e": await b.one_hot(name, got, kind.lane)}


async def _pieces(b: Batch, kind: Pieces, n: int) -> dict[str, Ring]:
    """The mask is 2^rest u + v; u points. v is what the components have below 2^rest, less what carries."""
    rest, name = kind.rest, f"pieces {kind.rest}.{kind.bits}.{kind.degree}"
    r = b.doors.bk.random(n) & np.uint64((1 << (rest + kind.bits)) - 1)
    bits = await b.add3(name, r, rest + kind.bits, low=rest)
    carried = [bits[name][:, None] for name in ("carry_a", "carry_b")]
    stack = np.concatenate([bits["sum"][:, rest:], *carried], axis=1)
    got = await b.inject(f"{name}/inject", stack, n, prove=False)
    carries = np.ascontiguousarray(got[:, kind.bits :])
    flat = carries.reshape(2, -1)
    b.relations.append(check.Product(flat, flat, flat))
    v = (r & np.uint64((1 << rest) - 1)) - (carries[:, 0] + carries[:, 1]) * np.uint64(1 << rest)
    powers = [b.doors.bk.add_public(np.zeros((2, n), np.uint64), np.ones(n, np.uint64)), v]
    powers = powers[: kind.degree + 1]
    for d in range(2, kind.degree + 1):
        powers.append(await b.mul(f"{name}/power {d}", powers[-1], v))
    # Of the first power, 1, the relation says that the index bits are 0 or 1.
    terms = np.stack(powers, axis=2).reshape(2, -1)
    index = np.repeat(got[:, : kind.bits], kind.degree + 1, axis=2)
    e = await b.one_hot(name, index, of=terms)
    return {"r": r, "e": e.reshape(2, n, kind.degree + 1, -1)}


FACTOR_SCALE: Final = 12  # of a component's e^-v; as above
IN_CACHE: Final = 1 << 12  # masks at once, whose cosines and sines lie in a cache while they are computed


def _blocks(party: int, v: Ring) -> list[tuple[check.Sparse, check.Sparse, check.Sparse]]:
    """Of components (2, 3 m, ..) of a value, in three blocks: for block k the shares that have component k,
    k + 1 and k + 2 alone, flat.
    """
    parts = v.reshape(2, 3, -1)

    def known(component: int, block: int) -> check.Sparse:
        own, other = (
            parts[slot, block] if (party + slot - component) % 3 == 0 else None for slot in range(2)
        )
        return own, other

    return [(known(k, k), known(k + 1, k), known(k + 2, k)) for k in range(3)]


def _negative(v: Ring | None) -> check.Values | None:
    return None if v is None else check.Negative(v)


async def _wave(b: Batch, kind: Wave, n: int) -> dict[str, Ring]:
    """cos and sin of the mask are those of a sum of three: the product of three complex numbers of length 1.

    The first product is of two components that one party knows, and dealt by it, for a third of the masks
    each. Two rounds, 64 / 3 bytes a frequency.
    """
    bk, name, m = b.doors.bk, f"wave {kind.bits}", len(kind.turns)
    r = bk.random(n)
    third = -(-n // 3)
    padded = np.pad(r, [(0, 0), (0, 3 * third - n)])
    work = 100 * padded.size * m

    def units() -> tuple[Ring, Ring]:
        cos, sin = np.empty((2, 2, 3 * third, m), np.uint64)
        for at in range(0, 3 * third, IN_CACHE):
            some = slice(at, at + IN_CACHE)
            for slot, v in enumerate(padded):
                c, s = circle(fractions(v[some], kind.turns, kind.bits))
                cos[slot, some], sin[slot, some] = integers(c, kind.scales), integers(s, kind.scales)
        return cos, sin

    cos, sin = await offload(work, units)
    own_c, own_s = (v.reshape(2, 3, third, m)[:, bk.party] for v in (cos, sin))
    dealt = np.stack([own_c[0] * own_c[1] - own_s[0] * own_s[1], own_c[0] * own_s[1] + own_s[0] * own_c[1]])
    both = await b.deal(f"{name}/first", dealt)  # (2, 3, 2, third, m)
    part = bk.zero(3, 2, third, m)
    for slot in range(2):
        block = (bk.party + slot + 1) % 3  # whose third component this is
        p, q = both[0, block] + both[1, block] if slot == 0 else both[0, block]
        c, s = (v[slot].reshape(3, third, m)[block] for v in (cos, sin))
        part[block, 0] += p * c - q * s
        part[block, 1] += p * s + q * c
    (z,) = await b.doors.reshare(f"{name}/second", part)
    for k, (c, s) in enumerate(zip(_blocks(bk.party, cos), _blocks(bk.party, sin), strict=True)):
        less = [(_negative(p), _negative(q)) for p, q in s]
        re, im = (both[:, k, i].reshape(2, -1) for i in range(2))
        z_re, z_im = (z[:, k, i].reshape(2, -1) for i in range(2))
        p, q = (re[0], re[1]), (im[0], im[1])
        b.relations.append(check.Complex((c[0], s[0]), less[0], (c[1], s[1]), (re, im)))
        b.relations.append(check.Complex((c[2], s[2]), less[2], (p, q), (z_re, z_im)))
    waves = np.ascontiguousarray(np.moveaxis(z, 2, 3)).reshape(2, 3 * third, 2 * m)[:, :n]
    return {"r": r, "waves": waves}


async def _decay(b: Batch, kind: Decay, n: int) -> dict[str, Ring]:
    """e^(3 w / 2 - v), w the width of a bin, where index bits point, 0 elsewhere: v is the sum of its three
    components over the integers, so this is the product of three factors; then doubling. The index is random
    by itself, so that the sum may carry into it.
    """
    bk, name = b.doors.bk, f"decay {kind.rest}.{kind.bits}"
    third = -(-n // 3)
    low = bk.random(n) & np.uint64((1 << kind.rest) - 1)
    padded = np.pad(low, [(0, 0), (0, 3 * third - n)])
    unit = kind.width * 2.0**-kind.rest

    def factors() -> Ring:
        return integers(exponential(kind.width / 2 - padded.astype(np.float64) * unit), FACTOR_SCALE)

    f = await offload(40 * padded.size, factors)  # (2, 3 third)
    own = f.reshape(2, 3, third)[:, bk.party]
    both = await b.deal(f"{name}/first", own[0] * own[1])  # (2, 3, third)
    part = bk.zero(3, third)
    for slot in range(2):
        block = (bk.party + slot + 1) % 3
        known = f[slot].reshape(3, third)[block]
        part[block] += (both[0, block] + both[1, block] if slot == 0 else both[0, block]) * known
    (z,) = await b.doors.reshare(f"{name}/second", part)
    for k, (first, second, last) in enumerate(_blocks(bk.party, f)):
        p = np.ascontiguousarray(both[:, k])
        b.relations.append(check.Dot((first,), (second,), p))
        b.relations.append(check.Dot((last,), ((p[0], p[1]),), np.ascontiguousarray(z[:, k])))
    bits = await b.inject(f"{name}/inject", bk.random(kind.bits, words(n)), n)
    e = await b.one_hot(name, bits, of=np.ascontiguousarray(z.reshape(2, -1)[:, :n]))
    weights = np.uint64(1) << np.arange(kind.rest, kind.rest + kind.bits, dtype=np.uint64)
    return {"r": low + (bits * weights[:, None]).sum(axis=1, dtype=np.uint64), "e": e}


STATED_WHOLE: Final = 6  # bits of a digit from which on its one-hot is stated at once, and not its products


async def _digits(b: Batch, kind: Digits, n: int) -> dict[str, Ring]:
    """One-hots over GF(2) of the digits of r, as bit planes: opening c = x + r, x = j iff r = c - j."""
    bk = b.doors.bk
    r = bk.random(n) & np.uint64((1 << kind.width) - 1)
    name = f"digits {'.'.join(map(str, kind.sizes))}{f' over {kind.rest}' if kind.rest else ''}"
    bits = (await b.add3(name, r, kind.width, low=0))["sum"][:, kind.rest :]
    ones = np.full(bits.shape[2], 2**64 - 1, np.uint64)
    ends = np.cumsum(kind.sizes)
    digits = [bits[:, end - size : end] for end, size in zip(ends, kind.sizes, strict=True)]
    hot = [np.stack([bk.xor_public(digit[:, 0], ones), digit[:, 0]], axis=1) for digit in digits]
    for j in range(1, max(kind.sizes)):
        wide = [d for d, size in enumerate(kind.sizes) if size > j]
        pairs = [
            (hot[d], np.ascontiguousarray(np.broadcast_to(digits[d][:, j : j + 1], hot[d].shape)))
            for d in wide
        ]
        highs = await b.ands(f"{name}/double {j}", *pairs)
        for d, (low, bit), high in zip(wide, pairs, highs, strict=True):
            if kind.sizes[d] < STATED_WHOLE:
                b.gates.append(check.And(low, bit, high))
            hot[d] = np.concatenate([low ^ high, high], axis=1)
    for digit, planes in zip(digits, hot, strict=True):
        if digit.shape[1] >= STATED_WHOLE:
            b.relations.append(check.OneHotPlanes(planes, digit))
            b.zero_bits.append(bk.xor_public(np.bitwise_xor.reduce(planes, axis=1), ones))
    return {"r": r, "planes": np.concatenate(hot, axis=1)}


async def _ands(b: Batch, kinds: Mapping[Kind, int]) -> Made:
    """Planes of random words, n each, and of their products within each monomial: one round a degree for all
    kinds together.
    """
    factors = {k: _factors(k.monomials) for k in kinds if isinstance(k, Ands)}
    planes = {}
    for k, (variables, _) in factors.items():
        planes[k] = np.empty((2, len(k.subsets), kinds[k]), np.uint64)
        planes[k][:, :variables] = b.doors.bk.random(variables, kinds[k])
    at = {k: variables for k, (variables, _) in factors.items()}
    for degree in range(2, 2 + max(len(pairs) for _, pairs in factors.values())):
        growing = {k: pairs[degree - 2] for k, (_, pairs) in factors.items() if len(pairs) > degree - 2}
        pairs = [(planes[k].take(x, 1), planes[k].take(y, 1)) for k, (x, y) in growing.items()]
        for k, more in zip(growing, await b.conj(f"ands/degree {degree}", *pairs), strict=True):
            planes[k][:, at[k] : at[k] + more.shape[1]] = more
            at[k] += more.shape[1]
    return {k: {"planes": v} for k, v in planes.items()}


async def _dabit(b: Batch, kind: DaBit, n: int) -> dict[str, Ring]:
    bits = b.doors.bk.random(1, words(n))
    ring = await b.inject("dabit", bits, n)
    return {"ring": ring[:, 0]}


async def _pick(b: Batch, kind: Pick, n: int) -> dict[str, Ring]:
    """What is there of the bits so far, times the next one: a round for each bit."""
    bk, name = b.doors.bk, f"pick {kind.width}.{kind.flags}.{kind.lane}"
    bits, w = bk.random(kind.flags, words(n)), bk.random(n, kind.width)
    ring = await b.inject(f"{name}/inject", bits, n, lane=kind.lane)
    for number in range(kind.flags):
        bit = np.ascontiguousarray(ring[:, number])
        z = await b.times(f"{name}/times {number}", bit, w, kind.lane)
        w = np.concatenate([w, bit[:, :, None], z], axis=2)
    return {"w": w}


async def _mul(b: Batch, kind: Mul, n: int) -> dict[str, Ring]:
    bk = b.doors.bk
    x, y = bk.random(n), bk.random(n)
    return {"x": x, "y": y, "z": await b.mul("mul", x, y)}


async def _zero(b: Batch, kind: Zero, n: int) -> dict[str, Ring]:
    (z,) = await b.doors.reshare("zero", b.doors.bk.zero(n))
    b.zeros.append(z)
    return {"zero": z}


async def _scale(b: Batch, kind: Scale, n: int) -> dict[str, Ring]:
    bk = b.doors.bk
    s, x = bk.random(n), bk.random(n, kind.width)
    z = await b.times(f"scale {kind.width}", s, x)
    return {"s": s, "x": x, "z": z}


async def _norm(b: Batch, kind: Norm, n: int, pairs: Mapping[str, Ring]) -> dict[str, Ring]:
    bk, lane = b.doors.bk, truncation_lane(kind.f)
    r, base = (np.ascontiguousarray(pairs[k]).reshape(2, n, kind.width) for k in ("r", "base"))
    over = np.ascontiguousarray(pairs["over"]).reshape(2, -1)
    thrice = np.repeat(base.reshape(2, -1), 3, axis=1)
    square = ((base[0] + base[1]) * base[0] + base[0] * base[1]).sum(axis=1, dtype=np.uint64) + bk.zero(n)
    q, both = await b.exchange(
        f"norm {kind.width}.{kind.f}",
        (square, RING_BITS),
        (kernels.rss_mul(over, thrice, bk.zero(over.shape[1])), lane),
    )
    b.relations.append(check.SquareSum(base, q))
    b.state_product(over, thrice, both, lane)
    by_element = (2, n, kind.width, 3)
    return {"r": r, "base": base, "over": over.reshape(by_element), "both": both.reshape(by_element), "q": q}


async def _weight(b: Batch, kind: Weight, n: int) -> dict[str, Ring]:
    w = b.weights.pair(kind.name)
    x = b.doors.bk.random(n, w[0].shape[0]).astype(WORDS[kind.lane], copy=False)
    z = await b.matmul(f"weight {kind.name}", x[:, None], ((w[0],), (w[1],)), kind.lane)
    return {"x": x, "z": z[:, 0].astype(WORDS[kind.lane], copy=False)}


async def _keys(b: Batch, kind: Keys, n: int) -> dict[str, Ring]:
    """Query masks times all key masks so far, per head: (heads, rows, first + rows)."""
    bk = b.doors.bk
    q = bk.random(kind.heads, kind.rows, kind.head_dim)
    new = bk.random(kind.kv_heads, kind.rows, kind.head_dim)
    cache = b.caches[kind.owner].setdefault(("keys", kind.layer), [])
    cache.append(new)
    keys = np.concatenate(cache, axis=2)
    if keys.shape[2] != kind.first + kind.rows:
        raise LocalError("key masks must be made in the order of positions")
    keys_t = np.ascontiguousarray(np.swapaxes(keys, 2, 3))  # (2, kv_heads, dim, positions)
    z = await b.matmul(f"keys {kind.layer}", q, _by_head(keys_t, kind))
    return {"x": q, "new": new, "z": z}


def _by_head(v: Ring, kind: Keys) -> tuple[Stack, Stack]:
    """Of each component of (2, kv_heads, ..) the matrix that each head uses."""
    group = kind.heads // kind.kv_heads
    if group == 1:
        return v[0], v[1]
    first, second = ([component[head // group] for head in range(kind.heads)] for component in v)
    return first, second


async def _values(b: Batch, kind: Values, n: int) -> dict[str, Ring]:
    """Attention-weight masks times all value masks so far, per head: (heads, rows, head_dim)."""
    bk = b.doors.bk
    a = bk.random(kind.heads, kind.rows, kind.first + kind.rows)
    new = bk.random(kind.kv_heads, kind.rows, kind.head_dim)
    cache = b.caches[kind.owner].setdefault(("values", kind.layer), [])
    cache.append(new)
    values = np.concatenate(cache, axis=2)
    if values.shape[2] != kind.first + kind.rows:
        raise LocalError("value masks must be made in the order of positions")
    z = await b.matmul(f"values {kind.layer}", a, _by_head(values, kind))
    return {"x": a, "new": new, "z": z}


_MAKERS: Final[dict[type, Any]] = {
    Lookup: _lookup,
    Pieces: _pieces,
    Wave: _wave,
    Decay: _decay,
    Digits: _digits,
    DaBit: _dabit,
    Pick: _pick,
    Mul: _mul,
    Zero: _zero,
    Scale: _scale,
    Weight: _weight,
    Keys: _keys,
    Values: _values,
}


def shapes(kind: Kind, n: int, weight_shape: tuple[int, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes, components not counted, of what n of a kind consist of: for planning a step without running
    it.
    """
    match kind:
        case Trunc():
            return {"r": (n,), "base": (n,), "over": (n, 3)}
        case TruncIf():
            return {"r": (n,), "base": (n,), "over": (n, 3), "ring": (n,), "z": (n, 4)}
        case Lookup():
            return {"r": (n,), "e": (n, 1 << kind.bits)}
        case Pieces():
            return {"r": (n,), "e": (n, kind.degree + 1, 1 << kind.bits)}
        case Select():
            count, sizes = len(kind.drops), kind.sizes
            hot, z = (n, sum(sizes[1:])), (n, 4 * sum(sizes))
            return {"r": (n, count), "ring": (n, count - 1), "hot": hot, "z": z}
        case Wave():
            return {"r": (n,), "waves": (n, 2 * len(kind.turns))}
        case Decay():
            return {"r": (n,), "e": (n, 1 << kind.bits)}
        case Digits():
            return {"r": (n,), "planes": (sum(1 << size for size in kind.sizes), words(n))}
        case Ands():
            return {"planes": (len(kind.subsets), n)}
        case DaBit():
            return {"ring": (n,)}
        case Pick():
            return {"w": (n, kind.size)}
        case Mul():
            return {"x": (n,), "y": (n,), "z": (n,)}
        case Zero():
            return {"zero": (n,)}
        case Scale():
            return {"s": (n,), "x": (n, kind.width), "z": (n, kind.width)}
        case Norm():
            row, thrice = (n, kind.width), (n, kind.width, 3)
            return {"r": row, "base": row, "over": thrice, "both": thrice, "q": (n,)}
        case Weight():
            assert weight_shape is not None
            return {"x": (n, weight_shape[0]), "z": (n, weight_shape[1])}
        case Values():
            total = kind.first + kind.rows
            rows = (kind.heads, kind.rows, kind.head_dim)
            return {
                "x": (kind.heads, kind.rows, total),
                "new": (kind.kv_heads, kind.rows, kind.head_dim),
                "z": rows,
            }
        case Keys():
            total = kind.first + kind.rows
            rows = (kind.heads, kind.rows, kind.head_dim)
            return {
                "x": rows,
                "new": (kind.kv_heads, kind.rows, kind.head_dim),
                "z": (kind.heads, kind.rows, total),
            }


async def produce(batch: Batch, step: str, demand: Demand) -> Made:
    """Make and verify everything in `demand`, or raise. Nothing unverified is returned.

    Makers run side by side, so the longest sets the rounds; see check.verify for those that follow.
    """
    groups: dict[tuple[Any, ...], dict[Kind, int]] = {}
    for kind, n in sorted(demand.items(), key=lambda kv: order(kv[0])):
        if n:
            groups.setdefault(_group(kind), {})[kind] = n
    doors = batch.doors
    inner = replace(batch, doors=_Branch(doors))  # whose relations are those of the batch
    makers = [_make(inner, group, kinds) for group, kinds in groups.items()]
    for made in await side_by_side(makers, partial(_reshared, doors)):
        batch.out |= made
    await check.verify(doors, f"{step}/verify", batch.relations, batch.gates, batch.zeros, batch.zero_bits)
    return batch.out


async def _make(batch: Batch, group: tuple[Any, ...], kinds: Mapping[Kind, int]) -> Made:
    if group[0] is Trunc:
        return await _truncs(batch, kinds, group[1])
    if group[0] is Ands:
        return await _ands(batch, kinds)
    return {kind: await _MAKERS[type(kind)](batch, kind, n) for kind, n in kinds.items()}


async def _reshared(
    doors: Doors, asks: Mapping[int, tuple[str, Sequence[Ring]]]
) -> dict[int, list[tuple[Ring, Ring]]]:
    """The resharings of several makers in one round, named after the first."""
    first, _ = next(iter(asks.values()))
    step = first if len(asks) == 1 else f"{first} and {len(asks) - 1} more"
    told = iter(await doors.reshare_apart(step, *(v for _, summands in asks.values() for v in summands)))
    return {i: [next(told) for _ in summands] for i, (_, summands) in asks.items()}


def _group(kind: Kind) -> tuple[Any, ...]:
    """Kinds of one group are made together: truncations whose bits count modulo the same power of 2."""
    if isinstance(kind, Trunc | TruncIf | Norm | Select):
        return Trunc, truncation_lane(max(_drops(kind)))
    if isinstance(kind, Ands):
        return (Ands,)
    return (kind,)


def order(kind: Kind) -> tuple[str, Any]:
    # All parties make kinds in one order; attention masks in the order of positions.
    if isinstance(kind, Keys):
        return (type(kind).__name__, (kind.owner, kind.first, kind.layer))
    return (type(kind).__name__, repr(kind))


@dataclass(slots=True)
class Store:
    """Verified correlations of one step of one session. What has been taken is gone."""

    material: dict[Kind, dict[str, Ring]]
    taken: dict[Kind, int] = field(default_factory=dict)

    def take(self, kind: Kind, n: int, of: int = 0) -> dict[str, Ring]:
        """The next n of a kind; for kinds made of bit lanes n is rounded up to words by the caller. Once
        only. `of` is for `Joint`.
        """
        have = self.material.get(kind)
        if have is None:
            raise LocalError(f"no correlation of kind {kind} was prepared for this step")
        if isinstance(kind, Keys):
            return self.material.pop(kind)
        at = self.taken.get(kind, 0)
        out, end = {}, at + n
        # Of bit lanes 64 are a word of a plane; otherwise n counts words itself.
        lo, hi = (at // 64, at // 64 + words(n)) if isinstance(kind, Digits) else (at, end)
        for name, v in have.items():
            planes = name == "planes"
            if (hi if planes else end) > v.shape[2 if planes else 1]:
                raise LocalError(f"correlations of kind {kind} are used up; the demand was planned too small")
            out[name] = v[:, :, lo:hi] if planes else v[:, at:end]
        self.taken[kind] = at + lanes(kind, n)
        return out

    def left(self) -> dict[Kind, int]:
        """What was planned and not taken."""
        return {kind: n for kind in self.material if (n := self.count(kind)) > 0}

    def count(self, kind: Kind) -> int:
        """How many of a kind are left."""
        have = self.material.get(kind)
        if have is None:
            return 0
        name, first = next(iter(have.items()))
        total = 1 if isinstance(kind, Keys) else first.shape[_axis(name)]
        return total - self.taken.get(kind, 0)

    def moved(self) -> Store:
        """The same in memory of its own, if nothing has been taken; what it came from is wiped. Masks of a
        cache, which holds them too, have been so from the start.
        """
        if self.taken:
            raise LocalError("material of which some was taken stays where it is")
        own: Made = {}
        for kind in list(self.material):
            if isinstance(kind, Keys):
                own[kind] = self.material.pop(kind)
            else:
                own[kind] = {name: v.copy() for name, v in self.material[kind].items()}
        self.wipe()
        return Store(own)

    def wipe(self) -> None:
        for arrays in self.material.values():
            for v in arrays.values():
                if v.flags.writeable and v.flags.c_contiguous:
                    kernels.wipe(v)
                elif v.flags.writeable:  # part of a larger array
                    v.fill(0)
        self.material.clear()


class Joint:
    """The stores of several sessions for one pass of all of them.

    A correlation serves any of them, since what is opened under it tells nothing; but masks of a cache are
    those of its session.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = list(stores)
        self._at: dict[Kind, int] = {}  # the store that a kind is taken from now

    def take(self, kind: Kind, n: int, of: int = 0) -> dict[str, Ring]:
        """The next n of a kind, of one store after another; masks of a cache from store `of`. Once only."""
        if isinstance(kind, Keys):
            return self.stores[of].take(kind, n)
        if len(self.stores) == 1:
            return self.stores[0].take(kind, n)
        pieces: list[dict[str, Ring]] = []
        while n:
            at = self._at.setdefault(kind, 0)
            if at == len(self.stores):
                raise LocalError(f"correlations of kind {kind} are used up; the demand was planned too small")
            part = min(n, self.stores[at].count(kind))
            if part:
                pieces.append(self.stores[at].take(kind, part))
                n -= part
            else:
                self._at[kind] = at + 1
        if len(pieces) == 1:
            return pieces[0]
        return {
            name: np.concatenate([piece[name] for piece in pieces], axis=_axis(name)) for name in pieces[0]
        }


def _axis(name: str) -> int:
    """Along which the items of an array of material are counted."""
    return 2 if name == "planes" else 1


def lanes(kind: Kind, n: int) -> int:
    """How many of a kind a request for n consumes: bit-lane kinds go by whole words."""
    return 64 * words(n) if isinstance(kind, Digits) else n


def add_demand(total: dict[Kind, int], more: Demand) -> None:
    for kind, n in more.items():
        total[kind] = total.get(kind, 0) + n


def join(parts: Sequence[Made]) -> Made:
    """Several verified batches as one: what was made of a kind in order, one after the other."""
    if len(parts) == 1:
        return parts[0]
    out: Made = {}
    for kind in {k: None for part in parts for k in part}:
        pieces = [part.pop(kind) for part in parts if kind in part]
        if len(pieces) == 1:
            out[kind] = pieces[0]
            continue
        out[kind] = {
            name: np.concatenate([piece[name] for piece in pieces], axis=_axis(name)) for name in pieces[0]
        }
        for piece in pieces:
            Store({kind: piece}).wipe()
    return out


def owned(demand: Demand, owner: int) -> Demand:
    """A session's demand among those of others: masks of its caches are told from theirs."""
    return {replace(k, owner=owner) if isinstance(k, Keys) else k: n for k, n in demand.items()}


def split(material: dict[Kind, dict[str, Ring]], demands: Sequence[Demand]) -> list[Store]:
    """Cut one verified batch, made for the sum of several demands, into one store per demand, in which kinds
    are named as a session does.
    """
    whole = Store(material)
    out = []
    for demand in demands:
        taken = {k: whole.take(k, n) for k, n in demand.items() if n}
        out.append(Store({replace(k, owner=0) if isinstance(k, Keys) else k: v for k, v in taken.items()}))
    return out
