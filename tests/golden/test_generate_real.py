"""Greedy tokens of real models: natural text, real logits, the quantized weights of one file.

The reference is transformers' model with exactly the weights our reader gives.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.golden.engine import Agreement, make_core, reference_tokens, request_of, run
from tgi_cli.demo_model import demo_model_path
from tgi_cli.engine.messages import Request
from tgi_cli.model.gguf_config import hf_config
from tgi_cli.model.gguf_source import GgufSource
from tgi_cli.tokenizer import load_tokenizer

pytestmark = pytest.mark.real_model

SUBJECTS = [
    "the capital of France", "a good breakfast", "the speed of light", "prime numbers",
    "the Roman empire", "how bread is baked", "the moon landing", "a small red house",
    "the rules of chess", "whales and dolphins", "an old sailor", "photosynthesis",
    "the price of gold", "a walk in the rain", "computer memory", "the French revolution",
    "learning to swim", "a letter to a friend", "volcanoes", "the history of glass",
]  # fmt: skip
OPENINGS = [
    "Tell me about {}.", "In one sentence, {} can be described as",
    "Question: what is special about {}?\nAnswer:", "Once upon a time there was {}, and",
    "def about(): # {}\n    return",
]  # fmt: skip
PROMPTS = [opening.format(subject) for subject in SUBJECTS for opening in OPENINGS]


def gguf_path(name: str) -> Path:
    path = demo_model_path() if name == "smollm2" else os.environ.get("TGI_TEST_GEMMA3")
    if path is None:
        pytest.skip(
            "`tgi download demo` fetches SmolLM2; TGI_TEST_GEMMA3 names a Gemma 3 GGUF file"
        )
    return Path(path)


def reference_model(
    path: Path, dtype: torch.dtype, *, rounded_to: torch.dtype | None = None
) -> PreTrainedModel:
    """The model in `dtype`, its weights rounded to `rounded_to` (else `dtype`) before.

    Gemma multiplies by `1 + weight` in float32, so its norm weights stay as they are stored, here
    and in our decoder.
    """
    source = GgufSource(path)
    config = AutoConfig.for_model(**hf_config(source))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    exact = config.model_type == "gemma3_text"
    state = {}
    for key in set(source.keys()):
        if exact and "norm" in key:
            owner, _, name = key.rpartition(".")
            setattr(model.get_submodule(owner), name, Parameter(source.read(key).float()))
        else:
            state[key] = source.read(key).to(rounded_to or dtype).to(dtype)
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(key == "lm_head.weight" or "norm" in key for key in result.missing_keys)
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_float32_equals_transformers(name: str) -> None:
    path = gguf_path(name)
    core = make_core(path, dtype="float32", kv_cache_tokens=8192, block_size=16)
    model = reference_model(path, torch.float32)
    agreement = Agreement(model, max_gap=1e-3)
    requests = greedy_requests(path, num_prompts=10, count=20)
    answers = run(core, requests, stagger=1)
    for request in requests:
        expected = reference_tokens(model, request.prompt_ids, 20)
        agreement.compare(request.prompt_ids, expected, answers[request.id].token_ids)
    agreement.report(f"{name} float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_bfloat16_differs_from_float32_only_where_that_is_undecided(name: str) -> None:
    """Against float32 on the same bfloat16 weights.

    Two bfloat16 programs cannot be held to equal tokens: a logit of 20 has steps of 0.125, so the
    two best are often equal in transformers itself, which may differ from float32 as often as we.
    """
    path = gguf_path(name)
    core = make_core(
        path,
        dtype="bfloat16",
        activation_dtype="bfloat16",
        kv_cache_tokens=8192,
        block_size=16,
    )
    truth = reference_model(path, torch.float32, rounded_to=torch.bfloat16)
    rounded = reference_model(path, torch.bfloat16)
    agreement = Agreement(truth, max_gap=0.25)
    requests = greedy_requests(path, num_prompts=40, count=4)
    answers = run(core, requests, stagger=1)
    theirs = 0
    for request in requests:
        expected = reference_tokens(truth, request.prompt_ids, 4)
        agreement.compare(request.prompt_ids, expected, answers[request.id].token_ids)
        theirs += expected != reference_tokens(rounded, request.prompt_ids, 4)
    agreement.report(f"{name} bfloat16 against float32")
    print(f"transformers' own bfloat16 differs in {theirs}")
    assert agreement.explained <= theirs + 0.05 * len(requests)


def greedy_requests(path: Path, *, num_prompts: int, count: int) -> list[Request]:
    tokenizer = load_tokenizer(str(path))
    return [
        request_of(f"r{i}", tokenizer.encode(text, True), max_tokens=count, ignore_eos=True)
        for i, text in enumerate(PROMPTS[:num_prompts])
    ]
