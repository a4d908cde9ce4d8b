r"""Quantizers side by side: same model, same calibration tokens, same bits; prints a table.

    python benchmarks/off_grid.py MODEL COPY
    python benchmarks/quantization.py COPY WORK --group-size 64 \
        --gptqmodel VENV/bin/python --llmcompressor VENV/bin/python

The other quantizers want versions of their own (GPT-QModel an older numpy, llm-compressor an older
transformers), so each runs in its own virtual environment, whose interpreter is named here; one
that is not named is left out. Every result is loaded by tgi in float32 and measured on the same
held-out tokens, so that the weights alone are compared; for INT8 and FP8 `tgi quantize` itself
reports what rounded activations cost. Time and memory are those of the whole process.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tgi_cli.kernels.backend import select
from tgi_cli.model.batch import Batch, GroupTables
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.convert.calibration import samples_of, shipped_text
from tgi_cli.tokenizer import load_tokenizer

OURS = """
import json, sys
from pathlib import Path
import torch
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.convert.calibration import Samples
from tgi_cli.quantize.convert.job import Job
from tgi_cli.quantize.convert.recipe import Recipe
model, out, method, group, tokens = sys.argv[1:]
rows = torch.tensor(json.loads(Path(tokens).read_text()))
recipe = Recipe.choose(method, None, int(group) if method in ("gptq", "awq") else None)
seen = Samples(rows, "tokens")
# One short sample to measure on: what tgi does beyond quantizing is not timed.
probe = Samples(rows[:1, :32], "tokens")
job = Job(open_checkpoint(model), recipe, seen, probe, select("cpu"), Path(out))
job.run(lambda progress: None)
job.clean()
"""

GPTQMODEL = """
import json, sys
from pathlib import Path
import torch
from gptqmodel import GPTQModel, QuantizeConfig
model, out, method, group, tokens = sys.argv[1:]
rows = json.loads(Path(tokens).read_text())
config = QuantizeConfig(bits=4, group_size=int(group), desc_act=False, sym=True)
loaded = GPTQModel.load(model, config, device="cpu")
loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
loaded.save(out)
"""

LLMCOMPRESSOR = """
import json, sys
from pathlib import Path
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
model, out, method, group, tokens = sys.argv[1:]
rows = json.loads(Path(tokens).read_text())
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": int(group)}
weights["symmetric"] = method == "gptq"
grouped = {"group_0": {"targets": ["Linear"], "weights": weights}}
recipe = {
    "gptq": lambda: [GPTQModifier(config_groups=grouped, ignore=["lm_head"])],
    "awq": lambda: [
        AWQModifier(),
        QuantizationModifier(config_groups=grouped, ignore=["lm_head"]),
    ],
    "fp8": lambda: [
        QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    ],
    "int8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ],
}[method]()
options = {} if method == "fp8" else {
    "dataset": data, "max_seq_length": len(rows[0]), "num_calibration_samples": len(rows)
}
oneshot(model=model, recipe=recipe, output_dir=out, **options)
"""


@dataclass(frozen=True)
class Quantizer:
    """One tool: its interpreter, its program and the methods it has."""

    name: str
    python: str
    program: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Of one tool and method; `failure` says why there are no figures."""

    tool: str
    method: str
    perplexity: float = math.nan
    divergence: float = math.nan
    seconds: float = math.nan
    peak_bytes: int = 0
    failure: str = ""


def main() -> None:
    arguments = parse()
    work = Path(arguments.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(arguments.model)
    seen = samples_of(
        shipped_text("calibration"),
        "calibration",
        tokenizer,
        count=arguments.samples,
        length=arguments.seqlen,
    )
    held_out = samples_of(
        shipped_text("held_out"), "held out", tokenizer, count=arguments.held_out, length=512
    )
    tokens = work / "tokens.json"
    tokens.write_text(json.dumps(seen.tokens.tolist()))
    true = next_logs(arguments.model, held_out.tokens)
    print(f"{len(seen.tokens)} x {seen.shape[1]} tokens of calibration", flush=True)
    original = perplexity(true, held_out.tokens)
    print(
        f"original: perplexity {original:.4f} over {held_out.tokens.numel():,} tokens", flush=True
    )
    results = []
    for method in arguments.methods:
        for tool in quantizers(arguments):
            if method in tool.methods:
                out = work / f"{tool.name}-{method}"
                result = measured(tool, method, out, tokens, arguments, true, held_out.tokens)
                print(result, flush=True)
                results.append(result)
    show(results, original)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("work", help="folder for the results; existing ones are not made again")
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq", "fp8", "int8"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=64, help="samples of 512 tokens")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    return parser.parse_args()


def quantizers(arguments: argparse.Namespace) -> list[Quantizer]:
    every = ("gptq", "awq", "fp8", "int8")
    tools = [Quantizer("tgi", sys.executable, OURS, every)]
    if arguments.gptqmodel:
        tools.append(Quantizer("gptqmodel", arguments.gptqmodel, GPTQMODEL, ("gptq",)))
    if arguments.llmcompressor:
        tools.append(Quantizer("llm-compressor", arguments.llmcompressor, LLMCOMPRESSOR, every))
    return tools


def measured(
    tool: Quantizer,
    method: str,
    out: Path,
    tokens: Path,
    arguments: argparse.Namespace,
    true: torch.Tensor,
    held_out: torch.Tensor,
) -> Result:
    began = time.monotonic()
    # `env`: GPT-QModel's pools want two workers, also where there are fewer cores.
    command = ["env", "GPTQMODEL_CPU_WORKERS=2", tool.python, "-c", tool.program]
    model = str(Path(arguments.model).resolve())
    options = [model, str(out), method, str(arguments.group_size), str(tokens)]
    with out.with_suffix(".log").open("w") as log:
        code, peak = run([*command, *options], tokens.parent, log)
    seconds = time.monotonic() - began
    if code:
        lines = out.with_suffix(".log").read_text().strip().splitlines() or [f"status {code}"]
        return Result(tool.name, method, failure=lines[-1][:200])
    logs = next_logs(str(out), held_out)
    # In parts: all at once takes as much memory as both tables together.
    parts = zip(true.split(256), logs.split(256), strict=True)
    divergence = sum(float((a.exp() * (a - b)).sum()) for a, b in parts) / len(true)
    return Result(tool.name, method, perplexity(logs, held_out), divergence, seconds, peak)


def run(command: list[str], folder: Path, log: object) -> tuple[int, int]:
    """Exit code and peak memory in bytes; a child of a child, so that peaks do not mix."""
    program = (
        "import json, resource, subprocess, sys\n"
        "code = subprocess.call(sys.argv[1:], stdout=sys.stderr)\n"
        "print(json.dumps([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        stdout=subprocess.PIPE,
        stderr=log,  # type: ignore[arg-type]
        cwd=folder,  # some leave logs behind where they run
        text=True,
        check=True,
    )
    code, kibibytes = json.loads(done.stdout)
    return code, kibibytes * 1024


@torch.inference_mode()
def next_logs(folder: str, samples: torch.Tensor) -> torch.Tensor:
    """Log-probabilities behind each token, [tokens, vocabulary], in bfloat16's range, float32."""
    count, length = samples.shape
    checkpoint = open_checkpoint(folder).for_length(length)
    backend = select("cpu")
    decoder = Decoder.build(checkpoint, backend, torch.float32)
    tables = GroupTables(torch.arange(length), torch.zeros(1, 1, dtype=torch.int32))
    caches = [
        backend.allocate_kv(
            1, length, layer.attention.num_kv_heads, layer.attention.head_dim, torch.float32
        )
        for layer in checkpoint.spec.layers
    ]
    logs = torch.empty(count * length, checkpoint.vocab_size, dtype=torch.float32)
    for index, sample in enumerate(samples):
        batch = Batch(
            input_ids=sample,
            positions=torch.arange(length),
            query_start=torch.tensor([0, length], dtype=torch.int32),
            seq_lens=torch.tensor([length], dtype=torch.int32),
            groups=(tables,) * len(checkpoint.spec.kv_groups),
            logit_rows=torch.arange(length),
            adapter_slots=torch.zeros(1, dtype=torch.int32),
            query_lens=(length,),
            key_lens=(length,),
        )
        logits = decoder.logits(decoder.forward(batch, caches))
        logs[index * length : (index + 1) * length] = logits.log_softmax(-1)
    return logs


def perplexity(logs: torch.Tensor, samples: torch.Tensor) -> float:
    """Of the next tokens within each sample."""
    rows = logs.view(*samples.shape, -1)[:, :-1]
    return math.exp(-float(rows.gather(2, samples[:, 1:, None]).double().mean()))


def show(results: list[Result], original: float) -> None:
    table = Table("method", "tool", "perplexity", "change", "KL", "seconds", "peak memory")
    for result in results:
        figures = (
            [result.failure, "", "", "", ""]
            if result.failure
            else [
                f"{result.perplexity:.4f}",
                f"{result.perplexity / original - 1:+.2%}",
                f"{result.divergence:.4f}",
                f"{result.seconds:.0f}",
                f"{result.peak_bytes / 1e9:.2f} GB",
            ]
        )
        table.add_row(result.method, result.tool, *figures)
    Console(width=140).print(table)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"(this program itself: {own:.1f} GB)")


if __name__ == "__main__":
    main()
