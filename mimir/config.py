"""The configuration of one party: frozen, strict, safe by default.

`load(path)` reads a TOML file. A key that is not known, of the wrong type or out of range is a `ConfigError`
that names the file and the key. A policy left out accepts nobody. Relative paths are relative to the file.

`Config.digest()` covers what all parties must agree on; the mesh handshake compares it.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from mimir.errors import ConfigError

PARTIES = 3
PROTOCOL = 1  # raised whenever parties of two versions could not talk
KEY_HEX = 64
MAX_CONFIG_BYTES = 1 << 20
MAX_BUCKETS = 16
MAX_KEYS = 1024
MIN_MTU, MAX_MTU = 1280, 8920
MAX_INTERFACE = 15  # characters of a name, says Linux
MIN_ROTATION, MAX_ROTATION = 5, 7 * 86400  # seconds; draining alone takes two
MAX_THREADS = 64  # of a kernel; kernels.MAX_THREADS, which this file must not import before confinement
ROTATION_PORTS = 4  # UDP, after tunnel.listen_port: two generations for each peer

Parser = Callable[[Any, Path], Any]
T = TypeVar("T")


# --- one value ---------------------------------------------------------------------------------------------
# Each parser takes the TOML value and the folder of the file, and returns the checked value or raises
# ValueError saying what was expected. Where the value stands is added by the caller.


def flag_rule(value: Any, folder: Path) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def integer_rule(low: int, high: int) -> Parser:
    def parse(value: Any, folder: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return parse


def seconds_rule(low: float, high: float) -> Parser:
    def parse(value: Any, folder: Path) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"seconds from {low:g} to {high:g}")
        return float(value)

    return parse


def interval_rule(low: float, high: float) -> Parser:
    """Seconds between two of something; 0 for never."""

    def parse(value: Any, folder: Path) -> float:
        known = not isinstance(value, bool) and isinstance(value, int | float)
        if not known or not (value == 0 or low <= value <= high):
            raise ValueError(f"0 for never, or seconds from {low:g} to {high:g}")
        return float(value)

    return parse


def choice_rule(*choices: str) -> Parser:
    def parse(value: Any, folder: Path) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(f'"{choice}"' for choice in choices))
        return str(value)

    return parse


def text_rule(limit: int) -> Parser:
    def parse(value: Any, folder: Path) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= limit or not value.isprintable():
            raise ValueError(f"a text of 1 to {limit} printable characters")
        return value

    return parse


def path_rule(value: Any, folder: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("a path, relative to this file or absolute")
    return (folder / Path(value).expanduser()).absolute()


def key_rule(value: Any, folder: Path) -> str:
    if not isinstance(value, str) or len(value) != KEY_HEX:
        raise ValueError(f"a public key: {KEY_HEX} hexadecimal digits, as `mimir keygen` prints it")
    try:
        return bytes.fromhex(value).hex()
    except ValueError:
        raise ValueError(f"a public key: {KEY_HEX} hexadecimal digits, as `mimir keygen` prints it") from None


def keys_rule(value: Any, folder: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_KEYS:
        raise ValueError(f"a list of at most {MAX_KEYS} public keys")
    keys = tuple(key_rule(entry, folder) for entry in value)
    if len(set(keys)) != len(keys):
        raise ValueError("public keys, each only once")
    return keys


def tunnel_key_rule(value: Any, folder: Path) -> str:
    """WireGuard writes keys in base64, its control socket in hex; both are taken, hex is kept."""
    if isinstance(value, str) and len(value) == 44:
        try:
            raw = base64.b64decode(value, validate=True)
        except binascii.Error:
            raw = b""
        if len(raw) == KEY_HEX // 2:
            return raw.hex()
    try:
        return str(key_rule(value, folder))
    except ValueError:
        raise ValueError("a WireGuard public key: 44 characters of base64 or 64 hexadecimal digits") from None


def networks_rule(value: Any, folder: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or len(value) > MAX_BUCKETS:
        raise ValueError('a list of address ranges such as ["10.77.0.2/32"]')
    return tuple(str(network_rule(entry, folder)) for entry in value)


def network_rule(value: Any, folder: Path) -> str:
    import ipaddress

    try:
        if not isinstance(value, str) or "/" not in value:
            raise ValueError
        return str(ipaddress.ip_interface(value).with_prefixlen)
    except ValueError:
        raise ValueError('an address with its prefix length, such as "10.77.0.1/24"') from None


def buckets_rule(value: Any, folder: Path) -> tuple[int, ...]:
    wanted = f"1 to {MAX_BUCKETS} rising lengths, such as [16, 32, 64, 128]"
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_BUCKETS:
        raise ValueError(wanted)
    try:
        lengths = tuple(integer_rule(1, 1 << 20)(entry, folder) for entry in value)
    except ValueError:
        raise ValueError(wanted) from None
    if list(lengths) != sorted(set(lengths)):
        raise ValueError(wanted)
    return lengths


@dataclass(frozen=True)
class Address:
    """Host and port. Host is a name or an address; IPv6 stands in brackets in the file."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address_rule(value: Any, folder: Path) -> Address:
    wanted = 'an address such as "10.77.0.1:7101" or "[::1]:7101"'
    if not isinstance(value, str) or len(value) > 255:
        raise ValueError(wanted)
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(wanted)
    good_port = port.isascii() and port.isdigit() and int(port) < 65536
    if not (colon and host and host.isprintable() and good_port):
        raise ValueError(wanted)
    return Address(host, int(port))


def endpoint_rule(value: Any, folder: Path) -> Address:
    """HOST:PORT, or "vsock:CID:PORT" for what an enclave's parent passes on."""
    if isinstance(value, str) and value.startswith("vsock:"):
        cid, _, port = value.removeprefix("vsock:").partition(":")
        if all(part.isascii() and part.isdigit() and int(part) < 1 << 32 for part in (cid, port)):
            return Address(f"vsock:{cid}", int(port))
    else:
        try:
            address: Address = address_rule(value, folder)
            return address
        except ValueError:
            pass
    raise ValueError('an address such as "kms.eu-west-1.amazonaws.com:443" or "vsock:3:8000"')


def registers_rule(value: Any, folder: Path) -> tuple[int, ...]:
    wanted = "a list of PCR numbers from 0 to 15, each once, such as [0, 2, 4, 7]"  # 16 and 23 can be reset
    if not isinstance(value, list) or not value:
        raise ValueError(wanted)
    if any(type(each) is not int or not 0 <= each <= 15 for each in value) or len(set(value)) != len(value):
        raise ValueError(wanted)
    return tuple(value)


def device_rule(value: Any, folder: Path) -> Path | Address:
    """Where a device answers: a path, or "tcp:HOST:PORT"."""
    if isinstance(value, str) and value.startswith("tcp:"):
        address: Address = address_rule(value.removeprefix("tcp:"), folder)
        return address
    try:
        return Path(path_rule(value, folder))
    except ValueError:
        raise ValueError('a path, or an address such as "tcp:127.0.0.1:2321"') from None


# --- the tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedPoint:
    """[fixed_point] How real numbers become ring elements."""

    scale_bits: Annotated[int, integer_rule(8, 20)] = 16  # fraction bits


@dataclass(frozen=True)
class Cheby:
    """[cheby] Interval tables of polynomial pieces."""

    deg: Annotated[int, integer_rule(1, 3)] = 3  # degree of a piece


@dataclass(frozen=True)
class Scheduler:
    """[scheduler] Lengths, all public; prompts and answers are padded to the next bucket."""

    max_context: Annotated[int, integer_rule(2, 1 << 20)] = 256  # prompt and answers of all turns together
    prompt_buckets: Annotated[tuple[int, ...], buckets_rule] = (16, 32, 64, 128)
    output_buckets: Annotated[tuple[int, ...], buckets_rule] = (16, 32, 64, 128)
    max_sessions: Annotated[int, integer_rule(1, 64)] = 4  # at once
    max_batch: Annotated[int, integer_rule(1, 32)] = 8  # sessions whose tokens are decoded together
    round_trip_ms: Annotated[int, integer_rule(0, 1000)] = 20  # between parties: what a round may cost


@dataclass(frozen=True)
class TriplePool:
    """[triple_pool] Prepared material."""

    min_size: Annotated[int, integer_rule(0, 1 << 16)] = 64  # token positions kept ready; below it, refill
    memory_mib: Annotated[int, integer_rule(1, 1 << 20)] = 512  # of a session's material: ready and in use


@dataclass(frozen=True)
class Deadlines:
    """[deadlines] Longest waits, in seconds. What waits longer fails and says for whom it waited."""

    round: Annotated[float, seconds_rule(0.05, 3600)] = 30.0  # one message of a peer inside a session
    step: Annotated[float, seconds_rule(0.1, 86400)] = 600.0  # a batch of preprocessing, a prefill, a token
    client: Annotated[float, seconds_rule(0.1, 86400)] = 300.0  # a client to answer inside an open session
    handshake: Annotated[float, seconds_rule(0.05, 600)] = 10.0  # a new connection to say who it is
    link: Annotated[float, seconds_rule(3, 600)] = 20.0  # a peer to be heard, at one ping a second


@dataclass(frozen=True)
class Control:
    """[control] Where clients and owners connect (websocket, sealed to this party's identity)."""

    listen: Annotated[Address, address_rule]
    max_connections: Annotated[int, integer_rule(1, 4096)] = 32


@dataclass(frozen=True)
class Mesh:
    """[mesh] Where the two peers connect; an address inside the tunnel."""

    listen: Annotated[Address, address_rule]


@dataclass(frozen=True)
class Metrics:
    """[metrics] Prometheus figures over HTTP; off unless an address is given."""

    listen: Annotated[Address | None, address_rule] = None
    readers: Annotated[tuple[str, ...], keys_rule] = ()  # identities that may read them over TLS


@dataclass(frozen=True)
class Attestation:
    """[attestation] By which evidence peers are admitted, and whose word counts on that. Mode "off" believes
    keys alone: tests, and hosts that all three operators trust."""

    mode: Annotated[str, choice_rule("required", "off")] = "required"
    policy: Annotated[Path | None, path_rule] = None  # signatures stand beside it, in a file named .sig
    collateral: Annotated[Path | None, path_rule] = None  # directory of `mimir policy fetch`
    listen: Annotated[Address | None, address_rule] = None  # TCP, outside the tunnel: where peers ask
    owners: Annotated[tuple[str, ...], keys_rule] = ()  # Ed25519 keys; they sign policy and revocations
    threshold: Annotated[int, integer_rule(1, 64)] = 1  # so many of them must


@dataclass(frozen=True)
class Tls:
    """[tls] TLS 1.3, both ends by certificate, for clients and readers of figures. Needs attestation: the
    certificates are what admission gives out."""

    enabled: Annotated[bool, flag_rule] = False


@dataclass(frozen=True)
class Log:
    """[log] To standard error. Shapes, steps, counts and parties; never values."""

    level: Annotated[str, choice_rule("debug", "info", "warning", "error")] = "info"
    format: Annotated[str, choice_rule("text", "json")] = "text"


@dataclass(frozen=True)
class Confinement:
    """[confinement] What the running party gives up (mimir/confine.py). Mode "off" leaves it all."""

    mode: Annotated[str, choice_rule("enforce", "off")] = "enforce"


@dataclass(frozen=True)
class Kernels:
    """[kernels] How much of the machine the arithmetic may use. Never changes a result."""

    threads: Annotated[int, integer_rule(0, MAX_THREADS)] = 0  # of a long kernel; 0: one for each processor


@dataclass(frozen=True)
class Tunnel:
    """[tunnel] WireGuard between the parties. Mode "none" leaves the links readable: tests only."""

    mode: Annotated[str, choice_rule("wireguard", "none")] = "wireguard"
    interface: Annotated[str | None, text_rule(MAX_INTERFACE)] = None
    address: Annotated[str | None, network_rule] = None  # own address inside the tunnel, with prefix length
    private_key: Annotated[Path | None, path_rule] = None  # file, mode 0600
    listen_port: Annotated[int | None, integer_rule(1, 65535)] = None  # UDP
    mtu: Annotated[int, integer_rule(MIN_MTU, MAX_MTU)] = 1420
    rotate_seconds: Annotated[float, interval_rule(MIN_ROTATION, MAX_ROTATION)] = 3600.0  # 0: never

    @property
    def rotates(self) -> bool:
        """Whether the application runs on generations of fresh keys; the interval is everybody's own."""
        return self.mode == "wireguard" and self.rotate_seconds > 0


ATTESTERS = ("snp", "tdx", "nitro", "tpm", "swtpm")
DEVICES: Mapping[str, Path] = {  # where the kernel puts them; a software TPM has no such place
    "snp": Path("/sys/kernel/config/tsm/report"),
    "tdx": Path("/sys/kernel/config/tsm/report"),
    "nitro": Path("/dev/nsm"),
    "tpm": Path("/dev/tpmrm0"),
}


@dataclass(frozen=True)
class Attester:
    """[attester] What makes this party's evidence. "swtpm" is a simulation: it proves nothing of the
    machine."""

    kind: Annotated[str, choice_rule(*ATTESTERS)]
    device: Annotated[Path | Address | None, device_rule] = None  # default: where the kernel has it

    @property
    def place(self) -> Path | Address:
        """Where the device is."""
        if self.device is not None:
            return self.device
        if self.kind not in DEVICES:
            raise ConfigError(f'attester.device: missing; kind "{self.kind}" has no usual place')
        return DEVICES[self.kind]


@dataclass(frozen=True)
class TpmKey:
    """[keys.tpm] A storage key that one TPM gives back while these registers hold what they held."""

    device: Annotated[Path | Address, device_rule] = Path("/dev/tpmrm0")
    pcrs: Annotated[tuple[int, ...], registers_rule] = (0, 2, 4, 7)
    counter: Annotated[int, integer_rule(0x01800000, 0x01BFFFFF)] = 0x01804D49  # index of the counter


@dataclass(frozen=True)
class KmsKey:
    """[keys.kms] A storage key that AWS KMS encrypts to an attested enclave."""

    region: Annotated[str, text_rule(32)]
    key_id: Annotated[str, text_rule(256)]  # of the KMS key, an ARN
    endpoint: Annotated[Address | None, endpoint_rule] = None  # default: KMS of the region
    metadata: Annotated[Address | None, endpoint_rule] = None  # for credentials; default: the environment's
    device: Annotated[Path, path_rule] = Path("/dev/nsm")


@dataclass(frozen=True)
class OciKey:
    """[keys.oci] A storage key under a key of OCI Vault, for a broker's own share: nothing is attested."""

    endpoint: Annotated[Address, endpoint_rule]  # the vault's cryptographic endpoint
    key_id: Annotated[str, text_rule(256)]
    tenancy: Annotated[str, text_rule(256)]
    user: Annotated[str, text_rule(256)]
    fingerprint: Annotated[str, text_rule(64)]  # of the API key
    api_key: Annotated[Path, path_rule]  # its private half, PEM, mode 0600


@dataclass(frozen=True)
class ThresholdKey:
    """[keys.threshold] A storage key that t of n brokers give out in pieces, each for evidence."""

    requester: Annotated[Path, path_rule]  # identity file that signs requests; brokers list its public half
    seconds: Annotated[float, seconds_rule(0.1, 600)] = 30.0  # for one broker's answer


@dataclass(frozen=True)
class Keys:
    """[keys] Where the storage key comes from, under which everything on this party's disk is encrypted."""

    source: Annotated[str, choice_rule("file", "tpm", "kms", "oci", "threshold")] = "file"
    # The key itself ("file", mode 0600), the sealed key ("tpm", "kms", "oci"), or what `mimir broker split`
    # wrote for the party ("threshold"). Default: storage.key beside this file.
    file: Annotated[Path | None, path_rule] = None
    # Not for "tpm"; a file in a folder of its own. Default: counter/storage.key, after that file's name.
    counter: Annotated[Path | None, path_rule] = None
    keep_mib: Annotated[int, integer_rule(0, 1 << 24)] = 4096  # of shares, at most, kept in memory
    lock_shares: Annotated[bool, flag_rule] = False  # keep shares in memory out of swap; needs the right to
    require_locked: Annotated[bool, flag_rule] = False  # do not start if keys cannot be kept out of swap
    tpm: TpmKey = field(default_factory=TpmKey)
    kms: KmsKey | None = None
    oci: OciKey | None = None
    threshold: ThresholdKey | None = None

    def placed(self, folder: Path) -> Keys:
        """The same with the two files' defaults filled in, for a configuration that lies in `folder`."""
        file = self.file or folder / "storage.key"
        return replace(self, file=file, counter=self.counter or file.parent / "counter" / file.name)


@dataclass(frozen=True)
class Peer:
    """[[peers]] One entry per party, this one included, the same list in the files of all three."""

    party: Annotated[int, integer_rule(0, PARTIES - 1)]
    name: Annotated[str, text_rule(64)]
    identity: Annotated[str, key_rule]  # Ed25519 public key, hex
    host: Annotated[str, text_rule(253)]  # of its mesh listener
    port: Annotated[int, integer_rule(1, 65535)]
    admission: Annotated[Address | None, address_rule] = None  # its attestation.listen, as others reach it
    tunnel_public_key: Annotated[str | None, tunnel_key_rule] = None  # hex once read
    tunnel_endpoint: Annotated[Address | None, address_rule] = None  # outside the tunnel, UDP
    tunnel_allowed: Annotated[tuple[str, ...] | None, networks_rule] = None  # what it may send from inside


@dataclass(frozen=True)
class Config:
    """Everything one party is told."""

    source: Annotated[Path, None]  # the file; not a key in it
    party: Annotated[int, integer_rule(0, PARTIES - 1)]
    identity_key: Annotated[Path, path_rule]  # file of `mimir keygen`, mode 0600
    data_dir: Annotated[Path, path_rule]  # model shares and the counters of used material
    control: Control
    mesh: Mesh
    peers: tuple[Peer, ...]
    tunnel: Tunnel = field(default_factory=Tunnel)
    clients: Annotated[tuple[str, ...], keys_rule] = ()  # identities that may open sessions
    owners: Annotated[tuple[str, ...], keys_rule] = ()  # identities that may provision models
    topk: Annotated[int, integer_rule(1, 64)] = 40  # largest k of a sampling session, and its default
    fixed_point: FixedPoint = field(default_factory=FixedPoint)
    cheby: Cheby = field(default_factory=Cheby)
    scheduler: Scheduler = field(default_factory=Scheduler)
    triple_pool: TriplePool = field(default_factory=TriplePool)
    deadlines: Deadlines = field(default_factory=Deadlines)
    metrics: Metrics = field(default_factory=Metrics)
    attestation: Attestation = field(default_factory=Attestation)
    tls: Tls = field(default_factory=Tls)
    log: Log = field(default_factory=Log)
    attester: Attester | None = None
    confinement: Confinement = field(default_factory=Confinement)
    kernels: Kernels = field(default_factory=Kernels)
    keys: Keys = field(default_factory=Keys)

    @property
    def attested(self) -> bool:
        """Whether peers are admitted by evidence."""
        return self.attestation.mode == "required"

    @property
    def me(self) -> Peer:
        """This party's own entry."""
        return self.peers[self.party]

    @property
    def others(self) -> tuple[Peer, Peer]:
        """The next party and the previous one, in this order."""
        return self.peers[(self.party + 1) % PARTIES], self.peers[(self.party + 2) % PARTIES]

    def shared_terms(self) -> dict[str, Any]:
        """What must be equal at all parties for a session to make sense. Public."""
        return {
            "protocol": PROTOCOL,
            "parties": [peer.identity for peer in self.peers],
            "attestation.mode": self.attestation.mode,
            "tunnel.mode": self.tunnel.mode,
            "tunnel.rotates": self.tunnel.rotates,
            "fixed_point.scale_bits": self.fixed_point.scale_bits,
            "cheby.deg": self.cheby.deg,
            "scheduler.max_context": self.scheduler.max_context,
            "scheduler.prompt_buckets": list(self.scheduler.prompt_buckets),
            "scheduler.output_buckets": list(self.scheduler.output_buckets),
            "scheduler.max_batch": self.scheduler.max_batch,
            "scheduler.round_trip_ms": self.scheduler.round_trip_ms,
            "triple_pool.min_size": self.triple_pool.min_size,
            "triple_pool.memory_mib": self.triple_pool.memory_mib,
            "topk": self.topk,
        }

    def digest(self) -> bytes:
        """SHA-256 over the shared terms: 32 bytes, equal at parties that may work together."""
        return terms_digest(self.shared_terms())


def terms_digest(terms: Mapping[str, Any]) -> bytes:
    """SHA-256 over terms as `Config.shared_terms` gives them; for whoever is shown them."""
    text = json.dumps(terms, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(b"mimir shared terms\0" + text.encode()).digest()


# --- a whole file ------------------------------------------------------------------------------------------


def load(path: str | Path) -> Config:
    """Read one party's file; raise ConfigError naming file and key for anything not understood."""
    return parse(read_toml(path), Path(path).absolute())


def parse(data: Mapping[str, Any], source: Path) -> Config:
    """The same from a table already read; `source` is what errors name and paths are relative to."""
    config = read_table(Config, data, source, given={"source": source})
    config = replace(config, keys=config.keys.placed(source.parent))
    _cross_check(config)
    return config


@dataclass(frozen=True)
class _KeysAlone:
    keys: Keys = field(default_factory=Keys)
    attester: Attester | None = None


def load_keys(path: str | Path) -> tuple[Keys, Attester | None]:
    """What a party's or a broker's file says of its storage key, whatever else is in it or still missing."""
    source, data = Path(path).absolute(), read_toml(path)
    found = read_table(
        _KeysAlone, {name: data[name] for name in ("keys", "attester") if name in data}, source
    )
    check_keys(found.keys, source)
    return found.keys.placed(source.parent), found.attester


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a table, or a ConfigError that says why not."""
    return parse_toml(read_text(path), path)


def read_text(path: str | Path) -> str:
    """A configuration file's text, or a ConfigError that says why not."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; is this a configuration file?")
        return raw.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def parse_toml(text: str, source: str | Path) -> dict[str, Any]:
    """The table in a text; `source` is what an error names."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None


def read_table(
    kind: type[T], data: Any, source: Path, where: str = "", given: Mapping[str, Any] | None = None
) -> T:
    """Build the settings class `kind` from a TOML table, strictly. `given` are fields that are not keys."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: {where}: a table is expected here, such as [{where}]")
    values = dict(given or {})
    hints = get_type_hints(kind, include_extras=True)
    known = {entry.name: entry for entry in fields(kind) if entry.name not in values}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {_join(where, near[0])}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {_join(where, name)}{hint}")
    for name, entry in known.items():
        at = _join(where, name)
        inner, listed = _table_kind(hints[name])
        if name not in data:
            if entry.default is MISSING and entry.default_factory is MISSING:
                # A missing table with mandatory keys: name its first key, that says more.
                at = _join(f"{at}[0]" if listed else at, fields(inner)[0].name) if inner else at
                raise ConfigError(f"{source}: missing key {at}")
            continue
        value = data[name]
        if inner is not None and listed:
            if not isinstance(value, list) or len(value) > MAX_KEYS:
                raise ConfigError(f"{source}: {at}: a list of tables is expected here: [[{at}]]")
            values[name] = tuple(
                read_table(inner, each, source, f"{at}[{index}]") for index, each in enumerate(value)
            )
        elif inner is not None:
            values[name] = read_table(inner, value, source, at)
        else:
            rule: Parser = get_args(hints[name])[1]
            try:
                values[name] = rule(value, source.parent)
            except ValueError as error:
                raise ConfigError(f"{source}: {at} = {_shown(value)}: must be {error}") from None
    return kind(**values)


def _table_kind(hint: Any) -> tuple[Any, bool]:
    """(settings class, whether a list of it) behind a field type; (None, False) for plain values."""
    if get_origin(hint) is UnionType:  # a table that may be left out
        hint = next((each for each in get_args(hint) if each is not NoneType), hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return hint, False
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return None, False


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def check_keys(keys: Keys, source: Path) -> None:
    """What must be there for a source of keys."""
    name = keys.source
    if name in ("kms", "oci", "threshold") and getattr(keys, name) is None:
        raise ConfigError(f'{source}: missing key keys.{name}: keys.source = "{name}" needs this table')


def _cross_check(config: Config) -> None:
    """What no single key can tell."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{config.source}: {key}: {why}")

    if [peer.party for peer in config.peers] != list(range(PARTIES)):
        refuse("peers", f"must list the parties 0 to {PARTIES - 1}, this one included, in this order")
    for name in ("identity", "name", "tunnel_public_key"):
        values = [getattr(peer, name) for peer in config.peers if getattr(peer, name) is not None]
        if len(set(values)) != len(values):
            refuse(f"peers[].{name}", "two parties have the same; one operator must not hold two roles")
    if config.attestation.threshold > max(1, len(config.attestation.owners)):
        refuse("attestation.threshold", "more than there are owners")
    scheduler = config.scheduler
    if scheduler.prompt_buckets[0] + scheduler.output_buckets[0] > scheduler.max_context:
        refuse("scheduler.max_context", "smaller than the smallest prompt and output bucket together")
    attester = config.attester
    if attester is not None and attester.device is None and attester.kind not in DEVICES:
        refuse("attester.device", f'missing; kind "{attester.kind}" has no usual place')
    if attester is not None and isinstance(attester.device, Address) and attester.kind != "swtpm":
        refuse("attester.device", f'kind "{attester.kind}" is a device of this host, which has a path')
    check_keys(config.keys, config.source)
    counter = config.keys.counter
    if config.keys.source != "tpm" and counter is not None and config.data_dir in counter.parents:
        refuse("keys.counter", "must not be in data_dir: whoever puts that back would put back the counter")
    if config.keys.source != "tpm" and counter is not None:
        near = {config.source, config.identity_key, config.keys.file}
        if counter.parent in {each.parent for each in near if each is not None}:
            refuse(
                "keys.counter", "needs a folder of its own: the running party may write there and not here"
            )
    tunnel = config.tunnel
    if config.attested:
        _check_attested(config, refuse)
    if tunnel.mode == "wireguard":
        for name in ("interface", "address", "private_key", "listen_port"):
            if name == "private_key" and config.attested:
                continue  # made in memory at each start
            if getattr(tunnel, name) is None:
                refuse(f"tunnel.{name}", 'missing; WireGuard needs it (tests may say tunnel.mode = "none")')
        if tunnel.rotates:
            assert tunnel.interface is not None and tunnel.listen_port is not None
            if len(tunnel.interface) > MAX_INTERFACE - 1:
                refuse(
                    "tunnel.interface", f"at most {MAX_INTERFACE - 1} characters, as rotation adds a letter"
                )
            for key, port in (
                ("tunnel.listen_port", tunnel.listen_port),
                *(
                    (f"peers[{peer.party}].tunnel_endpoint", peer.tunnel_endpoint.port)
                    for peer in config.peers
                    if peer.tunnel_endpoint is not None
                ),
            ):
                if port + ROTATION_PORTS > 65535:
                    refuse(key, f"rotation needs the {ROTATION_PORTS} ports after {port} as well")
        for peer in config.peers:
            mine = peer.party == config.party
            for name in ("tunnel_public_key", "tunnel_endpoint", "tunnel_allowed"):
                if name == "tunnel_public_key" and config.attested:
                    continue  # the peer says it, with its evidence
                # One's own endpoint may be unknown to oneself (behind NAT); peers need each other's.
                if getattr(peer, name) is None and not mine:
                    refuse(f"peers[{peer.party}].{name}", "missing; the tunnel to this party needs it")


def _check_attested(config: Config, refuse: Callable[[str, str], None]) -> None:
    """What admission needs, and what it does away with."""
    attestation, off = config.attestation, 'or say attestation.mode = "off", which believes keys alone'
    if attestation.policy is None:
        refuse(
            "attestation.policy",
            "missing: the file that says whose evidence is good; `mimir policy new` writes one and "
            f"configs/policy.toml explains it; {off}",
        )
    if not attestation.owners:
        refuse("attestation.owners", f"empty: nobody could have signed the policy; list their keys, {off}")
    if attestation.listen is None:
        refuse("attestation.listen", f"missing: where peers bring their evidence (TCP); {off}")
    if config.attester is None:
        refuse("attester", f"missing: the table that says what makes evidence of this machine; {off}")
    if config.tunnel.mode != "wireguard":
        refuse("tunnel.mode", f'evidence is bound to the key of a tunnel: say "wireguard", {off}')
    if config.tunnel.private_key is not None:
        refuse(
            "tunnel.private_key",
            f"keys that evidence is bound to live in memory, fresh in each start: remove this key, {off}",
        )
    for peer in config.peers:
        if peer.tunnel_public_key is not None:
            refuse(
                f"peers[{peer.party}].tunnel_public_key",
                f"peers prove their keys when they are admitted: remove this key, {off}",
            )
        if peer.admission is None and peer.party != config.party:
            refuse(f"peers[{peer.party}].admission", f"missing: where that party takes evidence; {off}")
