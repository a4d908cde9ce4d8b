"""Quantizers and packers as the formats' documents describe them, element by element in NumPy.

Each takes a matrix [outputs, inputs] and gives the tensors that a checkpoint holds for it, by the
ending of their names, and the matrix in float64 that they stand for. Straightforward, slow, and
sharing no line with what is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class Packed:
    tensors: dict[str, torch.Tensor]
    meaning: Array  # [outputs, inputs] float64


Packer = Callable[[Array], Packed]


def pack_bits(codes: Array, bits: int) -> Array:
    """[n, m] unsigned codes -> int32 [n, m * bits / 32], a stream of bits from the lowest on."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns * bits // 32), dtype=np.uint32)
    for column in range(columns):
        for bit in range(bits):
            at = column * bits + bit
            value = (codes[:, column].astype(np.uint32) >> np.uint32(bit)) & np.uint32(1)
            words[:, at // 32] |= value << np.uint32(at % 32)
    return words.view(np.int32)


def groups_of(inputs: int, group: int, seed: int | None) -> Array:
    """The group of each input, out of order if there is a seed."""
    index = np.arange(inputs) // group
    return index if seed is None else np.random.default_rng(seed).permutation(index)


def rounded(
    weight: Array, bits: int, index: Array, symmetric: bool, dtype: type = np.float16
) -> tuple[Array, Array, Array]:
    """Codes [outputs, inputs], scales and zero points [outputs, groups]."""
    outputs, _ = weight.shape
    groups = int(index.max()) + 1
    codes = np.zeros(weight.shape, dtype=np.int64)
    scales = np.zeros((outputs, groups), dtype=dtype)
    zeros = np.full((outputs, groups), 1 << (bits - 1), dtype=np.int64)
    top = (1 << bits) - 1
    for group in range(groups):
        part = weight[:, index == group]
        if symmetric:
            scales[:, group] = np.abs(part).max(1) / (top // 2)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.clip(np.round(-low / scales[:, group].astype(float)), 0, top)
        steps = np.round(part / scales[:, group, None].astype(float)) + zeros[:, group, None]
        codes[:, index == group] = np.clip(steps, 0, top)
    return codes, scales, zeros


def meaning(codes: Array, scales: Array, zeros: Array, index: Array) -> Array:
    return (codes - zeros[:, index]) * scales[:, index].astype(np.float64)


def gptq(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    shuffle: int | None = None,
    with_index: bool = True,
) -> Packer:
    def pack(weight: Array) -> Packed:
        size = weight.shape[1] if group < 0 else group
        index = groups_of(weight.shape[1], size, shuffle)
        codes, scales, zeros = rounded(weight, bits, index, symmetric)
        # Version 1 as its tools did it: one less, in words, where a zero borrows from the next.
        words = pack_bits(zeros.T, bits)
        if version == 1 and bits == 3:
            words = pack_bits((zeros.T - 1) % 8, bits)
        elif version == 1:
            ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
            words = (words.view(np.uint32) - ones).view(np.int32)
        tensors = {
            "qweight": torch.from_numpy(pack_bits(codes, bits).T.copy()),
            "qzeros": torch.from_numpy(words),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        if with_index:
            tensors["g_idx"] = torch.from_numpy(index.astype(np.int32))
        return Packed(tensors, meaning(codes, scales, zeros, index))

    return pack


def awq(group: int = 32) -> Packer:
    def interleaved(values: Array) -> Array:
        """[n, outputs] -> int32 [n, outputs / 8]; nibble i of a word is output ORDER[i] of it."""
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        mixed = values.reshape(len(values), -1, 8)[:, :, order].reshape(len(values), -1)
        return pack_bits(mixed, 4)

    def pack(weight: Array) -> Packed:
        index = groups_of(weight.shape[1], group, None)
        codes, scales, zeros = rounded(weight, 4, index, symmetric=False)
        tensors = {
            "qweight": torch.from_numpy(interleaved(codes.T)),
            "qzeros": torch.from_numpy(interleaved(zeros.T)),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        return Packed(tensors, meaning(codes, scales, zeros, index))

    return pack


def float8(block: tuple[int, int], scale_name: str, shape: str = "grid") -> Packer:
    """E4M3 with a scale for each block; `shape` is that of the scales: grid, column or scalar."""

    def pack(weight: Array) -> Packed:
        rows, columns = weight.shape
        high, wide = (block[0] or rows), (block[1] or columns)
        scales = np.zeros((-(-rows // high), -(-columns // wide)), dtype=np.float32)
        codes, means = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), np.zeros(weight.shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                scale = scales[i, j] = np.abs(weight[at]).max() / 448
                part = torch.from_numpy(weight[at] / scale).clamp(-448, 448)
                codes[at] = part.float().to(torch.float8_e4m3fn)
                means[at] = codes[at].double().numpy() * np.float64(scale)
        stored = torch.from_numpy(scales)
        if shape == "scalar":
            stored = stored.reshape(())
        return Packed({"weight": codes, scale_name: stored}, means)

    return pack


def mxfp4() -> Packer:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = np.array(values + [-value for value in values])

    def pack(weight: Array) -> Packed:
        rows, columns = weight.shape
        blocks = weight.reshape(rows, -1, 32)
        exponents = np.floor(np.log2(np.abs(blocks).max(-1))).astype(int) - 2
        scaled = blocks / 2.0 ** exponents[..., None]
        codes = np.abs(scaled[..., None] - table).argmin(-1)
        packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
        tensors = {
            "_blocks": torch.from_numpy(packed),
            "_scales": torch.from_numpy((exponents + 127).astype(np.uint8)),
        }
        means = (table[codes] * 2.0 ** exponents[..., None]).reshape(rows, columns)
        return Packed(tensors, means)

    return pack
