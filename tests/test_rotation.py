"""Rotation of tunnel keys: the exchange, the messages, and every state of a pair, explored to the end.

The model at the end runs two real state machines over a network that may lose, repeat, delay and reorder
every message, for ever, and crashes either end between any two steps. Keys and signatures are symbols there.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm

from mimir.net.identity import BadSignature, Identity, verify
from wg import rotation
from wg.errors import KeyFileError, NotPossibleHere
from wg.exchange import OFFER_BYTES, REPLY_BYTES, ExchangeError, HybridExchange
from wg.keys import ChainKey, PresharedKey
from wg.rotation import (
    BODY_BYTES,
    Drain,
    Drop,
    Generation,
    Kind,
    Phase,
    Raise,
    Record,
    Refused,
    Rotation,
    Route,
    Say,
    Send,
)

CONTEXT = bytes(range(32))


# --- the exchange ------------------------------------------------------------------------------------------


def test_both_ends_derive_the_same_keys_and_each_input_matters() -> None:
    hybrid = HybridExchange()
    transcript, chain = b"t" * 32, ChainKey(b"c" * 32)
    offer = hybrid.offer()
    assert len(offer.public) == OFFER_BYTES
    reply, _ = hybrid.accept(offer.public)
    assert len(reply) == REPLY_BYTES
    reply, theirs = hybrid.accept(offer.public)
    psk, next_chain = hybrid.derive(theirs, chain, transcript)
    seen = {bytes(next_chain.hex())}
    mine, _ = hybrid.derive(offer.finish(reply), chain, transcript)
    assert mine.hex() == psk.hex()
    for other in (
        hybrid.derive(offer.finish(reply), None, transcript),
        hybrid.derive(offer.finish(reply), ChainKey(b"d" * 32), transcript),
        hybrid.derive(offer.finish(reply), chain, b"u" * 32),
        # each half of the exchange alone: another curve key, another ciphertext
        hybrid.derive(offer.finish(hybrid.offer().public[:32] + reply[32:]), chain, transcript),
        hybrid.derive(offer.finish(reply[:32] + hybrid.accept(offer.public)[0][32:]), chain, transcript),
        (psk, next_chain),
    ):
        seen.add(bytes(other[0].hex()))
    assert len(seen) == 7


def test_exchange_refuses_what_is_no_key() -> None:
    hybrid = HybridExchange()
    offer = hybrid.offer()
    reply, _ = hybrid.accept(offer.public)
    for public in (b"", offer.public[:-1], bytes(32) + offer.public[32:], offer.public[:32] + b"\xff" * 1184):
        with pytest.raises(ExchangeError):
            hybrid.accept(public)
    for answer in (b"", reply + b"x", bytes(32) + reply[32:]):
        with pytest.raises(ExchangeError):
            offer.finish(answer)


def test_a_host_without_ml_kem_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UnsupportedAlgorithm("not here")

    monkeypatch.setattr("wg.exchange.MLKEM768PrivateKey.generate", refuse)
    with pytest.raises(NotPossibleHere, match="cryptography lacks; install its wheel of version 48"):
        HybridExchange().offer()


@pytest.mark.parametrize("kind", [PresharedKey, ChainKey])
def test_derived_keys_show_and_yield_nothing(kind: type[PresharedKey]) -> None:
    key = kind(b"\xab" * 32)
    assert "abab" not in repr(key)
    for use in (lambda: key == key, lambda: hash(key), lambda: bytes(key), lambda: pickle.dumps(key)):
        with pytest.raises(TypeError):
            use()
    key.wipe()
    with pytest.raises(KeyFileError, match="wiped"):
        key.hex()


# --- two real machines -------------------------------------------------------------------------------------


class Pair:
    """Leader 0 and follower 1 with real keys; actions are carried out at once, messages wait in `post`."""

    def __init__(self, context: tuple[bytes, bytes] = (CONTEXT, CONTEXT)) -> None:
        self.identities = [Identity.generate(), Identity.generate()]
        self.recorded: list[list[int]] = [[], []]
        self.context = context
        self.ends = [self.fresh(0), self.fresh(1)]
        self.post: list[tuple[int, bytes]] = []
        self.done: list[list[Any]] = [[], []]

    def fresh(self, index: int) -> Rotation:
        peer = self.identities[1 - index].public
        return Rotation(
            index,
            1 - index,
            self.identities[index].sign,
            lambda message, signature: verify(peer, message, signature),
            self.context[index],
            (1, 2),
            seen=max(self.recorded[index], default=0),
            refusals=(BadSignature,),
        )

    def act(self, index: int, actions: list[Any]) -> None:
        end = self.ends[index]
        for action in actions:
            self.done[index].append(action)
            match action:
                case Send(data):
                    self.post.append((1 - index, data))
                case Record(epoch):
                    self.recorded[index].append(epoch)
                case Drop(generation):
                    generation.wipe()
                case Raise(generation):
                    self.act(index, end.raised(generation))

    def deliver(self) -> tuple[int, bytes]:
        index, data = self.post.pop(0)
        self.act(index, self.ends[index].receive(data))
        return index, data

    def settle(self) -> None:
        """Deliver, prove and drain until nothing is left to do."""
        while True:
            if self.post:
                self.deliver()
                continue
            for index, end in enumerate(self.ends):
                if (
                    end.candidate
                    and end.phase is Phase.PROVING
                    and end.candidate.transcript in self.up(1 - index)
                ):
                    self.act(index, end.proved(end.candidate))
                    break
                if end.draining and end.old:
                    self.act(index, end.drained(end.old))
                    break
            else:
                return

    def up(self, index: int) -> set[bytes]:
        end = self.ends[index]
        return {each.transcript for each in (end.live, end.old, end.candidate) if each}

    def rotate(self) -> Generation:
        self.act(0, self.ends[0].want())
        self.settle()
        leader, follower = (end.live for end in self.ends)
        assert leader and follower and leader.transcript == follower.transcript
        assert leader.preshared.hex() == follower.preshared.hex()
        assert leader.peer_key == follower.private.public() and follower.peer_key == leader.private.public()
        return leader


def test_generations_follow_one_another_and_old_keys_are_wiped() -> None:
    pair = Pair()
    first = pair.rotate()
    second = pair.rotate()
    assert (first.epoch, second.epoch) == (1, 2) and first.slot != second.slot
    for key in (first.private, first.preshared, first.chain):
        assert "wiped" in repr(key)
    assert pair.recorded == [[1, 2], [1, 2]]
    assert [action.what for action in pair.done[0] if isinstance(action, Say)] == [
        "begun",
        "accepted",
        "committed",
    ] * 2
    # Nothing is sent of an epoch that is not recorded, and nothing is dropped before the route has moved.
    kinds = [type(action) for action in pair.done[1] if not isinstance(action, Say | Send)]
    assert kinds == [Record, Raise, Route, Record, Raise, Route, Drain, Drop]


def test_the_chain_binds_a_generation_to_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: list[bool] = []
    derive = HybridExchange.derive

    def watched(self: HybridExchange, shared: Any, chain: ChainKey | None, transcript: bytes) -> Any:
        mixed.append(chain is not None)
        return derive(self, shared, chain, transcript)

    monkeypatch.setattr(HybridExchange, "derive", watched)
    pair = Pair()
    pair.rotate()
    assert mixed == [False, False]
    pair.rotate()
    assert mixed[2:] == [True, True]
    pair.ends[1] = pair.fresh(1)  # restarted: it has no chain, and says so
    pair.rotate()
    assert mixed[4:] == [False, False]


def test_follower_asks_and_restarted_ends_rejoin_above_all_that_was_used() -> None:
    pair = Pair()
    pair.rotate()
    for index, epoch in ((1, 2), (0, 3)):
        pair.ends[index] = pair.fresh(index)
        pair.act(index, pair.ends[index].resend())
        pair.settle()
        assert [end.live.epoch for end in pair.ends if end.live] == [epoch, epoch]
    pair.act(1, pair.ends[1].want())
    pair.settle()
    assert [end.live.epoch for end in pair.ends if end.live] == [4, 4]


def test_a_leader_whose_record_was_lost_is_told_the_count() -> None:
    pair = Pair()
    for _ in range(3):
        pair.rotate()
    pair.recorded[0].clear()
    pair.ends[0] = pair.fresh(0)
    pair.act(0, pair.ends[0].resend())
    with pytest.raises(rotation.RefusedWithAnswer, match="offer: epoch: 1 is not above 3") as caught:
        pair.deliver()
    pair.post.append((0, caught.value.answer.data))
    pair.settle()
    assert pair.recorded[0] == [1, 3]
    pair.act(0, pair.ends[0].resend())
    pair.settle()
    assert [end.live.epoch for end in pair.ends if end.live] == [4, 4]


def stages() -> Iterator[tuple[Pair, int, bytes]]:
    """Every message of a second rotation, at the moment before it is delivered."""
    for stop in range(20):
        pair = Pair()
        pair.rotate()
        pair.act(0, pair.ends[0].want())
        for _ in range(stop):
            pair.deliver()
            if not pair.post:
                for index, end in enumerate(pair.ends):
                    if end.candidate and end.phase is Phase.PROVING:
                        pair.act(index, end.proved(end.candidate))
            if not pair.post:
                return
        yield pair, *pair.post[0]


def test_a_pair_that_is_ended_anywhere_leaves_no_key() -> None:
    """What becomes of the pair then is what becomes of it after a crash: see the model."""
    for index in (0, 1):
        for pair, _, _ in stages():
            end = pair.ends[index]
            kept = [each for each in (end.live, end.old, end.candidate) if each is not None]
            keys = [key for each in kept for key in (each.private, each.preshared, each.chain)]
            keys += [end._offering.private] if end._offering is not None else []
            assert keys
            end.forget()
            assert all("wiped" in repr(key) for key in keys) and not pair.up(index)


def shape(end: Rotation) -> tuple[Any, ...]:
    return (end.seen, end.live, end.old, end.candidate, end.phase, end.heard_ready, end.confirmed)


def test_every_message_is_refused_if_a_bit_of_it_is_changed() -> None:
    kinds = set()
    for pair, index, data in stages():
        end, before = pair.ends[index], shape(pair.ends[index])
        kinds.add(Kind(data[0]))
        places = {*range(11), *range(len(data) - 64, len(data)), *range(11, len(data) - 64, 37)}
        for at in places:
            changed = bytearray(data)
            changed[at] ^= 1 << (at % 8)
            with pytest.raises(Refused):
                end.receive(bytes(changed))
        for wrong in (b"", data[:-1], data + b"x", data[:11]):
            with pytest.raises(Refused, match="form"):
                end.receive(wrong)
        assert shape(end) == before
    assert kinds == {Kind.OFFER, Kind.ACCEPT, Kind.READY, Kind.COMMIT, Kind.DONE}


def resigned(pair: Pair, index: int, data: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The message as its own sender would have signed it otherwise: what a cheating peer can send."""
    signed = bytearray(data[:-64])
    change(signed)
    message = bytes(signed)
    return message + pair.identities[index].sign(b"wg rotation 1: announcement\0" + CONTEXT + message)


def refusal(end: Rotation, data: bytes) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        end.receive(data)
    return caught.value.step, caught.value.item


def test_refusals_name_the_step() -> None:
    pair = Pair()
    stranger = Identity.generate()
    pair.act(0, pair.ends[0].want())
    _, offer = pair.post[0]
    follower, leader = pair.ends[1], pair.ends[0]
    signed = offer[:-64]
    label = b"wg rotation 1: announcement\0"
    # wrong signature: another identity, another mesh
    assert refusal(follower, signed + stranger.sign(label + CONTEXT + signed)) == ("offer", "signature")
    other = pair.identities[0].sign(label + bytes(32) + signed)
    assert refusal(follower, signed + other) == ("offer", "signature")
    # what its sender may not say, or not to us
    assert refusal(leader, resigned(pair, 1, offer, lambda m: m.__setitem__(slice(1, 3), b"\1\0"))) == (
        "offer",
        "role",
    )
    assert refusal(follower, resigned(pair, 0, offer, lambda m: m.__setitem__(2, 2))) == ("offer", "party")
    assert refusal(follower, resigned(pair, 0, offer, lambda m: m.__setitem__(0, 99))) == ("message", "form")
    # keys that are none
    assert refusal(
        follower, resigned(pair, 0, offer, lambda m: m.__setitem__(slice(107, 139), bytes(32)))
    ) == (
        "offer",
        "exchange",
    )
    pair.deliver()
    _, accept = pair.post[0]
    assert refusal(leader, resigned(pair, 1, accept, lambda m: m.__setitem__(11, m[11] ^ 1))) == (
        "accept",
        "offer",
    )
    assert refusal(leader, resigned(pair, 1, accept, lambda m: m.__setitem__(139, 0))) == ("accept", "port")
    assert refusal(
        leader, resigned(pair, 1, accept, lambda m: m.__setitem__(slice(140, 172), bytes(32)))
    ) == (
        "accept",
        "exchange",
    )
    pair.settle()
    live = follower.live
    assert live is not None
    # said at the wrong time
    assert refusal(leader, accept) == ("accept", "offer")
    assert refusal(follower, offer) == ("offer", "epoch")
    for sender, kind, step in ((0, Kind.COMMIT, "commit"), (0, Kind.ABORT, "abort"), (1, Kind.DONE, "done")):
        message = pair.ends[sender]._message(kind, 1, b"?" * 32).data
        assert refusal(pair.ends[1 - sender], message) == (step, "generation")
    assert refusal(leader, pair.ends[1]._message(Kind.STALE, 1, b"?" * 32).data) == ("stale", "offer")
    pair.act(0, leader.want())
    pair.deliver()
    assert follower.candidate is not None
    early = leader._message(Kind.COMMIT, 2, follower.candidate.transcript).data
    assert refusal(follower, early) == ("commit", "order")
    assert follower.live is live


def test_announcements_of_the_past_are_refused_also_after_a_restart() -> None:
    pair = Pair()
    pair.act(0, pair.ends[0].want())
    old = [pair.post[0]]
    while pair.post:
        old.append(pair.post[0])
        pair.deliver()
    pair.settle()
    pair.rotate()
    for restarted in (False, True):
        if restarted:
            pair.ends = [pair.fresh(0), pair.fresh(1)]
        for index, data in old:
            before = shape(pair.ends[index])
            assert refusal(pair.ends[index], data)[0] == Kind(data[0]).step
            assert shape(pair.ends[index]) == before


def test_a_spliced_key_never_becomes_a_generation() -> None:
    """An ACCEPT carries the follower's key for this very offer: that of another rotation, or with another
    key under the follower's own signature, gives another transcript, which no READY will ever name."""
    one, two = Pair(), Pair()
    two.identities = one.identities
    two.ends = [two.fresh(0), two.fresh(1)]
    for pair in (one, two):
        pair.act(0, pair.ends[0].want())
        pair.deliver()
    _, foreign = two.post[0]
    assert refusal(one.ends[0], foreign) == ("accept", "offer")
    _, accept = one.post.pop(0)
    key = HybridExchange().key().public().raw
    one.act(0, one.ends[0].receive(resigned(one, 1, accept, lambda m: m.__setitem__(slice(75, 107), key))))
    leader, follower = one.ends
    assert leader.candidate and follower.candidate
    assert leader.candidate.transcript != follower.candidate.transcript
    assert leader.candidate.preshared.hex() != follower.candidate.preshared.hex()  # so no handshake either
    one.act(1, follower.proved(follower.candidate))
    one.deliver()
    one.act(0, leader.proved(leader.candidate))
    assert leader.live is None and isinstance(one.done[0][-1], Send)
    one.settle()
    assert follower.live is None and follower.candidate is None  # told ABORT


def test_parties_of_another_federation_do_not_understand_each_other() -> None:
    pair = Pair((CONTEXT, bytes(32)))
    pair.act(0, pair.ends[0].want())
    assert refusal(pair.ends[1], pair.post[0][1]) == ("offer", "signature")


def test_garbage_never_raises_anything_else(rng: Any) -> None:
    pair = Pair()
    pair.rotate()
    dice = random.Random(int(rng.integers(1 << 32)))
    for _ in range(2000):
        kind = dice.randrange(10)
        size = dice.choice([0, 1, 75, 107, BODY_BYTES.get(kind, 5) + 75])  # type: ignore[call-overload]
        data = bytearray(dice.randbytes(size))
        data[:3] = bytes([kind, 0, 1])[: len(data)]
        with pytest.raises(Refused):
            pair.ends[1].receive(bytes(data))


# --- the model ---------------------------------------------------------------------------------------------


@cache
def _named(name: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(repr(name).encode(), digest_size=32).digest()


@dataclass(frozen=True)
class Symbol:
    """A key of any kind. Equal symbols are equal keys."""

    name: tuple[Any, ...]

    @property
    def raw(self) -> bytes:
        return _named(self.name)

    def public(self) -> Symbol:
        return Symbol(("public", self.name))

    def wipe(self) -> None: ...


@dataclass(frozen=True)
class SymbolicOffer:
    name: tuple[Any, ...]

    @property
    def public(self) -> bytes:
        return Symbol(self.name).raw.ljust(OFFER_BYTES, b"o")

    def finish(self, reply: bytes) -> Symbol:
        return Symbol((self.public[:32], reply[:32]))


@dataclass(frozen=True)
class Symbolic:
    """Keys named after the node, its life and a count that the world keeps, so that they never repeat."""

    world: World
    node: int

    def key(self) -> Any:
        return Symbol(("key", self.node, self.world.count(self.node)))

    def offer(self) -> Any:
        return SymbolicOffer(("offer", self.node, self.world.count(self.node)))

    def accept(self, public: bytes) -> Any:
        reply = Symbol(("reply", self.node, self.world.count(self.node))).raw
        return reply.ljust(REPLY_BYTES, b"r"), Symbol((public[:32], reply))

    def derive(self, shared: Any, chain: Any, transcript: bytes) -> Any:
        return Symbol(("psk", shared, chain, transcript)), Symbol(("chain", shared, chain, transcript))


@cache
def symbolic_signature(node: int, message: bytes) -> bytes:
    return hashlib.blake2b(message, key=bytes([node])).digest()


def symbolic_verify(node: int, message: bytes, signature: bytes) -> None:
    if symbolic_signature(node, message) != signature:
        raise BadSignature("no")


class Broken(Exception):
    """A property does not hold."""


Machine = Callable[..., Rotation]


class World:
    """Two nodes, what was ever said, what each has on disk, and how often each may still crash."""

    def __init__(self, machine: Machine, crashes: int, wants: int, durable: bool = True) -> None:
        self.machine, self.durable = machine, durable
        self.disk = [0, 0]
        self.lives = [0, 0]
        self.counts = [0, 0]
        self.crashes, self.wants = [crashes, crashes], wants
        self.said: frozenset[tuple[int, bytes]] = frozenset()
        self.proved: frozenset[tuple[int, bytes]] = frozenset()
        self.born: dict[bytes, tuple[int, int]] = {}  # transcript -> lives of both ends when it was made
        self.used: dict[tuple[Kind, bytes], bytes] = {}  # epoch -> its only OFFER, its only ACCEPT
        self.fresh: list[tuple[int, bytes]] = []  # said since the last look, for `settle`
        self.ends = [self._start(0), self._start(1)]

    def _start(self, node: int) -> Rotation:
        return self.machine(
            node,
            1 - node,
            sign=lambda message: symbolic_signature(node, message),
            verify=lambda message, signature: symbolic_verify(1 - node, message, signature),
            context=CONTEXT,
            offsets=(1, 2),
            seen=self.disk[node],
            exchange=Symbolic(self, node),
            refusals=(BadSignature,),
            nonce=lambda: bytes(32),
        )

    def count(self, node: int) -> tuple[int, int]:
        self.counts[node] += 1
        return self.lives[node], self.counts[node]

    def copy(self, *nodes: int) -> World:
        """A world of its own as far as these nodes go; what the other one holds may be shared."""
        other = object.__new__(World)
        other.__dict__.update(self.__dict__)
        other.disk, other.lives, other.counts = [*self.disk], [*self.lives], [*self.counts]
        other.crashes, other.ends, other.fresh = [*self.crashes], [*self.ends], []
        for node in nodes:
            twin = object.__new__(type(self.ends[node]))
            twin.__dict__.update(self.ends[node].__dict__)
            twin.exchange = Symbolic(other, node)
            other.ends[node] = twin
        return other

    def key(self, whole: bool = True) -> tuple[Any, ...]:
        """Equal for worlds of equal futures; without `whole`, if nothing said so far arrives any more."""
        ends = tuple(
            (
                end.seen,
                name(end.live),
                name(end.old),
                name(end.candidate),
                end.phase,
                end.draining,
                end.heard_ready,
                end.confirmed,
                end.wanted,
                end._offering.id if end._offering else b"",
            )
            for end in self.ends
        )
        proved = frozenset(pair for pair in self.proved if pair[1] in self.up(0) | self.up(1))
        key = (ends, *self.disk, *self.lives, proved)
        return (*key, *self.crashes, self.wants, self.said) if whole else key

    def forget(self) -> None:
        self.said = frozenset(pair for pair in self.said if self.matters(pair[1]))

    def up(self, node: int) -> set[bytes]:
        end = self.ends[node]
        return {each.transcript for each in (end.live, end.old, end.candidate) if each}

    def matters(self, data: bytes) -> bool:
        """Whether a message can still change anything. What names keys that are gone cannot: they never come
        back. Every OFFER matters, for all time."""
        kind, named = Kind(data[0]), data[11:43]
        leader, follower = self.ends
        if kind in (Kind.ACCEPT, Kind.STALE):
            return leader._offering is not None and named == leader._offering.id
        if kind is Kind.ABORT:
            epoch = int.from_bytes(data[3:11], "big")
            current = follower.candidate is not None and named in (
                follower.candidate.transcript,
                follower._offer_id,
            )
            return epoch > follower.seen or current
        if kind in (Kind.READY, Kind.COMMIT, Kind.DONE):
            return named in self.up(0) | self.up(1)
        return True

    def generations(self, node: int) -> dict[bytes, Generation]:
        end = self.ends[node]
        return {each.transcript: each for each in (end.live, end.old, end.candidate) if each}

    def steps(self) -> Iterator[tuple[int, str, Callable[[World], None]]]:
        """All that may happen next: at which node, what, and how."""
        for to, data in self.said:
            yield to, Kind(data[0]).step, lambda w, n=to, d=data: w.receive(n, d)  # type: ignore[misc]
        for node, end in enumerate(self.ends):
            yield node, "resend", lambda w, n=node: w.act(n, w.ends[n].resend())  # type: ignore[misc]
            if self.wants:
                yield node, "want", lambda w, n=node: w.want(n)  # type: ignore[misc]
            if end.busy:
                yield node, "expire", lambda w, n=node: w.act(n, w.ends[n].expire())  # type: ignore[misc]
            if old := end.old if end.draining else None:
                yield node, "drained", lambda w, n=node, g=old: w.act(n, w.ends[n].drained(g))  # type: ignore[misc]
            if new := end.candidate if end.phase is Phase.RAISING else None:
                yield node, "raised", lambda w, n=node, g=new: w.act(n, w.ends[n].raised(g))  # type: ignore[misc]
            if self.provable(node):
                yield node, "proved", lambda w, n=node: w.prove(n)  # type: ignore[misc]
            if self.crashes[node]:
                yield node, "crash", lambda w, n=node: w.crash(n)  # type: ignore[misc]

    def provable(self, node: int) -> bool:
        """A handshake and an echo need both interfaces, and the same keys."""
        end, other = self.ends[node], self.ends[1 - node]
        if end.candidate is None or end.phase is not Phase.PROVING:
            return False
        theirs = self.generations(1 - node).get(end.candidate.transcript)
        return (
            theirs is not None
            and not (theirs is other.candidate and other.phase is Phase.RAISING)
            and theirs.preshared == end.candidate.preshared
            and theirs.peer_key.raw == end.candidate.private.public().raw
        )

    def receive(self, node: int, data: bytes) -> None:
        try:
            self.act(node, self.ends[node].receive(data))
        except rotation.RefusedWithAnswer as refused:
            self.act(node, [refused.answer])
        except Refused:
            pass

    def want(self, node: int) -> None:
        self.wants -= 1
        self.act(node, self.ends[node].want())

    def prove(self, node: int) -> None:
        candidate = self.ends[node].candidate
        assert candidate is not None
        self.proved |= {(node, candidate.transcript)}
        self.act(node, self.ends[node].proved(candidate))

    def crash(self, node: int) -> None:
        self.crashes[node] -= 1
        self.lives[node] += 1
        self.counts[node] = 0
        self.ends[node] = self._start(node)

    def act(self, node: int, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Record(epoch):
                    if self.durable:
                        self.disk[node] = max(self.disk[node], epoch)
                case Send(data):
                    self.say(node, data)
                case Raise(generation):
                    if generation.transcript not in self.born:
                        self.born = {**self.born, generation.transcript: (self.lives[0], self.lives[1])}
                case Route(generation):
                    for each in (0, 1):
                        if (each, generation.transcript) not in self.proved:
                            raise Broken("a route moved to a generation that is not proved at both ends")
                case Drop(generation):
                    if generation is self.ends[node].live:
                        raise Broken("the generation in use was dropped")

    def say(self, node: int, data: bytes) -> None:
        kind = Kind(data[0])
        if kind in (Kind.OFFER, Kind.ACCEPT):
            self.used = {(kind, data[3:11]): data, **self.used}
            if self.used[kind, data[3:11]] != data:
                raise Broken("an epoch served twice")
        if kind is Kind.ASK:  # all mean the same
            self.said = frozenset(pair for pair in self.said if pair[1][0] != kind)
        self.said |= {(1 - node, data)}
        self.fresh.append((1 - node, data))

    def check(self) -> None:
        """What holds in every state, however it came about."""
        ours, theirs = self.generations(0), self.generations(1)
        for transcript in ours.keys() & theirs.keys():
            if ours[transcript].preshared != theirs[transcript].preshared:
                raise Broken("one transcript, two pre-shared keys")
        for node, end in enumerate(self.ends):
            if end.live is None or self.born[end.live.transcript] != tuple(self.lives):
                continue  # a restarted node has lost it, which no protocol can help
            if end.live.transcript not in self.up(1 - node):
                raise Broken("one end sends on a generation that the other no longer has")

    def settle(self) -> bool:
        """Whether both come to one generation and rest, if from now on nothing is lost and nobody crashes."""
        world = self
        for _ in range(12):
            for node in (0, 1):
                world.act(node, world.ends[node].resend())
            busy = True
            while busy:
                busy = bool(world.fresh)
                for node, data in world.take_fresh():
                    world.receive(node, data)
                for node, end in enumerate(world.ends):
                    if end.phase is Phase.RAISING and end.candidate:
                        world.act(node, end.raised(end.candidate))
                        busy = True
                    if world.provable(node):
                        world.prove(node)
                        busy = True
                    if end.draining and end.old:
                        world.act(node, end.drained(end.old))
                        busy = True
            if world.rests():
                return True
            for node, end in enumerate(world.ends):
                if end.busy:
                    world.act(node, end.expire())
        return False

    def take_fresh(self) -> list[tuple[int, bytes]]:
        fresh, self.fresh = self.fresh, []
        return fresh

    def rests(self) -> bool:
        first, second = (end.live for end in self.ends)
        return (
            first is not None
            and second is not None
            and first.transcript == second.transcript
            and not any(end.busy or end.old or end.wanted or not end.confirmed for end in self.ends)
        )


def name(generation: Generation | None) -> bytes:
    return generation.transcript + bytes([generation.slot]) if generation else b""


def explore(  # breadth first, so that the way to a failure is a shortest one
    machine: Machine = Rotation,
    *,
    crashes: int,
    epochs: int,
    wants: int = 0,
    durable: bool = True,
    established: bool = False,
) -> int:
    """Every state that can be reached, from nothing or from a first generation in use; raises `Broken` with
    the way there. Returns how many there are."""
    start = World(machine, crashes, wants, durable)
    if established:
        assert start.settle()
        start.forget()
    parents: dict[Any, tuple[Any, str]] = {start.key(): (None, "start")}
    settled: set[Any] = set()
    queue = deque([start])
    while queue:
        world = queue.popleft()
        here = world.key()
        try:
            world.check()
            if (short := world.key(whole=False)) not in settled:
                settled.add(short)
                if not world.copy(0, 1).settle():
                    raise Broken("does not come to rest")
            for node, what, step in world.steps():
                then = world.copy(node)
                try:
                    step(then)
                except Broken as problem:
                    raise Broken(f"{problem}; at: {what} at {node}") from None
                if then.ends[0].seen > epochs:
                    continue
                then.forget()
                key = then.key()
                if key not in parents:
                    parents[key] = (here, f"{what} at {node}")
                    queue.append(then)
        except Broken as problem:
            way = []
            while here is not None:
                here, what = parents[here]
                way.append(what)
            raise Broken(f"{problem}; after: {', '.join(reversed(way))}") from None
    return len(parents)


@pytest.mark.slow
def test_every_reachable_state_is_safe_and_heals() -> None:
    """In a rotation from one generation to the next, and from nothing; each end may crash once, anywhere."""
    assert explore(crashes=1, epochs=2, wants=1, established=True) > 1000
    assert explore(crashes=1, epochs=2) > 2500


def mutant(**methods: Any) -> Machine:
    return type("Mutant", (Rotation,), methods)


def _gives_up_in_doubt(self: Rotation) -> list[Any]:
    return self._give_up() if self.busy else []


def _commits_unheard(self: Rotation) -> list[Any]:
    self.heard_ready = True
    return Rotation._commit_if_due(self)


def _forgets_the_old_at_once(self: Rotation) -> list[Any]:
    out = Rotation._commit_if_due(self)
    return [*out, *self._drop_old()] if out else out


def _does_not_repeat_commit(self: Rotation) -> list[Any]:
    return [] if not self.confirmed else Rotation.resend(self)


def _does_not_answer_ready(self: Rotation, epoch: int, name: bytes) -> list[Any]:
    known = self.candidate is not None and name == self.candidate.transcript
    return Rotation._on_ready(self, epoch, name) if known else []


def _accepts_any_epoch(self: Rotation, epoch: int, body: bytes, data: bytes) -> list[Any]:
    self.seen = min(self.seen, epoch - 1)
    return Rotation._on_offer(self, epoch, body, data)


def _ignores_what_the_leader_uses(self: Rotation, epoch: int, body: bytes, data: bytes) -> list[Any]:
    out = self._give_up() if self.in_doubt and epoch > self.seen else []
    return out + Rotation._on_offer(self, epoch, body, data)


def _ready_before_proof(self: Rotation, generation: Generation) -> list[Any]:
    out = Rotation.raised(self, generation)
    return out + Rotation.proved(self, generation) if not self.leads else out


def _does_not_ask(self: Rotation) -> list[Any]:
    return []


def _mixes_any_chain(self: Rotation, live: bytes) -> Any:
    return self.live.chain if self.live else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine, why",
    [
        (mutant(expire=_gives_up_in_doubt), "no longer has"),
        (mutant(_commit_if_due=_commits_unheard), "not proved at both ends"),
        (mutant(_commit_if_due=_forgets_the_old_at_once), "no longer has"),
        (mutant(resend=_does_not_repeat_commit), "come to rest"),
        (mutant(_on_ready=_does_not_answer_ready), "come to rest"),
        (mutant(_on_offer=_accepts_any_epoch), "served twice"),
        (mutant(_on_offer=_ignores_what_the_leader_uses), "no longer has"),
        (mutant(raised=_ready_before_proof), "not proved at both ends"),
        (mutant(_ask=_does_not_ask), "come to rest"),
        (mutant(_common_chain=_mixes_any_chain), "come to rest"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(k for k in vars(value) if k[:2] != "__"),
)
def test_the_model_sees_each_rule_taken_away(machine: Machine, why: str) -> None:
    with pytest.raises(Broken, match=why):
        explore(machine, crashes=1, epochs=2, wants=1, established=True)
        explore(machine, crashes=1, epochs=2)


def test_the_model_sees_an_epoch_that_was_not_recorded() -> None:
    with pytest.raises(Broken, match="served twice"):
        explore(crashes=1, epochs=2, durable=False)
