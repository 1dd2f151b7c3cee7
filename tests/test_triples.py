"""Material that is made for several sessions together: each gets its own, and nobody is harmed by others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
from session_fixture import GPT2, LLAMA, PARTIES, Outcome, Story, run
from test_decode import held_together, stories

from mimir.actors import triples
from mimir.actors.session import SessionActor
from mimir.actors.shared import Served, Waiting
from mimir.actors.triples import Batch, Order, SharedProducer, TripleProducer, allotted
from mimir.errors import AbortError, LocalError, PeerError
from mimir.model.checkpoint import PlanSpec
from mimir.mpc import prep
from mimir.mpc.prep import Demand, Store
from mimir.net.memory import Tap, Tapped

MANY = 1 << 30  # bytes: room for everything


class Watched:
    """Notes the sessions of each batch that a party's shared producer makes, and, in `lanes`, its lanes;
    `before` is called with the batch's number.
    """

    def __init__(self, actor: SharedProducer, lanes: set[bytes], before: Callable[[int], Any]) -> None:
        self.sizes: list[int] = []
        self.unwanted: list[Store] = []  # made for sessions that were gone by then
        serve, renew = actor._serve, actor.renew

        async def served(doors: Any, step: str, members: Sequence[Any]) -> list[list[Store]]:
            self.sizes.append(len(members))
            before(len(self.sizes) - 1)
            results = await serve(doors, step, members)
            for member, stores in zip(members, results, strict=True):
                if member.gone:
                    assert all(store.material for store in stores)
                    self.unwanted += stores
            return results

        def noted(peer: int, lane: bytes) -> None:
            lanes.add(lane)
            renew(peer, lane)

        actor._serve, actor.renew = served, noted  # type: ignore[method-assign]


def made_together(
    told: Sequence[Story],
    tap: Callable[[set[bytes]], Tap] | None = None,
    before: Callable[[int, int], Any] = lambda party, number: None,
    tweak: Callable[[int, Sequence[SessionActor]], None] = lambda number, sessions: None,
) -> tuple[list[Outcome], list[Watched]]:
    """Run all stories at once; how each ended, and each party's batches. `tap` is told the shared lanes."""
    watched: list[Watched] = []
    lanes: set[bytes] = set()

    def watch(producers: Sequence[SharedProducer]) -> None:
        watched.extend(Watched(a, lanes, partial(before, i)) for i, a in enumerate(producers))

    outcomes, _ = held_together(told, tap=tap(lanes) if tap else None, tweak=tweak, watch=watch)
    return outcomes, watched


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_sessions_whose_material_is_made_together_answer_as_alone(spec: PlanSpec) -> None:
    told = [*stories(spec, max_new=4), *stories(spec, 1, 3, bucket=6, max_new=5)]
    outcomes, watched = made_together(told)
    assert [o.tokens for o in outcomes] == [s.expected for s in told]
    assert [o.parties for o in outcomes] == [[None] * PARTIES] * len(told)
    assert watched[0].sizes == watched[1].sizes == watched[2].sizes
    assert max(watched[0].sizes) == len(told)
    assert len(watched[0].sizes) < sum(watched[0].sizes)


def test_together_they_take_fewer_rounds() -> None:
    told = stories(GPT2, max_new=4)
    rounds: list[list[int]] = []

    def count(number: int, sessions: Sequence[SessionActor]) -> None:
        made = sessions[0]._made

        async def noted(positions: int) -> None:
            rounds[-1].append(sessions[0]._figures()["rounds_preprocessing"])  # type: ignore[arg-type]
            await made(positions)

        sessions[0]._made = noted  # type: ignore[method-assign]

    for some in (told[:1], told):
        rounds.append([])
        outcomes, _ = made_together(some, tweak=count)
        assert [o.tokens for o in outcomes] == [s.expected for s in some]
    # What each is told of are the rounds that it took part in: no more than those of one alone.
    assert max(rounds[1]) <= 1.2 * max(rounds[0])


@pytest.mark.parametrize("party", range(PARTIES))
def test_a_session_that_leaves_while_its_material_is_made_harms_no_other(party: int) -> None:
    told = stories(GPT2, max_new=6)
    scopes: dict[int, trio.CancelScope] = {}

    def tweak(number: int, sessions: Sequence[SessionActor]) -> None:
        if number:
            return
        work = sessions[party].run

        async def cut() -> None:
            with trio.CancelScope() as scopes[0]:
                await work()
            raise AbortError("its client was cut off")

        sessions[party].run = cut  # type: ignore[method-assign]

    def before(at: int, number: int) -> None:
        if at == party and number == 3:
            scopes[0].cancel()

    outcomes, watched = made_together(told, before=before, tweak=tweak)
    assert outcomes[0].client is not None and watched[party].sizes[3] == 3
    assert watched[party].unwanted and not any(store.material for store in watched[party].unwanted)
    assert outcomes[0].tokens == told[0].expected[: len(outcomes[0].tokens)]
    assert [o.tokens for o in outcomes[1:]] == [s.expected for s in told[1:]]
    assert [o.parties for o in outcomes[1:]] == [[None] * PARTIES] * 2


@pytest.mark.parametrize("where", ["inject", "weight", "verify"])
def test_a_wrong_frame_in_a_batch_ends_the_sessions_in_it(where: str) -> None:
    told = stories(GPT2, max_new=6)
    spoiled: list[Tapped] = []

    def tap(lanes: set[bytes]) -> Tap:
        def one(frame: Tapped) -> Sequence[bytes] | None:
            if (
                frame.session not in lanes
                or frame.sender != 2
                or where not in frame.step
                or not frame.payload
            ):
                return None
            if spoiled:
                return None
            spoiled.append(frame)
            changed = bytearray(frame.payload)
            changed[0] ^= 1
            return [bytes(changed)]

        return one

    outcomes, watched = made_together(told, tap=tap)
    assert spoiled and max(watched[0].sizes) == 3
    for outcome, story in zip(outcomes, told, strict=True):
        assert outcome.client is not None
        assert outcome.tokens == story.expected[: len(outcome.tokens)] and len(outcome.tokens) < 6
        assert all(end is not None for end in outcome.parties)
    assert any(isinstance(end, PeerError) for outcome in outcomes for end in outcome.parties)


def test_two_stories_about_who_takes_part_end_the_sessions() -> None:
    """Party 2 tells party 0 fewer names than party 1: the steps carry who takes part, and differ."""
    told = stories(GPT2, max_new=6)
    fewer: list[Tapped] = []

    def tap(lanes: set[bytes]) -> Tap:
        def one(frame: Tapped) -> Sequence[bytes] | None:
            named = (
                frame.session in lanes and frame.step.endswith("/names") and frame.payload[32:48] != bytes(16)
            )
            if not named or frame.sender != 2 or frame.receiver != 0:
                return None
            fewer.append(frame)
            return [bytes(16) + bytes(frame.payload[16:])]

        return one

    outcomes, _ = made_together(told, tap=tap)
    assert fewer
    for outcome, story in zip(outcomes, told, strict=True):
        assert outcome.tokens == story.expected[: len(outcome.tokens)]
    ends = [str(end) for outcome in outcomes for end in outcome.parties]

    assert any("bytes where" in end for end in ends)


# --- how much is made together ------------------------------------------------------------------------------


def order(*sizes: int, whole: bool = False, at_once: int = MANY) -> Order:
    return Order([{} for _ in sizes], sizes, whole, {}, at_once)


def test_what_there_is_room_for_is_made_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allotted([order(5, 5, 5)]) == [3]
    assert allotted([order(5, 5, 5, at_once=11)]) == [3 - 1]
    # Several have the room of all, but no more than TOGETHER_BYTES: one more of each, or none.
    monkeypatch.setattr(triples, "TOGETHER_BYTES", 25)
    assert allotted([order(5, 5, 5, at_once=10), order(5, 5, at_once=10)]) == [2, 2]
    assert allotted([order(5, 5, 5, at_once=15), order(5, 5, at_once=15)]) == [3, 2]
    assert allotted([order(5, 5, 5, at_once=15)] * 3) == [1, 1, 1]
    # Some belong together, and one that may have more made than several at once has it.
    assert allotted([order(5, 5, 5, whole=True, at_once=10), order(5, 5, at_once=10)]) == [3, 1]
    assert allotted([order(10, 10, 10, at_once=30), order(5, at_once=10)]) == [2, 1]


def test_who_does_not_fit_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triples, "TOGETHER_BYTES", 25)
    chosen = partial(SharedProducer._chosen, None)  # type: ignore[arg-type]

    def counted(*orders: Order) -> int:
        waiting: list[Waiting[Order, list[Store]]] = [Waiting(o, bytes([i])) for i, o in enumerate(orders)]
        some: list[Any] = chosen(waiting)
        assert some == waiting[: len(some)]
        return len(some)

    assert counted(*[order(10, at_once=20)] * 3) == 2
    assert counted(*[order(40, at_once=20)] * 3) == 1
    assert counted(order(10, 10, whole=True, at_once=20), order(10, at_once=20)) == 1
    assert counted(*[order(10, at_once=50)] * 5) == 5


def test_masks_of_each_cache_stay_with_their_session() -> None:
    keys, trunc = prep.Keys(0, 3, 1, 2, 2, 4), prep.Trunc(16)
    demands: list[Demand] = [prep.owned({keys: 1, trunc: n}, owner) for owner, n in enumerate((1, 2))]
    total = triples.summed(demands)
    assert total[trunc] == 3 and {k.owner for k in total if isinstance(k, prep.Keys)} == {0, 1}
    made = {
        kind: {
            name: np.full((2, *dims), i, np.uint64)
            + np.arange(dims[0], dtype=np.uint64).reshape(-1, *[1] * (len(dims) - 1))
            for name, dims in prep.shapes(kind, n).items()
        }
        for i, (kind, n) in enumerate(total.items())
    }
    want = {k.owner: v["x"] for k, v in made.items() if isinstance(k, prep.Keys)}
    for owner, store in enumerate(prep.split(made, demands)):
        assert np.array_equal(store.take(keys, 1)["x"], want[owner])
        assert store.count(trunc) == owner + 1


def test_material_that_moves_leaves_nothing_behind() -> None:
    keys, trunc = prep.Keys(0, 3, 1, 2, 2, 4), prep.Trunc(16)
    whole = {name: np.ones((2, 4, *dims[1:]), np.uint64) for name, dims in prep.shapes(trunc, 1).items()}
    mask = {name: np.ones((2, *dims), np.uint64) for name, dims in prep.shapes(keys, 1).items()}
    store = Store({trunc: {name: v[:, 1:3] for name, v in whole.items()}, keys: mask})
    moved = store.moved()
    assert not store.material
    for name, v in moved.take(trunc, 2).items():
        assert v.all() and not np.may_share_memory(v, whole[name])
        assert not whole[name][:, 1:3].any() and whole[name][:, 0].all() and whole[name][:, 3].all()
    assert all(v.all() for v in moved.take(keys, 1).values())  # the cache's own
    with pytest.raises(LocalError, match="some was taken"):
        moved.moved()


# --- a session's producer -----------------------------------------------------------------------------------


class Slow(SharedProducer):
    """Makes one step at a time, and the second never."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._coming = 0

    async def ask(self, work: Order, own: Any, name: str) -> Served[list[Store]]:
        self.asked.append(len(work.demands))
        if len(self.asked) > 1:
            await trio.sleep_forever()
        return Served([Store({})], 7, 11, 1)


def test_what_is_ready_is_given_while_more_is_made() -> None:
    """One of three steps is made first; it is given although the second is under way."""
    shared, told = Slow(), []

    async def progress(made: int) -> None:
        told.append(made)

    async def main() -> None:
        doors: Any = SimpleNamespace(channel=None)
        producer = TripleProducer(doors, None, {}, 8, MANY, progress, shared)  # type: ignore[arg-type]
        steps = ("one", "two", "three")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(producer.run)
            await producer.prepare([Batch("one", steps, lambda: [{} for _ in steps], 3)])
            while len(shared.asked) < 2:
                await trio.sleep(0.01)
            assert isinstance(await producer.need("one"), Store)
            assert producer.spent == {"rounds": 7, "sent": 11} and told == [1]
            nursery.cancel_scope.cancel()

    run(main)
    assert shared.asked == [3, 2]


@pytest.mark.parametrize("members", [1, 2])
def test_what_lies_long_is_not_kept_with_that_of_others(members: int) -> None:
    """The second of two steps comes when the first has not been taken."""
    kind, whole = prep.Mul(), {name: np.ones((2, 8), np.uint64) for name in ("x", "y", "z")}

    class Ready(Slow):
        async def ask(self, work: Order, own: Any, name: str) -> Served[list[Store]]:
            at = 2 * len(self.asked)
            self.asked.append(1)
            return Served([Store({kind: {k: v[:, at : at + 2] for k, v in whole.items()}})], 0, 0, members)

    async def progress(made: int) -> None:
        pass

    async def main() -> None:
        doors: Any = SimpleNamespace(channel=None)
        producer = TripleProducer(doors, None, {}, 8, MANY, progress, Ready())  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(producer.run)
            steps = ("one", "two")
            await producer.prepare([Batch(s, (s,), lambda: [{kind: 2}], 1) for s in steps])
            await trio.sleep(0.1)
            told = [(await producer.need(step)).take(kind, 2)["x"] for step in steps]
            assert [np.may_share_memory(x, whole["x"]) for x in told] == [True, members == 1]
            assert all(x.all() for x in told)
            nursery.cancel_scope.cancel()

    run(main)


def test_what_is_much_is_made_in_parts_on_the_sessions_own_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    story = stories(GPT2, 1, max_new=3)[0]
    alone: list[str] = []
    work = TripleProducer._alone

    async def noted(self: TripleProducer, name: str, demands: Sequence[Demand]) -> list[Store]:
        alone.append(name)
        return await work(self, name, demands)

    monkeypatch.setattr(TripleProducer, "_alone", noted)
    for at_once, some in ((MANY, False), (1 << 14, True)):
        alone.clear()
        monkeypatch.setattr("mimir.actors.session.batch_bytes", lambda memory, n=at_once: n)
        ((outcome,), _) = made_together([story])
        assert outcome.tokens == story.expected and bool(alone) == some
