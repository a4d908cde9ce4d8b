"""Cached rows in the native kernels' order: what `csrc/kv_forms.inc.h` describes, in Python."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.cpu.library import BLOCK


def native_blocks(rows: Tensor, head_dim: int, *, keys: bool) -> Tensor:
    """[blocks * BLOCK, heads, row_width] of `kv_rows.encode` to bytes [blocks, heads, n]."""
    pair = 2 if rows.dtype.itemsize == 1 or rows.dtype == torch.bfloat16 else 1
    heads = rows.shape[1]
    codes = rows[..., :head_dim].contiguous()
    if codes.dtype.itemsize == 1:
        codes = codes.view(torch.uint8)
    if keys:
        codes = codes.view(-1, BLOCK, heads, head_dim // pair, pair).permute(0, 2, 3, 1, 4)
    else:
        codes = codes.view(-1, BLOCK // pair, pair, heads, head_dim).permute(0, 3, 1, 4, 2)
    blocks = codes.reshape(len(codes), heads, -1).view(torch.uint8)
    if rows.dtype.itemsize > 1:
        return blocks
    scales = rows[..., head_dim:].contiguous().view(torch.uint8).view(-1, BLOCK, heads, 4)
    return torch.cat([blocks, scales.transpose(1, 2).flatten(2)], dim=-1)
