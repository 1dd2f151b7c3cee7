"""Who is who: long-lived Ed25519 identities, and the handshake that binds a connection to two of them.

A party, a client and an owner each have one identity. Its public key, 64 hexadecimal digits, stands in the
configuration of those who must recognise it. From the same seed comes an X25519 key, by the standard map
between the two curves, for sealed boxes between clients and parties.

`Handshake` is free of I/O: frames in, frames out. A signed Diffie-Hellman exchange with key confirmation:

    dialer                                         acceptor
    HELLO  version, numbers, lane, generation,  ->
           config digest, identity, nonce, fresh key
                                                <- HELLO  the same from this side
                                                <- PROOF  signature and tag over both hellos
    PROOF  signature and tag over both hellos   ->
                                                <- WELCOME  tag over both hellos

Signatures and tags cover everything above, with a label for the role, so that nothing can be replayed (both
nonces are fresh), reflected (roles differ) or moved to another lane, party or configuration. The shared
secret dies with the connection: keys of a session do not outlive the links it ran on.

The cryptography libraries take `bytes`, which Python cannot wipe; keys pass through such copies briefly.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

import nacl.bindings as sodium
import nacl.exceptions

from mimir import vault
from mimir.errors import BadInput, LocalError, MimirError
from mimir.net import LANES, PROTOCOL_VERSION, wire
from mimir.secret import ExchangeKey, IdentityKey, LinkSecret, StorageKey

PUBLIC_BYTES = 32
NONCE_BYTES = 32
MAX_FILE = 4096
_FILE_MARK = "mimir-identity-v1"
SEALED_PURPOSE = "identity"


def _given_by_systemd(path: str | Path, status: os.stat_result) -> bool:
    """Whether this is a credential of our unit: root's, with an access list that lets our user read it, which
    shows as a right of root's group and lets nobody else in."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    ours = folder is not None and Path(path).absolute().parent == Path(folder)
    return ours and (status.st_uid, status.st_gid) == (0, 0) and not status.st_mode & 0o037


class Identity:
    """An Ed25519 key pair. Signs; never shows its seed."""

    __slots__ = ("_seed", "public")

    public: bytes

    def __init__(self, seed: IdentityKey) -> None:
        self._seed = seed
        with seed.reveal_to_kernel() as view:
            self.public = sodium.crypto_sign_seed_keypair(bytes(view))[0]

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from the operating system's randomness."""
        return cls(IdentityKey.random())

    @classmethod
    def load(cls, path: str | Path, key: StorageKey | None = None) -> Identity:
        """Read an identity file; `BadInput` if it is missing, readable by others, or not such a file.

        One that is encrypted at rest needs the storage key; `StoreError` if it is under another.
        """
        if is_sealed(path):
            if key is None:
                raise BadInput(
                    f"identity {path}: encrypted under a party's storage key; only that party opens it"
                )
            return cls(IdentityKey(vault.unseal(key, SEALED_PURPOSE, SEALED_PURPOSE, Path(path), None)))
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                raw = bytearray(file.read(MAX_FILE + 1))
        except OSError as exc:
            raise BadInput(f"identity {path}: {exc.strerror}; `mimir keygen` makes one") from None
        try:
            if status.st_mode & 0o077 and not _given_by_systemd(path, status):
                mode = status.st_mode & 0o777
                raise BadInput(f"identity {path}: mode {mode:04o} lets others read it; run: chmod 600 {path}")
            if status.st_uid not in (os.geteuid(), 0):
                raise BadInput(f"identity {path}: belongs to another user (uid {status.st_uid})")
            words = raw.split()
            if len(words) != 2 or words[0] != _FILE_MARK.encode() or len(words[1]) != 2 * IdentityKey.SIZE:
                raise BadInput(f"identity {path}: not an identity file; `mimir keygen` makes one")
            try:
                seed = bytearray.fromhex(words[1].decode("ascii"))
            except ValueError:
                raise BadInput(f"identity {path}: damaged; restore it from your copy") from None
            for word in words:
                word[:] = bytes(len(word))
        finally:
            raw[:] = bytes(len(raw))
        return cls(IdentityKey(seed))

    def seal(self, path: Path, key: StorageKey) -> None:
        """Write the file, encrypted under the storage key, in place of any that is there."""
        with self._seed.reveal_to_kernel() as view:
            _version, whole = vault.seal(key, SEALED_PURPOSE, SEALED_PURPOSE, view)
        vault.replace_file(path, whole)

    def save(self, path: str | Path) -> None:
        """Write the file, mode 0600, never over an existing one."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise BadInput(f"identity {path}: exists already; move it away first if it may go") from None
        except OSError as exc:
            raise BadInput(f"identity {path}: {exc.strerror}") from None
        with os.fdopen(handle, "w") as file, self._seed.reveal_to_kernel() as view:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask said
            file.write(f"{_FILE_MARK} {view.hex()}\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def public_hex(self) -> str:
        """The public key as configuration files write it."""
        return self.public.hex()

    def sign(self, message: bytes) -> bytes:
        """A 64-byte signature. The caller labels the message with its purpose."""
        with self._seed.reveal_to_kernel() as view:
            _public, private = sodium.crypto_sign_seed_keypair(bytes(view))
        return sodium.crypto_sign(message, private)[:64]

    def exchange_key(self) -> ExchangeKey:
        """The X25519 private key of this identity, for sealed boxes."""
        with self._seed.reveal_to_kernel() as view:
            _public, private = sodium.crypto_sign_seed_keypair(bytes(view))
        return ExchangeKey(bytearray(sodium.crypto_sign_ed25519_sk_to_curve25519(private)))

    def __repr__(self) -> str:
        return f"<Identity {self.public_hex[:16]}>"


def is_sealed(path: str | Path) -> bool:
    """Whether an identity file is encrypted at rest. False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(vault.MAGIC)) == vault.MAGIC
    except OSError:
        return False


def verify(public: bytes, message: bytes, signature: bytes) -> None:
    """Return if `signature` is by `public` over `message`; raise `BadSignature` if not."""
    try:
        sodium.crypto_sign_open(signature + message, public)
    except (nacl.exceptions.CryptoError, ValueError):
        raise BadSignature("signature does not verify") from None


def exchange_public(public: bytes) -> bytes:
    """The X25519 public key that belongs to an identity's public key."""
    try:
        return sodium.crypto_sign_ed25519_pk_to_curve25519(public)
    except (nacl.exceptions.CryptoError, ValueError, RuntimeError):
        raise BadInput("not an Ed25519 public key: no point of the right order") from None


def parse_public(text: str) -> bytes:
    """A public key from its 64 hexadecimal digits."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != PUBLIC_BYTES or len(text) != 2 * PUBLIC_BYTES:
        raise BadInput(f"a public key is {2 * PUBLIC_BYTES} hexadecimal digits, as `mimir keygen` prints it")
    return raw


class BadSignature(MimirError):
    """Somebody signed something else, or somebody else signed."""

    exit_code = 6


class HandshakeError(MimirError):
    """The two ends do not agree; `item` names what differs."""

    exit_code = 6

    def __init__(self, item: str, text: str) -> None:
        super().__init__(f"{item}: {text}")
        self.item = item
        self.text = text


def derive(secret: LinkSecret, label: str, context: bytes = b"") -> LinkSecret:
    """32 bytes bound to a label and a context: one block of HKDF-Expand (RFC 5869, section 2.3)."""
    name = label.encode()
    info = b"mimir link\0" + len(name).to_bytes(2, "big") + name + context
    with secret.reveal_to_kernel() as view:
        return LinkSecret(bytearray(hmac.digest(view, info + b"\x01", "sha256")))


class Handshake:
    """One end of one handshake. After `done`: `peer`, `lane`, `generation`, `transcript`, `secret`.

    Give `receive` each frame and send what it returns, in order. It raises `HandshakeError`; then send
    `refusal(error)` and close.
    """

    __slots__ = (
        "_config",
        "_ephemeral",
        "_identity",
        "_keys",
        "_mine",
        "_prk",
        "_theirs",
        "_waits_for",
        "dials",
        "done",
        "generation",
        "lane",
        "party",
        "peer",
        "transcript",
    )

    def __init__(
        self,
        identity: Identity,
        party: int,
        keys: Mapping[int, bytes],  # identity public key of every party, ours included
        config: bytes,
        *,
        dial: int | None = None,  # the party we call; None to be called
        lane: str = "control",
        generation: bytes = b"",
    ) -> None:
        if keys.get(party) != identity.public:
            raise BadInput(
                f"our identity is {identity.public_hex[:16]}..., "
                f"not the one the configuration gives party {party}"
            )
        if dial is not None and (dial == party or dial not in keys or lane not in LANES):
            raise LocalError(f"party {party} cannot call party {dial} on lane {lane!r}")
        self._identity = identity
        self._keys = keys
        self._config = config
        self.party = party
        self.dials = dial is not None
        self.peer = -1 if dial is None else dial
        self.lane = lane
        self.generation = generation
        self.transcript = b""
        self.done = False
        self._ephemeral = ExchangeKey.random()
        self._mine: wire.Hello | None = None
        self._theirs: wire.Hello | None = None
        self._prk: LinkSecret | None = None
        self._waits_for: type = wire.Hello

    def first(self) -> list[wire.Frame]:
        """What this end sends before it hears anything."""
        return [self._hello()] if self.dials else []

    def _hello(self) -> wire.Hello:
        with self._ephemeral.reveal_to_kernel() as view:
            fresh = sodium.crypto_scalarmult_base(bytes(view))
        self._mine = wire.Hello(
            PROTOCOL_VERSION,
            self.party,
            self.peer,
            self.lane,
            self.generation,
            self._config,
            self._identity.public,
            os.urandom(NONCE_BYTES),
            fresh,
        )
        return self._mine

    def receive(self, frame: wire.Frame) -> list[wire.Frame]:
        """Check the next frame from the other end and return what to answer."""
        if isinstance(frame, wire.Refuse):
            raise HandshakeError(frame.item, f"refused by the other end: {frame.text}")
        if self.done or type(frame) is not self._waits_for:
            raise HandshakeError("order", f"{type(frame).__name__} where {self._waits_for.__name__} is due")
        if isinstance(frame, wire.Hello):
            self._check_hello(frame)
            self._theirs = frame
            mine = self._mine or self._hello()
            self._agree(mine, frame)
            self._waits_for = wire.Proof
            return [] if self.dials else [mine, self._proof()]
        if isinstance(frame, wire.Proof):
            self._check_proof(frame)
            if self.dials:
                self._waits_for = wire.Welcome
                return [self._proof()]
            self.done = True
            return [wire.Welcome(self._tag("welcome"))]
        assert isinstance(frame, wire.Welcome)
        self._check_tag("welcome", frame.tag)
        self.done = True
        return []

    def refusal(self, error: HandshakeError) -> wire.Refuse:
        """What to tell the other end: the item, and our view of it. Nothing secret is in either."""
        text = "".join(c for c in error.text if c.isascii() and c.isprintable())[: wire.MAX_TEXT]
        return wire.Refuse(error.item, text or "refused")

    def secret(self) -> LinkSecret:
        """The secret of this connection, for `derive`; known to the two ends only."""
        if not self.done or self._prk is None:
            raise LocalError("no secret before the handshake is done")
        return derive(self._prk, "sessions")

    def wipe(self) -> None:
        """Forget the keys of this handshake; secrets already handed out stay."""
        self._ephemeral.wipe()
        if self._prk is not None:
            self._prk.wipe()

    def _check_hello(self, hello: wire.Hello) -> None:
        sender = hello.sender
        if hello.version != PROTOCOL_VERSION:
            raise HandshakeError(
                "version", f"party {sender} speaks {hello.version}, we speak {PROTOCOL_VERSION}"
            )
        if self.dials:
            if sender != self.peer:
                raise HandshakeError("party", f"we called party {self.peer}, party {sender} answers")
        elif sender == self.party or sender not in self._keys:
            raise HandshakeError("party", f"no peer of ours has number {sender}")
        elif sender > self.party:
            raise HandshakeError("party", f"party {sender} must wait for us to call: the lower number calls")
        if hello.receiver != self.party:
            raise HandshakeError(
                "receiver", f"party {sender} looks for party {hello.receiver}, we are {self.party}"
            )
        if hello.identity != self._keys[sender]:
            raise HandshakeError(
                "identity",
                f"party {sender} presents {hello.identity.hex()[:16]}..., "
                f"configured is {self._keys[sender].hex()[:16]}...",
            )
        if hello.config != self._config:
            raise HandshakeError(
                "config",
                f"party {sender} has terms {hello.config.hex()[:16]}..., "
                f"we have {self._config.hex()[:16]}...: compare the shared keys of both files",
            )
        if self.dials:
            if hello.lane != self.lane:
                raise HandshakeError(
                    "lane", f"we asked for {self.lane!r}, party {sender} answers {hello.lane!r}"
                )
            if hello.generation != self.generation:
                raise HandshakeError("generation", f"party {sender} answers for another connection")
        else:
            if (hello.lane == "control") != (hello.generation == b""):
                raise HandshakeError("generation", "every lane but control belongs to a control connection")
            self.peer, self.lane, self.generation = sender, hello.lane, hello.generation

    def _agree(self, mine: wire.Hello, theirs: wire.Hello) -> None:
        caller, called = (mine, theirs) if self.dials else (theirs, mine)
        whole = hashlib.sha256(b"mimir link handshake\0")
        for hello in (caller, called):
            raw = wire.encode(hello)
            whole.update(len(raw).to_bytes(4, "big") + raw)
        self.transcript = whole.digest()
        try:
            with self._ephemeral.reveal_to_kernel() as view:
                shared = sodium.crypto_scalarmult(bytes(view), theirs.ephemeral)
        except (nacl.exceptions.CryptoError, RuntimeError, ValueError):
            raise HandshakeError("ephemeral", "the fresh key is a point of small order") from None
        self._prk = LinkSecret(bytearray(hmac.digest(self.transcript, shared, "sha256")))  # HKDF-Extract

    def _statement(self, role: str) -> bytes:
        return b"mimir link proof\0" + role.encode() + b"\0" + self.transcript

    def _role(self, mine: bool) -> str:
        return "caller" if self.dials == mine else "called"

    def _tag(self, role: str) -> bytes:
        assert self._prk is not None
        key = derive(self._prk, "confirm")
        with key, key.reveal_to_kernel() as view:
            return hmac.digest(view, self._statement(role), "sha256")

    def _check_tag(self, role: str, tag: bytes) -> None:
        if not hmac.compare_digest(tag, self._tag(role)):
            raise HandshakeError("key", f"party {self.peer} does not hold the secret of this connection")

    def _proof(self) -> wire.Proof:
        role = self._role(True)
        return wire.Proof(self._identity.sign(self._statement(role)), self._tag(role))

    def _check_proof(self, proof: wire.Proof) -> None:
        role = self._role(False)
        try:
            verify(self._keys[self.peer], self._statement(role), proof.signature)
        except BadSignature:
            raise HandshakeError(
                "signature",
                f"not by the identity configured for party {self.peer}, or not over these messages",
            ) from None
        self._check_tag(role, proof.tag)
