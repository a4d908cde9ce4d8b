"""A checkpoint opened but not read: its description, its tensors by name and their format.

A folder in Hugging Face's layout or one GGUF file. Everything here comes from headers and JSON
files; `Decoder.build` reads the data. Knows no backend.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tgi_cli.errors import CheckpointError, UsageError
from tgi_cli.model.families import architecture_of, read_spec
from tgi_cli.model.gguf_config import hf_config
from tgi_cli.model.gguf_source import GgufSource
from tgi_cli.model.spec import DecoderSpec, DynamicScaling
from tgi_cli.model.weights import SafetensorsSource
from tgi_cli.quantize.formats import detect
from tgi_cli.quantize.formats.base import Format, TensorSource

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` found. `config` is in Hugging Face's terms, also for GGUF."""

    path: str
    architecture: str
    spec: DecoderSpec
    source: TensorSource
    format: Format
    config: dict[str, Any]
    generation_config: dict[str, Any]
    stored_dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the token table; the tokenizer may use fewer."""
        return self.spec.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest context the checkpoint is made for."""
        return self.spec.max_positions

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end generation: those of `generation_config.json`, else of `config.json`."""
        for holder in (self.generation_config, self.config):
            value = holder.get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (int(value),)
        return ()

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors the decoder uses; a tied head counts once."""
        return sum(math.prod(self.source.shape(key)) for key in self._used())

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """Bytes the decoder's weights and rotary tables take once built in `dtype`."""
        ropes = {layer.attention.rope for layer in self.spec.layers}
        tables = sum(rope.max_positions * rope.head_dim for rope in ropes)
        return (self.num_parameters + tables) * dtype.itemsize

    def for_length(self, length: int) -> Checkpoint:
        """The same checkpoint for contexts of `length` tokens, which fixes its rotary tables.

        Raises:
            UsageError: longer than the checkpoint is made for, and its positions do not stretch.
        """
        scalings = [layer.attention.rope.scaling for layer in self.spec.layers]
        limit = self.max_position_embeddings
        if any(isinstance(scaling, DynamicScaling) for scaling in scalings):
            stretch = max(s.factor for s in scalings if isinstance(s, DynamicScaling))
            limit = int(limit * max(1.0, stretch))
        if not 0 < length <= limit:
            raise UsageError(
                f"a context of {length:,} tokens is asked for, but the model is made for {limit:,}",
                hint=f"use --max-model-len {limit} or less",
            )
        return replace(self, spec=self.spec.for_length(length))

    def _used(self) -> list[str]:
        names = self.spec.names
        unneeded = {names.head} if self.spec.tied_head else set()
        stored = set(self.source.keys()) - unneeded
        return sorted(key for key in stored if not key.endswith(names.ignored))


def open_checkpoint(path: str) -> Checkpoint:
    """Open a folder with `config.json` and safetensors, or a `.gguf` file.

    Raises:
        CheckpointError: files are missing, truncated or inconsistent.
        UnsupportedModel: an architecture, configuration key or format we do not have.
    """
    location = Path(path)
    if not location.exists():
        raise CheckpointError(f"`{path}` does not exist")
    if location.is_dir():
        config = _read_json(location / "config.json")
        generation_config = _read_json(location / "generation_config.json", optional=True)
        source: TensorSource = SafetensorsSource(location)
    elif location.suffix == ".gguf":
        packed = GgufSource(location)
        config, generation_config, source = hf_config(packed), {}, packed
    else:
        raise CheckpointError(
            f"`{path}` is neither a folder nor a .gguf file",
            hint="name the folder that holds config.json and the weights",
        )
    architecture = architecture_of(config)
    spec = read_spec(config, architecture)
    return Checkpoint(
        path=str(location),
        architecture=architecture,
        spec=spec,
        source=source,
        format=detect(config, source),
        config=config,
        generation_config=generation_config,
        stored_dtype=_stored_dtype(source, spec.names.embedding),
    )


def _stored_dtype(source: TensorSource, key: str) -> torch.dtype:
    """The float dtype the weights come in; packed ones count as bfloat16."""
    if isinstance(source, SafetensorsSource) and key in source:
        return _DTYPES.get(source.stored_dtype(key), torch.bfloat16)
    return torch.bfloat16


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"`{path.parent}` has no {path.name}",
            hint="name a folder in Hugging Face's layout, a .gguf file or a model id",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold an object")
    return value
