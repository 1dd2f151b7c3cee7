"""The doors: the only code that sends or receives for a computation, and the rule for clear values.

A value may become clear in these ways and no other:

1. `open`: a share that the caller has masked with unused, uniform, verified randomness. Each party gets
   the component it lacks from one holder in full and from the other as a SHA-256 digest, in the same
   round. Of the two holders one is honest, so what is accepted is what the honest parties hold: a lie is
   caught before the value is used, and no two honest parties can be told different values.
2. `toss`: coins that all parties committed to before anything they challenge was fixed, and opened only
   afterwards.
3. `reveal`: to a client only, for a purpose named in REVEAL_PURPOSES, after every party has confirmed
   that all its checks passed. The components leave re-randomised and sealed to that client.

Preprocessing products pass through `reshare`; they may carry an error added by a cheater and are not used
before `check` has passed. A failed check raises; it is never reported as a value. What a failure gives
away: that the session has ended, and when.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from mimir import kernels
from mimir.errors import LocalError, PeerError
from mimir.mpc.domain import Ring, words
from mimir.mpc.drbg import HmacDrbg
from mimir.mpc.replicated import PARTIES, Replicated
from mimir.mpc.share import Bits, Share
from mimir.net import Channel

DIGEST: Final = 32
SEED: Final = 32
REVEAL_PURPOSES: Final = frozenset({"token", "input mask"})
_CONFIRM: Final = b"every check passed"


def _pack(arrays: Sequence[Ring]) -> list[memoryview]:
    return [np.ascontiguousarray(a).data.cast("B") for a in arrays if a.size]


def _digest(step: str, parts: Sequence[memoryview | bytes | bytearray]) -> bytes:
    h = hashlib.sha256(struct.pack(">I", len(step)) + step.encode())
    for p in parts:
        h.update(p)
    return h.digest()


def _joined(values: Sequence[Ring]) -> Ring:
    """Components side by side (components, words), so that hash and link take one piece each."""
    flat = [v.reshape(len(v), -1) for v in values]
    if not flat:
        return np.empty((Replicated.components, 0), np.uint64)
    return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)


def _split(raw: bytearray, shapes: Sequence[tuple[int, ...]]) -> list[Ring]:
    """Arrays of these shapes, one after another, in the memory of `raw`."""
    flat = np.frombuffer(raw, np.uint64)
    if len(shapes) == 1:
        return [flat.reshape(shapes[0])]
    out, at = [], 0
    for shape in shapes:
        n = math.prod(shape)
        out.append(flat[at : at + n].reshape(shape))
        at += n
    return out


@dataclass(frozen=True, slots=True)
class Masked:
    """Shares to be opened: ring elements, bits (by their type), or ring elements modulo 2^width, which take
    `width` bits each if they are many.
    """

    shares: Sequence[Share]
    width: int = 64

    def travels(self, s: Share) -> Ring:
        """The components as they are sent, (components, words): nothing above `width` leaves."""
        flat = s.v.reshape(len(s.v), -1)
        if isinstance(s, Bits) or self.width == 64:
            return flat
        if _sliced(self.width, flat.shape[1]):
            return kernels.bit_slice(np.ascontiguousarray(flat), self.width).reshape(len(flat), -1)
        return _narrow(flat, self.width) if self.width <= 32 else flat << np.uint64(64 - self.width)

    def words(self, s: Share) -> int:
        """How many 64-bit words that is, for one component."""
        if isinstance(s, Bits):
            return s.size
        return self.width * words(s.size) if _sliced(self.width, s.size) else _plain_words(self.width, s.size)

    def value(self, s: Share, sent: Ring, lacked: Ring) -> Ring:
        """The public value, given the components as they were sent, and the one this party lacks (words),
        whose memory it takes.
        """
        if isinstance(s, Bits):
            lacked ^= sent[0]
            lacked ^= sent[1]
            return lacked.reshape(s.shape)
        if self.width < 64 and _sliced(self.width, s.size):
            third = kernels.bit_unslice(lacked.reshape(self.width, -1), s.size).reshape(s.shape)
            third += s.v[0]
            third += s.v[1]
            third &= np.uint64((1 << self.width) - 1)
            return third
        if self.width <= 32:
            return _widen(sent, lacked, self.width, s.size).reshape(s.shape)
        lacked += sent[0]
        lacked += sent[1]
        if self.width < 64:
            lacked >>= np.uint64(64 - self.width)
        return lacked.reshape(s.shape)


class Coins:
    """Seeds all parties have committed to; `toss` opens the next one. Two messages to commit, one a toss."""

    def __init__(self, doors: Doors, phase: str, seeds: list[bytes], commitments: list[list[bytes]]) -> None:
        self._doors = doors
        self._phase = phase
        self._seeds = seeds
        self._commitments = commitments
        self._next = 0

    async def toss(self) -> bytes:
        """32 joint random bytes. Call only when everything they challenge has been received."""
        d, at = self._doors, self._next
        if at >= len(self._seeds):
            raise LocalError("no committed coin is left")
        self._next += 1
        mine = self._seeds[at]
        step = f"{self._phase}/toss"
        got = await d.round(step, dict.fromkeys(d.peers, mine), dict.fromkeys(d.peers, SEED))
        seeds: list[bytes] = [b""] * PARTIES
        seeds[d.bk.party] = mine
        for p in d.peers:
            seed = bytes(got[p])
            if _commitment(d.session, self._phase, p, at, seed) != self._commitments[p][at]:
                raise PeerError(p, step, "opened a coin it had not committed to")
            seeds[p] = seed
        nonce = hashlib.sha256(b"".join(c[at] for c in self._commitments)).digest()
        person = d.session + self._phase.encode() + struct.pack(">I", at)
        drbg = HmacDrbg(entropy=b"".join(seeds), nonce=nonce, personalisation=person)
        try:
            return drbg.generate(SEED)
        finally:
            drbg.wipe()


def _commitment(session: bytes, phase: str, party: int, at: int, seed: bytes) -> bytes:
    # The seed is 32 uniform bytes and so hides itself; the rest binds it to its place.
    return hashlib.sha256(
        b"mimir coin" + session + struct.pack(">BI", party, at) + seed + phase.encode()
    ).digest()


class Doors:
    """All communication of one lane of one session, in lockstep rounds."""

    def __init__(self, channel: Channel, bk: Replicated) -> None:
        self.channel = channel
        self.bk = bk
        self.session = bytes(channel.session)
        self.peers = (bk.following, bk.previous)

    async def round(
        self, step: str, send: Mapping[int, bytes | Sequence[memoryview | bytes]], expect: dict[int, int]
    ) -> dict[int, bytearray]:
        return await self.channel.round(step, send, expect)

    async def open(self, step: str, *shares: Share) -> list[Ring]:
        """Public values of shares the caller has masked. One round; 8 bytes sent per element, plus a
        digest.
        """
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_bits(self, step: str, *shares: Bits) -> list[Ring]:
        """The same for words of bits."""
        return (await self.open_all(step, [Masked(shares)]))[0]

    async def open_low(self, step: str, width: int, *shares: Share) -> list[Ring]:
        """Public values modulo 2^width; `width` bits sent per element, 4 or 8 bytes if they are few. The high
        bits stay hidden.
        """
        return (await self.open_all(step, [Masked(shares, width)]))[0]

    async def open_all(self, step: str, requests: Sequence[Masked]) -> list[list[Ring]]:
        """Several openings in one round."""
        sent = [r.travels(s) for r in requests for s in r.shares]
        pairs = zip(sent, await self._open(step, sent), strict=True)
        return [[r.value(s, *next(pairs)) for s in r.shares] for r in requests]

    async def open_extension(
        self, step: str, items: Sequence[tuple[Ring, Callable[[Ring, Ring], Ring]]]
    ) -> list[Ring]:
        """Public values of masked shares over extensions, each with its addition. For `check`."""
        lacked = await self._open(step, [v for v, _ in items])
        return [add(add(v[0], v[1]), third) for (v, add), third in zip(items, lacked, strict=True)]

    async def _open(self, step: str, values: Sequence[Ring]) -> list[Ring]:
        bk = self.bk
        one = _joined(values)
        full = _pack([one[1]])  # x_{i+1}, lacked by P_{i-1}
        vouch = _digest(step, _pack([one[0]]))  # x_i, lacked by P_{i+1}
        shapes = [v.shape[1:] for v in values]
        got = await self.round(
            step,
            {bk.previous: full, bk.following: vouch},
            {bk.following: 8 * one.shape[1], bk.previous: DIGEST},
        )
        # x_{i+2} comes in full from P_{i+1} and as a digest from P_{i+2} = P_{i-1}.
        if _digest(step, [got[bk.following]]) != bytes(got[bk.previous]):
            raise PeerError(
                bk.following, step, f"an opening differs from what party {bk.previous} vouches for"
            )
        return _split(got[bk.following], shapes)

    async def reshare(self, step: str, *summands: Ring) -> list[Ring]:
        """Turn additive summands, already masked by a share of zero, into replicated components (2, ...).

        One round, 8 bytes per element. Unverified: a cheater may add an error here.
        """
        return [np.stack(pair) for pair in await self.reshare_apart(step, *summands)]

    async def reshare_apart(self, step: str, *summands: Ring) -> list[tuple[Ring, Ring]]:
        """The same, of which the two components are not copied into one array: the own one is the summand."""
        bk = self.bk
        shapes = [z.shape for z in summands]
        size = 8 * sum(z.size for z in summands)
        got = await self.round(
            step, {bk.previous: _pack(summands), bk.following: b""}, {bk.following: size, bk.previous: 0}
        )
        return list(zip(summands, _split(got[bk.following], shapes), strict=True))

    async def commit(self, phase: str, count: int) -> Coins:
        """Commit to `count` coins: commitments to both peers, then their echo, so that nobody told two
        stories.
        """
        seeds = [os.urandom(SEED) for _ in range(count)]
        me = self.bk.party
        mine = [_commitment(self.session, phase, me, i, s) for i, s in enumerate(seeds)]
        flat = b"".join(mine)
        got = await self.round(
            f"{phase}/commit", dict.fromkeys(self.peers, flat), {p: len(flat) for p in self.peers}
        )
        all_flat = {me: flat, **{p: bytes(got[p]) for p in self.peers}}
        echo = hashlib.sha256(b"".join(all_flat[p] for p in range(PARTIES))).digest()
        heard = await self.round(
            f"{phase}/echo", dict.fromkeys(self.peers, echo), dict.fromkeys(self.peers, DIGEST)
        )
        for p in self.peers:
            if bytes(heard[p]) != echo:
                raise PeerError(p, f"{phase}/echo", "parties hold different commitments")
        lists = [[all_flat[p][DIGEST * i : DIGEST * (i + 1)] for i in range(count)] for p in range(PARTIES)]
        return Coins(self, phase, seeds, lists)

    async def assert_zero(self, step: str, rings: Sequence[Ring], bits: Sequence[Ring]) -> None:
        """Every share must be zero: the component a peer cannot see must be what ours imply. One round,
        32 bytes.

        P_i holds (z_i, z_{i+1}); if z = 0 the third component is -z_i - z_{i+1}, known to both peers.
        """
        bk = self.bk
        implied = _pack([np.zeros(1, np.uint64) - z[0] - z[1] for z in rings]) + _pack(
            [z[0] ^ z[1] for z in bits]
        )
        mine = _digest(step, implied)
        got = await self.round(step, dict.fromkeys(self.peers, mine), dict.fromkeys(self.peers, DIGEST))
        everything = [*rings, *bits]
        # P_{i+1} implies component i, our slot 0; P_{i-1} implies component i+1, our slot 1.
        for peer, slot in ((bk.following, 0), (bk.previous, 1)):
            if _digest(step, _pack([z[slot] for z in everything])) != bytes(got[peer]):
                raise PeerError(peer, step, "a check of the preprocessing failed")

    async def agree(self, step: str, value: bytes) -> None:
        """All parties must hold the same public bytes. One round, 32 bytes."""
        mine = _digest(step, [value])
        got = await self.round(step, dict.fromkeys(self.peers, mine), dict.fromkeys(self.peers, DIGEST))
        for p in self.peers:
            if bytes(got[p]) != mine:
                raise PeerError(p, step, "parties disagree about a public value")

    async def reveal(self, purpose: str, zero: Share, *shares: Share) -> list[Ring]:
        """Components (2, ...) of shares, to be sealed to a client entitled to them, re-randomised by `zero`:
        unused, verified random components of 0, as many (n,) as all shares have elements.

        Every party first confirms that all its checks passed; nothing leaves before both have said so.
        One round.
        """
        if purpose not in REVEAL_PURPOSES:
            raise LocalError(f"no reveal is allowed for the purpose {purpose!r}")
        if zero.shape != (sum(share.size for share in shares),):
            raise LocalError("what is revealed needs as many zeros")
        await self.agree(f"reveal {purpose}", _CONFIRM)
        out, at = [], 0
        for share in shares:
            out.append(share.v + zero.v[:, at : at + share.size].reshape(share.v.shape))
            at += share.size
        return out


def _plain_words(width: int, n: int) -> int:
    return (n + 1) // 2 if width <= 32 else n


def _sliced(width: int, n: int) -> bool:
    """Whether values travel as bit planes, which only many of them fill."""
    return width < 64 and width * words(n) < _plain_words(width, n)


def _narrow(v: Ring, width: int) -> Ring:
    """Two 32-bit halves to a word, high bits dropped so that nothing above `width` travels."""
    n = v.shape[1]
    half = np.zeros((v.shape[0], n + n % 2), np.uint32)
    half[:, :n] = v & np.uint64((1 << width) - 1)
    return half.view(np.uint64)


def _widen(sent: Ring, lacked: Ring, width: int, n: int) -> Ring:
    """The n sums modulo 2^width of halves of words."""
    half = sent.view(np.uint32)
    return ((half[0] + half[1] + lacked.view(np.uint32))[:n] & np.uint32((1 << width) - 1)).astype(np.uint64)
