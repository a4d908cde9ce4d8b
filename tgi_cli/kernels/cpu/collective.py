"""The collective of ranks on one machine: C++ over memory that they share.

The memory comes from whoever starts the ranks, as a file descriptor without a name: it is gone when
the last rank is, however that ended. Knows no model.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from tgi_cli.errors import EngineError
from tgi_cli.kernels.cpu.library import Library, pointer

_POINTER, _INT64, _INT32, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int

#: Bytes of one piece of a message. Longer ones go in several; pages never used cost nothing.
CAPACITY = 16 << 20

_SIGNATURES = {
    "bytes": (_INT64, (_INT, _INT64)),
    "": (_POINTER, (_POINTER, _INT, _INT, _INT64)),
    "close": (None, (_POINTER,)),
    "all_reduce": (_INT32, (_POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT32)),
    "all_gather": (_INT32, (_POINTER, _POINTER, _POINTER, _INT64, _POINTER)),
    "abort": (None, (_POINTER,)),
    "aborted": (_INT32, (_POINTER,)),
    "progress": (ctypes.c_uint64, (_POINTER, _INT)),
}

StagingCall = ctypes.CFUNCTYPE(_POINTER, _POINTER, _INT64)
ReduceCall = ctypes.CFUNCTYPE(_INT32, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT32)


class Ranks(ctypes.Structure):
    """How a native step reaches the other ranks; see `csrc/collective.h`."""

    _fields_ = (
        ("self", _POINTER),
        ("staging", _POINTER),
        ("all_reduce", _POINTER),
        ("first_token", _INT64),
        ("num_tokens", _INT64),
    )


class SharedMemory:
    """One rank's end of the shared memory; `SharedMemory.create` makes the memory itself."""

    def __init__(
        self, library: Library, fd: int, rank: int, world_size: int, *, capacity: int = CAPACITY
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._functions = library.functions
        _declare(self._functions)
        size = self._functions.tgi_collective_bytes(world_size, capacity)
        self._memory = mmap.mmap(fd, size)
        self._view = (ctypes.c_char * size).from_buffer(self._memory)
        self._handle = ctypes.c_void_p(
            self._functions.tgi_collective(ctypes.addressof(self._view), rank, world_size, capacity)
        )

    @staticmethod
    def create(library: Library, world_size: int, *, capacity: int = CAPACITY) -> int:
        """A file descriptor of zeroed memory for so many ranks; the caller closes it."""
        _declare(library.functions)
        fd = os.memfd_create("tgi-collective")
        os.ftruncate(fd, library.functions.tgi_collective_bytes(world_size, capacity))
        return fd

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collective.all_reduce`."""
        total = x.float().contiguous()
        if total is x:
            total = x.clone()
        at = pointer(total)
        if self._functions.tgi_collective_all_reduce(
            self._handle, None, at, at, total.numel(), False
        ):
            self.check()
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, columns: Sequence[int], out: Tensor | None = None) -> Tensor:
        """See `Collective.all_gather`."""
        x = x.float().contiguous()
        if out is None:
            out = torch.empty((len(x), sum(columns)))
        widths = (_INT64 * len(columns))(*columns)
        if self._functions.tgi_collective_all_gather(
            self._handle, pointer(x), pointer(out), len(x), widths
        ):
            self.check()
        return out

    def progress(self) -> int:
        """See `Collective.progress`."""
        return int(self._functions.tgi_collective_progress(self._handle, self.rank))

    def abort(self) -> None:
        """See `Collective.abort`."""
        self._functions.tgi_collective_abort(self._handle)

    def check(self) -> None:
        """See `Collective.check`."""
        if self._functions.tgi_collective_aborted(self._handle):
            raise EngineError(f"rank {self.rank} was left by another rank in the middle of a step")

    def native(self, first_token: int, num_tokens: int) -> Ranks:
        """See `Collective.native`."""
        return Ranks(
            self._handle,
            ctypes.cast(self._functions.tgi_collective_staging, _POINTER),
            ctypes.cast(self._functions.tgi_collective_all_reduce, _POINTER),
            first_token,
            num_tokens,
        )


def _declare(functions: ctypes.CDLL) -> None:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(functions, f"tgi_collective_{name}".rstrip("_"))
        function.restype, function.argtypes = result, arguments
