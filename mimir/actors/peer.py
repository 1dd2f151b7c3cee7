"""The party's process: tunnel, mesh, store, control door, and the sessions behind it."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import structlog
import trio
from prometheus_client import Counter, Enum, Gauge

from mimir import kernels, keys
from mimir.actors.decode import DecodeActor
from mimir.actors.session import Limits, SessionActor, sized
from mimir.actors.shared import OPEN_LANE, SharedActor
from mimir.actors.triples import SharedProducer
from mimir.admission import revocation
from mimir.admission.bootstrap import POLICY_RECORD, Admission, GateError, Place, PolicyFile
from mimir.admission.revocation import Gossip, Revocations, context_of
from mimir.admission.tls import PartyTls
from mimir.attesters import open_attester
from mimir.boot import Boot
from mimir.config import Address, Config
from mimir.errors import (
    AbortError,
    AttestationError,
    BadInput,
    ConfigError,
    MimirError,
    PeerError,
)
from mimir.model.checkpoint import PlanSpec
from mimir.mpc.nonlinear import Settings
from mimir.mpc.weights import Matrix
from mimir.net import Transport
from mimir.net.control import ClientHandle, Evidence, serve_control
from mimir.net.identity import BadSignature, Identity, parse_public, verify
from mimir.net.mesh import Mesh, PeerAt, open_listeners, open_mesh
from mimir.net.messages import Open
from mimir.net.metrics import serve_metrics
from mimir.secret import PresharedKey, StorageKey, lock_state, require_locked
from mimir.store import ComponentsDiffer, ModelStore, SharedModel
from mimir.vault import Vault
from wg import PeerState, PrivateKey, PublicKey, RotationPlan, Tunnel, TunnelConfig, WgError, raise_tunnel
from wg import PresharedKey as TunnelPresharedKey
from wg import generate as generate_tunnel_key

log = structlog.get_logger("mimir.peer")

SESSIONS = Gauge("mimir_sessions", "Sessions open")
ENDED = Counter("mimir_sessions_ended_total", "Sessions ended", ["how"])
TUNNEL_STATES: Final = [state.value for state in PeerState]
TUNNEL_STATE = Enum("mimir_tunnel_state", "State of the tunnel", ["party"], states=TUNNEL_STATES)
HANDSHAKE_AGE = Gauge("mimir_tunnel_handshake_age_seconds", "Since WireGuard's last handshake", ["party"])
EPOCH = Gauge("mimir_tunnel_epoch", "Generation of keys in use; 0 for none", ["party"])
EPOCH_AGE = Gauge("mimir_tunnel_epoch_age_seconds", "Age of that generation", ["party"])
ROTATIONS = Counter("mimir_tunnel_rotations_total", "Steps of rotations", ["party", "what"])
TRANSITIONS = Counter("mimir_tunnel_transitions_total", "Changes of the tunnel's state", ["party", "to"])
ROUND_TRIP = Gauge("mimir_tunnel_round_trip_seconds", "Of the last ping of the application", ["party"])
MUTE = Gauge("mimir_tunnel_mute_seconds", "Since the peer's application answered a ping", ["party"])
EPOCHS: Final = "epochs"  # the highest number of a tunnel's generation used with each peer
# Public files in data_dir with signatures or meanings of their own; they may be there before the vault is.
PUBLIC_RECORDS: Final = (revocation.FILE, revocation.FILE + revocation.FORK_SUFFIX, POLICY_RECORD)
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
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    error: BaseException | None = None


@dataclass(slots=True)
class _Shared:
    """The actors that sessions of a model share, and how many do."""

    decoder: DecodeActor
    producer: SharedProducer
    sessions: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def by_work(self) -> dict[str, SharedActor[Any, Any]]:
        return {actor.WORK: actor for actor in (self.decoder, self.producer)}

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                for actor in self.by_work.values():
                    nursery.start_soon(self._run, actor)

    async def _run(self, actor: SharedActor[Any, Any]) -> None:
        try:
            await actor.run()
        except Exception as error:  # nothing it does can end the party
            log.error(
                "shared work ended by an error of ours", work=actor.WORK, model=actor.model, exc_info=error
            )


class _Weights:
    """A stored model, as the engine asks for weights."""

    def __init__(self, model: SharedModel) -> None:
        self._model = model

    def pair(self, name: str) -> tuple[Matrix, Matrix]:
        return self._model.get(name)


class PartyService:
    """What the control door offers (mimir.net.control.Service)."""

    def __init__(
        self,
        config: Config,
        transport: Transport,
        store: ModelStore,
        nursery: trio.Nursery,
        boot: Boot | None = None,
    ) -> None:
        self.config = config
        self.boot = boot or Boot()
        self.transport = transport
        self.store = store
        self._nursery = nursery
        self._sessions: dict[bytes, _Gathering] = {}
        self._shared: dict[str, _Shared] = {}  # by model
        self._received: dict[
            str, dict[int, str]
        ] = {}  # model -> component -> hash, as this party received it
        self.tunnel: Tunnel | None = None
        self.evidence: Evidence | None = None
        self.revocations: Revocations | None = None
        self.protection = ""  # of the storage key
        transport.on_request(DIGEST_ASK, self._tell_digest)
        transport.on_request(OPEN_LANE, self._open_lane)

    # --- sessions -------------------------------------------------------------------------------------------

    async def open(self, client: ClientHandle, terms: Open) -> None:
        for party in self.config.peers:
            try:
                if self.revocations is not None:
                    self.revocations.check(identity=party.identity)
            except AttestationError as error:
                raise BadInput(f"party {party.party} ({party.name}) is revoked: {error}") from None
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
        try:
            await gathering.over.wait()
        except trio.Cancelled:  # this client was cut off: its session does not wait to notice
            gathering.scope.cancel()
            raise
        if gathering.error is not None:
            raise gathering.error

    async def _host(self, gathering: _Gathering) -> None:
        """One session from its first client to its end; nothing it does can end the party."""
        terms = gathering.terms
        SESSIONS.inc()
        try:
            with gathering.scope:
                with trio.move_on_after(self.config.deadlines.client) as waiting:
                    await gathering.complete.wait()
                if waiting.cancelled_caught:
                    raise BadInput("the other clients of this session did not come in time")
                await self._run(gathering)
            if gathering.scope.cancelled_caught:
                raise AbortError("a client was cut off")
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
        settings = Settings(config.fixed_point.scale_bits, config.cheby.deg, config.scheduler.round_trip_ms)
        limits = Limits(
            config.scheduler.prompt_buckets,
            config.scheduler.output_buckets,
            config.scheduler.max_context,
            config.triple_pool.min_size,
            config.triple_pool.memory_mib << 20,
            config.deadlines.round,
            config.deadlines.step,
            config.deadlines.client,
        )
        clients = [gathering.clients[key] for key in terms.clients]
        weights = _Weights(model)
        with self._sharing(terms.model, spec, weights, settings) as shared:
            session = SessionActor(self.transport, terms, clients, spec, weights, settings, limits, *shared)
            await session.run()

    @contextmanager
    def _sharing(
        self, model: str, spec: PlanSpec, weights: _Weights, settings: Settings
    ) -> Iterator[tuple[DecodeActor, SharedProducer] | tuple[()]]:
        """The actors that a session shares with others of its model; they end with the last of them."""
        config = self.config
        if config.scheduler.max_batch == 1:
            yield ()
            return
        shared = self._shared.get(model)
        if shared is None:
            seconds = config.deadlines.round
            decoder = DecodeActor(
                self.transport,
                model,
                sized(spec, config.scheduler.max_context),
                weights,
                settings,
                most=config.scheduler.max_batch,
                round_seconds=seconds,
            )
            producer = SharedProducer(self.transport, model, weights, round_seconds=seconds)
            shared = self._shared[model] = _Shared(decoder, producer)
            self._nursery.start_soon(shared.run)
        shared.sessions += 1
        try:
            yield shared.decoder, shared.producer
        finally:
            shared.sessions -= 1
            if not shared.sessions:
                shared.scope.cancel()
                del self._shared[model]

    async def _open_lane(self, peer: int, body: dict[str, Any]) -> dict[str, Any]:
        model, work, lane = (body.get(name) for name in ("model", "work", "lane"))
        if not isinstance(model, str) or not isinstance(work, str) or not isinstance(lane, str):
            raise BadInput("which lane for which work of which model?")
        shared = self._shared.get(model)
        if shared is None:
            raise BadInput("no session of this model is open here")
        actor = shared.by_work.get(work)
        if actor is None:
            raise BadInput(f"sessions of a model share no work called {work[:20]!r}")
        try:
            actor.renew(peer, bytes.fromhex(lane))
        except ValueError:
            raise BadInput("a lane is named by hexadecimal digits") from None
        return {}

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
            "boot": self.boot.status(),
            "storage": {
                "source": self.config.keys.source,
                "protection": self.protection,
                "keys_in_swap": lock_state() or "never",
            },
        }
        if self.evidence is not None:
            out["admission"] = self.evidence.view()
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
                    "mute": s.mute,
                    "round_trip": s.round_trip,
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


class _TunnelGate:
    """What an admitted peer passes (mimir.admission.bootstrap.Gate): the tunnel and the mesh inside it."""

    def __init__(self) -> None:
        self.tunnel: Tunnel
        self.mesh: Mesh

    async def admit(
        self, party: int, tunnel_key: bytes, preshared: PresharedKey, endpoint: Address | None
    ) -> None:
        self.mesh.cut(party, "admitted anew, under other keys")
        with preshared.reveal_to_kernel() as view:
            key = TunnelPresharedKey(bytes(view))
        place = (endpoint.host, endpoint.port) if endpoint is not None else None
        try:
            await self.tunnel.admit(party, PublicKey(tunnel_key), preshared=key, endpoint=place)
        except WgError as error:
            raise GateError(str(error)) from None
        self.mesh.changed()

    async def expel(self, party: int, why: str) -> None:
        self.mesh.cut(party, why)
        await self.tunnel.expel(party)

    def up(self, party: int) -> bool:
        return self.tunnel.up(party)


def rotation_plan(
    config: Config, identity: Identity, vault: Vault, admitted: Callable[[int], bool] = lambda party: True
) -> RotationPlan | None:
    """How the tunnel's keys are renewed: announced by the identities of exactly these three parties, and
    heard from one that is admitted at that moment."""

    def authenticate(party: int, message: bytes, signature: bytes) -> None:
        if not admitted(party):
            raise BadSignature(f"party {party} is not admitted")
        verify(identities[party], message, signature)

    if not config.tunnel.rotates:
        return None
    identities = [parse_public(peer.identity) for peer in config.peers]
    return RotationPlan(
        seconds=config.tunnel.rotate_seconds,
        record=Journal(vault, EPOCHS),
        sign=identity.sign,
        authenticate=authenticate,
        refusals=(BadSignature,),
        context=hashlib.sha256(b"mimir tunnel rotation\0" + b"".join(identities)).digest(),
    )


def _tunnel_config(config: Config, key: PrivateKey | None, rotation: RotationPlan | None) -> TunnelConfig:
    """With a `key` in memory nobody is admitted yet; else the files say all keys."""
    t = config.tunnel
    peers = []
    for peer in config.others:
        assert peer.tunnel_endpoint is not None
        allowed = peer.tunnel_allowed or (f"{ipaddress.ip_address(peer.host)}/32",)
        endpoint = peer.tunnel_endpoint
        peers.append((peer.party, peer.tunnel_public_key, endpoint.host, endpoint.port, allowed))
    private = key if key is not None else t.private_key
    assert t.interface and t.address and private is not None and t.listen_port
    return TunnelConfig.from_text(
        index=config.party,
        interface=t.interface,
        private_key=private,
        listen_port=t.listen_port,
        address=t.address,
        peers=peers,
        mtu=t.mtu,
        rotation=rotation,
    )


async def run_peer(
    config: Config,
    orders: trio.MemoryReceiveChannel[str] | None = None,
    boot: Boot | None = None,
    storage_key: StorageKey | None = None,
) -> None:
    """Run this party until cancelled. `orders`: "rotate" asks for new tunnel keys, "reload" for another look
    at policy and collateral. `boot` has the steps that were taken before, `storage_key` what they gave."""
    boot = boot or Boot()
    source = keys.open_source(config.keys, config.attester)
    if storage_key is None:
        with boot.step("key") as step:
            storage_key = await source.obtain()
            step.note = f"{config.keys.source}: {source.protection}"
    if config.keys.require_locked:
        require_locked()
    elif (why := lock_state()) is not None:
        log.warning("keys may go to swap", why=why)
    with boot.step("identity"):
        identity = keys.load_identity(config, storage_key)
        if identity.public_hex != config.me.identity:
            raise ConfigError(
                f"{config.source}: identity_key {config.identity_key} is not the identity that [[peers]] "
                f"lists for party {config.party}; give every party its own file"
            )
    with boot.step("store") as step:
        vault = await trio.to_thread.run_sync(
            Vault, config.data_dir, storage_key, source.counter, PUBLIC_RECORDS
        )
        store = ModelStore(
            vault,
            config.party,
            tuple(p.identity for p in config.peers),
            config.keys.keep_mib << 20,
            config.keys.lock_shares,
        )
        step.note = f"shares of {len(store.models())} models can be decrypted"
    log.info(
        "starting",
        party=config.party,
        name=config.me.name,
        kernels=kernels.level(),
        threads=kernels.threads(),
    )
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        revocations = open_revocations(config)
        tls: PartyTls | None = None
        if config.tls.enabled:
            others = [peer.identity for peer in config.others]
            tls = PartyTls(identity, config.me.name, others, revocations)
            stack.callback(tls.wipe)
            if not config.attested:
                log.warning("TLS WITHOUT ATTESTATION: nobody certifies this party; it tells its state alone")
        gate = _TunnelGate()
        key = generate_tunnel_key() if config.attested else None
        admission: Admission | None = None
        if key is not None:
            with boot.step("attest") as step:
                admission = await stack.enter_async_context(
                    _open_admission(config, identity, key.public().raw, gate, revocations, tls)
                )
                step.note = f"entry {await _own_entry(admission)}"
        else:
            boot.skip("attest", "attestation is off")
            boot.skip("admit", "attestation is off")
            log.warning("NO ATTESTATION: peers are believed by their keys alone", party=config.party)

        def admitted(party: int) -> bool:
            return admission is None or admission.admitted(party) is not None

        tunnel: Tunnel | None = None
        if config.tunnel.mode == "wireguard":
            with boot.step("tunnel") as step:
                step.note = "keys in memory" if key is not None else "keys from files"
                rotation = rotation_plan(config, identity, vault, admitted)
                tunnel = await stack.enter_async_context(
                    raise_tunnel(_tunnel_config(config, key, rotation), wait=None, said=_count)
                )
            gate.tunnel = tunnel
        else:
            boot.skip("tunnel", "none")
        with boot.step("mesh"):
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
                    admitted=admitted,
                )
            )
            gate.mesh = mesh
        nursery = await stack.enter_async_context(trio.open_nursery())
        service = PartyService(config, mesh, store, nursery, boot)
        service.tunnel, service.revocations, service.evidence = tunnel, revocations, admission
        service.protection = source.protection
        if admission is not None:
            assert config.attestation.listen is not None
            listen = config.attestation.listen
            listeners = await open_listeners(listen.host, listen.port)
            await nursery.start(admission.run, listeners)
            nursery.start_soon(_say_when_admitted, admission, boot)
        with boot.step("serve"):
            door = partial(serve_control, config, identity, service, tls=tls, revocations=revocations)
            await nursery.start(door)
            await nursery.start(serve_metrics, config, tls)
        if revocations is not None:
            nursery.start_soon(Gossip(mesh, revocations).run)
            nursery.start_soon(_cut_off_revoked, config, mesh, revocations)
        nursery.start_soon(_say_when_up, mesh, config, boot)
        if orders is not None:
            nursery.start_soon(_obey, tunnel, admission, orders)
        if tunnel is not None:
            nursery.start_soon(_measure, tunnel)
        await trio.sleep_forever()


@asynccontextmanager
async def _open_admission(
    config: Config,
    identity: Identity,
    tunnel_key: bytes,
    gate: _TunnelGate,
    revocations: Revocations | None,
    tls: PartyTls | None,
) -> AsyncIterator[Admission]:
    """Whoever makes our evidence, the policy in force, and the admission that rests on both."""
    attestation = config.attestation
    assert config.attester is not None and attestation.policy is not None
    record = config.data_dir / POLICY_RECORD
    policy_file = PolicyFile(attestation.policy, attestation.owners, attestation.threshold, record)
    found = policy_file.policy
    log.info("policy", name=found.name, version=found.version, digest=policy_file.digest.hex()[:16])
    places = []
    for peer in config.others:
        assert peer.admission is not None and peer.tunnel_endpoint is not None
        port = peer.tunnel_endpoint.port
        places.append(Place(peer.party, peer.name, parse_public(peer.identity), peer.admission, port))
    async with open_attester(config.attester) as attester:
        admission = Admission(
            party=config.party,
            identity=identity,
            peers=places,
            config_digest=config.digest(),
            tunnel_key=tunnel_key,
            attester=attester,
            policy_file=policy_file,
            gate=gate,
            collateral=attestation.collateral,
            revocations=revocations,
            tls=tls,
            handshake_seconds=config.deadlines.handshake,
        )
        try:
            yield admission
        finally:
            admission.kem.wipe()


async def _own_entry(admission: Admission) -> str:
    """Of the policy, that our own evidence satisfies. If it does none, peers will refuse us: say so now."""
    try:
        return await admission.check_own()
    except AttestationError as error:
        log.error(
            "this party's own evidence does not satisfy the policy: its peers will not admit it",
            step=error.step,
            expected=error.expected,
            got=error.got,
        )
        return "none"


async def _say_when_admitted(admission: Admission, boot: Boot) -> None:
    with boot.step("admit"):
        await admission.wait_admitted()


def open_revocations(config: Config) -> Revocations | None:
    """What this party knows to be revoked; None where nobody may revoke."""
    if not config.attestation.owners:
        return None
    return Revocations(
        config.data_dir / revocation.FILE,
        context_of(peer.identity for peer in config.peers),
        config.attestation.owners,
        config.attestation.threshold,
    )


async def _cut_off_revoked(config: Config, mesh: Mesh, revocations: Revocations) -> None:
    """End the sessions that a revoked party is in; none begins (`PartyService.open`). Whether there is a link
    at all is the admission's to say."""
    while True:
        epoch = revocations.epoch
        for peer in config.peers:
            try:
                revocations.check(identity=peer.identity)
            except AttestationError as error:
                if peer.party == config.party:
                    log.error(
                        "THIS PARTY'S IDENTITY IS REVOKED: nobody works with it any more", why=str(error)
                    )
                else:
                    mesh.cut(peer.party, str(error))
        await revocations.wait_past(epoch)


async def _say_when_up(mesh: Any, config: Config, boot: Boot) -> None:
    with boot.step("peers"):
        while True:
            try:
                await mesh.wait_up(config.deadlines.client)
            except PeerError as error:
                log.warning("still waiting for a peer", why=str(error))
            else:
                break
    log.info("mesh is up: ready for clients")


async def _obey(
    tunnel: Tunnel | None, admission: Admission | None, orders: trio.MemoryReceiveChannel[str]
) -> None:
    async for order in orders:
        if order == "reload":
            if admission is not None:
                log.info("reading policy and collateral again as told")
                admission.reload()
        elif tunnel is None or not tunnel.rotations():
            log.warning("told to rotate keys, but tunnel.rotate_seconds = 0 or there is no tunnel")
        else:
            log.info("rotating keys as told")
            tunnel.rotate()


def _count(party: int, what: str, epoch: int | None) -> None:
    if what in TUNNEL_STATES:
        TRANSITIONS.labels(party, what).inc()
    else:
        ROTATIONS.labels(party, what).inc()


async def _measure(tunnel: Tunnel) -> None:
    """Keep the figures of the tunnel; its transitions are in the log (`wg`)."""
    while True:
        for status in tunnel.status():
            TUNNEL_STATE.labels(status.index).state(status.state.value)
            if status.handshake_age is not None:
                HANDSHAKE_AGE.labels(status.index).set(status.handshake_age)
            if status.mute is not None:
                MUTE.labels(status.index).set(status.mute)
            if status.round_trip is not None:
                ROUND_TRIP.labels(status.index).set(status.round_trip)
        for rotation in tunnel.rotations():
            EPOCH.labels(rotation.index).set(rotation.epoch or 0)
            EPOCH_AGE.labels(rotation.index).set(rotation.age or 0)
        await trio.sleep(MEASURE_SECONDS)
