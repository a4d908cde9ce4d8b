"""`ProcessClient`: an engine in another process, over ZMQ. Used by HTTP workers; no torch.

Whether the engine lives is told to it (the supervisor sees the process end); it never guesses from
silence. Each engine has a new endpoint, so nothing of a dead one can arrive later.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator

import msgspec
import zmq

from tgi_cli.engine.client import Shortcut
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

#: Messages read in a row before the event loop has its turn again.
_READ_AT_ONCE = 8


class ProcessClient:
    """Talks to the engine of the last `connect`. To be used from one event loop.

    Reads the socket when its descriptor says so instead of through `zmq.asyncio`, whose futures and
    timers cost as much CPU as all the rest of a step's tokens.
    """

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._streams = StreamTable()
        self._socket: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
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
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(_descriptor(socket), self._read)
        self._loop.call_soon(self._read)

    def disconnect(self, reason: str) -> None:
        """The engine is gone: every open stream ends with `EngineUnavailable(reason)` now."""
        self._state = reason
        self._facts = None
        if self._socket is not None:
            assert self._loop is not None
            self._loop.remove_reader(_descriptor(self._socket))
            self._socket.close()
            self._socket = None
        self._streams.fail(EngineUnavailable(f"the engine is not available: {reason}"))

    def generate(
        self, request: Request, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See `EngineClient.generate`."""
        return self._streams.read(request, send=self._send, abort=self.abort, shortcut=shortcut)

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
        self.disconnect("shutting down")
        self._context.term()

    def _send(self, message: Inbound) -> None:
        if self._socket is None or self._loop is None:
            raise EngineUnavailable(f"the engine is not available: {self._state}")
        # Without a high-water mark this never waits.
        self._socket.send(self._encode(message), zmq.NOBLOCK)
        # Sending may swallow the descriptor's only sign that something has arrived.
        self._loop.call_soon(self._read)

    def _read(self) -> None:
        """Take what has arrived. The descriptor signals changes alone, so nothing may be left."""
        socket = self._socket
        if socket is None or self._loop is None:
            return
        for _ in range(_READ_AT_ONCE):
            try:
                data = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = self._decode(data)
            self._stats = message.stats
            self._streams.feed(message.deltas)
        self._loop.call_soon(self._read)


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    number = socket.getsockopt(zmq.FD)
    assert isinstance(number, int)
    return number
