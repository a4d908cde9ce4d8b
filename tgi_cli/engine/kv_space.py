"""The blocks of all KV groups together, as the scheduler asks for them: sequence by sequence.

Knows pools, tables and the prefix cache; neither the queue nor the budget. Every answer holds for
all groups at once: a sequence gets its blocks in each of them or in none.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from tgi_cli.engine.block_pool import BlockPool
from tgi_cli.engine.block_table import BlockTable, KVGroupLayout
from tgi_cli.engine.prefix_cache import PrefixCache
from tgi_cli.engine.sequence import Sequence
from tgi_cli.engine.step import NULL_BLOCK


class KVSpace:
    """Pools of all groups.

    Args:
        groups: the KV groups in the decoder's order.
        block_size: tokens per block, the same in every group.
        max_chunk: most positions of one sequence in a step.
        prefix_caching: whether equal beginnings share blocks.

    Attributes:
        capacity: tokens of the longest sequence that the empty pools hold.
        max_chunk: as given, or less where a window group's pool is small.
    """

    def __init__(
        self,
        groups: Items[KVGroupLayout],
        *,
        block_size: int,
        max_chunk: int,
        prefix_caching: bool,
    ) -> None:
        if not groups:
            raise ValueError("a scheduler needs at least one KV group")
        self._groups = tuple(groups)
        self._block_size = block_size
        self._pools = [BlockPool(group.num_blocks) for group in self._groups]
        self._cache = PrefixCache(block_size) if prefix_caching else None
        capacities = []
        for group, pool in zip(self._groups, self._pools, strict=True):
            # The longest chunk that fits beside its window: `peak_blocks` solved for `chunk`.
            chunk = (pool.capacity - 1) * block_size + 2 - (group.window or 0)
            if group.window is None or chunk < 1:
                capacities.append(pool.capacity * block_size)
            else:
                max_chunk = min(max_chunk, chunk)
        self.max_chunk = max_chunk
        self.capacity = min(capacities, default=2**31 - 1)

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can hold, over all groups."""
        return sum(pool.capacity for pool in self._pools)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold, over all groups."""
        return sum(pool.num_used for pool in self._pools)

    def tables(self) -> list[BlockTable]:
        """Empty tables for a new sequence, one per group."""
        return [
            BlockTable(pool, group, self._block_size)
            for pool, group in zip(self._pools, self._groups, strict=True)
        ]

    def grow(self, sequence: Sequence, count: int) -> tuple[list[int], ...] | None:
        """Get blocks for the next `count` positions: the new ids per group, None if short."""
        tables = sequence.tables
        for table in tables:
            if table.layout.window is not None:
                table.drop_behind(sequence.num_computed)
        end = sequence.num_computed + count
        missing = -(-end // self._block_size) - len(tables[0].block_ids)
        if missing <= 0:
            return ()
        for table in tables:
            if table.pool.num_free < missing:
                return None
        return tuple([table.append(missing) for table in tables])

    def enter(self, sequence: Sequence, limit: int, running: Iterable[Sequence]) -> int | None:
        """Give a sequence without blocks its cached beginning and room for a first chunk.

        Blocks for all its known tokens must be free, beyond what `running` will want soon:
        otherwise it would be let in only to be preempted. With nothing running it always fits, if
        it is within `capacity`. Returns the tokens of that chunk, at most `limit`, None if short.
        """
        hits = self._match(sequence)
        total, start = len(sequence.token_ids), len(hits[0]) * self._block_size
        chunk = min(total - start, limit)
        running = list(running)
        for group, table in enumerate(sequence.tables):
            held = [block_id for block_id in hits[group] if block_id != NULL_BLOCK]
            wanted = table.layout.peak_blocks(total, chunk, self._block_size)
            if table.layout.window is None:  # those that others hold already cost nothing
                wanted -= sum(not table.pool.is_free(block_id) for block_id in held)
            if table.pool.num_free < wanted + self._promised(group, running):
                return None
        for table, block_ids in zip(sequence.tables, hits, strict=True):
            table.adopt(block_ids)
        sequence.num_computed = start
        sequence.num_published = len(hits[0])
        if self.grow(sequence, chunk) is None:
            raise RuntimeError(f"the blocks counted for `{sequence.id}` are not there")
        return chunk

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Offer the full blocks among the first `num_tokens` positions to later steps."""
        if self._cache is not None and num_tokens // self._block_size > sequence.num_published:
            self._cache.publish(sequence, num_tokens)

    def retract(self, sequence: Sequence, start: int, running: Iterable[Sequence]) -> None:
        """Distrust what `sequence` wrote from position `start` on, and all computed from it.

        Marks the sequences among `running` that read it with `restart`.
        """
        bad: list[set[int]] = []
        for table in sequence.tables:
            block_ids = set(table.block_ids[start // self._block_size :]) - {NULL_BLOCK}
            for block_id in block_ids:
                table.pool.retract(block_id)
            bad.append(block_ids)
        running = list(running)
        for other in running:
            if other is sequence or other.restart:
                continue
            held = [
                index
                for table, block_ids in zip(other.tables, bad, strict=True)
                for index, block_id in enumerate(table.block_ids)
                if block_id in block_ids
            ]
            if held:
                other.restart = True
                self.retract(other, min(held) * self._block_size, running)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Compare the pools with the tables of `running`; `RuntimeError` names what is wrong."""
        running = list(running)
        for group, pool in enumerate(self._pools):
            references: dict[int, int] = {}
            for sequence in running:
                for block_id in sequence.tables[group].block_ids:
                    if block_id != NULL_BLOCK:
                        references[block_id] = references.get(block_id, 0) + 1
            pool.check_integrity(references)

    def _match(self, sequence: Sequence) -> list[list[int]]:
        """Cached blocks it starts with; none if all its prompt positions must be run."""
        if self._cache is None or sequence.wants_prompt_logprobs:
            return [[] for _ in self._groups]
        return self._cache.match(sequence)

    def _promised(self, group: int, running: Items[Sequence]) -> int:
        """Blocks that the running sequences will want: for known tokens, and one more each."""
        layout, size = self._groups[group], self._block_size
        promised = 0
        for sequence in running:
            total = len(sequence.token_ids) + size
            chunk = min(total - sequence.num_computed, self.max_chunk)
            wanted = layout.peak_blocks(total, chunk, size)
            promised += max(0, wanted - sequence.tables[group].num_held)
        return promised
