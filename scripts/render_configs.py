"""Write the configuration files of three parties, an owner and a client on one machine, for local_mesh.sh.

    python scripts/render_configs.py WORKDIR --base-port 7100 --interface mm123 [--no-tunnel]
                                     [--attested] [--relay ADDRESS] [--tokenizer DIR] [--set KEY=VALUE ...]

Starts from configs/three.toml, so that what runs here is what three hosts would run but for addresses and
keys. The key files must be in WORKDIR already: party0 to party2 with identity.key, storage.key and, where
peers are not admitted by evidence, tunnel.key; owner.key and client.key; each but storage.key with its public
half beside it as NAME.pub. With --attested a policy by the owner is expected as policy.toml, and a software
TPM at the socket in partyN/tpm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTIES = 3
OUTSIDE = "10.90.0."  # the network between the namespaces: party i is .i+1
INSIDE = "10.91.0."  # the tunnel
LOOPBACK = "127.0.0.1"


def control_port(base: int, party: int) -> int:
    return base + party


def mesh_port(base: int, party: int) -> int:
    return base + 10 + party


def admission_port(base: int, party: int) -> int:
    return base + 3 + party


def tunnel_port(base: int, party: int) -> int:
    return base + 20 + party


def relay_port(base: int, party: int, other: int) -> int:
    """Where the relay hears what `party` sends to `other`; the ports after it are for rotation."""
    return base + 30 + 8 * (PARTIES * party + other)


def dump(table: dict[str, Any]) -> str:
    """The small part of TOML that our files use."""
    lines = [f"{key} = {value(entry)}" for key, entry in table.items() if not is_table(entry)]
    for key, entry in table.items():
        if isinstance(entry, dict):
            lines += ["", f"[{key}]", dump(entry)]
        elif is_table(entry):
            for one in entry:
                lines += ["", f"[[{key}]]", dump(one)]
    return "\n".join(lines)


def is_table(entry: Any) -> bool:
    return isinstance(entry, dict) or (isinstance(entry, list) and bool(entry) and isinstance(entry[0], dict))


def value(entry: Any) -> str:
    if isinstance(entry, list):
        return "[" + ", ".join(map(value, entry)) + "]"
    return json.dumps(entry)  # strings, numbers and truth values are written alike in both languages


def set_key(table: dict[str, Any], text: str) -> None:
    name, equals, given = text.partition("=")
    if not equals:
        sys.exit(f"render_configs: --set {text}: must be KEY=VALUE")
    try:
        parsed = tomllib.loads(f"value = {given}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = given  # a word without quotes
    *above, last = name.split(".")
    for step in above:
        table = table.setdefault(step, {})
    table[last] = parsed  # an unknown key is refused by whoever reads the file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--base-port", type=int, required=True)
    parser.add_argument("--interface", required=True, help="name of the tunnels, to which the party is added")
    parser.add_argument("--no-tunnel", action="store_true")
    parser.add_argument("--attested", action="store_true", help="peers are admitted by evidence")
    parser.add_argument("--relay", help="outside address of the relay, if there is one")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    work, base = options.workdir.absolute(), options.base_port

    def public(name: str) -> str:
        return (work / f"{name}.pub").read_text().strip()

    outside = [LOOPBACK if options.no_tunnel else f"{OUTSIDE}{party + 1}" for party in range(PARTIES)]
    inside = [LOOPBACK if options.no_tunnel else f"{INSIDE}{party + 1}" for party in range(PARTIES)]
    names = ("alpha", "beta", "gamma")
    for party in range(PARTIES):
        settings = tomllib.loads((ROOT / "configs" / "three.toml").read_text())
        settings |= {
            "party": party,
            "identity_key": "identity.key",
            "data_dir": "data",
            "keys": {"file": "storage.key"},
            "clients": [public("client")],
            "owners": [public("owner")],
        }
        settings["control"]["listen"] = f"{outside[party]}:{control_port(base, party)}"
        settings["mesh"]["listen"] = f"{inside[party]}:{mesh_port(base, party)}"
        settings["attestation"] = {"mode": "off"}
        del settings["attester"]
        if options.attested:
            settings["attestation"] = {
                "policy": "../policy.toml",
                "owners": [public("owner")],
                "listen": f"{outside[party]}:{admission_port(base, party)}",
            }
            settings["attester"] = {"kind": "swtpm", "device": "tpm/socket"}
            settings["tls"]["enabled"] = True
        settings["peers"] = []
        for other in range(PARTIES):
            entry: dict[str, Any] = {
                "party": other,
                "name": names[other],
                "identity": public(f"party{other}/identity"),
                "host": inside[other],
                "port": mesh_port(base, other),
            }
            if not options.no_tunnel:
                endpoint = f"{outside[other]}:{tunnel_port(base, other)}"
                if options.relay and other != party:
                    endpoint = f"{options.relay}:{relay_port(base, party, other)}"
                entry |= {"tunnel_endpoint": endpoint, "tunnel_allowed": [f"{inside[other]}/32"]}
                if options.attested:
                    entry["admission"] = f"{outside[other]}:{admission_port(base, other)}"
                else:
                    entry["tunnel_public_key"] = public(f"party{other}/tunnel")
            settings["peers"].append(entry)
        settings["tunnel"] = {"mode": "none"}
        if not options.no_tunnel:
            settings["tunnel"] = {
                "mode": "wireguard",
                "interface": f"{options.interface}-{party}",
                "address": f"{inside[party]}/24",
                "listen_port": tunnel_port(base, party),
            }
            if not options.attested:
                settings["tunnel"]["private_key"] = "tunnel.key"
        for text in options.set:
            set_key(settings, text)
        (work / f"party{party}" / "party.toml").write_text(dump(settings) + "\n")
    for who in ("owner", "client"):
        told: dict[str, Any] = {"client_key": f"{who}.key"}
        if options.tokenizer:
            told["tokenizer"] = str(options.tokenizer.absolute())
        told["parties"] = [
            {
                "name": names[party],
                "host": outside[party],
                "port": control_port(base, party),
                "identity": public(f"party{party}/identity"),
            }
            for party in range(PARTIES)
        ]
        if options.attested:
            told["attestation"] = {"policy": "policy.toml", "owners": [public("owner")]}
            told["revocation"] = {"owners": [public("owner")]}
            told["tls"] = {"enabled": True}
        (work / f"{who}.toml").write_text(dump(told) + "\n")


if __name__ == "__main__":
    main()
