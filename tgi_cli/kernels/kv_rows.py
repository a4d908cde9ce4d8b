"""How keys and values are cached: number types by name, and rows as a cache holds them.

A row is one head of one token. Floats of 16 and 32 bits are rounded to the type. In 8 bits a row
has a float32 scale of its own behind its codes, so that nothing saturates and a row depends on
nothing but itself. Native kernels keep the same codes and scales, in an order of their own, in the
same number of bytes. Knows no blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Every type by the name that users give and see.
KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
#: vLLM's and TGI's other names.
KV_ALIASES = {"fp8": "fp8_e4m3", "fp8_e4m3fn": "fp8_e4m3"}

_SCALE_BYTES = 4
_SMALLEST = torch.finfo(torch.float32).tiny


def kv_dtype_name(dtype: torch.dtype) -> str:
    """The name of a type in `KV_DTYPES`."""
    return next(name for name, each in KV_DTYPES.items() if each == dtype)


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a cached row: `head_dim`, and in 8 bits four bytes of scale."""
    return head_dim + (_SCALE_BYTES if dtype.itemsize == 1 else 0)


def encode(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Round [..., head_dim] to [..., row_width] of `dtype`.

    In 8 bits the scale takes the largest magnitude to the largest code; codes are rounded to even
    on ties, and those below the smallest normal of an 8-bit float are zero. A row that is not
    finite gets a scale that is NaN.
    """
    if dtype.itemsize > 1:
        return rows.to(dtype)
    wide = rows.float()
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # By a tensor: CUDA multiplies by the inverse of a plain number, whose last bit may differ.
    divisor = wide.new_full((), largest)
    scale = (wide.abs().amax(-1, keepdim=True) / divisor).clamp(min=_SMALLEST)
    scaled = wide / scale
    scale = scale + (wide * 0).sum(-1, keepdim=True)
    if dtype == torch.int8:
        codes = scaled.round().to(dtype)
    else:
        codes = scaled.to(dtype)
        magnitudes = codes.float().abs()
        codes = torch.where(magnitudes < torch.finfo(dtype).tiny, 0.0, codes.float()).to(dtype)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1).view(dtype)


def decode(rows: Tensor, head_dim: int) -> Tensor:
    """What contiguous cached rows [..., row_width] stand for: [..., head_dim] float32."""
    if rows.dtype.itemsize > 1:
        return rows.float()
    scale = rows[..., head_dim:].contiguous().view(torch.float32)
    return rows[..., :head_dim].float() * scale
