"""Ranks as threads of one process, over the real shared memory; native calls free the GIL."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from tgi_cli.kernels.backend import Backend, select
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.collective import CAPACITY, SharedMemory

T = TypeVar("T")


def on_ranks(
    world_size: int, work: Callable[[Collective], T], *, capacity: int = CAPACITY
) -> list[T]:
    """What `work` returns on each rank; the first error of any is raised."""
    loaded = library.load()
    assert loaded is not None
    fd = SharedMemory.create(loaded, world_size, capacity=capacity)
    ends = [
        SharedMemory(loaded, fd, rank, world_size, capacity=capacity) for rank in range(world_size)
    ]
    os.close(fd)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ends[rank])
        except BaseException as error:
            errors.append(error)
            ends[rank].abort()  # the others wait for it

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]


def backend_of(collective: Collective) -> Backend:
    return replace(select("cpu"), collective=collective)
