"""The tunnel of one node: `async with raise_tunnel(config) as tunnel:`.

Without a plan for rotation it is one interface with the keys of the configuration. With one, that interface
is the *bootstrap* generation: it only carries the messages by which nodes agree on further generations, whose
interfaces carry the application (see `wg.generations`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from pathlib import Path

import trio

from wg.device import INTERFACE_NAME, MTU, Address, Device, Network, open_device, ways_out
from wg.errors import HandshakeTimeout, TunnelError
from wg.exchange import HybridExchange
from wg.generations import (
    FALLBACK_METRIC,
    Control,
    EpochRecord,
    GenerationStatus,
    Pair,
    Shelf,
    control_address,
    tie,
)
from wg.interface import Entry, Interface, PeerState, PeerStatus, PeerWatch, Way
from wg.keys import PrivateKey, PublicKey, load_private
from wg.rotation import MAX_OFFSET, SLOTS, Rotation

HANDSHAKE_SECONDS = 30.0
#: How often to see that the host's routes lead into the tunnel; a look takes some milliseconds in a thread.
GUARD_SECONDS = 2.0


@dataclass(frozen=True)
class TunnelPeer:
    """The other end of a tunnel. `endpoint` is its UDP address outside; `allowed` what it may use inside."""

    index: int
    public_key: PublicKey
    endpoint: tuple[str, int]
    allowed: tuple[Network, ...]


@dataclass(frozen=True, eq=False)
class RotationPlan:
    """Rotate every so many `seconds`, and on demand.

    `sign` is by this node's identity; `authenticate` takes a peer's index, a message and its signature, and
    raises one of `refusals`. All nodes of one mesh have the same 32 bytes of `context`. `record` keeps the
    epochs used, and outlives the process.
    """

    seconds: float
    record: Path | Shelf
    sign: Callable[[bytes], bytes]
    authenticate: Callable[[int, bytes, bytes], None]
    refusals: tuple[type[Exception], ...]
    context: bytes


def slot_names(interface: str, peers: int) -> list[list[str]]:
    """The names of the further interfaces that rotation needs, by peer and slot."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    return [[interface + next(letters) for _ in range(SLOTS)] for _ in range(peers)]


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
    rotation: RotationPlan | None = None

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
        if self.rotation is not None:
            self._check_rotation(ranges)

    def _check_rotation(self, ranges: Sequence[Network]) -> None:
        last = slot_names(self.interface, len(self.peers))[-1][-1]
        if not INTERFACE_NAME.fullmatch(last):
            raise TunnelError(
                f"{self.interface}: rotation adds a letter to this name, which is too long then"
            )
        ports = SLOTS * len(self.peers)
        if ports > MAX_OFFSET or self.listen_port + ports > 65535:
            raise TunnelError(
                f"{self.interface}: rotation needs the {ports} ports after {self.listen_port} as well"
            )
        for index in (self.index, *(peer.index for peer in self.peers)):
            control = control_address(index)
            for network in (*ranges, ip_network(self.address)):
                if network.version == 4 and control in network:
                    raise TunnelError(
                        f"{self.interface}: {network} contains {control}, which rotation uses itself"
                    )

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
        rotation: RotationPlan | None = None,
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
                rotation=rotation,
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


class Tunnel:
    """A raised tunnel. Lives inside `raise_tunnel`; `status()` never blocks."""

    def __init__(
        self, config: TunnelConfig, said: Callable[[int, str, int | None], None] | None = None
    ) -> None:
        self.config = config
        self._said = said
        self._bootstrap: Interface | None = None
        self._pairs: dict[int, Pair] = {}
        self._ties: tuple[int, ...] = ()
        self._changed = trio.Event()

    @property
    def interface(self) -> str:
        return self.config.interface

    @property
    def address(self) -> Address:
        return self.config.address

    @property
    def mtu(self) -> int:
        return self.config.mtu

    @property
    def implementation(self) -> str | None:
        """ "kernel" or "userspace"; None before the interface is made."""
        return self._bootstrap.device.implementation if self._bootstrap else None

    @property
    def device_restarts(self) -> int:
        """How often a wireguard-go was replaced."""
        restarts = self._bootstrap.restarts if self._bootstrap else 0
        return restarts + sum(pair.device_restarts() for pair in self._pairs.values())

    def status(self) -> tuple[PeerStatus, ...]:
        """Every peer as of the last poll, at most a quarter of a second ago; with rotation, of the generation
        in use."""
        return tuple(self._status_of(peer.index) for peer in sorted(self.config.peers, key=lambda p: p.index))

    def _status_of(self, index: int) -> PeerStatus:
        now, wall = trio.current_time(), time.time()
        watch = self._watch_of(index)
        pair = self._pairs.get(index)
        rx, tx = pair.traffic() if pair is not None else (watch.rx, watch.tx)
        return PeerStatus(
            index=index,
            state=watch.state(now, wall),
            endpoint=watch.reading.endpoint if watch.reading else None,
            handshake_age=watch.handshake_age(wall),
            silent=watch.silent(now),
            rx=rx,
            tx=tx,
            restarts=watch.restarts,
        )

    def _watch_of(self, index: int) -> PeerWatch:
        found = None
        if (pair := self._pairs.get(index)) is not None:
            found = pair.watch()
        elif self._bootstrap is not None:
            found = self._bootstrap.watches[index]
        return found if found is not None else PeerWatch(self.config.index < index)

    def rotations(self) -> tuple[GenerationStatus, ...]:
        """Where rotation stands with every peer; empty without a plan."""
        return tuple(pair.status() for _, pair in sorted(self._pairs.items()))

    def rotate(self) -> None:
        """Begin a rotation with every peer now, or once the one under way is over. Does not wait."""
        if not self._pairs:
            raise TunnelError(f"{self.interface}: rotation is off")
        for pair in self._pairs.values():
            pair.rotate()

    def up(self, index: int) -> bool:
        return self._watch_of(index).state(trio.current_time(), time.time()) is PeerState.UP

    async def wait_up(self, seconds: float = HANDSHAKE_SECONDS, peers: Sequence[int] | None = None) -> None:
        """Wait until all (or the named) peers can be reached; `HandshakeTimeout` names the missing."""
        wanted = tuple(peer.index for peer in self.config.peers) if peers is None else tuple(peers)
        with trio.move_on_after(seconds):
            while not all(self.up(index) for index in wanted):
                await self._changed.wait()
            return
        missing = [index for index in wanted if not self.up(index)]
        if missing:
            raise HandshakeTimeout(self.interface, missing, seconds)

    def bind(self, sock: trio.socket.SocketType | socket.socket) -> None:
        """Tie a socket to the tunnel, before it listens or connects.

        Linux otherwise takes packets for the tunnel's address from any interface, so that somebody on the
        underlay could inject into a connection whose numbers he guesses. With rotation the socket takes them
        from the interfaces of all generations and lives through every change; what it sends follows the
        routes (see `wg.generations`).
        """
        if self.config.rotation is not None:
            tie(sock, self._ties)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.interface.encode() + b"\0")

    def _note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _live(self, key: PrivateKey, task_status: trio.TaskStatus[None]) -> None:
        """Keep the interfaces alive."""
        config, plan = self.config, self.config.rotation
        async with AsyncExitStack() as stack:
            device = await stack.enter_async_context(
                open_device(config.interface, config.implementation, config.userspace_path)
            )
            self._bootstrap = self._bootstrap_interface(device, key)
            if plan is None:
                await self._bootstrap.set_up()
                task_status.started()
                await self._bootstrap.live()
            HybridExchange().offer()  # a host that cannot do this says so now
            slots = [
                [
                    await stack.enter_async_context(
                        open_device(name, config.implementation, config.userspace_path, awake=False)
                    )
                    for name in names
                ]
                for names in self._names()
            ]
            self._ties = tuple([await slot.index() for pair in slots for slot in pair])
            await self._bootstrap.set_up()
            await device.accept_from_other_routes()
            record = await trio.to_thread.run_sync(EpochRecord, plan.record)
            control = Control(config.interface, config.index)
            stack.callback(control.close)
            await control.open()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bootstrap.live)
                nursery.start_soon(control.listen)
                await self._see_that_nothing_leaves()
                nursery.start_soon(self._guard)
                for place, peer in enumerate(config.peers):
                    pair = self._pair(peer, place, tuple(slots[place]), plan, record, control)
                    self._pairs[peer.index] = pair
                    control.serve(pair)
                    nursery.start_soon(pair.run)
                task_status.started()

    async def _guard(self) -> None:
        while True:
            await trio.sleep(GUARD_SECONDS)
            await self._see_that_nothing_leaves()

    async def _see_that_nothing_leaves(self) -> None:
        """Sockets that are tied for what they receive still send as the host routes: see that this is by an
        interface of ours. A rule or a route by somebody else that leads past the tunnel ends it."""
        ours = {self.interface, *(name for pair in self._names() for name in pair)}
        hosts = [network.network_address for peer in self.config.peers for network in peer.allowed]
        for address, name in (await ways_out(hosts)).items():
            if name not in ours and name != "nowhere":
                raise TunnelError(
                    f"{self.interface}: this host sends what is for {address} by {name}, past the tunnel; "
                    "remove the rule or route that says so"
                )

    def _names(self) -> list[list[str]]:
        return slot_names(self.interface, len(self.config.peers))

    def _bootstrap_interface(self, device: Device, key: PrivateKey) -> Interface:
        config = self.config
        entries, ways = [], []
        addresses = [config.address]
        if config.rotation is not None:
            addresses.append(control_address(config.index))
        for peer in config.peers:
            allowed = peer.allowed
            if config.rotation is not None:
                # The application's ranges lead here while they lead nowhere else, and nobody here owns them.
                ways += [Way(network, config.address, FALLBACK_METRIC) for network in peer.allowed]
                allowed = (ip_network(f"{control_address(peer.index)}/32"),)
            source = addresses[-1]
            ways += [Way(network, source) for network in allowed]
            entries.append(
                Entry(peer.index, peer.public_key, peer.endpoint, allowed, config.index < peer.index)
            )
        return Interface(
            device,
            key,
            config.listen_port,
            config.mtu,
            tuple(addresses),
            tuple(ways),
            tuple(entries),
            self._note,
        )

    def _pair(
        self,
        peer: TunnelPeer,
        place: int,
        slots: tuple[Device, ...],
        plan: RotationPlan,
        record: EpochRecord,
        control: Control,
    ) -> Pair:
        config = self.config
        machine = Rotation(
            config.index,
            peer.index,
            plan.sign,
            lambda message, signature: plan.authenticate(peer.index, message, signature),
            plan.context,
            tuple(1 + SLOTS * place + slot for slot in range(SLOTS)),
            seen=record.seen.get(peer.index, 0),
            refusals=plan.refusals,
        )
        return Pair(
            machine,
            slots,
            record,
            plan.seconds,
            config.listen_port,
            config.address,
            config.mtu,
            peer.endpoint,
            peer.allowed,
            control.send,
            self._bootstrap_up,
            self._note,
            self._said if self._said is not None else lambda peer, what, epoch: None,
        )

    def _bootstrap_up(self, index: int) -> bool:
        assert self._bootstrap is not None
        watch = self._bootstrap.watches[index]
        return watch.state(trio.current_time(), time.time()) is PeerState.UP


@asynccontextmanager
async def raise_tunnel(
    config: TunnelConfig,
    wait: float | None = HANDSHAKE_SECONDS,
    said: Callable[[int, str, int | None], None] | None = None,
) -> AsyncIterator[Tunnel]:
    """Raise the interface, keep handshakes with all peers, and take everything down on exit.

    With `wait` seconds given, returns once every peer has handshaken, else raises `HandshakeTimeout`; with
    None it returns as soon as the interface is up, and `wait_up` may be called later: a long-running party
    should not end because a peer is late. `said` hears of rotations: peer, what (begun, accepted, committed,
    aborted, refused) and epoch. One error alone comes as itself, not in a group.
    """
    key = load_private(config.private_key)
    try:
        ours = key.public()
        for peer in config.peers:
            if peer.public_key == ours:
                raise TunnelError(f"{config.interface}: peer {peer.index} has our own public key {ours}")
        tunnel = Tunnel(config, said)
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


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for problem in group.exceptions:
        found += _leaves(problem) if isinstance(problem, BaseExceptionGroup) else [problem]
    return found
