"""The blocks of one KV group: reference counts, the prefix index, and the order of eviction.

Knows ids and digests only, neither sequences nor tokens nor memory. A block is *used* (some table
holds it) or *free*; a free block may still be indexed by the digest of its contents, and is a hit
until it is handed out again.
"""

from __future__ import annotations

from collections import OrderedDict

from tgi_cli.engine.step import NULL_BLOCK


class BlockPool:
    """`num_blocks` blocks, of which id 0 (`NULL_BLOCK`) is never handed out."""

    __slots__ = ("_digests", "_free", "_index", "_references", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a KV group needs at least 2 blocks, one of them null: {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        # First to be evicted first; an ordered dict because a hit removes from the middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def capacity(self) -> int:
        """Blocks that sequences can hold at once."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one table."""
        return self.num_blocks - 1 - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks, longest unused first. The caller checks `num_free`."""
        free, digests, references = self._free, self._digests, self._references
        block_ids = []
        for _ in range(count):
            block_id, _ = free.popitem(last=False)
            digest = digests[block_id]
            if digest is not None:
                del self._index[digest]
                digests[block_id] = None
            references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, digest: bytes) -> int | None:
        """Return the block with these contents, used or free."""
        return self._index.get(digest)

    def is_free(self, block_id: int) -> bool:
        """Whether no table holds this block."""
        return self._references[block_id] == 0

    def share(self, block_id: int) -> None:
        """Add a reference to a block that `find` gave."""
        if self._references[block_id] == 0:
            del self._free[block_id]
        self._references[block_id] += 1

    def release(self, block_id: int) -> None:
        """Drop one reference. The last one frees the block, contents and index entry kept."""
        self._references[block_id] -= 1
        if self._references[block_id] == 0:
            self._free[block_id] = None
            if self._digests[block_id] is None:  # nothing to hit: reuse it before any cached block
                self._free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, digest: bytes) -> None:
        """Make a full block findable. The first block of equal contents stays the one found."""
        if digest not in self._index:
            self._index[digest] = block_id
            self._digests[block_id] = digest

    def retract(self, block_id: int) -> None:
        """Take back `publish`: the contents turned out to be bad."""
        digest = self._digests[block_id]
        if digest is not None:
            del self._index[digest]
            self._digests[block_id] = None
            if block_id in self._free:
                self._free.move_to_end(block_id, last=False)

    def published(self) -> dict[bytes, int]:
        """Copy of the index, for checks."""
        return dict(self._index)

    def check_integrity(self, references: dict[int, int]) -> None:
        """Compare with the references counted over all tables; `RuntimeError` names the block."""
        for block_id in range(self.num_blocks):
            count = self._references[block_id]
            if count != references.get(block_id, 0):
                raise RuntimeError(
                    f"block {block_id} counts {count} references,"
                    f" tables hold {references.get(block_id, 0)}"
                )
            if (block_id in self._free) != (count == 0 and block_id != NULL_BLOCK):
                raise RuntimeError(f"block {block_id} with {count} references is in the wrong list")
            digest = self._digests[block_id]
            if digest is not None and self._index.get(digest) != block_id:
                raise RuntimeError(f"block {block_id} is not where the index says")
        if len(self._index) != sum(digest is not None for digest in self._digests):
            raise RuntimeError("the prefix index holds entries that no block has")
