"""NF4, FP4, MXFP4: 4-bit codes that are looked up in a table and scaled by blocks.

Blocks run along the inputs of one output; bitsandbytes lets them run over the end of a row. Knows
no names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import TABLES, Grouped, GroupScheme, wide
from tgi_cli.quantize.formats.packed import RUN, finite


class TableMatrix:
    """A stored matrix of table indices (see `packed.StoredMatrix`).

    Args:
        key: the tensor of scales, for errors.
        shape: outputs and inputs; the inputs are even.
        packed: uint8, two codes in a byte, row after row.
        table: [16] float32, or the name of one of `kernels.grouped.TABLES`.
        scales: gives those of some blocks, from one up to another, in float32; blocks are counted
            row after row. Asked when rows are, as they may have to be decoded themselves.
        block: codes that share a scale.
        high_first: the upper half of a byte comes first.
        scheme: what a kernel may hold the matrix in, if not with scales in float32; it must have
            room for all of them.
    """

    def __init__(
        self,
        key: str,
        shape: tuple[int, int],
        packed: Tensor,
        table: Tensor | str,
        scales: Callable[[int, int], Tensor],
        block: int,
        *,
        high_first: bool,
        scheme: GroupScheme | None = None,
    ) -> None:
        self.key = key
        self.out_features, self.in_features = shape
        named = table if isinstance(table, str) else _name_of(table)
        self.table = torch.tensor(TABLES[table]) if isinstance(table, str) else table
        self._scales = scales
        self._bytes = packed.reshape(self.out_features, -1)
        self._block = block
        self._high_first = high_first
        # Blocks that cross the ends of rows have no kernel, so they may be cut anywhere.
        whole = self.in_features % block == 0
        self.group = block if whole else 1
        self.scheme: GroupScheme | None = None
        self.order: Tensor | None = None
        if whole and block % RUN == 0 and named is not None:
            self.scheme = scheme or wide(4, block, codes=named)
        scale = torch.float32 if self.scheme is None else self.scheme.scale
        blocks = self.out_features * self.in_features // block
        self.nbytes = packed.nbytes + blocks * scale.itemsize

    def decode(self, start: int, end: int) -> Tensor:
        """Rows in float32."""
        values = self.table.index_select(0, self._codes(start, end).flatten().int())
        first = start * self.in_features
        scales = self._scales(first // self._block, -(-end * self.in_features // self._block))
        scales = finite(self.key, scales).repeat_interleave(self._block)
        values *= scales[first % self._block :][: len(values)]
        return values.view(end - start, self.in_features)

    def rows(self, start: int, end: int) -> Grouped:
        """The same rows in `scheme`."""
        assert self.scheme is not None
        blocks = self.in_features // self._block
        scales = finite(self.key, self._scales(start * blocks, end * blocks))
        scales = scales.view(end - start, blocks).to(self.scheme.scale)
        return Grouped(self._codes(start, end), scales)

    def _codes(self, start: int, end: int) -> Tensor:
        """uint8 [rows, in_features]."""
        packed = self._bytes[start:end]
        halves = (packed >> 4, packed & 15) if self._high_first else (packed & 15, packed >> 4)
        return torch.stack(halves, dim=-1).flatten(1)


def _name_of(table: Tensor) -> str | None:
    """The name of the table that kernels know by one, if this is it."""
    for name, values in TABLES.items():
        if torch.equal(table, torch.tensor(values)):
            return name
    return None
