"""Adapter folders that cannot be served, each refused with a sentence that names what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.adapters import make_adapter
from tgi_cli.config import AdapterConfig, AdapterSource
from tgi_cli.engine.lora import OpenedAdapters
from tgi_cli.errors import CheckpointError, TgiError, UnsupportedModel, UsageError
from tgi_cli.model.adapter_config import read_adapter_config
from tgi_cli.model.adapter_files import OpenedAdapter
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint

Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint("llama")))


@pytest.fixture(scope="module")
def good(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(Path(model.path), tmp_path_factory.mktemp("adapters") / "good")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return shutil.copytree(good, tmp_path / "adapter")


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_type": "IA3"}, "is an adapter of type 'IA3'; only LORA is served"),
        ({"use_dora": True}, "sets `use_dora`: DoRA cannot be served"),
        ({"bias": "lora_only"}, "sets `bias` to 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "sets `modules_to_save`: whole modules"),
        ({"lora_bias": True}, "sets `lora_bias`"),
        ({"trainable_token_indices": [1]}, "sets `trainable_token_indices`"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA cannot be served"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changes the base model too"),
        ({"sorcery": {"level": 3}}, "sets `sorcery`, which is not known here"),
    ],
)
def test_kinds_that_are_not_served(
    values: dict[str, Any], says: str, folder: Path, model: Checkpoint
) -> None:
    set_config(folder, **values)
    with pytest.raises(UnsupportedModel) as caught:
        OpenedAdapter(folder, model.spec)
    assert says in caught.value.message
    assert str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"r": 0}, "`r` is 0 but must be a positive integer"),
        ({"r": None}, "`r` is None"),
        ({"lora_alpha": "16"}, "`lora_alpha` is '16' but must be a number"),
        ({"rank_pattern": {"q_proj": 2.5}}, "`rank_pattern` is 2.5"),
        ({"r": 9}, "has shape (8, 96), but the model and `adapter_config.json` ask for (9, 96)"),
    ],
)
def test_numbers_that_cannot_be(
    values: dict[str, Any], says: str, folder: Path, model: Checkpoint
) -> None:
    set_config(folder, **values)
    with pytest.raises(CheckpointError) as caught:
        OpenedAdapter(folder, model.spec)
    assert says in caught.value.message


def test_tensors_without_a_place(folder: Path, model: Checkpoint) -> None:
    for name in (
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        "base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    ):
        change_tensors(folder, lambda tensors, name=name: tensors.update({name: torch.ones(8, 64)}))
        with pytest.raises(UnsupportedModel) as caught:
            OpenedAdapter(folder, model.spec)
        assert f"tensor `{name}`" in caught.value.message
        change_tensors(folder, lambda tensors, name=name: tensors.pop(name))


def test_a_misfit_names_the_tensor(folder: Path, model: Checkpoint) -> None:
    change_tensors(folder, lambda t: t.update({Q.format("B"): torch.ones(48, 8)}))
    with pytest.raises(CheckpointError) as caught:
        OpenedAdapter(folder, model.spec)
    assert f"tensor `{Q.format('B')}`" in caught.value.message
    assert "has shape (48, 8)" in caught.value.message
    assert "ask for (64, 8)" in caught.value.message


def test_half_a_pair(folder: Path, model: Checkpoint) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(Q.format("B")))
    with pytest.raises(CheckpointError, match=r"lacks `.*layers.1.self_attn.q_proj.lora_B.weight`"):
        OpenedAdapter(folder, model.spec)


def test_missing_and_broken_files(folder: Path, model: Checkpoint, tmp_path: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        OpenedAdapter(folder, model.spec)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        OpenedAdapter(folder, model.spec)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold an object"):
        OpenedAdapter(folder, model.spec)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json, so it is no adapter"):
        OpenedAdapter(tmp_path, model.spec)


def test_names_of_other_wrappers_are_understood(
    good: Path, folder: Path, model: Checkpoint
) -> None:
    """Adapters trained on a vision model's text part have its prefix."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            other = name.replace(".model.model.", ".model.model.language_model.")
            tensors[other] = tensors.pop(name)

    change_tensors(folder, rename)
    part = model.partition(0, 1)
    one, two = (
        OpenedAdapter(path, model.spec).load(part, torch.float32, torch.device("cpu"))
        for path in (good, folder)
    )
    assert one.parts.keys() == two.parts.keys()
    for place, parts in one.parts.items():
        for mine, theirs in zip(parts, two.parts[place], strict=True):
            assert torch.equal(mine.b, theirs.b)


def test_patterns_and_scales(folder: Path) -> None:
    set_config(
        folder, r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*": 3}
    )
    config = read_adapter_config(folder)
    assert config.scale_of("model.layers.0.self_attn.k_proj") == 2.0
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 4.0
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 1.5
    assert config.max_rank == 4
    set_config(folder, use_rslora=True)
    assert read_adapter_config(folder).scale_of("model.layers.0.self_attn.k_proj") == 4.0


def opened(folder: Path, model: Checkpoint, **options: Any) -> OpenedAdapters:
    return OpenedAdapters(
        AdapterConfig(adapters=(AdapterSource("mine", str(folder)),), **options), model
    )


def test_errors_name_the_adapter_and_ranks_have_a_limit(folder: Path, model: Checkpoint) -> None:
    assert opened(folder, model, max_rank=8).names == ("mine",)
    with pytest.raises(UsageError, match="adapter `mine` has rank 8, more than --max-lora-rank 7"):
        opened(folder, model, max_rank=7)
    set_config(folder, use_dora=True)
    with pytest.raises(TgiError, match=r"^adapter `mine`: .*DoRA"):
        opened(folder, model)


def test_bytes_are_those_that_are_held(folder: Path, model: Checkpoint) -> None:
    adapter = OpenedAdapter(folder, model.spec)
    for world_size in (1, 2):
        for rank in range(world_size):
            part = model.partition(rank, world_size)
            held = adapter.load(part, torch.bfloat16, torch.device("cpu"))
            assert adapter.nbytes(torch.bfloat16, part) == held.nbytes > 0


def test_another_base_is_warned_about(
    folder: Path, model: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    set_config(folder, base_model_name_or_path="org/other-7b")
    opened(folder, model).warn_of_other_bases("somebody/Other-7B")
    assert caplog.messages == []
    opened(folder, model).warn_of_other_bases("org/mine")
    assert caplog.messages == [
        "adapter `mine` says it was trained on `org/other-7b`, and this is `org/mine`"
    ]
