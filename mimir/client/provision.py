"""The owner's side of sharing a model: every weight w becomes c0 + c1 + c2, and party i gets c_i and c_{i+1}.

c0 and c1 are key streams of two random seeds, c2 is w - c0 - c1 modulo 2^64, so any two components are
uniformly random whatever the weights. All three are made piece by piece, twice: once to hash them for the
manifest, once to send them. Never more than one tensor of weights and a few pieces are in memory.

The seeds wait in an owner-only file until the parties have everything, so that an upload that was cut off
goes on where it stopped; then the file is deleted. Whoever has it and one party's shares has the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from mimir import kernels
from mimir.client.connection import Connection, plain_errors
from mimir.client.session import gather
from mimir.errors import BadInput, ClientError
from mimir.manifest import COMPONENTS, WORD_BYTES, Manifest, Tensor
from mimir.model.checkpoint import Plan, encode
from mimir.net.messages import MAX_CHUNK
from mimir.secret import ShareSeed

Words = npt.NDArray[np.uint64]

PIECE = MAX_CHUNK // WORD_BYTES  # elements; a multiple of a key-stream block
BLOCK = 64 // WORD_BYTES  # elements of one key-stream block
SIDES = ("a", "b")
QUEUE = 4  # pieces waiting for a slow party before all wait for it
SEED_FILE_BYTES = 2 * 32


@dataclass(frozen=True)
class Advance:
    """How far the work is, in weights."""

    phase: str  # "hashing" or "sending"
    done: int
    total: int


Watch = Callable[[Advance], None]


class Sharing:
    """One sharing of one model: deterministic given the seeds, so it can be made twice."""

    def __init__(self, plan: Plan, scale_bits: int, seeds: tuple[ShareSeed, ShareSeed]) -> None:
        self._plan = plan
        self._scale_bits = scale_bits
        self._seeds = seeds
        self._streams = {name: index for index, name in enumerate(plan.names())}

    def pieces(self, name: str) -> Iterator[tuple[int, tuple[Words, Words, Words]]]:
        """The three components of a tensor, piece by piece, each with the index of its first element."""
        weights = encode(
            self._plan.tensor(name), self._scale_bits, f"{self._plan.directory}: {name}"
        ).reshape(-1)
        for first in range(0, weights.size, PIECE):
            piece = weights[first : first + PIECE]
            masks = []
            for seed in self._seeds:
                mask = np.empty(piece.size, np.uint64)
                with seed.reveal_to_kernel() as key:
                    kernels.prg(key, self._streams[name], mask, first // BLOCK)
                masks.append(mask)
            yield first, (masks[0], masks[1], piece - masks[0] - masks[1])

    def manifest(self, title: str, parties: Sequence[str], watch: Watch | None = None) -> Manifest:
        """Make every component once and hash it."""
        total, done = self._plan.parameters(), 0
        tensors = []
        for name, shape in self._plan.shapes().items():
            digests = [hashlib.sha256() for _ in range(COMPONENTS)]
            for _first, components in self.pieces(name):
                for digest, component in zip(digests, components, strict=True):
                    digest.update(component.astype("<u8", copy=False).data)
                done += components[0].size
                if watch is not None:
                    watch(Advance("hashing", done, total))
            hashes = [digest.hexdigest() for digest in digests]
            tensors.append(Tensor(name, shape, (hashes[0], hashes[1], hashes[2])))
        keys = (parties[0], parties[1], parties[2])
        return Manifest(title, self._plan.spec, self._scale_bits, keys, tuple(tensors))


async def provision(
    connections: Sequence[Connection], sharing: Sharing, manifest: Manifest, watch: Watch | None = None
) -> str:
    """Send each party its two components and have all three accept; returns the model's digest.

    What a party already has is not sent again. If anything fails, nothing is accepted there; run it again.
    """
    with plain_errors():
        public = manifest.public()
        await gather(connections, lambda each: each.send({"t": "put_model", "manifest": public}))
        answers = await gather(connections, lambda each: each.receive("have"))
        have = [_checked(manifest, answer, each) for answer, each in zip(answers, connections, strict=True)]
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


async def _send_pieces(
    sharing: Sharing,
    manifest: Manifest,
    have: Sequence[dict[str, list[int]]],
    queues: Sequence[trio.MemorySendChannel[dict[str, Any]]],
    watch: Watch | None,
) -> None:
    total, done = sum(tensor.elements for tensor in manifest.tensors), 0
    for tensor in manifest.tensors:
        if all(min(party[tensor.name]) == tensor.nbytes for party in have):
            done += tensor.elements
            continue
        pieces = sharing.pieces(tensor.name)
        while (piece := await trio.to_thread.run_sync(next, pieces, None)) is not None:
            first, components = piece
            for party, queue in enumerate(queues):
                for side in range(len(SIDES)):
                    # A party may hold any number of bytes already: send from there.
                    here = have[party][tensor.name][side]
                    offset, data = (
                        first * WORD_BYTES,
                        components[(party + side) % COMPONENTS].astype("<u8").tobytes(),
                    )
                    if offset + len(data) > here:
                        skip = max(0, here - offset)
                        await queue.send(
                            {
                                "t": "chunk",
                                "tensor": tensor.name,
                                "side": SIDES[side],
                                "offset": offset + skip,
                                "data": data[skip:],
                            }
                        )
            done += components[0].size
            if watch is not None:
                watch(Advance("sending", done, total))


async def _forward(connection: Connection, queue: trio.MemoryReceiveChannel[dict[str, Any]]) -> None:
    # Not closed here on an error: the nursery's cancellation reaches the other end of the queue.
    async for message in queue:
        await connection.send(message)


def _checked(manifest: Manifest, answer: dict[str, Any], connection: Connection) -> dict[str, list[int]]:
    """What a party says it has, if that is possible at all."""
    sizes: dict[str, list[int]] = answer["tensors"]
    wanted = {tensor.name: tensor.nbytes for tensor in manifest.tensors}
    if sizes.keys() != wanted.keys() or any(max(sizes[name]) > wanted[name] for name in wanted):
        raise ClientError(
            f"party {connection.party.name} claims to hold parts of a model that was never sent"
        )
    return sizes


class Seeds:
    """The two seeds of a sharing, kept in a file until the sharing is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resumed = False

    def take(self) -> tuple[ShareSeed, ShareSeed]:
        """The seeds in the file, or fresh ones that are in it from now on."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return self._read()
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written: {error.strerror}; choose another --state"
            ) from None
        seeds = ShareSeed.random(), ShareSeed.random()
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

    def _read(self) -> tuple[ShareSeed, ShareSeed]:
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
        half = SEED_FILE_BYTES // 2
        seeds = ShareSeed(raw[:half]), ShareSeed(raw[half:])
        raw[:] = bytes(len(raw))
        self.resumed = True
        return seeds


def seed_name(plan: Plan, scale_bits: int, parties: Sequence[str]) -> str:
    """By which the seeds of an upload that was cut off are found again: a hash over all that is shared.

    Other weights under the same seeds would show two parties the difference, so the name covers every weight.
    """
    digest = hashlib.sha256(f"mimir seeds {scale_bits} {' '.join(parties)}\0".encode())
    for name in plan.names():
        digest.update(name.encode() + b"\0")
        digest.update(plan.tensor(name).reshape(-1).data)
    return digest.hexdigest()[:32]
