"""k of n owners: Ed25519 signatures over a message that names what it is, as lines of a TOML file.

Who the owners are, and how many must sign, is the verifier's own: what is signed does not say it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nacl.bindings as sodium
import nacl.exceptions

from mimir import config
from mimir.attest import rules
from mimir.attest.trail import Trail
from mimir.errors import BadInput

MAX_SIGNATURES = 64


def _signature_rule(value: Any, folder: Path) -> str:
    try:
        return str(rules.hexes_rule(64)([value], folder)[0])
    except ValueError:
        raise ValueError("128 hexadecimal digits, as `mimir policy sign` writes them") from None


@dataclass(frozen=True)
class Signature:
    """[[signature]] One owner's signature."""

    key: Annotated[str, config.key_rule]
    signature: Annotated[str, _signature_rule]


@dataclass(frozen=True)
class Signatures:
    """The file of signatures."""

    signature: tuple[Signature, ...] = ()


def format_signatures(signatures: Collection[Signature]) -> str:
    """As they stand in a file."""
    return "\n".join(
        f'[[signature]]\nkey = "{each.key}"\nsignature = "{each.signature}"\n' for each in signatures
    )


def verifies(message: bytes, signature: Signature) -> bool:
    """Whether this signature is over this message. Whose key it is, and whether that counts, is not said."""
    signed = bytes.fromhex(signature.signature) + message
    try:
        sodium.crypto_sign_open(signed, bytes.fromhex(signature.key))
    except (nacl.exceptions.BadSignatureError, ValueError):
        return False
    return True


def require_owners(
    trail: Trail, message: bytes, signatures: Collection[Signature], owners: Collection[str], threshold: int
) -> None:
    """Require valid signatures by `threshold` different keys of `owners` (public keys, hex).

    A signature by an owner that does not verify is refused; one by somebody else is not looked at.
    """
    keys = set(owners)
    if not 1 <= threshold <= len(keys):
        raise BadInput(f"{threshold} of {len(keys)} owners must sign: from 1 to all of them is possible")
    good = set()
    for each in signatures:
        if each.key not in keys:
            continue
        if not verifies(message, each):
            trail.refuse("signature", f"one by {each.key} over this", "one that does not verify")
        good.add(each.key)
    step = f"{threshold} of {len(keys)} owners"
    trail.require(len(good) >= threshold, "signatures", step, ", ".join(sorted(good)) or "none")
