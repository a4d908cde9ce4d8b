"""A checkpoint's file in memory as the system pages it in: views of it, and letting pages go."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """A file, mapped. Raises `OSError` if it cannot be read, `ValueError` if it is empty."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy on write, because torch wants writable buffers; nobody writes.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def view(self, offset: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] of the file; nothing is read before it is touched."""
        return torch.frombuffer(self._data, dtype=torch.uint8, count=nbytes, offset=offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Take these bytes out of this process's memory; touching them again brings them back."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._data.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)
