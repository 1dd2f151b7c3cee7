"""A session from the client's side: masked prompt in, checked tokens out.

The parties hold random masks in three components, and every component reaches this client from both of its
holders. One malicious party can therefore not change a mask or a token unnoticed: where the two holders of a
component differ, `ClientError` names both and nothing more is used. Only this client can add the components
up; what it sends back, value plus mask, is uniformly random to everybody else.

A prompt of L tokens is padded on the left to its public bucket: padding has token 0, position 0 and valid 0.
The protocol always runs to the end of the answer's bucket, so its length says nothing of where the text ends.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from mimir.admission.revocation import Revocations
from mimir.client import attestation
from mimir.client.attestation import Document
from mimir.client.connection import Connection, PartyError, connect, plain_errors
from mimir.client.federation import Federation
from mimir.errors import AttestationError, BadInput, ClientError, LocalError, MimirError, ModelError
from mimir.model.checkpoint import PlanSpec
from mimir.net.identity import Identity
from mimir.net.messages import SESSION_BYTES, TOKEN_BITS, Message, Open, Sampler

Words = npt.NDArray[np.uint64]

PARTIES = 3
CLOSE_SECONDS = 1.0
KINDS = ("token", "position", "valid")  # what a prompt slot consists of
RING_BITS = 64
PAIR_BYTES = 16  # two components of one word


@dataclass(frozen=True)
class Progress:
    """What one party says about its work. Not trusted, only shown."""

    party: int
    phase: str
    done: int
    total: int
    rounds: int
    sent: int
    seconds: float


@dataclass(frozen=True)
class Model:
    """A model that all three parties hold: its name, and what is public of it."""

    name: str
    spec: PlanSpec


@dataclass(frozen=True)
class Service:
    """What all three parties say they can do; they agree, or `survey` raises."""

    models: dict[str, Model]  # by digest
    prompt_buckets: tuple[int, ...]
    output_buckets: tuple[int, ...]
    max_context: int
    topk: int
    scale_bits: int

    def model(self, wanted: str | None) -> str:
        """The digest of the model named by name, digest or a digest's first 8 or more digits."""
        if wanted is None:
            if len(self.models) != 1:
                raise BadInput(f"say which model: {self._offer()}")
            return next(iter(self.models))
        if wanted in self.models:
            return wanted
        matches = [digest for digest, model in self.models.items() if model.name == wanted]
        if not matches and len(wanted) >= 8:
            matches = [digest for digest in self.models if digest.startswith(wanted)]
        if len(matches) != 1:
            how = "is not" if not matches else "is more than once"
            raise BadInput(f"model {wanted!r} {how} at all three parties: {self._offer()}")
        return matches[0]

    def _offer(self) -> str:
        if not self.models:
            return "they hold none in common; a model owner must run `mimir provision` first"
        return "they hold " + ", ".join(f"{model.name} ({key[:16]})" for key, model in self.models.items())


Watch = Callable[[Progress], None]


def bucket_for(length: int, buckets: Sequence[int], what: str) -> int:
    """The smallest public bucket that holds `length`; `BadInput` if none does."""
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise BadInput(f"{what} has {length} tokens; the largest bucket is {buckets[-1]}")


@asynccontextmanager
async def connect_all(
    federation: Federation, identity: Identity, seen: Callable[[Document], None] | None = None
) -> AsyncIterator[list[Connection]]:
    """Sealed connections to the three parties, in party order; all or `ClientError`.

    Where the federation file names owners, what they revoked is exchanged with the parties first, and a party
    that turns out to be revoked is refused. If it names a policy, each party then attests itself on its
    connection before anything else is said, and `seen` gets the document. Where that is required and does not
    hold, this raises `AttestationError`; later the connections take nothing once the evidence has ended.
    """
    deadlines, settings = federation.deadlines, federation.attestation
    basis = attestation.read_basis(settings) if settings.policy is not None else None
    revocations = federation.revocations()
    tls = federation.client_tls(identity, revocations)
    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(
                connect(party, identity, within=deadlines.connect, silence=deadlines.silence, tls=tls)
            )
            for party in federation.parties
        ]
        if revocations is not None:
            await _agree_on_revocations(connections, revocations)
        if basis is not None:
            answers = await attestation.ask_all(connections)
            now = attestation.utc_now()
            document = attestation.judge(
                answers, federation.parties, identity.public_hex, basis, now, revocations
            )
            if seen is not None:
                seen(document)
            if settings.required:
                until = document.require()
                for connection in connections:
                    connection.until = until
        yield connections


async def _agree_on_revocations(connections: Sequence[Connection], revocations: Revocations) -> None:
    """Learn from every party what is revoked, tell those that are behind, and refuse parties that are."""

    async def exchange(connection: Connection) -> None:
        await connection.send({"t": "revocations"})
        answer = await connection.receive("revoked")
        if answer["statement"]:
            try:
                revocations.offer(answer["statement"])
            except AttestationError as error:
                if error.step != "revocation.epoch":  # it is behind: it will be told
                    raise PartyError(
                        connection.party, f"shows revocations that do not hold: {error}"
                    ) from None

    async def tell(connection: Connection) -> None:
        if revocations.epoch:
            await connection.send({"t": "revoke", "statement": revocations.raw})
            await connection.receive("revoked")

    await gather(connections, exchange)
    await gather(connections, tell)
    for connection in connections:
        shown = connection.certificate
        try:
            revocations.check(identity=connection.party.identity)
            if shown is not None:
                revocations.check(identity=shown.issuer, certificate=shown.fingerprint)
                if shown.grounds is not None:
                    revocations.check(tunnel=shown.grounds.tunnel, measurements=shown.grounds.measurements)
        except AttestationError as error:
            raise PartyError(connection.party, str(error)) from None


async def statuses(connections: Sequence[Connection]) -> list[dict[str, Any]]:
    """What each party says of itself, checked only for its identity list and number."""

    async def ask(connection: Connection) -> dict[str, Any]:
        await connection.send({"t": "status"})
        status: dict[str, Any] = (await connection.receive("status"))["status"]
        return status

    return await gather(connections, ask)


async def survey(connections: Sequence[Connection], federation: Federation) -> Service:
    """What the three parties agree on. `ClientError` names who differs, and in what."""
    found = await statuses(connections)
    for number, status in enumerate(found):
        where = f"party {connections[number].party.name}"
        if status.get("party") != number or status.get("parties") != list(federation.identities):
            raise ClientError(
                f"{where} belongs to other parties, or stands at another place, than our file says"
            )
    for key in ("terms", "scale_bits", "topk", "max_context", "prompt_buckets", "output_buckets"):
        for number in (1, 2):
            if found[number].get(key) != found[0].get(key):
                names = f"{connections[0].party.name} and {connections[number].party.name}"
                raise ClientError(
                    f"parties {names} differ in {key}: {found[0].get(key)}, {found[number].get(key)}"
                )
    first = found[0]
    try:
        held = [dict(status["models"]) for status in found]
        models = {
            str(digest): Model(str(entry["name"]), PlanSpec.from_public(entry["model"]))
            for digest, entry in held[0].items()
            if all(other.get(digest) == entry for other in held)
        }
        service = Service(
            models,
            tuple(int(size) for size in first["prompt_buckets"]),
            tuple(int(size) for size in first["output_buckets"]),
            int(first["max_context"]),
            int(first["topk"]),
            int(first["scale_bits"]),
        )
    except (KeyError, TypeError, ValueError, ModelError):
        raise ClientError("the parties' status is malformed; is this client of another version?") from None
    if not service.prompt_buckets or not service.output_buckets:
        raise ClientError("the parties name no buckets")
    return service


class Session:
    """An open session. Per turn: `prompt` once, then `token` until it returns None; `stats` afterwards."""

    def __init__(
        self,
        connections: Sequence[Connection],
        terms: Open,
        part: int,
        max_context: int,
        spec: PlanSpec,
        watch: Watch | None = None,
    ) -> None:
        self.terms = terms
        self.part = part  # which of the clients we are
        self.stats: list[dict[str, Any]] = []  # per party, of the last turn
        self._connections = list(connections)
        self._watch = watch
        self._max_context = max_context
        self._vocab = spec.vocab
        self._turn = 0
        self._buckets, self._max_new = terms.buckets, terms.max_new
        self._slots = 0  # used so far by all clients and answers
        self._next_position = 0  # of the next prompt token of ours, as far as we can know
        self._due = -1  # tokens still to come in this turn; -1: a prompt is due

    @property
    def room(self) -> int:
        """Slots of the context still free."""
        return self._max_context - self._slots

    async def prompt(
        self,
        ids: Sequence[int],
        *,
        buckets: Sequence[int] | None = None,
        max_new: int | None = None,
        start: int | None = None,
    ) -> None:
        """Give our part of this turn's prompt. From the second turn on, name the agreed buckets again.

        `start` is the position of our first token; by default it follows what came before. A sole client
        knows that exactly. One of several does not know the others' true lengths, so by default it counts
        their padded ones; clients that tell each other their lengths can do better.
        """
        if self._due != -1:
            raise LocalError("the last answer is not finished")
        if self._turn == 0:
            if buckets is not None or max_new is not None:
                raise LocalError("the first turn's lengths are in the terms")
        elif buckets is None or max_new is None or len(buckets) != len(self.terms.clients):
            raise LocalError("a later turn needs one bucket per client, and max_new")
        else:
            self._buckets, self._max_new = tuple(buckets), max_new
        bucket = self._buckets[self.part]
        if not 0 < len(ids) <= bucket:
            raise BadInput(f"the prompt has {len(ids)} tokens; 1 to {bucket} fit its bucket")
        if not all(0 <= token < self._vocab for token in ids):
            raise BadInput(
                f"the prompt has a token outside the model's {self._vocab}: is this its tokenizer?"
            )
        need = sum(self._buckets) + self._max_new
        if need > self.room:
            raise BadInput(
                f"this turn needs {need} positions, {self.room} of {self._max_context} are left; "
                "shorten the prompt or the answer, or begin a new session"
            )
        if start is None:
            start = self._next_position + sum(self._buckets[: self.part])
        with plain_errors():
            if self._turn:
                await self._tell(
                    {
                        "t": "turn",
                        "turn": self._turn,
                        "buckets": list(self._buckets),
                        "max_new": self._max_new,
                    }
                )
            masks = await gather(self._connections, lambda each: self._await(each, "masks"))
            names = [each.party.name for each in self._connections]
            check_masks(names, masks, self._turn, bucket)
            offsets = offset_prompt(names, masks, ids, bucket, start)
            await self._tell({"t": "offsets", "turn": self._turn, "names": offsets})
        self._slots += need
        sole = len(self.terms.clients) == 1
        self._next_position = (
            start + len(ids) if sole else self._next_position + sum(self._buckets)
        ) + self._max_new
        self._due = self._max_new

    async def token(self) -> int | None:
        """The next token of the answer; None after the last one of the bucket."""
        if self._due == -1:
            raise LocalError("no answer is due: give a prompt first")
        with plain_errors():
            if self._due == 0:
                done = await gather(self._connections, lambda each: self._await(each, "done"))
                self.stats = [message["stats"] for message in done]
                self._due = -1
                self._turn += 1
                return None
            step = self._max_new - self._due
            shares = await gather(self._connections, lambda each: self._await(each, "token"))
        names = [each.party.name for each in self._connections]
        for name, share in zip(names, shares, strict=True):
            if share["step"] != step:
                raise ClientError(f"party {name} sent token {share['step']} where token {step} is due")
        pairs = np.array([share["components"] for share in shares], np.uint64)[..., None]  # (3, 2, 1)
        value = int(join(names, pairs, f"token {step}")[0]) % (1 << TOKEN_BITS)
        if value >= self._vocab:
            raise ClientError(f"token {step} is no token of this model; nothing more is accepted")
        self._due -= 1
        return value

    async def _tell(self, message: Mapping[str, Any]) -> None:
        await gather(self._connections, lambda each: each.send(message))

    async def _await(self, connection: Connection, kind: str) -> Message:
        """The next message of `kind` from one party, showing progress on the way."""
        while True:
            message = await connection.receive(kind, "progress")
            if message["t"] == kind:
                return message
            if self._watch is not None:
                values = {name: value for name, value in message.items() if name != "t"}
                self._watch(Progress(self._connections.index(connection), **values))


def join(names: Sequence[str], pairs: Words, what: str) -> Words:
    """Add three components, each compared between its two holders first. pairs (3 parties, 2, n) -> (n,).

    Party i sends components i and i+1. A difference means that one of the two holders lies: `ClientError`.
    """
    for component in range(PARTIES):
        first, second = component, (component - 1) % PARTIES
        if not np.array_equal(pairs[first, 0], pairs[second, 1]):
            raise ClientError(
                f"{what}: parties {names[first]} and {names[second]} sent different values of one component; "
                "one of them lies or is broken. Nothing was accepted"
            )
    total: Words = pairs[:, 0].sum(axis=0, dtype=np.uint64)
    return total


def check_masks(names: Sequence[str], masks: Sequence[Message], turn: int, bucket: int) -> None:
    """Whether three "masks" messages are alike in all that is public, and of the size of our bucket."""
    for name, message in zip(names, masks, strict=True):
        if message["turn"] != turn:
            raise ClientError(f"party {name} sent masks of turn {message['turn']} where turn {turn} is due")
        if message["bits"] != masks[0]["bits"]:
            raise ClientError(f"parties {names[0]} and {name} disagree on the size of the masks")
        if set(message["bits"]) != set(KINDS) or set(message["names"]) != set(KINDS):
            raise ClientError(f"party {name} sent masks for {sorted(message['names'])}, not {sorted(KINDS)}")
        for kind, raw in message["names"].items():
            if len(raw) != PAIR_BYTES * bucket:
                count = len(raw) // PAIR_BYTES
                raise ClientError(f"party {name} sent {count} masks of {kind} for a bucket of {bucket}")
    if masks[0]["bits"]["valid"] != RING_BITS:
        raise ClientError("the parties' mask of valid is not of the whole ring")


def offset_prompt(
    names: Sequence[str], masks: Sequence[Message], ids: Sequence[int], bucket: int, start: int
) -> dict[str, bytes]:
    """The masked prompt: per kind, (value + mask) mod 2^bits for every slot, as little-endian words."""
    padding = bucket - len(ids)
    values = {
        "token": [0] * padding + list(ids),
        "position": [0] * padding + list(range(start, start + len(ids))),
        "valid": [0] * padding + [1] * len(ids),
    }
    offsets = {}
    for kind, bits in masks[0]["bits"].items():
        if max(values[kind]) >> bits or min(values[kind]) < 0:
            raise BadInput(f"a {kind} of this prompt is beyond what this model takes")
        pairs = [np.frombuffer(message["names"][kind], "<u8").reshape(2, bucket) for message in masks]
        mask = join(names, np.stack(pairs), f"mask of {kind}")
        low = np.uint64((1 << bits) - 1)
        offsets[kind] = ((np.array(values[kind], np.uint64) + mask) & low).astype("<u8").tobytes()
    return offsets


@asynccontextmanager
async def open_session(
    connections: Sequence[Connection],
    service: Service,
    terms: Open,
    identity: Identity,
    watch: Watch | None = None,
) -> AsyncIterator[Session]:
    """Open the session in `terms` at all three parties. Each of its clients must, with the same terms."""
    if identity.public_hex not in terms.clients:
        raise BadInput("our own key is not among the clients of this session")
    spec = service.models[terms.model].spec
    part = terms.clients.index(identity.public_hex)
    context = min(service.max_context, spec.context)
    session = Session(connections, terms, part, context, spec, watch)
    with plain_errors():
        await session._tell(terms.message())
        await gather(connections, lambda each: session._await(each, "opened"))
    yield session
    # A courtesy: hanging up ends the session as well, and a party that has left cannot be told.
    with trio.move_on_after(CLOSE_SECONDS), suppress(MimirError), plain_errors():
        await session._tell({"t": "close"})


def new_session() -> bytes:
    """A fresh session number, which all clients of the session use."""
    return os.urandom(SESSION_BYTES)


def terms_for(
    service: Service,
    model: str,
    clients: Sequence[str],
    buckets: Sequence[int],
    max_new: int,
    sampler: Sampler,
    *,
    session: bytes,
    deterministic: bool = False,
) -> Open:
    """Terms that this federation allows, or `BadInput` saying which does not fit."""
    output = bucket_for(max_new, service.output_buckets, "the answer")
    for bucket in buckets:
        if bucket not in service.prompt_buckets:
            raise BadInput(f"prompt bucket {bucket} is none of {', '.join(map(str, service.prompt_buckets))}")
    context = min(service.max_context, service.models[model].spec.context)
    if sum(buckets) + output > context:
        raise BadInput(
            f"prompt ({sum(buckets)}) and answer ({output}), padded, exceed the context of {context}"
        )
    if sampler.kind == "sample" and sampler.topk > service.topk:
        raise BadInput(f"top-k {sampler.topk} is over this federation's {service.topk}")
    return Open(session, model, tuple(clients), tuple(buckets), output, sampler, deterministic)


async def gather(connections: Sequence[Connection], act: Callable[[Connection], Any]) -> list[Any]:
    """Do the same with every party at once; results in party order, or the first error."""
    results: list[Any] = [None] * len(connections)

    async def one(index: int, connection: Connection) -> None:
        results[index] = await act(connection)

    async with trio.open_nursery() as nursery:
        for index, connection in enumerate(connections):
            nursery.start_soon(one, index, connection)
    return results
