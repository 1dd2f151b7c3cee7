"""The matmul actor: products with the shared weights, one opening each."""

from __future__ import annotations

from dataclasses import dataclass

from mimir.actors import Actor, Reply
from mimir.mpc import ops
from mimir.mpc.ops import Context
from mimir.mpc.share import Share


@dataclass(frozen=True, slots=True)
class Multiply:
    ctx: Context
    step: str
    x: Share
    weight: str
    reply: Reply[Share]


class MatmulActor(Actor[Multiply]):
    async def handle(self, message: Multiply) -> None:
        message.reply.set(await ops.matmul(message.ctx, message.step, message.x, message.weight))

    async def matmul(self, ctx: Context, step: str, x: Share, weight: str) -> Share:
        """ops.matmul, by message."""
        reply: Reply[Share] = Reply()
        await self.tell(Multiply(ctx, step, x, weight, reply))
        return await reply.get()
