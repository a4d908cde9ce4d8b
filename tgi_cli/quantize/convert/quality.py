"""How far the quantized model is from the original: both ends' hidden states on the same text.

Runs norm and head over two streams of states, a few rows and a part of the vocabulary at a time:
the token table is never in memory in float32. Knows no layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.ops import Ops
from tgi_cli.model.batch import Batch
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.model.embedding import Embedding, head_name
from tgi_cli.model.linear import Linear
from tgi_cli.model.norm import Norm
from tgi_cli.model.vocabulary import WholeVocabulary
from tgi_cli.quantize.convert.loading import stored_loader
from tgi_cli.quantize.convert.stream import Stream
from tgi_cli.quantize.formats.dense import StoredDense

ROWS = 32  # positions whose logits, of both models, are in memory at once
VOCABULARY = 1 << 14  # rows of the output matrix that are in float32 at once


@dataclass(frozen=True, slots=True)
class Quality:
    """Over all next tokens of the held-out text.

    Attributes:
        perplexity_before: of the original.
        perplexity_after: of the quantized model.
        divergence: Kullback-Leibler, original to quantized, mean nats per token.
        agreement: fraction of positions with the same best token.
        tokens: predictions measured.
    """

    perplexity_before: float
    perplexity_after: float
    divergence: float
    agreement: float
    tokens: int


class End:
    """What turns last states into logits: final norm and head, which are not quantized.

    Args:
        checkpoint: the original.
        backend: where it runs.
    """

    def __init__(self, checkpoint: Checkpoint, backend: Backend) -> None:
        loader = stored_loader(checkpoint, backend)
        spec = checkpoint.spec
        self._device = backend.device
        self._norm = Norm.load(loader, spec.names.final_norm, spec.hidden_size, spec.norm)
        matrix = loader.matrix([head_name(loader, spec)], [spec.vocab_size], spec.hidden_size)
        assert isinstance(matrix, StoredDense)
        # To a GPU once, as it is stored: it is read anew for every few positions.
        parts = [part.to(self._device) for part in matrix.parts]
        head = _HeadInParts(backend.ops, StoredDense(parts, matrix.dtype))
        self._decoder = Decoder(spec, (), None, None, head, WholeVocabulary())

    def logits(self, states: Tensor) -> Tensor:
        """States [n, width] behind the last layer -> [n, vocab_size] float32."""
        return self._decoder.logits(self._norm.forward(states.to(self._device)))

    def next_tokens(self, stream: Stream, count: int) -> list[int]:
        """The best next token after each of the first `count` tokens of the first sample."""
        _, states = next(stream.batches())
        best: list[int] = self.logits(states[0, :count]).argmax(-1).tolist()
        return best

    def compare(self, tokens: Tensor, before: Stream, after: Stream) -> Quality:
        """Compare the last states of the original with those of the quantized model.

        Args:
            tokens: [samples, length], the text of both streams.
            before: states of the original.
            after: states of the quantized model.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        for (rows, old), (_, new) in zip(before.batches(), after.batches(), strict=True):
            following = tokens[rows, 1:].reshape(-1)
            states = [part[:, :-1].flatten(0, 1) for part in (old, new)]
            for start in range(0, len(following), ROWS):
                chunk = slice(start, start + ROWS)
                wanted = following[chunk].to(self._device)
                logits = self.logits(torch.cat([part[chunk] for part in states]))
                logs = logits.log_softmax(-1)
                sums += _sums(logs[: len(wanted)], logs[len(wanted) :], wanted)
                count += len(wanted)
        nll_before, nll_after, divergence, agreeing = (sums / count).tolist()
        return Quality(math.exp(nll_before), math.exp(nll_after), divergence, agreeing, count)


def _sums(before: Tensor, after: Tensor, wanted: Tensor) -> Tensor:
    """Negative log-likelihoods, divergence and agreements from log-probabilities: [4] float64."""
    return torch.stack(
        [
            F.nll_loss(before, wanted, reduction="sum"),
            F.nll_loss(after, wanted, reduction="sum"),
            F.kl_div(after, before, reduction="sum", log_target=True),
            (before.argmax(-1) == after.argmax(-1)).sum(),
        ]
    ).to("cpu", torch.float64)


class _HeadInParts(Linear):
    """An output matrix that stays as it is stored."""

    def __init__(self, ops: Ops, matrix: StoredDense) -> None:
        super().__init__(ops, matrix)
        self._matrix = matrix

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """See `Linear.forward`."""
        size = self._matrix.out_features
        logits = x.new_empty(len(x), size)
        for start in range(0, size, VOCABULARY):
            end = min(start + VOCABULARY, size)
            part = self._matrix.float_rows(start, end)
            logits[:, start:end] = self.ops.linear(x, part)
        return logits


def embed(checkpoint: Checkpoint, backend: Backend, tokens: Tensor, stream: Stream) -> Stream:
    """Write the states in front of layer 0 for `tokens` [samples, length]."""
    spec = checkpoint.spec
    loader = stored_loader(checkpoint, backend)
    table = loader.matrix([spec.names.embedding], [spec.vocab_size], spec.hidden_size)
    assert isinstance(table, StoredDense)
    used, places = torch.unique(tokens, return_inverse=True)
    rows = table.parts[0][used].to(backend.device, torch.float32)
    embedding = Embedding(backend.ops, rows, spec.embedding_scale)
    writer = stream.writer(0)
    for row in range(len(tokens)):
        writer.put(slice(row, row + 1), embedding.forward(places[row].to(backend.device))[None])
    return writer.finish()
