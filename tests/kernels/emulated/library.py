"""The kernels' library for arm64 in an emulator, behind the interface of `kernels.cpu.library`.

A pytest plugin as well (`-p tests.kernels.emulated.library`): what tests load is then that library
followed by the installed one, so they compare its variants with each other and with this machine's.
Python runs here; its heap is shared with the emulated process (`shared_heap.c`), so tensors are
worked on in place. Memory that is not of the heap, such as a mapped file, ends that process.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.huge_pages import HugePages
from tgi_cli.model.mapped_file import MappedFile

GUEST = "TGI_TEST_GUEST"  # the command that starts the guest, words separated by newlines


def words(argument: Any) -> int:
    """An argument of a C call as the integer that is passed."""
    if argument is None:
        return 0
    if isinstance(argument, ctypes.c_void_p):
        return argument.value or 0
    if isinstance(argument, int):
        return argument
    return ctypes.addressof(argument._obj)  # of byref


class Guest:
    """The emulated process; its attributes are the library's functions."""

    def __init__(self, command: list[str]) -> None:
        heap = ctypes.CDLL(None)
        heap.shared_heap_start.restype = heap.shared_heap_bytes.restype = ctypes.c_uint64
        file: int = heap.shared_heap_file()
        place = [str(file), hex(heap.shared_heap_start()), str(heap.shared_heap_bytes())]
        self._process = subprocess.Popen(
            [*command, *place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[file],
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        self.variants = self._out.readline().decode().strip().split(",")
        self._functions: dict[str, Function] = {}
        self._lock = threading.Lock()  # matrices are packed on several threads

    def __getattr__(self, name: str) -> Function:
        return self._functions.setdefault(name, Function(self, name))

    def call(self, name: str, arguments: tuple[Any, ...]) -> int:
        """Run a function and wait for what it returns."""
        kept = [ctypes.create_string_buffer(a) if isinstance(a, bytes) else a for a in arguments]
        values = [ctypes.addressof(a) if isinstance(a, ctypes.Array) else words(a) for a in kept]
        values += [0] * (5 - len(values))
        with self._lock:
            self._in.write(struct.pack("<24s5Q", name.encode(), *values))
            self._in.flush()
            reply = self._out.read(8)
        if len(reply) < 8:
            pytest.exit(f"the emulated process ended in {name}: {self._process.wait()}", 1)
        return int.from_bytes(reply, "little")


class Function:
    """One function of the guest; ctypes' declarations of its types are accepted and not needed."""

    def __init__(self, guest: Guest, name: str) -> None:
        self._guest, self._name = guest, name
        self.restype: Any = None
        self.argtypes: Any = None

    def __call__(self, *arguments: Any) -> int:
        return self._guest.call(self._name, arguments)


class Emulated(library.Library):
    """The guest's variants, best first, then those of the installed library."""

    def __init__(self, guest: Guest, installed: library.Library | None) -> None:
        self._dll = guest  # type: ignore[assignment]
        self._guest = guest
        self._installed = installed

    def variants(self) -> list[str]:
        return self._guest.variants + (self._installed.variants() if self._installed else [])

    def context(self, variant: str, num_threads: int) -> library.Context:
        if self._installed and variant in self._installed.variants():
            return self._installed.context(variant, num_threads)
        return super().context(variant, num_threads)


def plain_buffer(_: HugePages, nbytes: int) -> torch.Tensor:
    """Memory of the heap instead of pages mapped for this process alone."""
    return torch.zeros(nbytes, dtype=torch.uint8)


def copied(view: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Parts of a mapped file as tensors of the heap."""
    return lambda *arguments: view(*arguments).clone()


def pytest_configure() -> None:
    """Let tests that load the library find the emulated one."""
    made = Emulated(Guest(os.environ[GUEST].split("\n")), library.load())
    library.load = lambda: made
    HugePages.buffer = plain_buffer  # type: ignore[method-assign]
    MappedFile.view = copied(MappedFile.view)  # type: ignore[method-assign]
