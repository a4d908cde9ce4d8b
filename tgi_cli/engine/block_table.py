"""One sequence's blocks in one KV group, by absolute position.

Append-only: a block, once in the table, is never swapped for an equal one, so a runner follows by
appending. Blocks behind a window turn into `NULL_BLOCK` here alone; a runner need not be told,
since nothing there is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgi_cli.engine.block_pool import BlockPool
from tgi_cli.engine.step import NULL_BLOCK


@dataclass(frozen=True, slots=True)
class KVGroupLayout:
    """Layers that share block tables. `num_blocks` includes the null block.

    With `window` w, a query at position p sees the keys `p - w + 1 .. p`; None sees all.
    """

    window: int | None
    num_blocks: int

    def first_block(self, position: int, block_size: int) -> int:
        """First block that queries at `position` and later can see."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // block_size

    def peak_blocks(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """Most blocks held at once while reaching `num_tokens`, `chunk` tokens at a time."""
        blocks = -(-num_tokens // block_size)
        if self.window is None:
            return blocks
        span = self.window - 1 + chunk  # positions alive at once, at the worst alignment
        return min(blocks, 1 if span < 2 else (span - 2) // block_size + 2)


class BlockTable:
    """Blocks of one sequence in one group; holds one reference on each that is not null."""

    __slots__ = ("_block_size", "block_ids", "layout", "num_dropped", "pool")

    def __init__(self, pool: BlockPool, layout: KVGroupLayout, block_size: int) -> None:
        self.pool = pool
        self.layout = layout
        self.block_ids: list[int] = []
        self.num_dropped = 0  # leading entries that are null
        self._block_size = block_size

    @property
    def num_held(self) -> int:
        """Blocks with a reference from here."""
        return len(self.block_ids) - self.num_dropped

    def append(self, count: int) -> list[int]:
        """Add `count` fresh blocks and return their ids."""
        block_ids = self.pool.allocate(count)
        self.block_ids += block_ids
        return block_ids

    def adopt(self, block_ids: Sequence[int]) -> None:
        """Start an empty table with cached blocks, leading nulls where the window needs none."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                self.num_dropped += 1
            else:
                self.pool.share(block_id)
        self.block_ids += block_ids

    def drop_behind(self, position: int) -> None:
        """Release the blocks that no query at `position` or later can see."""
        end = min(self.layout.first_block(position, self._block_size), len(self.block_ids))
        for index in range(self.num_dropped, end):
            self.pool.release(self.block_ids[index])
            self.block_ids[index] = NULL_BLOCK
            self.num_dropped = index + 1

    def release(self) -> None:
        """Give everything back, last block first, so that a prefix outlives what follows it."""
        for index in range(len(self.block_ids) - 1, self.num_dropped - 1, -1):
            self.pool.release(self.block_ids[index])
        self.block_ids = []
        self.num_dropped = 0
