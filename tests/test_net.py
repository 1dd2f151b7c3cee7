"""Channels over memory and TCP, the wire's decoder, identities, and attacks on the handshake."""

from __future__ import annotations

import errno
import gc
import os
import random
import re
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mimir.errors import AbortError, BadInput, LocalError, MimirError, PeerError
from mimir.net import LANES, mesh, wire
from mimir.net.identity import (
    BadSignature,
    Handshake,
    HandshakeError,
    Identity,
    exchange_public,
    parse_public,
    verify,
)
from mimir.net.memory import MemoryNet, Tapped
from mimir.net.mesh import Mesh, PeerAt, open_listeners, open_mesh

pytestmark = [  # what is left open is an error here; `run` has it noticed by the test that left it
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
PARTIES = 3
CONFIG = bytes(range(32))
PATIENCE = 20.0  # seconds of real time in which a loopback test must be over
SOON = 0.2  # a round's deadline where a test waits for it


# --- the two transports, behind one face -----------------------------------------------------------------


class World:
    """Three parties joined somehow."""

    kind: str

    def party(self, i: int) -> Any:
        raise NotImplementedError

    def cut(self, a: int, b: int) -> None:
        raise NotImplementedError

    async def kill(self, i: int) -> None:
        raise NotImplementedError

    def channels(self, session: bytes, lane: str = "online", timeout: float = PATIENCE) -> list[Any]:
        out = []
        for i in range(PARTIES):
            channel = self.party(i).channel(session, lane)
            channel.timeout = timeout
            out.append(channel)
        return out

    async def up(self) -> None:
        for i in range(PARTIES):
            await self.party(i).wait_up(PATIENCE)


class MemoryWorld(World):
    kind = "memory"

    def __init__(self) -> None:
        self.net = MemoryNet(PARTIES)

    def party(self, i: int) -> Any:
        return self.net.party(i)

    def cut(self, a: int, b: int) -> None:
        self.net.cut(a, b)

    async def kill(self, i: int) -> None:
        self.net.kill(i)


class TcpWorld(World):
    kind = "tcp"

    def __init__(self) -> None:
        self.meshes: list[Mesh] = []
        self.ends: list[trio.CancelScope] = []

    def party(self, i: int) -> Any:
        return self.meshes[i]

    def cut(self, a: int, b: int) -> None:
        self.meshes[a].cut(b)

    async def kill(self, i: int) -> None:
        self.ends[i].cancel()
        await trio.sleep(0)


@asynccontextmanager
async def memory_world() -> AsyncIterator[World]:
    yield MemoryWorld()


IDENTITIES = [Identity.generate() for _ in range(PARTIES)]


LEFT: list[trio.socket.SocketType] = []  # what a test itself opened; `run` closes it


async def dial(place: PeerAt) -> trio.SocketStream:
    """A connection of the test's own."""
    stream = await trio.open_tcp_stream(place.host, place.port)
    LEFT.append(stream.socket)
    return stream


async def ports(n: int = PARTIES) -> tuple[list[list[trio.SocketListener]], list[PeerAt]]:
    """Open listeners, and where everyone is."""
    listeners = [await open_listeners("127.0.0.1", 0) for _ in range(n)]
    LEFT.extend(listener.socket for group in listeners for listener in group)
    places = [
        PeerAt(i, "127.0.0.1", listeners[i][0].socket.getsockname()[1], IDENTITIES[i].public)
        for i in range(n)
    ]
    return listeners, places


@asynccontextmanager
async def tcp_world() -> AsyncIterator[World]:
    world = TcpWorld()
    listeners, places = await ports()

    async def one(i: int, task_status: trio.TaskStatus[Mesh]) -> None:
        with trio.CancelScope() as scope:
            world.ends.append(scope)
            async with open_mesh(
                party=i,
                identity=IDENTITIES[i],
                peers=[p for p in places if p.party != i],
                config_digest=CONFIG,
                listen=listeners[i],
            ) as made:
                task_status.started(made)
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for i in range(PARTIES):
            world.meshes.append(await nursery.start(one, i))
        await world.up()
        yield world
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["memory", "tcp"])
def world(request: pytest.FixtureRequest) -> Callable[[], AbstractAsyncContextManager[World]]:
    return memory_world if request.param == "memory" else tcp_world


Worlds = Callable[[], AbstractAsyncContextManager[World]]


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's body; nothing on loopback takes longer than PATIENCE."""

    async def body() -> None:
        try:
            with trio.fail_after(2 * PATIENCE):
                await test()
        finally:
            for sock in LEFT:
                sock.close()
            LEFT.clear()

    trio.run(body)
    gc.collect()  # so that a socket that was left open fails the test that left it


def in_world(world: Worlds, test: Callable[[World], Awaitable[None]]) -> None:
    async def body() -> None:
        async with world() as w:
            with trio.fail_after(2 * PATIENCE):
                await test(w)

    if world is memory_world:
        trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    else:
        trio.run(body)


async def together(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run all at once; what each returned, or the MimirError it raised."""
    out: list[Any] = [None] * len(calls)

    async def one(i: int) -> None:
        try:
            out[i] = await calls[i]()
        except MimirError as exc:
            out[i] = exc

    async with trio.open_nursery() as nursery:
        for i in range(len(calls)):
            nursery.start_soon(one, i)
    return out


def others(i: int) -> list[int]:
    return [j for j in range(PARTIES) if j != i]


def say(sender: int, receiver: int, n: int, size: int) -> bytes:
    """What `sender` tells `receiver` in round n."""
    return random.Random(f"{sender} {receiver} {n} {size}").randbytes(size)


def one_round(channel: Any, n: int, size: int = 20, step: str | None = None) -> Callable[[], Awaitable[Any]]:
    i = channel.party

    async def call() -> Any:
        got = await channel.round(
            step or f"step/{n}",
            {j: say(i, j, n, size) for j in others(i)},
            dict.fromkeys(others(i), size),
        )
        assert {j: bytes(got[j]) for j in got} == {j: say(j, i, n, size) for j in others(i)}
        return "ok"

    return call


async def all_ok(channels: list[Any], n: int, size: int = 20) -> None:
    assert await together(*(one_round(c, n, size) for c in channels)) == ["ok"] * PARTIES


# --- one suite over both transports ----------------------------------------------------------------------


def test_rounds_deliver_every_payload_in_order_and_count_bytes(world: Worlds, seed: int) -> None:
    sizes = [0, 1, 7, 4096, 65536, 70000, 1 << 20, *(random.Random(seed).randrange(9000) for _ in range(30))]

    async def test(w: World) -> None:
        channels = w.channels(b"s" * 16)

        def party(channel: Any) -> Callable[[], Awaitable[str]]:
            async def call() -> str:
                for n, size in enumerate(sizes):
                    await one_round(channel, n, size)()
                return "ok"

            return call

        assert await together(*map(party, channels)) == ["ok"] * PARTIES
        for c in channels:
            assert (c.rounds, c.sent, c.received) == (len(sizes), channels[0].sent, channels[0].sent)
            assert c.sent > 2 * sum(sizes)
        counts.append(channels[0].sent)

    counts: list[int] = []
    in_world(world, test)
    in_world(memory_world, test)
    assert counts[0] == counts[1]  # memory counts what TCP carries


def test_pieces_arrays_and_lengths_that_differ_by_peer(world: Worlds) -> None:
    array = np.arange(6, dtype=np.uint64).reshape(2, 3)

    async def test(w: World) -> None:
        a, b, c = w.channels(b"s" * 16)
        many = [bytes([k % 256]) for k in range(1500)]  # more pieces than one system call takes
        got = await together(
            lambda: a.round("x", {1: [array, b"", bytearray(b"ab")], 2: many}, {1: 3, 2: 0}),
            lambda: b.round("x", {0: b"xyz", 2: memoryview(b"q")}, {0: 50, 2: 5}),
            lambda: c.round("x", {0: np.zeros((0, 4)), 1: (b"he", b"llo")}, {0: 1500, 1: 1}),
        )
        assert got[0] == {1: b"xyz", 2: b""}
        assert got[1] == {0: array.tobytes() + b"ab", 2: b"hello"}
        assert got[2] == {0: b"".join(many), 1: b"q"}
        got[1][0][0] = 9  # what arrives is the receiver's own, writable memory
        assert array[0, 0] == 0

    in_world(world, test)


def test_wrong_length_names_party_step_and_both_lengths(world: Worlds) -> None:
    async def test(w: World) -> None:
        a, b, c = w.channels(b"s" * 16, timeout=SOON)
        got = await together(
            one_round(a, 1),
            lambda: b.round("step/1", {0: b"abc", 2: say(1, 2, 1, 20)}, {0: 20, 2: 20}),
            one_round(c, 1),
        )
        assert isinstance(got[0], PeerError) and (got[0].party, got[0].step) == (1, "step/1")
        assert "3 bytes" in got[0].why and "20" in got[0].why
        assert got[2] == "ok"

    in_world(world, test)


def test_wrong_step_prints_both_paths(world: Worlds) -> None:
    async def test(w: World) -> None:
        a, b, c = w.channels(b"s" * 16, timeout=SOON)
        got = await together(one_round(a, 1), one_round(b, 1), one_round(c, 1, step="layer/9/softmax"))
        for i in (0, 1):
            assert isinstance(got[i], PeerError) and got[i].party == 2
            assert "'layer/9/softmax'" in str(got[i]) and "'step/1'" in str(got[i])

    in_world(world, test)


def test_a_silent_peer_is_named_within_the_deadline(world: Worlds) -> None:
    async def test(w: World) -> None:
        a, b, _c = w.channels(b"s" * 16, timeout=SOON)
        start = trio.current_time()
        got = await together(one_round(a, 1), one_round(b, 1))
        assert trio.current_time() - start < SOON + 2
        for e in got:
            assert (
                isinstance(e, PeerError)
                and (e.party, e.step) == (2, "step/1")
                and "silent for 0.2 s" in e.why
            )
        with pytest.raises(PeerError):  # and the channel stays dead
            await one_round(a, 2)()

    in_world(world, test)


def test_both_peers_silent_are_both_named(world: Worlds) -> None:
    async def test(w: World) -> None:
        with pytest.raises(PeerError, match=r"party 0.*silent.*party 2"):
            channel = w.party(1).channel(b"s" * 16, "prep")
            channel.timeout = SOON
            await one_round(channel, 1)()

    in_world(world, test)


def test_deadlines_ring_for_each_round_in_its_turn(world: Worlds) -> None:
    """One that comes after a later one, one that outlasts it, and one after both have rung."""

    async def test(w: World) -> None:
        names = [bytes([n]) * 16 for n in range(4)]
        await all_ok(w.channels(names[0]), 0)  # of the usual deadline, and in time
        ended: list[float] = []

        async def alone(name: bytes, seconds: float) -> None:
            channel = w.party(1).channel(name, "online")
            channel.timeout = seconds
            with pytest.raises(PeerError, match=f"silent for {seconds:g} s"):
                await one_round(channel, 1)()
            ended.append(seconds)

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(alone, names[1], 2 * SOON)
                nursery.start_soon(alone, names[2], SOON)
            await alone(names[3], SOON / 2)
        assert ended == [SOON, 2 * SOON, SOON / 2]

    in_world(world, test)


def test_a_peer_that_dies_in_a_round_is_named_at_once(world: Worlds) -> None:
    async def test(w: World) -> None:
        a, b, c = w.channels(b"s" * 16)
        await all_ok([a, b, c], 0)

        async def die() -> None:
            await trio.sleep(0.05)
            await w.kill(2)

        start = trio.current_time()
        got = await together(one_round(a, 1), one_round(b, 1), die)
        assert trio.current_time() - start < PATIENCE / 2
        assert all(isinstance(e, PeerError) and e.party == 2 for e in got[:2])
        assert not w.party(0).up(2)
        with pytest.raises(PeerError):
            await one_round(w.party(0).channel(b"t" * 16, "online"), 0)()
        with pytest.raises(PeerError):
            w.party(0).link_secret(2, b"t" * 16, "x")
        with pytest.raises(PeerError, match=r"party 2.*not up"):
            await w.party(0).wait_up(SOON)

    in_world(world, test)


def test_after_a_cut_old_sessions_are_dead_and_new_ones_work(world: Worlds) -> None:
    async def test(w: World) -> None:
        old = w.channels(b"s" * 16)
        await all_ok(old, 0)
        w.party(0).link_secret(1, b"l" * 16, "x")
        w.party(1).link_secret(0, b"l" * 16, "x")
        w.cut(0, 1)
        await trio.sleep(0.05)
        await w.up()
        got = await together(*(one_round(c, 1) for c in old[:2]))
        assert [(type(e), e.party) for e in got] == [(PeerError, 1), (PeerError, 0)]
        await old[0].abort()
        # A session that only drew a secret before the cut is dead too: its ends would hold different keys.
        with pytest.raises(PeerError):
            await one_round(w.party(0).channel(b"l" * 16, "online"), 0)()
        new = w.channels(b"n" * 16)
        for n in range(3):
            await all_ok(new, n)

    in_world(world, test)


def test_abort_reaches_current_and_later_rounds_on_all_lanes_of_its_session_only(world: Worlds) -> None:
    async def test(w: World) -> None:
        online, prep = w.channels(b"s" * 16), w.channels(b"s" * 16, "prep")
        other = w.channels(b"o" * 16)
        await all_ok(online, 0)

        async def abort() -> None:
            await trio.sleep(0.05)
            await online[2].abort("check failed")

        start = trio.current_time()
        got = await together(one_round(online[0], 1), one_round(prep[1], 0), abort)
        assert trio.current_time() - start < PATIENCE / 2
        assert all(
            isinstance(e, AbortError) and "party 2" in str(e) and "check failed" in str(e) for e in got[:2]
        )
        for channel in (*online, *prep):
            with pytest.raises((AbortError, LocalError)):
                await one_round(channel, 2)()
        with pytest.raises(AbortError):  # a lane opened late does not revive it
            await one_round(w.party(0).channel(b"s" * 16, "control"), 0)()
        await all_ok(other, 0)

    in_world(world, test)


def test_the_end_of_a_channel_is_told_between_rounds(world: Worlds) -> None:
    """By the abort of a peer, whether one listens then or later; other sessions hear nothing."""

    async def test(w: World) -> None:
        some, other = w.channels(b"s" * 16, "prep"), w.channels(b"o" * 16)
        await all_ok(some, 0)
        heard: list[Exception] = []

        async def listen(channel: Any) -> None:
            try:
                await channel.failed()
            except Exception as error:
                heard.append(error)

        async with trio.open_nursery() as nursery:
            for channel in (some[0], some[1], other[0]):
                nursery.start_soon(listen, channel)
            await trio.sleep(0.05)
            assert not heard
            await some[2].abort("check failed")
            with trio.fail_after(PATIENCE / 2):
                while len(heard) < 2:
                    await trio.sleep(0.01)
                await listen(some[0])
            nursery.cancel_scope.cancel()
        assert len(heard) == 3
        assert all(isinstance(e, AbortError) and "check failed" in str(e) for e in heard)

    in_world(world, test)


def test_abort_before_a_peer_has_opened_its_end(world: Worlds) -> None:
    async def test(w: World) -> None:
        await w.party(0).channel(b"s" * 16, "online").abort()
        await trio.sleep(0.1)
        with pytest.raises(AbortError):
            await one_round(w.party(1).channel(b"s" * 16, "online"), 0)()

    in_world(world, test)


def test_sessions_and_lanes_interleave(world: Worlds, seed: int) -> None:
    rng = random.Random(seed)
    talks = [(bytes([k]) * 16, lane) for k in range(4) for lane in ("online", "prep", "prep:pool", "control")]
    plans = {t: [rng.choice([0, 10, 5000, 300_000]) for _ in range(6)] for t in talks}

    async def test(w: World) -> None:
        def talk(i: int, session: bytes, lane: str) -> Callable[[], Awaitable[str]]:
            pause = random.Random(f"{seed} {i} {session!r} {lane}")

            async def call() -> str:
                await trio.sleep(pause.random() * 0.02)  # ends are opened at different times
                channel = w.party(i).channel(session, lane)
                channel.timeout = PATIENCE
                for n, size in enumerate(plans[session, lane]):
                    await one_round(channel, n, size)()
                    if pause.random() < 0.3:
                        await trio.sleep(pause.random() * 0.01)
                await channel.aclose()
                return "ok"

            return call

        calls = [talk(i, *t) for i in range(PARTIES) for t in talks]
        assert await together(*calls) == ["ok"] * len(calls)

    in_world(world, test)


def test_large_frames_from_all_to_all_do_not_deadlock(world: Worlds) -> None:
    size = 32 << 20
    payload = bytes(size)

    async def test(w: World) -> None:
        def call(c: Any) -> Callable[[], Awaitable[Any]]:
            return lambda: c.round(
                "big", dict.fromkeys(others(c.party), payload), dict.fromkeys(others(c.party), size)
            )

        channels = w.channels(b"s" * 16, "prep")
        for _ in range(2):
            for got in await together(*map(call, channels)):
                assert {j: len(p) for j, p in got.items()} == dict.fromkeys(got, size)
        await all_ok(channels, 9)

    in_world(world, test)


def test_a_cancelled_round_kills_its_channel_and_nothing_else(world: Worlds) -> None:
    """Cancelled with a frame half sent: the rest goes out as it was, whatever happens to the buffer."""
    size = 24 << 20

    async def test(w: World) -> None:
        cut_off, alive = w.channels(b"s" * 16), w.channels(b"a" * 16)
        for n in range(2):
            await all_ok(alive, n)
        buffer = bytearray(b"\x11" * size)
        with trio.move_on_after(0.1) as scope:
            await cut_off[0].round("big", {1: buffer, 2: buffer}, {1: 1, 2: 1})
        assert scope.cancelled_caught
        buffer[:] = b"\x22" * size
        with pytest.raises(AbortError, match="broken off"):
            await one_round(cut_off[0], 0)()
        got = await together(
            lambda: cut_off[1].round("big", {0: b".", 2: b"."}, {0: size, 2: 1}),
            lambda: cut_off[2].round("big", {0: b".", 1: b"."}, {0: size, 1: 1}),
            *(one_round(c, 2) for c in alive),
        )
        for result in got[:2]:
            assert bytes(result[0]) == b"\x11" * size
        assert got[2:] == ["ok"] * PARTIES

    in_world(world, test)


def test_whoever_reads_for_others_hands_the_reading_on(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels that wait on one link, cancelled in any order: the last still gets its frame."""
    monkeypatch.setattr(mesh, "HEARTBEAT", 10 * PATIENCE)  # no glance comes to the rescue

    async def test(w: World) -> None:
        talk = w.channels(b"t" * 16)
        for gone in ([0], [1], [0, 1], [3, 0, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3]):
            async with trio.open_nursery() as nursery:
                scopes: dict[int, trio.CancelScope] = {}
                waiting = [w.party(0).channel(bytes([50 + k]) * 16, f"online:{gone}") for k in range(4)]

                async def wait(
                    k: int, waiting: list[Any] = waiting, scopes: dict[int, trio.CancelScope] = scopes
                ) -> None:
                    with trio.CancelScope() as scopes[k]:
                        await waiting[k].round("x", {1: b"", 2: b""}, {1: 0, 2: 0})

                for k in range(4):
                    nursery.start_soon(wait, k)
                    await trio.sleep(0.01)  # the first leads, the others follow

                async def slow(call: Callable[[], Awaitable[Any]]) -> Any:
                    await trio.sleep(0.15)
                    return await call()

                async def cancel(
                    gone: list[int] = gone, scopes: dict[int, trio.CancelScope] = scopes
                ) -> None:
                    await trio.sleep(0.05)
                    for k in gone:
                        scopes[k].cancel()

                n = talk[0].rounds
                got = await together(
                    one_round(talk[0], n),
                    *(lambda c=c, n=n: slow(one_round(c, n)) for c in talk[1:]),
                    cancel,
                )
                assert got[:3] == ["ok"] * PARTIES
                nursery.cancel_scope.cancel()

    in_world(world, test)


def test_misuse_is_our_own_error(world: Worlds) -> None:
    async def test(w: World) -> None:
        a, _b, _c = w.channels(b"s" * 16)
        ok, none = {1: b"", 2: b""}, {1: 0, 2: 0}
        for args in (
            ("x", {1: b""}, none),
            ("x", ok, {1: 0}),
            ("x", ok, {1: 0, 2: -1}),
            ("x", ok, {1: 0, 2: wire.MAX_PAYLOAD + 1}),
            ("", ok, none),
            ("x" * (wire.MAX_STEP + 1), ok, none),
            ("a\nb", ok, none),
            ("x", {1: "text", 2: b""}, none),
            ("x", {1: np.zeros((4, 4))[:, 1], 2: b""}, none),
        ):
            with pytest.raises(LocalError):
                await a.round(*args)
        with pytest.raises(LocalError, match="before"):
            w.party(0).channel(b"s" * 16, "online")
        for session, lane in (
            (b"short", "online"),
            (b"x" * 16, "offline"),
            (b"x" * 16, "onlinex"),
            (b"x" * 16, "prep:\n"),
        ):
            with pytest.raises(LocalError):
                w.party(0).channel(session, lane)
        with pytest.raises(LocalError):
            w.party(0).link_secret(0, b"s" * 16, "x")

        async def end_it() -> None:
            await trio.sleep(0.05)
            await a.abort()

        got = await together(one_round(a, 0), one_round(a, 0), end_it)
        assert any(isinstance(e, LocalError) and "still running" in str(e) for e in got)

    in_world(world, test)


def test_a_closed_channel_drops_late_frames_and_stays_closed(world: Worlds) -> None:
    async def test(w: World) -> None:
        closed, alive = w.channels(b"s" * 16, timeout=SOON), w.channels(b"s" * 16, "prep")
        await closed[0].aclose()
        got = await together(*(one_round(c, 0) for c in closed), *(one_round(c, 0) for c in alive))
        assert isinstance(got[0], LocalError) and "closed" in str(got[0])
        assert all(isinstance(e, PeerError) and e.party == 0 for e in got[1:3])
        assert got[3:] == ["ok"] * PARTIES
        with pytest.raises(LocalError):
            w.party(0).channel(b"s" * 16, "online")

    in_world(world, test)


def test_a_late_party_finds_the_frames_that_came_early(world: Worlds) -> None:
    async def test(w: World) -> None:
        a, b = (w.party(i).channel(b"s" * 16, "online") for i in (0, 1))

        async def late() -> Any:
            await trio.sleep(0.1)
            return await one_round(w.party(2).channel(b"s" * 16, "online"), 0)()

        assert await together(one_round(a, 0), one_round(b, 0), late) == ["ok"] * PARTIES

    in_world(world, test)


def test_link_secrets_agree_at_both_ends_and_nowhere_else(world: Worlds) -> None:
    async def test(w: World) -> None:
        def secret(a: int, b: int, session: bytes = b"s" * 16, label: str = "prf") -> bytes:
            with w.party(a).link_secret(b, session, label) as s, s.reveal_to_kernel() as view:
                raw: bytes = bytes(view)
                return raw

        pairs = [(0, 1), (1, 2), (0, 2)]
        for a, b in pairs:
            assert secret(a, b) == secret(b, a)
        seen = [
            secret(a, b, s, label)
            for a, b in pairs
            for s in (b"s" * 16, b"t" * 16)
            for label in ("prf", "prg")
        ]
        assert len(set(seen)) == len(seen) and all(len(s) == 32 for s in seen)

    in_world(world, test)


def test_requests_are_answered_or_refused_with_public_words_only(world: Worlds) -> None:
    async def test(w: World) -> None:
        async def answer(peer: int, body: dict[str, Any]) -> dict[str, Any]:
            return {"peer": peer, "twice": body["x"] * 2, "raw": b"\x00\xff"}

        async def bad(peer: int, body: dict[str, Any]) -> dict[str, Any]:
            raise BadInput("no such model here")

        async def broken(peer: int, body: dict[str, Any]) -> dict[str, Any]:
            raise LocalError("internal words")

        async def slow(peer: int, body: dict[str, Any]) -> dict[str, Any]:
            await trio.sleep_forever()
            return {}

        for kind, handler in (("answer", answer), ("bad", bad), ("broken", broken), ("slow", slow)):
            w.party(1).on_request(kind, handler)
        with pytest.raises(LocalError):
            w.party(1).on_request("bad", bad)
        ask = w.party(2).request
        assert await ask(1, "answer", {"x": 21}, 5) == {"peer": 2, "twice": 42, "raw": b"\x00\xff"}
        for kind, words in (
            ("bad", "refused: no such model here"),
            ("broken", "refused: failed"),
            ("answer", "refused: failed"),  # a body without what the handler looks for: KeyError there
            ("nothing", "unknown kind"),
        ):
            with pytest.raises(PeerError, match=words):
                await ask(1, kind, {}, 5)
        with pytest.raises(PeerError, match=r"silent for 0\.2 s"):
            await ask(1, "slow", {}, SOON)
        with pytest.raises(LocalError):
            await ask(1, "answer", {"x": object()}, 5)
        with pytest.raises(LocalError):
            await ask(1, "answer", {"x": bytes(wire.MAX_BODY)}, 5)
        assert (await ask(1, "answer", {"x": 1}, 5))["twice"] == 2
        await w.kill(1)
        await trio.sleep(0.1)
        with pytest.raises(PeerError):
            await ask(1, "answer", {"x": 1}, 5)

    in_world(world, test)


# --- a dishonest sender, in memory -----------------------------------------------------------------------


def cheat(change: Callable[[Tapped], Any]) -> Any:
    """Party 1's second frame to party 2 is changed; what party 2 makes of three rounds."""
    found: list[Any] = []

    def tap(frame: Tapped) -> Any:
        if (frame.sender, frame.receiver, frame.seq) == (1, 2, 1):
            return change(frame)
        return None

    async def body() -> None:
        net = MemoryNet(PARTIES, tap)

        async def party(i: int) -> None:
            channel = net.channel(i, b"s" * 16, "online")
            channel.timeout = SOON
            try:
                for n in range(3):
                    got = await channel.round(
                        f"step/{n}", dict.fromkeys(others(i), b"abc"), dict.fromkeys(others(i), 3)
                    )
                    if i == 2:
                        found.append(bytes(got[1]))
            except MimirError as exc:
                if i == 2:
                    found.append(exc)

        async with trio.open_nursery() as nursery:
            for i in range(PARTIES):
                nursery.start_soon(party, i)

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    return found


def test_the_tap_sees_all_and_can_do_all() -> None:
    def frame_of(f: Tapped, **changes: Any) -> list[wire.Data]:
        return [replace(wire.Data(f.session, f.lane, f.seq, f.step, f.payload), **changes)]

    assert cheat(lambda f: None) == [b"abc"] * 3
    assert cheat(lambda f: [b"xyz"]) == [b"abc", b"xyz", b"abc"]  # content is the protocol's to check
    gone = "silent|frame 2 .* where frame 1"  # the others may go on without us, one round
    for change, words in (
        (lambda f: [], gone),
        (lambda f: [b"ab"], "2 bytes"),
        (lambda f: [f.payload, f.payload], "frame 1 .* where frame 2"),
        (lambda f: frame_of(f, seq=2), "frame 2 .* where frame 1"),
        (lambda f: frame_of(f, step="step/7"), "step/7"),
        (lambda f: frame_of(f) + frame_of(f, seq=2) + frame_of(f, seq=3), "before it can have had ours"),
        (lambda f: frame_of(f, lane="prep"), "."),
        (lambda f: frame_of(f, session=b"t" * 16), "."),
    ):
        found = cheat(change)
        error = found[-1]
        assert isinstance(error, PeerError) and error.party == 1, found
        assert re.search(words, str(error)), (words, str(error))
        assert found[:-1] in ([], [b"abc"], [b"abc", b"abc"])


# --- the books -------------------------------------------------------------------------------------------


def data(session: bytes = b"s" * 16, seq: int = 0, lane: str = "online", payload: bytes = b"") -> wire.Data:
    return wire.Data(session, lane, seq, "x", payload)


def test_early_frames_are_bounded_in_number_and_bytes() -> None:
    board = wire.Board(0, (1, 2))
    for k in range(wire.MAX_EARLY_LANES):
        assert board.deliver(1, data(k.to_bytes(16, "big"))) == (None, None)
    # one more: the oldest goes, and its session with it
    assert board.deliver(1, data(b"n" * 16)) == (None, bytes(16))
    dead = board.open(bytes(16), "online")
    with pytest.raises(PeerError, match="more conversations"):
        dead.raise_failure()
    kept = board.open((1).to_bytes(16, "big"), "online")
    assert kept.arrived(1) and kept.failure is None
    # the other peer's room is its own
    assert board.deliver(2, data(b"m" * 16, payload=bytes(wire.MAX_EARLY_BYTES))) == (None, None)
    assert board.deliver(2, data(b"k" * 16, payload=b"1"))[1] == b"m" * 16
    assert board.deliver(2, data(b"j" * 16, payload=bytes(wire.MAX_EARLY_BYTES + 1)))[1] == b"j" * 16


def test_early_frames_other_than_the_first_end_their_session() -> None:
    for frames in ([data(seq=1)], [data(), data()], [data(), data(seq=1)]):
        board = wire.Board(0, (1, 2))
        results = [board.deliver(1, f) for f in frames]
        assert results[-1] == (None, b"s" * 16)
        with pytest.raises(PeerError, match="party 1"):
            board.open(b"s" * 16, "online").raise_failure()
        assert board.deliver(1, data())[1] is None  # what follows is dropped


def test_a_flood_for_dead_sessions_ends_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_STRAY", 10)
    board = wire.Board(0, (1, 2))
    board.end(b"s" * 16, wire.aborted("over"))
    for _ in range(10):
        board.deliver(1, data())
    with pytest.raises(wire.WireError):
        board.deliver(1, data())
    board.deliver(2, data())


def test_forgotten_sessions_are_idle_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_SESSIONS", 8)
    board = wire.Board(0, (1, 2))
    book = board.open(b"keep" * 4, "online")
    for k in range(50):
        board.end(k.to_bytes(16, "big"), wire.aborted("over"))
    assert board.deliver(1, data(b"keep" * 4)) == (book, None)
    for k in range(7):
        board.open((100 + k).to_bytes(16, "big"), "online")
    with pytest.raises(LocalError, match="at once"):
        board.open(b"z" * 16, "online")


# --- the decoder -----------------------------------------------------------------------------------------

words = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40)
u32 = st.integers(0, (1 << 32) - 1)


def exactly(n: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=n, max_size=n)


payloads = st.binary(max_size=3000) | st.integers(0, 200_000).map(bytes)
control_frames = st.one_of(
    st.builds(
        wire.Data,
        exactly(16),
        st.sampled_from(["control", "control:x"]),
        st.integers(0, wire.MAX_SEQUENCE - 1),
        words,
        payloads,
    ),
    st.builds(wire.Abort, exactly(16), words),
    st.builds(wire.Request, u32, words, st.binary(max_size=300)),
    st.builds(wire.Reply, u32, st.booleans(), st.binary(max_size=300)),
    st.just(wire.Ping()),
)
handshake_frames = st.one_of(
    st.builds(
        wire.Hello,
        u32,
        st.integers(0, 255),
        st.integers(0, 255),
        st.sampled_from(LANES),
        st.sampled_from([b"", bytes(32)]),
        *[exactly(32)] * 4,
    ),
    st.builds(wire.Proof, exactly(64), exactly(32)),
    st.builds(wire.Welcome, exactly(32)),
    st.builds(wire.Refuse, words, words),
)


def chunks(raw: bytes, cuts: list[int]) -> Iterator[bytes]:
    at = 0
    for cut in cuts:
        if at >= len(raw):
            return
        yield raw[at : at + cut]
        at += cut
    yield raw[at:]


def decode(state: str, pieces: Any) -> list[wire.Frame]:
    decoder = wire.Decoder(state)
    return [frame for piece in pieces for frame in decoder.feed(piece)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(control_frames, max_size=6), st.lists(st.integers(1, 5000), max_size=30), st.binary(max_size=7)
)
def test_frames_survive_whole_in_pieces_and_with_a_tail(
    frames: list[wire.Frame], cuts: list[int], tail: bytes
) -> None:
    raw = b"".join(wire.encode(f) for f in frames)
    assert decode("control", [raw]) == frames
    assert decode("control", chunks(raw, cuts)) == frames
    if len(raw) < 3000:
        assert decode("control", (raw[k : k + 1] for k in range(len(raw)))) == frames
    tail = wire.MAGIC + tail  # an unfinished frame after the last: too short to be judged
    assert decode("control", [raw + tail[: wire.PREFIX_BYTES - 1]]) == frames


@settings(max_examples=40, deadline=None)
@given(handshake_frames)
def test_handshake_frames_survive_and_belong_to_the_handshake(frame: wire.Frame) -> None:
    raw = wire.encode(frame)
    assert len(raw) <= wire.PREFIX_BYTES + wire.MAX_HEADER
    assert decode("handshake", [raw]) == [frame]
    for lane in LANES:
        with pytest.raises(wire.WireError, match="state"):
            decode(lane, [raw])


def test_a_header_known_from_our_own_round_is_no_pass_to_other_links() -> None:
    board = wire.Board(0, (1, 2))
    book = board.open(b"s" * 16, "online:x")
    sends = dict.fromkeys((1, 2), b"abc")
    (_, head, _), _ = book.begin("x", sends, dict.fromkeys((1, 2), 3))
    header = head[wire.PREFIX_BYTES :]
    assert list(board.headers) == [header]

    def heard(state: str, size: int = 3) -> Iterator[wire.Frame]:
        raw = wire._PREFIX.pack(wire.MAGIC, len(header), size) + header + b"abc"
        return wire.Decoder(state, board.headers).feed(raw)

    assert list(heard("online")) == [wire.Data(b"s" * 16, "online:x", 0, "x", bytearray(b"abc"))]
    for state, why in (("handshake", "state"), ("prep", "lane"), ("control", "lane")):
        with pytest.raises(wire.WireError, match=why):
            list(heard(state))
    with pytest.raises(wire.WireError, match="limit"):
        list(heard("online", wire.MAX_PAYLOAD + 1))
    for peer in (1, 2):
        board.deliver(peer, next(heard("online")))
    book.finish()
    assert not board.headers
    book.begin("y", sends, dict.fromkeys((1, 2), 3))
    book.broken_off()
    assert not board.headers


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_bytes_give_frames_or_the_typed_error(data: st.DataObject) -> None:
    frames = data.draw(st.lists(control_frames | handshake_frames, min_size=1, max_size=3))
    raw = bytearray(b"".join(wire.encode(f) for f in frames))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw) - 1, 600)))
        raw[at] = data.draw(st.integers(0, 255))
    state = data.draw(st.sampled_from(sorted(wire.STATES)))
    held: list[int] = []

    def watched() -> Iterator[wire.Frame]:
        decoder = wire.Decoder(state)
        for piece in chunks(bytes(raw), data.draw(st.lists(st.integers(1, 700), max_size=5))):
            yield from decoder.feed(piece)
            held.append(len(decoder._payload))

    try:
        for frame in watched():
            wire.encode(frame)  # whatever is accepted is something we could have sent
    except wire.WireError:
        pass
    assert max(held, default=0) <= wire.MAX_PAYLOAD


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=wire.MAX_HEADER), st.sampled_from(sorted(wire.STATES)), st.integers(0, 40))
def test_arbitrary_headers_give_frames_or_the_typed_error(header: bytes, state: str, size: int) -> None:
    raw = wire._PREFIX.pack(wire.MAGIC, len(header), size) + header + bytes(size)
    try:
        for frame in decode(state, [raw]):
            wire.encode(frame)
    except wire.WireError:
        pass


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=2000))
def test_arbitrary_bodies_give_maps_or_the_typed_error(raw: bytes) -> None:
    try:
        body = wire.decode_body(raw)
    except wire.WireError:
        return
    assert all(type(k) is str for k in body)


def test_bodies_survive_and_bombs_do_not() -> None:
    body = {"a": 1, "b": b"\x00", "c": "x", "d": [1, 2], "e": {"f": None}}
    assert wire.decode_body(wire.encode_body(body)) == body | {"d": (1, 2)}
    for bomb in (
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 - 1 entries
        b"\x81\xa1a\xdd\xff\xff\xff\xff",  # an array of as many
        b"\x81\xa1a\xc6\xff\xff\xff\xff",  # bytes of that length
        b"\x81\xa1a" + b"\x91" * 4000 + b"\xc0",  # nesting
        b"\x81\xa1a\xd4\x05\x00",  # an extension type
        b"\x81\x01\x02",  # a key that is no string
        b"\x90",
        b"",
        b"\x80\x80",
    ):
        with pytest.raises(wire.WireError):
            wire.decode_body(bomb)


def raw_frame(*fields: Any, size: int = 0, payload: bytes = b"") -> bytes:
    header = wire._pack(fields)
    return wire._PREFIX.pack(wire.MAGIC, len(header), size or len(payload)) + header + payload


BAD = {
    "magic": b"GET / HTTP/1.1\r\n",
    "other magic": b"iM" + wire.encode(wire.Ping())[2:],
    "no header": wire._PREFIX.pack(wire.MAGIC, 0, 0),
    "header too long": wire._PREFIX.pack(wire.MAGIC, wire.MAX_HEADER + 1, 0),
    "payload too long": wire._PREFIX.pack(wire.MAGIC, 5, wire.MAX_PAYLOAD + 1),
    "payload far too long": wire._PREFIX.pack(wire.MAGIC, 5, (1 << 32) - 1),
    "not msgpack": wire._PREFIX.pack(wire.MAGIC, 1, 0) + b"\xc1",
    "two objects": wire._PREFIX.pack(wire.MAGIC, 2, 0) + b"\x91\x05"[::-1],
    "a map": wire._PREFIX.pack(wire.MAGIC, 1, 0) + b"\x80",
    "kind true": raw_frame(True),
    "kind float": raw_frame(5.0),
    "kind unknown": raw_frame(77),
    "kind of the handshake": wire.encode(wire.Welcome(bytes(32))),
    "ping with field": raw_frame(5, 1),
    "ping with payload": raw_frame(5, payload=b"x"),
    "short session": raw_frame(1, bytes(15), "control", 0, "x"),
    "session as text": raw_frame(1, "s" * 16, "control", 0, "x"),
    "unknown lane": raw_frame(1, bytes(16), "fast", 0, "x"),
    "other lane": raw_frame(1, bytes(16), "online", 0, "x"),
    "lane with newline": raw_frame(1, bytes(16), "control:\n", 0, "x"),
    "lane too long": raw_frame(1, bytes(16), "control:" + "x" * wire.MAX_LANE, 0, "x"),
    "sequence below zero": raw_frame(1, bytes(16), "control", -1, "x"),
    "sequence too high": raw_frame(1, bytes(16), "control", wire.MAX_SEQUENCE, "x"),
    "sequence a bool": raw_frame(1, bytes(16), "control", False, "x"),
    "sequence a float": raw_frame(1, bytes(16), "control", 0.0, "x"),
    "empty step": raw_frame(1, bytes(16), "control", 0, ""),
    "step too long": raw_frame(1, bytes(16), "control", 0, "x" * (wire.MAX_STEP + 1)),
    "step that writes to terminals": raw_frame(1, bytes(16), "control", 0, "\x1b[2J"),
    "step as bytes": raw_frame(1, bytes(16), "control", 0, b"x"),
    "a field missing": raw_frame(1, bytes(16), "control", 0),
    "a field more": raw_frame(1, bytes(16), "control", 0, "x", 0),
    "request body too long": raw_frame(3, 1, "x", size=wire.MAX_BODY + 1),
    "reply neither": raw_frame(4, 1, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_frames_are_refused_for_good(name: str) -> None:
    for cut in (len(BAD[name]), 1):
        decoder = wire.Decoder("control")
        with pytest.raises(wire.WireError):
            for k in range(0, len(BAD[name]), cut):
                list(decoder.feed(BAD[name][k : k + cut]))
        assert len(decoder._payload) == 0
        with pytest.raises(wire.WireError):
            list(decoder.feed(wire.encode(wire.Ping())))


def test_frames_do_not_print_their_payload() -> None:
    tapped = Tapped(0, 1, bytes(16), "prep", 0, "x", bytearray(b"secret"))
    for frame in (
        data(payload=b"secret"),
        wire.Request(1, "x", b"secret"),
        wire.Reply(1, True, b"secret"),
        tapped,
    ):
        assert "secret" not in repr(frame) and "secret" not in str(frame)


def test_every_lane_refuses_frames_of_another() -> None:
    for lane in LANES:
        frames = {other: wire.encode(data(lane=other)) for other in LANES}
        assert len(decode(lane, [frames.pop(lane)])) == 1
        for raw in frames.values():
            with pytest.raises(wire.WireError):
                decode(lane, [raw])


# --- identities ------------------------------------------------------------------------------------------


def test_identity_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    at = tmp_path / "identity"
    before = os.umask(0)
    try:
        me = Identity.generate()
        me.save(at)
    finally:
        os.umask(before)
    assert stat.S_IMODE(at.stat().st_mode) == 0o600
    again = Identity.load(at)
    assert again.public == me.public == parse_public(me.public_hex)
    verify(me.public, b"words", again.sign(b"words"))
    with pytest.raises(BadInput, match="exists"):
        me.save(at)
    at.chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        Identity.load(at)
    at.chmod(0o600)
    for text in ("", "junk", "mimir-identity-v1 12", "mimir-identity-v1 " + "g" * 64, "x" * 9000):
        at.write_text(text)
        with pytest.raises(BadInput, match=str(at)):
            Identity.load(at)
    with pytest.raises(BadInput, match="keygen"):
        Identity.load(tmp_path / "none")
    assert me.public_hex[:16] in repr(me) and "seed" not in repr(me)


def test_signatures_and_exchange_keys_belong_to_the_identity() -> None:
    import nacl.bindings

    me, you = IDENTITIES[:2]
    for public, message, signature in (
        (you.public, b"m", me.sign(b"m")),
        (me.public, b"n", me.sign(b"m")),
        (me.public, b"m", bytes(64)),
        (me.public, b"m", b""),
        (bytes(32), b"m", me.sign(b"m")),
    ):
        with pytest.raises(BadSignature):
            verify(public, message, signature)
    with me.exchange_key() as key, key.reveal_to_kernel() as view:
        assert nacl.bindings.crypto_scalarmult_base(bytes(view)) == exchange_public(me.public)
    for text in ("", "ab", "zz" * 32, "ab" * 33, " " + "ab" * 32):
        with pytest.raises(BadInput):
            parse_public(text)
    with pytest.raises(BadInput):
        exchange_public(bytes(32))


# --- the handshake, without sockets ----------------------------------------------------------------------

KEYS = {i: IDENTITIES[i].public for i in range(PARTIES)}
STRANGER = Identity.generate()


def caller(lane: str = "control", generation: bytes = b"", **kw: Any) -> Handshake:
    return end(0, dial=1, lane=lane, generation=generation, **kw)


def called(**kw: Any) -> Handshake:
    return end(1, **kw)


def end(
    party: int,
    *,
    identity: Identity | None = None,
    keys: dict[int, bytes] | None = None,
    config: bytes = CONFIG,
    **kw: Any,
) -> Handshake:
    return Handshake(identity or IDENTITIES[party], party, keys or KEYS, config, **kw)


def altered(frame: Any, **changes: Any) -> Any:
    return replace(frame, **changes)


def converse(
    a: Handshake, b: Handshake, change: Callable[[int, wire.Frame], wire.Frame] = lambda n, f: f
) -> list[wire.Frame]:
    """Carry every message between the two; `change` may replace message n. Raises what an end raises."""
    ends, turn = (b, a), 0
    sent: list[wire.Frame] = []
    frames = a.first()
    while frames:
        answers = []
        for frame in frames:
            frame = change(len(sent), frame)
            sent.append(frame)
            answers += ends[turn].receive(frame)
        frames, turn = answers, 1 - turn
    return sent


def secret_of(hand: Handshake) -> bytes:
    with hand.secret() as s, s.reveal_to_kernel() as view:
        raw: bytes = bytes(view)
        return raw


def test_an_honest_handshake_agrees_and_is_fresh() -> None:
    seen = set()
    for _ in range(3):
        a, b = caller(), called()
        with pytest.raises(LocalError):
            a.secret()
        sent = converse(a, b)
        assert [type(f).__name__ for f in sent] == ["Hello", "Hello", "Proof", "Proof", "Welcome"]
        assert a.done and b.done and (a.peer, b.peer) == (1, 0) and a.transcript == b.transcript
        assert secret_of(a) == secret_of(b)
        one, other = sent[2:4]
        assert isinstance(one, wire.Proof) and isinstance(other, wire.Proof) and one.tag != other.tag
        seen.add(secret_of(a))
    assert len(seen) == 3
    a, b = caller("prep", bytes(32)), called()
    converse(a, b)
    assert (b.lane, b.generation) == ("prep", bytes(32))


@pytest.mark.parametrize(
    ("item", "a", "b"),
    [
        ("config", {"config": bytes(32)}, {}),
        ("identity", {"identity": STRANGER, "keys": {**KEYS, 0: STRANGER.public}}, {}),
        ("identity", {}, {"identity": STRANGER, "keys": {**KEYS, 1: STRANGER.public}}),
        ("identity", {"keys": {**KEYS, 1: STRANGER.public}}, {}),
        ("generation", {"lane": "online"}, {}),
        ("generation", {"generation": bytes(32)}, {}),
    ],
)
def test_disagreement_is_named(item: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    with pytest.raises(HandshakeError) as caught:
        converse(caller(**a), called(**b))
    assert caught.value.item == item
    told = called().refusal(caught.value)
    with pytest.raises(HandshakeError, match=f"{item}: refused by the other end"):
        caller().receive(decode("handshake", [wire.encode(told)])[0])


def test_wrong_numbers_are_refused() -> None:
    def hello_with(**changes: Any) -> Callable[[int, wire.Frame], wire.Frame]:
        return lambda n, f: altered(f, **changes) if n == 0 else f

    for changes, item in (
        ({"version": 99}, "version"),
        ({"sender": 2}, "party"),  # a higher number must not call
        ({"sender": 1}, "party"),  # ourselves
        ({"sender": 7}, "party"),
        ({"receiver": 2}, "receiver"),
    ):
        with pytest.raises(HandshakeError) as caught:
            converse(caller(), called(), hello_with(**changes))
        assert caught.value.item == item
    # another peer answers in the place of the one we called
    with pytest.raises(HandshakeError) as caught:
        converse(end(0, dial=1), end(2), lambda n, f: altered(f, receiver=2) if n == 0 else f)
    assert caught.value.item == "party"
    with pytest.raises(BadInput, match="not the one the configuration gives"):
        end(0, identity=IDENTITIES[1], dial=1)


@pytest.mark.parametrize("item", ["lane", "generation"])
def test_a_peer_that_answers_for_another_connection_is_refused(item: str) -> None:
    """Signed and all, but not about the connection that was asked for."""

    class Liar(Handshake):
        def _hello(self) -> wire.Hello:
            setattr(self, item, "online" if item == "lane" else bytes(32))
            return super()._hello()

    with pytest.raises(HandshakeError) as caught:
        converse(caller("prep", b"g" * 32), Liar(IDENTITIES[1], 1, KEYS, CONFIG))
    assert caught.value.item == item


def test_any_altered_field_is_refused() -> None:
    """Each field of each message in turn: a bit flipped, and no end ever finishes with it."""
    honest = converse(caller(), called())
    tried = 0
    for n, original in enumerate(honest):
        for name in (f.name for f in fields(original) if f.name != "payload"):

            def change(k: int, frame: wire.Frame, n: int = n, name: str = name) -> wire.Frame:
                if k != n:
                    return frame
                value = getattr(frame, name)
                if isinstance(value, bytes):
                    value = value[:-1] + bytes([value[-1] ^ 1]) if value else bytes(32)
                elif isinstance(value, int):
                    value ^= 1
                else:
                    value = "online"
                return replace(frame, **{name: value})

            a, b = caller(), called()
            with pytest.raises(HandshakeError):
                converse(a, b, change)
            assert not a.done  # the end that hears last; the other has sent all it ever will
            tried += 1
    assert tried == 9 + 9 + 2 + 2 + 1


def test_replayed_messages_are_refused() -> None:
    old = converse(caller(), called())

    def swap(n: int, k: int, frame: wire.Frame) -> wire.Frame:
        return old[n] if k == n else frame

    for n in range(len(old)):
        with pytest.raises(HandshakeError):  # one old message in a new run
            converse(caller(), called(), partial(swap, n))
    # the whole of one side replayed to the other
    b = called()
    b.receive(old[0])
    with pytest.raises(HandshakeError, match="signature"):
        b.receive(old[3])
    assert not b.done
    a = caller()
    a.first()
    a.receive(old[1])
    with pytest.raises(HandshakeError, match="signature"):
        a.receive(old[2])


def test_reflected_messages_are_refused() -> None:
    a = caller()
    with pytest.raises(HandshakeError, match="party"):
        a.receive(a.first()[0])  # its own hello
    # the acceptor's own proof sent back to it
    a, b = caller(), called()
    _hello, proof = b.receive(a.first()[0])
    with pytest.raises(HandshakeError, match="signature"):
        b.receive(proof)
    # the called end's hello, made to look like a call
    c = end(1)
    with pytest.raises(HandshakeError):
        c.receive(altered(caller().first()[0], identity=KEYS[1]))


def test_messages_out_of_order_are_refused() -> None:
    honest = converse(caller(), called())
    for wrong in (honest[2], honest[4]):
        with pytest.raises(HandshakeError, match="order"):
            called().receive(wrong)
    b = called()
    b.receive(caller().first()[0])
    with pytest.raises(HandshakeError, match="order"):
        b.receive(caller().first()[0])
    a, b = caller(), called()
    last = converse(a, b)[-1]
    with pytest.raises(HandshakeError, match="order"):
        a.receive(last)


def test_a_relay_with_its_own_fresh_keys_learns_nothing() -> None:
    """Someone in the middle replaces both fresh keys: the signatures are over other hellos."""

    def swap(key: bytes, n: int, frame: wire.Frame) -> wire.Frame:
        return altered(frame, ephemeral=key) if n < 2 else frame

    for key in (os.urandom(32), bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(HandshakeError):
            converse(caller(), called(), partial(swap, key))


def test_a_party_cannot_pass_for_another() -> None:
    """Party 2, with its own key, calls as party 0 or answers as party 1."""
    a = Handshake(IDENTITIES[2], 0, {**KEYS, 0: IDENTITIES[2].public}, CONFIG, dial=1)
    forged = lambda n, f: altered(f, identity=KEYS[0]) if n == 0 else f  # noqa: E731
    with pytest.raises(HandshakeError):
        converse(a, called(), forged)
    b = Handshake(IDENTITIES[2], 1, {**KEYS, 1: IDENTITIES[2].public}, CONFIG)
    with pytest.raises(HandshakeError):
        converse(caller(), b, lambda n, f: altered(f, identity=KEYS[1]) if n == 1 else f)


# --- the mesh under attack -------------------------------------------------------------------------------


@asynccontextmanager
async def lone_mesh(
    party: int = 1, **kw: Any
) -> AsyncIterator[tuple[Mesh, list[PeerAt], list[list[trio.SocketListener]]]]:
    """One honest mesh; the test plays its peers."""
    listeners, places = await ports()
    settings: dict[str, Any] = {"identity": IDENTITIES[party], "config_digest": CONFIG} | kw
    async with open_mesh(
        party=party, peers=[p for p in places if p.party != party], listen=listeners[party], **settings
    ) as made:
        yield made, places, listeners


async def play(stream: trio.abc.Stream, hand: Handshake) -> wire.Decoder:
    """A scripted peer's side of a handshake."""
    decoder = wire.Decoder("handshake")
    for frame in hand.first():
        await stream.send_all(wire.encode(frame))
    while not hand.done:
        raw = await stream.receive_some()
        assert raw, "hung up on"
        for frame in decoder.feed(raw):
            if hand.done:
                continue  # the mesh talks already
            for answer in hand.receive(frame):
                await stream.send_all(wire.encode(answer))
            if hand.done:
                decoder.state = hand.lane
    return decoder


async def call_all_lanes(place: PeerAt) -> dict[str, trio.SocketStream]:
    """Play party 0 and call a mesh on every lane."""
    out = {}
    generation = b""
    for lane in LANES:
        out[lane] = await dial(place)
        hand = end(0, dial=place.party, lane=lane, generation=generation)
        await play(out[lane], hand)
        if lane == "control":
            generation = hand.transcript
    return out


async def answer_all_lanes(listener: trio.SocketListener, party: int) -> dict[str, trio.SocketStream]:
    """Play a party of higher number and let a mesh call on every lane."""
    out: dict[str, trio.SocketStream] = {}
    while len(out) < len(LANES):
        stream = await listener.accept()
        LEFT.append(stream.socket)
        hand = end(party)
        await play(stream, hand)
        out[hand.lane] = stream
    return out


async def hung_up(stream: trio.abc.Stream, within: float = 5) -> bool:
    with trio.move_on_after(within):
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        return True
    return False


def test_strangers_and_garbage_at_the_door_change_nothing() -> None:
    async def test() -> None:
        async with lone_mesh() as (made, places, _):
            with capture_logs() as logs:
                for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), b"", wire.encode(wire.Ping())):
                    stream = await dial(places[1])
                    await stream.send_all(junk)
                    if not junk:
                        await stream.send_eof()
                    assert await hung_up(stream)
                stranger = end(0, identity=STRANGER, keys={**KEYS, 0: STRANGER.public}, dial=1)
                stream = await dial(places[1])
                with pytest.raises(HandshakeError, match="identity: refused by the other end"):
                    await play(stream, stranger)
            assert sum(line["event"] == "connection refused" for line in logs) == 5
            assert any("identity" in line["why"] for line in logs)
            streams = await call_all_lanes(places[1])
            with trio.fail_after(5):
                while not made.up(0):
                    await trio.sleep(0.01)
            # while they stand, more strangers come and nothing happens to the links
            stream = await dial(places[1])
            await stream.send_all(os.urandom(100))
            assert await hung_up(stream)
            assert made.up(0)
            for s in streams.values():
                await s.aclose()

    run(test)


def test_a_lane_cannot_join_another_generation_or_come_twice() -> None:
    async def test() -> None:
        async with lone_mesh() as (made, places, _):
            streams = await call_all_lanes(places[1])
            for lane, generation, item in (("online", bytes(32), "generation"), ("prep", b"known", "lane")):
                known = made._generations[0].ident if generation == b"known" else generation
                stream = await dial(places[1])
                with pytest.raises(HandshakeError, match=f"{item}: refused"):
                    await play(stream, end(0, dial=1, lane=lane, generation=known))
            assert made.up(0)
            assert not await hung_up(streams["online"], within=0.1)

    run(test)


def test_those_who_never_prove_themselves_are_dropped_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "MAX_HANDSHAKES", 2)

    async def test() -> None:
        async with lone_mesh(handshake_deadline=0.5) as (_made, places, _):
            idle = [await dial(places[1]) for _ in range(2)]
            await trio.sleep(0.1)
            start = trio.current_time()
            third = await dial(places[1])
            assert await hung_up(third) and trio.current_time() - start < 0.3
            for stream in idle:
                assert await hung_up(stream)
            await call_all_lanes(places[1])

    run(test)


def test_listeners_are_closed_with_the_mesh_though_nobody_calls_it() -> None:
    async def test() -> None:
        for party in range(PARTIES):
            async with lone_mesh(party) as (_made, _places, listeners):
                assert all(listener.socket.fileno() >= 0 for listener in listeners[party])
            assert all(listener.socket.fileno() < 0 for listener in listeners[party]), party

    run(test)


def test_a_proof_that_comes_when_the_mesh_is_leaving_is_refused() -> None:
    """All links have been cut by then: nobody would close this one."""

    async def test() -> None:
        async with lone_mesh() as (made, places, _):
            made.close()
            stream = await dial(places[1])
            with pytest.raises(HandshakeError, match="generation: refused by the other end"):
                await play(stream, end(0, dial=1))
            assert await hung_up(stream)
            assert not made._generations

    run(test)


def test_a_connection_that_cannot_be_tied_is_refused_and_harms_no_other() -> None:
    failed = False

    def bind(sock: Any) -> None:
        nonlocal failed
        taken = sock.getsockname()[1] != 0  # not one with which the mesh calls its other peer
        if taken and not failed:
            failed = True
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    async def test() -> None:
        with capture_logs() as logs:
            async with lone_mesh(bind=bind) as (made, places, _):
                assert await hung_up(await dial(places[1]))
                streams = await call_all_lanes(places[1])
                with trio.fail_after(5):
                    while not made.up(0):
                        await trio.sleep(0.01)
                for stream in streams.values():
                    await stream.aclose()
        refused = [line for line in logs if line["event"] == "refused a connection"]
        assert [line["why"] for line in refused] == [os.strerror(errno.ENODEV)]

    run(test)


def test_the_mesh_says_why_a_peer_is_not_up() -> None:
    async def test() -> None:
        listeners, places = await ports()
        mine = [p for p in places if p.party != 0]
        async with open_mesh(
            party=0, identity=IDENTITIES[0], peers=mine, config_digest=bytes(32), listen=listeners[0]
        ) as zero:
            async with open_mesh(
                party=1,
                identity=IDENTITIES[1],
                peers=[p for p in places if p.party != 1],
                config_digest=CONFIG,
                listen=listeners[1],
            ):
                with pytest.raises(PeerError, match=r"party 1.*config"):
                    await zero.wait_up(0.5)

    run(test)


def test_only_admitted_parties_get_links() -> None:
    async def test() -> None:
        listeners, places = await ports()
        welcome: dict[int, set[int]] = {0: set(), 1: {0}}
        meshes: dict[int, Mesh] = {}

        async def one(party: int, task_status: trio.TaskStatus[None]) -> None:
            async with open_mesh(
                party=party,
                identity=IDENTITIES[party],
                peers=[p for p in places if p.party != party],
                config_digest=CONFIG,
                listen=listeners[party],
                admitted=lambda peer: peer in welcome[party],
            ) as made:
                meshes[party] = made
                task_status.started()
                await trio.sleep_forever()

        async def until(up: bool) -> None:
            with trio.fail_after(30):
                while meshes[0].up(1) is not up or meshes[1].up(0) is not up:
                    await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            for party in (0, 1):
                await nursery.start(one, party)
            with pytest.raises(PeerError, match=r"party 1 .*it is not admitted"):
                await meshes[0].wait_up(0.1)  # nobody is called who is not admitted
            welcome[0].add(1)
            meshes[0].changed()
            await until(True)
            # The caller still admits its peer, which does not: what it opens is refused.
            welcome[1].clear()
            meshes[1].cut(0, "its verdict has ended")
            await until(False)
            with pytest.raises(PeerError, match="party 1"):
                await meshes[0].request(1, "anything", {}, 1.0)
            with trio.fail_after(30):
                while "party 0 is not admitted here" not in meshes[0]._refused.get(1, ""):
                    await trio.sleep(0.01)
            assert not meshes[0].up(1)
            welcome[1].add(0)
            await until(True)
            nursery.cancel_scope.cancel()

    run(test)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("junk", ["oversized", "magic", "wrong kind", "wrong lane"])
def test_garbage_on_a_link_cuts_it_and_harms_nothing_else(lane: str, junk: str) -> None:
    raw = {
        "oversized": wire._PREFIX.pack(wire.MAGIC, 100, wire.MAX_PAYLOAD + 1),
        "magic": b"\x00" * 64,
        "wrong kind": wire.encode(wire.Proof(bytes(64), bytes(32))),
        "wrong lane": wire.encode(data(lane="online" if lane == "prep" else "prep")),
    }[junk]

    async def test(w: World) -> None:
        assert isinstance(w, TcpWorld)
        zero, one, _two = w.meshes
        channels = w.channels(b"s" * 16)
        await all_ok(channels, 0)
        kept = zero._generations[2]
        with capture_logs() as logs:
            one._generations[0].links[lane]._sock.send(raw)

            async def give_up() -> None:
                with pytest.raises(PeerError, match=r"party 1.*garbage"):
                    await one_round(channels[0], 1)()
                await channels[0].abort()

            got = await together(give_up, one_round(channels[2], 1))
            assert isinstance(got[1], AbortError)  # by word of party 0
            with pytest.raises((PeerError, AbortError)):
                await one_round(channels[1], 1)()
        lines = [line for line in logs if line["event"] == "peer cut off"]
        assert [(line["party"], line["peer"], line["log_level"]) for line in lines] == [(0, 1, "warning")]
        assert lane in lines[0]["why"]
        await w.up()
        assert zero._generations[2] is kept and kept.whole  # the honest link never noticed
        new = w.channels(b"n" * 16)
        for n in range(3):
            await all_ok(new, n)

    in_world(tcp_world, test)


def test_a_wrong_frame_of_one_session_leaves_the_others_alone() -> None:
    async def test(w: World) -> None:
        assert isinstance(w, TcpWorld)
        hurt, alive = w.channels(b"s" * 16, timeout=SOON), w.channels(b"a" * 16)
        await all_ok(hurt, 0)
        link = w.meshes[1]._generations[0].links["online"]
        link.send_small(data(seq=9))  # session s: out of order
        link.send_small(data(b"never opened".ljust(16), seq=3))
        got = await together(
            *(one_round(c, 1) for c in hurt), *(one_round(c, n) for n, c in [(0, c) for c in alive])
        )
        assert isinstance(got[0], PeerError) and got[0].party == 1 and "frame 9" in got[0].why
        assert got[3:] == ["ok"] * PARTIES
        for n in range(1, 4):
            await all_ok(alive, n)

    in_world(tcp_world, test)


def test_garbage_requests_and_answers() -> None:
    async def test(w: World) -> None:
        assert isinstance(w, TcpWorld)
        for frame in (wire.Request(0, "x", b"\xc1"), wire.Reply(77, True, b"\x80")):
            if isinstance(frame, wire.Request):

                async def handler(peer: int, body: dict[str, Any]) -> dict[str, Any]:
                    return {}

                w.meshes[0].on_request("x", handler)
            with capture_logs() as logs:
                w.meshes[1]._generations[0].links["control"].send_small(frame)
                with trio.fail_after(5):
                    while not any(line["event"] == "peer cut off" for line in logs):
                        await trio.sleep(0.01)
            await trio.sleep(0.05)
            await w.up()
        assert await w.meshes[1].request(0, "x", {}, 5) == {}

    in_world(tcp_world, test)


def test_too_many_requests_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "MAX_REQUESTS", 2)
    monkeypatch.setattr(mesh, "HANDLER_DEADLINE", 0.3)

    async def test(w: World) -> None:
        async def slow(peer: int, body: dict[str, Any]) -> dict[str, Any]:
            await trio.sleep_forever()
            return {}

        w.party(0).on_request("slow", slow)
        got = await together(*[lambda: w.party(1).request(0, "slow", {}, 5)] * 3)
        assert sorted("busy" in str(e) for e in got) == [False, False, True]
        assert sum("took too long" in str(e) for e in got) == 2
        assert await together(lambda: w.party(1).request(0, "nothing", {}, 5))

    in_world(tcp_world, test)


def test_a_program_that_hangs_is_noticed_although_its_kernel_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "HEARTBEAT", 0.05)

    async def test() -> None:
        async with lone_mesh(dead_after=0.4) as (made, places, _):
            streams = await call_all_lanes(places[1])
            while not made.up(0):
                await trio.sleep(0.01)
            for _ in range(10):
                await trio.sleep(0.1)
                await streams["control"].send_all(wire.encode(wire.Ping()))
            assert made.up(0)  # a second of pings kept it up
            with trio.fail_after(5):
                while made.up(0):
                    await trio.sleep(0.05)
            with pytest.raises(PeerError, match="there is no link"):
                made.link_secret(0, bytes(16), "x")

    run(test)


def test_a_link_on_which_nobody_waits_is_still_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "HEARTBEAT", 0.05)

    async def test() -> None:
        for last in (b"\x00" * 20, None):
            async with lone_mesh() as (made, places, _):
                streams = await call_all_lanes(places[1])
                while not made.up(0):
                    await trio.sleep(0.01)
                if last is None:
                    await streams["prep"].aclose()
                else:
                    await streams["prep"].send_all(last)
                with trio.fail_after(5):
                    while made.up(0):
                        await trio.sleep(0.02)

    run(test)


def test_a_peer_that_starts_again_replaces_its_old_links() -> None:
    async def test() -> None:
        async with lone_mesh() as (made, places, _):
            old = await call_all_lanes(places[1])
            first = made._generations[0]
            new = await call_all_lanes(places[1])
            assert made._generations[0] is not first and not first.alive
            assert all([await hung_up(s) for s in old.values()])
            assert made.up(0)
            assert not await hung_up(new["prep"], within=0.1)

    run(test)


def test_a_peer_that_speaks_but_does_not_listen_is_named() -> None:
    """Both frames have come, ours does not go out: the round must not wait for ever."""

    async def test() -> None:
        async with lone_mesh() as (made, places, listeners):
            down = await call_all_lanes(places[1])
            up = await answer_all_lanes(listeners[2][0], 2)
            await made.wait_up(5)
            channel = made.channel(b"s" * 16, "prep")
            channel.timeout = 2 * SOON
            for peer in (down, up):
                await peer["prep"].send_all(wire.encode(data(lane="prep")))
            with pytest.raises(PeerError, match="has not taken our frame within"):
                await channel.round("x", {0: bytes(64 << 20), 2: b""}, {0: 0, 2: 0})

    run(test)


def test_an_unprotected_mesh_says_so_loudly() -> None:
    async def test() -> None:
        with capture_logs() as logs:
            async with lone_mesh(protected=False):
                pass
        assert any("NO TUNNEL" in line["event"] and line["log_level"] == "warning" for line in logs)

    run(test)


def test_the_mesh_hands_back_the_error_of_its_block() -> None:
    async def test() -> None:
        with pytest.raises(BadInput, match="mine"):
            async with lone_mesh():
                raise BadInput("mine")

    run(test)


def test_a_port_that_is_taken_is_a_clear_error() -> None:
    async def test() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(MimirError, match=r"cannot listen on 127\.0\.0\.1") as caught:
                await open_listeners("127.0.0.1", taken.getsockname()[1])
            assert caught.value.exit_code == 5

    run(test)


def test_no_payload_is_ever_logged() -> None:
    mark = b"PAYLOAD-MARK"

    async def test(w: World) -> None:
        assert isinstance(w, TcpWorld)
        a, b, c = w.channels(b"s" * 16, timeout=SOON)
        errors = await together(
            lambda: a.round("x", {1: mark, 2: mark}, {1: 12, 2: 12}),
            lambda: b.round("x", {0: mark * 2, 2: mark}, {0: 12, 2: 12}),
            lambda: c.round("x", {0: mark, 1: mark}, {0: 12, 1: 12}),
        )
        said.extend(map(str, errors[:1]))
        w.meshes[1]._generations[0].links["online"]._sock.send(mark * 10)
        await w.meshes[2].channel(b"t" * 16, "online").abort()
        await trio.sleep(1.2)

    said: list[str] = []
    with capture_logs() as logs:
        in_world(tcp_world, test)
    assert logs and "PAYLOAD" not in repr(logs) + repr(said)
