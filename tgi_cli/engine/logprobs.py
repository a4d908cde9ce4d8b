"""Log probabilities of the raw distribution: of chosen tokens, their ranks and the alternatives.

Raw means before masks, bias, penalties, temperature and truncation. Knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tgi_cli.engine.messages import TokenLogprobs


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
