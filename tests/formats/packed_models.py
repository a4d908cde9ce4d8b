"""Tiny checkpoints with packed matrices, each beside its twin: the same model in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.formats.packers import Packer
from tests.tiny import make_checkpoint

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_linear(name: str) -> bool:
    return name.removesuffix(".weight").endswith(LINEARS)


def write_pair(
    folder: Path, packer: Packer, quantization: dict[str, Any], family: str = "llama", **sizes: Any
) -> tuple[Path, Path]:
    """A packed checkpoint and its twin."""
    twin = make_checkpoint(folder / "twin", family, **{**SIZES, **sizes})
    packed = make_checkpoint(folder / "packed", family, **{**SIZES, **sizes})
    state = load_file(twin / "model.safetensors")
    dense, stored = dict(state), {}
    for name, tensor in state.items():
        if not is_linear(name):
            stored[name] = tensor.half()
            dense[name] = tensor.half().float()
            continue
        found = packer(tensor.double().numpy())
        dense[name] = torch.from_numpy(np.ascontiguousarray(found.meaning, np.float32))
        stem = name.removesuffix(".weight")
        for ending, part in found.tensors.items():
            joint = "" if ending.startswith("_") else "."
            stored[f"{stem}{joint}{ending}"] = part.contiguous()
    save_file(dense, twin / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    describe(packed, quantization)
    return packed, twin


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    """Put a `quantization_config` into `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors, or drop those given as None; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor.contiguous()
    save_file(state, path, {"format": "pt"})
