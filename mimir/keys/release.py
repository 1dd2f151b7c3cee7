"""How a broker gives its share of a storage key to an attested party. Both ends, without I/O.

    party                                                             broker
    HELLO      key, requester, nonce, HPKE key                     ->
                                                                   <- CHALLENGE  nonce, digest of its policy
    EVIDENCE   an envelope                                         ->
                                                                   <- SHARE      sealed to the HPKE key
                                                                      or REFUSED step, expected, got

Every message is signed: the party's by its *requester key*, which opens nothing and only says who asks (its
identity is not known yet, being encrypted under the key that it asks for); the broker's by its identity.
Signatures cover all messages so far, with a label for the message. The evidence's claims bind the requester
key, the HPKE key, the broker's nonce, both messages before it as channel, the broker's policy, and the digest
of the description of the split; there is no tunnel yet, so that claim is zero, which no tunnel key is, and
such evidence admits nobody to a mesh. Nonces live as long as the connection: what was recorded is of no use.

A party believes a share only if it is the committed one, and a key only if it has the check value.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import cbor2

from mimir import config, hpke
from mimir.admission.revocation import Statement
from mimir.attest.appraisal import REAL, Anchors, Verdict, appraise
from mimir.attest.collateral import Collateral
from mimir.attest.evidence import MAX_ENVELOPE, Claims, Envelope
from mimir.attest.policy import Policy
from mimir.attest.trail import Trail, read_canonical_cbor
from mimir.config import Address
from mimir.errors import AttestationError, BadInput, ConfigError, MimirError
from mimir.keys import shamir
from mimir.keys.cms import KeyRefused
from mimir.keys.shamir import KeyShare
from mimir.net.identity import BadSignature, Identity, parse_public, verify
from mimir.secret import StorageKey

LABEL = b"mimir key release 1\0"
KEY_ID, NONCE, HASH, SIGNATURE = 16, 32, 32, 64
MAX_MESSAGE = MAX_ENVELOPE + 4096
MAX_TEXT = 400
EVIDENCE_LIFE = timedelta(minutes=5)
CLOCKS_APART = timedelta(minutes=1)
_SPKI = bytes.fromhex("302a300506032b6570032100")  # Ed25519, before the 32 bytes of the key


# --- what was split ----------------------------------------------------------------------------------------


def _hash_rule(size: int) -> config.Parser:
    def parse(value: Any, folder: Path) -> str:
        if isinstance(value, str) and len(value) == 2 * size:
            try:
                return bytes.fromhex(value).hex()
            except ValueError:
                pass
        raise ValueError(f"{2 * size} hexadecimal digits")

    return parse


@dataclass(frozen=True)
class Broker:
    """[[brokers]] One holder of a share; its number is its place in the list, from 1."""

    name: Annotated[str, config.text_rule(64)]
    address: Annotated[Address, config.address_rule]
    identity: Annotated[str, config.key_rule]
    commitment: Annotated[str, _hash_rule(HASH)]


@dataclass(frozen=True)
class Split:
    """What is public of a storage key that was split. Who changes it can send a party to other brokers: guard
    it as the configuration."""

    key: Annotated[str, _hash_rule(KEY_ID)]
    threshold: Annotated[int, config.integer_rule(1, shamir.MAX_SHARES)]
    check: Annotated[str, _hash_rule(HASH)]
    brokers: tuple[Broker, ...]

    @property
    def key_id(self) -> bytes:
        return bytes.fromhex(self.key)

    def digest(self) -> bytes:
        """All of it, but for names and addresses, which may change."""
        parts = [self.key_id, bytes((self.threshold, len(self.brokers))), bytes.fromhex(self.check)]
        for broker in self.brokers:
            parts += [bytes.fromhex(broker.identity), bytes.fromhex(broker.commitment)]
        return hashlib.sha256(b"mimir key split 1\0" + b"".join(parts)).digest()

    def text(self) -> str:
        """As a file says it."""
        lines = [f'key = "{self.key}"', f"threshold = {self.threshold}", f'check = "{self.check}"']
        for each in self.brokers:
            lines += ["", "[[brokers]]", f'name = "{each.name}"', f'address = "{each.address}"']
            lines += [f'identity = "{each.identity}"', f'commitment = "{each.commitment}"']
        return "\n".join(lines) + "\n"


def load_split(path: Path) -> Split:
    """Read a description; `ConfigError` names file and key."""
    found: Split = config.read_table(Split, config.read_toml(path), path)
    if not found.threshold <= len(found.brokers) <= shamir.MAX_SHARES:
        raise ConfigError(f"{path}: threshold: {found.threshold} of {len(found.brokers)} brokers cannot be")
    if len({each.identity for each in found.brokers}) != len(found.brokers):
        raise ConfigError(f"{path}: brokers[].identity: two brokers have the same")
    return found


def deal(
    key: StorageKey, threshold: int, brokers: Mapping[str, tuple[Address, str]]
) -> tuple[Split, dict[int, KeyShare]]:
    """Split a key among brokers, given by name with address and identity."""
    key_id, shares = os.urandom(KEY_ID), shamir.split(key, threshold, len(brokers))
    listed = tuple(
        Broker(name, address, identity, shamir.commit(key_id, number, shares[number]).hex())
        for number, (name, (address, identity)) in enumerate(brokers.items(), 1)
    )
    return Split(key_id.hex(), threshold, shamir.check_value(key_id, key).hex(), listed), shares


# --- messages ----------------------------------------------------------------------------------------------


class _Transcript:
    """All that was said so far on one connection, as a hash; signs and verifies what comes next."""

    def __init__(self, split: bytes, broker: bytes) -> None:
        self.hash = hashlib.sha256(LABEL + split + broker).digest()

    def say(self, kind: str, body: Mapping[int, Any], identity: Identity) -> bytes:
        raw = cbor2.dumps({0: kind, **body}, canonical=True)
        message = cbor2.dumps([raw, identity.sign(self._signed(raw))], canonical=True)
        self._add(message)
        return message

    def hear(self, message: bytes, kinds: tuple[str, ...], public: bytes | None = None) -> dict[int, Any]:
        """The body of a message of one of these kinds. Without `public` the key is in field 2 of the body."""
        if not 0 < len(message) <= MAX_MESSAGE:
            raise KeyRefused(f"a message of {len(message)} bytes")
        try:
            raw, signature = _cbor(message, list, 2)
            body = _cbor(raw, dict, None)
        except (AttestationError, ValueError, TypeError):
            raise KeyRefused("a message that is none") from None
        kind = body.get(0)
        if kind not in kinds:
            raise KeyRefused(f"{' or '.join(kinds)} expected, {str(kind)[:20]!r} came")
        key = body.get(2) if public is None else public
        try:
            if not isinstance(key, bytes) or not isinstance(signature, bytes) or len(signature) != SIGNATURE:
                raise BadSignature("no signature")
            verify(key, self._signed(raw), signature)
        except BadSignature:
            raise KeyRefused(f"{kind}: not signed by whom it should be, or not on this connection") from None
        self._add(message)
        return body

    def _signed(self, raw: bytes) -> bytes:
        return LABEL + self.hash + raw

    def _add(self, message: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + message).digest()


def _cbor(raw: Any, kind: Any, count: int | None) -> Any:
    if not isinstance(raw, bytes):
        raise TypeError
    found: Any = read_canonical_cbor(Trail("release"), "format", raw, "a message")
    if not isinstance(found, kind) or (count is not None and len(found) != count):
        raise TypeError
    return found


def _fields(body: dict[int, Any], *sizes: tuple[int, int]) -> list[bytes]:
    """Fields 1, 2, ... as byte strings within their sizes, and no others."""
    if set(body) != set(range(len(sizes) + 1)):
        raise KeyRefused("a message with missing or unknown fields")
    found = [body[number] for number in range(1, len(sizes) + 1)]
    for value, (low, high) in zip(found, sizes, strict=True):
        if not isinstance(value, bytes) or not low <= len(value) <= high:
            raise KeyRefused("a message with a field of a wrong length")
    return found


def identity_hash(public: bytes) -> bytes:
    """How claims name an Ed25519 key."""
    return hashlib.sha256(_SPKI + public).digest()


def _claims(
    split: Split,
    broker: bytes,
    requester: bytes,
    kem: bytes,
    nonce: bytes,
    policy: bytes,
    channel: bytes,
    now: datetime,
) -> Claims:
    """What evidence must be bound to; both ends write it down by themselves."""
    return Claims(
        role="party",
        node=requester.hex(),
        identity=identity_hash(requester),
        tunnel=bytes(HASH),
        kem=kem,
        nonce=nonce,
        nonce_source=f"key release by {broker.hex()}",
        not_before=int((now - CLOCKS_APART).timestamp()),
        not_after=int((now + EVIDENCE_LIFE).timestamp()),
        policy=policy,
        channel=channel,
        config=split.digest(),
    )


class Asking:
    """A party's end of one connection to one broker."""

    def __init__(self, split: Split, number: int, requester: Identity, kem: hpke.HpkeKey) -> None:
        self._split, self._number, self._requester, self._kem = split, number, requester, kem
        self._broker = parse_public(split.brokers[number - 1].identity)
        self._said = _Transcript(split.digest(), self._broker)

    def hello(self) -> bytes:
        """The first message."""
        body = {1: self._split.key_id, 2: self._requester.public, 3: os.urandom(NONCE), 4: self._kem.public}
        return self._said.say("hello", body, self._requester)

    def claims(self, challenge: bytes, now: datetime) -> Claims:
        """For which claims evidence is asked."""
        body = self._said.hear(challenge, ("challenge", "refused"), self._broker)
        _raise_refusal(body)
        nonce, policy = _fields(body, (NONCE, NONCE), (HASH, HASH))
        public, kem = self._requester.public, self._kem.digest
        return _claims(self._split, self._broker, public, kem, nonce, policy, self._said.hash, now)

    def evidence(self, envelope: Envelope) -> bytes:
        """The second message."""
        return self._said.say("evidence", {1: envelope.encode()}, self._requester)

    def share(self, answer: bytes) -> KeyShare:
        """The share; `KeyRefused` says why there is none, or that it is not the one that was dealt."""
        info = LABEL + self._said.hash
        body = self._said.hear(answer, ("share", "refused"), self._broker)
        _raise_refusal(body)
        (sealed,) = _fields(body, (1, 4096))
        try:
            share = KeyShare(self._kem.open(sealed, info))
        except MimirError as error:
            raise KeyRefused(f"its share does not open: {error}") from None
        committed = bytes.fromhex(self._split.brokers[self._number - 1].commitment)
        if not hmac.compare_digest(shamir.commit(self._split.key_id, self._number, share), committed):
            share.wipe()
            raise KeyRefused("a BAD SHARE: not the one that was dealt to it")
        return share


def _raise_refusal(body: dict[int, Any]) -> None:
    if body[0] == "refused":
        step, expected, got = (
            raw.decode("utf-8", "replace") for raw in _fields(body, *([(0, MAX_TEXT)] * 3))
        )
        texts = ["".join(c if c.isprintable() else "?" for c in text) for text in (step, expected, got)]
        raise KeyRefused(f"refused at {texts[0]}: expected {texts[1]}; got {texts[2]}")


@dataclass(frozen=True)
class Terms:
    """By what a broker judges who asks."""

    split: Split
    number: int
    policy: Policy
    collateral: Collateral
    requesters: Mapping[bytes, str]  # public keys, with their names
    revoked: frozenset[bytes] = frozenset()
    anchors: Anchors = REAL
    statement: Statement | None = None  # what the owners revoked


class Giving:
    """A broker's end of one connection. `refusal` is what to send after any `AttestationError` it raises."""

    def __init__(self, terms: Terms, identity: Identity) -> None:
        self._terms, self._identity = terms, identity
        self._said = _Transcript(terms.split.digest(), identity.public)
        self._nonce = os.urandom(NONCE)
        self._requester = b""
        self._kem = b""

    def challenge(self, hello: bytes) -> bytes:
        """Answer the first message, if it is from a listed requester and about this key."""
        body = self._said.hear(hello, ("hello",))
        key, requester, _nonce, kem = _fields(
            body, (KEY_ID, KEY_ID), (32, 32), (NONCE, NONCE), (hpke.PUBLIC_BYTES, hpke.PUBLIC_BYTES)
        )
        trail, terms = Trail("release"), self._terms
        trail.require(requester in terms.requesters, "requester", "one of those listed here", requester.hex())
        trail.require(
            requester not in terms.revoked, "revoked", "a requester that is not revoked", requester.hex()
        )
        trail.same("key", terms.split.key_id, key)
        self._requester, self._kem = requester, kem
        return self._said.say("challenge", {1: self._nonce, 2: terms.policy.digest()}, self._identity)

    def appraise(self, evidence: bytes, now: datetime) -> Verdict:
        """Judge the second message; `AttestationError` names the step that does not hold."""
        terms, channel = self._terms, self._said.hash
        body = self._said.hear(evidence, ("evidence",), self._requester)
        (raw,) = _fields(body, (1, MAX_ENVELOPE))
        expected = _claims(
            terms.split,
            self._identity.public,
            self._requester,
            hpke.digest(self._kem),
            self._nonce,
            terms.policy.digest(),
            channel,
            now,
        )
        verdict = appraise(raw, terms.policy, terms.collateral, expected, now, terms.anchors)
        if terms.statement is not None:
            terms.statement.check(identity=self._requester.hex(), measurements=verdict.measurements)
        return verdict

    def share(self, share: KeyShare, verdict: Verdict) -> bytes:
        """The share, sealed to the key that the evidence named."""
        if verdict.claims.kem != hpke.digest(self._kem):
            raise KeyRefused("a verdict of another exchange")
        with share.reveal_to_kernel() as view:
            sealed = hpke.seal(self._kem, view, LABEL + self._said.hash)
        return self._said.say("share", {1: sealed}, self._identity)

    def refusal(self, error: AttestationError) -> bytes:
        """Tell who asked, so that he need not guess."""
        texts = [error.step, error.expected, error.got]
        body = {number: text.encode()[:MAX_TEXT] for number, text in enumerate(texts, 1)}
        return self._said.say("refused", body, self._identity)


def rebuild(split: Split, shares: Mapping[int, KeyShare]) -> StorageKey:
    """The key, if it is the one that was split."""
    if len(shares) < split.threshold:
        raise BadInput(f"{len(shares)} shares, {split.threshold} are needed")
    key = shamir.join(shares)
    if not hmac.compare_digest(shamir.check_value(split.key_id, key), bytes.fromhex(split.check)):
        key.wipe()
        raise KeyRefused("the shares do not make the key that was split; the description was changed")
    return key
