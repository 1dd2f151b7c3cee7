"""Actors: one task and one bounded mailbox each, frozen messages, no shared state.

Every session has its own family of actors (session, triples, matmul, softmax, sampler). Were one of these to
serve two sessions, two parties could serve them in different order and wait for each other for ever; those
that serve all sessions of a model (decode, the shared producer) agree with their peers before each piece of
work. An error in an actor rises through its nursery and ends that session, or the sessions of that work, and
no other.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

import trio

from mimir.errors import AbortError, LocalError, PeerError

M = TypeVar("M")
R = TypeVar("R")

MAILBOX: Final = 8  # messages an actor may be behind before its senders wait


class Reply(Generic[R]):
    """Where the answer to one message goes. Given once."""

    __slots__ = ("_error", "_event", "_value")

    def __init__(self) -> None:
        self._event = trio.Event()
        self._value: list[R] = []
        self._error: Exception | None = None

    def set(self, value: R) -> None:
        self._give()
        self._value.append(value)

    def fail(self, error: Exception) -> None:
        """Have `get` raise."""
        self._give()
        self._error = error

    def _give(self) -> None:
        if self._event.is_set():
            raise LocalError("a reply is given once")
        self._event.set()

    async def get(self) -> R:
        await self._event.wait()
        if self._error is not None:
            raise self._error
        return self._value.pop()


class Actor(Generic[M]):
    """Handles its messages one after another. Subclasses define `handle`."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[M](MAILBOX)

    async def tell(self, message: M) -> None:
        """Put a message into the mailbox; waits while it is full."""
        await self._send.send(message)

    async def run(self) -> None:
        async for message in self._receive:
            await self.handle(message)

    async def handle(self, message: Any) -> None:
        raise LocalError(f"{type(self).__name__} does not handle messages")


def cause_of(error: BaseException) -> BaseException:
    """The error that explains a group of them: a peer's fault before an abort, an abort before the rest."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [cause_of(e) for e in error.exceptions]
    for kind in (PeerError, AbortError, Exception):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]
