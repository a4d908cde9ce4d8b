"""Reading rotary parameters, in the newer `rope_parameters` and the older two-key spelling.

Shared by the families. Knows how configurations name things; the formulas are `model.rope`'s.
"""

from __future__ import annotations

import math

from tgi_cli.errors import UnsupportedModel
from tgi_cli.model.config_reader import ConfigReader
from tgi_cli.model.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)


def read_rope(
    config: ConfigReader, head_dim: int, max_positions: int, default_theta: float = 10_000.0
) -> RopeSpec:
    """The one rotary embedding of a uniform model, from the top level of its configuration."""
    config.expect("partial_rotary_factor", 1.0)
    theta = config.number("rope_theta", default_theta)
    older = config.section("rope_scaling")
    newer = config.section("rope_parameters")
    if older is not None and newer is not None:
        raise UnsupportedModel(
            f"{config.where} has both `rope_scaling` and `rope_parameters`",
            hint="keep the one the weights were made with",
        )
    original = config.optional_integer("original_max_position_embeddings")
    return rope_from(newer or older, head_dim, max_positions, theta, original)


def rope_from(
    section: ConfigReader | None,
    head_dim: int,
    max_positions: int,
    theta: float,
    original_length: int | None = None,
) -> RopeSpec:
    """One rotary embedding from the object that describes it; None is the plain one."""
    if section is None:
        return RopeSpec(theta, head_dim, max_positions)
    theta = section.number("rope_theta", theta)
    section.expect("partial_rotary_factor", 1.0)
    kind = section.choice("type", _READERS, "default")
    kind = section.choice("rope_type", _READERS, kind)
    inner = section.optional_integer("original_max_position_embeddings")
    original = original_length or inner or max_positions
    scaling = _READERS[kind](section, original, max_positions)
    section.finish()
    if isinstance(scaling, YarnScaling):
        # Some configurations leave `max_position_embeddings` at the length before extension.
        max_positions = max(max_positions, int(scaling.factor * scaling.original_length))
    return RopeSpec(theta, head_dim, max_positions, scaling)


def _none(section: ConfigReader, original: int, max_positions: int) -> RopeScaling | None:
    section.expect("factor", 1.0)
    return None


def _linear(section: ConfigReader, original: int, max_positions: int) -> RopeScaling:
    return LinearScaling(section.number("factor"))


def _dynamic(section: ConfigReader, original: int, max_positions: int) -> RopeScaling:
    # `transformers` scales from `max_position_embeddings`, whatever the original length says.
    return DynamicScaling(section.number("factor"), max_positions)


def _llama3(section: ConfigReader, original: int, max_positions: int) -> RopeScaling:
    return Llama3Scaling(
        section.number("factor"),
        section.number("low_freq_factor"),
        section.number("high_freq_factor"),
        original,
    )


def _yarn(section: ConfigReader, original: int, max_positions: int) -> RopeScaling:
    factor = section.number("factor", max_positions / original)
    attention_factor = section.optional_number("attention_factor")
    mscale, mscale_all = (
        section.optional_number("mscale"),
        section.optional_number("mscale_all_dim"),
    )
    if attention_factor is None:
        if mscale and mscale_all:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    scaling = YarnScaling(
        factor,
        original,
        attention_factor,
        section.number("beta_fast", 32.0),
        section.number("beta_slow", 1.0),
        section.flag("truncate", True),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise UnsupportedModel(f"{section.where} has `beta_fast` below `beta_slow`")
    return scaling


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_READERS = {
    "default": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
