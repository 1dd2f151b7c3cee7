#!/usr/bin/env python3
"""What encryption at rest costs: ciphers by chunk size, and one party's shares of a model in and out.

    python bench/storage.py                  the 15 M shape, vocabulary 32,000; two minutes, 800 MB of disk
    python bench/storage.py --out FILE       the result (default: bench/results/storage.json)

Each opening is a process of its own, with the files in the page cache. "plain" is what the store did before:
words mapped from the file after a SHA-256 of every byte; a few lines here write and open it.
"""

from __future__ import annotations

import argparse
import hashlib
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]

import nacl.bindings as sodium  # noqa: E402
import numpy as np  # noqa: E402
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305  # noqa: E402

from mimir.keys.file import FileCounter  # noqa: E402
from mimir.manifest import Manifest, Tensor  # noqa: E402
from mimir.model.checkpoint import PlanSpec  # noqa: E402
from mimir.secret import StorageKey  # noqa: E402
from mimir.store import SIDES, ModelStore  # noqa: E402
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


def component(shape: tuple[int, ...], number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 2**64, shape, dtype=np.uint64).tobytes()


def fill(root: Path) -> dict[str, Any]:
    """Upload one party's two components of the shape, and write them plainly beside; seconds and bytes."""
    shapes = list(SHAPE.shapes().items())
    hashes = [
        tuple(hashlib.sha256(component(shape, 3 * place + n)).hexdigest() for n in range(3))
        for place, (_, shape) in enumerate(shapes)
    ]
    tensors = tuple(Tensor(name, shape, found) for (name, shape), found in zip(shapes, hashes, strict=True))  # type: ignore[arg-type]
    manifest = Manifest("shape", SHAPE, 16, PARTIES, tensors)
    store = open_store(root)
    incoming = store.begin(manifest.public())
    plain = root.with_name("plain")
    plain.mkdir()
    written = 0.0
    for place, (name, shape) in enumerate(shapes):
        for number, side in enumerate(SIDES):
            data = component(shape, 3 * place + number)
            (plain / f"{name}.{side}").write_bytes(data)
            begin = time.process_time()
            for at in range(0, len(data), PIECE):
                incoming.write(name, side, at, data[at : at + PIECE])
            written += time.process_time() - begin
    begin = time.process_time()
    incoming.verify()
    verified = time.process_time() - begin
    incoming.accept()
    incoming.close()
    store.close()
    sizes = [sum(each.stat().st_size for each in place.rglob("*.[ab]")) for place in (plain, root)]
    return {
        "bytes_plain": sizes[0],
        "bytes_encrypted": sizes[1],
        "upload_cpu_s": round(written, 3),
        "upload_mb_s": round(sizes[0] / 1e6 / written),
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


def opened(how: str, root: Path) -> dict[str, Any]:
    """In a process of its own: open the model, then go through all of it three times."""
    before = memory()
    begin, cpu = time.perf_counter(), time.process_time()
    if how == "plain":
        maps = {}
        for name, shape in SHAPE.shapes().items():
            for side in SIDES:
                path = root.with_name("plain") / f"{name}.{side}"
                words = np.memmap(path, dtype="<u8", mode="r", shape=shape)
                hashlib.sha256(words.reshape(-1).data).hexdigest()
                maps[name, side] = words

        def get(name: str) -> tuple[Any, Any]:
            return maps[name, "a"], maps[name, "b"]

    else:
        store = open_store(root, keep=0 if how == "decrypted at each use" else 4 << 30)
        model = store.open(next(iter(store.models())))
        get = model.get
    seconds, used = time.perf_counter() - begin, time.process_time() - cpu
    after = memory()
    begin = time.process_time()
    for _ in range(3):
        for name in SHAPE.shapes():
            for words in get(name):
                words.sum()
    return {
        "how": how,
        "open_s": round(seconds, 3),
        "open_cpu_s": round(used, 3),
        "pass_cpu_s": round((time.process_time() - begin) / 3, 3),
        "anonymous_mib": after["RssAnon"] - before["RssAnon"],
        "mapped_mib": after["RssFile"] - before["RssFile"],
        "peak_mib": memory()["VmHWM"],
    }


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
        for how in ("plain", "kept decrypted", "decrypted at each use"):
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
