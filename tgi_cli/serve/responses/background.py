"""A response that is made without a client waiting for it, and can be followed from any event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from tgi_cli.errors import TgiError
from tgi_cli.serve.responses.run import ResponseRun, frame


class Background:
    """Runs a `ResponseRun` as a task; `ended` is called once, with the failure if there was one."""

    def __init__(self, run: ResponseRun, ended: Callable[[BaseException | None], None]) -> None:
        self._run = run
        self._ended = ended
        self._frames: list[bytes] = []
        self._more = asyncio.Event()
        self._over = False
        self._task = asyncio.create_task(self._drive())
        self._task.add_done_callback(self._finish)

    @property
    def num_bytes(self) -> int:
        """Bytes of the events kept for those who follow."""
        return sum(map(len, self._frames))

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """Events numbered above `after`, those to come included."""
        position = max(0, after + 1)
        while True:
            if position < len(self._frames):
                new, position = self._frames[position:], len(self._frames)
                yield b"".join(new)
            elif self._over:
                return
            else:
                await self._more.wait()

    async def cancel(self) -> None:
        """End it and wait for that; what has been generated stays in the response."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({self._task})

    async def _drive(self) -> TgiError | None:
        try:
            async with aclosing(self._run.events()) as steps:
                async for events in steps:
                    self._add([frame([event]) for event in events])
        except TgiError as error:
            self._add([frame([self._run.fail(error)])])
            return error
        return None

    def _finish(self, task: asyncio.Task[TgiError | None]) -> None:
        self._over = True
        if task.cancelled():
            self._run.cancel()
            failure: BaseException | None = asyncio.CancelledError()
        else:
            failure = task.exception() or task.result()
        self._add([])
        self._ended(failure)

    def _add(self, frames: list[bytes]) -> None:
        self._frames += frames
        self._more.set()
        self._more = asyncio.Event()
