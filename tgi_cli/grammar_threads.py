"""Grammars compiled aside: in threads with deep stacks, each with a deadline of its own.

The compiler recurses over what a client wrote and cannot be interrupted, so a thread that is past
its deadline is left behind, at the lowest priority, and its place goes to the next grammar. Knows
neither requests nor an event loop.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Final

from tgi_cli.errors import InvalidRequest, Overloaded, TgiError
from tgi_cli.grammar import Grammar
from tgi_cli.grammar_compiler import COMPILE_DEADLINE, CompiledGrammar, GrammarCompiler

log = logging.getLogger(__name__)

Compiled = Future[CompiledGrammar]

#: Grammars compiled at the same time.
_NUM_THREADS: Final = 2
#: Threads left behind beyond which no grammar is taken until one of them ends.
_MAX_LOST: Final = 4
#: Bytes of a thread's stack, four times what the deepest source of `MAX_SOURCE` has needed. Only
#: what is used of it takes memory.
_STACK: Final = 256 << 20
_LOWEST: Final = 19


class _Job:
    """A grammar on its way; `over`, once it has its end, is written under the lock."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.future: Compiled = Future()
        self.over = False
        self.thread = 0


class GrammarThreads:
    """Futures of compiled grammars.

    Args:
        compiler: remembers what was compiled; look there first.
        deadline: seconds a compilation may take, from its own beginning. Reading the vocabulary,
            done once, does not count.
    """

    def __init__(self, compiler: GrammarCompiler, *, deadline: float = COMPILE_DEADLINE) -> None:
        self._compiler = compiler
        self._deadline = deadline
        self._lock = threading.Lock()
        self._free = _NUM_THREADS
        self._waiting: deque[_Job] = deque()
        self._lost: list[_Job] = []

    def submit(self, grammar: Grammar) -> Compiled:
        """Compile as soon as a thread is free; cancelled before, it never begins.

        The future fails with `InvalidRequest` for a grammar that is not one or takes too long, and
        with `Overloaded` while too many of those that took too long are still at work.
        """
        job = _Job(grammar)
        with self._lock:
            if any(lost.grammar == grammar for lost in self._lost):
                job.future.set_exception(self._too_slow())
            elif len(self._lost) >= _MAX_LOST:
                job.future.set_exception(
                    Overloaded(
                        f"{len(self._lost)} grammars that take too long are still being compiled",
                        retry_after=math.ceil(self._deadline),
                        hint="come back after the seconds in `Retry-After`",
                    )
                )
            else:
                self._waiting.append(job)
                self._start()
        return job.future

    def close(self) -> None:
        """Begin nothing more; what runs ends by itself and keeps no process alive."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.future.cancel()

    def _start(self) -> None:
        while self._free and self._waiting:
            job = self._waiting.popleft()
            if job.future.set_running_or_notify_cancel():
                self._free -= 1
                _start_deep(partial(self._run, job))

    def _run(self, job: _Job) -> None:
        job.thread = threading.get_native_id()
        timer = threading.Timer(self._deadline, self._expire, (job,))
        timer.daemon = True
        try:
            self._compiler.prepare()
            timer.start()
            compiled = self._compiler.compile(job.grammar)
            if self._claim(job):
                job.future.set_result(compiled)
        except TgiError as error:
            self._fail(job, error)
        except Exception:
            log.exception("a grammar could not be compiled")
            self._fail(job, InvalidRequest("grammar is not valid: it broke the compiler"))
        finally:
            timer.cancel()
            with self._lock:
                if job in self._lost:
                    self._lost.remove(job)
                else:
                    self._free += 1
                self._start()

    def _expire(self, job: _Job) -> None:
        """Leave the thread behind: its place is free, its sender hears why."""
        with self._lock:
            if job.over:
                return
            job.over = True
            self._lost.append(job)
            os.setpriority(os.PRIO_PROCESS, job.thread, _LOWEST)  # it cannot end without the lock
            self._free += 1
            self._start()
        job.future.set_exception(self._too_slow())

    def _claim(self, job: _Job) -> bool:
        """Whether the caller is the first to end this job, and so the one who may."""
        with self._lock:
            first, job.over = not job.over, True
        return first

    def _fail(self, job: _Job, error: Exception) -> None:
        if self._claim(job):
            job.future.set_exception(error)

    def _too_slow(self) -> InvalidRequest:
        return InvalidRequest(
            f"grammar is not valid: compiling it takes more than {self._deadline:g} seconds"
        )


def _start_deep(work: Callable[[], None]) -> None:
    before = threading.stack_size(_STACK)
    try:
        threading.Thread(target=work, name="tgi-compile", daemon=True).start()
    finally:
        threading.stack_size(before)
