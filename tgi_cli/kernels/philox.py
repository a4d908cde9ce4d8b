"""Philox4x32-10 in int64 torch arithmetic, and the Gumbel noise drawn from it.

Counter-based: a value is a pure function of its key and counter, so noise for a token never
depends on the batch it is drawn in. Bit-exact definition in `ops.Ops.gumbel_noise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
#: Numbers that a GPU makes together; each takes some thirty bytes on the way.
_AT_ONCE = 1 << 21


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Ten rounds of Philox4x32 for broadcastable int64 words in [0, 2**32): [..., 4] int64."""
    shape = (counter[0] | counter[1] | counter[2] | counter[3] | key[0] | key[1]).shape
    # In place from here on: half the time of fresh tensors, since rows stay in the cache.
    c0, c1, c2, c3 = (word.expand(shape).clone() for word in counter)
    k0, k1 = key
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS):
        # The 64-bit products wrap in two's complement: the bits are those of the unsigned ones.
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(p0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        torch.bitwise_and(p1, _WORD, out=c1)
        torch.bitwise_and(p0, _WORD, out=c3)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """See `Ops.gumbel_noise`.

    On a CPU one row at a time, which stays in the processor's cache; on a GPU as many as are worth
    a launch.
    """
    quads = torch.arange(-(-vocab_size // 4), device=seeds.device)
    noise = torch.empty(len(seeds), vocab_size, device=seeds.device)
    step = 1 if seeds.device.type == "cpu" else max(1, _AT_ONCE // vocab_size)
    for row in range(0, len(seeds), step):
        rows = slice(row, row + step)
        bits = _bits(seeds[rows], positions[rows], quads[None])
        noise[rows] = _gumbel(bits.flatten(1)[:, :vocab_size])
    return noise


def gumbel_noise_at(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """See `Ops.gumbel_noise_at`."""
    bits = _bits(seeds, positions, token_ids >> 2)
    return _gumbel(bits.gather(-1, (token_ids & 3)[..., None]).squeeze(-1))


def _bits(seeds: Tensor, positions: Tensor, quads: Tensor) -> Tensor:
    """Random words [n, m, 4] for the id quads [n or 1, m] of each row."""
    rows, places = seeds[:, None], positions[:, None]
    counter = (quads, places & _WORD, (places >> 32) & _WORD, torch.zeros_like(places))
    return philox(counter, (rows & _WORD, (rows >> 32) & _WORD))


def _gumbel(bits: Tensor) -> Tensor:
    uniform = ((bits >> 9).double() + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_().float()
