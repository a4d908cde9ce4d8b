"""Log probabilities of the raw distribution: of chosen tokens, their ranks and the alternatives.

Raw means before masks, bias, penalties, temperature and truncation. Knows no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tgi_cli.engine.messages import Request, TokenLogprobs
from tgi_cli.engine.rows import TokenHistory
from tgi_cli.engine.step import ScheduledRow

#: Logits computed at once for prompt log probabilities, in elements.
PROMPT_LOGITS = 2**22


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Describe one token per row.

    Args:
        logits: [n, vocab_size] float32, raw.
        token_ids: [n], the chosen tokens.
        num_top: [n], how many alternatives each row wants; 0 for none.
    """
    logprobs = torch.log_softmax(logits, -1)
    chosen_ids = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = logprobs.gather(1, chosen_ids)
    # By logits: two of them may round to one log probability.
    ranks = ((logits > logits.gather(1, chosen_ids)).sum(-1) + 1).tolist()
    most = min(max(num_top, default=0), logits.shape[-1])
    top_ids = _top_ids(logits, most)
    top_values = logprobs.gather(1, top_ids).tolist()
    ids = top_ids.tolist()
    return [
        TokenLogprobs(
            token_id=token_id,
            logprob=logprob,
            rank=ranks[i],
            top_ids=ids[i][:count],
            top_logprobs=top_values[i][:count],
        )
        for i, (token_id, logprob, count) in enumerate(
            zip(token_ids, chosen[:, 0].tolist(), num_top, strict=True)
        )
    ]


def _top_ids(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` highest logits of each row, best first, equal ones by id; [n, count].

    `torch.topk` leaves the order of equal logits open, which would depend on the batch.
    """
    if not count:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    values, ids = torch.topk(logits, count, dim=-1)
    by_id = ids.argsort(-1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    ids = ids.gather(1, values.argsort(dim=-1, descending=True, stable=True))
    edge = values.amin(-1, keepdim=True)
    for row in ((logits >= edge).sum(-1) > count).nonzero()[:, 0].tolist():
        # More equals at the edge than places: take those with the lowest ids.
        ids[row] = logits[row].argsort(descending=True, stable=True)[:count]
    return ids


class PromptLogprobs:
    """Row state of requests that want their prompt's log probabilities, chunk by chunk."""

    def __init__(self, history: TokenHistory, max_rows: int) -> None:
        self._history = history
        self._num_top = np.full(max_rows, -1, np.int64)  # -1: none wanted
        self._asking: set[int] = set()  # rows

    @property
    def wanted(self) -> bool:
        """Whether any row wants some, and so hidden states of more than its last token."""
        return bool(self._asking)

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Note how many alternatives are wanted."""
        wanted = request.sampling.prompt_logprobs
        self.remove(row)
        if wanted is not None:
            self._num_top[row] = wanted
            self._asking.add(row)

    def remove(self, row: int) -> None:
        """Nothing wanted."""
        self._num_top[row] = -1
        self._asking.discard(row)

    def of_step(
        self,
        scheduled: Sequence[ScheduledRow],
        hidden: Tensor,
        logits_of: Callable[[Tensor], Tensor],
    ) -> dict[int, list[TokenLogprobs]]:
        """What the prompt positions run in this step say of the tokens after them.

        Args:
            scheduled: the rows of the batch, in its order.
            hidden: [num_tokens, hidden_size] of the batch.
            logits_of: [n, hidden_size] -> [n, vocab_size] float32.

        Returns:
            By index in `scheduled`, one entry for each of the tokens at `start + 1 ..` that are
            part of the prompt; empty where nobody asks.
        """
        if not self.wanted:
            return {}
        result = {}
        first = 0
        for index, row in enumerate(scheduled):
            num_top = int(self._num_top[row.row])
            last_target = min(
                row.start + row.num_tokens, int(self._history.num_prompt[row.row]) - 1
            )
            if num_top >= 0 and row.start < last_target:
                targets = self._history.tokens[row.row, row.start + 1 : last_target + 1].tolist()
                result[index] = self._describe(
                    hidden[first : first + len(targets)], targets, num_top, logits_of
                )
            first += row.num_tokens
        return result

    def _describe(
        self,
        hidden: Tensor,
        targets: list[int],
        num_top: int,
        logits_of: Callable[[Tensor], Tensor],
    ) -> list[TokenLogprobs]:
        """In pieces: the logits of a whole chunk over a large vocabulary take half a gigabyte."""
        entries: list[TokenLogprobs] = []
        size = max(1, PROMPT_LOGITS // self._history.vocab_size)
        for start in range(0, len(targets), size):
            piece = slice(start, start + size)
            logits = logits_of(hidden[piece])
            entries += token_logprobs(logits, targets[piece], [num_top] * len(logits))
        return entries
