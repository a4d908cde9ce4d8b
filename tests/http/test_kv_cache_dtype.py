"""`--kv-cache-dtype` on a live server: what it says of itself, and that it answers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from tests.http.live import LiveServer


def test_the_server_says_what_its_cache_is_held_in(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", dtype=torch.bfloat16)
    with LiveServer(folder, "--kv-cache-dtype", "fp8", "--kv-cache-tokens", "2048") as server:
        with urllib.request.urlopen(f"{server.url}/info") as answer:
            info = json.load(answer)
        body = json.dumps({"inputs": "ab", "parameters": {"max_new_tokens": 3}}).encode()
        request = urllib.request.Request(f"{server.url}/generate", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["generated_text"]
        assert "KV cache 2,048 tokens in fp8_e4m3," in server.stderr
    assert info["kv_cache_dtype"] == "fp8_e4m3"
    assert info["model_dtype"] == "bfloat16"
