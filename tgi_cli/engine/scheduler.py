"""Decides what each step runs, from one budget of tokens, and books what came back.

No prefill and no decode: every sequence has `num_computed` positions and is given tokens until it
has caught up; then it is sampled. Chunked prompts, prefix hits, drafts, preemption and resumption
are this one rule, and new, preempted and resumed sequences enter by one door. Pure: no tensors, no
sockets, no text, and time only through the clock it is given.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items

from tgi_cli.config import SchedulerConfig
from tgi_cli.engine.block_table import KVGroupLayout
from tgi_cli.engine.fair_queue import FairQueue
from tgi_cli.engine.kv_space import KVSpace
from tgi_cli.engine.messages import Delta, EngineStats, Request, TokenLogprobs
from tgi_cli.engine.sequence import NO_ROW, Sequence
from tgi_cli.engine.step import (
    NewRow,
    RowOutput,
    ScheduledRow,
    Step,
    StepOutput,
)
from tgi_cli.errors import ContextLengthExceeded, InvalidRequest, Overloaded

__all__ = ["KVGroupLayout", "Scheduler"]


def _no_clock() -> float:
    return 0.0


class Scheduler:
    """Queue, blocks and running sequences of one engine.

    `add` and `abort` at any time; `schedule` gives a step to submit, `update` takes its output.
    Several steps may be in flight; they must run, and be given to `update`, in order. A sequence
    is in at most one of them.

    Args:
        config: step budget and limits.
        groups: the KV groups in the decoder's order.
        block_size: tokens per block, the same in every group.
        max_model_len: most tokens of one sequence, prompt and output.
        prefix_caching: whether equal beginnings share blocks.
        clock: seconds, for `Delta.queue_time`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        groups: Items[KVGroupLayout],
        block_size: int,
        max_model_len: int,
        prefix_caching: bool = True,
        clock: Callable[[], float] = _no_clock,
    ) -> None:
        self._config = config
        self._space = KVSpace(
            groups,
            block_size=block_size,
            max_chunk=config.max_batch_tokens,
            prefix_caching=prefix_caching,
        )
        self._max_model_len = max_model_len
        self._max_len = min(max_model_len, self._space.capacity)
        self._clock = clock
        self._queue = FairQueue()
        self._live: dict[str, Sequence] = {}
        self._running: list[Sequence] = []  # by rank: the best claim first
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._removed_rows: list[int] = []  # since the last step
        self._in_flight: deque[tuple[Step, list[Sequence]]] = deque()
        self._next_step = 0
        self._next_order = 0
        self._num_steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._query_tokens = 0
        self._hit_tokens = 0
        self._preemptions = 0
        self._draft_tokens = self._accepted_draft_tokens = self._verifications = 0
        self._last_batch = (0, 0)  # sequences, tokens

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence: the model's limit, or less if the pool holds less."""
        return self._max_len

    def has_work(self) -> bool:
        """Whether anything waits, runs or is in flight."""
        return bool(self._live or self._in_flight)

    def add(self, request: Request) -> None:
        """Enqueue a request, new or resumed.

        Raises:
            ContextLengthExceeded: it could not be answered with even one token.
            InvalidRequest: an empty prompt, an id in use, a weight that is not positive and
                finite, or nothing left to generate.
            Overloaded: the queue is full.
        """
        self._check(request)
        if len(self._queue) >= self._config.max_waiting:
            raise Overloaded(
                f"{len(self._queue)} requests are waiting and the queue holds"
                f" {self._config.max_waiting}",
                retry_after=1,
                hint="try again later",
            )
        sequence = Sequence(
            request,
            self._space.tables(),
            order=self._next_order,
            max_len=self._max_len,
            queued_at=self._clock(),
        )
        self._next_order += 1
        self._live[request.id] = sequence
        self._queue.push(sequence)

    def abort(self, request_id: str) -> Delta | None:
        """Stop a request; None if it is unknown or has ended.

        Its blocks are free on return, or once its step in flight is updated.
        """
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return None
        sequence.finish = "abort"
        if sequence.row == NO_ROW:
            self._queue.remove(sequence)
            self._queue.leave(sequence)
        elif not sequence.in_flight:
            self._end(sequence)
        return self._delta(sequence)

    def schedule(self) -> Step | None:
        """Build the next step, None if there is nothing to run (or all of it is in flight)."""
        sequences: list[Sequence] = []
        rows: list[ScheduledRow] = []
        new_rows: list[NewRow] = []
        ready = [sequence for sequence in self._running if not sequence.in_flight]
        budget = self._budget(ready)
        behind = len(ready)
        stalled = False  # memory is short: nobody is let in
        for sequence in ready:
            behind -= 1
            if sequence.row == NO_ROW:  # preempted by one before it
                continue
            if budget == 0:
                break
            # One token is kept for each sequence after this one: a long prompt slows the answers
            # that are being written, and never stops them.
            limit = min(max(1, budget - behind), self._space.max_chunk)
            known = len(sequence.token_ids) - sequence.num_computed
            count = min(known + len(sequence.draft_ids), limit)
            appended = self._space.grow(sequence, count)
            if appended is None and count > known:
                count = known
                appended = self._space.grow(sequence, count)
            while appended is None:
                stalled = True
                victim = self._victim(sequence)
                if victim is None:
                    break
                self._preempt(victim)
                appended = self._space.grow(sequence, count)
            if appended is None:
                continue
            rows.append(self._run(sequence, count, appended))
            sequences.append(sequence)
            budget -= count
        while budget > 0 and not stalled and self._free_rows:
            head = self._queue.head()
            if head is None:
                break
            chunk = self._space.enter(head, min(budget, self._space.max_chunk), self._running)
            if chunk is None:
                break
            new_rows.append(self._admit(head))
            rows.append(self._run(head, chunk, ()))
            sequences.append(head)
            budget -= chunk
        if not rows:
            return None
        # After the step is complete: only later steps may read what this one writes.
        for sequence, row in zip(sequences, rows, strict=True):
            self._space.publish(sequence, sequence.num_computed - len(row.draft_ids))
        step = Step(
            id=self._next_step, rows=rows, new_rows=new_rows, removed_rows=self._removed_rows
        )
        self._next_step += 1
        self._removed_rows = []
        self._in_flight.append((step, sequences))
        return step

    def update(self, step: Step, output: StepOutput) -> list[Delta]:
        """Book the output of the oldest step in flight; return what goes to the clients."""
        oldest = self._in_flight[0][0].id if self._in_flight else None
        if step.id != oldest or output.step_id != oldest:
            raise ValueError(f"step {step.id} is not the oldest in flight")
        _, sequences = self._in_flight.popleft()
        self._num_steps += 1
        self._last_batch = (len(step.rows), step.num_tokens)
        deltas: list[Delta] = []
        for sequence, row, result in zip(sequences, step.rows, output.rows, strict=True):
            sequence.in_flight = False
            if result.error is not None:
                self._space.retract(sequence, row.start, self._running)
            if sequence.finish is not None:  # aborted while in flight
                self._end(sequence)
            elif result.error is not None:
                sequence.finish = "error"
                deltas.append(self._delta(sequence, error=result.error))
                self._end(sequence)
            elif sequence.restart:
                self._preempt(sequence)
            else:
                delta = self._book(sequence, row, result)
                if delta is not None:
                    deltas.append(delta)
        return deltas

    def stats(self) -> EngineStats:
        """Counters and gauges; the time of a step is the caller's to add."""
        return EngineStats(
            num_steps=self._num_steps,
            num_running=len(self._running),
            num_waiting=len(self._queue),
            kv_blocks_total=self._space.num_blocks,
            kv_blocks_used=self._space.num_used,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
            preemptions=self._preemptions,
            draft_tokens=self._draft_tokens,
            accepted_draft_tokens=self._accepted_draft_tokens,
            verifications=self._verifications,
            batch_size=self._last_batch[0],
            batch_tokens=self._last_batch[1],
        )

    def tokens(self) -> tuple[int, int]:
        """Tokens of the running sequences, and what they may come to; from any thread."""
        running = list(self._running)
        held = sum(len(sequence.token_ids) for sequence in running)
        return held, sum(sequence.max_total for sequence in running)

    def check_integrity(self) -> None:
        """Compare blocks and rows with the sequences that hold them.

        For tests and idle moments: costs time in the size of the pool.

        Raises:
            RuntimeError: something leaked or is counted wrongly; the message names it.
        """
        self._space.check_integrity(self._running)
        rows = sorted([*self._free_rows, *(sequence.row for sequence in self._running)])
        if rows != list(range(self._config.max_num_seqs)):
            raise RuntimeError(f"rows are lost or held twice: {rows}")
        aborted = sum(sequence.finish is not None for sequence in self._running)
        if len(self._live) != len(self._queue) + len(self._running) - aborted:
            raise RuntimeError(
                f"{len(self._live)} live sequences, but {len(self._queue)} wait and"
                f" {len(self._running)} run, {aborted} of them aborted"
            )

    def _check(self, request: Request) -> None:
        """Refuse what can never be served."""
        num_prompt, num_outputs = len(request.prompt_ids), len(request.output_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens")
        if request.id in self._live:
            raise InvalidRequest(f"request id `{request.id}` is in use")
        if not 0 < request.weight < math.inf:
            raise InvalidRequest(
                f"`weight` must be > 0 and finite. Given: {request.weight!r}", param="weight"
            )
        if num_prompt + num_outputs >= self._max_len:
            what = f"prompt has {num_prompt} tokens"
            if num_outputs:
                what += f" and {num_outputs} were generated before"
            if self._max_len < self._max_model_len:
                raise ContextLengthExceeded(
                    f"{what}, but the KV cache holds {self._max_len} tokens, at least one of them"
                    " for the answer",
                    hint="shorten the prompt or give the KV cache more memory",
                )
            raise ContextLengthExceeded(
                f"{what}, but the context holds {self._max_len} tokens, at least one of them for"
                " the answer",
                hint="shorten the prompt or raise the model's maximum length",
            )
        if num_outputs >= request.sampling.max_tokens:
            raise InvalidRequest(
                f"request has {num_outputs} tokens of output and `max_tokens` is"
                f" {request.sampling.max_tokens}",
                param="max_tokens",
            )

    def _budget(self, ready: list[Sequence]) -> int:
        """Tokens of the next step; fewer where answers grow.

        How long such a step takes is a gap that everybody who reads an answer sees. Prompts get
        what the answers leave, but half of it where those are many.
        """
        growing = [sequence for sequence in ready if sequence.num_computed >= sequence.num_prompt]
        most = self._config.max_batch_tokens
        if not growing:
            return most
        own = sum(
            len(sequence.token_ids) - sequence.num_computed + len(sequence.draft_ids)
            for sequence in growing
        )
        mixed = self._config.max_mixed_tokens
        return min(most, max(mixed, own + (mixed + 1) // 2))

    def _run(self, sequence: Sequence, count: int, appended: tuple[list[int], ...]) -> ScheduledRow:
        """Put the next `count` positions into the step being built."""
        start = sequence.num_computed
        num_tokens = len(sequence.token_ids)
        end = start + count
        sequence.num_computed = end
        sequence.in_flight = True
        if sequence.num_charged < sequence.num_prompt:
            served = min(end, sequence.num_prompt)
            if served > sequence.num_charged:  # not what is computed again after a preemption
                self._queue.charge(sequence, prompt_tokens=served - sequence.num_charged)
                sequence.num_charged = served
        return ScheduledRow(
            row=sequence.row,
            start=start,
            num_tokens=count,
            sample=end >= num_tokens,
            draft_ids=sequence.draft_ids[: end - num_tokens] if end > num_tokens else [],
            appended_blocks=appended,
        )

    def _admit(self, sequence: Sequence) -> NewRow:
        """Give a sequence that has got its blocks a row: new, preempted or resumed alike."""
        self._queue.remove(sequence)
        sequence.row = self._free_rows.pop()
        insort(self._running, sequence, key=_rank)
        num_hit = sequence.num_computed
        self._query_tokens += len(sequence.token_ids)
        self._hit_tokens += num_hit
        if not sequence.admitted:
            sequence.admitted = True
            sequence.num_cached = min(num_hit, sequence.num_prompt)
            sequence.num_charged = sequence.num_cached
            sequence.queue_time = self._clock() - sequence.queued_at
            self._prompt_tokens += sequence.num_prompt
        return NewRow(
            row=sequence.row,
            request=sequence.request,
            block_ids=tuple([list(table.block_ids) for table in sequence.tables]),
        )

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Whose blocks to take for `sequence`: of those with a lesser claim, the best served's.

        The sequence with the best claim of all is never a victim and so always gets on, which is
        why taking turns at preempting each other cannot go on for ever.
        """
        candidates = [
            other for other in self._running if other.rank > sequence.rank and not other.in_flight
        ]
        if not candidates:
            return None
        return max(
            candidates,
            key=lambda other: (other.rank[0], self._queue.counter(other), other.rank[1]),
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Take row and blocks back; it is admitted again like any other, outputs kept."""
        self._leave_row(sequence)
        sequence.rewind()
        self._queue.push_front(sequence)
        self._preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        """Release a sequence that has finished while it had a row."""
        self._leave_row(sequence)
        sequence.rewind()
        self._queue.leave(sequence)
        if self._live.get(sequence.id) is sequence:  # not if aborted and the id is used again
            del self._live[sequence.id]

    def _leave_row(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._removed_rows.append(sequence.row)
        self._free_rows.append(sequence.row)

    def _book(self, sequence: Sequence, row: ScheduledRow, result: RowOutput) -> Delta | None:
        """Advance one sequence by what its row produced."""
        if sequence.prompt_logprobs is not None and result.prompt_logprobs:
            sequence.prompt_logprobs += result.prompt_logprobs
        if not row.sample:
            return None
        sequence.num_computed -= len(row.draft_ids) + 1 - len(result.token_ids)
        token_ids = sequence.accept(result.token_ids, complete=result.complete)
        self._queue.charge(sequence, output_tokens=len(token_ids))
        self._generated_tokens += len(token_ids)
        if row.draft_ids:
            self._draft_tokens += len(row.draft_ids)
            self._accepted_draft_tokens += max(0, len(result.token_ids) - 1)
            self._verifications += 1
            self._space.publish(sequence, min(sequence.num_computed, len(sequence.token_ids)))
        logprobs = result.logprobs
        if logprobs is not None and len(logprobs) > len(token_ids):
            logprobs = logprobs[: len(token_ids)]
        delta = self._delta(sequence, token_ids, logprobs)
        if sequence.finish is None:
            # Neither the limits nor the last token, which comes beside the drafts, may be passed.
            room = sequence.max_total - len(sequence.token_ids) - 1
            sequence.draft_ids = result.draft_ids[:room] if result.draft_ids else []
        else:
            self._end(sequence)
        return delta

    def _delta(
        self,
        sequence: Sequence,
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        *,
        error: str | None = None,
    ) -> Delta:
        if sequence.announced:
            return Delta(
                id=sequence.id,
                token_ids=token_ids or [],
                logprobs=logprobs,
                finish=sequence.finish,
                error=error,
            )
        sequence.announced = True
        prompt_logprobs = None
        if token_ids:
            prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        return Delta(
            id=sequence.id,
            token_ids=token_ids or [],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish=sequence.finish,
            error=error,
            num_cached_tokens=sequence.num_cached,
            queue_time=sequence.queue_time,
        )


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
