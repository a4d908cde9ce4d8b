"""Permanent rows: one per live sequence in the runner, and the tokens each row has so far.

A row is an index into preallocated arrays. It is filled when a sequence enters and cleared when it
leaves, so that preemption is removal and resumption is one more `add`. Knows no model, no blocks
and no queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tgi_cli.engine.messages import Request
from tgi_cli.errors import InvalidRequest

IntArray = NDArray[np.int64]

#: Most draft tokens one step may verify for one sequence; they sit behind the history.
MAX_DRAFTS = 32


class RowState(Protocol):
    """Anything that lives as long as a sequence does in the runner.

    What `add` builds must be a function of its arguments alone: a row that is destroyed and built
    again from the same request and outputs behaves the same (preemption, resume, moving).
    """

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Fill `row`. Raises `RequestError` if this request cannot run; the row is then removed."""
        ...

    def remove(self, row: int) -> None:
        """Put `row` back to neutral; harmless if it was never filled."""
        ...


class TokenHistory:
    """Prompt and outputs of every row, in one array. The last sampled token lives here.

    `tokens` is [max_rows, max_len + MAX_DRAFTS] int32, `lengths` the known tokens and `num_prompt`
    the prompt tokens of each row, both [max_rows] int64. Untouched pages cost no memory.
    """

    def __init__(self, max_rows: int, max_len: int, vocab_size: int) -> None:
        self.max_len = max_len
        self.vocab_size = vocab_size
        self.tokens = np.zeros((max_rows, max_len + MAX_DRAFTS), np.int32)
        self.lengths = np.zeros(max_rows, np.int64)
        self.num_prompt = np.zeros(max_rows, np.int64)

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Write prompt and outputs. Raises `InvalidRequest` for a token outside the vocabulary."""
        num_prompt, length = len(request.prompt_ids), len(request.prompt_ids) + len(output_ids)
        if not num_prompt or length > self.max_len:
            raise InvalidRequest(
                f"a sequence holds 1 to {self.max_len} tokens, this one has {length}"
            )
        ids = np.fromiter((*request.prompt_ids, *output_ids), np.int64, length)
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise InvalidRequest(
                f"token id {bad} is outside the vocabulary of {self.vocab_size} tokens"
            )
        self.tokens[row, :length] = ids
        self.num_prompt[row] = num_prompt
        self.lengths[row] = length

    def remove(self, row: int) -> None:
        """Forget the row's lengths; the tokens behind them are never read."""
        self.lengths[row] = 0
        self.num_prompt[row] = 0

    def append(self, row: int, token_ids: Sequence[int]) -> None:
        """Add sampled tokens to one row (drafts written there are overwritten)."""
        length = int(self.lengths[row])
        self.tokens[row, length : length + len(token_ids)] = token_ids
        self.lengths[row] = length + len(token_ids)

    def append_one(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Add one token to each of several rows."""
        # One by one: for the rows of a step quicker than numpy's indexing by arrays.
        for row, token_id in zip(rows, token_ids, strict=True):
            length = self.lengths.item(row)
            self.tokens[row, length] = token_id
            self.lengths[row] = length + 1

    def propose(self, row: int, draft_ids: Sequence[int]) -> None:
        """Write drafts behind the known tokens without counting them as known."""
        if len(draft_ids) > MAX_DRAFTS:
            raise ValueError(f"{len(draft_ids)} drafts in a row, the limit is {MAX_DRAFTS}")
        length = int(self.lengths[row])
        self.tokens[row, length : length + len(draft_ids)] = draft_ids


@dataclass(frozen=True, slots=True)
class LogitRows:
    """The logit rows of one step: 1 + k for a sequence with k drafts, in the step's order.

    Logit row i draws the token that follows `history_lens[i]` tokens of runner row `rows[i]`, of
    which the last ones may be drafts: so every stage counts the drafts before its row by reading
    the history up to there. `output_positions` is the drawn token's index among the outputs.
    """

    history: TokenHistory
    rows: IntArray  # [n]
    history_lens: IntArray  # [n]
    output_positions: IntArray  # [n]

    @classmethod
    def of(
        cls, history: TokenHistory, rows: IntArray, num_drafts: IntArray | None = None
    ) -> LogitRows:
        """Lay out the logit rows of these runner rows, with `num_drafts` drafts each (or none)."""
        if num_drafts is None:
            lens = history.lengths[rows]
            return cls(history, rows, lens, lens - history.num_prompt[rows])
        repeated = np.repeat(rows, num_drafts + 1)
        ends = np.cumsum(num_drafts + 1)
        before = np.arange(len(repeated)) - np.repeat(ends - num_drafts - 1, num_drafts + 1)
        lens = history.lengths[repeated] + before
        return cls(history, repeated, lens, lens - history.num_prompt[repeated])

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: IntArray) -> LogitRows:
        """Return the logit rows at `index`."""
        return LogitRows(
            self.history,
            self.rows[index],
            self.history_lens[index],
            self.output_positions[index],
        )

    def tokens(self, *, outputs_only: bool = False) -> tuple[IntArray, NDArray[np.bool_]]:
        """Return the token ids before each row, [n, longest] int64, and which of them count.

        Places that do not count repeat the row's first counting token (or 0 if it has none).
        """
        lens = self.history_lens
        starts = self.history.num_prompt[self.rows] if outputs_only else np.zeros_like(lens)
        counts = lens - starts
        columns = np.arange(max(int(counts.max(initial=0)), 1))
        valid = columns < counts[:, None]
        places = starts[:, None] + np.where(valid, columns, 0)
        ids = self.history.tokens[self.rows[:, None], places].astype(np.int64)
        ids[counts == 0] = 0
        return ids, valid
