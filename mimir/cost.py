"""What a private generation will cost, before anything runs: `mimir cost`.

**Rounds and bytes** are those of the engine's own session, run over shapes (`dryrun`): exact, framing
included, for the party's lanes; what a client sends is not in it.

**Seconds** are a model, per lane and per stretch of work (a prefill, a decoded token):

    processor = sum over kernels (units / measured rate) + (bytes of array functions, and hashed) / rate
                + rounds * seconds a round + planning
    link      = bytes to the peer that gets most * 8 / rate of a link, each way
    delay     = rounds * round trip / 2          (both ends send at once, so a round takes one way)
    total     = processor + link + delay

A lane is in lockstep: it computes, sends, waits, and does one of them at a time, so they add up; `floor` is
the largest of the three, below which overlapping could not bring it. The online and the preprocessing lane
run side by side; `together` is their sum, as if nothing had been prepared and nothing overlapped. With more
parties on this machine than it has cores, processor seconds grow by their ratio.

Material is made in batches: a token's preprocessing is its part of a batch of tokens, and its part of a block
of rows whose products with weights are made together.

Rates come from a calibration of some ten seconds on this machine, in one thread: every kernel at one size,
array functions in and out of the caches, SHA-256, AES-GCM, and for each lane the seconds of a round, nearly
all Python: what a tiny session of three real parties takes beyond its kernels, and two small frames each way
over loopback sockets. Planning a step is timed as it is.

What the model leaves out: caches that are smaller or larger than in the calibration, other work on the
machine, WireGuard's own processor time, a link that slows when it is full.

**Memory** is of one party: the process as it starts, the largest sum of arrays that are alive at once in the
run over shapes, the material that a longer session keeps ready, and, apart, the weights' shares, which stay
in memory as far as `keys.keep_mib` goes. What does not is decrypted or expanded at each use, which is
counted, in blocks of a megabyte, which are not. What the allocator wastes is left out, and so is reading the
disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import numpy as np
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import mimir.actors.session as session_module
import mimir.actors.triples as triples_module
from mimir import dryrun, kernels
from mimir.actors.session import Limits, SessionActor, Step
from mimir.config import Cheby, FixedPoint, TriplePool
from mimir.dryrun import ONLINE, PREP, Counts
from mimir.errors import BadInput
from mimir.manifest import tensors_of
from mimir.model import transformer
from mimir.model.checkpoint import PlanSpec, read_spec
from mimir.mpc import plan
from mimir.mpc.nonlinear import Settings
from mimir.net.memory import MemoryNet
from mimir.net.messages import Open, Sampler
from mimir.vault import CHUNK

FORMAT: Final = 4  # of a file of rates
BEST_OF: Final = 3
MIN_SECONDS: Final = 0.02
ROUNDS: Final = 300  # over loopback, in the calibration
TINY: Final = PlanSpec(
    family="llama",
    layers=1,
    width=16,
    heads=2,
    kv_heads=2,
    head_dim=8,
    hidden=32,
    vocab=64,
    context=16,
    act="silu_glu",
    norm_eps=1e-5,
    positions="rope",
    rope_theta=10000.0,
    bos_id=None,
    eos_ids=(),
)


# --- rates --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one processor per unit of each kind of work: `dryrun.Counts.work`, "hash", "round LANE"."""

    seconds: Mapping[str, float]
    kernels: str  # level
    cores: int

    def processor(self, lane: str, c: Counts) -> float:
        """Seconds that this work of a lane takes one processor."""
        known = self.seconds
        work = sum(known[key] * units for key, units in c.work.items())
        return work + known["hash"] * c.hashed + known[f"round {lane}"] * c.rounds

    def write(self, file: Path) -> None:
        whole: dict[str, Any] = {"format": FORMAT, "kernels": self.kernels, "cores": self.cores}
        whole |= {"seconds": dict(self.seconds)}
        file.write_text(json.dumps(whole, indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Rates:
        """Rates written earlier; `BadInput` if the file is anything else."""
        try:
            raw = json.loads(file.read_text())
            if raw["format"] != FORMAT or set(raw["seconds"]) != _keys():
                raise KeyError
            seconds = {str(k): float(v) for k, v in raw["seconds"].items()}
            if not all(0 <= v < 1 for v in seconds.values()):
                raise ValueError
            return cls(seconds, str(raw["kernels"]), int(raw["cores"]))
        except OSError as error:
            raise BadInput(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            why = "not rates of this version; remove it to have them measured anew"
            raise BadInput(f"{file}: {why}") from None


def _keys() -> set[str]:
    return {
        *dryrun.RULES,
        *(name + dryrun.ONE_ROW for name in dryrun.STREAMED),
        dryrun.ARRAY,
        dryrun.LARGE_ARRAY,
        dryrun.DECRYPT,
        "prg",
        "hash",
        "nanoseconds",
        f"round {ONLINE}",
        f"round {PREP}",
    }


def _best(call: Callable[[], Any]) -> float:
    """Seconds of one call, the least of a few."""
    call()
    began = time.perf_counter()
    call()
    repeat = max(1, int(MIN_SECONDS / max(time.perf_counter() - began, 1e-7)))
    times = []
    for _ in range(BEST_OF):
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        times.append((time.perf_counter() - began) / repeat)
    return min(times)


def _examples() -> dict[str, tuple[Any, ...]]:
    """Arguments for every kernel in `dryrun.RULES`, of sizes as they occur, and for products of one row."""
    g = np.random.default_rng(1)

    def w(*shape: int) -> Any:
        return g.integers(0, 1 << 64, shape, dtype=np.uint64)

    def w32(*shape: int) -> Any:
        return g.integers(0, 1 << 32, shape, dtype=np.uint32)

    n, m, few, rows = 1 << 14, 1 << 11, 256, 16
    degree = kernels.GR_DEGREE
    xi = 0x123456789ABC
    one = np.array([1, 0], np.uint64)
    cosines = kernels.Cosines(w(4), 26, np.ones((3, 4)), np.ones((2, 10)))
    bins = kernels.Bins(np.ones(16), 13, 2.0**-13, 0.5, np.ones(14))
    return {
        "matmul": (w(8, 512), w(512, 512)),
        "matmul" + dryrun.ONE_ROW: (w(1, 1024), w(1024, 4096)),
        "matmul_nt": (w(7, 128), w(few * 8, 128)),
        "matmul32": (w32(8, 512), w32(512, 512)),
        "matmul32" + dryrun.ONE_ROW: (w32(1, 1024), w32(1024, 4096)),
        "rss_mul": (w(2, n), w(2, n), w(n)),
        "rss_and": (w(2, n), w(2, n), w(n)),
        "bit_slice": (w(n), 64),
        "bit_unslice": (w(64, n // 64), n),
        "bits_to_ring": (w(n // 64), n),
        "ring_lsb": (w(n),),
        "bit_pick": (w(32, n // 64), w(n) % np.uint64(32)),
        "trunc_mask": (w(2, m), w(2, m), one, [(m, 20, 4, 61)]),
        "trunc": (w(2, m), w(2, m, 3), one, w(m), [(m, 20, 4, 61)]),
        "trunc_if": ((w(2, m), w(2, m), w(2, m, 3), w(2, m, 4)), one, w(m // 64), w(m), [(m, 20, 4, 61)]),
        "norm": ((w(2, 2, m), w(2, 2, m, 3), w(2, 2, m, 3), w(2, 2)), one, w(2, m), 16, 0),
        "norm_scale": (w(2, 2, m), w(2, 2), w(2, 2, m, 4), w(2), w(2, m), 16, 0),
        "drop": (w(2, m), one, (8, 11), 20),
        "pieces": (w(2, 8, 12, 4, 128), w(8, 12), w(8, 5, 256), 12, 1),
        "choose": (w(2, 12, 30), w(2, 12, kernels.choose_places(5)), w(1), w(12, 5), [(20, 4)] * 5),
        "wave": (w(2, m, 8), w(m), cosines),
        "decay": (w(2, m, 16), w(m), bins),
        "bits_mask": (w(2, m // 64), w(2, m)),
        "ring_unmask": (w(2, m), one, w(m // 64)),
        "ring_pick": (w(2, m), w(2, m, 2), w(2, m, 2), w(m, 2), w(m // 64)),
        "bits_at_most": (w(2, 96, m // 64), (5, 5, 5), w(2, m)),
        "bits_products": (w(2, 7, few), one, w(3, few), kernels.Products([(range(3), range(7))])),
        "rotate": (w(few * 2, 128), w(few * 2)),
        "double_part": (w(few * 2, 64), w(2, few * 2, 128), w(2, few * 2)),
        "double": (w(few * 2, 128), w(few * 2, 64)),
        "gf_mul": (w(n), w(n)),
        "gf_scale": (w(n), xi),
        "gf_inner": (w(n), w(n)),
        "gf_fold": (w(n), xi),
        "gf_cross": (w(2, few, rows), w(2, few, rows), w(64, few)),
        "gf_combine": (w(few, rows), w(64, few)),
        "gf_blend": (w(few, rows), w(rows)),
        "gr_inner": (w(m, degree), w(m, degree)),
        "gr_mul01": (w(m, degree), w(m)),
        "gr_fold": (w(m, degree), xi),
        "gr_halves": (w(m, degree), w(m, degree), w(m, degree), w(m, degree)),
        "gr_scale01": (w(m), w(m)),
        "gr_combine": (w(few, few * 4), w(few * 4)),
        "gr_combine_cols": (w(few, few * 4), w(few)),
        "gr_hot": (*w(2, m, degree), w(64, degree), w(m, 64), w(6, m), w(64), w(m)),
        "gr_cross": (w(2, few, rows), w(2, few, rows), w(few)),
    }


def calibrate() -> Rates:
    """Measure this machine, one thread, some seconds. Not within a Trio run; no party may be served here."""
    seconds = {"nanoseconds": 1e-9}
    for name, arguments in _examples().items():
        kernel = name.removesuffix(dryrun.ONE_ROW)
        _, units = dryrun.RULES[kernel](*arguments)
        call = getattr(kernels, kernel)
        seconds[name] = _best(lambda call=call, arguments=arguments: call(*arguments)) / units  # type: ignore[misc]
    for name, size in ((dryrun.ARRAY, 1 << 14), (dryrun.LARGE_ARRAY, 1 << 21)):
        one, other = np.ones(size, np.uint64), np.ones(size, np.uint64)
        seconds[name] = _best(lambda one=one, other=other: one + other) / (3 * one.nbytes)  # type: ignore[misc]
    room = np.empty(1 << 15, np.uint64)
    seconds["prg"] = _best(lambda: kernels.prg(bytes(32), 1, room)) / room.nbytes
    raw = bytes(room.nbytes)
    seconds["hash"] = _best(lambda: hashlib.sha256(raw).digest()) / len(raw)
    box, nonce = AESGCM(bytes(32)), bytes(12)
    sealed, opened = box.encrypt(nonce, raw[:CHUNK], b""), bytearray(CHUNK)
    seconds[dryrun.DECRYPT] = _best(lambda: box.decrypt_into(nonce, sealed, b"", opened)) / CHUNK
    wire = trio.run(_loopback_round)
    seconds |= {f"round {lane}": wire + each for lane, each in _seconds_a_round(seconds).items()}
    return Rates(seconds, kernels.level(), os.cpu_count() or 1)


async def _loopback_round() -> float:
    """Processor seconds that a party's sending of two small frames and hearing of two takes, over sockets."""
    listener = socket.create_server(("127.0.0.1", 0))
    mine = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    listener.close()
    async with (
        trio.SocketStream(trio.socket.from_stdlib_socket(mine)) as a,
        trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as b,
    ):
        frame = bytes(160)
        began = time.process_time()
        for _ in range(ROUNDS):
            await a.send_all(frame)
            await b.receive_some(4096)
        return 2 * (time.process_time() - began) / ROUNDS


def _seconds_a_round(known: Mapping[str, float]) -> dict[str, float]:
    """By lane: what is left of a tiny real session's processor time when its kernels are taken off."""
    settings, bucket, tokens = Settings(), 2, 2
    counted = dryrun.run(
        TINY, settings, bucket=bucket, tokens=tokens, max_context=TINY.context, ahead=TINY.context
    )
    trio.run(_tiny_session, settings, bucket, tokens)  # makes the tables that a party makes once
    began = time.process_time()
    prepared, planning = trio.run(_tiny_session, settings, bucket, tokens)
    spent = {PREP: prepared - began - planning, ONLINE: time.process_time() - prepared}
    out = {}
    for lane, c in counted.lanes.items():
        work = sum(known[k] * v for k, v in c.work.items()) + known["hash"] * c.hashed
        out[lane] = max(0.0, (spent[lane] / 3 - work) / c.rounds)
    return out


class _ZeroWeights:
    def __init__(self, spec: PlanSpec) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors_of(spec)}

    def pair(self, name: str) -> tuple[Any, Any]:
        tensor = self._tensors[name]
        return np.zeros(tensor.shape, tensor.dtype), np.zeros(tensor.shape, tensor.dtype)


async def _tiny_session(settings: Settings, bucket: int, tokens: int) -> tuple[float, float]:
    """Three real parties in this process, over memory, with a model and a prompt of zeros. Returns when, in
    processor time, everything was prepared, and how much of it the planning had taken.
    """
    net = MemoryNet(3)
    terms = Open(bytes(16), "0" * 64, (dryrun.CLIENT,), (bucket,), tokens, Sampler(), False)
    limits = Limits((bucket,), (tokens,), TINY.context, TINY.context, dryrun.MEMORY, 60.0, 600.0, 60.0)
    silent = dryrun.NoLog()
    clients = [dryrun.Client(need=bucket + tokens - 1) for _ in range(3)]
    planning = 0.0

    class Timed(SessionActor):
        def _demand(self, step: Step) -> Any:
            nonlocal planning
            before = time.thread_time()
            try:
                return super()._demand(step)
            finally:
                planning += time.thread_time() - before

    with mock.patch.object(session_module, "log", silent), mock.patch.object(triples_module, "log", silent):
        async with trio.open_nursery() as nursery:
            for i, client in enumerate(clients):
                model = _ZeroWeights(TINY)
                nursery.start_soon(Timed(net.party(i), terms, [client], TINY, model, settings, limits).run)
    last = max(m.processor for c in clients for m in c.marks if m.kind == "made")
    return last, planning


# --- the prediction -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """Between two parties: milliseconds there and back, Mbit/s each way (None: no limit)."""

    rtt: float = 0.0
    rate: float | None = None
    parties_here: int = 1  # parties that share this machine's cores


@dataclass(frozen=True, slots=True)
class Part:
    """The cost of one stretch of work on one lane, or of several; per party."""

    rounds: float
    sent: float  # bytes, framing included
    processor: float  # seconds
    link: float
    delay: float

    @property
    def seconds(self) -> float:
        return self.processor + self.link + self.delay

    @property
    def floor(self) -> float:
        return max(self.processor, self.link, self.delay)

    def __add__(self, o: Part) -> Part:
        return Part(
            self.rounds + o.rounds,
            self.sent + o.sent,
            self.processor + o.processor,
            self.link + o.link,
            self.delay + o.delay,
        )

    def plain(self) -> dict[str, float]:
        return asdict(self) | {"seconds": self.seconds, "floor": self.floor}


def part(lane: str, c: Counts, rates: Rates, link: Link, per: int = 1, extra: float = 0.0) -> Part:
    """`extra` are processor seconds beside what was counted."""
    crowd = max(1.0, link.parties_here / rates.cores)
    return Part(
        c.rounds / per,
        c.sent / per,
        crowd * (rates.processor(lane, c) + extra) / per,
        (c.busiest * 8 / (link.rate * 1e6) if link.rate else 0.0) / per,
        c.rounds * link.rtt / 2000 / per,
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one party."""

    process: int
    arrays: int
    ready: int
    weights: int  # shares that are kept

    @property
    def resident(self) -> int:
        """Without the weights."""
        return self.process + self.arrays + self.ready


@dataclass(frozen=True, slots=True)
class Prediction:
    """Per party. A token's preprocessing is its part of a batch of tokens and of a block of rows."""

    bucket: int
    context: int
    together: int  # tokens of a batch
    block: int  # rows whose products with weights are made together
    prefill: dict[str, Part]  # by lane: until the first token has been delivered
    token: dict[str, Part]  # by lane: the last token that fits into the context
    memory: Memory

    def plain(self) -> dict[str, Any]:
        def parts(p: Mapping[str, Part]) -> dict[str, Any]:
            return {lane: part.plain() for lane, part in p.items()} | {
                "together": (p[ONLINE] + p[PREP]).plain()
            }

        return {
            "prompt_bucket": self.bucket,
            "context": self.context,
            "tokens_prepared_together": self.together,
            "rows_of_weights_together": self.block,
            "prefill": parts(self.prefill),
            "token": parts(self.token),
            "memory": asdict(self.memory) | {"resident": self.memory.resident},
        }


class Shared(NamedTuple):
    """Counts of what serves several positions alike."""

    counts: Counts
    positions: int


def each(shares: Sequence[Shared], figure: str) -> float:
    """A position's part of a figure of preprocessing."""
    return float(sum(getattr(s.counts, figure) / s.positions for s in shares))


def last_token(run: dryrun.Run) -> tuple[Counts, tuple[Shared, Shared]]:
    """Online counts of the last token of a run; and of preprocessing its last batch, and the block of
    products with weights that belongs to it.
    """
    before, after = run.of("token")[-2:]
    made = run.of("made")
    grown = [b.positions - a.positions for a, b in pairwise(made)]
    to = max(i for i, n in enumerate(grown) if not n)  # a batch of no positions is part of a block
    at = max((i for i, n in enumerate(grown[:to]) if n), default=-1) + 1
    return after.lanes[ONLINE].minus(before.lanes[ONLINE]), (
        Shared(made[-1].lanes[PREP].minus(made[-2].lanes[PREP]), grown[-1]),
        Shared(made[to + 1].lanes[PREP].minus(made[at].lanes[PREP]), run.block),
    )


def first_token(run: dryrun.Run) -> tuple[Counts, Counts]:
    """Online and preprocessing counts from the start of a run to its first token."""
    first = run.of("token")[0]
    made = next(m for m in run.of("made") if m.positions >= run.bucket)
    return first.lanes[ONLINE], made.lanes[PREP]


def predict(
    spec: PlanSpec,
    settings: Settings,
    *,
    bucket: int,
    context: int,
    ahead: int,
    memory: int,
    keep: int,
    rates: Rates,
    link: Link,
) -> Prediction:
    """Everything `mimir cost` tells. `context` is scheduler.max_context; `ahead` and `memory`, in bytes, are
    those of [triple_pool], `keep` is the bytes of keys.keep_mib.
    """
    process = resident()
    limits: dict[str, Any] = {"max_context": context, "ahead": ahead, "memory": memory, "keep": keep}
    start = dryrun.run(spec, settings, bucket=bucket, tokens=1, **limits)
    end = dryrun.run_last(spec, settings, **limits)
    online, made = last_token(end)
    first, first_made = first_token(start)
    planning = _seconds_to_plan(spec, settings, context)
    return Prediction(
        bucket,
        min(context, spec.context),
        made[0].positions,
        made[1].positions,
        {
            ONLINE: part(ONLINE, first, rates, link),
            PREP: part(PREP, first_made, rates, link, extra=planning * first_made.plans),
        },
        {
            ONLINE: part(ONLINE, online, rates, link),
            PREP: reduce(add, (part(PREP, c, rates, link, n, extra=planning * c.plans) for c, n in made)),
        },
        Memory(process, max(start.peak, end.peak), end.pool, dryrun.Shares(spec, keep).kept_bytes),
    )


def _seconds_to_plan(spec: PlanSpec, settings: Settings, context: int) -> float:
    """Processor seconds in which a party plans the last step of a context."""
    if spec.positions == "rope":  # as a session does
        spec = replace(spec, context=min(spec.context, context))
    times = []
    for _ in range(2):  # the first makes tables that a party makes once
        began = time.process_time()
        plan.run(
            transformer.cost_of(spec, settings, min(context, spec.context) - 2, 1, prompt=False, last=True)
        )
        times.append(time.process_time() - began)
    return times[-1]


def resident() -> int:
    """Bytes that this process has in memory now: about what a party has when it starts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


# --- the command --------------------------------------------------------------------------------------------


def command(options: argparse.Namespace) -> int:
    """`mimir cost`."""
    spec = read_spec(options.model)
    context = min(options.context, spec.context)
    if options.prompt_bucket + 1 > context:
        raise BadInput(f"a prompt of {options.prompt_bucket} and a token do not fit a context of {context}")
    if options.rtt < 0 or (options.rate is not None and options.rate <= 0):
        raise BadInput("--rtt must not be negative, and --rate must be above 0")
    file = Path(options.rates) if options.rates else None
    if file is not None and file.exists():
        rates = Rates.read(file)
    else:
        rates = calibrate()
        if file is not None:
            rates.write(file)
    link = Link(options.rtt, options.rate, options.parties_here)
    settings = Settings(FixedPoint().scale_bits, Cheby().deg)
    told = predict(
        spec,
        settings,
        bucket=options.prompt_bucket,
        context=context,
        ahead=TriplePool().min_size,
        memory=(options.memory or TriplePool().memory_mib) << 20,
        keep=options.keep_mib << 20,
        rates=rates,
        link=link,
    )
    if options.json:
        shape = {k: getattr(spec, k) for k in ("family", "layers", "width", "heads", "hidden", "vocab")}
        whole: dict[str, Any] = {"event": "cost", "link": asdict(link)}
        whole |= {"shape": shape | {"parameters": spec.parameters()}}
        whole |= {"kernels": rates.kernels, "cores": rates.cores} | told.plain()
        print(json.dumps(whole))
    else:
        print(_text(spec, told, link, rates))
    return 0


def _text(spec: PlanSpec, told: Prediction, link: Link, rates: Rates) -> str:
    rate = f"{link.rate:g} Mbit/s" if link.rate else "no limit of rate"
    out = [
        f"{spec.family}, {spec.layers} layers of width {spec.width}, vocabulary {spec.vocab}: "
        f"{spec.parameters() / 1e6:.1f} M weights",
        f"link: {link.rtt:g} ms there and back, {rate}; {link.parties_here} of the parties on {rates.cores} "
        f"cores ({rates.kernels} kernels)",
        "",
        f"{'per party':<26}{'rounds':>9}{'MB sent':>10}"
        f"{'processor':>11}{'link':>8}{'delay':>8}{'seconds':>9}",
    ]

    def rows(title: str, parts: Mapping[str, Part]) -> None:
        for name, p in (
            (f"{title}, online", parts[ONLINE]),
            ("  preprocessing", parts[PREP]),
            ("  together", parts[ONLINE] + parts[PREP]),
        ):
            out.append(
                f"{name:<26}{p.rounds:>9.0f}{p.sent / 1e6:>10.2f}{p.processor:>11.2f}{p.link:>8.2f}"
                f"{p.delay:>8.2f}{p.seconds:>9.2f}"
            )

    rows(f"prefill of {told.bucket}", told.prefill)
    rows(f"token at {told.context}", told.token)
    m = told.memory
    mib = 2.0**20
    out += [
        "",
        f"Tokens prepared together: {told.together}, for products with weights {told.block}. "
        "Rounds and bytes are exact, seconds a model.",
        f"Memory: {m.resident / mib:.0f} MiB (process {m.process / mib:.0f}, arrays {m.arrays / mib:.0f}, "
        f"material ready {m.ready / mib:.0f}), and {m.weights / mib:.0f} MiB of weights' shares.",
    ]
    return "\n".join(out)
