from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.runtime.harness import make_request
from tgi_cli.engine.batch_builder import BatchBuilder
from tgi_cli.engine.rows import TokenHistory
from tgi_cli.engine.step import ScheduledRow

BLOCK = 4
ROWS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6
)


@given(ROWS, st.randoms(use_true_random=False))
def test_layout_equals_the_definition_written_out(shapes, random) -> None:
    """Each row: known tokens, how far behind it is, drafts; against loops over tokens."""
    history = TokenHistory(8, 64, 1000)
    builder = BatchBuilder(history, 2, BLOCK, torch.device("cpu"))
    rows = random.sample(range(8), len(shapes))
    scheduled, tables, known = [], {}, {}
    for row, (length, behind, num_drafts) in zip(rows, shapes, strict=True):
        ids = [random.randrange(1000) for _ in range(length)]
        history.add(row, make_request(ids[:1], request_id=str(row)), ids[1:])
        start = max(0, length - 1 - behind)
        sample = random.random() < 0.8
        drafts = [random.randrange(1000) for _ in range(num_drafts)] if sample else []
        count = length - start + len(drafts) if sample else max(1, length - start - 1)
        if not sample and start + count >= length:
            sample = True
        blocks = -(-(start + count) // BLOCK)
        table = [[random.randrange(1, 99) for _ in range(blocks)] for _ in range(2)]
        split = random.randrange(blocks + 1)
        builder.set_blocks(row, [ids[:split] for ids in table])
        builder.append_blocks(row, [ids[split:] for ids in table])
        history.propose(row, drafts)
        known[row], tables[row] = ids + drafts, table
        scheduled.append(
            ScheduledRow(row=row, start=start, num_tokens=count, sample=sample, draft_ids=drafts)
        )
    built = builder.build(scheduled)
    batch = built.batch
    at = 0
    logit_places = []
    for i, step in enumerate(scheduled):
        assert batch.query_start[i] == at
        assert batch.query_lens[i] == step.num_tokens
        assert batch.seq_lens[i] == batch.key_lens[i] == step.start + step.num_tokens
        for position in range(step.start, step.start + step.num_tokens):
            assert batch.input_ids[at] == known[step.row][position]
            assert batch.positions[at] == position
            for group in range(2):
                block = tables[step.row][group][position // BLOCK]
                assert batch.groups[group].slot_mapping[at] == block * BLOCK + position % BLOCK
            at += 1
        for group in range(2):
            table = tables[step.row][group]
            assert batch.groups[group].block_tables[i, : len(table)].tolist() == table
        if step.sample:
            logit_places += range(at - 1 - len(step.draft_ids), at)
    assert batch.query_start[-1] == at == len(batch.input_ids)
    assert batch.logit_rows.tolist() == logit_places
    expected = [
        (step.row, len(known[step.row]) - len(step.draft_ids) + j)
        for step in scheduled
        if step.sample
        for j in range(len(step.draft_ids) + 1)
    ]
    rows_and_lens = zip(built.logit_rows.rows, built.logit_rows.history_lens, strict=True)
    assert [(int(row), int(length)) for row, length in rows_and_lens] == expected
    assert np.array_equal(built.logit_rows.output_positions, [length - 1 for _, length in expected])


def test_a_new_sequence_in_an_old_row_sees_nothing_of_it() -> None:
    history = TokenHistory(1, 64, 1000)
    builder = BatchBuilder(history, 1, BLOCK, torch.device("cpu"))
    for ids, blocks in (([1] * 9, [7, 8, 9]), ([2, 3], [5])):
        history.add(0, make_request(ids), ())
        builder.set_blocks(0, [blocks])
        row = ScheduledRow(row=0, start=0, num_tokens=len(ids), sample=True)
        batch = builder.build([row]).batch
        assert batch.groups[0].block_tables.tolist() == [blocks]
        assert batch.input_ids.tolist() == ids
        history.remove(0)
