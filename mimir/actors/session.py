"""The session actor: from the agreed terms to the last token, and the end of everything on the first error.

It owns the session's lanes, keys and cache, and a family of actors. A session that fails aborts at every
party, wipes its material and keys, names step and suspect in the local log, and delivers nothing more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
import structlog
import trio

from mimir.actors import Actor, cause_of
from mimir.actors.decode import DecodeActor, Layers, Row, choose, decode
from mimir.actors.lane import END_SECONDS, close_lane, open_lane
from mimir.actors.sampler import Choice, Noise
from mimir.actors.triples import Batch, SharedProducer, TripleProducer, batch_bytes, bytes_of
from mimir.errors import AbortError, BadInput, PeerError
from mimir.model import sampling, transformer
from mimir.model.checkpoint import PlanSpec
from mimir.model.sampling import Sampler
from mimir.model.transformer import Cache, Entry, Rows, index_bits
from mimir.mpc import plan, prep
from mimir.mpc.domain import Ring
from mimir.mpc.doors import Doors
from mimir.mpc.nonlinear import Settings
from mimir.mpc.ops import Context
from mimir.mpc.prep import Demand, Store
from mimir.mpc.share import Share, concat
from mimir.mpc.weights import Matrix
from mimir.net import Transport
from mimir.net.messages import Message, Open

log = structlog.get_logger("mimir.session")

PROMPT_ROWS: Final = 32  # prompt rows of one step at most
DECODE_BATCH: Final = 8  # decode steps whose material is made together at most
PLANNED: Final = 512  # steps whose plans are kept for the next session, 25 kB each for GPT-2 small
CHECK_ROWS: Final = 1 << 15  # inner dimensions of matrices checked together (memory: 1.5 kB each)
VALID_BITS: Final = 64
MASKS: Final = 3  # that clients get of a row: of its token, its position, and whether it holds one


class Client(Protocol):
    """One client of the session."""

    key: str

    async def send(self, message: dict[str, Any]) -> None: ...

    async def receive(self, timeout: float | None = None) -> Message: ...


class Model(Protocol):
    """Shares of the weights."""

    def pair(self, name: str) -> tuple[Matrix, Matrix]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What the configuration says about a session."""

    prompt_buckets: tuple[int, ...]
    output_buckets: tuple[int, ...]
    max_context: int
    ahead: int  # token positions of material kept ready
    memory: int  # bytes of material, ready and in use; a step of one row is made whatever it takes
    round_seconds: float
    step_seconds: float
    client_seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model: prompt rows, or one decoded token; `choose` ends it with a token."""

    name: str
    first: int
    rows: int
    prompt: bool
    choose: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn runs; the same at every party, known from its public lengths alone."""

    number: int
    buckets: tuple[int, ...]
    max_new: int
    first: int  # slot of the first prompt row
    resume: Step | None  # the last token of the turn before still has to pass through the model
    prompt: tuple[Step, ...]
    decode: tuple[Step, ...]


def plan_turn(number: int, buckets: Sequence[int], max_new: int, used: int, chunk: int) -> Turn:
    """Steps of a turn that begins when `used` slots of the cache are taken; prompt rows go `chunk` at a
    time.
    """
    name = f"turn {number}"
    resume = Step(f"{name}/resume", used, 1, False, False) if number else None
    at = first = used + (1 if number else 0)
    end = first + sum(buckets)
    prompt = []
    while at < end:
        rows = min(chunk, end - at)
        prompt.append(Step(f"{name}/prompt {at}", at, rows, True, at + rows == end))
        at += rows
    decode = tuple(Step(f"{name}/token {i + 1}", end + i, 1, False, True) for i in range(max_new - 1))
    return Turn(number, tuple(buckets), max_new, first, resume, tuple(prompt), decode)


def sized(spec: PlanSpec, max_context: int) -> PlanSpec:
    """The plan of a model for sessions of so many positions: a rotary one needs no larger one-hots."""
    return replace(spec, context=min(spec.context, max_context)) if spec.positions == "rope" else spec


class SessionActor(Actor[Any]):
    """Runs one session at this party."""

    def __init__(
        self,
        transport: Transport,
        terms: Open,
        clients: Sequence[Client],
        spec: PlanSpec,
        model: Model,
        settings: Settings,
        limits: Limits,
        decoder: DecodeActor | None = None,
        producer: SharedProducer | None = None,
    ) -> None:
        """Tokens are decoded by `decoder`, and material is made by `producer`, with those of other sessions,
        or else by itself.
        """
        super().__init__()
        self.transport = transport
        self.terms = terms
        self.clients = list(clients)
        self.spec = sized(spec, limits.max_context)
        self.model = model
        self.settings = settings
        self.limits = limits
        self.decoder = decoder
        self.producer = producer
        self.log = log.bind(party=transport.party, session=terms.session.hex()[:8])
        self._shapes = transformer.weight_shapes(spec)
        self._shapes |= {f"{k}_b": (1, v[1]) for k, v in self._shapes.items() if k not in ("embed", "pos")}
        how = terms.sampler
        self._sampler = Sampler(how.kind, how.temperature, how.topk, spec.vocab, settings.round_trip)
        self._cache = Cache.empty(spec.layers)
        self._token: Share | None = None  # the last token chosen
        self._position: Share | None = None  # its position
        self._step = "start"
        self._lanes: list[Doors] = []
        self._planned = 0
        self._choice: Demand | None = None
        self._passes = {"rounds": 0, "sent": 0}  # of those shared with other sessions, and our part
        self._began = time.monotonic()

    # --- life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the session until its clients close it. Raises what ended it, after telling every party."""
        try:
            async with self._family():
                turn = plan_turn(0, self.terms.buckets, self.terms.max_new, 0, self._chunk)
                while True:
                    await self._turn(turn)
                    request = await self._next_request()
                    if request is None:
                        return
                    turn = plan_turn(
                        turn.number + 1,
                        request["buckets"],
                        request["max_new"],
                        self._cache.length,
                        self._chunk,
                    )
        except BaseException as error:
            cause = cause_of(error)
            with trio.move_on_after(END_SECONDS, shield=True):
                for doors in self._lanes[:1]:
                    await doors.channel.abort()
            if isinstance(cause, PeerError):
                self.log.warning("session aborted", step=cause.step, suspect=cause.party, why=cause.why)
            elif isinstance(cause, AbortError):
                self.log.warning("session aborted by a peer", step=self._step)
            elif isinstance(cause, Exception):
                self.log.warning("session ended", step=self._step, why=str(cause))
            if isinstance(error, BaseExceptionGroup) and isinstance(cause, Exception):
                raise cause from None
            raise
        finally:
            for doors in self._lanes:
                await close_lane(doors, abort=False)

    @asynccontextmanager
    async def _family(self) -> AsyncIterator[None]:
        """Lanes, keys and actors; whatever fails in an actor ends the block."""
        self._online = await self._lane("online")
        self._making = await self._lane("prep")
        await self._online.agree("terms", self.terms.digest())
        await self._sizes()
        self.layers = Layers()
        self.triples = TripleProducer(
            self._making,
            self.model,
            self._shapes,
            self._ahead,
            self._at_once,
            self._made,
            self.producer,
        )
        self._noise = Noise(self._online, self.terms.deterministic_seed)
        self._how = Choice(self._sampler, self._noise.draw)
        async with trio.open_nursery() as nursery:
            self.layers.start(nursery)
            nursery.start_soon(self.triples.run)
            for client in self.clients:
                await client.send({"t": "opened"})
            yield
            nursery.cancel_scope.cancel()

    async def _lane(self, lane: str) -> Doors:
        # the other clients may still be on their way
        first, then = self.limits.client_seconds, self.limits.round_seconds
        doors = await open_lane(self.transport, self.terms.session, lane, first=first, then=then)
        self._lanes.append(doors)
        return doors

    async def _next_request(self) -> Message | None:
        """The clients' next turn, which they must all ask for alike; None if they close."""
        wanted: Message | None = None
        for client in self.clients:
            message = await client.receive(self.limits.client_seconds)
            if message["t"] == "close":
                return None
            if message["t"] != "turn":
                raise BadInput(
                    f"message {message['t']!r} where a turn or the end of the session was expected"
                )
            if wanted is not None and message != wanted:
                raise BadInput("the clients of this session asked for different turns")
            wanted = message
        assert wanted is not None
        buckets, max_new = tuple(wanted["buckets"]), wanted["max_new"]
        if len(buckets) != len(self.clients):
            raise BadInput(f"{len(self.clients)} clients, but prompt buckets for {len(buckets)}")
        for bucket in buckets:
            if bucket not in self.limits.prompt_buckets:
                raise BadInput(f"prompt bucket {bucket} is not among {list(self.limits.prompt_buckets)}")
        if max_new not in self.limits.output_buckets:
            raise BadInput(f"output bucket {max_new} is not among {list(self.limits.output_buckets)}")
        if self._cache.length + 1 + sum(buckets) + max_new > min(self.limits.max_context, self.spec.context):
            raise BadInput("this turn would not fit into scheduler.max_context; begin a new session")
        return wanted

    # --- material -------------------------------------------------------------------------------------------

    async def _choose_plan(self, ctx: Context, step: str, logits: Share) -> None:
        index = await sampling.choose(ctx, step, logits, self._sampler, sampling.no_noise)
        ctx.take(prep.Zero(), index.size)  # to reveal it

    def _demand(self, step: Step) -> Demand:
        """What a step takes: planned, so that it cannot differ from what the layers ask for."""
        with _planning:  # by one for all who come this far at once
            demand = dict(_planned(self.spec, self.settings, replace(step, name="")))
        if step.choose:
            if self._choice is None:
                self._choice = plan.run(transformer.cost_of_choice(self.spec, self._choose_plan)).demand
            prep.add_demand(demand, self._choice)
        return demand

    async def _sizes(self) -> None:
        """How much to make at once and to keep ready, by what a position takes at the end of the context.

        Half of the memory is for a step in use, which matters for prompts only: the more rows go together,
        the fewer rounds.
        """
        slots = min(self.limits.max_context, self.spec.context)
        half = self.limits.memory // 2

        async def sizes(step: Step) -> tuple[int, int]:
            demand = await trio.to_thread.run_sync(self._demand, step)
            weights = bytes_of(_weights_of(demand), self._shapes)
            return max(1, weights), max(1, bytes_of(demand, self._shapes) - weights)

        weights, rest = await sizes(Step("plan", slots - 1, 1, False, True))
        _, row = await sizes(Step("plan", min(slots, max(self.limits.prompt_buckets)) - 1, 1, True, False))
        self._chunk = max(1, min(PROMPT_ROWS, half // row))
        # Two take an eighth less of the processors than one by one.
        self._at_once = batch_bytes(self.limits.memory)
        pair = 2 if rest <= min(self._at_once, half // 2) else 1
        self._group = max(pair, min(DECODE_BATCH, self._at_once // rest))
        self._block = max(self._chunk, self._at_once // weights)
        self._ahead = max(1, min(self.limits.ahead, half // rest))

    async def _prepare(self, turn: Turn) -> int:
        """Queue all material of a turn. Returns its token positions.

        Products with weights are made for many rows at once, because checking them costs a pass over all
        weights however few the rows.
        """

        planned: dict[str, Demand] = {}  # until the step's last batch

        def demand(step: Step) -> Demand:
            if step.name not in planned:
                planned[step.name] = self._demand(step)
            return planned[step.name]

        def batch(*steps: Step) -> Batch:
            def plan() -> list[Demand]:
                demands = [demand(step) for step in steps]
                for step in steps:
                    del planned[step.name]
                return [{k: n for k, n in d.items() if not isinstance(k, prep.Weight)} for d in demands]

            names = tuple(step.name for step in steps)
            return Batch(names[0], names, plan, sum(step.rows for step in steps))

        def weights(steps: Sequence[Step]) -> Iterator[Batch]:
            names = tuple(step.name for step in steps)
            for number, group in enumerate(_weight_groups(self._shapes)):

                def plan(group: frozenset[str] = group) -> list[Demand]:
                    return [_weights_of(demand(step), group) for step in steps]

                yield Batch(f"{names[0]}/weights {number}", names, plan, 0, last=False)

        name, rows = f"turn {turn.number}/entry", sum(turn.buckets)
        entry = transformer.entry_demand(self.spec, rows) | {prep.Zero(): MASKS * rows}
        batches = [Batch(name, (name,), lambda: [entry], 0)]
        whole = [*([turn.resume] if turn.resume else []), *turn.prompt, *turn.decode]
        pieces = [[step] for step in whole[: len(whole) - len(turn.decode)]]
        pieces += _evenly(turn.decode, self._group)
        while pieces:
            block = [pieces.pop(0)]
            while pieces and sum(step.rows for piece in (*block, pieces[0]) for step in piece) <= self._block:
                block.append(pieces.pop(0))
            batches += weights([step for piece in block for step in piece])
            batches += [batch(*piece) for piece in block]
        await self.triples.prepare(batches)
        return sum(b.positions for b in batches)

    async def _made(self, positions: int) -> None:
        await self._progress("preprocessing", positions, max(positions, self._planned))

    # --- one turn -------------------------------------------------------------------------------------------

    async def _turn(self, turn: Turn) -> None:
        before = self._figures()
        self._planned += await self._prepare(turn)
        if turn.resume:
            ctx = await self._context(turn.resume)
            await self._resume(ctx, turn.resume)
        entry, offsets = await self._input(turn)
        prefill_began, first = time.monotonic(), None
        for number, step in enumerate(turn.prompt):
            ctx = await self._context(step)
            at = step.first - turn.first
            part = slice(at, at + step.rows)
            new = await transformer.embed(
                ctx,
                f"{step.name}/embed",
                self.spec,
                entry.part(part),
                offsets["token"][part],
                offsets["position"][part],
                self.layers.parts,
            )
            first = await self._prompt(ctx, step, new)
            await self._progress("prefill", number + 1, len(turn.prompt))
        assert first is not None
        await self._deliver(0, first)
        decode_began = time.monotonic()
        with self.decoder.coming() if self.decoder else nullcontext():
            for number, step in enumerate(turn.decode):
                await self._deliver(number + 1, await self._decode(step))
                await self._progress("decode", number + 2, turn.max_new)
        after = self._figures()
        stats = {name: after[name] - before[name] for name in after}
        stats |= {
            "prefill_seconds": decode_began - prefill_began,
            "decode_seconds": time.monotonic() - decode_began,
            "tokens": turn.max_new,
        }
        self.log.info("turn done", turn=turn.number, **{k: round(v, 3) for k, v in stats.items()})
        await self._tell({"t": "done", "stats": stats})

    async def _context(self, step: Step) -> Context:
        return Context(self._online.bk, self._online, await self._material(step), self.model)

    async def _material(self, step: Step) -> Store:
        self._step = step.name
        with trio.move_on_after(self.limits.step_seconds) as scope:
            store = await self.triples.need(step.name)
        if scope.cancelled_caught:
            raise BadInput(
                f"no material for {step.name} within deadlines.step = {self.limits.step_seconds:g} s"
            )
        return store

    async def _resume(self, ctx: Context, step: Step) -> None:
        """The last token of the turn before, through the blocks."""
        assert self._token is not None and self._position is not None
        self._position = self._position + 1
        self._cache.admit(ctx.bk)
        new = await transformer.reenter(
            ctx, f"{step.name}/enter", self.spec, self._token, self._position, self.layers.parts
        )
        await self._blocks(ctx, step, new)

    async def _prompt(self, ctx: Context, step: Step, rows: Rows) -> Ring | None:
        """Prompt rows through the blocks; components of the answer's first token if the step chooses it."""
        whole = self._cache.valid
        assert whole is not None
        self._cache.valid = whole[: step.first + step.rows]
        hidden = await self._blocks(ctx, step, rows)
        self._cache.valid = whole
        if not step.choose:
            return None
        self._token, components = await choose(
            ctx, step.name, self._online, self.spec, hidden[-1:], self.settings, self.layers, [self._how]
        )
        return components

    async def _blocks(self, ctx: Context, step: Step, rows: Rows) -> Share:
        return await transformer.forward(
            ctx, step.name, self.spec, rows, [self._cache], self.settings, self.layers.parts
        )

    async def _decode(self, step: Step) -> Ring:
        """The next token; its components for the clients."""
        assert self._token is not None and self._position is not None
        store = await self._material(step)
        self._position = self._position + 1
        row = Row(
            self.terms.session,
            step.name,
            self._token,
            self._position,
            self._cache,
            store,
            self._sampler,
            self._noise,
        )
        if self.decoder is not None:
            with trio.move_on_after(self.limits.step_seconds) as scope:
                served = await self.decoder.ask(row, self._online.channel, step.name)
            if scope.cancelled_caught:
                raise BadInput(
                    f"{step.name} was not decoded within deadlines.step = {self.limits.step_seconds:g} s"
                )
            self._token = served.result.index
            self._passes["rounds"] += served.rounds
            self._passes["sent"] += served.sent
            return served.result.components
        ctx = Context(self._online.bk, self._online, store, self.model)
        self._token, components = await decode(
            ctx, step.name, self._online, self.spec, [row], self.settings, self.layers, [self._how]
        )
        return components

    async def _input(self, turn: Turn) -> tuple[Entry, dict[str, Ring]]:
        """Give every client the masks of its part, take its offsets, agree on them. Sets validity and
        position.
        """
        self._step = f"turn {turn.number}/input"
        rows = sum(turn.buckets)
        store = await self.triples.need(f"turn {turn.number}/entry")
        ctx = Context(self._online.bk, self._online, store, self.model)
        entry = transformer.entry(ctx, self.spec, rows)
        valid = Share(self._online.bk.random(rows), self._online.bk)
        masks = {"token": entry.token["r"], "position": entry.position["r"], "valid": valid}
        bits = {
            "token": index_bits(self.spec.vocab),
            "position": index_bits(self.spec.context),
            "valid": VALID_BITS,
        }
        zero = ctx.take(prep.Zero(), MASKS * rows)["zero"]
        components = await self._online.reveal("input mask", zero, *masks.values())
        revealed = dict(zip(masks, components, strict=True))
        at = 0
        for client, bucket in zip(self.clients, turn.buckets, strict=True):
            part = {name: v[:, at : at + bucket].astype("<u8").tobytes() for name, v in revealed.items()}
            await client.send({"t": "masks", "turn": turn.number, "bits": bits, "names": part})
            at += bucket
        parts: dict[str, list[Ring]] = {name: [] for name in masks}
        for client, bucket in zip(self.clients, turn.buckets, strict=True):
            message = await client.receive(self.limits.client_seconds)
            if (
                message["t"] != "offsets"
                or message["turn"] != turn.number
                or message["names"].keys() != masks.keys()
            ):
                raise BadInput("the client sent something else than the offsets of its prompt")
            for name, raw in message["names"].items():
                if len(raw) != 8 * bucket:
                    raise BadInput(
                        f"the client sent {len(raw)} bytes of {name} offsets instead of {8 * bucket}"
                    )
                parts[name].append(np.frombuffer(raw, "<u8").astype(np.uint64))
        offsets = {name: np.concatenate(p) for name, p in parts.items()}
        await self._online.agree(
            f"turn {turn.number}/offsets", b"".join(offsets[name].tobytes() for name in sorted(offsets))
        )
        flags = -valid + offsets.pop("valid")
        self._cache.valid = flags if self._cache.valid is None else concat([self._cache.valid, flags])
        self._position = (-entry.position["r"] + offsets["position"])[rows - 1 :]
        return entry, offsets

    # --- what leaves ----------------------------------------------------------------------------------------

    async def _deliver(self, step: int, components: Ring) -> None:
        """The token just chosen, to every client of the session and to nobody else."""
        message = {"t": "token", "step": step, "components": [int(components[0, 0]), int(components[1, 0])]}
        await self._tell(message)

    async def _progress(self, phase: str, done: int, total: int) -> None:
        figures = self._figures()
        await self._tell(
            {
                "t": "progress",
                "phase": phase,
                "done": done,
                "total": total,
                "rounds": int(figures["rounds_online"] + figures["rounds_preprocessing"]),
                "sent": int(figures["sent_online"] + figures["sent_preprocessing"]),
                "seconds": time.monotonic() - self._began,
            }
        )

    async def _tell(self, message: dict[str, Any]) -> None:
        for client in self.clients:
            await client.send(message)

    def _figures(self) -> dict[str, float]:
        online, making = self._online.channel, self._making.channel
        return {
            "rounds_online": online.rounds + self._passes["rounds"],
            "sent_online": online.sent + self._passes["sent"],
            "rounds_preprocessing": making.rounds + self.triples.spent["rounds"],
            "sent_preprocessing": making.sent + self.triples.spent["sent"],
            "seconds": time.monotonic() - self._began,
        }


_planning = threading.Lock()


@lru_cache(maxsize=PLANNED)
def _planned(spec: PlanSpec, settings: Settings, alike: Step) -> Demand:
    """What a step takes but for the choice of its token, planned once for all sessions that come this far."""
    first, rows = alike.first, alike.rows
    cost = transformer.cost_of(spec, settings, first, rows, prompt=alike.prompt, last=alike.choose)
    return plan.run(cost).demand


def _weights_of(demand: Demand, names: frozenset[str] | None = None) -> Demand:
    """The part of a demand that is products with weights, all or some of them."""
    return {
        k: n for k, n in demand.items() if isinstance(k, prep.Weight) and (names is None or k.name in names)
    }


def _evenly(steps: Sequence[Step], most: int) -> list[list[Step]]:
    """In as few groups of at most so many as there can be, of sizes that differ by one: what a group costs
    whatever is in it is not paid for a rest.
    """
    count = -(-len(steps) // most)
    cuts = [len(steps) * i // count for i in range(count + 1)] if count else []
    return [list(steps[a:b]) for a, b in pairwise(cuts)]


def _weight_groups(shapes: Mapping[str, tuple[int, int]]) -> list[frozenset[str]]:
    """Weight matrices whose products are checked together: CHECK_ROWS of inner dimension, or one matrix."""
    groups: list[frozenset[str]] = []
    group: set[str] = set()
    size = 0
    for name, (inner, _) in shapes.items():
        if inner == 1:  # a bias, which no product takes
            continue
        if group and size + inner > CHECK_ROWS:
            groups.append(frozenset(group))
            group, size = set(), 0
        group.add(name)
        size += inner
    return [*groups, frozenset(group)]
