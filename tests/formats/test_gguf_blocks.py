"""Block decoders against the `gguf` package's, bit for bit, on blocks of random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tgi_cli.quantize.formats import gguf_blocks
from tgi_cli.quantize.formats.base import Shard
from tgi_cli.quantize.formats.gguf import PackedTensor
from tgi_cli.quantize.formats.gguf_blocks import BLOCK_TYPES, BlockType, dequantize

KINDS = list(BLOCK_TYPES.values())
SHAPES = [(1, 1), (3, 2), (17, 5), (1, 9), (130, 1)]  # rows, blocks per row


def random_rows(kind: BlockType, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes: every quant, scale and also infinities and NaNs among the scales."""
    generator = np.random.default_rng([kind.code, rows, blocks, seed])
    return generator.integers(0, 256, (rows, blocks * kind.type_size), dtype=np.uint8)


def oracle(raw: np.ndarray, kind: BlockType) -> np.ndarray:
    if kind.name == "F64":
        with np.errstate(over="ignore"):
            return raw.view(np.float64).astype(np.float32)
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind.name])


def same(found: torch.Tensor, expected: np.ndarray) -> bool:
    return np.array_equal(found.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_table_agrees_with_the_gguf_package(kind: BlockType) -> None:
    code = gguf.GGMLQuantizationType[kind.name]
    assert kind.code == code
    assert (kind.block_size, kind.type_size) == gguf.GGML_QUANT_SIZES[code]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_equal_the_gguf_package(kind: BlockType, shape: tuple[int, int]) -> None:
    raw = random_rows(kind, *shape)
    found = dequantize(torch.from_numpy(raw), kind)
    assert found.dtype == torch.float32
    assert same(found, oracle(raw, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_chunks_do_not_show(kind: BlockType, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows(kind, 11, 2)
    monkeypatch.setattr(gguf_blocks, "CHUNK_ELEMENTS", 4 * kind.block_size)  # two rows at a time
    assert same(dequantize(torch.from_numpy(raw), kind), oracle(raw, kind))


def test_more_rows_than_one_chunk() -> None:
    kind = BLOCK_TYPES["Q4_0"]
    rows = 2 * gguf_blocks.CHUNK_ELEMENTS // 256 + 5
    raw = random_rows(kind, rows, 8)
    assert same(dequantize(torch.from_numpy(raw), kind), oracle(raw, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_float32(dtype: torch.dtype) -> None:
    kind = BLOCK_TYPES["Q6_K"]
    raw = random_rows(kind, 4, 2)
    expected = torch.from_numpy(oracle(raw, kind)).to(dtype)
    found = dequantize(torch.from_numpy(raw), kind, dtype)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q3_K", "F16"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shards_concatenate_to_the_whole(name: str, dim: int, world_size: int) -> None:
    kind = BLOCK_TYPES[name]
    blocks = 3 if kind.block_size > 1 else 96  # thirds lie on block borders, halves do not
    raw = torch.from_numpy(random_rows(kind, 12, blocks))
    tensor = PackedTensor(kind, (12, blocks * kind.block_size), raw)
    parts = [tensor.unpack(shard=Shard(dim, rank, world_size)) for rank in range(world_size)]
    assert len({part.shape for part in parts}) == 1
    assert same(torch.cat(parts, dim), tensor.unpack().numpy())


def test_bytes_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of Q4_0 blocks"):
        dequantize(torch.zeros(2, 19, dtype=torch.uint8), BLOCK_TYPES["Q4_0"])
