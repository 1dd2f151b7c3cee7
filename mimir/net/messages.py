"""What clients, owners and parties say to each other: msgpack maps, every field typed and bounded. No I/O.

Every message has a type, field "t". A message that is not exactly one of these is a `MessageError`.

    client to party                                     party to client
    hello     first, to prove that it is there
    status                                              status    what the party is and can do
    attest    a nonce                                   evidence  for it, and what the party says besides
    open      the terms of a session                    opened
    turn      one more prompt in it                     masks     of this client's part of the prompt
    offsets   the masked prompt                         progress  token  done     (done ends a turn)
    close                                               error     ends the request, a session included
    put_model chunk commit    (owners)                  have      committed
    revocations                                         revoked   the statement in force, if any
    revoke    a statement                               revoked   the one in force then

Words: `Open` are the agreed terms of a session; every client of it sends the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

from mimir.attest.certs import MAX_CERTIFICATE
from mimir.attest.evidence import MAX_ENVELOPE
from mimir.attest.trail import MAX_SHOWN
from mimir.config import PARTIES
from mimir.errors import BadInput, MimirError
from mimir.hpke import PUBLIC_BYTES
from mimir.secret import KEY_BYTES

TOKEN_BITS = 24  # tokens are revealed modulo 2^24
MAX_MESSAGE = 8 << 20  # bytes of one message on the wire, sealed
MAX_CHUNK = 1 << 20  # bytes of one piece of a component
MAX_STATEMENT = 256 << 10  # bytes of what owners say is revoked
MAX_CLIENTS = 8
MAX_SLOTS = 1 << 16  # token positions of one prompt part, and of one answer
MAX_TURNS = 1 << 16
MAX_NAMES = 16
MAX_TEXT = 500
MAX_ENTRIES = 1 << 16  # of one list or map
MAX_DEPTH = 8  # of plain data inside a message
MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 0.01
SESSION_BYTES = 16
NONCE_BYTES = 32
MAX_REMEMBERED = 4  # digests of evidence that a party keeps of what it showed to one peer
WORD = 8
_HEX_64 = re.compile(r"[0-9a-f]{64}")

Message = dict[str, Any]
Rule = Callable[[Any], bool]


class MessageError(MimirError):
    """The other end said something that is no message, or not one it may say."""

    exit_code = 8


# --- rules of single fields --------------------------------------------------------------------------------


def _whole(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high


def _real(low: float, high: float) -> Rule:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _text(limit: int) -> Rule:
    return lambda value: isinstance(value, str) and len(value) <= limit


def _blob(low: int, high: int) -> Rule:
    return lambda value: isinstance(value, bytes) and low <= len(value) <= high


def _words(per_slot: int) -> Rule:
    def rule(value: Any) -> bool:
        return (
            isinstance(value, bytes)
            and len(value) % (per_slot * WORD) == 0
            and len(value) <= per_slot * WORD * MAX_SLOTS
        )

    return rule


def _one_of(*values: str) -> Rule:
    return lambda value: isinstance(value, str) and value in values


def _hash(value: Any) -> bool:
    """A model's digest, or a public key, which looks alike."""
    return isinstance(value, str) and _HEX_64.fullmatch(value) is not None


def _flag(value: Any) -> bool:
    return type(value) is bool


def _list(rule: Rule, limit: int, least: int = 0) -> Rule:
    return lambda value: (
        isinstance(value, list) and least <= len(value) <= limit and all(rule(each) for each in value)
    )


def _map(rule: Rule, limit: int) -> Rule:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= limit
        and all(isinstance(name, str) and len(name) <= 64 and rule(each) for name, each in value.items())
    )


def _table(**fields: Rule) -> Rule:
    return lambda value: (
        isinstance(value, dict)
        and value.keys() == fields.keys()
        and all(rule(value[name]) for name, rule in fields.items())
    )


def _free(value: Any) -> bool:
    """A table of plain data; whoever uses it checks what is in it (a manifest, statistics)."""
    return isinstance(value, dict) and _plain(value, MAX_DEPTH)


def _plain(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(k, str) and _plain(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_plain(each, depth - 1) for each in value)
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 64
    return value is None or type(value) in (bool, str) or (type(value) is float and math.isfinite(value))


_count = _whole(0, (1 << 63) - 1)
_turn = _whole(0, MAX_TURNS)
_slots = _whole(1, MAX_SLOTS)
_buckets = _list(_slots, MAX_CLIENTS, least=1)
_seconds = _real(0, 1e9)
_sampler = _table(
    kind=_one_of("greedy", "sample"),
    temperature=_real(MIN_TEMPERATURE, MAX_TEMPERATURE),
    topk=_whole(1, 1 << 16),
)


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


_party = _whole(0, PARTIES - 1)
_said = _text(MAX_SHOWN)
_digest_or_none = _or_none(_hash)

# How a party's admission of its two peers stands: `status()["admission"]` of a party, and part of "evidence".
PEER = _table(
    party=_party,
    # "admitted" is the only one that lets a peer in; others: unknown, exchanging, refused, expelled, expired.
    state=_text(32),
    entry=_or_none(_text(64)),  # of the policy, that its evidence satisfied
    kind=_or_none(_text(32)),  # of its evidence
    simulated=_or_none(_flag),
    valid_until=_or_none(_text(32)),  # ISO 8601, as `trail.stamp` writes it
    evidence=_digest_or_none,  # SHA-256 of the envelope that it was admitted by
    tunnel_key=_digest_or_none,  # of its bootstrap tunnel, hexadecimal
    attempts=_count,  # exchanges begun since the party started
    # The last one: ours of its evidence ("us"), or its of ours ("peer").
    refusal=_or_none(_table(step=_text(64), expected=_said, got=_said, by=_one_of("us", "peer"))),
    seconds=_or_none(_seconds),  # since this state began
)
ADMISSION = _table(
    mode=_one_of("required", "off"),
    policy=_or_none(_table(name=_text(64), version=_count, digest=_hash)),
    kind=_or_none(_text(32)),  # of the party's own evidence
    simulated=_flag,
    peers=_list(PEER, PARTIES - 1),
    revocation_epoch=_count,
)

FROM_CLIENT: dict[str, dict[str, Rule]] = {
    "hello": {},
    "status": {},
    "attest": {"nonce": _blob(NONCE_BYTES, NONCE_BYTES)},
    "open": {
        "session": _blob(SESSION_BYTES, SESSION_BYTES),
        "model": _hash,
        "clients": _list(_hash, MAX_CLIENTS, least=1),
        "buckets": _buckets,
        "max_new": _slots,
        "sampler": _sampler,
        "deterministic_seed": _flag,
    },
    "turn": {"turn": _turn, "buckets": _buckets, "max_new": _slots},
    "offsets": {"turn": _turn, "names": _map(_words(1), MAX_NAMES)},
    "close": {},
    "revocations": {},
    "revoke": {"statement": _blob(1, MAX_STATEMENT)},
    # The seeds of the party's two components: the one with its number, and the next one.
    "put_model": {"manifest": _free, "seeds": _list(_blob(KEY_BYTES, KEY_BYTES), 2, least=2)},
    "chunk": {  # of the tensor's explicit component
        "tensor": _text(64),
        "offset": _count,
        "data": _blob(1, MAX_CHUNK),
    },
    "commit": {},
}

FROM_PARTY: dict[str, dict[str, Rule]] = {
    "status": {"status": _free},
    "evidence": {
        "envelope": _blob(1, MAX_ENVELOPE),  # bound to the nonce, this connection and what follows
        "tunnel": _blob(32, 32),  # public key of the bootstrap tunnel
        "kem": _blob(PUBLIC_BYTES, PUBLIC_BYTES),  # HPKE public key
        "config": _hash,  # digest of the terms
        "terms": _free,  # what the three parties share (`Config.shared_terms`)
        "admission": ADMISSION,
        # Own evidence that each peer was shown lately, newest first: SHA-256 of envelopes.
        "shown": _list(_table(party=_party, evidence=_list(_hash, MAX_REMEMBERED)), PARTIES - 1),
        # Certificates that peers issued to this party, DER.
        "certificates": _list(_table(issuer=_party, certificate=_blob(1, MAX_CERTIFICATE)), PARTIES - 1),
        "rotations": _list(_table(party=_party, epoch=_or_none(_count), age=_or_none(_seconds)), PARTIES - 1),
    },
    "opened": {},
    "masks": {
        "turn": _turn,
        "bits": _map(_whole(1, 64), MAX_NAMES),  # an offset is (value + mask) mod 2^bits
        "names": _map(_words(2), MAX_NAMES),  # components i and i+1, one after the other
    },
    "progress": {
        "phase": _one_of("preprocessing", "prefill", "decode"),
        "done": _count,
        "total": _count,
        "rounds": _count,
        "sent": _count,  # bytes by this party
        "seconds": _seconds,
    },
    "token": {
        "step": _whole(0, MAX_SLOTS),
        "components": _list(_whole(0, (1 << TOKEN_BITS) - 1), 2, least=2),
    },
    "done": {"stats": _free},
    "error": {"code": _text(32), "message": _text(MAX_TEXT)},
    # Bytes that are here of each explicit component that the party holds.
    "have": {"tensors": _map(_count, MAX_ENTRIES), "complete": _flag},
    "committed": {"model": _hash},
    "revoked": {"epoch": _count, "statement": _blob(0, MAX_STATEMENT)},
}


# --- messages as bytes -------------------------------------------------------------------------------------


def pack(message: Mapping[str, Any], rules: Mapping[str, Mapping[str, Rule]]) -> bytes:
    """Bytes of a message, checked against `rules` (FROM_CLIENT or FROM_PARTY) first."""
    check(message, rules)
    raw: bytes = msgpack.packb(message, use_bin_type=True)
    if len(raw) > MAX_MESSAGE:
        raise MessageError(f"message {message['t']} of {len(raw)} bytes is over the limit of {MAX_MESSAGE}")
    return raw


def unpack(raw: bytes, rules: Mapping[str, Mapping[str, Rule]]) -> Message:
    """The message in `raw`, checked; `MessageError` for anything else."""
    if len(raw) > MAX_MESSAGE:
        raise MessageError("a message is over the limit")
    try:
        message = msgpack.unpackb(
            raw,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_MESSAGE,
            max_bin_len=MAX_MESSAGE,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException):
        raise MessageError("bytes that are no message") from None
    check(message, rules)
    return message  # type: ignore[no-any-return]


def check(message: Any, rules: Mapping[str, Mapping[str, Rule]]) -> None:
    """Raise `MessageError`, naming the field, unless this is exactly one of the messages in `rules`."""
    kind = message.get("t") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in rules:
        raise MessageError("a message of unknown type")
    fields = rules[kind]
    if message.keys() != {"t", *fields}:
        raise MessageError(f"message {kind}: fields missing or unknown")
    for name, rule in fields.items():
        if not rule(message[name]):
            raise MessageError(f"message {kind}: field {name} is of the wrong type or out of range")


def nonce_source(client: str) -> str:
    """How claims name the client whose nonce they answer; `client` is its key, hexadecimal."""
    return f"client:{client[:16]}"


# --- the terms of a session --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen. Greedy ignores the rest."""

    kind: Literal["greedy", "sample"] = "greedy"
    temperature: float = 1.0
    topk: int = 40


@dataclass(frozen=True)
class Open:
    """What all clients of a session and all parties agree on before it begins. Public."""

    session: bytes
    model: str  # digest
    clients: tuple[str, ...]  # identities, in the order of their prompt parts
    buckets: tuple[int, ...]  # of the first turn, one per client
    max_new: int
    sampler: Sampler
    deterministic_seed: bool  # one seed by coin toss at the start, then no further coins for sampling

    def message(self) -> Message:
        """The "open" message of these terms."""
        return {
            "t": "open",
            "session": self.session,
            "model": self.model,
            "clients": list(self.clients),
            "buckets": list(self.buckets),
            "max_new": self.max_new,
            "sampler": {
                "kind": self.sampler.kind,
                "temperature": float(self.sampler.temperature),
                "topk": self.sampler.topk,
            },
            "deterministic_seed": self.deterministic_seed,
        }

    @classmethod
    def from_message(cls, message: Message) -> Open:
        """The terms in a checked "open" message; `BadInput` if they contradict themselves."""
        clients, buckets = tuple(message["clients"]), tuple(message["buckets"])
        if len(set(clients)) != len(clients):
            raise BadInput("a client is named twice in one session")
        if len(buckets) != len(clients):
            raise BadInput(f"{len(clients)} clients, but prompt buckets for {len(buckets)}")
        sampler = message["sampler"]
        return cls(
            message["session"],
            message["model"],
            clients,
            buckets,
            message["max_new"],
            Sampler(sampler["kind"], float(sampler["temperature"]), sampler["topk"]),
            message["deterministic_seed"],
        )

    def digest(self) -> bytes:
        """SHA-256 of the terms, for parties and clients to compare."""
        plain = self.message() | {"session": self.session.hex()}
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"mimir session terms\0" + text.encode()).digest()
