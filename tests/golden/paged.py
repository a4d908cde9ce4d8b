"""Drives a decoder the way the engine does: ragged steps over shuffled, poisoned blocks.

Every slot that no step has written holds NaN, and a block that falls behind a window is replaced
by the null block and poisoned again: reading one wrong slot shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgi_cli.kernels.backend import Backend, select
from tgi_cli.model.batch import Batch, GroupTables
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder


class Paged:
    """`num_seqs` sequences, numbered from 0, each up to `max_len` tokens."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        dtype: torch.dtype,
        *,
        num_seqs: int = 1,
        max_len: int = 64,
        block_size: int = 4,
        seed: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder = decoder
        self._options = (backend, dtype)
        self._kv_dtype = kv_dtype or dtype
        self.block_size = block_size
        self.groups = decoder.spec.kv_groups
        self.computed = [0] * num_seqs
        self.adapters = [0] * num_seqs  # the adapter's slot of each sequence
        columns = -(-max_len // block_size)
        generator = torch.Generator().manual_seed(seed)
        self.tables = [
            (torch.randperm(num_seqs * columns, generator=generator) + 1)
            .view(num_seqs, columns)
            .to(torch.int32)
            for _ in self.groups
        ]
        self.caches = [
            backend.allocate_kv(
                num_seqs * columns + 1,
                block_size,
                layer.attention.num_kv_heads,
                layer.attention.head_dim,
                self._kv_dtype,
            )
            for layer in decoder.spec.layers
        ]
        for cache in (cache for pair in self.caches for cache in pair):
            poison(cache)

    def afresh(self, **options: int) -> Paged:
        """The same decoder over an empty cache."""
        return Paged(self.decoder, *self._options, kv_dtype=self._kv_dtype, **options)

    def step(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Append tokens to sequences; logits [tokens, vocab] of each row, in float32."""
        lens = [len(tokens) for _, tokens in rows]
        starts = [self.computed[seq] for seq, _ in rows]
        for (seq, _), start in zip(rows, starts, strict=True):
            self._drop_behind_windows(seq, start)
        positions = [torch.arange(s, s + n) for s, n in zip(starts, lens, strict=True)]
        chosen = [seq for seq, _ in rows]
        groups = tuple(
            GroupTables(
                slot_mapping=torch.cat(
                    [
                        table[seq, p // self.block_size].long() * self.block_size
                        + p % self.block_size
                        for seq, p in zip(chosen, positions, strict=True)
                    ]
                ),
                block_tables=table[chosen],
            )
            for table in self.tables
        )
        key_lens = [s + n for s, n in zip(starts, lens, strict=True)]
        batch = Batch(
            input_ids=torch.tensor([token for _, tokens in rows for token in tokens]),
            positions=torch.cat(positions),
            query_start=torch.tensor([0, *lens]).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor(key_lens, dtype=torch.int32),
            groups=groups,
            logit_rows=torch.arange(sum(lens)),
            adapter_slots=torch.tensor([self.adapters[seq] for seq in chosen], dtype=torch.int32),
            query_lens=tuple(lens),
            key_lens=tuple(key_lens),
            adapters=[self.adapters[seq] for seq in chosen] if any(self.adapters) else (),
        )
        hidden = self.decoder.forward(batch, self.caches)
        for (seq, _), n in zip(rows, lens, strict=True):
            self.computed[seq] += n
        return list(self.decoder.logits(hidden[batch.logit_rows]).split(lens))

    def run(self, tokens: Sequence[int], chunk: int, *, seq: int = 0) -> Tensor:
        """All logits of one sequence, fed `chunk` tokens at a time."""
        parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
        return torch.cat([self.step([(seq, part)])[0] for part in parts])

    def _drop_behind_windows(self, seq: int, start: int) -> None:
        for group, table in zip(self.groups, self.tables, strict=True):
            if group.window is None:
                continue
            behind = max(0, start - group.window + 1) // self.block_size
            for block in table[seq, :behind].tolist():
                for layer in group.layers if block else ():
                    for cache in self.caches[layer]:
                        poison(cache[block])
            table[seq, :behind] = 0


def poison(cache: Tensor) -> None:
    """Set every byte, which is NaN in all floats, scales of 8-bit rows included."""
    cache.view(torch.uint8).fill_(0xFF)


def paged(path: object, dtype: torch.dtype = torch.float32, **options: Any) -> Paged:
    """Build the checkpoint at `path` on the CPU and wrap it."""
    backend = select("cpu")
    decoder = Decoder.build(open_checkpoint(str(path)), backend, dtype)
    return Paged(decoder, backend, dtype, **options)
