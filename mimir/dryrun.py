"""A session of one party, run over shapes: the engine's own code, with nothing in its arrays, and no peers.

`run` executes a whole `SessionActor`, from the clients' terms to the last token, preprocessing included.
Large arrays are one zero, stretched; kernels give results of the right shape and do no work; a round returns
at once what a peer of the same shape would send. What is left are the engine's decisions: which rounds, with
which step names and sizes, which kernels over how many elements, and which arrays are alive together. So
rounds and bytes are exact by construction, framing included, and follow every change of the engine; a kernel
or an array function that is not known here is really run, over zeros. The engine's Python does run, and its
calls are counted, those in threads included.

For planning, in a process that is no party: `run` replaces what the engine's modules call `kernels`, `np` and
`offload`, and what `doors` compares, while it runs, and puts all back. It would take a party's checks away.
So it raises `LocalError`, before anything is replaced, in a process that is or could be a party: one that has
imported anything of PARTY_MODULES, without which nobody can be a peer. And only the cost model imports this
module; tests hold both. It has no secret; every key is zero, nothing is sent.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import trio

import mimir.actors.session as session_module
import mimir.actors.shared as shared_module
from mimir import kernels
from mimir.actors import cause_of
from mimir.actors.decode import DecodeActor
from mimir.actors.lane import open_lane
from mimir.actors.session import Limits, SessionActor, Step, Turn, plan_turn, sized
from mimir.actors.triples import IN_HEAP, Batch, SharedProducer, TripleProducer, bytes_of
from mimir.config import TriplePool
from mimir.errors import BadInput, LocalError
from mimir.manifest import COMPONENTS, tensors_of
from mimir.model.checkpoint import PlanSpec
from mimir.mpc import doors as doors_module
from mimir.mpc import prep
from mimir.mpc.doors import Doors
from mimir.mpc.nonlinear import Settings
from mimir.mpc.offload import THREAD_WORK
from mimir.mpc.share import Share
from mimir.net import Payload, wire
from mimir.net.messages import Message, Open, Sampler
from mimir.secret import Secret
from mimir.store import KEPT_BYTES, kept

Array = npt.NDArray[Any]
SMALL: Final = 2048  # elements up to which an array is a real one
PARTY: Final = 0  # whose session is run; parties send alike
CLIENT: Final = "00" * 32
MEMORY: Final = TriplePool().memory_mib << 20
ONLINE, PREP = "online", "prep"
STREAMED: Final = ("matmul", "matmul32")  # kernels whose products of one row are counted apart, under a name
ONE_ROW: Final = " of one row"  # that ends so: they are bound by memory, not by multiplying
DECRYPT: Final = "decrypt"  # bytes of shares at rest
ARRAY, LARGE_ARRAY = "array", "large array"  # bytes read and written by functions of numpy
CACHED: Final = 1 << 20  # bytes of an array that may still lie in a cache
CALLS: Final = {lane: f"call {lane}" for lane in (ONLINE, PREP)}  # of functions, by the engine or within it
KERNEL: Final = "call of a kernel"  # beside its work
THREAD: Final = "work in a thread"  # `offload` of one piece, beside that work
GROWN: Final = "memory grown by"  # bytes by which arrays alive at once came to more than ever before
MAPPED: Final = "memory mapped"  # bytes of arrays so large that each is mapped, and cleared, anew
PYTHON: Final = (*CALLS.values(), KERNEL, THREAD)  # what several rows that go together need once
_ENGINE: Final = ("mimir.mpc.", "mimir.model.", "mimir.actors.")  # modules whose names are replaced
PARTY_MODULES: Final = ("mimir.net.mesh", "mimir.actors.peer", "mimir.party")  # none is a party without them

_lane: ContextVar[str] = ContextVar("lane", default="")  # of the running task; "" is not counted


# --- what is counted ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Counts:
    """Of one lane of one party, so far."""

    rounds: int = 0
    sent: int = 0  # bytes to both peers, framing included
    busiest: int = 0  # of these, bytes to the previous peer, who gets the larger part
    payload: int = 0  # of these, without framing
    hashed: int = 0  # bytes through SHA-256
    plans: int = 0  # how often a step was planned
    work: Counter[str] = field(default_factory=Counter)  # units by kernel; bytes of array functions; calls

    def copy(self) -> Counts:
        out = Counts(self.rounds, self.sent, self.busiest, self.payload, self.hashed, self.plans)
        out.work = Counter(self.work)
        return out

    def minus(self, o: Counts) -> Counts:
        out = Counts(
            self.rounds - o.rounds,
            self.sent - o.sent,
            self.busiest - o.busiest,
            self.payload - o.payload,
            self.hashed - o.hashed,
            self.plans - o.plans,
        )
        out.work = Counter({k: v - o.work[k] for k, v in self.work.items() if v != o.work[k]})
        return out


@dataclass(slots=True)
class Tally:
    """Everything counted in one run."""

    lanes: dict[str, Counts] = field(default_factory=lambda: {ONLINE: Counts(), PREP: Counts()})
    live: int = 0  # bytes of arrays alive
    peak: int = 0
    mapped: int = 0  # of these, in memory of their own
    heap: int = 0  # the most that the others took

    def add(self, key: str, units: float) -> None:
        lane = _lane.get()
        if lane:
            self.lanes[lane].work[key] += int(units)

    def grow(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        if size > IN_HEAP:
            self.mapped += size
            self.add(MAPPED, size)
        elif self.live - self.mapped > self.heap:
            self.add(GROWN, self.live - self.mapped - self.heap)
            self.heap = self.live - self.mapped

    def shrink(self, size: int) -> None:
        self.live -= size
        if size > IN_HEAP:
            self.mapped -= size


_tally = Tally()  # of the run in progress


# --- arrays of nothing --------------------------------------------------------------------------------------


class Stretched(np.ndarray[Any, Any]):
    """An array of any shape that is one zero; what is written to it is forgotten.

    An array made by `stretched` counts as alive, with the bytes a real one would take, until it and all views
    of it are gone.
    """

    _owned = 0
    _of: Tally | None = None
    _solid = False  # whether a real one would be contiguous

    def __array_finalize__(self, source: Any) -> None:
        self._solid = getattr(source, "_solid", False)

    def __del__(self) -> None:
        if self._owned and self._of is not None:
            self._of.shrink(self._owned)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> Any:
        if _is_basic(key):
            out = super().__getitem__(key)
            if isinstance(out, Stretched):
                out._solid = self._solid and _stays_solid(key, self.shape)
            return out
        shape = np.broadcast_to(np.zeros(1, np.bool_), self.shape)[key].shape
        return _result(shape, self.dtype)

    def copy(self, order: Any = "C") -> Any:
        return _result(self.shape, self.dtype)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        if np.dtype(dtype) == self.dtype and not kwargs.get("copy", True):
            return self
        return _result(self.shape, np.dtype(dtype))

    def view(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not (isinstance(args[0], type) and issubclass(args[0], np.ndarray)):
            dtype = np.dtype(args[0])
            shape = (*self.shape[:-1], self.shape[-1] * self.dtype.itemsize // dtype.itemsize)
            return stretched(shape, dtype, owned=False)
        return super().view(*args, **kwargs)

    def swapaxes(self, a: Any, b: Any) -> Any:
        out = super().swapaxes(a, b)
        out._solid = self._solid and (a == b or self.shape[a] == 1 == self.shape[b])
        return out

    def take(self, indices: Any, axis: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self[(slice(None),) * axis + (indices,)]

    def fill(self, value: Any) -> None:
        pass

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kw: Any) -> Any:
        arrays = [x for x in inputs if isinstance(x, np.ndarray)]
        if ufunc.signature is None and ufunc.nout == 1 and not kw.get("where"):
            if method == "__call__":
                if out is not None:
                    _moved(out[0], *arrays)
                    return out[0]
                shape = np.broadcast_shapes(*(x.shape for x in arrays))
                small = [np.zeros(1, x.dtype) if isinstance(x, np.ndarray) else x for x in inputs]
                return _result(shape, ufunc(*small, **kw).dtype, *arrays)
            if method == "accumulate":
                return _result(self.shape, np.dtype(kw.get("dtype") or self.dtype), self)
            if method == "reduce":
                shape = _reduced(self.shape, kw.get("axis", 0), bool(kw.get("keepdims")))
                dtype = ufunc.reduce(np.zeros(1, self.dtype), dtype=kw.get("dtype")).dtype
                return _result(shape, dtype, self)
        plain = [_plain(x) for x in inputs]
        outs = {} if out is None else {"out": tuple(_plain(x) for x in out)}
        return _restretched(getattr(ufunc, method)(*plain, **outs, **kw))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        rule = _FUNCTIONS.get(func)
        if rule is not None:
            done = rule(*args, **kwargs)
            if done is not NotImplemented:
                return done
        return _restretched(func(*_plain(list(args)), **{k: _plain(v) for k, v in kwargs.items()}))


def _is_basic(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return all(p is None or p is Ellipsis or isinstance(p, int | np.integer | slice) for p in parts)


def _stays_solid(key: Any, shape: tuple[int, ...]) -> bool:
    """Whether a part of a contiguous array is contiguous."""
    parts = [p for p in (key if isinstance(key, tuple) else (key,)) if p is not None]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    several = False  # rows so far, between which gaps would lie
    for part, n in zip(parts, shape, strict=False):
        if isinstance(part, slice):
            taken = range(*part.indices(n))
            if len(taken) < n and (several or (taken.step != 1 and len(taken) > 1)):
                return False
            several = several or len(taken) > 1
        elif several and n > 1:
            return False
    return True


def stretched(
    shape: Sequence[int], dtype: Any = np.uint64, owned: bool = True, solid: bool = True
) -> Stretched:
    """An array of this shape, of one zero. Counts as alive if `owned`; kernels need a copy if not `solid`."""
    dtype = np.dtype(dtype)
    out = np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, (0,) * len(shape)).view(Stretched)
    out._solid = solid
    if owned:
        out._owned = math.prod(shape) * dtype.itemsize
        out._of = _tally
        _tally.grow(out._owned)
    return out


def _result(shape: Sequence[int], dtype: Any, *read: Array) -> Any:
    """A new array, real if it is small; counts the bytes that making it moves."""
    size = math.prod(shape)
    moved = size * dtype.itemsize + sum(x.nbytes for x in read)
    _tally.add(LARGE_ARRAY if size * dtype.itemsize > CACHED else ARRAY, moved)
    return stretched(shape, dtype) if size > SMALL else np.zeros(shape, dtype)


def _moved(*arrays: Array) -> None:
    moved = sum(x.nbytes for x in arrays)
    _tally.add(LARGE_ARRAY if moved > 3 * CACHED else ARRAY, moved)


def _plain(x: Any) -> Any:
    if isinstance(x, Stretched):
        return np.lib.stride_tricks.as_strided(np.zeros(1, x.dtype), x.shape, (0,) * x.ndim)
    if isinstance(x, list | tuple):
        return type(x)(_plain(each) for each in x)
    return x


def _restretched(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(_restretched(each) for each in x)
    return _result(x.shape, x.dtype) if isinstance(x, np.ndarray) and x.size > SMALL else x


def _reduced(shape: tuple[int, ...], axis: Any, keep: bool) -> tuple[int, ...]:
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    gone = {a % len(shape) for a in axes}
    return tuple(1 if i in gone else n for i, n in enumerate(shape) if keep or i not in gone)


def _concatenate(arrays: Any, axis: Any = 0, **kw: Any) -> Any:
    if axis is None or kw:
        return NotImplemented
    arrays = [np.asarray(x) if not isinstance(x, np.ndarray) else x for x in arrays]
    axis %= arrays[0].ndim
    for x in arrays:
        if x.shape[:axis] + x.shape[axis + 1 :] != arrays[0].shape[:axis] + arrays[0].shape[axis + 1 :]:
            raise ValueError(f"arrays of shapes {[x.shape for x in arrays]} cannot be joined along {axis}")
    shape = list(arrays[0].shape)
    shape[axis] = sum(x.shape[axis] for x in arrays)
    return _result(shape, np.result_type(*(x.dtype for x in arrays)), *arrays)


def _stack(arrays: Any, axis: int = 0, **kw: Any) -> Any:
    arrays = list(arrays)
    if kw or len({x.shape for x in arrays}) != 1:
        return NotImplemented
    shape = list(arrays[0].shape)
    shape.insert(axis % (len(shape) + 1), len(arrays))
    return _result(shape, np.result_type(*(x.dtype for x in arrays)), *arrays)


def _pad(x: Any, width: Any, *args: Any, **kw: Any) -> Any:
    widths = [(width, width)] * x.ndim if isinstance(width, int) else list(width)
    if len(widths) != x.ndim:
        return NotImplemented
    return _result([n + sum(w) for n, w in zip(x.shape, widths, strict=True)], x.dtype, x)


def _repeat(x: Any, repeats: Any, axis: Any = None) -> Any:
    if not isinstance(repeats, int) or axis is None:
        return NotImplemented
    shape = list(x.shape)
    shape[axis] *= repeats
    return _result(shape, x.dtype, x)


def _broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == shape else stretched(shape, x.dtype, owned=False, solid=False)


_FUNCTIONS: Final[dict[Any, Callable[..., Any]]] = {
    np.concatenate: _concatenate,
    np.stack: _stack,
    np.pad: _pad,
    np.repeat: _repeat,
    np.cumsum: lambda x, axis=None, dtype=None: _result(x.shape, np.dtype(dtype or x.dtype), x),
    np.zeros_like: lambda x, dtype=None: _result(x.shape, np.dtype(dtype or x.dtype)),
    np.ones_like: lambda x, dtype=None: _result(x.shape, np.dtype(dtype or x.dtype)),
    np.empty_like: lambda x, dtype=None: _result(x.shape, np.dtype(dtype or x.dtype)),
    np.broadcast_to: lambda x, shape: _broadcast(x, tuple(shape)),
    np.broadcast_arrays: lambda *xs: [_broadcast(x, np.broadcast_shapes(*(x.shape for x in xs))) for x in xs],
}


class _Numpy:
    """numpy, but for what makes large arrays out of nothing or copies them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def _make(self, shape: Any, dtype: Any = float, *rest: Any) -> Any:
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        return _result(shape, np.dtype(dtype))

    zeros = empty = _make

    def ones(self, shape: Any, dtype: Any = float) -> Any:
        made = self._make(shape, dtype)
        return made if isinstance(made, Stretched) else np.ones(shape, dtype)

    def full(self, shape: Any, value: Any, dtype: Any = None) -> Any:
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        dtype = np.dtype(dtype) if dtype is not None else np.asarray(value).dtype
        made = self._make(shape, dtype)
        return made if isinstance(made, Stretched) else np.full(shape, value, dtype)

    def ascontiguousarray(self, x: Any, dtype: Any = None) -> Any:
        if not isinstance(x, Stretched):
            return np.ascontiguousarray(x, dtype)
        return x if x._solid else _result(x.shape, np.dtype(dtype or x.dtype), x)

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        return x if isinstance(x, Stretched) and dtype is None else np.asarray(x, dtype)


# --- kernels that do nothing --------------------------------------------------------------------------------

DEGREE: Final = kernels.GR_DEGREE


def _words(n: int) -> int:
    return (n + 63) // 64


def _product(n: int, a: Array, b: Array) -> tuple[tuple[int, ...], float]:
    shape = (*a.shape[:-1], n)
    return shape, math.prod(shape) * a.shape[-1]


def _crossed(x: Sequence[Array]) -> int:
    """Products that folding two components (n, rows) takes."""
    return int(len(x[0]) * kernels.crosses(x[0].shape[1]))


# Result shape (None: no array, or in place; several: a tuple of them) and units of work of each kernel, from
# its arguments. Units are what its rate is stated in.
RULES: Final[dict[str, Callable[..., tuple[tuple[Any, ...] | None, float]]]] = {
    "matmul": lambda a, b: _product(b.shape[-1], a, b),
    "matmul_nt": lambda a, b: _product(b.shape[-2], a, b),
    "matmul32": lambda a, b: _product(b.shape[-1], a, b),
    "rss_mul": lambda x, y, alpha: (alpha.shape, alpha.size),
    "rss_and": lambda x, y, alpha: (alpha.shape, alpha.size),
    "bit_slice": lambda x, nbits: ((*x.shape[:-1], nbits, _words(x.shape[-1])), x.size),
    "bit_unslice": lambda planes, n: ((n,), n),
    "bytes_pack": lambda x, size: ((-(-len(x) * size // 8),), len(x)),
    "bytes_unpack": lambda words, n, size: ((n,), n),
    "bits_to_ring": lambda words, n: ((*words.shape[:-1], n), n * math.prod(words.shape[:-1])),
    "ring_lsb": lambda x: ((*x.shape[:-1], _words(x.shape[-1])), x.size),
    "bit_pick": lambda planes, rows: ((_words(len(rows)),), len(rows)),
    "trunc_mask": lambda x, r, one, items: (x.shape, x.size),
    "trunc": lambda base, over, one, opened, items: (base.shape, base.size),
    "trunc_if": lambda material, one, bits, opened, items: (material[0].shape, material[0].size),
    "norm": lambda material, *public: ((material[0].shape, material[3].shape), material[0].size),
    "drop": lambda x, one, low, width: ((len(x), len(low), x.shape[1]), len(low) * x.size),
    "pieces": lambda e, opened, turned, rest, flags: ((len(e), 1 + flags, *opened.shape), e.size),
    "choose": lambda hot, z, bits, opened, drops: ((len(hot), *opened.shape), len(hot) * opened.size),
    "wave": lambda waves, opened, cosines: (waves.shape[:2], waves.size),
    "decay": lambda e, opened, bins: (e.shape[:2], e.size),
    "bits_mask": lambda bits, ring: (bits.shape, ring.size),
    "ring_unmask": lambda ring, one, bits: (ring.shape, ring.size),
    "ring_pick": lambda w, one, delta, bits: ((len(w), len(delta), delta.shape[1] + 1), w.size),
    "bits_at_most": lambda planes, sizes, told: (
        (len(planes), 2 * len(sizes) - 1, len(told), _words(told.shape[1])),
        len(planes) * len(sizes) * told.size,
    ),
    "bits_products": lambda planes, one, opened, products: (
        (len(planes), products.count, planes.shape[2]),
        len(planes) * len(products.plan) * planes.shape[2],
    ),
    "rotate": lambda e, c: (e.shape, e.nbytes),
    "double_part": lambda out, e, b: (None, out.nbytes // 8),
    "double": lambda e, high: (None, high.nbytes // 8),
    "gf_mul": lambda a, b: (a.shape, len(a)),
    "gf_scale": lambda a, s: (a.shape, len(a)),
    "gf_inner": lambda a, b: (None, len(a)),
    "gf_fold": lambda a, xi: ((len(a) // 2,), len(a)),
    "gf_cross": lambda x, y, planes: ((kernels.crosses(x[0].shape[1]),), _crossed(x)),
    "gf_combine": lambda x, planes: ((x.shape[1],), x.size),
    "gf_blend": lambda x, w: ((64 * len(x),), x.size),
    "gr_inner": lambda a, b: ((DEGREE,), len(a)),
    "gr_mul01": lambda a, r: (a.shape, len(a)),
    "gr_fold": lambda a, xi: ((len(a) // 2, DEGREE), len(a)),
    "gr_halves": lambda parts, n: ((2, DEGREE), n),
    "gr_fold_block": lambda kept, n, more, m, xi: ((2, DEGREE), n + m),
    "gr_scale01": lambda x, r: ((len(x), DEGREE), len(x)),
    "gr_combine": lambda x, r: ((len(x), DEGREE), x.size),
    "gr_combine32": lambda x, r: ((len(x), DEGREE), x.size),
    "gr_combine_cols": lambda x, r: ((x.shape[1], DEGREE), x.size),
    "gr_hot": lambda a, w, columns, e, b, q, r: (None, e.size),
    "gr8_hot": lambda e, b, q, r, a, w, columns: (None, e.size),
    "gr8_fold": lambda a, xi: ((len(a) // 2, *a.shape[1:]), len(a) * kernels.GROUP),
    "gr8_inner": lambda a, b: ((DEGREE,), len(a) * kernels.GROUP),
    "gr_cross": lambda x, y, r: ((kernels.crosses(x[0].shape[1]), DEGREE), _crossed(x)),
}


def _blank(shape: tuple[int, ...], dtype: Any) -> Any:
    return stretched(shape, dtype) if math.prod(shape) > SMALL else np.zeros(shape, dtype)


class _Kernels:
    """mimir.kernels, but for large arrays: these give a result of the right shape."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(kernels, name)
        rule = RULES.get(name)
        if name == "prg":
            return self._prg
        if name == "wipe":
            return lambda arr: None
        if rule is None:
            return _timed(name, real) if callable(real) else real

        def call(*args: Any, **kw: Any) -> Any:
            out, add = kw.pop("out", None), kw.pop("add", False)
            shape, units = rule(*args, **kw)
            _tally.add(KERNEL, 1)
            apart = name in STREAMED and args[0].shape[-2] == 1 and args[1].nbytes > CACHED
            _tally.add(name + ONE_ROW if apart else name, units)
            if shape is None:
                return 0
            if isinstance(shape[0], tuple):
                return tuple(_blank(each, np.dtype(np.uint64)) for each in shape)
            dtype = args[0].dtype if name in ("matmul32", "rotate", "gr8_fold") else np.dtype(np.uint64)
            if out is not None:
                if out.shape != shape:
                    raise LocalError(f"{name}: out must have shape {shape}, not {out.shape}")
                return out
            assert not add
            return _blank(shape, dtype)

        return call

    def _prg(self, key: Any, stream: int, out: Array, offset_blocks: int = 0) -> None:
        _tally.add(KERNEL, 1)
        _tally.add("prg", out.nbytes)


def _timed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is not in RULES: really run, over zeros, and timed."""

    def call(*args: Any, **kw: Any) -> Any:
        def solid(x: Any) -> Any:
            return np.zeros(x.shape, x.dtype) if isinstance(x, np.ndarray) else x

        if not any(isinstance(x, np.ndarray) for x in (*args, *kw.values())):
            return real(*args, **kw)
        began = time.perf_counter()
        out = real(*(solid(x) for x in args), **{k: solid(v) for k, v in kw.items()})
        _tally.add("nanoseconds", 1e9 * (time.perf_counter() - began))
        return _restretched(out)

    return call


# --- a peer that is not there -------------------------------------------------------------------------------


class _Bulk:
    """A payload of some length and no content."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


class _Channel:
    """One end of a conversation with nobody: each round ends at once, with frames like those we sent."""

    def __init__(self, session: bytes, lane: str) -> None:
        self.party, self.session, self.lane = PARTY, session, lane
        self.timeout = 0.0
        self.counts = _tally.lanes[lane]
        self._seq = 0

    rounds = property(lambda self: self.counts.rounds)
    sent = property(lambda self: self.counts.sent)
    received = property(lambda self: self.counts.sent)

    async def round(
        self, step: str, send: Mapping[int, Payload], expect: Mapping[int, int]
    ) -> dict[int, Any]:
        _lane.set(self.lane)
        counts, seq = self.counts, self._seq
        self._seq += 1
        for peer, payload in send.items():
            parts = payload if isinstance(payload, list | tuple) else [payload]
            size = sum(len(part) for part in parts)
            frame = wire.Data(self.session, self.lane, seq, step)
            whole = len(wire.head(frame, size)) + size
            counts.payload += size
            counts.sent += whole
            if peer == (PARTY - 1) % 3:
                counts.busiest += whole
        counts.rounds += 1
        await trio.lowlevel.checkpoint()

        def answer(peer: int, size: int) -> Any:
            mine = send[peer]
            if isinstance(mine, bytes | bytearray) and len(mine) == size:
                return bytearray(mine)
            return _Bulk(size) if size > 8 * SMALL else bytearray(size)

        return {peer: answer(peer, size) for peer, size in expect.items()}

    async def failed(self) -> None:
        await trio.sleep_forever()

    async def abort(self, reason_public: str = "abort") -> None:
        pass

    async def aclose(self) -> None:
        pass


class _Transport:
    party = PARTY
    peers = tuple(i for i in range(3) if i != PARTY)

    def channel(self, session: bytes, lane: str) -> Any:
        return _Channel(session, lane)

    def link_secret(self, peer: int, session: bytes, label: str) -> Secret:
        return Secret(bytearray(32))

    async def request(self, peer: int, kind: str, body: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        return {}


async def _open_uncounted(transport: Any, name: bytes, lane: str, **times: Any) -> Doors:
    """Shared lanes are opened once, for all tokens of all sessions."""
    counts = _tally.lanes[lane]
    before = counts.copy()
    doors = await open_lane(transport, name, lane, **times)
    counts.rounds, counts.sent = before.rounds, before.sent
    counts.busiest, counts.payload = before.busiest, before.payload
    return doors


def _bulk_of(arrays: Sequence[Array]) -> list[Any]:
    return [_Bulk(8 * math.prod(a.shape)) for a in arrays if a.size]


def _no_digest(step: str, parts: Sequence[Any]) -> bytes:
    lane = _lane.get()
    if lane:
        _tally.lanes[lane].hashed += sum(len(p) for p in parts)
    return bytes(doors_module.DIGEST)


def _no_values(raw: Any, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    return [_result(shape, np.dtype(np.uint64)) for shape in shapes]


def _one_commitment(*_: Any) -> bytes:
    return bytes(doors_module.DIGEST)


class NoLog:
    """The engine's log is about sessions that happen."""

    def bind(self, **_: Any) -> NoLog:
        return self

    def info(self, *_: Any, **__: Any) -> None:
        pass

    debug = warning = error = info


async def _inline(work: int, fn: Callable[[], Any]) -> Any:
    if work >= THREAD_WORK:
        _tally.add(THREAD, 1)
    return fn()


@contextmanager
def _calls_counted() -> Iterator[None]:
    """Count calls of the engine's functions, and those that they make, of this thread."""
    engine: dict[Any, bool] = {}  # by code

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            code, caller = frame.f_code, frame.f_back
            if code not in engine:
                engine[code] = frame.f_globals.get("__name__", "").startswith(_ENGINE)
            if not (engine[code] or (caller is not None and engine.get(caller.f_code))):
                return
        elif event != "c_call" or not engine.get(frame.f_code):
            return
        if lane := _lane.get():
            _tally.lanes[lane].work[CALLS[lane]] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def _nothing_real(tally: Tally) -> Iterator[None]:
    """Replace, in the engine's modules, what computes, allocates and sends; put all back at the end.

    Raises `LocalError` where a party could be.
    """
    global _tally
    for name in PARTY_MODULES:
        if name in sys.modules:
            raise LocalError(
                f"{name} has been imported: this process may be a party, and a dry run would take its checks "
                "away; ask for the cost in a process of its own"
            )
    before, _tally = _tally, tally
    modules = [m for name, m in sys.modules.items() if name.startswith(_ENGINE)]
    with ExitStack() as undo:
        undo.callback(globals().__setitem__, "_tally", before)
        for module in modules:
            # Tables that the engine keeps must be neither made of nothing nor left behind.
            for thing in vars(module).values():
                if callable(getattr(thing, "cache_clear", None)):
                    undo.callback(thing.cache_clear)

        def swap(module: Any, name: str, value: Any) -> None:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

        empty: dict[str, Any] = {
            "kernels": _Kernels(),
            "np": _Numpy(),
            "offload": _inline,
            "log": NoLog(),
        }
        for module in modules:
            for name, value in empty.items():
                if hasattr(module, name) and module.__name__ != "mimir.mpc.offload":
                    swap(module, name, value)
        swap(shared_module, "open_lane", _open_uncounted)
        swap(session_module, "TripleProducer", _Producer)
        swap(doors_module, "_pack", _bulk_of)
        swap(doors_module, "_digest", _no_digest)
        swap(doors_module, "_split", _no_values)
        swap(doors_module, "_commitment", _one_commitment)
        yield


# --- a session ----------------------------------------------------------------------------------------------


class _Unkept:
    """A component that is made anew at each use: all of it at once here, as it costs the same."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], work: str) -> None:
        self.shape = shape
        self.dtype = dtype
        self._work = work

    def blocks(self) -> Iterator[tuple[int, Array]]:
        _tally.add(self._work, self.dtype.itemsize * math.prod(self.shape))
        yield 0, stretched((math.prod(self.shape[:-1]), self.shape[-1]), self.dtype, owned=False)


class Shares:
    """A party's shares of a model of which `keep` bytes may be in memory, all of zeros."""

    def __init__(self, spec: PlanSpec, keep: int) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors_of(spec)}
        self._kept = kept(self._tensors.values(), PARTY, keep)

    @property
    def kept_bytes(self) -> int:
        """Of shares in memory."""
        return sum(self._tensors[name].nbytes for name, _ in self._kept)

    def pair(self, name: str) -> tuple[Any, Any]:
        tensor = self._tensors[name]

        def component(number: int) -> Any:
            if (name, number) in self._kept:
                return stretched(tensor.shape, tensor.dtype, owned=False)
            explicit = (PARTY + number) % COMPONENTS == tensor.explicit
            return _Unkept(tensor.shape, tensor.dtype, DECRYPT if explicit else "prg")

        return component(0), component(1)


class _Session(SessionActor):
    """A session whose cache may already hold positions, of which nobody knows how they came there."""

    until: int | None = None  # answer one batch of preprocessing's worth of tokens, the last at this position
    seeded = 0
    rows = 0  # of the last block of products with weights
    most: int | None = None  # rows of such a block
    material = 0  # bytes of it that a token takes
    pool = 0  # bytes of material that may be ready besides the batch in use

    def _demand(self, step: Step) -> Any:
        """What the engine plans, of which only the number of times is counted; alike steps are alike."""
        _tally.lanes[PREP].plans += 1
        alike = replace(step, name="")
        if alike not in self._demands:
            token = _lane.set("")
            try:
                self._demands[alike] = super()._demand(step)
            finally:
                _lane.reset(token)
        return dict(self._demands[alike])

    async def _sizes(self) -> None:
        self._demands: dict[Step, prep.Demand] = {}
        await super()._sizes()
        slots = min(self.limits.max_context, self.spec.context)
        last = self._demand(Step("plan", slots - 1, 1, False, True))
        weights = session_module._weights_of(last)
        size = bytes_of(last, self._shapes) - bytes_of(weights, self._shapes)
        self.material = size
        self.pool = size * max(0, self._ahead - self._group)
        if self.until is None:
            return
        self._block = min(self._block, self.most or self._block)
        room = self.until - 1 - sum(self.terms.buckets)
        tokens = min(self._group, room)
        self.terms = replace(self.terms, max_new=tokens + 1)
        self.seeded = room - tokens
        if tokens < 1:
            raise BadInput(f"a context of {self.until} positions is too short to tell a token's cost")

    async def _prepare(self, turn: Turn) -> int:
        """As the engine does. At the end of a context also the tokens before that share a block of products
        with weights, but of them only these products.

        The block is a whole one, and the one before it goes with the prompt, if the context has room.
        """
        if self.until is None:
            return await super()._prepare(turn)
        group, first = len(turn.decode), turn.decode[0]
        groups = (self._block - 1) // group + max(1, self._block // group) - 1
        count = min(groups, self.seeded // group) * group
        before = tuple(replace(first, name=f"{first.name}/before {i}") for i in range(count))
        names = {step.name for step in before}
        prepare = self.triples.prepare

        async def needed(batches: Sequence[Batch]) -> None:
            self.rows = len(next(b for b in reversed(batches) if not b.last).steps)  # each of one row
            await prepare([b for b in batches if not (b.last and names.issuperset(b.steps))])

        self.triples.prepare = needed  # type: ignore[method-assign]
        try:
            return await super()._prepare(replace(turn, decode=(*before, *turn.decode)))
        finally:
            del self.triples.prepare

    def turn(self, number: int, buckets: Sequence[int], max_new: int, used: int, chunk: int) -> Turn:
        """`plan_turn`, after the positions that are there; puts them there."""
        spec, n = self.spec, self.seeded
        if not number and n:
            shape = (spec.kv_heads, n, spec.head_dim)
            self._cache.valid = Share(stretched((2, n)), self._online.bk)
            self._cache.length = n
            for name, caches in (("keys", self._cache.keys), ("values", self._cache.values)):
                for layer, cache in enumerate(caches):
                    cache.delta = [stretched(shape)]
                    cache.mask = [Share(stretched((2, *shape)), self._online.bk)]
                    self.triples._caches[name, layer] = [stretched((2, *shape))]
        return plan_turn(number, buckets, max_new, used if number else n, chunk)


class _Producer(TripleProducer):
    async def _work(self) -> None:
        _lane.set(PREP)  # its rounds are those of the shared one
        await super()._work()


@dataclass(frozen=True, slots=True)
class Mark:
    """What had been counted when the party told its client something."""

    kind: str  # "token", or "made" after a batch of preprocessing
    positions: int  # made so far
    lanes: dict[str, Counts]


class Client:
    """A client that gives zeros for a prompt and takes notes."""

    key = CLIENT

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._send, self._receive = trio.open_memory_channel[Message](8)
        self.marks: list[Mark] = []

    def _mark(self, kind: str, positions: int = 0) -> None:
        lanes = {k: v.copy() for k, v in self._tally.lanes.items()}
        self.marks.append(Mark(kind, positions, lanes))

    async def send(self, message: Mapping[str, Any]) -> None:
        match message["t"]:
            case "opened":
                self._mark("opened")
            case "masks":
                # masks come as two components each, offsets are values
                names = {name: bytes(len(raw) // 2) for name, raw in message["names"].items()}
                await self._send.send({"t": "offsets", "turn": message["turn"], "names": names})
            case "token":
                self._mark("token")
            case "progress" if message["phase"] == "preprocessing":
                self._mark("made", message["done"])
            case "done":
                await self._send.send({"t": "close"})

    async def receive(self, timeout: float | None = None) -> Message:
        return await self._receive.receive()


@dataclass(frozen=True, slots=True)
class Run:
    """A session that was run over shapes. Figures are per party."""

    bucket: int
    tokens: int
    marks: tuple[Mark, ...]
    lanes: dict[str, Counts]  # of the whole session
    block: int  # rows for which products with weights were last made together; 0 but at the end of a context
    peak: int  # bytes of arrays alive at once, the weights' shares apart
    pool: int  # bytes of material that a longer session keeps ready besides a batch of tokens
    material: int  # bytes of a token's material at the end of the context, products with weights apart

    def of(self, kind: str) -> list[Mark]:
        return [m for m in self.marks if m.kind == kind]


def run(
    spec: PlanSpec,
    settings: Settings,
    *,
    bucket: int,
    tokens: int,
    max_context: int,
    ahead: int,
    memory: int = MEMORY,
    keep: int = KEPT_BYTES,
    session: bytes = bytes(16),
    sampler: Sampler | None = None,
) -> Run:
    """One session of one turn: a prompt of `bucket` positions, then `tokens` tokens. Not within a Trio run.

    `ahead` and `memory`, in bytes, are those of [triple_pool], `keep` the bytes of shares that may stay in
    memory. Raises what the engine raises for lengths that do not fit.
    """
    return _run(spec, settings, bucket, tokens, max_context, ahead, memory, keep, session, sampler)


def run_last(
    spec: PlanSpec,
    settings: Settings,
    *,
    max_context: int,
    ahead: int,
    memory: int = MEMORY,
    keep: int = KEPT_BYTES,
    session: bytes = bytes(16),
    sampler: Sampler | None = None,
    most: int | None = None,
) -> Run:
    """The end of a session that fills `max_context`: its last full batch of decoded tokens.

    A prompt of one position, then as many tokens as the engine prepares together, behind a cache that is
    there from the start. Products with weights are those of a whole block of tokens, or of `most`. What is
    before the first token is not to be used. A frame carries smaller numbers than at the end of a real
    session, and so may have a few bytes less.
    """
    until = min(max_context, spec.context)
    lengths = (1, 1, max_context, ahead, memory, keep)
    return _run(spec, settings, *lengths, session, sampler, until, most)


def _run(
    spec: PlanSpec,
    settings: Settings,
    bucket: int,
    tokens: int,
    max_context: int,
    ahead: int,
    memory: int,
    keep: int,
    session: bytes,
    sampler: Sampler | None,
    until: int | None = None,
    most: int | None = None,
) -> Run:
    tally = Tally()
    lanes: dict[str, Counts] = {}
    client = Client(tally)
    terms = Open(session, "0" * 64, (CLIENT,), (bucket,), tokens, sampler or Sampler(), False)
    limits = Limits((bucket,), (tokens,), max_context, ahead, memory, 1.0, math.inf, math.inf)
    transport: Any = _Transport()

    async def main() -> _Session:
        shares = Shares(spec, keep)
        decoder = DecodeActor(
            transport, terms.model, sized(spec, max_context), shares, settings, most=1, round_seconds=math.inf
        )
        producer = SharedProducer(transport, terms.model, shares, round_seconds=math.inf)
        actor = _Session(transport, terms, [client], spec, shares, settings, limits, decoder, producer)
        actor.until, actor.most = until, most
        session_module.plan_turn = actor.turn
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(decoder.run)
                nursery.start_soon(producer.run)
                await actor.run()
                lanes.update({name: counts.copy() for name, counts in tally.lanes.items()})
                nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            raise cause_of(group) from None
        return actor

    with _nothing_real(tally):
        try:
            with _calls_counted():
                actor = trio.run(main)
        finally:
            session_module.plan_turn = plan_turn
    told = sum(m.kind == "token" for m in client.marks)
    marks = tuple(client.marks)
    return Run(bucket, told, marks, lanes, actor.rows, tally.peak, actor.pool, actor.material)
