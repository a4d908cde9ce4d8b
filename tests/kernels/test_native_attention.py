"""Attention over long and shared contexts: near dense attention, equal bits however it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.library import BLOCK, Attention, pointer

LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
HEADS, KV_HEADS, DIM = 6, 2, 32
BLOCKS = 140

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


def rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, KV_HEADS, DIM), generator=generator).bfloat16()


KEYS, VALUES = rows(BLOCKS * BLOCK, 1), rows(BLOCKS * BLOCK, 2)
# The cache's layouts: pairs of features by tokens, and pairs of tokens by features.
K_CACHE = KEYS.view(BLOCKS, BLOCK, KV_HEADS, DIM // 2, 2).permute(0, 2, 3, 1, 4).contiguous()
V_CACHE = VALUES.view(BLOCKS, BLOCK // 2, 2, KV_HEADS, DIM).permute(0, 3, 1, 4, 2).contiguous()


def attend(
    variant: str,
    threads: int,
    q: Tensor,
    tables: Sequence[Sequence[int]],
    lens: Sequence[int],
    queries: int,
    window: int = 0,
) -> Tensor:
    """[sequences * queries, heads, dim]; every sequence has as many query tokens."""
    assert LOADED is not None
    context = LOADED.context(variant, threads)
    width = max(map(len, tables))
    table = torch.tensor([[*row, *[0] * (width - len(row))] for row in tables], dtype=torch.int32)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    starts = torch.arange(len(lens) + 1, dtype=torch.int32) * queries
    out = torch.empty_like(q)
    context.call(
        "attention",
        Attention(
            *map(pointer, (q, K_CACHE, V_CACHE, table, seq_lens, starts, out)),
            len(lens), width, HEADS, KV_HEADS, DIM, window, DIM**-0.5, 0.0,
        ),
    )  # fmt: skip
    context.close()
    return out


def dense(q: Tensor, table: Sequence[int], length: int, window: int = 0) -> Tensor:
    """The same for one sequence in float64."""
    slots = (torch.tensor(table)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length]
    keys, values = (
        part[slots].double().repeat_interleave(HEADS // KV_HEADS, 1) for part in (KEYS, VALUES)
    )
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * DIM**-0.5
    positions = torch.arange(length - len(q), length)[:, None]
    hidden = torch.arange(length) > positions
    if window:
        hidden |= torch.arange(length) <= positions - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def queries_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn((count, HEADS, DIM), generator=generator).bfloat16()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("length", [511, 1024, 1501])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_lone_long_context_is_split_without_changing_a_bit(
    queries: int, length: int, window: int, variant: str
) -> None:
    q = queries_of(queries)
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    whole = attend(variant, 1, q, [table], [length], queries, window)
    torch.testing.assert_close(
        whole.double(), dense(q, table, length, window), atol=4e-3, rtol=2e-2
    )
    for threads in (2, 3, 7):
        assert torch.equal(attend(variant, threads, q, [table], [length], queries, window), whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_sequences_that_share_blocks_get_the_bits_they_get_alone(
    threads: int, variant: str
) -> None:
    shared = list(range(10, 20))  # 160 tokens: two whole tiles, and a half that all may read
    lens = [161, 300, 70, 165, 64, 500, 191, 192, 193, 129, 128, 170]
    tables = [[*shared, *range(30 + 2 * i, 30 + 2 * i + 24)] for i in range(len(lens))]
    tables[9][2] = 99  # one that leaves the others within the first tile
    q = queries_of(len(lens))
    together = attend(variant, threads, q, tables, lens, 1)
    for i, (table, length) in enumerate(zip(tables, lens, strict=True)):
        alone = attend(variant, 1, q[i : i + 1].contiguous(), [table], [length], 1)
        assert torch.equal(together[i : i + 1], alone), i
        expected = dense(q[i : i + 1], table, length)
        torch.testing.assert_close(alone.double(), expected, atol=4e-3, rtol=2e-2)
