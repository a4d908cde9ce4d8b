"""Rotary frequencies of every scaling against `transformers`' own formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tgi_cli.model.families import read_spec
from tgi_cli.model.rope import inverse_frequencies, rope_table
from tgi_cli.model.spec import DynamicScaling, RopeSpec

HEAD_DIM, LENGTH = 64, 256
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn-betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-untruncated": YARN | {"truncate": False},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-attention": YARN | {"attention_factor": 1.5},
}


def spec_of(parameters: dict[str, Any]) -> tuple[RopeSpec, LlamaConfig]:
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
    )
    spec = read_spec(config.to_diff_dict(), "LlamaForCausalLM")
    return spec.layers[0].attention.rope, config


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str) -> None:
    rope, config = spec_of(SCALINGS[name])
    expected, factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config, torch.device("cpu"))
    frequencies, ours = inverse_frequencies(rope)
    torch.testing.assert_close(frequencies, expected, atol=0, rtol=1e-6)
    assert ours == pytest.approx(factor)


@pytest.mark.parametrize("length", [LENGTH // 2, LENGTH, LENGTH + 1, 2 * LENGTH])
def test_dynamic_scaling_is_resolved_for_the_configured_length(length: int) -> None:
    _, config = spec_of(SCALINGS["dynamic"])
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=length)
    rope = RopeSpec(10_000.0, HEAD_DIM, length, DynamicScaling(2.0, LENGTH))
    torch.testing.assert_close(inverse_frequencies(rope)[0], expected, atol=0, rtol=1e-5)


def test_table_holds_cosines_then_sines() -> None:
    rope = RopeSpec(10_000.0, 4, 3)
    table = rope_table(rope, torch.float64, torch.device("cpu"))
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.01], [2.0, 0.02]])
    expected = torch.cat([angles.cos(), angles.sin()], -1).double()
    torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)
