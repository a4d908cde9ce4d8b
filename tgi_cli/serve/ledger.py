"""What all HTTP workers have used together: counters in memory that they share.

A row for each name that is counted: two amounts that decay, with the time they were last written,
and for each worker how much it is using right now. Written under a lock of the file behind the
memory, which the kernel releases when its holder dies. Knows no limit and refuses nothing.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from tgi_cli.errors import EngineError

#: Names a server can count in its life; the memory of those never seen is never touched.
MAX_ROWS = 1 << 16
#: Seconds to wait for a worker that holds the lock. One that was stopped just then must not stop
#: the others: they go on without it, and a count may be off by what they did meanwhile.
_PATIENCE = 0.05
_WORD = 8
_KEY = 2  # words: half of a name's digest each
_AMOUNTS = 4  # words: amount and time, twice


class Row:
    """The numbers of one name; `cells` holds the amounts from `amounts` on."""

    __slots__ = ("_end", "_own", "amounts", "cells")

    def __init__(self, cells: memoryview[float], start: int, worker: int, num_workers: int) -> None:
        self.cells = cells
        self.amounts = start + _KEY
        self._own = self.amounts + _AMOUNTS + worker
        self._end = self.amounts + _AMOUNTS + num_workers

    @property
    def in_use(self) -> int:
        """What all workers are using right now."""
        return int(sum(self.cells[self.amounts + _AMOUNTS : self._end]))

    def take(self, count: int) -> None:
        """This worker uses so many more."""
        self.cells[self._own] += count

    def give_back(self, count: int) -> None:
        """This worker uses so many less; needs no lock, since nobody else writes its cell."""
        self.cells[self._own] -= count


class Ledger:
    """One worker's view of the counters.

    Args:
        fd: a file made by `create` for this many workers; None for memory of this process alone.
        worker: which of the workers this is. What a predecessor of that number was using when it
            died is given back.
        num_workers: workers that share the file.
    """

    def __init__(self, fd: int | None = None, worker: int = 0, num_workers: int = 1) -> None:
        self.num_workers = num_workers
        self._fd = fd
        self._worker = worker
        self._stride = _KEY + _AMOUNTS + num_workers
        memory = mmap.mmap(-1 if fd is None else fd, _size(num_workers))
        self._cells = memoryview(memory).cast("d")
        self._words = memoryview(memory).cast("Q")
        self._rows: dict[str, Row] = {}
        with self.locked():
            for number in range(self._words[0]):
                self._cells[1 + number * self._stride + _KEY + _AMOUNTS + worker] = 0.0

    @staticmethod
    def create(num_workers: int) -> int:
        """Make the file and return its descriptor, for workers to inherit."""
        fd = os.memfd_create("tgi-ledger")
        os.truncate(fd, _size(num_workers))
        return fd

    def row(self, name: str) -> Row:
        """The row of a name, the same in every worker.

        Raises `EngineError` when there is no row left.
        """
        row = self._rows.get(name)
        if row is None:
            with self.locked():
                start = 1 + self._find(name) * self._stride
            row = self._rows[name] = Row(self._cells, start, self._worker, self.num_workers)
        return row

    def _find(self, name: str) -> int:
        digest = blake2b(name.encode(), digest_size=16).digest()
        key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))
        used = self._words[0]
        for number in range(used):
            at = 1 + number * self._stride
            if (self._words[at], self._words[at + 1]) == key:
                return number
        if used == MAX_ROWS:
            raise EngineError(
                f"more than {MAX_ROWS} tenants with limits have been seen",
                hint="restart the server to forget those that are gone",
            )
        at = 1 + used * self._stride
        self._words[at], self._words[at + 1] = key
        self._words[0] = used + 1
        return used

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the other workers from writing."""
        held = self._fd is not None and _lock(self._fd)
        try:
            yield
        finally:
            if held and self._fd is not None:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)


def _size(num_workers: int) -> int:
    return _WORD * (1 + MAX_ROWS * (_KEY + _AMOUNTS + num_workers))


def _lock(fd: int) -> bool:
    """Whether the lock was to be had."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PATIENCE / 256)
        else:
            return True
