"""One WireGuard interface with one key pair: set up, watched, and revived when its device is lost.

Rules of the handshake, each paid for once (a handshake is one round trip when they are kept, five seconds and
more when they are not, because crossing initiations make both ends discard each other's answer):

1. One designated initiator per pair, the lower index. Only it has a keepalive before the first handshake.
2. Never a keepalive of 5 s: it equals WireGuard's retry interval and keeps both ends in lock-step.
3. A stuck initiator is restarted by removing and re-adding the peer, which resets WireGuard's 5 s limiter. So
   nothing has to say who is up first: an initiation the peer was not ready for costs one retry interval.
4. The responder gets its keepalive after the first handshake, and loses it when the peer is down, so that
   both ends see the other's received bytes grow and neither breaks rule 1.

Health is read from `rx_bytes`, since a handshake's age shows a dead peer only after 180 s, and from the
answers to the application's pings (`wg.probe.ping`), since a host acknowledges TCP also for one that hangs.

Peers come and go while the interface is up. What is wanted stands in `entries` before the device is told, so
that a device that is lost meanwhile is revived with exactly those.
"""

from __future__ import annotations

import enum
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import NoReturn, TypeAlias

import structlog
import trio

from wg.device import Address, Device, Network
from wg.errors import DeviceLost, TunnelError, WgError
from wg.keys import PresharedKey, PrivateKey, PublicKey
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
#: No answer to the application's pings for so long, though the device is heard. A busy machine needs it.
MUTE_SECONDS = 4.0
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


#: Where a peer is outside the tunnel: address and UDP port.
Place: TypeAlias = tuple[Address, int]


class PeerState(enum.Enum):
    ABSENT = "not admitted"  # nothing passes, either way
    JOINING = "joining"  # no handshake yet since it was admitted
    UP = "up"
    SUSPECT = "suspect"  # start nothing new, keep what is open
    DOWN = "down"


@dataclass(frozen=True)
class PeerStatus:
    """What is known of one peer at the last poll. Ages in seconds; None where it never happened. `mute` is
    for how long its application has answered no ping, `round_trip` what the last answer took."""

    index: int
    state: PeerState
    endpoint: str | None
    handshake_age: float | None
    silent: float | None
    mute: float | None
    round_trip: float | None
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
            "mute": None if self.mute is None else round(self.mute, 3),
            "round_trip": None if self.round_trip is None else round(self.round_trip, 6),
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
    learned: Place | None = None  # where it was last heard from, which WireGuard authenticates
    round_trip: float | None = None
    restarts: int = 0
    tries: int = 0  # since the last handshake
    _asked: float | None = None  # since when the application pings
    _answered: float | None = None
    _added: float = 0.0
    _patience: float = 0.0
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
        self._patience = RETRY_SECONDS[min(self.tries, len(RETRY_SECONDS) - 1)] + RETRY_JITTER * self.jitter()
        self.tries += 1
        self._keepalive = keepalive

    def see(self, reading: PeerReading, now: float) -> Act:
        before = self.reading
        self.reading = reading
        if reading.handshake > 0.0 and (before is None or reading.rx > before.rx):
            self._grew = now
            self.learned = _parse(reading.endpoint) if reading.endpoint is not None else None
        if reading.handshake == 0.0:
            if self.initiator and now - self._added >= self._patience:
                return Act.RESTART
            return Act.NOTHING
        self.tries = 0
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

    def asked(self, now: float) -> None:
        """The application at the other end was pinged."""
        if self._asked is None:
            self._asked = now

    def answered(self, now: float, seconds: float) -> None:
        self._answered, self.round_trip = now, seconds

    def silent(self, now: float) -> float | None:
        """Seconds since the device heard anything; None before the first handshake."""
        return None if self._grew is None else now - self._grew

    def mute(self, now: float) -> float | None:
        """Seconds since the application at the other end answered; None while it is not asked."""
        if self._asked is None:
            return None
        return now - (self._answered if self._answered is not None else self._asked)

    @property
    def keepalive(self) -> bool:
        """Whether this end has something to say of its own."""
        return self._keepalive

    def handshake_age(self, wall: float) -> float | None:
        if self.reading is None or self.reading.handshake == 0.0:
            return None
        return max(0.0, wall - self.reading.handshake)

    def state(self, now: float, wall: float) -> PeerState:
        silent = self.silent(now)
        if silent is None:
            return PeerState.JOINING
        age, mute = self.handshake_age(wall), self.mute(now) or 0.0
        if max(silent, mute) > DOWN_SECONDS or (age is not None and age > SESSION_SECONDS):
            return PeerState.DOWN
        if silent > SUSPECT_SECONDS or mute > MUTE_SECONDS:
            return PeerState.SUSPECT
        # Without a session nothing passes, even if the last one was heard a moment ago.
        return PeerState.UP if age is not None else PeerState.SUSPECT

    @property
    def rx(self) -> int:
        return self._earlier_rx + (self.reading.rx if self.reading else 0)

    @property
    def tx(self) -> int:
        return self._earlier_tx + (self.reading.tx if self.reading else 0)


@dataclass(frozen=True, eq=False)
class Entry:
    """A peer as an interface knows it. Without `places` the peer speaks first; else they are tried in turn,
    after the one where it was last heard from. `allowed` is its inside."""

    index: int
    public_key: PublicKey
    places: tuple[Place, ...]
    allowed: tuple[Network, ...]
    initiator: bool
    preshared: PresharedKey | None = None


@dataclass(frozen=True)
class Way:
    """A route through an interface: what goes to `network` leaves from `source`."""

    network: Network
    source: Address
    metric: int | None = None


@dataclass(eq=False)
class Interface:
    """A device with its key, peers, addresses and routes. `note` is called after every look at the peers."""

    device: Device
    key: PrivateKey
    port: int
    mtu: int
    addresses: tuple[Address, ...]
    ways: tuple[Way, ...]
    entries: dict[int, Entry]
    note: Callable[[], None]
    restarts: int = 0  # of the device
    fading: bool = False  # on its way out: sends nothing of its own any more
    watches: dict[int, PeerWatch] = field(init=False)
    _busy: trio.Lock = field(default_factory=trio.Lock)  # the device and `entries` are brought in line
    _living: bool = False
    _look_now: trio.Event = field(default_factory=trio.Event)
    _since: dict[int, float] = field(default_factory=dict)  # the peer is here
    _logged: dict[int, PeerState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watches = {entry.index: PeerWatch(entry.initiator) for entry in self.entries.values()}

    @property
    def name(self) -> str:
        return self.device.name

    async def set_up(self) -> None:
        """Identity, port, addresses, MTU and routes, each of which may be set already."""
        await self.device.configure(self.key, self.port)
        await self.device.bring_up(self.addresses, self.mtu)
        for way in self.ways:
            await self.device.route(way.network, way.source, way.metric)

    async def live(self) -> NoReturn:
        """Keep handshakes with all peers, reviving the device when it is lost (TCP connections survive)."""
        losses: list[float] = []
        while True:
            try:
                await self._watch()
            except DeviceLost as problem:
                reason = str(problem)
            now = trio.current_time()
            losses = [moment for moment in losses if now - moment < RESURRECTION_WINDOW] + [now]
            if len(losses) > RESURRECTIONS:
                raise TunnelError(f"lost {len(losses)} times in {RESURRECTION_WINDOW:.0f} s; last: {reason}")
            self.restarts += 1
            log.error("tunnel device lost; reviving it", interface=self.name, reason=reason)
            await trio.sleep(0.02 * 4 ** (len(losses) - 1))
            async with self._busy:
                await self.device.revive()
                await self.set_up()

    async def fade(self) -> None:
        """Send no keepalives any more, so that what still arrives is somebody's traffic."""
        self.fading = True
        for entry in self.entries.values():
            await self.device.set_keepalive(entry.public_key, 0)

    async def admit(self, entry: Entry) -> None:
        """Add a peer that is not here. Once begun it is not cancelled."""
        with trio.CancelScope(shield=True):
            async with self._busy:
                if any(entry.public_key == other.public_key for other in self.entries.values()):
                    raise TunnelError(f"{self.name}: another peer has the public key {entry.public_key}")
                self.entries[entry.index] = entry
                self.watches[entry.index] = PeerWatch(entry.initiator)
                self._since[entry.index] = trio.current_time()
                if not self._living:
                    return  # `live` adds it
                try:
                    await self._add(entry, entry.initiator)
                except DeviceLost:
                    self.device.lost.set()  # it is revived with this peer
                except WgError:
                    self._forget(entry.index)
                    await self._remove(entry)  # the lines before the one that was refused stand
                    raise
        self._look_now.set()

    async def move(self, index: int, place: Place) -> None:
        """The peer is to be found there from now on. Its session stays."""
        with trio.CancelScope(shield=True):
            async with self._busy:
                self.entries[index] = entry = replace(self.entries[index], places=(place,))
                self.watches[index].learned = None
                try:
                    if self._living:
                        await self._put(entry, place, self.watches[index].keepalive)
                except DeviceLost:
                    self.device.lost.set()

    async def expel(self, index: int) -> None:
        """Take a peer away with its session, now; the ways to it lead nowhere then. One that is not here may
        be expelled. Once begun it is not cancelled."""
        with trio.CancelScope(shield=True):
            async with self._busy:
                entry = self._forget(index)
                if entry is not None and self._living:
                    await self._remove(entry)

    def _forget(self, index: int) -> Entry | None:
        for each in (self.watches, self._since, self._logged):
            each.pop(index, None)
        return self.entries.pop(index, None)

    def places(self, index: int) -> tuple[Place, ...]:
        """Where a peer may be, the likeliest first: where it was last heard from, then as it was told."""
        learned = self.watches[index].learned
        told = self.entries[index].places
        return tuple(dict.fromkeys((learned, *told) if learned is not None else told))

    async def _remove(self, entry: Entry) -> None:
        try:
            await self.device.remove_peer(entry.public_key)
        except TunnelError:  # lost, or it refuses
            await self.device.cut()  # it is revived without the peer

    async def _add(self, entry: Entry, speak: bool) -> None:
        places, watch = self.places(entry.index), self.watches[entry.index]
        await self._put(entry, places[watch.tries % len(places)] if places else None, speak)
        watch.added(trio.current_time(), speak)

    async def _put(self, entry: Entry, place: Place | None, speak: bool) -> None:
        await self.device.put_peer(
            entry.public_key, place, entry.allowed, KEEPALIVE if speak else 0, entry.preshared
        )

    async def _watch(self) -> NoReturn:
        async with self._busy:
            self._living = True
            now = trio.current_time()
            for index, entry in self.entries.items():
                self._since[index] = now
                # After a revival the peers hold sessions that we lost and wait for nothing: speak first.
                lost = self.restarts > 0 and self.watches[index].silent(now) is not None
                await self._add(entry, entry.initiator or lost)
        while True:
            self._look_now = trio.Event()
            async with self._busy:
                joining = await self._look()
            self.note()
            await self._pause(POLL_SECONDS_JOINING if joining else POLL_SECONDS)
            if self.device.lost.is_set():
                raise DeviceLost(f"{self.name}: wireguard-go ended by itself")

    async def _look(self) -> bool:
        """At all peers, and act on it. Whether a handshake is due any moment."""
        readings = {reading.public_key: reading for reading in await self.device.readings()}
        now, wall = trio.current_time(), time.time()
        joining = False
        for index, entry in self.entries.items():
            watch, reading = self.watches[index], readings.get(entry.public_key)
            if reading is None:
                raise TunnelError(f"{self.name}: somebody else removed peer {index}")
            act = watch.see(reading, now)
            if not self.fading:
                await self._act(entry, watch, act)
            state = watch.state(now, wall)
            if state is not self._logged.get(index, PeerState.JOINING):
                self._logged[index] = state
                log.debug("peer of an interface", interface=self.name, peer=index, state=state.value)
            joining |= watch.handshake_age(wall) is None and now - self._since[index] < JOINING_SECONDS
        return joining

    async def _pause(self, seconds: float) -> None:
        """Until the next look is due, or the device is lost, or a peer has come."""
        async with trio.open_nursery() as nursery:

            async def until(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, self.device.lost)
            nursery.start_soon(until, self._look_now)
            nursery.cancel_scope.deadline = trio.current_time() + seconds

    async def _act(self, entry: Entry, watch: PeerWatch, act: Act) -> None:
        match act:
            case Act.RESTART:
                await self.device.remove_peer(entry.public_key)
                await self._add(entry, True)
            case Act.KEEPALIVE_ON:
                await self.device.set_keepalive(entry.public_key, KEEPALIVE)
            case Act.KEEPALIVE_OFF:
                await self.device.set_keepalive(entry.public_key, 0)


async def resolve(host: str, port: int) -> Place:
    """The address of a host that may be given by name. Raises `TunnelError`."""
    try:
        return ip_address(host), port
    except ValueError:
        pass
    try:
        with trio.fail_after(RESOLVE_SECONDS):
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, trio.TooSlowError) as problem:
        raise TunnelError(f"the name {host} cannot be resolved: {problem}") from None
    return ip_address(found[0][4][0]), port


def _parse(endpoint: str) -> Place:
    """An endpoint as devices report it."""
    host, _, port = endpoint.rpartition(":")
    return ip_address(host.strip("[]")), int(port)
