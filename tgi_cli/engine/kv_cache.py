"""The KV tensors of all layers, allocated once by the memory plan.

Knows neither who holds which block (the scheduler) nor how it is read (the kernels).
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
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
#: Pages between the one that holds the newest block in use and the end of what is committed, while
#: steps run.
_AHEAD = 1
#: Bytes of all tensors together to have ahead of the newest block when the engine rests; no more
#: than this part of the memory that was free when the cache was planned.
_SPARE_BYTES, _SPARE_PART = 1 << 30, 16
#: Seconds without a step after which the engine rests.
_REST = 0.05


class KVCache:
    """`layers[i]` are keys and values of layer i, each [num_blocks, block_size, heads, row_width].

    `kernels.kv_rows` says what a row holds in each dtype. Layers of one group use the same block
    ids; block 0 of each is the null block.

    Memory is committed ahead of the blocks that are used for the first time, by a thread: a step
    that had to wait for a new page of every tensor would be a gap for all who read. While the
    engine rests as much is committed as busy minutes need. While steps run only a page ahead, and
    spread, twice as fast as blocks fill what is there: a step beside which all are cleared would be
    a gap too.
    """

    def __init__(self, backend: Backend, spec: DecoderSpec, plan: MemoryPlan) -> None:
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._backend = backend
        # Until the system refuses; a GPU's memory is there once it is allocated.
        self._can_commit = backend.device.type == "cpu"
        self._groups: list[list[Tensor]] = []
        # Of each group; numbers, as asking a tensor costs more than all the rest of a step's end.
        self._num_blocks: list[int] = []
        self._page_blocks: list[int] = []  # blocks in a page
        self._committed: list[int] = []  # blocks that are there, or will be
        self._newest: list[int] = []  # the highest block in use so far
        self._parts: deque[Tensor] = deque()  # to be committed
        self._allowed = 0.0  # how many of them by now, while steps run
        self._lock = threading.Lock()  # of all that the thread sees
        self._more = threading.Event()  # parts were added or allowed
        self._thread: threading.Thread | None = None
        self._rests_since = float("inf")  # monotonic seconds; infinite while a step runs
        self._grown = True  # `_newest` has risen since nothing was wanted
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
            self._num_blocks.append(len(tensors[0]))
            self._page_blocks.append(_blocks_of_page(tensors[0]))
            self._committed.append(min(self._num_blocks[-1], self._page_blocks[-1]))
            self._newest.append(0)
        page = sum(len(tensors) for tensors in self._groups) * _PAGE
        self._spare = min(_SPARE_BYTES, plan.free_bytes // _SPARE_PART) // page  # in pages
        self.layers = tuple(layers[index] for index in range(len(spec.layers)))

    def commit_first_pages(self) -> None:
        """Begin to commit what the first step will write, beside whatever comes before it."""
        if not self._can_commit:
            return
        with self._lock:
            for tensors, page in zip(self._groups, self._page_blocks, strict=True):
                self._parts += [tensor[:page] for tensor in tensors]
            self._allowed = float(len(self._parts))
        self._start()

    def use(self, block_ids: Sequence[Sequence[int]]) -> None:
        """Take note of blocks of each group that are about to be written."""
        earned = 0.0
        with self._lock:
            for group, ids in enumerate(block_ids):
                newest = self._newest[group]
                if not ids or not self._can_commit or max(ids) <= newest:
                    continue
                self._newest[group], self._grown = max(ids), True
                count, page = len(self._groups[group]), self._page_blocks[group]
                earned += 2 * count * (max(ids) - newest) / page
                self._want(group, self._end(group, _AHEAD))
            if not self._parts:
                return
            self._allowed += earned
        self._start()

    def begin(self) -> None:
        """A step runs from now on."""
        self._rests_since = float("inf")

    def rest(self) -> None:
        """No step runs from now on."""
        self._rests_since = time.monotonic()
        if self._grown and self._thread is None and self._can_commit:
            with self._lock:
                wanted = self._wants_spare()
            if wanted:
                self._start()

    @property
    def nbytes(self) -> int:
        """Memory of all layers, touched or not."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    def _end(self, group: int, ahead: int) -> int:
        """Blocks up to `ahead` pages behind the one that holds the newest, or all there are."""
        page = self._page_blocks[group]
        return min(self._num_blocks[group], (self._newest[group] // page + 1 + ahead) * page)

    def _want(self, group: int, end: int) -> None:
        """Have blocks of a group committed, from the newest's page on, up to `end`."""
        tensors, page = self._groups[group], self._page_blocks[group]
        first = max(self._committed[group], self._newest[group] // page * page)
        if first < end:
            self._committed[group] = end
            self._parts += [tensor[first:end] for tensor in tensors]

    def _wants_spare(self) -> bool:
        return bool(self._parts) or any(
            self._committed[group] < self._end(group, self._spare)
            for group in range(len(self._groups))
        )

    def _start(self) -> None:
        """Let the thread know, or start it."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_commit, args=(weakref.ref(self), self._more), name="tgi-kv", daemon=True
                )
                self._thread.start()
        self._more.set()

    def _next(self) -> Tensor | None:
        """What to commit now."""
        with self._lock:
            rests = time.monotonic() - self._rests_since >= _REST
            if rests and not self._parts:
                for group in range(len(self._groups)):
                    page = self._committed[group] + self._page_blocks[group]
                    end = min(self._end(group, self._spare), page)
                    self._want(group, end)
            if not self._parts:
                self._allowed = 0.0
                return None
            if not rests and self._allowed < 1:
                return None
            self._allowed = max(0.0, self._allowed - 1)
            return self._parts.popleft()

    def _ends(self) -> bool:
        """Whether the thread, which has nothing to commit now, is to end."""
        with self._lock:
            if self._can_commit and self._wants_spare():
                return False
            self._thread, self._grown = None, False
            return True

    def _refused(self) -> None:
        log.info("memory of the KV cache is not committed ahead: the system refuses it")
        with self._lock:
            self._can_commit = False
            self._parts.clear()


def _commit(reference: weakref.ref[KVCache], more: threading.Event) -> None:
    """The thread. It keeps no cache alive: one whose engine is closed goes, and so does this."""
    while (cache := reference()) is not None:
        more.clear()
        part = cache._next()
        if part is None:
            if cache._ends():
                return
            del cache
            more.wait(_REST)
        elif not cache._backend.commit(part):
            cache._refused()
        part = None


def _blocks_of_page(tensor: Tensor) -> int:
    return max(1, _PAGE // tensor[0].nbytes)
