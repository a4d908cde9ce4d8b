"""Every operation in plain, device-agnostic torch: the oracle of all kernels, and the fallback.

Correct first, but this is also what runs until a native kernel takes over, so nothing here loops
over tokens, and decodes are batched over sequences. Rounds between steps where `transformers`
does, which keeps bfloat16 results next to the oracle's. Signatures: `ops.Ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_cli.kernels.kv_rows import decode, encode
from tgi_cli.kernels.philox import gumbel_noise, gumbel_noise_at

#: Scores of a prompt that are in memory at once where attention has to hold them: a GPU's kernels
#: that need not take 16-bit numbers alone, and no kernel has caps, sinks or slopes.
SCORES_AT_ONCE = 1 << 26

__all__ = [
    "add_rms_norm",
    "embed",
    "gelu_tanh_mul",
    "gumbel_noise",
    "gumbel_noise_at",
    "linear",
    "lora_add",
    "paged_attention",
    "rms_norm",
    "rope_store",
    "silu_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(weight.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `Ops.add_rms_norm`."""
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `Ops.linear`."""
    return F.linear(x, weight, bias)


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, rows: Tensor) -> None:
    """See `Ops.lora_add`."""
    shrunk = x[rows].float() @ a.float().T * scale
    y[rows] = (y[rows].float() + shrunk @ b.float()).to(y.dtype)


def embed(token_ids: Tensor, table: Tensor, scale: float | None = None) -> Tensor:
    """See `Ops.embed`."""
    rows = F.embedding(token_ids, table)
    return rows if scale is None else rows * scale


def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """See `Ops.rope_store`."""
    cos, sin = rope_table[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, n/2] each
    _rotate(q, cos, sin)
    _rotate(k, cos, sin)
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    for cache, new in ((k_cache, k), (v_cache, v)):
        rows = encode(new, cache.dtype).flatten(1)
        if cache.dtype.itemsize == 1:  # torch copies no rows of 8-bit floats
            cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
        cache.view(num_slots, -1).index_copy_(0, slot_mapping, rows)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(rotated)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Ops.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """See `Ops.gelu_tanh_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """See `Ops.paged_attention`: decodes in padded batches, longer queries one by one."""
    if max(query_lens) == 1 and max(key_lens) <= 2 * min(key_lens):
        return _decode(
            q, k_cache, v_cache, block_tables, seq_lens, min(key_lens), max(key_lens),
            scale=scale, window=window, softcap=softcap, sinks=sinks, slopes=slopes,
        )  # fmt: skip
    out = torch.empty_like(q)
    # Decodes are grouped by length up to a factor of two, so that padding at most doubles them.
    buckets: dict[int, list[int]] = {}
    start = 0
    starts = []
    for sequence, (num_queries, num_keys) in enumerate(zip(query_lens, key_lens, strict=True)):
        starts.append(start)
        if num_queries == 1:
            buckets.setdefault(num_keys.bit_length(), []).append(sequence)
        else:
            rows = slice(start, start + num_queries)
            out[rows] = _prefill(
                q[rows], k_cache, v_cache, block_tables[sequence], num_keys,
                scale=scale, window=window, softcap=softcap, sinks=sinks, slopes=slopes,
            )  # fmt: skip
        start += num_queries
    for members in buckets.values():
        chosen = torch.tensor(members, device=q.device)
        rows_of = torch.tensor([starts[i] for i in members], device=q.device)
        out[rows_of] = _decode(
            q[rows_of], k_cache, v_cache, block_tables[chosen], seq_lens[chosen],
            min(key_lens[i] for i in members), max(key_lens[i] for i in members),
            scale=scale, window=window, softcap=softcap, sinks=sinks, slopes=slopes,
        )  # fmt: skip
    return out


def _prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    num_keys: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """One sequence: its last q.shape[0] positions against all keys in sight."""
    num_queries, num_heads, head_dim = q.shape
    block_size = k_cache.shape[1]
    start = num_keys - num_queries
    low = 0 if window is None else max(0, start - window + 1)
    first_block = low // block_size
    blocks = block_table[first_block : -(-num_keys // block_size)]
    base = first_block * block_size
    # [1, K, keys, D] in float32: fp32 is as fast as bf16 in torch's CPU attention, and exact.
    keys, values = (
        decode(_gather(cache, blocks).view(-1, *cache.shape[2:]), head_dim)[
            low - base : num_keys - base
        ].transpose(0, 1)[None]
        for cache in (k_cache, v_cache)
    )
    query_positions = torch.arange(start, num_keys, device=q.device)[:, None]
    key_positions = torch.arange(low, num_keys, device=q.device)
    plain = softcap is None and sinks is None and slopes is None
    step = num_queries
    if not (plain and q.device.type == "cpu"):
        step = max(1, SCORES_AT_ONCE // (num_heads * len(key_positions)))
    out = torch.empty_like(q)
    for first in range(0, num_queries, step):
        rows = slice(first, first + step)
        queries = q[rows].transpose(0, 1)[None].float()  # [1, H, queries, D]
        mask = key_positions <= query_positions[rows]
        if window is not None:
            mask &= key_positions > query_positions[rows] - window
        if plain:
            part = F.scaled_dot_product_attention(
                queries, keys, values, mask, scale=scale, enable_gqa=True
            )[0]
        else:
            grouped = queries.view(1, keys.shape[1], -1, queries.shape[2], head_dim)
            scores = (grouped * scale) @ keys.transpose(-1, -2).unsqueeze(2)
            distances = (key_positions - query_positions[rows])[None, None, None]
            weights = _softmax(scores, mask, distances, softcap, sinks, slopes)
            part = (weights @ values.unsqueeze(2)).flatten(1, 2)[0]
        out[rows] = part.transpose(0, 1)
    return out


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    min_keys: int,
    max_keys: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """One query for each sequence, [S, H, D], over keys gathered and padded to the longest."""
    num_seqs, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    if window is not None and max_keys > window:
        blocks, positions = _window_blocks(block_tables, seq_lens, window, block_size)
        visible = (positions >= seq_lens[:, None] - window) & (positions < seq_lens[:, None])
        common = 0
    else:
        blocks = block_tables[:, : -(-max_keys // block_size)]
        positions = torch.arange(blocks.shape[1] * block_size, device=q.device)[None]
        visible = positions < seq_lens[:, None]
        common = min_keys  # slots before the shortest sequence's end are visible to all
    keys, values = (
        _gather(cache, blocks).view(num_seqs, -1, *cache.shape[2:]) for cache in (k_cache, v_cache)
    )
    keys, values = (  # [S, K, slots, D]: one pass converts and transposes
        torch.empty((num_seqs, num_kv_heads, part.shape[1], head_dim), device=q.device).copy_(
            (part if part.dtype.itemsize > 1 else decode(part, head_dim)).transpose(1, 2)
        )
        for part in (keys, values)
    )
    # Masked scores are overwritten, but a weight of 0 times NaN is NaN: stale values go.
    values[:, :, common:].masked_fill_(~visible[:, None, common:, None], 0.0)
    grouped = q.view(num_seqs, num_kv_heads, -1, head_dim).float() * scale
    scores = grouped @ keys.transpose(-1, -2)  # [S, K, H/K, slots]
    mask = visible[:, None, None, None, :]
    distances = (positions - (seq_lens[:, None] - 1))[:, None, None, None]
    weights = _softmax(scores.unsqueeze(3), mask, distances, softcap, sinks, slopes).squeeze(3)
    out = weights @ values
    return out.reshape(num_seqs, num_heads, head_dim).to(q.dtype)


def _window_blocks(
    block_tables: Tensor, seq_lens: Tensor, window: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """The blocks a window touches, [S, columns], and the positions of their slots, [S, slots].

    It spans the same few columns of every table but begins elsewhere in each.
    """
    low = (seq_lens - window).clamp(min=0)
    num_columns = -(-window // block_size) + 1
    columns = (low // block_size)[:, None] + torch.arange(num_columns, device=seq_lens.device)
    offsets = torch.arange(block_size, device=seq_lens.device)
    positions = (columns[:, :, None] * block_size + offsets).flatten(1)
    # Columns past the table lie past the last key too: read any block, see none of it.
    inside = columns.clamp(max=block_tables.shape[1] - 1).long()
    return block_tables.gather(1, inside), positions


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """Whole blocks of a cache: many times faster as an embedding than as indexing."""
    if cache.dtype.itemsize > 1:
        return F.embedding(blocks, cache.view(cache.shape[0], -1))
    whole = F.embedding(blocks, cache.view(torch.uint8).view(cache.shape[0], -1))
    return whole.view(cache.dtype)


def _softmax(
    scores: Tensor,
    visible: Tensor,
    distances: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """Softmax of scores [S, K, H/K, queries, keys] over the visible keys and the sink.

    `distances` are key less query positions, [S, 1, 1, queries, keys] or of a shape that expands.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes.float().view(1, scores.shape[1], -1, 1, 1) * distances
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float().view(1, scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
