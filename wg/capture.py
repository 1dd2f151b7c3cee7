"""A sniffer that says what crosses a network: WireGuard datagrams, or something else.

For tests: it shows that between the parties nothing but WireGuard passes. It sees every interface of the
namespace it runs in (raw packet socket, so root), classifies each packet by its bytes alone, and keeps the
first packets that are not WireGuard so that a failure explains itself.

    python -m wg.capture SECONDS [ADDRESS ...]      counts as JSON; only packets between the addresses given

Classes: `wireguard` (UDP whose payload begins as one of its four message types and has that type's size),
`unreachable` (ICMP that reports such a datagram undelivered, and quotes it), `neighbour` (ARP, ICMPv6
discovery, IGMP), `fragment`, `tcp`, `udp`, `icmp`, `other`.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from wg.device import MTU

ETH_P_ALL = 0x0003
ETH_P_IP, ETH_P_IPV6, ETH_P_ARP = 0x0800, 0x86DD, 0x0806
SOL_PACKET, PACKET_VNET_HDR = 263, 15
VNET_HEADER = 10
GSO_UDP_L4 = 5
#: What may cross between parties: beside WireGuard only what any two machines need to find each other.
HARMLESS = frozenset({"wireguard", "unreachable", "neighbour"})
#: How many foreign packets to keep, and how much of each.
SAMPLES, SAMPLE_BYTES = 8, 96
#: Sizes by message type: initiation, response, cookie are fixed; data is a header and a tag, 32 bytes, around
#: blocks of 16 - or around a packet of the tunnel's full MTU, where there is no room for padding.
MESSAGE_SIZES = {1: 148, 2: 92, 3: 64}
DATA_LEAST, DATA_BLOCK = 32, 16
DATA_FULL = 32 + MTU


def is_wireguard(payload: bytes | memoryview) -> bool:
    """Whether a UDP payload has the outer form of a WireGuard message."""
    if len(payload) < DATA_LEAST or payload[1] or payload[2] or payload[3]:
        return False
    if payload[0] == 4:
        return len(payload) % DATA_BLOCK == 0 or len(payload) == DATA_FULL
    return MESSAGE_SIZES.get(payload[0]) == len(payload)


@dataclass(frozen=True)
class Packet:
    """One classified packet; ports are 0 where there are none."""

    kind: str
    source: str = ""
    target: str = ""
    source_port: int = 0
    target_port: int = 0


def classify(frame: bytes | memoryview, segment: int = 0) -> Packet:
    """Classify an Ethernet frame. `segment` is the size of the UDP segments if it carries several, else 0."""
    frame = memoryview(frame)
    if len(frame) < 14:
        return Packet("other")
    (kind,) = struct.unpack_from("!H", frame, 12)
    body = frame[14:]
    if kind == ETH_P_ARP:
        return Packet("neighbour")
    if kind == ETH_P_IP and len(body) >= 20:
        header = (body[0] & 15) * 4
        protocol = body[9]
        source, target = (str(ipaddress.IPv4Address(bytes(body[at : at + 4]))) for at in (12, 16))
        if struct.unpack_from("!H", body, 6)[0] & 0x1FFF:
            return Packet("fragment", source, target)
        body = body[header:]
    elif kind == ETH_P_IPV6 and len(body) >= 40:
        protocol = body[6]
        source, target = (str(ipaddress.IPv6Address(bytes(body[at : at + 16]))) for at in (8, 24))
        body = body[40:]
        if (
            protocol == socket.IPPROTO_ICMPV6 or protocol == 0
        ):  # discovery, and group reports behind an option
            return Packet("neighbour", source, target)
    else:
        return Packet("other")
    if protocol == socket.IPPROTO_IGMP:  # the bridge's own
        return Packet("neighbour", source, target)
    if protocol == socket.IPPROTO_ICMP:
        return Packet("unreachable" if _quotes_wireguard(body) else "icmp", source, target)
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP) or len(body) < 8:
        return Packet("other", source, target)
    ports = struct.unpack_from("!HH", body)
    if protocol == socket.IPPROTO_TCP:
        return Packet("tcp", source, target, *ports)
    (length,) = struct.unpack_from("!H", body, 4)
    # A segmented super-packet has its length in the header of its kind; trailing Ethernet padding is cut off.
    payload = body[8:] if segment else body[8:length]
    pieces = [payload[at : at + segment] for at in range(0, len(payload), segment)] if segment else [payload]
    good = bool(pieces) and all(is_wireguard(piece) for piece in pieces)
    return Packet("wireguard" if good else "udp", source, target, *ports)


def _quotes_wireguard(message: memoryview) -> bool:
    """Whether an ICMP message is "destination unreachable" about a WireGuard datagram (maybe cut short)."""
    quoted = message[8:]
    if len(quoted) < 20 or message[0] != 3 or quoted[9] != socket.IPPROTO_UDP:
        return False
    start = bytes(quoted[(quoted[0] & 15) * 4 + 8 :][:4])
    return len(start) == 4 and start[0] in (1, 2, 3, 4) and not any(start[1:])


@dataclass
class Tally:
    """What has been seen: packets and bytes per class and pair of addresses, and samples of foreign ones."""

    only: Container[str] | None = None
    packets: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    size: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    foreign: list[tuple[Packet, bytes]] = field(default_factory=list)

    def add(self, frame: bytes | memoryview, segment: int = 0) -> None:
        packet = classify(frame, segment)
        if self.only is not None and not (packet.source in self.only and packet.target in self.only):
            return
        key = (packet.kind, packet.source, packet.target)
        self.packets[key] += 1
        self.size[key] += len(frame)
        if packet.kind not in HARMLESS and len(self.foreign) < SAMPLES:
            self.foreign.append((packet, bytes(frame[:SAMPLE_BYTES])))

    def kinds(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for (kind, _, _), number in self.packets.items():
            found[kind] += number
        return dict(found)

    def as_dict(self) -> dict[str, object]:
        return {
            "kinds": self.kinds(),
            "flows": [
                {"kind": kind, "from": source, "to": target, "packets": number, "bytes": self.size[key]}
                for key, number in sorted(self.packets.items())
                for kind, source, target in [key]
            ],
            "foreign": [{**vars(packet), "bytes": sample.hex()} for packet, sample in self.foreign],
        }


def open_capture() -> socket.socket:
    """A raw socket on all interfaces of this namespace, with room for bursts. Needs CAP_NET_RAW."""
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sniffer.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)  # tells the segment size of super-packets
    sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    return sniffer


def capture(sniffer: socket.socket, seconds: float, only: Container[str] | None = None) -> Tally:
    """Classify what passes for so long."""
    tally = Tally(only)
    buffer = bytearray(1 << 17)
    view = memoryview(buffer)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        sniffer.settimeout(left)
        try:
            size = sniffer.recv_into(buffer)
        except TimeoutError:
            break
        gso_type, segment = struct.unpack_from("=xBxxH", buffer)
        tally.add(view[VNET_HEADER:size], segment if gso_type & 0x7F == GSO_UDP_L4 else 0)
    return tally


def main(words: Sequence[str]) -> int:
    if not words:
        print(__doc__, file=sys.stderr)
        return 2
    with open_capture() as sniffer:
        print("ready", flush=True)
        print(json.dumps(capture(sniffer, float(words[0]), set(words[1:]) or None).as_dict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
