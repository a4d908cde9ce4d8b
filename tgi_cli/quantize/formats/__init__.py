"""How a checkpoint's matrices are stored, load and multiply: one file per format."""

from __future__ import annotations

from typing import Any

from tgi_cli.errors import UnsupportedModel
from tgi_cli.quantize.formats.base import Format, TensorSource
from tgi_cli.quantize.formats.dense import DenseFormat

__all__ = ["detect"]


def detect(config: dict[str, Any], source: TensorSource) -> Format:
    """Choose the format by `quantization_config` of `config.json`; none means dense.

    Raises:
        UnsupportedModel: the checkpoint is quantized by a method this build cannot read.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return DenseFormat()
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise UnsupportedModel(f"{method}")
