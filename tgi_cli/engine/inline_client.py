"""`InlineClient`: an engine in a thread of this process, for `LLM`, tests and offline use.

The same protocol as `ProcessClient`. Nothing guards against a crash in native code here.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from tgi_cli.config import EngineConfig
from tgi_cli.engine.client import Shortcut
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Abort, Delta, EngineStats, Inbound, ModelFacts, Request
from tgi_cli.engine.streams import StreamTable
from tgi_cli.errors import EngineUnavailable

log = logging.getLogger(__name__)


class _QueueTransport:
    """A queue in, a callback out."""

    def __init__(self, deliver: Callable[[list[Delta], EngineStats], None]) -> None:
        self.inbox: queue.SimpleQueue[Inbound | None] = queue.SimpleQueue()
        self._deliver = deliver

    def receive(self, *, wait: bool) -> Sequence[Inbound] | None:
        messages: list[Inbound] = []
        while True:
            try:
                message = self.inbox.get(block=wait and not messages)
            except queue.Empty:
                return messages
            if message is None:
                return None
            messages.append(message)

    def send(self, deltas: list[Delta], stats: EngineStats) -> None:
        self._deliver(deltas, stats)

    def wake(self) -> None:
        self.inbox.put(Abort([]))  # a message that means nothing


class InlineClient:
    """Runs `core` in a thread of its own until `close`. To be used from one event loop."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._loop = asyncio.get_running_loop()
        self._streams = StreamTable()
        self._stats = core.stats()
        self._state = "ready"
        self._transport = _QueueTransport(self._deliver)
        self._thread = threading.Thread(target=self._run, name="tgi-engine", daemon=True)
        self._thread.start()

    @classmethod
    async def start(cls, config: EngineConfig) -> InlineClient:
        """Load a model in a thread, then serve it. Raises as `ModelExecutor.load`."""
        return cls(await asyncio.to_thread(EngineCore.load, config, _ignore))

    async def generate(
        self, request: Request, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See `EngineClient.generate`."""
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is not available: {self._state}")
        reading = self._streams.read(
            request, send=self._transport.inbox.put, abort=self.abort, shortcut=shortcut
        )
        async with aclosing(reading) as deltas:
            async for delta in deltas:
                yield delta

    def abort(self, request_id: str) -> None:
        """See `EngineClient.abort`."""
        self._transport.inbox.put(Abort([request_id]))

    @property
    def facts(self) -> ModelFacts | None:
        """The loaded model."""
        return self._core.facts

    @property
    def stats(self) -> EngineStats:
        """The counters after the newest step."""
        return self._stats

    @property
    def state(self) -> str:
        """`ready`, or why not."""
        return self._state

    async def close(self) -> None:
        """End every open stream and the engine's thread."""
        self._fail("shutting down")
        self._transport.inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._core.close()

    def _run(self) -> None:
        try:
            self._core.run(self._transport)
        except Exception as error:
            log.exception("the engine died")
            reason = f"it died of {type(error).__name__}: {error}"
            self._loop.call_soon_threadsafe(self._fail, reason)

    def _deliver(self, deltas: list[Delta], stats: EngineStats) -> None:
        self._loop.call_soon_threadsafe(self._take, deltas, stats)

    def _take(self, deltas: list[Delta], stats: EngineStats) -> None:
        self._stats = stats
        self._streams.feed(deltas)

    def _fail(self, reason: str) -> None:
        if self._state == "ready":
            self._state = reason
        self._streams.fail(EngineUnavailable(f"the engine is not available: {reason}"))


def _ignore(phase: str, fraction: float | None) -> None:
    """Nobody watches an inline engine load."""
