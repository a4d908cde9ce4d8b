"""The demo model in its packed form: what activations rounded to int8 cost, on real text.

Truth is float32 on the same weights. Prose of Python's reference manual, which every Python holds,
stands in for a held-out text. `pytest -m real_model -s tests/golden/test_quantized_real.py` prints
the figures that docs/quantization.md quotes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from tests.golden.native import native
from tests.golden.paged import paged
from tgi_cli.demo_model import demo_model_path
from tgi_cli.kernels.cpu import library
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.tokenizer import load_tokenizer

TOPICS = ("exceptions", "formatstrings", "naming")
LENGTH = 256  # tokens of each

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(library.load() is None, reason="the native kernels are not built here"),
]


@dataclass
class Cost:
    """Of some logits against the true ones, over all positions of all texts."""

    texts: int  # the first token of each is not predicted
    divergence: float = 0.0  # Kullback-Leibler, nats per token, summed
    agreeing: int = 0  # positions with the same best token
    surprise: float = 0.0  # nats per token, summed
    true_surprise: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor, truth: Tensor, tokens: list[int]) -> None:
        ours, theirs = logits.log_softmax(-1), truth.log_softmax(-1)
        self.divergence += float((theirs.exp() * (theirs - ours)).sum())
        self.agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        following = torch.tensor(tokens[1:]).unsqueeze(1)
        self.surprise -= float(ours[:-1].gather(1, following).sum())
        self.true_surprise -= float(theirs[:-1].gather(1, following).sum())
        self.tokens += len(tokens)

    @property
    def perplexity_ratio(self) -> float:
        return math.exp((self.surprise - self.true_surprise) / (self.tokens - self.texts))


def test_int8_activations_cost_little() -> None:
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not in the cache folder; `tgi download demo` puts it there")
    tokenizer = load_tokenizer(str(path))
    texts = [tokenizer.encode(topics[name], False)[:LENGTH] for name in TOPICS]
    true = paged(path, max_len=LENGTH, block_size=16)
    truths = [true.afresh(max_len=LENGTH, block_size=16).run(text, LENGTH) for text in texts]
    costs = {}
    checkpoint = open_checkpoint(str(path)).for_length(LENGTH)
    exact = checkpoint.keeping_blocks(wide_activations=True)
    for name, held in (("bfloat16", exact), ("int8", checkpoint.keeping_blocks())):
        with native(held, max_len=LENGTH) as driver:
            cost = costs[name] = Cost(len(TOPICS))
            for text, truth in zip(texts, truths, strict=True):
                logits = driver.afresh(max_len=LENGTH, block_size=16).run(text, LENGTH)
                cost.add(logits, truth, text)
        print(
            f"{name}: KL {cost.divergence / cost.tokens:.2e} nats per token, "
            f"top-1 agreement {cost.agreeing / cost.tokens:.2%}, "
            f"perplexity x {cost.perplexity_ratio:.5f} of float32 over {cost.tokens} tokens"
        )
    assert costs["bfloat16"].divergence / costs["bfloat16"].tokens < 1e-3
    int8 = costs["int8"]
    assert int8.divergence / int8.tokens < 1e-2
    assert int8.agreeing / int8.tokens > 0.94
    assert int8.perplexity_ratio == pytest.approx(1, abs=0.01)
