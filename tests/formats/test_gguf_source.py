"""GGUF files as Hugging Face tensors: against the original model and against `transformers`."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGUFReader,
    dequantize,
    get_tensor_name_map,
)
from gguf import GGMLQuantizationType as Type

from tests.formats.gguf_models import (
    HIDDEN,
    LAYERS,
    TinyModel,
    converted,
    interleaved,
    metadata,
    tiny_model,
    write,
    write_blocks,
    write_model,
)
from tgi_cli.demo_model import demo_model_path
from tgi_cli.errors import CheckpointError, TgiError, UnsupportedModel
from tgi_cli.model.gguf_config import hf_config
from tgi_cli.model.gguf_source import GgufSource
from tgi_cli.quantize.formats import detect
from tgi_cli.quantize.formats.base import WHOLE, Shard
from tgi_cli.quantize.formats.gguf import GgufFormat


def transformers_state(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model.state_dict()


def test_every_value_equals_the_original_model(model: TinyModel, tmp_path: Path) -> None:
    source = GgufSource(write_model(tmp_path / "m.gguf", model))
    assert set(source.keys()) == set(model.state)
    assert len(source) == len(model.state)
    for key, expected in model.state.items():
        assert source.shape(key) == tuple(expected.shape)
        assert source.nbytes(key) == expected.numel() * 4
        assert torch.equal(source.read(key), expected), key


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.F16], ids=lambda kind: kind.name)
def test_every_value_equals_what_transformers_loads(
    model: TinyModel, kind: Type, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m.gguf", model, kind)
    source = GgufSource(path)
    state = transformers_state(path)
    # transformers forgets that a Llama can have biases; all else must be there.
    forgotten = set(source.keys()) - set(state)
    assert all(model.architecture == "llama" and key.endswith(".bias") for key in forgotten)
    for key in set(source.keys()) - forgotten:
        assert torch.equal(source.read(key).float(), state[key]), key


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q6_K"])
def test_matrices_load_through_the_format(name: str, llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if name == "Q6_K":  # the gguf package has no encoder for it
        generator = np.random.default_rng(0)
        raw = generator.integers(0, 100, (HIDDEN, 210), dtype=np.uint8)
        write_blocks(path, "blk.0.attn_output.weight", raw, Type.Q6_K)
    else:
        write_model(path, llama, Type[name])
    source = GgufSource(path)
    form = detect({}, source)
    assert isinstance(form, GgufFormat)
    assert form.covers(source, "model.layers.0.self_attn.o_proj.weight")
    key = "model.layers.0.self_attn.o_proj.weight"
    assert source.stored_dtype(key) == name
    whole = form.load(source, key, WHOLE, torch.bfloat16)
    assert whole.weight.dtype == torch.bfloat16
    assert torch.equal(whole.weight, source.read(key).bfloat16())
    assert (whole.out_features, whole.in_features) == source.shape(key)
    for dim in (0, 1):
        parts = [form.load(source, key, Shard(dim, rank, 4), torch.bfloat16) for rank in range(4)]
        assert torch.equal(torch.cat([part.weight for part in parts], dim), whole.weight)
    fused = form.fuse([whole, whole])
    assert (fused.out_features, fused.in_features) == (2 * whole.out_features, whole.in_features)


def test_reordered_rows_shard_like_the_whole(llama: TinyModel, tmp_path: Path) -> None:
    source = GgufSource(write_model(tmp_path / "m.gguf", llama, Type.Q8_0))
    for name in ("q_proj", "k_proj"):
        key = f"model.layers.1.self_attn.{name}.weight"
        for dim in (0, 1):
            parts = [source.read(key, Shard(dim, rank, 2)) for rank in range(2)]
            assert torch.equal(torch.cat(parts, dim), source.read(key))


def test_reading_gives_dense_types_as_stored(llama: TinyModel, tmp_path: Path) -> None:
    source = GgufSource(write_model(tmp_path / "m.gguf", llama, Type.BF16))
    assert source.read("model.embed_tokens.weight").dtype == torch.bfloat16
    assert source.read("model.norm.weight").dtype == torch.float32


def test_parts_of_a_split_file_are_one_checkpoint(llama: TinyModel, tmp_path: Path) -> None:
    tensors = list(converted(llama).items())
    cut = len(tensors) // 2
    first = tmp_path / "m-00001-of-00002.gguf"
    second = tmp_path / "m-00002-of-00002.gguf"
    write(first, "llama", metadata(llama), dict(tensors[:cut]))
    write(second, "llama", {}, dict(tensors[cut:]))
    for given in (first, second):
        source = GgufSource(given)
        assert set(source.keys()) == set(llama.state)
        assert hf_config(source)["num_hidden_layers"] == LAYERS
        assert torch.equal(source.read("model.norm.weight"), llama.state["model.norm.weight"])
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.*missing \(1 of 2 parts"):
        GgufSource(first)


def test_unknown_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "rwkv7", {}, {"token_embd.weight": np.zeros((4, 32))})
    with pytest.raises(UnsupportedModel, match=r"`rwkv7`.*gemma3, llama, qwen2, qwen3"):
        GgufSource(path)


def test_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 32), np.float32)}
    path = write(tmp_path / "m.gguf", "llama", {}, experts)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_gate_exps\.weight"):
        GgufSource(path)


def test_unknown_type_is_refused_by_name(tmp_path: Path) -> None:
    raw = np.zeros((4, GGML_QUANT_SIZES[Type.IQ2_XS][1]), np.uint8)
    path = write_blocks(tmp_path / "m.gguf", "blk.0.attn_v.weight", raw, Type.IQ2_XS)
    with pytest.raises(UnsupportedModel, match=r"attn_v.*IQ2_XS.*Q4_K.*IQ4_NL"):
        GgufSource(path)


def test_missing_tensor_and_wrong_rank(llama: TinyModel, tmp_path: Path) -> None:
    source = GgufSource(write_model(tmp_path / "m.gguf", llama))
    assert "model.nothing.weight" not in source
    with pytest.raises(CheckpointError, match=r"`model\.nothing\.weight` is missing"):
        source.read("model.nothing.weight")
    with pytest.raises(CheckpointError, match=r"`model\.norm\.weight` has shape \(64,\)"):
        GgufFormat().load(source, "model.norm.weight", WHOLE, torch.float32)


def test_heads_that_do_not_divide_the_rows(llama: TinyModel, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", llama, **{"attention.head_count": 5})
    with pytest.raises(CheckpointError, match=r"64 rows.*head_count` = 5"):
        GgufSource(path).read("model.layers.0.self_attn.q_proj.weight")


def test_truncated_files_name_needed_and_actual_bytes(llama: TinyModel, tmp_path: Path) -> None:
    whole = write_model(tmp_path / "m.gguf", llama).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"(?s)truncated.*tensor.*{len(whole) // 2}"):
        GgufSource(cut)
    for size in [0, 3, 4, 8, 23, *range(24, 4000, 97), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            GgufSource(cut)


def test_damaged_headers_raise_nothing_but_known_faults(llama: TinyModel, tmp_path: Path) -> None:
    whole = write_model(tmp_path / "m.gguf", llama, Type.Q8_0).read_bytes()
    header = whole.index(b"output_norm.weight") + 2000
    rng = random.Random(0)
    refused = 0
    path = tmp_path / "bad.gguf"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(4, header)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            source = GgufSource(path)
            hf_config(source)
            for key in set(source.keys()):
                source.read(key)
        except TgiError:
            refused += 1
    assert refused > 50


@pytest.mark.real_model
def test_demo_model_equals_what_the_gguf_package_decodes() -> None:
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not in the cache folder; `tgi download demo` puts it there")
    source = GgufSource(path)
    config = hf_config(source)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for key in set(source.keys()):
        tensor = stored.pop(names.get_name(key, try_suffixes=(".weight",)))
        found = source.read(key).float().numpy()
        part = key.split(".")[-2]
        if part in heads:
            found = interleaved(found, heads[part])
        assert np.array_equal(found, dequantize(tensor.data, tensor.tensor_type)), key
    assert not stored


def test_gemma_norms_lose_the_added_one(tmp_path: Path) -> None:
    gemma = tiny_model("gemma3")
    stored = converted(gemma)["blk.0.attn_q_norm.weight"]
    source = GgufSource(write_model(tmp_path / "m.gguf", gemma))
    packed = source.packed("model.layers.0.self_attn.q_norm.weight")
    assert torch.equal(packed.unpack() + 1, torch.from_numpy(stored))
