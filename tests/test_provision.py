"""Sharing a model: components add up to the weights and say nothing alone; lies about them are not stored."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import trio
from service import World, spec, world

from mimir.client import provision as provisioning
from mimir.client.connection import Connection, PartyError
from mimir.client.provision import Seeds, ShareSeeds, Sharing, provision, seed_name
from mimir.client.session import connect_all
from mimir.errors import BadInput, MimirError
from mimir.manifest import FORMAT, Manifest
from mimir.model.checkpoint import Plan, PlanSpec
from mimir.mpc.weights import KeyStream, array
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


def seeds(first: int = 1) -> ShareSeeds:
    return (
        ShareSeed(bytes([first]) * 32),
        ShareSeed(bytes([first + 1]) * 32),
        ShareSeed(bytes([first + 2]) * 32),
    )


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
        expected = whole.encoded(name, SCALE)
        pairs = [[array(component) for component in model.get(name)] for model in models]
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
    for size in (4, 12, 16, 512):  # whole blocks of the key stream
        monkeypatch.setattr(provisioning, "PIECE", size)
        assert Sharing(plan(), SCALE, seeds()).manifest("toy", keys) == whole


def test_no_component_repeats_between_tensors_or_seeds() -> None:
    """A key stream used twice would show the difference of two weights to a party."""
    seen: set[bytes] = set()
    count = 0
    for three in (seeds(), seeds(4)):
        sharing = Sharing(plan(), SCALE, three)
        for index, (name, shape) in enumerate(plan().shapes().items()):
            explicit = b"".join(piece.tobytes() for _first, piece in sharing.pieces(name))
            dtype = np.dtype(f"u{plan().word_bytes(name)}")
            streams = [array(KeyStream(sharing.seed(c), index, shape, dtype)).tobytes() for c in range(3)]
            for words in (explicit, *streams):  # the stream that the explicit one stands for, too
                assert len(words) == plan().sizes()[name]
                for at in range(0, len(words), 8):
                    seen.add(words[at : at + 8])
                    count += 1
    assert len(seen) == count


def test_the_explicit_component_of_equal_weights_is_not_equal() -> None:
    zeros = plan_of(spec(), {name: np.zeros(shape) for name, shape in spec().shapes().items()})
    for name in zeros.names():
        words = np.concatenate([piece for _first, piece in Sharing(zeros, SCALE, seeds()).pieces(name)])
        assert len(np.unique(words)) == words.size


def test_a_third_of_the_shares_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds to each party, and of each tensor one component, to its two holders."""

    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            sent: list[dict[str, Any]] = []
            send = Connection.send

            async def watched(self: Connection, message: dict[str, Any]) -> None:
                sent.append(message)
                await send(self, message)

            monkeypatch.setattr(Connection, "send", watched)
            await share(made, sharing, manifest)
            words = sum(len(each["data"]) for each in sent if each["t"] == "chunk")
            assert words == 2 * sum(tensor.nbytes for tensor in manifest.tensors)
            offers = [each["seeds"] for each in sent if each["t"] == "put_model"]
            assert sorted(offers) == sorted([raw[i], raw[(i + 1) % 3]] for i in range(3))
            for party in range(3):
                assert made.parties[party].store.manifest(manifest.digest()) == manifest

    raw = reveal(seeds())
    run(test)


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
            incoming = made.parties[0].store.begin(manifest.public(), seeds()[:2])
            have = incoming.have()
            incoming.close()
            assert sum(have.values()) > 0
            sent: list[int] = []
            digest = await share(made, sharing, manifest, lambda advance: sent.append(advance.done))
            check_stored(made, whole, digest)
            # And again, with everything there already: nothing is sent.
            sent.clear()
            assert await share(made, sharing, manifest, lambda advance: sent.append(advance.done)) == digest
            assert not sent

    run(test)


@pytest.mark.parametrize("component", range(3))
def test_an_owner_whose_data_are_not_what_it_promised_is_refused(tmp_path: Path, component: int) -> None:
    """By both holders; with the third party alone nothing is stored either."""

    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            honest = sharing.pieces
            target = next(tensor.name for tensor in manifest.tensors if tensor.explicit == component)

            def lying(name: str) -> Any:
                for first, words in honest(name):
                    if name == target:
                        words[0] ^= np.uint64(1)  # the same lie to both holders
                    yield first, words

            sharing.pieces = lying  # type: ignore[method-assign]
            with pytest.raises(BadInput, match="has not the manifest's hash"):
                await share(made, sharing, manifest)
            assert not any(party.store.models() for party in made.parties)

    run(test)


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_seed_to_one_party_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int, number: int
) -> None:
    """So it would have differed between its two holders."""
    honest = provisioning._seeds_of

    def lying(sharing: Sharing, party: int) -> list[bytes]:
        found = honest(sharing, party)
        if party == victim:
            found[number] = bytes(32)
        return found

    monkeypatch.setattr(provisioning, "_seeds_of", lying)

    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            with pytest.raises(BadInput, match=f"seed of component {(victim + number) % 3} is not"):
                await share(made, sharing, manifest)
            await trio.sleep(0.05)
            assert not any(party.store.models() for party in made.parties)
            assert not list((tmp_path / f"data{victim}").glob(".incoming-*"))

    run(test)


def test_words_of_a_component_that_the_party_expands_itself_are_refused(tmp_path: Path) -> None:
    """An owner that claims another component to be the explicit one: the rule is everybody's."""

    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            sharing = Sharing(plan(), SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            foreign = next(tensor for tensor in manifest.tensors if tensor.explicit == 2)
            async with connect_all(made.federation, made.owner) as connections:
                offered = provisioning._seeds_of(sharing, 0)
                await connections[0].send({"t": "put_model", "manifest": manifest.public(), "seeds": offered})
                have = (await connections[0].receive("have"))["tensors"]
                assert foreign.name not in have and set(have) == set(manifest.held(0))
                await connections[0].send(
                    {"t": "chunk", "tensor": foreign.name, "offset": 0, "data": bytes(8)}
                )
                with pytest.raises(BadInput, match="belong to this party"):
                    await connections[0].receive("committed")
            moved = [replace(tensor, explicit=(tensor.explicit + 1) % 3) for tensor in manifest.tensors]
            with pytest.raises(BadInput, match="not those of its description"):
                replace(manifest, tensors=tuple(moved))

    run(test)


def test_expanded_shares_that_were_altered_are_not_what_was_shared(tmp_path: Path) -> None:
    """The comparison in these tests is not idle: one word of one key stream, and the weights are others."""

    async def test() -> None:
        async with world(tmp_path, hold=False) as made:
            whole = plan()
            sharing = Sharing(whole, SCALE, seeds())
            manifest = sharing.manifest("toy", made.keys)
            digest = await share(made, sharing, manifest)
            check_stored(made, whole, digest)
            expanded = next(tensor.name for tensor in manifest.tensors if tensor.explicit != 0)
            component = made.parties[0].store.open(digest).get(expanded)[0]
            assert isinstance(component, np.ndarray)
            component.flags.writeable = True
            component.reshape(-1)[0] ^= np.uint64(1)
            with pytest.raises(AssertionError):
                check_stored(made, whole, digest)

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

            def swap(data: Any, seeds: Any) -> Any:
                incoming = begin(data, seeds)
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

            def claim(data: Any, seeds: Any) -> Any:
                incoming = begin(data, seeds)
                have = incoming.have()
                have[next(iter(have))] += 8 * 10**6
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


def reveal(three: ShareSeeds) -> list[bytes]:
    out = []
    for seed in three:
        with seed.reveal_to_kernel() as view:
            out.append(bytes(view))
    return out


def test_seeds_wait_in_a_private_file_until_they_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "x.seeds"
    first = Seeds(path)
    taken = reveal(first.take())
    assert not first.resumed and len(set(taken)) == 3
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
    for of, name, other in (  # what another version of the program may do otherwise
        (PlanSpec, "scale", lambda self, name, bits: bits + 1),
        (PlanSpec, "word_bytes", lambda self, name: 8),
        (provisioning, "FORMAT", FORMAT + 1),
    ):
        with mock.patch.object(of, name, other):
            names.add(seed_name(plan(seed=3), 16, keys))
    assert len(names) == 8
    assert seed_name(plan(seed=3), 16, keys) in names
