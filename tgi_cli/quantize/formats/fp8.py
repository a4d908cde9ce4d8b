"""8-bit floats with scales: for a whole matrix, for each output, or for blocks of 128 x 128.

`weight` is E4M3 [outputs, inputs]; beside it is `weight_scale_inv` (DeepSeek, `transformers`) or
`weight_scale` (vLLM, TGI, fbgemm), by which it is multiplied, whatever the name says. Scales of
activations are not used: activations are not rounded to 8-bit floats here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import Grouped, GroupScheme, wide
from tgi_cli.quantize.formats.base import TensorSource
from tgi_cli.quantize.formats.packed import RUN, PackedFormat, finite, tensor, wrong
from tgi_cli.quantize.formats.settings import Settings

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Powers of two as 8-bit exponents are among them.
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_INVERSE, _SCALE = ".weight_scale_inv", ".weight_scale"


class Fp8Format(PackedFormat):
    """Made from a `quantization_config` of method `fp8` or `fbgemm_fp8`.

    Raises:
        CheckpointError: blocks that are no two positive numbers.
    """

    name = "fp8"
    endings = (".weight", _INVERSE, _SCALE)
    marks = (_INVERSE, _SCALE)
    ignored = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".output_scale")

    def __init__(self, config: dict[str, Any]) -> None:
        settings = Settings(config)
        block = settings.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list)
            and len(block) == 2
            and all(isinstance(size, int) and size > 0 for size in block)
        ):
            raise settings.wrong("weight_block_size", block, "a pair of positive whole numbers")
        self._block: tuple[int, int] | None = None if block is None else (block[0], block[1])

    def stored(self, source: TensorSource, key: str) -> Fp8Matrix:
        """See `PackedFormat.stored`."""
        stem = self.stem(key)
        name = next(stem + mark for mark in self.marks if stem + mark in source)
        return fp8_matrix(source, stem + ".weight", name, self._block)


class Fp8Matrix:
    """One matrix (see `packed.StoredMatrix`): `scales` float32 holds one for each `block`."""

    def __init__(self, key: str, weight: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
        self.key = key
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + scales.nbytes
        self.weight, self.scales, self.block = weight, scales, block
        self.group = 1 if block[1] >= self.in_features else block[1]
        self.scheme: GroupScheme | None = None
        self.order: Tensor | None = None
        width = min(block[1], self.in_features)
        if (
            weight.dtype == torch.float8_e4m3fn
            and width % RUN == 0
            and self.in_features % width == 0
        ):
            self.scheme = wide(8, width, codes="e4m3")

    def decode(self, start: int, end: int) -> Tensor:
        """Rows in float32."""
        width, scales = self.block[1], self._scales(start, end)
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(width, dim=1)[:, : self.in_features]
        return self.weight[start:end].float().mul_(scales)

    def rows(self, start: int, end: int) -> Grouped:
        """The same rows in `scheme`."""
        codes = self.weight[start:end].view(torch.uint8)
        if bool(((codes & 127) == 127).any()):
            raise wrong(self.key, "stands beside weights that are not numbers")
        return Grouped(codes, self._scales(start, end))

    def _scales(self, start: int, end: int) -> Tensor:
        """Scales of these outputs: [rows, groups]."""
        blocks = torch.arange(start, end) // self.block[0]
        return finite(self.key, self.scales)[blocks]


def fp8_matrix(
    source: TensorSource, weight_key: str, scale_key: str, block: tuple[int, int] | None
) -> Fp8Matrix:
    """Read a matrix and its scales, whose shape says what shares one.

    Raises:
        CheckpointError: a tensor is missing or of another dtype or shape.
    """
    weight = tensor(source, weight_key, FLOAT8)
    if weight.dim() != 2:
        raise wrong(weight_key, f"has shape {tuple(weight.shape)}, but is to be a matrix")
    rows, columns = weight.shape
    shapes: dict[tuple[int, ...], tuple[int, int]] = {
        (): (rows, columns),
        (1,): (rows, columns),
        (1, 1): (rows, columns),
        (rows,): (1, columns),
        (rows, 1): (1, columns),
    }
    if block is not None:
        shapes = {(-(-rows // block[0]), -(-columns // block[1])): block}
    scales = tensor(source, scale_key, _SCALES, *shapes)
    shared = shapes[tuple(scales.shape)]
    return Fp8Matrix(scale_key, weight, scales.float().view(-(-rows // shared[0]), -1), shared)
