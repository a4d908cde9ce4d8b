"""Reads quantized checkpoints back by the formulas of their layouts, written down afresh here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def quantization(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def dense(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder, quantized matrices as float32 `….weight`."""
    stored, config = tensors(folder), quantization(folder)
    method = config["quant_method"]
    modules = {name.rpartition(".")[0] for name in stored if name.endswith(("qweight", "_scale"))}
    values = {
        name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in modules
    }
    for module in modules:
        parts = {
            name.rpartition(".")[2]: tensor
            for name, tensor in stored.items()
            if name.rpartition(".")[0] == module
        }
        if "bias" in parts:
            values[f"{module}.bias"] = parts["bias"]
        if method == "gptq":
            values[f"{module}.weight"] = gptq(parts, config["bits"])
        elif method == "awq":
            values[f"{module}.weight"] = awq(parts, config["group_size"])
        else:
            values[f"{module}.weight"] = compressed(parts, config)
    return values


def gptq(parts: dict[str, Tensor], bits: int) -> Tensor:
    codes = fields(parts["qweight"].T, bits).T  # packed along the input
    zeros = fields(parts["qzeros"], bits) + 1
    group = parts["g_idx"].long()
    return ((codes - zeros[group]) * parts["scales"].float()[group]).T


def awq(parts: dict[str, Tensor], group_size: int) -> Tensor:
    def values(packed: Tensor) -> Tensor:
        words = fields(packed, 4).unflatten(1, (-1, 8))
        return words[:, :, AWQ_PLACES].flatten(1)

    group = torch.arange(parts["qweight"].shape[0]) // group_size
    zeros, scales = values(parts["qzeros"])[group], parts["scales"].float()[group]
    return ((values(parts["qweight"]) - zeros) * scales).T


def compressed(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    scales = parts["weight_scale"].float()
    if "weight_packed" in parts:
        bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
        codes = fields(parts["weight_packed"], bits) - 2 ** (bits - 1)
        assert parts["weight_shape"].tolist() == list(codes.shape)
        return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    return parts["weight"].float() * scales


def fields(packed: Tensor, bits: int) -> Tensor:
    """The `bits`-wide fields of each word, low ones first, along the last dimension: float32."""
    unsigned = packed.long() & 0xFFFFFFFF
    shifts = torch.arange(0, 32, bits)
    return ((unsigned.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2).float()


def oracle(original: Path, folder: Path) -> PreTrainedModel:
    """The original in `transformers`, in float32, with the weights that `folder` stands for."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dense(folder), strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)  # tied
    return model.eval()
