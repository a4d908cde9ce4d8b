"""The KV cache commits memory ahead of its use, once, and never past its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.runtime.test_memory_plan import planned
from tgi_cli.engine.kv_cache import KVCache
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint

#: A block of the tiny model: 16 tokens, 2 heads of 16, float32; so many are in 2 MiB.
PAGE = (2 << 20) // (16 * 2 * 16 * 4)


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that the tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, _ = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("the tensor is in no mapping")


def test_blocks_are_committed_a_page_ahead(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint("llama")
    plan = planned(path, kv_cache_tokens=16 * (4 * PAGE - 1))
    cache = KVCache(select("cpu"), open_checkpoint(str(path)).spec, plan)
    keys = cache.layers[0][0]
    assert len(keys) == 4 * PAGE
    assert cache.use([[1, 2]]) is None
    before = resident(keys)
    thread = cache.use([[PAGE // 2, 3]])
    assert thread is not None
    thread.join()
    # Two layers of keys and values, a page each.
    assert resident(keys) - before >= 4 * (2 << 20) - (64 << 10)
    assert cache.use([[PAGE // 2 + 1]]) is None  # has been done
    assert cache.use([[]]) is None
    last = cache.use([[4 * PAGE - 1]])
    assert last is not None
    last.join()
    assert resident(keys) >= cache.nbytes - 4 * (2 << 20) - (64 << 10)
    assert cache.use([[4 * PAGE - 1]]) is None
    assert not keys.any()


def test_a_system_that_cannot_is_asked_once(
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tiny_checkpoint("llama")
    plan = planned(path, kv_cache_tokens=16 * (4 * PAGE - 1))
    cache = KVCache(select("cpu"), open_checkpoint(str(path)).spec, plan)
    monkeypatch.setattr("tgi_cli.kernels.cpu.huge_pages._POPULATE_WRITE", 12345)  # no such advice
    with caplog.at_level(logging.INFO):
        thread = cache.use([[PAGE]])
        assert thread is not None
        thread.join()
    assert "not committed ahead" in caplog.text
    assert cache.use([[3 * PAGE]]) is None
