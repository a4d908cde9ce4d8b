"""Both ends of a decoder: token ids to vectors, and vectors to logits.

With several ranks these are a rank's own rows; `model.vocabulary` puts the parts together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.ops import Ops
from tgi_cli.model.linear import Linear
from tgi_cli.model.loader import Loader
from tgi_cli.model.spec import DecoderSpec
from tgi_cli.quantize.formats.base import TableWeight


class Embedding:
    """The token table, with the factor some families put on its rows."""

    def __init__(self, ops: Ops, table: Tensor, scale: float | None) -> None:
        self.ops = ops
        self.table = table  # [vocab_size, hidden_size]
        self.dtype = table.dtype
        self.scale = _rounded(scale, table.dtype)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden_size]."""
        return self.ops.embed(token_ids, self.table, self.scale)

    def head(self) -> Head:
        """A head tied to the table."""
        return TiedHead(self.ops, self.table)


class BlockEmbedding:
    """A token table that stays as stored; rows are decoded when they are looked up."""

    def __init__(
        self, ops: Ops, weight: TableWeight, scale: float | None, dtype: torch.dtype
    ) -> None:
        self.ops = ops
        self.weight = weight
        self.dtype = dtype
        self.scale = _rounded(scale, dtype)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden_size]."""
        rows = self.weight.gather(token_ids, self.dtype)
        return rows if self.scale is None else rows * self.scale

    def head(self) -> Head:
        """A head tied to the table."""
        return Linear(self.ops, self.weight)


class TiedHead:
    """A head that multiplies by the token table itself."""

    def __init__(self, ops: Ops, table: Tensor) -> None:
        self.ops = ops
        self.table = table

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""
        return self.ops.linear(hidden, self.table)


AnyEmbedding = Embedding | BlockEmbedding
Head = Linear | TiedHead


def load_embedding(loader: Loader, spec: DecoderSpec) -> AnyEmbedding:
    """Read the table; it stays in blocks if the format keeps them, and is packed if it can be."""
    name, rows, columns = spec.names.embedding, spec.vocab_size, spec.hidden_size
    tied = not _has_own_head(loader, spec)
    weight = loader.packed_table(name, rows, columns, multiplied=tied)
    if weight is not None:
        return BlockEmbedding(loader.ops, weight, spec.embedding_scale, loader.dtype)
    return Embedding(loader.ops, loader.table(name, rows, columns), spec.embedding_scale)


def load_head(loader: Loader, spec: DecoderSpec, embedding: AnyEmbedding | None) -> Head:
    """The output matrix: one of its own, or the token table.

    A checkpoint may say "tied" and yet store a head. Equal to the table it is dropped; different,
    it is what the model was trained with, and is used.
    """
    name = spec.names.head
    if head_name(loader, spec) == name:
        return Linear(loader.ops, loader.matrix([name], [spec.vocab_size], spec.hidden_size))
    if loader.has(name):
        loader.skip(name)
    return (embedding or load_embedding(loader, spec)).head()


def head_name(loader: Loader, spec: DecoderSpec) -> str:
    """The tensor that is the output matrix: one of its own, or the token table."""
    return spec.names.head if _has_own_head(loader, spec) else spec.names.embedding


def _rounded(scale: float | None, dtype: torch.dtype) -> float | None:
    """The factor in the model's dtype, as it was in training."""
    return None if scale is None else float(torch.tensor(scale, dtype=dtype))


def _has_own_head(loader: Loader, spec: DecoderSpec) -> bool:
    name = spec.names.head
    return not spec.tied_head or (loader.has(name) and not _repeats(loader, name, spec))


def _repeats(loader: Loader, name: str, spec: DecoderSpec) -> bool:
    source = loader.source
    if name not in source or source.shape(name) != source.shape(spec.names.embedding):
        return False
    shard = loader.partition.shard(name)
    return torch.equal(source.read(name, shard), source.read(spec.names.embedding, shard))
