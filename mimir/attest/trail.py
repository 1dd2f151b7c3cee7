"""The steps of one verification, in order: each says what was expected and what was got, or ends it.

A verifier states every check through `Trail.require`; so the list of steps that passed is the document that a
person can read, and no check exists that is not in it. `Reader` takes apart untrusted bytes within bounds.
"""

from __future__ import annotations

import hmac
import io
import json
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar

import cbor2

from mimir.errors import AttestationError, LocalError

MAX_SHOWN = 200  # characters of one value in a message: evidence is the peer's to fill
MAX_DEPTH = 8  # of CBOR
T = TypeVar("T")
_WARNINGS = threading.RLock()


@dataclass(frozen=True)
class Step:
    """One check that passed."""

    name: str
    expected: str
    got: str


@dataclass(frozen=True)
class Anchor:
    """What all belief in a piece of evidence rests on: a pinned root, or a key that the policy enrols."""

    name: str
    sha256: str  # of the root certificate, or of the enrolled key's SubjectPublicKeyInfo; hex


class Trail:
    """Collects what was checked. `prefix` names the kind of evidence in every step."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.steps: list[Step] = []

    def require(self, holds: bool, step: str, expected: Any, got: Any) -> None:
        """Note the step if it holds; else raise. The texts are bounded and printable whatever was sent."""
        if not holds:
            self.refuse(step, expected, got)
        self.steps.append(Step(f"{self.prefix}.{step}", shown(expected), shown(got)))

    def refuse(self, step: str, expected: Any, got: Any) -> NoReturn:
        """End the verification."""
        raise AttestationError(
            f"{self.prefix}.{step}", shown(expected), shown(got), tuple(self.steps)
        ) from None

    def same(self, step: str, expected: bytes, got: bytes) -> None:
        """Require equal bytes, compared in constant time."""
        self.require(hmac.compare_digest(expected, got), step, expected, got)

    def one_of(self, step: str, allowed: Sequence[str], got: bytes) -> None:
        """Require one of the listed values, given in hex."""
        self.require(got.hex() in allowed, step, "one of " + ", ".join(allowed), got)

    def guard(self, step: str, expected: str, work: Callable[[], T]) -> T:
        """Run a library over untrusted input: whatever it raises or warns of is a refusal of this step.

        One at a time in the process, since Python keeps what to do with warnings for all threads; `work` may
        come here again, and must not wait for another thread. What the collector says of others' resources,
        whenever it comes by, is no word of the library.
        """
        try:
            with _WARNINGS, warnings.catch_warnings(action="error"):
                warnings.simplefilter("default", ResourceWarning)
                return work()
        except AttestationError:
            raise
        except Exception as error:
            self.refuse(step, expected, f"{type(error).__name__}: {error}")

    def within(self, step: str, first: datetime, now: datetime, last: datetime) -> None:
        """Require that `now` lies in a closed interval of validity."""
        check_time(now)
        self.require(first <= now <= last, step, f"{stamp(first)} to {stamp(last)}", stamp(now))


def shown(value: Any) -> str:
    """A value as a short printable text: bytes in hex, times in ISO form."""
    if isinstance(value, bytes | bytearray | memoryview):
        text = bytes(value[: MAX_SHOWN // 2]).hex() or "(empty)"
    elif isinstance(value, datetime):
        text = stamp(value)
    elif isinstance(value, str):
        text = value
    else:
        text = str(value)
    text = text[: MAX_SHOWN + 1]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def stamp(moment: datetime) -> str:
    """A time in UTC as ISO 8601, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_time(now: datetime) -> None:
    """`now` is the caller's, and must know its zone."""
    if now.tzinfo is None:
        raise LocalError("verification needs a time with a zone: datetime.now(UTC)")


class Reader:
    """Takes a byte string apart from the front, never past its end."""

    def __init__(self, data: bytes, trail: Trail, step: str = "format") -> None:
        self._data, self._trail, self._step = data, trail, step
        self.at = 0

    def take(self, size: int, what: str) -> bytes:
        """The next `size` bytes."""
        left = len(self._data) - self.at
        if not 0 <= size <= left:
            self._trail.refuse(self._step, f"{size} bytes of {what} at {self.at}", f"{left} bytes left")
        self.at += size
        return self._data[self.at - size : self.at]

    def little(self, size: int, what: str) -> int:
        """A little-endian integer."""
        return int.from_bytes(self.take(size, what), "little")

    def big(self, size: int, what: str) -> int:
        """A big-endian integer."""
        return int.from_bytes(self.take(size, what), "big")

    def sized(self, what: str, limit: int) -> bytes:
        """Bytes after their 16-bit big-endian length, at most `limit` of them."""
        size = self.big(2, f"the length of {what}")
        if size > limit:
            self._trail.refuse(self._step, f"at most {limit} bytes of {what}", size)
        return self.take(size, what)

    @property
    def rest(self) -> bytes:
        """What has not been taken."""
        return self._data[self.at :]

    def end(self, what: str) -> None:
        """Nothing may follow."""
        if self.at != len(self._data):
            self._trail.refuse(self._step, f"the end of {what} at {self.at}", f"{len(self._data)} bytes")


class _NoTags(dict[int, Any]):
    """For cbor2: every tag is refused, since its decoders compute what the sender asks for."""

    @staticmethod
    def _refuse(*_: Any) -> NoReturn:
        raise ValueError("a tagged item")

    def __getitem__(self, tag: int) -> Any:
        return self._refuse

    def get(self, tag: int, default: Any = None) -> Any:  # type: ignore[override]
        return self._refuse

    def __contains__(self, tag: object) -> bool:
        return True


def read_cbor(trail: Trail, step: str, raw: bytes, what: str) -> Any:
    """One CBOR item and nothing after it: no tags, no key twice, at most MAX_DEPTH deep."""

    def decode() -> tuple[Any, int]:
        stream = io.BytesIO(raw)
        decoder = cbor2.CBORDecoder(
            stream, semantic_decoders=_NoTags(), allow_duplicate_keys=False, max_depth=MAX_DEPTH
        )
        return decoder.decode(), stream.tell()

    value, end = trail.guard(step, f"CBOR of {what} without tags or repeated keys", decode)
    if end != len(raw):
        trail.refuse(step, f"the end of {what} at {end}", f"{len(raw)} bytes")
    return value


def read_canonical_cbor(trail: Trail, step: str, raw: bytes, what: str) -> Any:
    """The same, and in the one deterministic encoding of RFC 8949, 4.2: shortest forms, sorted keys."""
    value = read_cbor(trail, step, raw, what)
    again = trail.guard(step, f"plain values in {what}", lambda: cbor2.dumps(value, canonical=True))
    if again != raw:
        trail.refuse(step, f"{what} in deterministic CBOR", "another encoding of the same value")
    return value


def read_json(trail: Trail, step: str, raw: str | bytes, what: str) -> Any:
    """JSON without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key twice")
        return made

    def no_constant(name: str) -> NoReturn:
        raise ValueError(name)

    def load() -> Any:
        try:
            return json.loads(raw, object_pairs_hook=unique, parse_constant=no_constant)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    return trail.guard(step, f"JSON of {what}", load)
