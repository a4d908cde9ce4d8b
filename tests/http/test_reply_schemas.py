"""Real replies are what the OpenAPI document says, field by field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.http.conftest import Site
from tests.http.test_reasoning import QWEN, use
from tests.http.test_tools import SAID, WEATHER
from tgi_cli.serve import reply_schemas as shapes

MESSAGES = [{"role": "user", "content": "Hi"}]
EVERYTHING = {"details": True, "decoder_input_details": True, "top_n_tokens": 2}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

REPLIES: list[tuple[str, dict[str, Any], Any]] = [
    ("/generate", {"inputs": "a"}, shapes.GenerateResponse),
    ("/generate", {"inputs": "a", "parameters": EVERYTHING}, shapes.GenerateResponse),
    (
        "/generate",
        {"inputs": "a", "parameters": {**EVERYTHING, "best_of": 2, "do_sample": True}},
        shapes.GenerateResponse,
    ),
    ("/", {"inputs": "a"}, list[shapes.GenerateResponse]),
    ("/invocations", {"inputs": "a"}, list[shapes.GenerateResponse]),
    ("/vertex", {"instances": [{"inputs": "a"}]}, shapes.VertexResponse),
    ("/tokenize", {"inputs": "ab"}, list[shapes.SimpleToken]),
    ("/chat_tokenize", {"messages": MESSAGES}, shapes.ChatTokenizeResponse),
    ("/detokenize", {"tokens": [65]}, shapes.DetokenizeResponse),
    (CHAT, {"messages": MESSAGES}, shapes.ChatCompletion),
    (
        CHAT,
        {
            "messages": MESSAGES,
            "logprobs": True,
            "top_logprobs": 2,
            "return_token_ids": True,
            "prompt_logprobs": 1,
        },
        shapes.ChatCompletion,
    ),
    (COMPLETIONS, {"prompt": "a"}, shapes.Completion),
    (
        COMPLETIONS,
        {
            "prompt": "ab",
            "echo": True,
            "logprobs": 2,
            "return_token_ids": True,
            "prompt_logprobs": 1,
        },
        shapes.Completion,
    ),
]


@pytest.mark.parametrize(("path", "body", "kind"), REPLIES)
async def test_replies(site: Site, path: str, body: dict[str, Any], kind: Any) -> None:
    status, reply, _ = await site.post(path, body)
    assert status == 200
    msgspec.convert(reply, kind)


USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
STREAMS: list[tuple[str, dict[str, Any], Any]] = [
    ("/generate_stream", {"inputs": "a"}, shapes.StreamResponse),
    (
        "/generate_stream",
        {"inputs": "a", "parameters": {"details": True, "top_n_tokens": 1}},
        shapes.StreamResponse,
    ),
    (CHAT, {"messages": MESSAGES}, shapes.ChatCompletionChunk),
    (
        CHAT,
        {"messages": MESSAGES, "logprobs": True, "return_token_ids": True, **USAGE},
        shapes.ChatCompletionChunk,
    ),
    (COMPLETIONS, {"prompt": "a"}, shapes.Completion),
    (
        COMPLETIONS,
        {"prompt": "a", "logprobs": 1, "return_token_ids": True, **USAGE},
        shapes.Completion,
    ),
]


@pytest.mark.parametrize(("path", "body", "kind"), STREAMS)
async def test_events(site: Site, path: str, body: dict[str, Any], kind: Any) -> None:
    events = await site.stream(path, {**body, "stream": True})
    assert len(events) > 5
    for event in events:
        if event != "[DONE]":
            msgspec.convert(event, kind)


async def test_reasoning_and_tool_calls(site: Site) -> None:
    (said,) = (text for text in SAID.values() if "</tool_call>" in text)
    use(site, QWEN, f"<think>Hm</think>{said}")
    body = {"messages": MESSAGES, "tools": [WEATHER]}
    _, reply, _ = await site.post(CHAT, body)
    message = msgspec.convert(reply, shapes.ChatCompletion).choices[0].message
    assert message.tool_calls
    assert message.reasoning_content
    for event in (await site.stream(CHAT, {**body, "stream": True}))[:-1]:
        msgspec.convert(event, shapes.ChatCompletionChunk)


async def test_models_and_facts(site: Site) -> None:
    for path, kind in (
        ("/v1/models", shapes.ModelsInfo),
        ("/v1/models/tgi", shapes.ModelInfo),
        ("/info", shapes.Info),
    ):
        async with site.session.get(path) as response:
            msgspec.convert(await response.json(), kind)
