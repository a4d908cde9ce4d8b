"""Packs matrices one by one while a model is read: on several threads, into lasting buffers.

What it is given may lie in a mapped file; nothing of it is needed once `pack` returns. With a store
that is filled already, nothing is read at all. Knows no roles and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tgi_cli.kernels.cpu.library import Context
from tgi_cli.kernels.cpu.packed import PackedWeight, matrix_bytes
from tgi_cli.kernels.cpu.weight_store import WeightStore
from tgi_cli.kernels.grouped import FloatRows, GroupedRows


class Packer:
    """Made by `Backend.packer`; `finish` must be called when the model is read.

    Args:
        context: kernels and number of threads. Packing uses threads of its own, because what comes
            before it (decoding a stored form, rounding) is torch's work.
        store: where buffers come from; None takes them from the process's own memory.
    """

    def __init__(self, context: Context, store: WeightStore | None = None) -> None:
        self.context = context
        self._store = store
        self._threads = ThreadPoolExecutor(context.num_threads, "tgi-pack")

    def pack(
        self, name: str, weight: GroupedRows | FloatRows, *, interleaved: bool = False
    ) -> PackedWeight:
        """Pack a matrix into the buffer `name`.

        Args:
            name: of the buffer; one matrix each.
            weight: [out_features, in_features] in a scheme, or floats that are rounded to bf16.
            interleaved: see `packed.interleave`.
        """
        grouped = weight if isinstance(weight, GroupedRows) else None
        rows: Callable[[int, int], Any]
        if grouped is not None:
            scheme, wide, rows = grouped.scheme, grouped.wide_activations, grouped.rows
            order = grouped.order
        else:
            assert isinstance(weight, FloatRows)
            scheme, wide, rows, order = None, False, weight.float_rows, None
        shape = (weight.out_features, weight.in_features)
        made = PackedWeight.empty(
            self.context,
            shape,
            scheme,
            interleaved=interleaved,
            wide_activations=wide,
            order=order,
            data=self._buffer(name, matrix_bytes(scheme, *shape)),
        )
        if not self._filled:
            self._spread(lambda part: made.fill(rows, *part), made.parts())
        return made

    def rows(self, name: str, table: Tensor) -> Tensor:
        """Keep a table that is looked up by rows, in bf16."""
        kept = self._buffer(name, 2 * table.numel())
        out = kept.view(torch.bfloat16).view(table.shape)
        if not self._filled:
            out.copy_(table)
        return out

    def finish(self) -> None:
        """End the threads; the buffers are complete."""
        self._threads.shutdown()
        if self._store is not None:
            self._store.finish()

    @property
    def _filled(self) -> bool:
        return self._store is not None and self._store.filled

    def _buffer(self, name: str, nbytes: int) -> Tensor:
        if self._store is None:
            return self.context.buffer(nbytes)
        return self._store.buffer(name, nbytes)

    def _spread(
        self, work: Callable[[tuple[int, int]], None], parts: Iterable[tuple[int, int]]
    ) -> None:
        for _ in self._threads.map(work, parts):
            pass
