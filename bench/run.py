#!/usr/bin/env python3
"""What a private generation costs: rounds, bytes, seconds and memory of three real parties, as a table.

    python bench/run.py                   everything: some ten minutes a model on two cores
    python bench/run.py --quick           the demo alone, short: shows that it works, measures little
    python bench/run.py --only NAME ...   some of the models (as printed by --list)
    python bench/run.py --onto FILE       add to a result, replacing rows of the same model and network
    python bench/run.py --show FILE       print the tables of a result again
    python bench/run.py --targets         GPT-2 small against what is aimed at: bench/targets.py instead

For each model and each network, scripts/local_mesh.sh raises three namespaces, a WireGuard mesh and three
`mimir-peer run`, and shares the model with them; `local` is the tunnel alone, `wan` adds the relay's delay
and rate. Without root or /dev/net/tun the parties talk over loopback without protection, which the result
says, and there is no `wan`. Then come up to three sessions of a client, in a namespace of its own:

    ready    The client holds its prompt back until all material of the session has been made and verified.
             What happens before is preprocessing alone, what happens after is online alone, on an otherwise
             idle machine. Where the parties' pool does not hold the whole session, the client sees the
             preprocessing stop short, and opens a shorter session that fits.
    prefill  Only if that left a smaller prompt: the largest prompt that fits, for its prefill alone.
    cold     The client gives its prompt at once, with nothing prepared: what a user waits for.

Figures. Seconds of a token are the median between tokens as they reach the client. Preprocessing is per token
position, in full batches of the producer and with its part of the products with weights, which are made for
many positions together. Their sum is the price of a token when nothing was prepared and
nothing overlaps. Bytes are what one party hands to its links, framing included, of the party that sends most.
Memory is the peak resident set of a party's process (VmHWM) over the whole life of the mesh, provisioning
included, and the weights' shares, as far as `keys.keep_mib` keeps them; the part of it that maps files, at
the end, is programs (the shares, before they were encrypted at rest). The tunnel's own process comes apart.
"Bound by" is the largest share of the time of a token that one resource explains: the processors of this
machine, which all three parties and their tunnels share; the way there of every round; or the rate of a link.
What else the machine does is measured too: if that is much, the table says that its seconds are too large.
Beside what was measured stands what the cost model (`mimir cost`) predicts for the same session: its rounds
and bytes are to agree exactly, its seconds are those of an otherwise idle machine, without the tunnels'
processor time. Nothing here is asserted: tests do that.

Results go to bench/results/ as one JSON file a run, with machine, commit and date; the tables to
bench/results/table.md (--quick keeps nothing unless --out is given). Ratios to the latest earlier results of
the same models, networks and lengths are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import operator
import os
import platform
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import find_shared  # noqa: E402

from mimir import cost, dryrun, kernels  # noqa: E402
from mimir.client import federation as federation_file  # noqa: E402
from mimir.client.connection import Connection  # noqa: E402
from mimir.client.session import connect_all, new_session, open_session, survey, terms_for  # noqa: E402
from mimir.errors import MimirError  # noqa: E402
from mimir.model import load_checkpoint, sampling, transformer  # noqa: E402
from mimir.model.checkpoint import PlanSpec  # noqa: E402
from mimir.mpc.nonlinear import Settings  # noqa: E402
from mimir.net.identity import Identity  # noqa: E402
from mimir.net.messages import Message, Sampler  # noqa: E402
from mimir.store import KEPT_BYTES  # noqa: E402

RESULTS = HERE / "results"
SHAPE = "llama-15m"
SHAPES = (SHAPE, "gpt2-small")  # of scripts/random_checkpoint.py
PROMPT_BUCKETS = (1, 2, 4, 8, 16, 32)
READY_TOKENS = 9
QUICK_TOKENS = 4
WARM_TOKENS = 2  # of the first session, which is not measured
CONTEXT = 128
POOL = 65536  # triple_pool.min_size: as much ahead as the memory allows
POOL_MIB = 4096  # triple_pool.memory_mib
START_SECONDS = 1800.0  # for the mesh to come up, share the model and answer once
SESSION_SECONDS = 3600.0
STOP_SECONDS = 90.0
FIRST_QUIET = 300.0  # without progress, before anything was made
QUIET = 20.0  # without progress, after which the pool counts as full; at least ...
QUIET_TIMES = 4  # ... so many times the longest wait so far
PEER_SECONDS = 600.0  # deadlines.round
CROWDED = 0.25  # of the machine, busy with neither parties nor tunnels
TICKS = os.sysconf("SC_CLK_TCK")
TARGETS = {"rounds a layer": 60, "online s": 1.0, "together s": 3.0, "MiB": 1024}


# --- what the operating system says -------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """Processor seconds used so far: by each party, by their tunnels' processes, and by the whole machine."""

    at: float
    parties: tuple[float, ...]
    tunnels: tuple[float, ...]
    busy: float


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def children(pid: int) -> list[int]:
    """Processes started by `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def memory(pid: int, what: str) -> int:
    """VmHWM, the largest resident set so far, or RssFile, what maps files now; in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"bench: process {pid} tells no {what}")


class Meter:
    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = tuple(pids)
        self.helpers = tuple(tuple(children(pid)) for pid in pids)

    def read(self) -> Usage:
        busy = [int(n) for n in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return Usage(
            time.monotonic(),
            tuple(_cpu(pid) for pid in self.pids),
            tuple(sum(_cpu(h) for h in each) for each in self.helpers),
            (sum(busy) - busy[3] - busy[4]) / TICKS,  # all but idle and waiting for a disk
        )

    def memory(self) -> dict[str, list[int]]:
        return {
            "parties": [memory(pid, "VmHWM") for pid in self.pids],
            "files": [memory(pid, "RssFile") for pid in self.pids],
            "tunnels": [sum(memory(h, "VmHWM") for h in each) for each in self.helpers],
        }


def machine() -> dict[str, Any]:
    """The machine, as far as it matters for the figures, and without its name."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kernels": kernels.level(),
    }


# --- one session, in the client's namespace -----------------------------------------------------------------


class PoolFull(MimirError):
    """The parties have stopped making material short of what the session takes."""

    def __init__(self, made: int) -> None:
        super().__init__(f"the pool is full after {made} positions")
        self.made = made


@dataclass(frozen=True)
class Heard:
    """A progress message and what had been used when it came."""

    usage: Usage
    message: Message


class Watched:
    """A connection that keeps every progress message, and hands masks on only when `need` positions are
    prepared; with `need` 0, at once.
    """

    def __init__(self, inner: Connection, meter: Meter, need: int) -> None:
        self.inner, self.party = inner, inner.party
        self.meter, self.need = meter, need
        self.heard: list[Heard] = []
        self.made = 0

    async def send(self, message: Message) -> None:
        await self.inner.send(message)

    async def receive(self, *kinds: str) -> Message:
        message = await self._next(*kinds)
        if message["t"] == "masks" and self.need:
            await self._until_prepared()
        return message

    async def _next(self, *kinds: str) -> Message:
        message = await self.inner.receive(*kinds)
        if message["t"] == "progress":
            self.heard.append(Heard(self.meter.read(), message))
            if message["phase"] == "preprocessing":
                self.made = message["done"]
        return message

    async def _until_prepared(self) -> None:
        last, longest = time.monotonic(), 0.0
        while self.made < self.need:
            patience = max(QUIET, QUIET_TIMES * longest) if self.made else FIRST_QUIET
            with trio.move_on_after(patience) as scope:
                await self._next("progress")
            if scope.cancelled_caught:
                raise PoolFull(self.made)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()


async def session(ask: dict[str, Any]) -> dict[str, Any]:
    """One session; `ask` has federation, model, pids, ids, bucket, tokens and whether to wait."""
    told = federation_file.load(ask["federation"])
    told = dataclasses.replace(told, deadlines=federation_file.Deadlines(60.0, SESSION_SECONDS))
    me = Identity.load(told.client_key)
    meter = Meter(ask["pids"])
    bucket, tokens = ask["bucket"], ask["tokens"]
    async with connect_all(told, me) as connections:
        service = await survey(connections, told)
        terms = terms_for(
            service, ask["model"], [me.public_hex], [bucket], tokens, Sampler(), session=new_session()
        )
        if terms.max_new != tokens:
            raise SystemExit(f"bench: {tokens} is no answer bucket of these parties")
        watched = [Watched(c, meter, bucket + tokens - 1 if ask["wait"] else 0) for c in connections]
        opened = meter.read()
        async with open_session(watched, service, terms, me) as running:  # type: ignore[arg-type]
            await running.prompt(ask["ids"][-bucket:])
            given = meter.read()
            ids, marks = [], []
            while (token := await running.token()) is not None:
                ids.append(token)
                marks.append(meter.read())
            parts = [w.heard for w in watched]
            out = _answer(opened, given, marks, bucket, running.stats) | {
                "ids": ids,
                "memory": meter.memory(),
            }
            if ask["wait"]:
                out |= {
                    "online": _online(parts, given, marks),
                    "preprocessing": _preprocessing(parts, bucket),
                }
            return out


def _answer(
    opened: Usage, given: Usage, marks: list[Usage], bucket: int, stats: list[dict[str, Any]]
) -> dict[str, Any]:
    def most(name: str) -> int:
        return int(max(s[name] for s in stats))

    return {
        "bucket": bucket,
        "tokens": len(marks),
        "first_token_seconds": marks[0].at - opened.at,
        "last_token_seconds": marks[-1].at - opened.at,
        "rounds_online": most("rounds_online"),
        "rounds_preprocessing": most("rounds_preprocessing"),
        "sent_online": most("sent_online"),
        "sent_preprocessing": most("sent_preprocessing"),
    }


def _spent(before: Usage, after: Usage, count: int) -> dict[str, Any]:
    """Processor seconds per `count`, and the shares of the machine that they were, and that was busy."""
    parties = [b - a for a, b in zip(before.parties, after.parties, strict=True)]
    tunnels = [b - a for a, b in zip(before.tunnels, after.tunnels, strict=True)]
    whole = (after.at - before.at) * (os.cpu_count() or 1)
    return {
        "cpu_parties": [x / count for x in parties],
        "cpu_tunnels": [x / count for x in tunnels],
        "own": (sum(parties) + sum(tunnels)) / whole,
        "busy": (after.busy - before.busy) / whole,
    }


def _of(heard: list[Heard], phase: str) -> list[Heard]:
    return [h for h in heard if h.message["phase"] == phase]


def _grown(before: Heard, after: Heard, what: str) -> float:
    return float(after.message[what] - before.message[what])


def _online(parts: list[list[Heard]], given: Usage, marks: list[Usage]) -> dict[str, Any]:
    """Of a session whose material was all there: after the prompt was given, all work was online."""
    prefill = [(_of(heard, "preprocessing")[-1], _of(heard, "prefill")[-1]) for heard in parts]
    out: dict[str, Any] = {
        "prefill": {
            "seconds": marks[0].at - given.at,
            "rounds": int(max(_grown(a, b, "rounds") for a, b in prefill)),
            "sent": int(max(_grown(a, b, "sent") for a, b in prefill)),
            **_spent(given, marks[0], 1),
        }
    }
    steps = [list(pairwise(d)) for d in (_of(heard, "decode") for heard in parts)]
    if steps[0]:
        waits = [b.at - a.at for a, b in pairwise(marks)]
        out["token"] = {
            "seconds": statistics.median(waits),
            "seconds_largest": max(waits),
            "count": len(waits),
            "rounds": int(statistics.median(_grown(a, b, "rounds") for s in steps for a, b in s)),
            "sent": int(max(statistics.median(_grown(a, b, "sent") for a, b in s) for s in steps)),
            **_spent(marks[0], marks[-1], len(waits)),
        }
    return out


def _preprocessing(parts: list[list[Heard]], bucket: int) -> dict[str, Any]:
    """Per token position, of prompt and of answer, in full batches, with a position's part of the products
    with weights, which are made for many positions of both. Processor seconds are of all positions alike.
    """
    out: dict[str, Any] = {}
    for name in ("prompt", "answer"):
        batches: list[list[dict[str, float]]] = []
        spent: dict[str, Any] = {}
        for party, heard in enumerate(parts):
            made = _of(heard, "preprocessing")
            positions = made[-1].message["done"]
            weights = [(a, b) for a, b in pairwise(made) if not _grown(a, b, "done")]
            pairs = [
                (a, b)
                for a, b in pairwise(made)
                if (b.message["done"] <= bucket) == (name == "prompt") and _grown(a, b, "done")
            ]
            if not pairs:
                return out
            full = max(_grown(a, b, "done") for a, b in pairs)
            pairs = [(a, b) for a, b in pairs if _grown(a, b, "done") == full]
            figures = ("seconds", "rounds", "sent")
            each = {w: sum(_grown(a, b, w) for a, b in weights) / positions for w in figures}
            batches.append([{w: _grown(a, b, w) / full + each[w] for w in figures} for a, b in pairs])
            if party == 0:
                spent = _spent(made[0].usage, made[-1].usage, positions)
        out[name] = {
            "batch": int(full),
            "batches": len(batches[0]),
            "seconds": statistics.median(b["seconds"] for p in batches for b in p),
            "rounds_a_batch": statistics.median(b["rounds"] for p in batches for b in p) * full,
            "sent": int(max(statistics.median(b["sent"] for b in p) for p in batches)),
            **spent,
        }
    return out


def client(text: str) -> int:
    """Run in the client's namespace by `Mesh.ask`; prints what it measured, or {"full": positions}."""
    ask = json.loads(text)
    try:
        print(json.dumps(trio.run(session, ask)))
    except PoolFull as full:
        print(json.dumps({"full": full.made}))
    except MimirError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    return 0


# --- the mesh -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """Three parties that hold a model and have answered once."""

    work: Path
    prefix: list[str]  # words that run a command where the client is
    pids: list[int]
    model: str
    tunnel: bool

    def ask(self, ids: Sequence[int], bucket: int, tokens: int, *, wait: bool) -> dict[str, Any]:
        ask = {
            "federation": str(self.work / "client.toml"),
            "model": self.model,
            "pids": self.pids,
            "ids": list(ids),
            "bucket": bucket,
            "tokens": tokens,
            "wait": wait,
        }
        done = subprocess.run(
            [*self.prefix, sys.executable, str(HERE / "run.py"), "--client", json.dumps(ask)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=SESSION_SECONDS,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"bench: a session failed, exit status {done.returncode}; see above")
        measured: dict[str, Any] = json.loads(done.stdout)
        return measured


def threads_rule(text: str) -> int:
    """A number of threads for an argument, or argparse's ValueError."""
    if not 1 <= int(text) <= kernels.MAX_THREADS:
        raise ValueError
    return int(text)


def third() -> int:
    """Of the processors, at least one: what a party has for its kernels where all three are here."""
    return max(1, min(len(os.sched_getaffinity(0)) // 3, kernels.MAX_THREADS))


@contextmanager
def mesh(directory: Path, wan: str | None, tunnel: bool, settings: dict[str, Any]) -> Iterator[Mesh]:
    """scripts/local_mesh.sh, kept up. It ends with us, even if we are killed."""
    with tempfile.TemporaryDirectory(prefix="mimir-bench.") as folder:
        work = Path(folder) / "mesh"
        words = [str(ROOT / "scripts" / "local_mesh.sh"), "--keep", "--json", "--no-setup"]
        words += ["--model", str(directory), "--prompt", "A", "--max-new", str(WARM_TOKENS)]
        words += ["--workdir", str(work)]
        words += ["--wan", wan] if wan else []
        words += ["--rotate", "3600"] if tunnel else ["--no-tunnel"]  # rotations have a bench of their own
        for key, value in settings.items():
            words += ["--set", f"{key}={json.dumps(value)}"]
        if shutil.which("setpriv"):
            words = ["setpriv", "--pdeathsig", "TERM", "--", *words]
        with open(Path(folder) / "stderr", "w+") as said:
            child = subprocess.Popen(
                words,
                env=os.environ | {"MIMIR_VENV": sys.prefix},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,  # our Ctrl-C is passed on below, once
            )
            try:
                events = _events(child, START_SECONDS)
                if "mesh" not in events or "done" not in events:
                    said.seek(0)
                    raise SystemExit(f"bench: the mesh did not come up:\n{said.read()}")
                up = events["mesh"]
                pids = [int(pid) for pid in up["pids"]]
                yield Mesh(work, up["prefix"], pids, events["provisioned"]["model"], up["tunnel"])
            finally:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    print("bench: local_mesh.sh did not end and was killed", file=sys.stderr)


def _events(child: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """JSON lines by event, up to the end of the first answer, of the script or of our patience."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    found: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    while "done" not in found:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return found
        if line is None:
            return found
        event = json.loads(line)
        found[event["event"]] = event
    return found


# --- models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    name: str
    directory: Path
    ids: list[int]  # a prompt
    expected: list[int] | None  # how it goes on


def subjects(work: Path) -> list[Subject]:
    """The demo, the shared checkpoints if they are here, and the random shapes (not made yet)."""

    def first(path: Path) -> tuple[list[int], list[int]]:
        prompt = json.loads(path.read_text())["prompts"][0]
        return prompt["input_ids"], prompt["greedy_new_ids"]

    out = [Subject("demo", ROOT / "demo", *first(ROOT / "demo" / "EXPECTED.json"))]
    shared = find_shared()
    if shared is not None:
        for m in json.loads((shared / "models" / "MODELS.json").read_text())["models"]:
            p = m["expected"]["prompts"][0]
            at = shared / "models" / m["directory"]
            out.append(Subject(m["name"], at, p["input_ids"], p["greedy_new_ids"]))
    return out + [Subject(shape, work / shape, [0, *range(3, 11)], None) for shape in SHAPES]


async def planned(spec: PlanSpec, settings: Settings, slots: int) -> dict[str, int]:
    """Rounds of one answered token at the end of `slots` positions, by the plan that the engine follows."""
    chooser = sampling.Sampler("greedy", 1.0, 1, spec.vocab, settings.round_trip)

    async def choose(ctx: Any, step: str, logits: Any) -> Any:
        return await sampling.choose(ctx, step, logits, chooser, sampling.no_noise)

    async def rounds(spec: PlanSpec, sampler: Any) -> int:
        cost = await transformer.cost_of(spec, settings, slots - 1, 1, prompt=False, sampler=sampler)
        return cost.rounds

    whole, body = await rounds(spec, choose), await rounds(spec, None)
    more = await rounds(dataclasses.replace(spec, layers=spec.layers + 1), None)
    layer = more - body
    return {"token": whole, "layer": layer, "choice": whole - body, "entry": body - spec.layers * layer}


def predicted(
    spec: PlanSpec, settings: Settings, row: dict[str, Any], max_context: int, rates: cost.Rates
) -> dict[str, Any]:
    """What the cost model says of the `ready` session of a row, in the figures that were measured."""
    ready, wan = row["ready"], row["wan"] or "0"
    rtt, _, rate = wan.partition(":")
    link = cost.Link(float(rtt), float(rate) if rate else None, parties_here=3)
    before = cost.resident() + dryrun.Shares(spec, KEPT_BYTES).kept_bytes
    planning = cost._seconds_to_plan(spec, settings, max_context)
    told = dryrun.run(
        spec,
        settings,
        bucket=ready["bucket"],
        tokens=ready["tokens"],
        max_context=max_context,
        ahead=POOL,
        memory=POOL_MIB << 20,
    )
    tokens = [
        cost.part(b.lanes[dryrun.ONLINE].minus(a.lanes[dryrun.ONLINE]), rates, link)
        for a, b in pairwise(told.of("token")[1:])  # as `_online` does: between decoded ones
    ]
    made = [
        (b.positions, b.positions - a.positions, b.lanes[dryrun.PREP].minus(a.lanes[dryrun.PREP]))
        for a, b in pairwise(told.of("made"))
    ]
    positions = made[-1][0]

    def share(c: dryrun.Counts, positions: int) -> cost.Part:
        return cost.part(c, rates, link, positions, extra=planning * c.plans, before=before)

    weights = [share(c, positions) for _, n, c in made if not n]
    full = max(n for at, n, _ in made if at > ready["bucket"])
    batches = [
        functools.reduce(operator.add, weights, share(c, full))
        for at, n, c in made
        if at > ready["bucket"] and n == full
    ]

    def middle(parts: list[cost.Part]) -> dict[str, float]:
        return {
            name: statistics.median(getattr(p, name) for p in parts) for name in ("rounds", "sent", "seconds")
        }

    return {"token": middle(tokens), "preprocessing": middle(batches), "memory": before + told.peak}


# --- one row ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """How long the sessions are."""

    bucket: int
    ready: int
    cold: int
    context: int


def measure(
    subject: Subject, wan: str | None, tunnel: bool, lengths: Lengths, rates: cost.Rates, threads: int
) -> dict[str, Any]:
    """All sessions of one model on one network."""
    spec = load_checkpoint(subject.directory).spec
    context = min(lengths.context, spec.context)
    answers = sorted({WARM_TOKENS, *range(3, lengths.ready + 1), lengths.cold})
    apart = min(max(1, int(float(wan.partition(":")[0]))), 1000) if wan else 1  # as scripts/local_mesh.sh
    settings = {
        "scheduler.max_context": lengths.context,
        "scheduler.prompt_buckets": [b for b in PROMPT_BUCKETS if b <= lengths.bucket],
        "scheduler.output_buckets": answers,
        "scheduler.round_trip_ms": apart,
        "triple_pool.min_size": POOL,
        "triple_pool.memory_mib": POOL_MIB,
        "deadlines.round": PEER_SECONDS,
        "deadlines.step": SESSION_SECONDS,
        "deadlines.client": SESSION_SECONDS,
        "kernels.threads": threads,
    }
    row: dict[str, Any] = {
        "model": subject.name,
        "network": "wan" if wan else "local",
        "wan": wan,
        "context": context,
        "threads": threads,
        "shape": {k: getattr(spec, k) for k in ("family", "layers", "width", "hidden", "vocab")},
        "rounds": trio.run(planned, spec, Settings(round_trip=apart), context),
    }
    with mesh(subject.directory, wan, tunnel, settings) as parties:
        row["tunnel"] = parties.tunnel
        bucket, tokens = lengths.bucket, min(lengths.ready, context - lengths.bucket)
        ready = parties.ask(subject.ids, bucket, tokens, wait=True)
        if "full" in ready:
            made = ready["full"]
            bucket, tokens = fitting(made, tokens)
            print(
                f"bench: {made} positions fit the pool: {bucket} of prompt, {tokens} tokens", file=sys.stderr
            )
            widest = max(b for b in PROMPT_BUCKETS if b < made)
            if widest > bucket:
                row["prefill"] = parties.ask(subject.ids, widest, WARM_TOKENS, wait=True)
            ready = parties.ask(subject.ids, bucket, tokens, wait=True)
        if "full" in ready or "full" in row.get("prefill", {}):
            raise SystemExit(f"bench: {subject.name}: the pool held more a moment ago; is the machine busy?")
        row["ready"] = ready
        cold = min(lengths.cold, context - lengths.bucket)
        row["cold"] = parties.ask(subject.ids, lengths.bucket, cold, wait=False)
    row["memory"] = row["cold"].pop("memory")
    for name in ("ready", "prefill"):
        row.get(name, {}).pop("memory", None)
    row["predicted"] = predicted(spec, Settings(round_trip=apart), row, lengths.context, rates)
    got, want = row["cold"]["ids"], subject.expected
    whole = want is not None and len(subject.ids) <= lengths.bucket
    row["as_expected"] = got == want[: len(got)] if whole and want is not None else None
    return row


def fitting(made: int, tokens: int) -> tuple[int, int]:
    """Prompt bucket and tokens of a session of at most `made` positions; `tokens` tokens if that can be."""
    if made < 3:
        raise SystemExit(f"bench: the pool holds {made} positions, too few to measure a token by itself")
    tokens = min(tokens, made)
    return max(b for b in PROMPT_BUCKETS if b <= made - tokens + 1), tokens


# --- tables -------------------------------------------------------------------------------------------------


def summary(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a row that the tables show and that are compared between results."""
    online, made = row["ready"]["online"], row["ready"]["preprocessing"]["answer"]
    prefill = row.get("prefill", row["ready"])
    return {
        "rounds": online["token"]["rounds"],
        "online bytes": online["token"]["sent"],
        "online s": online["token"]["seconds"],
        "prefill rows": prefill["bucket"],
        "prefill s": prefill["online"]["prefill"]["seconds"],
        "prep rounds": made["rounds_a_batch"] / made["batch"],
        "prep bytes": made["sent"],
        "prep s": made["seconds"],
        "together s": online["token"]["seconds"] + made["seconds"],
        "first s": row["cold"]["first_token_seconds"],
        "last s": row["cold"]["last_token_seconds"],
        "memory": max(row["memory"]["parties"]),
        "mapped": max(row["memory"]["files"]),
        "tunnel memory": max(row["memory"]["tunnels"]),
    }


def bound(row: dict[str, Any], part: dict[str, Any], seconds: float, rounds: float, sent: float) -> str:
    """What explains most of `seconds`: processors, latency or rate."""
    shares = {"processors": part["own"]}
    if row["wan"]:
        rtt, _, rate = row["wan"].partition(":")
        shares["latency"] = rounds * float(rtt) / 2000 / seconds
        if rate:
            shares["rate"] = sent * 8 / (float(rate) * 1e6) / seconds
    name = max(shares, key=lambda n: shares[n])
    return f"{name} {100 * shares[name]:.0f} %"


def _crowded(row: dict[str, Any]) -> bool:
    parts = [row["ready"]["online"]["token"], row["ready"]["preprocessing"]["answer"]]
    return any(part["busy"] - part["own"] > CROWDED for part in parts)


def bounds(row: dict[str, Any]) -> tuple[str, str]:
    s = summary(row)
    made = row["ready"]["preprocessing"]["answer"]
    token = row["ready"]["online"]["token"]
    return (
        bound(row, token, s["online s"], s["rounds"], s["online bytes"]),
        bound(row, made, s["prep s"], s["prep rounds"], s["prep bytes"]),
    )


def _mib(n: float) -> str:
    return f"{n / 2**20:.0f}"


def _mb(n: float) -> str:
    return f"{n / 1e6:.2f}" if n < 1e7 else f"{n / 1e6:.1f}"


def _s(n: float) -> str:
    return f"{n:.2f}" if n < 10 else f"{n:.1f}"


def tables(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    m = result["machine"]
    out = [
        f"Measured {result['date'][:10]} at commit {result['commit']} by `bench/run.py`, on "
        f"{m['cores']} cores of {m['processor']} ({m['kernels']} kernels, {m['memory_gib']} GiB), which all "
        "three parties, their tunnels and the client share.",
        "",
    ]
    for network in ("local", "wan"):
        rows = [r for r in result["rows"] if r["network"] == network]
        if not rows:
            continue
        how = (
            "WireGuard between namespaces" if rows[0]["tunnel"] else "loopback, WITHOUT transport protection"
        )
        if network == "wan":
            rtt, _, rate = rows[0]["wan"].partition(":")
            how += f", {rtt} ms there and back" + (f", {rate} Mbit/s each way" if rate else "")
        out += [
            f"**{how}**",
            "",
            "| model | rounds a layer | rounds a token | online MB | prefill s (rows) | online s | bound by "
            "| prep. rounds | prep. MB | prep. s | bound by | together s | memory MiB (files) |",
            "|---|--:|--:|--:|--:|--:|---|--:|--:|--:|---|--:|---|",
        ]
        for row in rows:
            s, (online, made) = summary(row), bounds(row)
            out.append(
                f"| {row['model']} | {row['rounds']['layer']} | {s['rounds']:.0f} | {_mb(s['online bytes'])} "
                f"| {_s(s['prefill s'])} ({s['prefill rows']:.0f}) | {_s(s['online s'])} | {online} "
                f"| {s['prep rounds']:.0f} | {_mb(s['prep bytes'])} | {_s(s['prep s'])} | {made} "
                f"| {_s(s['together s'])} | {_mib(s['memory'])} ({_mib(s['mapped'])}) |"
            )
        out += [
            "",
            "| model, nothing prepared | prompt bucket | tokens | first token after s | last token after s "
            "| rounds online | rounds prep. | MB online | MB prep. | tunnel's memory MiB | as expected |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        for row in rows:
            c = row["cold"]
            right = {True: "yes", False: "NO", None: "not compared"}[row["as_expected"]]
            out.append(
                f"| {row['model']} | {c['bucket']} | {c['tokens']} | {_s(c['first_token_seconds'])} "
                f"| {_s(c['last_token_seconds'])} | {c['rounds_online']} | {c['rounds_preprocessing']} "
                f"| {_mb(c['sent_online'])} | {_mb(c['sent_preprocessing'])} "
                f"| {_mib(max(row['memory']['tunnels']))} | {right} |"
            )
        out += ["", *_beside([row for row in rows if "predicted" in row]), ""]
        crowded = [row["model"] for row in rows if _crowded(row)]
        if crowded:
            out += [
                f"The machine had much else to do meanwhile: seconds too large for {', '.join(crowded)}.",
                "",
            ]
        for row in rows:
            if row["model"] == SHAPE and network == "local":
                s = summary(row) | {
                    "rounds a layer": row["rounds"]["layer"],
                    "MiB": summary(row)["memory"] / 2**20,
                }
                said = "; ".join(f"{name} {s[name]:.4g} of {most:g}" for name, most in TARGETS.items())
                out += [f"Targets of {SHAPE}: {said}.", ""]
    out += [
        "Rounds, megabytes and seconds are per party and per token position; preprocessing is in full "
        "batches. *Together* is the sum of both, as if nothing had been prepared and nothing overlapped. "
        "*Bound by* names the resource that explains most of the time. `bench/run.py` says how all this is "
        "measured.",
        "",
    ]
    return "\n".join(out)


def _beside(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what was predicted beside what was measured; empty without predictions."""
    if not rows:
        return []
    out = [
        "| model, predicted / measured | rounds a token | online MB | online s | prep. rounds | prep. MB "
        "| prep. s | memory MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        s, p = summary(row), row["predicted"]
        token, made = p["token"], p["preprocessing"]
        out.append(
            f"| {row['model']} | {token['rounds']:.0f} / {s['rounds']:.0f} "
            f"| {_mb(token['sent'])} / {_mb(s['online bytes'])} "
            f"| {_s(token['seconds'])} / {_s(s['online s'])} "
            f"| {made['rounds']:.0f} / {s['prep rounds']:.0f} | {_mb(made['sent'])} / {_mb(s['prep bytes'])} "
            f"| {_s(made['seconds'])} / {_s(s['prep s'])} "
            f"| {_mib(p['memory'])} / {_mib(s['memory'])} |"
        )
    return out


def earlier(folder: Path, but: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The latest row of each model, network and lengths, in files that sort before `but`: by date."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in sorted(f for f in folder.glob("*.json") if f.name < but.name):
        rows |= {_alike(row): row for row in json.loads(file.read_text())["rows"]}
    return rows


def _alike(row: dict[str, Any]) -> tuple[Any, ...]:
    ready, cold = row["ready"], row["cold"]
    lengths = (ready["bucket"], ready["tokens"], cold["bucket"], cold["tokens"], row["context"])
    return (row["model"], row["network"], row["wan"], row["tunnel"], *lengths)


def compare(result: dict[str, Any], before: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """Ratios to earlier rows, above 1 where a figure grew; empty if there are none."""
    names = (
        "rounds",
        "online bytes",
        "online s",
        "prefill s",
        "prep rounds",
        "prep bytes",
        "prep s",
        "memory",
    )
    lines = []
    for row in result["rows"]:
        was = before.get(_alike(row))
        if was is not None:
            a, b = summary(was), summary(row)
            ratios = " | ".join(f"{b[n] / a[n]:.2f}" if a[n] else "-" for n in names)
            lines.append(f"| {row['model']} | {row['network']} | {ratios} |")
    if not lines:
        return ""
    head = ["Against the latest earlier results (1 is equal, less is less):", ""]
    head += ["| model | network | " + " | ".join(names) + " |", "|---|---|" + "--:|" * len(names)]
    return "\n".join([*head, *lines, ""])


# --- the command --------------------------------------------------------------------------------------------


def commit() -> str:
    said = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"


def tunnel_possible() -> bool:
    return os.geteuid() == 0 and Path("/dev/net/tun").exists() and shutil.which("ip") is not None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="run.py [options]"
    )
    p.add_argument("--quick", action="store_true", help="the demo alone, locally, with few tokens")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these models")
    p.add_argument("--list", action="store_true", help="print the names of the models and end")
    p.add_argument("--network", choices=("local", "wan"), help="this network alone")
    p.add_argument(
        "--wan", default="20:100", metavar="RTT[:MBIT]", help="milliseconds, Mbit/s (default 20:100)"
    )
    p.add_argument("--no-tunnel", action="store_true", help="on loopback, WITHOUT transport protection")
    p.add_argument(
        "--bucket", type=int, default=16, choices=PROMPT_BUCKETS, help="of the prompt (default 16)"
    )
    p.add_argument(
        "--threads", type=threads_rule, default=third(), metavar="N", help="of each party (default a third)"
    )
    p.add_argument("--tokens", type=int, default=17, help="of the cold answer (default 17)")
    p.add_argument("--context", type=int, default=CONTEXT, help=f"scheduler.max_context (default {CONTEXT})")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default bench/results)")
    p.add_argument("--onto", type=Path, metavar="FILE", help="add to this result")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the tables of this result and end")
    p.add_argument("--targets", action="store_true", help="run bench/targets.py instead")
    p.add_argument("--client", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.tokens < 3:
        p.error("--tokens must be at least 3")
    return a


def main(argv: Sequence[str] | None = None) -> int:
    a = parse(sys.argv[1:] if argv is None else argv)
    if a.client:
        return client(a.client)
    if a.show:
        print(tables(json.loads(a.show.read_text())))
        return 0
    if a.targets:
        words = [sys.executable, str(HERE / "targets.py"), "--threads", str(a.threads)]
        return subprocess.run(words, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="mimir-bench.") as folder:
        chosen = subjects(Path(folder))
        if a.list:
            print("\n".join(s.name for s in chosen))
            return 0
        wanted = a.only or (["demo"] if a.quick else [s.name for s in chosen])
        for name in set(wanted) - {s.name for s in chosen}:
            raise SystemExit(f"bench: {name}: no such model; they are {', '.join(s.name for s in chosen)}")
        tunnel = tunnel_possible() and not a.no_tunnel
        networks: list[str | None] = [None, a.wan]
        if a.quick or a.network == "local":
            networks = [None]
        elif a.network == "wan":
            networks = [a.wan]
        if not tunnel:
            print(
                "bench: no tunnel: loopback, WITHOUT transport protection, and no wide area", file=sys.stderr
            )
            networks = [None]
        ready, cold = (QUICK_TOKENS, QUICK_TOKENS) if a.quick else (min(READY_TOKENS, a.tokens), a.tokens)
        lengths = Lengths(8 if a.quick else a.bucket, ready, cold, a.context)
        now = datetime.now(UTC)
        result: dict[str, Any] = {"date": "", "commit": "", "machine": {}, "rows": []}
        if a.onto:
            result = json.loads(a.onto.read_text())
        result |= {"date": now.isoformat(timespec="seconds"), "commit": commit(), "machine": machine()}
        folder_out = a.out or (Path(folder) / "out" if a.quick else RESULTS)
        target = a.onto or folder_out / f"{now:%Y-%m-%d-%H%M}-{result['commit'][:10]}.json"
        before = earlier(target.parent, target)
        for shape in set(wanted) & set(SHAPES):
            _random(shape, Path(folder) / shape)
        rates = cost.calibrate()
        for network in networks:
            for subject in (s for s in chosen if s.name in wanted):
                print(f"bench: {subject.name}, {network or 'local'}", file=sys.stderr)
                row = measure(subject, network, tunnel, lengths, rates, a.threads)
                same = (row["model"], row["network"])
                result["rows"] = [r for r in result["rows"] if (r["model"], r["network"]) != same] + [row]
                # Kept after every row: an interruption costs one row.
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(_rounded(result), indent=1) + "\n")
                (target.parent / "table.md").write_text(tables(result))
    print(tables(result))
    print(compare(result, before), end="")
    return 0


def _random(shape: str, out: Path) -> None:
    script = str(ROOT / "scripts" / "random_checkpoint.py")
    subprocess.run(
        [sys.executable, script, "--shape", shape, str(out)], check=True, stdout=subprocess.DEVNULL
    )


def _rounded(value: Any) -> Any:
    """Seconds to the tenth of a millisecond: results are read by people too."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
