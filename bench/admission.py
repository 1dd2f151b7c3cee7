"""What an admission costs: two parties in one process, each with a software TPM, the messages handed over
without a network.

    python bench/admission.py [--count N]

Prints JSON: medians of one exchange, both parties together, by the clock and in processor time of this
process (swtpm's own is not in it), the evidence and its appraisal apart, and the bytes that pass each way.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mimir import config, hpke  # noqa: E402
from mimir.admission.exchange import Admit, Attest, Own, Pair, Send, Standing  # noqa: E402
from mimir.attest import policy  # noqa: E402
from mimir.attest.appraisal import Verdict, appraise  # noqa: E402
from mimir.attest.collateral import Collateral  # noqa: E402
from mimir.attest.evidence import Claims  # noqa: E402
from mimir.attesters import Attester, open_attester  # noqa: E402
from mimir.attesters.enrolment import enrol  # noqa: E402
from mimir.net.identity import Identity  # noqa: E402

CONFIG = bytes(32)
HEAD = (
    'format = 1\nname = "bench"\nversion = 1\nenvironment = "simulation"\nnot_after = 2035-01-01T00:00:00Z\n'
)


class Watch:
    """Seconds, by the clock and of this process, by what they went into."""

    def __init__(self) -> None:
        self.taken: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        clock, used = time.perf_counter(), time.process_time()
        yield
        spent = time.perf_counter() - clock, time.process_time() - used
        self.taken.setdefault(what, []).append(spent)

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            what: {
                name: round(1000 * statistics.median(each[at] for each in all_), 2)
                for at, name in enumerate(("clock_ms", "processor_ms"))
            }
            for what, all_ in self.taken.items()
        }


class Judge:
    """By one policy, with nothing revoked and no certificates."""

    config, life, epoch = CONFIG, timedelta(hours=1), 0

    def __init__(self, wanted: policy.Policy, watch: Watch) -> None:
        self.wanted, self.policy, self.watch = wanted, wanted.digest(), watch

    def appraise(self, raw: bytes, expected: Claims, now: datetime) -> Verdict:
        with self.watch.on("evidence appraised"):
            return appraise(raw, self.wanted, Collateral(), expected, now)

    def rejudge(self, standing: Standing, now: datetime) -> None: ...
    def revoked(self, identity: bytes, verdict: Verdict | None) -> None: ...
    def learn(self, news: bytes) -> None: ...

    def news(self, epoch: int) -> bytes:
        return b""

    def issue(self, peer: int, verdict: Verdict, tls: bytes | None, until: datetime) -> bytes:
        return b""


async def one(pairs: list[Pair], attesters: list[Attester], watch: Watch) -> list[int]:
    """One exchange; the bytes that each sent."""
    now = datetime.now(UTC)
    ends = [pairs[0].open(True), pairs[1].open(False)]
    post: deque[tuple[int, bytes]] = deque()
    sent, admitted = [0, 0], 0
    todo: deque[tuple[int, Any]] = deque((0, each) for each in ends[0].start())
    while todo or post:
        if not todo:
            node, data = post.popleft()
            todo.extend((node, each) for each in ends[node].receive(data, now))
            continue
        node, action = todo.popleft()
        match action:
            case Send(data):
                sent[node] += len(data)
                post.append((1 - node, data))
            case Attest(claims):
                with watch.on("evidence made"):
                    envelope = await attesters[node].attest(claims)
                todo.extend((node, each) for each in ends[node].attested(envelope, now))
            case Admit():
                admitted += 1
    assert admitted == 2
    return sent


async def measure(sockets: list[Path], count: int) -> dict[str, Any]:
    watch = Watch()
    async with (
        open_attester(config.Attester("swtpm", sockets[0])) as first,
        open_attester(config.Attester("swtpm", sockets[1])) as second,
    ):
        attesters: list[Attester] = [first, second]
        blob = bytes(32)
        claims = Claims("party", "x", blob, blob, None, blob, "x", 0, 9, blob, None, CONFIG)
        entries = [
            enrol(await each.attest(claims), f"party{n}", configured=True).entry
            for n, each in enumerate(attesters)
        ]
        wanted = policy.parse(tomllib.loads(HEAD + "".join(entries)), Path("bench.toml").absolute())
        identities = [Identity.generate() for _ in range(2)]
        sent = [0, 0]
        for _ in range(count):
            pairs = []
            for node in (0, 1):
                own, peer = identities[node], identities[1 - node].public
                keys = Own(node, own.public, own.sign, secrets.token_bytes(32), hpke.HpkeKey())
                pairs.append(Pair(keys, 1 - node, peer, Judge(wanted, watch)))
            with watch.on("exchange of both, evidence and appraisals included"):
                sent = await one(pairs, attesters, watch)
            with watch.on("renewal of both"):
                await one(pairs, attesters, watch)
    return {"medians": watch.medians(), "bytes_sent": sent, "count": count, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50)
    options = parser.parse_args()
    with ExitStack() as stack:
        sockets = []
        for _ in range(2):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mm-tpm-")))
            child = subprocess.Popen([ROOT / "scripts" / "software_tpm", folder], stderr=subprocess.DEVNULL)
            stack.callback(child.wait)
            stack.callback(child.terminate)
            sockets.append(folder / "socket")
            while not sockets[-1].exists():
                if child.poll() is not None:
                    sys.exit("scripts/software_tpm ended: is swtpm installed?")
                time.sleep(0.01)
        print(json.dumps(trio.run(measure, sockets, options.count), indent=1))


if __name__ == "__main__":
    main()
