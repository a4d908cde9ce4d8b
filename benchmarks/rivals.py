"""The servers that `serving.py` compares: how each is started, and at which weight precision.

A rival is tuned as its documentation says, in several configurations where it has them; the table
shows the best one for each workload. Knows no workload.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
PRECISIONS = ("bf16", "8-bit", "4-bit")
#: What llama.cpp calls the file types.
_GGUF = {"bf16": "BF16", "8-bit": "Q8_0", "4-bit": "Q4_0"}


@dataclass(frozen=True)
class Server:
    """One configuration of one server.

    `workloads` are the names of those it is for, empty for all of them.
    """

    name: str
    precision: str
    command: tuple[str, ...]
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    workloads: tuple[str, ...] = ()
    seconds: float = 300  # to start
    keep_alive: bool = True

    @property
    def title(self) -> str:
        """Name and precision."""
        return f"{self.name} {self.precision}"

    @contextlib.contextmanager
    def running(self, log: Path) -> Iterator[tuple[str, float]]:
        """Start it, wait until it answers, stop it afterwards; its URL and seconds to be ready."""
        port = free_port()
        command = [part.format(port=port) for part in self.command]
        began = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **self.env}
            )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{url}/health", process, log, self.seconds)
            yield url, time.monotonic() - began
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
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


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Poll until the server answers 200; end the run if it dies or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"error: {shlex.join(process.args)} ended\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.05)
    raise SystemExit(f"error: {url} did not answer within {seconds:g} s\n{log.read_text()[-2000:]}")


def servers(options: argparse.Namespace) -> list[Server]:
    """Ours at every precision there is a model for, and the rivals that are installed."""
    return [
        *_ours(options),
        *(_llama(options) if options.llama_server else ()),
        *(_vllm(options) if options.vllm else ()),
        *(_transformers(options) if options.transformers else ()),
    ]


def gguf_file(options: argparse.Namespace, precision: str) -> str | None:
    """The GGUF file of a precision, by the name `NAME-Q8_0.gguf`; None if there is none."""
    found = sorted(Path(options.gguf_folder).glob(f"*-{_GGUF[precision]}.gguf"))
    return str(found[0]) if options.gguf_folder and found else None


def _ours(options: argparse.Namespace) -> Iterator[Server]:
    for precision in PRECISIONS:
        model = options.folder if precision == "bf16" else gguf_file(options, precision)
        if model is None:
            continue
        command = (
            str(BIN / "tgi"), "launch", "--model-id", model, "--port", "{port}",
            "--dtype", "bfloat16", "--max-num-seqs", "32", *shlex.split(options.tgi_flags),
        )  # fmt: skip
        yield Server("tgi", precision, command, "tgi", {"ignore_eos": True})


def _llama(options: argparse.Namespace) -> Iterator[Server]:
    binary, count = options.llama_server, str(options.threads)
    for precision in PRECISIONS:
        model = gguf_file(options, precision)
        if model is None:
            continue
        # One cache for all slots is best for few long requests, else a part for each.
        for name, flags, workloads in (
            (
                "unified",
                ("-c", "20480", "-kvu"),
                ("single stream", "prefill 2048", "shared prefix"),
            ),
            ("split", ("-c", "8192", "-no-kvu"), ("8 clients", "32 clients")),
        ):
            command = (
                binary, "-m", model, "-t", count, "-tb", count, "-np", "32", *flags,
                "--host", "127.0.0.1", "--port", "{port}",
            )  # fmt: skip
            env = {"LD_LIBRARY_PATH": str(Path(binary).parent)}
            yield Server(
                f"llama-server ({name})", precision, command, "default", {"ignore_eos": True}, env,
                workloads, keep_alive=False,
            )  # fmt: skip


def _vllm(options: argparse.Namespace) -> Iterator[Server]:
    """Its CPU build uses one core unless told all of this."""
    cores = f"0-{options.threads - 1}"
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(options.threads),
        "LD_PRELOAD": str(Path(options.vllm).parent.parent / "lib" / "libiomp5.so"),
        "HF_HUB_OFFLINE": "1",
    }
    command = (
        options.vllm, "serve", options.folder, "--dtype", "bfloat16", "--max-model-len", "4096",
        "--max-num-seqs", "32", "--host", "127.0.0.1", "--port", "{port}",
    )  # fmt: skip
    yield Server("vllm", "bf16", command, options.folder, {"ignore_eos": True}, env, seconds=600)


def _transformers(options: argparse.Namespace) -> Iterator[Server]:
    command = (
        options.transformers, "serve", options.folder, "--continuous-batching", "--device", "cpu",
        "--dtype", "bfloat16", "--port", "{port}",
    )  # fmt: skip
    env = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    yield Server("transformers serve", "bf16", command, options.folder, env=env)
