"""Who is admitted: envelopes, binding, policies, collateral and the commands, with authorities of our own.

Real evidence is tested in test_attest.py; here every kind is made by keys of ours, so that each part of what
is expected can be changed alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tomllib
import urllib.parse
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import attest_pki as pki
import cbor2
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ObjectIdentifier
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir import policy as commands
from mimir.__main__ import main
from mimir.attest import collateral, policy, snp, tdx, tpm
from mimir.attest.appraisal import Anchors, Verdict, appraise, examine, verify
from mimir.attest.collateral import Answer, Collateral, Item, Store
from mimir.attest.evidence import KINDS, MAX_ENVELOPE, TAG, Claims, Envelope, expect
from mimir.attest.policy import Policy
from mimir.attest.trail import Trail, stamp
from mimir.client.terminal import Terminal
from mimir.errors import AttestationError, BadInput, ConfigError, LocalError
from mimir.net.identity import Identity

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of sockets that other tests left open
]
NOW = pki.NOW

AMD, INTEL, AWS = pki.Amd.make(), pki.Intel.make(), pki.Aws.make()
TPM, RSA_TPM = pki.Tpm(), pki.Tpm(kind="rsa")
ANCHORS = Anchors(AMD.roots, INTEL.roots, AWS.roots, {})

HEAD = """
format = 1
name = "mesh"
version = 3
environment = "{environment}"
not_after = 2027-01-01T00:00:00Z
"""
PRODUCT = '[[allow{at}.product]]\nname = "genoa"\nbl = 10\ntee = 0\nsnp = 23\nucode = 84\n'
SNP_BODY = f'measurements = ["{"11" * 48}"]\nhost_data = "any"\nchip_ids = "any"\n'
TDX_BODY = (
    f'mrtd = ["{"44" * 48}"]\nmrconfigid = "any"\nppids = "any"\ntcb_eval_min = 19\n'
    f'rtmr0 = ["{"50" * 48}"]\nrtmr1 = ["{"51" * 48}"]\nrtmr2 = "any"\nrtmr3 = "any"\n'
)
PCRS = f'pcrs = {{ "0" = ["{"00" * 32}"], "7" = ["{"07" * 32}"] }}\n'


def entry(kind: str, name: str = "it", **changes: str) -> str:
    """One [[allow]] entry that wants the evidence made here."""
    text = f'[[allow]]\nid = "{name}"\nkind = "{kind}"\n'
    if kind == "snp":
        text += SNP_BODY + PRODUCT.format(at="")
    elif kind == "tdx":
        text += TDX_BODY
    elif kind == "nitro":
        text += f'pcrs = {{ "0" = ["{"01" * 48}"], "1" = ["{"02" * 48}"] }}\n'
    elif kind in ("tpm", "swtpm"):
        text += f'ak_names = ["{TPM.name}"]\n{PCRS}'
    elif kind == "az-snp-vtpm":
        text += f"[allow.snp]\n{SNP_BODY}{PRODUCT.format(at='.snp')}[allow.tpm]\n{PCRS}"
    else:
        text += f"[allow.tdx]\n{TDX_BODY}[allow.tpm]\n{PCRS}"
    for old, new in changes.items():
        assert old in text, old
        text = "\n".join(
            f"{old} = {new}" if line.startswith(f"{old} =") else line for line in text.split("\n")
        )
    return text


def policy_of(*entries: str, tables: str = "", environment: str = "production") -> Policy:
    text = HEAD.format(environment=environment) + tables + "".join(entries)
    return policy.parse(tomllib.loads(text), Path("policy.toml").absolute())


def policy_for(kind: str, tables: str = "") -> Policy:
    environment = "simulation" if kind == "swtpm" else "production"
    return policy_of(entry(kind), tables=tables, environment=environment)


def claims_for(wanted: Policy, **changes: Any) -> Claims:
    at = int(NOW.timestamp())
    settings: dict[str, Any] = {
        "role": "party",
        "node": "party0",
        "identity": b"\1" * 32,
        "tunnel": b"\2" * 32,
        "kem": None,
        "nonce": b"\3" * 32,
        "nonce_source": "party1 17",
        "not_before": at - 60,
        "not_after": at + 3600,
        "policy": wanted.digest(),
        "channel": None,
        "config": b"\4" * 32,
    }
    return Claims(**settings | changes)


def evidence_for(kind: str, claims: Claims, **changes: Any) -> Envelope:
    """Genuine evidence of a machine of ours, bound to these claims. `changes` are of its statement."""
    data, short = claims.report_data(), claims.qualifying_data()
    amd = {"vek": AMD.vek(), "chain": AMD.chain()}
    if kind == "snp":
        return Envelope(kind, AMD.report(**{"report_data": data} | changes), claims.encode(), amd)
    if kind == "tdx":
        return Envelope(kind, INTEL.quote(**{"report_data": data} | changes), claims.encode())
    if kind == "nitro":
        document = AWS.document(**{"user_data": data, "nonce": claims.nonce} | changes)
        return Envelope(kind, document, claims.encode())
    own = changes.pop("own", TPM if kind in ("tpm", "swtpm") else RSA_TPM)
    quote, signature = own.quote(changes.pop("extra", short))
    parts: dict[str, Any] = {"quote": quote, "signature": signature, "pcrs": {"sha256": own.pcrs}}
    if kind in ("tpm", "swtpm"):
        return Envelope(kind, cbor2.dumps(parts | {"ak": own.public()}, canonical=True), claims.encode())
    parts["signature"] = signature[6:]  # Azure gives the bare bytes
    hardware = {"report_data": pki.hcl_digest(own)} | changes
    if kind == "az-snp-vtpm":
        parts["hcl"] = pki.hcl(AMD.report(**hardware), 2, own)
        return Envelope(kind, cbor2.dumps(parts, canonical=True), claims.encode(), amd)
    parts["hcl"] = pki.hcl(bytes(1184), 4, own)
    parts["td_quote"] = INTEL.quote(**hardware)
    return Envelope(kind, cbor2.dumps(parts, canonical=True), claims.encode())


def stored(fetched: datetime = NOW, **changes: bytes | None) -> Collateral:
    items: dict[str, bytes | None] = {
        "amd/genoa/crl.der": AMD.crl(),
        f"intel/{pki.FMSPC.hex()}.json": INTEL.collateral(),
    }
    items |= {name.replace("__", "/").replace("_der", ".der"): value for name, value in changes.items()}
    return Collateral({name: Item(value, fetched) for name, value in items.items() if value is not None})


def admit(kind: str, wanted: Policy | None = None, **changes: Any) -> Verdict:
    wanted = wanted or policy_for(kind)
    claims = claims_for(wanted)
    given = {
        "raw": evidence_for(kind, claims).encode(),
        "policy": wanted,
        "collateral": stored(),
        "expected": claims,
        "now": NOW,
        "anchors": ANCHORS,
    }
    return appraise(**given | changes)


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(AttestationError) as caught:
        work()
    return caught.value.step


# --- admission ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_admitted_by_an_entry_that_wants_it(kind: str) -> None:
    verdict = admit(kind)
    assert verdict.kind == kind and verdict.entry == "it" and verdict.simulated == (kind == "swtpm")
    assert NOW < verdict.valid_until <= NOW + timedelta(hours=1)
    plain = json.loads(json.dumps(verdict.public()))
    names = [each["name"] for each in plain["steps"]]
    assert plain["verdict"] == "accept" and "claims.binding" in names and "policy.deny" in names
    assert all(each["expected"] and each["got"] for each in plain["steps"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_verdict_names_its_trust_anchor_and_the_age_of_collateral(kind: str) -> None:
    verdict = admit(kind, collateral=stored(NOW - timedelta(hours=2)))
    spki = TPM.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    roots = {
        "amd": ("AMD root key for genoa", AMD.roots["genoa"]),
        "intel": ("Intel SGX Root CA", next(iter(INTEL.roots))),
        "aws": ("AWS Nitro Enclaves Root G1", next(iter(AWS.roots))),
        "key": ("the attestation key itself, enrolled by name", hashlib.sha256(spki).hexdigest()),
    }
    owner = {"snp": "amd", "az-snp-vtpm": "amd", "tdx": "intel", "az-tdx-vtpm": "intel", "nitro": "aws"}
    assert (verdict.anchor.name, verdict.anchor.sha256) == roots[owner.get(kind, "key")]
    aged = owner.get(kind) in ("amd", "intel")
    assert verdict.fetched == (NOW - timedelta(hours=2) if aged else None)
    plain = verdict.public()
    assert plain["anchor"] == {"name": verdict.anchor.name, "sha256": verdict.anchor.sha256}
    assert plain["fetched"] == ("2026-11-26T10:00:00Z" if aged else None)


def test_a_certified_key_rests_on_the_root_of_its_authority() -> None:
    leaf, top = TPM.certified()
    root = tpm.Root("a cloud", frozenset({ObjectIdentifier("2.23.133.8.3")}), True)
    wanted = policy_of(entry("tpm").replace("ak_names", "ak_roots").replace(TPM.name, pki.digest(top)))
    claims = claims_for(wanted)
    given = {"ak_certificate": pki.pem(leaf), "ak_authorities": pki.pem(top)}
    raw = replace(evidence_for("tpm", claims), endorsements=given).encode()
    anchors = replace(ANCHORS, tpm={pki.digest(top): root})
    verdict = admit("tpm", wanted, raw=raw, anchors=anchors)
    assert (verdict.anchor.name, verdict.anchor.sha256) == ("a cloud", pki.digest(top))


def test_a_refusal_carries_every_step_that_passed_before_it() -> None:
    """Whichever stage ends it: claims, evidence, binding, policy."""
    whole = [each.name for each in admit("snp").steps]
    wanted = policy_for("snp")
    claims = claims_for(wanted)

    def passed(**changes: Any) -> tuple[str, list[str]]:
        with pytest.raises(AttestationError) as caught:
            admit("snp", wanted, **changes)
        return caught.value.step, [each.name for each in caught.value.passed]

    step, before = passed(expected=replace(claims, config=b"\7" * 32))
    assert step == "claims.config" and before == [n for n in whole if n.startswith("claims.")][:12]
    step, before = passed(raw=evidence_for("snp", claims, measurement=b"\7" * 48).encode())
    assert step == "policy.measurement" and before == whole[: len(before)] and "policy.deny" in before
    step, before = passed(raw=evidence_for("snp", claims, reported=dict(pki.TCB, snp=1)).encode())
    assert step == "snp.tcb" and "claims.config" in before and "snp.signature" in before
    step, before = passed(raw=evidence_for("snp", claims, report_data=bytes(64)).encode())
    assert step == "claims.binding" and before == whole[: whole.index("claims.binding")]


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_serves_the_claims_that_it_was_made_for_and_no_others(kind: str) -> None:
    """Each claim changed in turn: in what is expected, in what is carried, and in both, which is a splice."""
    wanted = policy_for(kind)
    claims = claims_for(wanted)
    envelope = evidence_for(kind, claims)
    plain = envelope.encode()
    others: dict[str, Any] = {
        "role": "client",
        "node": "party1",
        "nonce_source": "party2 17",
        "not_before": claims.not_before - 1,
        "not_after": claims.not_after + 1,
    }
    for each in fields(Claims):
        other = replace(claims, **{each.name: others.get(each.name, b"\x77" * 32)})
        spliced = replace(envelope, claims=other.encode()).encode()
        if each.name in ("not_before", "not_after"):  # the peer's to say, but bound all the same
            assert refused(lambda r=spliced: admit(kind, wanted, raw=r)) == "claims.binding"  # type: ignore[misc]
            continue
        assert refused(lambda r=spliced: admit(kind, wanted, raw=r)) == f"claims.{each.name}"  # type: ignore[misc]
        assert refused(lambda o=other: admit(kind, wanted, raw=plain, expected=o)) == f"claims.{each.name}"  # type: ignore[misc]
        if each.name != "policy":
            step = refused(lambda r=spliced, o=other: admit(kind, wanted, raw=r, expected=o))  # type: ignore[misc]
            assert step == "claims.binding"


def test_evidence_for_another_policy_serves_no_verdict_of_this_one() -> None:
    """Bound, expected and satisfied; but the policy that judges is not the one that was agreed."""
    agreed, other = policy_for("snp"), policy_for("snp", "[freshness]\nreattest_s = 600\n")
    claims = claims_for(agreed)
    raw = evidence_for("snp", claims).encode()
    assert admit("snp", agreed, raw=raw, expected=claims)
    assert refused(lambda: admit("snp", other, raw=raw, expected=claims)) == "claims.policy"


def test_nitro_must_repeat_the_nonce() -> None:
    claims = claims_for(policy_for("nitro"))
    raw = evidence_for("nitro", claims, nonce=bytes(32)).encode()
    assert refused(lambda: admit("nitro", raw=raw)) == "claims.nonce"


def test_claims_have_their_time() -> None:
    wanted, at = policy_for("snp"), int(NOW.timestamp())
    for changes, step in (
        ({"not_before": at + 1}, "claims.dates"),
        ({"not_after": at - 1}, "claims.dates"),
        ({"not_after": at + 86400}, "claims.life"),
    ):
        claims = claims_for(wanted, **changes)
        raw = evidence_for("snp", claims).encode()
        assert refused(lambda r=raw, c=claims: admit("snp", wanted, raw=r, expected=c)) == step  # type: ignore[misc]


def test_claims_and_what_they_hash_to() -> None:
    """The encoding, written out: what another implementation has to produce."""
    claims = claims_for(policy_for("snp"), policy=b"\5" * 32)
    raw = claims.encode()
    assert raw.startswith(b"\xad\x01\x6e" + TAG + b"\x02\x65party\x03\x66party0\x04\x58\x20" + b"\1" * 32)
    assert Claims.decode(raw, Trail("test")) == claims
    assert claims.report_data() == pki.hashlib.sha512(b"mimir-attest-1\0" + raw).digest()
    assert claims.qualifying_data() == pki.hashlib.sha256(b"mimir-attest-1\0" + raw).digest()
    for name, bad in (
        ("nonce", b"short"),
        ("role", ""),
        ("node", "x" * 129),
        ("not_after", -1),
        ("kem", b""),
    ):
        with pytest.raises(LocalError, match=name):
            replace(claims, **{name: bad})
    found = cbor2.loads(raw)
    for number, value in ((1, "mimir-attest-2"), (14, 0), (7, "text"), (9, 1.5), (5, None)):
        other = cbor2.dumps(found | {number: value}, canonical=True)
        assert refused(lambda o=other: Claims.decode(o, Trail("test"))) == "test.format"  # type: ignore[misc]
    unsorted = cbor2.dumps(dict(reversed(found.items())))
    for other in (unsorted, raw + b"\0", b"\xbf" + raw[1:] + b"\xff", raw[:1] + b"\x18\x01" + raw[2:]):
        assert refused(lambda o=other: Claims.decode(o, Trail("test"))) == "test.format"  # type: ignore[misc]


def test_the_verifier_compares_with_its_own_expectation() -> None:
    carried = claims_for(policy_for("snp"))
    own = expect(carried, replace(carried, not_before=0, not_after=1), NOW, Trail("claims"))
    assert own == carried


def test_an_envelope_has_one_encoding() -> None:
    envelope = evidence_for("tpm", claims_for(policy_for("tpm")))
    raw = envelope.encode()
    assert Envelope.decode(raw) == envelope
    found = cbor2.loads(raw)
    for change, step in (
        ({7: b""}, "format"),
        ({1: 2}, "version"),
        ({1: True}, "version"),
        ({2: "sgx"}, "kind"),
        ({3: b""}, "format"),
        ({3: "text"}, "format"),
        ({3: bytes(33 << 10)}, "format"),
        ({4: {"vek": b"x"}}, "endorsements"),
        ({4: {"ak_certificate": b""}}, "format"),
        ({4: []}, "endorsements"),
        ({5: None}, "format"),
        ({6: bytes(5 << 10)}, "format"),
    ):
        other = cbor2.dumps(found | change, canonical=True)
        assert refused(lambda o=other: Envelope.decode(o)) == f"envelope.{step}", change  # type: ignore[misc]
    del found[5]
    assert refused(lambda: Envelope.decode(cbor2.dumps(found, canonical=True))) == "envelope.format"
    twice = bytes((raw[0] + 1,)) + raw[1:] + b"\x01\x01"
    for other in (
        twice,
        raw + b"\0",
        cbor2.dumps(dict(reversed(cbor2.loads(raw).items()))),
        b"\xd8\x18" + raw,
    ):
        assert refused(lambda o=other: Envelope.decode(o)) == "envelope.format"  # type: ignore[misc]
    for other in (b"", bytes(MAX_ENVELOPE + 1)):
        assert refused(lambda o=other: Envelope.decode(o)) == "envelope.length"  # type: ignore[misc]
    with pytest.raises(LocalError, match="limit"):
        replace(envelope, log=bytes(MAX_ENVELOPE)).encode()
    parts = cbor2.loads(envelope.evidence)
    for change in ({"more": b"x"}, {"quote": 1}, {"pcrs": []}, {"pcrs": {"sha256": {24: bytes(32)}}}):
        bad = replace(envelope, evidence=cbor2.dumps(parts | change, canonical=True))
        assert refused(bad.parts) in ("envelope.parts", "envelope.format")
    for missing in ("quote", "signature", "pcrs"):
        fewer = {name: value for name, value in parts.items() if name != missing}
        bad = replace(envelope, evidence=cbor2.dumps(fewer, canonical=True))
        assert refused(bad.parts) == "envelope.parts"


ENVELOPES = {kind: evidence_for(kind, claims_for(policy_for(kind))).encode() for kind in KINDS}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_envelope_brings_anything_but_a_refusal(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    raw = bytearray(ENVELOPES[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        patch = data.draw(st.binary(max_size=8))
        raw[at : at + data.draw(st.sampled_from((len(patch), 0, 1, 300)))] = patch
    if bytes(raw) != ENVELOPES[kind]:
        try:
            verdict = admit(kind, raw=bytes(raw))
        except AttestationError:
            return
        # What is left open: blanks in the endorsements' texts, and a TDREPORT that nothing is taken from.
        assert verdict.entry == "it" and stated(bytes(raw)) == stated(ENVELOPES[kind])


def stated(raw: bytes) -> Envelope:
    """An envelope without what nobody vouches for."""
    envelope = replace(Envelope.decode(raw), endorsements={})
    if envelope.kind != "az-tdx-vtpm":
        return envelope
    parts = cbor2.loads(envelope.evidence)
    parts["hcl"] = parts["hcl"][:32] + parts["hcl"][1216:]
    return replace(envelope, evidence=cbor2.dumps(parts, canonical=True))


def test_a_trust_domain_s_event_log_must_replay() -> None:
    """Registers of a CCEL table count from 1; ours hold what these events give."""
    first, second = b"\x61" * 48, b"\x62" * 48
    held = pki.hashlib.sha384(pki.hashlib.sha384(bytes(48) + first).digest() + second).digest()
    rtmr = [held, *(bytes((0x51 + n,)) * 48 for n in range(3))]
    wanted = policy_of(entry("tdx", rtmr0=f'["{held.hex()}"]'))
    claims = claims_for(wanted)
    envelope = evidence_for("tdx", claims, rtmr=rtmr)

    def with_log(*events: tuple[int, bytes]) -> bytes:
        log = pki.event_log([(register, 9, value) for register, value in events], bank="sha384")
        return replace(envelope, log=log).encode()

    assert admit("tdx", wanted, raw=with_log((1, first), (1, second))).entry == "it"
    for events in (((1, second), (1, first)), ((2, first),), ((0, first),), ((5, first),)):
        raw = with_log(*events)
        assert refused(lambda r=raw: admit("tdx", wanted, raw=r)).startswith("tdx.log.rtmr")  # type: ignore[misc]


# --- policies ----------------------------------------------------------------------------------------------


def test_an_empty_policy_admits_nobody(tmp_path: Path) -> None:
    for kind in KINDS:
        assert refused(lambda k=kind: admit(k, policy_of())) == "policy.entry"  # type: ignore[misc]
    assert main(["policy", "new", str(tmp_path / "p.toml")]) == 0
    assert policy.load(tmp_path / "p.toml").allow == ()


def test_an_expired_policy_admits_nobody() -> None:
    late = datetime.fromisoformat("2027-01-01T00:00:01Z")
    assert refused(lambda: admit("nitro", now=late)) == "policy.dates"


@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_that_no_entry_wants_is_refused(kind: str) -> None:
    wanted = policy_for(kind)
    claims = claims_for(wanted)
    if kind.endswith("snp-vtpm") or kind == "snp":
        changes, step = {"measurement": b"\x12" * 48}, "policy.measurement"
    elif kind.endswith("tdx-vtpm") or kind == "tdx":
        changes, step = {"mrtd": b"\x45" * 48}, "policy.mrtd"
    elif kind == "nitro":
        changes, step = {"pcrs": {0: b"\1" * 48, 1: b"\3" * 48}}, "policy.pcr1"
    else:
        other = entry(kind).replace("07" * 32, "08" * 32)
        wanted = policy_of(other, environment="simulation" if kind == "swtpm" else "production")
        claims, changes, step = claims_for(wanted), {}, "policy.pcr7"
    raw = evidence_for(kind, claims, **changes).encode()
    assert refused(lambda: admit(kind, wanted, raw=raw, expected=claims)) == step


@pytest.mark.parametrize("kind", ["az-snp-vtpm", "az-tdx-vtpm"])
def test_azure_needs_both_parts(kind: str) -> None:
    """Hardware that names another key, and a vTPM whose boot is not wanted."""
    claims = claims_for(policy_for(kind))
    raw = evidence_for(kind, claims, report_data=bytes(64)).encode()
    assert refused(lambda: admit(kind, raw=raw)) == f"{kind}.runtime_data"
    wanted = policy_of(entry(kind).replace("07" * 32, "08" * 32))
    assert refused(lambda: admit(kind, wanted)) == "policy.pcr7"


def test_rules_judge_facts_of_their_own_kind() -> None:
    """Policy.judge picks entries by kind; a rule that is handed others refuses, and does not crash."""
    facts = {}
    for kind in ("az-snp-vtpm", "az-tdx-vtpm"):
        envelope = evidence_for(kind, claims_for(policy_for(kind)))
        facts[kind], _ = verify(envelope, stored(), NOW, timedelta(0), ANCHORS)
    for kind, other in (("az-snp-vtpm", "az-tdx-vtpm"), ("az-tdx-vtpm", "az-snp-vtpm")):
        rule: Any = policy_for(kind).allow[0].rule
        assert refused(lambda r=rule, f=facts[other]: r.judge(f, Trail("policy"))) == "policy.hardware"  # type: ignore[misc]
    wanted = policy_for("az-snp-vtpm")
    assert refused(lambda: wanted.judge(facts["az-snp-vtpm"], NOW, None)) == "policy.crl.age"


def test_an_azure_blob_is_of_the_hardware_that_it_says() -> None:
    claims = claims_for(policy_for("az-snp-vtpm"))
    envelope = evidence_for("az-snp-vtpm", claims)
    parts = cbor2.loads(envelope.evidence)
    parts["hcl"] = pki.hcl(AMD.report(report_data=pki.hcl_digest(RSA_TPM)), 4, RSA_TPM)
    raw = replace(envelope, evidence=cbor2.dumps(parts, canonical=True)).encode()
    assert refused(lambda: admit("az-snp-vtpm", raw=raw)) == "az-snp-vtpm.hardware"


def test_fields_of_two_entries_are_never_mixed() -> None:
    """One entry wants this measurement on another host, the other this host with another measurement."""
    first = entry("snp", "first", host_data=f'["{"33" * 32}"]')
    second = entry("snp", "second", measurements=f'["{"12" * 48}"]', host_data=f'["{"22" * 32}"]')
    assert refused(lambda: admit("snp", policy_of(first, second))) == "policy.entry"
    verdict = admit("snp", policy_of(first, second, entry("snp", "third")))
    assert verdict.entry == "third"
    with pytest.raises(AttestationError, match=r"first: policy.host_data, second: policy.measurement"):
        admit("snp", policy_of(first, second))


def test_the_deny_list_wins() -> None:
    spki = snp.parse_vek(AMD.vek(), Trail("snp")).spki_digest
    denied = {
        "snp": {
            "measurements": "11" * 48,
            "chip_ids": AMD.hwid.hex(),
            "vek_spki": spki,
            "identities": "01" * 32,
            "tunnels": "02" * 32,
        },
        "tdx": {"measurements": "50" * 48, "chip_ids": pki.PPID.hex(), "fmspcs": pki.FMSPC.hex()},
        "nitro": {"measurements": "03" * 48},  # PCR 2, which the entry does not even look at
        "tpm": {"measurements": "03" * 32, "ak_names": TPM.name},
    }
    for kind, lists in denied.items():
        for name, value in lists.items():
            assert (
                refused(lambda k=kind, n=name, v=value: admit(k, policy_for(k, f'[deny]\n{n} = ["{v}"]\n')))
                == "policy.deny"
            )  # type: ignore[misc]
            assert admit(kind, policy_for(kind, f'[deny]\n{name} = ["{"77" * (len(value) // 2)}"]\n'))


def test_revocation_lists_must_be_there_and_fresh() -> None:
    none = stored(amd__genoa__crl_der=None)
    assert refused(lambda: admit("snp", collateral=none)) == "policy.crl"
    assert admit("snp", policy_for("snp", "[crl]\nrequired = false\n"), collateral=none)
    old = stored(NOW - timedelta(hours=25))
    for kind in ("snp", "tdx", "az-snp-vtpm", "az-tdx-vtpm"):
        assert refused(lambda k=kind: admit(k, collateral=old)) == "policy.crl.age"  # type: ignore[misc]
        assert admit(kind, policy_for(kind, "[crl]\nmax_age_h = 26\n"), collateral=old)
    ahead = stored(NOW + timedelta(hours=1))  # a clock that was set back does not make it fresh
    assert refused(lambda: admit("snp", collateral=ahead)) == "policy.crl.age"
    stale = stored(amd__genoa__crl_der=AMD.crl(days=(-3, -0.5)))
    assert refused(lambda: admit("snp", collateral=stale)) == "snp.crl.dates"
    assert admit("snp", policy_for("snp", "[crl]\noffline_grace_h = 13\n"), collateral=stale)
    revoked = stored(amd__genoa__crl_der=AMD.crl(7))
    assert refused(lambda: admit("snp", collateral=revoked)) == "snp.crl.signer"
    assert refused(lambda: admit("tdx", collateral=Collateral())) == "tdx.collateral"


def test_a_verdict_ends_with_the_first_of_its_reasons() -> None:
    assert admit("nitro").valid_until == NOW + timedelta(hours=1)
    soon = stored(amd__genoa__crl_der=AMD.crl(days=(-1, 0.01)))
    assert admit("snp", collateral=soon).valid_until == NOW + 0.01 * pki.DAY
    short = policy_for("nitro", "[freshness]\nreattest_s = 60\n")
    assert admit("nitro", short).valid_until == NOW + timedelta(seconds=60)
    last = datetime.fromisoformat("2026-12-31T23:59:00Z")
    certified = pki.NOW + 10 * pki.DAY
    assert certified < last and admit("tpm", now=NOW + timedelta(minutes=50)).valid_until < last


def test_nitro_documents_grow_old() -> None:
    wanted, claims = policy_for("nitro"), claims_for(policy_for("nitro"))
    for seconds, fine in ((-299, True), (-301, False), (59, True), (61, False)):
        made = int((NOW + timedelta(seconds=seconds)).timestamp() * 1000)
        raw = evidence_for("nitro", claims, timestamp=made).encode()
        if fine:
            admit("nitro", wanted, raw=raw)
        else:
            assert refused(lambda r=raw: admit("nitro", wanted, raw=r)) == "policy.age"  # type: ignore[misc]


def test_debug_enclaves_are_refused_whatever_is_wanted() -> None:
    claims = claims_for(policy_for("nitro"))
    raw = evidence_for("nitro", claims, pcrs={n: bytes(48) for n in range(16)}).encode()
    assert refused(lambda: admit("nitro", raw=raw)) == "policy.debug"


@pytest.mark.parametrize(
    "text, message",
    [
        ('[crl]\nrequire = true\n', r"unknown key crl\.require; did you mean crl\.required"),
        (entry("snp") + "debug = true\n", r"unknown key allow\[0\]\.product\[0\]\.debug"),
        (entry("tdx") + "allow_debug = true\n", r"unknown key allow\[0\]\.allow_debug"),
        (entry("tdx") + "debug = true\n", r"unknown key allow\[0\]\.debug"),
        (entry("swtpm"), r"a policy for production cannot name it"),
        (entry("snp") + entry("snp"), r"two entries have the same"),
        (entry("sgx"), r"allow\[0\]\.kind: must be one of"),
        (entry("snp", measurements="[]"), r"allow\[0\]\.measurements = \[\]"),
        (entry("snp", measurements='"any"'), r"allow\[0\]\.measurements"),
        (entry("snp", host_data='["11"]'), r"allow\[0\]\.host_data"),
        (entry("snp", chip_ids="[]"), r"allow\[0\]\.chip_ids"),
        (entry("snp").replace('chip_ids = "any"\n', ""), r"missing key allow\[0\]\.chip_ids"),
        (entry("snp").replace('"genoa"', '"venice"'), r"allow\[0\]\.product\[0\]\.name"),
        (entry("snp").replace('"genoa"', '"turin"'), r"fmc is a component of Turin"),
        (entry("snp") + PRODUCT.format(at=""), r"each only once"),
        (entry("snp").split("[[allow.product]]")[0], r"missing key allow\[0\]\.product\[0\]\.name"),
        (entry("snp").replace("host_data", 'signing_key = ["vlek"]\nhost_data'), r"csp_ids: needed"),
        (entry("tdx").replace("rtmr0", 'tcb_status = ["Revoked"]\nrtmr0'), r"allow\[0\]\.tcb_status"),
        (entry("tdx").replace('ppids = "any"\n', ""), r"missing key allow\[0\]\.ppids"),
        (entry("nitro", pcrs='{ "3" = ["' + "01" * 48 + '"] }'), r"pcrs: 0 \(the image\) or 8"),
        (entry("nitro", pcrs='{ "0" = ["' + "00" * 48 + '"] }'), r"a value of zeros"),
        (entry("nitro", pcrs='{ "00" = ["' + "01" * 48 + '"] }'), r"allow\[0\]\.pcrs"),
        (entry("tpm", ak_names="[]"), r"ak_roots or ak_names"),
        (entry("tpm").replace("pcrs", 'bank = "sha384"\npcrs'), r"another length than bank sha384"),
        (entry("tpm").replace("pcrs", 'bank = "sha1"\npcrs'), r"allow\[0\]\.bank"),
        (entry("az-snp-vtpm").replace("[allow.snp]", "[allow.snp]\nvmpl_max = 1"), r"at VMPL 0"),
        ("[deny]\nmeasurements = [\"xy\"]\n", r"deny\.measurements"),
        ("[freshness]\nreattest_s = 10\n", r"freshness\.reattest_s"),
        ("simulated = true\n", r"unknown key simulated"),
        ("allow = 3\n", r"allow: a list"),
        ("allow = [3]\n", r"allow\[0\]: a table"),
    ],
)  # fmt: skip
def test_a_policy_is_read_strictly(text: str, message: str) -> None:
    text = HEAD.format(environment="production") + text
    with pytest.raises(ConfigError, match=message):
        policy.parse(tomllib.loads(text), Path("policy.toml").absolute())


@pytest.mark.parametrize(
    "change",
    [("1", "2"), ('"mesh"', '"a mesh"'), ("= 3", "= 0"), ("2027-01-01T00:00:00Z", "2027-01-01T00:00:00")],
)
def test_the_head_of_a_policy_is_read_strictly(change: tuple[str, str]) -> None:
    with pytest.raises(ConfigError):
        policy.parse(
            tomllib.loads(HEAD.format(environment="production").replace(*change, 1)), Path("p").absolute()
        )


def test_the_example_has_every_key() -> None:
    """configs/policy.toml can be read, names every real kind, and leaves no key of any table out."""
    file = Path(__file__).parent.parent / "configs" / "policy.toml"
    found, text = policy.load(file), file.read_text()
    assert {each.kind for each in found.allow} == set(KINDS) - {"swtpm"}
    written = {line.split("=")[0].strip() for line in text.splitlines() if "=" in line}
    for table in (
        Policy,
        policy.Crl,
        policy.Freshness,
        policy.Deny,
        snp.Rule,
        snp.Product,
        tdx.Rule,
        tpm.Rule,
    ):
        keys = {each.name for each in fields(table)} - {
            "source",
            "allow",
            "crl",
            "freshness",
            "deny",
            "product",
        }
        assert keys <= written, table


def test_the_template_s_entry_works_once_it_is_filled_in() -> None:
    text = policy.TEMPLATE.format(name="mesh", environment="production", not_after=stamp(NOW + pki.DAY))
    head, entry_ = text.split("# [[allow]]\n")
    entry_ = "[[allow]]\n" + re.sub(r"(?m)^# ", "", entry_).replace("<96 hexadecimal digits>", "11" * 48)
    wanted = policy.parse(tomllib.loads(head + entry_), Path("p").absolute())
    assert admit("snp", wanted).entry == "peers-on-genoa"


def test_a_policy_for_simulation_names_nothing_real() -> None:
    with pytest.raises(ConfigError, match="a policy for simulation cannot name it"):
        policy_of(entry("snp"), environment="simulation")
    # A software TPM's evidence under the name of a real one is judged as a real one, and its key is unknown.
    wanted = policy_of(entry("tpm", ak_names='["' + "00" * 34 + '"]'))
    assert refused(lambda: admit("tpm", wanted)) == "policy.ak"
    assert refused(lambda: admit("swtpm", policy_for("tpm"))) == "policy.entry"


def test_the_digest_is_of_the_meaning() -> None:
    text = HEAD.format(environment="production") + entry("snp") + entry("nitro", "other")
    base = policy.parse(tomllib.loads(text), Path("a").absolute())
    spaced = text.replace("\n", "   # a comment\n").replace("11" * 48, "11" * 48)
    assert policy.parse(tomllib.loads(spaced), Path("b").absolute()).digest() == base.digest()
    for old, new in (
        ("11" * 48, "12" * 48),
        ("version = 3", "version = 4"),
        ("2027", "2028"),
        ("ucode = 84", "ucode = 83"),
        ('id = "other"', 'id = "another"'),
        ('chip_ids = "any"', f'chip_ids = ["{"11" * 64}"]'),
        ('kind = "snp"\n', 'kind = "snp"\nrequire_alias_check = false\n'),
        ("01" * 48, "01" * 47 + "02"),
    ):
        assert text.count(old) >= 1
        changed = policy.parse(tomllib.loads(text.replace(old, new)), Path("a").absolute())
        assert changed.digest() != base.digest(), old
    kinds = {policy_of(entry(k)).digest() for k in KINDS if k != "swtpm"} | {policy_for("swtpm").digest()}
    assert len(kinds) == len(KINDS)


# --- signatures --------------------------------------------------------------------------------------------


def test_k_of_n_owners_sign() -> None:
    wanted, owners = policy_for("snp"), [Identity.generate() for _ in range(3)]
    keys = [each.public_hex for each in owners]

    def signature(owner: Identity, over: Policy = wanted) -> policy.Signature:
        return policy.Signature(owner.public_hex, owner.sign(policy.signed_message(over)).hex())

    one, two = signature(owners[0]), signature(owners[1])
    assert policy.check_signatures(wanted, [one, two], keys, 2)[0].name == "policy.signatures"
    stranger = signature(Identity.generate())
    for given_, threshold in (([one], 2), ([], 1), ([one, one], 2), ([one, stranger], 2)):
        assert (
            refused(lambda g=given_, t=threshold: policy.check_signatures(wanted, g, keys, t))
            == "policy.signatures"
        )  # type: ignore[misc]
    other = policy_for("tdx")
    assert (
        refused(lambda: policy.check_signatures(wanted, [one, signature(owners[1], other)], keys, 2))
        == "policy.signature"
    )
    forged = replace(two, signature=one.signature)
    assert refused(lambda: policy.check_signatures(wanted, [one, forged], keys, 2)) == "policy.signature"
    for threshold in (0, 4):
        with pytest.raises(BadInput, match="owners must sign"):
            policy.check_signatures(wanted, [one], keys, threshold)
    with pytest.raises(BadInput):
        policy.check_signatures(wanted, [one], [keys[0], keys[0]], 2)  # one owner is not two
    assert refused(lambda: policy.check_version(wanted, 4)) == "policy.version"
    policy.check_version(wanted, 3)


# --- collateral --------------------------------------------------------------------------------------------


def test_a_store_keeps_what_it_was_given(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.read().items == {}
    store.put("amd/genoa/crl.der", b"one", NOW)
    store.put("amd/genoa/crl.der", b"two", NOW + pki.DAY)
    assert store.read().items == {"amd/genoa/crl.der": Item(b"two", NOW + pki.DAY)}
    for name in ("../x.der", "/etc/x.der", "amd/../x.der", "x.der", "amd/x.exe", "amd/.x/y.der"):
        with pytest.raises(BadInput, match="not a name"):
            store.put(name, b"", NOW)
    (tmp_path / "store/amd/genoa/crl.der").write_bytes(b"six")
    with pytest.raises(BadInput, match=r"crl\.der: not what was stored"):
        store.read()
    (tmp_path / "store/amd/genoa/crl.der").unlink()
    with pytest.raises(BadInput, match=r"crl\.der: No such file"):
        store.read()
    for text in (
        "[]",
        "{",
        '{"../x.der": {"fetched": "2026-01-01T00:00:00Z", "sha256": ""}}',
        '{"a/b.der": {}}',
    ):
        (tmp_path / "store/index.json").write_text(text)
        with pytest.raises(BadInput, match="damaged"):
            store.read()


def test_authorities_of_vtpms_are_put_there_by_hand(tmp_path: Path) -> None:
    _, root = TPM.certified()
    (tmp_path / "tpm").mkdir()
    (tmp_path / "tpm/authorities.pem").write_bytes(pki.pem(root))
    (tmp_path / "tpm/other.pem").write_bytes(b"not looked at")
    ((name, item),) = Store(tmp_path).read().items.items()
    assert name == collateral.AUTHORITIES and item.data == pki.pem(root)
    (tmp_path / "tpm/authorities.pem").write_bytes(bytes(collateral.MAX_ITEM + 1))
    with pytest.raises(BadInput, match="larger than"):
        Store(tmp_path).read()


class Server:
    """Recorded answers by URL; any other URL is a failure of the test."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, url: str) -> Answer:
        self.asked.append(url)
        return self.answers[url]


def amd_server(**changes: bytes) -> Server:
    bodies = {
        "vcek/v1/Genoa/cert_chain": AMD.chain(),
        "vlek/v1/Genoa/cert_chain": AMD.chain("vlek"),
        "vcek/v1/Genoa/crl": AMD.crl(),
    } | {name.replace("__", "/"): value for name, value in changes.items()}
    return Server({f"https://kdsintf.amd.com/{k}": Answer(200, {}, body) for k, body in bodies.items()})


def test_amd_answers_are_kept_if_they_verify(tmp_path: Path) -> None:
    store = Store(tmp_path)
    collateral.refresh_amd(store, amd_server(), NOW, "genoa", AMD.roots)
    found = store.read()
    assert set(found.items) == {"amd/genoa/vcek.pem", "amd/genoa/vlek.pem", "amd/genoa/crl.der"}
    report = snp.parse(AMD.report(), Trail("snp"))
    tcb = "blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=84"
    url = f"https://kdsintf.amd.com/vcek/v1/Genoa/{AMD.hwid.hex()}?{tcb}"
    collateral.refresh_vek(store, Server({url: Answer(200, {}, AMD.vek())}), NOW, report, "genoa")
    # With the store filled, evidence needs to bring no endorsements.
    claims = claims_for(policy_for("snp"))
    bare = replace(evidence_for("snp", claims), endorsements={})
    assert admit("snp", raw=bare.encode(), collateral=store.read()).entry == "it"
    assert refused(lambda: admit("snp", raw=bare.encode())) == "snp.vek"
    chipped = replace(bare, endorsements={"vek": AMD.vek()}).encode()
    assert refused(lambda: admit("snp", raw=chipped)) == "snp.chain"
    # Certificates do not go stale by themselves; lists do.
    later = Store(tmp_path / "later")
    for name, item in store.read().items.items():
        later.put(name, item.data, NOW - pki.DAY * (0 if name.endswith("crl.der") else 9))
    assert admit("snp", raw=bare.encode(), collateral=later.read()).entry == "it"

    empty = Store(tmp_path / "empty")
    with pytest.raises(AttestationError, match=r"snp\.chain\.root"):
        collateral.refresh_amd(empty, amd_server(), NOW, "genoa")  # not the real root
    with pytest.raises(AttestationError, match=r"snp\.chain\.signer"):
        collateral.refresh_amd(
            empty, amd_server(vcek__v1__Genoa__cert_chain=AMD.chain("vlek")), NOW, "genoa", AMD.roots
        )
    assert empty.read().items == {}
    forged = pki.revocations(AMD.ark, pki.rsa_key("ask"))
    with pytest.raises(AttestationError, match=r"snp\.crl"):
        collateral.refresh_amd(empty, amd_server(vcek__v1__Genoa__crl=forged), NOW, "genoa", AMD.roots)
    assert empty.read().items == {}  # all or nothing
    with pytest.raises(BadInput, match="status 503"):
        collateral.refresh_vek(store, Server({url: Answer(503, {}, b"busy")}), NOW, report, "genoa")


def intel_server(found: dict[str, str], fmspc: str, authority: str = "platform") -> Server:
    """PCS answers, put together from what they were taken apart into."""

    def chain(name: str) -> str:
        return urllib.parse.quote(found[name])

    pcs = "https://api.trustedservices.intel.com"
    info = '{"tcbInfo":' + found["tcb_info"] + ',"signature":"' + found["tcb_info_signature"] + '"}'
    identity = (
        '{"enclaveIdentity":'
        + found["qe_identity"]
        + ',"signature":"'
        + found["qe_identity_signature"]
        + '"}'
    )
    crl = {"sgx-pck-crl-issuer-chain": chain("pck_crl_issuer_chain")}
    tcb = {"tcb-info-issuer-chain": chain("tcb_info_issuer_chain")}
    enclave = {"sgx-enclave-identity-issuer-chain": chain("qe_identity_issuer_chain")}
    return Server(
        {
            f"{pcs}/sgx/certification/v4/pckcrl?ca={authority}&encoding=der": Answer(
                200, crl, bytes.fromhex(found["pck_crl"])
            ),
            f"{pcs}/tdx/certification/v4/tcb?fmspc={fmspc}": Answer(200, tcb, info.encode()),
            f"{pcs}/tdx/certification/v4/qe/identity": Answer(200, enclave, identity.encode()),
            collateral.INTEL_ROOT_CRL: Answer(200, {}, bytes.fromhex(found["root_ca_crl"])),
        }
    )


def test_intel_answers_are_kept_if_they_verify(tmp_path: Path) -> None:
    store, fmspc = Store(tmp_path), pki.FMSPC.hex()
    found = json.loads(INTEL.collateral())
    collateral.refresh_intel(store, intel_server(found, fmspc), NOW, fmspc, "platform", INTEL.roots)
    kept = json.loads(store.read().items[f"intel/{fmspc}.json"].data)
    assert kept == found
    assert admit("tdx", collateral=store.read()).entry == "it"
    other = Store(tmp_path / "other")
    with pytest.raises(BadInput, match="asked for FMSPC"):
        collateral.refresh_intel(other, intel_server(found, "0" * 12), NOW, "0" * 12, "platform", INTEL.roots)
    with pytest.raises(AttestationError, match=r"tdx\.tcb_info\.dates"):
        late = NOW + timedelta(hours=30)
        stale = json.loads(INTEL.collateral(crl_days=(-1, 9)))
        collateral.refresh_intel(other, intel_server(stale, fmspc), late, fmspc, "platform", INTEL.roots)
    changed = found | {"tcb_info": found["tcb_info"].replace("UpToDate", "UpToDatE")}
    with pytest.raises(AttestationError, match=r"tdx\.tcb_info\.signature"):
        collateral.refresh_intel(other, intel_server(changed, fmspc), NOW, fmspc, "platform", INTEL.roots)
    server = intel_server(found, fmspc)
    for url, answer in server.answers.items():
        broken = Server(server.answers | {url: replace(answer, headers={}, body=b"{}")})
        with pytest.raises((BadInput, AttestationError)):
            collateral.refresh_intel(other, broken, NOW, fmspc, "platform", INTEL.roots)
    assert other.read().items == {}


def test_recorded_intel_answers_are_kept_byte_for_byte(tmp_path: Path, shared_dir: Path) -> None:
    folder = shared_dir / "vectors/attestation/tdx/collateral"
    found = json.loads((folder / "phala_90c06f.json").read_bytes())
    now = datetime.fromisoformat("2026-03-10T00:00:00Z")
    store = Store(tmp_path)
    collateral.refresh_intel(store, intel_server(found, "90c06f000000"), now, "90c06f000000", "platform")
    kept = json.loads(store.read().items["intel/90c06f000000.json"].data)
    assert {key: kept[key] for key in tdx.COLLATERAL_KEYS} == {key: found[key] for key in tdx.COLLATERAL_KEYS}


@pytest.mark.parametrize(
    "url",
    [
        "http://kdsintf.amd.com/vcek/v1/Genoa/crl",
        "https://kdsintf.amd.com.example/crl",
        "https://user@kdsintf.amd.com/crl",
        "https://kdsintf.amd.com:444/crl",
        "file:///etc/passwd",
    ],
)
def test_only_the_authorities_are_asked(url: str) -> None:
    with pytest.raises(BadInput, match="not one of"):
        collateral.https_get(url)


# --- commands ----------------------------------------------------------------------------------------------


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_policy_is_written_signed_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, keys = tmp_path / "mesh.toml", []
    for number in range(3):
        owner = Identity.generate()
        owner.save(tmp_path / f"owner{number}.key")
        keys.append(owner.public_hex)
    owners = ["--owners", ",".join(keys), "--threshold", "2"]
    assert main(["policy", "new", str(file), "--days", "30", "--json"]) == 0
    made = events(capsys.readouterr().out)
    assert made[0]["event"] == "policy" and made[0]["digest"] == policy.load(file).digest().hex()
    assert main(["policy", "new", str(file)]) == 2  # never overwritten
    assert "exists already" in capsys.readouterr().err
    assert main(["policy", "check", str(file), *owners]) == 10
    assert "policy.signatures" in capsys.readouterr().err
    for number in (0, 0, 1):  # signing twice is signing once
        assert main(["policy", "sign", str(file), "--key", str(tmp_path / f"owner{number}.key")]) == 0
    capsys.readouterr()
    assert main(["policy", "check", str(file), *owners, "--json"]) == 0
    (found,) = events(capsys.readouterr().out)
    assert found["entries"] == [] and found["environment"] == "production" and found["version"] == 1
    assert main(["policy", "check", str(file), *owners]) == 0
    assert "admits nobody" in capsys.readouterr().out
    assert main(["policy", "check", str(file), *owners, "--at-least", "2", "--json"]) == 10
    (error,) = events(capsys.readouterr().out)
    assert error["event"] == "error" and error["step"] == "policy.version" and error["code"] == 10
    assert main(["policy", "check", str(file), *owners, "--at", "2040-01-01T00:00:00Z"]) == 10
    assert main(["policy", "check", str(file), "--owners", keys[0], "--threshold", "2"]) == 2
    # After a change the old signatures are over another policy: nobody is asked to trust them, they go.
    file.write_text(file.read_text().replace("version = 1", "version = 2") + entry("snp"))
    capsys.readouterr()
    assert main(["policy", "check", str(file), *owners]) == 10
    assert "policy.signature:" in capsys.readouterr().err
    assert main(["policy", "sign", str(file), "--key", str(tmp_path / "owner2.key"), "--json"]) == 0
    assert events(capsys.readouterr().out)[0]["signatures"] == 1
    assert main(["policy", "check", str(file), "--owners", ",".join(keys), "--threshold", "1"]) == 0
    assert "it (snp)" in capsys.readouterr().out
    file.write_text(file.read_text() + "unknown = 1\n")
    assert main(["policy", "check", str(file), *owners]) == 3


@pytest.fixture
def explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def explain(kind: str, envelope: Envelope, text: str, *more: str) -> tuple[int, str]:
        (tmp_path / "p.toml").write_text(text)
        (tmp_path / "e.cbor").write_bytes(envelope.encode())
        arguments = ["--policy", str(tmp_path / "p.toml"), "--at", stamp(NOW), *more]
        code = main(["policy", "explain", str(tmp_path / "e.cbor"), *arguments])
        return code, capsys.readouterr().out

    return explain


def test_evidence_is_explained(explained: Callable[..., tuple[int, str]]) -> None:
    """With nothing but the real roots at hand, software TPMs are what can be explained here to the end."""
    text = (
        HEAD.format(environment="simulation")
        + entry("swtpm")
        + entry("swtpm", "other", ak_names='["' + "00" * 34 + '"]')
    )
    wanted = policy.parse(tomllib.loads(text), Path("p").absolute())
    envelope = evidence_for("swtpm", claims_for(wanted))
    code, out = explained("swtpm", envelope, text)
    assert code == 0 and "SIMULATED" in out and "entry    it: satisfied" in out
    assert "entry    other: policy.ak: expected" in out and "claim    nonce: " + "03" * 32 in out
    code, out = explained("swtpm", envelope, text, "--json")
    (found,) = events(out)
    assert found["verdict"] == "would be accepted" and found["simulated"] is True
    assert found["entries"][1]["failure"]["step"] == "policy.ak"
    # Bound to other claims than it carries.
    spliced = replace(envelope, claims=claims_for(wanted, tunnel=b"\x77" * 32).encode())
    code, out = explained("swtpm", spliced, text)
    assert code == 10 and "FAILED   binding: claims.binding" in out
    # Genuine, but not to the real roots.
    text = HEAD.format(environment="production") + entry("nitro")
    envelope = evidence_for("nitro", claims_for(policy_for("nitro")))
    code, out = explained("nitro", envelope, text, "--json")
    (found,) = events(out)
    assert code == 10 and found["verdict"] == "refused"
    assert found["failures"]["verification"]["step"] == "nitro.chain.root"
    assert [each["name"] for each in found["steps"]][-1] == "nitro.signature"


def test_examining_tells_what_appraising_would(tmp_path: Path) -> None:
    for kind in KINDS:
        wanted = policy_for(kind)
        raw = evidence_for(kind, claims_for(wanted)).encode()
        found = examine(raw, wanted, stored(), NOW, ANCHORS)
        assert found.satisfied and found.entries == (("it", None),), kind
        empty = examine(raw, policy_of(), stored(), NOW, ANCHORS)
        assert not empty.satisfied and empty.judged is not None and empty.judged.step == "policy.entry"
        denied = policy_for(kind, f'[deny]\ntunnels = ["{"02" * 32}"]\n')
        found = examine(raw, denied, stored(), NOW, ANCHORS)
        assert found.judged is not None and found.judged.step == "policy.deny"


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.toml").write_text(HEAD.format(environment="production"))
    given = ["--policy", str(tmp_path / "p.toml")]
    assert main(["policy", "explain", str(tmp_path / "none"), *given]) == 2
    (tmp_path / "e").write_bytes(b"not an envelope")
    assert main(["policy", "explain", str(tmp_path / "e"), *given]) == 10
    (tmp_path / "big").write_bytes(bytes(MAX_ENVELOPE + 1))
    assert main(["policy", "explain", str(tmp_path / "big"), *given]) == 2
    assert main(["policy", "explain", str(tmp_path / "e"), "--policy", str(tmp_path / "none")]) == 3
    assert main(["policy", "fetch", "--collateral", str(tmp_path)]) == 2
    assert "nothing to fetch" in capsys.readouterr().err
    for wrong in (["--at", "yesterday"], ["--at", "2026-01-01T00:00:00"]):
        with pytest.raises(SystemExit):
            main(["policy", "explain", "e", "--policy", "p", *wrong])


def test_fetching_for_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tdx, "ROOTS", INTEL.roots)
    monkeypatch.setattr(collateral.refresh_intel, "__defaults__", (INTEL.roots,))
    fmspc = pki.FMSPC.hex()
    envelope = evidence_for("tdx", claims_for(policy_for("tdx")))
    (tmp_path / "e").write_bytes(envelope.encode())
    server = intel_server(json.loads(INTEL.collateral()), fmspc)
    options = argparse.Namespace(
        collateral=str(tmp_path / "store"),
        amd=[],
        intel=[],
        authority="platform",
        evidence=str(tmp_path / "e"),
        get=server,
        at=NOW,
        json=False,
    )
    assert commands.fetch(options, Terminal()) == 0
    assert set(Store(tmp_path / "store").read().items) == {f"intel/{fmspc}.json"}
    (tmp_path / "e").write_bytes(evidence_for("nitro", claims_for(policy_for("nitro"))).encode())
    with pytest.raises(BadInput, match="needs nothing"):
        commands.fetch(options, Terminal())


def test_an_enrolled_certificate_serves_where_the_key_s_name_is_unknown() -> None:
    """Google's form: no TPMT_PUBLIC, but a certificate, whose authority comes from the store."""
    certificate, root = TPM.certified()
    anchors = replace(ANCHORS, tpm={pki.digest(root): tpm.Root("own", frozenset({tpm._TCG_AK}), True)})
    wanted = policy_of(
        entry("tpm").replace(f'ak_names = ["{TPM.name}"]', f'ak_roots = ["{pki.digest(root)}"]')
    )
    claims = claims_for(wanted)
    parts = cbor2.loads(evidence_for("tpm", claims).evidence)
    del parts["ak"]
    raw = Envelope(
        "tpm", cbor2.dumps(parts, canonical=True), claims.encode(), {"ak_certificate": pki.pem(certificate)}
    ).encode()
    store = Collateral({"tpm/authorities.pem": Item(pki.pem(root), NOW)})
    verdict = admit("tpm", wanted, raw=raw, collateral=store, anchors=anchors)
    assert verdict.entry == "it" and verdict.valid_until <= certificate.not_valid_after_utc
    assert refused(lambda: admit("tpm", wanted, raw=raw, collateral=store)) == "tpm.ak_chain.root"
    assert refused(lambda: admit("tpm", wanted, raw=raw, anchors=anchors)) == "tpm.ak_chain"
    naked = Envelope("tpm", cbor2.dumps(parts, canonical=True), claims.encode()).encode()
    assert refused(lambda: admit("tpm", wanted, raw=naked, anchors=anchors)) == "tpm.ak"
