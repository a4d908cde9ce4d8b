"""What an answer must look like, as it travels: a kind and its source text, nothing compiled.

The HTTP schemas and `LLM` build it, `Request` carries it, `grammar_compiler` gives it its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import msgspec

GrammarKind = Literal["json_schema", "regex", "lark", "choice", "composed"]


class Grammar(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A language: the answer is one of its texts, and ends where the text does.

    Equal kind and source mean the same compiled grammar, wherever it is used.

    Attributes:
        kind: How `source` reads: a JSON Schema, a regular expression matched from end to end, a
            Lark or GBNF grammar, a JSON list of texts, or JSON of rules and the grammars they name.
        source: The text itself.
    """

    kind: GrammarKind
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Self:
        """JSON that satisfies a schema, given as an object or as its text."""
        if not isinstance(schema, str):
            schema = json.dumps(schema, ensure_ascii=False)
        return cls("json_schema", schema)

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """A text that matches the whole pattern (syntax of Rust's `regex`: no look-around)."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, source: str) -> Self:
        """A text of a context-free grammar in Lark's notation (rule `start`) or GBNF (`root`)."""
        return cls("lark", source)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """One of these texts."""
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))

    @classmethod
    def composed(cls, rules: str, parts: Mapping[str, Grammar]) -> Self:
        """A text of `rules`, in Lark's notation, where `@name` is a text of the part so called."""
        named = {name: [part.kind, part.source] for name, part in parts.items()}
        return cls("composed", json.dumps({"rules": rules, "parts": named}, ensure_ascii=False))
