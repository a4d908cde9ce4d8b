"""A checkpoint opened but not read: its description, its tensors by name and their format.

A folder in Hugging Face's layout or one GGUF file. Everything here comes from headers and JSON
files; `Decoder.build` reads the data. Knows no backend's kernels, only how much they pack.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tgi_cli.errors import CheckpointError, UsageError
from tgi_cli.kernels.cpu.packed import matrix_bytes
from tgi_cli.kernels.grouped import GroupScheme
from tgi_cli.model.families import architecture_of, read_spec
from tgi_cli.model.gguf_config import hf_config
from tgi_cli.model.gguf_source import GgufSource, part_paths
from tgi_cli.model.partition import Partition
from tgi_cli.model.spec import DecoderSpec, DynamicScaling
from tgi_cli.model.weights import SafetensorsSource
from tgi_cli.quantize.formats import detect
from tgi_cli.quantize.formats.at_load import AtLoadFormat
from tgi_cli.quantize.formats.base import Format, TensorSource

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")


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

    def files(self) -> list[Path]:
        """All files that its description and its weights may come from, in a stable order."""
        location = Path(self.path)
        if location.is_dir():
            return sorted(path for path in location.iterdir() if path.is_file())
        return part_paths(location)

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
        return sum(math.prod(self.format.shape(self.source, key)) for key in self._used())

    @property
    def quantized(self) -> bool:
        """Whether matrices are stored in a form that native kernels multiply."""
        return bool(self._schemes(self.format.packing()))

    @property
    def keeps_blocks(self) -> bool:
        """Whether such matrices stay as they are."""
        return self.format.packs

    @property
    def rounds_activations(self) -> bool:
        """Whether activations are rounded to int8 for them: integers that stay as they are."""
        return not self.format.wide_activations and any(
            scheme.codes == "integer" for scheme in self._schemes(self.format)
        )

    def quantized_at_load(self, method: str) -> Checkpoint:
        """The same dense checkpoint with its matrices rounded by `method` while they are read."""
        names = self.spec.names
        return replace(self, format=AtLoadFormat(method, (names.embedding, names.head)))

    def keeping_blocks(self, *, wide_activations: bool = False) -> Checkpoint:
        """The same checkpoint with its quantized matrices left as stored."""
        if not self.quantized:
            return self
        return replace(self, format=self.format.packing(wide_activations=wide_activations))

    def partition(self, rank: int, world_size: int) -> Partition:
        """What rank `rank` of `world_size` holds.

        Raises:
            UsageError: the model does not divide into so many ranks.
        """
        return Partition.of(
            self.spec, rank, world_size, lambda key: self.format.column_unit(self.source, key)
        )

    def weights_bytes(self, dtype: torch.dtype, partition: Partition | None = None) -> int:
        """Bytes the decoder's weights and rotary tables take once built in `dtype` and packed.

        With a partition, those of its rank.
        """
        part = partition or self.partition(0, 1)
        ropes = {layer.attention.rope for layer in self.spec.layers}
        tables = sum(rope.max_positions * rope.head_dim for rope in ropes)
        return tables * dtype.itemsize + sum(
            self._stacked_bytes(keys, dtype, part) for keys in self._stacks()
        )

    def _stacks(self) -> list[list[str]]:
        """The used tensors; those that are stacked into one matrix stand together."""
        names, left, stacks = self.spec.names, dict.fromkeys(self._used()), []
        for index in range(len(self.spec.layers)):
            prefix = names.layer.format(index=index)
            for parts in ((names.q, names.k, names.v), (names.gate, names.up)):
                keys = [f"{prefix}{part}.weight" for part in parts]
                if all(key in left for key in keys):
                    stacks.append(keys)
                    for key in keys:
                        del left[key]
        return stacks + [[key] for key in left]

    def _stacked_bytes(self, keys: list[str], dtype: torch.dtype, part: Partition) -> int:
        shapes = [part.shape(key, self.format.shape(self.source, key)) for key in keys]
        scheme = None
        if len(shapes[0]) == 2:
            scheme = self.format.scheme(self.source, keys, part.shard(keys[0]))
        if scheme is not None:
            return matrix_bytes(scheme, sum(shape[0] for shape in shapes), shapes[0][1])
        return sum(map(math.prod, shapes)) * dtype.itemsize

    def _schemes(self, format: Format) -> set[GroupScheme]:
        found = {format.scheme(self.source, [key]) for key in self._used()}
        return {scheme for scheme in found if scheme is not None}

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
        stored = set(self.format.names(self.source)) - unneeded
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
        config = _with_quantization(config, location)
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


def _with_quantization(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add what older tools wrote into a file of its own."""
    if config.get("quantization_config") or config.get("compression_config"):
        return config
    for name in _QUANTIZATION_FILES:
        found = _read_json(folder / name, optional=True)
        if found:
            return {**config, "quantization_config": found}
    return config


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
