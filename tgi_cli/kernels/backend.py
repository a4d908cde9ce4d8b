"""A backend: its operations, its device and the few facts the engine asks about them.

Chosen once by `select`; nothing outside `kernels/` asks for the device. Knows no model: `plan`
takes a decoder only to hand it to native code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from tgi_cli.errors import UsageError
from tgi_cli.kernels import reference
from tgi_cli.kernels.collective import ALONE, Collective
from tgi_cli.kernels.cpu.huge_pages import HugePages, commit, huge_pages_setting
from tgi_cli.kernels.cpu.library import Library, load
from tgi_cli.kernels.cpu.packer import Packer
from tgi_cli.kernels.cpu.program import NativeStep, reason_against, reason_against_spec
from tgi_cli.kernels.cpu.shared_pages import files_get_huge_pages
from tgi_cli.kernels.cpu.weight_store import WeightStore
from tgi_cli.kernels.kv_rows import row_width
from tgi_cli.kernels.memory import cgroup_headroom
from tgi_cli.kernels.ops import Ops

log = logging.getLogger(__name__)

#: Names every backend answers to, in the order of the Protocol.
OP_NAMES = tuple(name for name in vars(Ops) if not name.startswith("_"))


@dataclass(frozen=True, slots=True)
class Backend:
    """`deterministic` says whether promise one holds: equal bits however a batch is composed.

    It holds for decoders that `plan` has a native program for. `native` is the library of CPU
    kernels, None where it is not built or not for this CPU.
    """

    name: str
    device: torch.device
    ops: Ops
    deterministic: bool
    num_threads: int
    native: Library | None = None
    collective: Collective = ALONE  # this rank's end of what it shares with the others
    memory: HugePages = field(default_factory=HugePages)  # of KV caches, on a CPU

    def free_memory(self, *, ranks: int = 1) -> int:
        """Bytes this process can still take, by the container's limit where that is lower.

        Args:
            ranks: how many of this machine take from the same memory; each has a GPU of its own.
        """
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        available = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
        within = cgroup_headroom()
        return (available if within is None else min(available, within)) // ranks

    def held_memory(self) -> int:
        """Bytes of that memory this process has already."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_reserved(self.device))
        return int(psutil.Process().memory_info().rss)  # type: ignore[no-untyped-call]

    def allocate_kv(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_blocks, block_size, num_kv_heads, row_width].

        Zeroed. On a CPU a page is committed only when it is first written: `torch.zeros` would
        write them all.
        """
        shape = (num_blocks, block_size, num_kv_heads, row_width(head_dim, dtype))
        if self.device.type != "cpu":
            keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
            return keys, values
        size = math.prod(shape) * dtype.itemsize
        keys, values = (self.memory.buffer(size).view(dtype).view(shape) for _ in range(2))
        return keys, values

    def commit(self, buffer: Tensor) -> bool:
        """Have the memory of a part of what `allocate_kv` gave there before it is written.

        What it holds stays. May be called from any thread. False where that cannot be done.
        """
        return self.device.type != "cpu" or commit(buffer)

    def weight_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Where a matrix that was read into main memory should live; None leaves it there."""
        if self.device.type == "cpu":
            return None
        return torch.empty(rows, columns, dtype=dtype, device=self.device)

    def reason_against(self, spec: Any, dtype: torch.dtype, block_size: int) -> str | None:
        """Why `plan` would have no program for a decoder of `spec`, or None if it would.

        Asked before a weight is read: memory planning and the form of the weights depend on it.
        """
        if self.native is None:
            return "the native kernels are not built for this machine"
        return reason_against_spec(spec, dtype, block_size)

    def weight_store(self, fd: int, fingerprint: str) -> WeightStore | None:
        """Where packed weights are kept, or None where private memory would be read faster.

        That is so if the system gives huge pages to private memory alone.
        """
        if self.native is None:
            return None
        if huge_pages_setting() in ("madvise", "always") and not files_get_huge_pages():
            log.info("packed weights are not kept for a restart: shared memory is slower here")
            return None
        return WeightStore(fd, fingerprint)

    def packer(
        self, spec: Any, dtype: torch.dtype, block_size: int, store: WeightStore | None = None
    ) -> Packer | None:
        """What packs the matrices of a decoder of `spec` while it is read; None if `plan` has none.

        Torch is left with one thread for each of the packer's.
        """
        if self.native is None or self.reason_against(spec, dtype, block_size) is not None:
            return None
        torch.set_num_threads(1)
        return Packer(self.native.context(self.native.variants()[0], self.num_threads), store)

    def plan(self, decoder: Any, block_size: int) -> NativeStep | None:
        """A native program for a whole step of `decoder`, or None to run its Python composition.

        The program repacks in place what no packer has packed, and has threads of its own; torch is
        left with one. Why there is none for a decoder or size of KV blocks is logged.
        """
        if self.native is None:
            if self.device.type == "cpu":
                log.warning(
                    "the native CPU kernels are missing, so plain torch runs, several times "
                    "slower; install a C++ compiler and install tgi again"
                )
            return None
        reason = reason_against(decoder, block_size)
        if reason is not None:
            log.warning("the native kernels are not used for this model: %s", reason)
            return None
        torch.set_num_threads(1)
        if decoder.packer is not None:
            return NativeStep(decoder.packer.context, decoder)
        return NativeStep(self.native.context(self.native.variants()[0], self.num_threads), decoder)


def merge(*tables: Mapping[str, Any]) -> Ops:
    """One namespace of operations; later tables override earlier ones.

    Raises:
        ValueError: an operation is missing from all tables.
    """
    merged = {name: table[name] for table in tables for name in OP_NAMES if name in table}
    missing = [name for name in OP_NAMES if name not in merged]
    if missing:
        raise ValueError(f"no table has the operations {', '.join(missing)}")
    return cast(Ops, SimpleNamespace(**merged))


def select(device: str = "auto", *, num_threads: int | None = None, local_rank: int = 0) -> Backend:
    """The backend for `auto`, `cpu` or `cuda`.

    Args:
        device: one of these.
        num_threads: also set for torch.
        local_rank: which of this machine's ranks it is for; each has a GPU of its own.

    Raises:
        UsageError: an unknown device, or CUDA where torch sees no GPU or too few.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device `{device}`", hint="use auto, cpu or cuda")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        why = (
            f"torch {torch.__version__} is a build without CUDA"
            if torch.version.cuda is None
            else "torch sees no GPU"
        )
        raise UsageError(
            f"device `cuda` is not available: {why}",
            hint="use --device cpu, or install torch's CUDA build and a driver",
        )
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    on_gpu = has_cuda and device != "cpu"
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}",
            hint="use at most as many shards as there are GPUs",
        )
    if on_gpu:  # also where the environment asks for TF32, which keeps 10 bits of 23
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    native = None if on_gpu else load()
    variants = native.variants() if native else []
    return Backend(
        name=f"native-{variants[0]}" if variants else "torch-cuda" if on_gpu else "torch-cpu",
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
        ops=merge(vars(reference)),
        deterministic=bool(variants),
        num_threads=num_threads or torch.get_num_threads(),
        native=native if variants else None,
    )
