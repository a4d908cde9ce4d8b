"""Structured output through real clients, against a live server with a tiny random model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from huggingface_hub import InferenceClient
from pydantic import BaseModel, ConfigDict, Field

from tests.http.live import LiveServer

MESSAGES: Any = [{"role": "user", "content": "Paint it."}]


class Colour(Enum):
    RED = "red"
    GREEN = "grün"


class Coat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Colour
    layers: int = Field(ge=1, le=9)


class Job(BaseModel):
    model_config = ConfigDict(extra="forbid")
    coats: list[Coat] = Field(min_length=1, max_length=2)
    priority: Literal["low", "high"]
    code: str = Field(pattern="^[A-Z]{3}$")
    done: bool | None


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Callable[..., Path]) -> Iterator[LiveServer]:
    with LiveServer(tiny_checkpoint("llama"), "--dtype", "float32") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_parse_gives_an_object_of_the_model(client: openai.OpenAI) -> None:
    for options in ({"temperature": 0}, {"temperature": 1, "seed": 5, "n": 2}):
        reply = client.chat.completions.parse(
            model="tgi", messages=MESSAGES, response_format=Job, max_tokens=460, **options
        )
        assert len(reply.choices) == options.get("n", 1)
        for choice in reply.choices:
            assert choice.finish_reason == "stop", choice.message.content
            assert isinstance(choice.message.parsed, Job)


def test_streams_are_the_same_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tgi",
        "messages": MESSAGES,
        "max_tokens": 460,
        "temperature": 0,
    }
    whole = client.chat.completions.parse(response_format=Job, **options)
    with client.chat.completions.stream(response_format=Job, **options) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert events.count("content.delta") > 5
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_vllm_fields_and_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tgi",
        prompt=["a", "b"],
        n=2,
        max_tokens=30,
        logprobs=1,
        extra_body={"guided_regex": "[0-9]{3}-(é|🙂)"},
    )
    assert len(reply.choices) == 4
    assert all(re.fullmatch("[0-9]{3}-(é|🙂)", choice.text) for choice in reply.choices)
    reply = client.completions.create(
        model="tgi",
        prompt="a",
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}, "min_tokens": 9},
    )
    assert reply.choices[0].text in ("yes", "no")


def test_a_bad_schema_is_a_400_beside_running_answers(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tgi", messages=MESSAGES, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [next(stream)]
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    with pytest.raises(openai.BadRequestError, match="grammar is not valid: invalid type: strin"):
        client.chat.completions.create(
            model="tgi", messages=MESSAGES, response_format=form, stream=True
        )
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_native_grammar_by_its_own_client(server: LiveServer) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    hub = InferenceClient(server.url)
    text = hub.text_generation(
        "Say:",
        max_new_tokens=200,
        return_full_text=False,
        grammar={"type": "json", "value": schema},
    )
    answer = json.loads(text)
    assert answer.keys() == {"a", "b"}
    details = hub.text_generation(
        "Say:",
        max_new_tokens=50,
        details=True,
        return_full_text=False,
        grammar={"type": "regex", "value": "(red|blue) [0-9]{2}"},
    )
    assert re.fullmatch("(red|blue) [0-9]{2}", details.generated_text)
    assert details.details.finish_reason == "eos_token"
