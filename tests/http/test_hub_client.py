"""`huggingface_hub.InferenceClient` against a live server: chat and TGI's native routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import InferenceClient

from tests.http.live import LiveServer

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Callable[..., Path]) -> Iterator[LiveServer]:
    with LiveServer(tiny_checkpoint("llama"), "--dtype", "float32") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[InferenceClient]:
    client = InferenceClient(server.url)
    yield client
    client.close()


def test_text_generation(client: InferenceClient) -> None:
    text = client.text_generation("The server", max_new_tokens=8, return_full_text=False)
    assert text
    assert client.text_generation("The server", max_new_tokens=8) == "The server" + text
    streamed = "".join(client.text_generation("The server", max_new_tokens=8, stream=True))
    assert streamed.removesuffix("<|im_end|>") == text


def test_text_generation_details(client: InferenceClient) -> None:
    reply = client.text_generation(
        "The server",
        max_new_tokens=5,
        details=True,
        decoder_input_details=True,
        best_of=2,
        do_sample=True,
        top_n_tokens=2,
    )
    assert reply.details is not None
    assert reply.details.generated_tokens == len(reply.details.tokens)
    assert reply.details.prefill[0].logprob is None
    assert "".join(token.text for token in reply.details.prefill) == "The server"
    assert len(reply.details.best_of_sequences or []) == 1
    *_, last = client.text_generation("The server", max_new_tokens=5, details=True, stream=True)
    assert last.details is not None
    assert last.details.input_length == len(reply.details.prefill)
    assert last.generated_text


def test_chat(client: InferenceClient) -> None:
    options = {"max_tokens": 8, "temperature": 0}
    reply = client.chat_completion(MESSAGES, **options)
    text = ""
    for chunk in client.chat_completion(MESSAGES, stream=True, **options):
        text += chunk.choices[0].delta.content or ""
    assert text == reply.choices[0].message.content


def test_refusal(client: InferenceClient) -> None:
    with pytest.raises(Exception, match=r"temperature.* must be strictly positive"):
        client.text_generation("The server", max_new_tokens=5, temperature=-1.0)
