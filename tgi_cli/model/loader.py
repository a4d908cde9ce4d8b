"""Loading parts from a checkpoint: one place that reads, converts, checks shapes and keeps book.

Parts ask for what they need by name; at the end `finish` knows which tensors nobody asked for.
Reads tensor by tensor, so that a checkpoint is never in memory twice. Knows no families.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError
from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.cpu.packer import Packer
from tgi_cli.kernels.grouped import FloatRows, GroupedRows
from tgi_cli.kernels.ops import Ops
from tgi_cli.model.partition import Partition
from tgi_cli.quantize.formats.base import Format, TableWeight, TensorSource, Weight
from tgi_cli.quantize.formats.dense import DenseFormat

log = logging.getLogger(__name__)

_MISFIT = "the weights and `config.json` do not belong together, or the download is incomplete"


class Loader:
    """A source, its format and the target: what every part needs to build itself.

    Shapes are asked for as the checkpoint has them; `partition` says which part of each tensor is
    read here, and what comes back is that part. With a `packer` matrices come back packed by it,
    and what was read of the checkpoint leaves memory tensor by tensor.
    """

    def __init__(
        self,
        source: TensorSource,
        format: Format,
        backend: Backend,
        dtype: torch.dtype,
        partition: Partition,
        progress: Callable[[float], None] | None = None,
        packer: Packer | None = None,
    ) -> None:
        self.source = source
        if packer is not None:  # nothing is copied before it is packed
            format = format.packing(wide_activations=format.wide_activations)
        self.format = format
        self.packer = packer
        self.backend = backend
        self.ops: Ops = backend.ops
        self.dtype = dtype
        self.partition = partition
        self.collective = backend.collective
        self._progress = progress
        self._names = set(format.names(source))
        self._used: set[str] = set()
        self._decoded = 0  # matrices that were packed and now are dense
        self._bytes_done = 0
        self._bytes_total = sum(map(source.nbytes, source.keys())) or 1

    def vector(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """A one-dimensional tensor of `size` elements, or this rank's, in memory of its own."""
        return self._tensor(name, (size,), dtype)

    def table(self, name: str, rows: int, columns: int) -> Tensor:
        """A matrix that is looked up, not multiplied: [rows, columns] in the model's dtype."""
        if self.packer is None:
            return self._tensor(name, (rows, columns), self.dtype)
        self._check(name, (rows, columns))
        shard = self.partition.shard(name)
        kept = self.packer.rows(name, self.source.read(name, shard))
        self._done(name)
        return kept

    def packed_table(
        self, name: str, rows: int, columns: int, *, multiplied: bool
    ) -> TableWeight | None:
        """A token table, or this rank's rows, packed by the format or the packer; None if neither.

        Args:
            name: of the tensor.
            rows: of the whole table.
            columns: its width.
            multiplied: whether it is the output matrix too; else the packer leaves floats as rows.
        """
        self._check(name, (rows, columns))
        shard = self.partition.shard(name)
        weight: Any = self.format.table(self.source, name, shard, self.dtype)
        if weight is None and (self.packer is None or not multiplied):
            return None
        if self.packer is not None:
            weight = weight or self.format.load(self.source, name, shard, self.dtype)
            weight = self.packer.pack(name, weight)
        self._done(name)
        return cast(TableWeight, weight)

    def matrix(
        self,
        names: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        *,
        gated: bool = False,
    ) -> Weight:
        """Matrices of these output sizes, stacked along the output and ready for the backend.

        With `gated` there are two, whose outputs will be multiplied with each other: backends may
        order them as suits that.
        """
        parts = []
        for name, rows in zip(names, out_features, strict=True):
            self._check(name, (rows, in_features))
            shard = self.partition.shard(name)
            parts.append(self.format.load(self.source, name, shard, self.dtype))
        weight = self.format.fuse(parts) if len(parts) > 1 else parts[0]
        if not isinstance(weight, GroupedRows):
            covered = (self.format.covers(self.source, name) for name in names)
            self._decoded += sum(covered) if self.format.name != DenseFormat.name else 0
        if self.packer is not None:
            assert isinstance(weight, GroupedRows | FloatRows)
            weight = self.packer.pack(names[0], weight, interleaved=gated)
        else:
            # A format that packs leaves its matrices where they are stored, on every device.
            size = weight.out_features, weight.in_features
            out = None if self.format.packs else self.backend.weight_buffer(*size, self.dtype)
            weight = weight.prepare(self.ops, out)
        for name in names:
            self._done(name)
        return weight

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds `name`."""
        return name in self._names

    def skip(self, name: str) -> None:
        """Count a tensor as used that is known to add nothing."""
        self._done(name)

    def finish(self, ignored: Sequence[str]) -> None:
        """Check that every tensor was used, but for names that end with one of `ignored`.

        Raises:
            CheckpointError: tensors are left over, so the model is not the one described.
        """
        unused = self._names - self._used
        left = sorted(key for key in unused if not key.endswith(tuple(ignored)))
        if left:
            shown = ", ".join(f"`{key}`" for key in left[:4]) + (", …" if len(left) > 4 else "")
            raise CheckpointError(
                f"{len(left)} tensors of the checkpoint have no place in the model: {shown}",
                hint="`config.json` describes another model than the one stored here",
            )
        if self._decoded:
            log.warning(
                "%d packed matrices (%s) are decoded to %s and take %d bits per weight: no kernel "
                "that runs here multiplies them in their form",
                self._decoded,
                self.format.name,
                str(self.dtype).removeprefix("torch."),
                self.dtype.itemsize * 8,
            )
        if self._progress is not None:
            self._progress(1.0)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._check(name, shape)
        # A copy, as `read` may give a view of the mapped file.
        stored = self.source.read(name, self.partition.shard(name))
        tensor = stored.to(device=self.backend.device, dtype=dtype, copy=True)
        self._done(name)
        return tensor.contiguous()

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._names:
            raise CheckpointError(f"tensor `{name}` is missing from the checkpoint", hint=_MISFIT)
        stored = self.format.shape(self.source, name)
        if stored != shape:
            first = self.format.tensors(self.source, name)[0]
            raise CheckpointError(
                f"tensor `{first}` has shape {stored}, but `config.json` asks for {shape}",
                hint=_MISFIT,
            )

    def _done(self, name: str) -> None:
        self._used.add(name)
        for stored in self.format.tensors(self.source, name):
            self._bytes_done += self.source.nbytes(stored)
            if self.packer is not None:  # else weights may be views of it
                self.source.release(stored)
        if self._progress is not None:
            self._progress(min(1.0, self._bytes_done / self._bytes_total))
