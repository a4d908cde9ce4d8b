"""The KV tensors of all layers, allocated once by the memory plan.

Knows neither who holds which block (the scheduler) nor how it is read (the kernels).
"""

from __future__ import annotations

from torch import Tensor

from tgi_cli.engine.memory_plan import MemoryPlan
from tgi_cli.kernels.backend import Backend
from tgi_cli.model.spec import DecoderSpec


class KVCache:
    """`layers[i]` are keys and values of layer i, each [num_blocks, block_size, heads, row_width].

    `kernels.kv_rows` says what a row holds in each dtype. Layers of one group use the same block
    ids; block 0 of each is the null block.
    """

    def __init__(self, backend: Backend, spec: DecoderSpec, plan: MemoryPlan) -> None:
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        for group, planned in zip(spec.kv_groups, plan.groups, strict=True):
            for layer in group.layers:
                layers[layer] = backend.allocate_kv(
                    planned.num_blocks,
                    plan.block_size,
                    group.num_kv_heads,
                    group.head_dim,
                    plan.kv_dtype,
                )
        self.layers = tuple(layers[index] for index in range(len(spec.layers)))

    @property
    def nbytes(self) -> int:
        """Memory of all layers, touched or not."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)
