"""Attention over long and shared contexts: near dense attention, equal bits however it is cut.

Every form of the cache is held to dense attention in float64 over the numbers as they are cached.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.kv_blocks import native_blocks
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.library import BLOCK, Attention, pointer
from tgi_cli.kernels.cpu.program import KV_FORMS
from tgi_cli.kernels.kv_rows import KV_DTYPES, decode, encode

LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
HEADS, KV_HEADS, DIM = 6, 2, 80  # features for whole groups of vectors and one more
BLOCKS = 140

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


def rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, KV_HEADS, DIM), generator=generator).bfloat16()


KEYS, VALUES = rows(BLOCKS * BLOCK, 1), rows(BLOCKS * BLOCK, 2)
#: Probabilities and the result are rounded to bf16.
CLOSE = {"atol": 8e-3, "rtol": 2e-2}
SLOPES = torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)])
SINKS = torch.tensor([-torch.inf, -2.0, 0.0, 1.0, 3.0, 40.0])


@functools.cache
def cached(kv: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values as they read back, and the native caches that hold them."""
    coded = [encode(part, KV_DTYPES[kv]) for part in (KEYS, VALUES)]
    read = [decode(part, DIM).double() for part in coded]
    blocks = [native_blocks(part, DIM, keys=i == 0) for i, part in enumerate(coded)]
    return read[0], read[1], blocks[0], blocks[1]


def attend(
    variant: str,
    threads: int,
    q: Tensor,
    tables: Sequence[Sequence[int]],
    lens: Sequence[int],
    queries: int,
    window: int = 0,
    *,
    kv: str = "bfloat16",
    caches: tuple[Tensor, Tensor] | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
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
            *map(pointer, (q, *(caches or cached(kv)[2:]), table, seq_lens, starts, out)),
            len(lens), width, HEADS, KV_HEADS, DIM, window, DIM**-0.5, softcap,
            KV_FORMS[KV_DTYPES[kv]], pointer(slopes), pointer(sinks),
        ),
    )  # fmt: skip
    context.close()
    return out


def dense(
    q: Tensor,
    table: Sequence[int],
    length: int,
    window: int = 0,
    *,
    kv: str = "bfloat16",
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same for one sequence in float64."""
    slots = (torch.tensor(table)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length]
    keys, values = (part[slots].repeat_interleave(HEADS // KV_HEADS, 1) for part in cached(kv)[:2])
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * DIM**-0.5
    positions = torch.arange(length - len(q), length)[:, None]
    hidden = torch.arange(length) > positions
    if window:
        hidden |= torch.arange(length) <= positions - window
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * (torch.arange(length) - positions)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, sink], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], values)


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
    torch.testing.assert_close(whole.double(), dense(q, table, length, window), **CLOSE)
    for threads in (2, 3, 7):
        assert torch.equal(attend(variant, threads, q, [table], [length], queries, window), whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("queries", [1, 2])
def test_sequences_whose_tiles_are_shared_out_get_the_bits_they_get_alone(
    queries: int, window: int, variant: str
) -> None:
    lens = [64, 2, 333, 65, 700, 128, 90, 190, 17]
    tables = [
        torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(i)).tolist()
        for i in range(len(lens))
    ]
    q = queries_of(len(lens) * queries)
    alone = [
        attend(variant, 1, q[i * queries : (i + 1) * queries], [table], [length], queries, window)
        for i, (table, length) in enumerate(zip(tables, lens, strict=True))
    ]
    for threads in (1, 2, 3, 7, 40):
        got = attend(variant, threads, q, tables, lens, queries, window)
        assert torch.equal(got, torch.cat(alone))


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_tiles_than_are_kept_apart_give_the_same_bits(variant: str) -> None:
    """1,400 tiles of two heads with 12 rows each: past `kPartRows`, sequences are shared out."""
    queries, length = 4, BLOCKS * BLOCK
    tables = [
        torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(i)).tolist()
        for i in range(40)
    ]
    q = queries_of(len(tables) * queries)
    whole = attend(variant, 3, q, tables, [length] * len(tables), queries)
    for i in (0, 17, 39):
        own = q[i * queries : (i + 1) * queries]
        alone = attend(variant, 3, own, [tables[i]], [length], queries)
        assert torch.equal(whole[i * queries : (i + 1) * queries], alone)


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
        torch.testing.assert_close(alone.double(), expected, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("kv", KV_DTYPES)
def test_every_form_of_the_cache(kv: str, window: int, variant: str) -> None:
    """Prompts, chunks and decodes, over contexts that end within tiles and pairs."""
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(4)).tolist()
    for queries, length in ((1, 1), (1, 2), (5, 70), (64, 64), (90, 97), (3, 513), (1, 1024)):
        q = queries_of(queries)
        whole = attend(variant, 1, q, [table], [length], queries, window, kv=kv)
        expected = dense(q, table, length, window, kv=kv)
        torch.testing.assert_close(whole.double(), expected, **CLOSE)
        for threads in (2, 5):
            got = attend(variant, threads, q, [table], [length], queries, window, kv=kv)
            assert torch.equal(got, whole)
        for i in {0, queries // 2, queries - 1}:  # each token alone
            one = q[i : i + 1].contiguous()
            end = length - queries + i + 1
            got = attend(variant, 2, one, [table], [end], 1, window, kv=kv)
            assert torch.equal(got, whole[i : i + 1]), (queries, length, i)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv", KV_DTYPES)
def test_shared_blocks_in_every_form(kv: str, variant: str) -> None:
    lens = [161, 300, 70, 165, 64, 192]
    tables = [[*range(10, 20), *range(30 + 2 * i, 30 + 2 * i + 24)] for i in range(len(lens))]
    q = queries_of(len(lens))
    together = attend(variant, 2, q, tables, lens, 1, kv=kv)
    for i, (table, length) in enumerate(zip(tables, lens, strict=True)):
        one = q[i : i + 1].contiguous()
        assert torch.equal(
            attend(variant, 1, one, [table], [length], 1, kv=kv), together[i : i + 1]
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv", KV_DTYPES)
def test_what_lies_behind_a_sequence_is_never_multiplied(kv: str, variant: str) -> None:
    """Slots after the last key, and blocks before a window, full of NaN."""
    table, length, window = list(range(1, 20)), 201, 30
    q = queries_of(3)
    clean = attend(variant, 1, q, [table], [length], 3, window, kv=kv)
    poisoned = []
    for keys, part in ((True, KEYS), (False, VALUES)):
        coded = encode(part, KV_DTYPES[kv]).clone()
        seen = torch.zeros(len(part), dtype=torch.bool)
        positions = torch.arange(length - 3 - window + 1, length)
        seen[torch.tensor(table)[positions // BLOCK] * BLOCK + positions % BLOCK] = True
        coded.view(torch.uint8)[~seen] = 0xFF
        poisoned.append(native_blocks(coded, DIM, keys=keys))
    got = attend(
        variant, 1, q, [table], [length], 3, window, kv=kv, caches=(poisoned[0], poisoned[1])
    )
    assert torch.equal(got, clean)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv", ["bfloat16", "int8", "fp8_e5m2", "float32"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("biased", ["slopes", "sinks", "both"])
def test_softcap_alibi_and_sinks(biased: str, softcap: float, kv: str, variant: str) -> None:
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(5)).tolist()
    options = {
        "softcap": softcap,
        "slopes": None if biased == "sinks" else SLOPES,
        "sinks": None if biased == "slopes" else SINKS,
    }
    for queries, length, window in ((1, 600, 0), (40, 97, 0), (3, 130, 33)):
        q = queries_of(queries)
        got = attend(variant, 1, q, [table], [length], queries, window, kv=kv, **options)
        expected = dense(q, table, length, window, kv=kv, **options)
        torch.testing.assert_close(got.double(), expected, **CLOSE)
        spread = attend(variant, 3, q, [table], [length], queries, window, kv=kv, **options)
        assert torch.equal(spread, got)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv", KV_DTYPES)
def test_a_token_that_is_not_finite_shows(kv: str, variant: str) -> None:
    """A result of numbers would hide that a key or value was none."""
    for part in (0, 1):
        coded = [encode(rows, KV_DTYPES[kv]) for rows in (KEYS, VALUES)]
        broken = (KEYS, VALUES)[part].float().clone()
        broken[2 * BLOCK + 3, 0, 7] = torch.nan
        coded[part] = encode(broken, KV_DTYPES[kv])
        blocks = [native_blocks(each, DIM, keys=i == 0) for i, each in enumerate(coded)]
        q = queries_of(1)
        got = attend(variant, 1, q, [[1, 2, 3]], [40], 1, kv=kv, caches=(blocks[0], blocks[1]))
        assert not bool(got[0, : HEADS // KV_HEADS].isfinite().all())
        assert bool(got[0, HEADS // KV_HEADS :].isfinite().all())
