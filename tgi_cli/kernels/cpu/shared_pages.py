"""A shared file in memory, mapped on huge pages.

Linux gives such files huge pages by a setting of their own, which is mostly off; but from 6.1 on a
process can ask for them by name (`MADV_COLLAPSE`), before anything is written. Where it cannot, a
file has plain pages: slower, and right. Knows nothing of what lies there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tgi_cli.kernels.cpu.huge_pages import HUGE_PAGE

_CHUNK = 64 << 20
_MADV_REMOVE, _MADV_COLLAPSE = 9, 25  # asm-generic/mman-common.h
_MAP_SHARED_FIXED = 0x11
_PROT_READ, _PROT_READ_WRITE = 1, 3
_SIZE = ctypes.c_size_t


class SharedPages:
    """Parts of a file as tensors.

    A huge page takes the system milliseconds, so a thread asks for some that will be cut next.

    Args:
        fd: the file.
        start: where new parts begin, in bytes.
        size: of the file if it is complete; else it grows by what is cut.
        ahead: bytes to ask for beyond what is cut.
    """

    def __init__(
        self, fd: int, *, start: int, size: int | None = None, ahead: int = 4 * HUGE_PAGE
    ) -> None:
        self._fd = fd
        self._ahead = ahead
        self._asker = ThreadPoolExecutor(1, "tgi-pages")
        # Before the memory it is to ask for goes.
        weakref.finalize(self, self._asker.shutdown, cancel_futures=True)
        self._pending: deque[tuple[int, Future[None]]] = deque()  # first byte of each page
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
            self._give_back()
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
        """Whoever writes to it from now on in this process is ended by the system.

        Nothing more is cut.
        """
        self._give_back()
        self._asker.shutdown()
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

    def _give_back(self) -> None:
        """Let go of what was asked for in vain."""
        while self._pending:
            self._pending.popleft()[1].result()
        unused = -(-self.end // HUGE_PAGE) * HUGE_PAGE
        if self._asked > unused:
            first, memory = self._chunks[-1]
            advise(memory.data_ptr() + unused - first, self._asked - unused, _MADV_REMOVE)
            self._asked = unused

    def _ask(self, end: int) -> None:
        """Have what lies before `end` on huge pages, and begin with what lies behind."""
        first, memory = self._chunks[-1]
        while self._asked < min(end + self._ahead, first + len(memory)):
            address = memory.data_ptr() + self._asked - first
            self._pending.append((self._asked, self._asker.submit(_make_huge, address)))
            self._asked += HUGE_PAGE
        while self._pending and self._pending[0][0] < end:
            self._pending.popleft()[1].result()


def _make_huge(address: int) -> None:
    ctypes.memset(address, 0, 1)  # what is all hole is refused
    collapse(address)


def collapse(address: int) -> bool:
    """Put a huge page's worth of memory on one, if the system will; says whether it did."""
    return advise(address, HUGE_PAGE, _MADV_COLLAPSE)


def advise(address: int, nbytes: int, advice: int) -> bool:
    """Call `madvise`; says whether the system took it."""
    libc = ctypes.CDLL(None)
    return bool(libc.madvise(ctypes.c_void_p(address), _SIZE(nbytes), advice) == 0)


def files_get_huge_pages() -> bool:
    """Whether this system gives them to files in memory."""
    fd = os.memfd_create("tgi-probe")
    try:
        _, memory = SharedPages(fd, start=0, ahead=0).cut(1)
        return collapse(memory.data_ptr())
    finally:
        os.close(fd)


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_void_p
    if function(*arguments) in (ctypes.c_void_p(-1).value, 0xFFFFFFFF):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
