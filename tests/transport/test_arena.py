import os
import random

from hypothesis import given
from hypothesis import strategies as st

from repro.transport.arena import Arena


@given(st.lists(st.integers(1, 60_000), max_size=60), st.integers(0, 1 << 30))
def test_blocks_never_overlap_and_everything_comes_back(sizes: list[int], seed: int) -> None:
    arena = Arena(1 << 20, retain_bytes=1 << 19)
    rng = random.Random(seed)
    held = []
    for size in sizes:
        if held and rng.random() < 0.4:
            arena.free(held.pop(rng.randrange(len(held))))
        block = arena.allocate(size)
        if block is not None:
            assert all(
                block.offset >= b.offset + b.size_bytes or b.offset >= block.offset + block.size_bytes for b in held
            )
            held.append(block)
        assert arena.used_bytes == sum(b.size_bytes for b in held)
    for block in held:
        arena.free(block)
    whole = arena.allocate(1 << 20)
    assert whole is not None
    assert arena.used_bytes == 1 << 20
    arena.close()


def test_a_full_arena_refuses_and_an_exact_fit_is_accepted() -> None:
    arena = Arena(8192, retain_bytes=8192)
    first, second = arena.allocate(4096), arena.allocate(1)
    assert first is not None
    assert second is not None
    assert arena.allocate(1) is None
    arena.free(first)
    assert arena.allocate(4097) is None
    assert arena.allocate(4096) == first
    arena.close()


def test_memory_used_once_is_used_first_and_a_burst_goes_back_to_the_kernel() -> None:
    arena = Arena(64 << 20, retain_bytes=1 << 20, prefault_bytes=1 << 20)
    burst = arena.allocate(32 << 20)
    assert burst is not None
    arena.view(burst, 32 << 20)[:] = bytes(32 << 20)
    assert os.fstat(arena.fd).st_blocks * 512 >= 32 << 20
    arena.free(burst)
    assert os.fstat(arena.fd).st_blocks * 512 <= 1 << 20
    assert bytes(arena.kept[-4:]) == bytes(4)
    arena.kept[-4:] = b"kept"
    straddling = arena.allocate(2 << 20)
    assert straddling is not None
    arena.free(straddling)  # what is kept may be page-locked: its pages must not change under a device
    assert bytes(arena.kept[-4:]) == b"kept"
    assert len(arena.kept) == 1 << 20
    again = arena.allocate(4096)
    assert again is not None
    assert again.offset == 0
    arena.close()
