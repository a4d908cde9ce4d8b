"""Replies and chunks against the models of OpenAI's own client, strictly; requests in its forms."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.model import Model

from tests.http.conftest import Site

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "tgi", "messages": [{"role": "user", "content": "Hi"}]}
SAY: dict[str, Any] = {"model": "tgi", "prompt": "Say"}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2, "n": 2}])
async def test_chats(site: Site, extra: dict[str, Any]) -> None:
    _, body, _ = await site.post(CHAT, {**HELLO, **extra})
    ChatCompletion.model_validate(body, strict=True)
    events = await site.stream(CHAT, {**HELLO, **extra, **USAGE, "stream": True})
    for event in events[:-1]:
        ChatCompletionChunk.model_validate(event, strict=True)


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2, "n": 2}])
async def test_completions(site: Site, extra: dict[str, Any]) -> None:
    _, body, _ = await site.post(COMPLETIONS, {**SAY, **extra})
    Completion.model_validate(body, strict=True)
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_models(site: Site) -> None:
    async with site.session.get("/v1/models/tgi") as response:
        Model.model_validate(await response.json(), strict=True)


#: Each form that OpenAI's reference has for a field, and the sampling parameters it must become.
FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (CHAT, {"stop": None}, {"stop": ()}),
    (CHAT, {"stop": "a"}, {"stop": ("a",)}),
    (CHAT, {"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    (CHAT, {"logit_bias": {"7": -100, "8": 5}}, {"logit_bias": {7: -100.0, 8: 5.0}}),
    (CHAT, {"logit_bias": None, "n": None, "seed": None}, {"logit_bias": {}}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (CHAT, {"logprobs": False, "top_logprobs": None}, {"logprobs": None}),
    (CHAT, {"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
    (CHAT, {"max_completion_tokens": 3, "max_tokens": None}, {"max_tokens": 3}),
    (CHAT, {"response_format": {"type": "text"}, "temperature": 0}, {"temperature": 0.0}),
    (CHAT, {"tools": None, "tool_choice": None, "parallel_tool_calls": None}, {}),
    (COMPLETIONS, {"stop": "a", "logprobs": None}, {"stop": ("a",), "logprobs": None}),
    (COMPLETIONS, {"logprobs": 0}, {"logprobs": 0}),
    (COMPLETIONS, {"logprobs": 5, "echo": False}, {"logprobs": 5, "prompt_logprobs": None}),
    (COMPLETIONS, {"logprobs": 1, "echo": True}, {"logprobs": 1, "prompt_logprobs": 1}),
    (COMPLETIONS, {"logit_bias": {"7": 1}, "suffix": None}, {"logit_bias": {7: 1.0}}),
    (COMPLETIONS, {"best_of": None, "n": 1, "max_tokens": 16}, {"max_tokens": 16}),
]


@pytest.mark.parametrize(("path", "given", "becomes"), FORMS)
async def test_forms_of_fields(
    site: Site, path: str, given: dict[str, Any], becomes: dict[str, Any]
) -> None:
    status, body, headers = await site.post(path, {**(HELLO if path == CHAT else SAY), **given})
    assert status == 200, body
    assert "x-tgi-ignored-fields" not in headers
    sampling = site.engine.requests[-1].sampling
    for name, value in becomes.items():
        assert getattr(sampling, name) == value


@pytest.mark.parametrize(("n", "best_of", "made"), [(1, 2, 2), (2, 2, 2), (2, None, 2)])
async def test_best_of(site: Site, n: int, best_of: int | None, made: int) -> None:
    _, body, _ = await site.post(COMPLETIONS, {**SAY, "n": n, "best_of": best_of})
    assert len(body["choices"]) == n
    assert len(site.engine.requests) == made
