"""Rotary tables: cosines and sines of every position, made once at load.

Each scaling is one small function from the plain frequencies to the scaled ones, resolved for the
configured length and fixed from then on. Knows no checkpoint and no attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgi_cli.model.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeSpec,
    YarnScaling,
)


def rope_table(spec: RopeSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[max_positions, head_dim] in `dtype`: head_dim/2 cosines, then head_dim/2 sines.

    Angles are float32 products, as `transformers` forms them.
    """
    frequencies, factor = inverse_frequencies(spec)
    angles = torch.arange(spec.max_positions, dtype=torch.float32)[:, None] * frequencies
    table = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1)
    return table.to(device=device, dtype=dtype)


def inverse_frequencies(spec: RopeSpec) -> tuple[Tensor, float]:
    """Frequencies [head_dim / 2] in radians a position, and the factor on cosines and sines."""
    match spec.scaling:
        case None:
            return _plain(spec.theta, spec.head_dim), 1.0
        case LinearScaling(factor):
            return _plain(spec.theta, spec.head_dim) / factor, 1.0
        case DynamicScaling() as scaling:
            return _dynamic(spec, scaling), 1.0
        case Llama3Scaling() as scaling:
            return _llama3(_plain(spec.theta, spec.head_dim), scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(spec, scaling), scaling.attention_factor


def _powers(theta: float, head_dim: int) -> Tensor:
    exponents: Tensor = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.pow(theta, exponents)


def _plain(theta: float, head_dim: int) -> Tensor:
    return 1.0 / _powers(theta, head_dim)


def _dynamic(spec: RopeSpec, scaling: DynamicScaling) -> Tensor:
    """The base that the longest configured context would reach."""
    length = max(spec.max_positions, scaling.original_length)
    stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
    theta = spec.theta * stretch ** (spec.head_dim / (spec.head_dim - 2))
    return _plain(theta, spec.head_dim)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Keep wavelengths below the high bound, divide those above the low one, blend between."""
    turns = scaling.original_length * plain / (2 * math.pi)  # rotations over the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / scaling.factor + blend * plain


def _yarn(spec: RopeSpec, scaling: YarnScaling) -> Tensor:
    """Extrapolate fast dimensions, interpolate slow ones, a linear ramp between."""

    def dimension_of(rotations: float) -> float:
        """Where along the head a dimension turns so often over the original context."""
        wavelength = scaling.original_length / (rotations * 2 * math.pi)
        return spec.head_dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    plain = _plain(spec.theta, spec.head_dim)
    return plain / scaling.factor * ramp + plain * (1 - ramp)
