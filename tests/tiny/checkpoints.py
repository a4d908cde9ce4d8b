"""Checkpoints of every family with every parameter random, biases and norm weights included.

Initial weights of `transformers` would hide mistakes: norms of one, biases of zero, and logits so
close together that a wrong term changes no token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny.tokenizers import END_OF_TEXT, TURN_END, VOCAB_SIZE, make_tokenizer

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": TURN_END,
    "pad_token_id": END_OF_TEXT,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Family, or variant of one, to configuration class and what it sets beside `_SHAPE`.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-biased-tied": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "llama-rope-llama3": (LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"sliding_window": 20, "num_hidden_layers": 3}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 10,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 30.0,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
            ],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            },
        },
    ),
}


def make_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A `transformers` model in float32 with every parameter drawn anew."""
    config_class, values = FAMILIES[family]
    config = config_class(**{**_SHAPE, **values, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Gemma stores norm weights minus one; the others scale by the weight itself.
            centre = 1.0 if "norm" in name and config.model_type != "gemma3_text" else 0.0
            parameter.copy_(centre + 0.2 * noise)
    model.generation_config = GenerationConfig(
        eos_token_id=[TURN_END, END_OF_TEXT], pad_token_id=END_OF_TEXT
    )
    return model


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write weights, configuration, generation configuration and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(family, seed=seed, **overrides).to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
