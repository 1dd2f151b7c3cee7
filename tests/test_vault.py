"""What lies on disk is unreadable, unforgeable, in place and the newest, whatever a crash or a thief did."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage import KEY, MemoryCounter, Shared, counter_of, open_store, open_vault, upload
from test_store import PARTIES, sharing

from mimir import vault as at_rest
from mimir.errors import BadInput, MimirError
from mimir.mpc import weights
from mimir.secret import Pages, StorageKey
from mimir.store import SEEDS, SEEDS_BYTES, ModelStore
from mimir.vault import Reader, StoreError, Vault, Writer

PARTY = 2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a file, and no waiting for a disk whose honesty is not what is tested."""
    monkeypatch.setattr(at_rest, "CHUNK", 48)
    monkeypatch.setattr(at_rest, "sync", lambda path: None)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[ModelStore, Any, Any]]:
    """A store with one model: (store, manifest, sharing)."""
    store = open_store(tmp_path / "models", PARTY, PARTIES)
    made = sharing()
    upload(store, made)
    yield store, made.manifest, made
    store.close()


def share_files(store: ModelStore, manifest: Any) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """Every share file with what reads it, that of the first tensor first."""
    home = store.root / manifest.digest()

    def read(name: str, path: Path, length: int) -> None:
        store.vault.reader("shares", name, path, length).into(memoryview(bytearray(length)))

    for tensor in manifest.held(PARTY).values():
        path = home / f"{tensor.name}.words"
        yield path, partial(read, store._name(home.name, tensor.name), path, tensor.nbytes)
    yield home / SEEDS, partial(read, f"{PARTY}/{home.name}/{SEEDS}", home / SEEDS, SEEDS_BYTES)


def test_no_byte_of_any_file_can_be_changed(held: Any) -> None:
    """All of them where the file is short; of the others the header, and a byte of every few."""
    store, manifest, _ = held
    home = store.root / manifest.digest()
    readers = [*share_files(store, manifest), (home / "manifest.json", lambda: store._manifest(home))]
    tried = 0
    for number, (path, read) in enumerate(readers):
        good = path.read_bytes()
        for at in [*range(60), *range(60, len(good), 1 if len(good) < 150 else 41 + number % 7)]:
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
            with pytest.raises(StoreError) as caught:
                read()
            assert str(path) in str(caught.value), at
            tried += 1
        path.write_bytes(good)
        read()
    assert tried > 700


def test_no_byte_of_the_register_can_be_changed(held: Any) -> None:
    store, _, _ = held
    store.close()
    path = store.root / at_rest.REGISTER
    good = path.read_bytes()
    for at in [*range(60), *range(60, len(good), 17)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(StoreError, match="register"):
            open_vault(store.root)
    path.write_bytes(good)
    open_vault(store.root).close()


def test_no_file_can_be_cut_or_lengthened(held: Any) -> None:
    store, manifest, _ = held
    path, read = next(share_files(store, manifest))
    good = path.read_bytes()
    for length in [*range(60), *range(60, len(good), 5)]:
        path.write_bytes(good[:length])
        with pytest.raises(StoreError, match=path.name):
            read()
    path.write_bytes(good + b"x")
    with pytest.raises(StoreError, match="grown"):
        read()


def test_a_length_that_lies_changes_the_key(held: Any) -> None:
    """A file cut at a chunk with its header adjusted: the expected length is the manifest's, and even a
    reader who believed the header would hold another key."""
    store, manifest, _ = held
    path, _ = next(share_files(store, manifest))
    header = at_rest.peek(path)
    cut = at_rest.Header(header.version, 2 * header.chunk, header.chunk)
    path.write_bytes(cut.encode() + path.read_bytes()[at_rest._HEADER.size : cut.size])
    name = store._name(manifest.digest(), path.stem)
    with pytest.raises(StoreError, match="expected"):
        store.vault.reader("shares", name, path, header.length)
    with pytest.raises(StoreError, match="chunk 0"):
        store.vault.reader("shares", name, path, cut.length).into(memoryview(bytearray(cut.length)))


def test_files_and_chunks_stay_where_they_are(held: Any) -> None:
    store, manifest, _components = held
    files = list(share_files(store, manifest))
    for (one, read_one), (two, read_two) in itertools.combinations(files, 2):
        a, b = one.read_bytes(), two.read_bytes()
        if len(a) != len(b):
            continue
        one.write_bytes(b), two.write_bytes(a)
        for read in (read_one, read_two):
            with pytest.raises(StoreError, match="version"):
                read()
        # With the header left in place the chunks are still another file's.
        head = at_rest._HEADER.size
        one.write_bytes(a[:head] + b[head:])
        with pytest.raises(StoreError, match="chunk 0"):
            read_one()
        one.write_bytes(a), two.write_bytes(b)
    path, read = files[0]
    good, header = path.read_bytes(), at_rest.peek(path)
    step = header.chunk + at_rest.AROUND
    chunks = [good[header.place(n) : header.place(n) + step] for n in range(header.chunks - 1)]
    rest = good[header.place(header.chunks - 1) :]
    for i, j in itertools.combinations(range(len(chunks)), 2):
        moved = list(chunks)
        moved[i], moved[j] = moved[j], moved[i]
        path.write_bytes(header.encode() + b"".join(moved) + rest)
        with pytest.raises(StoreError, match=f"chunk {i}"):
            read()
    path.write_bytes(header.encode() + chunks[0] * len(chunks) + rest)
    with pytest.raises(StoreError, match="chunk 1"):
        read()


def test_versions_of_a_file_do_not_mix(tmp_path: Path) -> None:
    key = StorageKey(KEY)
    paths, contents = [tmp_path / "one", tmp_path / "two"], [os.urandom(200) for _ in range(2)]
    for path, content in zip(paths, contents, strict=True):
        writer = Writer(key, "shares", "same name", path, 200)
        writer.write(content)
    one, two = (path.read_bytes() for path in paths)
    header = at_rest.peek(paths[0])
    place = header.place(1)
    step = header.chunk + at_rest.AROUND
    paths[0].write_bytes(one[:place] + two[place : place + step] + one[place + step :])
    with pytest.raises(StoreError, match="chunk 1"):
        Reader(key, "shares", "same name", paths[0], None, 200).into(memoryview(bytearray(200)))
    out = bytearray(200)
    Reader(key, "shares", "same name", paths[1], None, 200).into(memoryview(out))
    assert out == contents[1]
    for purpose, name in (("journal", "same name"), ("shares", "other name")):
        with pytest.raises(StoreError, match="chunk 0"):
            Reader(key, purpose, name, paths[1], None, 200).into(memoryview(bytearray(200)))


def test_what_failed_to_open_leaves_nothing(tmp_path: Path) -> None:
    """The chunks before the bad one were right, and are not handed out."""
    key, path = StorageKey(KEY), tmp_path / "file"
    Writer(key, "shares", "n", path, 200).write(b"\x5a" * 200)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    out = bytearray(200)
    with pytest.raises(StoreError):
        Reader(key, "shares", "n", path, None, 200).into(memoryview(out))
    assert out == bytearray(200)


@pytest.mark.parametrize("length", [0, 1, 47, 48, 49, 96, 97, 48 * 40])
@pytest.mark.parametrize("piece", [1, 48, 100, 5000])
def test_any_length_in_any_pieces_comes_back(tmp_path: Path, length: int, piece: int) -> None:
    key, path, content = StorageKey(KEY), tmp_path / "file", os.urandom(length)
    writer = Writer(key, "shares", "n", path, length)
    writer.write(b"")
    for at in range(0, length, piece):
        writer.write(content[at : at + piece])
    assert writer.size == length
    reader = Reader(key, "shares", "n", path, writer.header.version, length)
    assert b"".join(bytes(each) for each in reader.pieces()) == content
    assert content[:32] not in path.read_bytes() or length < 32


def test_an_interrupted_writer_goes_on_and_repeats_no_nonce(tmp_path: Path) -> None:
    key, path, content = StorageKey(KEY), tmp_path / "file", os.urandom(480)
    seen, at = set[bytes](), 0
    for stop in (100, 130, 300, 480):
        writer = Writer(key, "shares", "n", path, 480)
        assert writer.size == at // 48 * 48
        writer.write(content[writer.size : stop])
        writer.close()
        at = stop
        with open(path, "ab") as file:
            file.write(b"torn" if stop < 480 else b"")  # a crash in the midst of the next chunk
        raw, header = path.read_bytes(), writer.header
        nonces = {raw[header.place(n) : header.place(n) + 12] for n in range(at // 48)}
        assert len(nonces) == at // 48 and seen <= nonces, "what was written stays as it was"
        seen = nonces
    out = bytearray(480)
    Reader(key, "shares", "n", path, None, 480).into(memoryview(out))
    assert out == content


# --- what is newest ----------------------------------------------------------------------------------------


def test_an_old_file_put_back_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "vault"
    vault = open_vault(root)
    vault.put("journal", "epochs", b"1")
    saved = {path.name: path.read_bytes() for path in root.glob("epochs.*")}
    vault.put("journal", "epochs", b"2")
    assert vault.get("journal", "epochs") == b"2"
    (new,) = root.glob("epochs.*")
    new.write_bytes(*saved.values())
    with pytest.raises(StoreError, match="old one was put back"):
        vault.get("journal", "epochs")
    vault.close()


def test_a_model_shared_anew_is_not_served_from_its_old_files(held: Any) -> None:
    store, manifest, made = held
    digest = manifest.digest()
    old = store.root.parent / "old"
    shutil.copytree(store.root / digest, old)
    store.remove(digest)
    assert store.models() == {}
    shutil.copytree(old, store.root / digest)
    with pytest.raises(BadInput, match="not here"):
        store.open(digest)
    shutil.rmtree(store.root / digest)
    upload(store, made)
    for name in (f"{list(manifest.held(PARTY))[1]}.words", SEEDS):
        good = (store.root / digest / name).read_bytes()
        shutil.copy(old / name, store.root / digest / name)
        with pytest.raises(StoreError, match=rf"{name}: not the version"):
            store.open(digest)
        (store.root / digest / name).write_bytes(good)


@pytest.mark.parametrize("back", [1, 2, 5])
def test_an_old_directory_put_back_is_refused(tmp_path: Path, back: int) -> None:
    root = tmp_path / "vault"
    vault = open_vault(root)
    states = []
    for number in range(6):
        states.append(tmp_path / f"state{number}")
        shutil.copytree(root, states[-1])
        vault.put("journal", "epochs", b"%d" % number)
    vault.close()
    shutil.rmtree(root)
    shutil.copytree(states[-back], root)
    (root / ".lock").unlink()
    with pytest.raises(StoreError, match="put back to an earlier state"):
        open_vault(root)


def test_a_counter_that_fell_behind_is_refused(tmp_path: Path) -> None:
    root, counter = tmp_path / "vault", MemoryCounter()
    vault = open_vault(root, counter=counter)
    for _ in range(3):
        vault.put("journal", "epochs", b"x")
    vault.close()
    with pytest.raises(StoreError, match="the counter was lost or put back"):
        open_vault(root, counter=MemoryCounter())
    open_vault(root, counter=counter).close()


def test_another_storage_key_opens_nothing(held: Any) -> None:
    store, _, _ = held
    store.close()
    with pytest.raises(StoreError, match="another storage key"):
        open_vault(store.root, key=bytes(32))


def test_a_store_without_encryption_is_refused(tmp_path: Path) -> None:
    """As it was before this: a directory of words, no register."""
    made = sharing()
    home = tmp_path / "models" / made.manifest.digest()
    home.mkdir(mode=0o700, parents=True)
    (tmp_path / "models").chmod(0o700)
    (home / "manifest.json").write_bytes(made.manifest.canonical())
    for name in made.manifest.held(PARTY):
        (home / f"{name}.words").write_bytes(made.words(name))
    with pytest.raises(StoreError, match=r"without\s+encryption.* provision again"):
        open_store(tmp_path / "models", PARTY, PARTIES)


def test_a_plain_file_among_sealed_ones_is_refused(held: Any) -> None:
    store, manifest, made = held
    for name, content in ((f"{next(iter(manifest.held(PARTY)))}.words", None), (SEEDS, bytes(SEEDS_BYTES))):
        path = store.root / manifest.digest() / name
        good = path.read_bytes()
        path.write_bytes(content or made.words(path.stem))
        with pytest.raises(StoreError, match=rf"{path.name}: not encrypted"):
            store.open(manifest.digest())
        path.write_bytes(good)
    store.open(manifest.digest())


def test_no_share_byte_lies_on_disk(held: Any) -> None:
    """Not in any file, the unfinished upload's included; a control shows that the search finds."""
    store, _, made = held
    other = sharing(9)
    incoming = store.begin(other.manifest.public(), other.seeds(PARTY))
    for name in incoming.have():
        incoming.write(name, 0, other.words(name))
    disk = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    disk += b"".join(str(path).encode() for path in store.root.rglob("*"))
    words = 0
    for source in (made, other):
        for part in [*itertools.chain(*source.components.values()), *source.raw_seeds]:
            for at in range(0, len(part) - 8, 8):
                assert part[at : at + 8] not in disk
                words += 1
    assert words > 1000
    assert KEY[:8] not in disk
    assert manifest_name_of(disk), "what is public is found by the same search"
    incoming.discard()


def manifest_name_of(disk: bytes) -> bool:
    return b'"name":"toy"' in disk


# --- memory ------------------------------------------------------------------------------------------------


def test_what_may_not_be_kept_is_made_each_time_a_piece_at_a_time_and_wiped(
    held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, manifest, made = held
    digest = manifest.digest()
    tensor = manifest.tensors[0]
    assert isinstance(store.open(digest).get(tensor.name)[0], np.ndarray)
    store.close()
    monkeypatch.setattr(weights, "SCRATCH", 128)
    monkeypatch.setattr(weights, "LEAST_ROWS", 1)
    lean = open_store(store.root, PARTY, PARTIES, keep=0)
    model = lean.open(digest)
    assert model.kept_bytes == 0
    for each in manifest.tensors:
        for number, component in enumerate(model.get(each.name)):
            explicit = (PARTY + number) % 3 == each.explicit
            assert isinstance(component, weights.Stored if explicit else weights.KeyStream)
            assert made.components[each.name][(PARTY + number) % 3] not in repr(component).encode()
            seen, views = b"", []
            for _, rows in component.blocks():
                seen += rows.tobytes()
                views.append(rows)
            assert seen == made.components[each.name][(PARTY + number) % 3]
            assert len({view.ctypes.data for view in views}) == 1, "one buffer for all blocks"
            assert len(views) > 1 or each.nbytes <= 8 * 128
            assert not any(view.any() for view in views)
    lean.close()


def test_pages_are_zero_when_they_go() -> None:
    pages = Pages(5000)
    words = np.frombuffer(pages, np.uint8)
    pages[:4] = b"abcd"
    address = pages.address()
    assert words[0] == ord("a") and address
    pages.wipe()
    assert not words.any()


# --- crashes -----------------------------------------------------------------------------------------------


class _File:
    def __init__(self) -> None:
        self.now = bytearray()
        self.safe = b""


class _Folder:
    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.safe: dict[str, Any] = {}


class Disk:
    """Records what is done to a directory, and can tell what would be there had the power failed.

    Of what was not synced, any part may have come through: here all of it, none, only names, only content.
    """

    def __init__(self, root: Path, counter: MemoryCounter) -> None:
        self.root, self.counter = root, counter
        self.log: list[tuple[Any, ...]] = []

    @contextmanager
    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        write, move, unlink, mkdir, advance = (
            at_rest.write_at,
            os.rename,
            os.unlink,
            os.mkdir,
            self.counter.advance,
        )

        def keep(*event: Any) -> None:
            self.log.append(event)

        def write_at(path: Path, offset: int, data: bytes) -> None:
            keep("write", path, offset, bytes(data))
            write(path, offset, data)

        with monkeypatch.context() as patch:
            patch.setattr(at_rest, "write_at", write_at)
            patch.setattr(at_rest, "sync", lambda path: keep("sync", path))
            patch.setattr(os, "rename", lambda a, b: (keep("rename", a, b), move(a, b)))
            patch.setattr(
                os,
                "unlink",
                lambda p, **kw: (keep("unlink", Path(p)) if Path(p).exists() else 0, unlink(p, **kw)),
            )
            patch.setattr(os, "mkdir", lambda p, *a, **kw: (mkdir(p, *a, **kw), keep("mkdir", Path(p))))
            patch.setattr(self.counter, "advance", lambda: (keep("advance"), advance())[1])
            yield

    def after(self, base: Path, steps: int, names: str, content: str, torn: bool, to: Path) -> int:
        """Lay out at `to` what a crash after so many steps leaves of `base`; returns the counter's steps."""
        top, count = self._read(base), 0
        for number, (what, *rest) in enumerate(self.log[:steps]):
            if what == "advance":
                count += 1
                continue
            folder, name = self._at(top, rest[0])
            if what == "mkdir":
                folder.now[name] = _Folder()
            elif what == "unlink":
                del folder.now[name]
            elif what == "rename":
                other, target = self._at(top, rest[1])
                other.now[target] = folder.now.pop(name)
            elif what == "write":
                offset, data = rest[1], rest[2]
                if torn and number == steps - 1:
                    data = data[: len(data) // 2]
                file = folder.now.setdefault(name, _File())
                file.now += bytes(max(0, offset + len(data) - len(file.now)))
                file.now[offset : offset + len(data)] = data
            elif what == "sync":
                node = top if rest[0] == self.root else folder.now[name]
                node.safe = dict(node.now) if isinstance(node, _Folder) else bytes(node.now)
        self._write(top, names, content, to)
        return count

    def _at(self, top: _Folder, path: Path) -> tuple[_Folder, str]:
        *way, name = path.relative_to(self.root).parts or ("",)
        for each in way:
            top = top.now[each]
        return top, name

    def _read(self, place: Path) -> _Folder:
        folder = _Folder()
        for each in place.iterdir():
            if each.is_dir():
                folder.now[each.name] = self._read(each)
            else:
                file = folder.now[each.name] = _File()
                file.now, file.safe = bytearray(each.read_bytes()), each.read_bytes()
        folder.safe = dict(folder.now)
        return folder

    def _write(self, folder: _Folder, names: str, content: str, to: Path) -> None:
        to.mkdir(mode=0o700)
        for name, node in getattr(folder, names).items():
            if isinstance(node, _Folder):
                self._write(node, names, content, to / name)
            else:
                (to / name).write_bytes(getattr(node, content))
                (to / name).chmod(0o600)


def crashes(disk: Disk, base: Path, place: Path, dense: int = 1000) -> Iterator[tuple[str, int]]:
    """Every state that a crash may leave, laid out at `place` in turn, with the counter's steps till then.

    Of what comes before the last `dense` steps, every 23rd."""
    for steps in range(len(disk.log) + 1):
        if steps % 23 and steps < len(disk.log) - dense:
            continue
        writes = steps > 0 and disk.log[steps - 1][0] == "write"
        for names, content, torn in itertools.product(("now", "safe"), ("now", "safe"), (False, True)):
            if torn and not (writes and content == "now"):
                continue
            shutil.rmtree(place, ignore_errors=True)
            count = disk.after(base, steps, names, content, torn, place)
            yield f"{steps} of {len(disk.log)}, names {names}, content {content}, torn {torn}", count


def check_whole(store: ModelStore, made: Shared, state: str) -> None:
    model = store.open(made.manifest.digest())
    for name, parts in made.components.items():
        for number, component in enumerate(model.get(name)):
            assert weights.array(component).tobytes() == parts[(PARTY + number) % 3], state


def test_a_crash_anywhere_in_an_upload_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    old, new = sharing(1), sharing(2)
    store = open_store(root, PARTY, PARTIES)
    upload(store, old)
    base, counter = tmp_path / "base", counter_of(root)
    shutil.copytree(root, base)
    start = counter.count
    disk = Disk(root, counter)
    with disk.watch(monkeypatch):
        upload(store, new, piece=5000)
    store.close()
    kinds = [event[0] for event in disk.log]
    assert kinds[-1] == "advance" and {"mkdir", "write", "sync", "rename"} <= set(kinds)
    place, outcomes = tmp_path / "after", set[bool]()
    for state, count in crashes(disk, base, place, dense=10):
        counter_of(place).count = start + count
        again = open_store(place, PARTY, PARTIES)
        check_whole(again, old, state)
        there = new.manifest.digest() in again.models()
        outcomes.add(there)
        if not there:
            upload(again, new, piece=5000)
        check_whole(again, new, state)
        again.close()
    assert outcomes == {False, True}
    assert there, "and after the last step it is there"


def test_a_crash_anywhere_in_a_change_of_a_small_file_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "vault"
    vault = open_vault(root)
    vault.put("journal", "epochs", b"old")
    base, counter = tmp_path / "base", counter_of(root)
    shutil.copytree(root, base)
    start = counter.count
    disk = Disk(root, counter)
    with disk.watch(monkeypatch):
        vault.put("journal", "epochs", b"new")
    done = next(n for n, event in enumerate(disk.log, 1) if event[0] == "advance")
    place, outcomes = tmp_path / "after", set[bytes]()
    for state, count in crashes(disk, base, place):
        counter_of(place).count = start + count
        again = open_vault(place)
        found = bytes(again.get("journal", "epochs") or b"")
        outcomes.add(found)
        assert found == b"new" or (found == b"old" and int(state.split()[0]) < done), state
        assert len(list(place.glob("epochs.*"))) == 1, "what the crash left is gone"
        again.close()
    assert outcomes == {b"old", b"new"}


def test_a_crash_while_opening_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "vault"
    vault = open_vault(root)
    vault.put("journal", "epochs", b"kept")
    vault.close()
    base, counter = tmp_path / "base", counter_of(root)
    shutil.copytree(root, base)
    start = counter.count
    disk = Disk(root, counter)
    with disk.watch(monkeypatch):
        open_vault(root).close()
    place = tmp_path / "after"
    for state, count in crashes(disk, base, place):
        counter_of(place).count = start + count
        again = open_vault(place)
        assert again.get("journal", "epochs") == b"kept", state
        again.close()


def test_a_register_that_a_crash_left_uncounted_never_serves_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thief copies the disk at every moment, and puts each copy back once later changes are confirmed."""
    root = tmp_path / "vault"
    vault = open_vault(root)
    vault.put("journal", "epochs", b"1")
    base, counter = tmp_path / "base", counter_of(root)
    shutil.copytree(root, base)
    start = counter.count
    disk = Disk(root, counter)
    with disk.watch(monkeypatch):
        vault.put("journal", "epochs", b"lost in the crash")
    place, refused = tmp_path / "after", 0
    for _state, count in crashes(disk, base, place):
        stolen = tmp_path / "stolen"
        shutil.rmtree(stolen, ignore_errors=True)
        shutil.copytree(place, stolen)
        counter_of(place).count = start + count
        again = open_vault(place)
        again.put("journal", "epochs", b"confirmed")
        again.close()
        shutil.rmtree(place)
        shutil.copytree(stolen, place)
        with pytest.raises(StoreError, match="put back"):
            open_vault(place)
        refused += 1
    assert refused > 10


def test_after_a_failed_change_nothing_more_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = open_vault(tmp_path / "vault")

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(at_rest, "sync", fail)
        with pytest.raises(OSError):
            vault.change({"a": bytes(32)})
    with pytest.raises(StoreError, match="start the party again"):
        vault.change({"b": bytes(32)})
    vault.close()


# --- each check is needed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["version", "counter", "position", "name"])
def test_each_binding_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    """The attack that each one stops succeeds without it."""
    root = tmp_path / "vault"
    if without == "name":
        monkeypatch.setattr(at_rest, "derive", lambda key, purpose, context: bytearray(32))
    if without == "position":
        close, opened = at_rest._Cipher.close, at_rest._Cipher.open
        monkeypatch.setattr(at_rest._Cipher, "close", lambda self, index, content: close(self, 0, content))
        monkeypatch.setattr(
            at_rest._Cipher, "open", lambda self, index, stored, out: opened(self, 0, stored, out)
        )
    vault = open_vault(root)
    vault.put("journal", "epochs", b"1" * 48 + b"2" * 48)
    vault.put("journal", "others", b"another")
    if without == "version":
        (path,) = root.glob("epochs.*")
        old, version = path.read_bytes(), vault._listed["epochs"]
        vault.put("journal", "epochs", b"new")
        vault._listed["epochs"] = version
        vault._small("epochs").write_bytes(old)
        vault._small("epochs").chmod(0o600)
        assert vault.get("journal", "epochs") == b"1" * 48 + b"2" * 48
    elif without == "counter":
        saved = tmp_path / "saved"
        shutil.copytree(root, saved)
        vault.put("journal", "epochs", b"new")
        counter_of(root).count -= 1
        vault.close()
        shutil.rmtree(root)
        shutil.copytree(saved, root)
        assert open_vault(root).get("journal", "epochs") == b"1" * 48 + b"2" * 48
    elif without == "position":
        (path,) = root.glob("epochs.*")
        header, raw = at_rest.peek(path), path.read_bytes()
        step = header.chunk + at_rest.AROUND
        body = raw[header.place(0) :]
        path.write_bytes(header.encode() + body[step:] + body[:step])
        assert vault.get("journal", "epochs") == b"2" * 48 + b"1" * 48
    else:
        (path,), (other,) = root.glob("epochs.*"), root.glob("others.*")
        vault._listed["epochs"] = vault._listed["others"]
        shutil.copy(other, vault._small("epochs"))
        assert vault.get("journal", "epochs") == b"another"


def test_the_register_lists_no_more_than_names_and_versions(held: Any) -> None:
    store, manifest, _ = held
    raw = at_rest.unseal(StorageKey(KEY), "register", "register", store.root / "register", None)
    found = json.loads(raw)
    assert set(found) == {"number", "files"}
    assert len(found["files"]) == len(manifest.held(PARTY)) + 1
    assert issubclass(StoreError, MimirError) and Vault.__doc__


def test_what_is_somebody_elses_may_be_there_before_the_register(tmp_path: Path) -> None:
    """Such as revocations copied from another party, before the first start."""
    root = tmp_path / "data"
    root.mkdir(mode=0o700)
    (root / "revocations").write_text("public")
    with pytest.raises(StoreError, match="no register"):
        Vault(root, StorageKey(KEY), MemoryCounter())
    Vault(root, StorageKey(KEY), MemoryCounter(), {"revocations"})
