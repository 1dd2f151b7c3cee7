"""Who the three parties are, as a client or a model owner knows them: a small strict TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mimir.admission.revocation import Revocations, context_of
from mimir.admission.tls import ClientTls
from mimir.attest.rules import flag_rule
from mimir.config import (
    PARTIES,
    Address,
    Tls,
    integer_rule,
    key_rule,
    keys_rule,
    path_rule,
    read_table,
    read_toml,
    seconds_rule,
    text_rule,
)
from mimir.errors import ConfigError
from mimir.net.identity import Identity


@dataclass(frozen=True)
class Party:
    """[[parties]] One party: what it is called, where it listens for clients, and the key it must prove."""

    name: Annotated[str, text_rule(64)]
    host: Annotated[str, text_rule(253)]
    port: Annotated[int, integer_rule(1, 65535)]
    identity: Annotated[str, key_rule]

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)


@dataclass(frozen=True)
class Deadlines:
    """[deadlines] Longest waits in seconds."""

    connect: Annotated[float, seconds_rule(0.05, 600)] = 10.0  # to reach a party and know it
    silence: Annotated[float, seconds_rule(0.1, 86400)] = 300.0  # of a party that owes an answer


@dataclass(frozen=True)
class Attestation:
    """[attestation] By which evidence the parties are believed; left out, by their identity keys alone."""

    policy: Annotated[Path | None, path_rule] = None  # signatures stand beside it, in the same name with .sig
    owners: Annotated[tuple[str, ...], keys_rule] = ()  # who may sign it
    threshold: Annotated[int, integer_rule(1, 64)] = 1  # how many of them must have
    collateral: Annotated[Path | None, path_rule] = None  # directory of `mimir policy fetch`
    required: Annotated[bool, flag_rule] = True  # false: say what does not hold, and go on

    def flaw(self) -> str | None:
        """What no single key can tell, or None."""
        if self.policy is None:
            return (
                None if self == Attestation() else "policy: missing; the other keys mean nothing without it"
            )
        if not self.owners:
            return "owners: missing; name the keys that may sign the policy"
        if self.threshold > len(self.owners):
            return f"threshold: {self.threshold}, but there are {len(self.owners)} owners"
        return None


@dataclass(frozen=True)
class Revocation:
    """[revocation] Who says what is revoked, and where we keep it. Without owners nothing is looked at."""

    owners: Annotated[tuple[str, ...], keys_rule] = ()
    threshold: Annotated[int, integer_rule(1, 64)] = 1
    file: Annotated[Path | None, path_rule] = None  # beside client_key if left out


@dataclass(frozen=True)
class Federation:
    """Everything a client is told."""

    source: Annotated[Path, None]
    client_key: Annotated[Path, path_rule]  # file of `mimir keygen`
    parties: tuple[Party, ...]  # in party order
    model: Annotated[str | None, text_rule(64)] = None  # name or digest; may be left out if there is only one
    tokenizer: Annotated[Path | None, path_rule] = None  # model directory, for its tokenizer alone
    attestation: Attestation = field(default_factory=Attestation)
    deadlines: Deadlines = field(default_factory=Deadlines)
    tls: Tls = field(default_factory=Tls)  # as at the parties
    revocation: Revocation = field(default_factory=Revocation)

    def revocations(self) -> Revocations | None:
        """What this client knows to be revoked; None where its file names no owners."""
        wanted = self.revocation
        if not wanted.owners:
            return None
        file = wanted.file or self.client_key.with_name(self.client_key.name + ".revocations")
        return Revocations(file, context_of(self.identities), wanted.owners, wanted.threshold)

    def client_tls(self, identity: Identity, revocations: Revocations | None) -> ClientTls | None:
        """Our end of TLS; None where it is off."""
        return ClientTls(identity, self.identities, revocations) if self.tls.enabled else None

    @property
    def identities(self) -> tuple[str, ...]:
        """The parties' public keys, in party order."""
        return tuple(party.identity for party in self.parties)


def load(path: str | Path) -> Federation:
    """Read a federation file; `ConfigError` names file and key."""
    source = Path(path).absolute()
    data = read_toml(path)
    federation = read_table(Federation, data, source, given={"source": source})
    if len(federation.parties) != PARTIES:
        raise ConfigError(
            f"{source}: parties: {PARTIES} are needed, in party order; here are {len(federation.parties)}"
        )
    if federation.revocation.threshold > max(1, len(federation.revocation.owners)):
        raise ConfigError(f"{source}: revocation.threshold: more than there are owners")
    for name in ("identity", "name"):
        if len({getattr(party, name) for party in federation.parties}) != PARTIES:
            raise ConfigError(f"{source}: parties[].{name}: two parties have the same")
    flaw = federation.attestation.flaw()
    if flaw is None and "attestation" in data and federation.attestation.policy is None:
        flaw = "policy: missing; leave the whole table out to believe the parties by key alone"
    if flaw is not None:
        raise ConfigError(f"{source}: attestation.{flaw}")
    return federation
