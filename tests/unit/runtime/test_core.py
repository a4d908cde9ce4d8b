"""The engine's loop with an executor that needs no model: the next token counts the row's own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from tests.unit.runtime.harness import make_request
from tgi_cli.config import SchedulerConfig
from tgi_cli.engine.block_table import KVGroupLayout
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Abort, Delta, EngineStats, Inbound, ModelFacts
from tgi_cli.engine.scheduler import Scheduler
from tgi_cli.engine.step import RowOutput, Step, StepOutput

FACTS = ModelFacts(
    model_id="m", model_path="/m", model_sha=None, architecture="A", dtype="float32",
    kv_cache_dtype="float32", device="cpu", backend="fake", quantization=None,
    activation_dtype="float32", deterministic=True, vocab_size=100,
    max_model_len=64, max_num_seqs=4, max_batch_tokens=16, block_size=4,
    kv_cache_tokens=256, kv_blocks_total=64, num_parameters=0, weights_bytes=0,
)  # fmt: skip


class CountingExecutor:
    """Token i of a row is its prompt length + i; one chosen request fails, or every step does."""

    def __init__(self) -> None:
        self.lens: dict[int, int] = {}
        self.poisoned: set[int] = set()
        self.steps: list[Step] = []
        self.error: Exception | None = None
        self.closed = False
        self.allowance: threading.Semaphore | None = None  # of steps, if tests hold them back

    def check(self) -> None:
        pass

    def on_failure(self, call: Callable[[], None]) -> None:
        pass

    def submit(self, step: Step) -> None:
        self.steps.append(step)
        for row in step.removed_rows:
            self.lens.pop(row, None)
            self.poisoned.discard(row)
        for new in step.new_rows:
            self.lens[new.row] = len(new.request.prompt_ids) + len(new.request.output_ids)
            if new.request.id == "poison":
                self.poisoned.add(new.row)

    def collect(self) -> StepOutput:
        if self.allowance is not None:
            self.allowance.acquire(timeout=30)
        if self.error is not None:
            raise self.error
        step = self.steps[-1]
        rows = []
        for row in step.rows:
            if row.row in self.poisoned:
                rows.append(RowOutput(row=row.row, error="poisoned"))
                continue
            tokens = [self.lens[row.row]] if row.sample else []
            self.lens[row.row] += len(tokens)
            rows.append(RowOutput(row=row.row, token_ids=tokens))
        return StepOutput(step_id=step.id, rows=rows)

    def close(self) -> None:
        self.closed = True


def make_core() -> tuple[EngineCore, CountingExecutor]:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_batch_tokens=16),
        groups=[KVGroupLayout(None, 65)],
        block_size=4,
        max_model_len=64,
    )
    executor = CountingExecutor()
    return EngineCore(scheduler, executor, FACTS), executor


def drain(core: EngineCore) -> dict[str, list[Delta]]:
    out: dict[str, list[Delta]] = {}
    while core.has_work():
        for delta in core.step():
            out.setdefault(delta.id, []).append(delta)
    return out


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_a_request_runs_to_its_end() -> None:
    core, _ = make_core()
    core.accept(make_request([1, 2, 3], max_tokens=4))
    deltas = drain(core)["r"]
    assert tokens(deltas) == [3, 4, 5, 6]
    assert deltas[-1].finish == "length"
    assert core.stats().generated_tokens == 4


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (make_request([1] * 70, request_id="bad"), "70 tokens"),
        (make_request([], request_id="bad"), "no tokens"),
        (make_request([1], request_id="bad", temperature=-1.0), "temperature"),
        (make_request([1], request_id="bad", stop_token_ids=(100,)), "stop_token_ids"),
        (make_request([1], [2, 3], request_id="bad", max_tokens=2), "max_tokens"),
        (make_request([1, -1], request_id="bad"), "from 0 to 99"),
        (make_request([1], [100], request_id="bad"), "from 0 to 99"),
        (make_request([1], request_id="poison"), "poisoned"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_ends_alone(bad, words: str) -> None:
    core, _ = make_core()
    core.accept(make_request([1, 2], request_id="good", max_tokens=3))
    core.accept(bad)
    deltas = drain(core)
    assert tokens(deltas["good"]) == [2, 3, 4]
    assert [delta.finish for delta in deltas[bad.id]] == ["error"]
    assert words in deltas[bad.id][0].error


def test_an_abort_ends_a_request_within_a_step() -> None:
    core, _ = make_core()
    core.accept(make_request([1], request_id="a", max_tokens=50))
    core.accept(make_request([1], request_id="b", max_tokens=2))
    core.step()
    core.accept(Abort(["a", "unknown"]))
    deltas = core.step()
    assert [delta.finish for delta in deltas if delta.id == "a"] == ["abort"]
    assert "a" not in drain(core)
    assert core.stats().kv_blocks_used == 0


def test_an_abort_is_answered_while_idle() -> None:
    core, executor = make_core()
    core.accept(make_request([1], request_id="a"))
    core.accept(Abort(["a"]))
    assert [delta.finish for delta in core.step()] == ["abort"]
    assert not executor.steps
    assert not core.has_work()


class ScriptedTransport:
    """Gives batches of messages, then the end; remembers whether it was allowed to wait."""

    def __init__(self, batches: list[list[Inbound]]) -> None:
        self.batches = batches
        self.waits: list[bool] = []
        self.sent: list[Delta] = []

    def receive(self, *, wait: bool) -> Sequence[Inbound] | None:
        self.waits.append(wait)
        if self.batches and (wait or len(self.waits) % 2):
            return self.batches.pop(0)
        return None if wait else []

    def send(self, deltas: list[Delta], stats: EngineStats) -> None:
        self.sent += deltas

    def wake(self) -> None:
        pass


def test_the_loop_waits_only_without_work() -> None:
    core, _ = make_core()
    transport = ScriptedTransport(
        [[make_request([1], request_id="a", max_tokens=3)], [make_request([1], request_id="b")]]
    )
    core.run(transport)
    assert transport.waits[0]
    assert transport.waits[-1]
    assert not all(transport.waits)
    assert {d.id for d in transport.sent if d.finish} == {"a", "b"}


def test_a_failing_step_ends_the_engine() -> None:
    core, executor = make_core()
    executor.error = RuntimeError("no more memory")
    transport = ScriptedTransport([[make_request([1])]])
    with pytest.raises(RuntimeError, match="no more memory"):
        core.run(transport)


def test_heartbeat_tells_a_running_step_from_an_idle_engine() -> None:
    core, executor = make_core()
    assert not core.heartbeat().has_work
    entered, leave = threading.Event(), threading.Event()
    plain = executor.collect

    def slow() -> StepOutput:
        entered.set()
        leave.wait(10)
        return plain()

    executor.collect = slow  # type: ignore[method-assign]
    core.accept(make_request([1], max_tokens=1))
    thread = threading.Thread(target=core.step)
    thread.start()
    entered.wait(10)
    first = core.heartbeat()
    time.sleep(0.01)
    assert core.heartbeat().step_age > first.step_age >= 0.0
    assert first.has_work
    leave.set()
    thread.join()
    after = core.heartbeat()
    assert (after.step_age, after.has_work, after.num_steps) == (0.0, False, 1)


def test_an_idle_loop_uses_no_processor() -> None:
    core, _ = make_core()
    inbox: queue.SimpleQueue[list[Inbound] | None] = queue.SimpleQueue()

    class Blocking:
        def receive(self, *, wait: bool) -> Sequence[Inbound] | None:
            return inbox.get() if wait else []

        def send(self, deltas: list[Delta], stats: EngineStats) -> None:
            pass

        def wake(self) -> None:
            pass

    thread = threading.Thread(target=core.run, args=(Blocking(),))
    thread.start()
    inbox.put([make_request([1], max_tokens=2)])
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    inbox.put(None)
    thread.join()
