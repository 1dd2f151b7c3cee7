"""The blocks under SPU: three processes, semi-honest ABY3 over a 64-bit ring, brpc on loopback.

Runs in SPU's own environment (see compare.py), prints one JSON object a block. Programs are compiled, secrets
shared and connections made before the clock starts; the first run of each block is not counted. The settings
are SPU's defaults.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from typing import Any

import blocks
import jax
import jax.numpy as jnp
import spu
from spu import libspu
from spu.utils import frontend

PARTIES = 3
RUNS = 3
BASE_PORT = 19100


def config() -> Any:
    return libspu.RuntimeConfig(protocol=libspu.ProtocolKind.ABY3, field=libspu.FieldType.FM64)


def decode(x: Any, keys: Any, values: Any, qkv: Any, o: Any, up: Any, down: Any) -> Any:
    """One GPT-2 block on one new position; norms without gains, which fold into the weights."""

    def norm(h: Any) -> Any:
        h = h - h.mean(-1, keepdims=True)
        return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5)

    q, k, v = jnp.split((norm(x) @ qkv).reshape(3, blocks.HEADS, 1, -1), 3)
    keys, values = jnp.concatenate([keys, k[0]], 1), jnp.concatenate([values, v[0]], 1)
    scores = q[0] @ keys.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    x = x + (jax.nn.softmax(scores, -1) @ values).reshape(1, -1) @ o
    return x + jax.nn.gelu(norm(x) @ up) @ down


FUNCTIONS = {
    "block decode at 64": decode,
    "64x768 by 768x3072": jnp.matmul,
    "GELU 64x3072": jax.nn.gelu,
    "softmax 768 rows of 64": lambda x: jax.nn.softmax(x, axis=-1),
    "argmax of 50257": jnp.argmax,
}


def party(rank: int, pipe: Any) -> None:
    """Take programs and shares, run them when told, give times and shares of the result."""
    desc = libspu.link.Desc()
    for i in range(PARTIES):
        desc.add_party(f"party{i}", f"127.0.0.1:{BASE_PORT + i}")
    desc.recv_timeout_ms = 600_000
    link = libspu.link.create_brpc(desc, rank)
    runtime = spu.Runtime(link, config())
    while (job := pipe.recv()) is not None:
        program, shares = job
        for name, share in zip(program.input_names, shares, strict=True):
            runtime.set_var(name, share)
        for _ in range(1 + RUNS):
            pipe.recv()
            began, used = time.perf_counter(), time.process_time()
            runtime.run(program)
            pipe.send((time.perf_counter() - began, time.process_time() - used))
        pipe.send([runtime.get_var(name) for name in program.output_names])
        for name in (*program.input_names, *program.output_names):
            runtime.del_var(name)
    link.stop_link()


def main() -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(PARTIES):
        mine, theirs = context.Pipe()
        pipes.append(mine)
        processes.append(context.Process(target=party, args=(rank, theirs), daemon=True))
        processes[-1].start()
    io = spu.Io(PARTIES, config())
    secret = libspu.Visibility.VIS_SECRET
    for name, function in FUNCTIONS.items():
        given = blocks.inputs(name)
        program, _ = frontend.compile(
            frontend.Kind.JAX,
            function,
            list(given.values()),
            {},
            list(given),
            [secret] * len(given),
            lambda out: [f"out{i}" for i in range(len(out))],
        )
        shares = [io.make_shares(x, secret) for x in given.values()]
        for rank, pipe in enumerate(pipes):
            pipe.send((program, [each[rank] for each in shares]))
        seconds, used, sent = [], [], []
        for _ in range(1 + RUNS):
            before = blocks.loopback_bytes()
            for pipe in pipes:
                pipe.send("go")
            told = [pipe.recv() for pipe in pipes]
            seconds.append(max(wall for wall, _ in told))
            used.append(sum(cpu for _, cpu in told))
            sent.append((blocks.loopback_bytes() - before) / PARTIES)
        parts = [pipe.recv() for pipe in pipes]
        got = io.reconstruct([p[0] for p in parts])
        row = {
            "block": name,
            "seconds": statistics.median(seconds[1:]),
            "processor": statistics.median(used[1:]),
            "sent": statistics.median(sent[1:]),
            "runs": RUNS,
            "error": blocks.error(name, got),
        }
        print(json.dumps(row), flush=True)
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(20)


if __name__ == "__main__":
    main()
