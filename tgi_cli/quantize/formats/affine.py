"""Integer codes with a scale, and perhaps a zero point, for each group of inputs of an output.

GPTQ, AWQ and the integer forms of compressed-tensors are all this: `(code - zero) * scale`. Here
they meet and are given in a scheme that kernels multiply. Knows no layout of any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import INT4, INT8, Grouped, GroupScheme, wide
from tgi_cli.quantize.formats.packed import RUN, finite


class AffineMatrix(ABC):
    """A stored matrix of unsigned codes of `bits` (see `packed.StoredMatrix`).

    Args:
        key: the tensor of scales, for errors.
        shape: outputs and inputs.
        bits: of a code, 2 to 8.
        group: inputs that share a scale; the last group may be shorter.
        symmetric: every zero point is the middle code, and `zeros` is never asked.
        scale: dtype of the scales.
        index: group of every input where they are not in order (act-order), else None.
    """

    def __init__(
        self,
        key: str,
        shape: tuple[int, int],
        bits: int,
        group: int,
        *,
        symmetric: bool,
        scale: torch.dtype,
        index: Tensor | None = None,
    ) -> None:
        self.key = key
        self.out_features, self.in_features = shape
        self.bits = bits
        self.symmetric = symmetric
        self.nbytes = self.out_features * self.in_features * bits // 8
        self._size = group
        self._index = index
        # Inputs out of order, or one scale for all of them: any cut leaves whole groups.
        free = index is not None or group >= self.in_features
        self.group = 1 if free else group
        self.order = None if index is None else torch.argsort(index, stable=True)
        self.scheme = None if self._uneven() else self._fitting(scale)

    @abstractmethod
    def codes(self, start: int, end: int) -> Tensor:
        """Codes of these outputs: uint8 [rows, in_features]."""

    @abstractmethod
    def scales(self, start: int, end: int) -> Tensor:
        """Scales of these outputs: [rows, groups], in a float dtype."""

    @abstractmethod
    def zeros(self, start: int, end: int) -> Tensor:
        """Zero points of these outputs: [rows, groups] integers."""

    def decode(self, start: int, end: int) -> Tensor:
        """Rows in float32."""
        codes, scales = (
            self.codes(start, end).float(),
            finite(self.key, self.scales(start, end)).float(),
        )
        index = self._index
        if index is None:
            index = torch.arange(self.in_features) // self._size
        if self.symmetric:
            codes -= 1 << (self.bits - 1)
        else:
            codes -= self.zeros(start, end).float()[:, index]
        return codes.mul_(scales[:, index])

    def rows(self, start: int, end: int) -> Grouped:
        """Rows in `scheme`, zero points as minima.

        With act-order the inputs are sorted by group. Scales are repeated where a short last
        group makes the scheme's groups smaller. A minimum is `-zero * scale` in float32, exact for
        products of half-precision scales and codes.
        """
        scheme = self.scheme
        assert scheme is not None
        codes, scales = self.codes(start, end), finite(self.key, self.scales(start, end))
        if self.order is not None:
            codes = codes[:, self.order]
        minima = None
        if scheme.minimum:
            middle = 1 << (self.bits - 1)
            zeros = middle if self.symmetric else self.zeros(start, end).float()
            minima = self._spread(-scales.float() * zeros, scheme)
        elif scheme.bits > self.bits:
            codes += (1 << (scheme.bits - 1)) - (1 << (self.bits - 1))
        return Grouped(codes, self._spread(scales.to(scheme.scale), scheme), minima)

    def _uneven(self) -> bool:
        """Whether inputs that are sorted by group are no groups of one size."""
        if self._index is None:
            return False
        sizes = torch.bincount(self._index)
        return bool((sizes != self._size).any())

    def _fitting(self, scale: torch.dtype) -> GroupScheme | None:
        group = self._size if self.in_features % self._size == 0 else RUN
        if self._size % RUN and self._size < self.in_features:
            return None  # groups begin inside a run
        if self.in_features % RUN:
            return None
        group = min(group, self.in_features)
        if self.symmetric and scale == torch.float16 and group == RUN:
            return INT4 if self.bits <= 4 else INT8
        return wide(4 if self.bits <= 4 else 8, group, minimum=not self.symmetric)

    def _spread(self, values: Tensor, scheme: GroupScheme) -> Tensor:
        """[rows, stored groups] -> [rows, groups of the scheme]."""
        groups = self.in_features // scheme.group
        times = -(-self._size // scheme.group)
        return values.repeat_interleave(times, dim=1)[:, :groups]
