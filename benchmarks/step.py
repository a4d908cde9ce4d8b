"""Time of an engine's step by part: what the kernels take, and what is around them.

    python benchmarks/step.py MODEL [--batch-sizes 1,8,32] [--sampled] [--quantize int4]
        [--json step.json]

Runs the engine in this process, without sockets or clients, over sequences that decode side by
side; then a prompt of 2048 tokens, one that takes a single step. For each part the least, the
median and the 90th percentile of all steps; the least says most on a busy machine. `native` is the
decoder with its logits, `sampling` the draw in native code, `waited` both of a step that had begun
before it was asked for; their sum is what the engine waits for kernels, and `around` is the step
less that sum, in which such a step goes on. `send` packs the step's message for an HTTP worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from tgi_cli.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from tgi_cli.engine.batch_builder import BatchBuilder
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Deltas, Request
from tgi_cli.engine.sampler import Sampler
from tgi_cli.engine.scheduler import Scheduler
from tgi_cli.kernels.cpu.ahead import StepsAhead
from tgi_cli.kernels.cpu.library import Context
from tgi_cli.kernels.cpu.sampling import NativeSampling
from tgi_cli.sampling import SamplingParams

PARTS: dict[str, tuple[type, str]] = {
    "schedule": (Scheduler, "schedule"),
    "build": (BatchBuilder, "build"),
    "native": (Context, "step"),
    "sample": (Sampler, "sample"),
    "sampling": (NativeSampling, "sample"),
    "waited": (StepsAhead, "finish"),
    "update": (Scheduler, "update"),
}
PREFILL = 2048


class Clock:
    """Seconds of each part in the step that runs, taken by wrapping the parts' methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def measure(self, part: str, function: Callable[[], Any]) -> Any:
        """Call and note the time."""
        return self._timed(part, function)()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.perf_counter() - started
                self.seconds[part] = self.seconds.get(part, 0.0) + spent

        return call


def run(core: EngineCore, clock: Clock, requests: list[Request]) -> list[dict[str, float]]:
    """The parts of every step until all requests have ended."""
    pack = msgspec.msgpack.Encoder().encode
    for request in requests:
        core.accept(request)
    steps = []
    while core.has_work():
        clock.seconds = {}
        deltas = clock.measure("step", core.step)
        clock.measure("send", lambda deltas=deltas: pack(Deltas(deltas=deltas, stats=core.stats())))
        kernels = sum(clock.seconds.get(part, 0.0) for part in ("native", "sampling", "waited"))
        clock.seconds["around"] = clock.seconds["step"] - kernels
        steps.append(clock.seconds)
    return steps


def requests_of(count: int, prompt: int, tokens: int, *, sampled: bool) -> list[Request]:
    """Distinct prompts of one length."""
    options: dict[str, Any] = {"temperature": 0.0}
    if sampled:
        options = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    return [
        Request(
            id=f"{count}-{index}",
            prompt_ids=[(7 * index + 3 * place) % 1000 + 5 for place in range(prompt)],
            sampling=SamplingParams(max_tokens=tokens, ignore_eos=True, seed=index, **options),
        )
        for index in range(count)
    ]


def summary(steps: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of each part: least, median, 90th percentile."""
    result = {}
    for part in ("step", *PARTS, "around", "send"):
        values = sorted(1e3 * step.get(part, 0.0) for step in steps)
        ninth = values[min(len(values) - 1, 9 * len(values) // 10)]
        result[part] = (values[0], statistics.median(values), ninth)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", help="round the matrices while loading")
    parser.add_argument("--activation-dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sampled", action="store_true", help="draw with every native feature")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    config = EngineConfig(
        model=ModelConfig(
            model_id=str(options.model),
            dtype=options.dtype,
            max_model_len=PREFILL + 256,
            quantize=options.quantize,
            activation_dtype=options.activation_dtype,
        ),
        cache=CacheConfig(
            kv_cache_tokens=max(PREFILL + 256, max(sizes) * (options.steps + 64)),
            prefix_caching=False,
        ),
        scheduler=SchedulerConfig(max_num_seqs=max(sizes), max_batch_tokens=PREFILL),
    )
    if options.threads:
        config = msgspec.structs.replace(
            config, parallel=msgspec.structs.replace(config.parallel, num_threads=options.threads)
        )
    core = EngineCore.load(config, lambda phase, fraction: None)
    clock = Clock()
    results = {}
    for size in sizes:
        asked = requests_of(size, 32, options.steps, sampled=options.sampled)
        # The first step is the prompts, the last ones end sequences.
        results[f"{size} decoding"] = summary(run(core, clock, asked)[2:-2])
    prompts = [
        request for i in range(3) for request in requests_of(1, PREFILL - i, 1, sampled=False)
    ]
    each = [
        run(core, clock, [msgspec.structs.replace(p, id=str(i))])[0] for i, p in enumerate(prompts)
    ]
    results[f"prompt of {PREFILL}"] = summary(each)
    table = Table(title=f"{options.model}, {core.facts.backend}: ms, least / median / p90")
    table.add_column("part")
    for name in results:
        table.add_column(name, justify="right")
    for part in next(iter(results.values())):
        cells = [
            " / ".join(f"{value:.2f}" for value in result[part]) for result in results.values()
        ]
        table.add_row(part, *cells)
    Console(width=120).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    core.close()


if __name__ == "__main__":
    main()
