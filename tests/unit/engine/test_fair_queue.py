from __future__ import annotations

import random

from tgi_cli.config import SchedulerConfig
from tgi_cli.engine.fair_queue import FairQueue
from tgi_cli.engine.messages import Request
from tgi_cli.engine.scheduler import KVGroupLayout, Scheduler
from tgi_cli.engine.sequence import Sequence
from tgi_cli.engine.step import RowOutput, Step, StepOutput
from tgi_cli.sampling import SamplingParams


class Arrivals:
    """Makes sequences, numbered in the order of arrival."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.num = 0

    def __call__(self, tenant: str = "", **fields: object) -> Sequence:
        request = Request(
            id=f"{tenant}{self.num}",
            prompt_ids=[1],
            sampling=SamplingParams(),
            tenant=tenant,
            **fields,
        )
        sequence = Sequence(request, [], order=self.num, max_len=100, queued_at=0.0)
        self.num += 1
        self.queue.push(sequence)
        return sequence


def pop(queue: FairQueue) -> Sequence:
    head = queue.head()
    assert head is not None
    queue.remove(head)
    return head


def test_one_tenant_is_first_come_first_served() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    expected = [arrive() for _ in range(5)]
    assert [pop(queue) for _ in range(5)] == expected
    assert queue.head() is None
    assert len(queue) == 0


def test_the_least_served_tenant_is_next() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    first, second, other = arrive("a"), arrive("a"), arrive("b")
    assert pop(queue) is first
    queue.charge(first, prompt_tokens=10)
    assert pop(queue) is other
    queue.charge(other, output_tokens=6)  # counts twice
    assert pop(queue) is second


def test_a_weight_divides_the_charge() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    heavy, light = arrive("a", weight=4.0), arrive("b")
    arrive("a", weight=4.0)
    arrive("b")
    pop(queue), pop(queue)
    queue.charge(heavy, prompt_tokens=100)
    queue.charge(light, prompt_tokens=26)
    assert queue.counter(heavy) == 25.0
    assert pop(queue).account[0] == "a"


def test_priority_goes_before_service() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    served = arrive("a")
    pop(queue)
    queue.charge(served, prompt_tokens=1000)
    normal, urgent = arrive("b"), arrive("a", priority=-1)
    assert pop(queue) is urgent
    assert pop(queue) is normal


def test_who_returns_from_idleness_has_saved_nothing() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    busy, early = arrive("a"), arrive("b")
    pop(queue), pop(queue)
    queue.charge(early, prompt_tokens=5)
    queue.leave(early)
    queue.charge(busy, prompt_tokens=1000)
    late = arrive("b")
    assert queue.counter(late) == 1000.0


def test_who_was_served_more_than_the_others_does_not_forget_it_by_leaving() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    low, high = arrive("a"), arrive("b")
    pop(queue), pop(queue)
    queue.charge(low, prompt_tokens=5)
    queue.charge(high, prompt_tokens=50)
    queue.leave(high)
    assert queue.counter(arrive("b")) == 50.0


def test_users_share_their_tenants_part_and_no_more() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    crowd = [arrive("a", user="u0") for _ in range(20)]
    crowd += [arrive("a", user=f"u{i % 2 + 1}") for i in range(10)]
    single = [arrive("b") for _ in range(10)]
    order = []
    for _ in range(20):
        order.append(pop(queue))
        queue.charge(order[-1], prompt_tokens=1)
    assert sum(s in single for s in order) == 10
    users = [s.account[1] for s in order if s in crowd]
    assert sorted(users.count(user) for user in ("u0", "u1", "u2")) == [3, 3, 4]


def test_a_preempted_sequence_goes_before_its_tenants_others() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    old, young, waiting = arrive("a", user="x"), arrive("a", user="x"), arrive("a", user="y")
    queue.remove(old)
    queue.remove(young)
    queue.charge(old, prompt_tokens=100)
    queue.push_front(young)
    queue.push_front(old)
    assert [pop(queue) for _ in range(3)] == [old, young, waiting]


def test_the_head_stays_until_it_leaves() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    running, big = arrive("a"), arrive("a")
    queue.remove(running)
    assert queue.head() is big
    arrive("b")
    queue.charge(running, output_tokens=1000)
    assert queue.head() is big  # refused for lack of blocks: nothing smaller slips by
    urgent = arrive("b", priority=-1)
    assert queue.head() is urgent


def test_idle_accounts_are_forgotten() -> None:
    queue = FairQueue()
    arrive = Arrivals(queue)
    busy = arrive("busy")
    pop(queue)
    for number in range(50):
        queue.charge(busy, prompt_tokens=10)
        guest = arrive(f"t{number}", user=f"u{number}")
        queue.remove(guest)
        queue.leave(guest)
    assert len(queue._tenants) <= 3
    queue.leave(busy)
    assert not queue._tenants


def drive(scheduler: Scheduler) -> tuple[Step, list[str]]:
    """One step in which every caught-up row says 7; also whom it ended."""
    step = scheduler.schedule()
    assert step is not None
    rows = [RowOutput(row=r.row, token_ids=[7] if r.sample else []) for r in step.rows]
    deltas = scheduler.update(step, StepOutput(step_id=step.id, rows=rows))
    return step, [delta.id for delta in deltas if delta.finish]


def make_scheduler(max_num_seqs: int = 4) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_num_seqs=max_num_seqs, max_batch_tokens=32),
        groups=[KVGroupLayout(window=None, num_blocks=401)],
        block_size=4,
        max_model_len=400,
        prefix_caching=False,
    )


def test_a_long_queue_of_one_tenant_hardly_delays_another() -> None:
    scheduler = make_scheduler()
    for number in range(100):
        scheduler.add(
            Request(
                id=f"a{number}",
                tenant="a",
                prompt_ids=[1] * 20,
                sampling=SamplingParams(max_tokens=20),
            )
        )
    for _ in range(10):
        drive(scheduler)
    scheduler.add(
        Request(id="b", tenant="b", prompt_ids=[2] * 20, sampling=SamplingParams(max_tokens=5))
    )
    served = 0
    while True:
        step, ended = drive(scheduler)
        served += step.num_tokens
        if "b" in ended:
            break
    # At most: what the four running ones still need, and what runs beside it.
    assert served <= 4 * (20 + 20) + 5 * 32
    assert scheduler.stats().num_waiting > 80


def test_weights_two_to_one_give_service_two_to_one() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    random_lengths = random.Random(0)
    served = {"a": 0, "b": 0}
    live = {"a": 0, "b": 0}
    lengths: dict[str, int] = {}
    number = 0
    for _ in range(3000):
        for tenant, weight in (("a", 2.0), ("b", 1.0)):
            while live[tenant] < 8:  # always more wanted than there is
                number += 1
                request = Request(
                    id=f"{tenant}{number}",
                    tenant=tenant,
                    weight=weight,
                    prompt_ids=[1] * random_lengths.randint(1, 30),
                    sampling=SamplingParams(max_tokens=random_lengths.randint(1, 30)),
                )
                lengths[request.id] = len(request.prompt_ids) + 2 * request.sampling.max_tokens
                scheduler.add(request)
                live[tenant] += 1
        for request_id in drive(scheduler)[1]:
            served[request_id[0]] += lengths[request_id]
            live[request_id[0]] -= 1
    assert 1.9 < served["a"] / served["b"] < 2.1


def test_the_charge_is_prompt_tokens_computed_once_and_outputs_twice() -> None:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2, max_batch_tokens=6),
        groups=[KVGroupLayout(window=None, num_blocks=50)],
        block_size=4,
        max_model_len=100,
    )
    sampling = SamplingParams(max_tokens=20)
    scheduler.add(Request(id="a", prompt_ids=[1] * 11, sampling=sampling, tenant="a"))
    drive(scheduler)
    drive(scheduler)
    (first,) = scheduler._running
    assert scheduler._queue.counter(first) == 11 + 2
    scheduler._preempt(first)
    drive(scheduler)  # hits 8 tokens and computes the other 4 again
    assert scheduler._queue.counter(first) == 11 + 2 + 2
    scheduler.abort("a")  # all idle: everyone starts from nothing
    scheduler.add(Request(id="b", prompt_ids=[1] * 11, sampling=sampling, tenant="a"))
    drive(scheduler)
    (second,) = scheduler._running
    assert scheduler._queue.counter(second) == 3 + 2  # what was found costs nothing
