"""Requests whose grammar is being compiled: they wait here, not in the scheduler.

A request enters the scheduler only when it can run, so nobody waits for someone else's schema.
Compilation runs in threads with a deadline. Knows neither the scheduler nor a transport.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from functools import partial

from tgi_cli.engine.messages import Request
from tgi_cli.errors import InvalidRequest
from tgi_cli.grammar_compiler import COMPILE_DEADLINE, CompiledGrammar, GrammarCompiler
from tgi_cli.grammar_threads import Compiled, GrammarThreads


class GrammarQueue:
    """Used by the engine's thread alone, except that results arrive from others.

    Args:
        compiler: shared with the runner, which finds there what was compiled here.
        deadline: seconds a compilation may take.
    """

    def __init__(self, compiler: GrammarCompiler, *, deadline: float = COMPILE_DEADLINE) -> None:
        self._compiler = compiler
        self._threads = GrammarThreads(compiler, deadline=deadline)
        #: Called from a compiling thread when `ready` has something; replaced by the engine.
        self.wake: Callable[[], None] = _nobody
        self._parked: dict[str, Request] = {}
        self._held: dict[str, CompiledGrammar] = {}  # by live request: not to be compiled again
        self._results: queue.SimpleQueue[tuple[Request, CompiledGrammar | str]] = (
            queue.SimpleQueue()
        )

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._parked)

    @property
    def has_results(self) -> bool:
        """Whether `ready` would bring anything."""
        return not self._results.empty()

    def park(self, request: Request) -> bool:
        """Begin to compile the request's grammar; False if it is compiled and nothing waits.

        Raises `InvalidRequest` if a request with this id waits already.
        """
        assert request.grammar is not None
        if request.id in self._parked:
            raise InvalidRequest(f"request id `{request.id}` is in use")
        compiled = self._compiler.cached(request.grammar)
        if compiled is not None:
            self._held[request.id] = compiled
            return False
        self._parked[request.id] = request
        compiling = self._threads.submit(request.grammar)
        compiling.add_done_callback(partial(self._ended, request))
        return True

    def withdraw(self, request_id: str) -> bool:
        """Forget a request that waits; False if it does not."""
        return self._parked.pop(request_id, None) is not None

    def ready(self) -> list[tuple[Request, str | None]]:
        """Requests that wait no longer, each with why it cannot run, or None."""
        ended: list[tuple[Request, str | None]] = []
        while True:
            try:
                request, result = self._results.get_nowait()
            except queue.Empty:
                return ended
            if self._parked.get(request.id) is not request:  # withdrawn, or late
                continue
            del self._parked[request.id]
            if isinstance(result, str):
                ended.append((request, result))
            else:
                self._held[request.id] = result
                ended.append((request, None))

    def release(self, request_id: str) -> None:
        """Let go of what was kept for a request that has ended."""
        self._held.pop(request_id, None)

    def close(self) -> None:
        """End the threads, as soon as what they compile is done."""
        self._threads.close()

    def _ended(self, request: Request, compiling: Compiled) -> None:
        """Called from the thread that compiled, or at the deadline."""
        if compiling.cancelled():
            return
        error = compiling.exception()
        if error is None:
            self._results.put((request, compiling.result()))
        else:
            self._results.put((request, str(error)))
        self.wake()


def _nobody() -> None:
    """An engine that is stepped by hand looks by itself."""
