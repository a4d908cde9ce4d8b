"""A rank other than 0: `python -m tgi_cli.engine.worker --rank K --control-fd N --steps-fd N`.

Builds its part of the model and runs the steps that rank 0 sends; it decides nothing and draws
nothing. It ends with its control channel, also in the middle of a step. Torch is imported after the
rank is bound to its cores, so that its threads are too.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from tgi_cli import log as logs
from tgi_cli.engine.control import ControlChannel
from tgi_cli.engine.cores import bind
from tgi_cli.engine.messages import RankFacts
from tgi_cli.engine.rank_messages import (
    Agreed,
    Beat,
    Planned,
    RankFailed,
    RankReady,
    RankStart,
    ToRank,
    Work,
)
from tgi_cli.errors import EngineError, TgiError

if TYPE_CHECKING:
    from tgi_cli.engine.loading import OpenedModel
    from tgi_cli.engine.runner import ModelRunner
    from tgi_cli.kernels.collective import Collective

log = logging.getLogger(__name__)

HEARTBEAT = 0.25  # seconds
_PR_SET_PDEATHSIG = 1  # prctl.h


class RankWorker:
    """One life of a rank.

    Args:
        control: start, state and heartbeat; the death pipe.
        steps: what is to be done.
        memory_fd: shared memory of all ranks of this machine, None where they meet otherwise.
    """

    def __init__(
        self, control: ControlChannel, steps: ControlChannel, memory_fd: int | None
    ) -> None:
        self._control = control
        self._steps = steps
        self._memory_fd = memory_fd
        self._decode = msgspec.msgpack.Decoder(ToRank).decode
        self._collective: Collective | None = None

    def main(self) -> int:
        """Load, run steps until the channel ends, return the exit code."""
        first = self._control.receive()
        if first is None:
            return 0
        start = msgspec.msgpack.decode(first, type=RankStart)
        logs.configure(start.config.log_level, json_logs=start.config.json_logs)
        bind(start.cores)
        threading.Thread(target=self._end_with_channel, name="tgi-control", daemon=True).start()
        threading.Thread(target=self._beat, name="tgi-pulse", daemon=True).start()
        try:
            self._serve(start)
        except TgiError as error:
            self._fail(type(error).__name__, error.message, error.hint)
            return 1
        except Exception as error:
            log.exception("rank %d failed", start.rank)
            self._fail("EngineError", f"{type(error).__name__}: {error}", None)
            return 1
        return 0

    def _serve(self, start: RankStart) -> None:
        from tgi_cli.engine.loading import OpenedModel
        from tgi_cli.engine.meeting import MeetingPlace, join
        from tgi_cli.heap import return_large_memory

        return_large_memory()
        opened = OpenedModel(start.config, rank=start.rank, num_threads=start.num_threads)
        planned = opened.plan
        self._say(
            Planned(
                kv_cache_tokens=planned.kv_cache_tokens,
                max_model_len=planned.max_model_len,
                backend=opened.backend.name,
            )
        )
        agreed = self._receive()
        if agreed is None:
            return
        if not isinstance(agreed, Agreed):
            raise EngineError("work came before the sizes were agreed on")
        opened.agree(agreed.kv_cache_tokens, agreed.max_model_len)
        self._collective = join(
            opened.backend,
            rank=start.rank,
            world_size=start.config.parallel.num_shard,
            memory_fd=self._memory_fd,
            place=MeetingPlace(start.store, start.address),
        )
        runner = opened.build(self._collective, lambda fraction: None)
        self._say(RankReady(facts=_facts(start, opened)))
        self._run(runner)

    def _run(self, runner: ModelRunner) -> None:
        while (work := self._receive()) is not None:
            if not isinstance(work, Work):
                raise EngineError("the sizes were agreed on twice")
            for tokens in work.drawn:
                runner.follow(tokens)
            runner.submit(work.step)

    def _receive(self) -> Agreed | Work | None:
        data = self._steps.receive()
        return None if data is None else self._decode(data)

    def _beat(self) -> None:
        while True:
            collective = self._collective
            self._say(Beat(progress=0 if collective is None else collective.progress()))
            time.sleep(HEARTBEAT)

    def _end_with_channel(self) -> None:
        while self._control.receive() is not None:
            pass
        # Rank 0 is gone. A step may be running, so no orderly exit can be waited for.
        os._exit(0)

    def _fail(self, error: str, message: str, hint: str | None) -> None:
        self._say(RankFailed(error=error, message=message, hint=hint))
        if self._collective is not None:
            self._collective.abort()

    def _say(self, status: Any) -> None:
        try:
            self._control.send(status)
        except OSError:
            os._exit(0)


def _facts(start: RankStart, opened: OpenedModel) -> RankFacts:
    return RankFacts(
        rank=start.rank,
        pid=os.getpid(),
        host=start.address or os.uname().nodename,
        cores=sorted(os.sched_getaffinity(0)),
        num_threads=start.num_threads,
        weights_bytes=opened.plan.weights_bytes,
    )


def die_with_parent() -> None:
    """Have the kernel end this process with the one that started it, even while it is stopped."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    """Run a rank on inherited channels."""
    parser = argparse.ArgumentParser(prog="tgi_cli.engine.worker")
    parser.add_argument("--rank", type=int, help="for whoever reads the list of processes")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--steps-fd", type=int, required=True)
    parser.add_argument("--memory-fd", type=int)
    options = parser.parse_args(arguments)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = ControlChannel.from_fd(options.control_fd)
    steps = ControlChannel.from_fd(options.steps_fd)
    return RankWorker(control, steps, options.memory_fd).main()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)
