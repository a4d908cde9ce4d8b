"""`/v1/completions`: shapes, over a scripted engine."""

from __future__ import annotations

from tests.http.conftest import Site
from tgi_cli.serve.keys import DOOR

PATH = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


async def test_reply(site: Site) -> None:
    status, body, _ = await site.post(PATH, {"prompt": "Say"})
    assert status == 200
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["total_tokens"] == 16


async def test_four_forms_of_prompt(site: Site) -> None:
    site.engine.reply = lambda request: f"<{len(request.prompt_ids)}>"
    for prompt, texts in (
        ("abc", ["<3>"]),
        (["abc", "a"], ["<3>", "<1>"]),
        ([65, 66], ["<2>"]),
        ([[65, 66], [67]], ["<2>", "<1>"]),
    ):
        _, body, _ = await site.post(PATH, {"prompt": prompt})
        assert [choice["text"] for choice in body["choices"]] == texts
    assert site.engine.requests[-1].prompt_ids == [67]


async def test_n_per_prompt(site: Site) -> None:
    _, body, _ = await site.post(PATH, {"prompt": ["a", "b"], "n": 2})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [len(r.prompt_ids) for r in site.engine.requests] == [1, 1, 1, 1]
    assert len({r.sampling.seed for r in site.engine.requests[:2]}) == 2


async def test_best_of_takes_the_likeliest(site: Site) -> None:
    replies = iter(["zz", "AA"])  # a token's scripted log probability is -id / 100
    site.engine.reply = lambda request: next(replies)
    _, body, _ = await site.post(PATH, {"prompt": "a", "best_of": 2})
    assert [choice["text"] for choice in body["choices"]] == ["AA"]
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 6


async def test_echo_and_logprobs(site: Site) -> None:
    _, body, _ = await site.post(
        PATH, {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 2}
    )
    choice = body["choices"][0]
    assert choice["text"] == "abHe"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "H", "e"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert list(logprobs["top_logprobs"][1]) == ["b"]


async def test_scoring_a_prompt(site: Site) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 0}
    _, reply, _ = await site.post(PATH, body)
    assert reply["choices"][0]["text"] == "ab"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert reply["usage"]["completion_tokens"] == 0


async def test_stream(site: Site) -> None:
    site.engine.reply = lambda request: f"<{len(request.prompt_ids)}>"
    body = {"prompt": ["abc", "a"], "stream": True, "echo": True}
    events = await site.stream(PATH, {**body, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["prompt_tokens"] == 4
    texts, reasons = ["", ""], [None, None]
    for event in events[:-2]:
        choice = event["choices"][0]
        assert reasons[choice["index"]] is None
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["abc<3>", "a<1>"]
    assert reasons == ["stop", "stop"]


async def test_streamed_logprobs_equal_the_whole(site: Site) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 2}
    _, reply, _ = await site.post(PATH, body)
    whole = reply["choices"][0]["logprobs"]
    events = await site.stream(PATH, {**body, "stream": True})
    for key, values in whole.items():
        pieces = [event["choices"][0]["logprobs"] for event in events[:-1]]
        assert [value for piece in pieces for value in piece[key]] == values


async def test_token_ids(site: Site) -> None:
    body = {"prompt": ["ab", "c"], "return_token_ids": True, "max_tokens": 3}
    _, reply, _ = await site.post(PATH, body)
    tokenizer = site.app[DOOR].texts.tokenizer
    for choice, prompt in zip(reply["choices"], body["prompt"], strict=True):
        assert tokenizer.decode(choice["prompt_token_ids"], False) == prompt
        assert tokenizer.decode(choice["token_ids"], False) == "Hel"
    events = await site.stream(PATH, {**body, "stream": True})
    for index, whole in enumerate(reply["choices"]):
        chunks = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert [token for chunk in chunks for token in chunk["token_ids"]] == whole["token_ids"]
        assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    _, reply, _ = await site.post(PATH, {"prompt": "ab"})
    assert "token_ids" not in reply["choices"][0]


async def test_prompt_logprobs(site: Site) -> None:
    tokenizer = site.app[DOOR].texts.tokenizer
    (token,) = tokenizer.encode("b", False)
    body = {"prompt": "ab", "prompt_logprobs": 2, "max_tokens": 1}
    _, reply, _ = await site.post(PATH, body)
    first, second = reply["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second[str(token)] == {"logprob": -token / 100, "rank": 1, "decoded_token": "b"}
    assert second[str(token + 1)]["rank"] == 2
    assert len(second) == 2
    _, reply, _ = await site.post(PATH, {**body, "prompt_logprobs": 0, "echo": True, "logprobs": 1})
    assert list(reply["choices"][0]["prompt_logprobs"][1]) == [str(token)]
    assert len(reply["choices"][0]["logprobs"]["top_logprobs"][1]) == 1
    status, reply, _ = await site.post(PATH, {**body, "stream": True})
    assert status == 400
    assert reply["error"]["param"] == "prompt_logprobs"


async def test_continuous_usage(site: Site) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": ["ab", "c"], "stream": True, "stream_options": options}
    events = await site.stream(PATH, body)
    counts: dict[int, list[int]] = {0: [], 1: []}
    for event in events[:-2]:
        usage = event["usage"]
        index = event["choices"][0]["index"]
        assert usage["prompt_tokens"] == (2, 1)[index]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        counts[index].append(usage["completion_tokens"])
    assert counts[0] == counts[1] == list(range(1, 14))
    assert events[-2]["usage"]["completion_tokens"] == 26
    body["stream_options"] = {"continuous_usage_stats": True}
    status, reply, _ = await site.post(PATH, body)
    assert status == 400
    assert "`include_usage`" in reply["error"]["message"]


async def test_cache_salt_reaches_the_engine(site: Site) -> None:
    await site.post(PATH, {"prompt": "ab", "cache_salt": "mine"})
    await site.post("/v1/chat/completions", {"messages": HELLO, "cache_salt": "yours"})
    assert [request.cache_salt for request in site.engine.requests] == ["mine", "yours"]


async def test_chats_report_tokens_too(site: Site) -> None:
    path = "/v1/chat/completions"
    tokenizer = site.app[DOOR].texts.tokenizer
    body = {"messages": HELLO, "return_token_ids": True}
    _, reply, _ = await site.post(path, {**body, "prompt_logprobs": 0})
    prompt = "[user]Hi\n[assistant]"
    assert tokenizer.decode(reply["prompt_token_ids"], False) == prompt
    assert len(reply["prompt_logprobs"]) == len(prompt)
    whole = reply["choices"][0]["token_ids"]
    assert tokenizer.decode(whole, True) == "Hello, world"
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await site.stream(path, {**body, "stream": True, "stream_options": options})
    assert events[0]["prompt_token_ids"] == reply["prompt_token_ids"]
    assert all("prompt_token_ids" not in event for event in events[1:-1])
    chunks = [event["choices"][0] for event in events[:-2]]
    assert [token for chunk in chunks for token in chunk.get("token_ids", ())] == whole
    assert [event["usage"]["completion_tokens"] for event in events[1:-3]] == list(range(1, 14))
