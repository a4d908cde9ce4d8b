"""Llama and everything built like it: SmolLM, TinyLlama, Yi, and Mistral with its window."""

from __future__ import annotations

from tgi_cli.model.config_reader import ConfigReader
from tgi_cli.model.families.rope import read_rope
from tgi_cli.model.spec import AttentionSpec, DecoderSpec, DenseSpec, LayerSpec, NormSpec


def read_llama(config: ConfigReader) -> DecoderSpec:
    """`LlamaForCausalLM`."""
    # SmolLM says of itself that it is a Llama with rotary pairs in halves, as here.
    config.expect("rope_interleaved", False)
    config.ignore("is_llama_config")
    bias = config.flag("attention_bias", False)
    return _uniform(config, window=None, bias=bias, mlp_bias=config.flag("mlp_bias", False))


def read_mistral(config: ConfigReader) -> DecoderSpec:
    """`MistralForCausalLM`: every layer sees `sliding_window` keys, or all where it is null."""
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    config.expect("layer_types")
    # An absent key means 4096 to `transformers`, an explicit null means no window.
    window = config.optional_integer("sliding_window")
    if not config.mentions("sliding_window"):
        window = 4096
    return _uniform(config, window=window, default_kv_heads=8)


def _uniform(
    config: ConfigReader,
    *,
    window: int | None,
    bias: bool = False,
    mlp_bias: bool = False,
    default_kv_heads: int | None = None,
) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    config.choice("hidden_act", ("silu",), "silu")
    norm = NormSpec(config.number("rms_norm_eps", 1e-6))
    rope = read_rope(config, head_dim, config.integer("max_position_embeddings", 2048))
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.integer("num_key_value_heads", default_kv_heads or num_heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope,
            window=window,
            qkv_bias=bias,
            output_bias=bias,
        ),
        feed=DenseSpec(config.integer("intermediate_size"), "silu", bias=mlp_bias),
        norm=norm,
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        max_positions=rope.max_positions,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm=norm,
        tied_head=config.flag("tie_word_embeddings", False),
    )
