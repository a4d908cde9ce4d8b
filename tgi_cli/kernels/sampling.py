"""What the sequences of a sampler ask for, as arrays by row: the input of a fused sampling kernel.

The stages of the engine own the arrays and are the oracle of any such kernel. Knows no request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowParameters:
    """One value a row, [max_rows] each; read afresh in every call.

    Neutral are 1 for `repetition`, `temperature` and `top_p`, 0 for the others. `greedy` rows take
    the highest logit. `seeds` are the unsigned 64-bit seeds as two's complement.
    """

    repetition: NDArray[np.float32]
    frequency: NDArray[np.float32]
    presence: NDArray[np.float32]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seeds: NDArray[np.int64]
    greedy: NDArray[np.bool_]


class RowSampling(Protocol):
    """Penalties, temperature, top-k, top-p, min-p and the draw over whole batches, in one call."""

    def sample(
        self,
        logits: Tensor,
        tokens: NDArray[np.int32],
        rows: NDArray[np.int64],
        history_lens: NDArray[np.int64],
        output_positions: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Draw one token per logit row.

        Args:
            logits: [n, vocab_size] float32, contiguous; overwritten.
            tokens: [max_rows, capacity], prompt and outputs of every row.
            rows: [n], the row of each logit row.
            history_lens: [n], tokens before each logit row.
            output_positions: [n], how many of those are outputs.

        Returns:
            Token ids [n], and whether each means anything: False where the highest logit was not
            finite, as it came or as it was processed.
        """
        ...
