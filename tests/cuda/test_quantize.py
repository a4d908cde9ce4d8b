"""Quantizing on a GPU: the same checkpoints as on the CPU, up to the order of sums."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.engine import make_core, request_of, run
from tests.quantize.conversion import convert, job
from tgi_cli.kernels.backend import Backend


@pytest.mark.parametrize("method", ["gptq", "awq", "int8", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_as_on_the_cpu(
    method: str,
    family: str,
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    gpu: Backend,
    cpu: Backend,
) -> None:
    folder = tiny_checkpoint(family, hidden_size=128, intermediate_size=128)
    group = {"group_size": 32} if method in ("gptq", "awq") else {}
    there = convert(job(folder, tmp_path / "there", method, backend=gpu, **group))
    here = convert(job(folder, tmp_path / "here", method, backend=cpu, **group))
    assert there.quality.perplexity_before == pytest.approx(here.quality.perplexity_before, 1e-4)
    assert there.quality.perplexity_after <= 1.02 * here.quality.perplexity_after
    ours, theirs = (
        load_file(tmp_path / place / "model.safetensors") for place in ("there", "here")
    )
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }
    same = sum(int(torch.eq(_bits(t), _bits(theirs[name])).sum()) for name, t in ours.items())
    share = same / sum(_bits(t).numel() for t in ours.values())
    print(f"{family} {method}: {share:.2%} of the bytes are those of the CPU")
    assert share > 0.5
    mean = sum(there.errors.values()) / len(there.errors)
    assert mean <= 1.02 * sum(here.errors.values()) / len(here.errors)
    tokens = [3, 4, 5, 6, 7]
    request = request_of("r", tokens, max_tokens=4, ignore_eos=True)
    answers = [
        run(make_core(tmp_path / "there", device=device), [request])["r"].token_ids
        for device in ("cuda", "cpu")
    ]
    print(f"{family} {method} on both devices: {answers}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_nearest_fp8_has_the_same_bits(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], gpu: Backend, cpu: Backend
) -> None:
    folder = tiny_checkpoint("llama")
    for name, backend in (("there", gpu), ("here", cpu)):
        convert(job(folder, tmp_path / name, "fp8", calibrated=False, backend=backend))
    ours, theirs = (
        load_file(tmp_path / place / "model.safetensors") for place in ("there", "here")
    )
    different = sum(int((_bits(t) != _bits(theirs[name])).sum()) for name, t in ours.items())
    total = sum(_bits(t).numel() for t in ours.values())
    assert different <= 0.01 * total  # a scale chosen among nearly equal losses


def test_the_command(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", hidden_size=128, intermediate_size=128)
    command = [sys.executable, "-m", "tgi_cli", "quantize", str(folder), str(tmp_path / "out")]
    options = ["--method", "awq", "--group-size", "32", "--device", "cuda"]
    limits = ["--samples", "4", "--seqlen", "64"]
    done = subprocess.run(
        [*command, *options, *limits], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert (tmp_path / "out" / "model.safetensors").is_file()
