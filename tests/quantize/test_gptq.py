"""GPTQ's arithmetic against the algorithm written down plainly, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError
from tgi_cli.quantize.methods import fp8
from tgi_cli.quantize.methods.gptq import solve
from tgi_cli.quantize.methods.grid import Grid, fit
from tgi_cli.quantize.methods.statistics import _BLOCK, InputStatistics, output_error

ROWS, COLUMNS, GROUP = 24, 160, 32


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and moments of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    sizes = torch.logspace(-1, 1, COLUMNS)[torch.randperm(COLUMNS, generator=generator)]
    inputs = torch.randn(1000, COLUMNS, generator=generator) @ mixing * sizes
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs.T @ inputs


def plain_gptq(weight: Tensor, moments: Tensor, grid: Grid, damping: float) -> Tensor:
    """One column after the other in float64, the inverse updated as in the paper's section 3."""
    weight, moments = weight.double().clone(), moments.double()
    damped = moments + torch.eye(COLUMNS) * damping * moments.diagonal().mean()
    inverse = torch.linalg.inv(damped)
    size = COLUMNS // grid.scales.shape[1]
    values = torch.zeros_like(weight)
    for column in torch.argsort(moments.diagonal(), descending=True).tolist():
        scale, zero = grid.scales[:, column // size], grid.zeros[:, column // size]
        code = (weight[:, column] / scale).round().add(zero).clamp(0, grid.highest)
        values[:, column] = (code - zero) * scale
        error = (weight[:, column] - values[:, column]) / inverse[column, column]
        weight -= error[:, None] * inverse[column]
        inverse -= inverse[:, column : column + 1] * inverse[column] / inverse[column, column]
        # What is done stays done: rounding must not let it drift.
        inverse[column] = inverse[:, column] = 0
        inverse[column, column] = 1
    return values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_solves_as_the_paper_does(symmetric: bool, bits: int) -> None:
    weight, moments = problem()
    grid = fit(weight, bits, GROUP, symmetric=symmetric, scale_dtype=torch.float16)
    ours = solve(weight, moments, grid, damping=0.05).dequantize()
    plain = plain_gptq(weight, moments, grid, 0.05)
    # A column that lies between two codes may fall to either side, and changes those after it.
    assert (ours == plain.float()).float().mean() > 0.95
    errors = [output_error(weight, each, moments) for each in (ours, plain.float())]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_fp8_beats_rounding_to_nearest() -> None:
    weight, moments = problem()
    grid = fp8.fit(weight)
    errors = [
        output_error(weight, each.dequantize(), moments)
        for each in (solve(weight, moments, grid), grid.nearest(weight))
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_beats_rounding_to_nearest(symmetric: bool) -> None:
    weight, moments = problem()
    grid = fit(weight, 4, GROUP, symmetric=symmetric, scale_dtype=torch.float16)
    nearest = output_error(weight, grid.nearest(weight).dequantize(), moments)
    assert output_error(weight, solve(weight, moments, grid).dequantize(), moments) < 0.7 * nearest


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    weight, _ = problem()
    grid = fit(weight, 4, GROUP, symmetric=True, scale_dtype=torch.float16)
    solved = solve(weight, torch.diag(torch.linspace(1, 2, COLUMNS)), grid)
    assert torch.equal(solved.codes, grid.nearest(weight).codes)


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    weight, moments = problem()
    moments[7] = moments[:, 7] = 0
    grid = fit(weight, 4, GROUP, symmetric=True, scale_dtype=torch.float16)
    solved = solve(weight, moments, grid)
    assert torch.equal(solved.codes[:, 7], grid.nearest(weight).codes[:, 7])


def test_moments_without_full_rank() -> None:
    weight, _ = problem()
    inputs = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(5)) * 1e3
    moments = inputs.T @ inputs
    grid = fit(weight, 4, GROUP, symmetric=True, scale_dtype=torch.float16)
    # Three directions and 160 free columns: nearly nothing needs to be lost.
    assert output_error(weight, solve(weight, moments, grid).dequantize(), moments) < 0.01


@pytest.mark.parametrize("broken", ["weight", "moments"])
def test_numbers_that_are_not_finite_are_refused(broken: str) -> None:
    weight, moments = problem()
    grid = fit(weight, 4, GROUP, symmetric=True, scale_dtype=torch.float16)
    (weight if broken == "weight" else moments)[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        solve(weight, moments, grid)


def test_moments_of_more_columns_than_are_added_together() -> None:
    rows = torch.randn(64, 2 * _BLOCK + 10, generator=torch.Generator().manual_seed(0))
    seen = InputStatistics(rows.shape[1], torch.device("cpu"))
    for part in rows.split(40):
        seen.add(part)
        assert torch.equal(seen.moments, seen.moments.T)  # and may be asked for between
    torch.testing.assert_close(seen.moments, rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_statistics_do_not_depend_on_the_batches() -> None:
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = (InputStatistics(8, torch.device("cpu")) for _ in range(2))
    whole.add(rows)
    for part in rows.split(70):
        parts.add(part)
    torch.testing.assert_close(parts.moments, whole.moments)
    torch.testing.assert_close(parts.mean_magnitude, rows.abs().mean(0))
    assert torch.equal(parts.largest, rows.abs().amax(0))
    assert parts.count == whole.count == 300
    assert 0 < len(parts.sample) <= 512


@pytest.mark.parametrize("every", [0, 17])
def test_a_sample_of_many_batches_is_even(every: int) -> None:
    seen = InputStatistics(1, torch.device("cpu"), moments=False, every=every)
    total = 128 * 2048
    for batch in torch.arange(total).float().unsqueeze(1).split(2048):
        seen.add(batch)
    sample = seen.sample.squeeze(1)
    assert len(sample) == 512
    quarters = torch.histc(sample, bins=4, min=0, max=total)
    assert quarters.min() > 0.9 * quarters.max()


def test_statistics_without_moments_say_so() -> None:
    seen = InputStatistics(8, torch.device("cpu"), moments=False)
    rows = torch.randn(5, 8)
    seen.add(rows)
    assert torch.equal(seen.largest, rows.abs().amax(0))
    assert torch.equal(seen.sample, rows)
    with pytest.raises(RuntimeError, match="without moments"):
        _ = seen.moments
