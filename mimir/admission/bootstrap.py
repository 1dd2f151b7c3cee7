"""Admission at work: connects to the peers, has evidence made and judged, and keeps the gate.

Peers meet over TCP outside the tunnel, where nothing secret passes (`mimir.admission.exchange` has the
messages and the rules). Whoever needs an exchange calls: to get in, to renew at two thirds of a verdict's
life, for another policy, or because the tunnel does not come up. A stranger gets a few connections for a
moment, of which the oldest of a crowd is closed for the next; no evidence is made or judged for him, and
nothing that he says is remembered.

The gate is what an admitted peer passes: tunnel, links, sessions. A verdict that ends without a successor,
evidence that is refused, a revocation and a policy that no longer wants a peer all close it at once.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio
from prometheus_client import Counter, Enum, Gauge

from mimir.admission import certificates
from mimir.admission.exchange import (
    CLOCK_SKEW,
    ENDED,
    MAX_VERDICT,
    REFUSED,
    Action,
    Admit,
    Attest,
    Drop,
    Exchange,
    Expel,
    Kind,
    Over,
    Own,
    Pair,
    Refusal,
    Send,
    Standing,
    limit_of,
    peek,
)
from mimir.admission.revocation import Revocations, enforce
from mimir.admission.tls import Clock, PartyTls, utc_now
from mimir.attest import appraisal, policy
from mimir.attest.appraisal import REAL, Anchors, Verdict
from mimir.attest.collateral import INDEX, Collateral, Store
from mimir.attest.evidence import MAX_LIFE, SIMULATED, Claims, Envelope, identity_hash
from mimir.attest.policy import Policy
from mimir.attest.trail import Trail, stamp
from mimir.attesters import Attester
from mimir.config import Address
from mimir.errors import AttestationError, BadInput, EnvironmentMissing, MimirError
from mimir.hpke import HpkeKey
from mimir.net.identity import Identity
from mimir.secret import PresharedKey

EXCHANGE_SECONDS = 60.0  # from PROOF to the end; a TPM takes a second or two for a quote
CONNECT_SECONDS = 5.0
TICK_SECONDS = 0.5  # between two looks at ends of verdicts and at the tunnel
BURST, BURST_SECONDS = 3, 3.0  # so many pieces of evidence are made for one peer in such a time
YIELD_SECONDS = 0.3  # how much longer the follower waits before it calls, so that calls seldom cross
FIRST_BACKOFF, MAX_BACKOFF = 0.2, 15.0
UP_SECONDS, MAX_UP_SECONDS = 20.0, 300.0  # for the tunnel of an admitted peer to come up; doubles each time
CLOSE_SECONDS = 2.0  # for the peer to take our last word
RESOLVE_SECONDS = 3.0
WATCH_SECONDS = 2.0  # between two looks at the files of policy and collateral
MAX_STRANGERS = 32  # connections that have not proved anything, at once
MAX_PER_ADDRESS = 6
MAX_SHOWN = 4  # pieces of own evidence remembered for each peer
POLICY_RECORD = "policy.seen"  # in data_dir: the highest version that was in force
_LENGTH = 4  # bytes before each message

STATES = ("unknown", "exchanging", "admitted", "refused", "expelled", "expired")
STATE = Enum("mimir_admission_state", "How the admission of a peer stands", ["party"], states=STATES)
ATTEMPTS = Counter("mimir_admission_exchanges_total", "Exchanges whose other end proved itself", ["party"])
REFUSALS = Counter("mimir_admission_refusals_total", "Refusals, by step and by whom", ["party", "by", "step"])
STRANGERS = Counter("mimir_admission_strangers_total", "Connections that ended without proof of a peer")
UNTIL = Gauge("mimir_admission_valid_until_seconds", "End of the verdict on a peer, since 1970", ["party"])
ADMISSION_SECONDS = Gauge("mimir_admission_seconds", "Of the last exchange that admitted, in all", ["party"])
APPRAISAL_SECONDS = Gauge("mimir_appraisal_seconds", "Of the last appraisal of evidence", ["party"])

log = structlog.get_logger("mimir.admission")


class Gate(Protocol):
    """What an admitted peer passes."""

    async def admit(
        self, party: int, tunnel_key: bytes, preshared: PresharedKey, endpoint: Address | None
    ) -> None:
        """Let a peer in under these keys, or replace those it has. `preshared` is the caller's to wipe.
        `endpoint` is where its tunnel is, if not where the configuration says. Raises `GateError`."""
        ...

    async def expel(self, party: int, why: str) -> None:
        """Take tunnel, links and sessions away from a peer, whether it has them or not."""
        ...

    def up(self, party: int) -> bool:
        """Whether the tunnel carries."""
        ...


class GateError(MimirError):
    """The gate could not let a peer in, though it may."""

    exit_code = 9


@dataclass(frozen=True)
class Place:
    """A peer as the configuration names it."""

    party: int
    name: str
    identity: bytes
    admission: Address
    tunnel_port: int  # UDP; of its tunnel endpoint


# --- the policy in force -----------------------------------------------------------------------------------


class PolicyFile:
    """The policy that owners signed, as far as this party has seen: its version never goes back."""

    def __init__(self, path: Path, owners: Sequence[str], threshold: int, record: Path) -> None:
        """Reads it; raises as `load`."""
        self._path, self._owners, self._threshold, self._record = path, tuple(owners), threshold, record
        self.policy: Policy
        self.digest = b""
        self._stamp: Any = None
        self.load()

    def load(self) -> bool:
        """Read again; whether another policy is in force now. Raises `BadInput` or `AttestationError` for one
        that may not be, and the old one stays."""
        self._stamp = self._look()
        found = policy.load(self._path)
        signatures = policy.load_signatures(self._path.with_name(self._path.name + policy.SIGNATURE_SUFFIX))
        policy.check_signatures(found, signatures, self._owners, self._threshold)
        digest = found.digest()
        seen, of = self._seen()
        policy.check_version(found, seen)
        Trail("policy").require(
            found.version > seen or of in ("", digest.hex()),
            "version",
            f"a higher version than {seen} for another policy",
            found.version,
        )
        if (seen, of) != (found.version, digest.hex()):
            self._remember(found.version, digest.hex())
        changed = digest != self.digest
        self.policy, self.digest = found, digest
        return changed

    def changed(self) -> bool:
        """Whether the files are not those that were read last."""
        return self._look() != self._stamp

    def _look(self) -> Any:
        out: list[tuple[int, int, int] | None] = []
        for name in (self._path.name, self._path.name + policy.SIGNATURE_SUFFIX):
            try:
                found = os.stat(self._path.with_name(name))
                out.append((found.st_ino, found.st_size, found.st_mtime_ns))
            except OSError:
                out.append(None)
        return out

    def _seen(self) -> tuple[int, str]:
        try:
            found = json.loads(self._record.read_text())
            version, digest = found["version"], found["digest"]
            if type(version) is not int or not isinstance(digest, str):
                raise ValueError
            return version, digest
        except FileNotFoundError:
            return 0, ""
        except OSError as error:
            raise BadInput(f"{self._record}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise BadInput(
                f"{self._record}: does not say which policy was seen last; write "
                '{"version": N, "digest": ""} there, with the highest version that was ever in force'
            ) from None

    def _remember(self, version: int, digest: str) -> None:
        draft = self._record.with_name(self._record.name + ".new")
        try:
            self._record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(draft, "w") as file:
                json.dump({"version": version, "digest": digest}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self._record)
        except OSError as error:
            raise EnvironmentMissing(f"{self._record}: cannot be written: {error.strerror}") from None


# --- connections -------------------------------------------------------------------------------------------


class _LineError(MimirError):
    """The connection is of no use any more."""


class _Line:
    """One connection: messages with their length before them."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.nursery: trio.Nursery
        self._held = bytearray()
        self._sending = trio.Lock()

    async def send(self, data: bytes) -> None:
        async with self._sending:
            await self.stream.send_all(len(data).to_bytes(_LENGTH, "big") + data)

    async def receive(self, limit: int) -> bytes:
        """The next message; nothing is kept for one that is longer."""
        size = int.from_bytes(await self._take(_LENGTH), "big")
        if not 0 < size <= limit:
            raise _LineError(f"a message of {size} bytes, where {limit} is the limit")
        return await self._take(size)

    async def _take(self, size: int) -> bytes:
        while len(self._held) < size:
            piece = await self.stream.receive_some(min(65536, size - len(self._held)))
            if not piece:
                raise _LineError("the other end hung up")
            self._held += piece
        out = bytes(self._held[:size])
        del self._held[:size]
        return out

    async def say_goodbye(self) -> None:
        """Close so that the other end gets what we said last: a plain close may take it away again."""
        with trio.move_on_after(CLOSE_SECONDS), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.stream.send_eof()
            left = limit_of(Kind.EVIDENCE) + _LENGTH
            while left > 0 and (piece := await self.stream.receive_some(65536)):
                left -= len(piece)


class _Strangers:
    """Connections that have proved nothing yet. When there are too many, the oldest one of the most crowded
    address goes; addresses of peers keep theirs."""

    def __init__(self) -> None:
        self._held: list[tuple[str, bool, trio.CancelScope]] = []

    @contextmanager
    def one(self, address: str, known: bool) -> Iterator[Callable[[], None]]:
        """Give one of them room. It is cancelled if the room is taken; the callable gives it back early."""
        with trio.CancelScope() as scope:
            entry = (address, known, scope)
            self._make_room(address)
            self._held.append(entry)

            def proved() -> None:
                if entry in self._held:
                    self._held.remove(entry)

            try:
                yield proved
            finally:
                proved()

    def _make_room(self, address: str) -> None:
        here = [each for each in self._held if each[0] == address]
        if len(here) >= MAX_PER_ADDRESS:
            self._evict(here[0])
        elif len(self._held) >= MAX_STRANGERS:
            crowd = [each for each in self._held if not each[1]] or self._held
            counts = {name: sum(each[0] == name for each in crowd) for name, _, _ in crowd}
            self._evict(max(crowd, key=lambda each: counts[each[0]]))

    def _evict(self, entry: tuple[str, bool, trio.CancelScope]) -> None:
        self._held.remove(entry)
        entry[2].cancel()


def _plain(address: str) -> str:
    """An address in one form."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)


# --- the peers ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Peer:
    """A peer, and what is remembered of it for people."""

    place: Place
    pair: Pair
    lines: dict[Exchange, trio.CancelScope] = field(default_factory=dict)
    gate: trio.Lock = field(default_factory=trio.Lock)  # changes of the gate take turns
    state: str = "unknown"
    since: float = field(default_factory=trio.current_time)
    attempts: int = 0
    refusal: tuple[Refusal, str] | None = None  # and by whom
    problem: str = ""  # why it could not be reached, once a reason in the log
    shown: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_SHOWN))  # newest first
    ends: float = 0.0  # of the verdict, by the clock that nobody sets
    seconds: float | None = None  # of the exchange that admitted it
    appraisal: float = 0.0  # of its evidence
    attested: deque[float] = field(default_factory=lambda: deque(maxlen=BURST))
    down: float | None = None
    patience: float = field(default_factory=lambda: UP_SECONDS)
    call_at: float = 0.0
    backoff: float = field(default_factory=lambda: FIRST_BACKOFF)
    addresses: frozenset[str] = frozenset()  # of its configured host
    change: trio.Event = field(default_factory=trio.Event)

    @property
    def party(self) -> int:
        return self.place.party

    def now_is(self, state: str) -> None:
        if state != self.state:
            self.state, self.since = state, trio.current_time()
            STATE.labels(self.party).state(state)

    def wake(self) -> None:
        self.change.set()
        self.change = trio.Event()


class Admission:
    """Admits peers and expels them. `run` does so until it is cancelled; the rest may be asked meanwhile."""

    def __init__(
        self,
        *,
        party: int,
        identity: Identity,
        peers: Sequence[Place],
        config_digest: bytes,
        tunnel_key: bytes,
        attester: Attester,
        policy_file: PolicyFile,
        gate: Gate,
        collateral: Path | None = None,
        revocations: Revocations | None = None,
        tls: PartyTls | None = None,
        anchors: Anchors = REAL,
        handshake_seconds: float = 10.0,
        clock: Clock = utc_now,
    ) -> None:
        self.party = party
        self._identity, self._config, self._attester, self._gate = identity, config_digest, attester, gate
        self._policy_file, self._revocations, self._tls = policy_file, revocations, tls
        self._store = Store(collateral) if collateral is not None else None
        self._collateral = self._read_collateral()
        self._anchors, self._handshake, self._clock = anchors, handshake_seconds, clock
        self.kem = HpkeKey()
        self.own = Own(
            party,
            identity.public,
            identity.sign,
            tunnel_key,
            self.kem,
            tls.key.public if tls is not None else None,
        )
        self._peers = {
            each.party: _Peer(each, Pair(self.own, each.party, each.identity, _Judge(self, each.party)))
            for each in peers
        }
        self._strangers = _Strangers()
        self._reload = trio.Event()
        self._jitter = random.Random()  # spreads calls in time; guards nothing
        for number in self._peers:
            STATE.labels(number).state("unknown")

    # what others ask

    def admitted(self, party: int) -> Verdict | None:
        """On what a peer's admission rests, if it is admitted now."""
        standing = self._standing(party)
        return standing.verdict if standing is not None else None

    def certificates(self, party: int) -> list[str]:
        """SHA-256 (hex) of the certificate that we gave this peer, while it lasts."""
        standing = self._standing(party)
        if standing is None or not standing.issued:
            return []
        return [hashlib.sha256(standing.issued).hexdigest()]

    async def expel(self, party: int, why: str) -> None:
        """Close the gate to a peer. It may ask to be admitted again, and is if its evidence is good."""
        peer = self._peers[party]
        await self._perform(peer, None, None, peer.pair.expel(why))

    async def evidence_for(self, nonce: bytes, nonce_source: str, channel: bytes, role: str) -> bytes:
        """Own evidence, in its envelope, for a nonce that somebody else gave out."""
        now = self._clock()
        first = int((now - CLOCK_SKEW).timestamp())
        claims = Claims(
            role=role,
            node=f"party{self.party}",
            identity=identity_hash(self._identity.public),
            tunnel=self.own.tunnel,
            kem=self.kem.digest,
            nonce=nonce,
            nonce_source=nonce_source,
            not_before=first,
            not_after=first + int(min(self._life() + 2 * CLOCK_SKEW, MAX_LIFE).total_seconds()),
            policy=self._policy_file.digest,
            channel=channel,
            config=self._config,
        )
        return (await self._attester.attest(claims)).encode()

    def statement(self) -> dict[str, Any]:
        """What clients compare with the evidence: our keys, what we showed to whom, who vouches for us."""
        held = [
            (number, standing.ours)
            for number in sorted(self._peers)
            if (standing := self._standing(number)) is not None and standing.ours
        ]
        return {
            "tunnel": self.own.tunnel,
            "kem": self.kem.public,
            "shown": [
                {"party": number, "evidence": list(peer.shown)}
                for number, peer in sorted(self._peers.items())
            ],
            "certificates": [{"issuer": number, "certificate": der} for number, der in held],
        }

    def view(self) -> dict[str, Any]:
        """How it stands, in plain values."""
        wanted = self._policy_file.policy
        return {
            "mode": "required",
            "policy": {
                "name": wanted.name,
                "version": wanted.version,
                "digest": self._policy_file.digest.hex(),
            },
            "kind": self._attester.kind,
            "simulated": self._attester.kind in SIMULATED,
            "peers": [self._view_of(peer) for _, peer in sorted(self._peers.items())],
            "revocation_epoch": self._revocations.epoch if self._revocations is not None else 0,
        }

    def _view_of(self, peer: _Peer) -> dict[str, Any]:
        standing = self._standing(peer.party)
        verdict = standing.verdict if standing is not None else None
        refusal = None
        if peer.refusal is not None:
            refusal = vars(peer.refusal[0]) | {"by": peer.refusal[1]}
        return {
            "party": peer.party,
            "state": peer.state,
            "entry": verdict.entry if verdict else None,
            "kind": verdict.kind if verdict else None,
            "simulated": verdict.simulated if verdict else None,
            "valid_until": stamp(standing.until) if standing else None,
            "evidence": verdict.evidence if verdict else None,
            "tunnel_key": standing.tunnel.hex() if standing else None,
            "attempts": peer.attempts,
            "refusal": refusal,
            "seconds": trio.current_time() - peer.since,
        }

    def status(self) -> dict[str, Any]:
        """`view`, and of each peer its whole verdict and how long its admission took."""
        view = self.view()
        for each in view["peers"]:
            peer = self._peers[each["party"]]
            standing = self._standing(peer.party)
            each |= {
                "verdict": standing.verdict.public() if standing else None,
                "admission_seconds": peer.seconds,
                "appraisal_seconds": peer.appraisal,
                "certificate": hashlib.sha256(standing.issued).hexdigest()
                if standing and standing.issued
                else None,
                "problem": peer.problem or None,
            }
        return view

    def reload(self) -> None:
        """Read policy and collateral again soon."""
        self._reload.set()

    async def wait_admitted(self) -> None:
        """Return when all peers are admitted."""
        for peer in self._peers.values():
            while peer.state != "admitted":
                await peer.change.wait()

    def _standing(self, party: int) -> Standing | None:
        """What holds at this moment: the end of a verdict is not waited for."""
        peer = self._peers.get(party)
        standing = peer.pair.standing if peer is not None else None
        if peer is None or standing is None or self._over(peer, standing):
            return None
        return standing

    def _over(self, peer: _Peer, standing: Standing) -> bool:
        return self._clock() >= standing.until or trio.current_time() >= peer.ends

    def _life(self) -> timedelta:
        return min(timedelta(seconds=self._policy_file.policy.freshness.reattest_s), MAX_VERDICT)

    # work

    async def check_own(self) -> str:
        """Have evidence made, and judge it as a peer with our policy would: the entry that it satisfies.
        Raises `AttestationError` with the step that would keep us out."""
        nonce = os.urandom(32)
        raw = await self.evidence_for(nonce, "itself", nonce, "party")
        carried = Claims.decode(Envelope.decode(raw).claims, Trail("claims"))
        return self._appraise(raw, carried, self._clock()).entry

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Admit and expel until cancelled."""
        identities = {number: peer.place.identity.hex() for number, peer in self._peers.items()}
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._listen, listener, nursery)
            for peer in self._peers.values():
                nursery.start_soon(self._keep_time, peer)
                nursery.start_soon(self._call, peer)
            nursery.start_soon(self._watch_files)
            if self._revocations is not None:
                nursery.start_soon(enforce, self._revocations, self, identities)
            task_status.started()

    async def _listen(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:  # out of file descriptors, or the caller hung up: the next may do better
                log.warning("accept failed", why=error.strerror)
                await trio.sleep(TICK_SECONDS)
                continue
            nursery.start_soon(self._answer, stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        """Whoever calls: a peer, or a stranger until it has proved to be one."""
        try:
            address = _plain(stream.socket.getpeername()[0])
        except OSError:  # gone already
            await trio.aclose_forcefully(stream)
            return
        known = any(address in peer.addresses for peer in self._peers.values())
        line = _Line(stream)
        try:
            with self._strangers.one(address, known) as proved:
                with trio.fail_after(self._handshake):
                    first = await line.receive(limit_of(Kind.HELLO))
                sender, receiver = peek(first)
                peer = self._peers.get(sender)
                if peer is None or receiver != self.party:
                    raise _LineError(f"a message from {sender} to {receiver}, and we are {self.party}")
                await self._converse(peer, peer.pair.open(False), line, first, address, proved)
        except (trio.TooSlowError, AttestationError, _LineError, OSError, trio.BrokenResourceError) as error:
            STRANGERS.inc()
            log.debug("a stranger hung up, or was hung up on", address=address, why=str(error))
        finally:
            await trio.aclose_forcefully(stream)

    async def _call(self, peer: _Peer) -> None:
        """Call a peer whenever an exchange with it is due."""
        while True:
            wait = peer.call_at - trio.current_time()
            if wait > 0 or not self._wants_exchange(peer):
                await self._pause(peer, max(wait, TICK_SECONDS))
                continue
            if not peer.pair.leads:
                await trio.sleep(YIELD_SECONDS)
                if not self._wants_exchange(peer):
                    continue
            await self._call_once(peer)
            if self._wants_exchange(peer):
                peer.call_at = trio.current_time() + peer.backoff * self._jitter.uniform(0.5, 1.0)
                peer.backoff = min(2 * peer.backoff, MAX_BACKOFF)
            else:
                peer.backoff = FIRST_BACKOFF

    def _wants_exchange(self, peer: _Peer) -> bool:
        return peer.pair.current is None and peer.pair.due(self._clock())

    async def _pause(self, peer: _Peer, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await peer.change.wait()

    async def _call_once(self, peer: _Peer) -> None:
        address = peer.place.admission
        try:
            peer.addresses = await self._addresses_of(address.host)
            with trio.fail_after(CONNECT_SECONDS):
                stream = await trio.open_tcp_stream(address.host, address.port)
        except (OSError, trio.TooSlowError) as error:
            self._complain(peer, f"cannot reach {address}: {error or 'no answer in time'}")
            return
        try:
            await self._converse(peer, peer.pair.open(True), _Line(stream), None, None, lambda: None)
        finally:
            await trio.aclose_forcefully(stream)

    def _complain(self, peer: _Peer, why: str) -> None:
        if why != peer.problem:  # once a reason, not once a call
            log.warning("no exchange with a peer", party=peer.party, why=why)
        peer.problem = why

    async def _converse(
        self,
        peer: _Peer,
        exchange: Exchange,
        line: _Line,
        first: bytes | None,
        address: str | None,
        proved: Callable[[], None],
    ) -> None:
        """One connection to its end. `address`: where the peer called from, if it did."""
        began, was_proved = trio.current_time(), False
        try:
            async with trio.open_nursery() as line.nursery:
                scope = line.nursery.cancel_scope
                peer.lines[exchange] = scope
                scope.deadline = began + self._handshake
                actions = exchange.start() if first is None else exchange.receive(first, self._clock())
                while True:
                    if exchange.proved and not was_proved:
                        was_proved = True
                        proved()
                        scope.deadline = trio.current_time() + EXCHANGE_SECONDS
                        peer.attempts += 1
                        ATTEMPTS.labels(peer.party).inc()
                        if peer.pair.standing is None:
                            peer.now_is("exchanging")
                    await self._perform(peer, exchange, line, actions, address, began)
                    if exchange.over:
                        break
                    data = await line.receive(exchange.limit)
                    actions = exchange.receive(data, self._clock())
                scope.cancel()
            if not exchange.over:  # cancelled by the deadline
                why = "the exchange was not over in time" if was_proved else "no proof in time"
                self._lost(peer, _LineError(why), was_proved or address is None)
        except BaseExceptionGroup as group:
            self._lost(peer, group, was_proved or address is None)
        finally:
            heard = exchange.over
            exchange.close()
            peer.lines.pop(exchange, None)
            if peer.state == "exchanging" and peer.pair.current is None:
                peer.now_is("unknown")
            peer.wake()
        if heard:
            await line.say_goodbye()

    def _lost(self, peer: _Peer, error: BaseException, concerns_peer: bool) -> None:
        """A connection broke off: what the network or the other end did is told if it can have been the peer;
        an error of ours is told as well, and ends nothing else."""
        if isinstance(error, BaseExceptionGroup):
            _, rest = error.split(Exception)
            if rest is not None:
                raise rest
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
        ordinary = (MimirError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)
        if not isinstance(error, ordinary):
            log.error("an exchange failed by an error of ours", party=peer.party, exc_info=error)
        elif concerns_peer:
            self._complain(peer, str(error) or "the connection broke")
        else:
            STRANGERS.inc()

    async def _perform(
        self,
        peer: _Peer,
        exchange: Exchange | None,
        line: _Line | None,
        actions: Sequence[Action],
        address: str | None = None,
        began: float = 0.0,
    ) -> None:
        for action in actions:
            match action:
                case Send(data):
                    assert line is not None
                    await line.send(data)
                case Attest(claims):
                    assert line is not None and exchange is not None
                    line.nursery.start_soon(self._attest, peer, exchange, line, claims, address, began)
                case Admit(standing, preshared):
                    await self._admit(peer, standing, preshared, address, began)
                case Expel(why):
                    await self._expel(peer, why)
                case Drop(other):
                    if other in peer.lines:
                        peer.lines[other].cancel()
                case Over(refusal, by):
                    self._over_with(peer, refusal, by, called=address is None)

    async def _attest(
        self,
        peer: _Peer,
        exchange: Exchange,
        line: _Line,
        claims: Claims,
        address: str | None,
        began: float,
    ) -> None:
        if len(peer.attested) == BURST:
            await trio.sleep_until(peer.attested[0] + BURST_SECONDS)
        peer.attested.append(trio.current_time())
        envelope = await self._attester.attest(claims)
        peer.shown.appendleft(hashlib.sha256(envelope.encode()).hexdigest())
        await self._perform(peer, exchange, line, exchange.attested(envelope, self._clock()), address, began)
        if exchange.over:
            line.nursery.cancel_scope.cancel()

    async def _admit(
        self,
        peer: _Peer,
        standing: Standing,
        preshared: PresharedKey | None,
        address: str | None,
        began: float,
    ) -> None:
        now = trio.current_time()
        peer.ends = now + (standing.until - self._clock()).total_seconds()
        if preshared is not None:
            # The pair says that the peer is in: the gate must follow, whatever becomes of the connection.
            with preshared, trio.CancelScope(shield=True):
                async with peer.gate:
                    if peer.pair.standing is standing:  # else expelled while this waited for its turn
                        await self._open_gate(peer, standing, preshared, address)
            peer.down = None
        if peer.pair.standing is not standing:
            return
        verdict = standing.verdict
        peer.now_is("admitted")
        peer.refusal, peer.problem, peer.seconds = None, "", trio.current_time() - began
        ADMISSION_SECONDS.labels(peer.party).set(peer.seconds)
        UNTIL.labels(peer.party).set(standing.until.timestamp())
        if self._tls is not None and standing.ours:
            try:
                self._tls.install(standing.ours)
            except AttestationError as error:
                log.warning("a peer's certificate for us does not hold", party=peer.party, why=str(error))
        log.info(
            "admitted" if preshared is not None else "admission renewed",
            party=peer.party,
            kind=verdict.kind,
            entry=verdict.entry,
            until=stamp(standing.until),
            seconds=round(peer.seconds, 3),
            appraisal_seconds=round(peer.appraisal, 4),
            evidence=verdict.evidence[:16],
            **({"SIMULATED": "proves nothing of the machine"} if verdict.simulated else {}),
            **({"cautions": verdict.cautions} if verdict.cautions else {}),
        )
        peer.wake()

    async def _open_gate(
        self, peer: _Peer, standing: Standing, preshared: PresharedKey, address: str | None
    ) -> None:
        try:
            endpoint = await self._endpoint(peer, address)
            await self._gate.admit(peer.party, standing.tunnel, preshared, endpoint)
        except GateError as error:
            peer.pair.expel(str(error))
            peer.now_is("expelled")
            await self._gate.expel(peer.party, str(error))
            raise

    async def _endpoint(self, peer: _Peer, address: str | None) -> Address | None:
        """Where the tunnel of a peer is that called from elsewhere than its configured host: it has moved."""
        if address is None:
            return None
        with suppress(OSError):
            peer.addresses = await self._addresses_of(peer.place.admission.host)
        if address in peer.addresses:
            return None
        log.info("peer has moved", party=peer.party, address=address)
        return Address(address, peer.place.tunnel_port)

    async def _addresses_of(self, host: str) -> frozenset[str]:
        with trio.move_on_after(RESOLVE_SECONDS):
            found = await trio.socket.getaddrinfo(host, None, type=trio.socket.SOCK_STREAM)
            return frozenset(_plain(str(each[4][0])) for each in found)
        raise OSError(f"{host}: no answer from the resolver")

    async def _expel(self, peer: _Peer, why: str) -> None:
        peer.now_is("expired" if why == ENDED else "refused" if why.startswith(REFUSED) else "expelled")
        UNTIL.labels(peer.party).set(0)
        log.warning("peer expelled", party=peer.party, why=why)
        with trio.CancelScope(shield=True):
            async with peer.gate:
                await self._gate.expel(peer.party, why)
        peer.wake()

    def _over_with(self, peer: _Peer, refusal: Refusal | None, by: str, called: bool) -> None:
        if refusal is None:
            return
        facts = {"step": refusal.step, "expected": refusal.expected, "got": refusal.got}
        if by == "stranger":
            STRANGERS.inc()
            if called:
                self._complain(peer, f"who answers did not prove to be this peer: {refusal}")
            return
        REFUSALS.labels(peer.party, by, refusal.step).inc()
        if peer.refusal != (refusal, by):
            log.warning("peer refused" if by == "us" else "refused by the peer", party=peer.party, **facts)
        peer.refusal, peer.problem = (refusal, by), ""
        if peer.pair.standing is None:
            peer.now_is("refused")

    async def _keep_time(self, peer: _Peer) -> None:
        """Expel a peer whose verdict ends; see that the tunnel of an admitted one comes up."""
        pair = peer.pair
        while True:
            actions = pair.tick(self._clock())
            if pair.standing is not None and trio.current_time() >= peer.ends:
                actions = pair.expel(ENDED)
            await self._perform(peer, None, None, actions)
            self._watch_tunnel(peer)
            await self._pause(peer, TICK_SECONDS)

    def _watch_tunnel(self, peer: _Peer) -> None:
        now = trio.current_time()
        if peer.pair.standing is None or peer.pair.doubted or peer.pair.current is not None:
            peer.down = None
        elif self._gate.up(peer.party):
            peer.down, peer.patience = None, UP_SECONDS
        elif peer.down is None:
            peer.down = now
        elif now - peer.down > peer.patience:
            log.warning(
                "the tunnel to an admitted peer is not up: a fresh key may help",
                party=peer.party,
                seconds=peer.patience,
            )
            peer.pair.doubt()
            peer.patience, peer.down = min(2 * peer.patience, MAX_UP_SECONDS), None
            peer.wake()

    # policy and collateral

    def _files_changed(self) -> bool:
        return self._policy_file.changed() or self._collateral_stamp() != self._collateral_read

    def _collateral_stamp(self) -> int:
        if self._store is None:
            return 0
        with suppress(OSError):
            return os.stat(self._store.directory / INDEX).st_mtime_ns
        return 0

    def _read_collateral(self) -> Collateral:
        self._collateral_read = self._collateral_stamp()
        return self._store.read() if self._store is not None else Collateral()

    async def _watch_files(self) -> None:
        while True:
            with trio.move_on_after(WATCH_SECONDS):
                await self._reload.wait()
            told, self._reload = self._reload.is_set(), trio.Event()
            if not told and not await trio.to_thread.run_sync(self._files_changed):
                continue
            try:
                changed = await trio.to_thread.run_sync(self._policy_file.load)
                self._collateral = await trio.to_thread.run_sync(self._read_collateral)
            except MimirError as error:
                log.error("the changed policy is refused: the one before stays in force", why=str(error))
                continue
            if changed:
                found = self._policy_file.policy
                log.warning("another policy is in force", name=found.name, version=found.version)
            if changed or told:
                for peer in self._peers.values():
                    await self._perform(peer, None, None, peer.pair.reconsider(self._clock()))
                    peer.call_at, peer.backoff = 0.0, FIRST_BACKOFF
                    peer.wake()

    def _appraise(self, raw: bytes, expected: Claims, now: datetime) -> Verdict:
        return appraisal.appraise(
            raw, self._policy_file.policy, self._collateral, expected, now, self._anchors
        )


class _Judge:
    """What an `Admission` believes, as its exchanges ask for it (mimir.admission.exchange.Judge)."""

    def __init__(self, admission: Admission, party: int) -> None:
        self._of, self._party = admission, party

    @property
    def policy(self) -> bytes:
        return self._of._policy_file.digest

    @property
    def config(self) -> bytes:
        return self._of._config

    @property
    def life(self) -> timedelta:
        return self._of._life()

    @property
    def epoch(self) -> int:
        return self._of._revocations.epoch if self._of._revocations is not None else 0

    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Verdict:
        began = trio.current_time()
        verdict = self._of._appraise(raw, expected, now)
        seconds = self._of._peers[self._party].appraisal = trio.current_time() - began
        APPRAISAL_SECONDS.labels(self._party).set(seconds)
        return verdict

    def rejudge(self, standing: Standing, now: datetime) -> None:
        """By the policy in force, what the evidence said when it was admitted under another one."""
        expected, envelope = standing.expected, Envelope.decode(standing.evidence)
        denied = {("identities", expected.identity.hex()), ("tunnels", expected.tunnel.hex())}
        wanted = self._of._policy_file.policy
        # It was fresh when it was judged, and has been good for as long as it stands since.
        older = int((now - standing.since).total_seconds()) + 1
        wanted = replace(
            wanted, freshness=replace(wanted.freshness, max_age_s=wanted.freshness.max_age_s + older)
        )
        wanted.check_time(now, Trail("policy"))
        wanted.check_deny(denied, Trail("policy"))
        facts, fetched = appraisal.verify(
            envelope, self._of._collateral, now, wanted.grace, self._of._anchors
        )
        wanted.judge(facts, now, fetched)

    def revoked(self, identity: bytes, verdict: Verdict | None) -> None:
        if self._of._revocations is not None:
            self._of._revocations.check(
                identity=identity.hex(),
                tunnel=verdict.claims.tunnel.hex() if verdict is not None else None,
                measurements=verdict.measurements if verdict is not None else (),
            )

    def news(self, epoch: int) -> bytes:
        known = self._of._revocations
        return known.raw if known is not None and known.epoch > epoch else b""

    def learn(self, news: bytes) -> None:
        if self._of._revocations is None:
            return  # nobody here may revoke
        try:
            self._of._revocations.offer(news)
        except EnvironmentMissing as error:
            Trail("revocation").refuse("kept", "room for what is revoked", str(error))

    def issue(self, peer: int, verdict: Verdict, tls: bytes | None, until: datetime) -> bytes:
        if tls is None:
            return b""
        of = self._of
        subject = of._peers[peer].place.identity.hex()
        return certificates.issue(of._identity, subject, tls, verdict, of._clock(), until)
