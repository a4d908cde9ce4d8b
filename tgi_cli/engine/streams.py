"""The open answers of one client: deltas wait here, merged, until their reader takes them.

A slow reader costs one merged delta, never a queue of them. Each answer keeps its request and
every token received for it, also those nobody has read yet: that is all a restart needs. Used from
one event loop; knows no transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tgi_cli.engine.client import Shortcut
from tgi_cli.engine.messages import Delta, Request
from tgi_cli.errors import EngineUnavailable, InvalidRequest


class OpenStream:
    """One answer on its way: `request`, and `received` tokens in order."""

    __slots__ = ("_failure", "_loop", "_pending", "_shortcut", "_waiting", "received", "request")

    def __init__(self, request: Request, shortcut: Shortcut | None = None) -> None:
        self.request = request
        self._shortcut = shortcut
        self.received: list[int] = list(request.output_ids)
        self._pending: Delta | None = None
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None  # the reader's, while it waits

    def feed(self, delta: Delta) -> None:
        """Take a delta from the engine."""
        self.received += delta.token_ids
        # A reader that waits has dealt with everything before.
        if self._shortcut is not None and self._waiting is not None and not self._waiting.done():
            try:
                if self._shortcut(delta):
                    return
            except Exception as error:  # it is the reader's, not that of the other streams
                self.fail(error)
                return
        self._pending = delta if self._pending is None else merge(self._pending, delta)
        self._wake()

    def fail(self, failure: Exception) -> None:
        """End the stream with an error, after what has arrived."""
        self._failure = failure
        self._wake()

    async def take(self) -> Delta:
        """Wait for deltas and take all that have arrived, as one."""
        while self._pending is None:
            if self._failure is not None:
                raise self._failure
            self._waiting = self._loop.create_future()
            await self._waiting
            self._waiting = None
        delta, self._pending = self._pending, None
        return delta

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class StreamTable:
    """All open answers of a client, by request id."""

    def __init__(self) -> None:
        self._open: dict[str, OpenStream] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open_streams(self) -> list[OpenStream]:
        """The open answers, with their requests and the tokens received for them."""
        return list(self._open.values())

    def feed(self, deltas: list[Delta]) -> None:
        """Hand deltas to their readers; those of answers that were left are dropped."""
        for delta in deltas:
            stream = self._open.get(delta.id)
            if stream is not None:
                stream.feed(delta)

    def fail(self, failure: EngineUnavailable) -> None:
        """End every open answer with this error."""
        for stream in self._open.values():
            stream.fail(failure)
        self._open.clear()

    async def read(
        self,
        request: Request,
        *,
        send: Callable[[Request], None],
        abort: Callable[[str], None],
        shortcut: Shortcut | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Send a request and yield its deltas, but those the shortcut took; leaving early aborts.

        Raises:
            InvalidRequest: the id belongs to an open answer.
            EngineUnavailable: the engine went away.
        """
        if request.id in self._open:
            raise InvalidRequest(f"request id `{request.id}` is in use")
        stream = OpenStream(request, shortcut)
        self._open[request.id] = stream
        finished = False
        try:
            send(request)
            while not finished:
                delta = await stream.take()
                finished = delta.finish is not None
                yield delta
        finally:
            if self._open.get(request.id) is stream:
                del self._open[request.id]
                if not finished:
                    abort(request.id)


def merge(first: Delta, second: Delta) -> Delta:
    """Two deltas of one answer as one. What comes once is taken from the one that has it."""
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = [*(logprobs or ()), *second.logprobs]
    return Delta(
        id=first.id,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        finish=second.finish,
        error=second.error,
        num_cached_tokens=first.num_cached_tokens or second.num_cached_tokens,
        queue_time=first.queue_time or second.queue_time,
    )
