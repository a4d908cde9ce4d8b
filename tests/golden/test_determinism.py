"""Promise one on the native kernels: a request's tokens and logprobs are the same bits always.

The same requests run alone, among strangers with other step budgets, with a pool so small that
they are preempted, and on prefix hits; greedy and sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.formats.gguf_models import VOCAB, tiny_model, write_model
from tests.golden.engine import make_core, request_of, run
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Request
from tgi_cli.kernels.cpu import library
from tgi_cli.model.checkpoint import open_checkpoint

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")


def prompt(seed: int, length: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()


def requests(vocab_size: int) -> list[Request]:
    """Greedy and sampled ones, short and long, some with a common beginning."""
    common = prompt(0, 40, vocab_size)
    made = []
    for i, (length, sampling) in enumerate(
        [
            (5, {}),
            (33, {"temperature": 1.0, "seed": 7}),
            (70, {"temperature": 0.8, "top_p": 0.9, "seed": 11}),
            (16, {"repetition_penalty": 1.2}),
            (48, {"temperature": 1.3, "top_k": 40, "min_p": 0.02, "seed": 3}),
            (90, {"frequency_penalty": 0.5, "temperature": 0.7, "seed": 5}),
        ]
    ):
        tokens = common[: length // 2] + prompt(i + 1, length - length // 2, vocab_size)
        made.append(
            request_of(f"r{i}", tokens, max_tokens=40, ignore_eos=True, logprobs=2, **sampling)
        )
    return made


def outcome(core: EngineCore, chosen: list[Request], **options: Any) -> dict[str, Any]:
    """Token ids and exact logprobs by request."""
    answers = run(core, chosen, **options)
    return {
        name: (answer.token_ids, [lp for d in answer.deltas for lp in d.logprobs or []])
        for name, answer in answers.items()
    }


def check_promise(path: Path, vocab_size: int, **fixed: Any) -> None:
    def core(**options: Any) -> EngineCore:
        return make_core(path, dtype="bfloat16", block_size=16, **fixed, **options)

    def asked() -> list[Request]:
        return requests(vocab_size)

    lonely = core(prefix_caching=False)
    assert lonely.facts.deterministic
    expected: dict[str, Any] = {}
    for request in asked():
        expected |= outcome(lonely, [request])

    for max_batch_tokens in (8, 19, 64):
        batched = core(max_batch_tokens=max_batch_tokens)
        assert outcome(batched, asked(), stagger=2) == expected
        again = outcome(batched, asked())  # now with the cache full of hits
        assert again == expected
        assert batched.stats().prefix_hit_tokens > 0

    small = core(kv_cache_tokens=320, max_batch_tokens=32)
    assert outcome(small, asked()) == expected
    if any(layout.window is None for layout in small.memory_plan.layouts()):
        assert small.stats().preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_one_request_one_answer(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    check_promise(tiny_checkpoint(family, dtype=torch.bfloat16), 500)


@pytest.mark.parametrize(
    ("family", "kv_cache_dtype"),
    [
        ("llama", "int8"),
        ("gemma3", "int8"),
        ("qwen3", "fp8_e4m3"),
        ("mistral", "fp8_e5m2"),
        ("llama", "float16"),
        ("qwen2", "float32"),
    ],
)
def test_every_form_of_the_kv_cache_too(
    family: str, kv_cache_dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    check_promise(path, 500, kv_cache_dtype=kv_cache_dtype)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", Type.Q4_0), ("qwen2", Type.Q4_1), ("gemma3", Type.Q8_0)]
)
def test_quantized_weights_too(family: str, kind: Type, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model(family), kind)
    assert open_checkpoint(str(path)).quantized
    check_promise(path, VOCAB)
