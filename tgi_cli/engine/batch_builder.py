"""From scheduled rows to the tensors of a step: block tables by row, gathered afresh each step.

Everything per token is NumPy on whole arrays; Python loops run over rows only. On a CPU the batch
of a step that only decodes lies in arrays that the next one uses again: a forward pass must be over
before the next is built. Knows neither sampling nor the model beyond its number of KV groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tgi_cli.engine.rows import IntArray, LogitRows, TokenHistory
from tgi_cli.engine.step import ScheduledRow
from tgi_cli.model.batch import Batch, GroupTables


@dataclass(frozen=True, slots=True)
class BuiltStep:
    """A batch and what its logit rows are.

    `sampled` are the indices of the sampled rows among the scheduled ones, `num_drafts` their
    drafts; logit rows come in this order, 1 + k each.
    """

    batch: Batch
    logit_rows: LogitRows
    sampled: IntArray
    num_drafts: IntArray


class BatchBuilder:
    """Keeps the block tables of all rows; [max_rows, max_blocks] int32 for each KV group."""

    def __init__(
        self,
        history: TokenHistory,
        num_groups: int,
        block_size: int,
        device: torch.device,
        adapter_slots: NDArray[np.int32] | None = None,
    ) -> None:
        max_rows, capacity = history.tokens.shape
        max_blocks = -(-capacity // block_size)
        self._history = history
        self._block_size = block_size
        self._device = device
        self._adapter_slots = adapter_slots  # of every row; None where no adapter is served
        self._tables = [np.zeros((max_rows, max_blocks), np.int32) for _ in range(num_groups)]
        self._num_blocks = np.zeros((num_groups, max_rows), np.int64)
        self._decodes = _Decodes(max_rows, max_blocks, num_groups) if device.type == "cpu" else None

    def set_blocks(self, row: int, block_ids: Sequence[Sequence[int]]) -> None:
        """Start the row's block tables, one list per KV group."""
        self._num_blocks[:, row] = 0
        self.append_blocks(row, block_ids)

    def append_blocks(self, row: int, block_ids: Sequence[Sequence[int]]) -> None:
        """Extend the row's block tables. Blocks behind a window stay listed; nobody reads them."""
        for group, ids in enumerate(block_ids):
            if ids:
                start = int(self._num_blocks[group, row])
                self._tables[group][row, start : start + len(ids)] = ids
                self._num_blocks[group, row] = start + len(ids)

    def build(self, scheduled: Sequence[ScheduledRow]) -> BuiltStep:
        """Lay out these rows, in their order. Drafts must be in the history already."""
        rows = np.array([row.row for row in scheduled], np.int64)
        starts = [row.start for row in scheduled]
        samples = [row.sample for row in scheduled]
        lens = [row.num_tokens for row in scheduled]
        num_tokens = sum(lens)
        if self._decodes is not None and num_tokens == len(rows) and all(samples):
            return self._build_decodes(self._decodes, rows, starts)
        num_rows = len(rows)
        counts = np.array(lens, np.int64)
        first = np.array(starts, np.int64)
        ends = np.cumsum(counts)
        token_rows = np.repeat(rows, counts)
        positions = np.arange(num_tokens) + np.repeat(first - (ends - counts), counts)
        input_ids = self._history.tokens[token_rows, positions].astype(np.int64)
        blocks = positions // self._block_size
        offsets = positions - blocks * self._block_size
        key_lens = first + counts
        longest = key_lens.tolist()
        width = -(-max(longest) // self._block_size)
        groups = tuple(
            [
                GroupTables(
                    slot_mapping=self._tensor(
                        table[token_rows, blocks] * np.int64(self._block_size) + offsets
                    ),
                    block_tables=self._tensor(table[rows, :width]),
                )
                for table in self._tables
            ]
        )
        num_drafts = np.array([len(row.draft_ids) for row in scheduled if row.sample], np.int64)
        sampled = np.flatnonzero(samples)
        logit_rows, logit_places = self._logit_rows(rows[sampled], ends[sampled], num_drafts)
        slots = np.zeros(num_rows, np.int32)
        if self._adapter_slots is not None:
            slots = self._adapter_slots[rows]
        query_start = np.zeros(num_rows + 1, np.int32)
        query_start[1:] = ends
        batch = Batch(
            input_ids=self._tensor(input_ids),
            positions=self._tensor(positions),
            query_start=self._tensor(query_start),
            seq_lens=self._tensor(key_lens.astype(np.int32)),
            groups=groups,
            logit_rows=self._tensor(logit_places),
            adapter_slots=self._tensor(slots),
            query_lens=tuple(lens),
            key_lens=tuple(longest),
            adapters=tuple(slots.tolist()) if slots.any() else (),
        )
        return BuiltStep(batch, logit_rows, sampled, num_drafts)

    def _build_decodes(self, arrays: _Decodes, rows: IntArray, starts: Sequence[int]) -> BuiltStep:
        """One token a row, each sampled: the arrays are filled in place."""
        count, size = len(rows), self._block_size
        key_lens = [start + 1 for start in starts]
        width = -(-max(key_lens) // size)
        positions, history_lens = arrays.positions[:count], np.array(key_lens, np.int64)
        np.subtract(history_lens, 1, out=positions)
        arrays.seq_lens[:count] = history_lens
        arrays.input_ids[:count] = self._history.tokens[rows, positions]
        blocks = positions // size
        for table, slots, tables in zip(
            self._tables, arrays.slots, arrays.block_tables, strict=True
        ):
            # block * size + offset, the offset being position - index of the block * size
            np.subtract(table[rows, blocks], blocks, out=slots[:count])
            slots[:count] *= size
            slots[:count] += positions
            tables[:count, :width] = table[rows, :width]
        logit_rows = LogitRows(
            self._history, rows, history_lens, history_lens - self._history.num_prompt[rows]
        )
        if self._adapter_slots is not None:
            arrays.set_adapters(self._adapter_slots[rows])
        return BuiltStep(
            arrays.batch(key_lens), logit_rows, arrays.places[:count], arrays.no_drafts[:count]
        )

    def _logit_rows(
        self, rows: IntArray, ends: IntArray, num_drafts: IntArray
    ) -> tuple[LogitRows, IntArray]:
        """Logit rows of the sampled rows, and which token rows of the batch they are."""
        if not num_drafts.any():
            return LogitRows.of(self._history, rows), ends - 1
        logit_rows = LogitRows.of(self._history, rows, num_drafts)
        # Their token rows are the last 1 + k of the sequence.
        before = logit_rows.history_lens - self._history.lengths[logit_rows.rows]
        return logit_rows, np.repeat(ends - 1 - num_drafts, num_drafts + 1) + before

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)


class _Decodes:
    """Arrays for steps of up to `max_rows` decodes, and the tensors over their beginnings."""

    def __init__(self, max_rows: int, max_blocks: int, num_groups: int) -> None:
        self.input_ids = np.zeros(max_rows, np.int64)
        self.positions = np.zeros(max_rows, np.int64)
        self.seq_lens = np.zeros(max_rows, np.int32)
        self.slots = [np.zeros(max_rows, np.int64) for _ in range(num_groups)]
        self.block_tables = [np.zeros((max_rows, max_blocks), np.int32) for _ in range(num_groups)]
        self.places = np.arange(max_rows)
        self.no_drafts = np.zeros(max_rows, np.int64)
        self._query_start = np.arange(max_rows + 1, dtype=np.int32)
        self._adapters = np.zeros(max_rows, np.int32)
        self._key_lens: list[int] = []
        self._adapter_list: list[int] = []  # empty where no row has an adapter
        self._batches: dict[int, Batch] = {}  # by number of rows

    def set_adapters(self, slots: NDArray[np.int32]) -> None:
        """The adapters of the rows to come."""
        self._adapters[: len(slots)] = slots
        self._adapter_list[:] = slots.tolist() if slots.any() else ()

    def batch(self, key_lens: list[int]) -> Batch:
        """The batch of as many rows, over the arrays as they are filled."""
        count = len(key_lens)
        self._key_lens[:] = key_lens
        made = self._batches.get(count)
        if made is None:
            view = torch.from_numpy
            made = self._batches[count] = Batch(
                input_ids=view(self.input_ids[:count]),
                positions=view(self.positions[:count]),
                query_start=view(self._query_start[: count + 1]),
                seq_lens=view(self.seq_lens[:count]),
                groups=tuple(
                    GroupTables(view(slots[:count]), view(tables[:count]))
                    for slots, tables in zip(self.slots, self.block_tables, strict=True)
                ),
                logit_rows=view(self.places[:count]),
                adapter_slots=view(self._adapters[:count]),
                query_lens=(1,) * count,
                key_lens=self._key_lens,
                adapters=self._adapter_list,
            )
        return made
