"""Quantized folders in other programs: what they compute, against our float32 evaluation.

    python -m benchmarks.interchange --vllm VENV/bin/python FOLDER [FOLDER ...]
    python -m benchmarks.interchange --transformers VENV/bin/python FOLDER [FOLDER ...]

The second compares the logits of the same prompts in float32 with those of transformers; formats
whose activations it rounds differ by that. The first lets vLLM answer:

Four prompts of 32 tokens, 32 greedy tokens each, in bfloat16. Every token is looked up in our own
float32 logits behind the same text: it is the best one there, or so many nats behind the best.
Formats that vLLM's CPU build refuses give its error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tgi_cli.quantize.convert.calibration import read_text, samples_of, shipped_text
from tgi_cli.tokenizer import load_tokenizer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 32

_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=8)
sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
answers = model.generate([{"prompt_token_ids": row} for row in prompts], sampling)
print("\\n" + json.dumps([list(each.outputs[0].token_ids) for each in answers]))
"""

_TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.inference_mode():
    torch.save(model(torch.tensor(prompts)).logits.float().log_softmax(-1), out)
"""

#: Log-probabilities of the next tokens behind a text, in float32: [tokens] -> [tokens, vocabulary].
Evaluation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """Of the tokens of another server with our evaluation; `failure` is its error instead."""

    best: int = 0
    tokens: int = 0
    furthest: float = 0.0  # nats behind our best, at most
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        return f"{self.best} of {self.tokens} best, at most {self.furthest:.3f} nats behind"


def main() -> None:
    from benchmarks.quantization import Measured

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+")
    programs = parser.add_mutually_exclusive_group(required=True)
    programs.add_argument("--vllm", metavar="PYTHON")
    programs.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--text", metavar="FILE", help="prompts; the package's text if left out")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        tokenizer = load_tokenizer(folder)
        text = shipped_text("held_out") if arguments.text is None else read_text(arguments.text)
        prompts = samples_of(text, "prompts", tokenizer, count=PROMPTS, length=PROMPT_TOKENS).tokens
        behind = Measured(folder, prompts).behind
        found = (
            agreement(arguments.vllm, folder, prompts, behind)
            if arguments.vllm
            else difference(arguments.transformers, folder, prompts, behind)
        )
        print(f"{folder}: {found}", flush=True)


def difference(python: str, folder: str, prompts: Tensor, behind: Evaluation) -> str:
    """How far the log-probabilities of an interpreter's transformers are from ours, or why not."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logs.pt"
        done = subprocess.run(
            [python, "-c", _TRANSFORMERS, str(Path(folder).resolve()),
             json.dumps(prompts.tolist()), str(out)],
            capture_output=True,
            text=True,
            env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""},
        )  # fmt: skip
        if done.returncode:
            return reason(done.stderr)
        theirs = torch.load(out)
    ours = torch.stack([behind(prompt) for prompt in prompts])
    moved = float((ours - theirs).abs().max())
    best = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return f"at most {moved:.1e} nats apart, {best} of {prompts.numel()} best tokens the same"


def agreement(python: str, folder: str, prompts: Tensor, behind: Evaluation) -> Agreement:
    """Let the vLLM of an interpreter go on from `prompts` [count, length]."""
    done = subprocess.run(
        [python, "-c", _VLLM, str(Path(folder).resolve()), json.dumps(prompts.tolist()),
         str(NEW_TOKENS)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "LD_PRELOAD": str(Path(python).parent.parent / "lib" / "libiomp5.so"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
        },
    )  # fmt: skip
    if done.returncode:
        return Agreement(failure=reason(done.stderr))
    best, furthest, count = 0, 0.0, 0
    for prompt, answer in zip(prompts, json.loads(done.stdout.splitlines()[-1]), strict=True):
        new = torch.tensor(answer)
        logs = behind(torch.cat([prompt, new]))[len(prompt) - 1 : -1]
        gaps = logs.amax(-1) - logs.gather(1, new[:, None])[:, 0]
        best += int((gaps == 0).sum())
        furthest = max(furthest, float(gaps.max()))
        count += len(answer)
    return Agreement(best, count, furthest)


def reason(log: str) -> str:
    """The first error that is raised, which later ones follow from; else the last line."""
    lines = log.strip().splitlines() or ["it ended without a word"]
    raised = [line for line in lines if "Error: " in line or "Exception: " in line]
    return (raised or lines[-1:])[0].strip()[:300]


if __name__ == "__main__":
    main()
