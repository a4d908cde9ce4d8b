"""Servers side by side over HTTP: same model, same prompts, same machine, one run; prints ratios.

    python benchmarks/model_folder.py /tmp/smollm2
    python benchmarks/serving.py /tmp/smollm2 --json result.json

Runs `tgi launch`, `transformers serve --continuous-batching` and, in process and one request after
the other, `model.generate`; with `--llama-server PATH --gguf FILE` also llama.cpp's server. Each
workload goes to each server in turn, several rounds; the table holds medians, and the ratio of
tgi to the best other server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tgi_cli.cli.load import Load, LoadPlan
from tgi_cli.cli.openai_client import OpenAIClient
from tgi_cli.cli.prompts import Prompts, calibrate
from tgi_cli.cli.report import Summary, summarize

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Workload:
    """A closed loop: `concurrency` clients, `requests` in all, fixed lengths in tokens."""

    name: str
    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int


WORKLOADS = (
    Workload("single stream", 1, 3, 128, 128),
    Workload("prefill 2048", 1, 2, 2000, 1),
    Workload("8 clients", 8, 16, 128, 64),
    Workload("32 clients", 32, 64, 128, 64),
)


@dataclass
class Server:
    """One rival: how to start it and what its requests need."""

    name: str
    command: list[str]
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    health: str = "/health"

    @contextlib.contextmanager
    def running(self, log: Path) -> Iterator[str]:
        """Start it, wait until it answers, and stop it afterwards."""
        port = free_port()
        command = [part.format(port=port) for part in self.command]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **self.env}
            )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(url + self.health, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """A greedy streaming chat request."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    """Poll until the server answers 200; end the run if it dies or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"error: {shlex.join(process.args)} ended\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.2)
    raise SystemExit(f"error: {url} did not answer within {seconds:g} s\n{log.read_text()[-2000:]}")


async def measure(url: str, server: Server, workload: Workload, prompts: Prompts) -> Summary:
    """Run one workload; the first request of all warms up and is not counted."""
    async with OpenAIClient(url) as client:

        def load(requests: int, concurrency: int, first: int) -> Load:
            return Load(
                client,
                LoadPlan(concurrency=concurrency, requests=requests),
                "/v1/chat/completions",
                lambda i: server.body(prompts.prompt(first + i), workload.output_tokens),
            )

        await load(1, 1, 10_000).run()
        run = load(workload.requests, workload.concurrency, next(_COUNTER) * 100)
        await run.run()
    for message in {record.message for record in run.records if record.message}:
        print(f"{server.name}: {message}", file=sys.stderr)
    return summarize(run.records, duration=run.span, output_tokens=workload.output_tokens)


_COUNTER = iter(range(10**6))


def generate_alone(folder: str, workload: Workload, texts: list[str], threads: int) -> float:
    """Tokens a second of plain `model.generate`, one request after the other, in a child."""
    code = f"""
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads({threads})
texts = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.bfloat16)
def run(text):
    chat = [dict(role="user", content=text)]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = ids if torch.is_tensor(ids) else ids["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens={workload.output_tokens})
    return out.shape[1] - ids.shape[1]
run(texts[0])
began = time.perf_counter()
tokens = sum(run(text) for text in texts)
print(tokens / (time.perf_counter() - began))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    return float(done.stdout.split()[-1])


def servers(options: argparse.Namespace) -> list[Server]:
    """The rivals that can run here."""
    threads, folder = options.threads, options.folder
    found = [
        Server(
            "tgi",
            [str(BIN / "tgi"), "launch", "--model-id", folder, "--port", "{port}",
             "--dtype", "bfloat16", "--max-num-seqs", "32", *shlex.split(options.tgi_flags)],
            "tgi",
            {"ignore_eos": True},
        ),
        Server(
            "transformers serve",
            [options.transformers, "serve", folder, "--continuous-batching", "--device",
             "cpu", "--dtype", "bfloat16", "--port", "{port}"],
            folder,
            env={"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        ),
    ]  # fmt: skip
    if options.llama_server:
        count = str(threads)
        found.append(
            Server(
                "llama-server",
                [
                    options.llama_server,
                    "-m",
                    options.gguf,
                    "-t",
                    count,
                    "-tb",
                    count,
                    "-np",
                    "32",
                    "-c",
                    "20480",
                    "-kvu",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    "{port}",
                ],
                "default",
                {"ignore_eos": True},
            )
        )
    return found


def calibrated(url: str, server: Server, workload: Workload) -> Prompts:
    """Prompts that count as the workload's input tokens, template included."""

    async def count() -> Prompts:
        async with OpenAIClient(url) as client:

            async def tokens(text: str) -> int:
                body = server.body(text, 1) | {"stream": False}
                del body["stream_options"]
                answer = await client.json("POST", "/v1/chat/completions", body)
                return int(answer["usage"]["prompt_tokens"])

            return await calibrate(tokens, workload.input_tokens, seed=workload.input_tokens)

    return asyncio.run(count())


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tgi-flags", default="")
    parser.add_argument(
        "--transformers",
        default=str(BIN / "transformers"),
        help="the program, from an environment with `transformers[serving]`",
    )
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    parser.add_argument("--workload", action="append", help="only these, by name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    workloads = [w for w in WORKLOADS if not options.workload or w.name in options.workload]
    rivals = servers(options)
    prompts: dict[str, Prompts] = {}
    results: dict[str, dict[str, list[Summary]]] = {w.name: {} for w in workloads}
    alone: dict[str, list[float]] = {w.name: [] for w in workloads}
    for round_number in range(options.rounds):
        for server in rivals:
            log = Path(f"/tmp/serving-{server.name.replace(' ', '-')}.log")
            with server.running(log) as url:
                for workload in workloads:
                    if workload.name not in prompts:
                        prompts[workload.name] = calibrated(url, server, workload)
                    summary = asyncio.run(measure(url, server, workload, prompts[workload.name]))
                    results[workload.name].setdefault(server.name, []).append(summary)
                    console.print(
                        f"round {round_number + 1}, {server.name}, {workload.name}: "
                        f"{summary.output_throughput:.1f} tok/s, {summary.failed} failed",
                        highlight=False,
                    )
        for workload in workloads:
            if workload.concurrency == 1:
                texts = [prompts[workload.name].prompt(i) for i in range(workload.requests)]
                speed = generate_alone(options.folder, workload, texts, options.threads)
                alone[workload.name].append(speed)
    report(console, workloads, results, alone)
    if options.json:
        options.json.write_text(as_json(rivals, results, alone))


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
    results: dict[str, dict[str, list[Summary]]],
    alone: dict[str, list[float]],
) -> None:
    """Print one table a workload."""
    for workload in workloads:
        table = Table(title=f"{workload.name}: {workload.input_tokens} in, "
                      f"{workload.output_tokens} out, {workload.concurrency} at once")  # fmt: skip
        rows = {name: medians(summaries) for name, summaries in results[workload.name].items()}
        table.add_column("server")
        for column in next(iter(rows.values())):
            table.add_column(column, justify="right")
        table.add_column("tgi / it", justify="right")
        ours = rows["tgi"]["output tok/s"]
        for name, row in rows.items():
            ratio = ours / row["output tok/s"] if row["output tok/s"] else float("nan")
            table.add_row(name, *(f"{value:.1f}" for value in row.values()), f"{ratio:.2f}")
        if alone[workload.name]:
            speed = statistics.median(alone[workload.name])
            blanks = [""] * (len(next(iter(rows.values()))) - 1)
            table.add_row("model.generate", f"{speed:.1f}", *blanks, f"{ours / speed:.2f}")
        console.print(table)


def as_json(
    rivals: list[Server],
    results: dict[str, dict[str, list[Summary]]],
    alone: dict[str, list[float]],
) -> str:
    """Everything needed to repeat the run."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return json.dumps(
        {
            "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()},
            "commands": {server.name: shlex.join(server.command) for server in rivals},
            "medians": {
                workload: {name: medians(summaries) for name, summaries in by_server.items()}
                for workload, by_server in results.items()
            },
            "generate_tokens_per_second": alone,
        },
        indent=2,
    )


if __name__ == "__main__":
    main()
