"""What is revoked: statements that only grow, a store that never goes back, gossip, and what it ends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
import pytest
import trio
from federation import running, until_ready, write_federation
from service import NAMES, World, world
from structlog.testing import capture_logs
from test_certificates import at
from test_certificates import write_federation as write_client
from test_client import PROMPT, open_one
from trio.testing import MockClock
from trust import MEASUREMENT, TUNNEL, Owners, signature, verdict_on

from mimir import config as configuration
from mimir.__main__ import main
from mimir.actors.peer import PartyService
from mimir.admission import revocation
from mimir.admission.revocation import (
    GOSSIP,
    KINDS,
    MAX_ITEMS,
    Gossip,
    Revocations,
    Statement,
    context_of,
    decode,
    encode,
    enforce,
)
from mimir.admission.tls import utc_now
from mimir.attest import signatures
from mimir.attest.appraisal import Verdict
from mimir.client import federation as federation_file
from mimir.client.connection import PartyError, connect
from mimir.client.session import connect_all
from mimir.errors import AbortError, AttestationError, BadInput, ConfigError, EnvironmentMissing, PeerError
from mimir.net.control import serve_control
from mimir.net.identity import Identity
from mimir.net.memory import MemoryNet
from mimir.net.messages import Open, Sampler

PARTIES = [Identity.generate() for _ in range(3)]
KEYS = tuple(each.public_hex for each in PARTIES)
OWNERS = Owners(KEYS)
CLIENT = "cc" * 32
SECONDS = 5.0  # from a statement at one party to its effect at all


def store(folder: Path, name: str = "revocations", owners: Owners = OWNERS) -> Revocations:
    return Revocations(folder / name, owners.context, owners.keys, owners.threshold)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(60):
            await test()

    trio.run(guarded)


def virtually(test: Callable[[], Awaitable[None]]) -> None:
    """With a clock that jumps when nothing happens: seconds are exact, and take none."""
    trio.run(test, clock=MockClock(autojump_threshold=0))


# --- statements --------------------------------------------------------------------------------------------


def test_a_statement_survives_the_way_and_the_file(tmp_path: Path) -> None:
    made = OWNERS.statement(
        7,
        identities=[KEYS[1], CLIENT],
        certificates=["01" * 32],
        measurements=[MEASUREMENT, "02" * 32, "03" * 64],
        tunnels=[TUNNEL],
    )
    signatures = tuple(signature(each, made) for each in OWNERS.signers[:2])
    assert decode(encode(made, signatures)) == (made, signatures)
    revocation.save(tmp_path / "s.toml", made, signatures)
    assert revocation.load(tmp_path / "s.toml") == (made, signatures)
    empty = OWNERS.statement(1)
    revocation.save(tmp_path / "s.toml", empty, ())
    assert revocation.load(tmp_path / "s.toml") == (empty, ())


def test_the_digest_covers_everything() -> None:
    made = OWNERS.statement(7, identities=[KEYS[1]])
    others = [
        replace(made, epoch=8),
        replace(made, context="00" * 32),
        replace(made, issued=datetime(2026, 1, 1, tzinfo=UTC)),
        *(replace(made, **{kind: frozenset({"ab" * 32})}) for kind in KINDS),
    ]
    assert len({each.digest() for each in (made, *others)}) == len(others) + 1


def test_extending_raises_the_epoch_and_only_if_something_is_new() -> None:
    now = datetime(2026, 11, 27, tzinfo=UTC)
    first = OWNERS.statement(3, identities=[KEYS[1]])
    longer = first.extended(now, identities=[CLIENT], tunnels=[TUNNEL])
    assert longer.epoch == 4 and longer.covers(first) and not first.covers(longer)
    assert first.extended(now, identities=[KEYS[1]]) == first
    joined = longer.joined(OWNERS.statement(9, measurements=[MEASUREMENT]), now)
    assert joined.epoch == 10 and joined.covers(longer) and MEASUREMENT in joined.measurements


def test_what_is_no_statement_is_refused() -> None:
    made = OWNERS.statement(7, identities=[KEYS[1], CLIENT])
    raw = OWNERS.sign(made)
    outer = cbor2.loads(raw)
    inner = cbor2.loads(outer[2])

    def with_inner(**changes: Any) -> bytes:
        changed = inner | {int(key[1:]): value for key, value in changes.items()}
        return cbor2.dumps(outer | {2: cbor2.dumps(changed, canonical=True)}, canonical=True)

    assert with_inner() == raw
    for bad in (
        b"",
        raw + b"\0",
        raw[:-1],
        bytes(revocation.MAX_STATEMENT + 1),
        cbor2.dumps(outer),  # not canonical: keys happen to be, so the next ones say it
        with_inner(_2=0),
        with_inner(_2=True),
        with_inner(_2=-1),
        with_inner(_2=1 << 48),
        with_inner(_3=0),
        with_inner(_1=b"x"),
        with_inner(_4=[bytes.fromhex(CLIENT)] * 2),
        with_inner(_4=sorted(map(bytes.fromhex, made.identities), reverse=True)),
        with_inner(_4=[bytes(31)]),
        with_inner(_4="x"),
        with_inner(_6=[bytes(33)]),
        with_inner(_8=[]),
        with_inner(_4=[n.to_bytes(32, "big") for n in range(MAX_ITEMS + 1)]),
        cbor2.dumps(outer | {1: 2}, canonical=True),
        cbor2.dumps(outer | {1: True}, canonical=True),
        cbor2.dumps(outer | {3: [[bytes(32), bytes(63)]]}, canonical=True),
        cbor2.dumps(outer | {3: [[bytes(32), bytes(64)]] * 65}, canonical=True),
        cbor2.dumps(outer | {4: 0}, canonical=True),
        cbor2.dumps([1, 2, 3], canonical=True),
    ):
        if bad == raw:
            continue
        with pytest.raises(AttestationError) as caught:
            decode(bad)
        assert caught.value.step.startswith("revocation."), bad[:40]
    for offset in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[offset] ^= 1 << offset % 8
        try:
            decode(bytes(changed))
        except AttestationError:
            pass


def test_a_file_of_owners_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    made = OWNERS.statement(7, identities=[KEYS[1]])
    revocation.save(file, made, [signature(OWNERS.signers[0], made)])
    text = file.read_text()
    for old, new in (
        ("epoch = 7", "epoch = 0"),
        ("epoch = 7", "epock = 7"),
        ("format = 1", "format = 2"),
        (KEYS[1], KEYS[1][:-2]),
        (OWNERS.context, "x" * 64),
        ("tunnels = []", 'tunnels = "any"'),
        ("T12:07:00Z", "T12:07:00"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=r"s\.toml"):
            revocation.load(file)
    file.write_text(text.replace("epoch = 7", "epoch = 8"))
    assert revocation.load(file)[1] == ()  # the signature was over another text


# --- the store ---------------------------------------------------------------------------------------------


def test_a_store_takes_what_enough_owners_signed_and_only_forward(tmp_path: Path) -> None:
    known = store(tmp_path)
    assert known.epoch == 0 and known.raw == b""
    first, second = OWNERS.revoke(1, identities=[CLIENT]), OWNERS.revoke(5, identities=[CLIENT, KEYS[1]])
    assert known.offer(first) is True and known.offer(first) is False
    assert known.offer(second) is True and known.raw == second
    other = Owners([KEYS[0], KEYS[1], CLIENT])
    stranger = Owners(KEYS)
    longer = OWNERS.statement(6, identities=[CLIENT, KEYS[1]], tunnels=[TUNNEL])
    forged = encode(longer, [signature(OWNERS.signers[0], longer), signature(OWNERS.signers[0], longer)])
    wrong = encode(
        longer, [signature(OWNERS.signers[0], longer), signature(OWNERS.signers[1], known.statement)]
    )
    for step, raw in (
        ("revocation.epoch", first),  # a replay
        ("revocation.epoch", OWNERS.revoke(4, identities=[CLIENT, KEYS[1], KEYS[2]])),
        ("revocation.superset", OWNERS.revoke(6, identities=[KEYS[1]])),  # forgives the client
        ("revocation.superset", OWNERS.revoke(6, measurements=[MEASUREMENT])),
        ("revocation.context", other.revoke(6, identities=[CLIENT, KEYS[1]])),
        ("revocation.signatures", stranger.sign(longer)),
        ("revocation.signatures", OWNERS.sign(longer, [0])),
        ("revocation.signatures", OWNERS.sign(longer, [])),
        ("revocation.signatures", forged),  # one owner twice
        ("revocation.signature", wrong),
    ):
        at(step, partial(known.offer, raw))
        assert known.epoch == 5 and known.raw == second
    assert known.offer(OWNERS.sign(longer, [0, 2])) is True


def test_another_set_of_signatures_is_the_same_statement(tmp_path: Path) -> None:
    known = store(tmp_path)
    made = OWNERS.statement(1, identities=[CLIENT])
    assert known.offer(OWNERS.sign(made, [0, 1])) is True
    assert known.offer(OWNERS.sign(made, [1, 2])) is False


def test_two_statements_of_one_epoch_are_shouted_about_and_can_be_healed(tmp_path: Path) -> None:
    known = store(tmp_path)
    ours, theirs = OWNERS.statement(3, identities=[CLIENT]), OWNERS.statement(3, identities=[KEYS[2]])
    known.offer(OWNERS.sign(ours))
    unsigned = OWNERS.sign(theirs, [0])
    at("revocation.signatures", partial(known.offer, unsigned))
    assert known.status()["forks"] == []  # one owner alone cannot raise the alarm
    with capture_logs() as logs:
        at("revocation.fork", partial(known.offer, OWNERS.sign(theirs)))
        at("revocation.fork", partial(known.offer, OWNERS.sign(theirs)))
    assert [each["log_level"] for each in logs] == ["error"] and "TWO STATEMENTS" in logs[0]["event"]
    assert known.status()["forks"] == [theirs.digest().hex()]
    assert decode((tmp_path / "revocations.fork").read_bytes())[0] == theirs
    assert known.statement == ours
    assert known.offer(OWNERS.sign(ours.joined(theirs, datetime.now(UTC)))) is True


def test_a_store_remembers_over_a_restart_and_refuses_older_then(tmp_path: Path) -> None:
    old, new = OWNERS.revoke(1, identities=[CLIENT]), OWNERS.revoke(2, identities=[CLIENT, KEYS[1]])
    known = store(tmp_path)
    known.offer(old)
    known.offer(new)
    again = store(tmp_path)
    assert (again.epoch, again.raw) == (2, new)
    at("revocation.epoch", partial(again.offer, old))
    at("revoked.identity", partial(again.check, identity=KEYS[1]))
    assert (tmp_path / "revocations").stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["revocations"]


def test_a_damaged_store_is_no_empty_one(tmp_path: Path) -> None:
    file = tmp_path / "revocations"
    store(tmp_path).offer(OWNERS.revoke(1, identities=[CLIENT]))
    whole = file.read_bytes()
    for damage in (b"", whole[:-1], whole + b"\0", bytes(len(whole)), whole[:40] + b"x" + whole[41:]):
        file.write_bytes(damage)
        with pytest.raises(BadInput, match="does not hold the revocations"):
            store(tmp_path)
    file.write_bytes(Owners(KEYS).revoke(1))  # signed by owners of somebody else
    with pytest.raises(BadInput, match=r"revocation\.signatures"):
        store(tmp_path)
    file.write_bytes(whole)
    with pytest.raises(BadInput, match=r"revocation\.context"):
        Revocations(file, context_of([CLIENT]), OWNERS.keys, 2)
    file.unlink()
    file.mkdir()
    with pytest.raises(BadInput, match="directory"):
        store(tmp_path)
    for threshold in (0, 4):
        with pytest.raises(BadInput, match="owners must sign"):
            Revocations(tmp_path / "x", OWNERS.context, OWNERS.keys, threshold)


def test_nothing_is_in_force_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at each step of writing: the next start finds the old or the new statement, whole, and the new one
    counts only once it is there."""
    old, new = OWNERS.revoke(1, identities=[CLIENT]), OWNERS.revoke(2, identities=[CLIENT, KEYS[1]])
    calls: list[str] = []
    real = {name: getattr(revocation.os, name) for name in ("write", "fsync", "replace")}

    def watched(name: str, fail_at: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            if len(calls) == fail_at:
                raise OSError(28, "No space left on device")
            return real[name](*arguments)

        return call

    for fail_at in range(1, 6):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        known = store(folder)
        known.offer(old)
        calls.clear()
        for name in real:
            monkeypatch.setattr(revocation.os, name, watched(name, fail_at))
        if fail_at == 5:  # the four steps: no more than these
            assert known.offer(new) is True
            assert calls == ["write", "fsync", "replace", "fsync"]
        else:
            with pytest.raises(EnvironmentMissing, match="cannot be written"):
                known.offer(new)
            assert known.epoch == 1
        monkeypatch.undo()
        assert store(folder).raw == (new if fail_at >= 4 else old)
        if fail_at < 5:
            assert known.offer(new) is True  # offered again, once there is room


def test_each_kind_of_item_is_looked_for(tmp_path: Path) -> None:
    known = store(tmp_path)
    known.check(identity=CLIENT, tunnel=TUNNEL, certificate="01" * 32, measurements=[MEASUREMENT])
    known.offer(
        OWNERS.revoke(
            1, identities=[CLIENT], tunnels=[TUNNEL], certificates=["01" * 32], measurements=[MEASUREMENT]
        )
    )
    at("revoked.identity", partial(known.check, identity=CLIENT))
    at("revoked.tunnel", partial(known.check, tunnel=TUNNEL))
    at("revoked.certificate", partial(known.check, certificate="01" * 32))
    at("revoked.measurement", partial(known.check, measurements=["09" * 48, MEASUREMENT]))
    known.check(identity=TUNNEL, tunnel=CLIENT, certificate=MEASUREMENT, measurements=["01" * 32])


# --- gossip and what it does -------------------------------------------------------------------------------


class Admission:
    """What the admission of one party is for revocation: everybody admitted, until expelled."""

    def __init__(self, net: MemoryNet | None, party: int, **changes: Any) -> None:
        now = utc_now()
        self.verdicts: dict[int, Verdict] = {
            peer: verdict_on(KEYS[peer], now, **changes) for peer in range(3) if peer != party
        }
        self.expelled: list[tuple[int, str, float]] = []
        self.issued: dict[int, list[str]] = {}
        self._net, self._party = net, party

    def admitted(self, party: int) -> Verdict | None:
        return self.verdicts.get(party)

    def certificates(self, party: int) -> Iterable[str]:
        return self.issued.get(party, ())

    async def expel(self, party: int, why: str) -> None:
        del self.verdicts[party]
        self.expelled.append((party, why, trio.current_time()))
        if self._net is not None:
            self._net.cut(self._party, party)


class Three:
    """Three parties in memory that gossip and enforce."""

    def __init__(self, folder: Path) -> None:
        self.net = MemoryNet()
        self.known = [store(folder, f"party{party}") for party in range(3)]
        self.admissions = [Admission(self.net, party) for party in range(3)]

    def start(self, nursery: trio.Nursery, parties: Iterable[int] = range(3)) -> None:
        for party in parties:
            others = {peer: KEYS[peer] for peer in range(3) if peer != party}
            gossip = Gossip(self.net.party(party), self.known[party])
            nursery.start_soon(gossip.run)
            nursery.start_soon(enforce, self.known[party], self.admissions[party], others)

    async def agree(self, epoch: int, parties: Iterable[int] = range(3)) -> None:
        for party in parties:
            await self.known[party].wait_past(epoch - 1)
        for _ in range(10):
            await trio.lowlevel.checkpoint()  # for whoever acts on it


@pytest.mark.parametrize("first", range(3))
def test_a_statement_at_one_party_expels_everywhere_within_the_time(tmp_path: Path, first: int) -> None:
    async def test() -> None:
        three = Three(tmp_path)
        async with trio.open_nursery() as nursery:
            three.start(nursery)
            await trio.sleep(0.3)
            began = trio.current_time()
            three.known[first].offer(OWNERS.revoke(1, identities=[KEYS[2]]))
            with trio.fail_after(SECONDS):
                await three.agree(1)
            for party in (0, 1):
                ((gone, why, when),) = three.admissions[party].expelled
                assert gone == 2 and "revoked.identity" in why and when - began < SECONDS
            assert three.admissions[2].expelled == []  # the others are not revoked
            nursery.cancel_scope.cancel()

    virtually(test)


@pytest.mark.parametrize(
    "items, step",
    [
        ({"measurements": [MEASUREMENT]}, "revoked.measurement"),
        ({"tunnels": [TUNNEL]}, "revoked.tunnel"),
        ({"certificates": ["07" * 32]}, "revoked.certificate"),
    ],
)
def test_whatever_an_admission_rests_on_ends_it(tmp_path: Path, items: dict[str, Any], step: str) -> None:
    async def test() -> None:
        known, admission = store(tmp_path), Admission(None, 0)
        admission.issued[2] = ["06" * 32, "07" * 32]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(enforce, known, admission, {1: KEYS[1], 2: KEYS[2]})
            await trio.sleep(1)
            assert admission.expelled == []
            known.offer(OWNERS.revoke(1, **items))
            await trio.sleep(1)
            gone = {party for party, why, _ in admission.expelled if step in why}
            assert gone == ({2} if "certificates" in items else {1, 2})
            nursery.cancel_scope.cancel()

    virtually(test)


def test_what_was_missed_is_asked_for(tmp_path: Path) -> None:
    """A party that was away learns within the time once it is there."""

    async def test() -> None:
        three = Three(tmp_path)
        three.net.kill(2)
        async with trio.open_nursery() as nursery:
            three.start(nursery)
            three.known[0].offer(OWNERS.revoke(1, identities=[CLIENT]))
            three.known[0].offer(OWNERS.revoke(4, identities=[CLIENT], tunnels=["08" * 32]))
            await three.agree(4, (0, 1))
            await trio.sleep(20)
            assert three.known[2].epoch == 0
            three.net.revive(2)
            with trio.fail_after(SECONDS):
                await three.agree(4)
            nursery.cancel_scope.cancel()

    virtually(test)


def test_nobody_is_moved_by_what_a_liar_says(tmp_path: Path) -> None:
    """Party 2 sends garbage, old and unsigned statements, and claims epochs that there are not."""

    async def test() -> None:
        three = Three(tmp_path)
        held = OWNERS.revoke(3, identities=[CLIENT])
        liar = three.net.party(2)
        lies: list[bytes] = [
            b"garbage",
            OWNERS.revoke(2, identities=[CLIENT]),
            Owners(KEYS).revoke(9, identities=[KEYS[0]]),
            OWNERS.sign(OWNERS.statement(9, identities=[KEYS[0], CLIENT]), [1]),
            OWNERS.revoke(9, identities=[KEYS[0]]),
        ]
        told: list[Any] = []

        async def lie(peer: int, body: dict[str, Any]) -> dict[str, Any]:
            told.append(body["epoch"])
            raw = lies[len(told) % len(lies)]
            return {"epoch": 1 << 40, "digest": bytes(32), "statement": raw}

        liar.on_request(GOSSIP, lie)
        async with trio.open_nursery() as nursery:
            for known in three.known[:2]:
                known.offer(held)
            three.start(nursery, (0, 1))
            with capture_logs() as logs:
                await trio.sleep(60)
                for body in (
                    {},
                    {"epoch": -1, "digest": bytes(32), "statement": b""},
                    {"epoch": 1 << 60, "digest": bytes(32), "statement": b""},
                    {"epoch": 1, "digest": b"", "statement": b""},
                    {"epoch": True, "digest": bytes(32), "statement": b""},
                    {"epoch": 1, "digest": bytes(32), "statement": "x"},
                ):
                    with pytest.raises(PeerError, match="refused"):
                        await liar.request(0, GOSSIP, body, 5)
            assert len(told) > 50
            assert {each["event"] for each in logs} == {"a peer's revocations are not taken"}
            assert len(logs) == 2 * 4  # at each of the two once for each step, not once a second
            assert [each.epoch for each in three.known[:2]] == [3, 3]
            assert three.admissions[0].expelled == three.admissions[1].expelled == []
            nursery.cancel_scope.cancel()

    virtually(test)


def test_a_fork_is_seen_by_both_sides_and_healed_by_a_longer_statement(tmp_path: Path) -> None:
    async def test() -> None:
        three = Three(tmp_path)
        one, two = OWNERS.statement(2, identities=[CLIENT]), OWNERS.statement(2, tunnels=["08" * 32])
        async with trio.open_nursery() as nursery:
            three.known[0].offer(OWNERS.sign(one))
            three.known[1].offer(OWNERS.sign(two))
            three.start(nursery)
            with capture_logs() as logs:
                await trio.sleep(SECONDS)
            assert three.known[0].status()["forks"] == [two.digest().hex()]
            assert three.known[1].status()["forks"] == [one.digest().hex()]
            assert sum("TWO STATEMENTS" in each["event"] for each in logs) == 3  # once at each party
            three.known[2].offer(OWNERS.sign(one.joined(two, datetime.now(UTC))))
            with trio.fail_after(SECONDS):
                await three.agree(3)
            nursery.cancel_scope.cancel()

    virtually(test)


# --- at the doors ------------------------------------------------------------------------------------------


def test_a_revoked_client_is_cut_off_in_the_middle_of_its_session(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made, AsyncExitStack() as stack:
            assert made.owners is not None
            session = await open_one(stack, made, max_new=8)
            await session.prompt(PROMPT)
            await session.token()
            other = await open_one(stack, made, client=1)
            raw = made.owners.revoke(1, identities=[made.clients[0].public_hex])
            for known in made.revocations:
                known.offer(raw)
            with pytest.raises(PartyError):  # what was sent before may still be read
                while await session.token() is not None:
                    pass
                await session.prompt(PROMPT, buckets=[8], max_new=8)
                await session.token()
            await other.prompt(PROMPT)
            assert await other.token() is not None  # and no other
            with pytest.raises(PartyError):
                async with connect_all(made.federation, made.clients[0]):
                    pass

    run(test)


def test_clients_carry_statements_between_parties_and_refuse_a_revoked_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made:
            assert made.owners is not None
            async with connect_all(made.federation, made.clients[0]):
                pass
            made.revocations[2].offer(made.owners.revoke(1, identities=[made.clients[1].public_hex]))
            async with connect_all(made.federation, made.clients[0]):
                pass
            assert [each.epoch for each in made.revocations] == [1, 1, 1]
            mine = made.federation.revocations()
            assert mine is not None and mine.epoch == 1  # kept, for the next time
            both = [made.clients[1].public_hex, made.keys[0]]
            made.revocations[1].offer(made.owners.revoke(2, identities=both))
            with pytest.raises(PartyError, match=r"alpha.*revoked\.identity"):
                async with connect_all(made.federation, made.clients[0]):
                    pass
            tls = made.federation.client_tls(made.clients[0], made.federation.revocations())
            assert made.tls[2].certificate().grounds is None  # that one was by the party that is revoked
            made.tls[0].revocations = None  # and that party does not want to know
            assert made.tls[0].certificate().grounds is not None
            with pytest.raises(PartyError, match=r"revoked\.identity"):  # now before a word is said
                async with connect(
                    made.federation.parties[0], made.clients[0], within=20, silence=20, tls=tls
                ):
                    pass

    run(test)


def test_the_certificate_of_an_expelled_party_is_refused_though_it_lasts(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made:
            assert made.owners is not None
            shown = made.tls[1].certificate()
            async with connect_all(made.federation, made.clients[0]):
                pass
            # The party itself goes on showing it: it has not heard, or does not want to.
            made.tls[1].revocations = None
            raw = made.owners.revoke(1, certificates=[shown.fingerprint])
            made.revocations[0].offer(raw)
            with pytest.raises(PartyError, match=r"revoked\.certificate"):
                async with connect_all(made.federation, made.clients[0]):
                    pass
            mine = made.federation.revocations()
            tls = made.federation.client_tls(made.clients[0], mine)
            with pytest.raises(PartyError, match=r"revoked\.certificate"):
                async with connect(
                    made.federation.parties[1], made.clients[0], within=20, silence=20, tls=tls
                ):
                    pass

    run(test)


def test_a_client_without_tls_hears_that_it_is_revoked(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, trust=True) as made:
            assert made.owners is not None
            made.revocations[0].offer(made.owners.revoke(1, identities=[made.clients[0].public_hex]))
            door = made.configs[0]
            async with trio.open_nursery() as nursery:
                serve = partial(serve_control, revocations=made.revocations[0])
                (place,) = await nursery.start(serve, door, made.identities[0], made.parties[0])
                party = replace(made.federation.parties[0], port=place.port)
                with pytest.raises(BadInput, match="your key is revoked"):
                    async with connect(party, made.clients[0], within=20, silence=20) as connection:
                        await connection.send({"t": "status"})
                        await connection.receive("status")
                nursery.cancel_scope.cancel()

    run(test)


def test_a_session_ends_with_its_revoked_client_and_none_begins_with_a_revoked_party(tmp_path: Path) -> None:
    """The party's own half, without waiting for the session to notice that a client is gone."""

    async def test() -> None:
        async with world(tmp_path, trust=True) as made, trio.open_nursery() as nursery:
            assert made.owners is not None
            service = PartyService(made.configs[0], MemoryNet().party(0), made.parties[0].store, nursery)
            service.revocations = made.revocations[0]
            ran = trio.Event()

            async def forever(gathering: Any) -> None:
                ran.set()
                await trio.sleep_forever()

            service._run = forever  # type: ignore[method-assign]
            keys = made.clients[0].public_hex, made.clients[1].public_hex
            terms = Open(bytes(16), made.model, keys, (8, 8), 4, Sampler(), False)
            handles = [SimpleNamespace(key=key) for key in keys]
            errors: list[Exception] = []
            with trio.CancelScope() as cut:

                async def second() -> None:
                    try:
                        await service.open(handles[1], terms)  # type: ignore[arg-type]
                    except Exception as error:
                        errors.append(error)

                async def stop() -> None:
                    await ran.wait()
                    assert service.status()["sessions"] == 1
                    cut.cancel()  # as the door does

                nursery.start_soon(second)
                nursery.start_soon(stop)
                await service.open(handles[0], terms)  # type: ignore[arg-type]
            assert cut.cancelled_caught
            while not errors:
                await trio.lowlevel.checkpoint()
            assert isinstance(errors[0], AbortError) and service.status()["sessions"] == 0
            made.revocations[0].offer(made.owners.revoke(1, identities=[made.keys[2]]))
            with pytest.raises(BadInput, match=r"party 2 \(gamma\) is revoked"):
                await service.open(handles[0], terms)  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()

    run(test)


def test_three_real_parties_end_sessions_and_tell_each_other(tmp_path: Path) -> None:
    """Processes' own code over TCP: a client pushes to one, all three act, and know it after a restart."""
    owners_of = [Identity.generate() for _ in range(2)]
    keys = [each.public_hex for each in owners_of]
    extra = f'[attestation]\nmode = "off"\nowners = ["{keys[0]}", "{keys[1]}"]\nthreshold = 2\n'
    configs, (client, second) = write_federation(tmp_path, extra, clients=2)
    loaded = [configuration.load(each) for each in configs]
    context = context_of(each.identity for each in loaded[0].peers)
    revoked = Identity.load(tmp_path / "client1.key").public_hex
    made = Statement(context, 1, datetime.now(UTC).replace(microsecond=0), frozenset({revoked}))
    raw = encode(made, [signature(each, made) for each in owners_of])

    async def test() -> None:
        async with running(configs):
            await until_ready(client)
            fed, me = federation_file.load(client), Identity.load(tmp_path / "client0.key")
            async with connect(fed.parties[1], me, within=20, silence=20) as connection:
                await connection.send({"t": "revoke", "statement": raw})
                assert (await connection.receive("revoked"))["epoch"] == 1
            theirs = federation_file.load(second)
            for party in theirs.parties:
                while True:  # until it has heard; the whole test has a deadline
                    try:
                        async with connect(
                            party, Identity.load(theirs.client_key), within=20, silence=20
                        ) as connection:
                            await connection.send({"t": "status"})
                            await connection.receive("status")
                    except BadInput as error:
                        assert "revoked" in str(error)
                        break
                    except PartyError:
                        pass
                    await trio.sleep(0.05)
        for each in loaded:
            kept = Revocations(each.data_dir / revocation.FILE, context, keys, 2)
            assert kept.epoch == 1

    run(test)


def test_a_real_party_with_tls_tells_its_state_before_it_is_admitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs, (client,) = write_federation(tmp_path, "[tls]\nenabled = true\n")
    client.write_text(client.read_text() + "[tls]\nenabled = true\n")

    async def test() -> None:
        async with running(configs):
            while await trio.to_thread.run_sync(main, ["status", "--federation", str(client)]) != 0:
                capsys.readouterr()
                await trio.sleep(0.05)
            assert capsys.readouterr().out.count("no peer has admitted it") == 3
            ask = ["generate", "x", "--federation", str(client)]
            assert await trio.to_thread.run_sync(main, ask) == 8
            assert "no TLS 1.3 with it" in capsys.readouterr().err

    run(test)


# --- the command -------------------------------------------------------------------------------------------


@asynccontextmanager
async def commanded(tmp: Path) -> AsyncIterator[tuple[World, Callable[..., Awaitable[int]]]]:
    """Parties, and `mimir revoke` run against them in a thread."""
    async with world(tmp, trust=True) as made:
        assert made.owners is not None
        file = tmp / "f.toml"
        write_client(file, made)
        for number, owner in enumerate(made.owners.signers):
            owner.save(tmp / f"owner{number}.key")

        async def revoke(*arguments: str) -> int:
            whole = ["revoke", "--statement", str(tmp / "s.toml"), "--federation", str(file), *arguments]
            return await trio.to_thread.run_sync(main, whole)

        yield made, revoke


def test_owners_sign_one_after_another_and_push(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with commanded(tmp_path) as (made, revoke):
            assert made.owners is not None
            key = "--key", str(tmp_path / "owner0.key")
            assert await revoke("--peer", "beta", "--client", CLIENT, "--measurement", MEASUREMENT, *key) == 0
            out, err = capsys.readouterr()
            assert "epoch 1" in out and f"revoked  identity {CLIENT}" in out and "1 of 2 signatures" in err
            assert await revoke("--push") == 10
            out, err = capsys.readouterr()
            for name in NAMES:
                assert f"{name}: party {name} refused: revocation.signatures" in out
            assert [each.epoch for each in made.revocations] == [0, 0, 0]
            assert await revoke("--key", str(tmp_path / "owner2.key"), "--push", "--json") == 0
            events = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
            assert [each["event"] for each in events] == ["statement", "pushed", "pushed", "pushed"]
            assert events[0]["enough"] is True and all(each["held"] for each in events[1:])
            at("revoked.identity", partial(made.revocations[0].check, identity=made.keys[1]))
            at("revoked.identity", partial(made.revocations[1].check, identity=CLIENT))
            at("revoked.measurement", partial(made.revocations[2].check, measurements=[MEASUREMENT]))
            # More goes under the next epoch, and the signatures are gone.
            assert await revoke("--tunnel", TUNNEL, "--certificate", "01" * 32) == 0
            statement, signatures = revocation.load(tmp_path / "s.toml")
            assert (
                statement.epoch == 2 and signatures == () and statement.covers(made.revocations[0].statement)
            )
            assert await revoke("--tunnel", TUNNEL) == 0  # is in it already
            assert revocation.load(tmp_path / "s.toml")[0].epoch == 2

    run(test)


def test_an_owner_begins_from_what_the_parties_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with commanded(tmp_path) as (made, revoke):
            assert made.owners is not None
            assert await revoke("--fetch") == 8
            assert "no party" in capsys.readouterr().err
            held = made.owners.statement(6, identities=[CLIENT])
            made.revocations[2].offer(made.owners.sign(held))
            assert await revoke("--fetch") == 0
            assert revocation.load(tmp_path / "s.toml")[0] == held
            assert await revoke("--fetch", "--tunnel", TUNNEL) == 0  # nothing newer; then extended
            assert revocation.load(tmp_path / "s.toml")[0].epoch == 7
            # Meanwhile other owners signed another epoch 7: both go into one above.
            made.revocations[1].offer(made.owners.revoke(7, identities=[CLIENT, made.keys[2]]))
            assert await revoke("--fetch") == 0
            joined, signatures = revocation.load(tmp_path / "s.toml")
            assert joined.epoch == 8 and joined.identities == {CLIENT, made.keys[2]}
            assert joined.tunnels == {TUNNEL} and signatures == ()

    run(test)


def test_a_party_that_is_away_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with commanded(tmp_path) as (made, revoke):
            file = tmp_path / "f.toml"
            port = made.federation.parties[2].port
            file.write_text(file.read_text().replace(f"port = {port}", "port = 1"))
            for number in (0, 1):
                assert await revoke("--client", CLIENT, "--key", str(tmp_path / f"owner{number}.key")) == 0
            capsys.readouterr()
            assert await revoke("--push") == 8
            out, err = capsys.readouterr()
            assert "alpha: holds epoch 1" in out and "cannot be reached" in out and "push again" in err

    run(test)


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        ([], 2, "nothing to revoke"),
        (["--peer", "delta"], 2, "the parties are alpha, beta, gamma"),
        (["--measurement", "00"], 2, "64 or 96 or 128 hexadecimal digits"),
        (["--client", "xx"], 2, "64 hexadecimal digits"),
        (["--client", CLIENT, "--key", "/nonexistent"], 2, "/nonexistent"),
    ],
)
def test_what_cannot_be_revoked_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        'client_key = "c.key"\n'
        + "".join(
            f'[[parties]]\nname = "{name}"\nhost = "h"\nport = 1\nidentity = "{key}"\n'
            for name, key in zip(NAMES, KEYS, strict=True)
        )
    )
    statement = str(tmp_path / "s.toml")
    assert main(["revoke", "--statement", statement, "--federation", str(file), *arguments]) == code
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err
    assert not Path(statement).exists()
    assert main(["revoke", "--statement", statement, "--client", CLIENT]) == 2
    assert "give --federation FILE" in capsys.readouterr().err
    revocation.save(Path(statement), Owners([CLIENT]).statement(1), ())
    assert main(["revoke", "--statement", statement, "--federation", str(file)]) == 2
    assert "other parties" in capsys.readouterr().err


def test_more_signatures_than_owners_cannot_be_asked_for(tmp_path: Path) -> None:
    configs, (client,) = write_federation(tmp_path)
    for file, table in ((configs[0], "attestation"), (client, "revocation")):
        head = f"[{table}]\n" + ('mode = "off"\n' if table == "attestation" else "")
        text = file.read_text().replace(head, "") + head
        load = configuration.load if table == "attestation" else federation_file.load
        file.write_text(f'{text}owners = ["{CLIENT}"]\nthreshold = 2\n')
        with pytest.raises(ConfigError, match=rf"{table}\.threshold"):
            load(file)
        file.write_text(f'{text}owners = ["{CLIENT}"]\n')
        load(file)


def test_the_same_words_in_policies_and_statements_are_different_signatures() -> None:
    """A signature over one kind of message is none over another."""
    made = OWNERS.statement(1)
    assert made.message().startswith(b"mimir revocation signature\0")
    signed = signature(OWNERS.signers[0], made)
    assert signatures.verifies(made.message(), signed)
    assert not signatures.verifies(b"mimir policy signature\0" + made.digest(), signed)
