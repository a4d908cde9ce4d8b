"""How every command talks: data to stdout, talk to stderr, progress only on a terminal.

Knows nothing of models or servers. A command takes its `Invocation` from `ctx.obj`:
`printer = invocation(ctx).printer`. Rich reads `NO_COLOR` and the terminal's width itself.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from typer import Context

    from tgi_cli.serve.early_engine import EarlyEngine


@dataclass(slots=False)
class Printer:
    """One command's output. `quiet` keeps errors and data only; `verbose` adds tracebacks."""

    verbose: bool = False
    quiet: bool = False

    @cached_property
    def console(self) -> Console:
        """The Rich console on stderr, made on first use."""
        from rich.console import Console

        return Console(stderr=True, highlight=False)

    @property
    def animated(self) -> bool:
        """Whether bars and live views may be drawn: stderr is a terminal and talk is wanted."""
        # Asked of the stream itself: Rich also takes a pipe for a terminal when FORCE_COLOR is set.
        return not self.quiet and sys.stderr.isatty() and not self.console.is_dumb_terminal

    def data(self, text: str) -> None:
        """Write a result line to stdout, never coloured, so that it can be piped."""
        sys.stdout.write(text + "\n")

    def json(self, value: Any) -> None:
        """Write a result to stdout as indented JSON."""
        self.data(json.dumps(value, indent=2, ensure_ascii=False))

    def say(self, text: str, *, style: str | None = None) -> None:
        """Tell the user what is going on (stderr); silent with `--quiet`."""
        if not self.quiet:
            self.console.print(text, style=style, markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Tell what only `--verbose` users want to know (stderr)."""
        if self.verbose and not self.quiet:
            self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Tell what the user must know even with `--quiet` (stderr)."""
        self._labelled("warning", "bold yellow", text)

    def error(self, message: str, hint: str | None = None) -> None:
        """Say why the command failed, and after a blank line the way out (stderr)."""
        self._labelled("error", "bold red", message)
        if hint:
            self.console.print()
            self._labelled("hint", "bold cyan", hint)

    def _labelled(self, label: str, style: str, text: str) -> None:
        self.console.print(f"{label}:", style=style, end=" ")
        self.console.print(text, markup=False, soft_wrap=True)


@dataclass(slots=True)
class Invocation:
    """What an entry point hands to its command through Typer's context."""

    printer: Printer = field(default_factory=Printer)
    default_host: str = "127.0.0.1"  # what `launch` binds when neither flag nor variable says
    early_engine: EarlyEngine | None = None  # for `launch`


def invocation(ctx: Context) -> Invocation:
    """Return this run's `Invocation`; every entry point of `cli.app` sets one."""
    obj = ctx.find_root().obj
    assert isinstance(obj, Invocation)
    return obj
