"""OpenAI's, Anthropic's and Hugging Face's clients against the demo model, as a user starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import huggingface_hub
import openai
import pytest
from pydantic import BaseModel

from tests.http.live import LiveServer
from tests.unit.text.templates import CHATML

pytestmark = pytest.mark.real_model

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"$ref": "#/$defs/Unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer("demo", "--chat-template", CHATML, "--http-workers", "2") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_a_call_and_its_result(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tgi", "tools": [WEATHER], "temperature": 0}
    [choice] = client.chat.completions.create(
        **options,
        messages=QUESTION,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=60,
        logprobs=True,
    ).choices
    [call] = choice.message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    assert choice.finish_reason == "tool_calls"
    assert (set(arguments), arguments["unit"] in ("C", "F")) == ({"city", "unit"}, True)
    assert choice.logprobs is not None
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    said = choice.message.model_dump(exclude_none=True)
    chunks = list(
        client.chat.completions.create(
            **options, messages=[*QUESTION, said, result], max_tokens=5, stream=True
        )
    )
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_parse(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="tgi",
        messages=[{"role": "user", "content": "Ann is 3 years old."}],
        response_format=Person,
        temperature=0,
        max_tokens=80,
    )
    assert isinstance(reply.choices[0].message.parsed, Person)


def test_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tgi", input="I am Bo.", max_output_tokens=5)
    with openai.OpenAI(base_url=client.base_url, api_key="-", max_retries=0) as other:
        assert other.responses.retrieve(first.id) == first
        second = other.responses.create(
            model="tgi", input="Who?", previous_response_id=first.id, max_output_tokens=5
        )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_anthropic(server: LiveServer) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        tool = {"name": "get_weather", "input_schema": SCHEMA}
        with client.messages.stream(
            model="tgi",
            max_tokens=60,
            messages=QUESTION,
            tools=[tool],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            extra_body={"temperature": 0},
        ) as stream:
            message = stream.get_final_message()
        [block] = message.content
        assert (block.type, message.stop_reason) == ("tool_use", "tool_use")
        assert set(block.input) == {"city", "unit"}
        assert client.messages.count_tokens(model="tgi", messages=QUESTION).input_tokens > 5


def test_hugging_face(server: LiveServer) -> None:
    client = huggingface_hub.InferenceClient(server.url)
    whole = client.text_generation("One two", max_new_tokens=5, details=True, do_sample=False)
    steps = list(client.text_generation("One two", max_new_tokens=5, details=True, stream=True))
    assert whole.details.generated_tokens == len(steps) == 5
    assert steps[-1].details.finish_reason == "length"
    grammar = {"type": "regex", "value": "[0-9]{3}"}
    digits = client.text_generation("A number:", grammar=grammar, return_full_text=False)
    assert (len(digits), digits.isdigit()) == (3, True)
    answer = client.chat_completion(QUESTION, max_tokens=5)
    assert answer.choices[0].message.content
