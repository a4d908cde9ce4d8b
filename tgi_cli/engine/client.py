"""How the HTTP side and `LLM` reach an engine, wherever it runs.

Imports only messages: importing this module costs neither torch nor ZMQ. Knows no text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from tgi_cli.engine.messages import Delta, EngineStats, ModelFacts, Request


class EngineClient(Protocol):
    """One engine. Raises `EngineUnavailable` while it is not ready and from streams it leaves."""

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Stream deltas until one has `finish`. Closing the iterator early aborts the request."""
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
