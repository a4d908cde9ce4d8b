"""An engine of several processes: the tokens of one, and bits that no company changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.formats.gguf_models import tiny_model, write_model
from tests.golden.engine import make_core, request_of, run
from tests.golden.test_determinism import outcome, requests
from tgi_cli.kernels.cpu import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")


def test_float32_tokens_and_prompt_logprobs_equal_one_process(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Four ranks of which two share a key/value head; every kind of request beside another."""
    path = tiny_checkpoint("llama", intermediate_size=160)
    asked = requests(500)
    asked.append(request_of("prompt", [5, 6, 7, 8, 9] * 9, max_tokens=3, prompt_logprobs=2))
    whole, divided = (make_core(path, num_shard=count) for count in (1, 4))
    assert [rank.rank for rank in divided.facts.ranks] == [0, 1, 2, 3]
    try:
        expected = run(whole, asked, stagger=2)
        found = run(divided, asked, stagger=2)
    finally:
        divided.close()
    for name, answer in expected.items():
        assert found[name].token_ids == answer.token_ids
        theirs = [lp for delta in answer.deltas for lp in delta.prompt_logprobs or [] if lp]
        ours = [lp for delta in found[name].deltas for lp in delta.prompt_logprobs or [] if lp]
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.top_ids == other.top_ids
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize(("quantized", "kv_cache_dtype"), [(False, "int8"), (True, "auto")])
def test_one_request_one_answer_on_two_ranks(
    quantized: bool, kv_cache_dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    vocab_size = 96 if quantized else 500
    if quantized:
        path = write_model(tmp_path / "model.gguf", tiny_model("qwen3"), Type.Q4_0)
    else:
        path = tiny_checkpoint("gemma3", dtype=torch.bfloat16)
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "block_size": 16,
        "num_shard": 2,
        "kv_cache_dtype": kv_cache_dtype,
    }
    lonely = make_core(path, prefix_caching=False, **options)
    try:
        assert lonely.facts.deterministic
        assert lonely.facts.activation_dtype == ("int8" if quantized else "bfloat16")
        expected = {}
        for request in requests(vocab_size):
            expected |= outcome(lonely, [request])
    finally:
        lonely.close()
    batched = make_core(path, max_batch_tokens=19, **options)
    try:
        assert outcome(batched, requests(vocab_size), stagger=2) == expected
        assert outcome(batched, requests(vocab_size)) == expected  # now on prefix hits
        assert batched.stats().prefix_hit_tokens > 0
    finally:
        batched.close()


def test_a_request_that_cannot_run_ends_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    """Rank 0 refuses a row; the others must not wait for it."""
    core = make_core(tiny_checkpoint("llama"), num_shard=2)
    try:
        good = request_of("good", [4, 5, 6], max_tokens=12, ignore_eos=True)
        core.accept(good)
        core.step()
        runner = core._executor._runner  # type: ignore[attr-defined]
        refuse = runner._sampler.add

        def add(row: int, request: object, output_ids: object) -> None:
            if request.id == "bad":  # type: ignore[attr-defined]
                raise RuntimeError("as a stage may")
            refuse(row, request, output_ids)

        runner._sampler.add = add
        core.accept(request_of("bad", [7, 8, 9], max_tokens=4))
        ends = {}
        while core.has_work():
            ends |= {delta.id: delta for delta in core.step() if delta.finish}
        assert "could not be prepared" in (ends["bad"].error or "")
        assert ends["good"].finish == "length"
    finally:
        core.close()


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 4), ("bfloat16", 16)])
def test_ranks_that_share_no_memory_meet_in_gloo(
    dtype: str, block_size: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    """What runs without the native library; with it, the native step calls back into Python."""
    path = tiny_checkpoint("qwen3", dtype=torch.bfloat16)
    program = [sys.executable, "-m", "tests.golden.gloo_ranks", path, dtype, str(block_size)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    over_gloo = json.loads(done.stdout)
    core = make_core(path, dtype=dtype, block_size=block_size, num_shard=2)
    try:
        asked = [
            request_of(f"r{i}", [7 + i, *range(20, 30 + 9 * i)], max_tokens=16, ignore_eos=True)
            for i in range(3)
        ]
        answers = run(core, asked, stagger=2)
    finally:
        core.close()
    # Both add in the order of the ranks, so even the bits are those of shared memory.
    assert [answers[request.id].token_ids for request in asked] == over_gloo
