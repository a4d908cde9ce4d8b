"""The AWQ checkpoint layout "GEMM": 4 bits with zero points, packed along the output.

`qweight` int32 [in, out/8], `qzeros` int32 [groups, out/8] holding the zero points themselves,
`scales` float16 [groups, out]; the eight fields of a word in AWQ's order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgi_cli.quantize.convert.packing import AWQ_ORDER, pack
from tgi_cli.quantize.methods.matrix import QuantizedMatrix


class AwqLayout:
    """Read by transformers (with GPT-QModel), vLLM, SGLang and TGI."""

    name = "awq"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Half precision, always."""
        return torch.float16

    def vector_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Half precision, always."""
        return torch.float16

    def tensors(self, name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
        """See `Layout.tensors`."""
        assert matrix.zeros is not None
        return {
            f"{name}.qweight": pack(matrix.codes.T, 4, AWQ_ORDER),
            f"{name}.qzeros": pack(matrix.zeros.T, 4, AWQ_ORDER),
            f"{name}.scales": matrix.scales.T.contiguous(),
        }

    def config(self, bits: int, group_size: int, ignored: list[str]) -> dict[str, Any]:
        """See `Layout.config`. The head alone is left out, which every reader assumes."""
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """None: every reader of this layout takes it from `config.json`."""
        return {}
