"""The softmax actor: shifted exponentials of attention scores and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mimir.actors import Actor, Reply
from mimir.mpc import nonlinear
from mimir.mpc.nonlinear import Scores
from mimir.mpc.ops import Context
from mimir.mpc.share import Share


@dataclass(frozen=True, slots=True, eq=False)
class Exponentiate:
    ctx: Context
    step: str
    blocks: Sequence[Scores]
    reply: Reply[list[tuple[Share, Share]]]


class SoftmaxActor(Actor[Exponentiate]):
    async def handle(self, message: Exponentiate) -> None:
        m = message
        m.reply.set(await nonlinear.exponentials(m.ctx, m.step, m.blocks))

    async def exponentials(
        self, ctx: Context, step: str, blocks: Sequence[Scores]
    ) -> list[tuple[Share, Share]]:
        """nonlinear.exponentials, by message."""
        reply: Reply[list[tuple[Share, Share]]] = Reply()
        await self.tell(Exponentiate(ctx, step, blocks, reply))
        return await reply.get()
