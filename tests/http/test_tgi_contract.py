"""Our OpenAPI document against Text Generation Inference's, field by field.

`data/tgi-openapi.json` holds the names and types of the document that TGI 3.3.6 carried
(Apache-2.0), without its texts. Every operation, status, field and type there exists here, but for
what is listed below with its reason; an exception that is none any more fails too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tgi_cli.serve.openapi import build_document
from tgi_cli.serve.routes import ROUTES

THEIRS = json.loads((Path(__file__).parent / "data" / "tgi-openapi.json").read_text())
OURS = build_document(ROUTES)
OPERATIONS = [(path, method) for path, of in THEIRS["paths"].items() for method in of]

_OPENAI = "/v1/ routes answer with OpenAI's statuses: 400 for a bad field, 500 for a failure"
STATUS_EXCEPTIONS = {
    ("/v1/chat/completions", "422"): _OPENAI,
    ("/v1/chat/completions", "424"): _OPENAI,
    ("/v1/completions", "422"): _OPENAI,
    ("/v1/completions", "424"): _OPENAI,
    ("/v1/models", "404"): "there is always a model; TGI never answered it",
}
_CHATS = ("/v1/chat/completions", "/chat_tokenize", "/invocations")
REQUEST_EXCEPTIONS = {
    (at, field): reason
    for at in _CHATS
    for field, reason in {
        "logit_bias": "a map from token ids, as OpenAI has it; TGI took a list and ignored it",
        "messages.tool_calls.function.arguments": "JSON text or an object, not anything",
        "messages.tool_calls.function.description": "a call has none: ignored and named",
        "tools.function.arguments": "a JSON Schema is an object",
    }.items()
}
RESPONSE_EXCEPTIONS = {
    (at, field): reason
    for at in ("/v1/chat/completions", "/invocations")
    for field, reason in {
        "choices.message.tool_calls.function.description": "TGI always answered null",
        "choices.message.tool_call_id": "belongs to a tool's message, never to an answer",
        "choices.delta.tool_call_id": "belongs to a tool's message, never to an answer",
    }.items()
} | {
    ("/v1/models", field): "the document describes one entry, TGI answered a list of them"
    for field in ("created", "id", "owned_by")
}

Paths = dict[str, set[str]]


def resolve(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def fields(
    schema: dict[str, Any], document: dict[str, Any], path: str = "", depth: int = 0
) -> Iterator[tuple[str, str]]:
    """Every (dotted path, type) that a value of the schema may have; `any` is an open one."""
    schema = resolve(schema, document)
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ())]
    for part in parts:
        yield from fields(part, document, path, depth)
    kinds = schema.get("type", [] if parts else "any")
    if "enum" in schema and "type" not in schema:
        kinds = {"str": "string", "int": "integer", "bool": "boolean"}[
            type(schema["enum"][0]).__name__
        ]
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        yield path, kind
    if schema.get("nullable"):
        yield path, "null"
    if depth > 12:
        return
    for name, below in schema.get("properties", {}).items():
        yield from fields(below, document, f"{path}.{name}".strip("."), depth + 1)
    if isinstance(schema.get("items"), dict):
        yield from fields(schema["items"], document, path, depth + 1)


def collected(schema: dict[str, Any], document: dict[str, Any]) -> Paths:
    found: Paths = {}
    for path, kind in fields(schema, document):
        found.setdefault(path, set()).add(kind)
    return found


def covers(ours: Paths, path: str, kind: str) -> bool:
    """Whether a path of this type is described, or lies below something that may be anything."""
    while True:
        here = ours.get(path, set())
        if "any" in here or kind in here or (kind == "integer" and "number" in here):
            return True
        if path in ours and kind != "any":
            return False
        if not path:
            return False
        path, kind = path.rpartition(".")[0], "any"


def body(operation: dict[str, Any]) -> dict[str, Any] | None:
    content = operation.get("requestBody", {}).get("content", {})
    return content.get("application/json", {}).get("schema")


def answer(operation: dict[str, Any]) -> list[dict[str, Any]]:
    content = operation["responses"]["200"].get("content", {})
    return [
        of["schema"] for media, of in content.items() if of.get("schema") and media != "text/plain"
    ]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_operations_and_statuses(path: str, method: str) -> None:
    ours = OURS["paths"][path][method]
    missing = set(THEIRS["paths"][path][method]["responses"]) - set(ours["responses"])
    assert missing == {status for at, status in STATUS_EXCEPTIONS if at == path}


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_parameters(path: str, method: str) -> None:
    theirs, ours = THEIRS["paths"][path][method], OURS["paths"][path][method]
    names = {parameter["name"] for parameter in theirs.get("parameters", ())}
    assert names <= {parameter["name"] for parameter in ours.get("parameters", ())}


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_request_fields(path: str, method: str) -> None:
    theirs = body(THEIRS["paths"][path][method])
    if theirs is None:
        return
    ours = body(OURS["paths"][path][method])
    assert ours is not None
    wanted, there = collected(theirs, THEIRS), collected(ours, OURS)
    missing = {
        name
        for name, kinds in wanted.items()
        if not all(covers(there, name, kind) for kind in kinds - {"null"})
    }
    assert missing == {name for at, name in REQUEST_EXCEPTIONS if at == path}


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_response_fields(path: str, method: str) -> None:
    theirs = answer(THEIRS["paths"][path][method])
    if not theirs:
        return
    ours = answer(OURS["paths"][path][method])
    wanted = collected({"anyOf": theirs}, THEIRS)
    there = collected({"anyOf": ours}, OURS)
    missing = {name for name in wanted if name not in there and not covers(there, name, "any")}
    assert missing == {name for at, name in RESPONSE_EXCEPTIONS if at == path}


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_nothing_more_is_required(path: str, method: str) -> None:
    theirs, ours = body(THEIRS["paths"][path][method]), body(OURS["paths"][path][method])
    if theirs is None or ours is None or path == "/invocations":
        return
    required = set(resolve(ours, OURS).get("required", ()))
    assert required <= set(resolve(theirs, THEIRS).get("required", ()))
