"""Emulation of a wide-area link between WireGuard endpoints: builds and runs the relay of `relay.c`.

The kernel's own netem needs a module that many machines lack. The relay needs nothing but a compiler: each
end sends to the relay's port of its pair instead of to the other end, and the datagrams pass unread. The path
outside the tunnels (clients to parties) is not delayed.

    python -m wg.relay build OUT        compile it
    python -m wg.relay shape 20:100     print the relay's shape for 20 ms round trip and 100 Mbit/s
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wg.errors import NotPossibleHere, TunnelError

SOURCE = Path(__file__).with_name("relay.c")
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
BUILD_SECONDS = 120.0
START_SECONDS = 10.0
STOP_SECONDS = 3.0


@dataclass(frozen=True)
class Shape:
    """One direction of a link: milliseconds, Mbit/s (0: no limit), percent."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    rate_mbit: float = 0.0
    loss_percent: float = 0.0
    queue_ms: float = 100.0

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From RTT_MS or RTT_MS:MBIT, the same in both directions: half the round trip each way."""
        round_trip, _, rate = text.partition(":")
        try:
            shape = cls(delay_ms=float(round_trip) / 2, rate_mbit=float(rate or 0))
        except ValueError:
            raise TunnelError(f"{text!r}: a link is RTT_MS or RTT_MS:MBIT, such as 20 or 20:100") from None
        if not (0 <= shape.delay_ms <= 10_000 and 0 <= shape.rate_mbit <= 100_000):
            raise TunnelError(f"{text!r}: at most 20000 ms and 100000 Mbit/s")
        return shape

    def __str__(self) -> str:
        return (
            f"delay={self.delay_ms:g},jitter={self.jitter_ms:g},rate={self.rate_mbit:g},"
            f"loss={self.loss_percent:g},queue={self.queue_ms:g}"
        )


@dataclass(frozen=True)
class Pair:
    """The two ends of a link, each IPv4:PORT: where the relay listens for it, and where it is itself."""

    listen_a: str
    peer_a: str
    listen_b: str
    peer_b: str


def build(out: str | os.PathLike[str]) -> Path:
    """Compile the relay to `out`. Raises `NotPossibleHere` without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        raise NotPossibleHere("the emulation of a wide-area link needs a C compiler; install gcc")
    done = subprocess.run(
        [compiler, *FLAGS, str(SOURCE), "-o", os.fspath(out)],
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise TunnelError(f"{SOURCE} does not compile:\n{done.stderr}")
    return Path(out)


class Relay:
    """A running relay, ended on exit of the `with`; `counters()` also gives how late datagrams left."""

    def __init__(
        self,
        program: str | os.PathLike[str],
        shape: Shape,
        pairs: Sequence[Pair],
        *,
        prefix: Sequence[str] = (),
        fifo: bool = False,
        seed: int = 1,
    ) -> None:
        self._command = [*prefix, os.fspath(program), "--seed", str(seed), "--shape", str(shape)]
        if fifo:
            self._command.append("--fifo")
        for pair in pairs:
            self._command += ["--pair", pair.listen_a, pair.peer_a, pair.listen_b, pair.peer_b]

    def __enter__(self) -> Relay:
        self._child = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        if self._child.stdout.readline() != "ready\n":
            self._child.wait(START_SECONDS)
            raise TunnelError("the relay did not start; see what it wrote to standard error")
        return self

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        try:
            self._child.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def blackout(self) -> None:
        """Begin to lose everything, or end that."""
        self._child.send_signal(signal.SIGUSR1)

    def counters(self) -> list[dict[str, Any]]:
        assert self._child.stdout is not None
        self._child.send_signal(signal.SIGUSR2)
        found: list[dict[str, Any]] = json.loads(self._child.stdout.readline())
        return found


def main(words: Sequence[str]) -> int:
    match words:
        case ["build", out]:
            build(out)
        case ["shape", text]:
            print(Shape.parse(text))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TunnelError as problem:
        print(f"wg.relay: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
