"""scripts/local_mesh.sh as a user meets it: it works, leaves nothing, and works again, however it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab import why_not

from wg.capture import HARMLESS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "local_mesh.sh"
PARTIES = ("10.90.0.1", "10.90.0.2", "10.90.0.3")
PATIENCE = 240.0
# The protocol runs to the end of a bucket: short ones keep the tests short.
SHORT = ("--set", "scheduler.prompt_buckets=[8]", "--set", "scheduler.output_buckets=[4]")

pytestmark = [pytest.mark.slow, pytest.mark.netns]


def command(*words: str) -> list[str]:
    return [str(SCRIPT), "--no-setup", "--max-new", "4", *SHORT, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "MIMIR_VENV": sys.prefix}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=False,
    )


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """The script in a process group of its own, as a terminal would start it."""
    child = subprocess.Popen(
        command(*words),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait(60)


def read_until(child: subprocess.Popen[str], text: str) -> None:
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if text in line:
            return
    pytest.fail("the script ended before it said so:\n" + "".join(said))


def left_of(pid: int) -> list[str]:
    """Namespaces, records and processes of the run with this pid."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    found = [name for name in names if name.startswith(f"mimir-{pid}-")]
    found += [str(path) for path in Path("/run/mimir-mesh").glob(str(pid))]
    found += [str(path) for path in Path("/var/run/wireguard").glob(f"mm{pid}-*")]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"mm{pid}-" in text:  # the tunnels' names carry the pid
            found.append(text)
    return found


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    if reason := why_not():
        pytest.skip(reason)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_it_answers_and_leaves_nothing_and_does_so_again(tmp_path: Path) -> None:
    answers = []
    # The second time under ever new tunnel keys, and so long that they change also on a fast machine.
    longer = (
        "--set",
        "scheduler.output_buckets=[100]",
        "--max-new",
        "100",
        "--set",
        "tunnel.rotate_seconds=5",
    )
    for settings in ((), longer):
        with running("--json", "--workdir", str(tmp_path), *settings) as child:
            out, err = child.communicate(timeout=PATIENCE)
            assert child.returncode == 0, err
            assert left_of(child.pid) == []
        done = [event for event in events(out) if event["event"] == "done"]
        answers.append(done[0]["ids"])
    assert len(answers[0]) == 4 and answers[0] == answers[1][:4]  # greedy
    committed = (tmp_path / "party0" / "log").read_text().count("rotation committed")
    assert committed >= 4  # with both peers, more than the first
    assert (tmp_path / "party0" / "identity.key").stat().st_mode & 0o777 == 0o600
    assert "ip netns add" in (tmp_path / "commands.log").read_text()


def epochs(mesh: dict[str, Any], party: int) -> dict[int, int]:
    """Which generation of keys the party uses with each peer, as `mimir status` says."""
    words = [*mesh["prefix"], f"{sys.prefix}/bin/mimir", "status", "--json"]
    words += ["--federation", f"{mesh['workdir']}/client.toml"]
    said = events(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    status = next(event["status"] for event in said if event["status"]["party"] == party)
    return {entry["party"]: entry["epoch"] for entry in status["service"]["tunnel"]}


def test_only_wireguard_passes_between_the_parties() -> None:
    with running("--json", "--keep") as child:
        assert child.stdout is not None
        first = json.loads(child.stdout.readline())
        assert first["event"] == "mesh" and first["tunnel"]
        sniffer = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                f"mimir-{child.pid}-net",
                sys.executable,
                "-m",
                "wg.capture",
                "15",
                *PARTIES,
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert sniffer.stdout is not None and sniffer.stdout.readline() == "ready\n"
        for line in child.stdout:
            if json.loads(line)["event"] == "done":
                break
        before = epochs(first, 2)
        os.kill(int(first["pids"][2]), signal.SIGUSR1)  # both its peers lead: it asks them for new keys
        deadline = time.monotonic() + PATIENCE
        while any(epochs(first, 2)[peer] <= before[peer] for peer in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        report = json.loads(sniffer.communicate(timeout=60)[0])
        assert set(report["kinds"]) <= HARMLESS, report["foreign"]
        assert report["kinds"]["wireguard"] > 1000
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(60) == 130
    assert left_of(child.pid) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(number: signal.Signals, status: int) -> None:
    with running() as child:
        read_until(child, "up and see each other")
        os.killpg(child.pid, number)  # what Ctrl-C does
        assert child.wait(60) == status
    assert left_of(child.pid) == []


def test_killed_outright_it_is_swept_up_by_the_next_run() -> None:
    with running() as child:
        read_until(child, "up and see each other")
        child.kill()
        child.wait()
    deadline = time.monotonic() + 30  # the parties end by themselves, with their wireguard-go
    while any("wireguard-go" in entry for entry in left_of(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any("wireguard-go" in entry for entry in left_of(child.pid))
    assert left_of(child.pid) != []
    again = run()
    assert again.returncode == 0, again.stderr
    assert "left behind by a run that was killed" in again.stderr
    assert left_of(child.pid) == []


def test_a_party_that_dies_is_reported_and_all_is_taken_down(tmp_path: Path) -> None:
    with running("--json", "--keep", "--workdir", str(tmp_path)) as child:
        assert child.stdout is not None
        first = json.loads(child.stdout.readline())
        os.kill(int(first["pids"][1]), signal.SIGKILL)
        _, err = child.communicate(timeout=PATIENCE)
        assert child.returncode not in (0, None) and "log" in err
    assert left_of(child.pid) == []


def test_over_a_wide_area() -> None:
    result = run("--wan", "6:100", "--json")
    assert result.returncode == 0, result.stderr


def test_without_a_tunnel_it_warns_and_works() -> None:
    result = run("--no-tunnel", "--json", "--base-port", "27100")
    assert result.returncode == 0, result.stderr
    assert "WITHOUT TRANSPORT PROTECTION" in result.stderr


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    for words, status in [
        (("--nonsense",), 2),
        (("--max-new", "x"), 2),
        (("--wan", "20", "--no-tunnel"), 2),
        (("--wan", "20;rm"), 2),
        (("--base-port", "80"), 2),
        (("--rotate", "3"), 2),
        (("--model", str(tmp_path)), 4),
    ]:
        result = run(*words)
        assert result.returncode == status and result.stderr.startswith("local_mesh: ")
