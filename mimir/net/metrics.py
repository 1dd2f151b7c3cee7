"""The figures of this process over HTTP, for Prometheus: GET /metrics, an answer a connection.

With TLS only those on the list `metrics.readers` may ask; without it whoever reaches the address.
"""

from __future__ import annotations

import h11
import structlog
import trio
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from mimir.admission.tls import PartyTls, TlsError
from mimir.config import Address, Config
from mimir.errors import AttestationError, BadInput

PATH = b"/metrics"
MAX_REQUEST = 8 << 10  # bytes
ASK_SECONDS = 10.0  # for TLS, the request and the answer
MAX_CONNECTIONS = 8

log = structlog.get_logger("mimir.metrics")


async def serve_metrics(
    config: Config,
    tls: PartyTls | None,
    *,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until cancelled. Started with the addresses that are listened on."""
    listen = config.metrics.listen
    if listen is None:
        task_status.started([])
        return
    try:
        listeners = await trio.open_tcp_listeners(listen.port, host=listen.host)
    except OSError as error:
        raise BadInput(f"{config.source}: metrics.listen = {listen}: cannot listen: {error}") from None
    limit = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def one(stream: trio.SocketStream) -> None:
        try:
            limit.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            await trio.aclose_forcefully(stream)
            return
        try:
            with trio.move_on_after(ASK_SECONDS):
                await _connection(stream, config, tls)
        except (TlsError, AttestationError, h11.RemoteProtocolError) as error:
            log.warning("refused to tell figures", why=str(error))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other end left
        except Exception:
            log.exception("could not tell figures by an error of ours")
        finally:
            limit.release_on_behalf_of(stream)
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, one, listeners)
        bound = [Address(*listener.socket.getsockname()[:2]) for listener in listeners]
        log.info("telling figures", listen=[str(address) for address in bound], tls=tls is not None)
        task_status.started(bound)


async def _connection(stream: trio.SocketStream, config: Config, tls: PartyTls | None) -> None:
    inner: trio.abc.Stream = stream
    if tls is not None:
        inner = (await tls.accept(stream, config.metrics.readers)).stream
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(bytes(await inner.receive_some(MAX_REQUEST)))
    if not isinstance(event, h11.Request):
        return
    status, kind, body = 404, "text/plain", b"GET /metrics\n"
    if event.method == b"GET" and event.target.partition(b"?")[0] == PATH:
        wanted = dict(event.headers).get(b"accept", b"").decode("ascii", "replace")
        encoder, kind = choose_encoder(wanted)
        status, body = 200, encoder(REGISTRY)
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
    for answer in (
        h11.Response(status_code=status, headers=headers),
        h11.Data(data=body),
        h11.EndOfMessage(),
    ):
        raw = http.send(answer)
        if raw:
            await inner.send_all(raw)
    await inner.aclose()
