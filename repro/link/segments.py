"""Super-packets: how the kernel hands over 64 KB of TCP at once, and how to cut one into what the wire would have seen.

With PACKET_VNET_HDR every packet is preceded by a virtio header that says how it is to be segmented. Forwarding whole
super-packets is what lets Python carry 10 Gbps; but loss, a full queue and a slow wire act on segments, so a packet
is cut exactly where one of them does. Checksums stay partial (pseudo-header only), as the kernel left them; the
receiving kernel completes or trusts them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

#: virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
VNET_BYTES = 10
ETHERNET_BYTES = 14
_IP = VNET_BYTES + ETHERNET_BYTES
#: The largest IPv4 packet with both headers before it.
LARGEST_BYTES = _IP + 65535

_TCP, _UDP = 6, 17
_CWR, _PSH, _FIN = 0x80, 0x08, 0x01


@dataclass(frozen=True)
class Shape:
    """A packet on the wire: `segments` of `payload_bytes` (the last may be shorter), `headers_bytes` before each."""

    segments: int
    payload_bytes: int
    headers_bytes: int
    total_bytes: int

    def wire_bytes(self, low: int, high: int) -> int:
        """IP bytes of segments [low, high)."""
        payload = self.total_bytes - self.headers_bytes
        return min(payload, high * self.payload_bytes) - low * self.payload_bytes + (high - low) * self.headers_bytes


def shape(packet: bytearray, length: int) -> Shape:
    """The shape of the packet in `packet[:length]`, virtio header first."""
    size = packet[4] | packet[5] << 8
    total = length - _IP
    if size == 0:
        return Shape(1, total, 0, total)
    ip_header = (packet[_IP] & 15) * 4
    transport = _IP + ip_header
    headers = ip_header + (8 if packet[_IP + 9] == _UDP else (packet[transport + 12] >> 4) * 4)
    return Shape(-(-(total - headers) // size), size, headers, total)


def carve(packet: bytearray, of: Shape, low: int, high: int, into: bytearray) -> int:
    """Write segments [low, high) of a super-packet as a packet of its own; returns its length."""
    ip_header = (packet[_IP] & 15) * 4
    transport = _IP + ip_header
    headers_end = _IP + of.headers_bytes
    begin = headers_end + low * of.payload_bytes
    end = min(_IP + of.total_bytes, headers_end + high * of.payload_bytes)
    payload = end - begin
    into[:headers_end] = packet[:headers_end]
    into[headers_end : headers_end + payload] = packet[begin:end]
    if payload <= of.payload_bytes:
        into[1] = into[4] = into[5] = 0  # one segment: nothing left to cut

    old_length, new_length = of.total_bytes - ip_header, of.headers_bytes - ip_header + payload
    identification = (int.from_bytes(packet[_IP + 4 : _IP + 6]) + low) & 0xFFFF
    struct.pack_into(">HH", into, _IP + 2, ip_header + new_length, identification)
    struct.pack_into(">H", into, _IP + 10, 0)
    struct.pack_into(">H", into, _IP + 10, 0xFFFF - _fold(sum(struct.unpack_from(f">{ip_header // 2}H", into, _IP))))

    if packet[_IP + 9] == _UDP:
        struct.pack_into(">H", into, transport + 4, new_length)
        checksum_at = transport + 6
    else:
        sequence = int.from_bytes(packet[transport + 4 : transport + 8]) + low * of.payload_bytes
        struct.pack_into(">I", into, transport + 4, sequence & 0xFFFFFFFF)
        if high < of.segments:
            into[transport + 13] &= ~(_PSH | _FIN) & 0xFF
        if low > 0:
            into[transport + 13] &= ~_CWR & 0xFF
        checksum_at = transport + 16
    # The partial sum holds the pseudo-header, whose length has changed; one's complement subtracts by adding the
    # complement.
    partial = int.from_bytes(packet[checksum_at : checksum_at + 2]) + (0xFFFF - old_length & 0xFFFF) + new_length
    struct.pack_into(">H", into, checksum_at, _fold(partial))
    return headers_end + payload


def kept_runs(segments: int, lost: Sequence[int], longest: int) -> list[tuple[int, int]]:
    """The stretches [low, high) that remain of `segments` without the `lost` ones, none longer than `longest`."""
    runs = []
    low = 0
    for end in (*lost, segments):
        while low < end:
            high = min(end, low + longest)
            runs.append((low, high))
            low = high
        low = end + 1
    return runs


def _fold(value: int) -> int:
    value = (value & 0xFFFF) + (value >> 16)
    return (value & 0xFFFF) + (value >> 16)
