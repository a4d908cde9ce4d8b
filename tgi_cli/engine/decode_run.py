"""Steps that only add a token to each of the same rows: the next one begins before it is asked for.

A guess of the runner, as processors guess branches: a step that comes is compared with the one that
runs already, and another one ends it. A guessed step writes keys and values where its row has a
block, behind all known tokens, and tokens behind the history, so one that was wrong leaves nothing
that is read. Knows no scheduler and decides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tgi_cli.engine.batch_builder import BatchBuilder, BuiltStep
from tgi_cli.engine.kv_cache import KVCache
from tgi_cli.engine.rows import TokenHistory
from tgi_cli.engine.sampler import Sampled, Sampler
from tgi_cli.engine.step import ScheduledRow
from tgi_cli.kernels.cpu.program import NativeStep
from tgi_cli.kernels.cpu.sampling import NativeSampling


class DecodeRun:
    """At most one run of steps of one runner.

    Args:
        native: the program, with `ahead`.
        sampler: says whether its kernel alone draws for all rows.
        history: known tokens.
        builder: block tables.
        kv_cache: its tensors.
        block_size: tokens per block.
    """

    def __init__(
        self,
        native: NativeStep,
        sampler: Sampler,
        history: TokenHistory,
        builder: BatchBuilder,
        kv_cache: KVCache,
        block_size: int,
    ) -> None:
        assert native.ahead is not None
        self._native, self._ahead = native, native.ahead
        self._sampler = sampler
        self._history = history
        self._builder = builder
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._built: BuiltStep | None = None  # of the first step, while there is a run
        self._rows: list[int] = []
        self._starts: list[int] = []  # of the step after the last one asked for
        self._num_asked = self._num_finished = 0
        self._results: deque[Sampled] = deque()  # not given out when their run ended
        self._room = 0  # steps after the last one asked for whose positions have blocks

    def goes_on_with(self, scheduled: Sequence[ScheduledRow]) -> bool:
        """Whether this is the step after the last one, which then is being computed already.

        If it is not, the run has ended: nothing of it reads or writes any more.
        """
        if (
            self._room > 0
            and len(scheduled) == len(self._rows)
            and [row.start for row in scheduled] == self._starts
            and [row.row for row in scheduled] == self._rows
            and _only_decodes(scheduled)
            and not any(row.appended_blocks for row in scheduled)
        ):
            return True
        self.end()
        return False

    def go_on(self) -> BuiltStep | None:
        """Take the step that `goes_on_with` said to be the next one; returns what `begin` did."""
        self._num_asked += 1
        self._starts = [start + 1 for start in self._starts]
        self._room -= 1
        self._ahead.want(self._num_asked + (self._room > 0))
        return self._built

    def begin(self, scheduled: Sequence[ScheduledRow]) -> BuiltStep | None:
        """Begin a run with this step, as there is none; None if none could follow it unasked."""
        kernel = self._sampler.sole_kernel
        if not isinstance(kernel, NativeSampling) or not _only_decodes(scheduled):
            return None
        self._rows = [row.row for row in scheduled]
        self._starts = [row.start + 1 for row in scheduled]
        # What is known fills blocks, of which the last have room; no sequence exceeds the context.
        size, longest = self._block_size, self._history.max_len
        self._room = min(min(-(-known // size) * size, longest) - known for known in self._starts)
        if self._room <= 0:
            return None
        self._built = built = self._builder.build(scheduled)
        self._num_asked, self._num_finished = 1, 0
        self._native.start_ahead(built.batch, self._kv_cache.layers, kernel, built.logit_rows, 2)
        return built

    def finish(self) -> Sampled:
        """The tokens of the oldest step begun or taken and not finished."""
        if self._results:
            return self._results.popleft()
        self._num_finished += 1
        return Sampled(*self._ahead.finish(), {})

    def end(self) -> None:
        """End the run, if there is one; what was asked for is computed still."""
        self._room = 0
        if self._built is None:
            return
        for _ in range(self._num_asked - self._num_finished):
            token_ids, valid = self._ahead.finish()
            self._results.append(Sampled(token_ids.copy(), valid.copy(), {}))
        self._built = None
        self._ahead.settle()


def _only_decodes(scheduled: Sequence[ScheduledRow]) -> bool:
    return all(row.num_tokens == 1 and row.sample and not row.draft_ids for row in scheduled)
