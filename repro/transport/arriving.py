"""One piece while it arrives: which cells are here, and its checksum, computed while they are warm.

A piece is cut into cells of equal size that come over several connections in any order. Reading them again from memory
at the end would cost a third of the whole reception, so whichever thread brings the next cell in line carries the
checksum on, past what others have brought meanwhile. A piece is sealed only when nobody writes into it any more. The
caller's lock is held in every method but `checksum`.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from repro.kvcache.frames import FrameError, FrameHeader, Piece
from repro.transport.arena import Block


@dataclass(frozen=True, slots=True)
class ArrivedPiece(Piece):
    """A piece whose checksum was computed on arrival."""

    computed: bytes

    def verify(self) -> None:
        """As `Piece.verify`, without reading the payload again."""
        if self.computed != self.header.checksum:
            raise FrameError(f"checksum of piece {self.header.piece}: does not match its payload")


class ArrivingPiece:
    """The books of one piece. `users` counts who reads or writes its memory, which must not be given back before."""

    def __init__(
        self,
        header: FrameHeader,
        raw_header: bytes,
        block: Block,
        view: memoryview,
        cell_bytes: int,
        first_byte_s: float,
    ) -> None:
        self.header = header
        self.raw_header = raw_header
        self.block = block
        self.first_byte_s = first_byte_s
        self.users = 0
        self.attempts = 0
        self.sealed = False
        self.acknowledged = False
        self._view = view
        self._cell_bytes = cell_bytes
        self._cells = max(1, -(-len(view) // cell_bytes))
        self.restart()

    def restart(self) -> None:
        """Forget all that has come."""
        self.sealed = False
        self._missing = set(range(self._cells))
        self._hasher = xxhash.xxh3_128()
        self._hashed = 0  # cells
        self._hashing = False
        self._stale = False

    @property
    def empty(self) -> bool:
        """Nothing has come, and nobody brings anything."""
        return len(self._missing) == self._cells and not self.users

    def cells(self, offset: int, length: int) -> range | None:
        """The cells that a segment covers, or None where it does not consist of whole cells of this piece."""
        size, cell, end = len(self._view), self._cell_bytes, offset + length
        if offset % cell or end > size or (end % cell and end != size) or (length == 0 and size > 0):
            return None
        return range(offset // cell, max(offset // cell + 1, -(-end // cell)))

    def wants(self, cells: range) -> bool:
        """Whether any of these cells is still missing."""
        return not self.sealed and not self._missing.isdisjoint(cells)

    def open(self, cells: range) -> memoryview:
        """Where a connection writes these cells; it calls `put` afterwards."""
        self.users += 1
        self._missing.update(cells)
        self._stale |= cells.start < self._hashed  # what was checksummed is about to be written again
        return self._view[cells.start * self._cell_bytes : cells.stop * self._cell_bytes]

    def put(self, cells: range, whole: bool) -> None:
        """The cells have been written, wholly or not."""
        self.users -= 1
        if whole:
            self._missing.difference_update(cells)

    def begin_checksum(self) -> bool:
        """Whether the caller shall call `next_span` and `checksum` in turn, until there is no span."""
        if self.sealed or self._hashing or not (self._span()[1] > self._hashed or self._complete()):
            return False
        self._hashing = True
        self.users += 1
        return True

    def next_span(self) -> tuple[int, int] | None:
        """The next cells in line for the checksum; None ends the caller's turn, and seals the piece if it is whole."""
        if self._stale:
            self._hasher, self._hashed, self._stale = xxhash.xxh3_128(), 0, False
        span = self._span()
        if span[1] > span[0]:
            self._hashed = span[1]
            return span
        self._hashing = False
        self.users -= 1
        self.sealed = self._complete()
        return None

    def checksum(self, span: tuple[int, int]) -> None:
        """Carry the checksum on over these cells."""
        self._hasher.update(self._view[span[0] * self._cell_bytes : span[1] * self._cell_bytes])

    def arrived(self) -> ArrivedPiece:
        """The sealed piece, with the checksum that it came with."""
        return ArrivedPiece(self.header, self._view, self._hasher.digest())

    def _span(self) -> tuple[int, int]:
        end = self._hashed
        while end < self._cells and end not in self._missing:
            end += 1
        return self._hashed, end

    def _complete(self) -> bool:
        return not self._missing and not self.users and self._hashed == self._cells and not self._stale
