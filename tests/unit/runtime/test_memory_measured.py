"""The memory plan against what a process then holds, every KV block written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint
from tgi_cli.demo_model import demo_model_path


def measured(path: Path, dtype: str, num_seqs: int, max_len: int) -> tuple[dict, int]:
    command = [sys.executable, "-m", "tests.unit.runtime.measure_memory"]
    command += [str(path), dtype, str(num_seqs), str(max_len)]
    root = Path(__file__).parents[3]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    return answer["plan"], answer["peak"]


def check(plan: dict, peak: int) -> None:
    assert plan["total_bytes"] == pytest.approx(peak, rel=0.10), plan


def test_plan_is_what_a_small_model_takes(tmp_path: Path) -> None:
    make_checkpoint(
        tmp_path,
        "llama",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    plan, peak = measured(tmp_path, "float32", num_seqs=16, max_len=1024)
    check(plan, peak)
    # What is planned beside the interpreter and its libraries is worth planning.
    assert plan["needed_bytes"] > 0.4 * plan["total_bytes"]


@pytest.mark.real_model
def test_plan_is_what_the_demo_model_takes() -> None:
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not in the cache folder; `tgi download demo` puts it there")
    plan, peak = measured(path, "bfloat16", num_seqs=16, max_len=1024)
    check(plan, peak)
