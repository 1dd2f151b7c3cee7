"""The relay of datagrams over streams: its frames, both roles over unix sockets in the place of vsock, and
WireGuard with the relay between its ends (root and /dev/net/tun; skipped without)."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from lab import Enclave, Lab, why_not
from test_admit import steady

from wg import vsock
from wg.errors import TunnelError
from wg.vsock import HEAD, MAX_PAYLOAD, Frame, Frames, RelayError, Streams, head

PORTS = 3


def packed(data: bytes, segment: int = 0, here: int = 0, there: int = 0) -> bytes:
    frame = Frame(memoryview(data), segment or len(data), here, there)
    return head(frame) + data


# --- frames ------------------------------------------------------------------------------------------------


def test_frames_come_out_however_they_are_cut() -> None:
    told = [(os.urandom(32), 32, 0, 2), (os.urandom(MAX_PAYLOAD), 1000, 2, 1), (b"x", 1, 1, 1)]
    whole = b"".join(packed(*each) for each in told)
    for cut in (1, 5, 1000, len(whole)):
        frames, got = Frames(PORTS), []
        for at in range(0, len(whole), cut):
            got += [(bytes(f.data), f.segment, f.here, f.there) for f in frames.feed(whole[at : at + cut])]
        assert got == told
    frames = Frames(PORTS)
    assert len(list(frames.feed(whole + whole[:3]))) == 3
    assert len(list(frames.feed(whole[3:]))) == 3
    assert Frame(memoryview(bytes(2001)), 1000, 0, 0).pieces == 3


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 0, 0, 0),
        (5, 0, 0, 0),
        (0, 5, 0, 0),
        (5, 6, 0, 0),
        (65508, 1500, 0, 0),
        (129, 1, 0, 0),
        (5, 5, 3, 0),
        (5, 5, 0, 3),
    ],
)
def test_what_is_no_frame_is_refused_at_its_head(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(RelayError):
        list(Frames(PORTS).feed(HEAD.pack(*numbers)))


def test_garbage_is_bounded_and_raises_nothing_else() -> None:
    dice = random.Random(3)
    for _ in range(300):
        frames = Frames(PORTS)
        try:
            for _ in range(20):
                for frame in frames.feed(dice.randbytes(dice.randrange(2000))):
                    assert 1 <= frame.pieces <= vsock.MAX_PIECES
                assert len(frames._rest) < HEAD.size + MAX_PAYLOAD
        except RelayError:
            pass


def test_addresses_are_read() -> None:
    assert Streams.parse("3:5005") == Streams(socket.AF_VSOCK, (3, 5005))
    assert Streams.parse("ANY:5005").address == (socket.VMADDR_CID_ANY, 5005)
    for text in ("", "3", "3:", ":5", "x:5", "3:5:6", "-1:5", "3:99999999999", "unix:/tmp/x"):
        with pytest.raises(TunnelError):
            Streams.parse(text)


@pytest.mark.parametrize(
    "more, why",
    [
        (["--peer", "1"], "NUMBER=HOST:PORT"),
        (["--peer", "1=127.0.0.1"], "HOST:PORT"),
        (["--peer", "1=127.0.0.1:5", "--peer", "1=127.0.0.1:50"], "each number once"),
        (["--peer", "1=127.0.0.1:500", "--peer", "2=127.0.0.1:504"], "less than 5 ports apart"),
        (["--peer", "1=127.0.0.1:51822"], "less than 5 ports apart"),
        (["--peer", "1=127.0.0.1:65532"], "5 ports are needed"),
        (["--peer", "300=127.0.0.1:500"], "from 0 to 255"),
        (["--peer", "1=127.0.0.1:500", "--ports", "0"], "from 1 to 33"),
        (["--peer", "1=192.0.2.1:500"], "UDP 192.0.2.1:500"),
    ],
)
def test_bad_words_are_refused_with_a_reason(
    more: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vsock.main(["enclave", "--parent", "3:5005", "--wireguard", "127.0.0.1:51820", *more]) == 9
    assert why in capsys.readouterr().err


# --- both roles, in this process ---------------------------------------------------------------------------


class Bench:
    """WireGuard of the node (one socket a port) inside, two peers outside, and room for both roles."""

    def __init__(self, folder: Path) -> None:
        self.streams = Streams(socket.AF_UNIX, str(folder / "stream"))
        self.stack = ExitStack()
        self.inside, self.peers = (
            self._range("127.0.0.1"),
            {1: self._range("127.0.0.2"), 2: self._range("127.0.0.3")},
        )
        self.outside = ("127.0.0.4", self._free("127.0.0.4"))
        self.local: dict[int, tuple[str, int]] = {}
        for index, name in ((1, "127.0.0.5"), (2, "127.0.0.6")):
            self.local[index] = (name, self._free(name))

    def _range(self, host: str) -> list[socket.socket]:
        while True:
            base, made = self._free(host), []
            try:
                for number in range(PORTS):
                    made.append(self.stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)))
                    made[-1].bind((host, base + number))
                    made[-1].setblocking(False)
                return made
            except OSError:
                continue

    @staticmethod
    def _free(host: str) -> int:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
            port: int = sock.getsockname()[1]
        return min(port, 65000)

    def enclave(self, **more: Any) -> Callable[..., Awaitable[None]]:
        return partial(vsock.enclave, self.streams, self.inside[0].getsockname(), self.local, PORTS, **more)

    def parent(self, **more: Any) -> Callable[..., Awaitable[None]]:
        Path(self.streams.address).unlink(missing_ok=True)
        peers = {index: peer[0].getsockname() for index, peer in self.peers.items()}
        return partial(vsock.parent, self.streams, self.outside, peers, PORTS, **more)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    with made.stack:
        yield made


async def receive(sock: socket.socket, seconds: float = 20.0) -> tuple[bytes, tuple[str, int]]:
    with trio.fail_after(seconds):
        while True:
            try:
                data, source = sock.recvfrom(65536)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
                continue
            return data, source


async def accepted(listener: trio.socket.SocketType) -> trio.SocketStream:
    connection, _ = await listener.accept()
    return trio.SocketStream(connection)


async def drained(sock: socket.socket, seconds: float = 0.2) -> list[bytes]:
    got = []
    with trio.move_on_after(seconds):
        while True:
            got.append((await receive(sock))[0])
    return got


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not holds():
            await trio.sleep(0.01)


async def passes(bench: Bench, index: int, here: int = 0, there: int = 0) -> None:
    """There and back, between the ports that it should be; again while streams are being made."""
    name, base = bench.local[index]
    ours, peer = bench.inside[here], bench.peers[index][there]
    with trio.fail_after(20):
        while True:
            ours.sendto(b"out", (name, base + there))
            with trio.move_on_after(0.3):
                data, source = await receive(peer)
                break
    assert (data, source) == (b"out", (bench.outside[0], bench.outside[1] + here))
    peer.sendto(b"back", source)
    assert await receive(ours) == (b"back", (name, base + there))


def run(main: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with trio.open_nursery() as nursery:
            await main(nursery)
            nursery.cancel_scope.cancel()

    trio.run(whole)


def test_every_port_of_every_peer_is_reached_and_strangers_are_not_heard(bench: Bench) -> None:
    async def main(nursery: trio.Nursery) -> None:
        await nursery.start(bench.enclave())  # before the parent
        await nursery.start(bench.parent())
        for index in (1, 2):
            for here in range(PORTS):
                for there in range(PORTS):
                    await passes(bench, index, here, there)
        # From another port of a peer's host, from elsewhere, and inside from who is not WireGuard.
        for host in ("127.0.0.2", "127.0.0.9", "127.0.0.1"):
            with socket.socket(type=socket.SOCK_DGRAM) as stranger:
                stranger.bind((host, 0))
                stranger.sendto(b"stranger", bench.outside)
                stranger.sendto(b"stranger", bench.local[1])
        await passes(bench, 1)
        for sock in (*bench.inside, *bench.peers[1], *bench.peers[2]):
            assert await drained(sock, 0.02) == []

    run(main)


def test_a_run_of_datagrams_arrives_as_it_was_sent(bench: Bench) -> None:
    async def main(nursery: trio.Nursery) -> None:
        counts = await nursery.start(bench.parent())
        await nursery.start(bench.enclave())
        await passes(bench, 1)
        data = os.urandom(100 * 40 + 7)
        extra = (socket.IPPROTO_UDP, 103, (100).to_bytes(2, "little"))  # UDP_SEGMENT: the kernel cuts it
        bench.peers[1][0].sendmsg([data], [extra], 0, bench.outside)
        got = [(await receive(bench.inside[0]))[0] for _ in range(41)]
        assert b"".join(got) == data and {len(each) for each in got} == {100, 7}
        assert counts[1].towards >= 41 and counts[1].full == counts[1].unsent == 0
        # The relay joins what goes on with what waits; nobody can tell.
        told = [os.urandom(size) for size in (*[100] * 70, 30, 30, 100, 100, 200, 1, 100)]
        for data in told:
            bench.inside[0].sendto(data, bench.local[1])
        assert [(await receive(bench.peers[1][0]))[0] for _ in told] == told

    run(main)


def test_what_a_full_stream_cannot_take_is_dropped_and_holds_up_nobody(bench: Bench) -> None:
    """The other end of one peer's stream does not read; the other peer's does."""

    async def main(nursery: trio.Nursery) -> None:
        listener = await bench.streams.listen()
        counts = await nursery.start(bench.enclave())
        streams = {}
        for _ in (1, 2):
            stream = await accepted(listener)
            streams[(await stream.receive_some(vsock.GREETING.size))[8]] = stream
        for number in range(4000):
            bench.inside[0].sendto(number.to_bytes(4, "big") * 300, bench.local[1])
            if number % 50 == 0:
                bench.inside[0].sendto(number.to_bytes(4, "big"), bench.local[2])
                frames = Frames(PORTS)
                while not (got := list(frames.feed(await streams[2].receive_some(65536)))):
                    pass
                assert bytes(got[0].data) == number.to_bytes(4, "big")
        assert counts[1].full > 1000 and counts[2].full == 0
        # What was kept is bounded, and comes in order; there is room again afterwards.
        frames, numbers = Frames(PORTS), list[int]()
        with trio.fail_after(20):
            while True:
                with trio.move_on_after(0.3) as waited:
                    data = await streams[1].receive_some(65536)
                if waited.cancelled_caught:
                    bench.inside[0].sendto(b"after", bench.local[1])
                    continue
                kept = [bytes(frame.data) for frame in frames.feed(data)]
                if b"after" in kept:
                    break
                for each in kept:
                    numbers += [int.from_bytes(each[at : at + 4], "big") for at in range(0, len(each), 1200)]
        assert numbers == sorted(set(numbers)) and len(numbers) >= counts[1].towards - 2
        assert len(numbers) < 3000
        listener.close()

    run(main)


def test_a_stream_that_breaks_the_form_is_closed_and_made_anew(bench: Bench) -> None:
    async def main(nursery: trio.Nursery) -> None:
        listener = await bench.streams.listen()
        bench.local.pop(2)
        counts = await nursery.start(bench.enclave())
        for number in range(3):
            with trio.fail_after(20):
                stream = await accepted(listener)
            await stream.send_all(packed(b"good", here=1))
            assert await receive(bench.inside[1]) == (b"good", bench.local[1])
            await stream.send_all(HEAD.pack(1, 2, 0, 0))
            while await stream.receive_some():  # its greeting, and the end
                pass
            await stream.aclose()
            assert counts[1].streams == number + 1
        listener.close()

    run(main)


def test_the_parent_hears_only_greetings_that_it_knows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "GREETING_SECONDS", 0.3)

    async def main(nursery: trio.Nursery) -> None:
        counts = await nursery.start(bench.parent())

        async def refused(data: bytes) -> None:
            stream = trio.SocketStream(await bench.streams.connect())
            if data:
                await stream.send_all(data)
            with trio.fail_after(20):
                try:
                    assert await stream.receive_some() == b""
                except trio.BrokenResourceError:  # what we said was not read
                    pass
            await stream.aclose()

        for data in (
            vsock.GREETING.pack(b"wgrelay2", 1, PORTS),
            vsock.GREETING.pack(vsock.MAGIC, 3, PORTS),
            vsock.GREETING.pack(vsock.MAGIC, 1, PORTS + 1),
            os.urandom(100),
        ):
            await refused(data)
        async with trio.open_nursery() as several:  # more than may wait at once, which say nothing
            for _ in range(3 * vsock.MAX_STRANGERS):
                several.start_soon(refused, b"")
        assert counts[1].streams == 0
        await nursery.start(bench.enclave())
        await passes(bench, 1)
        # A new stream of a peer takes the place of the one before, which the enclave makes again.
        stream = trio.SocketStream(await bench.streams.connect())
        await stream.send_all(vsock.GREETING.pack(vsock.MAGIC, 1, PORTS) + packed(b"other"))
        assert (await receive(bench.peers[1][0]))[0] == b"other"
        await until(lambda: counts[1].streams == 3)
        await passes(bench, 1)

    run(main)


def test_the_enclave_connects_again_when_the_parent_has_been_away(bench: Bench) -> None:
    async def main(nursery: trio.Nursery) -> None:
        counts = await nursery.start(bench.enclave())
        for _ in range(2):
            async with trio.open_nursery() as while_it_is_there:
                await while_it_is_there.start(bench.parent())
                await passes(bench, 1)
                await passes(bench, 2)
                while_it_is_there.cancel_scope.cancel()
        assert counts[1].streams >= 2

    run(main)


def test_of_another_cid_nobody_is_heard(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a peer's name has a CID: in its place here the first of two numbers, over TCP."""

    async def main(nursery: trio.Nursery) -> None:
        bench.streams = Streams(socket.AF_INET, ("127.0.0.9", bench._free("127.0.0.9")))
        counts = await nursery.start(
            partial(vsock.parent, bench.streams, bench.outside, {1: ("127.0.0.2", 9)}, PORTS, "127.0.0.7")  # type: ignore[arg-type]
        )
        stream = trio.SocketStream(await bench.streams.connect())
        await stream.send_all(vsock.GREETING.pack(vsock.MAGIC, 1, PORTS))
        with trio.fail_after(20):
            try:
                assert await stream.receive_some() == b""
            except trio.BrokenResourceError:
                pass
        assert counts[1].streams == 0

    run(main)


# --- WireGuard through it ----------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(reason)
    with Lab(tmp_path) as made:
        yield made


@pytest.mark.netns
@pytest.mark.parametrize(
    "rotates", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one-port", "rotating"]
)
def test_wireguard_in_a_namespace_without_network_reaches_its_peer(lab: Lab, rotates: bool) -> None:
    inside = Enclave(lab, 0)
    try:
        places = {0: ("127.0.0.1", inside.port(1)), 1: ("10.90.0.1", 51820)}
        nodes = []
        for index in (0, 1):
            j = 1 - index
            more = {"rotation": lab.rotation(index)} if rotates else {}
            peers = [[j, lab.keys[j].public().hex(), *places[index], [f"10.91.0.{j + 1}/32"]]]
            namespace = inside.namespace if index == 0 else None
            nodes.append(lab.start(index, namespace, peers=peers, **more))
        for event in ("raised", "up"):
            for node in nodes:
                assert node.hear()["event"] == event
        assert nodes[0].ask("probe 10.91.0.2")["event"] == "probe"
        assert nodes[1].ask("probe 10.91.0.1")["event"] == "probe"
        if rotates:
            epoch = steady(nodes, 0)
            assert nodes[1].ask("rotate")["event"] == "rotating"
            assert steady(nodes, epoch) > epoch
            assert nodes[1].ask("probe 10.91.0.1")["event"] == "probe"
        # The parent's part starts anew, as after a crash: the tunnel stays.
        inside.parent.kill()
        inside.parent.wait()
        inside.parent = inside.start_parent()
        end = time.monotonic() + 40
        while nodes[0].ask("probe 10.91.0.2")["event"] != "probe":
            assert time.monotonic() < end
        assert nodes[1].wait_for({0: "up"}, 20) < 20
    finally:
        inside.clear()
