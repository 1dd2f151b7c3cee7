"""Verifiers of evidence: real vectors at their stated times, mutations refused, no error but our own.

The vectors lie in `shared/vectors/attestation`; each MANIFEST.json says what is expected. Where we refuse
evidence that its manifest calls valid, the tables here say so and why.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_VARIABLE, find_shared

from mimir.attest import nitro, snp
from mimir.attest.trail import Trail
from mimir.errors import AttestationError

pytestmark = pytest.mark.filterwarnings("error")

_SHARED = find_shared()
VECTORS = (_SHARED or Path("shared")) / "vectors" / "attestation"
NAMES = ("snp", "nitro")
MANIFESTS = {
    name: json.loads((VECTORS / name / "MANIFEST.json").read_text()) if _SHARED else {"cases": []}
    for name in NAMES
}
CASES = {name: {case["id"]: case for case in manifest["cases"]} for name, manifest in MANIFESTS.items()}


def checks(name: str, key: str = "checks") -> list[Any]:
    """Every (case, check) of a manifest, as parameters."""
    return [
        pytest.param(case, check, id=f"{case['id']}@{check['at'][:13]}")
        for case in CASES[name].values()
        for check in case.get(key, [])
    ]


def mutations(name: str) -> list[Any]:
    return [
        pytest.param(case, mutation, id=f"{case['id']}+{mutation['input']}[{mutation['offset']}]")
        for case in CASES[name].values()
        for mutation in case.get("mutations") or []
    ]


@functools.cache
def read(name: str, path: str) -> bytes:
    raw = (VECTORS / name / path).read_bytes()
    return bytes.fromhex(raw.decode()) if path.endswith(".hex") else raw


def inputs(name: str, case: dict[str, Any]) -> dict[str, Any]:
    return {
        key: read(name, path) if isinstance(path, str) else [read(name, each) for each in path]
        for key, path in case["inputs"].items()
    }


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def flip(raw: bytes, offset: int, mask: int = 1) -> bytes:
    return raw[:offset] + bytes((raw[offset] ^ mask,)) + raw[offset + 1 :]


def refused(work: Callable[[], Any]) -> str:
    """The step at which the work was refused; any error but our own passes through and fails the test."""
    with pytest.raises(AttestationError) as caught:
        work()
    assert caught.value.expected and str(caught.value).isprintable()
    return caught.value.step


@pytest.mark.parametrize("name", NAMES)
def test_the_vectors_are_there(shared_dir: Path, name: str) -> None:
    """So that an absent folder is a skip with its reason, and a failure where CI=true."""
    assert CASES[name], f"no cases of {name} under {shared_dir}; is {SHARED_VARIABLE} right?"


# --- SEV-SNP -----------------------------------------------------------------------------------------------

SNP_REASONS = {
    ("milan-v2-debug", "2023-01-01"): "policy.debug",
    ("milan-v2-debug", "2035-01-01"): "snp.chain.dates",
    ("milan-v2-under-genoa-chain", "2026-07-01"): "snp.chain.root",
    ("milan-v2-under-vlek-chain", "2026-07-01"): "snp.chain.signer",
    ("azure-milan-v2-vcek-legacy", "2026-07-01"): "snp.chain.vek",
    ("azure-milan-v2-vcek-new", "2026-07-01"): "snp.chain.vek",
    ("vcek-of-another-chip", "2026-07-01"): "snp.signature",
    ("aws-milan-vlek-v3", "2025-06-01"): "policy.vmpl",
    ("aws-milan-vlek-v3", "2026-01-01"): "snp.chain.dates",
    ("aws-vlek-under-vcek-chain", "2025-06-01"): "snp.chain.signer",
    ("azure-milan-v3", "2026-01-01"): "snp.chain.dates",
    ("azure-turin-v5", "2026-01-01"): "snp.chain.dates",
    ("turin-under-milan-chain", "2026-07-01"): "snp.chain.root",
}
SNP_FIELDS = {  # manifest name: how we say it
    "policy": lambda f: hex(f.report.policy),
    "platform_info": lambda f: hex(f.report.platform_info),
    "sig_algo": lambda f: 1,
    "signing_key": lambda f: f.report.signing_key.upper(),
    "author_key_en": lambda f: int(f.report.author_key_en),
    "mask_chip_key": lambda f: int(f.report.mask_chip_key),
    "current_ver": lambda f: f.report.current_version,
    "committed_ver": lambda f: f.report.committed_version,
    "cpuid": lambda f: [hex(f.report.cpuid[0]), hex(f.report.cpuid[1]), f.report.cpuid[2]],
    "product": lambda f: f.product.capitalize(),
    "chain": lambda f: f"ARK-{f.product.capitalize()}",
    "tcb_from_report": lambda f: f.tcb(),
    "tcb_from_vek": lambda f: f.vek.tcb,
    "vek_not_after": lambda f: f.vek.walked.not_after.isoformat(),
}


def verify_snp(case: dict[str, Any], now: datetime, **changed: bytes) -> snp.Facts:
    given = inputs("snp", case) | changed
    return snp.verify(given["report"], given["vek"], given["ca_chain"], now)


def rule_for(facts: snp.Facts, **changes: Any) -> snp.Rule:
    """The tightest rule that these facts satisfy, but for what a policy cannot allow and VMPL 0."""
    report = facts.report
    least = {
        name: min(facts.tcb(w)[name] for w in ("reported", "committed", "launch")) for name in facts.tcb()
    }
    settings: dict[str, Any] = {
        "product": (snp.Product(name=facts.product, **least),),
        "measurements": (report.measurement.hex(),),
        "host_data": (report.host_data.hex(),),
        "chip_ids": (report.chip_id.hex(),) if any(report.chip_id) else None,
        "signing_key": (report.signing_key,),
        "csp_ids": (facts.vek.csp_id,) if facts.vek.csp_id else (),
        "require_alias_check": bool(report.platform_info >> snp.ALIAS_CHECK & 1),
    }
    rule = snp.Rule(**settings | changes)
    assert rule.flaw() is None
    return rule


@pytest.mark.parametrize("case, check", checks("snp"))
def test_snp_vectors(case: dict[str, Any], check: dict[str, Any]) -> None:
    now = moment(check["at"])
    reason = SNP_REASONS.get((case["id"], check["at"][:10]))
    if case["kind"] == "certificate chain":
        given, trail = inputs("snp", case), Trail("snp")
        vek = snp.parse_vek(given["vek"], trail)
        snp.verify_vek(vek, given["ca_chain"], now, trail)
        assert vek.hwid.hex() == case["fields"]["hwid"] and vek.product_name == case["fields"]["product_name"]
        assert vek.tcb == case["fields"]["tcb_from_vek"]
        return
    if check["evidence"] == "invalid":
        assert refused(lambda: verify_snp(case, now)) == reason
        return
    facts = verify_snp(case, now)
    for name, expected in case["fields"].items():
        got = SNP_FIELDS[name](facts) if name in SNP_FIELDS else getattr(facts.report, name)
        assert (got.hex() if isinstance(got, bytes) else got) == expected, name
    if check["default_policy"] == "accept":
        rule_for(facts).judge(facts, Trail("policy"))
        assert reason is None
    else:
        assert refused(lambda: rule_for(facts).judge(facts, Trail("policy"))) == reason


@pytest.mark.parametrize("case, mutation", mutations("snp"))
def test_snp_mutations(case: dict[str, Any], mutation: dict[str, Any]) -> None:
    raw = flip(inputs("snp", case)[mutation["input"]], mutation["offset"], mutation["mask"])
    now = moment(case["checks"][0]["at"])
    assert refused(lambda: verify_snp(case, now, **{mutation["input"]: raw})).startswith("snp.")


# --- Nitro -------------------------------------------------------------------------------------------------


def nitro_rule(facts: nitro.Facts) -> nitro.Rule:
    wanted = {n: (v.hex(),) for n, v in facts.document.pcrs.items() if any(v)}
    return nitro.Rule(wanted)


@pytest.mark.parametrize("case, check", checks("nitro"))
def test_nitro_vectors(case: dict[str, Any], check: dict[str, Any]) -> None:
    now, doc = moment(check["at"]), inputs("nitro", case)["doc"]
    if check["evidence"] == "invalid":
        expected = "nitro.signature" if case["id"] == "bad-signature" else "nitro.chain.dates"
        assert refused(lambda: nitro.verify(doc, now)) == expected
        return
    facts, fields = nitro.verify(doc, now), case["fields"]
    document = facts.document
    assert document.module_id == fields["module_id"] and document.debug == fields["debug"]
    assert round(document.timestamp.timestamp() * 1000) == fields["timestamp_ms"]
    assert {str(n): v.hex() for n, v in document.pcrs.items() if any(v)} == fields["pcrs"]
    assert len(document.pcrs) == fields["pcr_count"] and len(document.cabundle) == fields["cabundle_len"]
    for name in ("user_data", "nonce", "public_key"):
        assert getattr(document, name).hex() == (fields[name] or "")
    assert document.payload[0] == (0xBF if "indefinite" in fields["payload_map"] else 0xA9)

    def judge() -> None:
        nitro_rule(facts).judge(facts, Trail("policy"), now, timedelta(minutes=5))

    if check["default_policy"] == "accept":
        judge()
    else:
        assert refused(judge) == "policy.debug"


@pytest.mark.parametrize("case, mutation", mutations("nitro"))
def test_nitro_mutations(case: dict[str, Any], mutation: dict[str, Any]) -> None:
    raw = flip(inputs("nitro", case)["doc"], mutation["offset"], mutation["mask"])
    assert refused(lambda: nitro.verify(raw, moment(case["checks"][0]["at"]))).startswith("nitro.")
