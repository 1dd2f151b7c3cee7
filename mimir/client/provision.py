"""The owner's side of sharing a model: every weight w becomes c0 + c1 + c2, and party i gets c_i and c_{i+1}.

Of each tensor two components are key streams of the seeds of their numbers, and the third, the explicit one
(see mimir.manifest), is w less these, modulo 2^64 or 2^32, so any two components are uniformly random
whatever the weights. A party is sent its two seeds, and words only of explicit components: twice each, to
their holders.
They are made piece by piece, twice: once to hash them for the manifest, once to send them. Never more than
one tensor of weights and a few pieces are in memory.

The seeds wait in an owner-only file until the parties have everything, so that an upload that was cut off
goes on where it stopped; then the file is deleted. Whoever has it and one party's shares has the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from mimir import kernels
from mimir.client.connection import Connection, plain_errors
from mimir.client.session import gather
from mimir.errors import BadInput, ClientError
from mimir.manifest import (
    COMPONENTS,
    FORMAT,
    Manifest,
    component_hash,
    holds,
    seed_commitment,
    tensors_of,
)
from mimir.model.checkpoint import Plan
from mimir.net.messages import MAX_CHUNK
from mimir.secret import KEY_BYTES, ShareSeed

Words = npt.NDArray[Any]
ShareSeeds = tuple[ShareSeed, ShareSeed, ShareSeed]  # of components 0, 1 and 2

PIECE = MAX_CHUNK // 8  # elements; a multiple of a key-stream block
QUEUE = 4  # pieces waiting for a slow party before all wait for it
SEED_FILE_BYTES = COMPONENTS * KEY_BYTES


@dataclass(frozen=True)
class Advance:
    """How far the work is, in weights."""

    phase: str  # "hashing" or "sending"
    done: int
    total: int


Watch = Callable[[Advance], None]


class Sharing:
    """One sharing of one model: deterministic given the seeds, so it can be made twice."""

    def __init__(self, plan: Plan, scale_bits: int, seeds: ShareSeeds) -> None:
        self._plan = plan
        self._scale_bits = scale_bits
        self._seeds = seeds
        self._places = {tensor.name: (i, tensor) for i, tensor in enumerate(tensors_of(plan.spec))}

    def seed(self, component: int) -> ShareSeed:
        return self._seeds[component]

    def pieces(self, name: str) -> Iterator[tuple[int, Words]]:
        """The explicit component of a tensor, piece by piece, each with the index of its first element."""
        index, tensor = self._places[name]
        weights = self._plan.encoded(name, self._scale_bits).reshape(-1)
        for first in range(0, weights.size, PIECE):
            piece = weights[first : first + PIECE].copy()
            mask = np.empty_like(piece)
            for component in range(COMPONENTS):
                if component != tensor.explicit:
                    with self._seeds[component].reveal_to_kernel() as key:
                        kernels.prg(key, index, mask, first * tensor.word // kernels.BLOCK_BYTES)
                    piece -= mask
            yield first, piece

    def manifest(self, title: str, parties: Sequence[str], watch: Watch | None = None) -> Manifest:
        """Make every explicit component once and hash it."""
        total, done = self._plan.parameters(), 0
        tensors = []
        for name, (index, tensor) in self._places.items():
            whole = component_hash(tensor.explicit, index, self._seeds[tensor.explicit])
            for _first, piece in self.pieces(name):
                whole.update(piece.astype(tensor.dtype, copy=False).data)
                done += piece.size
                if watch is not None:
                    watch(Advance("hashing", done, total))
            tensors.append(replace(tensor, sha256=whole.hexdigest()))
        seeds = [seed_commitment(component, seed) for component, seed in enumerate(self._seeds)]
        return Manifest(
            title,
            self._plan.spec,
            self._scale_bits,
            (parties[0], parties[1], parties[2]),
            (seeds[0], seeds[1], seeds[2]),
            tuple(tensors),
        )


async def provision(
    connections: Sequence[Connection], sharing: Sharing, manifest: Manifest, watch: Watch | None = None
) -> str:
    """Send each party its two seeds and its explicit components, and have all three accept; returns the
    model's digest.

    What a party already has is not sent again. If anything fails, nothing is accepted there; run it again.
    """
    with plain_errors():
        public = manifest.public()
        async with trio.open_nursery() as nursery:
            for party, each in enumerate(connections):
                seeds = _seeds_of(sharing, party)
                nursery.start_soon(each.send, {"t": "put_model", "manifest": public, "seeds": seeds})
        answers = await gather(connections, lambda each: each.receive("have"))
        have = [
            _checked(manifest, party, answer, each)
            for party, (answer, each) in enumerate(zip(answers, connections, strict=True))
        ]
        async with trio.open_nursery() as nursery:
            queues = []
            for connection in connections:
                send, receive = trio.open_memory_channel[dict[str, Any]](QUEUE)
                nursery.start_soon(_forward, connection, receive)
                queues.append(send)
            await _send_pieces(sharing, manifest, have, queues, watch)
            for queue in queues:
                await queue.aclose()
        await gather(connections, lambda each: each.send({"t": "commit"}))
        for connection, answer in zip(
            connections, await gather(connections, lambda each: each.receive("committed")), strict=True
        ):
            if answer["model"] != manifest.digest():
                raise ClientError(f"party {connection.party.name} accepted another model than was sent")
    return manifest.digest()


def _seeds_of(sharing: Sharing, party: int) -> list[bytes]:
    """For a message, which takes `bytes`: these copies cannot be wiped."""
    found = []
    for number in (0, 1):
        with sharing.seed((party + number) % COMPONENTS).reveal_to_kernel() as view:
            found.append(bytes(view))
    return found


async def _send_pieces(
    sharing: Sharing,
    manifest: Manifest,
    have: Sequence[dict[str, int]],
    queues: Sequence[trio.MemorySendChannel[dict[str, Any]]],
    watch: Watch | None,
) -> None:
    total, done = sum(tensor.elements for tensor in manifest.tensors), 0
    for tensor in manifest.tensors:
        holders = [party for party in range(COMPONENTS) if holds(party, tensor.explicit)]
        if all(have[party][tensor.name] == tensor.nbytes for party in holders):
            done += tensor.elements
            continue
        pieces = sharing.pieces(tensor.name)
        while (piece := await trio.to_thread.run_sync(next, pieces, None)) is not None:
            first, words = piece
            offset, data = first * tensor.word, words.astype(tensor.dtype, copy=False).tobytes()
            for party in holders:
                # A party may hold any number of bytes already: send from there.
                here = have[party][tensor.name]
                if offset + len(data) > here:
                    skip = max(0, here - offset)
                    await queues[party].send(
                        {"t": "chunk", "tensor": tensor.name, "offset": offset + skip, "data": data[skip:]}
                    )
            done += words.size
            if watch is not None:
                watch(Advance("sending", done, total))


async def _forward(connection: Connection, queue: trio.MemoryReceiveChannel[dict[str, Any]]) -> None:
    # Not closed here on an error: the nursery's cancellation reaches the other end of the queue.
    async for message in queue:
        await connection.send(message)


def _checked(
    manifest: Manifest, party: int, answer: dict[str, Any], connection: Connection
) -> dict[str, int]:
    """What a party says it has, if that is possible at all."""
    sizes: dict[str, int] = answer["tensors"]
    wanted = {name: tensor.nbytes for name, tensor in manifest.held(party).items()}
    if sizes.keys() != wanted.keys() or any(sizes[name] > wanted[name] for name in wanted):
        raise ClientError(
            f"party {connection.party.name} claims to hold parts of a model that was never sent"
        )
    return sizes


class Seeds:
    """The three seeds of a sharing, kept in a file until the sharing is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resumed = False

    def take(self) -> ShareSeeds:
        """The seeds in the file, or fresh ones that are in it from now on."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return self._read()
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written: {error.strerror}; choose another --state"
            ) from None
        seeds = ShareSeed.random(), ShareSeed.random(), ShareSeed.random()
        try:
            os.fchmod(handle, 0o600)
            for seed in seeds:
                with seed.reveal_to_kernel() as view:
                    os.write(handle, view)
            os.fsync(handle)
        finally:
            os.close(handle)
        return seeds

    def forget(self) -> None:
        """Delete the file, overwritten first as far as the file system allows."""
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.write(bytes(SEED_FILE_BYTES))
                os.fsync(file.fileno())
            self.path.unlink()
        except FileNotFoundError:
            pass

    def _read(self) -> ShareSeeds:
        with open(self.path, "rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            if facts.st_mode & 0o077 or facts.st_uid != os.geteuid():
                raise BadInput(
                    f"{self.path}: others may read these seeds; delete the file and provision afresh"
                )
            raw = bytearray(SEED_FILE_BYTES)
            if facts.st_size != SEED_FILE_BYTES or file.readinto(raw) != SEED_FILE_BYTES:
                # The process died while writing it, before anything was sent.
                self.path.unlink()
                return self.take()
        parts = [raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)]
        raw[:] = bytes(len(raw))
        self.resumed = True
        return ShareSeed(parts[0]), ShareSeed(parts[1]), ShareSeed(parts[2])


def seed_name(plan: Plan, scale_bits: int, parties: Sequence[str]) -> str:
    """By which the seeds of an upload that was cut off are found again: a hash over all that is shared.

    Other words under the same seeds would show two parties the difference, so the name covers every weight
    and how it is encoded, which may change from one version of this program to the next.
    """
    digest = hashlib.sha256(f"mimir seeds 3 {FORMAT} {scale_bits} {' '.join(parties)}\0".encode())
    for name in plan.names():
        encoding = f"{name} {plan.scale(name, scale_bits)} {plan.word_bytes(name)}\0"
        digest.update(encoding.encode())
        digest.update(plan.tensor(name).reshape(-1).data)
    return digest.hexdigest()[:32]
