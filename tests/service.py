"""Three fake parties behind real control doors: they share values honestly and know everything. Tests only.

They let a test see what the client really sent (the prompt, unmasked) and change what any party says.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import trio
from storage import open_store, share, upload
from trust import Owners, verdict_on

from mimir import vault as at_rest
from mimir.admission import revocation
from mimir.admission.certificates import issue
from mimir.admission.revocation import Revocations
from mimir.admission.tls import PartyTls, utc_now
from mimir.client.federation import Deadlines as ClientDeadlines
from mimir.client.federation import Federation, Party, Revocation
from mimir.config import Address, Config, Control, Deadlines, Mesh, Peer, Scheduler, Tls, Tunnel
from mimir.errors import BadInput
from mimir.model.checkpoint import PlanSpec
from mimir.net.control import ClientHandle, Evidence, serve_control
from mimir.net.identity import Identity
from mimir.net.messages import TOKEN_BITS, Message, Open
from mimir.store import ComponentsDiffer, ModelStore

VOCAB = 300
NAMES = ("alpha", "beta", "gamma")

# Given the party and a message it is about to send: what it sends instead; None for nothing at all.
Tamper = Callable[[int, Message], Message | None]


def spec(positions: str = "learned", **changes: Any) -> PlanSpec:
    """A tiny model's public half."""
    base = PlanSpec(
        family="gpt2" if positions == "learned" else "llama",
        layers=1,
        width=4,
        heads=2,
        kv_heads=2,
        head_dim=2,
        hidden=4,
        vocab=VOCAB,
        context=200,
        act="gelu" if positions == "learned" else "silu_glu",
        norm_eps=1e-5,
        positions=positions,
        rope_theta=None if positions == "learned" else 10000.0,
        bos_id=None,
        eos_ids=(0,),
    )
    return replace(base, **changes)


@dataclass
class Conversation:
    """What the three fake parties know of one session."""

    terms: Open
    joined: trio.Event = field(default_factory=trio.Event)
    waiting: int = 0
    prompts: dict[tuple[int, int], dict[str, np.ndarray]] = field(
        default_factory=dict
    )  # (turn, part) -> values
    offsets: dict[tuple[int, int], dict[int, dict[str, bytes]]] = field(default_factory=dict)
    unmasked: trio.Event = field(default_factory=trio.Event)


class Fake:
    """The common mind of the three parties."""

    def __init__(self, model: PlanSpec) -> None:
        self.model = model
        self.conversations: dict[bytes, Conversation] = {}
        self.received: dict[tuple[str, int], dict[int, str]] = {}  # (model, component) -> hash by party
        self.tamper: Tamper = lambda party, message: message
        self.open_error: Exception | None = None  # what party 1 raises when a session opens
        self.digest_liar: int | None = None

    def components(self, what: str, size: int) -> np.ndarray:
        """Three components of a random value, the same for whoever asks."""
        seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).integers(0, 2**64, (3, size), dtype=np.uint64)

    def bits(self) -> dict[str, int]:
        context = (self.model.context - 1).bit_length()
        return {"token": (VOCAB - 1).bit_length(), "position": context, "valid": 64}

    def answer(self, conversation: Conversation, turn: int, step: int) -> int:
        """The token that this model "generates": depends on every real prompt token and the step."""
        total = 0
        for (number, part), values in sorted(conversation.prompts.items()):
            if number <= turn:
                total += int((values["token"] * values["valid"]).sum()) * (part + 1)
        return int((total + 7 * step + turn) % (VOCAB - 1)) + 1


class FakeParty:
    """One party: `mimir.net.control.Service`."""

    def __init__(self, party: int, fake: Fake, store: ModelStore) -> None:
        self.party = party
        self.fake = fake
        self.store = store
        self.evidence: Evidence | None = None

    def status(self) -> dict[str, Any]:
        return {"sessions": len(self.fake.conversations)}

    async def compare_digests(self, model: str, components: dict[int, str]) -> None:
        for component, digest in components.items():
            mine = "0" * 64 if self.party == self.fake.digest_liar else digest
            self.fake.received.setdefault((model, component), {})[self.party] = mine
        for component in components:
            while len(known := self.fake.received[model, component]) < 2:
                await trio.sleep(0.01)
            if len(set(known.values())) != 1:
                raise ComponentsDiffer("the holders differ")

    async def _send(self, client: ClientHandle, message: Message) -> None:
        changed = self.fake.tamper(self.party, message)
        if changed is not None:
            await client.send(changed)

    async def open(self, client: ClientHandle, terms: Open) -> None:
        if self.fake.open_error is not None and self.party == 1:
            raise self.fake.open_error
        conversation = self.fake.conversations.setdefault(terms.session, Conversation(terms))
        if conversation.terms != terms:
            raise BadInput("this session was opened with other terms")
        conversation.waiting += 1
        if conversation.waiting == 3 * len(terms.clients):
            conversation.joined.set()
        await conversation.joined.wait()
        await self._send(client, {"t": "opened"})
        part = terms.clients.index(client.key)
        turn, buckets, max_new = 0, terms.buckets, terms.max_new
        while True:
            await self._turn(client, conversation, part, turn, buckets, max_new)
            message = await client.receive()
            if message["t"] == "close":
                return
            if message["t"] != "turn" or message["turn"] != turn + 1:
                raise BadInput("a turn was due")
            turn, buckets, max_new = message["turn"], tuple(message["buckets"]), message["max_new"]

    async def _turn(
        self,
        client: ClientHandle,
        conversation: Conversation,
        part: int,
        turn: int,
        buckets: tuple[int, ...],
        max_new: int,
    ) -> None:
        fake, session = self.fake, conversation.terms.session.hex()
        await self._send(client, self._progress("preprocessing", 1, 2))
        masks = {
            name: fake.components(f"{session} {turn} {part} {name}", buckets[part]) for name in fake.bits()
        }
        mine = {
            name: np.stack([m[self.party], m[(self.party + 1) % 3]]).tobytes() for name, m in masks.items()
        }
        await self._send(client, {"t": "masks", "turn": turn, "bits": fake.bits(), "names": mine})
        message = await client.receive()
        if message["t"] != "offsets" or message["turn"] != turn:
            raise BadInput("offsets were due")
        seen = conversation.offsets.setdefault((turn, part), {})
        seen[self.party] = message["names"]
        conversation.prompts[turn, part] = {
            name: (np.frombuffer(raw, "<u8") - masks[name].sum(axis=0, dtype=np.uint64))
            & np.uint64((1 << fake.bits()[name]) - 1)
            for name, raw in message["names"].items()
        }
        expected = 3 * len(buckets)
        while sum(len(by) for (number, _), by in conversation.offsets.items() if number == turn) < expected:
            await trio.sleep(0.002)
        for step in range(max_new):
            await self._send(client, self._progress("decode", step, max_new))
            parts = [
                int(part) % 2**TOKEN_BITS
                for part in fake.components(f"{session} {turn} token {step}", 1)[:, 0]
            ]
            parts[2] = (fake.answer(conversation, turn, step) - parts[0] - parts[1]) % 2**TOKEN_BITS
            pair = [parts[self.party], parts[(self.party + 1) % 3]]
            await self._send(client, {"t": "token", "step": step, "components": pair})
        await self._send(client, {"t": "done", "stats": {"rounds": 5, "party": self.party}})

    def _progress(self, phase: str, done: int, total: int) -> Message:
        return {
            "t": "progress",
            "phase": phase,
            "done": done,
            "total": total,
            "rounds": 10 * done,
            "sent": 1000 * done,
            "seconds": 0.25,
        }


@dataclass
class World:
    """Three fake parties that run, and what is needed to talk to them."""

    fake: Fake
    parties: list[FakeParty]
    identities: list[Identity]
    configs: list[Config]
    clients: list[Identity]
    owner: Identity
    federation: Federation
    model: str = ""
    owners: Owners | None = None  # who may revoke
    revocations: list[Revocations] = field(default_factory=list)
    tls: list[PartyTls] = field(default_factory=list)

    def certify(self, party: int, by: int, **changes: Any) -> bytes:
        """Have one party admit another, as if it had seen evidence; returns the certificate."""
        now = utc_now()
        verdict = verdict_on(self.keys[party], now, node=NAMES[party], **changes)
        der = issue(self.identities[by], self.keys[party], self.tls[party].key.public, verdict, now)
        self.tls[party].install(der)
        return der

    @property
    def keys(self) -> tuple[str, str, str]:
        a, b, c = (identity.public_hex for identity in self.identities)
        return a, b, c


@asynccontextmanager
async def world(
    tmp: Path,
    model: PlanSpec | None = None,
    *,
    hold: bool = True,
    silence: float = 5.0,
    trust: bool = False,
    **changes: Any,
) -> AsyncIterator[World]:
    """Run three control doors on loopback; `hold` gives them a model. `changes` go into every `Config`.

    `trust`: with TLS, each party certified by the next one, and owners who may revoke.
    """
    model = model or spec()
    identities = [Identity.generate() for _ in range(3)]
    clients, owner = [Identity.generate() for _ in range(2)], Identity.generate()
    keys = (identities[0].public_hex, identities[1].public_hex, identities[2].public_hex)
    peers = tuple(Peer(party, NAMES[party], keys[party], "127.0.0.1", 1) for party in range(3))
    settings: dict[str, Any] = {
        "control": Control(Address("127.0.0.1", 0)),
        "scheduler": Scheduler(max_context=200, prompt_buckets=(8, 16), output_buckets=(4, 8)),
        "deadlines": Deadlines(round=20, step=20, client=20, handshake=2),
        "tunnel": Tunnel(mode="none"),
        **changes,
    }
    fake = Fake(model)
    parties, configs = [], []
    owners = Owners(keys) if trust else None
    known: list[Revocations] = []
    ends: list[PartyTls] = []
    sync, at_rest.sync = at_rest.sync, lambda path: None  # the disk is not what is tested here
    try:
        async with trio.open_nursery() as nursery:
            entries = []
            for party, identity in enumerate(identities):
                config = Config(
                    source=tmp / f"party{party}.toml",
                    party=party,
                    identity_key=tmp / f"party{party}.key",
                    data_dir=tmp / f"data{party}",
                    mesh=Mesh(Address("127.0.0.1", 0)),
                    peers=peers,
                    clients=tuple(client.public_hex for client in clients),
                    owners=(owner.public_hex,),
                    **settings,
                )
                store = open_store(config.data_dir, party, keys)
                member = FakeParty(party, fake, store)
                door: Callable[..., Any] = serve_control
                if owners is not None:
                    file = config.data_dir / revocation.FILE
                    known.append(Revocations(file, owners.context, owners.keys, owners.threshold))
                    ends.append(
                        PartyTls(identity, NAMES[party], [k for k in keys if k != keys[party]], known[-1])
                    )
                    door = partial(door, tls=ends[-1], revocations=known[-1])
                bound = await nursery.start(door, config, identity, member)
                parties.append(member)
                configs.append(config)
                entries.append(Party(NAMES[party], "127.0.0.1", bound[0].port, identity.public_hex))
            federation = Federation(
                tmp / "federation.toml",
                tmp / "client.key",
                tuple(entries),
                deadlines=ClientDeadlines(connect=20, silence=silence),
            )
            made = World(fake, parties, identities, configs, clients, owner, federation)
            if owners is not None:
                made.owners, made.revocations, made.tls = owners, known, ends
                made.federation = replace(
                    federation, tls=Tls(True), revocation=Revocation(owners.keys, owners.threshold)
                )
                for party in range(3):
                    made.certify(party, (party + 1) % 3)
            if hold:
                shared = share(model, keys)
                for member in parties:
                    upload(member.store, shared)
                made.model = shared.manifest.digest()
            try:
                yield made
            finally:
                nursery.cancel_scope.cancel()
    finally:
        at_rest.sync = sync
        for member in parties:  # nobody is in the midst of anything any more
            member.store.close()
