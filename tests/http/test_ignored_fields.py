"""Fields without effect: named in a header, counted and logged, or refused by `--strict-fields`."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.http.conftest import Serve, Site
from tgi_cli.serve.prometheus import MAX_IGNORED_LABELS

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_named_counted_and_logged_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    body = {**HELLO, "store": True, "verbosity": None, "stream_options": {"shiny": 1}}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            status, _, headers = await site.post(CHAT, body)
            assert status == 200
            assert headers["x-tgi-ignored-fields"] == "store,stream_options.shiny"
    assert [r.getMessage() for r in caplog.records if "store" in r.getMessage()] == [
        f"{CHAT}: `store` is not a field with an effect here"
    ]
    assert (await site.metrics())['tgi_ignored_fields_total{field="store"}'] == 2


async def test_null_is_absent_at_every_depth(site: Site) -> None:
    message = {"role": "user", "content": "Hi", "refusal": None, "audio": None}
    _, _, headers = await site.post(CHAT, {"messages": [message]})
    assert "x-tgi-ignored-fields" not in headers


async def test_names_cannot_grow_the_metrics_without_bound(site: Site) -> None:
    for i in range(0, MAX_IGNORED_LABELS + 50, 50):
        await site.post(CHAT, {**HELLO, **{f"x{j}": 1 for j in range(i, i + 50)}})
    named = [name for name in await site.metrics() if name.startswith("tgi_ignored_fields_total")]
    assert len(named) == MAX_IGNORED_LABELS + 1
    assert (await site.metrics())['tgi_ignored_fields_total{field="other"}'] == 50


@pytest.mark.parametrize(
    ("path", "body", "name", "status"),
    [
        (CHAT, {**HELLO, "store": True}, "store", 400),
        (CHAT, {**HELLO, "reasoning_effort": "low"}, "reasoning_effort", 400),
        ("/v1/completions", {"prompt": "a", "colour": 1}, "colour", 400),
        ("/generate", {"inputs": "a", "parameters": {"tone": 1}}, "parameters.tone", 422),
        ("/vertex", {"instances": [{"inputs": "a", "tone": 1}]}, "instances[].tone", 422),
    ],
)
async def test_strict_servers_refuse_them(
    serve: Serve, path: str, body: dict[str, Any], name: str, status: int
) -> None:
    site = await serve(strict_fields=True)
    got, reply, _ = await site.post(path, body)
    assert got == status
    message = reply["error"]["message"] if status == 400 else reply["error"]
    assert f"`{name}` would have no effect here" in message
    assert "--strict-fields" in message
    assert not site.engine.requests


async def test_strict_servers_take_everything_else(serve: Serve) -> None:
    site = await serve(strict_fields=True)
    assert (await site.post(CHAT, {**HELLO, "temperature": 0, "store": None}))[0] == 200
