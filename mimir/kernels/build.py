"""Compile the kernels: by setuptools on install, or in place by `python -m mimir.kernels.build`.

Every level is compiled on every x86-64 machine, each file naming its own instruction sets; dispatch.c chooses
among them when the library loads.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from cffi import FFI

SOURCES = ("ref.c", "avx2.c", "avx512.c", "dispatch.c", "pool.c")
# Partial redundancy elimination makes gcc 12 store the accumulators of a register block to the stack in each
# round: without it gr_combine is three times as fast.
# A multiplication and an addition of doubles joined into one, as avx512 could, would round otherwise: results
# must be the same at every level.
FLAGS = ["-O3", "-fno-tree-pre", "-ffp-contract=off", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]

LIBRARY = "_native.abi3.so"  # the name setuptools gives it too: cffi keeps to the stable ABI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HEADERS = ("kernels.h", "levels.h", "ct.h", "simd.h", "online.h", "gr8.h", "aes.h", "pool.h")


def declarations(header: str) -> str:
    """The header as cffi can read it: without its preprocessor lines."""
    return "\n".join(line for line in header.splitlines() if not line.startswith("#"))


def make(place: Path) -> FFI:
    """The builder; `place` is the path of this directory as the compiler shall see it."""
    builder = FFI()
    builder.cdef(declarations((HERE / "kernels.h").read_text()))
    builder.set_source(
        "mimir.kernels._native",
        '#include "kernels.h"',
        sources=[str(place / name) for name in SOURCES],
        depends=[str(place / name) for name in HEADERS],
        include_dirs=[str(place)],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
    )
    return builder


ffibuilder = make(HERE.relative_to(ROOT))  # setuptools wants paths relative to setup.py


def main() -> int:
    """Compile aside and move the library into place, so that a process which has it loaded lives on."""
    with tempfile.TemporaryDirectory() as aside:
        built = make(HERE).compile(tmpdir=aside, verbose="-v" in sys.argv[1:])
        fresh = HERE / f".{LIBRARY}.new"
        shutil.copyfile(built, fresh)
    os.replace(fresh, HERE / LIBRARY)
    for other in HERE.glob("_native.*.so"):
        if other.name != LIBRARY:
            other.unlink()  # it would be imported in place of the fresh one
    print(HERE / LIBRARY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
