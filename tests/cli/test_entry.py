"""The engine that is started before the arguments are read: there for a server, gone otherwise."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

import psutil
import pytest

from tgi_cli.cli import entry
from tgi_cli.serve.early_engine import EarlyEngine

MARK = "TGI_TEST_MARK"


def engines(mark: str) -> list[int]:
    """Process ids of engines that were started with this mark in their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            engine = "tgi_cli.engine.process" in (process.info["cmdline"] or ())
            if engine and process.environ().get(MARK) == mark:
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def until(holds: Callable[[], bool], patience: float = 20.0) -> bool:
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_refused_launch_leaves_no_engine() -> None:
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, "-m", "tgi_cli", "launch", "--port", "70000"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, MARK: mark},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr  # the engine says nothing
    assert "70000" in done.stderr
    assert until(lambda: not engines(mark))


def test_a_launch_that_is_killed_leaves_no_engine() -> None:
    mark = uuid.uuid4().hex
    launch = subprocess.Popen(
        [sys.executable, "-m", "tgi_cli", "launch", "--model-id", "/nonexistent", "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, MARK: mark},
    )
    assert until(lambda: len(engines(mark)) == 1)
    launch.kill()
    launch.wait()
    assert until(lambda: not engines(mark))


@pytest.mark.parametrize("flag", ["--help", "--dry-run", "--show-config", "--version"])
def test_what_starts_no_server_starts_no_engine(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EarlyEngine, "start", lambda: pytest.fail("an engine was started"))
    assert entry._early(["--model-id", "x", flag]) is None


@pytest.mark.parametrize("words", [["tgi"], ["tgi", "env"], ["tgi", "--version", "launch"]])
def test_only_launch_starts_one(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def main(early_engine: EarlyEngine | None = None) -> None:
        given.append(early_engine)

    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("tgi_cli.cli.app.main", main)
    monkeypatch.setattr(EarlyEngine, "start", lambda: pytest.fail("an engine was started"))
    entry.main()
    assert given == [None]


def test_it_ends_when_it_is_given_up() -> None:
    early = EarlyEngine.start()
    assert early is not None
    assert early.returncode is None
    assert os.getsid(early.pid) == early.pid  # the terminal's Ctrl-C does not reach it

    async def end() -> int:
        early.give_up()
        codes = await asyncio.gather(early.wait(), early.wait())
        assert codes[0] == codes[1]
        return await early.wait()

    assert asyncio.run(end()) == 0
    assert early.returncode == 0


def test_a_system_that_refuses_is_left_to_who_starts_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no processes left")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert EarlyEngine.start() is None


def test_beginning_imports_nothing_that_takes_time() -> None:
    code = "import sys, tgi_cli.cli.entry; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    slow = {"typer", "rich", "asyncio", "msgspec", "torch", "pydantic", "psutil"}
    assert slow.isdisjoint(done.stdout.split())
