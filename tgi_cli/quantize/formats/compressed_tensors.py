"""Checkpoints of the compressed-tensors library, which llm-compressor writes.

Read are W4A16 and W8A16 (`weight_packed` int32 [outputs, inputs * bits / 32], codes plus half their
range, `weight_scale` [outputs, groups], packed `weight_zero_point` where asymmetric), integers of 8
bits (`weight` int8), floats of 8 bits (`weight` E4M3, any scales) and MXFP4. What activations are
to be rounded to is not followed: see `docs/quantization.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgi_cli.errors import UnsupportedModel
from tgi_cli.quantize.formats.affine import AffineMatrix
from tgi_cli.quantize.formats.base import TensorSource
from tgi_cli.quantize.formats.bit_packing import unpack
from tgi_cli.quantize.formats.fp8 import fp8_matrix
from tgi_cli.quantize.formats.mxfp4 import BLOCK as MX_BLOCK
from tgi_cli.quantize.formats.mxfp4 import mxfp4_matrix
from tgi_cli.quantize.formats.packed import PackedFormat, StoredMatrix, tensor, wrong
from tgi_cli.quantize.formats.settings import Settings

_FORMS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
_STRATEGIES = ("tensor", "channel", "group", "block")
_BITS = (2, 4, 8)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_LINEAR = "Linear"


@dataclass(frozen=True, slots=True)
class WeightArguments:
    """One group of `config_groups`: which modules, and how their weights are rounded."""

    targets: tuple[str, ...]
    bits: int
    floats: bool
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int] | None

    def fits(self, module: str) -> int:
        """How well a module is meant: 2 by name or pattern, 1 by its class, 0 not at all."""
        for target in self.targets:
            if target == module or (target[:3] == "re:" and re.match(target[3:], module)):
                return 2
        return int(_LINEAR in self.targets)


class CompressedTensorsFormat(PackedFormat):
    """Made from a `quantization_config` (older: `compression_config`).

    Raises:
        UnsupportedModel: a form that is none of those above, such as sparse ones and NVFP4.
        CheckpointError: the configuration lacks something.
    """

    name = "compressed-tensors"
    endings = (
        ".weight",
        ".weight_packed",
        ".weight_scale",
        ".weight_zero_point",
        ".weight_shape",
        ".weight_g_idx",
    )
    marks = (".weight_packed", ".weight_scale")
    ignored = (
        *(".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point"),
        *(".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point"),
    )

    def __init__(self, config: dict[str, Any]) -> None:
        settings = Settings(config)
        form = settings.text("format", "dense")
        if form not in _FORMS:
            raise settings.refused("format", form, _FORMS)
        sparse = settings.section("sparsity_config")
        if sparse is not None and sparse.text("format", "dense") != "dense":
            raise sparse.refused("format", sparse.text("format"), ["dense"])
        self._groups = [_arguments(group) for group in settings.sections("config_groups").values()]

    def stored(self, source: TensorSource, key: str) -> StoredMatrix:
        """See `PackedFormat.stored`."""
        stem = self.stem(key)
        arguments = self._arguments_of(stem)
        if arguments.floats and stem + ".weight_packed" in source:
            return _mxfp4(source, stem, arguments)
        if arguments.floats:
            return fp8_matrix(source, stem + ".weight", stem + ".weight_scale", arguments.block)
        return _integers(source, stem, arguments)

    def _arguments_of(self, module: str) -> WeightArguments:
        found = max(self._groups, key=lambda group: group.fits(module), default=None)
        if found is None or not found.fits(module):
            raise wrong(
                module + ".weight_scale", "belongs to a module that no `config_groups` entry names"
            )
        return found


class IntegerMatrix(AffineMatrix):
    """One matrix of integers; `read` gives the codes of some outputs, unsigned."""

    def __init__(
        self,
        key: str,
        shape: tuple[int, int],
        arguments: WeightArguments,
        read: Callable[[int, int], Tensor],
        scales: Tensor,
        zeros: Tensor | None,
        index: Tensor | None,
    ) -> None:
        grouped = arguments.strategy == "group"
        super().__init__(
            key,
            shape,
            arguments.bits,
            arguments.group if grouped else shape[1],
            symmetric=zeros is None,
            scale=scales.dtype,
            index=index,
        )
        self._read, self._scales, self._zeros = read, scales, zeros

    def codes(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.codes`."""
        return self._read(start, end)

    def scales(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.scales`."""
        return self._scales[start:end]

    def zeros(self, start: int, end: int) -> Tensor:
        """See `AffineMatrix.zeros`."""
        assert self._zeros is not None
        return self._zeros[start:end]


def _integers(source: TensorSource, stem: str, arguments: WeightArguments) -> IntegerMatrix:
    bits, half = arguments.bits, 1 << (arguments.bits - 1)
    if stem + ".weight_packed" in source:
        words = tensor(source, stem + ".weight_packed", torch.int32)
        shape = _shape(source, stem, words, bits)

        def read(start: int, end: int) -> Tensor:
            return unpack(words[start:end], bits)[:, : shape[1]]
    else:
        codes = tensor(source, stem + ".weight", torch.int8)
        if codes.dim() != 2:
            raise wrong(stem + ".weight", f"has shape {tuple(codes.shape)}, no matrix")
        shape = (codes.shape[0], codes.shape[1])
        if bits < 8 and (int(codes.min()) < -half or int(codes.max()) >= half):
            raise wrong(stem + ".weight", f"holds numbers of more than {bits} bits")

        def read(start: int, end: int) -> Tensor:
            return (
                (codes[start:end] + half).to(torch.uint8)
                if bits < 8
                else _unsigned(codes, start, end)
            )

    rows, columns = shape
    groups = -(-columns // arguments.group) if arguments.strategy == "group" else 1
    allowed: list[tuple[int, ...]] = [(rows, groups)]
    if arguments.strategy == "channel":
        allowed.append((rows,))
    elif arguments.strategy == "tensor":
        allowed = [(), (1,), (1, 1)]
    key = stem + ".weight_scale"
    scales = tensor(source, key, _SCALES, *allowed).reshape(-1, groups).expand(rows, groups)
    zeros = None if arguments.symmetric else _zeros(source, stem, arguments, (rows, groups))
    return IntegerMatrix(
        key, shape, arguments, read, scales, zeros, _order(source, stem, shape[1], arguments)
    )


def _unsigned(codes: Tensor, start: int, end: int) -> Tensor:
    return codes[start:end].contiguous().view(torch.uint8) ^ 128


def _shape(source: TensorSource, stem: str, words: Tensor, bits: int) -> tuple[int, int]:
    key = stem + ".weight_shape"
    said = tensor(source, key, (torch.int64, torch.int32), (2,)).tolist()
    if words.dim() != 2 or words.shape != (said[0], -(-said[1] * bits // 32)):
        raise wrong(
            stem + ".weight_packed",
            f"has shape {tuple(words.shape)}, which holds no {said[0]} x {said[1]} matrix of "
            f"{bits} bits",
        )
    return said[0], said[1]


def _zeros(
    source: TensorSource, stem: str, arguments: WeightArguments, shape: tuple[int, int]
) -> Tensor:
    """Zero points as unsigned codes: [outputs, groups]."""
    key, bits, (rows, groups) = stem + ".weight_zero_point", arguments.bits, shape
    half = 1 << (bits - 1)
    found = source.read(key)
    if found.dtype == torch.int32:  # packed along the outputs
        words = tensor(source, key, torch.int32, (-(-rows * bits // 32), groups))
        return unpack(words.T, bits).T[:rows]
    plain = tensor(source, key, torch.int8, (rows, groups), (1,), (rows,))
    return (plain.reshape(-1, groups).int() + half).expand(rows, groups)


def _order(
    source: TensorSource, stem: str, columns: int, arguments: WeightArguments
) -> Tensor | None:
    """The group of every input where they are out of order."""
    key = stem + ".weight_g_idx"
    if key not in source:
        return None
    index = tensor(source, key, (torch.int32, torch.int64), (columns,)).long()
    size = arguments.group
    # All of -1 is how the library says that there is no order.
    if bool((index == -1).all()) or torch.equal(index, torch.arange(columns) // size):
        return None
    if int(index.min()) < 0 or int(index.max()) >= -(-columns // size):
        raise wrong(key, "names a group that does not exist")
    return index


def _mxfp4(source: TensorSource, stem: str, arguments: WeightArguments) -> StoredMatrix:
    if arguments.group != MX_BLOCK or stem + ".weight_global_scale" in source:
        raise UnsupportedModel(
            f"tensor `{stem}.weight_packed` holds 4-bit floats in groups of {arguments.group}, "
            f"and only MXFP4, groups of {MX_BLOCK}, is read",
            hint="use another checkpoint of the model",
        )
    packed = tensor(source, stem + ".weight_packed", torch.uint8)
    if packed.dim() != 2 or packed.shape[1] * 2 % MX_BLOCK:
        raise wrong(stem + ".weight_packed", f"has shape {tuple(packed.shape)}")
    groups = packed.shape[1] * 2 // MX_BLOCK
    scales = tensor(source, stem + ".weight_scale", torch.uint8, (packed.shape[0], groups))
    return mxfp4_matrix(stem + ".weight_scale", packed, scales)


def _arguments(group: Settings) -> WeightArguments:
    weights = group.section("weights")
    if weights is None:
        raise UnsupportedModel(
            f"{group.where} rounds activations alone, which this build does not follow",
            hint="use the unquantized checkpoint",
        )
    kind, bits = weights.text("type", "int"), weights.integer("num_bits", default=8)
    if kind not in ("int", "float"):
        raise weights.refused("type", kind, ["int", "float"])
    if bits not in (_BITS if kind == "int" else (4, 8)):
        raise weights.refused("num_bits", bits, _BITS if kind == "int" else (4, 8))
    strategy = weights.text("strategy", "tensor")
    if strategy not in _STRATEGIES or (strategy == "block" and kind == "int"):
        raise weights.refused("strategy", strategy, _STRATEGIES)
    size = weights.integer("group_size", default=0)
    if strategy == "group" and size < 1:
        raise weights.wrong("group_size", size, "a positive number")
    block = weights.get("block_structure") if strategy == "block" else None
    if strategy == "block" and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) for n in block)
    ):
        raise weights.wrong("block_structure", block, "a pair of whole numbers")
    return WeightArguments(
        targets=tuple(group.words("targets")),
        bits=bits,
        floats=kind == "float",
        symmetric=weights.flag("symmetric", True),
        strategy=strategy,
        group=size,
        block=None if block is None else (block[0], block[1]),
    )
