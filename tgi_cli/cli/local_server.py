"""A server of our own for one command: `chat` and `bench` start it, wait for it and stop it.

It is `tgi launch --port 0` in a child process, reached over HTTP like any other server, and it ends
with its parent even when that is killed (it watches its stdin). Knows nothing of the engine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from tgi_cli.cli.console import Printer
from tgi_cli.config import environment
from tgi_cli.errors import TgiError, UsageError

_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0


class LocalServer:
    """`with LocalServer("demo", printer) as server:` gives a ready server's `url` and `api_key`.

    Raises `TgiError` with the server's own sentence when it cannot start.
    """

    def __init__(self, model_id: str, printer: Printer, flags: Sequence[str] = ()) -> None:
        self._model_id = model_id
        self._printer = printer
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.url = ""
        # Loopback is shared by all users of the machine; this server is for one of them.
        self.api_key = secrets.token_urlsafe(24)

    def __enter__(self) -> LocalServer:
        try:
            self._start()
            with contextlib.ExitStack() as stack:
                show = None
                if self._printer.animated:
                    show = stack.enter_context(self._printer.console.status("starting a server"))
                self.url = self._wait_for_url()
                while (state := self._state()) is not None:
                    if show is not None:
                        show.update(f"{self._model_id}: {state}")
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and everything it started; returns when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                # SIGTERM goes to the supervisor, which stops its children in order.
                if sign is signal.SIGTERM:
                    process.send_signal(sign)
                else:
                    os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
                break
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _start(self) -> None:
        self._log = None if self._printer.verbose else tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tgi_cli", "launch", "--model-id", self._model_id),
                *("--hostname", "127.0.0.1", "--port", "0", "--stop-with-stdin"),
                *("--graceful-termination-timeout", "1", *self._flags),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environment(), "TGI_API_KEY": self.api_key},
            start_new_session=True,  # Ctrl-C in the terminal is for chat, not for its server
        )

    def _wait_for_url(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(_POLL_SECONDS):
                    continue
                data = os.read(self._process.stdout.fileno(), 4096)
                if not data:
                    self._process.wait()
                    raise self._failure()
                line += data
        return line.decode().strip()

    def _state(self) -> str | None:
        """What the server is doing before it is ready; None when it is."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise self._failure()
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=10)
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            body = response.read()
        except OSError:
            return "starting"
        finally:
            connection.close()
        if response.status == 200:
            return None
        with contextlib.suppress(ValueError, AttributeError):
            error = json.loads(body).get("error")
            return str(error.get("message") if isinstance(error, dict) else error)
        return "starting"

    def _failure(self) -> TgiError:
        """The sentence and hint that the server ended with."""
        assert self._process is not None
        code = self._process.returncode
        lines: list[str] = []
        if self._log is not None:
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").splitlines()
        said = {
            label: line.removeprefix(f"{label}: ")
            for line in lines
            for label in ("error", "hint")
            if line.startswith(f"{label}: ")
        }
        message = said.get("error", f"the server for {self._model_id} ended with exit code {code}")
        hint = said.get("hint", "rerun with --verbose for the server's log")
        return (UsageError if code == 2 else TgiError)(message, hint=hint)
