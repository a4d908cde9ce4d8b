"""How a rank joins the others: memory they share on one machine, else torch.distributed.

Knows which collective serves where; what the collectives do is the kernels' business.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu.collective import SharedMemory
from tgi_cli.kernels.process_group import ProcessGroup


@dataclass(frozen=True)
class MeetingPlace:
    """Where ranks meet that share no memory.

    Attributes:
        store: `file://PATH` or `tcp://HOST:PORT`; empty where memory is shared.
        address: this machine's, that ranks on other machines reach; empty on one machine.
        listen_fd: rank 0's socket that already listens at HOST:PORT.
    """

    store: str = ""
    address: str = ""
    listen_fd: int | None = None


def shares_memory(backend: Backend, num_nodes: int) -> bool:
    """Whether all ranks meet in shared memory: one machine, and the native library there."""
    return backend.native is not None and num_nodes == 1


def join(
    backend: Backend, *, rank: int, world_size: int, memory_fd: int | None, place: MeetingPlace
) -> Collective:
    """This rank's end of the collective; waits for the others.

    Args:
        backend: where the rank runs.
        rank: 0 .. world_size - 1.
        world_size: number of ranks.
        memory_fd: of memory made by `SharedMemory.create`; closed here.
        place: where the ranks meet otherwise.

    Raises:
        EngineError: the others cannot be reached.
    """
    if memory_fd is not None and backend.native is not None:
        try:
            return SharedMemory(backend.native, memory_fd, rank, world_size)
        finally:
            os.close(memory_fd)  # the mapping stays
    return ProcessGroup(
        backend.device,
        place.store,
        rank,
        world_size,
        address=place.address,
        listen_fd=place.listen_fd,
    )
