"""Nothing in a checkpoint is idle: every tensor and every configuration key has an effect.

A tensor replaced by its neutral value must change the logits, a missing one must be named, and a
key of the configuration either changes the logits, or is refused, or stands in a short list here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.paged import Paged
from tests.tiny import FAMILIES
from tgi_cli.errors import CheckpointError, TgiError
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.config_reader import BOOKKEEPING
from tgi_cli.model.decoder import Decoder
from tgi_cli.model.families import read_spec
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource

TOKENS = torch.randint(3, 512, (31,), generator=torch.Generator().manual_seed(5)).tolist()
#: With `layer_types` written out, what they are derived from is not looked at; the length only
#: bounds the positions; a head that differs from the token table is used though called tied.
NO_EFFECT = {
    "max_position_embeddings",
    "max_window_layers",
    "use_sliding_window",
    "_sliding_window_pattern",
    "tie_word_embeddings",
}

Checkpoints = Callable[..., Path]


class Altered:
    """A source with one tensor replaced, or gone."""

    def __init__(self, source: TensorSource, key: str, tensor: Tensor | None) -> None:
        self.source, self.key, self.tensor = source, key, tensor

    def keys(self) -> Iterator[str]:
        return (key for key in self.source.keys() if key in self)  # noqa: SIM118

    def __contains__(self, key: str) -> bool:
        return key in self.source and (key != self.key or self.tensor is not None)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.source.shape(key)

    def nbytes(self, key: str) -> int:
        return self.source.nbytes(key)

    def read(self, key: str, shard: Shard = WHOLE) -> Tensor:
        if key == self.key and self.tensor is not None:
            return self.tensor
        return self.source.read(key, shard)


def logits_of(checkpoint: Checkpoint) -> Tensor:
    backend = select("cpu")
    decoder = Decoder.build(checkpoint, backend, torch.float32)
    return Paged(decoder, backend, torch.float32).run(TOKENS, len(TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_matters(family: str, tiny_checkpoint: Checkpoints) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    expected = logits_of(checkpoint)
    centred = family == "gemma3"
    for key in checkpoint.source.keys():  # noqa: SIM118
        stored = checkpoint.source.read(key)
        scales = stored.dim() == 1 and "norm" in key and not centred
        neutral = torch.ones_like(stored) if scales else torch.zeros_like(stored)
        altered = replace(checkpoint, source=Altered(checkpoint.source, key, neutral))
        change = (logits_of(altered) - expected).abs().max()
        assert change > 1e-2, f"{key} has no effect: logits move by {change}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_missing_tensor_is_named(family: str, tiny_checkpoint: Checkpoints) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    for key in checkpoint.source.keys():  # noqa: SIM118
        lacking = replace(checkpoint, source=Altered(checkpoint.source, key, None))
        with pytest.raises(CheckpointError) as raised:
            Decoder.build(lacking, select("cpu"), torch.float32)
        assert key in raised.value.message


def altered_values(value: Any) -> list[Any]:
    """Other values of the same kind; none for what cannot be altered."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value * 2]
        case dict():
            nested = {key: altered_values(part) for key, part in value.items()}
            return [value | {key: part} for key, parts in nested.items() for part in parts]
        case ["full_attention" | "sliding_attention", *_]:
            return [value[::-1], ["full_attention"] * len(value), ["sliding_attention"]]
        case str():
            return ["another"]
        case _:
            return []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_key_matters(family: str, tiny_checkpoint: Checkpoints) -> None:
    path = tiny_checkpoint(family)
    checkpoint = open_checkpoint(str(path))
    expected = logits_of(checkpoint)
    idle = []
    for key, value in json.loads((path / "config.json").read_text()).items():
        if key in BOOKKEEPING:
            continue
        for other in altered_values(value):
            config = checkpoint.config | {key: other}
            try:
                spec = read_spec(config, checkpoint.architecture)
                same = torch.equal(logits_of(replace(checkpoint, spec=spec)), expected)
            except TgiError:
                continue
            if same and other != value:
                idle.append(key)
    assert set(idle) <= NO_EFFECT
