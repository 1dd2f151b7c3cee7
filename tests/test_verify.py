"""Who is at the other end, as a client sees it: the document, every lie by the step that catches it, and that
nothing of a prompt or a weight leaves before."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attest_pki as pki
import pytest
import structlog
import trio
from attested import ANCHORS, NOW, Machine, Three, basis_of, introduce, text_for, tpm_of, write_basis
from hypothesis import given, settings
from hypothesis import strategies as st
from service import NAMES, World, world
from software_tpm import software_tpm
from test_commands import make_tokenizer
from test_provision import plan

from mimir import config as configuration
from mimir.__main__ import main
from mimir.admission import certificates
from mimir.admission.revocation import Statement
from mimir.attest.evidence import KINDS
from mimir.attest.policy import Signature
from mimir.attesters import open_attester
from mimir.attesters.enrolment import enrol
from mimir.client import attestation, commands, document
from mimir.client import federation as federation_file
from mimir.client.attestation import Document, PartyRefused, judge_saved, save
from mimir.client.session import connect_all, survey
from mimir.client.terminal import WIDTH, Terminal
from mimir.config import Tunnel
from mimir.errors import AttestationError, BadInput, ConfigError
from mimir.hpke import HpkeKey
from mimir.net import control

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The fake parties' log shares this process; a command's own output is what is looked at."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(io.StringIO()))
    yield
    structlog.reset_defaults()


def failed(found: Document) -> tuple[str, str]:
    """Party and step of the first refusal; and that all places say the same."""
    assert found.refusal is not None and found.plain["verdict"] == "refused"
    with pytest.raises(PartyRefused) as caught:
        found.require()
    error = caught.value
    assert error.exit_code == 10 and error is found.refusal
    assert found.plain["failed"] == {
        "party": error.party or None,
        "step": error.step,
        "expected": error.expected,
        "got": error.got,
    }
    assert error.step in str(error) and error.party in str(error)
    return error.party, error.step


# --- the document ------------------------------------------------------------------------------------------


def skeleton(value: Any) -> Any:
    """Keys and types of plain data; of a list, those of its first item."""
    if isinstance(value, dict):
        return {key: skeleton(each) for key, each in value.items()}
    if isinstance(value, list):
        return [skeleton(each) for each in value[:1]]
    return type(value).__name__


STEP = {"name": "str", "expected": "str", "got": "str"}
GOLDEN = {
    "format": "int",
    "verdict": "str",
    "failed": "NoneType",
    "time": "str",
    "client": "str",
    "simulated": "bool",
    "policy": {
        "name": "str",
        "version": "int",
        "environment": "str",
        "digest": "str",
        "not_after": "str",
        "threshold": "int",
        "owners": ["str"],
        "signed_by": ["str"],
        "steps": [STEP],
        "failed": "NoneType",
    },
    "parties": [
        {
            "party": "int",
            "name": "str",
            "address": "str",
            "identity": "str",
            "verdict": "str",
            "failed": "NoneType",
            "kind": "str",
            "simulated": "bool",
            "entry": "str",
            "tcb": "str",
            "advisories": [],
            "cautions": [],
            "anchor": {"name": "str", "sha256": "str"},
            "collateral": {"fetched": "str", "age_s": "int"},
            "evidence": {
                "sha256": "str",
                "asked": "str",
                "age_s": "float",
                "valid_until": "str",
                "life_s": "int",
            },
            "tunnel_key": "str",
            "kem": "str",
            "config": "str",
            "certificates": [
                {
                    "issuer": "str",
                    "identity": "str",
                    "node": "str",
                    "key": "str",
                    "not_before": "str",
                    "not_after": "str",
                    "sha256": "str",
                    "grounds": {
                        "kind": "str",
                        "evidence": "str",
                        "measurements": ["str"],
                        "entry": "str",
                        "simulated": "bool",
                        "tunnel": "str",
                        "policy": "str",
                    },
                }
            ],
            "revocation_epoch": "int",
            "rotations": [{"peer": "str", "epoch": "int", "age_s": "float"}],
            "peers": [
                {
                    "peer": "str",
                    "state": "str",
                    "entry": "str",
                    "kind": "str",
                    "simulated": "bool",
                    "valid_until": "str",
                    "evidence": "str",
                    "tunnel_key": "str",
                    "attempts": "int",
                    "refusal": "NoneType",
                    "seconds": "float",
                }
            ],
            "said_by_peers": [
                {
                    "peer": "str",
                    "state": "str",
                    "entry": "str",
                    "valid_until": "str",
                    "tunnel_key": "str",
                    "refusal": "NoneType",
                }
            ],
            "steps": [STEP],
        }
    ],
    "checks": [
        {
            "name": "str",
            "party": "str",
            "about": "NoneType",
            "expected": "str",
            "got": "str",
            "holds": "bool",
        }
    ],
    "notes": ["str"],
}


def test_the_document_has_its_published_form() -> None:
    three = Three.make("snp")
    three.certify()
    found = three.judge()
    plain = json.loads(json.dumps(found.plain))
    assert skeleton(plain) == GOLDEN
    assert found.require() == NOW + timedelta(minutes=59) and found.collateral == {"amd/genoa/crl.der"}
    assert plain["verdict"] == "verified" and plain["format"] == 1
    for party in plain["parties"]:
        names = [each["name"] for each in party["steps"]]
        for step in (
            "claims.nonce",
            "claims.channel",
            "claims.binding",
            "snp.signature",
            "policy.measurement",
        ):
            assert step in names
        assert {"statement.mode", "statement.terms", "statement.tunnel"} <= set(names)
        assert party["evidence"]["age_s"] == 0.25 and party["evidence"]["life_s"] == 59 * 60
        assert party["anchor"]["sha256"] == ANCHORS.amd["genoa"] and party["entry"] == "it"
    rows = {(each["name"], each["party"], each["about"]) for each in plain["checks"]}
    for says in ("alpha", "beta", "gamma"):
        for of in {"alpha", "beta", "gamma"} - {says}:
            assert {
                (f"peers.{n}", says, of) for n in ("admitted", "valid", "tunnel", "kind", "evidence")
            } <= rows


def test_the_published_form_is_the_one_that_users_read() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    keys = {*GOLDEN, *GOLDEN["policy"], *GOLDEN["parties"][0], *GOLDEN["checks"][0]}
    keys |= {*GOLDEN["parties"][0]["evidence"], *GOLDEN["parties"][0]["rotations"][0]}
    assert not [key for key in keys if f"`{key}`" not in text and f"`{key}[]`" not in text]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_verified_and_simulation_is_loud(kind: str) -> None:
    found = Three.make(kind).judge()
    assert found.refusal is None and found.plain["simulated"] == (kind == "swtpm")
    assert ("SIMULATED" in document.verdict_line(found.plain)) == (kind == "swtpm")
    assert all(each["simulated"] == (kind == "swtpm") for each in found.plain["parties"])


# --- lies --------------------------------------------------------------------------------------------------

Lie = Callable[[Three], None]


def claim(**changes: Any) -> Lie:
    """Beta's evidence is bound to something else."""
    return lambda three: setattr(three.machines[1], "claim", lambda claims: replace(claims, **changes))


def say(change: Callable[[dict[str, Any]], Any]) -> Lie:
    """Beta says something else in its statement or view."""
    return lambda three: setattr(three.machines[1], "lie", change)


def message(change: Callable[[Three, dict[str, Any]], Any]) -> Lie:
    """Beta's message is another."""

    def lie(three: Three) -> None:
        three.tamper = lambda number, said: change(three, said) if number == 1 else None

    return lie


def peer(**changes: Any) -> Lie:
    """What beta says of gamma."""
    return say(lambda said: said["admission"]["peers"][1].update(changes))


def evidence_of(kind: str, **changes: Any) -> Lie:
    def lie(three: Three) -> None:
        three.machines[1].kind = kind
        three.machines[1].changes = changes

    return lie


def other_terms(**changes: Any) -> Lie:
    """Beta works under other terms, and says so consistently."""

    def lie(three: Three) -> None:
        three.terms[1] |= {name.replace("__", "."): value for name, value in changes.items()}
        three.machines[1].config = attestation.config.terms_digest(three.terms[1])

    return lie


def passed_on(three: Three) -> None:
    """Beta answers with what gamma answered to it for our very nonce, on a connection of theirs."""
    gamma = three.machines[2]
    envelope = gamma.envelope(three.nonce, "client:" + "cd" * 8, b"\7" * 32)
    three.tamper = lambda number, said: said.update(envelope=envelope.encode()) if number == 1 else None


LIES: dict[str, tuple[str, Lie, str]] = {
    # kind of evidence, what beta does, the step that catches it
    "a stale nonce": ("swtpm", claim(nonce=b"\7" * 32), "claims.nonce"),
    "another client's nonce": ("swtpm", claim(nonce_source="client:" + "cd" * 8), "claims.nonce_source"),
    "another channel's evidence": ("swtpm", claim(channel=b"\7" * 32), "claims.channel"),
    "no channel": ("swtpm", claim(channel=None), "claims.channel"),
    "another's tunnel key": (
        "swtpm",
        message(lambda three, said: said.update(tunnel=three.machines[2].tunnel)),
        "claims.tunnel",
    ),
    "another sealing key": ("swtpm", say(lambda said: said.update(kem=HpkeKey().public)), "claims.kem"),
    "another's evidence": ("swtpm", passed_on, "claims.node"),
    "another identity": ("swtpm", claim(identity=b"\7" * 32), "claims.identity"),
    "evidence for another purpose": ("swtpm", claim(role="owner"), "claims.role"),
    "evidence under another policy": ("swtpm", claim(policy=b"\7" * 32), "claims.policy"),
    "evidence under another configuration": ("swtpm", claim(config=b"\7" * 32), "claims.config"),
    "evidence that has ended": ("swtpm", claim(not_after=int(NOW.timestamp()) - 1), "claims.dates"),
    "a quote over something else": ("swtpm", evidence_of("swtpm", extra=b"\7" * 32), "claims.binding"),
    "a wrong measurement": ("snp", evidence_of("snp", measurement=b"\7" * 48), "policy.measurement"),
    "a debug guest": ("snp", evidence_of("snp", policy=0x30000 | 1 << 19), "policy.debug"),
    "a debug enclave": (
        "nitro",
        evidence_of("nitro", pcrs={n: bytes(48) for n in range(16)}),
        "policy.debug",
    ),
    "old firmware": ("snp", evidence_of("snp", reported=dict(pki.TCB, snp=22)), "snp.tcb"),
    "simulation in production": ("tpm", evidence_of("swtpm"), "policy.entry"),
    "a kind that no entry wants": ("snp", evidence_of("nitro"), "policy.entry"),
    "garbage": ("swtpm", message(lambda three, said: said.update(envelope=b"\xff")), "envelope.format"),
    "attestation switched off": (
        "swtpm",
        say(lambda said: said["admission"].update(mode="off")),
        "statement.mode",
    ),
    "peers judged by another policy": (
        "swtpm",
        say(lambda said: said["admission"]["policy"].update(digest="07" * 32)),
        "statement.policy",
    ),
    "peers judged by no policy": (
        "swtpm",
        say(lambda said: said["admission"].update(policy=None)),
        "statement.policy",
    ),
    "another kind than it shows": (
        "swtpm",
        say(lambda said: said["admission"].update(kind="snp")),
        "statement.kind",
    ),
    "terms that are not its own": ("swtpm", lambda three: three.terms[1].update(topk=41), "statement.terms"),
    "other peers": ("swtpm", other_terms(parties=["ab" * 32]), "statement.parties"),
    "readable links": ("swtpm", other_terms(tunnel__mode="none"), "statement.tunnel"),
    "other terms than its peers": ("swtpm", other_terms(topk=41), "parties.config"),
    "a peer left out": ("swtpm", say(lambda said: said["admission"]["peers"].pop()), "peers.listed"),
    "a peer twice": ("swtpm", peer(party=0), "peers.listed"),
    "a peer not admitted": ("swtpm", peer(state="waiting"), "peers.admitted"),
    "a peer admitted no longer": ("swtpm", peer(valid_until="2026-11-26T12:00:00Z"), "peers.valid"),
    "a peer admitted for no time": ("swtpm", peer(valid_until=None), "peers.valid"),
    "a peer at another tunnel key": ("swtpm", peer(tunnel_key="07" * 32), "peers.tunnel"),
    "a peer of another kind": ("swtpm", peer(kind="snp"), "peers.kind"),
    "a peer by evidence it never showed": ("swtpm", peer(evidence="07" * 32), "peers.evidence"),
    "evidence shown to nobody": ("swtpm", say(lambda said: said.update(shown=[])), "peers.evidence"),
    "another's machine": ("swtpm", evidence_of("swtpm", own=tpm_of(0, "swtpm")), "parties.machine"),
    "nothing": ("swtpm", lambda three: three.silent.add(1), "evidence.answer"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_party_that_lies_is_refused_at_a_named_step(what: str) -> None:
    kind, lie, step = LIES[what]
    three = Three.make(kind)
    assert three.judge().refusal is None
    lie(three)
    found = three.judge()
    party, caught = failed(found)
    # Two parties' word against each other: the first in order is named.
    first = {"evidence shown to nobody", "another's machine"}
    assert caught == step and party == ("alpha" if what in first else "beta")
    if not step.startswith(("peers.", "parties.")):
        report = found.plain["parties"][1]
        assert report["verdict"] == "refused" and report["failed"]["step"] == step
        assert found.plain["parties"][0]["verdict"] == "accepted"
        assert not [row for row in found.plain["checks"] if row["about"] == "beta"]
    if step == "policy.measurement":  # a refused party's document shows how far its evidence held
        assert {"claims.binding", "snp.signature", "policy.deny"} <= {
            each["name"] for each in found.plain["parties"][1]["steps"]
        }


def test_a_refusal_among_peers_is_told_with_its_step() -> None:
    three = Three.make()
    refusal = {"step": "snp.tcb", "expected": "23", "got": "22", "by": "us"}
    peer(state="refused", refusal=refusal)(three)
    found = three.judge()
    assert failed(found) == ("beta", "peers.admitted")
    row = next(each for each in found.plain["checks"] if not each["holds"])
    assert row["about"] == "gamma" and row["got"] == "refused at snp.tcb: expected 23; got 22"
    (said,) = [each for each in found.plain["parties"][2]["said_by_peers"] if each["peer"] == "beta"]
    assert said["state"] == "refused" and said["refusal"] == refusal


def of_another(three: Three, held: list[dict[str, Any]]) -> None:
    held[0] = three.machines[2].certificates[0]


def by_itself(three: Three, held: list[dict[str, Any]]) -> None:
    own = certificates.issue_own(three.identities[1], "party1", certificates.TlsKey().public, NOW)
    held[0] = {"issuer": 1, "certificate": own}


def without_grounds(three: Three, held: list[dict[str, Any]]) -> None:
    """Vouched for by nobody: what its issuer would say of itself."""
    own = certificates.issue_own(three.identities[0], "party1", certificates.TlsKey().public, NOW)
    held[0] = {"issuer": 0, "certificate": own}


def by_a_stranger(three: Three, held: list[dict[str, Any]]) -> None:
    held[0] = held[0] | {"issuer": 2}


def altered(three: Three, held: list[dict[str, Any]]) -> None:
    raw = held[0]["certificate"]
    held[0] = held[0] | {"certificate": raw[:-1] + bytes((raw[-1] ^ 1,))}


def reissued(**changes: Any) -> Callable[[Three, list[dict[str, Any]]], None]:
    """By the right peer, on other grounds."""

    def lie(three: Three, held: list[dict[str, Any]]) -> None:
        beta = three.machines[1]
        verdict = three.verdict_of(beta)
        own = {name: each for name, each in changes.items() if hasattr(verdict.claims, name)}
        others = {name: each for name, each in changes.items() if name not in own}
        if isinstance(own.get("policy"), str):  # a digest in the verdict, not bytes in the claims
            others["policy"] = own.pop("policy")
        verdict = replace(verdict, evidence=beta.showed(0))
        verdict = replace(verdict, **others)
        verdict = replace(verdict, claims=replace(verdict.claims, **own))
        key = certificates.TlsKey().public
        raw = certificates.issue(three.identities[0], beta.identity, key, verdict, NOW)
        held[0] = {"issuer": 0, "certificate": raw}

    return lie


CERTIFICATES: dict[str, tuple[Callable[[Three, list[dict[str, Any]]], None], str]] = {
    "another's": (of_another, "certificate.identity"),
    "by itself": (by_itself, "certificate.issuer"),
    "by a stranger": (by_a_stranger, "certificate.issuer"),
    "of the issuer itself": (without_grounds, "certificate.identity"),
    "altered": (altered, "certificate.signature"),
    "for another node": (reissued(node="party2"), "certificate.node"),
    "for another tunnel key": (reissued(tunnel=b"\7" * 32), "certificate.tunnel"),
    "under another policy": (reissued(policy="07" * 32), "certificate.policy"),
    "on evidence that was never shown": (reissued(evidence="07" * 32), "certificate.evidence"),
}


@pytest.mark.parametrize("what", CERTIFICATES)
def test_a_certificate_must_be_a_peers_word_for_these_very_keys(what: str) -> None:
    lie, step = CERTIFICATES[what]
    three = Three.make("snp")
    three.certify()
    assert three.judge().refusal is None
    lie(three, three.machines[1].certificates)
    found = three.judge()
    assert failed(found)[1] == "peers.certificate"
    (row,) = [each for each in found.plain["checks"] if not each["holds"]]
    assert row["about"] == "beta" and row["expected"].startswith(step + ": ")
    assert len(found.plain["parties"][1]["certificates"]) == 1


def test_a_certificate_ends() -> None:
    three = Three.make(text=text_for("swtpm", NOW + DAY))
    three.certify()
    three.now = NOW + timedelta(hours=1)
    for machine in three.machines:
        machine.at = three.now
    assert failed(three.judge()) == ("beta", "peers.certificate")


@pytest.mark.parametrize("what", ["identity", "tunnel", "measurement", "certificate"])
def test_what_owners_revoked_is_refused(what: str) -> None:
    three = Three.make("snp")
    three.certify()
    beta = three.machines[1]
    listed: dict[str, frozenset[str]] = {
        "identity": frozenset({beta.identity}),
        "tunnel": frozenset({beta.tunnel.hex()}),
        "measurement": frozenset({"11" * 48}),
        "certificate": frozenset({hashlib.sha256(beta.certificates[0]["certificate"]).hexdigest()}),
    }
    kind = "identities" if what == "identity" else what + "s"
    found = three.judge(revocations=Statement("ab" * 32, 5, NOW, **{kind: listed[what]}))
    party, step = failed(found)
    if what == "certificate":
        assert (party, step) == ("alpha", "peers.certificate")
    else:
        assert (party, step) == ("alpha" if what == "measurement" else "beta", f"revoked.{what}")


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (lambda basis: replace(basis, signatures=()), "policy.signatures"),
        (lambda basis: replace(basis, signatures=basis.signatures[:1]), "policy.signatures"),
        (lambda basis: replace(basis, threshold=3), "policy.signatures"),
        (lambda basis: replace(basis, owners=("ab" * 32, "cd" * 32)), "policy.signatures"),
        (
            lambda basis: replace(
                basis,
                signatures=(Signature(basis.owners[0], "00" * 64), *basis.signatures[1:]),
            ),
            "policy.signature",
        ),
    ],
)
def test_a_policy_that_owners_did_not_sign_counts_for_nothing(change: Callable[..., Any], step: str) -> None:
    three = Three.make()
    three.basis = change(three.basis)
    assert failed(three.judge()) == ("", step)


def test_an_expired_policy_admits_nobody() -> None:
    three = Three.make(text=text_for("swtpm", NOW + timedelta(minutes=5)))
    three.now = NOW + timedelta(minutes=5)
    assert three.judge().refusal is None
    late = three.judge(now=three.now + timedelta(seconds=1))
    assert failed(late) == ("", "policy.dates")
    assert all(each["failed"]["step"] == "policy.dates" for each in late.plain["parties"])


def test_stale_collateral_is_refused_and_its_age_is_told() -> None:
    three = Three.make("snp")
    old = three.basis.collateral.items
    three.basis = replace(
        three.basis,
        collateral=attestation.Collateral(
            {name: replace(item, fetched=NOW - timedelta(hours=20)) for name, item in old.items()}
        ),
    )
    assert three.judge().plain["parties"][0]["collateral"]["age_s"] == 20 * 3600
    three.basis = replace(
        three.basis,
        collateral=attestation.Collateral(
            {name: replace(item, fetched=NOW - timedelta(hours=25)) for name, item in old.items()}
        ),
    )
    assert failed(three.judge()) == ("alpha", "policy.crl.age")


def test_one_processor_under_two_parties_is_told() -> None:
    notes = Three.make("snp").judge().plain["notes"]
    assert len(notes) == 3 and notes[0].startswith("alpha and beta run on one processor: 00010203")


def test_different_revocation_epochs_are_told() -> None:
    three = Three.make()
    say(lambda said: said["admission"].update(revocation_epoch=5))(three)
    found = three.judge()
    assert found.refusal is None
    (note,) = found.plain["notes"]
    assert "alpha 4, beta 5, gamma 4" in note


def test_cautions_are_told() -> None:
    plain = Three.make("snp").judge().plain
    plain["parties"][0]["cautions"] = ["keys of Milan can be extracted"]
    printed: list[str] = []
    terminal = Terminal()
    terminal.text = lambda piece, style="": printed.append(piece)  # type: ignore[method-assign]
    document.show(terminal, plain)
    assert "keys of Milan can be extracted" in "".join(printed)


# --- offline -----------------------------------------------------------------------------------------------


def kept(three: Three, path: Path) -> Document:
    """Judge and store."""
    found: Document = three.judge()
    save(path, found, three.answers(), three.basis, three.now)
    return found


def again(three: Three, path: Path, **changes: Any) -> Document:
    given: dict[str, Any] = {
        "parties": three.parties,
        "owners": three.basis.owners,
        "threshold": three.basis.threshold,
        "anchors": ANCHORS,
    }
    return judge_saved(path, **given | changes)


@pytest.mark.parametrize(
    "what", [None, "a stale nonce", "a wrong measurement", "a peer not admitted", "nothing"]
)
def test_a_saved_document_gives_the_same_verdict(what: str | None, tmp_path: Path) -> None:
    kind, lie, _ = LIES[what] if what else ("snp", lambda three: None, "")
    three = Three.make(kind)
    lie(three)
    online = kept(three, tmp_path / "saved.json")
    offline = again(three, tmp_path / "saved.json")

    # Keys are fresh in each envelope of an ECDSA signature, so the evidence differs from one call to another.
    def same(found: Document) -> Any:
        plain = json.loads(json.dumps(found.plain))
        for each in plain["parties"]:
            if each["evidence"]:
                each["evidence"]["sha256"] = ""
        return plain

    assert same(offline) == same(online)
    stored = json.loads((tmp_path / "saved.json").read_text())
    assert stored["document"] == json.loads(json.dumps(online.plain))
    assert set(stored["record"]["collateral"]) == ({"amd/genoa/crl.der"} if kind == "snp" else set())


def test_a_saved_document_is_judged_by_our_owners_identities_and_time(tmp_path: Path) -> None:
    three, path = Three.make(), tmp_path / "saved.json"
    kept(three, path)
    assert failed(again(three, path, owners=("ab" * 32, "cd" * 32))) == ("", "policy.signatures")
    assert failed(again(three, path, threshold=3)) == ("", "policy.signatures")
    assert failed(again(three, path, at=NOW + 2 * DAY)) == ("", "policy.dates")
    assert failed(again(three, path, at=NOW + timedelta(hours=2))) == ("alpha", "claims.dates")
    assert (
        failed(again(three, path, anchors=attestation.REAL, parties=three.parties[::-1]))[1]
        == "claims.identity"
    )


def test_a_record_that_was_changed_is_refused_or_no_record(tmp_path: Path) -> None:
    """Every value of it in turn."""
    three, path = Three.make("snp"), tmp_path / "saved.json"
    kept(three, path)
    whole = json.loads(path.read_text())
    # Not part of what anything rests on: when we asked, and why there was no answer. Time and collateral have
    # a range in which the verdict is the same.
    free = re.compile(r"\.answers\.\d\.(asked|error)|\.time|\.fetched|^\.document")
    places = [place for place in leaves(whole) if not free.search("." + ".".join(map(str, place)))]
    assert len(places) > 10
    for place in places:
        changed = json.loads(path.read_text())
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        value = inner[place[-1]]
        if place[-1] == "client":  # claims name its first half, and nothing else of it
            inner["client"] = "00" + value[2:]
        else:
            inner[place[-1]] = value + 1 if isinstance(value, int) else str(value)[:-4] + "AAAA"
        other = tmp_path / "other.json"
        other.write_text(json.dumps(changed))
        try:
            assert again(three, other).refusal is not None, place
        except BadInput as error:
            assert str(other) in str(error)


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*at, key))
    else:
        yield at


@functools.cache
def one_saved() -> tuple[Three, str]:
    """Three parties, and the text of a document of theirs."""
    three = Three.make()
    with tempfile.TemporaryDirectory() as folder:
        kept(three, Path(folder) / "saved.json")
        return three, (Path(folder) / "saved.json").read_text()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_file_makes_it_fail_otherwise(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    three, text = one_saved()
    whole = json.loads(text)
    place = data.draw(st.sampled_from(list(leaves(whole["record"]))))
    inner = whole["record"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(st.none() | st.integers() | st.text(max_size=20) | st.just([]) | st.just({}))
    path = tmp_path_factory.getbasetemp() / "odd.json"
    path.write_text(json.dumps(whole))
    try:
        again(three, path)
    except BadInput:
        pass


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "record": 1}', "\x00", "[" * 9999]
)
def test_what_is_no_saved_document_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text(text)
    with pytest.raises(BadInput, match=r"saved\.json"):
        again(Three.make(), tmp_path / "saved.json")


# --- the federation file -----------------------------------------------------------------------------------

PARTIES = "".join(
    f'[[parties]]\nname = "p{n}"\nhost = "192.0.2.1"\nport = 7100\nidentity = "{n:02x}{"ab" * 31}"\n'
    for n in range(3)
)
OWNERS = f'owners = ["{"ab" * 32}", "{"cd" * 32}"]\n'


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("", "attestation.policy"),
        ("required = true\n", "attestation.policy"),
        ('policy = "p"\n', "attestation.owners"),
        ('policy = "p"\nthreshold = 3\n' + OWNERS, "attestation.threshold"),
        ('policy = "p"\nthreshold = 0\n' + OWNERS, "attestation.threshold"),
        ('policy = "p"\nrequired = 1\n' + OWNERS, "attestation.required"),
        ('policy = "p"\nsimulated = true\n' + OWNERS, "attestation.simulated"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_by_key(table: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text('client_key = "client.key"\n' + PARTIES + "[attestation]\n" + table)
    with pytest.raises(ConfigError, match=key):
        federation_file.load(path)


def test_attestation_is_required_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    head = 'client_key = "client.key"\n' + PARTIES
    path.write_text(head + '[attestation]\npolicy = "p"\n' + OWNERS)
    settings = federation_file.load(path).attestation
    assert settings.required and settings.policy == tmp_path / "p" and settings.threshold == 1
    path.write_text(head)
    assert federation_file.load(path).attestation.policy is None


# --- over the wire -----------------------------------------------------------------------------------------


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test to its end, or for a minute."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        async def guarded() -> None:
            with trio.fail_after(60):
                await test(**fixtures)

        trio.run(guarded)

    return run


class Running:
    """Three attested parties behind real doors, and what came through each."""

    def __init__(
        self, made: World, folder: Path, machines: list[Machine], came: list[tuple[int, str]]
    ) -> None:
        self.made, self.folder, self.machines, self.came = made, folder, machines, came
        self.file = folder / "client.toml"

    def kinds(self) -> set[str]:
        return {kind for _, kind in self.came}

    def federation(self, table: str, name: str = "client.toml", key: str = "client") -> None:
        text = f'client_key = "{key}.key"\ntokenizer = "tokenizer"\ndeadlines.silence = 5\n'
        for party in self.made.federation.parties:
            text += f'[[parties]]\nname = "{party.name}"\nhost = "{party.host}"\nport = {party.port}\n'
            text += f'identity = "{party.identity}"\n'
        (self.folder / name).write_text(text + table)

    async def __call__(self, command: str, *arguments: str) -> int:
        """Run a command of the real command line, in a thread."""
        given = [command, "--federation", str(self.file), *arguments]
        return await trio.to_thread.run_sync(main, given)


@asynccontextmanager
async def attested(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = "") -> AsyncIterator[Running]:
    came: list[tuple[int, str]] = []
    serve = control._Door._request

    async def noted(self: Any, client: Any, message: Any) -> None:
        came.append((self._config.party, message["t"]))
        await serve(self, client, message)

    monkeypatch.setattr(control._Door, "_request", noted)
    if not (folder / "tokenizer").exists():
        make_tokenizer(folder / "tokenizer")
    tunnel = Tunnel(mode="wireguard", rotate_seconds=0)
    async with world(folder, tunnel=tunnel) as made:
        basis = basis_of(text or text_for("swtpm", datetime.now(UTC) + DAY))
        machines = [
            Machine(config.party, identity.public_hex, basis.policy, config.digest())
            for config, identity in zip(made.configs, made.identities, strict=True)
        ]
        introduce(machines)
        for party, machine in zip(made.parties, machines, strict=True):
            party.evidence = machine
        made.clients[0].save(folder / "client.key")
        made.owner.save(folder / "owner.key")
        running = Running(made, folder, machines, came)
        running.federation(write_basis(folder, basis))
        yield running


@in_trio
async def test_honest_parties_are_believed_on_the_connection_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        federation = federation_file.load(running.file)
        found: list[Document] = []
        async with connect_all(federation, running.made.clients[0], found.append) as connections:
            (only,) = found
            assert only.refusal is None and only.plain["simulated"]
            assert [each.until for each in connections] == [only.until] * 3
            assert len({each.channel for each in connections}) == 3
            await survey(connections, federation)
            # Once the evidence has ended, nothing more is sent.
            connections[2].until = datetime.now(UTC)
            with pytest.raises(AttestationError, match=r"evidence\.life"):
                await connections[2].send({"t": "status"})
        assert running.came[:3] == [(0, "attest"), (1, "attest"), (2, "attest")] or running.kinds() == {
            "attest",
            "status",
        }


@in_trio
async def test_three_software_tpms_are_verified_and_one_that_nobody_enrolled_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real quotes, each by a TPM of its own; then beta answers with the TPM of nobody."""
    async with AsyncExitStack() as stack:
        attesters = []
        for _ in range(4):
            chip = stack.enter_context(software_tpm())
            settings = configuration.Attester(kind="swtpm", device=str(chip.socket))
            attesters.append(await stack.enter_async_context(open_attester(settings)))
        text = text_for("swtpm", datetime.now(UTC) + DAY).split("[[allow]]")[0]
        some = Three.make().machines[0].claims(b"\7" * 32, "us", b"\7" * 32, "party")
        for name, attester in zip(NAMES, attesters, strict=False):
            text += enrol(await attester.attest(some), f"host-of-{name}", configured=False).entry
        running = await stack.enter_async_context(attested(tmp_path, monkeypatch, text))
        for machine, attester in zip(running.machines, attesters, strict=False):
            machine.attester = attester
        assert await running("verify") == 0
        out = capsys.readouterr().out
        for name in NAMES:
            assert f'accepted by entry "host-of-{name}"' in out
        assert "swtpm.signature" in out and "SIMULATED" in out
        running.machines[1].attester = attesters[3]
        assert await running("generate", "Once upon") == 10
        assert "party beta: policy.entry" in capsys.readouterr().err
        running.machines[1].attester = attesters[0]  # a machine that is wanted, but another's
        assert await running("generate", "Once upon") == 10
        assert "party alpha: parties.machine" in capsys.readouterr().err
        assert "open" not in running.kinds()


@pytest.mark.parametrize("command", ["generate", "chat", "provision"])
@in_trio
async def test_nothing_of_a_prompt_or_a_weight_leaves_before_all_three_have_proved_themselves(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        running.machines[2].claim = lambda claims: replace(claims, nonce=b"\7" * 32)
        monkeypatch.setattr(commands, "load_checkpoint", lambda directory: plan())
        arguments = {"generate": ["Once upon"], "chat": [], "provision": [str(tmp_path)]}[command]
        assert await running(command, *arguments) == 10
        out, err = capsys.readouterr()
        assert out == "" and "mimir: party gamma: claims.nonce: expected " in err
        assert running.kinds() == {"attest"} and {party for party, _ in running.came} == {0, 1, 2}
        assert not running.made.fake.conversations and not running.made.fake.received


@in_trio
async def test_the_prompt_follows_when_all_three_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        assert await running("generate", "Once", "--max-new", "4") == 0
        out, err = capsys.readouterr()
        assert out and "VERIFIED: three parties by policy mesh version 3" in err and "SIMULATED" in err
        order = [kind for party, kind in running.came if party == 1]
        assert order[0] == "attest" and "open" in order
        assert await running("generate", "Once", "--max-new", "4", "--json") == 0
        first = json.loads(capsys.readouterr().out.splitlines()[0])
        assert first["event"] == "attestation" and first["verdict"] == "verified" and first["simulated"]


@in_trio
async def test_without_a_policy_a_client_is_told_what_it_relies_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        running.federation("")
        assert await running("generate", "Once", "--max-new", "4") == 0
        assert "believed by their keys alone" in capsys.readouterr().err
        assert "attest" not in running.kinds()
        assert await running("verify") == 3
        assert "attestation.policy: missing" in capsys.readouterr().err


@in_trio
async def test_a_party_without_evidence_is_refused_unless_none_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        running.made.parties[0].evidence = None
        running.machines[1].error = AttestationError("attester", "a TPM", "none")
        assert await running("generate", "Once", "--max-new", "4") == 10
        said = capsys.readouterr().err
        assert "party alpha: evidence.answer" in said and 'attestation.mode is "off"' in said
        assert "open" not in running.kinds()
        table = running.file.read_text()
        running.file.write_text(table + "required = false\n")
        assert await running("generate", "Once", "--max-new", "4") == 0
        said = capsys.readouterr().err
        assert "REFUSED at party alpha: evidence.answer" in said and "Going on all the same" in said


@in_trio
async def test_verify_prints_and_keeps_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        saved = str(tmp_path / "saved.json")
        assert await running("verify", "--save", saved) == 0
        out, err = capsys.readouterr()
        assert err == "" and "\x1b" not in out
        assert all(len(line) <= WIDTH for line in out.splitlines())
        assert out.splitlines()[-1].startswith("VERIFIED: three parties by policy mesh version 3")
        assert out.count("SIMULATED: proves nothing about the machine") >= 5
        for machine, name in zip(running.machines, ("alpha", "beta", "gamma"), strict=True):
            assert f"{name} (party {machine.number}, " in out and machine.tunnel.hex() in out
        assert "claims.nonce" in out and "peers.tunnel" in out and running.kinds() == {"attest"}

        assert await running("verify", "--json", "--save", saved) == 0
        (plain,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert plain.pop("event") == "verification" and plain.pop("offline") is False
        assert await running("verify", "--offline", saved, "--json") == 0
        (offline,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert offline.pop("event") == "verification" and offline.pop("offline") is True
        assert offline == plain
        assert await running("verify", "--offline", saved, "--at", "2031-01-01T00:00:00Z") == 10
        assert "REFUSED at policy.dates: " in capsys.readouterr().out


@in_trio
async def test_verify_names_a_liar_and_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        running.machines[0].lie = lambda said: said["admission"]["peers"][0].update(tunnel_key="07" * 32)
        assert await running("verify") == 10
        last = capsys.readouterr().out
        assert "NO  peers.tunnel" in last and re.search(r"REFUSED at party alpha: peers\.tunnel", last)
        running.machines[0].lie = lambda said: None
        text = running.file.read_text()
        running.file.write_text(re.sub(r"port = \d+", "port = 1", text, count=1))
        assert await running("verify", "--json") == 10
        (plain,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert plain["failed"]["party"] == "alpha" and "cannot be reached" in plain["failed"]["got"]
        assert [each["verdict"] for each in plain["parties"]] == ["refused", "accepted", "accepted"]


@in_trio
async def test_watching_ends_when_something_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        machine, asked = running.machines[1], 0

        def claim(claims: Any) -> Any:
            nonlocal asked
            asked += 1
            return claims if asked < 3 else replace(claims, nonce=b"\7" * 32)

        machine.claim = claim
        monkeypatch.setattr(trio, "sleep", lambda seconds: trio.lowlevel.checkpoint())
        assert await running("verify", "--watch", "60") == 10
        lines = capsys.readouterr().out.splitlines()
        assert asked == 3 and any(
            line.startswith("REFUSED at party beta: claims.nonce") for line in lines[-4:]
        )
        assert sum(line.startswith("verification at") for line in lines) == 2  # the first, and the last
        assert sum(" VERIFIED: " in line for line in lines) == 1


@in_trio
async def test_flags_take_the_place_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        running.federation("")
        found = re.findall(r"[0-9a-f]{64}", (tmp_path / "policy.toml.sig").read_text())
        owners = ",".join(sorted({each for each in found if each in running_owners(tmp_path)}))
        given = ["--policy", str(tmp_path / "policy.toml"), "--owners", owners]
        assert await running("verify", *given, "--threshold", "2") == 0
        assert await running("verify", *given, "--threshold", "3") == 2
        assert "attestation.threshold" in capsys.readouterr().err
        assert await running("verify", "--policy", str(tmp_path / "policy.toml")) == 2
        assert "attestation.owners" in capsys.readouterr().err


def running_owners(folder: Path) -> set[str]:
    from mimir.attest.policy import load_signatures

    return {each.key for each in load_signatures(folder / "policy.toml.sig")}


@in_trio
async def test_status_shows_who_admitted_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with attested(tmp_path, monkeypatch) as running:
        for party, machine in zip(running.made.parties, running.machines, strict=True):
            boot = [
                {"step": "serve", "state": "done", "began": 1.5, "seconds": 0.25},
                {"step": "admit", "state": "waits", "began": 0.5, "seconds": None, "note": "none yet"},
            ]
            party.status = lambda m=machine, b=boot: {"admission": m.view(), "boot": b}  # type: ignore[method-assign, misc]
        assert await running("status") == 0
        out, err = capsys.readouterr()
        assert out.count('admitted by entry "it" until ') == 6 and out.count("revocation epoch 4") == 3
        assert "SIMULATED" in out and "VERIFIED: three parties" in err
        steps = "  boot: admit    waits at 0.50 s (none yet)\n  boot: serve    done at 1.50 s, 0.25 s\n"
        assert out.count(steps) == 3  # in the order in which they began
        refusal = {"step": "snp.tcb", "expected": "23", "got": "22", "by": "peer"}
        change = {"state": "refused", "refusal": refusal, "attempts": 3}
        running.machines[0].lie = lambda said: said["admission"]["peers"][0].update(change)
        assert await running("status") == 10
        out, err = capsys.readouterr()
        line = "party 1: refused by that party itself at snp.tcb: expected 23; got 22, for 12 s"
        assert line + ", 3 attempts" in out.replace("\n", " ")
        assert "party alpha: peers.admitted" in err


@pytest.mark.parametrize(
    "view",
    [
        None,
        7,
        [],
        {},
        {"mode": "off"},
        {"mode": "required", "peers": [1, {}]},
        {"mode": "required", "peers": 1},
    ],
)
def test_status_lines_take_whatever_a_party_says(view: Any) -> None:
    assert all(line.isprintable() for line in document.admission_lines(view))
    hostile = {"mode": "required", "kind": "\x1b[2J", "peers": [{"party": "\x1b", "state": "\u202e"}]}
    assert all(line.isprintable() for line in document.admission_lines(hostile))


def test_colours_are_for_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    plain = Three.make().judge().plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    document.show(Terminal(), plain)
    out = capsys.readouterr().out
    assert "\x1b[32m" in out and "\x1b[1;33m" in out
    bare = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "\x1b" not in bare
    monkeypatch.setenv("NO_COLOR", "1")
    document.show(Terminal(), plain)
    assert capsys.readouterr().out == bare
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    document.show(Terminal(), plain)
    assert capsys.readouterr().out == bare
