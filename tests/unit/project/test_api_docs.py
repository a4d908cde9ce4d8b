"""`docs/api.md` names every route, every field that is read, and every field OpenAI has."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from tgi_cli.serve.openapi import ErrorResponse, OpenAIErrorReply
from tgi_cli.serve.routes import ROUTES

TEXT = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
QUOTED = set(re.findall(r"`([^`\n]+)`", TEXT))
NAMED = QUOTED | set(re.findall(r"\w+", " ".join(QUOTED)))
BODIES = [body for route in ROUTES for body in route.bodies]
SCHEMAS = msgspec.json.schema_components([*BODIES, OpenAIErrorReply, ErrorResponse])[1]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_in_the_docs(route: object) -> None:
    path = route.path.replace(":.+", "")  # type: ignore[attr-defined]
    assert f"{route.method} {path}" in QUOTED  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_field_is_in_the_docs(name: str) -> None:
    assert not set(SCHEMAS[name]["properties"]) - NAMED


def test_every_field_of_openai_is_in_the_docs() -> None:
    theirs = set(ChatParams.__annotations__) | set(CompletionParams.__annotations__)
    assert len(theirs) > 30
    assert not theirs - NAMED


def test_no_route_is_invented() -> None:
    ours = {f"{route.method} {route.path.replace(':.+', '')}" for route in ROUTES}
    written = {quote for quote in QUOTED if re.fullmatch(r"(GET|POST|DELETE) /\S*", quote)}
    assert written == ours
