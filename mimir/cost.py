"""What a private generation will cost, before anything runs: `mimir cost`.

**Rounds and bytes** are those of the engine's own session, run over shapes (`dryrun`): exact, framing
included, for the party's lanes; what a client sends is not in it.

**Seconds** are a model, per lane and per stretch of work (a prefill, a decoded token):

    processor = kernels (units / rate, and seconds a call) + (bytes of array functions, and hashed) / rate
                + calls of Python * seconds a call + rounds * seconds a round + bytes sent / rate
                + pieces of work given to threads * seconds of each + fresh memory / rate + planning
    link      = bytes to the peer that gets most * 8 / rate of a link, each way
    delay     = rounds * round trip / 2          (both ends send at once, so a round takes one way)
    total     = processor + turns + link + delay

A lane is in lockstep: it computes, sends, waits, and does one of them at a time, so they add up; `floor` is
the largest of the three, below which overlapping could not bring it. The online and the preprocessing lane
run side by side; `together` is their sum, as if nothing had been prepared and nothing overlapped.

With more parties on this machine than it has cores, processor seconds grow by their ratio, as if cores could
be shared out in any part. But a round ends with the last party, and a scheduler gives a core to one for some
milliseconds (SLICE): so three parties on two cores that compute for less than that between two rounds take
not three halves of their time but twice. What is missing to whole turns, in the first SLICE of each round, is
`turns`.

Material is made in batches: a token's preprocessing is its part of a batch of tokens, and its part of a block
of rows whose products with weights are made together.

All work is counted in the run over shapes; rates come from a calibration of some twenty seconds on this
machine (`calibration`). Kernels run in one thread, at one size, over data that the first caches do not hold;
products of one row over matrices that no cache holds. Rounds, bytes sent and threads are those of three
processes on loopback, with the mesh between them (`loopback`). What a call of Python takes is, for each lane,
the rest of a tiny session of these three when all other work is taken off, by the calls that it makes.
Planning a step is timed as it is.

Fresh memory is what arrays alive at once come to beyond their highest sum before, and every array above
`triples.IN_HEAP`. A token at the end of a context takes none of the former: it finds that of tokens before.
The prefill is the first after a party's start. A system may give memory that was free for long several times
more slowly than what was free a moment ago, a virtual machine does; both rates, and how much there is of the
faster kind, are those of the minute of the calibration.

What the model leaves out: what weights that stream through the caches, and the other parties, drive out of
them, which is why Python in a model of 10^8 weights takes half as long again as in the calibration (of a
token of GPT-2 small online a seventh of the processor time is missing); what a party's memory wastes; other
work on the machine; WireGuard's own processor time; the clients; a link that slows when it is full.

**Memory** is of one party: the process as it starts, the largest sum of arrays that are alive at once in the
run over shapes, the material that a longer session keeps ready, and, apart, the weights' shares, which stay
in memory as far as `keys.keep_mib` goes. What does not is decrypted or expanded at each use, which is
counted, in blocks of a megabyte, which are not. What the allocator wastes is left out, and so is reading the
disk.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Any, Final, NamedTuple

from mimir import dryrun
from mimir.calibration import Rates, calibrate
from mimir.config import Cheby, FixedPoint, Scheduler, TriplePool
from mimir.dryrun import ONLINE, PREP, Counts
from mimir.errors import BadInput
from mimir.model import transformer
from mimir.model.checkpoint import PlanSpec, read_spec
from mimir.mpc import plan
from mimir.mpc.nonlinear import Settings

SLICE: Final = 0.003  # seconds for which a scheduler lets one process have a core that others wait for

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
    processor: float  # seconds, of cores that parties share
    turns: float  # seconds until it is this party's turn on a core
    link: float
    delay: float

    @property
    def seconds(self) -> float:
        return self.processor + self.turns + self.link + self.delay

    @property
    def floor(self) -> float:
        return max(self.processor, self.link, self.delay)

    def __add__(self, o: Part) -> Part:
        return Part(
            self.rounds + o.rounds,
            self.sent + o.sent,
            self.processor + o.processor,
            self.turns + o.turns,
            self.link + o.link,
            self.delay + o.delay,
        )

    def plain(self) -> dict[str, float]:
        return asdict(self) | {"seconds": self.seconds, "floor": self.floor}


def part(
    c: Counts, rates: Rates, link: Link, per: int = 1, *, extra: float = 0.0, before: float = math.inf
) -> Part:
    """`extra` are processor seconds beside what was counted, `before` the bytes of memory that the party has
    already.
    """
    own = rates.processor(c, max(0.0, rates.near / link.parties_here - before)) + extra
    crowd = max(1.0, link.parties_here / rates.cores)
    wait = math.ceil(crowd) - crowd
    return Part(
        c.rounds / per,
        c.sent / per,
        crowd * own / per,
        wait * min(own, c.rounds * SLICE) / per,
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
    last, block = (
        made[-1].lanes[PREP].minus(made[-2].lanes[PREP]),
        made[to + 1].lanes[PREP].minus(made[at].lanes[PREP]),
    )
    for counts in (last, block):  # where the memory of tokens before is used again
        del counts.work[dryrun.GROWN]
    return after.lanes[ONLINE].minus(before.lanes[ONLINE]), (
        Shared(last, grown[-1]),
        Shared(block, run.block),
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
    weights = dryrun.Shares(spec, keep).kept_bytes
    before = process + weights
    return Prediction(
        bucket,
        min(context, spec.context),
        made[0].positions,
        made[1].positions,
        {
            ONLINE: part(first, rates, link, before=before),
            PREP: part(first_made, rates, link, extra=planning * first_made.plans, before=before),
        },
        {
            ONLINE: part(online, rates, link),
            PREP: reduce(add, (part(c, rates, link, n, extra=planning * c.plans) for c, n in made)),
        },
        Memory(process, max(start.peak, end.peak), end.pool, weights),
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
    apart = Scheduler().round_trip_ms if options.round_trip is None else options.round_trip
    settings = Settings(FixedPoint().scale_bits, Cheby().deg, apart)
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
        whole: dict[str, Any] = {"event": "cost", "link": asdict(link), "round_trip_ms": apart}
        whole |= {"shape": shape | {"parameters": spec.parameters()}}
        whole |= {"kernels": rates.kernels, "cores": rates.cores} | told.plain()
        print(json.dumps(whole))
    else:
        print(_text(spec, told, link, rates, apart))
    return 0


def _text(spec: PlanSpec, told: Prediction, link: Link, rates: Rates, apart: int) -> str:
    rate = f"{link.rate:g} Mbit/s" if link.rate else "no limit of rate"
    out = [
        f"{spec.family}, {spec.layers} layers of width {spec.width}, vocabulary {spec.vocab}: "
        f"{spec.parameters() / 1e6:.1f} M weights",
        f"link: {link.rtt:g} ms there and back, {rate}; {link.parties_here} of the parties on {rates.cores} "
        f"cores ({rates.kernels} kernels); scheduler.round_trip_ms = {apart}",
        "",
        f"{'per party':<26}{'rounds':>9}{'MB sent':>10}"
        f"{'processor':>11}{'turns':>8}{'link':>8}{'delay':>8}{'seconds':>9}",
    ]

    def rows(title: str, parts: Mapping[str, Part]) -> None:
        for name, p in (
            (f"{title}, online", parts[ONLINE]),
            ("  preprocessing", parts[PREP]),
            ("  together", parts[ONLINE] + parts[PREP]),
        ):
            out.append(
                f"{name:<26}{p.rounds:>9.0f}{p.sent / 1e6:>10.2f}{p.processor:>11.2f}{p.turns:>8.2f}"
                f"{p.link:>8.2f}{p.delay:>8.2f}{p.seconds:>9.2f}"
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
