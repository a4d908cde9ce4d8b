"""An engine's process that is started before anything is known of what it is to serve.

It imports what it needs and waits for its configuration; if none comes, it ends with its control
channel. Imports nothing that takes time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys


class EarlyEngine:
    """The process, with this side of its channel and the memory for its packed weights.

    Whoever takes it over owns `channel` and `weights_fd`; `give_up` closes both.
    """

    def __init__(
        self, popen: subprocess.Popen[bytes], channel: socket.socket, weights_fd: int
    ) -> None:
        self._popen = popen
        self.channel = channel
        self.weights_fd = weights_fd

    @classmethod
    def start(cls) -> EarlyEngine | None:
        """Start one; None if the system refuses, which whoever starts the next one will tell of."""
        ours, theirs = socket.socketpair()
        weights_fd = weights_memory()
        control = ("--control-fd", str(theirs.fileno()), "--weights-fd", str(weights_fd))
        try:
            with theirs:
                popen = subprocess.Popen(
                    [sys.executable, "-m", "tgi_cli.engine.process", *control],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=(theirs.fileno(), weights_fd),
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            os.close(weights_fd)
            return None
        return cls(popen, ours, weights_fd)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, None until that has been waited for."""
        return self._popen.returncode

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        import asyncio  # takes longer than all the rest

        if self._popen.poll() is None:
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            fd = os.pidfd_open(self.pid)
            loop.add_reader(fd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(fd)
                os.close(fd)
        return self._popen.wait()

    def give_up(self) -> None:
        """Nothing will be served: the process ends by itself, and is not waited for."""
        self.channel.close()
        os.close(self.weights_fd)


def weights_memory() -> int:
    """Memory for packed weights that outlives an engine; without a name, so nothing is left."""
    return os.memfd_create("tgi-weights")
