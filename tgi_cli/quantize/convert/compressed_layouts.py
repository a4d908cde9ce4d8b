"""The compressed-tensors layouts: packed integers, int8 with int8 activations, and FP8.

Their readers refuse keys they do not know, and older ones know few: the descriptions here are the
smallest that say everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgi_cli.quantize.convert.packing import pack
from tgi_cli.quantize.methods.matrix import QuantizedMatrix

_TOKEN = {"strategy": "token", "symmetric": True, "dynamic": True}


class _Compressed:
    """What all of them share; `format`, `tensors` and `group` differ."""

    name = "compressed-tensors"
    format: str

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype."""
        return model_dtype

    def vector_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype."""
        return model_dtype

    def group(self, bits: int, group_size: int) -> dict[str, Any]:
        """What `config_groups` says of weights and activations."""
        raise AssertionError("each layout describes itself")

    def config(self, bits: int, group_size: int, ignored: list[str]) -> dict[str, Any]:
        """See `Layout.config`."""
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "ignore": ignored,
            "config_groups": {
                "group_0": {"targets": ["Linear"], **self.group(bits, group_size)},
            },
        }

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """None: every reader takes it from `config.json`."""
        return {}


class PackedLayout(_Compressed):
    """`pack-quantized`: `weight_packed` int32 [out, in * bits/32], `weight_scale` [out, groups]."""

    format = "pack-quantized"

    def tensors(self, name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
        """See `Layout.tensors`."""
        return {
            f"{name}.weight_packed": pack(matrix.codes, matrix.bits),
            f"{name}.weight_scale": matrix.scales.contiguous(),
            f"{name}.weight_shape": torch.tensor(matrix.codes.shape, dtype=torch.int64),
        }

    def group(self, bits: int, group_size: int) -> dict[str, Any]:
        """Symmetric integers by group, or by output row."""
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
        if group_size == -1:
            return {"weights": {**weights, "strategy": "channel"}}
        return {"weights": {**weights, "strategy": "group", "group_size": group_size}}


class Int8Layout(_Compressed):
    """`int-quantized`: `weight` int8 [out, in], `weight_scale` [out, 1]; int8 activations."""

    format = "int-quantized"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Single precision, which every reader takes."""
        return torch.float32

    def tensors(self, name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
        """See `Layout.tensors`."""
        return {
            f"{name}.weight": (matrix.codes.to(torch.int16) - 128).to(torch.int8),
            f"{name}.weight_scale": matrix.scales.contiguous(),
        }

    def group(self, bits: int, group_size: int) -> dict[str, Any]:
        """One scale a row, one a token."""
        weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
        return {
            "weights": {**weights, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", **_TOKEN},
        }


class Fp8Layout(_Compressed):
    """`float-quantized`: `weight` e4m3 [out, in], `weight_scale` [out, 1]; FP8 activations."""

    format = "float-quantized"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Single precision, which every reader takes."""
        return torch.float32

    def tensors(self, name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
        """See `Layout.tensors`."""
        return {
            f"{name}.weight": matrix.codes.contiguous(),
            f"{name}.weight_scale": matrix.scales.contiguous(),
        }

    def group(self, bits: int, group_size: int) -> dict[str, Any]:
        """One scale a row, one a token."""
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        return {
            "weights": {**weights, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", **_TOKEN},
        }
