"""A whole federation on loopback, in one process: three parties with real sockets, and a client. Tests
only.
"""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from mimir import config as configuration
from mimir.actors.peer import run_peer
from mimir.client import federation as client_federation
from mimir.client.provision import Seeds, Sharing, provision
from mimir.client.session import connect_all, new_session, open_session, statuses, survey, terms_for
from mimir.keys import file as keys_of_files
from mimir.model.checkpoint import load_checkpoint
from mimir.net.identity import Identity
from mimir.net.messages import Sampler
from mimir.secret import StorageKey

OFF = '[attestation]\nmode = "off"\n'


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago, none of those that connections of others are given."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def write_federation(folder: Path, extra: str = "", clients: int = 1) -> tuple[list[Path], list[Path]]:
    """Keys and files of three parties and some clients; returns party configs and federation files."""
    identities = []
    for name in [f"party{i}" for i in range(3)] + [f"client{i}" for i in range(clients)]:
        identity = Identity.generate()
        identity.save(folder / f"{name}.key")
        identities.append(identity.public_hex)
    ports = free_ports(6)
    keys = ", ".join(f'"{k}"' for k in identities[3:])
    peers = "".join(
        f'[[peers]]\nparty = {i}\nname = "p{i}"\n'
        f'identity = "{identities[i]}"\nhost = "127.0.0.1"\nport = {ports[i]}\n'
        for i in range(3)
    )
    configs, federations = [], []
    for i in range(3):
        keys_of_files.save(folder / f"storage{i}.key", StorageKey.random())
        text = (
            f'party = {i}\nidentity_key = "party{i}.key"\ndata_dir = "data{i}"\n'
            f'keys.file = "storage{i}.key"\n'
            f"clients = [{keys}]\nowners = [{keys}]\n"
            f'[control]\nlisten = "127.0.0.1:{ports[3 + i]}"\n[mesh]\nlisten = "127.0.0.1:{ports[i]}"\n'
            f'[tunnel]\nmode = "none"\n{"" if "[attestation]" in extra else OFF}{peers}{extra}'
        )
        path = folder / f"party{i}.toml"
        path.write_text(text)
        configs.append(path)
    for c in range(clients):
        text = f'client_key = "client{c}.key"\n' + "".join(
            f'[[parties]]\nname = "p{i}"\n'
            f'host = "127.0.0.1"\nport = {ports[3 + i]}\nidentity = "{identities[i]}"\n'
            for i in range(3)
        )
        path = folder / f"client{c}.toml"
        path.write_text(text)
        federations.append(path)
    return configs, federations


@asynccontextmanager
async def running(configs: list[Path]) -> AsyncIterator[list[trio.CancelScope]]:
    """Three parties; leaving the block ends them. Each party's scope ends that party alone."""
    scopes = []
    async with trio.open_nursery() as nursery:
        for path in configs:
            scopes.append(start_party(nursery, path))
        yield scopes
        nursery.cancel_scope.cancel()


def start_party(nursery: trio.Nursery, path: Path) -> trio.CancelScope:
    scope = trio.CancelScope()

    async def one() -> None:
        with scope:
            await run_peer(configuration.load(path))

    nursery.start_soon(one)
    return scope


async def until_ready(federation: Path, seconds: float = 30) -> None:
    """Return once all parties answer and see each other."""
    fed = client_federation.load(federation)
    me = Identity.load(fed.client_key)
    with trio.fail_after(seconds):
        while True:
            try:
                async with connect_all(fed, me) as connections:
                    if all(all(s["service"]["peers"].values()) for s in await statuses(connections)):
                        return
            except Exception:  # not up yet: fail_after bounds how often
                await trio.sleep(0.1)
            await trio.sleep(0.1)


async def share_model(
    federation: Path, checkpoint: Path, folder: Path, name: str = "m", scale_bits: int = 16
) -> str:
    """Provision a checkpoint; returns the model's digest."""
    fed = client_federation.load(federation)
    me = Identity.load(fed.client_key)
    plan = load_checkpoint(checkpoint)
    sharing = Sharing(plan, scale_bits, Seeds(folder / "seeds").take())
    manifest = sharing.manifest(name, fed.identities)
    async with connect_all(fed, me) as connections:
        return await provision(connections, sharing, manifest)


async def generate(
    federation: Path, model: str, ids: list[int], max_new: int, sampler: Sampler | None = None, **terms: Any
) -> tuple[list[int], list[dict[str, Any]]]:
    """One turn of a session of one client: the tokens, and every party's figures."""
    fed = client_federation.load(federation)
    me = Identity.load(fed.client_key)
    async with connect_all(fed, me) as connections:
        service = await survey(connections, fed)
        bucket = next(b for b in service.prompt_buckets if b >= len(ids))
        opened = terms_for(
            service,
            model,
            [me.public_hex],
            [bucket],
            max_new,
            sampler or Sampler(),
            session=new_session(),
            **terms,
        )
        async with open_session(connections, service, opened, me) as session:
            await session.prompt(ids)
            out = []
            while (token := await session.token()) is not None:
                out.append(token)
            return out, session.stats
