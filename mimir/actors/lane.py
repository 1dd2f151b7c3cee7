"""A lane: one conversation of three parties, with keys of its own."""

from __future__ import annotations

import hashlib
import os
from typing import Final

import trio

from mimir.mpc.doors import Doors
from mimir.mpc.replicated import Replicated
from mimir.net import Transport
from mimir.secret import Secret

NONCE: Final = 32
END_SECONDS: Final = 2.0  # to tell the peers that a conversation has ended


async def open_lane(transport: Transport, session: bytes, lane: str, *, first: float, then: float) -> Doors:
    """Open a lane. Both ends of each link add a nonce to its keys, so no session id repeats a stream.

    Peers may come up to `first` seconds later; a round after that may take `then`. One round. If it fails the
    session is aborted.
    """
    me = transport.party
    channel = transport.channel(session, lane)
    channel.timeout = first
    nonce = os.urandom(NONCE)
    peers = transport.peers

    def key(peer: int) -> Secret:
        low, high = (nonce, bytes(heard[peer])) if me < peer else (bytes(heard[peer]), nonce)
        label = f"prf {lane} {hashlib.sha256(low + high).hexdigest()}"
        return transport.link_secret(peer, session, label)

    try:
        heard = await channel.round(f"{lane}/nonce", dict.fromkeys(peers, nonce), dict.fromkeys(peers, NONCE))
        channel.timeout = then
        return Doors(channel, Replicated(me, key((me - 1) % 3), key((me + 1) % 3)))
    except BaseException:  # the peers may have heard us and go on
        with trio.move_on_after(END_SECONDS, shield=True):
            await channel.abort()
            await channel.aclose()
        raise


async def close_lane(doors: Doors, *, abort: bool) -> None:
    """Wipe the keys of a lane and let go of it; `abort` tells the peers that the session has failed."""
    with trio.move_on_after(END_SECONDS, shield=True):
        doors.bk.wipe()
        if abort:
            await doors.channel.abort()
        await doors.channel.aclose()
