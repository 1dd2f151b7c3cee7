"""Every loop of Mimir, in C: ring and bit arithmetic, matrix products, the PRG, and the check fields.

Arrays are C-contiguous `uint64` unless said otherwise; inputs may be read-only (a memmap). This file checks
types and sizes, once, and raises `LocalError`; C checks nothing. Results are new arrays, and time depends
only on sizes and on arguments called public. The interpreter lock is released inside every call.

The kernels exist at three levels, "ref", "avx2" and "avx512". The best one this machine can run is chosen at
load; `force`, or the environment variable MIMIR_KERNEL_LEVEL, chooses another. All give the same bits, as do
all numbers of threads.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mimir.errors import ConfigError, EnvironmentMissing, LocalError

U64: TypeAlias = npt.NDArray[np.uint64]
U32: TypeAlias = npt.NDArray[np.uint32]
U8: TypeAlias = npt.NDArray[np.uint8]
Real: TypeAlias = npt.NDArray[np.float64]
Bytes: TypeAlias = bytes | bytearray | memoryview

LEVELS = ("ref", "avx2", "avx512")
LEVEL_VARIABLE = "MIMIR_KERNEL_LEVEL"
GR_DEGREE = 48
WORD_BITS = 64
KEY_BYTES = 32
BLOCK_BYTES = 16  # of the generator
MAX_ROWS = 64  # MK_ROWS
MAX_ENTRIES = 512  # MK_ENTRIES
GROUP = 64  # MK_GROUP
MAX_DEGREE = 8  # MK_DEGREE
MAX_CHOICES = 16  # of which one is chosen
MAX_DIGIT = 10  # MK_DIGIT
MAX_TURNS = 16  # MK_TURNS
EXACT_BITS = 50  # MK_EXACT
MAX_MONOMIAL = 16  # MK_MONOMIAL
MAX_FLAGS = 4  # MK_FLAGS
MAX_THREADS = 64  # MK_THREADS


class _Missing:
    """Stands in for the library until it is compiled, so that `mimir.kernels.build` can be imported."""

    def __getattr__(self, name: str) -> Any:
        raise EnvironmentMissing("the kernels are not compiled: run `python -m mimir.kernels.build`")


def _load() -> tuple[Any, Any]:
    try:
        native = importlib.import_module("mimir.kernels._native")
    except ModuleNotFoundError as error:
        if error.name != "mimir.kernels._native":
            raise
        return _Missing(), _Missing()
    return native.ffi, native.lib


_ffi, _lib = _load()
_from_buffer: Any = _ffi.from_buffer if not isinstance(_ffi, _Missing) else None
_WORDS: Any = _ffi.typeof("uint64_t[]") if not isinstance(_ffi, _Missing) else None
_WORDS32: Any = _ffi.typeof("uint32_t[]") if not isinstance(_ffi, _Missing) else None
_BYTES: Any = _ffi.typeof("uint8_t[]") if not isinstance(_ffi, _Missing) else None
_NOTHING: Any = _ffi.NULL if not isinstance(_ffi, _Missing) else None
_DOUBLES: Any = _ffi.typeof("double[]") if not isinstance(_ffi, _Missing) else None


# ---- levels ----


def level() -> str:
    """The level in force."""
    return LEVELS[_lib.mk_level()]


def available() -> list[str]:
    """The levels this machine can run, slowest first."""
    return list(LEVELS[: _lib.mk_level_max() + 1])


def force(name: str) -> None:
    """Run this level from now on, in every thread. Raises LocalError if the machine lacks it."""
    if name not in LEVELS:
        raise LocalError(f"kernel level {name!r} is not one of {', '.join(LEVELS)}")
    if _lib.mk_level_force(LEVELS.index(name)) != 0:
        raise LocalError(f"this machine cannot run kernel level {name!r}; it has {', '.join(available())}")


def _force_from_environment() -> None:
    wanted = os.environ.get(LEVEL_VARIABLE)
    if wanted and not isinstance(_lib, _Missing):
        try:
            force(wanted)
        except LocalError as error:
            raise ConfigError(f"environment variable {LEVEL_VARIABLE}: {error}") from error


_force_from_environment()


# ---- threads ----


def threads() -> int:
    """How many threads a long kernel may use: 1 until `use_threads` says otherwise."""
    return int(_lib.mk_threads())


def use_threads(count: int) -> None:
    """Let a long kernel use so many threads, the caller's included. While one does, others run on their
    callers' threads alone.
    """
    _lib.mk_threads_use(_count("count", count, 1, MAX_THREADS))


def alone() -> None:
    """From now on the calling thread runs its kernels by itself: its work is split already."""
    _lib.mk_threads_alone()


# ---- checks ----

_DTYPES = {kind: np.dtype(kind) for kind in (np.uint64, np.uint32, np.uint16, np.uint8)}


def _array(
    name: str, value: Any, shape: Sequence[int | None], dtype: type[np.unsignedinteger[Any]] = np.uint64
) -> tuple[int, ...]:
    """Check type, layout and shape (None: any length); return the shape."""
    if not isinstance(value, np.ndarray) or value.dtype != _DTYPES[dtype]:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise LocalError(f"{name} must be a {dtype.__name__} array, not {kind}")
    flags = value.flags
    if not flags.c_contiguous or not flags.aligned:
        raise LocalError(f"{name} must be contiguous in C order and aligned")
    found: tuple[int, ...] = value.shape
    if found != shape and not _fits(found, shape):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise LocalError(f"{name} must have shape ({wanted}), not {found}")
    return found


def _fits(found: tuple[int, ...], shape: Sequence[int | None]) -> bool:
    if len(found) != len(shape):
        return False
    for size, wanted in zip(found, shape, strict=True):  # a loop, for this is called for every array
        if wanted is not None and wanted != size:
            return False
    return True


def _leading(name: str, value: Any) -> tuple[int, ...]:
    """All dimensions but the last."""
    if not isinstance(value, np.ndarray) or not value.ndim:
        raise LocalError(f"{name} must be an array of rows")
    shape: tuple[int, ...] = value.shape[:-1]
    return shape


def _word(name: str, value: int, bits: int = WORD_BITS) -> int:
    """Check that a scalar fits; its value is not printed, for it may be secret."""
    number = int(value)
    if number < 0 or number.bit_length() > bits:
        raise LocalError(f"{name} must be an integer of {bits} bits")
    return number


def _count(name: str, value: int, low: int, high: int | None = None) -> int:
    number = int(value)
    if number < low or (high is not None and number > high):
        raise LocalError(
            f"{name} must be {'at least' if high is None else 'from'} {low}"
            f"{'' if high is None else f' to {high}'}, not {number}"
        )
    return number


def _words(n: int) -> int:
    return (n + WORD_BITS - 1) // WORD_BITS


def _entries(e: Any) -> tuple[type[np.unsignedinteger[Any]], str]:
    """What entries of one-hots shall be, in NumPy and in C: words, unless they have 16 or 8 bits."""
    for kind in (np.uint16, np.uint8):
        if isinstance(e, np.ndarray) and e.dtype == kind:
            return kind, f"{kind.__name__}_t[]"
    return np.uint64, "uint64_t[]"


def _in(value: npt.NDArray[Any]) -> Any:
    return _from_buffer(_WORDS, value)


def _out(value: npt.NDArray[Any]) -> Any:
    return _from_buffer(_WORDS, value, True)  # must be writable


def _room(
    out: npt.NDArray[Any] | None,
    shape: tuple[int, ...],
    *inputs: npt.NDArray[Any],
    dtype: type[np.unsignedinteger[Any]] = np.uint64,
) -> npt.NDArray[Any]:
    """`out`, after checking it, or a new array."""
    if out is None:
        return np.empty(shape, dtype)
    _array("out", out, shape, dtype)
    if not out.flags.writeable:
        raise LocalError("out must be writable")
    if any(np.may_share_memory(out, x) for x in inputs):
        raise LocalError("out overlaps an input")
    return out


def _power_of_two(name: str, size: int) -> int:
    if size < 1 or size & (size - 1):
        raise LocalError(f"{name} must be a power of two, not {size}")
    return size


# ---- pseudo-random bytes ----


def prg(key: Bytes, stream: int, out: npt.NDArray[Any], offset_blocks: int = 0) -> None:
    """Fill `out` (any dtype, contiguous) with the key stream of AES-256-CTR from block `offset_blocks` on, of
    BLOCK_BYTES each.

    The counter block is `stream`, then the number of the block, each in 8 bytes, big-endian (NIST SP
    800-38A 6.5). Never use a (key, stream, block) twice. stream and offset are public.
    """
    if memoryview(key).nbytes != KEY_BYTES:
        raise LocalError(f"key must be {KEY_BYTES} bytes")
    if not isinstance(out, np.ndarray) or not out.flags.c_contiguous or not out.flags.writeable:
        raise LocalError("out must be a writable array, contiguous in C order")
    if out.dtype.hasobject:
        raise LocalError("out must hold plain numbers")
    _word("stream", stream)
    _word("offset_blocks", offset_blocks)
    if offset_blocks + -(-out.nbytes // BLOCK_BYTES) > 1 << 64:
        raise LocalError("the block counter would wrap")
    _lib.mk_prg_aes(
        _ffi.from_buffer("uint8_t[]", out, require_writable=True),
        out.nbytes,
        _ffi.from_buffer("uint8_t[]", key),
        int(stream),
        int(offset_blocks),
    )


# ---- Z_2^64 ----


def _product(kernel: str, a: U64, b: U64, out: U64 | None, add: bool) -> U64:
    batched = isinstance(a, np.ndarray) and a.ndim == 3
    lead: tuple[int, ...] = (a.shape[0],) if batched else ()
    m, k = _array("a", a, (*lead, None, None))[-2:]
    turned = kernel != "mk_ring_matmul"
    n = _dims("b", b, 3 if batched else 2)[-2 if turned else -1]
    shape = (*lead, *((n, k) if turned else (k, n)))
    if batched:
        matrices, apart = _apart("b", b, shape)
    else:
        _array("b", b, shape)
        matrices, apart = _in(b), 0
    if out is None and add:
        raise LocalError("add needs out")
    out = _room(out, (*lead, m, n), a, b)
    getattr(_lib, kernel)(_out(out), _in(a), matrices, apart, lead[0] if batched else 1, m, k, n, int(add))
    return out


def matmul(a: U64, b: U64, out: U64 | None = None, add: bool = False) -> U64:
    """a (m, k) times b (k, n) -> (m, n) modulo 2^64, added to `out` if `add`.

    Batched over a leading dimension if both have one; of b each matrix must be dense, or it is copied.
    With m = 1 the product streams b once, so it is bound by memory.
    """
    return _product("mk_ring_matmul", a, b, out, add)


def matmul_nt(a: U64, b: U64, out: U64 | None = None, add: bool = False) -> U64:
    """a (m, k) times the transpose of b (n, k) -> (m, n) modulo 2^64; batched as `matmul`."""
    return _product("mk_ring_matmul_nt", a, b, out, add)


def matmul32(a: U32, b: U32, out: U32 | None = None, add: bool = False) -> U32:
    """a (m, k) times b (k, n) -> (m, n) modulo 2^32, added to `out` if `add`; not batched.

    With m = 1 the product streams b once, so it is bound by memory; it reads half of what `matmul` does.
    """
    m, k = _array("a", a, (None, None), np.uint32)
    _, n = _array("b", b, (k, None), np.uint32)
    if out is None and add:
        raise LocalError("add needs out")
    out = _room(out, (m, n), a, b, dtype=np.uint32)
    left, right = _from_buffer(_WORDS32, a), _from_buffer(_WORDS32, b)
    _lib.mk_ring32_matmul(_from_buffer(_WORDS32, out, True), left, right, m, k, n, int(add))
    return out


def _rss(kernel: str, x: U64, y: U64, alpha: U64) -> U64:
    trailing = alpha.shape if isinstance(alpha, np.ndarray) else (None,)
    shape = _array("alpha", alpha, trailing)
    _array("x", x, (2, *shape))
    _array("y", y, (2, *shape))
    out = np.empty(shape, np.uint64)
    getattr(_lib, kernel)(_out(out), _in(x), _in(y), _in(alpha), out.size)
    return out


def rss_mul(x: U64, y: U64, alpha: U64) -> U64:
    """x0 y0 + x0 y1 + x1 y0 + alpha over Z_2^64: x, y (2, ...), alpha (...) -> (...)."""
    return _rss("mk_ring_rss_mul", x, y, alpha)


def rss_and(x: U64, y: U64, alpha: U64) -> U64:
    """x0 y0 + x0 y1 + x1 y0 + alpha over packed bits (& and ^): x, y (2, ...), alpha (...) -> (...)."""
    return _rss("mk_bits_rss_and", x, y, alpha)


# ---- packed bits ----


def bit_slice(x: U64, nbits: int) -> U64:
    """(.., n) -> (.., nbits, ceil(n/64)): bit l of plane b, word w of a row is bit b of its x[64 w + l];
    padding is zero.
    """
    *lead, n = _array("x", x, (*_leading("x", x), None))
    rows, packed = math.prod(lead), (_count("nbits", nbits, 1, WORD_BITS), _words(n))
    planes = np.empty((*lead, *packed), np.uint64)
    for row, out in zip(x.reshape(rows, n), planes.reshape(rows, *packed), strict=True):
        _lib.mk_bits_slice(_out(out), _in(row), n, nbits)
    return planes


def bit_unslice(planes: U64, n: int) -> U64:
    """(nbits, ceil(n/64)) -> (n,), the inverse of `bit_slice`; bits above nbits are zero."""
    _count("n", n, 0)
    nbits, _ = _array("planes", planes, (None, _words(n)))
    _count("nbits", nbits, 1, WORD_BITS)
    x = np.empty(n, np.uint64)
    _lib.mk_bits_unslice(_out(x), _in(planes), n, nbits)
    return x


def bytes_pack(x: U64, size: int) -> U64:
    """(n,) -> (ceil(n size / 8),): the `size` lowest bytes of each, the lowest first, one after another; what
    fills the last word is zero.
    """
    (n,) = _array("x", x, (None,))
    words = np.empty(-(-n * _count("size", size, 1, 8) // 8), np.uint64)
    _lib.mk_bytes_pack(_out(words), _in(x), n, size)
    return words


def bytes_unpack(words: U64, n: int, size: int, out: U64 | None = None) -> U64:
    """(ceil(n size / 8),) -> (n,), written to `out` if there is one: the inverse of `bytes_pack`, whatever
    fills the last word.
    """
    _array("words", words, (-(-_count("n", n, 0) * _count("size", size, 1, 8) // 8),))
    x = _room(out, (n,), words)
    _lib.mk_bytes_unpack(_out(x), _in(words), n, size)
    return x


def bits_to_ring(words: U64, n: int, out: U64 | None = None) -> U64:
    """(.., ceil(n/64)) -> (.., n) of 0 and 1, written to `out` if there is one: element 64 w + l of a row is
    bit l of its word w.
    """
    _count("n", n, 0)
    rows = _array("words", words, (*_leading("words", words), _words(n)))[:-1]
    out = _room(out, (*rows, n), words)
    _lib.mk_bits_to_ring(_out(out), _in(words), math.prod(rows), n)
    return out


def ring_lsb(x: U64) -> U64:
    """(.., n) -> (.., ceil(n/64)): the lowest bits of each row, packed; padding is zero."""
    *rows, n = _array("x", x, (*_leading("x", x), None))
    out = np.empty((*rows, _words(n)), np.uint64)
    _lib.mk_ring_lsb(_out(out), _in(x), math.prod(rows), n)
    return out


def bit_pick(planes: U64, rows: U64) -> U64:
    """Planes (k, ceil(n/64)), rows (n,) below k -> (ceil(n/64),): lane i of plane rows[i]; padding is zero.

    planes are secret, rows public.
    """
    (n,) = _array("rows", rows, (None,))
    count, _ = _array("planes", planes, (None, _words(n)))
    if n and int(rows.max()) >= count:
        raise LocalError(f"rows must be below {count}")
    out = np.empty(_words(n), np.uint64)
    _lib.mk_bits_pick(_out(out), _in(planes), _in(rows), n)
    return out


# ---- look-up ----


def double_part(out: npt.NDArray[Any], e: npt.NDArray[Any], b: U64) -> None:
    """out += e0 b0 + e0 b1 + e1 b0, row by row: out (n, have), the first `have` entries of e (2, n, size),
    both of 64, 16 or 8 bits, b (2, n).
    """
    kind, words = _entries(e)
    kernels = {
        np.uint64: _lib.mk_ring_double_part,
        np.uint16: _lib.mk_half_double_part,
        np.uint8: _lib.mk_byte_double_part,
    }
    n, have = _array("out", out, (None, None), kind)
    _, _, size = _array("e", e, (2, n, None), kind)
    _array("b", b, (2, n))
    _count("have", have, 1, size)
    room = _from_buffer(words, out, True)
    kernels[kind](room, _from_buffer(words, e), n * size, _in(b), n, n, size, have)


def double(e: npt.NDArray[Any], high: npt.NDArray[Any]) -> None:
    """In each row of e (n, size) the entries from `have` on become high (n, have), and the first lose it. Of
    64, 16 or 8 bits.
    """
    kind, words = _entries(e)
    kernels = {np.uint64: _lib.mk_ring_double, np.uint16: _lib.mk_half_double, np.uint8: _lib.mk_byte_double}
    n, size = _array("e", e, (None, None), kind)
    _, have = _array("high", high, (n, None), kind)
    _count("have", have, 1, size // 2)
    if np.may_share_memory(e, high):
        raise LocalError("e overlaps high")
    kernels[kind](_from_buffer(words, e, True), _from_buffer(words, high), n, size, have)


def rotate(e: npt.NDArray[Any], c: U64) -> npt.NDArray[Any]:
    """out[.., i, j] = e[.., i, (c[i] - j) mod K]: e (.., n, K) of 64, 16 or 8 bits, c (n,) public. K is a
    power of two.
    """
    kind, words = _entries(e)
    kernels = {np.uint64: _lib.mk_ring_rotate, np.uint16: _lib.mk_half_rotate, np.uint8: _lib.mk_byte_rotate}
    lead = _leading("e", e)[:-1]
    n, size = _array("e", e, (*lead, None, None), kind)[-2:]
    _power_of_two("the last dimension of e", size)
    _array("c", c, (n,))
    out = np.empty(e.shape, e.dtype)
    flat = (math.prod(lead), n, size)
    for each, to in zip(e.reshape(flat), out.reshape(flat), strict=True):
        kernels[kind](_from_buffer(words, to, True), _from_buffer(words, each), _in(c), n, size)
    return out


# ---- local halves of online operations ----
# Shares come as arrays (parts, ..): each component dense, but not always adjacent to the next. `one` (parts,)
# holds the components of the public number 1. kernels.h states the formulas, ops.py why they are right.


Items: TypeAlias = Sequence[
    tuple[int, int, int, int]
]  # so many elements lose f bits, of which some are not opened, having been raised by 2^up


def trunc_mask(x: U64, r: U64, one: U64, items: Items) -> U64:
    """(x + raise >> bare) + (r >> bare), raise as kernels.h says: x and r (parts, n) -> (parts, n)."""
    parts, n = _dims("x", x, 2)
    out = np.empty((parts, n), np.uint64)
    _lib.mk_ring_trunc_mask(
        _out(out), *_apart("x", x, (parts, n)), *_apart("r", r, (parts, n)), *_items(one, items, parts, n)
    )
    return out


def trunc(base: U64, over: U64, one: U64, opened: U64, items: Items) -> U64:
    """a - base + b over, truncated values of what was opened (n,): (parts, n). over: (parts, n, 3)."""
    parts, n = _dims("base", base, 2)
    _array("opened", opened, (n,))
    first, *rest = _items(one, items, parts, n)
    out = np.empty((parts, n), np.uint64)
    _lib.mk_ring_trunc(
        _out(out),
        *_apart("base", base, (parts, n)),
        *_apart("over", over, (parts, n, 3)),
        first,
        _in(opened),
        *rest,
    )
    return out


def trunc_if(material: tuple[U64, U64, U64, U64], one: U64, bits: U64, opened: U64, items: Items) -> U64:
    """The same where a bit is set, 0 elsewhere: (parts, n). Material: ring and base (parts, n), over (parts,
    n, 3) and z (parts, n, 4); bits: opened words.
    """
    ring, base, over, z = material
    parts, n = _dims("ring", ring, 2)
    _array("bits", bits, (_words(n),))
    _array("opened", opened, (n,))
    first, *rest = _items(one, items, parts, n)
    out = np.empty((parts, n), np.uint64)
    _lib.mk_ring_trunc_if(
        _out(out),
        *_apart("ring", ring, (parts, n)),
        *_apart("base", base, (parts, n)),
        *_apart("over", over, (parts, n, 3)),
        *_apart("z", z, (parts, n, 4)),
        first,
        _in(bits),
        _in(opened),
        *rest,
    )
    return out


def _items(one: U64, items: Items, parts: int, n: int) -> tuple[Any, Any, int, int]:
    total = 0
    for size, f, bare, up in items:
        _dropped(f, bare, _count("up", up, 1, WORD_BITS - 3))
        total += _count("an item", size, 0)
    if total != n:
        raise LocalError(f"items are {total} elements, not {n}")
    return _one(one, parts), _in(np.array(items, np.uint64)), parts, len(items)


def norm(material: tuple[U64, U64, U64, U64], one: U64, opened: U64, f: int, bare: int) -> tuple[U64, U64]:
    """Truncated rows (parts, n, width) and the sums of their squares (parts, n). Material: base (parts, n,
    width), over and both (parts, n, width, 3) and q (parts, n); opened (n, width).
    """
    base, over, both, q = material
    parts, n, width = _dims("base", base, 3)
    _array("opened", opened, (n, width))
    _dropped(f, bare)
    rows, squares = np.empty((parts, n, width), np.uint64), np.empty((parts, n), np.uint64)
    _lib.mk_ring_norm(
        _out(rows),
        _out(squares),
        *_apart("base", base, (parts, n, width)),
        *_apart("over", over, (parts, n, width, 3)),
        *_apart("both", both, (parts, n, width, 3)),
        *_apart("q", q, (parts, n)),
        _one(one, parts),
        _in(opened),
        parts,
        n,
        width,
        f,
        bare,
    )
    return rows, squares


def drop(x: U64, one: U64, low: Sequence[int], width: int) -> U64:
    """x without `low` bits, modulo 2^width, for each of several `low`: (parts, n) -> (parts, len(low), n)."""
    parts, n = _dims("x", x, 2)
    for each in low:
        _count("low", each, 0, WORD_BITS - _count("width", width, 1, WORD_BITS))
    out = np.empty((parts, len(low), n), np.uint64)
    lows = np.array(low, np.uint64)
    _lib.mk_ring_drop(
        _out(out), *_apart("x", x, (parts, n)), _one(one, parts), _in(lows), parts, len(low), n, width
    )
    return out


def pieces(e: U64, opened: U64, turned: U64, rest: int, flags: int) -> U64:
    """Polynomials of opened values (g, n), less masks 2^rest u + v, of which e (parts, g, n, degree + 1, K)
    holds v^d at place u and 0 elsewhere: (parts, 1 + flags, g, n).

    turned (g, degree + 1 + flags, 2K) has the coefficients of each power of the remainder for each place, and
    then tables that are only read. Column j of it is column -j mod K of the tables. K is a power of two.
    """
    parts, groups, n, terms, size = _dims("e", e, 5)
    _power_of_two("the last dimension of e", size)
    _array("opened", opened, (groups, n))
    _count("flags", flags, 0)
    _count("degree", terms - 1, 0, MAX_DEGREE)
    _count("rest", rest, 0, WORD_BITS - 1)
    _array("turned", turned, (groups, terms + flags, 2 * size))
    out = np.empty((parts, 1 + flags, groups, n), np.uint64)
    rows, apart = _apart("e", e, (parts, groups, n, terms, size))
    _lib.mk_ring_pieces(
        _out(out), rows, apart, _in(opened), _in(turned), parts, groups, n, size, terms - 1, flags, rest
    )
    return out


def choose(hot: U64, z: U64, bits: U64, opened: U64, drops: Sequence[tuple[int, int]]) -> U64:
    """Of each row of opened (n, count) the value at which bits point, truncated, and 0 for the others:
    (parts, n, count).

    bits are words of lanes, count - 1 a row: the last that is set tells the value, the first if none is. They
    were opened under random ones, whose one-hots hot (parts, n, 2^count - 2) has, and z (parts, n,
    choose_places(count)) with what truncations take; of `drops` see `norm`'s f and bare.
    """
    n, count = _array("opened", opened, (None, len(drops)))
    _count("values", count, 2, MAX_CHOICES)
    for f, bare in drops:
        _dropped(f, bare)
    _array("bits", bits, (_words(n * (count - 1)),))
    parts = _dims("hot", hot, 3)[0]
    out = np.empty((parts, n, count), np.uint64)
    _lib.mk_ring_choose(
        _out(out),
        *_apart("hot", hot, (parts, n, (1 << count) - 2)),
        *_apart("z", z, (parts, n, choose_places(count))),
        _in(bits),
        _in(opened),
        _in(np.array(drops, np.uint64)),
        parts,
        n,
        count,
    )
    return out


def choose_places(count: int) -> int:
    """How many entries of z `choose` has for so many values."""
    return 4 * ((1 << count) - 2 + (1 << (count - 1)))


class Cosines:
    """Functions of an opened value o for `wave`: of each term k the real and the imaginary part of
    (re + i im) e^(2 pi i turns o / 2^bits) amplitude, rounded.
    """

    def __init__(self, turns: U64, bits: int, terms: Real, polynomials: Real) -> None:
        """terms (3, count): re, im, amplitude. polynomials (2, degree + 1): of cos(2 pi u) and of
        sin(2 pi u) / u in u^2, the highest power first.
        """
        (self.count,) = _array("turns", turns, (None,))
        _count("the number of turns", self.count, 1, MAX_TURNS)
        _reals("terms", terms, (3, self.count))
        self.degree = _reals("polynomials", polynomials, (2, None))[1] - 1
        self.bits = _count("bits", bits, 1, EXACT_BITS)
        _exact("amplitudes", terms[2])
        self.turns, self.terms, self.polynomials = turns, terms, polynomials


def wave(waves: U64, opened: U64, cosines: Cosines) -> U64:
    """Sums of products with functions of opened (n,): waves (parts, n, 2 count), of which the first half are
    multiplied by real parts -> (parts, n).
    """
    parts, n, _ = _dims("waves", waves, 3)
    _array("opened", opened, (n,))
    out = np.empty((parts, n), np.uint64)
    _lib.mk_ring_wave(
        _out(out),
        *_apart("waves", waves, (parts, n, 2 * cosines.count)),
        _in(opened),
        _in(cosines.turns),
        _from_buffer(_DOUBLES, cosines.terms),
        _from_buffer(_DOUBLES, cosines.polynomials),
        cosines.degree,
        parts,
        n,
        cosines.count,
        cosines.bits,
    )
    return out


class Bins:
    """Functions of an opened value for `decay`: at place j bins[u - j mod size] e^y, rounded, with u its bits
    from `rest` on, and y the lower ones times `factor`, less `offset`.
    """

    def __init__(self, bins: Real, rest: int, factor: float, offset: float, polynomial: Real) -> None:
        """bins (size,), a power of two; polynomial (degree + 1,), of e^y, the highest power first."""
        (self.size,) = _reals("bins", bins, (None,))
        _power_of_two("the number of bins", self.size)
        self.degree = _reals("polynomial", polynomial, (None,))[0] - 1
        self.rest = _count("rest", rest, 1, EXACT_BITS)
        _exact("bins", bins * 2.0 ** (2 * abs(offset)))  # e^y < 4^|offset|, where y is within the offset
        back = np.roll(bins[::-1], 1)
        self.turned, self.polynomial = np.concatenate([back, back]), polynomial
        self.factor, self.offset = factor, offset


def decay(e: U64, opened: U64, bins: Bins) -> U64:
    """Sums of products with functions of opened (n,): e (parts, n, size) -> (parts, n)."""
    parts, n, _ = _dims("e", e, 3)
    _array("opened", opened, (n,))
    out = np.empty((parts, n), np.uint64)
    _lib.mk_ring_decay(
        _out(out),
        *_apart("e", e, (parts, n, bins.size)),
        _in(opened),
        _from_buffer(_DOUBLES, bins.turned),
        _from_buffer(_DOUBLES, bins.polynomial),
        bins.degree,
        bins.factor,
        bins.offset,
        parts,
        n,
        bins.size,
        bins.rest,
    )
    return out


def bits_mask(bits: U64, ring: U64) -> U64:
    """Words of bits (parts, ceil(n/64)) ^ the lowest bits of ring (parts, n)."""
    parts, n = _dims("ring", ring, 2)
    out = np.empty((parts, _words(n)), np.uint64)
    packed, packed_apart = _apart("bits", bits, out.shape)
    _lib.mk_bits_mask(_out(out), packed, packed_apart, *_apart("ring", ring, (parts, n)), parts, n)
    return out


def ring_unmask(ring: U64, one: U64, bits: U64) -> U64:
    """ring (1 - 2 o) + o, of bits ring (parts, n) and words of opened bits o: (parts, n)."""
    parts, n = _dims("ring", ring, 2)
    _array("bits", bits, (_words(n),))
    out = np.empty((parts, n), np.uint64)
    _lib.mk_ring_unmask(_out(out), *_apart("ring", ring, (parts, n)), _one(one, parts), _in(bits), parts, n)
    return out


def ring_pick(w: U64, one: U64, delta: U64, bits: U64) -> U64:
    """Products of opened bits xor masks, and values times them: w (parts, n, 2^flags (m + 1) - 1), public
    delta (n, m) and words of bits (flags, ceil(n/64)) -> (parts, n, m + 1).

    A row of w has for each set of flags, in binary order, the product of their masks, and times this x (m);
    1, that of the empty set, is left out. What comes out is the product of all bits, and times that
    delta - x.
    """
    n, m = _array("delta", delta, (None, None))
    (flags, _) = _array("bits", bits, (None, _words(n)))
    _count("flags", flags, 1, MAX_FLAGS)
    parts, *_ = _dims("w", w, 3)
    out = np.empty((parts, n, m + 1), np.uint64)
    _lib.mk_ring_pick(
        _out(out),
        *_apart("w", w, (parts, n, ((m + 1) << flags) - 1)),
        _one(one, parts),
        _in(delta),
        _in(bits),
        parts,
        n,
        m,
        flags,
    )
    return out


def bits_at_most(planes: U64, sizes: Sequence[int], told: U64) -> U64:
    """Comparisons of a value, known by the one-hots of its digits, with public ones, digit by digit.

    planes (parts, rows, ceil(n/64)): 2^size rows for each digit, the lowest first; told (count, n) -> (parts,
    2 len(sizes) - 1, count, ceil(n/64)): the highest digit is less; digits are equal, from the highest to the
    second; they are less, from the second highest to the lowest, which may be equal as well.
    """
    parts, rows, _ = _dims("planes", planes, 3)
    count, n = _array("told", told, (None, None))
    for size in sizes:
        _count("size", size, 1, MAX_DIGIT)
    if not sizes or rows != sum(1 << size for size in sizes):
        raise LocalError("planes must have a row for each value of each digit")
    out = np.empty((parts, 2 * len(sizes) - 1, count, _words(n)), np.uint64)
    wanted = np.array(sizes, np.uint64)
    _lib.mk_bits_at_most(
        _out(out),
        *_rows_apart("planes", planes, (parts, rows, _words(n))),
        _in(wanted),
        _in(told),
        parts,
        len(sizes),
        count,
        n,
    )
    return out


class Products:
    """Which products of bits are wanted, and where `bits_products` finds what they take.

    Of each: its variables, and the rows of planes that hold the products of its subsets, the empty one left
    out, in binary order.
    """

    def __init__(self, wanted: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        plan: list[int] = []
        self.variables = self.rows = 0
        for variables, subsets in wanted:
            _count("variables", len(variables), 1, MAX_MONOMIAL)
            if len(subsets) != (1 << len(variables)) - 1:
                raise LocalError("a product takes a row for each subset of its variables but the empty one")
            plan += [len(variables), *variables, *subsets]
            self.variables = max(self.variables, 1 + max(variables))
            self.rows = max(self.rows, 1 + max(subsets))
        self.count = len(wanted)
        self.plan = np.array(plan, np.uint64)


def bits_products(planes: U64, one: U64, opened: U64, products: Products) -> U64:
    """Products over GF(2) of bits that were opened under others: planes (parts, rows, n), opened (variables,
    n) -> (parts, products, n).
    """
    parts, rows, n = _dims("planes", planes, 3)
    variables, _ = _array("opened", opened, (None, n))
    _count("rows", rows, products.rows)
    _count("variables", variables, products.variables)
    out = np.empty((parts, products.count, n), np.uint64)
    _lib.mk_bits_products(
        _out(out),
        *_rows_apart("planes", planes, (parts, rows, n)),
        _one(one, parts),
        _in(opened),
        _in(products.plan),
        parts,
        products.count,
        n,
    )
    return out


def _apart(name: str, value: Any, shape: tuple[int, ...]) -> tuple[Any, int]:
    """Where components begin, and how many words they lie apart. One that is not dense is copied."""
    if _dims(name, value, len(shape)) != shape:
        raise LocalError(f"{name} must have shape {shape}, not {value.shape}")
    first = value
    if not value.flags.c_contiguous:
        first = value[0]
        if not first.flags.c_contiguous:
            value = first = np.ascontiguousarray(value)
    return _from_buffer(_WORDS, first), value.strides[0] >> 3


def _rows_apart(name: str, value: Any, shape: tuple[int, ...]) -> tuple[Any, int, int]:
    """The same of components (rows, n), whose rows need not be adjacent either."""
    if _dims(name, value, len(shape)) != shape:
        raise LocalError(f"{name} must have shape {shape}, not {value.shape}")
    if not value.size:
        return _in(np.empty(0, np.uint64)), 0, 0
    first = value[0, 0]
    if not first.flags.c_contiguous:
        value = np.ascontiguousarray(value)
        first = value[0, 0]
    return _in(first), value.strides[0] >> 3, value.strides[1] >> 3


def _dims(name: str, value: Any, count: int) -> tuple[int, ...]:
    """The shape of an array of so many dimensions, of any layout."""
    if not isinstance(value, np.ndarray) or value.dtype != _DTYPES[np.uint64] or value.ndim != count:
        raise LocalError(f"{name} must be a uint64 array of {count} dimensions")
    shape: tuple[int, ...] = value.shape
    return shape


def _reals(name: str, value: Any, shape: Sequence[int | None]) -> tuple[int, ...]:
    """Check that it is an array of doubles that kernels can read; return the shape."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float64 or not value.flags.c_contiguous:
        raise LocalError(f"{name} must be a contiguous array of doubles")
    if not _fits(value.shape, shape) or not value.size:
        raise LocalError(f"{name} must not have shape {value.shape}")
    return value.shape


def _exact(name: str, value: Real) -> None:
    if not np.all(np.abs(value) < 2.0 ** (EXACT_BITS - 1)):
        raise LocalError(f"{name} are too large to be rounded to integers")


def _one(value: Any, parts: int) -> Any:
    _array("one", value, (parts,))
    return _in(value)


def _dropped(f: int, bare: int, up: int = WORD_BITS - 3) -> None:
    _count("bare", bare, 0, _count("f", f, 1, up) - 1)


# ---- GF(2^64) = GF(2)[x] / (x^64 + x^4 + x^3 + x + 1) ----


def gf_mul(a: U64, b: U64) -> U64:
    """a_j b_j: (n,), (n,) -> (n,)."""
    (n,) = _array("a", a, (None,))
    _array("b", b, (n,))
    out = np.empty(n, np.uint64)
    _lib.mk_gf_mul(_out(out), _in(a), _in(b), n)
    return out


def gf_scale(a: U64, s: int) -> U64:
    """a_j s: (n,) -> (n,)."""
    (n,) = _array("a", a, (None,))
    out = np.empty(n, np.uint64)
    _lib.mk_gf_scale(_out(out), _in(a), _word("s", s), n)
    return out


def gf_inner(a: U64, b: U64) -> int:
    """Sum of a_j b_j."""
    (n,) = _array("a", a, (None,))
    _array("b", b, (n,))
    out = _ffi.new("uint64_t *")
    _lib.mk_gf_inner(out, _in(a), _in(b), n)
    return int(out[0])


def gf_fold(a: U64, xi: int, out: U64 | None = None) -> U64:
    """lo + xi (lo + hi), the halves of a: (n,), n even -> (n/2,), written to `out` if there is one."""
    (n,) = _array("a", a, (None,))
    if n % 2:
        raise LocalError(f"a must have an even length, not {n}")
    out = _room(out, (n // 2,), a)
    _lib.mk_gf_fold(_out(out), _in(a), _word("xi", xi), n // 2)
    return out


def gf_cross(x: Sequence[U64], y: Sequence[U64], planes: U64) -> U64:
    """Folded products of replicated bits: x, y of two components (n, rows), words; planes (64, n) public ->
    (crosses(rows),).

    Halve the rows again and again, into low half, high half and their difference: out has one element for
    each of the 3^levels results that took a difference, the sum over lanes of the products' bit times the
    element whose bit s is the lane of plane s.
    """
    n, rows = _cross_arrays(x, y)
    _array("planes", planes, (WORD_BITS, n))
    out = np.empty(crosses(rows), np.uint64)
    _lib.mk_gf_cross(_out(out), _in(x[0]), _in(x[1]), _in(y[0]), _in(y[1]), _in(planes), rows, n)
    return out


def gf_combine(x: U64, planes: U64) -> U64:
    """Sum over columns and lanes of the elements (see gf_cross) where the bit is set: x (n, rows) ->
    (rows,).
    """
    n, rows = _array("x", x, (None, None))
    _count("rows", rows, 1, MAX_ROWS)
    _array("planes", planes, (WORD_BITS, n))
    out = np.empty(rows, np.uint64)
    _lib.mk_gf_combine(_out(out), _in(x), _in(planes), rows, n)
    return out


def gf_blend(x: U64, w: U64) -> U64:
    """Sum of w_i over the set bits of each lane: x (n, rows) words, w (rows,) public -> (64 n,)."""
    n, rows = _array("x", x, (None, None))
    _count("rows", rows, 1, MAX_ROWS)
    _array("w", w, (rows,))
    out = np.empty(WORD_BITS * n, np.uint64)
    _lib.mk_gf_blend(_out(out), _in(x), _in(w), rows, n)
    return out


def crosses(rows: int) -> int:
    """Results of gf_cross and gr_cross for 2^levels rows: 3^levels - 2^levels."""
    return int(3 ** (rows.bit_length() - 1) - rows)


def _cross_arrays(x: Sequence[U64], y: Sequence[U64], alone: bool = False) -> tuple[int, ...]:
    if len(x) != len(y) or len(x) not in ((1, 2) if alone else (2,)):
        raise LocalError("x and y must have two components")
    shape = _array("x", x[0], (None, None))
    _power_of_two("rows", _count("rows", shape[1], 1, MAX_ROWS))
    for name, values in (("x", x[1:]), ("y", y)):
        for value in values:
            _array(name, value, shape)
    return shape


# ---- GR(2^64, 48) = Z_2^64[X] / (X^48 + X^5 + X^3 + X^2 + 1) ----
# A full element is 48 words, word i the coefficient of X^i. A "01" element has coefficients 0 and 1, packed
# in one word, bit i for X^i; its bits 48 and up are ignored.


def gr_inner(a: U64, b: U64) -> U64:
    """Sum of a_j b_j: (n, 48), (n, 48) -> (48,)."""
    n, _ = _array("a", a, (None, GR_DEGREE))
    _array("b", b, (n, GR_DEGREE))
    out = np.empty(GR_DEGREE, np.uint64)
    _lib.mk_gr_inner(_out(out), _in(a), _in(b), n)
    return out


def gr_mul01(a: U64, r: U64) -> U64:
    """a_j r_j: a (n, 48), r (n,) 01 elements -> (n, 48)."""
    n, _ = _array("a", a, (None, GR_DEGREE))
    _array("r", r, (n,))
    out = np.empty((n, GR_DEGREE), np.uint64)
    _lib.mk_gr_mul01(_out(out), _in(a), _in(r), n)
    return out


def gr_fold(a: U64, xi: int) -> U64:
    """lo + xi (hi - lo), the halves of a; xi a 01 element: (n, 48), n even -> (n/2, 48)."""
    n, _ = _array("a", a, (None, GR_DEGREE))
    if n % 2:
        raise LocalError(f"a must have an even length, not {n}")
    out = np.empty((n // 2, GR_DEGREE), np.uint64)
    _lib.mk_gr_fold(_out(out), _in(a), _word("xi", xi, GR_DEGREE), n // 2)
    return out


def gr_halves(parts: Sequence[U64 | None], n: int) -> U64:
    """A party's parts of <a, w> over lower halves, and over upper less lower halves, of components a_0, a_1,
    w_0, w_1 (n, 48), n even, None for one that is zero -> (2, 48).
    """
    components = _components("parts", parts, n)
    out = np.empty((2, GR_DEGREE), np.uint64)
    _lib.mk_gr_halves(_out(out), *(_NOTHING if v is None else _in(v) for v in components), n // 2)
    return out


def gr_fold_block(kept: Sequence[U64 | None], n: int, more: Sequence[U64 | None], m: int, xi: int) -> U64:
    """Fold such components (n, 48) in place, and (m, 48), m <= n, to behind them: (n + m) / 2 rows, and a
    row of zeros if that is odd. Gives the halves of these, as `gr_halves`. Both n and m are even; where
    `kept` has none, `more` has none, and they do not overlap.
    """
    first, second = _components("kept", kept, n), _components("more", more, m)
    if m > n or any(a is None and b is not None for a, b in zip(first, second, strict=True)):
        raise LocalError("more has more than kept")
    if not all(v is None or v.flags.writeable for v in first):
        raise LocalError("kept must be writable")
    out = np.empty((2, GR_DEGREE), np.uint64)
    _lib.mk_gr_fold_block(
        _out(out),
        *(_NOTHING if v is None else _out(v) for v in first),
        *(_NOTHING if v is None else _in(v) for v in second),
        _word("xi", xi, GR_DEGREE),
        n // 2,
        m // 2,
    )
    return out


def _components(name: str, parts: Sequence[U64 | None], n: int) -> Sequence[U64 | None]:
    if len(parts) != 4:
        raise LocalError(f"{name} must be the components of two shares, not {len(parts)}")
    for value in parts:
        if value is not None:
            _array(name, value, (n, GR_DEGREE))
    if n % 2:
        raise LocalError(f"{name} must have an even length, not {n}")
    return parts


def gr_scale01(x: U64, r: U64) -> U64:
    """x_j r_j: x (n,) ring words, r (n,) 01 elements -> (n, 48)."""
    (n,) = _array("x", x, (None,))
    _array("r", r, (n,))
    out = np.empty((n, GR_DEGREE), np.uint64)
    _lib.mk_gr_scale01(_out(out), _in(x), _in(r), n)
    return out


def gr_combine(x: U64, r: U64, out: U64 | None = None) -> U64:
    """sum_j x[i, j] r_j: x (m, n) ring words, r (n,) 01 elements -> (m, 48), written to `out` if there is
    one.
    """
    m, n = _array("x", x, (None, None))
    _array("r", r, (n,))
    out = _room(out, (m, GR_DEGREE), x, r)
    _lib.mk_gr_combine(_out(out), _in(x), _in(r), m, n)
    return out


def gr_combine32(x: U32, r: U64, out: U64 | None = None) -> U64:
    """`gr_combine` of words of 32 bits, as numbers from 0 to 2^32 - 1."""
    m, n = _array("x", x, (None, None), np.uint32)
    _array("r", r, (n,))
    out = _room(out, (m, GR_DEGREE), x, r)
    _lib.mk_gr_combine32(_out(out), _from_buffer(_WORDS32, x), _in(r), m, n)
    return out


def gr_combine_cols(x: U64, r: U64) -> U64:
    """sum_i x[i, j] r_i: x (m, n) ring words, r (m,) 01 elements -> (n, 48)."""
    m, n = _array("x", x, (None, None))
    _array("r", r, (m,))
    out = np.empty((n, GR_DEGREE), np.uint64)
    _lib.mk_gr_combine_cols(_out(out), _in(x), _in(r), m, n)
    return out


def gr_cross(x: Sequence[U64], y: Sequence[U64], r: U64) -> U64:
    """Folded products of replicated ring words: x, y of two components (n, rows), r (n,) 01 elements ->
    (crosses(rows), 48).

    As gf_cross: sums over n of r_g times x0 y0 + x0 y1 + x1 y0 of each result that took a difference. Or of
    x0 y0, if x and y have that component alone.
    """
    n, rows = _cross_arrays(x, y, alone=True)
    _array("r", r, (n,))
    out = np.empty((crosses(rows), GR_DEGREE), np.uint64)
    x1, y1 = (_in(v[1]) if len(v) == 2 else _NOTHING for v in (x, y))
    _lib.mk_gr_cross(_out(out), _in(x[0]), x1, _in(y[0]), y1, _in(r), rows, n)
    return out


def gr_hot(a: U64, w: U64, columns: U64, e: npt.NDArray[Any], b: U64, q: U64, r: U64) -> None:
    """Of one component of one-hots e (n, K), of 64 or 16 bits, and of their bits b (k, n), with 01
    elements q (K,) and r (n,): a_i = r_i sum_t b[t, i] X^t and w_i = sum_j e[i, j] q_j, both (n, 48), and
    columns_j = sum_i e[i, j] r_i (K, 48). K is at most MAX_ENTRIES, k at most 48.
    """
    kind, words = _entries(e)
    n, size = _array("e", e, (None, None), kind)
    bits, _ = _array("b", b, (None, n))
    _count("the second dimension of e", size, 0, MAX_ENTRIES)
    _count("the first dimension of b", bits, 0, GR_DEGREE)
    for name, value, length in (("q", q, size), ("r", r, n)):
        _array(name, value, (length,))
    for rows, out in ((n, a), (n, w), (size, columns)):
        _room(out, (rows, GR_DEGREE), e, b, q, r)
    if kind is np.uint8:
        raise LocalError("e of bytes is for gr8_hot")
    kernels = {np.uint64: _lib.mk_gr_hot, np.uint16: _lib.mk_gr_half_hot}
    entries = _from_buffer(words, e)
    kernels[kind](_out(a), _out(w), _out(columns), entries, _in(b), _in(q), _in(r), n, size, bits)


# ---- GR(2^8, 48), the same ring modulo 2^8 ----
# Of n elements GROUP are a group, (48, GROUP) bytes, lane by lane; the last one has zeros where none is left.


def gr8_hot(e: U8, b: U64, q: U64, r: U64, a: U8, w: U8, columns: U8) -> None:
    """As gr_hot, of bytes e (n, K), and of b (k, n) the lowest 8 bits: a and w are groups, (ceil(n / GROUP),
    48, GROUP), and columns is (48, K).
    """
    n, size = _array("e", e, (None, None), np.uint8)
    bits, _ = _array("b", b, (None, n))
    _count("the second dimension of e", size, 0, MAX_ENTRIES)
    _count("the first dimension of b", bits, 0, GR_DEGREE)
    for name, value, length in (("q", q, size), ("r", r, n)):
        _array(name, value, (length,))
    groups = (-(-n // GROUP), GR_DEGREE, GROUP)
    for shape, out in ((groups, a), (groups, w), ((GR_DEGREE, size), columns)):
        _room(out, shape, e, b, q, r, dtype=np.uint8)
    bytes_of = [_from_buffer(_BYTES, v, True) for v in (a, w, columns)]
    _lib.mk_gr8_hot(*bytes_of, _from_buffer(_BYTES, e), _in(b), _in(q), _in(r), n, size, bits)


def gr8_fold(a: U8, xi: int, out: U8 | None = None) -> U8:
    """As gr_fold, of an even number of groups: (2 n, 48, GROUP) -> (n, 48, GROUP)."""
    n, *_ = _array("a", a, (None, GR_DEGREE, GROUP), np.uint8)
    if n % 2:
        raise LocalError(f"a must have an even number of groups, not {n}")
    out = _room(out, (n // 2, GR_DEGREE, GROUP), a, dtype=np.uint8)
    word = _word("xi", xi, GR_DEGREE)
    _lib.mk_gr8_fold(_from_buffer(_BYTES, out, True), _from_buffer(_BYTES, a), word, n // 2)
    return out


def gr8_inner(a: U8, b: U8) -> U64:
    """Sum of a_j b_j over all elements of groups (n, 48, GROUP): (48,) words below 2^8."""
    n, *_ = _array("a", a, (None, GR_DEGREE, GROUP), np.uint8)
    _array("b", b, (n, GR_DEGREE, GROUP), np.uint8)
    out = np.empty(GR_DEGREE, np.uint64)
    _lib.mk_gr8_inner(_out(out), _from_buffer(_BYTES, a), _from_buffer(_BYTES, b), n)
    return out


# ---- bytes ----


def wipe(arr: npt.NDArray[Any] | bytearray | memoryview) -> None:
    """Zero the memory, in a way no compiler drops. Copies that Python or NumPy made elsewhere stay."""
    try:
        view = _ffi.from_buffer("uint8_t[]", arr, require_writable=True)
    except (BufferError, TypeError, ValueError) as error:
        raise LocalError("only writable, contiguous memory can be wiped") from error
    _lib.mk_bytes_wipe(view, len(view))
