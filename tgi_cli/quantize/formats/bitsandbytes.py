"""Checkpoints that bitsandbytes and `transformers` save: NF4, FP4 and INT8.

4-bit `weight` is uint8, two codes in a byte, beside `weight.absmax` (a scale for each block),
`weight.quant_map` (the sixteen numbers) and `weight.quant_state.bitsandbytes__nf4`, JSON in bytes.
With double quantization the scales are 8-bit codes themselves, with a table, scales and an offset
of their own. INT8 `weight` has a scale for each output, times 127, in `SCB`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgi_cli.quantize.formats.affine import AffineMatrix
from tgi_cli.quantize.formats.base import TensorSource
from tgi_cli.quantize.formats.packed import PackedFormat, StoredMatrix, tensor, wrong
from tgi_cli.quantize.formats.settings import Settings
from tgi_cli.quantize.formats.table import TableMatrix

_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
_SCB = ".SCB"
#: The nested state's tensors keep these names.
_FLOAT32 = torch.float32


class BitsandbytesFormat(PackedFormat):
    """Everything is told by the tensors; the `quantization_config` adds nothing."""

    name = "bitsandbytes"
    endings = (
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        *_STATES,
        _SCB,
        ".weight_format",
    )
    marks = (*_STATES, _SCB)

    def stored(self, source: TensorSource, key: str) -> StoredMatrix:
        """See `PackedFormat.stored`."""
        stem = self.stem(key)
        state = next((stem + mark for mark in _STATES if stem + mark in source), None)
        return _int8(source, stem) if state is None else _four_bits(source, stem, state)


class Int8Rows(AffineMatrix):
    """Signed codes int8 [outputs, inputs] with one float32 scale for each output."""

    def __init__(self, key: str, weight: Tensor, scales: Tensor) -> None:
        rows, columns = weight.shape
        super().__init__(key, (rows, columns), 8, columns, symmetric=True, scale=_FLOAT32)
        self._weight, self._scales = weight, scales.view(-1, 1)

    def codes(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.codes`."""
        return self._weight[start:end].view(torch.uint8) ^ 128

    def scales(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.scales`."""
        return self._scales[start:end]

    def zeros(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.zeros`."""
        return torch.full((end - start, 1), 128)


def _int8(source: TensorSource, stem: str) -> Int8Rows:
    weight = tensor(source, stem + ".weight", torch.int8)
    if weight.dim() != 2:
        raise wrong(stem + ".weight", f"has shape {tuple(weight.shape)}, but is to be a matrix")
    layout = stem + ".weight_format"
    if layout in source and int(source.read(layout).flatten()[0]) != 0:
        raise wrong(layout, "names a layout of tiles; only `row` is read")
    scales = tensor(source, stem + _SCB, _FLOAT32, (weight.shape[0],))
    return Int8Rows(stem + _SCB, weight, scales / 127)


def _four_bits(source: TensorSource, stem: str, state_key: str) -> TableMatrix:
    state = _state(source, state_key)
    shape, block = state.get("shape"), state.integer("blocksize")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(size, int) and size > 0 for size in shape)
        or block < 1
    ):
        raise wrong(state_key, f"has shape {shape!r} and blocks of {block}, which no matrix has")
    size = math.prod(shape)
    if shape[1] % 2:
        raise wrong(state_key, f"tells of {shape[1]} inputs, an odd number")
    packed = tensor(source, stem + ".weight", torch.uint8)
    if packed.numel() * 2 != size:
        raise wrong(stem + ".weight", f"holds {packed.numel() * 2:,} codes, not {size:,}")
    table = tensor(source, stem + ".weight.quant_map", _FLOAT32, (16,))
    scale_key = stem + ".weight.absmax"
    scales = _scales(source, stem, state, -(-size // block))
    return TableMatrix(
        scale_key, (shape[0], shape[1]), packed, table, scales, block, high_first=True
    )


def _scales(
    source: TensorSource, stem: str, state: Settings, count: int
) -> Callable[[int, int], Tensor]:
    key, nested = stem + ".weight.absmax", stem + ".weight.nested_absmax"
    if nested not in source:
        scales = tensor(source, key, _FLOAT32, (count,))
        return lambda first, last: scales[first:last]
    codes = tensor(source, key, torch.uint8, (count,))
    block = state.integer("nested_blocksize")
    if block < 1:
        raise state.wrong("nested_blocksize", block, "a positive number")
    outer = tensor(source, nested, _FLOAT32, (-(-count // block),))
    table = tensor(source, stem + ".weight.nested_quant_map", _FLOAT32, (256,))
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float):
        raise state.wrong("nested_offset", offset, "a number")

    def decode(first: int, last: int) -> Tensor:
        values = table.index_select(0, codes[first:last].int())
        return values * outer[torch.arange(first, last) // block] + offset

    return decode


def _state(source: TensorSource, key: str) -> Settings:
    try:
        values: Any = json.loads(bytes(tensor(source, key, torch.uint8).tolist()))
    except ValueError as error:
        raise wrong(key, f"holds no JSON: {error}") from None
    if not isinstance(values, dict):
        raise wrong(key, "holds no object")
    return Settings(values, f"`{key}`")
