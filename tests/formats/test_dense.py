"""The dense format, and the choice of a format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.kernels import reference
from tgi_cli.model.weights import SINGLE_FILE, SafetensorsSource
from tgi_cli.quantize.formats import detect
from tgi_cli.quantize.formats.base import WHOLE, Shard
from tgi_cli.quantize.formats.dense import DenseFormat, DenseWeight


class StoredTensors:
    """A `TensorSource` over tensors in memory; what it gives is shared, as a mapped file is."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def keys(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def nbytes(self, key: str) -> int:
        return self.tensors[key].nbytes

    def read(self, key: str, shard: Shard = WHOLE) -> Tensor:
        tensor = self.tensors[key]
        if shard.dim is None:
            return tensor
        start, end = shard.bounds(tensor.shape[shard.dim])
        return tensor.narrow(shard.dim, start, end - start)


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loads_in_the_dtype_asked_for(dtype: torch.dtype, stored: torch.dtype) -> None:
    source = StoredTensors(w=matrix(6, 4, stored))
    weight = DenseFormat().load(source, "w", WHOLE, dtype)
    assert torch.equal(weight.dequantize(), source.tensors["w"].to(dtype))
    assert (weight.out_features, weight.in_features) == (6, 4)
    assert weight.nbytes == 24 * dtype.itemsize


@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 1, 2)])
def test_loaded_matrices_own_contiguous_memory(shard: Shard) -> None:
    source = StoredTensors(w=matrix(6, 4))
    weight = DenseFormat().load(source, "w", shard, torch.float32).weight
    kept = weight.clone()
    source.tensors["w"].zero_()
    assert torch.equal(weight, kept)
    assert weight.is_contiguous()


def test_multiplies_like_the_matrix_it_stands_for() -> None:
    weight = DenseWeight(matrix(6, 4))
    x = matrix(3, 4)
    found = weight.matmul(x, reference)
    assert torch.allclose(found, x @ weight.dequantize().T)
    assert found.dtype == x.dtype


def test_prepare_keeps_or_moves_into_the_buffer_given() -> None:
    weight = DenseWeight(matrix(6, 4))
    assert weight.prepare(reference) is weight
    out = torch.empty(6, 4, dtype=torch.bfloat16)
    moved = weight.prepare(reference, out)
    assert moved.weight.data_ptr() == out.data_ptr()
    assert torch.equal(moved.weight, weight.weight.bfloat16())
    assert moved.nbytes == 48


def test_fusing_stacks_outputs() -> None:
    parts = [DenseWeight(matrix(rows, 4)) for rows in (6, 2, 2)]
    fused = DenseFormat().fuse(parts)
    assert (fused.out_features, fused.in_features) == (10, 4)
    x = matrix(3, 4)
    apart = torch.cat([part.matmul(x, reference) for part in parts], dim=1)
    assert torch.allclose(fused.matmul(x, reference), apart)


def test_what_is_no_plain_matrix_is_refused() -> None:
    source = StoredTensors(v=torch.ones(4), q=torch.ones(4, 4, dtype=torch.int8))
    source.tensors["f"] = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"`v` has shape \(4,\)"):
        DenseFormat().load(source, "v", WHOLE, torch.float32)
    for key, name in (("q", "int8"), ("f", "float8_e4m3fn")):
        with pytest.raises(UnsupportedModel, match=rf"`{key}` is stored as {name}"):
            DenseFormat().load(source, key, WHOLE, torch.float32)


def test_plain_checkpoints_are_dense(tmp_path: Path) -> None:
    save_file({"w": matrix(2, 2)}, tmp_path / SINGLE_FILE)
    source = SafetensorsSource(tmp_path)
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        form = detect(config, source)
        assert isinstance(form, DenseFormat)
        assert form.covers(source, "w")


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "aqlm", "bits": 4}, "aqlm"),
        ({"quant_method": "exl2"}, "exl2"),
        ({"bits": 4}, "unnamed"),
        ("hqq", "hqq"),
    ],
)
def test_unsupported_methods_are_named_with_the_way_out(quantization: Any, method: str) -> None:
    source = StoredTensors(w=matrix(2, 2))
    with pytest.raises(UnsupportedModel, match=rf"`{method}`.*GGUF") as raised:
        detect({"quantization_config": quantization}, source)
    assert "unquantized" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4, "group_size": 128}, "gptq"),
        ({"w_bit": 4, "q_group_size": 128}, "awq"),
    ],
)
def test_a_method_by_which_nothing_is_stored(quantization: Any, method: str) -> None:
    source = StoredTensors(w=matrix(2, 2))
    with pytest.raises(CheckpointError, match=rf"`{method}`, but no tensor"):
        detect({"quantization_config": quantization}, source)
