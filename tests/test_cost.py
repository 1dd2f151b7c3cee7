"""The cost model: its rounds and bytes are what three parties exchange, and it follows the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_fixture import (
    GPT2,
    LLAMA,
    SETTINGS,
    Sampler,
    Story,
    hold,
    limits_of,
    run,
    run_session,
    together,
)

import mimir.actors.session as session_module
from mimir import calibration, cost, dryrun, kernels, loopback
from mimir.__main__ import main
from mimir.actors import triples
from mimir.actors.lane import open_lane
from mimir.actors.session import SessionActor
from mimir.dryrun import ONLINE, PREP
from mimir.errors import BadInput, LocalError, ModelError
from mimir.manifest import explicit_components
from mimir.model import load_checkpoint, read_spec
from mimir.mpc import check, domain, doors, nonlinear, ops, prep
from mimir.mpc.doors import Doors
from mimir.net.memory import MemoryNet

WIDE = replace(LLAMA, width=48, heads=4, kv_heads=2, head_dim=12, hidden=96, vocab=100)
PLAIN = Story(LLAMA)
STORIES = {
    "gpt2": Story(GPT2),
    "sampled": Story(LLAMA, sampler=Sampler("sample", 0.8, 3)),
    "sampled, on one site": Story(
        LLAMA, sampler=Sampler("sample", 0.8, 3), settings=replace(SETTINGS, round_trip=1)
    ),
}


@pytest.fixture(autouse=True, scope="module")
def no_party_here() -> Iterator[None]:
    """Other tests of this process import what only a party needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dryrun, "PARTY_MODULES", ())
        yield


def exchanged(story: Story) -> list[dict[str, tuple[int, int]]]:
    """(rounds, bytes) by lane that each of three parties counted in a real session."""
    actors: list[SessionActor] = []
    # Shared lanes, of which opening is not counted.
    opened: list[dict[str, tuple[Doors, int, int]]] = [{} for _ in range(3)]
    told: list[dict[str, tuple[int, int]]] = []

    async def noted(transport: Any, name: bytes, lane: str, **times: Any) -> Doors:
        doors = await open_lane(transport, name, lane, **times)
        opened[transport.party][lane] = (doors, doors.channel.rounds, doors.channel.sent)
        return doors

    def of(own: Doors, shared: tuple[Doors, int, int]) -> tuple[int, int]:
        each = [(own, 0, 0), shared]
        return sum(d.channel.rounds - r for d, r, _ in each), sum(d.channel.sent - s for d, _, s in each)

    async def main() -> None:
        net = MemoryNet()
        async with together(net, story.spec, settings=story.settings) as running:
            outcome = await hold(
                story, net, actors=actors, decoders=running.actors, producers=running.producers
            )
            assert outcome.client is None and outcome.parties == [None] * 3
            for actor, lanes in zip(actors, opened, strict=True):
                own = {ONLINE: actor._online, PREP: actor._making}
                told.append({lane: of(own[lane], lanes[lane]) for lane in own})

    with mock.patch("mimir.actors.shared.open_lane", noted):
        run(main)
    return told


def counted(story: Story) -> dict[str, tuple[int, int]]:
    limits = limits_of(story)
    dry = dryrun.run(
        story.spec,
        story.settings,
        bucket=story.bucket,
        tokens=story.max_new,
        max_context=limits.max_context,
        ahead=limits.ahead,
        memory=limits.memory,
        sampler=story.sampler,
    )
    assert dry.tokens == story.max_new
    return {lane: (c.rounds, c.sent) for lane, c in dry.lanes.items()}


def test_parties_on_one_site_take_more_rounds_for_less() -> None:
    """The same tokens, and figures as predicted; of two tokens each takes two rounds more a layer."""
    apart = Story(LLAMA, prompts=((2, 4, 6, 8),), bucket=4, max_new=3)
    near = replace(apart, settings=replace(SETTINGS, round_trip=1))
    few, more = counted(apart), counted(near)
    assert more[ONLINE][0] >= few[ONLINE][0] + 4 * LLAMA.layers and more[PREP][1] < few[PREP][1]
    assert exchanged(near) == [more] * 3
    assert run_session(near).tokens == apart.expected


@pytest.mark.parametrize("name", STORIES)
def test_rounds_and_bytes_are_what_three_parties_exchange(name: str) -> None:
    assert exchanged(STORIES[name]) == [counted(STORIES[name])] * 3


def test_material_made_in_parts_and_a_prompt_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory: the same tokens, predicted as exactly; with more of it a prompt takes fewer rounds."""
    story = Story(LLAMA, prompts=((2, 4, 6, 8),), bucket=8)
    at_once, whole = counted(story), run_session(story)
    monkeypatch.setattr(session_module, "batch_bytes", lambda memory: 1 << 17)
    parts = counted(story)
    assert parts[ONLINE] == at_once[ONLINE] and parts[PREP][0] > at_once[PREP][0]
    assert exchanged(story) == [parts] * 3
    monkeypatch.setattr("session_fixture.MEMORY", 1 << 20)
    steps = counted(story)
    assert steps[ONLINE][0] > parts[ONLINE][0]
    assert exchanged(story) == [steps] * 3
    assert run_session(story).tokens == whole.tokens == story.expected


def test_with_more_memory_more_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rounds and bytes of preprocessing for the same tokens, as predicted; never less than a batch."""
    assert triples.batch_bytes(1) == triples.batch_bytes(512 << 20) == triples.BATCH_BYTES
    monkeypatch.setattr(triples, "BATCH_BYTES", 1)
    story = Story(LLAMA, prompts=((2, 4, 6, 8),), bucket=4, max_new=8)
    made = []
    for memory in (8 << 20, 64 << 20):
        monkeypatch.setattr("session_fixture.MEMORY", memory)
        made.append(counted(story))
        assert exchanged(story) == [made[-1]] * 3
    (little, much) = made
    assert much[ONLINE] == little[ONLINE]
    assert much[PREP][0] < little[PREP][0] / 2 and much[PREP][1] < little[PREP][1]


def test_the_model_follows_a_change_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another end of the check's recursion, and one more round online: both are predicted without a word."""
    story = Story(WIDE)
    before = counted(story)
    monkeypatch.setattr(check, "OPEN_BELOW", 4 * check.OPEN_BELOW)
    truncate = ops.truncate

    async def twice(ctx: Any, step: str, *items: Any) -> Any:
        await ctx.doors.open(f"{step}/again", ctx.share(ctx.bk.add_public(items[0][0].v, 0)) * 0)
        return await truncate(ctx, step, *items)

    monkeypatch.setattr(ops, "truncate", twice)
    after = counted(story)
    assert after[PREP][0] < before[PREP][0] and after[ONLINE][0] > before[ONLINE][0]
    assert exchanged(story) == [after] * 3


def test_the_end_of_a_context_costs_the_same_however_it_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is there from the start, and one that was filled: the same last token, last batch, and
    last block of products with weights. Framing apart: frames carry their number.
    """
    spec, ahead = replace(LLAMA, context=12), 64
    sizes = SessionActor._sizes

    async def small(self: SessionActor) -> None:
        await sizes(self)
        self._group, self._block = 2, 4

    monkeypatch.setattr(SessionActor, "_sizes", small)

    def figures(run: dryrun.Run) -> list[tuple[int, ...]]:
        online, made = cost.last_token(run)
        return [(c.rounds, c.payload, n) for c, n in (cost.Shared(online, 1), *made)]

    end = dryrun.run_last(spec, SETTINGS, max_context=spec.context, ahead=ahead)
    whole = dryrun.run(spec, SETTINGS, bucket=1, tokens=11, max_context=spec.context, ahead=ahead)
    assert (end.tokens, end.block, whole.tokens) == (3, 4, 11)
    assert figures(end) == figures(replace(whole, block=4))


@pytest.mark.parametrize(
    ("steps", "most", "sizes"),
    [(0, 4, []), (3, 4, [3]), (4, 4, [4]), (5, 4, [2, 3]), (31, 6, [5] * 5 + [6]), (13, 4, [3, 3, 3, 4])],
)
def test_no_step_is_left_to_a_group_of_its_own(steps: int, most: int, sizes: list[int]) -> None:
    """As few groups as there can be, in order, of sizes that differ by one."""
    turn = session_module.plan_turn(0, (1,), steps + 1, 0, 1)
    groups = session_module._evenly(turn.decode, most)
    assert [len(group) for group in groups] == sizes
    assert [step for group in groups for step in group] == list(turn.decode)


def test_no_dry_run_where_a_party_could_be() -> None:
    """In a process of its own: once it holds what a party needs, a dry run is refused, with all in place."""
    program = """
import sys
from importlib import import_module
from session_fixture import LLAMA, SETTINGS
from mimir import dryrun, kernels
from mimir.errors import LocalError
from mimir.mpc import check, doors

before = {name: getattr(doors, name) for name in ("np", "_digest", "_pack", "_split", "_commitment")}
needed = {"mimir.net.mesh", "mimir.actors.peer", "mimir.party"}
assert not needed & set(sys.modules), "the cost model imports a party"
calls = [
    lambda: dryrun.run(LLAMA, SETTINGS, bucket=1, tokens=1, max_context=LLAMA.context, ahead=4),
    lambda: dryrun.run_last(LLAMA, SETTINGS, max_context=LLAMA.context, ahead=4),
]
assert calls[0]().tokens == 1
for name in needed:
    import_module(name)
held = {name: sys.modules.pop(name) for name in needed}
for name in needed:  # each is enough
    sys.modules[name] = held[name]
    for call in calls:
        try:
            call()
        except LocalError as error:
            assert name in str(error) and "may be a party" in str(error)
        else:
            sys.exit(f"a dry run beside {name}")
    del sys.modules[name]
assert check.kernels is kernels
assert before == {name: getattr(doors, name) for name in before}
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert told.returncode == 0, told.stderr


def test_what_was_replaced_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (prep, check, ops, nonlinear, doors, session_module)
    names = ("kernels", "np", "offload", "log", "_pack", "_digest", "_split", "_commitment", "plan_turn")
    before = {(m, n): getattr(m, n) for m in modules for n in names if hasattr(m, n)}
    counted(PLAIN)
    with pytest.raises(BadInput, match="too short"):
        dryrun.run_last(LLAMA, SETTINGS, max_context=2, ahead=64)

    def broken(*_: Any) -> Any:
        raise LocalError("broken")

    with monkeypatch.context() as patch, pytest.raises(LocalError, match="broken"):
        patch.setattr(prep, "produce", broken)
        counted(PLAIN)
    assert {at: getattr(*at) for at in before} == before
    ladder = nonlinear._ladder("reciprocal", nonlinear._inverse(1.0), 7, 17, 1 << 43, SETTINGS, 1.0)
    assert not isinstance(ladder[0].tables, dryrun.Stretched)


@pytest.mark.parametrize("small", [False, True])
def test_kernel_rules_agree_with_the_kernels(small: bool) -> None:
    examples = calibration.examples(small)
    assert set(examples) == {*dryrun.RULES, *(name + dryrun.ONE_ROW for name in dryrun.STREAMED)}
    for kind in (np.uint16, np.uint8):
        narrow = (np.ones((8, 16), kind), np.zeros(8, np.uint64))
        assert dryrun._Kernels().rotate(*narrow).dtype == kernels.rotate(*narrow).dtype == kind
    factors = examples["matmul32"]
    assert dryrun._Kernels().matmul32(*factors).dtype == kernels.matmul32(*factors).dtype == np.uint32
    for name, arguments in examples.items():
        name = name.removesuffix(dryrun.ONE_ROW)
        shape, units = dryrun.RULES[name](*arguments)
        out = getattr(kernels, name)(*arguments)
        if isinstance(out, tuple):
            assert tuple(each.shape for each in out) == shape, name
            continue
        assert (out.shape if isinstance(out, np.ndarray) else None) == shape, name
        assert units > 0, name


def test_a_kernel_without_a_rule_is_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(dryrun.RULES, "gr_mul01")
    tally = dryrun.Tally()
    with dryrun._nothing_real(tally):
        x, r = dryrun.stretched((64, kernels.GR_DEGREE)), dryrun.stretched((64,))
        token = dryrun._lane.set(PREP)
        out = dryrun._Kernels().gr_mul01(x, r)
        dryrun._lane.reset(token)
        assert out.shape == x.shape and isinstance(out, dryrun.Stretched)
    assert tally.lanes[PREP].work["nanoseconds"] > 0


def stretch(x: np.ndarray) -> dryrun.Stretched:
    return dryrun.stretched(x.shape, x.dtype)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: x + y,
        lambda x, y: x < y,
        lambda x, y: (x >> np.uint64(3)).astype(np.int64),
        lambda x, y: x[:, None] * y[None],
        lambda x, y: x.sum(axis=1, dtype=np.uint64),
        lambda x, y: x.sum(-1),
        lambda x, y: np.concatenate([x, y], axis=-1),
        lambda x, y: np.stack([x, y], axis=1),
        lambda x, y: np.pad(x, [(0, 0), (3, 1)]),
        lambda x, y: np.repeat(x, 2, axis=0),
        lambda x, y: np.cumsum(x[..., ::-1], axis=-1, dtype=np.uint64),
        lambda x, y: np.bitwise_xor.accumulate(x, axis=1),
        lambda x, y: np.swapaxes(x, 0, 1).reshape(-1),
        lambda x, y: x[np.array([1, 0, 1])],
        lambda x, y: x[:, np.array([True, False] * (x.shape[1] // 2))],
        lambda x, y: x.astype(np.uint32).view(np.uint64),
        lambda x, y: x.view(np.uint16)[:, :200] * y.astype(np.uint16)[:, :1],
        lambda x, y: x.astype(np.uint64, copy=False),
        lambda x, y: np.ones_like(x),
        lambda x, y: np.broadcast_to(x, (5, *x.shape)),
        lambda x, y: np.tile(x, (2, 1)),
        lambda x, y: np.where(x > y, x, y),
    ],
)
def test_arrays_of_nothing_have_the_shapes_of_arrays(call: Any) -> None:
    x, y = (np.zeros((30, 100), np.uint64) for _ in range(2))
    want, got = call(x, y), call(stretch(x), stretch(y))
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert isinstance(got, dryrun.Stretched) or want.size <= dryrun.SMALL


_part = st.one_of(
    st.integers(-2, 1), st.builds(slice, st.integers(0, 1), st.integers(1, 3), st.sampled_from([None, 1, 2]))
)


@given(st.tuples(*[st.integers(2, 3)] * 3), st.lists(_part, max_size=3).map(tuple))
def test_copies_are_counted_where_an_array_is_not_contiguous(shape: Any, key: Any) -> None:
    part = np.zeros(shape)[key]
    assert not isinstance(part, np.ndarray) or not part.size or (
        dryrun._stays_solid(key, shape) == part.flags.c_contiguous
    )  # fmt: skip


def test_memory_is_given_back() -> None:
    tally = dryrun.Tally()
    with dryrun._nothing_real(tally):
        x = dryrun.stretched((1000, 1000))
        view = x[:10]
        del x
        assert tally.live == tally.peak == 8_000_000
        del view
        assert tally.live == 0 and tally.peak == 8_000_000


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this machine, measured once by the command's own calibration."""
    file = tmp_path_factory.mktemp("rates") / "rates.json"
    measured = cost.calibrate(best_of=1, least=0.0, memory=4 * calibration.PIECE)
    assert set(measured.seconds) == calibration.keys()
    # What a call takes is a difference of two times, and none on a machine that is busy enough.
    assert all(each > 0 or (key == dryrun.KERNEL and each == 0) for key, each in measured.seconds.items())
    assert measured.cores == os.cpu_count() and 0 <= measured.near <= 4 * calibration.PIECE
    measured.write(file)
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a config.json and nothing else."""
    config = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": 96,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["cost", "--json", *words]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_the_command_needs_no_weights(
    model: Path, rates: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(model), "--context", "5", "--prompt-bucket", "2", "--rates", str(rates)]
    predict = cost.predict
    prediction: cost.Prediction | None = None

    def kept(*args: Any, **kw: Any) -> cost.Prediction:
        nonlocal prediction
        prediction = predict(*args, **kw)
        return prediction

    monkeypatch.setattr(cost, "predict", kept)
    monkeypatch.setattr(cost, "_seconds_to_plan", lambda *_: 0.01)  # which is measured anew each time
    told = ask(capsys, *words, "--rtt", "20", "--rate", "100")
    for part in ("prefill", "token"):
        for lane in (ONLINE, PREP, "together"):
            p = told[part][lane]
            assert p["delay"] == pytest.approx(p["rounds"] * 0.01)
            assert 0 < p["link"] <= p["sent"] * 8e-8
            assert p["turns"] == 0  # a machine for each party
            assert p["seconds"] == pytest.approx(p["processor"] + p["link"] + p["delay"])
            assert p["floor"] == max(p["processor"], p["link"], p["delay"])
    spec = read_spec(model)
    assert told["shape"]["parameters"] == spec.parameters()
    assert told["memory"]["weights"] == 2 * sum(spec.sizes().values())
    lean = ask(capsys, *words, "--keep-mib", "0")
    assert lean["memory"]["weights"] == 0
    # Everything is then made anew in each lane, and nothing else changes.
    for lane in (ONLINE, PREP):
        assert lean["token"][lane]["processor"] > told["token"][lane]["processor"]
        assert lean["token"][lane]["rounds"] == told["token"][lane]["rounds"]
        assert lean["token"][lane]["sent"] == told["token"][lane]["sent"]
    monkeypatch.setattr(cost, "predict", lambda *_, **__: prediction)
    assert main(["cost", *words]) == 0
    text = capsys.readouterr().out
    assert f"{told['token'][ONLINE]['rounds']:.0f}" in text and "Rounds and bytes are exact" in text


def test_what_is_not_kept_is_counted_each_time_it_is_made() -> None:
    """Two components of every tensor a token: of each byte once what it takes to decrypt or to expand it."""
    spec = LLAMA
    counts = {}
    for keep in (0, 1 << 30):
        run = dryrun.run(spec, SETTINGS, bucket=1, tokens=2, max_context=spec.context, ahead=4, keep=keep)
        (first, second) = (mark.lanes[ONLINE] for mark in run.of("token"))
        counts[keep] = second.minus(first).work
    made = {kind: counts[0][kind] - counts[1 << 30][kind] for kind in ("prg", dryrun.DECRYPT)}
    sizes = list(spec.sizes().values())
    assert sum(made.values()) == 2 * sum(sizes)
    explicit = explicit_components(sizes)
    assert made[dryrun.DECRYPT] == sum(n for n, c in zip(sizes, explicit, strict=True) if c in (0, 1))


def test_seconds_are_what_the_model_says() -> None:
    counts = dryrun.Counts(rounds=10, sent=3_000_000, busiest=2_000_000, hashed=7)
    counts.work["matmul"] = 5
    seconds = {"matmul": 0.1, "hash": 0.01, "round": 0.2, "sent": 1e-7}
    seconds |= {dryrun.GROWN: 0.05, dryrun.MAPPED: 0.01}
    rates = cost.Rates(seconds, "ref", cores=2, near=30)
    near = cost.part(counts, rates, cost.Link())
    assert near == cost.Part(10, 3e6, pytest.approx(0.5 + 0.07 + 2.0 + 0.3), 0, 0, 0)
    away = cost.part(counts, rates, cost.Link(20, 8, parties_here=3), per=2, extra=1.0)
    turns = 0.5 * 10 * cost.SLICE / 2  # of two whole ones, beyond three halves
    assert away == cost.Part(
        5, 1.5e6, pytest.approx(1.5 * 3.87 / 2), pytest.approx(turns), pytest.approx(1.0), pytest.approx(0.05)
    )
    assert away.seconds == pytest.approx(away.processor + away.turns + 1.05)
    # Fresh memory: of the 30 bytes that come fast, 4 are left to this party, or all, or none.
    counts.work[dryrun.GROWN] = 20
    for parties, before, grown in ((3, 6, 16 * 0.05 + 4 * 0.01), (1, 0, 20 * 0.01), (3, 11, 20 * 0.05)):
        part = cost.part(counts, rates, cost.Link(parties_here=parties), before=before)
        assert part.processor == pytest.approx(parties / min(parties, 2) * (2.87 + grown))


def test_short_rounds_wait_for_whole_turns() -> None:
    """Three parties on two cores take twice their time if they compute little in a round; four do anyway."""
    rates = cost.Rates({"round": 1e-3, "hash": 0, "sent": 0, dryrun.GROWN: 0, dryrun.MAPPED: 0}, "ref", 2, 0)
    counts = dryrun.Counts(rounds=100)
    for parties, factor in ((1, 1), (2, 1), (3, 2), (4, 2)):
        assert cost.part(counts, rates, cost.Link(parties_here=parties)).seconds == pytest.approx(
            factor * 0.1
        )


def test_calls_and_threads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By lane: of the engine's functions and what they call, of kernels, of what goes to threads."""

    def work() -> dict[str, Any]:
        run = dryrun.run(LLAMA, SETTINGS, bucket=1, tokens=2, max_context=LLAMA.context, ahead=4)
        return {lane: c.work for lane, c in run.lanes.items()}

    profiler = sys.getprofile()
    before, again = work(), work()
    assert sys.getprofile() is profiler
    for lane, other in ((ONLINE, PREP), (PREP, ONLINE)):
        counts, calls = before[lane], dryrun.CALLS[lane]
        assert counts[calls] > counts[dryrun.KERNEL] > 0 and dryrun.CALLS[other] not in counts
        # What tasks do in another order, and tables made once, are a few calls.
        assert again[lane][calls] == pytest.approx(counts[calls], rel=0.01)
        assert again[lane][dryrun.KERNEL] == counts[dryrun.KERNEL]
    truncate, more = ops.truncate, 0

    async def longer(*args: Any) -> Any:
        nonlocal more
        for _ in range(1000):
            domain.words(1)  # of the engine, where this one is not
        more += 1000 * (dryrun._lane.get() == ONLINE)  # and not where it is planned
        return await truncate(*args)

    monkeypatch.setattr(ops, "truncate", longer)
    monkeypatch.setattr(dryrun, "THREAD_WORK", 0)
    after = work()
    grown = {lane: after[lane][calls] - before[lane][calls] for lane, calls in dryrun.CALLS.items()}
    assert grown[ONLINE] == pytest.approx(more, rel=0.05) and abs(grown[PREP]) < 0.05 * more
    assert all(after[lane][dryrun.THREAD] > before[lane][dryrun.THREAD] for lane in (ONLINE, PREP))


def test_memory_is_fresh_once_but_for_what_is_mapped() -> None:
    tally, large = dryrun.Tally(), 1 + dryrun.IN_HEAP // 8
    with dryrun._nothing_real(tally):
        token = dryrun._lane.set(PREP)
        for _ in range(2):
            x = dryrun.stretched((1000, 1000))
            del x
        assert tally.lanes[PREP].work[dryrun.GROWN] == 8_000_000
        for _ in range(2):
            x = dryrun.stretched((large,))
            y = dryrun.stretched((1000, 1001))
            del x, y
        dryrun._lane.reset(token)
    work = tally.lanes[PREP].work
    assert work[dryrun.GROWN] == 8_008_000 and work[dryrun.MAPPED] == 16 * large
    assert tally.live == tally.mapped == 0 and tally.peak == 8 * large + 8_008_000


def test_a_token_of_a_long_session_takes_no_fresh_memory() -> None:
    run = dryrun.run_last(LLAMA, SETTINGS, max_context=LLAMA.context, ahead=4)
    _, made = cost.last_token(run)
    assert all(dryrun.GROWN not in share.counts.work for share in made)
    assert cost.first_token(run)[1].work[dryrun.GROWN] > 0 and run.material > 0


def test_rows_that_share_products_can_be_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SessionActor._sizes

    async def small(self: SessionActor) -> None:
        await sizes(self)
        self._group, self._block = 2, 8

    monkeypatch.setattr(SessionActor, "_sizes", small)
    runs = {
        most: dryrun.run_last(LLAMA, SETTINGS, max_context=LLAMA.context, ahead=64, most=most)
        for most in (None, 8, 4)
    }
    assert [run.block for run in runs.values()] == [8, 8, 4]
    whole, same, part = (run.lanes[PREP].payload for run in runs.values())
    assert whole == same > part


def test_parties_on_loopback_that_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LocalError, match="on loopback failed"):
        loopback.measure(1)
    with pytest.raises(LocalError, match="measuring this machine failed"):
        cost.calibrate()


def test_the_shape_alone_is_the_shape_of_the_whole(shared_models: dict[str, Any]) -> None:
    for entry in shared_models.values():
        assert read_spec(entry["path"]) == load_checkpoint(entry["path"]).spec


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "not supported"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3, "n_layer": 1}, "do not divide"),
        ({"model_type": "llama", "hidden_size": 8}, "num_hidden_layers"),
        (None, "missing"),
    ],
)
def test_a_bad_description_names_the_file(config: Any, words: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words) as caught:
        read_spec(tmp_path)
    assert "config.json" in str(caught.value)


def test_bad_arguments_end_with_a_reason(
    model: Path, rates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"format": 1, "seconds": {}}')
    words = ["cost", "--model", str(model), "--rates", str(rates)]
    for more, code, reason in (
        (["--context", "16", "--prompt-bucket", "16"], 2, "do not fit a context of 16"),
        (["--rtt", "-1"], 2, "--rtt"),
        (["--rate", "0"], 2, "--rate"),
        (["--rates", str(other)], 2, "other.json"),
        (["--model", str(tmp_path / "nothing")], 4, "no such model directory"),
    ):
        assert main([*words, *more]) == code
        assert reason in capsys.readouterr().err


def test_rates_survive_their_file(rates: Path) -> None:
    read = cost.Rates.read(rates)
    assert read.kernels == kernels.level()
    again = rates.parent / "again.json"
    read.write(again)
    assert again.read_bytes() == rates.read_bytes() and cost.Rates.read(again) == read
    counts = dryrun.Counts(rounds=2, hashed=10, sent=7)
    counts.work["matmul"] = 5
    known = read.seconds
    want = 2 * known["round"] + 10 * known["hash"] + 7 * known["sent"] + 5 * known["matmul"]
    assert read.processor(counts) == pytest.approx(want)


@pytest.mark.parametrize("change", ["format", "missing", "more", "near", "nan", "negative"])
def test_rates_of_another_version_are_refused(rates: Path, tmp_path: Path, change: str) -> None:
    raw = json.loads(rates.read_text())
    match change:
        case "format":
            raw["format"] -= 1
        case "missing":
            del raw["seconds"]["round"]
        case "more":
            raw["seconds"]["round online"] = 1e-4
        case "near":
            del raw["near"]
        case "nan":
            raw["seconds"]["round"] = float("nan")
        case "negative":
            raw["seconds"]["round"] = -1e-4
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="not rates of this version"):
        cost.Rates.read(file)
