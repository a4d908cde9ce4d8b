"""The scheduler under random arrivals, aborts, preemption, drafts, faults and tiny pools.

Whatever happens on the way, a request's tokens are those of a plain function of the request.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from tests.property.slot_model import VOCAB_SIZE, SlotModel, answer
from tgi_cli.config import SchedulerConfig
from tgi_cli.engine.messages import Delta, Request
from tgi_cli.engine.prefix_cache import block_digest, root_digest
from tgi_cli.engine.scheduler import KVGroupLayout, Scheduler
from tgi_cli.engine.sequence import NO_ROW
from tgi_cli.engine.step import NULL_BLOCK
from tgi_cli.sampling import SamplingParams

#: Prompts are beginnings of these with something of their own after, so that they share blocks.
STEMS = ([1] * 24, [0, 1, 2, 3, 4, 5] * 4, [0, 1, 2, 3, 4, 5] + [1] * 18)

WINDOWS = st.sampled_from([(None,), (None, None), (None, 5), (7,), (3, None, 1), (2, 9)])

SAMPLING = st.builds(
    SamplingParams,
    seed=st.integers(0, 1),
    max_tokens=st.integers(1, 14),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (4,)]),
    logprobs=st.sampled_from([None, 0]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
).map(lambda p: msgspec.structs.replace(p, min_tokens=min(p.min_tokens, p.max_tokens)))


class Received:
    """What a client has, and what it should get in the end."""

    def __init__(self, request: Request, windows: tuple[int | None, ...], max_len: int) -> None:
        fresh = msgspec.structs.replace(request, output_ids=[])
        self.request = request
        self.token_ids, self.logprobs, self.prompt_logprobs, self.finish = answer(
            fresh, windows, max_len
        )
        self.output_ids = list(request.output_ids)
        self.num_deltas = 0
        self.done = False

    def take(self, delta: Delta) -> None:
        assert not self.done, "a delta after the end"
        sampling, num_before = self.request.sampling, len(self.output_ids)
        self.output_ids += delta.token_ids
        assert self.output_ids == self.token_ids[: len(self.output_ids)]
        if delta.token_ids:
            expected = self.logprobs[num_before : len(self.output_ids)]
            assert delta.logprobs == (None if sampling.logprobs is None else expected)
            owed = sampling.prompt_logprobs is not None and num_before == 0
            assert delta.prompt_logprobs == (self.prompt_logprobs if owed else None)
        assert delta.num_cached_tokens <= len(self.request.prompt_ids)
        if self.num_deltas:
            assert delta.num_cached_tokens == 0
        self.num_deltas += 1
        self.done = delta.finish is not None
        if delta.finish not in (None, "abort", "error"):
            assert delta.finish == self.finish
            assert len(self.output_ids) == len(self.token_ids)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        windows=WINDOWS,
        block_size=st.sampled_from([1, 2, 3, 4]),
        tokens=st.integers(12, 70),
        budget=st.integers(1, 20),
        max_num_seqs=st.integers(1, 5),
        max_model_len=st.integers(20, 40),
        prefix_caching=st.sampled_from([True, True, True, False]),
        depth=st.integers(1, 2),
        drafts=st.sampled_from(["none", "some", "some"]),
        window_blocks=st.integers(2, 20),
    )
    def start(
        self,
        windows: tuple[int | None, ...],
        block_size: int,
        tokens: int,
        budget: int,
        max_num_seqs: int,
        max_model_len: int,
        prefix_caching: bool,
        depth: int,
        drafts: str,
        window_blocks: int,
    ) -> None:
        groups = [
            KVGroupLayout(
                window=window,
                num_blocks=1 + (window_blocks if window else max(1, tokens // block_size)),
            )
            for window in windows
        ]
        self.windows, self.depth, self.budget = windows, depth, budget
        self.block_size, self.max_num_seqs = block_size, max_num_seqs
        self.clock = 0.0
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs, max_batch_tokens=budget),
            groups=groups,
            block_size=block_size,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
            clock=lambda: self.clock,
        )
        self.max_len = self.scheduler.max_model_len
        self.model = SlotModel(
            groups, block_size, self.propose if drafts == "some" else lambda request, ids: []
        )
        self.clients: dict[str, Received] = {}

    def propose(self, request: Request, token_ids: list[int]) -> list[int]:
        """Drafts by a rule without memory: right, half right, wrong, too many or none."""
        right = self.clients[request.id].token_ids[len(token_ids) - len(request.prompt_ids) :]
        kind = sum(token_ids) % 5
        wrong = [(token_id + 1) % VOCAB_SIZE for token_id in right]
        return [[], right[:2], right[:1] + wrong[1:3], wrong[:2], [*right, 0, 1, 2]][kind]

    @rule(
        count=st.integers(1, 3),
        stem=st.sampled_from(STEMS),
        shared=st.integers(0, 24),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
        sampling=SAMPLING,
        breaks=st.sampled_from([False] * 5 + [True]),
        resumed=st.sampled_from([0, 0, 0, 1, 3]),
        tenant=st.sampled_from("aaab"),
        user=st.sampled_from(["", "u"]),
        salt=st.sampled_from(["", "", "", "s"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        eos=st.sampled_from([(), (3,), (0, 3)]),
    )
    def add(
        self,
        count: int,
        stem: list[int],
        shared: int,
        own: list[int],
        breaks: bool,
        resumed: int,
        eos: tuple[int, ...],
        salt: str,
        **fields: Any,
    ) -> None:
        for index in range(count):
            prompt_ids = (stem[: shared + index] + own)[: self.max_len - 1] or [0]
            request = Request(
                id=f"r{len(self.clients)}",
                prompt_ids=prompt_ids,
                eos_token_ids=eos,
                cache_salt=salt,
                **fields,
            )
            token_ids = answer(request, self.windows, self.max_len)[0]
            if resumed < len(token_ids):
                request = msgspec.structs.replace(request, output_ids=token_ids[:resumed])
            if breaks and index == 0:  # in its first step, when others may wait for its blocks
                self.model.failing.add(request.id)
            self.clients[request.id] = Received(request, self.windows, self.max_len)
            self.scheduler.add(request)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.clock += 1.0
        request_id = f"r{data.draw(st.integers(0, len(self.clients)))}"
        delta = self.scheduler.abort(request_id)
        client = self.clients.get(request_id)
        if client is None or client.done:
            assert delta is None
        else:
            assert delta is not None
            assert delta.finish == "abort"
            client.take(delta)

    @rule(count=st.integers(1, 8), leave=st.booleans())
    def run(self, count: int, leave: bool) -> None:
        """Run some steps; leave as many in flight as there may be, or fewer."""
        for _ in range(count):
            while self.submit():
                pass
            if self.model.submitted:
                self.collect()
        while leave and self.submit():
            pass

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Destroy a row: the scheduler does so itself when memory is short, here at any time."""
        idle = [s.id for s in self.scheduler._running if not s.in_flight]
        if idle:
            request_id = data.draw(st.sampled_from(idle))
            self.scheduler._preempt(self.scheduler._live[request_id])

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Break a running request from now on."""
        running = [s.id for s in self.scheduler._running]
        if running:
            self.model.failing.add(data.draw(st.sampled_from(running)))

    def submit(self) -> bool:
        if len(self.model.submitted) == self.depth:
            return False
        step = self.scheduler.schedule()
        if step is None:
            assert self.model.submitted or not self.scheduler.has_work(), "stuck"
            return False
        assert 0 < step.num_tokens <= self.budget
        assert len({row.row for row in step.rows}) == len(step.rows) <= self.max_num_seqs
        self.model.submit(step)
        return True

    def collect(self) -> None:
        step, output = self.model.collect()
        for delta in self.scheduler.update(step, output):
            if delta.error is not None:
                assert delta.finish == "error"
                assert delta.id in self.model.failing
            self.clients[delta.id].take(delta)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        self.scheduler.check_integrity()
        for group, pool in enumerate(self.scheduler._space._pools):
            digests = {block_id: digest for digest, block_id in pool.published().items()}
            holders: dict[int, list[tuple[int, Any]]] = {}
            for sequence in self.scheduler._running:
                digest = root_digest(sequence.request)
                table = sequence.tables[group].block_ids
                for index, block_id in enumerate(table):
                    tokens = sequence.token_ids[index * self.block_size :][: self.block_size]
                    if len(tokens) == self.block_size:
                        digest = block_digest(digest, tokens)
                        if block_id != NULL_BLOCK and not sequence.restart:
                            assert digests.get(block_id, digest) == digest
                    if block_id != NULL_BLOCK:
                        holders.setdefault(block_id, []).append((index, sequence))
            for block_id, users in holders.items():
                if len(users) > 1:
                    assert len({index for index, _ in users}) == 1
                    for index, sequence in users:
                        end = (index + 1) * self.block_size
                        assert end <= min(sequence.num_computed, len(sequence.token_ids)), block_id

    @invariant()
    def every_running_sequence_has_a_row(self) -> None:
        rows = [sequence.row for sequence in self.scheduler._running]
        assert NO_ROW not in rows
        assert len(set(rows)) == len(rows) <= self.max_num_seqs

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        todo = sum(
            len(c.request.prompt_ids) + len(c.token_ids)
            for c in self.clients.values()
            if not c.done
        )
        for _ in range(2 * todo + 10):
            while self.submit():
                pass
            if not self.model.submitted:
                break
            self.collect()
            self.blocks_are_accounted_for()
        assert not self.scheduler.has_work(), "not finished in a bounded number of steps"
        assert all(client.done for client in self.clients.values())
        assert self.scheduler.stats().kv_blocks_used == 0
        assert self.scheduler.stats().num_running == self.scheduler.stats().num_waiting == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, derandomize=True
)
