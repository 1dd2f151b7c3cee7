"""Admission: the messages with real keys and real evidence, and every state of a pair, explored to the end.

The model at the end runs two real state machines over a network that may lose, repeat, delay and reorder
every message, for ever, and move it to any connection; either end may crash, be revoked or splice evidence.
Keys, signatures and evidence are symbols there.
"""

from __future__ import annotations

import hashlib
import secrets
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import attest_pki as pki
import cbor2
import pytest

from mimir import hpke
from mimir.admission import exchange
from mimir.admission.exchange import (
    NONE,
    Admit,
    Attest,
    Drop,
    Exchange,
    Expel,
    Kind,
    Over,
    Own,
    Pair,
    Phase,
    Send,
    Standing,
)
from mimir.attest import policy as policies
from mimir.attest.appraisal import appraise
from mimir.attest.collateral import Collateral
from mimir.attest.evidence import Claims, Envelope, expect
from mimir.attest.trail import Trail
from mimir.errors import AttestationError, LocalError
from mimir.net.identity import BadSignature, Identity

START = datetime(2026, 11, 26, 12, tzinfo=UTC)

# --- two real machines -------------------------------------------------------------------------------------

TPM = pki.Tpm()
POLICY = f"""
format = 1
name = "mesh"
version = {{version}}
environment = "simulation"
not_after = 2028-01-01T00:00:00Z
[[allow]]
id = "it"
kind = "swtpm"
ak_names = ["{TPM.name}"]
pcrs = {{{{ "0" = ["{"00" * 32}"], "7" = ["{"07" * 32}"] }}}}
"""


def policy_of(version: int = 1) -> policies.Policy:
    return policies.parse(tomllib.loads(POLICY.format(version=version)), Path("policy.toml").absolute())


def quoted(claims: Claims, carried: Claims | None = None, **pcrs: bytes) -> Envelope:
    """Evidence of a software TPM of ours, bound to `claims`; `pcrs` by number, such as `n7`."""
    own = replace(TPM, pcrs=TPM.pcrs | {int(name[1:]): value for name, value in pcrs.items()})
    quote, signature = own.quote(claims.qualifying_data())
    parts = {"quote": quote, "signature": signature, "pcrs": {"sha256": own.pcrs}, "ak": own.public()}
    return Envelope("swtpm", cbor2.dumps(parts, canonical=True), (carried or claims).encode())


@dataclass
class Believer:
    """Judges as a party does, by a policy in memory."""

    wanted: policies.Policy
    config: bytes = bytes(32)
    life: timedelta = timedelta(hours=1)
    epoch: int = 0
    gone: set[bytes] = field(default_factory=set)

    @property
    def policy(self) -> bytes:
        return self.wanted.digest()

    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Any:
        return appraise(raw, self.wanted, Collateral(), expected, now)

    def rejudge(self, standing: Standing, now: datetime) -> None: ...

    def revoked(self, identity: bytes, verdict: Any) -> None:
        Trail("revoked").require(identity not in self.gone, "identity", "one in force", identity)

    def news(self, epoch: int) -> bytes:
        return b"more is revoked" if self.epoch > epoch else b""

    def learn(self, news: bytes) -> None:
        Trail("revocation").require(news == b"more is revoked", "signatures", "of owners", news)
        self.epoch += 1

    def issue(self, peer: int, verdict: Any, tls: bytes | None, until: datetime) -> bytes:
        return b"certificate for " + bytes([48 + peer])


class Two:
    """Leader 0 and follower 1 with real keys; actions are carried out at once, messages wait in `post`."""

    def __init__(self) -> None:
        self.identities = [Identity.generate(), Identity.generate()]
        self.judges = [Believer(policy_of()), Believer(policy_of())]
        self.kems = [hpke.HpkeKey(), hpke.HpkeKey()]
        self.now = START
        self.pairs = [self.fresh(0), self.fresh(1)]
        self.ends: list[Exchange] = []
        self.gates: list[Any] = [None, None]
        self.attest: list[Callable[[Claims], Envelope]] = [quoted, quoted]
        self.lost: Callable[[int, bytes], bool] = lambda node, data: False
        self.connect()

    def fresh(self, node: int) -> Pair:
        """A party that has just started."""
        identity, kem = self.identities[node], self.kems[node]
        own = Own(node, identity.public, identity.sign, secrets.token_bytes(32), kem, bytes([node]) * 32)
        return Pair(own, 1 - node, self.identities[1 - node].public, self.judges[node])

    def connect(self, caller: int = 0) -> None:
        self.post: list[tuple[int, bytes]] = []
        self.done: list[list[Any]] = [[], []]
        self.ends = [self.pairs[node].open(node == caller) for node in (0, 1)]
        self.act(caller, self.ends[caller].start())

    def act(self, node: int, actions: list[Any]) -> None:
        for action in actions:
            self.done[node].append(action)
            match action:
                case Send(data):
                    if not self.lost(node, data):
                        self.post.append((1 - node, data))
                case Attest(claims):
                    self.act(node, self.ends[node].attested(self.attest[node](claims), self.now))
                case Admit(standing, preshared):
                    if preshared is not None:
                        with preshared.reveal_to_kernel() as view:
                            self.gates[node] = standing.tunnel, bytes(view)
                case Expel():
                    self.gates[node] = None

    def deliver(self) -> None:
        node, data = self.post.pop(0)
        self.act(node, self.ends[node].receive(data, self.now))

    def settle(self) -> list[Any]:
        """Deliver all; how it ended at both."""
        while self.post:
            self.deliver()
        return [next((each for each in done if isinstance(each, Over)), None) for done in self.done]

    def again(self, caller: int = 0) -> list[Any]:
        self.connect(caller)
        return self.settle()

    def admitted(self) -> bool:
        return all(gate is not None for gate in self.gates) and self.gates[0][1] == self.gates[1][1]

    def signed(self, node: int, data: bytes, body: bytes) -> bytes:
        """A message with another body, by its own sender for this channel: what a cheating peer can send."""
        whole = data[:3] + body
        return whole + self.identities[node].sign(exchange._LABEL + self.ends[node].channel + whole)


OVER = [Over(), Over()]


def test_each_is_admitted_by_its_evidence_and_renewed_without_touching_the_tunnel() -> None:
    two = Two()
    assert two.settle() == OVER and two.admitted()
    for node, pair in enumerate(two.pairs):
        standing = pair.standing
        assert standing is not None and two.gates[node][0] == two.pairs[1 - node].own.tunnel
        assert standing.verdict.simulated and standing.verdict.entry == "it"
        assert standing.verdict.claims.nonce_source == f"party{node} admission"
        assert standing.ours == b"certificate for " + bytes([48 + node])
        assert standing.until == START + timedelta(hours=1)
        assert standing.renew_at == START + timedelta(minutes=40)
        assert not pair.due(START + timedelta(minutes=39)) and pair.due(standing.renew_at)
    first, keys = [pair.standing for pair in two.pairs], [*two.gates]
    two.now += timedelta(minutes=45)
    assert two.again(caller=1) == OVER
    for node, pair in enumerate(two.pairs):
        before, now = first[node], pair.standing
        assert before is not None and now is not None
        assert now.until == two.now + timedelta(hours=1) and now.evidence != before.evidence
        assert now.installed == before.installed
        assert [each.preshared for each in two.done[node] if isinstance(each, Admit)] == [None]
    assert two.gates == keys
    assert all(pair.tick(two.now) == [] for pair in two.pairs)
    assert [pair.tick(two.now + timedelta(hours=1)) for pair in two.pairs] == [[Expel(exchange.ENDED)]] * 2


@pytest.mark.parametrize("caller", [0, 1])
def test_a_restarted_party_or_a_tunnel_that_stays_down_gets_a_fresh_key(caller: int) -> None:
    two = Two()
    two.settle()
    seen = {two.gates[0][1]}
    two.pairs[caller], two.gates[caller] = two.fresh(caller), None
    assert two.again(caller) == OVER and two.admitted()
    seen.add(two.gates[0][1])
    two.pairs[caller].doubt()
    assert two.pairs[caller].due(two.now) and not two.pairs[1 - caller].due(two.now)
    assert two.again(caller) == OVER and two.admitted()
    seen.add(two.gates[0][1])
    assert len(seen) == 3
    # The last word is lost: the follower has the next key, the leader the old one; and then neither has both.
    two.pairs[0].doubt()
    two.lost = lambda node, data: data[0] == Kind.DONE
    two.again()
    assert not two.admitted()
    two.lost = lambda node, data: False
    assert two.again() == OVER and two.admitted()


def ended(two: Two) -> list[tuple[str, str]]:
    return [(over.by, over.refusal.step) if over and over.refusal else ("", "") for over in two.settle()]


def test_a_refusal_names_its_step_at_both_ends() -> None:
    two = Two()
    two.attest[1] = lambda claims: quoted(claims, n7=b"?" * 32)
    assert ended(two) == [("us", "policy.pcr7"), ("peer", "policy.pcr7")]
    refused = [next(each for each in done if isinstance(each, Over)).refusal for done in two.done]
    assert refused[0] == refused[1] and "3f3f" in refused[0].got and "0707" in refused[0].expected
    assert two.gates == [None, None]
    for judge, step in ((replace(two.judges[1], config=b"c" * 32), "hello.config"), (None, "hello.policy")):
        two = Two()
        two.pairs[1].judge = judge or Believer(policy_of(2))
        two.connect()
        assert ("us", step) in ended(two) and not any(two.gates)
    two = Two()
    two.judges[0].gone.add(two.identities[1].public)
    assert ended(two) == [("us", "revoked.identity"), ("peer", "revoked.identity")]
    assert not any(isinstance(each, Attest) for each in two.done[0])


def test_what_is_refused_leaves_the_gate_and_what_merely_differs_stays() -> None:
    two = Two()
    two.settle()
    two.pairs[1].judge = Believer(policy_of(2))
    two.connect()
    ended(two)
    assert two.gates[0] is not None
    two.pairs[1].judge = two.judges[1]
    two.attest[1] = lambda claims: quoted(claims, n0=b"?" * 32)
    two.connect()
    ended(two)
    assert two.gates[0] is None and two.gates[1] is not None
    assert two.done[0].index(next(a for a in two.done[0] if isinstance(a, Expel))) < len(two.done[0]) - 2
    two = Two()
    two.settle()
    two.connect()
    while not two.ends[0].proved:
        two.deliver()
    two.judges[0].gone.add(two.identities[1].public)
    two.act(0, two.pairs[0].reconsider(two.now))
    assert two.gates[0] is None and two.ends[0].over


def test_replays_and_splices_are_refused_by_name() -> None:
    """The follower is who it says, and shows genuine evidence, but not for this: for another nonce, another
    channel, another's tunnel or encapsulation key, another's identity, or for claims that nobody signed."""
    first = Two()
    old: list[bytes] = []
    cases: dict[str, Callable[[Claims], Envelope]] = {
        "claims.nonce": lambda claims: Envelope.decode(old[0]),
        "claims.channel": lambda claims: quoted(replace(claims, channel=b"c" * 32)),
        "claims.tunnel": lambda claims: quoted(replace(claims, tunnel=first.pairs[1].own.tunnel)),
        "claims.kem": lambda claims: quoted(replace(claims, kem=first.kems[1].digest)),
        "claims.identity": lambda claims: quoted(replace(claims, identity=b"i" * 32)),
        "claims.node": lambda claims: quoted(replace(claims, node="party2")),
        "claims.role": lambda claims: quoted(replace(claims, role="client")),
        "claims.nonce_source": lambda claims: quoted(replace(claims, nonce_source="a client")),
        "claims.policy": lambda claims: quoted(replace(claims, policy=b"p" * 32)),
        "claims.config": lambda claims: quoted(replace(claims, config=b"p" * 32)),
        "claims.dates": lambda claims: quoted(
            replace(claims, not_before=claims.not_before - 9000, not_after=claims.not_before - 8000)
        ),
        "claims.binding": lambda claims: quoted(replace(claims, nonce=b"n" * 32), carried=claims),
    }
    for step, make in cases.items():
        two = Two()
        two.settle()
        assert two.pairs[0].standing is not None
        old[:] = [two.pairs[0].standing.evidence]
        two.connect()

        def cheat(own: Claims, make: Callable[[Claims], Envelope] = make, two: Two = two) -> Envelope:
            envelope = make(own)
            two.ends[1].claims = Claims.decode(envelope.claims, Trail("test"))  # its machine is what cheats
            return envelope

        two.attest[1] = cheat
        assert ended(two) == [("us", step), ("peer", step)], step
        assert two.gates[0] is None


def test_secrets_sealed_to_another_key_or_for_another_exchange_admit_nobody() -> None:
    other = Two()
    while other.post and other.post[0][1][0] != Kind.EVIDENCE:
        other.deliver()
    foreign = cbor2.loads(other.post[0][1][3:-64])[2]
    for sealed, step in (
        (foreign, "evidence.sealed"),
        (lambda two: hpke.seal(two.kems[0].public, bytes(32), b"another"), "evidence.sealed"),
        (lambda two: hpke.seal(two.kems[0].public, bytes(31), two.ends[1]._info(1)), "evidence.sealed"),
        (lambda two: hpke.seal(two.kems[0].public, bytes(32), two.ends[1]._info(1)), "verdict.key"),
    ):
        two = Two()
        while not (two.post and two.post[0][0] == 0 and two.post[0][1][0] == Kind.EVIDENCE):
            two.deliver()
        data = two.post[0][1]
        body = cbor2.loads(data[3:-64])
        body[2] = sealed(two) if callable(sealed) else sealed
        two.post[0] = (0, two.signed(1, data, cbor2.dumps(body, canonical=True)))
        if step == "verdict.key":  # the cheat says one secret and uses another, and names what it said
            two.ends[1]._said = cbor2.dumps(body, canonical=True)
            two.ends[1].name = b""
        ends = ended(two)
        assert ("us", step) in ends or ("us", "verdict.name") in ends, (step, ends)
        assert two.gates == [None, None]


def stages(caller: int) -> Iterator[tuple[Two, int, bytes]]:
    """Every message of an exchange, at the moment before it is delivered."""
    stop = 0
    while True:
        two = Two()
        two.connect(caller)
        for _ in range(stop):
            two.deliver()
        if not two.post:
            return
        yield two, *two.post[0]
        stop += 1


def altered(data: bytes, rng: Any) -> list[bytes]:
    at, bit = int(rng.integers(len(data))), 1 << int(rng.integers(8))
    return [data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :], data[:-1], data + b"x", data[:2]]


@pytest.mark.parametrize("caller, hows", [(0, [0]), (1, [1, 2, 3])])
def test_an_altered_message_admits_nobody(caller: int, hows: list[int], rng: Any) -> None:
    kinds = set()
    for count, (two, node, data) in enumerate(stages(caller)):
        how = hows[count % len(hows)]
        kinds.add(Kind(data[0]))
        before = two.gates[node]
        two.post[0] = node, altered(data, rng)[how]
        two.settle()
        over = next((each for each in two.done[node] if isinstance(each, Over)), None)
        if (
            data[0] != Kind.HELLO
        ):  # what a HELLO says otherwise is found at the PROOF, by whoever gets it first
            assert over is not None and over.refusal is not None and over.by in ("us", "stranger")
        assert not two.admitted() and two.gates[node] == before
    assert kinds == set(Kind)


def test_reflected_reordered_and_repeated_messages_admit_nobody() -> None:
    for caller in (0, 1):
        for two, node, data in stages(caller):
            sender = two.ends[1 - node]
            if not sender.over:
                reflected = sender.receive(data, two.now)
                assert isinstance(reflected[-1], Over) and reflected[-1].refusal is not None
                assert reflected[-1].refusal.step.endswith((".party", ".order"))
        for two, node, data in stages(caller):
            two.deliver()
            end = two.ends[node]
            if not end.over:
                again = end.receive(data, two.now)
                assert isinstance(again[-1], Over) and again[-1].refusal is not None
                assert again[-1].refusal.step.endswith(".order")
    two = Two()
    while two.post and two.post[0][1][0] != Kind.EVIDENCE:
        two.deliver()
    early = [each for each in two.post if each[1][0] == Kind.EVIDENCE]
    two = Two()
    node, data = early[0]
    assert isinstance(two.ends[node].receive(data, two.now)[-1], Over)


def test_a_relay_between_two_who_were_called_is_no_connection() -> None:
    two = Two()
    for calls in (False, True):
        ends = [pair.open(calls) for pair in two.pairs]
        hello = ends[0]._hello().data
        (over,) = ends[1].receive(hello, two.now)
        assert isinstance(over, Over) and over.refusal is not None and over.refusal.step == "hello.caller"


def test_strangers_are_told_nothing_and_cost_nothing() -> None:
    """Who has not proved to be the peer gets no evidence, no verdict, and leaves no trace in the pair."""
    two, other = Two(), Two()
    stranger = other.pairs[1].open(True)
    hello = stranger.start()[0].data
    (over,) = two.pairs[0].open(False).receive(hello, two.now)
    assert over.by == "stranger" and over.refusal.step == "hello.identity"
    # With the right name, and without the key behind it.
    fake = Own(1, two.identities[1].public, other.identities[1].sign, bytes(32), other.kems[1])
    pair = Pair(fake, 0, two.identities[0].public, two.judges[1])
    end, claimed = two.pairs[0].open(False), pair.open(True)
    answer = end.receive(claimed.start()[0].data, two.now)
    proof = claimed.receive(answer[0].data, two.now)[0].data
    (over,) = end.receive(proof, two.now)
    assert over.by == "stranger" and over.refusal.step == "proof.signature"
    assert two.pairs[0].current is None and two.pairs[0].standing is None


def test_versions_and_forms_are_exact() -> None:
    two = Two()
    good = cbor2.loads(two.post[0][1][3:])
    head = two.post[0][1][:3]
    cases: list[tuple[Any, str]] = [
        (good | {1: 2}, "hello.version"),
        ({1: 2}, "hello.version"),
        ({k: v for k, v in good.items() if k != 10}, "hello.format"),
        (good | {12: 0}, "hello.format"),
        (good | {9: -1}, "hello.format"),
        (good | {2: 1}, "hello.format"),
        (good | {4: bytes(31)}, "hello.format"),
        (good | {10: bytes(31)}, "hello.format"),
        (good | {5: b"short"}, "hello.format"),
        ([1], "hello.format"),
    ]
    for value, step in cases:
        (over,) = two.pairs[1].open(False).receive(head + cbor2.dumps(value, canonical=True), two.now)
        assert over.refusal.step == step, value
    for raw in (head, head[:2], b"\0" + head[1:], head + b"\xff" * 5000):
        (over,) = two.pairs[1].open(False).receive(raw, two.now)
        assert over.by == "stranger"
    with pytest.raises(AttestationError, match=r"hello\.format"):
        exchange.peek(b"\1")
    assert exchange.peek(head) == (0, 1)


def test_news_of_revocations_travels_with_the_proof() -> None:
    two = Two()
    two.judges[0].epoch = 1
    assert two.settle() == OVER and two.judges[1].epoch == 1
    two = Two()
    two.judges[1].epoch = 1
    two.judges[1].news = lambda epoch: b"forged"  # type: ignore[method-assign]
    assert ended(two) == [("us", "revocation.signatures"), ("peer", "revocation.signatures")]


def test_evidence_that_nobody_asked_for_is_a_bug() -> None:
    two = Two()
    with pytest.raises(LocalError):
        two.ends[0].attested(quoted(claims_of_nobody()), two.now)


def claims_of_nobody() -> Claims:
    blob = bytes(32)
    return Claims("party", "x", blob, blob, None, blob, "x", 0, 1, blob, None, blob)


# --- the model ---------------------------------------------------------------------------------------------


@cache
def symbol(*name: Any) -> bytes:
    return hashlib.blake2b(repr(name).encode(), digest_size=32).digest()


def symbolic_verify(public: bytes, message: bytes, signature: bytes) -> None:
    if symbol("signature", public, message) + bytes(32) != signature:
        raise BadSignature("no")


def symbolic_seal(public: bytes, secret: bytes, info: bytes) -> bytes:
    return symbol("sealed", public, info) + secret


@dataclass(frozen=True)
class SymbolicKem:
    public: bytes

    def open(self, sealed: bytes, info: bytes) -> bytearray:
        if sealed[:32] != symbol("sealed", self.public, info):
            raise hpke.SealedToAnother("no")
        return bytearray(sealed[32:])


@dataclass(frozen=True)
class SymbolicVerdict:
    claims: Claims
    valid_until: datetime


def evidence(machine: str, claims: Claims) -> Envelope:
    """What a machine signs, be it wanted or not."""
    return Envelope("swtpm", symbol("quote", machine, claims.encode()) + machine.encode(), claims.encode())


@cache
def symbolic_appraise(raw: bytes, expected: Claims, now: datetime) -> SymbolicVerdict | AttestationError:
    envelope, trail = Envelope.decode(raw), Trail("model")
    machine = envelope.evidence[32:].decode()
    try:
        own = expect(Claims.decode(envelope.claims, Trail("claims")), expected, now, Trail("claims"))
        trail.require(machine.startswith("good"), "measurement", "good", machine)
        trail.same("binding", symbol("quote", machine, own.encode()), envelope.evidence[:32])
    except AttestationError as error:
        return AttestationError(error.step, error.expected, error.got)
    return SymbolicVerdict(own, now + timedelta(hours=1))


@dataclass(frozen=True)
class SymbolicJudge:
    """Wants evidence of a "good" machine for the claims that it expects."""

    world: World
    node: int
    policy = symbol("policy")
    config = symbol("config")
    life = timedelta(hours=1)
    epoch = 0

    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Any:
        found = symbolic_appraise(raw, expected, now)
        if isinstance(found, AttestationError):
            raise found
        return found

    def revoked(self, identity: bytes, verdict: Any) -> None:
        gone = (self.node, identity) in self.world.revoked
        Trail("model").require(not gone, "revoked", "an identity in force", identity)

    def rejudge(self, standing: Standing, now: datetime) -> None: ...

    def news(self, epoch: int) -> bytes:
        return b""

    def learn(self, news: bytes) -> None: ...

    def issue(self, peer: int, verdict: Any, tls: bytes | None, until: datetime) -> bytes:
        return b""


class BelievesAnyNonce(SymbolicJudge):
    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Any:
        carried = Claims.decode(Envelope.decode(raw).claims, Trail("claims"))
        lax = replace(expected, nonce=carried.nonce, channel=carried.channel)
        return super().appraise(raw, lax, now)


class BelievesAnyTunnel(SymbolicJudge):
    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Any:
        carried = Claims.decode(Envelope.decode(raw).claims, Trail("claims"))
        return super().appraise(raw, replace(expected, tunnel=carried.tunnel), now)


class BelievesAnyMachine(SymbolicJudge):
    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Any:
        return SymbolicVerdict(expected, now + timedelta(hours=1))


class Broken(Exception):
    """A property does not hold."""


Machine = type[Exchange]


@dataclass(frozen=True)
class InGate:
    tunnel: bytes
    preshared: bytes


@dataclass(frozen=True)
class Said:
    """A message, and what of it the network may look at: where it is of any use."""

    to: int
    data: bytes
    channel: bytes


IDENTITIES = (symbol("identity", 0), symbol("identity", 1))


class World:
    """Two nodes, what was ever said, all evidence ever made, and how much may still happen."""

    def __init__(
        self,
        machine: Machine,
        pairs: type[Pair],
        *,
        opens: int,
        crashes: int = 0,
        hours: int = 0,
        splices: int = 0,
        revocations: int = 0,
        machines: tuple[str, str] = ("good0", "good1"),
        judge: type[SymbolicJudge] = SymbolicJudge,
        thief: bool = False,
        live: int = 1,
        anything: bool = False,
    ) -> None:
        self.anything = anything
        self.judge, self.thief = judge, thief
        self.machine, self.pairs_of, self.machines = machine, pairs, machines
        self.opens, self.crashes = [opens, opens], [crashes, crashes]
        self.hours, self.splices, self.revocations, self.limit = hours, splices, revocations, live
        self.now = START
        self.lives, self.counts = [0, 0], [0, 0]
        self.revoked: frozenset[tuple[int, bytes]] = frozenset()
        self.said: frozenset[Said] = frozenset()
        self.made: dict[bytes, tuple[int, bytes]] = {}  # envelope -> at which node, for which channel
        self.words: frozenset[tuple[int, Kind, bytes]] = frozenset()  # who has said what of which exchange
        self.fresh: list[Said] = []
        self.gates: list[InGate | None] = [None, None]
        self.live: list[list[Exchange]] = [[], []]
        self.pairs = [self._start(0), self._start(1)]

    def _own(self, node: int) -> Own:
        life = self.lives[node]
        identity = IDENTITIES[node]
        return Own(
            node,
            identity,
            lambda message: symbol("signature", identity, message) + bytes(32),
            symbol("tunnel of another") if self.thief and node == 1 else symbol("tunnel", node, life),
            SymbolicKem(symbol("kem", node, life).ljust(hpke.PUBLIC_BYTES, b"k")),
            seal=symbolic_seal,
            verify=symbolic_verify,
            random=lambda size: self.count(node),
        )

    def _start(self, node: int) -> Pair:
        return self.pairs_of(self._own(node), 1 - node, IDENTITIES[1 - node], self.judge(self, node))

    def count(self, node: int) -> bytes:
        self.counts[node] += 1
        return symbol("random", node, self.lives[node], self.counts[node])

    def copy(self, *nodes: int) -> World:
        """A world of its own as far as these nodes go; what the other one holds may be shared."""
        other = object.__new__(World)
        other.__dict__.update(self.__dict__)
        for name in ("opens", "crashes", "lives", "counts", "gates", "pairs"):
            setattr(other, name, [*getattr(self, name)])
        other.live, other.fresh = [*self.live], []
        for node in nodes:
            pair = object.__new__(type(self.pairs[node]))
            pair.__dict__.update(self.pairs[node].__dict__)
            pair.own, pair.judge = other._own(node), other.judge(other, node)
            twins = []
            for each in self.live[node]:
                twin = object.__new__(type(each))
                twin.__dict__.update(each.__dict__)
                twin.pair = pair
                for name in ("_secret", "_received", "_preshared"):  # wiped at their time in each world
                    secret = getattr(each, name)
                    if secret is not None and secret.size:
                        with secret.reveal_to_kernel() as view:
                            setattr(twin, name, type(secret)(bytearray(view)))
                if self.pairs[node].current is each:
                    pair.current = twin
                twins.append(twin)
            other.pairs[node], other.live[node] = pair, twins
        return other

    def key(self, whole: bool = True) -> tuple[Any, ...]:
        """Equal for worlds of equal futures; without `whole`, if all connections there are get cut."""
        nodes = tuple(
            (
                pair.standing and (pair.standing.installed, pair.standing.until, pair.standing.tunnel),
                pair.doubted,
                self.gates[node],
            )
            for node, pair in enumerate(self.pairs)
        )
        key = (nodes, *self.lives, self.now, self.revoked)
        if not whole:
            return key
        key += tuple(
            tuple(sorted((shape(each), pair.current is each) for each in live))
            for pair, live in zip(self.pairs, self.live, strict=True)
        )
        budgets = (*self.opens, *self.crashes, self.hours, self.splices, self.revocations)
        return (*key, budgets, *self.counts, self.said, frozenset(self.made) if self.splices else None)

    def forget(self) -> None:
        """A message signed for a channel that no connection of its receiver has or may get is of no use."""
        self.said = frozenset(each for each in self.said if self.matters(each))

    def matters(self, said: Said) -> bool:
        return not said.channel or any(each.channel == said.channel for each in self.live[said.to])

    # what may happen

    def steps(self) -> Iterator[tuple[int, str, Callable[[World], None]]]:
        """All that may happen next: at which node, what, and how."""
        for node in (0, 1):
            for at, each in enumerate(self.live[node]):
                for said in self.said:
                    if said.to == node and self.delivers(each, said):
                        yield (
                            node,
                            f"{Kind(said.data[0]).step} at {node}",
                            lambda w, n=node, a=at, s=said: w.receive(n, w.live[n][a], s.data),  # type: ignore[misc]
                        )
                if each.claims is not None and not each._said:
                    yield node, f"attested at {node}", lambda w, n=node, a=at: w.attest(n, w.live[n][a])  # type: ignore[misc]
                    for envelope in self.made if self.splices and node == 1 else ():
                        yield 1, "splice at 1", lambda w, a=at, e=envelope: w.splice(w.live[1][a], e)  # type: ignore[misc]
            if self.opens[node]:
                yield node, f"call by {node}", lambda w, n=node: w.open(n, True)  # type: ignore[misc]
                for said in self.said:
                    if said.to == node and said.data[0] == Kind.HELLO:
                        yield node, f"answer by {node}", lambda w, n=node, s=said: w.answer(n, s.data)  # type: ignore[misc]
            if self.crashes[node]:
                yield node, f"crash of {node}", lambda w, n=node: w.crash(n)  # type: ignore[misc]
            if self.pairs[node].standing is not None and not self.pairs[node].doubted:
                yield node, f"doubt at {node}", lambda w, n=node: w.pairs[n].doubt()  # type: ignore[misc]
            if self.revocations:
                yield node, f"revocation at {node}", lambda w, n=node: w.revoke(n)  # type: ignore[misc]
        if self.hours:
            yield 2, "an hour", lambda w: w.hour()

    def delivers(self, each: Exchange, said: Said) -> bool:
        """HELLOs reach every connection that waits for one, all others those of their channel. What is not
        due ends a connection and changes nothing else, as if nothing more arrived there; with `anything` it
        is tried all the same."""
        kind = Kind(said.data[0])
        if kind is Kind.HELLO:
            return each.phase is Phase.HELLO
        return each.channel == said.channel and (self.anything or kind in each._takes())

    def open(self, node: int, calls: bool) -> Exchange:
        self.opens[node] -= 1
        if len(self.live[node]) == self.limit:  # the oldest is cut; that its messages are lost may be anyway
            self.live[node][0].close()
            self.sweep(node)
        each = self.machine(self.pairs[node], calls)
        self.live[node] = [*self.live[node], each]
        self.act(node, each, each.start())
        return each

    def answer(self, node: int, data: bytes) -> None:
        self.receive(node, self.open(node, False), data)

    def receive(self, node: int, each: Exchange, data: bytes) -> None:
        self.act(node, each, each.receive(data, self.now))

    def attest(self, node: int, each: Exchange) -> None:
        assert each.claims is not None
        if self.thief and node == 1:  # all that its machine will sign
            each.claims = replace(each.claims, tunnel=symbol("tunnel", 1, self.lives[1]))
        envelope = evidence(self.machines[node], each.claims)
        self.made = {**self.made, envelope.encode(): (node, each.channel)}
        self.act(node, each, each.attested(envelope, self.now))

    def splice(self, each: Exchange, old: bytes) -> None:
        """The follower cheats, and shows evidence that was made before, by whomever."""
        self.splices -= 1
        envelope = Envelope.decode(old)
        each.claims = Claims.decode(envelope.claims, Trail("model"))
        self.act(1, each, each.attested(envelope, self.now))

    def sweep(self, node: int) -> None:
        self.live[node] = [each for each in self.live[node] if not each.over]

    def crash(self, node: int) -> None:
        self.crashes[node] -= 1
        self.lives[node] += 1
        self.counts[node] = 0
        self.gates[node], self.live[node] = None, []
        self.pairs[node] = self._start(node)

    def hour(self) -> None:
        self.hours -= 1
        self.now += timedelta(hours=1)
        for node in (0, 1):
            self.act(node, None, self.pairs[node].tick(self.now))

    def revoke(self, node: int) -> None:
        """This node hears that the other one is revoked."""
        self.revocations -= 1
        self.revoked |= {(node, IDENTITIES[1 - node])}
        self.act(node, None, self.pairs[node].reconsider(self.now))

    # what is done

    def act(self, node: int, each: Exchange | None, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send(data):
                    self.say(node, each, data)
                case Admit(standing, preshared):
                    assert each is not None
                    self.admit(node, each, standing, preshared)
                case Expel():
                    self.gates[node] = None
                case Drop(other):
                    if not other.over:
                        raise Broken("a connection was dropped and goes on")
                case Over(refusal, "us"):
                    assert refusal is not None
                    if refusal.step.startswith(("model.", "claims.")) and self.gates[node] is not None:
                        raise Broken("refused, and still in the gate")
        self.sweep(node)

    def admit(self, node: int, each: Exchange, standing: Standing, preshared: Any) -> None:
        where = self.made.get(standing.evidence)
        if where != (1 - node, each.channel):
            raise Broken("admitted by evidence that was made elsewhere or for another channel")
        if not self.machines[1 - node].startswith("good"):
            raise Broken("admitted with another measurement")
        for who in (0, 1):
            if (who, Kind.VERDICT, each.name) not in self.words:
                raise Broken("in the gate before both have judged")
        if (1 - node, Kind.DONE if node == 0 else Kind.COMMIT, each.name) not in self.words:
            raise Broken("in the gate without the other's word")
        if preshared is None:
            gate = self.gates[node]
            if gate is None or gate.tunnel != standing.tunnel:
                raise Broken("renewed, but not in the gate")
            other = self.gates[1 - node]
            if other is not None and other.preshared != gate.preshared:
                raise Broken("renewed with different keys")
        else:
            with preshared.reveal_to_kernel() as view:
                self.gates[node] = InGate(standing.tunnel, bytes(view))

    def say(self, node: int, each: Exchange | None, data: bytes) -> None:
        assert each is not None
        kind = Kind(data[0])
        if each.name:
            self.words |= {(node, kind, each.name)}
        said = Said(1 - node, data, b"" if kind is Kind.HELLO else each.channel)
        self.said |= {said}
        self.fresh.append(said)

    # what must hold

    def check(self) -> None:
        for node, pair in enumerate(self.pairs):
            gate, standing = self.gates[node], pair.standing
            if (gate is None) != (standing is None):
                raise Broken("gate and verdict do not go together")
            if standing is not None and gate is not None:
                if standing.until <= self.now:
                    raise Broken("in the gate with a verdict that has ended")
                if (node, IDENTITIES[1 - node]) in self.revoked:
                    raise Broken("in the gate though revoked")
                if standing.verdict.claims.tunnel != gate.tunnel:
                    raise Broken("in the gate with another tunnel key than was judged")

    def up(self) -> bool:
        """Whether WireGuard would come up: each has the other's key of today, and both the same secret."""
        ours, theirs = self.gates
        return (
            ours is not None
            and theirs is not None
            and ours.preshared == theirs.preshared
            and ours.tunnel == self.pairs[1].own.tunnel
            and theirs.tunnel == self.pairs[0].own.tunnel
        )

    def settle(self, early: bool) -> bool:
        """Whether both come to one key and stay so, if from now on nothing is lost and nobody crashes.

        `early`: they have an exchange before anybody sees that something is wrong.
        """
        allowed = (
            not self.revoked and not self.thief and all(each.startswith("good") for each in self.machines)
        )
        self.hours = self.splices = 0
        if early:
            self.talk(0)
            self.check()
        for caller in (0, 1, 0, 1):
            if self.up() and not any(pair.due(self.now) for pair in self.pairs):
                break
            for node in (0, 1):
                if not self.up():
                    self.pairs[node].doubt()
            if any(pair.due(self.now) for pair in self.pairs):
                self.talk(caller)
                self.check()
        else:
            return not allowed and not self.up()
        return allowed

    def talk(self, caller: int) -> None:
        """One connection, on which all arrives in order. Those before it are cut."""
        for node in (0, 1):
            for each in self.live[node]:
                each.close()
            self.sweep(node)
        self.opens, self.fresh = [9, 9], []
        ends = {1 - caller: self.open(1 - caller, False), caller: self.open(caller, True)}
        while self.fresh or any(each.claims and not each._said and not each.over for each in ends.values()):
            for said in self.take_fresh():
                if not ends[said.to].over:
                    self.receive(said.to, ends[said.to], said.data)
            for node, each in ends.items():
                if each.claims and not each._said and not each.over:
                    self.attest(node, each)

    def take_fresh(self) -> list[Said]:
        fresh, self.fresh = self.fresh, []
        return fresh


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same HELLO is read many thousand times."""
    monkeypatch.setattr(exchange.Hello, "decode", cache(exchange.Hello.decode))


def shape(each: Exchange) -> tuple[Any, ...]:
    return (
        each.phase.value,
        each.calls,
        each.mine.encode() if each.mine else b"",
        each.channel,
        each._said,
        each._heard,
        each.until.isoformat() if each.until else "",
        each.claims is not None,
    )


def explore(  # breadth first, so that the way to a failure is a shortest one
    machine: Machine = Exchange, pairs: type[Pair] = Pair, *, established: bool = False, **budget: Any
) -> int:
    """Every state that can be reached, from nothing or from two that are in each other's gates; raises
    `Broken` with the way there. Returns how many there are."""
    start = World(machine, pairs, **budget)
    if established:
        opens = start.opens
        start.talk(0)
        assert start.up()
        start.opens = opens
    start.forget()
    parents: dict[Any, tuple[Any, str]] = {start.key(): (None, "start")}
    settled: set[Any] = set()
    queue = deque([start])
    while queue:
        world = queue.popleft()
        here = world.key()
        try:
            world.check()
            if (short := world.key(whole=False)) not in settled:
                settled.add(short)
                if not all(world.copy(0, 1).settle(early) for early in (False, True)):
                    raise Broken("does not come to one key")
            for node, what, step in world.steps():
                then = world.copy(*((node,) if node < 2 else (0, 1)))
                try:
                    step(then)
                except AssertionError:
                    raise Broken(f"the machine's own assertion; at: {what}") from None
                except Broken as problem:
                    raise Broken(f"{problem}; at: {what}") from None
                then.forget()
                key = then.key()
                if key not in parents:
                    parents[key] = (here, what)
                    queue.append(then)
        except Broken as problem:
            way = []
            while here is not None:
                here, what = parents[here]
                way.append(what)
            raise Broken(f"{problem}; after: {', '.join(reversed(way))}") from None
    return len(parents)


@pytest.mark.slow
def test_every_reachable_state_is_safe_and_heals() -> None:
    """Connections that cross, break off and are taken up again, from nothing and from an admitted pair; a
    crash of each end anywhere; an hour that passes anywhere; a revocation at either end; a cheat, once."""
    assert explore(opens=1, crashes=1, anything=True) > 400
    assert explore(opens=2) > 1000
    assert explore(opens=1, crashes=1, established=True) > 1000
    assert explore(opens=1, hours=1, established=True) > 400
    assert explore(opens=1, revocations=1, established=True) > 600
    assert explore(opens=1, splices=1, established=True) > 500


def test_who_is_not_what_the_policy_wants_never_gets_in() -> None:
    assert explore(opens=1, crashes=1, machines=("bad0", "good1")) > 150
    assert explore(opens=1, machines=("good0", "bad1")) > 20
    assert explore(opens=1, thief=True) > 20


def mutant(kind: Any, **methods: Any) -> Any:
    return type("Mutant", (kind,), methods)


def _follower_acts_on_the_verdict(self: Exchange, body: bytes) -> list[Any]:
    out = Exchange._on_verdict(self, body)
    if self.phase is Phase.DECISION and not self.pair.leads:
        out += self._on_decision(Kind.COMMIT, self.name, START)
    return out


def _leader_acts_on_the_verdict(self: Exchange, body: bytes) -> list[Any]:
    out = Exchange._on_verdict(self, body)
    if self.phase is Phase.DECISION and self.pair.leads:
        out += self._on_decision(Kind.DONE, self.name, START)
    return out


def _says_yes_and_acts(self: Exchange, now: datetime) -> list[Any]:
    out = Exchange._conclude(self, now)
    return out + self._on_decision(Kind.DONE, self.name, now) if out else out


def _keeps_the_end_open(self: Exchange, kind: Kind, name: bytes, now: datetime) -> list[Any]:
    return Exchange._on_decision(self, kind, name, START)


def _does_not_look_at_names(self: Exchange) -> bool:
    assert self.mine is not None and self.theirs is not None
    return NONE in (self.mine.installed, self.theirs.installed)


def _never_renews_the_key(self: Exchange) -> bool:
    return self.pair.standing is None


def _forgets_what_it_said(self: Exchange, news: bytes, now: datetime) -> list[Any]:
    assert self.mine is not None
    true, self.mine = self.mine, replace(self.mine, installed=self.pair.installed)
    try:
        return Exchange._on_proof(self, news, now)
    finally:
        self.mine = true


def _ignores_refusals(self: Exchange, error: AttestationError, damning: bool = False) -> list[Any]:
    return Exchange._refuse(self, error)


def _lets_exchanges_go_on(self: Pair, why: str) -> list[Any]:
    out = [Expel(why)] if self.standing is not None else []
    self.standing, self.doubted = None, False
    return out


def _does_nothing(self: Pair, *_: Any) -> list[Any]:
    return []


ESTABLISHED = {"opens": 1, "established": True}


@pytest.mark.parametrize(
    "machine, pairs, budget, why",
    [
        ({"_on_verdict": _follower_acts_on_the_verdict}, {}, {"opens": 1}, "the other's word"),
        ({"_on_verdict": _leader_acts_on_the_verdict}, {}, {"opens": 1}, "the other's word"),
        ({"_conclude": _says_yes_and_acts}, {}, {"opens": 1}, "both have judged"),
        ({"_on_decision": _keeps_the_end_open}, {}, {"opens": 1, "hours": 1}, "verdict that has ended"),
        ({}, {"tick": _does_nothing}, ESTABLISHED | {"hours": 1}, "verdict that has ended"),
        ({}, {"expel": _lets_exchanges_go_on}, ESTABLISHED | {"hours": 1}, "own assertion|not in the gate"),
        ({}, {"reconsider": _does_nothing}, ESTABLISHED | {"revocations": 1}, "though revoked"),
        ({}, {"doubt": _does_nothing}, ESTABLISHED | {"crashes": 1}, "come to one key"),
        ({"fresh": property(_does_not_look_at_names)}, {}, ESTABLISHED, "different keys"),
        ({"fresh": property(_never_renews_the_key)}, {}, {"opens": 1}, "different keys"),
        (
            {"_on_proof": _forgets_what_it_said},
            {},
            ESTABLISHED | {"hours": 1},
            "own assertion|not in the gate",
        ),
        ({"_refuse": _ignores_refusals}, {}, ESTABLISHED | {"splices": 1}, "still in the gate"),
        ({}, {}, ESTABLISHED | {"splices": 1, "judge": BelievesAnyNonce}, "another channel"),
        ({}, {}, {"opens": 1, "thief": True, "judge": BelievesAnyTunnel}, "another tunnel"),
        (
            {},
            {},
            {"opens": 1, "machines": ("good0", "bad1"), "judge": BelievesAnyMachine},
            "another measurement",
        ),
    ],
)
def test_the_model_sees_each_rule_taken_away(
    machine: dict[str, Any], pairs: dict[str, Any], budget: dict[str, Any], why: str
) -> None:
    with pytest.raises(Broken, match=why):
        explore(mutant(Exchange, **machine), mutant(Pair, **pairs), **budget)
