"""What is revoked: statements that owners sign, a store that never goes back, and gossip that takes seconds.

A statement lists everything that is revoked, identities of parties and clients alike, certificates,
measurements and tunnel keys, under an epoch that only rises. Owners sign it as they sign a policy. A node
takes another one if it is of this federation, of a higher epoch, and lists at least what the last one did. So
nothing is ever taken back: who was revoked comes back under new keys, a measurement by new code.

Statements that differ under one epoch are a fault of the owners, who must not sign two. The first that came
stays, the other is kept beside it as a proof and shouted about; one of a higher epoch that lists what both do
ends it.

Where a list of one kind is written: `KINDS`. All values are lower-case hexadecimal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import cbor2
import structlog
import trio
from prometheus_client import Counter, Gauge

from mimir import config
from mimir.attest.rules import maybe_empty_hexes_rule
from mimir.attest.signatures import (
    MAX_SIGNATURES,
    Signature,
    format_signatures,
    require_owners,
    verifies,
)
from mimir.attest.trail import Trail, read_canonical_cbor, stamp
from mimir.errors import AttestationError, BadInput, ConfigError, EnvironmentMissing, PeerError
from mimir.net import Transport
from mimir.net.messages import MAX_STATEMENT

if TYPE_CHECKING:  # clients know nothing of the verifiers behind it, which take a second to load
    from mimir.attest.appraisal import Verdict

FORMAT = 1
KINDS: Mapping[str, tuple[int, ...]] = {  # and the sizes in bytes of their values
    "identities": (32,),  # Ed25519 public keys: parties, clients, owners of models
    "certificates": (32,),  # SHA-256 of the whole
    "measurements": (32, 48, 64),
    "tunnels": (32,),  # WireGuard public keys
}
MAX_ITEMS = 3072  # of all kinds together
MAX_EPOCH = 1 << 48
HASH = 32
FILE = "revocations"  # in data_dir
FORK_SUFFIX = ".fork"

GOSSIP = "revocations"  # kind of request
GOSSIP_SECONDS = 1.0  # between two questions to a peer, and at most from a change to telling
ANSWER_SECONDS = 2.0

log = structlog.get_logger("mimir.revocation")

EPOCH = Gauge("mimir_revocation_epoch", "Epoch of the revocations in force")
FORKS = Counter("mimir_revocation_forks_total", "Statements of owners that contradict one of the same epoch")


def context_of(identities: Iterable[str]) -> str:
    """Names a federation: a hash over the identities of its parties (hex, in party order), in hex."""
    return hashlib.sha256(b"mimir federation\0" + b"".join(map(bytes.fromhex, identities))).hexdigest()


# --- statements --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """Everything that is revoked in one federation. Epoch 0 is the state before the first one: nothing."""

    context: str
    epoch: int
    issued: datetime  # for people: what counts is the epoch
    identities: frozenset[str] = frozenset()
    certificates: frozenset[str] = frozenset()
    measurements: frozenset[str] = frozenset()
    tunnels: frozenset[str] = frozenset()

    def canonical(self) -> bytes:
        """The one encoding: deterministic CBOR, lists sorted."""
        items = {4 + n: sorted(map(bytes.fromhex, getattr(self, kind))) for n, kind in enumerate(KINDS)}
        head = {1: bytes.fromhex(self.context), 2: self.epoch, 3: int(self.issued.timestamp())}
        return cbor2.dumps(head | items, canonical=True)

    def digest(self) -> bytes:
        """SHA-256 over it."""
        return hashlib.sha256(b"mimir revocation statement\0" + self.canonical()).digest()

    def message(self) -> bytes:
        """What an owner's Ed25519 key signs."""
        return b"mimir revocation signature\0" + self.digest()

    def covers(self, other: Statement) -> bool:
        """Whether everything that `other` revokes is revoked by this one."""
        return all(getattr(self, kind) >= getattr(other, kind) for kind in KINDS)

    def extended(self, now: datetime, **items: Iterable[str]) -> Statement:
        """With these revoked as well, under the next epoch; itself if all of them are already."""
        more = replace(self, **{kind: getattr(self, kind) | set(values) for kind, values in items.items()})
        if more == self:
            return self
        return replace(more, epoch=self.epoch + 1, issued=now.astimezone(UTC).replace(microsecond=0))

    def joined(self, other: Statement, now: datetime) -> Statement:
        """What either revokes, under an epoch above both: the way out where owners signed two."""
        more = {kind: getattr(self, kind) | getattr(other, kind) for kind in KINDS}
        issued = now.astimezone(UTC).replace(microsecond=0)
        return replace(self, epoch=max(self.epoch, other.epoch) + 1, issued=issued, **more)

    def check(
        self,
        *,
        identity: str | None = None,
        tunnel: str | None = None,
        certificate: str | None = None,
        measurements: Iterable[str] = (),
    ) -> None:
        """Raise `AttestationError` at `revoked.*` if any of these is listed."""
        trail = Trail("revoked")
        for step, listed, values in (
            ("identity", self.identities, (identity,)),
            ("tunnel", self.tunnels, (tunnel,)),
            ("certificate", self.certificates, (certificate,)),
            ("measurement", self.measurements, tuple(measurements)),
        ):
            found = sorted(each for each in values if each is not None and each in listed)
            if found:
                trail.refuse(step, f"nothing that epoch {self.epoch} revokes", ", ".join(found))

    def public(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "context": self.context,
            "epoch": self.epoch,
            "issued": stamp(self.issued),
            "digest": self.digest().hex(),
            **{kind: sorted(getattr(self, kind)) for kind in KINDS},
        }


def encode(statement: Statement, signatures: Collection[Signature]) -> bytes:
    """A statement with its signatures, as it travels and lies on disk."""
    pairs = [[bytes.fromhex(each.key), bytes.fromhex(each.signature)] for each in signatures]
    return cbor2.dumps({1: FORMAT, 2: statement.canonical(), 3: pairs}, canonical=True)


def decode(raw: bytes) -> tuple[Statement, tuple[Signature, ...]]:
    """The inverse, strict; whose signatures these are, and whether they hold, is not looked at."""
    trail = Trail("revocation")
    if not 0 < len(raw) <= MAX_STATEMENT:
        trail.refuse("length", f"1 to {MAX_STATEMENT} bytes", f"{len(raw)} bytes")
    outer = read_canonical_cbor(trail, "format", raw, "the statement")
    good = isinstance(outer, dict) and set(outer) == {1, 2, 3} and type(outer[1]) is int
    if not good or not isinstance(outer[2], bytes) or not isinstance(outer[3], list):
        trail.refuse("format", "a map with the keys 1 to 3", type(outer).__name__)
    trail.require(outer[1] == FORMAT, "version", FORMAT, outer[1])
    if len(outer[3]) > MAX_SIGNATURES:
        trail.refuse("format", f"at most {MAX_SIGNATURES} signatures", len(outer[3]))
    signatures = []
    for pair in outer[3]:
        if not isinstance(pair, list) or len(pair) != 2 or not _blob(pair[0], 32) or not _blob(pair[1], 64):
            trail.refuse("format", "pairs of a key and a signature", type(pair).__name__)
        signatures.append(Signature(pair[0].hex(), pair[1].hex()))
    inner = read_canonical_cbor(trail, "format", outer[2], "what is signed")
    if not isinstance(inner, dict) or set(inner) != set(range(1, 4 + len(KINDS))):
        trail.refuse("format", f"a map with the keys 1 to {3 + len(KINDS)}", type(inner).__name__)
    context, epoch, issued = inner[1], inner[2], inner[3]
    if not _blob(context, HASH):
        trail.refuse("format", f"a context of {HASH} bytes", type(context).__name__)
    for what, value, limit in (("epoch", epoch, MAX_EPOCH), ("time", issued, 1 << 33)):
        if type(value) is not int or not 0 < value < limit:
            trail.refuse("format", f"an {what} from 1 on", value)
    items: dict[str, frozenset[str]] = {}
    for number, (kind, sizes) in enumerate(KINDS.items(), 4):
        listed = inner[number]
        if not isinstance(listed, list) or not all(_blob(each, *sizes) for each in listed):
            trail.refuse("format", f"{kind} of {sizes} bytes", type(listed).__name__)
        if listed != sorted(set(listed)):
            trail.refuse("format", f"{kind} sorted, each once", f"{len(listed)} in another order")
        items[kind] = frozenset(each.hex() for each in listed)
    if sum(map(len, items.values())) > MAX_ITEMS:
        trail.refuse("format", f"at most {MAX_ITEMS} items", sum(map(len, items.values())))
    statement = Statement(context.hex(), epoch, datetime.fromtimestamp(issued, UTC), **items)
    return statement, tuple(signatures)


def check_signed(
    statement: Statement, signatures: Collection[Signature], owners: Collection[str], threshold: int
) -> None:
    """Require valid signatures by `threshold` of `owners` (public keys, hex)."""
    require_owners(Trail("revocation"), statement.message(), signatures, owners, threshold)


def _blob(value: Any, *sizes: int) -> bool:
    return isinstance(value, bytes) and len(value) in sizes


# --- the owners' file --------------------------------------------------------------------------------------


def _time_rule(value: Any, folder: Path) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None or value.microsecond:
        raise ValueError("a time with its zone, in whole seconds, such as 2027-01-31T00:00:00Z")
    return value.astimezone(UTC)


def _hash_rule(value: Any, folder: Path) -> str:
    if not isinstance(value, str) or len(value) != 2 * HASH or value.lower() != value:
        raise ValueError(f"{2 * HASH} hexadecimal digits")
    try:
        return bytes.fromhex(value).hex()
    except ValueError:
        raise ValueError(f"{2 * HASH} hexadecimal digits") from None


def _items_rule(kind: str) -> config.Parser:
    """As for a policy's deny list, but longer."""
    one = maybe_empty_hexes_rule(*KINDS[kind])

    def parse(value: Any, folder: Path) -> frozenset[str]:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise ValueError(f"a list of at most {MAX_ITEMS}")
        return frozenset(found for each in value for found in one([each], folder))

    return parse


@dataclass(frozen=True)
class _File:
    format: Annotated[int, config.integer_rule(FORMAT, FORMAT)]
    context: Annotated[str, _hash_rule]
    epoch: Annotated[int, config.integer_rule(1, MAX_EPOCH - 1)]
    issued: Annotated[datetime, _time_rule]
    identities: Annotated[frozenset[str], _items_rule("identities")] = frozenset()
    certificates: Annotated[frozenset[str], _items_rule("certificates")] = frozenset()
    measurements: Annotated[frozenset[str], _items_rule("measurements")] = frozenset()
    tunnels: Annotated[frozenset[str], _items_rule("tunnels")] = frozenset()
    signature: tuple[Signature, ...] = ()


def load(path: Path) -> tuple[Statement, tuple[Signature, ...]]:
    """A statement as owners pass it on, and the signatures that are over it; others are dropped."""
    found = config.read_table(_File, config.read_toml(path), path)
    statement = Statement(
        found.context, found.epoch, found.issued, **{kind: getattr(found, kind) for kind in KINDS}
    )
    if sum(len(getattr(statement, kind)) for kind in KINDS) > MAX_ITEMS:
        raise ConfigError(f"{path}: more than {MAX_ITEMS} items")
    kept = tuple(each for each in found.signature if verifies(statement.message(), each))
    if len(kept) > MAX_SIGNATURES:
        raise ConfigError(f"{path}: more than {MAX_SIGNATURES} signatures")
    return statement, kept


def save(path: Path, statement: Statement, signatures: Collection[Signature]) -> None:
    """The inverse, in TOML; the old file stays until the new one is whole."""
    lists = []
    for kind in KINDS:
        values = "".join(f'    "{each}",\n' for each in sorted(getattr(statement, kind)))
        lists.append(f"{kind} = [\n{values}]\n" if values else f"{kind} = []\n")
    text = (
        "# Everything that is revoked. `mimir revoke` extends and signs it; owners pass it on.\n"
        f'format = {FORMAT}\ncontext = "{statement.context}"\nepoch = {statement.epoch}\n'
        f"issued = {stamp(statement.issued)}\n{''.join(lists)}\n{format_signatures(signatures)}"
    )
    try:
        _replace(path, text.encode(), 0o644)
    except OSError as error:
        raise BadInput(f"statement {path}: {error.strerror}") from None


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Put a file in place whole; once this returns, a crash cannot bring the old one back."""
    draft = path.with_name(path.name + ".new")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- the store ---------------------------------------------------------------------------------------------


class Revocations:
    """What is revoked as far as this node knows. On disk before anything is done about it."""

    def __init__(self, path: Path, context: str, owners: Collection[str], threshold: int) -> None:
        """`owners` (hex) and `threshold` are this node's own: a statement does not say who may sign it.

        A file that is there but is no statement by these owners is a `BadInput`: to go on without it would be
        to forget revocations.
        """
        self._path, self._owners, self._threshold = path, frozenset(owners), threshold
        if not 1 <= threshold <= len(self._owners):
            raise BadInput(f"{threshold} of {len(self._owners)} owners must sign: from 1 to all is possible")
        self._change = trio.Event()
        self._statement = Statement(context, 0, datetime.fromtimestamp(0, UTC))
        self._raw = b""
        self._forks: set[str] = set()
        self._load()
        EPOCH.set(self.epoch)

    @property
    def statement(self) -> Statement:
        """What is in force."""
        return self._statement

    @property
    def epoch(self) -> int:
        """0 before the first statement."""
        return self._statement.epoch

    @property
    def raw(self) -> bytes:
        """The statement in force with its signatures, for others; empty at epoch 0."""
        return self._raw

    def status(self) -> dict[str, Any]:
        """Public facts."""
        return {
            "epoch": self.epoch,
            "digest": self._statement.digest().hex() if self.epoch else "",
            "issued": stamp(self._statement.issued) if self.epoch else "",
            "items": {kind: len(getattr(self._statement, kind)) for kind in KINDS},
            "forks": sorted(self._forks),
        }

    def check(
        self,
        *,
        identity: str | None = None,
        tunnel: str | None = None,
        certificate: str | None = None,
        measurements: Iterable[str] = (),
    ) -> None:
        """Raise `AttestationError` at `revoked.*` if any of these (hex) is revoked."""
        self._statement.check(
            identity=identity, tunnel=tunnel, certificate=certificate, measurements=measurements
        )

    def offer(self, raw: bytes) -> bool:
        """Take a statement that somebody sent: True if it is now in force, False if it already was.

        Raises `AttestationError` at `revocation.*` for anything else: not signed by enough owners, another
        federation's, older, shorter, or another one of the same epoch. Writes to disk before it returns.
        """
        statement, signatures = decode(raw)
        trail, held = Trail("revocation"), self._statement
        trail.require(statement.context == held.context, "context", held.context, statement.context)
        check_signed(statement, signatures, self._owners, self._threshold)
        if statement == held:
            return False
        if statement.epoch == held.epoch:
            self._shout(statement, raw)
            trail.refuse("fork", f"the statement {held.digest().hex()}", statement.digest())
        trail.require(statement.epoch > held.epoch, "epoch", f"more than {held.epoch}", statement.epoch)
        trail.require(statement.covers(held), "superset", "all that was revoked before", "less")
        try:
            _replace(self._path, raw, 0o600)
        except OSError as error:
            raise EnvironmentMissing(
                f"{self._path}: cannot be written: {error.strerror}; a revocation waits for room on this disk"
            ) from None
        self._statement, self._raw = statement, raw
        EPOCH.set(self.epoch)
        log.warning(
            "revocations are in force",
            epoch=self.epoch,
            digest=statement.digest().hex()[:16],
            **{kind: len(getattr(statement, kind)) for kind in KINDS},
        )
        self._change.set()
        self._change = trio.Event()
        return True

    async def wait_past(self, epoch: int) -> int:
        """Return once a higher epoch than this is in force, with it. Nothing is missed between two calls."""
        while self.epoch <= epoch:
            await self._change.wait()
        return self.epoch

    def _load(self) -> None:
        try:
            with open(self._path, "rb") as file:
                raw = file.read(MAX_STATEMENT + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BadInput(f"{self._path}: {error.strerror}") from None
        try:
            statement, signatures = decode(raw)
            trail, context = Trail("revocation"), self._statement.context
            trail.require(statement.context == context, "context", context, statement.context)
            check_signed(statement, signatures, self._owners, self._threshold)
        except AttestationError as error:
            raise BadInput(
                f"{self._path}: does not hold the revocations that the owners signed ({error}); put the "
                "newest statement in its place, from another party's data_dir: else nobody would be revoked"
            ) from None
        self._statement, self._raw = statement, raw

    def _shout(self, other: Statement, raw: bytes) -> None:
        """Owners signed two statements of one epoch."""
        digest = other.digest().hex()
        if digest in self._forks or len(self._forks) >= MAX_SIGNATURES:
            return
        self._forks.add(digest)
        FORKS.inc()
        proof = self._path.with_name(self._path.name + FORK_SUFFIX)
        log.error(
            "THE OWNERS SIGNED TWO STATEMENTS OF ONE EPOCH: find out who, and sign one of a higher epoch "
            "that lists what both do",
            epoch=other.epoch,
            ours=self._statement.digest().hex(),
            other=digest,
            kept=str(proof),
        )
        try:
            if not proof.exists():
                _replace(proof, raw, 0o600)
        except OSError as error:
            log.error("the proof could not be kept", file=str(proof), why=error.strerror)


# --- telling others ----------------------------------------------------------------------------------------


class Gossip:
    """Tells the peers on the mesh what is revoked, and asks them, for as long as `run` runs."""

    def __init__(self, transport: Transport, revocations: Revocations) -> None:
        self._transport = transport
        self._revocations = revocations
        self._complained: set[tuple[int, str]] = set()  # once a step, not once a second
        transport.on_request(GOSSIP, self._answer)

    async def run(self) -> None:
        """A change is told at once to whoever is reachable; each peer is asked once a second besides."""
        async with trio.open_nursery() as nursery:
            for peer in self._transport.peers:
                nursery.start_soon(self._keep_up_with, peer)

    async def _keep_up_with(self, peer: int) -> None:
        known = self._revocations
        while True:
            epoch = known.epoch
            if self._transport.up(peer):
                try:
                    await self._exchange(peer)
                except PeerError as error:
                    log.debug("a peer was not asked for revocations", peer=peer, why=str(error))
            with trio.move_on_after(GOSSIP_SECONDS):
                await known.wait_past(epoch)

    async def _exchange(self, peer: int) -> None:
        """Ask; then tell, if the peer turned out to be behind, or to hold another one."""
        answer = await self._transport.request(peer, GOSSIP, self._body(None), ANSWER_SECONDS)
        theirs = self._take(peer, answer)
        known = self._revocations
        if known.epoch and theirs != (known.epoch, known.statement.digest()) and theirs[0] <= known.epoch:
            await self._transport.request(peer, GOSSIP, self._body(theirs), ANSWER_SECONDS)

    async def _answer(self, peer: int, body: dict[str, Any]) -> dict[str, Any]:
        return self._body(self._take(peer, body))

    def _body(self, theirs: tuple[int, bytes] | None) -> dict[str, Any]:
        """What we hold; and the statement itself for one who is known not to hold it, nor a later one."""
        known = self._revocations
        mine = (known.epoch, known.statement.digest())
        wanted = theirs is not None and theirs != mine and theirs[0] <= mine[0]
        return {"epoch": mine[0], "digest": mine[1], "statement": known.raw if wanted else b""}

    def _take(self, peer: int, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """What the peer holds, after taking what it sent."""
        epoch, digest, raw = body.get("epoch"), body.get("digest"), body.get("statement")
        if type(epoch) is not int or not 0 <= epoch < MAX_EPOCH or not _blob(digest, HASH):
            raise BadInput("which revocations do you hold?")
        if not isinstance(raw, bytes):
            raise BadInput("a statement is due, or none")
        if raw:
            try:
                self._revocations.offer(raw)
            except (AttestationError, EnvironmentMissing) as error:
                step = error.step if isinstance(error, AttestationError) else "disk"
                if (peer, step) not in self._complained:
                    self._complained.add((peer, step))
                    log.warning("a peer's revocations are not taken", peer=peer, why=str(error))
        assert isinstance(digest, bytes)
        return epoch, digest


# --- acting on it ------------------------------------------------------------------------------------------


class Admission(Protocol):
    """The admission, as far as revocation needs it."""

    def admitted(self, party: int) -> Verdict | None:
        """On what an admitted peer's admission rests; None of a peer that is not admitted."""
        ...

    def certificates(self, party: int) -> Iterable[str]:
        """SHA-256 (hex) of the certificates that we gave this peer, and that still last."""
        ...

    async def expel(self, party: int, why: str) -> None:
        """Take tunnel, links and sessions away from a peer."""
        ...


async def enforce(revocations: Revocations, admission: Admission, identities: Mapping[int, str]) -> None:
    """Expel every peer that is revoked, now and after each change; `identities` (hex) of all peers by party.

    Whoever admits a peer asks `check` by itself: between two changes nothing is looked at here.
    """
    while True:
        epoch = revocations.epoch
        async with trio.open_nursery() as nursery:
            for party, identity in identities.items():
                why = _revoked(revocations, admission, party, identity)
                if why is not None:
                    log.warning("expelling a peer that is revoked", peer=party, why=why)
                    nursery.start_soon(admission.expel, party, why)
        await revocations.wait_past(epoch)


def _revoked(revocations: Revocations, admission: Admission, party: int, identity: str) -> str | None:
    verdict = admission.admitted(party)
    if verdict is None:
        return None
    try:
        revocations.check(
            identity=identity, tunnel=verdict.claims.tunnel.hex(), measurements=verdict.measurements
        )
        for each in admission.certificates(party):
            revocations.check(certificate=each)
    except AttestationError as error:
        return str(error)
    return None
