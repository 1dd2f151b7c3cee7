"""Whole sessions in one process: three session actors over memory, a tiny model, a client. For tests only.

Everything that runs is what a party and a client run, except the socket between them. Clocks are virtual, so
a party that waits for its deadline costs nothing, and nothing runs in threads, so a session may be forked in
the middle of a round: that is how `explore` tries thousands of ways to cheat in the time of a few sessions.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import trio
from parties import DictWeights, share_weights
from reference import FloatModel
from trio.testing import MockClock

from mimir.actors.decode import DecodeActor
from mimir.actors.session import Limits, SessionActor
from mimir.actors.shared import OPEN_LANE
from mimir.actors.triples import SharedProducer
from mimir.client.connection import PartyError
from mimir.client.session import Session
from mimir.errors import AbortError, MimirError
from mimir.model.checkpoint import Plan, PlanSpec
from mimir.mpc.doors import Doors
from mimir.mpc.nonlinear import Settings
from mimir.net import messages, wire
from mimir.net.control import ClientGone
from mimir.net.memory import MemoryNet, Tap
from mimir.net.messages import Message, Open, Sampler

PARTIES = 3
MEMORY = 512 << 20  # of material
ROUND_SECONDS = 5.0  # virtual
CLIENT_SECONDS = 20.0
CLIENT_KEY = "c1" * 32
MODEL = "0d" * 32

LLAMA = PlanSpec(
    family="llama",
    layers=1,
    width=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    hidden=8,
    vocab=16,
    context=16,
    act="silu_glu",
    norm_eps=1e-5,
    positions="rope",
    rope_theta=10000.0,
    bos_id=1,
    eos_ids=(2,),
)
GPT2 = PlanSpec(
    family="gpt2",
    layers=1,
    width=8,
    heads=2,
    kv_heads=2,
    head_dim=4,
    hidden=8,
    vocab=16,
    context=16,
    act="relu",
    norm_eps=1e-5,
    positions="learned",
    rope_theta=None,
    bos_id=1,
    eos_ids=(2,),
)
SETTINGS = Settings()
GREEDY = Sampler()
CLEAR = 0.3  # by which the best logit must lead


def tiny_plan(spec: PlanSpec, seed: int = 3) -> Plan:
    """Random weights: large, so that no two logits come near each other."""

    def draw(number: int, shape: tuple[int, ...]) -> Any:
        rng = np.random.default_rng([seed, number])
        return rng.normal(0, 1 if len(shape) > 1 else 0.3, shape)

    recipes = {
        name: functools.partial(draw, number, shape)
        for number, (name, shape) in enumerate(spec.shapes().items())
    }
    public = {f.name: getattr(spec, f.name) for f in fields(PlanSpec)}
    return Plan(**public, directory=Path("tiny"), _recipes=recipes)


@functools.cache
def tiny_weights(spec: PlanSpec) -> list[DictWeights]:
    """Three parties' shares of that model."""
    plan = tiny_plan(spec)
    return share_weights({name: plan.encoded(name, SETTINGS.scale_bits) for name in plan.names()})


@dataclass(frozen=True)
class Story:
    """What is run: a model, and per turn a prompt and how many tokens are asked for."""

    spec: PlanSpec
    prompts: tuple[tuple[int, ...], ...] = ((3, 7),)
    bucket: int = 2
    max_new: int = 2
    sampler: Sampler = GREEDY
    one_seed: bool = False
    settings: Settings = SETTINGS

    def terms(self) -> Open:
        """Of a new session."""
        return Open(
            os.urandom(16), MODEL, (CLIENT_KEY,), (self.bucket,), self.max_new, self.sampler, self.one_seed
        )

    @functools.cached_property
    def expected(self) -> list[int]:
        """The tokens of all turns, by the float reference; refuses a story whose tokens are nearly tied."""
        model = FloatModel(tiny_plan(self.spec))
        tokens: list[int] = []
        ids: list[int] = []
        for prompt in self.prompts:
            ids += prompt
            for _ in range(self.max_new):
                model.reset()
                logits = model.forward(ids)[-1]
                second, best = np.argsort(logits)[-2:]
                assert logits[best] - logits[second] > CLEAR, "choose another prompt"
                ids.append(int(best))
                tokens.append(ids[-1])
        return tokens


@dataclass
class Outcome:
    """How a session ended."""

    tokens: list[int] = field(default_factory=list)  # what the client accepted
    client: BaseException | None = None
    parties: list[BaseException | None] = field(default_factory=lambda: [None] * PARTIES)

    def plain(self) -> dict[str, Any]:
        """The same as JSON can carry it."""

        def name(error: BaseException | None) -> dict[str, Any] | None:
            if error is None:
                return None
            out: dict[str, Any] = {"type": type(error).__name__, "text": str(error)}
            out |= {
                k: getattr(error, k)
                for k in ("party", "step", "why")
                if isinstance(getattr(error, k, None), int | str)
            }
            return out

        return {
            "tokens": self.tokens,
            "client": name(self.client),
            "parties": [name(e) for e in self.parties],
        }


@dataclass(frozen=True)
class Taps:
    """May change what a party says to its client, or what it hears: (party, message) to messages, or None."""

    to_client: Callable[[int, Message], Sequence[Message] | None] = lambda party, message: None
    from_client: Callable[[int, Message], Sequence[Message] | None] = lambda party, message: None


class Seat:
    """The client's place at one party, and that party at the client's: both ends of a sealed connection."""

    def __init__(self, party: int, taps: Taps) -> None:
        self.key = CLIENT_KEY
        self.party = SimpleNamespace(name=f"p{party}", address=f"memory:{party}")
        self._number = party
        self._taps = taps
        self._to_client, self._from_party = trio.open_memory_channel[bytes](64)
        self._to_party, self._from_client = trio.open_memory_channel[bytes](64)

    @property
    def client_end(self) -> Any:
        """What the client holds (mimir.client.connection.Connection)."""
        return SimpleNamespace(party=self.party, send=self._client_send, receive=self._client_receive)

    async def send(self, message: Mapping[str, Any]) -> None:
        """Of the party (mimir.net.control.ClientHandle)."""
        changed = self._taps.to_client(self._number, dict(message))
        for each in [dict(message)] if changed is None else changed:
            try:
                await self._to_client.send(messages.pack(each, messages.FROM_PARTY))
            except trio.BrokenResourceError:
                raise ClientGone("the client hung up") from None

    async def receive(self, timeout: float | None = None) -> Message:
        with trio.move_on_after(CLIENT_SECONDS if timeout is None else timeout):
            try:
                return messages.unpack(await self._from_client.receive(), messages.FROM_CLIENT)
            except trio.EndOfChannel:
                raise ClientGone("the client hung up") from None
        raise ClientGone("the client said nothing")

    async def _client_send(self, message: Mapping[str, Any]) -> None:
        changed = self._taps.from_client(self._number, dict(message))
        try:
            for each in [dict(message)] if changed is None else changed:
                await self._to_party.send(messages.pack(each, messages.FROM_CLIENT))
        except trio.BrokenResourceError:
            await self._client_receive("error")

    async def _client_receive(self, *kinds: str) -> Message:
        with trio.move_on_after(CLIENT_SECONDS * 3):
            try:
                message = messages.unpack(await self._from_party.receive(), messages.FROM_PARTY)
            except (trio.EndOfChannel, messages.MessageError) as error:
                raise PartyError(self.party, f"broke off: {error}") from None  # type: ignore[arg-type]
            if message["t"] == "error":
                raise AbortError(f"{self.party.name}: {message['message']}")
            if message["t"] not in kinds:
                raise PartyError(self.party, f"said {message['t']}")  # type: ignore[arg-type]
            return message
        raise PartyError(self.party, "silent")  # type: ignore[arg-type]

    def close_party(self) -> None:
        self._to_client.close()
        self._from_client.close()

    def close_client(self) -> None:
        self._to_party.close()
        self._from_party.close()


def limits_of(story: Story) -> Limits:
    return Limits(
        (story.bucket,), (story.max_new,), story.spec.context, 4, MEMORY, ROUND_SECONDS, 60.0, CLIENT_SECONDS
    )


async def hold(
    story: Story,
    net: MemoryNet,
    weights: Sequence[Any] | None = None,
    taps: Taps | None = None,
    actors: list[SessionActor] | None = None,
    tweak: Callable[[Sequence[SessionActor]], None] = lambda sessions: None,
    decoders: Sequence[DecodeActor | None] = (None,) * PARTIES,
    producers: Sequence[SharedProducer | None] = (None,) * PARTIES,
) -> Outcome:
    """One session over `net`, from the client's terms to its end at all four. `tweak` may bend its actors.
    Its tokens are decoded by `decoders`, and its material is made by `producers`, with those of other
    sessions, or by itself.
    """
    outcome = Outcome()
    terms = story.terms()
    weights = weights or tiny_weights(story.spec)
    seats = [Seat(i, taps or Taps()) for i in range(PARTIES)]
    sessions = [
        SessionActor(
            net.party(i),
            terms,
            [seats[i]],
            story.spec,
            weights[i],
            story.settings,
            limits_of(story),
            decoders[i],
            producers[i],
        )
        for i in range(PARTIES)
    ]
    tweak(sessions)
    if actors is not None:
        actors.extend(sessions)

    async def party(i: int) -> None:
        try:
            await sessions[i].run()
        except Exception as error:
            outcome.parties[i] = error
            text = {
                "t": "error",
                "code": "aborted",
                "message": "the session was aborted; nothing more is delivered",
            }
            with trio.move_on_after(1):
                try:
                    await seats[i].send(text)
                except MimirError:
                    pass
        finally:
            seats[i].close_party()

    async def client() -> None:
        ends: list[Any] = [seat.client_end for seat in seats]
        try:
            for end in ends:
                await end.receive("opened")
            session = Session(ends, terms, 0, story.spec.context, story.spec)
            for turn, prompt in enumerate(story.prompts):
                lengths = {"buckets": [story.bucket], "max_new": story.max_new} if turn else {}
                await session.prompt(prompt, **lengths)  # type: ignore[arg-type]
                while (token := await session.token()) is not None:
                    outcome.tokens.append(token)
            for end in ends:
                await end.send({"t": "close"})
        except Exception as error:
            outcome.client = error
        finally:
            for seat in seats:
                seat.close_client()

    async with trio.open_nursery() as nursery:
        for i in range(PARTIES):
            nursery.start_soon(party, i)
        nursery.start_soon(client)
    return outcome


class Together:
    """Three parties' shared actors of one model, as their services keep them."""

    def __init__(
        self, net: MemoryNet, spec: PlanSpec, most: int, settings: Settings, nursery: trio.Nursery
    ) -> None:
        self._decoder = lambda i: DecodeActor(
            net.party(i), MODEL, spec, tiny_weights(spec)[i], settings, most=most, round_seconds=ROUND_SECONDS
        )
        self._producer = lambda i: SharedProducer(
            net.party(i), MODEL, tiny_weights(spec)[i], round_seconds=ROUND_SECONDS
        )
        self._nursery = nursery
        self._scopes: list[trio.CancelScope] = []
        self.actors: list[DecodeActor] = []
        self.producers: list[SharedProducer] = []
        for i in range(PARTIES):
            self._begin(i)

            async def asked(peer: int, body: dict[str, Any], i: int = i) -> dict[str, Any]:
                (actor,) = (a for a in (self.actors[i], self.producers[i]) if a.WORK == body["work"])
                actor.renew(peer, bytes.fromhex(body["lane"]))
                return {}

            net.party(i)._handlers[OPEN_LANE] = asked

    def _begin(self, party: int) -> None:
        actor, producer, scope = self._decoder(party), self._producer(party), trio.CancelScope()
        self.actors.insert(party, actor)
        self.producers.insert(party, producer)
        self._scopes.insert(party, scope)

        async def run() -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(actor.run)
                    nursery.start_soon(producer.run)

        self._nursery.start_soon(run)

    def restart(self, party: int) -> None:
        """The last session of this party ends, and another begins."""
        self._scopes.pop(party).cancel()
        del self.actors[party], self.producers[party]
        self._begin(party)


@asynccontextmanager
async def together(
    net: MemoryNet, spec: PlanSpec, most: int = 8, settings: Settings = SETTINGS
) -> AsyncIterator[Together]:
    """Shared actors that run."""
    async with trio.open_nursery() as nursery:
        yield Together(net, spec, most, settings, nursery)
        nursery.cancel_scope.cancel()


async def _inline(fn: Callable[..., Any], *args: Any, **_options: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return fn(*args)


@contextmanager
def no_threads() -> Iterator[None]:
    """Kernels run in the event loop: no virtual clock jumps while one works, and a fork copies no thread."""
    with mock.patch.object(trio.to_thread, "run_sync", _inline):
        yield


def run(fn: Callable[[], Awaitable[Any]]) -> Any:
    """trio.run without threads, at a virtual clock."""
    with no_threads():
        return trio.run(fn, clock=MockClock(autojump_threshold=0))


def run_session(
    story: Story, tap: Tap | None = None, taps: Taps | None = None, actors: list[SessionActor] | None = None
) -> Outcome:
    """One session and nothing else."""

    async def main() -> Outcome:
        return await hold(story, MemoryNet(PARTIES, tap=tap), None, taps, actors)

    outcome: Outcome = run(main)
    return outcome


# --- cheating: whatever a party may do wrong, tried in forks of one running session -------------------------

# How one frame is tampered with: other bytes of the same length, or another form.
CONTENT = ("low bit", "add one", "top bit", "random", "zeros", "old", "mirror")
FORM = (
    "drop",
    "repeat",
    "truncate",
    "cut word",
    "empty",
    "extend",
    "early",
    "stale",
    "step",
    "session",
    "lane",
)
# What a party tells its client, and what it pretends to have heard from it.
TO_CLIENT = ("low bit", "top bit", "drop", "repeat", "other number", "cut word", "old")
FROM_CLIENT = ("low bit", "top bit", "drop", "other number", "close")
# A party that deviates and stands by it: errors in its components of what it opens, in its summand of a
# product, in its components of a weight. It goes on with the wrong value and vouches for it.
ERRORS = ("one", "top bit", "random")
CHILD_SECONDS = 120  # real; a session that hangs is a failure
HONEST_ENDS = ("PeerError", "AbortError", "ClientGone")
CLIENT_ENDS = ("PartyError", "ClientError", "AbortError")


@dataclass(frozen=True)
class Event:
    """One point of an honest session where a party can cheat."""

    where: str  # "frame", "to client", "from client", "open", "reshare" or "weight"
    lane: str
    seq: int  # of the round, or of the message
    step: str  # or the message's type, or the weight's name
    sender: int
    receiver: int = -1
    size: int = 0

    @property
    def kind(self) -> tuple[str, str, str]:
        """Steps that differ in numbers only are of one kind."""
        return self.where, self.lane, re.sub(r"\d+", "#", self.step)

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """When the party decides: frames of one round are one decision."""
        return self.where, self.lane, self.seq, self.step, self.sender


@dataclass(frozen=True)
class Fault:
    """One way to cheat at one point; `to` are the receivers of tampered frames, or the components altered."""

    at: Event
    to: tuple[int, ...]
    how: str

    def __str__(self) -> str:
        e = self.at
        return f"party {e.sender}, {e.where} {e.lane} {e.seq} {e.step!r}, {self.to}: {self.how}"


@dataclass(frozen=True)
class Tried:
    """What came of a fault."""

    fault: Fault
    result: dict[str, Any]

    @property
    def aborted(self) -> bool:
        return bool(self.result.get("client"))

    def wrong(self, expected: Sequence[int]) -> str | None:
        """Why this is not as it must be: the right tokens, or an error and only right tokens before it."""
        why = self._wrong(list(expected))
        return why and f"{self.fault}: {why}"

    def _wrong(self, expected: list[int]) -> str | None:
        if "crash" in self.result:
            return str(self.result["crash"])
        tokens, client = self.result["tokens"], self.result["client"]
        if tokens != expected[: len(tokens)]:
            return f"the client accepted {tokens}, right is {expected}"
        if client is None and len(tokens) != len(expected):
            return f"the client took {tokens} for everything"
        if client is not None and client["type"] not in CLIENT_ENDS:
            return f"the client ended with {client}"
        for party, error in enumerate(self.result["parties"]):
            if party != self.fault.at.sender and error is not None and error["type"] not in HONEST_ENDS:
                return f"party {party} ended with {error}"
        return None


class _Hooked:
    """Weights that say when they are read."""

    def __init__(self, weights: DictWeights, party: int, hook: Hook) -> None:
        self._weights = weights
        self._party = party
        self._hook = hook

    def pair(self, name: str) -> tuple[Any, Any]:
        pair = self._weights.pair(name)
        changed = self._hook(Event("weight", "weights", 0, name, self._party, size=pair[0].size), pair)
        return pair if changed is None else changed


# Sees every event with what passes there; returns what shall pass instead, or None.
Hook = Callable[[Event, Any], Any]


def hooked(story: Story, hook: Hook) -> Callable[[], Awaitable[Outcome]]:
    """A session that shows every event to `hook`. Leaves its hooks in the code: for a process of its own,
    or inside `unhooked`.
    """
    said, heard = [0] * PARTIES, [0] * PARTIES
    opening, resharing = Doors._open, Doors.reshare_apart

    def tap(f: Any) -> Any:
        return hook(Event("frame", f.lane, f.seq, f.step, f.sender, f.receiver, len(f.payload)), f)

    def to_client(party: int, message: Message) -> Any:
        said[party] += 1
        return hook(Event("to client", "client", said[party], message["t"], party, size=1), message)

    def from_client(party: int, message: Message) -> Any:
        heard[party] += 1
        return hook(Event("from client", "client", heard[party], message["t"], party, size=1), message)

    async def _open(self: Doors, step: str, values: Sequence[Any]) -> Any:
        event = Event("open", self.channel.lane, self.channel.rounds, step, self.bk.party)
        changed = hook(event, values)
        return await opening(self, step, values if changed is None else changed)

    async def reshare(self: Doors, step: str, *summands: Any) -> Any:
        event = Event("reshare", self.channel.lane, self.channel.rounds, step, self.bk.party)
        changed = hook(event, summands)
        return await resharing(self, step, *(summands if changed is None else changed))

    Doors._open, Doors.reshare_apart = _open, reshare  # type: ignore[method-assign]
    weights = [_Hooked(w, i, hook) for i, w in enumerate(tiny_weights(story.spec))]
    net = MemoryNet(PARTIES, tap=tap)
    return functools.partial(hold, story, net, weights, Taps(to_client, from_client))


@contextmanager
def unhooked() -> Iterator[None]:
    """Restore what `hooked` replaces."""
    before = Doors._open, Doors.reshare_apart
    try:
        yield
    finally:
        Doors._open, Doors.reshare_apart = before  # type: ignore[method-assign]


def survey(story: Story) -> list[Event]:
    """Every point of an honest session where a party can cheat, in order; each weight once a party."""
    events: dict[Event, None] = {}

    def note(event: Event, what: Any) -> None:
        events.setdefault(event)

    with unhooked():
        outcome = run(hooked(story, note))
    assert outcome.plain() == Outcome(story.expected).plain()
    return list(events)


class Explorer:
    """Runs one honest session and forks it at every fault; each fork runs to its own end.

    All of it happens in a process apart, and no process leaves its event loop but by its death: forks share
    the loop's epoll object with their parent, and an orderly end of one takes away the other's wake-ups.
    """

    def __init__(self, story: Story, faults: Sequence[Fault], seed: int) -> None:
        self._story = story
        self._faults = faults
        self._seed = seed
        self._due: dict[Any, list[int]] = {}
        for number, fault in enumerate(faults):
            self._due.setdefault(fault.at.key, []).append(number)
        self._fault: Fault | None = None  # in a fork: what it tries
        self._pipe = -1
        # the last payload by lane, sender, receiver and length; the last message by party and type
        self._seen: dict[tuple[str, int, int, int], bytes] = {}
        self._told: dict[tuple[int, str], Message] = {}
        self._tried: dict[int, dict[str, Any]] = {}

    def run(self) -> list[Tried]:
        """Every fault and what came of it."""
        tiny_weights(self._story.spec)
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # forks then copy fewer pages
        try:
            text = self._fork()
            if text is None:
                self._live()
        finally:
            gc.unfreeze()
        answer = json.loads(text) if text else {"crash": "the explorer died"}
        if "crash" in answer:
            raise RuntimeError(answer["crash"])
        return [Tried(self._faults[int(number)], result) for number, result in answer.items()]

    def _fork(self, seconds: int = 0) -> str | None:
        """In the parent, what the child wrote before it died; in the child None."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            self._pipe = write
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            return None
        os.close(write)
        with os.fdopen(read) as inlet:
            text = inlet.read()
        os.waitpid(child, 0)
        return text

    def _live(self) -> NoReturn:
        """The session, and the end of this process."""
        try:
            session = hooked(self._story, self._hook)

            async def main() -> None:
                self._die((await session()).plain())

            run(main)
        finally:
            self._die({"crash": traceback.format_exc()})

    def _die(self, result: dict[Any, Any]) -> NoReturn:
        if self._fault is None and "crash" not in result:
            result = self._tried
            if self._due:
                result = {"crash": f"the session never came to {list(self._due)[:3]}"}
        with os.fdopen(self._pipe, "w") as out:
            json.dump(result, out)
        os._exit(0)

    def _hook(self, event: Event, what: Any) -> Any:
        if self._fault is None:
            self._branch(event)
        fault, out = self._fault, None
        if fault is not None and fault.at.key == event.key:
            out = self._cheat(fault, event, what)
        if event.where == "frame":
            self._seen[event.lane, event.sender, event.receiver, event.size] = bytes(what.payload)
        elif event.where == "to client":
            self._told[event.sender, event.step] = what
        return out

    def _branch(self, event: Event) -> None:
        for number in self._due.pop(event.key, ()):
            text = self._fork(CHILD_SECONDS)
            if text is None:
                self._fault = self._faults[number]
                return
            self._tried[number] = json.loads(text) if text else {"crash": "hung or died"}

    def _cheat(self, fault: Fault, event: Event, what: Any) -> Any:
        # Frames to both receivers are tampered with alike: one stream of choices for both.
        rng = np.random.default_rng([self._seed, fault.at.seq, fault.at.sender])
        if event.where == "frame":
            return self._tamper(fault, what, rng) if event.receiver in fault.to else None
        if event.where in ("to client", "from client"):
            return self._misquote(fault, event, what, rng)
        changed = [np.array(v) for v in what]
        filled = [v for v in changed if v.size]
        v = filled[int(rng.integers(len(filled)))]
        if event.where == "reshare":  # one of the summands
            spoil(v, fault.how, rng)
        elif event.where == "open":  # components of one of the values
            for slot in fault.to:
                spoil(v[slot], fault.how, rng)
        else:  # components of the weight
            for slot in fault.to:
                spoil(changed[slot], fault.how, rng)
        return changed

    def _tamper(self, fault: Fault, f: Any, rng: np.random.Generator) -> Sequence[Any]:
        raw, header = bytes(f.payload), {"session": f.session, "lane": f.lane, "seq": f.seq, "step": f.step}

        def other(**changed: Any) -> Sequence[Any]:
            return [wire.Data(**(header | changed), payload=bytearray(raw))]

        match fault.how:
            case "drop":
                return []
            case "repeat":
                return [raw, raw]
            case "truncate":
                return [raw[:-1]]
            case "cut word":
                return [raw[8:]]
            case "empty":
                return [b""]
            case "extend":
                return [raw + bytes(8)]
            case "early":
                return other(seq=f.seq + 1)
            case "stale":
                return other(seq=f.seq - 1) if f.seq else other(seq=5)
            case "step":
                return other(step=f.step + "+")
            case "session":
                return other(session=bytes(16))
            case "lane":
                return other(lane="online" if f.lane == "prep" else "prep")
            case "old" | "mirror":
                ends = (f.sender, f.receiver) if fault.how == "old" else (f.receiver, f.sender)
                earlier = self._seen.get((f.lane, *ends, len(raw)), raw)
                return [earlier if earlier != raw else tampered(raw, "low bit", rng)]
        return [tampered(raw, fault.how, rng)]

    def _misquote(
        self, fault: Fault, event: Event, message: Message, rng: np.random.Generator
    ) -> Sequence[Message]:
        number = {"masks": "turn", "offsets": "turn", "turn": "turn", "token": "step", "progress": "done"}
        kind, changed = event.step, dict(message)
        match fault.how:
            case "drop":
                return []
            case "repeat":
                return [message, message]
            case "close":
                return [{"t": "close"}]
            case "old":
                return [self._told.get((event.sender, kind), message)]
            case "other number" if kind in number:
                changed[number[kind]] += 1
            case "cut word" if kind == "masks":
                changed["names"] = {name: raw[16:] for name, raw in message["names"].items()}
            case how if kind in ("masks", "offsets"):
                name = sorted(message["names"])[int(rng.integers(len(message["names"])))]
                changed["names"] = message["names"] | {name: tampered(message["names"][name], how, rng)}
            case how if kind == "token":
                raw = np.array(message["components"], np.uint64).tobytes()
                changed["components"] = [int(v) for v in np.frombuffer(tampered(raw, how, rng), np.uint64)]
        return [changed]


def spoil(v: Any, how: str, rng: np.random.Generator) -> None:
    """Add an error, never zero, to one element of an array."""
    top = 1 << (8 * v.dtype.itemsize - 1)
    errors = {"one": 1, "top bit": top}
    at = tuple(int(rng.integers(d)) for d in v.shape)
    with np.errstate(over="ignore"):
        v[at] += v.dtype.type(errors[how] if how in errors else int(rng.integers(1, top)))


def tampered(raw: bytes, how: str, rng: np.random.Generator) -> bytes:
    """Other bytes of the same length; one byte if there are none."""
    if not raw:
        return b"\1"
    data = np.frombuffer(raw, np.uint8).copy()
    words = data[: len(data) // 8 * 8].view(np.uint64)
    at = int(rng.integers(len(words))) if len(words) else 0
    if how == "random":
        return rng.bytes(len(raw))
    if how == "zeros" and any(raw):
        return bytes(len(raw))
    if how == "add one" and len(words):
        words[at] += np.uint64(1)
    elif how == "top bit" and len(words):
        words[at] ^= np.uint64(1 << 63)
    else:
        data[int(rng.integers(len(data)))] ^= 1
    return data.tobytes()


def explore(story: Story, faults: Sequence[Fault], seed: int) -> list[Tried]:
    """Try every fault on a session of its own that is honest until then."""
    return Explorer(story, faults, seed).run()
