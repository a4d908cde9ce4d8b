"""How a checkpoint's matrices are stored, load and multiply: one file per format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.quantize.formats.awq import AwqFormat
from tgi_cli.quantize.formats.base import Format, TensorSource
from tgi_cli.quantize.formats.bitsandbytes import BitsandbytesFormat
from tgi_cli.quantize.formats.compressed_tensors import CompressedTensorsFormat
from tgi_cli.quantize.formats.dense import DenseFormat
from tgi_cli.quantize.formats.fp8 import Fp8Format
from tgi_cli.quantize.formats.gguf import GgufFormat, PackedSource
from tgi_cli.quantize.formats.gptq import GptqFormat
from tgi_cli.quantize.formats.mxfp4 import Mxfp4Format

__all__ = ["READABLE", "detect"]

_METHODS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "gptq": GptqFormat,
    "awq": AwqFormat,
    "compressed-tensors": CompressedTensorsFormat,
    "fp8": Fp8Format,
    "fbgemm_fp8": Fp8Format,
    "bitsandbytes": lambda _: BitsandbytesFormat(),
    "mxfp4": lambda _: Mxfp4Format(),
}

#: What can be read, in words.
READABLE = (
    "float32, bfloat16 and float16 safetensors, GGUF, GPTQ, AWQ, compressed-tensors, FP8, MXFP4 "
    "and bitsandbytes checkpoints"
)


def detect(config: dict[str, Any], source: TensorSource) -> Format:
    """Choose the format: GGUF by the source, else by `quantization_config` of `config.json`.

    Raises:
        UnsupportedModel: the checkpoint is quantized by a method this build cannot read.
        CheckpointError: its description is broken, or nothing is stored as it says.
    """
    if isinstance(source, PackedSource):
        return GgufFormat()
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return DenseFormat()
    if not isinstance(quantization, dict):
        quantization = {"quant_method": quantization}
    method = _method(quantization)
    if method not in _METHODS:
        raise UnsupportedModel(
            f"the checkpoint is quantized with `{method}`, which this build does not read; it "
            f"reads {READABLE}",
            hint="use the unquantized checkpoint, or `tgi quantize` it to a format that is read",
        )
    format = _METHODS[method](quantization)
    if not any(format.covers(source, name) for name in format.names(source)):
        raise CheckpointError(
            f"the configuration says `{method}`, but no tensor of the checkpoint is stored so",
            hint="the weights and `config.json` do not belong together; download both again",
        )
    return format


def _method(quantization: dict[str, Any]) -> str:
    """The method's name; files of older tools leave it out but have keys of their own."""
    method = quantization.get("quant_method")
    if method is not None:
        return str(method).lower()
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return "bitsandbytes"
    if "config_groups" in quantization:
        return "compressed-tensors"
    if "zero_point" in quantization or "w_bit" in quantization:
        return "awq"
    return "gptq" if {"bits", "group_size"} <= quantization.keys() else "unnamed"
