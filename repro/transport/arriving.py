"""One piece while it arrives: which blocks are here, and the digest of each.

A piece is cut into the blocks of its checksum, which come over several connections in any order. Whichever thread
brings a block computes its digest while it is warm: reading all of it again at the end would cost a third of the whole
reception. A piece is sealed when every block is here and nobody writes into it any more. What a connection brought stays
even where another one, broken off, wrote to the same place: the sender knows of no reason to send it again. Such blocks
are digested anew from memory when the piece is sealed. The caller's lock is held in every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repro.kvcache.frames import CHECKSUM_BLOCK_BYTES, FrameError, FrameHeader, Piece, block_digests, checksum_of_blocks
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
        self, header: FrameHeader, raw_header: bytes, block: Block, view: memoryview, first_byte_s: float
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
        self._blocks = max(1, -(-len(view) // CHECKSUM_BLOCK_BYTES))
        self.restart()

    def restart(self) -> None:
        """Forget all that has come."""
        self.sealed = False
        self._digests: list[bytes | None] = [None] * self._blocks
        self._opened: set[int] = set()
        self._contested: set[int] = set()  # more than one connection was to write these

    def blocks(self, offset: int, length: int) -> range | None:
        """The blocks that a segment covers, or None where it does not consist of whole blocks of this piece."""
        size, block, end = len(self._view), CHECKSUM_BLOCK_BYTES, offset + length
        if offset % block or end > size or (end % block and end != size) or (length == 0 and size > 0):
            return None
        return range(offset // block, max(offset // block + 1, -(-end // block)))

    def wants(self, blocks: range) -> bool:
        """Whether any of these blocks is still missing."""
        return not self.sealed and None in self._digests[blocks.start : blocks.stop]

    def open(self, blocks: range) -> memoryview:
        """Where a connection writes these blocks; it calls `put` afterwards."""
        self.users += 1
        self._contested |= self._opened.intersection(blocks)
        self._opened.update(blocks)
        return self._part(blocks)

    def put(self, blocks: range, digests: Sequence[bytes] | None) -> bool:
        """The blocks have been written, or not wholly (None). Returns whether this seals the piece."""
        self.users -= 1
        if digests is not None:
            self._digests[blocks.start : blocks.stop] = digests
        if not self.users and None not in self._digests:
            for at in self._contested:
                (self._digests[at],) = block_digests(self._part(range(at, at + 1)))
            self.sealed = True
        return self.sealed

    def _part(self, blocks: range) -> memoryview:
        return self._view[blocks.start * CHECKSUM_BLOCK_BYTES : blocks.stop * CHECKSUM_BLOCK_BYTES]

    def arrived(self) -> ArrivedPiece:
        """The sealed piece, with the checksum that it came with."""
        return ArrivedPiece(self.header, self._view, checksum_of_blocks(digest or b"" for digest in self._digests))
