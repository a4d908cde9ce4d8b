"""Every bad request gets its status, its surface's error shape and a sentence that says why."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.conftest import Serve, Site
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.serve.frontdoor import Texts
from tgi_cli.serve.keys import DOOR
from tgi_cli.serve.openai.schema import ChatRequest, CompletionRequest
from tgi_cli.serve.tgi.schema import GenerateRequest, Parameters

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
MESSAGES = [{"role": "user", "content": "Hi"}]

#: body, what the sentence must name; every one is 400 under /v1
BAD_CHATS: list[tuple[Any, str]] = [
    ([], "object"),
    ("text", "object"),
    ({}, "`messages` is required"),
    ({"messages": None}, "`messages` is required"),
    ({"messages": []}, "at least one message"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"content": "Hi"}]}, "role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 1}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "'smell'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text"),
    ({"messages": [{"role": "tool", "content": "4"}]}, "no role tool"),
    ({"messages": [{"role": "function", "content": "4"}]}, "not supported"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "function"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                }
            ]
        },
        "`messages[0].tool_calls[0].function.arguments` is not a JSON object",
    ),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "wizard"),
    ({"max_tokens": 0}, "`max_tokens`"),
    ({"max_tokens": -1}, "-1"),
    ({"max_tokens": 1.5}, "`max_tokens`"),
    ({"max_tokens": "5"}, "`max_tokens`"),
    ({"max_tokens": 10**9}, "512"),
    ({"max_tokens": 10**30}, "`max_tokens`"),
    ({"max_completion_tokens": -3}, "`max_completion_tokens`"),
    ({"temperature": -0.1}, "`temperature`"),
    ({"temperature": 1e9}, "`temperature`"),
    ({"temperature": "hot"}, "`temperature`"),
    ({"top_p": 0}, "`top_p`"),
    ({"top_p": 1.1}, "`top_p`"),
    ({"top_k": -2}, "`top_k`"),
    ({"min_p": 2}, "`min_p`"),
    ({"repetition_penalty": 0}, "`repetition_penalty`"),
    ({"frequency_penalty": 3}, "`frequency_penalty`"),
    ({"presence_penalty": -3}, "`presence_penalty`"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "`logit_bias`"),
    ({"logit_bias": {"1": 101}}, "`logit_bias`"),
    ({"seed": 2**65}, "`seed`"),
    ({"seed": "abc"}, "`seed`"),
    ({"n": 0}, "`n`"),
    ({"n": 1000}, "128"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "up to 4"),
    ({"stop": [""]}, "`stop`"),
    ({"stop": 5}, "`stop`"),
    ({"stop_token_ids": [-1]}, "`stop_token_ids`"),
    ({"min_tokens": 9, "max_tokens": 5}, "`min_tokens`"),
    ({"top_logprobs": 2}, "`logprobs`"),
    ({"logprobs": True, "top_logprobs": 6}, "<= 5"),
    ({"stream": "yes"}, "`stream`"),
    ({"tools": [{"type": "function"}]}, "`tools[0].function` needs a name"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "`tools[0].type`"),
    ({"tools": [{"function": {"name": "f"}}] * 2}, "`tools` declares `f` twice"),
    ({"tools": [{"function": {"name": "f"}}]}, "chat template knows no tools"),
    ({"tools": [{"function": {"name": "f"}}], "tool_choice": "g"}, "names `g`"),
    ({"tools": [{"function": {"name": "f"}}], "tool_choice": {"type": "x"}}, "must be `none`"),
    ({"tool_choice": "required"}, "`tool_choice` needs `tools`"),
    ({"tool_prompt": "Call a tool:"}, "`tool_prompt`"),
    ({"functions": [{"name": "f"}]}, "send `tools`"),
    ({"tool_choice": "required"}, "`tool_choice`"),
    ({"response_format": {"type": "xml"}}, "`response_format.type` must be"),
    ({"guided_regex": "a("}, "grammar is not valid"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    ({"chat_template_kwargs": {"messages": []}}, "`chat_template_kwargs`"),
]

BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "`prompt` is required"),
    ({"prompt": ""}, "`prompt` cannot be empty"),
    ({"prompt": []}, "`prompt` cannot be empty"),
    ({"prompt": [1, "a"]}, "mixture"),
    ({"prompt": [[]]}, "`prompt`"),
    ({"prompt": [99999]}, "99999"),
    ({"prompt": [-1]}, "-1"),
    ({"prompt": ["a"] * 5}, "4"),
    ({"prompt": "x" * 600}, "600"),
    ({"prompt": "x", "max_tokens": 0}, "`max_tokens`"),
    ({"prompt": "x", "best_of": 3}, "<= 2"),
    ({"prompt": "x", "n": 2, "best_of": 1}, "`best_of`"),
    ({"prompt": "x", "best_of": 2, "stream": True}, "streamed"),
    ({"prompt": "x", "logprobs": 9}, "`logprobs`"),
    ({"prompt": "x", "suffix": "y"}, "`suffix` is not supported: the model continues"),
]

#: parameters, the sentence without its prefix
BAD_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "top_k": 3, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": 1.5}, "`typical_p` must be > 0.0 and <= 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 512. Given: 0"),
    ({"truncate": 600}, "`truncate` must be strictly positive and less than 512. Given: 600"),
    (
        {"max_new_tokens": 510},
        "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 3 `inputs` tokens and "
        "510 `max_new_tokens`",
    ),
    ({"seed": -1}, "`seed` must be >= 0"),
    ({"details": "yes"}, "`parameters.details`"),
    ({"grammar": {"type": "regex", "value": "a("}}, "grammar is not valid: "),
]


def openai_message(body: Any) -> str:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return str(body["error"]["message"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("bad", "says"), BAD_CHATS)
async def test_bad_chat(site: Site, bad: Any, says: str, stream: bool) -> None:
    complete = bad
    if isinstance(bad, dict) and bad:
        complete = {"messages": MESSAGES, "stream": stream, **bad}
    status, body, _ = await site.post(CHAT, complete)
    assert status == 400
    assert says in openai_message(body)
    assert body["error"]["type"] == "invalid_request_error"
    assert site.engine.requests == []


@pytest.mark.parametrize(("bad", "says"), BAD_COMPLETIONS)
async def test_bad_completion(site: Site, bad: dict[str, Any], says: str) -> None:
    status, body, _ = await site.post(COMPLETIONS, bad)
    assert status == 400
    assert says in openai_message(body)


@pytest.mark.parametrize(("bad", "says"), BAD_PARAMETERS)
async def test_bad_parameters(site: Site, bad: dict[str, Any], says: str) -> None:
    for path in (GENERATE, "/"):
        status, body, _ = await site.post(path, {"inputs": "Say", "parameters": bad})
        assert status == 422
        assert body["error_type"] == "validation"
        assert body["error"].startswith(f"Input validation error: {says}")


async def test_bad_native_inputs(site: Site) -> None:
    for bad, says in (
        ({}, "`inputs` is required"),
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"inputs": ["a"]}, "`inputs`"),
        ({"inputs": "x" * 512}, "`inputs` must have less than 512 tokens. Given: 512"),
    ):
        status, body, _ = await site.post(GENERATE, bad)
        assert status == 422
        assert says in body["error"]
    for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
        status, body, _ = await site.post(
            "/generate_stream", {"inputs": "Say", "parameters": parameters}
        )
        assert status == 422
        assert "streaming tokens" in body["error"]


async def test_context_length_code(site: Site) -> None:
    _, body, _ = await site.post(CHAT, {"messages": [{"role": "user", "content": "x" * 600}]})
    assert body["error"]["code"] == "context_length_exceeded"
    assert body["error"]["param"] == "messages"


@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize(
    ("data", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"inputs": "\xff"}', "application/json", 400),
        (b"[" * 5000, "application/json", 400),
        (b'{"inputs": NaN}', "application/json", 400),
        (b'{"inputs": "a"}', "text/plain", 415),
        (b'{"inputs": "a"}', "application/x-www-form-urlencoded", 415),
    ],
)
async def test_malformed_bodies(
    site: Site, path: str, data: bytes, content_type: str, status: int
) -> None:
    headers = {"Content-Type": content_type}
    async with site.session.post(path, data=data, headers=headers) as response:
        assert response.status == status
        body = await response.json()
    if path == CHAT:
        assert openai_message(body)
    else:
        assert set(body) == {"error", "error_type"}


async def test_a_body_that_is_not_encoded_as_it_says(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    for encoding in ("gzip", "deflate"):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        async with site.session.post(CHAT, data=b'{"messages": []}', headers=headers) as response:
            assert response.status == 400
            assert encoding in openai_message(await response.json())
            assert response.headers["Connection"] == "close"
    assert "Traceback" not in caplog.text


def nested(levels: int) -> dict[str, Any]:
    """A schema of objects in objects."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


async def test_bodies_nested_too_deeply(site: Site) -> None:
    tool = {"name": "f", "parameters": nested(150), "input_schema": nested(150)}
    for field, value in (
        ("response_format", {"type": "json", "value": nested(150)}),
        ("tools", [{"type": "function", "function": tool}]),
        ("chat_template_kwargs", nested(150)),
        ("nobody_knows", nested(150)),
    ):
        status, body, _ = await site.post(CHAT, {"messages": MESSAGES, field: value})
        assert status == 400, field
        assert "more than 200 levels" in openai_message(body)
    status, body, _ = await site.post("/v1/responses", {"input": "a", "tools": [tool]})
    assert (status, "200 levels" in openai_message(body)) == (400, True)
    status, body, _ = await site.post("/v1/messages", {"messages": MESSAGES, "tools": [tool]})
    assert (status, "200 levels" in body["error"]["message"]) == (400, True)
    parameters = {"grammar": {"type": "json", "value": nested(150)}}
    status, body, _ = await site.post(GENERATE, {"inputs": "a", "parameters": parameters})
    assert (status, body["error_type"]) == (422, "validation")
    many = {"messages": MESSAGES * 300, "max_tokens": 2}  # wide is not deep
    assert (await site.post(CHAT, many))[1]["error"]["code"] == "context_length_exceeded"


async def test_payload_limit(serve: Serve) -> None:
    site = await serve(payload_limit=1000)
    for path in (CHAT, GENERATE):
        status, body, _ = await site.post(path, {"inputs": "x" * 2000})
        assert status == 413
        assert "1000" in str(body)
        assert "--payload-limit" in str(body)


async def test_unknown_routes_and_methods(site: Site) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", CHAT, 405),
        ("PUT", GENERATE, 405),
    ):
        async with site.session.request(method, path) as response:
            assert response.status == status
            body = await response.json()
            assert path in str(body)
            assert ("Allow" in response.headers) is (status == 405)
        assert isinstance(body["error"], dict if path.startswith("/v1") else str)


async def test_missing_template(serve: Serve) -> None:
    site = await serve()
    door = site.app[DOOR]
    bare = ChatTemplate(None, bos_token=None, eos_token=None)
    door.open(Texts(door.texts.tokenizer, bare), door.facts)
    status, body, _ = await site.post(CHAT, {"messages": MESSAGES})
    assert status == 400
    assert "no chat template" in openai_message(body)


ODD_VALUES: list[Any] = [
    *(None, True, -1, 0, 2**63, 2**64, 1e300, "", "x", "\0", [], [None], {}, {"a": 1}, [[[]]])
]


@pytest.mark.parametrize(
    ("path", "good", "fields"),
    [
        (CHAT, {"messages": MESSAGES}, set(ChatRequest.__struct_fields__)),
        (COMPLETIONS, {"prompt": "x"}, set(CompletionRequest.__struct_fields__)),
        (GENERATE, {"inputs": "x"}, set(GenerateRequest.__struct_fields__)),
    ],
)
async def test_odd_values_never_crash(
    site: Site, path: str, good: dict[str, Any], fields: set[str]
) -> None:
    """Whatever a field is given, the answer is a refusal or a reply."""
    for field in sorted(fields - {"stream"}):
        for value in ODD_VALUES:
            status, body, _ = await site.post(path, {**good, field: value})
            assert status in (200, 400, 404, 422), (field, value, body)


async def test_odd_parameters_never_crash(site: Site) -> None:
    for field in Parameters.__struct_fields__:
        for value in ODD_VALUES:
            body = {"inputs": "x", "parameters": {field: value}}
            status, answer, _ = await site.post(GENERATE, body)
            missing = {404} if field == "adapter_id" else set()
            assert status in {200, 422} | missing, (field, value, answer)
