"""The parent of a server: opens the port, starts engine and HTTP workers, keeps them alive.

It speaks no HTTP and computes nothing; it relays what the engine says of itself to the HTTP
workers, restarts what dies, kills what hangs, and lets accepted requests finish before it stops.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tgi_cli import errors
from tgi_cli.config import EngineConfig, ServerConfig
from tgi_cli.engine.control import how_it_ended
from tgi_cli.engine.messages import (
    Draining,
    EngineStart,
    Failed,
    Heartbeat,
    ModelFacts,
    Ready,
    Restarting,
    Starting,
    Status,
    WorkerStart,
)
from tgi_cli.errors import EngineError, HubError, TgiError, UsageError
from tgi_cli.serve.api_keys import read_key_file
from tgi_cli.serve.child import Child
from tgi_cli.serve.early_engine import EarlyEngine, weights_memory
from tgi_cli.serve.ledger import Ledger
from tgi_cli.serve.listener import listen, listen_unix
from tgi_cli.serve.telemetry_exporter import check_extra
from tgi_cli.serve.tls import tls_context

log = logging.getLogger(__name__)

_RESTART_WINDOW = 600.0  # seconds in which `max_engine_restarts` counts
_MAX_WORKER_RESTARTS = 10
_SILENCE = 1.5  # seconds without a heartbeat before the engine's process is looked at
_EXIT_PATIENCE = 5.0  # seconds for a child to leave after its channel closed

_decode = msgspec.msgpack.Decoder(Status).decode


class RestartBudget:
    """Allows `limit` restarts within `window` seconds."""

    def __init__(
        self, limit: int, window: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit = limit
        self._window = window
        self._clock = clock
        self._moments: deque[float] = deque()

    def take(self) -> bool:
        """Use one restart up; False when there is none left."""
        now = self._clock()
        while self._moments and now - self._moments[0] > self._window:
            self._moments.popleft()
        if len(self._moments) >= self.limit:
            return False
        self._moments.append(now)
        return True

    @property
    def used(self) -> int:
        """Restarts within the window."""
        return len(self._moments)


class Supervisor:
    """Runs a server until it is told to stop or cannot go on.

    `early_engine` is the first engine's process, if it has been started already.
    `on_listening(socket)` is called once the port is open (the model still loads then),
    `on_ready(facts)` when the first request can be served.
    """

    def __init__(
        self,
        engine: EngineConfig,
        server: ServerConfig,
        *,
        early_engine: EarlyEngine | None = None,
        on_listening: Callable[[socket.socket], None] | None = None,
        on_ready: Callable[[ModelFacts], None] | None = None,
    ) -> None:
        self._engine_config = engine
        self._server_config = server
        self._early_engine = early_engine
        self._on_listening = on_listening
        self._on_ready = on_ready
        self._ledger_fd = -1
        self._engine: Child | None = None
        self._workers: dict[int, Child] = {}
        self._status: Starting | Ready | Restarting = Starting(phase="starting")
        self._opened: set[int] = set()
        self._was_ready = False
        self._last_failure: str | None = None  # until an engine is ready again
        self._engine_restarts = RestartBudget(server.max_engine_restarts, _RESTART_WINDOW)
        self._worker_restarts = RestartBudget(_MAX_WORKER_RESTARTS, _RESTART_WINDOW)
        self._stopping = False

    def run(self) -> int:
        """Serve; 0 after an orderly end, 130 after a second Ctrl-C.

        Raises `UsageError` or `TgiError` if the port cannot be opened, whatever the engine failed
        of before it was ready, and `EngineError` when it keeps dying. No child outlives the call.
        """
        config = self._server_config
        check_extra(config)
        tls_context(config)  # a certificate that does not fit is said before anything starts
        if config.api_key_file is not None:
            read_key_file(config.api_key_file)
        if config.uds is not None:
            listener = listen_unix(config.uds)
        else:
            listener = listen(config.host, config.port)
        runtime_dir = tempfile.mkdtemp(prefix="tgi-")  # 0700: only this user reaches the engine
        self._ledger_fd = Ledger.create(config.http_workers)
        try:
            if self._on_listening is not None:
                self._on_listening(listener)
            return asyncio.run(self._serve(listener, runtime_dir))
        finally:
            listener.close()
            os.close(self._ledger_fd)
            if config.uds is not None:
                Path(config.uds).unlink(missing_ok=True)
            shutil.rmtree(runtime_dir, ignore_errors=True)

    async def _serve(self, listener: socket.socket, runtime_dir: str) -> int:
        loop = asyncio.get_running_loop()
        stop, now = asyncio.Event(), asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._on_signal, stop, now)
        engine = asyncio.create_task(self._keep_engine(runtime_dir))  # first: it takes longest
        workers = [
            asyncio.create_task(self._keep_worker(index, listener, runtime_dir))
            for index in range(self._server_config.http_workers)
        ]
        stopped = asyncio.create_task(stop.wait())
        forced = asyncio.create_task(now.wait())
        tasks: list[asyncio.Task[Any]] = [engine, *workers, stopped, forced]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in (engine, *workers):
                if task.done():
                    task.result()  # it raises: a keeper never returns while nobody asked to stop
            await self._drain(listener, forced, workers)
            return 130 if now.is_set() else 0
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_children(0.0 if now.is_set() else _EXIT_PATIENCE)

    def _on_signal(self, stop: asyncio.Event, now: asyncio.Event) -> None:
        (now if stop.is_set() else stop).set()

    # The engine

    async def _keep_engine(self, runtime_dir: str) -> None:
        # Held here, so that the next engine finds the packed weights.
        early = self._early_engine
        weights_fd = weights_memory() if early is None else early.weights_fd
        try:
            await self._keep_engines(runtime_dir, weights_fd)
        finally:
            os.close(weights_fd)

    async def _keep_engines(self, runtime_dir: str, weights_fd: int) -> None:
        epoch = 0
        while True:
            start = EngineStart(config=self._engine_config, runtime_dir=runtime_dir, epoch=epoch)
            early, self._early_engine = self._early_engine, None
            if early is not None:
                self._engine = await Child.adopt(early, early.channel, start)
            else:
                self._engine = await Child.spawn(
                    "tgi_cli.engine.process",
                    start,
                    arguments=("--weights-fd", str(weights_fd)),
                    inherit=(weights_fd,),
                )
            failure = await self._attend(self._engine)
            if self._stopping:
                self._tell(Restarting(reason=failure.message))  # nothing more will come
                return
            if not self._was_ready:
                raise failure
            if not self._engine_restarts.take():
                self._tell(Restarting(reason=failure.message))  # what requests in flight ended of
                limit = self._engine_restarts.limit
                raise EngineError(
                    f"the engine failed again after {limit} restarts in "
                    f"{_RESTART_WINDOW / 60:.0f} minutes: {failure.message}",
                    hint=failure.hint or "look for the first failure in the log above",
                )
            log.error(
                "the engine failed: %s; restarting it (%d of %d)",
                failure.message,
                self._engine_restarts.used,
                self._engine_restarts.limit,
            )
            self._last_failure = failure.message
            self._tell(Restarting(reason=failure.message))
            epoch += 1

    async def _attend(self, engine: Child) -> TgiError:
        """Listen to one engine until its end; returns what it died of."""
        timeout = self._server_config.step_timeout
        ready = False
        reported: TgiError | None = None
        while True:
            try:
                data = await _hear(engine, timeout if ready else None)
            except TimeoutError as error:
                reported = EngineError(f"the engine gave no sign of life for {error}")
                engine.kill()
                break
            if data is None:
                break
            status = _decode(data)
            if isinstance(status, Failed):
                reported = error_of(status)
            elif isinstance(status, Heartbeat) and status.step_age > timeout:
                reported = EngineError(
                    f"one step of the engine has taken {status.step_age:.0f} seconds, "
                    f"more than --step-timeout {timeout:g}"
                )
                engine.kill()
                break
            elif isinstance(status, Starting | Ready | Heartbeat):
                if isinstance(status, Starting):
                    status = msgspec.structs.replace(status, after=self._last_failure)
                elif isinstance(status, Ready):
                    ready, self._last_failure = True, None
                self._tell(status)
        code = await engine.end(_EXIT_PATIENCE)
        return reported or EngineError(
            f"the engine process {how_it_ended(code)}",
            hint="the kernel kills a process when memory runs out: see `dmesg`"
            if code == -signal.SIGKILL
            else None,
        )

    # The HTTP workers

    async def _keep_worker(self, index: int, listener: socket.socket, runtime_dir: str) -> None:
        start = WorkerStart(
            config=self._server_config,
            engine=self._engine_config,
            index=index,
            runtime_dir=runtime_dir,
        )
        while True:
            worker = await Child.spawn(
                "tgi_cli.serve.worker",
                start,
                arguments=(
                    *("--listen-fd", str(listener.fileno())),
                    *("--ledger-fd", str(self._ledger_fd)),
                ),
                inherit=(listener.fileno(), self._ledger_fd),
            )
            self._workers[index] = worker
            worker.send(self._status)
            while (data := await worker.receive()) is not None:
                self._hear_worker(index, _decode(data))
            code = await worker.end(_EXIT_PATIENCE)
            del self._workers[index]
            self._opened.discard(index)
            if not self._worker_restarts.take():
                raise EngineError(f"HTTP worker {index} keeps dying: it {how_it_ended(code)}")
            log.error("HTTP worker %d %s; starting another", index, how_it_ended(code))

    def _hear_worker(self, index: int, status: Any) -> None:
        if isinstance(status, Failed):
            raise error_of(status)
        if isinstance(status, Ready):
            self._opened.add(index)
            if not self._was_ready and len(self._opened) == self._server_config.http_workers:
                self._was_ready = True
                if self._on_ready is not None:
                    self._on_ready(status.facts)

    def _tell(self, status: Starting | Ready | Restarting | Heartbeat | Draining) -> None:
        if isinstance(status, Starting | Ready | Restarting):
            self._status = status
        for worker in self._workers.values():
            worker.send(status)

    # The end

    async def _drain(
        self,
        listener: socket.socket,
        forced: asyncio.Task[Any],
        worker_keepers: list[asyncio.Task[None]],
    ) -> None:
        """Let the workers finish what they accepted, unless told to hurry."""
        self._stopping = True
        for task in worker_keepers:
            task.cancel()  # the workers are about to leave, and shall not be replaced
        await asyncio.gather(*worker_keepers, return_exceptions=True)
        timeout = self._server_config.graceful_termination_timeout
        log.info("stopping: finishing accepted requests, for at most %g seconds", timeout)
        self._tell(Draining(timeout=timeout))
        listener.close()  # the workers hold the port open for a last moment
        gone = asyncio.gather(*(worker.wait() for worker in self._workers.values()))
        await asyncio.wait(
            [gone, forced], timeout=timeout + _EXIT_PATIENCE, return_when=asyncio.FIRST_COMPLETED
        )
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)

    async def _end_children(self, patience: float) -> None:
        children = [*self._workers.values()]
        if self._engine is not None:
            children.append(self._engine)
        await asyncio.gather(*(child.end(patience) for child in children))


async def _hear(engine: Child, timeout: float | None) -> bytes | None:
    """Its next frame. Raises `TimeoutError` after `timeout` seconds, or soon if it is stopped."""
    receiving = asyncio.ensure_future(engine.receive())
    waited = 0.0
    try:
        while True:
            patience = _SILENCE if timeout is None else min(_SILENCE, timeout - waited)
            done, _ = await asyncio.wait([receiving], timeout=patience)
            if done:
                return receiving.result()
            waited += patience
            if engine.stopped:
                raise TimeoutError(f"{waited:g} seconds: its process is stopped")
            if timeout is not None and waited >= timeout:
                raise TimeoutError(f"{waited:g} seconds")
    finally:
        receiving.cancel()


def error_of(failed: Failed) -> TgiError:
    """The exception that a child reported, rebuilt by its class's name."""
    kind = getattr(errors, failed.error, EngineError)
    known = isinstance(kind, type) and issubclass(kind, EngineError | HubError | UsageError)
    return (kind if known else EngineError)(failed.message, hint=failed.hint)
