"""Forced tool calls through the real engine: whatever a random model would say, it is a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.http.live import LiveServer

MESSAGES = [{"role": "user", "content": "Paint it."}]
TEMPLATE = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ messages[-1].content }}"
COLOURS = ["red", "green", "blue"]


def tool(name: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": COLOURS}, "coats": {"enum": [1, 2]}},
        "required": ["colour", "coats"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


OPTIONS: dict[str, Any] = {
    "model": "tgi",
    "messages": MESSAGES,
    "tools": [tool("paint"), tool("repaint")],
    "temperature": 0,
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def client(tiny_checkpoint: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    flags = ("--dtype", "float32", "--chat-template", TEMPLATE)
    with (
        LiveServer(tiny_checkpoint("llama"), *flags) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


def check(call: Any) -> None:
    arguments = json.loads(call.function.arguments)
    assert arguments["colour"] in COLOURS
    assert arguments["coats"] in (1, 2)


def test_named_function(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "repaint"}}
    reply = client.chat.completions.create(**OPTIONS, tool_choice=choice).choices[0]
    (call,) = reply.message.tool_calls
    assert call.function.name == "repaint"
    check(call)
    assert reply.finish_reason == "tool_calls"
    with client.chat.completions.stream(**OPTIONS, tool_choice=choice) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.name == "repaint"
    assert streamed.function.arguments == call.function.arguments


def test_required_call(client: openai.OpenAI) -> None:
    options = {**OPTIONS, "tool_choice": "required", "parallel_tool_calls": False}
    reply = client.chat.completions.create(**options).choices[0]
    (call,) = reply.message.tool_calls
    assert call.function.name in ("paint", "repaint")
    check(call)
    assert reply.message.content is None


def test_free_choice_of_a_model_without_skill_is_text(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**{**OPTIONS, "max_tokens": 8}).choices[0]
    assert reply.message.tool_calls is None
    assert reply.message.content
