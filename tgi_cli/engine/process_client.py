"""`ProcessClient`: an engine in another process, over ZMQ. Used by HTTP workers; no torch.

Whether the engine lives is told to it (the supervisor sees the process end); it never guesses from
silence. Each engine has a new endpoint, so nothing of a dead one can arrive later.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import zmq
import zmq.asyncio

from tgi_cli.engine.messages import (
    Abort,
    Delta,
    EngineStats,
    Inbound,
    ModelFacts,
    Outbound,
    Ready,
    Request,
    Starting,
)
from tgi_cli.engine.streams import StreamTable
from tgi_cli.errors import EngineUnavailable


class ProcessClient:
    """Talks to the engine of the last `connect`. To be used from one event loop."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._streams = StreamTable()
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._facts: ModelFacts | None = None
        self._stats = EngineStats()
        self._state = "starting"
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Outbound).decode

    def starting(self, status: Starting) -> None:
        """Note what an engine that is not ready is doing."""
        if self._socket is not None:
            return
        self._state = status.phase
        if status.fraction is not None:
            self._state += f" {status.fraction:.0%}".replace("%", " %")
        if status.after is not None:
            self._state += f", restarting after: {status.after}"

    def connect(self, ready: Ready) -> None:
        """Use this engine from now on. Must be called inside the event loop."""
        if self._socket is not None:
            self.disconnect("replaced by a new engine")
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        # The engine names workers by this; a reconnecting one must not look like a stranger.
        socket.setsockopt(zmq.ROUTING_ID, uuid.uuid4().bytes)
        socket.connect(ready.endpoint)
        self._socket = socket
        self._facts = ready.facts
        self._stats = EngineStats(kv_blocks_total=ready.facts.kv_blocks_total)
        self._state = "ready"
        self._reader = asyncio.get_running_loop().create_task(self._read(socket))

    def disconnect(self, reason: str) -> None:
        """The engine is gone: every open stream ends with `EngineUnavailable(reason)` now."""
        self._state = reason
        self._facts = None
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._streams.fail(EngineUnavailable(f"the engine is not available: {reason}"))

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """See `EngineClient.generate`."""
        if self._socket is None:
            raise EngineUnavailable(f"the engine is not available: {self._state}")
        reading = self._streams.read(request, send=self._send, abort=self.abort)
        async with aclosing(reading) as deltas:
            async for delta in deltas:
                yield delta

    def abort(self, request_id: str) -> None:
        """See `EngineClient.abort`."""
        if self._socket is not None:
            self._send(Abort([request_id]))

    @property
    def facts(self) -> ModelFacts | None:
        """The loaded model, None while there is no engine."""
        return self._facts

    @property
    def stats(self) -> EngineStats:
        """The newest counters of the engine now connected."""
        return self._stats

    @property
    def state(self) -> str:
        """`ready`, or what the engine is doing instead."""
        return self._state

    @property
    def num_open(self) -> int:
        """Answers that have not ended."""
        return len(self._streams)

    async def close(self) -> None:
        """End every open stream and release the socket."""
        reader = self._reader
        self.disconnect("shutting down")
        if reader is not None:
            await asyncio.gather(reader, return_exceptions=True)
        self._context.term()

    def _send(self, message: Inbound) -> None:
        assert self._socket is not None
        # Without a high-water mark this never waits; the future is done at once.
        self._socket.send(self._encode(message))

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decode(await socket.recv())
            self._stats = message.stats
            self._streams.feed(message.deltas)
