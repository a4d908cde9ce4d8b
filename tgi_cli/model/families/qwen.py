"""Qwen2 and Qwen2.5 (biases on q, k and v) and Qwen3 (norms on q and k)."""

from __future__ import annotations

from dataclasses import replace

from tgi_cli.model.config_reader import ConfigReader
from tgi_cli.model.families.layer_types import read_windows
from tgi_cli.model.families.rope import read_rope
from tgi_cli.model.spec import AttentionSpec, DecoderSpec, DenseSpec, LayerSpec, NormSpec


def read_qwen2(config: ConfigReader) -> DecoderSpec:
    """`Qwen2ForCausalLM`."""
    config.expect("use_mrope", False)
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", config.integer("hidden_size") // num_heads)
    return _decoder(config, num_heads, head_dim, qkv_bias=True)


def read_qwen3(config: ConfigReader) -> DecoderSpec:
    """`Qwen3ForCausalLM`."""
    bias = config.flag("attention_bias", False)
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", 128)
    qk_norm = NormSpec(config.number("rms_norm_eps", 1e-6))
    return _decoder(config, num_heads, head_dim, qkv_bias=bias, output_bias=bias, qk_norm=qk_norm)


def _decoder(
    config: ConfigReader,
    num_heads: int,
    head_dim: int,
    *,
    qkv_bias: bool,
    output_bias: bool = False,
    qk_norm: NormSpec | None = None,
) -> DecoderSpec:
    config.choice("hidden_act", ("silu",), "silu")
    num_layers = config.integer("num_hidden_layers")
    norm = NormSpec(config.number("rms_norm_eps", 1e-6))
    rope = read_rope(config, head_dim, config.integer("max_position_embeddings", 32_768))
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", 32),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
    )
    feed = DenseSpec(config.integer("intermediate_size"), "silu")
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_positions=rope.max_positions,
        layers=tuple(
            LayerSpec(replace(attention, window=window), feed, norm)
            for window in _windows(config, num_layers)
        ),
        norm=norm,
        tied_head=config.flag("tie_word_embeddings", False),
    )


def _windows(config: ConfigReader, num_layers: int) -> list[int | None]:
    """The first `max_window_layers` layers see everything, the others a window, if one is used."""
    window = config.optional_integer("sliding_window") or 4096
    first = config.integer("max_window_layers", 28, minimum=0)
    if not config.flag("use_sliding_window", False):
        config.expect("layer_types", ["full_attention"] * num_layers)
        return [None] * num_layers
    default = [None if layer < first else window for layer in range(num_layers)]
    return read_windows(config, window, default)
