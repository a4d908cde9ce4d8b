"""Tools with OpenAI's own client, over an engine whose model says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.http.conftest import Serve, Site
from tests.unit.text.templates import CHATML, LLAMA3
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.grammar import Grammar
from tgi_cli.serve.frontdoor import Texts
from tgi_cli.serve.keys import DOOR
from tgi_cli.tokenizer import load_tokenizer

HERMES = CHATML  # writes `<tool_call>`
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls is defined %}"
    "[TOOL_CALLS]{% for c in m.tool_calls %}{{ c.id }}:{{ c.function | tojson }}{% endfor %}"
    "{% if m.tool_calls[0].id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.tool_call_id }} {{ m.name }} {{ m.content }}"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
JSON = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[-1].content }}"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASK = [{"role": "user", "content": "What is the weather in Paris and Rome?"}]
OPTIONS: dict[str, Any] = {"model": "tgi", "messages": ASK, "tools": [WEATHER, ADD]}
CITIES = [{"city": "Paris"}, {"city": "Rome"}]

SAID = {
    HERMES: "Let me look.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    LLAMA3: '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
    '{"name": "get_weather", "parameters": {"city": "Rome"}}',
    MISTRAL: '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_weather", "arguments": {"city": "Rome"}}]',
    JSON: '[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_weather", "arguments": {"city": "Rome"}}]',
}
FORMATS = pytest.mark.parametrize(
    "template", list(SAID), ids=["hermes", "llama", "mistral", "json"]
)


class Talker:
    """A site whose model has a template, and OpenAI's client for it."""

    def __init__(self, site: Site, template: str) -> None:
        self.site = site
        door = site.app[DOOR]
        tokenizer = door.texts.tokenizer
        rendered = ChatTemplate(template, bos_token="<s>", eos_token="</s>")
        door.open(Texts(tokenizer, rendered), door.facts)
        self.client = openai.AsyncOpenAI(base_url=f"{site.base_url}/v1", api_key="-", max_retries=0)

    def says(self, text: str) -> None:
        self.site.engine.reply = lambda request: text

    @property
    def prompt(self) -> str:
        """The last prompt the engine was given."""
        ids = self.site.engine.requests[-1].prompt_ids
        return self.site.app[DOOR].texts.tokenizer.decode(ids, False)

    async def ask(self, **options: Any) -> Any:
        reply = await self.client.chat.completions.create(**{**OPTIONS, **options})
        return reply.choices[0]

    async def stream(self, **options: Any) -> list[Any]:
        stream = await self.client.chat.completions.create(**{**OPTIONS, **options}, stream=True)
        return [chunk.choices[0] async for chunk in stream if chunk.choices]


@pytest.fixture
async def talk(serve: Serve) -> AsyncIterator[Callable[[str], Any]]:
    made: list[Talker] = []

    async def start(template: str, **options: Any) -> Talker:
        made.append(Talker(await serve(max_model_len=4096, **options), template))
        return made[-1]

    yield start
    for one in made:
        await one.client.close()


def called(message: Any) -> list[tuple[str, Any]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]


@FORMATS
async def test_calls_of_every_format(talk: Any, template: str) -> None:
    talker = await talk(template)
    talker.says(SAID[template])
    choice = await talker.ask()
    assert called(choice.message) == [("get_weather", city) for city in CITIES]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == ("Let me look." if template == HERMES else None)
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2
    assert all(one.startswith("call_") for one in ids)
    assert '"The weather in a city"' in talker.prompt


@FORMATS
@pytest.mark.parametrize("per_step", [1, 7, 1000])
async def test_streamed_calls(talk: Any, template: str, per_step: int) -> None:
    talker = await talk(template)
    talker.says(SAID[template])
    talker.site.engine.per_step = per_step
    choices = await talker.stream()
    parts = [part for choice in choices for part in choice.delta.tool_calls or ()]
    for index, city in enumerate(CITIES):
        first, *rest = (part for part in parts if part.index == index)
        assert (first.function.name, first.function.arguments) == ("get_weather", "")
        assert first.type == "function"
        assert first.id.startswith("call_")
        assert all(part.id is None and part.function.name is None for part in rest)
        assert json.loads("".join(part.function.arguments for part in rest)) == city
    content = "".join(choice.delta.content or "" for choice in choices)
    assert content == ("Let me look." if template == HERMES else "")
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]


async def test_the_clients_own_assembly_of_a_stream(talk: Any) -> None:
    talker = await talk(HERMES)
    talker.says(SAID[HERMES])
    async with talker.client.chat.completions.stream(**OPTIONS) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    assert called(final.choices[0].message) == [("get_weather", city) for city in CITIES]
    assert sum(event.type == "tool_calls.function.arguments.done" for event in events) == 2


async def test_the_synchronous_client(talk: Any) -> None:
    talker = await talk(HERMES)
    talker.says(SAID[HERMES])

    def ask() -> tuple[Any, list[Any]]:
        url = f"{talker.site.base_url}/v1"
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
            whole = client.chat.completions.create(**OPTIONS)
            with client.chat.completions.stream(**OPTIONS) as stream:
                for _ in stream:
                    pass
                return whole.choices[0].message, stream.get_final_completion().choices[0].message

    whole, streamed = await asyncio.to_thread(ask)
    assert called(whole) == called(streamed) == [("get_weather", city) for city in CITIES]


async def test_results_are_fed_back(talk: Any) -> None:
    for template in (HERMES, MISTRAL):
        talker = await talk(template)
        talker.says(SAID[template])
        first = await talker.ask()
        call = first.message.tool_calls[0]
        answer = {"role": "tool", "tool_call_id": call.id, "content": "11 °C"}
        asked = {**first.message.model_dump(), "tool_calls": [call.model_dump()]}
        talker.says("It is 11 °C.")
        second = await talker.ask(messages=[*ASK, asked, answer])
        assert second.message.content == "It is 11 °C."
        assert second.message.tool_calls is None
        assert second.finish_reason == "stop"
        if template == HERMES:
            assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}' in (
                talker.prompt
            )
            assert "<tool_response>11 °C</tool_response>" in talker.prompt
        else:
            short = talker.prompt.partition("[TOOL_CALLS]")[2][:9]
            assert short.isalnum()
            assert f"[RESULT]{short} get_weather 11 °C" in talker.prompt


async def test_what_is_no_call_stays_content(talk: Any) -> None:
    talker = await talk(HERMES)
    for said in (
        "Plain words, {braces} and <tags>.",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "argum',
    ):
        talker.says(said)
        choice = await talker.ask()
        assert (choice.message.content, choice.message.tool_calls) == (said, None)
        assert choice.finish_reason == "stop"
        streamed = await talker.stream()
        assert "".join(choice.delta.content or "" for choice in streamed) == said


async def test_length_is_not_hidden_by_a_call(talk: Any) -> None:
    talker = await talk(HERMES)
    talker.says(SAID[HERMES])
    limit = SAID[HERMES].index("</tool_call>") + 1
    choice = await talker.ask(max_tokens=limit)
    assert called(choice.message) == [("get_weather", CITIES[0])]
    assert choice.finish_reason == "length"


async def test_choice_none_and_no_parallel_calls(talk: Any) -> None:
    talker = await talk(HERMES)
    talker.says(SAID[HERMES])
    choice = await talker.ask(tool_choice="none")
    assert choice.message.tool_calls is None
    assert choice.message.content == SAID[HERMES]
    assert "<tools>" not in talker.prompt
    choice = await talker.ask(parallel_tool_calls=False)
    assert called(choice.message) == [("get_weather", CITIES[0])]
    streamed = await talker.stream(parallel_tool_calls=False)
    assert {p.index for c in streamed for p in c.delta.tool_calls or ()} == {0}
    deaf = await talk("{{ messages[-1].content }}")
    assert (await deaf.ask(tool_choice="none")).finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        await deaf.ask()


@pytest.mark.parametrize("choice", ["add", {"type": "function", "function": {"name": "add"}}])
async def test_a_named_function_is_forced_by_its_schema(talk: Any, choice: Any) -> None:
    talker = await talk(HERMES)
    talker.says('{"a": [1, 2]}')
    reply = await talker.ask(tool_choice=choice)
    assert called(reply.message) == [("add", {"a": [1, 2]})]
    assert (reply.finish_reason, reply.message.content) == ("tool_calls", None)
    request = talker.site.engine.requests[-1]
    assert request.grammar == Grammar.json_schema(ADD["function"]["parameters"])
    parts = [p for c in await talker.stream(tool_choice=choice) for p in c.delta.tool_calls or ()]
    assert parts[0].function.name == "add"
    fragments = [part.function.arguments for part in parts[1:]]
    assert len(fragments) > 5
    assert "".join(fragments) == '{"a": [1, 2]}'
    reply = await talker.ask(tool_choice=choice, max_tokens=4)
    assert reply.finish_reason == "length"
    assert reply.message.tool_calls[0].function.arguments == '{"a"'


@pytest.mark.parametrize("parallel", [True, False])
async def test_required_calls_are_forced_by_all_schemas(talk: Any, parallel: bool) -> None:
    talker = await talk(HERMES)
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    talker.says(f"[{call}]" if parallel else call)
    reply = await talker.ask(tool_choice="required", parallel_tool_calls=parallel)
    assert called(reply.message) == [("get_weather", CITIES[0])]
    assert reply.finish_reason == "tool_calls"
    schema = json.loads(talker.site.engine.requests[-1].grammar.source)
    assert schema.get("type") == ("array" if parallel else None)
    variants = (schema["items"] if parallel else schema)["anyOf"]
    names = [variant["properties"]["name"]["const"] for variant in variants]
    assert names == ["get_weather", "add"]
    assert variants[0]["properties"]["arguments"] == {"$ref": "#/$defs/0"}
    assert schema["$defs"]["0"] == WEATHER["function"]["parameters"]
    assert (await talker.ask()).finish_reason == "stop"  # and nothing is forced by default
    assert talker.site.engine.requests[-1].grammar is None


@pytest.mark.parametrize("template", [HERMES, MISTRAL], ids=["forced", "mistral"])
async def test_whole_calls_of_an_array_that_was_cut(talk: Any, template: str) -> None:
    talker = await talk(template)
    calls = '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "add", "argum'
    talker.says(calls if template == HERMES else f"[TOOL_CALLS]{calls}")
    choice = {"tool_choice": "required"} if template == HERMES else {}
    size = len(talker.site.engine.reply(None)) - 1  # one byte a token: the limit cuts it
    reply = await talker.ask(**choice, max_tokens=size)
    assert called(reply.message) == [("get_weather", CITIES[0])]
    assert reply.finish_reason == "length"
    assert reply.message.content == '{"name": "add", "argu'
    chunks = await talker.stream(**choice, max_tokens=size)
    pieces = [call for c in chunks for call in c.delta.tool_calls or ()]
    assert json.loads("".join(p.function.arguments or "" for p in pieces)) == CITIES[0]


async def test_references_of_forced_schemas_hold_where_they_have_moved(talk: Any) -> None:
    node = {
        "type": "object",
        "properties": {
            "size": {"$ref": "#/$defs/Size"},
            "below": {"type": "array", "items": {"$ref": "#"}},
        },
        "required": ["size"],
        "$defs": {"Size": {"enum": [1, 2]}},
    }
    tree = {"type": "function", "function": {"name": "tree", "parameters": node}}
    talker = await talk(HERMES)
    nested = '{"size": 1, "below": [{"size": 2}]}'
    talker.says(f'[{{"name": "tree", "arguments": {nested}}}]')
    reply = await talker.ask(tools=[WEATHER, tree], tool_choice="required")
    assert called(reply.message) == [("tree", json.loads(nested))]
    schema = json.loads(talker.site.engine.requests[-1].grammar.source)
    judge = jsonschema.Draft202012Validator(schema)
    for arguments, right in ((nested, True), (nested.replace("2", "3"), False)):
        call = {"name": "tree", "arguments": json.loads(arguments)}
        assert judge.is_valid([call]) is right


async def test_several_choices_each_have_their_calls(talk: Any) -> None:
    talker = await talk(HERMES)
    talker.says(SAID[HERMES])
    reply = await talker.client.chat.completions.create(**OPTIONS, n=2)
    ids = [call.id for choice in reply.choices for call in choice.message.tool_calls or ()]
    assert len(ids) == len(set(ids)) == 4
    chunks = [c for c in await talker.stream(n=2) if c.delta.tool_calls]
    assert {chunk.index for chunk in chunks} == {0, 1}


async def test_logprobs_of_held_back_text_are_streamed(talk: Any) -> None:
    talker = await talk(HERMES)
    talker.says(SAID[HERMES])
    choices = await talker.stream(logprobs=True)
    tokens = [t.token for c in choices if c.logprobs for t in c.logprobs.content]
    assert "".join(tokens).startswith(SAID[HERMES])


async def test_a_template_that_leaves_tools_out(talk: Any) -> None:
    talker = await talk("{% if xml_tools %}{{ xml_tools }}{{ tools }}{% endif %}{{ messages }}")
    talker.says("Fine.")
    with pytest.raises(openai.BadRequestError, match="left `tools` out") as refusal:
        await talker.ask()
    assert refusal.value.param == "tools"
    named = await talker.ask(extra_body={"chat_template_kwargs": {"xml_tools": "here:"}})
    assert named.message.content == "Fine."


async def test_unknown_formats_are_refused(talk: Any) -> None:
    talker = await talk("{{ tools }}<tool_call><function=name>")
    with pytest.raises(openai.BadRequestError, match="not supported yet"):
        await talker.ask()


async def test_marks_that_are_special_tokens_are_seen(
    talk: Any, byte_folder: Path, tmp_path: Path
) -> None:
    for file in byte_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    special = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    special.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    special.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode([258], skip_special_tokens=True) == ""

    talker = await talk(MISTRAL)
    door = talker.site.app[DOOR]
    door.open(Texts(tokenizer, door.texts.template), door.facts)
    talker.site.engine._encode = lambda text: tokenizer.encode(text, False)
    talker.says(SAID[MISTRAL])
    choice = await talker.ask()
    assert called(choice.message) == [("get_weather", city) for city in CITIES]
    assert choice.message.content is None
    choice = await talker.ask(tools=[])
    assert choice.message.content == SAID[MISTRAL].removeprefix("[TOOL_CALLS]")
