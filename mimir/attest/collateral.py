"""What authorities say of their chips, kept in files: AMD's chains and revocation lists, Intel's collateral.

A `Store` is a directory; `Store.read` gives a `Collateral`, which is data and all that verifiers see. Nothing
here decides what is still valid: each item carries its own dates, verifiers hold them against the time they
are given, and what has expired fails. `refresh` asks the authorities anew and keeps what verifies, nothing
else; it gets its answers from a function, such as `https_get`.

    amd/<product>/<vcek|vlek>.pem    ASK or ASVK, then ARK
    amd/<product>/crl.der            of the ARK
    amd/vek/<chip and TCB>.der       certificates of chips
    intel/<fmspc>.json               nine texts, as `tdx.COLLATERAL_KEYS` names them
    tpm/authorities.pem              of clouds' vTPMs, put there by hand
    index.json                       when each item was fetched, and its SHA-256
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import ssl
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mimir.attest import certs, snp, tdx
from mimir.attest.trail import Trail, stamp
from mimir.errors import BadInput, EnvironmentMissing

MAX_ITEM = 2 << 20
MAX_ITEMS = 4096
TIMEOUT_S = 20.0
AMD = "https://kdsintf.amd.com"
INTEL = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
HOSTS = frozenset(
    {"kdsintf.amd.com", "api.trustedservices.intel.com", "certificates.trustedservices.intel.com"}
)
INDEX = "index.json"
_NAME = re.compile(r"(?:[a-z0-9][a-z0-9_-]{0,199}/){1,2}[a-z0-9][a-z0-9_-]{0,199}\.(?:pem|der|json)")


@dataclass(frozen=True)
class Item:
    """One file, and when its authority gave it."""

    data: bytes
    fetched: datetime


@dataclass(frozen=True)
class Collateral:
    """Everything that verifiers may use, by name."""

    items: Mapping[str, Item] = field(default_factory=dict)

    def get(self, name: str) -> Item | None:
        return self.items.get(name)


class Store:
    """A directory of collateral."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def read(self) -> Collateral:
        """Every item, each as its hash in the index says; `BadInput` names a file that is not."""
        items = {}
        for name, (fetched, digest) in self._index().items():
            path = self.directory / name
            try:
                with open(path, "rb") as file:
                    data = file.read(MAX_ITEM + 1)
            except OSError as error:
                raise BadInput(f"collateral {path}: {error.strerror}; fetch it again") from None
            if len(data) > MAX_ITEM or hashlib.sha256(data).hexdigest() != digest:
                raise BadInput(
                    f"collateral {path}: not what was stored; remove the directory and fetch again"
                )
            items[name] = Item(data, fetched)
        return Collateral(items)

    def put(self, name: str, data: bytes, fetched: datetime) -> None:
        """Store one item; the old one stays if anything fails."""
        if not _NAME.fullmatch(name) or len(data) > MAX_ITEM:
            raise BadInput(f"collateral {name[:100]!r}: not a name or a size of this store")
        path = self.directory / name
        index = self._index()
        index[name] = (fetched, hashlib.sha256(data).hexdigest())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data)
            plain = {key: {"fetched": stamp(when), "sha256": digest} for key, (when, digest) in index.items()}
            _write(self.directory / INDEX, json.dumps(plain, indent=1, sort_keys=True).encode())
        except OSError as error:
            raise BadInput(f"collateral {path}: {error.strerror}") from None

    def _index(self) -> dict[str, tuple[datetime, str]]:
        path = self.directory / INDEX
        try:
            raw = path.read_bytes() if path.exists() else b"{}"
            found = json.loads(raw)
            index = {}
            for name, entry in found.items():
                when = datetime.strptime(entry["fetched"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
                if set(entry) != {"fetched", "sha256"} or not _NAME.fullmatch(name):
                    raise ValueError(name)
                index[name] = (when, str(entry["sha256"]))
            if len(index) > MAX_ITEMS:
                raise ValueError("too many items")
        except OSError as error:
            raise BadInput(f"collateral {path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise BadInput(f"collateral {path}: damaged; remove the directory and fetch again") from None
        return index


def _write(path: Path, data: bytes) -> None:
    draft = path.with_suffix(path.suffix + ".new")
    with open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


# --- asking the authorities --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a server said: header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Get = Callable[[str], Answer]


def https_get(url: str) -> Answer:
    """Ask one of HOSTS over TLS; no redirection is followed, no more than MAX_ITEM bytes are read."""
    parsed = urllib.parse.urlsplit(url)
    if parsed.scheme != "https" or parsed.netloc not in HOSTS:
        raise BadInput(f"{url}: not one of " + ", ".join(sorted(HOSTS)))
    connection = http.client.HTTPSConnection(
        parsed.netloc, timeout=TIMEOUT_S, context=ssl.create_default_context()
    )
    try:
        connection.request("GET", f"{parsed.path}?{parsed.query}" if parsed.query else parsed.path)
        response = connection.getresponse()
        body = response.read(MAX_ITEM + 1)
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, body)
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentMissing(f"{parsed.netloc}: {error}; is there a way to it from here?") from None
    finally:
        connection.close()


def _fetch(get: Get, url: str) -> Answer:
    answer = get(url)
    if answer.status != 200 or not 0 < len(answer.body) <= MAX_ITEM:
        raise BadInput(f"{url}: status {answer.status}, {len(answer.body)} bytes; nothing of it is kept")
    return answer


def refresh_amd(
    store: Store, get: Get, now: datetime, product: str, roots: Mapping[str, str] = snp.ROOTS
) -> None:
    """Fetch the two chains and the revocation list of one product; keep them if they verify at `now`."""
    family, trail = product.capitalize(), Trail("snp")
    listed = _fetch(get, f"{AMD}/vcek/v1/{family}/crl").body
    chains = {}
    for kind in ("vcek", "vlek"):
        chains[kind] = _fetch(get, f"{AMD}/{kind}/v1/{family}/cert_chain").body
        _, root = snp.verify_authorities(chains[kind], product, kind, now, trail, roots)
        certs.verify_crl(trail, "crl", listed, root, now)
    for kind, pem in chains.items():
        store.put(f"amd/{product}/{kind}.pem", pem, now)
    store.put(f"amd/{product}/crl.der", listed, now)


def vek_name(report: snp.Report, product: str) -> str:
    """Under what name the certificate of a report's chip and TCB is kept."""
    return f"amd/vek/{product}-{_hwid(report, product)}-{report.reported_tcb.hex()}.der"


def _hwid(report: snp.Report, product: str) -> str:
    return report.chip_id[: snp.HWID_BYTES[product]].hex()


def refresh_vek(store: Store, get: Get, now: datetime, report: snp.Report, product: str) -> None:
    """Fetch the VCEK of a report that names its chip. Not verified here: a report by another key fails."""
    layout = snp.TCB_LAYOUT[product]
    query = "&".join(f"{name}SPL={report.reported_tcb[at]:02d}" for name, at in layout.items())
    url = f"{AMD}/vcek/v1/{product.capitalize()}/{_hwid(report, product)}?{query}"
    der = _fetch(get, url).body
    snp.parse_vek(der, Trail("snp"))
    store.put(vek_name(report, product), der, now)


def refresh_intel(
    store: Store, get: Get, now: datetime, fmspc: str, authority: str, roots: Collection[str] = tdx.ROOTS
) -> None:
    """Fetch the collateral of one platform family; keep it if all of it verifies at `now`.

    `authority` is the CA of the platform's certificate: "platform" or "processor".
    """
    listed = _fetch(get, f"{INTEL}/sgx/certification/v4/pckcrl?ca={authority}&encoding=der")
    info = _fetch(get, f"{INTEL}/tdx/certification/v4/tcb?fmspc={fmspc}")
    identity = _fetch(get, f"{INTEL}/tdx/certification/v4/qe/identity")
    root_list = _fetch(get, INTEL_ROOT_CRL)
    tcb_info, tcb_signature = _signed_part(info.body, "tcbInfo")
    qe_identity, qe_signature = _signed_part(identity.body, "enclaveIdentity")
    found = {
        "pck_crl_issuer_chain": _chain_header(listed, "sgx-pck-crl-issuer-chain"),
        "root_ca_crl": root_list.body.hex(),
        "pck_crl": listed.body.hex(),
        "tcb_info_issuer_chain": _chain_header(info, "tcb-info-issuer-chain"),
        "tcb_info": tcb_info,
        "tcb_info_signature": tcb_signature,
        "qe_identity_issuer_chain": _chain_header(identity, "sgx-enclave-identity-issuer-chain"),
        "qe_identity": qe_identity,
        "qe_identity_signature": qe_signature,
    }
    raw = json.dumps(found).encode()
    got, _ = tdx.verify_collateral(raw, now, roots=roots)
    if got != fmspc.lower():
        raise BadInput(f"{INTEL}: asked for FMSPC {fmspc}, got {got}; nothing of it is kept")
    store.put(f"intel/{fmspc.lower()}.json", raw, now)


def _signed_part(body: bytes, name: str) -> tuple[str, str]:
    """(the signed text, its signature): the very bytes, since those are signed and not their meaning."""
    pattern = rb'\s*\{"' + name.encode() + rb'":(\{.*\}),"signature":"([0-9a-fA-F]{128})"\}\s*'
    match = re.fullmatch(pattern, body, re.DOTALL)
    try:
        if match is None:
            raise ValueError
        return match[1].decode(), match[2].decode()
    except ValueError:
        raise BadInput(
            f"{INTEL}: an answer without {name} and its signature; nothing of it is kept"
        ) from None


def _chain_header(answer: Answer, name: str) -> str:
    """A certificate chain out of a header; older answers write `sgx-` before it."""
    value = answer.headers.get(name) or answer.headers.get(f"sgx-{name}")
    if not value:
        raise BadInput(f"{INTEL}: an answer without the header {name}; nothing of it is kept")
    return urllib.parse.unquote(value)
