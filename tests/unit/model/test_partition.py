"""Which part of each tensor a rank holds, and which numbers of ranks are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tgi_cli.errors import UsageError
from tgi_cli.model.partition import Partition
from tgi_cli.model.spec import (
    AttentionSpec,
    DecoderSpec,
    DenseSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)
from tgi_cli.quantize.formats.base import Shard


def spec(
    heads: int, kv_heads: int, head_dim: int = 64, feed: int = 1536, vocab: int = 49152
) -> DecoderSpec:
    rope = RopeSpec(theta=1e4, head_dim=head_dim, max_positions=64)
    attention = AttentionSpec(heads, kv_heads, head_dim, 0.125, rope)
    norm = NormSpec(1e-5)
    layer = LayerSpec(attention, DenseSpec(feed), norm)
    return DecoderSpec(vocab, heads * head_dim, 64, (layer, layer), norm, tied_head=True)


SMOLLM2 = spec(9, 3)
GEMMA = spec(4, 1, head_dim=256, feed=2048, vocab=262144)
LLAMA_1B = spec(32, 4, feed=5632)


def ungrouped(key: str) -> int:
    return 1


def grouped(size: int):  # type: ignore[no-untyped-def]
    return lambda key: size


def refusal(whole: DecoderSpec, world_size: int, unit: int = 1) -> tuple[str, str]:
    with pytest.raises(UsageError) as caught:
        Partition.of(whole, 0, world_size, grouped(unit))
    return caught.value.message, caught.value.hint or ""


def test_heads_in_the_way_are_named_with_the_number_that_works() -> None:
    message, hint = refusal(SMOLLM2, 2)
    assert message == (
        "the model does not divide into 2 shards: it has 9 attention heads and 3 key/value heads"
    )
    assert hint == "use --num-shard 3 (1, 3 and 9 work)"
    assert refusal(GEMMA, 3)[1] == "use --num-shard 4 (1, 2 and 4 work)"
    assert refusal(LLAMA_1B, 64)[1].startswith("use --num-shard 32 ")
    assert "64 attention heads" not in refusal(LLAMA_1B, 64)[0]
    assert "12 attention heads and 6 key/value heads" in refusal(spec(12, 6), 4)[0]
    assert refusal(spec(1, 1), 2)[1].startswith("leave --num-shard away")


def test_groups_in_the_way_are_named() -> None:
    message, hint = refusal(SMOLLM2, 3, unit=128)
    assert "the 3 of 9 heads of a shard have 192 features" in message
    assert "`model.layers.0.self_attn.o_proj` is quantized in groups of 128" in message
    assert hint.startswith("leave --num-shard away")
    message, hint = refusal(spec(32, 8, head_dim=128, feed=384), 8, unit=128)
    assert "its 384 feed-forward features are shared out 128 at a time" in message
    assert hint == "use --num-shard 2 (1 and 2 work)"


def test_key_value_heads_are_split_or_shared() -> None:
    for world_size, expected in (
        (2, [(0, 2), (2, 4)]),
        (8, [(i // 2, i // 2 + 1) for i in range(8)]),
    ):
        found = []
        for rank in range(world_size):
            part = Partition.of(LLAMA_1B, rank, world_size, ungrouped)
            found.append(part.shard("model.layers.1.self_attn.k_proj.weight").bounds(4))
            local = part.local.layers[0].attention
            assert local.num_heads == 32 // world_size
            assert local.num_kv_heads == max(1, 4 // world_size)
        assert found == expected


def test_shards_of_every_tensor_add_up() -> None:
    shapes = {
        "model.embed_tokens.weight": (49152, 576),
        "model.layers.0.self_attn.q_proj.weight": (576, 576),
        "model.layers.0.self_attn.q_proj.bias": (576,),
        "model.layers.0.self_attn.o_proj.weight": (576, 576),
        "model.layers.0.mlp.gate_proj.weight": (1536, 576),
        "model.layers.0.mlp.down_proj.weight": (576, 1536),
    }
    parts = [Partition.of(SMOLLM2, rank, 3, ungrouped) for rank in range(3)]
    for key, shape in shapes.items():
        whole = Partition(SMOLLM2)
        assert whole.shape(key, shape) == shape
        dim = 1 if ".o_proj" in key or ".down_proj" in key else 0
        assert sum(part.shape(key, shape)[dim] for part in parts) == shape[dim]
        assert all(part.shard(key).dim == dim for part in parts)
    for key in ("model.norm.weight", "model.layers.0.self_attn.o_proj.bias"):
        assert parts[1].shape(key, (576,)) == (576,)
    assert [part.first for part in parts] == [True, False, False]


def test_feed_forward_features_are_cut_between_groups() -> None:
    part = Partition.of(spec(32, 8, feed=5632), 3, 4, grouped(128))
    assert part.shard("model.layers.0.mlp.down_proj.weight").bounds(5632) == (33 * 128, 5632)
    sizes = [
        Partition.of(replace(GEMMA), rank, 4, ungrouped).local.layers[0].feed.intermediate_size
        for rank in range(4)
    ]
    assert sizes == [512] * 4


def test_vocabularies_need_not_divide() -> None:
    part = Partition.of(spec(9, 3, vocab=512), 1, 3, ungrouped)
    assert part.vocabulary == ((0, 170), (170, 341), (341, 512))


def test_bounds_without_a_unit_are_equal() -> None:
    assert Shard(0, 1, 2).bounds(6) == (3, 6)
    with pytest.raises(ValueError, match="7 does not divide into 2 shards"):
        Shard(0, 1, 2).bounds(7)
    assert [Shard(0, rank, 3, unit=4).bounds(30) for rank in range(3)] == [
        (0, 8),
        (8, 20),
        (20, 30),
    ]
