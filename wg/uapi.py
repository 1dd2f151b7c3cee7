"""The text protocol of a running wireguard-go, spoken over its unix socket.

A request is `set=1` or `get=1`, lines of `key=value`, and a blank line; the answer ends with `errno=N` and a
blank line. `get=1` answers with the private key among the rest: the parser drops that line while it is still
raw bytes and wipes the buffer, so the key reaches neither a string, nor a log, nor an exception. (The pieces
that the socket returns are immutable and cannot be wiped; they live until the allocator reuses them.)

A `set` is applied line by line, not as a transaction: after an error the lines before it stand.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

import trio

from wg.errors import DeviceLost, KeyFileError, TunnelError
from wg.keys import PresharedKey, PrivateKey, PublicKey

#: Where wireguard-go puts its sockets (`ipc/uapi_linux.go`). Network namespaces do not isolate this path.
SOCKET_DIRECTORY = "/var/run/wireguard"
#: An answer for three peers has about 1 KiB; this bounds what a wrong program behind the socket can send.
ANSWER_LIMIT = 256 * 1024
#: wireguard-go answers within a millisecond; this much silence means it hangs.
ANSWER_SECONDS = 5.0

_SECRET_LINES = (b"private_key=", b"preshared_key=")


@dataclass(frozen=True)
class PeerReading:
    """What the device knows of one peer now. `handshake` is in seconds of wall time, 0.0 for never."""

    public_key: PublicKey
    endpoint: str | None = None
    handshake: float = 0.0
    rx: int = 0
    tx: int = 0
    keepalive: int = 0
    allowed: tuple[str, ...] = ()


@dataclass
class _Draft:
    public_key: PublicKey
    endpoint: str | None = None
    seconds: int = 0
    nanoseconds: int = 0
    numbers: dict[str, int] = field(default_factory=dict)
    allowed: list[str] = field(default_factory=list)

    def done(self) -> PeerReading:
        return PeerReading(
            public_key=self.public_key,
            endpoint=self.endpoint,
            handshake=self.seconds + self.nanoseconds / 1e9,
            rx=self.numbers.get("rx_bytes", 0),
            tx=self.numbers.get("tx_bytes", 0),
            keepalive=self.numbers.get("persistent_keepalive_interval", 0),
            allowed=tuple(self.allowed),
        )


def parse_readings(answer: bytearray) -> list[PeerReading]:
    """The peers in the answer to `get=1`. Wipes `answer`. Raises `TunnelError` on anything malformed."""
    try:
        peers: list[PeerReading] = []
        draft: _Draft | None = None
        for key, value in _fields(answer):
            if key == "public_key":
                if draft is not None:
                    peers.append(draft.done())
                draft = _Draft(PublicKey.from_hex(value))
            elif draft is None:
                continue  # listen_port, fwmark and what later versions add about the device itself
            elif key == "endpoint":
                draft.endpoint = value
            elif key == "allowed_ip":
                draft.allowed.append(value)
            elif key == "last_handshake_time_sec":
                draft.seconds = _number(key, value)
            elif key == "last_handshake_time_nsec":
                draft.nanoseconds = _number(key, value)
            elif key in ("rx_bytes", "tx_bytes", "persistent_keepalive_interval"):
                draft.numbers[key] = _number(key, value)
        if draft is not None:
            peers.append(draft.done())
        return peers
    except KeyFileError as problem:
        raise TunnelError(f"wireguard-go reported a malformed peer: {problem}") from None
    finally:
        answer[:] = bytes(len(answer))


def _fields(answer: bytearray) -> Iterable[tuple[str, str]]:
    """Every `key=value` of the answer but secrets and the final errno, which must be there and be 0."""
    start, code = 0, None
    while start < len(answer):
        end = answer.find(b"\n", start)
        if end < 0:
            raise TunnelError("wireguard-go's answer ends in the middle of a line")
        if end == start:
            break
        if not answer.startswith(_SECRET_LINES, start):
            key, equals, value = bytes(answer[start:end]).partition(b"=")
            if not equals:
                raise TunnelError("wireguard-go's answer has a line without '='")
            if key == b"errno":
                code = _number("errno", value.decode("ascii", "replace"))
            else:
                yield key.decode("ascii", "replace"), value.decode("ascii", "replace")
        start = end + 1
    if code is None:
        raise TunnelError("wireguard-go's answer has no errno")
    if code != 0:
        raise TunnelError(f"wireguard-go refused: {os.strerror(abs(code))} (errno {code})")


def _number(key: str, value: str) -> int:
    if not 1 <= len(value) <= 20 or not value.lstrip("-").isascii() or not value.lstrip("-").isdigit():
        raise TunnelError(f"wireguard-go's answer has a {key} that is no number")
    return int(value)


def socket_path(interface: str) -> str:
    return f"{SOCKET_DIRECTORY}/{interface}.sock"


class UapiClient:
    """One connection to the socket of one interface. Not for use by two tasks at once."""

    def __init__(self, interface: str, stream: trio.abc.Stream) -> None:
        self._interface = interface
        self._stream = stream

    @classmethod
    async def connect(cls, interface: str) -> UapiClient:
        """Connect to the interface's socket. Raises `OSError` while nobody listens there."""
        return cls(interface, await trio.open_unix_socket(socket_path(interface)))

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def readings(self) -> list[PeerReading]:
        return parse_readings(await self._ask(bytearray(b"get=1\n\n")))

    async def configure(self, private_key: PrivateKey, listen_port: int) -> None:
        """Give the device its identity and port, and no peers."""
        request = bytearray(b"set=1\nprivate_key=")
        secret = private_key.hex()
        try:
            request += secret
            request += f"\nlisten_port={listen_port}\nreplace_peers=true\n\n".encode()
            await self._set(request, "private key and listen port")
        finally:
            secret[:] = bytes(len(secret))
            request[:] = bytes(len(request))

    async def put_peer(
        self,
        public_key: PublicKey,
        endpoint: str | None,
        allowed: Iterable[IPv4Network | IPv6Network],
        keepalive: int,
        preshared: PresharedKey | None = None,
    ) -> None:
        """Add the peer, or change it. A keepalive above 0 makes the device send to it at once."""
        request = bytearray(f"set=1\npublic_key={public_key.hex()}\n".encode())
        try:
            if preshared is not None:
                secret = preshared.hex()
                request += b"preshared_key=" + secret + b"\n"
                secret[:] = bytes(len(secret))
            lines = [
                "replace_allowed_ips=true",
                *(f"allowed_ip={network}" for network in allowed),
                *([f"endpoint={endpoint}"] if endpoint is not None else []),
                # Last, since it starts the handshake, and lines take effect one by one.
                f"persistent_keepalive_interval={keepalive}",
            ]
            request += ("\n".join(lines) + "\n\n").encode()
            await self._set(request, f"peer {public_key}")
        finally:
            request[:] = bytes(len(request))

    async def set_keepalive(self, public_key: PublicKey, seconds: int) -> None:
        text = (
            f"set=1\npublic_key={public_key.hex()}\nupdate_only=true\n"
            f"persistent_keepalive_interval={seconds}\n\n"
        )
        await self._set(bytearray(text.encode()), f"keepalive of peer {public_key}")

    async def remove_peer(self, public_key: PublicKey) -> None:
        text = f"set=1\npublic_key={public_key.hex()}\nremove=true\n\n"
        await self._set(bytearray(text.encode()), f"removal of peer {public_key}")

    async def _set(self, request: bytearray, what: str) -> None:
        answer = await self._ask(request)
        try:
            for _ in _fields(answer):
                pass
        except TunnelError as problem:
            raise TunnelError(f"{self._interface}: {what}: {problem}") from None

    async def _ask(self, request: bytearray) -> bytearray:
        answer = bytearray()
        try:
            with trio.fail_after(ANSWER_SECONDS):
                await self._stream.send_all(request)
                # A blank line ends the answer. `set` answers with nothing but errno, so it may come first.
                while not answer.endswith(b"\n\n"):
                    piece = await self._stream.receive_some(65536)
                    if not piece:
                        raise DeviceLost(f"{self._interface}: wireguard-go closed its control socket")
                    answer += piece
                    if len(answer) > ANSWER_LIMIT:
                        raise TunnelError(f"{self._interface}: answer of more than {ANSWER_LIMIT} bytes")
        except trio.TooSlowError:
            raise DeviceLost(f"{self._interface}: wireguard-go silent for {ANSWER_SECONDS:.0f} s") from None
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as problem:
            raise DeviceLost(f"{self._interface}: control socket broke: {problem}") from None
        except BaseException:
            answer[:] = bytes(len(answer))  # part of a `get` answer may already hold the private key
            raise
        return answer
