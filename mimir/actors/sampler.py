"""The sampler actor: from secret logits to secret token indices."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mimir.actors import Actor, Reply
from mimir.model import sampling
from mimir.model.sampling import Sampler
from mimir.mpc import ops
from mimir.mpc.doors import Coins, Doors
from mimir.mpc.ops import Context
from mimir.mpc.share import Share, concat

COINS_AT_ONCE: Final = 64  # committed together, so that a token costs one round of coins


class Noise:
    """32 joint bytes for one token after another, tossed when its logits are fixed."""

    def __init__(self, doors: Doors, one_seed: bool = False) -> None:
        """`one_seed`: one coin for the whole lane, from which every token's bytes are derived."""
        self._doors = doors
        self._one_seed = one_seed
        self._seed: bytes | None = None
        self._drawn = 0
        self._coins: Coins | None = None

    @property
    def derived(self) -> bool:
        """Whether the next bytes take no round, as they come from a coin that has been tossed."""
        return self._seed is not None

    async def draw(self) -> bytes:
        at, self._drawn = self._drawn, self._drawn + 1
        if self._one_seed:
            if self._seed is None:
                self._seed = await (await self._doors.commit("sampler/seed", 1)).toss()
            return hashlib.sha256(b"mimir token" + self._seed + struct.pack(">Q", at)).digest()
        if at % COINS_AT_ONCE == 0:
            self._coins = await self._doors.commit(f"sampler/coins {at}", COINS_AT_ONCE)
        assert self._coins is not None
        return await self._coins.toss()


@dataclass(frozen=True, slots=True)
class Choice:
    """How the token of one row is chosen."""

    sampler: Sampler
    noise: sampling.Noise


@dataclass(frozen=True, slots=True)
class Choose:
    ctx: Context
    step: str
    logits: Share
    choices: Sequence[Choice]
    reply: Reply[Share]


class SamplerActor(Actor[Choose]):
    async def handle(self, message: Choose) -> None:
        m = message

        def row(i: int, choice: Choice) -> Callable[[Context], Coroutine[Any, Any, Share]]:
            return lambda ctx: sampling.choose(ctx, m.step, m.logits[i], choice.sampler, choice.noise)

        chosen = await ops.together(m.ctx, *(row(i, choice) for i, choice in enumerate(m.choices)))
        m.reply.set(concat(chosen))

    async def choose(self, ctx: Context, step: str, logits: Share, choices: Sequence[Choice]) -> Share:
        """Token indices (n,), one for each row of logits (n, vocab), by message; rows share the rounds."""
        reply: Reply[Share] = Reply()
        await self.tell(Choose(ctx, step, logits, choices, reply))
        return await reply.get()
