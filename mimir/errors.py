"""Every error a user or a peer can meet, with its exit code.

Blame is part of the type: `LocalError` is our own misuse, `PeerError` names the party that sent something
wrong, `AbortError` ends a session without saying which check failed.
"""

from __future__ import annotations

from typing import Any


class MimirError(Exception):
    """Base of all errors that Mimir raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class LocalError(MimirError):
    """The caller broke a contract of ours: a bug on this side, never the peer's fault."""

    exit_code = 70


class BadInput(MimirError):
    """A file, flag or prompt that cannot be used; the message names it and says what to do."""

    exit_code = 2


class ConfigError(BadInput):
    """A configuration file that cannot be used; names the file and the key."""

    exit_code = 3


class ModelError(BadInput):
    """A checkpoint that cannot be used; names the directory and the tensor."""

    exit_code = 4


class EnvironmentMissing(MimirError):
    """This host lacks something (root, a device, a program); says what and how to get it."""

    exit_code = 5


class DeviceError(EnvironmentMissing):
    """A device that makes evidence or keeps secrets refused, or answered nonsense; names it and the
    request."""


class PeerError(MimirError):
    """A peer was silent, broke the protocol, or failed a check. `party` is its number, `step` where."""

    exit_code = 6

    def __init__(self, party: int, step: str, why: str) -> None:
        super().__init__(f"party {party} at step {step}: {why}")
        self.party = party
        self.step = step
        self.why = why


class AbortError(MimirError):
    """The session has been aborted; nothing more is delivered. `suspects` is for the local log only."""

    exit_code = 7

    def __init__(self, why: str = "session aborted", suspects: tuple[int, ...] = ()) -> None:
        super().__init__(why)
        self.suspects = suspects


class ClientError(MimirError):
    """A client could not get an answer it may trust; the message says from whom and why."""

    exit_code = 8


class AttestationError(MimirError):
    """Evidence, a policy or a revocation does not hold. `step` is a stable name, such as "snp.chain"."""

    exit_code = 10

    def __init__(self, step: str, expected: str, got: str, passed: tuple[Any, ...] = ()) -> None:
        super().__init__(f"{step}: expected {expected}; got {got}")
        self.step = step
        self.expected = expected
        self.got = got
        self.passed = passed  # the steps before this one, for those who explain
