"""The PyTorch path where a tensor on the wrong device is an error, as on a real GPU.

`tests/cuda` says what a GPU computes; this runs on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.engine import Answer, make_core, request_of, run
from tests.golden.sampling_mix import sampling_mix
from tests.pretended_gpu import GPU, PretendedGpu, pretended_gpu
from tests.quantize.conversion import convert, job
from tests.tiny import FAMILIES
from tests.tiny.adapters import make_adapter
from tgi_cli.engine import loading
from tgi_cli.kernels.backend import Backend, select
from tgi_cli.model.checkpoint import open_checkpoint


def backend_of_gpu(*args: Any, **options: Any) -> Backend:
    return replace(select("cpu", num_threads=1), device=GPU, native=None, deterministic=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setattr(loading, "select", backend_of_gpu)
    with pretended_gpu() as gpu:
        yield gpu


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Answer]]:
    """Answers of plain torch on the CPU."""

    def answers(path: Path, requests: list[Any], **options: Any) -> dict[str, Answer]:
        backend = replace(select("cpu", num_threads=1), native=None, deterministic=False)
        with monkeypatch.context() as patch:
            patch.setattr(loading, "select", lambda *args, **kwargs: backend)
            return run(make_core(path, **options), requests)

    return answers


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in answers.items()}


def test_tensors_of_two_devices_are_refused() -> None:
    with pretended_gpu() as gpu, torch.inference_mode():
        there = torch.ones(3, device=GPU)
        with pytest.raises(RuntimeError, match="on the CPU beside tensors on the GPU"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="NumPy"):
            there.numpy()
        assert gpu.waits == 0
        assert (there + 1).tolist() == [2.0] * 3
        assert gpu.waits == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_every_family(
    family: str,
    tiny_checkpoint: Callable[..., Path],
    plain: Callable[..., dict[str, Answer]],
    gpu: PretendedGpu,
) -> None:
    folder = tiny_checkpoint(family)
    requests = [
        request_of(f"r{n}", range(3, 3 + n), max_tokens=6, ignore_eos=True) for n in (1, 9, 30)
    ]
    core = make_core(folder, max_batch_tokens=16)
    assert core.facts.backend == f"torch-{GPU.type}"
    assert not core.facts.deterministic
    assert tokens(run(core, requests, stagger=1)) == tokens(plain(folder, requests))


def test_every_stage_of_the_sampler(
    tiny_checkpoint: Callable[..., Path],
    plain: Callable[..., dict[str, Answer]],
    gpu: PretendedGpu,
) -> None:
    folder = tiny_checkpoint("llama")
    requests = sampling_mix(open_checkpoint(str(folder)).vocab_size)
    ours, expected = run(make_core(folder), requests), plain(folder, requests)
    assert tokens(ours) == tokens(expected)
    for one, other in zip(ours["logprobs"].deltas, expected["logprobs"].deltas, strict=True):
        for entry, wanted in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert entry.top_ids == wanted.top_ids
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_every_kv_cache(
    kv_cache_dtype: str,
    tiny_checkpoint: Callable[..., Path],
    plain: Callable[..., dict[str, Answer]],
    gpu: PretendedGpu,
) -> None:
    folder = tiny_checkpoint("gemma3")
    requests = [
        request_of(f"r{n}", range(3, 3 + n), max_tokens=6, ignore_eos=True) for n in (2, 21)
    ]
    options = {"kv_cache_dtype": kv_cache_dtype}
    assert tokens(run(make_core(folder, **options), requests)) == tokens(
        plain(folder, requests, **options)
    )


@pytest.mark.parametrize("method", ["int8", "int4", "fp8", "bitsandbytes-nf4"])
def test_weights_rounded_at_load(
    method: str,
    tiny_checkpoint: Callable[..., Path],
    plain: Callable[..., dict[str, Answer]],
    gpu: PretendedGpu,
) -> None:
    folder = tiny_checkpoint("qwen3")
    requests = [request_of("r", range(3, 20), max_tokens=6, ignore_eos=True)]
    assert tokens(run(make_core(folder, quantize=method), requests)) == tokens(
        plain(folder, requests, quantize=method)
    )


def test_adapters(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    plain: Callable[..., dict[str, Answer]],
    gpu: PretendedGpu,
) -> None:
    folder = tiny_checkpoint("llama")
    adapters = [f"a={make_adapter(folder, tmp_path / 'a')}"]
    requests = [
        request_of(name, range(3, 16), adapter=name, max_tokens=6, ignore_eos=True)
        for name in ("a", "")
    ]
    ours = tokens(run(make_core(folder, adapters=adapters), requests))
    assert ours == tokens(plain(folder, requests, adapters=adapters))
    assert ours["a"] != ours[""]


def test_a_decode_step_reads_its_tokens_and_nothing_else(
    tiny_checkpoint: Callable[..., Path], gpu: PretendedGpu
) -> None:
    """The host waits twice a step: for the tokens, and whether they mean anything."""
    core = make_core(tiny_checkpoint("llama"))
    for number in range(4):
        core.accept(request_of(f"r{number}", range(3, 9 + number), max_tokens=20, ignore_eos=True))
    for _ in range(6):
        core.step()
    gpu.waits = 0
    core.step()
    assert gpu.waits == 2


@pytest.mark.parametrize("method", ["gptq", "awq", "int8", "fp8"])
def test_quantizing(
    method: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path], gpu: PretendedGpu
) -> None:
    folder = tiny_checkpoint("llama", hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    group = {"group_size": 32} if method in ("gptq", "awq") else {}
    there = convert(job(folder, tmp_path / "there", method, backend=backend_of_gpu(), **group))
    here = convert(job(folder, tmp_path / "here", method, **group))
    assert there.quality.perplexity_before == pytest.approx(here.quality.perplexity_before, 1e-5)
    assert there.quality.perplexity_after == pytest.approx(here.quality.perplexity_after, 1e-2)
    assert there.bytes_after == here.bytes_after
