"""Small unsigned integers packed into 32-bit words, lowest bits first, as GPTQ and its heirs do."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], in the order of bits.

    Fields of 2, 4 and 8 bits lie within a word; those of 3 bits may straddle two, so that three
    words hold 32 of them.
    """
    if bits == 3:
        return _unpack_three(words)
    data = words.contiguous().view(torch.uint8)  # little-endian: byte i holds bits 8 i and up
    if bits == 8:
        return data
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    fields = (data.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(-2)


def _unpack_three(words: Tensor) -> Tensor:
    triples = words.reshape(*words.shape[:-1], -1, 3).long() & 0xFFFFFFFF
    low = triples[..., 0] | (triples[..., 1] << 32)  # 64 bits; the top one ends field 21
    high = (low >> 32) & 0xFFFFFFFF | (triples[..., 2] << 32)
    first = [(low >> (3 * i)) & 7 for i in range(20)]
    # Fields 20 to 31 begin at bit 60: bit 28 of the words one and two.
    second = [(high >> (3 * i - 32)) & 7 for i in range(20, 32)]
    return torch.stack([*first, *second], dim=-1).flatten(-2).to(torch.uint8)
