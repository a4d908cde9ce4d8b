"""The whole engine on a GPU: against transformers on the same GPU, and against the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.golden.engine import Agreement, Answer, make_core, reference_tokens, request_of, run
from tests.golden.sampling_mix import sampling_mix
from tests.tiny import FAMILIES
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.formats.at_load import METHODS

LENGTHS = (1, 7, 9, 40)
NEW = 16


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 250, (length,), generator=generator).tolist()


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in answers.items()}


def transformers_on_gpu(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        .eval()
        .cuda()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_transformers(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Alone, in batches that change, in chunks: whatever runs beside a sequence."""
    folder = tiny_checkpoint(family)
    agreement = Agreement(transformers_on_gpu(folder), max_gap=1e-3)
    requests = [request_of(f"r{n}", prompt_of(n), max_tokens=NEW, ignore_eos=True) for n in LENGTHS]
    expected = {
        request.id: reference_tokens(agreement.model, request.prompt_ids, NEW)
        for request in requests
    }
    core = make_core(folder, device="cuda", max_batch_tokens=16)
    assert (core.facts.device, core.facts.backend) == ("cuda", "torch-cuda")
    assert not core.facts.deterministic
    for stagger in (0, 2):
        answers = run(core, requests, stagger=stagger)
        for request in requests:
            agreement.compare(
                request.prompt_ids, expected[request.id], answers[request.id].token_ids
            )
    agreement.report(family)
    core.close()


def test_bfloat16_is_near_float32(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", dtype=torch.bfloat16)
    model = transformers_on_gpu(folder)
    agreement = Agreement(model, max_gap=0.2)
    requests = [
        request_of(f"r{n}", prompt_of(n), max_tokens=NEW, ignore_eos=True) for n in range(4, 36, 4)
    ]
    answers = run(make_core(folder, device="cuda", dtype="bfloat16"), requests)
    for request in requests:
        expected = reference_tokens(model, request.prompt_ids, NEW)
        agreement.compare(request.prompt_ids, expected, answers[request.id].token_ids)
    agreement.report("bfloat16 against float32")


def test_preempted_and_on_prefix_hits(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    options: dict[str, Any] = {"device": "cuda", "prefix_caching": False}
    requests = [
        request_of(f"r{n}", prompt_of(n, 2), max_tokens=40, ignore_eos=True) for n in range(9, 14)
    ]
    roomy = tokens(run(make_core(folder, **options), requests))
    tight = make_core(folder, kv_cache_tokens=112, max_model_len=64, **options)
    assert tokens(run(tight, requests)) == roomy
    assert tight.stats().preemptions > 0
    cached = make_core(folder, device="cuda")
    first = run(cached, [request_of("a", prompt_of(30), max_tokens=8, ignore_eos=True)])["a"]
    again = run(cached, [request_of("b", prompt_of(30), max_tokens=8, ignore_eos=True)])["b"]
    assert again.token_ids == first.token_ids
    assert again.deltas[0].num_cached_tokens >= 16


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_every_kv_cache_answers_as_on_the_cpu(
    kv_cache_dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    _as_on_the_cpu(tiny_checkpoint("gemma3"), kv_cache_dtype=kv_cache_dtype)


@pytest.mark.parametrize("method", METHODS)
def test_every_rounding_answers_as_on_the_cpu(
    method: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    _as_on_the_cpu(tiny_checkpoint("qwen3"), quantize=method, activation_dtype="bfloat16")


def _as_on_the_cpu(folder: Path, **options: Any) -> None:
    """The same tokens in float32; in a few places two logits may lie too close together."""
    requests = [
        request_of(f"r{n}", prompt_of(n), max_tokens=8, ignore_eos=True) for n in (2, 12, 21)
    ]
    ours = tokens(run(make_core(folder, device="cuda", **options), requests))
    expected = tokens(run(make_core(folder, device="cpu", **options), requests))
    assert sum(ours[name] == expected[name] for name in ours) >= 2, (ours, expected)


def test_the_same_seed_draws_the_same_tokens_as_on_the_cpu(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Through every stage of the sampler, logits in float32."""
    folder = tiny_checkpoint("llama")
    requests = sampling_mix(open_checkpoint(str(folder)).vocab_size)
    ours = run(make_core(folder, device="cuda"), requests)
    expected = run(make_core(folder, device="cpu"), requests)
    differ = [name for name in ours if ours[name].token_ids != expected[name].token_ids]
    assert len(differ) <= 1, differ
    for one, other in zip(ours["logprobs"].deltas, expected["logprobs"].deltas, strict=True):
        for entry, wanted in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        prompts = (each.prompt_logprobs or [None] for each in (one, other))
        for entry, wanted in list(zip(*prompts, strict=True))[1:]:  # the first token has none
            assert entry is not None
            assert wanted is not None
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-3)


def test_adapters(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("peft")
    from tests.tiny.adapters import make_adapter

    folder = tiny_checkpoint("llama")
    adapters = [f"a={make_adapter(folder, tmp_path / 'a')}"]
    requests = [
        request_of(name, prompt_of(13), adapter=name, max_tokens=8, ignore_eos=True)
        for name in ("a", "")
    ]
    ours = tokens(run(make_core(folder, device="cuda", adapters=adapters), requests))
    expected = tokens(run(make_core(folder, device="cpu", adapters=adapters), requests))
    assert ours == expected
    assert ours["a"] != ours[""]


def test_the_plan_is_of_the_gpu_and_memory_is_given_back(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("llama")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    held = torch.cuda.memory_allocated()
    core = make_core(folder, device="cuda", kv_cache_tokens=200_000)
    planned = core.memory_plan
    assert planned is not None
    assert abs(planned.free_bytes - free) < 1 << 30
    taken = torch.cuda.memory_allocated() - held
    assert planned.kv_bytes <= taken <= planned.weights_bytes + planned.kv_bytes + (64 << 20)
    run(core, [request_of("r", prompt_of(9), max_tokens=4, ignore_eos=True)])
    core.close()
    del core
    assert torch.cuda.memory_allocated() - held < 64 << 20


def test_a_step_stays_within_its_plan(tiny_checkpoint: Callable[..., Path]) -> None:
    """A long prompt, whose scores attention holds on a GPU."""
    folder = tiny_checkpoint("llama", max_position_embeddings=16384)
    core = make_core(
        folder,
        device="cuda",
        max_model_len=16000,
        kv_cache_tokens=16000,
        block_size=16,
        max_batch_tokens=4096,
        max_num_seqs=2,
        dtype="bfloat16",
    )
    planned = core.memory_plan
    assert planned is not None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(core, [request_of("r", [5] * 15000, max_tokens=2, ignore_eos=True)])
    peak = torch.cuda.max_memory_allocated() - before
    print(f"a step took {peak:,} bytes, planned were {planned.activation_bytes:,}")
    assert peak <= planned.activation_bytes
