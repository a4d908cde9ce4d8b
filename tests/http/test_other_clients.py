"""Clients and tools that people put before a server, each in a virtual environment of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.http.live import LiveServer
from tests.http.own_venv import python_with, run_script

pytestmark = [pytest.mark.contract, pytest.mark.slow]  # `pytest -m contract` runs them

_LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a model may write other fields for ever
    yes: bool

url = sys.argv[1] + "/v1"
model = ChatOpenAI(base_url=url, api_key="-", model="tgi", max_tokens=8, temperature=0)
reply = model.invoke("Say something")
assert reply.content, reply
assert reply.usage_metadata["output_tokens"] <= 8
assert "".join(chunk.content for chunk in model.stream("Say something")) == reply.content
assert len(model.batch(["a", "b", "c"])) == 3
held = ChatOpenAI(base_url=url, api_key="-", model="tgi", max_tokens=200, temperature=0)
answer = held.with_structured_output(Answer, method="json_schema").invoke("Well?")
assert isinstance(answer, Answer), answer
answer = held.with_structured_output(Answer, method="function_calling").invoke("Well?")
assert isinstance(answer, Answer), answer
newer = ChatOpenAI(
    base_url=url, api_key="-", model="tgi", max_tokens=8, temperature=0, use_responses_api=True
)
assert newer.invoke("Say something").text == reply.content
text = OpenAI(base_url=url, api_key="-", model="tgi", max_tokens=8, temperature=0).invoke("One")
assert isinstance(text, str) and text
print("done")
"""

_LITELLM = """
import sys
import litellm

url = sys.argv[1]
options = {"messages": [{"role": "user", "content": "Say something"}], "max_tokens": 8}
options |= {"api_key": "-", "temperature": 0}
reply = litellm.completion(model="openai/tgi", api_base=url + "/v1", **options)
text = reply.choices[0].message.content
assert text and reply.usage.completion_tokens <= 8, reply
chunks = litellm.completion(model="openai/tgi", api_base=url + "/v1", stream=True, **options)
assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
reply = litellm.completion(model="anthropic/tgi", api_base=url, **options)
assert reply.choices[0].message.content == text, reply
chunks = litellm.completion(model="anthropic/tgi", api_base=url, stream=True, **options)
assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
reply = litellm.text_completion(
    model="text-completion-openai/tgi",
    api_base=url + "/v1",
    prompt="One",
    max_tokens=4,
    api_key="-",
)
assert reply.choices[0].text
try:
    litellm.completion(model="openai/other", api_base=url + "/v1", **options)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model was answered")
print("done")
"""

TEMPLATE = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ messages[-1].content }}"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Callable[..., Path]) -> Iterator[LiveServer]:
    flags = ("--dtype", "float32", "--chat-template", TEMPLATE)
    with LiveServer(tiny_checkpoint("llama"), *flags) as server:
        yield server


def test_langchain(pytestconfig: pytest.Config, server: LiveServer) -> None:
    run_script(python_with(pytestconfig, "langchain-openai>=1.7"), _LANGCHAIN, server.url)


def test_litellm(pytestconfig: pytest.Config, server: LiveServer) -> None:
    run_script(python_with(pytestconfig, "litellm"), _LITELLM, server.url)


def test_schemathesis_finds_no_failure(
    pytestconfig: pytest.Config, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Requests made from our own OpenAPI document: no 5xx, no undescribed status, no hang.

    Bodies of replies are held to their shapes by `test_reply_schemas`; this tool reads the schema
    of an event stream in another way.
    """
    python = python_with(pytestconfig, "schemathesis>=4.32,<5")
    flags = ("--dtype", "float32", "--max-model-len", "128", "--max-concurrent-requests", "16")
    with LiveServer(tiny_checkpoint("llama"), *flags) as server:
        result = subprocess.run(
            [
                python.parent / "schemathesis",
                *("run", f"{server.url}/openapi.json", "--seed", "1", "--workers", "2"),
                *(
                    "--checks",
                    "not_a_server_error,status_code_conformance,content_type_conformance",
                ),
                *("--phases", "examples,coverage,fuzzing", "--max-examples", "20"),
                *("--max-time", "240", "--request-timeout", "30"),
                *("--suppress-health-check", "all", "--no-color"),
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert server.get("/health")[0] == 200
