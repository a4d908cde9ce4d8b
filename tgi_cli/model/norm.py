"""RMS norms as parts: a weight and an epsilon, computed by the backend's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.ops import Ops
from tgi_cli.model.loader import Loader
from tgi_cli.model.spec import NormSpec


class Norm:
    """One RMS norm over the last dimension."""

    def __init__(self, ops: Ops, weight: Tensor, eps: float) -> None:
        self.ops = ops
        self.weight = weight  # [n]: in the activations' dtype, or float32 (see `Ops.rms_norm`)
        self.eps = eps

    @classmethod
    def load(cls, loader: Loader, name: str, size: int, spec: NormSpec) -> Norm:
        """Read weight `name`; a unit offset is added once, here, in float32."""
        if spec.unit_offset:
            weight = loader.vector(name, size, torch.float32) + 1.0
        else:
            weight = loader.vector(name, size, loader.dtype)
        return cls(loader.ops, weight, spec.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., n]."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add_forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized sum and the sum itself."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
