"""The collective over torch.distributed: gloo between machines, NCCL between GPUs.

Sums are gathers that every rank adds up in the order of the ranks: a ring's order would depend on
where in a message a number stands, and so on the batch. Knows no model.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tgi_cli.errors import EngineError
from tgi_cli.kernels.cpu.collective import Ranks, ReduceCall, StagingCall

dist: Any = torch.distributed  # its stubs leave out the classes used here

#: How long ranks wait for each other to come, and for a message of one that is alive.
_PATIENCE = timedelta(minutes=30)
#: How soon an abort is seen by a rank that waits.
_LOOK_UP = timedelta(seconds=0.25)


class ProcessGroup:
    """One rank's end of a process group of its own.

    Args:
        device: whose tensors are sent; decides between gloo and NCCL.
        store: `file://PATH` or `tcp://HOST:PORT`, where rank 0 listens.
        rank: 0 .. world_size - 1.
        world_size: number of ranks.
        address: of this machine, for gloo's connections; empty takes that of its host name.
        listen_fd: rank 0's socket that already listens at HOST:PORT; adopted.

    Raises:
        EngineError: the others cannot be reached.
    """

    def __init__(
        self,
        device: torch.device,
        store: str,
        rank: int,
        world_size: int,
        *,
        address: str = "",
        listen_fd: int | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._progress = 0
        self._lost = threading.Event()
        try:
            meeting = _store(store, rank, world_size, listen_fd)
            create = GROUPS[device.type]
            self._group = create(meeting, rank, world_size, address)
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"rank {rank} cannot meet the others at {store}: {_first_line(error)}",
                hint="check --master-addr, --master-port and that every node runs",
            ) from None
        # Kept: a native step calls them.
        self._staging = StagingCall(lambda _self, _n: None)
        self._reduce = ReduceCall(self._reduce_floats)
        self._ranks: Ranks | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collective.all_reduce`."""
        parts = self._gathered(x.float().contiguous(), [tuple(x.shape)] * self.world_size)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, columns: Sequence[int], out: Tensor | None = None) -> Tensor:
        """See `Collective.all_gather`."""
        # Equal sizes, as NCCL wants them.
        padded = x.new_zeros((len(x), max(columns)), dtype=torch.float32)
        padded[:, : x.shape[1]] = x
        parts = self._gathered(padded, [tuple(padded.shape)] * self.world_size)
        cut = [part[:, :width] for part, width in zip(parts, columns, strict=True)]
        return torch.cat(cut, 1) if out is None else torch.cat(cut, 1, out=out)

    def progress(self) -> int:
        """See `Collective.progress`."""
        return self._progress

    def abort(self) -> None:
        """Make later calls fail, and soon one that waits; NCCL's own calls are aborted too."""
        self._lost.set()
        if self._device.type == "cuda":
            self._group.abort()

    def check(self) -> None:
        """See `Collective.check`."""
        if self._lost.is_set():
            raise EngineError(f"rank {self.rank} was left by another rank in the middle of a step")

    def native(self, first_token: int, num_tokens: int) -> Ranks:
        """See `Collective.native`: the native step calls back into Python."""
        self._ranks = Ranks(
            None,
            ctypes.cast(self._staging, ctypes.c_void_p),
            ctypes.cast(self._reduce, ctypes.c_void_p),
            first_token,
            num_tokens,
        )
        return self._ranks

    def _gathered(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        self.check()
        parts = [x.new_empty(shape) for shape in shapes]
        self._progress += 1
        if x.numel():
            try:
                self._wait(self._group.allgather([parts], [x]))
            except RuntimeError as error:
                self._lost.set()
                raise EngineError(
                    f"rank {self.rank} lost the others: {_first_line(error)}"
                ) from None
        return parts

    def _wait(self, work: Any) -> None:
        """Wait on the host for gloo, looking up now and then; NCCL's stream waits by itself."""
        if self._device.type == "cuda":
            work.wait()
            return
        while True:
            try:
                work.wait(_LOOK_UP)
            except RuntimeError:
                if work.is_completed():  # broken, not late
                    raise
                self.check()
            else:
                return

    def _reduce_floats(
        self, _self: int, _pool: int, x: int, into: int, size: int, accumulate: int
    ) -> int:
        try:
            total, target = self.all_reduce(_floats(x, size)), _floats(into, size)
        except EngineError:
            return 1  # an exception must not pass through C
        if accumulate:
            target += total
        else:
            target.copy_(total)
        return 0


def _store(url: str, rank: int, world_size: int, listen_fd: int | None) -> Any:
    kind, _, rest = url.partition("://")
    if kind == "file":
        return dist.FileStore(rest, world_size)
    host, _, port = rest.rpartition(":")
    return dist.TCPStore(
        host.strip("[]"),
        int(port),
        world_size,
        is_master=rank == 0,
        timeout=_PATIENCE,
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def _gloo(store: Any, rank: int, world_size: int, address: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = _PATIENCE
    options._devices = [
        dist.ProcessGroupGloo.create_device(hostname=address)
        if address
        else dist.ProcessGroupGloo.create_default_device()
    ]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _nccl(store: Any, rank: int, world_size: int, address: str) -> Any:
    """NCCL finds its interfaces by itself, or by NCCL_SOCKET_IFNAME. Never run so far."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _PATIENCE
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


#: What carries the messages of tensors on a kind of device.
GROUPS: Mapping[str, Callable[[Any, int, int, str], Any]] = MappingProxyType(
    {"cpu": _gloo, "cuda": _nccl}
)


def _floats(address: int, size: int) -> Tensor:
    """float32 memory as a tensor, not copied."""
    return torch.frombuffer((ctypes.c_float * size).from_address(address), dtype=torch.float32)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
