"""`tgi launch` on packed checkpoints: what it says it holds, and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats import packers
from tests.formats.packed_models import write_pair
from tests.http.live import LiveServer
from tgi_cli.kernels.cpu import library

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
PROMPT = {"inputs": "one two", "parameters": {"max_new_tokens": 4, "details": True}}

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")


def test_a_gptq_checkpoint_is_served_as_it_is(tmp_path: Path) -> None:
    packed, _ = write_pair(tmp_path, packers.gptq(), GPTQ)
    with LiveServer(packed, "--quantize", "gptq") as server:
        _, info = server.get("/info")
        assert (info["quantization"], info["activation_dtype"]) == ("gptq", "int8")
        assert info["deterministic"] is True
        status, answer = server.post("/generate", PROMPT)
        assert status == 200, answer
        tokens = [token["id"] for token in answer["details"]["tokens"]]
        assert tokens
        status, again = server.post("/generate", PROMPT)
        assert [token["id"] for token in again["details"]["tokens"]] == tokens


def test_a_dense_checkpoint_is_rounded(tmp_path: Path) -> None:
    _, dense = write_pair(tmp_path, packers.gptq(), GPTQ)
    flags = ("--quantize", "bitsandbytes-nf4", "--dtype", "bfloat16")
    with LiveServer(dense, *flags) as server:
        _, info = server.get("/info")
        assert (info["quantization"], info["activation_dtype"]) == ("bitsandbytes-nf4", "bfloat16")
        status, answer = server.post("/generate", PROMPT)
        assert status == 200, answer
        assert answer["details"]["tokens"]
