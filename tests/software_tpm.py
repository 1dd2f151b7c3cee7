"""Software TPMs for tests: started by the very script that parties use, ended by process number."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import missing

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "software_tpm"
PATIENCE = 60.0  # seconds for a loaded machine


def need_swtpm() -> None:
    """Skip where there is no swtpm; where CI=true it must be there."""
    if shutil.which("swtpm") is None:
        missing("needs the program swtpm (Debian: the package swtpm; scripts/setup --attester installs it)")


class SoftwareTpm:
    """One swtpm. Its state outlives `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "socket"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # A socket left by one that was killed must not be taken for the new one's.
        before = self.socket.stat().st_ino if self.socket.exists() else None
        self.process = subprocess.Popen([SCRIPT, self.folder], stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while not self.socket.exists() or self.socket.stat().st_ino == before:
            assert self.process.poll() is None and time.monotonic() < end, "swtpm did not start"
            time.sleep(0.005)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(PATIENCE)

    def restart(self) -> None:
        self.stop()
        self.start()


@contextmanager
def software_tpm() -> Iterator[SoftwareTpm]:
    """A fresh one, of its own seeds."""
    need_swtpm()
    # Not pytest's folder: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="mm-tpm-") as folder:
        made = SoftwareTpm(Path(folder))
        made.start()
        try:
            yield made
        finally:
            made.stop()
