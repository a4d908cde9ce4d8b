"""Requests that together use every stage of the sampler, for one batch of a tiny model."""

from __future__ import annotations

import msgspec
import torch

from tests.golden.engine import request_of
from tgi_cli.engine.messages import Request
from tgi_cli.grammar import Grammar
from tgi_cli.sampling import Watermark

_SAMPLING = {
    "greedy": {},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 3.0},
    "top-k": {"temperature": 0.9, "top_k": 7},
    "top-p": {"temperature": 1.1, "top_p": 0.8},
    "min-p": {"temperature": 0.8, "min_p": 0.05, "top_p": 0.95, "top_k": 100},
    "typical": {"temperature": 1.0, "typical_p": 0.7},
    "penalties": {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
    },
    "bias": {"temperature": 0.5, "logit_bias": {7: 3.0, 9: -50.0}},
    "minimum": {"temperature": 1.0, "min_tokens": 5, "stop_token_ids": (4, 5, 6)},
    "watermark": {"temperature": 1.0, "watermark": Watermark(gamma=0.4, delta=2.0)},
    "logprobs": {"temperature": 1.0, "logprobs": 5, "prompt_logprobs": 3},
    "grammar": {"temperature": 1.0},
}


def sampling_mix(vocab_size: int, *, new: int = 12) -> list[Request]:
    """One request a stage, on prompts of different lengths."""
    generator = torch.Generator().manual_seed(5)
    requests = []
    for number, (name, sampling) in enumerate(_SAMPLING.items()):
        prompt = torch.randint(3, vocab_size // 2, (3 + 2 * number,), generator=generator)
        request = request_of(name, prompt.tolist(), seed=number, max_tokens=new, **sampling)
        if name == "grammar":
            request = msgspec.structs.replace(request, grammar=Grammar.regex("[a-z]{3}[0-9]{9}"))
        requests.append(request)
    return requests
