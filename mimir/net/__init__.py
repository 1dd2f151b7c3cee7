"""Bytes between parties: what a channel promises, and the limits every transport keeps.

`wire` decides what may be on a link (no I/O), `memory` joins parties inside one process, `mesh` joins three
hosts over TCP, `identity` says who is who. This package carries bytes and knows nothing of shares.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from mimir.secret import Secret

PROTOCOL_VERSION = 12

SESSION_BYTES = 16
LANES = ("control", "online", "prep")  # one connection each: bulk preprocessing never delays an online frame
ROUND_TIMEOUT = 60.0  # seconds a round may take in all, unless the channel's owner says otherwise

# What can be sent: anything with the buffer protocol (bytes, bytearray, memoryview, a C-contiguous array), or
# a list or tuple of such pieces, which travel as one payload without being joined in memory first.
Buffer: TypeAlias = Any
Payload: TypeAlias = Buffer | Sequence[Buffer]

# Answers a peer's request: (peer, body) to a body. An exception is a refusal at the peer; only the text of
# `BadInput` travels with it.
Handler: TypeAlias = Callable[[int, dict[str, Any]], Awaitable[Mapping[str, Any]]]


class Channel(Protocol):
    """One session's conversation on one lane, in lockstep with every peer. Never two rounds at once."""

    party: int  # our own number
    session: bytes  # SESSION_BYTES
    lane: str  # one of LANES, or "<lane>:<name>" for several conversations of one session on one lane
    timeout: float  # seconds for one round, sending included; settable between rounds

    @property
    def rounds(self) -> int:
        """Completed."""
        ...

    @property
    def sent(self) -> int:
        """Bytes put on the links by completed rounds, framing included."""
        ...

    @property
    def received(self) -> int: ...

    async def round(
        self, step: str, send: Mapping[int, Payload], expect: Mapping[int, int]
    ) -> dict[int, bytearray]:
        """Send one frame to every peer, then return the one frame that every peer sent for this same step.

        `send` and `expect` name every peer; `expect[peer]` is the exact length of its payload. The caller's
        buffers are not read after the call ends, however it ends.

        Raises `PeerError` naming the party and the step if a frame has another step, sequence or length, if a
        link drops, or if a peer stays silent for `timeout`; `AbortError` once any party has aborted the
        session. After any of these, and after cancellation, the channel is dead and every later round raises.
        """
        ...

    async def failed(self) -> None:
        """Wait until the channel is dead, also between rounds, and raise what killed it."""
        ...

    async def abort(self, reason_public: str = "abort") -> None:
        """Kill the session here and at every peer, on all lanes. `reason_public` is seen by the peers."""
        ...

    async def aclose(self) -> None:
        """Let go of this channel only. Frames that still arrive for it are dropped."""
        ...


class Transport(Protocol):
    """What one party needs of the network: channels, and secrets shared with exactly one peer."""

    party: int
    peers: tuple[int, ...]

    def channel(self, session: bytes, lane: str) -> Channel:
        """Open this party's end; once per session and lane. The peers may do so earlier or later."""
        ...

    def link_secret(self, peer: int, session: bytes, label: str) -> Secret:
        """32 bytes that `peer` derives too and nobody else can; each (session, label) gives its own."""
        ...

    def on_request(self, kind: str, handler: Handler) -> None:
        """Answer requests of this kind; one handler per kind."""
        ...

    async def request(self, peer: int, kind: str, body: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        """Ask a peer and return its answer within `deadline` seconds, or raise `PeerError`."""
        ...

    def up(self, peer: int) -> bool:
        """Whether all lanes to this peer stand."""
        ...

    async def wait_up(self, deadline: float) -> None:
        """Return when every peer is up; after `deadline` seconds raise `PeerError` naming one that is not."""
        ...
