"""Scales on inputs: folding them changes nothing, and those that are chosen help."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantize.conversion import samples
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.convert.folding import fold, tied
from tgi_cli.quantize.convert.layer_work import LayerWork, Point
from tgi_cli.quantize.convert.procedures import _AWQ_EVERY, awq_layer, int8_layer
from tgi_cli.quantize.convert.quality import embed
from tgi_cli.quantize.convert.recipe import Recipe
from tgi_cli.quantize.convert.stream import Stream
from tgi_cli.quantize.methods.activations import round_int8
from tgi_cli.quantize.methods.grid import Grid, fit
from tgi_cli.quantize.methods.scaling import _searched, awq_scales, smoothing_scales
from tgi_cli.quantize.methods.statistics import InputStatistics, output_error


@pytest.mark.parametrize("gains", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-biased-tied", "qwen3", "gemma3"])
def test_folding_changes_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, gains: torch.dtype
) -> None:
    """Not even with gains that are rounded when they are stored."""
    checkpoint = open_checkpoint(str(tiny_checkpoint(family))).for_length(32)
    backend = select("cpu", num_threads=1)
    start = Stream(tmp_path, "states", (4, 32, 64), 0)
    embed(checkpoint, backend, samples(4, 32, seed=3).tokens, start)

    def run(work: LayerWork) -> torch.Tensor:
        return torch.cat([states for _, states in work.advance(start).batches()])

    work = LayerWork(checkpoint, backend, 0)
    before = run(work)
    generator = torch.Generator().manual_seed(0)
    for point in work.points:
        old = work.weight(point)
        scales = tied(point, torch.rand(old.shape[1], generator=generator) * 2 + 0.2)
        applied = fold(work, point, scales, gains)
        torch.testing.assert_close(applied, scales, rtol=0.05, atol=0)
        torch.testing.assert_close(work.weight(point), old * applied)
    torch.testing.assert_close(run(work), before, atol=1e-4, rtol=1e-4)


def uneven(columns: int = 64) -> tuple[torch.Tensor, InputStatistics, torch.Tensor]:
    """A matrix, statistics of inputs of which few columns are very large, and those inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(columns)
    sizes[::16] = 30.0
    rows = torch.randn(600, columns, generator=generator) * sizes
    inputs = InputStatistics(columns, torch.device("cpu"))
    inputs.add(rows)
    return torch.randn(48, columns, generator=generator), inputs, rows


def as_they_are(values: torch.Tensor) -> torch.Tensor:
    return values


def test_awq_scales_halve_the_error_of_uneven_inputs() -> None:
    weight, inputs, _ = uneven()

    def error(scales: torch.Tensor) -> float:
        grid = fit(weight * scales, 4, 32, symmetric=False, scale_dtype=torch.float16)
        rounded = grid.nearest(weight * scales).dequantize() / scales
        return output_error(weight, rounded, inputs.moments)

    scales = awq_scales(weight, inputs, 4, 32, as_they_are)
    assert error(scales) < 0.5 * error(torch.ones(64))
    assert scales[::16].min() > scales[1::16].max()


def test_awq_scales_are_judged_on_outputs_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, _ = uneven()
    rows = []

    def recorded(part: torch.Tensor, *args: Any, **options: Any) -> Grid:
        rows.append(len(part))
        return fit(part, *args, **options)

    monkeypatch.setattr("tgi_cli.quantize.methods.scaling.fit", recorded)
    # The first are zero whatever the scales.
    many = torch.cat([torch.zeros(1500, 64), weight.repeat(40, 1)])
    scales = awq_scales(many, inputs, 4, 32, as_they_are)
    assert max(rows) == 512
    assert scales[::16].min() > scales[1::16].max()


@pytest.mark.parametrize("wanted", [0.05, 0.35, 0.62, 0.95])
def test_exponents_are_searched_from_coarse_to_fine(wanted: float) -> None:
    tried = []

    def scales_of(exponent: float) -> torch.Tensor:
        tried.append(exponent)
        return torch.tensor([1.0, 4.0]) ** exponent

    def loss(scales: torch.Tensor) -> float:
        exponent = float((scales[1] / scales[0]).log2()) / 2
        return (exponent - wanted) ** 2

    least, scales = _searched(scales_of, loss, unscaled=1.0)
    assert scales is not None
    assert least == loss(scales) <= 0.0251**2
    assert len(tried) == len(set(tried)) <= 9
    assert _searched(scales_of, loss, unscaled=0.0) == (0.0, None)


def test_awq_looks_at_many_rows_few_of_them_first_ones(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama"))).for_length(32)
    backend = select("cpu", num_threads=1)
    start = Stream(tmp_path, "states", (16, 32, 64), 0)
    embed(checkpoint, backend, samples(16, 32, seed=3).tokens, start)
    rows = []

    def scales(weight: torch.Tensor, inputs: InputStatistics, *_: Any) -> torch.Tensor:
        rows.append(len(inputs.sample))
        with pytest.raises(RuntimeError, match="without moments"):
            _ = inputs.moments
        return torch.ones(weight.shape[1])

    monkeypatch.setattr("tgi_cli.quantize.convert.procedures.awq_scales", scales)
    work = LayerWork(checkpoint, backend, 0)
    awq_layer(work, start, Recipe.choose("awq", None, 32), torch.float16)
    assert rows == [31] * 4  # of 512 in one batch: 0, 17, 34, ...
    lengths = [2**power for power in range(5, 14)]
    assert all(math.gcd(length, _AWQ_EVERY) == 1 for length in lengths)


def test_smoothing_scales_halve_the_error_of_uneven_inputs() -> None:
    weight, inputs, rows = uneven()

    def error(scales: torch.Tensor) -> float:
        ours = round_int8(rows / scales) @ round_int8(weight * scales).T
        return float((ours - rows @ weight.T).norm() / (rows @ weight.T).norm())

    assert error(smoothing_scales(weight, inputs, as_they_are)) < 0.5 * error(torch.ones(64))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_int8_smooths_what_matrices_make_too(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """Few products of gate and up that are far larger than the others, and matter as little."""
    checkpoint = open_checkpoint(str(tiny_checkpoint(family))).for_length(32)
    backend = select("cpu", num_threads=1)
    start = Stream(tmp_path, "states", (4, 32, 64), 0)
    embed(checkpoint, backend, samples(4, 32, seed=3).tokens, start)
    recipe = Recipe.choose("int8", None, None)

    def prepared() -> LayerWork:
        work = LayerWork(checkpoint, backend, 0)
        _, _, gate_up, down = work.points
        up, back = (f"{name}.weight" for name in (gate_up.parts[1], down.parts[0]))
        factors = torch.ones(work.tensor(up).shape[0])
        factors[::16] = 40
        work.replace(up, work.tensor(up) * factors[:, None])
        work.replace(back, work.tensor(back) / factors)
        return work

    def run(work: LayerWork) -> torch.Tensor:
        return torch.cat([states for _, states in work.advance(start).batches()])

    def error() -> float:
        work = prepared()
        int8_layer(work, start, recipe, torch.float32)
        return float((run(work) - wanted).norm() / (wanted - given).norm())

    given = torch.cat([states for _, states in start.batches()])
    wanted = run(prepared())
    everywhere = error()
    behind_norms = partial(_fold_behind_norms, fold)
    monkeypatch.setattr("tgi_cli.quantize.convert.procedures.fold", behind_norms)
    assert everywhere < 0.6 * error()


def _fold_behind_norms(
    fold: Callable[..., torch.Tensor], work: LayerWork, point: Point, *rest: Any
) -> None:
    if point.producer.kind == "norm":
        fold(work, point, *rest)
