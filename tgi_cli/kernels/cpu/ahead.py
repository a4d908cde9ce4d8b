"""Decode steps of a fixed set of rows, the next of which runs while Python deals with the last.

On few cores Python between two steps leaves memory idle, which bounds the steps; one core alone
draws most of what both do. So one thread goes on with the tokens it has drawn, and the others join
it when the caller waits. Knows neither who the rows are nor whether they go on.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
from numpy.typing import NDArray

from tgi_cli.kernels.cpu.library import Context, Program, StepInput
from tgi_cli.kernels.cpu.sampling import Sampling


class AheadStart(ctypes.Structure):
    """See `csrc/ahead.h`."""

    _fields_ = (
        ("program", ctypes.POINTER(Program)),
        ("step", ctypes.POINTER(StepInput)),
        ("sampling", ctypes.POINTER(Sampling)),
        ("tokens", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("steps", ctypes.c_int64),
    )


class StepsAhead:
    """Steps of one context at a time; whatever else it is called for ends them.

    Args:
        context: whose threads compute.
    """

    def __init__(self, context: Context) -> None:
        self._functions, self._handle = context.functions, context.handle
        self.settle = context.settle
        self._kept: tuple[object, ...] = ()
        self._ids = np.zeros(0, np.int64)
        self._valid = np.zeros(0, np.bool_)
        self._addresses = (0, 0)
        # What the steps read and write must outlive them.
        weakref.finalize(self, context.settle)

    def start(
        self,
        program: Program,
        step: StepInput,
        sampling: Sampling,
        *,
        groups: int,
        steps: int,
        kept: tuple[object, ...],
    ) -> None:
        """Begin with `step`, drawing as `sampling` says, and go on until `steps` are computed.

        Args:
            program: of the decoder.
            step: one token of each sequence, and the logits of each.
            sampling: of these logits; its `tokens` are written.
            groups: KV groups.
            steps: see `want`.
            kept: what owns the memory that all of these point to.
        """
        count = step.seqs
        self._ids, self._valid = np.zeros(count, np.int64), np.zeros(count, np.bool_)
        self._addresses = (self._ids.ctypes.data, self._valid.ctypes.data)
        start = AheadStart(
            program=ctypes.pointer(program),
            step=ctypes.pointer(step),
            sampling=ctypes.pointer(sampling),
            tokens=sampling.tokens,
            groups=groups,
            steps=steps,
        )
        self.settle()  # before what they may read is let go
        self._kept = (program, *kept)
        self._functions.tgi_ahead_start(self._handle, ctypes.byref(start))

    def want(self, steps: int) -> None:
        """Have so many steps computed since the start.

        At most one more than were finished is begun before its turn: none, if there is one thread.
        """
        self._functions.tgi_ahead_want(self._handle, ctypes.c_int64(steps))

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Wait for the next wanted step: token ids [n] and whether each means anything.

        The arrays are used again by the next call.

        Raises:
            RuntimeError: the steps were ended before it was computed.
        """
        if not self._functions.tgi_ahead_finish(self._handle, *self._addresses):
            raise RuntimeError("a step was waited for that had been given up")
        return self._ids, self._valid
