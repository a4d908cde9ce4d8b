"""The program around the commands: lazy listing, exit codes, what is said when things fail."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import tgi_cli
from tgi_cli.cli import app
from tgi_cli.cli.console import Invocation, invocation
from tgi_cli.errors import ModelMissing, UsageError

Result = tuple[int, str, str]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tgi_cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | variables,
    )


def modules_after(code: str) -> set[str]:
    """Modules that `code` makes a fresh interpreter import."""
    program = f"import sys; before = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


HELP = """
sys.argv = ["tgi", "--help"]
from tgi_cli.cli.app import main
try:
    main()
except SystemExit as end:
    assert end.code == 0
"""


def test_help_imports_no_command_and_little_else() -> None:
    helped = modules_after(HELP)
    own = {name for name in helped if name.startswith("tgi_cli")}
    assert own == {
        "tgi_cli",
        "tgi_cli.cli",
        "tgi_cli.cli.app",
        "tgi_cli.cli.console",
        "tgi_cli.errors",
    }
    assert len(helped) <= 1.6 * len(modules_after("import typer, rich"))


@pytest.mark.parametrize("name", app.COMMANDS)
def test_listed_help_is_the_commands_own(name: str) -> None:
    module = importlib.import_module(f"tgi_cli.cli.{name}")
    assert (inspect.getdoc(module.command) or "").splitlines()[0] == app.COMMANDS[name]


@pytest.mark.parametrize("name", app.COMMANDS)
def test_command_help_needs_no_torch(name: str) -> None:
    imported = modules_after(HELP.replace('"--help"', f'"{name}", "--help"'))
    assert f"tgi_cli.cli.{name}" in imported
    assert not {"torch", "transformers"} & imported


def test_help_and_version() -> None:
    done, listed = run("--help"), app.COMMANDS.items()
    assert done.returncode == 0
    assert all(name in done.stdout and line[:40] in done.stdout for name, line in listed)
    assert run("--version").stdout == f"tgi {tgi_cli.__version__}\n"
    bare = run()
    assert bare.returncode == 2
    assert bare.stdout == ""
    assert bare.stderr == done.stdout


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["lanch"], "error: no such command 'lanch'", "hint: see `tgi --help`"),
        (["env", "--jsn"], "error: no such option: --jsn", "hint: see `tgi env --help`"),
        (["download"], "error: missing argument 'MODEL'", "hint: see `tgi download --help`"),
        (["download", "a", "b"], "error: got unexpected extra argument", "hint: see"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, hint: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    first, blank, *rest = done.stderr.splitlines()
    assert first.startswith(said)
    assert blank == ""
    assert rest[0].startswith(hint)


def test_expected_failure_is_one_sentence_and_a_hint() -> None:
    done = run("download", "./nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: there is no file or folder './nowhere'\n"
        "\n"
        "hint: a model on the hub is written org/name; the demo model is `demo`\n"
    )
    for arguments in (["--verbose", "download"], ["download", "--verbose"]):
        verbose = run(*arguments, "./nowhere")
        assert "Traceback" in verbose.stderr
        assert "error: there is no file or folder './nowhere'" in verbose.stderr


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Program]]:
    """The program with a command `odd` that does what the test says."""
    Program.behaviour = staticmethod(lambda ctx: None)
    monkeypatch.setitem(app.COMMANDS, "odd", "Do something odd.")
    monkeypatch.setitem(sys.modules, "tgi_cli.cli.odd", Program)  # type: ignore[arg-type]
    yield Program
    sys.modules.pop("tgi_cli.cli.odd", None)


class Program:
    """Stands where the module `tgi_cli.cli.odd` would."""

    @staticmethod
    def behaviour(ctx: typer.Context) -> None:
        """Replaced by each test."""

    @staticmethod
    def command(ctx: typer.Context) -> None:
        """Do something odd."""
        Program.behaviour(ctx)

    @staticmethod
    def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
        with pytest.raises(SystemExit) as end:
            typer.main.get_command(app.app).main(list(arguments), prog_name="tgi")
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err


def failing(error: BaseException) -> staticmethod:  # type: ignore[type-arg]
    def behaviour(_ctx: typer.Context) -> None:
        raise error

    return staticmethod(behaviour)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ModelMissing("no such model"), 1, "error: no such model\n"),
        (UsageError("--a excludes --b", hint="drop one"), 2, "error: --a excludes --b\n\nhint: "),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (typer.Exit(130), 130, "interrupted\n"),
        (typer.Exit(1), 1, ""),
        (typer.Exit(), 0, ""),
    ],
)
def test_exit_codes(
    program: type[Program],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    program.behaviour = failing(error)
    got, out, err = program.run(capsys, "odd")
    assert (got, out) == (code, "")
    assert err.startswith(said) if said else err == ""
    assert "Traceback" not in err


def test_unexpected_failure(program: type[Program], capsys: pytest.CaptureFixture[str]) -> None:
    program.behaviour = failing(ZeroDivisionError("division by [zero]"))
    code, _, err = program.run(capsys, "odd")
    assert code == 1
    assert err.splitlines()[0] == "error: unexpected ZeroDivisionError: division by [zero]"
    assert "rerun with --verbose" in err
    assert "`tgi env`" in err
    assert "Traceback" not in err
    _, _, err = program.run(capsys, "odd", "--verbose")
    assert "Traceback" in err
    assert "rerun with --verbose" not in err


def test_quiet_keeps_data_and_errors(
    program: type[Program], capsys: pytest.CaptureFixture[str]
) -> None:
    def behaviour(ctx: typer.Context) -> None:
        printer = invocation(ctx).printer
        printer.say("talk")
        printer.detail("details")
        printer.warn("careful")
        printer.data("[data]")
        printer.json({"ü": 1})

    program.behaviour = staticmethod(behaviour)
    assert program.run(capsys, "odd") == (
        0,
        '[data]\n{\n  "ü": 1\n}\n',
        "talk\nwarning: careful\n",
    )
    assert program.run(capsys, "--quiet", "odd")[2] == "warning: careful\n"
    assert program.run(capsys, "odd", "--verbose")[2] == "talk\ndetails\nwarning: careful\n"


def test_no_colour_in_pipes_and_with_no_color(tmp_path: Path) -> None:
    assert "\x1b" not in run("download", "./nowhere").stderr
    coloured = run("download", "./nowhere", FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[1;31merror:" in coloured.stderr
    plain = run("download", "./nowhere", FORCE_COLOR="1", TERM="xterm", NO_COLOR="1")
    assert "\x1b[1;31m" not in plain.stderr


def test_reader_of_stdout_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tgi_cli", "--version"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


def test_launcher_is_launch_open_to_the_network(
    monkeypatch: pytest.MonkeyPatch, program: type[Program], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Invocation] = []
    program.behaviour = staticmethod(lambda ctx: seen.append(invocation(ctx)))
    monkeypatch.setitem(sys.modules, "tgi_cli.cli.launch", Program)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["text-generation-launcher", "--verbose"])
    with pytest.raises(SystemExit) as end:
        app.launcher()
    assert end.value.code == 0
    assert program.run(capsys, "launch")[0] == 0
    assert [one.default_host for one in seen] == ["0.0.0.0", "127.0.0.1"]
    assert [one.printer.verbose for one in seen] == [True, False]

    program.behaviour = failing(ModelMissing("no such model"))
    with pytest.raises(SystemExit) as end:
        app.launcher()
    assert end.value.code == 1
    assert "error: no such model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "number", "completions"),
    [("tgi la", "1", {"launch"}), ("tgi download --rev", "2", {"--revision"})],
)
def test_shell_completion(words: str, number: str, completions: set[str]) -> None:
    code = "from tgi_cli.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"_TGI_COMPLETE": "complete_bash", "COMP_WORDS": words}
        | {"COMP_CWORD": number},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert set(done.stdout.split()) == completions
