"""`/v1/responses` with OpenAI's own client, over an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.http.conftest import Serve, Site
from tests.http.live import LiveServer
from tests.http.test_reasoning import QWEN, use
from tests.http.test_streams import until
from tests.http.test_tools import JSON
from tgi_cli.errors import ResponseNotFound
from tgi_cli.serve.responses import shapes
from tgi_cli.serve.responses.schema import InputItem
from tgi_cli.serve.responses.store import ResponseStore, StoredResponse, item_list

PATH = "/v1/responses"
OPTIONS: dict[str, Any] = {"model": "tgi", "input": "What is the weather in Paris?"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLS = (
    "<think>Which city?</think>Let me look.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)
SHOW = (
    "{% for t in tools or [] %}<tool_call>{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.reasoning_content }}|{{ m.content }}|{{ m.name }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
)


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{site.base_url}/v1", api_key="-", max_retries=0
    ) as client:
        yield client


def comparable(response: Response) -> dict[str, Any]:
    body = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        body.pop(name)
    for item in body["output"]:
        item.pop("id")
        item.pop("call_id", None)
        item.pop("parsed_arguments", None)
        for part in item.get("content", ()):
            part.pop("parsed", None)
    return body


async def both(client: openai.AsyncOpenAI, **options: Any) -> Response:
    """The whole response, held against the streamed one and to the documented shapes."""
    raw = await client.responses.with_raw_response.create(**{**OPTIONS, **options})
    msgspec.json.decode(raw.content, type=shapes.Response)
    whole = raw.parse()
    async with client.responses.stream(**{**OPTIONS, **options}) as stream:
        events = [event async for event in stream]
        streamed = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert comparable(streamed) == comparable(whole)
    return whole


async def test_text(client: openai.AsyncOpenAI, site: Site) -> None:
    response = await both(
        client, instructions="Be brief.", temperature=0, max_output_tokens=50, user="ann"
    )
    assert response.output_text == "Hello, world"
    assert (response.status, response.incomplete_details) == ("completed", None)
    request = site.engine.requests[0]
    assert site.prompt_text(request).startswith("[system]Be brief.\n[user]What is")
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0, 50)
    assert request.user == "ann"
    usage = response.usage
    assert usage.input_tokens == len(request.prompt_ids)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 3
    assert usage.output_tokens_details.reasoning_tokens == 0


async def test_cut(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(**OPTIONS, max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", "Hel")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    stream = await client.responses.create(**OPTIONS, max_output_tokens=3, stream=True)
    types = [event.type async for event in stream]
    assert types[-1] == "response.incomplete"


async def test_events_in_order(site: Site) -> None:
    use(site, QWEN, CALLS)
    body = {**OPTIONS, "tools": [WEATHER], "stream": True}
    async with site.session.post(PATH, json=body) as response:
        assert response.content_type == "text/event-stream"
        text = await response.text()
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame]
    events = [msgspec.json.decode(data[6:], type=shapes.ResponseEvent) for _, data in frames]
    names = [name.removeprefix("event: ") for name, _ in frames]
    assert [msgspec.to_builtins(event)["type"] for event in events] == names
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert names[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert names[-1] == "response.completed"
    added = [e.item for e in events if isinstance(e, shapes.OutputItemAdded)]
    done = [e.item for e in events if isinstance(e, shapes.OutputItemDone)]
    kinds = [shapes.ReasoningItem, shapes.OutputMessage, *[shapes.FunctionCallItem] * 2]
    assert [type(item) for item in added] == [type(item) for item in done] == kinds
    assert [item.id for item in added] == [item.id for item in done]
    assert events[-1].response.output == done


async def test_tools_there_and_back(client: openai.AsyncOpenAI, site: Site) -> None:
    use(site, QWEN, CALLS)
    response = await both(client, tools=[WEATHER])
    thought, said, paris, rome = response.output
    assert thought.content[0].text == "Which city?"
    assert said.content[0].text == "Let me look."
    assert (paris.name, paris.arguments) == ("get_weather", '{"city": "Paris"}')
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    use(site, SHOW, "Sun.")
    results = [
        {"type": "function_call_output", "call_id": paris.call_id, "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": rome.call_id,
            "output": [{"type": "input_text", "text": "rainy"}],
        },
    ]
    expected = (
        "<tool_call>get_weather[user]|What is the weather in Paris?|"
        "[assistant]Which city?|Let me look.|ParisRome"
        "[tool]|sunny|get_weather[tool]|rainy|get_weather"
    )
    history = [
        {"role": "user", "content": OPTIONS["input"]},
        *[item.to_dict() for item in response.output],
        *results,
    ]
    raw = await client.responses.with_raw_response.create(
        model="tgi", input=history, tools=[WEATHER]
    )
    assert "x-tgi-ignored-fields" not in raw.headers  # what we write can be sent back
    assert site.prompt_text(site.engine.requests[-1]) == expected
    again = await client.responses.create(
        model="tgi", input=results, tools=[WEATHER], previous_response_id=response.id
    )
    assert again.output_text == "Sun."
    assert again.previous_response_id == response.id
    assert site.prompt_text(site.engine.requests[-1]) == expected


async def test_forced_tools(client: openai.AsyncOpenAI, site: Site) -> None:
    use(site, JSON, '{"city": "Paris"}')
    choice: Any = {"type": "function", "name": "get_weather"}
    (call,) = (await both(client, tools=[WEATHER], tool_choice=choice)).output
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Paris"}')
    use(site, JSON, '[{"name": "get_weather", "arguments": {"city": "Rome"}}]')
    other = {**WEATHER, "name": "other"}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "get_weather"}],
    }
    await client.responses.create(**OPTIONS, tools=[WEATHER, other], tool_choice=choice)
    assert "other" not in site.engine.requests[-1].grammar.source


class City(BaseModel):
    name: str


async def test_schema_of_the_answer(client: openai.AsyncOpenAI, site: Site) -> None:
    site.engine.reply = lambda request: '{"name": "Paris"}'
    response = await client.responses.parse(**OPTIONS, text_format=City)
    assert response.output_parsed == City(name="Paris")
    grammar = site.engine.requests[-1].grammar
    assert '"name"' in grammar.source
    assert response.text.format.name == "City"


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    response = await both(client, top_logprobs=2, include=["message.output_text.logprobs"])
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries).startswith("Hello, world")
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


async def test_effort(client: openai.AsyncOpenAI, site: Site) -> None:
    raw = await client.responses.with_raw_response.create(
        **OPTIONS, reasoning={"effort": "low"}, service_tier="auto"
    )
    assert raw.headers["x-tgi-ignored-fields"] == "service_tier,reasoning.effort"
    use(site, "{{ messages[-1].content }}{{ reasoning_effort }}", "Hello")
    response = await client.responses.create(**OPTIONS, reasoning={"effort": "low"})
    assert site.prompt_text(site.engine.requests[-1]).endswith("low")
    assert response.reasoning.effort == "low"


async def test_developers_are_systems_unless_the_template_knows_them(
    client: openai.AsyncOpenAI, site: Site
) -> None:
    messages: Any = [{"role": "developer", "content": "D"}, {"role": "user", "content": "u"}]
    await client.responses.create(model="tgi", input=messages)
    await client.chat.completions.create(model="tgi", messages=messages)
    prompts = {site.prompt_text(request) for request in site.engine.requests}
    assert prompts == {"[system]D\n[user]u\n[assistant]"}
    use(site, "{% if 'developer' %}{{ messages[0].role }}{% endif %}", "Hello")
    await client.responses.create(model="tgi", input=messages)
    assert site.prompt_text(site.engine.requests[-1]) == "developer"


async def test_kept_until_deleted(client: openai.AsyncOpenAI, site: Site) -> None:
    made = await client.responses.create(**OPTIONS, metadata={"a": "b"})
    found = await client.responses.retrieve(made.id)
    assert found == made
    items = [item async for item in client.responses.input_items.list(made.id)]
    assert items[0].content[0].text == OPTIONS["input"]
    async with site.session.get(f"{PATH}/{made.id}/input_items?order=asc&limit=1") as reply:
        msgspec.convert(await reply.json(), shapes.InputItems)
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="is kept here"):
        await client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(**OPTIONS, previous_response_id=made.id)
    unkept = await client.responses.create(**OPTIONS, store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(unkept.id)


async def test_streamed_responses_are_kept_too(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(**OPTIONS) as stream:
        final = await stream.get_final_response()
    assert (await client.responses.retrieve(final.id)).output_text == "Hello, world"


async def test_background(client: openai.AsyncOpenAI, site: Site) -> None:
    site.engine.gate.clear()
    queued = await client.responses.create(**OPTIONS, background=True)
    assert queued.status == "queued"
    await until(lambda: site.engine.running == 1)
    assert (await client.responses.retrieve(queued.id)).status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="is in_progress"):
        await client.responses.create(**OPTIONS, previous_response_id=queued.id)
    follower = await client.responses.retrieve(queued.id, stream=True, starting_after=2)
    site.engine.gate.set()
    events = [event async for event in follower]
    assert [event.sequence_number for event in events] == list(range(3, 3 + len(events)))
    assert events[-1].type == "response.completed"
    done = await client.responses.retrieve(queued.id)
    assert (done.status, done.output_text) == ("completed", "Hello, world")
    assert (await site.metrics())["tgi_request_success"] == 1


async def test_background_streamed_from_the_start(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(**OPTIONS, background=True, stream=True)
    types = [event.type async for event in stream]
    assert (types[0], types[-1]) == ("response.created", "response.completed")


async def test_cancel(client: openai.AsyncOpenAI, site: Site) -> None:
    site.engine.gate.clear()
    queued = await client.responses.create(**OPTIONS, background=True)
    await until(lambda: site.engine.running == 1)
    cancelled = await client.responses.cancel(queued.id)
    assert cancelled.status == "cancelled"
    assert site.engine.aborted == [site.engine.requests[0].id]
    assert site.engine.running == 0
    assert (await client.responses.cancel(queued.id)).status == "cancelled"
    at_once = await client.responses.create(**OPTIONS, background=True)
    await client.responses.delete(at_once.id)
    await until(lambda: site.engine.running == 0)
    site.engine.gate.set()
    finished = await client.responses.create(**OPTIONS)
    with pytest.raises(openai.BadRequestError, match="`background` can be cancelled"):
        await client.responses.cancel(finished.id)
    assert (await site.metrics())["tgi_http_requests_in_flight"] == 1  # this one


async def test_failures(client: openai.AsyncOpenAI, site: Site) -> None:
    site.engine.fail_after = 2
    stream = await client.responses.create(**OPTIONS, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert "the engine died" in events[-1].response.error.message
    with pytest.raises(openai.InternalServerError, match="the engine died"):
        await client.responses.create(**OPTIONS)
    made = await client.responses.create(**OPTIONS, background=True)
    await until(lambda: site.engine.running == 0)
    failed = await client.responses.retrieve(made.id)
    assert (failed.status, failed.error.message) == (
        "failed",
        "the engine died: killed by SIGKILL",
    )


async def test_a_client_that_leaves_ends_its_response(site: Site) -> None:
    site.engine.gate.clear()
    asking = asyncio.create_task(site.post(PATH, OPTIONS))
    await until(lambda: site.engine.running == 1)
    asking.cancel()
    await until(lambda: site.engine.running == 0)
    assert len(site.engine.aborted) == 1


async def test_count(client: openai.AsyncOpenAI, site: Site) -> None:
    counted = await client.responses.input_tokens.count(**OPTIONS, instructions="S")
    await client.responses.create(**OPTIONS, instructions="S")
    assert counted.input_tokens == len(site.engine.requests[-1].prompt_ids)


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "`messages` must hold at least one"),
    ({"max_output_tokens": 0}, "`max_output_tokens` must be >= 1"),
    ({"max_output_tokens": 9000}, "`max_output_tokens` must be <= 512"),
    ({"temperature": -1}, "`temperature`"),
    ({"input": [{"role": "robot", "content": "a"}]}, "`input[0].role`"),
    ({"input": [{"role": "user"}]}, "`input[0].content` is required"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "reads text alone"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "`input[0].type` is 'item_reference'"),
    ({"tools": [{"type": "web_search"}]}, "runs no tools"),
    ({"tools": [WEATHER]}, "chat template knows no tools"),
    ({"tool_choice": {"type": "file_search"}}, "`tool_choice` must be"),
    ({"text": {"format": {"type": "yaml"}}}, "`text.format` must be"),
    ({"truncation": "auto"}, "`truncation` must be `disabled`"),
    ({"conversation": "conv_1"}, "`conversation` is not supported"),
    ({"background": True, "store": False}, "`background` needs `store`"),
    ({"top_logprobs": 9}, "`top_logprobs` must be"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(
    client: openai.AsyncOpenAI, change: dict[str, Any], says: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.responses.create(**{**OPTIONS, **change}, stream=stream)
    assert says in refusal.value.message


async def test_a_server_that_keeps_nothing(serve: Serve) -> None:
    site = await serve(max_stored_responses=0)
    _, body, _ = await site.post(PATH, OPTIONS)
    assert body["store"] is False
    status, body, _ = await site.post(PATH, {**OPTIONS, "store": True})
    assert status == 400
    assert "--max-stored-responses" in body["error"]["message"]


def test_tenants_see_only_their_own() -> None:
    store = ResponseStore(limit=3)
    store.put(stored("resp_1", tenant="ann"))
    with pytest.raises(ResponseNotFound):
        store.get("resp_1", "bob")
    assert store.get("resp_1", "ann").tenant == "ann"


def stored(name: str, *, tenant: str = "", text: str = "") -> StoredResponse:
    return StoredResponse(tenant, {"id": name, "text": text}, [], [])


def test_the_store_is_bounded_in_number_and_in_bytes() -> None:
    store = ResponseStore(limit=3)
    for i in range(3):
        store.put(stored(str(i)))
    store.get("0", "")
    store.put(stored("3"))
    assert [store.holds(name) for name in "0123"] == [True, False, True, True]
    store = ResponseStore(limit=9, max_bytes=150)
    for i in range(9):
        store.put(stored(str(i), text="x" * 40))
    assert len(store) == 2
    store.put(stored("big", text="x" * 300))
    assert len(store) == 0


def test_items_as_they_were_sent() -> None:
    (item,) = item_list([InputItem(role="user", content="a")])
    assert item["content"] == [{"type": "input_text", "text": "a"}]


def test_live(tiny_checkpoint: Callable[..., Path]) -> None:
    """The synchronous client and the real engine: greedy answers repeat and can be built upon."""
    with (
        LiveServer(tiny_checkpoint("llama"), "--dtype", "float32") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        options: dict[str, Any] = {**OPTIONS, "max_output_tokens": 12, "temperature": 0}
        response = client.responses.create(**options)
        with client.responses.stream(**options) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert text == response.output_text
        assert response.usage.output_tokens <= 12
        again = client.responses.create(
            **{**options, "input": "And then?"}, previous_response_id=response.id
        )
        assert again.usage.input_tokens > response.usage.total_tokens
