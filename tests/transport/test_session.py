import queue

from transport_rig import make_request

from repro.kvcache.frames import CHECKSUM_BLOCK_BYTES as BLOCK
from repro.kvcache.frames import Piece, block_digests
from repro.transport.arena import Arena
from repro.transport.session import Outbox, Session
from repro.transport.spec import ReceiverLimits
from repro.transport.wire import ENVELOPE_BYTES, Envelope, Kind


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
        kinds += [Envelope.unpack(words[at : at + ENVELOPE_BYTES]).kind for at in range(0, len(words), ENVELOPE_BYTES)]
    return kinds


def test_answers_that_nobody_takes_are_bounded_and_said_to_the_next_control_connection() -> None:
    pieces, _ = make_request(7, [10] * 3000)
    session = Session(
        bytes(16), Arena(1 << 26, retain_bytes=1 << 20), ReceiverLimits(), lambda *_: None, lambda _failure: None
    )
    dead: Outbox = queue.SimpleQueue()
    session.speak_through(dead)
    for _ in range(4):  # the first time new, then repeated, which is answered as well
        for piece in pieces:
            envelope = Envelope(Kind.SEGMENT, 0, piece.header.piece, 0, 10)
            claim = session.claim(envelope, piece.header.pack())
            if claim is not None:
                claim.view[:] = piece.payload
                session.filled(claim, block_digests(claim.view))
    assert dead.qsize() <= 4097
    waiting = [dead.get() for _ in range(dead.qsize())]
    assert waiting[-1] is None, "its connection was not ended"
    alive: Outbox = queue.SimpleQueue()
    session.speak_through(alive)
    assert said(alive) == [Kind.ACK] * 3000


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
