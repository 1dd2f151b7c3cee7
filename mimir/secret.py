"""Memory that must not be seen: keys and seeds that wipe themselves and refuse to be looked at by accident.

A `Secret` owns its bytes. Python offers many ways to copy or print a value without meaning to; each of them
raises here, and the one way in is to ask for it by name: `with secret.reveal_to_kernel() as view`.

What cannot be wiped: `bytes` objects that a library insists on (the X25519 and Ed25519 calls take `bytes`),
and the `bytes` that a `Secret` was made from. Give a `bytearray` where you can: it is taken over, not copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NoReturn, Self

from mimir.errors import LocalError

KEY_BYTES = 32


class Secret:
    """Owns secret bytes until `wipe`, the end of a `with` block, or its own end, whichever comes first."""

    __slots__ = ("__weakref__", "_memory")
    SIZE: ClassVar[int | None] = None  # a kind with a fixed length states it here

    _memory: bytearray | None

    def __init__(self, material: bytes | bytearray | memoryview) -> None:
        self._memory = None  # so that a refusal below leaves an object that can still be wiped
        size = len(material)
        if size == 0:
            raise LocalError(f"{type(self).__name__}: empty material")
        if self.SIZE is not None and size != self.SIZE:
            raise LocalError(f"{type(self).__name__}: {size} bytes given, {self.SIZE} needed")
        self._memory = material if isinstance(material, bytearray) else bytearray(material)

    @classmethod
    def random(cls, size: int = KEY_BYTES) -> Self:
        """Fresh bytes from the operating system."""
        return cls(bytearray(os.urandom(size)))

    @property
    def size(self) -> int:
        """Length in bytes; 0 once wiped."""
        return 0 if self._memory is None else len(self._memory)

    @contextmanager
    def reveal_to_kernel(self) -> Iterator[memoryview]:
        """Lend the bytes to a kernel or a cipher: a read-only view that dies with the `with` block."""
        if self._memory is None:
            raise LocalError(f"{type(self).__name__}: already wiped")
        view = memoryview(self._memory)
        lent = view.toreadonly()
        try:
            yield lent
        finally:
            lent.release()
            view.release()

    def wipe(self) -> None:
        """Overwrite with zeros and let go. Safe to call twice."""
        memory, self._memory = self._memory, None
        if memory is not None:
            # Same length, so the buffer is written in place; a C call that CPython cannot optimise away.
            memory[:] = bytes(len(memory))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.wipe()

    def __del__(self) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {'wiped' if self._memory is None else f'{self.size} bytes'}>"

    def _refuse(self, act: str) -> NoReturn:
        raise LocalError(f"{type(self).__name__} refuses {act}: ask with reveal_to_kernel()")

    def __bool__(self) -> NoReturn:
        self._refuse("truth")

    def __eq__(self, other: object) -> NoReturn:
        self._refuse("comparison")

    def __ne__(self, other: object) -> NoReturn:
        self._refuse("comparison")

    def __hash__(self) -> NoReturn:
        self._refuse("hashing")

    def __iter__(self) -> NoReturn:
        self._refuse("iteration")

    def __contains__(self, item: object) -> NoReturn:
        self._refuse("iteration")

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse("indexing")

    def __len__(self) -> NoReturn:
        self._refuse("len(): use .size")

    def __format__(self, spec: str) -> NoReturn:
        self._refuse("formatting")

    def __bytes__(self) -> NoReturn:
        self._refuse("bytes()")

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("becoming an array")

    def __copy__(self) -> NoReturn:
        self._refuse("copying")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copying")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("pickling")

    def __getstate__(self) -> NoReturn:
        self._refuse("pickling")


class IdentityKey(Secret):
    """Ed25519 seed: who a party, a client or an owner is."""

    SIZE = KEY_BYTES


class ExchangeKey(Secret):
    """X25519 private key: static (from an identity) or fresh for one handshake."""

    SIZE = KEY_BYTES


class TunnelKey(Secret):
    """WireGuard private key."""

    SIZE = KEY_BYTES


class TlsPrivateKey(Secret):
    """Ed25519 seed of a TLS key."""

    SIZE = KEY_BYTES


class LinkSecret(Secret):
    """What the two ends of one link know and the third party does not."""

    SIZE = KEY_BYTES


class PairwiseKey(Secret):
    """PRF key of one component: known to its two holders."""

    SIZE = KEY_BYTES


class PrivateKey(Secret):
    """PRF key that one party alone knows."""

    SIZE = KEY_BYTES


class CoinSeed(Secret):
    """One party's part of a joint coin, secret until it is opened; or the state drawn from one."""


class ShareSeed(Secret):
    """From which a model owner expands one random component of its weights."""

    SIZE = KEY_BYTES


class SealKey(Secret):
    """Symmetric key of one direction of a sealed connection between a client and a party."""

    SIZE = KEY_BYTES
