"""`/v1/messages` with Anthropic's own client, over an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import pytest
from anthropic.types import Message

from tests.http.conftest import Serve, Site
from tests.http.live import LiveServer
from tests.http.test_reasoning import QWEN, use
from tests.http.test_streams import until
from tests.http.test_tools import JSON
from tgi_cli.serve.anthropic import shapes

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
OPTIONS: dict[str, Any] = {"model": "tgi", "messages": ASK, "max_tokens": 200}
CALLS = (
    "<think>Which city?</think>Let me look.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


@pytest.fixture
async def client(site: Site) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=site.base_url, api_key="-", max_retries=0
    ) as client:
        yield client


async def both(client: anthropic.AsyncAnthropic, **options: Any) -> Message:
    """The whole message, held against the streamed one."""
    whole = await client.messages.create(**{**OPTIONS, **options})
    async with client.messages.stream(**{**OPTIONS, **options}) as stream:
        streamed = await stream.get_final_message()

    def comparable(message: Message) -> dict[str, Any]:
        body = message.to_dict()
        ids = [block.pop("id", None) for block in body["content"]]
        assert all(i is None or i.startswith("call_") for i in ids)
        return {
            name: body[name]
            for name in ("content", "stop_reason", "stop_sequence", "usage", "role", "model")
        }

    parsed = comparable(streamed)
    for block in parsed["content"]:
        block.pop("parsed_output", None)
    assert parsed == comparable(whole)
    return whole


async def test_text(client: anthropic.AsyncAnthropic, site: Site) -> None:
    message = await both(
        client, system="Be brief.", extra_body={"temperature": 0}, metadata={"user_id": "ann"}
    )
    assert message.content[0].text == "Hello, world"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    prompt = site.engine.requests[0].prompt_ids
    assert usage.input_tokens + usage.cache_read_input_tokens == len(prompt)
    assert usage.cache_read_input_tokens == 3
    assert site.prompt_text(site.engine.requests[0]).startswith("[system]Be brief.")
    assert site.engine.requests[0].user == "ann"
    assert site.engine.requests[0].sampling.temperature == 0


async def test_ends(client: anthropic.AsyncAnthropic) -> None:
    message = await both(client, stop_sequences=["wor", "zzz"])
    assert message.content[0].text == "Hello, "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "wor")
    message = await both(client, max_tokens=3)
    assert (message.content[0].text, message.stop_reason) == ("Hel", "max_tokens")


async def test_events_in_order(site: Site) -> None:
    use(site, QWEN, CALLS)
    body = {**OPTIONS, "tools": [WEATHER], "stream": True}
    async with site.session.post("/v1/messages", json=body) as response:
        assert response.content_type == "text/event-stream"
        text = await response.text()
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame]
    events = [msgspec.json.decode(data[6:], type=shapes.MessageEvent) for _, data in frames]
    names = [name.removeprefix("event: ") for name, _ in frames]
    assert [msgspec.to_builtins(event)["type"] for event in events] == names
    assert names[0] == "message_start"
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    kinds = [e.content_block for e in events if isinstance(e, shapes.ContentBlockStart)]
    assert [type(kind) for kind in kinds] == [
        shapes.ThinkingBlock,
        shapes.TextBlock,
        shapes.ToolUseBlock,
        shapes.ToolUseBlock,
    ]
    open_blocks: list[int] = []
    for event in events:
        if isinstance(event, shapes.ContentBlockStart):
            assert not open_blocks
            open_blocks.append(event.index)
        elif isinstance(event, shapes.ContentBlockDelta):
            assert open_blocks == [event.index]
        elif isinstance(event, shapes.ContentBlockStop):
            assert open_blocks.pop() == event.index


async def test_tools_there_and_back(client: anthropic.AsyncAnthropic, site: Site) -> None:
    use(site, QWEN, CALLS)
    message = await both(client, tools=[WEATHER])
    thinking, text, paris, rome = message.content
    assert (thinking.thinking, text.text) == ("Which city?", "Let me look.")
    assert (paris.name, paris.input) == ("get_weather", {"city": "Paris"})
    assert rome.input == {"city": "Rome"}
    assert message.stop_reason == "tool_use"

    template = (
        "{% for t in tools or [] %}<tool_call>{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.reasoning_content }}|{{ m.content }}|{{ m.name }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    use(site, template, "Sun.")
    results = [
        {"type": "tool_result", "tool_use_id": paris.id, "content": "sunny"},
        {
            "type": "tool_result",
            "tool_use_id": rome.id,
            "content": [{"type": "text", "text": "no such city"}],
            "is_error": True,
        },
        {"type": "text", "text": "Well?"},
    ]
    history = [*ASK, message.to_param(), {"role": "user", "content": results}]
    said = await client.messages.with_raw_response.create(
        **{**OPTIONS, "messages": history, "tools": [WEATHER]}
    )
    assert "x-tgi-ignored-fields" not in said.headers  # what we write can be sent back
    assert (await said.parse()).content[0].text == "Sun."
    prompt = site.prompt_text(site.engine.requests[-1])
    assert prompt == (
        "<tool_call>get_weather[user]|What is the weather in Paris?|"
        "[assistant]Which city?|Let me look.|ParisRome"
        "[tool]|sunny|get_weather[tool]|Error: no such city|get_weather[user]|Well?|"
    )


async def test_forced_tools(client: anthropic.AsyncAnthropic, site: Site) -> None:
    use(site, JSON, '{"city": "Paris"}')
    choice = {"type": "tool", "name": "get_weather"}
    message = await both(client, tools=[WEATHER], tool_choice=choice)
    (block,) = message.content
    assert (block.name, block.input) == ("get_weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    cut = {**OPTIONS, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 9}
    message = await client.messages.create(**cut)
    assert message.stop_reason == "max_tokens"
    assert message.content[0].input == {"unfinished_json": '{"city": '}
    use(site, JSON, '{"name": "get_weather", "arguments": {"city": "Rome"}}')
    choice = {"type": "any", "disable_parallel_tool_use": True}
    (block,) = (await both(client, tools=[WEATHER], tool_choice=choice)).content
    assert block.input == {"city": "Rome"}
    assert site.engine.requests[-1].grammar is not None


async def test_thinking_can_be_turned_off(client: anthropic.AsyncAnthropic, site: Site) -> None:
    use(site, QWEN, "Hello")
    await both(client, thinking={"type": "disabled"})
    assert site.prompt_text(site.engine.requests[-1]).endswith("<think>\n\n</think>\n\n")
    raw = await client.messages.with_raw_response.create(
        **OPTIONS, thinking={"type": "enabled", "budget_tokens": 1024}
    )
    assert raw.headers["x-tgi-ignored-fields"] == "thinking.budget_tokens"
    use(site, "{{ messages[-1].content }}", "Hello")
    raw = await client.messages.with_raw_response.create(**OPTIONS, thinking={"type": "adaptive"})
    assert raw.headers["x-tgi-ignored-fields"] == "thinking"


async def test_schema_of_the_answer(client: anthropic.AsyncAnthropic, site: Site) -> None:
    site.engine.reply = lambda request: '{"city": "Paris"}'
    form = {"type": "json_schema", "schema": WEATHER["input_schema"]}
    await both(client, output_config={"format": form})
    grammar = site.engine.requests[-1].grammar
    assert grammar is not None
    assert "city" in grammar.source


async def test_turns_of_one_role_are_one(client: anthropic.AsyncAnthropic, site: Site) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Hel"},
    ]
    message = await client.messages.create(**{**OPTIONS, "messages": messages, "system": "S"})
    assert message.content[0].text == "Hello, world"
    prompt = site.prompt_text(site.engine.requests[-1])
    assert prompt == "[system]S\n[user]a\n\nb\n[assistant]Hel"  # prefilled, so continued


async def test_count_tokens(client: anthropic.AsyncAnthropic, site: Site) -> None:
    counted = await client.messages.count_tokens(model="tgi", messages=ASK, system="S")
    await client.messages.create(**OPTIONS, system="S")
    assert counted.input_tokens == len(site.engine.requests[-1].prompt_ids)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "`messages` must hold"),
    ({"max_tokens": 0}, "`max_tokens` must be >= 1"),
    ({"extra_body": {"temperature": -1}}, "`temperature`"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "`messages[0].role`"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "`messages[0].content[0].type` is"),
    ({"messages": [{"role": "user", "content": []}]}, "`messages[0].content` cannot be empty"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "runs no tools"),
    ({"tools": [WEATHER]}, "chat template knows no tools"),
    ({"tool_choice": {"type": "maybe"}}, "`tool_choice.type` must be"),
    ({"stop_sequences": list("abcde")}, "`stop_sequences` supports up to 4"),
    ({"output_config": {"format": {"type": "yaml"}}}, "`output_config.format` must be"),
    ({"max_tokens": 9000}, "`max_tokens` must be <= 512"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(
    client: anthropic.AsyncAnthropic, change: dict[str, Any], says: str, stream: bool
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refusal:
        await client.messages.create(**{**OPTIONS, **change}, stream=stream)
    body = msgspec.convert(refusal.value.body, shapes.AnthropicErrorReply)
    assert body.error.type == "invalid_request_error"
    assert says in body.error.message


async def test_statuses(serve: Serve) -> None:
    site = await serve(api_key="sesame", max_concurrent_requests=1)
    async with anthropic.AsyncAnthropic(
        base_url=site.base_url, api_key="sesame", max_retries=0
    ) as client:
        with pytest.raises(anthropic.NotFoundError, match="does not exist here"):
            await client.messages.create(**{**OPTIONS, "model": "other"})
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            await client.with_options(api_key="wrong").messages.create(**OPTIONS)
        site.engine.gate.clear()
        held = asyncio.create_task(client.messages.create(**OPTIONS))
        await until(lambda: site.engine.running == 1)
        with pytest.raises(anthropic.RateLimitError) as refusal:
            await client.messages.create(**OPTIONS)
        assert int(refusal.value.response.headers["Retry-After"]) >= 1
        site.engine.gate.set()
        assert (await held).content[0].text == "Hello, world"
        site.engine.fail_after = 2
        with pytest.raises(anthropic.APIStatusError, match="the engine died"):
            async with client.messages.stream(**OPTIONS) as stream:
                await stream.get_final_message()


async def test_wrong_method_and_body(site: Site) -> None:
    async with site.session.get("/v1/messages") as response:
        assert response.status == 405
        msgspec.convert(await response.json(), shapes.AnthropicErrorReply)
    status, body, _ = await site.post("/v1/messages", {"messages": 3})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")


def test_live(tiny_checkpoint: Callable[..., Path]) -> None:
    """The synchronous client and the real engine: greedy answers repeat, counts agree."""
    with (
        LiveServer(tiny_checkpoint("llama"), "--dtype", "float32") as server,
        anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client,
    ):
        options: dict[str, Any] = {**OPTIONS, "max_tokens": 12, "extra_body": {"temperature": 0}}
        message = client.messages.create(**options)
        assert message.usage.output_tokens <= 12
        with client.messages.stream(**options) as stream:
            text = "".join(stream.text_stream)
        assert [block.text for block in message.content] == [text]
        counted = client.messages.count_tokens(model="tgi", messages=ASK)
        usage = message.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
