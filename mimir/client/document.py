"""The verification document for people: what `mimir verify` prints, at most WIDTH columns wide.

It is drawn from the plain document alone, so a saved one looks as it did when it was made.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from mimir.attest.trail import shown
from mimir.client.attestation import SIMULATED_NOTE
from mimir.client.terminal import WIDTH, Terminal

LABEL = 13  # columns of a label and what stands before it
NAME = 24  # of a step's name
GOOD, BAD, LOUD, PLAIN = "good", "bad", "loud", ""


def show(terminal: Terminal, plain: Mapping[str, Any], *, offline: bool = False) -> None:
    """Print a whole document."""
    page = _Page(terminal)
    how = "a saved document, checked again as of" if offline else "at"
    page.line(f"verification {how} {plain['time']}")
    _policy(page, plain["policy"])
    if plain["simulated"]:
        page.line(SIMULATED_NOTE, LOUD)
    for party in plain["parties"]:
        page.line("")
        _party(page, party)
    page.line("")
    page.line("crosswise")
    for row in plain["checks"]:
        who = row["party"] + (f" of {row['about']}" if row["about"] else "")
        page.step(row["name"], row["expected"], row["got"], row["holds"], who)
    for note in plain["notes"]:
        page.field("note", note)
    page.line("")
    page.line(verdict_line(plain), GOOD if plain["verdict"] == "verified" else BAD)


def verdict_line(plain: Mapping[str, Any]) -> str:
    """The whole in one line."""
    loud = f"  ({SIMULATED_NOTE})" if plain["simulated"] else ""
    failed = plain["failed"]
    if failed is None:
        policy = plain["policy"]
        return f"VERIFIED: three parties by policy {policy['name']} version {policy['version']}{loud}"
    who = f"party {failed['party']}: " if failed["party"] else ""
    return f"REFUSED at {who}{failed['step']}: expected {failed['expected']}; got {failed['got']}{loud}"


def admission_lines(admission: Any) -> list[str]:
    """What a party's status says of its peers' admission (`messages.ADMISSION`); nothing in it is trusted."""
    if not isinstance(admission, dict):
        return [f"admission: {shown(admission)}"]
    policy, kind = admission.get("policy"), admission.get("kind")
    if admission.get("mode") != "required":
        return ["attestation: off; its peers are believed by their keys alone"]
    named = (
        f", policy {policy.get('name')} version {policy.get('version')}" if isinstance(policy, dict) else ""
    )
    loud = f"  {SIMULATED_NOTE}" if admission.get("simulated") else ""
    epoch = admission.get("revocation_epoch")
    lines = [f"attestation: required, {kind} evidence{named}, revocation epoch {epoch}{loud}"]
    peers = admission.get("peers")
    for entry in peers if isinstance(peers, list) else ():
        if isinstance(entry, dict):
            lines.append(f"  party {entry.get('party')}: {_standing(entry)}{_since(entry)}{_loud(entry)}")
    return [shown(line) for line in lines]


def _standing(entry: Mapping[str, Any]) -> str:
    """How a peer stands with somebody: admitted until when, or refused at which step."""
    state, refusal = entry.get("state"), entry.get("refusal")
    if state == "admitted":
        return f'admitted by entry "{entry.get("entry")}" until {entry.get("valid_until")}'
    if not isinstance(refusal, dict):
        return str(state)
    whose = " by that party itself" if refusal.get("by") == "peer" else ""
    before = "" if state == "refused" else f"{state}; "
    return (
        f"{before}refused{whose} at {refusal.get('step')}: expected {refusal.get('expected')}; "
        f"got {refusal.get('got')}"
    )


def _loud(entry: Mapping[str, Any]) -> str:
    return f"  {SIMULATED_NOTE}" if entry.get("state") == "admitted" and entry.get("simulated") else ""


def _since(entry: Mapping[str, Any]) -> str:
    seconds, attempts = entry.get("seconds"), entry.get("attempts")
    for_ = f", for {seconds:.0f} s" if isinstance(seconds, int | float) else ""
    plural = "" if attempts == 1 else "s"
    return f"{for_}, {attempts} attempt{plural}" if entry.get("state") != "admitted" else for_


# --- parts -------------------------------------------------------------------------------------------------


class _Page:
    """Lines no wider than WIDTH."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def line(self, text: str, style: str = PLAIN) -> None:
        for each in textwrap.wrap(text, WIDTH, break_on_hyphens=False) or [""]:
            self._terminal.text(each, style)
            self._terminal.text("\n")

    def field(self, label: str, *values: str, style: str = PLAIN) -> None:
        """A label, and beside it one value or several below each other."""
        head = f"  {label}"
        for value in values:
            for each in textwrap.wrap(value, WIDTH - LABEL, break_on_hyphens=False) or [""]:
                self._terminal.text(head.ljust(LABEL))
                self._terminal.text(each, style)
                self._terminal.text("\n")
                head = ""

    def step(self, name: str, expected: str, got: str, holds: bool, who: str = "") -> None:
        """A check, with both values unless they are the same; in one line where that holds it."""
        room, before = WIDTH - NAME - 6, f"{who}: " if who else ""
        if expected == f"one of {got}":
            expected = got
        short = f"{before}{got}" if expected == got else f"{before}{got}  (want {expected})"
        if len(short) <= room:
            values = [short]
        elif expected == got:
            values = [got]
        else:
            values = [f"want {expected}", f"got  {got}"]
        lines = [who] if who and values != [short] else []
        for value in values:
            lines += textwrap.wrap(value, room, subsequent_indent="     ", break_on_hyphens=False) or [""]
        for index, line in enumerate(lines):
            if index == 0:
                self._terminal.text("  ok  " if holds else "  NO  ", GOOD if holds else BAD)
                self._terminal.text(f"{name:<{NAME - 1}} {line}\n")
            else:
                self._terminal.text(" " * (NAME + 6) + line + "\n")


def _policy(page: _Page, policy: Mapping[str, Any]) -> None:
    signed, owners = len(policy["signed_by"]), len(policy["owners"])
    page.field(
        "policy",
        f"{policy['name']} version {policy['version']}, {policy['environment']}, until {policy['not_after']}",
        f"digest {policy['digest']}",
        f"signed by {signed} of {owners} owners, {policy['threshold']} needed",
    )
    for each in policy["steps"]:
        page.step(each["name"], each["expected"], each["got"], True)
    _failure(page, policy["failed"])


def _party(page: _Page, party: Mapping[str, Any]) -> None:
    good = party["verdict"] == "accepted"
    outcome = f'accepted by entry "{party["entry"]}"' if good else "REFUSED"
    page.line(
        f"{party['name']} (party {party['party']}, {party['address']}): {outcome}", GOOD if good else BAD
    )
    page.field("identity", party["identity"])
    page.field("kind", party["kind"] or "no evidence")
    if party["simulated"]:
        page.field("", SIMULATED_NOTE, style=LOUD)
    if party["tcb"]:
        page.field("firmware", party["tcb"])
    for advisory in party["advisories"]:
        page.field("advisory", advisory)
    for caution in party["cautions"]:
        page.field("caution", caution, style=LOUD)
    if party["anchor"]:
        page.field("anchor", party["anchor"]["name"], f"sha256 {party['anchor']['sha256']}")
    if party["evidence"]:
        evidence, collateral = party["evidence"], party["collateral"]
        fetched = (
            f"fetched {collateral['fetched']}, {collateral['age_s']} s ago" if collateral else "none needed"
        )
        page.field("collateral", fetched)
        page.field(
            "evidence",
            f"sha256 {evidence['sha256']}",
            f"made since we asked, {evidence['age_s']:.3f} s ago; good for {evidence['life_s']} s, until "
            f"{evidence['valid_until']}",
        )
    if party["tunnel_key"]:
        page.field("tunnel key", party["tunnel_key"])
        page.field("config", party["config"])
    for each in party["rotations"]:
        age = "" if each["age_s"] is None else f", {each['age_s']:.0f} s old"
        page.field("rotation", f"with {each['peer']}: epoch {each['epoch']}{age}")
    for each in party["certificates"]:
        page.field("certified", f"by {each['issuer']}", "until " + each["not_after"].replace("+00:00", "Z"))
    for each in party["said_by_peers"]:
        page.field("peers say", f"{each['peer']}: {shown(_standing(each) + _loud(each))}")
    for each in party["steps"]:
        page.step(each["name"], each["expected"], each["got"], True)
    _failure(page, party["failed"])


def _failure(page: _Page, failed: Mapping[str, str] | None) -> None:
    if failed is not None:
        page.step(failed["step"], failed["expected"], failed["got"], False)
