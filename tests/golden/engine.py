"""A whole engine without processes, driven step by step, and transformers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tgi_cli.adapter_names import parse_adapters
from tgi_cli.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Delta, Request
from tgi_cli.sampling import SamplingParams


def make_core(
    path: Path | str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    activation_dtype: str = "auto",
    quantize: str | None = None,
    max_model_len: int | None = 256,
    kv_cache_dtype: str = "auto",
    kv_cache_tokens: int | None = 2048,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_batch_tokens: int = 64,
    prefix_caching: bool = True,
    num_shard: int = 1,
    num_threads: int | None = None,
    adapters: Sequence[str] = (),
) -> EngineCore:
    config = EngineConfig(
        model=ModelConfig(
            model_id=str(path),
            dtype=dtype,
            activation_dtype=activation_dtype,
            quantize=quantize,
            device=device,
            max_model_len=max_model_len,
        ),
        cache=CacheConfig(
            block_size=block_size,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_tokens=kv_cache_tokens,
            prefix_caching=prefix_caching,
        ),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens),
        parallel=ParallelConfig(num_shard=num_shard, num_threads=num_threads),
        lora=AdapterConfig(adapters=parse_adapters(adapters, flag="adapters")),
    )
    return EngineCore.load(config, lambda phase, fraction: None)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)

    @property
    def last(self) -> Delta:
        return self.deltas[-1]


def request_of(
    request_id: str, prompt_ids: Sequence[int], *, adapter: str = "", **sampling: Any
) -> Request:
    sampling.setdefault("temperature", 0.0)
    return Request(
        id=request_id,
        prompt_ids=list(prompt_ids),
        sampling=SamplingParams(**sampling),
        adapter=adapter,
    )


def run(core: EngineCore, requests: Sequence[Request], *, stagger: int = 0) -> dict[str, Answer]:
    """All answers; request i enters after `i * stagger` steps."""
    answers = {request.id: Answer() for request in requests}
    waiting = list(requests)
    steps = 0
    while waiting or core.has_work():
        while waiting and steps >= (len(requests) - len(waiting)) * stagger:
            core.accept(waiting.pop(0))
        for delta in core.step():
            answers[delta.id].deltas.append(delta)
            answers[delta.id].token_ids += delta.token_ids
        steps += 1
    for answer in answers.values():
        assert answer.last.finish is not None
        assert answer.last.error is None, answer.last.error
    return answers


def reference_tokens(model: PreTrainedModel, prompt_ids: Sequence[int], count: int) -> list[int]:
    """What `transformers.generate` answers greedily, end tokens ignored."""
    inputs = torch.tensor([list(prompt_ids)], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=model.config.get_text_config().vocab_size,  # never drawn
        )
    return output[0, len(prompt_ids) :].tolist()


@dataclass
class Agreement:
    """Counts sequences that equal the reference, and those whose difference is explained.

    Explained means: at the first difference the reference itself was undecided, its two best
    logits being no further apart than `max_gap`.
    """

    model: PreTrainedModel
    max_gap: float
    same: int = 0
    explained: int = 0

    def compare(self, prompt_ids: Sequence[int], expected: list[int], actual: list[int]) -> None:
        assert len(actual) == len(expected)
        if actual == expected:
            self.same += 1
            return
        at = next(i for i in range(len(actual)) if actual[i] != expected[i])
        known = torch.tensor([[*prompt_ids, *expected[:at]]], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(known).logits[0, -1].float()
        gap = float(logits.max() - logits[actual[at]])
        assert gap <= self.max_gap, f"token {at}: {actual[at]} for {expected[at]}, gap {gap}"
        self.explained += 1

    def report(self, what: str) -> None:
        total = self.same + self.explained
        print(f"{what}: {self.same} of {total} equal, {self.explained} within {self.max_gap}")
