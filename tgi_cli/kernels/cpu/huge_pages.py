"""Memory on huge pages: what weights and the KV cache are read from in every step.

With pages of 4 KiB a stream of weights waits for address translation, in a virtual machine twice;
pages of 2 MiB make reading a quarter faster or more. Linux gives them to memory that asks, where
`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`. Knows nothing of layouts.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_CHUNK = 64 << 20
_LINE = 4096  # buffers begin on pages of their own
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python has no name for
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class HugePages:
    """Private memory, zeroed, cut from chunks that ask for huge pages; committed when written.

    A chunk lives as long as any buffer in it. Where the system gives no huge pages it is plain
    memory: slower, and right.
    """

    def __init__(self) -> None:
        self._chunk: memoryview | None = None  # what is left of the newest

    def buffer(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of its own."""
        size = max(1, -(-nbytes // _LINE)) * _LINE
        if self._chunk is None or len(self._chunk) < size:
            self._chunk = _chunk(max(size, _CHUNK))
        part, self._chunk = self._chunk[:size], self._chunk[size:]
        return torch.frombuffer(part, dtype=torch.uint8)[:nbytes]


def commit(memory: Tensor) -> bool:
    """Have the pages of a contiguous tensor there before it is written; what it holds stays.

    The first write to a page of 2 MiB waits until it is found and cleared, in a virtual machine for
    milliseconds. False where the system cannot do it beforehand (Linux before 5.14, or no memory
    is left): then that is left to the first write.
    """
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    first = memory.data_ptr() // _LINE * _LINE
    last = -(-(memory.data_ptr() + memory.nbytes) // _LINE) * _LINE
    done: int = libc.madvise(first, last - first, _POPULATE_WRITE)
    return done == 0


def huge_pages_setting(path: Path = _SETTING) -> str | None:
    """The system's choice: `always`, `madvise` or `never`; None where there is none."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def _chunk(size: int) -> memoryview:
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skipped = -torch.frombuffer(mapped, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)[skipped : skipped + size]
