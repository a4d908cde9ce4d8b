"""What each form of the KV cache costs on the demo model, on real text.

Truth is float32 on the same weights, cache included. `pytest -m real_model -s
tests/golden/test_kv_cache_real.py` prints the figures that docs/kv-cache.md quotes.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest

from tests.golden.native import native
from tests.golden.paged import paged
from tests.golden.test_quantized_real import Cost
from tgi_cli.demo_model import demo_model_path
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.kv_rows import KV_DTYPES
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.tokenizer import load_tokenizer

TOPICS = ("exceptions", "formatstrings", "naming", "import", "specialnames", "typesmapping")
LENGTH = 256  # tokens of each
#: Kullback-Leibler divergence from float32, nats per token, at most.
BOUNDS = {
    "bfloat16": 1e-3,
    "float16": 1e-3,
    "float32": 1e-3,
    "int8": 4e-3,
    "fp8_e4m3": 2e-2,
    "fp8_e5m2": 5e-2,
}

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(library.load() is None, reason="the native kernels are not built here"),
]


def test_what_the_cache_costs() -> None:
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not in the cache folder; `tgi download demo` puts it there")
    tokenizer = load_tokenizer(str(path))
    texts = [tokenizer.encode(topics[name], False)[:LENGTH] for name in TOPICS]
    true = paged(path, max_len=LENGTH, block_size=16)
    truths = [true.afresh(max_len=LENGTH, block_size=16).run(text, LENGTH) for text in texts]
    checkpoint = open_checkpoint(str(path)).for_length(LENGTH).keeping_blocks(wide_activations=True)
    for name, dtype in KV_DTYPES.items():
        with native(checkpoint, max_len=LENGTH, kv_dtype=dtype) as driver:
            cost = Cost(len(TOPICS))
            for text, truth in zip(texts, truths, strict=True):
                logits = driver.afresh(max_len=LENGTH, block_size=16).run(text, LENGTH)
                cost.add(logits, truth, text)
        divergence = cost.divergence / cost.tokens
        print(
            f"{name}: KL {divergence:.2e} nats per token, "
            f"top-1 agreement {cost.agreeing / cost.tokens:.2%}, "
            f"perplexity x {cost.perplexity_ratio:.5f} of float32 over {cost.tokens} tokens"
        )
        assert divergence < BOUNDS[name]
