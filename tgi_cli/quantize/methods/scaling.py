"""Scales on inputs that make a matrix easier to quantize: folded into what produces the input.

Input column j is divided by s_j and the matrix's column j multiplied by it: the same function, but
the error of rounding is moved from columns that matter to columns that do not (AWQ: Lin et al.,
"AWQ: Activation-aware Weight Quantization", MLSys 2024), or from activations with outliers to
weights without (SmoothQuant: Xiao et al., ICML 2023). Candidates are judged by the error of the
output; for AWQ it follows from the inputs' second moments, so no input is run again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tgi_cli.quantize.methods.activations import round_int8
from tgi_cli.quantize.methods.grid import fit
from tgi_cli.quantize.methods.statistics import InputStatistics

_STEPS = 20  # exponents tried between none and all of the activations' size
#: Smoothing tries these, and then so far on both sides of the best, once more by each.
_EXPONENTS, _NEARER = (0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.05)
_SMALLEST = 1e-4

#: Makes scales that the producer can take, such as equal ones for heads that share a value head.
Tie = Callable[[Tensor], Tensor]


def awq_scales(
    weight: Tensor, inputs: InputStatistics, bits: int, group_size: int, tie: Tie
) -> Tensor:
    """The scales s [columns] with the least output error on an asymmetric grid; ones if none helps.

    Tries powers of the mean input magnitude, alone and divided by the weights' own size.

    Args:
        weight: [rows, columns] float32.
        inputs: of this matrix.
        bits: of a code.
        group_size: inputs that share a scale of the grid.
        tie: see `Tie`.
    """
    activity = tie(inputs.mean_magnitude).clamp(min=_SMALLEST)
    groups = weight.abs().view(len(weight), -1, group_size)
    relative = groups / groups.amax(2, keepdim=True).clamp(min=1e-8)
    size = tie(relative.view_as(weight).mean(0)).clamp(min=_SMALLEST)
    best = torch.ones_like(activity)
    least = _rounding_loss(weight, best, inputs.moments, bits, group_size)
    for step in range(1, _STEPS + 1):
        exponent = step / _STEPS
        power = activity**exponent
        for candidate in (power, power / size ** (1 - exponent)):
            scales = _centred(candidate)
            loss = _rounding_loss(weight, scales, inputs.moments, bits, group_size)
            if loss < least:
                best, least = scales, loss
    return best


def smoothing_scales(weight: Tensor, inputs: InputStatistics, tie: Tie) -> Tensor:
    """The scales s [columns] with the least error when rows of x and W are both int8.

    Tries max|x|^a / max|w|^(1 - a), which is smooth in a; ones if none helps. Judged on a sample of
    the inputs.
    """
    activity = tie(inputs.largest).clamp(min=_SMALLEST)
    size = tie(weight.abs().amax(0)).clamp(min=_SMALLEST)
    rows = inputs.sample
    wanted = rows @ weight.T
    ones = torch.ones_like(activity)
    found = {0.0: (_int8_loss(weight, ones, rows, wanted), ones)}

    def attempt(exponent: float) -> None:
        if 0 < exponent < 1 and exponent not in found:
            scales = _centred(activity**exponent / size ** (1 - exponent))
            found[exponent] = (_int8_loss(weight, scales, rows, wanted), scales)

    def best() -> float:
        return min(found, key=lambda exponent: found[exponent][0])

    for exponent in _EXPONENTS:
        attempt(exponent)
    for distance in _NEARER if best() else ():
        middle = best()
        for side in (-distance, distance):
            attempt(round(middle + side, 3))
    return found[best()][1]


def _centred(scales: Tensor) -> Tensor:
    """The same proportions around one, so that half-precision scales and gains keep their range."""
    scales = scales / (scales.amax() * scales.amin()).sqrt()
    return scales.clamp(_SMALLEST, 1 / _SMALLEST)


def _rounding_loss(
    weight: Tensor, scales: Tensor, moments: Tensor, bits: int, group_size: int
) -> float:
    scaled = weight * scales
    grid = fit(scaled, bits, group_size, symmetric=False, scale_dtype=torch.float16)
    moved = grid.nearest(scaled).dequantize() / scales - weight
    return float(((moved @ moments) * moved).sum(dtype=torch.float64))


def _int8_loss(weight: Tensor, scales: Tensor, rows: Tensor, wanted: Tensor) -> float:
    rounded = round_int8(weight * scales)
    return float((round_int8(rows / scales) @ rounded.T - wanted).square().sum())
