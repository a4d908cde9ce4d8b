"""What the scheduler decides and what comes back: plain data between scheduler and runner.

A step never says how it will be computed, and carries no text and no tensors. New rows travel in
full, running ones as differences; the runner keeps the token history of its rows, so a step only
says which positions to run. The same message goes to every shard.
"""

from __future__ import annotations

import msgspec

from tgi_cli.engine.messages import Request, TokenLogprobs

#: Block id that stands for "no block": positions behind a window, never read.
NULL_BLOCK = 0


class NewRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that enters the runner: new, resumed after preemption, or moved here.

    `request.output_ids` holds what was generated before; `block_ids` is its whole block table,
    one list per KV group, `NULL_BLOCK` where a window needs none.
    """

    row: int
    request: Request
    block_ids: tuple[list[int], ...]


class ScheduledRow(msgspec.Struct, frozen=True, kw_only=True):
    """Run positions `start .. start + num_tokens` of a row.

    The last `len(draft_ids)` of them are drafts, which the runner does not know yet; the others
    are in its history. `sample` says that the row catches up here, so logits are drawn for the
    last known token and for every draft. `appended_blocks` extends the block table, per KV group.
    """

    row: int
    start: int
    num_tokens: int
    sample: bool
    draft_ids: list[int] = []
    appended_blocks: tuple[list[int], ...] = ()


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One pass over the model. `removed_rows` are freed first, then `new_rows` enter."""

    id: int
    rows: list[ScheduledRow]
    new_rows: list[NewRow] = []
    removed_rows: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(row.num_tokens for row in self.rows)


class RowOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one row of a step produced.

    `token_ids` has the accepted drafts and the token drawn after them (empty unless `sample`).
    `logprobs` is parallel to it if asked for. `prompt_logprobs` are those of the prompt positions
    run in this step, for the tokens at `start + 1 ..`. `error` ends this sequence alone.
    `complete` says that a grammar lets nothing follow them: the sequence ends.
    `draft_ids` proposes the tokens after the last of `token_ids`, for its next step to verify.
    """

    row: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    complete: bool = False
    draft_ids: list[int] = []


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one step, parallel to `Step.rows`."""

    step_id: int
    rows: list[RowOutput]
