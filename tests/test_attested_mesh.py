"""Three parties as processes, each in a namespace with a software TPM of its own and wireguard-go: admitted
by real quotes, kept out by a wrong measurement, and back by themselves after a crash.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from lab import ROOT, Lab, why_not
from software_tpm import SoftwareTpm, software_tpm

from mimir import config as configuration
from mimir.attest import policy as policies
from mimir.attest.evidence import Claims
from mimir.attest.policy import Signature
from mimir.attesters import open_attester
from mimir.attesters.enrolment import enrol
from mimir.keys.file import save as save_key
from mimir.net.identity import Identity
from mimir.secret import StorageKey

PATIENCE = 120.0
OWNERS = [Identity.generate() for _ in range(2)]


class Process:
    """A party's process and its log."""

    def __init__(self, namespace: str, config: Path, log: Path) -> None:
        self.log = log
        self.read = log.stat().st_size if log.exists() else 0
        self.lines: list[dict[str, Any]] = []
        with open(log, "ab") as file:
            self.child = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, "-m", "mimir", "run", "--config", config],
                stderr=file,
                cwd=ROOT,
            )

    def look(self) -> list[dict[str, Any]]:
        """All that it has said since it started."""
        with open(self.log, "rb") as file:
            file.seek(self.read)
            raw = file.read()
        whole, _, _ = raw.rpartition(b"\n")
        if whole:
            self.read += len(whole) + 1
            self.lines += [json.loads(each) for each in whole.split(b"\n") if each.startswith(b"{")]
        return self.lines

    def wait(self, what: str, **facts: Any) -> dict[str, Any]:
        """The first line with this event and these facts."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for line in self.look():
                if line["event"] == what and all(line.get(key) == value for key, value in facts.items()):
                    return line
            if self.child.poll() is not None:
                break
            time.sleep(0.05)
        pytest.fail(f"{self.log.name} did not say {what!r} {facts}:\n{self.log.read_text()[-6000:]}")


class Federation:
    def __init__(self, lab: Lab, tpms: list[SoftwareTpm], folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.running: dict[int, Process] = {}
        identities = [Identity.generate() for _ in range(3)]
        peers = "".join(
            f'[[peers]]\nparty = {n}\nname = "p{n}"\nidentity = "{identities[n].public_hex}"\n'
            f'host = "10.91.0.{n + 1}"\nport = 7200\nadmission = "10.90.0.{n + 1}:7300"\n'
            f'tunnel_endpoint = "10.90.0.{n + 1}:51820"\ntunnel_allowed = ["10.91.0.{n + 1}/32"]\n'
            for n in range(3)
        )
        keys = ", ".join(f'"{each.public_hex}"' for each in OWNERS)
        self.configs = []
        for n in range(3):
            identities[n].save(folder / f"identity{n}.key")
            save_key(folder / f"storage{n}.key", StorageKey.random())
            text = (
                f'party = {n}\nidentity_key = "identity{n}.key"\ndata_dir = "data{n}"\n'
                f'keys.file = "storage{n}.key"\nkeys.counter = "counter{n}/value"\n'
                f'[control]\nlisten = "10.90.0.{n + 1}:7100"\n[mesh]\nlisten = "10.91.0.{n + 1}:7200"\n'
                f'[tunnel]\ninterface = "{lab.interface(n)}"\naddress = "10.91.0.{n + 1}/24"\n'
                f'listen_port = 51820\n[attestation]\npolicy = "policy.toml"\nowners = [{keys}]\n'
                f'threshold = 2\nlisten = "10.90.0.{n + 1}:7300"\n'
                f'[attester]\nkind = "swtpm"\ndevice = "{tpms[n].socket}"\n'
                f'[log]\nformat = "json"\n{peers}'
            )
            self.configs.append(folder / f"party{n}.toml")
            self.configs[n].write_text(text)
        self.entries = [trio.run(self.entry, n) for n in range(3)]

    async def entry(self, number: int) -> str:
        """The entry for a party's machine as it is, as `mimir attester enroll` prints it."""
        found = configuration.load(self.configs[number])
        assert found.attester is not None
        blob = bytes(32)
        claims = Claims("party", "x", blob, blob, None, blob, "x", 0, 9, blob, None, found.digest())
        async with open_attester(found.attester) as attester:
            return enrol(await attester.attest(claims), f"party{number}", configured=True).entry

    def write_policy(self, version: int, entries: list[str]) -> None:
        draft = self.folder / "draft.toml"
        draft.write_text(
            f'format = 1\nname = "mesh"\nversion = {version}\nenvironment = "simulation"\n'
            "not_after = 2035-01-01T00:00:00Z\n" + "".join(entries)
        )
        message = policies.signed_message(policies.load(draft))
        signed = [Signature(each.public_hex, each.sign(message).hex()) for each in OWNERS]
        (self.folder / "policy.toml.sig").write_text(policies.format_signatures(signed))
        os.replace(draft, self.folder / "policy.toml")

    def start(self, number: int) -> Process:
        log = self.folder / f"party{number}.log"
        made = Process(self.lab.namespace(number), self.configs[number], log)
        self.running[number] = made
        return made

    def end(self, number: int, how: int = signal.SIGTERM) -> int:
        child = self.running[number].child
        child.send_signal(how)
        return child.wait(60)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        tpms = [stack.enter_context(software_tpm()) for _ in range(3)]
        made = Federation(stack.enter_context(Lab(tmp_path)), tpms, tmp_path)
        yield made
        for process in made.running.values():
            if process.child.poll() is None:
                process.child.kill()
                process.child.wait()


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.netns
def test_three_software_tpms_admit_one_another_and_a_wrong_one_stays_out(federation: Federation) -> None:
    at = federation.entries[2].index('"7" = ["') + len('"7" = ["')
    wrong = federation.entries[2][:at] + "ff" * 32 + federation.entries[2][at + 64 :]
    federation.write_policy(1, [*federation.entries[:2], wrong])
    began = time.monotonic()
    parties = [federation.start(n) for n in range(3)]
    for a, b in ((0, 1), (1, 0)):
        admitted = parties[a].wait("admitted", party=b)
        assert admitted["entry"] == f"party{b}" and "SIMULATED" in admitted
        parties[a].wait("peer up", peer=b)
    # Its own check says so first, then both of its peers, and it is told by both.
    own = parties[2].wait(
        "this party's own evidence does not satisfy the policy: its peers will not admit it"
    )
    for n in (0, 1):
        ours = parties[n].wait("peer refused", party=2)
        theirs = parties[2].wait("refused by the peer", party=n)
        assert ours["step"] == theirs["step"] == own["step"] == "policy.entry"
        assert ours["got"] == theirs["got"] and "party2: policy.pcr7" in ours["got"]
        assert not any(each["event"] == "peer up" and each["peer"] == 2 for each in parties[n].look())
    # The owners correct the policy: everybody takes it while running.
    federation.write_policy(2, federation.entries)
    for party in parties:
        party.wait("mesh is up: ready for clients")
    print(f"two admitted, one refused, a new policy, all in the mesh: {time.monotonic() - began:.1f} s")
    for n, party in enumerate(parties):
        steps = {each["step"]: each["seconds"] for each in party.look() if each["event"] == "boot"}
        assert list(steps) == "confine key identity store attest tunnel mesh serve admit peers".split()
        times = [
            (each["seconds"], each["appraisal_seconds"])
            for each in party.look()
            if each["event"] == "admitted"
        ]
        print(f"party {n}: boot steps at {steps} s; exchanges, and appraisals in them, took {times} s")
    # One dies outright, and is back by itself, under keys that it has just made.
    assert federation.end(1, signal.SIGKILL) != 0
    mark = time.monotonic()
    again = federation.start(1)
    again.wait("mesh is up: ready for clients")
    print(f"a killed party is in the mesh again {time.monotonic() - mark:.1f} s after its start")
    until(lambda: sum(each["event"] == "peer up" and each["peer"] == 1 for each in parties[0].look()) >= 2)
    assert [federation.end(n) for n in (0, 1, 2)] == [0, 0, 0]
