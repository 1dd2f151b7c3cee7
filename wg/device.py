"""One WireGuard interface: made in the kernel where it can be, else by a supervised wireguard-go.

The choice is made by trying. The kernel answers "operation not supported" when it has no WireGuard; only then
is wireguard-go started. Any other refusal (no permission, name taken) is an error: falling back silently
would hide it.

An interface is marked with the process that made it. A mark of a process that no longer lives is cleared away
on the next start, so that a killed peer can start again; an interface of anybody else is left alone.

pyroute2 runs an event loop of its own, so every netlink call happens in a worker thread with a socket opened
and closed inside that call (3-7 ms for address, MTU and state together).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

import structlog
import trio

from wg.errors import DeviceLost, NotPossibleHere, TunnelError
from wg.keys import KEY_BYTES, PresharedKey, PrivateKey, PublicKey
from wg.uapi import PeerReading, UapiClient, socket_path

log = structlog.get_logger("wg.device")

T = TypeVar("T")
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: What fits an Ethernet of 1500 under WireGuard over IPv6 (80 bytes of overhead). A tunnel MTU of 1500 all
#: but stops TCP while ping of full size still passes, so this is set explicitly and probed (see `wg.probe`).
MTU = 1420
#: First window of a TCP connection over the tunnel, in segments: a round of the protocol is larger than the
#: usual ten, and would wait for an acknowledgement in its middle (measured: 47 to 43 ms at 40 ms round trip).
INITIAL_WINDOW = 64
#: BBR paces a flow that sends now and then and costs 1-5 ms per round; cubic does not.
CONGESTION_CONTROL = "cubic"
#: wireguard-go is configurable 11-18 ms after its start; a busy machine may need a hundred times as much.
START_SECONDS = 10.0
#: After SIGTERM wireguard-go removes its interface and ends within milliseconds.
STOP_SECONDS = 3.0
NETLINK_SECONDS = 10.0
#: Older ones lack segmentation offload: a fifth of the throughput, four times the CPU per byte.
OLDEST_FAST_VERSION = (0, 0, 20230223)
_TUNSETIFF = 0x400454CA
_TUN_FLAGS = 0x0001 | 0x1000 | 0x4000  # IFF_TUN, IFF_NO_PI, IFF_VNET_HDR
INTERFACE_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]{0,14}")
#: A route that is missing or unreachable, a blackhole, one that is prohibited.
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES)
_MARK = "wg-mesh pid {pid} started {start}"
_MARK_PATTERN = re.compile(r"wg-mesh pid (\d+) started (\d+)")

# Runs in the child before it becomes wireguard-go. Keys live in that process: no core dumps, no files for
# others, and no life after ours (PR_SET_PDEATHSIG is 1), also when we are killed outright.
_BECOME = """
import ctypes, os, resource, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.umask(0o077)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Userspace:
    """A wireguard-go program found on this host."""

    path: str
    version: tuple[int, ...]

    @property
    def slow(self) -> bool:
        return self.version < OLDEST_FAST_VERSION


def locate_userspace(path: str | None = None) -> str | None:
    """Where the wireguard-go at `path` or on the search path is; None if there is none."""
    return shutil.which(path or "wireguard-go") or shutil.which(f"/usr/sbin/{path or 'wireguard-go'}")


def find_userspace(path: str | None = None) -> Userspace | None:
    """The wireguard-go at `path` or on the search path, with its version; None if there is none."""
    found = locate_userspace(path)
    if found is None:
        return None
    try:
        answer = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=START_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"v(\d+)\.(\d+)\.(\d+)", answer)
    return Userspace(found, tuple(map(int, match.groups())) if match else (0, 0, 0))


class Device(ABC):
    """A raised interface. `lost` is set when it can no longer be used; every call may raise `DeviceLost`."""

    implementation: str

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost = trio.Event()

    @abstractmethod
    async def configure(self, private_key: PrivateKey, listen_port: int) -> None:
        """Give the interface its identity and UDP port, and no peers."""

    @abstractmethod
    async def put_peer(
        self,
        public_key: PublicKey,
        endpoint: tuple[Address, int] | None,
        allowed: Iterable[Network],
        keepalive: int,
        preshared: PresharedKey | None = None,
    ) -> None:
        """Add a peer. A keepalive above 0 starts a handshake at once; without an endpoint the peer speaks
        first."""

    @abstractmethod
    async def set_keepalive(self, public_key: PublicKey, seconds: int) -> None: ...

    @abstractmethod
    async def remove_peer(self, public_key: PublicKey) -> None: ...

    async def revive(self) -> None:
        """Make a lost device usable again, unconfigured. Raises `TunnelError` where that cannot be done."""
        raise TunnelError(f"{self.name}: the interface was removed by somebody else")

    async def cut(self) -> None:
        """End whatever a device that does not obey still does, and call it lost."""
        self.lost.set()

    @abstractmethod
    async def rest(self) -> None:
        """Forget key and peers and go down, which also drops the routes; the interface and its index stay."""

    @abstractmethod
    async def wake(self) -> None:
        """Make a resting device usable again, unconfigured."""

    @abstractmethod
    async def readings(self) -> list[PeerReading]: ...

    async def index(self) -> int:
        """The kernel's number of this interface: the same for as long as the interface exists."""

        def work(ip: Any) -> int:
            index = _index_of(ip, self.name)
            if index is None:
                raise DeviceLost(f"{self.name}: the interface vanished")
            return index

        return await _netlink(f"{self.name}: looking up its index", work)

    async def bring_up(self, addresses: Iterable[Address], mtu: int) -> None:
        """Set MTU and addresses (as single hosts: the routes to peers are separate) and bring it up."""
        own = tuple(addresses)

        def work(ip: Any) -> None:
            index = _index_of(ip, self.name)
            if index is None:
                raise DeviceLost(f"{self.name}: the interface vanished")
            ip.link("set", index=index, mtu=mtu)
            for address in own:
                ip.addr("replace", index=index, address=str(address), prefixlen=address.max_prefixlen)
            ip.link("set", index=index, state="up")

        await _netlink(f"{self.name}: {', '.join(map(str, own)) or 'no address'}", work)

    async def bring_down(self) -> None:
        def work(ip: Any) -> None:
            index = _index_of(ip, self.name)
            if index is not None:
                ip.link("set", index=index, state="down")

        await _netlink(f"{self.name}: going down", work)

    async def accept_from_other_routes(self) -> None:
        """Let packets in whose way back leads through another interface, as it does while two generations
        exist. Raises `NotPossibleHere` where a strict reverse-path filter cannot be set aside."""

        def work() -> None:
            # The larger of this and `all` counts, and 2 is loose. IPv6 has no such filter.
            at = Path(f"/proc/sys/net/ipv4/conf/{self.name}/rp_filter")
            try:
                at.write_text("2")
            except OSError as problem:
                every = at.parent.parent / "all" / "rp_filter"
                if "1" in (at.read_text().strip(), every.read_text().strip()):
                    raise NotPossibleHere(
                        f"{self.name}: {at} cannot be set to 2 ({problem.strerror}), and the reverse-path "
                        "filter would drop what two generations of the tunnel share; set it to 0 or 2 for all"
                    ) from None

        await trio.to_thread.run_sync(work)

    async def route(self, destination: Network, source: Address, metric: int | None = None) -> None:
        """Send what goes to `destination` through this interface, from `source`. A route of the same metric
        is replaced at once, so that no packet finds none."""

        def work(ip: Any) -> None:
            index = _index_of(ip, self.name)
            if index is None:
                raise DeviceLost(f"{self.name}: the interface vanished")
            metrics = {"initcwnd": INITIAL_WINDOW, "initrwnd": INITIAL_WINDOW}
            for extra in ({"cc_algo": CONGESTION_CONTROL}, {}):  # a kernel may lack cubic
                try:
                    ip.route(
                        "replace",
                        dst=str(destination),
                        oif=index,
                        prefsrc=str(source),
                        metrics={**metrics, **extra},
                        **({} if metric is None else {"priority": metric}),
                    )
                    return
                except Exception as problem:
                    if not extra or getattr(problem, "code", None) != errno.EINVAL:
                        raise

        await _netlink(f"{self.name}: route to {destination}", work)


class _KernelDevice(Device):
    """WireGuard in the kernel, set through generic netlink."""

    implementation = "kernel"

    async def configure(self, private_key: PrivateKey, listen_port: int) -> None:
        text = private_key.base64()
        try:
            await self._set(private_key=text.decode(), listen_port=listen_port)
        finally:
            text[:] = bytes(len(text))

    async def put_peer(
        self,
        public_key: PublicKey,
        endpoint: tuple[Address, int] | None,
        allowed: Iterable[Network],
        keepalive: int,
        preshared: PresharedKey | None = None,
    ) -> None:
        peer: dict[str, Any] = {
            "public_key": public_key.base64(),
            "persistent_keepalive": keepalive,
            "replace_allowed_ips": True,
            "allowed_ips": [str(network) for network in allowed],
        }
        if endpoint is not None:
            peer |= {"endpoint_addr": str(endpoint[0]), "endpoint_port": endpoint[1]}
        if preshared is not None:
            text = preshared.base64()
            peer["preshared_key"] = text.decode()
            text[:] = bytes(len(text))
        await self._set(peer=peer)

    async def set_keepalive(self, public_key: PublicKey, seconds: int) -> None:
        await self._set(
            peer={
                "public_key": public_key.base64(),
                "update_only": True,
                "persistent_keepalive": seconds,
            }
        )

    async def remove_peer(self, public_key: PublicKey) -> None:
        await self._set(peer={"public_key": public_key.base64(), "remove": True})

    async def readings(self) -> list[PeerReading]:
        def work() -> list[PeerReading]:
            wireguard = _wireguard_socket()
            try:
                return parse_kernel(wireguard.info(self.name))
            finally:
                wireguard.close()

        return await self._call("reading peers", work)

    async def rest(self) -> None:
        await self.bring_down()
        for reading in await self.readings():
            await self.remove_peer(reading.public_key)
        # All zeros is how the kernel is told to have no key.
        await self._set(private_key=base64.b64encode(bytes(KEY_BYTES)).decode())

    async def wake(self) -> None:
        pass

    async def _set(self, **what: Any) -> None:
        def work() -> None:
            wireguard = _wireguard_socket()
            try:
                wireguard.set(self.name, **what)
            finally:
                wireguard.close()

        await self._call("setting the device", work)

    async def _call(self, what: str, work: Callable[[], T]) -> T:
        try:
            with trio.fail_after(NETLINK_SECONDS):
                return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        except trio.TooSlowError:
            raise DeviceLost(f"{self.name}: {what}: netlink silent for {NETLINK_SECONDS:.0f} s") from None
        except Exception as problem:
            code = getattr(problem, "code", None)
            if code == errno.ENODEV:
                self.lost.set()
                raise DeviceLost(f"{self.name}: the interface vanished") from None
            if code is None:
                raise
            # Not `str(problem)`: nothing that held the request may reach a log.
            raise TunnelError(f"{self.name}: {what}: {os.strerror(code)}") from None


def parse_kernel(messages: Iterable[Any]) -> list[PeerReading]:
    """The peers in the kernel's answer, which may come in several messages, one peer split over two."""
    found: dict[PublicKey, PeerReading] = {}
    for message in messages:
        for peer in message.get_attr("WGDEVICE_A_PEERS") or ():
            encoded = peer.get_attr("WGPEER_A_PUBLIC_KEY")
            text = encoded["value"] if isinstance(encoded, dict) else encoded
            key = PublicKey.from_base64(text.decode() if isinstance(text, bytes) else text)
            endpoint = peer.get_attr("WGPEER_A_ENDPOINT")
            moment = peer.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME")
            host = f"[{endpoint['addr']}]" if endpoint and ":" in endpoint["addr"] else None
            allowed = tuple(entry["addr"] for entry in peer.get_attr("WGPEER_A_ALLOWEDIPS") or ())
            before = found.get(key)
            if before is not None:  # the rest of a long list of allowed addresses
                found[key] = PeerReading(
                    key,
                    before.endpoint,
                    before.handshake,
                    before.rx,
                    before.tx,
                    before.keepalive,
                    before.allowed + allowed,
                )
                continue
            found[key] = PeerReading(
                public_key=key,
                endpoint=f"{host or endpoint['addr']}:{endpoint['port']}" if endpoint else None,
                handshake=moment["tv_sec"] + moment["tv_nsec"] / 1e9 if moment else 0.0,
                rx=peer.get_attr("WGPEER_A_RX_BYTES") or 0,
                tx=peer.get_attr("WGPEER_A_TX_BYTES") or 0,
                keepalive=peer.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") or 0,
                allowed=allowed,
            )
    return list(found.values())


class _UserspaceDevice(Device):
    """WireGuard in a wireguard-go of ours, set through its unix socket.

    The interface itself is held open here, so that it survives the program: index, address, routes and the
    sockets bound to it stay, and only the packets of the moment are lost.
    """

    implementation = "userspace"

    def __init__(self, name: str, program: Userspace, tun: int, nursery: trio.Nursery) -> None:
        super().__init__(name)
        self._program = program
        self._tun = tun
        self._nursery = nursery
        self._busy = trio.Lock()
        self._client: UapiClient
        self._child: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the program on the interface and connect to it."""
        # Not trio.open_process: that starts the child from a worker thread, and the parent-death signal
        # follows the *thread* that started it, which trio ends when it has been idle for a while.
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), self._program.path, self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                "WG_TUN_FD": str(self._tun),
                "WG_PROCESS_FOREGROUND": "1",
                "LOG_LEVEL": "error",
                "PATH": os.defpath,
            },
            pass_fds=(self._tun,),
            start_new_session=True,  # Ctrl-C at the terminal reaches us alone, and we end the child
        )
        self._child = child
        assert child.stdout is not None
        said: list[str] = []
        output = trio.lowlevel.FdStream(os.dup(child.stdout.fileno()))
        child.stdout.close()
        self._nursery.start_soon(_relay_output, self.name, output, said)
        self._client = await _wait_for_socket(self.name, child, said)
        self._nursery.start_soon(_watch_child, child, self)
        log.info(
            "wireguard-go started",
            interface=self.name,
            version=".".join(map(str, self._program.version)),
            pid=child.pid,
        )

    def holds(self, child: subprocess.Popen[bytes]) -> bool:
        """Whether `child` is the program in charge, and not one that was stopped on purpose."""
        return self._child is child

    async def revive(self) -> None:
        await self.stop()
        self.lost = trio.Event()
        await self.start()

    async def cut(self) -> None:
        await self.stop()
        self.lost.set()

    async def rest(self) -> None:
        await self.stop()  # its keys end with the process
        await self.bring_down()

    async def wake(self) -> None:
        await self.revive()

    async def stop(self) -> None:
        """End the program by its pid: ask, then insist. Not waited for yet, the pid is still its own."""
        child, self._child = self._child, None
        if child is None:
            return
        if hasattr(self, "_client"):
            await self._client.aclose()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if child.poll() is None:
                child.send_signal(number)
                with trio.move_on_after(STOP_SECONDS):
                    while child.poll() is None:
                        await trio.sleep(0.005)
        if child.poll() is None:
            log.error("wireguard-go cannot be ended", pid=child.pid)
            return
        # It removes its socket itself only when it is not in too much of a hurry.
        with contextlib.suppress(OSError):
            os.unlink(socket_path(self.name))

    async def configure(self, private_key: PrivateKey, listen_port: int) -> None:
        async with self._busy:
            await self._client.configure(private_key, listen_port)

    async def put_peer(
        self,
        public_key: PublicKey,
        endpoint: tuple[Address, int] | None,
        allowed: Iterable[Network],
        keepalive: int,
        preshared: PresharedKey | None = None,
    ) -> None:
        text = None
        if endpoint is not None:
            host, port = endpoint
            text = f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
        async with self._busy:
            await self._client.put_peer(public_key, text, allowed, keepalive, preshared)

    async def set_keepalive(self, public_key: PublicKey, seconds: int) -> None:
        async with self._busy:
            await self._client.set_keepalive(public_key, seconds)

    async def remove_peer(self, public_key: PublicKey) -> None:
        async with self._busy:
            await self._client.remove_peer(public_key)

    async def readings(self) -> list[PeerReading]:
        async with self._busy:
            return await self._client.readings()


@asynccontextmanager
async def open_device(
    name: str, implementation: str = "auto", userspace_path: str | None = None, awake: bool = True
) -> AsyncIterator[Device]:
    """Make the interface `name`, without address or peers; remove it on exit.

    Unless `awake`, it rests until `wake`: no process, no keys, down. `implementation` is "auto" (the kernel
    where it knows WireGuard, else wireguard-go), "kernel" or "userspace". Raises `NotPossibleHere` without
    the right, the device or the program, and `TunnelError` when the name is taken.
    """
    if not INTERFACE_NAME.fullmatch(name):
        raise TunnelError(f"{name!r} is no interface name: at most 15 letters, digits, '_' and '-'")
    await _netlink(f"{name}: looking for leftovers", lambda ip: _clear_leftover(ip, name))
    if implementation in ("auto", "kernel"):
        if await _netlink(f"{name}: making the interface", lambda ip: _make_in_kernel(ip, name)):
            log.info("interface made", interface=name, implementation="kernel")
            try:
                yield _KernelDevice(name)
            finally:
                with trio.CancelScope(shield=True):
                    await _netlink(f"{name}: removing the interface", lambda ip: _remove(ip, name))
            return
        if implementation == "kernel":
            raise NotPossibleHere(
                f"{name}: this kernel has no WireGuard; allow wireguard-go, or load the module"
            )
    elif implementation != "userspace":
        raise TunnelError(f"{name}: implementation is auto, kernel or userspace, not {implementation!r}")
    async with _run_userspace(name, userspace_path, awake) as device:
        yield device


@asynccontextmanager
async def _run_userspace(name: str, path: str | None, awake: bool) -> AsyncIterator[Device]:
    program = await trio.to_thread.run_sync(find_userspace, path)
    if program is None:
        raise NotPossibleHere(
            f"{name}: this kernel has no WireGuard and there is no {path or 'wireguard-go'}; install the "
            "package wireguard-go (on Debian 12 the one from bookworm-backports)"
        )
    if program.slow:
        log.warning(
            "this wireguard-go is old and slow; 2023 or later has several times its throughput",
            version=".".join(map(str, program.version)),
        )
    tun = _open_tun(name)
    try:
        await _netlink(f"{name}: marking the interface", lambda ip: _mark(ip, name))
        async with trio.open_nursery() as nursery:
            device = _UserspaceDevice(name, program, tun, nursery)
            try:
                if awake:
                    await device.start()
                yield device
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await device.stop()
    finally:
        os.close(tun)  # the last descriptor: the interface goes with it


def _open_tun(name: str) -> int:
    """Make the TUN interface and return its descriptor. With packet headers, for segmentation offload."""
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as problem:
        raise NotPossibleHere(
            f"{name}: /dev/net/tun cannot be opened ({problem.strerror}); wireguard-go needs it, and root or "
            "CAP_NET_ADMIN"
        ) from None
    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_FLAGS))
    except OSError as problem:
        os.close(tun)
        if problem.errno == errno.EPERM:
            raise NotPossibleHere(f"{name}: making the interface needs root or CAP_NET_ADMIN") from None
        raise TunnelError(f"{name}: making the interface: {problem.strerror}") from None
    return tun


async def _wait_for_socket(name: str, child: subprocess.Popen[bytes], said: list[str]) -> UapiClient:
    with trio.move_on_after(START_SECONDS):
        while True:
            if child.poll() is not None:
                await trio.sleep(0.05)  # let the last lines it wrote arrive
                reason = said[-1] if said else f"exit status {child.returncode}"
                raise TunnelError(f"{name}: wireguard-go did not start: {reason}")
            with contextlib.suppress(OSError):
                return await UapiClient.connect(name)
            await trio.sleep(0.005)
    raise TunnelError(f"{name}: wireguard-go did not open its control socket within {START_SECONDS:.0f} s")


async def _relay_output(name: str, output: trio.lowlevel.FdStream, said: list[str]) -> None:
    """Log what wireguard-go says (errors only, and it shortens peers' keys itself)."""
    rest = b""
    async with output:
        while piece := await output.receive_some(4096):
            *lines, rest = (rest + piece).split(b"\n")
            rest = rest[-4096:]
            for line in lines:
                if text := line.decode("utf-8", "replace").strip()[:500]:
                    said[:] = [text]
                    log.warning("wireguard-go", interface=name, says=text)


async def _watch_child(child: subprocess.Popen[bytes], device: _UserspaceDevice) -> None:
    handle = os.pidfd_open(child.pid)
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        trio.lowlevel.notify_closing(handle)
        os.close(handle)
    if device.holds(child):
        log.error("wireguard-go ended by itself", interface=device.name, status=child.poll())
        device.lost.set()


# Netlink. Each of these runs in a worker thread with a socket of its own.


def _wireguard_socket() -> Any:
    from pyroute2 import WireGuard

    return WireGuard()


async def _netlink(what: str, work: Callable[[Any], T]) -> T:
    def call() -> T:
        from pyroute2 import IPRoute  # 150 ms to import, and not needed by those who only read keys

        with IPRoute() as ip:
            return work(ip)

    try:
        with trio.fail_after(NETLINK_SECONDS):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
    except trio.TooSlowError:
        raise TunnelError(f"{what}: netlink silent for {NETLINK_SECONDS:.0f} s") from None
    except Exception as problem:
        code = getattr(problem, "code", None)
        if code in (errno.EPERM, errno.EACCES):
            raise NotPossibleHere(f"{what}: needs root or CAP_NET_ADMIN") from None
        if code is None:
            raise
        raise TunnelError(f"{what}: {os.strerror(code)}") from None


def _index_of(ip: Any, name: str) -> int | None:
    found = ip.link_lookup(ifname=name)
    return int(found[0]) if found else None


async def ways_out(addresses: Iterable[Address]) -> dict[Address, str]:
    """By which interface this host would send to each address now; "nowhere" where it would refuse to."""
    wanted = tuple(addresses)

    def work(ip: Any) -> dict[Address, str]:
        found = {}
        for address in wanted:
            try:
                index = ip.route("get", dst=str(address))[0].get_attr("RTA_OIF")
                found[address] = ip.get_links(index)[0].get_attr("IFLA_IFNAME")
            except Exception as problem:
                if getattr(problem, "code", None) not in (
                    errno.ENETUNREACH,
                    errno.EHOSTUNREACH,
                    errno.EINVAL,
                ):
                    raise
                found[address] = "nowhere"
        return found

    return await _netlink("asking for routes", work)


def _mark(ip: Any, name: str) -> None:
    index = _index_of(ip, name)
    if index is not None:
        pid = os.getpid()
        ip.link("set", index=index, ifalias=_MARK.format(pid=pid, start=_started(pid)))


def _clear_leftover(ip: Any, name: str) -> None:
    index = _index_of(ip, name)
    if index is None:
        return
    alias = ip.link("get", index=index)[0].get_attr("IFLA_IFALIAS") or ""
    match = _MARK_PATTERN.fullmatch(alias)
    if match is None:
        raise TunnelError(
            f"{name}: an interface of this name exists and is not ours; remove it or rename ours"
        )
    if _started(int(match[1])) == int(match[2]):
        raise TunnelError(f"{name}: process {match[1]} already runs this tunnel; stop it first")
    log.warning("removing the interface of a process that died", interface=name, pid=int(match[1]))
    ip.link("del", index=index)


def _make_in_kernel(ip: Any, name: str) -> bool:
    """Make the interface; False when the kernel has no WireGuard."""
    try:
        ip.link("add", ifname=name, kind="wireguard")
    except Exception as problem:
        if getattr(problem, "code", None) == errno.EOPNOTSUPP:
            return False
        raise
    _mark(ip, name)
    return True


def _remove(ip: Any, name: str) -> None:
    index = _index_of(ip, name)
    if index is not None:
        ip.link("del", index=index)


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: tells it from a later one with the same number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may hold anything.
    return int(text.rpartition(")")[2].split()[19])
