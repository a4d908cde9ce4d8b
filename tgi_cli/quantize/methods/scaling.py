"""Scales on inputs that make a matrix easier to quantize: folded into what produces the input.

Input column j is divided by s_j and the matrix's column j multiplied by it: the same function, but
the error of rounding is moved from columns that matter to columns that do not (AWQ: Lin et al.,
"AWQ: Activation-aware Weight Quantization", MLSys 2024), or from activations with outliers to
weights without (SmoothQuant: Xiao et al., ICML 2023). Candidates are judged by the error of the
output on a sample of the inputs, the exponent searched from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tgi_cli.quantize.methods.activations import round_int8
from tgi_cli.quantize.methods.grid import fit
from tgi_cli.quantize.methods.statistics import InputStatistics

#: Exponents that are tried, and then so far on both sides of the best, once more by each.
_EXPONENTS, _NEARER = (0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.05)
_OUTPUTS = 512  # rows of a matrix that AWQ's scales are judged on: they share their exponent
_SMALLEST = 1e-4

#: Makes scales that the producer can take, such as equal ones for heads that share a value head.
Tie = Callable[[Tensor], Tensor]


def awq_scales(
    weight: Tensor, inputs: InputStatistics, bits: int, group_size: int, tie: Tie
) -> Tensor:
    """The scales s [columns] with the least output error on an asymmetric grid; ones if none helps.

    Tries powers of the mean input magnitude, alone and divided by the weights' own size. Judged on
    a sample of the inputs and of the outputs.

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
    rows, part = inputs.sample, _evenly(weight, _OUTPUTS)

    def loss(scales: Tensor) -> float:
        return _rounding_loss(part, scales, rows, bits, group_size)

    unscaled = loss(torch.ones_like(activity))
    alone = _searched(lambda exponent: activity**exponent, loss, unscaled)
    divided = _searched(
        lambda exponent: activity**exponent / size ** (1 - exponent), loss, unscaled
    )
    best = min(alone, divided, key=lambda found: found[0])
    return torch.ones_like(activity) if best[1] is None else best[1]


def smoothing_scales(weight: Tensor, inputs: InputStatistics, tie: Tie) -> Tensor:
    """The scales s [columns] with the least error when rows of x and W are both int8.

    Tries max|x|^a / max|w|^(1 - a), which is smooth in a; ones if none helps. Judged on a sample of
    the inputs.
    """
    activity = tie(inputs.largest).clamp(min=_SMALLEST)
    size = tie(weight.abs().amax(0)).clamp(min=_SMALLEST)
    rows = inputs.sample
    wanted = rows @ weight.T

    def loss(scales: Tensor) -> float:
        return _int8_loss(weight, scales, rows, wanted)

    ones = torch.ones_like(activity)
    _, best = _searched(
        lambda exponent: activity**exponent / size ** (1 - exponent), loss, loss(ones)
    )
    return ones if best is None else best


def _searched(
    scales_of: Callable[[float], Tensor], loss: Callable[[Tensor], float], unscaled: float
) -> tuple[float, Tensor | None]:
    """The least loss among the exponents between 0 and 1, and its scales.

    None stands for no scales at all, whose loss is `unscaled` and whose exponent counts as 0.
    """
    found: dict[float, tuple[float, Tensor | None]] = {0.0: (unscaled, None)}

    def attempt(exponent: float) -> None:
        if 0 < exponent < 1:
            scales = _centred(scales_of(exponent))
            found[exponent] = (loss(scales), scales)

    def best() -> float:
        return min(found, key=lambda exponent: found[exponent][0])

    for exponent in _EXPONENTS:
        attempt(exponent)
    for distance in _NEARER if best() else ():
        middle = best()
        for side in (-distance, distance):
            attempt(round(middle + side, 3))
    return found[best()]


def _evenly(weight: Tensor, count: int) -> Tensor:
    """Up to `count` rows from all over [rows, columns]."""
    chosen = torch.linspace(0, len(weight) - 1, min(len(weight), count))
    return weight[chosen.long().to(weight.device)]


def _centred(scales: Tensor) -> Tensor:
    """The same proportions around one, so that half-precision scales and gains keep their range."""
    scales = scales / (scales.amax() * scales.amin()).sqrt()
    return scales.clamp(_SMALLEST, 1 / _SMALLEST)


def _rounding_loss(
    weight: Tensor, scales: Tensor, rows: Tensor, bits: int, group_size: int
) -> float:
    scaled = weight * scales
    grid = fit(scaled, bits, group_size, symmetric=False, scale_dtype=torch.float16)
    moved = grid.nearest(scaled).dequantize() / scales - weight
    return float((rows @ moved.T).square().sum(dtype=torch.float64))


def _int8_loss(weight: Tensor, scales: Tensor, rows: Tensor, wanted: Tensor) -> float:
    rounded = round_int8(weight * scales)
    return float((round_int8(rows / scales) @ rounded.T - wanted).square().sum())
