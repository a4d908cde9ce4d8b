"""Grids: what they can represent, and that a searched range is never worse than the full one."""

from __future__ import annotations

import pytest
import torch

from tgi_cli.quantize.methods import fp8
from tgi_cli.quantize.methods.grid import fit

WEIGHT = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_lies_within_half_a_step(symmetric: bool, dtype: torch.dtype) -> None:
    grid = fit(WEIGHT, 4, 32, symmetric=symmetric, scale_dtype=dtype)
    matrix = grid.nearest(WEIGHT)
    assert matrix.scales.dtype == dtype
    assert matrix.group_size == 32
    steps = matrix.scales.float().repeat_interleave(32, 1)
    # Rounding the scale itself can cut off a little at the ends.
    slack = 1.05 if dtype == torch.bfloat16 else 1.01
    half = 1.0 if symmetric else 0.5  # the symmetric grid lacks its highest value
    assert ((matrix.dequantize() - WEIGHT).abs() <= half * slack * steps + 1e-9).all()


def test_the_symmetric_zero_is_in_the_middle() -> None:
    for bits in (4, 8):
        grid = fit(WEIGHT, bits, -1, symmetric=True, scale_dtype=torch.float16)
        assert (grid.zeros == 2 ** (bits - 1)).all()
        assert grid.scales.shape == (40, 1)


def test_zero_weights_stay_zero() -> None:
    weight = torch.zeros(8, 64)
    for symmetric in (True, False):
        grid = fit(weight, 4, 32, symmetric=symmetric, scale_dtype=torch.float16)
        assert torch.equal(grid.nearest(weight).dequantize(), weight)
    assert torch.equal(fp8.fit(weight).nearest(weight).dequantize(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_range_costs_no_more(symmetric: bool) -> None:
    inputs = torch.randn(400, 96, generator=torch.Generator().manual_seed(1))
    moments = inputs.T @ inputs

    def losses(searched: bool) -> torch.Tensor:
        grid = fit(
            WEIGHT,
            4,
            32,
            symmetric=symmetric,
            scale_dtype=torch.float16,
            moments=moments if searched else None,
        )
        moved = (grid.nearest(WEIGHT).dequantize() - WEIGHT).view(40, 3, 32)
        blocks = inputs.view(400, 3, 32)
        return torch.einsum("rgi,ngi->rgn", moved, blocks).square().sum(2)

    searched, full = losses(True), losses(False)
    assert (searched <= full * 1.0001).all()
    assert searched.sum() < 0.95 * full.sum()


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    matrix = fp8.fit(WEIGHT).nearest(WEIGHT)
    values = matrix.dequantize()
    assert matrix.codes.dtype == torch.float8_e4m3fn
    largest = matrix.codes.float().abs().amax(1)
    assert ((largest >= 224) & (largest <= 448)).all()
    full = fp8.Fp8Grid(WEIGHT.abs().amax(1, keepdim=True) / 448).nearest(WEIGHT).dequantize()
    errors = [(each - WEIGHT).square().sum(1) for each in (values, full)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.97 * errors[1].sum()
    steps = WEIGHT.abs().clamp(min=2**-6 * WEIGHT.abs().amax(1, keepdim=True) / 448)
    assert ((values - WEIGHT).abs() <= 2**-4 * steps * 1.001).all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_fp8_finds_the_scales_that_trying_all_weights_finds(stored: torch.dtype) -> None:
    weight = torch.randn(300, 640, generator=torch.Generator().manual_seed(2)).to(stored).float()
    smallest = weight.abs().amax(1, keepdim=True) / fp8.LARGEST
    tried = torch.cat([smallest * 2 ** (step / 16) for step in range(16)], 1)

    def errors(scales: torch.Tensor) -> torch.Tensor:
        values = fp8.Fp8Grid(scales).nearest(weight).dequantize()
        return (values - weight).double().square().sum(1, keepdim=True)

    least = torch.cat([errors(scales) for scales in tried.split(1, 1)], 1).amin(1, keepdim=True)
    found = errors(fp8.fit(weight).scales)
    # What e4m3 cannot hold in full is left out of the search, and so is what bfloat16 rounds off.
    slack = 1.0005 if stored == torch.bfloat16 else 1.05
    assert (found <= slack * least).all()
    assert found.sum() <= (1.00005 if stored == torch.bfloat16 else 1.003) * least.sum()


def test_whole_rows_are_searched_by_energies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 600, generator=generator) ** 3
    moments = torch.diag(torch.rand(600, generator=generator) ** 4 + 0.01)

    def scales() -> torch.Tensor:
        options = {"symmetric": True, "scale_dtype": torch.float16, "moments": moments}
        return fit(weight, 4, -1, **options).scales

    searched = scales()
    assert not torch.equal(
        searched, fit(weight, 4, -1, symmetric=True, scale_dtype=torch.float16).scales
    )
    monkeypatch.setattr("tgi_cli.quantize.methods.grid._WHOLE", 601)  # all of the moments
    torch.testing.assert_close(searched, scales())
