"""What happens to streams that are refused, broken, slow or left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tests.http.conftest import Serve, Site
from tgi_cli.serve import sse

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT_STREAM = {"messages": MESSAGES, "stream": True}
ROUTES = [
    (CHAT, CHAT_STREAM),
    (CHAT, {**CHAT_STREAM, "n": 2}),
    (CHAT, {"messages": MESSAGES}),
    (COMPLETIONS, {"prompt": ["a", "b"], "stream": True}),
    ("/generate", {"inputs": "Say"}),
    ("/generate_stream", {"inputs": "Say"}),
]


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_client_gone_while_queued(site: Site, path: str, body: dict[str, object]) -> None:
    site.engine.gate.clear()
    request = asyncio.create_task(site.post(path, body))
    await until(lambda: site.engine.running > 0)
    running = site.engine.running
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await until(lambda: site.engine.running == 0)
    assert len(site.engine.aborted) == running
    metrics = await site.metrics()
    assert metrics['tgi_request_failure{err="dropped"}'] == 1
    assert metrics["tgi_request_success"] == 0


async def test_client_gone_while_streaming(site: Site) -> None:
    site.engine.reply = lambda request: "x" * 400
    response = await site.session.post(CHAT, json=CHAT_STREAM)
    await response.content.readany()
    site.engine.gate.clear()
    response.close()
    await until(lambda: len(site.engine.aborted) == 1)
    assert site.engine.running == 0


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_engine_dies_before_the_first_token(
    site: Site, path: str, body: dict[str, object]
) -> None:
    site.engine.fail_after = 0
    status, answer, headers = await site.post(path, body)
    assert status == 503
    assert "the engine died" in str(answer)
    assert int(headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("path", "body"), [(p, b) for p, b in ROUTES if b.get("stream") or p == "/generate_stream"]
)
async def test_engine_dies_in_the_middle(site: Site, path: str, body: dict[str, object]) -> None:
    site.engine.fail_after = 2
    events = await site.stream(path, body)
    error = events[-1]["error"]
    assert "the engine died" in (error["message"] if path.startswith("/v1") else error)
    assert all("error" not in event for event in events[:-1])
    assert len(events) > 1
    metrics = await site.metrics()
    assert metrics['tgi_request_failure{err="incomplete"}'] == 1
    await until(lambda: site.engine.running == 0)


async def test_engine_gives_up_on_one_request(site: Site) -> None:
    site.engine.refuse = "it needs 99 blocks and the cache has 64"
    status, body, _ = await site.post(CHAT, CHAT_STREAM)
    assert status == 500
    assert "99 blocks" in body["error"]["message"]
    status, body, _ = await site.post("/generate_stream", {"inputs": "Say"})
    assert (status, body["error_type"]) == (424, "generation")


async def test_headers_do_not_wait_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PEEK_SECONDS", 0.01)
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)
    site.engine.gate.clear()
    async with site.session.post(CHAT, json=CHAT_STREAM) as response:
        assert response.status == 200
        assert await response.content.readline() == b":\n"
        site.engine.gate.set()
        rest = await response.text()
    assert rest.endswith("data: [DONE]\n\n")


async def test_slow_reader_gets_everything(site: Site) -> None:
    site.engine.reply = lambda request: "y" * 300
    async with site.session.post(CHAT, json=CHAT_STREAM) as response:
        await asyncio.sleep(0.05)
        text = await response.text()
    assert text.count('"y"') == 300


async def test_reader_that_stopped_is_dropped(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.05)
    site = await serve(max_model_len=500_000)
    site.engine.per_step = 100
    site.engine.reply = lambda request: "y" * 400_000
    body = {"prompt": "a", "stream": True, "logprobs": 5}
    response = await site.session.post(COMPLETIONS, json=body)  # megabytes that nobody reads
    await until(lambda: len(site.engine.aborted) == 1, 30)
    response.close()


SINGLE: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {**CHAT_STREAM, "stream_options": {"include_usage": True}}),
    (CHAT, {**CHAT_STREAM, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {**CHAT_STREAM, "return_token_ids": True}),
    (COMPLETIONS, {"prompt": "a", "stream": True}),
    ("/generate_stream", {"inputs": "a", "parameters": {"details": True}}),
]


@pytest.mark.parametrize(("path", "body"), SINGLE)
async def test_single_answers_go_past_their_tasks(
    site: Site, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """The same events as by way of the task, but for what differs between any two requests."""
    site.engine.reply = lambda request: "naïve 🎈 " * 8
    body = {**body, "seed": 1} if path != "/generate_stream" else body

    async def events() -> list[Any]:
        fresh = {"id": "", "created": 0}
        said = await site.stream(path, body)
        return [{**event, **fresh} if isinstance(event, dict) else event for event in said]

    direct = await events()
    assert site.engine.shortcuts > 60
    monkeypatch.setattr(sse, "MOST_UNREAD", 0)  # as for a client that does not read
    taken = site.engine.shortcuts
    awaited = await events()
    assert site.engine.shortcuts == taken
    for event in (direct[-1], awaited[-1]):
        if isinstance(event, dict):
            event["details"]["seed"] = 0
    assert direct == awaited


async def test_several_answers_and_stop_texts_are_read_by_their_tasks(site: Site) -> None:
    events = await site.stream(CHAT, {**CHAT_STREAM, "n": 2})
    assert {event["choices"][0]["index"] for event in events[:-1]} == {0, 1}
    events = await site.stream(CHAT, {**CHAT_STREAM, "stop": ["wor"]})
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == "Hello, "
    assert site.engine.shortcuts == 0


async def test_many_streams_are_not_mixed_up(serve: Serve) -> None:
    site = await serve()
    site.engine.reply = lambda request: "/".join(map(str, request.prompt_ids))

    async def ask(number: int) -> None:
        body = {"prompt": [number, number + 1], "stream": True}
        events = await site.stream(COMPLETIONS, body)
        text = "".join(event["choices"][0]["text"] for event in events[:-1])
        assert text == f"{number}/{number + 1}"

    async with asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(ask(number))


async def test_keep_alive_connection_after_a_stream(site: Site) -> None:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(site.base_url, connector=connector) as session:
        for _ in range(3):
            async with session.post(CHAT, json=CHAT_STREAM) as response:
                assert (await response.text()).endswith("[DONE]\n\n")
