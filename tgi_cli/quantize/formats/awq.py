"""AWQ checkpoints of the GEMM kind, as AutoAWQ and GPTQModel write them.

`qweight` int32 [inputs, outputs / 8] holds eight outputs in a word, in the order 0 2 4 6 1 3 5 7;
`qzeros` int32 [groups, outputs / 8] likewise, zero points as they are; `scales` [groups, outputs].
Scales of activations are folded into the layers before, so nothing else is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgi_cli.quantize.formats.affine import AffineMatrix
from tgi_cli.quantize.formats.base import TensorSource
from tgi_cli.quantize.formats.bit_packing import unpack
from tgi_cli.quantize.formats.packed import PackedFormat, tensor, wrong
from tgi_cli.quantize.formats.settings import Settings

#: Where in a word each of eight outputs lies.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_WORD = 8  # outputs
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class AwqFormat(PackedFormat):
    """Made from a `quantization_config`, also one with the older keys `w_bit`, `q_group_size`.

    Raises:
        UnsupportedModel: other bits, another version, or no zero points.
    """

    name = "awq"
    endings = (".qweight", ".qzeros", ".scales")
    marks = (".qweight",)

    def __init__(self, config: dict[str, Any]) -> None:
        settings = Settings(config)
        bits = settings.integer("bits", "w_bit")
        if bits != 4:
            raise settings.refused("bits", bits, [4])
        version = settings.text("version") or settings.text("format") or "gemm"
        if version not in ("gemm", "awq"):
            raise settings.refused("version", version, ["gemm"])
        if not settings.flag("zero_point", True):
            raise settings.refused("zero_point", False, [True])
        self._group = settings.integer("group_size", "q_group_size", default=128)

    def stored(self, source: TensorSource, key: str) -> AwqMatrix:
        """See `PackedFormat.stored`."""
        stem = self.stem(key)
        codes = tensor(source, stem + ".qweight", torch.int32)
        if codes.dim() != 2:
            raise wrong(stem + ".qweight", f"has shape {tuple(codes.shape)}, but is to be a matrix")
        inputs, width = codes.shape
        size = self._group if self._group > 0 else inputs
        groups = -(-inputs // size)
        scales = tensor(source, stem + ".scales", _SCALES, (groups, width * _WORD))
        zeros = tensor(source, stem + ".qzeros", torch.int32, (groups, width))
        return AwqMatrix(stem, codes, scales, zeros, size)


class AwqMatrix(AffineMatrix):
    """One matrix: codes int32 [inputs, outputs / 8], scales [groups, outputs]."""

    def __init__(self, stem: str, codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> None:
        shape = (scales.shape[1], codes.shape[0])
        super().__init__(stem + ".scales", shape, 4, group, symmetric=False, scale=scales.dtype)
        self._codes, self._scales, self._zeros = codes, scales, zeros

    def codes(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.codes`."""
        return _outputs(self._codes, start, end)

    def scales(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.scales`."""
        return self._scales[:, start:end].T

    def zeros(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.zeros`."""
        return _outputs(self._zeros, start, end)


def _outputs(words: Tensor, start: int, end: int) -> Tensor:
    """Unpack some outputs: int32 [n, outputs / 8] -> uint8 [end - start, n]."""
    first, last = start // _WORD, -(-end // _WORD)
    fields = unpack(words[:, first:last], 4).view(len(words), -1, _WORD)[..., list(ORDER)]
    return fields.flatten(1)[:, start - first * _WORD : end - first * _WORD].T.contiguous()
