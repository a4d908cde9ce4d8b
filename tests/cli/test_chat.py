"""`tgi chat` against a scripted server: pipes, faults, saved conversations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli.scripted_server import ScriptedServer, running
from tgi_cli.cli.chat_answer import ask
from tgi_cli.cli.chat_session import AnswerStats, ChatSession, Message
from tgi_cli.cli.markdown_stream import MarkdownStream, finished_length
from tgi_cli.cli.openai_client import EventStream, OpenAIClient, base_url, read_chunk
from tgi_cli.errors import RemoteError, TgiError, UsageError

STATS = AnswerStats(seconds=1.0, first_token=0.5, prompt_tokens=3, completion_tokens=6)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer(text="The answer is\n42")) as scripted:
        yield scripted


def chat(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[bytes]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TGI_")}
    return subprocess.run(
        [sys.executable, "-m", "tgi_cli", "chat", *arguments],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=60,
        check=False,
        env=environ,
    )


def test_piped_input_is_joined_with_the_prompt_and_only_the_answer_is_on_stdout(
    server: ScriptedServer,
) -> None:
    done = chat(
        *("Summarize:", "--url", f"{server.url}/v1", "--system", "Be brief.", "--seed", "7"),
        *("--temperature", "0", "--max-tokens", "50"),
        stdin="a long text\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"The answer is\n42 \n"
    assert done.stderr == b""
    [body] = server.requests
    assert body["model"] == "scripted"
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Summarize:\n\na long text"},
    ]
    assert (body["seed"], body["temperature"], body["max_tokens"]) == (7, 0, 50)


def test_piped_input_alone_is_the_question(server: ScriptedServer) -> None:
    done = chat("--url", server.url, "--model-id", "other", stdin="what?")
    assert done.stdout == b"The answer is\n42 \n"
    assert server.requests[0]["model"] == "other"
    assert server.requests[0]["messages"][0]["content"] == "what?"


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "sentence"),
    [
        ([], "hi", 2, "neither --model-id nor --url"),
        (["--url", "ftp://x"], "hi", 2, "--url is 'ftp://x'"),
        (["--url", "http://127.0.0.1:9"], "", 2, "nothing to ask"),
        (["--url", "http://127.0.0.1:9"], "hi", 1, "cannot reach http://127.0.0.1:9: "),
        (["--url", "http://h", "--temperature", "-1"], "hi", 2, "--temperature is '-1'"),
        (["--url", "http://h", "--max-tokens", "lots"], "hi", 2, "--max-tokens is 'lots'"),
        (["--url", "http://h"], b"\xff\xfe", 2, "not UTF-8 at byte 0"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    arguments: list[str], stdin: str | bytes, code: int, sentence: str
) -> None:
    done = chat(*arguments, stdin=stdin)
    assert done.returncode == code
    assert done.stdout == b""
    assert done.stderr.decode().startswith("error: ")
    assert sentence in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_wrong_key_and_a_broken_stream_are_told(server: ScriptedServer) -> None:
    server.api_key = "sesame"
    refused = chat("hi", "--url", server.url, "--api-key", "open")
    assert refused.returncode == 1
    assert b"the server answered 401: wrong key" in refused.stderr
    server.break_after = 2
    cut = chat("hi", "--url", server.url, "--api-key", "sesame")
    assert cut.returncode == 1
    assert cut.stdout == b"The answer \n"
    assert b"the connection to" in cut.stderr


def test_ctrl_c_ends_a_single_answer_with_130(server: ScriptedServer) -> None:
    server.text, server.delay = "endless " * 1000, 0.05
    asking = subprocess.Popen(
        [sys.executable, "-m", "tgi_cli", "chat", "hi", "--url", server.url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert server.streaming.wait(30)
    assert asking.stdout is not None
    first = os.read(asking.stdout.fileno(), 100)
    asking.send_signal(signal.SIGINT)
    out, err = asking.communicate(timeout=30)
    assert asking.returncode == 130
    assert (first + out).startswith(b"endless ")
    assert (first + out).endswith(b" \n")
    assert err == b"interrupted\n"
    assert server.disconnected.wait(10)


async def test_an_answer_is_kept_with_its_counts_and_times(server: ScriptedServer) -> None:
    session = ChatSession("scripted")
    pieces: list[str] = []
    async with OpenAIClient(server.url) as client:
        stats = await ask(client, session, "why?", pieces.append)
        await ask(client, session, "and?", pieces.append)
    assert pieces[:4] == ["The ", "answer ", "is\n42 ", "The "]
    assert (stats.prompt_tokens, stats.completion_tokens) == (1, 3)
    assert stats.first_token is not None
    assert 0 < stats.first_token <= stats.seconds
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "why?",
        "The answer is\n42 ",
        "and?",
    ]
    assert len(session.answers) == 2


def test_a_conversation_survives_saving_and_loading(tmp_path: Path) -> None:
    session = ChatSession("m", system="Be kind.")
    session.set_param("temperature=0.5")
    session.set_param("max-tokens=9")
    session.add("q", "a", STATS)
    session.save(tmp_path / "chat.json")
    other = ChatSession("n")
    other.load(tmp_path / "chat.json")
    assert other.model == "n"
    assert other.system == "Be kind."
    assert other.params == {"temperature": 0.5, "max_tokens": 9}
    assert other.messages == [Message("user", "q"), Message("assistant", "a")]
    assert other.body("next")["messages"][-1] == {"role": "user", "content": "next"}


def test_parameters_are_checked_and_can_be_taken_back() -> None:
    session = ChatSession("m")
    session.set_param("seed=5")
    session.set_param("seed=")
    assert session.params == {}
    for wrong in ("seed=-1", "top_p=2", "max_tokens=1.5", "colour=red", "temperature"):
        with pytest.raises(UsageError):
            session.set_param(wrong)
    with pytest.raises(UsageError, match="top_p is '2' but must be a number from 0 to 1"):
        session.set_param("top_p=2")


def test_an_empty_answer_leaves_no_turn_behind() -> None:
    session = ChatSession("m")
    session.add("q", "", STATS)
    assert session.messages == []
    assert len(session.answers) == 1


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"model": 1}', b'{"model": "m", "x": 1}'])
def test_loading_what_is_not_a_chat_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(TgiError, match=r"chat\.json is not a saved chat"):
        ChatSession("m").load(path)
    with pytest.raises(TgiError, match="cannot read"):
        ChatSession("m").load(tmp_path / "missing")
    with pytest.raises(TgiError, match="cannot write"):
        ChatSession("m").save(tmp_path / "missing" / "chat.json")


def test_statistics_show_what_was_counted() -> None:
    assert STATS.line() == "3 + 6 tokens, first after 0.50 s, then 10.0 tokens/s, 1.00 s in all"
    assert AnswerStats(seconds=2.0, first_token=None).line() == "2.00 s in all"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
def test_events_are_found_however_the_bytes_are_cut(size: int) -> None:
    sent = b": hello\r\n\r\ndata: one\r\n\r\ndata:two\n\nevent: x\ndata: a\ndata: b\n\n\ndata: cut"
    stream = EventStream()
    events = [
        event
        for start in range(0, len(sent), size)
        for event in stream.feed(sent[start : start + size])
    ]
    assert events == [b"one", b"two", b"a\nb"]


@pytest.mark.parametrize(
    ("event", "kind", "sentence"),
    [
        (b"{", "bad answer", "not JSON"),
        (b"[]", "bad answer", "the stream holds"),
        (b'{"error": {"message": "out of cake"}}', "error in stream", "out of cake"),
        (b'{"error": "no cake", "error_type": "generation"}', "error in stream", "no cake"),
    ],
)
def test_errors_within_a_stream_are_errors(event: bytes, kind: str, sentence: str) -> None:
    with pytest.raises(RemoteError, match=sentence) as raised:
        read_chunk(event)
    assert raised.value.kind == kind


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h:1/v1/", "http://h:1"),
        ("127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("https://h/prefix/v1", "https://h/prefix"),
    ],
)
def test_urls_are_taken_as_people_write_them(given: str, base: str) -> None:
    assert base_url(given) == base


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("one", 0),
        ("one\n", 0),
        ("one\n\ntwo", 5),
        ("```py\na\n\nb", 0),
        ("```py\na\n\nb\n```\n\nc", 16),
        ("````\n```\n\n````\n\n", 16),
    ],
)
def test_blocks_end_at_blank_lines_outside_fences(text: str, length: int) -> None:
    assert finished_length(text) == length


def test_markdown_is_complete_whatever_the_pieces() -> None:
    answer = "# Title\n\nSome *words*.\n\n```\ncode\n\nmore\n```\n\n- a\n- b"
    console = Console(force_terminal=True, width=40, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file, MarkdownStream(console) as stream:
        for character in answer:
            stream.feed(character)
    shown = console.export_text()
    for word in ("Title", "Some words.", "code", "more", "• a", "• b"):
        assert word in shown
