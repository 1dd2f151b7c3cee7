"""How two nodes change the keys between them: messages and states, without I/O.

One `Rotation` is one node's side of one pair. Bytes and events go in, actions come out; `wg.generations`
sends, raises interfaces and keeps time. A *generation* is one interface at each end with fresh static keys
and a pre-shared key that both ends derived (`wg.exchange`). The lower index *leads*: it alone begins and it
alone decides; the other one *follows*.

    leader                                          follower
    begin: record epoch
    OFFER   key, exchange, nonce, live        ->    record epoch, raise the interface, then
                                              <-    ACCEPT  key, exchange, nonce, live, port
    raise the interface, handshake, prove           prove once the leader has handshaken, then
                                              <-    READY
    proved, and READY heard: move the route
    COMMIT                                    ->    move the route, drain the old generation
                                              <-    DONE
    drain the old generation

Every message is signed by the sender's identity over a label, the federation's context and all its fields.
OFFER and ACCEPT are bound to each other by hash, and the hash of both, the *transcript*, names the generation
in every later message. Rules, each of which the model in tests/test_rotation.py sees broken when it is taken
away:

1. An epoch is recorded durably before anything of it is sent, so that no number serves twice, whatever
   crashes. A follower accepts only epochs above all that it has recorded: an old announcement is refused,
   also after a restart.
2. Until it is ready, a follower may give a candidate up. From READY on it is in doubt and keeps the candidate
   receiving until the leader's word, since the leader may have moved its route already. The word is COMMIT,
   ABORT, or the next OFFER, which says what the leader is using.
3. The leader moves its route when it has proved the generation itself and heard READY; the follower when it
   hears COMMIT. Either way the other end is receiving on it by then.
4. The leader lets the old generation go when it hears DONE, or when an ACCEPT shows that the follower has
   gone on or lost it; the follower when it hears COMMIT, or an OFFER that means the same.
5. A generation in use is never given up for nothing: only a proven one replaces it.

Lost messages: OFFER, READY and COMMIT are repeated by `resend` until answered; the answers are repeated on
each repetition. A restarted node has no generation: the leader begins at once, the follower sends ASK. A
leader whose record was lost is told by STALE how far the follower has counted.
"""

from __future__ import annotations

import enum
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from wg.errors import WgError
from wg.exchange import OFFER_BYTES, REPLY_BYTES, Exchange, ExchangeError, HybridExchange, Offer
from wg.keys import KEY_BYTES, ChainKey, PresharedKey, PrivateKey, PublicKey

HASH_BYTES = 32
NONCE_BYTES = 32
SIGNATURE_BYTES = 64
CONTEXT_BYTES = 32
NO_LIVE = bytes(HASH_BYTES)
#: Two interfaces per peer: the one in use, and the candidate or the one that drains.
SLOTS = 2
MAX_EPOCH = (1 << 62) - 1
MAX_OFFSET = 32
_LABEL = b"wg rotation 1: announcement\0"
_TRANSCRIPT = b"wg rotation 1: transcript\0"
_HEAD = struct.Struct("!BBBQ")  # kind, sender, receiver, epoch


class Kind(enum.IntEnum):
    OFFER = 1
    ACCEPT = 2
    READY = 3
    COMMIT = 4
    DONE = 5
    ABORT = 6
    ASK = 7
    STALE = 8

    @property
    def step(self) -> str:
        return self.name.lower()


#: Bytes after the head and before the signature.
BODY_BYTES = {
    Kind.OFFER: NONCE_BYTES + KEY_BYTES + HASH_BYTES + OFFER_BYTES,
    Kind.ACCEPT: HASH_BYTES + NONCE_BYTES + KEY_BYTES + HASH_BYTES + 1 + REPLY_BYTES,
    Kind.READY: HASH_BYTES,
    Kind.COMMIT: HASH_BYTES,
    Kind.DONE: HASH_BYTES,
    Kind.ABORT: HASH_BYTES,
    Kind.ASK: 0,
    Kind.STALE: HASH_BYTES,
}
MAX_MESSAGE = _HEAD.size + max(BODY_BYTES.values()) + SIGNATURE_BYTES
FROM_LEADER = frozenset({Kind.OFFER, Kind.COMMIT, Kind.ABORT})


class Refused(WgError):
    """A message that changes nothing. `step` is the message's kind, `item` what is wrong with it."""

    def __init__(self, step: str, item: str, text: str) -> None:
        super().__init__(f"{step}: {item}: {text}")
        self.step = step
        self.item = item


@dataclass(frozen=True, eq=False)
class Generation:
    """One generation at one end. `transcript` names it, and is equal at both ends."""

    epoch: int
    slot: int
    private: PrivateKey
    peer_key: PublicKey
    preshared: PresharedKey
    chain: ChainKey
    transcript: bytes
    peer_offset: (
        int | None
    )  # of the peer's UDP port over its configured one; None where the peer speaks first

    def wipe(self) -> None:
        """Forget all keys. Called when the interface has forgotten them too."""
        self.private.wipe()
        self.preshared.wipe()
        self.chain.wipe()


class Phase(enum.Enum):
    """How far the candidate is."""

    NONE = "none"
    OFFERED = "offered"  # leader: no interface yet
    RAISING = "raising"  # follower: the interface is being made
    PROVING = "proving"
    READY = "ready"  # proved here; the follower is in doubt, the leader waits for READY


# --- actions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Make durable that this epoch is used, before the actions that follow."""

    epoch: int


@dataclass(frozen=True)
class Send:
    data: bytes


@dataclass(frozen=True)
class Raise:
    """Raise the interface, answer `raised`; handshake and prove it, answer `proved`; or `failed`."""

    generation: Generation
    speak: bool  # this end starts the handshake


@dataclass(frozen=True)
class Route:
    """Move the peer's routes to this generation."""

    generation: Generation


@dataclass(frozen=True)
class Drain:
    """Wait until nothing arrives on this generation, answer `drained`."""

    generation: Generation


@dataclass(frozen=True)
class Drop:
    """Take the interface down and wipe the keys. Done before the actions that follow."""

    generation: Generation


@dataclass(frozen=True)
class Say:
    """A transition, for log and counters: begun, accepted, committed, aborted."""

    what: str
    epoch: int


Action: TypeAlias = Record | Send | Raise | Route | Drain | Drop | Say


@dataclass(frozen=True)
class _Offering:
    """What the leader keeps of its OFFER until the ACCEPT comes."""

    epoch: int
    message: bytes
    id: bytes
    private: PrivateKey
    offer: Offer


@dataclass
class Rotation:
    """One node's side of one pair. `seen` is the highest epoch ever recorded for this peer."""

    index: int
    peer: int
    sign: Callable[[bytes], bytes]
    verify: Callable[[bytes, bytes], None]  # (message, signature) by the peer; raises what `refusals` lists
    context: bytes
    offsets: tuple[int, ...]  # of this node's UDP ports for this peer, by slot
    seen: int = 0
    exchange: Exchange = field(default_factory=HybridExchange)
    refusals: tuple[type[Exception], ...] = (Exception,)
    nonce: Callable[[], bytes] = lambda: os.urandom(NONCE_BYTES)

    live: Generation | None = None
    old: Generation | None = None
    candidate: Generation | None = None
    phase: Phase = Phase.NONE
    draining: bool = False
    heard_ready: bool = False  # leader
    confirmed: bool = True  # leader: the follower has said DONE for the live generation
    wanted: bool = False
    _offering: _Offering | None = None
    _offer_id: bytes = b""  # follower: of the candidate
    _answer: bytes = b""  # follower: the ACCEPT of the candidate

    def __post_init__(self) -> None:
        if len(self.context) != CONTEXT_BYTES or len(self.offsets) != SLOTS:
            raise ValueError("a context of 32 bytes and a port for each slot are needed")

    @property
    def leads(self) -> bool:
        return self.index < self.peer

    @property
    def busy(self) -> bool:
        """Whether a rotation is under way."""
        return self.phase is not Phase.NONE

    @property
    def in_doubt(self) -> bool:
        """Whether only the leader can say what becomes of the candidate."""
        return not self.leads and self.phase is Phase.READY

    @property
    def state(self) -> str:
        if self.busy:
            return self.phase.value
        return "draining" if self.old is not None else "none" if self.live is None else "steady"

    def forget(self) -> None:
        """Wipe all keys: the pair is over."""
        for generation in (self.live, self.old, self.candidate):
            if generation is not None:
                generation.wipe()
        if self._offering is not None:
            self._offering.private.wipe()
        self.live = self.old = self.candidate = self._offering = None

    # events

    def want(self) -> list[Action]:
        """Rotate now, or as soon as what is under way is over. The follower asks for it."""
        self.wanted = True
        return self._begin() if self.leads else self._ask()

    def resend(self) -> list[Action]:
        """Say again what has not been answered. Called now and then."""
        if not self.leads:
            if self.in_doubt:
                return [self._send_named(Kind.READY, self.candidate)]
            return self._ask() if self.wanted or self.live is None else []
        if self.phase is Phase.OFFERED:
            assert self._offering is not None
            return [Send(self._offering.message)]
        out: list[Action] = []
        if not self.confirmed:
            out.append(self._send_named(Kind.COMMIT, self.live))
        if self.wanted or self.live is None:
            out += self._begin()
        return out

    def raised(self, generation: Generation) -> list[Action]:
        if generation is not self.candidate or self.phase is not Phase.RAISING:
            return []
        self.phase = Phase.PROVING
        return [Send(self._answer)] if not self.leads else []

    def proved(self, generation: Generation) -> list[Action]:
        if generation is not self.candidate or self.phase is not Phase.PROVING:
            return []
        self.phase = Phase.READY
        if self.leads:
            return self._commit_if_due()
        return [self._send_named(Kind.READY, generation)]

    def failed(self, generation: Generation) -> list[Action]:
        """The interface of the candidate could not be raised or proved."""
        return self.expire() if generation is self.candidate else []

    def expire(self) -> list[Action]:
        """The candidate has had its time. A follower in doubt keeps it."""
        if not self.busy or self.in_doubt:
            return []
        out: list[Action] = []
        if self.leads:
            name = self.candidate.transcript if self.candidate is not None else self._offered().id
            epoch = self.candidate.epoch if self.candidate is not None else self._offered().epoch
            out.append(self._message(Kind.ABORT, epoch, name))
        return out + self._give_up()

    def drained(self, generation: Generation) -> list[Action]:
        if generation is not self.old:
            return []
        out = self._drop_old()
        return out + self._begin() if self.leads and self.wanted else out

    def receive(self, data: bytes) -> list[Action]:
        """Act on a message from the peer; `Refused` if it is not one, or comes at a time when it cannot."""
        kind, epoch, body = self._open(data)
        match kind:
            case Kind.OFFER:
                return self._on_offer(epoch, body, data)
            case Kind.ACCEPT:
                return self._on_accept(epoch, body, data)
            case Kind.READY:
                return self._on_ready(epoch, body)
            case Kind.COMMIT:
                return self._on_commit(epoch, body)
            case Kind.DONE:
                return self._on_done(body)
            case Kind.ABORT:
                return self._on_abort(body)
            case Kind.ASK:
                if self.busy:
                    return []  # what is under way may be what it asks for; else it will ask again
                self.wanted = True
                return self._begin()
            case Kind.STALE:
                return self._on_stale(epoch, body)

    # what the leader does

    def _begin(self) -> list[Action]:
        # While the old one drains there is no room, and `drained` begins.
        if self.busy or self.draining or self.seen >= MAX_EPOCH:
            return []
        self.wanted = False
        self.seen += 1
        private, offer = self.exchange.key(), self.exchange.offer()
        live = self.live.transcript if self.live is not None else NO_LIVE
        send = self._message(Kind.OFFER, self.seen, self.nonce() + private.public().raw + live + offer.public)
        self._offering = _Offering(self.seen, send.data, _identify(send.data), private, offer)
        self.phase = Phase.OFFERED
        return [Record(self.seen), Say("begun", self.seen), send]

    def _offered(self) -> _Offering:
        assert self._offering is not None
        return self._offering

    def _on_accept(self, epoch: int, body: bytes, data: bytes) -> list[Action]:
        named, rest = body[:HASH_BYTES], body[HASH_BYTES + NONCE_BYTES :]
        key, live = rest[:KEY_BYTES], rest[KEY_BYTES : KEY_BYTES + HASH_BYTES]
        offset, reply = rest[KEY_BYTES + HASH_BYTES], rest[KEY_BYTES + HASH_BYTES + 1 :]
        offering = self._offering
        if offering is None or named != offering.id or epoch != offering.epoch:
            raise Refused("accept", "offer", "answers no offer of ours that is open")
        if self.phase is not Phase.OFFERED:
            return []  # said again
        if not 1 <= offset <= MAX_OFFSET:
            raise Refused("accept", "port", f"{offset} beyond the configured one")
        transcript = _transcript(offering.id, data)
        try:
            shared = offering.offer.finish(reply)
        except ExchangeError as problem:
            raise Refused("accept", "exchange", str(problem)) from None
        preshared, chain = self.exchange.derive(shared, self._common_chain(live), transcript)
        # The follower has gone on to what our offer called live, or has nothing: nobody sends on the old one.
        out = self._drop_old()
        self.confirmed = True
        self.candidate = Generation(
            epoch,
            self._free_slot(),
            offering.private,
            PublicKey(key),
            preshared,
            chain,
            transcript,
            offset,
        )
        self.phase = Phase.PROVING
        self.heard_ready = False
        return [*out, Say("accepted", epoch), Raise(self.candidate, True)]

    def _on_ready(self, epoch: int, name: bytes) -> list[Action]:
        if self.candidate is not None and name == self.candidate.transcript:
            self.heard_ready = True
            return self._commit_if_due()
        if self.live is not None and name == self.live.transcript:
            return [self._send_named(Kind.COMMIT, self.live)]
        return [self._message(Kind.ABORT, epoch, name)]  # we know nothing of it any more

    def _commit_if_due(self) -> list[Action]:
        if self.phase is not Phase.READY or not self.heard_ready:
            return []
        out = self._adopt()
        self.confirmed = False
        return [*out, self._send_named(Kind.COMMIT, self.live)]

    def _on_done(self, name: bytes) -> list[Action]:
        if self.live is None or name != self.live.transcript:
            raise Refused("done", "generation", "names none that we use")
        self.confirmed = True
        return self._drain_old()

    def _on_stale(self, seen: int, name: bytes) -> list[Action]:
        if self.phase is not Phase.OFFERED or name != self._offered().id:
            raise Refused("stale", "offer", "names no offer of ours that is open")
        if seen < self._offered().epoch:
            raise Refused("stale", "epoch", f"{seen} is below the epoch that it refuses")
        self.seen = max(self.seen, seen)
        self.wanted = True  # at the next `resend`: a peer may not drive us in circles
        return [*self._give_up(), Record(self.seen)]

    # what the follower does

    def _on_offer(self, epoch: int, body: bytes, data: bytes) -> list[Action]:
        name = _identify(data)
        if name == self._offer_id and self.candidate is not None:
            return [Send(self._answer)] if self.phase is not Phase.RAISING else []
        if epoch <= self.seen:
            # Old, or the leader has lost count: it can tell, for only its open offer has this name.
            raise RefusedWithAnswer(
                "offer",
                "epoch",
                f"{epoch} is not above {self.seen}",
                self._message(Kind.STALE, self.seen, name),
            )
        rest = body[NONCE_BYTES:]
        key, live = rest[:KEY_BYTES], rest[KEY_BYTES : KEY_BYTES + HASH_BYTES]
        try:
            reply, shared = self.exchange.accept(rest[KEY_BYTES + HASH_BYTES :])
        except ExchangeError as problem:
            raise Refused("offer", "exchange", str(problem)) from None
        out: list[Action] = []
        if self.in_doubt and self.candidate is not None and live == self.candidate.transcript:
            out += self._adopt()  # its COMMIT was lost
        elif self.busy:
            out += self._give_up()
        out += self._drop_old()
        self.seen = epoch
        self.wanted = False
        slot, private = self._free_slot(), self.exchange.key()
        ours = self.live.transcript if self.live is not None else NO_LIVE
        answer = self._message(
            Kind.ACCEPT,
            epoch,
            name + self.nonce() + private.public().raw + ours + bytes([self.offsets[slot]]) + reply,
        )
        transcript = _transcript(name, answer.data)
        preshared, chain = self.exchange.derive(shared, self._common_chain(live), transcript)
        self.candidate = Generation(epoch, slot, private, PublicKey(key), preshared, chain, transcript, None)
        self.phase, self._offer_id, self._answer = Phase.RAISING, name, answer.data
        return [*out, Record(epoch), Say("accepted", epoch), Raise(self.candidate, False)]

    def _ask(self) -> list[Action]:
        return [] if self.busy else [self._message(Kind.ASK, self.seen)]

    def _on_commit(self, epoch: int, name: bytes) -> list[Action]:
        if self.live is not None and name == self.live.transcript:
            return [self._send_named(Kind.DONE, self.live)]
        if self.candidate is None or name != self.candidate.transcript:
            raise Refused("commit", "generation", "names none that is under way")
        if self.phase is not Phase.READY:
            raise Refused("commit", "order", "we have not said that we are ready")
        return [*self._adopt(), *self._drain_old(), self._send_named(Kind.DONE, self.live)]

    def _on_abort(self, name: bytes) -> list[Action]:
        if self.candidate is None or name not in (self.candidate.transcript, self._offer_id):
            raise Refused("abort", "generation", "names none that is under way")
        return self._give_up()

    # what both do

    def _adopt(self) -> list[Action]:
        """The candidate is proved at both ends: use it."""
        assert self.candidate is not None
        out = self._drop_old()
        self.old, self.live, self.candidate = self.live, self.candidate, None
        self.phase, self.heard_ready, self._offering = Phase.NONE, False, None
        self._offer_id = self._answer = b""
        return [*out, Route(self.live), Say("committed", self.live.epoch)]

    def _give_up(self) -> list[Action]:
        """Burn the epoch: no message of it will be acted on again."""
        out: list[Action] = []
        if self._offering is not None:
            out.append(Say("aborted", self._offering.epoch))
            if self.candidate is None:  # else the generation has the key
                self._offering.private.wipe()
        elif self.candidate is not None:
            out.append(Say("aborted", self.candidate.epoch))
        if self.candidate is not None:
            out.append(Drop(self.candidate))
        self.candidate, self._offering, self.phase, self.heard_ready = None, None, Phase.NONE, False
        self._offer_id = self._answer = b""
        return out

    def _drain_old(self) -> list[Action]:
        if self.old is None or self.draining:
            return []
        self.draining = True
        return [Drain(self.old)]

    def _drop_old(self) -> list[Action]:
        old, self.old, self.draining = self.old, None, False
        return [] if old is None else [Drop(old)]

    def _free_slot(self) -> int:
        return 0 if self.live is None else 1 - self.live.slot

    def _common_chain(self, live: bytes) -> ChainKey | None:
        """The chain of the live generation if the peer uses the same; after a restart there is none."""
        if self.live is None or live != self.live.transcript:
            return None
        return self.live.chain

    # messages

    def _send_named(self, kind: Kind, generation: Generation | None) -> Send:
        assert generation is not None
        return self._message(kind, generation.epoch, generation.transcript)

    def _message(self, kind: Kind, epoch: int, body: bytes = b"") -> Send:
        signed = _HEAD.pack(kind, self.index, self.peer, epoch) + body
        return Send(signed + self.sign(_LABEL + self.context + signed))

    def _open(self, data: bytes) -> tuple[Kind, int, bytes]:
        """Kind, epoch and body of a message that the peer signed for us."""
        if len(data) < _HEAD.size + SIGNATURE_BYTES:
            raise Refused("message", "form", f"{len(data)} bytes are too few")
        number, sender, receiver, epoch = _HEAD.unpack_from(data)
        try:
            kind = Kind(number)
        except ValueError:
            raise Refused("message", "form", f"no message has number {number}") from None
        signed, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        if len(signed) != _HEAD.size + BODY_BYTES[kind]:
            raise Refused(kind.step, "form", f"{len(data)} bytes are not its length")
        if (sender, receiver) != (self.peer, self.index):
            raise Refused(kind.step, "party", f"from {sender} to {receiver}, not from {self.peer} to us")
        if (kind in FROM_LEADER) == self.leads:
            raise Refused(kind.step, "role", "the other end may not say this")
        if epoch > MAX_EPOCH:
            raise Refused(kind.step, "epoch", "out of range")
        try:
            self.verify(_LABEL + self.context + signed, signature)
        except self.refusals:
            raise Refused(kind.step, "signature", f"not by node {self.peer}, or not for this mesh") from None
        return kind, epoch, signed[_HEAD.size :]


class RefusedWithAnswer(Refused):
    """A refusal of which the peer is told."""

    def __init__(self, step: str, item: str, text: str, answer: Send) -> None:
        super().__init__(step, item, text)
        self.answer = answer


def _identify(data: bytes) -> bytes:
    """The hash of a message without its signature, of which there may be several."""
    return hashlib.sha256(data[:-SIGNATURE_BYTES]).digest()


def _transcript(offer_id: bytes, answer: bytes) -> bytes:
    return hashlib.sha256(_TRANSCRIPT + offer_id + _identify(answer)).digest()
