"""The sampler actor: from secret logits to a secret token index."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from mimir.actors import Actor, Reply
from mimir.model import sampling
from mimir.model.sampling import Sampler
from mimir.mpc.doors import Coins, Doors
from mimir.mpc.ops import Context
from mimir.mpc.share import Share

COINS_AT_ONCE: Final = 64  # committed together, so that a token costs one round of coins


@dataclass(frozen=True, slots=True)
class Choose:
    ctx: Context
    step: str
    logits: Share
    reply: Reply[Share]


class SamplerActor(Actor[Choose]):
    def __init__(self, doors: Doors, sampler: Sampler, one_seed: bool) -> None:
        """`one_seed`: one coin for the whole session, from which every token's noise is derived."""
        super().__init__()
        self._doors = doors
        self._sampler = sampler
        self._one_seed = one_seed
        self._seed: bytes | None = None
        self._drawn = 0
        self._coins: Coins | None = None

    async def handle(self, message: Choose) -> None:
        m = message
        m.reply.set(await sampling.choose(m.ctx, m.step, m.logits, self._sampler, self._noise))

    async def choose(self, ctx: Context, step: str, logits: Share) -> Share:
        """sampling.choose, by message."""
        reply: Reply[Share] = Reply()
        await self.tell(Choose(ctx, step, logits, reply))
        return await reply.get()

    async def _noise(self) -> bytes:
        """32 joint bytes for one token, tossed when its logits are fixed."""
        at, self._drawn = self._drawn, self._drawn + 1
        if self._one_seed:
            if self._seed is None:
                self._seed = await (await self._doors.commit("sampler/seed", 1)).toss()
            return hashlib.sha256(b"mimir token" + self._seed + struct.pack(">Q", at)).digest()
        if at % COINS_AT_ONCE == 0:
            self._coins = await self._doors.commit(f"sampler/coins {at}", COINS_AT_ONCE)
        assert self._coins is not None
        return await self._coins.toss()
