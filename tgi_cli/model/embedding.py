"""Both ends of a decoder: token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.ops import Ops
from tgi_cli.model.linear import Linear
from tgi_cli.model.loader import Loader
from tgi_cli.model.spec import DecoderSpec


class Embedding:
    """The token table, with the factor some families put on its rows."""

    def __init__(self, ops: Ops, table: Tensor, scale: float | None) -> None:
        self.ops = ops
        self.table = table  # [vocab_size, hidden_size]
        # Rounded to the model's dtype before it multiplies, as it was in training.
        self.scale = None if scale is None else float(torch.tensor(scale, dtype=table.dtype))

    @classmethod
    def load(cls, loader: Loader, spec: DecoderSpec) -> Embedding:
        """Read the table."""
        table = loader.table(spec.names.embedding, spec.vocab_size, spec.hidden_size)
        return cls(loader.ops, table, spec.embedding_scale)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden_size]."""
        return self.ops.embed(token_ids, self.table, self.scale)


class TiedHead:
    """A head that multiplies by the token table itself."""

    def __init__(self, ops: Ops, table: Tensor) -> None:
        self.ops = ops
        self.table = table

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""
        return self.ops.linear(hidden, self.table)


Head = Linear | TiedHead


def load_head(loader: Loader, spec: DecoderSpec, embedding: Embedding | None) -> Head:
    """The output matrix: one of its own, or the token table.

    A checkpoint may say "tied" and yet store a head. Equal to the table it is dropped; different,
    it is what the model was trained with, and is used.
    """
    name = spec.names.head
    if not spec.tied_head or (loader.has(name) and not _repeats(loader, name, spec)):
        return Linear(loader.ops, loader.matrix([name], [spec.vocab_size], spec.hidden_size))
    if loader.has(name):
        loader.skip(name)
    table = embedding.table if embedding else Embedding.load(loader, spec).table
    return TiedHead(loader.ops, table)


def _repeats(loader: Loader, name: str, spec: DecoderSpec) -> bool:
    source = loader.source
    if source.shape(name) != source.shape(spec.names.embedding):
        return False
    return torch.equal(source.read(name), source.read(spec.names.embedding))
