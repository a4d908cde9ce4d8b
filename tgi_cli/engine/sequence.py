"""A request while the scheduler has it: its tokens, how far they are computed, and its blocks.

There is no phase: a sequence is behind (`num_computed` < number of tokens) and catches up. It
knows neither the queue nor the budget, and nothing that could not be rebuilt from the request and
the output ids.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import msgspec

from tgi_cli.engine.block_table import BlockTable
from tgi_cli.engine.messages import Request, TokenLogprobs

#: `Sequence.row` while it has none.
NO_ROW = -1


class Sequence:
    """One live sequence. `rank` orders sequences: the smaller, the better the claim on memory."""

    __slots__ = (
        "_request",
        "account",
        "admitted",
        "announced",
        "block_hashes",
        "draft_ids",
        "finish",
        "id",
        "in_flight",
        "max_total",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_prompt",
        "num_published",
        "prompt_logprobs",
        "queue_time",
        "queued_at",
        "rank",
        "restart",
        "row",
        "tables",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        tables: Items[BlockTable],
        *,
        order: int,
        max_len: int,
        queued_at: float,
    ) -> None:
        self._request = request
        self.id = request.id
        self.account = (request.tenant, request.user)
        self.rank = (request.priority, order)
        self.tables = tables
        self.token_ids = request.prompt_ids + request.output_ids
        self.num_prompt = len(request.prompt_ids)
        # Number of tokens, prompt included, at which it ends with `length`.
        self.max_total = min(self.num_prompt + request.sampling.max_tokens, max_len)
        self.num_computed = 0  # positions whose keys and values are, or are being, written
        self.draft_ids: list[int] = []  # proposed for the positions after the last token
        self.block_hashes: list[bytes] = []  # of its full blocks, as far as anyone asked
        self.num_published = 0  # leading blocks offered to the prefix cache
        self.num_charged = 0  # prompt positions the queue has counted
        self.row = NO_ROW
        self.in_flight = False
        self.restart = False  # computed on bad blocks: forget the step in flight, start again
        self.finish: str | None = None
        self.admitted = False  # has had a row before
        self.announced = False  # a delta has left
        self.num_cached = 0
        self.queued_at = queued_at
        self.queue_time = 0.0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if self.wants_prompt_logprobs:
            self.prompt_logprobs = [None]

    @property
    def request(self) -> Request:
        """The request as it would arrive now: with everything generated so far as its outputs."""
        output_ids = self.token_ids[self.num_prompt :]
        if len(output_ids) != len(self._request.output_ids):
            self._request = msgspec.structs.replace(self._request, output_ids=output_ids)
        return self._request

    @property
    def num_outputs(self) -> int:
        """Tokens generated, those before a resume included."""
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether they are still owed: they leave with the first token, so once."""
        return (
            self._request.sampling.prompt_logprobs is not None
            and len(self.token_ids) == self.num_prompt
        )

    def rewind(self) -> None:
        """Release all blocks and be as if just arrived, with the outputs so far."""
        for table in self.tables:
            table.release()
        self.num_computed = 0
        self.num_published = 0
        self.draft_ids = []
        self.row = NO_ROW
        self.restart = False
        if self.wants_prompt_logprobs:
            self.prompt_logprobs = [None]

    def accept(self, token_ids: list[int], *, complete: bool = False) -> list[int]:
        """Append what was sampled, up to and with the token that ends it; return what was taken.

        Sets `finish`; `complete` ends it with the last of them. Neither an eos token nor a stop
        token ends it before `min_tokens`: the sampler masks them until then.
        """
        request, sampling = self._request, self._request.sampling
        own = self.token_ids
        for count, token_id in enumerate(token_ids, start=1):
            may_stop = len(own) - self.num_prompt >= sampling.min_tokens
            own.append(token_id)
            if may_stop and token_id in request.eos_token_ids and not sampling.ignore_eos:
                self.finish = "eos"
            elif (may_stop and token_id in sampling.stop_token_ids) or (
                complete and count == len(token_ids)
            ):
                self.finish = "stop"
            elif len(own) >= self.max_total:
                self.finish = "length"
            else:
                continue
            return token_ids[:count]
        return token_ids
