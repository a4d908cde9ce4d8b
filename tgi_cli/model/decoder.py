"""The composed decoder: built once from a checkpoint, then two functions.

Knows no requests and no scheduling; a `Batch` says what to run and where the cache lies. A range
of layers, with or without the ends, builds and runs the same way (a pipeline stage).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.cpu.packer import Packer
from tgi_cli.model.batch import Batch
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.model.embedding import AnyEmbedding, Head, load_embedding, load_head
from tgi_cli.model.layer import Layer, load_layer
from tgi_cli.model.loader import Loader
from tgi_cli.model.lora import AdapterBank, attach
from tgi_cli.model.norm import Norm
from tgi_cli.model.rope import rope_table
from tgi_cli.model.spec import DecoderSpec, RopeSpec
from tgi_cli.model.vocabulary import SharedVocabulary, Vocabulary, WholeVocabulary


class Decoder:
    """Embedding, layers, final norm and head; the ends are absent in an inner stage.

    `spec` is what is built here: with several ranks, this rank's heads and features.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        layers: Sequence[Layer],
        embedding: AnyEmbedding | None,
        norm: Norm | None,
        head: Head | None,
        vocabulary: Vocabulary,
        packer: Packer | None = None,
    ) -> None:
        self.spec = spec
        self.layers = tuple(layers)
        self.embedding = embedding
        self.norm = norm
        self.head = head
        self.vocabulary = vocabulary
        self.packer = packer  # what has packed its matrices
        self.adapters: AdapterBank | None = None

    @classmethod
    def build(
        cls,
        checkpoint: Checkpoint,
        backend: Backend,
        dtype: torch.dtype,
        *,
        layers: range | None = None,
        progress: Callable[[float], None] | None = None,
        packer: Packer | None = None,
    ) -> Decoder:
        """Read the weights and compose the parts.

        Args:
            checkpoint: what `open_checkpoint` gave.
            backend: where it runs; with several ranks, this rank's part is read and built.
            dtype: of weights and activations.
            layers: build only these; the embedding comes with the first layer of the model, norm
                and head with the last one. None builds all.
            progress: called with the fraction of bytes read, in [0, 1].
            packer: packs each matrix as it is read, for `Backend.plan`; None leaves them as read.

        Raises:
            CheckpointError: a tensor is missing, misshapen, unreadable or without a place.
            UsageError: the model does not divide into so many ranks.
        """
        spec = checkpoint.spec
        collective = backend.collective
        partition = checkpoint.partition(collective.rank, collective.world_size)
        chosen = range(len(spec.layers)) if layers is None else layers
        loader = Loader(
            checkpoint.source, checkpoint.format, backend, dtype, partition, progress, packer
        )
        group_of = {
            layer: index for index, group in enumerate(spec.kv_groups) for layer in group.layers
        }
        tables: dict[RopeSpec, Tensor] = {}
        embedding = load_embedding(loader, spec) if 0 in chosen else None
        built = []
        for index in chosen:
            rope = spec.layers[index].attention.rope
            if rope not in tables:
                tables[rope] = rope_table(rope, dtype, backend.device)
            built.append(load_layer(loader, spec, index, group_of[index], tables[rope]))
        norm = head = None
        if len(spec.layers) - 1 in chosen:
            norm = Norm.load(loader, spec.names.final_norm, spec.hidden_size, spec.norm)
            head = load_head(loader, spec, embedding)
        if len(chosen) == len(spec.layers):
            loader.finish(spec.names.ignored)
        vocabulary: Vocabulary = WholeVocabulary()
        if collective.world_size > 1:
            vocabulary = SharedVocabulary(collective, partition.vocabulary)
        if packer is not None:
            packer.finish()
        return cls(partition.local, built, embedding, norm, head, vocabulary, packer)

    def attach(self, bank: AdapterBank) -> None:
        """Serve adapters beside the model, once; before its matrices are repacked."""
        attach(self.layers, bank)
        self.adapters = bank

    def forward(self, batch: Batch, kv_caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Run a batch: the normalized hidden states [num_tokens, hidden_size].

        Args:
            batch: tokens, positions and block tables.
            kv_caches: keys and values of each layer, each
                [num_blocks, block_size, num_kv_heads, head_dim]; written where the batch's slots
                say.
        """
        assert self.embedding is not None
        assert self.norm is not None
        delta = self.vocabulary.embed(self.embedding, batch.input_ids)
        delta, residual = self.run_layers(delta, torch.zeros_like(delta), batch, kv_caches)
        return self.norm.add_forward(delta, residual)[0]

    def run_layers(
        self,
        delta: Tensor,
        residual: Tensor,
        batch: Batch,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """The layers alone, from one pair (see `model.layer`) to the next.

        `kv_caches` has one entry for each layer built here.
        """
        for layer, (k_cache, v_cache) in zip(self.layers, kv_caches, strict=True):
            delta, residual = layer.forward(delta, residual, batch, k_cache, v_cache)
        return delta, residual

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size] float32, softcapped where the family does."""
        assert self.head is not None
        logits = self.vocabulary.gather(self.head.forward(hidden))
        if self.spec.logit_softcap is not None:
            cap = self.spec.logit_softcap
            logits = torch.tanh(logits / cap) * cap
        return logits.float()
