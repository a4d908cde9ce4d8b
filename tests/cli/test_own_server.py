"""`chat`, `bench` and `launch` with a real server of their own, on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tgi_cli.cli.console import Printer
from tgi_cli.cli.local_server import LocalServer
from tgi_cli.errors import TgiError


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> str:
    return str(tiny_checkpoint("llama"))


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[LocalServer]:
    with LocalServer(checkpoint, Printer(), ["--dtype", "float32"]) as started:
        process: Any = started._process
        yield started
    assert process.returncode == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(started.url, timeout=5)


def tgi(*arguments: str, key: str = "", stdin: str = "") -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TGI_")}
    return subprocess.run(
        [sys.executable, "-m", "tgi_cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environ | {"TGI_API_KEY": key},
    )


def test_chat_gets_the_same_answer_for_the_same_seed(server: LocalServer) -> None:
    asked = ("chat", "hi", "--url", server.url, "--max-tokens", "5", "--seed", "1")
    first = tgi(*asked, key=server.api_key)
    assert first.returncode == 0, first.stderr
    assert tgi(*asked, key=server.api_key).stdout == first.stdout != ""


def test_the_server_is_for_whoever_started_it(server: LocalServer) -> None:
    refused = tgi("chat", "hi", "--url", server.url)
    assert refused.returncode == 1
    assert "the server answered 401" in refused.stderr


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_bench_gets_the_lengths_it_asks_for(
    server: LocalServer, endpoint: str, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    done = tgi(
        *("bench", "--url", server.url, "--endpoint", endpoint, "--requests", "4"),
        *("--input-tokens", "60", "--output-tokens", "3", "--json", str(result)),
        *("--fail-if", "failed>0", "--fail-if", "completed<4"),
        key=server.api_key,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(result.read_text())
    assert data["summary"]["completion_tokens"] == 12
    # A tiny vocabulary cannot hit every length, but the order of words may not change it.
    lengths = {request["prompt_tokens"] for request in data["requests"]}
    assert len(lengths) == 1
    assert abs(lengths.pop() - 60) <= 1
    assert data["server"]["model_dtype"] == "float32"


def test_a_model_that_is_not_there_is_told_in_the_servers_words() -> None:
    with (
        pytest.raises(TgiError, match="no-such-folder"),
        LocalServer("/no-such-folder/model", Printer()),
    ):
        pass


def test_a_dry_run_prints_the_plan(checkpoint: str) -> None:
    done = tgi("launch", "--model-id", checkpoint, "--dry-run", "--json", "--max-num-seqs", "2")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert plan["needed_bytes"] == sum(
        plan[part] for part in ("weights_bytes", "kv_bytes", "activation_bytes")
    )


def test_a_dry_run_that_cannot_fit_is_exit_code_1(checkpoint: str) -> None:
    done = tgi(
        *("launch", "--model-id", checkpoint, "--dry-run"),
        *("--max-batch-total-tokens", "10000000000"),
    )
    assert done.returncode == 1
    assert "weights" in done.stdout
    assert "error: the model needs " in done.stderr
    assert "Traceback" not in done.stderr
