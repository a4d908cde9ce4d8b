"""Number types of weights and activations, decided once, before the weights are read.

Quantized weights are multiplied by activations rounded to int8, or by 16-bit ones; that decides how
they are held. Knows no kernels.
"""

from __future__ import annotations

import torch

from tgi_cli.config import EngineConfig
from tgi_cli.errors import UsageError
from tgi_cli.kernels.backend import Backend
from tgi_cli.model.checkpoint import Checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHOICES = ("auto", "int8", "bfloat16")


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


def with_activations(checkpoint: Checkpoint, config: EngineConfig, backend: Backend) -> Checkpoint:
    """The checkpoint as it is to be held: quantized matrices kept as stored for int8 activations.

    `auto` takes int8 where the checkpoint is quantized and native kernels will run it.

    Raises:
        UsageError: int8 is asked for and impossible, or an unknown name.
    """
    asked = config.model.activation_dtype
    if asked not in _CHOICES:
        raise UsageError(f"unknown activation dtype `{asked}`", hint=f"use {', '.join(_CHOICES)}")
    if asked == "bfloat16":
        return checkpoint
    dtype = resolve_dtype(config.model.dtype, checkpoint.stored_dtype, backend.device)
    reason = (
        backend.reason_against(checkpoint.spec, dtype, config.cache.block_size)
        if checkpoint.quantized
        else "its weights are not quantized in a form that such kernels multiply"
    )
    if reason is None:
        return checkpoint.keeping_blocks()
    if asked == "int8":
        raise UsageError(
            f"int8 activations cannot be used for this model: {reason}",
            hint="leave --activation-dtype away",
        )
    return checkpoint
