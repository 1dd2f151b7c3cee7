"""What a party sees is uniform and independent of the secrets: every opened value, every message received.

Inputs are shared as (secret, 0, 0), so nothing but the masks can hide them. `Watched` doors record, at every
party, each public value and the component that arrived for it, and each message of a resharing. Chi-square
tests look at the highest and the lowest bits, at single bits and at differences of neighbours (a mask used
twice cancels there); two-sample tests compare secrets with each other. The thresholds are seven standard
deviations, and the streams are seeded, so a failure is a finding.

A test of randomness that cannot fail proves nothing: every case is run again with masks that are too short,
used twice, or known to one party, and with the shares of zero left out, and must then be caught.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import parties
import pytest
import trio

from mimir.model import transformer
from mimir.model.checkpoint import PlanSpec
from mimir.model.transformer import Cache
from mimir.mpc import nonlinear, ops, prep
from mimir.mpc.domain import Ring
from mimir.mpc.doors import Doors, Masked
from mimir.mpc.nonlinear import Scores, Settings
from mimir.mpc.ops import Context
from mimir.mpc.plan import planning
from mimir.mpc.replicated import Replicated
from mimir.mpc.share import Bits, Share

RING = 1 << 64
SIGMAS = 7.0  # one test errs by chance once in 10^11
FEWEST = 256  # values below which a label is not tested
Spoil = Literal["honest", "short", "reused", "known", "no zero"]


# --- statistics ---------------------------------------------------------------------------------------------


def quantile(freedom: int) -> float:
    """Chi-square value exceeded by chance as rarely as SIGMAS says (Wilson and Hilferty)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + SIGMAS * math.sqrt(spread)) ** 3


def cells(v: Ring, width: int) -> Iterator[tuple[str, npt.NDArray[np.int64], int]]:
    """Ways to sort values below 2^width into equally likely cells: (name, cell of each, number of cells)."""
    bits = max(1, min(8, width, int(math.log2(v.size / 8))))
    yield "top", (v >> np.uint64(width - bits)).astype(np.int64), 1 << bits
    yield "low", (v & np.uint64((1 << bits) - 1)).astype(np.int64), 1 << bits
    for at in sorted({0, 1, width // 4, width // 2, width - 2, width - 1} & set(range(width))):
        yield f"bit {at}", (v >> np.uint64(at) & np.uint64(1)).astype(np.int64), 2


def uneven(v: Ring, width: int) -> list[str]:
    """In which ways the values are not uniform below 2^width."""
    out = []
    for name, cell, count in cells(v, width):
        expected = v.size / count
        chi = float(((np.bincount(cell, minlength=count) - expected) ** 2).sum() / expected)
        if chi > quantile(count - 1):
            out.append(name)
    return out


def unlike(a: Ring, b: Ring, width: int) -> list[str]:
    """In which ways two samples of one size come from different distributions."""
    out = []
    for (name, x, count), (_, y, _) in zip(cells(a, width), cells(b, width), strict=True):
        hit, other = np.bincount(x, minlength=count), np.bincount(y, minlength=count)
        both = hit + other
        chi = float(((hit - other) ** 2 / np.maximum(both, 1)).sum())
        if chi > quantile(max(int((both > 0).sum()) - 1, 1)):
            out.append(name)
    return out


# --- watching -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """Where a value was seen: step, place within the step, what it is, and at which party."""

    step: str
    place: int
    what: Literal["opened", "received"]
    party: int
    bits: bool
    width: int


Log = dict[Label, list[Ring]]


class Watched(Doors):
    """Doors that note what this party sees."""

    def __init__(self, doors: Doors, log: Log) -> None:
        super().__init__(doors.channel, doors.bk)
        self.log = log

    def _note(self, label: Label, value: Ring) -> None:
        # Column by column, so that neighbours are lanes of one operation.
        self.log.setdefault(label, []).append(np.array(value, np.uint64).ravel(order="F"))

    async def open_all(self, step: str, requests: Sequence[Masked]) -> list[list[Ring]]:
        opened = await super().open_all(step, requests)
        place = 0
        for r, values in zip(requests, opened, strict=True):
            for s, value in zip(r.shares, values, strict=True):
                bits = isinstance(s, Bits)
                width = 64 if bits else r.width
                mine = s.v[0] ^ s.v[1] if bits else s.v[0] + s.v[1]
                lacked = value ^ mine if bits else (value - mine) & np.uint64((1 << width) - 1)
                me = self.bk.party
                if me == 0:
                    self._note(Label(step, place, "opened", me, bits, width), value)
                self._note(Label(step, place, "received", me, bits, width), lacked)
                place += 1
        return opened

    async def _open(self, step: str, values: Sequence[Ring]) -> list[Ring]:
        out = await super()._open(step, values)
        if "verify" in step and out:  # the check opens without `open_all`
            self._note(Label(step, 0, "received", self.bk.party, False, 64), out[0])
        return out

    async def reshare_apart(self, step: str, *summands: Ring) -> list[tuple[Ring, Ring]]:
        out = await super().reshare_apart(step, *summands)
        for place, v in enumerate(out):
            self._note(Label(step, place, "received", self.bk.party, False, 64), v[1])
        return out


def merge(logs: Sequence[Log]) -> dict[Label, Ring]:
    """All values by label."""
    return {label: np.concatenate(v) for log in logs for label, v in log.items()}


def findings(*runs: Mapping[Label, Ring]) -> list[str]:
    """What is wrong with what was seen in runs that differ in their secrets only."""
    out = []
    for run in runs:
        before: dict[tuple[int, str, bool, int], Ring] = {}
        for label, v in run.items():
            if v.size < FEWEST:
                continue
            mask = np.uint64((1 << label.width) - 1)

            def difference(a: Ring, b: Ring, label: Label = label, mask: np.uint64 = mask) -> Ring:
                return (a ^ b if label.bits else a - b) & mask

            out += [f"{label}: {x}" for x in uneven(v, label.width)]
            half = v.size // 2
            pairs = difference(v[1 : 2 * half : 2], v[: 2 * half : 2])
            out += [f"{label}: neighbours, {x}" for x in uneven(pairs, label.width)]
            key = (label.party, label.what, label.bits, label.width)
            last = before.get(key)
            if last is not None and last.size == v.size:  # a mask used in two openings
                out += [
                    f"{label}: with the one before, {x}" for x in uneven(difference(v, last), label.width)
                ]
            before[key] = v
    for other in runs[1:]:
        assert other.keys() == runs[0].keys(), "different secrets open different things"
        for label, v in runs[0].items():
            assert other[label].size == v.size
            if v.size >= FEWEST:
                out += [f"{label}: two secrets, {x}" for x in unlike(v, other[label], label.width)]
    return out


def test_the_statistics_find_what_they_should() -> None:
    rng = np.random.default_rng(0)
    good, again = rng.integers(0, RING, (2, 4096), np.uint64)
    assert uneven(good, 64) == [] and unlike(good, again, 64) == []
    small = good & np.uint64(7)
    assert uneven(small, 3) == [] and unlike(small, again >> np.uint64(61), 3) == []
    assert "top" in uneven(good >> np.uint64(1), 64)
    assert "bit 63" in uneven(good | np.uint64(1 << 63), 64)
    assert "low" in uneven(good & ~np.uint64(2), 64)
    assert uneven(np.where(rng.random(4096) < 0.1, np.uint64(0), good), 64) != []
    assert "top" in unlike(good, again >> np.uint64(1), 64)
    sums = (good >> np.uint64(8)) + (again >> np.uint64(8))
    assert "top" in uneven(sums, 64), "the sum of two short masks"


# --- spoiled masks ------------------------------------------------------------------------------------------


def mask_width(kind: prep.Kind, name: str) -> int | None:
    """Bits of a mask that opens something; None for what is no mask."""
    match kind:
        case prep.Trunc():
            return 64 if name == "r" else None
        case prep.TruncIf():
            return {"r": 64, "ring": 1}.get(name)
        case prep.Norm():
            return {"r": 64}.get(name)
        case prep.Lookup(rest, bits, _) | prep.Pieces(rest, bits, _):
            return rest + bits if name == "r" else None
        case prep.Select():
            return {"r": 64, "ring": 1}.get(name)
        case prep.Wave(bits, _):
            return bits if name == "r" else None
        case prep.Decay(rest, bits, _):
            return rest + bits if name == "r" else None
        case prep.Digits():
            return kind.width if name == "r" else None
        case prep.Ands():
            return 64
        case prep.DaBit():
            return {"ring": 1}.get(name)  # the low bit masks
        case prep.Pick():
            return None  # some of its only array, see `spoil_masks`
        case prep.Keys():  # and Values
            return 64 if name in ("x", "new") else None
        case prep.Weight(_, lane):
            return lane if name == "x" else None
        case _:
            return 64 if name in ("x", "y", "s") else None


def use_twice(bk: Replicated) -> None:
    """Give neighbouring lanes the same randomness when correlations are made: all relations still hold."""
    honest = bk.random

    def random(*shape: int) -> Ring:
        out = honest(*shape)
        lanes = next((i for i, n in enumerate(out.shape) if i and n > 1), 1)
        v = np.moveaxis(out, lanes, 0)
        v[1::2] = v[: 2 * (len(v) // 2) : 2]
        return out

    bk.random = random  # type: ignore[method-assign]


def spoil_masks(how: Spoil, party: int, store: prep.Store) -> None:
    """Shorten every mask of a store, or make one component of it 0, alike at both holders of a component.

    Where masks of one opening are not neighbours, but rows are, use every row twice.
    """
    for kind, arrays in store.material.items():
        for name, v in arrays.items():
            if how == "reused":
                if isinstance(kind, prep.Select):
                    arrays[name] = np.repeat(v[:, ::2], 2, axis=1)[:, : v.shape[1]]
            elif isinstance(kind, prep.Pick):
                arrays[name] = v = v.copy()
                for column in range(kind.width):  # of which some are opened modulo 2^24
                    v[:, :, column] = broken(how, party, v[:, :, column], 24)
                for flag in range(kind.flags):
                    column = (kind.width + 1 << flag) - 1
                    v[:, :, column] = broken(how, party, v[:, :, column], 1)
            elif width := mask_width(kind, name):
                arrays[name] = broken(how, party, v, width)


def broken(how: Spoil, party: int, v: Ring, width: int) -> Ring:
    """A mask, shortened or with component 0 made 0, which parties 0 and 2 hold."""
    v = v.copy()
    if how == "short":
        v &= v.dtype.type((1 << (width - min(8, (width + 1) // 2))) - 1)
    elif how == "known" and party != 1:
        v[0 if party == 0 else 1] = 0
    return v


# --- operations ---------------------------------------------------------------------------------------------

Op = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Case:
    """An operation over vectors of one repeated secret; `secrets` are extremes of its domain."""

    op: Op
    shapes: tuple[tuple[int, ...], ...]
    secrets: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[str, int, int], ...] = ()
    bits: tuple[int, ...] = ()  # which inputs are words of bits


async def _truncate(ctx: Context, x: Share) -> Any:
    return await ops.truncate(ctx, "truncate", (x, 16), (x, 44))


async def _mul(ctx: Context, x: Share, y: Share) -> Any:
    return await ops.mul(ctx, "mul", (x, y))


async def _scale(ctx: Context, s: Share, x: Share) -> Any:
    return await ops.scale(ctx, "scale", s, x)


async def _matmul(ctx: Context, x: Share) -> Any:
    return await ops.matmul(ctx, "matmul", (x, "w"))


async def _matmul32(ctx: Context, x: Share) -> Any:
    return await ops.matmul(ctx, "matmul", (x, "half"), low=20)


async def _norm(ctx: Context, x: Share) -> Any:
    return await nonlinear.rms_norm(ctx, "norm", x, 48, 1e-5, Settings(), 39)


async def _reciprocal(ctx: Context, x: Share) -> Any:
    return (await nonlinear.reciprocals(ctx, "reciprocal", [(x, 2**11)], Settings()))[0]


async def _read(ctx: Context, x: Share) -> Any:
    return await ops.read(ctx, "read", x, *PIECES)


async def _choose(ctx: Context, bits: Share, x: Share) -> Any:
    return await ops.choose(ctx, "choose", bits, x, (16, 20, 16))


async def _silu(ctx: Context, x: Share) -> Any:
    return await nonlinear.activation(ctx, "silu", x, "silu", Settings(), 53)


async def _silu_near(ctx: Context, x: Share) -> Any:
    return await nonlinear.activation(ctx, "silu", x, "silu", Settings(round_trip=1), 53)


async def _relu(ctx: Context, x: Share) -> Any:
    return await nonlinear.relu(ctx, "relu", x, Settings(), transformer.RELU_SCALE)


async def _softmax(ctx: Context, x: Share, valid: Share) -> Any:
    allowed = np.ones(x.shape[1:], np.uint64)
    ((e, total),) = await nonlinear.exponentials(ctx, "softmax", [Scores(x, 32, allowed, valid)])
    return e, total


async def _is_zero(ctx: Context, x: Share) -> Any:
    return await ops.is_zero(ctx, "zero", x, 4, 8)


async def _are_zero(ctx: Context, x: Share) -> Any:
    return await ops.are_zero(ctx, "zero", x, 4)


async def _are_below(ctx: Context, x: Share) -> Any:
    return await ops.are_below(ctx, "rough", x, 20, 5, (4,), (7, 2))


async def _are_below_by_digits(ctx: Context, x: Share) -> Any:
    return await ops.are_below(ctx, "rough", x, 20, 5, (2, 2), (7, 2))


TABLES = np.arange(3 << 5, dtype=np.uint64).reshape(3, 1 << 5)
PIECES = tuple(ops.Piecewise(low, 12, 5, TABLES, TABLES[:1], 24) for low in (3, 7))
COSINES = ops.Wave(20, 13, (3, 11, 40), (1.0, -0.5, 0.25), 1.0, 59)


async def _wave(ctx: Context, x: Share) -> Any:
    return await ops.wave(ctx, "wave", x, COSINES)


async def _decay(ctx: Context, x: Share) -> Any:
    return await ops.decay(ctx, "decay", x, 20, prep.Decay(9, 4, 2.0), -26.0, 61)


async def _is_negative(ctx: Context, x: Share) -> Any:
    return await ops.is_negative(ctx, "sign", x, 16, 28)


async def _to_ring(ctx: Context, x: Bits) -> Any:
    return await ops.to_ring(ctx, "inject", x, 64 * x.shape[0])


async def _monomials(ctx: Context, x: Bits) -> Any:
    return await ops.monomials(ctx, "and", ((0, 1), (0, 2, 3)), x)


async def _pick(ctx: Context, b: Bits, x: Share) -> Any:
    return await ops.pick(ctx, "pick", b, x, (64, 32, 40), 64)


async def _truncate_if(ctx: Context, b: Bits, x: Share) -> Any:
    return await ops.truncate_if(ctx, "some", b, (x, 16))


async def _truncate_rows(ctx: Context, x: Share) -> Any:
    return await ops.truncate_rows(ctx, "rows", x, 16)


async def _argmax(ctx: Context, x: Share) -> Any:
    for i in range(x.shape[0]):
        await ops.argmax(ctx, "argmax", x[i], 0, 28)


TINY = PlanSpec("llama", 1, 8, 2, 1, 4, 8, 8, 8, "silu_glu", 1e-5, "rope", 100.0, None, ())


async def _reenter(ctx: Context, token: Share, position: Share) -> Any:
    for i in range(token.shape[0]):
        await transformer.reenter(ctx, "reenter", TINY, token[i : i + 1], position[i : i + 1])


BIG = 1 << 61
CASES: dict[str, Case] = {
    "truncate": Case(_truncate, ((2048,),), ((0,), (BIG,), (-BIG,), (-1,))),
    "mul": Case(_mul, ((3000,), (3000,)), ((0, 0), ((1 << 63) - 1, -1), (-(1 << 63), 1))),
    "scale": Case(_scale, ((600,), (600, 5)), ((0, 0), (-1, (1 << 63) - 1), (1, -(1 << 63)))),
    "matmul": Case(_matmul, ((500, 6),), ((0,), ((1 << 63) - 1,), (-5,)), (("w", 6, 2),)),
    "matmul modulo 2^32": Case(_matmul32, ((500, 6),), ((0,), ((1 << 63) - 1,), (-5,)), (("half", 6, 2),)),
    "norm": Case(_norm, ((512, 3),), ((0,), (4000 << 32,), (-1,))),
    "reciprocal": Case(_reciprocal, ((512,),), ((1 << 13,), ((1 << 35) - 1,), (1 << 24,))),
    "read": Case(_read, ((1024,),), ((0,), (29 << 15,), (1 << 15,), ((1 << 15) - 1,))),
    "choose": Case(_choose, ((1024, 2), (1024, 3)), ((0, 0), (1, BIG), (0, -1), (1, 1 << 63))),
    "activation": Case(_silu, ((1024,),), ((0,), (249 << 53,), (-(249 << 53),))),
    "activation on one site": Case(_silu_near, ((1024,),), ((0,), (249 << 53,), (-(249 << 53),))),
    "relu": Case(_relu, ((2048,),), ((0,), (2047 << 50,), (-(2047 << 50),))),
    "softmax": Case(_softmax, ((1, 32, 32), (32,)), ((0, 0), (249 << 32, 1), (-(249 << 32), 1))),
    "is_zero": Case(_is_zero, ((4096,),), ((0,), (15,), (7,))),
    "are_zero": Case(_are_zero, ((4096,),), ((0,), (15,), (7,))),
    "are_below": Case(_are_below, ((2048,),), ((0,), (14 << 25,), (6 << 25,))),
    "are_below by digits": Case(_are_below_by_digits, ((2048,),), ((0,), (14 << 25,), (6 << 25,))),
    "wave": Case(_wave, ((2048,),), ((0,), ((1 << 63) - 1,), (-(1 << 63),), (-1,))),
    "decay": Case(_decay, ((2048,),), ((0,), (13 << 29,), (1 << 20,), ((5 << 29) - 1,))),
    "is_negative": Case(_is_negative, ((2048,),), ((0,), (1 << 42,), (-(1 << 42),), (-1,))),
    "to_ring": Case(_to_ring, ((1024,),), ((0,), (-1,), (0x5555555555555555,)), bits=(0,)),
    "monomials": Case(_monomials, ((4, 1500),), ((0,), (-1,)), bits=(0,)),
    "pick": Case(_pick, ((2, 32), (2048, 3)), ((0, 0), (-1, -1), (-1, 1 << 63)), bits=(0,)),
    "truncate_if": Case(_truncate_if, ((32,), (2048,)), ((0, 0), (-1, BIG), (0, -BIG)), bits=(0,)),
    "truncate_rows": Case(_truncate_rows, ((800, 3),), ((0,), (BIG,), (-BIG,))),
    "argmax": Case(_argmax, ((24, 12),), ((0,), (1 << 25,), (-(1 << 25),))),
    "reenter": Case(_reenter, ((300,), (300,)), ((0, 0), (7, 7)), (("embed", 8, 8),)),
}  # fmt: skip


def watch(case: Case, secrets: Sequence[int], seed: int, how: Spoil = "honest") -> dict[Label, Ring]:
    """What all parties saw online when the operation ran on these secrets."""
    weights: dict[str, Any] = {
        name: np.random.default_rng(5)
        .integers(0, RING, (k, m), np.uint64)
        .astype(np.uint32 if name in ("half", "embed") else np.uint64)
        for name, k, m in case.weights
    }
    ctx, cost = planning({name: (k, m) for name, k, m in case.weights})
    kinds = [Bits if i in case.bits else Share for i in range(len(case.shapes))]

    async def plan() -> None:
        blanks = (np.zeros((1, *shape), np.uint64) for shape in case.shapes)
        await case.op(ctx, *(kind(v, ctx.bk) for kind, v in zip(kinds, blanks, strict=True)))

    trio.run(plan)
    logs: list[Log] = [{}, {}, {}]

    async def party(p: parties.Party) -> None:
        if how == "reused":
            use_twice(p.prep_doors.bk)
        inner = await p.context(cost.demand)
        assert isinstance(inner.store, prep.Store)
        spoil_masks(how, p.index, inner.store)
        inner.doors = Watched(p.doors, logs[p.index])
        shares = []
        for kind, shape, secret in zip(kinds, case.shapes, secrets, strict=True):
            blank = kind(np.zeros((2, *shape), np.uint64), p.bk)
            value = np.full(shape, secret % RING, np.uint64)
            shares.append(blank ^ value if isinstance(blank, Bits) else blank + value)
        await case.op(inner, *shares)

    parties.run_parties(party, weights=parties.share_weights(weights), seed=b"secrecy %d" % seed)
    return merge(logs)


@pytest.mark.parametrize("name", CASES)
def test_openings_are_uniform_and_tell_no_secret_from_another(name: str) -> None:
    case = CASES[name]
    runs = [watch(case, secrets, 10 + i) for i, secrets in enumerate(case.secrets)]
    assert places(runs[0]), "nothing was tested"
    assert findings(*runs) == []


def places(seen: Mapping[Label, Ring]) -> set[tuple[str, int]]:
    return {(label.step, label.place) for label, v in seen.items() if v.size >= FEWEST}


def caught(seen: Mapping[Label, Ring]) -> set[tuple[str, int]]:
    """The openings at which something was found."""
    found = findings(seen)
    return places({label: v for label, v in seen.items() if any(f.startswith(f"{label}:") for f in found)})


@pytest.mark.parametrize("name", CASES)
def test_masks_used_twice_are_caught(name: str) -> None:
    """At every single opening of every operation; a look-up of one lane has no neighbour."""
    case = CASES[name]
    seen = watch(case, case.secrets[0], 50, "reused")
    assert places(seen) - caught(seen) <= {("reenter/index", 0), ("reenter/index", 1)}


SINGLE = [
    "truncate",
    "mul",
    "scale",
    "matmul",
    "matmul modulo 2^32",
    "is_zero",
    "are_zero",
    "to_ring",
    "monomials",
    "pick",
]
SINGLE += ["truncate_if", "are_below", "wave", "decay", "read", "choose"]


@pytest.mark.parametrize("how", ["short", "known"])
@pytest.mark.parametrize("name", CASES)
def test_a_broken_mask_is_caught(name: str, how: Spoil) -> None:
    """At every opening of the operations of one round; of the others the later openings see garbage."""
    case = CASES[name]
    seen = watch(case, case.secrets[0], 50, how)
    assert caught(seen) == places(seen) if name in SINGLE else caught(seen), f"{how} masks of {name}"


def test_a_mask_used_for_two_openings_is_caught() -> None:
    """Two truncations that take the same pairs: each opening looks uniform, their difference does not."""

    async def op(ctx: Context, x: Share) -> Any:
        again = Context(ctx.bk, ctx.doors, ctx.store, ctx.weights)
        if isinstance(ctx.store, prep.Store):
            again.store = prep.Store({k: dict(v) for k, v in ctx.store.material.items()})
        await ops.truncate(ctx, "first", (x, 16))
        await ops.truncate(again, "second", (x, 16))

    seen = watch(Case(op, ((2048,),), ((0,),)), (0,), 60)
    assert all("with the one before" in f for f in findings(seen)) and findings(seen) != []


# --- preprocessing ------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[prep.Kind, int]] = {
    "trunc": (prep.Trunc(16), 1024),
    "trunc if": (prep.TruncIf(20), 1024),
    "lookup": (prep.Lookup(12, 3), 1024),
    "lookup in bytes": (prep.Lookup(0, 6, 8), 1024),
    "lookup in 16 bits": (prep.Lookup(3, 4, 16), 1024),
    "pieces": (prep.Pieces(12, 3, 2), 1024),
    "select": (prep.Select((16, 30, 40)), 800),
    "wave": (prep.Wave(20, (3, 7)), 900),
    "decay": (prep.Decay(6, 3, 2.0), 1024),
    "digits": (prep.Digits((4, 5, 3)), 4096),
    "digits over others": (prep.Digits((4,), 6), 4096),
    "dabit": (prep.DaBit(), 2048),
    "ands": (prep.Ands(((0, 1), (1, 2, 3))), 1500),
    "pick": (prep.Pick(2), 1024),
    "pick modulo 2^24": (prep.Pick(1, 2, 24), 1536),
    "mul": (prep.Mul(), 3000),
    "zero": (prep.Zero(), 3000),
    "scale": (prep.Scale(3), 800),
    "norm": (prep.Norm(3, 16), 800),
    # Of matrix products those with one term: with many, even an unmasked message looks uniform.
    "weight": (prep.Weight("w"), 600),
    "weight modulo 2^32": (prep.Weight("half", 32), 1200),
    "keys": (prep.Keys(0, 0, 30, 2, 1, 1), 1),
    "values": (prep.Values(0, 0, 1, 300, 300, 8), 1),
}


def watch_making(kind: prep.Kind, n: int, seed: int, how: Spoil = "honest") -> dict[Label, Ring]:
    """What each party received while a kind was made: resharings, and the halvings of its check."""
    logs: list[Log] = [{}, {}, {}]
    w: dict[str, Any] = {"w": np.random.default_rng(5).integers(0, RING, (1, 4), np.uint64)}
    w["half"] = w["w"].astype(np.uint32)

    async def party(p: parties.Party) -> None:
        p.prep_doors = Watched(p.prep_doors, logs[p.index])
        if how == "no zero":

            def nothing(*shape: int) -> Ring:
                return np.zeros(shape, np.uint64)

            p.prep_doors.bk.zero = p.prep_doors.bk.zero_bits = nothing  # type: ignore[method-assign]
        await p.context({kind: n})

    parties.run_parties(party, weights=parties.share_weights(w), seed=b"making %d" % seed)
    return merge(logs)


@pytest.mark.parametrize("name", KINDS)
def test_resharings_are_uniform(name: str) -> None:
    seen = watch_making(*KINDS[name], 1)
    assert any("verify" not in step for step, _ in places(seen)), "nothing was tested"
    assert findings(seen) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_share_of_zero_is_caught(name: str) -> None:
    """Without it a message is a product of what the receiver half knows: its low bit is 0 too often."""
    assert findings(watch_making(*KINDS[name], 1, "no zero")) != []


@pytest.mark.parametrize("how", ["honest", "no zero"])
def test_a_resharing_is_independent_of_the_receivers_own_shares(how: Spoil) -> None:
    """Given its own components of both factors a party cannot predict the message; without zeros it can."""
    views: list[tuple[Ring, Ring, Ring]] = []

    async def party(p: parties.Party) -> None:
        batch = prep.Batch(p.prep_doors, p.weights, [])
        bk = batch.doors.bk
        x, y = bk.random(4096), bk.random(4096)
        if how == "no zero":
            bk.zero_bits = lambda *shape: np.zeros(shape, np.uint64)  # type: ignore[method-assign]
        (z,) = await batch.conj("and", (x, y))
        if p.index == 0:
            views.append((x[1], y[1], z[1]))

    parties.run_parties(party, seed=b"view")
    ((x, y, z),) = views
    knows = ~(x | y)  # lanes where the receiver's shares are both 0
    ones, lanes = int(np.bitwise_count(z & knows).sum()), int(np.bitwise_count(knows).sum())
    if how == "honest":
        assert abs(ones - lanes / 2) < SIGMAS * math.sqrt(lanes) / 2
    else:
        assert ones == 0


# --- what clients get ---------------------------------------------------------------------------------------


def reveal(value: int, how: Spoil) -> dict[Label, Ring]:
    """Components handed out by `reveal` of a sharing (value, 0, 0), and what parties receive meanwhile."""
    logs: list[Log] = [{}, {}, {}]

    async def party(p: parties.Party) -> None:
        doors = Watched(p.doors, logs[p.index])
        if how == "no zero":
            p.prep_doors.bk.zero = lambda *shape: np.zeros(shape, np.uint64)  # type: ignore[method-assign]
        zero = (await p.context({prep.Zero(): 2048}, "zeros")).take(prep.Zero(), 2048)["zero"]
        share = Share(np.zeros((2, 2048), np.uint64), p.bk) + value
        (out,) = await doors.reveal("token", zero, share)
        for place in range(2):
            doors._note(Label("handed out", place, "received", p.index, False, 64), out[place])

    parties.run_parties(party, seed=b"reveal %d" % value)
    return merge(logs)


def test_revealed_components_are_fresh() -> None:
    """They are uniform whatever the share was: a client learns the value and no component the parties use."""
    one, other = reveal(3, "honest"), reveal(31999, "honest")
    assert findings(one, other) == []
    assert findings(reveal(3, "no zero")) != []


# --- a whole pass -------------------------------------------------------------------------------------------

PASS = PlanSpec(
    family="llama", layers=1, width=16, heads=4, kv_heads=2, head_dim=4, hidden=24, vocab=16, context=32,
    act="silu_glu", norm_eps=1e-5, positions="rope", rope_theta=10000.0, bos_id=None, eos_ids=(),
)  # fmt: skip
ROWS = 24


@dataclass
class Prompt:
    token: int
    valid: int
    weights: dict[str, Ring] = field(default_factory=dict)


def model(seed: int, size: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in PASS.shapes().items():
        values = rng.standard_normal(shape) * (0.1 if len(shape) == 1 else size * shape[0] ** -0.5)
        out[name] = values
    return parties.encoded(PASS, out)


def watch_pass(prompt: Prompt, seed: int) -> dict[Label, Ring]:
    """Everything seen online while a prompt of one repeated token passes through a layer."""
    logs: list[Log] = [{}, {}, {}]
    s = Settings()

    async def plan() -> Mapping[prep.Kind, int]:
        return (await transformer.cost_of(PASS, s, 0, ROWS, prompt=True, sampler=None)).demand

    demand = trio.run(plan)

    async def party(p: parties.Party) -> None:
        doors = Watched(p.doors, logs[p.index])
        entering = await p.context(transformer.entry_demand(PASS, ROWS), "entry")
        entry = transformer.entry(entering, PASS, ROWS)
        blank = Share(np.zeros((2, ROWS), np.uint64), p.bk)
        (token,) = await doors.open_low("offset token", 4, blank + prompt.token + entry.token["r"])
        (place,) = await doors.open_low("offset position", 5, blank + entry.position["r"])
        ctx = await p.context(demand, "step")
        ctx.doors = doors
        cache = Cache.empty(PASS.layers)
        cache.valid = blank + prompt.valid
        rows = await transformer.embed(ctx, "embed", PASS, entry, token, place)
        await transformer.forward(ctx, "pass", PASS, rows, [cache], s)

    parties.run_parties(party, weights=parties.share_weights(prompt.weights), seed=b"pass %d" % seed)
    return merge(logs)


def test_a_whole_pass_tells_nothing() -> None:
    """Two prompts, two models, valid and not: the same steps and sizes, every opening uniform and alike."""
    one = watch_pass(Prompt(0, 0, model(1, 0.3)), 1)
    other = watch_pass(Prompt(15, 1, model(2, 1.0)), 2)
    assert len(places(one)) >= 30
    assert findings(one, other) == []
