"""Low-rank adapters on a built decoder: which of them a row has is said by the batch.

An adapter (LoRA; Hu et al., 2021) adds the product of two thin matrices to linear layers. Several
lie beside one decoder, each in a numbered slot, and the rows of one batch may have different ones.
Knows neither files nor names: `adapter_files` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tgi_cli.model.batch import Batch
from tgi_cli.model.layer import Layer
from tgi_cli.model.linear import Linear, SummedLinear, WrappedLinear

#: The linear layers of a decoder layer; q, k and v are one, and so are gate and up.
Target = Literal["qkv", "output", "gate_up", "down"]
TARGETS: tuple[Target, ...] = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scale * (x @ a.T) @ b`, added to the outputs from `first` on of a linear layer."""

    a: Tensor  # [rank, in_features]
    b: Tensor  # [rank, some of out_features], contiguous
    scale: float
    first: int

    @property
    def nbytes(self) -> int:
        """Memory of both matrices."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter as a rank holds it: for (index of the layer, target) what is added there."""

    parts: Mapping[tuple[int, Target], Sequence[LowRank]]

    @property
    def nbytes(self) -> int:
        """Memory of all its matrices."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts)


class AdapterBank:
    """Adapters by slot, from 1 on; rows of slot 0 have none."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)

    def parts(self, slot: int, layer: int, target: Target) -> Sequence[LowRank]:
        """What the adapter in `slot` adds to a linear layer; nothing for most."""
        return self.adapters[slot - 1].parts.get((layer, target), ())


class AdaptedLinear(WrappedLinear):
    """A linear layer, and what the adapters of some rows add to it."""

    def __init__(self, part: Linear, bank: AdapterBank, layer: int, target: Target) -> None:
        super().__init__(part)
        self._bank = bank
        self._place: tuple[int, Target] = (layer, target)

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features]."""
        y = self.part.forward(x, batch)
        if batch is None:
            return y
        for slot in sorted(set(batch.adapters) - {0}):
            parts = self._bank.parts(slot, *self._place)
            rows = _rows_of(batch, slot, x.device) if parts else None
            for part in parts:
                assert rows is not None
                columns = y[:, part.first : part.first + part.b.shape[1]]
                self.part.ops.lora_add(columns, x, part.a, part.b, part.scale, rows)
        return y


def attach(layers: Sequence[Layer], bank: AdapterBank) -> None:
    """Put the adapters on the linear layers that any of them changes, in place."""
    for index, layer in enumerate(layers):
        for target in TARGETS:
            if not any((index, target) in adapter.parts for adapter in bank.adapters):
                continue
            owner = layer.attention if target in ("qkv", "output") else layer.mlp
            linear: Linear = getattr(owner, target)
            if isinstance(linear, SummedLinear):  # what every rank adds is summed with the rest
                linear.part = AdaptedLinear(linear.part, bank, index, target)
            else:
                setattr(owner, target, AdaptedLinear(linear, bank, index, target))


def _rows_of(batch: Batch, slot: int, device: torch.device) -> Tensor:
    """Token rows of the sequences that have the adapter in `slot`."""
    rows: list[int] = []
    start = 0
    for length, each in zip(batch.query_lens, batch.adapters, strict=True):
        if each == slot:
            rows += range(start, start + length)
        start += length
    return torch.tensor(rows, dtype=torch.int64, device=device)
