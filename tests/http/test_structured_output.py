"""Structured output at the door: every field that asks for it, and what each refuses."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from tests.http.conftest import Serve, Site
from tests.http.scripted import byte_facts
from tests.unit.text.templates import CHATML
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.grammar import Grammar
from tgi_cli.grammar_compiler import CompiledGrammar, GrammarCompiler
from tgi_cli.serve.frontdoor import Texts
from tgi_cli.serve.keys import DOOR

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def links(count: int) -> str:
    """Rules in a ring, each of which may go on with the next."""
    return "\n".join(f'a{i}: "x" | "y" a{(i + 1) % count}' for i in range(count))


def chain(count: int) -> str:
    """Rules each of which needs the next."""
    return "\n".join(f'a{i}: "x" a{i + 1}' for i in range(count)) + f'\na{count}: "y"'


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
OBJECT, LIKE = Grammar.json_object(), Grammar.json_schema(SCHEMA)

#: fields of a `/v1` body, the grammar they mean
ASKED: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            }
        },
        LIKE,
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": False, "schema": SCHEMA},
            }
        },
        LIKE,
    ),
    ({"response_format": {"type": "json", "value": SCHEMA}}, LIKE),
    ({"response_format": {"type": "json", "value": json.dumps(SCHEMA)}}, LIKE),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, LIKE),
    ({"response_format": {"type": "regex", "value": "a+"}}, Grammar.regex("a+")),
    (
        {"response_format": {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}},
        LIKE,
    ),
    ({"guided_json": SCHEMA}, LIKE),
    ({"guided_json": json.dumps(SCHEMA)}, LIKE),
    ({"guided_regex": "[ab]"}, Grammar.regex("[ab]")),
    ({"guided_choice": ["x", "ü"]}, Grammar.choice(["x", "ü"])),
    ({"guided_grammar": 'start: "a"'}, Grammar.lark('start: "a"')),
    ({"structured_outputs": {"json": SCHEMA}}, LIKE),
    ({"structured_outputs": {"regex": "a"}}, Grammar.regex("a")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar.choice(["a", "b"])),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar.lark('root ::= "a"')),
    ({"structured_outputs": {"json_object": True, "regex": None}}, OBJECT),
    ({"grammar": 'root ::= "b"'}, Grammar.lark('root ::= "b"')),
    ({"grammar": {"type": "regex", "value": "a"}}, Grammar.regex("a")),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, Grammar.regex("a")),
]

#: fields of a `/v1` body, words of the refusal, `param` of the error
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "must be an object", "response_format"),
    ({"response_format": {}}, "`response_format.type` is required", "response_format.type"),
    ({"response_format": {"type": "xml"}}, "Given: 'xml'", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "is required", "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "is required",
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        "must be a JSON Schema",
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "regex"}}, "is required", "response_format.value"),
    ({"response_format": {"type": "json", "value": 5}}, "grammar is not supported", "value"),
    ({"response_format": {"type": "json", "value": "{"}}, "grammar is not valid", "format"),
    ({"guided_json": 5}, "`guided_json` must be a JSON Schema", "guided_json"),
    ({"guided_json": {"type": "strin"}}, "grammar is not valid: invalid type", "guided_json"),
    ({"guided_json": {"not": {}}}, 'unimplemented keys: ["not"]', "guided_json"),
    ({"guided_regex": 5}, "`guided_regex` must be a string. Given: 5", "guided_regex"),
    ({"guided_regex": "("}, "unclosed group", "guided_regex"),
    ({"guided_choice": "a"}, "must be a list of strings", "guided_choice"),
    ({"guided_choice": [1]}, "must be a list of strings", "guided_choice"),
    ({"guided_choice": []}, "at least one", "guided_choice"),
    ({"guided_grammar": "start: foo"}, 'unknown name: "foo"', "guided_grammar"),
    ({"structured_outputs": []}, "must be an object", "structured_outputs"),
    ({"structured_outputs": {}}, "exactly one of", "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "Given: 2", "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "is not supported", "structural_tag"),
    ({"structured_outputs": {"json_object": 1}}, "must be true", "json_object"),
    ({"grammar": {"type": "lark", "value": "a"}}, "`grammar.type` must be", "grammar.type"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "exclude each other", "guided_choice"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "`response_format` and `structured_outputs` exclude each other",
        "structured_outputs",
    ),
]

#: `parameters.grammar`, the grammar it means or words of the refusal
NATIVE: list[tuple[Any, Grammar | str]] = [
    ({"type": "json", "value": SCHEMA}, LIKE),
    ({"type": "json_object", "value": json.dumps(SCHEMA)}, LIKE),
    ({"type": "regex", "value": "[ab]+"}, Grammar.regex("[ab]+")),
    ({"type": "json_schema", "value": {"schema": SCHEMA, "strict": True}}, LIKE),
    ({"type": "regex", "value": "("}, "grammar is not valid: "),
    ({"type": "json", "value": {"type": "strin"}}, "grammar is not valid: "),
    ({"type": "json", "value": "nonsense"}, "grammar is not valid: "),
    ({"type": "json", "value": 5}, "grammar is not supported"),
    ({"type": "json"}, "`grammar.value` is required"),
    ({"type": "json_schema", "value": {}}, "`grammar.value.schema` is required"),
    ({"type": "xml", "value": "a"}, "`grammar.type` must be"),
    ({"value": "a"}, "`grammar.type` is required"),
    ("a+", "`grammar` must be an object"),
]


@pytest.mark.parametrize(("fields", "grammar"), ASKED, ids=lambda v: json.dumps(v, default=repr))
async def test_every_field_reaches_the_engine(
    site: Site, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3}),
    ):
        site.engine.requests.clear()
        status, reply, headers = await site.post(path, {**body, **fields})
        assert status == 200, reply
        assert {request.grammar for request in site.engine.requests} == {grammar}
        assert "x-tgi-ignored-fields" not in headers


@pytest.mark.parametrize(("fields", "words", "param"), REFUSED, ids=lambda v: json.dumps(v))
async def test_refusals_name_the_field_before_a_stream_begins(
    site: Site, fields: dict[str, Any], words: str, param: str
) -> None:
    for stream in (False, True):
        body = {**CHAT, **fields, "stream": stream}
        status, reply, _ = await site.post("/v1/chat/completions", body)
        assert status == 400
        error = reply["error"]
        assert words in error["message"]
        assert "\n" not in error["message"]
        assert error["param"].endswith(param)
    assert not site.engine.requests


@pytest.mark.parametrize(("grammar", "expected"), NATIVE, ids=lambda v: json.dumps(v, default=repr))
async def test_native_grammar(site: Site, grammar: Any, expected: Grammar | str) -> None:
    body = {"inputs": "x", "parameters": {"grammar": grammar, "max_new_tokens": 3}}
    for path in ("/generate", "/generate_stream"):
        if isinstance(expected, Grammar):
            async with site.session.post(path, json=body) as response:
                assert response.status == 200
                await response.read()
            assert site.engine.requests[-1].grammar == expected
        else:
            status, reply, _ = await site.post(path, body)
            assert (status, reply["error_type"]) == (422, "validation")
            assert reply["error"].startswith(f"Input validation error: {expected}")
            assert not site.engine.requests


async def test_a_bad_grammar_beside_tools_is_named(site: Site) -> None:
    door = site.app[DOOR]
    template = ChatTemplate(CHATML, bos_token=None, eos_token=None)
    door.open(Texts(door.texts.tokenizer, template), byte_facts("", max_model_len=4096))
    body = {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}
    status, reply, _ = await site.post("/v1/chat/completions", {**body, "guided_regex": "("})
    assert (status, reply["error"]["param"]) == (400, "guided_regex")
    body["guided_regex"] = "a"
    tool = {"name": "f", "parameters": {"type": "array", "uniqueItems": True}}
    wrong = {**body, "tools": [{"type": "function", "function": tool}]}
    status, reply, _ = await site.post("/v1/chat/completions", wrong)
    assert (status, reply["error"]["param"]) == (400, "tools")
    assert "uniqueItems" in reply["error"]["message"]
    body["tool_choice"] = "none"
    assert (await site.post("/v1/chat/completions", body))[0] == 200
    assert site.engine.requests[-1].grammar == Grammar.regex("a")


async def test_a_server_may_be_without_grammars(serve: Serve) -> None:
    site = await serve(disable_grammar_support=True)
    body = {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a"}}}
    status, reply, _ = await site.post("/generate", body)
    assert status == 422
    assert reply["error"].startswith("Input validation error: grammar is not supported")
    assert "--disable-grammar-support" in reply["error"]
    status, reply, _ = await site.post("/v1/chat/completions", {**CHAT, "guided_regex": "a"})
    assert (status, reply["error"]["param"]) == (400, "guided_regex")
    assert (await site.post("/v1/chat/completions", CHAT))[0] == 200


async def test_a_grammar_that_takes_for_ever_holds_nobody_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    compile_ = GrammarCompiler.compile

    def slow(self: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
        if grammar.source.startswith("slow"):
            released.wait(30)
        return compile_(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "compile", slow)
    threads = site.app[DOOR]._grammars[1]
    threads._deadline = 0.2
    try:
        for i in range(4):
            status, body, _ = await site.post("/v1/completions", asking(f"slow{i}"))
            assert status == 400
            assert "takes more than 0.2 seconds" in body["error"]["message"]
            assert body["error"]["param"] == "guided_regex"
            # Neither plain requests nor other people's grammars stand behind it.
            assert (await site.post("/v1/completions", {"prompt": "a", "max_tokens": 1}))[0] == 200
            if i < 3:
                assert (await site.post("/v1/completions", asking(f"quick{i}")))[0] == 200
        # The same again is known, and another is one too many: neither waits for a deadline.
        threads._deadline = 60.0
        started = time.monotonic()
        assert (await site.post("/v1/completions", asking("slow0")))[0] == 400
        status, body, headers = await site.post("/v1/completions", asking("quick9"))
        assert time.monotonic() - started < 30
        assert (status, headers["Retry-After"]) == (429, "60")
        assert "4 grammars that take too long" in body["error"]["message"]
        assert (await site.post("/v1/completions", asking("quick0")))[0] == 200  # compiled before
    finally:
        released.set()
    async with asyncio.timeout(30):
        while (await site.post("/v1/completions", asking("quick9")))[0] != 200:
            await asyncio.sleep(0.01)


def asking(regex: str) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 3, "guided_regex": regex}


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        # The first two have ended a process: the compiler recurses over what it reads.
        ("start: " + " ".join(f"a{i}" for i in range(4000)) + "\n" + links(4000), ""),
        ("start: a0\n" + chain(11_000), ""),
        ("start: a0\n" + chain(20_000), "more than the 262,144"),
        ("start: " + "(" * 50_000 + '"x"' + ")" * 50_000, "too deeply"),
    ],
    ids=["wide", "deep", "long", "nested"],
)
async def test_grammars_that_are_deep(site: Site, source: str, refusal: str) -> None:
    body = {"prompt": "a", "max_tokens": 1, "guided_grammar": source}
    status, reply, _ = await site.post("/v1/completions", body)
    assert (status, refusal in str(reply)) == (400 if refusal else 200, True), reply


async def test_a_schema_as_text_that_is_nested_too_deeply(site: Site) -> None:
    deep = '{"properties":{"a":' * 4_000 + "{}" + "}}" * 4_000
    status, body, _ = await site.post("/v1/completions", {"prompt": "a", "guided_json": deep})
    assert (status, body["error"]["param"]) == (400, "guided_json")
    assert "nested too deeply" in body["error"]["message"]
