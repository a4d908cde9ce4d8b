"""The KV cache commits memory ahead of its use, once, and never past its end."""

from __future__ import annotations

import ctypes
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.golden.engine import make_core
from tests.unit.runtime.test_memory_plan import planned
from tgi_cli.engine.kv_cache import _PAGE, _REST, KVCache
from tgi_cli.engine.messages import Request
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.sampling import SamplingParams

#: A block of the tiny model: 16 tokens, 2 heads of 16, float32; so many are in 2 MiB.
PAGE = _PAGE // (16 * 2 * 16 * 4)


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that are in memory, the pages of 4 KiB at its ends included."""
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    first = tensor.data_ptr() // 4096 * 4096
    size = tensor.data_ptr() + tensor.nbytes - first
    pages = ctypes.create_string_buffer(-(-size // 4096))
    assert libc.mincore(first, size, pages) == 0
    return 4096 * sum(page & 1 for page in pages.raw)


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_another_devices_memory_is_there_already(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint("llama")
    backend = replace(select("cpu"), device=torch.device("meta"))
    cache = KVCache(backend, open_checkpoint(str(path)).spec, planned(path, kv_cache_tokens=8192))
    cache.begin()
    cache.use([[300]])
    cache.rest()
    assert cache._thread is None


#: Two layers of keys and values.
TENSORS = 4


class Pages:
    """A cache of `num_pages` pages a tensor, and how many of all tensors are in memory by now."""

    def __init__(self, path: Path, num_pages: int) -> None:
        plan = planned(path, kv_cache_tokens=16 * (num_pages * PAGE - 1))
        self.cache = KVCache(select("cpu"), open_checkpoint(str(path)).spec, plan)
        self.tensors = [tensor for layer in self.cache.layers for tensor in layer]
        assert len(self.tensors) == TENSORS
        assert len(self.tensors[0]) == num_pages * PAGE

    def count(self) -> float:
        return sum(map(resident, self.tensors)) / _PAGE

    def become(self, count: int) -> bool:
        """Whether so many are there soon, and no more a while later."""
        if not until(lambda: self.count() >= count):
            return False
        time.sleep(4 * _REST)
        # A huge page of the system may begin before a tensor's own or end behind it.
        return count <= self.count() < count + 1


def test_while_steps_run_a_page_is_committed_ahead_as_blocks_fill(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    pages = Pages(tiny_checkpoint("llama"), 6)
    cache = pages.cache
    cache.begin()
    cache.use([[1, 2]])  # asks for one page of each tensor, and has filled next to none of it
    assert pages.become(0)
    cache.use([[PAGE // 4]])  # a quarter earns half of them
    assert pages.become(TENSORS // 2)
    cache.use([[PAGE // 8, 1]])  # not new
    cache.use([[]])
    assert pages.become(TENSORS // 2)
    cache.use([[PAGE // 2, PAGE // 2 + 1]])
    assert pages.become(TENSORS)
    cache.use([[PAGE - 1]])  # the same page
    assert pages.become(TENSORS)
    cache.use([[6 * PAGE - 1]])
    # What lies before a block that came out of turn is left to its first write, and nothing is past
    # the end; nothing was written.
    assert pages.become(2 * TENSORS)
    assert not any(tensor.any() for tensor in pages.tensors)


def test_the_first_pages_are_there_before_the_first_step(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    path = tiny_checkpoint("llama")
    cache = KVCache(
        select("cpu"), open_checkpoint(str(path)).spec, planned(path, kv_cache_tokens=80_000)
    )
    tensors = [tensor for pair in cache.layers for tensor in pair]
    assert all(resident(tensor) < _PAGE for tensor in tensors)
    cache.commit_first_pages()
    assert until(lambda: all(resident(tensor) >= _PAGE for tensor in tensors))
    time.sleep(3 * _REST)
    # Huge pages begin where they like, so one more may have come with them.
    assert all(resident(tensor) < 3 * _PAGE for tensor in tensors)


def test_an_engine_that_rests_commits_what_busy_minutes_need(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_cli.engine.kv_cache._SPARE_BYTES", 3 * TENSORS * _PAGE)
    pages = Pages(tiny_checkpoint("llama"), 9)
    cache = pages.cache
    assert pages.become(0)  # no step has run, so nothing says that it rests
    cache.begin()
    cache.use([[1]])
    cache.rest()
    assert pages.become(3 * TENSORS)
    assert cache._thread is None
    cache.begin()
    cache.use([[PAGE]])
    assert pages.become(3 * TENSORS)  # is ahead of that
    cache.rest()
    cache.begin()
    assert pages.become(3 * TENSORS)  # rested too short
    cache.rest()
    assert pages.become(4 * TENSORS)
    cache.begin()
    cache.use([[7 * PAGE]])
    cache.rest()
    assert pages.become(6 * TENSORS)  # up to the end, from the page of that block on


def test_the_spare_memory_of_a_small_machine_is_small(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    path = tiny_checkpoint("llama")
    plan = planned(path, kv_cache_tokens=16 * (4 * PAGE - 1))
    plan = replace(plan, free_bytes=16 * (2 * TENSORS + 1) * _PAGE)
    cache = KVCache(select("cpu"), open_checkpoint(str(path)).spec, plan)
    assert cache._spare == 2


def test_a_cache_goes_with_its_engine(tiny_checkpoint: Callable[..., Path]) -> None:
    pages = Pages(tiny_checkpoint("llama"), 6)
    pages.cache.begin()
    pages.cache.use([[1]])  # asks for what it has not earned: the thread waits
    thread = pages.cache._thread
    assert thread is not None
    assert thread.is_alive()
    gone = weakref.ref(pages.cache)
    del pages
    thread.join(20)
    assert not thread.is_alive()
    assert gone() is None


def test_a_system_that_cannot_is_asked_once(
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = Pages(tiny_checkpoint("llama"), 4).cache
    monkeypatch.setattr("tgi_cli.kernels.cpu.huge_pages._POPULATE_WRITE", 12345)  # no such advice
    with caplog.at_level(logging.INFO):
        cache.begin()
        cache.use([[PAGE]])
        cache.rest()
        assert until(lambda: cache._thread is None)
        cache.use([[3 * PAGE]])
        cache.rest()
        assert cache._thread is None
    assert caplog.text.count("not committed ahead") == 1


def test_the_engine_says_when_it_rests(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_checkpoint("llama"))
    said: list[str] = []
    monkeypatch.setattr(KVCache, "begin", lambda cache: said.append("begin"))
    monkeypatch.setattr(KVCache, "rest", lambda cache: said.append("rest"))
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    core.accept(Request(id="a", prompt_ids=[5, 6, 7], sampling=sampling))
    while core.has_work():
        core.step()
    core.close()
    assert said == ["begin", "rest"] * 3
