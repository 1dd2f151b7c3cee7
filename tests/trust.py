"""Owners who revoke, and verdicts as the appraisal gives them, for tests that need no evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from mimir.admission import revocation
from mimir.admission.revocation import Statement, context_of
from mimir.attest.appraisal import Verdict
from mimir.attest.evidence import Claims, identity_hash
from mimir.attest.signatures import Signature
from mimir.net.identity import Identity

MEASUREMENT = "11" * 48
TUNNEL = "22" * 32


def verdict_on(identity: str, now: datetime, **changes: Any) -> Verdict:
    """That this identity was admitted just now, for two hours."""
    at = int(now.timestamp())
    claims = Claims(
        role="party",
        node=changes.pop("node", "beta"),
        identity=identity_hash(bytes.fromhex(identity)),
        tunnel=bytes.fromhex(changes.pop("tunnel", TUNNEL)),
        kem=None,
        nonce=b"\3" * 32,
        nonce_source="alpha 1",
        not_before=at - 60,
        not_after=at + 3600,
        policy=b"\5" * 32,
        channel=None,
        config=b"\6" * 32,
    )
    made = Verdict(
        kind="snp",
        simulated=False,
        entry="peers",
        claims=claims,
        tcb="",
        advisories=(),
        cautions=(),
        policy=claims.policy.hex(),
        policy_version=1,
        evidence="44" * 32,
        valid_until=now + timedelta(hours=2),
        steps=(),
        measurements=(MEASUREMENT,),
    )
    return replace(made, **changes)


class Owners:
    """Three owners of whom two must sign, and a federation whose revocations they sign."""

    def __init__(self, identities: Iterable[str], threshold: int = 2) -> None:
        self.signers = [Identity.generate() for _ in range(3)]
        self.keys = tuple(each.public_hex for each in self.signers)
        self.threshold = threshold
        self.context = context_of(identities)

    def statement(self, epoch: int = 1, **items: Iterable[str]) -> Statement:
        return Statement(
            self.context,
            epoch,
            datetime(2026, 11, 26, 12, epoch % 60, tzinfo=UTC),
            **{kind: frozenset(values) for kind, values in items.items()},
        )

    def sign(self, statement: Statement, signers: Sequence[int] = (0, 1)) -> bytes:
        """The statement as it travels."""
        return revocation.encode(statement, [signature(self.signers[n], statement) for n in signers])

    def revoke(self, epoch: int = 1, **items: Iterable[str]) -> bytes:
        return self.sign(self.statement(epoch, **items))


def signature(owner: Identity, statement: Statement) -> Signature:
    return Signature(owner.public_hex, owner.sign(statement.message()).hex())
