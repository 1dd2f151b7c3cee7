"""Verifiers of evidence: real vectors at their stated times, mutations refused, no error but our own.

The vectors lie in `shared/vectors/attestation`; each MANIFEST.json says what is expected. Where we refuse
evidence that its manifest calls valid, the tables here say so and why.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import attest_pki as pki
import cbor2
import pytest
from conftest import SHARED_VARIABLE, find_shared
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir.attest import azure, certs, evidence, nitro, snp, tdx, tpm
from mimir.attest.trail import Trail, read_json
from mimir.errors import AttestationError

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of sockets that other tests left open
]

_SHARED = find_shared()
VECTORS = (_SHARED or Path("shared")) / "vectors" / "attestation"
NAMES = ("snp", "tdx", "nitro", "tpm")
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


def judged(rule: Any, facts: Any) -> str:
    """The step at which a rule refuses facts."""
    return refused(lambda: rule.judge(facts, Trail("policy")))


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
        assert judged(rule_for(facts), facts) == reason


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
        nitro_rule(facts).judge(facts, Trail("policy"))

    if check["default_policy"] == "accept":
        judge()
    else:
        assert refused(judge) == "policy.debug"


@pytest.mark.parametrize("case, mutation", mutations("nitro"))
def test_nitro_mutations(case: dict[str, Any], mutation: dict[str, Any]) -> None:
    raw = flip(inputs("nitro", case)["doc"], mutation["offset"], mutation["mask"])
    assert refused(lambda: nitro.verify(raw, moment(case["checks"][0]["at"]))).startswith("nitro.")


# --- TDX ---------------------------------------------------------------------------------------------------

TDX_REASONS = {
    ("v4-uptodate", "2025-07-20"): "tdx.crl.pck.dates",
    ("v4-uptodate", "2025-06-18"): "tdx.crl.pck.dates",
    ("v4-no-matching-level", "2025-07-10"): "policy.tcb",
    ("v5-no-matching-level", "2026-03-10"): "policy.tcb",
    ("v5-uptodate", "2026-04-01"): "tdx.crl.pck.dates",
    ("fmspc-mismatch", "2025-07-10"): "tdx.chain.dates",
    ("v4-2023-no-matching-level", "2023-07-01"): "policy.sept_ve_disable",
    ("v4-debug-td", "2023-07-01"): "policy.debug",
    ("v4-outofdate", "2025-11-05"): "policy.tcb",
    ("v4-8000-bytes-uptodate", "2026-03-01"): "tdx.crl.pck.dates",
    ("v4-outofdate-advisories", "2026-02-10"): "policy.tcb",
    ("v5-no-matching-level-b", "2026-03-10"): "policy.service_td",
    # SGX shares the machinery, but an enclave is nothing that we admit.
    ("sgx-v3-config-and-swhardening", "2025-07-10"): "tdx.version",
    # Its chain within the quote is DER; the PEM chain beside it is tried in a test of its own.
    ("wrong-root-same-name", "2024-01-01"): "tdx.chain",
}
OTHER_KIND = {"sgx-v3-config-and-swhardening"}
TDX_FIELDS = {
    "tee_type": lambda f: "0x81",
    "body": lambda f: f.quote.body_kind,
    "fmspc": lambda f: f.platform.fmspc,
    "pcesvn": lambda f: f.platform.pcesvn,
    "pck_ca": lambda f: f.authority,
    "trailing_bytes": lambda f: f.quote.padding,
    **{f"rtmr{n}": functools.partial(lambda n, f: f.quote.rtmr[n], n) for n in range(4)},
}


def tdx_inputs(case: dict[str, Any]) -> tuple[bytes, bytes]:
    given = inputs("tdx", case)
    raw = given["quote"]
    if case["id"] == "v4-2023-no-matching-level":  # a text follows the quote: refused, so cut off here
        raw = raw[: -case["fields"]["trailing_bytes"]]
    return raw, given.get("collateral", b"{}")


def tdx_rule(facts: tdx.Facts, **changes: Any) -> tdx.Rule:
    """The tightest rule that these facts satisfy, but for what a policy cannot allow and an UpToDate TCB."""
    quote = facts.quote
    settings: dict[str, Any] = {f"rtmr{n}": (quote.rtmr[n].hex(),) for n in range(4)} | {
        "mrtd": (quote.mrtd.hex(),),
        "mrconfigid": (quote.mrconfigid.hex(),),
        "ppids": (facts.platform.ppid.hex(),),
        "tcb_eval_min": facts.evaluation,
        "mrseam": (quote.mrseam.hex(),),
        "xfam": (quote.xfam.hex(),),
    }
    return tdx.Rule(**settings | changes)


@pytest.mark.parametrize("case, check", checks("tdx"))
def test_tdx_vectors(case: dict[str, Any], check: dict[str, Any]) -> None:
    now = moment(check["at"])
    raw, collateral = tdx_inputs(case)
    reason = TDX_REASONS.get((case["id"], check["at"][:10]))
    if check["evidence"] == "invalid" or case["id"] in OTHER_KIND:
        assert refused(lambda: tdx.verify(raw, collateral, now)) == reason
        return
    facts = tdx.verify(raw, collateral, now)
    assert facts.status == check["tcb"] and facts.levels[1].status == check.get(
        "tdx_module", facts.levels[1].status
    )
    if "advisories" in check:
        assert list(facts.advisories) == check["advisories"]
    for name, expected in case["fields"].items():
        if name == "trailing_bytes" and case["id"] == "v4-2023-no-matching-level":
            expected = 0
        got = TDX_FIELDS[name](facts) if name in TDX_FIELDS else getattr(facts.quote, name)
        assert (got.hex() if isinstance(got, bytes) else got) == expected, name
    # dcap-qvl, asked alone, says what the manifest recorded of it, and agrees wherever it gives a status.
    said = check["dcap_qvl_0_7_0"]
    assert facts.second.removeprefix("refused: ").startswith(said.removeprefix("error: ")[:60])
    assert facts.second.startswith("refused: ") or facts.second == facts.status
    if check["default_policy"] == "accept":
        assert reason is None
        tdx_rule(facts).judge(facts, Trail("policy"))
    else:
        assert judged(tdx_rule(facts), facts) == reason


@pytest.mark.parametrize(
    "case, mutation", [p for p in mutations("tdx") if p.values[0]["id"] not in OTHER_KIND]
)
def test_tdx_mutations(case: dict[str, Any], mutation: dict[str, Any]) -> None:
    raw, collateral = tdx_inputs(case)
    raw = flip(raw, mutation["offset"], mutation["mask"])
    now = moment(case["checks"][0]["at"])
    assert refused(lambda: tdx.verify(raw, collateral, now)).startswith("tdx.")


def test_bytes_after_a_tdx_quote_are_zeros(shared_dir: Path) -> None:
    """dcap-qvl takes any; then one quote has many hashes, and whoever caches by them can be flooded."""
    case = CASES["tdx"]["v4-2023-no-matching-level"]
    raw, collateral = inputs("tdx", case)["quote"], tdx_inputs(case)[1]
    assert refused(lambda: tdx.verify(raw, collateral, moment(case["checks"][0]["at"]))) == "tdx.padding"
    good = CASES["tdx"]["v4-uptodate"]
    raw, collateral = tdx_inputs(good)
    facts = tdx.verify(raw, collateral, moment(good["checks"][0]["at"]))
    assert facts.quote.canonical + bytes(facts.quote.padding) == raw


def test_a_root_is_its_certificate_not_its_name(shared_dir: Path) -> None:
    """Intel's test root bears the real root's name."""
    given = inputs("tdx", CASES["tdx"]["wrong-root-same-name"])
    pem = b"".join(next(v for v in given.values() if isinstance(v, list)))
    trail = Trail("tdx")
    chain = certs.load_pem(trail, "chain", pem)
    chain = certs.order(
        trail, "chain", next(c for c in chain if b"PCK Cert" in c.subject.public_bytes()), chain
    )
    now = moment("2024-01-01T00:00:00Z")
    assert refused(lambda: certs.verify_chain(trail, "chain", chain, tdx.ROOTS, now)) == "tdx.chain.root"
    certs.verify_chain(
        trail, "chain", chain, {certs.fingerprint(chain[-1])}, now
    )  # and nothing else is wrong


def test_two_verifiers_give_every_quote_the_same_status(shared_dir: Path) -> None:
    """Every quote with every collateral, when both are valid; where dcap-qvl refuses, so does the rule."""
    quotes = [tdx_inputs(c)[0] for c in CASES["tdx"].values() if c["id"] not in OTHER_KIND]
    quotes += [path.read_bytes() for path in sorted(VECTORS.glob("tpm/*/td_quote.bin"))]
    tried, statuses = 0, set()
    for path in sorted(VECTORS.glob("*/collateral/*.json")):
        issued = moment(json.loads(json.loads(path.read_bytes())["tcb_info"])["issueDate"])
        for raw in quotes:
            try:
                facts = tdx.verify(raw, path.read_bytes(), issued + timedelta(days=2))
            except AttestationError:
                continue
            tried += 1
            statuses.add(facts.status)
            if facts.second.startswith("refused: "):
                rule = tdx_rule(facts, tcb_status=tdx.ALLOWABLE, advisories_allowed=facts.advisories)
                refused(lambda r=rule, f=facts: r.judge(f, Trail("policy")))  # type: ignore[misc]
            else:
                assert facts.second == facts.status
    assert tried >= 15 and {"UpToDate", "OutOfDate", "NotSupported"} <= statuses


# --- TPM ---------------------------------------------------------------------------------------------------

TPM_REASONS = {
    "keylime-rsa-sha256": "policy.ak",
    "blindllama-azure-trusted-launch": "policy.nonce",
    "gcp-shielded-sha1": "tpm.selection.hash",  # "valid" to its manifest; SHA-1 is refused before anything
    "parse-only": "tpm.signature",
    "gce-no-nonce": "policy.nonce",
}


def pcrs_of(raw: bytes) -> dict[str, dict[int, bytes]]:
    return {b: {int(n): bytes.fromhex(v) for n, v in values.items()} for b, values in json.loads(raw).items()}


def verify_tpm(case: dict[str, Any], now: datetime, **changed: bytes) -> tpm.Facts:
    given = inputs("tpm", case) | changed
    key = tpm.load_key(given["ak"], Trail("tpm")) if "ak" in given else None
    pcrs = pcrs_of(given["pcrs"]) if "pcrs" in given else {}
    return tpm.verify(given["quote"], given.get("signature", b""), key, pcrs, now)  # type: ignore[arg-type]


def tpm_rule(facts: tpm.Facts, **changes: Any) -> tpm.Rule:
    bank, values = next(iter(facts.pcrs.items()))
    settings: dict[str, Any] = {
        "pcrs": {n: (v.hex(),) for n, v in values.items()},
        "bank": bank,
        "ak_roots": ("00" * 32,),
    }
    return tpm.Rule(**settings | changes)


QUOTES = [p for p in checks("tpm") if p.values[0]["kind"] == "TPM2 quote"]


@pytest.mark.parametrize("case, check", QUOTES)
def test_tpm_vectors(case: dict[str, Any], check: dict[str, Any]) -> None:
    now, reason, fields = moment(check["at"]), TPM_REASONS[case["id"]], case["fields"]
    if reason.startswith("tpm."):
        assert refused(lambda: verify_tpm(case, now)) == reason
        if "sha1" in case["id"]:
            return
        attest, signed = tpm.parse_attest(inputs("tpm", case)["quote"], Trail("tpm")), None
    else:
        facts = verify_tpm(case, now)
        attest, signed = facts.attest, facts.signature
    assert [[bank, list(numbers)] for bank, numbers in attest.selection] == fields["pcr_selection"]
    for name in (
        "extra_data",
        "pcr_digest",
        "reset_count",
        "restart_count",
        "clock",
        "safe",
        "qualified_signer",
    ):
        got = getattr(attest, name)
        if name in fields:
            assert (got.hex() if isinstance(got, bytes) else got) == fields[name], name
    if signed is None:
        return
    assert (
        hex(attest.firmware) == fields["firmware"] and [signed.scheme, signed.hash] == fields["signature_alg"]
    )
    assert judged(tpm_rule(facts), facts) == reason
    if "ak_public" in case:
        key = tpm.parse_public(read("tpm", case["ak_public"]), Trail("tpm"))
        assert key.spki_digest == facts.key.spki_digest and len(key.name) == 34


@pytest.mark.parametrize(
    "case, mutation", [p for p in mutations("tpm") if p.values[0]["kind"] == "TPM2 quote"]
)
def test_tpm_mutations(case: dict[str, Any], mutation: dict[str, Any]) -> None:
    raw = flip(inputs("tpm", case)[mutation["input"]], mutation["offset"], mutation["mask"])
    now = moment(case["checks"][0]["at"])
    assert refused(lambda: verify_tpm(case, now, **{mutation["input"]: raw})).startswith("tpm.")


def test_an_ak_certificate_leads_to_a_pinned_vtpm_root(shared_dir: Path) -> None:
    """Azure's chain, within and after its time; Google's two, whose purposes differ by root."""
    case = CASES["tpm"]["blindllama-azure-trusted-launch"]
    given, chain = inputs("tpm", case), read("tpm", case["ak_chain"])
    leaf = chain[: chain.index(b"-----END CERTIFICATE-----") + 26]
    key = tpm.load_key(given["ak"], Trail("tpm"))
    for check in case["ak_chain_checks"]:
        now = moment(check["at"])

        def verify(now: datetime = now) -> tuple[str, datetime]:
            return tpm.verify_key(key, leaf, chain, now, Trail("tpm"))

        if check["evidence"] == "valid":
            assert tpm.ROOTS[verify()[0]].name.startswith("Azure")
        else:
            assert refused(verify) == "tpm.ak_chain.dates"
    for case in CASES["tpm"].values():
        if case["kind"] == "AK certificate chain":
            given = inputs("tpm", case)
            trail, now = Trail("tpm"), moment(case["checks"][0]["at"])
            pool = b"".join(each if each.startswith(b"--") else pem_of(each) for each in given["ca"])
            cert = tpm.load_certificate(given["ak_cert"], trail, "ak")
            own = tpm.AttestationKey(cert.public_key(), b"")  # type: ignore[arg-type]
            root, _ = tpm.verify_key(own, given["ak_cert"], pool, now, trail)
            assert tpm.ROOTS[root].name.startswith("Google")
            with warnings.catch_warnings(action="ignore"):  # reading Google's long names warns
                assert cert.issuer.rfc4514_string() == case["fields"]["issuer"]
            azure_rules = {root: tpm.Root("as strict as Azure", frozenset({tpm._TCG_AK}), True)}
            strict = lambda: tpm.verify_key(own, given["ak_cert"], pool, now, Trail("tpm"), azure_rules)  # noqa: E731, B023
            assert refused(strict) == "tpm.ak_chain.purpose"


def pem_of(der: bytes) -> bytes:
    return certs.load_der(Trail("test"), "pem", der).public_bytes(Encoding.PEM)


# --- Azure -------------------------------------------------------------------------------------------------

AZURE = [p for p in checks("tpm") if p.values[0]["kind"].startswith("Azure HCL")]
AZURE_REASONS = {
    ("azure-snp-vtpm-milan", "2026-07-01"): "policy.nonce",  # "challenge": nine bytes can be guessed
    ("azure-tdx-vtpm", "2025-11-05"): "policy.sept_ve_disable",
    ("azure-tdx-vtpm-ak-chain", "2026-07-01"): "",  # its nonce is zeros: whoever did not send those refuses
    ("azure-tdx-vtpm-ak-chain", "2026-08-01"): "tdx.crl.pck.dates",
}


def verify_azure(case: dict[str, Any], now: datetime, **changed: bytes) -> azure.Facts:
    given = inputs("tpm", case) | changed
    hcl = tpm.parse_hcl(given["hcl_report"], Trail("tpm"))
    hardware: snp.Facts | tdx.Facts
    if hcl.hardware == "snp":
        hardware = snp.verify(hcl.report, given["vek"], given["ca_chain"], now)
    else:
        hardware = tdx.verify(given["td_quote"], given["collateral"], now)
    root = read("tpm", "azure_ca/azure_virtual_tpm_root_2023.pem")
    vtpm = tpm.verify(
        given["tpm_quote"],
        given["tpm_signature"],
        hcl.key,
        pcrs_of(given["pcrs"]),
        now,
        certificate=given.get("ak_cert", b""),
        authorities=given.get("ak_intermediates", b"") + root,
        bare=True,
    )
    return azure.verify(hcl, hardware, vtpm)


def azure_rule(facts: azure.Facts) -> azure.SnpRule | azure.TdxRule:
    vtpm = tpm_rule(facts.tpm, ak_roots=())
    if isinstance(facts.hardware, snp.Facts):
        return azure.SnpRule(rule_for(facts.hardware), vtpm)
    return azure.TdxRule(tdx_rule(facts.hardware), vtpm)


@pytest.mark.parametrize("case, check", AZURE)
def test_azure_vectors(case: dict[str, Any], check: dict[str, Any]) -> None:
    now, fields = moment(check["at"]), case["fields"]
    reason = AZURE_REASONS.get((case["id"], check["at"][:10]), "")
    if check["evidence"] == "invalid":
        assert refused(lambda: verify_azure(case, now)) == reason
        return
    facts = verify_azure(case, now)
    assert facts.binding.hex() == fields["tpm_nonce"] and facts.hcl.user_data.hex() == fields["user_data"]
    assert facts.hcl.digest[:32].hex() == fields["runtime_sha256"]
    assert facts.tpm.pcrs["sha256"][0].hex() == fields["pcr0"]
    assert facts.tpm.attest.pcr_digest.hex() == fields["pcr_digest"]
    if isinstance(facts.hardware, snp.Facts):
        assert facts.hardware.report.measurement.hex() == fields["measurement"]
        assert facts.hardware.tcb() == fields["tcb"] and facts.hardware.report.vmpl == fields["vmpl"]
    else:
        assert facts.hardware.quote.mrtd.hex() == fields["mrtd"]
        assert (
            facts.hardware.status == check["tcb"] and facts.hardware.platform.fmspc.hex() == fields["fmspc"]
        )
    rule = azure_rule(facts)
    assert rule.flaw() is None
    if reason:
        assert judged(rule, facts) == reason  # type: ignore[arg-type]
    else:
        rule.judge(facts, Trail("policy"))
    if "ak_cert" in case["inputs"]:
        assert facts.tpm.ak_root and facts.until <= moment(fields["ak_cert"]["not_after"])


@pytest.mark.parametrize(
    "case, mutation", [p for p in mutations("tpm") if p.values[0]["kind"].startswith("Azure")]
)
def test_azure_mutations(case: dict[str, Any], mutation: dict[str, Any]) -> None:
    raw = flip(inputs("tpm", case)[mutation["input"]], mutation["offset"], mutation["mask"])
    now = moment(case["checks"][0]["at"])
    refused(lambda: verify_azure(case, now, **{mutation["input"]: raw}))


def test_azure_parts_of_two_machines_do_not_fit(shared_dir: Path) -> None:
    """A genuine report, a genuine quote and genuine runtime data, of which one is another machine's."""
    milan, genoa = CASES["tpm"]["azure-snp-vtpm-milan"], CASES["tpm"]["azure-snp-vtpm-genoa"]
    now, other = moment("2026-07-01T00:00:00Z"), inputs("tpm", CASES["tpm"]["azure-snp-vtpm-genoa"])
    vtpm = {k: other[k] for k in ("tpm_quote", "tpm_signature", "pcrs")}
    assert refused(lambda: verify_azure(milan, now, **vtpm)) == "tpm.signature"
    mine, theirs = verify_azure(milan, now), verify_azure(genoa, now)
    assert refused(lambda: azure.verify(theirs.hcl, mine.hardware, theirs.tpm)) == "az-snp-vtpm.runtime_data"
    assert refused(lambda: azure.verify(mine.hcl, mine.hardware, theirs.tpm)) == "az-snp-vtpm.key"


# --- every byte --------------------------------------------------------------------------------------------


# All bytes take a minute. A run takes every fourth, from a place that its seed chooses; small ones whole.
ALL_BYTES = bool(os.environ.get("MIMIR_TEST_ALL_BYTES"))


class Target:
    """Real evidence as one byte string, and what verifies it. `free` are bytes that are not looked at."""

    def __init__(self, raw: bytes, verify: Callable[[bytes], Any], free: range = range(0)) -> None:
        self.raw, self.verify, self.free = raw, verify, free
        self.every = 1 if ALL_BYTES or len(raw) < 1000 else 4


def targets() -> dict[str, Callable[[], Target]]:
    def snp_target(part: str) -> Target:
        case = CASES["snp"]["azure-genoa-v3"]
        now = moment(case["checks"][0]["at"])
        raw = inputs("snp", case)[part]
        if part == "vek":
            raw = snp._der_of(raw, Trail("snp"))
        return Target(raw, lambda r: verify_snp(case, now, **{part: r}))

    def tdx_target(name: str) -> Target:
        case = CASES["tdx"][name]
        raw, collateral = tdx_inputs(case)
        now = moment(case["checks"][0]["at"])
        return Target(raw, lambda r: tdx.verify(r, collateral, now))

    def nitro_target() -> Target:
        case = CASES["nitro"]["prod-2025-indefinite"]
        now = moment(case["checks"][0]["at"])
        return Target(inputs("nitro", case)["doc"], lambda r: nitro.verify(r, now))

    def tpm_target(part: str) -> Target:
        case = CASES["tpm"]["keylime-rsa-sha256"]
        now = moment(case["checks"][0]["at"])
        return Target(inputs("tpm", case)[part], lambda r: verify_tpm(case, now, **{part: r}))

    def azure_target(name: str) -> Target:
        case = CASES["tpm"][name]
        now = moment(case["checks"][0]["at"])
        given = inputs("tpm", case)
        hardware = functools.cache(lambda: verify_azure(case, now).hardware)

        def verify(raw: bytes) -> azure.Facts:
            hcl = tpm.parse_hcl(raw, Trail("tpm"))
            quote, signature, pcrs = given["tpm_quote"], given["tpm_signature"], pcrs_of(given["pcrs"])
            vtpm = tpm.verify(quote, signature, hcl.key, pcrs, now, bare=True)
            if hcl.hardware == "snp" and hcl.report != given["hcl_report"][32:1216]:
                return azure.verify(hcl, snp.verify(hcl.report, given["vek"], given["ca_chain"], now), vtpm)
            return azure.verify(hcl, hardware(), vtpm)

        # A TDREPORT within the blob is signed by nobody and nothing is taken from it.
        free = range(tpm.HCL_HEAD, tpm.HCL_HEAD + tpm.HCL_REPORT) if "tdx" in name else range(0)
        return Target(given["hcl_report"], verify, free)

    return {
        "snp report": lambda: snp_target("report"),
        "snp vek": lambda: snp_target("vek"),
        "tdx v4": lambda: tdx_target("v4-uptodate"),
        "tdx v5": lambda: tdx_target("v5-uptodate"),
        "nitro": nitro_target,
        "tpm quote": lambda: tpm_target("quote"),
        "tpm signature": lambda: tpm_target("signature"),
        "azure snp hcl": lambda: azure_target("azure-snp-vtpm-genoa"),
        "azure tdx hcl": lambda: azure_target("azure-tdx-vtpm-ak-chain"),
    }


TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_every_byte_counts(shared_dir: Path, name: str, seed: int) -> None:
    """A bit of each byte turned: refused, or within the bytes that are stated not to be looked at."""
    target = TARGETS[name]()
    good = target.verify(target.raw)
    for offset in range(seed % target.every, len(target.raw), target.every):
        changed = flip(target.raw, offset, 1 << (seed + offset) % 8)
        if offset in target.free:
            assert target.verify(changed).names() == good.names()
        else:
            assert refused(lambda r=changed: target.verify(r)), offset  # type: ignore[misc]


@pytest.mark.parametrize("name", TARGETS)
def test_evidence_cut_short_or_prolonged_is_refused(shared_dir: Path, name: str) -> None:
    target = TARGETS[name]()
    for length in range(len(target.raw)):
        if name == "tdx v4" and length >= len(target.raw) - 70:
            continue  # less padding is the same quote
        if name.startswith("azure") and not any(target.raw[length:]):
            continue  # as above
        refused(lambda n=length: target.verify(target.raw[:n]))  # type: ignore[misc]
    refused(lambda: target.verify(target.raw + b"\1"))


# --- malformed ---------------------------------------------------------------------------------------------


@functools.cache
def small_targets() -> list[tuple[bytes, Callable[[bytes], Any]]]:
    """Every parser with something good to start from."""
    intel, amd, own = pki.Intel.make(), pki.Amd.make(), pki.Tpm(kind="rsa")
    quote, signature = own.quote(bytes(32))
    key = tpm.parse_public(own.public(), Trail("tpm"))
    ours = intel.collateral()
    log = pki.event_log([(0, 1, bytes(32)), (7, 2, bytes(32))], locality=3)
    hcl = read("tpm", "azure_snp_genoa/hcl_report.bin") if _SHARED else b""
    return [
        (amd.report(), lambda r: snp.parse(r, Trail("snp"))),
        (amd.vek(), lambda r: snp.parse_vek(r, Trail("snp"))),
        (intel.quote(), lambda r: tdx.parse(r, Trail("tdx"))),
        (intel.quote(), lambda r: tdx.peek_fmspc(tdx.parse(r, Trail("tdx")), Trail("tdx"))),
        (ours, lambda r: tdx.verify_collateral(r, pki.NOW, roots=intel.roots)),
        (pki.Aws.make().document(), lambda r: nitro.parse(r, Trail("nitro"))),
        (pki.Aws.make().document(), lambda r: nitro.verify(r, pki.NOW)),
        (quote, lambda r: tpm.parse_attest(r, Trail("tpm"))),
        (signature, lambda r: tpm.parse_signature(r, Trail("tpm"))),
        (own.public(), lambda r: tpm.parse_public(r, Trail("tpm"))),
        (pki.Tpm().public(), lambda r: tpm.parse_public(r, Trail("tpm"))),
        (log, lambda r: tpm.replay(tpm.parse_log(r, Trail("tpm")).events, "sha256", Trail("tpm"))),
        (hcl, lambda r: tpm.parse_hcl(r, Trail("tpm"))),
        (pki.pem(own.certified()[0]), lambda r: tpm.verify_key(key, r, r, pki.NOW, Trail("tpm"))),
        (amd.crl(7), lambda r: certs.verify_crl(Trail("crl"), "crl", r, amd.ark, pki.NOW)),
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_only_our_own_error_leaves_a_verifier(data: st.DataObject) -> None:
    """Bytes overwritten, cut out and put in, lengths inflated: no crash and no other error."""
    raw, work = data.draw(st.sampled_from(small_targets()))
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        large = st.sampled_from((b"\xff" * 4, b"\xff\xff", b"\0", b"\x7f\xff\xff\xff"))
        patch = data.draw(large | st.binary(max_size=12))
        gone = data.draw(st.sampled_from((len(patch), 0, 1, 64)))
        changed[at : at + gone] = patch
    try:
        work(bytes(changed))
    except AttestationError as error:
        assert str(error).isprintable() and len(str(error)) < 700


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x81" * 10_000 + b"\0",  # nested without end
        b"\x9b" + b"\xff" * 8,  # an array of 2^64 items
        b"\x5b\x7f" + b"\xff" * 7,  # a byte string longer than memory
        bytes.fromhex("c5821b00000000ffffffff01"),  # a big float: 2^(2^32)
        bytes.fromhex("d82382"),  # a regular expression
        bytes.fromhex("a2010201"),
        b"\xbf" * 50,
    ],
)
def test_cbor_is_not_a_program(bomb: bytes) -> None:
    assert refused(lambda: nitro.parse(bomb, Trail("nitro"))) == "nitro.format"
    whole = cbor2.dumps([nitro.PROTECTED, {}, bomb, bytes(96)])
    assert refused(lambda: nitro.parse(whole, Trail("nitro"))) == "nitro.payload"


@pytest.mark.parametrize(
    "bomb", [b"[" * 100_000, b'{"tcb_info":' * 5000, b"1" * 100_000, b'{"a":1,"a":2}', b"NaN"]
)
def test_json_is_not_a_program(bomb: bytes) -> None:
    assert refused(lambda: tdx.read_collateral(bomb, Trail("tdx"))) == "tdx.collateral"


# --- our own authorities: what the real ones will not show us -----------------------------------------------


@pytest.fixture(scope="module")
def amd() -> pki.Amd:
    return pki.Amd.make()


@pytest.fixture(scope="module")
def intel() -> pki.Intel:
    return pki.Intel.make()


@pytest.fixture(scope="module")
def aws() -> pki.Aws:
    return pki.Aws.make()


def own_snp(amd: pki.Amd, **changes: Any) -> snp.Facts:
    settings: dict[str, Any] = {
        "report": amd.report(),
        "vek": amd.vek(),
        "chain": amd.chain(),
        "now": pki.NOW,
    }
    return snp.verify(**{"roots": amd.roots} | settings | changes)


def test_an_amd_list_revokes_the_signer_or_the_chip(amd: pki.Amd) -> None:
    facts = own_snp(amd, crl=amd.crl(99))
    assert facts.crl is not None and facts.until == facts.crl.until
    assert refused(lambda: own_snp(amd, crl=amd.crl(7))) == "snp.crl.signer"
    chip = amd.vek(serial=5)  # the real ones have 0, which a list cannot name
    assert refused(lambda: own_snp(amd, vek=chip, crl=amd.crl(5))) == "snp.crl.vek"
    vlek = {"vek": amd.vek(kind="vlek"), "chain": amd.chain("vlek"), "report": amd.report(key_info=4)}
    assert own_snp(amd, crl=amd.crl(7), **vlek).vek.csp_id == "CN=cloud.example"
    assert refused(lambda: own_snp(amd, crl=amd.crl(8), **vlek)) == "snp.crl.signer"


def test_a_list_that_is_stale_early_or_by_another_is_refused(amd: pki.Amd) -> None:
    stale = amd.crl(days=(-3, -1))
    assert refused(lambda: own_snp(amd, crl=stale)) == "snp.crl.dates"
    assert refused(lambda: own_snp(amd, crl=stale, grace=timedelta(hours=23))) == "snp.crl.dates"
    assert own_snp(amd, crl=stale, grace=timedelta(hours=25)).until == pki.NOW + timedelta(hours=1)
    assert refused(lambda: own_snp(amd, crl=amd.crl(days=(1, 3)))) == "snp.crl.dates"
    other = pki.revocations(amd.ask, pki.rsa_key("ask"))
    assert refused(lambda: own_snp(amd, crl=other)) == "snp.crl.signature"
    forged = pki.revocations(amd.ark, pki.rsa_key("ask"))
    assert refused(lambda: own_snp(amd, crl=forged)) == "snp.crl.signature"


def test_a_report_must_have_the_tcb_and_the_chip_of_its_certificate(amd: pki.Amd) -> None:
    """A TCB that is not the certificate's, in each component; a chip id that is another's, or masked."""
    for component in pki.TCB:
        changed = pki.TCB | {component: pki.TCB[component] + 1}
        assert refused(lambda c=changed: own_snp(amd, vek=amd.vek(tcb=c))) == "snp.tcb"  # type: ignore[misc]
        assert refused(lambda c=changed: own_snp(amd, report=amd.report(reported=c))) == "snp.tcb"  # type: ignore[misc]
    other = bytes(64 * [9])
    assert refused(lambda: own_snp(amd, report=amd.report(chip_id=other))) == "snp.chip"
    masked = own_snp(amd, report=amd.report(key_info=2, chip_id=bytes(64)))
    assert judged(rule_for(masked), masked) == "policy.chip"
    rule_for(masked, masked_chip=True).judge(masked, Trail("policy"))
    half = own_snp(amd, report=amd.report(chip_id=bytes(64), key_info=2))
    assert refused(lambda: own_snp(amd, report=amd.report(key_info=2))) == "snp.chip"
    named = rule_for(half, masked_chip=True, chip_ids=(amd.hwid.hex(),))
    assert judged(named, half) == "policy.chip"


def test_a_chip_certificate_is_read_strictly(amd: pki.Amd) -> None:
    wrapped = amd.vek(changes={"4": pki.tlv(4, amd.hwid)})  # as some certificates have it
    assert own_snp(amd, vek=wrapped).vek.hwid == amd.hwid
    assert own_snp(amd, vek=amd.vek(serial=5), crl=amd.crl(4)).vek.walked.serial == 5
    for changes in (
        {"5": pki.tlv(0x16, b"CN=x")},  # both identifiers
        {"4": None},
        {"4": amd.hwid[:63]},
        {"3.3": None},
        {"3.3": pki.number(23) + b"\0"},
        {"3.3": pki.tlv(2, b"\x97")},  # a negative number
        {"2": None},
    ):
        assert refused(lambda c=changes: own_snp(amd, vek=amd.vek(changes=c))) == "snp.vek"  # type: ignore[misc]
    assert (
        refused(lambda: own_snp(amd, vek=amd.vek(changes={"2": pki.tlv(0x16, b"Venice")}))) == "snp.product"
    )
    stranger = amd.vek(issuer=pki.named("SEV-Milan"))  # by the right key, in another's name
    assert refused(lambda: own_snp(amd, vek=stranger)) == "snp.chain.vek"
    for chain in (pki.pem(amd.ask), pki.pem(amd.ask, amd.ark, amd.ark), b""):
        assert refused(lambda c=chain: own_snp(amd, chain=c)) == "snp.chain"  # type: ignore[misc]
    for changes, step in (
        ({"key_cert_sign": False}, "authority"),
        ({"ca": False, "path_length": None}, "authority"),
        ({"days": (-9, -1)}, "dates"),
        ({"days": (1, 9)}, "dates"),
    ):
        other = pki.Amd.make(**changes)  # type: ignore[arg-type]
        assert refused(lambda o=other: own_snp(o)) == f"snp.chain.{step}"  # type: ignore[misc]
    # A version above 127 takes two bytes; the last of three is not the number.
    high = pki.TCB | {"ucode": 217}
    assert own_snp(amd, vek=amd.vek(tcb=high), report=amd.report(reported=high)).tcb()["ucode"] == 217


@pytest.mark.parametrize(
    "changes, rule, step",
    [
        ({"policy": 0xB0000}, {}, "debug"),
        ({"policy": 0x70000}, {}, "migration"),
        ({"policy": 0x10000}, {}, "policy_bits"),
        ({"policy": 0x30000 | 1 << 26}, {}, "policy_bits"),
        ({"platform": 0x125}, {}, "platform_info"),
        ({"platform": 5}, {"require_alias_check": True}, "alias_check"),
        ({}, {"product": (snp.Product("milan", 0, 0, 0, 0),)}, "product"),
        (
            {"committed": pki.TCB | {"snp": 22}},
            {"product": (snp.Product("genoa", **pki.TCB),)},
            "tcb.committed",
        ),
        ({"launch": pki.TCB | {"ucode": 83}}, {"product": (snp.Product("genoa", **pki.TCB),)}, "tcb.launch"),
        ({}, {"product": (snp.Product("genoa", 9, 0, 24, 99),)}, "tcb.reported"),  # one higher does not help
        ({}, {"measurements": ("00" * 48,)}, "measurement"),
        ({}, {"host_data": ("00" * 32,)}, "host_data"),
        ({}, {"chip_ids": ("00" * 64,)}, "chip"),
        ({}, {"signing_key": ("vlek",), "csp_ids": ("x",)}, "signing_key"),
        ({}, {"id_key_digests": ("11" * 48,)}, "id_key"),
        ({"author_key": b"\x11" * 48}, {"author_key_digests": ("11" * 48,)}, "author_key"),  # flag not set
        ({"vmpl": 1}, {}, "vmpl"),
        ({}, {"guest_svn_min": 1}, "guest_svn"),
        ({}, {"forbid_smt": True}, "smt"),
        ({}, {"require_single_socket": True}, "single_socket"),
        ({}, {"require_ciphertext_hiding": True}, "ciphertext_hiding"),
    ],
)
def test_each_wish_of_an_snp_rule_decides(
    amd: pki.Amd, changes: dict[str, Any], rule: dict[str, Any], step: str
) -> None:
    facts = own_snp(amd, report=amd.report(**changes))
    wanted = rule_for(facts, **rule) if rule else rule_for(own_snp(amd))
    assert judged(wanted, facts) == f"policy.{step}"


def test_a_good_snp_report_satisfies_each_wish(amd: pki.Amd) -> None:
    good = {
        "policy": 0x30000 | 1 << 20 | 1 << 24,
        "key_info": 1,
        "author_key": b"\x11" * 48,
        "platform": 0x24,
    }
    facts = own_snp(amd, report=amd.report(**good, guest_svn=3, vmpl=1, id_key=b"\x12" * 48))
    rule_for(
        facts,
        author_key_digests=("11" * 48,),
        id_key_digests=("12" * 48,),
        vmpl_max=1,
        guest_svn_min=3,
        forbid_smt=False,
        require_single_socket=True,
        require_ciphertext_hiding=True,
    ).judge(facts, Trail("policy"))


@pytest.mark.parametrize(
    "at, step",
    [
        ({0: 1}, "version"),
        ({0: 6}, "version"),
        ({0x34: 2}, "algorithm"),
        ({0x48: 7 << 2}, "signing_key"),
        ({0x48: 1 << 5}, "signing_key"),
        ({0x48: 1 << 2}, "signing_key"),  # a VLEK's report under a VCEK
        *(({offset: 1}, "reserved") for offset in (0x4C, 0x18B, 0x1EB, 0x1EF, 0x1F8, 0x208, 0x29F)),
        ({0: 2}, "reserved"),  # version 2 has no CPUID
        ({0x188: 0x1A, 0x189: 0x50}, "product"),  # Venice: no root is pinned
        ({0x189: 0x01}, "product"),  # Milan's CPUID, Genoa's certificate
        ({0x182: 1}, "tcb"),  # a byte that is no component
    ],
)
def test_what_is_signed_and_not_understood_is_refused(amd: pki.Amd, at: dict[int, int], step: str) -> None:
    assert refused(lambda: own_snp(amd, report=amd.report(at=at))) == f"snp.{step}"


def test_later_versions_have_mitigation_vectors(amd: pki.Amd) -> None:
    report = own_snp(amd, report=amd.report(at={0: 5, 0x1F8: 3, 0x200: 7})).report
    assert report.mitigations == (3, 7)
    assert refused(lambda: own_snp(amd, report=amd.report(at={0: 5, 0x208: 1}))) == "snp.reserved"


def own_tdx(intel: pki.Intel, **changes: Any) -> tdx.Facts:
    given = {"raw": intel.quote(), "collateral": intel.collateral(), "now": pki.NOW, "roots": intel.roots}
    return tdx.verify(**given | changes)


def test_intel_revokes_a_platform_or_its_ca(intel: pki.Intel) -> None:
    assert own_tdx(intel).second == own_tdx(intel).status == "UpToDate"
    assert refused(lambda: own_tdx(intel, collateral=intel.collateral(revoked_pck=[23]))) == "tdx.crl.pck"
    for serial in (21, 22):  # the CA, the signer of the TCB info
        assert (
            refused(lambda s=serial: own_tdx(intel, collateral=intel.collateral(revoked_ca=[s])))
            == "tdx.crl.root"
        )  # type: ignore[misc]
    assert own_tdx(intel, collateral=intel.collateral(revoked_pck=[24], revoked_ca=[24])).status == "UpToDate"


def test_stale_intel_collateral_is_refused_and_grace_is_for_lists_alone(intel: pki.Intel) -> None:
    stale = intel.collateral(crl_days=(-3, -0.5))
    assert refused(lambda: own_tdx(intel, collateral=stale)) == "tdx.crl.root.dates"
    facts = own_tdx(intel, collateral=stale, grace=timedelta(days=1))
    # dcap-qvl knows no grace: what expired for it is not admitted, whatever the policy.
    assert facts.second.startswith("refused: ")
    assert judged(tdx_rule(facts), facts) == "policy.second_opinion"
    late = intel.collateral(days=(-3, -0.5))
    assert refused(lambda: own_tdx(intel, collateral=late, grace=timedelta(days=9))) == "tdx.tcb_info.dates"


def test_a_platform_below_its_level_is_not_up_to_date(intel: pki.Intel) -> None:
    facts = own_tdx(intel, collateral=intel.collateral(sgx_svn=6))
    assert facts.status == facts.second == "OutOfDate"
    assert judged(tdx_rule(facts), facts) == "policy.tcb"
    allowed = tdx_rule(facts, tcb_status=("UpToDate", "OutOfDate"))
    allowed.judge(facts, Trail("policy"))
    old = own_tdx(intel, raw=intel.quote(qe_svn=3))
    assert old.status == "NotSupported" and old.second.startswith("refused: ")


@pytest.mark.parametrize(
    "quote, collateral, step",
    [
        ({"qe_data": bytes(32)}, {}, "tdx.qe.key"),
        ({}, {"info": {"fmspc": "00906ED50001"}}, "tdx.tcb_info.fmspc"),
        ({}, {"info": {"pceId": "0001"}}, "tdx.tcb_info.pceid"),
        ({}, {"info": {"id": "SGX"}}, "tdx.tcb_info.id"),
        ({}, {"identity": {"id": "QE"}}, "tdx.qe_identity.id"),
        ({}, {"identity": {"mrsigner": "34" * 32}}, "tdx.qe.signer"),
        ({}, {"identity": {"isvprodid": 3}}, "tdx.qe.product"),
        ({}, {"identity": {"attributes": "10" + "00" * 15}}, "tdx.qe.attributes"),
        ({}, {"identity": {"miscselect": "00000001"}}, "tdx.qe.miscselect"),
        (
            {},
            {
                "info": {
                    "tdxModule": {"mrsigner": "01" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
                }
            },
            "tdx.tdx_module.signer",
        ),
        ({"svn": b"\2\1" + bytes(14)}, {}, "tdx.tdx_module"),
        ({}, {"info": {"tcbLevels": [{"tcb": {}}]}}, "tdx.tcb_info.levels"),
        ({}, {"info": {"tcbEvaluationDataNumber": True}}, "tdx.tcb_info"),
    ],
)
def test_each_check_of_a_quote_decides(
    intel: pki.Intel, quote: dict[str, Any], collateral: dict[str, Any], step: str
) -> None:
    given = {"raw": intel.quote(**quote), "collateral": intel.collateral(**collateral)}
    assert refused(lambda: own_tdx(intel, **given)) == step


@pytest.mark.parametrize(
    "quote, rule, step",
    [
        ({"attributes": 1 << 28 | 1}, {}, "debug"),
        ({"attributes": 1 << 28 | 1 << 29}, {}, "migration"),
        ({"attributes": 0}, {}, "sept_ve_disable"),
        ({"attributes": 1 << 28 | 1 << 27}, {}, "attributes"),
        ({"attributes": 1 << 28 | 2}, {}, "attributes"),
        ({"attributes": 1 << 28 | 1 << 63}, {}, "perfmon"),
        ({}, {"mrtd": ("00" * 48,)}, "mrtd"),
        ({}, {"rtmr2": ("00" * 48,)}, "rtmr2"),
        ({}, {"mrconfigid": ("01" * 48,)}, "mrconfigid"),
        ({}, {"ppids": ("00" * 16,)}, "ppid"),
        ({}, {"mrseam": ("01" * 48,)}, "mrseam"),
        ({}, {"xfam": ("01" * 8,)}, "xfam"),
        ({}, {"tcb_eval_min": 20}, "tcb_evaluation"),
    ],
)
def test_each_wish_of_a_tdx_rule_decides(
    intel: pki.Intel, quote: dict[str, Any], rule: dict[str, Any], step: str
) -> None:
    facts = own_tdx(intel, raw=intel.quote(**quote))
    tdx_rule(own_tdx(intel), rtmr3=None).judge(own_tdx(intel), Trail("policy"))
    assert judged(tdx_rule(facts, **rule), facts) == f"policy.{step}"


def test_advisories_must_be_allowed_by_name(intel: pki.Intel) -> None:
    levels = json.loads(json.loads(intel.collateral())["tcb_info"])["tcbLevels"]
    levels[0]["advisoryIDs"] = ["INTEL-SA-99999"]
    facts = own_tdx(intel, collateral=intel.collateral(info={"tcbLevels": levels}))
    assert facts.status == facts.second == "UpToDate"
    assert judged(tdx_rule(facts), facts) == "policy.advisories"
    tdx_rule(facts, advisories_allowed=("INTEL-SA-99999",)).judge(facts, Trail("policy"))


def test_a_library_that_disagrees_or_panics_admits_nobody(
    intel: pki.Intel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    class Other:
        status = "SWHardeningNeeded"

    def panic(*_: Any) -> None:
        raise PanicException

    for fake in (lambda *_: Other, panic):
        monkeypatch.setattr(tdx.dcap_qvl, "verify_with_root_ca", fake)
        facts = own_tdx(intel)
        assert facts.status == "UpToDate"
        assert refused(lambda f=facts: tdx_rule(f).judge(f, Trail("policy"))) == "policy.second_opinion"  # type: ignore[misc]


def test_nitro_documents_are_read_strictly(aws: pki.Aws) -> None:
    def step(**changes: Any) -> str:
        return refused(lambda: nitro.verify(aws.document(**changes), pki.NOW, roots=aws.roots))

    assert nitro.verify(aws.document(nonce=b"n" * 512), pki.NOW, roots=aws.roots).document.nonce == b"n" * 512
    body = cbor2.dumps(aws.payload())
    twice = b"\xaa" + body[1:] + cbor2.dumps("digest") + cbor2.dumps("SHA384")
    assert step(payload=twice) == step(payload=body + b"\0") == "nitro.payload"
    for changes in (
        {"digest": "SHA256"},
        {"timestamp": 0},
        {"timestamp": True},
        {"pcrs": {}},
        {"pcrs": {32: bytes(48)}},
        {"pcrs": {0: bytes(47)}},
        {"cabundle": []},
        {"nonce": bytes(513)},
        {"user_data": "text"},
        {"public_key": bytes(1025)},
        {"module_id": ""},
        {"extra": 1},
    ):
        assert step(**changes) == "nitro.payload", changes
    assert step(cabundle=[aws.middle.public_bytes(Encoding.DER)]) == "nitro.chain.root"
    good = aws.document()
    assert refused(lambda: nitro.verify(good + b"\0", pki.NOW, roots=aws.roots)) == "nitro.format"
    tagged = b"\xd2" + good
    assert refused(lambda: nitro.verify(tagged, pki.NOW, roots=aws.roots)) == "nitro.format"
    frame, signature = good[: -nitro.HALF * 2], good[-nitro.HALF * 2 :]
    assert frame.endswith(b"\x58\x60")  # the signature's length, which three bytes can say as well
    longer = frame.removesuffix(b"\x58\x60") + b"\x59\x00\x60" + signature
    assert cbor2.loads(longer) == cbor2.loads(good)
    assert refused(lambda: nitro.verify(longer, pki.NOW, roots=aws.roots)) == "nitro.format"
    assert refused(lambda: nitro.verify(good, pki.NOW)) == "nitro.chain.root"


@pytest.mark.parametrize(
    "middle, step",
    [
        ({"ca": False, "path_length": None}, "role"),
        ({"key_cert_sign": False}, "role"),
        ({"days": (-20, -5)}, "dates"),
        ({"days": (1, 20)}, "dates"),
    ],
)
def test_each_link_of_a_chain_decides(middle: dict[str, Any], step: str) -> None:
    aws = pki.Aws.make(**middle)
    assert refused(lambda: nitro.verify(aws.document(), pki.NOW, roots=aws.roots)) == f"nitro.chain.{step}"


def test_a_path_length_and_an_unknown_extension_end_a_chain() -> None:
    aws = pki.Aws.make()
    key, zone = pki.ec_key("deeper", "p384"), pki.ec_key("aws zone", "p384")
    below = pki.certificate("below", key, aws.middle, zone, ca=True)
    leaf = pki.certificate("leaf", key, below, key, ca=False)
    trail = Trail("test")
    assert (
        refused(
            lambda: certs.verify_chain(
                trail, "chain", [leaf, below, aws.middle, aws.root], aws.roots, pki.NOW
            )
        )
        == "test.chain.role"
    )
    strange = (pki.x509.UnrecognizedExtension(pki.ObjectIdentifier("1.2.3.4"), b""), True)
    odd = pki.certificate("odd", key, aws.middle, zone, ca=False, extensions=[strange])
    assert (
        refused(lambda: certs.verify_chain(trail, "chain", [odd, aws.middle, aws.root], aws.roots, pki.NOW))
        == "test.chain.role"
    )
    certs.verify_chain(trail, "chain", [aws.leaf, aws.middle, aws.root], aws.roots, pki.NOW)


# --- TPM, with keys of our own -----------------------------------------------------------------------------

NONCE = bytes(range(32))


def own_tpm(
    own: pki.Tpm, *, chosen: list[int] | None = None, nonce: bytes = NONCE, **changes: Any
) -> tpm.Facts:
    quote, signature = own.quote(nonce, chosen)
    key = tpm.parse_public(own.public(), Trail("tpm"))
    return tpm.verify(quote, signature, key, {"sha256": own.pcrs}, pki.NOW, **changes)


def own_rule(own: pki.Tpm, **changes: Any) -> tpm.Rule:
    return tpm.Rule(
        **{"pcrs": {n: (v.hex(),) for n, v in own.pcrs.items()}, "ak_names": (own.name,)} | changes
    )


@pytest.mark.parametrize("kind", ["ecc", "rsa"])
def test_a_quote_by_an_enrolled_key(kind: str) -> None:
    own = pki.Tpm(kind=kind)
    facts = own_tpm(own)
    assert facts.binding == NONCE and facts.attest.reset_count == 1
    own_rule(own).judge(facts, Trail("policy"))
    assert judged(own_rule(own, ak_names=("00" * 34,)), facts) == "policy.ak"
    assert judged(own_rule(own, pcrs={0: ("11" * 32,)}), facts) == "policy.pcr0"
    other = tpm.parse_public(own.with_kind("rsa" if kind == "ecc" else "ecc").public(), Trail("tpm"))
    quote, signature = own.quote(NONCE)
    assert (
        refused(lambda: tpm.verify(quote, signature, other, {"sha256": own.pcrs}, pki.NOW)) == "tpm.signature"
    )
    assert judged(own_rule(own), own_tpm(own, nonce=b"")) == "policy.nonce"


def test_a_quote_over_fewer_pcrs_proves_nothing_of_the_others() -> None:
    own = pki.Tpm()
    facts = own_tpm(own, chosen=[0, 1, 2])
    assert set(facts.pcrs["sha256"]) == {0, 1, 2}  # what was given but not quoted is dropped
    assert judged(own_rule(own), facts) == "policy.pcr3"
    quote, signature = own.quote(NONCE)
    key = tpm.parse_public(own.public(), Trail("tpm"))
    fewer = {n: own.pcrs[n] for n in (0, 1)}
    assert refused(lambda: tpm.verify(quote, signature, key, {"sha256": fewer}, pki.NOW)) == "tpm.pcrs"
    swapped = own.pcrs | {0: own.pcrs[1], 1: own.pcrs[0]}
    assert (
        refused(lambda: tpm.verify(quote, signature, key, {"sha256": swapped}, pki.NOW)) == "tpm.pcr_digest"
    )


def test_what_a_tpm_did_not_make_is_refused() -> None:
    own = pki.Tpm()
    key = tpm.parse_public(own.public(), Trail("tpm"))
    quote, signature = own.quote(NONCE, magic=0xFF544348)
    assert refused(lambda: tpm.verify(quote, signature, key, {"sha256": own.pcrs}, pki.NOW)) == "tpm.magic"
    # Each attribute of the key: a key without "restricted" signs whatever it is handed.
    for bit in (1, 4, 5, 16, 18):
        weak = own.public(pki.AK_ATTRIBUTES & ~(1 << bit))
        assert refused(lambda w=weak: tpm.parse_public(w, Trail("tpm"))) == "tpm.ak.attributes"  # type: ignore[misc]
    assert (
        refused(lambda: tpm.parse_public(own.public(pki.AK_ATTRIBUTES | 1 << 17), Trail("tpm")))
        == "tpm.ak.attributes"
    )
    facts = own_tpm(own, nonce=b"short")
    assert judged(own_rule(own), facts) == "policy.nonce"
    unsafe_quote, unsafe_signature = own.quote(NONCE, safe=0)
    unsafe = tpm.verify(unsafe_quote, unsafe_signature, key, {"sha256": own.pcrs}, pki.NOW)
    assert judged(own_rule(own), unsafe) == "policy.clock"
    sha1 = pki.Tpm(bank="sha1")
    assert refused(lambda: own_tpm(sha1)) == "tpm.selection.hash"


def test_signature_schemes() -> None:
    own = pki.Tpm(kind="rsa")
    quote, _ = own.quote(NONCE)
    key, pcrs = tpm.parse_public(own.public(), Trail("tpm")), {"sha256": own.pcrs}
    assert tpm.verify(quote, own.sign(quote, 0x16), key, pcrs, pki.NOW).signature.scheme == "rsapss"
    bare = own.sign(quote)[6:]
    assert tpm.verify(quote, bare, key, pcrs, pki.NOW, bare=True).signature.scheme == "rsassa"
    weak = own.sign(quote)
    weak = weak[:2] + b"\0\4" + weak[4:]  # says SHA-1
    assert refused(lambda: tpm.verify(quote, weak, key, pcrs, pki.NOW)) == "tpm.signature.hash"
    relabelled = b"\0\x16" + own.sign(quote)[2:]  # PKCS 1 called PSS
    assert refused(lambda: tpm.verify(quote, relabelled, key, pcrs, pki.NOW)) == "tpm.signature"


def test_a_certified_key_and_its_purpose() -> None:
    own = pki.Tpm()
    certificate, root = own.certified()
    anchors = {pki.digest(root): tpm.Root("own", frozenset({tpm._TCG_AK}), True)}
    given = {"certificate": pki.pem(certificate), "authorities": pki.pem(root), "roots": anchors}
    facts = own_tpm(own, **given)
    own_rule(own, ak_names=(), ak_roots=(facts.ak_root,)).judge(facts, Trail("policy"))
    # Certified by a root that we know is not yet certified by one that the policy names.
    assert judged(own_rule(own, ak_names=(), ak_roots=("00" * 32,)), facts) == "policy.ak"
    assert refused(lambda: own_tpm(own, **given | {"roots": tpm.ROOTS})) == "tpm.ak_chain.root"
    assert refused(lambda: own_tpm(own, **given | {"authorities": b""})) == "tpm.ak_chain"
    padded = given | {"certificate": certificate.public_bytes(Encoding.DER) + bytes(3000)}
    assert own_tpm(own, **padded).ak_root == facts.ak_root  # as it stands in the TPM's memory
    another, _ = own.with_kind("rsa").certified()
    assert refused(lambda: own_tpm(own, **given | {"certificate": pki.pem(another)})) == "tpm.ak_chain.key"
    for purpose in (None, "1.3.6.1.5.5.7.3.1"):
        wrong, wrong_root = own.certified(purpose)
        changed = given | {"certificate": pki.pem(wrong), "authorities": pki.pem(wrong_root)}
        changed["roots"] = {pki.digest(wrong_root): anchors[pki.digest(root)]}
        assert refused(lambda c=changed: own_tpm(own, **c)) == "tpm.ak_chain.purpose"  # type: ignore[misc]


def test_an_event_log_must_replay_to_the_quoted_registers() -> None:
    digests = [bytes((n,)) * 32 for n in range(3)]
    extend = lambda held, value: pki.hashlib.sha256(held + value).digest()  # noqa: E731
    four = extend(extend(bytes(32), digests[0]), digests[1])
    zero = extend(bytes(31) + b"\3", digests[2])
    own = pki.Tpm(pcrs={0: zero, 4: four, 7: bytes(32)})
    events = [(4, 13, digests[0]), (0, 8, digests[2]), (4, 13, digests[1])]
    facts = own_tpm(own, log=pki.event_log(events, locality=3))
    assert facts.events is not None and len(facts.events) == 3
    assert refused(lambda: own_tpm(own, log=pki.event_log(events))) == "tpm.log.pcr0"  # the locality counts
    assert refused(lambda: own_tpm(own, log=pki.event_log(events[::-1], locality=3))) == "tpm.log.pcr4"
    assert refused(lambda: own_tpm(own, log=pki.event_log(events[:-1], locality=3))) == "tpm.log.pcr4"
    assert refused(lambda: own_tpm(own, log=pki.event_log(events, count=2))).startswith("tpm.log")
    own_rule(own, events={4: (digests[0].hex(), digests[1].hex())}).judge(facts, Trail("policy"))
    some = own_rule(own, events={4: (digests[0].hex(),)})
    assert judged(some, facts) == "policy.events4"
    assert judged(some, own_tpm(own)) == "policy.events4"


def test_the_log_of_a_real_trust_domain_replays(shared_dir: Path) -> None:
    """dstack's RTMR0 to RTMR3, whose events its manifest says replay."""
    case = CASES["tdx"]["dstack-v4-uptodate"]
    listed = json.loads(json.loads(read("tdx", case["eventlog"]))["event_log"])
    events = [tpm.Event(e["imr"], e["event_type"], {"sha384": bytes.fromhex(e["digest"])}) for e in listed]
    held = tpm.replay(events, "sha384", Trail("tdx"))
    quote = tdx.parse(tdx_inputs(case)[0], Trail("tdx"))
    assert held[3] == quote.rtmr[3]
    assert tpm.replay(events[:-1], "sha384", Trail("tdx"))[3] != quote.rtmr[3]


# --- one thing wrong at a time -----------------------------------------------------------------------------


def put(raw: bytes, at: int, value: bytes) -> bytes:
    """Bytes overwritten; a negative place counts from the end."""
    at = at if at >= 0 else len(raw) + at
    return raw[:at] + value + raw[at + len(value) :]


def test_chip_certificates_of_another_form(amd: pki.Amd, shared_dir: Path) -> None:
    for vek in (
        amd.vek(subject="SEV-VXEK"),
        amd.vek(critical=True),
        amd.vek(curve="p256"),
        amd.vek(changes={"4": pki.tlv(4, amd.hwid[:63])}),
        amd.vek() + b"\0",
        put(amd.vek(), 0, b"\x31"),
        b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n",
        pki.pem(amd.ask, amd.ark),
        bytes(certs.MAX_CERTIFICATE + 1),
    ):
        assert refused(lambda v=vek: own_snp(amd, vek=v)) == "snp.vek"  # type: ignore[misc]
    pem = (
        b"-----BEGIN CERTIFICATE-----\n" + pki.base64.encodebytes(amd.vek()) + b"-----END CERTIFICATE-----\n"
    )
    assert own_snp(amd, vek=pem).tcb() == pki.TCB
    for start in (0x2A0, 0x2A0 + 72):
        for value in (bytes(72), b"\xff" * 48 + bytes(24)):
            report = put(amd.report(), start, value)
            assert refused(lambda r=report: own_snp(amd, report=r)) == "snp.signature"  # type: ignore[misc]
    given = inputs("snp", CASES["snp"]["milan-v2"])
    turin = inputs("snp", CASES["snp"]["azure-turin-v5"])["vek"]
    now = moment("2026-07-01T00:00:00Z")
    assert refused(lambda: snp.verify(given["report"], turin, given["ca_chain"], now)) == "snp.product"


def test_providers_and_authors_are_named(amd: pki.Amd) -> None:
    vlek = own_snp(amd, vek=amd.vek(kind="vlek"), chain=amd.chain("vlek"), report=amd.report(key_info=4))
    rule_for(vlek).judge(vlek, Trail("policy"))
    assert judged(rule_for(vlek, csp_ids=("CN=other",)), vlek) == "policy.csp_id"
    authored = own_snp(amd, report=amd.report(key_info=1, author_key=b"\x11" * 48))
    assert judged(rule_for(authored, author_key_digests=("12" * 48,)), authored) == "policy.author_key"


def test_quotes_of_another_form(intel: pki.Intel) -> None:
    good = intel.quote()
    pem = good.index(b"-----BEGIN")
    version5 = b"\5" + good[1:48]
    for raw, step in (
        (b"", "length"),
        (bytes(tdx.MAX_QUOTE + 1), "length"),
        (put(good, 2, b"\3"), "algorithm"),
        (put(good, 4, b"\0"), "tee"),
        (put(good, 12, b"\0"), "vendor"),
        (put(good, 48 + 584 + 4 + 128, b"\7"), "certification"),
        (put(good, pem - 6, b"\4"), "certification"),
        (version5 + b"\2\0" + (583).to_bytes(4, "little") + good[48:], "body"),
        (version5 + b"\4\0" + (584).to_bytes(4, "little") + good[48:], "body"),
        (put(good, 48 + 584, b"\xff" * 4), "format"),
        (put(good, pem - 4, b"\xff" * 4), "format"),
        (intel.quote(pki.pem(intel.pck, intel.root)), "chain"),
        (intel.quote(pki.pem(intel.pck, intel.authority, intel.root).replace(b"\n", b"\r\n")), "chain"),
        (intel.quote(b"\n" + pki.pem(intel.pck, intel.authority, intel.root)), "chain"),
        (intel.quote(b""), "chain"),
        (intel.quote(pki.pem(intel.signer, intel.authority, intel.root)), "chain.issuer"),
        (intel.quote(pki.pem(intel.signer, intel.root, intel.root)), "qe.signature"),
    ):
        assert refused(lambda r=raw: own_tdx(intel, raw=r)) == f"tdx.{step}"  # type: ignore[misc]


def test_a_platform_is_named_by_its_certificate(intel: pki.Intel) -> None:
    quote = tdx.parse(intel.quote(), Trail("tdx"))
    assert tdx.peek_fmspc(quote, Trail("tdx")) == pki.FMSPC.hex()
    other = tdx.parse(intel.quote(pki.pem(intel.signer, intel.root)), Trail("tdx"))
    assert refused(lambda: tdx.peek_fmspc(other, Trail("tdx"))) == "tdx.pck"


def test_collateral_of_another_form(intel: pki.Intel) -> None:
    good = json.loads(intel.collateral())
    chain = pki.pem(intel.pck, intel.authority, intel.root).decode()
    for changes, step in (
        ({"more": ""}, "collateral"),
        ({"tcb_info": 1}, "collateral"),
        ({"tcb_info_signature": "xy"}, "tcb_info"),
        ({"tcb_info_signature": "00" * 63}, "tcb_info.signature"),
        ({"tcb_info_signature": good["qe_identity_signature"]}, "tcb_info.signature"),
        ({"tcb_info_issuer_chain": chain}, "tcb_info.signature"),  # certified, but not the signer
        ({"tcb_info_issuer_chain": ""}, "tcb_info.chain"),
        ({"pck_crl": "xy"}, "crl.pck"),
        ({"pck_crl": ""}, "crl.pck"),
        ({"pck_crl": good["root_ca_crl"]}, "crl.pck.signature"),
    ):
        raw = json.dumps(good | changes).encode()
        assert refused(lambda r=raw: own_tdx(intel, collateral=r)) == f"tdx.{step}"  # type: ignore[misc]
    module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    parts = json.loads(good["tcb_info"])["tcbLevels"][0]
    for info, identity, step in (
        ({"issueDate": "yesterday"}, {}, "tcb_info"),
        ({"nextUpdate": None}, {}, "tcb_info"),
        ({"tcbLevels": [parts | {"tcbStatus": "Fine"}]}, {}, "tcb_info.levels"),
        ({"tcbLevels": [parts | {"tcb": parts["tcb"] | {"pcesvn": -1}}]}, {}, "tcb_info.levels"),
        ({"tcbLevels": None}, {}, "tcb_info.levels"),
        ({"tdxModule": 3}, {}, "tdx_module"),
        ({"tdxModule": module | {"attributes": "01" + "00" * 7}}, {}, "tdx_module.attributes"),
        ({"tdxModule": module | {"attributesMask": "FF"}}, {}, "tdx_module"),
        ({}, {"tcbLevels": 3}, "qe"),
        ({}, {"tcbLevels": [{"tcb": {"isvsvn": 1}, "tcbStatus": "Fine"}]}, "qe"),
        ({}, {"mrsigner": "33"}, "qe"),
        ({}, {"mrsigner": 3}, "qe"),
    ):
        raw = intel.collateral(info=info, identity=identity)
        assert refused(lambda r=raw: own_tdx(intel, collateral=r)) == f"tdx.{step}", (info, identity)  # type: ignore[misc]


def test_a_module_is_judged_by_its_own_identity(intel: pki.Intel) -> None:
    """With a version in byte 1 the SVN in byte 0 is the module's, and its status counts."""

    def facts(svn: int, version: int = 1) -> tdx.Facts:
        levels = [
            {"tcb": {"isvsvn": 5}, "tcbStatus": "UpToDate", "tcbDate": "2026-01-01T00:00:00Z"},
            {"tcb": {"isvsvn": 2}, "tcbStatus": "OutOfDate", "tcbDate": "2025-01-01T00:00:00Z"},
        ]
        module = {
            "mrsigner": "00" * 48,
            "attributes": "00" * 8,
            "attributesMask": "FF" * 8,
            "tcbLevels": levels,
        }
        collateral = intel.collateral(info={"tdxModuleIdentities": [{"id": "TDX_01", **module}]})
        raw = intel.quote(svn=bytes((svn, version)) + bytes(14))
        return own_tdx(intel, raw=raw, collateral=collateral)

    assert facts(5).status == facts(5).second == "UpToDate"
    assert facts(4).status == facts(4).second == "OutOfDate"
    assert facts(1).status == "NotSupported"
    assert refused(lambda: facts(5, 2)) == "tdx.tdx_module"


def test_nitro_frames_of_another_form(aws: pki.Aws) -> None:
    protected, _, payload, signature = cbor2.loads(aws.document())
    for raw, step in (
        (b"", "length"),
        (bytes(nitro.MAX_DOCUMENT + 1), "length"),
        (cbor2.dumps([protected, {}, payload]), "format"),
        (cbor2.dumps({1: protected}), "format"),
        (cbor2.dumps([b"\xa1\x01\x26", {}, payload, signature]), "algorithm"),
        (cbor2.dumps([protected, {4: b""}, payload, signature]), "format"),
        (cbor2.dumps([protected, {}, payload, signature[:95]]), "format"),
        (cbor2.dumps([protected, {}, "text", signature]), "format"),
    ):
        assert refused(lambda r=raw: nitro.verify(r, pki.NOW, roots=aws.roots)) == f"nitro.{step}"  # type: ignore[misc]
    short = pki.certificate(
        "enclave", pki.ec_key("short"), aws.middle, pki.ec_key("aws zone", "p384"), ca=False
    )
    other = aws.document(certificate=short.public_bytes(Encoding.DER))
    assert refused(lambda: nitro.verify(other, pki.NOW, roots=aws.roots)) == "nitro.signature"


def test_chains_of_another_form(aws: pki.Aws) -> None:
    key, zone = pki.ec_key("aws leaf", "p384"), pki.ec_key("aws zone", "p384")
    authority = pki.certificate("leaf", key, aws.middle, zone, ca=True)
    weak = pki.certificate("leaf", key, aws.middle, zone, ca=False, algorithm=pki.hashes.SHA224())
    for chain, step in (
        ([authority, aws.middle, aws.root], "chain.role"),
        ([weak, aws.middle, aws.root], "chain.hash"),
        ([aws.leaf, aws.root], "chain.issuer"),
        ([aws.root], "chain"),
        ([aws.leaf, *[aws.middle] * 8, aws.root], "chain"),
    ):
        work = functools.partial(certs.verify_chain, Trail("test"), "chain", chain, aws.roots, pki.NOW)
        assert refused(work) == f"test.{step}"
    assert refused(lambda: certs.order(Trail("test"), "chain", aws.leaf, [aws.root])) == "test.chain"
    assert certs.order(Trail("test"), "chain", aws.leaf, [aws.root, aws.middle])[1:] == [aws.middle, aws.root]
    many = pki.pem(*[aws.root] * 9)
    for pem, exact in (
        (many, False),
        (bytes(certs.MAX_CHAIN * certs.MAX_CERTIFICATE + 1), False),
        (pki.pem(aws.root) + b"\n", True),
    ):
        assert refused(lambda p=pem, e=exact: certs.load_pem(Trail("test"), "pem", p, exact=e)) == "test.pem"  # type: ignore[misc]
    for der in (b"", bytes(certs.MAX_CERTIFICATE + 1), aws.root.public_bytes(Encoding.DER) + b"\0"):
        assert refused(lambda d=der: certs.load_der(Trail("test"), "der", d)) == "test.der"  # type: ignore[misc]


def test_a_name_that_cannot_be_read_is_refused_like_any_other(aws: pki.Aws) -> None:
    """cryptography raises TypeError for such a name, and only once it is looked at."""
    for which in (aws.leaf, aws.middle):
        der = which.public_bytes(Encoding.DER)
        at = der.rindex(b"\x0c", 0, der.index(b"\x30\x76"))  # before the public key
        odd = certs.load_der(Trail("test"), "der", put(der, at, b"\x03"))
        assert "cannot be read" in certs.subject_of(odd)
        chain = [odd, aws.middle, aws.root] if which is aws.leaf else [aws.leaf, odd, aws.root]
        work = functools.partial(certs.verify_chain, Trail("test"), "chain", chain, aws.roots, pki.NOW)
        assert refused(work) == "test.chain.issuer"


def test_revocation_lists_of_another_form(intel: pki.Intel) -> None:
    key = pki.ec_key("pck ca")
    point = pki.x509.IssuingDistributionPoint(None, None, True, False, None, False, False)
    for raw in (
        b"",
        bytes(certs.MAX_CRL + 1),
        pki.revocations(intel.authority, key, extension=point),  # of some certificates only
        pki.revocations(intel.authority, key, algorithm=pki.hashes.SHA224()),
    ):
        assert (
            refused(lambda r=raw: certs.verify_crl(Trail("test"), "crl", r, intel.authority, pki.NOW))
            == "test.crl"
        )  # type: ignore[misc]
    by_leaf = pki.revocations(intel.signer, pki.ec_key("tcb"))
    assert (
        refused(lambda: certs.verify_crl(Trail("test"), "crl", by_leaf, intel.signer, pki.NOW)) == "test.crl"
    )


@pytest.mark.parametrize(
    "raw",
    [
        b"\x30",
        b"\x30\x01",
        b"\x30\x80\0\0",  # indefinite
        b"\x30\x81\x01\0",  # not the shortest length
        b"\x30\x82\0\x80" + bytes(128),
        b"\x30\x84\0\0\0\1\0",
        b"\x31\0",
        b"\x30\x03\x02\x01",
        b"\x30\x02\x02\0",  # an empty number
        b"\x30\x03\x02\x01\xff",  # a negative one
        b"\x30\x04\x02\x02\0\x01",  # a padded one
    ],
)
def test_der_is_read_strictly(raw: bytes) -> None:
    def read() -> None:
        inner = certs.Der(raw, Trail("test"), "der").enter("a sequence", certs.SEQUENCE)
        inner.whole("a number")
        inner.end("the sequence")

    assert refused(read) == "test.der"


def test_tpm_structures_of_another_form() -> None:
    own, other = pki.Tpm(), pki.Tpm(kind="rsa")
    ecc, rsa = own.public(), other.public()
    for raw, step in (
        (b"", "ak"),
        (bytes(tpm.MAX_PUBLIC + 1), "ak"),
        (put(ecc, 2, b"\0\4"), "ak.hash"),  # a name by SHA-1
        (put(ecc, 14, b"\0\4"), "ak.hash"),  # signatures by SHA-1
        (put(ecc, 10, b"\0\6"), "ak"),  # a storage key
        (put(ecc, 16, b"\0\x10"), "ak"),  # another curve
        (put(ecc, 18, b"\0\7"), "ak"),
        (put(ecc, -1, bytes((ecc[-1] ^ 1,))), "ak"),  # off the curve
        (put(ecc, 0, b"\0\x08"), "ak"),
        (ecc + b"\0", "ak"),
        (put(rsa, 16, b"\x10\0"), "ak"),  # says 4096 bits
        (put(rsa, 18, b"\0\0\0\2"), "ak"),  # an even exponent
    ):
        assert refused(lambda r=raw: tpm.parse_public(r, Trail("tpm"))) == f"tpm.{step}", raw.hex()  # type: ignore[misc]
    quote, signature = own.quote(NONCE)
    at = quote.index(b"\0\0\0\1\0\x0b\3")  # the selection
    twice = quote[: at + 3] + b"\2" + quote[at + 4 : at + 10] * 2 + quote[at + 10 :]
    for raw, step in (
        (bytes(tpm.MAX_QUOTE + 1), "length"),
        (put(quote, at, b"\0\0\0\0"), "selection"),
        (put(quote, at, b"\0\0\0\4"), "selection"),
        (put(quote, at + 7, bytes(3)), "selection"),
        (put(quote, at + 6, b"\4"), "selection"),  # takes a byte of the digest's length: PCR 24 and beyond
        (twice, "selection"),
        (put(quote, 5, b"\x17"), "type"),
        (quote + b"\0", "format"),
    ):
        assert refused(lambda r=raw: tpm.parse_attest(r, Trail("tpm"))) in (f"tpm.{step}", "tpm.format"), step  # type: ignore[misc]
    for raw in (b"", bytes(tpm.MAX_SIGNATURE + 1), put(signature, 0, b"\0\x17"), signature + b"\0"):
        assert refused(lambda r=raw: tpm.parse_signature(r, Trail("tpm"))) == "tpm.signature"  # type: ignore[misc]
    for key in (pki.rsa.generate_private_key(65537, 1024), pki.ec.generate_private_key(pki.ec.SECP521R1())):
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        assert refused(lambda p=pem: tpm.load_key(p, Trail("tpm"))) == "tpm.ak.strength"  # type: ignore[misc]
    assert refused(lambda: tpm.load_key(b"no key", Trail("tpm"))) == "tpm.ak"


def test_event_logs_of_another_form() -> None:
    good = pki.event_log([(4, 13, bytes(32))])
    spec = 32  # where the specification begins
    for raw in (
        bytes(tpm.MAX_LOG + 1),
        put(good, 4, b"\4"),  # its first event is of another type
        put(good, spec, b"s"),
        put(good, spec + 24, bytes(4)),  # no algorithm
        put(good, spec + 24, b"\x09"),
        put(good, spec + 30, b"\x14"),  # SHA-256 of 20 bytes
        put(good, spec + 32, b"\1"),  # vendor data that is not there
        put(good, spec + 33 + 8, b"\2"),  # two digests
        put(good, spec + 33 + 12, b"\x0c"),  # of another bank
        put(good, len(good) - 8, b"\xff" * 4),  # an event without end
        good[:-1],
    ):
        assert refused(lambda r=raw: tpm.parse_log(r, Trail("tpm"))) == "tpm.log"  # type: ignore[misc]
    events = tpm.parse_log(good, Trail("tpm")).events
    assert refused(lambda: tpm.replay(events, "sha384", Trail("tpm"))) == "tpm.log"


def test_hcl_reports_of_another_form() -> None:
    own = pki.Tpm(kind="rsa")
    good = pki.hcl(bytes(1184), 2, own)
    assert tpm.parse_hcl(good, Trail("tpm")).digest == pki.hcl_digest(own)
    for raw in (
        put(good, 0, b"X"),
        put(good, 4, b"\3"),
        put(good, 12, b"\1"),
        put(good, 20, b"\1"),
        put(good, 8, b"\0"),
        put(good, 1216 + 8, b"\3"),  # neither SNP nor TDX
        put(good, 1216 + 12, b"\2"),  # another hash
        put(good, -1, b"\1"),
        bytes(tpm.MAX_HCL + 1),
        good.replace(b'"00000000', b'"0000000x'),
    ):
        assert refused(lambda r=raw: tpm.parse_hcl(r, Trail("tpm"))) == "tpm.hcl"  # type: ignore[misc]
    for old, new in ((b"HCLAkPub", b"HCLEkPub"), (b'"RSA"', b'"oct"'), (b'"sign"', b'"wrap"')):
        changed = good.replace(old, new)
        assert refused(lambda c=changed: tpm.parse_hcl(c, Trail("tpm"))) == "tpm.hcl.key"  # type: ignore[misc]


def test_a_certificate_of_the_key_is_one(aws: pki.Aws) -> None:
    own = pki.Tpm()
    certificate, root = own.certified()
    both = pki.pem(certificate, root)
    key = tpm.parse_public(own.public(), Trail("tpm"))
    assert refused(lambda: tpm.verify_key(key, both, b"", pki.NOW, Trail("tpm"))) == "tpm.ak_chain"


# --- what only an authority can do wrong --------------------------------------------------------------------


def test_chips_that_amd_would_not_certify(amd: pki.Amd) -> None:
    """Certified all the same, each in one wrong way."""
    twice = pki.x509.Name([*pki.named("SEV-VCEK"), *pki.named("SEV-VLEK")])
    report = amd.report()

    def doubled(fields: list[bytes]) -> list[bytes]:
        listed = pki.items(pki.contents(pki.contents(fields[-1])))
        return [*fields[:-1], pki.tlv(0xA3, pki.tlv(0x30, *listed, listed[-1]))]

    def older(fields: list[bytes]) -> list[bytes]:
        return [pki.tlv(0xA0, pki.number(1)), *fields[1:]]

    def unknown_curve(fields: list[bytes]) -> list[bytes]:
        curve = pki.oid("1.3.132.0.34")
        return [each.replace(curve, curve[:-1] + b"\x7f") for each in fields]

    for changes, step in (
        ({"subject": twice}, "vek"),
        ({"scheme": pki.padding.PKCS1v15()}, "chain.vek"),
        ({"alter": doubled}, "vek"),
        ({"alter": older}, "vek"),
        ({"alter": unknown_curve}, "vek"),
    ):
        assert refused(lambda c=changes: own_snp(amd, report=report, vek=amd.vek(**c))) == f"snp.{step}"  # type: ignore[misc]


def test_a_turin_has_a_short_name_and_zeros_after_it() -> None:
    turin = pki.Amd.make("Turin")
    tcb = pki.TCB | {"fmc": 3}
    usual: dict[str, Any] = {"cpuid": (0x1A, 2, 0), "reported": tcb, "committed": tcb, "launch": tcb}
    facts = own_snp(turin, report=turin.report(**usual), vek=turin.vek(tcb))
    assert facts.product == "turin" and facts.tcb()["fmc"] == 3
    more = turin.report(**usual, at={0x1A0 + 8: 1})
    assert refused(lambda: own_snp(turin, report=more, vek=turin.vek(tcb))) == "snp.chip"


def test_platforms_that_intel_would_not_certify(intel: pki.Intel) -> None:
    for change in (
        lambda fields: [item for item in fields.items() if item[0] != "2"],  # no TCB
        lambda fields: [*fields.items(), ("3", fields["3"])],  # a field twice
        lambda fields: list((fields | {"3": pki.tlv(4, bytes(3))}).items()),  # a field too long
    ):
        other = pki.Intel.make(change)
        assert refused(lambda o=other: own_tdx(o, roots=o.roots)) == "tdx.pck"  # type: ignore[misc]
    odd = pki.altered(intel.pck, pki.ec_key("pck ca"), pki.of_no_known_curve)
    chain = [certs.load_der(Trail("test"), "der", odd), intel.authority, intel.root]
    assert refused(lambda: own_tdx(intel, raw=intel.quote(pki.pem(*chain)))) == "tdx.pck"
    assert (
        refused(lambda: tdx.peek_fmspc(tdx.parse(intel.quote(b""), Trail("tdx")), Trail("tdx")))
        == "tdx.chain"
    )


def test_collateral_that_intel_would_not_sign(intel: pki.Intel) -> None:
    good = json.loads(intel.collateral())
    other = pki.certificate(
        "Intel SGX TCB Signing", pki.ec_key("tcb", "p384"), intel.root, pki.ec_key("intel root"), ca=False
    )
    for changes, step in (
        (
            {"tcb_info": "[]", "tcb_info_signature": pki.raw_signature(pki.ec_key("tcb"), b"[]", 32).hex()},
            "tcb_info",
        ),
        ({"tcb_info_issuer_chain": pki.pem(other, intel.root).decode()}, "tcb_info.signature"),
    ):
        raw = json.dumps(good | changes).encode()
        assert refused(lambda r=raw: own_tdx(intel, collateral=r)) == f"tdx.{step}"  # type: ignore[misc]
    large = b" " * (tdx.MAX_COLLATERAL + 1)
    assert refused(lambda: tdx.read_collateral(large, Trail("tdx"))) == "tdx.collateral"
    three = good | {"pck_crl_issuer_chain": pki.pem(intel.pck, intel.authority, intel.root).decode()}
    work = functools.partial(tdx.verify_collateral, json.dumps(three).encode(), pki.NOW, roots=intel.roots)
    assert refused(work) == "tdx.crl.chain"
    # A list must say when the next one comes.
    listed = pki.x509.load_der_x509_crl(bytes.fromhex(good["pck_crl"]))
    endless = pki.altered(listed, pki.ec_key("pck ca"), lambda fields: [*fields[:4], *fields[5:]])
    assert pki.x509.load_der_x509_crl(endless).next_update_utc is None
    work = functools.partial(certs.verify_crl, Trail("test"), "crl", endless, intel.authority, pki.NOW)
    assert refused(work) == "test.crl"


def test_a_signature_says_that_all_its_bits_count(intel: pki.Intel) -> None:
    """cryptography takes a certificate whose signature's last bit, a zero, is said to be unused."""
    while (raw := pki.altered(intel.pck, pki.ec_key("pck ca"), list))[-1] & 1:
        pass
    for unused, step in ((0, None), (1, "tdx.chain")):
        *fields, signature = pki.items(pki.contents(raw))
        other = pki.tlv(0x30, *fields, pki.tlv(3, bytes((unused,)), pki.contents(signature)[1:]))
        chain = [certs.load_der(Trail("test"), "der", other), intel.authority, intel.root]
        quote = intel.quote(pki.pem(*chain))
        assert step is None or refused(lambda q=quote: own_tdx(intel, raw=q)) == step  # type: ignore[misc]
        assert step is not None or own_tdx(intel, raw=quote).status == "UpToDate"


def test_dates_that_python_has_not(amd: pki.Amd, intel: pki.Intel) -> None:
    """cryptography reads the year 0, and only whoever looks at it meets a ValueError. The chain of a chip is
    the peer's, and its root not yet compared."""
    raw = pki.altered(amd.ark, pki.rsa_key("ark"), pki.of_the_year_0)
    root = certs.load_der(Trail("test"), "der", raw)
    assert refused(lambda: own_snp(amd, chain=pki.pem(amd.ask, root))) == "snp.chain.dates"
    raw = pki.altered(intel.pck, pki.ec_key("pck ca"), pki.of_the_year_0)
    chain = [certs.load_der(Trail("test"), "der", raw), intel.authority, intel.root]
    assert refused(lambda: own_tdx(intel, raw=intel.quote(pki.pem(*chain)))) == "tdx.chain.dates"
    listed = pki.x509.load_der_x509_crl(pki.revocations(intel.authority, pki.ec_key("pck ca")))
    for at, text in ((3, b"00000101000000Z"), (4, b"00000101000000Z"), (4, b"99991231235959Z")):
        raw = pki.altered(
            listed,
            pki.ec_key("pck ca"),
            lambda fields, at=at, text=text: [*fields[:at], pki.tlv(0x18, text), *fields[at + 1 :]],  # type: ignore[misc]
        )
        work = functools.partial(
            certs.verify_crl, Trail("test"), "crl", raw, intel.authority, pki.NOW, pki.DAY
        )
        assert refused(work) == "test.crl"


def test_extensions_and_keys_that_cannot_be_read(aws: pki.Aws) -> None:
    garbage = pki.x509.UnrecognizedExtension(pki.x509.KeyUsage.oid, b"\x05\x00")
    leaf = pki.certificate(
        "enclave",
        pki.ec_key("aws leaf", "p384"),
        aws.middle,
        pki.ec_key("aws zone", "p384"),
        ca=False,
        extensions=[(garbage, False)],
    )
    chain = [leaf, aws.middle, aws.root]
    work = functools.partial(certs.verify_chain, Trail("test"), "chain", chain, aws.roots, pki.NOW)
    assert refused(work) == "test.chain.role"
    certificate, _ = pki.Tpm().certified()
    odd = pki.altered(certificate, pki.ec_key("tpm root"), pki.of_no_known_curve)
    assert refused(lambda: tpm.certified_key(odd, Trail("tpm"))) == "tpm.ak_chain"
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = edwards.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert refused(lambda: tpm.load_key(pem, Trail("tpm"))) == "tpm.ak.strength"
    log = put(pki.event_log([]), 32 + 28, b"\x99\0\0\0")  # an algorithm of no bytes
    assert refused(lambda: tpm.parse_log(log, Trail("tpm"))) == "tpm.log"
    large = bytes(evidence.MAX_CLAIMS + 1)
    assert refused(lambda: evidence.Claims.decode(large, Trail("test"))) == "test.format"


def test_the_collector_refuses_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come by while a library is at work, and warn of what others left open; of the library's own
    warnings each refuses."""

    def guarded(kind: type[Warning]) -> None:
        monkeypatch.setattr(json, "loads", lambda raw, **how: warnings.warn("said", kind, stacklevel=1))
        read_json(Trail("a"), "step", "{}", "it")

    with pytest.warns(ResourceWarning):
        guarded(ResourceWarning)
    for kind in (UserWarning, DeprecationWarning):
        with pytest.raises(AttestationError, match=r"a\.step"):
            guarded(kind)


def test_two_threads_may_verify_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to do with warnings is the process's: one verification must not take the other's strictness away,
    nor leave its own behind."""
    inside, leave = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        leave.wait(0.2)  # runs out where the other has to wait for its turn

    def other() -> None:
        Trail("a").guard("step", "it", slow)

    def warned(raw: str, **how: Any) -> None:
        leave.set()
        thread.join()
        warnings.warn("a bad certificate", UserWarning, stacklevel=1)

    monkeypatch.setattr(json, "loads", warned)
    thread = threading.Thread(target=other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        thread.start()
        assert inside.wait(60)
        with pytest.raises(AttestationError, match=r"b\.step"):
            read_json(Trail("b"), "step", "{}", "it")
        assert list(warnings.filters) == before
