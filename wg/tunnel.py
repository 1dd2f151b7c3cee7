"""The tunnel of one node: `async with raise_tunnel(config) as tunnel:`.

Rules of the handshake, each paid for once (a handshake is one round trip when they are kept, five seconds and
more when they are not, because crossing initiations make both ends discard each other's answer):

1. One designated initiator per pair, the lower index. Only it has a keepalive before the first handshake.
2. Never a keepalive of 5 s: it equals WireGuard's retry interval and keeps both ends in lock-step.
3. A stuck initiator is restarted by removing and re-adding the peer, which resets WireGuard's 5 s limiter. So
   nothing has to say who is up first: an initiation the peer was not ready for costs one retry interval.
4. The responder gets its keepalive after the first handshake, and loses it when the peer is down, so that
   both ends see the other's received bytes grow and neither breaks rule 1.

Health is read from `rx_bytes`, since a handshake's age shows a dead peer only after 180 s.

Rotation of static keys has its place here and is not built: a `_Generation` is one interface with one key
pair and its peers. A rotation raises the next generation beside the current one (other port, same inner
addresses), proves it, moves the routes, and drains the old one; `Tunnel` then holds two for a moment.
"""

from __future__ import annotations

import enum
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import structlog
import trio

from wg.device import MTU, Address, Device, Network, open_device
from wg.errors import DeviceLost, HandshakeTimeout, TunnelError
from wg.keys import PrivateKey, PublicKey, load_private
from wg.uapi import PeerReading

log = structlog.get_logger("wg.tunnel")

#: Seconds between keepalives, both ways once a handshake stands: 2 x 92 bytes a second and pair.
KEEPALIVE = 1
#: An initiator without a handshake starts afresh after so long, plus up to the jitter; the last one repeats.
#: It exceeds any round trip, since an answer that arrives after the restart is worthless. The short ones come
#: first because the usual reason is a peer that starts a moment later.
RETRY_SECONDS = (0.3, 0.6, 1.0, 1.5)
RETRY_JITTER = 0.25
#: Nothing received for this long with keepalives of 1 s: something is wrong.
SUSPECT_SECONDS = 2.5
#: The initiator starts afresh here. A restarted peer does not know the old session and WireGuard itself would
#: notice only when there is traffic; a shorter cut of the line keeps its session and resumes within 50 ms.
RESTART_SECONDS = 4.0
DOWN_SECONDS = 10.0
#: WireGuard refuses to use a session older than this (REJECT_AFTER_TIME).
SESSION_SECONDS = 180.0
POLL_SECONDS = 0.25
#: Closer looks while handshakes are due (half a millisecond each), but not for hours when a peer is away.
POLL_SECONDS_JOINING = 0.02
JOINING_SECONDS = 10.0
#: How often a lost device may be replaced within the window before the tunnel gives up.
RESURRECTIONS = 5
RESURRECTION_WINDOW = 60.0
RESOLVE_SECONDS = 10.0
HANDSHAKE_SECONDS = 30.0


@dataclass(frozen=True)
class TunnelPeer:
    """The other end of a tunnel. `endpoint` is its UDP address outside; `allowed` what it may use inside."""

    index: int
    public_key: PublicKey
    endpoint: tuple[str, int]
    allowed: tuple[Network, ...]


@dataclass(frozen=True)
class TunnelConfig:
    """What one node needs to know. `address` is its own inside the tunnel, the same in every generation."""

    index: int
    interface: str
    private_key: Path
    listen_port: int
    address: Address
    peers: tuple[TunnelPeer, ...]
    mtu: int = MTU
    implementation: str = "auto"
    userspace_path: str | None = None

    def __post_init__(self) -> None:
        indices = [self.index, *(peer.index for peer in self.peers)]
        keys = [peer.public_key for peer in self.peers]
        if not self.peers:
            raise TunnelError(f"{self.interface}: a tunnel without peers")
        if len(set(indices)) != len(indices) or len(set(keys)) != len(keys):
            raise TunnelError(f"{self.interface}: two nodes have the same index or the same public key")
        ranges = [network for peer in self.peers for network in peer.allowed]
        for position, network in enumerate(ranges):
            for other in ranges[:position]:
                if network.version == other.version and network.overlaps(other):  # type: ignore[arg-type]
                    # WireGuard would give the range to the peer set last, silently.
                    raise TunnelError(
                        f"{self.interface}: the ranges {other} and {network} of two peers overlap"
                    )
            if network.version == self.address.version and self.address in network:
                raise TunnelError(f"{self.interface}: a peer may not own {network}, our own address is in it")

    @classmethod
    def from_text(
        cls,
        *,
        index: int,
        interface: str,
        private_key: str | Path,
        listen_port: int,
        address: str,
        peers: Sequence[tuple[int, str, str, int, Sequence[str]]],
        mtu: int = MTU,
    ) -> TunnelConfig:
        """From the texts of a configuration file; a peer is (index, public key, host, port, ranges)."""
        try:
            return cls(
                index=index,
                interface=interface,
                private_key=Path(private_key),
                listen_port=listen_port,
                address=ip_interface(address).ip,
                mtu=mtu,
                peers=tuple(
                    TunnelPeer(
                        number,
                        PublicKey.from_text(key),
                        (host, port),
                        tuple(ip_network(text, strict=False) for text in ranges),
                    )
                    for number, key, host, port, ranges in peers
                ),
            )
        except ValueError as problem:
            raise TunnelError(f"{interface}: {problem}") from None


class PeerState(enum.Enum):
    JOINING = "joining"  # no handshake yet since the tunnel was raised
    UP = "up"
    SUSPECT = "suspect"  # start nothing new, keep what is open
    DOWN = "down"


@dataclass(frozen=True)
class PeerStatus:
    """What is known of one peer at the last poll. Ages in seconds; None where it never happened."""

    index: int
    state: PeerState
    endpoint: str | None
    handshake_age: float | None
    silent: float | None
    rx: int
    tx: int
    restarts: int

    def as_dict(self) -> dict[str, object]:
        return {
            "peer": self.index,
            "state": self.state.value,
            "endpoint": self.endpoint,
            "handshake_age": None if self.handshake_age is None else round(self.handshake_age, 3),
            "silent": None if self.silent is None else round(self.silent, 3),
            "rx_bytes": self.rx,
            "tx_bytes": self.tx,
            "restarts": self.restarts,
        }


class Act(enum.Enum):
    """What a look at a peer's counters asks for."""

    NOTHING = enum.auto()
    RESTART = enum.auto()  # remove the peer and add it again
    KEEPALIVE_ON = enum.auto()
    KEEPALIVE_OFF = enum.auto()


@dataclass
class PeerWatch:
    """One peer's health, from readings alone: no clock, no device. `now` is any steady clock in seconds."""

    initiator: bool
    jitter: Callable[[], float] = random.random
    reading: PeerReading | None = None
    restarts: int = 0
    _added: float = 0.0
    _patience: float = 0.0
    _tries: int = 0  # since the last handshake
    _grew: float | None = None  # when rx last grew; None before the first handshake
    _keepalive: bool = False
    _earlier_rx: int = 0  # of the entries that restarts removed
    _earlier_tx: int = 0

    def added(self, now: float, keepalive: bool) -> None:
        """The peer's entry was (re-)added: its counters start at zero and its session is gone."""
        if self.reading is not None:
            self._earlier_rx += self.reading.rx
            self._earlier_tx += self.reading.tx
            self.reading = None
            self.restarts += 1
        self._added = now
        self._patience = (
            RETRY_SECONDS[min(self._tries, len(RETRY_SECONDS) - 1)] + RETRY_JITTER * self.jitter()
        )
        self._tries += 1
        self._keepalive = keepalive

    def see(self, reading: PeerReading, now: float) -> Act:
        before = self.reading
        self.reading = reading
        if reading.handshake > 0.0 and (before is None or reading.rx > before.rx):
            self._grew = now
        if reading.handshake == 0.0:
            if self.initiator and now - self._added >= self._patience:
                return Act.RESTART
            return Act.NOTHING
        self._tries = 0
        silent = self.silent(now) or 0.0
        if self.initiator:
            return Act.RESTART if silent >= RESTART_SECONDS else Act.NOTHING
        if silent >= DOWN_SECONDS and self._keepalive:
            self._keepalive = False
            return Act.KEEPALIVE_OFF
        if silent < SUSPECT_SECONDS and not self._keepalive:
            self._keepalive = True
            return Act.KEEPALIVE_ON
        return Act.NOTHING

    def silent(self, now: float) -> float | None:
        return None if self._grew is None else now - self._grew

    def handshake_age(self, wall: float) -> float | None:
        if self.reading is None or self.reading.handshake == 0.0:
            return None
        return max(0.0, wall - self.reading.handshake)

    def state(self, now: float, wall: float) -> PeerState:
        silent = self.silent(now)
        if silent is None:
            return PeerState.JOINING
        age = self.handshake_age(wall)
        if silent > DOWN_SECONDS or (age is not None and age > SESSION_SECONDS):
            return PeerState.DOWN
        if silent > SUSPECT_SECONDS:
            return PeerState.SUSPECT
        # Without a session nothing passes, even if the last one was heard a moment ago.
        return PeerState.UP if age is not None else PeerState.SUSPECT

    @property
    def rx(self) -> int:
        return self._earlier_rx + (self.reading.rx if self.reading else 0)

    @property
    def tx(self) -> int:
        return self._earlier_tx + (self.reading.tx if self.reading else 0)


class Tunnel:
    """A raised tunnel. Lives inside `raise_tunnel`; `status()` never blocks."""

    def __init__(self, config: TunnelConfig) -> None:
        self.config = config
        self._watches = {peer.index: PeerWatch(config.index < peer.index) for peer in config.peers}
        self._generation: _Generation | None = None
        self._changed = trio.Event()
        self.device_restarts = 0

    @property
    def interface(self) -> str:
        return self.config.interface

    @property
    def address(self) -> Address:
        return self.config.address

    @property
    def implementation(self) -> str | None:
        """ "kernel" or "userspace"; None before the interface is made."""
        return self._generation.device.implementation if self._generation else None

    def status(self) -> tuple[PeerStatus, ...]:
        """Every peer as of the last poll, at most a quarter of a second ago."""
        now, wall = trio.current_time(), time.time()
        return tuple(
            PeerStatus(
                index=index,
                state=watch.state(now, wall),
                endpoint=watch.reading.endpoint if watch.reading else None,
                handshake_age=watch.handshake_age(wall),
                silent=watch.silent(now),
                rx=watch.rx,
                tx=watch.tx,
                restarts=watch.restarts,
            )
            for index, watch in sorted(self._watches.items())
        )

    def up(self, index: int) -> bool:
        return self._watches[index].state(trio.current_time(), time.time()) is PeerState.UP

    async def wait_up(self, seconds: float = HANDSHAKE_SECONDS, peers: Sequence[int] | None = None) -> None:
        """Wait until all (or the named) peers have handshaken; `HandshakeTimeout` names the missing."""
        wanted = tuple(self._watches) if peers is None else tuple(peers)
        with trio.move_on_after(seconds):
            while not all(self.up(index) for index in wanted):
                await self._changed.wait()
            return
        missing = [index for index in wanted if not self.up(index)]
        if missing:
            raise HandshakeTimeout(self.interface, missing, seconds)

    def bind(self, sock: trio.socket.SocketType | socket.socket) -> None:
        """Tie a socket to the tunnel's interface, before it listens or connects.

        Linux otherwise takes packets for the tunnel's address from any interface, so that somebody on the
        underlay could inject into a connection whose numbers he guesses. Sockets so tied belong to one
        generation: after a rotation they must be opened again.
        """
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.interface.encode() + b"\0")

    def _note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _live(self, key: PrivateKey, task_status: trio.TaskStatus[None]) -> None:
        """Keep the generation alive, reviving its device when that is lost (TCP connections survive)."""
        async with _raise_generation(self.config, key) as generation:
            self._generation = generation
            task_status.started()
            losses: list[float] = []
            while True:
                try:
                    await self._watch(generation)
                except DeviceLost as problem:
                    reason = str(problem)
                now = trio.current_time()
                losses = [moment for moment in losses if now - moment < RESURRECTION_WINDOW] + [now]
                if len(losses) > RESURRECTIONS:
                    raise TunnelError(
                        f"lost {len(losses)} times in {RESURRECTION_WINDOW:.0f} s; last: {reason}"
                    )
                self.device_restarts += 1
                log.error("tunnel device lost; reviving it", interface=self.interface, reason=reason)
                await trio.sleep(0.02 * 4 ** (len(losses) - 1))
                await generation.revive(key)

    async def _watch(self, generation: _Generation) -> None:
        device = generation.device
        start = trio.current_time()
        logged = dict.fromkeys(self._watches, PeerState.JOINING)
        for peer in self.config.peers:
            # After a revival the peers hold sessions that we lost and wait for nothing: speak first.
            speak = self._watches[peer.index].initiator or self.device_restarts > 0
            await generation.add(peer, speak)
            self._watches[peer.index].added(start, speak)
        while True:
            readings = {reading.public_key: reading for reading in await device.readings()}
            now, wall = trio.current_time(), time.time()
            for peer in self.config.peers:
                watch = self._watches[peer.index]
                reading = readings.get(peer.public_key)
                if reading is None:
                    raise TunnelError(f"{self.interface}: somebody else removed peer {peer.index}")
                match watch.see(reading, now):
                    case Act.RESTART:
                        await device.remove_peer(peer.public_key)
                        await generation.add(peer, True)
                        watch.added(trio.current_time(), True)
                    case Act.KEEPALIVE_ON:
                        await device.set_keepalive(peer.public_key, KEEPALIVE)
                    case Act.KEEPALIVE_OFF:
                        await device.set_keepalive(peer.public_key, 0)
                state = watch.state(now, wall)
                if state is not logged[peer.index]:
                    logged[peer.index] = state
                    log.info("tunnel peer", interface=self.interface, peer=peer.index, state=state.value)
            self._note()
            joining = now - start < JOINING_SECONDS and not all(
                watch.handshake_age(wall) is not None for watch in self._watches.values()
            )
            with trio.move_on_after(POLL_SECONDS_JOINING if joining else POLL_SECONDS):
                await device.lost.wait()
                raise DeviceLost(f"{self.interface}: wireguard-go ended by itself")


@dataclass
class _Generation:
    """One interface with one key pair. See the note on rotation at the top."""

    config: TunnelConfig
    device: Device
    endpoints: dict[int, tuple[Address, int]] = field(default_factory=dict)

    async def set_up(self, key: PrivateKey) -> None:
        """Identity, port, address, MTU and routes, each of which may be set already."""
        await self.device.configure(key, self.config.listen_port)
        await self.device.bring_up([self.config.address], self.config.mtu)
        for peer in self.config.peers:
            for network in peer.allowed:
                await self.device.route(network, self.config.address)

    async def revive(self, key: PrivateKey) -> None:
        await self.device.revive()
        await self.set_up(key)

    async def add(self, peer: TunnelPeer, speak: bool) -> None:
        if peer.index not in self.endpoints:
            self.endpoints[peer.index] = await _resolve(peer)
        await self.device.put_peer(
            peer.public_key, self.endpoints[peer.index], peer.allowed, KEEPALIVE if speak else 0
        )


@asynccontextmanager
async def raise_tunnel(config: TunnelConfig, wait: float | None = HANDSHAKE_SECONDS) -> AsyncIterator[Tunnel]:
    """Raise the interface, keep handshakes with all peers, and take everything down on exit.

    With `wait` seconds given, returns once every peer has handshaken, else raises `HandshakeTimeout`; with
    None it returns as soon as the interface is up, and `wait_up` may be called later: a long-running party
    should not end because a peer is late. One error alone comes as itself, not in a group.
    """
    key = load_private(config.private_key)
    try:
        ours = key.public()
        for peer in config.peers:
            if peer.public_key == ours:
                raise TunnelError(f"{config.interface}: peer {peer.index} has our own public key {ours}")
        tunnel = Tunnel(config)
        async with trio.open_nursery() as nursery:
            await nursery.start(tunnel._live, key)
            if wait is not None:
                await tunnel.wait_up(wait)
            yield tunnel
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        found = _leaves(group)
        if len(found) == 1:
            raise found[0] from found[0].__cause__
        raise
    finally:
        key.wipe()


@asynccontextmanager
async def _raise_generation(config: TunnelConfig, key: PrivateKey) -> AsyncIterator[_Generation]:
    async with open_device(config.interface, config.implementation, config.userspace_path) as device:
        generation = _Generation(config, device)
        await generation.set_up(key)
        yield generation


async def _resolve(peer: TunnelPeer) -> tuple[Address, int]:
    host, port = peer.endpoint
    try:
        return ip_address(host), port
    except ValueError:
        pass
    try:
        with trio.fail_after(RESOLVE_SECONDS):
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, trio.TooSlowError) as problem:
        raise TunnelError(f"peer {peer.index}: the name {host} cannot be resolved: {problem}") from None
    return ip_address(found[0][4][0]), port


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for problem in group.exceptions:
        found += _leaves(problem) if isinstance(problem, BaseExceptionGroup) else [problem]
    return found
