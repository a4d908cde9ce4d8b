"""MXFP4: 4-bit floats in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0).

As gpt-oss stores a matrix: `X_blocks` uint8 [outputs, inputs / 32, 16], two codes in a byte, lower
half first, and `X_scales` uint8 [outputs, inputs / 32], exponents with a bias of 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import MXFP4
from tgi_cli.quantize.formats.base import TensorSource
from tgi_cli.quantize.formats.packed import PackedFormat, tensor, wrong
from tgi_cli.quantize.formats.table import TableMatrix

BLOCK = 32


class Mxfp4Format(PackedFormat):
    """Matrices are told by their names; the `quantization_config` lists those that are plain."""

    name = "mxfp4"
    endings = ("_blocks", "_scales")
    marks = ("_blocks",)

    def stored(self, source: TensorSource, key: str) -> TableMatrix:
        """See `PackedFormat.stored`."""
        stem = self.stem(key)
        blocks = tensor(source, stem + "_blocks", torch.uint8)
        if blocks.dim() != 3 or blocks.shape[2] * 2 != BLOCK:
            raise wrong(stem + "_blocks", f"has shape {tuple(blocks.shape)}, not [n, groups, 16]")
        rows, groups, _ = blocks.shape
        scales = tensor(source, stem + "_scales", torch.uint8, (rows, groups))
        return mxfp4_matrix(stem + "_scales", blocks.flatten(1), scales)


def mxfp4_matrix(key: str, packed: Tensor, exponents: Tensor) -> TableMatrix:
    """A matrix of codes [outputs, inputs / 2] and biased exponents [outputs, inputs / 32]."""
    shape = (packed.shape[0], packed.shape[1] * 2)
    biased = exponents.flatten()

    def scales(first: int, last: int) -> Tensor:
        # 255 is no number; here it becomes infinite, which is refused.
        return torch.ldexp(torch.ones(last - first), biased[first:last].int() - 127)

    return TableMatrix(key, shape, packed, "e2m1", scales, BLOCK, high_first=False, scheme=MXFP4)
