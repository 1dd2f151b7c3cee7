"""Who is at the other end: what three parties' evidence proves, by the client's own policy.

`ask` puts a fresh nonce to a party on its sealed connection. `judge` turns the three answers into a
`Document`; it does no I/O and knows no clock, so the same answers give the same document again, later and
elsewhere (`save`, `load`). What a verified document says:

- Each party's evidence is genuine and wanted (`mimir.attest.appraisal`), and was made for our nonce, on this
  very connection, by the holder of the identity in our file, for the tunnel and sealing keys that it names.
- What a party says besides comes from the code that its evidence measures, over the channel that the evidence
  names. So its word counts for what only it can know: whom it admitted, and by what.
- Each party has admitted, in its tunnel, the very keys that its two peers attested to us, by evidence that
  those peers say they showed. Nobody shows us another machine than the one that its peers talk to.
- No two of them quote by one TPM: whoever took another's identity key has not got its machine.
- All three work under one configuration, whose terms we have seen, and under our policy.

It does not say that nonce and channel of a *saved* document were fresh: only who asked knows that.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio

from mimir import config, hpke
from mimir.admission.certificates import Certificate, verify_certificate
from mimir.admission.revocation import Revocations
from mimir.attest import policy as policies
from mimir.attest.appraisal import REAL, Anchors, Verdict, appraise
from mimir.attest.collateral import Collateral, Item, Store
from mimir.attest.evidence import SIMULATED, Claims, Envelope, identity_hash
from mimir.attest.policy import Policy, Signature
from mimir.attest.trail import Step, Trail, read_json, shown, stamp
from mimir.client.connection import Connection, connect, plain_errors
from mimir.client.federation import Attestation, Federation, Party
from mimir.errors import AttestationError, BadInput, LocalError, MimirError
from mimir.net import messages
from mimir.net.identity import Identity
from mimir.net.messages import NONCE_BYTES, Message, MessageError

FORMAT = 1
MAX_SAVED = 32 << 20
SIMULATED_NOTE = "SIMULATED: proves nothing about the machine"


def utc_now() -> datetime:
    """The clock that verification goes by."""
    return datetime.now(UTC)


# --- by what it is judged ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """A client's policy, whose word counts for it, and what authorities say; with the texts as read."""

    policy: Policy
    policy_text: str
    signatures: tuple[Signature, ...]
    signatures_text: str
    owners: tuple[str, ...]
    threshold: int
    collateral: Collateral


def read_basis(settings: Attestation) -> Basis:
    """The files that [attestation] names; errors name the file. Nothing is judged yet."""
    if settings.policy is None:
        raise LocalError("no policy to read")
    path = settings.policy
    beside = Path(f"{path}{policies.SIGNATURE_SUFFIX}")
    text = config.read_text(path)
    signed = config.read_text(beside) if beside.exists() else ""
    collateral = Store(settings.collateral).read() if settings.collateral is not None else Collateral()
    return _basis(text, path, signed, beside, settings.owners, settings.threshold, collateral)


def _basis(
    text: str,
    path: Path,
    signed: str,
    beside: Path,
    owners: tuple[str, ...],
    threshold: int,
    collateral: Collateral,
) -> Basis:
    return Basis(
        policies.parse(config.parse_toml(text, path), path),
        text,
        policies.parse_signatures(signed, beside),
        signed,
        owners,
        threshold,
        collateral,
    )


# --- asking ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one party answered to which question; without a message, why there is none."""

    nonce: bytes
    channel: bytes
    asked: datetime
    message: Message | None
    error: str = ""


async def ask(connection: Connection) -> Answer:
    """Have a party attest itself on this connection. What goes wrong is part of the answer."""
    nonce, asked = os.urandom(NONCE_BYTES), utc_now()
    try:
        await connection.send({"t": "attest", "nonce": nonce})
        message = await connection.receive("evidence")
    except MimirError as error:
        return Answer(nonce, connection.channel, asked, None, str(error))
    return Answer(nonce, connection.channel, asked, message)


async def ask_all(connections: Sequence[Connection]) -> list[Answer]:
    """The same at all parties at once, in their order."""
    answers: dict[int, Answer] = {}

    async def one(number: int, connection: Connection) -> None:
        answers[number] = await ask(connection)

    async with trio.open_nursery() as nursery:
        for number, connection in enumerate(connections):
            nursery.start_soon(one, number, connection)
    return [answers[number] for number in range(len(connections))]


async def question(
    federation: Federation, identity: Identity, revocations: Revocations | None
) -> list[Answer]:
    """The same over connections of their own; a party that cannot be reached has not answered."""
    answers: dict[int, Answer] = {}
    within = federation.deadlines.connect
    tls = federation.client_tls(identity, revocations)

    async def one(number: int, party: Party) -> None:
        began = utc_now()
        try:
            with plain_errors():
                async with connect(
                    party, identity, within=within, silence=within, tls=tls, unadmitted=True
                ) as connection:
                    answers[number] = await ask(connection)
        except MimirError as error:
            answers.setdefault(number, Answer(bytes(32), bytes(32), began, None, str(error)))

    async with trio.open_nursery() as nursery:
        for number, party in enumerate(federation.parties):
            nursery.start_soon(one, number, party)
    return [answers[number] for number in range(len(federation.parties))]


# --- judging -----------------------------------------------------------------------------------------------


class PartyRefused(AttestationError):
    """What does not hold, and of which party; `party` is empty if it is the policy, or no single party."""

    def __init__(self, party: str, error: AttestationError) -> None:
        super().__init__(error.step, error.expected, error.got, error.passed)
        self.party = party

    def __str__(self) -> str:
        return f"party {self.party}: {super().__str__()}" if self.party else super().__str__()


@dataclass(frozen=True)
class Document:
    """The verification document. `plain` is what `mimir verify --json` prints; README lists its keys."""

    plain: dict[str, Any]
    refusal: PartyRefused | None  # the first thing that does not hold
    until: datetime | None  # when the first of three good verdicts ends
    collateral: frozenset[str]  # names of the items that were used

    def require(self) -> datetime:
        """When it ends, or `PartyRefused`."""
        if self.refusal is not None or self.until is None:
            raise self.refusal or LocalError("a document without an end")
        return self.until


@dataclass(frozen=True)
class _Watched(Collateral):
    """Notes what is asked for, so that a saved document carries that and no more."""

    used: set[str] | None = None

    def get(self, name: str) -> Item | None:
        item = super().get(name)
        if item is not None and self.used is not None:
            self.used.add(name)
        return item


@dataclass
class _Seen:
    """One party while its answer is judged."""

    number: int
    party: Party
    answer: Answer
    verdict: Verdict | None = None
    steps: tuple[Step, ...] = ()
    failed: AttestationError | None = None
    certificates: list[Certificate] = field(default_factory=list)  # that hold

    @property
    def message(self) -> Message:
        return self.answer.message or {}

    def says_of(self, peer: int) -> dict[str, Any]:
        """Its entry for a peer; empty if it has none."""
        entries = self.message["admission"]["peers"] if self.message else []
        return next((each for each in entries if each["party"] == peer), {})


def judge(
    answers: Sequence[Answer],
    parties: Sequence[Party],
    client: str,
    basis: Basis,
    now: datetime,
    revocations: Revocations | None = None,
    anchors: Anchors = REAL,
) -> Document:
    """Judge three answers, in party order; `client` is the key that asked, hexadecimal. Raises nothing that
    an answer could cause: all is in the document. Without `revocations` the owners have revoked nothing.
    """
    used: set[str] = set()
    collateral = _Watched(basis.collateral.items, used)
    policy, refused = _judge_policy(basis, now)
    seen = [_Seen(n, *each) for n, each in enumerate(zip(parties, answers, strict=True))]
    identities = [party.identity for party in parties]
    for each in seen:
        _judge_party(each, identities, client, basis, collateral, now, revocations, anchors)
    checks = _cross_check(seen, basis.policy, now, revocations)
    refusals = [PartyRefused("", refused)] if refused is not None else []
    refusals += [PartyRefused(each.party.name, each.failed) for each in seen if each.failed is not None]
    refusals += [
        PartyRefused(row["party"] or "", AttestationError(row["name"], row["expected"], row["got"]))
        for row in checks
        if not row["holds"]
    ]
    first = refusals[0] if refusals else None
    ends = [_end(each.verdict) for each in seen if each.verdict is not None]
    plain = {
        "format": FORMAT,
        "verdict": "verified" if first is None else "refused",
        "failed": None if first is None else {"party": first.party or None, **_texts(first)},
        "time": stamp(now),
        "client": client,
        "simulated": any(_simulated(each) for each in seen),
        "policy": policy,
        "parties": [_report(each, seen, now) for each in seen],
        "checks": checks,
        "notes": _notes(seen),
    }
    return Document(plain, first, min(ends) if len(ends) == len(seen) else None, frozenset(used))


def _judge_policy(basis: Basis, now: datetime) -> tuple[dict[str, Any], AttestationError | None]:
    """The document's part on the policy, and why it cannot be gone by."""
    policy, trail, failed = basis.policy, Trail("policy"), None
    steps: tuple[Step, ...] = ()
    try:
        steps = policies.check_signatures(policy, basis.signatures, basis.owners, basis.threshold)
        policy.check_time(now, trail)
    except AttestationError as error:
        failed = error
    signed = {each.key for each in basis.signatures if policies.signed_by(policy, each)}
    return {
        "name": policy.name,
        "version": policy.version,
        "environment": policy.environment,
        "digest": policy.digest().hex(),
        "not_after": stamp(policy.not_after),
        "threshold": basis.threshold,
        "owners": list(basis.owners),
        "signed_by": sorted(signed & set(basis.owners)),
        "steps": [vars(each) for each in (*steps, *trail.steps)],
        "failed": None if failed is None else _texts(failed),
    }, failed


def _judge_party(
    seen: _Seen,
    identities: list[str],
    client: str,
    basis: Basis,
    collateral: Collateral,
    now: datetime,
    revocations: Revocations | None,
    anchors: Anchors,
) -> None:
    """The party's evidence, and what it says of itself."""
    answer, message = seen.answer, seen.answer.message
    trail = Trail("statement")
    try:
        if message is None:
            Trail("evidence").refuse("answer", "evidence for our nonce", answer.error)
        expected = Claims(
            role="party",
            node=f"party{seen.number}",
            identity=identity_hash(bytes.fromhex(seen.party.identity)),
            tunnel=message["tunnel"],
            kem=hpke.digest(message["kem"]),
            nonce=answer.nonce,
            nonce_source=messages.nonce_source(client),
            not_before=0,
            not_after=0,
            policy=basis.policy.digest(),
            channel=answer.channel,
            config=bytes.fromhex(message["config"]),
        )
        verdict = appraise(message["envelope"], basis.policy, collateral, expected, now, anchors)
        seen.steps = verdict.steps
        if revocations is not None:
            tunnel = message["tunnel"].hex()
            revocations.check(identity=seen.party.identity, tunnel=tunnel, measurements=verdict.measurements)
        _check_statement(trail, message, identities, basis.policy, verdict)
    except AttestationError as error:
        seen.failed = error
        seen.steps = (*seen.steps, *error.passed)
        return
    seen.verdict = verdict
    seen.steps = (*verdict.steps, *trail.steps)


def _check_statement(
    trail: Trail, message: Message, identities: list[str], policy: Policy, verdict: Verdict
) -> None:
    """What a party says of itself must fit its evidence, our policy and our federation file."""
    admission, terms = message["admission"], message["terms"]
    trail.require(admission["mode"] == "required", "mode", "attestation required", admission["mode"])
    theirs = admission["policy"]["digest"] if admission["policy"] else "none"
    trail.require(theirs == policy.digest().hex(), "policy", policy.digest(), theirs)
    trail.require(admission["kind"] == verdict.kind, "kind", verdict.kind, admission["kind"])
    digest = trail.guard("terms", "terms as text", lambda: config.terms_digest(terms))
    trail.same("terms", bytes.fromhex(message["config"]), digest)
    parties = terms.get("parties")
    same = parties == identities
    trail.require(same, "parties", ", ".join(identities), ", ".join(identities) if same else parties)
    mode = terms.get("tunnel.mode")
    trail.require(mode == "wireguard", "tunnel", "links through WireGuard", mode)


# --- crosswise ---------------------------------------------------------------------------------------------


class _Checks:
    """The crosswise checks, each a row of the document; one that fails ends none of the others."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def note(self, holds: bool, name: str, says: _Seen | None, of: _Seen | None, want: Any, got: Any) -> None:
        self.rows.append(
            {
                "name": name,
                "party": None if says is None else says.party.name,
                "about": None if of is None else of.party.name,
                "expected": shown(want),
                "got": shown(got),
                "holds": holds,
            }
        )


def _cross_check(
    seen: Sequence[_Seen], policy: Policy, now: datetime, revocations: Revocations | None
) -> list[dict[str, Any]]:
    """What the parties say of each other, held against what each has proved of itself."""
    checks = _Checks()
    good = [each for each in seen if each.verdict is not None]
    for says in good:
        others = [each for each in seen if each is not says]
        listed = sorted(each["party"] for each in says.message["admission"]["peers"])
        names = ", ".join(seen[number].party.name for number in listed)
        wanted = ", ".join(each.party.name for each in others)
        checks.note(names == wanted, "peers.listed", says, None, wanted, names or "nobody")
        for of in others:
            if of.verdict is not None and says.says_of(of.number):
                _check_peer(checks, says, of, now)
    for of in good:
        for held in of.message["certificates"]:
            _check_certificate(
                checks, seen[held["issuer"]], of, held["certificate"], policy, now, revocations
            )
    for one, other in itertools.combinations(good, 2):
        key = _shared(one, other, "ak_spki")
        checks.note(key is None, "parties.machine", one, other, "a TPM of its own", key or "its own")
    if len(good) > 1:
        first = good[0].message["config"]
        for each in good[1:]:
            mine = each.message["config"]
            checks.note(mine == first, "parties.config", each, good[0], first, mine)
    return checks.rows


def _shared(one: _Seen, other: _Seen, what: str) -> str | None:
    """What two parties' evidence has in common that only one machine can have."""
    if one.verdict is None or other.verdict is None:
        return None
    both = set(one.verdict.machine) & set(other.verdict.machine)
    return next((value for kind, value in sorted(both) if kind == what), None)


def _check_peer(checks: _Checks, says: _Seen, of: _Seen, now: datetime) -> None:
    """One party's word of a peer whose evidence we hold."""
    entry, verdict = says.says_of(of.number), of.verdict
    if verdict is None:
        raise LocalError("a peer without a verdict")
    state = entry["state"]
    if state != "admitted" and entry["refusal"]:
        refusal = entry["refusal"]
        state += f" at {refusal['step']}: expected {refusal['expected']}; got {refusal['got']}"
    admitted = entry["state"] == "admitted"
    checks.note(admitted, "peers.admitted", says, of, "admitted", state)
    if not admitted:
        return
    until = _moment(entry["valid_until"])
    valid = until is not None and now < until
    checks.note(valid, "peers.valid", says, of, f"until after {stamp(now)}", entry["valid_until"])
    tunnel = of.message["tunnel"].hex()
    checks.note(entry["tunnel_key"] == tunnel, "peers.tunnel", says, of, tunnel, entry["tunnel_key"])
    checks.note(entry["kind"] == verdict.kind, "peers.kind", says, of, verdict.kind, entry["kind"])
    got = entry["evidence"]
    showed = [d for each in of.message["shown"] if each["party"] == says.number for d in each["evidence"]]
    want = got if got in showed else f"what {of.party.name} showed: " + (", ".join(showed) or "nothing")
    checks.note(got in showed, "peers.evidence", says, of, want, got)


def _check_certificate(
    checks: _Checks,
    issuer: _Seen,
    of: _Seen,
    der: bytes,
    policy: Policy,
    now: datetime,
    revocations: Revocations | None,
) -> None:
    """A peer's word in writing: it must be for the very keys and evidence that the party shows us."""
    trail = Trail("certificate")
    showed = [d for each in of.message["shown"] if each["party"] == issuer.number for d in each["evidence"]]
    try:
        trail.require(issuer is not of, "issuer", "a peer of it", "itself")
        found = verify_certificate(der, [issuer.party.identity], now, revocations, subject=of.party.identity)
        grounds = found.grounds
        if grounds is None:
            trail.refuse("grounds", "evidence that it rests on", "none")
        trail.require(found.node == f"party{of.number}", "node", f"party{of.number}", found.node)
        trail.same("tunnel", of.message["tunnel"], bytes.fromhex(grounds.tunnel))
        trail.same("policy", policy.digest(), bytes.fromhex(grounds.policy))
        trail.require(
            grounds.evidence in showed, "evidence", ", ".join(showed) or "none shown", grounds.evidence
        )
    except AttestationError as error:
        want, got = f"{error.step}: {error.expected}", error.got
        checks.note(False, "peers.certificate", issuer, of, want, got)
        return
    of.certificates.append(found)
    checks.note(True, "peers.certificate", issuer, of, found.fingerprint, found.fingerprint)


def _moment(text: str | None) -> datetime | None:
    """A time as `trail.stamp` writes it, or None."""
    try:
        return datetime.strptime(text or "", "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


# --- the document ------------------------------------------------------------------------------------------


def _report(seen: _Seen, all_seen: Sequence[_Seen], now: datetime) -> dict[str, Any]:
    verdict, message, answer = seen.verdict, seen.message, seen.answer
    kind = verdict.kind if verdict is not None else _kind(message)
    names = [each.party.name for each in all_seen]
    out: dict[str, Any] = {
        "party": seen.number,
        "name": seen.party.name,
        "address": str(seen.party.address),
        "identity": seen.party.identity,
        "verdict": "accepted" if seen.failed is None else "refused",
        "failed": None if seen.failed is None else _texts(seen.failed),
        "kind": kind,
        "simulated": _simulated(seen),
        "entry": verdict and verdict.entry,
        "tcb": verdict and verdict.tcb,
        "advisories": list(verdict.advisories) if verdict else [],
        "cautions": list(verdict.cautions) if verdict else [],
        "anchor": vars(verdict.anchor) if verdict else None,
        "collateral": None,
        "evidence": None,
        "tunnel_key": message["tunnel"].hex() if message else None,
        "kem": hpke.digest(message["kem"]).hex() if message else None,
        "config": message.get("config"),
        "certificates": [each.public() for each in seen.certificates],
        "revocation_epoch": message["admission"]["revocation_epoch"] if message else None,
        "rotations": [
            {"peer": names[each["party"]], "epoch": each["epoch"], "age_s": each["age"]}
            for each in message.get("rotations", ())
        ],
        "peers": [
            {"peer": names[each["party"]], **{k: v for k, v in each.items() if k != "party"}}
            for each in (message["admission"]["peers"] if message else ())
        ],
        "said_by_peers": [
            {
                "peer": other.party.name,
                "state": entry["state"],
                "entry": entry["entry"],
                "valid_until": entry["valid_until"],
                "tunnel_key": entry["tunnel_key"],
                "refusal": entry["refusal"],
            }
            for other in all_seen
            if other is not seen and (entry := other.says_of(seen.number))
        ],
        "steps": [vars(each) for each in seen.steps],
    }
    if verdict is not None:
        fetched = verdict.fetched
        if fetched is not None:
            out["collateral"] = {"fetched": stamp(fetched), "age_s": round((now - fetched).total_seconds())}
        out["evidence"] = {
            "sha256": verdict.evidence,
            "asked": stamp(answer.asked),
            "age_s": round((now - answer.asked).total_seconds(), 3),
            "valid_until": stamp(_end(verdict)),
            "life_s": round((_end(verdict) - now).total_seconds()),
        }
    return out


def _end(verdict: Verdict) -> datetime:
    """When a verdict, or the evidence by its own word, is over."""
    return min(verdict.valid_until, datetime.fromtimestamp(verdict.claims.not_after, UTC))


def _notes(seen: Sequence[_Seen]) -> list[str]:
    """What is worth knowing and refuses nobody."""
    notes = []
    epochs = {each.party.name: each.message["admission"]["revocation_epoch"] for each in seen if each.message}
    if len(set(epochs.values())) > 1:
        listed = ", ".join(f"{name} {epoch}" for name, epoch in epochs.items())
        notes.append(f"revocation epochs differ, one party lacks a statement that another has: {listed}")
    # Virtual machines of one provider may come to share a processor: for people to judge.
    notes += [
        f"{one.party.name} and {other.party.name} run on one processor: {chip}"
        for one, other in itertools.combinations(seen, 2)
        if (chip := _shared(one, other, "chip_ids")) is not None
    ]
    notes += [
        f"{each.party.name}: {caution}" for each in seen if each.verdict for caution in each.verdict.cautions
    ]
    return notes


def _kind(message: Mapping[str, Any]) -> str | None:
    """What refused evidence calls itself."""
    try:
        return Envelope.decode(message["envelope"]).kind if message else None
    except AttestationError:
        return None


def _simulated(seen: _Seen) -> bool:
    return (seen.verdict.kind if seen.verdict else _kind(seen.message)) in SIMULATED


def _texts(error: AttestationError) -> dict[str, str]:
    return {"step": error.step, "expected": error.expected, "got": error.got}


# --- kept for later ----------------------------------------------------------------------------------------


def save(
    path: str | Path, document: Document, answers: Sequence[Answer], basis: Basis, now: datetime
) -> None:
    """Store a document with all that `judge` was given, in place of what was there."""
    items = {name: basis.collateral.items[name] for name in sorted(document.collateral)}
    kept = {
        "format": FORMAT,
        "document": document.plain,
        "record": {
            "time": now.isoformat(),
            "client": document.plain["client"],
            "policy": basis.policy_text,
            "signatures": basis.signatures_text,
            "collateral": {
                name: {"fetched": item.fetched.isoformat(), "data": _text64(item.data)}
                for name, item in items.items()
            },
            "answers": [
                {
                    "nonce": each.nonce.hex(),
                    "channel": each.channel.hex(),
                    "asked": each.asked.isoformat(),
                    "error": each.error,
                    "message": None
                    if each.message is None
                    else _text64(messages.pack(each.message, messages.FROM_PARTY)),
                }
                for each in answers
            ],
        },
    }
    draft = Path(f"{path}.new")
    try:
        draft.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(draft, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from None


def judge_saved(
    path: str | Path,
    parties: Sequence[Party],
    owners: tuple[str, ...],
    threshold: int,
    at: datetime | None = None,
    revocations: Revocations | None = None,
    anchors: Anchors = REAL,
) -> Document:
    """Judge what `save` stored again, by its own policy and collateral, but by our federation's identities,
    owners, threshold and revocations; at the time of the check, or at another. `BadInput` if the file cannot
    be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_SAVED + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_SAVED:
        raise BadInput(f"{path}: larger than {MAX_SAVED} bytes")
    try:
        whole = read_json(Trail("document"), "format", raw, "a saved document")
        if whole["format"] != FORMAT:
            raise ValueError(f"format {whole['format']!r}")
        kept = whole["record"]
        collateral = Collateral(
            {
                str(name): Item(base64.b64decode(each["data"], validate=True), _time(each["fetched"]))
                for name, each in kept["collateral"].items()
            }
        )
        answers = [_answer(each) for each in kept["answers"]]
        now, client, texts = _time(kept["time"]), str(kept["client"]), (kept["policy"], kept["signatures"])
        if (
            len(bytes.fromhex(client)) != NONCE_BYTES
            or len(answers) != len(parties)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError("a client, three answers, a policy and signatures are due")
    except (KeyError, TypeError, ValueError, AttributeError, AttestationError, MessageError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise BadInput(f"{path}: nothing that `mimir verify --save` wrote: {why}") from None
    basis = _basis(texts[0], path, texts[1], path, owners, threshold, collateral)
    return judge(answers, parties, client, basis, now if at is None else at, revocations, anchors)


def _answer(kept: dict[str, Any]) -> Answer:
    nonce, channel = bytes.fromhex(kept["nonce"]), bytes.fromhex(kept["channel"])
    if len(nonce) != NONCE_BYTES or len(channel) != NONCE_BYTES:
        raise ValueError("nonce and channel of 32 bytes")
    message = None
    if kept["message"] is not None:
        raw = base64.b64decode(kept["message"], validate=True)
        message = messages.unpack(raw, messages.FROM_PARTY)
        if message["t"] != "evidence":
            raise ValueError("an answer that is no evidence")
    return Answer(nonce, channel, _time(kept["asked"]), message, str(kept["error"]))


def _time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without its zone")
    return moment


def _text64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
