"""Packed weights outlive the engine that packed them, for an engine of the same model alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from tests.faults.engine_process import config_of, connected, running
from tgi_cli.engine.messages import Request
from tgi_cli.kernels.cpu import library
from tgi_cli.sampling import SamplingParams


async def tokens_of_an_engine(
    path: Path, folder: Path, weights_fd: int | None
) -> tuple[list[int], int]:
    """What a new engine process answers, and the shared memory it has mapped, in bytes."""
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
    request = Request(id="one", prompt_ids=[7, 8, 9], sampling=sampling)
    with running(config_of(path), folder, weights_fd) as (child, ready):
        assert ready.facts.backend.startswith("native-")
        client = connected(ready)
        async with aclosing(client.generate(request)) as deltas:
            tokens = [token async for delta in deltas for token in delta.token_ids]
        await client.close()
        lines = Path(f"/proc/{child.process.pid}/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if "tgi-weights" in line]
    return tokens, sum(int(end, 16) - int(start, 16) for start, end in spans)


def overwrite(path: Path, ending: str) -> None:
    """Set the weights whose names end so to zero, in a file that looks untouched."""
    before = path.stat()
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, described in header.items():
            if name.endswith(ending):
                start, end = described["data_offsets"]
                file.seek(8 + size + start)
                file.write(bytes(end - start))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.skipif(library.library_path() is None, reason="the native kernels are not built here")
async def test_a_restarted_engine_reads_no_matrix(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its tokens are those of the first one, though the file does not hold them any more."""
    path = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama", dtype=torch.bfloat16), path)
    fd = os.memfd_create("tgi-weights")
    first, packed = await tokens_of_an_engine(path, tmp_path, fd)
    assert packed > 0
    overwrite(path / "model.safetensors", "_proj.weight")
    assert await tokens_of_an_engine(path, tmp_path, fd) == (first, packed)
    os.utime(path / "model.safetensors")  # now it looks like another file, and is read
    third, _ = await tokens_of_an_engine(path, tmp_path, fd)
    os.close(fd)
    assert third != first
