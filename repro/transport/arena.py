"""Receive and send buffers: one region of memory, faulted in beforehand and used again and again.

The first touch of a fresh page costs ten times the copy into it, so memory that was used once is used first (first fit
from the low end). The region is an anonymous file (`memfd`), so that a transport in a process of its own shares it with
the worker it serves, on the same side of the link, and nothing of it outlives them, SIGKILL included.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_left, insort
from dataclasses import dataclass

_PAGE = 4096
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_REMOVE = 9


@dataclass(frozen=True, slots=True)
class Block:
    """A range of an arena. `size_bytes` is what was asked for, rounded up to whole pages."""

    offset: int
    size_bytes: int


class Arena:
    """Blocks of a shared region of `capacity_bytes`, of which the kernel holds only what was ever used.

    Pages beyond `retain_bytes` go back to the kernel when they are freed, so a burst does not stay for ever.
    """

    def __init__(self, capacity_bytes: int, *, retain_bytes: int, prefault_bytes: int = 0, fd: int | None = None):
        self.capacity_bytes = -(-capacity_bytes // _PAGE) * _PAGE
        self.fd = os.memfd_create("kvcache-arena", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, self.capacity_bytes)
        self._map = mmap.mmap(self.fd, self.capacity_bytes)
        self._view = memoryview(self._map)
        self._retain_bytes = min(-(-retain_bytes // _PAGE) * _PAGE, self.capacity_bytes)
        self._free: list[tuple[int, int]] = [(0, self.capacity_bytes)]  # (offset, size), sorted, never adjacent
        self._used_bytes = 0
        self._lock = threading.Lock()
        if prefault_bytes:
            self._prefault(min(prefault_bytes, self.capacity_bytes))

    @property
    def used_bytes(self) -> int:
        """Bytes lent out now."""
        return self._used_bytes

    @property
    def whole(self) -> memoryview:
        """All of the region."""
        return self._view

    @property
    def kept(self) -> memoryview:
        """What never goes back to the kernel, is used first, and so may be page-locked: the first `retain_bytes`."""
        return self._view[: self._retain_bytes]

    def allocate(self, size_bytes: int) -> Block | None:
        """A block, or None where no gap is large enough."""
        size = max(1, -(-size_bytes // _PAGE)) * _PAGE
        with self._lock:
            for i, (offset, free) in enumerate(self._free):
                if free >= size:
                    if free == size:
                        del self._free[i]
                    else:
                        self._free[i] = (offset + size, free - size)
                    self._used_bytes += size
                    return Block(offset, size)
        return None

    def view(self, block: Block, size_bytes: int) -> memoryview:
        """The first `size_bytes` bytes of a block."""
        return self._view[block.offset : block.offset + size_bytes]

    def free(self, block: Block) -> None:
        """Give a block back. Its views must not be used any more."""
        beyond, end = max(block.offset, self._retain_bytes), block.offset + block.size_bytes
        if end > beyond:
            self._map.madvise(_MADV_REMOVE, beyond, end - beyond)
        with self._lock:
            self._used_bytes -= block.size_bytes
            at = bisect_left(self._free, (block.offset, 0))
            start, size = block.offset, block.size_bytes
            if at < len(self._free) and self._free[at][0] == start + size:
                size += self._free.pop(at)[1]
            if at > 0 and sum(self._free[at - 1]) == start:
                at -= 1
                start, before = self._free.pop(at)
                size += before
            insort(self._free, (start, size))

    def close(self) -> None:
        """Close the file. The memory goes when the last view of it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _prefault(self, size_bytes: int) -> None:
        size = -(-size_bytes // _PAGE) * _PAGE
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, 0, size)
        except OSError:  # an older kernel: touch each page
            for offset in range(0, size, _PAGE):
                self._map[offset] = 0
