"""One request to a cloud's service: over TCP, or over vsock to what an enclave's parent passes on.

TLS ends here, inside the enclave: the parent sees ciphertext. Nothing is redirected, and no more than a few
kilobytes are read of an answer.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from mimir.config import Address
from mimir.errors import EnvironmentMissing

MAX_ANSWER = 64 << 10
SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """Status and body."""

    status: int
    body: bytes


class _Connection(http.client.HTTPConnection):
    """Goes to `place` whatever the host's name, and speaks TLS with that name if there is a context."""

    def __init__(self, host: str, place: Address, tls: ssl.SSLContext | None) -> None:
        super().__init__(host, timeout=SECONDS)
        self._place, self._tls = place, tls

    def connect(self) -> None:
        if self._place.host.startswith("vsock:"):
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            sock.settimeout(SECONDS)
            target: tuple[int, int] = (int(self._place.host.removeprefix("vsock:")), self._place.port)
            try:
                sock.connect(target)
            except BaseException:
                sock.close()
                raise
        else:
            sock = socket.create_connection((self._place.host, self._place.port), SECONDS)
        if self._tls is not None:
            sock = self._tls.wrap_socket(sock, server_hostname=self.host)
        self.sock = sock


async def request(
    method: str,
    host: str,
    place: Address,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    tls: ssl.SSLContext | None,
) -> Answer:
    """The answer, whatever its status; `EnvironmentMissing` if there is none in time."""

    def ask() -> Answer:
        connection = _Connection(host, place, tls)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, response.read(MAX_ANSWER + 1))
        finally:
            connection.close()

    answer = None
    try:
        with trio.move_on_after(SECONDS):
            answer = await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentMissing(f"{host} at {place}: {error}; is there a way to it from here?") from None
    if answer is None or len(answer.body) > MAX_ANSWER:
        raise EnvironmentMissing(f"{host} at {place}: no answer of a sensible length within {SECONDS:g} s")
    return answer
