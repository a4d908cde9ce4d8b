"""NF4, FP4, MXFP4: 4-bit codes that are looked up in a table and scaled by blocks.

Blocks run along the inputs of one output; bitsandbytes lets them run over the end of a row. Knows
no names of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import Grouped, GroupScheme
from tgi_cli.quantize.formats.packed import finite

#: The values of a 4-bit float with two bits of exponent and one of mantissa (OCP MX, E2M1).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class TableMatrix:
    """A stored matrix of table indices (see `packed.StoredMatrix`).

    Args:
        key: the tensor of scales, for errors.
        shape: outputs and inputs; the inputs are even.
        packed: uint8, two codes in a byte, row after row.
        table: [16] float32.
        scales: float32, one for each `block` codes, row after row.
        block: codes that share a scale.
        high_first: the upper half of a byte comes first.
    """

    scheme: GroupScheme | None = None

    def __init__(
        self,
        key: str,
        shape: tuple[int, int],
        packed: Tensor,
        table: Tensor,
        scales: Tensor,
        block: int,
        *,
        high_first: bool,
    ) -> None:
        self.key = key
        self.out_features, self.in_features = shape
        self.nbytes = packed.nbytes + scales.nbytes
        self.table, self.scales = table, scales.flatten()
        self._bytes = packed.reshape(self.out_features, -1)
        self._block = block
        self._high_first = high_first
        # Blocks that cross the ends of rows have no kernel, so they may be cut anywhere.
        self.group = 1 if self.in_features % block else block

    def decode(self, start: int, end: int) -> Tensor:
        """Rows in float32."""
        packed = self._bytes[start:end]
        halves = (packed >> 4, packed & 15) if self._high_first else (packed & 15, packed >> 4)
        codes = torch.stack(halves, dim=-1).flatten()
        values = self.table.index_select(0, codes.int())
        first = start * self.in_features
        blocks = torch.arange(first // self._block, -(-end * self.in_features // self._block))
        scales = finite(self.key, self.scales[blocks]).repeat_interleave(self._block)
        values *= scales[first % self._block :][: len(values)]
        return values.view(end - start, self.in_features)

    def rows(self, start: int, end: int) -> Grouped:
        """No scheme holds such codes."""
        raise ValueError("a matrix of table indices has no groups of integers")
