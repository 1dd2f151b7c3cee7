"""Shares on disk: nothing half there, nothing unchecked, nothing readable by others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage import Shared, open_store, share, upload

from mimir import vault as at_rest
from mimir.errors import BadInput, EnvironmentMissing, LocalError, MimirError, ModelError
from mimir.manifest import COMPONENTS, Manifest, component_hash, explicit_components
from mimir.model.checkpoint import PlanSpec
from mimir.mpc.weights import array
from mimir.secret import ShareSeed
from mimir.store import MAX_INCOMPLETE, SPARE_DISK_BYTES, ModelStore, StoreError, WrongShare, kept

PARTIES = tuple(format(number, "x") * 64 for number in (10, 11, 12))
SPEC = PlanSpec(
    family="gpt2",
    layers=1,
    width=4,
    heads=2,
    kv_heads=2,
    head_dim=2,
    hidden=8,
    vocab=10,
    context=6,
    act="gelu",
    norm_eps=1e-5,
    positions="learned",
    rope_theta=None,
    bos_id=None,
    eos_ids=(0,),
)


def sharing(seed: int = 1) -> Shared:
    """A model of random components."""
    return share(SPEC, (PARTIES[0], PARTIES[1], PARTIES[2]), seed=seed)


def begin(store: ModelStore, made: Shared) -> Any:
    return store.begin(made.manifest.public(), made.seeds(store.party))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return open_store(tmp_path / "models", 2, PARTIES)


@pytest.mark.parametrize("party", range(COMPONENTS))
@pytest.mark.parametrize("keep", [0, 1500, 1 << 30])
def test_what_comes_out_is_what_went_in(tmp_path: Path, party: int, keep: int) -> None:
    store = open_store(tmp_path / "models", party, PARTIES, keep=keep)
    made = sharing()
    upload(store, made, piece=100)
    digest = made.manifest.digest()
    assert store.models() == {digest: made.manifest}
    model = store.open(digest)
    for name, shape in SPEC.shapes().items():
        for number, component in enumerate(model.get(name)):
            words = array(component)
            assert words.shape == component.shape == shape
            assert words.dtype == component.dtype == np.dtype(f"u{SPEC.word_bytes(name)}")
            assert words.tobytes() == made.components[name][(party + number) % COMPONENTS]
            assert not isinstance(component, np.ndarray) or not component.flags.writeable
    assert store.open(digest) is model
    with pytest.raises(LocalError):
        model.get("nonsense")


def test_each_party_keeps_a_third_on_disk_and_no_key_stream(tmp_path: Path) -> None:
    """Of each tensor one component is a file at two parties, and the others are nowhere."""
    made = sharing()
    sizes = []
    for party in range(COMPONENTS):
        store = open_store(tmp_path / f"models{party}", party, PARTIES)
        upload(store, made)
        files = {path.stem for path in store.root.rglob("*.words")}
        assert files == {
            tensor.name for tensor in made.manifest.tensors if tensor.explicit in (party, (party + 1) % 3)
        }
        sizes.append(made.manifest.stored(party))
    assert sum(sizes) == 2 * sum(tensor.nbytes for tensor in made.manifest.tensors)
    assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in made.manifest.tensors)


def test_memory_is_filled_with_explicit_components_first(tmp_path: Path) -> None:
    """They are dearer; each sort in the order of the tensors, and what does not fit is passed over."""
    made, party = sharing(), 1
    tensors = made.manifest.tensors
    explicit = [
        (t.name, n, t.nbytes) for t in tensors for n in (0, 1) if (party + n) % COMPONENTS == t.explicit
    ]
    seeded = [
        (t.name, n, t.nbytes) for t in tensors for n in (0, 1) if (party + n) % COMPONENTS != t.explicit
    ]
    whole = sum(size for *_, size in explicit)
    assert kept(tensors, party, whole) == {(name, n) for name, n, _ in explicit}
    assert kept(tensors, party, whole + seeded[0][2]) == {(x[0], x[1]) for x in [*explicit, seeded[0]]}
    assert kept(tensors, party, 0) == frozenset()
    assert len(kept(tensors, party, 1 << 30)) == 2 * len(tensors)
    small = min(size for *_, size in [*explicit, *seeded])
    for room in range(0, 3000, 40):
        chosen = kept(tensors, party, room)
        left = room - sum(size for name, n, size in [*explicit, *seeded] if (name, n) in chosen)
        assert 0 <= left and (
            left < small
            or len(chosen) == 2 * len(tensors)
            or all(size > left for name, n, size in [*explicit, *seeded] if (name, n) not in chosen)
        )
        store = open_store(tmp_path / f"models{room}", party, PARTIES, keep=room)
        upload(store, made)
        assert store.open(made.manifest.digest()).kept_bytes == room - left
        store.close()


def test_what_is_kept_of_several_models_is_bounded_together(tmp_path: Path) -> None:
    made, other = sharing(1), sharing(2)
    whole = 2 * sum(tensor.nbytes for tensor in made.manifest.tensors)
    store = open_store(tmp_path / "models", 0, PARTIES, keep=whole + 400)
    for each in (made, other):
        upload(store, each)
    assert store.open(made.manifest.digest()).kept_bytes == whole
    assert store.open(other.manifest.digest()).kept_bytes <= 400


def test_it_survives_a_restart(store: ModelStore) -> None:
    made = sharing()
    manifest = made.manifest
    upload(store, made)
    store.close()
    again = open_store(store.root, 2, PARTIES)
    assert again.open(manifest.digest()).manifest == manifest


def test_every_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = open_store(tmp_path / "models", 0, PARTIES)
        upload(store, sharing())
    finally:
        os.umask(old)
    paths = [store.root, *store.root.rglob("*")]
    assert len(paths) > 12
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_an_upload_is_all_or_nothing(store: ModelStore) -> None:
    made = sharing()
    incoming = begin(store, made)
    name, other = list(incoming.have())[:2]
    incoming.write(name, 0, made.words(name))
    with pytest.raises(LocalError):
        incoming.accept()
    size = len(made.words(other))
    with pytest.raises(BadInput, match=rf"{other}: 0 of {size} bytes"):
        incoming.verify()
    assert store.models() == {}
    with pytest.raises(BadInput, match="not here"):
        store.open(made.manifest.digest())


def test_an_upload_resumes_where_it_stopped_even_in_another_process(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_rest, "CHUNK", 32)
    made = sharing()
    incoming = begin(store, made)
    name = next(iter(incoming.have()))
    incoming.write(name, 0, made.words(name)[:100])
    assert incoming.have()[name] == 100
    incoming.close()
    store.close()
    store = open_store(store.root, 2, PARTIES)
    incoming = begin(store, made)
    assert incoming.have()[name] == 96, "whole chunks"
    incoming.close()
    upload(store, made)
    store.open(made.manifest.digest())


def test_a_second_upload_of_the_same_sharing_sends_nothing(store: ModelStore) -> None:
    made = sharing()
    upload(store, made)
    incoming = begin(store, made)
    assert incoming.complete and incoming.have() == {
        name: tensor.nbytes for name, tensor in made.manifest.held(2).items()
    }
    assert incoming.verify() == {number: made.manifest.component_digest(number) for number in (2, 0)}
    incoming.accept()


def test_pieces_must_follow_each_other_and_belong_to_this_party(store: ModelStore) -> None:
    made = sharing()
    incoming = begin(store, made)
    name = next(iter(incoming.have()))
    data = made.words(name)
    foreign = [tensor.name for tensor in made.manifest.tensors if tensor.name not in incoming.have()]
    assert foreign, "of some tensors both components are key streams here"
    for each in (*foreign, "../embed", "nonsense"):
        with pytest.raises(BadInput, match="belong to this party"):
            incoming.write(each, 0, data)
    for offset, piece in ((8, data), (0, data + b"x")):
        with pytest.raises(BadInput, match="do not follow"):
            incoming.write(name, offset, piece)
    incoming.write(name, 0, data)
    with pytest.raises(BadInput):
        incoming.write(name, 0, data)
    assert sorted(path.name for path in store.root.iterdir()) == [
        f".incoming-{made.manifest.digest()}",
        ".lock",
        "register",
    ]


def test_wrong_content_is_refused_and_can_be_sent_again(store: ModelStore) -> None:
    made = sharing()
    names = list(made.manifest.held(2))
    good = made.words(names[-1])
    with pytest.raises(WrongShare, match=rf"{names[-1]}: what arrived has not"):
        upload(store, made, words={names[-1]: bytes([good[0] ^ 1]) + good[1:]})
    store._end_upload(made.manifest.digest())
    incoming = begin(store, made)
    assert [incoming.have()[name] for name in names[-2:]] == [len(made.words(names[-2])), 0]
    incoming.close()
    upload(store, made)
    assert store.models()


@pytest.mark.parametrize("number", [0, 1])
def test_seeds_are_those_of_the_manifest_and_of_this_party(store: ModelStore, number: int) -> None:
    """Also when the upload is gone on with, or the model is there already; nothing is begun otherwise."""
    made = sharing()
    for resumed in (False, True):
        for wrong in (bytes(32), made.raw_seeds[1], made.raw_seeds[(2 + number + 1) % 3]):
            seeds = list(made.seeds(2))
            seeds[number] = ShareSeed(wrong)
            with pytest.raises(WrongShare, match=f"seed of component {(2 + number) % 3} is not"):
                store.begin(made.manifest.public(), (seeds[0], seeds[1]))
        if not resumed:
            assert sorted(path.name for path in store.root.iterdir()) == [".lock", "register"]
        begin(store, made).close()
    upload(store, made)
    with pytest.raises(WrongShare):
        store.begin(made.manifest.public(), (ShareSeed(bytes(32)), ShareSeed(bytes(32))))


def test_the_hash_of_a_component_says_nothing_to_who_has_the_others() -> None:
    """A guess of the weights gives the third component; without its seed no hash can be compared."""
    made = sharing()
    tensor = made.manifest.tensors[0]
    guess = made.words(tensor.name)
    for other in ((tensor.explicit + 1) % 3, (tensor.explicit + 2) % 3):
        whole = component_hash(tensor.explicit, 0, ShareSeed(made.raw_seeds[other]))
        whole.update(guess)
        assert whole.hexdigest() != tensor.sha256
    assert hashlib.sha256(guess).hexdigest() != tensor.sha256


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_share_of_an_older_format_is_refused_with_the_remedy(store: ModelStore, number: int) -> None:
    """Of before the seeds, today's key streams, and words of 4 bytes; on the wire and on disk."""
    made = sharing()
    old = {**made.manifest.public(), "format": number}
    if number == 1:
        old["tensors"] = [[name, shape, ["0" * 64] * 3] for name, shape, _ in old["tensors"]]
        del old["seeds"]
    with pytest.raises(BadInput, match=rf"format {number}; this program reads 6: provision the model again"):
        store.begin(old, made.seeds(2))
    upload(store, made)
    home = store.root / made.manifest.digest()
    (home / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(StoreError, match=rf"format {number}; .*provision the model again"):
        store.open(made.manifest.digest())
    assert store.models() == {}


def test_two_uploads_of_one_sharing_at_once_are_refused(store: ModelStore) -> None:
    made = sharing()
    incoming = begin(store, made)
    with pytest.raises(BadInput, match="right now"):
        begin(store, made)
    incoming.discard()
    assert sorted(path.name for path in store.root.iterdir()) == [".lock", "register"]
    begin(store, made).close()


def test_unfinished_uploads_do_not_pile_up(store: ModelStore) -> None:
    for seed in range(MAX_INCOMPLETE + 3):
        begin(store, sharing(seed)).close()
    assert len([path for path in store.root.iterdir() if path.is_dir()]) == MAX_INCOMPLETE


@pytest.mark.parametrize(
    "fault", ["flip", "shorten", "grow", "loose file", "loose folder", "link", "manifest", "gone"]
)
def test_damage_on_disk_is_found_on_load(store: ModelStore, fault: str) -> None:
    made = sharing()
    manifest = made.manifest
    upload(store, made)
    store.close()
    home = store.root / manifest.digest()
    path = home / f"{list(manifest.held(2))[1]}.words"
    data = path.read_bytes()
    if fault == "flip":
        path.write_bytes(bytes([data[0] ^ 128]) + data[1:])
    elif fault == "shorten":
        path.write_bytes(data[:-8])
    elif fault == "grow":
        path.write_bytes(data + bytes(8))
    elif fault == "loose file":
        path.chmod(0o640)
    elif fault == "loose folder":
        home.chmod(0o750)
    elif fault == "link":
        path.rename(store.root / "elsewhere")
        path.symlink_to(store.root / "elsewhere")
    elif fault == "manifest":
        changed = json.loads((home / "manifest.json").read_text())
        changed["name"] = "other"
        (home / "manifest.json").write_text(json.dumps(changed))
    elif fault == "gone":
        path.unlink()
    again = open_store(store.root, 2, PARTIES)
    with pytest.raises(StoreError) as caught:
        again.open(manifest.digest())
    assert str(home) in str(caught.value)
    assert fault != "link" or "is a link" in str(caught.value)
    again.models()  # names what is whole, and does not fail


def test_files_of_another_user_are_refused(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sharing()
    manifest = made.manifest
    upload(store, made)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match="belongs to user"):
        store.open(manifest.digest())


def test_a_model_that_would_fill_the_disk_is_refused_at_once(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sharing()
    manifest = made.manifest
    need = manifest.stored(2)
    usage = shutil.disk_usage(store.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SPARE_DISK_BYTES + need - 1))
    with pytest.raises(EnvironmentMissing, match="make room"):
        begin(store, made)
    assert sorted(path.name for path in store.root.iterdir()) == [".lock", "register"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SPARE_DISK_BYTES + need))
    upload(store, made)


def test_a_store_belongs_to_one_process_and_one_federation(store: ModelStore) -> None:
    with pytest.raises(BadInput, match="in use"):
        open_store(store.root, 2, PARTIES)
    made = sharing()
    manifest = made.manifest
    upload(store, made)
    store.close()
    others = ("d" * 64, *PARTIES[1:])
    with pytest.raises(StoreError, match="other parties"):
        open_store(store.root, 2, others).open(manifest.digest())
    with pytest.raises(BadInput, match="other parties"):
        begin(open_store(store.root.parent / "new", 2, others), made)


def test_another_party_s_store_does_not_pass_for_this_one_s(store: ModelStore) -> None:
    made = sharing()
    manifest = made.manifest
    upload(store, made)
    store.close()
    with pytest.raises(BadInput, match="not here"):
        open_store(store.root, 1, PARTIES).open(manifest.digest())


def test_the_explicit_components_are_a_balanced_rule() -> None:
    """Part of the format: written down, so that no change of the code goes unnoticed."""
    assert explicit_components([1, 5, 3, 3, 2]) == (2, 0, 1, 2, 1)
    assert explicit_components([7, 7, 7, 7]) == (0, 1, 2, 0)
    assert explicit_components([0, 0]) == (0, 0)
    shapes = replace(SPEC, layers=22, width=2048, heads=32, kv_heads=4, head_dim=64, hidden=5632)
    sizes = list(shapes.sizes().values())
    filled = [
        sum(n for n, c in zip(sizes, explicit_components(sizes), strict=True) if c == component)
        for component in range(COMPONENTS)
    ]
    assert max(filled) < 1.01 * min(filled)


def test_a_manifest_is_read_back_as_it_was_and_the_digest_covers_all_of_it() -> None:
    manifest = sharing().manifest
    data = json.loads(manifest.canonical())
    assert Manifest.from_public(data) == manifest
    assert len({manifest.component_digest(number) for number in range(3)}) == 3
    seen = {manifest.digest()}

    def differs(change: object) -> None:
        digest = Manifest.from_public(change).digest()
        assert digest not in seen
        seen.add(digest)

    differs({**data, "name": "toy2"})
    differs({**data, "scale_bits": 15})
    differs({**data, "parties": ["d" * 64, *data["parties"][1:]]})
    differs({**data, "model": {**data["model"], "norm_eps": 1e-6}})
    first, *rest = data["tensors"]
    differs({**data, "tensors": [[first[0], first[1], "0" * 64], *rest]})
    differs({**data, "seeds": ["0" * 64, *data["seeds"][1:]]})


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": 2},
        {"format": True},
        {"seeds": ["0" * 64] * 2},
        {"seeds": None},
        {"name": "../up"},
        {"name": ""},
        {"name": 7},
        {"scale_bits": 0},
        {"scale_bits": True},
        {"scale_bits": 64},
        {"parties": ["a" * 64] * 3},
        {"parties": ["a" * 64, "b" * 64]},
        {"parties": None},
        {"tensors": []},
        {"tensors": None},
        {"tensors": [["embed", [4, 10], "0" * 64]]},
        {"tensors": [["embed", [1 << 62, 1 << 62], "0" * 64]]},
        {"model": {}},
        {"model": None},
        {"extra": 1},
    ],
)
def test_a_malformed_manifest_is_refused(change: dict[str, object]) -> None:
    data = json.loads(sharing().manifest.canonical())
    with pytest.raises((BadInput, ModelError)):
        Manifest.from_public({**data, **change})


def test_no_part_of_a_manifest_can_be_something_else() -> None:
    """Whatever stands in place of any value, the answer is an error of ours, never a crash."""
    data = json.loads(sharing().manifest.canonical())
    odd: list[object] = [None, True, -1, 1.5, "", "x", [], {}, [[]], "0" * 63]

    def walk(node: object, put: object) -> None:
        assert callable(put)
        for value in odd:
            put(value)
            try:
                Manifest.from_public(data)
            except MimirError:
                pass
        put(node)
        if isinstance(node, dict):
            for key in list(node):
                walk(node[key], lambda value, node=node, key=key: node.__setitem__(key, value))
        elif isinstance(node, list):
            for index in range(min(len(node), 3)):
                walk(node[index], lambda value, node=node, index=index: node.__setitem__(index, value))

    for key in list(data):
        walk(data[key], lambda value, key=key: data.__setitem__(key, value))
    assert Manifest.from_public(data) == sharing().manifest
