#!/usr/bin/env python3
"""GPT-2 small, target beside measured: decode at context 128, prefill of 32, eight sessions, argmax alone.

    python bench/targets.py                 a quarter of an hour on two idle cores, 16 GiB; run.py --targets
    python bench/targets.py --only NAME ... of decode, prefill, sessions, together, argmax; and billion, whose
                                            1.1 B shape needs 80 GiB, and which is run only if it is named
    python bench/targets.py --round-trip MS scheduler.round_trip_ms, instead of 20: below 5 more rounds are
                                            taken for less preprocessing
    python bench/targets.py --threads N     for the kernels of each party, instead of a third of the cores
    python bench/targets.py --show FILE     print the table of a result again

What is measured, and how. Three processes on this machine, the mesh between them on loopback, without a
tunnel, and in each what a party runs: the engine's session actor, its preprocessing with every check. Two
things are not a party's. Weights are random words, alike at both holders of a component: time does not depend
on them, and what comes out is noise. And the client sits in each process and answers at once. `bench/run.py`
measures the whole, with tunnel and client, at a short context; what lies between is what they cost.

    decode    A session whose cache holds 79 random positions, as in mimir.dryrun, reads 48 more, so that the
              last token is the one that fills the context: a block of products with weights. The material of
              a full context fits no pool, so only that of these 48 is made, all of it before the first round
              online; what is ready may exceed triple_pool.memory_mib for that. Online: rounds and
              bytes of the last, seconds the median of the 47 between two tokens. Preprocessing: all 48, from
              the entry's material on, by 48. Three such sessions, one after another in the same processes,
              of which the median counts: a party serves for days, and the first one pays for memory that the
              machine has not given yet. What that one took stands beside.
    prefill   32 rows from an empty cache, and the token that they give: as PUMA counts (32 in, 1 out).
    sessions  8 sessions as in `decode`, 6 tokens each at the end of the context. Their material is made one
              session after another, since making eight at once takes eight times the memory; then all go at
              once, and a party's decode actor joins them. Online: 8 tokens by the median seconds between two
              tokens of a session, from its second one on: the first is its own prompt's, after which those
              that are ready go on without the others. Twice in the same processes, of which the second
              time counts; what the first gave, in fresh memory, stands beside. And with a token's
              preprocessing as in `decode`, on the same processors, had nothing overlapped.
    together  8 such sessions of TOKENS tokens each, with what a session may hold unless told otherwise, which
              prepare and decode at once as sessions do: the producer and the decode actor join them. From the
              opening of the first, when nothing is prepared, to the last token of all. In processes of their
              own, which hold nothing of the tasks before. Twice, as above. Left out where it does not fit: it
              takes 22 GiB with a round trip below 5, and more otherwise.
    billion   As `decode`, with the 1.1 B Llama shape and 8 positions; all shares are in memory.
    argmax    sampling.choose of 50,257 logits with its preprocessing, the median of three; the index is
              compared with that of the same logits in the clear.

*Together* is online and preprocessing, as if nothing had been prepared and nothing overlapped. Seconds are by
the clock, of the party that takes longest. Bytes are what one party hands to its links, of the party that
sends most; of all three where it says so. Beside stands what the cost model predicts for three parties on
this machine's cores, and three floors: multiplying (every kernel's work at this machine's measured rate, by
the cores, no rounds, no Python), the link at LINK_MBIT, and half LINK_RTT for every round. Nothing is
asserted: tests do that.

PUMA (Dong et al., 2023) is semi-honest and ran on three servers of 32 cores; figures as published.
Results go to bench/results/targets/ as one JSON file a run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import trio

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

from run import commit, machine, planned, third, threads_rule  # noqa: E402
from scaling import SMALL, one_pass  # noqa: E402

from mimir import cost, dryrun, kernels  # noqa: E402
from mimir.actors.decode import DecodeActor  # noqa: E402
from mimir.actors.session import Limits, SessionActor, Turn, plan_turn, sized  # noqa: E402
from mimir.actors.triples import SharedProducer, keep_pages  # noqa: E402
from mimir.config import TriplePool  # noqa: E402
from mimir.loopback import Lanes  # noqa: E402
from mimir.manifest import tensors_of  # noqa: E402
from mimir.model import sampling, transformer  # noqa: E402
from mimir.model.checkpoint import PlanSpec  # noqa: E402
from mimir.mpc import ops, plan, prep  # noqa: E402
from mimir.mpc.domain import encode  # noqa: E402
from mimir.mpc.doors import Doors  # noqa: E402
from mimir.mpc.nonlinear import Settings  # noqa: E402
from mimir.mpc.ops import Context  # noqa: E402
from mimir.mpc.replicated import PARTIES, Replicated  # noqa: E402
from mimir.mpc.share import Share  # noqa: E402
from mimir.net import Transport  # noqa: E402
from mimir.net.messages import Message, Open, Sampler  # noqa: E402

RESULTS = HERE / "results" / "targets"
CONTEXT = 128
BLOCK = 48  # positions that `decode` reads
LARGE_BLOCK = 8  # of the 1.1 B shape
PROMPT = 32
AT_ONCE = 8
PASSES = 6  # of each of these sessions
TOKENS = 24  # of each of those that prepare and decode at once: more would not fit 23.5 GiB
GIB_APART = {True: 22, False: 28}  # that `together` takes, whether on one site or not
JOINED = 2  # tokens after which all of them are in one pass
CHOICES = 3  # argmaxes
SETTINGS = Settings()
SEED = 5
LINK_RTT, LINK_MBIT = 20.0, 100.0  # of the floors
AHEAD = 1 << 16  # positions: what is ready is never too much
MEMORY = 4 << 30  # triple_pool.memory_mib: a prompt of 32 goes through the model at once
USUAL_MEMORY = TriplePool().memory_mib << 20  # unless told otherwise
BASE_PORT = 19210
UP_SECONDS = 60.0
ROUND_SECONDS = 600.0
SESSION_SECONDS = 3600.0
KEY = "00" * 32
MODEL = "0" * 64
PUMA_GB, PUMA_SECONDS = 3.77, 15.5
# Per party, of what is aimed at on a machine of two cores that all three share.
TARGETS = {
    "rounds a layer": 20,
    "MB online": 5.0,
    "MB together": 40.0,
    "decode online": 0.6,
    "decode together": 2.0,
    "prefill online": 4.0,
    "prefill together": 25.0,
    "sessions online": 4.0,
    "sessions together": 2.0,
    "argmax rounds": 16,
    "argmax online": 0.3,
    "argmax together": 1.0,
    "billion online": 8.0,
    "billion together": 20.0,
}
LARGE = PlanSpec(
    family="llama",
    layers=22,
    width=2048,
    heads=32,
    kv_heads=4,
    head_dim=64,
    hidden=5632,
    vocab=32000,
    context=2048,
    act="silu_glu",
    norm_eps=1e-5,
    positions="rope",
    rope_theta=10000.0,
    bos_id=None,
    eos_ids=(),
)


@dataclass(frozen=True)
class Task:
    """Sessions that all parties run alike: how many positions are there before, and how many are read."""

    name: str
    before: int
    bucket: int
    tokens: int
    sessions: int = 1
    spec: PlanSpec = SMALL
    times: int = 1  # one after another
    ready: bool = True  # nothing goes online before everything is prepared
    apart: bool = False  # in processes of its own

    @property
    def positions(self) -> int:
        return self.bucket + self.tokens - 1


TASKS = (
    Task("decode", CONTEXT - 1 - BLOCK, 1, BLOCK, times=3),
    Task("prefill", 0, PROMPT, 1),
    Task("sessions", CONTEXT - 1 - PASSES, 1, PASSES, AT_ONCE, times=2),
    Task("together", CONTEXT - 1 - TOKENS, 1, TOKENS, AT_ONCE, times=2, ready=False, apart=True),
    Task("billion", CONTEXT - 1 - LARGE_BLOCK, 1, LARGE_BLOCK, spec=LARGE),
)
NAMES = (*(t.name for t in TASKS), "argmax")
USUAL = tuple(name for name in NAMES if name != "billion")


# --- at one party -------------------------------------------------------------------------------------------


class Noise:
    """A party's two components of weights that are uniform; equal seeds give equal components."""

    def __init__(self, spec: PlanSpec | None, party: int) -> None:
        self._tensors = {
            t.name: tuple(_noise(t.name, (party + i) % PARTIES, t.shape, t.dtype) for i in range(2))
            for t in (tensors_of(spec) if spec else ())
        }

    def pair(self, name: str) -> Any:
        return self._tensors[name]


def _noise(name: str, component: int, shape: tuple[int, ...], dtype: Any = np.uint64) -> Any:
    out = np.empty(shape, dtype)
    kernels.prg(hashlib.sha256(f"{name} {component}".encode()).digest(), SEED, out)
    return out


class Late(SessionActor):
    """A session whose cache holds `before` random positions, all valid, before its first turn."""

    before = 0
    ready = True

    async def _sizes(self) -> None:
        await super()._sizes()
        if self.ready:
            self._ahead = AHEAD

    async def _turn(self, turn: Turn) -> None:
        spec, n = self.spec, self.before
        if n and not self._cache.length:
            bk, shape = self._making.bk, (spec.kv_heads, n, spec.head_dim)
            self._cache.valid = Share(np.zeros((2, n), np.uint64), self._online.bk) + np.ones(1, np.uint64)
            self._cache.length = n
            for name, caches in (("keys", self._cache.keys), ("values", self._cache.values)):
                for layer, cache in enumerate(caches):
                    mask = bk.random(*shape)
                    cache.delta = [_noise(f"{name} {layer}", 0, shape)]
                    cache.mask = [Share(mask, self._online.bk)]
                    self.triples._caches[name, layer] = [mask]
            turn = plan_turn(turn.number, turn.buckets, turn.max_new, n, self._chunk)
        await super()._turn(turn)


@dataclass
class Start:
    """Sessions wait for one another: nothing goes online before all are prepared."""

    missing: int
    event: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        if not self.missing:
            self.event.set()

    def ready(self) -> None:
        self.missing -= 1
        if not self.missing:
            self.event.set()


class Client:
    """Gives a prompt of zeros as soon as all sessions are prepared, and takes notes of time and figures."""

    key = KEY

    def __init__(self, need: int, start: Start) -> None:
        self._need, self._start = need, start
        self.prepared = trio.Event()
        self._send, self._receive = trio.open_memory_channel[Message](8)
        self.actor: SessionActor | None = None
        self.marks: list[dict[str, Any]] = []

    def mark(self, kind: str, positions: int = 0) -> None:
        assert self.actor is not None
        known = {"kind": kind, "positions": positions, "at": time.monotonic(), "used": time.process_time()}
        self.marks.append(known | self.actor._figures())

    async def send(self, message: Mapping[str, Any]) -> None:
        match message["t"]:
            case "opened":
                self.mark("opened")
            case "masks":
                names = {name: bytes(len(raw) // 2) for name, raw in message["names"].items()}
                await self._send.send({"t": "offsets", "turn": message["turn"], "names": names})
            case "token":
                self.mark("token")
            case "progress" if message["phase"] == "preprocessing":
                self.mark("made", message["done"])
                if message["done"] >= self._need and not self.prepared.is_set():
                    self.prepared.set()
                    self._start.ready()
            case "done":
                await self._send.send({"t": "close"})

    async def receive(self, timeout: float | None = None) -> Message:
        await self._start.event.wait()
        message = await self._receive.receive()
        if message["t"] == "offsets":
            self.mark("start")
        return message


async def sessions(
    transport: Transport,
    spec: PlanSpec,
    weights: Any,
    task: Task,
    context: int,
    lanes: Lanes,
    run: int = 0,
) -> list[list[dict[str, Any]]]:
    """Run the sessions of a task at this party, for the n-th time. Returns the marks of each."""
    start = Start(task.sessions if task.ready else 0)
    decoder = DecodeActor(
        transport,
        MODEL,
        sized(spec, context),
        weights,
        SETTINGS,
        most=AT_ONCE,
        round_seconds=ROUND_SECONDS,
    )
    producer = SharedProducer(transport, MODEL, weights, round_seconds=ROUND_SECONDS)
    lanes.actors = decoder, producer
    clients = [Client(task.positions, start) for _ in range(task.sessions)]
    limits = Limits(
        (task.bucket,),
        (task.tokens,),
        context,
        AHEAD,
        MEMORY if task.ready else USUAL_MEMORY,
        ROUND_SECONDS,
        SESSION_SECONDS,
        SESSION_SECONDS,
    )
    async with trio.open_nursery() as around:
        around.start_soon(decoder.run)
        around.start_soon(producer.run)
        async with trio.open_nursery() as nursery:
            for number, client in enumerate(clients):
                name = hashlib.sha256(f"{task.name} {run} {number}".encode()).digest()[:16]
                terms = Open(name, MODEL, (KEY,), (task.bucket,), task.tokens, Sampler(), False)
                actor = Late(transport, terms, [client], spec, weights, SETTINGS, limits, decoder, producer)
                actor.before, actor.ready, client.actor = task.before, task.ready, actor
                nursery.start_soon(actor.run)
                if task.ready:
                    await client.prepared.wait()
        around.cancel_scope.cancel()
    return [client.marks for client in clients]


def chooser(spec: PlanSpec) -> Callable[[Context, str, Share], Awaitable[Share]]:
    greedy = sampling.Sampler("greedy", 1.0, 1, spec.vocab, SETTINGS.round_trip)

    async def choose(ctx: Context, step: str, logits: Share) -> Share:
        return await sampling.choose(ctx, step, logits, greedy, sampling.no_noise)

    return choose


def logits(spec: PlanSpec, number: int) -> Any:
    """Some logits in the clear."""
    return 4 * np.random.default_rng([SEED, number]).standard_normal(spec.vocab)


async def argmaxes(transport: Transport, spec: PlanSpec, count: int) -> list[dict[str, Any]]:
    """Choose the largest of random logits, with the material for it made right before. Figures of each."""
    party, choose, out = transport.party, chooser(spec), []
    demand, none = plan.run(transformer.cost_of_choice(spec, choose)).demand, Noise(None, party)
    for number in range(count):
        session = hashlib.sha256(f"argmax {number}".encode()).digest()[:16]

        def lane(label: str, session: bytes = session) -> Doors:
            channel = transport.channel(session, label)
            channel.timeout = ROUND_SECONDS
            keys = [
                transport.link_secret((party + way) % PARTIES, session, f"prf {label}") for way in (-1, 1)
            ]
            return Doors(channel, Replicated(party, *keys))

        online, making = lane("online"), lane("prep")
        value = encode(logits(spec, number), transformer.LOGIT_SCALE)
        a, b = (_noise(f"logits {number}", i, value.shape) for i in (0, 1))
        parts = (a, b, value - a - b)
        x = Share(np.stack([parts[party], parts[(party + 1) % PARTIES]]), online.bk)
        told: dict[str, Any] = {}
        await making.agree("go", b"")
        for name, doors in (("prep", making), ("online", online)):
            before = (time.monotonic(), time.process_time(), doors.channel.rounds, doors.channel.sent)
            if name == "prep":
                made = await prep.produce(prep.Batch(making, none, {}), "argmax", demand)
            else:
                index = await choose(Context(online.bk, online, prep.Store(made), none), "choice", x)
            after = (time.monotonic(), time.process_time(), doors.channel.rounds, doors.channel.sent)
            grown = [y - x for x, y in zip(before, after, strict=True)]
            told[name] = dict(zip(("seconds", "used", "rounds", "sent"), grown, strict=True))
        await making.agree("done", b"")
        out.append(told | {"components": [int(v) for v in index.v[:, 0]]})
        for doors in (online, making):
            doors.bk.wipe()
            await doors.channel.aclose()
    return out


async def party(index: int, folder: Path, names: Sequence[str]) -> None:
    """One of the three processes: everything that is asked for, in order; results as JSON in the folder."""
    from mimir.net.identity import Identity, parse_public
    from mimir.net.mesh import PeerAt, open_mesh  # not in the process that predicts: see mimir.dryrun

    me = Identity.load(folder / f"key{index}")
    public = [parse_public((folder / f"public{i}").read_text()) for i in range(PARTIES)]
    peers = [PeerAt(i, "127.0.0.1", BASE_PORT + i, public[i]) for i in range(PARTIES) if i != index]
    async with open_mesh(
        party=index,
        identity=me,
        peers=peers,
        config_digest=bytes(32),
        listen=("127.0.0.1", BASE_PORT + index),
        protected=False,
    ) as mesh:
        await mesh.wait_up(UP_SECONDS)
        lanes = Lanes(mesh)
        weights, of = Noise(None, index), None
        for task in (t for t in TASKS if t.name in names):
            if task.spec is not of:
                weights, of = Noise(task.spec, index), task.spec
            marks = []
            for run in range(task.times):
                marks += await sessions(mesh, task.spec, weights, task, CONTEXT, lanes, run)
            (folder / f"{task.name}{index}.json").write_text(json.dumps(marks))
        if "argmax" in names:
            told = await argmaxes(mesh, SMALL, CHOICES)
            (folder / f"argmax{index}.json").write_text(json.dumps(told))
        (folder / f"done{index}").touch()
        while not all((folder / f"done{i}").exists() for i in range(PARTIES)):
            await trio.sleep(0.05)  # whoever leaves first would break off the others' last round


def measured(names: Sequence[str], threads: int) -> dict[str, list[Any]]:
    """What the three parties noted, by name, party after party."""
    if not names:
        return {}
    from mimir.net.identity import Identity

    with tempfile.TemporaryDirectory(prefix="mimir-bench.") as name:
        folder = Path(name)
        for i in range(PARTIES):
            identity = Identity.generate()
            identity.save(folder / f"key{i}")
            (folder / f"public{i}").write_text(identity.public_hex)
        words = [sys.executable, str(HERE / "targets.py"), "--folder", name]
        words += ["--round-trip", str(SETTINGS.round_trip), "--threads", str(threads), "--only", *names]
        children = [subprocess.Popen([*words, "--party", str(i)]) for i in range(PARTIES)]
        try:
            while any(child.poll() is None for child in children):
                if any(child.poll() for child in children):  # the others would wait for it
                    break
                time.sleep(0.2)
        finally:
            for child in children:
                if child.poll() is None:
                    child.terminate()
            codes = [child.wait() for child in children]
        if any(codes):
            raise SystemExit(f"targets: a party ended with exit status {codes}; see above")
        return {n: [json.loads((folder / f"{n}{i}.json").read_text()) for i in range(PARTIES)] for n in names}


# --- figures ------------------------------------------------------------------------------------------------


def _of(marks: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [m for m in marks if m["kind"] == kind]


def _grown(a: Mapping[str, Any], b: Mapping[str, Any], what: str) -> float:
    return float(b[what] - a[what])


def decoded(parts: Sequence[Sequence[Sequence[Mapping[str, Any]]]], positions: int) -> dict[str, Any]:
    """A token online and its preprocessing, medians of the sessions of which each party has marks; and the
    preprocessing of the first.
    """
    online: list[dict[str, float]] = []
    made: list[dict[str, float]] = []
    first: list[dict[str, float]] = []
    for sessions in parts:
        pairs = [pair for marks in sessions for pair in pairwise(_of(marks, "token"))]
        told = {
            name: statistics.median(_grown(a, b, what) for a, b in pairs)
            for name, what in (("seconds", "at"), ("used", "used"))
        }
        online.append(told | {name: _grown(*pairs[-1], f"{name}_online") for name in ("rounds", "sent")})
        figures = {"seconds": "at", "used": "used"}
        figures |= {name: f"{name}_preprocessing" for name in ("rounds", "sent")}
        ends = [(told[0], told[-1]) for told in (_of(marks, "made") for marks in sessions)]
        each = [{name: _grown(*pair, what) / positions for name, what in figures.items()} for pair in ends]
        first.append(each[0])
        made.append({name: statistics.median(told[name] for told in each) for name in figures})
    return {"online": _worst(online), "prep": _worst(made), "first": _worst(first)}


def prefilled(parts: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """A whole session up to its first token, of the party that takes longest; bytes of all in `all`."""
    online: list[dict[str, float]] = []
    made: list[dict[str, float]] = []
    everything = 0.0
    for (marks,) in parts:
        (opened,), (start,) = _of(marks, "opened"), _of(marks, "start")
        token, ready = _of(marks, "token")[0], _of(marks, "made")[-1]
        for out, began, ended, lane in (
            (made, opened, ready, "preprocessing"),
            (online, start, token, "online"),
        ):
            figures = {"seconds": _grown(began, ended, "at"), "used": _grown(began, ended, "used")}
            out.append(figures | {name: float(ended[f"{name}_{lane}"]) for name in ("rounds", "sent")})
        everything += token["sent_online"] + ready["sent_preprocessing"]
    return {"online": _worst(online), "prep": _worst(made), "all": everything}


def side_by_side(parts: Sequence[Sequence[Sequence[Mapping[str, Any]]]], at_once: int) -> dict[str, Any]:
    """Tokens a second of so many sessions that decode in one pass: of the last ones of which each party has
    marks, and, beside, of the first.
    """
    first, last = ([marks[some] for marks in parts] for some in (slice(at_once), slice(-at_once, None)))
    return _rate(last) | {"first": _rate(first)["rate"]}


def _rate(parts: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    passes = [
        [_grown(*pair, "at") for marks in sessions for pair in pairwise(_of(marks, "token")[JOINED - 1 :])]
        for sessions in parts
    ]
    seconds = max(statistics.median(each) for each in passes)
    return {"seconds": seconds, "sessions": len(parts[0]), "rate": len(parts[0]) / seconds}


def at_once(parts: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Tokens a second of sessions that prepare and decode at once, from the opening of the first of them to
    the last token of all: of the last ones of which each party has marks, and, beside, of the first.
    """

    def taken(sessions: Sequence[Sequence[Mapping[str, Any]]]) -> float:
        opened, tokens = ([m["at"] for marks in sessions for m in _of(marks, k)] for k in ("opened", "token"))
        return float(max(tokens) - min(opened))

    first, last = (max(taken(p[some]) for p in parts) for some in (slice(AT_ONCE), slice(-AT_ONCE, None)))
    count = AT_ONCE * TOKENS
    return {"seconds": last, "tokens": count, "rate": count / last, "first": count / first}


def chosen(parts: Sequence[Sequence[Mapping[str, Any]]], spec: PlanSpec) -> dict[str, Any]:
    """Medians of the argmaxes; raises if an index is not that of the largest logit."""
    out: dict[str, Any] = {}
    for number in range(len(parts[0])):
        index = sum(p[number]["components"][0] for p in parts) % 2**ops.INDEX_BITS
        if index != int(logits(spec, number).argmax()):
            raise SystemExit(f"targets: argmax {number} gave {index}, which is wrong")
    for lane in ("online", "prep"):
        each = [
            {f: statistics.median(run[lane][f] for run in p) for f in ("seconds", "used", "rounds", "sent")}
            for p in parts
        ]
        out[lane] = _worst(each)
    return out


def _worst(parties: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest of each figure, but processor seconds of all together."""
    out = {name: max(p[name] for p in parties) for name in parties[0]}
    return out | {"used": sum(p["used"] for p in parties)}


# --- predictions and floors ---------------------------------------------------------------------------------


def floors(c: dryrun.Counts, rates: cost.Rates) -> dict[str, float]:
    """Seconds below which this work cannot come: of multiplying, of the link, of the delay."""
    known = {*dryrun.RULES, *(name + dryrun.ONE_ROW for name in dryrun.STREAMED), "prg"}
    work = sum(rates.seconds[k] * n for k, n in c.work.items() if k in known)
    told = cost.part(c, rates, cost.Link(LINK_RTT, LINK_MBIT))
    crowd = max(1.0, PARTIES / rates.cores)
    return {"multiplying": crowd * work, "link": told.link, "delay": told.delay}


def expected(
    shares: Sequence[cost.Shared], rates: cost.Rates, planning: float, before: float
) -> dict[str, Any]:
    """What the model says of work that serves so many positions, for one of them, and its floors, where a
    party has `before` bytes of memory.
    """
    link = cost.Link(parties_here=PARTIES)
    parts = [cost.part(c, rates, link, n, extra=planning * c.plans, before=before) for c, n in shares]
    each = [{k: v / n for k, v in floors(c, rates).items()} for c, n in shares]
    whole = functools.reduce(operator.add, parts).plain()
    return whole | {"floors": {name: sum(f[name] for f in each) for name in each[0]}}


def predicted(spec: PlanSpec, context: int, rates: cost.Rates) -> dict[str, Any]:
    """The cost model's figures of a token at the end of the context and of the prefill, as `mimir cost` has
    them.
    """
    limits: dict[str, Any] = {"max_context": context, "ahead": AHEAD, "memory": MEMORY}
    end = dryrun.run_last(spec, SETTINGS, **limits, most=BLOCK)
    start = dryrun.run(spec, SETTINGS, bucket=PROMPT, tokens=1, **limits)
    online, (tokens, block) = cost.last_token(end)
    tokens.counts.work[dryrun.GROWN] += tokens.positions * end.material  # it is all kept, see `decode`
    made = (tokens, block)
    first, first_made = cost.first_token(start)
    planning = cost._seconds_to_plan(spec, SETTINGS, context)

    weights = cost.resident() + dryrun.Shares(spec, dryrun.KEPT_BYTES).kept_bytes

    def both(online: dryrun.Counts, made: Sequence[cost.Shared], before: float) -> dict[str, Any]:
        return {
            "online": expected([cost.Shared(online, 1)], rates, planning, before),
            "prep": expected(made, rates, planning, before),
        }

    joint = cost.part(one_pass(online, AT_ONCE), rates, cost.Link(parties_here=PARTIES))
    return {
        "token": both(online, made, weights + end.peak) | {"at once": AT_ONCE / joint.seconds},
        "prefill": both(first, [cost.Shared(first_made, 1)], weights),
        "block": block.positions,
    }


# --- the table ----------------------------------------------------------------------------------------------


def _line(
    what: str, target: Any, got: Any, want: Any = None, floor: Mapping[str, float] | None = None
) -> str:
    def said(v: Any) -> str:
        return "-" if v is None else v if isinstance(v, str) else f"{v:.3g}" if v < 1e3 else f"{v:,.0f}"

    cells = [floor[name] for name in ("multiplying", "link", "delay")] if floor else [None] * 3
    return "| " + " | ".join([what, *map(said, (target, got, want, *cells))]) + " |"


def _both(figures: Mapping[str, Any], name: str = "seconds") -> float:
    return float(figures["online"][name] + figures["prep"][name])


def _floors_of_both(figures: Mapping[str, Any]) -> dict[str, float]:
    a, b = (figures[lane]["floors"] for lane in ("online", "prep"))
    return {name: a[name] + b[name] for name in a}


def _used(row: str, told: Mapping[str, Any], p: Mapping[str, Any], cores: int) -> str:
    """Processor seconds of all three parties, which other work on the machine lengthens least."""
    want = PARTIES * _both(p, "processor") / max(1.0, PARTIES / cores)
    return _line(row + "processor s together, all three", None, _both(told, "used"), want)


def tables(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    m, got, want = result["machine"], result["measured"], result["predicted"]
    out = [
        f"GPT-2 small, measured {result['date'][:10]} at commit {result['commit']} by `bench/targets.py`, on "
        f"{m['cores']} cores of {m['processor']} ({m['kernels']} kernels), which all three parties share, "
        f"each with {result.get('threads', 1)} for its kernels, "
        f"and which are said to be {result.get('round_trip', 20):g} ms apart; "
        f"load before and after {result['load'][0]:.1f}, {result['load'][1]:.1f}.",
        "",
        f"| | target | measured | predicted | floor: multiplying | link, {LINK_MBIT:g} Mbit/s "
        f"| delay, {LINK_RTT:g} ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    if told := got.get("decode"):
        token, p = f"decode at {CONTEXT}, one token: ", want["token"]
        rounds, counted = result["rounds"], p["online"]["rounds"]
        out += [
            _line(token + "rounds a layer", TARGETS["rounds a layer"], rounds["layer"], rounds["layer"]),
            _line(token + "rounds online", None, told["online"]["rounds"], counted),
            _line(
                token + "MB online",
                TARGETS["MB online"],
                told["online"]["sent"] / 1e6,
                p["online"]["sent"] / 1e6,
            ),
            _line(
                token + "MB together",
                TARGETS["MB together"],
                _both(told, "sent") / 1e6,
                _both(p, "sent") / 1e6,
            ),
            _line(
                token + "s online",
                TARGETS["decode online"],
                told["online"]["seconds"],
                p["online"]["seconds"],
                p["online"]["floors"],
            ),
            _line(
                token + "s together", TARGETS["decode together"], _both(told), _both(p), _floors_of_both(p)
            ),
            _used(token, told, p, m["cores"]),
        ]
        if "first" in told:
            cold = told["online"]["seconds"] + told["first"]["seconds"]
            out.append(_line(token + "s together, with what the first session prepared", None, cold))
    if told := got.get("prefill"):
        row, p = f"prefill of {PROMPT} and a token: ", want["prefill"]
        out += [
            _line(
                row + "s online",
                TARGETS["prefill online"],
                told["online"]["seconds"],
                p["online"]["seconds"],
                p["online"]["floors"],
            ),
            _line(
                row + f"s together (PUMA {PUMA_SECONDS})",
                TARGETS["prefill together"],
                _both(told),
                _both(p),
                _floors_of_both(p),
            ),
            _used(row, told, p, m["cores"]),
            _line(
                row + "GB online, all three",
                f"PUMA {PUMA_GB}",
                PARTIES * told["online"]["sent"] / 1e9,
                PARTIES * p["online"]["sent"] / 1e9,
            ),
            _line(
                row + "GB together, all three",
                f"PUMA {PUMA_GB}",
                told["all"] / 1e9,
                PARTIES * _both(p, "sent") / 1e9,
            ),
        ]
    if told := got.get("sessions"):
        p = want["token"]
        row = f"{told['sessions']} sessions decoding at once: "
        out.append(
            _line(row + "tokens/s online, in all", TARGETS["sessions online"], told["rate"], p["at once"])
        )
        if "first" in told:
            out.append(_line(row + "tokens/s online, in all, the first time", None, told["first"]))
        if "decode" in got:
            rate = 1 / (1 / told["rate"] + got["decode"]["prep"]["seconds"])
            out.append(_line(row + "tokens/s together, in all, had nothing overlapped", None, rate))
    if told := got.get("together"):
        p = want["token"]
        row = f"{AT_ONCE} sessions decoding at once: "
        model = 1 / (1 / p["at once"] + p["prep"]["seconds"])
        out += [
            _line(row + "tokens/s together, in all", TARGETS["sessions together"], told["rate"], model),
            _line(row + "tokens/s together, in all, the first time", None, told["first"]),
        ]
    if told := got.get("billion"):
        row = f"1.1 B shape, decode at {CONTEXT}, one token: "
        out += [
            _line(row + "rounds online", None, told["online"]["rounds"]),
            _line(row + "MB online", None, told["online"]["sent"] / 1e6),
            _line(row + "MB together", None, _both(told, "sent") / 1e6),
            _line(row + "s online", TARGETS["billion online"], told["online"]["seconds"]),
            _line(row + "s together", TARGETS["billion together"], _both(told)),
            _line(row + "processor s together, all three", None, _both(told, "used")),
        ]
    if told := got.get("argmax"):
        row, counted = f"argmax of {SMALL.vocab:,}: ", result["choice"]
        links = [
            {
                "multiplying": None,
                "link": sent * 8 / (LINK_MBIT * 1e6),
                "delay": rounds * LINK_RTT / 2000,
            }
            for rounds, sent in (
                (told["online"]["rounds"], told["online"]["sent"]),
                (_both(told, "rounds"), _both(told, "sent")),
            )
        ]
        out += [
            _line(
                row + "rounds online", TARGETS["argmax rounds"], told["online"]["rounds"], counted["rounds"]
            ),
            _line(row + "rounds together", None, _both(told, "rounds")),
            _line(row + "MB online", None, told["online"]["sent"] / 1e6, counted["sent"] / 1e6),
            _line(row + "MB together", None, _both(told, "sent") / 1e6),
            _line(row + "s online", TARGETS["argmax online"], told["online"]["seconds"], None, links[0]),  # type: ignore[arg-type]
            _line(row + "s together", TARGETS["argmax together"], _both(told), None, links[1]),  # type: ignore[arg-type]
        ]
    out += [
        "",
        f"Per party unless it says otherwise. Products with weights are made for {want['block']} rows "
        "together. PUMA: semi-honest, three servers of 32 cores.",
        "",
    ]
    return "\n".join(out)


def fitting(names: Sequence[str], few_rounds: bool, gib: float) -> list[str]:
    """The tasks for which there is memory; says which are left out."""
    need = GIB_APART[not few_rounds]
    apart = {t.name for t in TASKS if t.apart and need > gib}
    for name in apart.intersection(names):
        print(f"targets: {name} is left out: it takes {need} GiB of memory, and {gib:.1f} are available")
    return [name for name in names if name not in apart]


def available() -> float:
    """GiB of memory that nobody uses."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / (1 << 20)


# --- the command --------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    global SETTINGS
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="targets.py [options]",
    )
    p.add_argument(
        "--only", nargs="+", choices=NAMES, default=list(USUAL), metavar="NAME", help="of " + ", ".join(NAMES)
    )
    p.add_argument("--round-trip", type=int, default=20, metavar="MS", help="as above (default 20)")
    p.add_argument(
        "--threads", type=threads_rule, default=third(), metavar="N", help="of each party (default a third)"
    )
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the table of this result and end")
    p.add_argument("--party", type=int, help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.show:
        print(tables(json.loads(a.show.read_text())))
        return 0
    if not 0 <= a.round_trip <= 1000:
        p.error("--round-trip must be from 0 to 1000")
    SETTINGS = Settings(round_trip=a.round_trip)
    if a.party is not None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
        kernels.use_threads(a.threads)
        from mimir.party import GARBAGE  # not in the process that predicts: see mimir.dryrun

        keep_pages()
        gc.freeze()
        gc.set_threshold(GARBAGE)  # as a party does
        trio.run(party, a.party, a.folder, a.only)
        return 0
    a.only = fitting(a.only, SETTINGS.few_rounds, available())
    now, load, at = datetime.now(UTC), os.getloadavg()[0], commit()  # before a commit meanwhile
    rates = cost.calibrate()
    want = predicted(SMALL, CONTEXT, rates)
    choice = plan.run(transformer.cost_of_choice(SMALL, chooser(SMALL)))
    apart = {t.name for t in TASKS if t.apart}
    parts = measured([name for name in a.only if name not in apart], a.threads)
    for name in apart.intersection(a.only):
        parts |= measured([name], a.threads)
    figures: dict[str, Any] = {}
    if "decode" in parts:
        figures["decode"] = decoded(parts["decode"], TASKS[0].positions)
    if "billion" in parts:
        figures["billion"] = decoded(parts["billion"], LARGE_BLOCK)
    if "prefill" in parts:
        figures["prefill"] = prefilled(parts["prefill"])
    if "sessions" in parts:
        figures["sessions"] = side_by_side(parts["sessions"], AT_ONCE)
    if "together" in parts:
        figures["together"] = at_once(parts["together"])
    if "argmax" in parts:
        figures["argmax"] = chosen(parts["argmax"], SMALL)
    result: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": at,
        "machine": machine(),
        "threads": a.threads,
        "round_trip": a.round_trip,
        "load": [load, os.getloadavg()[0]],
        "rounds": trio.run(planned, SMALL, SETTINGS, CONTEXT),
        "choice": {"rounds": choice.rounds, "sent": choice.sent},
        "measured": figures,
        "predicted": want,
        "seconds": (datetime.now(UTC) - now).total_seconds(),
    }
    a.out.mkdir(parents=True, exist_ok=True)
    target = a.out / f"{now:%Y-%m-%d-%H%M}-{at[:10]}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
