"""Packed weights in shared memory that outlives the process that packed them.

A file in memory (`memfd`), held open by whoever starts engines: the first engine fills it, each
later one of the same fingerprint maps it and packs nothing. It has no name, so nothing is left when
its last holder is gone. Knows names and sizes, not what a buffer holds.
"""

from __future__ import annotations

import json
import mmap
import os
import struct

from torch import Tensor

from tgi_cli.errors import EngineError
from tgi_cli.kernels.cpu.shared_pages import SharedPages

_MAGIC = b"tgi weights 1"
_HEADER = struct.Struct("<16sqq")  # magic; where the table of contents begins, and its size


class WeightStore:
    """Buffers by name. `filled` says whether they hold what `fingerprint` stands for already.

    What was made for another fingerprint, or only in part, is dropped. Buffers are read-only from
    `finish` on, so that a stray write ends its process and not the truth of the next one.

    Args:
        fd: of the shared memory; the store never closes it.
        fingerprint: of everything that the contents depend on.
    """

    def __init__(self, fd: int, fingerprint: str) -> None:
        self._fd = fd
        self._fingerprint = fingerprint
        places = self._read_contents()
        self.filled = places is not None
        self._places: dict[str, tuple[int, int]] = places or {}
        if self.filled:
            self._pages = SharedPages(fd, start=0, size=os.fstat(fd).st_size)
            self._pages.make_read_only()
        else:
            os.ftruncate(fd, 0)
            self._pages = SharedPages(fd, start=mmap.PAGESIZE)  # the first page is the header's

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take now, filled or not."""
        return os.fstat(self._fd).st_blocks * 512

    def buffer(self, name: str, nbytes: int) -> Tensor:
        """Memory called `name`: uint8 [nbytes], on pages of its own.

        Raises:
            EngineError: the store is filled and has no such buffer.
        """
        if self.filled:
            place = self._places.get(name)
            if place is None or place[1] != nbytes:
                raise EngineError(f"the kept weights have no buffer `{name}` of {nbytes:,} bytes")
            return self._pages.at(*place)
        if name in self._places:
            raise ValueError(f"there is a buffer `{name}` already")
        offset, made = self._pages.cut(nbytes)
        self._places[name] = (offset, nbytes)
        return made

    def finish(self) -> None:
        """Say that every buffer is written."""
        self._pages.make_read_only()
        if self.filled:
            return
        contents, end = json.dumps([self._fingerprint, self._places]).encode(), self._pages.end
        os.pwrite(self._fd, contents, end)
        os.pwrite(self._fd, _HEADER.pack(_MAGIC, end, len(contents)), 0)
        self.filled = True

    def _read_contents(self) -> dict[str, tuple[int, int]] | None:
        header = os.pread(self._fd, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            return None
        magic, start, size = _HEADER.unpack(header)
        if magic.rstrip(b"\0") != _MAGIC:
            return None
        fingerprint, places = json.loads(os.pread(self._fd, size, start))
        if fingerprint != self._fingerprint:
            return None
        return {name: (offset, nbytes) for name, (offset, nbytes) in places.items()}
