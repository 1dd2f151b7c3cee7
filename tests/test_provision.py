"""Sharing a model: components add up to the weights and say nothing alone; lies about them are not stored."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from service import World, spec, world

from mimir.client import provision as provisioning
from mimir.client.connection import PartyError
from mimir.client.provision import Seeds, Sharing, provision, seed_name
from mimir.client.session import connect_all
from mimir.errors import BadInput, MimirError
from mimir.manifest import Manifest
from mimir.model.checkpoint import Plan, PlanSpec, encode
from mimir.secret import ShareSeed

SCALE = 16


def plan_of(model: PlanSpec, weights: dict[str, np.ndarray]) -> Plan:
    """A plan with these weights."""
    values = {each.name: getattr(model, each.name) for each in fields(PlanSpec)}
    return Plan(**values, _recipes={name: partial(weights.__getitem__, name) for name in weights})


def plan(model: PlanSpec | None = None, seed: int = 3) -> Plan:
    """A plan with random weights."""
    model = model or spec()
    rng = np.random.default_rng(seed)
    return plan_of(model, {name: rng.normal(size=shape) for name, shape in model.shapes().items()})


def seeds() -> tuple[ShareSeed, ShareSeed]:
    return ShareSeed(b"\x01" * 32), ShareSeed(b"\x02" * 32)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(30):
            await test()

    trio.run(guarded)


async def share(made: World, sharing: Sharing, manifest: Manifest, watch: Any = None) -> str:
    async with connect_all(made.federation, made.owner) as connections:
        return await provision(connections, sharing, manifest, watch)
    raise AssertionError


def check_stored(made: World, whole: Plan, digest: str) -> None:
    models = [party.store.open(digest) for party in made.parties]
    for name in whole.names():
        expected = encode(whole.tensor(name), SCALE)
        pairs = [model.get(name) for model in models]
        for party in range(3):
            assert (pairs[party][1] == pairs[(party + 1) % 3][0]).all(), (
                "the two holders of a component agree"
            )
        assert (pairs[0][0] + pairs[1][0] + pairs[2][0] == expected).all(), name


def test_all_parties_store_components_that_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provisioning, "PIECE", 64)  # so that tensors take several pieces

    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            whole = plan()
            sharing = Sharing(whole, SCALE, seeds())
            seen: list[tuple[str, int, int]] = []

            def watch(advance: provisioning.Advance) -> None:
                seen.append((advance.phase, advance.done, advance.total))

            manifest = sharing.manifest("toy", made.keys, watch)
            digest = await share(made, sharing, manifest, watch)
            assert digest == manifest.digest()
            check_stored(made, whole, digest)
            total = whole.parameters()
            assert ("hashing", total, total) in seen and ("sending", total, total) in seen

    run(test)


def test_pieces_do_not_depend_on_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("a" * 64, "b" * 64, "c" * 64)
    whole = Sharing(plan(), SCALE, seeds()).manifest("toy", keys)
    for size in (8, 24, 512):
        monkeypatch.setattr(provisioning, "PIECE", size)
        assert Sharing(plan(), SCALE, seeds()).manifest("toy", keys) == whole


def test_no_component_repeats_between_tensors_or_seeds() -> None:
    """A key stream used twice would show the difference of two weights to a party."""
    seen: set[bytes] = set()
    count = 0
    for pair in (seeds(), (ShareSeed(b"\x03" * 32), ShareSeed(b"\x04" * 32))):
        sharing = Sharing(plan(), SCALE, pair)
        for name in plan().names():
            for _first, components in sharing.pieces(name):
                for component in components:
                    words = component.tobytes()
                    for at in range(0, len(words) - 7, 8):
                        seen.add(words[at : at + 8])
                        count += 1
    assert len(seen) == count


def test_the_last_component_of_equal_weights_is_not_equal() -> None:
    zeros = plan_of(spec(), {name: np.zeros(shape) for name, shape in spec().shapes().items()})
    for _first, (_a, _b, last) in Sharing(zeros, SCALE, seeds()).pieces("embed"):
        assert len(np.unique(last)) == last.size


def test_an_upload_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provisioning, "PIECE", 64)

    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            whole = plan()
            sharing = Sharing(whole, SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            with trio.CancelScope() as scope:

                def stop(advance: provisioning.Advance) -> None:
                    if advance.done >= advance.total // 2:
                        scope.cancel()

                await share(made, sharing, manifest, stop)
            assert scope.cancelled_caught
            await trio.sleep(0.05)  # the parties notice and close their uploads
            incoming = made.parties[0].store.begin(manifest.public())
            have = incoming.have()
            incoming.close()
            assert sum(map(sum, have.values())) > 0
            sent: list[int] = []
            digest = await share(made, sharing, manifest, lambda advance: sent.append(advance.done))
            check_stored(made, whole, digest)
            # And again, with everything there already: nothing is sent.
            sent.clear()
            assert await share(made, sharing, manifest, lambda advance: sent.append(advance.done)) == digest
            assert not sent

    run(test)


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("side", [0, 1])
def test_an_owner_whose_data_are_not_what_it_promised_is_refused(
    tmp_path: Path, victim: int, side: int
) -> None:
    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            honest = sharing.pieces
            component = (victim + side) % 3

            def lying(name: str) -> Any:
                for first, components in honest(name):
                    if name == "0.o":
                        components[component][0, ...] ^= np.uint64(1)  # the same lie to both holders
                    yield first, components

            sharing.pieces = lying  # type: ignore[method-assign]
            with pytest.raises(BadInput, match="has not the manifest's hash"):
                await share(made, sharing, manifest)
            assert all(
                not party.store.models()
                for party in made.parties
                if party.party in (victim, (victim - 1) % 3)
            )

    run(test)


def test_two_stories_to_two_holders_are_found_by_comparing(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            made.fake.digest_liar = 1
            sharing = Sharing(plan(), SCALE, seeds())
            with pytest.raises(BadInput, match="received different bytes"):
                await share(made, sharing, sharing.manifest("toy", made.keys))
            await trio.sleep(0.05)
            assert all(not party.store.models() for party in made.parties)
            assert not list(tmp_path.glob("data*/.incoming-*"))

    run(test)


def test_a_party_that_never_confirms_is_told_within_the_deadline(tmp_path: Path) -> None:
    from mimir.config import Deadlines

    async def test() -> None:
        short = Deadlines(round=5, step=0.3, client=5, handshake=1)
        async with world(tmp_path, hold=False, deadlines=short) as made:

            async def never(model: str, components: dict[int, str]) -> None:
                await trio.sleep_forever()

            made.parties[2].compare_digests = never  # type: ignore[method-assign]
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            with pytest.raises(BadInput, match="did not confirm them in time"):
                await share(made, sharing, manifest)

    run(test)


def test_another_scale_and_other_parties_are_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), 12, seeds())
            with pytest.raises(BadInput, match="scale_bits 12, this federation 16"):
                await share(made, sharing, sharing.manifest("toy", made.keys))
            sharing = Sharing(plan(), SCALE, seeds())
            others = (made.keys[1], made.keys[0], made.keys[2])
            with pytest.raises(BadInput, match="shared for other parties"):
                await share(made, sharing, sharing.manifest("toy", others))

    run(test)


def test_a_party_that_accepted_something_else_is_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            store = made.parties[2].store
            begin = store.begin

            def swap(data: Any) -> Any:
                incoming = begin(data)
                accept = incoming.accept

                def accepted() -> None:
                    accept()
                    incoming.digest = "0" * 64

                incoming.accept = accepted  # type: ignore[method-assign]
                return incoming

            store.begin = swap  # type: ignore[method-assign]
            with pytest.raises(MimirError, match="party gamma accepted another model"):
                await share(made, sharing, sharing.manifest("toy", made.keys))

    run(test)


def test_a_party_that_claims_the_impossible_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            store = made.parties[1].store
            begin = store.begin

            def claim(data: Any) -> Any:
                incoming = begin(data)
                have = incoming.have()
                have["embed"][0] += 8 * 10**6
                incoming.have = lambda: have
                return incoming

            store.begin = claim  # type: ignore[method-assign]
            with pytest.raises(MimirError, match="party beta claims"):
                await share(made, sharing, manifest)

    run(test)


def test_bad_weights_are_named_before_anything_is_sent() -> None:
    model = spec()
    weights = {name: np.zeros(shape) for name, shape in model.shapes().items()}
    weights["0.o"][0, 0] = np.nan
    bad = plan_of(model, weights)
    with pytest.raises(MimirError, match=r"0\.o"):
        Sharing(bad, SCALE, seeds()).manifest("toy", ("a" * 64, "b" * 64, "c" * 64))


def test_a_dead_party_is_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            parties = list(made.federation.parties)
            listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
            port = listener.socket.getsockname()[1]
            await listener.aclose()
            parties[2] = replace(parties[2], port=port)
            made.federation = replace(made.federation, parties=tuple(parties))
            with pytest.raises(PartyError, match="party gamma"):
                await share(made, sharing, manifest)

    run(test)


# --- seeds -------------------------------------------------------------------------------------------------


def reveal(pair: tuple[ShareSeed, ShareSeed]) -> list[bytes]:
    out = []
    for seed in pair:
        with seed.reveal_to_kernel() as view:
            out.append(bytes(view))
    return out


def test_seeds_wait_in_a_private_file_until_they_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "x.seeds"
    first = Seeds(path)
    taken = reveal(first.take())
    assert not first.resumed and taken[0] != taken[1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Seeds(path)
    assert reveal(again.take()) == taken and again.resumed
    again.forget()
    assert not path.exists()
    again.forget()
    assert reveal(Seeds(path).take()) != taken


def test_seeds_that_others_may_read_are_refused_and_half_written_ones_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.seeds"
    Seeds(path).take()
    path.chmod(0o644)
    with pytest.raises(BadInput, match="others may read"):
        Seeds(path).take()
    path.write_bytes(b"half")
    path.chmod(0o600)
    half = Seeds(path)
    assert reveal(half.take())[0] != b"half" and not half.resumed
    with pytest.raises(BadInput, match="cannot be written"):
        Seeds(tmp_path / "nowhere" / "x.seeds").take()


def test_seeds_are_never_found_again_for_other_weights_scale_or_parties() -> None:
    keys = ("a" * 64, "b" * 64, "c" * 64)
    names = {
        seed_name(plan(seed=3), 16, keys),
        seed_name(plan(seed=4), 16, keys),
        seed_name(plan(seed=3), 15, keys),
        seed_name(plan(seed=3), 16, (keys[1], keys[0], keys[2])),
        seed_name(plan(spec("rope"), seed=3), 16, keys),
    }
    assert len(names) == 5
    assert seed_name(plan(seed=3), 16, keys) in names
