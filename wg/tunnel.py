"""The tunnel of one node: `async with raise_tunnel(config) as tunnel:`.

Without a plan for rotation it is one interface with the keys of the configuration. With one, that interface
is the *bootstrap* generation: it only carries the messages by which nodes agree on further generations, whose
interfaces carry the application (see `wg.generations`).

Peers are admitted and expelled while the tunnel is up; those whose key the configuration has are admitted
from the start. What is for a peer that is not admitted goes to an interface that has no such peer, and ends.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import NoReturn

import structlog
import trio

from wg.device import INTERFACE_NAME, MTU, Address, Device, Network, open_device, ways_out
from wg.errors import HandshakeTimeout, TunnelError, leaves
from wg.exchange import HybridExchange
from wg.generations import (
    CONTROL_PORT,
    FALLBACK_METRIC,
    Control,
    EpochRecord,
    GenerationStatus,
    Pair,
    control_address,
    tie,
)
from wg.interface import Entry, Interface, PeerState, PeerStatus, PeerWatch, Way, resolve
from wg.keys import PresharedKey, PrivateKey, PublicKey, load_private
from wg.probe import ping
from wg.rotation import MAX_OFFSET, SLOTS, Rotation

log = structlog.get_logger("wg.tunnel")

HANDSHAKE_SECONDS = 30.0
#: How often to see that the host's routes lead into the tunnel; a look takes some milliseconds in a thread.
GUARD_SECONDS = 2.0


@dataclass(frozen=True)
class TunnelPeer:
    """The other end of a tunnel. `endpoint` is its UDP address outside; `allowed` what it may use inside.
    Without a public key it is nobody until `Tunnel.admit`."""

    index: int
    public_key: PublicKey | None
    endpoint: tuple[str, int]
    allowed: tuple[Network, ...]


@dataclass(frozen=True, eq=False)
class RotationPlan:
    """Rotate every so many `seconds`, and on demand.

    `sign` is by this node's identity; `authenticate` takes a peer's index, a message and its signature, and
    raises one of `refusals`. All nodes of one mesh have the same 32 bytes of `context`. `record` is the file
    of the epochs used, which outlives the process.
    """

    seconds: float
    record: Path
    sign: Callable[[bytes], bytes]
    authenticate: Callable[[int, bytes, bytes], None]
    refusals: tuple[type[Exception], ...]
    context: bytes


def slot_names(interface: str, peers: int) -> list[list[str]]:
    """The names of the further interfaces that rotation needs, by peer and slot."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    return [[interface + next(letters) for _ in range(SLOTS)] for _ in range(peers)]


@dataclass(frozen=True, eq=False)
class TunnelConfig:
    """What one node needs to know. `address` is its own inside the tunnel, the same in every generation. A
    private key that lives in memory alone is taken over: the tunnel wipes it at its end."""

    index: int
    interface: str
    private_key: Path | PrivateKey
    listen_port: int
    address: Address
    peers: tuple[TunnelPeer, ...]
    mtu: int = MTU
    implementation: str = "auto"
    userspace_path: str | None = None
    rotation: RotationPlan | None = None

    def __post_init__(self) -> None:
        indices = [self.index, *(peer.index for peer in self.peers)]
        keys = [peer.public_key for peer in self.peers if peer.public_key is not None]
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
        private_key: str | Path | PrivateKey,
        listen_port: int,
        address: str,
        peers: Sequence[tuple[int, str | None, str, int, Sequence[str]]],
        mtu: int = MTU,
        rotation: RotationPlan | None = None,
    ) -> TunnelConfig:
        """From the texts of a configuration file; a peer is (index, public key, host, port, ranges)."""
        try:
            return cls(
                index=index,
                interface=interface,
                private_key=private_key if isinstance(private_key, PrivateKey) else Path(private_key),
                listen_port=listen_port,
                address=ip_interface(address).ip,
                mtu=mtu,
                rotation=rotation,
                peers=tuple(
                    TunnelPeer(
                        number,
                        PublicKey.from_text(key) if key is not None else None,
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
        self,
        config: TunnelConfig,
        public_key: PublicKey,
        said: Callable[[int, str, int | None], None] | None = None,
    ) -> None:
        self.config = config
        self.public_key = public_key
        self._said = said if said is not None else lambda peer, what, epoch: None
        self._bootstrap: Interface | None = None
        self._pairs: dict[int, Pair] = {}
        self._slots: dict[int, tuple[Device, ...]] = {}
        self._changing = {peer.index: trio.Lock() for peer in config.peers}
        self._passed = {peer.index: (0, 0) for peer in config.peers}  # of admissions that are over
        self._states = {peer.index: PeerState.ABSENT for peer in config.peers}  # as last said
        self._ties: tuple[int, ...] = ()
        self._changed = trio.Event()
        self._nursery: trio.Nursery
        self._control: Control
        self._record: EpochRecord

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
        rx, tx = self._traffic_of(index)
        return PeerStatus(
            index=index,
            state=self._state_of(index),
            endpoint=watch.reading.endpoint if watch.reading else None,
            handshake_age=watch.handshake_age(wall),
            silent=watch.silent(now),
            mute=watch.mute(now),
            round_trip=watch.round_trip,
            rx=rx,
            tx=tx,
            restarts=watch.restarts,
        )

    def _state_of(self, index: int) -> PeerState:
        if not self.admitted(index):
            return PeerState.ABSENT
        return self._watch_of(index).state(trio.current_time(), time.time())

    def _watch_of(self, index: int) -> PeerWatch:
        """Of what carries the application; one that has seen nothing if nothing does."""
        found = None
        if (pair := self._pairs.get(index)) is not None:
            found = pair.watch()
        elif self._bootstrap is not None and self.config.rotation is None:
            found = self._bootstrap.watches.get(index)
        return found if found is not None else PeerWatch(self.config.index < index)

    def _traffic_of(self, index: int) -> tuple[int, int]:
        rx, tx = self._passed[index]
        pair, watch = self._pairs.get(index), self._watch_of(index)
        more = pair.traffic() if pair is not None else (watch.rx, watch.tx)
        return rx + more[0], tx + more[1]

    def rotations(self) -> tuple[GenerationStatus, ...]:
        """Where rotation stands with every peer; empty without a plan. An admission begins to count anew."""
        if self.config.rotation is None:
            return ()
        indices = sorted(peer.index for peer in self.config.peers)
        return tuple(
            self._pairs[index].status()
            if index in self._pairs
            else GenerationStatus(index, None, None, PeerState.ABSENT.value, 0, 0, 0)
            for index in indices
        )

    def rotate(self) -> None:
        """Begin a rotation with every admitted peer now, or once the one under way is over. Does not wait."""
        if self.config.rotation is None:
            raise TunnelError(f"{self.interface}: rotation is off")
        for pair in self._pairs.values():
            pair.rotate()

    def admitted(self, index: int) -> bool:
        return self._bootstrap is not None and index in self._bootstrap.entries

    def up(self, index: int) -> bool:
        return self._state_of(index) is PeerState.UP

    async def wait_up(self, seconds: float = HANDSHAKE_SECONDS, peers: Sequence[int] | None = None) -> None:
        """Wait until all (or the named) peers are admitted and can be reached; `HandshakeTimeout` names the
        missing."""
        wanted = tuple(peer.index for peer in self.config.peers) if peers is None else tuple(peers)
        with trio.move_on_after(seconds):
            while not all(self.up(index) for index in wanted):
                await self._changed.wait()
            return
        missing = [index for index in wanted if not self.up(index)]
        if missing:
            absent = [index for index in missing if not self.admitted(index)]
            raise HandshakeTimeout(self.interface, missing, seconds, absent)

    async def admit(
        self,
        index: int,
        public_key: PublicKey,
        *,
        preshared: PresharedKey | None = None,
        endpoint: tuple[str, int] | None = None,
    ) -> None:
        """Let the configured peer `index` in under this key and pre-shared key, or replace those it has.

        `preshared` is taken over and wiped in the end, whatever comes of the call; both ends need the same.
        `endpoint` is where the peer is, if not where the configuration says. The same keys again change
        nothing, but for where the peer is. Other keys end all that was with this peer before: session,
        generations, keys. Returns when the device knows the peer, not when it is up. Calls for one peer take
        turns; a cancelled one leaves the peer as it was, or expelled. Raises `TunnelError`.
        """
        kept = False
        try:
            peer = self._peer(index)
            if public_key == self.public_key:
                raise TunnelError(f"{self.interface}: peer {index} has our own public key {public_key}")
            place = await resolve(*(peer.endpoint if endpoint is None else endpoint))
            async with self._changing[index]:
                boot = self._live_bootstrap()
                entry = boot.entries.get(index)
                if entry is not None and _same(entry, public_key, preshared):
                    kept = preshared is entry.preshared
                    if endpoint is not None and place not in entry.places:
                        await boot.move(index, place)
                    return
                await self._leave(index, preshared)
                ours = self._ranges_on_bootstrap(peer)
                leads = self.config.index < index
                await boot.admit(Entry(index, public_key, (place,), ours, leads, preshared))
                kept = True
                if self.config.rotation is not None:
                    self._start_pair(peer, self.config.rotation)
                log.info("peer admitted", interface=self.interface, peer=index, key=str(public_key))
                self._note()
        finally:
            if preshared is not None and not kept:
                preshared.wipe()

    async def expel(self, index: int) -> None:
        """End all that is with this peer, at once: its session, its generations with their processes and
        keys. What is for it goes nowhere from then on, until it is admitted again. A peer that is not
        admitted may be expelled. Calls for one peer take turns; once begun it is not cancelled."""
        self._peer(index)
        async with self._changing[index]:
            if self.admitted(index):
                log.info("peer expelled", interface=self.interface, peer=index)
            await self._leave(index)
            self._note()

    async def _leave(self, index: int, next_preshared: PresharedKey | None = None) -> None:
        with trio.CancelScope(shield=True):
            boot, pair = self._live_bootstrap(), self._pairs.get(index)
            if pair is not None:
                pair.end()
                self._control.dismiss(pair)
            entry = boot.entries.get(index)
            if pair is None:
                self._passed[index] = self._traffic_of(index)
            await boot.expel(index)
            if pair is not None:
                await pair.ended()
                self._passed[index] = self._traffic_of(index)
                del self._pairs[index]
            if entry is not None and entry.preshared is not None and entry.preshared is not next_preshared:
                entry.preshared.wipe()

    def _peer(self, index: int) -> TunnelPeer:
        for peer in self.config.peers:
            if peer.index == index:
                return peer
        raise TunnelError(f"{self.interface}: node {index} is none of the configured peers")

    def _live_bootstrap(self) -> Interface:
        if self._bootstrap is None:
            raise TunnelError(f"{self.interface}: the tunnel is down")
        return self._bootstrap

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
        for index, before in self._states.items():
            state = self._states[index] = self._state_of(index)
            if state is not before:
                seen = {
                    key: value for key, value in self._status_of(index).as_dict().items() if value is not None
                }
                bad = state in (PeerState.SUSPECT, PeerState.DOWN)
                (log.warning if bad else log.info)("tunnel peer", was=before.value, **seen)
                self._said(index, state.value, None)

    async def _live(self, key: PrivateKey, task_status: trio.TaskStatus[None]) -> None:
        """Keep the interfaces alive."""
        config, plan = self.config, self.config.rotation
        async with AsyncExitStack() as stack:
            stack.callback(self._down)
            device = await stack.enter_async_context(
                open_device(config.interface, config.implementation, config.userspace_path)
            )
            bootstrap = self._bootstrap_interface(device, key)
            if plan is not None:
                await self._prepare_rotation(plan, stack)
            await bootstrap.set_up()
            if plan is not None:
                await device.accept_from_other_routes()
                self._control = Control(config.interface, config.index)
                stack.callback(self._control.close)
                await self._control.open()
                await self._see_that_nothing_leaves()
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(bootstrap.live)
                if plan is not None:
                    self._nursery.start_soon(self._control.listen)
                    self._nursery.start_soon(self._guard)
                else:
                    self._nursery.start_soon(self._ping)
                self._bootstrap = bootstrap
                for peer in config.peers:
                    if peer.public_key is not None:
                        await self.admit(peer.index, peer.public_key)
                task_status.started()

    def _down(self) -> None:
        boot, self._bootstrap = self._bootstrap, None
        for entry in boot.entries.values() if boot is not None else ():
            if entry.preshared is not None:
                entry.preshared.wipe()

    async def _prepare_rotation(self, plan: RotationPlan, stack: AsyncExitStack) -> None:
        """The slots of all peers, admitted or not: they exist for the life of the tunnel."""
        HybridExchange().offer()  # a host that cannot do this says so now
        config = self.config
        self._record = await trio.to_thread.run_sync(EpochRecord, plan.record)
        for peer, names in zip(config.peers, self._names(), strict=True):
            self._slots[peer.index] = tuple(
                [
                    await stack.enter_async_context(
                        open_device(name, config.implementation, config.userspace_path, awake=False)
                    )
                    for name in names
                ]
            )
        self._ties = tuple([await slot.index() for slots in self._slots.values() for slot in slots])

    async def _ping(self) -> NoReturn:
        """Without rotation, on the one interface there is; with it, each generation pings for itself."""
        at = {
            network.network_address: peer.index
            for peer in self.config.peers
            for network in peer.allowed
            if network.prefixlen == network.max_prefixlen and network.version == self.address.version
        }

        def peers() -> dict[str, PeerWatch]:
            watches = self._bootstrap.watches if self._bootstrap is not None else {}
            return {str(host): watches[index] for host, index in at.items() if index in watches}

        await ping(self, CONTROL_PORT, peers, lambda: False)
        raise AssertionError("it goes on for ever")

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
        addresses, ways = [config.address], []
        if config.rotation is not None:
            addresses.append(control_address(config.index))
        for peer in config.peers:
            if config.rotation is not None:
                # The application's ranges lead here while they lead nowhere else, and nobody here owns them.
                ways += [Way(network, config.address, FALLBACK_METRIC) for network in peer.allowed]
            ways += [Way(network, addresses[-1]) for network in self._ranges_on_bootstrap(peer)]
        return Interface(
            device,
            key,
            config.listen_port,
            config.mtu,
            tuple(addresses),
            tuple(ways),
            {},
            self._note,
        )

    def _ranges_on_bootstrap(self, peer: TunnelPeer) -> tuple[Network, ...]:
        if self.config.rotation is None:
            return peer.allowed
        return (ip_network(f"{control_address(peer.index)}/32"),)

    def _start_pair(self, peer: TunnelPeer, plan: RotationPlan) -> None:
        config, boot = self.config, self._live_bootstrap()
        place = config.peers.index(peer)
        machine = Rotation(
            config.index,
            peer.index,
            plan.sign,
            lambda message, signature: plan.authenticate(peer.index, message, signature),
            plan.context,
            tuple(1 + SLOTS * place + slot for slot in range(SLOTS)),
            seen=self._record.seen.get(peer.index, 0),
            refusals=plan.refusals,
        )
        pair = Pair(
            machine,
            self._slots[peer.index],
            self._record,
            plan.seconds,
            config.listen_port,
            config.address,
            config.mtu,
            lambda: boot.places(peer.index),
            peer.allowed,
            self._control.send,
            self._bootstrap_up,
            self._note,
            self._said,
        )
        self._pairs[peer.index] = pair
        self._control.serve(pair)
        self._nursery.start_soon(pair.run)

    def _bootstrap_up(self, index: int) -> bool:
        watch = self._live_bootstrap().watches.get(index)
        return watch is not None and watch.state(trio.current_time(), time.time()) is PeerState.UP


def _same(entry: Entry, public_key: PublicKey, preshared: PresharedKey | None) -> bool:
    if entry.public_key != public_key or (entry.preshared is None) != (preshared is None):
        return False
    return entry.preshared is None or preshared is None or entry.preshared.same(preshared)


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
    aborted, refused) and epoch; and of each change of a peer's state: peer, value of `PeerState`, None. One
    error alone comes as itself, not in a group.
    """
    given = config.private_key
    key = given if isinstance(given, PrivateKey) else load_private(given)
    try:
        tunnel = Tunnel(config, key.public(), said)
        async with trio.open_nursery() as nursery:
            await nursery.start(tunnel._live, key)
            if wait is not None:
                await tunnel.wait_up(wait)
            yield tunnel
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        found = leaves(group)
        if len(found) == 1:
            raise found[0] from found[0].__cause__
        raise
    finally:
        key.wipe()
