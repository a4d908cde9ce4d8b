"""The grammar of an answer that is either tool calls, as the model writes them, or a given text.

For chats that ask for structured output beside tools that may be called. Knows the marks of a
`CallFormat` and the functions' schemas; whether the whole compiles is for the compiler.
"""

from __future__ import annotations

import json

from tgi_cli.grammar import Grammar
from tgi_cli.serve.openai.tools.declared import FunctionDefinition, call_schema, calls_schema
from tgi_cli.serve.openai.tools.formats import ARGS, CallFormat
from tgi_cli.tokenizer import Tokenizer

_SPACE = r"SPACE: /[ \n]{1,4}/"


def answer_or_calls(
    answer: Grammar,
    form: CallFormat,
    functions: tuple[FunctionDefinition, ...],
    tokenizer: Tokenizer,
    *,
    parallel: bool,
) -> Grammar:
    """A text of `answer`, or calls of these functions (one unless `parallel`) in this format.

    Arguments are held to the functions' schemas, as those of forced calls are.
    """
    key = form.arguments
    parts = {
        "answer": answer,
        "call": Grammar.json_schema(call_schema(functions, key)),
        "list": Grammar.json_schema(calls_schema(functions, key, None if parallel else 1)),
    }
    spelling = _Spelling(tokenizer)
    if form.opening is None:
        calls = ["calls: @call | @list" if parallel else "calls: @call"]
    elif form.bare:
        more = " (SEPARATOR @call)*" if parallel else ""
        calls = [f"calls: {spelling.of(form.opening)}? @call{more}"]
        calls += [f"SEPARATOR: /[{form.separators}] ?/"] if parallel else []
    elif form.array:
        closing = "" if form.closing is None else f" (SPACE? {spelling.of(form.closing)})?"
        calls = [f"calls: {spelling.of(form.opening)} SPACE? @list{closing}"]
        if form.named:
            calls[0] += " | named+" if parallel else " | named"
            calls.append(_named(form.opening, functions, spelling))
            for i, function in enumerate(functions):
                parts[f"arguments_{i}"] = Grammar.json_schema(function.schema)
    else:
        one = f"one: {spelling.of(form.opening)} SPACE? @call"
        one += "" if form.closing is None else f" SPACE? {spelling.of(form.closing)}"
        calls = ["calls: one (SPACE? one)*" if parallel else "calls: one", one]
    rules = ["start: @answer | calls", *calls]
    if any("SPACE?" in rule for rule in rules):
        rules.append(_SPACE)
    used = {name: part for name, part in parts.items() if any(f"@{name}" in r for r in rules)}
    return Grammar.composed("\n".join(rules), used)


def _named(opening: str, functions: tuple[FunctionDefinition, ...], spelling: _Spelling) -> str:
    """Calls whose name stands before their arguments."""
    one = [
        f"{json.dumps(function.name, ensure_ascii=False)} ({spelling.of(ARGS)})? @arguments_{i}"
        for i, function in enumerate(functions)
    ]
    return f"named: {spelling.of(opening)} ({' | '.join(one)})"


class _Spelling:
    """How a mark is written in a Lark grammar: a special token by its id, else its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def of(self, mark: str) -> str:
        """The mark as an item of a rule."""
        token_id = self._tokenizer.token_id(mark)
        if token_id is not None and self._tokenizer.is_special(token_id):
            return f"<[{token_id}]>"
        return json.dumps(mark, ensure_ascii=False)
