"""A real server as a user starts it: `tgi launch --port 0` in a subprocess, on the loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

ENGINE, WORKER = "tgi_cli.engine.process", "tgi_cli.serve.worker"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class LiveServer:
    """`with LiveServer(folder, "--dtype", "float32") as server:` gives a ready server's `url`."""

    def __init__(self, model: Path | str, *flags: str, ready: bool = True) -> None:
        self._flags = ("--model-id", str(model), "--hostname", "127.0.0.1", "--port", "0", *flags)
        self._wait = ready
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.url = ""

    def __enter__(self) -> LiveServer:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tgi_cli", "launch", *self._flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **_ENVIRONMENT},
        )
        assert self.process.stdout is not None
        try:
            self.url = self.process.stdout.readline().decode().strip()
            if self._wait:
                assert self.url, self.stderr
                self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        family = self.family()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stderr.close()
        for left in family:
            if left.is_running():
                left.kill()

    @property
    def stderr(self) -> str:
        """What the server has said so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def family(self) -> list[psutil.Process]:
        """The server's living processes, itself first."""
        try:
            parent = psutil.Process(self.process.pid)
            everyone = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        return [process for process in everyone if not gone([process])]

    def child(self, module: str) -> psutil.Process:
        """The process that runs `module`."""
        found = [p for p in self.family() if module in p.cmdline()]
        assert len(found) == 1, found
        return found[0]

    def get(self, path: str) -> tuple[int, Any]:
        """Status and body of a GET; the body decoded if it is JSON."""
        return self._ask(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and decoded body of a POST of JSON."""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(self.url + path, data, headers))

    @staticmethod
    def _ask(request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, body = error.code, error.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode()

    def metrics(self) -> dict[str, float]:
        """Every sample of `/metrics`."""
        lines = self.get("/metrics")[1].splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def wait_ready(self, timeout: float = 90) -> None:
        """Return once `/health` is 200; fail with the server's own words when it ends instead."""

        def ready() -> bool:
            assert self.process.poll() is None, self.stderr
            try:
                return self.get("/health")[0] == 200
            except OSError:
                return False

        wait_until(ready, timeout, lambda: self.stderr)


def wait_until(
    condition: Callable[[], bool], timeout: float = 30, why: Callable[[], str] = lambda: ""
) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of these processes runs any more."""
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True


def interrupt(server: LiveServer, sign: signal.Signals) -> None:
    """Send the supervisor a signal."""
    server.process.send_signal(sign)
