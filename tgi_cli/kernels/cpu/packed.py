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

_STORE = {torch.float32: 0, torch.bfloat16: 1}  # Epilogue in csrc/kernels.h


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
        out = self._product(x, torch.bfloat16)
        return deinterleave(out.T).T if self.interleaved else out

    def matmul_float(self, x: Tensor) -> Tensor:
        """The same product without the last rounding: float32."""
        out = self._product(x, torch.float32)
        return deinterleave(out.T).T if self.interleaved else out

    def embed(self, token_ids: Tensor, scale: float) -> Tensor:
        """Rows of the matrix, scaled: [tokens] int64 -> [tokens, in_features] float32."""
        tokens, dim = len(token_ids), self.in_features
        out = torch.empty((tokens, dim))
        table, ids = pointer(self.data), pointer(token_ids)
        self._context.call("embed", Embed(table, ids, pointer(out), tokens, dim, scale, 1))
        return out

    def prepare(self, ops: Any, out: Tensor | None = None) -> PackedWeight:
        """Already prepared."""
        return self

    def dequantize(self) -> Tensor:
        """The dense matrix."""
        rows = self.data.permute(0, 2, 1, 3).reshape(-1, self.in_features)[: self.out_features]
        return deinterleave(rows) if self.interleaved else rows.contiguous()

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        tokens, n, k = x.shape[0], self.out_features, self.in_features
        out = torch.empty((tokens, n), dtype=dtype)
        data, epilogue = pointer(self.data), _STORE[dtype]
        self._context.call(
            "gemm", Gemm(pointer(x), data, None, pointer(out), tokens, n, k, k, n, epilogue)
        )
        return out


class PackedHead:
    """The output matrix, packed: logits leave it in float32."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] bf16 -> [n, vocab_size] float32."""
        return self.weight.matmul_float(hidden)


class PackedEmbedding:
    """The token table in the packed matrix of the head that is tied to it."""

    def __init__(self, weight: PackedWeight, scale: float | None) -> None:
        self.weight = weight
        self.scale = scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden_size] bf16."""
        return self.weight.embed(token_ids, self.scale or 1.0).bfloat16()
