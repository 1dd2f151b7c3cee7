"""Rotation at work: its parts, and whole in network namespaces (root and /dev/net/tun; skipped without)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trio
from lab import ROOT, Lab, Node, captured, ip, why_not
from storage import open_vault

from mimir.actors.peer import rotation_plan
from mimir.config import parse
from mimir.net.identity import Identity
from wg import capture
from wg.errors import TunnelError
from wg.generations import EpochRecord, Pair, control_address, tie
from wg.rotation import Rotation
from wg.tunnel import RotationPlan, TunnelConfig

# --- parts -------------------------------------------------------------------------------------------------


def test_the_record_outlives_the_process_and_never_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "epochs"
    record = EpochRecord(path)
    assert record.seen == {}

    async def use() -> None:
        await record.put(1, 5)
        await record.put(2, 1)
        await record.put(1, 3)

    trio.run(use)
    assert EpochRecord(path).seen == {1: 5, 2: 1}
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", [b"x", b"1 2 3\n", b"1 -2\n", b"1\n", b"\xff", b"1  2\n", b"1 " + b"9" * 30])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "epochs"
    path.write_bytes(text)
    with pytest.raises(TunnelError, match=str(path)):
        EpochRecord(path)


def test_a_tied_socket_takes_packets_from_its_interfaces_only() -> None:
    """On loopback, whose index is known; the kernel drops the rest before TCP answers."""
    loopback = socket.if_nametoindex("lo")
    none: tuple[int, ...] = ()
    for interfaces in ((loopback,), (99998, loopback, 99999), (99999,), none):
        with socket.socket() as listener, socket.socket() as caller:
            tie(listener, interfaces)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            caller.settimeout(0.3)
            if loopback not in interfaces:
                with pytest.raises(TimeoutError):
                    caller.connect(listener.getsockname())
                continue
            caller.connect(listener.getsockname())
            accepted, _ = listener.accept()  # what it accepts is tied as well
            with accepted:
                tie(accepted, (99999,))
                caller.sendall(b"x")
                accepted.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    accepted.recv(1)


class Disk(EpochRecord):
    """Full."""

    async def put(self, peer: int, epoch: int) -> None:
        raise OSError("No space left on device")


def unraised(index: int, record: EpochRecord, sent: list[bytes], up: bool = True) -> Pair:
    """A pair without devices: any attempt to raise a generation would fail the test."""
    machine = Rotation(index, 1 - index, lambda m: bytes(64), lambda m, s: None, bytes(32), (1, 2))
    return Pair(
        machine,
        (),
        record,
        60.0,
        51820,
        ip_address("10.1.0.1"),
        1420,
        lambda: (),
        (),
        lambda peer, data: sent.append(data),
        lambda peer: up,
        lambda: None,
        lambda peer, what, epoch: None,
    )


def test_what_cannot_be_recorded_is_not_begun(tmp_path: Path) -> None:
    async def use() -> None:
        sent: list[bytes] = []
        leader = unraised(0, Disk(tmp_path / "a"), sent)
        await leader._step(leader.machine.want)
        assert sent == [] and not leader.machine.busy and leader.aborted == 1
        good = unraised(0, EpochRecord(tmp_path / "b"), sent)
        await good._step(good.machine.want)
        offer = sent.pop()
        follower = unraised(1, Disk(tmp_path / "c"), sent)
        await follower._step(lambda: follower.machine.receive(offer))
        assert sent == [] and not follower.machine.busy and follower.aborted == 1

    trio.run(use)


def test_a_follower_does_not_speak_first_on_the_bootstrap_interface(tmp_path: Path) -> None:
    async def use() -> None:
        for index, up, spoken in ((0, False, 1), (1, False, 0), (1, True, 1)):
            sent: list[bytes] = []
            pair = unraised(index, EpochRecord(tmp_path / "a"), sent, up)
            await pair._step(pair.machine.want)
            assert len(sent) == spoken

    trio.run(use)


def plan(**changes: Any) -> RotationPlan:
    told: dict[str, Any] = {
        "seconds": 60.0,
        "record": Path("epochs"),
        "sign": lambda message: bytes(64),
        "authenticate": lambda peer, message, signature: None,
        "refusals": (ValueError,),
        "context": bytes(32),
    }
    return RotationPlan(**{**told, **changes})


def test_a_party_announces_as_its_identity_to_this_federation_only(tmp_path: Path) -> None:
    vault = open_vault(tmp_path / "data")
    identities = [Identity.generate() for _ in range(3)]
    with open(ROOT / "configs" / "three.toml", "rb") as file:
        data = tomllib.load(file)
    for entry, identity in zip(data["peers"], identities, strict=True):
        entry["identity"] = identity.public_hex
    config = parse(data, Path("three.toml"))
    made = rotation_plan(config, identities[0], vault)
    assert made is not None and made.seconds == 3600.0 and not isinstance(made.record, Path)
    made.record.write(b"1 5\n")
    assert EpochRecord(made.record).seen == {1: 5}
    signature = made.sign(b"message")
    made.authenticate(0, b"message", signature)
    for party, message in ((1, b"message"), (0, b"another")):
        with pytest.raises(made.refusals):
            made.authenticate(party, message, signature)
    closed = rotation_plan(config, identities[0], vault, lambda party: party != 0)
    assert closed is not None
    closed.authenticate(1, b"message", identities[1].sign(b"message"))
    with pytest.raises(closed.refusals, match="not admitted"):
        closed.authenticate(0, b"message", signature)
    data["peers"][2]["identity"] = "ab" * 32
    other = rotation_plan(parse(data, Path("three.toml")), identities[0], vault)
    assert other is not None and other.context != made.context
    data["tunnel"]["rotate_seconds"] = 0
    assert rotation_plan(parse(data, Path("three.toml")), identities[0], vault) is None


def test_configuration_refuses_what_rotation_cannot_do() -> None:
    key = "A" * 43 + "="

    def configured(**changes: Any) -> TunnelConfig:
        told: dict[str, Any] = {
            "index": 0,
            "interface": "t0",
            "private_key": "k",
            "listen_port": 1,
            "address": "10.1.0.1/24",
            "peers": [(1, key, "h", 1, ["10.1.0.2/32"])],
            "rotation": plan(),
        }
        return TunnelConfig.from_text(**{**told, **changes})

    configured()
    configured(interface="f" * 14)
    for changes, why in [
        ({"interface": "f" * 15}, "adds a letter"),
        ({"listen_port": 65534}, "2 ports after 65534"),
        ({"index": 251}, "counts from 0 to 250"),
        ({"peers": [(1, key, "h", 1, ["169.254.0.0/16"])]}, "which rotation uses itself"),
    ]:
        with pytest.raises(TunnelError, match=why):
            configured(**changes)
    assert len({control_address(index) for index in range(251)}) == 251


# --- whole, in network namespaces --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def namespaces_work() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def lab(namespaces_work: None, tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as made:
        yield made


def rotations(node: Node) -> dict[int, dict[str, Any]]:
    return {entry["peer"]: entry for entry in node.ask("status")["rotations"]}


def start(lab: Lab, index: int) -> Node:
    node = lab.start(index, rotation=lab.rotation(index))
    assert node.hear()["event"] == "raised"
    return node


def start_all(lab: Lab) -> list[Node]:
    nodes = [lab.start(index, rotation=lab.rotation(index)) for index in range(3)]
    for event in ("raised", "up"):
        for node in nodes:
            assert node.hear()["event"] == event
    return nodes


def wait_for(nodes: list[Node], epoch: int, seconds: float = 15.0) -> None:
    """Until the first two have drained and are at this epoch with each other."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [rotations(nodes[0])[1], rotations(nodes[1])[0]]
        if all(entry["epoch"] == epoch and entry["state"] == "steady" for entry in found):
            return
        time.sleep(0.05)
    pytest.fail(f"not at epoch {epoch} after {seconds} s: {found}")


def daemons(lab: Lab, index: int) -> int:
    names = []
    for pid in ip("netns", "pids", lab.namespace(index)).split():
        names.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return names.count("wireguard-go")


def inside(namespace: str, script: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.strip()


def connects(namespace: str, host: str, port: int, device: str = "") -> bool:
    """Whether TCP connects from there within a second, through one device if it is named."""
    tied = f"s.setsockopt(1, 25, {device.encode()!r}); " if device else ""
    script = (
        f"import socket; s = socket.socket(); s.settimeout(1); {tied}print(s.connect_ex(({host!r}, {port})))"
    )
    return inside(namespace, script) == "0"


def set_mtu(lab: Lab, mtu: int) -> None:
    for index in range(3):
        ip("-n", lab.hub, "link", "set", f"v{index}", "mtu", str(mtu))


@pytest.mark.netns
def test_a_stream_over_rotations_loses_nothing_and_nothing_crosses_outside(lab: Lab) -> None:
    with captured(lab, 12.0) as report:
        nodes = start_all(lab)
        wait_for(nodes, 1)
        assert nodes[0].ask("stream 10.91.0.2")["event"] == "streaming"
        for epoch in (2, 3):
            assert nodes[0].ask("rotate")["event"] == "rotating"
            wait_for(nodes, epoch)
        streamed = nodes[0].ask("streamed")
        print(f"1 ms stream over two rotations: {streamed}")
        assert streamed["sent"] > 1000 and streamed["back"] == streamed["sent"]
        assert streamed["wrong"] == 0 and streamed["broken"] == ""
        # A path that has begun to lose large packets: nothing is proved, and the generation in use stays.
        set_mtu(lab, 1400)
        assert nodes[0].ask("stream 10.91.0.2")["event"] == "streaming"
        assert nodes[0].ask("rotate")["event"] == "rotating"
        time.sleep(1.5)
        found = rotations(nodes[0])[1]
        assert found["epoch"] == 3 and found["state"] in ("offered", "proving")
        set_mtu(lab, 1500)
        wait_for(nodes, 4)
        streamed = nodes[0].ask("streamed")
        assert streamed["back"] == streamed["sent"] > 1000
        for node in nodes:
            assert set(node.states().values()) == {"up"}
        while any(entry["state"] != "steady" for entry in rotations(nodes[0]).values()):
            time.sleep(0.1)
        # One process for the bootstrap interface and one per peer: the old ones have gone with their keys.
        assert daemons(lab, 0) == 3
        # The application's ranges do not pass on the bootstrap interface; the live one shows the test works.
        live = lab.interface(0) + "ba"[rotations(nodes[0])[1]["epoch"] % 2]
        assert connects(lab.namespace(0), "10.91.0.2", 7302, live)
        assert not connects(lab.namespace(0), "10.91.0.2", 7302, lab.interface(0))
    assert set(report["kinds"]) <= capture.HARMLESS, json.dumps(report["foreign"])
    # From the underlay nobody reaches a tied socket, though Linux takes the packet: an untied one answers.
    ip("-n", lab.hub, "route", "add", "10.91.0.1", "via", "10.90.0.1")
    script = (
        "import socket; s = socket.create_server(('10.91.0.1', 7399)); print('ready', flush=True); s.accept()"
    )
    control = subprocess.Popen(
        ["ip", "netns", "exec", lab.namespace(0), sys.executable, "-c", script], stdout=subprocess.PIPE
    )
    try:
        assert control.stdout is not None and control.stdout.readline() == b"ready\n"
        assert connects(lab.hub, "10.91.0.1", 7399)
        assert not connects(lab.hub, "10.91.0.1", 7302)
    finally:
        control.kill()
        control.communicate()
    assert [node.end() for node in nodes] == [0, 0, 0]
    assert lab.interface(0) not in ip("-n", lab.namespace(0), "link", "show")


@pytest.mark.netns
def test_a_crash_at_any_point_of_a_rotation_heals_and_a_leak_ends_the_node(lab: Lab) -> None:
    nodes = start_all(lab)
    wait_for(nodes, 1)
    # A route past the tunnel, as a careless administrator may set it, ends the node rather than leak.
    ip("-n", lab.namespace(2), "route", "add", "10.91.0.1", "via", "10.90.0.1")
    error = nodes[2].hear()
    assert error["event"] == "error" and "10.91.0.1 by eth0, past the tunnel" in error["why"]
    assert nodes[2].child.wait(10) == 9
    ip("-n", lab.namespace(2), "route", "del", "10.91.0.1", "via", "10.90.0.1")
    nodes[2].clear()
    nodes[2] = start(lab, 2)
    assert nodes[2].hear()["event"] == "up"
    before = 1
    for index, point in ((1, "accepted"), (1, "committed"), (0, "committed")):
        assert nodes[index].ask(f"crash {point}")["event"] == "doomed"
        assert nodes[0].child.stdin is not None
        nodes[0].child.stdin.write(b"rotate\n")
        nodes[0].child.stdin.flush()
        nodes[index].child.wait(20)
        if index != 0:
            nodes[0].hear()
        nodes[index].clear()
        nodes[index] = start(lab, index)
        assert nodes[index].hear()["event"] == "up", f"{point} at {index}"
        for node, other in ((nodes[0], 1), (nodes[1], 0)):
            assert node.wait_for({other: "up", 2: "up"}, 20) < 20
            assert node.ask(f"probe 10.91.0.{other + 1}")["event"] == "probe"
        epoch = rotations(nodes[0])[1]["epoch"]
        assert epoch > before
        before = epoch
    counts = [EpochRecord(lab.folder / f"epochs{index}").seen[1 - index] for index in (0, 1)]
    assert counts[0] >= counts[1] >= before
