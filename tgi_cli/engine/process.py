"""The engine's process: `python -m tgi_cli.engine.process --control-fd N [--weights-fd M]`.

Reads `EngineStart` from the control channel, says what it is doing, then serves HTTP workers on a
ZMQ socket in the private runtime folder. It ends when the channel does, even in the middle of a
step; SIGINT and SIGTERM are the supervisor's to handle. Torch is imported while it waits for its
configuration.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from tgi_cli import log as logs
from tgi_cli.engine.control import ControlChannel
from tgi_cli.engine.messages import (
    Abort,
    Delta,
    Deltas,
    EngineStart,
    EngineStats,
    Failed,
    Inbound,
    Ready,
    Request,
    Starting,
)
from tgi_cli.engine.nodes import Nodes
from tgi_cli.errors import TgiError

if TYPE_CHECKING:
    from tgi_cli.engine.core import EngineCore

log = logging.getLogger(__name__)

_HEARTBEAT = 1.0  # seconds
#: Least seconds between two statuses of one phase.
_STATUS_EVERY = 0.1


class ZmqTransport:
    """A ROUTER socket; remembers which worker sent which request.

    A worker that is gone is noticed when something cannot be sent to it; its requests are then
    aborted, as if it had asked for that.
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unreachable worker is an error
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._alarm = os.eventfd(0)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._alarm, zmq.POLLIN)
        self._workers: dict[str, bytes] = {}  # by request id
        self._orphans: list[str] = []
        self._decode = msgspec.msgpack.Decoder(Inbound).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def receive(self, *, wait: bool) -> Sequence[Inbound]:
        """Everything that has arrived; with `wait` at least one message, unless woken."""
        messages: list[Inbound] = []
        if self._orphans:
            messages.append(Abort(self._orphans))
            self._orphans = []
        if wait and not messages and self._alarm in dict(self._poller.poll()):
            os.eventfd_read(self._alarm)
        while True:
            try:
                worker, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                message = self._decode(data)
            except (msgspec.DecodeError, ValueError):
                log.exception("a worker sent a message that is not one")
                continue
            if isinstance(message, Request):
                self._workers[message.id] = worker
            messages.append(message)

    def send(self, deltas: list[Delta], stats: EngineStats) -> None:
        """One message for each worker that has a delta."""
        outgoing: dict[bytes, list[Delta]] = {}
        for delta in deltas:
            worker = self._workers.get(delta.id)
            if worker is None:
                continue
            outgoing.setdefault(worker, []).append(delta)
            if delta.finish is not None:
                del self._workers[delta.id]
        for worker, batch in outgoing.items():
            try:
                self._socket.send_multipart(
                    (worker, self._encode(Deltas(deltas=batch, stats=stats))), zmq.NOBLOCK
                )
            except zmq.ZMQError as error:
                log.warning("an HTTP worker is gone (%s), its requests are aborted", error)
                self._forget(worker)

    def wake(self) -> None:
        """End a `receive` that waits."""
        os.eventfd_write(self._alarm, 1)

    def _forget(self, worker: bytes) -> None:
        lost = [request_id for request_id, owner in self._workers.items() if owner == worker]
        self._orphans += lost
        for request_id in lost:
            del self._workers[request_id]


class EngineProcess:
    """One life of the engine.

    Args:
        control: start and state; the death pipe.
        weights_fd: shared memory that keeps packed weights from life to life, None without.
    """

    def __init__(self, control: ControlChannel, weights_fd: int | None = None) -> None:
        self._control = control
        self._weights_fd = weights_fd
        self._last_status: tuple[str, float] = ("", 0.0)
        self._nodes: Nodes | None = None
        self._ready = False

    def main(self) -> int:
        """Start, serve, return the exit code."""
        gc.disable()  # what is imported and loaded stays; looking through it takes a tenth of that
        threading.Thread(target=_import_torch, name="tgi-import", daemon=True).start()
        first = self._control.receive()
        if first is None:
            return 0
        start = msgspec.msgpack.decode(first, type=EngineStart)
        logs.configure(start.config.log_level, json_logs=start.config.json_logs)
        threading.Thread(target=self._end_with_channel, name="tgi-control", daemon=True).start()
        self._report("loading", None)
        try:
            self._serve(start)
        except TgiError as error:
            self._part(error.message, again=self._ready or start.epoch > 0)
            self._say(Failed(error=type(error).__name__, message=error.message, hint=error.hint))
            return 1
        except Exception as error:
            log.exception("the engine died")
            message = f"the engine died of {type(error).__name__}: {error}"
            self._part(message, again=self._ready or start.epoch > 0)
            self._say(Failed(error="EngineError", message=message))
            return 1
        return 0

    def _serve(self, start: EngineStart) -> None:
        from tgi_cli.engine.core import EngineCore

        start.config.parallel.check()
        if start.config.parallel.nnodes > 1:
            self._nodes = Nodes(start.config.parallel)
        core = EngineCore.load(start.config, self._report, self._weights_fd, self._nodes)
        # What is loaded stays: a full collection would look at all of it, in the middle of a step.
        gc.collect()
        gc.freeze()
        gc.enable()
        path = Path(start.runtime_dir) / f"engine-{start.epoch}.sock"
        transport = ZmqTransport(f"ipc://{path}")
        self._ready = True
        self._say(Ready(endpoint=f"ipc://{path}", facts=core.facts))
        threading.Thread(target=self._beat, args=(core,), name="tgi-pulse", daemon=True).start()
        try:
            core.run(transport)
        except BaseException:
            self._say(core.heartbeat())  # which step it died in, for `/metrics`
            raise

    def _report(self, phase: str, fraction: float | None) -> None:
        """Say what is being done; the same phase not too often."""
        now = time.monotonic()
        last_phase, last_time = self._last_status
        if phase != last_phase or now - last_time >= _STATUS_EVERY:
            self._last_status = (phase, now)
            self._say(Starting(phase=phase, fraction=fraction))

    def _beat(self, core: EngineCore) -> None:
        while True:
            self._say(core.heartbeat())
            time.sleep(_HEARTBEAT)

    def _end_with_channel(self) -> None:
        while self._control.receive() is not None:
            pass
        self._part(None)
        self._vanish()

    def _say(self, status: Any) -> None:
        try:
            self._control.send(status)
        except (BrokenPipeError, ConnectionResetError):
            self._vanish()

    def _part(self, failure: str | None, *, again: bool = False) -> None:
        """Let the other nodes know that this engine ends; a supervisor starts a failed one anew."""
        if self._nodes is not None:
            self._nodes.close(failure, again=again)

    @staticmethod
    def _vanish() -> None:
        # Nobody is left to answer to. A step may be running, so no orderly exit can be waited for.
        os._exit(0)


def _import_torch() -> None:
    with suppress(Exception):  # whoever needs it meets the reason again, and says it
        import torch  # noqa: F401


def main(arguments: Sequence[str]) -> int:
    """Run the engine on an inherited control channel."""
    parser = argparse.ArgumentParser(prog="tgi_cli.engine.process")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--weights-fd", type=int)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = ControlChannel.from_fd(options.control_fd)
    return EngineProcess(control, options.weights_fd).main()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # Threads of native libraries may outlive the interpreter's patience: leave without them.
    logging.shutdown()
    os._exit(code)
