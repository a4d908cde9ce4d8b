"""What a layer's first half gives is kept while it holds, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.quantize.conversion import samples
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.convert.layer_work import LayerWork, Point
from tgi_cli.quantize.convert.quality import embed
from tgi_cli.quantize.convert.stream import Stream

BACKEND = select("cpu", num_threads=1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_middle_of_a_layer_is_forgotten_when_the_first_half_changes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family))).for_length(32)
    start = Stream(tmp_path, "states", (4, 32, 64), 0)
    embed(checkpoint, BACKEND, samples(4, 32, seed=3).tokens, start)
    middle = tmp_path / "states-middle-00000.states"
    work = LayerWork(checkpoint, BACKEND, 0)
    _, output, gate_up, down = work.points

    def moments(of: LayerWork, point: Point) -> torch.Tensor:
        return of.observe(start, [point])[0].moments

    def changed(point: Point) -> dict[str, torch.Tensor]:
        return {f"{part}.weight": 1.5 * work.tensor(f"{part}.weight") for part in point.parts}

    def fresh(replaced: dict[str, torch.Tensor]) -> LayerWork:
        """Another of this layer, which has never run."""
        made = LayerWork(checkpoint, BACKEND, 0)
        for name, value in replaced.items():
            made.replace(name, value)
        return made

    # Seen from the middle and, beside an earlier point, from the beginning: the same.
    before = moments(work, down)
    assert middle.exists()
    assert torch.equal(before, fresh({}).observe(start, [output, down])[1].moments)

    replaced = changed(gate_up)
    for name, value in replaced.items():
        work.replace(name, value)
    assert middle.exists()  # nothing in front of it has changed
    assert not torch.equal(moments(work, down), before)

    replaced |= changed(output)
    work.replace(f"{output.parts[0]}.weight", replaced[f"{output.parts[0]}.weight"])
    assert not middle.exists()
    assert torch.equal(
        moments(work, down), fresh(replaced).observe(start, [output, down])[1].moments
    )

    expected = torch.cat([states for _, states in fresh(replaced).advance(start).batches()])
    assert middle.exists()
    found = torch.cat([states for _, states in work.advance(start).batches()])
    assert not middle.exists()
    assert torch.equal(found, expected)
