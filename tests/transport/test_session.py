import queue

from transport_rig import make_request

from repro.kvcache.frames import CHECKSUM_BLOCK_BYTES as BLOCK
from repro.kvcache.frames import Piece, block_digests
from repro.transport.arena import Arena
from repro.transport.session import Outbox, Session
from repro.transport.spec import ReceiverLimits
from repro.transport.wire import Envelope, Kind


def bring(session: Session, piece: Piece, offset: int, payload: memoryview) -> None:
    claim = session.claim(Envelope(Kind.SEGMENT, 0, 0, offset, len(payload)), piece.header.pack())
    assert claim is not None
    claim.view[:] = payload
    session.filled(claim, block_digests(claim.view))


def said(outbox: Outbox) -> list[Kind]:
    kinds = []
    while not outbox.empty():
        words = outbox.get()
        assert words is not None
        kinds.append(Envelope.unpack(words).kind)
    return kinds


def test_a_piece_that_came_altered_is_asked_for_again_by_the_next_control_connection_too() -> None:
    """What came late since then, on a connection that was given up, does not stand for what was asked for."""
    (piece,), _ = make_request(7, [2 * BLOCK])
    session = Session(
        bytes(16), Arena(1 << 20, retain_bytes=1 << 20), ReceiverLimits(), lambda *_: None, lambda _failure: None
    )
    first: Outbox = queue.SimpleQueue()
    session.speak_through(first)
    bring(session, piece, 0, memoryview(bytes(2 * BLOCK)))
    assert said(first) == [Kind.AGAIN]
    bring(session, piece, 0, piece.payload[:BLOCK])
    second: Outbox = queue.SimpleQueue()
    session.speak_through(second)
    assert said(second) == [Kind.AGAIN]
    bring(session, piece, BLOCK, piece.payload[BLOCK:])
    assert said(second) == [Kind.ACK]
