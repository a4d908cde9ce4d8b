"""An HTTP worker process: `python -m tgi_cli.serve.worker --control-fd N --listen-fd M`.

Serves the application on the socket it inherits, follows what the supervisor says of the engine,
and ends when it has drained or the control channel closes. Torch is never imported here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

import msgspec
import prometheus_client
import uvloop
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from tgi_cli import log as logs
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.config import ServerConfig
from tgi_cli.engine.control import frame, receive_frames
from tgi_cli.engine.messages import (
    Draining,
    Failed,
    Heartbeat,
    Ready,
    Restarting,
    Starting,
    Status,
    WorkerStart,
)
from tgi_cli.engine.process_client import ProcessClient
from tgi_cli.errors import TemplateFailed, TgiError
from tgi_cli.model_path import local_checkpoint
from tgi_cli.serve.app import build_app
from tgi_cli.serve.frontdoor import Texts
from tgi_cli.serve.keys import DOOR, METRICS, PULSE
from tgi_cli.serve.ledger import Ledger
from tgi_cli.serve.listener import BACKLOG
from tgi_cli.serve.responses.peers import Peers
from tgi_cli.serve.tls import tls_context
from tgi_cli.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

#: Seconds in which connections that were already on their way still get an answer.
_LAST_CALL = 0.1
#: Seconds that broken streams have for their error event.
_FAREWELL = 2.0

_decode = msgspec.msgpack.Decoder(Status).decode


class _InheritedSite(web.SockSite):
    """Serves on a socket somebody else opened, of TCP or a Unix path."""

    def __init__(self, runner: web.AppRunner, listener: socket.socket, **options: Any) -> None:
        super().__init__(runner, listener, **options)
        self._listener = listener

    async def start(self) -> None:
        """Start accepting."""
        if self._listener.family != socket.AF_UNIX:
            await super().start()
            return
        await web.BaseSite.start(self)
        assert self._runner.server is not None
        self._server = await asyncio.get_running_loop().create_unix_server(
            self._runner.server, sock=self._listener, backlog=self._backlog, ssl=self._ssl_context
        )


class Worker:
    """One HTTP worker: the application, its client to the engine, and the supervisor's word."""

    def __init__(self, start: WorkerStart, listener: socket.socket, ledger: Ledger) -> None:
        self._start = start
        self._listener = listener
        self._client = ProcessClient()
        workers = start.config.http_workers
        self._peers = Peers(start.runtime_dir if workers > 1 else None, start.index, workers)
        self._app = build_app(
            start.config,
            self._client,
            model_id=start.engine.model.model_id,
            worker=start.index,
            ledger=ledger,
            peers=self._peers,
        )
        self._texts: Texts | None = None
        self._early: tuple[str, asyncio.Task[Texts]] | None = None  # being read, from which path
        self._background: set[asyncio.Task[None]] = set()
        self._finished = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve until drained or the supervisor is gone."""
        runner = web.AppRunner(
            self._app, handler_cancellation=True, access_log=None, shutdown_timeout=_FAREWELL
        )
        await runner.setup()
        self._site = _InheritedSite(
            runner,
            self._listener,
            ssl_context=tls_context(self._start.config),
            backlog=BACKLOG,
        )
        await self._site.start()
        if not self._peers.alone:
            await web.UnixSite(runner, self._peers.socket).start()
        self._read_early()
        listening = asyncio.create_task(self._follow(reader, writer))
        finished = asyncio.create_task(self._finished.wait())
        await asyncio.wait([listening, finished], return_when=asyncio.FIRST_COMPLETED)
        if listening.done():
            listening.result()
        listening.cancel()
        finished.cancel()
        await self._client.close()
        await runner.cleanup()

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (data := await receive_frames(reader)) is not None:
            status = _decode(data)
            if isinstance(status, Heartbeat):
                self._app[PULSE].beat(status)
                self._app[METRICS].engine.beat(status)
            elif isinstance(status, Ready):
                self._client.connect(status)
                self._app[PULSE].reset()
                self._spawn(self._open(status, writer))
            elif isinstance(status, Restarting):
                self._app[METRICS].engine_restarts += not self._app[DOOR].draining
                self._app[METRICS].engine.lost()
                self._client.disconnect(f"restarting: {status.reason}")
            elif isinstance(status, Starting):
                self._client.starting(status)
            elif isinstance(status, Draining):
                self._spawn(self._drain(status.timeout))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _read_early(self) -> None:
        """Read a local model's texts while the engine loads; failures are told when it is ready."""
        path = local_checkpoint(self._start.engine.model.model_id)
        if path is not None:
            task = asyncio.create_task(self._read(str(path)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._early = str(path), task

    def _reading(self, path: str) -> Awaitable[Texts]:
        if self._early is not None and self._early[0] == path:
            return self._early[1]
        return self._read(path)

    async def _read(self, path: str) -> Texts:
        return await self._app[DOOR].in_pool(lambda: load_texts(path, self._start.config))

    async def _open(self, ready: Ready, writer: asyncio.StreamWriter) -> None:
        """Load tokenizer and template, let requests in, and tell the supervisor how it went."""
        door = self._app[DOOR]
        try:
            if self._texts is None:
                self._texts = await self._reading(ready.facts.model_path)
                gc.collect()
                gc.freeze()  # the vocabulary lives as long as the process: never walk it again
            door.open(self._texts, ready.facts)
        except TgiError as error:
            failed = Failed(error=type(error).__name__, message=error.message, hint=error.hint)
            writer.write(frame(failed))
        except Exception as error:
            log.exception("the tokenizer could not be loaded")
            message = f"the tokenizer could not be loaded: {type(error).__name__}: {error}"
            writer.write(frame(Failed(error="EngineError", message=message)))
        else:
            writer.write(frame(ready))

    async def _drain(self, timeout: float) -> None:
        """Refuse new requests, finish the accepted ones, then let `serve` end."""
        self._app[DOOR].draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        await asyncio.sleep(_LAST_CALL)
        await self._site.stop()
        self._listener.close()
        while self._app[METRICS].in_flight and loop.time() < deadline:
            await asyncio.sleep(0.02)
        self._finished.set()


def load_texts(path: str, config: ServerConfig) -> Texts:
    """Load what turns text into tokens from where the weights are."""
    tokenizer = load_tokenizer(
        path,
        tokenizer_config_path=config.tokenizer_config_path,
        chat_template=config.chat_template,
    )
    try:
        template = ChatTemplate.of(tokenizer)
    except TemplateFailed as error:
        if config.chat_template or config.tokenizer_config_path:
            raise
        # The other routes need none: a checkpoint with a broken template is still of use.
        log.warning("chats will be refused: %s", error.message)
        template = ChatTemplate(None, bos_token=None, eos_token=None)
    return Texts(tokenizer, template)


async def _run(control_fd: int, listen_fd: int, ledger_fd: int | None) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=control_fd))
    data = await receive_frames(reader)
    if data is None:
        return
    start = msgspec.msgpack.decode(data, type=WorkerStart)
    logs.configure(start.config.log_level, json_logs=start.config.json_logs)
    logging.getLogger("aiohttp.server").addFilter(_senders_fault)
    if start.config.http_workers == 1:
        # The kernels of a step want every core: a token that is sent while they run waits for a
        # moment in which one sleeps, and interrupts none. Several workers would no longer share
        # connections evenly: who wakes first would get them all. A sandbox may refuse; it serves.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    ledger = Ledger(ledger_fd, start.index, start.config.http_workers)
    await Worker(start, socket.socket(fileno=listen_fd), ledger).serve(reader, writer)


def _senders_fault(record: logging.LogRecord) -> bool:
    """No error in the log for a client that hangs up, and no traceback for what is not HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ConnectionResetError):  # the access log has it too, as a 499
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    if isinstance(error, BadHttpMessage):
        record.msg = f"{record.getMessage()}: not HTTP: {error.message[:200]!r}"
        record.args, record.exc_info, record.exc_text = (), None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one HTTP worker on inherited descriptors."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--ledger-fd", type=int, help="without it, the only worker")
    options = parser.parse_args(arguments)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    uvloop.run(_run(options.control_fd, options.listen_fd, options.ledger_fd))


if __name__ == "__main__":
    main()
