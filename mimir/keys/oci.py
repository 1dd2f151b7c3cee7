"""A storage key under a key of OCI Vault, for a broker's own share.

OCI Vault looks at no evidence: it gives the key to whoever holds the API key. So this guards a stolen disk,
and not a machine that was changed; a broker that keeps its share so must itself be trusted. Requests carry
HTTP signatures (draft-cavage-http-signatures-08 with OCI's required headers). Instance principals are not
built: they could not be tried. **Not run against OCI**: tests use published signatures and a local fake.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mimir import config
from mimir.errors import BadInput
from mimir.keys import https
from mimir.keys.cms import KeyRefused
from mimir.keys.file import create_file
from mimir.secret import StorageKey
from mimir.vault import Counter

MAX_BLOB = 8192
VERSION = "/20180608"


class OciSource:
    """The sealed key lies in a file, as OCI wrote it."""

    def __init__(
        self, path: Path, counter: Counter, settings: config.OciKey, tls: ssl.SSLContext | None = None
    ) -> None:
        self._path = path
        self._settings = settings
        self._tls = tls or ssl.create_default_context()
        self.counter = counter

    @property
    def protection(self) -> str:
        return f"OCI Vault at {self._settings.endpoint}, for whoever holds the API key; nothing is attested"

    async def obtain(self) -> StorageKey:
        try:
            blob = self._path.read_bytes()[: MAX_BLOB + 1].strip()
        except OSError as error:
            raise BadInput(
                f"sealed storage key {self._path}: {error.strerror}; `mimir keygen --kind storage "
                "--sealed-by FILE` makes one"
            ) from None
        answer = await self._call("decrypt", {"ciphertext": blob.decode("ascii", "replace")})
        value = answer.get("plaintext")
        try:
            key = bytearray(base64.b64decode(value, validate=True)) if isinstance(value, str) else bytearray()
        except ValueError:
            key = bytearray()
        if len(key) != StorageKey.SIZE:
            raise KeyRefused(f"OCI Vault: no key of {StorageKey.SIZE} bytes in the answer")
        return StorageKey(key)

    async def create(self) -> None:
        if self._path.exists():
            raise BadInput(f"{self._path}: exists already; move it away first if it may go")
        shape = {"algorithm": "AES", "length": StorageKey.SIZE}
        answer = await self._call(
            "generateDataEncryptionKey", {"includePlaintextKey": False, "keyShape": shape}
        )
        value = answer.get("ciphertext")
        if not isinstance(value, str) or not 0 < len(value) <= MAX_BLOB or not value.isascii():
            raise KeyRefused("OCI Vault: no usable ciphertext in the answer")
        create_file(self._path, value.encode() + b"\n")

    async def _call(self, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        settings, host = self._settings, self._settings.endpoint.host
        raw = json.dumps({**body, "keyId": settings.key_id}).encode()
        key_id = f"{settings.tenancy}/{settings.user}/{settings.fingerprint}"
        private = load_api_key(settings.api_key)
        headers = sign("post", host, f"{VERSION}/{operation}", raw, key_id, private, datetime.now(UTC))
        path = f"{VERSION}/{operation}"
        answer = await https.request("POST", host, settings.endpoint, path, headers, raw, self._tls)
        try:
            found = json.loads(answer.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise KeyRefused(f"{host}: answered what is no JSON object")
        if answer.status != 200:
            why = f"{found.get('code', '')} {found.get('message', '')}"
            raise KeyRefused(f"{host}: {operation}: status {answer.status}: {why[:200]!r}")
        return found


def load_api_key(path: Path) -> RSAPrivateKey:
    """The API key, PEM; `BadInput` if it is missing, readable by others, or no RSA key."""
    try:
        with open(path, "rb") as file:
            mode, raw = os.fstat(file.fileno()).st_mode, file.read(1 << 14)
    except OSError as error:
        raise BadInput(f"keys.oci.api_key {path}: {error.strerror}") from None
    if mode & 0o077:
        raise BadInput(f"keys.oci.api_key {path}: mode {mode & 0o777:04o}; run: chmod 600 {path}")
    try:
        private = load_pem_private_key(raw, None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, RSAPrivateKey):
        raise BadInput(f"keys.oci.api_key {path}: not an RSA key in PEM, or one with a password")
    return private


def sign(
    method: str, host: str, path: str, body: bytes, key_id: str, private: RSAPrivateKey, now: datetime
) -> dict[str, str]:
    """The headers of a request with a body, OCI's signature among them."""
    headers = {
        "date": format_datetime(now, usegmt=True),
        "(request-target)": f"{method} {path}",
        "host": host,
        "content-length": str(len(body)),
        "content-type": "application/json",
        "x-content-sha256": base64.b64encode(hashlib.sha256(body).digest()).decode(),
    }
    text = "\n".join(f"{name}: {value}" for name, value in headers.items())
    signature = base64.b64encode(private.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())).decode()
    authorization = (
        f'Signature version="1",headers="{" ".join(headers)}",keyId="{key_id}",algorithm="rsa-sha256",'
        f'signature="{signature}"'
    )
    del headers["(request-target)"]
    return {**headers, "authorization": authorization}
