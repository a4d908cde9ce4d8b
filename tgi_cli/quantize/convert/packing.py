"""Small unsigned numbers packed into 32-bit words, as all integer checkpoint layouts store them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: AWQ's order: field i of a word holds the element at this place among its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack the last dimension of `values`, 0 ... 2**bits - 1: [..., n] -> int32 [..., n * bits/32].

    Field j of a word, its bits `bits * j` and up, holds element `order[j]` of the word's elements;
    element j without an order.
    """
    fields = 32 // bits
    words = values.reshape(*values.shape[:-1], -1, fields).to(torch.int64)
    if order is not None:
        words = words[..., list(order)]
    shifts = torch.arange(fields, device=values.device) * bits
    packed = (words << shifts).sum(-1)
    # The same 32 bits as a signed number.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
