"""A shared file in memory, mapped on huge pages.

Linux gives such files huge pages by a setting of their own, which is mostly off; but from 6.1 on a
process can ask for them by name (`MADV_COLLAPSE`), before anything is written. Where it cannot, a
file has plain pages: slower, and right. Knows nothing of what lies there.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import Tensor

from tgi_cli.kernels.cpu.huge_pages import HUGE_PAGE

_CHUNK = 64 << 20
_MADV_COLLAPSE = 25  # asm-generic/mman-common.h
_MAP_SHARED_FIXED = 0x11
_PROT_READ, _PROT_READ_WRITE = 1, 3
_SIZE = ctypes.c_size_t


class SharedPages:
    """Parts of a file as tensors.

    Args:
        fd: the file.
        start: where new parts begin, in bytes.
        size: of the file if it is complete; else it grows by what is cut.
    """

    def __init__(self, fd: int, *, start: int, size: int | None = None) -> None:
        self._fd = fd
        self.end = start  # of what is used
        self._chunks: list[tuple[int, Tensor]] = []  # first byte in the file, its memory
        self._asked = 0  # up to where huge pages were asked for
        if size is not None:
            self._map(0, size)
            self.end = size

    def cut(self, nbytes: int) -> tuple[int, Tensor]:
        """New memory, zeroed: its place in the file and uint8 [nbytes], on pages of its own."""
        limit = self._chunks[-1][0] + len(self._chunks[-1][1]) if self._chunks else 0
        if self.end + nbytes > limit:
            first = -(-self.end // HUGE_PAGE) * HUGE_PAGE if self._chunks else 0
            self.end = max(self.end, first)
            size = max(_CHUNK, -(-(self.end + nbytes - first) // HUGE_PAGE) * HUGE_PAGE)
            os.ftruncate(self._fd, first + size)
            self._map(first, size)
            self._asked = first
        offset = self.end
        self.end += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._ask(self.end)
        return offset, self.at(offset, nbytes)

    def at(self, offset: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] of the file, from `offset` on."""
        for first, memory in reversed(self._chunks):
            if first <= offset:
                return memory[offset - first : offset - first + nbytes]
        raise ValueError(f"nothing is mapped at {offset}")

    def make_read_only(self) -> None:
        """Whoever writes to it from now on in this process is ended by the system."""
        for _, memory in self._chunks:
            _call("mprotect", ctypes.c_void_p(memory.data_ptr()), _SIZE(len(memory)), _PROT_READ)

    def _map(self, first: int, size: int) -> None:
        # Laid over private memory, whose owner gives both back; so it can begin at a huge page.
        below = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(below, dtype=torch.uint8)
        skipped = -whole.data_ptr() % HUGE_PAGE
        memory = whole[skipped : skipped + size]
        address, length = ctypes.c_void_p(memory.data_ptr()), _SIZE(size)
        place = (_PROT_READ_WRITE, _MAP_SHARED_FIXED, self._fd, ctypes.c_long(first))
        _call("mmap", address, length, *place)
        self._chunks.append((first, memory))

    def _ask(self, end: int) -> None:
        first, memory = self._chunks[-1]
        while self._asked < end:
            page = memory[self._asked - first :]
            page[:1] = 0  # what is all hole is refused
            collapse(page.data_ptr())
            self._asked += HUGE_PAGE


def collapse(address: int) -> bool:
    """Put a huge page's worth of memory on one, if the system will; says whether it did."""
    libc = ctypes.CDLL(None)
    return bool(libc.madvise(ctypes.c_void_p(address), _SIZE(HUGE_PAGE), _MADV_COLLAPSE) == 0)


def files_get_huge_pages() -> bool:
    """Whether this system gives them to files in memory."""
    fd = os.memfd_create("tgi-probe")
    try:
        _, memory = SharedPages(fd, start=0).cut(1)
        return collapse(memory.data_ptr())
    finally:
        os.close(fd)


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_void_p
    if function(*arguments) in (ctypes.c_void_p(-1).value, 0xFFFFFFFF):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
