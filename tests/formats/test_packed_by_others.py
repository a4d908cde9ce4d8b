"""Checkpoints written by the libraries themselves, and what these say they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.packed_models import SIZES, describe, is_linear
from tests.golden.native import native
from tests.golden.paged import paged
from tests.tiny import make_checkpoint
from tgi_cli.kernels.cpu import library
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.formats.base import WHOLE

TOKENS = torch.randint(3, 512, (48,), generator=torch.Generator().manual_seed(5)).tolist()
#: Mean error of logits in their standard deviations with activations rounded to int8.
NEAR = 0.05

State = dict[str, Tensor]


def twin_of(source: Path, folder: Path, meanings: State) -> Path:
    """The dense model in float32 with these matrices in the place of its own."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    state = {key: value.float() for key, value in load_file(source / "model.safetensors").items()}
    save_file({**state, **meanings}, folder / "model.safetensors", {"format": "pt"})
    return folder


def check(packed: Path, twin: Path, *, packs: bool) -> None:
    """Matrices and logits equal the twin's; native kernels come near."""
    checkpoint, dense = open_checkpoint(str(packed)).for_length(256), open_checkpoint(str(twin))
    for key in filter(is_linear, dense.source.keys()):
        assert checkpoint.format.covers(checkpoint.source, key)
        weight = checkpoint.format.load(checkpoint.source, key, WHOLE, torch.float32)
        torch.testing.assert_close(
            weight.dequantize(), dense.source.read(key), rtol=1e-5, atol=1e-6, msg=key
        )
    truth = paged(twin).run(TOKENS, 48)
    close = 1e-4 * float(truth.abs().max())
    torch.testing.assert_close(paged(packed).run(TOKENS, 48), truth, rtol=0, atol=close)
    assert checkpoint.quantized == packs
    if library.load() is not None:
        with native(checkpoint.keeping_blocks()) as driver:
            assert (driver.run(TOKENS, 48) - truth).abs().mean() <= NEAR * truth.std()


def arguments(**values: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", **values}


INT8_TOKENS = arguments(num_bits=8, strategy="token", dynamic=True)
FP8_TOKENS = {**INT8_TOKENS, "type": "float"}
FP8 = {"num_bits": 8, "type": "float"}
#: Format of the library, arguments of the weights and of the activations, and whether it packs.
COMPRESSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, bool]] = {
    "w4a16": ("pack-quantized", arguments(group_size=64), None, True),
    "w4a16-asym": ("pack-quantized", arguments(group_size=32, symmetric=False), None, True),
    "w4a16-channel": ("pack-quantized", arguments(strategy="channel"), None, True),
    "w4a16-act-order": (
        "pack-quantized", arguments(group_size=32, actorder="group"), None, True,
    ),
    "w8a16": ("pack-quantized", arguments(num_bits=8, group_size=128), None, True),
    "w8a8": ("int-quantized", arguments(num_bits=8, strategy="channel"), INT8_TOKENS, True),
    "w8a8-tensor": ("int-quantized", arguments(num_bits=8, strategy="tensor"), INT8_TOKENS, True),
    "fp8": ("float-quantized", arguments(**FP8, strategy="channel"), FP8_TOKENS, True),
    "fp8-tensor": ("float-quantized", arguments(**FP8, strategy="tensor"), FP8_TOKENS, True),
    "fp8-block": (
        "float-quantized",
        arguments(**FP8, strategy="block", block_structure=[128, 128]),
        None,
        True,
    ),
    "mxfp4": ("mxfp4-pack-quantized", arguments(type="float", group_size=32), None, True),
}  # fmt: skip


@pytest.fixture
def compressed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, bool]:
    """A checkpoint compressed by the library, its twin, and whether matrices stay packed."""
    return write_compressed(tmp_path, request.param, **SIZES, num_key_value_heads=4)


def write_compressed(folder: Path, name: str, **sizes: int) -> tuple[Path, Path, bool]:
    """A case of `COMPRESSED` for a model of these sizes."""
    form, weights, activations, packs = COMPRESSED[name]
    source = make_checkpoint(folder / "source", "llama", **sizes)
    stored, meanings = compress(load_file(source / "model.safetensors"), form, weights)
    packed = make_checkpoint(folder / "packed", "llama", **sizes)
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "weights": weights}
    if activations is not None:
        group["input_activations"] = activations
    describe(
        packed,
        {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    )
    return packed, twin_of(source, folder / "twin", meanings), packs


def compress(state: State, form: str, weights: dict[str, Any]) -> tuple[State, State]:
    """What the library stores for each matrix, and what it decompresses that to."""
    library = pytest.importorskip("compressed_tensors.quantization")
    base = pytest.importorskip("compressed_tensors.compressors.base")
    calculate = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
    compressor = base.BaseCompressor.get_value_from_registry(form)
    # The library no longer makes such orders itself, but they are about.
    known = {key: value for key, value in weights.items() if key != "actorder"}
    args = library.QuantizationArgs(**known)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    stored, meanings = {}, {}
    for name, tensor in state.items():
        if not is_linear(name):
            stored[name] = tensor
            continue
        parts = blocks_of(tensor, weights)
        scale, zero = calculate(parts.amin((-1, -2)), parts.amax((-1, -2)), args)
        module: State = {"weight": tensor, "weight_scale": scale}
        if not args.symmetric:
            module["weight_zero_point"] = zero
        if weights.get("actorder"):
            generator = torch.Generator().manual_seed(len(name))
            index = torch.randperm(tensor.shape[1], generator=generator) // args.group_size
            module["weight_g_idx"] = index.int()
            # Scales of shuffled groups: those of the columns in the order of their groups.
            parts = blocks_of(tensor[:, index.argsort(stable=True)], weights)
            module["weight_scale"], _ = calculate(parts.amin((-1, -2)), parts.amax((-1, -2)), args)
        meanings[name], packed = round_trip(compressor, module, scheme)
        stem = name.removesuffix("weight")
        stored.update({stem + key: value.contiguous() for key, value in packed.items()})
    return stored, meanings


def blocks_of(weight: Tensor, arguments: dict[str, Any]) -> Tensor:
    """[outputs, inputs] -> [n, m, block height, block width], by what shares a scale."""
    rows, columns = weight.shape
    high, wide = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, arguments.get("group_size", 1)),
        "block": tuple(arguments.get("block_structure", (1, 1))),
    }[arguments["strategy"]]
    return weight.view(rows // high, high, columns // wide, wide).transpose(1, 2)


def round_trip(compressor: Any, module: State, scheme: Any) -> tuple[Tensor, State]:
    index = module.pop("weight_g_idx", None)
    if index is None:
        packed = compressor.compress(module, scheme)
        return compressor.decompress(packed, scheme)["weight"].float(), packed
    # The library's compressors leave order to the model: in groups of columns, then back.
    order = index.argsort(stable=True)
    inverse = order.argsort()
    ordered = {**module, "weight": module["weight"][:, order]}
    meaning = compressor.decompress(compressor.compress(ordered, scheme), scheme)["weight"]
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    steps = meaning / module["weight_scale"].repeat_interleave(scheme.weights.group_size, 1)
    packed = compressor.compress(ordered, scheme)
    packed["weight_packed"] = pack_to_int32(steps.round().to(torch.int8)[:, inverse], 4)
    return meaning[:, inverse].float().contiguous(), {**packed, "weight_g_idx": index}


@pytest.mark.parametrize("compressed", COMPRESSED, indirect=True)
def test_compressed_tensors(compressed: tuple[Path, Path, bool]) -> None:
    packed, twin, packs = compressed
    check(packed, twin, packs=packs)


@pytest.mark.parametrize("compressed", ["w4a16", "w8a16"], indirect=True)
def test_logits_equal_those_of_transformers(compressed: tuple[Path, Path, bool]) -> None:
    packed, _, _ = compressed
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    close = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(paged(packed).run(TOKENS, 48), expected, rtol=0, atol=close)


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", BITSANDBYTES)
@pytest.mark.filterwarnings("ignore")  # bitsandbytes warns of kernels it cannot fetch
@pytest.mark.parametrize("sizes", [SIZES, {**SIZES, "intermediate_size": 96}], ids=["", "ragged"])
def test_bitsandbytes(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    packed, twin = write_bitsandbytes(tmp_path, name, **sizes)
    check(packed, twin, packs=True)


def write_bitsandbytes(folder: Path, name: str, **sizes: int) -> tuple[Path, Path]:
    """A checkpoint that the library has rounded and saved, and its twin."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = make_checkpoint(folder / "source", "llama", **sizes)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitsAndBytesConfig(**BITSANDBYTES[name]),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder / "packed")
    state = load_file(folder / "packed" / "model.safetensors")
    meanings: State = {}
    for part, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            meanings[f"{part}.weight"] = meant(bnb, module.weight)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes, scale = state[f"{part}.weight"], state[f"{part}.SCB"]
            meanings[f"{part}.weight"] = codes.float() * (scale / 127).unsqueeze(1)
        elif f"{part}.weight" in state:
            meanings[f"{part}.weight"] = state[f"{part}.weight"].float()
    return folder / "packed", twin_of(source, folder / "twin", meanings)


def meant(bnb: Any, weight: Any) -> Tensor:
    """A 4-bit matrix by its state: the library's own decoder is wrong where blocks cross rows."""
    state, packed = weight.quant_state, weight.data.flatten()
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
    scales = scales.repeat_interleave(state.blocksize)[: len(codes)]
    meaning = (state.code[codes] * scales).view(state.shape)
    if state.shape[1] % state.blocksize == 0:
        state.dtype = torch.float32
        decoded = bnb.functional.dequantize_4bit(weight.data, state)
        torch.testing.assert_close(meaning, decoded, rtol=1e-5, atol=1e-6)
    return meaning


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"absmax": lambda t: t[1:]}, r"down_proj\.weight\.absmax` has shape"),
        ({"quant_map": None}, r"down_proj\.weight\.quant_map` is missing"),
        ({"quant_state.bitsandbytes__nf4": lambda t: t[:-1]}, "holds no JSON"),
    ],
    ids=["absmax", "quant_map", "state"],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bitsandbytes_checkpoints(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tgi_cli.errors import CheckpointError

    source = make_checkpoint(tmp_path / "source", "llama", **SIZES)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=options)
    model.save_pretrained(tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    state = load_file(path)
    for ending, edit in change.items():
        name = f"model.layers.0.mlp.down_proj.weight.{ending}"
        stored = state.pop(name)
        if edit is not None:
            state[name] = edit(stored).contiguous()
    save_file(state, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        paged(tmp_path / "packed")
