"""Linear layers: one `Weight` and an optional bias. They know neither packing nor their role.

With several ranks a layer is cut along its outputs, and gives its rank's part of them, or along its
inputs, and gives the sum over all ranks (column- and row-parallel in Megatron's words).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.ops import Ops
from tgi_cli.model.batch import Batch
from tgi_cli.model.loader import Loader
from tgi_cli.quantize.formats.base import Weight


class Linear:
    """`x @ weight.T`; `BiasedLinear` adds a bias."""

    def __init__(self, ops: Ops, weight: Weight) -> None:
        self.ops = ops
        self.weight = weight

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features]; `batch` is what they are of."""
        return self.weight.matmul(x, self.ops)


class BiasedLinear(Linear):
    """`x @ weight.T + bias`."""

    def __init__(self, ops: Ops, weight: Weight, bias: Tensor) -> None:
        super().__init__(ops, weight)
        self.bias = bias  # [out_features]

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """See `Linear.forward`."""
        return self.weight.matmul(x, self.ops).add_(self.bias)


class WrappedLinear(Linear):
    """A linear layer around another, whose weight and bias are its own."""

    def __init__(self, part: Linear) -> None:
        self.part = part
        super().__init__(part.ops, part.weight)

    @property
    def weight(self) -> Weight:
        """[out_features, in_features], or a rank's part of it."""
        return self.part.weight

    @weight.setter
    def weight(self, weight: Weight) -> None:
        self.part.weight = weight

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        return getattr(self.part, "bias", None)


class SummedLinear(WrappedLinear):
    """`x @ weight.T + bias`, where every rank has some of the inputs; one adds the bias."""

    def __init__(self, part: Linear, collective: Collective) -> None:
        super().__init__(part)
        self.collective = collective

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """[tokens, its in_features] -> [tokens, out_features]."""
        return self.collective.all_reduce(self.part.forward(x, batch))


def load_summed_linear(
    loader: Loader, name: str, out_features: int, in_features: int, *, bias: bool
) -> Linear:
    """Read `<name>.weight` (and `<name>.bias`), cut along the inputs where there are ranks."""
    if loader.partition.world_size == 1:
        return load_linear(loader, [name], [out_features], in_features, bias=bias)
    own = bias and loader.partition.first
    if bias and not own:
        loader.skip(f"{name}.bias")
    part = load_linear(loader, [name], [out_features], in_features, bias=own)
    return SummedLinear(part, loader.collective)


def load_linear(
    loader: Loader,
    names: Sequence[str],
    out_features: Sequence[int],
    in_features: int,
    *,
    bias: bool,
    gated: bool = False,
) -> Linear:
    """Read `<name>.weight` (and `<name>.bias`) for each name and stack them along the output.

    See `Loader.matrix` for `gated`.
    """
    stored = [f"{name}.weight" for name in names]
    weight = loader.matrix(stored, out_features, in_features, gated=gated)
    if not bias:
        return Linear(loader.ops, weight)
    biases = [
        loader.vector(f"{name}.bias", size, loader.dtype)
        for name, size in zip(names, out_features, strict=True)
    ]
    return BiasedLinear(loader.ops, weight, torch.cat(biases))
