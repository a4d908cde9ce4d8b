"""Folds scales of an input into what produces it: the gain of a norm, or the rows of a matrix.

Knows how families store gains (with or without a unit offset) and that a value head feeds several
query heads; not how scales are found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.quantize.convert.layer_work import LayerWork, Point, Producer


def tied(point: Point, values: Tensor) -> Tensor:
    """`values` [columns] made equal wherever the producer makes one number for several inputs."""
    repeats = point.producer.repeats
    if repeats == 1:
        return values
    heads = values.view(-1, repeats, point.producer.head_dim)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def fold(work: LayerWork, point: Point, scales: Tensor, gain_dtype: torch.dtype) -> Tensor:
    """Divide the input of `point` by `scales` at its producer, multiply the point's columns.

    Gains are rounded to `gain_dtype`, in which they are stored; the columns are multiplied by what
    was really divided, so that the function stays the same.

    Returns:
        The scales that were applied, [columns].
    """
    if point.producer.kind == "norm":
        scales = _fold_gain(work, point.producer, scales, gain_dtype)
    else:
        _fold_rows(work, point.producer, scales)
    for part in point.parts:
        name = f"{part}.weight"
        work.replace(name, work.tensor(name) * scales)
    return scales


def _fold_gain(
    work: LayerWork, producer: Producer, scales: Tensor, gain_dtype: torch.dtype
) -> Tensor:
    offset = 1.0 if producer.unit_offset else 0.0
    stored = work.tensor(producer.name)
    gain = stored + offset
    changed = (gain / scales - offset).to(gain_dtype).float()
    new_gain = changed + offset
    # A gain of zero, or one that rounds to zero, cannot carry a scale.
    usable = (gain != 0) & (new_gain != 0)
    work.replace(producer.name, torch.where(usable, changed, stored))
    return torch.where(usable, gain / torch.where(usable, new_gain, 1.0), 1.0)


def _fold_rows(work: LayerWork, producer: Producer, scales: Tensor) -> None:
    by_row = scales.view(-1, producer.repeats, producer.head_dim)[:, 0].reshape(-1)
    name = f"{producer.name}.weight"
    work.replace(name, work.tensor(name) / by_row[:, None])
    bias = f"{producer.name}.bias"
    if work.has(bias):
        work.replace(bias, work.tensor(bias) / by_row)
