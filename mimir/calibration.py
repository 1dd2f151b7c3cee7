"""The seconds of one processor that each kind of work takes on this machine: measured, kept, read again.

`calibrate` takes some twenty seconds, of which three processes on loopback have a part (see `loopback`).
Everything is processor time, of kernels the least and of processes the median of a few measurements, so that
other work on the machine disturbs it little.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mimir import dryrun, kernels, loopback
from mimir.actors.triples import keep_pages
from mimir.dryrun import ONLINE, PREP, Counts
from mimir.errors import BadInput, LocalError
from mimir.vault import CHUNK

FORMAT: Final = 5  # of a file of rates
BEST_OF: Final = 3
LEAST: Final = 0.02  # seconds of a measurement
BEYOND: Final = 1 << 24  # words of a matrix that lies in no cache
MEMORY: Final = 4 << 30  # bytes to have from the system at most, to see what that takes
PIECE: Final = 64 << 20
SPREAD: Final = 96 << 20  # bytes of arguments that take turns, as much as is between two uses of material
ROUND, SENT, HASH = "round", "sent", "hash"


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one processor per unit of each kind of work: `dryrun.Counts.work`, a round, a byte sent (and
    one received), a byte hashed.
    """

    seconds: Mapping[str, float]
    kernels: str  # level
    cores: int
    near: int  # bytes of memory that the system gives as fast as what was given back a moment ago

    def processor(self, c: Counts, room: float = 0.0) -> float:
        """Seconds that this work takes one processor, if `room` of the `near` bytes are left for it."""
        known = self.seconds
        work = sum(known[key] * units for key, units in c.work.items())
        work -= min(room, c.work[dryrun.GROWN]) * (known[dryrun.GROWN] - known[dryrun.MAPPED])
        return work + known[HASH] * c.hashed + known[ROUND] * c.rounds + known[SENT] * c.sent

    def write(self, file: Path) -> None:
        whole: dict[str, Any] = {"format": FORMAT, "kernels": self.kernels, "cores": self.cores}
        whole |= {"near": self.near, "seconds": dict(self.seconds)}
        file.write_text(json.dumps(whole, indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Rates:
        """Rates written earlier; `BadInput` if the file is anything else."""
        try:
            raw = json.loads(file.read_text())
            if raw["format"] != FORMAT or set(raw["seconds"]) != keys():
                raise KeyError
            seconds = {str(k): float(v) for k, v in raw["seconds"].items()}
            if not all(0 <= v < 1 for v in seconds.values()):
                raise ValueError
            return cls(seconds, str(raw["kernels"]), int(raw["cores"]), int(raw["near"]))
        except OSError as error:
            raise BadInput(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            why = "not rates of this version; remove it to have them measured anew"
            raise BadInput(f"{file}: {why}") from None


def keys() -> set[str]:
    """What rates are of."""
    return {
        *dryrun.RULES,
        *(name + dryrun.ONE_ROW for name in dryrun.STREAMED),
        *dryrun.PYTHON,
        dryrun.ARRAY,
        dryrun.LARGE_ARRAY,
        dryrun.DECRYPT,
        dryrun.GROWN,
        dryrun.MAPPED,
        "prg",
        "nanoseconds",
        ROUND,
        SENT,
        HASH,
    }


def calibrate(best_of: int = BEST_OF, least: float = LEAST, memory: int = MEMORY) -> Rates:
    """Measure this machine, in processes of their own: everything `best_of` times, kernels for `least`
    seconds each time. They take up to `memory` bytes for a moment, at most a quarter of what is available.
    """
    words = [sys.executable, "-m", "mimir.calibration", str(best_of), str(least), str(memory)]
    told = subprocess.run(words, capture_output=True, text=True)
    if told.returncode:
        last = told.stderr.strip().splitlines()[-1:]
        raise LocalError(f"measuring this machine failed: {' '.join(last) or 'it ended'}")
    return Rates(**json.loads(told.stdout))


# --- in a process of its own --------------------------------------------------------------------------------


def _measure(memory: int) -> Rates:
    keep_pages()  # as parties do
    seconds = {"nanoseconds": 1e-9} | _kernels() | _bytes()
    told = loopback.measure(BEST_OF)
    seconds[dryrun.MAPPED], seconds[dryrun.GROWN], near = _memory(memory)
    figure = {name: statistics.median(each[name] for each in told) for name in told[0]}
    seconds |= {ROUND: figure["round"], SENT: figure["sent"], dryrun.THREAD: figure["thread"]}
    return Rates(seconds | _calls(seconds, figure), kernels.level(), os.cpu_count() or 1, near)


def _best(call: Callable[..., Any], *turns: Sequence[Any]) -> float:
    """Processor seconds of one call, the least of a few; with one list of arguments after another."""
    if turns:
        given = itertools.cycle(turns)
        return _best(lambda: call(*next(given)))
    call()
    began = time.perf_counter()
    call()
    repeat = max(1, int(LEAST / max(time.perf_counter() - began, 1e-7)))
    times = []
    for _ in range(BEST_OF):
        before = time.process_time()
        for _ in range(repeat):
            call()
        times.append((time.process_time() - before) / repeat)
    return min(times)


def examples(small: bool = False) -> dict[str, tuple[Any, ...]]:
    """Arguments for every kernel in `dryrun.RULES`, and for products of one row: of sizes as they occur with
    10^8 weights, whose matrices lie in no cache; or as small as they can be.
    """
    g = np.random.default_rng(1)

    def w(*shape: int) -> Any:
        return g.integers(0, 1 << 64, shape, dtype=np.uint64)

    def of(large: int, little: int) -> int:
        return little if small else large

    n, m = of(1 << 17, 64), of(1 << 14, 64)  # single values; rows of what is made of several
    k, e = of(1 << 14, 64), of(512, 16)  # elements of the fields that checks are over
    rows, few, slots = of(64, 4), of(1024, 8), of(128, 16)
    inner, wide = of(1024, 16), of(BEYOND // 1024, 16)
    degree = kernels.GR_DEGREE
    weights = np.full(inner * wide, 3, np.uint64)
    halves = weights.view(np.uint32)
    near = weights[: inner * of(4096, 16)].reshape(inner, -1)
    xi = 0x123456789ABC
    one = np.array([1, 0], np.uint64)
    cosines = kernels.Cosines(w(4), 26, np.ones((3, 4)), np.ones((2, 10)))
    bins = kernels.Bins(np.ones(16), 13, 2.0**-13, 0.5, np.ones(14))
    return {
        "matmul": (w(of(32, 2), inner), near),
        "matmul" + dryrun.ONE_ROW: (w(1, inner), weights.reshape(inner, -1)),
        "matmul_nt": (w(7, slots), w(of(2048, 16), slots)),
        "matmul32": (w(of(32, 2), inner).astype(np.uint32), halves.reshape(inner, -1)),
        "matmul32" + dryrun.ONE_ROW: (w(1, inner).astype(np.uint32), halves.reshape(inner, -1)),
        "rss_mul": (w(2, n), w(2, n), w(n)),
        "rss_and": (w(2, n), w(2, n), w(n)),
        "bit_slice": (w(n), 64),
        "bit_unslice": (w(64, n // 64), n),
        "bytes_pack": (w(n), 5),
        "bytes_unpack": (w(5 * n // 8), n, 5),
        "bits_to_ring": (w(n // 64), n),
        "ring_lsb": (w(n),),
        "bit_pick": (w(32, n // 64), w(n) % np.uint64(32)),
        "trunc_mask": (w(2, m), w(2, m), one, [(m, 20, 4, 61)]),
        "trunc": (w(2, m), w(2, m, 3), one, w(m), [(m, 20, 4, 61)]),
        "trunc_if": ((w(2, m), w(2, m), w(2, m, 3), w(2, m, 4)), one, w(m // 64), w(m), [(m, 20, 4, 61)]),
        "norm": ((w(2, 2, m), w(2, 2, m, 3), w(2, 2, m, 3), w(2, 2)), one, w(2, m), 16, 0),
        "drop": (w(2, m), one, (8, 11), 20),
        "pieces": (w(2, of(64, 2), 12, 4, 128), w(of(64, 2), 12), w(of(64, 2), 5, 256), 12, 1),
        "choose": (w(2, 12, 30), w(2, 12, kernels.choose_places(5)), w(1), w(12, 5), [(20, 4)] * 5),
        "wave": (w(2, m, 8), w(m), cosines),
        "decay": (w(2, m, 16), w(m), bins),
        "bits_mask": (w(2, m // 64), w(2, m)),
        "ring_unmask": (w(2, m), one, w(m // 64)),
        "ring_pick": (w(2, m, 11), one, w(m, 2), w(2, m // 64)),
        "bits_at_most": (w(2, 96, m // 64), (5, 5, 5), w(2, m)),
        "bits_products": (w(2, 7, few), one, w(3, few), kernels.Products([(range(3), range(7))])),
        "rotate": (w(4 * few, slots), w(4 * few)),
        "double_part": (w(4 * few, slots // 2), w(2, 4 * few, slots), w(2, 4 * few)),
        "double": (w(4 * few, slots), w(4 * few, slots // 2)),
        "gf_mul": (w(k), w(k)),
        "gf_scale": (w(k), xi),
        "gf_inner": (w(k), w(k)),
        "gf_fold": (w(k), xi),
        "gf_cross": (w(2, few, rows // 2), w(2, few, rows // 2), w(64, few)),
        "gf_combine": (w(few, rows // 2), w(64, few)),
        "gf_blend": (w(few, rows // 2), w(rows // 2)),
        "gr_inner": (w(e, degree), w(e, degree)),
        "gr_mul01": (w(e, degree), w(e)),
        "gr_fold": (w(e, degree), xi),
        "gr_halves": (w(4, e, degree), e),
        "gr_fold_block": (w(4, e, degree), e, w(4, e, degree), e, xi),
        "gr_scale01": (w(e), w(e)),
        "gr_combine": (weights.reshape(-1, of(4096, 16)), w(of(4096, 16))),
        "gr_combine32": (halves.reshape(-1, of(4096, 16)), w(of(4096, 16))),
        "gr_combine_cols": (w(rows, of(8192, 16)), w(rows)),
        "gr_hot": (
            *w(2, e, degree),
            w(slots, degree),
            w(e, slots),
            w(slots.bit_length() - 1, e),
            w(slots),
            w(e),
        ),
        "gr8_hot": (
            w(e, slots).astype(np.uint8),
            w(slots.bit_length() - 1, e),
            w(slots),
            w(e),
            *np.empty((2, -(-e // kernels.GROUP), degree, kernels.GROUP), np.uint8),
            np.empty((degree, slots), np.uint8),
        ),
        "gr8_fold": (np.ones((2 * of(64, 1), degree, kernels.GROUP), np.uint8), xi),
        "gr8_inner": (
            np.ones((of(64, 1), degree, kernels.GROUP), np.uint8),
            np.ones((of(64, 1), degree, kernels.GROUP), np.uint8),
        ),
        "gr_cross": (w(2, few, rows), w(2, few, rows), w(few)),
    }


def _kernels() -> dict[str, float]:
    """Seconds per unit of each kernel, and of a call of one: what the smallest take beyond their work."""
    out, beyond = {}, []
    for name, arguments in examples().items():
        out[name] = _per_unit(name, arguments, True)[0]
    for name, arguments in examples(small=True).items():
        each, units = _per_unit(name, arguments, False)
        beyond.append(max(0.0, units * (each - out[name])))
    return out | {dryrun.KERNEL: statistics.median(beyond)}


def _per_unit(name: str, arguments: tuple[Any, ...], spread: bool) -> tuple[float, float]:
    """Seconds per unit of a kernel, and units; `spread` takes its arguments out of the caches."""
    kernel = name.removesuffix(dryrun.ONE_ROW)
    _, units = dryrun.RULES[kernel](*arguments)
    size = sum(x.nbytes for x in _arrays(arguments))
    turns = [arguments, *(_copied(arguments) for _ in range(SPREAD // size if spread else 0))]
    return _best(getattr(kernels, kernel), *turns) / units, units


def _arrays(x: Any) -> Iterator[Any]:
    if isinstance(x, np.ndarray):
        yield x
    elif isinstance(x, tuple | list):
        for each in x:
            yield from _arrays(each)


def _copied(x: Any) -> Any:
    """With arrays of its own, which are not in the cache when it is their turn."""
    if isinstance(x, tuple | list):
        return type(x)(_copied(each) for each in x)
    return x.copy() if isinstance(x, np.ndarray) else x


def _bytes() -> dict[str, float]:
    """Seconds per byte of what goes over arrays, besides the kernels with rules."""
    out = {}
    for name, size in ((dryrun.ARRAY, 1 << 14), (dryrun.LARGE_ARRAY, 1 << 20)):
        count = SPREAD // (24 * size)
        turns = [[np.ones(size, np.uint64) for _ in range(2)] for _ in range(count)]
        sums: deque[Any] = deque(maxlen=count)
        each = _best(lambda x, y, sums=sums: sums.append(x + y), *turns)  # type: ignore[misc]
        out[name] = each / (24 * size)
    raw = bytes(1 << 20)
    rooms = [[np.ones(len(raw) // 8, np.uint64)] for _ in range(SPREAD // len(raw))]
    out["prg"] = _best(lambda room: kernels.prg(bytes(32), 1, room), *rooms) / len(raw)
    out[HASH] = _best(lambda: hashlib.sha256(raw).digest()) / len(raw)
    box, nonce = AESGCM(bytes(32)), bytes(12)
    sealed, opened = box.encrypt(nonce, raw[:CHUNK], b""), bytearray(CHUNK)
    out[dryrun.DECRYPT] = _best(lambda: box.decrypt_into(nonce, sealed, b"", opened)) / CHUNK
    return out


def _memory(memory: int) -> tuple[float, float, int]:
    """Seconds per byte of memory that the system clears and gives: that was given back a moment ago; and that
    nobody had for longer, which where the machine is a virtual one its host may have to find anew. And how
    many bytes there are of the former.
    """
    taken: list[mmap.mmap] = []

    def take() -> float:
        before = time.process_time()
        room = mmap.mmap(-1, PIECE)
        view = np.frombuffer(room, np.uint8)
        view[:: mmap.PAGESIZE] = 1
        taken.append(room)
        return (time.process_time() - before) / PIECE

    def again() -> None:
        take()
        taken.pop().close()

    soon = _best(again) / PIECE
    count = max(4, int(min(memory, _available() / 4)) // PIECE)
    try:
        late = [take() for _ in range(count)]
    finally:
        for room in taken:
            room.close()
    slow = max(soon, statistics.quantiles(late, n=10)[-1])
    near = sum(each <= (soon + slow) / 2 for each in late)
    return soon, slow, PIECE * near


def _available() -> int:
    """Bytes of memory that this process may still have."""
    known = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split()[:2]
        known[name] = int(value) * 1024
    room = known.get("MemAvailable:", 0)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # there is none, or the word "max"
            continue
        room = min(room, max(0, most - now))
    return room


def _calls(known: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one call in the engine, by lane: what the session on loopback took beyond all other work
    that is counted, by the calls that were counted.
    """
    run = dryrun.run(
        loopback.SPEC,
        loopback.SETTINGS,
        bucket=loopback.BUCKET,
        tokens=loopback.TOKENS,
        max_context=loopback.LIMITS.max_context,
        ahead=loopback.LIMITS.ahead,
        memory=loopback.LIMITS.memory,
    )
    unknown = (*dryrun.CALLS.values(), dryrun.GROWN)  # its memory is that of the session before
    rates = Rates({**known, **dict.fromkeys(unknown, 0.0)}, "", 1, 0)
    out = {}
    for lane, kind in ((ONLINE, "token"), (PREP, "made")):
        first, last = (mark.lanes[lane] for mark in (run.of(kind)[0], run.of(kind)[-1]))
        counts, call = last.minus(first), dryrun.CALLS[lane]
        out[call] = max(0.0, spent[lane] - rates.processor(counts)) / counts.work[call]
    return out


if __name__ == "__main__":
    BEST_OF, LEAST = int(sys.argv[1]), float(sys.argv[2])  # type: ignore[misc]
    sys.stdout.write(json.dumps(asdict(_measure(int(sys.argv[3])))))
