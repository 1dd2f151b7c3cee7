"""The tunnel: its parts alone, and whole in network namespaces (root and /dev/net/tun; skipped without)."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import nacl.bindings
import pytest
import trio
from lab import Lab, captured, ip, why_not

from wg import capture, device, relay, uapi
from wg.device import parse_kernel
from wg.errors import DeviceLost, KeyFileError, TunnelError
from wg.interface import (
    DOWN_SECONDS,
    RESTART_SECONDS,
    RETRY_JITTER,
    RETRY_SECONDS,
    SUSPECT_SECONDS,
    Act,
    PeerState,
    PeerWatch,
)
from wg.keys import PresharedKey, PrivateKey, PublicKey, generate, load_private, save_private
from wg.tunnel import TunnelConfig
from wg.uapi import PeerReading, UapiClient, parse_readings

# --- keys --------------------------------------------------------------------------------------------------


def test_public_key_is_the_one_another_library_computes() -> None:
    for secret in (bytes(range(32)), b"\xff" * 32, os.urandom(32)):
        assert PrivateKey(secret).public().raw == nacl.bindings.crypto_scalarmult_base(secret)


def test_key_file_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    path, key = tmp_path / "key", generate()
    before = os.umask(0)
    try:
        save_private(path, key)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_private(path).public() == key.public()
    with pytest.raises(KeyFileError, match="exists already"):
        save_private(path, generate())
    assert load_private(path).public() == key.public()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    save_private(path, generate())
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_private(path)


@pytest.mark.parametrize(
    "text", [b"", b"x", b"AAAA\n", b"=" * 44, b"A" * 4000, b"\xff" * 44, b"A" * 43 + b"=" + b"B"]
)
def test_bad_key_file_names_the_file(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=str(path)):
        load_private(path)


def test_private_key_shows_and_yields_nothing() -> None:
    key = generate()
    secret = key.hex().decode()
    for shown in (repr(key), str(key), repr([key])):
        assert secret not in shown and key.base64().decode() not in shown
    for use in (
        lambda: key == key,
        lambda: hash(key),
        lambda: bytes(key),
        lambda: copy.copy(key),
        lambda: copy.deepcopy(key),
        lambda: pickle.dumps(key),
        lambda: f"{key}",
        lambda: list(key),  # type: ignore[call-overload]
        lambda: bool(key),
    ):
        with pytest.raises(TypeError):
            use()
    key.wipe()
    key.wipe()
    with pytest.raises(KeyFileError, match="wiped"):
        key.public()


def test_public_key_reads_both_spellings() -> None:
    key = generate().public()
    assert PublicKey.from_text(key.hex()) == PublicKey.from_text(key.base64()) == key
    for text in ("", "zz" * 32, key.hex()[:-2], key.base64()[:-4], "ä" * 44):
        with pytest.raises(KeyFileError):
            PublicKey.from_text(text)


# --- the control socket ------------------------------------------------------------------------------------

KEYS = [bytes([number]) * 32 for number in range(1, 5)]
ANSWER = (
    f"private_key={'ab' * 32}\nlisten_port=51820\nfwmark=7\n"
    f"public_key={KEYS[0].hex()}\npreshared_key={'cd' * 32}\nprotocol_version=1\nendpoint=10.0.0.1:51820\n"
    "last_handshake_time_sec=1700000000\nlast_handshake_time_nsec=500000000\ntx_bytes=10\nrx_bytes=20\n"
    "persistent_keepalive_interval=1\nallowed_ip=10.1.0.1/32\nallowed_ip=10.2.0.0/16\n"
    f"public_key={KEYS[1].hex()}\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\n"
    "errno=0\n\n"
).encode()


def test_answer_is_read_and_wiped() -> None:
    answer = bytearray(ANSWER)
    first, second = parse_readings(answer)
    assert first == PeerReading(
        PublicKey(KEYS[0]), "10.0.0.1:51820", 1700000000.5, 20, 10, 1, ("10.1.0.1/32", "10.2.0.0/16")
    )
    assert second == PeerReading(PublicKey(KEYS[1]))
    assert not any(answer)


@pytest.mark.parametrize(
    "old, new, why",
    [
        (b"errno=0", b"errno=-13", "Permission denied"),
        (b"errno=0\n", b"", "no errno"),
        (b"rx_bytes=20", b"rx_bytes=", "no number"),
        (b"rx_bytes=20", b"rx_bytes=" + b"9" * 40, "no number"),
        (b"fwmark=7", b"fwmark", "without '='"),
        (KEYS[0].hex().encode(), b"zz", "malformed peer"),
    ],
)
def test_bad_answer_is_refused_without_showing_keys(old: bytes, new: bytes, why: str) -> None:
    answer = bytearray(ANSWER.replace(old, new, 1))
    with pytest.raises(TunnelError, match=why) as caught:
        parse_readings(answer)
    assert "abab" not in str(caught.value) and "cdcd" not in str(caught.value)
    assert not any(answer)


def test_mangled_answers_never_raise_anything_else() -> None:
    dice = random.Random(2)
    for _ in range(2000):
        answer = bytearray(ANSWER)
        for _ in range(dice.randint(1, 4)):
            match dice.randint(0, 2):
                case 0:
                    answer[dice.randrange(len(answer))] = dice.randrange(256)
                case 1:
                    del answer[dice.randrange(len(answer)) :]
                    answer += b"\n"
                case 2:
                    at = dice.randrange(len(answer))
                    answer[at:at] = answer[: dice.randrange(200)]
        try:
            parse_readings(answer)
        except TunnelError as problem:
            assert "ababab" not in str(problem)


class FakeDaemon:
    """Answers like wireguard-go, in pieces of one byte, and keeps what it was told."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers, self.heard = answers, bytearray()

    async def serve(self, stream: trio.SocketStream) -> None:
        for answer in self.answers:
            while not self.heard.endswith(b"\n\n"):
                piece = await stream.receive_some(100)
                if not piece:
                    return
                self.heard += piece
            self.heard += b"|"
            for byte in answer:
                with suppress(trio.BrokenResourceError):  # the client may have heard enough
                    await stream.send_all(bytes([byte]))
        await stream.aclose()


def talk(answers: list[bytes], use: Callable[[UapiClient], Any]) -> tuple[Any, bytes]:
    daemon = FakeDaemon(answers)

    async def main() -> Any:
        ours, theirs = (trio.SocketStream(end) for end in trio.socket.socketpair())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.serve, theirs)
            client = UapiClient("test0", ours)
            try:
                return await use(client)
            finally:
                await client.aclose()

    return trio.run(main), bytes(daemon.heard)


def test_client_says_what_the_protocol_asks_for() -> None:
    key = generate()

    async def use(client: UapiClient) -> list[PeerReading]:
        await client.configure(key, 51820)
        await client.put_peer(PublicKey(KEYS[0]), "10.0.0.1:5", [], 1)
        await client.put_peer(PublicKey(KEYS[0]), None, [], 0, PresharedKey(KEYS[1]))
        await client.set_keepalive(PublicKey(KEYS[0]), 0)
        await client.remove_peer(PublicKey(KEYS[0]))
        return await client.readings()

    readings, heard = talk([b"errno=0\n\n"] * 5 + [ANSWER], use)
    assert len(readings) == 2
    secret, name = key.hex().decode(), KEYS[0].hex()
    assert heard.decode().split("|")[:-1] == [
        f"set=1\nprivate_key={secret}\nlisten_port=51820\nreplace_peers=true\n\n",
        f"set=1\npublic_key={name}\nreplace_allowed_ips=true\nendpoint=10.0.0.1:5\n"
        "persistent_keepalive_interval=1\n\n",
        f"set=1\npublic_key={name}\npreshared_key={KEYS[1].hex()}\nreplace_allowed_ips=true\n"
        "persistent_keepalive_interval=0\n\n",
        f"set=1\npublic_key={name}\nupdate_only=true\npersistent_keepalive_interval=0\n\n",
        f"set=1\npublic_key={name}\nremove=true\n\n",
        "get=1\n\n",
    ]


def test_client_reports_refusal_silence_flood_and_death(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(client: UapiClient) -> object:
        return await client.readings()

    async def configure(client: UapiClient) -> object:
        return await client.configure(generate(), 1)

    def outcome(answers: list[bytes], use: Callable[[UapiClient], Any]) -> BaseException:
        with pytest.raises(BaseExceptionGroup) as caught:
            talk(answers, use)
        (problem,) = caught.value.exceptions
        return problem

    assert "private key and listen port" in str(outcome([b"errno=-98\n\n"], configure))
    assert isinstance(outcome([b"private_key=ab"], read), DeviceLost)
    monkeypatch.setattr(uapi, "ANSWER_LIMIT", 100)
    assert "more than 100 bytes" in str(outcome([ANSWER], read))
    monkeypatch.setattr(uapi, "ANSWER_SECONDS", 0.05)

    async def silent() -> None:
        ours, theirs = (trio.SocketStream(end) for end in trio.socket.socketpair())
        with pytest.raises(DeviceLost, match="silent"):
            await UapiClient("test0", ours).readings()
        await theirs.aclose()

    trio.run(silent)


def test_kernel_answer_is_read_as_the_library_decodes_it() -> None:
    """Not run against a kernel here: the messages are encoded and decoded by the library itself."""
    wireguard = pytest.importorskip("pyroute2.netlink.generic.wireguard")
    peer = {
        "attrs": [
            ["WGPEER_A_PUBLIC_KEY", PublicKey(KEYS[0]).base64()],
            ["WGPEER_A_ENDPOINT", {"addr": "10.0.0.1", "port": 51820}],
            ["WGPEER_A_LAST_HANDSHAKE_TIME", {"tv_sec": 1700000000, "tv_nsec": 500000000}],
            ["WGPEER_A_RX_BYTES", 20],
            ["WGPEER_A_TX_BYTES", 10],
            ["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", 1],
        ]
    }
    idle = {"attrs": [["WGPEER_A_PUBLIC_KEY", PublicKey(KEYS[1]).base64()]]}
    message = wireguard.wgmsg()
    message["attrs"] = [["WGDEVICE_A_IFNAME", "wg0"], ["WGDEVICE_A_PEERS", [peer, idle]]]
    message.encode()
    decoded = wireguard.wgmsg(message.data)
    decoded.decode()
    assert parse_kernel([decoded]) == [
        PeerReading(PublicKey(KEYS[0]), "10.0.0.1:51820", 1700000000.5, 20, 10, 1),
        PeerReading(PublicKey(KEYS[1])),
    ]


def test_kernel_requests_say_what_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise without a kernel: what the library would send, decoded again."""
    wireguard = pytest.importorskip("pyroute2.netlink.generic.wireguard")
    sent: list[dict[str, Any]] = []

    class Unconnected(wireguard.AsyncWireGuard):  # type: ignore[misc]
        prid, pid = 77, 5

        def __init__(self) -> None: ...

        def sendto(self, data: bytes, _: object) -> None:
            message = wireguard.wgmsg(bytes(data))
            message.decode()
            sent.append(dict(message["attrs"]))

        async def get(self) -> AsyncIterator[dict[str, Any]]:
            yield {"header": {"error": None}}

    class Socket:
        def set(self, name: str, **what: Any) -> None:
            asyncio.run(Unconnected().set(name, **what))

        def close(self) -> None: ...

    monkeypatch.setattr(device, "_wireguard_socket", Socket)
    key, peer = generate(), PublicKey(KEYS[0])

    async def use() -> None:
        kernel = device._KernelDevice("wg0")
        await kernel.configure(key, 51820)
        await kernel.put_peer(peer, (ip_address("10.0.0.1"), 5), [ip_network("10.1.0.2/32")], 1)
        await kernel.put_peer(peer, None, [ip_network("10.1.0.2/32")], 0, PresharedKey(KEYS[1]))
        await kernel.set_keepalive(peer, 0)
        await kernel.remove_peer(peer)

    trio.run(use)
    assert (
        sent[0]["WGDEVICE_A_PRIVATE_KEY"] == bytes(key.base64())
        and sent[0]["WGDEVICE_A_LISTEN_PORT"] == 51820
    )
    entries = [dict(message["WGDEVICE_A_PEERS"][0]["attrs"]) for message in sent[1:]]
    assert {entry["WGPEER_A_PUBLIC_KEY"] for entry in entries} == {peer.base64().encode()}
    added, shared, quiet, removed = entries
    secret = PresharedKey(KEYS[1]).base64()
    assert shared["WGPEER_A_PRESHARED_KEY"] == bytes(secret) and "WGPEER_A_ENDPOINT" not in shared
    assert "WGPEER_A_PRESHARED_KEY" not in added
    assert (added["WGPEER_A_ENDPOINT"]["addr"], added["WGPEER_A_ENDPOINT"]["port"]) == ("10.0.0.1", 5)
    assert [network["addr"] for network in added["WGPEER_A_ALLOWEDIPS"]] == ["10.1.0.2/32"]
    assert added["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"] == 1 and added["WGPEER_A_FLAGS"] == 2  # replace
    assert (
        quiet["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"] == 0 and quiet["WGPEER_A_FLAGS"] == 4
    )  # update only
    assert removed["WGPEER_A_FLAGS"] == 1


# --- configuration and health, without any device ----------------------------------------------------------


def configured(**changes: Any) -> TunnelConfig:
    keys = [PublicKey(key).base64() for key in KEYS]
    told: dict[str, Any] = {
        "index": 0,
        "interface": "t0",
        "private_key": "k",
        "listen_port": 1,
        "address": "10.1.0.1/24",
        "peers": [(1, keys[0], "h", 1, ["10.1.0.2/32"]), (2, keys[1], "h", 1, ["10.1.0.3/32"])],
    }
    return TunnelConfig.from_text(**{**told, **changes})


def test_configuration_refuses_what_cannot_work() -> None:
    keys = [PublicKey(key).base64() for key in KEYS]
    good = configured()
    assert [peer.index for peer in good.peers] == [1, 2] and str(good.address) == "10.1.0.1"
    for peers, why in [
        ([], "without peers"),
        ([(0, keys[0], "h", 1, ["10.1.0.2/32"])], "same index"),
        ([(1, keys[0], "h", 1, ["10.1.0.2/32"]), (2, keys[0], "h", 1, ["10.1.0.3/32"])], "same public key"),
        ([(1, keys[0], "h", 1, ["10.1.0.0/29"]), (2, keys[1], "h", 1, ["10.1.0.3/32"])], "our own address"),
        ([(1, keys[0], "h", 1, ["10.1.0.2/31"]), (2, keys[1], "h", 1, ["10.1.0.3/32"])], "overlap"),
        ([(1, keys[0], "h", 1, ["nowhere"])], "nowhere"),
    ]:
        with pytest.raises(TunnelError, match=why):
            configured(peers=peers)


KEY = PublicKey(KEYS[0])


def reading(rx: int, handshake: float = 1.0) -> PeerReading:
    return PeerReading(KEY, "10.0.0.1:1", handshake, rx, 2 * rx)


def test_initiator_starts_afresh_until_it_is_heard_and_when_it_hears_nothing() -> None:
    watch = PeerWatch(True, jitter=lambda: 1.0)
    now = 100.0
    for patience in (*RETRY_SECONDS, RETRY_SECONDS[-1]):
        watch.added(now, True)
        assert watch.see(reading(0, 0.0), now + patience + RETRY_JITTER - 0.01) is Act.NOTHING
        assert watch.state(now, 1.0) is PeerState.JOINING
        assert watch.see(reading(0, 0.0), now + patience + RETRY_JITTER + 1e-6) is Act.RESTART
        now += patience + RETRY_JITTER
    watch.added(now, True)
    assert watch.see(reading(92), now) is Act.NOTHING
    assert watch.state(now + SUSPECT_SECONDS, 1.0) is PeerState.UP
    assert watch.state(now + SUSPECT_SECONDS + 0.1, 1.0) is PeerState.SUSPECT
    assert watch.see(reading(92), now + RESTART_SECONDS) is Act.RESTART
    watch.added(now + RESTART_SECONDS, True)
    assert watch.see(reading(0, 0.0), now + DOWN_SECONDS + 0.1) is Act.RESTART
    assert watch.state(now + DOWN_SECONDS + 0.1, 1.0) is PeerState.DOWN
    assert watch.see(reading(32), now + 11.0) is Act.NOTHING
    assert watch.state(now + 11.0, 1.0) is PeerState.UP
    assert (watch.rx, watch.tx) == (92 + 32, 2 * (92 + 32))  # counters outlive the entries


def test_responder_speaks_only_after_the_initiator_has() -> None:
    watch = PeerWatch(False)
    watch.added(0.0, False)
    assert watch.see(reading(0, 0.0), 1000.0) is Act.NOTHING
    assert watch.see(reading(148), 1001.0) is Act.KEEPALIVE_ON
    assert watch.see(reading(148), 1002.0) is Act.NOTHING
    assert watch.see(reading(148), 1001.0 + DOWN_SECONDS) is Act.KEEPALIVE_OFF
    assert watch.see(reading(148), 1002.0 + DOWN_SECONDS) is Act.NOTHING
    assert watch.see(reading(180), 1020.0) is Act.KEEPALIVE_ON


def test_a_session_too_old_to_use_is_down() -> None:
    watch = PeerWatch(True)
    watch.added(0.0, True)
    watch.see(reading(92, 1000.0), 0.0)
    assert watch.state(0.0, 1000.0 + 179.0) is PeerState.UP
    assert watch.state(0.0, 1000.0 + 181.0) is PeerState.DOWN


# --- capture and relay -------------------------------------------------------------------------------------


def ethernet(payload: bytes, protocol: int = 17, kind: int = 0x0800, fragment: int = 0) -> bytes:
    if protocol == 17:
        payload = (
            (1).to_bytes(2, "big")
            + (2).to_bytes(2, "big")
            + (len(payload) + 8).to_bytes(2, "big")
            + bytes(2)
            + payload
        )
    header = bytes([0x45, 0]) + bytes(4) + fragment.to_bytes(2, "big") + bytes([64, protocol]) + bytes(2)
    return bytes(12) + kind.to_bytes(2, "big") + header + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + payload


def test_capture_tells_wireguard_from_the_rest() -> None:
    def message(kind: int, size: int) -> bytes:
        return bytes([kind, 0, 0, 0]) + os.urandom(size - 4)

    for kind, size in ((1, 148), (2, 92), (3, 64), (4, 32), (4, 1408), (4, 1452)):
        assert capture.classify(ethernet(message(kind, size))).kind == "wireguard"
        assert capture.classify(ethernet(message(kind, size)) + bytes(12)).kind == "wireguard"  # padding
    for kind, size in ((0, 148), (5, 148), (1, 147), (2, 148), (4, 31), (4, 33)):
        assert capture.classify(ethernet(message(kind, size))).kind == "udp"
    assert capture.classify(ethernet(b"\x04\x00\x01\x00" + bytes(28))).kind == "udp"
    several = message(4, 160) + message(4, 160) + message(4, 96)
    assert capture.classify(ethernet(several), 160).kind == "wireguard"
    assert capture.classify(ethernet(several[:160] + bytes(160)), 160).kind == "udp"
    assert capture.classify(ethernet(bytes(20), 6)).kind == "tcp"
    assert capture.classify(ethernet(bytes(20), 1)).kind == "icmp"
    quoted = ethernet(message(1, 148))[14:]
    assert capture.classify(ethernet(bytes([3, 3]) + bytes(6) + quoted, 1)).kind == "unreachable"
    assert capture.classify(ethernet(bytes([3, 3]) + bytes(6) + quoted[:28] + b"clear", 1)).kind == "icmp"
    assert capture.classify(ethernet(bytes([8, 0]) + bytes(6) + quoted, 1)).kind == "icmp"
    assert capture.classify(ethernet(bytes(20), kind=0x0806)).kind == "neighbour"
    assert capture.classify(ethernet(message(4, 32), fragment=5)).kind == "fragment"
    for cut in range(60):
        capture.classify(ethernet(message(4, 32))[:cut])


@pytest.mark.parametrize(
    "text, shown",
    [
        ("20", "delay=10,jitter=0,rate=0,loss=0,queue=100"),
        ("40:100", "delay=20,jitter=0,rate=100,loss=0,queue=100"),
    ],
)
def test_link_shape_is_read(text: str, shown: str) -> None:
    assert str(relay.Shape.parse(text)) == shown


@pytest.mark.parametrize("text", ["", "x", "-1", "20:x", "20:-5", "nan", "1e9"])
def test_bad_link_shape_is_refused(text: str) -> None:
    with pytest.raises(TunnelError):
        relay.Shape.parse(text)


@pytest.fixture(scope="session")
def relay_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("needs gcc, which compiles the relay")
    return relay.build(tmp_path_factory.mktemp("relay") / "relay")


@contextmanager
def relayed(
    program: Path, shape: relay.Shape
) -> Iterator[tuple[relay.Relay, socket.socket, socket.socket, list[Any]]]:
    """Two loopback sockets with a relay between; the list is where each of them sends."""
    with ExitStack() as stack:
        a, b, x, y = (stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(4))
        for end in (a, b, x, y):
            end.bind(("127.0.0.1", 0))
            end.settimeout(5)
        towards = [x.getsockname(), y.getsockname()]
        x.close(), y.close()
        name = [
            "{}:{}".format(*where) for where in (towards[0], a.getsockname(), towards[1], b.getsockname())
        ]
        running = stack.enter_context(relay.Relay(program, shape, [relay.Pair(*name)]))
        yield running, a, b, towards


def test_relay_delays_keeps_order_and_answers_from_where_it_was_asked(relay_program: Path) -> None:
    shape = relay.Shape(delay_ms=30, jitter_ms=20)
    with relayed(relay_program, shape) as (_, a, b, towards):
        start = time.monotonic()
        for number in range(200):
            a.sendto(number.to_bytes(2, "big") * 8, towards[0])
        got = [b.recvfrom(2048) for _ in range(200)]
        assert 0.010 <= time.monotonic() - start < 2.0
        assert [int.from_bytes(data[:2], "big") for data, _ in got] == list(range(200))
        assert {sender for _, sender in got} == {towards[1]}
        b.sendto(b"back", towards[1])
        assert a.recvfrom(2048) == (b"back", towards[0])


def test_relay_holds_to_its_rate_and_drops_what_the_queue_cannot_hold(relay_program: Path) -> None:
    shape = relay.Shape(rate_mbit=8, queue_ms=50)  # 1000 bytes take 1.028 ms
    with relayed(relay_program, shape) as (running, a, b, towards):
        start = time.monotonic()
        for _ in range(200):
            a.sendto(bytes(1000), towards[0])
        b.settimeout(0.5)
        number = 0
        while True:
            try:
                b.recv(2048)
            except TimeoutError:
                break
            number += 1
            last = time.monotonic()
        counters = running.counters()[0]
        assert 45 <= number <= 70 and counters["dropped"] == 200 - number
        assert last - start >= number * 0.00102 - 0.005


def test_relay_loses_its_share_and_everything_in_a_blackout(relay_program: Path) -> None:
    with relayed(relay_program, relay.Shape(loss_percent=30)) as (running, a, b, towards):
        for _ in range(1000):
            a.sendto(b"x" * 32, towards[0])
            b.settimeout(0.002)
            with suppress(TimeoutError):
                b.recv(64)
        assert 230 <= running.counters()[0]["lost"] <= 370
        running.blackout()
        before = running.counters()[0]["lost"]
        for _ in range(50):
            a.sendto(b"x" * 32, towards[0])
        time.sleep(0.05)
        assert running.counters()[0]["lost"] == before + 50
        running.blackout()
        a.sendto(b"x" * 32, towards[0])


def test_relay_ignores_strangers_and_refuses_bad_words(relay_program: Path) -> None:
    with relayed(relay_program, relay.Shape()) as (running, _, _, towards):
        with socket.socket(type=socket.SOCK_DGRAM) as stranger:
            stranger.bind(("127.0.0.2", 0))
            stranger.sendto(b"hello", towards[0])
            time.sleep(0.05)
        assert running.counters()[0]["strangers"] == 1
    for words in (
        ["--pair", "x"],
        ["--shape", "delay=x"],
        ["--shape", "speed=1"],
        ["--shape", "loss=nan"],
        [],
    ):
        done = subprocess.run([relay_program, *words], capture_output=True, text=True, timeout=5)
        assert done.returncode == 2 and done.stderr.startswith("relay: ")


# --- whole, in network namespaces --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def namespaces_work() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def lab(namespaces_work: None, tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as made:
        yield made


@pytest.mark.netns
def test_three_nodes_reach_each_other_and_only_wireguard_crosses(lab: Lab) -> None:
    with captured(lab, 8.0) as report:
        nodes = lab.start_all()
        for index, node in enumerate(nodes):
            for other in {0, 1, 2} - {index}:
                assert node.ask(f"probe 10.91.0.{other + 1}")["event"] == "probe"
        assert [node.states() for node in nodes] == [
            {1: "up", 2: "up"},
            {0: "up", 2: "up"},
            {0: "up", 1: "up"},
        ]
    assert set(report["kinds"]) <= capture.HARMLESS, json.dumps(report["foreign"])
    assert report["kinds"]["wireguard"] > 100
    link = ip("-n", lab.namespace(0), "link", "show", lab.interface(0))
    assert "mtu 1420" in link
    routes = ip("-n", lab.namespace(0), "route", "show", "dev", lab.interface(0))
    assert "10.91.0.2" in routes and "10.91.0.3" in routes and "initcwnd 64" in routes
    assert [node.end() for node in nodes] == [0, 0, 0]
    for index in range(3):
        assert lab.interface(index) not in ip("-n", lab.namespace(index), "link", "show")
        assert lab.daemon(index) is None
        assert not Path(uapi.socket_path(lab.interface(index))).exists()


@pytest.mark.netns
def test_the_sniffer_sees_what_is_not_wireguard(lab: Lab) -> None:
    """Without this control the test above could pass because the sniffer is blind."""
    with captured(lab, 3.0) as report:
        script = (
            "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'clear', ('10.90.0.2', 9)); "
        )
        script += "t = socket.socket(); t.settimeout(1); t.connect_ex(('10.90.0.3', 9))"
        subprocess.run(["ip", "netns", "exec", lab.namespace(0), sys.executable, "-c", script], check=True)
    assert report["kinds"]["udp"] >= 1 and report["kinds"]["tcp"] >= 1
    assert any("636c656172" in sample["bytes"] for sample in report["foreign"])


@pytest.mark.netns
def test_a_late_responder_is_found_within_the_retry_interval(lab: Lab) -> None:
    first = lab.start(0, peers=[[1, lab.keys[1].public().hex(), "10.90.0.2", 51820, ["10.91.0.2/32"]]])
    assert first.hear()["event"] == "raised"
    time.sleep(4)
    second = lab.start(1, peers=[[0, lab.keys[0].public().hex(), "10.90.0.1", 51820, ["10.91.0.1/32"]]])
    raised = second.hear()
    up = second.hear()
    assert up["event"] == "up" and up["seconds"] - raised["seconds"] < RETRY_SECONDS[-1] + RETRY_JITTER + 1.0


@pytest.mark.netns
def test_wireguard_go_killed_is_revived_and_its_sockets_live(lab: Lab) -> None:
    nodes = lab.start_all()
    daemon = lab.daemon(1)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    time.sleep(0.2)
    nodes[1].wait_for({0: "up", 2: "up"}, 10)
    assert lab.daemon(1) not in (None, daemon)
    # The listener of node 1 was bound to the interface before: it is still there, so the interface stayed.
    assert nodes[0].ask("probe 10.91.0.2")["event"] == "probe"
    assert nodes[2].ask("probe 10.91.0.2")["event"] == "probe"
    assert nodes[1].ask("status")["lost"] == 1


@pytest.mark.netns
def test_node_killed_takes_wireguard_go_along_and_starts_again(lab: Lab) -> None:
    nodes = lab.start_all()
    for index in (0, 2):  # an initiator, a responder
        daemon = lab.daemon(index)
        assert daemon is not None
        nodes[index].child.kill()
        nodes[index].child.wait()
        deadline = time.monotonic() + 5
        while lab.daemon(index) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lab.daemon(index) is None
        nodes[index].clear()
        nodes[index] = lab.start(index)
        assert nodes[index].hear()["event"] == "raised"
        up = nodes[index].hear()
        assert up["event"] == "up" and up["seconds"] < RESTART_SECONDS + 6.0
        assert nodes[index].ask("probe 10.91.0.2")["event"] == "probe"
    assert nodes[1].wait_for({0: "up", 2: "up"}, 5) < 5


@pytest.mark.netns
def test_wrong_key_never_joins_and_is_named(lab: Lab) -> None:
    stranger = generate().public().base64()
    good = [1, lab.keys[1].public().base64(), "10.90.0.2", 51820, ["10.91.0.2/32"]]
    node = lab.start(0, wait=3, peers=[good, [2, stranger, "10.90.0.3", 51820, ["10.91.0.3/32"]]])
    lab.start(1, wait=30)
    lab.start(2, wait=30)
    assert node.hear()["event"] == "raised"
    error = node.hear()
    assert error["kind"] == "HandshakeTimeout" and "with peer 2 " in error["why"]
    assert node.child.wait(10) == 9
    assert lab.daemon(0) is None


@pytest.mark.netns
def test_what_cannot_be_raised_says_why(lab: Lab) -> None:
    def refusal(**changes: Any) -> dict[str, Any]:
        node = lab.start(0, **changes)
        found = node.hear()
        node.child.wait(10)
        node.clear()
        return found

    assert "no interface name" in refusal(interface="a b")["why"]
    ip("-n", lab.namespace(0), "link", "add", "taken0", "type", "bridge")
    assert "exists and is not ours" in refusal(interface="taken0")["why"]
    lab.start(0)
    assert lab.nodes[0].hear()["event"] == "raised"
    first = lab.nodes[0]
    assert "already runs this tunnel" in refusal()["why"]
    first.clear()
    (lab.folder / "key0").chmod(0o644)
    assert "chmod 600" in refusal()["why"]


@pytest.mark.netns
def test_interface_left_by_a_dead_process_is_replaced(lab: Lab) -> None:
    """As the kernel's WireGuard leaves one after a kill; a bridge stands in for it."""
    name = lab.interface(0)
    ip("-n", lab.namespace(0), "link", "add", name, "type", "bridge")
    ip("-n", lab.namespace(0), "link", "set", name, "alias", "wg-mesh pid 4194303 started 1")
    assert [node.ask("status")["event"] for node in lab.start_all()] == ["status"] * 3


@pytest.mark.netns
def test_bulk_probe_finds_an_mtu_that_does_not_fit(lab: Lab) -> None:
    """The path drops what is larger than 1400 bytes; small messages pass, and so the tunnel counts as up."""
    for index in range(3):
        ip("-n", lab.hub, "link", "set", f"v{index}", "mtu", "1400")
        # A bridge forwards several datagrams in one buffer whatever their size, so they must leave singly.
        ip("-n", lab.namespace(index), "link", "set", "eth0", "gso_max_segs", "1")
    nodes = lab.start_all()
    assert nodes[0].ask("pings 10.91.0.2 5")["event"] == "pings"
    answer = nodes[0].ask("probe 10.91.0.2")
    assert answer["event"] == "failed" and "MTU" in answer["why"]
    assert nodes[0].states()[1] == "up"


@pytest.mark.netns
def test_over_a_wide_area_link(lab: Lab, relay_program: Path) -> None:
    """20 ms round trip and 100 Mbit/s each way, and a cut of the line in the middle."""
    pairs, endpoints = [], {}
    port = itertools.count(41000)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        at_a, at_b = next(port), next(port)
        endpoints[a, b], endpoints[b, a] = at_a, at_b
        peers = [f"10.90.0.{end + 1}:51820" for end in (a, b)]
        pairs.append(relay.Pair(f"10.90.0.254:{at_a}", peers[0], f"10.90.0.254:{at_b}", peers[1]))
    prefix = ["ip", "netns", "exec", lab.hub]
    with relay.Relay(relay_program, relay.Shape.parse("20:100"), pairs, prefix=prefix, fifo=True) as running:
        nodes = []
        for index in range(3):
            peers = [
                [j, lab.keys[j].public().hex(), "10.90.0.254", endpoints[index, j], [f"10.91.0.{j + 1}/32"]]
                for j in range(3)
                if j != index
            ]
            nodes.append(lab.start(index, peers=peers))
        for node in nodes:
            assert node.hear()["event"] == "raised"
        for node in nodes:
            assert node.hear()["event"] == "up"
        pings = nodes[0].ask("pings 10.91.0.2 30")
        rate = nodes[0].ask("rate 10.91.0.3 3")
        print(f"over 20 ms and 100 Mbit/s: {pings}, {rate}")
        assert 20.0 <= pings["least"] < 24.0
        assert rate["mbit"] < 98.0
        counters = running.counters()
        assert all(entry["strangers"] == 0 for entry in counters)
        running.blackout()
        assert nodes[0].wait_for({1: "suspect", 2: "suspect"}, 10) < SUSPECT_SECONDS + 2.0
        running.blackout()
        assert nodes[0].wait_for({1: "up", 2: "up"}, 15) < 10.0
        assert nodes[0].ask("probe 10.91.0.2")["event"] == "probe"
