"""One sealed connection from a client to one party, with a deadline on every wait."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, wrap_client_stream

from mimir.admission.certificates import Certificate
from mimir.admission.tls import ClientTls, Secured, TlsError, reason
from mimir.attest.trail import stamp
from mimir.client.federation import Party
from mimir.errors import AbortError, AttestationError, BadInput, ClientError, MimirError
from mimir.net import messages
from mimir.net.identity import Identity, exchange_public
from mimir.net.messages import MAX_MESSAGE, Message, MessageError
from mimir.net.seal import PROLOGUE, TAG, Handshake, Seal, SealError

RECEIVE_BUFFER = 65536
MAX_FRAME = MAX_MESSAGE + TAG
CLOSE_SECONDS = 2.0
RESOURCE = "/mimir/1"
HUNG_UP = "hung up while connecting: it is too busy, runs another version, or has not the key in our file"


class PartyError(ClientError):
    """One party could not be reached, fell silent, or said what no honest party says."""

    def __init__(self, party: Party, why: str) -> None:
        super().__init__(f"party {party.name} ({party.address}): {why}")
        self.party = party


class Connection:
    """Messages to and from one party. Made by `connect`."""

    def __init__(
        self,
        party: Party,
        socket: WebSocketConnection,
        seal: Seal,
        silence: float,
        certificate: Certificate | None = None,
    ) -> None:
        self.party = party
        self.certificate = certificate  # that it showed, with TLS
        self.silence = silence  # seconds that the party may owe an answer
        self.channel = seal.channel  # what binds evidence to this connection
        self.until: datetime | None = None  # when the evidence ends without which nothing may be sent
        self.sent = 0  # bytes, sealed
        self.received = 0
        self._socket = socket
        self._seal = seal
        self._sending = trio.Lock()

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send one of the messages a client may send; nothing once the evidence it is sent on has ended."""
        if self.until is not None and datetime.now(UTC) >= self.until:
            raise AttestationError(
                "evidence.life", f"evidence of {self.party.name} until now", f"until {stamp(self.until)}"
            )
        raw = messages.pack(message, messages.FROM_CLIENT)
        with trio.move_on_after(self.silence):
            async with self._sending:  # sealing numbers the messages: they must leave in that order
                sealed = self._seal.close(raw)
                try:
                    await self._socket.send_message(sealed)
                except ConnectionClosed:
                    await self.receive("error")  # the party may have said why before it closed
                self.sent += len(sealed)
                return
        raise PartyError(self.party, f"took nothing for {self.silence:g} s")

    async def receive(self, *kinds: str) -> Message:
        """The next message, which must be of one of `kinds`. An error message is raised as an exception."""
        with trio.move_on_after(self.silence):
            message = await self._next()
            if message["t"] == "error":
                raise self._reported(message["code"], message["message"])
            if message["t"] not in kinds:
                raise PartyError(self.party, f"said {message['t']} where {' or '.join(kinds)} is due")
            return message
        raise PartyError(self.party, f"silent for {self.silence:g} s")

    async def _next(self) -> Message:
        try:
            sealed = await self._socket.get_message()
        except ConnectionClosed:
            raise PartyError(self.party, "closed the connection; its log may say why") from None
        try:
            if not isinstance(sealed, bytes):
                raise MessageError("text instead of a sealed message")
            self.received += len(sealed)
            return messages.unpack(self._seal.open(sealed), messages.FROM_PARTY)
        except (MessageError, SealError) as error:
            raise PartyError(self.party, f"broke the protocol: {error}") from None

    def _reported(self, code: str, text: str) -> Exception:
        # The party chose the text: keep it from steering a terminal.
        text = "".join(character if character.isprintable() else " " for character in text)
        if code == "refused":
            return BadInput(f"party {self.party.name} refused: {text}")
        if code == "aborted":
            return AbortError(f"party {self.party.name}: {text}")
        return PartyError(self.party, text)


@asynccontextmanager
async def connect(
    party: Party,
    identity: Identity,
    *,
    within: float,
    silence: float,
    tls: ClientTls | None = None,
    unadmitted: bool = False,
) -> AsyncIterator[Connection]:
    """Reach a party, prove who we are and make it prove that it holds the key in the federation file.

    With `tls` another party must vouch for it too, unless `unadmitted` allows one that is not admitted yet;
    such a party answers about its state alone. The error names the step at which a certificate does not hold.
    Errors of the block it guards come out as they are, although a nursery is around them.
    """
    try:
        with plain_errors():
            async with _connect(party, identity, within, silence, tls, unadmitted) as connection:
                yield connection
    except HandshakeError:  # raised by the websocket's own task
        raise PartyError(
            party, "answers, but not as a party of this version; is it the right port?"
        ) from None


@asynccontextmanager
async def _connect(
    party: Party,
    identity: Identity,
    within: float,
    silence: float,
    tls: ClientTls | None,
    unadmitted: bool,
) -> AsyncIterator[Connection]:
    expected = exchange_public(bytes.fromhex(party.identity))
    async with trio.open_nursery() as nursery:
        tcp: trio.SocketStream | None = None
        socket: WebSocketConnection | None = None
        try:
            ended = False
            secured: Secured | None = None
            why = HUNG_UP
            with trio.move_on_after(within) as scope:

                def hung_up(error: BaseException | None) -> None:
                    nonlocal ended, why
                    ended = True
                    if secured is not None and error is not None:
                        why = f"ended TLS: {reason(error)}"
                    scope.cancel()  # does nothing once the party has answered

                try:
                    tcp = await trio.open_tcp_stream(party.host, party.port)
                    outer: trio.abc.Stream = tcp
                    if tls is not None:
                        secured = await tls.connect(outer, party.identity, unadmitted=unadmitted)
                        outer = secured.stream
                    stream = _Stream(outer, hung_up)
                    socket = await wrap_client_stream(
                        nursery,
                        stream,  # type: ignore[arg-type]
                        str(party.address),
                        RESOURCE,
                        message_queue_size=1,
                        max_message_size=MAX_FRAME,
                        receive_buffer_size=RECEIVE_BUFFER,
                    )
                    bound = b"" if secured is None else secured.binding
                    own = identity.exchange_key()
                    seal = await _handshake(socket, Handshake.initiator(own, expected, PROLOGUE + bound))
                except ConnectionClosed:
                    raise PartyError(party, why) from None
                except TlsError as error:
                    hint = "" if unadmitted else "; `mimir status` tells whether its peers have admitted it"
                    raise PartyError(party, f"no TLS 1.3 with it: {error}{hint}") from None
                except AttestationError as error:
                    raise PartyError(party, f"its certificate does not hold: {error}") from None
                except SealError as error:
                    raise PartyError(party, f"is not who the federation file says: {error}") from None
                except OSError as error:
                    raise PartyError(party, f"cannot be reached: {_reason(error)}; is it running?") from None
            if scope.cancelled_caught or socket is None:
                if ended:
                    raise PartyError(party, why)
                raise PartyError(party, f"no answer within {within:g} s; is it running, is the port open?")
            try:
                shown = None if secured is None else secured.peer
                connection = Connection(party, socket, seal, silence, shown)
                await connection.send({"t": "hello"})
                yield connection
            finally:
                seal.wipe()
        finally:
            if socket is not None:
                # Not shielded: when cancelled, closing the stream says enough, and that happens at once.
                with trio.move_on_after(CLOSE_SECONDS):
                    await socket.aclose()
            if tcp is not None:
                tcp.socket.close()  # the websocket leaves it open where no conversation came about
            nursery.cancel_scope.cancel()


async def _handshake(socket: WebSocketConnection, handshake: Handshake) -> Seal:
    await socket.send_message(handshake.start())
    answer = await socket.get_message()
    if not isinstance(answer, bytes):
        raise SealError("text instead of a handshake")
    return handshake.finish(answer)


class _Stream(trio.abc.Stream):
    """A stream that says when the other end hangs up: the websocket library would wait on for ever."""

    def __init__(self, stream: trio.abc.Stream, hung_up: Callable[[BaseException | None], None]) -> None:
        self._stream = stream
        self._hung_up = hung_up

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as error:
            self._hung_up(error)
            raise
        if not data:
            self._hung_up(None)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _reason(error: OSError) -> str:
    """Trio groups one error per address tried; one of them says enough."""
    cause: BaseException | None = error
    while isinstance(cause, OSError) and cause.strerror is None and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error)


class plain_errors:
    """Turn the group that a nursery raises into the one error that a caller can read."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            plain = _plain(error)
            if plain is not error:
                raise plain from None


def _plain(error: BaseException) -> BaseException:
    """The error that explains a group: its only one; or if all are ours, one that is not mere silence."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    flat = [_plain(each) for each in error.exceptions]
    if len(flat) == 1:
        return flat[0]
    if not all(isinstance(each, MimirError) for each in flat):
        return error
    return next((each for each in flat if not isinstance(each, PartyError)), flat[0])
