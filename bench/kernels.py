"""Measure every kernel at every level against the ceiling of this machine.

    bench/kernels.py [--threads N] [--out FILE] [name ...]

The ceiling of a kernel is the larger of two times: its bytes at the speed of reading memory, where the case
is larger than the caches, and its 64-bit products at the speed of multiplying. Kernels with neither show
their rate alone. These are of one thread, the best of several runs. Beside it, at the best level, how many
times as fast the kernel is on N threads (default: all processors), of medians taken in turn; near 1 where it
is not split or the case too short. With --out FILE the figures are kept as JSON, with machine and commit:
bench/results/kernels/ has one for each processor.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from run import commit, machine  # noqa: E402

from mimir import kernels as k  # noqa: E402

MIN_SECONDS = 0.15
RUNS = 5
BIG = 1 << 24  # words; 128 MiB is beyond any cache here


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], object]
    items: int  # what the rate counts
    unit: str
    bytes: int = 0  # moved at least, from or to memory
    products: int = 0


def best(call: Callable[[], object]) -> float:
    """Seconds of one call, the least over several runs."""
    call()
    once = time.perf_counter()
    call()
    repeat = max(1, int(MIN_SECONDS / RUNS / max(time.perf_counter() - once, 1e-7)))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        times.append((time.perf_counter() - start) / repeat)
    return min(times)


def gained(call: Callable[[], object], threads: int) -> float:
    """How many times as fast on so many threads as on one."""
    took: dict[int, list[float]] = {1: [], threads: []}
    for _ in range(RUNS):
        for count, times in took.items():
            k.use_threads(count)
            call()
            start = time.perf_counter()
            while time.perf_counter() - start < MIN_SECONDS / RUNS or not times:
                before = time.perf_counter()
                call()
                times.append(time.perf_counter() - before)
    k.use_threads(1)
    return statistics.median(took[1]) / statistics.median(took[threads])


def ceilings() -> tuple[float, float]:
    """(bytes per second read from memory, 64-bit products per second)."""
    source = Path(__file__).with_name("ceiling.c")
    with tempfile.TemporaryDirectory() as aside:
        library = Path(aside) / "ceiling.so"
        subprocess.run(
            [
                "gcc",
                "-O3",
                "-march=native",
                "-mprefer-vector-width=512",
                "-Wno-psabi",
                "-shared",
                "-fPIC",
                "-o",
                str(library),
                str(source),
            ],
            check=True,
        )
        c = ctypes.CDLL(str(library))
    c.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    c.multiply.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
    data = np.ones(BIG + 8, np.uint64)
    address = -(-data.ctypes.data // 64) * 64
    read = BIG * 8 / best(lambda: c.read_all(address, BIG))
    multiply = 128 * 100_000 / best(lambda: c.multiply(3, 100_000))
    return read, multiply


def cases() -> list[Case]:
    g = np.random.default_rng(1)

    def w(*shape: int) -> k.U64:
        return g.integers(0, 1 << 64, shape, dtype=np.uint64)

    room = np.empty(BIG, np.uint64)
    found: list[Case] = []

    def add(
        name: str, call: Callable[[], object], items: int, unit: str, size: int = 0, products: int = 0
    ) -> None:
        found.append(Case(name, call, items, unit, size, products))

    add("prg 128 MiB", partial(k.prg, bytes(32), 1, room), BIG * 8, "B", BIG * 8)
    small = np.empty(8192, np.uint64)
    add("prg 64 KiB", partial(k.prg, bytes(32), 1, small), small.nbytes, "B")
    for m, n_in, n in [
        (1, 2048, 8192),
        (2, 2048, 8192),
        (6, 1024, 4096),
        (16, 512, 2048),
        (64, 512, 512),
        (256, 256, 512),
    ]:
        a, b, out = w(m, n_in), w(n_in, n), np.empty((m, n), np.uint64)
        add(f"matmul {m}x{n_in}x{n}", partial(k.matmul, a, b, out=out), m * n_in * n, "mul",
            b.nbytes, m * n_in * n)  # fmt: skip
    for m, n_in, n in [(1, 2048, 8192), (1, 768, 50257), (8, 768, 3072), (32, 768, 3072), (256, 256, 512)]:
        left, right = w(m, n_in).astype(np.uint32), w(n_in, n).astype(np.uint32)
        short = np.empty((m, n), np.uint32)
        add(f"matmul32 {m}x{n_in}x{n}", partial(k.matmul32, left, right, out=short), m * n_in * n, "mul",
            right.nbytes if m == 1 else 0)  # fmt: skip
    for m, n_in, n in [(1, 64, 2048), (1, 2048, 8192), (64, 64, 512), (256, 64, 256)]:
        a, b, out = w(m, n_in), w(n, n_in), np.empty((m, n), np.uint64)
        add(f"matmul_nt {m}x{n_in}x{n}", partial(k.matmul_nt, a, b, out=out), m * n_in * n, "mul",
            b.nbytes if b.nbytes > 1 << 24 else 0, m * n_in * n)  # fmt: skip
    n = 1 << 14
    x, y, z = w(2, n), w(2, n), w(n)
    add("rss_mul 16k", partial(k.rss_mul, x, y, z), n, "el", 0, 2 * n)
    add("rss_and 16k", partial(k.rss_and, x, y, z), n, "el")
    add("bit_slice 16k x64", partial(k.bit_slice, z, 64), n, "el")
    planes, packed = k.bit_slice(z, 64), k.ring_lsb(z)
    add("bit_unslice 16k x64", partial(k.bit_unslice, planes, n), n, "el")
    add("bytes_pack 16k, of 5", partial(k.bytes_pack, z, 5), n, "el")
    add("bytes_unpack 16k, of 5", partial(k.bytes_unpack, k.bytes_pack(z, 5), n, 5), n, "el")
    add("bits_to_ring 16k", partial(k.bits_to_ring, packed, n), n, "el")
    add("ring_lsb 16k", partial(k.ring_lsb, z), n, "el")
    for size, degree in [(16, 1), (128, 3)]:
        rows, turned = w(2, 1, 1024, degree + 1, size), w(1, degree + 2, 2 * size)
        read = partial(k.pieces, rows, w(1, 1024), turned, 12, 1)
        terms = (degree + 1) * (degree + 2) // 2 + 2 * (degree + 2)  # of the tables; of two components
        add(f"pieces K={size} D={degree}", read, 1024, "value", 0, 1024 * size * terms)
    for size in (16, 256):
        add(f"rotate K={size}", partial(k.rotate, w(1024, size), w(1024)), 1024 * size, "el")
    add("bit_pick K=32", partial(k.bit_pick, w(32, n // 64), w(n) % np.uint64(32)), n, "el")
    a, b = w(n), w(n)
    add("gf_mul 16k", partial(k.gf_mul, a, b), n, "mul")
    add("gf_scale 16k", partial(k.gf_scale, a, 3), n, "mul")
    add("gf_inner 16k", partial(k.gf_inner, a, b), n, "mul")
    add("gf_fold 16k", partial(k.gf_fold, a, 3), n // 2, "mul")
    blocks, columns, lanes = w(2, 512, 64), w(512), w(64, 512)
    add("gf_cross 512x64", partial(k.gf_cross, blocks, blocks, lanes), blocks[0].size, "word")
    add("gf_combine 512x64", partial(k.gf_combine, blocks[0], lanes), blocks[0].size, "word")
    add("gf_blend 512x64", partial(k.gf_blend, blocks[0], columns[:64]), blocks[0].size, "word")
    add("gr_cross 512x64", partial(k.gr_cross, blocks, blocks, columns), blocks[0].size, "word")
    n = 1024
    p, q, r, s = w(n, 48), w(n, 48), w(n), w(n)
    add("gr_inner 1k", partial(k.gr_inner, p, q), n, "mul", 0, n * 48 * 48)
    add("gr_mul01 1k", partial(k.gr_mul01, p, r), n, "mul")
    add("gr_fold 1k", partial(k.gr_fold, p, 0x123456789ABC), n // 2, "mul")
    add("gr_halves 1k", partial(k.gr_halves, (p, q, p, q), n), n // 2, "pair")
    block = [v.copy() for v in (p, q, p, q)]  # is folded in place, again and again
    add("gr_fold_block 1k", partial(k.gr_fold_block, block, n, (q, p, q, p), n, 0x123456789ABC), n, "pair")
    add("gr_scale01 1k", partial(k.gr_scale01, s, r), n, "mul")
    for m, n in [(1, 1 << 16), (16, 1 << 12), (512, 768)]:
        x, r = w(m, n), w(n)
        add(f"gr_combine {m}x{n}", partial(k.gr_combine, x, r), m * n, "mul")
    for m, n in [(64, 1 << 12), (768, 3072)]:
        x, r = w(m, n), w(n)
        add(f"gr_combine {m}x{n}", partial(k.gr_combine, x, r), m * n, "mul")
        add(f"gr_combine32 {m}x{n}", partial(k.gr_combine32, x.astype(np.uint32), r), m * n, "mul")
    for m, n in [(16, 1 << 12), (1024, 1024)]:
        x, r = w(m, n), w(m)
        add(f"gr_combine_cols {m}x{n}", partial(k.gr_combine_cols, x, r), m * n, "mul")
    return found


def amount(rate: float) -> str:
    return f"{rate / 1e9:8.3f} G" if rate >= 1e8 else f"{rate / 1e6:8.3f} M"


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="kernels.py [options]",
    )
    most = min(len(os.sched_getaffinity(0)), k.MAX_THREADS)
    p.add_argument("--threads", type=int, default=most, metavar="N", help=f"at most (default {most})")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the figures here, too")
    p.add_argument("wanted", nargs="*", metavar="name", help="kernels whose names begin so")
    a = p.parse_args()
    wanted, threads = a.wanted, a.threads
    read, multiply = ceilings()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "load": [os.getloadavg()[0]],
        "ceilings": {"bytes read": read, "products": multiply},
        "rows": [],
    }
    print(f"reads {read / 1e9:.1f} GB/s from memory, multiplies {multiply / 1e9:.1f} G products/s")
    print(f"{'kernel':28}{'level':8}{'rate':>12} per s        GB/s   of ceiling   on {threads} threads")
    for case in cases():
        if wanted and not any(case.name.startswith(name) for name in wanted):
            continue
        for level in k.available():
            k.force(level)
            seconds = best(case.call)
            floor = max(case.bytes / read, case.products / multiply)
            share = f"{floor / seconds:8.0%}" if floor else "        "
            bandwidth = f"{case.bytes / seconds / 1e9:8.1f}" if case.bytes else "        "
            more = gained(case.call, threads) if threads > 1 and level == k.available()[-1] else None
            rate = f"{amount(case.items / seconds)} {case.unit:8}"
            many = f"{more:8.2f}" if more else ""
            print(f"{case.name:28}{level:8}{rate} {bandwidth} {share} {many}", flush=True)
            result["rows"].append(
                {
                    "kernel": case.name,
                    "level": level,
                    "rate": float(f"{case.items / seconds:.4g}"),
                    "of": case.unit,
                    "ceiling": round(floor / seconds, 3) if floor else None,
                    "threads": threads,
                    "on threads": round(more, 2) if more else None,
                }
            )
    if a.out:
        result["load"].append(os.getloadavg()[0])
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
