"""The decode actor: the next tokens of all sessions of a model that are ready, by one pass through the model.

A pass reads every weight once for all its rows, and its rows share rounds, frames and calls. What it opens
under masks is what the sessions would open one by one, and each row has its own cache, material and sampler.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import trio
from prometheus_client import Histogram

from mimir.actors.matmul import MatmulActor
from mimir.actors.sampler import Choice, Noise, SamplerActor
from mimir.actors.shared import Lane, SharedActor, Waiting
from mimir.actors.softmax import SoftmaxActor
from mimir.model import transformer
from mimir.model.checkpoint import PlanSpec
from mimir.model.sampling import Sampler
from mimir.model.transformer import Cache, Parts
from mimir.mpc import prep
from mimir.mpc.domain import U64, Ring
from mimir.mpc.doors import Doors
from mimir.mpc.nonlinear import Settings
from mimir.mpc.ops import Context
from mimir.mpc.prep import Joint, Store, Weights
from mimir.mpc.share import Share, concat
from mimir.net import Transport
from mimir.net.messages import TOKEN_BITS

log = structlog.get_logger("mimir.decode")

ROWS = Histogram("mimir_pass_rows", "Sessions whose token one pass decoded", buckets=(1, 2, 4, 8, 16, 32))


@dataclass(slots=True, eq=False)
class Row:
    """What a session brings to a pass: its last token, still to be read, with its position (1,) each; its
    cache and material; how its next token is chosen, and by which noise.
    """

    session: bytes
    step: str  # within the session
    token: Share
    position: Share
    cache: Cache
    store: Store
    sampler: Sampler
    noise: Noise


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """What a pass gives a session: its next token as a share, and its components for the clients."""

    index: Share  # (1,)
    components: Ring  # (2, 1)


class Layers:
    """The actors that run the layers of one lane."""

    def __init__(self) -> None:
        self.matmul, self.softmax, self.sampler = MatmulActor(), SoftmaxActor(), SamplerActor()
        self.parts = Parts(self.matmul.matmul, self.softmax.exponentials)

    def start(self, nursery: trio.Nursery) -> None:
        for actor in (self.matmul, self.softmax, self.sampler):
            nursery.start_soon(actor.run)


async def decode(
    ctx: Context,
    step: str,
    doors: Doors,
    spec: PlanSpec,
    rows: Sequence[Row],
    settings: Settings,
    layers: Layers,
    choices: Sequence[Choice],
) -> tuple[Share, Ring]:
    """One pass: the next token of each row (n,) modulo 2^INDEX_BITS, and its components (2, n) modulo
    2^TOKEN_BITS for the session's clients.
    """
    for row in rows:
        row.cache.admit(ctx.bk)
    tokens, positions = concat([r.token for r in rows]), concat([r.position for r in rows])
    entered = await transformer.reenter(ctx, f"{step}/enter", spec, tokens, positions, layers.parts)
    caches = [row.cache for row in rows]
    hidden = await transformer.forward(ctx, step, spec, entered, caches, settings, layers.parts)
    return await choose(ctx, step, doors, spec, hidden, settings, layers, choices)


async def choose(
    ctx: Context,
    step: str,
    doors: Doors,
    spec: PlanSpec,
    hidden: Share,
    settings: Settings,
    layers: Layers,
    choices: Sequence[Choice],
) -> tuple[Share, Ring]:
    """The token that follows each row of hidden (n, d), as `decode` gives it."""
    logits = await transformer.logits(ctx, step, spec, hidden, settings, layers.parts)
    chosen = await layers.sampler.choose(ctx, step, logits, choices)
    (components,) = await doors.reveal("token", ctx.take(prep.Zero(), chosen.size)["zero"], chosen)
    return chosen, components % U64(1 << TOKEN_BITS)  # what is above means nothing


class DecodeActor(SharedActor[Row, Token]):
    """Serves all sessions of one model at this party."""

    WORK = "pass"
    LANE = "online"

    def __init__(
        self,
        transport: Transport,
        model: str,
        spec: PlanSpec,
        weights: Weights,
        settings: Settings,
        *,
        most: int,
        round_seconds: float,
    ) -> None:
        """`most` rows go through the model together. `spec` is that of the sessions."""
        super().__init__(transport, model, round_seconds)
        self._spec = spec
        self._weights = weights
        self._settings = settings
        self._most = most

    def _begin(self, lane: Lane, nursery: trio.Nursery) -> None:
        self._layers, self._noise = Layers(), Noise(lane.doors)
        self._layers.start(nursery)

    def _chosen(self, common: Sequence[Waiting[Row, Token]]) -> list[Waiting[Row, Token]]:
        return list(common[: self._most])

    async def _serve(self, doors: Doors, step: str, members: Sequence[Waiting[Row, Token]]) -> list[Token]:
        began = time.monotonic()
        rows, coin = [waiting.work for waiting in members], _Coin(self._noise)
        ctx = Context(doors.bk, doors, Joint([row.store for row in rows]), self._weights)
        choices = [coin.choice(row) for row in rows]
        tokens, components = await decode(
            ctx, step, doors, self._spec, rows, self._settings, self._layers, choices
        )
        ROWS.observe(len(rows))
        log.debug("decoded", rows=len(rows), seconds=round(time.monotonic() - began, 3))
        parts = [slice(i, i + 1) for i in range(len(rows))]
        return [Token(tokens[part], components[:, part]) for part in parts]


class _Coin:
    """One coin of a lane for all rows of a pass, tossed when the first of them wants noise: the own lane of
    its session may have ended at another party.
    """

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._coin: bytes | None = None

    def choice(self, row: Row) -> Choice:
        async def draw() -> bytes:
            if self._coin is None:
                self._coin = await self._noise.draw()
            return hashlib.sha256(b"mimir row" + self._coin + row.session).digest()

        return Choice(row.sampler, row.noise.draw if row.noise.derived else draw)
