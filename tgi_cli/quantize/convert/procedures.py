"""What each method does with one layer: which statistics, in which order, what is replaced.

The layer is left as the quantized one computes: observed inputs of later matrices, and of later
layers, carry the errors of those before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tgi_cli.quantize.convert.folding import fold, tied
from tgi_cli.quantize.convert.layer_work import LayerWork, Point
from tgi_cli.quantize.convert.recipe import Recipe
from tgi_cli.quantize.convert.stream import Stream
from tgi_cli.quantize.methods import fp8, gptq
from tgi_cli.quantize.methods.activations import round_fp8, round_int8
from tgi_cli.quantize.methods.grid import fit
from tgi_cli.quantize.methods.matrix import QuantizedMatrix
from tgi_cli.quantize.methods.scaling import awq_scales, smoothing_scales
from tgi_cli.quantize.methods.statistics import InputStatistics, output_error

#: Inputs that AWQ judges scales on are so far apart: prime to the lengths that samples have, since
#: their first tokens, which are unlike all others, would count too much.
_AWQ_EVERY = 17


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """Matrices by module name, and the relative error of each (see `output_error`)."""

    matrices: dict[str, QuantizedMatrix]
    errors: dict[str, float]


#: Quantizes a layer; the stream holds its calibration inputs, None where there are none.
Procedure = Callable[[LayerWork, Stream | None, Recipe, torch.dtype], QuantizedLayer]


def gptq_layer(
    work: LayerWork, stream: Stream | None, recipe: Recipe, scale_dtype: torch.dtype
) -> QuantizedLayer:
    """GPTQ, point by point: each sees the inputs that the quantized matrices before it make."""
    assert stream is not None
    done = QuantizedLayer({}, {})
    for point in work.points:
        [inputs] = work.observe(stream, [point])
        weight = work.weight(point)
        _store(work, point, _solved(weight, inputs, recipe, scale_dtype), weight, inputs, done)
    return done


def fp8_layer(
    work: LayerWork, stream: Stream | None, recipe: Recipe, scale_dtype: torch.dtype
) -> QuantizedLayer:
    """One scale a row, then GPTQ, or rounding to nearest where there is no text.

    Activations are rounded too, as servers do.
    """
    done = QuantizedLayer({}, {})
    work.round_inputs(round_fp8)
    for point in work.points:
        weight = work.weight(point)
        grid = fp8.fit(weight)
        if stream is None:
            _store(work, point, grid.nearest(weight), weight, None, done)
        else:
            [inputs] = work.observe(stream, [point])
            matrix = gptq.solve(weight, inputs.moments, grid)
            _store(work, point, matrix, weight, inputs, done)
    return done


def awq_layer(
    work: LayerWork, stream: Stream | None, recipe: Recipe, scale_dtype: torch.dtype
) -> QuantizedLayer:
    """Scales on all inputs first, as folding changes matrices before; then GPTQ on clipped grids.

    Folded gains keep the dtype of the checkpoint. Clipping is the grid's search.
    """
    assert stream is not None
    done = QuantizedLayer({}, {})
    seen = work.observe(stream, work.points, moments=False, every=_AWQ_EVERY)
    for point, inputs in zip(work.points, seen, strict=True):
        scales = awq_scales(
            work.weight(point), inputs, recipe.bits, recipe.group_size, partial(tied, point)
        )
        fold(work, point, scales, work.stored_dtype)
    for point in work.points:
        [inputs] = work.observe(stream, [point])
        weight = work.weight(point)
        matrix = _solved(weight, inputs, recipe, scale_dtype, symmetric=False)
        _store(work, point, matrix, weight, inputs, done)
    return done


def int8_layer(
    work: LayerWork, stream: Stream | None, recipe: Recipe, scale_dtype: torch.dtype
) -> QuantizedLayer:
    """SmoothQuant on all inputs, then GPTQ by output row; activations are rounded too."""
    assert stream is not None
    done = QuantizedLayer({}, {})
    seen = work.observe(stream, work.points, moments=False)
    # Those made by matrices first: it scales rows of these, which have scales of their own.
    points = sorted(zip(work.points, seen, strict=True), key=lambda pair: pair[0].producer.kind)
    for point, inputs in points:
        scales = smoothing_scales(work.weight(point), inputs, partial(tied, point))
        fold(work, point, scales, work.stored_dtype)
    work.round_inputs(round_int8)
    for point in work.points:
        [inputs] = work.observe(stream, [point])
        weight = work.weight(point)
        _store(work, point, _solved(weight, inputs, recipe, scale_dtype), weight, inputs, done)
    return done


def _solved(
    weight: Tensor,
    inputs: InputStatistics,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    *,
    symmetric: bool = True,
) -> QuantizedMatrix:
    grid = fit(
        weight,
        recipe.bits,
        recipe.group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        moments=inputs.moments,
    )
    return gptq.solve(weight, inputs.moments, grid)


def _store(
    work: LayerWork,
    point: Point,
    matrix: QuantizedMatrix,
    weight: Tensor,
    inputs: InputStatistics | None,
    done: QuantizedLayer,
) -> None:
    """Put a point's quantized matrix into the layer and into `done`, part by part."""
    start = 0
    for part, size in zip(point.parts, work.sizes(point), strict=True):
        rows = matrix.rows(start, start + size)
        values = rows.dequantize()
        moments = None if inputs is None else inputs.moments
        done.matrices[part] = rows
        done.errors[part] = output_error(weight[start : start + size], values, moments)
        work.replace(f"{part}.weight", values)
        start += size


PROCEDURES: dict[str, Procedure] = {
    "gptq": gptq_layer,
    "awq": awq_layer,
    "fp8": fp8_layer,
    "int8": int8_layer,
}
