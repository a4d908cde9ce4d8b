"""A program on a pseudo-terminal, driven by what it shows."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType

_ESCAPES = re.compile(rb"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()][A-Z0-9]|[=>78])|\r")


class Terminal:
    """`with Terminal(argv, env) as terminal:`; `shown` is all text so far without escapes."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self._fd, child = pty.openpty()
        self.process = subprocess.Popen(
            argv,
            stdin=child,
            stdout=child,
            stderr=child,
            # The test's terminal does not answer where its cursor is.
            env={**env, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "80"},
            preexec_fn=_own_terminal,
        )
        os.close(child)
        self.shown = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def type(self, text: str) -> None:
        """Press keys; `\\r` is Enter, `\\x03` Ctrl-C, `\\x04` Ctrl-D."""
        self._seen = len(self.shown)
        os.write(self._fd, text.encode())

    def expect(self, text: str, seconds: float = 30.0) -> None:
        """Wait until `text` is shown after the keys last pressed and what was waited for since."""
        deadline = time.monotonic() + seconds
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown[self._seen :]!r}"
            if not self._read(0.2) and self.process.poll() is not None:
                assert text in self.shown[self._seen :], self.shown
        self._seen = self.shown.index(text, self._seen) + len(text)

    def ends(self, seconds: float = 30.0) -> int:
        """Wait for the end of the program and return its exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            self._read(0.2)
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], seconds)
        if not ready:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux says EIO when the program closed the terminal
            return False
        self.shown += _ESCAPES.sub(b"", data).decode("utf-8", "replace")
        return bool(data)


def _own_terminal() -> None:
    """Make the pseudo-terminal the controlling one: Ctrl-C then becomes SIGINT."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
