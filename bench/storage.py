#!/usr/bin/env python3
"""What shares cost at rest and in use: ciphers by chunk size, one party's shares of a model in and out, and
products with components that are in memory, expanded from a seed, or decrypted.

    python bench/storage.py                  the 15 M shape, vocabulary 32,000; two minutes, 300 MB of disk
    python bench/storage.py --out FILE       the result (default: bench/results/storage.json)

Each opening is a process of its own, with the files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]

import nacl.bindings as sodium  # noqa: E402
import numpy as np  # noqa: E402
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305  # noqa: E402

from mimir.keys.file import FileCounter  # noqa: E402
from mimir.manifest import (  # noqa: E402
    COMPONENTS,
    Manifest,
    component_hash,
    holds,
    seed_commitment,
    tensors_of,
)
from mimir.model.checkpoint import PlanSpec  # noqa: E402
from mimir.mpc.weights import KeyStream, Stored, array, product  # noqa: E402
from mimir.secret import ShareSeed, StorageKey  # noqa: E402
from mimir.store import ModelStore  # noqa: E402
from mimir.vault import Vault  # noqa: E402

SHAPE = PlanSpec(
    family="llama",
    layers=6,
    width=288,
    heads=6,
    kv_heads=6,
    head_dim=48,
    hidden=768,
    vocab=32000,
    context=256,
    act="silu_glu",
    norm_eps=1e-5,
    positions="rope",
    rope_theta=10000.0,
    bos_id=None,
    eos_ids=(0,),
)
PARTIES = ("a" * 64, "b" * 64, "c" * 64)
KEY = bytes(32)
PIECE = 1 << 20
CIPHER_BYTES = 128 << 20


def ciphers() -> list[dict[str, Any]]:
    """Megabytes per processor second."""
    return [{"chunk": size, **_ciphers(size)} for size in (64 << 10, 256 << 10, 1 << 20)]


def _ciphers(size: int) -> dict[str, int]:
    data, nonce, long_nonce, count = os.urandom(size), bytes(12), bytes(24), CIPHER_BYTES // size
    gcm, chacha, room = AESGCM(KEY), ChaCha20Poly1305(KEY), bytearray(size)
    sealed, other = gcm.encrypt(nonce, data, b""), chacha.encrypt(nonce, data, b"")
    third = sodium.crypto_aead_xchacha20poly1305_ietf_encrypt(data, b"", long_nonce, KEY)

    def speed(work: Callable[[], Any]) -> int:
        begin = time.process_time()
        for _ in range(count):
            work()
        return round(CIPHER_BYTES / 1e6 / (time.process_time() - begin))

    return {
        "aes_256_gcm_encrypt": speed(lambda: gcm.encrypt(nonce, data, b"")),
        "aes_256_gcm_decrypt": speed(lambda: gcm.decrypt_into(nonce, sealed, b"", room)),
        "chacha20_poly1305_decrypt": speed(lambda: chacha.decrypt(nonce, other, b"")),
        "xchacha20_poly1305_decrypt_libsodium": speed(
            lambda: sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(third, b"", long_nonce, KEY)
        ),
    }


def share() -> tuple[Manifest, list[bytes], dict[str, bytes]]:
    """A sharing of the shape: manifest, the three seeds, and the explicit component of every tensor."""
    seeds = [bytes([number]) * 32 for number in range(COMPONENTS)]
    tensors, words = [], {}
    for index, tensor in enumerate(tensors_of(SHAPE)):
        words[tensor.name] = np.random.default_rng(index).bytes(tensor.nbytes)
        whole = component_hash(tensor.explicit, index, ShareSeed(seeds[tensor.explicit]))
        whole.update(words[tensor.name])
        tensors.append(replace(tensor, sha256=whole.hexdigest()))
    a, b, c = (seed_commitment(number, ShareSeed(seed)) for number, seed in enumerate(seeds))
    return Manifest("shape", SHAPE, 16, PARTIES, (a, b, c), tuple(tensors)), seeds, words


def fill(root: Path) -> dict[str, Any]:
    """Upload one party's shares of the shape; seconds and bytes."""
    manifest, seeds, words = share()
    store = open_store(root)
    incoming = store.begin(manifest.public(), (ShareSeed(seeds[0]), ShareSeed(seeds[1])))
    written = 0.0
    for name in incoming.have():
        data = words[name]
        begin = time.process_time()
        for at in range(0, len(data), PIECE):
            incoming.write(name, at, data[at : at + PIECE])
        written += time.process_time() - begin
    begin = time.process_time()
    incoming.verify()
    verified = time.process_time() - begin
    incoming.accept()
    incoming.close()
    store.close()
    return {
        "bytes_shares": 16 * SHAPE.parameters(),
        "bytes_explicit": manifest.stored(0),
        "bytes_on_disk": sum(each.stat().st_size for each in root.rglob("*") if each.is_file()),
        "upload_cpu_s": round(written, 3),
        "upload_mb_s": round(manifest.stored(0) / 1e6 / written),
        "read_back_and_hash_cpu_s": round(verified, 3),
    }


def open_store(root: Path, **options: Any) -> ModelStore:
    counter = FileCounter(root.with_name("counter"))
    return ModelStore(Vault(root, StorageKey(KEY), counter), 0, PARTIES, **options)


def memory() -> dict[str, int]:
    """MiB of this process, by kind."""
    lines = (line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    found = {name: value.split()[0] for name, value in lines if value.split()}
    return {name: int(found[name]) >> 10 for name in ("RssAnon", "RssFile", "VmHWM")}


def stored_of(shape: PlanSpec) -> int:
    """Bytes of explicit components of party 0."""
    return sum(tensor.nbytes for tensor in tensors_of(shape) if holds(0, tensor.explicit))


KEEP = {"all kept": 4 << 30, "explicit kept": None, "nothing kept": 0}


def opened(how: str, root: Path) -> dict[str, Any]:
    """In a process of its own: open the model, then multiply a row with all of it three times."""
    before = memory()
    begin, cpu = time.perf_counter(), time.process_time()
    keep = KEEP[how]
    if keep is None:
        keep = stored_of(SHAPE)
    store = open_store(root, keep=keep)
    model = store.open(next(iter(store.models())))
    seconds, used = time.perf_counter() - begin, time.process_time() - cpu
    after = memory()
    begin = time.process_time()
    for _ in range(3):
        for name, shape in SHAPE.shapes().items():
            for w in model.get(name):
                if len(shape) == 2:
                    product(np.ones((1, shape[0]), np.uint64), w, np.empty((1, shape[1]), np.uint64))
    return {
        "how": how,
        "open_s": round(seconds, 3),
        "open_cpu_s": round(used, 3),
        "pass_cpu_s": round((time.process_time() - begin) / 3, 3),
        "kept_mib": model.kept_bytes >> 20,
        "anonymous_mib": after["RssAnon"] - before["RssAnon"],
        "peak_mib": memory()["VmHWM"],
    }


def products(root: Path) -> list[dict[str, Any]]:
    """Gigabytes of weights a processor second, of the largest matrix, by where its component comes from."""
    store = open_store(root, keep=0)
    pair = store.open(next(iter(store.models()))).get("head")
    stored, stream = sorted(pair, key=lambda w: isinstance(w, KeyStream))
    assert isinstance(stored, Stored) and isinstance(stream, KeyStream)
    kept, out = array(stream), []
    for m in (1, 32):
        x, y = np.ones((m, SHAPE.width), np.uint64), np.empty((m, SHAPE.vocab), np.uint64)
        for how, w in (("in memory", kept), ("expanded", stream), ("decrypted", stored)):
            spent = []
            for _ in range(7):
                begin = time.process_time()
                product(x, w, y)
                spent.append(time.process_time() - begin)
            out.append(
                {"rows": m, "component": how, "gb_per_cpu_s": round(kept.nbytes / 1e9 / min(spent), 2)}
            )
    begin = time.process_time()
    for _ in range(7):
        for _ in stream.blocks():
            pass
    spent = (time.process_time() - begin) / 7
    out.append({"rows": 0, "component": "expanded", "gb_per_cpu_s": round(kept.nbytes / 1e9 / spent, 2)})
    store.close()
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "storage.json")
    parser.add_argument("--open", nargs=2, metavar=("HOW", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(opened(options.open[0], Path(options.open[1]))))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="mimir-storage-"))
    try:
        result: dict[str, Any] = {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
            "load": os.getloadavg(),
            "ciphers_mb_per_cpu_s": ciphers(),
            "upload": fill(folder / "data"),
            "open": [],
        }
        result["products"] = products(folder / "data")
        for how in KEEP:
            command = [sys.executable, __file__, "--open", how, str(folder / "data")]
            runs = [
                json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(5)
            ]
            middle = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "how"}
            result["open"].append({"how": how, **middle})
        result["load_after"] = os.getloadavg()
    finally:
        shutil.rmtree(folder)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
