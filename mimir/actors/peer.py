"""The party's process: tunnel, mesh, store, control door, and the sessions behind it."""

from __future__ import annotations

import hashlib
import ipaddress
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio
from prometheus_client import Counter, Enum, Gauge, start_http_server

from mimir import kernels, keys
from mimir.actors.session import Limits, SessionActor
from mimir.config import Config
from mimir.errors import BadInput, ConfigError, MimirError, PeerError
from mimir.model.checkpoint import PlanSpec
from mimir.mpc.domain import Ring
from mimir.mpc.nonlinear import Settings
from mimir.net import Transport
from mimir.net.control import ClientHandle, serve_control
from mimir.net.identity import BadSignature, Identity, parse_public, verify
from mimir.net.mesh import PeerAt, open_mesh
from mimir.net.messages import Open
from mimir.secret import lock_state, require_locked
from mimir.store import ComponentsDiffer, ModelStore, SharedModel
from mimir.vault import Vault
from wg import PeerState, RotationPlan, Tunnel, TunnelConfig, raise_tunnel

log = structlog.get_logger("mimir.peer")

SESSIONS = Gauge("mimir_sessions", "Sessions open")
ENDED = Counter("mimir_sessions_ended_total", "Sessions ended", ["how"])
TUNNEL_STATE = Enum(
    "mimir_tunnel_state", "State of the tunnel", ["party"], states=[state.value for state in PeerState]
)
HANDSHAKE_AGE = Gauge("mimir_tunnel_handshake_age_seconds", "Since WireGuard's last handshake", ["party"])
EPOCH = Gauge("mimir_tunnel_epoch", "Generation of keys in use; 0 for none", ["party"])
EPOCH_AGE = Gauge("mimir_tunnel_epoch_age_seconds", "Age of that generation", ["party"])
ROTATIONS = Counter("mimir_tunnel_rotations_total", "Steps of rotations", ["party", "what"])
EPOCHS: Final = "epochs"  # the highest number of a tunnel's generation used with each peer
MEASURE_SECONDS: Final = 1.0
DIGEST_ASK: Final = "component digest"
ASK_SECONDS: Final = 30.0
ASK_AGAIN_SECONDS: Final = 0.5


@dataclass(slots=True)
class _Gathering:
    """A session whose clients are connecting, or that runs."""

    terms: Open
    clients: dict[str, ClientHandle] = field(default_factory=dict)
    complete: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)
    error: BaseException | None = None


class _Weights:
    """A stored model, as the engine asks for weights."""

    def __init__(self, model: SharedModel) -> None:
        self._model = model

    def pair(self, name: str) -> tuple[Ring, Ring]:
        return self._model.get(name)


class PartyService:
    """What the control door offers (mimir.net.control.Service)."""

    def __init__(
        self, config: Config, transport: Transport, store: ModelStore, nursery: trio.Nursery
    ) -> None:
        self.config = config
        self.transport = transport
        self.store = store
        self._nursery = nursery
        self._sessions: dict[bytes, _Gathering] = {}
        self._received: dict[
            str, dict[int, str]
        ] = {}  # model -> component -> hash, as this party received it
        self.tunnel: Tunnel | None = None
        self.protection = ""  # of the storage key
        transport.on_request(DIGEST_ASK, self._tell_digest)

    # --- sessions -------------------------------------------------------------------------------------------

    async def open(self, client: ClientHandle, terms: Open) -> None:
        gathering = self._sessions.get(terms.session)
        if gathering is None:
            if len(self._sessions) >= self.config.scheduler.max_sessions:
                raise BadInput(
                    f"this party already has scheduler.max_sessions = {len(self._sessions)} sessions open"
                )
            gathering = self._sessions[terms.session] = _Gathering(terms)
            self._nursery.start_soon(self._host, gathering)
        if gathering.terms != terms:
            raise BadInput("this session was opened with other terms")
        if gathering.complete.is_set() or client.key in gathering.clients:
            raise BadInput("this session is already running, or you have joined it before")
        gathering.clients[client.key] = client
        if len(gathering.clients) == len(terms.clients):
            gathering.complete.set()
        await gathering.over.wait()
        if gathering.error is not None:
            raise gathering.error

    async def _host(self, gathering: _Gathering) -> None:
        """One session from its first client to its end; nothing it does can end the party."""
        terms = gathering.terms
        SESSIONS.inc()
        try:
            with trio.move_on_after(self.config.deadlines.client) as waiting:
                await gathering.complete.wait()
            if waiting.cancelled_caught:
                raise BadInput("the other clients of this session did not come in time")
            await self._run(gathering)
            ENDED.labels("closed").inc()
        except Exception as error:
            gathering.error = error
            ENDED.labels(type(error).__name__).inc()
            if not isinstance(error, MimirError):
                log.error(
                    "session failed by an error of ours", session=terms.session.hex()[:8], exc_info=error
                )
        finally:
            SESSIONS.dec()
            del self._sessions[terms.session]
            gathering.over.set()

    async def _run(self, gathering: _Gathering) -> None:
        config, terms = self.config, gathering.terms
        model = await trio.to_thread.run_sync(self.store.open, terms.model)
        spec: PlanSpec = model.manifest.spec
        if model.manifest.scale_bits != config.fixed_point.scale_bits:
            raise BadInput("the model was shared at another fixed_point.scale_bits")
        longest = min(config.scheduler.max_context, spec.context)
        if sum(terms.buckets) + terms.max_new > longest:
            raise BadInput(f"prompt and answer together exceed the {longest} positions of this model here")
        settings = Settings(config.fixed_point.scale_bits, config.cheby.deg, config.cheby.bins)
        limits = Limits(
            config.scheduler.prompt_buckets,
            config.scheduler.output_buckets,
            config.scheduler.max_context,
            config.triple_pool.min_size,
            config.deadlines.round,
            config.deadlines.step,
            config.deadlines.client,
        )
        clients = [gathering.clients[key] for key in terms.clients]
        session = SessionActor(self.transport, terms, clients, spec, _Weights(model), settings, limits)
        await session.run()

    # --- provisioning ---------------------------------------------------------------------------------------

    async def compare_digests(self, model: str, components: dict[int, str]) -> None:
        """Ask the other holder of each component for its hash until it has received it too."""
        self._received[model] = dict(components)
        party = self.config.party
        other = {party: (party - 1) % 3, (party + 1) % 3: (party + 1) % 3}
        for component, mine in components.items():
            while True:
                body = {"model": model, "component": component}
                answer = await self.transport.request(other[component], DIGEST_ASK, body, ASK_SECONDS)
                theirs = answer.get("sha256")
                if theirs == mine:
                    break
                if theirs:
                    raise ComponentsDiffer(
                        f"component {component}: party {other[component]} received other bytes"
                    )
                await trio.sleep(ASK_AGAIN_SECONDS)

    async def _tell_digest(self, peer: int, body: dict[str, Any]) -> dict[str, Any]:
        model, component = body.get("model"), body.get("component")
        if not isinstance(model, str) or not isinstance(component, int):
            raise BadInput("which component of which model?")
        known = self._received.get(model, {}).get(component, "")
        if not known and model in await trio.to_thread.run_sync(self.store.models):
            manifest = await trio.to_thread.run_sync(self.store.manifest, model)
            known = manifest.component_digest(component)
        return {"sha256": known}

    # --- status ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "sessions": len(self._sessions),
            "kernels": kernels.level(),
            "peers": {str(p): self.transport.up(p) for p in self.transport.peers},
            "storage": {
                "source": self.config.keys.source,
                "protection": self.protection,
                "keys_in_swap": lock_state() or "never",
            },
        }
        if self.tunnel is not None:
            rotations = {
                r.index: {"epoch": r.epoch, "epoch_age": r.age, "rotation": r.state}
                for r in self.tunnel.rotations()
            }
            out["tunnel"] = [
                {
                    "party": s.index,
                    "state": s.state.value,
                    "handshake_age": s.handshake_age,
                    "received": s.rx,
                    "sent": s.tx,
                    **rotations.get(s.index, {}),
                }
                for s in self.tunnel.status()
            ]
        return out


class Journal:
    """A small record in the vault, as `wg` wants it."""

    def __init__(self, vault: Vault, name: str) -> None:
        self._vault, self._name = vault, name

    def __str__(self) -> str:
        return f"{self._vault.root}: {self._name}"

    def read(self) -> bytes | None:
        content = self._vault.get("journal", self._name)
        return None if content is None else bytes(content)

    def write(self, content: bytes) -> None:
        try:
            self._vault.put("journal", self._name, content)
        except MimirError as error:
            raise OSError(str(error)) from None


def rotation_plan(config: Config, identity: Identity, vault: Vault) -> RotationPlan | None:
    """How the tunnel's keys are renewed: announced by the identities of exactly these three parties."""
    if not config.tunnel.rotates:
        return None
    keys = [parse_public(peer.identity) for peer in config.peers]
    return RotationPlan(
        seconds=config.tunnel.rotate_seconds,
        record=Journal(vault, EPOCHS),
        sign=identity.sign,
        authenticate=lambda party, message, signature: verify(keys[party], message, signature),
        refusals=(BadSignature,),
        context=hashlib.sha256(b"mimir tunnel rotation\0" + b"".join(keys)).digest(),
    )


def _tunnel_config(config: Config, identity: Identity, vault: Vault) -> TunnelConfig:
    t = config.tunnel
    for name in ("interface", "address", "private_key", "listen_port"):
        if getattr(t, name) is None:
            raise ConfigError(f'{config.source}: tunnel.{name} is needed when tunnel.mode is "wireguard"')
    peers = []
    for peer in config.others:
        if peer.tunnel_public_key is None or peer.tunnel_endpoint is None:
            raise ConfigError(
                f"{config.source}: peers: party {peer.party} needs tunnel_public_key and tunnel_endpoint"
            )
        allowed = peer.tunnel_allowed or (f"{ipaddress.ip_address(peer.host)}/32",)
        endpoint = peer.tunnel_endpoint
        peers.append((peer.party, peer.tunnel_public_key, endpoint.host, endpoint.port, allowed))
    assert t.interface and t.address and t.private_key and t.listen_port
    return TunnelConfig.from_text(
        index=config.party,
        interface=t.interface,
        private_key=t.private_key,
        listen_port=t.listen_port,
        address=t.address,
        peers=peers,
        mtu=t.mtu,
        rotation=rotation_plan(config, identity, vault),
    )


async def run_peer(config: Config, orders: trio.MemoryReceiveChannel[None] | None = None) -> None:
    """Run this party until cancelled. What comes on `orders` asks for new tunnel keys now."""
    source = keys.open_source(config.keys, config.attester)
    key = await source.obtain()
    log.info("storage key obtained", source=config.keys.source, protection=source.protection)
    identity = keys.load_identity(config, key)
    if identity.public_hex != config.me.identity:
        raise ConfigError(
            f"{config.source}: identity_key {config.identity_key} is not the identity that [[peers]] lists "
            f"for party {config.party}; give every party its own file"
        )
    if config.keys.require_locked:
        require_locked()
    elif (why := lock_state()) is not None:
        log.warning("keys may go to swap", why=why)
    vault = await trio.to_thread.run_sync(Vault, config.data_dir, key, source.counter)
    store = ModelStore(
        vault,
        config.party,
        tuple(p.identity for p in config.peers),
        config.keys.keep_mib << 20,
        config.keys.lock_shares,
    )
    log.info("shares can be decrypted", models=len(store.models()))
    if config.metrics.listen is not None:
        start_http_server(config.metrics.listen.port, config.metrics.listen.host)
    log.info("starting", party=config.party, name=config.me.name, kernels=kernels.level())
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        tunnel: Tunnel | None = None
        if config.tunnel.mode == "wireguard":
            tunnel = await stack.enter_async_context(
                raise_tunnel(_tunnel_config(config, identity, vault), wait=None, said=_count_rotation)
            )
        mesh = await stack.enter_async_context(
            open_mesh(
                party=config.party,
                identity=identity,
                peers=[PeerAt(p.party, p.host, p.port, parse_public(p.identity)) for p in config.others],
                config_digest=config.digest(),
                listen=(config.mesh.listen.host, config.mesh.listen.port),
                protected=tunnel is not None,
                handshake_deadline=config.deadlines.handshake,
                bind=tunnel.bind if tunnel is not None else None,
                dead_after=config.deadlines.link,
            )
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        service = PartyService(config, mesh, store, nursery)
        service.tunnel = tunnel
        service.protection = source.protection
        await nursery.start(serve_control, config, identity, service)
        nursery.start_soon(_say_when_up, mesh, config)
        if orders is not None:
            nursery.start_soon(_rotate_when_told, tunnel, orders)
        if tunnel is not None:
            nursery.start_soon(_measure, tunnel)
        await trio.sleep_forever()


async def _say_when_up(mesh: Any, config: Config) -> None:
    while True:
        try:
            await mesh.wait_up(config.deadlines.client)
        except PeerError as error:
            log.warning("still waiting for a peer", why=str(error))
        else:
            log.info("mesh is up: ready for clients")
            return


async def _rotate_when_told(tunnel: Tunnel | None, orders: trio.MemoryReceiveChannel[None]) -> None:
    async for _ in orders:
        if tunnel is None or not tunnel.rotations():
            log.warning("told to rotate keys, but tunnel.rotate_seconds = 0 or there is no tunnel")
        else:
            log.info("rotating keys as told")
            tunnel.rotate()


def _count_rotation(party: int, what: str, epoch: int | None) -> None:
    ROTATIONS.labels(party, what).inc()


async def _measure(tunnel: Tunnel) -> None:
    """Keep the figures of the tunnel; its transitions are in the log (`wg`)."""
    while True:
        for status in tunnel.status():
            TUNNEL_STATE.labels(status.index).state(status.state.value)
            if status.handshake_age is not None:
                HANDSHAKE_AGE.labels(status.index).set(status.handshake_age)
        for rotation in tunnel.rotations():
            EPOCH.labels(rotation.index).set(rotation.epoch or 0)
            EPOCH_AGE.labels(rotation.index).set(rotation.age or 0)
        await trio.sleep(MEASURE_SECONDS)
