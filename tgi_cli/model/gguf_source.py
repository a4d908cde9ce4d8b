"""GGUF checkpoints as a `TensorSource` under Hugging Face tensor names and values.

llama.cpp's converter renames every tensor and changes some: it reorders the rows of `llama`'s
query and key projections and stores Gemma's norm weights plus one. Both are undone here, so that
families see the original checkpoint. An architecture is one row of `ARCHITECTURES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.gguf_metadata import GGUFMetadata, TensorEntry, read_gguf_metadata
from tgi_cli.model.mapped_file import MappedFile
from tgi_cli.quantize.formats.base import WHOLE, Shard
from tgi_cli.quantize.formats.gguf import PackedTensor
from tgi_cli.quantize.formats.gguf_blocks import BLOCK_TYPES, BlockType

DOWNLOAD_AGAIN = "the file is incomplete or damaged; fetch it again"
TYPES_BY_CODE = {kind.code: kind for kind in BLOCK_TYPES.values()}
ROPE_FREQS = "rope_freqs.weight"
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

OUTSIDE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How llama.cpp stores one architecture: names inside a block, and changed values."""

    block_names: Mapping[str, str]
    rotary_pairs: bool = False  # rows of q and k are interleaved for ggml's "normal" rope
    norm_offset: float = 0.0  # added to every norm weight


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(BLOCK_NAMES, rotary_pairs=True),
    "qwen2": GgufArchitecture(BLOCK_NAMES),
    "qwen3": GgufArchitecture(BLOCK_NAMES | HEAD_NORMS),
    "gemma3": GgufArchitecture(
        BLOCK_NAMES
        | HEAD_NORMS
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
}


class _Part:
    """One mapped file: the header, checked, and its tensors' bytes as stored."""

    def __init__(self, path: Path) -> None:
        self.header: GGUFMetadata = read_gguf_metadata(str(path))
        self.file = MappedFile(path)
        for entry in self.header.tensors:
            if entry.ggml_type not in TYPES_BY_CODE:
                raise UnsupportedModel(
                    f"tensor `{entry.name}` of `{path.name}` is stored as "
                    f"{GGMLQuantizationType(entry.ggml_type).name}, which this build does not "
                    f"read; it reads {', '.join(BLOCK_TYPES)}",
                    hint="use another quantization of the model, for example Q4_K_M or Q8_0",
                )
            if not entry.num_bytes or not entry.shape:
                raise CheckpointError(
                    f"tensor `{entry.name}` of `{path}` is empty", hint=DOWNLOAD_AGAIN
                )

    def stored(self, entry: TensorEntry) -> PackedTensor:
        """View one tensor in the mapped file; nothing is read before it is touched."""
        kind = TYPES_BY_CODE[entry.ggml_type]
        flat = self.file.view(entry.offset, entry.num_bytes)
        return PackedTensor(kind, entry.shape, flat.view(-1, kind.row_bytes(entry.shape[-1])))


class GgufSource:
    """The tensors of a GGUF file, or of all parts of a split one, by Hugging Face name.

    `metadata` is the first part's. Headers are checked at once, data is read by `read` and
    `packed` alone.

    Raises:
        CheckpointError: a part is missing, truncated or damaged.
        UnsupportedModel: the architecture, one of its tensors or a tensor type is unknown here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        parts = [_Part(part) for part in part_paths(self.path)]
        self.metadata = parts[0].header
        self.architecture = str(self.metadata["general.architecture"])
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                f"`{self.path.name}` is of architecture `{self.architecture}`, which is not read "
                f"from GGUF; supported: {', '.join(sorted(ARCHITECTURES))}",
                hint="use the safetensors checkpoint of the model if its family is supported",
            )
        self._rules = ARCHITECTURES[self.architecture]
        self._entries: dict[str, tuple[_Part, TensorEntry]] = {}
        self.rope_freqs: Tensor | None = None  # float32 divisors of the rotary frequencies
        for part in parts:
            for entry in part.header.tensors:
                if entry.name == ROPE_FREQS:
                    self.rope_freqs = part.stored(entry).unpack()
                    continue
                key = self._hf_name(entry.name)
                if key in self._entries:
                    raise CheckpointError(
                        f"`{self.path}` has tensor `{entry.name}` twice", hint=DOWNLOAD_AGAIN
                    )
                self._entries[key] = (part, entry)

    def _hf_name(self, name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        block, _, inner = stem.removeprefix("blk.").partition(".")
        if stem in OUTSIDE_NAMES:
            translated: str | None = OUTSIDE_NAMES[stem]
        else:
            known = self._rules.block_names.get(inner) if stem.startswith("blk.") else None
            translated = f"model.layers.{block}.{known}" if known else None
        if translated is None or suffix not in ("weight", "bias"):
            raise UnsupportedModel(
                f"`{self.path.name}` has a tensor `{name}`, which `{self.architecture}` models do "
                "not have here",
                hint="the model is a variant that this build cannot run from GGUF",
            )
        return f"{translated}.{suffix}"

    def keys(self) -> Iterator[str]:
        """Names of all tensors, as Hugging Face calls them."""
        return iter(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Logical shape, from the header."""
        return self._entry(key)[1].shape

    def nbytes(self, key: str) -> int:
        """Bytes in the file."""
        return self._entry(key)[1].num_bytes

    def stored_dtype(self, key: str) -> str:
        """GGUF's name of the type (`F16`, `Q4_K`), from the header."""
        return self.block_type(key).name

    def block_type(self, key: str) -> BlockType:
        """The type, from the header."""
        return TYPES_BY_CODE[self._entry(key)[1].ggml_type]

    def read(self, key: str, shard: Shard = WHOLE) -> Tensor:
        """Read one tensor, or a shard of it: as stored if dense, else decoded to float32."""
        packed = self.packed(key)
        return packed.unpack(packed.kind.dtype or torch.float32, shard)

    def release(self, key: str) -> None:
        """Let the tensor's pages go."""
        part, entry = self._entry(key)
        part.file.release(entry.offset, entry.num_bytes)

    def packed(self, key: str) -> PackedTensor:
        """Give one tensor's blocks, rows in Hugging Face's order.

        A view of the file unless rows had to move; Gemma's norms are decoded to undo the offset.
        """
        part, entry = self._entry(key)
        tensor = part.stored(entry)
        stem = entry.name.rpartition(".")[0]
        if self._rules.rotary_pairs and stem.endswith((".attn_q", ".attn_k")):
            return self._halves(
                tensor, key, "head_count" if stem.endswith("q") else "head_count_kv"
            )
        if self._rules.norm_offset and stem.endswith("_norm"):
            values = tensor.unpack() - self._rules.norm_offset
            return PackedTensor(
                BLOCK_TYPES["F32"], entry.shape, values.view(1, -1).view(torch.uint8)
            )
        return tensor

    def _halves(self, tensor: PackedTensor, key: str, heads_key: str) -> PackedTensor:
        """Undo the interleaving of rotary pairs: x0, y0, x1, y1, ... to x0, x1, ..., y0, y1, ...

        ggml's rope turns neighbouring rows of a head together, Hugging Face's a row of the first
        half with one of the second. Whole rows move, so blocks stay as they are.
        """
        rows = tensor.shape[0]
        name = f"{self.architecture}.attention.{heads_key}"
        heads = self.metadata.get(
            name, self.metadata.get(f"{self.architecture}.attention.head_count")
        )
        if not isinstance(heads, int) or heads <= 0 or rows % (2 * heads):
            raise CheckpointError(
                f"tensor `{key}` has {rows} rows, which do not divide into `{name}` = {heads!r} "
                "heads of even size",
                hint=DOWNLOAD_AGAIN,
            )
        moved = tensor.data.view(heads, rows // heads // 2, 2, -1).transpose(1, 2)
        return PackedTensor(tensor.kind, tensor.shape, moved.reshape(tensor.data.shape))

    def _entry(self, key: str) -> tuple[_Part, TensorEntry]:
        try:
            return self._entries[key]
        except KeyError:
            raise CheckpointError(
                f"tensor `{key}` is missing from `{self.path}`", hint=DOWNLOAD_AGAIN
            ) from None


def part_paths(path: Path) -> list[Path]:
    """All files of the checkpoint: the file itself, or every part of a split one, in order."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"`{missing[0]}` is missing ({len(missing)} of {count} parts of `{path.name}`)",
            hint="put all parts of the model into one folder",
        )
    return parts
