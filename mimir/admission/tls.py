"""TLS 1.3 between identities, for connections that are not in the mesh: both ends show a certificate.

What is trusted is a list of identity keys, never an authority of somebody else: OpenSSL gets them as anchors
and checks chain, name and that the other end holds the key; afterwards `certificates` reads what was shown,
strictly, and asks what is revoked. Nothing of a connection is read before both have passed.

    a party shows    a certificate by one of the two other parties, for evidence that this one admitted;
                     before anybody has admitted it, one by itself, and then it answers about its state alone
    a client shows   one by itself; its key is on the party's list
    sessions         are never resumed: every connection is checked anew
    renewal          changes what new connections see; those that stand keep what they have

One malicious issuer could certify a TLS key of its own as another party's. So TLS is not alone: the sealed
connection inside ends at the party's identity key, and `Secured.binding` ties the two together.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import trio

from mimir.admission.certificates import (
    Certificate,
    TlsKey,
    anchor,
    issue_own,
    server_name,
    verify_certificate,
    verify_own,
)
from mimir.admission.revocation import Revocations
from mimir.attest.trail import Trail
from mimir.errors import AttestationError, MimirError
from mimir.net.identity import Identity

Clock = Callable[[], datetime]
CLIENT_NODE = "client"


class TlsError(MimirError):
    """The other end does not speak TLS 1.3, or shows no certificate that leads to a key we know."""

    exit_code = 8


@dataclass(frozen=True)
class Secured:
    """A connection whose two ends have shown and checked their certificates."""

    stream: trio.SSLStream[trio.abc.Stream]
    own: Certificate
    peer: Certificate
    binding: bytes  # hash of both certificates, the server's first: what a protocol inside should mix in


def utc_now() -> datetime:
    return datetime.now(UTC)


class _Presenter:
    """One node's TLS key, the certificate that it makes for itself, and contexts made of them."""

    def __init__(
        self, identity: Identity, node: str, revocations: Revocations | None, clock: Clock = utc_now
    ) -> None:
        self.key = TlsKey()
        self.revocations = revocations
        self._identity = identity
        self._node = node
        self._clock = clock
        self._self_made: tuple[bytes, Certificate] | None = None
        self._making = trio.Lock()
        self._contexts: dict[tuple[bytes, tuple[str, ...], bool], ssl.SSLContext] = {}

    def wipe(self) -> None:
        """Forget the key. Connections that stand go on."""
        self.key.wipe()
        self._contexts.clear()

    def _by_itself(self, now: datetime) -> tuple[bytes, Certificate]:
        held = self._self_made
        if held is None or now >= held[1].renew_at:
            der = issue_own(self._identity, self._node, self.key.public, now)
            held = self._self_made = der, verify_own(der, [self._identity.public_hex], now, None)
        return held

    async def _context(self, der: bytes, known: Collection[str], server: bool) -> ssl.SSLContext:
        """Shows `der`, and asks for a certificate that one of `known` issued. Takes 0.4 ms for each."""
        place = der, tuple(known), server
        async with self._making:
            found = self._contexts.get(place)
            if found is None:
                found = await trio.to_thread.run_sync(_context, self.key, *place)
                # What is no longer shown is not asked for again.
                self._contexts = {key: value for key, value in self._contexts.items() if key[0] == der}
                self._contexts[place] = found
            return found


class PartyTls(_Presenter):
    """A party's end: certificates that its peers issued, and the door for those whom it knows."""

    def __init__(
        self,
        identity: Identity,
        node: str,
        peers: Collection[str],
        revocations: Revocations | None,
        clock: Clock = utc_now,
    ) -> None:
        """`peers` are the identities (hex) of the two other parties."""
        super().__init__(identity, node, revocations, clock)
        self._peers = tuple(peers)
        self._issued: dict[str, bytes] = {}

    def install(self, der: bytes, issuer: str | None = None) -> Certificate:
        """Show this certificate to whoever connects from now on, if it is the best that we have.

        It must be by this peer, or by any, for our identity and this process's TLS key; else
        `AttestationError`.
        """
        issuers = self._peers if issuer is None else (issuer,)
        made = verify_certificate(
            der, issuers, self._clock(), self.revocations, subject=self._identity.public_hex
        )
        Trail("certificate").same("key", self.key.public, made.key)
        self._issued[made.issuer] = der
        return made

    def certificate(self) -> Certificate:
        """What is shown now: of those by peers that hold, the one that lasts longest; else our own, whose
        `grounds` are None."""
        return self._shown()[1]

    def _shown(self) -> tuple[bytes, Certificate]:
        now, subject = self._clock(), self._identity.public_hex
        holding = []
        for issuer, der in list(self._issued.items()):
            try:
                made = verify_certificate(der, self._peers, now, self.revocations, subject=subject)
                holding.append((made.not_after, der, made))
            except AttestationError:  # over, or revoked
                del self._issued[issuer]
        if holding:
            _, der, made = max(holding, key=lambda each: each[0])
            return der, made
        return self._by_itself(now)

    async def accept(self, stream: trio.abc.Stream, known: Collection[str]) -> Secured:
        """Take a connection by one whose identity (hex) is in `known`. Put a deadline around it.

        Raises `TlsError`, or `AttestationError` for a certificate that does not hold.
        """
        if not known:
            raise TlsError("nobody is on the list of those who may connect here")
        der, own = self._shown()
        context = await self._context(der, known, server=True)
        secured, shown = await _handshake(stream, context, None)
        peer = verify_own(shown, known, self._clock(), self.revocations)
        return Secured(secured, own, peer, _binding(der, shown))


class ClientTls(_Presenter):
    """A client's end: knows the parties, and shows a certificate by itself."""

    def __init__(
        self,
        identity: Identity,
        parties: Sequence[str],
        revocations: Revocations | None,
        clock: Clock = utc_now,
    ) -> None:
        """`parties` are the identities (hex) of the three parties."""
        super().__init__(identity, CLIENT_NODE, revocations, clock)
        self._parties = tuple(parties)

    async def connect(self, stream: trio.abc.Stream, party: str, *, unadmitted: bool = False) -> Secured:
        """Make sure that the other end is `party` (its identity, hex), and that another party vouches for it.

        `unadmitted`: also take it if it vouches for itself alone; then ask it for nothing but its state.
        Raises `TlsError`, or `AttestationError` for a certificate that does not hold.
        """
        issuers = [each for each in self._parties if unadmitted or each != party]
        der, own = self._by_itself(self._clock())
        context = await self._context(der, issuers, server=False)
        secured, shown = await _handshake(stream, context, server_name(party))
        peer = verify_certificate(shown, issuers, self._clock(), self.revocations, subject=party)
        return Secured(secured, own, peer, _binding(shown, der))


def _context(key: TlsKey, der: bytes, known: Collection[str], server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = not server
    # An anchor is a key: OpenSSL is not to look for who signed it.
    context.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=b"".join(map(anchor, known)))
    if server:
        context.num_tickets = 0  # nothing to resume by
    with key.in_file(der) as path:
        context.load_cert_chain(path)
    return context


async def _handshake(
    stream: trio.abc.Stream, context: ssl.SSLContext, name: str | None
) -> tuple[trio.SSLStream[trio.abc.Stream], bytes]:
    """The stream inside, and the certificate that the other end showed."""
    secured: trio.SSLStream[trio.abc.Stream] = trio.SSLStream(
        stream, context, server_hostname=name, server_side=name is None, https_compatible=True
    )
    try:
        await secured.do_handshake()
    except trio.BrokenResourceError as error:
        raise TlsError(reason(error)) from None
    shown = secured.getpeercert(binary_form=True)
    if not shown:
        raise TlsError("the other end shows no certificate")
    return secured, shown


_ALERTS = {  # what the other end says when it hangs up, in words; OpenSSL's names
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know our key",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of ours",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate is over for it: do our clocks agree?",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take our certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS 1.3",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "HTTP_REQUEST": "it does not speak TLS",
    "UNEXPECTED_EOF_WHILE_READING": "it hung up",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
}


def reason(error: BaseException) -> str:
    """Why TLS failed, in a few words for people."""
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not by a key that we know: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return _ALERTS.get(cause.reason, cause.reason or "TLS failed")
    return "it hung up"


def _binding(server: bytes, client: bytes) -> bytes:
    inner = hashlib.sha256(server).digest() + hashlib.sha256(client).digest()
    return hashlib.sha256(b"mimir tls binding\0" + inner).digest()
