"""A write that was reserved on a connection which broke off may still come: its memory is lent to nobody until it cannot."""

from transport_rig import make_request

from repro.kvcache.frames import block_digests
from repro.transport.arena import Arena
from repro.transport.session import Claim, Failure, Session, Whole
from repro.transport.spec import ReceiverLimits
from repro.transport.wire import Envelope, Kind

SIZE = 10_000


class Scene:
    def __init__(self) -> None:
        self.arena = Arena(1 << 20, retain_bytes=1 << 20)
        self.whole: list[Whole] = []
        self.failures: list[Failure] = []
        self.session = Session(
            bytes(16),
            self.arena,
            ReceiverLimits(),
            lambda _session, whole: self.whole.append(whole),
            self.failures.append,
        )
        (self.piece,), self.manifest = make_request(7, [SIZE])

    def claim(self) -> Claim:
        claim = self.session.claim(Envelope(Kind.RESERVE, 0, 0, 0, SIZE), self.piece.header.pack())
        assert claim is not None
        return claim

    def write(self, claim: Claim) -> None:
        claim.view[:] = self.piece.payload
        self.session.filled(claim, block_digests(claim.view))


def test_the_memory_of_a_cancelled_request_waits_for_the_next_connection_of_its_slot() -> None:
    scene = Scene()
    generation = scene.session.opened(3)
    scene.session.broken_off(3, generation, [scene.claim()])
    scene.session.cancel(0)
    assert scene.arena.used_bytes > 0
    scene.session.opened(2)
    assert scene.arena.used_bytes > 0
    scene.session.opened(3)
    assert scene.arena.used_bytes == 0


def test_a_request_that_another_connection_completed_keeps_its_memory_beyond_release() -> None:
    scene = Scene()
    generation = scene.session.opened(0)
    scene.session.broken_off(0, generation, [scene.claim()])
    scene.write(scene.claim())
    scene.session.close_with(Envelope(Kind.MANIFEST, 0), scene.manifest.pack())
    scene.session.release(scene.whole[0])
    assert scene.arena.used_bytes > 0
    scene.session.opened(0)
    assert scene.arena.used_bytes == 0


def test_a_connection_that_was_replaced_already_leaves_nothing_behind() -> None:
    scene = Scene()
    generation = scene.session.opened(0)
    claim = scene.claim()
    scene.session.opened(0)
    scene.session.broken_off(0, generation, [claim])
    scene.session.cancel(0)
    assert scene.arena.used_bytes == 0


def test_a_sender_that_is_gone_for_good_leaves_nothing_behind() -> None:
    scene = Scene()
    scene.session.broken_off(0, scene.session.opened(0), [scene.claim()])
    scene.session.abandon("gone")
    assert scene.arena.used_bytes == 0
    assert [failure.request_id for failure in scene.failures] == [7]
