"""`PrefixCache.match` against the definition of the longest usable beginning."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tgi_cli.engine.block_pool import BlockPool
from tgi_cli.engine.block_table import BlockTable, KVGroupLayout
from tgi_cli.engine.messages import Request
from tgi_cli.engine.prefix_cache import PrefixCache, block_digest, root_digest
from tgi_cli.engine.sequence import Sequence
from tgi_cli.engine.step import NULL_BLOCK
from tgi_cli.sampling import SamplingParams

BLOCK_SIZE = 3
MOST = 8  # blocks of the prompt


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    num_tokens=st.integers(1, MOST * BLOCK_SIZE),
    cached=st.lists(
        st.tuples(
            st.sampled_from([None, None, 1, 3, 4, 7]),
            st.sets(st.integers(0, MOST - 1)),
            st.integers(0, MOST),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_match_is_the_longest_usable_beginning(
    num_tokens: int, cached: list[tuple[int | None, set[int], int]]
) -> None:
    request = Request(id="r", prompt_ids=[*range(num_tokens)], sampling=SamplingParams())
    digests = [root_digest(request)]
    for index in range(MOST):
        tokens = [*range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)]
        digests.append(block_digest(digests[-1], tokens))
    tables, known = [], []
    for window, holes, first in cached:
        layout = KVGroupLayout(window=window, num_blocks=MOST + 1)
        pool = BlockPool(layout.num_blocks)
        has = {index for index in range(MOST) if index not in holes or index < first}
        block_ids = dict(zip(sorted(has), pool.allocate(len(has)), strict=True))
        for index, block_id in block_ids.items():
            pool.publish(block_id, digests[index + 1])
        tables.append(BlockTable(pool, layout, BLOCK_SIZE))
        known.append(block_ids)
    sequence = Sequence(request, tables, order=0, max_len=100, queued_at=0.0)

    def seen(window: int | None, length: int) -> set[int]:
        """Blocks before `length` that queries from there on read."""
        start = 0 if window is None else max(0, length - window + 1)
        return {position // BLOCK_SIZE for position in range(start, length)}

    length = max(
        count
        for count in range((num_tokens - 1) // BLOCK_SIZE + 1)
        if all(
            seen(table.layout.window, count * BLOCK_SIZE) <= set(block_ids)
            for table, block_ids in zip(tables, known, strict=True)
        )
    )
    hits = PrefixCache(BLOCK_SIZE).match(sequence)
    for table, block_ids, hit in zip(tables, known, hits, strict=True):
        wanted = seen(table.layout.window, length * BLOCK_SIZE)
        assert hit == [block_ids[i] if i in wanted else NULL_BLOCK for i in range(length)]
