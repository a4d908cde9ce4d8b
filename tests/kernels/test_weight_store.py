"""Packed weights in shared memory: kept for the same fingerprint alone, whole, and read-only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tgi_cli.errors import EngineError
from tgi_cli.kernels.cpu.huge_pages import HUGE_PAGE
from tgi_cli.kernels.cpu.shared_pages import files_get_huge_pages
from tgi_cli.kernels.cpu.weight_store import WeightStore


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("tgi-test")
    yield made
    os.close(made)


def fill(fd: int, fingerprint: str = "a") -> None:
    store = WeightStore(fd, fingerprint)
    assert not store.filled
    store.buffer("first", 5000).fill_(7)
    store.buffer("second", 3).fill_(9)
    store.finish()
    assert store.filled


def test_the_next_one_finds_what_was_finished(fd: int) -> None:
    fill(fd)
    store = WeightStore(fd, "a")
    assert store.filled
    assert torch.equal(store.buffer("second", 3), torch.full((3,), 9, dtype=torch.uint8))
    assert torch.equal(store.buffer("first", 5000), torch.full((5000,), 7, dtype=torch.uint8))
    assert 5003 <= store.nbytes <= 2 * HUGE_PAGE


def test_finished_buffers_are_read_only(fd: int) -> None:
    store = WeightStore(fd, "a")
    made = store.buffer("only", 4096)
    assert permissions(made.data_ptr()) == "rw-s"
    store.finish()
    assert permissions(made.data_ptr()) == "r--s"
    found = WeightStore(fd, "a").buffer("only", 4096)
    assert permissions(found.data_ptr()) == "r--s"


def test_another_fingerprint_starts_anew(fd: int) -> None:
    fill(fd, "a")
    store = WeightStore(fd, "b")
    assert not store.filled
    assert store.nbytes == 0
    store.finish()
    assert not WeightStore(fd, "a").filled


def test_what_was_not_finished_is_dropped(fd: int) -> None:
    WeightStore(fd, "a").buffer("first", 5000).fill_(7)
    store = WeightStore(fd, "a")
    assert not store.filled
    assert int(store.buffer("first", 5000).sum()) == 0


def test_a_filled_store_gives_only_what_it_has(fd: int) -> None:
    fill(fd)
    store = WeightStore(fd, "a")
    with pytest.raises(EngineError, match="no buffer `third` of 8 bytes"):
        store.buffer("third", 8)
    with pytest.raises(EngineError, match="no buffer `second` of 4 bytes"):
        store.buffer("second", 4)


def test_buffers_of_any_size_find_room(fd: int) -> None:
    """Also more than a chunk, and what is left of one."""
    sizes = [1, 70 << 20, 4096, 40 << 20, 30 << 20, 4097]
    store = WeightStore(fd, "a")
    for index, size in enumerate(sizes):
        made = store.buffer(str(index), size)
        assert len(made) == size
        made[-1] = made[0] = index
    store.finish()
    again = WeightStore(fd, "a")
    for index, size in enumerate(sizes):
        found = again.buffer(str(index), size)
        assert int(found[0]) == int(found[-1]) == index


@pytest.mark.skipif(not files_get_huge_pages(), reason="the system gives files no huge pages")
def test_buffers_lie_on_huge_pages_before_and_after(fd: int) -> None:
    store = WeightStore(fd, "a")
    made = store.buffer("only", 3 * HUGE_PAGE)
    assert huge(made.data_ptr() + HUGE_PAGE) >= 3 * HUGE_PAGE
    store.finish()
    found = WeightStore(fd, "a").buffer("only", 3 * HUGE_PAGE)
    assert int(found[::4096].sum()) == 0  # touched, so that the system maps it
    assert huge(found.data_ptr() + HUGE_PAGE) >= 3 * HUGE_PAGE


def test_pages_asked_for_in_vain_are_given_back(fd: int) -> None:
    """At the end of a chunk that the next buffer does not fit into, and at the end of all."""
    store = WeightStore(fd, "a")
    for name, size in (("first", 50 << 20), ("second", 40 << 20)):
        store.buffer(name, size).fill_(1)
    store.finish()
    assert 90 << 20 <= store.nbytes <= (90 << 20) + 3 * HUGE_PAGE
    assert torch.all(WeightStore(fd, "a").buffer("second", 40 << 20) == 1)


def test_names_are_unique(fd: int) -> None:
    store = WeightStore(fd, "a")
    store.buffer("first", 8)
    with pytest.raises(ValueError, match="`first` already"):
        store.buffer("first", 8)


def huge(address: int) -> int:
    """Bytes on huge pages in the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif inside and first == "ShmemPmdMapped:":
            return int(rest[0]) * 1024
    raise AssertionError("no mapping holds the address")


def permissions(address: int) -> str:
    """Of the mapping that holds an address, as `/proc` shows them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, shown = line.split()[:2]
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return shown
    raise AssertionError("no mapping holds the address")
