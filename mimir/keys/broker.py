"""A broker: holds one share of a party's storage key, and gives it to machines whose evidence it accepts.

Its own share lies on its disk sealed to its identity (X25519, a sealed box of libsodium), and its identity is
encrypted under its own storage key, from any source but other brokers. Connections are few, bounded in time
and size, and know nothing of one another.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import nacl.bindings as sodium
import nacl.exceptions
import structlog
import trio

from mimir import config, keys
from mimir.admission import revocation
from mimir.attest import policy as policies
from mimir.attest.appraisal import REAL, Anchors
from mimir.attest.collateral import Store
from mimir.attest.trail import Trail
from mimir.config import Address
from mimir.errors import AttestationError, BadInput, ConfigError, MimirError
from mimir.keys.file import create_file
from mimir.keys.release import Giving, Split, Terms, load_split
from mimir.keys.shamir import KeyShare, commit
from mimir.keys.threshold import receive, send
from mimir.net.identity import Identity, exchange_public, is_sealed, parse_public
from mimir.secret import StorageKey

log = structlog.get_logger("mimir.broker")
MAX_CONNECTIONS = 32
MAX_SHARE_FILE = 4096
Now = Callable[[], datetime]


@dataclass(frozen=True)
class Requester:
    """[[requesters]] Who may ask, by the requester key of a party."""

    name: Annotated[str, config.text_rule(64)]
    identity: Annotated[str, config.key_rule]


@dataclass(frozen=True)
class BrokerConfig:
    """A broker's file."""

    source: Annotated[Path, None]
    identity_key: Annotated[Path, config.path_rule]
    listen: Annotated[Address, config.address_rule]
    split: Annotated[Path, config.path_rule]  # the public description
    share: Annotated[Path, config.path_rule]  # this broker's share, sealed to its identity
    policy: Annotated[Path, config.path_rule]  # signatures beside it
    owners: Annotated[tuple[str, ...], config.keys_rule]  # who signs it
    threshold: Annotated[int, config.integer_rule(1, config.MAX_KEYS)]  # how many of them must have
    collateral: Annotated[Path | None, config.path_rule] = None
    requesters: tuple[Requester, ...] = ()
    revoked: Annotated[tuple[str, ...], config.keys_rule] = ()  # requester keys that get nothing any more
    revocations: Annotated[Path | None, config.path_rule] = None  # what the owners revoked: `mimir revoke`
    seconds: Annotated[float, config.seconds_rule(0.1, 600)] = 30.0  # for one connection
    keys: config.Keys = field(default_factory=config.Keys)
    log: config.Log = field(default_factory=config.Log)


def load(path: str | Path) -> BrokerConfig:
    """Read a broker's file; `ConfigError` names the key."""
    source = Path(path).absolute()
    found: BrokerConfig = config.read_table(
        BrokerConfig, config.read_toml(path), source, given={"source": source}
    )
    config.check_keys(found.keys, source)
    if found.keys.source == "threshold":
        raise ConfigError(f"{source}: keys.source: a broker cannot have its key from brokers")
    return replace(found, keys=found.keys.placed(source.parent))


def seal_share(share: KeyShare, identity: str) -> bytes:
    """A share for the holder of an identity alone."""
    with share.reveal_to_kernel() as view:
        return sodium.crypto_box_seal(bytes(view), exchange_public(parse_public(identity)))


def open_share(path: Path, identity: Identity) -> KeyShare:
    """The inverse; `BadInput` if the file is damaged or another's."""
    try:
        raw = path.read_bytes()[: MAX_SHARE_FILE + 1]
    except OSError as error:
        raise BadInput(f"share {path}: {error.strerror}; the owner's `mimir broker split` wrote it") from None
    with identity.exchange_key() as key, key.reveal_to_kernel() as view:
        try:
            public = exchange_public(identity.public)
            return KeyShare(bytearray(sodium.crypto_box_seal_open(raw, public, bytes(view))))
        except (nacl.exceptions.CryptoError, ValueError, TypeError, MimirError):
            raise BadInput(f"share {path}: damaged, or sealed to another broker's identity") from None


def write_split(split: Split, shares: dict[int, KeyShare], folder: Path) -> list[Path]:
    """The description and every broker's sealed share, as new files."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = [folder / "storage.toml"]
    create_file(written[0], split.text().encode())
    for number, broker in enumerate(split.brokers, 1):
        path = folder / f"broker{number}.share"
        create_file(path, seal_share(shares[number], broker.identity))
        written.append(path)
    return written


# --- the service -------------------------------------------------------------------------------------------


class Service:
    """What one broker needs in memory."""

    def __init__(
        self, settings: BrokerConfig, identity: Identity, *, now: Now | None = None, anchors: Anchors = REAL
    ) -> None:
        self._settings, self._identity = settings, identity
        self._now = now or functools.partial(datetime.now, UTC)
        self._anchors = anchors
        self.split = load_split(settings.split)
        numbers = [
            number
            for number, each in enumerate(self.split.brokers, 1)
            if each.identity == identity.public_hex
        ]
        if not numbers:
            raise ConfigError(f"{settings.split}: brokers: {identity.public_hex} is none of them")
        self.number = numbers[0]
        self._share = open_share(settings.share, identity)
        committed = self.split.brokers[self.number - 1].commitment
        if commit(self.split.key_id, self.number, self._share).hex() != committed:
            raise BadInput(f"share {settings.share}: not the one that {settings.split} commits to")
        self._revoked: revocation.Statement | None = None  # the last that was read
        self.terms()  # so that a policy that cannot be used is known at once

    def terms(self) -> Terms:
        """By what is judged now: policy and collateral are read anew for each who asks."""
        settings = self._settings
        found = policies.load(settings.policy)
        found.check_time(self._now(), Trail("policy"))
        signatures = policies.load_signatures(
            settings.policy.with_name(settings.policy.name + policies.SIGNATURE_SUFFIX)
        )
        policies.check_signatures(found, signatures, settings.owners, settings.threshold)
        return Terms(
            self.split,
            self.number,
            found,
            Store(settings.collateral or settings.source.parent / "collateral").read(),
            {bytes.fromhex(each.identity): each.name for each in settings.requesters},
            frozenset(bytes.fromhex(each) for each in settings.revoked),
            self._anchors,
            self._revocations(),
        )

    def _revocations(self) -> revocation.Statement | None:
        """What the owners revoked, which only grows: an older file than was seen gives nobody anything."""
        path = self._settings.revocations
        if path is None:
            return None
        found, signatures = revocation.load(path)
        revocation.check_signed(found, signatures, self._settings.owners, self._settings.threshold)
        trail, held = Trail("revocation"), self._revoked
        if held is not None:
            trail.require(found.context == held.context, "context", held.context, found.context)
            trail.require(found.epoch >= held.epoch, "epoch", f"at least {held.epoch}", found.epoch)
            trail.require(found.covers(held), "superset", "all that was revoked before", "less")
        self._revoked = found
        return found

    async def answer(self, stream: trio.abc.Stream) -> None:
        """One connection, from beginning to end. Never raises for what the other end did."""
        async with stream:
            with trio.move_on_after(self._settings.seconds) as scope:
                try:
                    await self._exchange(stream)
                except (MimirError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    log.warning("no share given", why=str(error) or type(error).__name__)
            if scope.cancelled_caught:
                log.warning("no share given", why=f"not done within {self._settings.seconds:g} s")

    async def _exchange(self, stream: trio.abc.Stream) -> None:
        giving = Giving(self.terms(), self._identity)
        try:
            await send(stream, giving.challenge(await receive(stream)))
            evidence = await receive(stream)
            verdict = giving.appraise(evidence, self._now())
        except AttestationError as error:
            await send(stream, giving.refusal(error))
            raise
        await send(stream, giving.share(self._share, verdict))
        log.info(
            "share given",
            requester=verdict.claims.node[:16],
            entry=verdict.entry,
            kind=verdict.kind,
            simulated=verdict.simulated,
            evidence=verdict.evidence[:16],
        )

    def wipe(self) -> None:
        self._share.wipe()


async def serve(
    service: Service, listen: Address, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer until cancelled; reports the port."""
    limit = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def one(stream: trio.SocketStream) -> None:
        try:
            limit.acquire_nowait()
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            await service.answer(stream)
        finally:
            limit.release()

    listeners = await trio.open_tcp_listeners(listen.port, host=listen.host)
    task_status.started(listeners[0].socket.getsockname()[1])
    try:
        await trio.serve_listeners(one, listeners)
    finally:
        service.wipe()


def run(settings: BrokerConfig) -> int:
    """One broker until SIGTERM or Ctrl-C."""

    async def until_told() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, settings)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    log.info("stopping", signal=signal.Signals(number).name)
                    break
            nursery.cancel_scope.cancel()

    trio.run(until_told)
    return 0


async def _serve(settings: BrokerConfig) -> None:
    source = keys.open_source(settings.keys)
    key = await source.obtain()
    identity = load_identity(settings, key)
    key.wipe()
    service = Service(settings, identity)
    log.info("broker", share=service.number, key=service.split.key, protection=source.protection)
    await serve(service, settings.listen)


def load_identity(settings: BrokerConfig, key: StorageKey) -> Identity:
    """The broker's identity; in the clear only where its storage key is as well."""
    if settings.keys.source != "file" and not is_sealed(settings.identity_key):
        raise BadInput(
            f"identity {settings.identity_key}: lies in the clear, which keys.source = "
            f'"{settings.keys.source}" forbids; make one with mimir keygen --sealed-by {settings.source}'
        )
    return Identity.load(settings.identity_key, key)
