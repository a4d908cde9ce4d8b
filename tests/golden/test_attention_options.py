"""Attention sinks, ALiBi and capped scores, selected by the spec: natively as in the oracle.

No family reads them from a configuration yet, so a Llama is given them, its sinks in its file.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.native import native
from tests.golden.paged import Paged
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.model.attention import alibi_slopes
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.decoder import Decoder

TOKENS = torch.randint(3, 500, (83,), generator=torch.Generator().manual_seed(7)).tolist()
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 0.2},
    "all": {"sinks": True, "alibi": True, "softcap": 0.2},
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sinks") / "model"
    shutil.copytree(tiny_checkpoint("llama", dtype=torch.bfloat16), made)
    tensors = load_file(made / "model.safetensors")
    spec = open_checkpoint(str(made)).spec
    for index, layer in enumerate(spec.layers):
        heads = torch.arange(layer.attention.num_heads, dtype=torch.bfloat16)
        tensors[f"model.layers.{index}.self_attn.sinks"] = heads - 1 + index
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


def checkpoint_with(folder: Path, **options: Any) -> Checkpoint:
    checkpoint = open_checkpoint(str(folder))
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **options))
        for layer in checkpoint.spec.layers
    )
    ignored = () if options.get("sinks") else ("self_attn.sinks",)
    names = checkpoint.spec.names
    names = dataclasses.replace(names, ignored=(*names.ignored, *ignored))
    spec = dataclasses.replace(checkpoint.spec, layers=layers, names=names)
    return dataclasses.replace(checkpoint, spec=spec)


def composed(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    backend = select("cpu")
    decoder = Decoder.build(checkpoint, backend, dtype)
    return Paged(decoder, backend, dtype, block_size=16, max_len=96).run(TOKENS, 83)


@pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("name", OPTIONS)
def test_native_steps_follow_the_spec(name: str, folder: Path) -> None:
    checkpoint = checkpoint_with(folder, **OPTIONS[name])
    truth = composed(checkpoint, torch.float32)
    with native(checkpoint) as driver:
        ours = driver.run(TOKENS, 83)
        again = driver.afresh(block_size=16, max_len=96).run(TOKENS, 7)
    assert torch.equal(again, ours)
    error = (ours - truth).abs().mean()
    assert error <= 1.2 * (composed(checkpoint, torch.bfloat16) - truth).abs().mean()
    if name != "none":
        plain = composed(checkpoint_with(folder), torch.float32)
        assert (truth - plain).abs().mean() > 2 * error


def test_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    uneven = alibi_slopes(12)
    assert uneven[:8].tolist() == [2.0**-i for i in range(1, 9)]
    expected = [2.0 ** (-(i + 0.5)) for i in range(4)]
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(uneven[8:], expected, strict=True))
