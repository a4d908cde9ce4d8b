"""The `tgi` program: finds a command's file when it is called and turns failures into exit codes.

Knows no command beyond name and one line of help: `tgi_cli.cli.<name>` is imported when the command
runs (or asks for its own help) and must have a function `command` with Typer annotations. A command
takes a `typer.Context` and gets its `Printer` and defaults with `console.invocation(ctx)`; it
raises `TgiError` to fail, `typer.Exit(code)` to end early, and else returns None.

Exit codes: 0 done, 1 expected failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from tgi_cli import __version__
from tgi_cli.cli.console import Invocation, Printer, invocation
from tgi_cli.errors import TgiError

if TYPE_CHECKING:
    from tgi_cli.serve.early_engine import EarlyEngine

# The first line of each command's docstring, repeated so that listing them imports none.
COMMANDS = {
    "download": "Fetch a model into the local cache and print its path.",
    "quantize": "Write a model in 4 or 8 bits: GPTQ, AWQ, FP8 or INT8.",
    "launch": "Serve a model over HTTP: the OpenAI API and TGI's own.",
    "chat": "Talk to a model in the terminal.",
    "bench": "Measure a running server, or a model served for the occasion.",
    "key": "Make an API key and its entry for --api-key-file.",
    "env": "Show versions, hardware and kernels in use, for bug reports.",
}
_MARKUP: Literal["rich"] = "rich"
_COMMON = "Common options"


def _run(main: Callable[..., Any], args: Sequence[str] | None, kwargs: dict[str, Any]) -> int:
    """Call a Typer command's `main` and return the exit code, having told the user of a failure."""
    kwargs["standalone_mode"] = False
    printer: Printer = kwargs.setdefault("obj", Invocation()).printer
    try:
        result = main(args, **kwargs)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # The reader of stdout went away; the interpreter must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if printer.verbose and not isinstance(error, TyperException):
            printer.console.print_exception()
        return _say_failure(printer, error)
    if code == 130:
        printer.say("interrupted")
    return code


def _say_failure(printer: Printer, error: Exception) -> int:
    if isinstance(error, TgiError):
        printer.error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, TyperException):
        message = error.format_message().rstrip(".")
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "tgi"
        printer.error(message[:1].lower() + message[1:], f"see `{path} --help`")
        return error.exit_code
    first = "" if printer.verbose else "rerun with --verbose for the traceback; "
    printer.error(
        f"unexpected {type(error).__name__}: {error}",
        f"{first}to report a bug, attach the traceback and the output of `tgi env`",
    )
    return 1


def _be_verbose(ctx: typer.Context, value: bool) -> None:
    if value:
        invocation(ctx).printer.verbose = True


def _be_quiet(ctx: typer.Context, value: bool) -> None:
    if value:
        invocation(ctx).printer.quiet = True


def _show_version(ctx: typer.Context, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        invocation(ctx).printer.data(f"tgi {__version__}")
        raise typer.Exit


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Say more, and show tracebacks.",
        callback=_be_verbose,
        expose_value=False,
        rich_help_panel=_COMMON,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Say nothing but results and errors.",
        callback=_be_quiet,
        expose_value=False,
        rich_help_panel=_COMMON,
    ),
]
Version = Annotated[
    bool,
    typer.Option(
        "--version",
        help="Print the version and exit.",
        callback=_show_version,
        expose_value=False,
        is_eager=True,
        rich_help_panel=_COMMON,
    ),
]


def _common(verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Carry the options that every command has; never called."""


def _as_command(function: Callable[..., Any], name: str | None) -> TyperCommand:
    holder = typer.Typer(add_completion=False, rich_markup_mode=_MARKUP)
    holder.command(name, cls=_Command)(function)
    command = typer.main.get_command(holder)
    assert isinstance(command, TyperCommand)
    return command


def load_command(name: str) -> TyperCommand:
    """Import `tgi_cli.cli.<name>` and return its `command` with the common options added."""
    module = importlib.import_module(f"tgi_cli.cli.{name}")
    command = _as_command(module.command, name)
    taken = {option for param in command.params for option in param.opts}
    command.params += [
        param
        for param in _as_command(_common, None).params
        if param.name != "help" and not taken.intersection(param.opts)
    ]
    return command


class _Command(TyperCommand):
    """A command that can be a program of its own, with the same failures as under `tgi`."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> NoReturn:
        sys.exit(_run(super().main, args, kwargs))


class _LazyCommand(TyperCommand):
    """Name and help of a command; becomes the real one when it is to parse arguments."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: Any = None,
        **extra: Any,
    ) -> Any:
        assert self.name is not None
        return load_command(self.name).make_context(info_name, args, parent, **extra)


class _Program(TyperGroup):
    """The group of all commands, none of them imported yet."""

    def __init__(self, **attrs: Any) -> None:
        attrs["commands"] = {name: _LazyCommand(name, help=line) for name, line in COMMANDS.items()}
        super().__init__(**attrs)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> NoReturn:
        sys.exit(_run(super().main, args, kwargs))


# Plain text at the top: Typer's Rich help imports a Markdown renderer, which doubles the cost.
app = typer.Typer(name="tgi", cls=_Program, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _program(
    ctx: typer.Context, version: Version = False, verbose: Verbose = False, quiet: Quiet = False
) -> None:
    """Download, serve, measure and chat with language models."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(2)


def main(early_engine: EarlyEngine | None = None) -> NoReturn:
    """Run `tgi`, with an engine for `launch` that has been started already."""
    typer.main.get_command(app).main(prog_name="tgi", obj=Invocation(early_engine=early_engine))
    raise AssertionError("a program's main never returns")


def launcher(early_engine: EarlyEngine | None = None) -> NoReturn:
    """Run `text-generation-launcher`: `tgi launch` under TGI's name, open to the network."""
    load_command("launch").main(
        prog_name="text-generation-launcher",
        obj=Invocation(default_host="0.0.0.0", early_engine=early_engine),
    )
    raise AssertionError("a program's main never returns")
