"""Activations rounded row by row while the model runs, as servers do for 8-bit matrices.

The conversion computes with them, so that what it measures is what a server will compute.
"""

from __future__ import annotations

from torch import Tensor

from tgi_cli.quantize.methods.fp8 import LARGEST, round_e4m3


def round_int8(rows: Tensor) -> Tensor:
    """Each row of [n, columns] to whole multiples of its largest magnitude / 127."""
    scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scales).round_().mul_(scales)


def round_fp8(rows: Tensor) -> Tensor:
    """Each row of [n, columns] to e4m3, scaled so that its largest magnitude is 448."""
    scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return round_e4m3(rows / scales).mul_(scales)
