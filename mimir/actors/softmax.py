"""The softmax actor: shifted exponentials of attention scores and their sums."""

from __future__ import annotations

from dataclasses import dataclass

from mimir.actors import Actor, Reply
from mimir.mpc import nonlinear
from mimir.mpc.domain import Ring
from mimir.mpc.nonlinear import Settings
from mimir.mpc.ops import Context
from mimir.mpc.share import Share


@dataclass(frozen=True, slots=True, eq=False)
class Exponentiate:
    ctx: Context
    step: str
    scores: Share
    allowed: Ring
    valid: Share | None
    settings: Settings
    reply: Reply[tuple[Share, Share]]


class SoftmaxActor(Actor[Exponentiate]):
    async def handle(self, message: Exponentiate) -> None:
        m = message
        m.reply.set(await nonlinear.exponentials(m.ctx, m.step, m.scores, m.allowed, m.valid, m.settings))

    async def exponentials(
        self, ctx: Context, step: str, scores: Share, allowed: Ring, valid: Share | None, s: Settings
    ) -> tuple[Share, Share]:
        """nonlinear.exponentials, by message."""
        reply: Reply[tuple[Share, Share]] = Reply()
        await self.tell(Exponentiate(ctx, step, scores, allowed, valid, s, reply))
        return await reply.get()
