"""The engine's loop body: inbox, schedule, submit, collect, update, outbox. No sockets, no text.

Where messages come from and go to is a `Transport`; which thread or process this runs in is its
owner's business. One request's failure ends that request; a failure of a step ends the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from tgi_cli.config import EngineConfig
from tgi_cli.engine.executor import Executor, ModelExecutor, Report
from tgi_cli.engine.grammar_queue import GrammarQueue
from tgi_cli.engine.memory_plan import MemoryPlan
from tgi_cli.engine.messages import (
    Abort,
    Delta,
    EngineStats,
    Heartbeat,
    Inbound,
    ModelFacts,
    Request,
)
from tgi_cli.engine.nodes import Nodes
from tgi_cli.engine.scheduler import Scheduler
from tgi_cli.engine.step_clock import StepClock
from tgi_cli.errors import InvalidRequest, TgiError

log = logging.getLogger(__name__)


class Transport(Protocol):
    """How messages reach the engine and leave it. Used by the engine's thread alone."""

    def receive(self, *, wait: bool) -> Sequence[Inbound] | None:
        """What has arrived, None when the engine is to end.

        With `wait` it blocks, without using the processor, until there is something.
        """
        ...

    def send(self, deltas: list[Delta], stats: EngineStats) -> None:
        """Deliver what one step produced. Never blocks."""
        ...

    def wake(self) -> None:
        """Make a `receive` that waits return, now or when it is called next; from any thread."""
        ...


class EngineCore:
    """Scheduler and executor of one model.

    Args:
        scheduler: decides.
        executor: computes.
        facts: of the loaded model; requests are checked against them again.
        memory_plan: what the executor was sized by, if by a plan.
        grammars: where requests wait for their grammar; without it they are refused.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        facts: ModelFacts,
        *,
        memory_plan: MemoryPlan | None = None,
        grammars: GrammarQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.facts = facts
        self.memory_plan = memory_plan
        self._scheduler = scheduler
        self._executor = executor
        self._grammars = grammars
        self._clock = clock
        self._outbox: list[Delta] = []  # of requests that ended outside a step
        self._num_steps = 0
        self._step_clock = StepClock(clock)

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        report: Report,
        weights_fd: int | None = None,
        nodes: Nodes | None = None,
    ) -> EngineCore:
        """Load a model and put an engine around it; see `ModelExecutor.load`."""
        executor = ModelExecutor.load(config, report, weights_fd, nodes)
        planned = executor.memory_plan
        scheduler = Scheduler(
            config.scheduler,
            groups=planned.layouts(),
            block_size=planned.block_size,
            max_model_len=planned.max_model_len,
            prefix_caching=config.cache.prefix_caching,
            clock=time.monotonic,
        )
        facts = msgspec.structs.replace(executor.facts, max_model_len=scheduler.max_model_len)
        grammars = GrammarQueue(executor.grammars)
        return cls(scheduler, executor, facts, memory_plan=planned, grammars=grammars)

    def run(self, transport: Transport) -> None:
        """Serve until the transport says to end. Whatever a step raises comes out of here."""
        if self._grammars is not None:
            self._grammars.wake = transport.wake
        self._executor.on_failure(transport.wake)
        while True:
            messages = transport.receive(wait=not self._can_step())
            if messages is None:
                return
            for message in messages:
                self.accept(message)
            self._executor.check()  # a rank may have died while there was nothing to do
            deltas = self.step()
            if deltas:
                transport.send(deltas, self.stats())

    def accept(self, message: Inbound) -> None:
        """Take a request or an abort. A request that cannot run ends with an `error` delta."""
        if isinstance(message, Abort):
            for request_id in message.ids:
                if self._grammars is not None and self._grammars.withdraw(request_id):
                    self._outbox.append(Delta(id=request_id, finish="abort"))
                    continue
                delta = self._scheduler.abort(request_id)
                if delta is not None:
                    self._outbox.append(delta)
            return
        self._enter(message, parked=False)

    def _enter(self, message: Request, *, parked: bool) -> None:
        """Let a request into the scheduler, or wait for its grammar outside."""
        try:
            if not parked:
                self._check(message)
                if message.grammar is not None and self._must_wait(message):
                    return
            self._scheduler.add(message)
        except TgiError as error:
            self._refuse(message, error.message)
        except Exception:
            log.exception("request %s could not be added", message.id)
            self._refuse(message, "an internal error: the request could not be added")

    def step(self) -> list[Delta]:
        """Run one step if there is one; return what goes to the clients."""
        if self._grammars is not None and self._grammars.has_results:
            for request, error in self._grammars.ready():
                if error is None:
                    self._enter(request, parked=True)
                else:
                    self._refuse(request, error)
        deltas, self._outbox = self._outbox, []
        began = self._clock()
        step = self._scheduler.schedule()
        if step is None:
            return self._released(deltas)
        self._step_clock.scheduled(step, began)
        self._executor.submit(step)
        output = self._executor.collect()
        self._step_clock.computed()
        self._num_steps += 1
        news = self._scheduler.update(step, output)
        self._step_clock.booked(ended=any(delta.finish is not None for delta in news))
        return self._released(deltas + news)

    def has_work(self) -> bool:
        """Whether any request has not ended, or something is to be said of one that has."""
        return self._can_step() or bool(self._grammars)

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""
        return msgspec.structs.replace(
            self._scheduler.stats(), last_step_seconds=self._step_clock.last_seconds
        )

    def heartbeat(self) -> Heartbeat:
        """A sign of life; may be asked from another thread."""
        held, allowed = self._scheduler.tokens()
        return Heartbeat(
            num_steps=self._num_steps,
            step_age=self._step_clock.step_age,
            has_work=self._step_clock.running_since is not None or self.has_work(),
            tokens_held=held,
            tokens_allowed=allowed,
            steps=self._step_clock.record(),
        )

    def close(self) -> None:
        """Release the model."""
        if self._grammars is not None:
            self._grammars.close()
        self._executor.close()

    def _can_step(self) -> bool:
        """Whether a call of `step` could bring anything; waiting for a grammar is not that."""
        if self._grammars is not None and self._grammars.has_results:
            return True
        return bool(self._outbox) or self._scheduler.has_work()

    def _must_wait(self, request: Request) -> bool:
        if self._grammars is None:
            raise InvalidRequest("grammar is not supported")
        return self._grammars.park(request)

    def _released(self, deltas: list[Delta]) -> list[Delta]:
        """The same deltas; what was kept for the requests they end is let go."""
        if self._grammars is not None:
            for delta in deltas:
                if delta.finish is not None:
                    self._grammars.release(delta.id)
        return deltas

    def _check(self, request: Request) -> None:
        """What the front door has checked too: nothing unchecked reaches the model."""
        request.sampling.validate(self.facts.vocab_size)
        for ids in (request.prompt_ids, request.output_ids):
            if ids and not 0 <= min(ids) <= max(ids) < self.facts.vocab_size:
                raise InvalidRequest(
                    f"token ids must be from 0 to {self.facts.vocab_size - 1}. "
                    f"Given: {min(ids)} to {max(ids)}"
                )

    def _refuse(self, request: Request, message: str) -> None:
        self._outbox.append(Delta(id=request.id, finish="error", error=message))
