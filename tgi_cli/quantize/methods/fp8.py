"""FP8 (e4m3) weights with one scale for each output row. No statistics needed."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.quantize.methods.matrix import QuantizedMatrix

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize_rows(weight: Tensor) -> QuantizedMatrix:
    """Round [rows, columns] so that each row's largest magnitude becomes 448; scales float32."""
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    # torch's cast makes NaN of what lies beyond the range.
    codes = (weight / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return QuantizedMatrix(codes, scales, None, 8)
