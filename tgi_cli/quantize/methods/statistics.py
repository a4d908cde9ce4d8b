"""What methods want to know of the inputs of a matrix, gathered batch by batch.

Knows neither where the inputs come from nor what is done with the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE_ROWS = 512
_BATCH_ROWS = 64
_BLOCK = 384  # columns of the moments that are added to together


class InputStatistics:
    """Sums over all input rows seen so far.

    Args:
        columns: of a row.
        device: of the rows.
        moments: whether to sum those, which takes most of the time.
        every: rows of a batch from one of the sample to the next; 0 for 64 of each batch.

    Attributes:
        moments: [columns, columns] float32, sum of x xT over the rows x; exactly symmetric.
        largest: [columns], largest magnitude.
        count: rows seen.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device,
        *,
        moments: bool = True,
        every: int = 0,
    ) -> None:
        self._sums_moments, self._every = moments, every
        size = columns if moments else 0
        self._moments = torch.zeros(size, size, device=device)  # at and below the diagonal
        self._whole = True
        self.largest = torch.zeros(columns, device=device)
        self.count = 0
        self._magnitudes = torch.zeros(columns, device=device)
        self._samples: list[Tensor] = []
        self._candidates, self._step = 0, 1  # rows that could be in the sample, and every which is

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, columns]."""
        rows = rows.float()
        columns = len(self._moments)
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            self._moments[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])
        self._whole = False
        magnitudes = rows.abs()
        self._magnitudes += magnitudes.sum(0)
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        self.count += len(rows)
        self._take(rows[:: self._every or max(1, len(rows) // _BATCH_ROWS)])

    def _take(self, candidates: Tensor) -> None:
        """Keep every so many of them, ever fewer, so that early and late rows count the same."""
        self._samples.append(candidates[-self._candidates % self._step :: self._step].clone())
        self._candidates += len(candidates)
        while sum(map(len, self._samples)) > 2 * _SAMPLE_ROWS:
            self._samples = [torch.cat(self._samples)[::2].clone()]
            self._step *= 2

    @property
    def moments(self) -> Tensor:
        """See the class. Raises `RuntimeError` where they were not to be summed."""
        if not self._sums_moments:
            raise RuntimeError("these statistics were gathered without moments")
        if not self._whole:
            self._moments.tril_()
            self._moments += self._moments.tril(-1).T
            self._whole = True
        return self._moments

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean of |x| of each column, [columns]."""
        return self._magnitudes / max(1, self.count)

    @property
    def sample(self) -> Tensor:
        """Up to 512 rows, evenly from all that were seen so far: [n, columns]."""
        rows = torch.cat(self._samples)
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE_ROWS))
        return rows[chosen.long().to(rows.device)]


def output_error(weight: Tensor, replaced: Tensor, moments: Tensor | None) -> float:
    """How far the outputs of `replaced` are from those of `weight`, relative to their size.

    The root of the mean square difference over the root of the mean square, over the inputs with
    second moments `moments` [columns, columns]; without moments, of the weights themselves.
    """
    moved = weight - replaced
    if moments is None:
        return float(moved.norm() / weight.norm().clamp(min=1e-30))
    changed = ((moved @ moments) * moved).sum(dtype=torch.float64)
    whole = ((weight @ moments) * weight).sum(dtype=torch.float64)
    return float((changed.clamp(min=0) / whole.clamp(min=1e-30)).sqrt())
