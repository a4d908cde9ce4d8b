"""What this process may use of the machine: cores, by affinity and the container's quota."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

_M_MMAP_THRESHOLD = -3  # malloc.h


def usable_cores(root: Path = _CGROUP) -> int:
    """Cores this process may run on, rounded up where a quota allows parts of one."""
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of time by this control group (v2 or v1), None without a limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = (root / "cpu/cpu.cfs_quota_us").read_text()
        period = (root / "cpu/cpu.cfs_period_us").read_text()
        return None if int(limit) < 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def return_large_memory() -> None:
    """Have glibc take allocations of 8 MB and more from the system and give them back when freed.

    By default its threshold grows with what is freed, and the logits of long prompts leave holes
    in the heap that no plan can foresee. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 8 << 20)


def trim_heap() -> None:
    """Give freed memory back to the system: that of other threads' heaps, which keep theirs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
