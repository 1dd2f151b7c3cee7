"""Components that are not in memory: the same results as of arrays, bit for bit, in little memory."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from parties import DictWeights, Party, reconstruct, run_parties, share_weights

from mimir import kernels
from mimir.errors import LocalError, PeerError
from mimir.mpc import ops, prep, weights
from mimir.mpc.domain import Ring
from mimir.mpc.weights import KeyStream, Matrix, Stored, array, combine, product
from mimir.secret import Pages, ShareSeed

KEY = b"\x05" * 32
STREAM = 7
# Widths that do and do not end with a block of the key stream, heights that do not divide, single rows.
SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (13, 3),
    (64, 8),
    (33, 12),
    (50, 10),
    (129, 5),
    (40, 66),
    (300, 17),
    (9, 64),
]
VECTORS = [(1,), (5,), (8,), (300,)]


@pytest.fixture(params=[(1, 1), (64, 1), (1000, 1), (1, 6), (1 << 20, 16)], ids=str, autouse=True)
def scratch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes and rows of a block, from the smallest to those that are used; no buffer waits from elsewhere."""
    monkeypatch.setattr(weights, "_spare", {False: [], True: []})
    monkeypatch.setattr(weights, "SCRATCH", request.param[0])
    monkeypatch.setattr(weights, "LEAST_ROWS", request.param[1])
    size, rows = request.param
    return size, rows


def whole(shape: tuple[int, ...], dtype: Any = np.uint64) -> npt.NDArray[Any]:
    words = np.empty(shape, dtype)
    kernels.prg(KEY, STREAM, words)
    return words


def in_pieces(words: npt.NDArray[Any], size: int) -> Iterator[memoryview]:
    """In one buffer, which is overwritten when the next piece is asked for."""
    data, room = words.tobytes(), bytearray(size)
    for at in range(0, len(data), size):
        piece = data[at : at + size]
        room[: len(piece)] = piece
        yield memoryview(room)[: len(piece)]
    room[:] = b"\xff" * size


def forms(shape: tuple[int, ...], dtype: Any) -> list[Any]:
    """The same component, from both sources."""
    words, of = whole(shape, dtype), np.dtype(dtype)
    stored = [
        Stored(functools.partial(in_pieces, words, size), shape, of) for size in (1, 8, 24, 100, 1 << 16)
    ]
    return [KeyStream(ShareSeed(KEY), STREAM, shape, of), *stored]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.uint64, np.uint32])
def test_results_are_those_of_an_array(
    shape: tuple[int, int], rng: np.random.Generator, dtype: type[Any]
) -> None:
    want = whole(shape, dtype)
    r = rng.integers(0, 1 << 48, shape[1], np.uint64)
    for form in forms(shape, dtype):
        assert form.shape == shape and form.dtype == dtype
        assert np.array_equal(array(form), want)
        combined = np.empty((shape[0], kernels.GR_DEGREE), np.uint64)
        combine(form, r, combined)
        assert np.array_equal(combined, kernels.gr_combine(want.astype(np.uint64), r))
        combine(want, r, combined[:])
        assert np.array_equal(combined, kernels.gr_combine(want.astype(np.uint64), r))
        for m in (1, 3, 12):
            x = rng.integers(0, 1 << 64, (m, shape[0]), np.uint64).astype(dtype)
            out = np.full((m, shape[1]), 9, dtype)
            assert product(x, form, out) is out
            assert np.array_equal(out, x @ want)  # NumPy's product wraps too
            product(x, form, out, add=True)
            assert np.array_equal(out, dtype(2) * (x @ want))
    assert array(want) is want


@pytest.mark.parametrize("shape", VECTORS, ids=str)
def test_a_vector_is_one_row(shape: tuple[int]) -> None:
    for form in forms(shape, np.uint64):
        assert array(form).shape == shape and np.array_equal(array(form), whole(shape))


def spare(locked: bool = False) -> list[Pages]:
    """Buffers that wait for the next pass: all of them must be zero."""
    assert not any(bytes(pages).strip(b"\0") for pages in weights._spare[locked])
    return weights._spare[locked]


@pytest.mark.parametrize("shape", [*SHAPES, *VECTORS], ids=str)
@pytest.mark.parametrize("dtype", [np.uint64, np.uint32])
def test_the_scratch_buffer_is_bounded_reused_and_wiped(
    shape: tuple[int, ...], scratch: tuple[int, int], dtype: Any
) -> None:
    size = np.dtype(dtype).itemsize
    unit = math.lcm(kernels.BLOCK_BYTES, size * shape[-1]) // (size * shape[-1])
    for form in forms(shape, dtype):
        spare().clear()
        for _ in range(2):
            at, places = 0, set[int]()
            for first, rows in form.blocks():
                assert first == at
                at += len(rows)
                places.add(rows.ctypes.data)
                assert not spare(), "lent"
            assert at == math.prod(shape[:-1])
            (pages,) = spare()
            assert places == {pages.address()}
            assert not rows.any()
            width = size * shape[-1]
            assert len(pages) <= max(scratch[0], width * scratch[1]) + width * (unit - 1)


def test_passes_at_once_have_buffers_of_their_own_and_an_abandoned_one_is_wiped() -> None:
    wide, narrow = (KeyStream(ShareSeed(KEY), STREAM, shape) for shape in ((40, 66), (1, 4)))
    passes: list[Any] = [wide.blocks(), narrow.blocks()]
    views = [next(each)[1] for each in passes]
    assert views[0].any() and views[1].any() and not np.may_share_memory(*views)
    for each in passes:
        each.close()
    assert not views[0].any() and not views[1].any()
    assert len(spare()) == 2
    # The narrow one, which came back last, is asked first, is too small, and is given up.
    next(wide.blocks())
    assert len(spare()) == 1
    assert np.array_equal(array(wide), whole((40, 66)))
    assert len(spare()) == 1


def test_a_failing_source_leaves_nothing() -> None:
    def failing() -> Iterator[memoryview]:
        yield memoryview(b"secret!!")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        array(Stored(failing, (3, 5)))
    gc.collect()
    assert len(spare()) == 1


def test_a_component_shows_nothing_and_locks_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    monkeypatch.setattr(Pages, "lock", lambda self: locked.append(len(self)) or 0)
    for form in (
        KeyStream(ShareSeed(KEY), 1, (2, 3), lock=True),
        Stored(lambda: in_pieces(whole((2, 3)), 16), (2, 3), lock=True),
    ):
        assert repr(form) == f"<{type(form).__name__} (2, 3)>"
        array(form)
    assert locked and len(spare(locked=True)) == 1 and not spare()


def test_a_source_that_ends_early_is_an_error_and_one_that_fails_is_heard() -> None:
    short = Stored(lambda: in_pieces(whole((3, 4)), 8), (3, 5))
    with pytest.raises(LocalError, match=r"shorter than its shape \(3, 5\)"):
        array(short)

    def failing() -> Iterator[memoryview]:
        yield memoryview(bytes(8))
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        array(Stored(failing, (3, 5)))


# --- in the protocol ---------------------------------------------------------------------------------------


def streamed(values: Ring) -> list[DictWeights]:
    """A weight of which no component is an array: component 1 is stored, the others are key streams."""
    seeds = [bytes([40 + c]) * 32 for c in range(3)]
    masks = {}
    for c in (0, 2):
        masks[c] = np.empty(values.shape, np.uint64)
        kernels.prg(seeds[c], STREAM, masks[c])
    rest = values - masks[0] - masks[2]

    def component(c: int) -> Matrix:
        if c == 1:
            return Stored(functools.partial(in_pieces, rest, 40), values.shape)
        return KeyStream(ShareSeed(seeds[c]), STREAM, values.shape)

    return [DictWeights({"w": (component(i), component((i + 1) % 3))}) for i in range(3)]


def multiplied(x: Ring, shared: list[DictWeights]) -> list[Ring]:
    async def party(p: Party) -> Ring:
        ctx = await p.context({prep.Weight("w"): len(x)})
        return (await ops.matmul(ctx, "product", (p.share(x), "w"))).v

    return run_parties(party, weights=shared)


def test_a_product_with_a_shared_weight_is_the_same_from_streams(
    rng: np.random.Generator, scratch: tuple[int, int]
) -> None:
    """Made, verified and used; with the expanded result altered at one party, the check fails."""
    values = rng.integers(0, 1 << 64, (21, 11), np.uint64)
    x = rng.integers(0, 1 << 64, (3, 21), np.uint64)
    want = kernels.matmul(x, values)
    assert np.array_equal(reconstruct(multiplied(x, share_weights({"w": values}))), want)
    assert np.array_equal(reconstruct(multiplied(x, streamed(values))), want)


@pytest.mark.parametrize(("cheater", "number"), [(0, 0), (1, 1), (2, 0)])
def test_an_altered_expansion_ends_the_session(
    rng: np.random.Generator, scratch: tuple[int, int], cheater: int, number: int
) -> None:
    values = rng.integers(0, 1 << 64, (21, 11), np.uint64)
    shared = streamed(values)
    pair = list(shared[cheater].pair("w"))
    altered = array(pair[number]).copy()
    altered[20, 10] ^= np.uint64(1 << 63)
    pair[number] = altered
    shared[cheater] = DictWeights({"w": (pair[0], pair[1])})
    with pytest.raises(BaseExceptionGroup) as caught:
        multiplied(rng.integers(0, 1 << 64, (3, 21), np.uint64), shared)
    assert caught.group_contains(PeerError)
