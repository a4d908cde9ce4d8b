"""Attention written naively: one loop for each sequence, head and query, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_cli.kernels.kv_rows import decode, encode, row_width


@dataclass
class Case:
    """Ragged queries over a paged cache, and the dense keys and values they stand for."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def arguments(self) -> tuple[object, ...]:
        query_start = torch.tensor([0, *self.query_lens]).cumsum(0).to(torch.int32)
        seq_lens = torch.tensor(self.key_lens, dtype=torch.int32)
        return (
            self.q, self.k_cache, self.v_cache, self.block_tables,
            seq_lens, query_start, self.query_lens, self.key_lens,
        )  # fmt: skip


def make_case(
    lens: list[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None = None,
    seed: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> Case:
    """`lens` has (queries, keys) of each sequence. Unused slots and block 0 hold NaN.

    `keys` and `values` are what reads back from a cache of `kv_dtype`, which is `dtype` if None.
    """
    kv_dtype = kv_dtype or dtype
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    columns = max(-(-keys // block_size) for _, keys in lens) + 2
    num_blocks = len(lens) * columns + 1
    tables = (torch.randperm(num_blocks - 1, generator=generator) + 1).view(len(lens), columns)
    shape = (num_blocks, block_size, num_kv_heads, row_width(head_dim, kv_dtype))
    k_cache, v_cache = (torch.empty(shape, dtype=kv_dtype) for _ in range(2))
    for cache in (k_cache, v_cache):
        cache.view(torch.uint8).fill_(0xFF)
    keys, values = [], []
    for table, (num_queries, num_keys) in zip(tables, lens, strict=True):
        for cache, parts in ((k_cache, keys), (v_cache, values)):
            rows = encode(normal(num_keys, num_kv_heads, head_dim), kv_dtype)
            parts.append(decode(rows, head_dim))
            for position in range(num_keys):
                block, offset = table[position // block_size], position % block_size
                cache[block, offset] = rows[position]
        table[-(-num_keys // block_size) :] = 0
        if window is not None:
            table[: max(0, num_keys - num_queries - window + 1) // block_size] = 0
    return Case(
        q=normal(sum(queries for queries, _ in lens), num_heads, head_dim),
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=tables.to(torch.int32),
        query_lens=tuple(queries for queries, _ in lens),
        key_lens=tuple(num_keys for _, num_keys in lens),
        keys=keys,
        values=values,
    )


def dense_attention(
    case: Case,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """What `Ops.paged_attention` says, without a page in sight: [T, H, D] float64."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    groups = case.q.shape[1] // case.k_cache.shape[2]
    row = 0
    for i, (num_queries, num_keys) in enumerate(zip(case.query_lens, case.key_lens, strict=True)):
        for j in range(num_queries):
            position = num_keys - num_queries + j
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(case.q.shape[1]):
                keys = case.keys[i][first : position + 1, head // groups].double()
                values = case.values[i][first : position + 1, head // groups].double()
                scores = keys @ case.q[row, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if slopes is not None:
                    scores += slopes[head].double() * (torch.arange(first, position + 1) - position)
                weights = [math.exp(score) for score in scores.tolist()]
                total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[head])))
                out[row, head] = torch.tensor(weights, dtype=torch.float64) / total @ values
            row += 1
    return out
