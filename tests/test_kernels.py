"""Every kernel at every level against Python integers, on random and on edge values.

The oracles below share no code with the kernels: GF and GR products are schoolbook polynomial arithmetic on
Python integers, matrix products are sums of Python products, AES is another library's.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mimir import kernels as k
from mimir.errors import LocalError
from mimir.kernels import build
from mimir.mpc import waves

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
M = 1 << 64
ONES = M - 1
GF_TAIL = 0b11011
GR_TAIL = (0, 2, 3, 5)  # X^48 = -(X^5 + X^3 + X^2 + 1)
LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 200)
EDGES = np.array(
    [0, 1, 2, 3, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, ONES - 1, ONES], np.uint64
)


def words(rng: np.random.Generator, *shape: int) -> U64:
    """Random words, a third of them from the edges."""
    x = rng.integers(0, M, shape, dtype=np.uint64)
    return np.where(rng.random(shape) < 0.3, rng.choice(EDGES, shape), x).astype(np.uint64)


def words32(rng: np.random.Generator, *shape: int) -> U32:
    """The upper halves of random words, edges among them."""
    return (words(rng, *shape) >> np.uint64(32)).astype(np.uint32)


def u64(values: Any) -> U64:
    return np.array(values, dtype=np.uint64)


def same(got: U64, want: Any) -> None:
    want = u64(want).reshape(got.shape)
    assert got.dtype == np.uint64
    np.testing.assert_array_equal(got, want)


def refuses(*calls: Callable[[], object]) -> None:
    for call in calls:
        with pytest.raises(LocalError):
            call()


# ---- oracles ----


def o_matmul(a: U64, b: U64) -> list[list[int]]:
    columns = b.T.tolist()
    return [
        [sum(x * y for x, y in zip(row, column, strict=True)) % M for column in columns] for row in a.tolist()
    ]


def o_gf_mul(a: int, b: int) -> int:
    p = 0
    for i in range(64):
        if b >> i & 1:
            p ^= a << i
    for i in range(126, 63, -1):
        if p >> i & 1:
            p ^= (1 << i) ^ (GF_TAIL << (i - 64))
    return p


def o_gr_mul(a: list[int], b: list[int]) -> list[int]:
    p = [0] * 95
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            p[i + j] += x * y
    for i in range(94, 47, -1):
        for t in GR_TAIL:
            p[i - 48 + t] -= p[i]
    return [v % M for v in p[:48]]


def o_01(r: int) -> list[int]:
    return [r >> i & 1 for i in range(48)]


def o_add(a: list[int], b: list[int]) -> list[int]:
    return [(x + y) % M for x, y in zip(a, b, strict=True)]


def o_sub(a: list[int], b: list[int]) -> list[int]:
    return [(x - y) % M for x, y in zip(a, b, strict=True)]


def ints(x: U64) -> Any:
    return x.tolist()


def bit(packed: U64, j: int) -> int:
    return int(packed[j // 64]) >> (j % 64) & 1


def pack(bits: list[int]) -> list[int]:
    return [sum(b << i for i, b in enumerate(bits[w : w + 64])) for w in range(0, len(bits), 64)]


# ---- levels ----


def test_level_fixture_forces(level: str) -> None:
    assert k.level() == level


def test_levels_are_ordered_and_forcible() -> None:
    have = k.available()
    assert have[0] == "ref" and k.level() in have
    with pytest.raises(LocalError, match="not one of"):
        k.force("sse9")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package and this file."""
    here = Path(__file__).parent
    path = os.pathsep.join((str(here.parent), str(here), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", k.available())
def test_environment_forces_level(name: str) -> None:
    run = python("from mimir import kernels; print(kernels.level())", **{k.LEVEL_VARIABLE: name})
    assert run.stdout.strip() == name


def test_environment_with_unknown_level_is_refused() -> None:
    run = python("import mimir.kernels", **{k.LEVEL_VARIABLE: "fast"})
    assert run.returncode != 0 and k.LEVEL_VARIABLE in run.stderr and "fast" in run.stderr


# ---- PRG ----


# FIPS 197 appendix C.3; NIST SP 800-38A F.5.5, where it tells the key stream apart as "output block".
PRG_VECTORS = [
    (
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
        0x0011223344556677,
        0x8899AABBCCDDEEFF,
        "8ea2b7ca516745bfeafc49904b496089",
    ),
    (
        "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        0xF0F1F2F3F4F5F6F7,
        0xF8F9FAFBFCFDFEFF,
        "0bdf7df1591716335e9a8b15c860c502"
        "5a6e699d536119065433863c8f657b94"
        "1bc12c9c01610d5d0d8bd6a3378eca62"
        "2956e1c8693536b1bee99c73a31576b6",
    ),
]


def o_prg(key: bytes, stream: int, n: int, block: int) -> bytes:
    first = stream.to_bytes(8, "big") + block.to_bytes(8, "big")
    return Cipher(algorithms.AES(key), modes.CTR(first)).encryptor().update(bytes(n))


@pytest.mark.parametrize(("key", "stream", "block", "want"), PRG_VECTORS)
def test_prg_gives_published_blocks(level: str, key: str, stream: int, block: int, want: str) -> None:
    out = np.zeros(len(want) // 2, np.uint8)
    k.prg(bytes.fromhex(key), stream, out, block)
    assert out.tobytes().hex() == want


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513, 2048, 5000])
@pytest.mark.parametrize("block", [0, 1, (1 << 32) - 3, (1 << 64) - 313])
def test_prg_is_aes_256_in_counter_mode(level: str, n: int, block: int) -> None:
    key = bytes(range(1, 33))
    stream = 0x0123456789ABCDEF
    out = np.full(n + 8, 0xA5, np.uint8)
    k.prg(key, stream, out[:n], block)
    assert out[:n].tobytes() == o_prg(key, stream, n, block)
    assert (out[n:] == 0xA5).all(), "wrote past the end"


def test_the_last_block_is_not_followed_by_the_next_stream(level: str) -> None:
    """Counting stops at 64 bits, for what is generated side by side as for what is asked for."""
    out = np.zeros(24, np.uint8)
    k.prg(bytes(32), 1, out[:16], M - 1)
    assert out.tobytes() == o_prg(bytes(32), 1, 16, M - 1) + bytes(8)
    refuses(lambda: k.prg(bytes(32), 1, out, M - 1), lambda: k.prg(bytes(32), 1, out[:17], M - 1))


def generators() -> list[str]:
    """Of the library, all that this processor can run: avx2 has two, and the level shows one of them."""
    names = k.available()
    if "avx2" in names and " vaes " in Path("/proc/cpuinfo").read_text():
        names.append("vaes")
    return names


@pytest.mark.parametrize("name", generators())
def test_every_generator_gives_the_same_anywhere_in_memory(name: str, rng: np.random.Generator) -> None:
    """Random keys, streams, blocks, lengths and places, each function of the library called by itself."""
    run = ctypes.CDLL(str(build.HERE / build.LIBRARY))[f"mk_prg_aes_{name}"]
    run.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]
    run.restype = None
    for n in rng.integers(0, 3000, 200).tolist():
        key, at = rng.bytes(32), int(rng.integers(0, 65))
        stream, block = (int(each) for each in rng.integers(0, M - 300, 2, np.uint64))
        room = np.full(at + n + 64, 0xA5, np.uint8)
        run(room.ctypes.data + at, n, key, stream, block)
        assert room[at : at + n].tobytes() == o_prg(key, stream, n, block)
        assert (room[:at] == 0xA5).all() and (room[at + n :] == 0xA5).all()


def test_prg_fills_any_dtype_and_continues(level: str) -> None:
    whole = np.zeros((6, 64), np.uint64)
    k.prg(b"k" * 32, 5, whole)
    part = np.zeros(64, np.uint64)
    k.prg(memoryview(bytearray(b"k" * 32)), 5, part, 2 * part.nbytes // k.BLOCK_BYTES)
    same(part, whole[2])


def test_prg_misuse() -> None:
    out = np.zeros(4, np.uint64)
    frozen = out.copy()
    frozen.flags.writeable = False
    for arguments in [
        (b"short", 0, out),
        (bytes(32), -1, out),
        (bytes(32), M, out),
        (bytes(32), 0, out, M),
        (bytes(32), 0, frozen),
        (bytes(32), 0, np.zeros((4, 4), np.uint64)[:, 1]),
        (bytes(32), 0, np.zeros(3, object)),
        (bytes(32), 0, bytearray(8)),
    ]:
        with pytest.raises(LocalError):
            k.prg(*arguments)  # type: ignore[arg-type]


# ---- Z_2^64 ----

SHAPES = [
    (0, 3, 2),
    (2, 0, 3),
    (2, 3, 0),
    (1, 1, 1),
    (1, 7, 9),
    (1, 8, 8),
    (1, 17, 33),
    (1, 40, 250),
    (2, 9, 5),
    (3, 8, 24),
    (5, 20, 31),
    (6, 16, 17),
    (7, 5, 3),
    (8, 64, 24),
    (9, 65, 25),
    (13, 70, 49),
    (17, 3, 200),
    (23, 130, 7),
    (4, 33, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_matmul(level: str, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    m, n_in, n = shape
    a, b = words(rng, m, n_in), words(rng, n_in, n)
    want = u64(o_matmul(a, b)).reshape(m, n)
    same(k.matmul(a, b), want)
    same(k.matmul_nt(a, np.ascontiguousarray(b.T)), want)
    start = words(rng, m, n)
    for product, right in ((k.matmul, b), (k.matmul_nt, np.ascontiguousarray(b.T))):
        out = start.copy()
        assert product(a, right, out=out) is out
        same(out, want)
        out = start.copy()
        product(a, right, out=out, add=True)
        same(out, start + want)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (3, 1, 9, 11), (2, 5, 8, 26), (2, 9, 4, 30)])
def test_matmul_batched(level: str, rng: np.random.Generator, shape: tuple[int, int, int, int]) -> None:
    batch, m, n_in, n = shape
    a, b = words(rng, batch, m, n_in), words(rng, batch, n_in, n)
    want = u64([o_matmul(x, y) for x, y in zip(a, b, strict=True)]).reshape(batch, m, n)
    same(k.matmul(a, b), want)
    turned = np.ascontiguousarray(b.transpose(0, 2, 1))
    same(k.matmul_nt(a, turned), want)
    for product, right in ((k.matmul, b), (k.matmul_nt, turned)):  # where more lies between matrices
        wide = words(rng, batch, right.shape[1] + 3, right.shape[2])
        wide[:, 1:-2] = right
        same(product(a, wide[:, 1:-2]), want)
        same(product(a, np.repeat(right, 2, axis=2)[:, :, ::2]), want)


@pytest.mark.parametrize("m", [1, 2, 6, 7, 19])
def test_matmul_wider_than_its_blocks(level: str, rng: np.random.Generator, m: int) -> None:
    a, b = words(rng, m, 150), words(rng, 150, 2100)
    same(k.matmul(a, b), a @ b)  # NumPy's product wraps too
    same(k.matmul_nt(a, np.ascontiguousarray(b.T)), a @ b)


def test_matmul_all_ones(level: str) -> None:
    a, b = np.full((9, 65), ONES, np.uint64), np.full((65, 26), ONES, np.uint64)
    same(k.matmul(a, b), np.full((9, 26), 65))
    same(k.matmul(a[:1], b), np.full((1, 26), 65))


def test_matmul_reads_a_read_only_memmap(level: str, rng: np.random.Generator, tmp_path: Any) -> None:
    b = words(rng, 20, 30)
    b.tofile(tmp_path / "b")
    mapped = np.memmap(tmp_path / "b", np.uint64, "r", shape=(20, 30))
    a = words(rng, 1, 20)
    same(k.matmul(a, mapped), a @ b)


def test_matmul_misuse(rng: np.random.Generator) -> None:
    a, b = words(rng, 3, 4), words(rng, 4, 5)
    square = words(rng, 4, 4)
    frozen = np.empty((3, 5), np.uint64)
    frozen.flags.writeable = False
    with pytest.raises(LocalError, match="overlap"):
        k.matmul(square, square, out=square)
    room = words(rng, 40)
    with pytest.raises(LocalError, match="overlap"):
        k.matmul(room[:16].reshape(4, 4), square, out=room[8:24].reshape(4, 4))
    with pytest.raises(LocalError, match="writable"):
        k.matmul(a, b, out=frozen)
    with pytest.raises(LocalError, match="add needs out"):
        k.matmul(a, b, add=True)
    for left, right in [
        (a, a),
        (a.astype(np.int64), b),
        (a.T, a),
        (a, words(rng, 8, 10)[::2, ::2]),
        (a[0], b),
        (a.tolist(), b),
        (a, b[None]),
    ]:
        with pytest.raises(LocalError):
            k.matmul(left, right)
    with pytest.raises(LocalError):
        k.matmul(a, b, out=np.empty((3, 6), np.uint64))
    with pytest.raises(LocalError):
        k.matmul_nt(a, b)


@pytest.mark.parametrize("shape", [*SHAPES, (16, 9, 40), (33, 131, 70), (1, 37, 4100), (17, 5, 300)])
def test_matmul32(level: str, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    m, n_in, n = shape
    a, b, start = words32(rng, m, n_in), words32(rng, n_in, n), words32(rng, m, n)
    want = (u64(o_matmul(a, b)).reshape(m, n) % np.uint64(1 << 32)).astype(np.uint32)
    got = k.matmul32(a, b)
    assert got.dtype == np.uint32
    np.testing.assert_array_equal(got, want)
    out = start.copy()
    assert k.matmul32(a, b, out=out) is out
    np.testing.assert_array_equal(out, want)
    out = start.copy()
    k.matmul32(a, b, out=out, add=True)
    np.testing.assert_array_equal(out, start + want)


@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 35])
def test_matmul32_wider_and_deeper_than_its_blocks(level: str, rng: np.random.Generator, m: int) -> None:
    a, b = words32(rng, m, 270), words32(rng, 270, 4109)
    np.testing.assert_array_equal(k.matmul32(a, b), a @ b)


def test_matmul32_all_ones(level: str) -> None:
    a, b = np.full((9, 65), (1 << 32) - 1, np.uint32), np.full((65, 26), (1 << 32) - 1, np.uint32)
    np.testing.assert_array_equal(k.matmul32(a, b), np.full((9, 26), 65))
    np.testing.assert_array_equal(k.matmul32(a[:1], b), np.full((1, 26), 65))


def test_matmul32_misuse(rng: np.random.Generator) -> None:
    a, b, square = words32(rng, 3, 4), words32(rng, 4, 5), words32(rng, 4, 4)
    frozen = np.empty((3, 5), np.uint32)
    frozen.flags.writeable = False
    with pytest.raises(LocalError, match="overlap"):
        k.matmul32(square, square, out=square)
    with pytest.raises(LocalError, match="writable"):
        k.matmul32(a, b, out=frozen)
    with pytest.raises(LocalError, match="add needs out"):
        k.matmul32(a, b, add=True)
    refuses(
        lambda: k.matmul32(a, a),
        lambda: k.matmul32(a.astype(np.uint64), b.astype(np.uint64)),  # type: ignore[arg-type]
        lambda: k.matmul32(a, b.astype(np.int32)),  # type: ignore[arg-type]
        lambda: k.matmul(a, b),  # type: ignore[arg-type]
        lambda: k.matmul32(a.T, a),
        lambda: k.matmul32(a, words32(rng, 8, 10)[::2, ::2]),
        lambda: k.matmul32(a[None], b[None]),
        lambda: k.matmul32(a[0], b),
        lambda: k.matmul32(a, b, out=np.empty((3, 6), np.uint32)),
        lambda: k.matmul32(a, b, out=np.empty((3, 5), np.uint64)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_rss(level: str, rng: np.random.Generator, n: int) -> None:
    x, y, alpha = words(rng, 2, n), words(rng, 2, n), words(rng, n)
    (x0, x1), (y0, y1) = ints(x), ints(y)
    same(
        k.rss_mul(x, y, alpha),
        [(a * c + a * d + b * c + z) % M for a, b, c, d, z in zip(x0, x1, y0, y1, ints(alpha), strict=True)],
    )
    same(
        k.rss_and(x, y, alpha),
        [(a & c) ^ (a & d) ^ (b & c) ^ z for a, b, c, d, z in zip(x0, x1, y0, y1, ints(alpha), strict=True)],
    )


def test_rss_keeps_trailing_shape(level: str, rng: np.random.Generator) -> None:
    x, y, alpha = words(rng, 2, 3, 4), words(rng, 2, 3, 4), words(rng, 3, 4)
    assert k.rss_mul(x, y, alpha).shape == (3, 4)
    same(k.rss_mul(x, y, alpha), k.rss_mul(x.reshape(2, 12), y.reshape(2, 12), alpha.ravel()))
    for wrong in [(x, y, alpha.ravel()), (x[:1], y, alpha), (x, y[0], alpha), (x, y, 3)]:
        with pytest.raises(LocalError):
            k.rss_and(*wrong)  # type: ignore[arg-type]


# ---- packed bits ----


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("nbits", [1, 2, 17, 63, 64])
def test_bit_slice(level: str, rng: np.random.Generator, n: int, nbits: int) -> None:
    x = words(rng, n)
    planes = k.bit_slice(x, nbits)
    same(planes, [pack([v >> b & 1 for v in ints(x)]) for b in range(nbits)])
    low = (1 << nbits) - 1
    dirty = planes.copy()
    if n % 64:
        dirty[:, -1] |= np.uint64((ONES << (n % 64)) & ONES)  # input padding is ignored
    same(k.bit_unslice(dirty, n), [v & low for v in ints(x)])
    rows = words(rng, 2, 3, n)
    same(k.bit_slice(rows, nbits), [[k.bit_slice(row.copy(), nbits) for row in part] for part in rows])


@pytest.mark.parametrize("n", LENGTHS)
def test_bits_and_ring(level: str, rng: np.random.Generator, n: int) -> None:
    x = words(rng, n)
    packed = k.ring_lsb(x)
    same(packed, pack([v & 1 for v in ints(x)]))
    dirty = words(rng, (n + 63) // 64)
    same(k.bits_to_ring(dirty, n), [bit(dirty, j) for j in range(n)])
    rows, packed = words(rng, 2, 3, n), words(rng, 2, 3, (n + 63) // 64)
    same(k.ring_lsb(rows), [[k.ring_lsb(row.copy()) for row in part] for part in rows])
    same(k.bits_to_ring(packed, n), [[k.bits_to_ring(row.copy(), n) for row in part] for part in packed])


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("count", [1, 2, 33])
def test_bit_pick(level: str, rng: np.random.Generator, n: int, count: int) -> None:
    planes, rows = words(rng, count, (n + 63) // 64), words(rng, n) % np.uint64(count)
    same(k.bit_pick(planes, rows), pack([bit(planes[int(rows[j])], j) for j in range(n)]))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 64, 1001])
def test_numbers_of_fewer_bytes(level: str, rng: np.random.Generator, n: int) -> None:
    for size in range(1, 9):
        x = words(rng, n)
        told = b"".join(int(v).to_bytes(8, "little")[:size] for v in x)
        packed = k.bytes_pack(x, size)
        same(packed, np.frombuffer(told + bytes(-len(told) % 8), np.uint64))
        dirty = np.frombuffer(told + b"\xff" * (-len(told) % 8), np.uint64)
        for given in (packed, dirty):
            same(k.bytes_unpack(given, n, size), [int(v) % (1 << 8 * size) for v in x])


def test_bytes_misuse(rng: np.random.Generator) -> None:
    x = words(rng, 9)
    refuses(
        lambda: k.bytes_pack(x, 0),
        lambda: k.bytes_pack(x, 9),
        lambda: k.bytes_pack(x[::2], 3),
        lambda: k.bytes_unpack(x, 25, 3),
        lambda: k.bytes_unpack(x, 8, 0),
        lambda: k.bytes_unpack(x, -1, 3),
    )


def test_bit_misuse(rng: np.random.Generator) -> None:
    x = words(rng, 70)
    refuses(
        lambda: k.bit_slice(x, 0),
        lambda: k.bit_slice(x, 65),
        lambda: k.bit_slice(x[::2], 3),
        lambda: k.bit_unslice(k.bit_slice(x, 3), 64),
        lambda: k.bit_unslice(words(rng, 65, 2), 70),
        lambda: k.bit_unslice(words(rng, 0, 2), 70),
        lambda: k.bits_to_ring(x, 64),
        lambda: k.bits_to_ring(x, -1),
        lambda: k.ring_lsb(x[::2]),
        lambda: k.bit_pick(words(rng, 3, 2), x[:65] * np.uint64(0) + np.uint64(3)),
        lambda: k.bit_pick(words(rng, 3, 2), x[:64] % np.uint64(3)),
        lambda: k.bit_pick(words(rng, 0, 2), x % np.uint64(3)),
    )


# ---- look-up ----


def turned(tables: np.ndarray) -> np.ndarray:
    """As pieces want their tables: column u is column -u, twice round."""
    back = tables[:, :, -np.arange(2 * tables.shape[2]) % tables.shape[2]]
    return np.ascontiguousarray(back)


def o_pieces(e: U64, opened: U64, tables: U64, rest: int, flags: int) -> npt.NDArray[Any]:
    """Power by power, of Python integers: (low - v)^d has v^i (-1)^i choose(d, i) low^(d - i) times."""
    parts, groups, n, terms, size = e.shape
    out = np.zeros((parts, 1 + flags, groups, n), object)
    for g, i in np.ndindex(groups, n):
        index, low = divmod(int(opened[g, i]), 1 << rest)
        rows = [[int(row[(index - u) % size]) for u in range(size)] for row in tables[g]]
        at, others = np.array(rows[:terms], object), np.array(rows[terms:], object).reshape(flags, size)
        held = e[:, g, i].astype(object)
        for power in range(terms):
            times = sum(
                (-1) ** power * math.comb(d, power) * low ** (d - power) * at[d] for d in range(power, terms)
            )
            out[:, 0, g, i] += (held[:, power] * times).sum(axis=1)
        for f in range(flags):
            out[:, 1 + f, g, i] = (held[:, 0] * others[f]).sum(axis=1)
    return out % M


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64, 128, 256])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 8])
def test_pieces(level: str, rng: np.random.Generator, size: int, n: int, degree: int) -> None:
    """Of any material, groups with tables of their own."""
    for groups, flags, rest in ((2, 0, 12), (3, 1, 0), (1, 2, 63)):
        e = apart(rng, 3, groups * n, degree + 1, size).reshape(3, groups, n, degree + 1, size)
        opened, tables = words(rng, groups, n), words(rng, groups, degree + 1 + flags, size)
        got = k.pieces(e, opened, turned(tables), rest, flags)
        assert got.shape == (3, 1 + flags, groups, n)
        same(got, o_pieces(e, opened, tables, rest, flags))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 128])
def test_rotate(level: str, rng: np.random.Generator, size: int) -> None:
    e, c = words(rng, 2 * size + 3, size), np.arange(2 * size + 3, dtype=np.uint64)
    want = [[int(e[i, (int(c[i]) - j) % size]) for j in range(size)] for i in range(len(c))]
    same(k.rotate(e, c), want)
    same(k.rotate(np.stack([e, e + e]), c), [k.rotate(e, c), k.rotate(e + e, c)])
    for kind in (np.uint16, np.uint8):
        narrow = k.rotate(e.astype(kind), c)
        assert narrow.dtype == kind
        same(narrow.astype(np.uint64), u64(want) % np.uint64(1 << np.iinfo(kind).bits))


@pytest.mark.parametrize(("rest", "size"), [(0, 8), (3, 2), (12, 128), (20, 64), (57, 128), (62, 4)])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_pieces_of_what_is_prepared(
    level: str, rng: np.random.Generator, rest: int, size: int, degree: int
) -> None:
    """The use: a mask 2^rest u + v, and v^d at place u. What was opened reads piece j at t, 2^rest j + t the
    value, whatever the mask.
    """
    groups, n, flags, whole = 2, 9, 2, size << rest
    tables = words(rng, groups, degree + 1 + flags, size)
    value, mask = (
        [[int.from_bytes(rng.bytes(16), "little") % whole for _ in range(n)] for _ in range(groups)]
        for _ in range(2)
    )
    e = np.zeros((groups, n, degree + 1, size), np.uint64)
    opened, want = np.zeros((groups, n), np.uint64), np.zeros((1 + flags, groups, n), object)
    for g, i in np.ndindex(groups, n):
        u, v = divmod(mask[g][i], 1 << rest)
        c = (value[g][i] + mask[g][i]) % whole
        e[g, i, :, u] = [v**d % M for d in range(degree + 1)]
        opened[g, i] = c
        j, t = ((c >> rest) - u) % size, c % (1 << rest) - v
        assert ((j << rest) + t - value[g][i]) % whole == 0
        row = [int(x) for x in tables[g, :, j]]
        want[:, g, i] = [sum(row[d] * t**d for d in range(degree + 1)) % M, *row[degree + 1 :]]
    shares = apart(rng, 2, groups * n, degree + 1, size).reshape(2, *e.shape)
    shares[1] = e - shares[0]
    got = k.pieces(shares, opened, turned(tables), rest, flags)
    same(got[0] + got[1], want)


def test_one_hot_rotation_finds_the_entry(level: str, rng: np.random.Generator) -> None:
    """The use: e is one-hot at a secret r, c = value + r is public, so that of the value is found."""
    size, n = 64, 20
    value, r = rng.integers(0, size, n), rng.integers(0, size, n)
    e = np.zeros((n, size), np.uint64)
    e[np.arange(n), r] = 1
    c = ((value + r) % size).astype(np.uint64)
    same(np.argmax(k.rotate(e, c), axis=1).astype(np.uint64), value)


def test_lookup_misuse(rng: np.random.Generator) -> None:
    e, c, t = words(rng, 2, 1, 3, 4, 8), words(rng, 1, 3), words(rng, 1, 5, 16)
    refuses(
        lambda: k.pieces(words(rng, 2, 1, 3, 4, 6), c, words(rng, 1, 5, 12), 12, 1),
        lambda: k.pieces(words(rng, 2, 1, 3, 4, 0), c, words(rng, 1, 5, 0), 12, 1),
        lambda: k.pieces(e[0], c, t, 12, 1),
        lambda: k.pieces(e.astype(np.int64), c, t, 12, 1),
        lambda: k.pieces(e, c[0], t, 12, 1),
        lambda: k.pieces(e, c[:, :2], t, 12, 1),
        lambda: k.pieces(e, c.astype(np.uint32), t, 12, 1),
        lambda: k.pieces(e, c, t[:, :, :8], 12, 1),
        lambda: k.pieces(e, c, words(rng, 1, 5, 8), 12, 1),
        lambda: k.pieces(e, c, words(rng, 2, 5, 16), 12, 1),
        lambda: k.pieces(e, c, t, 12, 0),
        lambda: k.pieces(e, c, t, 12, 2),
        lambda: k.pieces(e, c, words(rng, 1, 3, 16), 12, -1),
        lambda: k.pieces(e, c, t, -1, 1),
        lambda: k.pieces(e, c, t, 64, 1),
        lambda: k.pieces(words(rng, 2, 1, 3, 0, 8), c, words(rng, 1, 1, 16), 12, 1),
        lambda: k.pieces(words(rng, 2, 1, 3, 10, 8), c, words(rng, 1, 11, 16), 12, 1),
        lambda: k.rotate(words(rng, 3, 0), c[0]),
    )


# ---- local halves of online operations ----

SOME = (1, 5, 8, 63, 64, 65, 130)
# Bits dropped, of these not masked, and how far values are raised.
DROPS = [(1, 0, 61), (16, 0, 60), (20, 4, 61), (32, 16, 60), (60, 44, 60), (61, 0, 61)]


def apart(rng: np.random.Generator, parts: int, n: int, *more: int) -> U64:
    """Components that lie apart from one another, as parts of larger material do."""
    return words(rng, parts, n + 3, *more)[:, 1 : n + 1]


def o_public(opened: U64, f: int, bare: int, up: int = 61) -> list[tuple[int, int, int]]:
    """a and b of truncations, of Python integers, and which `over` counts; any where b is 0."""
    whole = [(int(o) << bare) % M for o in opened.reshape(-1)]
    return [
        ((c >> f) - (1 << (up - f)), 0 if c >> 62 == 3 else 1 << (64 - f), min(c >> 62, 2)) for c in whole
    ]


@pytest.mark.parametrize("n", SOME)
def test_truncations(level: str, rng: np.random.Generator, n: int) -> None:
    """Several at once, each with its own f."""
    items = [(n, *drop) for drop in DROPS]
    of = [drop for drop in DROPS for _ in range(n)]
    n = len(of)
    one, opened, x = words(rng, 3), words(rng, n), apart(rng, 3, n)
    r, base, over, z, ring = (apart(rng, 3, n, *more) for more in ((), (), (3,), (4,), ()))
    packed = words(rng, (n + 63) // 64)
    masked, plain = k.trunc_mask(x, r, one, items), k.trunc(base, over, one, opened, items)
    chosen = k.trunc_if((ring, base, over, z), one, packed, opened, items)
    for c, (j, (f, bare, high)) in itertools.product(range(3), enumerate(of)):
        o = bit(packed, j)
        k1, sign = int(one[c]), 1 - 2 * o
        up = (1 << high) - (1 << f) + (1 << bare) + (3 * ((1 << bare) - 1) >> 1)
        assert int(masked[c, j]) == (((int(x[c, j]) + k1 * up) % M >> bare) + (int(r[c, j]) >> bare)) % M
        ((a, b, at),) = o_public(opened[j : j + 1], f, bare, high)
        g = int(over[c, j, at])
        assert int(plain[c, j]) == (k1 * a + b * g - int(base[c, j])) % M
        y = (int(ring[c, j]) * sign + k1 * o) * a + (g * o + int(z[c, j, 1 + at]) * sign) * b
        assert int(chosen[c, j]) == (y - int(base[c, j]) * o - int(z[c, j, 0]) * sign) % M


@pytest.mark.parametrize("width", (1, 7, 64, 65))
@pytest.mark.parametrize(("f", "bare"), [(16, 0), (20, 4), (32, 16), (44, 28)])
def test_norms(level: str, rng: np.random.Generator, width: int, f: int, bare: int) -> None:
    n = 3
    one, opened = words(rng, 2), words(rng, n, width)
    base, over, both = (apart(rng, 2, n, width, *more) for more in ((), (3,), (3,)))
    q = apart(rng, 2, n)
    public = u64([[v % M for v in told] for told in o_public(opened, f, bare)]).reshape(n, width, 3)
    a, b, at = public[..., 0], public[..., 1], public[None, :, :, 2:].astype(np.int64)
    g, product = (np.take_along_axis(v, at, axis=3)[..., 0] for v in (over, both))
    rows, squares = k.norm((base, over, both, q), one, opened, f, bare)
    k1 = one[:, None, None]
    same(rows, k1 * a + b * g - base)
    two = np.uint64(2)
    terms = two * b * (a * g - product) - two * a * base + b * b * g + k1 * a * a
    same(squares, q + terms.sum(axis=2, dtype=np.uint64))


@pytest.mark.parametrize("n", SOME)
def test_drop(level: str, rng: np.random.Generator, n: int) -> None:
    x, one = apart(rng, 2, n), words(rng, 2)
    for low, width in (((0,), 64), ((0, 1, 43), 21), ((63,), 1), ((12, 4), 32)):
        got = k.drop(x, one, low, width)
        for c in range(2):
            for p, g in enumerate(low):
                raised = [(int(v) + int(one[c]) * 3 * ((1 << g) - 1)) % M for v in x[c]]
                same(got[c, p], [(v >> g) % (1 << width) for v in raised])


# Of each value that may be chosen the bits dropped, and of these not masked.
CHOICES = [
    [(1, 0), (16, 0)],
    [(20, 4), (61, 0), (33, 17)],
    [(60, 44), (2, 1), (20, 19), (16, 0)],
    [(30, 14), (31, 15), (33, 17), (35, 19), (44, 28)],
    [(8 + w, w) for w in range(7)],
]


def places(told: int, count: int) -> Iterator[tuple[int, int]]:
    """Of each value how many entries its vectors have, and which of these counts if such bits were opened."""
    for w in range(count):
        first = max(w, 1)
        at = told >> (first - 1)
        yield 1 << (count - first), at if w == 0 else at ^ 1


@pytest.mark.parametrize("n", SOME)
@pytest.mark.parametrize("drops", CHOICES, ids=len)
def test_choose(level: str, rng: np.random.Generator, n: int, drops: list[tuple[int, int]]) -> None:
    """Of any material."""
    count = len(drops)
    hot, z = apart(rng, 3, n, 2**count - 2), apart(rng, 3, n, k.choose_places(count))
    opened, packed = words(rng, n, count), words(rng, (n * (count - 1) + 63) // 64)
    public = [o_public(opened[:, w], *drop) for w, drop in enumerate(drops)]
    want = np.zeros((3, n, count), object)
    for c, i in np.ndindex(3, n):
        ones, rows = ints(hot[c, i]), ints(z[c, i])
        told = sum(bit(packed, i * (count - 1) + v) << v for v in range(count - 1))
        for w, (size, at) in enumerate(places(told, count)):
            a, b, over = public[w][i]
            base, *overs = (rows[row * size + at] for row in range(4))
            want[c, i, w] = ones[at] * a + overs[over] * b - base
            ones, rows = ones[size if w else 0 :], rows[4 * size :]
        assert not ones and not rows
    same(k.choose(hot, z, packed, opened, drops), want % M)


@pytest.mark.parametrize("drops", [[d for d in drops if d[0] < 61] for drops in CHOICES], ids=len)
def test_choose_of_what_is_prepared(
    level: str, rng: np.random.Generator, drops: list[tuple[int, int]]
) -> None:
    """The use, for all bits under random ones: the last that is set chooses, and what it chooses is truncated
    with the dither that its mask makes, to the bit; the others are 0. What is opened of them is noise.
    """
    count, repeat = len(drops), 5
    n = repeat << (count - 1)
    bits = np.arange(n) % (1 << (count - 1))
    random = rng.integers(0, 1 << (count - 1), n)
    opened, want = words(rng, n, count), np.zeros((n, count), object)
    hot, z = np.zeros((n, 2**count - 2), np.uint64), np.zeros((n, k.choose_places(count)), np.uint64)
    for i in range(n):
        ones = rows = 0
        chosen = int(bits[i]).bit_length()
        for w, (f, bare) in enumerate(drops):
            v = [int(x) >> bare << bare for x in rng.integers(0, 1 << 62, 3)]
            u = int(rng.integers(4))
            if w == chosen:
                most = (1 << 61) - (1 << f) - (2 << bare) - 1
                x = int(rng.choice([-most, most, 0, int(rng.integers(-most, most))]))
                raised = x + (1 << 61) - (1 << f) + (1 << bare) + (3 * ((1 << bare) - 1) >> 1)
                opened[i, w] = (raised + sum(v) + (u << 62)) % M >> bare
                dither = sum(part % (1 << f) for part in v)
                want[i, w] = (raised + dither >> f) - (1 << (61 - f))
                assert abs((want[i, w] << f) - x) < (2 << f) + (2 << bare)
            first = max(w, 1)
            size, at = 1 << (count - first), int(random[i]) >> (first - 1)
            base = sum(part >> f for part in v) + (u << (62 - f))
            z[i, rows : rows + 4 * size].reshape(4, size)[:, at] = [base, u > 0, u > 1, u > 2]
            rows += 4 * size
            if w:
                hot[i, ones + at] = 1
                ones += size
    told = (bits ^ random)[:, None] >> np.arange(count - 1) & 1
    packed = u64(pack(ints(told.reshape(-1))))
    hots, zs = apart(rng, 2, *hot.shape), apart(rng, 2, *z.shape)
    hots[1], zs[1] = hot - hots[0], z - zs[0]
    got = k.choose(hots, zs, packed, opened, drops)
    same(got[0] + got[1], want % M)


@pytest.mark.parametrize("count", range(2, 8))
def test_places_to_choose_from(count: int) -> None:
    assert k.choose_places(count) == 4 * sum(size for size, _ in places(0, count))


@pytest.mark.parametrize("n", SOME)
@pytest.mark.parametrize("count", (1, 4, 16))
def test_wave(level: str, rng: np.random.Generator, n: int, count: int) -> None:
    """To the bit what waves.py makes of the same: multiplications and additions of doubles, none joined."""
    for bits in (1, 26, 47):
        material, opened = apart(rng, 2, n, 2 * count), words(rng, n)
        turns = words(rng, count) >> np.uint64(50)
        cos, sin = waves.circle(rng.random(count))
        amplitude = rng.normal(size=count) * 2.0 ** rng.integers(0, 46, count)
        got = k.wave(material, opened, k.Cosines(turns, bits, np.array([cos, sin, amplitude]), waves.CIRCLE))
        c, s = waves.circle(waves.fractions(opened, ints(turns), bits))
        turned = np.concatenate([(c * cos - s * sin) * amplitude, (c * sin + s * cos) * amplitude], axis=1)
        same(got, (material * waves.integers(turned, 0)).sum(axis=2, dtype=np.uint64))


@pytest.mark.parametrize("n", SOME)
@pytest.mark.parametrize("size", (1, 2, 16))
def test_decay(level: str, rng: np.random.Generator, n: int, size: int) -> None:
    for rest, width in ((1, 2.56), (13, 2.56), (40, 0.7)):
        e, opened = apart(rng, 2, n, size), words(rng, n)
        bins = rng.random(size) * 2.0 ** rng.integers(0, 44, size)
        got = k.decay(e, opened, k.Bins(bins, rest, width * 2.0**-rest, width / 2, waves.EXP))
        low = (opened & np.uint64((1 << rest) - 1)).astype(np.float64)
        within = waves.exponential(low * (width * 2.0**-rest) - width / 2)
        away = ((opened >> np.uint64(rest)).astype(np.int64)[:, None] - np.arange(size)) % size
        public = waves.integers(within[:, None] * bins[away], 0)
        same(got, (e * public).sum(axis=2, dtype=np.uint64))


@pytest.mark.parametrize("n", SOME)
def test_masks_of_bits(level: str, rng: np.random.Generator, n: int) -> None:
    one, ring = words(rng, 2), apart(rng, 2, n)
    packed = apart(rng, 2, (n + 63) // 64)
    same(k.bits_mask(packed, ring), packed ^ np.stack([k.ring_lsb(v.copy()) for v in ring]))
    o = k.bits_to_ring(np.ascontiguousarray(packed[0]), n)
    sign = np.uint64(1) - np.uint64(2) * o
    bits = packed[0].copy()
    same(k.ring_unmask(ring, one, bits), ring * sign + one[:, None] * o)


@pytest.mark.parametrize("n", SOME)
@pytest.mark.parametrize("flags", [1, 2, 3, 4])
@pytest.mark.parametrize("m", [1, 3])
def test_ring_pick(level: str, rng: np.random.Generator, n: int, flags: int, m: int) -> None:
    """Whatever stands in the rows of w: the sum over sets of flags, each with its sign."""
    w, one, delta = apart(rng, 2, n, ((m + 1) << flags) - 1), words(rng, 2), words(rng, n, m)
    bits = words(rng, flags, (n + 63) // 64)
    o = np.stack([k.bits_to_ring(row.copy(), n) for row in bits])
    bit, times = np.zeros((2, n), np.uint64), np.zeros((2, n, m), np.uint64)
    for subset in range(1 << flags):
        factor = np.ones(n, np.uint64)
        for f in range(flags):
            factor = factor * (1 - 2 * o[f] if subset >> f & 1 else o[f])
        at = subset * (m + 1) - 1
        bit += factor * (w[:, :, at] if subset else one[:, None])
        times += factor[:, None] * w[:, :, at + 1 : at + 1 + m]
    got = k.ring_pick(w, one, delta, bits)
    same(got[:, :, 0], bit)
    same(got[:, :, 1:], bit[:, :, None] * delta - times)


@pytest.mark.parametrize("n", SOME)
@pytest.mark.parametrize("sizes", ((1,), (4,), (3, 2), (5, 5, 4), (1, 7, 2)))
def test_bits_at_most(level: str, rng: np.random.Generator, n: int, sizes: tuple[int, ...]) -> None:
    """Of one-hots that are shared, digits compared as integers."""
    value, told = words(rng, n), words(rng, 3, n)
    shifts = [sum(sizes[:d]) for d in range(len(sizes))]

    def digit(x: int, d: int) -> int:
        return x >> shifts[d] & ((1 << sizes[d]) - 1)

    hot = [
        pack([int(digit(int(v), d) == row) for v in value])
        for d, s in enumerate(sizes)
        for row in range(1 << s)
    ]
    planes = words(rng, 2, len(hot), (n + 63) // 64 + 2)[:, :, 1:-1]
    planes[1] = planes[0] ^ u64(hot)
    got = k.bits_at_most(planes, sizes, told)
    assert got.shape == (2, 2 * len(sizes) - 1, 3, (n + 63) // 64)
    got = got[0] ^ got[1]
    highest = len(sizes) - 1

    def row(d: int, compare: Callable[[int, int], bool]) -> list[list[int]]:
        pairs = [
            [(digit(int(v), d), digit(int(t), d)) for v, t in zip(value, each, strict=True)] for each in told
        ]
        return [pack([int(compare(*pair)) for pair in each]) for each in pairs]

    def less(d: int) -> Callable[[int, int], bool]:
        return (lambda v, t: v < t) if d else (lambda v, t: v <= t)

    want = [row(highest, less(highest))]
    want += [row(d, lambda v, t: v == t) for d in range(highest, 0, -1)]
    want += [row(d, less(d)) for d in range(highest - 1, -1, -1)]
    same(got, want)


@pytest.mark.parametrize("n", (1, 7, 8, 9, 30))
def test_bits_products(level: str, rng: np.random.Generator, n: int) -> None:
    wanted = ((2,), (0, 1), (1, 4), (0, 1, 3), (0, 1, 2, 3, 4))
    sets = sorted({s for m in wanted for d in range(1, len(m) + 1) for s in itertools.combinations(m, d)})
    at = {s: i for i, s in enumerate(sets)}
    x, bits = words(rng, 5, n), words(rng, 5, n)
    planes = words(rng, 2, len(sets), n + 3)[:, :, 2:-1]
    planes[1] = planes[0] ^ np.stack([np.bitwise_and.reduce(x[list(s)]) for s in sets])
    subsets = [
        [at[tuple(v for j, v in enumerate(m) if s >> j & 1)] for s in range(1, 1 << len(m))] for m in wanted
    ]
    products = k.Products(list(zip(wanted, subsets, strict=True)))
    got = k.bits_products(planes, u64([0, 1]), bits ^ x, products)
    same(got[0] ^ got[1], [np.bitwise_and.reduce(bits[list(m)]) for m in wanted])


def test_choose_misuse(rng: np.random.Generator) -> None:
    hot, z, bits, opened = words(rng, 2, 70, 6), words(rng, 2, 70, 40), words(rng, 3), words(rng, 70, 3)
    drops = [(20, 4), (16, 0), (61, 45)]
    k.choose(hot, z, bits, opened, drops)
    refuses(
        lambda: k.choose(hot[:, :, :5].copy(), z, bits, opened, drops),
        lambda: k.choose(hot[:, :69], z, bits, opened, drops),
        lambda: k.choose(hot[:1], z, bits, opened, drops),
        lambda: k.choose(hot[0], z, bits, opened, drops),
        lambda: k.choose(hot.astype(np.int64), z, bits, opened, drops),
        lambda: k.choose(hot, z[:, :, :39], bits, opened, drops),
        lambda: k.choose(hot, words(rng, 2, 70, 44), bits, opened, drops),
        lambda: k.choose(hot, z[:, :69], bits, opened, drops),
        lambda: k.choose(hot, z, bits[:2], opened, drops),
        lambda: k.choose(hot, z, words(rng, 4), opened, drops),
        lambda: k.choose(hot, z, bits, opened[:, :2], drops),
        lambda: k.choose(hot, z, bits, opened[:69], drops),
        lambda: k.choose(hot, z, bits, opened, drops[:2]),
        lambda: k.choose(hot, z, bits, opened, [*drops, (20, 4)]),
        lambda: k.choose(hot, z, bits, opened, [*drops[:2], (0, 0)]),
        lambda: k.choose(hot, z, bits, opened, [*drops[:2], (62, 0)]),
        lambda: k.choose(hot, z, bits, opened, [*drops[:2], (20, 20)]),
        lambda: k.choose(hot, z, bits, opened, [*drops[:2], (20, -1)]),
        lambda: k.choose(
            words(rng, 2, 70, 0),
            words(rng, 2, 70, k.choose_places(1)),
            bits[:0],
            words(rng, 70, 1),
            drops[:1],
        ),
        lambda: k.choose(
            words(rng, 1, 1, 2**17 - 2),
            words(rng, 1, 1, k.choose_places(17)),
            bits[:1],
            words(rng, 1, 17),
            [(20, 4)] * 17,
        ),
    )


def test_online_misuse(rng: np.random.Generator) -> None:
    x, one, bits = words(rng, 2, 70), words(rng, 2), words(rng, 2)
    over, products = words(rng, 2, 70, 3), k.Products([((0, 1), (0, 1, 2))])
    cosines, bins = (
        k.Cosines(bits, 26, np.ones((3, 2)), waves.CIRCLE),
        k.Bins(np.ones(4), 9, 1.0, 0.5, waves.EXP),
    )
    refuses(
        lambda: k.trunc_mask(x, x[:, :69], one, [(70, 20, 4, 61)]),
        lambda: k.trunc_mask(x, x, one[:1], [(70, 20, 4, 61)]),
        lambda: k.trunc_mask(x, x, one, [(70, 20, 4, 61), (1, 20, 4, 61)]),
        lambda: k.trunc_mask(x.astype(np.int64), x, one, [(70, 20, 4, 61)]),
        lambda: k.trunc(x, over, one, x[0], [(70, 0, 0, 61)]),
        lambda: k.trunc(x, over, one, x[0], [(70, 62, 0, 62)]),
        lambda: k.trunc(x, over, one, x[0], [(70, 61, 0, 60)]),
        lambda: k.trunc(x, over, one, x[0], [(70, 20, 20, 61)]),
        lambda: k.trunc(x, over, one, x[0, :69], [(70, 20, 4, 61)]),
        lambda: k.trunc(x, x, one, x[0], [(70, 20, 4, 61)]),
        lambda: k.trunc_if((x, x, over, words(rng, 2, 70, 4)), one, bits[:1], x[0], [(70, 20, 4, 61)]),
        lambda: k.trunc_if((x, x, over, over), one, bits, x[0], [(70, 20, 4, 61)]),
        lambda: k.norm((x[:, None], over[:, None], over[:, None], x[:, :1]), one, x[:1], 62, 0),
        lambda: k.drop(x, one, (50,), 15),
        lambda: k.drop(x, one, (0,), 0),
        lambda: k.Cosines(bits, 51, np.ones((3, 2)), waves.CIRCLE),
        lambda: k.Cosines(bits, 26, np.ones((3, 1)), waves.CIRCLE),
        lambda: k.Cosines(bits, 26, np.full((3, 2), 2.0**50), waves.CIRCLE),
        lambda: k.Cosines(words(rng, 17), 26, np.ones((3, 17)), waves.CIRCLE),
        lambda: k.wave(words(rng, 2, 70, 4), x[0, :69], cosines),
        lambda: k.wave(words(rng, 2, 70, 3), x[0], cosines),
        lambda: k.Bins(np.ones(3), 13, 1.0, 0.5, waves.EXP),
        lambda: k.Bins(np.full(4, 2.0**50), 13, 1.0, 0.5, waves.EXP),
        lambda: k.Bins(np.ones(4, np.float32), 13, 1.0, 0.5, waves.EXP),
        lambda: k.decay(words(rng, 2, 70, 8), x[0], bins),
        lambda: k.decay(words(rng, 2, 70, 4), x[0, :69], bins),
        lambda: k.bits_mask(words(rng, 2, 1), x),
        lambda: k.ring_unmask(x, one, bits[:1]),
        lambda: k.ring_pick(words(rng, 2, 70, 6), one, words(rng, 70, 2), bits[None]),
        lambda: k.ring_pick(words(rng, 2, 70, 63), one, words(rng, 70, 1), words(rng, 5, 2)),
        lambda: k.bits_at_most(words(rng, 2, 9, 2), (3,), x),
        lambda: k.bits_at_most(words(rng, 2, 1 << 11, 2), (11,), x),
        lambda: k.bits_products(words(rng, 2, 2, 70), one, x, products),
        lambda: k.bits_products(words(rng, 2, 3, 70), one, x[:1], products),
        lambda: k.Products([((0, 1), (0, 1))]),
        lambda: k.Products([((), ())]),
    )


# ---- GF(2^64) ----


@pytest.mark.parametrize("n", LENGTHS)
def test_gf(level: str, rng: np.random.Generator, n: int) -> None:
    a, b = words(rng, n), words(rng, n)
    products = [o_gf_mul(x, y) for x, y in zip(ints(a), ints(b), strict=True)]
    same(k.gf_mul(a, b), products)
    total = 0
    for p in products:
        total ^= p
    assert k.gf_inner(a, b) == total
    for s in (0, 1, 1 << 63, ONES, int(rng.integers(0, M, dtype=np.uint64))):
        same(k.gf_scale(a, s), [o_gf_mul(x, s) for x in ints(a)])


@pytest.mark.parametrize("half", [0, 1, 3, 8, 17, 65])
def test_gf_fold(level: str, rng: np.random.Generator, half: int) -> None:
    a, xi = words(rng, 2 * half), int(rng.integers(0, M, dtype=np.uint64))
    low, high = ints(a[:half]), ints(a[half:])
    same(k.gf_fold(a, xi), [p ^ o_gf_mul(p ^ q, xi) for p, q in zip(low, high, strict=True)])


def test_gf_is_a_field(level: str, rng: np.random.Generator) -> None:
    a, b, c = words(rng, 33), words(rng, 33), words(rng, 33)
    same(k.gf_mul(k.gf_mul(a, b), c), k.gf_mul(a, k.gf_mul(b, c)))
    same(k.gf_mul(a, b), k.gf_mul(b, a))
    same(k.gf_mul(a, b ^ c), k.gf_mul(a, b) ^ k.gf_mul(a, c))
    nonzero = np.where(a == 0, np.uint64(3), a)
    inverse = np.ones(33, np.uint64)
    square = nonzero
    for _ in range(63):  # x^(2^64 - 2): the inverse only if the modulus is irreducible
        square = k.gf_mul(square, square)
        inverse = k.gf_mul(inverse, square)
    same(k.gf_mul(inverse, nonzero), np.ones(33))


def test_gf_misuse(rng: np.random.Generator) -> None:
    a = words(rng, 7)
    refuses(
        lambda: k.gf_mul(a, a[:6]),
        lambda: k.gf_fold(a, 1),
        lambda: k.gf_scale(a, M),
        lambda: k.gf_scale(a, -1),
        lambda: k.gf_inner(a, a.astype(np.int64)),
        lambda: k.gf_cross(words(rng, 2, 3, 6), words(rng, 2, 3, 6), words(rng, 64, 3)),
        lambda: k.gf_cross(words(rng, 2, 1, 128), words(rng, 2, 1, 128), words(rng, 64, 1)),
        lambda: k.gf_cross(words(rng, 2, 3, 4), words(rng, 2, 3, 8), words(rng, 64, 3)),
        lambda: k.gf_cross(words(rng, 2, 3, 4), words(rng, 2, 3, 4), words(rng, 64, 2)),
        lambda: k.gf_combine(words(rng, 3, 4), words(rng, 63, 3)),
        lambda: k.gf_blend(words(rng, 3, 4), words(rng, 5)),
    )


def o_terms(rows: list[list[Any]], minus: Callable[[Any, Any], Any], slope: bool = False) -> list[list[Any]]:
    """The vectors that took a difference when rows are halved into low, high and difference; see gf_cross."""
    if len(rows) == 1:
        return [rows[0]] if slope else []
    low, high = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    difference = [[minus(q, p) for p, q in zip(a, b, strict=True)] for a, b in zip(low, high, strict=True)]
    return o_terms(low, minus, slope) + o_terms(high, minus, slope) + o_terms(difference, minus, True)


CROSSES = [(1, 3), (2, 1), (4, 5), (8, 33), (16, 2)]


@pytest.mark.parametrize(("rows", "n"), CROSSES)
def test_gf_cross(level: str, rng: np.random.Generator, rows: int, n: int) -> None:
    """Each value is a sum over columns and lanes of the element whose bits stand in the planes."""
    x, y, planes = words(rng, 2, n, rows), words(rng, 2, n, rows), words(rng, 64, n)
    rho = k.bit_unslice(planes, 64 * n)
    pairs = [
        [tuple(int(v) for v in (x[0, g, i], x[1, g, i], y[0, g, i], y[1, g, i])) for g in range(n)]
        for i in range(rows)
    ]
    want = []
    for term in o_terms(pairs, lambda q, p: tuple(a ^ b for a, b in zip(q, p, strict=True))):
        total = 0
        for g, (x0, x1, y0, y1) in enumerate(term):
            product = (x0 & (y0 ^ y1)) ^ (x1 & y0)
            for lane in range(64):
                total ^= int(rho[64 * g + lane]) * (product >> lane & 1)
        want.append(total)
    assert len(want) == k.crosses(rows)
    same(k.gf_cross(x, y, planes), want)
    combined = np.zeros(rows, np.uint64)
    for g, i, lane in itertools.product(range(n), range(rows), range(64)):
        combined[i] ^= rho[64 * g + lane] * (x[0, g, i] >> np.uint64(lane) & np.uint64(1))
    same(k.gf_combine(x[0], planes), combined)


@pytest.mark.parametrize(("rows", "n"), [(1, 3), (3, 2), (8, 5), (64, 2)])
def test_gf_blend(level: str, rng: np.random.Generator, rows: int, n: int) -> None:
    x, w = words(rng, n, rows), words(rng, rows)
    want = np.zeros(64 * n, np.uint64)
    for g, i, lane in itertools.product(range(n), range(rows), range(64)):
        want[64 * g + lane] ^= w[i] * (x[g, i] >> np.uint64(lane) & np.uint64(1))
    same(k.gf_blend(x, w), want)


# ---- doubling one-hots ----


@pytest.mark.parametrize("kind", [np.uint64, np.uint16, np.uint8])
@pytest.mark.parametrize(("n", "size", "have"), [(1, 2, 1), (3, 16, 4), (2, 8, 2), (7, 256, 128)])
def test_double(level: str, rng: np.random.Generator, n: int, size: int, have: int, kind: Any) -> None:
    b = words(rng, 2, n)
    e, out, high = (words(rng, *shape).astype(kind) for shape in ((2, n, size), (n, have), (n, have)))
    small = b.astype(kind)
    want = out + e[0, :, :have] * (small[0] + small[1])[:, None] + e[1, :, :have] * small[0][:, None]
    k.double_part(out, e, b)
    np.testing.assert_array_equal(out, want)
    grown = e[0].copy()
    k.double(grown, high)
    np.testing.assert_array_equal(grown[:, have : 2 * have], high)
    np.testing.assert_array_equal(grown[:, :have], e[0, :, :have] - high)
    np.testing.assert_array_equal(grown[:, 2 * have :], e[0, :, 2 * have :])


def test_double_misuse(rng: np.random.Generator) -> None:
    e, b = words(rng, 2, 3, 8), words(rng, 2, 3)
    refuses(
        lambda: k.double_part(words(rng, 3, 9), e, b),
        lambda: k.double_part(words(rng, 2, 4), e, b),
        lambda: k.double_part(words(rng, 3, 4), e, b[:, :2].copy()),
        lambda: k.double(e[0], words(rng, 3, 5)),
        lambda: k.double(e[0], words(rng, 2, 4)),
        lambda: k.double(e[0], e[0].reshape(6, 4)[:3]),
        lambda: k.double_part(words(rng, 3, 4), e.astype(np.uint8), b),
        lambda: k.double(e[0].astype(np.uint16), words(rng, 3, 4)),
    )


# ---- GR(2^64, 48) ----

GR_LENGTHS = (0, 1, 2, 3, 5, 8)


def each_product(a: U64, b: U64) -> U64:
    """a_j b_j, as inner products of one pair each: (n, 48), (n, 48) -> (n, 48)."""
    rows = (k.gr_inner(a[j : j + 1], b[j : j + 1]) for j in range(len(a)))
    return np.stack(list(rows)) if len(a) else np.empty((0, 48), np.uint64)


@pytest.mark.parametrize("n", GR_LENGTHS)
def test_gr_products(level: str, rng: np.random.Generator, n: int) -> None:
    a, b = words(rng, n, 48), words(rng, n, 48)
    x, r = words(rng, n), words(rng, n)  # bits 48 and up of r are noise
    products = [o_gr_mul(p, q) for p, q in zip(ints(a), ints(b), strict=True)]
    same(each_product(a, b), products)
    total = [0] * 48
    for p in products:
        total = o_add(total, p)
    same(k.gr_inner(a, b), total)
    same(k.gr_mul01(a, r), [o_gr_mul(p, o_01(q)) for p, q in zip(ints(a), ints(r), strict=True)])
    same(k.gr_scale01(x, r), [[s * v for v in o_01(q)] for s, q in zip(ints(x), ints(r), strict=True)])


@pytest.mark.parametrize("half", [0, 1, 2, 5])
def test_gr_fold(level: str, rng: np.random.Generator, half: int) -> None:
    a = words(rng, 2 * half, 48)
    for xi in (0, 1, 1 << 47, (1 << 48) - 1, int(rng.integers(0, 1 << 48))):
        same(
            k.gr_fold(a, xi),
            [
                o_add(p, o_gr_mul(o_sub(q, p), o_01(xi)))
                for p, q in zip(ints(a[:half]), ints(a[half:]), strict=True)
            ],
        )


@pytest.mark.parametrize(
    "shape",
    [
        (0, 3),
        (3, 0),
        (1, 1),
        (1, 9),
        (2, 5),
        (3, 4),
        (4, 7),
        (5, 8),
        (9, 6),
        (8, 17),
        (17, 9),
        (16, 70),
        (70, 33),
    ],
)
def test_gr_combine(level: str, rng: np.random.Generator, shape: tuple[int, int]) -> None:
    m, n = shape
    x, r, s = words(rng, m, n), words(rng, n), words(rng, m)

    def combined(row: U64, by: U64) -> list[int]:
        return [sum(int(v) * (int(q) >> t & 1) for v, q in zip(row, by, strict=True)) % M for t in range(48)]

    same(k.gr_combine(x, r), [combined(row, r) for row in x])
    same(k.gr_combine_cols(x, s), [combined(column, s) for column in x.T])
    short = words32(rng, m, n)
    same(k.gr_combine32(short, r), [combined(row, r) for row in short])


ALL_WORDS: tuple[tuple[str, Any], ...] = (("", np.uint64), ("32", np.uint32))


def combinations() -> list[tuple[str, Any]]:
    """Of the library, all that this processor can run, and their words."""
    names = ["ref" if name == "portable" else name for name in k.available()]
    return [(f"gr_combine{size}_{name}", kind) for name in names for size, kind in ALL_WORDS]


@pytest.mark.parametrize(("name", "kind"), combinations())
def test_every_combination_gives_the_same_anywhere_in_memory(
    name: str, kind: Any, rng: np.random.Generator
) -> None:
    """Rows in strips and those left over, more words than lie in a cache at once, words in any place, and
    all ones; each function of the library called by itself.
    """
    run = ctypes.CDLL(str(build.HERE / build.LIBRARY))[f"mk_{name}"]
    run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t] * 2
    run.restype = None
    shapes = [(16, 16), (17, 1), (18, 15), (19, 33), (21, 1024), (22, 1025), (70, 129), (129, 70), (3, 2100)]
    for m, n in [*shapes, (16, 0), (33, 2500)]:
        for ones in (False, True):
            full = np.iinfo(kind).max
            x = np.full((m, n), full, kind) if ones else rng.integers(0, full, (m, n), kind, endpoint=True)
            r = np.full(n, M - 1, np.uint64) if ones else words(rng, n)
            each = x.astype(np.uint64)
            bits = [(r >> np.uint64(t) & np.uint64(1)) for t in range(48)]
            want = np.stack([(each * b).sum(axis=1, dtype=np.uint64) for b in bits], axis=1)
            at = int(rng.integers(0, 8)) * x.itemsize
            room = np.full(at + x.nbytes + 64, 0xA5, np.uint8)
            room[at : at + x.nbytes] = x.reshape(-1).view(np.uint8)
            out = np.full((m + 1, 48), 0xA5, np.uint64)
            run(out.ctypes.data, room.ctypes.data + at, r.ctypes.data, m, n)
            np.testing.assert_array_equal(out[:m], want)
            assert (out[m] == 0xA5).all()


def _hot(e: Any, b: U64, q: U64, r: U64) -> list[U64]:
    (n, size), empty = e.shape, partial(np.empty, dtype=np.uint64)
    out = [empty((n, 48)), empty((n, 48)), empty((size, 48))]
    k.gr_hot(out[0], out[1], out[2], e, b, q, r)
    return out


HOTS = [
    (0, 4, 2),
    (1, 1, 1),
    (5, 8, 3),
    (17, 2, 9),
    (67, 16, 4),
    (130, 33, 18),
    (66, 128, 48),
    (19, 512, 0),
    (0, 64, 6),
    (300, 64, 6),
    (131, 192, 7),
    (259, 256, 8),
    (2, 256, 8),
]


@pytest.mark.parametrize("kind", [np.uint64, np.uint16])
@pytest.mark.parametrize(("n", "size", "bits"), HOTS)
@pytest.mark.parametrize("largest", [False, True])
def test_gr_hot(
    level: str, rng: np.random.Generator, n: int, size: int, bits: int, kind: Any, largest: bool
) -> None:
    """As `gr_mul01`, `gr_combine` and `gr_combine_cols` have it, which are tested above; also where all that
    is added is as large as can be.
    """
    e, b, q, r = words(rng, n, size), words(rng, bits, n), words(rng, size), words(rng, n)
    e = e.astype(kind)
    if largest:
        e[...], q[...], r[...] = np.iinfo(kind).max, M - 1, M - 1
    wide, index = e.astype(np.uint64), np.zeros((n, 48), np.uint64)
    index[:, :bits] = b.T
    want = [k.gr_mul01(index, r), k.gr_combine(wide, q), k.gr_combine_cols(wide, r)]
    for got, one in zip(_hot(e, b, q, r), want, strict=True):
        same(got, one)


def _groups(n: int) -> U8:
    return np.full((-(-n // k.GROUP), 48, k.GROUP), 77, np.uint8)


def _elements(groups: U8) -> U64:
    """Those of groups, one after another, as words."""
    return np.ascontiguousarray(groups.swapaxes(1, 2)).reshape(-1, 48).astype(np.uint64)


def _folded(kept: U64, more: U64) -> U64:
    halves = k.gr_fold_block(list(kept), kept.shape[1], list(more), more.shape[1], 0xABCDEF012345)
    return np.concatenate([halves, kept.reshape(-1, 48)])


def _hot8(e: U8, b: U64, q: U64, r: U64) -> tuple[U8, U8, U8]:
    n, size = e.shape
    out = _groups(n), _groups(n), np.full((48, size), 77, np.uint8)
    k.gr8_hot(e, b, q, r, *out)
    return out


@pytest.mark.parametrize(("n", "size", "bits"), HOTS)
@pytest.mark.parametrize("largest", [False, True])
def test_gr8_hot(level: str, rng: np.random.Generator, n: int, size: int, bits: int, largest: bool) -> None:
    """What `gr_hot` gives of words, modulo 2^8, and zeros in lanes that no row has."""
    e, b, q, r = (
        rng.integers(0, 256, (n, size), np.uint8),
        words(rng, bits, n),
        words(rng, size),
        words(rng, n),
    )
    if largest:
        e[...], b[...], q[...], r[...] = 255, M - 1, M - 1, M - 1
    want = [v & np.uint64(255) for v in _hot(e.astype(np.uint64), b, q, r)]
    a, w, columns = _hot8(e, b, q, r)
    same(columns.T.astype(np.uint64), want[2])
    for got, one in zip((a, w), want, strict=False):
        same(_elements(got)[:n], one)
        assert not _elements(got)[n:].any()


@pytest.mark.parametrize("groups", [0, 1, 2, 7])
def test_gr8(level: str, rng: np.random.Generator, groups: int) -> None:
    """Folding and inner products are those over words, modulo 2^8; also of the largest numbers."""
    for a in (
        rng.integers(0, 256, (2 * groups, 48, 64), np.uint8),
        np.full((2 * groups, 48, 64), 255, np.uint8),
    ):
        b = rng.permutation(a.reshape(-1)).reshape(a.shape)
        same(k.gr8_inner(a, b), k.gr_inner(_elements(a), _elements(b)) & np.uint64(255))
        for xi in (0, 1, 1 << 47, (1 << 48) - 1, int(rng.integers(0, 1 << 48))):
            same(_elements(k.gr8_fold(a, xi)), k.gr_fold(_elements(a), xi) & np.uint64(255))


@pytest.mark.parametrize(("rows", "n"), CROSSES)
def test_gr_cross(level: str, rng: np.random.Generator, rows: int, n: int) -> None:
    x, y, r = words(rng, 2, n, rows), words(rng, 2, n, rows), words(rng, n)
    pairs = [
        [tuple(int(v) for v in (x[0, g, i], x[1, g, i], y[0, g, i], y[1, g, i])) for g in range(n)]
        for i in range(rows)
    ]
    want = []
    for term in o_terms(pairs, lambda q, p: tuple(a - b for a, b in zip(q, p, strict=True))):
        products = [(x0 * (y0 + y1) + x1 * y0) % M for x0, x1, y0, y1 in term]
        want.append(
            [sum(p * (int(q) >> t & 1) for p, q in zip(products, r, strict=True)) % M for t in range(48)]
        )
    got = k.gr_cross(x, y, r)
    assert got.shape == (k.crosses(rows), 48)
    if want:
        same(got, want)
    x[1] = y[1] = 0
    same(k.gr_cross(x[:1], y[:1], r), k.gr_cross(x, y, r))


def _halves(parts: Sequence[U64]) -> U64:
    half = len(parts[0]) // 2

    def part(a: U64, b: U64, u: U64, v: U64) -> U64:
        return k.gr_inner(np.ascontiguousarray(a + b), u.copy()) + k.gr_inner(a.copy(), v.copy())

    return np.stack([part(*(v[:half] for v in parts)), part(*(v[half:] - v[:half] for v in parts))])


_THERE = list(itertools.product([False, True], repeat=4))  # which of four components are not zero


@pytest.mark.parametrize("half", [0, 1, 2, 33])
def test_gr_halves(level: str, rng: np.random.Generator, half: int) -> None:
    for there in _THERE:
        whole = [words(rng, 2 * half, 48) * np.uint64(is_there) for is_there in there]
        parts = [v if is_there else None for v, is_there in zip(whole, there, strict=True)]
        same(k.gr_halves(parts, 2 * half), _halves(whole))


@pytest.mark.parametrize(
    ("here", "there"), [(0, 0), (1, 0), (1, 1), (2, 1), (33, 0), (33, 32), (40, 40), (65, 3)]
)
def test_gr_fold_block(level: str, rng: np.random.Generator, here: int, there: int) -> None:
    """As two folds, put together, and the halves of that; whatever components there are."""
    xi, rows = int(rng.integers(0, 1 << 48)), here + there + (here + there) % 2
    for first, second in itertools.product(_THERE, _THERE if here < 3 else _THERE[-3:]):
        kept = [words(rng, 2 * here, 48) if f else None for f in first]
        more = [words(rng, 2 * there, 48) if f and s else None for f, s in zip(first, second, strict=True)]
        want = np.zeros((4, rows, 48), np.uint64)
        for to, a, b in zip(want, kept, more, strict=True):
            if a is not None:
                to[:here] = k.gr_fold(a, xi)
            if b is not None:
                to[here : here + there] = k.gr_fold(b, xi)
        same(k.gr_fold_block(kept, 2 * here, more, 2 * there, xi), _halves(list(want)))
        for a, to in zip(kept, want, strict=True):
            if a is not None:
                same(a[:rows], to)


def test_gr_all_ones(level: str) -> None:
    a = np.full((1, 48), ONES, np.uint64)
    r = u64([ONES])
    same(each_product(a, a)[0], o_gr_mul([ONES] * 48, [ONES] * 48))
    same(k.gr_mul01(a, r)[0], o_gr_mul([ONES] * 48, [1] * 48))


def test_gr_every_monomial(level: str) -> None:
    """X^i X^j for all i, j: each place of the reduction is met."""
    unit = np.eye(48, dtype=np.uint64)
    for i in range(48):
        row = np.ascontiguousarray(np.broadcast_to(unit[i], (48, 48)))
        want = [o_gr_mul(ints(unit[i]), ints(unit[j])) for j in range(48)]
        same(each_product(row, unit), want)
        same(k.gr_mul01(row, u64([1 << j for j in range(48)])), want)


def test_gr_is_a_ring_with_units(level: str, rng: np.random.Generator) -> None:
    a, b, c = words(rng, 5, 48), words(rng, 5, 48), words(rng, 5, 48)
    same(each_product(each_product(a, b), c), each_product(a, each_product(b, c)))
    same(each_product(a, b), each_product(b, a))
    same(each_product(a, b + c), each_product(a, b) + each_product(a, c))
    one = np.zeros((5, 48), np.uint64)
    one[:, 0] = 1
    unit = a.copy()
    unit[:, 0] |= np.uint64(1)  # nonzero modulo 2, so a unit if the modulus is irreducible modulo 2
    # x^(2^48 - 2) inverts modulo 2 (that much holds only in a field of 2^48); Newton's steps lift it to 2^64.
    inverse, square = one.copy(), unit
    for _ in range(47):
        square = each_product(square, square)
        inverse = each_product(inverse, square)
    assert ((each_product(inverse, unit) - one) % np.uint64(2) == 0).all()
    for _ in range(6):
        inverse = each_product(inverse, np.uint64(2) * one - each_product(inverse, unit))
    same(each_product(inverse, unit), one)


def test_gr_misuse(rng: np.random.Generator) -> None:
    a, r, x = words(rng, 3, 48), words(rng, 3), words(rng, 2, 3)
    g, c = np.zeros((1, 48, k.GROUP), np.uint8), np.zeros((48, 3), np.uint8)
    frozen = a[:2].copy()
    frozen.flags.writeable = False
    refuses(
        lambda: k.gr_inner(a, a[:2]),
        lambda: k.gr_inner(a[:, :47], a[:, :47]),
        lambda: k.gr_inner(a, r),
        lambda: k.gr_mul01(a, r[:2]),
        lambda: k.gr_fold(a, 1),
        lambda: k.gr_fold(a[:2], 1 << 48),
        lambda: k.gr_scale01(r, r[:2]),
        lambda: k.gr_combine(x, r[:2]),
        lambda: k.gr_combine32(x.astype(np.uint32), r[:2]),
        lambda: k.gr_combine32(x, words(rng, 48)),  # type: ignore[arg-type]
        lambda: k.gr_combine_cols(x, r),
        lambda: k.gr_combine(x.T, r[:2]),
        lambda: k.gr_cross(words(rng, 2, 3, 6), words(rng, 2, 3, 6), r),
        lambda: k.gr_cross(words(rng, 2, 3, 4), words(rng, 2, 3, 4), r[:2]),
        lambda: k.gr_cross(words(rng, 2, 3, 4), words(rng, 1, 3, 4), r),
        lambda: k.gf_cross(words(rng, 1, 3, 4), words(rng, 1, 3, 4), words(rng, 64, 3)),
        lambda: k.gr_halves([a, a, a, a], 3),
        lambda: k.gr_halves([a[:2], a[:2], a[:2]], 2),
        lambda: k.gr_halves([a[:2], a[:2], a[:2], a], 2),
        lambda: k.gr_fold_block([a[:2], None, None, None], 2, [None] * 4, 4, 1),
        lambda: k.gr_fold_block([a[:2], None, None, None], 2, [None, a[:2], None, None], 2, 1),
        lambda: k.gr_fold_block([a[:2], None, None, None], 2, [None] * 4, 0, 1 << 48),
        lambda: k.gr_fold_block([frozen, None, None, None], 2, [None] * 4, 0, 1),
        lambda: k.gr_hot(a, a.copy()[:2], a.copy(), words(rng, 3, 3), words(rng, 2, 3), r, r),
        lambda: k.gr_hot(a, a.copy(), words(rng, 513, 48), words(rng, 3, 513), x, words(rng, 513), r),
        lambda: k.gr_hot(a, a.copy(), a.copy(), words(rng, 3, 3), words(rng, 49, 3), r, r),
        lambda: k.gr_hot(a, a.copy(), a.copy(), words(rng, 3, 3), words(rng, 2, 3), r[:2], r),
        lambda: k.gr_hot(a, a.copy(), a.copy(), words(rng, 3, 3).astype(np.uint8), words(rng, 2, 3), r, r),
        lambda: k.gr8_hot(words(rng, 3, 3), words(rng, 2, 3), r, r, g, g.copy(), c),  # type: ignore[arg-type]
        lambda: k.gr8_hot(c[:3], words(rng, 2, 3), r, r, g, g.copy(), c[:40].copy()),
        lambda: k.gr8_hot(c[:3], words(rng, 2, 3), r[:2], r, g, g.copy(), c.copy()),
        lambda: k.gr8_hot(c[:3], words(rng, 2, 3), r, r, g, np.concatenate([g, g]), c.copy()),
        lambda: k.gr8_fold(g, 1),
        lambda: k.gr8_fold(np.concatenate([g, g]), 1 << 48),
        lambda: k.gr8_fold(np.concatenate([g, g]), 1, c),
        lambda: k.gr8_inner(g, np.concatenate([g, g])),
    )


# ---- across levels, at sizes where no oracle is quick ----

WIDE: dict[str, Callable[[np.random.Generator], Any]] = {
    "matmul": lambda g: k.matmul(words(g, 37, 211), words(g, 211, 403)),
    "matmul_row": lambda g: k.matmul(words(g, 1, 211), words(g, 211, 4099)),
    "matmul_nt": lambda g: k.matmul_nt(words(g, 3, 211), words(g, 97, 211)),
    "matmul32": lambda g: k.matmul32(words32(g, 37, 211), words32(g, 211, 403)),
    "matmul32_row": lambda g: k.matmul32(words32(g, 1, 211), words32(g, 211, 8211)),
    "pieces": lambda g: k.pieces(
        words(g, 2, 2, 77, 4, 256), words(g, 2, 77), words(g, 2, 6, 512), rest=12, flags=2
    ),
    "trunc_if": lambda g: k.trunc_if(
        (words(g, 2, 4099), words(g, 2, 4099), words(g, 2, 4099, 3), words(g, 2, 4099, 4)),
        words(g, 2),
        words(g, 65),
        words(g, 4099),
        [(99, 16, 0, 61), (4000, 27, 11, 60)],
    ),
    "bytes_pack": lambda g: k.bytes_pack(words(g, 4099), 5),
    "bytes_unpack": lambda g: k.bytes_unpack(words(g, 2562), 4099, 5),
    "drop": lambda g: k.drop(words(g, 2, 4099), words(g, 2), (0, 5, 40), 21),
    "choose": lambda g: k.choose(
        words(g, 2, 999, 30),
        words(g, 2, 999, k.choose_places(5)),
        words(g, 63),
        words(g, 999, 5),
        [(16, 0), (20, 4), (27, 11), (33, 17), (60, 44)],
    ),
    "bits_at_most": lambda g: k.bits_at_most(words(g, 2, 160, 65), (5,) * 5, words(g, 3, 4099)),
    "bits_products": lambda g: k.bits_products(
        words(g, 2, 1023, 77),
        words(g, 2),
        words(g, 10, 77),
        k.Products([(range(10), range(1023)), ((3, 5), (9, 4, 2))]),
    ),
    "bit_pick": lambda g: k.bit_pick(words(g, 77, 65), words(g, 4099) % np.uint64(77)),
    "gf_inner": lambda g: u64(k.gf_inner(words(g, 4099), words(g, 4099))),
    "gf_cross": lambda g: k.gf_cross(words(g, 2, 77, 64), words(g, 2, 77, 64), words(g, 64, 77)),
    "gf_combine": lambda g: k.gf_combine(words(g, 77, 64), words(g, 64, 77)),
    "gf_blend": lambda g: k.gf_blend(words(g, 77, 64), words(g, 64)),
    "gr_cross": lambda g: k.gr_cross(words(g, 2, 77, 64), words(g, 2, 77, 64), words(g, 77)),
    "gr_cross, alone": lambda g: k.gr_cross(words(g, 1, 77, 64), words(g, 1, 77, 64), words(g, 77)),
    "gr_halves": lambda g: k.gr_halves(words(g, 4, 302, 48), 302),
    "gr_fold_block": lambda g: _folded(words(g, 4, 302, 48), words(g, 4, 204, 48)),
    "gr_inner": lambda g: k.gr_inner(words(g, 301, 48), words(g, 301, 48)),
    "gr_mul01": lambda g: k.gr_mul01(words(g, 301, 48), words(g, 301)),
    "gr_combine": lambda g: k.gr_combine(words(g, 13, 1001), words(g, 1001)),
    "gr_combine, more": lambda g: k.gr_combine(words(g, 35, 1301), words(g, 1301)),
    "gr_combine32": lambda g: k.gr_combine32(words32(g, 35, 1301), words(g, 1301)),
    "gr_combine_cols": lambda g: k.gr_combine_cols(words(g, 101, 103), words(g, 101)),
    "bit_slice": lambda g: k.bit_slice(words(g, 4099), 64),
    "gr_hot": lambda g: np.concatenate(
        _hot(words(g, 301, 128), words(g, 7, 301), words(g, 128), words(g, 301))
    ),
    "gr8_hot": lambda g: np.concatenate(
        [
            v.reshape(-1)
            for v in _hot8(
                g.integers(0, 256, (301, 128), np.uint8), words(g, 7, 301), words(g, 128), words(g, 301)
            )
        ]
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_levels_agree(name: str) -> None:
    before, results = k.level(), []
    try:
        for each in k.available():
            k.force(each)
            results.append(WIDE[name](np.random.default_rng(7)))
    finally:
        k.force(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


# ---- threads ----

# Long enough to be split, at sizes that no number of threads divides.
LONG: dict[str, Callable[[np.random.Generator], npt.NDArray[Any]]] = {
    "prg": lambda g: _filled(g, (1 << 20) + 5, 0),
    "prg further on": lambda g: _filled(g, (1 << 19) + 16, (1 << 32) - 77),
    "matmul, a row": lambda g: k.matmul(words(g, 1, 301), words(g, 301, 2503)),
    "matmul, single rows": lambda g: k.matmul(words(g, 5, 1, 83), words(g, 5, 83, 701)),
    "matmul, a row added": lambda g: k.matmul(
        words(g, 1, 401), words(g, 401, 999), out=words(g, 1, 999), add=True
    ),
    "matmul, few rows": lambda g: k.matmul(words(g, 5, 257), words(g, 257, 1009)),
    "matmul, wide": lambda g: k.matmul(words(g, 19, 131), words(g, 131, 515)),
    "matmul, high": lambda g: k.matmul(words(g, 515, 131), words(g, 131, 19)),
    "matmul, batched": lambda g: k.matmul(words(g, 5, 9, 83), words(g, 5, 83, 331)),
    "matmul, small ones": lambda g: k.matmul(words(g, 37, 8, 67), words(g, 37, 67, 48)),
    "matmul, added": lambda g: k.matmul(words(g, 3, 401), words(g, 401, 999), out=words(g, 3, 999), add=True),
    "matmul_nt, a row": lambda g: k.matmul_nt(words(g, 1, 701), words(g, 1003, 701)),
    "matmul_nt, wide": lambda g: k.matmul_nt(words(g, 19, 131), words(g, 515, 131)),
    "matmul_nt, high": lambda g: k.matmul_nt(words(g, 515, 131), words(g, 19, 131)),
    "matmul_nt, added": lambda g: k.matmul_nt(
        words(g, 2, 3, 211), words(g, 2, 401, 211), out=words(g, 2, 3, 401), add=True
    ),
    "matmul32, a row": lambda g: k.matmul32(words32(g, 1, 301), words32(g, 301, 9001)),
    "matmul32, a row added": lambda g: k.matmul32(
        words32(g, 1, 801), words32(g, 801, 999), out=words32(g, 1, 999), add=True
    ),
    "matmul32, wide": lambda g: k.matmul32(words32(g, 19, 231), words32(g, 231, 515)),
    "matmul32, high": lambda g: k.matmul32(words32(g, 515, 231), words32(g, 231, 19)),
    "matmul32, added": lambda g: k.matmul32(
        words32(g, 3, 401), words32(g, 401, 1999), out=words32(g, 3, 1999), add=True
    ),
    "gr_combine": lambda g: k.gr_combine(words(g, 277, 501), words(g, 501)),
    "gr_combine32": lambda g: k.gr_combine32(words32(g, 277, 501), words(g, 501)),
    "gr_mul01": lambda g: k.gr_mul01(words(g, 1001, 48), words(g, 1001)),
    "double": lambda g: _doubled(words(g, 1501, 256), words(g, 1501, 101)),
    "double_part": lambda g: _added(words(g, 1501, 101), words(g, 2, 1501, 256), words(g, 2, 1501)),
    "wipe": lambda g: _wiped(words(g, (1 << 17) + 3)),
}


def _filled(g: np.random.Generator, size: int, block: int) -> npt.NDArray[Any]:
    out = np.zeros(size + 64, np.uint8)
    k.prg(words(g, 4).tobytes(), 3, out[:size], block)
    return out


def _doubled(e: U64, high: U64) -> U64:
    k.double(e, high)
    return e


def _added(out: U64, e: U64, b: U64) -> U64:
    k.double_part(out, e, b)
    return out


def _wiped(x: U64) -> U64:
    k.wipe(x[1:-1])
    return x


def workers() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def walk_threads() -> None:
    """Every kernel that is split gives on two threads, three and as many as can be what it gives on one."""
    for level in k.available():
        k.force(level)
        for name, call in LONG.items():
            k.use_threads(1)
            want = call(np.random.default_rng(7))
            for count in (2, 3, k.MAX_THREADS, 2):
                k.use_threads(count)
                got = call(np.random.default_rng(7))
                assert np.array_equal(got, want), f"{name} at {level} on {count} threads"
    assert workers() >= k.MAX_THREADS, "nothing was split"
    print("the same")


def test_any_number_of_threads_gives_the_same() -> None:
    run = python("import test_kernels; test_kernels.walk_threads()")
    assert run.returncode == 0 and run.stdout.strip() == "the same", run.stderr


def walk_together() -> None:
    """Kernels that run at the same time, each worth to be split, from threads of Python."""
    wanted = {name: call(np.random.default_rng(7)) for name, call in LONG.items()}
    k.use_threads(3)
    wrong: list[str] = []

    def caller(names: list[str]) -> None:
        for name in names * 20:
            if not np.array_equal(LONG[name](np.random.default_rng(7)), wanted[name]):
                wrong.append(name)

    names = list(LONG)
    callers = [threading.Thread(target=caller, args=(names[i:] + names[:i],)) for i in (0, 5, 11)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert not wrong
    print("the same")


def test_callers_at_the_same_time_get_their_own() -> None:
    run = python("import test_kernels; test_kernels.walk_together()")
    assert run.returncode == 0 and run.stdout.strip() == "the same", run.stderr


def test_who_wants_to_be_alone_starts_no_thread() -> None:
    """And nobody does before more than one is allowed."""
    run = python(
        "import threading, test_kernels as t\n"
        "def long(): t.LONG['matmul, wide'](t.np.random.default_rng(7))\n"
        "def alone(): t.k.alone(); long(); print(t.workers() - before)\n"
        "before = t.workers() + 1; long(); t.k.use_threads(3)\n"
        "one = threading.Thread(target=alone); one.start(); one.join()\n"
        "def sociable(): long(); print(t.workers() - before)\n"
        "one = threading.Thread(target=sociable); one.start(); one.join()"
    )
    assert run.stdout.split() == ["0", "2"], run.stderr


def test_threads_are_counted() -> None:
    refuses(lambda: k.use_threads(0), lambda: k.use_threads(k.MAX_THREADS + 1))
    assert k.threads() == 1


# ---- bounds: arrays that touch forbidden pages on either side ----


class Fence:
    """Arrays whose last or first byte is the last or first of accessible memory; a touch beyond is fatal."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.kept: list[mmap.mmap] = []
        self.rng = np.random.default_rng(3)

    def empty(self, shape: Any, dtype: Any = np.uint64) -> npt.NDArray[Any]:
        count = int(np.prod(shape))
        size = count * np.dtype(dtype).itemsize
        page = mmap.PAGESIZE
        inner = -(-size // page) * page
        room = mmap.mmap(-1, inner + 2 * page)
        self.kept.append(room)
        whole = np.frombuffer(room, np.uint8)
        for fence in (0, page + inner):
            address = ctypes.c_void_p(whole.ctypes.data + fence)
            assert self.libc.mprotect(address, ctypes.c_size_t(page), 0) == 0
        start = page + (inner - size if self.at_end else 0)
        return whole[start : start + size].view(dtype).reshape(shape)

    def words(self, *shape: int) -> U64:
        x = self.empty(shape)
        x[...] = self.rng.integers(0, M, shape, dtype=np.uint64)
        return x

    def words32(self, *shape: int) -> U32:
        x = self.empty(shape, np.uint32)
        x[...] = self.rng.integers(0, 1 << 32, shape, dtype=np.uint32)
        return x


def walk_fences() -> None:
    """Call every kernel at every level on such arrays, its outputs included."""
    module = vars(k)
    numpy = module["np"]
    for level, at_end in itertools.product(k.available(), (True, False)):
        k.force(level)
        for n in (1, 3, 7, 8, 9, 64, 65, 133):
            fence = Fence(at_end)
            w, h = fence.words, fence.words32
            module["np"] = SimpleNamespace(**{**vars(numpy), "empty": fence.empty})
            packed = (n + 63) // 64
            key = fence.empty(32, np.uint8)
            key[...] = n
            k.prg(key.data, 1, fence.empty(n, np.uint8))
            k.prg(key.data, 1, fence.empty(17 * n, np.uint8))
            for m in (1, 2, 3, 7, 9):
                k.matmul(w(m, n), w(n, 5))
                k.matmul(w(m, 9), w(9, n))
                k.matmul_nt(w(m, n), w(5, n))
                k.matmul_nt(w(m, 9), w(n, 9))
                k.matmul32(h(m, n), h(n, 5))
                k.matmul32(h(m, 9), h(9, n))
            k.rss_mul(w(2, n), w(2, n), w(n))
            k.rss_and(w(2, n), w(2, n), w(n))
            k.bit_slice(w(n), 63)
            k.bit_unslice(w(63, packed), n)
            k.bits_to_ring(w(packed), n)
            k.ring_lsb(w(n))
            for size in (2, 64, 128):
                k.pieces(w(2, 2, n, 3, size), w(2, n), w(2, 5, 2 * size), 12, 2)
                k.rotate(w(n, size), w(n))
                k.rotate(fence.empty((n, size), np.uint16), w(n))
                k.rotate(fence.empty((n, size), np.uint8), w(n))
                k.bit_pick(w(size, packed), w(n) % np.uint64(size))
            k.trunc_mask(w(2, n), w(2, n), w(2), [(n, 20, 4, 61)])
            k.trunc(w(2, n), w(2, n, 3), w(2), w(n), [(n, 20, 4, 61)])
            k.trunc_if((w(2, n), w(2, n), w(2, n, 3), w(2, n, 4)), w(2), w(packed), w(n), [(n, 20, 4, 61)])
            k.norm((w(2, 3, n), w(2, 3, n, 3), w(2, 3, n, 3), w(2, 3)), w(2), w(3, n), 20, 4)
            k.drop(w(2, n), w(2), (3, 5), 20)
            k.bytes_unpack(k.bytes_pack(w(n), 5), n, 5)
            for count in (2, 3, 5):
                hot, z = w(2, n, 2**count - 2), w(2, n, k.choose_places(count))
                k.choose(hot, z, w((n * (count - 1) + 63) // 64), w(n, count), [(20, 4)] * count)
            k.wave(w(2, n, 4), w(n), k.Cosines(w(2), 26, np.ones((3, 2)), waves.CIRCLE))
            k.decay(w(2, n, 4), w(n), k.Bins(np.ones(4), 9, 1.0, 0.5, waves.EXP))
            k.bits_mask(w(2, packed), w(2, n))
            k.ring_unmask(w(2, n), w(2), w(packed))
            k.ring_pick(w(2, n, 15), w(2), w(n, 3), w(2, packed))
            k.bits_at_most(w(2, 14, packed), (3, 2, 1), w(2, n))
            k.bits_products(w(2, 7, n), w(2), w(3, n), k.Products([(range(3), range(7))]))
            k.gf_mul(w(n), w(n))
            k.gf_scale(w(n), 5)
            k.gf_inner(w(n), w(n))
            k.gf_fold(w(2 * n), 5)
            for rows in (1, 8, 64):
                k.gf_cross(w(2, n, rows), w(2, n, rows), w(64, n))
                k.gf_combine(w(n, rows), w(64, n))
                k.gf_blend(w(n, rows), w(rows))
                k.gr_cross(w(2, n, rows), w(2, n, rows), w(n))
                k.gr_cross(w(1, n, rows), w(1, n, rows), w(n))
            k.gr_halves([w(2 * n, 48) for _ in range(4)], 2 * n)
            for m in (0, n):
                k.gr_fold_block(*(v for s in (n, m) for v in ([w(2 * s, 48) for _ in range(4)], 2 * s)), 5)
            for have in (1, 4):
                k.double_part(w(n, have), w(2, n, 8), w(2, n))
                k.double(w(n, 8), w(n, have))
                for kind in (np.uint16, np.uint8):
                    short = fence.empty((2, n, 8), kind)
                    k.double_part(fence.empty((n, have), kind), short, w(2, n))
                    k.double(fence.empty((n, 8), kind), fence.empty((n, have), kind))
            k.gr_inner(w(n, 48), w(n, 48))
            k.gr_mul01(w(n, 48), w(n))
            k.gr_fold(w(2 * n, 48), 5)
            k.gr_scale01(w(n), w(n))
            k.gr_combine(w(5, n), w(n))
            k.gr_combine(w(n, 5), w(5))
            k.gr_combine(w(17, n), w(n))
            k.gr_combine32(h(17, n), w(n))
            k.gr_combine32(h(n, 5), w(5))
            k.gr_combine_cols(w(n, 5), w(n))
            k.gr_combine_cols(w(5, n), w(5))
            narrow = [fence.empty(s, np.uint16) for s in ((n, 5), (5, n))]
            for size in (5, 64, 70):
                groups = [fence.empty((-(-n // 64), 48, 64), np.uint8) for _ in range(2)]
                out = [*groups, fence.empty((48, size), np.uint8)]
                k.gr8_hot(fence.empty((n, size), np.uint8), w(3, n), w(size), w(n), *out)
                k.gr8_inner(*groups)
                k.gr8_fold(fence.empty((2, 48, 64), np.uint8), 5)
            for e in (w(n, 5), w(5, n), *narrow):
                out = [fence.empty((rows, 48), np.uint64) for rows in (len(e), len(e), e.shape[1])]
                k.gr_hot(*out, e, w(3, len(e)), w(e.shape[1]), w(len(e)))
            module["np"] = numpy
    print("unharmed")


def test_no_kernel_touches_memory_beyond_its_arrays() -> None:
    run = python("import test_kernels; test_kernels.walk_fences()")
    assert run.returncode == 0 and run.stdout.strip() == "unharmed", run.stderr


def test_a_fence_is_fatal() -> None:
    run = python(
        "import test_kernels as t; f = t.Fence(True); x = f.words(8)\n"
        "from mimir.kernels import _ffi, _lib; _lib.mk_ring_lsb(_ffi.new('uint64_t[2]'), _ffi.from_buffer("
        "'uint64_t[]', x), 1, 9)"
    )
    assert run.returncode < 0, "reading one word too many went unnoticed"


# ---- bytes ----


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1001])
def test_wipe(n: int) -> None:
    room = np.full(n + 16, 0xFF, np.uint8)
    k.wipe(room[3 : 3 + n])
    assert not room[3 : 3 + n].any() and (room[:3] == 0xFF).all() and (room[3 + n :] == 0xFF).all()
    key = bytearray(b"x" * n)
    k.wipe(key)
    assert key == bytearray(n)


def test_wipe_misuse() -> None:
    frozen = np.ones(3, np.uint8)
    frozen.flags.writeable = False
    for thing in (b"immutable", frozen, np.ones((4, 4), np.uint8)[:, 1], "text"):
        with pytest.raises(LocalError):
            k.wipe(thing)  # type: ignore[arg-type]
