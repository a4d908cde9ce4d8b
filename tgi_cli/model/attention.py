"""Grouped-query attention over a paged cache, composed of operations at build.

Biases, q/k norms and windows are decided when it is built: the forward pass asks nothing. Knows
blocks only as tensors that it hands on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.ops import Ops
from tgi_cli.model.batch import Batch
from tgi_cli.model.linear import Linear, load_linear, load_summed_linear
from tgi_cli.model.loader import Loader
from tgi_cli.model.norm import Norm
from tgi_cli.model.spec import AttentionSpec, TensorNames


class HeadNorms:
    """RMS norms over each query and key head, before the rotation (Qwen3, Gemma 3)."""

    def __init__(self, q_norm: Norm, k_norm: Norm) -> None:
        self.q_norm = q_norm
        self.k_norm = k_norm

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize q [tokens, H, D] and k [tokens, K, D]."""
        return self.q_norm.forward(q), self.k_norm.forward(k)


class PlainHeads:
    """No norm: heads go to the rotation as they are."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return both unchanged."""
        return q, k


class Attention:
    """q, k and v in one matrix, rotation and store, attention, output."""

    def __init__(
        self,
        ops: Ops,
        spec: AttentionSpec,
        group: int,
        qkv: Linear,
        heads: HeadNorms | PlainHeads,
        output: Linear,
        rope_table: Tensor,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> None:
        self.ops = ops
        self.spec = spec
        self.group = group  # index into Batch.groups
        self.qkv = qkv
        self.heads = heads
        self.output = output
        self.rope_table = rope_table
        self.sinks = sinks  # [num_heads] float32
        self.slopes = slopes  # [num_heads] float32

    def forward(self, x: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]; stores this step's keys and values."""
        spec = self.spec
        tables = batch.groups[self.group]
        qkv = self.qkv.forward(x, batch).view(len(x), -1, spec.head_dim)
        q, k, v = qkv.split_with_sizes(
            (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1
        )
        q, k = self.heads.forward(q, k)
        self.ops.rope_store(
            q, k, v, self.rope_table, batch.positions, k_cache, v_cache, tables.slot_mapping
        )
        attended = self.ops.paged_attention(
            q,
            k_cache,
            v_cache,
            tables.block_tables,
            batch.seq_lens,
            batch.query_start,
            batch.query_lens,
            batch.key_lens,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            sinks=self.sinks,
            slopes=self.slopes,
        )
        return self.output.forward(attended.flatten(1), batch)


def alibi_slopes(num_heads: int) -> Tensor:
    """[num_heads] float32, as Press, Smith and Lewis give them ("Train short, test long", 2022).

    A geometric sequence for a power of two; other numbers of heads take those of the power below
    and then every second one of the power above.
    """
    power = 2 ** (num_heads.bit_length() - 1)
    exponents = [-8.0 * (i + 1) / power for i in range(power)]
    exponents += [-4.0 * (i + 1) / power for i in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor(exponents).exp2()


def load_attention(
    loader: Loader,
    spec: AttentionSpec,
    names: TensorNames,
    prefix: str,
    hidden_size: int,
    group: int,
    rope_table: Tensor,
) -> Attention:
    """Read one layer's attention from the tensors below `prefix`.

    `spec` is the whole model's; what is built has this rank's heads of it.
    """
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = load_linear(
        loader,
        [prefix + names.q, prefix + names.k, prefix + names.v],
        [q_size, kv_size, kv_size],
        hidden_size,
        bias=spec.qkv_bias,
    )
    heads: HeadNorms | PlainHeads = PlainHeads()
    if spec.qk_norm is not None:
        heads = HeadNorms(
            Norm.load(loader, prefix + names.q_norm, spec.head_dim, spec.qk_norm),
            Norm.load(loader, prefix + names.k_norm, spec.head_dim, spec.qk_norm),
        )
    output = load_summed_linear(
        loader, prefix + names.o, hidden_size, q_size, bias=spec.output_bias
    )
    local = loader.partition.attention(spec)
    sinks = slopes = None
    if spec.sinks:
        sinks = loader.vector(prefix + names.sinks, spec.num_heads, torch.float32)
    if spec.alibi:
        first = loader.partition.rank * local.num_heads
        slopes = alibi_slopes(spec.num_heads)[first : first + local.num_heads]
        slopes = slopes.to(loader.backend.device)
    return Attention(
        loader.ops, local, group, qkv, heads, output, rope_table, sinks=sinks, slopes=slopes
    )
