"""The keeper of the gate: three parties in one process admit one another over loopback, with quotes of TPMs
of our own and a gate that writes down who is in it.

Time passes by the clock that parties are given; waits of ours end as soon as what they wait for is there.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attest_pki as pki
import cbor2
import pytest
import trio
import trio.testing
from federation import free_ports

from mimir import hpke
from mimir.admission import bootstrap, exchange
from mimir.admission.bootstrap import MAX_STRANGERS, Admission, GateError, Place, PolicyFile
from mimir.admission.exchange import Kind, Own, Pair
from mimir.admission.revocation import Revocations, Statement, context_of, encode
from mimir.admission.tls import PartyTls
from mimir.attest import policy as policies
from mimir.attest.appraisal import appraise
from mimir.attest.collateral import Collateral
from mimir.attest.evidence import Claims, Envelope, identity_hash
from mimir.attest.policy import Signature
from mimir.attest.trail import Trail
from mimir.config import Address
from mimir.errors import AttestationError, BadInput
from mimir.net.identity import Identity
from mimir.secret import PresharedKey

TPMS = [pki.Tpm().with_label(f"ak{number}") for number in range(3)]
OWNERS = [Identity.generate() for _ in range(3)]
PATIENCE = 60.0


def write_policy(folder: Path, version: int = 1, more: str = "", signers: int = 2) -> Path:
    """A policy for machines with our TPMs, signed by the first of three owners."""
    path = folder / "policy.toml"
    names = ", ".join(f'"{each.name}"' for each in TPMS)
    path.write_text(
        f'format = 1\nname = "mesh"\nversion = {version}\nenvironment = "simulation"\n'
        f'not_after = 2035-01-01T00:00:00Z\n{more}\n[[allow]]\nid = "it"\nkind = "swtpm"\n'
        f'ak_names = [{names}]\npcrs = {{ "7" = ["{"07" * 32}"] }}\n'
    )
    message = policies.signed_message(policies.load(path))
    signed = [Signature(each.public_hex, each.sign(message).hex()) for each in OWNERS[:signers]]
    (folder / "policy.toml.sig").write_text(policies.format_signatures(signed))
    return path


@dataclass
class Machine:
    """Makes quotes of a machine of ours."""

    tpm: pki.Tpm
    kind: str = "swtpm"
    pcr7: bytes = b"\7" * 32
    made: int = 0

    async def attest(self, claims: Claims) -> Envelope:
        self.made += 1
        own = replace(self.tpm, pcrs=self.tpm.pcrs | {7: self.pcr7})
        quote, signature = own.quote(claims.qualifying_data())
        parts = {"quote": quote, "signature": signature, "pcrs": {"sha256": own.pcrs}, "ak": own.public()}
        return Envelope(self.kind, cbor2.dumps(parts, canonical=True), claims.encode())


@dataclass
class FakeGate:
    """Who is in, under which keys; and everything that happened."""

    inside: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    endpoints: dict[int, Address | None] = field(default_factory=dict)
    history: list[tuple[str, int, str]] = field(default_factory=list)
    carries: Callable[[int], bool] = lambda party: True
    broken: str = ""
    jammed: int = 0  # so many times it does not close
    slow: bool = False  # opens never, if left to itself

    async def admit(
        self, party: int, tunnel_key: bytes, preshared: PresharedKey, endpoint: Address | None
    ) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise GateError(self.broken)
        if self.slow:
            await trio.sleep_forever()
        with preshared.reveal_to_kernel() as view:
            self.inside[party] = tunnel_key, bytes(view)
        self.endpoints[party] = endpoint
        self.history.append(("admit", party, ""))

    async def expel(self, party: int, why: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.jammed:
            self.jammed -= 1
            raise RuntimeError("the device does not answer")
        self.inside.pop(party, None)
        self.history.append(("expel", party, why))

    def up(self, party: int) -> bool:
        return party in self.inside and self.carries(party)


class Three:
    """Three parties; each may be started, stopped, and started again."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder, self.nursery = folder, nursery
        self.identities = [Identity.generate() for _ in range(3)]
        self.ports = free_ports(3)
        self.machines = [Machine(tpm) for tpm in TPMS]
        self.gates = [FakeGate() for _ in range(3)]
        self.parties: dict[int, Admission] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self.revocations: dict[int, Revocations] = {}
        self.shift = timedelta()
        self.policy = write_policy(folder)
        self.config = bytes(32)

    def clock(self) -> datetime:
        return datetime.now(UTC) + self.shift

    def build(self, number: int, **changes: Any) -> Admission:
        folder = self.folder / f"data{number}"
        folder.mkdir(exist_ok=True)
        hexes = [each.public_hex for each in OWNERS]
        identities = [each.public_hex for each in self.identities]
        known = Revocations(folder / "revocations", context_of(identities), hexes, 2)
        places = [
            Place(n, f"p{n}", self.identities[n].public, Address("127.0.0.1", self.ports[n]), 51820)
            for n in range(3)
            if n != number
        ]
        given: dict[str, Any] = {
            "party": number,
            "identity": self.identities[number],
            "peers": places,
            "config_digest": self.config,
            "tunnel_key": secrets.token_bytes(32),
            "attester": self.machines[number],
            "policy_file": PolicyFile(self.policy, hexes, 2, folder / "policy.seen"),
            "gate": self.gates[number],
            "revocations": known,
            "tls": PartyTls(self.identities[number], f"p{number}", identities, known, self.clock),
            "handshake_seconds": 20.0,
            "clock": self.clock,
        }
        self.revocations[number] = known
        return Admission(**given | changes)

    async def start(self, number: int, **changes: Any) -> Admission:
        self.gates[number].inside.clear()
        admission = self.parties[number] = self.build(number, **changes)
        listeners = await trio.open_tcp_listeners(self.ports[number], host="127.0.0.1")
        scope = self.scopes[number] = trio.CancelScope()

        async def one() -> None:
            with scope:
                try:
                    await admission.run(listeners)
                finally:
                    for listener in listeners:
                        listener.socket.close()

        self.nursery.start_soon(one)
        return admission

    async def stop(self, number: int) -> None:
        self.scopes[number].cancel()
        await trio.sleep(0.01)

    async def until(self, what: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not what():
                await trio.sleep(0.01)

    def agree(self, *parties: int) -> bool:
        """Whether these are in each other's gates under their keys of today, and each pair under one key."""
        for a in parties:
            for b in parties:
                if a < b:
                    ours, theirs = self.gates[a].inside.get(b), self.gates[b].inside.get(a)
                    if ours is None or theirs is None or ours[1] != theirs[1]:
                        return False
                    if ours[0] != self.parties[b].own.tunnel or theirs[0] != self.parties[a].own.tunnel:
                        return False
        return True

    def seen(self, by: int, of: int) -> dict[str, Any]:
        return next(each for each in self.parties[by].view()["peers"] if each["party"] == of)

    def lasts(self, by: int, of: int) -> timedelta:
        """How much longer the verdict of one on another holds."""
        standing = self.parties[by]._peers[of].pair.standing
        return standing.until - self.clock() if standing is not None else timedelta()

    def sign(self, **items: Any) -> bytes:
        """A first statement of revocation."""
        context = context_of([each.public_hex for each in self.identities])
        statement = Statement(context, 0, datetime.fromtimestamp(0, UTC)).extended(self.clock(), **items)
        signed = [Signature(e.public_hex, e.sign(statement.message()).hex()) for e in OWNERS[:2]]
        return encode(statement, signed)


@asynccontextmanager
async def three(folder: Path) -> AsyncIterator[Three]:
    async with trio.open_nursery() as nursery:
        yield Three(folder, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machinery, with shorter pauses."""
    for name, value in {
        "TICK_SECONDS": 0.02,
        "BURST_SECONDS": 0.0,
        "YIELD_SECONDS": 0.02,
        "FIRST_BACKOFF": 0.02,
        "MAX_BACKOFF": 0.3,
        "WATCH_SECONDS": 0.05,
        "CLOSE_SECONDS": 0.5,
    }.items():
        monkeypatch.setattr(bootstrap, name, value)


def run(work: Callable[[Three], Any], folder: Path) -> None:
    async def main() -> None:
        async with three(folder) as made:
            await work(made)

    trio.run(main)


def test_three_parties_admit_one_another_and_say_so(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        for number in range(3):
            await three.start(number)
            assert await three.parties[number].check_own() == "it"
        with trio.fail_after(PATIENCE):
            for party in three.parties.values():
                await party.wait_admitted()
        await three.until(lambda: three.agree(0, 1, 2))
        assert len({inside[1] for gate in three.gates for inside in gate.inside.values()}) == 3
        assert all(gate.endpoints[p] is None for gate in three.gates for p in gate.endpoints)
        first = three.parties[0]
        view = first.view()
        assert view["kind"] == "swtpm" and view["simulated"] and view["policy"]["version"] == 1
        peer = three.seen(0, 1)
        assert peer["state"] == "admitted" and peer["entry"] == "it" and peer["refusal"] is None
        assert peer["tunnel_key"] == three.parties[1].own.tunnel.hex() and peer["attempts"] >= 1
        verdict = first.admitted(1)
        assert verdict is not None and peer["evidence"] == verdict.evidence
        shown = {each["party"]: each["evidence"] for each in three.parties[1].statement()["shown"]}
        assert verdict.evidence in shown[0]
        full = first.status()["peers"][0]
        assert full["verdict"]["steps"] and full["admission_seconds"] > 0 and full["problem"] is None
        assert first.certificates(1) == [full["certificate"]] and first.admitted(7) is None
        # What its peers certified it shows, and what clients ask of it is bound to them.
        issued = three.parties[1].statement()["certificates"]
        assert hashlib.sha256(issued[0]["certificate"]).hexdigest() == full["certificate"]
        tls = three.parties[1]._tls
        assert tls is not None and tls.certificate().grounds is not None
        nonce, channel = secrets.token_bytes(32), secrets.token_bytes(32)
        raw = await first.evidence_for(nonce, "client ab", channel, "party")
        claims = Claims.decode(Envelope.decode(raw).claims, Trail("test"))
        assert (claims.nonce, claims.channel, claims.node) == (nonce, channel, "party0")
        assert claims.tunnel == first.own.tunnel and claims.kem == hpke.digest(first.statement()["kem"])
        wanted = policies.load(three.policy)
        assert appraise(raw, wanted, Collateral(), claims, three.clock()).entry == "it"

    run(work, tmp_path)


def test_who_measures_otherwise_stays_out_and_both_say_why(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        three.machines[2].pcr7 = b"?" * 32
        for number in range(3):
            await three.start(number)
        with pytest.raises(AttestationError, match=r"policy\.pcr7"):
            await three.parties[2].check_own()
        await three.until(
            lambda: (
                three.agree(0, 1)
                and all(three.seen(by, of)["refusal"] for by, of in ((0, 2), (1, 2), (2, 0), (2, 1)))
            )
        )
        for by, of, who in ((0, 2, "us"), (1, 2, "us"), (2, 0, "peer"), (2, 1, "peer")):
            seen = three.seen(by, of)
            assert seen["state"] in ("refused", "exchanging") and seen["refusal"]["by"] == who
            assert seen["refusal"]["step"] == "policy.pcr7"
            assert "07" * 32 in seen["refusal"]["expected"] and "3f" * 32 in seen["refusal"]["got"]
        assert not three.gates[2].inside and 2 not in three.gates[0].inside
        # Once it is what it should be it is let in, without anybody's doing.
        three.machines[2].pcr7 = b"\7" * 32
        await three.until(lambda: three.agree(0, 1, 2))
        assert three.seen(0, 2)["refusal"] is None

    run(work, tmp_path)


def test_a_restarted_party_rejoins_by_itself(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        for number in (1, 2):  # the leader is late
            await three.start(number)
        await three.until(lambda: three.agree(1, 2))
        await three.until(lambda: "cannot reach" in str(three.parties[1].status()["peers"][0]["problem"]))
        await three.start(0)
        await three.until(lambda: three.agree(0, 1, 2))
        for number in (0, 2):
            before = {n: gate.inside.get(number) for n, gate in enumerate(three.gates)}
            await three.stop(number)
            await three.start(number)
            await three.until(lambda: three.agree(0, 1, 2))
            assert all(three.gates[n].inside[number] != before[n] for n in range(3) if n != number)

    run(work, tmp_path)


def test_verdicts_are_renewed_in_time_and_expel_when_they_end(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        for number in range(3):
            await three.start(number)
        await three.until(lambda: three.agree(0, 1, 2))
        admits = [len(gate.history) for gate in three.gates]
        evidence = three.seen(0, 1)["evidence"]
        three.shift += timedelta(minutes=41)
        await three.until(
            lambda: all(
                three.lasts(a, b) > timedelta(minutes=50) for a in range(3) for b in range(3) if a != b
            )
        )
        assert three.seen(0, 1)["evidence"] != evidence
        assert [len(gate.history) for gate in three.gates] == admits and three.agree(0, 1, 2)
        # One that is gone is expelled at the end of its verdict, and not asked in between.
        await three.stop(2)
        three.shift += timedelta(minutes=65)
        assert three.parties[0].admitted(2) is None  # at once, whatever the loop is doing
        await three.until(lambda: 2 not in three.gates[0].inside and 2 not in three.gates[1].inside)
        assert ("expel", 2, exchange.ENDED) in three.gates[0].history
        assert three.seen(0, 2)["state"] == "expired"
        await three.until(lambda: three.agree(0, 1))

    run(work, tmp_path)


def test_another_policy_is_taken_while_it_runs_and_never_goes_back(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        for number in range(3):
            await three.start(number)
        await three.until(lambda: three.agree(0, 1, 2))
        first = three.parties[0]
        before = first.view()["policy"]
        # Too few owners, or the same version again: what is in force stays.
        write_policy(tmp_path, version=2, signers=1)
        first.reload()
        write_policy(tmp_path, version=1, more="# other\n[crl]\nmax_age_h = 7\n")
        first.reload()
        await trio.sleep(0.3)
        assert first.view()["policy"] == before and three.agree(0, 1, 2)
        # One that says the same of them renews all, without touching a tunnel.
        write_policy(tmp_path, version=2, more="[crl]\nmax_age_h = 7\n")
        await three.until(
            lambda: all(
                (verdict := three.parties[a].admitted(b)) is not None and verdict.policy_version == 2
                for a in range(3)
                for b in range(3)
                if a != b
            )
        )
        assert three.agree(0, 1, 2)
        assert not [each for gate in three.gates for each in gate.history if each[0] == "expel"]
        # One that no longer wants a party expels it everywhere at once.
        gone = hashlib.sha256(
            bytes.fromhex("302a300506032b6570032100") + three.identities[2].public
        ).hexdigest()
        write_policy(tmp_path, version=3, more=f'[deny]\nidentities = ["{gone}"]\n')
        await three.until(lambda: not three.gates[2].inside or 2 not in three.gates[0].inside)
        await three.until(lambda: 2 not in three.gates[0].inside and 2 not in three.gates[1].inside)
        assert three.seen(0, 2)["state"] in ("refused", "exchanging")
        await three.until(lambda: three.agree(0, 1))
        # Not after a restart either.
        write_policy(tmp_path, version=2, more="[crl]\nmax_age_h = 7\n")
        with pytest.raises(AttestationError, match=r"policy\.version"):
            three.build(0)

    run(work, tmp_path)


def test_collateral_that_cannot_be_read_does_not_keep_a_policy_from_expelling(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        store = tmp_path / "collateral"
        store.mkdir()
        first = await three.start(0, collateral=store)
        await three.start(1)
        await three.until(lambda: three.agree(0, 1))
        await three.stop(1)  # one that answers no more: only the keeper himself can put it out
        gone = identity_hash(three.identities[1].public).hex()
        (store / "index.json").write_text("no index")
        write_policy(tmp_path, version=2, more=f'[deny]\nidentities = ["{gone}"]\n')
        await three.until(lambda: first.admitted(1) is None and not three.gates[0].inside)
        assert first.view()["policy"]["version"] == 2

    run(work, tmp_path)


def test_another_policy_in_the_middle_of_an_exchange_expels_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evidence that was made under the old one, and comes while the new one is being read, is no offence."""

    async def work(three: Three) -> None:
        other = tmp_path / "other"
        other.mkdir()
        hexes = [each.public_hex for each in OWNERS]
        theirs = PolicyFile(write_policy(other), hexes, 2, other / "policy.seen")
        first = await three.start(0)
        await three.start(1, policy_file=theirs)
        await three.until(lambda: three.agree(0, 1))
        read, reading, go_on = Admission._read_collateral, threading.Event(), threading.Event()

        def slowly(self: Admission) -> Collateral:
            if self is first:
                reading.set()
                go_on.wait(PATIENCE)
            return read(self)

        held, attest = trio.Event(), three.machines[1].attest

        async def late(claims: Claims) -> Envelope:
            held.set()
            await three.until(reading.is_set)
            return await attest(claims)

        monkeypatch.setattr(Admission, "_read_collateral", slowly)
        three.machines[1].attest = late  # type: ignore[method-assign]
        three.shift += timedelta(minutes=41)  # renewal is due
        with trio.fail_after(PATIENCE):
            await held.wait()
        write_policy(tmp_path, version=2, more="[crl]\nmax_age_h = 7\n")
        await three.until(reading.is_set)
        await trio.sleep(0.3)  # the evidence comes
        go_on.set()
        write_policy(other, version=2, more="[crl]\nmax_age_h = 7\n")
        await three.until(lambda: (verdict := first.admitted(1)) is not None and verdict.policy_version == 2)
        assert not [each for gate in three.gates for each in gate.history if each[0] == "expel"]

    run(work, tmp_path)


def test_the_record_of_the_policy_is_kept_strictly(tmp_path: Path) -> None:
    path, record = write_policy(tmp_path, version=5), tmp_path / "data" / "policy.seen"
    hexes = [each.public_hex for each in OWNERS]
    assert PolicyFile(path, hexes, 2, record).policy.version == 5
    assert json.loads(record.read_text())["version"] == 5
    write_policy(tmp_path, version=5, more="[crl]\nmax_age_h = 7\n")
    with pytest.raises(AttestationError, match="a higher version than 5"):
        PolicyFile(path, hexes, 2, record)
    for text in ("", "{}", '{"version": "5", "digest": ""}', "[5]"):
        record.write_text(text)
        with pytest.raises(BadInput, match=r"policy\.seen: does not say"):
            PolicyFile(path, hexes, 2, record)
    (tmp_path / "policy.toml.sig").unlink()
    record.unlink()
    with pytest.raises(AttestationError, match=r"policy\.signatures"):
        PolicyFile(path, hexes, 2, record)


def test_a_revoked_party_is_expelled_and_stays_out(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        for number in range(3):
            await three.start(number)
        await three.until(lambda: three.agree(0, 1, 2))
        raw = three.sign(identities=[three.identities[2].public_hex])
        assert three.revocations[0].offer(raw)
        await three.until(lambda: 2 not in three.gates[0].inside)
        await three.until(lambda: (three.seen(0, 2)["refusal"] or {}).get("step") == "revoked.identity")
        # The next exchange tells the others: no link of the mesh is needed for that.
        three.shift += timedelta(minutes=41)
        await three.until(lambda: 2 not in three.gates[1].inside and three.revocations[1].epoch == 1)
        await three.until(lambda: three.agree(0, 1))
        assert not any(party in three.gates[n].inside for n, party in ((0, 2), (1, 2)))
        # A measurement that all share: nobody is left.
        verdict = three.parties[0].admitted(1)
        assert verdict is not None and "07" * 32 in verdict.measurements
        held = three.revocations[0].statement
        more = held.extended(three.clock(), measurements=["07" * 32])
        signed = [Signature(e.public_hex, e.sign(more.message()).hex()) for e in OWNERS[:2]]
        assert three.revocations[0].offer(encode(more, signed))
        await three.until(lambda: not three.gates[0].inside and not three.gates[1].inside)

    run(work, tmp_path)


def test_a_revocation_takes_effect_at_once_and_outlives_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real admission, real store. Nothing that waits for a timer has a part in it: they are all far away."""

    async def work(three: Three) -> None:
        for number in range(3):
            await three.start(number)
        await three.until(lambda: three.agree(0, 1, 2))
        monkeypatch.setattr(bootstrap, "TICK_SECONDS", 1000.0)
        monkeypatch.setattr(bootstrap, "WATCH_SECONDS", 1000.0)
        await trio.sleep(0.1)  # the last short pauses are over
        assert three.revocations[0].offer(three.sign(identities=[three.identities[2].public_hex]))
        assert three.parties[0].admitted(2) is not None  # nobody has acted yet
        await three.until(lambda: 2 not in three.gates[0].inside)
        assert three.parties[0].admitted(2) is None
        monkeypatch.setattr(bootstrap, "TICK_SECONDS", 0.02)
        for number in range(3):  # all begin again, on the disks that they have
            await three.stop(number)
        before = len(three.gates[0].history)
        for number in range(3):
            await three.start(number)
        await three.until(lambda: three.agree(0, 1) and three.revocations[1].epoch == 1)
        await three.until(lambda: (three.seen(0, 2)["refusal"] or {}).get("step") == "revoked.identity")
        await three.until(lambda: 2 not in three.gates[1].inside)
        assert ("admit", 2, "") not in three.gates[0].history[before:]

    run(work, tmp_path)


def test_a_gate_that_is_slow_to_open_does_not_delay_an_expulsion(tmp_path: Path) -> None:
    """The name of a peer's tunnel may take its own time to be resolved: its owner may see to that."""

    async def work(three: Three) -> None:
        three.gates[0].slow = True
        await three.start(0)
        await three.start(1)
        await three.until(lambda: three.parties[0].admitted(1) is not None)
        await three.until(three.parties[0]._peers[1].gate.locked)
        assert three.revocations[0].offer(three.sign(identities=[three.identities[1].public_hex]))
        await three.until(lambda: any(each[0] == "expel" for each in three.gates[0].history))
        assert three.parties[0].admitted(1) is None and not three.gates[0].inside

    run(work, tmp_path)


def test_a_gate_that_did_not_close_is_closed_again(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        first = await three.start(0)
        await three.start(1)
        await three.until(lambda: three.agree(0, 1))
        three.gates[0].jammed = 1
        three.machines[1].pcr7 = b"?" * 32
        three.shift += timedelta(minutes=41)  # its evidence is refused, and it is to go
        await three.until(lambda: three.gates[0].jammed == 0)
        await three.until(lambda: not three.gates[0].inside)
        assert first.admitted(1) is None

    run(work, tmp_path)


def test_two_parties_need_two_machines(tmp_path: Path) -> None:
    """Whoever has another's identity key, or runs two parties, has not got two TPMs by that."""

    async def work(three: Three) -> None:
        three.machines[2].tpm = three.machines[1].tpm
        for number in range(3):
            await three.start(number)
        await three.parties[1].check_own()
        await three.until(
            lambda: any((three.seen(0, of)["refusal"] or {}).get("by") == "us" for of in (1, 2))
        )
        assert len(three.gates[0].inside) <= 1
        out = next(of for of in (1, 2) if three.seen(0, of)["refusal"])
        assert three.seen(0, out)["refusal"]["step"] == "parties.machine"
        # Nor does the machine itself work with another party on it.
        await three.until(lambda: (three.seen(1, 2)["refusal"] or {}).get("step") == "parties.machine")
        # With a machine of its own it is let in; the other one once what was admitted by that is renewed.
        three.machines[2].tpm = TPMS[2]
        three.shift += timedelta(minutes=41)
        await three.until(lambda: three.agree(0, 1, 2))

    run(work, tmp_path)


def test_two_that_come_at_once_with_one_machine_are_not_both_let_in(tmp_path: Path) -> None:
    """Neither has been admitted when the other one is judged: the last look is at the gate."""

    async def work(three: Three) -> None:
        three.machines[2].tpm = three.machines[1].tpm
        both = trio.Event()
        arrived: set[int] = set()

        def meet(number: int) -> Any:
            first = three.machines[number].attest

            async def attest(claims: Claims) -> Envelope:
                if claims.nonce_source.startswith("party0"):
                    arrived.add(number)
                    if len(arrived) == 2:
                        both.set()
                    await both.wait()
                return await first(claims)

            return attest

        for number in (1, 2):
            three.machines[number].attest = meet(number)  # type: ignore[method-assign]
        for number in range(3):
            await three.start(number)
        await three.until(lambda: bool(three.gates[0].inside))
        await three.until(
            lambda: any((three.seen(0, of)["refusal"] or {}).get("by") == "us" for of in (1, 2))
        )
        assert len(three.gates[0].inside) == 1

    run(work, tmp_path)


def test_a_peer_cannot_have_us_judge_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is who it says, and its evidence is bad: it may come again and again, and gets few looks."""
    monkeypatch.setattr(bootstrap, "BURST_SECONDS", 1000.0)

    async def work(three: Three) -> None:
        first, judged = await three.start(0), 0
        appraise_it = first._appraise

        def count(*given: Any) -> Any:
            nonlocal judged
            judged += 1
            return appraise_it(*given)

        monkeypatch.setattr(first, "_appraise", count)
        three.machines[1].pcr7 = b"?" * 32
        bad = three.build(1)
        for attempt in range(2 * bootstrap.BURST):
            end = bad._peers[0].pair.open(True)
            line = bootstrap._Line(await trio.open_tcp_stream("127.0.0.1", three.ports[0]))
            await line.send(end.start()[0].data)  # type: ignore[union-attr]
            patience = PATIENCE if attempt < bootstrap.BURST else 0.2  # then there is no answer
            with trio.move_on_after(patience), suppress(bootstrap._LineError, trio.BrokenResourceError):
                while not end.over:
                    for action in end.receive(await line.receive(end.limit), three.clock()):
                        if isinstance(action, exchange.Send):
                            await line.send(action.data)
                        elif isinstance(action, exchange.Attest):
                            envelope = await three.machines[1].attest(action.claims)
                            for each in end.attested(envelope, three.clock()):
                                assert isinstance(each, exchange.Send)
                                await line.send(each.data)
            end.close()
            await line.stream.aclose()
        assert 0 < judged <= bootstrap.BURST

    run(work, tmp_path)


def test_clients_do_not_keep_peers_from_the_machine(tmp_path: Path) -> None:
    """However many ask at once for evidence, which takes a TPM a second: one is in a peer's way."""

    async def work(three: Three) -> None:
        first, attest = await three.start(0), three.machines[0].attest
        inside = most = 0

        async def slow(claims: Claims) -> Envelope:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await trio.sleep(0.01)
            inside -= 1
            return await attest(claims)

        three.machines[0].attest = slow  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(first.evidence_for, bytes(32), "a client", bytes(32), "party")
        assert most == 1

    run(work, tmp_path)


def test_a_peer_can_give_us_its_own_certificates_alone(tmp_path: Path) -> None:
    """Not an older one of another peer, which would be shown in the place of that one's latest."""

    async def work(three: Three) -> None:
        first = await three.start(0)
        await three.start(2)
        await three.until(lambda: three.agree(0, 2))
        assert first._tls is not None
        old = first._peers[2].pair.standing
        assert old is not None and old.ours
        await three.start(1)
        three.parties[1]._peers[0].pair.judge.issue = lambda *given: old.ours  # type: ignore[method-assign]
        three.shift += timedelta(minutes=41)
        await three.until(lambda: three.lasts(0, 2) > timedelta(minutes=50))
        await three.until(lambda: three.lasts(0, 1) > timedelta(minutes=50) and three.agree(0, 1, 2))
        new = first._peers[2].pair.standing
        assert new is not None and new.ours != old.ours
        assert list(first._tls._issued.values()) == [new.ours]

    run(work, tmp_path)


def test_a_tunnel_that_does_not_come_up_gets_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "UP_SECONDS", 0.1)

    async def work(three: Three) -> None:
        seen: set[bytes] = set()

        def carries(party: int) -> bool:  # the first two keys do not
            seen.add(three.gates[0].inside[party][1])
            return party != 1 or len(seen) > 2

        three.gates[0].carries = carries
        await three.start(0)
        await three.start(1)
        await three.until(lambda: len(seen) > 2 and three.agree(0, 1))
        assert len([each for each in three.gates[1].history if each[0] == "admit"]) > 2

    run(work, tmp_path)


def test_a_gate_that_does_not_open_admits_nobody(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        three.gates[0].broken = "no device"
        await three.start(0)
        await three.start(1)
        await three.until(lambda: any(each[0] == "expel" for each in three.gates[0].history))
        assert three.parties[0].admitted(1) is None and not three.gates[0].inside
        three.gates[0].broken = ""
        await three.until(lambda: three.agree(0, 1))

    run(work, tmp_path)


def test_a_peer_that_moved_is_looked_for_where_it_called_from(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        admission = await three.start(0)
        peer = admission._peers[1]
        assert await admission._endpoint(peer, None) is None  # we called it
        assert await admission._endpoint(peer, "127.0.0.1") is None
        assert await admission._endpoint(peer, "192.0.2.7") == Address("192.0.2.7", 51820)
        assert bootstrap._plain("::ffff:192.0.2.7") == "192.0.2.7"
        peer.place = replace(peer.place, admission=Address("no.such.host.invalid", 1))
        assert await admission._endpoint(peer, "192.0.2.7") == Address("192.0.2.7", 51820)

    run(work, tmp_path)


def test_strangers_stop_nothing_and_are_given_little(tmp_path: Path) -> None:
    """They hold as many connections as they like, say what they like, claim to be who they like."""

    async def work(three: Three) -> None:
        await three.start(0)
        held = []
        for count in range(3 * MAX_STRANGERS):
            stream = await trio.open_tcp_stream("127.0.0.1", three.ports[0])
            if count % 3 == 1:
                await stream.send_all((1 << 30).to_bytes(4, "big"))
            elif count % 3 == 2:
                await stream.send_all((3).to_bytes(4, "big") + b"\1\1")
            held.append(stream)
        await three.until(lambda: len(three.parties[0]._strangers._held) <= MAX_STRANGERS)
        made = three.machines[0].made
        # Somebody says he is party 1, in a HELLO that is right in all but the key that he lacks.
        mallory = Identity.generate()
        own = Own(1, three.identities[1].public, mallory.sign, bytes(32), hpke.HpkeKey())
        believer = bootstrap._Judge(three.build(1), 0)
        pair = Pair(own, 0, three.identities[0].public, believer)
        end = pair.open(True)
        line = bootstrap._Line(await trio.open_tcp_stream("127.0.0.1", three.ports[0]))
        await line.send(end.start()[0].data)
        with trio.fail_after(PATIENCE):
            answers = end.receive(await line.receive(exchange.limit_of(Kind.HELLO)), three.clock())
            await line.send(answers[0].data)
            with pytest.raises((bootstrap._LineError, trio.BrokenResourceError)):
                await line.receive(exchange.limit_of(Kind.EVIDENCE))
        assert three.machines[0].made == made
        seen = three.seen(0, 1)
        assert seen["attempts"] == 0 and seen["refusal"] is None and seen["state"] == "unknown"
        await three.start(1)
        await three.until(lambda: three.agree(0, 1))
        for stream in held:
            await stream.aclose()

    run(work, tmp_path)


def test_crowds_make_room_at_their_own_expense() -> None:
    async def main() -> None:
        door = bootstrap._Strangers()
        gone: list[str] = []

        async def one(address: str, known: bool, number: int) -> None:
            with door.one(address, known):
                await trio.sleep_forever()
            gone.append(f"{address} {number}")

        async with trio.open_nursery() as nursery:

            async def come(address: str, known: bool = False, times: int = 1) -> None:
                for number in range(times):
                    nursery.start_soon(one, address, known, number)
                    await trio.testing.wait_all_tasks_blocked()

            await come("peer", True, 2)
            await come("a", times=bootstrap.MAX_PER_ADDRESS + 2)
            assert gone == ["a 0", "a 1"]  # its own oldest
            for number in range(MAX_STRANGERS - 2 - bootstrap.MAX_PER_ADDRESS):
                await come(f"b{number}")
            await come("c")
            assert gone[2:] == ["a 2"]  # the most crowded address
            assert len(door._held) == MAX_STRANGERS and sum(each[1] for each in door._held) == 2
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_whoever_is_not_of_this_federation_is_refused(tmp_path: Path) -> None:
    async def work(three: Three) -> None:
        await three.start(0)
        three.config = b"\1" * 32
        await three.start(1)
        await three.until(lambda: three.seen(0, 1)["refusal"] is not None)
        assert three.seen(0, 1)["refusal"]["step"] == "hello.config"
        await three.until(lambda: three.seen(1, 0)["refusal"] is not None)
        assert three.machines[0].made == three.machines[1].made == 0

    run(work, tmp_path)
