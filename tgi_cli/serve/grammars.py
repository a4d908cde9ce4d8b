"""The fields by which the APIs ask for structured output, read into one `Grammar`.

OpenAI's `response_format`, TGI's tagged `{"type", "value"}`, vLLM's `guided_*` and
`structured_outputs`. Only their shape is judged here; whether a grammar is one is for the compiler.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from tgi_cli.errors import InvalidRequest
from tgi_cli.grammar import Grammar

_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")
_TAGS = ("json", "json_object", "regex", "json_schema")


class AskedGrammar(NamedTuple):
    """A grammar and the field of the request that it came from, for messages about it."""

    grammar: Grammar
    field: str


class GrammarFields(Protocol):
    """Fields of a `/v1` body that ask for structured output. None is "not given"."""

    response_format: Any
    guided_json: Any
    guided_regex: Any
    guided_grammar: Any
    guided_choice: Any
    structured_outputs: Any
    grammar: Any


def asked_grammar(body: GrammarFields) -> AskedGrammar | None:
    """The one grammar of a `/v1` body.

    Raises `InvalidRequest` for several fields at once and for values of a wrong shape.
    """
    found: list[AskedGrammar] = []

    def add(field: str, grammar: Grammar | None) -> None:
        if grammar is not None:
            found.append(AskedGrammar(grammar, field))

    if body.response_format is not None:
        add("response_format", response_format(body.response_format))
    if body.guided_json is not None:
        add("guided_json", _schema(body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        add("guided_regex", Grammar.regex(_text(body.guided_regex, "guided_regex")))
    if body.guided_grammar is not None:
        add("guided_grammar", Grammar.lark(_text(body.guided_grammar, "guided_grammar")))
    if body.guided_choice is not None:
        add("guided_choice", _choice(body.guided_choice, "guided_choice"))
    if body.structured_outputs is not None:
        add("structured_outputs", _structured(body.structured_outputs))
    if isinstance(body.grammar, str):  # llama.cpp's field
        add("grammar", Grammar.lark(body.grammar))
    elif body.grammar is not None:
        add("grammar", tagged_grammar(body.grammar, "grammar"))
    if len(found) > 1:
        names = _listed(asked.field for asked in found)
        raise InvalidRequest(
            f"{names} exclude each other: an answer has one grammar", param=found[1].field
        )
    return found[0] if found else None


def response_format(form: Any) -> Grammar | None:
    """OpenAI's `response_format`, or TGI's form of it; None for plain text."""
    field = "response_format"
    kind = _tag(form, field)
    if kind == "text":
        return None
    if kind == "json_schema" and "json_schema" in form:
        inner = form["json_schema"]
        if not isinstance(inner, dict) or "schema" not in inner:
            raise InvalidRequest(
                "`response_format.json_schema.schema` is required",
                param="response_format.json_schema.schema",
            )
        return _schema(inner["schema"], "response_format.json_schema.schema")
    if form.get("value") is not None:
        return tagged_grammar(form, field)
    if kind == "json_object":
        return Grammar.json_object()
    if kind == "json_schema":
        raise InvalidRequest(
            "`response_format.json_schema` is required", param="response_format.json_schema"
        )
    if kind in _TAGS:
        raise InvalidRequest("`response_format.value` is required", param="response_format.value")
    raise InvalidRequest(
        "`response_format.type` must be `text`, `json_object`, `json_schema`, or TGI's `json` or"
        f" `regex`. Given: {kind!r}",
        param="response_format.type",
    )


def tagged_grammar(form: Any, field: str) -> Grammar:
    """TGI's `{"type": ..., "value": ...}`."""
    kind = _tag(form, field)
    if kind not in _TAGS:
        raise InvalidRequest(
            f"`{field}.type` must be {_listed(_TAGS, 'or')}. Given: {kind!r}", param=f"{field}.type"
        )
    value = form.get("value")
    if value is None:
        raise InvalidRequest(f"`{field}.value` is required", param=f"{field}.value")
    if kind == "regex":
        return Grammar.regex(_text(value, f"{field}.value"))
    if kind == "json_schema" and isinstance(value, dict):
        if "schema" not in value:
            raise InvalidRequest(
                f"`{field}.value.schema` is required", param=f"{field}.value.schema"
            )
        value = value["schema"]
    if not isinstance(value, dict | str):
        raise InvalidRequest(
            "grammar is not supported",
            hint=f"`{field}.value` must be a JSON Schema, as an object or as a string",
            param=f"{field}.value",
        )
    return Grammar.json_schema(value)


def _structured(given: Any) -> Grammar:
    """Read `structured_outputs` of vLLM: exactly one constraint."""
    field = "structured_outputs"
    if not isinstance(given, dict):
        raise InvalidRequest(f"`{field}` must be an object", param=field)
    wanted = {k: v for k, v in given.items() if v is not None and v is not False}
    unknown = sorted(wanted.keys() - set(_STRUCTURED))
    if unknown:
        raise InvalidRequest(
            f"`{field}.{unknown[0]}` is not supported, only {_listed(_STRUCTURED)}",
            param=f"{field}.{unknown[0]}",
        )
    if len(wanted) != 1:
        raise InvalidRequest(
            f"`{field}` must hold exactly one of {_listed(_STRUCTURED)}. Given: {len(wanted)}",
            param=field,
        )
    [(kind, value)] = wanted.items()
    where = f"{field}.{kind}"
    if kind == "json":
        return _schema(value, where)
    if kind == "choice":
        return _choice(value, where)
    if kind == "json_object":
        if value is not True:
            raise InvalidRequest(f"`{where}` must be true or false", param=where)
        return Grammar.json_object()
    text = _text(value, where)
    return Grammar.regex(text) if kind == "regex" else Grammar.lark(text)


def _tag(form: Any, field: str) -> Any:
    if not isinstance(form, dict):
        raise InvalidRequest(f"`{field}` must be an object", param=field)
    if "type" not in form:
        raise InvalidRequest(f"`{field}.type` is required", param=f"{field}.type")
    return form["type"]


def _schema(value: Any, field: str) -> Grammar:
    if not isinstance(value, dict | str | bool):
        raise InvalidRequest(
            f"`{field}` must be a JSON Schema, as an object or as a string", param=field
        )
    return Grammar.json_schema(value)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"`{field}` must be a string. Given: {json.dumps(value)}", param=field)
    return value


def _choice(value: Any, field: str) -> Grammar:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"`{field}` must be a list of strings", param=field)
    return Grammar.choice(value)


def _listed(names: Iterable[str], word: str = "and") -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} {word} {last}"
