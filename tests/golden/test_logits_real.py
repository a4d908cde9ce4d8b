"""The demo model, a real GGUF file, against `transformers` on the same file."""

from __future__ import annotations

import pytest
import torch
from transformers import GgufConfig
from transformers.models.auto import AutoModelForCausalLM

from tests.golden.paged import paged
from tgi_cli.demo_model import demo_model_path

pytestmark = pytest.mark.real_model


def test_demo_model_logits_equal_transformers() -> None:
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not in the cache folder; `tgi download demo` puts it there")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 49152, (150,), generator=generator).tolist()
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    driver = paged(path, max_len=len(tokens), block_size=16)
    logits = torch.cat([driver.run(tokens[:140], 33), driver.run(tokens[140:], 1)])
    # Logits have a deviation of about 7 here, and 30 layers add up the orders of summation.
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
