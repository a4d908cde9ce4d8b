"""Greedy tokens of the whole engine against `transformers.generate` on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.golden.engine import Agreement, make_core, reference_tokens, request_of, run
from tests.tiny import FAMILIES

LENGTHS = [1, 2, 7, 8, 9, 23, 40]  # around block and window sizes
NEW = 24  # beyond every window of the tiny models


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 250, (length,), generator=generator).tolist()


class Reference:
    """One family's model in transformers, its answers remembered."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def answer(self, prompt: list[int], count: int = NEW) -> list[int]:
        key = (tuple(prompt), count)
        if key not in self._answers:
            self._answers[key] = reference_tokens(self.model, prompt, count)
        return self._answers[key]

    def check(self, prompt: list[int], actual: list[int], agreement: Agreement) -> None:
        agreement.compare(prompt, self.answer(prompt, len(actual)), actual)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Reference]:
    return cache(lambda family: Reference(tiny_checkpoint(family)))


def check_all(
    reference: Reference, core_options: dict, requests, *, stagger: int = 0, what: str = ""
) -> dict:
    agreement = Agreement(reference.model, max_gap=1e-3)
    core = make_core(reference.folder, **core_options)
    answers = run(core, requests, stagger=stagger)
    for request in requests:
        answer = answers[request.id]
        assert answer.last.finish == "length"
        reference.check(request.prompt_ids, answer.token_ids, agreement)
    agreement.report(what)
    return {"core": core, "answers": answers}


def greedy(name: str, prompt: list[int], count: int = NEW):
    return request_of(name, prompt, max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone(family: str, reference: Callable[[str], Reference]) -> None:
    core = make_core(reference(family).folder, prefix_caching=False)
    agreement = Agreement(reference(family).model, max_gap=1e-3)
    for length in LENGTHS:
        request = greedy(f"r{length}", prompt_of(length))
        answer = run(core, [request])[request.id]
        reference(family).check(request.prompt_ids, answer.token_ids, agreement)
    agreement.report(f"{family} alone")


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_with_strangers(family: str, reference: Callable[[str], Reference]) -> None:
    requests = [greedy(f"r{length}", prompt_of(length)) for length in LENGTHS]
    requests += [
        request_of("s1", prompt_of(11, 5), temperature=1.0, seed=3, max_tokens=NEW, ignore_eos=True)
    ]
    core = make_core(reference(family).folder, max_num_seqs=6)
    answers = run(core, requests, stagger=2)
    agreement = Agreement(reference(family).model, max_gap=1e-3)
    for request in requests[:-1]:
        reference(family).check(request.prompt_ids, answers[request.id].token_ids, agreement)
    agreement.report(f"{family} batched")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_chunk_size(family: str, reference: Callable[[str], Reference]) -> None:
    prompt = prompt_of(23)
    agreement = Agreement(reference(family).model, max_gap=1e-3)
    for chunk in range(1, len(prompt) + 1):
        core = make_core(
            reference(family).folder, max_batch_tokens=chunk, max_num_seqs=min(2, chunk)
        )
        answer = run(core, [greedy("r", prompt, 4)])["r"]
        reference(family).check(prompt, answer.token_ids, agreement)
    agreement.report(f"{family} in chunks of 1 to {len(prompt)}")


@pytest.mark.parametrize("family", FAMILIES)
def test_after_preemption(family: str, reference: Callable[[str], Reference]) -> None:
    """A pool for two of five sequences: they throw each other out and come back."""
    requests = [greedy(f"r{length}", prompt_of(length, 2), 40) for length in (9, 10, 11, 12, 13)]
    done = check_all(
        reference(family),
        {"kv_cache_tokens": 112, "max_model_len": 64, "prefix_caching": False},
        requests,
        what=f"{family} preempted",
    )
    if None in {layout.window for layout in done["core"].memory_plan.layouts()}:
        assert done["core"].stats().preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_prefix_hit(family: str, reference: Callable[[str], Reference]) -> None:
    shared = prompt_of(30, 3)
    core = make_core(reference(family).folder)
    agreement = Agreement(reference(family).model, max_gap=1e-3)
    first = greedy("first", shared)
    answer = run(core, [first])["first"]
    reference(family).check(shared, answer.token_ids, agreement)
    # The same prompt, a longer one, a branch, and one that goes on from generated tokens.
    others = [
        greedy("again", shared),
        greedy("longer", shared + prompt_of(5, 4)),
        greedy("branch", shared[:17] + prompt_of(6, 4)),
        greedy("next turn", shared + answer.token_ids + prompt_of(3, 4)),
    ]
    answers = run(core, others)
    for request in others:
        result = answers[request.id]
        reference(family).check(request.prompt_ids, result.token_ids, agreement)
        assert result.deltas[0].num_cached_tokens >= 16
    agreement.report(f"{family} on prefix hits")


def test_bfloat16_is_as_near_to_the_truth_as_transformers(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Tokens against float32 on the same bfloat16 weights.

    On random weights the best logits lie so close together that `transformers` in bfloat16 differs
    from itself in float32 in every fifth sequence; ours may not differ in more of them.
    """
    ours = theirs = 0
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma3"):
        path = tiny_checkpoint(family, dtype=torch.bfloat16)
        truth, rounded = Reference(path, torch.float32), Reference(path, torch.bfloat16)
        core = make_core(path, dtype="bfloat16", block_size=16)
        agreement = Agreement(truth.model, max_gap=0.15)
        requests = [greedy(f"r{i}", prompt_of(4 + i, i), 8) for i in range(20)]
        answers = run(core, requests)
        for request in requests:
            expected = reference_tokens(truth.model, request.prompt_ids, 8)
            agreement.compare(request.prompt_ids, expected, answers[request.id].token_ids)
            theirs += expected != reference_tokens(rounded.model, request.prompt_ids, 8)
        agreement.report(f"{family} bfloat16 against float32")
        ours += agreement.explained
    print(f"of 100 sequences {ours} differ from float32, of transformers' in bfloat16 {theirs}")
    assert ours <= theirs
