"""A configuration is read as written or refused by file and key; what must be shared changes the digest."""

from __future__ import annotations

import copy
import dataclasses
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimir.config import Address, Config, load, parse
from mimir.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "configs" / "three.toml"
SOURCE = Path("/etc/mimir/party.toml")


def example() -> dict[str, Any]:
    return tomllib.loads(EXAMPLE.read_text())


def keys_alone() -> dict[str, Any]:
    """The example without attestation."""
    data = example()
    data["attestation"] = {"mode": "off"}
    data["tunnel"]["private_key"] = "tunnel.key"
    del data["attester"]
    for number, peer in enumerate(data["peers"]):
        peer["tunnel_public_key"] = f"{number:02x}" * 32
        del peer["admission"]
    return data


def test_the_example_is_valid_and_shows_every_key_with_its_default() -> None:
    config = load(EXAMPLE)
    assert config.party == 0 and config.me.name == "alpha"
    assert [peer.party for peer in config.others] == [1, 2]
    assert config.control.listen == Address("0.0.0.0", 7100)
    assert config.identity_key == EXAMPLE.parent / "identity.key"
    text = EXAMPLE.read_text()

    def walk(kind: Any, prefix: str) -> None:
        for entry in dataclasses.fields(kind):
            if entry.name == "source":
                continue
            assert re.search(rf"\b{entry.name}\b", text), f"{prefix}{entry.name} is not in the example"

    for kind in (Config, *(type(getattr(config, f.name)) for f in dataclasses.fields(Config))):
        if dataclasses.is_dataclass(kind) and kind is not Address:
            walk(kind, "")
    # What the example says of defaults is true: leaving the optional keys out changes nothing.
    data = example()
    for name in (
        "fixed_point",
        "cheby",
        "scheduler",
        "triple_pool",
        "deadlines",
        "metrics",
        "tls",
        "log",
        "topk",
    ):
        del data[name]
    del data["confinement"], data["kernels"]
    for name in ("clients", "owners"):
        del data[name]
    del data["tunnel"]["mode"], data["tunnel"]["mtu"], data["tunnel"]["rotate_seconds"]
    del data["control"]["max_connections"], data["attestation"]["mode"], data["attestation"]["threshold"]
    assert parse(data, EXAMPLE) == config


def test_every_settings_object_is_frozen() -> None:
    config = load(EXAMPLE)
    for target in (config, config.scheduler, config.tunnel, config.peers[0]):
        name = dataclasses.fields(target)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, None)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        at: Any = data
        for parent in parents:
            at = at[int(parent)] if isinstance(at, list) else at[parent]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return change


BAD = {
    "unknown key at the top": (put("partie", 1), "unknown key partie; did you mean party?"),
    "unknown key, nothing near": (put("xyzzy", 1), "unknown key xyzzy; known: party, "),
    "unknown key in a table": (put("scheduler.max_contxt", 9), "did you mean scheduler.max_context?"),
    "unknown key in a list": (put("peers.1.identiy", 9), "key peers[1].identiy; did you mean"),
    "missing key": (put("identity_key", None), "missing key identity_key"),
    "missing table": (put("mesh", None), "missing key mesh.listen"),
    "missing list": (put("peers", None), "missing key peers[0].party"),
    "missing in a list": (put("peers.2.identity", None), "missing key peers[2].identity"),
    "table expected": (put("cheby", 3), "cheby: a table is expected"),
    "list expected": (put("peers", {"party": 0}), "peers: a list of tables"),
    "more threads than can be": (
        put("kernels.threads", 65),
        "kernels.threads = 65: must be an integer from 0 to 64",
    ),
    "party out of range": (put("party", 3), "party = 3: must be an integer from 0 to 2"),
    "bool is no integer": (put("cheby.deg", True), "cheby.deg = true: must be an integer"),
    "float is no integer": (put("fixed_point.scale_bits", 16.0), "fixed_point.scale_bits = 16.0"),
    "text is no number": (put("deadlines.round", "1"), 'deadlines.round = "1": must be seconds'),
    "link below the pings": (put("deadlines.link", 1), "deadlines.link = 1: must be seconds from 3"),
    "zero deadline": (put("deadlines.round", 0), "deadlines.round"),
    "infinite deadline": (put("deadlines.client", float("inf")), "deadlines.client"),
    "nan deadline": (put("deadlines.client", float("nan")), "deadlines.client"),
    "bad choice": (put("tunnel.mode", "off"), 'must be one of "wireguard", "none"'),
    "bad address": (put("control.listen", "7100"), "control.listen"),
    "bad port": (put("control.listen", "h:65536"), "control.listen"),
    "bare IPv6": (put("control.listen", "::1:7100"), "control.listen"),
    "short key": (put("peers.0.identity", "ab"), "64 hexadecimal digits"),
    "not hex": (put("peers.0.identity", "zz" * 32), "64 hexadecimal digits"),
    "client key twice": (put("clients", ["ab" * 32, "AB" * 32]), "each only once"),
    "client keys no list": (put("clients", "ab" * 32), "clients"),
    "buckets fall": (put("scheduler.prompt_buckets", [32, 16]), "rising lengths"),
    "buckets empty": (put("scheduler.output_buckets", []), "rising lengths"),
    "context too small": (put("scheduler.max_context", 20), "scheduler.max_context: smaller than"),
    "same operator twice": (
        put("peers.1.identity", "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"),
        "one operator must not hold two roles",
    ),
    "parties out of order": (put("peers.1.party", 2), "in this order"),
    "tunnel without port": (put("tunnel.listen_port", None), "tunnel.listen_port: missing"),
    "no policy": (put("attestation.policy", None), "`mimir policy new` writes one"),
    "no policy, a way out": (put("attestation.policy", None), 'or say attestation.mode = "off"'),
    "no owners": (put("attestation.owners", []), "attestation.owners: empty"),
    "no listener for peers": (put("attestation.listen", None), "attestation.listen: missing"),
    "no attester": (put("attester", None), "attester: missing"),
    "attested without a tunnel": (put("tunnel.mode", "none"), "tunnel.mode: evidence is bound"),
    "a tunnel key on disk": (put("tunnel.private_key", "k"), "tunnel.private_key: keys that evidence"),
    "a tunnel key believed": (
        put("peers.1.tunnel_public_key", "11" * 32),
        "peers[1].tunnel_public_key: peers prove their keys",
    ),
    "no way to a peer": (put("peers.2.admission", None), "peers[2].admission: missing"),
    "attestation by half": (put("attestation.mode", "warn"), 'must be one of "required", "off"'),
    "peer without endpoint": (put("peers.2.tunnel_endpoint", None), "peers[2].tunnel_endpoint: missing"),
    "bad tunnel key": (put("peers.2.tunnel_public_key", "abc"), "a WireGuard public key"),
    "bad network": (put("tunnel.address", "10.77.0.1"), "tunnel.address"),
    "mtu too large": (put("tunnel.mtu", 9000), "tunnel.mtu"),
    "rotation too often": (
        put("tunnel.rotate_seconds", 1),
        "0 for never, or seconds from 5 to 604800",
    ),
    "rotation of a bool": (put("tunnel.rotate_seconds", False), "tunnel.rotate_seconds = false"),
    "rotation of a nan": (put("tunnel.rotate_seconds", float("nan")), "tunnel.rotate_seconds"),
    "no room for a letter": (put("tunnel.interface", "x" * 15), "tunnel.interface: at most 14 characters"),
    "no room for ports": (put("tunnel.listen_port", 65532), "tunnel.listen_port: rotation needs the 4 ports"),
    "no ports at a peer": (
        put("peers.1.tunnel_endpoint", "h:65532"),
        "peers[1].tunnel_endpoint: rotation needs the 4 ports after 65532",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_file_and_key(case: str) -> None:
    change, expected = BAD[case]
    data = example()
    change(data)
    with pytest.raises(ConfigError) as caught:
        parse(data, SOURCE)
    assert str(caught.value).startswith(f"{SOURCE}: ")
    assert expected in str(caught.value)
    assert caught.value.exit_code == 3


def test_unreadable_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load(tmp_path / "nowhere.toml")
    broken = {"broken.toml": b"party = ", "binary.toml": b"\xff\xfe", "huge.toml": b"#" * (2 << 20)}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(name)):
            load(tmp_path / name)


def test_the_tunnel_may_be_left_out_only_by_saying_so() -> None:
    data = keys_alone()
    data["tunnel"] = {"mode": "none"}
    for peer in data["peers"]:
        for name in ("tunnel_public_key", "tunnel_endpoint", "tunnel_allowed"):
            del peer[name]
    assert parse(data, SOURCE).tunnel.mode == "none"
    del data["tunnel"]
    with pytest.raises(ConfigError, match=r"tunnel\.interface"):
        parse(data, SOURCE)


def test_keys_alone_are_believed_only_where_the_file_says_so() -> None:
    config = parse(keys_alone(), SOURCE)
    assert not config.attested and config.tunnel.private_key == SOURCE.parent / "tunnel.key"
    assert parse(example(), SOURCE).attested
    for path in ("tunnel.private_key", "peers.1.tunnel_public_key"):
        data = keys_alone()
        put(path, None)(data)
        with pytest.raises(ConfigError, match="missing"):
            parse(data, SOURCE)


OWN = {  # one's own business: the digest stays
    "party": 1, "identity_key": "k", "data_dir": "d", "clients": ["ab" * 32], "owners": ["ab" * 32],
    "control.listen": "h:1", "mesh.listen": "h:1", "deadlines.round": 1, "deadlines.step": 1,
    "deadlines.client": 1, "deadlines.handshake": 1, "deadlines.link": 5, "log.level": "debug",
    "metrics.listen": "h:1", "metrics.readers": ["ab" * 32], "tls.enabled": True,
    "attestation.owners": ["ab" * 32], "attestation.policy": "p", "attestation.collateral": "c",
    "attestation.listen": "h:1", "peers.1.admission": "h:1", "attester.kind": "tdx",
    "scheduler.max_sessions": 2, "peers.1.host": "elsewhere", "tunnel.interface": "wg7",
    "tunnel.rotate_seconds": 60,
}  # fmt: skip
SAME = {  # common: the digest changes
    "fixed_point.scale_bits": 12, "cheby.deg": 2, "scheduler.max_context": 512,
    "scheduler.prompt_buckets": [16], "scheduler.output_buckets": [16], "triple_pool.min_size": 1,
    "scheduler.max_batch": 2, "scheduler.round_trip_ms": 1,
    "topk": 8, "tunnel.rotate_seconds": 0, "peers.1.identity": "cd" * 32,
}  # fmt: skip


def test_the_digest_covers_what_must_be_shared_and_nothing_else() -> None:
    digest = parse(example(), SOURCE).digest()
    assert len(digest) == 32
    for path, value in OWN.items():
        data = copy.deepcopy(example())
        put(path, value)(data)
        assert parse(data, SOURCE).digest() == digest, path
    for path, value in SAME.items():
        data = copy.deepcopy(example())
        put(path, value)(data)
        assert parse(data, SOURCE).digest() != digest, path
    off = parse(keys_alone(), SOURCE).digest()
    without = keys_alone()
    without["tunnel"]["mode"] = "none"
    assert len({digest, off, parse(without, SOURCE).digest()}) == 3
