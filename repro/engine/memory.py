"""Keeps freed memory in the process, so that the same prefill takes the same time whatever the process did before.

glibc gives freed memory back by thresholds that it moves with what a process frees. The temporary tensors of one prefill may then be
fresh pages each time: a tiny hybrid faulted 97,000, 210,000 or no pages in over a prompt of 1,025 tokens, as the process had computed
longer or shorter ones before, and took up to three quarters longer. In a process with several threads each return also interrupts
the cores of the others. Engines of the field keep their memory, as PyTorch does on a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Final

#: The parameters of `mallopt`, with the greatest threshold that glibc takes for single mappings.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MMAP_BYTES: Final = 32 << 20
_KEPT_BYTES: Final = 1 << 30
_GROWN_BYTES: Final = 64 << 20


def keep_freed_memory() -> bool:
    """Let the allocator keep up to 1 GiB of what is freed and fix its thresholds; False where the C library cannot be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    asked = ((_MMAP_THRESHOLD, _MMAP_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_TOP_PAD, _GROWN_BYTES))
    told = [mallopt(parameter, value) for parameter, value in asked]
    return all(told)
