"""A backend: its operations, its device and the few facts the engine asks about them.

Chosen once by `select`; nothing outside `kernels/` asks for the device. Knows no model: `plan`
takes a decoder only to hand it to native code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from tgi_cli.errors import UsageError
from tgi_cli.kernels import reference
from tgi_cli.kernels.ops import Ops

#: Names every backend answers to, in the order of the Protocol.
OP_NAMES = tuple(name for name in vars(Ops) if not name.startswith("_"))
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Backend:
    """`deterministic` says whether promise one holds: equal bits however a batch is composed."""

    name: str
    device: torch.device
    ops: Ops
    deterministic: bool
    num_threads: int

    def free_memory(self) -> int:
        """Bytes this process can still take, by the container's limit where that is lower."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        available = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
        within = cgroup_headroom()
        return available if within is None else min(available, within)

    def allocate_kv(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_blocks, block_size, num_kv_heads, head_dim].

        Zeroed, which on a CPU commits a page only when it is first written.
        """
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return (
            torch.zeros(shape, dtype=dtype, device=self.device),
            torch.zeros(shape, dtype=dtype, device=self.device),
        )

    def plan(self, decoder: object) -> Callable[..., Tensor] | None:
        """A native program for a whole step of `decoder`, or None to run its Python composition.

        Plain torch has none: every step runs through the composition, which stays the oracle.
        """
        return None


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


def select(device: str = "auto", *, num_threads: int | None = None) -> Backend:
    """The backend for `auto`, `cpu` or `cuda`; `num_threads` also sets torch's own threads.

    Raises:
        UsageError: an unknown device, or CUDA where torch sees no GPU.
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
    return Backend(
        name="torch-cuda" if on_gpu else "torch-cpu",
        device=torch.device("cuda" if on_gpu else "cpu"),
        ops=merge(vars(reference)),
        deterministic=False,
        num_threads=torch.get_num_threads(),
    )


def cgroup_headroom(root: Path = _CGROUP) -> int | None:
    """Bytes left below the memory limit of this control group (v2 or v1); None without a limit.

    File cache that the kernel can drop counts as free.
    """
    for limit_name, usage_name, stat_name, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            limit = (root / limit_name).read_text().strip()
            usage = int((root / usage_name).read_text())
            stat = dict(line.split() for line in (root / stat_name).read_text().splitlines())
        except (OSError, ValueError):
            continue
        # v1 writes "no limit" as a number near 2**63.
        if limit == "max" or int(limit) >= 2**60:
            return None
        return max(0, int(limit) - usage + int(stat.get(cache_key, 0)))
    return None
