"""WireGuard tunnels for a small mesh, raised and watched by a Trio program.

The package stands alone: it imports nothing of `mimir`. Modules, lowest first:

    errors       what can go wrong, with exit codes
    keys         X25519 keys: make, write and read owner-only files; keys that live in memory alone
    uapi         the text protocol of a running wireguard-go, over its unix socket
    device       one WireGuard interface, in the kernel or as a supervised wireguard-go
    interface    a device with its key and peers: handshakes, health, revival
    probe        there and back: a bulk transfer, which finds a wrong MTU where ping does not, and pings
    exchange     the hybrid key exchange of a rotation: X25519 and ML-KEM-768
    rotation     how two nodes change their keys: messages and states, without I/O
    generations  rotation at work: interfaces, routes, clocks
    tunnel       `async with raise_tunnel(config) as tunnel:` - all of it for one node
    vsock        a relay of datagrams over streams, for WireGuard in an enclave without network
    relay        emulation of a wide-area link between two WireGuard endpoints (tests, benchmarks)
    capture      a sniffer that tells WireGuard datagrams from everything else (tests)
"""

from wg.errors import DeviceLost, HandshakeTimeout, KeyFileError, NotPossibleHere, TunnelError, WgError
from wg.generations import GenerationStatus
from wg.interface import PeerState, PeerStatus
from wg.keys import PresharedKey, PrivateKey, PublicKey, generate, load_private, save_private
from wg.tunnel import RotationPlan, Tunnel, TunnelConfig, TunnelPeer, raise_tunnel

__all__ = [
    "DeviceLost",
    "GenerationStatus",
    "HandshakeTimeout",
    "KeyFileError",
    "NotPossibleHere",
    "PeerState",
    "PeerStatus",
    "PresharedKey",
    "PrivateKey",
    "PublicKey",
    "RotationPlan",
    "Tunnel",
    "TunnelConfig",
    "TunnelError",
    "TunnelPeer",
    "WgError",
    "generate",
    "load_private",
    "raise_tunnel",
    "save_private",
]
