"""What we write, loaded by the libraries that others use: the same tokens as our own numbers give.

compressed-tensors runs everywhere. GPT-QModel wants other versions than ours, so those tests are
`contract` and take the interpreter of its environment from `GPTQMODEL_PYTHON`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from tests.quantize.conversion import convert, job
from tests.quantize.stored import oracle
from tgi_cli.quantize.convert import reload
from tgi_cli.quantize.convert.reload import verify

COMPRESSED: dict[str, dict[str, Any]] = {
    "packed": {"method": "gptq", "group_size": 32, "layout": "compressed-tensors"},
    "packed-8-bit-rows": {
        "method": "gptq",
        "bits": 8,
        "group_size": -1,
        "layout": "compressed-tensors",
    },
    "fp8": {"method": "fp8"},
    "int8": {"method": "int8"},
}
PACKED: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32},
    "gptq-8-bit": {"method": "gptq", "bits": 8, "group_size": 32},
    "awq": {"method": "awq", "group_size": 32},
}
PROMPT = list(range(40, 60))
NEW_TOKENS = 32

GREEDY = """
import json, sys, torch
from transformers.models.auto import AutoModelForCausalLM
folder, prompt, count = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokens = list(prompt)
with torch.inference_mode():
    for _ in range(count):
        logits = model(torch.tensor([tokens])).logits[0, -1].float()
        tokens.append(int(logits.argmax()))
print("\\n" + json.dumps(tokens[len(prompt):]))
"""


def assert_greedy(ours: Any, theirs: list[int]) -> None:
    """Each of their tokens is our best one, or as good as that within rounding to bfloat16.

    (torch's int4 operation, which GPT-QModel uses on a CPU, multiplies in bfloat16.)
    """
    tokens = list(PROMPT)
    with torch.inference_mode():
        for token in theirs:
            logits = ours(torch.tensor([tokens])).logits[0, -1]
            assert float(logits.max() - logits[token]) < 0.05 * float(logits.std())
            tokens.append(token)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("recipe", COMPRESSED)
def test_compressed_tensors_reads_the_same_matrices(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, recipe: str
) -> None:
    pytest.importorskip("compressed_tensors")
    original, folder = tiny_checkpoint(family), tmp_path / "out"
    outcome = convert(job(original, folder, **COMPRESSED[recipe]))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = oracle(original, folder)
    tokens = torch.tensor([outcome.probe])
    if recipe.startswith("packed"):
        with torch.inference_mode():
            logits = [model(tokens).logits for model in (theirs, ours)]
        torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
        with torch.inference_mode():
            answer = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS,
                                     do_sample=False, eos_token_id=-1)  # fmt: skip
        assert_greedy(ours, answer[0, len(PROMPT) :].tolist())
    else:  # they round the activations too, int8 by another half step
        with torch.inference_mode():
            best = theirs(tokens).logits[0].argmax(-1).tolist()
        agreeing = sum(a == b for a, b in zip(best, outcome.expected, strict=True))
        assert agreeing >= 0.8 * len(best)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", [*COMPRESSED, *PACKED])
def test_we_read_what_we_write(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, recipe: str
) -> None:
    original, folder = tiny_checkpoint(family), tmp_path / "out"
    outcome = convert(job(original, folder, **{**COMPRESSED, **PACKED}[recipe]))
    with torch.inference_mode():
        logits = reload._by_tgi(str(folder), outcome.probe)
        expected = oracle(original, folder)(torch.tensor([outcome.probe])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)


def test_every_loader_is_asked(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    made = job(tiny_checkpoint("llama"), folder, **COMPRESSED["packed"])
    outcome = convert(made)
    verdicts = {
        verdict.loader: verdict
        for verdict in verify(folder, "compressed-tensors", outcome.probe, outcome.expected)
    }
    assert set(verdicts) == {"tgi", "transformers + compressed-tensors"}
    theirs = verdicts["transformers + compressed-tensors"]
    assert (theirs.state, theirs.agreement) == ("yes", 1.0), theirs.detail


def test_a_loader_that_fails_says_why(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    outcome = convert(job(tiny_checkpoint("llama"), folder, **COMPRESSED["packed"]))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    monkeypatch.setattr(reload, "_LOADERS", {"tgi": ((), ("compressed-tensors",))})
    [verdict] = verify(folder, "compressed-tensors", outcome.probe, outcome.expected)
    assert (verdict.state, verdict.agreement) == ("no", None)
    assert verdict.detail


@pytest.mark.contract
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("recipe", PACKED)
def test_gptqmodel_gives_the_same_tokens(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, recipe: str
) -> None:
    python = os.environ.get("GPTQMODEL_PYTHON")
    if python is None:
        pytest.skip("GPTQMODEL_PYTHON names no interpreter that has gptqmodel and optimum")
    original, folder = tiny_checkpoint(family), tmp_path / "out"
    convert(job(original, folder, **PACKED[recipe]))
    done = subprocess.run(
        [python, "-c", GREEDY, json.dumps([str(folder), PROMPT, NEW_TOKENS])],
        capture_output=True,
        text=True,
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_greedy(oracle(original, folder), json.loads(done.stdout.splitlines()[-1]))
