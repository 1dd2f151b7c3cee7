"""What is public of a shared model: shape, scale, for whom it was shared, and commitments to all components.

Weight w is shared as w = c0 + c1 + c2 modulo 2^64, or 2^32 (`PlanSpec.halved`); party i holds components i
and i+1. There is one seed for each component number, known to the two holders. Of each tensor two
components are key streams of their seeds (stream number: the tensor's place), and one, the *explicit* one,
is what is left of w. Which one is a rule of the format: `explicit_components`, computed by everybody from
the shapes.

The manifest has a hash of each seed and of each explicit component, so each party can check what it gets, and
two parties that agree on the manifest's digest hold the same. The digest is the model's name everywhere. A
component's hash begins with its seed: the third party has the two other components, and could otherwise test
guesses of the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from mimir.errors import BadInput
from mimir.model.checkpoint import MAX_SCALE_BITS, PlanSpec
from mimir.secret import ShareSeed

FORMAT = 6  # 1 had no seeds, 2 other key streams, 3 words of 8 bytes alone, 4 and 5 other scales
COMPONENTS = 3
MAX_NAME = 64
_ENTRIES = {"format", "name", "model", "scale_bits", "parties", "seeds", "tensors"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HASH = re.compile(r"[0-9a-f]{64}")


class Hash(Protocol):
    """SHA-256 in progress."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


def explicit_components(sizes: Sequence[int]) -> tuple[int, ...]:
    """For tensors of these sizes in bytes, in order, which component of each is explicit.

    The largest first (of equal ones the earlier), each goes to the component that has the fewest bytes by
    then (of equal ones the lowest), so that the three parties have about equally much to keep.
    """
    out, filled = [0] * len(sizes), [0] * COMPONENTS
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        out[index] = filled.index(min(filled))
        filled[out[index]] += sizes[index]
    return tuple(out)


def holds(party: int, component: int) -> bool:
    """Whether this party is one of the two holders of a component."""
    return (component - party) % COMPONENTS < 2


def seed_commitment(component: int, seed: ShareSeed) -> str:
    """By which a manifest commits to the seed of a component, hex."""
    whole = hashlib.sha256(b"mimir share seed\0" + bytes((component,)))
    with seed.reveal_to_kernel() as view:
        whole.update(view)
    return whole.hexdigest()


def component_hash(component: int, index: int, seed: ShareSeed) -> Hash:
    """To be fed the explicit component of the tensor at `index`, in C order; `seed` is the component's."""
    whole = hashlib.sha256(b"mimir explicit component\0" + bytes((component,)) + index.to_bytes(4, "little"))
    with seed.reveal_to_kernel() as view:
        whole.update(view)
    return whole


@dataclass(frozen=True)
class Tensor:
    """One weight array: shape, and which component is explicit, with its hash (see `component_hash`)."""

    name: str
    shape: tuple[int, ...]
    explicit: int
    sha256: str
    word: int = 8  # bytes of an element, on disk and on the wire little endian

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one component."""
        return self.elements * self.word

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a component."""
        return np.dtype(f"<u{self.word}")


def tensors_of(spec: PlanSpec) -> list[Tensor]:
    """The tensors of a model in order, whose components nobody has hashed yet."""
    rule = explicit_components(list(spec.sizes().values()))
    return [
        Tensor(name, shape, component, "", spec.word_bytes(name))
        for (name, shape), component in zip(spec.shapes().items(), rule, strict=True)
    ]


@dataclass(frozen=True)
class Manifest:
    """The public description of one sharing of one model."""

    name: str  # what people call it
    spec: PlanSpec
    scale_bits: int
    parties: tuple[str, str, str]  # identity public keys, in party order
    seeds: tuple[str, str, str]  # `seed_commitment` of each component
    tensors: tuple[Tensor, ...]  # in the order of spec.shapes()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > MAX_NAME or not _NAME.fullmatch(self.name):
            raise BadInput(f"model name {self.name!r}: 1 to {MAX_NAME} letters, digits, '.', '_' and '-'")
        if type(self.scale_bits) is not int or not 1 <= self.scale_bits <= MAX_SCALE_BITS:
            raise BadInput(f"model {self.name}: scale_bits must be from 1 to {MAX_SCALE_BITS}")
        if len(set(self.parties)) != COMPONENTS or not all(_is_hash(text) for text in self.parties):
            raise BadInput(f"model {self.name}: parties must be {COMPONENTS} different public keys in hex")
        if len(self.seeds) != COMPONENTS or not all(_is_hash(text) for text in self.seeds):
            raise BadInput(f"model {self.name}: {COMPONENTS} hashes of seeds in hex are needed")
        if [replace(tensor, sha256="") for tensor in self.tensors] != tensors_of(self.spec):
            raise BadInput(f"model {self.name}: its tensors are not those of its description")
        for tensor in self.tensors:
            if not _is_hash(tensor.sha256):
                raise BadInput(f"model {self.name}: {tensor.name}: a SHA-256 hash in hex is needed")

    def public(self) -> dict[str, Any]:
        """Plain values, for JSON and msgpack."""
        return {
            "format": FORMAT,
            "name": self.name,
            "model": self.spec.public(),
            "scale_bits": self.scale_bits,
            "parties": list(self.parties),
            "seeds": list(self.seeds),
            "tensors": [[each.name, list(each.shape), each.sha256] for each in self.tensors],
        }

    @classmethod
    def from_public(cls, data: Any) -> Manifest:
        """The inverse of `public`, strict; `BadInput` or `ModelError` says what is wrong."""
        if isinstance(data, Mapping) and type(data.get("format")) is int and data["format"] != FORMAT:
            raise BadInput(
                f"model manifest of format {data['format']}; this program reads {FORMAT}: provision the "
                "model again (mimir provision), with the same version at the owner and all parties"
            )
        if not isinstance(data, Mapping) or set(data) != _ENTRIES or type(data["format"]) is not int:
            raise BadInput("this is not a model manifest: missing or unknown entries")
        try:
            found = [
                (str(name), tuple(_whole(size) for size in shape), str(sha256))
                for name, shape, sha256 in data["tensors"]
            ]
            parties, seeds = tuple(map(str, data["parties"])), tuple(map(str, data["seeds"]))
        except (TypeError, ValueError):
            raise BadInput("this model manifest is malformed") from None
        spec = PlanSpec.from_public(data["model"])
        wanted = tensors_of(spec)
        if [(name, shape) for name, shape, _ in found] != [(tensor.name, tensor.shape) for tensor in wanted]:
            raise BadInput(f"model {data['name']!r}: its tensors are not those of its description")
        tensors = tuple(
            replace(tensor, sha256=sha256) for tensor, (_, _, sha256) in zip(wanted, found, strict=True)
        )
        return cls(data["name"], spec, data["scale_bits"], parties, seeds, tensors)  # type: ignore[arg-type]

    def canonical(self) -> bytes:
        """The one byte string that stands for this manifest."""
        return json.dumps(self.public(), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def digest(self) -> str:
        """The model's identity, hex."""
        return hashlib.sha256(b"mimir model\0" + self.canonical()).hexdigest()

    def component_digest(self, component: int) -> str:
        """One hash over the seed's and those of all tensors that are explicit in one component: what its two
        holders compare.
        """
        whole = hashlib.sha256(b"mimir component 2\0" + bytes((component,)))
        whole.update(bytes.fromhex(self.seeds[component]))
        for tensor in self.tensors:
            if tensor.explicit == component:
                whole.update(bytes.fromhex(tensor.sha256))
        return whole.hexdigest()

    def held(self, party: int) -> dict[str, Tensor]:
        """Tensors whose explicit component this party holds, by name, in order."""
        return {tensor.name: tensor for tensor in self.tensors if holds(party, tensor.explicit)}

    def stored(self, party: int) -> int:
        """Bytes of explicit components that this party holds."""
        return sum(tensor.nbytes for tensor in self.held(party).values())


def is_digest(text: object) -> bool:
    """Whether this could be the digest of a model."""
    return isinstance(text, str) and _is_hash(text)


def _is_hash(text: object) -> bool:
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value
