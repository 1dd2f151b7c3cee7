"""A storage key that t of n brokers give in pieces: the party's side. `mimir.keys.release` is the exchange.

All brokers are asked at once; as soon as enough shares came, the others are let go. Who gave a bad share, did
not answer, or refused, and why, is in the log whatever comes of it, and in the error if the key cannot be
had.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog
import trio

from mimir import config
from mimir.attesters import Attester, open_attester
from mimir.errors import ConfigError, EnvironmentMissing, MimirError
from mimir.hpke import HpkeKey
from mimir.keys.cms import KeyRefused
from mimir.keys.release import MAX_MESSAGE, Asking, Split, load_split, rebuild
from mimir.keys.shamir import KeyShare
from mimir.net.identity import Identity
from mimir.secret import StorageKey
from mimir.vault import Counter

log = structlog.get_logger("mimir.keys")
_LENGTH = struct.Struct(">I")
Now = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(UTC)


class ThresholdSource:
    """`file` is the description that `mimir broker split` wrote."""

    def __init__(
        self, file: Path, counter: Counter, settings: config.ThresholdKey, attester: config.Attester | None
    ) -> None:
        self._file = file
        self._settings = settings
        self._attester = attester
        self.counter = counter

    @property
    def protection(self) -> str:
        try:
            split = load_split(self._file)
        except MimirError:
            return "brokers, whose description cannot be read"
        return f"{split.threshold} of {len(split.brokers)} brokers, each for evidence"

    async def obtain(self) -> StorageKey:
        if self._attester is None:
            raise ConfigError('[attester]: missing; keys.source = "threshold" needs evidence to show')
        split = load_split(self._file)
        requester = Identity.load(self._settings.requester)
        async with open_attester(self._attester) as attester:
            return await collect(split, requester, attester, self._settings.seconds)

    async def create(self) -> None:
        raise ConfigError('keys.source = "threshold": `mimir broker split` makes and splits the key')


async def collect(
    split: Split, requester: Identity, attester: Attester, seconds: float, now: Now = _now
) -> StorageKey:
    """Ask every broker; the key once enough gave their shares. `KeyRefused` names each that did not."""
    shares: dict[int, KeyShare] = {}
    failures: dict[int, str] = {}
    kem = HpkeKey()
    try:
        async with trio.open_nursery() as nursery:

            async def one(number: int) -> None:
                try:
                    share = await _ask(split, number, requester, kem, attester, seconds, now)
                except MimirError as error:
                    failures[number] = str(error)
                    name = split.brokers[number - 1].name
                    log.warning("a broker gave no share", broker=name, number=number, why=str(error))
                    return
                shares[number] = share
                if len(shares) >= split.threshold:
                    nursery.cancel_scope.cancel()

            for number in range(1, len(split.brokers) + 1):
                nursery.start_soon(one, number)
        if len(shares) < split.threshold:
            why = "; ".join(
                f"{split.brokers[number - 1].name}: {text}" for number, text in sorted(failures.items())
            )
            raise KeyRefused(
                f"storage key: {len(shares)} of the {split.threshold} shares that are needed; {why}"
            )
        chosen = dict(sorted(shares.items())[: split.threshold])
        log.info("storage key rebuilt", brokers=[split.brokers[number - 1].name for number in chosen])
        return rebuild(split, chosen)
    finally:
        kem.wipe()
        for share in shares.values():
            share.wipe()


async def _ask(
    split: Split, number: int, requester: Identity, kem: HpkeKey, attester: Attester, seconds: float, now: Now
) -> KeyShare:
    """One broker's share, within the time."""
    broker = split.brokers[number - 1]
    asking = Asking(split, number, requester, kem)
    try:
        with trio.fail_after(seconds):
            async with await trio.open_tcp_stream(broker.address.host, broker.address.port) as stream:
                await send(stream, asking.hello())
                claims = asking.claims(await receive(stream), now())
                await send(stream, asking.evidence(await attester.attest(claims)))
                return asking.share(await receive(stream))
    except trio.TooSlowError:
        raise EnvironmentMissing(f"nothing from {broker.address} within {seconds:g} s") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise EnvironmentMissing(f"{broker.address} cannot be reached: {error}") from None


async def send(stream: trio.abc.Stream, message: bytes) -> None:
    """One message: its length in four bytes, then itself."""
    await stream.send_all(_LENGTH.pack(len(message)) + message)


async def receive(stream: trio.abc.Stream) -> bytes:
    """One message; `KeyRefused` if it is longer than any, or the other end closed."""
    (size,) = _LENGTH.unpack(await _exactly(stream, _LENGTH.size))
    if not 0 < size <= MAX_MESSAGE:
        raise KeyRefused(f"a message of {size} bytes announced")
    return await _exactly(stream, size)


async def _exactly(stream: trio.abc.Stream, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        piece = await stream.receive_some(size - len(got))
        if not piece:
            raise KeyRefused("closed the connection without an answer")
        got += piece
    return bytes(got)
