"""Tool-call parsers: cuts never matter, nothing is lost, nothing raises."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgi_cli.serve.openai.tools.calls import CallParser
from tgi_cli.serve.openai.tools.formats import (
    APRIEL,
    GRANITE,
    HERMES,
    LLAMA3,
    MISTRAL,
    NEMOTRON,
    PLAIN_JSON,
    CallFormat,
    format_of,
)
from tgi_cli.serve.openai.tools.parser import Arguments, CallStart, Piece

NAMES = ("add", "get_weather")
FORMATS = (HERMES, LLAMA3, MISTRAL, GRANITE, NEMOTRON, APRIEL, PLAIN_JSON)
SPACE = " \t\r\n"


def flat(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls."""
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            calls.append((piece.name, ""))
        elif isinstance(piece, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


def read(form: CallFormat, *texts: str) -> tuple[str, list[tuple[str, str]]]:
    parser = CallParser(form, NAMES)
    pieces = [piece for text in texts for piece in parser.push(text)]
    return flat(pieces + parser.finish())


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=6), json_values, max_size=3)
calls = st.tuples(st.sampled_from(NAMES), arguments)
spaces = st.text(SPACE, max_size=3)
#: Fragments of every format, well placed or not.
fragments = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        *("<|tool_call|>", "<|/tool_call|>", "<|tool"),
        *("<tool", "[TOOL", "</", "{", "}", "[", "]", '"', "\\", ";", ",", ":", " ", "\n", "add"),
        '{"name": "add", "arguments": {"a": 1}}',
        '{"name": "add", "parameters": {"a": "}"}}',
        '{"name": "unknown", "arguments": {}}',
        *('{"name": 1}', '{"a": "</tool_call>"}', '"name"', "text", "日本", "🎈"),
    ]
)
noise = st.lists(fragments | st.text(max_size=5), max_size=14).map("".join)
cuts = st.lists(st.integers(0, 400), max_size=12)


@given(st.sampled_from(FORMATS), noise, cuts)
def test_cuts_never_matter(form: CallFormat, text: str, places: list[int]) -> None:
    whole = read(form, text)
    assert read(form, *cut(text, places)) == whole
    assert read(form, *text) == whole


@given(st.sampled_from(FORMATS), noise)
def test_text_without_calls_is_content_to_the_letter(form: CallFormat, text: str) -> None:
    content, found = read(form, text)
    if not found:
        assert content == text
    else:
        # What became content is still there in order, and only marks and calls are gone.
        rest = iter("".join(text.split()))
        assert all(char in rest for char in "".join(content.split()))


def written(form: CallFormat, made: list[tuple[str, dict[str, Any]]], space: str) -> str:
    """Calls as a model of that format writes them."""
    key = "parameters" if form is LLAMA3 else "arguments"
    bodies = [json.dumps({"name": name, key: given}) for name, given in made]
    if form is HERMES:
        return space.join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    if form.array:
        return f"{form.opening}{space}[{', '.join(bodies)}]"
    if form is LLAMA3:
        return f"<|python_tag|>{space}" + ";".join(bodies)
    return f"[{f',{space}'.join(bodies)}]"


@given(
    st.sampled_from(FORMATS),
    st.lists(calls, min_size=1, max_size=4),
    st.sampled_from(["", "Let me see", "日本\n\nfirst"]),
    spaces,
    cuts,
)
def test_well_written_calls_are_found(
    form: CallFormat, made: list[tuple[str, dict[str, Any]]], before: str, space: str, cut_at: Any
) -> None:
    if form is PLAIN_JSON:
        before = ""
    text = before + space + written(form, made, space) + space
    content, found = read(form, *cut(text, cut_at))
    assert content == before
    assert [(name, json.loads(text)) for name, text in found] == made


@given(st.lists(calls, min_size=1, max_size=3), st.text(max_size=8))
def test_mistral_names_outside_the_json(made: list[tuple[str, dict[str, Any]]], after: str) -> None:
    text = "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given)}" for name, given in made)
    assert [(name, json.loads(text)) for name, text in read(MISTRAL, text)[1]] == made
    bare = read(MISTRAL, f'[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{{"a": 1}} {after}')
    assert bare[1] == [("add", '{"a": 1}')]
    assert bare[0].split() == after.split()


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": '),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}'),
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": 3}</tool_call>'),
        (HERMES, "<tool_call>add(1, 2)</tool_call>"),
        (HERMES, "a <b> c < tool_call> <tool_cal"),
        (HERMES, '{"name": "add", "arguments": {}}'),
        (LLAMA3, "<|python_tag|>print(1)"),
        (LLAMA3, '{"answer": 42}'),
        (LLAMA3, '[sic] {"name": "add", "parameters": {}}'),
        (MISTRAL, "[TOOL_CALLS]unknown{}"),
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "unknown", "arguments": {}},'),
        (PLAIN_JSON, 'Sure: {"name": "add", "arguments": {}}'),
        (PLAIN_JSON, '[{"name": "add"}, {"name": "unknown"}]'),
        (PLAIN_JSON, "{" * 1000),
        (PLAIN_JSON, '{"name": "add", "arguments": ' + "[" * 300 + "]" * 300 + "}"),
        (PLAIN_JSON, "   \n"),
    ],
)
def test_what_is_no_call_stays_content(form: CallFormat, text: str) -> None:
    assert read(form, text) == (text, [])
    assert read(form, *text) == (text, [])


def test_arguments_keep_the_models_own_text() -> None:
    text = '{"b": 1.50, "a": 123456789012345678901234567890, "b2": "\\u00e9</tool_call>"}'
    found = read(HERMES, f'<tool_call>{{"name": "add", "arguments": {text}}}</tool_call>')
    assert found == ("", [("add", text)])
    quoted = json.dumps('{"a": 1}')
    assert read(PLAIN_JSON, f'{{"name": "add", "arguments": {quoted}}}')[1] == [("add", '{"a": 1}')]
    assert read(PLAIN_JSON, '{"name": "add"}')[1] == [("add", "{}")]


def test_content_is_not_held_back() -> None:
    for form in FORMATS:
        parser = CallParser(form, NAMES)
        assert flat(parser.push("Hello"))[0] == "Hello"
        assert flat(parser.push(" [1] {x"))[0] == " [1] {x"


def steps(parser: CallParser, texts: list[str]) -> int:
    """Characters the parser kept for another look, over a whole answer."""
    kept = 0
    for text in texts:
        parser.push(text)
        kept += len(parser._text)
    return kept


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("unit", ["<", "[TOOL_CALLS", " ", "{", '{"a', "a", "[TOOL_CALLS]a ", "["])
def test_no_character_is_looked_at_often(form: CallFormat, unit: str) -> None:
    text = unit * 2000
    assert steps(CallParser(form, NAMES), list(text)) <= 260 * len(text)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}", HERMES),
        ("{{ '<|python_tag|>' + call.name }}", LLAMA3),
        (
            '{"name": function name, "parameters": dictionary of argument name and its value}',
            LLAMA3,
        ),
        ('{{ "[TOOL_CALLS] [" }}', MISTRAL),
        ("{{ '<|tool_call|>' }}", GRANITE),
        ("{{ tools | tojson }}", PLAIN_JSON),
        ("{{ '<TOOLCALL>[' }}", NEMOTRON),
        ("As in <tool_call>: {{ '<tool_calls>[' }}", APRIEL),
        ("<tool_call>\n<function=name>", None),
        ("{{ '<tool_call>' + name }}<arg_key>", None),
        ("<|DSML|invoke name=", None),
        ("{{ '<|tool_call>call:' }}", None),
        ("{{ '<|tool_call_begin|>functions.' }}", None),
        ("{{ '<|channel|>commentary to=functions.' }}", None),
    ],
)
def test_the_template_tells_the_format(template: str, form: CallFormat | None) -> None:
    assert format_of(template) is form
