"""`/v1/chat/completions`: shapes, over a scripted engine."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.http.conftest import Serve, Site
from tgi_cli.sampling import Watermark, child_seed

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_reply(site: Site) -> None:
    status, body, headers = await site.post(PATH, {**HELLO, "model": "tgi"})
    assert status == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "org/bytes"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["completion_tokens"] == len("Hello, world") + 1
    assert body["usage"]["prompt_tokens"] == len("[user]Hi\n[assistant]")
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert headers["x-queue-time"] == "250"
    assert headers["x-prompt-tokens"] == str(body["usage"]["prompt_tokens"])
    assert headers["x-compute-characters"] == str(len("[user]Hi\n[assistant]"))


async def test_length_and_remaining_context(site: Site) -> None:
    _, body, _ = await site.post(PATH, {**HELLO, "max_completion_tokens": 4, "max_tokens": 9})
    assert body["choices"][0]["message"]["content"] == "Hell"
    assert body["choices"][0]["finish_reason"] == "length"
    await site.post(PATH, HELLO)
    request = site.engine.requests[-1]
    assert request.sampling.max_tokens == 512 - len(request.prompt_ids)


async def test_stream_order(site: Site) -> None:
    events = await site.stream(PATH, {**HELLO, "stream": True})
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert "usage" not in chunks[0]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (
        len(chunks) - 1
    ) + ["stop"]


async def test_stream_usage(site: Site) -> None:
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    events = await site.stream(PATH, body)
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 13
    assert all(chunk["usage"] is None for chunk in events[:-2])


async def test_one_write_per_step(site: Site) -> None:
    site.engine.per_step = 5
    body = {**HELLO, "stream": True}
    async with site.session.post(PATH, json=body) as response:
        chunks = [chunk async for chunk, _ in response.content.iter_chunks() if chunk]
    steps = [chunk for chunk in chunks if b"content" in chunk or b"[DONE]" in chunk]
    assert len(steps) <= 4  # 13 tokens in three steps, then the end
    assert chunks[0].count(b"data: ") == 2  # role and first text leave together


async def test_stop_string_is_cut_off(site: Site) -> None:
    for stop in ("world", ["xyz", "lo, w"]):
        _, body, _ = await site.post(PATH, {**HELLO, "stop": stop})
        needle = stop if isinstance(stop, str) else stop[1]
        content = body["choices"][0]["message"]["content"]
        assert content == "Hello, world".partition(needle)[0]
        assert body["choices"][0]["finish_reason"] == "stop"
    assert len(site.engine.aborted) == 2  # the engine is told not to go on

    events = await site.stream(PATH, {**HELLO, "stop": "world", "stream": True})
    contents = [e["choices"][0]["delta"].get("content", "") for e in events[:-1]]
    assert "".join(contents) == "Hello, "


async def test_n_children_have_their_own_seeds(site: Site) -> None:
    site.engine.reply = lambda request: str(request.sampling.seed)
    _, body, _ = await site.post(PATH, {**HELLO, "n": 3, "seed": 7})
    contents = [choice["message"]["content"] for choice in body["choices"]]
    assert contents == [str(child_seed(7, i)) for i in range(3)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]

    events = await site.stream(PATH, {**HELLO, "n": 3, "seed": 7, "stream": True})
    streamed = ["", "", ""]
    for event in events[:-1]:
        choice = event["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == contents


async def test_unseeded_requests_differ_and_negative_seeds_are_taken(site: Site) -> None:
    for _ in range(2):
        await site.post(PATH, HELLO)
    first, second = (request.sampling.seed for request in site.engine.requests)
    assert first != second
    await site.post(PATH, {**HELLO, "seed": -1})
    assert site.engine.requests[-1].sampling.seed == 2**64 - 1


async def test_logprobs(site: Site) -> None:
    body = {**HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    _, reply, _ = await site.post(PATH, body)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["H", "e"]
    assert content[0]["bytes"] == [72]
    assert content[0]["top_logprobs"][0]["token"] == "H"
    assert len(content[0]["top_logprobs"]) == 2

    events = await site.stream(PATH, {**body, "stream": True})
    streamed = [
        entry
        for event in events[:-1]
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_sampling_fields_arrive(site: Site) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 1,
        "top_k": -1,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0,
        "frequency_penalty": -1.5,
        "logit_bias": {"65": 100, "66": -100},
        "seed": 3,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [10],
        "user": "ann",
        "priority": 4,
    }
    status, _, headers = await site.post(PATH, {**HELLO, **fields})
    assert status == 200
    assert "x-tgi-ignored-fields" not in headers
    request = site.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 1.0, 0)
    assert (sampling.min_p, sampling.typical_p, sampling.repetition_penalty) == (0.1, 0.9, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.0, -1.5)
    assert sampling.logit_bias == {65: 100.0, 66: -100.0}
    assert (sampling.seed, sampling.min_tokens, sampling.ignore_eos) == (3, 2, True)
    assert sampling.stop_token_ids == (10,)
    assert (request.user, request.priority) == ("ann", 4)
    assert request.eos_token_ids == (257,)


async def test_temperature_zero_is_greedy(site: Site) -> None:
    await site.post(PATH, {**HELLO, "temperature": 0})
    assert site.engine.requests[-1].sampling.greedy


async def test_ignored_fields_are_named(site: Site) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi", "mood": "good"}],
        "store": True,
        "stream_options": {"chunked": 1},
        "bad\r\nname": 1,
        "metadata": None,
    }
    status, _, headers = await site.post(PATH, body)
    assert status == 200
    names = headers["x-tgi-ignored-fields"].split(",")
    assert set(names) == {"store", "bad??name", "messages[].mood", "stream_options.chunked"}


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({}, "[user]Hi\n[assistant]"),
        ({"add_generation_prompt": False}, "[user]Hi"),
        ({"chat_template_kwargs": {"shout": True}}, "[user]Hi\n![assistant]"),
    ],
)
async def test_template_options(site: Site, extra: dict[str, object], text: str) -> None:
    _, body, _ = await site.post("/chat_tokenize", {**HELLO, **extra})
    assert body["templated_text"] == text
    assert "".join(token["text"] for token in body["tokenize_response"]) == text


async def test_final_assistant_message_is_continued(site: Site) -> None:
    body = {"messages": [*HELLO["messages"], {"role": "assistant", "content": "He said"}]}
    _, answer, _ = await site.post("/chat_tokenize", body)
    assert answer["templated_text"] == "[user]Hi\n[assistant]He said"
    body["add_generation_prompt"] = True
    _, answer, _ = await site.post("/chat_tokenize", body)
    assert answer["templated_text"] == "[user]Hi\n[assistant]He said\n[assistant]"


async def test_text_parts_are_joined(site: Site) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    _, answer, _ = await site.post("/chat_tokenize", body)
    assert answer["templated_text"] == "[user]Hi there\n[assistant]"


async def test_model_names(serve: Serve) -> None:
    site = await serve(served_model_name="pet")
    for name in ("pet", "org/bytes", "tgi", None):
        status, body, _ = await site.post(PATH, {**HELLO, "model": name})
        assert (status, body["model"]) == (200, "pet")
    status, body, _ = await site.post(PATH, {**HELLO, "model": "other"})
    assert status == 404
    assert body["error"]["code"] == "model_not_found"
    async with site.session.get("/v1/models") as response:
        listed = await response.json()
    assert [entry["id"] for entry in listed["data"]] == ["pet"]
    assert listed["data"][0]["max_model_len"] == 512
    async with site.session.get("/v1/models/org/bytes") as response:
        assert (await response.json())["id"] == "pet"
    async with site.session.get("/v1/models/other") as response:
        assert response.status == 404
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_utf8_is_never_split(site: Site) -> None:
    site.engine.reply = lambda request: "naïve 🎈 日本"
    events = await site.stream(PATH, {**HELLO, "stream": True})
    contents = [e["choices"][0]["delta"].get("content", "") for e in events[:-1]]
    assert "".join(contents) == "naïve 🎈 日本"
    assert not any("�" in content for content in contents)
    assert all(a != b or a == "" for a, b in pairwise(contents))


async def test_watermarks_are_those_of_the_server(serve: Serve) -> None:
    site = await serve(watermark_gamma=0.25)
    await site.post(PATH, {**HELLO, "watermark": True})
    await site.post("/generate", {"inputs": "a", "parameters": {"watermark": True}})
    await site.post(PATH, {**HELLO, "watermark": False})
    marks = [request.sampling.watermark for request in site.engine.requests]
    assert marks == [Watermark(gamma=0.25), Watermark(gamma=0.25), None]
