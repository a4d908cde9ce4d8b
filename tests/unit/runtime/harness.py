from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tgi_cli.engine.messages import Request
from tgi_cli.engine.rows import LogitRows, TokenHistory
from tgi_cli.engine.sampler import Sampled, Sampler
from tgi_cli.sampling import SamplingParams

VOCAB = 64


def make_request(
    prompt_ids: Sequence[int] = (1, 2, 3),
    output_ids: Sequence[int] = (),
    *,
    request_id: str = "r",
    eos_token_ids: tuple[int, ...] = (),
    **sampling: Any,
) -> Request:
    return Request(
        id=request_id,
        prompt_ids=list(prompt_ids),
        output_ids=list(output_ids),
        eos_token_ids=eos_token_ids,
        sampling=SamplingParams(**sampling),
    )


@dataclass
class Bench:
    """A sampler with its rows filled, and the logit rows of one step over them."""

    sampler: Sampler
    history: TokenHistory

    def put(self, row: int, request: Request) -> None:
        self.history.add(row, request, request.output_ids)
        self.sampler.add(row, request, request.output_ids)

    def take(self, row: int) -> None:
        self.history.remove(row)
        self.sampler.remove(row)

    def sample(self, logits: Tensor, rows: Sequence[int]) -> Sampled:
        batch = LogitRows.of(self.history, np.array(rows))
        return self.sampler.sample(logits.clone(), batch)
