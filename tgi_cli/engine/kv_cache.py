"""The KV tensors of all layers, allocated once by the memory plan.

Knows neither who holds which block (the scheduler) nor how it is read (the kernels).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from tgi_cli.engine.memory_plan import MemoryPlan
from tgi_cli.kernels.backend import Backend
from tgi_cli.model.spec import DecoderSpec

log = logging.getLogger(__name__)

#: Bytes of each tensor that are committed together: a huge page of most systems. Clearing one takes
#: a core for milliseconds in a virtual machine whose host has to find it.
_PAGE = 2 << 20
#: Pages between the one that holds the newest block in use and the end of what is committed.
_AHEAD = 1


class KVCache:
    """`layers[i]` are keys and values of layer i, each [num_blocks, block_size, heads, row_width].

    `kernels.kv_rows` says what a row holds in each dtype. Layers of one group use the same block
    ids; block 0 of each is the null block.

    Memory is committed a page ahead of the blocks that are used for the first time, by a thread: a
    step that had to wait for a new page of every tensor would be a gap for all who read. So would
    one beside which all are cleared, so that is spread: twice as fast as blocks fill what is there.
    """

    def __init__(self, backend: Backend, spec: DecoderSpec, plan: MemoryPlan) -> None:
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._backend = backend
        self._can_commit = True  # until the system refuses
        self._groups: list[list[Tensor]] = []
        self._committed: list[int] = []  # blocks of each group that are there, or will be
        self._newest: list[int] = []  # the highest block of each group in use so far
        self._parts: deque[Tensor] = deque()  # to be committed
        self._allowed = float("inf")  # how many of them by now; all that the first blocks ask for
        self._lock = threading.Lock()  # of the three
        self._thread: threading.Thread | None = None
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
            self._newest.append(0)
        self.layers = tuple(layers[index] for index in range(len(spec.layers)))

    def use(self, block_ids: Sequence[Sequence[int]]) -> None:
        """Take note of blocks of each group that are about to be written."""
        wanted: list[Tensor] = []
        earned = 0.0
        for group, ids in enumerate(block_ids):
            newest = self._newest[group]
            if not ids or not self._can_commit or max(ids) <= newest:
                continue
            tensors, total = self._groups[group], len(self._groups[group][0])
            page = _blocks_of_page(tensors[0])
            earned += 2 * len(tensors) * (max(ids) - newest) / page
            newest = self._newest[group] = max(ids)
            end = min(total, (newest // page + 1 + _AHEAD) * page)
            first = max(self._committed[group], newest // page * page)
            if first < end:
                self._committed[group] = end
                wanted += [tensor[first:end] for tensor in tensors]
        with self._lock:
            if not (self._parts or wanted):
                return
            self._parts += wanted
            self._allowed += earned
            if self._allowed >= 1 and self._thread is None:
                self._thread = threading.Thread(target=self._commit, name="tgi-kv", daemon=True)
                self._thread.start()

    def _commit(self) -> None:
        """As much of what is wanted as is allowed by now."""
        while True:
            with self._lock:
                if not self._parts:
                    self._allowed = 0.0
                if self._allowed < 1:
                    self._thread = None
                    return
                part = self._parts.popleft()
                self._allowed -= 1
            if not self._backend.commit(part):
                log.info("memory of the KV cache is not committed ahead: the system refuses it")
                with self._lock:
                    self._can_commit = False
                    self._parts.clear()

    @property
    def nbytes(self) -> int:
        """Memory of all layers, touched or not."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


def _blocks_of_page(tensor: Tensor) -> int:
    return max(1, _PAGE // tensor[0].nbytes)
