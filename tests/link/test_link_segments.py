import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from repro.link.segments import LARGEST_BYTES, carve, kept_runs, shape

SOURCE, SINK = bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2])
IP = 24


def ones_complement_sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def super_packet(payload: bytes, segment: int, protocol: int, sequence: int) -> bytearray:
    """What the kernel hands over: virtio header, Ethernet, IPv4, TCP with timestamps or UDP, a checksum of the pseudo-header only."""
    options = b"\x01\x01\x08\x0a" + bytes(8)
    header_bytes = 20 + len(options) if protocol == 6 else 8
    length = header_bytes + len(payload)
    partial = ones_complement_sum(SOURCE + SINK + struct.pack(">BBH", 0, protocol, length))
    if protocol == 6:
        offset = header_bytes // 4 << 4
        transport = struct.pack(">HHIIBBHHH", 5000, 6000, sequence, 9, offset, 0x99, 512, partial, 0) + options
    else:
        transport = struct.pack(">HHHH", 5000, 6000, length, partial)
    ip = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0xFFFE, 0x4000, 64, protocol, 0) + SOURCE + SINK)
    ip[10:12] = (0xFFFF - ones_complement_sum(bytes(ip))).to_bytes(2)
    gso_type = 1 if protocol == 6 else 5
    virtio = struct.pack("<BBHHHH", 1, gso_type, 54, segment, 34, 16 if protocol == 6 else 6)
    return bytearray(virtio + bytes(12) + b"\x08\x00" + bytes(ip) + transport + payload)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 20_000),
    st.integers(100, 1448),
    st.sampled_from([6, 17]),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 199), max_size=6),
    st.integers(1, 50),
)
def test_cutting_keeps_every_byte_that_was_not_lost_in_valid_packets(
    size: int, segment: int, protocol: int, sequence: int, losses: list[int], longest: int
) -> None:
    payload = bytes(i * 7 % 251 for i in range(size))
    packet = super_packet(payload, segment if size > segment else 0, protocol, sequence)
    of = shape(packet, len(packet))
    lost = sorted({index for index in losses if index < of.segments})
    if of.segments == 1:
        return
    header_bytes = of.headers_bytes - 20
    seen = bytearray(size)
    wire = 0
    for low, high in kept_runs(of.segments, lost, longest):
        into = bytearray(LARGEST_BYTES)
        length = carve(packet, of, low, high, into)
        piece = into[:length]
        ip, transport = piece[IP : IP + 20], piece[IP + 20 :]
        assert ones_complement_sum(bytes(ip)) == 0xFFFF
        assert int.from_bytes(ip[2:4]) == len(piece) - IP
        checksum_at = 16 if protocol == 6 else 6
        partial = ones_complement_sum(SOURCE + SINK + struct.pack(">BBH", 0, protocol, len(transport)))
        assert int.from_bytes(transport[checksum_at : checksum_at + 2]) % 0xFFFF == partial % 0xFFFF
        if protocol == 6:
            at = int.from_bytes(transport[4:8]) - sequence & 0xFFFFFFFF
            assert bool(transport[13] & 0x09) == (high == of.segments)
            assert bool(transport[13] & 0x80) == (low == 0)
        else:
            at = low * segment
            assert int.from_bytes(transport[4:6]) == len(transport)
        data = transport[header_bytes:]
        assert data == payload[at : at + len(data)]
        assert (piece[4] | piece[5] << 8) == (segment if len(data) > segment else 0)
        seen[at : at + len(data)] = b"\1" * len(data)
        assert high - low <= longest
        wire += of.wire_bytes(low, high)
    for index in range(of.segments):
        assert all(seen[index * segment : (index + 1) * segment]) == (index not in lost)
    assert wire == sum(seen) + (of.segments - len(lost)) * of.headers_bytes


def test_a_packet_that_needs_no_cutting_counts_as_one_segment() -> None:
    packet = super_packet(b"x" * 100, 0, 6, 1)
    assert shape(packet, len(packet)).segments == 1
    assert shape(packet, len(packet)).wire_bytes(0, 1) == 100 + 52


def test_runs_skip_what_is_lost_and_never_exceed_the_longest() -> None:
    assert kept_runs(10, [], 100) == [(0, 10)]
    assert kept_runs(10, [0, 4, 9], 100) == [(1, 4), (5, 9)]
    assert kept_runs(5, [2], 1) == [(0, 1), (1, 2), (3, 4), (4, 5)]
    assert kept_runs(2, [0, 1], 9) == []
