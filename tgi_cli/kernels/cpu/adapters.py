"""Adapters as the native step program takes them: pointers by slot, layer and matrix.

Nothing is copied: the program reads the matrices that the Python composition multiplies. Built from
a decoder with adapters attached, whose tensors must outlive it.
"""

from __future__ import annotations

import ctypes
from typing import Any

from tgi_cli.kernels.cpu.library import LoraPart, LoraParts, pointer

_RUN = 16  # columns that lie together (`csrc/kernels.h`)
_TARGETS = ("qkv", "output", "gate_up", "down")  # LoraTarget in csrc/program.h


class AdapterTable:
    """`slots` is what `Program.adapters` points to; the first slot is "none"."""

    def __init__(self, decoder: Any) -> None:
        bank, num_layers = decoder.adapters, len(decoder.layers)
        self._bank = bank  # keeps the matrices
        self._kept: list[Any] = []
        count = len(bank.adapters)
        self.slots = (ctypes.POINTER(LoraParts) * (count + 1))()
        for slot in range(1, count + 1):
            matrices = (LoraParts * (num_layers * len(_TARGETS)))()
            for layer in range(num_layers):
                for index, target in enumerate(_TARGETS):
                    parts = self._parts(bank.parts(slot, layer, target), target)
                    matrices[layer * len(_TARGETS) + index] = LoraParts(parts, len(parts))
            self._kept.append(matrices)
            self.slots[slot] = ctypes.cast(matrices, ctypes.POINTER(LoraParts))

    def _parts(self, given: Any, target: str) -> Any:
        parts = (LoraPart * len(given))()
        for i, part in enumerate(given):
            first, stride = part.first, _RUN
            if target == "gate_up":  # 16 rows of gate, 16 of up
                first, stride = (_RUN if first else 0), 2 * _RUN
            rank, columns = part.b.shape
            parts[i] = LoraPart(
                pointer(part.a), pointer(part.b), rank, columns, first, stride, part.scale
            )
        self._kept.append(parts)
        return parts
