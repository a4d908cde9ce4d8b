"""Structured output beside tools that may be called: the answer is calls or a text, never else.

The grammar that reaches the engine is judged by compiling it: the texts a model may write in its
format are texts of it, and nothing else is.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.http.test_tools import ADD, FORMATS, JSON, LLAMA3, MISTRAL, SAID, WEATHER, called, talk
from tests.http.test_tools import HERMES as HERMES_TEMPLATE
from tgi_cli.grammar import Grammar
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.serve.keys import DOOR
from tgi_cli.serve.openai.tools.call_grammar import answer_or_calls
from tgi_cli.serve.openai.tools.declared import FunctionDefinition
from tgi_cli.serve.openai.tools.formats import GRANITE, HERMES
from tgi_cli.tokenizer import load_tokenizer

__all__ = ["talk"]  # a fixture

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
STRICT = {**WEATHER, "function": {**WEATHER["function"], "parameters": SCHEMA}}


class Judge:
    """Whether texts belong to a grammar over a tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int = 300) -> None:
        self._tokenizer = tokenizer
        self._compiler = GrammarCompiler(lambda: tokenizer, vocab_size)

    def accepts(self, grammar: Grammar, text: str) -> bool:
        ids = self._tokenizer.encode(text, False)
        matcher = self._compiler.compile(grammar).start()
        if matcher.consume(ids) < len(ids):
            return False
        if matcher.complete:
            return True
        words = np.zeros(self._compiler.num_words, np.int32)
        matcher.fill(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return bool(bits[self._compiler.vocab_size])


@FORMATS
async def test_the_answer_is_calls_or_of_the_schema(talk: Any, template: str) -> None:
    talker = await talk(template)
    judge = Judge(talker.site.app[DOOR].texts.tokenizer)
    talker.says('{"sum": 3}')
    choice = await talker.ask(response_format=FORMAT)
    assert (choice.finish_reason, choice.message.content) == ("stop", '{"sum": 3}')
    assert choice.message.tool_calls is None
    grammar = talker.site.engine.requests[-1].grammar
    said = SAID[template].removeprefix("Let me look.\n")
    assert judge.accepts(grammar, '{"sum": 3}')
    assert judge.accepts(grammar, said)
    for wrong in ("Let me look.", '{"sum": "x"}', said[:-1], said + '{"sum": 3}', "[]"):
        assert not judge.accepts(grammar, wrong), wrong
    talker.says(said)
    choice = await talker.ask(response_format=FORMAT)
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert len(called(choice.message)) == 2
    await talker.ask(response_format=FORMAT, parallel_tool_calls=False)
    assert not judge.accepts(talker.site.engine.requests[-1].grammar, said)
    await talker.ask(response_format=FORMAT, tools=[STRICT, ADD])
    assert not judge.accepts(talker.site.engine.requests[-1].grammar, said)


async def test_other_grammars_and_streams(talk: Any) -> None:
    talker = await talk(HERMES_TEMPLATE)
    judge = Judge(talker.site.app[DOOR].texts.tokenizer)
    for fields, text in (
        ({"response_format": {"type": "json_object"}}, '{"any": [1]}'),
        ({"extra_body": {"guided_regex": "[ab]+"}}, "abba"),
        ({"extra_body": {"guided_choice": ["yes", "no"]}}, "no"),
        ({"extra_body": {"guided_grammar": 'root ::= "x" [0-9]'}}, "x7"),
    ):
        talker.says(text)
        chunks = await talker.stream(**fields)
        assert "".join(chunk.delta.content or "" for chunk in chunks) == text
        grammar = talker.site.engine.requests[-1].grammar
        assert judge.accepts(grammar, text)
        assert judge.accepts(grammar, '<tool_call>{"name": "add", "arguments": {}}</tool_call>')
        assert not judge.accepts(grammar, "something else")


async def test_a_forced_call_leaves_no_room_for_the_text(talk: Any) -> None:
    talker = await talk(JSON)
    talker.says('[{"name": "add", "arguments": {}}]')
    for choice in ("required", "add"):
        await talker.ask(response_format=FORMAT, tool_choice=choice)
        forced = talker.site.engine.requests[-1].grammar
        await talker.ask(tool_choice=choice)
        assert talker.site.engine.requests[-1].grammar == forced


@pytest.mark.parametrize("template", [MISTRAL, LLAMA3], ids=["mistral", "llama"])
async def test_the_newer_form_and_the_optional_mark(talk: Any, template: str) -> None:
    talker = await talk(template)
    judge = Judge(talker.site.app[DOOR].texts.tokenizer)
    await talker.ask(response_format=FORMAT)
    grammar = talker.site.engine.requests[-1].grammar
    one = {
        MISTRAL: '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        LLAMA3: '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
    }[template]
    assert judge.accepts(grammar, one)
    assert not judge.accepts(grammar, one.replace("get_weather", "get_time"))


def test_marks_that_are_special_tokens(byte_folder: Any, tmp_path: Any) -> None:
    special = Tokenizer.from_file(str(byte_folder / "tokenizer.json"))
    special.add_special_tokens([AddedToken("<tool_call>", special=True)])
    special.add_special_tokens([AddedToken("<|tool_call|>", special=True)])
    special.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    tokenizer = load_tokenizer(str(tmp_path))
    judge = Judge(tokenizer)
    functions = (FunctionDefinition(name="add"),)
    for form, text in (
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'),
        (GRANITE, '<|tool_call|>[{"name": "add", "arguments": {}}]'),
        (GRANITE, '<|tool_call|>[{"name": "add", "arguments": {}}]<|/tool_call|>'),
    ):
        grammar = answer_or_calls(Grammar.choice(["hi"]), form, functions, tokenizer, parallel=True)
        assert len(tokenizer.encode(text, False)) < len(text) - 9
        assert judge.accepts(grammar, text)
        assert judge.accepts(grammar, "hi")
        assert not judge.accepts(grammar, text.lstrip("<"))
