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
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
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
ROTATION_PORTS = 4  # UDP, after tunnel.listen_port: two generations for each peer

Parser = Callable[[Any, Path], Any]
T = TypeVar("T")


# --- one value ---------------------------------------------------------------------------------------------
# Each parser takes the TOML value and the folder of the file, and returns the checked value or raises
# ValueError saying what was expected. Where the value stands is added by the caller.


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


# --- the tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedPoint:
    """[fixed_point] How real numbers become ring elements."""

    scale_bits: Annotated[int, integer_rule(8, 20)] = 16  # fraction bits


@dataclass(frozen=True)
class Cheby:
    """[cheby] Interval tables of polynomial pieces."""

    deg: Annotated[int, integer_rule(1, 3)] = 3  # degree of a piece
    bins: Annotated[int, integer_rule(64, 1024)] = 64  # pieces per table, a power of two


@dataclass(frozen=True)
class Scheduler:
    """[scheduler] Lengths, all public; prompts and answers are padded to the next bucket."""

    max_context: Annotated[int, integer_rule(2, 1 << 20)] = 256  # prompt and answers of all turns together
    prompt_buckets: Annotated[tuple[int, ...], buckets_rule] = (16, 32, 64, 128)
    output_buckets: Annotated[tuple[int, ...], buckets_rule] = (16, 32, 64, 128)
    max_sessions: Annotated[int, integer_rule(1, 64)] = 4  # at once


@dataclass(frozen=True)
class TriplePool:
    """[triple_pool] Prepared material."""

    min_size: Annotated[int, integer_rule(0, 1 << 16)] = 64  # token positions kept ready; below it, refill


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


@dataclass(frozen=True)
class Log:
    """[log] To standard error. Shapes, steps, counts and parties; never values."""

    level: Annotated[str, choice_rule("debug", "info", "warning", "error")] = "info"
    format: Annotated[str, choice_rule("text", "json")] = "text"


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


@dataclass(frozen=True)
class Peer:
    """[[peers]] One entry per party, this one included, the same list in the files of all three."""

    party: Annotated[int, integer_rule(0, PARTIES - 1)]
    name: Annotated[str, text_rule(64)]
    identity: Annotated[str, key_rule]  # Ed25519 public key, hex
    host: Annotated[str, text_rule(253)]  # of its mesh listener
    port: Annotated[int, integer_rule(1, 65535)]
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
    log: Log = field(default_factory=Log)

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
            "tunnel.mode": self.tunnel.mode,
            "tunnel.rotates": self.tunnel.rotates,
            "fixed_point.scale_bits": self.fixed_point.scale_bits,
            "cheby.deg": self.cheby.deg,
            "cheby.bins": self.cheby.bins,
            "scheduler.max_context": self.scheduler.max_context,
            "scheduler.prompt_buckets": list(self.scheduler.prompt_buckets),
            "scheduler.output_buckets": list(self.scheduler.output_buckets),
            "triple_pool.min_size": self.triple_pool.min_size,
            "topk": self.topk,
        }

    def digest(self) -> bytes:
        """SHA-256 over the shared terms: 32 bytes, equal at parties that may work together."""
        terms = json.dumps(self.shared_terms(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"mimir shared terms\0" + terms.encode()).digest()


# --- a whole file ------------------------------------------------------------------------------------------


def load(path: str | Path) -> Config:
    """Read one party's file; raise ConfigError naming file and key for anything not understood."""
    return parse(read_toml(path), Path(path).absolute())


def parse(data: Mapping[str, Any], source: Path) -> Config:
    """The same from a table already read; `source` is what errors name and paths are relative to."""
    config = read_table(Config, data, source, given={"source": source})
    _cross_check(config)
    return config


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a table, or a ConfigError that says why not."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; is this a configuration file?")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


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
    if config.cheby.bins & (config.cheby.bins - 1):
        refuse("cheby.bins", "must be a power of two")
    scheduler = config.scheduler
    if scheduler.prompt_buckets[0] + scheduler.output_buckets[0] > scheduler.max_context:
        refuse("scheduler.max_context", "smaller than the smallest prompt and output bucket together")
    tunnel = config.tunnel
    if tunnel.mode == "wireguard":
        for name in ("interface", "address", "private_key", "listen_port"):
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
                # One's own endpoint may be unknown to oneself (behind NAT); peers need each other's.
                if getattr(peer, name) is None and not mine:
                    refuse(f"peers[{peer.party}].{name}", "missing; the tunnel to this party needs it")
