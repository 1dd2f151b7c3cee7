"""What makes evidence: a real software TPM, and what the kernel's other interfaces would give, played here.

No confidential hardware is at hand. configfs-tsm and /dev/nsm are fakes of this file; what they give is
recorded evidence of real machines, or evidence of our own authorities (attest_pki.py). Every envelope goes
through the verifier that admits peers.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attest_pki as pki
import cbor2
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from software_tpm import SCRIPT, SoftwareTpm, software_tpm
from trio.testing import MockClock

import mimir
from mimir import config, doctor
from mimir.__main__ import main
from mimir.attest import appraisal, policy, snp, tpm
from mimir.attest.appraisal import Anchors, appraise
from mimir.attest.collateral import AUTHORITIES, Collateral, Item
from mimir.attest.evidence import Claims, Envelope
from mimir.attest.trail import Trail
from mimir.attesters import measurement, nsm, open_attester, tpm2, tsm
from mimir.attesters import tpm as quoting
from mimir.attesters.enrolment import enrol
from mimir.errors import (
    AttestationError,
    BadInput,
    ConfigError,
    DeviceError,
    EnvironmentMissing,
    LocalError,
    MimirError,
)

ROOT = Path(mimir.__file__).parent.parent
CONFIG = b"\4" * 32
NOW = datetime.now(UTC).replace(microsecond=0)
AMD, INTEL, AWS = pki.Amd.make(), pki.Intel.make(), pki.Aws.make()
HEAD = 'format = 1\nname = "mesh"\nversion = 1\nenvironment = "{}"\nnot_after = 2099-01-01T00:00:00Z\n'


@pytest.fixture(scope="module")
def chip() -> Iterator[SoftwareTpm]:
    with software_tpm() as made:
        yield made


@pytest.fixture(scope="module")
def other_chip() -> Iterator[SoftwareTpm]:
    with software_tpm() as made:
        yield made


def claims_for(wanted: policy.Policy | None = None, now: datetime = NOW, **changes: Any) -> Claims:
    at = int(now.timestamp())
    settings: dict[str, Any] = {
        "role": "party",
        "node": "alpha",
        "identity": b"\1" * 32,
        "tunnel": b"\2" * 32,
        "kem": b"\6" * 32,
        "nonce": os.urandom(32),
        "nonce_source": "beta",
        "not_before": at - 60,
        "not_after": at + 3600,
        "policy": wanted.digest() if wanted else bytes(32),
        "channel": b"\5" * 32,
        "config": CONFIG,
    }
    return Claims(**settings | changes)


def policy_of(entry: str, environment: str = "simulation", tables: str = "") -> policy.Policy:
    text = HEAD.format(environment) + tables + entry
    return policy.parse(tomllib.loads(text), Path("policy.toml").absolute())


def attest(chip: SoftwareTpm, claims: Claims) -> Envelope:
    async def work() -> Envelope:
        async with open_attester(config.Attester("swtpm", chip.socket)) as attester:
            assert attester.kind == "swtpm"
            return await attester.attest(claims)

    return trio.run(work)


def on(chip: SoftwareTpm, work: Callable[[tpm2.Tpm], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with tpm2.open_tpm(chip.socket) as opened:
            return await work(opened)

    return trio.run(run)


def enrolled(chip: SoftwareTpm) -> policy.Policy:
    """The policy that wants this TPM, made the way owners make it."""
    entry = enrol(attest(chip, claims_for()), "alpha", configured=True).entry
    return policy_of(entry)


def judge(
    raw: bytes, wanted: policy.Policy, expected: Claims, now: datetime = NOW, **more: Any
) -> appraisal.Verdict:
    return appraise(raw, wanted, more.pop("collateral", Collateral()), expected, now, **more)


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(AttestationError) as caught:
        work()
    return caught.value.step


# --- a software TPM's evidence -----------------------------------------------------------------------------


def test_a_software_tpm_is_admitted_by_a_policy_of_simulations(chip: SoftwareTpm) -> None:
    wanted = enrolled(chip)
    claims = claims_for(wanted)
    verdict = judge(attest(chip, claims).encode(), wanted, claims)
    assert verdict.kind == "swtpm" and verdict.simulated and verdict.entry == "alpha"
    names = [each.name for each in verdict.steps]
    assert "policy.pcr16" in names and "claims.binding" in names


def test_its_evidence_serves_its_claims_alone(chip: SoftwareTpm) -> None:
    """Another nonce (a replay), another tunnel key (a splice), and every other claim; carried or expected."""
    wanted = enrolled(chip)
    claims = claims_for(wanted)
    envelope = attest(chip, claims)
    texts = {"role": "client", "node": "beta", "nonce_source": "gamma"}
    for each in fields(Claims):
        if each.name in ("not_before", "not_after"):
            continue
        other = replace(claims, **{each.name: texts.get(each.name, b"\x77" * 32)})
        step = refused(lambda o=other: judge(envelope.encode(), wanted, o))  # type: ignore[misc]
        assert step == f"claims.{each.name}"
        if each.name != "policy":
            spliced = replace(envelope, claims=other.encode()).encode()
            step = refused(lambda s=spliced, o=other: judge(s, wanted, o))  # type: ignore[misc]
            assert step == "claims.binding"


def test_other_code_and_another_configuration_have_another_register(chip: SoftwareTpm) -> None:
    wanted = enrolled(chip)
    claims = claims_for(wanted)

    async def make(code: bytes, claims: Claims) -> bytes:
        return (await quoting.TpmAttester("swtpm", chip.socket, code).attest(claims)).encode()

    raw = trio.run(make, b"\7" * 32, claims)
    assert refused(lambda: judge(raw, wanted, claims)) == "policy.pcr16"
    other = replace(claims, config=b"\x77" * 32)
    raw = trio.run(make, measurement.code_digest(), other)
    assert refused(lambda: judge(raw, wanted, claims)) == "claims.config"
    assert refused(lambda: judge(raw, wanted, other)) == "policy.pcr16"


def test_a_changed_register_and_another_tpm_are_refused(chip: SoftwareTpm, other_chip: SoftwareTpm) -> None:
    text = enrol(attest(chip, claims_for()), "alpha", configured=True).entry
    wanted = policy_of(text.replace('"4" =', f'"23" = ["{"00" * 32}"], "4" ='))
    claims = claims_for(wanted)
    judge(attest(chip, claims).encode(), wanted, claims)
    on(chip, lambda t: t.extend_pcr(23, b"\1" * 32))
    raw = attest(chip, claims).encode()
    on(chip, lambda t: t.reset_pcr(23))
    assert refused(lambda: judge(raw, wanted, claims)) == "policy.pcr23"
    raw = attest(other_chip, claims).encode()
    assert refused(lambda: judge(raw, wanted, claims)) == "policy.ak"


def test_a_policy_for_production_wants_no_software_tpm(chip: SoftwareTpm) -> None:
    """Neither by its kind, nor by another name for it: the key is of no one that was enrolled."""
    entry = enrol(attest(chip, claims_for()), "alpha", configured=True).entry
    with pytest.raises(ConfigError, match="policy for production cannot name it"):
        policy_of(entry, "production")
    other = entry.replace('kind = "swtpm"', 'kind = "tpm"').replace("000b", "000c", 1)
    with pytest.raises(ConfigError):
        policy_of(other, "simulation")
    name = tomllib.loads(entry)["allow"][0]["ak_names"][0]
    wanted = policy_of(entry.replace('"swtpm"', '"tpm"').replace(name, "000b" + "77" * 32), "production")
    claims = claims_for(wanted)
    envelope = attest(chip, claims)
    assert refused(lambda: judge(envelope.encode(), wanted, claims)) == "policy.entry"
    relabelled = replace(envelope, kind="tpm").encode()
    assert refused(lambda: judge(relabelled, wanted, claims)) == "policy.ak"


def test_the_key_is_the_same_after_a_restart_and_the_code_is_measured_anew() -> None:
    with software_tpm() as own:
        wanted = enrolled(own)
        own.restart()
        claims = claims_for(wanted)
        judge(attest(own, claims).encode(), wanted, claims)


def test_losses_of_power_do_not_lock_the_key_out() -> None:
    with software_tpm() as own:
        for count in range(5):  # without _NO_LOCKOUT it is over after three
            on(own, lambda opened, count=count: opened.quote(bytes([count + 1]), {0}))
            own.restart()


def test_a_register_that_another_program_changes_is_quoted_again(
    chip: SoftwareTpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls, limit = tpm2.Tpm.read_pcrs, 0, 1
    index = 23

    async def disturbed(self: tpm2.Tpm, chosen: Any) -> dict[int, bytes]:
        nonlocal calls
        calls += 1
        if calls <= limit:
            await self.extend_pcr(index, b"\1" * 32)  # after the quote
        return await read(self, chosen)

    monkeypatch.setattr(tpm2.Tpm, "read_pcrs", disturbed)
    for each in (23, measurement.CODE_PCR):
        index, calls = each, 0
        attest(chip, claims_for())
        assert calls == 2
    monkeypatch.undo()
    quote, calls = tpm2.Tpm.quote, 0

    async def overtaken(self: tpm2.Tpm, *given: Any) -> tpm2.Quote:
        nonlocal calls
        calls += 1
        if calls == 1:
            await self.extend_pcr(measurement.CODE_PCR, b"\1" * 32)  # before the quote, which then holds
        return await quote(self, *given)

    monkeypatch.setattr(tpm2.Tpm, "quote", overtaken)
    claims = claims_for()
    pcrs = attest(chip, claims).parts()["pcrs"]["sha256"]
    assert calls == 2 and pcrs[16] == measurement.code_pcr(measurement.code_digest(), claims.config)
    monkeypatch.undo()
    monkeypatch.setattr(tpm2.Tpm, "read_pcrs", disturbed)
    calls, limit = 0, 1000
    with pytest.raises(DeviceError, match="change faster"):
        attest(chip, claims_for())
    assert calls == quoting.ATTEMPTS
    monkeypatch.undo()
    on(chip, lambda t: t.reset_pcr(23))


def test_an_attester_gives_out_no_quote_that_does_not_verify(
    chip: SoftwareTpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    quote = tpm2.Tpm.quote

    async def broken(self: tpm2.Tpm, *given: Any) -> tpm2.Quote:
        good = await quote(self, *given)
        return replace(good, signature=good.signature[:-1] + bytes((good.signature[-1] ^ 1,)))

    async def for_others(self: tpm2.Tpm, data: bytes, *given: Any) -> tpm2.Quote:
        return await quote(self, bytes(32), *given)

    for bad, step in ((broken, "signature"), (for_others, "binding")):
        monkeypatch.setattr(tpm2.Tpm, "quote", bad)
        with pytest.raises(DeviceError, match=step):
            attest(chip, claims_for())


def test_several_tasks_may_ask_at_once(chip: SoftwareTpm) -> None:
    wanted = enrolled(chip)

    async def work() -> None:
        async with open_attester(config.Attester("swtpm", chip.socket)) as attester:

            async def one() -> None:
                claims = claims_for(wanted)
                judge((await attester.attest(claims)).encode(), wanted, claims)

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(one)

    trio.run(work)


def test_a_hardware_kind_needs_a_device(chip: SoftwareTpm, tmp_path: Path) -> None:
    async def work(settings: config.Attester) -> None:
        async with open_attester(settings):
            pass

    for settings, error, what in (
        (config.Attester("tpm", chip.socket), BadInput, 'its kind is "swtpm"'),
        (config.Attester("tpm", config.Address("127.0.0.1", 1)), BadInput, 'its kind is "swtpm"'),
        (config.Attester("tpm", tmp_path / "none"), EnvironmentMissing, "No such file"),
        (config.Attester("swtpm", tmp_path / "none"), EnvironmentMissing, "No such file"),
        (config.Attester("swtpm", tmp_path), BadInput, "neither a character device nor a socket"),
        (config.Attester("swtpm"), ConfigError, "no usual place"),
        (config.Attester("swtpm", Path("/dev/null")), DeviceError, "GetCapability"),
        (config.Attester("snp", config.Address("127.0.0.1", 1)), BadInput, "which has a path"),
        (config.Attester("nitro", tmp_path / "none"), EnvironmentMissing, "inside Nitro enclaves"),
        (config.Attester("snp", tmp_path / "none"), EnvironmentMissing, "CONFIG_TSM_REPORTS"),
    ):
        with pytest.raises(error, match=what):
            trio.run(work, settings)


# --- a vTPM that a cloud certifies -------------------------------------------------------------------------


async def define(opened: tpm2.Tpm, index: int, content: bytes) -> None:
    """Write an index, as a cloud's firmware does before the guest starts. Not what a party ever does."""
    attributes = 1 << 1 | 1 << 2 | 1 << 17 | 1 << 18 | 1 << 25
    area = pki.big(index, 4) + pki.big(0xB, 2) + pki.big(attributes, 4) + pki.sized(b"")
    area += pki.big(len(content), 2)
    await opened._run(0x12A, (0x40000001,), pki.sized(b"") + pki.sized(area), auth=0x40000009)
    tpm2._NAMES[0x137] = "NV_Write"
    for at in range(0, len(content), 256):
        piece = pki.sized(content[at : at + 256]) + pki.big(at, 2)
        await opened._run(0x137, (index, index), piece, auth=0x40000009)


def test_a_certified_vtpm_is_admitted_by_its_root() -> None:
    """Google's arrangement: template and certificate of the key in the TPM's memory."""
    template = tpm2.AK_TEMPLATE.replace(pki.hashlib.sha256(b"mimir attestation key").digest(), b"\x55" * 32)
    top = pki.ec_key("vtpm root")
    root = pki.certificate("vTPM root", top, None, top, ca=True)
    digest = root.fingerprint(pki.hashes.SHA256()).hex()
    anchors = Anchors(tpm={digest: tpm.Root("test", frozenset(), False)})
    store = Collateral({AUTHORITIES: Item(root.public_bytes(Encoding.PEM), NOW)})
    with software_tpm() as own:
        public = on(own, lambda t: t.attestation_public(template))
        key = tpm.parse_public(public, Trail("test")).public
        assert isinstance(key, ec.EllipticCurvePublicKey)
        leaf = pki.certificate("AK", SimpleNamespace(public_key=lambda: key), root, top, ca=False)
        der = leaf.public_bytes(Encoding.DER)
        on(own, lambda t: define(t, 0x01C10003, template))
        on(own, lambda t: define(t, 0x01C10002, der + bytes(100)))
        on(own, lambda t: define(t, 0x01C00002, der + b"\xff" * 700))
        attester = quoting.TpmAttester("tpm", own.socket, measurement.code_digest())
        entry = f'[[allow]]\nid = "g"\nkind = "tpm"\nak_roots = ["{digest}"]\n'
        entry += f'pcrs = {{ "0" = ["{"00" * 32}"] }}\n'
        wanted = policy_of(entry, "production")
        claims = claims_for(wanted, pki.NOW)
        envelope = trio.run(attester.attest, claims)
        verdict = judge(envelope.encode(), wanted, claims, pki.NOW, collateral=store, anchors=anchors)
        assert verdict.kind == "tpm" and not verdict.simulated
        # Endorsement certificates are found, and read without their padding.
        (found,) = trio.run(attester.endorsements)
        assert found.index == 0x01C00002 and found.certificate == der
        assert found.sha256 == pki.hashlib.sha256(der).hexdigest()
        # A simulation takes no certificate: it is believed by its name or not at all.
        assert attest(own, claims).endorsements == {}

    with software_tpm() as own:  # the same certificate over another TPM's key
        on(own, lambda t: define(t, 0x01C10003, template))
        on(own, lambda t: define(t, 0x01C10002, der))
        attester = quoting.TpmAttester("tpm", own.socket, bytes(32))
        with pytest.raises(DeviceError, match="certificate"):
            trio.run(attester.attest, claims_for())


def test_the_event_log_is_that_of_this_tpm_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "tpm3").mkdir()
    at = tmp_path / "tpm3" / "binary_bios_measurements"
    at.write_bytes(b"log")

    def log(kind: str, device: str) -> bytes:
        return quoting.TpmAttester(kind, Path(device), bytes(32), tmp_path)._log()

    assert log("tpm", "/dev/tpmrm3") == log("tpm", "/dev/tpm3") == b"log"
    assert log("swtpm", "/dev/tpmrm3") == log("tpm", "/dev/tpmrm0") == log("tpm", "/run/socket") == b""
    at.write_bytes(bytes(tpm.MAX_LOG + 1))
    assert log("tpm", "/dev/tpmrm3") == b""


# --- the code's digest -------------------------------------------------------------------------------------


def test_the_code_digest_is_of_every_module_and_of_nothing_else(tmp_path: Path) -> None:
    roots = {name: tmp_path / "copy" / name for name in measurement.PACKAGES}
    for name, root in roots.items():
        shutil.copytree(ROOT / name, root, ignore=shutil.ignore_patterns("__pycache__"))
    first = measurement.code_digest(roots)
    assert first == measurement.code_digest()  # wherever it lies, and with bytecode beside it
    (roots["mimir"] / "__pycache__").mkdir()
    (roots["mimir"] / "__pycache__" / "config.cpython-311.pyc").write_bytes(b"x")
    (roots["mimir"] / "notes.txt").write_text("x")
    assert measurement.code_digest(roots) == first
    native = next((roots["mimir"] / "kernels").glob("*.so"))
    for path in (roots["mimir"] / "attest" / "snp.py", roots["wg"] / "keys.py", native):
        good = path.read_bytes()
        path.write_bytes(good + b"\n")
        assert measurement.code_digest(roots) != first, path
        path.write_bytes(good)
    added = roots["mimir"] / "config.abi3.so"  # which would be imported before config.py
    added.write_bytes(b"")
    assert measurement.code_digest(roots) != first
    added.unlink()
    (roots["wg"] / "keys.py").rename(roots["wg"] / "keyt.py")  # the same content in the same order
    assert measurement.code_digest(roots) != first
    with pytest.raises(LocalError, match="no module"):
        measurement.code_digest({"mimir": tmp_path / "copy"} | {"wg": tmp_path / "nothing"})


def test_the_register_is_what_a_policy_is_told(chip: SoftwareTpm) -> None:
    claims = claims_for()
    pcrs = attest(chip, claims).parts()["pcrs"]["sha256"]
    assert pcrs[16] == measurement.code_pcr(measurement.code_digest(), claims.config)
    assert pcrs[16] == on(chip, lambda t: t.read_pcrs([16]))[16]
    assert set(pcrs) == set(range(24)) - {10}


# --- sealing and counting ----------------------------------------------------------------------------------


def test_a_secret_is_given_back_to_the_same_registers_of_the_same_tpm(
    chip: SoftwareTpm, other_chip: SoftwareTpm
) -> None:
    secret = os.urandom(32)

    async def work(opened: tpm2.Tpm) -> bytes:
        now = await opened.read_pcrs([0, 7, 23])
        blob = await opened.seal(now, bytearray(secret))
        assert secret not in blob
        got = await opened.unseal(blob)
        assert type(got) is bytearray and got == secret
        # To values that are not there yet: those of the next release of the boot chain.
        soon = {23: pki.hashlib.sha256(bytes(32) + b"\1" * 32).digest()}
        later = await opened.seal(soon, b"x" * 128)
        with pytest.raises(tpm2.PcrMismatch, match="PCRs 23 are not"):
            await opened.unseal(later)
        await opened.extend_pcr(23, b"\1" * 32)
        assert await opened.unseal(later) == b"x" * 128
        with pytest.raises(tpm2.PcrMismatch, match="PCRs 0, 7, 23"):
            await opened.unseal(blob)
        await opened.reset_pcr(23)
        assert await opened.unseal(blob) == secret
        assert await opened._handles(0x80000000, True) == await opened._handles(0x02000000, True) == []
        return blob

    blob = on(chip, work)
    with pytest.raises(tpm2.TpmError, match="damaged or of another TPM") as caught:
        on(other_chip, lambda t: t.unseal(blob))
    assert caught.value.code == tpm2.BAD_INTEGRITY

    async def damaged(opened: tpm2.Tpm) -> None:
        for at in range(0, len(blob), 3):
            bad = bytearray(blob)
            bad[at] ^= 0x10
            with pytest.raises((tpm2.TpmError, BadInput)):
                await opened.unseal(bytes(bad))
        for cut in (blob[:-1], blob + b"\0", b"", blob[:18]):
            with pytest.raises(BadInput, match="sealed blob"):
                await opened.unseal(cut)
        assert await opened.unseal(blob) == secret

    on(chip, damaged)


def test_a_password_opens_no_sealed_secret(chip: SoftwareTpm) -> None:
    """The registers are the only way in: an empty password is anybody's."""

    async def work(opened: tpm2.Tpm) -> None:
        _, private, public = tpm2._parse_blob(await opened.seal({0: bytes(32)}, b"secret"))
        async with opened._primary(tpm2._OWNER, tpm2._STORAGE_TEMPLATE) as (parent, _):
            given = pki.sized(private) + pki.sized(public)
            handle, _, _ = await opened._run(tpm2._LOAD, (parent,), given, auth=tpm2._PASSWORD, makes=True)
            async with opened._loaded(handle):
                with pytest.raises(tpm2.TpmError, match="Unseal"):
                    await opened._run(tpm2._UNSEAL, (handle,), auth=tpm2._PASSWORD)

    on(chip, work)


def test_a_listener_between_sees_no_secret_and_changes_nothing(chip: SoftwareTpm) -> None:
    """A probe on the bus of a TPM on a board: what passes is encrypted, and what was changed is refused."""
    secret = os.urandom(32)

    async def work(alter: Callable[[int, bytearray], Any]) -> bytes:
        channel, _ = await tpm2._connect(chip.socket)
        recorder = Recorder(channel, alter)
        try:
            opened = tpm2.Tpm(recorder, "it")
            assert await opened.unseal(await opened.seal({0: bytes(32)}, secret)) == secret
            return recorder.passed
        finally:
            channel.close()

    passed = trio.run(work, lambda code, message: None)
    assert secret not in passed and secret[:8] not in passed and len(passed) > 2000

    def flip(wanted: int, at: int) -> Callable[[int, bytearray], None]:
        def alter(code: int, message: bytearray) -> None:
            if code == wanted:
                message[at] ^= 1

        return alter

    create, unseal = tpm2._CREATE, tpm2._UNSEAL
    for code, at, what in (
        (create, 100, "Create"),  # in the secret
        (create, -1, "Create"),  # behind it
        (-create, 20, "altered on its way"),
        (-create, -1, "altered on its way"),
        (-unseal, 20, "altered on its way"),  # in the secret
        (-unseal, -40, "altered on its way"),  # in the nonce
        (-unseal, -35, "altered on its way"),  # the attributes: whether the answer is encrypted
        (-unseal, -1, "altered on its way"),
    ):
        with pytest.raises(tpm2.TpmError, match=what):
            trio.run(work, flip(code, at))


def test_sealing_is_to_something(chip: SoftwareTpm) -> None:
    for pcrs, secret in (({}, b"x"), ({24: bytes(32)}, b"x"), ({0: b"x"}, b"x"), ({0: bytes(32)}, b"")):
        with pytest.raises(LocalError):
            on(chip, lambda t, p=pcrs, s=secret: t.seal(p, s))  # type: ignore[misc]
    with pytest.raises(LocalError):
        on(chip, lambda t: t.seal({0: bytes(32)}, bytes(129)))


def test_a_counter_never_goes_back_and_secrets_outlive_a_restart() -> None:
    with software_tpm() as own:

        async def first(opened: tpm2.Tpm) -> tuple[int, bytes]:
            with pytest.raises(tpm2.TpmError, match="holds no counter"):
                await opened.counter_read()
            await opened.counter_define()
            one = await opened.counter_read()
            await opened.counter_define()
            assert await opened.counter_read() == one
            assert await opened.counter_increment() == one + 1
            return one, await opened.seal(await opened.read_pcrs([0]), b"kept")

        one, blob = on(own, first)
        own.restart()

        async def second(opened: tpm2.Tpm) -> None:
            assert await opened.counter_read() == one + 1
            assert await opened.unseal(blob) == b"kept"
            assert await opened.counter_increment() == one + 2
            tpm2._NAMES[0x122] = "NV_UndefineSpace"  # what somebody who would turn it back might try
            await opened._run(0x122, (0x40000001, tpm2.COUNTER), auth=0x40000009)
            await opened.counter_define()
            assert await opened.counter_read() > one + 2
            await define(opened, tpm2.COUNTER + 1, bytes(8))
            with pytest.raises(tpm2.TpmError, match="used for something else"):
                await opened.counter_define(tpm2.COUNTER + 1)

        on(own, second)


# --- nothing stays loaded ----------------------------------------------------------------------------------


def test_what_fails_leaves_nothing_behind_and_a_killed_process_little(chip: SoftwareTpm) -> None:
    async def fail(opened: tpm2.Tpm) -> None:
        with pytest.raises(tpm2.TpmError, match="Quote"):
            await opened.quote(b"x", [0], tpm2._STORAGE_TEMPLATE)  # a key that does not sign
        assert await opened._handles(0x80000000, True) == []
        assert len(await opened.get_random(32)) == 32
        with pytest.raises(LocalError):
            await opened.get_random(33)
        # As if killed now: an object and a session stay loaded, more of them than there is room for.
        for _ in range(3):
            given = pki.sized(pki.sized(b"") + pki.sized(b"")) + pki.sized(tpm2.AK_TEMPLATE)
            given += pki.sized(b"") + pki.big(0, 4)
            await opened._run(0x131, (0x4000000B,), given, auth=0x40000009, makes=True)
            start = pki.sized(bytes(32)) + pki.sized(b"") + b"\1" + pki.big(0x10, 2) + pki.big(0xB, 2)
            await opened._run(0x176, (0x40000007, 0x40000007), start, makes=True)
        with pytest.raises(tpm2.TpmError, match="no room"):
            await opened.quote(b"x", [0])

    on(chip, fail)
    blob = on(chip, lambda t: t.seal({0: bytes(32)}, b"x"))
    assert on(chip, lambda t: t.unseal(blob)) == b"x"


class Scripted:
    """Answers by a function; `asked` are the commands."""

    def __init__(self, answer: Callable[[bytes], Any]) -> None:
        self.answer, self.asked = answer, []

    async def exchange(self, command: bytearray) -> bytearray:
        self.asked.append(bytes(command))
        found = self.answer(bytes(command))
        return bytearray(await found if hasattr(found, "__await__") else found)

    def close(self) -> None:
        pass


def code_of(command: bytes | bytearray) -> int:
    return int.from_bytes(command[6:10], "big")


GOOD_RANDOM = bytes.fromhex("8001 00000010 00000000 0004 01020304")


def test_a_busy_tpm_is_asked_again_and_not_for_ever() -> None:
    busy = bytes.fromhex("8001 0000000a 00000922")
    answers = [busy, bytes.fromhex("8001 0000000a 0000090a"), GOOD_RANDOM]
    channel = Scripted(lambda _: answers.pop(0))
    clock = MockClock(autojump_threshold=0)
    assert trio.run(tpm2.Tpm(channel, "it").get_random, 4, clock=clock) == b"\1\2\3\4"
    assert len(channel.asked) == 3 and len(set(channel.asked)) == 1
    channel = Scripted(lambda _: busy)
    with pytest.raises(tpm2.TpmError, match="busy") as caught:
        trio.run(tpm2.Tpm(channel, "it").get_random, 4, clock=MockClock(autojump_threshold=0))
    assert caught.value.code == 0x922 and len(channel.asked) == tpm2.MAX_RETRIES + 1


def pcrs_answer(moment: int, chosen: list[int], values: list[bytes], bank: int = 0xB) -> bytes:
    bitmap = sum(1 << n for n in chosen).to_bytes(3, "little")
    body = pki.big(moment, 4) + pki.big(1, 4) + pki.big(bank, 2) + b"\3" + bitmap
    body += pki.big(len(values), 4) + b"".join(pki.sized(each) for each in values)
    return pki.big(0x8001, 2) + pki.big(10 + len(body), 4) + pki.big(0, 4) + body


def test_registers_are_those_that_were_asked_for_at_one_moment() -> None:
    one = bytes(32)

    def read(chosen: list[int], *answers: bytes) -> dict[int, bytes]:
        left = list(answers)
        return trio.run(tpm2.Tpm(Scripted(lambda _: left.pop(0)), "it").read_pcrs, chosen)

    # Three at once, then the rest; somebody extended one between the two, so all over again.
    first, rest = pcrs_answer(1, [0, 1, 2], 3 * [one]), pcrs_answer(2, [3], [b"\1" * 32])
    again = pcrs_answer(2, [0, 1, 2], [b"\2" * 32, one, one])
    assert read([3, 0, 1, 2], first, rest, again, rest) == {0: b"\2" * 32, 1: one, 2: one, 3: b"\1" * 32}
    for bad in (
        pcrs_answer(1, [], []),
        pcrs_answer(1, [0], [one, one]),
        pcrs_answer(1, [0, 5], [one, one]),
        pcrs_answer(1, [0], [bytes(31)]),
        pcrs_answer(1, [0], [bytes(20)], 0x4),
    ):
        with pytest.raises(tpm2.TpmError, match="malformed"):
            read([0, 1], bad)
    with pytest.raises(tpm2.TpmError, match="faster than they can be read"):
        endless = [pcrs_answer(n, [n % 2], [one]) for n in range(1000)]
        read([0, 1], *endless)
    with pytest.raises(LocalError):
        read([])


def test_a_key_has_its_own_name(heard: dict[str, list[tuple[int, bytes]]]) -> None:
    """Else a quote would go out under another key's name, or a secret be sealed to a key of somebody else."""
    for name in ("quote", "unseal"):
        answers = [answer for _, answer in heard[name]]
        at = next(n for n, (code, _) in enumerate(heard[name]) if code == tpm2._CREATE_PRIMARY)
        bad = bytearray(answers[at])
        bad[60] ^= 1  # in its x coordinate
        with no_randomness(), pytest.raises(tpm2.TpmError, match="a name that is not of this key"):
            left = [bytes(bad) if n == at else each for n, each in enumerate(answers)]
            channel = Scripted(lambda _, left=left: left.pop(0))  # type: ignore[misc]
            trio.run(CALLS[name], tpm2.Tpm(channel, "it"))


def test_a_silent_tpm_ends_the_connection() -> None:
    channel = Scripted(lambda _: trio.sleep_forever())
    opened = tpm2.Tpm(channel, "it", 7.0)

    async def work() -> None:
        start = trio.current_time()
        with pytest.raises(tpm2.TpmError, match="no answer within 7 s"):
            await opened.get_random(4)
        assert trio.current_time() - start == pytest.approx(7)
        with pytest.raises(tpm2.TpmError, match="of no more use"):
            await opened.get_random(4)
        assert len(channel.asked) == 1

    trio.run(work, clock=MockClock(autojump_threshold=0))


def test_a_cancelled_caller_hears_the_answer_and_flushes() -> None:
    """Else the next command would take this one's answer, and the TPM would be full after three of them."""
    public = tpm2.AK_TEMPLATE[:-36] + pki.sized(bytes(32)) + pki.sized(bytes(32))
    name = b"\0\x0b" + pki.hashlib.sha256(public).digest()
    made = pki.sized(public) + pki.sized(b"") + pki.sized(b"") + bytes(6) + pki.sized(b"") + pki.sized(name)
    body = pki.big(0x80000001, 4) + pki.big(len(made), 4) + made + pki.sized(b"") + b"\0" + pki.sized(b"")
    primary = pki.big(0x8002, 2) + pki.big(10 + len(body), 4) + pki.big(0, 4) + body
    flushed = bytes.fromhex("8001 0000000a 00000000")

    async def late(command: bytes) -> bytes:
        await trio.sleep(3)
        return primary if code_of(command) == 0x131 else flushed

    channel = Scripted(late)

    async def work() -> None:
        with trio.move_on_after(1) as scope:
            await tpm2.Tpm(channel, "it").quote(b"x", [0])
        assert scope.cancelled_caught
        assert [code_of(each) for each in channel.asked[:: len(channel.asked) - 1]] == [0x131, 0x165]
        assert channel.asked[-1].endswith(pki.big(0x80000001, 4))

    trio.run(work, clock=MockClock(autojump_threshold=0))


# --- malformed answers -------------------------------------------------------------------------------------


class Recorder:
    """Passes commands on, and keeps which they were and their answers. `alter` may change either."""

    def __init__(
        self, inner: tpm2.Channel, alter: Callable[[int, bytearray], Any] = lambda c, m: None
    ) -> None:
        self.inner, self.alter = inner, alter
        self.heard: list[tuple[int, bytes]] = []
        self.passed = b""

    async def exchange(self, command: bytearray) -> bytearray:
        code = code_of(command)
        self.alter(code, command)
        answer = await self.inner.exchange(command)
        self.alter(-code, answer)
        self.passed += bytes(command) + bytes(answer)
        self.heard.append((code, bytes(answer[: int.from_bytes(answer[2:6], "big")])))
        return answer

    def close(self) -> None:
        self.inner.close()


async def unseal(opened: tpm2.Tpm) -> None:
    await opened.unseal(await opened.seal({0: bytes(32)}, b"s" * 32))


CALLS: dict[str, Callable[[tpm2.Tpm], Awaitable[Any]]] = {
    "tidy": lambda t: t.tidy(sessions=True),
    "properties": lambda t: t.properties(),
    "random": lambda t: t.get_random(16),
    "reset": lambda t: t.reset_pcr(16),
    "extend": lambda t: t.extend_pcr(16, bytes(32)),
    "pcrs": lambda t: t.read_pcrs(range(10)),
    "quote": lambda t: t.quote(b"x" * 32, [0, 16]),
    "counter": lambda t: t.counter_increment(),
    "unseal": unseal,
}


@pytest.fixture(scope="module")
def heard(chip: SoftwareTpm) -> dict[str, list[tuple[int, bytes]]]:
    """What a real one says to each call: (command, answer)."""

    async def record() -> dict[str, list[tuple[int, bytes]]]:
        found = {}
        for name, call in CALLS.items():
            channel, _ = await tpm2._connect(chip.socket)
            await tpm2.Tpm(channel, "it").counter_define()
            recorder = Recorder(channel)
            await call(tpm2.Tpm(recorder, "it"))
            found[name] = recorder.heard
            channel.close()
        return found

    with no_randomness():
        return trio.run(record)


@contextmanager
def no_randomness() -> Iterator[None]:
    """Sessions with the TPM agree on the same keys each time, so that recorded answers fit."""
    with pytest.MonkeyPatch.context() as patch:
        key = ec.derive_private_key(77, ec.SECP256R1())
        patch.setattr(os, "urandom", lambda size: b"\x33" * size)
        patch.setattr(ec, "generate_private_key", lambda curve: key)
        yield


async def replay(name: str, answers: list[bytes]) -> bool:
    """Whether a call goes through with these answers; any error but our own fails the test."""
    left = list(answers)

    def next_answer(command: bytes) -> bytes:
        if not left:
            raise ValueError("the connection ended")
        return left.pop(0)

    try:
        await CALLS[name](tpm2.Tpm(Scripted(next_answer), "it"))
    except (tpm2.TpmError, BadInput) as error:
        assert str(error).isprintable()
        return False
    return True


def test_answers_that_end_early_or_late_are_refused(heard: dict[str, list[tuple[int, bytes]]]) -> None:
    """An answer to each command cut at each byte, with a length that shows it and one that hides it; and with
    a byte more, or the tag of another kind of answer."""

    async def work() -> None:
        seen = set()
        for name, found in heard.items():
            answers = [answer for _, answer in found]
            assert await replay(name, answers)
            for at, (code, answer) in enumerate(found):
                if code in seen:
                    continue
                seen.add(code)
                bad = [answer[:size] for size in range(len(answer))]
                bad += [each[:2] + pki.big(len(each), 4) + each[6:] for each in bad[6:]]
                bad.append(answer[:2] + pki.big(len(answer) + 1, 4) + answer[6:] + b"\0")
                bad.append((b"\x80\x01" if answer[1] == 2 else b"\x80\x02") + answer[2:])
                for each in bad:
                    assert not await replay(name, [*answers[:at], each, *answers[at + 1 :]]), (code, each)
        # Every command that this client knows how to ask, but for the one that makes the counter.
        assert seen == set(tpm2._NAMES) - {0x12A, 0x137, 0x122}

    with no_randomness():
        trio.run(work, clock=MockClock(autojump_threshold=0))


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_answer_brings_anything_but_our_own_error(
    heard: dict[str, list[tuple[int, bytes]]], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(CALLS)))
    changed = [answer for _, answer in heard[name]]
    at = data.draw(st.integers(0, len(changed) - 1))
    raw = bytearray(changed[at])
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(raw)))
        patch = data.draw(st.binary(max_size=6))
        raw[where : where + data.draw(st.sampled_from((len(patch), 0, 1)))] = patch
    changed[at] = bytes(raw)
    with no_randomness():
        trio.run(replay, name, changed, clock=MockClock(autojump_threshold=0))


def test_a_peer_at_the_socket_that_is_no_tpm_is_refused(tmp_path: Path) -> None:
    """Bounds before memory: a length of four gigabytes is not waited for."""

    async def served(answer: bytes) -> None:
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            path = tmp_path / "s"
            path.unlink(missing_ok=True)
            await listener.bind(str(path))
            listener.listen(1)

            async def serve() -> None:
                peer, _ = await listener.accept()
                with peer:
                    await peer.recv(4096)
                    await peer.send(answer)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                async with tpm2.open_tpm(path):
                    pass

    for answer, what in (
        (b"\x80\x01\xff\xff\xff\xff\0\0\0\0", "4294967295 bytes announced"),
        (b"\x80\x01\0\0\0\x05\0\0\0\0", "5 bytes announced"),
        (b"\x80\x01\0", "connection ended"),
        (b"\x80\x01\0\0\0\x0a\0\0\x01\0", "flags not-need-init,startup-clear"),
    ):
        with pytest.RaisesGroup(pytest.RaisesExc(tpm2.TpmError, match=what)):
            trio.run(served, answer)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_program_that_starts_is_waited_for(chip: SoftwareTpm, tmp_path: Path, family: int) -> None:
    """Over TCP and over a path: its socket is there before it listens. One that is gone is given up soon."""

    async def serve(listener: trio.socket.SocketType) -> None:
        await trio.sleep(0.1)
        listener.listen(1)
        peer, _ = await listener.accept()
        back, _ = await tpm2._connect(chip.socket)
        with peer:
            while command := await peer.recv(4096):
                await peer.send(bytes(await back.exchange(bytearray(command))))
        back.close()

    async def work() -> None:
        with trio.socket.socket(family, socket.SOCK_STREAM) as listener:
            place: Any = tmp_path / "s"
            await listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(place))
            if family == socket.AF_INET:
                place = config.Address(*listener.getsockname())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, listener)
                async with tpm2.open_tpm(place) as opened:
                    assert len(await opened.get_random(8)) == 8
        with pytest.raises(EnvironmentMissing, match="refused"):
            async with tpm2.open_tpm(place):
                pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpm2, "START_SECONDS", 0.5)
        trio.run(work)


def test_a_character_device_is_one_write_and_one_read(chip: SoftwareTpm) -> None:
    """The kernel's way, over a pair of sockets that keep messages apart as the device does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    device = tpm2._Device(os.dup(ours.fileno()))

    async def work() -> None:
        back, _ = await tpm2._connect(chip.socket)
        end = trio.socket.from_stdlib_socket(theirs)

        async def kernel() -> None:
            while True:
                command = await end.recv(4096)
                answer = await back.exchange(bytearray(command))
                await end.send(bytes(answer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel)
            opened = tpm2.Tpm(device, "it")
            quote = await opened.quote(b"x" * 32, [0])
            assert tpm.parse_attest(quote.attest, Trail("test")).extra_data == b"x" * 32
            nursery.cancel_scope.cancel()

            async def nonsense() -> None:
                await end.recv(4096)
                await end.send(GOOD_RANDOM + b"\0")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(nonsense)
            with pytest.raises(tpm2.TpmError, match="another length"):
                await opened.get_random(4)
        back.close()

    trio.run(work)
    device.close()
    ours.close()


# --- SNP and TDX: configfs-tsm -----------------------------------------------------------------------------


class Configfs(type(Path())):  # type: ignore[misc]
    """Plays /sys/kernel/config/tsm/report over a plain folder: attributes come with a directory and go with
    it, a report is made when it is read, and each write raises `generation`."""

    provider = "sev_guest"
    floor: int | None = None
    make: Callable[[bytes], bytes]  # from the inblob to the outblob
    auxblob: bytes | None = b""
    intruder = False  # somebody else writes to our entry

    def mkdir(self, *given: Any, **more: Any) -> None:
        super().mkdir(*given, **more)
        plain = Path(self)
        (plain / "provider").write_text(self.provider + "\n")
        (plain / "generation").write_text("0\n")
        if self.floor is not None:
            (plain / "privlevel_floor").write_text(f"{self.floor}\n")
        if self.auxblob is not None:
            (plain / "auxblob").write_bytes(self.auxblob)

    def rmdir(self) -> None:
        for each in Path(self).iterdir():
            each.unlink()
        super().rmdir()

    def open(self, mode: str = "r", *given: Any, **more: Any) -> Any:
        plain, kind = Path(self), type(self)
        entry = plain.parent
        if "w" in mode:
            assert self.name in ("inblob", "privlevel")
            count = int((entry / "generation").read_text()) + 1 + kind.intruder
            (entry / "generation").write_text(f"{count}\n")
        elif self.name == "outblob":
            if kind.floor:
                assert (entry / "privlevel").read_text() == str(kind.floor)
            plain.write_bytes(kind.make((entry / "inblob").read_bytes()))
        return plain.open(mode, *given, **more)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[type[Configfs]]:
    kind = type("Kernel", (Configfs,), {"root": None, "make": staticmethod(lambda data: data)})
    kind.root = kind(tmp_path)
    yield kind
    assert list(Path(tmp_path).iterdir()) == []  # whatever happened, nothing stays


def amd_table() -> bytes:
    """VCEK, ASK and ARK as a host puts them there."""
    der = {tsm.VCEK: AMD.vek()}
    chain = pki.x509.load_pem_x509_certificates(AMD.chain())
    der[tsm.ASK], der[tsm.ARK] = (each.public_bytes(Encoding.DER) for each in chain)
    return table_of(der)


def table_of(found: dict[bytes, bytes]) -> bytes:
    at, head, body = 24 * (len(found) + 1), b"", b""
    for guid, value in found.items():
        head += guid + (at + len(body)).to_bytes(4, "little") + len(value).to_bytes(4, "little")
        body += value
    return head + bytes(24) + body


def stored() -> Collateral:
    return Collateral(
        {
            "amd/genoa/crl.der": Item(AMD.crl(), pki.NOW),
            f"intel/{pki.FMSPC.hex()}.json": Item(INTEL.collateral(), pki.NOW),
        }
    )


ANCHORS = Anchors(AMD.roots, INTEL.roots, AWS.roots, {})


def through(attester: Any, claims: Claims) -> Envelope:
    return trio.run(attester.attest, claims)  # type: ignore[no-any-return]


def admitted(attester: Any, kind: str) -> None:
    """Its evidence makes an entry of a policy, and by that policy it is admitted; another nonce is not."""
    first = through(attester, claims_for(now=pki.NOW))
    entry = enrol(first, "it", configured=True)
    assert entry.kind == kind and not entry.simulated and not entry.ak_name and entry.values
    wanted = policy_of(entry.entry, "production")
    claims = claims_for(wanted, pki.NOW)
    raw = through(attester, claims).encode()
    more = {"collateral": stored(), "anchors": ANCHORS}
    assert judge(raw, wanted, claims, pki.NOW, **more).kind == kind
    other = replace(claims, nonce=os.urandom(32))
    assert refused(lambda: judge(raw, wanted, other, pki.NOW, **more)) == "claims.nonce"
    spliced = replace(Envelope.decode(raw), claims=other.encode()).encode()
    assert refused(lambda: judge(spliced, wanted, other, pki.NOW, **more)) == "claims.binding"


def test_an_snp_report_is_made_for_the_claims(kernel: type[Configfs]) -> None:
    kernel.make = staticmethod(lambda data: AMD.report(report_data=data))
    kernel.auxblob, kernel.floor = amd_table(), 0
    attester = tsm.TsmAttester("snp", kernel.root)
    trio.run(attester.check)
    assert set(through(attester, claims_for()).endorsements) == {"vek", "chain"}
    admitted(attester, "snp")


def test_a_tdx_quote_is_made_for_the_claims(kernel: type[Configfs]) -> None:
    kernel.make = staticmethod(lambda data: INTEL.quote(report_data=data))
    kernel.provider, kernel.auxblob = "tdx_guest", None
    admitted(tsm.TsmAttester("tdx", kernel.root), "tdx")


def test_what_the_kernel_gives_is_looked_at(kernel: type[Configfs]) -> None:
    good = staticmethod(lambda data: AMD.report(report_data=data))

    def fail(data: bytes) -> bytes:
        raise OSError(5, "Input/output error")

    def attempt(kind: str = "snp", **changes: Any) -> str:
        own = type("Kernel", (kernel,), {"make": good} | changes)
        with pytest.raises(DeviceError) as caught:
            through(tsm.TsmAttester(kind, own(kernel.root)), claims_for())
        return str(caught.value)

    assert 'reports are of "tdx_guest"' in attempt(provider="tdx_guest")
    assert 'reports are of "sev_guest"' in attempt(kind="tdx")
    assert "a word expected" in attempt(provider="\x1b[2J")
    assert "somebody else wrote" in attempt(intruder=True)
    assert "Input/output error" in attempt(make=staticmethod(fail))
    assert "snp.binding" in attempt(make=staticmethod(lambda _: AMD.report(report_data=bytes(64))))
    assert "snp.length" in attempt(make=staticmethod(lambda _: b"short"))
    assert "empty" in attempt(make=staticmethod(lambda _: b""))
    assert "more than 32768 bytes" in attempt(make=staticmethod(lambda _: bytes(40000)))
    assert "more than 65536 bytes" in attempt(auxblob=bytes(70000))
    assert "at most 3 expected" in attempt(floor=4)
    for bad in (amd_table()[:100], tsm.VCEK + b"\xff" * 8 + bytes(24), tsm.VCEK * 100, 2 * tsm.VCEK[:9]):
        assert "certificate table" in attempt(auxblob=bad), bad


def test_a_guest_above_a_paravisor_asks_at_its_own_level(kernel: type[Configfs]) -> None:
    kernel.make = staticmethod(lambda data: AMD.report(report_data=data))
    kernel.floor = 2
    assert through(tsm.TsmAttester("snp", kernel.root), claims_for()).endorsements == {}


def test_certificate_tables() -> None:
    here = Path("x")
    assert tsm.parse_table(b"", here) == tsm.parse_table(bytes(4096), here) == {}
    found = tsm.parse_table(amd_table(), here)
    assert set(found) == {tsm.VCEK, tsm.ASK, tsm.ARK}
    # The order of bytes, written out: what hosts of AMD's tools write.
    assert tsm.VCEK.hex() == "63da758de6644564adc5f4b93be8accd"
    pem = pki.x509.load_der_x509_certificate(found[tsm.ASK]).public_bytes(Encoding.PEM)
    mixed = table_of({tsm.VCEK: found[tsm.VCEK], tsm.ASK: pem, tsm.ARK: found[tsm.ARK]})
    chain = pki.pem(*(pki.x509.load_der_x509_certificate(found[each]) for each in (tsm.ASK, tsm.ARK)))
    assert tsm._certificates(mixed, "vcek", here) == {"vek": found[tsm.VCEK], "chain": chain}
    assert tsm._certificates(amd_table(), "vlek", here) == {}
    twice = table_of({tsm.VCEK: b"one", tsm.ASK: b"other"}).replace(tsm.ASK, tsm.VCEK)
    with pytest.raises(DeviceError, match="repeats itself"):
        tsm.parse_table(twice, here)
    leased = table_of({tsm.VLEK: b"leased", tsm.ASK: pem, tsm.ARK: pem})
    assert tsm._certificates(leased, "vlek", here) == {"vek": b"leased"}


# --- recorded evidence through the seams -------------------------------------------------------------------


class Recorded(Claims):
    """Claims that hash to what a recorded piece of evidence happens to be bound to."""

    data = b""

    def report_data(self) -> bytes:
        return self.data


def recorded(data: bytes, nonce: bytes | None = None) -> Claims:
    kind = type("Recorded", (Recorded,), {"data": data})
    made = kind(**vars(claims_for()))
    if nonce is not None:
        object.__setattr__(made, "nonce", nonce)
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["azure_genoa", "azure_turin", "aws_milan_vlek_v3", "azure_milan"])
def test_recorded_snp_reports_pass_the_attester(kernel: type[Configfs], shared_dir: Path, name: str) -> None:
    folder = shared_dir / "vectors" / "attestation" / "snp"
    raw = (folder / name / "report.bin").read_bytes()
    report = snp.parse(raw, Trail("snp"))
    leased, product = report.signing_key == "vlek", name.split("_")[1]
    vek = (folder / name / ("vlek.der" if leased else "vcek.pem")).read_bytes()
    chain = (folder / "ca" / f"ask_ark_{product}{'_vlek' if leased else ''}.pem").read_bytes()
    ask, ark = (each.public_bytes(Encoding.DER) for each in pki.x509.load_pem_x509_certificates(chain))
    kernel.make = staticmethod(lambda _: raw)
    kernel.auxblob = table_of({tsm.VLEK if leased else tsm.VCEK: vek, tsm.ASK: ask, tsm.ARK: ark})
    envelope = through(tsm.TsmAttester("snp", kernel.root), recorded(report.report_data))
    assert Envelope.decode(envelope.encode()) == envelope
    store = Collateral({f"amd/{product}/{report.signing_key}.pem": Item(chain, NOW)})
    now = datetime(2025, 6, 1, tzinfo=UTC) if leased else datetime(2026, 7, 1, tzinfo=UTC)
    facts, _ = appraisal.verify(envelope, store, now, timedelta(0))
    assert facts.kind == "snp" and facts.binding == report.report_data
    with pytest.raises(DeviceError, match=r"snp\.binding"):
        through(tsm.TsmAttester("snp", kernel.root), claims_for())


@pytest.mark.parametrize("name", ["google_v5", "phala_v4", "flashbots_v4"])
def test_recorded_tdx_quotes_pass_the_attester(kernel: type[Configfs], shared_dir: Path, name: str) -> None:
    from mimir.attest import tdx

    raw = (shared_dir / "vectors" / "attestation" / "tdx" / name / "quote.bin").read_bytes()
    kernel.make, kernel.provider, kernel.auxblob = staticmethod(lambda _: raw), "tdx_guest", None
    quote = tdx.parse(raw, Trail("tdx"))
    envelope = through(tsm.TsmAttester("tdx", kernel.root), recorded(quote.report_data))
    assert envelope.evidence == raw and envelope.endorsements == {}
    with pytest.raises(DeviceError, match=r"tdx\.binding"):
        through(tsm.TsmAttester("tdx", kernel.root), claims_for())


# --- Nitro: /dev/nsm ---------------------------------------------------------------------------------------


class Nsm:
    """Plays the driver of /dev/nsm: reads the request where the message says it is, and writes an answer
    there."""

    def __init__(self, answer: Callable[[Any], bytes]) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, fd: int, request: int, message: Any) -> int:
        os.fstat(fd)  # an open file
        assert request == 0xC0200A00 and ctypes.sizeof(message) == 32
        # struct nsm_raw: two pairs of address and length, 64 bits each
        at, size, room, limit = (int.from_bytes(bytes(message)[n : n + 8], "little") for n in range(0, 32, 8))
        assert limit == 0x3000
        self.asked.append(cbor2.loads(ctypes.string_at(at, size)))
        found = self.answer(self.asked[-1])
        ctypes.memmove(room, found[:limit], min(len(found), limit))
        message.response.length = len(found)
        return 0


def nitro_attester(answer: Callable[[Any], bytes]) -> nsm.NsmAttester:
    return nsm.NsmAttester(Path("/dev/null"), Nsm(answer))


def document_of(request: Any) -> bytes:
    given = request["Attestation"]
    made = AWS.document(user_data=given["user_data"], nonce=given["nonce"])
    return cbor2.dumps({"Attestation": {"document": made}})


def test_a_nitro_document_is_made_for_the_claims() -> None:
    attester = nitro_attester(document_of)
    trio.run(attester.check)
    claims = claims_for()
    through(attester, claims)
    wanted = {"user_data": claims.report_data(), "nonce": claims.nonce, "public_key": None}
    assert attester._ioctl.asked == [{"Attestation": wanted}]
    admitted(attester, "nitro")


def test_what_the_nsm_answers_is_looked_at() -> None:
    good = document_of({"Attestation": {"user_data": b"x", "nonce": b"y"}})

    def fail(request: Any) -> bytes:
        raise OSError(25, "Inappropriate ioctl for device")

    for answer, what in (
        (lambda r: good, "nitro.binding"),
        (lambda r: document_of({"Attestation": r["Attestation"] | {"nonce": bytes(32)}}), "nitro.nonce"),
        (lambda r: cbor2.dumps({"Error": "InvalidOperation"}), "InvalidOperation"),
        (lambda r: cbor2.dumps({"Error": "\x1b[2J" + 100 * "x"}), "refused"),
        (lambda r: cbor2.dumps({"Attestation": {"document": "text"}}), "nitro.answer"),
        (lambda r: cbor2.dumps({"Attestation": {"document": b"x", "more": 1}}), "nitro.answer"),
        (lambda r: cbor2.dumps([]), "nitro.answer"),
        (lambda r: b"", "0 bytes"),
        (lambda r: bytes(0x3001), "12289 bytes"),
        (fail, "Inappropriate ioctl"),
    ):
        with pytest.raises(DeviceError, match=what) as caught:
            through(nitro_attester(answer), claims_for())
        assert str(caught.value).isprintable()
    answer = document_of({"Attestation": {"user_data": claims_for().report_data(), "nonce": bytes(32)}})
    for size in range(0, len(answer), 7):
        with pytest.raises(MimirError):
            through(nitro_attester(lambda r, s=size: answer[:s]), claims_for())  # type: ignore[misc]


@pytest.mark.parametrize("name", ["base_prod_1", "evervault_prod", "dstack_nsm", "mysten_debug"])
def test_recorded_nitro_documents_pass_the_attester(shared_dir: Path, name: str) -> None:
    from mimir.attest import nitro

    raw = (shared_dir / "vectors" / "attestation" / "nitro" / f"{name}.cbor").read_bytes()
    document = nitro.parse(raw, Trail("nitro"))
    attester = nitro_attester(lambda _: cbor2.dumps({"Attestation": {"document": raw}}))
    envelope = through(attester, recorded(document.user_data, document.nonce))
    facts, _ = appraisal.verify(envelope, Collateral(), document.timestamp, timedelta(0))
    assert facts.kind == "nitro"
    if document.debug:
        with pytest.raises(BadInput, match="debug"):
            enrol(envelope, "it", configured=False)
    else:
        policy_of(enrol(envelope, "it", configured=False).entry, "production")


# --- figures ---


def test_the_benchmark_verifies_what_it_times(shared_dir: Path) -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    import attestation

    kinds = []
    for case in attestation.cases(shared_dir):
        facts, _ = appraisal.verify(case.envelope, case.store, case.now, timedelta(0))
        kinds.append(facts.kind)
    assert kinds == ["snp", "snp", "tdx", "nitro", "az-snp-vtpm", "az-tdx-vtpm"]
    assert set(attestation.timed(lambda: None, 3)) == {"median_ms", "worst_ms", "cpu_ms"}


# --- entries ---------------------------------------------------------------------------------------------


def test_an_entry_says_what_the_machine_is() -> None:
    """Turin has a component more, a VLEK names its provider, a boot that measures more is held to more."""
    leased = AMD.report(report_data=bytes(64), key_info=1 << 2)
    envelope = Envelope("snp", leased, b"x", {"vek": AMD.vek(kind="vlek")})
    found = policy_of(enrol(envelope, "it", configured=False).entry, "production").allow[0].rule
    assert isinstance(found, snp.Rule) and found.csp_ids == ("CN=cloud.example",)
    with pytest.raises(BadInput, match="provider"):
        enrol(replace(envelope, endorsements={}), "it", configured=False)
    hostile = AMD.vek(kind="vlek", changes={"5": pki.tlv(0x16, b'x"]\nvmpl_max = 3 #')})
    text = enrol(replace(envelope, endorsements={"vek": hostile}), "it", configured=False).entry
    assert tomllib.loads(text)["allow"][0]["vmpl_max"] == 0
    own = pki.Tpm(pcrs={n: bytes((n,)) * 32 for n in range(24)})
    parts = {"quote": b"q", "signature": b"s", "pcrs": {"sha256": own.pcrs}, "ak": own.public()}
    envelope = Envelope("tpm", cbor2.dumps(parts, canonical=True), b"x")
    entry = tomllib.loads(enrol(envelope, "it", configured=True).entry)["allow"][0]
    assert list(entry["pcrs"]) == ["0", "2", "4", "7", "8", "9", "11", "16"]
    assert entry["ak_names"] == [own.name]
    entry = tomllib.loads(enrol(envelope, "it", configured=False).entry)["allow"][0]
    assert "16" not in entry["pcrs"]
    with pytest.raises(BadInput, match="by hand"):
        enrol(replace(envelope, kind="az-snp-vtpm"), "it", configured=False)


# --- configuration, commands, what a host lacks ------------------------------------------------------------


def party_file(folder: Path, text: str) -> Path:
    path = folder / "party.toml"
    example = (ROOT / "configs" / "three.toml").read_text().replace('mode = "required"', 'mode = "off"')
    example = re.sub(r"# (private_key|tunnel_public_key) = ", r"\1 = ", example)
    path.write_text(re.sub(r"\[attester\].*\nkind = .*\n", "", example) + text)
    return path


def test_the_attester_of_a_party_is_read_strictly(tmp_path: Path) -> None:
    def read(text: str) -> config.Attester | None:
        return config.load(party_file(tmp_path, text)).attester

    assert read("") is None
    assert read('[attester]\nkind = "snp"\n') == config.Attester("snp")
    assert read('[attester]\nkind = "snp"\n').place == Path("/sys/kernel/config/tsm/report")  # type: ignore[union-attr]
    assert read('[attester]\nkind = "tpm"\n').place == Path("/dev/tpmrm0")  # type: ignore[union-attr]
    found = read('[attester]\nkind = "swtpm"\ndevice = "tpm/socket"\n')
    assert found is not None and found.place == tmp_path / "tpm" / "socket"
    found = read('[attester]\nkind = "swtpm"\ndevice = "tcp:127.0.0.1:2321"\n')
    assert found is not None and found.place == config.Address("127.0.0.1", 2321)
    for text, what in (
        ("[attester]\n", "missing key attester.kind"),
        ('[attester]\nkind = "sgx"\n', "attester.kind"),
        ('[attester]\nkind = "swtpm"\n', "attester.device: missing"),
        ('[attester]\nkind = "tpm"\ndevice = "tcp:127.0.0.1:2321"\n', "which has a path"),
        ('[attester]\nkind = "swtpm"\ndevice = "tcp:2321"\n', "attester.device"),
        ('[attester]\nkind = "swtpm"\ndevice = 1\n', "attester.device"),
        ('[attester]\nkind = "snp"\nsimulated = false\n', "unknown key attester.simulated"),
    ):
        with pytest.raises(ConfigError, match=what):
            read(text)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_a_machine_is_enrolled_and_its_evidence_explained(
    chip: SoftwareTpm, other_chip: SoftwareTpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As three people would: enrol, paste, show, explain."""
    file = party_file(tmp_path, f'\n[attester]\nkind = "swtpm"\ndevice = "{chip.socket}"\n')
    found = told(capsys, "attester", "enroll", "--config", str(file), "--id", "alpha")
    digest = config.load(file).digest()
    assert found["values"]["pcr16"] == measurement.code_pcr(measurement.code_digest(), digest).hex()
    assert found["simulated"] is True and found["ek_certificates"] == {} and len(found["ak_name"]) == 68
    mesh, shown = tmp_path / "mesh.toml", tmp_path / "evidence.cbor"
    mesh.write_text(HEAD.format("simulation") + found["entry"])
    given = ("--config", str(file), "--policy", str(mesh), "--out", str(shown))
    event = told(capsys, "attester", "show", *given)
    assert bytes.fromhex(event["envelope"]) == shown.read_bytes() and event["bytes"] == len(
        shown.read_bytes()
    )
    assert main(["policy", "explain", str(shown), "--policy", str(mesh)]) == 0
    said = capsys.readouterr().out
    assert "SIMULATED" in said and "entry    alpha: satisfied" in said and "ok       policy.pcr16" in said
    # Another TPM, instead of the file's.
    other = ("--kind", "swtpm", "--device", str(other_chip.socket))
    told(capsys, "attester", "show", *given, *other)
    assert main(["policy", "explain", str(shown), "--policy", str(mesh)]) == 10
    assert "FAILED   policy: policy.ak" in capsys.readouterr().out
    # For people, and without a configuration: then nothing is said of PCR 16.
    assert main(["attester", "enroll", *other]) == 0
    out, err = capsys.readouterr()
    assert tomllib.loads(out)["allow"][0]["kind"] == "swtpm" and '"16"' not in out
    assert "SIMULATED" in err and "AK name  000b" in err and "EK cert  none" in err
    assert main(["attester", "show", *other]) == 0
    out, err = capsys.readouterr()
    assert Envelope.decode(bytes.fromhex(out)).kind == "swtpm"
    for words, code in (
        (("enroll",), 2),
        (("enroll", "--device", "/dev/tpmrm0"), 2),
        (("enroll", "--config", str(party_file(tmp_path, ""))), 2),
        (("enroll", "--kind", "swtpm", "--device", "tcp:1"), 2),
        (("enroll", "--kind", "swtpm", "--device", str(tmp_path / "none")), 5),
        (("show", *other, "--out", str(tmp_path / "no" / "where")), 2),
    ):
        assert main(["attester", *words]) == code, words
    assert "mimir: " in capsys.readouterr().err


def test_the_doctor_looks_at_the_attester(chip: SoftwareTpm, tmp_path: Path) -> None:
    def find(kind: str, device: Any) -> doctor.Finding:
        (found,) = doctor._attester(config.Attester(kind, device))
        return found

    assert find("swtpm", chip.socket).fine
    for kind, device, what in (
        ("swtpm", tmp_path / "none", "scripts/software_tpm"),
        ("swtpm", tmp_path, "scripts/software_tpm"),
        ("tpm", tmp_path / "none", "modprobe tpm"),
        ("tpm", chip.socket, "modprobe tpm"),
        ("snp", tmp_path / "none", "CONFIG_TSM_REPORTS"),
        ("nitro", tmp_path / "none", "Nitro"),
    ):
        found = find(kind, device)
        assert not found.fine and found.need == "needed" and what in found.remedy, (kind, device)
    assert find("snp", tmp_path).fine


def test_a_software_tpm_has_its_folder_for_itself(chip: SoftwareTpm, tmp_path: Path) -> None:
    assert chip.folder.stat().st_mode & 0o777 == 0o700 and chip.socket.stat().st_mode & 0o777 == 0o600
    again = subprocess.run([SCRIPT, chip.folder], capture_output=True, text=True)
    assert again.returncode == 2 and "running" in again.stderr
    assert attest(chip, claims_for()).kind == "swtpm"  # and the first one goes on
    assert subprocess.run([SCRIPT], capture_output=True).returncode == 2
    long = tmp_path / ("x" * 100)
    assert subprocess.run([SCRIPT, long], capture_output=True).returncode == 2
