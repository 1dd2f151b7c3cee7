"""The benchmarks' own arithmetic, on models too small to measure anything."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from parties import Party, reconstruct, run_parties, share_weights
from reference import Fixed, FixedModel, FloatModel, nats_per_token
from session_fixture import GPT2, LLAMA, SETTINGS, tiny_plan

from mimir import calibration, cost, dryrun
from mimir.model import load_checkpoint, transformer
from mimir.mpc import plan
from mimir.mpc.domain import decode, encode
from mimir.net.memory import MemoryNet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench" / "peers"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import blocks
import compare
import mimir_blocks
import perplexity
import positions
import run
import scaling
import targets

WINDOW = 8
IDS = np.random.default_rng(5).integers(0, 16, 5 * WINDOW + 1).tolist()


@pytest.fixture(autouse=True)
def no_party_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks beside SPU have imported what a party needs."""
    monkeypatch.setattr(dryrun, "PARTY_MODULES", ())


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_perplexities_are_those_of_the_two_models(spec: object) -> None:
    plan = tiny_plan(spec)  # type: ignore[arg-type]
    got = perplexity.perplexity(plan, IDS, WINDOW, Fixed())
    want = nats_per_token(FloatModel(plan), IDS, WINDOW, 5 * WINDOW)
    assert got["tokens"] == 5 * WINDOW and got["windows_outside"] == 0
    assert got["float64"] == pytest.approx(np.exp(want))
    assert got["percent"] == pytest.approx(100 * (got["fixed"] / got["float64"] - 1))
    assert 0 < abs(got["percent"]) < perplexity.TARGET


def test_a_coarser_scale_shows() -> None:
    """Or the comparison would compare a model with itself."""
    plan = tiny_plan(LLAMA)
    fine, coarse = (
        perplexity.perplexity(plan, IDS, WINDOW, replace(Fixed(), scale_bits=bits)) for bits in (16, 9)
    )
    assert coarse["largest_window_percent"] > 1.5 * fine["largest_window_percent"]


def test_windows_that_leave_the_range_are_counted_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FixedModel.forward
    calls = 0

    def third_fails(self: FixedModel, ids: list[int]) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OverflowError("3.softmax: too far")
        return forward(self, ids)

    monkeypatch.setattr(FixedModel, "forward", third_fails)
    plan = tiny_plan(LLAMA)
    got = perplexity.perplexity(plan, IDS, WINDOW, Fixed())
    kept = [nats_per_token(FloatModel(plan), IDS[i * WINDOW :], WINDOW, WINDOW) for i in (0, 1, 3, 4)]
    assert got["tokens"] == 4 * WINDOW and got["windows_outside"] == 1
    assert got["outside"] == ["3.softmax: too far"]
    assert got["float64"] == pytest.approx(np.exp(np.mean(kept)))


# --- the engine beside its twin -----------------------------------------------------------------------------

POSITIONS = (8, 6)  # bucket and prompt: with padding
READ = 3  # tokens one by one
SPREAD = 1.4  # of the twins' distance from one another, by which the engine may lie from them (DESIGN)
SEEDS = range(1, 5)


@pytest.fixture(scope="module", params=[20, 1])
def read(request: pytest.FixtureRequest, shared_models: dict[str, Any]) -> Any:
    """A window of text through three parties, so many ms apart, and a checkpoint to give the twin."""
    settings = replace(SETTINGS, round_trip=request.param)
    plan = load_checkpoint(shared_models["TinyStories-656K"]["path"])
    told = shared_models["TinyStories-656K"]["expected"]["prompts"][0]
    ids = (told["input_ids"] + told["greedy_new_ids"])[: POSITIONS[1] + READ + 1]
    weights = share_weights({name: plan.encoded(name, SETTINGS.scale_bits) for name in plan.names()})
    return plan, ids, settings.few_rounds, positions.engine(plan, weights, ids, *POSITIONS, settings)


def from_twins(read: Any, fixed: Fixed) -> tuple[dict[str, Any], float]:
    """The figures against a twin, and the root mean square distance of honest twins from one another."""
    plan, ids, few_rounds, reading = read
    fixed = replace(fixed, few_rounds=few_rounds)
    twins = [positions.twin(plan, ids, *POSITIONS, Fixed(few_rounds=few_rounds, seed=s)) for s in SEEDS]
    spread = np.sqrt(np.mean([(a - b) ** 2 for a, b in pairwise(twins)]))
    want = positions.twin(plan, ids, *POSITIONS, fixed)
    return positions.beside([reading], [want], [[t] for t in twins], [ids]), float(spread) / positions.UNIT


@pytest.mark.slow
@pytest.mark.models
def test_three_parties_are_the_twin_to_its_own_rounding(read: Any) -> None:
    told, spread = from_twins(read, replace(Fixed(), seed=len(SEEDS) + 1))
    assert told["positions"] == POSITIONS[1] + READ and told["chosen"] == READ + 1
    assert told["agree"] == told["positions"]
    assert 0 < told["rms"] < SPREAD * spread
    assert told["nats_largest"] < 2.0**-5 and abs(told["percent"]) < perplexity.TARGET


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize(
    "wrong",
    [
        {"scale_bits": 10},
        {"half_input": 8},
        {"rotary_scale": 6},
        {"wave_unit": 6},
        {"exp_rest": 4},
        {"coarse_scale": 4},
        {"degree": 1},
    ],
    ids=lambda w: next(iter(w)),
)
def test_an_engine_of_other_scales_or_tables_would_show(read: Any, wrong: dict[str, int]) -> None:
    told, spread = from_twins(read, replace(Fixed(), **wrong))
    assert told["rms"] > SPREAD * spread


# --- beside others ------------------------------------------------------------------------------------------

SMALL = {
    "GELU 64x3072": (lambda g: 2 * g.standard_normal((2, 9)), blocks.gelu),
    "softmax 768 rows of 64": (lambda g: 2 * g.standard_normal((2, 3, 8)), None),
    "argmax of 50257": (lambda g: 4 * g.standard_normal(21), lambda x: np.array([x.argmax()])),
}


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).reshape(-1, x.shape[-1])


@pytest.mark.parametrize("name", SMALL)
def test_blocks_compute_what_they_are_called(name: str) -> None:
    """The blocks that are timed are the functions that stand in the table, here on a few values."""
    draw, want = SMALL[name]
    value = draw(np.random.default_rng(2))
    block = mimir_blocks.TABLE[name]

    async def work(p: Party) -> Any:
        ctx = await p.context(mimir_blocks.demand_of(block, value.shape, {}))
        y = await block.run(ctx, p.share(encode(value, block.scale)), None)
        assert not ctx.store.left()  # type: ignore[attr-defined]
        return y.v

    got = decode(reconstruct(run_parties(work)), block.out_scale)
    assert np.abs(got - (want or softmax)(value)).max() < 2e-3


def test_blocks_have_inputs_and_answers() -> None:
    assert set(mimir_blocks.TABLE) == set(blocks.NAMES)
    for name in blocks.NAMES:
        want = blocks.expected(name)
        assert (want is None) == (name == "block decode at 64")
        assert want is None or blocks.error(name, want + 0.25) == pytest.approx(0.25)


def test_ratios_are_ours_over_theirs() -> None:
    ours: dict[str, Any] = {
        lane: {"seconds": s, "processor": 2 * s, "sent": 1e6, "rounds": 3}
        for lane, s in (("online", 3.0), ("prep", 6.0))
    }
    theirs = {"seconds": 2.0, "processor": 8.0, "sent": 4e6, "error": None}
    rows = {name: {"spu": theirs, "mimir": ours | {"error": 0.01}} for name in blocks.NAMES}
    machine = {"cores": 2, "processor": "P", "kernels": "ref"}
    result = {
        "date": "2026-01-01",
        "commit": "c",
        "machine": machine,
        "spu": "1",
        "load": [0.0],
        "rows": rows,
    }
    line = compare.tables(result).splitlines()[-1]
    figures = "2.00 3.00 1.50 6.0 4.5 8.00 6.00 0.75 12.0 4.00 1.00 0.25 1.0 - 0.01".split()
    assert line == f"| {blocks.NAMES[-1]} | {' | '.join(figures)} |"


# --- targets ------------------------------------------------------------------------------------------------


def in_one_process(work: Any) -> list[Any]:
    """`work` at three parties over memory."""
    net, out = MemoryNet(3), [None] * 3

    async def main() -> None:
        async def one(i: int) -> None:
            out[i] = await work(net.party(i))

        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(one, i)

    trio.run(main)
    return out


@pytest.mark.slow
def test_late_sessions_are_what_the_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is there from the start, and two sessions at once: rounds and bytes of a token at the end
    of a context.
    """
    spec = LLAMA
    monkeypatch.setattr(targets, "AHEAD", spec.context)
    task = targets.Task("late", spec.context - 4, 1, 3, sessions=2)

    async def work(transport: Any) -> Any:
        weights = targets.Noise(spec, transport.party)
        return await targets.sessions(transport, spec, weights, task, spec.context, targets.Lanes(transport))

    parts = in_one_process(work)
    online, made = cost.last_token(
        dryrun.run_last(spec, SETTINGS, max_context=spec.context, ahead=spec.context)
    )
    for number in range(task.sessions):
        told = targets.decoded([[p[number]] for p in parts], task.positions)
        assert told["online"]["rounds"] == online.rounds
        # Two rows share what a frame costs; numbers differ in size.
        assert online.sent / 2 < told["online"]["sent"] < online.sent
        assert told["prep"]["sent"] == pytest.approx(cost.each(made, "sent"), rel=0.2)
        starts = [m["at"] for p in parts for m in p[number] if m["kind"] == "start"]
        assert min(starts) > max(m["at"] for p in parts for s in p for m in s if m["kind"] == "made")
    rate = targets.side_by_side(parts, 2)
    assert rate["sessions"] == 2 and rate["rate"] == 2 / rate["seconds"] == rate["first"]
    spans = [
        [s[-1]["at"] - s[-2]["at"] for s in ([m for m in s if m["kind"] == "token"] for s in p)]
        for p in parts
    ]
    assert rate["seconds"] == max(sum(each) / 2 for each in spans)
    twice = targets.side_by_side([[*p, *reversed(p)] for p in parts], 2)
    assert twice == rate


@pytest.mark.slow
def test_sessions_that_prepare_and_decode_at_once_are_timed_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing waits for anything to be prepared, and all material of a session is counted."""
    spec, count = GPT2, 3
    monkeypatch.setattr(targets, "TOKENS", count)
    monkeypatch.setattr(targets, "AT_ONCE", 2)
    task = targets.Task("together", spec.context - count - 1, 1, count, sessions=2, ready=False)

    async def work(transport: Any) -> Any:
        weights = targets.Noise(spec, transport.party)
        return await targets.sessions(transport, spec, weights, task, spec.context, targets.Lanes(transport))

    parts = in_one_process(work)
    marks = [m for p in parts for s in p for m in s]
    assert sum(m["kind"] == "token" for m in marks) == 3 * 2 * count
    assert all(max(m["positions"] for m in s if m["kind"] == "made") == count for p in parts for s in p)
    told = targets.at_once(parts)
    assert told["tokens"] == 2 * count and told["rate"] == told["first"] == 2 * count / told["seconds"]
    ends = [max(m["at"] for s in p for m in s if m["kind"] == "token") for p in parts]
    starts = [min(m["at"] for s in p for m in s if m["kind"] == "opened") for p in parts]
    assert told["seconds"] == max(end - start for end, start in zip(ends, starts, strict=True))


def test_the_whole_prefill_is_told() -> None:
    task = targets.Task("prefill", 0, 4, 1)

    async def work(transport: Any) -> Any:
        weights = targets.Noise(GPT2, transport.party)
        return await targets.sessions(transport, GPT2, weights, task, GPT2.context, targets.Lanes(transport))

    told = targets.prefilled(in_one_process(work))
    whole = dryrun.run(GPT2, SETTINGS, bucket=4, tokens=1, max_context=GPT2.context, ahead=targets.AHEAD)
    online, made = cost.first_token(whole)
    assert told["online"]["rounds"] == online.rounds and told["prep"]["rounds"] == made.rounds
    assert told["all"] == pytest.approx(3 * (online.sent + made.sent), rel=0.01)
    assert all(told[lane]["seconds"] > 0 and told[lane]["used"] > 0 for lane in ("online", "prep"))


def test_predictions_of_targets_are_the_cost_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_seconds_to_plan", lambda *_: 0.25)
    monkeypatch.setattr(targets, "PROMPT", 4)
    monkeypatch.setattr(targets, "BLOCK", GPT2.context)
    monkeypatch.setattr(cost, "SLICE", 0.0)
    rates = cost.Rates(dict.fromkeys(calibration.keys(), 1e-9), "ref", cores=2, near=0)
    got = targets.predicted(GPT2, GPT2.context, rates)
    lengths = {"bucket": 4, "context": GPT2.context, "ahead": targets.AHEAD, "memory": targets.MEMORY}
    lengths["keep"] = dryrun.KEPT_BYTES
    want = cost.predict(GPT2, SETTINGS, **lengths, rates=rates, link=cost.Link(parties_here=3))
    # The sessions of `decode` keep all that is made: each token's material is in fresh memory.
    end = dryrun.run_last(GPT2, SETTINGS, max_context=GPT2.context, ahead=targets.AHEAD)
    fresh = end.material * 1e-9 * 1.5
    want.token["prep"] = replace(want.token["prep"], processor=want.token["prep"].processor + fresh)
    for name, parts in (("token", want.token), ("prefill", want.prefill)):
        for lane, part in parts.items():
            floors = got[name][lane].pop("floors")
            assert got[name][lane] == pytest.approx(part.plain(), rel=1e-3)  # calls differ by a few
            assert floors["multiplying"] < part.processor
            assert floors["delay"] == pytest.approx(part.rounds * targets.LINK_RTT / 2000)
            assert 0 < floors["link"] <= part.sent * 8e-8
    assert got["block"] == want.block


def test_the_table_has_every_target_and_adds_both_lanes() -> None:
    lane = {"rounds": 30.0, "sent": 3e6, "seconds": 2.0, "processor": 1.0, "used": 0.5}
    floors = {"floors": {"multiplying": 0.25, "link": 0.5, "delay": 0.75}}
    both = dict.fromkeys(("online", "prep"), lane | floors)
    result = {
        "date": "2026-01-01",
        "commit": "c",
        "machine": {"cores": 2, "processor": "P", "kernels": "ref"},
        "load": [0.0, 1.0],
        "rounds": {"layer": 20},
        "choice": {"rounds": 25, "sent": 1e6},
        "measured": {
            "decode": both,
            "prefill": both | {"all": 36e9},
            "sessions": {"sessions": 8, "rate": 4.0},
            "together": {"seconds": 40.0, "tokens": 100, "rate": 2.5, "first": 2.0},
            "argmax": both,
        },
        "predicted": {"token": both | {"at once": 2.0}, "prefill": both, "block": 16},
    }
    lines = [line.split(" | ") for line in targets.tables(result).splitlines() if line.startswith("| ")]
    rows = {line[0].lstrip("| "): [cell.rstrip(" |") for cell in line[1:]] for line in lines}
    token = "decode at 128, one token: "
    assert rows[token + "rounds a layer"] == ["20", "20", "20", "-", "-", "-"]
    assert rows[token + "MB together"][:3] == ["40", "6", "6"]
    assert rows[token + "s together"] == ["2", "4", "4", "0.5", "1", "1.5"]
    assert rows[token + "processor s together, all three"][1:3] == ["1", "4"]
    prefill = "prefill of 32 and a token: "
    assert rows[prefill + "s together (PUMA 15.5)"][:2] == ["25", "4"]
    assert rows[prefill + "GB together, all three"][:3] == ["PUMA 3.77", "36", "0.018"]
    sessions = "8 sessions decoding at once: tokens/s "
    assert rows[sessions + "online, in all"][1:3] == ["4", "2"]
    assert rows[sessions + "together, in all"][:3] == ["2", "2.5", f"{1 / 2.5:.3g}"]
    assert rows[sessions + "together, in all, the first time"][1] == "2"
    assert rows[sessions + "together, in all, had nothing overlapped"][1] == f"{1 / 2.25:.3g}"
    assert rows["argmax of 50,257: s online"] == ["0.3", "2", "-", "-", "0.24", "0.3"]


def test_what_does_not_fit_the_memory_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["decode", "together", "argmax"]
    assert targets.fitting(names, False, 22.5) == names
    assert targets.fitting(names, True, 22.5) == ["decode", "argmax"]
    assert (
        "together is left out: it takes 28 GiB of memory, and 22.5 are available" in capsys.readouterr().out
    )
    assert targets.fitting(["decode"], True, 1.0) == ["decode"] and not capsys.readouterr().out
    assert targets.available() > 0


def test_an_argmax_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(transport: Any) -> Any:
        return await targets.argmaxes(transport, GPT2, 2)

    parts = in_one_process(work)
    counted = plan.run(transformer.cost_of_choice(GPT2, targets.chooser(GPT2)))
    told = targets.chosen(parts, GPT2)
    assert told["online"]["rounds"] == counted.rounds and told["prep"]["sent"] > 0
    parts[0][1]["components"][0] += 1
    with pytest.raises(SystemExit, match="argmax 1 gave"):
        targets.chosen(parts, GPT2)


# --- the cost model in the tables ---------------------------------------------------------------------------


def test_a_line_is_found_with_its_bend() -> None:
    xs = [64, 128, 256]
    told = scaling.fit(xs, [100 + 2 * x for x in xs])
    assert told["constant"] == pytest.approx(100) and told["slope"] == pytest.approx(2)
    assert told["bend"] == pytest.approx(50) and told["worst"] == pytest.approx(0, abs=1e-9)
    assert scaling.fit(xs, [7, 7, 7])["bend"] is None


def test_seconds_of_a_point_are_the_cost_models() -> None:
    """Processor, link and delay of exact counts, at both links."""
    rates = cost.Rates(dict.fromkeys(calibration.keys(), 0.0) | {"round": 0.5}, "ref", cores=1, near=0)
    got = scaling.point(GPT2, GPT2.context, rates)
    online, _ = cost.last_token(scaling.counted(GPT2, GPT2.context))
    assert got["rounds online"] == online.rounds
    alone = 3 * 0.5 * online.rounds  # three parties on one core
    assert got["s online, local"] == pytest.approx(alone)
    far = online.rounds * 0.01 + online.busiest * 8e-8
    assert got["s online, far"] == pytest.approx(alone + far)
    assert got["s preprocessing, local"] == pytest.approx(3 * 0.5 * got["rounds preprocessing"])


def test_sessions_at_once_share_processors_and_links_and_not_delays() -> None:
    part = cost.Part(rounds=10, sent=0, processor=2.0, turns=0.0, link=1.0, delay=5.0)
    assert [scaling.at_once(part, n) for n in (1, 2, 4, 8)] == [8.0, 8.0, 8.0, 16.0]
    slow = replace(part, link=3.0)
    assert [scaling.at_once(slow, n) for n in (1, 3, 4)] == [10.0, 10.0, 12.0]


def test_curves_of_sessions_and_round_trips_bend_where_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SMALL", GPT2)
    monkeypatch.setattr(scaling, "CONTEXT", GPT2.context)
    rates = cost.Rates(
        dict.fromkeys(calibration.keys(), 0.0) | {"round": 1e-3, "hash": 1e-12}, "ref", cores=3, near=0
    )
    run = scaling.counted(GPT2, GPT2.context)
    each = scaling.parts(run, rates, scaling.FAR)
    online, making = each["online"], each["preprocessing"]
    told = scaling.of_sessions(rates)
    bend = told["fits"]["s preprocessing, far"]["bend"]
    assert bend == pytest.approx(making.seconds / max(making.processor, making.link))
    last = told["points"][3]
    assert last["s preprocessing, far"] == max(making.seconds, 8 * making.link)
    # Rounds and calls of a pass are one token's, bytes are those of eight.
    assert last["s online, local"] == pytest.approx(online.processor, rel=1e-3)
    assert last["s online, far"] == pytest.approx(online.processor + online.delay + 8 * online.link, rel=1e-3)
    trips = scaling.of_round_trips(rates)["fits"]["s online, far"]
    assert trips["slope"] == pytest.approx(online.rounds / 2000)
    assert trips["bend"] == pytest.approx((online.processor + online.link) / (online.rounds / 2000))
    assert trips["worst"] == pytest.approx(0, abs=1e-9)


def test_predictions_are_those_of_the_session_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the figures that run.py takes from progress messages."""
    seconds = dict.fromkeys(calibration.keys(), 0.0) | {"round": 0.5}
    rates = cost.Rates(seconds, "ref", cores=3, near=0)
    row = {"ready": {"bucket": 2, "tokens": 3}, "wan": "20:8"}
    lengths = {"bucket": 2, "tokens": 3, "max_context": LLAMA.context, "ahead": run.POOL}
    lengths |= {"memory": run.POOL_MIB << 20}
    whole = dryrun.run(LLAMA, SETTINGS, **lengths)
    asked: list[Any] = []
    monkeypatch.setattr(dryrun, "run", lambda *args, **kw: asked.append((args, kw)) or whole)
    got = run.predicted(LLAMA, SETTINGS, row, LLAMA.context, rates)
    assert asked == [((LLAMA, SETTINGS), lengths)]
    last, before = (m.lanes[dryrun.ONLINE] for m in (whole.of("token")[-1], whole.of("token")[-2]))
    rounds = last.rounds - before.rounds
    assert got["token"]["rounds"] == rounds
    link = (last.busiest - before.busiest) * 1e-6
    assert got["token"]["seconds"] == pytest.approx(rounds * (0.5 + 0.01) + link, rel=0.02)
    made = whole.of("made")
    entry, weights, prompt, answers = (m.lanes[dryrun.PREP].rounds for m in made)
    assert [m.positions for m in made] == [0, 0, 2, 4]
    # a position's part of a batch of answers, and of the products with weights of all
    assert got["preprocessing"]["rounds"] == (answers - prompt) / 2 + (weights - entry) / 4


def test_charts_are_drawn_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    import charts

    (tmp_path / "scaling").mkdir()
    points = [dict.fromkeys(scaling.FIGURES, float(x)) for x in (1, 2)]
    fits = {f: scaling.fit([1, 2], [1, 2]) for f in scaling.FIGURES}
    sizes = {size: {"x": [1, 2], "points": points, "fits": fits} for size in scaling.SIZES}
    rates = cost.Rates(dict.fromkeys(calibration.keys(), 1e-9), "ref", cores=3)
    monkeypatch.setattr(scaling, "SMALL", GPT2)
    monkeypatch.setattr(scaling, "CONTEXT", GPT2.context)
    sizes |= {"sessions": scaling.of_sessions(rates), "round trip, ms": scaling.of_round_trips(rates)}
    (tmp_path / "scaling" / "1.json").write_text(json.dumps({"sizes": sizes}))
    assert charts.main(["--results", str(tmp_path)]) == 0
    drawn = sorted(tmp_path.glob("*.png"))
    assert [f.name for f in drawn] == ["scaling.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG") and drawn[0].stat().st_size < charts.LARGEST
