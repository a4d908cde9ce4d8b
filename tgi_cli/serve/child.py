"""One child process of the supervisor, with its control channel.

A child runs in a session of its own, so the terminal's Ctrl-C reaches only the supervisor, and it
ends by itself when the channel does. Knows nothing of what a child is for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import psutil

from tgi_cli.engine.control import frame, receive_frames


class Process(Protocol):
    """What a child needs of its process; `asyncio`'s has it."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    @property
    def returncode(self) -> int | None:
        """How it ended, None until that has been seen."""
        ...

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        ...


class Child:
    """Made by `spawn` or `adopt`; `wait` must be awaited before it is dropped."""

    def __init__(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(
        cls, module: str, first: Any, *, arguments: Sequence[str] = (), inherit: Sequence[int] = ()
    ) -> Child:
        """Run `python -m module --control-fd N arguments` and send `first` down the channel.

        `inherit` are further descriptors it keeps. Its stdout goes to our stderr: stdout is data.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", module, "--control-fd", str(theirs.fileno())),
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=(theirs.fileno(), *inherit),
                    start_new_session=True,
                )
            return await cls.adopt(process, ours, first)
        except BaseException:
            ours.close()  # a child already started ends by that
            raise

    @classmethod
    async def adopt(cls, process: Process, channel: socket.socket, first: Any) -> Child:
        """Take over a process that runs already and send `first` down our end of its channel."""
        reader, writer = await asyncio.open_connection(sock=channel)
        child = cls(process, reader, writer)
        child.send(first)
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP)."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)  # type: ignore[no-untyped-call]
            status = process.status()  # type: ignore[no-untyped-call]
            return bool(status == psutil.STATUS_STOPPED)
        return False

    def send(self, message: Any) -> None:
        """Queue one struct; a child that is gone is noticed by whoever awaits it."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> bytes | None:
        """The next frame, None when the child has closed the channel."""
        return await receive_frames(self._reader)

    def hang_up(self) -> None:
        """Close the channel: the child takes that as "end now"."""
        self._writer.close()

    def kill(self) -> None:
        """End it and everything in its session, at once."""
        if self.alive:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        code = await self._process.wait()
        self._writer.close()
        return code

    async def end(self, patience: float) -> int:
        """Hang up, give it `patience` seconds to go, then kill it."""
        self.hang_up()
        try:
            return await asyncio.wait_for(self.wait(), patience)
        except TimeoutError:
            self.kill()
            return await self.wait()
