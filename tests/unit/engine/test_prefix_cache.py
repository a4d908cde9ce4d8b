from __future__ import annotations

import pytest

from tgi_cli.config import SchedulerConfig
from tgi_cli.engine.messages import Delta, Request
from tgi_cli.engine.scheduler import KVGroupLayout, Scheduler
from tgi_cli.engine.step import NULL_BLOCK, RowOutput, Step, StepOutput
from tgi_cli.sampling import SamplingParams

FULL = KVGroupLayout(window=None, num_blocks=65)


def make_scheduler(*groups: KVGroupLayout, budget: int = 64, **fields: bool) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_num_seqs=4, max_batch_tokens=budget),
        groups=groups or [FULL],
        block_size=4,
        max_model_len=200,
        **fields,
    )


def finish(scheduler: Scheduler, step: Step) -> list[Delta]:
    rows = [RowOutput(row=r.row, token_ids=[r.start] if r.sample else []) for r in step.rows]
    return scheduler.update(step, StepOutput(step_id=step.id, rows=rows))


def complete(scheduler: Scheduler, request: Request) -> list[Delta]:
    """Run a request alone to its end."""
    scheduler.add(request)
    deltas = []
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        deltas += finish(scheduler, step)
    scheduler.check_integrity()
    return deltas


def ask(prompt_ids: list[int], **fields: object) -> Request:
    fields.setdefault("sampling", SamplingParams(max_tokens=1))
    return Request(id="r", prompt_ids=prompt_ids, **fields)


def cached(scheduler: Scheduler, request: Request) -> int:
    return complete(scheduler, request)[0].num_cached_tokens


def test_a_full_hit_leaves_the_last_block_to_compute() -> None:
    scheduler = make_scheduler()
    assert cached(scheduler, ask([*range(8)])) == 0
    assert cached(scheduler, ask([*range(8)])) == 4
    assert cached(scheduler, ask([*range(8), 9])) == 8


def test_only_equal_beginnings_hit() -> None:
    scheduler = make_scheduler()
    complete(scheduler, ask([1] * 12))
    assert cached(scheduler, ask([2, 1, 1, 1, *[1] * 8])) == 0  # an equal second block is no hit
    assert cached(scheduler, ask([1] * 8 + [2] * 8)) == 8


@pytest.mark.parametrize(
    "fields", [{"cache_salt": "s"}, {"tenant": "t"}, {"tenant": "ab"}, {"cache_salt": "ab"}]
)
def test_salts_keep_caches_apart(fields: dict[str, str]) -> None:
    scheduler = make_scheduler()
    complete(scheduler, ask([*range(12)]))
    complete(scheduler, ask([*range(12)], tenant="a", cache_salt="b"))
    assert cached(scheduler, ask([*range(12)], **fields)) == 0
    assert cached(scheduler, ask([*range(12)], **fields)) == 8


def test_generated_tokens_are_cached() -> None:
    scheduler = make_scheduler()
    deltas = complete(scheduler, ask([1, 2, 3], sampling=SamplingParams(max_tokens=10)))
    output_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert cached(scheduler, ask([1, 2, 3, *output_ids, 4])) == 12


def test_caching_can_be_switched_off() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    complete(scheduler, ask([*range(12)]))
    assert cached(scheduler, ask([*range(12)])) == 0


def test_prompt_logprobs_need_the_whole_prompt_but_feed_the_cache() -> None:
    scheduler = make_scheduler()
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    complete(scheduler, ask([*range(12)], sampling=sampling))
    assert cached(scheduler, ask([*range(12)], sampling=sampling)) == 0
    assert cached(scheduler, ask([*range(12)])) == 8
    # Resumed, they have left with the first token.
    resumed = ask(
        [*range(12)],
        output_ids=[50],
        sampling=SamplingParams(max_tokens=2, prompt_logprobs=0),
    )
    assert cached(scheduler, resumed) == 12


def test_a_later_step_shares_blocks_of_a_step_in_flight_but_not_the_same_step() -> None:
    scheduler = make_scheduler()
    prompt_ids = [*range(13)]
    for name in "ab":
        scheduler.add(Request(id=name, prompt_ids=prompt_ids, sampling=SamplingParams()))
    first = scheduler.schedule()
    assert first is not None
    assert [row.num_tokens for row in first.rows] == [13, 13]
    tables = [new.block_ids[0] for new in first.new_rows]
    assert not set(tables[0]) & set(tables[1])
    scheduler.add(Request(id="c", prompt_ids=prompt_ids, sampling=SamplingParams()))
    second = scheduler.schedule()
    assert second is not None
    assert [(row.start, row.num_tokens) for row in second.rows] == [(12, 1)]
    assert second.new_rows[0].block_ids[0][:3] == tables[0][:3]
    scheduler.check_integrity()
    finish(scheduler, first)
    finish(scheduler, second)


def test_deeper_blocks_are_evicted_before_their_parents() -> None:
    scheduler = make_scheduler(KVGroupLayout(window=None, num_blocks=9))
    complete(scheduler, ask([*range(20)]))  # 5 blocks stay cached, 3 have never been used
    complete(scheduler, ask([50] * 20))  # takes 5: the 3, and the 2 deepest of the cached
    assert cached(scheduler, ask([*range(20)])) == 12


def test_blocks_that_hold_nothing_to_hit_are_used_before_cached_ones() -> None:
    scheduler = make_scheduler(KVGroupLayout(window=None, num_blocks=5))
    complete(scheduler, ask([*range(12)]))  # 3 of 4 blocks stay cached
    for number in range(5):
        complete(scheduler, ask([50 + number] * 3))  # less than a block
    assert cached(scheduler, ask([*range(12), 99])) == 12


def window_case(num_blocks: int = 65, window: int = 5) -> Scheduler:
    return make_scheduler(FULL, KVGroupLayout(window=window, num_blocks=num_blocks), budget=8)


def test_a_window_frees_what_is_behind_it_and_keeps_it_findable() -> None:
    scheduler = window_case()
    scheduler.add(ask([*range(41)]))
    most = 0
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        full, window = (pool.num_used for pool in scheduler._space._pools)
        assert full == -(-(step.rows[0].start + step.rows[0].num_tokens) // 4)
        most = max(most, window)
        finish(scheduler, step)
    assert most == 3  # positions alive: 4 behind and 8 of the chunk
    scheduler.add(ask([*range(41)]))
    step = scheduler.schedule()
    assert step is not None
    full_ids, window_ids = step.new_rows[0].block_ids
    assert step.rows[0].start == 40
    assert NULL_BLOCK not in full_ids
    # The query at position 40 sees 36 .. 40: block 9 is kept, what is before it is not wanted.
    assert [block_id == NULL_BLOCK for block_id in window_ids] == [True] * 9 + [False] * 2


def test_a_hit_ends_where_the_window_group_has_lost_its_blocks() -> None:
    scheduler = window_case(num_blocks=6)  # holds 5: only the end of a long prompt stays
    complete(scheduler, ask([*range(41)]))
    assert cached(scheduler, ask([*range(21), 99])) == 0  # the full group alone would have 20
    scheduler = window_case(num_blocks=6)
    complete(scheduler, ask([*range(41)]))
    assert cached(scheduler, ask([*range(41), 99])) == 40


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 8, 9])
def test_every_window_wants_exactly_what_it_sees(window: int) -> None:
    layout = KVGroupLayout(window=window, num_blocks=10)
    for position in range(40):
        seen = {key // 4 for key in range(max(0, position - window + 1), position + 1)}
        assert layout.first_block(position, 4) == min(seen)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_peak_blocks_is_the_most_any_alignment_takes(window: int | None, chunk: int) -> None:
    layout = KVGroupLayout(window=window, num_blocks=10)
    most = max(
        (start + chunk - 1) // 4 - layout.first_block(start, 4) + 1 for start in range(100 - chunk)
    )
    assert layout.peak_blocks(100, chunk, 4) == (25 if window is None else most)


def test_a_row_that_failed_takes_its_blocks_out_of_the_cache() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask([*range(13)]))
    first = scheduler.schedule()
    assert first is not None
    scheduler.add(Request(id="sharer", prompt_ids=[*range(13)], sampling=SamplingParams()))
    second = scheduler.schedule()
    assert second is not None
    assert second.rows[0].start == 12
    output = StepOutput(step_id=first.id, rows=[RowOutput(row=first.rows[0].row, error="bad")])
    (delta,) = scheduler.update(first, output)
    assert (delta.finish, delta.error) == ("error", "bad")
    assert finish(scheduler, second) == []  # it read what was never written: not believed
    third = scheduler.schedule()
    assert third is not None
    assert (third.rows[0].start, third.rows[0].num_tokens) == (0, 13)
    assert third.new_rows[0].request.id == "sharer"
    assert finish(scheduler, third)[0].token_ids == [0]
    scheduler.check_integrity()


def test_blocks_filled_by_accepted_drafts_are_cached_at_the_end_too() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask([*range(5)], sampling=SamplingParams(max_tokens=4)))
    for said, drafts in ([10], [11, 12]), ([11, 12, 13], []):
        step = scheduler.schedule()
        assert step is not None
        row = RowOutput(row=step.rows[0].row, token_ids=said, draft_ids=drafts)
        scheduler.update(step, StepOutput(step_id=step.id, rows=[row]))
    assert not scheduler.has_work()
    assert cached(scheduler, ask([*range(5), 10, 11, 12, 99])) == 8
