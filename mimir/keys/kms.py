"""A storage key that AWS KMS gives to an attested enclave alone (`Decrypt` with `Recipient`).

The sealed key is what KMS's `GenerateDataKey` returned; the policy of the KMS key must demand the enclave's
measurements (`kms:RecipientAttestation:...`), which is AWS's to enforce. The request carries a document of
the Nitro hypervisor that names an RSA key made in this process; KMS answers with the key encrypted to that,
and never in the clear: an answer that carries plaintext is refused, since whoever made it did not look at the
document. KMS checks no nonce, so the RSA key is fresh in every process.

Requests are signed here (Signature Version 4): that is forty lines on hmac, and botocore would bring the
descriptions of every AWS service into the enclave for it. **Not run against AWS**: tests use published
signatures, a real answer's encoding and a local fake that verifies the document and encrypts to its key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mimir import config
from mimir.attesters.nsm import NsmAttester
from mimir.config import Address
from mimir.errors import BadInput, EnvironmentMissing
from mimir.keys import cms, https
from mimir.keys.cms import KeyRefused
from mimir.keys.file import create_file
from mimir.secret import StorageKey
from mimir.vault import Counter

MAX_BLOB = 6144  # bytes that KMS takes
CONTEXT = {"purpose": "mimir storage key"}  # must be the same for encryption and decryption; not secret
ALGORITHM = "RSAES_OAEP_SHA_256"
RSA_BITS = 2048
TOKEN_SECONDS = "60"

Document = Callable[[bytes, bytes, bytes], Awaitable[bytes]]


@dataclass(frozen=True, repr=False)
class Credentials:
    """Who asks, for AWS. Short-lived where they come from an instance's metadata."""

    access: str
    secret: str
    token: str = ""


class KmsSource:
    """The sealed key lies in a file."""

    def __init__(
        self,
        path: Path,
        counter: Counter,
        settings: config.KmsKey,
        document: Document | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`document` asks the hypervisor; `tls` holds the roots that are believed (default: the system's)."""
        self._path = path
        self._settings = settings
        self._document = document or NsmAttester(settings.device).document
        self._tls = tls or ssl.create_default_context()
        self._private: rsa.RSAPrivateKey | None = None
        self.counter = counter
        self._host = f"kms.{settings.region}.amazonaws.com"
        self._place = settings.endpoint or Address(self._host, 443)

    @property
    def protection(self) -> str:
        return f"AWS KMS in {self._settings.region}, for enclaves that the policy of its key names"

    async def obtain(self) -> StorageKey:
        try:
            blob = self._path.read_bytes()[: MAX_BLOB + 1]
        except OSError as error:
            raise BadInput(
                f"sealed storage key {self._path}: {error.strerror}; inside the enclave, `mimir keygen "
                "--kind storage --sealed-by FILE` makes one, FILE being this party's configuration"
            ) from None
        return StorageKey((await self._ask("Decrypt", {"CiphertextBlob": _base64(blob)}))[0])

    async def create(self) -> None:
        if self._path.exists():
            raise BadInput(f"{self._path}: exists already; move it away first if it may go")
        key, answer = await self._ask("GenerateDataKey", {"KeySpec": "AES_256"})
        key[:] = bytes(len(key))
        create_file(self._path, _field(answer, "CiphertextBlob", MAX_BLOB))

    async def _ask(self, operation: str, body: Mapping[str, Any]) -> tuple[bytearray, dict[str, Any]]:
        """The key that the answer encrypts to us, and the answer."""
        if self._private is None:
            self._private = rsa.generate_private_key(65537, RSA_BITS)
        public = self._private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        document = await self._document(hashlib.sha256(public).digest(), os.urandom(32), public)
        recipient = {"KeyEncryptionAlgorithm": ALGORITHM, "AttestationDocument": _base64(document)}
        asked = {"KeyId": self._settings.key_id, "EncryptionContext": CONTEXT, "Recipient": recipient}
        answer = await self._call(operation, {**body, **asked})
        if answer.get("Plaintext") is not None:
            raise KeyRefused(f"{self._host}: answered with plaintext: it ignored our evidence; not used")
        if answer.get("KeyId") != self._settings.key_id:
            raise KeyRefused(f"{self._host}: answered for another key than {self._settings.key_id}")
        return cms.decrypt(_field(answer, "CiphertextForRecipient", cms.MAX_BYTES), self._private), answer

    async def _call(self, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        raw = json.dumps(body).encode()
        headers = {"content-type": "application/x-amz-json-1.1", "x-amz-target": f"TrentService.{operation}"}
        credentials = await find_credentials(self._settings.metadata)
        signed = sign(
            "POST",
            self._host,
            "/",
            headers,
            raw,
            credentials,
            self._settings.region,
            "kms",
            datetime.now(UTC),
        )
        answer = await https.request("POST", self._host, self._place, "/", signed, raw, self._tls)
        found = _json(answer.body, self._host)
        if answer.status != 200:
            why = " ".join(str(found.get(name, "")) for name in ("__type", "message", "Message")).strip()
            raise KeyRefused(f"{self._host}: {operation}: status {answer.status}: {why[:200]!r}")
        return found


async def find_credentials(metadata: Address | None) -> Credentials:
    """From the environment, or from an instance's metadata service (version 2) where an address is given."""
    if metadata is None:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise EnvironmentMissing(
                f"credentials for AWS: {missing[0]} is not set; set it, or name keys.kms.metadata"
            )
        access, secret = (os.environ[name] for name in names)
        return Credentials(access, secret, os.environ.get("AWS_SESSION_TOKEN", ""))

    async def get(method: str, path: str, headers: Mapping[str, str]) -> str:
        answer = await https.request(method, "169.254.169.254", metadata, path, headers, b"", None)
        if answer.status != 200:
            raise EnvironmentMissing(f"metadata at {metadata}: status {answer.status} for {path}")
        return answer.body.decode("ascii", "replace").strip()

    asked = {"x-aws-ec2-metadata-token-ttl-seconds": TOKEN_SECONDS}
    token = {"x-aws-ec2-metadata-token": await get("PUT", "/latest/api/token", asked)}
    folder = "/latest/meta-data/iam/security-credentials/"
    role = (await get("GET", folder, token)).split("\n")[0]
    found = _json((await get("GET", folder + role, token)).encode(), str(metadata))
    parts = [found.get(name) for name in ("AccessKeyId", "SecretAccessKey", "Token")]
    if not all(isinstance(each, str) and each for each in parts):
        raise EnvironmentMissing(f"metadata at {metadata}: no credentials for the role {role[:64]!r}")
    return Credentials(*map(str, parts))


def sign(
    method: str,
    host: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    credentials: Credentials,
    region: str,
    service: str,
    now: datetime,
) -> dict[str, str]:
    """The headers with AWS's Signature Version 4 among them. No query; names in lower case."""
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    signed = {**headers, "host": host, "x-amz-date": stamp}
    if credentials.token:
        signed["x-amz-security-token"] = credentials.token
    names = ";".join(sorted(signed))
    lines = [method, path, "", *(f"{name}:{signed[name].strip()}" for name in sorted(signed)), "", names]
    canonical = "\n".join([*lines, hashlib.sha256(body).hexdigest()])
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = b"AWS4" + credentials.secret.encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    signed["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access}/{scope}, SignedHeaders={names}, "
        f"Signature={signature}"
    )
    return signed


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _json(raw: bytes, who: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise KeyRefused(f"{who}: answered what is no JSON object")
    return found


def _field(answer: Mapping[str, Any], name: str, limit: int) -> bytes:
    value = answer.get(name)
    try:
        raw = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        raw = b""
    if not 0 < len(raw) <= limit:
        raise KeyRefused(f"KMS: no usable {name} in the answer")
    return raw
