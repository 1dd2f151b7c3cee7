"""Where the storage key comes from: each source, and each way in which it must refuse.

No cloud is asked. KMS and OCI are fakes on loopback that check what they are sent; the encoding of a real KMS
answer and published signatures are the fixed points.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import itertools
import json
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attest_pki as pki
import cbor2
import numpy as np
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from software_tpm import SoftwareTpm, software_tpm
from storage import KEY

from mimir import config, hpke, keys
from mimir.__main__ import main
from mimir.admission import revocation
from mimir.admission.revocation import Statement
from mimir.attest import nitro
from mimir.attest import policy as policies
from mimir.attest.appraisal import Anchors
from mimir.attest.collateral import Collateral
from mimir.attest.evidence import Claims, Envelope
from mimir.attest.trail import stamp
from mimir.attesters import tpm2
from mimir.config import Address
from mimir.errors import AttestationError, BadInput, ConfigError, EnvironmentMissing, LocalError, MimirError
from mimir.keys import broker, cms, file, kms, oci, release, shamir, threshold
from mimir.keys.cms import KeyRefused
from mimir.net.identity import Identity
from mimir.secret import StorageKey
from mimir.vault import Vault

NOW = pki.NOW
AWS = pki.Aws.make()


def reveal(key: Any) -> bytes:
    with key.reveal_to_kernel() as view:
        return bytes(view)


def run(test: Callable[[], Any]) -> None:
    async def guarded() -> None:
        with trio.fail_after(60):
            await test()

    trio.run(guarded)


# --- a file ------------------------------------------------------------------------------------------------


def test_a_key_file_is_private_and_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "storage.key"
    assert main(["keygen", "--kind", "storage", "--out", str(path)]) == 0
    assert "for development" in capsys.readouterr().err
    assert path.stat().st_mode & 0o777 == 0o600
    key = file.load(path)
    assert reveal(key).hex() in path.read_text()
    assert main(["keygen", "--kind", "storage", "--out", str(path)]) == 2
    assert main(["keygen", "--kind", "storage"]) == 2
    assert reveal(file.load(path)) == reveal(key)
    path.chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        file.load(path)
    path.chmod(0o600)
    path.write_text("mimir-storage-v1 " + "0g" * 32)
    with pytest.raises(BadInput, match="damaged"):
        file.load(path)
    path.write_text("something else")
    with pytest.raises(BadInput, match="not such a file"):
        file.load(path)
    path.unlink()
    with pytest.raises(BadInput, match="--kind storage"):
        file.load(path)


def test_a_counter_file_counts_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    counter = file.FileCounter(tmp_path / "counter")
    assert [counter.read(), counter.advance(), counter.advance(), counter.read()] == [0, 1, 2, 2]
    (tmp_path / "counter").write_text("x2")
    with pytest.raises(BadInput, match="damaged"):
        counter.read()


def party(tmp: Path, extra: str = "", own: Identity | None = None) -> Path:
    """A configuration; its identity lies in the clear."""
    identities = [own or Identity.generate(), Identity.generate(), Identity.generate()]
    if own is None:
        identities[0].save(tmp / "own.key")
    text = 'party = 0\nidentity_key = "own.key"\ndata_dir = "data"\n' + extra
    text += '[attestation]\nmode = "off"\n'
    text += '[tunnel]\nmode = "none"\n[control]\nlisten = "127.0.0.1:0"\n[mesh]\nlisten = "127.0.0.1:0"\n'
    for number, identity in enumerate(identities):
        text += f'[[peers]]\nparty = {number}\nname = "p{number}"\nidentity = "{identity.public_hex}"\n'
        text += 'host = "127.0.0.1"\nport = 1\n'
    path = tmp / "party.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ('keys.counter = "data/x"\n', "must not be in data_dir"),
        ('keys.counter = "x"\n', "a folder of its own"),
        ('keys.source = "kms"\n', "keys.kms"),
        ('keys.source = "threshold"\n', "keys.threshold"),
        ('keys.source = "hsm"\n', "keys.source"),
        ("keys.tpm.pcrs = [16]\n", "PCR numbers from 0 to 15"),
        ("keys.tpm.pcrs = []\n", "PCR numbers"),
        ('keys.kms = { region = "r", key_id = "k", endpoint = "vsock:x:1" }\n', "vsock:3:8000"),
        ("keys.lock_shares = 1\n", "true or false"),
        ('keys.fil = "x"\n', "did you mean keys.file"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, extra: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config.load(party(tmp_path, extra))


def test_vsock_endpoints_are_read(tmp_path: Path) -> None:
    found = config.endpoint_rule("vsock:3:8000", tmp_path)
    assert found == Address("vsock:3", 8000)
    assert config.endpoint_rule("kms.example:443", tmp_path) == Address("kms.example", 443)


# --- identities at rest ------------------------------------------------------------------------------------


def test_an_identity_is_sealed_and_opened_by_its_party_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = party(tmp_path)
    own = tmp_path / "own.key"
    plain, public = own.read_text(), Identity.load(own).public_hex
    assert main(["keygen", "--kind", "storage", "--sealed-by", str(path)]) == 0
    assert main(["seal", "--config", str(path)]) == 0
    assert capsys.readouterr().out.strip() == public
    assert plain.split()[1].encode() not in own.read_bytes()
    assert bytes.fromhex(plain.split()[1]) not in own.read_bytes()
    key = file.load(tmp_path / "storage.key")
    assert Identity.load(own, key).public_hex == public
    assert main(["run", "--config", str(path), "--check"]) == 0
    assert "encrypted" in capsys.readouterr().out
    with pytest.raises(BadInput, match="encrypted under a party's storage key"):
        Identity.load(own)
    with pytest.raises(MimirError, match=r"own\.key.*another storage key"):
        Identity.load(own, StorageKey(bytes(32)))
    assert main(["seal", "--config", str(path)]) == 2
    good = own.read_bytes()
    for at in range(len(good)):
        own.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(MimirError, match=r"own\.key"):
            Identity.load(own, key)
    assert main(["keygen", "--sealed-by", str(path), "--out", str(tmp_path / "new.key")]) == 0
    fresh = capsys.readouterr().out.strip()
    assert Identity.load(tmp_path / "new.key", key).public_hex == fresh
    assert main(["keygen", "--sealed-by", str(path), "--out", str(tmp_path / "new.key")]) == 2


def test_an_identity_in_the_clear_is_refused_where_the_key_is_not_in_a_file(tmp_path: Path) -> None:
    found = config.load(party(tmp_path, 'keys.source = "tpm"\n'))
    with pytest.raises(BadInput, match=r"in the clear.*mimir seal"):
        keys.load_identity(found, StorageKey(KEY))


# --- a TPM -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tpm() -> Iterator[SoftwareTpm]:
    with software_tpm() as made:
        yield made


def test_a_tpm_seals_the_key_counts_and_gives_nothing_after_another_boot(
    tmp_path: Path, tpm: SoftwareTpm
) -> None:
    settings_ = config.TpmKey(device=tpm.socket, pcrs=(0, 7))
    source = keys.open_source(config.Keys(source="tpm", tpm=settings_).placed(tmp_path))

    async def test() -> None:
        with pytest.raises(BadInput, match="--sealed-by"):
            await source.obtain()
        await source.create()
        key = reveal(await source.obtain())
        blob = (tmp_path / "storage.key").read_bytes()
        assert key not in blob and len(key) == 32
        with pytest.raises(BadInput, match="exists already"):
            await source.create()
        assert reveal(await source.obtain()) == key

        # The vault counts in the TPM, and an old directory is refused.
        root, saved = tmp_path / "data", tmp_path / "saved"

        def use() -> None:
            vault = Vault(root, StorageKey(key), source.counter)
            shutil.copytree(root, saved)
            vault.put("journal", "epochs", b"1")
            vault.close()

        def back() -> None:
            shutil.rmtree(root)
            shutil.copytree(saved, root)
            Vault(root, StorageKey(key), source.counter)

        await trio.to_thread.run_sync(use)
        with pytest.raises(MimirError, match="put back to an earlier state"):
            await trio.to_thread.run_sync(back)

        # Another boot: what was measured differs.
        async with tpm2.open_tpm(tpm.socket) as device:
            await device.extend_pcr(7, b"\1" * 32)
        with pytest.raises(tpm2.PcrMismatch, match="PCRs 0, 7"):
            await source.obtain()
        (tmp_path / "storage.key").write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
        with pytest.raises(MimirError):
            await source.obtain()

    run(test)


# --- shares of a key ---------------------------------------------------------------------------------------


def slow_product(a: int, b: int) -> int:
    """GF(2^8) by the book: multiply polynomials, then divide."""
    product = 0
    for bit in range(8):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(14, 7, -1):
        product ^= (0x11B << bit - 8) * (product >> bit & 1)
    return product


def test_the_field_is_exact() -> None:
    every = np.arange(256, dtype=np.uint8)
    for b in range(256):
        assert shamir.times(every, b).tolist() == [slow_product(a, b) for a in range(256)]
    for a in range(1, 256):
        assert slow_product(a, shamir._inverse(a)) == 1
    assert slow_product(0x53, 0xCA) == 1  # FIPS 197, 4.2


@pytest.mark.parametrize(("need", "count"), [(1, 1), (1, 3), (2, 3), (3, 5), (4, 4)])
def test_any_t_shares_give_the_key_and_no_fewer(need: int, count: int) -> None:
    key = StorageKey(KEY)
    shares = shamir.split(key, need, count)
    for chosen in itertools.combinations(shares, need):
        assert reveal(shamir.join({number: shares[number] for number in chosen})) == KEY
    for chosen in itertools.combinations(shares, need - 1):
        if chosen:
            assert reveal(shamir.join({number: shares[number] for number in chosen})) != KEY
    with pytest.raises(LocalError):
        shamir.split(key, count + 1, count)


def test_fewer_shares_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three, one byte, exhausted: for each value of a share every secret is possible once."""
    for number in (1, 2, 3, 255):
        for secret in (0, 1, 0x80, 0xFF):
            seen = {
                int(shamir.times(np.array([slope], np.uint8), number)[0]) ^ secret for slope in range(256)
            }
            assert len(seen) == 256
    # And that is what `split` does, with slopes from the system.
    monkeypatch.setattr(os, "urandom", lambda size: b"\x07" * size)
    shares = shamir.split(StorageKey(b"\x10" * 32), 2, 3)
    for number, share in shares.items():
        assert set(reveal(share)[:32]) == {slow_product(7, number) ^ 0x10}


def test_commitments_bind_to_key_number_and_share() -> None:
    shares = shamir.split(StorageKey(KEY), 2, 3)
    values = {
        shamir.commit(key_id, number, shares[held])
        for key_id in (bytes(16), b"\1" * 16)
        for number in (1, 2)
        for held in (1, 2)
    }
    assert len(values) == 8


# --- brokers -----------------------------------------------------------------------------------------------

PCR = {0: b"\1" * 48, 1: b"\2" * 48, 2: b"\3" * 48}
POLICY = f"""
format = 1
name = "brokers"
version = 1
environment = "production"
not_after = 2027-01-01T00:00:00Z
[[allow]]
id = "party"
kind = "nitro"
pcrs = {{ "0" = ["{PCR[0].hex()}"], "1" = ["{PCR[1].hex()}"], "2" = ["{PCR[2].hex()}"] }}
"""


class Enclave:
    """An attester whose hypervisor is ours. `change` alters what the document says, `about` the claims."""

    kind = "nitro"

    def __init__(self, **change: Any) -> None:
        self.change = change
        self.about: Callable[[Claims], Claims] = lambda claims: claims
        self.made: list[Envelope] = []

    async def attest(self, claims: Claims) -> Envelope:
        claims = self.about(claims)
        document = AWS.document(**{"user_data": claims.report_data(), "nonce": claims.nonce} | self.change)
        self.made.append(Envelope("nitro", document, claims.encode()))
        return self.made[-1]


class Circle:
    """Three brokers, two of whom are needed, each with files of its own, and a party that asks."""

    def __init__(self, tmp: Path, need: int = 2) -> None:
        self.tmp = tmp
        self.owner, self.requester = Identity.generate(), Identity.generate()
        self.identities = {name: Identity.generate() for name in ("alpha", "beta", "gamma")}
        self.key = StorageKey.random()
        self.need = need
        self.policy = POLICY
        self.settings: dict[str, dict[str, Any]] = {name: {} for name in self.identities}
        self.now = NOW

    def configured(self, ports: dict[str, int]) -> list[broker.Service]:
        places = {
            name: (Address("127.0.0.1", ports.get(name, 1)), identity.public_hex)
            for name, identity in self.identities.items()
        }
        self.split, shares = release.deal(self.key, self.need, places)
        written = broker.write_split(self.split, shares, self.tmp / "split")
        assert [path.name for path in written] == ["storage.toml", *(f"broker{n}.share" for n in (1, 2, 3))]
        assert release.load_split(written[0]) == self.split
        path = self.tmp / "policy.toml"
        path.write_text(self.policy)
        found = policies.load(path)
        signature = self.owner.sign(policies.signed_message(found)).hex()
        (self.tmp / "policy.toml.sig").write_text(
            policies.format_signatures([policies.Signature(self.owner.public_hex, signature)])
        )
        services = []
        for number, (name, identity) in enumerate(self.identities.items(), 1):
            made = broker.BrokerConfig(
                source=self.tmp / "broker.toml",
                identity_key=self.tmp / "unused",
                listen=Address("127.0.0.1", 0),
                split=written[0],
                share=written[number],
                policy=path,
                owners=(self.owner.public_hex,),
                threshold=1,
                requesters=(broker.Requester("party", self.requester.public_hex),),
                seconds=10.0,
            )
            made = replace(made, **self.settings[name])
            services.append(
                broker.Service(made, identity, now=lambda: self.now, anchors=Anchors(nitro=AWS.roots))
            )
        return services

    async def collect(
        self, attester: Any = None, up: tuple[str, ...] = ("alpha", "beta", "gamma"), seconds: float = 10.0
    ) -> StorageKey:
        """Ask the brokers that are up, over loopback."""
        services = self.configured({})
        outcome: Any = None
        async with trio.open_nursery() as nursery:
            for service, name in zip(services, self.identities, strict=True):
                port = 1
                if name in up:
                    port = await nursery.start(broker.serve, service, Address("127.0.0.1", 0))
                listed = [
                    replace(each, address=Address("127.0.0.1", port)) if each.name == name else each
                    for each in self.split.brokers
                ]
                self.split = replace(self.split, brokers=tuple(listed))
            try:
                outcome = await threshold.collect(
                    self.split, self.requester, attester or Enclave(), seconds, lambda: self.now
                )
            except MimirError as error:
                outcome = error
            nursery.cancel_scope.cancel()
        if isinstance(outcome, MimirError):
            raise outcome
        key: StorageKey = outcome
        return key


def test_enough_brokers_give_the_key(tmp_path: Path) -> None:
    circle = Circle(tmp_path)

    async def test() -> None:
        assert reveal(await circle.collect()) == reveal(circle.key)

    run(test)


def test_one_broker_may_be_away_but_not_two(tmp_path: Path) -> None:
    async def test() -> None:
        circle = Circle(tmp_path / "one")
        assert reveal(await circle.collect(up=("alpha", "gamma"))) == reveal(circle.key)
        circle = Circle(tmp_path / "two")
        with pytest.raises(KeyRefused, match=r"1 of the 2 shares.*alpha: .*reached.*beta: .*reached"):
            await circle.collect(up=("gamma",))

    run(test)


def deny(circle: Circle) -> None:
    circle.policy += f'[deny]\nidentities = ["{release.identity_hash(circle.requester.public).hex()}"]\n'


def revoke(circle: Circle) -> None:
    for each in circle.settings.values():
        each["revoked"] = (circle.requester.public_hex,)


def revoke_by_owners(circle: Circle, epoch: int = 1, **items: Any) -> None:
    """A statement of the owners, in the file that brokers read."""
    at = NOW.replace(microsecond=0)
    items = {kind: frozenset(values) for kind, values in items.items()}
    statement = Statement("ab" * 32, epoch, at, **items)
    signature = circle.owner.sign(statement.message()).hex()
    path = circle.tmp / "revoked.toml"
    path.parent.mkdir(exist_ok=True)
    revocation.save(path, statement, [policies.Signature(circle.owner.public_hex, signature)])
    for each in circle.settings.values():
        each["revocations"] = path


def revoke_code(circle: Circle) -> None:
    revoke_by_owners(circle, measurements=[PCR[0].hex()])


def revoke_requester(circle: Circle) -> None:
    revoke_by_owners(circle, identities=[circle.requester.public_hex])


def unlist(circle: Circle) -> None:
    for each in circle.settings.values():
        each["requesters"] = ()


def expire(circle: Circle) -> None:
    circle.policy = circle.policy.replace("2027-01-01T00:00:00Z", stamp(NOW))


@pytest.mark.parametrize(
    ("spoil", "attester", "step"),
    [
        (None, Enclave(pcrs={**PCR, 0: b"\x09" * 48}), "pcr"),
        (None, Enclave(pcrs={n: bytes(48) for n in range(16)}), "debug"),
        (None, Enclave(user_data=b"\x01" * 64), "claims.binding"),
        (None, Enclave(nonce=b"\x01" * 32), "claims.nonce"),
        (None, Enclave(timestamp=int((NOW.timestamp() - 3600) * 1000)), "fresh|age|time"),
        (deny, None, "deny"),
        (revoke, None, "release.revoked"),
        (revoke_code, None, "revoked.measurement"),
        (revoke_requester, None, "revoked.identity"),
        (unlist, None, "release.requester"),
    ],
    ids=[
        "measurement",
        "debug",
        "other claims",
        "other nonce",
        "old",
        "denied",
        "revoked",
        "code",
        "key",
        "unlisted",
    ],
)
def test_whoever_may_not_have_it_is_refused_by_every_broker_with_the_step(
    tmp_path: Path, spoil: Any, attester: Any, step: str
) -> None:
    circle = Circle(tmp_path)
    if spoil is not None:
        spoil(circle)

    async def test() -> None:
        with pytest.raises(KeyRefused, match=rf"0 of the 2 shares.*refused at \S*({step})"):
            await circle.collect(attester)

    run(test)


def test_a_broker_does_not_forget_what_the_owners_revoked(tmp_path: Path) -> None:
    """Its file is read for each request; one that says less, or that others signed, gives nobody anything."""
    circle = Circle(tmp_path)
    revoke_by_owners(circle, 2, identities=["cd" * 32])
    service = circle.configured({})[0]
    held = service.terms().statement
    assert held is not None and held.epoch == 2
    for epoch, items, step in (
        (1, {"identities": ["cd" * 32]}, "epoch"),
        (3, {}, "superset"),
    ):
        revoke_by_owners(circle, epoch, **items)
        with pytest.raises(AttestationError, match=rf"revocation\.{step}"):
            service.terms()
    circle.owner, owner = Identity.generate(), circle.owner
    revoke_by_owners(circle, 3, identities=["cd" * 32])
    with pytest.raises(AttestationError, match=r"revocation\."):
        service.terms()
    (tmp_path / "revoked.toml").unlink()
    with pytest.raises(BadInput, match=r"revoked\.toml"):
        service.terms()
    circle.owner = owner
    revoke_by_owners(circle, 3, identities=["cd" * 32], measurements=[PCR[0].hex()])
    again = service.terms().statement
    assert again is not None and again.epoch == 3


def test_claims_that_say_anything_else_are_refused(tmp_path: Path) -> None:
    """Every field that binds the evidence to this request, one at a time."""
    changes: dict[str, Any] = {
        "role": "client",
        "node": "another",
        "identity": b"\1" * 32,
        "tunnel": b"\1" * 32,
        "kem": b"\1" * 32,
        "nonce": b"\1" * 32,
        "nonce_source": "somebody",
        "policy": b"\1" * 32,
        "channel": b"\1" * 32,
        "config": b"\1" * 32,
    }

    async def test() -> None:
        services = Circle(tmp_path)
        services.configured({})
        for name, value in changes.items():
            exchange = Exchange(services)
            exchange.about = lambda claims, name=name, value=value: replace(claims, **{name: value})
            with pytest.raises(AttestationError) as caught:
                await exchange.run()
            assert caught.value.step == f"claims.{name}"

    run(test)


class Exchange:
    """One party and broker 1 without a network between them."""

    def __init__(self, circle: Circle, terms: release.Terms | None = None, number: int = 1) -> None:
        self.circle, self.number = circle, number
        self.kem = hpke.HpkeKey()
        self.identity = list(circle.identities.values())[number - 1]
        self.terms = terms or terms_of(circle, number)
        self.share = broker.open_share(circle.tmp / "split" / f"broker{number}.share", self.identity)
        self.asking = release.Asking(circle.split, number, circle.requester, self.kem)
        self.giving = release.Giving(self.terms, self.identity)
        self.about: Callable[[Claims], Claims] = lambda claims: claims
        self.tap: dict[str, Callable[[bytes], bytes]] = {}
        self.said: dict[str, bytes] = {}

    def pass_on(self, name: str, message: bytes) -> bytes:
        self.said[name] = message
        return self.tap.get(name, lambda raw: raw)(message)

    async def run(self) -> shamir.KeyShare:
        challenge = self.giving.challenge(self.pass_on("hello", self.asking.hello()))
        claims = self.asking.claims(self.pass_on("challenge", challenge), NOW)
        enclave = Enclave()
        enclave.about = self.about
        evidence = self.asking.evidence(await enclave.attest(claims))
        verdict = self.giving.appraise(self.pass_on("evidence", evidence), NOW)
        return self.asking.share(self.pass_on("share", self.giving.share(self.share, verdict)))


def terms_of(circle: Circle, number: int = 1, **changes: Any) -> release.Terms:
    return replace(
        release.Terms(
            circle.split,
            number,
            policies.load(circle.tmp / "policy.toml"),
            Collateral(),
            {circle.requester.public: "party"},
            anchors=Anchors(nitro=AWS.roots),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Circle:
    made = Circle(tmp_path_factory.mktemp("circle"))
    made.configured({})
    return made


def test_the_share_is_sealed_to_the_attested_key_and_nothing_else_is_said(circle: Circle) -> None:
    async def test() -> None:
        exchange = Exchange(circle)
        share = await exchange.run()
        assert reveal(share) == reveal(exchange.share)
        said = b"".join(exchange.said.values())
        assert all(reveal(share)[at : at + 8] not in said for at in range(0, 64, 8))

    run(test)


@pytest.mark.parametrize("name", ["hello", "challenge", "evidence", "share"])
def test_no_message_can_be_changed_repeated_or_taken_from_another_connection(
    circle: Circle, name: str
) -> None:
    async def test() -> None:
        other = Exchange(circle)
        await other.run()
        tried = 0
        for spoil in (
            lambda raw: other.said[name],
            lambda raw: raw + b"\0",
            lambda raw: raw[:-1],
            lambda raw: b"",
            lambda raw: cbor2.dumps([b"", b""]),
            *(
                lambda raw, at=at: (
                    raw[: at % len(raw)] + bytes([raw[at % len(raw)] ^ 1]) + raw[at % len(raw) + 1 :]
                )
                for at in range(0, 4096, 97)
            ),
        ):
            exchange = Exchange(circle)
            exchange.tap[name] = spoil
            with pytest.raises((KeyRefused, AttestationError)):
                await exchange.run()
            tried += 1
        assert tried > 40

    run(test)


def test_evidence_that_was_recorded_serves_no_other_key(circle: Circle) -> None:
    """A thief with the requester key replays an envelope of the real machine, with an HPKE key of his own."""

    async def test() -> None:
        honest = Exchange(circle)
        recorded: list[Envelope] = []
        enclave = Enclave()
        challenge = honest.giving.challenge(honest.asking.hello())
        recorded.append(await enclave.attest(honest.asking.claims(challenge, NOW)))
        thief = Exchange(circle)
        challenge = thief.giving.challenge(thief.asking.hello())
        thief.asking.claims(challenge, NOW)
        with pytest.raises(AttestationError) as caught:
            thief.giving.appraise(thief.asking.evidence(recorded[0]), NOW)
        assert caught.value.step in ("claims.kem", "claims.nonce")

    run(test)


def test_a_bad_share_is_caught_and_its_broker_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    circle = Circle(tmp_path)
    give = release.Giving.share

    def lie(self: release.Giving, share: Any, verdict: Any) -> bytes:
        if self._terms.number == 2:
            share = shamir.KeyShare.random(64)
        return give(self, share, verdict)

    monkeypatch.setattr(release.Giving, "share", lie)

    async def test() -> None:
        assert reveal(await circle.collect()) == reveal(circle.key), "two honest ones are enough"
        shutil.rmtree(tmp_path / "split")
        with pytest.raises(KeyRefused, match="beta: a BAD SHARE"):
            await circle.collect(up=("alpha", "beta"))

    run(test)


def test_a_share_of_another_key_is_refused_at_both_ends(tmp_path: Path, circle: Circle) -> None:
    other = Circle(tmp_path)
    other.identities = circle.identities
    other.configured({})

    async def test() -> None:
        exchange = Exchange(circle)
        exchange.share = broker.open_share(other.tmp / "split" / "broker1.share", exchange.identity)
        with pytest.raises(KeyRefused, match="BAD SHARE"):
            await exchange.run()
        exchange = Exchange(circle, terms_of(other))
        with pytest.raises(KeyRefused, match="not signed"):  # the description is part of what is signed
            await exchange.run()

    run(test)
    shutil.copy(other.tmp / "split" / "broker1.share", tmp_path / "wrong.share")
    for name in circle.settings:
        circle.settings[name] = {}
    spoiled = Circle(tmp_path / "third")
    spoiled.identities = circle.identities
    spoiled.settings["alpha"] = {"share": tmp_path / "wrong.share"}
    with pytest.raises(BadInput, match="commits to"):
        spoiled.configured({})


def test_a_share_file_opens_for_its_broker_alone(circle: Circle) -> None:
    path = circle.tmp / "split" / "broker2.share"
    alpha, beta, _ = circle.identities.values()
    broker.open_share(path, beta)
    with pytest.raises(BadInput, match="another broker"):
        broker.open_share(path, alpha)


def test_shares_that_do_not_make_the_key_are_refused(circle: Circle) -> None:
    """Should the description itself have been changed, so that commitments hold and the key is another."""
    wrong = shamir.split(StorageKey.random(), 2, 3)
    with pytest.raises(KeyRefused, match="do not make the key"):
        release.rebuild(circle.split, {1: wrong[1], 2: wrong[2]})
    with pytest.raises(BadInput, match="2 are needed"):
        release.rebuild(circle.split, {1: wrong[1]})


@pytest.mark.parametrize("check", ["commitment", "signature", "binding"])
def test_each_check_is_needed(circle: Circle, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """Without it the attack that it stops goes through."""

    async def test() -> None:
        exchange = Exchange(circle)
        if check == "commitment":
            monkeypatch.setattr(release.hmac, "compare_digest", lambda a, b: True)
            exchange.share = shamir.KeyShare(b"\5" * 64)
            assert reveal(await exchange.run()) == b"\5" * 64
        elif check == "signature":
            monkeypatch.setattr(release, "verify", lambda *_: None)
            exchange.tap["share"] = lambda raw: cbor2.dumps([cbor2.loads(raw)[0], bytes(64)])
            await exchange.run()
        else:
            monkeypatch.setattr(release, "appraise", lambda raw, *_: trusting(raw, exchange))
            exchange.about = lambda claims: replace(claims, nonce=b"\1" * 32)
            await exchange.run()

    def trusting(raw: bytes, exchange: Exchange) -> Any:
        class Verdict:
            class claims:
                kem = exchange.kem.digest

        return Verdict

    run(test)


def test_a_broker_outlives_whoever_talks_nonsense(tmp_path: Path) -> None:
    circle = Circle(tmp_path)
    circle.settings["alpha"] = {"seconds": 0.3}

    async def test() -> None:
        service = circle.configured({})[0]
        async with trio.open_nursery() as nursery:
            port = await nursery.start(broker.serve, service, Address("127.0.0.1", 0))
            for noise in (b"", b"\0\0\0\0", b"\xff" * 8, b"GET / HTTP/1.0\r\n\r\n", b"\0\0\0\5hello"):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(noise)
                with suppress(trio.BrokenResourceError):  # it was faster
                    await stream.send_eof()
                with suppress(trio.BrokenResourceError):
                    assert await stream.receive_some(10) == b""
                await stream.aclose()
            silent = await trio.open_tcp_stream("127.0.0.1", port)
            assert await silent.receive_some(10) == b"", "cut off when its time is up"
            split = replace(
                circle.split,
                threshold=1,
                brokers=(replace(circle.split.brokers[0], address=Address("127.0.0.1", port)),),
            )
            with pytest.raises(KeyRefused):  # another description: nothing is signed as it expects
                await threshold.collect(split, circle.requester, Enclave(), 10, lambda: NOW)
            nursery.cancel_scope.cancel()

    run(test)


def test_a_broker_that_does_not_answer_is_named_in_time(tmp_path: Path) -> None:
    circle = Circle(tmp_path)
    circle.configured({})

    async def test() -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        place = Address("127.0.0.1", port)
        silent = tuple(replace(each, address=place) for each in circle.split.brokers)
        with pytest.raises(KeyRefused, match=r"alpha: nothing from .* within 0\.2 s"):
            await threshold.collect(
                replace(circle.split, brokers=silent), circle.requester, Enclave(), 0.2, lambda: NOW
            )
        for each in listeners:
            await each.aclose()

    run(test)


def test_an_expired_or_unsigned_policy_gives_nothing(tmp_path: Path) -> None:
    circle = Circle(tmp_path / "expired")
    expire(circle)
    circle.now = NOW.replace(hour=13)
    with pytest.raises(AttestationError, match="policy"):
        circle.configured({})
    circle = Circle(tmp_path / "unsigned")
    for each in circle.settings.values():
        each["owners"] = (Identity.generate().public_hex,)
    with pytest.raises(AttestationError, match="policy"):
        circle.configured({})


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_messages_from_strangers_are_refused_whatever_they_are(raw: bytes) -> None:
    said = release._Transcript(bytes(32), bytes(32))
    with pytest.raises(KeyRefused):
        said.hear(raw, ("hello",))


def test_the_commands_split_a_key_and_run_a_broker(
    tmp_path: Path, tpm: SoftwareTpm, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a real quote: split, two brokers of two, and a party whose key is nowhere but with them."""
    requester, owner = Identity.generate(), Identity.generate()
    requester.save(tmp_path / "requester.key")
    names = {}
    for name in ("alpha", "beta"):
        identity = Identity.generate()
        identity.save(tmp_path / f"{name}.key")
        names[name] = identity
        file.save(tmp_path / f"{name}.storage", StorageKey.random())

    async def name_of_key() -> str:
        async with tpm2.open_tpm(tpm.socket) as device:
            return "000b" + hashlib.sha256(await device.attestation_public()).hexdigest()

    policy = tmp_path / "policy.toml"
    policy.write_text(
        'format = 1\nname = "simulated"\nversion = 1\nenvironment = "simulation"\n'
        f'not_after = 2099-01-01T00:00:00Z\n[[allow]]\nid = "it"\nkind = "swtpm"\n'
        f'ak_names = ["{trio.run(name_of_key)}"]\npcrs = {{ "0" = ["{"00" * 32}"] }}\n'
    )
    owner.save(tmp_path / "owner.key")
    assert main(["policy", "sign", str(policy), "--key", str(tmp_path / "owner.key")]) == 0
    split = ["broker", "split", "--threshold", "2", "--out", str(tmp_path / "split")]
    wanted = [f"--broker={name}=127.0.0.1:1={identity.public_hex}" for name, identity in names.items()]
    assert main([*split, *wanted]) == 0
    assert main([*split, *wanted]) == 2, "nothing is overwritten"
    assert main([*split[:-1], str(tmp_path / "x"), wanted[0]]) == 2, "two of one"
    capsys.readouterr()

    async def test() -> None:
        found = release.load_split(tmp_path / "split" / "storage.toml")
        async with trio.open_nursery() as nursery:
            listed = []
            for number, (name, each) in enumerate(zip(names, found.brokers, strict=True), 1):
                path = tmp_path / f"{name}.toml"
                path.write_text(
                    f'identity_key = "{name}.key"\nlisten = "127.0.0.1:0"\nsplit = "split/storage.toml"\n'
                    f'share = "split/broker{number}.share"\npolicy = "policy.toml"\n'
                    f'owners = ["{owner.public_hex}"]\nthreshold = 1\n[keys]\nfile = "{name}.storage"\n'
                    f'[[requesters]]\nname = "party"\nidentity = "{requester.public_hex}"\n'
                )
                loaded = broker.load(path)
                service = broker.Service(loaded, names[name])
                port = await nursery.start(broker.serve, service, loaded.listen)
                listed.append(replace(each, address=Address("127.0.0.1", port)))
            described = tmp_path / "storage.toml"
            described.write_text(replace(found, brokers=tuple(listed)).text())
            wanted = config.Keys(
                source="threshold",
                file=described,
                threshold=config.ThresholdKey(tmp_path / "requester.key", 30.0),
            ).placed(tmp_path)
            source = keys.open_source(wanted, config.Attester("swtpm", tpm.socket))
            first, second = reveal(await source.obtain()), reveal(await source.obtain())
            assert first == second and len(first) == 32
            assert "2 of 2 brokers" in source.protection
            with pytest.raises(ConfigError, match="mimir broker split"):
                await source.create()
            nursery.cancel_scope.cancel()

    run(test)


def test_the_example_of_a_broker_is_valid(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parent.parent / "configs" / "broker.toml"
    found = broker.load(example)
    assert found.requesters[0].name == "alpha"
    text = example.read_text().replace(
        'source = "file"', 'source = "threshold"\n[keys.threshold]\nrequester = "x"'
    )
    (tmp_path / "broker.toml").write_text(text.replace('file = "storage.key"\n', ""))
    with pytest.raises(ConfigError, match="cannot have its key from brokers"):
        broker.load(tmp_path / "broker.toml")


# --- AWS KMS -----------------------------------------------------------------------------------------------


def test_a_real_answer_of_kms_is_taken_apart(shared_dir: Path) -> None:
    vectors = shared_dir / "vectors" / "attestation" / "kms"
    folder = vectors / "kms_cms"
    found = cms.parse((folder / "enveloped.ber").read_bytes())
    assert found.encrypted_key == (folder / "encrypted_key.bin").read_bytes()
    assert found.iv == (folder / "iv.bin").read_bytes()
    assert found.ciphertext == (folder / "ciphertext.bin").read_bytes()
    assert len(found.recipient) == 32
    # The second one of the vectors lost bytes when it was copied: it is no BER, and refused.
    with pytest.raises(KeyRefused):
        cms.parse((vectors / "kms_cms_w_ctx" / "enveloped.ber").read_bytes())


def test_what_is_no_answer_of_kms_is_refused_within_bounds() -> None:
    good = envelope(pki.rsa_key("enclave").public_key(), KEY)
    assert cms.decrypt(good, pki.rsa_key("enclave")) == KEY
    for at in range(len(good)):
        with pytest.raises(KeyRefused):
            cms.parse(good[:at])
        changed = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        try:
            parsed = cms.parse(changed)
        except KeyRefused:
            continue
        assert parsed != cms.parse(good) or at < 40, at
    for raw in (
        b"\x30\x80" * 5000,
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\x80" + b"\5\0" * 4000,
        b"\x1f\x01",
        b"",
    ):
        with pytest.raises(KeyRefused):
            cms.parse(raw)
    with pytest.raises(KeyRefused, match="does not open"):
        cms.decrypt(envelope(pki.rsa_key("another").public_key(), KEY), pki.rsa_key("enclave"))
    with pytest.raises(KeyRefused, match="16 bytes inside"):
        cms.decrypt(envelope(pki.rsa_key("enclave").public_key(), KEY[:16]), pki.rsa_key("enclave"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
def test_openssl_s_encoding_opens_too(tmp_path: Path) -> None:
    """Another program wrote it: definite lengths, another order of nothing."""
    private = pki.rsa_key("enclave")
    certificate = pki.certificate(
        "enclave",
        private,
        None,
        private,
        ca=False,
        extensions=[(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), False)],
        algorithm=hashes.SHA256(),
    )
    (tmp_path / "it.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (tmp_path / "key").write_bytes(KEY)
    options = (
        "-keyid -keyopt rsa_padding_mode:oaep -keyopt rsa_oaep_md:sha256 -keyopt rsa_mgf1_md:sha256 -aes256"
    )
    subprocess.run(
        f"openssl cms -encrypt -binary -in key -outform DER -out out -recip it.pem {options}".split(),
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert cms.decrypt((tmp_path / "out").read_bytes(), private) == KEY


def envelope(public: rsa.RSAPublicKey, content: bytes) -> bytes:
    """EnvelopedData as KMS writes it: indefinite lengths outside, one recipient."""

    def open_(tag: int, *parts: bytes) -> bytes:
        return bytes((tag, 0x80)) + b"".join(parts) + b"\0\0"

    inner, iv = os.urandom(32), os.urandom(16)
    wrapped = public.encrypt(inner, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))
    fill = 16 - len(content) % 16
    cipher = Cipher(algorithms.AES256(inner), modes.CBC(iv)).encryptor()
    secret = cipher.update(content + bytes((fill,)) * fill) + cipher.finalize()
    sha = pki.tlv(0x30, pki.oid("2.16.840.1.101.3.4.2.1"), b"\5\0")
    mgf = pki.tlv(0x30, pki.oid("1.2.840.113549.1.1.8"), sha)
    oaep = pki.tlv(
        0x30, pki.oid("1.2.840.113549.1.1.7"), pki.tlv(0x30, pki.tlv(0xA0, sha), pki.tlv(0xA1, mgf))
    )
    spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    name = pki.tlv(0x80, hashlib.sha256(spki).digest())
    recipient = pki.tlv(0x30, pki.number(2), name, oaep, pki.tlv(4, wrapped))
    aes = pki.tlv(0x30, pki.oid("2.16.840.1.101.3.4.1.42"), pki.tlv(4, iv))
    half = len(secret) // 32 * 16
    pieces = [pki.tlv(4, secret[:half]), pki.tlv(4, secret[half:])] if half else [pki.tlv(4, secret)]
    data = open_(0x30, pki.oid("1.2.840.113549.1.7.1"), aes, open_(0xA0, *pieces))
    enveloped = open_(0x30, pki.number(2), pki.tlv(0x31, recipient), data)
    return open_(0x30, pki.oid("1.2.840.113549.1.7.3"), open_(0xA0, enveloped))


@pytest.mark.parametrize(
    ("method", "signature"),
    [
        ("GET", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("POST", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
    ],
)
def test_requests_are_signed_as_aws_publishes(method: str, signature: str) -> None:
    """The cases "get-vanilla" and "post-vanilla" of AWS's test suite for Signature Version 4."""
    credentials = kms.Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
    at = datetime(2015, 8, 30, 12, 36, tzinfo=UTC)
    signed = kms.sign(method, "example.amazonaws.com", "/", {}, b"", credentials, "us-east-1", "service", at)
    assert signed["authorization"].endswith(f"SignedHeaders=host;x-amz-date, Signature={signature}")


KMS_HOST = "kms.eu-west-1.amazonaws.com"
KEY_ID = "arn:aws:kms:eu-west-1:1:key/2"
ACCESS, SECRET = "AKIDEXAMPLE", "a secret of ours"


class FakeKms:
    """What AWS does, under a root of ours: checks signature, context, document and PCRs, then encrypts to the
    document's key. `lie` changes the answer."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}
        self.lie: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.pcrs = PCR
        self.keys: list[bytes] = []

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        credentials = kms.Credentials(ACCESS, SECRET, headers.get("x-amz-security-token", ""))
        given = {name: headers[name] for name in ("content-type", "x-amz-target")}
        at = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        again = kms.sign(method, KMS_HOST, path, given, body, credentials, "eu-west-1", "kms", at)
        if again["authorization"] != headers["authorization"] or headers["host"] != KMS_HOST:
            return 400, {"__type": "InvalidSignatureException"}
        asked = json.loads(body)
        if asked["KeyId"] != KEY_ID or asked["EncryptionContext"] != {"purpose": "mimir storage key"}:
            return 400, {"__type": "InvalidCiphertextException"}
        recipient = asked["Recipient"]
        assert recipient["KeyEncryptionAlgorithm"] == "RSAES_OAEP_SHA_256"
        facts = nitro.verify(base64.b64decode(recipient["AttestationDocument"]), NOW, roots=AWS.roots)
        document = facts.document
        if any(document.pcrs[n] != value for n, value in self.pcrs.items()):
            return 400, {"__type": "AccessDeniedException", "message": "no policy allows it"}
        self.keys.append(document.public_key)
        answer: dict[str, Any] = {"KeyId": KEY_ID, "Plaintext": None}
        if headers["x-amz-target"] == "TrentService.GenerateDataKey":
            assert asked["KeySpec"] == "AES_256"
            blob = b"sealed" + os.urandom(16)
            self.blobs[blob] = os.urandom(32)
            answer["CiphertextBlob"] = base64.b64encode(blob).decode()
        else:
            blob = base64.b64decode(asked["CiphertextBlob"])
            if blob not in self.blobs:
                return 400, {"__type": "InvalidCiphertextException"}
        public: Any = load_der_public_key(document.public_key)
        answer["CiphertextForRecipient"] = base64.b64encode(envelope(public, self.blobs[blob])).decode()
        return 200, self.lie(answer)


@contextmanager
def https_server(
    host: str, answer: Callable[..., tuple[int, Any]]
) -> Iterator[tuple[Address, ssl.SSLContext]]:
    """A server of one function on loopback, and what a client must trust to believe its name."""
    root_key, own_key = pki.ec_key("web root"), pki.ec_key("web")
    root = pki.certificate("web root", root_key, None, root_key, ca=True, days=(-1, 36500))
    names = x509.SubjectAlternativeName([x509.DNSName(host)])
    own = pki.certificate(
        host, own_key, root, root_key, ca=False, serial=7, days=(-1, 36500), extensions=[(names, False)]
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, found = answer(self.command, self.path, self.headers, body)
            raw = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_PUT = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if host != "plain":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pem = own.public_bytes(Encoding.PEM) + own_key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"mm-web-{os.getpid()}-{threading.get_ident()}.pem"
        path.touch(mode=0o600)
        path.write_bytes(pem)
        context.load_cert_chain(path)
        path.unlink()
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        trust = ssl.create_default_context(cadata=root.public_bytes(Encoding.PEM).decode())
        yield Address("127.0.0.1", server.server_address[1]), trust
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def document(user_data: bytes, nonce: bytes, public_key: bytes) -> bytes:
    return AWS.document(user_data=user_data, nonce=nonce, public_key=public_key)


@contextmanager
def kms_source(
    tmp: Path, fake: FakeKms, monkeypatch: pytest.MonkeyPatch, ask: Any = document
) -> Iterator[kms.KmsSource]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    with https_server(KMS_HOST, fake.answer) as (place, trust):
        settings_ = config.KmsKey("eu-west-1", KEY_ID, endpoint=place)
        yield kms.KmsSource(tmp / "sealed", file.FileCounter(tmp / "counter"), settings_, ask, trust)


def test_kms_gives_the_key_to_an_attested_enclave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKms()
    with kms_source(tmp_path, fake, monkeypatch) as source:
        trio.run(source.create)
        key = reveal(trio.run(source.obtain))
        assert [key] == list(fake.blobs.values())
        assert (tmp_path / "sealed").read_bytes() in fake.blobs
        with pytest.raises(BadInput, match="exists already"):
            trio.run(source.create)
        assert len(set(fake.keys)) == 1
    with kms_source(tmp_path, fake, monkeypatch) as source:
        assert reveal(trio.run(source.obtain)) == key
        assert len(set(fake.keys)) == 2, "another process, another key"
        (tmp_path / "sealed").write_bytes(b"other")
        with pytest.raises(KeyRefused, match="InvalidCiphertext"):
            trio.run(source.obtain)


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        ({"Plaintext": base64.b64encode(KEY).decode()}, "plaintext"),
        ({"Plaintext": "", "CiphertextForRecipient": None}, "plaintext"),
        ({"CiphertextForRecipient": None}, "no usable CiphertextForRecipient"),
        ({"CiphertextForRecipient": "!"}, "no usable"),
        ({"KeyId": "another"}, "another key"),
    ],
)
def test_an_answer_that_ignored_the_evidence_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any], complaint: str
) -> None:
    fake = FakeKms()
    with kms_source(tmp_path, fake, monkeypatch) as source:
        trio.run(source.create)
        fake.lie = lambda answer: answer | lie
        with pytest.raises(KeyRefused, match=complaint):
            trio.run(source.obtain)


def test_kms_refuses_another_enclave_another_signer_and_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeKms()
    with kms_source(tmp_path, fake, monkeypatch) as source:
        trio.run(source.create)
        fake.pcrs = {0: b"\x09" * 48}
        with pytest.raises(KeyRefused, match="AccessDenied"):
            trio.run(source.obtain)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(KeyRefused, match="InvalidSignature"):
            trio.run(source.obtain)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(EnvironmentMissing, match="AWS_SECRET_ACCESS_KEY"):
            trio.run(source.obtain)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        source._tls = ssl.create_default_context()
        with pytest.raises(EnvironmentMissing, match=r"certificate|CERTIFICATE"):
            trio.run(source.obtain)


def test_credentials_come_from_the_metadata_service_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if method == "PUT" and path == "/latest/api/token":
            assert headers["x-aws-ec2-metadata-token-ttl-seconds"] == "60"
            return 200, b"TOKEN"
        if headers.get("x-aws-ec2-metadata-token") != "TOKEN":
            return 401, b""
        if path.endswith("/security-credentials/"):
            return 200, b"role\n"
        assert path.endswith("/security-credentials/role")
        return 200, {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c"}

    with https_server("plain", answer) as (place, _):
        found = trio.run(kms.find_credentials, place)
    assert (found.access, found.secret, found.token) == ("a", "b", "c")
    assert "secret" not in repr(found).lower() and " b" not in repr(found)


# --- OCI Vault ---------------------------------------------------------------------------------------------

# Key, request and signature that Oracle publishes to try an implementation with.
OCI_KEY = """-----BEGIN RSA PRIVATE KEY-----
MIICXgIBAAKBgQDCFENGw33yGihy92pDjZQhl0C36rPJj+CvfSC8+q28hxA161QF
NUd13wuCTUcq0Qd2qsBe/2hFyc2DCJJg0h1L78+6Z4UMR7EOcpfdUE9Hf3m/hs+F
UR45uBJeDK1HSFHD8bHKD6kv8FPGfJTotc+2xjJwoYi+1hqp1fIekaxsyQIDAQAB
AoGBAJR8ZkCUvx5kzv+utdl7T5MnordT1TvoXXJGXK7ZZ+UuvMNUCdN2QPc4sBiA
QWvLw1cSKt5DsKZ8UETpYPy8pPYnnDEz2dDYiaew9+xEpubyeW2oH4Zx71wqBtOK
kqwrXa/pzdpiucRRjk6vE6YY7EBBs/g7uanVpGibOVAEsqH1AkEA7DkjVH28WDUg
f1nqvfn2Kj6CT7nIcE3jGJsZZ7zlZmBmHFDONMLUrXR/Zm3pR5m0tCmBqa5RK95u
412jt1dPIwJBANJT3v8pnkth48bQo/fKel6uEYyboRtA5/uHuHkZ6FQF7OUkGogc
mSJluOdc5t6hI1VsLn0QZEjQZMEOWr+wKSMCQQCC4kXJEsHAve77oP6HtG/IiEn7
kpyUXRNvFsDE0czpJJBvL/aRFUJxuRK91jhjC68sA7NsKMGg5OXb5I5Jj36xAkEA
gIT7aFOYBFwGgQAQkWNKLvySgKbAZRTeLBacpHMuQdl1DfdntvAyqpAZ0lY0RKmW
G6aFKaqQfOXKCyWoUiVknQJAXrlgySFci/2ueKlIE1QqIiLSZ8V8OlpFLRnb1pzI
7U1yQXnTAEFYM560yJlzUpOb1V4cScGd365tiSMvxLOvTA==
-----END RSA PRIVATE KEY-----
"""
OCI_BODY = """{
    "compartmentId": "ocid1.compartment.oc1..aaaaaaaam3we6vgnherjq5q2idnccdflvjsnog7mlr6rtdb25gilchfeyjxa",
    "instanceId": "ocid1.instance.oc1.phx.abuw4ljrlsfiqw6vzzxb43vyypt4pkodawglp3wqxjqofakrwvou52gb6s5a",
    "volumeId": "ocid1.volume.oc1.phx.abyhqljrgvttnlx73nmrwfaux7kcvzfs3s66izvxf2h4lgvyndsdsnoiwr5q"
}"""
OCI_SIGNATURE = (
    "Mje8vIDPlwIHmD/cTDwRxE7HaAvBg16JnVcsuqaNRim23fFPgQfLoOOxae6WqKb1uPjYEl0qIdazWaBy/Ml8DRhqlocMwoSXv0fbukP8"
    "J5N80LCmzT/FFBvIvTB91XuXI3hYfP9Zt1l7S6ieVadHUfqBedWH0itrtPJBgKmrWso="
)


def test_requests_are_signed_as_oracle_publishes() -> None:
    private = load_pem_private_key(OCI_KEY.encode(), None)
    assert isinstance(private, rsa.RSAPrivateKey)
    at = datetime(2014, 1, 5, 21, 31, 40, tzinfo=UTC)
    body, host = OCI_BODY.encode(), "iaas.us-phoenix-1.oraclecloud.com"
    signed = oci.sign("post", host, "/20160918/volumeAttachments", body, "t/u/f", private, at)
    assert signed["content-length"] == "316"
    assert signed["x-content-sha256"] == "V9Z20UJTvkvpJ50flBzKE32+6m2zJjweHpDMX/U4Uy0="
    # Oracle's request says Thursday, which that day was not; the date is part of what is signed.
    assert signed["date"] == "Sun, 05 Jan 2014 21:31:40 GMT"
    thursday = _Thursday(2014, 1, 5, 21, 31, 40, tzinfo=UTC)
    signed = oci.sign("post", host, "/20160918/volumeAttachments", body, "t/u/f", private, thursday)
    assert f'signature="{OCI_SIGNATURE}"' in signed["authorization"]


class _Thursday(datetime):
    def timetuple(self) -> Any:
        found = super().timetuple()
        return type(found)((*found[:6], 3, *found[7:]))


def test_oci_gives_the_key_to_the_holder_of_the_api_key(tmp_path: Path) -> None:
    wrapped: dict[str, bytes] = {}
    broken: list[Any] = []

    def answer(method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if broken:
            return broken[0]
        fields = dict(
            part.split("=", 1) for part in headers["authorization"].removeprefix("Signature ").split(",")
        )
        names = fields["headers"].strip('"').split(" ")
        lines = [
            f"{name}: {f'post {path}' if name == '(request-target)' else headers[name]}" for name in names
        ]
        signature = base64.b64decode(fields["signature"].strip('"'))
        pki.rsa_key("api").public_key().verify(
            signature, "\n".join(lines).encode(), padding.PKCS1v15(), hashes.SHA256()
        )
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        assert headers["x-content-sha256"] == digest and fields["keyId"] == '"t/u/f"'
        asked = json.loads(body)
        assert asked["keyId"] == "ocid1.key"
        if path == "/20180608/generateDataEncryptionKey":
            assert asked["includePlaintextKey"] is False
            wrapped[f"Q{len(wrapped)}"] = os.urandom(32)
            return 200, {"ciphertext": list(wrapped)[-1]}
        assert path == "/20180608/decrypt"
        found = wrapped.get(asked["ciphertext"])
        if found is None:
            return 404, {"code": "NotAuthorizedOrNotFound", "message": "no"}
        return 200, {"plaintext": base64.b64encode(found).decode()}

    api = tmp_path / "api.pem"
    api.touch(mode=0o600)
    api.write_bytes(pki.rsa_key("api").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with https_server("localhost", answer) as (place, trust):
        settings_ = config.OciKey(Address("localhost", place.port), "ocid1.key", "t", "u", "f", api)
        source = oci.OciSource(tmp_path / "sealed", file.FileCounter(tmp_path / "counter"), settings_, trust)
        trio.run(source.create)
        assert reveal(trio.run(source.obtain)) == next(iter(wrapped.values()))
        assert "nothing is attested" in source.protection
        (tmp_path / "sealed").write_text("Q9")
        with pytest.raises(KeyRefused, match="NotAuthorized"):
            trio.run(source.obtain)
        for bad in ((200, {}), (200, {"plaintext": "AAAA"}), (200, b"no json"), (200, [])):
            broken[:] = [bad]
            with pytest.raises(KeyRefused):
                trio.run(source.obtain)
        api.chmod(0o644)
        with pytest.raises(BadInput, match="chmod 600"):
            trio.run(source.obtain)


def test_a_key_fetched_apart_is_the_key_and_its_refusal_the_refusal(tmp_path: Path) -> None:
    """By a child process: this one opens nothing of what fetching needs."""
    settings = config.Keys(source="file").placed(tmp_path)
    assert settings.file is not None
    with pytest.raises(keys.NotObtained, match="mimir keygen --kind storage") as refused:
        keys.obtain_apart(settings)
    assert refused.value.exit_code == BadInput.exit_code
    fresh = StorageKey.random()
    file.save(settings.file, fresh)
    with fresh.reveal_to_kernel() as ours, keys.obtain_apart(settings).reveal_to_kernel() as theirs:
        assert bytes(ours) == bytes(theirs)
