"""Two hosts on one machine: network namespaces joined by a cable, and servers started in them.

A namespace has its own interfaces and ports and reaches nothing but its neighbour. HTTP goes
through a Unix socket, which every namespace of one file system reaches.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.http.live import gone, wait_until

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def reason_against() -> str | None:
    """Why there can be no two hosts here, None if there can."""
    name = f"tgi-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except FileNotFoundError:
        return "`ip` (iproute2) is not installed"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed: {error.stderr.strip()}"
    try:
        _ip("-n", name, "link", "add", "name", "va", "type", "veth", "peer", "name", "vb")
    except subprocess.CalledProcessError as error:
        return f"veth pairs are not allowed: {error.stderr.strip()}"
    finally:
        _ip("netns", "delete", name)
    return None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Made and removed."""
    names = [f"tgi-{os.getpid()}-{index}" for index in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        cable = ("link", "add", "name", "eth0", "netns", names[0], "type", "veth", "peer", "name")
        _ip(*cable, "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield Host(names[0]), Host(names[1])
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class Host:
    """One namespace."""

    def __init__(self, name: str) -> None:
        self.name = name

    def launch(self, *flags: str) -> Launched:
        """`tgi launch` on this host."""
        return Launched(["ip", "netns", "exec", self.name], flags)

    def unplug(self) -> None:
        """Take the cable out: nothing arrives any more, and nothing says so."""
        _ip("-n", self.name, "link", "set", "eth0", "down")


class Launched:
    """A `tgi launch` that runs."""

    def __init__(self, prefix: list[str], flags: tuple[str, ...]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tgi_cli", "launch", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env={**os.environ, **_ENVIRONMENT},
        )
        self.socket = next((b for a, b in pairwise(flags) if a == "--uds"), "")

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        family = self.family()
        if error is not None:
            print(self.stderr)
        for process in family:
            if process.is_running():
                process.kill()
        self.process.wait()
        self._stderr.close()

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def family(self) -> list[psutil.Process]:
        """Its living processes, itself first."""
        try:
            parent = psutil.Process(self.process.pid)
            everyone = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        return [process for process in everyone if not gone([process])]

    def running(self, module: str) -> list[psutil.Process]:
        """Its processes that run `module`."""
        found = []
        for process in self.family():
            with suppress(psutil.Error):  # gone since
                if module in process.cmdline():
                    found.append(process)
        return found

    def child(self, module: str) -> psutil.Process:
        """The process that runs `module`."""
        (found,) = self.running(module)
        return found

    def ended(self, timeout: float = 90) -> int:
        """Its exit code, and nothing of it left."""
        family = self.family()
        code = self.process.wait(timeout)
        wait_until(lambda: gone(family), why=lambda: self.stderr)
        return code

    def stop(self) -> int:
        """End it as a user does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and body of a request through the Unix socket."""
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(self.socket)
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode()
        finally:
            connection.close()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def wait_ready(self, timeout: float = 180) -> None:
        """Return once `/health` is 200."""

        def ready() -> bool:
            assert self.process.poll() is None, self.stderr
            try:
                return Path(self.socket).exists() and self.ask("/health")[0] == 200
            except OSError:
                return False

        wait_until(ready, timeout, lambda: self.stderr)
