"""The KV tensors of all layers, allocated once by the memory plan.

Knows neither who holds which block (the scheduler) nor how it is read (the kernels).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from torch import Tensor

from tgi_cli.engine.memory_plan import MemoryPlan
from tgi_cli.kernels.backend import Backend
from tgi_cli.model.spec import DecoderSpec

log = logging.getLogger(__name__)

#: Bytes of each tensor that are committed together: a huge page of most systems.
_PAGE = 2 << 20
#: Seconds between two tensors: clearing a page takes milliseconds of a core that steps want too.
_PAUSE = 0.01


class KVCache:
    """`layers[i]` are keys and values of layer i, each [num_blocks, block_size, heads, row_width].

    `kernels.kv_rows` says what a row holds in each dtype. Layers of one group use the same block
    ids; block 0 of each is the null block.

    Memory is committed as blocks are used for the first time, and a page ahead of that by a thread:
    a step that had to wait for a new page of every tensor would be a gap for all who read.
    """

    def __init__(self, backend: Backend, spec: DecoderSpec, plan: MemoryPlan) -> None:
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._backend = backend
        self._ahead = True  # until the system refuses
        self._groups: list[list[Tensor]] = []
        self._committed: list[int] = []  # blocks of each group that are there, or will be soon
        for group, planned in zip(spec.kv_groups, plan.groups, strict=True):
            for layer in group.layers:
                layers[layer] = backend.allocate_kv(
                    planned.num_blocks,
                    plan.block_size,
                    group.num_kv_heads,
                    group.head_dim,
                    plan.kv_dtype,
                )
            tensors = [tensor for layer in group.layers for tensor in layers[layer]]
            self._groups.append(tensors)
            self._committed.append(min(len(tensors[0]), _blocks_of_page(tensors[0])))
        self.layers = tuple(layers[index] for index in range(len(spec.layers)))

    def use(self, block_ids: Sequence[Sequence[int]]) -> threading.Thread | None:
        """Take note of blocks of each group that are about to be written.

        Returns the thread that commits what comes after them, if that had to be begun.
        """
        wanted: list[Tensor] = []
        for group, ids in enumerate(block_ids):
            committed, tensors = self._committed[group], self._groups[group]
            page, total = _blocks_of_page(tensors[0]), len(tensors[0])
            if not ids or committed >= total or max(ids) + page // 2 < committed:
                continue
            end = min(total, max(committed, max(ids) + 1) + page)
            self._committed[group] = end
            wanted += [tensor[committed:end] for tensor in tensors]
        if not wanted or not self._ahead:
            return None
        thread = threading.Thread(target=self._commit, args=(wanted,), name="tgi-kv", daemon=True)
        thread.start()
        return thread

    def _commit(self, parts: list[Tensor]) -> None:
        for part in parts:
            if not self._backend.commit(part):
                self._ahead = False
                log.info("memory of the KV cache is not committed ahead: the system refuses it")
                return
            time.sleep(_PAUSE)

    @property
    def nbytes(self) -> int:
        """Memory of all layers, touched or not."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


def _blocks_of_page(tensor: Tensor) -> int:
    return max(1, _PAGE // tensor[0].nbytes)
