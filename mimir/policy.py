"""What `mimir policy` does: write, sign and check a policy, fetch collateral, explain evidence to people."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mimir.attest import appraisal, collateral, evidence, policy, snp, tdx
from mimir.attest.trail import Step, Trail, shown, stamp
from mimir.client.terminal import Terminal
from mimir.errors import AttestationError, BadInput
from mimir.net.identity import Identity

NOT_WANTED = AttestationError.exit_code


def new(options: argparse.Namespace, terminal: Terminal) -> int:
    """Write a commented policy that admits nobody yet."""
    path = Path(options.file)
    end = (_now(options) + timedelta(days=options.days)).replace(microsecond=0)
    text = policy.TEMPLATE.format(
        name=options.name or path.stem, environment=options.environment, not_after=stamp(end)
    )
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        raise BadInput(f"policy {path}: exists already; move it away first if it may go") from None
    except OSError as error:
        raise BadInput(f"policy {path}: {error.strerror}") from None
    made = policy.load(path)
    terminal.event("policy", file=str(path), digest=made.digest().hex(), version=made.version)
    terminal.note(f"{path} admits nobody yet: add [[allow]] entries, then `mimir policy sign`.")
    return 0


def sign(options: argparse.Namespace, terminal: Terminal) -> int:
    """Add an owner's signature to the file beside the policy."""
    found, path = policy.load(options.file), _signatures_of(options.file)
    owner = Identity.load(options.key)
    own = policy.Signature(owner.public_hex, owner.sign(policy.signed_message(found)).hex())
    # Signatures over an earlier text of the policy go: they would make the whole fail.
    kept = [
        each for each in policy.load_signatures(path) if each.key != own.key and policy.signed_by(found, each)
    ]
    draft = path.with_suffix(path.suffix + ".new")
    try:
        draft.write_text(policy.format_signatures([*kept, own]))
        os.replace(draft, path)
    except OSError as error:
        raise BadInput(f"signatures {path}: {error.strerror}") from None
    terminal.event(
        "signed", file=str(path), digest=found.digest().hex(), key=own.key, signatures=len(kept) + 1
    )
    terminal.note(f"{path}: {len(kept) + 1} signatures over version {found.version}, {found.digest().hex()}")
    return 0


def check(options: argparse.Namespace, terminal: Terminal) -> int:
    """Say whether enough owners signed a policy that may still be used."""
    found = policy.load(options.file)
    trail = Trail("policy")
    found.check_time(_now(options), trail)
    policy.check_version(found, options.at_least)
    signatures = policy.load_signatures(_signatures_of(options.file))
    steps = policy.check_signatures(found, signatures, options.owners, options.threshold)
    terminal.event(
        "policy",
        file=str(options.file),
        name=found.name,
        version=found.version,
        environment=found.environment,
        digest=found.digest().hex(),
        not_after=stamp(found.not_after),
        entries=[{"id": each.id, "kind": each.kind} for each in found.allow],
        steps=[vars(each) for each in (*trail.steps, *steps)],
    )
    entries = ", ".join(f"{each.id} ({each.kind})" for each in found.allow) or "nobody"
    terminal.text(
        f"{found.name} version {found.version}, {found.environment}, until {stamp(found.not_after)}\n"
    )
    terminal.text(f"digest {found.digest().hex()}\nadmits {entries}\n")
    _print_steps(terminal, (*trail.steps, *steps))
    return 0


def explain(options: argparse.Namespace, terminal: Terminal) -> int:
    """Say what evidence is, step by step, and how every entry of a policy takes it."""
    found = policy.load(options.policy)
    store = collateral.Store(options.collateral).read() if options.collateral else collateral.Collateral()
    result = appraisal.examine(_read(options.evidence), found, store, _now(options))
    failures = {
        "verification": result.failed,
        "binding": result.bound,
        "policy": result.judged,
    }
    first = next((each for each in failures.values() if each is not None), None)
    terminal.event(
        "explained",
        verdict="would be accepted" if result.satisfied else "refused",
        kind=result.kind,
        simulated=result.simulated,
        steps=[vars(each) for each in result.steps],
        failures={name: vars_of(each) for name, each in failures.items() if each is not None},
        entries=[{"id": name, "failure": vars_of(each)} for name, each in result.entries],
        tcb=result.tcb,
        advisories=list(result.advisories),
        cautions=list(result.cautions),
        claims=_claims(result.claims),
    )
    terminal.text(
        f"kind     {result.kind}{'  SIMULATED: proves nothing of the machine' if result.simulated else ''}\n"
    )
    for name, value in _claims(result.claims).items():
        terminal.text(f"claim    {name}: {value}\n")
    _print_steps(terminal, result.steps)
    for caution in result.cautions:
        terminal.text(f"caution  {caution}\n")
    for name, error in failures.items():
        if error is not None:
            terminal.text(f"FAILED   {name}: {error}\n")
    for name, error in result.entries:
        terminal.text(f"entry    {name}: {'satisfied' if error is None else error}\n")
    if first is None:
        terminal.text(
            "would be accepted from a peer of whom these claims are expected, if the nonce is fresh\n"
        )
        return 0
    terminal.note(f"mimir: refused at {first.step}")
    return NOT_WANTED


def fetch(options: argparse.Namespace, terminal: Terminal) -> int:
    """Ask AMD and Intel for what verifiers need, and keep what verifies."""
    store, now, done = collateral.Store(options.collateral), _now(options), []
    if not options.amd and not options.intel and not options.evidence:
        raise BadInput("nothing to fetch: name --amd PRODUCT, --intel FMSPC, or --evidence FILE")
    for product in options.amd:
        collateral.refresh_amd(store, options.get, now, product)
        done.append(f"amd {product}")
    for fmspc in options.intel:
        collateral.refresh_intel(store, options.get, now, fmspc, options.authority)
        done.append(f"intel {fmspc}")
    if options.evidence:
        envelope = evidence.Envelope.decode(_read(options.evidence))
        trail = Trail(envelope.kind)
        if envelope.kind == "snp":
            report = snp.parse(envelope.evidence, trail)
            product = snp.product_of(report, trail)
            collateral.refresh_vek(store, options.get, now, report, product)
            done.append("the chip's certificate")
        elif envelope.kind == "tdx":
            fmspc = tdx.peek_fmspc(tdx.parse(envelope.evidence, trail), trail)
            collateral.refresh_intel(store, options.get, now, fmspc, options.authority)
            done.append(f"intel {fmspc}")
        else:
            raise BadInput(f"{options.evidence}: {envelope.kind} needs nothing that could be fetched")
    terminal.event("fetched", items=done)
    terminal.note("fetched and verified: " + ", ".join(done))
    return 0


def vars_of(error: AttestationError | None) -> dict[str, str] | None:
    """The three texts of a failure, for JSON."""
    return None if error is None else {"step": error.step, "expected": error.expected, "got": error.got}


def _claims(claims: evidence.Claims | None) -> dict[str, str]:
    return {} if claims is None else {name: shown(value) for name, value in vars(claims).items()}


def _print_steps(terminal: Terminal, steps: tuple[Step, ...]) -> None:
    for each in steps:
        terminal.text(f"ok       {each.name}: {each.got}\n")


def _signatures_of(path: str) -> Path:
    return Path(path + policy.SIGNATURE_SUFFIX)


def _now(options: argparse.Namespace) -> datetime:
    at: datetime | None = getattr(options, "at", None)
    return at if at is not None else datetime.now(UTC)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(evidence.MAX_ENVELOPE + 1)
    except OSError as error:
        raise BadInput(f"evidence {path}: {error.strerror}") from None
    if len(raw) > evidence.MAX_ENVELOPE:
        raise BadInput(f"evidence {path}: larger than {evidence.MAX_ENVELOPE} bytes")
    return raw
