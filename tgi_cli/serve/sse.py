"""Server-sent events: one write a step, a comment when silent, an error event when it breaks.

The status line waits for the first frame (or a moment's patience), so that a refusal is a real
HTTP status and not an event inside a 200. Knows no JSON shape.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from aiohttp import HttpVersion11, web

from tgi_cli.errors import EngineError, RequestError, TgiError

#: Seconds to wait for the first frame before the headers are sent without it.
PEEK_SECONDS = 10.0
#: Seconds of silence after which a comment tells proxies that the stream lives (TGI's).
KEEP_ALIVE_SECONDS = 15.0

#: Seconds a client may leave a full connection unread before it is given up: it holds a place.
STALL_SECONDS = 120.0
#: Bytes waiting for a client beyond which frames are merged instead (asyncio's high water).
MOST_UNREAD = 1 << 16

DONE = b"data: [DONE]\n\n"


async def send_frames(
    request: web.Request,
    frames: AsyncGenerator[bytes, None],
    *,
    error_event: Callable[[TgiError], bytes],
    headers: dict[str, str] | None = None,
    patience: float | None = None,
    outlet: Outlet | None = None,
) -> web.StreamResponse:
    """Stream `frames`, each one write, and close it. Errors before the first frame are raised.

    The headers wait for the first frame, but no longer than `patience` seconds (`PEEK_SECONDS`
    unless told). Later errors become the stream's last event. When the client goes away `frames`
    is closed, which aborts the request in the engine. `outlet` is open while frames are awaited.
    """
    pending = asyncio.ensure_future(_next(frames))
    try:
        await asyncio.wait({pending}, timeout=PEEK_SECONDS if patience is None else patience)
        if pending.done():
            pending.result()
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **(headers or {}),
            }
        )
        chunked = request.version >= HttpVersion11
        if chunked:
            response.enable_chunked_encoding()
        await response.prepare(request)
        writer = _Writer(response, request.transport)
        try:
            frame = await pending
            if frame is not None:
                await writer.write(frame)
                if outlet is not None:
                    outlet.open(request.transport, writer, chunked=chunked)
                async for frame in frames:
                    await writer.write(frame)
        except (RequestError, EngineError) as error:
            await writer.write(error_event(error))
        finally:
            if outlet is not None:
                outlet.close()
            writer.close()
        await response.write_eof()
    finally:
        if not pending.done():
            pending.cancel()
            with suppress(asyncio.CancelledError):
                await pending
        await frames.aclose()
    return response


class Outlet:
    """A way past the stream's task: frames written at once, while that task waits for one.

    `frames` may write here what it would otherwise be woken up for, in the same order.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._writer: _Writer | None = None
        self._chunked = False

    def open(self, transport: asyncio.Transport | None, writer: _Writer, *, chunked: bool) -> None:
        """The headers are out; `chunked` is how the body is framed."""
        self._transport, self._writer, self._chunked = transport, writer, chunked

    def close(self) -> None:
        """The stream is over."""
        self._transport = None

    def ready(self) -> bool:
        """Whether the client is there and reads; otherwise the stream's task must wait for it."""
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() < MOST_UNREAD
        )

    def write(self, frame: bytes) -> None:
        """Write a frame; only when `ready`."""
        assert self._transport is not None
        assert self._writer is not None
        self._writer.touch()
        if self._chunked:
            frame = b"%x\r\n%b\r\n" % (len(frame), frame)
        self._transport.write(frame)


async def _next(frames: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(frames, None)


class _Writer:
    """Writes frames and, in longer silences, comments; drops a client that has stopped reading."""

    def __init__(self, response: web.StreamResponse, transport: asyncio.Transport | None) -> None:
        self._response = response
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._writing = False
        self._keeper = asyncio.create_task(self._watch())

    async def write(self, frame: bytes) -> None:
        self._last = self._loop.time()
        self._writing = True
        await self._response.write(frame)
        self._writing = False

    def touch(self) -> None:
        """Something has been written to the connection."""
        self._last = self._loop.time()

    def close(self) -> None:
        self._keeper.cancel()

    async def _watch(self) -> None:
        while True:
            patience = STALL_SECONDS if self._writing else KEEP_ALIVE_SECONDS
            silence = self._loop.time() - self._last
            if silence < patience:
                await asyncio.sleep(min(patience - silence, KEEP_ALIVE_SECONDS))
            elif self._writing:
                if self._transport is not None:
                    self._transport.abort()  # aiohttp then cancels the handler
                return
            else:
                with suppress(ConnectionResetError):
                    await self.write(b":\n\n")
