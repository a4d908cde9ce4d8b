"""Tiny GGUF checkpoints, converted from `transformers` models the way llama.cpp converts them.

Names come from the `gguf` package's own map, so they do not depend on the tables under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

VOCAB = 96
HIDDEN = 64
HEADS, KV_HEADS = 4, 2
CONTEXT = 512
LAYERS = 7  # Gemma's pattern needs more than six
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class TinyModel:
    """A model as `transformers` holds it, and the GGUF architecture it converts to."""

    architecture: str
    config: Any
    state: dict[str, torch.Tensor]


def tiny_model(family: str, **sizes: int) -> TinyModel:
    """A randomly initialized model whose every parameter, norms and biases too, is perturbed.

    `sizes` replace those of `SHAPE`; heads, layers and vocabulary stay.
    """
    import transformers as hf

    cls, architecture, extra = {
        "llama": (hf.LlamaConfig, "llama", {"tie_word_embeddings": False}),
        "llama-bias": (hf.LlamaConfig, "llama", {"attention_bias": True, "mlp_bias": True}),
        "mistral": (hf.MistralConfig, "llama", {"sliding_window": 32, "head_dim": 32}),
        "qwen2": (hf.Qwen2Config, "qwen2", {"tie_word_embeddings": True}),
        "qwen3": (hf.Qwen3Config, "qwen3", {"head_dim": 128, "tie_word_embeddings": False}),
        "gemma3": (hf.Gemma3TextConfig, "gemma3", {"head_dim": 32, "sliding_window": 64}),
    }[family]
    if family == "gemma3":
        extra["query_pre_attn_scalar"] = 32
    config = cls(**{**SHAPE, **extra, **sizes})
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # A coarse grid makes adding and taking off Gemma's one exact.
            noise = (noise * 64).round() / 1024 if "norm" in name else noise * 0.1
            parameter.add_(noise)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return TinyModel(architecture, config, state)


def converted(model: TinyModel) -> dict[str, np.ndarray[Any, Any]]:
    """The model's tensors under GGUF names and with llama.cpp's changes to values."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.architecture)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    tensors = {}
    for key, tensor in model.state.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        values = tensor.numpy()
        if model.architecture == "llama" and ".q_proj." in key:
            values = interleaved(values, HEADS)
        if model.architecture == "llama" and ".k_proj." in key:
            values = interleaved(values, KV_HEADS)
        if model.architecture == "gemma3" and key.endswith("norm.weight"):
            values = values + 1
        tensors[name] = np.ascontiguousarray(values)
    return tensors


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head as ggml's rope pairs them: first of both halves, second of both, ..."""
    dim = rows.shape[0] // heads
    order = [
        head * dim + half * (dim // 2) + i
        for head in range(heads)
        for i in range(dim // 2)
        for half in (0, 1)
    ]
    return rows[order]


def metadata(model: TinyModel) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for the model, values typed as it does."""
    config, arch = model.config, model.architecture
    head_dim = getattr(config, "head_dim", None) or HIDDEN // HEADS
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    keys: dict[str, Any] = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
    }
    if arch == "llama":
        keys |= {f"{arch}.vocab_size": VOCAB, f"{arch}.rope.dimension_count": head_dim}
    if head_dim != HIDDEN // HEADS or arch == "gemma3":
        keys |= {
            f"{arch}.attention.key_length": head_dim,
            f"{arch}.attention.value_length": head_dim,
        }
    if getattr(config, "sliding_window", None):
        keys[f"{arch}.attention.sliding_window"] = config.sliding_window
    return keys


def write(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray[Any, Any]],
    kind: Type | Callable[[str], Type] = Type.F32,
    tokens: list[str] | None = None,
) -> Path:
    """Write a GGUF file; matrices are stored as `kind` (by GGUF name), vectors as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens or [f"t{index}" for index in range(VOCAB)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, values in tensors.items():
        if values.ndim == 1:
            writer.add_tensor(name, values.astype(np.float32))
            continue
        stored = kind if isinstance(kind, Type) else kind(name)
        if stored is Type.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path, model: TinyModel, kind: Type | Callable[[str], Type] = Type.F32, **changed: Any
) -> Path:
    """Write a model; `changed` replaces or adds keys below the architecture's prefix."""
    keys = metadata(model)
    keys |= {f"{model.architecture}.{key}": value for key, value in changed.items()}
    return write(path, model.architecture, keys, converted(model), kind)


def write_blocks(path: Path, name: str, raw: np.ndarray[Any, Any], kind: Type) -> Path:
    """Write a file of one tensor whose stored bytes are given."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
