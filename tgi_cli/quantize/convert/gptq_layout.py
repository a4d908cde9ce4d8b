"""The GPTQ checkpoint layout, version 1: symmetric, groups in stored order (`desc_act` false).

`qweight` int32 [in * bits/32, out] packed along the input, `qzeros` int32 [groups, out * bits/32]
holding zero - 1, `scales` float16 [groups, out], `g_idx` int32 [in].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgi_cli import __version__
from tgi_cli.quantize.convert.packing import pack
from tgi_cli.quantize.methods.gptq import DAMPING
from tgi_cli.quantize.methods.matrix import QuantizedMatrix


class GptqLayout:
    """Read by transformers (with GPT-QModel), vLLM, SGLang and TGI."""

    name = "gptq"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Half precision, always."""
        return torch.float16

    def vector_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Half precision, always."""
        return torch.float16

    def tensors(self, name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
        """See `Layout.tensors`."""
        assert matrix.zeros is not None
        columns = torch.arange(matrix.codes.shape[1], dtype=torch.int32)
        return {
            f"{name}.qweight": pack(matrix.codes, matrix.bits).T.contiguous(),
            f"{name}.qzeros": pack(matrix.zeros.T - 1, matrix.bits),
            f"{name}.scales": matrix.scales.T.contiguous(),
            f"{name}.g_idx": columns // matrix.group_size,
        }

    def config(self, bits: int, group_size: int, ignored: list[str]) -> dict[str, Any]:
        """See `Layout.config`; readers find what is not quantized by the tensors themselves."""
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "true_sequential": True,
            "damp_percent": DAMPING,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"tgi:{__version__}"]},
        }

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The file that vLLM, SGLang and earlier readers look for."""
        return {"quantize_config.json": config}
