"""What AWS KMS answers to an attested enclave: CMS EnvelopedData (RFC 5652) for one RSA key.

The encoding is BER with indefinite lengths, which `cryptography` does not take apart; so a small reader here
does, bounded in size, depth and number of elements. Of the structure only what KMS uses is accepted: one
recipient named by its key, RSAES-OAEP with SHA-256 throughout, AES-256-CBC. CBC authenticates nothing: what
comes out must be used as a key whose use is authenticated, and have a key's length.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from mimir.errors import MimirError

MAX_BYTES = 16 << 10
MAX_DEPTH = 16
MAX_ELEMENTS = 128
KEY_BYTES, IV_BYTES = 32, 16

_INTEGER, _OCTETS, _NULL, _OID, _SEQUENCE, _SET = 0x02, 0x04, 0x05, 0x06, 0x30, 0x31
_BARE_0, _INSIDE_0, _INSIDE_1 = 0x80, 0xA0, 0xA1  # context tags: primitive [0], constructed [0] and [1]
_ENVELOPED = bytes.fromhex("2a864886f70d010703")
_DATA = bytes.fromhex("2a864886f70d010701")
_OAEP = bytes.fromhex("2a864886f70d010107")
_MGF1 = bytes.fromhex("2a864886f70d010108")
_SHA256 = bytes.fromhex("608648016503040201")
_AES256_CBC = bytes.fromhex("60864801650304012a")


class KeyRefused(MimirError):
    """Whoever holds a storage key refused it, or answered what cannot be believed; names who and why."""

    exit_code = 6


@dataclass(frozen=True)
class Enveloped:
    """The parts that decryption needs."""

    recipient: bytes  # how the sender names the key
    encrypted_key: bytes
    iv: bytes
    ciphertext: bytes


def parse(raw: bytes) -> Enveloped:
    """Take EnvelopedData apart; `KeyRefused` for anything else."""
    if not 0 < len(raw) <= MAX_BYTES:
        raise KeyRefused(f"CMS: 1 to {MAX_BYTES} bytes expected, {len(raw)} came")
    reader = _Reader(raw)
    top, end = reader.element(0, len(raw), 0)
    if end != len(raw):
        raise KeyRefused(f"CMS: {len(raw) - end} bytes after the end")
    kind, inside = _children(top, _SEQUENCE, 2, "ContentInfo")
    _same(kind, _OID, _ENVELOPED, "the content's type")
    (enveloped,) = _children(inside, _INSIDE_0, 1, "content")
    version, recipients, content = _children(enveloped, _SEQUENCE, 3, "EnvelopedData")
    _same(version, _INTEGER, b"\x02", "the version")
    (recipient,) = _children(recipients, _SET, 1, "recipients")
    version, name, algorithm, encrypted_key = _children(recipient, _SEQUENCE, 4, "the recipient")
    _same(version, _INTEGER, b"\x02", "the recipient's version")
    oaep, parameters = _children(algorithm, _SEQUENCE, 2, "the key's algorithm")
    _same(oaep, _OID, _OAEP, "the key's algorithm")
    digest, mask = _children(parameters, _SEQUENCE, 2, "OAEP's parameters")
    _sha256(_children(digest, _INSIDE_0, 1, "OAEP's hash")[0])
    (mask,) = _children(mask, _INSIDE_1, 1, "OAEP's mask")
    mgf1, inner = _children(mask, _SEQUENCE, 2, "OAEP's mask")
    _same(mgf1, _OID, _MGF1, "OAEP's mask")
    _sha256(inner)
    kind, cipher, data = _children(content, _SEQUENCE, 3, "EncryptedContentInfo")
    _same(kind, _OID, _DATA, "the encrypted type")
    aes, iv = _children(cipher, _SEQUENCE, 2, "the content's algorithm")
    _same(aes, _OID, _AES256_CBC, "the content's algorithm")
    # Implicit [0] of an octet string: in one piece, or in several.
    if data.tag == _BARE_0:
        ciphertext = data.content
    else:
        pieces = _all(data, _INSIDE_0, "the ciphertext")
        ciphertext = b"".join(_content(each, _OCTETS, "the ciphertext") for each in pieces)
    return Enveloped(
        _content(name, _BARE_0, "the recipient's name"),
        _content(encrypted_key, _OCTETS, "the encrypted key"),
        _content(iv, _OCTETS, "the initial vector"),
        ciphertext,
    )


def decrypt(raw: bytes, private: RSAPrivateKey) -> bytearray:
    """The 32-byte key inside, in a buffer that is the caller's to wipe; `KeyRefused` if there is none."""
    found = parse(raw)
    scheme = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    try:
        key = private.decrypt(found.encrypted_key, scheme)
        opened = Cipher(algorithms.AES256(key), modes.CBC(found.iv)).decryptor()
        unpadded = PKCS7(8 * IV_BYTES).unpadder()
        padded = opened.update(found.ciphertext) + opened.finalize()
        plain = bytearray(unpadded.update(padded) + unpadded.finalize())
    except ValueError:
        raise KeyRefused("CMS: does not open with our key: damaged, or for another one") from None
    if len(plain) != KEY_BYTES:
        size = len(plain)
        plain[:] = bytes(size)
        raise KeyRefused(f"CMS: {size} bytes inside, a key of {KEY_BYTES} expected")
    return plain


# --- BER ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Element:
    tag: int
    content: bytes  # of a primitive one
    children: tuple[_Element, ...]


class _Reader:
    """Reads elements of one buffer; never past its end, never deeper or more than the limits."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._count = 0

    def element(self, at: int, end: int, depth: int) -> tuple[_Element, int]:
        """The element at a place, and where it ends."""
        self._count += 1
        if depth > MAX_DEPTH or self._count > MAX_ELEMENTS:
            raise KeyRefused("CMS: nested too deep, or too many elements")
        tag, at = self._byte(at, end), at + 1
        if tag & 0x1F == 0x1F:
            raise KeyRefused(f"CMS: a tag of several bytes at {at - 1}")
        first, at = self._byte(at, end), at + 1
        if first == 0x80:
            if not tag & 0x20:
                raise KeyRefused(f"CMS: a primitive element without a length at {at - 2}")
            return self._children(tag, at, end, depth, None)
        size = first
        if first & 0x80:
            count = first & 0x7F
            if count > 4 or at + count > end:
                raise KeyRefused(f"CMS: a length of {count} bytes at {at - 1}")
            size, at = int.from_bytes(self._raw[at : at + count], "big"), at + count
        if at + size > end:
            raise KeyRefused(f"CMS: {size} bytes announced at {at}, {end - at} left")
        if tag & 0x20:
            return self._children(tag, at, at + size, depth, at + size)
        return _Element(tag, self._raw[at : at + size], ()), at + size

    def _children(self, tag: int, at: int, end: int, depth: int, stop: int | None) -> tuple[_Element, int]:
        """Elements up to `stop`, or where that is None up to the end-of-contents mark."""
        found: list[_Element] = []
        while at != stop:
            if stop is None and self._raw[at : at + 2] == b"\0\0" and at + 2 <= end:
                return _Element(tag, b"", tuple(found)), at + 2
            child, at = self.element(at, end, depth + 1)
            found.append(child)
        return _Element(tag, b"", tuple(found)), at

    def _byte(self, at: int, end: int) -> int:
        if at >= end:
            raise KeyRefused("CMS: cut short")
        return self._raw[at]


def _all(element: _Element, tag: int, what: str) -> tuple[_Element, ...]:
    if element.tag != tag:
        raise KeyRefused(f"CMS: {what}: tag {tag:#04x} expected, {element.tag:#04x} came")
    return element.children


def _children(element: _Element, tag: int, count: int, what: str) -> tuple[_Element, ...]:
    found = _all(element, tag, what)
    if len(found) != count:
        raise KeyRefused(f"CMS: {what}: {count} elements expected, {len(found)} came")
    return found


def _content(element: _Element, tag: int, what: str) -> bytes:
    if element.tag != tag:
        raise KeyRefused(f"CMS: {what}: tag {tag:#04x} expected, {element.tag:#04x} came")
    return element.content


def _same(element: _Element, tag: int, expected: bytes, what: str) -> None:
    if _content(element, tag, what) != expected:
        raise KeyRefused(f"CMS: {what}: {expected.hex()} expected, {element.content.hex()[:40]} came")


def _sha256(algorithm: _Element) -> None:
    found = _all(algorithm, _SEQUENCE, "a hash")
    if not found or len(found) > 2 or (len(found) == 2 and (found[1].tag, found[1].content) != (_NULL, b"")):
        raise KeyRefused("CMS: a hash: SHA-256 without parameters expected")
    _same(found[0], _OID, _SHA256, "a hash")
