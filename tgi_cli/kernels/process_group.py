"""The collective over torch.distributed: gloo between machines, NCCL between GPUs.

Sums are gathers that every rank adds up in the order of the ranks: a ring's order would depend on
where in a message a number stands, and so on the batch. Knows no model.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tgi_cli.errors import EngineError
from tgi_cli.kernels.cpu.collective import Ranks, ReduceCall, StagingCall

#: How long ranks wait for each other to come, and for a message of one that is alive.
_PATIENCE = timedelta(minutes=30)


class ProcessGroup:
    """One rank's end of a process group of its own.

    Args:
        device: whose tensors are sent; decides between gloo and NCCL.
        store: `file://PATH` or `tcp://HOST:PORT`, where rank 0 listens.
        rank: 0 .. world_size - 1.
        world_size: number of ranks.

    Raises:
        EngineError: the others cannot be reached.
    """

    def __init__(self, device: torch.device, store: str, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._progress = 0
        self._lost = threading.Event()
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=store,
                rank=rank,
                world_size=world_size,
                timeout=_PATIENCE,
            )
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
        """Make later calls fail; a call that waits ends when its peer's connection does."""
        self._lost.set()

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
                dist.all_gather(parts, x)
            except RuntimeError as error:
                self._lost.set()
                raise EngineError(
                    f"rank {self.rank} lost the others: {_first_line(error)}"
                ) from None
        return parts

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


def _floats(address: int, size: int) -> Tensor:
    """float32 memory as a tensor, not copied."""
    return torch.frombuffer((ctypes.c_float * size).from_address(address), dtype=torch.float32)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
