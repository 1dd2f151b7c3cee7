"""Errors of the tunnel. `exit_code` uses the numbers that Mimir's command line documents."""

from __future__ import annotations

from collections.abc import Sequence


class WgError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class KeyFileError(WgError):
    """A key file or key text that cannot be used; names the file and says what to do."""

    exit_code = 3


class TunnelError(WgError):
    """The tunnel cannot be raised or kept; names the interface or the peer."""

    exit_code = 9


class NotPossibleHere(TunnelError):
    """This host lacks a right, a device or a program; says which and how to get it."""

    exit_code = 5


class DeviceLost(TunnelError):
    """The interface vanished while in use: wireguard-go ended, or somebody removed the interface."""


class HandshakeTimeout(TunnelError):
    """Some peers did not complete a handshake before the deadline. `peers` holds their indices."""

    def __init__(
        self, interface: str, peers: Sequence[int], seconds: float, absent: Sequence[int] = ()
    ) -> None:
        said = []
        if waited := [index for index in peers if index not in absent]:
            said.append(
                f"no WireGuard handshake with peer {_list(waited)} within {seconds:.0f} s; "
                "is it running, is its endpoint reachable over UDP, "
                "and do both sides hold each other's public key?"
            )
        if absent:
            said.append(f"peer {_list(absent)} was not admitted within {seconds:.0f} s")
        super().__init__(f"{interface}: {' And '.join(said)}")
        self.peers = tuple(peers)


def _list(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The single errors in a group of groups."""
    found: list[BaseException] = []
    for problem in group.exceptions:
        found += leaves(problem) if isinstance(problem, BaseExceptionGroup) else [problem]
    return found
