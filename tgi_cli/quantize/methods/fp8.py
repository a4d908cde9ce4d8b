"""FP8 (e4m3) weights with one scale for each output row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_cli.quantize.methods.matrix import QuantizedMatrix

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448

#: What `fit` multiplies the smallest scale without clipping by. Codes are relative, so a factor of
#: two changes nothing; between, a row's weights move within their powers of two.
_STRETCHES = tuple(2 ** (step / 16) for step in range(16))
_SPLIT = float(2**20 + 1)  # leaves four of float32's 24 significant bits
_FRACTION, _LEFT = 23, 7  # bits of float32's fraction, and those of them that bfloat16 keeps
_EXPONENT = 0xFF << _FRACTION
_CHUNK_ELEMENTS = 1 << 16  # rows are searched in parts that stay in the cache


@dataclass(frozen=True, slots=True)
class Fp8Grid:
    """The values of e4m3 times a scale for each row: `scales` [rows, 1] float32."""

    scales: Tensor

    @property
    def zeros(self) -> Tensor:
        """Zero is at zero."""
        return torch.zeros_like(self.scales)

    def rounded(self, values: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """See `gptq.Codebook.rounded`."""
        codes = round_e4m3(values / scales)
        return codes, codes * scales

    def nearest(self, weight: Tensor) -> QuantizedMatrix:
        """Round each element of [rows, columns] to the nearest value."""
        return self.matrix(weight / self.scales)

    def matrix(self, codes: Tensor) -> QuantizedMatrix:
        """The matrix of these codes, [rows, columns] float32."""
        return QuantizedMatrix(_cast(codes), self.scales, None, 8)


def fit(weight: Tensor) -> Fp8Grid:
    """Scales for [rows, columns] float32 that clip nothing, each with the least squared error.

    Values too small for e4m3 to hold in full count as if it did: they are nothing beside others.
    The search, not what is stored, sees weights rounded to bfloat16, as most are stored.
    """
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return Fp8Grid(torch.cat([_fit_rows(part) for part in torch.split(weight, step)]))


def _fit_rows(weight: Tensor) -> Tensor:
    # An error is a power of two squared times that of the significand, and bfloat16 has only 128
    # of these: each is tried once for a row, whatever its length.
    significands, energies = _significands(weight)
    smallest = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    best, least = smallest, torch.full_like(smallest, torch.inf)
    for stretch in _STRETCHES:
        scales = smallest * stretch
        # Dekker's splitting: the value that four significant bits leave is spread - rest.
        scaled = significands / scales
        spread = scaled * _SPLIT
        rest = spread - scaled
        moved = spread.sub_(rest).sub_(scaled)
        loss = torch.linalg.vecdot(moved.square_(), energies).unsqueeze(1) * scales.square()
        best = torch.where(loss < least, scales, best)
        least = torch.minimum(loss, least)
    return best


def _significands(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16's significands [128], 1 up to 2, and for each row what stands before them.

    That is [rows, 128]: the sum of the squared powers of two of the weights with a significand.
    """
    count = 1 << _LEFT
    bits = weight.contiguous().view(torch.int32) + (1 << (_FRACTION - _LEFT - 1))
    place = bits.bitwise_right_shift(_FRACTION - _LEFT).bitwise_and_(count - 1)
    powers = bits.bitwise_and_(_EXPONENT).view(torch.float32)
    energies = weight.new_zeros(len(weight), count)
    energies.scatter_add_(1, place.long(), powers.square_())
    return 1 + torch.arange(count, device=weight.device) / count, energies


def round_e4m3(values: Tensor) -> Tensor:
    """The nearest values of e4m3, in float32; what lies beyond them becomes the last."""
    return _cast(values).float()


def _cast(values: Tensor) -> Tensor:
    # torch's cast makes NaN of what lies beyond the range.
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
