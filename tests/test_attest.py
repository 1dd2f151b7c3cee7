"""Verifiers of evidence: real vectors at their stated times, mutations refused, no error but our own.

The vectors lie in `shared/vectors/attestation`; each MANIFEST.json says what is expected. Where we refuse
evidence that its manifest calls valid, the tables here say so and why.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_VARIABLE, find_shared
from cryptography.hazmat.primitives.serialization import Encoding

from mimir.attest import certs, nitro, snp, tdx, tpm
from mimir.attest.trail import Trail
from mimir.errors import AttestationError

pytestmark = pytest.mark.filterwarnings("error")

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
        assert refused(lambda: tdx_rule(facts).judge(facts, Trail("policy"))) == reason


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
    assert refused(lambda: tpm_rule(facts).judge(facts, Trail("policy"))) == reason
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
