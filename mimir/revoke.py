"""What `mimir revoke` does: extend, sign and pass on what is revoked; and `mimir certificate`."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio

from mimir.admission import revocation
from mimir.admission.certificates import TlsKey, anchor, issue_own, pem, server_name
from mimir.admission.revocation import Statement, context_of
from mimir.attest.signatures import Signature
from mimir.attest.trail import stamp
from mimir.client import federation as federation_file
from mimir.client.connection import connect, plain_errors
from mimir.client.federation import Federation, Party
from mimir.client.terminal import Terminal
from mimir.errors import AttestationError, BadInput, ClientError, MimirError
from mimir.net.identity import Identity, parse_public

NOT_TAKEN = AttestationError.exit_code


def run(options: argparse.Namespace) -> int:
    """Change, sign, show, push: what the options ask for, in this order."""
    terminal = Terminal(options.json)
    path = Path(options.statement)
    federation = federation_file.load(options.federation) if options.federation else None
    if options.fetch:
        _fetch(path, _needed(federation, "--fetch"), terminal)
    items = {
        "identities": [_identity(each, federation) for each in options.peer]
        + [parse_public(each).hex() for each in options.client],
        "certificates": [_hex(each, "certificate", 32) for each in options.certificate],
        "measurements": [_hex(each, "measurement", 32, 48, 64) for each in options.measurement],
        "tunnels": [_hex(each, "tunnel", 32) for each in options.tunnel],
    }
    statement, signatures = _held(path, federation)
    if federation is not None and statement.context != context_of(federation.identities):
        raise BadInput(f"{path}: is about other parties than {federation.source}")
    longer = statement.extended(datetime.now(UTC), **items)
    if longer.epoch == 0:
        raise BadInput(
            f"{path}: nothing to revoke: name --peer, --client, --certificate, --measurement or --tunnel"
        )
    kept = signatures if longer == statement else ()  # those over the shorter text hold no more
    if options.key:
        owner = Identity.load(options.key)
        own = Signature(owner.public_hex, owner.sign(longer.message()).hex())
        kept = (*(each for each in kept if each.key != own.key), own)
    if longer != statement or kept != signatures:
        revocation.save(path, longer, kept)
    _show(path, longer, kept, federation, terminal, pushed=options.push)
    if not options.push:
        return 0
    return trio.run(_push, longer, kept, _needed(federation, "--push"), terminal)


def _held(path: Path, federation: Federation | None) -> tuple[Statement, tuple[Signature, ...]]:
    """The statement in the file; of epoch 0 if there is no file yet."""
    if path.exists():
        return revocation.load(path)
    parties = _needed(federation, f"{path} does not exist yet: to begin one")
    return Statement(context_of(parties.identities), 0, datetime.fromtimestamp(0, UTC)), ()


def _needed(federation: Federation | None, what: str) -> Federation:
    if federation is None:
        raise BadInput(f"{what}: give --federation FILE, which says who the parties are")
    return federation


def _identity(text: str, federation: Federation | None) -> str:
    """A party's key, from itself or from its name in the federation file."""
    for party in federation.parties if federation is not None else ():
        if party.name == text:
            return party.identity
    try:
        return parse_public(text).hex()
    except BadInput:
        known = ", ".join(party.name for party in federation.parties) if federation is not None else ""
        more = f"the parties are {known}" if known else "names need --federation FILE"
        raise BadInput(f"--peer {text}: neither a party's name nor a public key; {more}") from None


def _hex(text: str, what: str, *sizes: int) -> str:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) not in sizes or len(text) != 2 * len(raw):
        digits = " or ".join(str(2 * size) for size in sizes)
        raise BadInput(f"--{what} {text[:20]}: {digits} hexadecimal digits are due")
    return raw.hex()


def _show(
    path: Path,
    statement: Statement,
    signatures: tuple[Signature, ...],
    federation: Federation | None,
    terminal: Terminal,
    *,
    pushed: bool,
) -> None:
    owners = federation.revocation.owners if federation is not None else ()
    threshold = federation.revocation.threshold if federation is not None and owners else 0
    signers = [each.key for each in signatures]
    counted = sum(key in owners for key in signers)
    terminal.event(
        "statement",
        file=str(path),
        statement=statement.public(),
        signatures=signers,
        threshold=threshold or None,
        enough=counted >= threshold if owners else None,
    )
    terminal.text(f"epoch {statement.epoch}, issued {stamp(statement.issued)}\n")
    terminal.text(f"digest {statement.digest().hex()}\n")
    for kind in revocation.KINDS:
        for value in sorted(getattr(statement, kind)):
            terminal.text(f"revoked  {kind[:-3] + 'y' if kind == 'identities' else kind[:-1]} {value}\n")
    for key in signers:
        terminal.text(f"signed   by {key}{'' if not owners or key in owners else ', who is no owner'}\n")
    if not owners:
        terminal.note(f"{len(signers)} signatures; the parties know how many are needed, and whose.")
    elif counted < threshold:
        terminal.note(
            f"{counted} of {threshold} signatures: {threshold - counted} owners still have to sign."
        )
    else:
        then = "" if pushed else " `mimir revoke --push` tells the parties."
        terminal.note(f"{counted} of {threshold} signatures: enough.{then}")


# --- with the parties --------------------------------------------------------------------------------------


async def _ask(
    party: Party, federation: Federation, identity: Identity, message: dict[str, Any]
) -> dict[str, Any] | MimirError:
    """One party's answer to one message, or why there is none."""
    wait = federation.deadlines.connect
    tls = federation.client_tls(identity, None)  # also a revoked party may be told
    try:
        with plain_errors():
            async with connect(
                party, identity, within=wait, silence=wait, tls=tls, unadmitted=True
            ) as connection:
                await connection.send(message)
                return await connection.receive("revoked")
    except MimirError as error:
        return error


async def _ask_all(federation: Federation, message: dict[str, Any]) -> list[dict[str, Any] | MimirError]:
    identity = Identity.load(federation.client_key)
    answers: list[dict[str, Any] | MimirError] = [ClientError("not asked")] * len(federation.parties)

    async def one(index: int, party: Party) -> None:
        answers[index] = await _ask(party, federation, identity, message)

    async with trio.open_nursery() as nursery:
        for index, party in enumerate(federation.parties):
            nursery.start_soon(one, index, party)
    return answers


async def _push(
    statement: Statement, signatures: tuple[Signature, ...], federation: Federation, terminal: Terminal
) -> int:
    """Tell every party. 0 if all hold it now, 10 if one refused it, 8 if one could not be told."""
    raw = revocation.encode(statement, signatures)
    answers = await _ask_all(federation, {"t": "revoke", "statement": raw})
    refused = silent = False
    for party, answer in zip(federation.parties, answers, strict=True):
        if isinstance(answer, BadInput):
            refused, text = True, str(answer)
        elif isinstance(answer, MimirError):
            silent, text = True, str(answer)
        elif answer["epoch"] != statement.epoch:
            refused, text = True, f"{party.name}: holds epoch {answer['epoch']}"
        else:
            text = ""
        terminal.event("pushed", party=party.name, epoch=statement.epoch, held=not text, error=text or None)
        terminal.text(f"{party.name}: {text or f'holds epoch {statement.epoch}'}\n")
    if refused:
        return NOT_TAKEN
    if silent:
        terminal.note("Whoever was reached tells the others; push again to be sure.")
        return ClientError.exit_code
    return 0


def _fetch(path: Path, federation: Federation, terminal: Terminal) -> None:
    """Put the newest statement that a party holds into the file, and keep what the file revokes besides.

    Where owners are named their signatures are checked; a party can show an old statement, never a false one.
    """
    newest: tuple[Statement, tuple[Signature, ...]] | None = None
    context = context_of(federation.identities)
    for party, answer in zip(
        federation.parties, trio.run(_ask_all, federation, {"t": "revocations"}), strict=True
    ):
        if isinstance(answer, MimirError):
            terminal.note(f"{party.name}: {answer}")
        elif answer["statement"]:
            found = revocation.decode(answer["statement"])
            if found[0].context != context:
                raise BadInput(f"{party.name}: holds revocations of other parties than {federation.source}")
            if federation.revocation.owners:
                revocation.check_signed(*found, federation.revocation.owners, federation.revocation.threshold)
            if newest is None or found[0].epoch > newest[0].epoch:
                newest = found
    if newest is None:
        raise ClientError("no party that was reached holds a statement")
    if not path.exists():
        revocation.save(path, *newest)
        return
    held, theirs = revocation.load(path)[0], newest[0]
    if held == theirs or (held.epoch > theirs.epoch and held.covers(theirs)):
        terminal.note(f"{path}: lacks nothing of what the parties hold, epoch {theirs.epoch}")
    elif theirs.epoch > held.epoch and theirs.covers(held):
        revocation.save(path, *newest)
    else:  # two statements that do not contain one another: one above both
        revocation.save(path, theirs.joined(held, datetime.now(UTC)), ())
        terminal.note(f"{path}: now lists what it did and what the parties hold, and is to be signed anew")


# --- a certificate in files --------------------------------------------------------------------------------


def certificate(options: argparse.Namespace) -> int:
    """Write what programs that speak TLS need to read a party's figures: key and certificate for an hour."""
    terminal = Terminal(options.json)
    federation = federation_file.load(options.federation)
    identity, now = Identity.load(options.key), datetime.now(UTC)
    key = TlsKey()
    der = issue_own(identity, "reader", key.public, now)
    folder = Path(options.out)
    authorities = b"".join(pem("CERTIFICATE", anchor(each)) for each in federation.identities)
    with key.in_file(der) as file, open(file, "rb") as made:
        whole = made.read()
    key.wipe()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, data in (("tls.pem", whole), ("parties.pem", authorities)):
            draft = folder / f"{name}.new"
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "wb") as out:
                out.write(data)
            os.replace(draft, folder / name)
    except OSError as error:
        raise BadInput(f"{folder}: {error.strerror}") from None
    names = {party.name: server_name(party.identity) for party in federation.parties}
    terminal.event("certificate", folder=str(folder), key=identity.public_hex, server_names=names)
    for name, value in names.items():
        terminal.text(f"{name} {value}\n")
    terminal.note(
        f"{folder}/tls.pem for an hour; the names above are those that each party's certificate has."
    )
    return 0
