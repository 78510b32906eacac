import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport_rig import make_request

from repro.kvcache.frames import CHECKSUM_BLOCK_BYTES as BLOCK
from repro.kvcache.frames import FrameError, block_digests
from repro.transport.arena import Block
from repro.transport.arriving import ArrivingPiece


def arriving(size: int, seed: int = 0) -> tuple[ArrivingPiece, memoryview, bytearray]:
    """A piece before anything has come, its payload, and where that shall arrive."""
    (sent,), _ = make_request(1, [size], seed)
    memory = bytearray(size)
    return ArrivingPiece(sent.header, b"", Block(0, 4096), memoryview(memory), 0.0), sent.payload, memory


def bring(payload: memoryview, blocks: range, view: memoryview) -> list[bytes]:
    view[:] = payload[blocks.start * BLOCK : blocks.stop * BLOCK]
    return block_digests(view)


@given(st.integers(0, 8 * BLOCK), st.integers(0, 1 << 30))
def test_blocks_in_any_order_broken_off_and_repeated_seal_once_with_the_right_checksum(size: int, seed: int) -> None:
    rng = random.Random(seed)
    piece, payload, memory = arriving(size, seed)
    count = max(1, -(-size // BLOCK))
    open_now: list[tuple[range, memoryview]] = []
    for _ in range(10_000):
        if piece.sealed:
            break
        if open_now and (rng.random() < 0.5 or len(open_now) > 4):
            blocks, view = open_now.pop(rng.randrange(len(open_now)))
            piece.put(blocks, bring(payload, blocks, view) if rng.random() < 0.8 else None)
            continue
        first = rng.randrange(count)
        last = min(count, first + rng.randint(1, 3))
        wanted = piece.blocks(first * BLOCK, min(last * BLOCK, size) - first * BLOCK)
        assert wanted == range(first, last)
        if piece.wants(wanted):
            open_now.append((wanted, piece.open(wanted)))
    assert piece.sealed
    assert not open_now
    assert piece.users == 0
    assert memory == payload
    piece.arrived().verify()
    assert not piece.wants(range(count))


def test_a_piece_is_not_sealed_while_anyone_may_still_write_into_it() -> None:
    piece, payload, _ = arriving(BLOCK)
    slow, fast = piece.open(range(1)), piece.open(range(1))
    assert not piece.put(range(1), bring(payload, range(1), fast))
    assert piece.put(range(1), bring(payload, range(1), slow))
    piece.arrived().verify()


def test_what_one_connection_brought_stays_when_another_breaks_off_at_the_same_place() -> None:
    """After an outage, what a broken connection had claimed comes over another one, before the break is noticed here."""
    piece, payload, _ = arriving(3 * BLOCK)
    broken = piece.open(range(3))
    broken[: BLOCK + 9] = payload[: BLOCK + 9]
    again = piece.open(range(3))
    assert not piece.put(range(3), bring(payload, range(3), again))
    assert piece.put(range(3), None)
    piece.arrived().verify()


def test_a_late_segment_that_breaks_off_takes_nothing_away() -> None:
    piece, payload, _ = arriving(3 * BLOCK)
    piece.put(range(2), bring(payload, range(2), piece.open(range(2))))
    piece.open(range(3))
    piece.put(range(3), None)
    assert piece.put(range(2, 3), bring(payload, range(2, 3), piece.open(range(2, 3))))
    piece.arrived().verify()


def test_bytes_that_a_broken_connection_spoiled_do_not_pass_the_checksum() -> None:
    piece, payload, _ = arriving(BLOCK)
    slow, fast = piece.open(range(1)), piece.open(range(1))
    piece.put(range(1), bring(payload, range(1), fast))
    slow[:10] = bytes(10)
    assert piece.put(range(1), None)
    with pytest.raises(FrameError, match="checksum"):
        piece.arrived().verify()
    piece.restart()
    assert piece.put(range(1), bring(payload, range(1), piece.open(range(1))))
    piece.arrived().verify()


def test_of_two_connections_that_bring_different_bytes_at_once_the_bytes_in_memory_count() -> None:
    piece, payload, memory = arriving(BLOCK)
    first, second = piece.open(range(1)), piece.open(range(1))
    right = bring(payload, range(1), first)
    second[:] = bytes(BLOCK)
    piece.put(range(1), block_digests(second))
    assert piece.put(range(1), right)
    assert memory != payload
    assert piece.arrived().computed != piece.header.checksum


def test_segments_that_are_not_whole_blocks_are_refused() -> None:
    piece, _, _ = arriving(BLOCK + 36)
    assert piece.blocks(0, BLOCK + 36) == range(2)
    assert piece.blocks(BLOCK, 36) == range(1, 2)
    for offset, length in ((0, BLOCK - 1), (1, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 0), (0, 0)):
        assert piece.blocks(offset, length) is None
