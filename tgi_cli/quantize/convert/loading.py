"""Loaders for parts of an unquantized model, to compute in float32, whole, on one rank."""

from __future__ import annotations

import torch

from tgi_cli.kernels.backend import Backend
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.model.loader import Loader
from tgi_cli.model.partition import Partition
from tgi_cli.quantize.formats.base import TensorSource


def float_loader(
    checkpoint: Checkpoint, backend: Backend, source: TensorSource | None = None
) -> Loader:
    """Reads from `source`, the checkpoint's own if None."""
    return Loader(
        source or checkpoint.source,
        checkpoint.format,
        backend,
        torch.float32,
        Partition(checkpoint.spec),
    )


def stored_loader(checkpoint: Checkpoint, backend: Backend) -> Loader:
    """Leaves matrices where they are stored, as `StoredDense`."""
    return Loader(
        checkpoint.source,
        checkpoint.format.packing(),
        backend,
        torch.float32,
        Partition(checkpoint.spec),
    )
