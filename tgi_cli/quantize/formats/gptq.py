"""GPTQ checkpoints, as GPTQModel, AutoGPTQ, optimum and auto-round write them.

Codes are packed along the inputs and lie transposed: `qweight` int32 [inputs * bits / 32,
outputs], `scales` [groups, outputs], `qzeros` int32 [groups, outputs * bits / 32], `g_idx` int32
[inputs], the group of each input. Version 1 stores zero points minus one, version 2 as they are.
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

_BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class GptqFormat(PackedFormat):
    """Made from a `quantization_config`.

    Raises:
        UnsupportedModel: other bits or another version of the format.
    """

    name = "gptq"
    endings = (".qweight", ".qzeros", ".scales", ".g_idx")
    marks = (".qweight",)

    def __init__(self, config: dict[str, Any]) -> None:
        settings = Settings(config)
        self._bits = settings.integer("bits")
        if self._bits not in _BITS:
            raise settings.refused("bits", self._bits, _BITS)
        version = settings.text("checkpoint_format") or settings.text("format") or "gptq"
        if version not in _VERSIONS:
            raise settings.refused("checkpoint_format", version, _VERSIONS)
        self._version = 2 if version == "gptq_v2" else 1
        self._group = settings.integer("group_size", default=-1)
        self._symmetric = settings.flag("sym", False)

    def stored(self, source: TensorSource, key: str) -> GptqMatrix:
        """See `PackedFormat.stored`."""
        stem, bits = self.stem(key), self._bits
        codes = tensor(source, stem + ".qweight", torch.int32)
        if codes.dim() != 2 or codes.shape[0] * 32 % bits:
            raise wrong(stem + ".qweight", f"has shape {tuple(codes.shape)}, no {bits}-bit matrix")
        inputs, outputs = codes.shape[0] * 32 // bits, codes.shape[1]
        size = self._group if self._group > 0 else inputs
        groups = -(-inputs // size)
        scales = tensor(source, stem + ".scales", _SCALES, (groups, outputs))
        width = -(-outputs * bits // 32)
        zeros = tensor(source, stem + ".qzeros", torch.int32, (groups, width))
        index = None
        if stem + ".g_idx" in source:
            index = tensor(source, stem + ".g_idx", (torch.int32, torch.int64), (inputs,))
            index = self._order(stem + ".g_idx", index.long(), size, groups)
        return GptqMatrix(stem, codes, scales, self._zeros(zeros), (bits, size), index)

    def _order(self, key: str, index: Tensor, size: int, groups: int) -> Tensor | None:
        """Groups of the inputs if they are out of order; None for the plain order."""
        if torch.equal(index, torch.arange(len(index)) // size):
            return None
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise wrong(key, f"names a group outside 0 to {groups - 1}")
        return index

    def _zeros(self, words: Tensor) -> Tensor | None:
        """Words of zero points as version 2 stores them; None if all are the middle code."""
        if self._bits == 3:
            return self._zeros_of_three(words)
        ones = _word(sum(1 << shift for shift in range(0, 32, self._bits)))
        middle = _word((1 << (self._bits - 1)) * ones)
        # What is symmetric has no other zero point, so there is no doubt about the version.
        if self._symmetric and bool(((words == middle) | (words == _word(middle - ones))).all()):
            return None
        # Added to whole words, so that a zero point of 0, which borrowed from the next, is right.
        words = words if self._version == 2 else words + ones
        return None if bool((words == middle).all()) else words

    def _zeros_of_three(self, words: Tensor) -> Tensor | None:
        zeros = unpack(words, 3)
        zeros = zeros if self._version == 2 else (zeros + 1) & 7
        if bool((zeros == 4).all()):
            return None
        return zeros


class GptqMatrix(AffineMatrix):
    """One matrix: codes int32 [inputs * bits / 32, outputs], scales [groups, outputs].

    `zeros` are words like those of version 2, for 3 bits the zero points themselves.
    """

    def __init__(
        self,
        stem: str,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        form: tuple[int, int],
        index: Tensor | None,
    ) -> None:
        bits, group = form
        shape = (codes.shape[1], codes.shape[0] * 32 // bits)
        super().__init__(
            stem + ".scales",
            shape,
            bits,
            group,
            symmetric=zeros is None,
            scale=scales.dtype,
            index=index,
        )
        self._codes, self._scales, self._zeros = codes, scales, zeros

    def codes(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.codes`."""
        return unpack(self._codes[:, start:end].T, self.bits)

    def scales(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.scales`."""
        return self._scales[:, start:end].T

    def zeros(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.zeros`."""
        assert self._zeros is not None
        zeros = self._zeros if self.bits == 3 else unpack(self._zeros, self.bits)
        return zeros[:, start:end].T


def _word(value: int) -> int:
    """A 32-bit pattern as the signed number that int32 tensors hold."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
