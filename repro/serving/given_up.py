"""Which requests an instance that computes need not go on with."""

from __future__ import annotations

import threading


class GivenUp:
    """Requests that were given up, the latest few thousand; the thread that reads messages adds, the one that computes takes."""

    _KEPT = 4096

    def __init__(self) -> None:
        self._keys: dict[int, None] = {}
        self._lock = threading.Lock()

    def add(self, key: int) -> None:
        """Note that a request was given up."""
        with self._lock:
            self._keys[key] = None
            if len(self._keys) > self._KEPT:  # of requests that had left when they were given up
                del self._keys[next(iter(self._keys))]

    def take(self, key: int) -> bool:
        """Whether it was, once."""
        with self._lock:
            return self._keys.pop(key, self) is None
