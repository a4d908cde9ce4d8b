"""Adapters as PEFT writes them: checked against a model by headers, then read.

The names are those of the model's linear layers below `base_model.model.`; every tensor must have a
place, and its shape must fit. A rank of several reads its part alone: `lora_B` is cut where the
layer is cut along its outputs, `lora_A` where it is along its inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.model.adapter_config import AdapterConfig, read_adapter_config
from tgi_cli.model.lora import Adapter, LowRank, Target
from tgi_cli.model.partition import Partition
from tgi_cli.model.spec import DecoderSpec, LayerSpec, TensorNames
from tgi_cli.model.weights import SafetensorsSource
from tgi_cli.quantize.formats.base import WHOLE

WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
#: Where wrappers of a text model put its layers; an adapter may have been trained on another one.
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")


@dataclass(frozen=True, slots=True)
class _Module:
    """One module that an adapter changes: `name` as the model has it, `stored` as the file has."""

    name: str
    stored: str
    layer: int
    role: str  # q, k, v, o, gate, up or down


class OpenedAdapter:
    """An adapter's folder, checked against the model it is for; its data is not read yet.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        spec: the whole model.

    Raises:
        CheckpointError: files are missing or broken, or a tensor does not fit the model.
        UnsupportedModel: an adapter of a kind that is not served.
    """

    def __init__(self, folder: Path, spec: DecoderSpec) -> None:
        self.folder = folder
        self.config: AdapterConfig = read_adapter_config(folder)
        if not (folder / WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"`{folder}` has no {WEIGHTS_FILE}",
                hint="save the adapter with safetensors: PEFT's `save_pretrained` does",
            )
        self._source = SafetensorsSource(folder, file=WEIGHTS_FILE)
        self._spec = spec
        self._modules = self._found()
        for module in self._modules:
            self._check(module)

    def nbytes(self, dtype: torch.dtype, partition: Partition) -> int:
        """Memory of a rank's part, held in `dtype`."""
        elements = 0
        for module in self._modules:
            shard = partition.shard(f"{module.name}.weight")
            for side, cut in (("A", 1), ("B", 0)):
                shape = list(self._source.shape(_key(module, side)))
                if shard.dim == cut:
                    first, last = shard.bounds(shape[cut])
                    shape[cut] = last - first
                elements += shape[0] * shape[1]
        return elements * dtype.itemsize

    def load(self, partition: Partition, dtype: torch.dtype, device: torch.device) -> Adapter:
        """Read a rank's part."""
        local, parts = partition.local, dict[tuple[int, Target], list[LowRank]]()
        for module in self._modules:
            shard = partition.shard(f"{module.name}.weight")
            a = self._source.read(_key(module, "A"), shard if shard.dim == 1 else WHOLE)
            b = self._source.read(_key(module, "B"), shard if shard.dim == 0 else WHOLE)
            target, first = _place(module.role, local.layers[module.layer])
            parts.setdefault((module.layer, target), []).append(
                LowRank(
                    a=a.to(device=device, dtype=dtype, copy=True).contiguous(),
                    b=b.to(device=device, dtype=dtype).T.contiguous(),
                    scale=self.config.scale_of(module.name),
                    first=first,
                )
            )
        for each in parts.values():  # one order, whatever the file's
            each.sort(key=lambda part: part.first)
        return Adapter(parts)

    def _found(self) -> list[_Module]:
        found: dict[str, _Module] = {}
        sides: dict[str, set[str]] = {}
        for key in self._source.keys():  # noqa: SIM118 - a source, not a dict
            match = _KEY.fullmatch(key)
            module = None if match is None else _module(match["module"], self._spec)
            if match is None or module is None:
                raise UnsupportedModel(
                    f"tensor `{key}` of the adapter in `{self.folder}` has no place in the model",
                    hint="adapters on the attention's and the feed-forward part's linear layers "
                    "can be served",
                )
            found[match["module"]] = module
            sides.setdefault(match["module"], set()).add(match["side"])
        for stored, present in sides.items():
            if len(present) != 2:
                missing = "B" if "A" in present else "A"
                raise CheckpointError(
                    f"the adapter in `{self.folder}` lacks `{_key(found[stored], missing)}`"
                )
        if not found:
            raise CheckpointError(f"the adapter in `{self.folder}` has no tensors")
        return sorted(found.values(), key=lambda module: (module.layer, module.role))

    def _check(self, module: _Module) -> None:
        rank = self.config.rank_of(module.name)
        outputs, inputs = _shape(module.role, self._spec, self._spec.layers[module.layer])
        for side, expected in (("A", (rank, inputs)), ("B", (outputs, rank))):
            shape = self._source.shape(_key(module, side))
            if shape != expected:
                raise CheckpointError(
                    f"tensor `{_key(module, side)}` of the adapter in `{self.folder}` has shape "
                    f"{shape}, but the model and `adapter_config.json` ask for {expected}",
                    hint="the adapter was made for another model, or its files do not belong "
                    "together",
                )


def _key(module: _Module, side: str) -> str:
    return f"base_model.model.{module.stored}.lora_{side}.weight"


def _module(stored: str, spec: DecoderSpec) -> _Module | None:
    """What a module's name means in the model, None if it is no linear layer of the decoder."""
    match = re.fullmatch(r"(?P<prefix>.*?)layers\.(?P<index>\d+)\.(?P<stem>.+)", stored)
    if match is None or int(match["index"]) >= len(spec.layers):
        return None
    own = spec.names.layer.partition("layers.")[0]
    role = _roles(spec.names).get(match["stem"])
    if role is None or match["prefix"] not in (own, *_PREFIXES):
        return None
    index = int(match["index"])
    return _Module(spec.names.layer.format(index=index) + match["stem"], stored, index, role)


def _roles(names: TensorNames) -> dict[str, str]:
    return {getattr(names, role): role for role in ("q", "k", "v", "o", "gate", "up", "down")}


def _shape(role: str, spec: DecoderSpec, layer: LayerSpec) -> tuple[int, int]:
    """Outputs and inputs of a whole linear layer."""
    attention, hidden, feed = layer.attention, spec.hidden_size, layer.feed.intermediate_size
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    return {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (feed, hidden),
        "up": (feed, hidden),
        "down": (hidden, feed),
    }[role]


def _place(role: str, layer: LayerSpec) -> tuple[Target, int]:
    """Which of a rank's linear layers, and from which of its outputs on."""
    attention = layer.attention
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    places: dict[str, tuple[Target, int]] = {
        "q": ("qkv", 0),
        "k": ("qkv", queries),
        "v": ("qkv", queries + keys),
        "o": ("output", 0),
        "gate": ("gate_up", 0),
        "up": ("gate_up", layer.feed.intermediate_size),
        "down": ("down", 0),
    }
    return places[role]
