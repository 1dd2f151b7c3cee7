"""From a machine's evidence to the policy entry that wants exactly this machine, for owners to read and to
sign.

The entry is as tight as the evidence allows. That the machine is the right one, and unharmed when it was
asked, is for the people to know who run this on it: an entry trusts what it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mimir.attest import nitro, snp, tdx, tpm
from mimir.attest.evidence import Envelope
from mimir.attest.trail import Trail
from mimir.attesters.measurement import CODE_PCR
from mimir.errors import BadInput

# Registers of a boot that stay equal as long as what is booted does: firmware, option ROMs, boot loader,
# Secure Boot, and, where they are in use, the kernel with its command line (8, 9 by GRUB; 11 by a unified
# kernel image).
BOOT_PCRS, USED_PCRS = (0, 2, 4, 7), (8, 9, 11)
TCB_EVAL_MIN = 19  # that of good collateral in the middle of 2026: to be raised by the owners


@dataclass(frozen=True)
class Enrolment:
    """What one machine shows. `values` are for people and scripts; `entry` is TOML for a policy."""

    kind: str
    simulated: bool
    ak_name: str  # of a TPM: how policies name its key; else empty
    values: Mapping[str, str]  # measurements by name, hex
    entry: str


def enrol(envelope: Envelope, name: str, *, configured: bool) -> Enrolment:
    """The entry for the machine that made this evidence. `configured`: PCR 16 was extended for the
    configuration that its party will run with, so that the entry may name it."""
    kind, trail = envelope.kind, Trail(envelope.kind)
    # JSON's texts are TOML's as well: nothing that a host put into its evidence can end one.
    head = [f"id = {json.dumps(name)}", f'kind = "{kind}"']
    ak_name = ""
    if kind in ("tpm", "swtpm"):
        ak_name, values, body = _tpm(envelope, trail, configured)
    elif kind == "snp":
        values, body = _snp(envelope, trail)
    elif kind == "tdx":
        values, body = _tdx(envelope, trail)
    elif kind == "nitro":
        values, body = _nitro(envelope, trail)
    else:
        raise BadInput(f"evidence of kind {kind}: entries for it are written by hand (configs/policy.toml)")
    text = "\n".join(["[[allow]]", *head, *body]) + "\n"
    return Enrolment(kind, envelope.simulated, ak_name, values, text)


def _tpm(envelope: Envelope, trail: Trail, configured: bool) -> tuple[str, dict[str, str], list[str]]:
    parts = envelope.parts()
    key = tpm.parse_public(parts["ak"], trail)
    pcrs = parts["pcrs"]["sha256"]
    used = [index for index in USED_PCRS if any(pcrs[index])]
    chosen = [*BOOT_PCRS, *used, *([CODE_PCR] if configured else [])]
    body = [
        f'ak_names = ["{key.name.hex()}"]',
        "pcrs = { " + ", ".join(f'"{index}" = ["{pcrs[index].hex()}"]' for index in chosen) + " }",
    ]
    if not configured:
        body.append("# PCR 16 (code and configuration) is left out: no configuration was given")
    values = {f"pcr{index}": value.hex() for index, value in sorted(pcrs.items())}
    return key.name.hex(), values, body


def _snp(envelope: Envelope, trail: Trail) -> tuple[dict[str, str], list[str]]:
    report = snp.parse(envelope.evidence, trail)
    raw = envelope.endorsements.get("vek")
    vek = snp.parse_vek(raw, trail) if raw else None
    if vek is None and report.signing_key == "vlek":
        raise BadInput("the host gave no VLEK certificate, which names the provider: write the entry by hand")
    product = vek.product if vek else snp.product_of(report, trail)
    versions = {
        name: min(each[at] for each in (report.reported_tcb, report.committed_tcb, report.launch_tcb))
        for name, at in snp.TCB_LAYOUT[product].items()
    }
    chip = f'["{report.chip_id.hex()}"]' if any(report.chip_id) else '"any"'
    body = [
        f'measurements = ["{report.measurement.hex()}"]',
        f'host_data = ["{report.host_data.hex()}"]',
        f"chip_ids = {chip}",
        f"vmpl_max = {report.vmpl}",
        f"guest_svn_min = {report.guest_svn}",
        f'signing_key = ["{report.signing_key}"]',
    ]
    if vek and vek.csp_id:
        body.append(f"csp_ids = [{json.dumps(vek.csp_id)}]")
    if report.signing_key == "vcek" and not any(report.chip_id):
        body.append("masked_chip = true")
    if not report.platform_info >> snp.ALIAS_CHECK & 1:
        body.append(
            "require_alias_check = false      # this firmware does not say that it looked (Battering RAM)"
        )
    body += ["[[allow.product]]", f'name = "{product}"', *(f"{n} = {v}" for n, v in versions.items())]
    values = {
        "measurement": report.measurement.hex(),
        "host_data": report.host_data.hex(),
        "chip_id": report.chip_id.hex(),
    }
    return values, body


def _tdx(envelope: Envelope, trail: Trail) -> tuple[dict[str, str], list[str]]:
    quote = tdx.parse(envelope.evidence, trail)
    values = {"mrtd": quote.mrtd.hex()}
    values |= {f"rtmr{index}": value.hex() for index, value in enumerate(quote.rtmr)}
    values["mrconfigid"] = quote.mrconfigid.hex()
    body = [f'{name} = ["{value}"]' for name, value in values.items()]
    body += ['ppids = "any"', f"tcb_eval_min = {TCB_EVAL_MIN}      # least tcbEvaluationDataNumber: raise it"]
    return values, body


def _nitro(envelope: Envelope, trail: Trail) -> tuple[dict[str, str], list[str]]:
    document = nitro.parse(envelope.evidence, trail)
    if document.debug:
        raise BadInput("this enclave runs in debug mode: no policy can admit it")
    shown = {index: value.hex() for index, value in document.pcrs.items() if any(value)}
    chosen = [index for index in (0, 1, 2, 8) if index in shown]
    body = ["pcrs = { " + ", ".join(f'"{index}" = ["{shown[index]}"]' for index in chosen) + " }"]
    return {f"pcr{index}": value for index, value in shown.items()}, body
