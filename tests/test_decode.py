"""Sessions whose tokens are decoded by one pass: they answer as alone, and end without harm to others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import parties
import pytest
import trio
import trio.testing
from parties import Party
from session_fixture import GPT2, LLAMA, PARTIES, SETTINGS, Outcome, Story, hold, run, together

from mimir.actors.decode import DecodeActor
from mimir.actors.peer import PartyService
from mimir.actors.session import SessionActor
from mimir.actors.shared import LEAVING, TAG
from mimir.actors.triples import SharedProducer
from mimir.errors import AbortError, BadInput, LocalError, PeerError
from mimir.model import sampling, transformer
from mimir.model.checkpoint import PlanSpec
from mimir.mpc import nonlinear, plan, prep
from mimir.mpc.domain import decode, encode
from mimir.mpc.nonlinear import Scores, Settings
from mimir.mpc.prep import Joint, Store
from mimir.net.memory import MemoryNet, Tap, Tapped
from mimir.net.messages import Sampler


@dataclass
class Passes:
    """Notes how many rows each pass of a party's decode actor has; `before` is called with its number."""

    actor: DecodeActor
    before: Callable[[int], Any] = lambda number: None

    def __post_init__(self) -> None:
        self.rows: list[int] = []
        self._pass = self.actor._pass
        self.actor._pass = self  # type: ignore[method-assign, assignment]

    async def __call__(self, lane: Any) -> None:
        self.rows.append(len(self.actor._members))
        self.before(len(self.rows) - 1)
        await self._pass(lane)


def stories(spec: PlanSpec, count: int = 3, length: int = 2, **more: Any) -> list[Story]:
    """With answers that differ and are no near ties."""
    out: list[Story] = []
    for prompt in product(range(3, spec.vocab), repeat=length):
        story = Story(spec, (prompt,), **more)
        try:
            new = story.expected not in [s.expected for s in out]
        except AssertionError:
            continue
        if new:
            out.append(story)
        if len(out) == count:
            return out
    raise AssertionError("not so many")


def held_together(
    told: Sequence[Story],
    tap: Tap | None = None,
    most: int = 8,
    before: Callable[[int, int], Any] = lambda party, number: None,
    tweak: Callable[[int, Sequence[SessionActor]], None] = lambda number, sessions: None,
    bend: Callable[[Sequence[DecodeActor]], None] = lambda actors: None,
    watch: Callable[[Sequence[SharedProducer]], None] = lambda producers: None,
) -> tuple[list[Outcome], list[Passes]]:
    """Run all stories at once; how each ended, and each party's passes."""
    outcomes: list[Outcome] = [Outcome() for _ in told]
    passes: list[Passes] = []

    async def main() -> None:
        net = MemoryNet(PARTIES, tap=tap)
        async with together(net, told[0].spec, most, told[0].settings) as running:
            actors = running.actors
            bend(actors)
            watch(running.producers)
            passes.extend(Passes(a, partial(before, i)) for i, a in enumerate(actors))

            async def one(number: int) -> None:
                outcomes[number] = await hold(
                    told[number],
                    net,
                    decoders=actors,
                    producers=running.producers,
                    tweak=lambda sessions: tweak(number, sessions),
                )

            async with trio.open_nursery() as nursery:
                for number in range(len(told)):
                    nursery.start_soon(one, number)

    run(main)
    return outcomes, passes


@pytest.mark.parametrize("round_trip", [1, 20])
@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_sessions_that_are_decoded_together_answer_as_alone(spec: PlanSpec, round_trip: int) -> None:
    told = stories(spec, max_new=4, settings=Settings(round_trip=round_trip))
    outcomes, passes = held_together(told)
    assert [o.tokens for o in outcomes] == [s.expected for s in told]
    assert passes[0].rows == passes[1].rows == passes[2].rows
    assert sum(passes[0].rows) == 3 * len(told)
    assert max(passes[0].rows) == len(told)


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_sessions_of_different_lengths_and_turns_are_decoded_together(spec: PlanSpec) -> None:
    """Caches of 4 to 14 slots, on both sides of a power of two, some with padding, one in its second turn."""
    first, second = stories(spec, 2, max_new=5)
    (long,) = stories(spec, 1, 3, bucket=6, max_new=7)
    turns = next(
        s
        for prompt in product(range(3, spec.vocab), repeat=2)
        if _clear(s := replace(first, prompts=(first.prompts[0], prompt)))
    )
    told = [turns, second, long]
    outcomes, passes = held_together(told)
    assert [o.tokens for o in outcomes] == [s.expected for s in told]
    assert max(passes[0].rows) == 3


def _clear(story: Story) -> bool:
    try:
        return bool(story.expected)
    except AssertionError:
        return False


def test_no_more_go_together_than_are_allowed() -> None:
    told = stories(GPT2, 5, max_new=3)
    outcomes, passes = held_together(told, most=2)
    assert [o.tokens for o in outcomes] == [s.expected for s in told]
    assert max(passes[0].rows) == 2


def test_each_session_is_sampled_by_its_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, two by noise of the lane's coins, one by its own seed: no two tokens have the same noise, and
    all parties have it.
    """
    seeds: list[bytes] = []
    gumbel = sampling.gumbel

    def noted(seed: bytes, count: int) -> Any:
        seeds.append(seed)
        return gumbel(seed, count)

    monkeypatch.setattr(sampling, "gumbel", noted)
    greedy, a, b = stories(GPT2, max_new=4)
    drawn = Sampler("sample", 2.0, 4)
    told = [greedy, replace(a, sampler=drawn), replace(b, sampler=drawn)]
    told.append(replace(a, sampler=drawn, one_seed=True))
    before = len(seeds)
    outcomes, passes = held_together(told)
    drawn_at = Counter(seed for seed in seeds[before:] if seed != bytes(32))  # zeros are for planning
    assert outcomes[0].tokens == greedy.expected
    assert all(o.client is None and len(o.tokens) == 4 for o in outcomes)
    assert max(passes[0].rows) == 4
    assert len(drawn_at) == 3 * 4 and set(drawn_at.values()) == {PARTIES}


# --- sessions that end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1])
def test_a_session_that_is_cut_off_in_a_pass_harms_no_other(at: int) -> None:
    """Its client is cut off at one party, in the middle of its pass `at`, and its actor is gone at once."""
    told = stories(GPT2, max_new=4)
    scopes: dict[int, trio.CancelScope] = {}

    def tweak(number: int, sessions: Sequence[SessionActor]) -> None:
        if number:
            return
        for party, session in enumerate(sessions):
            scopes[party] = trio.CancelScope()

            async def cut(run: Any = session.run, scope: trio.CancelScope = scopes[party]) -> None:
                with scope:
                    await run()
                if scope.cancelled_caught:
                    raise AbortError("a client was cut off")

            session.run = cut  # type: ignore[method-assign]

    def before(party: int, number: int) -> None:
        if party == 1 and number == at:
            scopes[party].cancel()

    outcomes, passes = held_together(told, before=before, tweak=tweak)
    assert outcomes[0].client is not None
    assert outcomes[0].tokens == told[0].expected[: len(outcomes[0].tokens)]
    assert [o.tokens for o in outcomes[1:]] == [s.expected for s in told[1:]]
    assert [o.parties for o in outcomes[1:]] == [[None] * PARTIES] * 2
    assert 3 in passes[0].rows[: at + 1] and 2 in passes[0].rows


def test_one_session_after_another() -> None:
    """Decode actors end with the last session and begin with the next, at each party when it gets there."""
    story = stories(GPT2, 1, max_new=3)[0]
    ends: list[Outcome] = []

    async def main() -> None:
        net = MemoryNet(PARTIES)
        for _ in range(3):
            async with together(net, GPT2) as running:
                ends.append(await hold(story, net, decoders=running.actors, producers=running.producers))

    run(main)
    assert [o.tokens for o in ends] == [story.expected] * 3
    assert [o.parties for o in ends] == [[None] * PARTIES] * 3


@pytest.mark.parametrize("silent", [False, True], ids=["told", "silent"])
@pytest.mark.parametrize("restarted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_a_party_that_has_let_go_of_the_lane_gets_another(
    restarted: Sequence[int], silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two sessions the decode actors of some parties end and others begin, also without a word."""
    if silent:
        name = DecodeActor._name

        async def mute(self: DecodeActor, lane: Any, tags: Sequence[bytes]) -> list[set[bytes]]:
            return [] if LEAVING in tags else await name(self, lane, tags)

        monkeypatch.setattr(DecodeActor, "_name", mute)
    story = stories(GPT2, 1, max_new=3)[0]
    ends: list[Outcome] = []

    async def main() -> None:
        net = MemoryNet(PARTIES)
        async with together(net, GPT2) as running:
            for _ in range(3):
                ends.append(await hold(story, net, decoders=running.actors, producers=running.producers))
                for party in restarted:
                    running.restart(party)

    run(main)
    assert [o.tokens for o in ends] == [story.expected] * 3
    assert [o.parties for o in ends] == [[None] * PARTIES] * 3


def test_a_lane_that_is_not_opened_is_asked_for_again() -> None:
    """A party loses the first that it is asked for, as when its last session ends just then."""
    told = stories(GPT2, 2, max_new=3)
    lost: list[bytes] = []

    def bend(actors: Sequence[DecodeActor]) -> None:
        renew = actors[1].renew

        def once(peer: int, lane: bytes) -> None:
            if lost:
                renew(peer, lane)
            lost.append(lane)

        actors[1].renew = once  # type: ignore[method-assign]

    outcomes, _ = held_together(told, bend=bend)
    assert len(lost) > 1
    assert [o.tokens for o in outcomes] == [s.expected for s in told]


def test_a_lane_that_breaks_while_the_actor_ends_breaks_nothing_else() -> None:
    """Its end and the lane's come in one group of errors, of which the scope takes only its own."""

    async def broken() -> None:
        async with trio.open_nursery() as nursery:

            async def kernel() -> None:
                try:
                    await trio.sleep_forever()
                except trio.Cancelled:
                    raise AbortError("the lane was lost") from None

            nursery.start_soon(kernel)
            await trio.sleep_forever()

    async def main() -> None:
        async with together(MemoryNet(PARTIES), GPT2) as running:
            running.actors[0]._lane = broken  # type: ignore[method-assign]
            await trio.testing.wait_all_tasks_blocked()
            running.restart(0)
            await trio.testing.wait_all_tasks_blocked()

    run(main)


# --- parties that cheat ------------------------------------------------------------------------------------


class Lanes:
    """Which conversations are the decode actors'."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def __call__(self, actors: Sequence[DecodeActor]) -> None:
        for actor in actors:
            self._watch(actor)

    def _watch(self, actor: DecodeActor) -> None:
        renew = actor.renew

        def noted(peer: int, lane: bytes) -> None:
            self.seen.add(lane)
            renew(peer, lane)

        actor.renew = noted  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["enter/index", "qkv", "softmax/exp", "argmax", "reveal token"])
def test_a_wrong_frame_in_a_pass_ends_the_sessions_in_it_and_gives_no_token(where: str) -> None:
    told = stories(GPT2, max_new=4)
    lanes, spoiled = Lanes(), []

    def tap(frame: Tapped) -> Sequence[bytes] | None:
        if spoiled or frame.session not in lanes.seen or frame.sender != 2 or where not in frame.step:
            return None
        spoiled.append(frame)
        changed = bytearray(frame.payload)
        changed[0] ^= 1
        return [bytes(changed)]

    outcomes, _ = held_together(told, tap=tap, bend=lanes)
    assert spoiled
    for outcome, story in zip(outcomes, told, strict=True):
        assert outcome.client is not None
        assert outcome.tokens == story.expected[: len(outcome.tokens)] and len(outcome.tokens) < 4
        assert all(end is not None for end in outcome.parties)


def _names(to: Sequence[int], change: Callable[[bytearray], None], lanes: Lanes) -> Tap:
    """Party 2 tells some parties other names."""

    def tap(frame: Tapped) -> Sequence[bytes] | None:
        named = frame.session in lanes.seen and frame.step.endswith("/names")
        if not named or frame.sender != 2 or frame.receiver not in to:
            return None
        changed = bytearray(frame.payload)
        change(changed)
        return [bytes(changed)]

    return tap


def _fewer(names: bytearray) -> None:
    names[:TAG] = bytes(TAG)


def test_two_stories_about_who_takes_part_end_the_sessions() -> None:
    told, lanes = stories(GPT2, max_new=4), Lanes()
    outcomes, _ = held_together(told, tap=_names([0], _fewer, lanes), bend=lanes)
    for outcome, story in zip(outcomes, told, strict=True):
        assert outcome.tokens == story.expected[: len(outcome.tokens)]
    assert any(outcome.client is not None for outcome in outcomes)
    # In the first round, by the names that the steps carry, before anything of it is used.
    ends = [str(end) for outcome in outcomes for end in outcome.parties if isinstance(end, PeerError)]
    assert any("is at step 'pass" in end and "/enter/index" in end for end in ends)


def test_a_party_that_names_nobody_is_not_waited_for_for_ever() -> None:
    def bend(actors: Sequence[DecodeActor]) -> None:
        name = actors[2]._name

        async def nobody(lane: Any, tags: Sequence[bytes]) -> list[set[bytes]]:
            return [set() for _ in await name(lane, [])]

        actors[2]._name = nobody  # type: ignore[method-assign]

    told = stories(GPT2, 1, max_new=3)
    ((outcome,), _) = held_together(told, bend=bend)
    assert outcome.tokens == told[0].expected[:1]  # that of the prompt
    assert "deadlines.step" in str(outcome.parties[0]) and outcome.client is not None


def test_a_party_opens_shared_lanes_for_what_it_knows_only() -> None:
    """Of its own models and works, asked for by the leader, by a name of the right length."""
    config: Any = SimpleNamespace(
        scheduler=SimpleNamespace(max_batch=8, max_context=16), deadlines=SimpleNamespace(round=1.0)
    )

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            service = PartyService(config, MemoryNet(PARTIES).party(1), SimpleNamespace(), nursery)  # type: ignore[arg-type]
            good = {"model": "m", "work": "batch", "lane": "00" * 16}
            with pytest.raises(BadInput, match="no session of this model"):
                await service._open_lane(0, good)
            with service._sharing("m", GPT2, SimpleNamespace(), SETTINGS):  # type: ignore[arg-type]
                assert (
                    await service._open_lane(0, good)
                    == await service._open_lane(0, good | {"work": "pass"})
                    == {}
                )
                for wrong, why in (
                    ({"model": 1}, "which lane"),
                    ({"work": None}, "which lane"),
                    ({"work": "else"}, "share no work called 'else'"),
                    ({"model": "n"}, "no session of this model"),
                    ({"lane": "00"}, "by 16 bytes"),
                    ({"lane": "x"}, "hexadecimal"),
                ):
                    with pytest.raises(BadInput, match=why):
                        await service._open_lane(0, good | wrong)
                with pytest.raises(BadInput, match="only party 0"):
                    await service._open_lane(2, good)
            with pytest.raises(BadInput, match="no session of this model"):
                await service._open_lane(0, good)
            nursery.cancel_scope.cancel()

    run(main)


# --- what a pass rests on -----------------------------------------------------------------------------------


def _made(kind: prep.Kind, n: int, first: int, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """Material that is numbered, so that it can be told apart."""
    return {
        name: (np.arange(2 * np.prod(dims), dtype=np.uint64) + np.uint64(first)).reshape(2, *dims)
        for name, dims in prep.shapes(kind, n, shape).items()
    }


@pytest.mark.parametrize(
    "kind", [prep.Trunc(16), prep.Digits((5, 4)), prep.Ands(((0, 1),)), prep.Lookup(4, 3, 8)]
)
def test_joint_stores_give_everything_once_and_in_order(kind: prep.Kind) -> None:
    sizes = (64, 128, 64)
    parts = [_made(kind, n, 10**6 * i) for i, n in enumerate(sizes)]
    whole = Store(prep.join([{kind: {k: v.copy() for k, v in part.items()}} for part in parts]))
    joint = Joint([Store({kind: part}) for part in parts])
    for n in (64, 64, 128):
        want, got = whole.take(kind, n), joint.take(kind, n)
        assert want.keys() == got.keys()
        assert all(np.array_equal(want[k], got[k]) for k in want)
    with pytest.raises(LocalError, match="used up"):
        joint.take(kind, 64)


def test_joint_stores_give_each_cache_its_own_masks() -> None:
    kind = prep.Keys(0, 3, 1, 2, 2, 4)
    parts = [_made(kind, 1, 10**6 * i) for i in range(2)]
    joint = Joint([Store({kind: part}) for part in parts])
    assert np.array_equal(joint.take(kind, 1, of=1)["x"], parts[1]["x"])
    assert np.array_equal(joint.take(kind, 1, of=0)["x"], parts[0]["x"])
    with pytest.raises(LocalError, match="no correlation"):
        joint.take(kind, 1, of=1)


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_pass_takes_no_more_than_its_sessions_have(spec: PlanSpec) -> None:
    """Caches of all lengths, two and three at once, and such as count their keys in 8 and in 16 bits: of no
    kind more than the sum of what each was given.
    """
    spec = replace(spec, context=512)
    shapes = transformer.weight_shapes(spec)
    shapes |= {f"{k}_b": (1, v[1]) for k, v in shapes.items() if k not in ("embed", "pos")}

    def alone(first: int) -> prep.Demand:
        return plan.run(transformer.cost_of(spec, SETTINGS, first, 1, prompt=False, last=True)).demand

    async def joint(firsts: Sequence[int]) -> plan.Cost:
        ctx, cost = plan.planning(shapes)
        caches = [transformer.planned_cache(ctx, spec, first) for first in firsts]
        for cache in caches:
            cache.admit(ctx.bk)
        index = ctx.share(np.zeros((1, len(firsts)), np.uint64))
        rows = await transformer.reenter(ctx, "plan", spec, index, index)
        hidden = await transformer.forward(ctx, "plan", spec, rows, caches, SETTINGS)
        await transformer.logits(ctx, "plan", spec, hidden, SETTINGS)
        return cost

    for firsts in [(1, 1), (3, 12), (6, 7), (7, 7, 8), (2, 9, 13), (254, 255), (254, 9, 300)]:
        have: dict[prep.Kind, int] = {}
        for first in firsts:
            prep.add_demand(have, alone(first))
        cost = plan.run(joint(firsts))
        assert {k: n for k, n in cost.demand.items() if n > have.get(k, 0)} == {}
        assert cost.rounds == max(plan.run(joint([first])).rounds for first in firsts)


@pytest.mark.parametrize("few_rounds", [False, True])
def test_weights_of_several_caches_are_those_of_each(few_rounds: bool) -> None:
    """Blocks of 3, 8, 256, which takes 16 bits to count, and 20 keys, some of them not valid: each as if it
    were alone, to a rounding.
    """
    rng = np.random.default_rng(7)
    sizes = [(2, 1, 3), (2, 1, 8), (1, 1, 256), (2, 2, 20)]
    scores = [rng.uniform(-8, 8, shape) for shape in sizes]
    valid = [None, np.arange(8) != 2, None, np.arange(20) % 3 != 1]
    scores = [np.where(v, s, 0) if v is not None else s for s, v in zip(scores, valid, strict=True)]

    async def party(p: Party) -> list[Any]:
        async def op(ctx: Any) -> list[Any]:
            blocks = [
                Scores(
                    p.share(encode(s, 32), 10 + i),
                    32,
                    np.ones(s.shape[1:], np.uint64),
                    None if v is None else p.share(v.astype(np.uint64), 20 + i),
                    few_rounds,
                )
                for i, (s, v) in enumerate(zip(scores, valid, strict=True))
            ]
            return await nonlinear.exponentials(ctx, "softmax", blocks)

        ctx = await p.context(demand, "softmax")
        return [x.v for e, total in await op(ctx) for x in (e, total)]

    async def planned() -> plan.Cost:
        ctx, cost = plan.planning({})
        blocks = [
            Scores(
                ctx.share(np.zeros((1, *s.shape), np.uint64)),
                32,
                np.ones(s.shape[1:], np.uint64),
                None if v is None else ctx.share(np.zeros((1, len(v)), np.uint64)),
                few_rounds,
            )
            for s, v in zip(scores, valid, strict=True)
        ]
        await nonlinear.exponentials(ctx, "softmax", blocks)
        return cost

    demand = plan.run(planned()).demand
    results = parties.run_parties(party, seed=b"blocks")
    values = [decode(parties.reconstruct(list(each)), 24) for each in zip(*results, strict=True)]
    for i, (s, v) in enumerate(zip(scores, valid, strict=True)):
        e, total = values[2 * i], values[2 * i + 1]
        want = np.exp(s) if v is None else np.where(v, np.exp(s), 0)
        assert np.allclose(e / total[..., None], want / want.sum(-1, keepdims=True), atol=1e-3)
        assert np.allclose(e.sum(-1), total, atol=1e-6)
