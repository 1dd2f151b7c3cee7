"""How two parties admit one another: messages and states, without I/O and without a clock.

A `Pair` is one party's side of one pair for as long as the process lives; an `Exchange` is one connection of
it. Bytes, evidence and the time go in, actions come out; `mimir.admission.bootstrap` connects, has evidence
made and keeps the gate. The party with the lower number *leads*, whoever made the connection.

    leader                                       follower
    HELLO     keys, nonce, digests       <->     HELLO       the caller first
                                         <-      PROOF       signs both HELLOs
    PROOF     this connection it is       ->
    EVIDENCE  for the other's nonce,     <->     EVIDENCE    and a secret sealed to the other's key
    judge                                        judge
    VERDICT   name, tag, certificate     <->     VERDICT
    COMMIT    name                        ->     into the gate
    into the gate                        <-      DONE

Every message but HELLO is signed by its sender's identity over a label, the *channel* (the hash of both
HELLOs, and so of both nonces), kind, sender, receiver and all fields. Evidence is bound to the channel, and
with it to everything that the HELLOs say. The *name* of an exchange is the hash of channel and both
EVIDENCEs. Rules, each of which the model in tests/test_admission.py sees broken when it is taken away:

1. Nobody is in the gate without a verdict on evidence made for a nonce of ours in this channel and for the
   tunnel key of its HELLO, valid at that moment. The end of the verdict ends it, whatever else is going on.
2. The follower acts on COMMIT alone, the leader on DONE alone: by then each has judged the other.
3. A pre-shared key has the name of its exchange. HELLO says which one is in the gate. Where both say the
   same, the tunnel is left alone and the verdicts are renewed; else both take the key of this exchange. So a
   lost DONE, a restart, or a tunnel that does not come up makes a new key, and no two keep different ones.
4. What our HELLO said of the gate must still be so when the peer has proved itself, and from then on until
   the end; else this connection is given up.
5. A peer whose evidence is refused leaves the gate at once. One that merely differs (in policy or
   configuration) or does not answer stays until its verdict ends.
6. Before PROOF a stranger may be speaking: nothing is made for it, and nothing it says is remembered.

A refusal names the step, what was expected and what came. It goes to the other end in a signed VERDICT.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeAlias

import cbor2

from mimir import hpke
from mimir.attest.appraisal import Verdict
from mimir.attest.evidence import HASH, MAX_ENVELOPE, MAX_LIFE, Claims, Envelope, identity_hash
from mimir.attest.trail import Trail, read_canonical_cbor, shown, stamp
from mimir.errors import AttestationError, LocalError
from mimir.net.identity import BadSignature, verify
from mimir.net.messages import MAX_STATEMENT
from mimir.secret import PresharedKey, Secret

VERSION = 1
SIGNATURE = 64
SECRET = 32
MAX_CERTIFICATE = 8 << 10
MAX_NEWS = MAX_STATEMENT  # what is revoked, with a PROOF
MAX_EPOCH = (1 << 62) - 1
MAX_VERDICT = timedelta(hours=1)  # of an admission, and of the certificate for it
MAX_STEP = 64  # characters
CLOCK_SKEW = timedelta(seconds=60)  # between two parties
ENDED, REFUSED = "its verdict has ended", "refused: "  # why a peer is expelled
NONE = bytes(HASH)  # the name of no exchange
_HEAD = struct.Struct("!BBB")  # kind, sender, receiver
_LABEL = b"mimir admission 1\0"


class Kind(enum.IntEnum):
    HELLO = 1
    PROOF = 2
    EVIDENCE = 3
    VERDICT = 4
    COMMIT = 5
    DONE = 6

    @property
    def step(self) -> str:
        return self.name.lower()


#: Bytes between head and signature, at most.
MAX_BODY = {
    Kind.HELLO: 2048,
    Kind.PROOF: MAX_NEWS,
    Kind.EVIDENCE: MAX_ENVELOPE + SECRET + hpke.OVERHEAD + 64,
    Kind.VERDICT: MAX_CERTIFICATE + 1024,
    Kind.COMMIT: HASH,
    Kind.DONE: HASH,
}


def limit_of(kind: Kind) -> int:
    """The length of the longest message of a kind."""
    return _HEAD.size + MAX_BODY[kind] + SIGNATURE


def peek(data: bytes) -> tuple[int, int]:
    """Who says that it speaks, and to whom: to find the `Pair`. Nothing is believed yet."""
    if len(data) < _HEAD.size:
        Trail("hello").refuse("format", f"at least {_HEAD.size} bytes", f"{len(data)} bytes")
    _, sender, receiver = _HEAD.unpack_from(data)
    return sender, receiver


# --- what an exchange stands on ----------------------------------------------------------------------------


class Kem(Protocol):
    """The private key to which peers seal (mimir.hpke.HpkeKey)."""

    @property
    def public(self) -> bytes: ...
    def open(self, sealed: bytes, info: bytes) -> bytearray: ...


@dataclass(frozen=True, eq=False)
class Own:
    """This party from start to end of the process: the keys are fresh in each."""

    party: int
    identity: bytes  # Ed25519 public key
    sign: Callable[[bytes], bytes]
    tunnel: bytes  # WireGuard public key
    kem: Kem
    tls: bytes | None = None  # public key of TLS, where there is one
    seal: Callable[[bytes, bytes, bytes], bytes] = hpke.seal  # (public key, secret, info)
    verify: Callable[[bytes, bytes, bytes], None] = verify  # (public key, message, signature)
    random: Callable[[int], bytes] = os.urandom


class Judge(Protocol):
    """What this party believes at the moment. Refusals are `AttestationError`."""

    @property
    def policy(self) -> bytes:
        """Digest of the policy in force."""
        ...

    @property
    def config(self) -> bytes:
        """Digest of the shared terms."""
        ...

    @property
    def life(self) -> timedelta:
        """How long evidence of ours shall serve."""
        ...

    @property
    def epoch(self) -> int:
        """Of the newest statement of revocation."""
        ...

    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Verdict:
        """Judge evidence (mimir.attest.appraisal)."""
        ...

    def rejudge(self, standing: Standing, now: datetime) -> None:
        """Judge evidence that was admitted under an earlier policy by the one in force."""
        ...

    def revoked(self, identity: bytes, verdict: Verdict | None) -> None:
        """Refuse an identity, or what a verdict names, that has been revoked; and another one's machine."""
        ...

    def news(self, epoch: int) -> bytes:
        """The statement that somebody at this epoch lacks; empty if there is none."""
        ...

    def learn(self, news: bytes) -> None:
        """Take such a statement, after verifying it."""
        ...

    def issue(self, peer: int, verdict: Verdict, tls: bytes | None, until: datetime) -> bytes:
        """The certificate of an admitted peer; empty without a TLS key."""
        ...


@dataclass(frozen=True)
class Hello:
    """What a HELLO says."""

    version: int
    calls: bool  # whether the sender made the connection: a relay between two who were called is none
    identity: bytes
    nonce: bytes
    tunnel: bytes
    kem: bytes
    policy: bytes
    config: bytes
    epoch: int
    tls: bytes | None
    installed: bytes  # name of the exchange whose pre-shared key is in the sender's gate, or NONE

    _LENGTHS = (  # not a field, as it has no annotation
        ("identity", HASH),
        ("nonce", HASH),
        ("tunnel", HASH),
        ("kem", hpke.PUBLIC_BYTES),
        ("policy", HASH),
        ("config", HASH),
        ("installed", HASH),
    )

    def encode(self) -> bytes:
        values = list(vars(self).values())
        return cbor2.dumps(dict(enumerate(values, 1)), canonical=True)

    @classmethod
    def decode(cls, raw: bytes) -> Hello:
        """The inverse, strict; a version that is not ours is named before its other fields are looked at."""
        trail = Trail("hello")
        found = read_canonical_cbor(trail, "format", raw, "a HELLO")
        if not isinstance(found, dict) or type(found.get(1)) is not int:
            trail.refuse("format", "a map with a version", type(found).__name__)
        trail.require(found[1] == VERSION, "version", VERSION, found[1])
        if list(found) != list(range(1, 12)):
            trail.refuse("format", "the keys 1 to 11", ", ".join(map(str, found)))
        hello = cls(*found.values())
        for name, size in cls._LENGTHS:
            value = getattr(hello, name)
            if type(value) is not bytes or len(value) != size:
                trail.refuse("format", f"{name} of {size} bytes", value)
        if hello.tls is not None and (type(hello.tls) is not bytes or len(hello.tls) != HASH):
            trail.refuse("format", f"tls of {HASH} bytes, or none", hello.tls)
        if type(hello.calls) is not bool:
            trail.refuse("format", "calls: true or false", hello.calls)
        if type(hello.epoch) is not int or not 0 <= hello.epoch <= MAX_EPOCH:
            trail.refuse("format", "an epoch", hello.epoch)
        return hello


@dataclass(frozen=True)
class Refusal:
    """Why somebody is not admitted."""

    step: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.step}: expected {self.expected}; got {self.got}"


@dataclass(frozen=True, eq=False)
class Standing:
    """An admitted peer. `installed` names the exchange whose pre-shared key is in the gate."""

    verdict: Verdict
    expected: Claims  # what its evidence was judged against
    evidence: bytes
    since: datetime  # of this verdict
    until: datetime
    installed: bytes
    tunnel: bytes
    kem: bytes  # its public key
    issued: bytes  # the certificate that we gave it
    ours: bytes  # the certificate that it gave us
    ours_until: int

    @property
    def renew_at(self) -> datetime:
        """Two thirds of its life."""
        return self.since + (self.until - self.since) * 2 / 3


# --- actions -----------------------------------------------------------------------------------------------
# To be carried out in order, what concerns the gate comes first; one that fails is answered by `Pair.expel`.


@dataclass(frozen=True)
class Send:
    data: bytes


@dataclass(frozen=True)
class Attest:
    """Have evidence made that is bound to these claims; answer `Exchange.attested`."""

    claims: Claims


@dataclass(frozen=True)
class Admit:
    """Put the peer into the gate; without a key, it is there already and stays as it is."""

    standing: Standing
    preshared: PresharedKey | None


@dataclass(frozen=True)
class Expel:
    """Take the peer out of the gate: tunnel, links and sessions."""

    why: str


@dataclass(frozen=True)
class Drop:
    """Another connection of the same peer has taken this one's place: close it."""

    exchange: Exchange


@dataclass(frozen=True)
class Over:
    """Close this connection. `by` is who refused: "us", "peer", a "stranger", or nobody."""

    refusal: Refusal | None = None
    by: str = ""


Action: TypeAlias = Send | Attest | Admit | Expel | Drop | Over


class Phase(enum.Enum):
    """What an exchange waits for."""

    HELLO = "hello"
    PROOF = "proof"
    EVIDENCE = "evidence"  # of either end
    VERDICT = "verdict"  # of the peer; ours is said
    DECISION = "decision"  # COMMIT or DONE
    OVER = "over"


@dataclass(eq=False, repr=False)
class Pair:
    """One party's side of one pair: who is in the gate, and the exchange that may change it."""

    own: Own
    peer: int
    identity: bytes  # the peer's
    judge: Judge
    standing: Standing | None = None
    current: Exchange | None = None  # the one whose other end has proved itself
    doubted: bool = False  # the tunnel does not come up with the key in the gate

    @property
    def leads(self) -> bool:
        return self.own.party < self.peer

    @property
    def installed(self) -> bytes:
        """What HELLO says of the gate."""
        return NONE if self.standing is None or self.doubted else self.standing.installed

    def due(self, now: datetime) -> bool:
        """Whether an exchange is needed: to get in, to stay in, for another key or under another policy."""
        standing = self.standing
        return (
            standing is None
            or self.doubted
            or now >= standing.renew_at
            or standing.expected.policy != self.judge.policy
        )

    def open(self, calls: bool) -> Exchange:
        """A new connection. `calls`: we made it."""
        return Exchange(self, calls)

    def doubt(self) -> None:
        """The tunnel does not come up: the next exchange is to make a fresh key."""
        self.doubted = self.standing is not None

    def tick(self, now: datetime) -> list[Action]:
        """Expel a peer whose verdict has ended."""
        if self.standing is None or now < self.standing.until:
            return []
        return self.expel(ENDED)

    def reconsider(self, now: datetime) -> list[Action]:
        """The policy has changed, or a revocation has come: judge again what we know of an admitted peer.

        An exchange under way speaks of another policy then, and is given up.
        """
        out: list[Action] = []
        if self.current is not None:
            out.append(Drop(self.current))
            self.current.close()
        if self.standing is not None:
            try:
                self.judge.revoked(self.identity, self.standing.verdict)
                self.judge.rejudge(self.standing, now)
            except AttestationError as error:
                out += self.expel(f"{REFUSED}{error}")
        return out

    def expel(self, why: str) -> list[Action]:
        """Take the peer out of the gate, and give up what would have kept it there."""
        out: list[Action] = []
        if self.current is not None:
            out.append(Drop(self.current))
            self.current.close()
        if self.standing is not None:
            out.append(Expel(why))
        self.standing, self.doubted = None, False
        return out


@dataclass(eq=False, repr=False)
class Exchange:
    """One connection of a pair. After `over` nothing it is given changes anything."""

    pair: Pair
    calls: bool
    phase: Phase = Phase.HELLO
    mine: Hello | None = None
    theirs: Hello | None = None
    channel: bytes = b""
    claims: Claims | None = None  # of our evidence
    name: bytes = b""
    expected: Claims | None = None  # of the peer's
    verdict: Verdict | None = None  # ours of it
    until: datetime | None = None  # its end
    _secret: Secret | None = None  # sealed to the peer
    _received: Secret | None = None  # sealed to us
    _preshared: PresharedKey | None = None
    _tag: bytes = b""  # due from the peer
    _said: bytes = b""  # our EVIDENCE
    _heard: bytes = b""  # the peer's
    _evidence: bytes = b""  # the envelope in it
    _issued: bytes = b""
    _ours: tuple[bytes, int] = (b"", 0)

    @property
    def over(self) -> bool:
        return self.phase is Phase.OVER

    @property
    def proved(self) -> bool:
        """Whether the other end has shown that it is the peer."""
        return self.pair.current is self

    @property
    def limit(self) -> int:
        """The longest message that may come next."""
        return max(limit_of(kind) for kind in self._takes())

    @property
    def fresh(self) -> bool:
        """Whether this exchange makes a new pre-shared key; both ends see it alike."""
        assert self.mine is not None and self.theirs is not None
        return not (self.mine.installed == self.theirs.installed != NONE)

    def close(self) -> None:
        """The connection is over: forget its secrets."""
        self.phase = Phase.OVER
        if self.pair.current is self:
            self.pair.current = None
        self._forget()

    def _forget(self) -> None:
        for secret in (self._secret, self._received, self._preshared):
            if secret is not None:
                secret.wipe()

    # events

    def start(self) -> list[Action]:
        """What the caller says first."""
        return [self._hello()] if self.calls else []

    def receive(self, data: bytes, now: datetime) -> list[Action]:
        """Act on a message. A refusal is an action too; then the exchange is over."""
        if self.over:
            return []
        try:
            kind, body = self._open(data)
            match kind:
                case Kind.HELLO:
                    return self._on_hello(body)
                case Kind.PROOF:
                    return self._on_proof(body, now)
                case Kind.EVIDENCE:
                    return self._on_evidence(body, now)
                case Kind.VERDICT:
                    return self._on_verdict(body)
                case _:
                    return self._on_decision(kind, body, now)
        except _Damning as refused:
            return self._refuse(refused.error, damning=True)
        except AttestationError as error:
            return self._refuse(error)

    def attested(self, envelope: Envelope, now: datetime) -> list[Action]:
        """The evidence that was asked for."""
        if self.over:
            return []
        if self.claims is None or self._said or envelope.claims != self.claims.encode():
            raise LocalError("evidence that this exchange did not ask for")
        assert self.theirs is not None
        self._secret = Secret(bytearray(self.pair.own.random(SECRET)))
        try:
            with self._secret.reveal_to_kernel() as view:
                sealed = self.pair.own.seal(self.theirs.kem, bytes(view), self._info(self.pair.own.party))
        except hpke.SealedToAnother:
            return self._refuse(_error("hello.kem", "a key that can be sealed to", self.theirs.kem))
        self._said = cbor2.dumps({1: envelope.encode(), 2: sealed}, canonical=True)
        return [self._send(Kind.EVIDENCE, self._said), *self._conclude(now)]

    # the start: who is there?

    def _hello(self) -> Send:
        own, judge = self.pair.own, self.pair.judge
        self.mine = Hello(
            VERSION,
            self.calls,
            own.identity,
            own.random(HASH),
            own.tunnel,
            own.kem.public,
            judge.policy,
            judge.config,
            judge.epoch,
            own.tls,
            self.pair.installed,
        )
        return self._send(Kind.HELLO, self.mine.encode())

    def _on_hello(self, body: bytes) -> list[Action]:
        hello, trail = Hello.decode(body), Trail("hello")
        trail.same("identity", self.pair.identity, hello.identity)
        trail.require(
            hello.calls is not self.calls, "caller", "one end that called", "two" if self.calls else "none"
        )
        out: list[Action] = [] if self.mine is not None else [self._hello()]
        assert self.mine is not None
        self.theirs = hello
        first, second = (self.mine, hello) if self.pair.leads else (hello, self.mine)
        self.channel = _hash("channel", self._parties(), first.encode(), second.encode())
        self.phase = Phase.PROOF
        return out if self.pair.leads else [*out, self._prove()]

    def _prove(self) -> Send:
        assert self.theirs is not None
        return self._send(Kind.PROOF, self.pair.judge.news(self.theirs.epoch))

    def _on_proof(self, news: bytes, now: datetime) -> list[Action]:
        """The peer is there: from here on this is the exchange of the pair."""
        pair, hello = self.pair, self.theirs
        assert self.mine is not None and hello is not None
        if self.mine.installed != pair.installed or self.mine.policy != pair.judge.policy:
            return self._abandon()  # what we said has changed since
        out: list[Action] = []
        if pair.current is not None:
            out.append(Drop(pair.current))
            pair.current.close()
        pair.current = self
        try:
            if news:
                pair.judge.learn(news)
            self._check_hello(hello)
        except _Damning as refused:
            return out + self._refuse(refused.error, damning=True)
        except AttestationError as error:
            return out + self._refuse(error)
        if pair.leads:
            out.append(self._prove())
        self.phase = Phase.EVIDENCE
        self.claims = self._claims_of(pair.own.party, self.mine, hello.nonce, pair.peer, now)
        return [*out, Attest(self.claims)]

    def _check_hello(self, hello: Hello) -> None:
        pair, trail = self.pair, Trail("hello")
        trail.same("config", pair.judge.config, hello.config)
        trail.same("policy", pair.judge.policy, hello.policy)
        _judge(lambda: pair.judge.revoked(pair.identity, None))
        if not self.fresh:
            assert pair.standing is not None
            trail.same("tunnel", pair.standing.tunnel, hello.tunnel)
            trail.same("kem", pair.standing.kem, hello.kem)

    def _claims_of(self, party: int, hello: Hello, nonce: bytes, verifier: int, now: datetime) -> Claims:
        """What the evidence of `party` is to be bound to. Its times are the party's own affair."""
        judge = self.pair.judge
        first = int((now - CLOCK_SKEW).timestamp())
        life = min(judge.life + 2 * CLOCK_SKEW, MAX_LIFE)
        return Claims(
            role="party",
            node=f"party{party}",
            identity=identity_hash(hello.identity),
            tunnel=hello.tunnel,
            kem=hpke.digest(hello.kem),
            nonce=nonce,
            nonce_source=f"party{verifier} admission",
            not_before=first,
            not_after=first + int(life.total_seconds()),
            policy=judge.policy,
            channel=self.channel,
            config=judge.config,
        )

    # the middle: what is there?

    def _on_evidence(self, body: bytes, now: datetime) -> list[Action]:
        pair, trail = self.pair, Trail("evidence")
        assert self.mine is not None and self.theirs is not None
        found = read_canonical_cbor(trail, "format", body, "EVIDENCE")
        if (
            not isinstance(found, dict)
            or list(found) != [1, 2]
            or not all(type(each) is bytes for each in found.values())
        ):
            trail.refuse("format", "an envelope and a sealed secret", type(found).__name__)
        try:
            opened = pair.own.kem.open(found[2], self._info(pair.peer))
        except hpke.SealedToAnother as error:
            trail.refuse("sealed", "a secret sealed to our key in this exchange", str(error))
        trail.require(len(opened) == SECRET, "sealed", f"{SECRET} bytes", len(opened))
        self._received = Secret(opened)
        expected = self._claims_of(pair.peer, self.theirs, self.mine.nonce, pair.own.party, now)
        verdict = _judge(lambda: pair.judge.appraise(found[1], expected, now))
        _judge(lambda: pair.judge.revoked(pair.identity, verdict))
        self.expected, self.verdict = expected, verdict
        self.until = min(
            verdict.valid_until,
            now + MAX_VERDICT,
            datetime.fromtimestamp(verdict.claims.not_after, now.tzinfo),
        )
        self._heard, self._evidence = body, found[1]
        return self._conclude(now)

    def _conclude(self, now: datetime) -> list[Action]:
        """Say our verdict once both EVIDENCEs are there, of which it names the hash."""
        if not self._said or not self._heard:
            return []
        pair = self.pair
        assert self.verdict is not None and self.until is not None and self.theirs is not None
        first, second = (self._said, self._heard) if pair.leads else (self._heard, self._said)
        self.name = _hash("name", self.channel, first, second)
        tag = self._derive()
        self._issued = pair.judge.issue(pair.peer, self.verdict, self.theirs.tls, self.until)
        self.phase = Phase.VERDICT
        fields = {1: True, 2: self.name, 3: tag, 4: self._issued, 5: int(self.until.timestamp())}
        return [self._send(Kind.VERDICT, cbor2.dumps(fields, canonical=True))]

    def _derive(self) -> bytes:
        """HKDF (RFC 5869) of both secrets: the pre-shared key, and a tag of each end that shows it has it."""
        assert self._secret is not None and self._received is not None
        with self._secret.reveal_to_kernel() as mine, self._received.reveal_to_kernel() as theirs:
            both = bytearray(mine) + theirs if self.pair.leads else bytearray(theirs) + mine
        with Secret(both) as secret, secret.reveal_to_kernel() as view:
            root = Secret(bytearray(hmac.digest(_LABEL + self.name, view, "sha256")))
        with root, root.reveal_to_kernel() as key:
            self._preshared = PresharedKey(bytearray(hmac.digest(key, b"tunnel\1", "sha256")))
            tags = [hmac.digest(key, b"tag" + bytes([who, 1]), "sha256") for who in self._parties()]
        self._secret.wipe()
        self._received.wipe()
        ours, self._tag = tags if self.pair.leads else reversed(tags)
        return ours

    def _on_verdict(self, body: bytes) -> list[Action]:
        trail = Trail("verdict")
        found = read_canonical_cbor(trail, "format", body, "a VERDICT")
        if not isinstance(found, dict) or type(found.get(1)) is not bool:
            trail.refuse("format", "a verdict", type(found).__name__)
        if not found[1]:
            texts = [found.get(n) for n in (2, 3, 4)]
            if len(found) != 4 or not all(type(each) is str for each in texts):
                trail.refuse("format", "step, expected and got", type(found).__name__)
            step, expected, got = (shown(each) or "nothing" for each in texts)
            refusal = Refusal(step[:MAX_STEP], expected, got)
            self.close()
            return [Over(refusal, "peer")]
        kinds = (bool, bytes, bytes, bytes, int)
        if list(found) != [1, 2, 3, 4, 5] or any(
            type(value) is not kind for value, kind in zip(found.values(), kinds, strict=True)
        ):
            trail.refuse("format", "name, tag, certificate and end", type(found).__name__)
        trail.require(
            self.phase is Phase.VERDICT, "order", f"a message in phase {self.phase.value}", "VERDICT"
        )
        trail.same("name", self.name, found[2])
        trail.require(
            hmac.compare_digest(self._tag, found[3]), "key", "the secrets of this exchange", "others"
        )
        trail.require(
            len(found[4]) <= MAX_CERTIFICATE, "format", f"at most {MAX_CERTIFICATE} bytes", len(found[4])
        )
        trail.require(0 <= found[5] < 1 << 33, "format", "seconds since 1970", found[5])
        self._ours = (found[4], found[5])
        self.phase = Phase.DECISION
        return [self._send(Kind.COMMIT, self.name)] if self.pair.leads else []

    # the end: into the gate

    def _on_decision(self, kind: Kind, name: bytes, now: datetime) -> list[Action]:
        pair, trail = self.pair, Trail(kind.step)
        assert self.verdict is not None and self.until is not None and self.theirs is not None
        trail.same("name", self.name, name)
        verdict = self.verdict
        trail.require(now < self.until, "dates", f"a verdict that lasts beyond {stamp(now)}", self.until)
        _judge(lambda: pair.judge.revoked(pair.identity, verdict))
        installed, preshared = self.name, self._preshared
        if not self.fresh:
            assert pair.standing is not None  # else `expel` has closed this exchange
            installed, preshared = pair.standing.installed, None
        assert self.expected is not None
        pair.standing = Standing(
            verdict,
            self.expected,
            self._evidence,
            now,
            self.until,
            installed,
            self.theirs.tunnel,
            self.theirs.kem,
            self._issued,
            *self._ours,
        )
        pair.doubted = False
        if preshared is not None:
            self._preshared = None  # the gate has it now
        self.close()
        out: list[Action] = [Admit(pair.standing, preshared)]
        return [*out, Over()] if pair.leads else [*out, self._send(Kind.DONE, self.name), Over()]

    # refusals

    def _refuse(self, error: AttestationError, damning: bool = False) -> list[Action]:
        """Tell the peer, if it is the peer; what a stranger said wrong is no news to anybody."""
        refusal = Refusal(error.step, error.expected or "nothing", error.got or "nothing")
        if not self.proved:
            self.close()
            return [Over(refusal, "stranger")]
        fields = {1: False, 2: refusal.step, 3: refusal.expected, 4: refusal.got}
        verdict = self._send(Kind.VERDICT, cbor2.dumps(fields, canonical=True))
        self.close()
        out = self.pair.expel(f"{REFUSED}{refusal}") if damning else []
        return [*out, verdict, Over(refusal, "us")]

    def _abandon(self) -> list[Action]:
        self.close()
        return [Over()]

    # messages

    def _parties(self) -> bytes:
        """Leader and follower."""
        return bytes(sorted((self.pair.own.party, self.pair.peer)))

    def _info(self, sender: int) -> bytes:
        """What a sealed secret is bound to."""
        return _LABEL + b"secret\0" + bytes([sender]) + self.channel

    def _send(self, kind: Kind, body: bytes) -> Send:
        head = _HEAD.pack(kind, self.pair.own.party, self.pair.peer)
        if kind is Kind.HELLO:
            return Send(head + body)
        return Send(head + body + self.pair.own.sign(_LABEL + self.channel + head + body))

    def _takes(self) -> set[Kind]:
        """What may come now. A VERDICT may: the peer may refuse at any time once it knows who we are."""
        match self.phase:
            case Phase.HELLO:
                return {Kind.HELLO}
            case Phase.PROOF:
                return {Kind.PROOF, Kind.VERDICT}
            case Phase.EVIDENCE:
                return {Kind.VERDICT} if self._heard else {Kind.EVIDENCE, Kind.VERDICT}
            case Phase.DECISION:
                return {Kind.DONE if self.pair.leads else Kind.COMMIT, Kind.VERDICT}
            case _:
                return {Kind.VERDICT}

    def _open(self, data: bytes) -> tuple[Kind, bytes]:
        """Kind and body of a message that is due, and that the peer signed for this channel."""
        trail = Trail("message")
        if len(data) < _HEAD.size:
            trail.refuse("format", f"at least {_HEAD.size} bytes", f"{len(data)} bytes")
        number, sender, receiver = _HEAD.unpack_from(data)
        if number not in Kind.__members__.values():
            trail.refuse("format", "a kind of message", number)
        kind, pair = Kind(number), self.pair
        trail = Trail(kind.step)
        trail.require(
            (sender, receiver) == (pair.peer, pair.own.party),
            "party",
            f"from {pair.peer} to {pair.own.party}",
            f"from {sender} to {receiver}",
        )
        due = self._takes()
        trail.require(kind in due, "order", " or ".join(sorted(each.name for each in due)), kind.name)
        if kind is Kind.HELLO:
            body, signature = data[_HEAD.size :], None
        else:
            body, signature = data[_HEAD.size : -SIGNATURE], data[-SIGNATURE:]
        least = _HEAD.size + (SIGNATURE if signature is not None else 0)
        if len(data) < least or len(body) > MAX_BODY[kind]:
            trail.refuse("format", f"{least} to {limit_of(kind)} bytes", f"{len(data)} bytes")
        if signature is not None:
            try:
                signed = _LABEL + self.channel + data[: _HEAD.size] + body
                pair.own.verify(pair.identity, signed, signature)
            except BadSignature:
                trail.refuse(
                    "signature", f"party {pair.peer}'s, for this channel", "one that does not verify"
                )
        return kind, body


class _Damning(Exception):
    """A refusal of what the peer is, not of what it said."""

    def __init__(self, error: AttestationError) -> None:
        super().__init__(str(error))
        self.error = error


def _judge(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except AttestationError as error:
        raise _Damning(error) from None


def _error(step: str, expected: Any, got: Any) -> AttestationError:
    return AttestationError(step, shown(expected), shown(got))


def _hash(what: str, *parts: bytes) -> bytes:
    whole = hashlib.sha256(_LABEL + what.encode() + b"\0")
    for part in parts:
        whole.update(len(part).to_bytes(4, "big") + part)
    return whole.digest()
