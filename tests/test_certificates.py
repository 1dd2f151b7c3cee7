"""Certificates of our profile, and TLS by them: every part changed alone is refused at its own step."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier
from service import NAMES, World, world
from test_client import PROMPT, answer, open_one
from trust import MEASUREMENT, TUNNEL, Owners, verdict_on

from mimir.__main__ import main
from mimir.admission import certificates, tls
from mimir.admission.certificates import (
    ARC,
    Certificate,
    TlsKey,
    anchor,
    issue,
    issue_own,
    server_name,
    verify_certificate,
    verify_own,
)
from mimir.admission.revocation import Revocations
from mimir.admission.tls import ClientTls, PartyTls, Secured, TlsError, utc_now
from mimir.attest.trail import Trail
from mimir.client.connection import PartyError, connect
from mimir.config import Address, Metrics
from mimir.errors import AttestationError, BadInput, LocalError, MimirError
from mimir.net.identity import Identity
from mimir.net.metrics import serve_metrics

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
ALPHA, BETA, GAMMA = (Identity.generate() for _ in range(3))
KEYS = tuple(each.public_hex for each in (ALPHA, BETA, GAMMA))
TLS = TlsKey()
ISSUED = issue(ALPHA, BETA.public_hex, TLS.public, verdict_on(BETA.public_hex, NOW), NOW)


def at(step: str, work: Callable[[], Any]) -> AttestationError:
    """That this is refused at this step."""
    with pytest.raises(AttestationError) as caught:
        work()
    assert caught.value.step == step, str(caught.value)
    return caught.value


def check(der: bytes, now: datetime = NOW, **changes: Any) -> Certificate:
    settings: dict[str, Any] = {"issuers": (KEYS[0], KEYS[2]), "revocations": None, "subject": KEYS[1]}
    return verify_certificate(der, now=now, **settings | changes)


# --- the profile -------------------------------------------------------------------------------------------


def test_a_certificate_says_who_and_on_which_evidence() -> None:
    made = check(ISSUED)
    assert (made.issuer, made.identity, made.node, made.key) == (KEYS[0], KEYS[1], "beta", TLS.public)
    assert made.grounds is not None and made.grounds.measurements == (MEASUREMENT,)
    assert (made.grounds.tunnel, made.grounds.entry, made.grounds.simulated) == (TUNNEL, "peers", False)
    assert made.not_after - made.not_before == HOUR and made.not_before < NOW
    assert made.not_before + HOUR / 2 < made.renew_at < made.not_after
    assert made.public()["sha256"] == made.fingerprint


def test_another_library_reads_the_same_and_needs_nothing_more() -> None:
    read = x509.load_der_x509_certificate(ISSUED)
    alternative = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternative.get_values_for_type(x509.DNSName) == [server_name(KEYS[1])]
    assert alternative.get_values_for_type(x509.UniformResourceIdentifier) == ["mimir:beta"]
    critical = {each.oid.dotted_string for each in read.extensions if each.critical}
    assert critical == {"2.5.29.19", "2.5.29.15"}
    own = [each.oid.dotted_string for each in read.extensions if each.oid.dotted_string.startswith(ARC)]
    assert own == [f"{ARC}.{n}" for n in range(1, 6)]
    believed = x509.load_der_x509_certificate(anchor(KEYS[0]))
    read.verify_directly_issued_by(believed)


def test_a_certificate_lasts_no_longer_than_what_it_rests_on() -> None:
    soon = verdict_on(BETA.public_hex, NOW, valid_until=NOW + timedelta(minutes=10))
    assert check(issue(ALPHA, KEYS[1], TLS.public, soon, NOW)).not_after == soon.valid_until
    until = NOW + timedelta(minutes=5)
    assert check(issue(ALPHA, KEYS[1], TLS.public, soon, NOW, until)).not_after == until
    over = replace(soon, valid_until=NOW - timedelta(seconds=1))
    with pytest.raises(LocalError, match="over already"):
        issue(ALPHA, KEYS[1], TLS.public, over, NOW)


def test_nobody_is_certified_without_a_verdict_about_itself() -> None:
    about_gamma = verdict_on(KEYS[2], NOW)
    with pytest.raises(LocalError, match="not about"):
        issue(ALPHA, KEYS[1], TLS.public, about_gamma, NOW)
    with pytest.raises(LocalError, match="by itself"):
        issue(ALPHA, KEYS[0], TLS.public, verdict_on(KEYS[0], NOW), NOW)
    with pytest.raises(ValueError, match="of its own"):  # an identity's key signs, it is not shown to TLS
        issue(ALPHA, KEYS[1], BETA.public, verdict_on(KEYS[1], NOW), NOW)


def forged(signer: Identity = ALPHA, **changes: Any) -> bytes:
    """A certificate in our encoding with these facts, rightly signed."""
    body = certificates._encode(replace(check(ISSUED), **changes))
    signature = certificates.tlv(0x03, b"\0", signer.sign(body))
    return certificates.tlv(0x30, body, certificates._ALGORITHM, signature)


def test_each_check_of_a_certificate_decides(tmp_path: Path) -> None:
    check(forged())
    own = issue_own(BETA, "beta", TLS.public, NOW)
    stranger = Identity.generate()
    for step, work in (
        ("certificate.dates", partial(check, ISSUED, NOW + HOUR)),
        ("certificate.dates", partial(check, ISSUED, NOW - timedelta(minutes=2))),
        ("certificate.life", partial(check, forged(not_after=NOW + HOUR + timedelta(seconds=1)))),
        ("certificate.life", partial(check, forged(not_after=check(ISSUED).not_before))),
        ("certificate.issuer", partial(check, own)),  # by itself
        ("certificate.issuer", partial(check, forged(stranger, issuer=stranger.public_hex))),
        ("certificate.identity", partial(check, ISSUED, subject=KEYS[2])),  # of another node
        ("certificate.signature", partial(check, forged(GAMMA))),
        ("certificate.profile", partial(check, forged(BETA, issuer=KEYS[1]), issuers=KEYS)),  # own grounds
        ("certificate.profile", partial(check, forged(grounds=None))),  # by another, without any
        ("certificate.issuer", partial(verify_own, ISSUED, KEYS, NOW, None)),
        ("certificate.format", partial(check, ISSUED + b"\0")),
        ("certificate.format", partial(check, b"")),
        ("certificate.format", partial(check, bytes(9000))),
    ):
        at(step, work)
    assert verify_own(own, KEYS, NOW, None).grounds is None


def test_every_byte_of_a_certificate_counts() -> None:
    for offset in range(len(ISSUED)):
        changed = bytearray(ISSUED)
        changed[offset] ^= 1 << offset % 8
        with pytest.raises(AttestationError):
            check(bytes(changed))
    for size in range(0, len(ISSUED), 7):
        with pytest.raises(AttestationError):
            check(ISSUED[:size])


def test_a_certificate_of_another_profile_is_refused_though_rightly_signed() -> None:
    """With each of these OpenSSL is content; we are not."""
    good = check(ISSUED)
    issuer = Ed25519PrivateKey.generate()
    key = issuer.public_key().public_bytes_raw().hex()
    read = x509.load_der_x509_certificate(ISSUED)

    def built(**changes: Any) -> bytes:
        names = [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Mimir"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "issuer"),
            x509.NameAttribute(NameOID.COMMON_NAME, key),
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(changes.get("subject", read.subject))
            .issuer_name(x509.Name(names))
            .public_key(changes.get("key", read.public_key()))
            .serial_number(good.serial)
            .not_valid_before(good.not_before)
            .not_valid_after(good.not_after)
        )
        for each in read.extensions:
            value = changes.get(each.oid.dotted_string, each.value)
            if value is not None:
                critical = each.critical != (each.oid.dotted_string == changes.get("turned"))
                builder = builder.add_extension(value, critical)
        if "more" in changes:
            builder = builder.add_extension(changes["more"], False)
        return builder.sign(issuer, None).public_bytes(Encoding.DER)

    def look(der: bytes) -> Certificate:
        return check(der, issuers=[key])

    assert look(built()).grounds == good.grounds  # the same facts, built by another library
    for changes in (
        {"more": x509.UnrecognizedExtension(ObjectIdentifier(f"{ARC}.6"), b"\5\0")},
        {"more": x509.SubjectKeyIdentifier(b"x")},
        {"2.5.29.19": x509.BasicConstraints(True, None)},
        {"2.5.29.19": None},
        {"2.5.29.37": None},
        {"2.5.29.17": x509.SubjectAlternativeName([x509.DNSName("beta.example")])},
        {"2.5.29.15": x509.KeyUsage(True, True, False, False, False, False, False, False, False)},
        {"turned": "2.5.29.19"},
        {"turned": f"{ARC}.2"},
        {f"{ARC}.1": None},
        {f"{ARC}.4": None},
        {f"{ARC}.4": x509.UnrecognizedExtension(ObjectIdentifier(f"{ARC}.4"), b"\4\1x")},
        {"subject": read.issuer},
        {"key": ec.generate_private_key(ec.SECP256R1()).public_key()},
    ):
        assert at_profile(lambda c=changes: look(built(**c))), changes  # type: ignore[misc]


def at_profile(work: Callable[[], Any]) -> bool:
    with pytest.raises(AttestationError) as caught:
        work()
    return caught.value.step in ("certificate.profile", "certificate.format")


@pytest.mark.parametrize("what", ["issuer", "identity", "certificate", "tunnel", "measurement"])
def test_whatever_a_certificate_names_can_be_revoked(tmp_path: Path, what: str) -> None:
    owners = Owners(KEYS)
    items = {
        "issuer": {"identities": [KEYS[0]]},
        "identity": {"identities": [KEYS[1]]},
        "certificate": {"certificates": [check(ISSUED).fingerprint]},
        "tunnel": {"tunnels": [TUNNEL]},
        "measurement": {"measurements": [MEASUREMENT]},
    }[what]
    known = Revocations(tmp_path / "r", owners.context, owners.keys, 2)
    assert check(ISSUED, revocations=known)
    known.offer(owners.revoke(1, identities=[KEYS[2]]))
    assert check(ISSUED, revocations=known)
    known.offer(owners.revoke(2, **{"identities": [KEYS[2]]} | items | merged(items)))
    at(f"revoked.{'identity' if what == 'issuer' else what}", lambda: check(ISSUED, revocations=known))


def merged(items: dict[str, list[str]]) -> dict[str, list[str]]:
    """Statements only grow."""
    return {"identities": [KEYS[2], *items.get("identities", [])]}


def test_a_key_leaves_no_file_and_is_wiped() -> None:
    key = TlsKey()
    der = issue_own(BETA, "beta", key.public, NOW)
    with key.in_file(der) as path:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(path)
        assert b"PRIVATE KEY" in Path(path).read_bytes()
        held = open(path, "r+b")
    with held:
        assert set(held.read()) == {0}
    with pytest.raises(OSError):
        open(path)
    key.wipe()
    with pytest.raises(LocalError, match="wiped"), key.in_file(der):
        pass


# --- TLS on loopback ---------------------------------------------------------------------------------------


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(60):
            await test()

    trio.run(guarded)


class Ends:
    """A party and a client, and a TCP connection for each try."""

    def __init__(self) -> None:
        self.client = Identity.generate()
        self.party = PartyTls(BETA, "beta", [KEYS[0], KEYS[2]], None)
        self.other = ClientTls(self.client, KEYS, None)
        self.known = [self.client.public_hex]

    def certify(self, by: Identity = ALPHA, **changes: Any) -> bytes:
        now = utc_now()
        der = issue(by, KEYS[1], self.party.key.public, verdict_on(KEYS[1], now, **changes), now)
        self.party.install(der)
        return der

    async def meet(self, **options: Any) -> tuple[Secured | Exception, Secured | Exception]:
        """What the party got, and the client."""
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        out: dict[str, Secured | Exception] = {}

        async def serve() -> None:
            stream = await listener.accept()
            try:
                secured = out["party"] = await self.party.accept(stream, self.known)
                await secured.stream.send_all(b"hello")
            except MimirError as error:
                out["party"] = error
                await trio.aclose_forcefully(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            stream = await trio.open_tcp_stream(*listener.socket.getsockname())
            try:
                secured = await self.other.connect(stream, options.pop("party", KEYS[1]), **options)
                assert await secured.stream.receive_some(5) == b"hello"
                out["client"] = secured
            except (MimirError, trio.BrokenResourceError, AssertionError) as error:
                out["client"] = error
                await trio.aclose_forcefully(stream)
        await listener.aclose()
        return out["party"], out["client"]


def test_both_ends_know_each_other_and_speak_tls_1_3() -> None:
    async def test() -> None:
        ends = Ends()
        ends.certify()
        party, client = await ends.meet()
        assert isinstance(party, Secured) and isinstance(client, Secured)
        assert party.peer.identity == ends.client.public_hex and party.peer.grounds is None
        assert client.peer.identity == KEYS[1] and client.peer.issuer == KEYS[0]
        assert party.binding == client.binding and len(party.binding) == 32
        assert client.stream.version() == "TLSv1.3"
        assert client.stream.session is None or not client.stream.session.has_ticket  # nothing to resume by
        again, _ = await ends.meet()
        assert isinstance(again, Secured) and again.binding == party.binding  # the same two certificates

    run(test)


def test_a_party_whom_nobody_admitted_is_taken_only_by_those_who_ask_for_that() -> None:
    async def test() -> None:
        ends = Ends()
        _, client = await ends.meet()
        assert isinstance(client, TlsError) and "not by a key that we know" in str(client)
        _, client = await ends.meet(unadmitted=True)
        assert isinstance(client, Secured) and client.peer.grounds is None
        ends.certify()
        _, client = await ends.meet(unadmitted=True)
        assert isinstance(client, Secured) and client.peer.grounds is not None

    run(test)


def test_a_long_list_of_keys_does_not_hold_the_party_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL takes 0.4 ms for each key, at each renewal: not in the thread that serves everybody."""
    make, makers = tls._context, []

    def watched(*given: Any) -> Any:
        makers.append(threading.current_thread())
        return make(*given)

    async def test() -> None:
        monkeypatch.setattr(tls, "_context", watched)
        ends = Ends()
        ends.certify()
        async with trio.open_nursery() as nursery:  # both need the same one
            for _ in range(2):
                nursery.start_soon(ends.meet)
        assert len(makers) == 2 and threading.main_thread() not in makers  # the party's and the client's

    run(test)


def test_renewal_changes_what_new_connections_see_and_ends_none() -> None:
    async def test() -> None:
        ends = Ends()
        ends.certify(valid_until=utc_now() + timedelta(minutes=5))
        first, held = await ends.meet()
        assert isinstance(first, Secured) and isinstance(held, Secured)
        ends.certify(by=GAMMA)
        second, _ = await ends.meet()
        assert isinstance(second, Secured) and second.own.issuer == KEYS[2]
        async with trio.open_nursery() as nursery:  # the old one still carries bytes both ways
            nursery.start_soon(held.stream.send_all, b"up")
            assert await first.stream.receive_some(2) == b"up"
            nursery.start_soon(first.stream.send_all, b"down")
            assert await held.stream.receive_some(4) == b"down"

    run(test)


def test_what_is_over_or_revoked_is_not_shown(tmp_path: Path) -> None:
    owners = Owners(KEYS)
    known = Revocations(tmp_path / "r", owners.context, owners.keys, 2)
    time = [NOW]
    party = PartyTls(BETA, "beta", [KEYS[0], KEYS[2]], known, clock=lambda: time[0])
    by_alpha = issue(ALPHA, KEYS[1], party.key.public, verdict_on(KEYS[1], NOW), NOW)
    later = NOW + timedelta(minutes=10)
    by_gamma = issue(GAMMA, KEYS[1], party.key.public, verdict_on(KEYS[1], later), later)
    assert party.install(by_alpha) == party.certificate()
    time[0] = later
    longest = party.install(by_gamma)
    assert party.certificate() == longest
    known.offer(owners.revoke(1, identities=[KEYS[2]]))  # its word counts no more
    assert party.certificate().issuer == KEYS[0]
    at("revoked.identity", lambda: party.install(by_gamma))
    time[0] = NOW + HOUR
    assert party.certificate().grounds is None
    time[0] += HOUR
    assert party.certificate().not_after > time[0]  # its own is renewed as well
    time[0] = NOW + HOUR
    foreign = issue(ALPHA, KEYS[1], TLS.public, verdict_on(KEYS[1], later), later)
    at("certificate.key", lambda: party.install(foreign))
    at("certificate.identity", lambda: party.install(issue_for_gamma(party, time[0])))


def issue_for_gamma(party: PartyTls, now: datetime) -> bytes:
    return issue(ALPHA, KEYS[2], party.key.public, verdict_on(KEYS[2], now), now)


def test_wrong_ends_are_refused() -> None:
    async def test() -> None:
        ends = Ends()
        ends.certify()
        # A client that is on no list; then one whose certificate another client issued.
        ends.known = [Identity.generate().public_hex]
        party, client = await ends.meet()
        assert isinstance(party, TlsError) and "not by a key that we know" in str(party)
        assert isinstance(client, Exception)
        ends.known = []
        party, _ = await ends.meet()
        assert isinstance(party, TlsError) and "nobody" in str(party)
        friend = Identity.generate()
        ends.known = [ends.client.public_hex, friend.public_hex]
        now = utc_now()
        lent = issue(
            friend,
            ends.client.public_hex,
            ends.other.key.public,
            verdict_on(ends.client.public_hex, now),
            now,
        )
        read, _, _ = certificates._read(lent, Trail("certificate"))
        ends.other._self_made = lent, read
        party, _ = await ends.meet()
        assert isinstance(party, AttestationError) and party.step == "certificate.issuer"
        # A party that is another one than was asked for.
        ends = Ends()
        ends.certify()
        _, client = await ends.meet(party=KEYS[2])
        assert isinstance(client, TlsError)

    run(test)


def test_a_client_that_is_revoked_is_refused_by_its_certificate(tmp_path: Path) -> None:
    async def test() -> None:
        owners = Owners(KEYS)
        known = Revocations(tmp_path / "r", owners.context, owners.keys, 2)
        ends = Ends()
        ends.party.revocations = known
        assert isinstance((await ends.meet(unadmitted=True))[0], Secured)
        known.offer(owners.revoke(1, identities=[ends.client.public_hex]))
        party, _ = await ends.meet(unadmitted=True)
        assert isinstance(party, AttestationError) and party.step == "revoked.identity"

    run(test)


@pytest.mark.parametrize("how", ["1.2", "plain", "no certificate", "forged chain"])
def test_what_is_not_tls_1_3_with_a_certificate_is_refused(how: str) -> None:
    """A client that is not ours, in a thread, by the blocking half of the library."""

    async def test() -> None:
        ends = Ends()
        ends.certify()
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        place = listener.socket.getsockname()

        def stranger() -> None:
            with socket.create_connection(place, 20) as raw:
                if how == "plain":
                    raw.sendall(b"GET /mimir/1 HTTP/1.1\r\n\r\n")
                    raw.recv(100)
                    return
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                if how == "1.2":
                    context.maximum_version = ssl.TLSVersion.TLSv1_2
                if how == "forged chain":  # a key of its own, under an anchor's name
                    liar = Identity.generate()
                    key = TlsKey()
                    der = issue_own(liar, "client", key.public, utc_now())
                    with key.in_file(der.replace(liar.public_hex.encode(), ends.known[0].encode())) as path:
                        context.load_cert_chain(path)
                with pytest.raises((ssl.SSLError, OSError)), context.wrap_socket(raw) as inner:
                    if not inner.recv(5):
                        raise OSError("closed")

        thread = threading.Thread(target=stranger)
        thread.start()
        stream = await listener.accept()
        with pytest.raises(TlsError) as caught:
            await ends.party.accept(stream, ends.known)
        await trio.aclose_forcefully(stream)
        await listener.aclose()
        await trio.to_thread.run_sync(thread.join)
        wanted = {
            "1.2": "no TLS 1.3",
            "plain": "does not speak TLS",
            "no certificate": "shows no certificate",
            "forged chain": "not by a key that we know",
        }
        assert wanted[how] in str(caught.value), str(caught.value)

    run(test)


# --- the control door and the figures ----------------------------------------------------------------------


def test_a_session_runs_inside_tls(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made, AsyncExitStack() as stack:
            session = await open_one(stack, made)
            await session.prompt(PROMPT)
            assert len(await answer(session)) == 4
            shown = made.tls[0].certificate()
            assert shown.issuer == made.keys[1]

    run(test)


def test_the_sealed_connection_is_bound_to_the_certificates(tmp_path: Path) -> None:
    """A relay that holds a certificate for the party's name, by a peer that lies, is not enough."""

    async def test() -> None:
        async with world(tmp_path, trust=True) as made:
            liar = PartyTls(made.identities[0], NAMES[0], made.keys[1:], None)
            now = utc_now()
            der = issue(made.identities[1], made.keys[0], liar.key.public, verdict_on(made.keys[0], now), now)
            liar.install(der)
            inside = ClientTls(made.clients[0], made.keys, None)  # what the relay shows to the true party

            async def relay(stream: trio.SocketStream) -> None:
                secured = await liar.accept(stream, [made.clients[0].public_hex])
                party = made.federation.parties[0]
                outer = await trio.open_tcp_stream(party.host, party.port)
                onward = await inside.connect(outer, party.identity)
                async with trio.open_nursery() as nursery:

                    async def pump(a: Any, b: Any) -> None:
                        try:
                            while data := await a.receive_some(65536):
                                await b.send_all(data)
                        except (trio.BrokenResourceError, trio.ClosedResourceError):
                            pass
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(pump, secured.stream, onward.stream)
                    nursery.start_soon(pump, onward.stream, secured.stream)

            async with trio.open_nursery() as nursery:
                listeners = await nursery.start(
                    partial(trio.serve_tcp, relay, 0, host="127.0.0.1", handler_nursery=nursery)
                )
                place = listeners[0].socket.getsockname()
                asked = replace(made.federation.parties[0], host=place[0], port=place[1])
                tls = made.federation.client_tls(made.clients[0], None)
                with pytest.raises(PartyError) as caught:
                    async with connect(asked, made.clients[0], within=20, silence=20, tls=tls):
                        pass
                assert "hung up" in str(caught.value) or "TLS" in str(caught.value)
                nursery.cancel_scope.cancel()

    run(test)


def test_one_key_in_tls_and_another_inside_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made:
            tls = made.federation.client_tls(made.clients[1], None)
            with pytest.raises(PartyError):
                async with connect(
                    made.federation.parties[0], made.clients[0], within=20, silence=20, tls=tls
                ):
                    pass

    run(test)


def test_before_it_is_admitted_a_party_answers_about_its_state_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made:
            made.tls[1]._issued.clear()
            party, client = made.federation.parties[1], made.clients[0]
            tls = made.federation.client_tls(client, None)
            with pytest.raises(PartyError, match="not by a key that we know"):
                async with connect(party, client, within=20, silence=20, tls=tls):
                    pass
            ask = partial(connect, party, client, within=20, silence=20, tls=tls, unadmitted=True)
            async with ask() as connection:
                await connection.send({"t": "status"})
                status = (await connection.receive("status"))["status"]
                assert status["tls"]["grounds"] is None and status["revocations"]["epoch"] == 0
                await connection.send({"t": "put_model", "manifest": {}, "seeds": [bytes(32)] * 2})
                with pytest.raises(BadInput, match="about its state alone"):
                    await connection.receive("have")

    run(test)


def test_who_speaks_no_tls_to_a_door_with_tls_and_the_reverse(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made:
            with pytest.raises(PartyError):
                async with connect(made.federation.parties[0], made.clients[0], within=20, silence=20):
                    pass
        async with world(tmp_path / "plain") as made:
            tls = ClientTls(made.clients[0], made.keys, None)
            with pytest.raises(PartyError, match="no TLS"):
                async with connect(
                    made.federation.parties[0], made.clients[0], within=20, silence=20, tls=tls
                ):
                    pass

    run(test)


async def figures(
    place: Address, reader: ClientTls | None, party: str, path: str = "/metrics"
) -> tuple[int, bytes]:
    """Status and body of one request."""
    stream: trio.abc.Stream = await trio.open_tcp_stream(place.host, place.port)
    if reader is not None:
        stream = (await reader.connect(stream, party)).stream
    http = h11.Connection(h11.CLIENT)
    await stream.send_all(http.send(h11.Request(method="GET", target=path, headers=[("Host", "x")])) or b"")
    await stream.send_all(http.send(h11.EndOfMessage()) or b"")
    status, body = 0, b""
    while not isinstance(event := http.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
        if event is h11.NEED_DATA:
            http.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
    await trio.aclose_forcefully(stream)
    return status, body


def test_figures_are_told_to_readers_alone(tmp_path: Path) -> None:
    async def test() -> None:
        reader, stranger = Identity.generate(), Identity.generate()
        metrics = Metrics(Address("127.0.0.1", 0), (reader.public_hex,))
        async with world(tmp_path, trust=True, metrics=metrics) as made, trio.open_nursery() as nursery:
            (place,) = await nursery.start(serve_metrics, made.configs[0], made.tls[0])
            party = made.keys[0]
            status, body = await figures(place, ClientTls(reader, made.keys, None), party)
            assert status == 200 and b"mimir_revocation_epoch" in body
            assert (await figures(place, ClientTls(reader, made.keys, None), party, "/"))[0] == 404
            for wrong in (ClientTls(stranger, made.keys, None), ClientTls(made.clients[0], made.keys, None)):
                with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError)):
                    await figures(place, wrong, party)
            stream = await trio.open_tcp_stream(place.host, place.port)
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"mimir" not in await stream.receive_some()
            (plain,) = await nursery.start(serve_metrics, made.configs[0], None)
            assert (await figures(plain, None, party))[0] == 200
            for bad in (b"x" * 9000, b"\x16\3\1\0\0", b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"):
                stream = await trio.open_tcp_stream(plain.host, plain.port)
                await stream.send_all(bad)
                await stream.send_eof()
                assert b"mimir_" not in await stream.receive_some()
                await stream.aclose()
            assert (await figures(plain, None, party))[0] == 200  # and goes on
            nursery.cancel_scope.cancel()

    run(test)


def test_other_programs_read_figures_with_the_files_of_mimir_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        reader = Identity.generate()
        reader.save(tmp_path / "reader.key")
        metrics = Metrics(Address("127.0.0.1", 0), (reader.public_hex,))
        async with world(tmp_path, trust=True, metrics=metrics) as made, trio.open_nursery() as nursery:
            (place,) = await nursery.start(serve_metrics, made.configs[0], made.tls[0])
            file = tmp_path / "f.toml"
            write_federation(file, made)
            arguments = ["--key", str(tmp_path / "reader.key"), "--federation", str(file)]
            assert main(["certificate", *arguments, "--out", str(tmp_path / "tls")]) == 0
            name = server_name(made.keys[0])
            assert f"{NAMES[0]} {name}\n" in capsys.readouterr().out
            assert (tmp_path / "tls" / "tls.pem").stat().st_mode & 0o777 == 0o600

            def foreign() -> str:
                command = ["openssl", "s_client", "-connect", f"{place.host}:{place.port}", "-quiet"]
                command += ["-servername", name, "-verify_hostname", name, "-verify_return_error"]
                command += ["-partial_chain", "-CAfile", str(tmp_path / "tls" / "parties.pem")]
                command += [
                    "-cert",
                    str(tmp_path / "tls" / "tls.pem"),
                    "-key",
                    str(tmp_path / "tls" / "tls.pem"),
                ]
                asked = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=50)
                return done.stdout + done.stderr

            assert "mimir_revocation_epoch" in await trio.to_thread.run_sync(foreign)
            nursery.cancel_scope.cancel()

    run(test)


def write_federation(file: Path, made: World) -> None:
    assert made.owners is not None
    made.clients[0].save(file.with_name("client.key"))
    text = 'client_key = "client.key"\ntls.enabled = true\n[revocation]\n'
    text += f"owners = {list(made.owners.keys)}\nthreshold = 2\n".replace("'", '"')
    for party in made.federation.parties:
        text += f'[[parties]]\nname = "{party.name}"\nhost = "{party.host}"\nport = {party.port}\n'
        text += f'identity = "{party.identity}"\n'
    file.write_text(text)
