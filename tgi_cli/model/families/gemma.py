"""Gemma 3 text models: norms around both parts, windows on most layers, two rotary bases."""

from __future__ import annotations

from dataclasses import replace

from tgi_cli.model.config_reader import ConfigReader
from tgi_cli.model.families.layer_types import read_windows
from tgi_cli.model.families.rope import rope_from
from tgi_cli.model.spec import (
    AttentionSpec,
    DecoderSpec,
    DenseSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
    TensorNames,
)

NAMES = TensorNames(
    after_attention="post_attention_layernorm.weight",
    before_feed="pre_feedforward_layernorm.weight",
    after_feed="post_feedforward_layernorm.weight",
)


def read_gemma3(config: ConfigReader) -> DecoderSpec:
    """`Gemma3ForCausalLM`, model type `gemma3_text`."""
    # `transformers` reads the key and leaves it without effect; no released model sets it.
    config.expect("attn_logit_softcapping")
    config.expect("use_bidirectional_attention", False)
    config.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    config.choice("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    hidden_size = config.integer("hidden_size", 2304)
    head_dim = config.integer("head_dim", 256)
    max_positions = config.integer("max_position_embeddings", 131_072)
    norm = NormSpec(config.number("rms_norm_eps", 1e-6), unit_offset=True)
    bias = config.flag("attention_bias", False)
    whole, local = _ropes(config, head_dim, max_positions)
    attention = AttentionSpec(
        num_heads=config.integer("num_attention_heads", 8),
        num_kv_heads=config.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        rope=whole,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=norm,
    )
    feed = DenseSpec(config.integer("intermediate_size", 9216), "gelu_tanh")
    layers = tuple(
        LayerSpec(
            attention=attention
            if window is None
            else replace(attention, rope=local, window=window),
            feed=feed,
            norm=norm,
            wiring="sandwich",
        )
        for window in _windows(config)
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size", 262_208),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=layers,
        norm=norm,
        tied_head=config.flag("tie_word_embeddings", True),
        embedding_scale=hidden_size**0.5,
        logit_softcap=config.optional_number("final_logit_softcapping"),
        names=NAMES,
    )


def _windows(config: ConfigReader) -> list[int | None]:
    """Every `sliding_window_pattern`-th layer sees everything, unless `layer_types` says."""
    window = config.integer("sliding_window", 4096)
    pattern = config.integer("_sliding_window_pattern", 6)
    pattern = config.integer("sliding_window_pattern", pattern)
    default = [
        None if (layer + 1) % pattern == 0 else window
        for layer in range(config.integer("num_hidden_layers", 26))
    ]
    return read_windows(config, window, default)


def _ropes(config: ConfigReader, head_dim: int, max_positions: int) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embeddings of the full and of the windowed layers."""
    theta = config.number("rope_theta", 1_000_000.0)
    local_theta = config.number("rope_local_base_freq", 10_000.0)
    older = config.section("rope_scaling")  # concerns the full layers only
    newer = config.section("rope_parameters")
    if newer is None:
        return (
            rope_from(older, head_dim, max_positions, theta),
            RopeSpec(local_theta, head_dim, max_positions),
        )
    whole = rope_from(newer.section("full_attention"), head_dim, max_positions, theta)
    local = rope_from(newer.section("sliding_attention"), head_dim, max_positions, local_theta)
    again = newer.section("rope_theta")  # GPT-QModel says both bases twice
    if again is not None:
        again.expect("global", whole.theta)
        again.expect("local", local.theta)
        again.finish()
    newer.expect("rope_type", "default")
    newer.finish()
    return whole, local
