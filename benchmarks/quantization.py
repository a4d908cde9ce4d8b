r"""Quantizers side by side: same model, same calibration tokens, same bits; prints a table.

    python benchmarks/off_grid.py MODEL COPY
    python -m benchmarks.quantization COPY WORK --group-size 64 \
        --gptqmodel VENV/bin/python --llmcompressor VENV/bin/python --autoawq VENV/bin/python

The other quantizers want versions of their own (GPT-QModel an older numpy, llm-compressor an older
transformers), so each runs in its own virtual environment, whose interpreter is named here; one
that is not named is left out. Every result is loaded by tgi in float32 and measured on the same
held-out tokens, so that the weights alone are compared; for INT8 and FP8 `tgi quantize` itself
reports what rounded activations cost. Time and memory are those of the whole process; seconds of
processor time say more than those of the clock where other things run too. A result that is in
WORK already is measured again, not made again. `--device cuda` runs all of it on a GPU; with `cpu`
no tool sees one. On a GPU tgi and AutoAWQ have run; GPT-QModel and llm-compressor have not.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.interchange import PROMPT_TOKENS, PROMPTS, agreement
from tgi_cli.kernels.backend import select
from tgi_cli.model.batch import Batch, GroupTables
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.convert.calibration import read_text, samples_of, shipped_text
from tgi_cli.quantize.convert.layer_work import Rounding, round_inputs
from tgi_cli.quantize.methods.activations import round_fp8, round_int8
from tgi_cli.tokenizer import load_tokenizer

#: What servers do to the activations of these methods.
ROUNDINGS: dict[str, Rounding] = {"int8": round_int8, "fp8": round_fp8}

OURS = """
import json, sys
from pathlib import Path
import torch
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.convert.calibration import Samples
from tgi_cli.quantize.convert.job import Job
from tgi_cli.quantize.convert.recipe import Recipe
model, out, method, group, tokens, device = sys.argv[1:]
rows = torch.tensor(json.loads(Path(tokens).read_text()))
recipe = Recipe.choose(method, None, int(group) if method in ("gptq", "awq") else None)
seen = Samples(rows, "tokens")
# One short sample to measure on: what tgi does beyond quantizing is not timed.
probe = Samples(rows[:1, :32], "tokens")
job = Job(open_checkpoint(model), recipe, seen, probe, select(device), Path(out))
job.run(lambda progress: None)
job.clean()
"""

NEAREST = OURS.replace('seen = Samples(rows, "tokens")', "seen = None")

GPTQMODEL = """
import json, sys
from pathlib import Path
import torch
from gptqmodel import GPTQModel, QuantizeConfig
model, out, method, group, tokens, device = sys.argv[1:]
rows = json.loads(Path(tokens).read_text())
options = {"gptq": {"sym": True}, "awq": {"quant_method": "awq", "format": "gemm", "sym": False}}
config = QuantizeConfig(bits=4, group_size=int(group), desc_act=False, **options[method])
loaded = GPTQModel.load(model, config, device=device)
loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
loaded.save(out)
"""

AUTOAWQ = """
import json, sys
from pathlib import Path
import torch
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer
from awq.utils import calib_data
model, out, method, group, tokens, device = sys.argv[1:]
rows = json.loads(Path(tokens).read_text())
# Its own loader wants text; these are the tokens that the others see.
quantizer.get_calib_dataset = lambda **kw: [torch.tensor([row]) for row in rows]
loaded = AutoAWQForCausalLM.from_pretrained(
    model, device_map="cpu", torch_dtype=torch.float32, use_cache=False, low_cpu_mem_usage=True
)
config = {"zero_point": True, "q_group_size": int(group), "w_bit": 4, "version": "GEMM"}
loaded.quantize(None, quant_config=config)
loaded.save_quantized(out)
"""

LLMCOMPRESSOR = """
import json, sys
from pathlib import Path
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
# Its AWQ pins memory for an accelerator, which fails where there is none.
IntermediatesCache.pin_memory = lambda *a, **kw: None
model, out, method, group, tokens, device = sys.argv[1:]
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
class Cost:
    """Of one run: seconds by the clock and of processors, largest resident memory in bytes."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Result:
    """Of one tool and method; `failure` says why there are no figures."""

    tool: str
    method: str
    perplexity: float = math.nan
    divergence: float = math.nan
    rounded: float | None = None  # perplexity with activations rounded too
    cost: Cost | None = None
    failure: str = ""


def main() -> None:
    arguments = parse()
    work = Path(arguments.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(arguments.model)
    seen = samples_of(
        text(arguments.calibration, "calibration"),
        "calibration",
        tokenizer,
        count=arguments.samples,
        length=arguments.seqlen,
    )
    held_out = samples_of(
        text(arguments.held_out_text, "held_out"),
        "held out",
        tokenizer,
        count=arguments.held_out,
        length=512,
    )
    tokens = work / "tokens.json"
    tokens.write_text(json.dumps(seen.tokens.tolist()))
    original = Measured(arguments.model, held_out.tokens, arguments.device)
    kept = work / f"original-{held_out.digest[:8]}.pt"
    true = torch.load(kept, map_location=arguments.device) if kept.exists() else original.states()
    torch.save(true, kept)
    before = original.perplexity(true)
    print(f"{len(seen.tokens)} x {seen.shape[1]} tokens of calibration", flush=True)
    print(f"original: perplexity {before:.4f} over {held_out.tokens.numel():,} tokens", flush=True)
    results = []
    for method in arguments.methods:
        if method in ROUNDINGS:
            alone = Measured(arguments.model, held_out.tokens, arguments.device)
            alone.round_inputs(ROUNDINGS[method])
            after = alone.perplexity(alone.states())
            print(
                f"only activations rounded as for {method}: {after / before - 1:+.2%}", flush=True
            )
        for tool in quantizers(arguments):
            if method in tool.methods:
                out = work / f"{tool.name}-{method}"
                result = measured(tool, method, out, tokens, arguments, original, true)
                print(result, flush=True)
                results.append(result)
    show(results, before)
    for method in arguments.methods if arguments.vllm else ():
        folder = str(work / f"tgi-{method}")
        prompts = held_out.tokens[:PROMPTS, :PROMPT_TOKENS]
        found = agreement(arguments.vllm, folder, prompts, Measured(folder, prompts).behind)
        print(f"{method} in vLLM: {found}", flush=True)


def text(path: str | None, shipped: str) -> str:
    return shipped_text(shipped) if path is None else read_text(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("work", help="folder for the results; existing ones are not made again")
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq", "fp8", "int8"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument(
        "--calibration", metavar="FILE", help="text; that of the package if left out"
    )
    parser.add_argument("--held-out-text", metavar="FILE", help="the same for what is measured on")
    parser.add_argument("--held-out", type=int, default=64, help="samples of 512 tokens")
    parser.add_argument("--tools", nargs="+", help="only these")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for all of them")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--autoawq", metavar="PYTHON")
    parser.add_argument("--vllm", metavar="PYTHON", help="to run what tgi wrote")
    return parser.parse_args()


def quantizers(arguments: argparse.Namespace) -> list[Quantizer]:
    every = ("gptq", "awq", "fp8", "int8")
    tools = [
        Quantizer("tgi", sys.executable, OURS, every),
        Quantizer("tgi --samples 0", sys.executable, NEAREST, ("fp8",)),
        Quantizer("gptqmodel", arguments.gptqmodel, GPTQMODEL, ("gptq", "awq")),
        Quantizer("llm-compressor", arguments.llmcompressor, LLMCOMPRESSOR, every),
        Quantizer("autoawq", arguments.autoawq, AUTOAWQ, ("awq",)),
    ]
    return [
        tool
        for tool in tools
        if tool.python and (arguments.tools is None or tool.name in arguments.tools)
    ]


def measured(
    tool: Quantizer,
    method: str,
    out: Path,
    tokens: Path,
    arguments: argparse.Namespace,
    original: Measured,
    true: list[torch.Tensor],
) -> Result:
    figures = out.with_suffix(".json")
    if not figures.exists():
        # `env`: GPT-QModel's pools want two workers, also where there are fewer cores.
        # AutoAWQ and llm-compressor take a GPU whenever they see one.
        hidden = ["CUDA_VISIBLE_DEVICES="] if arguments.device == "cpu" else []
        command = ["env", "GPTQMODEL_CPU_WORKERS=2", *hidden, tool.python, "-c", tool.program]
        model = str(Path(arguments.model).resolve())
        group, device = str(arguments.group_size), arguments.device
        options = [model, str(out), method, group, str(tokens), device]
        with out.with_suffix(".log").open("w") as log:
            code, cost = run([*command, *options], tokens.parent, log)
        if code:
            lines = out.with_suffix(".log").read_text().strip().splitlines() or [f"status {code}"]
            return Result(tool.name, method, failure=lines[-1][:200])
        figures.write_text(json.dumps(asdict(cost)))
    cost = Cost(**json.loads(figures.read_text()))
    model = Measured(str(out), original.samples, arguments.device)
    perplexity, divergence = model.against(original, true)
    rounded = None
    if method in ROUNDINGS:
        model.round_inputs(ROUNDINGS[method])
        rounded = model.perplexity(model.states())
    return Result(tool.name, method, perplexity, divergence, rounded, cost)


def run(command: list[str], folder: Path, log: object) -> tuple[int, Cost]:
    """Exit code and cost; a child of a child, so that peaks do not mix."""
    program = (
        "import json, resource, subprocess, sys\n"
        "code = subprocess.call(sys.argv[1:], stdout=sys.stderr)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss]))"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        stdout=subprocess.PIPE,
        stderr=log,  # type: ignore[arg-type]
        cwd=folder,  # some leave logs behind where they run
        text=True,
        check=True,
    )
    code, processor, kibibytes = json.loads(done.stdout)
    return code, Cost(time.monotonic() - began, processor, kibibytes * 1024)


class Measured:
    """A model in float32 on fixed samples [count, length], one sample at a time."""

    def __init__(self, folder: str, samples: torch.Tensor, device: str = "cpu") -> None:
        self.samples = samples.to(device)
        self._checkpoint = open_checkpoint(folder).for_length(max(256, samples.shape[1]))
        self._backend = select(device)
        self._decoder = Decoder.build(self._checkpoint, self._backend, torch.float32)

    def round_inputs(self, rounding: Rounding) -> None:
        """Let every matrix of the layers see its input rounded from now on."""
        for layer in self._decoder.layers:
            round_inputs(layer, rounding)

    @torch.inference_mode()
    def behind(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities behind each token of one text: [length, vocabulary]."""
        return self._decoder.logits(self._states(tokens[None])[0]).log_softmax(-1)

    def states(self) -> list[torch.Tensor]:
        """What the head reads, for each sample: [length, width]."""
        return self._states(self.samples)

    @torch.inference_mode()
    def _states(self, samples: torch.Tensor) -> list[torch.Tensor]:
        with self._backend.device:  # where everything below is made
            return self._run(samples.to(self._backend.device))

    def _run(self, samples: torch.Tensor) -> list[torch.Tensor]:
        length = samples.shape[1]
        spec = self._checkpoint.spec
        tables = GroupTables(torch.arange(length), torch.zeros(1, 1, dtype=torch.int32))
        caches = [
            self._backend.allocate_kv(
                1, length, layer.attention.num_kv_heads, layer.attention.head_dim, torch.float32
            )
            for layer in spec.layers
        ]
        return [
            self._decoder.forward(
                Batch(
                    input_ids=sample,
                    positions=torch.arange(length),
                    query_start=torch.tensor([0, length], dtype=torch.int32),
                    seq_lens=torch.tensor([length], dtype=torch.int32),
                    groups=(tables,) * len(spec.kv_groups),
                    logit_rows=torch.arange(length),
                    adapter_slots=torch.zeros(1, dtype=torch.int32),
                    query_lens=(length,),
                    key_lens=(length,),
                ),
                caches,
            ).clone()
            for sample in samples
        ]

    @torch.inference_mode()
    def logs(self, states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities behind each token but the last: [length - 1, vocabulary]."""
        return self._decoder.logits(states[:-1]).log_softmax(-1)

    def perplexity(self, states: list[torch.Tensor]) -> float:
        """Of the next tokens within each sample."""
        pairs = zip(states, self.samples, strict=True)
        return math.exp(sum(surprise(self.logs(rows), ids) for rows, ids in pairs) / len(states))

    @torch.inference_mode()
    def against(self, original: Measured, true: list[torch.Tensor]) -> tuple[float, float]:
        """Perplexity, and the divergence of `original`, whose states are `true`, from this."""
        nats = divergence = 0.0
        for rows, wanted, ids in zip(self.states(), true, self.samples, strict=True):
            logs, other = self.logs(rows), original.logs(wanted)
            nats += surprise(logs, ids)
            divergence += float((other.exp() * (other - logs)).sum(-1).double().mean())
        return math.exp(nats / len(true)), divergence / len(true)


def surprise(logs: torch.Tensor, sample: torch.Tensor) -> float:
    """Mean nats of the tokens behind the first."""
    return -float(logs.gather(1, sample[1:, None]).double().mean())


def show(results: list[Result], original: float) -> None:
    table = Table(
        "method", "tool", "perplexity", "change", "KL", "activations rounded",
        "seconds", "of processors", "peak memory",
    )  # fmt: skip
    for result in results:
        figures = (
            [result.failure, *[""] * 6]
            if result.cost is None
            else [
                f"{result.perplexity:.4f}",
                f"{result.perplexity / original - 1:+.2%}",
                f"{result.divergence:.4f}",
                "" if result.rounded is None else f"{result.rounded / original - 1:+.2%}",
                f"{result.cost.seconds:.0f}",
                f"{result.cost.processor_seconds:.0f}",
                f"{result.cost.peak_bytes / 1e9:.2f} GB",
            ]
        )
        table.add_row(result.method, result.tool, *figures)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
