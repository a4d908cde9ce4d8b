"""Who holds which rows of the token table and of the head, and how their parts come together.

Knows neither how rows are stored nor where they lie: the embedding and the head do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tgi_cli.kernels.collective import ALONE, Collective
from tgi_cli.model.embedding import AnyEmbedding


class WholeVocabulary:
    """All rows are here."""

    collective: Collective = ALONE

    def embed(self, embedding: AnyEmbedding, token_ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, hidden_size]."""
        return embedding.forward(token_ids)

    def gather(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, vocab_size], as they are."""
        return logits

    def native(self) -> None:
        """Native code needs to know of nobody else."""
        return


class SharedVocabulary:
    """Every rank has a range of rows; `bounds` are first and last-plus-one token id of each."""

    def __init__(self, collective: Collective, bounds: Sequence[tuple[int, int]]) -> None:
        self.collective = collective
        self.first, self.last = bounds[collective.rank]
        self._columns = [last - first for first, last in bounds]

    def embed(self, embedding: AnyEmbedding, token_ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, hidden_size]: zeros from all ranks but one, added up."""
        absent = (token_ids < self.first) | (token_ids >= self.last)
        rows = embedding.forward((token_ids - self.first).masked_fill(absent, 0))
        return self.collective.all_reduce(rows.masked_fill(absent.unsqueeze(-1), 0.0))

    def gather(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, this rank's rows] of every rank -> [n, vocab_size] float32, in `out` if given."""
        return self.collective.all_gather(logits, self._columns, out)

    def native(self) -> Any:
        """What native code needs to look up its own rows and to reach the others."""
        return self.collective.native(self.first, self.last - self.first)


Vocabulary = WholeVocabulary | SharedVocabulary
