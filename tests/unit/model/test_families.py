"""Published configurations are read; keys that change the mathematics are not passed over."""

from __future__ import annotations

from typing import Any

import pytest

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.model.families import FAMILIES, architecture_of, read_spec
from tgi_cli.model.spec import (
    DecoderSpec,
    LinearScaling,
    Llama3Scaling,
    NormSpec,
    YarnScaling,
)

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA_3_2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
PUBLISHED = [SMOLLM2, LLAMA_3_2, MISTRAL_V01, QWEN2_5, QWEN3, GEMMA_3]


def read(config: dict[str, Any], **changes: Any) -> DecoderSpec:
    config = config | changes
    return read_spec(config, architecture_of(config))


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["model_type"])
def test_published_configurations_are_read(config: dict[str, Any]) -> None:
    spec = read(config)
    assert spec.vocab_size == config["vocab_size"]
    assert spec.hidden_size == config["hidden_size"]
    assert spec.max_positions == config["max_position_embeddings"]
    assert len(spec.layers) == config["num_hidden_layers"]
    assert spec.tied_head is config.get("tie_word_embeddings", True)
    for layer in spec.layers:
        assert layer.attention.num_kv_heads == config["num_key_value_heads"]
        assert layer.norm.eps == config["rms_norm_eps"]


def test_what_distinguishes_the_families() -> None:
    llama, mistral, qwen2, qwen3 = (
        read(config).layers[0].attention for config in (LLAMA_3_2, MISTRAL_V01, QWEN2_5, QWEN3)
    )
    assert llama.rope.scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert llama.rope.theta == 500_000
    assert mistral.window == 4096
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert qwen2.window is None
    assert qwen3.qk_norm == NormSpec(1e-6)
    assert qwen3.head_dim == 128
    gemma = read(GEMMA_3)
    kinds = [layer.attention.window for layer in gemma.layers]
    assert kinds == [None if (i + 1) % 6 == 0 else 512 for i in range(26)]
    assert {layer.attention.rope.theta for layer in gemma.layers} == {10_000.0, 1_000_000.0}
    assert gemma.layers[5].attention.rope.theta == 1_000_000.0
    assert gemma.embedding_scale == 1152**0.5
    assert [(group.window, len(group.layers)) for group in gemma.kv_groups] == [
        (512, 22),
        (None, 4),
    ]


def test_window_of_mistral_absent_null_and_set() -> None:
    assert read(MISTRAL_V01, sliding_window=None).layers[0].attention.window is None
    assert read(without(MISTRAL_V01, "sliding_window")).layers[0].attention.window == 4096


def test_window_of_qwen2() -> None:
    spec = read(QWEN2_5, use_sliding_window=True, sliding_window=128)
    windows = [layer.attention.window for layer in spec.layers]
    assert windows == [None] * 21 + [128] * 3
    named = ["sliding_attention"] + ["full_attention"] * 23
    spec = read(QWEN2_5, use_sliding_window=True, sliding_window=128, layer_types=named)
    assert [layer.attention.window for layer in spec.layers] == [128] + [None] * 23


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_both_spellings_of_rope(spelling: str, kind: str) -> None:
    bare = without(QWEN2_5, "rope_theta", "rope_scaling")
    top = {"rope_theta": 5e5} if spelling == "rope_scaling" else {}
    scaling = {kind: "linear", "factor": 4.0}
    if spelling == "rope_parameters":
        scaling["rope_theta"] = 5e5
    rope = read(bare, **{spelling: scaling}, **top).layers[0].attention.rope
    assert rope.theta == 5e5
    assert rope.scaling == LinearScaling(4.0)


def test_bases_that_gpt_qmodel_writes_twice() -> None:
    bare = without(GEMMA_3, "rope_theta", "rope_local_base_freq")
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        "rope_theta": {"global": 1e6, "local": 1e4},
        "rope_type": "default",
    }
    layers = read(bare, rope_parameters=rope).layers
    assert (layers[0].attention.rope.theta, layers[5].attention.rope.theta) == (1e4, 1e6)
    for changed in ({"rope_theta": {"global": 1e6, "local": 2e4}}, {"rope_type": "linear"}):
        with pytest.raises(UnsupportedModel, match=r"local|rope_type"):
            read(bare, rope_parameters=rope | changed)


def test_yarn_extends_a_configuration_left_at_the_old_length() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    spec = read(QWEN2_5, rope_scaling=scaling)
    assert spec.max_positions == 131_072
    assert isinstance(spec.layers[0].attention.rope.scaling, YarnScaling)


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (SMOLLM2, {"attention_multiplier": 0.5}, "attention_multiplier"),
        (SMOLLM2, {"rope_interleaved": True}, "rope_interleaved"),
        (SMOLLM2, {"hidden_act": "gelu"}, "gelu"),
        (SMOLLM2, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        (SMOLLM2, {"rope_scaling": {"type": "linear", "factor": 2.0, "extra": 1}}, "extra"),
        (SMOLLM2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            SMOLLM2,
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {}},
            "both",
        ),
        (SMOLLM2, {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (MISTRAL_V01, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (QWEN2_5, {"use_mrope": True}, "use_mrope"),
        (QWEN2_5, {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        (GEMMA_3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA_3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_3, {"layer_types": ["linear_attention"] * 26}, "linear_attention"),
    ],
)
def test_other_mathematics_is_refused_by_name(
    config: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read(config, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "576"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"vocab_size": True}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
    ],
)
def test_values_of_the_wrong_kind_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(SMOLLM2, **changes)


def test_architectures_near_and_far() -> None:
    with pytest.raises(UnsupportedModel, match="similar names: LlamaForCausalLM") as raised:
        architecture_of({"architectures": ["Llama4ForCausalLM"]})
    assert raised.value.hint is not None
    assert all(name in raised.value.hint for name in FAMILIES)
    with pytest.raises(UnsupportedModel, match="`MambaModel` is not supported"):
        architecture_of({"architectures": ["MambaModel"]})
    with pytest.raises(UnsupportedModel):
        architecture_of({})
    assert architecture_of({"model_type": "qwen3"}) == "Qwen3ForCausalLM"
