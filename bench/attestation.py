#!/usr/bin/env python3
"""What evidence costs: the time to make it, where that can be done here, and to verify it, of each kind.

    python bench/attestation.py                 100 of each, a few seconds
    python bench/attestation.py --out FILE      the result (default: bench/results/attestation.json)

Verified is evidence of real machines from shared/vectors/attestation, as of its own time, by the way on which
peers are admitted (`attest.appraisal.verify`): envelope, chain to the pinned root, collateral. Made and
appraised whole is that of a software TPM, started for this. Evidence of SNP, TDX and Nitro is made by
hardware that this machine has not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cbor2  # noqa: E402
import trio  # noqa: E402
from conftest import find_shared  # noqa: E402
from software_tpm import software_tpm  # noqa: E402

from mimir import config  # noqa: E402
from mimir.attest import appraisal, policy  # noqa: E402
from mimir.attest.collateral import Collateral, Item  # noqa: E402
from mimir.attest.evidence import Claims, Envelope  # noqa: E402
from mimir.attesters import code_digest, open_attester  # noqa: E402
from mimir.attesters.enrolment import enrol  # noqa: E402


@dataclass(frozen=True)
class Case:
    """Evidence of one kind, with what its verification needs."""

    name: str
    envelope: Envelope
    store: Collateral
    now: datetime

    def verify(self) -> None:
        appraisal.verify(self.envelope, self.store, self.now, timedelta(0))


def cases(shared: Path) -> Iterator[Case]:
    """One of each kind, of real machines."""
    vectors = shared / "vectors" / "attestation"

    def read(path: str) -> bytes:
        return (vectors / path).read_bytes()

    def case(
        name: str, kind: str, evidence: bytes, now: str, endorsed: dict[str, bytes], collateral: str = ""
    ) -> Case:
        at, items = datetime.fromisoformat(now).replace(tzinfo=UTC), {}
        if collateral:
            raw = read(collateral)
            fmspc = json.loads(json.loads(raw)["tcb_info"])["fmspc"].lower()
            items[f"intel/{fmspc}.json"] = Item(raw, at)
        return Case(name, Envelope(kind, evidence, b"\xa0", endorsed), Collateral(items), at)

    def parts(folder: str, **more: bytes) -> bytes:
        pcrs = json.loads(read(f"tpm/{folder}/pcrs.json"))
        banks = {
            bank: {int(n): bytes.fromhex(value) for n, value in values.items()}
            for bank, values in pcrs.items()
        }
        given: dict[str, Any] = {
            "hcl": read(f"tpm/{folder}/hcl_report.bin"),
            "quote": read(f"tpm/{folder}/tpm_quote.bin"),
            "signature": read(f"tpm/{folder}/tpm_sig.bin"),
            "pcrs": banks,
        }
        return cbor2.dumps(given | more, canonical=True)

    def chip(folder: str, product: str) -> dict[str, bytes]:
        return {"vek": read(f"{folder}/vcek.pem"), "chain": read(f"snp/ca/ask_ark_{product}.pem")}

    for product in ("genoa", "turin"):
        report = read(f"snp/azure_{product}/report.bin")
        yield case(f"snp ({product})", "snp", report, "2026-07-01", chip(f"snp/azure_{product}", product))
    yield case(
        "tdx",
        "tdx",
        read("tdx/google_v5/quote.bin"),
        "2026-03-10",
        {},
        "tdx/collateral/phala_90c06f.json",
    )
    yield case(
        "nitro", "nitro", read("nitro/base_prod_1.cbor"), _time_of("nitro", "prod-public-key", vectors), {}
    )
    yield case(
        "az-snp-vtpm",
        "az-snp-vtpm",
        parts("azure_snp_genoa"),
        "2026-07-01",
        chip("tpm/azure_snp_genoa", "genoa"),
    )
    yield case(
        "az-tdx-vtpm",
        "az-tdx-vtpm",
        parts("azure_tdx_v1", td_quote=read("tpm/azure_tdx_v1/td_quote.bin")),
        "2025-11-05",
        {},
        "tpm/collateral/automata_1025.json",
    )


def _time_of(name: str, case: str, vectors: Path) -> str:
    listed = json.loads((vectors / name / "MANIFEST.json").read_text())["cases"]
    return str(next(each for each in listed if each["id"] == case)["checks"][0]["at"]).removesuffix("Z")


class Stopwatch:
    """Milliseconds of several runs: by the clock (median, worst), and of this process's processor time
    (median), which other work on the machine disturbs less."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *exc: object) -> None:
        self._wall.append(1e3 * (time.perf_counter() - self._start[0]))
        self._cpu.append(1e3 * (time.process_time() - self._start[1]))

    def figures(self) -> dict[str, float]:
        found = {
            "median_ms": statistics.median(self._wall),
            "worst_ms": max(self._wall),
            "cpu_ms": statistics.median(self._cpu),
        }
        return {name: round(value, 2) for name, value in found.items()}


def timed(work: Callable[[], Any], count: int) -> dict[str, float]:
    watch = Stopwatch()
    for _ in range(count):
        with watch:
            work()
    return watch.figures()


async def software(socket: Path, count: int) -> dict[str, Any]:
    """A software TPM's evidence made, and appraised by the policy that wants it."""
    make, judge, size = Stopwatch(), Stopwatch(), 0
    async with open_attester(config.Attester("swtpm", socket)) as attester:
        entry = enrol(await attester.attest(_claims(bytes(32))), "it", configured=True).entry
        text = 'format = 1\nname = "bench"\nversion = 1\nenvironment = "simulation"\n'
        path = socket.with_name("policy.toml")
        path.write_text(text + "not_after = 2099-01-01T00:00:00Z\n" + entry)
        wanted = policy.load(path)
        for _ in range(count):
            claims = _claims(wanted.digest())
            with make:
                raw = (await attester.attest(claims)).encode()
            with judge:
                appraisal.appraise(raw, wanted, Collateral(), claims, datetime.now(UTC))
            size = len(raw)
    return {"bytes": size, "make": make.figures(), "appraise": judge.figures()}


def _claims(digest: bytes) -> Claims:
    now, some = int(time.time()), bytes(32)
    nonce = secrets.token_bytes(32)
    return Claims("party", "it", some, some, some, nonce, "bench", now - 5, now + 600, digest, some, some)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attestation.json")
    options = parser.parse_args()
    shared = find_shared()
    if shared is None:
        raise SystemExit("attestation: the recorded evidence (shared/) is not beside the repository")
    before = os.getloadavg()
    verified = {
        each.name: {"bytes": len(each.envelope.encode())} | timed(each.verify, options.count)
        for each in cases(shared)
    }
    with software_tpm() as chip:
        made = trio.run(software, chip.socket, options.count)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "load": {"before": before, "after": os.getloadavg()},
        "count": options.count,
        "verify": verified,
        "swtpm": made,
        "code_digest": timed(code_digest, 10),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")

    def line(name: str, size: int, what: str, figures: dict[str, float]) -> None:
        by_clock = f"{figures['median_ms']:6.1f} ms by the clock (worst {figures['worst_ms']:.1f})"
        print(f"{name:13} {size:6} bytes  {what:9} {by_clock}, {figures['cpu_ms']:.1f} ms of processor time")

    for name, figures in verified.items():
        line(name, figures["bytes"], "verified", figures)
    line("swtpm", made["bytes"], "made", made["make"])
    line("swtpm", made["bytes"], "appraised", made["appraise"])
    line("code digest", 32, "made", result["code_digest"])
    print(f"load {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after; written to {options.out}")


if __name__ == "__main__":
    main()
