"""The other ranks as rank 0 sees them: started together, given the same work, watched.

A rank that dies, stops, hangs or fails is noticed by a thread for each rank and one that counts
their heartbeats. The first failure is kept, with the rank's own error; it aborts the collective, so
that no rank goes on waiting. Knows neither steps' content nor the model.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import msgspec
import psutil

from tgi_cli import errors
from tgi_cli.engine.control import ControlChannel, Ending
from tgi_cli.engine.messages import RankFacts
from tgi_cli.engine.nodes import Node
from tgi_cli.engine.pulse import Pulse
from tgi_cli.engine.rank_messages import (
    Beat,
    Planned,
    RankFailed,
    RankStart,
    RankStatus,
)
from tgi_cli.errors import EngineError, HubError, TgiError, UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")

_TICK = 0.1  # seconds
_SILENCE = 1.5  # seconds without a heartbeat, once a rank is loaded
_LOADING_SILENCE = 60.0  # while it loads: importing libraries may hold its threads up
_ATTRIBUTION = 2.0  # seconds to wait for whose fault a broken step was
_EXIT_PATIENCE = 2.0


class Peer:
    """One other rank: its two channels, and its process or the node that it is on."""

    def __init__(
        self,
        rank: int,
        control: ControlChannel,
        steps: ControlChannel,
        process: subprocess.Popen[bytes] | None = None,
        node: Node | None = None,
    ) -> None:
        self.rank = rank
        self.control = control
        self.steps = steps
        self.process = process
        self.node = node
        self.planned: Planned | None = None
        self.facts: RankFacts | None = None

    @classmethod
    def spawn(cls, start: RankStart, memory_fd: int | None) -> Peer:
        """Start a rank on this machine."""
        control, their_control = socket.socketpair()
        steps, their_steps = socket.socketpair()
        inherited = [their_control.fileno(), their_steps.fileno()]
        arguments = ["--rank", str(start.rank)]
        arguments += ["--control-fd", str(inherited[0]), "--steps-fd", str(inherited[1])]
        if memory_fd is not None:
            inherited.append(memory_fd)
            arguments += ["--memory-fd", str(memory_fd)]
        with their_control, their_steps:
            process = subprocess.Popen(
                [sys.executable, "-m", "tgi_cli.engine.worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=inherited,
            )
        peer = cls(start.rank, ControlChannel(control), ControlChannel(steps), process)
        peer.control.send(start)
        return peer

    def __str__(self) -> str:
        if self.process is not None:
            return f"rank {self.rank} (process {self.process.pid})"
        return f"rank {self.rank} on {self.node}"

    def ending(self) -> Ending:
        """How it ended, now that its channel has."""
        if self.process is not None:
            return Ending.of(self.process.wait())
        assert self.node is not None
        return self.node.ending(self.rank)

    def state(self) -> str:
        """What the kernel says of its process, where that explains a silence."""
        if self.process is not None:
            with suppress(psutil.Error):
                process = psutil.Process(self.process.pid)  # type: ignore[no-untyped-call]
                if process.status() == psutil.STATUS_STOPPED:  # type: ignore[no-untyped-call]
                    return ": its process is stopped"
        return ""


class Ranks:
    """All ranks but 0.

    Args:
        peers: just started.
        step_timeout: seconds without progress in a step after which a rank counts as stuck.
    """

    def __init__(self, peers: Sequence[Peer], *, step_timeout: float) -> None:
        self._peers = list(peers)
        self._changed = threading.Condition()
        self._failure: TgiError | None = None
        self._closing = False
        self._in_step = False
        self._pulse = Pulse(
            len(self._peers) + 1,
            interval=_TICK,
            silence=_LOADING_SILENCE,
            step_timeout=step_timeout,
        )
        #: Ends waiting in the collective, and gives rank 0's progress in it; set once it is there.
        self.abort: Callable[[], None] = lambda: None
        self.progress: Callable[[], int] = lambda: 0
        self._on_failure: Callable[[], None] = lambda: None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(RankStatus).decode
        self._threads = [
            self._thread(self._listen, f"tgi-rank-{peer.rank}", peer) for peer in self._peers
        ]
        self._threads.append(self._thread(self._watch, "tgi-ranks"))

    def planned(self) -> list[Planned]:
        """What fits on each rank, when all have said so. Raises what a rank failed of."""
        self._wait(lambda: all(peer.planned for peer in self._peers))
        return [peer.planned for peer in self._peers if peer.planned is not None]

    def ready(self) -> list[RankFacts]:
        """Facts of each rank, when all are loaded. Raises what a rank failed of."""
        self._wait(lambda: all(peer.facts for peer in self._peers))
        self._pulse.silence = _SILENCE
        return [peer.facts for peer in self._peers if peer.facts is not None]

    def send(self, message: Any) -> None:
        """The same message to every rank, down its channel of steps."""
        self.check()
        for peer in self._peers:
            try:
                peer.steps.send(message)
            except OSError:
                raise self.blame() from None

    @contextmanager
    def step(self) -> Iterator[None]:
        """While a step runs ranks are to make progress; errors of the collective are explained."""
        self._in_step = True
        try:
            yield
        except EngineError as error:
            raise self.blame(error) from error
        finally:
            self._in_step = False

    def unless_one_fails(self, work: Callable[[], T]) -> T:
        """What `work` gives, which waits for the ranks; left behind if one of them fails."""
        done: list[tuple[T | None, BaseException | None]] = []

        def run() -> None:
            try:
                found: tuple[T | None, BaseException | None] = work(), None
            except BaseException as error:
                found = None, error
            with self._changed:
                done.append(found)
                self._changed.notify_all()

        self._thread(run, "tgi-ranks-meet")
        self._wait(lambda: bool(done))
        ((result, error),) = done
        if error is not None:
            raise error
        return cast(T, result)

    def on_failure(self, call: Callable[[], None]) -> None:
        """Have `call` made when a rank fails, or now if one has; perhaps from another thread."""
        self._on_failure = call
        if self._failure is not None:
            call()

    def check(self) -> None:
        """Raise the failure that has ended the ranks, if any."""
        if self._failure is not None:
            raise self._failure

    def blame(self, error: EngineError | None = None) -> TgiError:
        """The failure behind a broken step, which its watcher may be about to notice."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, _ATTRIBUTION)
        return self._failure or error or EngineError("a rank is gone")

    def close(self) -> None:
        """End all ranks; those that do not go by themselves are killed."""
        self._closing = True
        self.abort()
        for peer in self._peers:
            peer.control.hang_up()
            peer.steps.hang_up()
        deadline = time.monotonic() + _EXIT_PATIENCE
        for peer in self._peers:
            if peer.process is not None:
                try:
                    peer.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    peer.process.kill()  # also ends a stopped one
                    peer.process.wait()
        for thread in self._threads:
            thread.join()
        for peer in self._peers:
            peer.control.close()
            peer.steps.close()

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: done() or self._failure is not None)
        self.check()

    def _listen(self, peer: Peer) -> None:
        """Read what one rank says until its end."""
        while (data := peer.control.receive()) is not None:
            status = self._decode(data)
            if isinstance(status, Beat):
                self._pulse.beat(peer.rank, status.progress)
            elif isinstance(status, RankFailed):
                self._fail(
                    f"{peer} failed: {status.message}", error_kind(status.error), status.hint
                )
            else:
                with self._changed:
                    if isinstance(status, Planned):
                        peer.planned = status
                    else:
                        peer.facts = status.facts
                    self._changed.notify_all()
        if self._closing:
            return
        ending = peer.ending()
        hint = "the kernel kills a process when memory runs out: see `dmesg`"
        self._fail(f"{peer} {ending.how}", hint=hint if ending.killed else None)

    def _watch(self) -> None:
        while not self._closing and self._failure is None:
            time.sleep(_TICK)
            self._pulse.beat(0, self.progress())
            found = self._pulse.tick(in_step=self._in_step)
            if found is None:
                continue
            ranks, how = found
            by_rank = {peer.rank: peer for peer in self._peers}
            named = " and ".join(str(by_rank.get(rank, f"rank {rank}")) for rank in ranks)
            state = by_rank[ranks[0]].state() if ranks[0] in by_rank else ""
            self._fail(f"{named} {how}{state}")

    def _fail(
        self, message: str, kind: type[TgiError] = EngineError, hint: str | None = None
    ) -> None:
        with self._changed:
            if self._failure is not None or self._closing:
                return
            self._failure = kind(message, hint=hint)
            self._changed.notify_all()
        log.error("%s", message)
        self.abort()
        self._on_failure()

    @staticmethod
    def _thread(work: Callable[..., None], name: str, *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
        thread.start()
        return thread


def error_kind(name: str) -> type[TgiError]:
    """The class of an error that another process reported by name."""
    kind = getattr(errors, name, EngineError)
    known = isinstance(kind, type) and issubclass(kind, EngineError | HubError | UsageError)
    return kind if known else EngineError
