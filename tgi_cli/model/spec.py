"""What a decoder is made of: frozen data whose fields select classes.

A family reads `config.json` into a `DecoderSpec`; the parts of `model/` build themselves from it.
Field budget: a field is here when two families need it or when it is an argument of a kernel;
anything rarer subclasses a part in its family's file. Knows no tensors and no devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norm. `unit_offset`: the checkpoint stores w and the row is scaled by 1 + w (Gemma)."""

    eps: float
    unit_offset: bool = False


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK scaling by length: the base grows once the length passes `original_length`.

    Resolved once, for `RopeSpec.max_positions`; a table that followed the running length would
    make a request's tokens depend on how far it has come.
    """

    factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): interpolation by wavelength, and cos and sin scaled."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions over the whole head. `max_positions` rows are tabulated at build."""

    theta: float
    head_dim: int
    max_positions: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `window` counts the keys a query sees, itself included."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None  # over each head, before the rotation
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: bool = False  # a learned logit for each head takes part in every softmax
    alibi: bool = False  # scores fall with distance, by a slope for each head


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """Gated feed-forward: down(activation(gate(x)) * up(x))."""

    intermediate_size: int
    activation: Literal["silu", "gelu_tanh"] = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer. `wiring` selects the class: norms before each part, or around each part."""

    attention: AttentionSpec
    feed: DenseSpec
    norm: NormSpec
    wiring: Literal["pre_norm", "sandwich"] = "pre_norm"


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names in the checkpoint, by role; those of a layer stand below `layer`."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{index}."
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    sinks: str = "self_attn.sinks"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    before_attention: str = "input_layernorm.weight"
    after_attention: str = ""  # sandwich wiring only
    before_feed: str = "post_attention_layernorm.weight"
    after_feed: str = ""  # sandwich wiring only
    #: Endings of names that may be in a checkpoint and are not needed: recomputed buffers.
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share block tables: same window, same size of a cached token."""

    window: int | None
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole decoder. `max_positions` is the longest context the checkpoint is made for."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    tied_head: bool
    embedding_scale: float | None = None
    logit_softcap: float | None = None
    names: TensorNames = field(default_factory=TensorNames)

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The groups, in the order of their first layers."""
        members: dict[tuple[int | None, int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            part = layer.attention
            members.setdefault((part.window, part.num_kv_heads, part.head_dim), []).append(index)
        return tuple(
            KVGroup(window, tuple(layers), heads, head_dim)
            for (window, heads, head_dim), layers in members.items()
        )

    def for_length(self, length: int) -> DecoderSpec:
        """The same decoder with rotary tables for exactly `length` positions.

        Dynamic scaling is resolved for it; the other tables are cut or continued.
        """
        layers = tuple(
            replace(
                layer,
                attention=replace(
                    layer.attention, rope=replace(layer.attention.rope, max_positions=length)
                ),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers, max_positions=length)
