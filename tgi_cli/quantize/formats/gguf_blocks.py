"""Decoders of GGUF's tensor types: blocks of bytes to float32, in torch, many blocks at a time.

The layouts are those of ggml (llama.cpp, `ggml-common.h`): legacy types hold 32 values under one
half-precision scale (`_0`) or scale and minimum (`_1`); K types hold 256 values as 8 or 16 groups
with small integer scales under a super-scale. Every decoder multiplies and adds in float32 in the
order ggml does, so values are equal bit for bit. Types that are codes with a scale for each group
can be given as such without loss, for kernels that multiply them. Knows no file and no tensor name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import (
    INT4,
    INT4_MINIMUM,
    INT4_MINIMUM_FLOAT,
    INT8,
    INT8_HALF_GROUPS,
    INT8_MINIMUM_FLOAT,
    Grouped,
    GroupScheme,
)

# Elements decoded at a time: intermediates stay in cache and memory beyond the result bounded.
CHUNK_ELEMENTS = 1 << 18

# IQ4_NL's sixteen levels (ggml's `kvalues_iq4nl`).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One tensor type: `block_size` elements in `type_size` bytes; `code` is its number in files.

    `decode` takes uint8 [blocks, type_size] and gives float32 [blocks, block_size]; `dtype` is
    set for types that are plain floats which torch can hold as they are. `split` gives the same
    blocks as groups of `scheme`.
    """

    name: str
    code: int
    block_size: int
    type_size: int
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None
    scheme: GroupScheme | None = None
    split: Callable[[Tensor], Grouped] | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` elements, which are whole blocks."""
        if columns % self.block_size:
            raise ValueError(f"{columns} columns are no multiple of {self.name}'s block size")
        return columns // self.block_size * self.type_size


def dequantize(
    packed: Tensor,
    kind: BlockType,
    dtype: torch.dtype = torch.float32,
    columns: tuple[int, int] | None = None,
) -> Tensor:
    """Decode uint8 rows [rows, row_bytes] to a new [rows, columns] in `dtype`.

    `columns` limits the result to a range, which need not lie on block boundaries.
    """
    rows, row_bytes = packed.shape
    if row_bytes % kind.type_size:
        raise ValueError(f"{row_bytes} bytes are no whole number of {kind.name} blocks")
    start, end = columns or (0, row_bytes // kind.type_size * kind.block_size)
    first, last = start // kind.block_size, -(-end // kind.block_size)
    packed = packed[:, first * kind.type_size : last * kind.type_size]
    decoded_columns = (last - first) * kind.block_size
    skip = start - first * kind.block_size
    out = torch.empty(rows, end - start, dtype=dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, decoded_columns))
    for row in range(0, rows, step):
        blocks = packed[row : row + step].reshape(-1, kind.type_size)
        values = kind.decode(blocks).view(-1, decoded_columns)
        out[row : row + step] = values[:, skip : skip + end - start]
    return out


def regroup(packed: Tensor, kind: BlockType) -> Grouped:
    """Rows as groups of `kind.scheme`: uint8 [rows, row_bytes] to codes [rows, columns]."""
    assert kind.split is not None
    rows = len(packed)
    grouped = kind.split(packed.reshape(-1, kind.type_size))
    return Grouped(
        grouped.codes.view(rows, -1),
        grouped.scales.reshape(rows, -1),
        None if grouped.minima is None else grouped.minima.reshape(rows, -1),
    )


def _half(blocks: Tensor, start: int) -> Tensor:
    """Read the half-precision number at byte `start` of every block: float32 [blocks, 1]."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _fields(packed: Tensor, width: int, *shifts: int) -> Tensor:
    """Cut bytes into fields, plane by plane: all at the first shift, then all at the next.

    `packed` [blocks, n * width] gives [blocks, n * len(shifts) * width], n groups of `width` bytes
    each holding len(shifts) planes. The bits above a field are cleared.
    """
    shift = torch.tensor(shifts, dtype=torch.uint8).view(-1, 1)
    mask = (1 << (shifts[1] - shifts[0])) - 1
    groups = packed.reshape(packed.shape[0], -1, 1, width)
    return ((groups >> shift) & mask).view(packed.shape[0], -1)


def _bits(packed: Tensor) -> Tensor:
    """Expand each byte to its eight bits, lowest first: [blocks, n] to [blocks, 8 n]."""
    return _fields(packed, 1, 0, 1, 2, 3, 4, 5, 6, 7)


def _grouped(values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Apply [blocks, groups] scales and offsets to [blocks, groups * n] values."""
    grouped = values.float().view(*scale.shape, -1) * scale.unsqueeze(-1)
    if offset is not None:
        grouped -= offset.unsqueeze(-1)
    return grouped


def _half_as_is(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].view(torch.float16)


def _q4_0(blocks: Tensor) -> Grouped:
    return Grouped(_fields(blocks[:, 2:], 16, 0, 4), _half_as_is(blocks, 0))


def _q4_1(blocks: Tensor) -> Grouped:
    codes = _fields(blocks[:, 4:], 16, 0, 4)
    return Grouped(codes, _half_as_is(blocks, 0), _half_as_is(blocks, 2))


def _q5_0(blocks: Tensor) -> Grouped:
    value = _fields(blocks[:, 6:], 16, 0, 4) | (_bits(blocks[:, 2:6]) << 4)
    return Grouped(value + (128 - 16), _half_as_is(blocks, 0))


def _q5_1(blocks: Tensor) -> Grouped:
    value = _fields(blocks[:, 8:], 16, 0, 4) | (_bits(blocks[:, 4:8]) << 4)
    return Grouped(value, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Grouped:
    return Grouped(blocks[:, 2:] ^ 128, _half_as_is(blocks, 0))


def _iq4_nl(blocks: Tensor) -> Grouped:
    index = _fields(blocks[:, 2:], 16, 0, 4).int()
    codes = torch.tensor(IQ4_LEVELS, dtype=torch.int32).add(128).byte()
    return Grouped(codes.index_select(0, index.view(-1)).view_as(index), _half_as_is(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]  # low nibble: scale, high nibble: minimum, of 16 values
    scale = _half(blocks, 80) * (scales & 15)
    minimum = _half(blocks, 82) * (scales >> 4)
    return _grouped(_fields(blocks[:, 16:80], 32, 0, 2, 4, 6), scale, minimum)


def _q3_k(blocks: Tensor) -> Grouped:
    low = _fields(blocks[:, 32:96], 32, 0, 2, 4, 6)
    high = _fields(blocks[:, :32], 32, 0, 1, 2, 3, 4, 5, 6, 7)
    # Sixteen 6-bit scales: four low bits in bytes 0-7, two high bits in bytes 8-11.
    packed = blocks[:, 96:108]
    scale = _fields(packed[:, :8], 8, 0, 4) | (_fields(packed[:, 8:], 4, 0, 2, 4, 6) << 4)
    # A clear high bit stands for minus four.
    scales = _half(blocks, 108) * (scale.float() - 32)
    return Grouped((low | (high << 2)) + (128 - 4), scales)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Split Q4_K's and Q5_K's twelve bytes into eight 6-bit scales and eight 6-bit minimums.

    The first four of each are the low six bits of bytes 0-3 and 4-7; the last four have their low
    nibbles in bytes 8-11 and their top two bits above the first four.
    """
    scales, minimums, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat([scales & 63, (low & 15) | ((scales >> 6) << 4)], dim=1),
        torch.cat([minimums & 63, (low >> 4) | ((minimums >> 6) << 4)], dim=1),
    )


def _q4_k(blocks: Tensor) -> Grouped:
    scale, minimum = _k_scales(blocks[:, 4:16])
    value = _fields(blocks[:, 16:], 32, 0, 4)
    return Grouped(value, _half(blocks, 0) * scale, -_half(blocks, 2) * minimum)


def _q5_k(blocks: Tensor) -> Grouped:
    scale, minimum = _k_scales(blocks[:, 4:16])
    high = _fields(blocks[:, 16:48], 32, 0, 1, 2, 3, 4, 5, 6, 7)
    value = _fields(blocks[:, 48:], 32, 0, 4) | (high << 4)
    return Grouped(value, _half(blocks, 0) * scale, -_half(blocks, 2) * minimum)


def _q6_k(blocks: Tensor) -> Grouped:
    low = _fields(blocks[:, :128], 64, 0, 4)
    high = _fields(blocks[:, 128:192], 32, 0, 2, 4, 6)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return Grouped((low | (high << 4)) + (128 - 32), scale)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.view(dtype).float()


def _codes(
    name: str,
    code: int,
    block_size: int,
    type_size: int,
    scheme: GroupScheme,
    split: Callable[[Tensor], Grouped],
) -> BlockType:
    def decode(blocks: Tensor) -> Tensor:
        return scheme.decode(split(blocks))

    return BlockType(name, code, block_size, type_size, decode, scheme=scheme, split=split)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, _plain(torch.float32), torch.float32),
        BlockType("F16", 1, 1, 2, _plain(torch.float16), torch.float16),
        BlockType("BF16", 30, 1, 2, _plain(torch.bfloat16), torch.bfloat16),
        BlockType("F64", 28, 1, 8, _plain(torch.float64)),
        _codes("Q4_0", 2, 32, 18, INT4, _q4_0),
        _codes("Q4_1", 3, 32, 20, INT4_MINIMUM, _q4_1),
        _codes("Q5_0", 6, 32, 22, INT8, _q5_0),
        _codes("Q5_1", 7, 32, 24, INT8_MINIMUM_FLOAT, _q5_1),
        _codes("Q8_0", 8, 32, 34, INT8, _q8_0),
        BlockType("Q2_K", 10, 256, 84, _q2_k),
        _codes("Q3_K", 11, 256, 110, INT8_HALF_GROUPS, _q3_k),
        _codes("Q4_K", 12, 256, 144, INT4_MINIMUM_FLOAT, _q4_k),
        _codes("Q5_K", 13, 256, 176, INT8_MINIMUM_FLOAT, _q5_k),
        _codes("Q6_K", 14, 256, 210, INT8_HALF_GROUPS, _q6_k),
        _codes("IQ4_NL", 20, 32, 18, INT8, _iq4_nl),
    )
}
