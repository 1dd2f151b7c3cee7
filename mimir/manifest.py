"""What is public of a shared model: shape, scale, for whom it was shared, and the hash of every component.

Weight w is shared as w = c0 + c1 + c2 modulo 2^64; party i holds components i and i+1. The owner computes the
hashes of all three components of every tensor, so each party can check its two, and two parties that agree on
the manifest's digest hold the same third one. The digest is the model's name everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimir.errors import BadInput
from mimir.model.checkpoint import MAX_SCALE_BITS, PlanSpec

FORMAT = 1
COMPONENTS = 3
WORD_BYTES = 8  # of one ring element on disk and on the wire, little endian
MAX_NAME = 64
_ENTRIES = {"format", "name", "model", "scale_bits", "parties", "tensors"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tensor:
    """One weight array: shape, and SHA-256 of each component's bytes in C order."""

    name: str
    shape: tuple[int, ...]
    sha256: tuple[str, str, str]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one component."""
        return self.elements * WORD_BYTES


@dataclass(frozen=True)
class Manifest:
    """The public description of one sharing of one model."""

    name: str  # what people call it
    spec: PlanSpec
    scale_bits: int
    parties: tuple[str, str, str]  # identity public keys, in party order
    tensors: tuple[Tensor, ...]  # in the order of spec.shapes()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > MAX_NAME or not _NAME.fullmatch(self.name):
            raise BadInput(f"model name {self.name!r}: 1 to {MAX_NAME} letters, digits, '.', '_' and '-'")
        if type(self.scale_bits) is not int or not 1 <= self.scale_bits <= MAX_SCALE_BITS:
            raise BadInput(f"model {self.name}: scale_bits must be from 1 to {MAX_SCALE_BITS}")
        if len(set(self.parties)) != COMPONENTS or not all(_is_hash(text) for text in self.parties):
            raise BadInput(f"model {self.name}: parties must be {COMPONENTS} different public keys in hex")
        expected = list(self.spec.shapes().items())
        if [(tensor.name, tensor.shape) for tensor in self.tensors] != expected:
            raise BadInput(f"model {self.name}: its tensors are not those of its description")
        for tensor in self.tensors:
            if len(tensor.sha256) != COMPONENTS or not all(_is_hash(text) for text in tensor.sha256):
                raise BadInput(
                    f"model {self.name}: {tensor.name}: {COMPONENTS} SHA-256 hashes in hex are needed"
                )

    def public(self) -> dict[str, Any]:
        """Plain values, for JSON and msgpack."""
        return {
            "format": FORMAT,
            "name": self.name,
            "model": self.spec.public(),
            "scale_bits": self.scale_bits,
            "parties": list(self.parties),
            "tensors": [[each.name, list(each.shape), list(each.sha256)] for each in self.tensors],
        }

    @classmethod
    def from_public(cls, data: Any) -> Manifest:
        """The inverse of `public`, strict; `BadInput` or `ModelError` says what is wrong."""
        if not isinstance(data, Mapping) or set(data) != _ENTRIES:
            raise BadInput("this is not a model manifest: missing or unknown entries")
        if data["format"] != FORMAT or type(data["format"]) is not int:
            raise BadInput(f"model manifest of format {data['format']!r}; this program reads {FORMAT}")
        try:
            tensors = tuple(
                Tensor(str(name), tuple(_whole(size) for size in shape), tuple(map(str, hashes)))  # type: ignore[arg-type]
                for name, shape, hashes in data["tensors"]
            )
            parties = tuple(map(str, data["parties"]))
        except (TypeError, ValueError):
            raise BadInput("this model manifest is malformed") from None
        return cls(data["name"], PlanSpec.from_public(data["model"]), data["scale_bits"], parties, tensors)  # type: ignore[arg-type]

    def canonical(self) -> bytes:
        """The one byte string that stands for this manifest."""
        return json.dumps(self.public(), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def digest(self) -> str:
        """The model's identity, hex."""
        return hashlib.sha256(b"mimir model\0" + self.canonical()).hexdigest()

    def component_digest(self, component: int) -> str:
        """One hash over the hashes of all tensors of one component: what its two holders compare."""
        whole = hashlib.sha256(b"mimir component\0" + bytes((component,)))
        for tensor in self.tensors:
            whole.update(bytes.fromhex(tensor.sha256[component]))
        return whole.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of one component of the whole model."""
        return sum(tensor.nbytes for tensor in self.tensors)


def is_digest(text: object) -> bool:
    """Whether this could be the digest of a model."""
    return isinstance(text, str) and _is_hash(text)


def _is_hash(text: object) -> bool:
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value
