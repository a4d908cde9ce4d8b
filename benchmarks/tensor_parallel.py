"""One process with all threads against N processes that divide them; and the all-reduce alone.

    python benchmarks/tensor_parallel.py --make /tmp/llama-1b     # random weights, 2.2 GB
    python benchmarks/tensor_parallel.py /tmp/llama-1b --num-shard 2

Both engines are loaded, and take turns, so that both see the same machine; medians and best of
`--rounds`. The all-reduce is timed between as many processes, over shared memory and over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tgi_cli.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.cores import bind, cores_by_node, share_out
from tgi_cli.engine.messages import Request
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.collective import SharedMemory
from tgi_cli.kernels.process_group import ProcessGroup
from tgi_cli.sampling import SamplingParams

#: A Llama of 1.17 billion parameters.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PROMPT, DECODE, CHUNK = 1024, 32, 512
#: Tokens a second: `median`, `best`, and `all` by round.
Speeds = dict[str, Any]
SIZES = (2 << 10, 16 << 10, 128 << 10, 1 << 20)


def make(folder: Path) -> None:
    """Write the model: `config.json` and random weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, feed, vocab = (
        int(str(SHAPE[key])) for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    kv = hidden // 8
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    for layer in range(int(str(SHAPE["num_hidden_layers"]))):
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (feed, hidden)),
            ("mlp.up_proj", (feed, hidden)),
            ("mlp.down_proj", (hidden, feed)),
        ):
            shapes[f"model.layers.{layer}.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    norms = [f"model.layers.{i}.{n}" for i in range(int(str(SHAPE["num_hidden_layers"])))
             for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    tensors |= {f"{name}.weight": torch.ones(hidden).bfloat16() for name in [*norms, "model.norm"]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=2))


def engine(model: str, num_shard: int, threads: int) -> None:
    """Child: one engine; answers each line of stdin with seconds of prefill and of decode."""
    config = EngineConfig(
        model=ModelConfig(model_id=model, device="cpu", max_model_len=2 * PROMPT),
        cache=CacheConfig(kv_cache_tokens=8 * PROMPT, prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=8, max_batch_tokens=CHUNK),
        parallel=ParallelConfig(num_shard=num_shard, num_threads=threads),
    )
    core = EngineCore.load(config, lambda phase, fraction: None)
    print("ready", flush=True)
    try:
        for turn, _ in enumerate(sys.stdin):
            prefill = _timed(core, f"p{turn}", PROMPT, 1)[0]
            decode = _timed(core, f"d{turn}", 16, DECODE)[1]
            print(json.dumps([prefill, decode]), flush=True)
    finally:
        core.close()


def _timed(core: EngineCore, name: str, prompt: int, count: int) -> tuple[float, float]:
    """Seconds to the first token, and from it to the last."""
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    core.accept(Request(id=name, prompt_ids=[7] * prompt, sampling=sampling))
    started, first = time.perf_counter(), 0.0
    while core.has_work():
        if any(delta.token_ids for delta in core.step()) and not first:
            first = time.perf_counter()
    return first - started, time.perf_counter() - first


def reduce(kind: str, rank: int, world_size: int, where: str) -> None:
    """Child: one rank of an all-reduce; rank 0 prints microseconds by size."""
    bind(share_out(cores_by_node(), world_size)[rank])
    torch.set_num_threads(1)
    end: Collective
    if kind == "gloo":
        end = ProcessGroup(torch.device("cpu"), where, rank, world_size)
    else:
        loaded = library.load()
        assert loaded is not None
        end = SharedMemory(loaded, int(where), rank, world_size)
    found = {}
    for size in SIZES:
        x, times = torch.ones(size // 4), []
        for _ in range(500):
            started = time.perf_counter()
            end.all_reduce(x)
            times.append((time.perf_counter() - started) * 1e6)
        found[size] = [min(times), statistics.median(times)]
    if rank == 0:
        print(json.dumps(found), flush=True)
    os._exit(0)  # as an engine's ranks end: at times gloo is destroyed while a thread of it runs


@contextmanager
def started(model: str, num_shard: int, threads: int) -> Iterator[subprocess.Popen[str]]:
    """An engine in a process of its own, ready."""
    arguments = ["--engine", str(num_shard), str(threads), model]
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while (line := process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit("an engine could not start, see above")
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def ask(process: subprocess.Popen[str]) -> tuple[float, float]:
    """One turn: seconds of prefill and of decode."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    prefill, decode = json.loads(process.stdout.readline())
    return prefill, decode


def all_reduces(world_size: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds (best, median) by kind and size."""
    loaded = library.load()
    assert loaded is not None
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("shared memory", "gloo"):
            fd = SharedMemory.create(loaded, world_size)
            where = f"file://{folder}/store" if kind == "gloo" else str(fd)
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "--reduce", kind, str(rank), str(world_size), where],
                    stdout=subprocess.PIPE,
                    pass_fds=[fd],
                )
                for rank in range(world_size)
            ]
            found[kind] = json.loads(ranks[0].communicate()[0])
            for rank in ranks[1:]:
                rank.communicate()
            os.close(fd)
    return found


def compare(model: str, num_shard: int, threads: int, rounds: int) -> dict[str, dict[str, Speeds]]:
    """Both engines in turns; tokens a second."""
    kinds = {f"1 process, {threads} threads": 1, f"{num_shard} processes": num_shard}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    names = list(kinds)
    with started(model, 1, threads) as whole, started(model, num_shard, threads) as divided:
        for turn in range(rounds + 1):
            for name, process in zip(names, (whole, divided), strict=True):
                prefill, decode = ask(process)
                if turn:  # the first one warms up
                    speeds[name].append((PROMPT / prefill, (DECODE - 1) / decode))
    return {
        name: {
            what: {
                "all": [each[i] for each in values],
                "median": statistics.median(each[i] for each in values),
                "best": max(each[i] for each in values),
            }
            for i, what in enumerate(("prefill", "decode"))
        }
        for name, values in speeds.items()
    }


def ratios(whole: Speeds, divided: Speeds) -> dict[str, float]:
    """Speed over speed: the median of those of each round, and of the best of both."""
    pairs = zip(divided["all"], whole["all"], strict=True)
    return {
        "median": statistics.median(ours / theirs for ours, theirs in pairs),
        "best": divided["best"] / whole["best"],
    }


def main() -> None:
    """Read the command line and run what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a model folder")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the random model")
    parser.add_argument("--num-shard", type=int, default=2)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--reduce", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine(options.engine[2], int(options.engine[0]), int(options.engine[1]))
    elif options.reduce:
        kind, rank, world_size, where = options.reduce
        reduce(kind, int(rank), int(world_size), where)
    elif options.make:
        make(options.make)
    elif options.model is None:
        parser.error("name a model folder, or --make one")
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """Run all and print tables."""
    console = Console(highlight=False)
    found = compare(options.model, options.num_shard, options.num_threads, options.rounds)
    reduces = all_reduces(options.num_shard)
    command = " ".join(sys.argv)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "command": command,
        "tokens_per_second": found,
        "all_reduce_us": reduces,
    }
    table = Table("tokens/s, median (best)", f"prefill of {PROMPT}", f"decode of {DECODE}")
    for name, speeds in found.items():
        cells = [f"{s['median']:.1f} ({s['best']:.1f})" for s in speeds.values()]
        table.add_row(name, *cells)
    whole, divided = found.values()
    result["ratios"] = {what: ratios(whole[what], divided[what]) for what in whole}
    cells = [f"{r['median']:.2f} ({r['best']:.2f})" for r in result["ratios"].values()]
    table.add_row(f"{options.num_shard} processes over 1", *cells)
    console.print(table)
    table = Table("all-reduce, us, best / median", *(f"{size >> 10} KB" for size in SIZES))
    for kind, by_size in reduces.items():
        table.add_row(kind, *(f"{best:.0f} / {median:.0f}" for best, median in by_size.values()))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
