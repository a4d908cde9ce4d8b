"""Perplexity of a model at each precision, and of llama.cpp on the same text in the same windows.

    python -m benchmarks.perplexity MODEL MODEL@int8 MODEL@int4 MODEL-Q4_0.gguf --tokens 20480
        [--llama-perplexity BIN/llama-perplexity MODEL-BF16.gguf MODEL-Q4_0.gguf ...]

A model is a folder or a GGUF file, `@METHOD` rounds it at load (`--quantize`), `@dtype:float32`
sets the number type, `@activation:bfloat16` what multiplies quantized weights; several may follow
each other. The text is prose of Python's reference manual, which every Python holds. As in
llama.cpp's tool, windows of 512 tokens stand alone and their second halves count. The first model
is what the ratios compare with; the standard error of a ratio is that of the mean difference of
two models' losses, token by token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

from tgi_cli import LLM, SamplingParams
from tgi_cli.tokenizer import load_tokenizer

WINDOW = 512


@dataclass
class Result:
    """Losses in nats of the counted tokens, in the text's order; of llama.cpp only their mean."""

    name: str
    mean: float
    losses: list[float] | None = None

    def ratio(self, base: Result) -> tuple[float, float | None]:
        """Perplexity against another's, and the standard error of that ratio."""
        ratio = math.exp(self.mean - base.mean)
        if self.losses is None or base.losses is None:
            return ratio, None
        differences = [a - b for a, b in zip(self.losses, base.losses, strict=True)]
        return ratio, ratio * statistics.stdev(differences) / math.sqrt(len(differences))


def text() -> str:
    """Long enough for any number of windows one has time for."""
    return "\n".join(topics[name] for name in sorted(topics))


def options_of(model: str) -> tuple[str, dict[str, Any]]:
    """`MODEL@int8@dtype:float32` to a path and the arguments of `LLM`."""
    path, *parts = model.split("@")
    options: dict[str, Any] = {}
    for part in parts:
        name, _, value = part.rpartition(":")
        options[{"": "quantize", "dtype": "dtype", "activation": "activation_dtype"}[name]] = value
    return path, options


def ours(model: str, num_tokens: int) -> Result:
    """Through the engine, as a request for the log probabilities of a prompt."""
    path, options = options_of(model)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text(), add_special_tokens=False)
    bos = tokenizer.encode("", add_special_tokens=True)[:1]
    windows = [ids[i : i + WINDOW] for i in range(0, num_tokens, WINDOW)]
    if bos:
        windows = [bos + window[1:] for window in windows]
    options = {"dtype": "bfloat16", **options}
    with LLM(path, max_model_len=WINDOW + 1, max_num_seqs=4, **options) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        outputs = llm.generate(windows, sampling)
    losses = []
    for output in outputs:
        assert output.prompt_logprobs is not None
        for entry in output.prompt_logprobs[WINDOW // 2 :]:
            assert entry is not None
            losses.append(-entry.logprob)
    return Result(model, statistics.fmean(losses), losses)


def llama(program: str, model: str, num_tokens: int) -> Result:
    """`llama-perplexity`, which adds its own beginning of text to each window."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text())
        file.flush()
        command = [program, "-m", model, "-f", file.name, "-c", str(WINDOW), "--chunks",
                   str(num_tokens // WINDOW), "-t", str(os.cpu_count())]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"error: {program} printed no perplexity\n{done.stderr[-2000:]}")
    return Result(f"llama.cpp {Path(model).name}", math.log(float(found[1])))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=40 * WINDOW)
    parser.add_argument("--llama-perplexity", nargs="+", default=[], metavar="PROGRAM MODEL")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, results = Console(width=120), []
    program, *files = options.llama_perplexity or [""]
    for measure, models in (
        (ours, options.models),
        (lambda model, tokens: llama(program, model, tokens), files),
    ):
        first = None
        for model in models:
            result = measure(model, options.tokens)
            first = first or result
            results.append((result, *result.ratio(first)))
            console.print(f"{result.name}: {math.exp(result.mean):.3f}", highlight=False)
    table = Table(title=f"{options.tokens} tokens in windows of {WINDOW}, second halves counted")
    for column in ("model", "perplexity", "against the first", "standard error"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for result, ratio, error in results:
        shown = "" if error is None else f"{100 * error:.2f} %"
        table.add_row(
            result.name, f"{math.exp(result.mean):.3f}", f"{100 * (ratio - 1):+.2f} %", shown
        )
    console.print(table)
    if options.json is not None:
        rows = [
            {"model": result.name, "nats": result.mean, "ratio": ratio, "error": error}
            for result, ratio, error in results
        ]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
