"""Adapters for tiny checkpoints, made and saved by PEFT, with both matrices random."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers.models.auto import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def _peft() -> Iterator[None]:
    """PEFT asks `transformers` for attributes that are about to be renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def make_adapter(
    model: Path, folder: Path, *, seed: int = 0, scale: float = 0.3, **settings: Any
) -> Path:
    """Save an adapter for the checkpoint at `model`; PEFT begins with a `lora_B` of zeros."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ALL, **settings}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with _peft():
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                bound = scale / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * bound)
    adapted.save_pretrained(folder)
    return folder


def adapted_model(model: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The oracle: `transformers` with the adapter on top."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    with _peft():
        return PeftModel.from_pretrained(base, str(adapter)).eval()


@torch.inference_mode()
def logits_of(model: PeftModel, tokens: list[int]) -> Tensor:
    """[tokens, vocab_size] float32."""
    return model(torch.tensor([tokens])).logits[0].float()
