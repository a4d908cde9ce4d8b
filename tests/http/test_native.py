"""TGI's own routes: shapes, over a scripted engine."""

from __future__ import annotations

import pytest

from tests.http.conftest import Serve, Site

GREEDY = {"inputs": "Say", "parameters": {"do_sample": False}}


async def test_generate(site: Site) -> None:
    status, body, headers = await site.post("/generate", {"inputs": "Say"})
    assert (status, body) == (200, {"generated_text": "Hello, world"})
    assert headers["x-compute-type"] == "cpu+optimized"
    assert headers["x-generated-tokens"] == "13"
    sampling = site.engine.requests[-1].sampling
    assert not sampling.greedy  # without parameters TGI samples
    assert sampling.logprobs is None
    await site.post("/generate", {"inputs": "Say", "parameters": {}})
    assert site.engine.requests[-1].sampling.greedy


@pytest.mark.parametrize(
    ("parameters", "greedy"),
    [
        ({"temperature": 1.0}, True),
        ({"temperature": 0.7}, False),
        ({"top_k": 5}, False),
        ({"top_p": 1}, True),
        ({"typical_p": 0.5}, False),
        ({"do_sample": True}, False),
    ],
)
async def test_when_it_samples(site: Site, parameters: dict[str, object], greedy: bool) -> None:
    await site.post("/generate", {"inputs": "Say", "parameters": parameters})
    assert site.engine.requests[-1].sampling.greedy is greedy


async def test_details(site: Site) -> None:
    parameters = {
        "details": True,
        "decoder_input_details": True,
        "top_n_tokens": 2,
        "max_new_tokens": 2,
        "seed": 5,
        "do_sample": True,
    }
    _, body, _ = await site.post("/generate", {"inputs": "Say", "parameters": parameters})
    details = body["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 2)
    assert details["seed"] == 5
    assert [token["text"] for token in details["prefill"]] == ["S", "a", "y"]
    assert details["prefill"][0]["logprob"] is None
    assert details["tokens"][0] == {
        "id": details["tokens"][0]["id"],
        "text": "H",
        "logprob": details["tokens"][0]["logprob"],
        "special": False,
    }
    assert [len(top) for top in details["top_tokens"]] == [2, 2]
    assert "best_of_sequences" not in details


async def test_eos_token_and_greedy_seed(site: Site) -> None:
    parameters = {"details": True}
    _, body, _ = await site.post("/generate", {"inputs": "Say", "parameters": parameters})
    details = body["details"]
    assert (details["finish_reason"], details["seed"]) == ("eos_token", None)
    assert details["tokens"][-1]["special"] is True
    assert details["prefill"] == []
    assert body["generated_text"] == "Hello, world"


async def test_stop_text_is_kept(site: Site) -> None:
    parameters = {"stop": ["lo,"], "details": True}
    _, body, _ = await site.post("/generate", {"inputs": "Say", "parameters": parameters})
    assert body["generated_text"] == "Hello,"
    assert body["details"]["finish_reason"] == "stop_sequence"


async def test_best_of(site: Site) -> None:
    replies = iter(["zz", "AA"])
    site.engine.reply = lambda request: next(replies)
    parameters = {"best_of": 2, "do_sample": True, "details": True}
    _, body, _ = await site.post("/generate", {"inputs": "Say", "parameters": parameters})
    assert body["generated_text"] == "AA"
    others = body["details"]["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["zz"]
    assert others[0]["finish_reason"] == "eos_token"


async def test_truncate_keeps_the_end(site: Site) -> None:
    await site.post("/generate", {"inputs": "abcdef", "parameters": {"truncate": 2}})
    _, tokens, _ = await site.post("/tokenize", {"inputs": "ef"})
    assert site.engine.requests[-1].prompt_ids == [token["id"] for token in tokens]


async def test_full_text(site: Site) -> None:
    parameters = {"return_full_text": True}
    _, body, _ = await site.post("/generate", {"inputs": "Say", "parameters": parameters})
    assert body["generated_text"] == "SayHello, world"


async def test_compat_root(site: Site) -> None:
    _, body, _ = await site.post("/", {"inputs": "Say"})
    assert body == [{"generated_text": "SayHello, world"}]
    parameters = {"return_full_text": False}
    events = await site.stream("/", {"inputs": "Say", "parameters": parameters, "stream": True})
    assert events[-1]["generated_text"] == "Hello, world"


async def test_stream(site: Site) -> None:
    parameters = {"details": True, "top_n_tokens": 1, "max_new_tokens": 3}
    events = await site.stream("/generate_stream", {"inputs": "Say", "parameters": parameters})
    assert [event["index"] for event in events] == [1, 2, 3]
    assert "".join(event["token"]["text"] for event in events) == "Hel"
    assert all(len(event["top_tokens"]) == 1 for event in events)
    assert [event["generated_text"] for event in events] == [None, None, "Hel"]
    assert events[0]["details"] is None
    assert events[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 3,
        "seed": None,
        "input_length": 3,
    }


async def test_tokenize_offsets(site: Site) -> None:
    _, tokens, _ = await site.post("/tokenize", {"inputs": "aé"})
    assert tokens[0] == {"id": tokens[0]["id"], "text": "a", "start": 0, "stop": 1}
    assert {(token["start"], token["stop"]) for token in tokens[1:]} == {(1, 2)}


async def test_info(serve: Serve) -> None:
    site = await serve(max_total_tokens=100)
    async with site.session.get("/info") as response:
        body = await response.json()
    assert (body["model_id"], body["router"]) == ("org/bytes", "text-generation-router")
    assert (body["max_input_tokens"], body["max_total_tokens"]) == (99, 100)
    assert body["deterministic"] is False
