"""A linear layer: one `Weight` and an optional bias. Knows neither packing nor its role."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tgi_cli.kernels.ops import Ops
from tgi_cli.model.loader import Loader
from tgi_cli.quantize.formats.base import Weight


class Linear:
    """`x @ weight.T`; `BiasedLinear` adds a bias."""

    def __init__(self, ops: Ops, weight: Weight) -> None:
        self.ops = ops
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features]."""
        return self.weight.matmul(x, self.ops)


class BiasedLinear(Linear):
    """`x @ weight.T + bias`."""

    def __init__(self, ops: Ops, weight: Weight, bias: Tensor) -> None:
        super().__init__(ops, weight)
        self.bias = bias  # [out_features]

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features]."""
        return self.weight.matmul(x, self.ops).add_(self.bias)


def load_linear(
    loader: Loader,
    names: Sequence[str],
    out_features: Sequence[int],
    in_features: int,
    *,
    bias: bool,
) -> Linear:
    """Read `<name>.weight` (and `<name>.bias`) for each name and stack them along the output."""
    weight = loader.matrix([f"{name}.weight" for name in names], out_features, in_features)
    if not bias:
        return Linear(loader.ops, weight)
    biases = [
        loader.vector(f"{name}.bias", size, loader.dtype)
        for name, size in zip(names, out_features, strict=True)
    ]
    return BiasedLinear(loader.ops, weight, torch.cat(biases))
