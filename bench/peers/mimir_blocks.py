"""The blocks under Mimir: three processes, malicious with abort, the mesh on loopback without a tunnel.

Prints one JSON object a block: seconds of the party that takes longest, online and preprocessing apart, both
with every check. Material is made for the block and right before it. Inputs and weights are shared before the
clock starts. The activation goes in slices of 16 rows, as the engine lets a prompt in.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blocks
import numpy as np
import structlog
import trio

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mimir.model import sampling, transformer  # noqa: E402
from mimir.model.checkpoint import PlanSpec  # noqa: E402
from mimir.model.transformer import Cache, Rows  # noqa: E402
from mimir.mpc import nonlinear, ops, plan, prep  # noqa: E402
from mimir.mpc.domain import RING_BITS, Ring, decode, encode  # noqa: E402
from mimir.mpc.doors import Doors  # noqa: E402
from mimir.mpc.nonlinear import Scores, Settings  # noqa: E402
from mimir.mpc.ops import Context  # noqa: E402
from mimir.mpc.replicated import Replicated  # noqa: E402
from mimir.mpc.share import Share  # noqa: E402
from mimir.net.identity import Identity, parse_public  # noqa: E402
from mimir.net.mesh import Mesh, PeerAt, open_mesh  # noqa: E402

PARTIES = 3
BASE_PORT = 19200
UP_SECONDS = 60.0
ROUND_SECONDS = 600.0
SETTINGS = Settings()
F = SETTINGS.scale_bits
INDEX_SCALE = RING_BITS - ops.INDEX_BITS
SPEC = PlanSpec(
    family="gpt2",
    layers=1,
    width=blocks.WIDTH,
    heads=blocks.HEADS,
    kv_heads=blocks.HEADS,
    head_dim=blocks.WIDTH // blocks.HEADS,
    hidden=blocks.HIDDEN,
    vocab=2,
    context=blocks.CACHED + 1,
    act="gelu_tanh",
    norm_eps=1e-5,
    positions="learned",
    rope_theta=None,
    bos_id=None,
    eos_ids=(),
)
CACHE_SHAPE = (blocks.HEADS, blocks.CACHED, SPEC.head_dim)


@dataclass(frozen=True)
class Block:
    """What is run on slices of secret inputs, how often, and the scale of what it gives."""

    run: Callable[[Context, Share, Any], Awaitable[Share]]
    scale: int  # of the input
    out_scale: int
    runs: int
    slices: int = 1
    cached: bool = False


async def _decode(ctx: Context, x: Share, caches: Any) -> Share:
    masks, valid = caches
    cache = Cache.empty(1)
    for part, mask in zip((cache.keys[0], cache.values[0]), masks, strict=True):
        part.delta, part.mask = [np.zeros(CACHE_SHAPE, np.uint64)], [mask]
    cache.valid, cache.length = valid, blocks.CACHED
    return await transformer.forward(ctx, "block", SPEC, Rows(x, None, False), [cache], SETTINGS)


async def _matmul(ctx: Context, x: Share, _: Any) -> Share:
    y = await ops.matmul(ctx, "product", (x, "w"))
    return (await ops.truncate(ctx, "truncate", (y, F)))[0]


async def _gelu(ctx: Context, x: Share, _: Any) -> Share:
    return await nonlinear.activation(ctx, "gelu", x, "gelu_tanh", SETTINGS, 2 * F)


async def _softmax(ctx: Context, x: Share, _: Any) -> Share:
    heads, rows, keys = x.shape
    allowed = np.ones((rows, keys), np.uint64)
    ((e, total),) = await nonlinear.exponentials(ctx, "softmax", [Scores(x, 2 * F, allowed, None)])
    ((large, small),) = await nonlinear.reciprocals(ctx, "reciprocal", [(total, keys)], SETTINGS)
    inverse = large * (1 << (nonlinear.FINE_SCALE - nonlinear.COARSE_SCALE)) + small
    y = await ops.scale(ctx, "divide", inverse.flat(), e.reshape(heads * rows, keys))
    drop = nonlinear.EXP_SCALE + nonlinear.FINE_SCALE - F
    return (await ops.truncate(ctx, "truncate", (y, drop)))[0]


async def _argmax(ctx: Context, x: Share, _: Any) -> Share:
    _, index = await ops.argmax(ctx, "argmax", x, 2 * F - sampling.CHOICE_SCALE, sampling.WIDTH)
    return index.reshape(1) * (1 << INDEX_SCALE)


TABLE = {
    "block decode at 64": Block(
        _decode, transformer.RESIDUAL_SCALE, transformer.RESIDUAL_SCALE, 2, cached=True
    ),
    "64x768 by 768x3072": Block(_matmul, F, F, 1),
    "GELU 64x3072": Block(_gelu, 2 * F, F, 1, slices=4),
    "softmax 768 rows of 64": Block(_softmax, 2 * F, F, 1),
    "argmax of 50257": Block(_argmax, 2 * F, INDEX_SCALE, 1),
}


def given(name: str) -> tuple[Any, dict[str, Any]]:
    """The secret input of a block, and its weights as (k, n) matrices by the engine's names."""
    v = blocks.inputs(name)
    if name == "block decode at 64":
        x = v["x"] - v["x"].mean()
        weights = {"0.qkv": v["qkv"], "0.o": v["o"], "0.in": v["up"], "0.out": v["down"]}
        return x, weights | {f"{k}_b": np.zeros((1, w.shape[1])) for k, w in weights.items()}
    if name == "softmax 768 rows of 64":
        return v["x"].reshape(blocks.HEADS, blocks.ROWS, 64), {}
    return v["x"], {"w": v["w"]} if "w" in v else {}


def shared(name: str, w: Any) -> Any:
    """A weight as the engine has it: modulo 2^64, or, where a matrix follows a norm, 2^32."""
    words = encode(w, SPEC.scale(name, F))
    return words.astype(np.uint32) if SPEC.halved(name) else words


def components(value: Any, party: int, seed: int) -> tuple[Any, Any]:
    """This party's two components of a sharing that all three expand from one seed: for measuring only."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 2**64, value.shape, np.uint64).astype(value.dtype) for _ in range(2))
    c = [a, b, value - a - b]
    return c[party], c[(party + 1) % PARTIES]


class _Weights:
    def __init__(self, tensors: dict[str, tuple[Ring, Ring]]) -> None:
        self._tensors = tensors

    def pair(self, name: str) -> tuple[Ring, Ring]:
        return self._tensors[name]


def demand_of(block: Block, shape: tuple[int, ...], weights: dict[str, Any]) -> dict[prep.Kind, int]:
    """What the block takes, by running it over shapes."""
    ctx, cost = plan.planning({k: w.shape for k, w in weights.items()})

    def zeros(*shape: int) -> Share:
        return ctx.share(np.zeros((1, *shape), np.uint64))

    caches = ([zeros(*CACHE_SHAPE)] * 2, zeros(blocks.CACHED + 1))

    async def planned() -> plan.Cost:
        await block.run(ctx, zeros(*shape), caches)
        return cost

    return plan.run(planned()).demand


async def measure(mesh: Mesh, name: str, number: int) -> tuple[dict[str, Any], Any]:
    """One run: seconds and loopback bytes by lane, and this party's components of the result."""
    block, party = TABLE[name], mesh.party
    value, plain = given(name)
    weights = _Weights({k: components(shared(k, w), party, 3 + i) for i, (k, w) in enumerate(plain.items())})
    x = np.stack(components(encode(value, block.scale), party, 1))
    session = hashlib.sha256(f"{name} {number}".encode()).digest()[:16]

    def lane(label: str) -> Doors:
        channel = mesh.channel(session, label)
        channel.timeout = ROUND_SECONDS
        keys = [mesh.link_secret((party + way) % PARTIES, session, f"prf {label}") for way in (-1, 1)]
        return Doors(channel, Replicated(party, *keys))

    online, making = lane("online"), lane("prep")
    out: dict[str, Any] = {
        n: {"online": 0, "prep": 0} for n in ("seconds", "processor", "loopback", "rounds")
    }
    results = []
    for i, part in enumerate(np.split(x, block.slices, axis=1)):
        demand = demand_of(block, part.shape[1:], plain)
        masks = [making.bk.random(*CACHE_SHAPE) for _ in range(2)]
        pools = {("keys", 0): [masks[0]], ("values", 0): [masks[1]]} if block.cached else {}
        ones = Share(np.zeros((2, blocks.CACHED + 1), np.uint64), online.bk) + np.ones(1, np.uint64)
        caches = ([Share(m, online.bk) for m in masks], ones)
        await making.agree(f"go {i}", b"")
        rounds = making.channel.rounds
        began, bytes_before, used = time.perf_counter(), blocks.loopback_bytes(), time.process_time()
        made = await prep.produce(prep.Batch(making, weights, pools), f"slice {i}", demand)
        out["rounds"]["prep"] += making.channel.rounds - rounds
        await making.agree(f"made {i}", b"")
        prepared, bytes_made = time.perf_counter(), blocks.loopback_bytes()
        out["processor"]["prep"] += time.process_time() - used
        used = time.process_time()
        ctx = Context(online.bk, online, prep.Store(made), weights)
        results.append((await block.run(ctx, Share(part, online.bk), caches)).v)
        await making.agree(f"done {i}", b"")
        ended, bytes_after = time.perf_counter(), blocks.loopback_bytes()
        out["processor"]["online"] += time.process_time() - used
        out["seconds"]["prep"] += prepared - began
        out["seconds"]["online"] += ended - prepared
        out["loopback"]["prep"] += bytes_made - bytes_before
        out["loopback"]["online"] += bytes_after - bytes_made
    out["rounds"]["online"] = online.channel.rounds
    for doors in (online, making):
        doors.bk.wipe()
        await doors.channel.aclose()
    return out, np.concatenate(results, axis=1)


async def party(index: int, folder: Path) -> None:
    me = Identity.load(folder / f"key{index}")
    public = [parse_public((folder / f"public{i}").read_text()) for i in range(PARTIES)]
    peers = [PeerAt(i, "127.0.0.1", BASE_PORT + i, public[i]) for i in range(PARTIES) if i != index]
    async with open_mesh(
        party=index,
        identity=me,
        peers=peers,
        config_digest=bytes(32),
        listen=("127.0.0.1", BASE_PORT + index),
        protected=False,
    ) as mesh:
        await mesh.wait_up(UP_SECONDS)
        for name, block in TABLE.items():
            runs = []
            for number in range(block.runs):
                told, v = await measure(mesh, name, number)
                runs.append(told)
            np.save(folder / f"out{index}-{blocks.NAMES.index(name)}.npy", v)
            (folder / f"runs{index}-{blocks.NAMES.index(name)}.json").write_text(json.dumps(runs))
        (folder / f"done{index}").touch()
        while not all((folder / f"done{i}").exists() for i in range(PARTIES)):
            await trio.sleep(0.05)  # whoever leaves first would break off the others' last round


def row(folder: Path, name: str) -> dict[str, Any]:
    """One block from what its three parties wrote."""
    at = blocks.NAMES.index(name)
    runs = [json.loads((folder / f"runs{i}-{at}.json").read_text()) for i in range(PARTIES)]
    parts = [np.load(folder / f"out{i}-{at}.npy") for i in range(PARTIES)]
    value = parts[0][0] + parts[1][0] + parts[2][0]
    want = blocks.expected(name)
    got = None if want is None else decode(value, TABLE[name].out_scale).reshape(want.shape)

    def median(of: Callable[[dict[str, Any]], float]) -> float:
        """Over runs, of the largest over parties."""
        return statistics.median(max(of(p[n]) for p in runs) for n in range(len(runs[0])))

    out: dict[str, Any] = {"block": name, "runs": len(runs[0])}
    out["error"] = None if got is None else blocks.error(name, got)
    for lane in ("online", "prep"):
        out[lane] = {
            "seconds": median(lambda r, lane=lane: r["seconds"][lane]),
            "processor": PARTIES * median(lambda r, lane=lane: r["processor"][lane]),
            "sent": median(lambda r, lane=lane: r["loopback"][lane] / PARTIES),
            "rounds": median(lambda r, lane=lane: r["rounds"][lane]),
        }
    return out


def main(arguments: list[str]) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    if arguments:
        trio.run(party, int(arguments[0]), Path(arguments[1]))
        return 0
    with tempfile.TemporaryDirectory(prefix="mimir-bench.") as name:
        folder = Path(name)
        for i in range(PARTIES):
            identity = Identity.generate()
            identity.save(folder / f"key{i}")
            (folder / f"public{i}").write_text(identity.public_hex)
        children = [subprocess.Popen([sys.executable, __file__, str(i), name]) for i in range(PARTIES)]
        try:
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.terminate()
        if any(codes):
            raise SystemExit(f"peers: a party of Mimir ended with exit status {max(codes)}; see above")
        for each in TABLE:
            print(json.dumps(row(folder, each)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
