"""The door for clients and model owners: a websocket per connection, sealed, and a request at a time.

With TLS around it (`mimir.admission.tls`) both ends show certificates first, and the sealed handshake is
bound to them. A party that no peer has certified answers about its state alone (UNADMITTED). Whoever is
revoked is not let in, and is cut off, session and all, when that becomes known.

A connection must say who it is within a deadline and be on a list (`clients`, `owners`) before anything it
says is looked at. Each has its own task and a bounded mailbox; what breaks one connection, from garbage to
an error of ours, closes that connection and no other. The party itself stands behind `Service`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import structlog
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from mimir import __version__
from mimir.admission.revocation import Revocations
from mimir.admission.tls import PartyTls, Secured, TlsError
from mimir.config import Address, Config
from mimir.errors import (
    AbortError,
    AttestationError,
    BadInput,
    EnvironmentMissing,
    LocalError,
    MimirError,
    PeerError,
)
from mimir.net import messages
from mimir.net.identity import Identity, exchange_public
from mimir.net.messages import MAX_MESSAGE, Message, MessageError, Open
from mimir.net.seal import PROLOGUE, TAG, Handshake, Seal, SealError
from mimir.secret import ShareSeed
from mimir.store import ComponentsDiffer, Incoming, ModelStore
from mimir.vault import StoreError

RECEIVE_BUFFER = 65536  # trio-websocket's default of 4 KiB costs a third of its throughput
MAX_FRAME = MAX_MESSAGE + TAG
MAILBOX = 8  # messages read ahead of the task that handles them; then the sender waits
CLOSE_SECONDS = 2.0  # for the closing handshake of a websocket
RESOURCE = "/mimir/1"
# What a party does before it is admitted.
UNADMITTED = frozenset({"status", "attest", "revocations", "revoke", "close"})

log = structlog.get_logger("mimir.control")


class Evidence(Protocol):
    """A party's own evidence, and what it knows of its peers'."""

    async def evidence_for(self, nonce: bytes, nonce_source: str, channel: bytes, role: str) -> bytes:
        """A fresh envelope whose claims bind this party's keys to nonce, channel and role."""
        ...

    def statement(self) -> dict[str, Any]:
        """The fields "tunnel", "kem", "shown" and "certificates" of an "evidence" message."""
        ...

    def view(self) -> dict[str, Any]:
        """How the admission of the peers stands, as `messages.ADMISSION` says it."""
        ...


class Service(Protocol):
    """What a party does for those who connect."""

    store: ModelStore
    evidence: Evidence | None  # None: attestation is off

    async def open(self, client: ClientHandle, terms: Open) -> None:
        """Serve one client's part of one session until it is over. Raise to end it with an error message."""
        ...

    async def compare_digests(self, model: str, components: dict[int, str]) -> None:
        """Return once the other holder of each component confirms its hash, else raise `ComponentsDiffer`."""
        ...

    def status(self) -> dict[str, Any]:
        """Public facts of the running party, for `mimir status`."""
        ...


class ClientGone(MimirError):
    """The client hung up, or was silent for too long."""

    exit_code = 8


class ClientHandle:
    """One client inside a session: its key, and messages to and from it."""

    def __init__(
        self,
        key: str,
        socket: WebSocketConnection,
        seal: Seal,
        timeout: float,
        mailbox: trio.MemoryReceiveChannel[Message],
    ) -> None:
        self.key = key  # its identity, hex
        self.gone = trio.Event()  # set as soon as the connection is lost
        self.timeout = timeout  # for one message, either way
        self.channel = seal.channel  # what binds evidence to this connection
        self._socket = socket
        self._seal = seal
        self._mailbox = mailbox
        self._sending = trio.Lock()

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send one of the messages a party may send. Raises `ClientGone` if nobody reads it in time."""
        raw = messages.pack(message, messages.FROM_PARTY)
        if self.gone.is_set():
            raise ClientGone("the client is gone")
        with trio.move_on_after(self.timeout) as scope:
            async with self._sending:  # sealing numbers the messages: they must leave in that order
                try:
                    await self._socket.send_message(self._seal.close(raw))
                except ConnectionClosed:
                    raise ClientGone("the client hung up") from None
        if scope.cancelled_caught:
            self._seal.wipe()  # half a message may be out: nothing can follow it
            self.gone.set()
            raise ClientGone(f"the client took nothing for {self.timeout:g} s")

    async def receive(self, timeout: float | None = None) -> Message:
        """The client's next message, already checked for form. Raises `ClientGone` at the deadline."""
        limit = self.timeout if timeout is None else timeout
        with trio.move_on_after(limit):
            try:
                return await self._mailbox.receive()
            except trio.EndOfChannel:
                raise ClientGone("the client hung up") from None
        raise ClientGone(f"the client said nothing for {limit:g} s")


async def serve_control(
    config: Config,
    identity: Identity,
    service: Service,
    *,
    tls: PartyTls | None = None,
    revocations: Revocations | None = None,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve clients and owners until cancelled. Started with the addresses that are listened on."""
    door = _Door(config, identity, service, tls, revocations)
    listen = config.control.listen
    try:
        listeners = await trio.open_tcp_listeners(listen.port, host=listen.host)
    except OSError as error:
        raise BadInput(f"{config.source}: control.listen = {listen}: cannot listen: {error}") from None
    bound = [Address(*listener.socket.getsockname()[:2]) for listener in listeners]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, door.connection, listeners)
        if revocations is not None:
            nursery.start_soon(door.cut_off_revoked, revocations)
        log.info("listening for clients", listen=[str(address) for address in bound])
        task_status.started(bound)


class _Door:
    """Who may enter, and what is done for them."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        service: Service,
        tls: PartyTls | None,
        revocations: Revocations | None,
    ) -> None:
        self._config = config
        self._service = service
        self._tls = tls
        self._revocations = revocations
        self._inside: dict[trio.CancelScope, str] = {}  # conversations, and whose they are
        self._exchange = identity.exchange_key()
        # The handshake proves possession of the X25519 form of an identity; lists name the Ed25519 form.
        self._known: dict[bytes, str] = {}
        for key in (*config.clients, *config.owners):
            try:
                self._known[exchange_public(bytes.fromhex(key))] = key
            except BadInput as error:
                raise BadInput(f"{config.source}: clients, owners: {key[:16]}...: {error}") from None
        self._connections = 0

    async def connection(self, stream: trio.SocketStream) -> None:
        """One connection from accept to close. Never raises an `Exception`."""
        where = str(Address(*stream.socket.getpeername()[:2])) if _connected(stream) else "?"
        if self._connections >= self._config.control.max_connections:
            log.warning("refused a connection: too many", client=where, limit=self._connections)
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        try:
            await self._websocket(stream, where)
        except Exception as error:
            first = _first(error)
            if isinstance(
                first, MessageError | SealError | ClientGone | TlsError | AttestationError | trio.TooSlowError
            ):
                log.warning(
                    "closed a connection", client=where, why=str(first) or "too slow to say who it is"
                )
            else:
                log.error("closed a connection after an error of ours", client=where, exc_info=error)
        finally:
            self._connections -= 1
            await trio.aclose_forcefully(stream)

    async def cut_off_revoked(self, revocations: Revocations) -> None:
        """End every conversation of a client that is revoked, as soon as that is known."""
        while True:
            epoch = revocations.epoch
            for scope, key in list(self._inside.items()):
                try:
                    revocations.check(identity=key)
                except AttestationError as error:
                    log.warning("cut off a client that is revoked", key=key[:16], why=str(error))
                    scope.cancel()
            await revocations.wait_past(epoch)

    async def _websocket(self, stream: trio.SocketStream, where: str) -> None:
        secured: Secured | None = None
        async with trio.open_nursery() as nursery:
            with trio.fail_after(self._config.deadlines.handshake):
                inner: trio.abc.Stream = stream
                if self._tls is not None:
                    secured = await self._tls.accept(stream, self._known.values())
                    inner = secured.stream
                request = await wrap_server_stream(nursery, inner, 1, MAX_FRAME, RECEIVE_BUFFER)
                if request.path != RESOURCE:
                    await request.reject(404)
                    raise MessageError(f"asked for {request.path[:40]!r}: not a Mimir client of this version")
                socket = await request.accept()
                try:
                    seal, key = await self._handshake(socket, secured)
                except ConnectionClosed:
                    raise MessageError("hung up before saying who it is") from None
            try:
                await self._conversation(socket, seal, key, where, secured)
            finally:
                seal.wipe()
                with trio.move_on_after(CLOSE_SECONDS):
                    await socket.aclose()
                nursery.cancel_scope.cancel()

    async def _handshake(self, socket: WebSocketConnection, secured: Secured | None) -> tuple[Seal, bytes]:
        bound = b"" if secured is None else secured.binding
        handshake = Handshake.responder(self._exchange, PROLOGUE + bound)
        first = await socket.get_message()
        if not isinstance(first, bytes):
            raise MessageError("text instead of a handshake")
        key = handshake.accept(first)
        if secured is not None and self._known.get(key) != secured.peer.identity:
            raise MessageError("one key in its certificate, another in the handshake inside")
        await socket.send_message(handshake.answer())
        return handshake.seal, key

    async def _conversation(
        self,
        socket: WebSocketConnection,
        seal: Seal,
        raw_key: bytes,
        where: str,
        secured: Secured | None,
    ) -> None:
        send, receive = trio.open_memory_channel[Message](MAILBOX)
        key = self._known.get(raw_key, "")
        client = ClientHandle(key, socket, seal, self._config.deadlines.client, receive)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, socket, seal, client, send)
            # The first sealed message is the proof that this is no replayed handshake.
            if (await client.receive(self._config.deadlines.handshake))["t"] != "hello":
                raise MessageError("something else than a hello")
            if not key:
                log.warning("refused a client: its key is on no list", client=where)
                await client.send(_error("refused", "your key is neither in `clients` nor in `owners` here"))
            elif self._is_revoked(key):
                log.warning("refused a client: its key is revoked", client=where, key=key[:16])
                await client.send(_error("refused", "your key is revoked"))
            else:
                log.info("client connected", client=where, key=key[:16])
                self._inside[nursery.cancel_scope] = key
                try:
                    await self._requests(client, secured is None or secured.own.grounds is not None)
                finally:
                    del self._inside[nursery.cancel_scope]
            nursery.cancel_scope.cancel()

    def _is_revoked(self, key: str) -> bool:
        try:
            if self._revocations is not None:
                self._revocations.check(identity=key)
        except AttestationError:
            return True
        return False

    async def _requests(self, client: ClientHandle, admitted: bool) -> None:
        """Serve requests one after another until the client hangs up or one fails."""
        while True:
            try:
                message = await client.receive()
                if not admitted and message["t"] not in UNADMITTED:
                    raise BadInput("no peer has admitted this party yet: it answers about its state alone")
                await self._request(client, message)
            except (ClientGone, MessageError, SealError):
                if client.gone.is_set():
                    log.info("client left", key=client.key[:16])
                    return
                raise
            except Exception as error:
                first = _first(error)
                answer = error_message(first)
                if answer["code"] == "internal":
                    log.error("a request failed by an error of ours", key=client.key[:16], exc_info=error)
                else:
                    log.warning("a request failed", key=client.key[:16], why=str(first))
                if not client.gone.is_set():
                    await client.send(answer)
                return

    async def _request(self, client: ClientHandle, message: Message) -> None:
        kind = message["t"]
        if kind == "status":
            await client.send({"t": "status", "status": await self._status()})
        elif kind == "attest":
            await self._attest(client, message["nonce"])
        elif kind in ("revocations", "revoke"):
            await self._tell_revocations(client, message)
        elif kind == "open":
            if client.key not in self._config.clients:
                raise BadInput("your key is not in `clients` here")
            await self._service.open(client, self._terms(client, Open.from_message(message)))
        elif kind == "put_model":
            if client.key not in self._config.owners:
                raise BadInput("your key is not in `owners` here")
            first, second = (ShareSeed(raw) for raw in message.pop("seeds"))
            await self._put_model(client, message["manifest"], (first, second))
        elif kind != "close":
            raise MessageError(f"message {kind} out of place")

    def _terms(self, client: ClientHandle, terms: Open) -> Open:
        """The terms, if this party's configuration allows them."""
        scheduler = self._config.scheduler
        if client.key not in terms.clients:
            raise BadInput("your key is not among the clients of this session")
        for key in terms.clients:
            if key not in self._config.clients:
                raise BadInput(f"client {key[:16]}... is not in `clients` here")
        check_lengths(terms.buckets, terms.max_new, scheduler.prompt_buckets, scheduler.output_buckets)
        context = min(scheduler.max_context, self._service.store.manifest(terms.model).spec.context)
        if sum(terms.buckets) + terms.max_new > context:
            raise BadInput(f"prompt and answer, padded, exceed the context of {context}")
        if terms.sampler.topk > self._config.topk:
            raise BadInput(f"topk {terms.sampler.topk} is over this federation's {self._config.topk}")
        return terms

    async def _tell_revocations(self, client: ClientHandle, message: Message) -> None:
        known = self._revocations
        if known is None:
            raise BadInput("this party keeps no revocations: it has no `attestation.owners`")
        if message["t"] == "revoke":  # whoever brings it: a statement speaks for itself
            try:
                known.offer(message["statement"])
            except (AttestationError, EnvironmentMissing) as error:
                raise BadInput(str(error)) from None
        await client.send({"t": "revoked", "epoch": known.epoch, "statement": known.raw})

    async def _status(self) -> dict[str, Any]:
        config = self._config
        models = await trio.to_thread.run_sync(self._service.store.models)
        return {
            "version": __version__,
            "party": config.party,
            "name": config.me.name,
            "parties": [peer.identity for peer in config.peers],
            "terms": config.digest().hex(),
            "tunnel": config.tunnel.mode,
            "scale_bits": config.fixed_point.scale_bits,
            "topk": config.topk,
            "max_context": config.scheduler.max_context,
            "prompt_buckets": list(config.scheduler.prompt_buckets),
            "output_buckets": list(config.scheduler.output_buckets),
            "models": {
                digest: {"name": manifest.name, "model": manifest.spec.public()}
                for digest, manifest in models.items()
            },
            "tls": None if self._tls is None else self._tls.certificate().public(),
            "revocations": None if self._revocations is None else self._revocations.status(),
            "service": self._service.status(),
        }

    async def _attest(self, client: ClientHandle, nonce: bytes) -> None:
        """Evidence for the client's nonce on its own connection. A refusal does not end the connection: it is
        for the client to decide what it asks of a party without evidence."""
        evidence = self._service.evidence
        try:
            if evidence is None:
                raise BadInput('this party has no evidence: attestation.mode is "off" here')
            envelope = await evidence.evidence_for(
                nonce, messages.nonce_source(client.key), client.channel, "party"
            )
        except MimirError as error:
            log.warning("no evidence for a client", key=client.key[:16], why=str(error))
            await client.send(error_message(error))
            return
        tunnels = self._service.status().get("tunnel", ())
        await client.send(
            {
                "t": "evidence",
                "envelope": envelope,
                "config": self._config.digest().hex(),
                "terms": self._config.shared_terms(),
                "admission": evidence.view(),
                "rotations": [
                    {"party": each["party"], "epoch": each.get("epoch"), "age": each.get("epoch_age")}
                    for each in tunnels
                ],
                **evidence.statement(),
            }
        )

    async def _put_model(
        self, client: ClientHandle, manifest: Any, seeds: tuple[ShareSeed, ShareSeed]
    ) -> None:
        incoming = await trio.to_thread.run_sync(self._service.store.begin, manifest, seeds)
        log.info(
            "receiving a model", name=incoming.manifest.name, model=incoming.digest[:16], key=client.key[:16]
        )
        try:
            if incoming.manifest.scale_bits != self._config.fixed_point.scale_bits:
                raise BadInput(
                    f"the model has scale_bits {incoming.manifest.scale_bits}, "
                    f"this federation {self._config.fixed_point.scale_bits}"
                )
            await client.send({"t": "have", "tensors": incoming.have(), "complete": incoming.complete})
            while (message := await client.receive())["t"] == "chunk":
                await trio.to_thread.run_sync(
                    incoming.write, message["tensor"], message["offset"], message["data"]
                )
            if message["t"] == "commit":
                await self._commit(client, incoming)
            elif message["t"] != "close":
                raise MessageError(f"message {message['t']} in the middle of an upload")
        finally:
            incoming.close()

    async def _commit(self, client: ClientHandle, incoming: Incoming) -> None:
        components = await trio.to_thread.run_sync(incoming.verify)
        with trio.move_on_after(self._config.deadlines.step) as scope:
            try:
                await self._service.compare_digests(incoming.digest, components)
            except ComponentsDiffer:
                await trio.to_thread.run_sync(incoming.discard)
                raise
        if scope.cancelled_caught:
            raise BadInput(
                "the other holders of these components did not confirm them in time; are all three parties "
                "up, and did each get the whole model? provision again to finish"
            )
        await trio.to_thread.run_sync(incoming.accept)
        log.info("model accepted", name=incoming.manifest.name, model=incoming.digest[:16])
        await client.send({"t": "committed", "model": incoming.digest})


async def _read(
    socket: WebSocketConnection, seal: Seal, client: ClientHandle, mailbox: trio.MemorySendChannel[Message]
) -> None:
    """Fill the mailbox until the connection ends. Anything that is no message ends it, without cancelling the
    task that works for the client: that one finds the client gone and tidies up."""
    async with mailbox:
        try:
            while True:
                raw = await socket.get_message()
                if not isinstance(raw, bytes):
                    raise MessageError("text instead of a sealed message")
                await mailbox.send(messages.unpack(seal.open(raw), messages.FROM_CLIENT))
        except (ConnectionClosed, trio.BrokenResourceError):
            pass
        except (MessageError, SealError, LocalError) as error:
            log.warning("cut off a client that sent garbage", key=client.key[:16], why=str(error))
        finally:
            client.gone.set()


def check_lengths(
    buckets: tuple[int, ...], max_new: int, prompt_buckets: tuple[int, ...], output_buckets: tuple[int, ...]
) -> None:
    """Raise `BadInput` unless every length is one of the public buckets."""
    for bucket in buckets:
        if bucket not in prompt_buckets:
            raise BadInput(f"prompt bucket {bucket} is none of {', '.join(map(str, prompt_buckets))}")
    if max_new not in output_buckets:
        raise BadInput(f"output bucket {max_new} is none of {', '.join(map(str, output_buckets))}")


def error_message(error: BaseException) -> Message:
    """What a client may hear of an error: enough to act on, nothing about checks, paths or values."""
    if isinstance(error, AbortError):
        return _error("aborted", "the session was aborted; nothing more is delivered")
    if isinstance(error, PeerError):
        return _error("peer", f"the session is over: party {error.party} was silent or broke the protocol")
    if isinstance(error, ComponentsDiffer):
        return _error("refused", "the holders of a component received different bytes; nothing was stored")
    if isinstance(error, BadInput):
        return _error("refused", str(error))
    if isinstance(error, StoreError):
        return _error("store", "the model's shares on this party's disk cannot be used; see its log")
    if isinstance(error, MimirError) and not isinstance(error, LocalError):
        return _error("unable", "this party cannot do that now; see its log")
    return _error("internal", "internal error of this party; see its log")


def _error(code: str, text: str) -> Message:
    return {"t": "error", "code": code, "message": text[: messages.MAX_TEXT]}


def _first(error: BaseException) -> BaseException:
    """The error that started a group of them: the first of ours, else the first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    flat = [_first(each) for each in error.exceptions]
    return next((each for each in flat if isinstance(each, MimirError)), flat[0])


def _connected(stream: trio.SocketStream) -> bool:
    try:
        stream.socket.getpeername()
    except OSError:
        return False
    return True
