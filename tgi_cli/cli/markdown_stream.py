"""Markdown on a terminal while it is still being written.

Finished blocks are rendered once and scroll away for good; only the block being written is drawn
again as it grows. So an answer may be longer than the screen and nothing flickers.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

_REFRESH_SECONDS = 0.06
_FENCES = ("```", "~~~")


class MarkdownStream:
    """`with MarkdownStream(console) as answer:`, then `answer.feed(text)` for every piece."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail = ""
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> MarkdownStream:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(Text(""), refresh=True)
        self._live.stop()
        if self._tail.strip():
            self._console.print(Markdown(self._tail))

    def feed(self, text: str) -> None:
        """Add text; draws at most about sixteen times a second."""
        self._tail += text
        end = finished_length(self._tail)
        now = time.monotonic()
        if not end and now - self._drawn < _REFRESH_SECONDS:
            return
        if end:
            done, self._tail = self._tail[:end], self._tail[end:]
            self._live.update(Text(""), refresh=True)
            self._console.print(Markdown(done))
            self._console.print()
        self._drawn = now
        # What is taller than the screen cannot be redrawn in place: show its end.
        visible = "\n".join(self._tail.splitlines()[-max(self._console.height - 2, 1) :])
        self._live.update(Text(visible), refresh=True)


def finished_length(text: str) -> int:
    """How many characters of `text` are whole blocks: up to the last blank line outside a fence."""
    end = position = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        position += len(line)
        bare = line.strip()
        run = bare[: len(bare) - len(bare.lstrip("`~"))]
        if fence:
            fence = "" if run == bare and run.startswith(fence) else fence
        elif run.startswith(_FENCES):
            fence = run
        elif not bare and line.endswith("\n"):
            end = position
    return end
