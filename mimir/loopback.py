"""Three parties of a tiny model on this machine: what their rounds, bytes, threads and sessions take, in
processor seconds, for the cost model.

`measure` starts three processes, as parties are, with the mesh between them on loopback, without a tunnel.
Weights and prompt are zeros and the client sits in each process: nothing here is secret, and keys are made
for these minutes. Each process works alike; figures are means of the three, once per repetition.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from unittest import mock

import numpy as np
import structlog
import trio

from mimir.actors.decode import DecodeActor
from mimir.actors.session import Limits, SessionActor, Step, sized
from mimir.actors.shared import OPEN_LANE, SharedActor
from mimir.actors.triples import SharedProducer
from mimir.config import TriplePool
from mimir.errors import LocalError
from mimir.manifest import tensors_of
from mimir.model.checkpoint import PlanSpec
from mimir.mpc.nonlinear import Settings
from mimir.net import Transport
from mimir.net.messages import Message, Open, Sampler

SPEC: Final = PlanSpec(
    family="llama",
    layers=3,
    width=48,
    heads=4,
    kv_heads=4,
    head_dim=12,
    hidden=96,
    vocab=256,
    context=24,
    act="silu_glu",
    norm_eps=1e-5,
    positions="rope",
    rope_theta=10000.0,
    bos_id=None,
    eos_ids=(),
)
SETTINGS: Final = Settings()
BUCKET, TOKENS = 4, 9  # of the session
LIMITS: Final = Limits(
    (BUCKET,), (TOKENS,), SPEC.context, SPEC.context, TriplePool().memory_mib << 20, 60.0, 600.0, 60.0
)
PARTIES: Final = 3
KEY: Final = "00" * 32
MODEL: Final = "0" * 64
ROUNDS, SMALL_FRAME = 200, 2048  # bytes to one peer; the other gets a digest
BULK_ROUNDS, BULK = 6, 4 << 20
DIGEST: Final = 32
HANDOVERS: Final = 200
UP_SECONDS: Final = 60.0
ALL_SECONDS: Final = 300.0


def measure(repetitions: int) -> list[dict[str, float]]:
    """Processor seconds of one party, by repetition. "round": a small one; "sent": a byte sent in large ones,
    and one received; "thread": handing work to a thread; and of a session, "prep" from its first batch of
    material to the last, without planning, and "online" from its first token to the last.

    Takes some seconds. Raises `LocalError` if the processes fail.
    """
    words = [sys.executable, "-m", "mimir.loopback", str(repetitions)]
    with tempfile.TemporaryFile() as errors:
        children = [
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            for _ in range(PARTIES)
        ]

        def hear() -> list[Any]:
            lines = [child.stdout.readline() for child in children if child.stdout]
            if not all(lines):
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                raise LocalError(
                    f"measuring three parties on loopback failed: {' '.join(last) or 'it ended'}"
                )
            return [json.loads(line) for line in lines]

        try:
            places = hear()
            for number, child in enumerate(children):
                assert child.stdin
                with suppress(BrokenPipeError):  # `hear` tells why
                    child.stdin.write(json.dumps({"party": number, "places": places}) + "\n")
                    child.stdin.flush()
            told = hear()
        finally:
            for child in children:  # they leave at the end of their input: none before all have told
                with suppress(BrokenPipeError):
                    child.communicate()
    return [
        {name: sum(t[i][name] for t in told) / PARTIES for name in told[0][i]} for i in range(repetitions)
    ]


# --- one of the three ---------------------------------------------------------------------------------------


class _Zeros:
    """Weights."""

    def __init__(self, spec: PlanSpec) -> None:
        self._tensors = {
            t.name: (np.zeros(t.shape, t.dtype), np.zeros(t.shape, t.dtype)) for t in tensors_of(spec)
        }

    def pair(self, name: str) -> Any:
        return self._tensors[name]


class _Client:
    """Gives a prompt of zeros once all material is there, and notes when what came."""

    key = KEY

    def __init__(self) -> None:
        self._prepared = trio.Event()
        self._send, self._receive = trio.open_memory_channel[Message](8)
        self.made: list[float] = []
        self.tokens: list[float] = []

    async def send(self, message: Mapping[str, Any]) -> None:
        match message["t"]:
            case "masks":
                names = {name: bytes(len(raw) // 2) for name, raw in message["names"].items()}
                await self._send.send({"t": "offsets", "turn": message["turn"], "names": names})
            case "token":
                self.tokens.append(time.process_time())
            case "progress" if message["phase"] == "preprocessing":
                self.made.append(time.process_time())
                if message["done"] >= BUCKET + TOKENS - 1:
                    self._prepared.set()
            case "done":
                await self._send.send({"t": "close"})

    async def receive(self, timeout: float | None = None) -> Message:
        await self._prepared.wait()
        return await self._receive.receive()


class Lanes:
    """Opens lanes of this party's shared actors, which are set before sessions: the leader asks for them."""

    def __init__(self, transport: Transport) -> None:
        self.actors: Sequence[SharedActor[Any, Any]] = ()
        transport.on_request(OPEN_LANE, self._open)

    async def _open(self, peer: int, body: Mapping[str, Any]) -> dict[str, Any]:
        (actor,) = (a for a in self.actors if a.WORK == body["work"])
        actor.renew(peer, bytes.fromhex(body["lane"]))
        return {}


class _Timed(SessionActor):
    planning = 0.0

    def _demand(self, step: Step) -> Any:
        before = time.thread_time()
        try:
            return super()._demand(step)
        finally:
            self.planning += time.thread_time() - before


async def _session(transport: Transport, lanes: Lanes, number: int) -> dict[str, float]:
    name = number.to_bytes(16, "big")
    weights, client = _Zeros(SPEC), _Client()
    decoder = DecodeActor(
        transport, MODEL, sized(SPEC, SPEC.context), weights, SETTINGS, most=1, round_seconds=60.0
    )
    producer = SharedProducer(transport, MODEL, weights, round_seconds=60.0)
    lanes.actors = decoder, producer
    terms = Open(name, MODEL, (KEY,), (BUCKET,), TOKENS, Sampler(), False)
    actor = _Timed(transport, terms, [client], SPEC, weights, SETTINGS, LIMITS, decoder, producer)
    planned: list[float] = []
    made = actor._made

    async def noted(positions: int) -> None:
        planned.append(actor.planning)
        await made(positions)

    with mock.patch.object(actor, "_made", noted):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(decoder.run)
            nursery.start_soon(producer.run)
            await actor.run()
            nursery.cancel_scope.cancel()
    planning = planned[-1] - planned[0]
    return {
        "prep": client.made[-1] - client.made[0] - planning,
        "online": client.tokens[-1] - client.tokens[0],
    }


async def _each(work: Callable[[], Awaitable[Any]], count: int) -> float:
    """Processor seconds of one of so many calls."""
    await work()
    before = time.process_time()
    for _ in range(count):
        await work()
    return (time.process_time() - before) / count


async def _rounds(transport: Transport, number: int) -> dict[str, float]:
    channel = transport.channel((1 << 64 | number).to_bytes(16, "big"), "online")
    channel.timeout = UP_SECONDS
    following, previous = (transport.party + 1) % PARTIES, (transport.party - 1) % PARTIES

    def round_of(size: int) -> Callable[[], Awaitable[Any]]:
        payload, digest = [memoryview(bytes(size))], bytes(DIGEST)

        async def one() -> None:
            await channel.round(
                "round", {previous: payload, following: digest}, {following: size, previous: DIGEST}
            )

        return one

    small = await _each(round_of(SMALL_FRAME), ROUNDS)
    bulk = await _each(round_of(BULK), BULK_ROUNDS)
    await channel.aclose()
    return {"round": small, "sent": max(0.0, bulk - small) / (BULK - SMALL_FRAME)}


async def _measured(transport: Transport, repetitions: int) -> list[dict[str, float]]:
    lanes = Lanes(transport)
    await _session(transport, lanes, 0)  # makes the tables that a party makes once
    out = []
    for number in range(1, repetitions + 1):
        told = await _session(transport, lanes, number) | await _rounds(transport, number)
        told["thread"] = await _each(lambda: trio.to_thread.run_sync(int), HANDOVERS)
        out.append(told)
    return out


async def _party(repetitions: int) -> None:
    from mimir.net.identity import Identity, parse_public
    from mimir.net.mesh import PeerAt, open_listeners, open_mesh  # not in the process that predicts

    identity = Identity.generate()
    listeners = await open_listeners("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    _say({"public": identity.public_hex, "port": port})
    told = json.loads(sys.stdin.readline())
    me = told["party"]
    peers = [
        PeerAt(i, "127.0.0.1", place["port"], parse_public(place["public"]))
        for i, place in enumerate(told["places"])
        if i != me
    ]
    with trio.fail_after(ALL_SECONDS):
        async with open_mesh(
            party=me,
            identity=identity,
            peers=peers,
            config_digest=bytes(32),
            listen=listeners,
            protected=False,
        ) as mesh:
            await mesh.wait_up(UP_SECONDS)
            _say(await _measured(mesh, repetitions))
            await trio.to_thread.run_sync(sys.stdin.read)


def _say(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    trio.run(_party, int(sys.argv[1]))
