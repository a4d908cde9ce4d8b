"""Number types of weights and activations, decided once, before the weights are read.

Quantized weights are multiplied by activations rounded to int8, or by 16-bit ones; that decides how
they are held. Knows no kernels.
"""

from __future__ import annotations

import logging

import torch

from tgi_cli.config import EngineConfig
from tgi_cli.errors import UsageError
from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.kv_rows import KV_ALIASES, KV_DTYPES
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.quantize.formats import READABLE
from tgi_cli.quantize.formats.at_load import METHODS

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHOICES = ("auto", "int8", "bfloat16")
#: Names that ask for a stored format, and the formats that are meant.
_STORED = {
    "awq": ("awq",),
    "gptq": ("gptq", "awq"),
    "marlin": ("gptq", "awq"),
    "compressed-tensors": ("compressed-tensors",),
}


def resolve_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations.

    `auto` is what is stored, but bfloat16 for float16 on a CPU, where float16 products are
    hundreds of times slower, and float32 for float64.

    Raises:
        UsageError: an unknown name.
    """
    if name != "auto":
        if name not in _DTYPES:
            raise UsageError(
                f"unknown dtype `{name}`", hint="use auto, float32, bfloat16 or float16"
            )
        return _DTYPES[name]
    if stored == torch.float64:
        return torch.float32
    return torch.bfloat16 if stored == torch.float16 and device.type == "cpu" else stored


def resolve_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the KV cache; `auto` is that of the activations, `dtype`.

    Raises:
        UsageError: an unknown name.
    """
    if name == "auto":
        return dtype
    found = KV_DTYPES.get(KV_ALIASES.get(name, name))
    if found is None:
        raise UsageError(
            f"the KV cache cannot be held in `{name}`",
            hint=f"use auto, {', '.join((*KV_DTYPES, *KV_ALIASES))}",
        )
    return found


def check_quantize(method: str | None) -> None:
    """Refuse what can be known to be wrong before a model is fetched.

    Raises:
        UsageError: EXL2, which is not read, or an unknown name.
    """
    if method is None or method in METHODS or method in _STORED:
        return
    if method == "exl2":
        raise UsageError(
            f"EXL2 checkpoints are not read; this build reads {READABLE}",
            hint="`tgi quantize MODEL OUT --method gptq` writes a checkpoint that is",
        )
    known = ", ".join((*METHODS, *_STORED))
    raise UsageError(f"unknown quantization `{method}`", hint=f"use one of {known}")


def quantized_as_asked(checkpoint: Checkpoint, method: str | None) -> Checkpoint:
    """The checkpoint with what `--quantize` asks for: rounded at load, or checked to be so stored.

    Raises:
        UsageError: the checkpoint is quantized in another way, or not at all.
    """
    check_quantize(method)
    stored = _stored_name(checkpoint)
    if method is None or stored in _STORED.get(method, (method,)):
        if method == "marlin":
            log.info("marlin names kernels for GPUs; this %s checkpoint runs on ours", stored)
        return checkpoint
    if stored != "dense":
        raise UsageError(
            f"`--quantize {method}` does not fit the checkpoint, which is quantized with {stored}",
            hint="leave --quantize away: quantized checkpoints are recognized by themselves",
        )
    if method in _STORED:
        wanted = " or ".join(_STORED[method])
        raise UsageError(
            f"`--quantize {method}` wants a checkpoint in {wanted}, and this one is not quantized",
            hint="`tgi quantize` writes one; int8, int4 and others need none: "
            f"{', '.join(METHODS)}",
        )
    return checkpoint.quantized_at_load(method)


def _stored_name(checkpoint: Checkpoint) -> str:
    """What `--quantize` calls the form in which a checkpoint is stored."""
    name = checkpoint.format.name
    config = checkpoint.config.get("quantization_config") or {}
    if name == "bitsandbytes" and not config.get("load_in_8bit"):
        return f"{name}-{config.get('bnb_4bit_quant_type', 'fp4')}"
    return name


def with_activations(checkpoint: Checkpoint, config: EngineConfig, backend: Backend) -> Checkpoint:
    """The checkpoint as it is to be held: quantized if asked, packed where kernels multiply it so.

    `auto` rounds activations to int8 where the weights are integers and native kernels will run.

    Raises:
        UsageError: int8 is asked for and impossible, an unknown name, or a quantization that does
            not fit the checkpoint.
    """
    checkpoint = quantized_as_asked(checkpoint, config.model.quantize)
    asked = config.model.activation_dtype
    if asked not in _CHOICES:
        raise UsageError(f"unknown activation dtype `{asked}`", hint=f"use {', '.join(_CHOICES)}")
    dtype = resolve_dtype(config.model.dtype, checkpoint.stored_dtype, backend.device)
    reason = (
        backend.reason_against(checkpoint.spec, dtype, config.cache.block_size)
        if checkpoint.quantized
        else "its weights are not quantized in a form that such kernels multiply"
    )
    if reason is None:
        checkpoint = checkpoint.keeping_blocks(wide_activations=asked == "bfloat16")
        if not checkpoint.rounds_activations:
            reason = "its weights are floats of 4 or 8 bits, which multiply 16-bit activations"
    if asked == "int8" and reason is not None:
        raise UsageError(
            f"int8 activations cannot be used for this model: {reason}",
            hint="leave --activation-dtype away",
        )
    return checkpoint
