"""Hidden states of fixed-length samples on disk, one file per stream and layer.

A layer reads its input states in batches and writes those of the next layer into a new file, so
that after a kill the last finished layer's states are whole. The files are mapped: what the machine
has memory for stays in it. Knows no layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError

BATCH_TOKENS = 4096  # rows that go through a layer at once


class Stream:
    """States [num_samples, length, width] float32 in front of a layer.

    `layer` is the index of the layer that reads them; that of a model's end is the number of
    layers.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int, int], layer: int) -> None:
        self.folder, self.name, self.shape, self.layer = folder, name, shape, layer
        self.path = _path(folder, name, layer)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return int(np.prod(self.shape)) * 4

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """The samples in order, in batches: which ones, and [n, length, width] float32.

        Raises:
            CheckpointError: the file is gone or has another size.
        """
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            raise CheckpointError(
                f"`{self.path}`, which an unfinished run left behind, is missing or cut off",
                hint="remove the output folder and start again without --resume",
            )
        states = np.memmap(self.path, np.float32, "r", shape=self.shape)
        for rows in _slices(self.shape):
            yield rows, torch.from_numpy(np.array(states[rows]))

    def writer(self, layer: int) -> StreamWriter:
        """Where the states in front of `layer` are written."""
        return StreamWriter(Stream(self.folder, self.name, self.shape, layer))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


class StreamWriter:
    """Writes a stream's file; it appears under its name when it is whole."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._partial = stream.path.with_suffix(".partial")
        self._states = np.memmap(self._partial, np.float32, "w+", shape=stream.shape)

    def put(self, rows: slice, states: Tensor) -> None:
        """Store states [n, length, width] of these samples."""
        self._states[rows] = states.float().cpu().numpy()

    def finish(self) -> Stream:
        """Bring the file to the disk under its name."""
        self._states.flush()
        del self._states
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        self._partial.replace(self.stream.path)
        return self.stream


def batch_samples(length: int) -> int:
    """Samples of `length` tokens that go through a layer at once."""
    return max(1, BATCH_TOKENS // length)


def _slices(shape: tuple[int, int, int]) -> Iterator[slice]:
    step = batch_samples(shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _path(folder: Path, name: str, layer: int) -> Path:
    return folder / f"{name}-{layer:05d}.states"
