"""The matmul actor: products with the shared weights, one opening each."""

from __future__ import annotations

from dataclasses import dataclass

from mimir.actors import Actor, Reply
from mimir.mpc import ops
from mimir.mpc.ops import Beside, Context
from mimir.mpc.share import Share


@dataclass(frozen=True, slots=True)
class Multiply:
    ctx: Context
    step: str
    factors: tuple[tuple[Share, str], ...]
    low: int | None
    beside: Beside | None
    reply: Reply[Share]


class MatmulActor(Actor[Multiply]):
    async def handle(self, message: Multiply) -> None:
        m = message
        m.reply.set(await ops.matmul(m.ctx, m.step, *m.factors, low=m.low, beside=m.beside))

    async def matmul(
        self,
        ctx: Context,
        step: str,
        *factors: tuple[Share, str],
        low: int | None = None,
        beside: Beside | None = None,
    ) -> Share:
        """ops.matmul, by message."""
        reply: Reply[Share] = Reply()
        await self.tell(Multiply(ctx, step, factors, low, beside, reply))
        return await reply.get()
