"""The language of a link, without I/O: bytes in, frames out; frames in, verdicts out.

On the wire a frame is

    2 bytes  magic | 2 bytes header length | 4 bytes payload length      (big endian)
    header: one msgpack array, its first element the kind
    payload: raw bytes

so that a tensor is never packed into an object: it goes out by scatter-gather and comes in by `recv_into`.
Every length is checked before anything is allocated for it, every field has one exact type and range, and the
state of the link says which kinds may arrive:

    handshake   HELLO PROOF WELCOME REFUSE
    online      DATA
    prep        DATA
    control     DATA ABORT REQUEST REPLY PING

`Decoder` turns bytes into frames. `Lockstep` is the book of one channel: which frame is due from whom.
`Board` is the book of one party: which channels exist, what came early, which sessions are dead. Memory and
TCP transports keep the same two books, so they refuse the same frames with the same words.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import msgpack  # type: ignore[import-untyped]

from mimir.errors import AbortError, LocalError, MimirError, PeerError
from mimir.net import LANES, SESSION_BYTES, Payload

MAGIC = b"Mi"
MAX_HEADER = 512  # bytes of msgpack
MAX_PAYLOAD = 256 << 20  # bytes of one DATA frame
MAX_BODY = 1 << 20  # bytes of one REQUEST or REPLY
MAX_STEP = 200  # characters of a step path
MAX_LANE = 32
MAX_WORD = 64  # characters of a reason or a request kind
MAX_TEXT = 200  # characters of a refusal
MAX_SEQUENCE = 1 << 48
MAX_PARTIES = 256
MAX_AHEAD = 2  # frames a peer can be ahead in lockstep: the round we are in, and the next
MAX_EARLY_LANES = 64  # conversations a peer may have begun before we opened our end
MAX_EARLY_BYTES = 64 << 20  # payload it may have sent for them
MAX_SESSIONS = 4096  # sessions remembered, dead ones among them, so that late frames are recognised
MAX_STRAY = 100_000  # frames in a row for conversations that are over, before the link counts as flooded
STAGE_BYTES = 64 << 10  # one read: many small frames, or the first part of a large one

_PREFIX = struct.Struct(">2sHI")
PREFIX_BYTES = _PREFIX.size


class WireError(MimirError):
    """Bytes or frames that no honest peer sends. The link they came from cannot be trusted to be in step."""

    exit_code = 6


# --- frames ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Data:
    """One round's frame to one peer."""

    session: bytes
    lane: str
    seq: int
    step: str
    payload: Any = field(default=b"", repr=False)  # messages are never printed

    KIND: ClassVar[int] = 1

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND, self.session, self.lane, self.seq, self.step)


@dataclass(frozen=True, slots=True)
class Abort:
    """The sender has ended this session."""

    session: bytes
    why: str
    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 2

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND, self.session, self.why)


@dataclass(frozen=True, slots=True)
class Request:
    """A question between peers; the payload is a msgpack map."""

    number: int
    kind: str
    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 3

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND, self.number, self.kind)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the request of that number."""

    number: int
    ok: bool
    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 4

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND, self.number, self.ok)


@dataclass(frozen=True, slots=True)
class Ping:
    """Proof that the sender's program, not only its kernel, is alive."""

    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 5

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND,)


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a connection from either end: who speaks, to whom, about what."""

    version: int
    sender: int
    receiver: int
    lane: str
    generation: bytes  # which control connection this one belongs to; empty for the control lane itself
    config: bytes  # digest of the public configuration
    identity: bytes  # the sender's Ed25519 public key
    nonce: bytes
    ephemeral: bytes  # fresh X25519 public key
    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 6

    def fields(self) -> tuple[Any, ...]:
        return (
            self.KIND,
            self.version,
            self.sender,
            self.receiver,
            self.lane,
            self.generation,
            self.config,
            self.identity,
            self.nonce,
            self.ephemeral,
        )


@dataclass(frozen=True, slots=True)
class Proof:
    """Signature by the sender's identity over both hellos, and proof of holding the fresh shared secret."""

    signature: bytes
    tag: bytes
    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 7

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND, self.signature, self.tag)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The acceptor has verified everything; the connection carries frames from here on."""

    tag: bytes
    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 8

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND, self.tag)


@dataclass(frozen=True, slots=True)
class Refuse:
    """The sender will not speak; `item` names what differs. Not authenticated: for the log only."""

    item: str
    text: str
    payload: Any = field(default=b"", repr=False)

    KIND: ClassVar[int] = 9

    def fields(self) -> tuple[Any, ...]:
        return (self.KIND, self.item, self.text)


Frame: TypeAlias = Data | Abort | Request | Reply | Ping | Hello | Proof | Welcome | Refuse

Check: TypeAlias = Callable[[Any], bool]


def _bytes(*sizes: int) -> Check:
    return lambda v: type(v) is bytes and len(v) in sizes


def _natural(below: int) -> Check:
    return lambda v: type(v) is int and 0 <= v < below


def _text(most: int) -> Check:
    # Printable ASCII only: these strings reach logs and terminals.
    return lambda v: type(v) is str and 0 < len(v) <= most and v.isascii() and v.isprintable()


def lane_kind(lane: str) -> str:
    """The connection a lane travels on: `"prep:softmax"` travels on `"prep"`."""
    return lane.split(":", 1)[0]


_is_lane_text = _text(MAX_LANE)


def _is_lane(v: Any) -> bool:
    return type(v) is str and len(v) <= MAX_LANE and _is_known_lane(v)


@lru_cache(maxsize=256)
def _is_known_lane(v: str) -> bool:
    return _is_lane_text(v) and lane_kind(v) in LANES


def _is_lane_kind(v: Any) -> bool:
    return type(v) is str and v in LANES


is_step = _text(MAX_STEP)
_is_word = _text(MAX_WORD)
_is_session = _bytes(SESSION_BYTES)
_u32 = _natural(1 << 32)

# kind -> (class, check of each field after the kind, largest payload)
_KINDS: dict[int, tuple[Any, tuple[Check, ...], int]] = {
    Data.KIND: (Data, (_is_session, _is_lane, _natural(MAX_SEQUENCE), is_step), MAX_PAYLOAD),
    Abort.KIND: (Abort, (_is_session, _is_word), 0),
    Request.KIND: (Request, (_u32, _is_word), MAX_BODY),
    Reply.KIND: (Reply, (_u32, lambda v: type(v) is bool), MAX_BODY),
    Ping.KIND: (Ping, (), 0),
    Hello.KIND: (
        Hello,
        (
            _u32,
            _natural(MAX_PARTIES),
            _natural(MAX_PARTIES),
            _is_lane_kind,
            _bytes(0, 32),
            _bytes(32),
            _bytes(32),
            _bytes(32),
            _bytes(32),
        ),
        0,
    ),
    Proof.KIND: (Proof, (_bytes(64), _bytes(32)), 0),
    Welcome.KIND: (Welcome, (_bytes(32),), 0),
    Refuse.KIND: (Refuse, (_is_word, _text(MAX_TEXT)), 0),
}

# state of a link -> kinds that may arrive in it
STATES: dict[str, frozenset[int]] = {
    "handshake": frozenset({Hello.KIND, Proof.KIND, Welcome.KIND, Refuse.KIND}),
    "online": frozenset({Data.KIND}),
    "prep": frozenset({Data.KIND}),
    "control": frozenset({Data.KIND, Abort.KIND, Request.KIND, Reply.KIND, Ping.KIND}),
}

_pack = msgpack.Packer(use_bin_type=True).pack


def pieces(payload: Payload) -> list[memoryview]:
    """Views of the payload's bytes, in order, copying nothing. Empty pieces are left out."""
    parts = payload if isinstance(payload, (list, tuple)) else (payload,)
    views = []
    for part in parts:
        try:
            view = memoryview(part)
            if view.nbytes:
                views.append(view.cast("B") if view.c_contiguous else _refuse_piece(part))
        except TypeError as exc:
            raise LocalError(f"payload piece of type {type(part).__name__} cannot be sent: {exc}") from None
    return views


def _refuse_piece(part: object) -> memoryview:
    raise LocalError(f"payload piece of type {type(part).__name__} is not C-contiguous")


def head(frame: Frame, size: int) -> bytes:
    """Prefix and header of `frame` for a payload of `size` bytes. Our own misuse raises `LocalError`."""
    fields = frame.fields()
    _cls, checks, most = _KINDS[frame.KIND]
    for value, check in zip(fields[1:], checks, strict=True):
        if not check(value):
            raise LocalError(f"{type(frame).__name__} with a field the wire does not carry: {value!r}")
    if size > most:
        raise LocalError(f"{type(frame).__name__} payload of {size} bytes; the limit is {most}")
    header: bytes = _pack(fields)
    return _PREFIX.pack(MAGIC, len(header), size) + header


def encode(frame: Frame) -> bytes:
    """The whole frame, payload joined: for small frames and for tests."""
    views = pieces(frame.payload)
    return b"".join([head(frame, sum(v.nbytes for v in views)), *views])


def encode_body(body: Mapping[str, Any]) -> bytes:
    """A request's or reply's map as msgpack."""
    try:
        raw: bytes = msgpack.packb(dict(body), use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as exc:
        raise LocalError(f"body that msgpack cannot carry: {exc}") from None
    if len(raw) > MAX_BODY:
        raise LocalError(f"body of {len(raw)} bytes; the limit is {MAX_BODY}")
    return raw


def decode_body(raw: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The map of a request or reply: string keys, nothing executable, nothing larger than the input."""
    if len(raw) > MAX_BODY:
        raise WireError(f"body of {len(raw)} bytes; the limit is {MAX_BODY}")
    body = _unpack(raw, MAX_BODY)
    if type(body) is not dict or not all(type(k) is str for k in body):
        raise WireError("body is not a map with string keys")
    return body


def _unpack(raw: Any, most: int, maps: bool = True) -> Any:
    try:
        return msgpack.unpackb(
            raw,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_bin_len=most,
            max_str_len=most,
            max_array_len=most,
            max_map_len=most if maps else 0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as exc:
        raise WireError(f"not msgpack: {type(exc).__name__}") from None


Headers: TypeAlias = dict[bytes, tuple[Any, ...]]  # well-formed ones, by how they are packed


class Decoder:
    """Bytes of one link in, frames out. Holds one read and at most one payload.

    Fill some of `buffer()`, tell `wrote(n)`, call `next()` until it gives None. Any `WireError` is final.
    """

    __slots__ = (
        "_broken",
        "_end",
        "_filled",
        "_header",
        "_headers",
        "_payload",
        "_stage",
        "_start",
        "_view",
        "state",
    )

    def __init__(self, state: str, headers: Headers | None = None) -> None:
        """`headers` are taken as read: see `Board`."""
        self.state = state  # a key of STATES; the owner changes it when the handshake is over
        self._headers: Headers = {} if headers is None else headers
        self._stage = bytearray(STAGE_BYTES)
        self._view = memoryview(self._stage)
        self._start = self._end = 0
        self._header: tuple[Any, ...] | None = None  # of the frame whose payload is arriving
        self._payload = bytearray()
        self._filled = 0
        self._broken: str | None = None

    def buffer(self) -> memoryview:
        """Where the next bytes belong. A large payload is received in place."""
        if self._header is not None:
            return memoryview(self._payload)[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == STAGE_BYTES:
            # A frame straddles the end: at most one header's worth of bytes moves.
            rest = self._end - self._start
            self._stage[:rest] = self._stage[self._start :]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def wrote(self, n: int) -> None:
        """`n` bytes were put at the start of `buffer()`."""
        if self._header is not None:
            self._filled += n
        else:
            self._end += n

    def next(self) -> Frame | None:
        """The next whole frame, or None if more bytes are needed. Raises `WireError`, for good."""
        if self._broken is not None:
            raise WireError(self._broken)
        try:
            return self._next()
        except WireError as exc:
            self._broken = str(exc)
            self._payload = bytearray()
            raise

    def _next(self) -> Frame | None:
        if self._header is None:
            have = self._end - self._start
            if have < PREFIX_BYTES:
                return None
            magic, header_size, size = _PREFIX.unpack_from(self._stage, self._start)
            if magic != MAGIC:
                raise WireError("no frame begins here")
            if not 0 < header_size <= MAX_HEADER:
                raise WireError(f"header of {header_size} bytes; the limit is {MAX_HEADER}")
            if size > MAX_PAYLOAD:
                raise WireError(f"payload of {size} bytes; the limit is {MAX_PAYLOAD}")
            body = self._start + PREFIX_BYTES + header_size
            if body > self._end:
                return None
            raw = bytes(self._view[body - header_size : body])
            header = self._headers.get(raw) or _well_formed(_unpack(raw, MAX_HEADER, maps=False))
            self._admit(header, size)
            have = self._end - body
            if have >= size:
                self._start = body + size
                return _frame(header, self._stage[body : body + size])
            self._payload = bytearray(size)  # the kernel gives pages only as bytes arrive
            self._payload[:have] = self._view[body : self._end]
            self._header, self._filled = header, have
            self._start = self._end = 0
        if self._filled < len(self._payload):
            return None
        header, payload = self._header, self._payload
        self._header, self._payload = None, bytearray()
        return _frame(header, payload)

    def _admit(self, header: tuple[Any, ...], size: int) -> None:
        """Refuse a frame that may not arrive now, or not here."""
        kind = header[0]
        cls, _, most = _KINDS[kind]
        if kind not in STATES[self.state]:
            raise WireError(f"{cls.__name__} frame on a link in state {self.state!r}")
        if size > most:
            raise WireError(f"{cls.__name__} payload of {size} bytes; the limit is {most}")
        if kind == Data.KIND and not header[2].startswith(self.state):
            raise WireError(f"frame of lane {header[2]!r} on the {self.state} link")

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """All frames that `data` completes: for callers that already hold bytes."""
        rest = memoryview(data)
        while len(rest):
            room = self.buffer()
            n = min(len(room), len(rest))
            room[:n] = rest[:n]
            rest = rest[n:]
            self.wrote(n)
            while (frame := self.next()) is not None:
                yield frame


def _well_formed(header: Any) -> tuple[Any, ...]:
    """The header, whose kind is known and each of whose fields has passed its check."""
    if type(header) is not tuple or not header or type(header[0]) is not int:
        raise WireError("header is not an array that begins with a kind")
    kind = header[0]
    if kind not in _KINDS:
        raise WireError(f"unknown frame kind {kind}")
    cls, checks, _ = _KINDS[kind]
    if len(header) != len(checks) + 1:
        raise WireError(f"{cls.__name__} header has {len(header) - 1} fields, not {len(checks)}")
    for place, check in enumerate(checks, 1):
        if not check(header[place]):
            raise WireError(f"{cls.__name__} field {place} is malformed")
    return header


def _frame(header: tuple[Any, ...], payload: bytearray) -> Frame:
    frame: Frame = _KINDS[header[0]][0](*header[1:], payload)
    return frame


# --- books -----------------------------------------------------------------------------------------------

Failure: TypeAlias = Callable[[str], MimirError]  # given the step we are at, the error to raise


def blame(party: int, why: str, step: str | None = None) -> Failure:
    """A `PeerError` at the step we are at when it is raised, or at `step`."""
    return lambda at: PeerError(party, step or at, why)


def aborted(why: str) -> Failure:
    return lambda _at: AbortError(why)


def silence(silent: list[int], seconds: float) -> Failure:
    """The verdict of a round's deadline: the first silent party is blamed, the others are named."""
    also = "".join(f", and so was party {p}" for p in silent[1:])
    return blame(silent[0], f"silent for {seconds:g} s{also}")


class Lockstep:
    """The book of one channel: in each round one frame from every peer, in order, for the same step."""

    __slots__ = (
        "_due",
        "_expect",
        "_framing",
        "_header",
        "_headers",
        "_inbox",
        "_step",
        "failure",
        "in_round",
        "lane",
        "party",
        "peers",
        "received",
        "rounds",
        "sent",
        "seq",
        "session",
        "wake",
    )

    def __init__(
        self, party: int, peers: tuple[int, ...], session: bytes, lane: str, headers: Headers
    ) -> None:
        self.party = party
        self.peers = peers
        self.session = session
        self.lane = lane
        self.failure: Failure | None = None
        self.wake: Callable[[], None] = lambda: None  # called at failure; the transport may call it too
        self.rounds = self.sent = self.received = 0
        self.seq = 0  # of the current round, or of the next
        self.in_round = False
        self._step = "start"
        self._framing = 0
        self._header = b""  # of the frames of this round, ours and theirs
        self._headers = headers
        self._expect: Mapping[int, int] = {}
        self._inbox: dict[int, deque[Data]] = {peer: deque() for peer in peers}
        self._due = dict.fromkeys(peers, 0)

    def begin(
        self, step: str, send: Mapping[int, Payload], expect: Mapping[int, int]
    ) -> list[tuple[int, bytes, list[memoryview]]]:
        """Start a round: (peer, head, payload views) for each peer, or raise why the channel is dead."""
        if self.in_round:
            raise LocalError(f"step {step!r} begun while {self._step!r} is still running on this channel")
        if send.keys() != self._due.keys() or expect.keys() != self._due.keys():
            raise LocalError(f"step {step!r} must name peers {list(self.peers)} in send and expect")
        for size in expect.values():
            if not 0 <= size <= MAX_PAYLOAD:
                raise LocalError(f"step {step!r} expects {size} bytes; the limit is {MAX_PAYLOAD}")
        if not is_step(step):
            raise LocalError(f"step {step!r}: 1 to {MAX_STEP} printable ASCII characters")
        fields = (Data.KIND, self.session, self.lane, self.seq, step)
        header = _pack(fields)  # what `head` makes, once for all
        out = []
        total = len(send) * (PREFIX_BYTES + len(header))
        for peer, payload in send.items():
            views = pieces(payload)
            size = 0
            for view in views:
                size += len(view)
            if size > MAX_PAYLOAD:
                raise LocalError(f"step {step!r} sends {size} bytes; the limit is {MAX_PAYLOAD}")
            total += size
            out.append((peer, _PREFIX.pack(MAGIC, len(header), size) + header, views))
        self._step = step
        self.raise_failure()
        self.in_round = True
        self._header = header
        self._headers[header] = fields
        self._expect = expect
        self._framing = PREFIX_BYTES + len(header)
        self.sent += total
        return out

    def arrived(self, peer: int) -> bool:
        return bool(self._inbox[peer])

    def missing(self) -> list[int]:
        """Peers whose frame for this round has not come."""
        return [peer for peer in self.peers if not self._inbox[peer]]

    def accept(self, peer: int, frame: Data) -> None:
        """A frame from the link to `peer`. One out of order fails the channel."""
        due = self._due[peer]
        if frame.seq != due:
            self.fail(
                blame(
                    peer,
                    f"sent frame {frame.seq} (step {frame.step!r}) where frame {due} was due",
                    frame.step,
                )
            )
        elif due - self.seq >= MAX_AHEAD - (not self.in_round):
            # Between rounds only the next frame can be here: the one after needs our answer to the next.
            self.fail(blame(peer, f"sent frame {due} before it can have had ours", frame.step))
        else:
            self._due[peer] = due + 1
            self._inbox[peer].append(frame)

    def finish(self) -> dict[int, bytearray]:
        """End the round whose frames have all arrived: each compared with what we expect, then handed out."""
        self.raise_failure()
        out = {}
        for peer in self.peers:
            frame = self._inbox[peer].popleft()
            size = len(frame.payload)
            want = self._expect[peer]
            if frame.step != self._step:
                self.fail(
                    blame(
                        peer, f"is at step {frame.step!r} where we are at {self._step!r} (round {self.seq})"
                    )
                )
            elif size != want:
                self.fail(blame(peer, f"sent {size} bytes where {want} are due"))
            self.raise_failure()
            self.received += size + self._framing  # header fields are equal, so their length is
            out[peer] = frame.payload
        self.seq += 1
        self.rounds += 1
        self._end_round()
        return out

    def _end_round(self) -> None:
        self.in_round = False
        self._headers.pop(self._header, None)

    def broken_off(self) -> None:
        """The round ended without `finish`: peers are out of step with us, so the channel is dead."""
        self._end_round()
        self.fail(lambda at: AbortError(f"a round was broken off; nothing can follow at step {at}"))

    def fail(self, failure: Failure) -> None:
        """The first failure stays. Frames held are let go."""
        if self.failure is None:
            self.failure = failure
            for box in self._inbox.values():
                box.clear()
            self.wake()

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure(self._step)


class _Session:
    """What a party remembers of one session: its channels, and why it is dead if it is."""

    __slots__ = ("books", "closed", "failure")

    def __init__(self) -> None:
        self.books: dict[str, Lockstep] = {}
        self.closed: set[str] = set()
        self.failure: Failure | None = None


class Board:
    """The book of one party: every channel, every early frame, every session that has ended.

    `headers` are those of the rounds that run. An honest peer's frame for a round has the very header of
    ours, so links know it without unpacking and checking it again; any other is unpacked and checked.
    """

    def __init__(self, party: int, peers: tuple[int, ...]) -> None:
        self.party = party
        self.peers = peers
        self.headers: Headers = {}
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        # per peer, frame 0 of conversations whose end here is not open yet, oldest first
        self._early: dict[int, OrderedDict[tuple[bytes, str], Data]] = {p: OrderedDict() for p in peers}
        self._early_bytes = dict.fromkeys(peers, 0)
        self._stray = dict.fromkeys(peers, 0)

    def touch(self, session: bytes) -> _Session:
        """Remember that this session depends on the links of today; forget the oldest idle one if need be."""
        if not _is_session(session):
            raise LocalError(f"a session is named by {SESSION_BYTES} bytes")
        record = self._sessions.get(session)
        if record is not None:
            self._sessions.move_to_end(session)
            return record
        if len(self._sessions) >= MAX_SESSIONS:
            for old, other in self._sessions.items():
                if not other.books:
                    del self._sessions[old]
                    break
        record = self._sessions[session] = _Session()
        return record

    def open(self, session: bytes, lane: str) -> Lockstep:
        """The book of a new channel, holding what has come early. A dead session gives a dead book."""
        if not _is_lane(lane):
            raise LocalError(f"lane {lane!r}: must be one of {', '.join(LANES)}, or '<lane>:<name>'")
        record = self.touch(session)
        if lane in record.books or lane in record.closed:
            raise LocalError(f"lane {lane!r} of this session has been opened before")
        if len(self._sessions) > MAX_SESSIONS:
            raise LocalError(f"{MAX_SESSIONS} sessions are open at once")
        book = record.books[lane] = Lockstep(self.party, self.peers, session, lane, self.headers)
        if record.failure is not None:
            book.fail(record.failure)
        for peer in self.peers:
            frame = self._forget_early(peer, (session, lane))
            if frame is not None:
                book.accept(peer, frame)
        return book

    def close(self, book: Lockstep) -> None:
        record = self._sessions.get(book.session)
        if record is not None and record.books.get(book.lane) is book:
            del record.books[book.lane]
            record.closed.add(book.lane)
        book.fail(lambda at: LocalError(f"step {at}: this channel is closed"))

    def deliver(self, peer: int, frame: Data) -> tuple[Lockstep | None, bytes | None]:
        """A frame from the link to `peer`: (the book that took it, a session to abort at the peers).

        Raises `WireError` if the peer floods us with frames for conversations that are over.
        """
        record = self._sessions.get(frame.session)
        if record is not None:
            book = record.books.get(frame.lane)
            if book is not None:
                self._stray[peer] = 0
                if book.failure is None:
                    book.accept(peer, frame)
                return book, None
            if record.failure is not None or frame.lane in record.closed:
                # Sent before the peer knew, or by one that will not listen: nobody waits for it.
                self._stray[peer] += 1
                if self._stray[peer] > MAX_STRAY:
                    raise WireError(f"more than {MAX_STRAY} frames for conversations that are over")
                return None, None
        early = self._early[peer]
        key = (frame.session, frame.lane)
        if frame.seq != 0 or key in early or len(frame.payload) > MAX_EARLY_BYTES:
            # In lockstep only frame 0 can come before we open: the rest needs our answer to it.
            why = f"sent frame {frame.seq} before a first round can have ended"
            if len(frame.payload) > MAX_EARLY_BYTES:
                why = f"opened with {len(frame.payload)} bytes; {MAX_EARLY_BYTES} can wait for us"
            self.end(frame.session, blame(peer, why, frame.step))
            return None, frame.session
        self.touch(frame.session)
        early[key] = frame
        self._early_bytes[peer] += len(frame.payload)
        if len(early) > MAX_EARLY_LANES or self._early_bytes[peer] > MAX_EARLY_BYTES:
            oldest = next(iter(early))[0]
            self.end(oldest, blame(peer, "opened more conversations than can wait for us"))
            return None, oldest
        return None, None

    def _forget_early(self, peer: int, key: tuple[bytes, str]) -> Data | None:
        frame = self._early[peer].pop(key, None)
        if frame is not None:
            self._early_bytes[peer] -= len(frame.payload)
        return frame

    def end(self, session: bytes, failure: Failure) -> None:
        """Kill a session: every channel of it fails, now or when it is opened."""
        record = self.touch(session)
        if record.failure is None:
            record.failure = failure
        for book in list(record.books.values()):
            book.fail(failure)
        for peer in self.peers:
            for key in [k for k in self._early[peer] if k[0] == session]:
                self._forget_early(peer, key)

    def link_down(self, peer: int, why: str) -> None:
        """Every session alive until now depended on the links to `peer`: all of them end."""
        self._stray[peer] = 0
        for session, record in list(self._sessions.items()):
            if record.failure is None:
                self.end(session, blame(peer, why))
