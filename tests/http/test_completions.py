"""`/v1/completions`: shapes, over a scripted engine."""

from __future__ import annotations

from tests.http.conftest import Site

PATH = "/v1/completions"


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
