import random

from hypothesis import given
from hypothesis import strategies as st
from transport_rig import make_request

from repro.transport.arena import Block
from repro.transport.arriving import ArrivingPiece

CELL = 64


def settle(piece: ArrivingPiece) -> None:
    if piece.begin_checksum():
        while (span := piece.next_span()) is not None:
            piece.checksum(span)


@given(st.integers(0, 700), st.integers(0, 1 << 30))
def test_cells_in_any_order_broken_off_and_repeated_seal_once_with_the_right_checksum(size: int, seed: int) -> None:
    rng = random.Random(seed)
    (sent,), _ = make_request(1, [size], seed)
    memory = bytearray(size)
    piece = ArrivingPiece(sent.header, b"", Block(0, 4096), memoryview(memory), CELL, 0.0)
    count = max(1, -(-size // CELL))
    open_now: list[tuple[range, memoryview]] = []
    for _ in range(10_000):
        if piece.sealed:
            break
        if open_now and (rng.random() < 0.5 or len(open_now) > 4):
            cells, view = open_now.pop(rng.randrange(len(open_now)))
            whole = rng.random() < 0.8
            part = len(view) if whole else rng.randint(0, len(view))
            view[:part] = sent.payload[cells.start * CELL : cells.start * CELL + part]
            piece.put(cells, whole)
            settle(piece)
            continue
        first = rng.randrange(count)
        last = min(count, first + rng.randint(1, 3))
        cells_or_none = piece.cells(first * CELL, min(last * CELL, size) - first * CELL)
        assert cells_or_none == range(first, last)
        if piece.wants(cells_or_none):
            open_now.append((cells_or_none, piece.open(cells_or_none)))
    assert piece.sealed
    assert not open_now
    assert piece.users == 0
    assert memory == sent.payload
    piece.arrived().verify()
    assert not piece.wants(range(count))


def test_a_piece_is_not_sealed_while_anyone_may_still_write_into_it() -> None:
    (sent,), _ = make_request(1, [CELL])
    piece = ArrivingPiece(sent.header, b"", Block(0, 4096), memoryview(bytearray(CELL)), CELL, 0.0)
    slow, fast = piece.open(range(1)), piece.open(range(1))
    fast[:] = sent.payload
    piece.put(range(1), True)
    settle(piece)
    assert not piece.sealed
    slow[:10] = sent.payload[:10]
    piece.put(range(1), False)
    settle(piece)
    assert piece.sealed
    piece.arrived().verify()


def test_segments_that_are_not_whole_cells_are_no_cells() -> None:
    (sent,), _ = make_request(1, [100])
    piece = ArrivingPiece(sent.header, b"", Block(0, 4096), memoryview(bytearray(100)), CELL, 0.0)
    assert piece.cells(0, 100) == range(2)
    assert piece.cells(64, 36) == range(1, 2)
    for offset, length in ((0, 63), (1, 64), (64, 64), (128, 0), (0, 0)):
        assert piece.cells(offset, length) is None
