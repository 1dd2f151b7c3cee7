"""Shares on disk: nothing half there, nothing unchecked, nothing readable by others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from storage import open_store

from mimir import vault as at_rest
from mimir.errors import BadInput, EnvironmentMissing, LocalError, MimirError, ModelError
from mimir.manifest import COMPONENTS, Manifest, Tensor
from mimir.model.checkpoint import PlanSpec
from mimir.store import MAX_INCOMPLETE, SIDES, SPARE_DISK_BYTES, ModelStore, StoreError

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


def sharing(seed: int = 1) -> tuple[Manifest, dict[str, list[bytes]]]:
    """A model of random components: manifest, and per tensor the three components' bytes."""
    rng = np.random.default_rng(seed)
    tensors, components = [], {}
    for name, shape in SPEC.shapes().items():
        parts = [rng.integers(0, 2**64, shape, dtype=np.uint64).tobytes() for _ in range(COMPONENTS)]
        components[name] = parts
        hashes = [hashlib.sha256(part).hexdigest() for part in parts]
        tensors.append(Tensor(name, shape, (hashes[0], hashes[1], hashes[2])))
    return Manifest("toy", SPEC, 16, (PARTIES[0], PARTIES[1], PARTIES[2]), tuple(tensors)), components


def upload(
    store: ModelStore, manifest: Manifest, components: dict[str, list[bytes]], piece: int = 100
) -> None:
    incoming = store.begin(manifest.public())
    have = incoming.have()
    for name, parts in components.items():
        for number, side in enumerate(SIDES):
            data = parts[(store.party + number) % 3]
            for at in range(have[name][number], len(data), piece):
                incoming.write(name, side, at, data[at : at + piece])
    incoming.verify()
    incoming.accept()
    incoming.close()


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return open_store(tmp_path / "models", 2, PARTIES)


def test_what_comes_out_is_what_went_in(store: ModelStore) -> None:
    manifest, components = sharing()
    upload(store, manifest, components)
    assert store.models() == {manifest.digest(): manifest}
    model = store.open(manifest.digest())
    for name, shape in SPEC.shapes().items():
        for number, words in enumerate(model.get(name)):
            assert words.shape == shape and words.dtype == np.uint64
            assert words.tobytes() == components[name][(2 + number) % 3]
            assert not words.flags.writeable
    assert store.open(manifest.digest()) is model
    with pytest.raises(LocalError):
        model.get("nonsense")


def test_it_survives_a_restart(store: ModelStore) -> None:
    manifest, components = sharing()
    upload(store, manifest, components)
    store.close()
    again = open_store(store.root, 2, PARTIES)
    assert again.open(manifest.digest()).manifest == manifest


def test_every_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = open_store(tmp_path / "models", 0, PARTIES)
        upload(store, *sharing())
    finally:
        os.umask(old)
    paths = [store.root, *store.root.rglob("*")]
    assert len(paths) > 20
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_an_upload_is_all_or_nothing(store: ModelStore) -> None:
    manifest, components = sharing()
    incoming = store.begin(manifest.public())
    incoming.write("embed", "a", 0, components["embed"][2])
    with pytest.raises(LocalError):
        incoming.accept()
    with pytest.raises(BadInput, match=r"embed\.b: 0 of 320 bytes"):
        incoming.verify()
    assert store.models() == {}
    with pytest.raises(BadInput, match="not here"):
        store.open(manifest.digest())


def test_an_upload_resumes_where_it_stopped_even_in_another_process(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_rest, "CHUNK", 32)
    manifest, components = sharing()
    incoming = store.begin(manifest.public())
    incoming.write("embed", "a", 0, components["embed"][2][:100])
    assert incoming.have()["embed"] == [100, 0]
    incoming.close()
    store.close()
    store = open_store(store.root, 2, PARTIES)
    incoming = store.begin(manifest.public())
    assert incoming.have()["embed"] == [96, 0], "whole chunks"
    incoming.close()
    upload(store, manifest, components)
    store.open(manifest.digest())


def test_a_second_upload_of_the_same_sharing_sends_nothing(store: ModelStore) -> None:
    manifest, components = sharing()
    upload(store, manifest, components)
    incoming = store.begin(manifest.public())
    assert incoming.complete and incoming.have()["embed"] == [320, 320]
    assert incoming.verify() == {number: manifest.component_digest(number) for number in (2, 0)}
    incoming.accept()


def test_pieces_must_follow_each_other(store: ModelStore) -> None:
    manifest, components = sharing()
    incoming = store.begin(manifest.public())
    data = components["embed"][2]
    for name, side, offset, piece in (
        ("embed", "a", 8, data),
        ("embed", "a", 0, data + b"x"),
        ("embed", "c", 0, data),
        ("../embed", "a", 0, data),
        ("nonsense", "a", 0, data),
    ):
        with pytest.raises(BadInput):
            incoming.write(name, side, offset, piece)
    incoming.write("embed", "a", 0, data)
    with pytest.raises(BadInput):
        incoming.write("embed", "a", 0, data)
    assert sorted(path.name for path in store.root.iterdir()) == [
        f".incoming-{manifest.digest()}",
        ".lock",
        "register",
    ]


def test_wrong_content_is_refused_and_can_be_sent_again(store: ModelStore) -> None:
    manifest, components = sharing()
    wrong = {name: list(parts) for name, parts in components.items()}
    wrong["head"][0] = bytes([wrong["head"][0][0] ^ 1]) + wrong["head"][0][1:]
    with pytest.raises(BadInput, match=r"head\.b: what arrived has not"):
        upload(store, manifest, wrong)
    store._end_upload(manifest.digest())
    incoming = store.begin(manifest.public())
    assert incoming.have()["head"] == [len(components["head"][0]), 0]
    incoming.close()
    upload(store, manifest, components)
    assert store.models()


def test_two_uploads_of_one_sharing_at_once_are_refused(store: ModelStore) -> None:
    manifest, _ = sharing()
    incoming = store.begin(manifest.public())
    with pytest.raises(BadInput, match="right now"):
        store.begin(manifest.public())
    incoming.discard()
    assert sorted(path.name for path in store.root.iterdir()) == [".lock", "register"]
    store.begin(manifest.public()).close()


def test_unfinished_uploads_do_not_pile_up(store: ModelStore) -> None:
    for seed in range(MAX_INCOMPLETE + 3):
        store.begin(sharing(seed)[0].public()).close()
    assert len([path for path in store.root.iterdir() if path.is_dir()]) == MAX_INCOMPLETE


@pytest.mark.parametrize(
    "fault", ["flip", "shorten", "grow", "loose file", "loose folder", "link", "manifest", "gone"]
)
def test_damage_on_disk_is_found_on_load(store: ModelStore, fault: str) -> None:
    manifest, components = sharing()
    upload(store, manifest, components)
    store.close()
    home = store.root / manifest.digest()
    path = home / "0.qkv.b"
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
    manifest, components = sharing()
    upload(store, manifest, components)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match="belongs to user"):
        store.open(manifest.digest())


def test_a_model_that_would_fill_the_disk_is_refused_at_once(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, components = sharing()
    need = 2 * manifest.nbytes
    usage = shutil.disk_usage(store.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SPARE_DISK_BYTES + need - 1))
    with pytest.raises(EnvironmentMissing, match="make room"):
        store.begin(manifest.public())
    assert sorted(path.name for path in store.root.iterdir()) == [".lock", "register"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SPARE_DISK_BYTES + need))
    upload(store, manifest, components)


def test_a_store_belongs_to_one_process_and_one_federation(store: ModelStore) -> None:
    with pytest.raises(BadInput, match="in use"):
        open_store(store.root, 2, PARTIES)
    manifest, components = sharing()
    upload(store, manifest, components)
    store.close()
    others = ("d" * 64, *PARTIES[1:])
    with pytest.raises(StoreError, match="other parties"):
        open_store(store.root, 2, others).open(manifest.digest())
    with pytest.raises(BadInput, match="other parties"):
        open_store(store.root.parent / "new", 2, others).begin(manifest.public())


def test_another_party_s_store_does_not_pass_for_this_one_s(store: ModelStore) -> None:
    manifest, components = sharing()
    upload(store, manifest, components)
    store.close()
    with pytest.raises(BadInput, match="not here"):
        open_store(store.root, 1, PARTIES).open(manifest.digest())


def test_a_manifest_is_read_back_as_it_was_and_the_digest_covers_all_of_it() -> None:
    manifest, _ = sharing()
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
    differs({**data, "tensors": [[first[0], first[1], ["0" * 64, *first[2][1:]]], *rest]})


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
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
        {"tensors": [["embed", [4, 10], ["0" * 64] * 3]]},
        {"tensors": [["embed", [1 << 62, 1 << 62], ["0" * 64] * 3]]},
        {"model": {}},
        {"model": None},
        {"extra": 1},
    ],
)
def test_a_malformed_manifest_is_refused(change: dict[str, object]) -> None:
    data = json.loads(sharing()[0].canonical())
    with pytest.raises((BadInput, ModelError)):
        Manifest.from_public({**data, **change})


def test_no_part_of_a_manifest_can_be_something_else() -> None:
    """Whatever stands in place of any value, the answer is an error of ours, never a crash."""
    data = json.loads(sharing()[0].canonical())
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
    assert Manifest.from_public(data) == sharing()[0]
