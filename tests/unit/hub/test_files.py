"""Which files make up a model."""

from __future__ import annotations

import pytest

from tgi_cli.errors import ModelMissing
from tgi_cli.hub_files import RepoFile, Selection, quant_of, select

GGUF = (
    "README.md",
    "tiny-it-Q4_K_M.gguf",
    "tiny-it-UD-Q4_K_XL.gguf",
    "tiny-it-Q4_K_XL.gguf",
    "tiny-it-IQ4_NL.gguf",
    "tiny-it-BF16.gguf",
    "mmproj-F16.gguf",
    "Q8_0/tiny-it-Q8_0-00001-of-00003.gguf",
    "Q8_0/tiny-it-Q8_0-00002-of-00003.gguf",
    "Q8_0/tiny-it-Q8_0-00003-of-00003.gguf",
)


def chosen(*names: str, **options: object) -> Selection:
    return select("org/m", [RepoFile(name, 10) for name in names], **options)  # type: ignore[arg-type]


def names(selection: Selection) -> set[str]:
    return {file.name for file in selection.files}


@pytest.mark.parametrize(
    ("weights", "left_out"),
    [
        (["model.safetensors"], ["model.fp16.safetensors", "consolidated.safetensors"]),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
            ["consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"],
        ),
        (["adapter_model.safetensors", "adapter_config.json"], ["optimizer.pt"]),
        (["model.safetensors"], ["model.gguf", "tf_model.h5", "flax_model.msgpack"]),
    ],
)
def test_safetensors_come_first(weights: list[str], left_out: list[str]) -> None:
    common = ["config.json", "tokenizer.model", "additional_chat_templates/tools.jinja"]
    never = ["README.md", "onnx/config.json", "original/params.json", "vae/model.safetensors"]
    selection = chosen(*weights, *left_out, *common, *never)
    assert names(selection) == {*weights, *common}
    assert not selection.pickles
    assert selection.gguf is None


def test_pickles_when_there_is_nothing_else() -> None:
    selection = chosen("config.json", "pytorch_model.bin", "training_args.bin", "optimizer.bin")
    assert names(selection) == {"config.json", "pytorch_model.bin"}
    assert [file.name for file in selection.pickles] == ["pytorch_model.bin"]
    other = chosen("weights.bin", "training_args.bin", "scheduler.bin")
    assert [file.name for file in other.pickles] == ["weights.bin"]


def test_no_weights() -> None:
    with pytest.raises(ModelMissing, match="no weights in a format that tgi reads") as caught:
        chosen("config.json", "tf_model.h5")
    assert caught.value.hint == "its files are: config.json, tf_model.h5"


def test_include_and_exclude() -> None:
    every = ("model.safetensors", "config.json", "tokenizer.json", "onnx/a.onnx", "onnx/b.json")
    assert names(chosen(*every, include=["onnx/"])) == {"onnx/a.onnx", "onnx/b.json"}
    assert names(chosen(*every, include=["*.json"], exclude=["onnx/*"])) == {
        "config.json",
        "tokenizer.json",
    }
    assert names(chosen(*every, exclude=["tok*"])) == {"model.safetensors", "config.json"}
    with pytest.raises(ModelMissing, match=r"matches --include '\*\.gguf'"):
        chosen(*every, include=["*.gguf"])


@pytest.mark.parametrize(
    ("quant", "opened"),
    [
        ("Q4_K_M", "tiny-it-Q4_K_M.gguf"),
        ("q4_k_m", "tiny-it-Q4_K_M.gguf"),
        ("Q4_K_XL", "tiny-it-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "tiny-it-UD-Q4_K_XL.gguf"),
        ("IQ4_NL", "tiny-it-IQ4_NL.gguf"),
        ("bf16", "tiny-it-BF16.gguf"),
        ("tiny-it-BF16.gguf", "tiny-it-BF16.gguf"),
    ],
)
def test_one_quantization(quant: str, opened: str) -> None:
    selection = chosen(*GGUF, quant=quant)
    assert names(selection) == {opened}
    assert selection.gguf == opened


def test_split_quantization() -> None:
    selection = chosen(*GGUF, quant="Q8_0")
    assert names(selection) == {name for name in GGUF if name.startswith("Q8_0/")}
    assert selection.gguf == "Q8_0/tiny-it-Q8_0-00001-of-00003.gguf"
    with pytest.raises(ModelMissing, match="has 2 of the 3 parts"):
        chosen(*GGUF[:-1], quant="Q8_0")


@pytest.mark.parametrize(
    ("files", "quant", "said"),
    [
        (GGUF, "Q2_K", "'org/m' has no quantization 'Q2_K'"),
        (GGUF, None, "'org/m' has 6 GGUF models"),
        (("a-Q4_0.gguf", "b-Q4_0.gguf"), "Q4_0", "'Q4_0' is ambiguous in 'org/m'"),
        (("model.safetensors",), "Q4_0", "'org/m' has no .gguf files, so 'Q4_0' cannot be chosen"),
    ],
)
def test_no_single_quantization(files: tuple[str, ...], quant: str | None, said: str) -> None:
    with pytest.raises(ModelMissing) as caught:
        chosen(*files, quant=quant)
    assert caught.value.message.startswith(said)
    if files is GGUF:
        available = "Q8_0, BF16, IQ4_NL, Q4_K_M, Q4_K_XL, UD-Q4_K_XL"
        assert caught.value.hint == f"choose one with org/m:QUANT, of: {available}"


def test_the_only_gguf_needs_no_name() -> None:
    assert chosen("only.gguf", "mmproj-f16.gguf").gguf == "only.gguf"


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("m-q5_k_s-00001-of-00002.gguf", "Q5_K_S"),
        ("m-IQ3_XXS.gguf", "IQ3_XXS"),
        ("F16/m-00001-of-00002.gguf", "F16"),
        ("m.fp16.gguf", "FP16"),
        ("gpt-oss-MXFP4.gguf", "MXFP4"),
        ("SmolLM2-135M.gguf", None),
        ("qwen3.gguf", None),
    ],
)
def test_quant_of(name: str, quant: str | None) -> None:
    assert quant_of(name) == quant
