"""How a checkpoint's matrices are stored, load and multiply: one file per format."""

from __future__ import annotations

from typing import Any

from tgi_cli.errors import UnsupportedModel
from tgi_cli.quantize.formats.base import Format, TensorSource
from tgi_cli.quantize.formats.dense import DenseFormat
from tgi_cli.quantize.formats.gguf import GgufFormat, PackedSource

__all__ = ["detect"]


def detect(config: dict[str, Any], source: TensorSource) -> Format:
    """Choose the format: GGUF by the source, else by `quantization_config` of `config.json`.

    Raises:
        UnsupportedModel: the checkpoint is quantized by a method this build cannot read.
    """
    if isinstance(source, PackedSource):
        return GgufFormat()
    quantization = config.get("quantization_config")
    if not quantization:
        return DenseFormat()
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if isinstance(quantization, dict) and method is None:
        # Early bitsandbytes checkpoints carry only its two flags.
        flags = ("load_in_8bit", "load_in_4bit")
        method = "bitsandbytes" if any(quantization.get(flag) for flag in flags) else "unnamed"
    raise UnsupportedModel(
        f"the checkpoint is quantized with `{method}`, which this build does not read; it reads "
        "float32, bfloat16 and float16 safetensors, and GGUF files",
        hint="use the unquantized checkpoint or a GGUF file of the same model",
    )
