"""What a person or a program sees of a command: streamed text, progress on a terminal, or JSON lines.

Text goes to standard output, everything else to standard error, so that output can be piped. With `--json`
every event is one JSON object on one line of standard output and nothing else is printed there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

REFRESH = 0.1  # seconds between two drawings of the progress line
WIDTH = 100
BAR = 30
STYLES = {
    "good": "32",
    "bad": "1;31",
    "loud": "1;33",
}  # SGR parameters; on terminals only, NO_COLOR is heeded


class Terminal:
    """One command's output. `progress`: None shows it on terminals only."""

    def __init__(self, as_json: bool = False, progress: bool | None = None) -> None:
        self.as_json = as_json
        self._out: TextIO = sys.stdout
        self._err: TextIO = sys.stderr
        self._live = self._err.isatty()
        self._show = (self._live if progress is None else progress) and not as_json
        self._guard = self._out.isatty()
        self._colours = self._guard and not os.environ.get("NO_COLOR")
        self._line = ""
        self._last = 0.0
        self._phase = ""

    def event(self, kind: str, /, **values: Any) -> None:
        """One JSON line; nothing without `--json`."""
        if self.as_json:
            self._out.write(json.dumps({"event": kind, **values}) + "\n")
            self._out.flush()

    def text(self, piece: str, style: str = "") -> None:
        """A piece of the answer, at once. On a terminal, control characters are shown and not obeyed, and a
        style of STYLES is used."""
        if self.as_json or not piece:
            return
        self.clear()
        piece = visible(piece) if self._guard else piece
        self._out.write(f"\x1b[{STYLES[style]}m{piece}\x1b[0m" if style and self._colours else piece)
        self._out.flush()

    def note(self, line: str) -> None:
        """A line for the person, on standard error."""
        if not self.as_json:
            self.clear()
            self._err.write(line + "\n")
            self._err.flush()

    def progress(self, phase: str, line: str) -> None:
        """Where the work stands. Redrawn in place on a terminal; elsewhere one line per phase."""
        if not self._show:
            return
        now = time.monotonic()
        if not self._live:
            if phase != self._phase:
                self._err.write(line + "\n")
                self._err.flush()
        elif phase != self._phase or now - self._last >= REFRESH:
            self._draw(line[:WIDTH])
            self._last = now
        self._phase = phase

    def clear(self) -> None:
        """Take the progress line away, so that something else can be printed."""
        if self._line:
            self._draw("")

    def _draw(self, line: str) -> None:
        self._err.write("\r" + line.ljust(len(self._line)) + ("\r" if not line else ""))
        self._err.flush()
        self._line = line


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters but newline and tab become U+FFFD."""
    return "".join(
        character if character in "\n\t" or not _controls(character) else "\ufffd" for character in text
    )


def _controls(character: str) -> bool:
    code = ord(character)
    # C0, DEL, C1, and the marks that reorder or hide text.
    return code < 32 or 127 <= code < 160 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def bar(done: int, total: int) -> str:
    """A bar of fixed width with a percentage."""
    share = done / total if total else 1.0
    full = int(share * BAR)
    return f"[{'#' * full}{'.' * (BAR - full)}] {share:4.0%}"


def amount(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
