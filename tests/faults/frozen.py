"""Freeze one thread of another process in native code; its other threads go on.

ptrace stops a thread, not a process, which is what a hang inside a kernel looks like from outside:
the thread of heartbeats still runs. Knows nothing of ranks.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CONT, _DETACH, _SEIZE, _INTERRUPT = 7, 17, 0x4206, 0x4207  # sys/ptrace.h
_WALL = 0x40000000  # also threads that are not children


def _ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, thread, None, None) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _inside(pid: int, library: str) -> bool:
    """Whether the main thread, which is stopped, was about to run code of `library`."""
    with open(f"/proc/{pid}/syscall") as file:
        counter = int(file.read().split()[-1], 16)
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            first, _, last = line.partition(" ")[0].partition("-")
            if int(first, 16) <= counter < int(last, 16):
                return library in line
    return False


@contextmanager
def frozen(pid: int, library: str, *, timeout: float = 60) -> Iterator[None]:
    """Hold the main thread of `pid` still, caught inside `library`.

    Raises:
        PermissionError: this machine does not allow ptrace.
    """
    _ptrace(_SEIZE, pid)
    try:
        deadline = time.monotonic() + timeout
        while True:
            _ptrace(_INTERRUPT, pid)
            os.waitpid(pid, _WALL)
            if _inside(pid, library):
                break
            assert time.monotonic() < deadline, "never caught inside the library"
            _ptrace(_CONT, pid)
            time.sleep(0.001)
        yield
    finally:
        with suppress(OSError):
            _ptrace(_DETACH, pid)  # fails on one that has been killed, which is reaped here instead
        with suppress(ChildProcessError):
            os.waitpid(pid, _WALL | os.WNOHANG)
