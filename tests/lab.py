"""A network of namespaces with a tunnel node in each, for tests and benchmarks of the tunnel.

Needs root, /dev/net/tun and wireguard-go; `why_not` says what is missing.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from wg import uapi
from wg.device import find_userspace
from wg.keys import generate, save_private

NODE = Path(__file__).with_name("tunnel_node.py")
ROOT = NODE.parent.parent


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    if not shutil.which("ip"):
        return "needs the program ip (package iproute2)"
    if find_userspace() is None:
        return "needs wireguard-go (package wireguard-go)"
    if subprocess.run(["ip", "netns", "add", f"wgt-try-{os.getpid()}"], capture_output=True).returncode:
        return "needs the right to make network namespaces"
    subprocess.run(["ip", "netns", "del", f"wgt-try-{os.getpid()}"], check=True)
    return None


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Node:
    """A `tunnel_node.py` in a namespace: told a line, it answers with a line."""

    def __init__(self, namespace: str, config: Path) -> None:
        self.errors = open(config.with_suffix(".log"), "a+")
        self.public_key = ""  # told when it is raised
        self.heard = b""  # not yet asked for
        self.child = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, str(NODE), str(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=config.parent,
        )

    def hear(self, seconds: float = 40.0) -> dict[str, Any]:
        assert self.child.stdout is not None
        handle, end = self.child.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self.heard:
            ready, _, _ = select.select([handle], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(handle, 65536) if ready else b""
            if not piece:
                self.errors.seek(0)
                pytest.fail(f"the node said nothing for {seconds} s; its log:\n{self.errors.read()[-4000:]}")
            self.heard += piece
        line, _, self.heard = self.heard.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, words: str, seconds: float = 40.0) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(words.encode() + b"\n")
        self.child.stdin.flush()
        return self.hear(seconds)

    def hear_raised(self) -> None:
        found = self.hear()
        assert found["event"] == "raised", found
        self.public_key = found["public_key"]

    def states(self) -> dict[int, str]:
        return {entry["peer"]: entry["state"] for entry in self.ask("status")["peers"]}

    def wait_for(self, states: dict[int, str], seconds: float) -> float:
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if self.states() == states:
                return time.monotonic() - start
            time.sleep(0.05)
        pytest.fail(f"peers are {self.states()}, not {states}, after {seconds} s")

    def end(self) -> int:
        assert self.child.stdin is not None
        self.child.stdin.close()
        return self.child.wait(20)

    def clear(self) -> None:
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        self.errors.close()


class Lab:
    """A network of namespaces: three nodes on a bridge, whose own namespace can sniff or hold a relay."""

    numbers = itertools.count()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"wgt{os.getpid()}{'abcdefghijklmnopqrstuvwxyz'[next(self.numbers) % 26]}"
        self.hub = f"{self.name}-hub"
        self.keys = [generate() for _ in range(3)]
        self.seeds = [secrets.token_hex(32) for _ in range(3)]  # of identities, for rotation
        self.nodes: dict[int, Node] = {}
        self.made: list[str] = []

    def __enter__(self) -> Lab:
        self._namespace(self.hub)
        ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
        ip("-n", self.hub, "addr", "add", "10.90.0.254/24", "dev", "br0")
        ip("-n", self.hub, "link", "set", "br0", "up")
        for index in range(3):
            name = self.namespace(index)
            self._namespace(name)
            ip(
                "link",
                "add",
                f"v{index}",
                "netns",
                self.hub,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            ip("-n", self.hub, "link", "set", f"v{index}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.90.0.{index + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            save_private(self.folder / f"key{index}", self.keys[index])
        return self

    def _namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self.made.append(name)
        ip("-n", name, "link", "set", "lo", "up")
        # Strict, as on many hosts; only rotation would mind, and it has to see to that itself.
        ip(
            "netns",
            "exec",
            name,
            "sysctl",
            "-qw",
            *(f"net.ipv4.conf.{i}.rp_filter=1" for i in ("all", "default")),
        )

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.clear()
        for name in self.made:
            for pid in ip("netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)  # all in here were started by us
            ip("netns", "del", name)
        for socket_file in Path(uapi.SOCKET_DIRECTORY).glob(f"{self.name}-*.sock"):
            socket_file.unlink()

    def namespace(self, index: int) -> str:
        return f"{self.name}-{index}"

    def interface(self, index: int) -> str:
        return f"{self.name}-{index}"

    def start(self, index: int, namespace: str | None = None, **changes: Any) -> Node:
        told = {
            "wait": 30,
            "index": index,
            "interface": self.interface(index),
            "private_key": str(self.folder / f"key{index}"),
            "listen_port": 51820,
            "address": f"10.91.0.{index + 1}/24",
            "peers": [
                [j, self.keys[j].public().base64(), f"10.90.0.{j + 1}", 51820, [f"10.91.0.{j + 1}/32"]]
                for j in range(3)
                if j != index
            ],
        }
        config = self.folder / f"node{index}.json"
        config.write_text(json.dumps({**told, **changes}))
        self.nodes[index] = Node(namespace or self.namespace(index), config)
        return self.nodes[index]

    def rotation(self, index: int, seconds: float = 3600.0) -> dict[str, Any]:
        """What a node's configuration says of rotation."""
        return {"seconds": seconds, "record": str(self.folder / f"epochs{index}"), "seeds": self.seeds}

    def start_all(self, **changes: Any) -> list[Node]:
        nodes = [self.start(index, **changes) for index in range(3)]
        for node in nodes:
            assert node.hear()["event"] == "raised"
        for node in nodes:
            assert node.hear()["event"] == "up"
        return nodes

    def daemon(self, index: int) -> int | None:
        """The pid of the node's wireguard-go."""
        for pid in ip("netns", "pids", self.namespace(index)).split():
            with open(f"/proc/{pid}/comm") as file:
                if file.read().strip() == "wireguard-go":
                    return int(pid)
        return None


@contextmanager
def captured(lab: Lab, seconds: float) -> Iterator[dict[str, Any]]:
    """Sniff in the hub while the body runs, which must take less; the report is there afterwards."""
    found: dict[str, Any] = {}
    child = subprocess.Popen(
        ["ip", "netns", "exec", lab.hub, sys.executable, "-m", "wg.capture", str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    try:
        yield found
        found.update(json.loads(child.communicate(timeout=seconds + 20)[0]))
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


class Enclave:
    """A namespace with nothing but loopback, and the relay of `wg.vsock` between it and a node's own
    namespace, over unix streams in the place of vsock. There WireGuard finds peer j at `port(j)`."""

    ports = 5

    def __init__(self, lab: Lab, index: int) -> None:
        self.namespace = f"{lab.name}-in"
        lab._namespace(self.namespace)
        self._lab, self._index = lab, index
        self._others = [j for j in range(3) if j != index]
        self._path = lab.folder / "vsock"
        self.parent = self.start_parent()
        peers = {j: ("127.0.0.1", self.port(j)) for j in self._others}
        self.inside = self._start(self.namespace, "enclave", "127.0.0.1", peers)

    def port(self, peer: int) -> int:
        return 41000 + 100 * peer

    def start_parent(self) -> subprocess.Popen[bytes]:
        self._path.unlink(missing_ok=True)
        peers = {j: (f"10.90.0.{j + 1}", 51820) for j in self._others}
        return self._start(self._lab.namespace(self._index), "parent", f"10.90.0.{self._index + 1}", peers)

    def _start(self, namespace: str, role: str, host: str, peers: object) -> subprocess.Popen[bytes]:
        script = (
            "import socket, trio; from wg import vsock; "
            f"at = vsock.Streams(socket.AF_UNIX, {str(self._path)!r}); "
            f"trio.run(vsock.{role}, at, ({host!r}, 51820), {peers}, {self.ports})"
        )
        with open(self._lab.folder / "vsock.log", "ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, "-c", script],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def clear(self) -> None:
        for child in (self.parent, self.inside):
            child.kill()
            child.wait()
