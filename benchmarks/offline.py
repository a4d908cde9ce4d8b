"""Libraries without a server, beside `tgi`'s Python API: OpenVINO GenAI and CTranslate2.

    python -m benchmarks.offline FOLDER --gguf-folder GGUF --openvino VENV/bin/python
        --ctranslate2 VENV/bin/python --ctranslate2-models DIR [--rounds 3]

Prompts of 128 tokens, 128 greedy tokens each, alone and eight at once; every engine in a process
of its own, in turns. The first run, of another prompt, is not counted, and no run finds a prompt
cached. OpenVINO reads the GGUF files itself; DIR has one folder for each of CTranslate2's number
types (`int8_float32`, ...), as `ct2-transformers-converter --quantization TYPE` writes them. Prints
medians of tokens a second from the prompt's arrival to the last token, and tgi's ratio to each at
the nearest precision.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

PROMPT = OUTPUT = 128
SIZES = (1, 8)

#: Each reads {"model", "ids", "output", "sizes", "threads"} and prints seconds for each size.
_TGI = """
import json, sys, time
from tgi_cli import LLM, SamplingParams
job = json.load(open(sys.argv[1]))
sampling = SamplingParams(temperature=0.0, max_tokens=job["output"], ignore_eos=True)
with LLM(job["model"], dtype="bfloat16", max_model_len=512, max_num_seqs=8) as llm:
    def run(size, other=0):
        prompts = [[(i + n + other) % 1000 + 20 for i in job["ids"]] for n in range(size)]
        began = time.perf_counter()
        found = llm.generate(prompts, sampling)
        assert all(len(each.token_ids) == job["output"] for each in found)
        return time.perf_counter() - began
    run(1, 500)
    print(json.dumps([run(size, 100 * size) for size in job["sizes"]]))
"""
_OPENVINO = """
import json, sys, time
import numpy, openvino, openvino_genai as genai
job = json.load(open(sys.argv[1]))
options = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY"}
scheduler = genai.SchedulerConfig()
scheduler.max_num_seqs, scheduler.enable_prefix_caching = 8, False
pipe = genai.LLMPipeline(job["model"], "CPU", scheduler_config=scheduler, **options)
config = genai.GenerationConfig(max_new_tokens=job["output"], min_new_tokens=job["output"],
                                ignore_eos=True, do_sample=False)
def run(size, other=0):
    prompts = [[(i + n + other) % 1000 + 20 for i in job["ids"]] for n in range(size)]
    mask = numpy.ones((size, len(job["ids"])), numpy.int64)
    ids = openvino.Tensor(numpy.array(prompts, numpy.int64))
    inputs = genai.TokenizedInputs(ids, openvino.Tensor(mask))
    began = time.perf_counter()
    found = pipe.generate(inputs, config)
    took = time.perf_counter() - began
    assert all(len(each) == job["output"] for each in found.tokens), [len(t) for t in found.tokens]
    return took
run(1, 500)
print(json.dumps([run(size, 100 * size) for size in job["sizes"]]))
"""
_CTRANSLATE2 = """
import json, sys, time
import ctranslate2
job = json.load(open(sys.argv[1]))
made = ctranslate2.Generator(job["model"], device="cpu", intra_threads=job["threads"])
words = json.load(open(job["model"] + "/vocabulary.json"))
def run(size, other=0):
    prompts = [[words[(i + n + other) % 1000 + 20] for i in job["ids"]] for n in range(size)]
    began = time.perf_counter()
    found = made.generate_batch(prompts, max_length=job["output"], min_length=job["output"],
                                sampling_topk=1, include_prompt_in_result=False, end_token=[])
    assert all(len(each.sequences_ids[0]) == job["output"] for each in found)
    return time.perf_counter() - began
run(1, 500)
print(json.dumps([run(size, 100 * size) for size in job["sizes"]]))
"""


@dataclass(frozen=True)
class Engine:
    """A library with a model; `bits` are those of the weights, to compare like with like."""

    name: str
    bits: str
    python: str
    program: str
    model: str

    def run(self) -> list[float]:
        """Seconds for each of `SIZES`."""
        threads = os.cpu_count() or 1
        job = {"model": self.model, "ids": [7 * i for i in range(PROMPT)], "output": OUTPUT,
               "sizes": SIZES, "threads": threads}  # fmt: skip
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(job, file)
            file.flush()
            done = subprocess.run(
                [self.python, "-c", self.program, file.name],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        if done.returncode:
            raise SystemExit(f"error: {self.name} {self.bits} failed\n{done.stderr[-2000:]}")
        seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
        return seconds


def engines(options: argparse.Namespace) -> list[Engine]:
    """Ours at each precision, and what is installed of the others."""
    found = [Engine("tgi", "16", sys.executable, _TGI, options.folder)]
    files = {bits: sorted(Path(options.gguf_folder).glob(f"*-{kind}.gguf")) for bits, kind in
             (("16", "F16"), ("8", "Q8_0"), ("4", "Q4_0"))}  # fmt: skip
    for bits, paths in files.items():
        if paths and bits != "16":
            found.append(Engine("tgi", bits, sys.executable, _TGI, str(paths[0])))
        if paths and options.openvino:
            found.append(Engine("OpenVINO GenAI", bits, options.openvino, _OPENVINO, str(paths[0])))
    if options.ctranslate2:
        for path in sorted(Path(options.ctranslate2_models).iterdir()):
            name = f"CTranslate2 {path.name}"
            bits = "8" if path.name.startswith("int8") else "16"
            found.append(Engine(name, bits, options.ctranslate2, _CTRANSLATE2, str(path)))
    return found


def main() -> None:
    """Run in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--gguf-folder", required=True)
    parser.add_argument("--openvino", help="a Python that has openvino-genai")
    parser.add_argument("--ctranslate2", help="a Python that has ctranslate2")
    parser.add_argument("--ctranslate2-models", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    every = engines(options)
    taken: dict[Engine, list[list[float]]] = {engine: [] for engine in every}
    for number in range(options.rounds):
        for engine in every:
            seconds = engine.run()
            taken[engine].append(seconds)
            console.print(f"round {number + 1}, {engine.name} {engine.bits}: {seconds}")
    speeds = {
        engine: [
            size * OUTPUT / statistics.median(run[i] for run in runs)
            for i, size in enumerate(SIZES)
        ]
        for engine, runs in taken.items()
    }
    own = {engine.bits: speed for engine, speed in speeds.items() if engine.name == "tgi"}
    table = Table(title=f"{PROMPT} tokens in, {OUTPUT} out: tokens a second, prompts included")
    table.add_column("engine")
    table.add_column("bits", justify="right")
    for size in SIZES:
        table.add_column(f"{size} at once", justify="right")
        table.add_column("tgi / it", justify="right")
    for engine, speed in speeds.items():
        cells = []
        for ours, theirs in zip(own[engine.bits], speed, strict=True):
            cells += [f"{theirs:.1f}", f"{ours / theirs:.2f}"]
        table.add_row(engine.name, engine.bits, *cells)
    console.print(table)
    if options.json is not None:
        rows = [
            {"engine": engine.name, "bits": engine.bits, "tokens_per_second": speed}
            for engine, speed in speeds.items()
        ]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
