"""How the HTTP side and `LLM` reach an engine, wherever it runs.

Imports only messages: importing this module costs neither torch nor ZMQ. Knows no text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from tgi_cli.engine.messages import Delta, EngineStats, ModelFacts, Request

#: Takes a delta in the reader's place while it waits for one; False leaves it to the reader.
Shortcut = Callable[[Delta], bool]


class EngineClient(Protocol):
    """One engine. Raises `EngineUnavailable` while it is not ready and from streams it leaves."""

    def generate(
        self, request: Request, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Stream deltas until one has `finish`. Closing the iterator early aborts the request.

        `shortcut` is offered deltas first, but only while the reader waits for the next one, so
        their order holds. Waking a reader costs more than most deltas are worth.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request; unknown ids are ignored."""
        ...

    @property
    def facts(self) -> ModelFacts | None:
        """The loaded model, None before readiness."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The newest counters the engine sent."""
        ...

    @property
    def state(self) -> str:
        """`ready`, or what it is doing instead (`downloading 41 %`, `loading`, `restarting: …`)."""
        ...

    async def close(self) -> None:
        """Fail open streams and release sockets."""
        ...
