"""Matrices repacked for the native kernels, behind the same calls as the dense ones.

A packed matrix still multiplies by itself, so the Python composition runs on it too, and can give
back the dense matrix it stands for. Knows no roles; the interleaving of gate and up is an order of
rows that `dequantize` and `matmul` undo.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgi_cli.kernels.cpu.library import PANEL, Context, Embed, Gemm, pointer

_STORE_BF16 = 1


def panels(rows: int) -> int:
    """Number of panels for so many output features."""
    return -(-rows // PANEL)


def interleave(rows: Tensor) -> Tensor:
    """[2n, ...] gate then up -> alternating runs of 16 gate rows and 16 up rows."""
    gate, up = rows.chunk(2)
    shape = (-1, PANEL // 2, *rows.shape[1:])
    return torch.stack([gate.reshape(shape), up.reshape(shape)], dim=1).reshape(rows.shape)


def deinterleave(rows: Tensor) -> Tensor:
    """Undo `interleave`."""
    pairs = rows.reshape(-1, 2, PANEL // 2, *rows.shape[1:])
    return torch.cat([pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1)])


class PackedWeight:
    """A bf16 matrix in panels of 32 outputs: [panels, in_features / 2, 32, 2]."""

    def __init__(self, context: Context, weight: Tensor, *, interleaved: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.interleaved = interleaved
        self._context = context
        rows = interleave(weight) if interleaved else weight
        shape = (panels(self.out_features), self.in_features // 2, PANEL, 2)
        self.data = torch.empty(shape, dtype=torch.bfloat16)
        context.pack(rows.contiguous(), self.data)
        self.nbytes = self.data.numel() * 2

    def matmul(self, x: Tensor, ops: Any) -> Tensor:
        """[tokens, in_features] bf16 -> [tokens, out_features] bf16."""
        x = x.contiguous()
        tokens = x.shape[0]
        out = torch.empty((tokens, self.out_features), dtype=torch.bfloat16)
        n, k = self.out_features, self.in_features
        self._context.call(
            "gemm",
            Gemm(
                pointer(x), pointer(self.data), None, pointer(out), tokens, n, k, k, n, _STORE_BF16
            ),
        )
        return deinterleave(out.T).T if self.interleaved else out

    def prepare(self, ops: Any, out: Tensor | None = None) -> PackedWeight:
        """Already prepared."""
        return self

    def dequantize(self) -> Tensor:
        """The dense matrix."""
        rows = self.data.permute(0, 2, 1, 3).reshape(-1, self.in_features)[: self.out_features]
        return deinterleave(rows) if self.interleaved else rows.contiguous()


class PackedEnds:
    """Token table and head in one packed matrix: both ends of a decoder that ties them."""

    def __init__(self, context: Context, table: Tensor, scale: float | None) -> None:
        self.weight = PackedWeight(context, table)
        self.scale = 1.0 if scale is None else scale
        self._context = context

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden_size] bf16."""
        tokens, dim = len(token_ids), self.weight.in_features
        out = torch.empty((tokens, dim))
        table, ids = pointer(self.weight.data), pointer(token_ids)
        self._context.call("embed", Embed(table, ids, pointer(out), tokens, dim, self.scale, 1))
        return out.bfloat16()

    def project(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size] bf16."""
        return self.weight.matmul(hidden, None)
