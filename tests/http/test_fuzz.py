"""Bodies made from our own OpenAPI document, and worse ones: never a 500, never silence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.conftest import Site, start_site
from tgi_cli.serve.openapi import Route, build_document
from tgi_cli.serve.routes import ROUTES

SCHEMAS = build_document(ROUTES)["components"]["schemas"]
POSTS = [route for route in ROUTES if route.bodies]
PATIENCE = 20.0  # seconds; an answer takes milliseconds

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def values(schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Mostly what the schema says, sometimes anything at all."""
    return st.one_of(*[_right(schema, depth)] * 5, anything)


def _right(schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        return _right(SCHEMAS[schema["$ref"].rpartition("/")[2]], depth)
    if "anyOf" in schema:
        return st.one_of(*[_right(one, depth) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if depth > 5 or kind is None:
        return anything
    if kind == "object":
        if "properties" not in schema:
            return st.dictionaries(st.text(max_size=4), anything, max_size=2)
        needed = set(schema.get("required", ()))
        parts = {name: values(of, depth + 1) for name, of in schema["properties"].items()}
        return st.fixed_dictionaries(
            {name: part for name, part in parts.items() if name in needed},
            optional={name: part for name, part in parts.items() if name not in needed},
        )
    if kind == "array":
        items = schema.get("items")
        inner = values(items, depth + 1) if isinstance(items, dict) else anything
        return st.lists(inner, max_size=2)
    return {
        "string": st.sampled_from(["user", "text", "a", "tgi", "function", "message"])
        | st.text(max_size=8),
        "integer": st.integers(-2, 9) | st.integers(),
        "number": st.floats(),
        "boolean": st.booleans(),
        "null": st.none(),
    }[kind]


def plain(value: Any) -> Any:
    """Without what JSON cannot hold: not a number, infinity, lone surrogates."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return 1e300
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


@pytest.fixture(scope="module")
def running(byte_folder: Path) -> Iterator[tuple[asyncio.Runner, Site]]:
    with asyncio.Runner() as runner:
        site, stop = runner.run(start_site(byte_folder))
        yield runner, site
        runner.run(stop())


@pytest.mark.parametrize("route", POSTS, ids=lambda route: route.path)
def test_every_body_has_an_answer(running: tuple[asyncio.Runner, Site], route: Route) -> None:
    runner, site = running
    logging.disable(logging.WARNING)  # thousands of unknown fields
    documented = {int(status) for status in _statuses(route)}

    @settings(max_examples=40)
    @given(st.one_of(*[values({"$ref": f"/{body.__name__}"}) for body in route.bodies]))
    def asked(body: Any) -> None:
        async def ask() -> int:
            async with site.session.post(route.path, json=plain(body)) as response:
                await response.read()
                return response.status

        status = runner.run(asyncio.wait_for(ask(), PATIENCE))
        assert status in documented - {500, 503}

    try:
        asked()
    finally:
        logging.disable(logging.NOTSET)
    assert site.engine.running == 0


def _statuses(route: Route) -> list[str]:
    return list(build_document([route])["paths"][route.path][route.method.lower()]["responses"])
