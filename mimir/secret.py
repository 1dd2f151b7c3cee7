"""Memory that must not be seen: keys and seeds that wipe themselves and refuse to be looked at by accident.

A `Secret` owns its bytes. Python offers many ways to copy or print a value without meaning to; each of them
raises here, and the one way in is to ask for it by name: `with secret.reveal_to_kernel() as view`.

The bytes live in pages of our own that are locked (never written to swap, where the limit RLIMIT_MEMLOCK
allows it; `lock_state` tells), left out of core dumps, and zeroed when the process exits by itself. `Pages`
are the same for what is large: decrypted shares.

What cannot be wiped: `bytes` objects that a library insists on (the X25519 and Ed25519 calls take `bytes`),
and the `bytes` that a `Secret` was made from. Give a `bytearray` where you can: it is wiped once it is taken.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import resource
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NoReturn, Self

from mimir.errors import EnvironmentMissing, LocalError

KEY_BYTES = 32
ARENA_BYTES = 64 << 10  # pages are taken in pieces of this size
SMALLEST_SLOT = 32

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Pages(mmap.mmap):
    """Anonymous memory, left out of core dumps, zeroed when the last array or view over it is gone.

    `lock` asks that it never goes to swap: `EnvironmentMissing` if the limit does not allow it.
    """

    def __new__(cls, size: int, *, lock: bool = False) -> Self:
        # Private: after a fork, wiping here must not wipe there.
        self = super().__new__(cls, -1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.madvise(mmap.MADV_DONTDUMP)
        _PAGES.add(self)
        if lock and (number := self.lock()):
            raise EnvironmentMissing(f"{len(self)} bytes cannot be locked in memory: {_why_not(number)}")
        return self

    def lock(self) -> int:
        """Keep the pages out of swap; returns 0, or the number of the error."""
        return 0 if _libc.mlock(self.address(), len(self)) == 0 else ctypes.get_errno()

    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))

    def wipe(self) -> None:
        """Zero all of it, also under views that are still there."""
        ctypes.memset(self.address(), 0, len(self))

    def __del__(self) -> None:
        if not self.closed:
            self.wipe()


_PAGES: weakref.WeakSet[Pages] = weakref.WeakSet()


@atexit.register
def _wipe_pages() -> None:
    for pages in list(_PAGES):
        if not pages.closed:
            pages.wipe()


def _why_not(number: int) -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    allowed = "no limit" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    return (
        f"{os.strerror(number)}, RLIMIT_MEMLOCK is {allowed}; raise it (LimitMEMLOCK=, `ulimit -l`)"
        " or give the process CAP_IPC_LOCK"
    )


def _zero(memory: bytearray | memoryview) -> None:
    # Same length, so the buffer is written in place; a C call that CPython cannot optimise away.
    memory[:] = bytes(len(memory))


class _Arena:
    """Slots of locked pages, by size. Slots are zero while they are free."""

    def __init__(self) -> None:
        self.busy = (
            threading.RLock()
        )  # again in one thread: garbage collection wipes in the midst of anything
        self.unlocked: str | None = None
        self.required = False
        self._free: dict[int, list[memoryview]] = {}

    def take(self, size: int) -> memoryview:
        room = max(SMALLEST_SLOT, 1 << (size - 1).bit_length())
        with self.busy:
            free = self._free.setdefault(room, [])
            if not free:
                pages = Pages(max(ARENA_BYTES, room))
                if number := pages.lock():
                    self.unlocked = _why_not(number)
                    if self.required:
                        raise EnvironmentMissing(f"keys could go to swap: {self.unlocked}")
                view = memoryview(pages)
                free += [view[at : at + room] for at in range(0, len(view), room)]
            return free.pop()

    def give(self, slot: memoryview) -> None:
        with self.busy:
            self._free[len(slot)].append(slot)


_arena = _Arena()


def require_locked() -> None:
    """From now on a secret that cannot be locked is refused; `EnvironmentMissing` if there is one already."""
    _arena.required = True
    if _arena.unlocked is not None:
        raise EnvironmentMissing(f"keys could go to swap: {_arena.unlocked}")


def lock_state() -> str | None:
    """None if every secret of this process lies in locked memory so far, else why not, and the remedy."""
    return _arena.unlocked


class Secret:
    """Owns secret bytes until `wipe`, the end of a `with` block, or its own end, whichever comes first."""

    __slots__ = ("__weakref__", "_lent", "_memory", "_size")
    SIZE: ClassVar[int | None] = None  # a kind with a fixed length states it here

    _memory: memoryview | None  # a slot, of `_size` bytes or more

    def __init__(self, material: bytes | bytearray | memoryview) -> None:
        self._memory = None  # so that a refusal below leaves an object that can still be wiped
        self._lent = 0
        self._size = size = len(material)
        if size == 0:
            raise LocalError(f"{type(self).__name__}: empty material")
        if self.SIZE is not None and size != self.SIZE:
            raise LocalError(f"{type(self).__name__}: {size} bytes given, {self.SIZE} needed")
        slot = _arena.take(size)
        slot[:size] = material
        self._memory = slot
        if isinstance(material, bytearray):
            _zero(material)

    @classmethod
    def random(cls, size: int = KEY_BYTES) -> Self:
        """Fresh bytes from the operating system."""
        return cls(bytearray(os.urandom(size)))

    @property
    def size(self) -> int:
        """Length in bytes; 0 once wiped."""
        return 0 if self._memory is None else self._size

    @contextmanager
    def reveal_to_kernel(self) -> Iterator[memoryview]:
        """Lend the bytes to a kernel or a cipher: a read-only view that dies with the `with` block."""
        with _arena.busy:
            slot = self._memory
            if slot is None:
                raise LocalError(f"{type(self).__name__}: already wiped")
            self._lent += 1
        lent = slot[: self._size].toreadonly()
        try:
            yield lent
        finally:
            lent.release()
            with _arena.busy:
                self._lent -= 1
                if self._lent == 0 and self._memory is None:  # wiped meanwhile: nobody sees the slot any more
                    _arena.give(slot)

    def wipe(self) -> None:
        """Overwrite with zeros and let go. Safe to call twice."""
        with _arena.busy:
            slot, self._memory = self._memory, None
            if slot is not None:
                _zero(slot)
                if self._lent == 0:
                    _arena.give(slot)

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


class PresharedKey(Secret):
    """What two ends of a tunnel mix into its handshakes: from both, by a key encapsulation that will last."""

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


class StorageKey(Secret):
    """From which every key of what lies on one party's disk is derived."""

    SIZE = KEY_BYTES
