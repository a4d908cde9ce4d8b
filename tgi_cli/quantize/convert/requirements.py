"""What a run will take, before it starts: memory, disk, and whether there is enough of both."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from tgi_cli.errors import OutOfMemory
from tgi_cli.hub_faults import gigabytes
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.quantize.convert.layer_work import points_of
from tgi_cli.quantize.convert.quality import ROWS, VOCABULARY
from tgi_cli.quantize.convert.stream import batch_samples

_PROGRAM = 500 << 20  # Python, torch and their libraries
_HELD = 1.1  # of what is in use: freed memory that waits to be used again


@dataclass(frozen=True, slots=True)
class Requirements:
    """Bytes. `memory` is the peak of the process; `disk` includes the finished model."""

    memory: int
    disk: int

    def check(self, free_memory: int, folder: Path) -> None:
        """Check that the machine has both.

        Raises:
            OutOfMemory: it does not.
        """
        needed = self.memory - _PROGRAM  # the program itself is there already
        if needed > free_memory:
            raise OutOfMemory(
                f"quantizing takes {gigabytes(needed)} of memory, but {gigabytes(free_memory)} "
                "are free",
                hint="use a smaller --seqlen, or a machine with more memory",
            )
        home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(home).free
        if self.disk > free:
            raise OutOfMemory(
                f"quantizing takes {gigabytes(self.disk)} of disk in `{home}`, but "
                f"{gigabytes(free)} are free",
                hint="use fewer --samples or a smaller --seqlen, or an output on another disk",
            )


def estimate(
    checkpoint: Checkpoint,
    calibration: tuple[int, int],
    held_out: tuple[int, int],
) -> Requirements:
    """What quantizing takes; samples and length of the texts, (0, 0) for no calibration."""
    spec, source = checkpoint.spec, checkpoint.source
    calibrated = calibration[0] > 0
    layer = max(_layer_bytes(checkpoint, calibrated, index) for index in range(len(spec.layers)))
    length = max(calibration[1], held_out[1])
    # The head: its matrix as stored, some of it in float32, and of a few rows of two models logits,
    # log-probabilities and what their divergence takes.
    part = min(VOCABULARY, spec.vocab_size) * spec.hidden_size
    ends = source.nbytes(spec.names.embedding) + 4 * (part + 6 * ROWS * spec.vocab_size)
    memory = _PROGRAM + int(_HELD * max(layer + _activation_bytes(checkpoint, length), ends))
    width = spec.hidden_size * 4
    held, calibrated_on = 2 * math.prod(held_out) * width, math.prod(calibration) * width
    stored = sum(map(source.nbytes, source.keys()))
    # The next layer's states are whole before this one's go, as are those in the middle of a layer;
    # finished layers are joined once.
    return Requirements(memory, 2 * held + 3 * calibrated_on + 2 * stored)


def _layer_bytes(checkpoint: Checkpoint, calibrated: bool, index: int) -> int:
    """The layer in float32 thrice (read, stacked, replaced), and the largest point's own needs."""
    source = checkpoint.source
    whole = largest = 0
    for point in points_of(checkpoint.spec, index):
        shapes = [source.shape(f"{part}.weight") for part in point.parts]
        elements = sum(map(math.prod, shapes))
        columns = shapes[0][1]
        # Moments, their permuted copy, factor and inverse; transposed weights, codes and errors.
        square = 5 * columns * columns if calibrated else 0
        largest = max(largest, 4 * (square + 5 * elements))
        whole += elements
    return 3 * 4 * whole + largest


def _activation_bytes(checkpoint: Checkpoint, length: int) -> int:
    """One batch in flight: states, heads, the feed-forward part and one sample's scores."""
    spec = checkpoint.spec
    rows = batch_samples(length) * length
    widest = max(
        4 * spec.hidden_size
        + 4
        * (layer.attention.num_heads + 2 * layer.attention.num_kv_heads)
        * layer.attention.head_dim
        + 4 * layer.feed.intermediate_size
        for layer in spec.layers
    )
    scores = max(layer.attention.num_heads for layer in spec.layers) * length * length
    return 4 * (rows * widest + scores)
