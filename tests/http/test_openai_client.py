"""The `openai` client against a live server with a tiny model: a drop-in, streaming and not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.http.conftest import Serve
from tests.http.live import LiveServer
from tests.http.test_streams import until

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Callable[..., Path]) -> Iterator[LiveServer]:
    with LiveServer(
        tiny_checkpoint("llama"), "--dtype", "float32", "--api-key", "sesame"
    ) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    options = {"model": "tgi", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    reply = client.chat.completions.create(**options)
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("length", "stop")
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 12
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-1].usage == reply.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_seeded_sampling_repeats(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        reply = client.chat.completions.create(
            model="tgi", messages=MESSAGES, max_tokens=16, seed=seed, temperature=1.5
        )
        return reply.choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_options(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tgi",
        messages=MESSAGES,
        max_completion_tokens=4,
        n=3,
        logprobs=True,
        top_logprobs=2,
        logit_bias={"65": -100},
        presence_penalty=0,
        frequency_penalty=0.5,
        top_p=1,
        stop="zzzz",
        user="ann",
        extra_body={"top_k": 20, "min_p": 0.01, "ignore_eos": True},
    )
    assert len(reply.choices) == 3
    for choice in reply.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 4
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)


def test_completions(client: openai.OpenAI) -> None:
    options = {"model": "tgi", "prompt": ["one", "two"], "max_tokens": 6, "temperature": 0}
    reply = client.completions.create(**options)
    assert [choice.index for choice in reply.choices] == [0, 1]
    texts = ["", ""]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in reply.choices]


def test_scoring(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tgi", prompt="The server", max_tokens=0, echo=True, logprobs=1
    )
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text == "The server"
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == "The server"
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id


def test_errors(client: openai.OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError, match="`temperature`"):
        client.chat.completions.create(model="tgi", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="`max_tokens`") as refusal:
        client.chat.completions.create(
            model="tgi", messages=MESSAGES, max_tokens=10**6, stream=True
        )
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model="tgi", messages=MESSAGES)


async def test_async_client(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="sesame", max_retries=0
    ) as client:
        options = {"model": "tgi", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        reply = await client.chat.completions.create(**options)
        text = ""
        async for chunk in await client.chat.completions.create(**options, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == reply.choices[0].message.content


async def test_failures_reach_the_client_as_its_exceptions(serve: Serve) -> None:
    site = await serve(max_concurrent_requests=1)
    options = {"model": "tgi", "messages": MESSAGES}
    async with openai.AsyncOpenAI(
        base_url=f"{site.base_url}/v1", api_key="-", max_retries=0
    ) as client:
        site.engine.fail_after = 2
        stream = await client.chat.completions.create(**options, stream=True)
        with pytest.raises(openai.APIError, match="the engine died"):
            async for _ in stream:
                pass
        site.engine.fail_after = None
        site.engine.gate.clear()
        held = asyncio.create_task(client.chat.completions.create(**options))
        await until(lambda: site.engine.running == 1)
        with pytest.raises(openai.RateLimitError) as refusal:
            await client.chat.completions.create(**options)
        assert int(refusal.value.response.headers["Retry-After"]) >= 1
        site.engine.gate.set()
        assert (await held).choices[0].message.content == "Hello, world"
        site.engine.state = "loading"
        with pytest.raises(openai.InternalServerError, match="loading") as refusal:
            await client.chat.completions.create(**options)
        assert refusal.value.status_code == 503
