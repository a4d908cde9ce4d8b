"""What `tgi download` shows, on a terminal and elsewhere; `tests/unit/hub` tests what it does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal
from tests.hub_server.client import environment
from tests.hub_server.server import File, Hub, Repo, serve
from tgi_cli.cli.console import Printer
from tgi_cli.cli.download import _PlainView
from tgi_cli.hub_transfer import Progress

SIZE = 2_000_000
COMMAND = [sys.executable, "-m", "tgi_cli", "download", "org/model"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        running.repos["org/model"] = Repo(
            {
                "config.json": File(b"{}"),
                "model.safetensors": File(bytes(SIZE), lfs=True),
            }
        )
        yield running


def test_bars_on_a_terminal(hub: Hub, tmp_path: Path) -> None:
    hub.delay = 0.01
    with Terminal(COMMAND, environment(hub.url, tmp_path)) as terminal:
        terminal.expect("all files")
        terminal.expect("model.safetensors")
        terminal.expect("B/s")
        assert terminal.ends() == 0
        terminal.expect("2.0/2.0 MB")
        terminal.expect(str(tmp_path / "hf/hub/models--org--model/snapshots"))


def test_ctrl_c_on_a_terminal(hub: Hub, tmp_path: Path) -> None:
    hub.delay = 0.1
    with Terminal(COMMAND, environment(hub.url, tmp_path)) as terminal:
        terminal.expect("model.safetensors")
        terminal.expect("B/s")
        terminal.type("\x03")
        terminal.expect("interrupted")
        assert terminal.ends() == 130
        assert "Traceback" not in terminal.shown


def test_quiet_and_dumb_terminals_get_no_bars(hub: Hub, tmp_path: Path) -> None:
    with Terminal([*COMMAND, "--quiet"], environment(hub.url, tmp_path)) as terminal:
        assert terminal.ends() == 0
        terminal.expect("snapshots")
        assert "all files" not in terminal.shown


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    view = _PlainView(Printer())
    view(Progress("download", "a", 10, 10))
    view(Progress("download", "b", 0, 990))
    for done in (50, 89, 90, 100, 400, 989, 990):
        view(Progress("download", "b", done, 990))
    view(Progress("convert", "b", 0, 990))
    view(Progress("convert", "b", 990, 990))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a (0 kB) is here already",
        "10% of 1 kB",
        "41% of 1 kB",
        "100% of 1 kB",
        "b (1 kB) done",
        "converted b",
    ]
