from __future__ import annotations

import subprocess
import sys

import pytest

from tgi_cli.config import SchedulerConfig
from tgi_cli.engine.messages import Delta, Request, TokenLogprobs
from tgi_cli.engine.scheduler import KVGroupLayout, Scheduler
from tgi_cli.engine.step import RowOutput, Step, StepOutput
from tgi_cli.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from tgi_cli.sampling import SamplingParams

TOKEN = 7  # what every row says unless told otherwise


class Bench:
    """A scheduler and the rows' answers by hand. Blocks of 4 tokens."""

    def __init__(
        self,
        *,
        num_blocks: int = 101,
        budget: int = 64,
        max_num_seqs: int = 4,
        max_model_len: int = 100,
        max_waiting: int = 100,
        max_mixed_tokens: int = 1000,
    ) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_batch_tokens=budget,
                max_waiting=max_waiting,
                max_mixed_tokens=max_mixed_tokens,
            ),
            groups=[KVGroupLayout(window=None, num_blocks=num_blocks)],
            block_size=4,
            max_model_len=max_model_len,
            clock=lambda: self.now,
        )

    def add(self, name: str, num_prompt: int, max_tokens: int = 50, **fields: object) -> None:
        fields.setdefault("sampling", SamplingParams(max_tokens=max_tokens))
        # Every prompt is its own, so that nothing is shared.
        prompt_ids = [ord(name[0]) * 1000 + position for position in range(num_prompt)]
        self.scheduler.add(Request(id=name, prompt_ids=prompt_ids, **fields))

    def schedule(self) -> Step:
        step = self.scheduler.schedule()
        assert step is not None
        self.scheduler.check_integrity()
        return step

    def update(self, step: Step, *, say: list[int] | None = None, **fields: object) -> list[Delta]:
        """Answer all rows that are sampled with the same tokens."""
        rows = [
            RowOutput(row=row.row, token_ids=(say or [TOKEN]) if row.sample else [], **fields)
            for row in step.rows
        ]
        deltas = self.scheduler.update(step, StepOutput(step_id=step.id, rows=rows))
        self.scheduler.check_integrity()
        return deltas

    def run(self, **fields: object) -> tuple[Step, list[Delta]]:
        step = self.schedule()
        return step, self.update(step, **fields)


def lengths(step: Step) -> list[int]:
    return [row.num_tokens for row in step.rows]


# What is refused at the door.


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    bench = Bench(max_model_len=20)
    with pytest.raises(ContextLengthExceeded, match=r"prompt has 20 tokens.*context holds 20"):
        bench.add("a", 20)
    bench.add("a", 19)
    _, (delta,) = bench.run()
    assert delta.finish == "length"


def test_a_prompt_that_the_pool_can_never_hold_is_refused_with_both_numbers() -> None:
    bench = Bench(num_blocks=6)
    assert bench.scheduler.max_model_len == 20
    with pytest.raises(ContextLengthExceeded, match=r"prompt has 20 tokens.*cache holds 20"):
        bench.add("a", 20)
    with pytest.raises(ContextLengthExceeded, match=r"has 15 tokens and 5 were generated before"):
        bench.add("a", 15, output_ids=[1] * 5)
    assert not bench.scheduler.has_work()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prompt": 0}, "no tokens"),
        ({"num_prompt": 1, "weight": 0.0}, "`weight` must be > 0"),
        ({"num_prompt": 1, "weight": float("nan")}, "`weight` must be > 0"),
        ({"num_prompt": 1, "weight": float("inf")}, "and finite. Given: inf"),
        ({"num_prompt": 1, "max_tokens": 2, "output_ids": [1, 2]}, "`max_tokens` is 2"),
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, object], message: str) -> None:
    bench = Bench()
    with pytest.raises(InvalidRequest, match=message):
        bench.add("a", **fields)
    assert not bench.scheduler.has_work()


def test_an_id_may_not_be_used_twice_at_once() -> None:
    bench = Bench()
    bench.add("a", 3)
    with pytest.raises(InvalidRequest, match="`a` is in use"):
        bench.add("a", 3)


def test_a_full_queue_says_when_to_come_back() -> None:
    bench = Bench(max_waiting=2)
    bench.add("a", 3)
    bench.add("b", 3)
    with pytest.raises(Overloaded, match="2 requests are waiting and the queue holds 2") as caught:
        bench.add("c", 3)
    assert caught.value.retry_after >= 1
    bench.run()
    bench.add("c", 3)


# One budget.


def test_a_long_prompt_is_chunked_and_sampled_when_it_has_caught_up() -> None:
    bench = Bench(budget=10)
    bench.add("a", 25)
    steps = [bench.run() for _ in range(4)]
    assert [lengths(step) for step, _ in steps] == [[10], [10], [5], [1]]
    assert [step.rows[0].start for step, _ in steps] == [0, 10, 20, 25]
    assert [step.rows[0].sample for step, _ in steps] == [False, False, True, True]
    assert [len(deltas) for _, deltas in steps] == [0, 0, 1, 1]
    assert [len(step.new_rows) for step, _ in steps] == [1, 0, 0, 0]
    appended = [ids for step, _ in steps[1:] for ids in step.rows[0].appended_blocks]
    assert [len(ids) for ids in appended] == [2, 2]


def test_prompts_and_answers_share_the_budget() -> None:
    bench = Bench(budget=10)
    bench.add("a", 4)
    bench.run()
    bench.add("b", 30)
    assert lengths(bench.run()[0]) == [1, 9]
    bench.add("c", 2)
    assert lengths(bench.run()[0]) == [1, 9]


def test_a_long_prompt_leaves_a_token_to_everyone_after_it() -> None:
    bench = Bench(budget=10)
    for name in "bc":
        bench.add(name, 1, priority=1)
    bench.run()
    bench.add("a", 40)
    assert lengths(bench.run()[0]) == [1, 1, 8]
    assert lengths(bench.run()[0]) == [8, 1, 1]  # now a has the best claim


def test_no_more_sequences_than_rows() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, 3, max_tokens=2)
    assert len(bench.run()[0].rows) == 2
    assert [delta.finish for delta in bench.run()[1]] == ["length", "length"]
    step, _ = bench.run()
    assert [new.request.id for new in step.new_rows] == ["c"]
    assert sorted(step.removed_rows) == [0, 1]


def test_a_sequence_in_flight_is_skipped_and_others_go_on() -> None:
    bench = Bench(budget=8)
    bench.add("a", 8)
    first = bench.schedule()
    bench.add("b", 8)
    second = bench.schedule()
    assert second.rows[0].row != first.rows[0].row
    assert bench.scheduler.schedule() is None
    assert bench.scheduler.has_work()
    with pytest.raises(ValueError, match="not the oldest"):
        bench.update(second)
    assert [delta.id for delta in bench.update(first)] == ["a"]
    assert [delta.id for delta in bench.update(second)] == ["b"]


# What ends a sequence.


@pytest.mark.parametrize(
    ("fields", "said", "taken", "finish"),
    [
        ({"eos_token_ids": (7,)}, [5, 7], [5, 7], "eos"),
        ({"eos_token_ids": (7,), "ignore_eos": True}, [7, 7, 7, 7], [7, 7, 7, 7], "length"),
        ({"eos_token_ids": (7,), "min_tokens": 2}, [7, 5, 7], [7, 5, 7], "eos"),
        ({"stop_token_ids": (7,)}, [5, 7], [5, 7], "stop"),
        ({"stop_token_ids": (7,), "min_tokens": 1}, [7, 7], [7, 7], "stop"),
        ({"stop_token_ids": (7,), "eos_token_ids": (7,)}, [7], [7], "eos"),
        (
            {"stop_token_ids": (7,), "eos_token_ids": (7,), "ignore_eos": True},
            [7],
            [7],
            "stop",
        ),
        ({}, [1, 2, 3, 4], [1, 2, 3, 4], "length"),
    ],
)
def test_finish_rules(
    fields: dict[str, object], said: list[int], taken: list[int], finish: str
) -> None:
    bench = Bench()
    request = {key: fields.pop(key) for key in list(fields) if key == "eos_token_ids"}
    bench.add("a", 3, sampling=SamplingParams(max_tokens=4, **fields), **request)
    received = []
    for token_id in said:
        _, (delta,) = bench.run(say=[token_id])
        received += delta.token_ids
    assert received == taken
    assert delta.finish == finish
    assert not bench.scheduler.has_work()
    assert bench.scheduler.stats().kv_blocks_used == 0


def test_outputs_before_a_resume_count_and_are_not_said_again() -> None:
    bench = Bench()
    bench.add("a", 5, max_tokens=4, output_ids=[1, 2])
    step, (delta,) = bench.run(say=[3])
    assert (step.rows[0].start, step.rows[0].num_tokens) == (0, 7)
    assert step.new_rows[0].request.output_ids == [1, 2]
    assert delta.token_ids == [3]
    _, (delta,) = bench.run(say=[4])
    assert (delta.token_ids, delta.finish) == ([4], "length")


def test_the_first_delta_tells_the_time_in_the_queue() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", 3, max_tokens=1)
    bench.add("b", 3, max_tokens=2)
    bench.run()
    bench.now = 2.5
    assert bench.run()[1][0].queue_time == 2.5
    assert bench.run()[1][0].queue_time == 0.0


def test_prompt_logprobs_are_gathered_over_chunks() -> None:
    bench = Bench(budget=2)
    bench.add("a", 5, sampling=SamplingParams(max_tokens=2, prompt_logprobs=0))
    entries = [TokenLogprobs(token_id=i, logprob=-1.0, rank=1) for i in range(1, 5)]
    assert bench.run(prompt_logprobs=entries[:2])[1] == []
    assert bench.run(prompt_logprobs=entries[2:])[1] == []
    _, (delta,) = bench.run(prompt_logprobs=[])
    assert delta.prompt_logprobs == [None, *entries]
    assert bench.run()[1][0].prompt_logprobs is None


# Drafts.


def test_rejected_drafts_are_subtracted_and_accepted_ones_kept() -> None:
    bench = Bench()
    bench.add("a", 5)
    bench.run(say=[10], draft_ids=[11, 12, 13])
    step, (delta,) = bench.run(say=[11, 99])  # 11 accepted, 12 not
    row = step.rows[0]
    assert (row.start, row.num_tokens, row.draft_ids) == (5, 4, [11, 12, 13])
    assert delta.token_ids == [11, 99]
    stats = bench.scheduler.stats()
    assert (stats.draft_tokens, stats.accepted_draft_tokens, stats.verifications) == (3, 1, 1)
    step, _ = bench.run()
    assert (step.rows[0].start, step.rows[0].num_tokens) == (7, 1)


def test_drafts_beyond_the_budget_or_the_limits_are_cut() -> None:
    bench = Bench(budget=3)
    bench.add("a", 3, max_tokens=4)
    bench.run(draft_ids=[1, 2, 3, 4, 5])
    step, _ = bench.run(draft_ids=[1, 2, 3])
    assert step.rows[0].draft_ids == [1, 2]
    step, _ = bench.run()
    assert step.rows[0].draft_ids == [1]  # two tokens are left: this and the one after


def test_what_follows_the_end_in_accepted_drafts_is_dropped() -> None:
    bench = Bench()
    bench.add("a", 3, eos_token_ids=(2,))
    bench.run(say=[5], draft_ids=[1, 2, 3])
    logprobs = [TokenLogprobs(token_id=i, logprob=-1.0, rank=1) for i in (1, 2, 3, 4)]
    _, (delta,) = bench.run(say=[1, 2, 3, 4], logprobs=logprobs)
    assert (delta.token_ids, delta.finish) == ([1, 2], "eos")
    assert delta.logprobs == logprobs[:2]


def test_drafts_give_way_before_anyone_is_preempted() -> None:
    bench = Bench(num_blocks=5)
    bench.add("a", 3)
    bench.add("b", 3)
    bench.run(draft_ids=[1, 2, 3, 4, 5])
    step, _ = bench.run()
    assert [row.draft_ids for row in step.rows] == [[1, 2, 3, 4, 5], []]
    assert bench.scheduler.stats().preemptions == 0


# Aborts.


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_abort_between_steps_frees_everything(num_steps: int) -> None:
    bench = Bench(budget=4)
    bench.add("a", 9)
    for _ in range(num_steps):
        bench.run()
    delta = bench.scheduler.abort("a")
    assert delta is not None
    assert (delta.id, delta.finish) == ("a", "abort")
    assert bench.scheduler.abort("a") is None
    assert not bench.scheduler.has_work()
    assert bench.scheduler.stats().kv_blocks_used == 0
    bench.scheduler.check_integrity()


def test_abort_in_flight_frees_with_the_update_and_says_nothing_more() -> None:
    bench = Bench()
    bench.add("a", 9)
    step = bench.schedule()
    assert bench.scheduler.abort("a") is not None
    bench.add("a", 3)  # the id is free at once
    assert bench.scheduler.has_work()
    assert bench.update(step) == []
    step, (delta,) = bench.run()
    assert (delta.id, lengths(step)) == ("a", [3])
    assert step.removed_rows == [0]
    assert bench.scheduler.stats().kv_blocks_used == 1


def test_abort_of_an_unknown_id_is_ignored() -> None:
    assert Bench().scheduler.abort("a") is None


# Short memory.


def test_the_youngest_gives_way_and_comes_back_with_its_outputs() -> None:
    bench = Bench(num_blocks=5)
    bench.add("a", 3)
    bench.add("b", 3)
    for number in range(6):  # both have 8 computed tokens in 2 blocks, all there are
        bench.run(say=[number])
    step, deltas = bench.run(say=[6])
    assert lengths(step) == [1]
    assert step.removed_rows == [1]
    assert [delta.id for delta in deltas] == ["a"]
    assert bench.scheduler.stats().preemptions == 1
    assert bench.scheduler.stats().num_waiting == 1
    bench.scheduler.abort("a")
    step, (delta,) = bench.run(say=[7])
    back = step.new_rows[0].request
    assert (back.id, back.output_ids) == ("b", [0, 1, 2, 3, 4, 5])
    assert (step.rows[0].start, step.rows[0].num_tokens) == (4, 5)  # a took only its last block
    assert (delta.token_ids, delta.num_cached_tokens) == ([7], 0)


def test_waiting_ones_never_preempt_and_the_head_is_not_overtaken() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", 8, max_tokens=3)
    bench.run()
    bench.add("b", 12)
    bench.add("c", 1)
    step, _ = bench.run()
    assert step.new_rows == []  # b does not fit, c would
    bench.run()
    step, _ = bench.run()
    assert [new.request.id for new in step.new_rows] == ["b", "c"]
    assert bench.scheduler.stats().preemptions == 0


def test_nobody_is_let_in_by_the_step_that_puts_someone_out() -> None:
    bench = Bench(num_blocks=7)
    bench.add("a", 3)
    bench.add("b", 3)
    for _ in range(10):
        bench.run()
    bench.add("c", 1, priority=-1)
    step, _ = bench.run()  # a takes one of b's three blocks; the others would do for c
    assert bench.scheduler.stats().preemptions == 1
    assert (len(step.rows), step.new_rows) == (1, [])


def test_nobody_is_let_in_only_to_be_preempted() -> None:
    bench = Bench(num_blocks=4)
    bench.add("a", 7, max_tokens=5)
    bench.run()
    bench.add("b", 3)  # there is a block for it, which a will want
    admitted = []
    for _ in range(5):
        step, _ = bench.run()
        admitted.append(len(step.new_rows))
    assert admitted == [0, 0, 0, 0, 1]
    assert bench.scheduler.stats().preemptions == 0


def test_memory_is_taken_from_the_tenant_that_was_served_most() -> None:
    bench = Bench(num_blocks=9)
    bench.add("a", 3, tenant="x")
    bench.add("b", 11, tenant="y")
    bench.add("c", 3, tenant="x")
    bench.run()
    order = {sequence.id: sequence for sequence in bench.scheduler._running}
    victim = bench.scheduler._victim(order["a"])
    assert victim is order["b"]  # c is younger, but y had more
    assert bench.scheduler._victim(order["c"]) is None


def test_a_lower_priority_gives_way_first() -> None:
    bench = Bench()
    bench.add("a", 3, priority=5)
    bench.add("b", 3, priority=0)
    bench.run()
    order = {sequence.id: sequence for sequence in bench.scheduler._running}
    assert bench.scheduler._victim(order["b"]) is order["a"]
    assert bench.scheduler._victim(order["a"]) is None


def test_a_window_group_smaller_than_a_chunk_still_runs_long_prompts() -> None:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2, max_batch_tokens=64),
        groups=[KVGroupLayout(window=6, num_blocks=5)],
        block_size=4,
        max_model_len=200,
    )
    assert scheduler.max_model_len == 200
    scheduler.add(Request(id="a", prompt_ids=[1] * 150, sampling=SamplingParams(max_tokens=1)))
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        assert step.num_tokens <= 8  # 13 positions may be alive, 5 of them behind
        rows = [RowOutput(row=r.row, token_ids=[1] if r.sample else []) for r in step.rows]
        scheduler.update(step, StepOutput(step_id=step.id, rows=rows))
        scheduler.check_integrity()


# Books.


def test_stats_count() -> None:
    bench = Bench()
    bench.add("a", 9, max_tokens=2)
    bench.run()
    bench.add("b", 3)
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    assert (stats.kv_blocks_total, stats.kv_blocks_used) == (100, 3)
    bench.run()
    stats = bench.scheduler.stats()
    assert (stats.num_steps, stats.batch_size, stats.batch_tokens) == (2, 2, 4)
    assert (stats.prompt_tokens, stats.generated_tokens) == (12, 3)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (12, 0)


def test_integrity_names_a_leak() -> None:
    bench = Bench()
    bench.scheduler._space._pools[0].allocate(1)
    with pytest.raises(RuntimeError, match="block 1 counts 1 references, tables hold 0"):
        bench.scheduler.check_integrity()
    bench = Bench()
    bench.scheduler._free_rows.pop()
    with pytest.raises(RuntimeError, match="rows are lost"):
        bench.scheduler.check_integrity()


def test_the_scheduler_needs_neither_torch_nor_sockets() -> None:
    code = (
        "import sys, tgi_cli.engine.scheduler\n"
        "print([m for m in ('torch', 'zmq', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_prompts_get_less_of_a_step_beside_answers_that_grow() -> None:
    bench = Bench(budget=64, max_mixed_tokens=11)
    bench.add("a", 60)
    step = bench.schedule()
    assert [row.num_tokens for row in step.rows] == [60]  # alone it has the whole budget
    bench.update(step)
    bench.add("b", 25)
    counts = []
    for _ in range(4):
        step = bench.schedule()
        counts.append([row.num_tokens for row in step.rows])
        bench.update(step)
    assert counts == [[1, 10], [1, 10], [1, 5], [1, 1]]


def test_prompts_get_half_of_a_mixed_step_beside_many_answers() -> None:
    bench = Bench(budget=64, max_mixed_tokens=5)
    for name in "abc":
        bench.add(name, 3)
    bench.run()
    bench.add("d", 6)
    counts = [lengths(bench.run()[0]) for _ in range(3)]
    # Three tokens for prompts, which is more than three answers leave of five.
    assert counts == [[1, 1, 1, 3], [1, 1, 1, 3], [1, 1, 1, 1]]
