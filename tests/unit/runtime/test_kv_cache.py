"""The KV cache commits memory ahead of its use, once, and never past its end."""

from __future__ import annotations

import logging
import time
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


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def rests(cache: KVCache) -> bool:
    """Whether no thread of it works; one that waited for work would keep the cache alive."""
    return cache._thread is None


#: Two layers of keys and values.
TENSORS = 4
SLACK = 64 << 10


def test_a_page_more_is_there_from_the_first_block_on_and_the_next_as_blocks_fill_it(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    path = tiny_checkpoint("llama")
    plan = planned(path, kv_cache_tokens=16 * (6 * PAGE - 1))
    cache = KVCache(select("cpu"), open_checkpoint(str(path)).spec, plan)
    keys = cache.layers[0][0]
    assert len(keys) == 6 * PAGE
    start = resident(keys)

    def pages() -> float:
        """Committed so far, of all tensors together."""
        return (resident(keys) - start + SLACK) / (2 << 20)

    cache.use([[1, 2]])
    assert until(lambda: rests(cache))
    assert TENSORS <= pages() < TENSORS + 1
    cache.use([[PAGE - 1]])  # the same page
    cache.use([[]])
    assert rests(cache)
    cache.use([[PAGE, 3]])  # asks for one page of each, and has filled next to none of it
    assert until(lambda: rests(cache))
    assert len(cache._parts) == TENSORS
    assert TENSORS <= pages() < TENSORS + 1
    cache.use([[PAGE + PAGE // 4]])  # a quarter earns half of them
    assert until(lambda: rests(cache))
    assert TENSORS + TENSORS // 2 <= pages() < TENSORS + TENSORS // 2 + 1
    cache.use([[PAGE + PAGE // 2]])
    assert until(lambda: rests(cache))
    assert 2 * TENSORS <= pages() < 2 * TENSORS + 1
    cache.use([[6 * PAGE - 1]])
    assert until(lambda: rests(cache))
    # What lies before a block that came out of turn is left to its first write, and nothing is past
    # the end; nothing was written.
    assert 3 * TENSORS <= pages() < 3 * TENSORS + 1
    cache.use([[6 * PAGE - 1]])
    assert rests(cache)
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
        cache.use([[PAGE]])
        assert until(lambda: rests(cache))
        cache.use([[3 * PAGE]])
        assert rests(cache)
    assert caplog.text.count("not committed ahead") == 1
