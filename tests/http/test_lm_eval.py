"""`lm-eval`: `local-completions` against its `hf` backend, same weights, same scores."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.http.live import LiveServer
from tests.http.own_venv import python_with

QUESTIONS = [
    ("The server", [" is up", " is down", " has a name"]),
    ("One two three", [" four", " seven", " hello"]),
    ("Water is made of", [" hydrogen and oxygen", " iron", " stone"]),
    ("A cat says", [" meow", " woof", " moo"]),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata:
  version: 1
"""
CHOOSING = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITING = """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
"""


def write_tasks(folder: Path) -> None:
    data = folder / "questions.jsonl"
    lines = [json.dumps({"question": q, "choices": choices}) for q, choices in QUESTIONS]
    data.write_text("\n".join(lines))
    for name, kind in (("choosing", CHOOSING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)


def evaluate(python: Path, tasks: Path, out: Path, model: str, arguments: str) -> dict[Any, Any]:
    """Every answer by task and question."""
    command = [python, "-m", "lm_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", "choosing,writing", "--include_path", tasks, "--device", "cpu"]
    command += ["--output_path", out, "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=tasks
    )
    assert result.returncode == 0, result.stderr[-4000:]
    answers: dict[Any, Any] = {}
    for file in out.rglob("samples_*.jsonl"):
        for sample in map(json.loads, file.read_text().splitlines()):
            task = "choosing" if "acc" in sample else "writing"
            answers[task, sample["doc_id"]] = sample["filtered_resps"]
            answers[task, sample["doc_id"], "score"] = sample.get("acc", sample.get("exact_match"))
    return answers


@pytest.mark.slow
@pytest.mark.contract
def test_scores_are_those_of_transformers(
    pytestconfig: pytest.Config, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    python = python_with(pytestconfig, "lm-eval[api]>=0.4.9")
    # Its hf backend takes torch and transformers from this environment.
    site = next((python.parent.parent / "lib").glob("python*")) / "site-packages"
    (site / "zz_ours.pth").write_text(sysconfig.get_path("purelib"))
    write_tasks(tmp_path)
    checkpoint = tiny_checkpoint("llama")
    theirs = evaluate(
        python, tmp_path, tmp_path / "hf", "hf", f"pretrained={checkpoint},dtype=float32"
    )
    with LiveServer(checkpoint, "--dtype", "float32") as server:
        arguments = f"base_url={server.url}/v1/completions,model=tgi,tokenizer={checkpoint}"
        arguments += ",tokenized_requests=False,max_length=256"
        ours = evaluate(python, tmp_path, tmp_path / "tgi", "local-completions", arguments)
    assert len(theirs) == 4 * len(QUESTIONS)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if key[0] == "writing" or key[-1] == "score":
            assert ours[key] == expected, key
            continue
        for (mine, greedy), (logprob, best) in zip(ours[key], expected, strict=True):
            assert float(mine) == pytest.approx(float(logprob), abs=1e-3)
            assert greedy == best
