"""GGUF metadata as `config.json`: against the original config and what `transformers` derives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.formats.gguf_models import (
    HIDDEN,
    LAYERS,
    VOCAB,
    TinyModel,
    converted,
    metadata,
    tiny_model,
    write,
    write_model,
)
from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.model.gguf_config import hf_config
from tgi_cli.model.gguf_source import GgufSource

SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def config_of(path: Path) -> dict[str, Any]:
    return hf_config(GgufSource(path))


def test_a_transformers_config_made_of_it_equals_the_original(
    model: TinyModel, tmp_path: Path
) -> None:
    found = config_of(write_model(tmp_path / "m.gguf", model))
    rebuilt = type(model.config)(**found).to_dict()
    original = model.config.to_dict()
    if original.get("head_dim") is None:
        original["head_dim"] = HIDDEN // model.config.num_attention_heads
    if model.config.model_type == "qwen2":
        rebuilt.setdefault("head_dim", found["head_dim"])
    # What a file cannot say: how weights were initialized, who wrote them.
    silent = {"initializer_range", "architectures", "dtype", "transformers_version"}
    assert {k: v for k, v in rebuilt.items() if k not in silent} == {
        k: v for k, v in original.items() if k not in silent
    }
    assert found["model_type"] == model.config.model_type
    import transformers

    assert hasattr(transformers, found["architectures"][0])


def test_agrees_with_what_transformers_derives(model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoConfig

    path = write_model(tmp_path / "m.gguf", model)
    found = config_of(path)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    for key in SHAPE_KEYS:
        # Ours is the decimal that was rounded to float32, theirs the rounded number.
        assert found[key] == pytest.approx(theirs[key], rel=1e-6), key
    rope = theirs["rope_parameters"]
    assert found["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    if model.architecture == "gemma3":
        assert found["layer_types"] == theirs["layer_types"]
        assert found["sliding_window"] == theirs["sliding_window"]


def test_float32_values_become_the_decimals_they_were(llama: TinyModel, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", llama, **{"attention.layer_norm_rms_epsilon": 1e-5})
    assert config_of(path)["rms_norm_eps"] == 1e-5


def test_output_projection_decides_about_tying(tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert not config_of(write_model(tmp_path / "a.gguf", model))["tie_word_embeddings"]
    del model.state["lm_head.weight"]
    assert config_of(write_model(tmp_path / "b.gguf", model))["tie_word_embeddings"]


def test_embedding_rows_count_and_not_the_token_list(llama: TinyModel, tmp_path: Path) -> None:
    keys = metadata(llama)
    path = write(tmp_path / "m.gguf", "llama", keys, converted(llama), tokens=["a", "b", "c"])
    assert config_of(path)["vocab_size"] == VOCAB


def test_every_token_that_ends_a_turn_is_an_end_token(llama: TinyModel, tmp_path: Path) -> None:
    tokens = [f"t{index}" for index in range(VOCAB)]
    tokens[7], tokens[9], tokens[2] = "<end_of_turn>", "<|eot_id|>", "<|im_end|>"
    keys = metadata(llama) | {"tokenizer.ggml.eot_token_id": 5}
    path = write(tmp_path / "m.gguf", "llama", keys, converted(llama), tokens=tokens)
    assert config_of(path)["eos_token_id"] == [2, 5, 7, 9]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling(
    changed: dict[str, Any], expected: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    assert config_of(write_model(tmp_path / "m.gguf", model, **changed))["rope_scaling"] == expected


def llama3_factors(model: TinyModel, **scaling: float) -> np.ndarray[Any, Any]:
    """The divisors that `transformers`' own initialization of the scaled rope implies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": model.config.rope_parameters["rope_theta"]}
    config = LlamaConfig(**model.config.to_dict() | {"rope_parameters": rope | scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dim = HIDDEN // 4
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
    return (plain / scaled).numpy().astype(np.float32)


def test_llama3_scaling_is_read_from_its_table(llama: TinyModel, tmp_path: Path) -> None:
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(llama, **scaling)
    assert len(set(factors.tolist())) > 1, "the case must have more than one factor"
    tensors = converted(llama) | {"rope_freqs.weight": factors}
    path = write(tmp_path / "m.gguf", "llama", metadata(llama), tensors)
    assert config_of(path)["rope_scaling"] == {"rope_type": "llama3"} | scaling
    assert "rope_freqs.weight" not in set(GgufSource(path).keys())

    tensors["rope_freqs.weight"] = np.linspace(1, 3, len(factors), dtype=np.float32)
    path = write(tmp_path / "other.gguf", "llama", metadata(llama), tensors)
    with pytest.raises(UnsupportedModel, match=r"rope factors of `other\.gguf` \(largest 3\.0\)"):
        config_of(path)


def test_gemma_reads_its_pattern_its_scale_and_its_softcaps(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    plain = config_of(write_model(tmp_path / "a.gguf", model))
    assert plain["layer_types"] == ["sliding_attention"] * 5 + [
        "full_attention",
        "sliding_attention",
    ]
    assert plain["query_pre_attn_scalar"] == 32
    assert plain["final_logit_softcapping"] is None
    changed = {
        "attention.sliding_window_pattern": 2,
        "final_logit_softcapping": 30.0,
        "rope.freq_base_swa": 5000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    found = config_of(write_model(tmp_path / "b.gguf", model, **changed))
    assert found["layer_types"] == (["sliding_attention", "full_attention"] * LAYERS)[:LAYERS]
    assert found["final_logit_softcapping"] == 30.0
    assert found["rope_local_base_freq"] == 5000.0
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    listed = [True, False, False, True, True, True, False]
    changed = {"attention.sliding_window_pattern": listed}
    found = config_of(write_model(tmp_path / "c.gguf", model, **changed))
    assert [kind == "sliding_attention" for kind in found["layer_types"]] == listed


@pytest.mark.parametrize(
    ("changed", "fault", "text"),
    [
        ({"logit_scale": 0.5}, UnsupportedModel, r"sets `llama\.logit_scale` to 0\.5"),
        ({"attention.value_length": 8}, UnsupportedModel, r"value_length` to 8 with heads of 16"),
        ({"rope.dimension_count": 8}, UnsupportedModel, r"dimension_count` to 8 with heads of 16"),
        ({"rope.scaling.type": "longrope"}, UnsupportedModel, "rope scaling `longrope`"),
        ({"attention.causal": False}, UnsupportedModel, "is an encoder"),
        ({"block_count": 0}, CheckpointError, r"block_count`.* is 0; a positive integer"),
        ({"embedding_length": "x"}, CheckpointError, r"embedding_length`.* is 'x'"),
        ({"rope.freq_base": -1.0}, CheckpointError, r"freq_base`.* is -1\.0; a positive number"),
        (
            {"feed_forward_length": [96] * 6 + [64]},
            UnsupportedModel,
            r"different `llama\.feed_forward_length` in each layer",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(
    changed: dict[str, Any], fault: type[Exception], text: str, llama: TinyModel, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m.gguf", llama, **changed)
    with pytest.raises(fault, match=text):
        config_of(path)


def test_missing_key_is_named(llama: TinyModel, tmp_path: Path) -> None:
    keys = metadata(llama)
    del keys["llama.context_length"]
    path = write(tmp_path / "m.gguf", "llama", keys, converted(llama))
    with pytest.raises(CheckpointError, match=r"`llama\.context_length` of `m\.gguf` is missing"):
        config_of(path)


def test_zero_valued_keys_of_other_variants_are_harmless(llama: TinyModel, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", llama, expert_count=0, expert_used_count=0)
    assert config_of(path)["model_type"] == "llama"
