"""Peers that come and go: interface and tunnel over a device that is none, and whole in network namespaces
(root and /dev/net/tun; skipped without)."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lab import Lab, Node, captured, ip, why_not
from test_generations import daemons, rotations

from wg import capture, tunnel
from wg.device import Device, Network
from wg.errors import DeviceLost, HandshakeTimeout, KeyFileError, TunnelError
from wg.generations import EpochRecord
from wg.interface import (
    DOWN_SECONDS,
    MUTE_SECONDS,
    RESTART_SECONDS,
    SUSPECT_SECONDS,
    Entry,
    Interface,
    PeerState,
    PeerWatch,
    Place,
    resolve,
)
from wg.keys import PresharedKey, PrivateKey, PublicKey, generate
from wg.tunnel import TunnelConfig, TunnelPeer, raise_tunnel
from wg.uapi import PeerReading

# --- without any device ------------------------------------------------------------------------------------


class FakeDevice(Device):
    """Knows peers, and fails when told: `broken` is lost until revived, `stubborn` refuses to remove."""

    implementation = "fake"

    def __init__(self, name: str = "t0") -> None:
        super().__init__(name)
        self.peers: dict[PublicKey, tuple[Place | None, bytes, int]] = {}
        self.seen: dict[PublicKey, PeerReading] = {}
        self.asked: list[tuple[PublicKey, Place | None]] = []
        self.broken = self.stubborn = self.cutting = False
        self.dice = random.Random(5)

    async def _takes_a_while(self) -> None:
        await trio.sleep(self.dice.random() / 1000)
        if self.broken:
            raise DeviceLost("broken")

    async def configure(self, private_key: PrivateKey, listen_port: int) -> None:
        await self._takes_a_while()
        self.peers.clear()

    async def put_peer(
        self,
        public_key: PublicKey,
        endpoint: Place | None,
        allowed: Iterable[Network],
        keepalive: int,
        preshared: PresharedKey | None = None,
    ) -> None:
        self.asked.append((public_key, endpoint))
        await self._takes_a_while()
        secret = bytes(preshared.hex()) if preshared is not None else b""
        self.peers[public_key] = (endpoint, secret, keepalive)

    async def set_keepalive(self, public_key: PublicKey, seconds: int) -> None:
        await self._takes_a_while()

    async def remove_peer(self, public_key: PublicKey) -> None:
        await self._takes_a_while()
        if self.stubborn:
            raise TunnelError("no")
        self.peers.pop(public_key, None)
        self.seen.pop(public_key, None)

    async def cut(self) -> None:
        self.cutting = True
        self.peers.clear()
        await super().cut()

    async def revive(self) -> None:
        self.broken = self.stubborn = False
        self.peers.clear()
        self.lost = trio.Event()

    async def rest(self) -> None: ...

    async def wake(self) -> None: ...

    async def readings(self) -> list[PeerReading]:
        await self._takes_a_while()
        return [self.seen.get(key, PeerReading(key)) for key in self.peers]

    async def bring_up(self, addresses: object, mtu: int) -> None: ...

    async def route(self, destination: Network, source: object, metric: int | None = None) -> None: ...


KEYS = [PublicKey(bytes([number]) * 32) for number in range(1, 9)]
HOME, AWAY = (ip_address("10.0.0.1"), 5), (ip_address("10.0.0.9"), 7)


def entry(index: int, key: PublicKey, initiator: bool = True, place: Place = HOME) -> Entry:
    return Entry(index, key, (place,), (ip_network(f"10.1.0.{index}/32"),), initiator)


def interface(device: Device) -> Interface:
    return Interface(device, generate(), 1, 1420, (), (), {}, lambda: None)


def test_whatever_comes_and_goes_and_breaks_the_device_ends_up_with_who_is_wanted(
    autojump_clock: trio.abc.Clock,
) -> None:
    """Many tasks admit and expel, are cancelled anywhere, and the device breaks now and then."""
    dice = random.Random(11)

    async def main() -> None:
        device = FakeDevice()
        ours = interface(device)
        await ours.set_up()
        locks = [trio.Lock() for _ in range(3)]  # as the tunnel has them

        async def change(index: int) -> None:
            with trio.move_on_after(dice.random() / 100):
                async with locks[index]:
                    await ours.expel(index)
                    if dice.random() < 0.6:
                        await ours.admit(entry(index, KEYS[index + 3 * dice.randrange(2)]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.live)
            for number in range(60):
                async with trio.open_nursery() as several:
                    for _ in range(4):
                        several.start_soon(change, dice.randrange(3))
                    if number % 15 == 7:
                        device.broken = True
                await trio.sleep(0.01)
                if number % 15 == 14:
                    await trio.sleep(3)
                    assert set(device.peers) == {each.public_key for each in ours.entries.values()}
            assert ours.restarts == 4
            nursery.cancel_scope.cancel()

    trio.run(main, clock=autojump_clock)


@pytest.mark.parametrize("how", ["broken", "stubborn"])
def test_a_device_that_does_not_let_go_of_a_peer_is_ended_and_revived_without(
    how: str, autojump_clock: trio.abc.Clock
) -> None:
    async def main() -> None:
        device = FakeDevice()
        ours = interface(device)
        await ours.set_up()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.live)
            await ours.admit(entry(1, KEYS[1]))
            await ours.admit(entry(2, KEYS[2]))
            await trio.sleep(0.1)
            setattr(device, how, True)
            await ours.expel(1)
            assert device.cutting and KEYS[1] not in device.peers
            await trio.sleep(1)
            assert set(device.peers) == {KEYS[2]} and ours.restarts == 1
            nursery.cancel_scope.cancel()

    trio.run(main, clock=autojump_clock)


def test_a_peer_is_looked_for_where_it_was_heard_and_where_it_is_configured(
    autojump_clock: trio.abc.Clock,
) -> None:
    async def main() -> None:
        device = FakeDevice()
        ours = interface(device)
        await ours.set_up()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.live)
            await ours.admit(entry(1, KEYS[1]))
            assert ours.places(1) == (HOME,)
            device.seen[KEYS[1]] = PeerReading(KEYS[1], "10.0.0.9:7", 1.0, 100, 100)
            await trio.sleep(1)
            assert ours.places(1) == (AWAY, HOME)
            device.asked.clear()
            await trio.sleep(RESTART_SECONDS + 5)  # silent since
            assert [place for _, place in device.asked[:4]] == [AWAY, HOME, AWAY, HOME]
            await ours.move(1, (ip_address("10.0.0.3"), 9))
            assert ours.places(1) == ((ip_address("10.0.0.3"), 9),)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=autojump_clock)


def test_an_application_that_does_not_answer_is_noticed_though_its_device_speaks() -> None:
    watch = PeerWatch(True)
    watch.added(0.0, True)
    watch.see(PeerReading(KEYS[0], "10.0.0.1:1", 1.0, 1), 0.0)
    watch.asked(1.0)
    watch.asked(2.0)  # since when it is asked, not the last time
    watch.answered(3.0, 0.02)
    for now, state in (
        (3.0, PeerState.UP),
        (3.0 + MUTE_SECONDS, PeerState.UP),
        (3.1 + MUTE_SECONDS, PeerState.SUSPECT),
        (3.1 + DOWN_SECONDS, PeerState.DOWN),
    ):
        watch.see(PeerReading(KEYS[0], "10.0.0.1:1", 1.0, 1 + int(now * 10)), now)
        assert watch.silent(now) == 0.0 and watch.state(now, 1.0) is state
    watch.answered(20.0, 0.02)
    watch.see(PeerReading(KEYS[0], "10.0.0.1:1", 1.0, 1000), 20.0)
    assert watch.state(20.0, 1.0) is PeerState.UP and watch.round_trip == 0.02


def test_names_are_resolved_and_unknown_ones_named() -> None:
    async def main() -> None:
        assert await resolve("::1", 5) == (ip_address("::1"), 5)
        assert (await resolve("localhost", 5))[1] == 5
        with pytest.raises(TunnelError, match=r"nowhere\.invalid"):
            await resolve("nowhere.invalid", 5)

    trio.run(main)


@pytest.fixture
def autojump_clock() -> trio.abc.Clock:
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """What a tunnel without rotation is raised on."""
    made = FakeDevice()

    @asynccontextmanager
    async def open_fake(*_: object) -> AsyncIterator[FakeDevice]:
        yield made

    async def silent(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(tunnel, "open_device", open_fake)
    monkeypatch.setattr(tunnel, "ping", silent)
    return made


def configured(key: PrivateKey, *keys: PublicKey | None) -> TunnelConfig:
    peers = tuple(
        TunnelPeer(index, each, ("10.0.0.1", 5), (ip_network(f"10.1.0.{index + 1}/32"),))
        for index, each in enumerate(keys, 1)
    )
    return TunnelConfig(0, "t0", key, 1, ip_address("10.1.0.1"), peers)


def test_a_tunnel_admits_replaces_and_expels(device: FakeDevice, autojump_clock: trio.abc.Clock) -> None:
    said: list[tuple[int, str]] = []
    psks = [PresharedKey(bytes([7]) * 32) for _ in range(6)]

    async def main() -> None:
        key = generate()
        ours = key.public()
        async with raise_tunnel(
            configured(key, KEYS[1], None),
            wait=None,
            said=lambda peer, what, epoch: said.append((peer, what)),
        ) as raised:
            assert raised.public_key == ours and raised.rotations() == ()
            assert [status.state for status in raised.status()] == [PeerState.JOINING, PeerState.ABSENT]
            await trio.sleep(0.1)
            assert set(device.peers) == {KEYS[1]}
            with pytest.raises(
                HandshakeTimeout, match=r"handshake with peer 1 .* And peer 2 was not admitted"
            ):
                await raised.wait_up(0.5)
            await raised.admit(2, KEYS[2], preshared=psks[0])
            assert device.peers[KEYS[2]][:2] == (HOME, bytes(psks[0].hex()))
            device.asked.clear()
            await raised.admit(2, KEYS[2], preshared=psks[1])  # the same: nothing happens
            assert not device.asked and "wiped" in repr(psks[1]) and "wiped" not in repr(psks[0])
            await raised.admit(2, KEYS[2], preshared=psks[2], endpoint=("10.0.0.9", 7))  # but for the place
            assert device.peers[KEYS[2]][0] == AWAY and "wiped" not in repr(psks[0])
            other = PresharedKey(bytes(range(32)))
            await raised.admit(2, KEYS[2], preshared=other)  # another key ends the session
            assert device.peers[KEYS[2]][1] == bytes(other.hex()) and "wiped" in repr(psks[0])
            await raised.admit(2, KEYS[2], preshared=other)
            await raised.admit(2, KEYS[3], preshared=other)
            assert device.peers[KEYS[3]][1] == bytes(other.hex())
            await raised.admit(2, KEYS[3])
            assert set(device.peers) == {KEYS[1], KEYS[3]} and "wiped" in repr(other)
            with pytest.raises(KeyFileError, match="wiped"):
                await raised.admit(2, KEYS[4], preshared=other)
            assert KEYS[4] not in device.peers and not raised.admitted(2)
            for index, wrong, why in (
                (2, ours, "our own"),
                (2, KEYS[1], "another peer"),
                (5, KEYS[4], "none of"),
            ):
                with pytest.raises(TunnelError, match=why):
                    await raised.admit(index, wrong, preshared=psks[3])
                assert "wiped" in repr(psks[3])
            device.seen[KEYS[1]] = PeerReading(KEYS[1], "10.0.0.1:5", time.time(), 100, 100)
            await raised.wait_up(5, [1])
            await raised.expel(1)
            await raised.expel(1)
            assert not raised.admitted(1) and raised.status()[0].state is PeerState.ABSENT
            assert raised.status()[0].rx == 100  # what has passed has passed
            await raised.admit(2, KEYS[2], preshared=psks[4])
            assert set(device.peers) == {KEYS[2]}
            with trio.CancelScope() as scope:  # cancelled before it began: taken over and wiped all the same
                scope.cancel()
                await raised.admit(1, KEYS[1], preshared=psks[5])
            assert "wiped" in repr(psks[5]) and set(device.peers) == {KEYS[2]}
            with trio.CancelScope() as scope:  # while it is at it
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(raised.expel, 2)
                    while not raised._changing[2].locked():
                        await trio.sleep(0)
                    scope.cancel()
            assert not device.peers
            await raised.admit(2, KEYS[2], preshared=PresharedKey(bytes(32)))
            last = device.peers[KEYS[2]]
        assert "wiped" in repr(key) and last[1] == b"0" * 64
        with pytest.raises(TunnelError, match="down"):
            await raised.admit(1, KEYS[1])

    trio.run(main, clock=autojump_clock)
    assert [what for peer, what in said if peer == 1] == ["joining", "up", "not admitted"]
    assert "not admitted" in [what for peer, what in said if peer == 2]


# --- whole, in network namespaces --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def namespaces_work() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def lab(namespaces_work: None, tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as made:
        yield made


PSK, OTHER = "11" * 32, "22" * 32


def start(lab: Lab, index: int, rotates: bool = True) -> Node:
    """Node 0 or 1, which know no key of each other and have one that is in memory only."""
    j = 1 - index
    peers = [[j, None, f"10.90.0.{j + 1}", 51820, [f"10.91.0.{j + 1}/32"]]]
    more: dict[str, Any] = {"rotation": lab.rotation(index)} if rotates else {}
    node = lab.start(index, peers=peers, private_key="memory", wait=None, **more)
    node.hear_raised()
    return node


def admit(node: Node, index: int, other: Node, *more: str) -> None:
    answer = node.ask(" ".join(["admit", str(index), other.public_key, *more]))
    assert answer["event"] == "admitted", answer


def admit_both(nodes: list[Node], *more: str) -> None:
    """The follower first, as the exchange of admission has it."""
    admit(nodes[1], 0, nodes[0], *more)
    admit(nodes[0], 1, nodes[1], *more)


def up(nodes: list[Node], seconds: float = 40.0) -> None:
    for index, node in enumerate(nodes):
        assert node.ask(f"up {1 - index} {seconds}", seconds + 10)["event"] == "up"


def steady(nodes: list[Node], above: int, seconds: float = 40.0) -> int:
    """Wait until both are at one epoch above this, drained; which."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [rotations(nodes[0])[1], rotations(nodes[1])[0]]
        epochs = {each["epoch"] for each in found}
        if (
            len(epochs) == 1
            and (epochs.pop() or 0) > above
            and {each["state"] for each in found} == {"steady"}
        ):
            return int(found[0]["epoch"])
        time.sleep(0.05)
    pytest.fail(f"not above epoch {above} after {seconds} s: {found}")


def said(node: Node) -> list[str]:
    """All that the tunnel of this node has said of the other."""
    return [what for _, what in node.ask("said")["said"]]


def way_out(lab: Lab, index: int) -> str:
    """By which interface a node would send to the other one's inner address."""
    words = ip("-n", lab.namespace(index), "route", "get", f"10.91.0.{2 - index}").split()
    return words[words.index("dev") + 1]


@pytest.mark.netns
@pytest.mark.parametrize(
    "rotates", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["rotating", "alone"]
)
def test_an_expelled_peer_hears_and_says_nothing_more_until_it_is_admitted_again(
    lab: Lab, rotates: bool
) -> None:
    nodes = [start(lab, index, rotates) for index in (0, 1)]
    assert nodes[0].states() == {1: "not admitted"} and way_out(lab, 0) == lab.interface(0)
    admit_both(nodes, PSK)
    up(nodes)
    for index in (0, 1):
        assert nodes[index].ask(f"stream 10.91.0.{2 - index}")["event"] == "streaming"
    time.sleep(1.0)
    with captured(lab, 4.0) as report:
        told = nodes[0].ask("expel 1")
        assert told["event"] == "expelled" and nodes[0].states() == {1: "not admitted"}
        time.sleep(1.0)
        last = [node.ask("streamed")["last"] for node in nodes]
        took = told["end"] - told["start"]
        print(f"expelled within {took * 1e3:.1f} ms; last message heard here and there", end=" ")
        print(*(f"{(moment - told['start']) * 1e3:.1f} ms" for moment in last), "after the call")
        # What was on its way is read late on a busy machine; a stream that goes on would come for a second.
        assert all(moment - told["end"] < 0.5 for moment in last)
        assert way_out(lab, 0) == lab.interface(0) and daemons(lab, 0) == 1
    assert set(report["kinds"]) <= capture.HARMLESS, json.dumps(report["foreign"])
    epoch = EpochRecord(lab.folder / "epochs0").seen[1] if rotates else 0
    # The follower still has the old key and session; with other keys here nothing comes of them.
    admit(nodes[0], 1, nodes[1], OTHER)
    assert nodes[0].ask("up 1 2")["event"] == "failed"
    admit(nodes[1], 0, nodes[0], OTHER)
    up(nodes)
    assert nodes[0].ask("probe 10.91.0.2")["event"] == "probe"
    if rotates:
        epoch = steady(nodes, epoch)
    # One that starts anew has another key, and the one that kept running takes it in its stead.
    nodes[1].child.kill()
    nodes[1].clear()
    before = nodes[1].public_key
    nodes[1] = start(lab, 1, rotates)
    assert nodes[1].public_key != before
    admit_both(nodes, PSK)
    up(nodes)
    assert nodes[1].ask("probe 10.91.0.1")["event"] == "probe"
    if rotates:
        assert steady(nodes, epoch) > epoch
    assert [what for what in said(nodes[0]) if what in ("joining", "up", "not admitted")][:3] == [
        "joining",
        "up",
        "not admitted",
    ]
    assert [node.end() for node in nodes] == [0, 0]


@pytest.mark.netns
def test_a_peer_that_has_moved_is_found_by_later_rotations(lab: Lab) -> None:
    nodes = [start(lab, index) for index in (0, 1)]
    admit_both(nodes, PSK)
    up(nodes)
    epoch = steady(nodes, 0)
    for place, index in ((12, 1), (11, 0)):  # the follower, then the leader
        name = lab.namespace(index)
        ip("-n", name, "addr", "add", f"10.90.0.{place}/24", "dev", "eth0")
        ip("-n", name, "addr", "del", f"10.90.0.{index + 1}/24", "dev", "eth0")
        # Removing the first address of a network takes the others along.
        ip("-n", name, "addr", "replace", f"10.90.0.{place}/24", "dev", "eth0")
        time.sleep(2.0)  # it is heard from there
        assert nodes[index].ask("rotate")["event"] == "rotating"
        epoch = steady(nodes, epoch, 60.0)
        assert nodes[0].ask("probe 10.91.0.2")["event"] == "probe"
    # Expelled and admitted again it is where it is said to be, not where it is configured.
    assert nodes[0].ask("expel 1")["event"] == "expelled"
    admit(nodes[0], 1, nodes[1], PSK, "10.90.0.12", "51820")
    assert steady(nodes, epoch) > epoch
    assert nodes[0].ask("status")["peers"][0]["endpoint"].startswith("10.90.0.12:")


@pytest.mark.slow
@pytest.mark.netns
def test_expelled_in_any_phase_of_a_rotation_a_peer_is_gone_and_comes_back(lab: Lab) -> None:
    nodes = [start(lab, index) for index in (0, 1)]
    admit_both(nodes, PSK)
    epoch = steady(nodes, 0)
    for index, phase in ((0, "begun"), (0, "accepted"), (0, "committed"), (1, "accepted"), (1, "committed")):
        other = 1 - index
        assert nodes[index].ask(f"expel-at {phase} {other}")["event"] == "doomed"
        assert nodes[0].ask("rotate")["event"] == "rotating"
        assert nodes[index].hear() == {"event": "expelled", "peer": other}
        assert nodes[index].states() == {other: "not admitted"} and daemons(lab, index) == 1, phase
        assert way_out(lab, index) == lab.interface(index)
        assert rotations(nodes[index])[other]["state"] == "not admitted"
        admit(nodes[index], other, nodes[other], PSK)
        epoch = steady(nodes, epoch, 60.0)
        assert nodes[0].ask("probe 10.91.0.2")["event"] == "probe"
    assert [node.end() for node in nodes] == [0, 0]


@pytest.mark.netns
@pytest.mark.parametrize(
    "rotates", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["rotating", "alone"]
)
def test_a_party_that_hangs_is_noticed_though_its_host_answers(lab: Lab, rotates: bool) -> None:
    """Its kernel acknowledges what comes over TCP, and its WireGuard carries that."""
    nodes = [start(lab, index, rotates) for index in (0, 1)]
    admit_both(nodes, PSK)
    up(nodes)
    end = time.monotonic() + 40
    while nodes[0].ask("status")["peers"][0]["round_trip"] is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert nodes[0].ask("stream 10.91.0.2")["event"] == "streaming"
    nodes[1].child.send_signal(signal.SIGSTOP)
    try:
        nodes[0].wait_for({1: "suspect"}, 30)
        seen = nodes[0].ask("status")["peers"][0]
        assert seen["silent"] < SUSPECT_SECONDS < MUTE_SECONDS <= seen["mute"]  # which is rounded
        while said(nodes[0])[-1] != "suspect":
            time.sleep(0.1)
    finally:
        nodes[1].child.send_signal(signal.SIGCONT)
    nodes[0].wait_for({1: "up"}, 30)
