"""GGUF metadata as the `config.json` that the original checkpoint had.

So families read one kind of configuration only. Values that the file does not state are llama.cpp's
defaults for the architecture; a key that nothing here reads is refused, because ignoring it could
change the model's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.gguf_metadata import GGUFMetadata
from tgi_cli.model.gguf_source import GgufSource

# Say nothing about the computation, or what a tensor's shape says better.
SILENT_KEYS = (
    "vocab_size",
    "tensor_data_layout",
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # read where a scaling uses it
)
# Tokens that end a turn in the chat formats of these families. Files often name only one end
# token in their metadata; llama.cpp stops at all of these, whatever the metadata says.
END_TOKENS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
)
# Original context lengths tried when the factors of Llama 3's rope are explained; 8192 is real.
LLAMA3_CONTEXTS = (8192, 4096, 16384, 32768, 2048, 1024)
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
GEMMA3_27B_LAYERS = 62
GEMMA3_PATTERN = 6  # every sixth layer attends to everything


class _Keys:
    """Typed reads below `general.architecture`'s prefix; remembers what was read."""

    def __init__(self, source: GgufSource) -> None:
        self.architecture = source.architecture
        self.name = source.path.name
        self._metadata: GGUFMetadata = source.metadata
        self._read: set[str] = set(SILENT_KEYS)

    def get(self, key: str) -> Any:
        """Any value, or None."""
        self._read.add(key)
        return self._metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; a per-layer list counts if all layers agree."""
        value = self.get(key)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedModel(
                f"`{self.name}` has a different `{self.architecture}.{key}` in each layer, which "
                "this build cannot run"
            )
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._bad(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that rounds to the stored float32."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise self._bad(key, value, "a positive number")
        return float(str(np.float32(value)))

    def refuse_unread(self) -> None:
        """Raise on a key of this architecture that was not read and is not zero."""
        prefix = f"{self.architecture}."
        for key in self._metadata:
            if not key.startswith(prefix) or key.removeprefix(prefix) in self._read:
                continue
            if value := self._metadata[key]:
                raise UnsupportedModel(
                    f"`{self.name}` sets `{key}` to {value!r}, which this build cannot honour",
                    hint="the model is a variant that this build cannot run from GGUF",
                )

    def _bad(self, key: str, value: object, wanted: str) -> CheckpointError:
        found = "is missing" if value is None else f"is {value!r}"
        return CheckpointError(
            f"`{self.architecture}.{key}` of `{self.name}` {found}; {wanted} is needed",
            hint="convert the model again with a current llama.cpp",
        )


def hf_config(source: GgufSource) -> dict[str, Any]:
    """Build the `config.json` dictionary of a GGUF checkpoint.

    Raises:
        CheckpointError: a needed key is missing or has an impossible value.
        UnsupportedModel: the file asks for something that no family here computes.
    """
    keys = _Keys(source)
    config = _common(source, keys)
    config |= FAMILIES[source.architecture](source, keys, config)
    keys.refuse_unread()
    return config


def _common(source: GgufSource, keys: _Keys) -> dict[str, Any]:
    """What every decoder has."""
    embedding = source.shape("model.embed_tokens.weight")
    hidden_size = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(1, hidden_size // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise UnsupportedModel(
                f"`{keys.name}` sets `{keys.architecture}.{key}` to {keys.get(key)} with heads of "
                f"{head_dim}; only equal sizes can be run"
            )
    if keys.get("attention.causal") is False:
        raise UnsupportedModel(f"`{keys.name}` is an encoder; only decoders generate text")
    theta = keys.number("rope.freq_base", 10_000.0)
    context = keys.integer("context_length")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(source, keys, theta, head_dim, context),
        "vocab_size": embedding[0],
        # The converter leaves the output projection out when it is the embedding.
        "tie_word_embeddings": "lm_head.weight" not in source,
        **_special_tokens(source.metadata),
    }


def _llama(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Llama, and Mistral, which files call `llama` too."""
    window = keys.get("attention.sliding_window")
    if window:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "sliding_window": window,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in source,
        "mlp_bias": "model.layers.0.mlp.down_proj.bias" in source,
    }


def _qwen2(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen3(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in source,
        "use_sliding_window": False,
    }


def _gemma3(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """The text part of Gemma 3; the key for the window's pattern came late, so it has a default."""
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    window = keys.get("attention.sliding_window") or None
    pattern = keys.get("attention.sliding_window_pattern") or GEMMA3_PATTERN
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if not isinstance(pattern, list) or len(pattern) < layers:
        raise CheckpointError(
            f"`gemma3.attention.sliding_window_pattern` of `{keys.name}` is {pattern!r}, which "
            f"does not cover {layers} layers"
        )
    scalar = head_dim
    if layers == GEMMA3_27B_LAYERS:  # the one size whose scale is not that of its heads
        scalar = config["hidden_size"] // config["num_attention_heads"]
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if window and sliding else "full_attention"
            for sliding in pattern[:layers]
        ],
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        **{key: keys.number(key) if keys.get(key) else None for key in softcaps},
    }


FAMILIES: Mapping[str, Callable[[GgufSource, _Keys, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}


def _special_tokens(metadata: GGUFMetadata) -> dict[str, Any]:
    """Ids of begin, padding and end; one end token as a number, several as a list."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    listed = [index for index, token in enumerate(tokens) if token in END_TOKENS]
    ends = list(dict.fromkeys([end for end in named if isinstance(end, int)] + listed))
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope_scaling(
    source: GgufSource, keys: _Keys, theta: float, head_dim: int, context: int
) -> dict[str, Any] | None:
    """Rope scaling in `config.json`'s words, or None."""
    # `scale_linear` is what files of 2023 call the factor; zero stands for none.
    stated = [key for key in ("rope.scaling.factor", "rope.scale_linear") if keys.get(key)]
    factor = keys.number(stated[0]) if stated else 1.0
    kind = keys.get("rope.scaling.type") or "linear"
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn") or (kind != "yarn" and attention != 1.0):
        raise UnsupportedModel(
            f"`{keys.name}` uses rope scaling `{kind}` (attention factor {attention}); from GGUF, "
            "`linear`, `yarn` and Llama 3's factors are supported"
        )
    if kind == "none":
        factor = 1.0
    if source.rope_freqs is not None:
        if factor != 1.0:
            raise UnsupportedModel(f"`{keys.name}` has both `{kind}` rope scaling and rope factors")
        return _llama3_scaling(source.rope_freqs, keys, theta, head_dim)
    if factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", context
        ),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if attention != 1.0:  # llama.cpp multiplies yarn's own factor, config.json replaces it
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _llama3_scaling(
    stored: Tensor, keys: _Keys, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Find the parameters behind the frequency divisors that the converter tabulated.

    Llama 3.1's scaling divides long wavelengths by `factor`, leaves short ones alone and blends in
    between. The table alone is in the file; the parameters that reproduce it are searched, and a
    table that none reproduces is refused.
    """
    factor = round(stored.max().item(), 3)
    if factor == 1.0:
        return None
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    named = keys.get("rope.scaling.original_context_length")
    for context in (named,) if named else LLAMA3_CONTEXTS:
        turns = context * frequencies / (2 * math.pi)
        blend = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
        divisors = 1 / ((1 - blend) / factor + blend)
        if stored.shape == divisors.shape and torch.allclose(stored.double(), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedModel(
        f"the rope factors of `{keys.name}` (largest {factor}) are not those of Llama 3's scaling",
        hint="use the safetensors checkpoint of the model",
    )
