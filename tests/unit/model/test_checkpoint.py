"""Opening and building checkpoints: facts from headers, and faults named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import FAMILIES, make_model
from tgi_cli.errors import CheckpointError, UnsupportedModel, UsageError
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder

Checkpoints = Callable[..., Path]


def edited(path: Path, to: Path, **changes: Any) -> Path:
    """A copy with other configuration values."""
    shutil.copytree(path, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def with_tensors(path: Path, to: Path, **tensors: torch.Tensor) -> Path:
    """A copy with tensors added; `__` in a name stands for a dot."""
    shutil.copytree(path, to)
    stored = load_file(to / "model.safetensors")
    added = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(stored | added, to / "model.safetensors")
    return to


def build(path: Path, **options: Any) -> Decoder:
    return Decoder.build(open_checkpoint(str(path)), select("cpu"), torch.float32, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_from_headers(family: str, tiny_checkpoint: Checkpoints) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    expected = sum(part.numel() for part in make_model(family).parameters())
    assert checkpoint.num_parameters == expected
    ropes = {layer.attention.rope for layer in checkpoint.spec.layers}
    tables = sum(rope.max_positions * rope.head_dim for rope in ropes)
    assert checkpoint.weights_bytes(torch.bfloat16) == 2 * (expected + tables)
    assert checkpoint.weights_bytes(torch.float32) == 4 * (expected + tables)


def test_facts(tiny_checkpoint: Checkpoints) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("qwen3", dtype=torch.bfloat16)))
    assert checkpoint.architecture == "Qwen3ForCausalLM"
    assert checkpoint.stored_dtype == torch.bfloat16
    assert checkpoint.vocab_size == 512
    assert checkpoint.max_position_embeddings == 512
    assert checkpoint.eos_token_ids == (2, 0)
    assert checkpoint.config["model_type"] == "qwen3"


def test_end_tokens_fall_back_to_the_configuration(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = edited(tiny_checkpoint("llama"), tmp_path / "model", eos_token_id=7)
    assert open_checkpoint(str(path)).eos_token_ids == (2, 0)
    (path / "generation_config.json").unlink()
    assert open_checkpoint(str(path)).eos_token_ids == (7,)
    path = edited(path, tmp_path / "none", eos_token_id=None)
    assert open_checkpoint(str(path)).eos_token_ids == ()


def test_progress_rises_to_one(tiny_checkpoint: Checkpoints) -> None:
    seen: list[float] = []
    build(tiny_checkpoint("llama"), progress=seen.append)
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[0] > 0
    assert seen[-1] == 1.0


def test_tensors_without_a_place_are_refused(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    stray = "model__layers__0__self_attn__q_proj__bias"
    path = with_tensors(tiny_checkpoint("llama"), tmp_path / "bias", **{stray: torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"1 tensors .*layers\.0\.self_attn\.q_proj\.bias"):
        build(path)
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    build(with_tensors(tiny_checkpoint("llama"), tmp_path / "rope", **{name: torch.ones(8)}))


def test_a_repeated_head_is_shared_and_another_one_is_used(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = tiny_checkpoint("qwen2")
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    hidden = torch.ones(1, 64)
    tied = build(path).logits(hidden)
    same = build(with_tensors(path, tmp_path / "same", lm_head__weight=table.clone()))
    assert torch.equal(same.logits(hidden), tied)
    assert not hasattr(same.head, "weight")
    other = build(with_tensors(path, tmp_path / "other", lm_head__weight=2 * table))
    assert torch.equal(other.logits(hidden), 2 * tied)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 513}, r"embed_tokens.*\(512, 64\).*\(513, 64\)"),
        ({"intermediate_size": 95}, "mlp.gate_proj"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj"),
        ({"num_hidden_layers": 1}, "have no place"),
        ({"num_hidden_layers": 3}, "layers.2.* is missing"),
        ({"attention_bias": True}, "q_proj.bias` is missing"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    changes: dict[str, Any], named: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = edited(tiny_checkpoint("llama"), tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=named):
        build(path)


def test_paths_that_hold_no_model(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold an object"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.gguf file"):
        open_checkpoint(str(tmp_path / "config.json"))
    path = edited(tiny_checkpoint("llama"), tmp_path / "odd", architectures=["OddModel"])
    with pytest.raises(UnsupportedModel, match="OddModel"):
        open_checkpoint(str(path))


def test_another_length_fixes_the_rotary_tables(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = tiny_checkpoint("gemma3")
    short = open_checkpoint(str(path)).for_length(100)
    assert short.max_position_embeddings == 100
    assert {layer.attention.rope.max_positions for layer in short.spec.layers} == {100}
    with pytest.raises(UsageError, match=r"1,024 tokens .* made for 512"):
        open_checkpoint(str(path)).for_length(1024)
    stretching = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    path = edited(tiny_checkpoint("llama"), tmp_path / "dynamic", rope_parameters=stretching)
    assert open_checkpoint(str(path)).for_length(1024).max_position_embeddings == 1024
    with pytest.raises(UsageError, match="made for 1,024"):
        open_checkpoint(str(path)).for_length(1025)
