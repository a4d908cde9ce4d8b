"""Whole conversions of tiny models of every family: what is written is what was measured.

The oracle is `transformers` with the written matrices, read back by the layouts' formulas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto import AutoModelForCausalLM

from tests.quantize.conversion import convert, job, samples
from tests.quantize.stored import dense, oracle, quantization, tensors
from tgi_cli.errors import OutOfMemory, UnsupportedModel, UsageError
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.weights import SafetensorsSource
from tgi_cli.quantize.convert.requirements import Requirements
from tgi_cli.quantize.methods.activations import round_fp8, round_int8

FAMILIES = ("llama", "llama-biased-tied", "mistral", "qwen2", "qwen3", "gemma3")
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32},
    "gptq-8-bit-rows": {"method": "gptq", "bits": 8, "group_size": -1},
    "gptq-compressed": {"method": "gptq", "group_size": 32, "layout": "compressed-tensors"},
    "awq": {"method": "awq", "group_size": 32},
    "fp8": {"method": "fp8"},
    "fp8-nearest": {"method": "fp8", "calibrated": False},
    "int8": {"method": "int8"},
}
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"fp8": round_fp8, "int8": round_int8}
#: Recipes that every family is converted with; the others differ in storage alone.
METHODS = ("gptq", "awq", "fp8", "int8")


@pytest.fixture(scope="module")
def converted(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`converted(family, recipe)`: original, folder and outcome, made once."""
    made: dict[tuple[str, str], Any] = {}

    def of(family: str, recipe: str) -> Any:
        if (family, recipe) not in made:
            original = tiny_checkpoint(family)
            folder = tmp_path_factory.mktemp("out") / recipe
            made[family, recipe] = (
                original, folder, convert(job(original, folder, **RECIPES[recipe]))
            )  # fmt: skip
        return made[family, recipe]

    return of


def perplexity(model: Any, tokens: Tensor, rounding: Callable[[Tensor], Tensor] | None) -> float:
    if rounding is not None:
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_pre_hook(
                        lambda _, args: (rounding(args[0].flatten(0, 1)).view_as(args[0]),)
                    )
    with torch.inference_mode():
        logs = model(tokens).logits[:, :-1].log_softmax(-1)
    return math.exp(-float(logs.gather(2, tokens[:, 1:, None]).mean()))


@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_was_measured(
    converted: Callable[..., Any], family: str, recipe: str
) -> None:
    original, folder, outcome = converted(family, recipe)
    tokens = samples(4, 48, seed=2).tokens
    model = oracle(original, folder)
    measured = perplexity(model, tokens, ROUNDINGS.get(recipe))
    assert outcome.quality.perplexity_after == pytest.approx(measured, rel=2e-3)
    plain = perplexity(
        AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32), tokens, None
    )
    assert outcome.quality.perplexity_before == pytest.approx(plain, rel=1e-4)
    assert outcome.quality.tokens == 4 * 47
    with torch.inference_mode():
        best = model(tokens[:1]).logits[0].argmax(-1).tolist()
    assert sum(a == b for a, b in zip(best, outcome.expected, strict=True)) >= 46


@pytest.mark.parametrize("recipe", [*METHODS, "fp8-nearest"])
def test_errors_are_those_of_the_written_matrices(
    converted: Callable[..., Any], recipe: str
) -> None:
    original, folder, outcome = converted("llama", recipe)
    before, after = open_checkpoint(str(original)).source, dense(folder)
    assert len(outcome.errors) == 2 * 7
    for name, error in outcome.errors.items():
        assert 0 < error < 0.15
        weight = before.read(f"{name}.weight")
        moved = float((after[f"{name}.weight"] - weight).norm() / weight.norm())
        assert moved < 0.25
        if recipe == "fp8-nearest":
            assert error == pytest.approx(moved, rel=1e-3)
    assert outcome.worst()[0][1] == max(outcome.errors.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_storage(converted: Callable[..., Any], recipe: str) -> None:
    """Names, shapes and dtypes as the layouts' readers expect them."""
    _, folder, outcome = converted("qwen2", recipe)
    stored, config = tensors(folder), quantization(folder)
    part = "model.layers.0.self_attn.k_proj"
    shapes = {
        name.removeprefix(part + "."): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in stored.items()
        if name.startswith(part)
    }
    half, word = torch.float16, torch.int32
    if config["quant_method"] == "gptq":
        bits, size = config["bits"], config["group_size"]
        groups = 1 if size == -1 else 64 // size
        assert shapes == {
            "qweight": (word, (64 * bits // 32, 32)),
            "qzeros": (word, (groups, 32 * bits // 32)),
            "scales": (half, (groups, 32)),
            "g_idx": (word, (64,)),
            "bias": (half, (32,)),
        }
        zero = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]
        assert (stored[f"{part}.qzeros"] == zero).all()
        assert json.loads((folder / "quantize_config.json").read_text()) == config
        assert config["sym"] is True
        assert config["desc_act"] is False
        assert config["checkpoint_format"] == "gptq"
    elif recipe == "gptq-compressed":
        assert shapes == {
            "weight_packed": (word, (32, 8)),
            "weight_scale": (torch.float32, (32, 2)),
            "weight_shape": (torch.int64, (2,)),
            "bias": (torch.float32, (32,)),
        }
    elif recipe == "awq":
        assert shapes == {
            "qweight": (word, (64, 4)),
            "qzeros": (word, (2, 4)),
            "scales": (half, (2, 32)),
            "bias": (half, (32,)),
        }
        assert config["zero_point"] is True
        assert config["version"] == "gemm"
    else:
        code = torch.int8 if recipe == "int8" else torch.float8_e4m3fn
        assert shapes == {
            "weight": (code, (32, 64)),
            "weight_scale": (torch.float32, (32, 1)),
            "bias": (torch.float32, (32,)),
        }
    assert outcome.bytes_after == (folder / "model.safetensors").stat().st_size
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).is_file()
    assert not list(folder.glob(".*"))


def test_both_layouts_of_gptq_hold_the_same(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """For symmetric codes one is the transpose of the other."""
    original = tiny_checkpoint("llama", dtype=torch.float16)
    stored = {}
    for layout in ("gptq", "compressed-tensors"):
        folder = tmp_path / layout
        convert(job(original, folder, "gptq", group_size=32, layout=layout))
        stored[layout] = tensors(folder)
    for name, packed in stored["compressed-tensors"].items():
        module, _, kind = name.rpartition(".")
        twin = {"weight_packed": "qweight", "weight_scale": "scales"}.get(kind)
        if twin is not None:
            assert torch.equal(packed, stored["gptq"][f"{module}.{twin}"].T)


def test_a_quantized_model_is_refused(
    converted: Callable[..., Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    _, folder, _ = converted("llama", "gptq")
    with pytest.raises(UnsupportedModel, match="gptq"):
        job(folder, tmp_path / "again", "fp8")


def test_a_group_that_does_not_divide_names_one_that_does(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="128 does not divide the 64 inputs of") as caught:
        job(tiny_checkpoint("llama"), tmp_path / "out", "gptq")
    assert "--group-size 32" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_dimensions_that_cannot_be_packed_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    odd = tiny_checkpoint("llama", intermediate_size=72)
    with pytest.raises(UsageError, match="72") as caught:
        job(odd, tmp_path / "out", "gptq", group_size=-1)
    assert "fp8" in str(caught.value.hint)
    convert(job(odd, tmp_path / "fp8", "fp8"))


@pytest.mark.parametrize(("memory", "disk"), [(1 << 50, 1), (1, 1 << 60)])
def test_what_does_not_fit_is_refused(tmp_path: Path, memory: int, disk: int) -> None:
    with pytest.raises(OutOfMemory, match=r"takes .* but .* are free"):
        Requirements(memory, disk).check(1 << 40, tmp_path / "not" / "there")
    Requirements(1, 1).check(1 << 40, tmp_path / "not" / "there")


def test_the_stated_memory_is_not_exceeded(converted: Callable[..., Any]) -> None:
    """Peaks are of the whole process, which other tests have filled: so the step counts alone."""
    original, folder, _ = converted("llama", "gptq")
    needed = job(original, folder.parent / "other", "gptq", group_size=32).requirements
    assert needed.memory > 2 * (original / "model.safetensors").stat().st_size
    assert needed.disk > sum(file.stat().st_size for file in original.glob("*.safetensors"))


def test_what_was_read_of_the_original_is_let_go(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    monkeypatch.setattr(SafetensorsSource, "release", lambda source, key: released.append(key))
    path = tiny_checkpoint("llama")
    convert(job(path, tmp_path / "out", "fp8", calibrated=False))
    assert sorted(released) == sorted(open_checkpoint(str(path)).source.keys())
