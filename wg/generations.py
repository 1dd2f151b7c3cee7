"""Rotation at work: carries out what `wg.rotation` decides, on the interfaces of this node.

Beside the bootstrap interface, whose keys come from outside (files, or admission), there are two more
interfaces for each peer, its *slots*. They are made once and rest until they are needed, so that their kernel
indices hold for the life of the process: sockets of the application are tied to all slots by those numbers
(`tie`), and live through every rotation. A generation occupies one slot, with a process and keys of its own;
when it goes, the process and the keys go with it.

What passes where. The bootstrap interface carries the messages of rotation and nothing else: its peers own
one link-local address each, so that WireGuard itself refuses any other packet on it. A slot's peer owns its
configured ranges. Routes to those ranges lead to the generation in use; below them lies one to the bootstrap
interface, which drops what it gets, so that nothing leaves by another way while there is no generation. The
route below that serves only sockets tied to a slot, for the proof before it is used.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Protocol

import structlog
import trio

from wg.device import Address, Device, Network
from wg.errors import DeviceLost, TunnelError, WgError
from wg.interface import Entry, Interface, PeerState, PeerWatch, Place, Way
from wg.probe import PING_SECONDS, answer_probes, ping, probe
from wg.rotation import (
    MAX_MESSAGE,
    Action,
    Drain,
    Drop,
    Generation,
    Raise,
    Record,
    Refused,
    RefusedWithAnswer,
    Rotation,
    Route,
    Say,
    Send,
)

log = structlog.get_logger("wg.rotation")

#: Of the link-local range, which no router forwards (RFC 3927): one address per node, by its index.
CONTROL_NETWORK = "169.254.77.{}"
CONTROL_PORT = 4177
MAX_INDEX = 250
MAX_PORT = 65535
#: Lower wins. Ties between these numbers never occur: each route has another interface or another metric.
LIVE_METRIC, FALLBACK_METRIC, STAGING_METRIC = 50, 1000, 2000
#: A rotation that has not come to its end by then is given up; over a WAN it takes about ten round trips.
ROTATION_SECONDS = 20.0
RESEND_SECONDS = 0.3
#: An old generation goes when nothing has arrived on it for so long, or at the limit.
DRAIN_SECONDS, DRAIN_LIMIT = 1.5, 10.0
PROVE_AGAIN_SECONDS = 0.1
#: On the bootstrap interface, so that it is heard whatever the pair is doing.
PING = b"\0"
#: After a failure, doubling. Also how often a follower without a generation asks.
FIRST_BACKOFF, MAX_BACKOFF = 1.0, 15.0
#: A follower with an interval of its own asks when the leader is so much late.
FOLLOWER_SHARE = 1.1
MAX_WAITING = 64
REFUSALS_LOGGED_SECONDS = 1.0
_RECORD_BYTES = 4096

# From linux/filter.h and asm-generic/socket.h.
_SO_ATTACH_FILTER = 26
_LOAD_ABSOLUTE, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_INTERFACE_INDEX = 0xFFFFF008  # SKF_AD_OFF + SKF_AD_IFINDEX: the interface a packet came in by
_WHOLE_PACKET = 0xFFFFFFFF


def tie(sock: trio.socket.SocketType | socket.socket, interfaces: Sequence[int]) -> None:
    """Let a socket receive from these interfaces only, and what it accepts likewise.

    A classic packet filter on the interface index, run before TCP sees a packet. Unlike SO_BINDTODEVICE it
    takes several, and so lets a connection go on when its route moves.
    """
    number = len(interfaces)
    code = [struct.pack("=HBBI", _LOAD_ABSOLUTE, 0, 0, _INTERFACE_INDEX)]
    code += [
        struct.pack("=HBBI", _JUMP_EQUAL, number - place, 0, index) for place, index in enumerate(interfaces)
    ]
    code += [struct.pack("=HBBI", _RETURN, 0, 0, 0), struct.pack("=HBBI", _RETURN, 0, 0, _WHOLE_PACKET)]
    program = ctypes.create_string_buffer(b"".join(code))
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(code), ctypes.addressof(program))
    )


def control_address(index: int) -> IPv4Address:
    if not 0 <= index <= MAX_INDEX:
        raise TunnelError(f"node index {index}: rotation counts from 0 to {MAX_INDEX}")
    return IPv4Address(CONTROL_NETWORK.format(index + 1))


class Shelf(Protocol):
    """Where a small record outlives the process. Blocks; raises `OSError`."""

    def read(self) -> bytes | None:
        """What was written last; None if nothing was."""

    def write(self, content: bytes) -> None:
        """Replace it. Durable when it returns; after a crash the old or the new one is there."""


class FileShelf:
    """One file of mode 0600."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()[: _RECORD_BYTES + 1]
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        fresh = self._path.with_name(self._path.name + ".new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(fresh, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class EpochRecord:
    """The highest epoch used with each peer, on disk: one line `PEER EPOCH` each.

    It may be lost (the peer then tells, see STALE), but not go back: one that is damaged is an error.
    """

    def __init__(self, place: Path | Shelf) -> None:
        path = self._shelf = FileShelf(place) if isinstance(place, Path) else place
        self._busy = trio.Lock()
        self.seen: dict[int, int] = {}
        try:
            raw = path.read()
            if raw is None:
                return
            text = raw.decode("ascii")
        except (OSError, UnicodeDecodeError) as problem:
            raise TunnelError(f"{path}: the record of tunnel epochs cannot be read: {problem}") from None
        for line in text.splitlines():
            words = line.split(" ")
            if len(words) != 2 or not all(word.isdigit() and len(word) < 20 for word in words):
                raise TunnelError(
                    f"{path}: the record of tunnel epochs is damaged; remove it, the peers know the count"
                )
            self.seen[int(words[0])] = int(words[1])

    async def put(self, peer: int, epoch: int) -> None:
        """Durable when it returns. Raises `OSError`."""
        async with self._busy:
            self.seen[peer] = max(epoch, self.seen.get(peer, 0))
            text = "".join(f"{index} {count}\n" for index, count in sorted(self.seen.items()))
            await trio.to_thread.run_sync(self._shelf.write, text.encode())


@dataclass(frozen=True)
class GenerationStatus:
    """Where rotation stands with one peer. `age` is that of the generation in use, in seconds."""

    index: int
    epoch: int | None
    age: float | None
    state: str
    committed: int
    aborted: int
    refused: int

    def as_dict(self) -> dict[str, object]:
        return {
            "peer": self.index,
            "epoch": self.epoch,
            "age": None if self.age is None else round(self.age, 1),
            "state": self.state,
            "committed": self.committed,
            "aborted": self.aborted,
            "refused": self.refused,
        }


@dataclass(eq=False)
class _Life:
    """A generation while it occupies its slot."""

    generation: Generation
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    echo: trio.CancelScope = field(default_factory=trio.CancelScope)  # answers the peer's proof
    over: trio.Event = field(default_factory=trio.Event)
    interface: Interface | None = None
    nursery: trio.Nursery | None = None

    def faded(self) -> bool:
        return self.interface is None or self.interface.fading


@dataclass(eq=False)
class _Inside:
    """The inside of one slot, for the proof (`wg.probe.Inside`)."""

    interface: str
    address: Address
    mtu: int

    def bind(self, sock: trio.socket.SocketType) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.interface.encode() + b"\0")


@dataclass(eq=False)
class Pair:
    """This node's side of one pair: the state machine, its slots, and its clock."""

    machine: Rotation
    slots: tuple[Device, ...]
    record: EpochRecord
    seconds: float  # between rotations
    base_port: int  # of the bootstrap interface
    address: Address  # of the application, here
    mtu: int
    places: Callable[[], tuple[Place, ...]]  # of the peer's bootstrap interface, the likeliest first
    allowed: tuple[Network, ...]
    send: Callable[[int, bytes], None]
    bootstrap_up: Callable[[int], bool]
    note: Callable[[], None]
    say: Callable[[int, str, int | None], None]

    committed: int = 0
    aborted: int = 0
    refused: int = 0
    restarts: int = 0  # of devices of generations that are gone
    _since: float = 0.0  # the commit of the generation in use
    _lives: dict[int, _Life] = field(default_factory=dict)
    _traffic: list[int] = field(default_factory=lambda: [0, 0])  # of generations that are gone
    _busy: tuple[int, float] | None = None  # epoch under way, and when its time is up
    _due: float = 0.0
    _backoff: float = FIRST_BACKOFF
    _refusal_logged: float = -REFUSALS_LOGGED_SECONDS
    _pinged: float = 0.0

    def __post_init__(self) -> None:
        self._inbox, self._events = trio.open_memory_channel[Callable[[], list[Action]]](MAX_WAITING)
        self._nursery: trio.Nursery
        self._scope = trio.CancelScope()
        self._over = trio.Event()

    @property
    def peer(self) -> int:
        return self.machine.peer

    # what others ask

    def hear(self, data: bytes) -> None:
        """A datagram from the peer's control address."""
        if data != PING:
            self._post(lambda: self.machine.receive(data))

    def rotate(self) -> None:
        self._post(self.machine.want)

    def end(self) -> None:
        """Drop all generations, now: their processes and keys go, and their routes, below which is one that
        leads nowhere (see above). `ended` waits until it is done."""
        self._scope.cancel()

    async def ended(self) -> None:
        await self._over.wait()

    def watch(self) -> PeerWatch | None:
        """The health of the generation in use."""
        live = self.machine.live
        life = self._lives.get(live.slot) if live is not None else None
        if life is None or life.generation is not live or life.interface is None:
            return None
        return life.interface.watches[self.peer]

    def traffic(self) -> tuple[int, int]:
        """Bytes received and sent in all generations."""
        rx, tx = self._traffic
        for life in self._lives.values():
            if life.interface is not None:
                rx += life.interface.watches[self.peer].rx
                tx += life.interface.watches[self.peer].tx
        return rx, tx

    def device_restarts(self) -> int:
        return self.restarts + sum(
            life.interface.restarts for life in self._lives.values() if life.interface is not None
        )

    def status(self) -> GenerationStatus:
        live = self.machine.live
        return GenerationStatus(
            self.peer,
            live.epoch if live is not None else None,
            trio.current_time() - self._since if live is not None else None,
            self.machine.state,
            self.committed,
            self.aborted,
            self.refused,
        )

    # the one task that drives the machine

    async def run(self) -> None:
        """Drive the machine until `end`, or until cancelled; the slots rest and all keys are wiped then."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    look = trio.current_time()
                    while True:
                        with trio.move_on_at(look):
                            await self._step(await self._events.receive())
                        if trio.current_time() >= look:
                            await self._step(self._look)
                            look = trio.current_time() + RESEND_SECONDS
        finally:
            self.machine.forget()
            self._over.set()

    async def _step(self, event: Callable[[], list[Action]]) -> None:
        with trio.CancelScope(shield=True):  # an action half done would leave machine and interfaces apart
            try:
                actions = event()
            except Refused as problem:
                self._refuse(problem)
                actions = [problem.answer] if isinstance(problem, RefusedWithAnswer) else []
            try:
                await self._perform(actions)
            except TunnelError:
                if not self._scope.cancel_called:  # else the interfaces go down under this step
                    raise
        now, machine = trio.current_time(), self.machine
        if not machine.busy or machine.in_doubt:
            self._busy = None
        elif self._busy is None or self._busy[0] != machine.seen:
            self._busy = machine.seen, now + ROTATION_SECONDS
        self.note()

    def _refuse(self, problem: Refused) -> None:
        self.refused += 1
        self.say(self.peer, "refused", None)
        now = trio.current_time()
        if now - self._refusal_logged >= REFUSALS_LOGGED_SECONDS:  # a peer may send as many as it likes
            self._refusal_logged = now
            log.warning(
                "rotation message refused",
                peer=self.peer,
                step=problem.step,
                item=problem.item,
                why=str(problem),
            )

    def _look(self) -> list[Action]:
        """What time has brought about."""
        now, machine = trio.current_time(), self.machine
        if self.bootstrap_up(self.peer) and now - self._pinged >= PING_SECONDS:
            self._pinged = now
            self.send(self.peer, PING)
        if self._busy is not None and now >= self._busy[1]:
            return machine.expire()
        if machine.busy or machine.draining or not machine.confirmed:
            return machine.resend()
        if now < self._due or not self.bootstrap_up(self.peer):
            return []
        if machine.live is not None and now < self._scheduled() and not self._lost():
            return machine.resend() if machine.wanted else []
        self._delay()
        return machine.want()

    def _scheduled(self) -> float:
        return self._since + self.seconds * (1.0 if self.machine.leads else FOLLOWER_SHARE)

    def _lost(self) -> bool:
        """Whether the generation in use is dead although the peer is there: it has restarted."""
        watch = self.watch()
        return watch is not None and watch.state(trio.current_time(), time.time()) is PeerState.DOWN

    def _delay(self) -> None:
        self._due = trio.current_time() + self._backoff
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)

    def _post(self, event: Callable[[], list[Action]]) -> None:
        with suppress(trio.WouldBlock):  # lost, like any datagram
            self._inbox.send_nowait(event)

    # actions

    async def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Record(epoch):
                    try:
                        await self.record.put(self.peer, epoch)
                    except OSError as problem:
                        log.error("the tunnel epoch cannot be recorded; not rotating", why=str(problem))
                        self._delay()
                        given_up = self.machine.expire()
                        await self._perform([each for each in given_up if not isinstance(each, Send)])
                        return
                case Send(data):
                    # A follower's datagram must not start a handshake on the bootstrap interface: the leader
                    # does, and two that cross cost five seconds.
                    if self.machine.leads or self.bootstrap_up(self.peer):
                        self.send(self.peer, data)
                case Raise(generation, speak):
                    assert generation.slot not in self._lives
                    life = self._lives[generation.slot] = _Life(generation)
                    self._nursery.start_soon(self._live, life, speak)
                case Route(generation):
                    await self._route(generation)
                case Drain(generation):
                    life = self._lives[generation.slot]
                    if life.nursery is not None:
                        life.nursery.start_soon(self._drain, life)
                case Drop(generation):
                    await self._drop(generation)
                case Say(what, epoch):
                    self._said(what, epoch)

    def _said(self, what: str, epoch: int) -> None:
        if what == "committed":
            self.committed += 1
            self._since, self._backoff, self._due = trio.current_time(), FIRST_BACKOFF, 0.0
        elif what == "aborted":
            self.aborted += 1
        log.info("rotation " + what, peer=self.peer, epoch=epoch)
        if what == "aborted" and self.machine.live is None:
            log.warning(
                "no generation of keys with this peer yet, so nothing passes; does it rotate as well, are "
                "its UDP ports after the first open, and does the path carry packets of the tunnel's MTU?",
                peer=self.peer,
            )
        self.say(self.peer, what, epoch)

    async def _route(self, generation: Generation) -> None:
        device = self.slots[generation.slot]
        for network in self.allowed:
            await device.route(network, self.address, LIVE_METRIC)
        self._lives[generation.slot].echo.cancel()  # both ends have proved it

    async def _drop(self, generation: Generation) -> None:
        life = self._lives.get(generation.slot)
        if life is None or life.generation is not generation:  # never raised
            generation.wipe()
            return
        life.scope.cancel()
        await life.over.wait()
        del self._lives[generation.slot]

    # one generation

    async def _live(self, life: _Life, speak: bool) -> None:
        """Raise the interface, prove it, keep it until dropped."""
        generation, device = life.generation, self.slots[life.generation.slot]
        try:
            with life.scope:
                try:
                    await device.wake()
                    life.interface = self._interface(generation, device, speak)
                    await life.interface.set_up()
                    await device.accept_from_other_routes()
                    async with trio.open_nursery() as life.nursery:
                        inside = _Inside(device.name, control_address(self.machine.index), self.mtu)
                        await life.nursery.start(self._echo, life, inside)
                        life.nursery.start_soon(life.interface.live)
                        life.nursery.start_soon(self._prove, life, inside)
                        life.nursery.start_soon(
                            ping, inside, CONTROL_PORT, partial(self._pinged_at, life), life.faded
                        )
                        self._post_surely(lambda: self.machine.raised(generation))
                except* (WgError, OSError) as problems:
                    machine = self.machine
                    if generation is machine.live or (generation is machine.candidate and machine.in_doubt):
                        raise  # it is in use, or may be at the other end
                    why = "; ".join(map(str, problems.exceptions))
                    log.warning("generation failed", peer=self.peer, epoch=generation.epoch, why=why)
                    self._post_surely(lambda: machine.failed(generation))
                    self._post_surely(lambda: machine.drained(generation))
        finally:
            with trio.CancelScope(shield=True):
                if life.interface is not None:
                    self._traffic[0] += life.interface.watches[self.peer].rx
                    self._traffic[1] += life.interface.watches[self.peer].tx
                    self.restarts += life.interface.restarts
                    life.interface = None
                try:
                    await device.rest()
                finally:
                    generation.wipe()
                    life.over.set()

    def _interface(self, generation: Generation, device: Device, speak: bool) -> Interface:
        offset = generation.peer_offset
        places = [] if offset is None else [(host, port + offset) for host, port in self.places()]
        control = control_address(self.machine.index)
        peer_control = ip_network(f"{control_address(self.peer)}/32")
        entry = Entry(
            self.peer,
            generation.peer_key,
            tuple(place for place in places if place[1] <= MAX_PORT),
            (*self.allowed, peer_control),
            speak,
            generation.preshared,
        )
        return Interface(
            device,
            generation.private,
            self.base_port + self.machine.offsets[generation.slot],
            self.mtu,
            # To an interface without an address the reverse-path filter is strict even where it is loose.
            (control,),
            (Way(peer_control, control, STAGING_METRIC),),
            {self.peer: entry},
            self.note,
        )

    async def _echo(
        self, life: _Life, inside: _Inside, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with life.echo:
            async with trio.open_nursery() as nursery:
                await nursery.start(answer_probes, inside, CONTROL_PORT)
                task_status.started()

    async def _prove(self, life: _Life, inside: _Inside) -> None:
        """A handshake seen here, and a bulk transfer there and back, which a wrong MTU would not let pass."""
        assert life.interface is not None
        watch = life.interface.watches[self.peer]
        while watch.silent(trio.current_time()) is None:
            await trio.sleep(PROVE_AGAIN_SECONDS / 5)
        while True:
            try:
                await probe(inside, control_address(self.peer), CONTROL_PORT)
                break
            except TunnelError as problem:  # the peer may not listen yet; the deadline is the rotation's
                log.debug("not proved yet", peer=self.peer, why=str(problem))
                await trio.sleep(PROVE_AGAIN_SECONDS)
        self._post_surely(lambda: self.machine.proved(life.generation))

    def _pinged_at(self, life: _Life) -> dict[str, PeerWatch]:
        return {str(control_address(self.peer)): life.interface.watches[self.peer]} if life.interface else {}

    async def _drain(self, life: _Life) -> None:
        """Until nothing has arrived for a while."""
        assert life.interface is not None
        with suppress(DeviceLost):  # nothing arrives then
            await life.interface.fade()
        watch = life.interface.watches[self.peer]
        heard, since = watch.rx, trio.current_time()
        with trio.move_on_after(DRAIN_LIMIT):
            while trio.current_time() - since < DRAIN_SECONDS:
                await trio.sleep(RESEND_SECONDS)
                if watch.rx != heard:
                    heard, since = watch.rx, trio.current_time()
        self._post_surely(lambda: self.machine.drained(life.generation))

    def _post_surely(self, event: Callable[[], list[Action]]) -> None:
        """What must not be lost, unlike a datagram: waits for room if there is none."""
        try:
            self._inbox.send_nowait(event)
        except trio.WouldBlock:
            self._nursery.start_soon(self._inbox.send, event)


class Control:
    """The messages of rotation: datagrams between link-local addresses on the bootstrap interface."""

    def __init__(self, interface: str, index: int) -> None:
        self._bare = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._bare.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(self._bare)
        self._interface, self._index = interface, index
        self._pairs: dict[str, Pair] = {}

    async def open(self) -> None:
        self._bare.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._interface.encode() + b"\0")
        await self._socket.bind((str(control_address(self._index)), CONTROL_PORT))

    def close(self) -> None:
        self._socket.close()

    def serve(self, pair: Pair) -> None:
        self._pairs[str(control_address(pair.peer))] = pair

    def dismiss(self, pair: Pair) -> None:
        self._pairs.pop(str(control_address(pair.peer)), None)

    def send(self, peer: int, data: bytes) -> None:
        """Now or never: what is lost is said again."""
        with suppress(OSError):
            self._bare.sendto(data, (str(control_address(peer)), CONTROL_PORT))

    async def listen(self) -> None:
        while True:
            try:
                data, address = await self._socket.recvfrom(MAX_MESSAGE + 1)
            except OSError as problem:  # an ICMP error of an earlier datagram
                log.debug("rotation messages", why=str(problem))
                continue
            if (pair := self._pairs.get(address[0])) is not None:
                pair.hear(data)
