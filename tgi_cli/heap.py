"""What glibc does with memory that was freed. Other C libraries are left as they are."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_large_memory() -> None:
    """Have allocations of 8 MB and more taken from the system and given back when freed.

    By default glibc's threshold grows with what is freed, and the logits of long prompts leave
    holes in the heap that no plan can foresee.
    """
    _set(_M_MMAP_THRESHOLD, 8 << 20)


def keep_large_memory() -> None:
    """Have memory that was freed used again, and not given back.

    For work that allocates and frees the same sizes again and again: every new page is cleared by
    the system when it is first touched.
    """
    _set(_M_MMAP_THRESHOLD, 1 << 30)
    _set(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def trim_heap() -> None:
    """Give freed memory back to the system: that of other threads' heaps, which keep theirs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
