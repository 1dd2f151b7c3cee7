"""A TPM 2.0, spoken to in its own commands: registers, quotes, sealed secrets, a counter. No other library.

`open_tpm` connects to a character device (/dev/tpmrm0) or to the data socket of swtpm. What holds:

- Of an answer nothing is believed but what was parsed within its bounds to its very end: anything else is
  `TpmError`, which names the device and the command.
- No object stays loaded: each is flushed on every way out, and what a killed process left is flushed on
  opening.
- A command that was sent is heard to its end even if the caller is cancelled meanwhile, so that no answer is
  taken for another's. An answer that does not come in time ends the connection.
- Hierarchies are used with empty passwords, as Linux distributions and clouds leave them: whoever can open
  the device can do what is done here. The device's file mode is the guard, not a password.

swtpm serves one connection at a time: keep a connection no longer than the work takes.

Source: TCG TPM 2.0 Library, parts 2 (structures) and 3 (commands).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from mimir.config import Address
from mimir.errors import BadInput, DeviceError, EnvironmentMissing, LocalError

MAX_ANSWER = 4096  # a TPM's buffers are smaller
ANSWER_SECONDS = 30.0  # for one command: making a key takes a slow chip several seconds
START_SECONDS, START_PAUSE = 3.0, 0.05  # for a socket that refuses, and between two tries
MAX_RETRIES = 12
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 1.0  # seconds between tries of a busy TPM
HEAD = 10  # bytes: tag, size, code
PCRS = 24
DIGEST = 32  # of SHA-256, the one bank that is used
MAX_SEALED = 128  # bytes: what every TPM can seal
MAX_NV = 8192  # bytes of one index
NV_CHUNK = 512  # bytes read at once: every TPM can
MAX_SOCKET_PATH = 107  # bytes, says Linux
COUNTER = 0x01804D49  # default index of the counter, in the range that owners may use

_OWNER, _NULL, _PASSWORD, _ENDORSEMENT = 0x40000001, 0x40000007, 0x40000009, 0x4000000B
_PLAIN, _SESSIONS = 0x8001, 0x8002
_SHA256, _ALG_NULL, _AES, _CFB = 0x000B, 0x0010, 0x0006, 0x0043
_KEYEDHASH, _ECC, _ECDSA, _P256 = 0x0008, 0x0023, 0x0018, 0x0003
_CONTINUE, _ENCRYPTED_COMMAND, _ENCRYPTED_ANSWER = 1, 0x20, 0x40  # of a session; it is flushed by us
_BY_HMAC, _BY_POLICY_SESSION = 0, 1

_CREATE_PRIMARY, _NV_INCREMENT, _NV_DEFINE, _PCR_RESET = 0x131, 0x134, 0x12A, 0x13D
_NV_READ, _CREATE, _LOAD, _QUOTE, _UNSEAL, _FLUSH = 0x14E, 0x153, 0x157, 0x158, 0x15E, 0x165
_NV_PUBLIC, _START_SESSION, _CAPABILITY, _RANDOM = 0x169, 0x176, 0x17A, 0x17B
_PCR_READ, _POLICY_PCR, _PCR_EXTEND = 0x17E, 0x17F, 0x182
_NAMES = {
    _CREATE_PRIMARY: "CreatePrimary",
    _NV_INCREMENT: "NV_Increment",
    _NV_DEFINE: "NV_DefineSpace",
    _PCR_RESET: "PCR_Reset",
    _NV_READ: "NV_Read",
    _CREATE: "Create",
    _LOAD: "Load",
    _QUOTE: "Quote",
    _UNSEAL: "Unseal",
    _FLUSH: "FlushContext",
    _NV_PUBLIC: "NV_ReadPublic",
    _START_SESSION: "StartAuthSession",
    _CAPABILITY: "GetCapability",
    _RANDOM: "GetRandom",
    _PCR_READ: "PCR_Read",
    _POLICY_PCR: "PolicyPCR",
    _PCR_EXTEND: "PCR_Extend",
}

# Response codes, without the number of the parameter, handle or session that they blame.
NOT_STARTED, NV_UNINITIALIZED, NV_DEFINED = 0x100, 0x14A, 0x14C
BAD_HANDLE, POLICY_FAIL, BAD_INTEGRITY = 0x8B, 0x9D, 0x9F
_BUSY = {0x908: "yielded", 0x90A: "testing itself", 0x920: "sparing its memory", 0x922: "busy"}
_MEANINGS = {
    NOT_STARTED: "not started; start swtpm with --flags not-need-init,startup-clear",
    0x101: "in failure mode; it needs a restart",
    NV_UNINITIALIZED: "the index was never written",
    0x149: "no right to this index",
    0x14B: "no room for another index",
    NV_DEFINED: "the index exists already",
    0x902: "no room for another object",
    0x903: "no room for another session",
    0x921: "locked out after wrong passwords",
    0x84: "a value out of range",
    0x85: "the hierarchy is disabled",
    BAD_HANDLE: "no such handle",
    0x8E: "a password is set where none was expected",
    0xA2: "a password is set where none was expected",
    POLICY_FAIL: "the policy does not hold",
    BAD_INTEGRITY: "the blob is damaged or of another TPM",
}

# Attributes of objects and of indices.
_FIXED_TPM, _FIXED_PARENT, _MADE_INSIDE, _BY_PASSWORD, _BY_POLICY = (1 << n for n in (1, 4, 5, 6, 7))
_NO_LOCKOUT, _RESTRICTED, _DECRYPT, _SIGN = (1 << n for n in (10, 16, 17, 18))
_NV_OWNER_WRITE, _NV_AUTH_WRITE, _NV_TYPE_COUNTER = 1 << 1, 1 << 2, 1 << 4
_NV_OWNER_READ, _NV_AUTH_READ, _NV_NO_LOCKOUT, _NV_WRITTEN = 1 << 17, 1 << 18, 1 << 25, 1 << 29
_COUNTER_ATTRIBUTES = (
    _NV_OWNER_WRITE | _NV_AUTH_WRITE | _NV_TYPE_COUNTER | _NV_OWNER_READ | _NV_AUTH_READ | _NV_NO_LOCKOUT
)


def _big(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def _sized(value: bytes | bytearray) -> bytes:
    return _big(len(value), 2) + value


# The key that signs quotes: P-256, restricted to what the TPM made, the same after every restart, since a
# primary key is derived from the hierarchy's seed and this template. The label keeps it apart from other
# programs' keys. It has no password to guess: without _NO_LOCKOUT each loss of power after a quote counts as
# a wrong one, and after a few the TPM signs nothing for a while.
AK_TEMPLATE = (
    _big(_ECC, 2)
    + _big(_SHA256, 2)
    + _big(_FIXED_TPM | _FIXED_PARENT | _MADE_INSIDE | _BY_PASSWORD | _NO_LOCKOUT | _RESTRICTED | _SIGN, 4)
    + _sized(b"")
    + _big(_ALG_NULL, 2)
    + _big(_ECDSA, 2)
    + _big(_SHA256, 2)
    + _big(_P256, 2)
    + _big(_ALG_NULL, 2)
    + _sized(hashlib.sha256(b"mimir attestation key").digest())
    + _sized(b"")
)
# The parent of sealed objects, made anew for each use: P-256 with AES-128.
_STORAGE_TEMPLATE = (
    _big(_ECC, 2)
    + _big(_SHA256, 2)
    + _big(_FIXED_TPM | _FIXED_PARENT | _MADE_INSIDE | _BY_PASSWORD | _NO_LOCKOUT | _RESTRICTED | _DECRYPT, 4)
    + _sized(b"")
    + _big(_AES, 2)
    + _big(128, 2)
    + _big(_CFB, 2)
    + _big(_ALG_NULL, 2)
    + _big(_P256, 2)
    + _big(_ALG_NULL, 2)
    + _sized(hashlib.sha256(b"mimir storage key").digest())
    + _sized(b"")
)
_BLOB = b"mimir-sealed-1\0"


class TpmError(DeviceError):
    """A TPM refused a command, or answered what is no answer. `code` is its response code, 0 for the
    latter."""

    def __init__(self, device: str, command: str, why: str, code: int = 0) -> None:
        super().__init__(f"TPM {device}: {command}: {why}")
        self.code = code


class PcrMismatch(TpmError):
    """A sealed secret stays sealed: registers do not hold what it was sealed to."""


@dataclass(frozen=True)
class Properties:
    """What a TPM says of itself. Nothing vouches for it."""

    manufacturer: str  # four letters, such as "IBM"
    vendor: str
    firmware: int


@dataclass(frozen=True)
class Quote:
    """A quote and its key: TPMS_ATTEST, TPMT_SIGNATURE and TPMT_PUBLIC as the TPM gave them."""

    attest: bytes
    signature: bytes
    public: bytes


# --- answers -----------------------------------------------------------------------------------------------


class _Answer:
    """Takes an answer apart from the front, never past its end."""

    def __init__(self, body: memoryview, device: str, command: str) -> None:
        self._body, self._device, self._command, self._at = body, device, command, 0

    def refuse(self, why: str) -> TpmError:
        return TpmError(self._device, self._command, f"a malformed answer: {why}")

    def view(self, size: int, what: str) -> memoryview:
        left = len(self._body) - self._at
        if not 0 <= size <= left:
            raise self.refuse(f"{size} bytes of {what} at {self._at}, {left} left")
        self._at += size
        return self._body[self._at - size : self._at]

    def take(self, size: int, what: str) -> bytes:
        return bytes(self.view(size, what))

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.view(size, what), "big")

    def sized(self, what: str, limit: int = MAX_ANSWER) -> bytes:
        return bytes(self.sized_view(what, limit))

    def sized_view(self, what: str, limit: int = MAX_ANSWER) -> memoryview:
        size = self.number(2, f"the length of {what}")
        if size > limit:
            raise self.refuse(f"{size} bytes of {what}, at most {limit} expected")
        return self.view(size, what)

    def rest(self) -> bytes:
        return self.take(len(self._body) - self._at, "the rest")

    def end(self) -> None:
        if self._at != len(self._body):
            raise self.refuse(f"{len(self._body) - self._at} bytes too many")


def _base(code: int) -> int:
    """A response code without the number of what it blames."""
    return 0x80 | code & 0x3F if code & 0x80 else code


# --- a session whose parameters are encrypted --------------------------------------------------------------


def _kdfa(key: bytes, label: bytes, newer: bytes, older: bytes, bits: int) -> bytes:
    """KDFa of part 1, 11.4.10.2, with SHA-256: up to 256 bits."""
    data = _big(1, 4) + label + b"\0" + newer + older + _big(bits, 4)
    return hmac.digest(key, data, "sha256")[: bits // 8]


class _Session:
    """A session whose key is agreed with the storage key, so that the first parameter of a command or of an
    answer crosses the way to the TPM encrypted, and every byte of both is authenticated (part 1, 17 to 21).

    Against who listens on a bus. Who can alter what passes there could have given us a storage key of his
    own.
    """

    def __init__(self, public: bytes, refuse: Callable[[str], TpmError]) -> None:
        head = _STORAGE_TEMPLATE[: -len(_sized(bytes(DIGEST)) + _sized(b""))]
        x, y = public[len(head) + 2 : len(head) + 34], public[-DIGEST:]
        if public != head + _sized(x) + _sized(y) or len(x) != DIGEST:
            raise refuse("a storage key other than was asked for")
        theirs = (int.from_bytes(x, "big"), int.from_bytes(y, "big"))
        try:
            point = ec.EllipticCurvePublicNumbers(*theirs, ec.SECP256R1()).public_key()
        except ValueError:
            raise refuse("a storage key that is no point") from None
        own = ec.generate_private_key(ec.SECP256R1())
        numbers = own.public_key().public_numbers()
        mine = _big(numbers.x, DIGEST)
        shared = own.exchange(ec.ECDH(), point)
        # KDFe of part 1, 11.4.10.3
        self._salt = hashlib.sha256(_big(1, 4) + shared + b"SECRET\0" + mine + x).digest()
        self.ephemeral = _sized(mine) + _sized(_big(numbers.y, DIGEST))
        self.nonce = os.urandom(DIGEST)
        self.handle = 0
        self._theirs = b""  # the TPM's last nonce

    def start(self, handle: int, nonce: bytes) -> None:
        """The TPM has agreed."""
        self.handle, self._theirs = handle, nonce
        self._key = _kdfa(self._salt, b"ATH", nonce, self.nonce, 256)

    def _mac(self, hashed: bytes, newer: bytes, older: bytes, attributes: int) -> bytes:
        return hmac.digest(self._key, hashed + newer + older + _big(attributes, 1), "sha256")

    def _cipher(self, newer: bytes, older: bytes) -> Cipher[CFB]:
        both = _kdfa(self._key, b"CFB", newer, older, 256)
        return Cipher(algorithms.AES128(both[:16]), CFB(both[16:]))

    def ask(self, code: int, names: bytes, parameters: bytearray, attributes: int) -> bytes:
        """The session's part of a command; encrypts the first parameter in place where `attributes` say
        so."""
        self.nonce = os.urandom(DIGEST)
        if attributes & _ENCRYPTED_COMMAND:
            end = 2 + int.from_bytes(parameters[:2], "big")
            with memoryview(parameters)[2:end] as first:
                first[:] = self._cipher(self.nonce, self._theirs).encryptor().update(first)
        hashed = hashlib.sha256(_big(code, 4) + names + parameters).digest()
        mac = self._mac(hashed, self.nonce, self._theirs, attributes)
        return _big(self.handle, 4) + _sized(self.nonce) + _big(attributes, 1) + _sized(mac)

    def hear(self, code: int, parameters: memoryview, nonce: bytes, attributes: int, mac: bytes) -> bool:
        """Whether an answer is the TPM's own; decrypts its first parameter in place where `attributes` say
        so."""
        self._theirs = nonce
        hashed = hashlib.sha256(bytes(4) + _big(code, 4) + parameters).digest()
        if not hmac.compare_digest(mac, self._mac(hashed, nonce, self.nonce, attributes)):
            return False
        if attributes & _ENCRYPTED_ANSWER:
            end = 2 + int.from_bytes(parameters[:2], "big")
            clear = bytearray(end + 16)
            size = self._cipher(nonce, self.nonce).decryptor().update_into(parameters[2:end], clear)
            parameters[2:end] = memoryview(clear)[:size]
            clear[:] = bytes(len(clear))
        return True


# --- the way to the device ---------------------------------------------------------------------------------


class Channel(Protocol):
    """Where commands go. `exchange` returns a buffer that begins with the whole answer."""

    async def exchange(self, command: bytearray) -> bytearray: ...
    def close(self) -> None: ...


class _Socket:
    """swtpm's data socket: commands and answers follow one another without a frame around them."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock

    async def exchange(self, command: bytearray) -> bytearray:
        with memoryview(command) as left:
            at = 0
            while at < len(left):
                at += await self._socket.send(left[at:])
        head = bytearray(HEAD)
        await self._fill(head, 0)
        size = int.from_bytes(head[2:6], "big")
        if not HEAD <= size <= MAX_ANSWER:
            raise ValueError(f"{size} bytes announced, {HEAD} to {MAX_ANSWER} expected")
        answer = bytearray(size)
        answer[:HEAD] = head
        await self._fill(answer, HEAD)
        return answer

    async def _fill(self, buffer: bytearray, at: int) -> None:
        with memoryview(buffer) as whole:
            while at < len(whole):
                got = await self._socket.recv_into(whole[at:])
                if not got:
                    raise ValueError("the connection ended")
                at += got

    def close(self) -> None:
        self._socket.close()


class _Device:
    """A TPM's character device: one write is a command, one read its answer. The kernel's driver queues the
    command where the file does not block (Linux 4.20) and says by polling when the answer is there."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def exchange(self, command: bytearray) -> bytearray:
        if os.write(self._fd, command) != len(command):
            raise ValueError("a command was taken in part")
        await trio.lowlevel.wait_readable(self._fd)
        answer = bytearray(MAX_ANSWER + 1)
        size = os.readv(self._fd, [answer])
        if size < HEAD or size != int.from_bytes(answer[2:6], "big"):
            raise ValueError(f"an answer of {size} bytes that gives itself another length")
        return answer

    def close(self) -> None:
        os.close(self._fd)


async def _connect(device: Path | Address) -> tuple[Channel, bool]:
    """The way to a TPM, and whether it is a socket."""
    target: Any
    try:
        if isinstance(device, Address):
            found = await trio.socket.getaddrinfo(device.host, device.port, type=socket.SOCK_STREAM)
            family, target = int(found[0][0]), found[0][4]
        else:
            mode = os.stat(device).st_mode
            if stat.S_ISCHR(mode):
                return _Device(os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)), False
            if not stat.S_ISSOCK(mode):
                raise BadInput(f"TPM {device}: neither a character device nor a socket")
            if len(os.fsencode(device)) > MAX_SOCKET_PATH:
                raise BadInput(f"TPM {device}: a socket's path has at most {MAX_SOCKET_PATH} bytes")
            family, target = int(socket.AF_UNIX), os.fspath(device)
        end = trio.current_time() + START_SECONDS
        while True:
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
            try:
                await sock.connect(target)
                return _Socket(sock), True
            except BaseException as error:
                sock.close()
                # A program that starts has made its socket a moment before it listens there.
                if not isinstance(error, ConnectionRefusedError) or trio.current_time() >= end:
                    raise
            await trio.sleep(START_PAUSE)
    except OSError as error:
        raise EnvironmentMissing(
            f"TPM {device}: {error.strerror or error}; `mimir doctor` says what is there, "
            "scripts/software_tpm starts a software TPM"
        ) from None


def is_device(device: Path | Address) -> bool:
    """Whether this is a character device, behind which the kernel has a TPM. Raises where there is
    nothing."""
    try:
        return isinstance(device, Path) and stat.S_ISCHR(os.stat(device).st_mode)
    except OSError as error:
        raise EnvironmentMissing(
            f"TPM {device}: {error.strerror}; `mimir doctor` says what is there"
        ) from None


@asynccontextmanager
async def open_tpm(device: Path | Address, *, seconds: float = ANSWER_SECONDS) -> AsyncIterator[Tpm]:
    """Connect, and disconnect at the end of the block. `seconds` bound the wait for each answer, and for the
    turn at an swtpm that somebody else is using."""
    channel: Channel | None = None
    with trio.move_on_after(seconds):
        channel, is_socket = await _connect(device)
    if channel is None:
        raise TpmError(str(device), "connecting", f"nothing within {seconds:g} s")
    try:
        tpm = Tpm(channel, str(device), seconds)
        await tpm.tidy(sessions=is_socket)
        yield tpm
    finally:
        channel.close()


# --- the TPM -----------------------------------------------------------------------------------------------


class Tpm:
    """One connection to a TPM. For one task at a time. Registers are those of bank SHA-256, 32 bytes each."""

    def __init__(self, channel: Channel, device: str, seconds: float = ANSWER_SECONDS) -> None:
        self._channel, self._device, self._seconds = channel, device, seconds
        self._broken = ""

    # --- one command ---

    async def _exchange(self, command: bytearray, name: str, shield: bool) -> bytearray:
        if self._broken:
            raise TpmError(self._device, name, f"this connection is of no more use: {self._broken}")
        await trio.lowlevel.checkpoint_if_cancelled()  # the last moment at which nothing is lost
        self._broken = "a command without its answer"
        try:
            with trio.CancelScope(deadline=trio.current_time() + self._seconds, shield=shield):
                answer = await self._channel.exchange(command)
                self._broken = ""
                return answer
        except OSError as error:
            self._broken = error.strerror or str(error)
        except ValueError as error:
            self._broken = str(error)
        else:
            self._broken = f"no answer within {self._seconds:g} s; is another program using it?"
        raise TpmError(self._device, name, self._broken)

    async def _run(
        self,
        code: int,
        handles: Collection[int] = (),
        parameters: bytes | bytearray = b"",
        *,
        auth: int | None = None,
        session: tuple[_Session, int, bytes] | None = None,
        makes: bool = False,
        shield: bool = True,
    ) -> tuple[int, _Answer, bytearray]:
        """Send one command until the TPM is not busy. Returns the handle that it made (0 if none), the
        parameters of its answer, and the buffer that holds them, for whoever must wipe it. `session`
        authorizes instead of a password: the session, its attributes, and the names of all handles."""
        name = _NAMES[code]
        body = bytearray(b"".join(_big(each, 4) for each in handles))
        if session is not None:
            parameters = bytearray(parameters)  # encrypted in place
            area = session[0].ask(code, session[2], parameters, session[1])
            body += _big(len(area), 4) + area
        elif auth is not None:
            area = _big(auth, 4) + _sized(b"") + _big(0, 1) + _sized(b"")
            body += _big(len(area), 4) + area
        command = bytearray(HEAD) + body + parameters
        tag = _PLAIN if auth is None and session is None else _SESSIONS
        command[:HEAD] = _big(tag, 2) + _big(len(command), 4) + _big(code, 4)
        try:
            pause = FIRST_PAUSE
            for left in range(MAX_RETRIES, -1, -1):
                answer = await self._exchange(command, name, shield)
                got, size, result = (int.from_bytes(answer[a:b], "big") for a, b in ((0, 2), (2, 6), (6, 10)))
                if not HEAD <= size <= min(len(answer), MAX_ANSWER):
                    raise TpmError(self._device, name, f"a malformed answer: a length of {size}")
                if result not in _BUSY or not left:
                    break
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            command[:] = bytes(len(command))
        if result:
            base = _base(result)
            meaning = _BUSY.get(result) or _MEANINGS.get(base, "refused")
            raise TpmError(self._device, name, f"{meaning} (response code {result:#x})", base)
        parsed = _Answer(memoryview(answer)[HEAD:size], self._device, name)
        if got != tag:
            raise parsed.refuse(f"tag {got:#06x}, {tag:#06x} expected")
        made = parsed.number(4, "a handle") if makes else 0
        if tag == _SESSIONS:
            length = parsed.number(4, "the length of the parameters")
            view = parsed.view(length, "parameters")
            nonce = parsed.sized("nonce", 64)
            attributes = parsed.number(1, "session attributes")
            mac = parsed.sized("authorization", 64)
            parsed.end()
            if session is not None and not session[0].hear(code, view, nonce, attributes, mac):
                raise parsed.refuse("one that was altered on its way")
            parsed = _Answer(view, self._device, name)
        return made, parsed, answer

    async def _plain(
        self, code: int, handles: Collection[int] = (), parameters: bytes = b"", *, auth: int | None = None
    ) -> _Answer:
        return (await self._run(code, handles, parameters, auth=auth))[1]

    async def _flush(self, handle: int) -> None:
        (await self._plain(_FLUSH, (), _big(handle, 4))).end()

    @asynccontextmanager
    async def _loaded(self, handle: int) -> AsyncIterator[int]:
        """Flush on every way out, cancellation included."""
        try:
            yield handle
        except BaseException:
            with trio.CancelScope(shield=True):
                try:
                    await self._flush(handle)
                except TpmError:
                    pass  # the first error says more; the next opening flushes what this could not
            raise
        with trio.CancelScope(shield=True):
            await self._flush(handle)

    async def tidy(self, *, sessions: bool) -> None:
        """Flush what processes that were killed have left. Behind a socket, or a device's resource manager,
        there is nobody else whose objects these could be; sessions are only looked for behind a socket."""
        first = True
        for start in (0x80000000, *((0x02000000, 0x03000000) if sessions else ())):
            # The first command waits for its turn, and nothing is lost if it is cancelled meanwhile.
            for handle in await self._handles(start, shield=not first):
                await self._flush(handle)
            first = False

    async def _handles(self, start: int, shield: bool) -> list[int]:
        _, found, _ = await self._run(
            _CAPABILITY, (), _big(1, 4) + _big(start, 4) + _big(64, 4), shield=shield
        )
        found.number(1, "more")
        if found.number(4, "capability") != 1:
            raise found.refuse("another capability")
        count = found.number(4, "count")
        if count > 64:
            raise found.refuse(f"{count} handles")
        handles = [found.number(4, "a handle") for _ in range(count)]
        found.end()
        # Transient objects are of one type; sessions, listed as loaded or as saved, of two.
        if any(each >> 24 not in ((0x80,) if start >> 24 == 0x80 else (2, 3)) for each in handles):
            raise found.refuse("a handle of another type")
        return handles

    # --- what it is ---

    async def properties(self) -> Properties:
        """Manufacturer, vendor text and firmware version."""
        found = await self._plain(_CAPABILITY, (), _big(6, 4) + _big(0x105, 4) + _big(8, 4))
        found.number(1, "more")
        if found.number(4, "capability") != 6:
            raise found.refuse("another capability")
        count = found.number(4, "count")
        if count > 8:
            raise found.refuse(f"{count} properties")
        values = {found.number(4, "a property"): found.take(4, "a value") for _ in range(count)}
        found.end()

        def text(*numbers: int) -> str:
            raw = b"".join(values.get(number, b"") for number in numbers).replace(b"\0", b"")
            return "".join(chr(each) if 32 <= each < 127 else "?" for each in raw).strip()

        firmware = int.from_bytes(values.get(0x10B, b"") + values.get(0x10C, b""), "big")
        return Properties(text(0x105), text(0x106, 0x107, 0x108, 0x109), firmware)

    async def get_random(self, size: int) -> bytes:
        """`size` bytes, 1 to 32, of the TPM's generator."""
        if not 1 <= size <= DIGEST:
            raise LocalError(f"{size} random bytes of a TPM: 1 to {DIGEST} at once")
        found = await self._plain(_RANDOM, (), _big(size, 2))
        value = found.sized("random bytes", size)
        found.end()
        if len(value) != size:
            raise found.refuse(f"{len(value)} random bytes, {size} asked for")
        return value

    # --- registers ---

    async def read_pcrs(self, chosen: Collection[int]) -> dict[int, bytes]:
        """The values of these registers, all of one moment."""
        _check_pcrs(chosen)
        for _ in range(MAX_RETRIES):
            values: dict[int, bytes] = {}
            moments = set()
            while len(values) < len(set(chosen)):
                wanted = sorted(set(chosen) - set(values))
                found = await self._plain(_PCR_READ, (), _selection(wanted[:8]))
                moments.add(found.number(4, "update counter"))
                given = self._parse_selection(found)
                count = found.number(4, "number of values")
                if count != len(given) or not given or not set(given) <= set(wanted):
                    raise found.refuse("other registers than were asked for; has it a bank SHA-256?")
                for index in given:
                    values[index] = found.sized("a value", DIGEST)
                    if len(values[index]) != DIGEST:
                        raise found.refuse(f"{len(values[index])} bytes of a register")
                found.end()
            if len(moments) == 1:
                return dict(sorted(values.items()))
        raise TpmError(self._device, "PCR_Read", "registers change faster than they can be read")

    def _parse_selection(self, found: _Answer) -> list[int]:
        if found.number(4, "number of banks") != 1 or found.number(2, "bank") != _SHA256:
            raise found.refuse("another bank than SHA-256")
        size = found.number(1, "length of a bitmap")
        if size > 4:
            raise found.refuse(f"a bitmap of {size} bytes")
        bitmap = int.from_bytes(found.take(size, "bitmap"), "little")
        return [index for index in range(8 * size) if bitmap >> index & 1]

    async def reset_pcr(self, index: int) -> None:
        """Set a register to zero; of those here 16 and 23 let themselves."""
        _check_pcrs([index])
        (await self._plain(_PCR_RESET, (index,), auth=_PASSWORD)).end()

    async def extend_pcr(self, index: int, digest: bytes) -> None:
        """Hash 32 bytes into a register: SHA-256(old value || digest)."""
        _check_pcrs([index])
        if len(digest) != DIGEST:
            raise LocalError(f"{len(digest)} bytes to extend a register by, {DIGEST} needed")
        value = _big(1, 4) + _big(_SHA256, 2) + digest
        (await self._plain(_PCR_EXTEND, (index,), value, auth=_PASSWORD)).end()

    # --- keys that attest ---

    @asynccontextmanager
    async def _primary(self, hierarchy: int, template: bytes) -> AsyncIterator[tuple[int, bytes]]:
        sensitive = _sized(_sized(b"") + _sized(b""))
        given = sensitive + _sized(template) + _sized(b"") + _big(0, 4)
        handle, found, _ = await self._run(_CREATE_PRIMARY, (hierarchy,), given, auth=_PASSWORD, makes=True)
        async with self._loaded(handle):
            public = found.sized("public area")
            _skip_creation(found)
            name = found.sized("name", 66)
            found.end()
            if name != _name(public):
                raise found.refuse("a name that is not of this key")
            yield handle, public

    async def attestation_public(self, template: bytes = AK_TEMPLATE) -> bytes:
        """TPMT_PUBLIC of the key that the endorsement hierarchy derives from a template: always the same one,
        until somebody changes the endorsement seed."""
        async with self._primary(_ENDORSEMENT, template) as (_, public):
            return public

    async def quote(self, data: bytes, chosen: Collection[int], template: bytes = AK_TEMPLATE) -> Quote:
        """A quote over these registers and up to 64 bytes of `data` by that key."""
        _check_pcrs(chosen)
        if not 0 < len(data) <= 64:
            raise LocalError(f"{len(data)} bytes to be quoted along; 1 to 64 are possible")
        async with self._primary(_ENDORSEMENT, template) as (handle, public):
            given = _sized(data) + _big(_ALG_NULL, 2) + _selection(sorted(set(chosen)))
            found = await self._plain(_QUOTE, (handle,), given, auth=_PASSWORD)
            return Quote(found.sized("quote", 1024), found.rest(), public)

    # --- non-volatile memory ---

    async def _nv_public(self, index: int) -> tuple[int, int] | None:
        """(attributes, size) of an index, or None where there is none."""
        try:
            found = await self._plain(_NV_PUBLIC, (index,))
        except TpmError as error:
            if error.code == BAD_HANDLE:
                return None
            raise
        inner = _Answer(found.sized_view("public area", 512), self._device, _NAMES[_NV_PUBLIC])
        found.sized("name", 66)
        found.end()
        got, _ = inner.number(4, "index"), inner.number(2, "name algorithm")
        attributes = inner.number(4, "attributes")
        inner.sized("policy", 64)
        size = inner.number(2, "size")
        inner.end()
        if got != index or size > MAX_NV:
            raise found.refuse(f"index {got:#x} of {size} bytes")
        return attributes, size

    async def nv_read(self, index: int) -> bytes | None:
        """The whole content of an index, at most 8 KiB; None where it is not defined or was never written."""
        public = await self._nv_public(index)
        if public is None or not public[0] & _NV_WRITTEN:
            return None
        attributes, size = public
        by = index if attributes & _NV_AUTH_READ else _OWNER
        value = b""
        while len(value) < size:
            wanted = min(NV_CHUNK, size - len(value))
            given = _big(wanted, 2) + _big(len(value), 2)
            found = await self._plain(_NV_READ, (by, index), given, auth=_PASSWORD)
            piece = found.sized("content", wanted)
            found.end()
            if not piece:
                raise found.refuse("nothing")
            value += piece
        return value

    async def counter_define(self, index: int = COUNTER) -> None:
        """See that the counter exists and can be read. Safe to call again.

        A counter never goes back: one that was deleted and defined anew starts above every value that any
        counter of this TPM ever had. Whoever can open the device can count up, and can delete it.
        """
        public = await self._nv_public(index)
        if public is None:
            area = _big(index, 4) + _big(_SHA256, 2) + _big(_COUNTER_ATTRIBUTES, 4) + _sized(b"") + _big(8, 2)
            try:
                (await self._plain(_NV_DEFINE, (_OWNER,), _sized(b"") + _sized(area), auth=_PASSWORD)).end()
            except TpmError as error:
                if error.code != NV_DEFINED:  # somebody was faster
                    raise
            public = await self._nv_public(index)
        if public is None or public[0] & ~_NV_WRITTEN != _COUNTER_ATTRIBUTES or public[1] != 8:
            raise TpmError(
                self._device,
                "NV_DefineSpace",
                f"index {index:#x} is used for something else than our counter",
            )
        if not public[0] & _NV_WRITTEN:
            await self._count(index)

    async def _count(self, index: int) -> None:
        (await self._plain(_NV_INCREMENT, (index, index), auth=_PASSWORD)).end()

    async def counter_increment(self, index: int = COUNTER) -> int:
        """Count up by one, for ever: returns the new value, which the TPM has stored by then."""
        before = await self.counter_read(index)
        await self._count(index)
        after = await self.counter_read(index)
        if after <= before:
            raise TpmError(self._device, "NV_Increment", f"the counter went from {before} to {after}")
        return after

    async def counter_read(self, index: int = COUNTER) -> int:
        """The counter's value. `TpmError` where `counter_define` was never called."""
        value = await self.nv_read(index)
        if value is None or len(value) != 8:
            raise TpmError(self._device, "NV_Read", f"index {index:#x} holds no counter", BAD_HANDLE)
        return int.from_bytes(value, "big")

    # --- sealing ---

    async def seal(self, pcrs: Mapping[int, bytes], secret: bytes | bytearray | memoryview) -> bytes:
        """A blob from which this TPM alone gives the secret back, and only while these registers have these
        values. 1 to 128 bytes, at least one register. The blob is public; to lose it is to lose the secret,
        and so is clearing the TPM. Registers that can be reset (16, 23) protect nothing.

        On its way to the TPM and back the secret is encrypted, so that who listens on a bus does not see it.
        """
        _check_pcrs(pcrs)
        if not 0 < len(secret) <= MAX_SEALED:
            raise LocalError(f"{len(secret)} bytes to seal; 1 to {MAX_SEALED} are possible")
        if any(len(each) != DIGEST for each in pcrs.values()):
            raise LocalError(f"registers to seal to have {DIGEST} bytes")
        chosen = sorted(pcrs)
        values = hashlib.sha256(b"".join(pcrs[index] for index in chosen)).digest()
        policy = bytes(DIGEST) + _big(_POLICY_PCR, 4) + _selection(chosen) + values
        template = (
            _big(_KEYEDHASH, 2)
            + _big(_SHA256, 2)
            + _big(_FIXED_TPM | _FIXED_PARENT | _BY_POLICY | _NO_LOCKOUT, 4)
            + _sized(hashlib.sha256(policy).digest())
            + _big(_ALG_NULL, 2)
            + _sized(b"")
        )
        given = bytearray(_big(4 + len(secret), 2) + _sized(b"") + _big(len(secret), 2))
        given += secret
        given += _sized(template) + _sized(b"") + _big(0, 4)
        try:
            async with self._primary(_OWNER, _STORAGE_TEMPLATE) as (parent, parent_public):
                async with self._session(_BY_HMAC, parent, parent_public) as session:
                    how = (session, _CONTINUE | _ENCRYPTED_COMMAND, _name(parent_public))
                    _, found, _ = await self._run(_CREATE, (parent,), given, session=how)
        finally:
            given[:] = bytes(len(given))
        private, public = found.sized("private area", 1024), found.sized("public area", 512)
        _skip_creation(found)
        found.end()
        if (
            public != template[: -len(_sized(b""))] + public[-(2 + DIGEST) :]
            or len(public) != len(template) + DIGEST
        ):
            raise found.refuse("a sealed object other than was asked for")
        return _BLOB + _bitmap(chosen) + _sized(private) + _sized(public)

    async def unseal(self, blob: bytes) -> bytearray:
        """The secret of a blob of `seal`, in a buffer that is the caller's to wipe. `PcrMismatch` while the
        registers are others; `TpmError` for a blob that is damaged or of another TPM."""
        chosen, private, public = _parse_blob(blob)
        async with self._primary(_OWNER, _STORAGE_TEMPLATE) as (parent, parent_public):
            handle, found, _ = await self._run(
                _LOAD, (parent,), _sized(private) + _sized(public), auth=_PASSWORD, makes=True
            )
            async with self._loaded(handle):
                name = found.sized("name", 66)
                found.end()
                if name != _name(public):
                    raise found.refuse("a name that is not of this object")
                async with self._session(_BY_POLICY_SESSION, parent, parent_public) as session:
                    policy = _sized(b"") + _selection(chosen)
                    (await self._plain(_POLICY_PCR, (session.handle,), policy)).end()
                    return await self._unseal(handle, name, session, chosen)

    async def _unseal(self, handle: int, name: bytes, session: _Session, chosen: list[int]) -> bytearray:
        how = (session, _CONTINUE | _ENCRYPTED_ANSWER, name)
        try:
            _, found, buffer = await self._run(_UNSEAL, (handle,), session=how)
        except TpmError as error:
            if error.code != POLICY_FAIL:
                raise
            named = ", ".join(map(str, chosen))
            raise PcrMismatch(
                self._device, "Unseal", f"PCRs {named} are not what it was sealed to", error.code
            ) from None
        try:
            secret = bytearray(found.sized_view("secret", MAX_SEALED))
            found.end()
            return secret
        finally:
            buffer[:] = bytes(len(buffer))

    @asynccontextmanager
    async def _session(self, kind: int, parent: int, public: bytes) -> AsyncIterator[_Session]:
        """A session of this kind, whose key is agreed with the storage key."""
        name = _NAMES[_START_SESSION]
        made = _Session(public, lambda why: TpmError(self._device, name, f"a malformed answer: {why}"))
        given = _sized(made.nonce) + _sized(made.ephemeral) + _big(kind, 1)
        given += _big(_AES, 2) + _big(128, 2) + _big(_CFB, 2) + _big(_SHA256, 2)
        handle, found, _ = await self._run(_START_SESSION, (parent, _NULL), given, makes=True)
        async with self._loaded(handle):
            nonce = found.sized("nonce", 64)
            found.end()
            made.start(handle, nonce)
            yield made


def _name(public: bytes) -> bytes:
    """The TPM's name of an object."""
    return _big(_SHA256, 2) + hashlib.sha256(public).digest()


def _check_pcrs(chosen: Collection[int]) -> None:
    if not chosen or any(not 0 <= each < PCRS for each in chosen):
        raise LocalError(f"registers {sorted(chosen)}: at least one, from 0 to {PCRS - 1}")


def _bitmap(chosen: Collection[int]) -> bytes:
    return sum(1 << each for each in set(chosen)).to_bytes(PCRS // 8, "little")


def _selection(chosen: Collection[int]) -> bytes:
    """TPML_PCR_SELECTION of bank SHA-256."""
    return _big(1, 4) + _big(_SHA256, 2) + _big(PCRS // 8, 1) + _bitmap(chosen)


def _skip_creation(found: _Answer) -> None:
    """Creation data, hash and ticket, which nobody here asks for."""
    found.sized("creation data")
    found.sized("creation hash", 64)
    found.number(2, "ticket")
    found.number(4, "hierarchy")
    found.sized("ticket", 64)


def _parse_blob(blob: bytes) -> tuple[list[int], bytes, bytes]:
    at, parts = len(_BLOB) + PCRS // 8, []
    bitmap = int.from_bytes(blob[len(_BLOB) : at], "little")
    for _ in range(2):
        size = int.from_bytes(blob[at : at + 2], "big")
        parts.append(blob[at + 2 : at + 2 + size])
        at += 2 + size
    if not blob.startswith(_BLOB) or at != len(blob) or not bitmap or not all(parts):
        raise BadInput("a sealed blob is cut short, prolonged, or none of ours")
    return [index for index in range(PCRS) if bitmap >> index & 1], parts[0], parts[1]
