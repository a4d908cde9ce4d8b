"""The interactive chat on a pseudo-terminal: streaming, Ctrl-C, commands, history."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.scripted_server import ScriptedServer, running
from tests.cli.terminal import Terminal


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer(text="the answer is *forty-two* indeed")) as scripted:
        yield scripted


@pytest.fixture
def terminal(server: ScriptedServer, tmp_path: Path) -> Iterator[Terminal]:
    with open_chat(server, tmp_path) as opened:
        yield opened


def open_chat(server: ScriptedServer, home: Path, *flags: str) -> Terminal:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TGI_")}
    environ |= {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    argv = [sys.executable, "-m", "tgi_cli", "chat", "--url", server.url, *flags]
    terminal = Terminal(argv, environ)
    terminal.expect("/help lists commands")
    return terminal


def test_an_answer_is_rendered_and_the_chat_goes_on(
    terminal: Terminal, server: ScriptedServer
) -> None:
    terminal.type("what is it?\r")
    terminal.expect("3 + 5 tokens")
    assert "the answer is forty-two indeed" in terminal.shown
    terminal.type("and now?\r")
    terminal.expect("2 + 5 tokens")
    contents = [message["content"] for message in server.requests[1]["messages"]]
    assert contents == ["what is it?", "the answer is *forty-two* indeed ", "and now?"]
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.ends() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(
    terminal: Terminal, server: ScriptedServer
) -> None:
    server.text = "endless " * 20_000
    server.delay = 0.01
    terminal.type("go\r")
    terminal.expect("endless endless")
    terminal.type("\x03")
    terminal.expect("stopped")
    assert server.disconnected.wait(10)
    terminal.type("/stats\r")
    terminal.expect("1 answers")
    terminal.expect("2 messages in the conversation")
    terminal.expect("> ")
    terminal.type("\x03")
    terminal.expect("Ctrl-D or /exit leaves")
    assert terminal.process.poll() is None
    terminal.type("/exit\r")
    assert terminal.ends() == 0


def test_commands_change_what_is_asked(
    terminal: Terminal, server: ScriptedServer, tmp_path: Path
) -> None:
    saved = tmp_path / "chat.json"
    terminal.type("/help\r")
    terminal.expect("/params")
    terminal.type("/system Be brief.\r")
    terminal.expect("system prompt: Be brief.")
    terminal.type("/params temperature=0 max_tokens=2\r")
    terminal.expect("temperature=0.0, max_tokens=2")
    terminal.type("/params temperature=hot\r")
    terminal.expect("temperature is 'hot' but must be a number")
    terminal.type("first\r")
    terminal.expect("1 + 2 tokens")
    terminal.type(f"/save {saved}\r")
    terminal.expect("saved 2 messages")
    terminal.type("/reset\r")
    terminal.expect("the conversation is empty")
    terminal.type("/load /no/such/file\r")
    terminal.expect("cannot read /no/such/file")
    terminal.type("/nonsense\r")
    terminal.expect("there is no command /nonsense")
    terminal.type(f"/load {saved}\r")
    terminal.expect("loaded 2 messages")
    terminal.type("second\r")
    terminal.expect("1 + 2 tokens")
    first, second = server.requests
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (first["temperature"], first["max_tokens"]) == (0, 2)
    assert [message["role"] for message in second["messages"]] == [
        *("system", "user", "assistant", "user")
    ]
    assert json.loads(saved.read_text())["messages"][0]["content"] == "first"


def test_a_failing_server_does_not_end_the_chat(terminal: Terminal, server: ScriptedServer) -> None:
    server.break_after = 1
    terminal.type("hello\r")
    terminal.expect("the connection to")
    server.break_after = None
    terminal.type("again\r")
    terminal.expect("1 + 5 tokens")


def test_lines_can_be_added_and_history_outlives_the_chat(
    terminal: Terminal, server: ScriptedServer, tmp_path: Path
) -> None:
    terminal.type("line one\x1b\rline two\r")
    terminal.expect("4 + 5 tokens")
    assert server.requests[0]["messages"][0]["content"] == "line one\nline two"
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.ends() == 0
    with open_chat(server, tmp_path, "--plain") as again:
        again.type("\x1b[A\x1b[A\r")
        again.expect("4 + 5 tokens")
    assert server.requests[1]["messages"][0]["content"] == "line one\nline two"
