"""Who is admitted: a TOML file, signed by owners, that says in whole entries what evidence must look like.

- An empty policy admits nobody. Evidence must satisfy one entry wholly; fields of two are never mixed.
- The deny list wins over every entry. An expired policy admits nobody.
- Nothing switches debug on. Simulated evidence ("swtpm") can be named only by a policy whose environment is
  "simulation", which can name nothing else.
- The digest is over the meaning, not the text: comments and spacing do not change it, every value does. It is
  what owners sign, and what evidence is bound to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol

from mimir import config
from mimir.attest import azure, nitro, rules, snp, tdx, tpm
from mimir.attest.certs import Revocations
from mimir.attest.evidence import KINDS, SIMULATED
from mimir.attest.signatures import MAX_SIGNATURES, Signatures, require_owners, verifies
from mimir.attest.signatures import Signature as Signature
from mimir.attest.signatures import format_signatures as format_signatures
from mimir.attest.trail import Step, Trail
from mimir.errors import AttestationError, ConfigError

FORMAT = 1
MAX_ENTRIES = 256
RULES: Mapping[str, type] = {
    "snp": snp.Rule,
    "tdx": tdx.Rule,
    "nitro": nitro.Rule,
    "tpm": tpm.Rule,
    "swtpm": tpm.Rule,
    "az-snp-vtpm": azure.SnpRule,
    "az-tdx-vtpm": azure.TdxRule,
}
Rule = snp.Rule | tdx.Rule | nitro.Rule | tpm.Rule | azure.SnpRule | azure.TdxRule
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Facts(Protocol):
    """What every verifier's facts have."""

    @property
    def kind(self) -> str: ...
    @property
    def steps(self) -> tuple[Step, ...]: ...
    @property
    def binding(self) -> bytes: ...
    @property
    def lists(self) -> tuple[Revocations | None, ...]: ...
    @property
    def cautions(self) -> tuple[str, ...]: ...
    @property
    def advisories(self) -> tuple[str, ...]: ...
    @property
    def tcb_text(self) -> str: ...
    @property
    def made(self) -> datetime | None: ...
    @property
    def until(self) -> datetime | None: ...

    def names(self) -> frozenset[tuple[str, str]]: ...


# --- the file ----------------------------------------------------------------------------------------------


def _time_rule(value: Any, folder: Path) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("a time with its zone, such as 2027-01-31T00:00:00Z")
    return value.astimezone(UTC)


def _id_rule(value: Any, folder: Path) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValueError("1 to 64 letters, digits, '.', '_' and '-'")
    return value


_hours = config.integer_rule(0, 24 * 366)
_list32 = rules.maybe_empty_hexes_rule(32)


@dataclass(frozen=True)
class Crl:
    """[crl] Revocation lists and collateral of AMD and Intel."""

    required: Annotated[bool, rules.flag_rule] = True
    max_age_h: Annotated[int, _hours] = 24  # since the verifier fetched them
    offline_grace_h: Annotated[int, _hours] = 0  # how long past its end a list may still serve


@dataclass(frozen=True)
class Freshness:
    """[freshness] How old evidence may be, and how long a verdict lasts."""

    max_age_s: Annotated[int, config.integer_rule(1, 3600)] = 300  # of evidence that carries a time
    reattest_s: Annotated[int, config.integer_rule(60, 86400)] = 3600


@dataclass(frozen=True)
class Deny:
    """[deny] What is refused whatever an entry says, in hexadecimal."""

    measurements: Annotated[
        tuple[str, ...], rules.maybe_empty_hexes_rule(32, 48, 64)
    ] = ()  # PCRs and RTMRs too
    chip_ids: Annotated[tuple[str, ...], rules.maybe_empty_hexes_rule(16, 64)] = ()  # AMD chips, Intel PPIDs
    fmspcs: Annotated[tuple[str, ...], rules.maybe_empty_hexes_rule(6)] = ()
    vek_spki: Annotated[tuple[str, ...], _list32] = ()
    id_keys: Annotated[tuple[str, ...], rules.maybe_empty_hexes_rule(48)] = ()
    ak_names: Annotated[tuple[str, ...], rules.maybe_empty_hexes_rule(34, 50, 66)] = ()
    ak_spki: Annotated[tuple[str, ...], _list32] = ()
    identities: Annotated[tuple[str, ...], _list32] = ()  # hashes, as in the claims
    tunnels: Annotated[tuple[str, ...], _list32] = ()  # WireGuard public keys


@dataclass(frozen=True)
class Entry:
    """[[allow]] One thing that is wanted, whole."""

    id: str
    kind: str
    rule: Rule


@dataclass(frozen=True)
class Policy:
    """A policy as its file says it. `source` is the file."""

    source: Annotated[Path, None]
    format: Annotated[int, config.integer_rule(FORMAT, FORMAT)]
    name: Annotated[str, _id_rule]
    version: Annotated[int, config.integer_rule(1, 1 << 31)]  # rises with every change
    environment: Annotated[str, config.choice_rule("production", "simulation")]
    not_after: Annotated[datetime, _time_rule]
    crl: Crl = field(default_factory=Crl)
    freshness: Freshness = field(default_factory=Freshness)
    deny: Deny = field(default_factory=Deny)
    allow: Annotated[tuple[Entry, ...], None] = ()

    def canonical(self) -> bytes:
        """The one byte string that stands for this policy."""
        plain = asdict(self)
        del plain["source"]
        for entry, each in zip(plain["allow"], self.allow, strict=True):
            entry["rule"] = {"kind": each.kind} | entry["rule"]
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), default=datetime.isoformat).encode()

    def digest(self) -> bytes:
        """SHA-256 over the canonical form: what is signed, and what claims name."""
        return hashlib.sha256(b"mimir policy\0" + self.canonical()).digest()

    # --- judgement ---

    def judge(self, facts: Facts, now: datetime, fetched: datetime | None) -> tuple[Entry, tuple[Step, ...]]:
        """The entry that these facts satisfy wholly, and the steps; or `AttestationError`.

        `fetched` is when the oldest collateral that was used came from its authority.
        """
        trail = Trail("policy")
        self._check_frame(facts, now, fetched, trail)
        refusals: list[tuple[str, AttestationError]] = []
        entries = [each for each in self.allow if each.kind == facts.kind]
        for entry in entries:
            own = Trail("policy")
            try:
                entry.rule.judge(facts, own)  # type: ignore[arg-type]
            except AttestationError as error:
                refusals.append((entry.id, error))
                continue
            return entry, (*trail.steps, *own.steps)
        if len(refusals) == 1:
            raise refusals[0][1]
        kinds = sorted({each.kind for each in self.allow}) or ["nothing"]
        if not refusals:
            trail.refuse("entry", "an entry of kind " + " or ".join(kinds), facts.kind)
        trail.refuse(
            "entry",
            "one entry satisfied wholly",
            ", ".join(f"{name}: {error.step}" for name, error in refusals),
        )

    def check_deny(self, names: Collection[tuple[str, str]], trail: Trail) -> None:
        """Refuse what the deny list names."""
        found = sorted(f"{kind} {value}" for kind, value in names if value in getattr(self.deny, kind))
        trail.require(not found, "deny", "nothing that is denied", ", ".join(found) or "nothing")

    def check_time(self, now: datetime, trail: Trail) -> None:
        """Refuse to judge by an expired policy."""
        trail.within("dates", datetime(2020, 1, 1, tzinfo=UTC), now, self.not_after)

    def _check_frame(self, facts: Facts, now: datetime, fetched: datetime | None, trail: Trail) -> None:
        """What holds for every entry."""
        self.check_time(now, trail)
        self.check_deny(facts.names(), trail)
        if self.crl.required and facts.lists:
            missing = sum(each is None for each in facts.lists)
            trail.require(not missing, "crl", "every revocation list", f"{missing} missing")
            limit = timedelta(hours=self.crl.max_age_h)
            if fetched is None:
                trail.refuse("crl.age", f"collateral fetched within {limit}", "unknown when")
            trail.within("crl.age", fetched, now, fetched + limit)
        if facts.made is not None:
            age = timedelta(seconds=self.freshness.max_age_s)
            trail.within("age", facts.made - CLOCK_SKEW, now, facts.made + age)

    @property
    def grace(self) -> timedelta:
        """By how much verifiers may prolong revocation lists."""
        return timedelta(hours=self.crl.offline_grace_h)


CLOCK_SKEW = timedelta(seconds=60)  # evidence may be from so far in our future


def load(path: str | Path) -> Policy:
    """Read a policy file; `ConfigError` names the file and the key for anything not understood."""
    return parse(config.read_toml(path), Path(path).absolute())


def parse(data: Mapping[str, Any], source: Path) -> Policy:
    """The same from a table already read."""
    table = dict(data)
    listed = table.pop("allow", [])
    if not isinstance(listed, list) or len(listed) > MAX_ENTRIES:
        raise ConfigError(f"{source}: allow: a list of at most {MAX_ENTRIES} tables is expected: [[allow]]")
    entries = tuple(_entry(each, source, f"allow[{index}]") for index, each in enumerate(listed))
    policy = config.read_table(Policy, table, source, given={"source": source, "allow": entries})
    ids = [each.id for each in entries]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{source}: allow[].id: two entries have the same")
    for index, each in enumerate(entries):
        if (each.kind in SIMULATED) != (policy.environment == "simulation"):
            raise ConfigError(
                f'{source}: allow[{index}].kind = "{each.kind}": a policy for {policy.environment} cannot '
                f"name it; simulated evidence ({', '.join(SIMULATED)}) has policies of its own"
            )
    return policy


def _entry(data: Any, source: Path, where: str) -> Entry:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: {where}: a table is expected here: [[allow]]")
    table = dict(data)
    for key in ("id", "kind"):
        if key not in table:
            raise ConfigError(f"{source}: missing key {where}.{key}")
    name, kind = table.pop("id"), table.pop("kind")
    try:
        name = _id_rule(name, source.parent)
    except ValueError as error:
        raise ConfigError(f"{source}: {where}.id: must be {error}") from None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"{source}: {where}.kind: must be one of " + ", ".join(f'"{each}"' for each in KINDS)
        )
    rule: Rule = config.read_table(RULES[kind], table, source, where)
    flaw = rule.flaw()
    if flaw:
        raise ConfigError(f"{source}: {where}.{flaw}")
    return Entry(name, kind, rule)


# --- signatures --------------------------------------------------------------------------------------------

SIGNATURE_SUFFIX = ".sig"


def signed_message(policy: Policy) -> bytes:
    """What an owner's Ed25519 key signs."""
    return b"mimir policy signature\0" + policy.digest()


def load_signatures(path: Path) -> tuple[Signature, ...]:
    """The signatures in a file; none where there is no such file."""
    if not path.exists():
        return ()
    found = config.read_table(Signatures, config.read_toml(path), path).signature
    if len(found) > MAX_SIGNATURES:
        raise ConfigError(f"{path}: more than {MAX_SIGNATURES} signatures")
    return found


def signed_by(policy: Policy, signature: Signature) -> bool:
    """Whether this signature is over this policy. Whose key it is, and whether that counts, is not said."""
    return verifies(signed_message(policy), signature)


def check_signatures(
    policy: Policy, signatures: Collection[Signature], owners: Collection[str], threshold: int
) -> tuple[Step, ...]:
    """Require valid signatures by `threshold` different keys of `owners` (public keys, hex).

    Owners and threshold are the verifier's own: a policy does not say who may sign it.
    """
    trail = Trail("policy")
    require_owners(trail, signed_message(policy), signatures, owners, threshold)
    return tuple(trail.steps)


def check_version(policy: Policy, at_least: int) -> None:
    """Refuse a policy older than one that was seen already."""
    Trail("policy").require(policy.version >= at_least, "version", f"at least {at_least}", policy.version)


TEMPLATE = """\
# Who is admitted. `mimir policy check` reads it, `mimir policy sign` signs it. Empty, it admits nobody.
format = 1
name = "{name}"
version = 1                        # raise it with every change
environment = "{environment}"        # "simulation" names swtpm alone, and no machine that can be trusted
not_after = {not_after}   # renew it before then: an expired policy admits nobody

[crl]
required = true
max_age_h = 24                     # since we fetched lists and collateral
offline_grace_h = 0

[freshness]
max_age_s = 300
reattest_s = 3600                  # a verdict lasts so long at most

[deny]                             # wins over every entry; hexadecimal
measurements = []
chip_ids = []
identities = []

# [[allow]]
# id = "peers-on-genoa"
# kind = "snp"
# measurements = ["<96 hexadecimal digits>"]
# host_data = "any"
# chip_ids = "any"
# [[allow.product]]
# name = "genoa"
# bl = 10                          # least versions; look up what your provider runs
# tee = 0
# snp = 23
# ucode = 84
"""
