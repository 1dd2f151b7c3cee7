"""What a party has to do before it serves, step by step, for its log and for `mimir status`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog

from mimir.errors import LocalError

log = structlog.get_logger("mimir.boot")

#: In the order in which they end; each waits for those that it needs, not for all before it.
STEPS: Final = ("confine", "key", "identity", "store", "attest", "tunnel", "mesh", "admit", "serve", "peers")


@dataclass
class Step:
    """One step. `began` is in seconds after the boot began, `note` one line about what came out of it."""

    name: str
    state: str = "waiting"  # then running, and done, failed or skipped
    began: float | None = None
    seconds: float | None = None
    note: str = ""


class Boot:
    """The steps of one start, each of which may be taken once."""

    def __init__(self, names: Sequence[str] = STEPS) -> None:
        self._start = time.monotonic()  # a boot begins before Trio's clock does
        self._steps = {name: Step(name) for name in names}

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Take the step: it is done when the block ends, failed when it raises."""
        step = self._take(name, "running")
        try:
            yield step
        except BaseException as problem:
            self._end(step, "failed", type(problem).__name__)
            raise
        self._end(step, "done", step.note)

    def skip(self, name: str, why: str) -> None:
        """The party does not take this step."""
        self._take(name, "skipped").note = why

    def status(self) -> list[dict[str, Any]]:
        """Every step in order, public."""
        now = time.monotonic() - self._start
        return [
            {
                "step": step.name,
                "state": step.state,
                "began": None if step.began is None else round(step.began, 3),
                "seconds": round(now - step.began, 3)
                if step.state == "running" and step.began is not None
                else step.seconds,
                "note": step.note,
            }
            for step in self._steps.values()
        ]

    def _take(self, name: str, state: str) -> Step:
        step = self._steps.get(name)
        if step is None or step.state != "waiting":
            raise LocalError(f"boot: no step {name!r} is waiting to be taken")
        step.state, step.began = state, time.monotonic() - self._start
        return step

    def _end(self, step: Step, state: str, note: str) -> None:
        assert step.began is not None
        step.state, step.note = state, note
        step.seconds = round(time.monotonic() - self._start - step.began, 3)
        say = log.info if state == "done" else log.warning
        say("boot", step=step.name, state=state, seconds=step.seconds, **({"note": note} if note else {}))
