"""`tgi launch --device cuda` as users start it: both APIs, streams, a killed engine, variants."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.live import ENGINE, LiveServer, wait_until

FLAGS = ("--device", "cuda", "--dtype", "float32", "--kv-cache-tokens", "4096")
CHAT = {
    "model": "tgi",
    "messages": [{"role": "user", "content": "one two three"}],
    "temperature": 0,
    "max_tokens": 8,
}
NATIVE = {"inputs": "one two three", "parameters": {"max_new_tokens": 8, "details": True}}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Callable[..., Path]) -> Iterator[LiveServer]:
    with LiveServer(tiny_checkpoint("llama"), *FLAGS) as server:
        yield server


def events(server: LiveServer, path: str, body: dict[str, Any]) -> list[Any]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = response.read().decode().splitlines()
    return [json.loads(line[5:]) for line in lines if line.startswith("data:") and "{" in line]


def text_of(answer: tuple[int, Any]) -> str:
    status, body = answer
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def test_info_names_the_device(server: LiveServer) -> None:
    status, info = server.get("/info")
    assert status == 200
    assert "cuda" in json.dumps(info), info


def test_both_apis_give_the_same_streamed_and_whole(server: LiveServer) -> None:
    whole = text_of(server.post("/v1/chat/completions", CHAT))
    pieces = events(server, "/v1/chat/completions", {**CHAT, "stream": True})
    streamed = "".join(
        choice["delta"].get("content") or "" for piece in pieces for choice in piece["choices"]
    )
    assert streamed == whole
    status, native = server.post("/generate", NATIVE)
    assert status == 200, native
    assert native["details"]["generated_tokens"] == 8
    last = events(server, "/generate_stream", NATIVE)[-1]
    assert last["generated_text"] == native["generated_text"]


def test_seeds_and_logprobs(server: LiveServer) -> None:
    body = {"prompt": "one two", "max_tokens": 8, "temperature": 1.0, "seed": 7, "logprobs": 2}
    first, second = (server.post("/v1/completions", body) for _ in range(2))
    assert first[0] == 200, first
    assert first[1]["choices"] == second[1]["choices"]


def test_an_engine_that_is_killed_comes_back(server: LiveServer) -> None:
    before = text_of(server.post("/v1/chat/completions", CHAT))
    server.child(ENGINE).kill()
    wait_until(lambda: server.get("/health")[0] != 200)
    server.wait_ready(60)
    assert text_of(server.post("/v1/chat/completions", CHAT)) == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--quantize", "int8"),
        ("--quantize", "bitsandbytes-nf4", "--kv-cache-dtype", "fp8_e5m2"),
        ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e4m3"),
        ("--dtype", "float16", "--kv-cache-dtype", "int8"),
    ],
    ids=" ".join,
)
def test_variants(flags: tuple[str, ...], tiny_checkpoint: Callable[..., Path]) -> None:
    common = ("--device", "cuda", "--kv-cache-tokens", "4096")
    with LiveServer(tiny_checkpoint("llama"), *common, *flags) as server:
        text_of(server.post("/v1/chat/completions", CHAT))
        print(server.stderr)
