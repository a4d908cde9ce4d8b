"""Adapters on every route that generates: chosen and reported by name, unknown ones refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.conftest import Serve, Site

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {**CHAT, "max_tokens": 20}),
]
NATIVE = ["/generate", "/generate_stream", "/"]


@pytest.fixture
async def two(serve: Serve) -> Site:
    return await serve(adapters=("pirate", "poet"), served_model_name="base")


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_the_model_field_names_an_adapter(two: Site, path: str, body: Any) -> None:
    status, reply, _ = await two.post(path, {**body, "model": "poet"})
    assert (status, reply["model"]) == (200, "poet")
    for name in ("base", "tgi", "org/bytes"):
        status, reply, _ = await two.post(path, {**body, "model": name})
        assert (status, reply["model"]) == (200, "base")
    assert [request.adapter for request in two.engine.requests] == ["poet", "", "", ""]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_an_unknown_model_is_404_and_names_those_there_are(
    two: Site, path: str, body: Any
) -> None:
    status, reply, _ = await two.post(path, {**body, "model": "bard"})
    assert status == 404
    assert reply["error"]["message"] == (
        "the model `bard` does not exist here; this server has `base` and the adapters "
        "`pirate`, `poet`"
    )
    assert two.engine.requests == []


@pytest.mark.parametrize(("path", "body"), ROUTES[:2])
async def test_adapter_id_of_openais_routes(two: Site, path: str, body: Any) -> None:
    status, reply, _ = await two.post(path, {**body, "model": "base", "adapter_id": "pirate"})
    assert (status, reply["model"]) == (200, "pirate")
    status, _, _ = await two.post(path, {**body, "model": "pirate", "adapter_id": "pirate"})
    assert status == 200
    status, reply, _ = await two.post(path, {**body, "model": "poet", "adapter_id": "pirate"})
    assert status == 400
    assert "`poet` and `adapter_id` names `pirate`" in reply["error"]["message"]
    status, reply, _ = await two.post(path, {**body, "adapter_id": "bard"})
    assert (status, reply["error"]["param"]) == (404, "adapter_id")
    assert [request.adapter for request in two.engine.requests] == ["pirate", "pirate"]


@pytest.mark.parametrize("path", NATIVE)
async def test_adapter_id_of_native_routes(two: Site, path: str) -> None:
    body = {"inputs": "Hi", "parameters": {"adapter_id": "poet", "max_new_tokens": 3}}
    async with two.session.post(path, json=body) as response:
        assert response.status == 200
        await response.read()
    status, reply, _ = await two.post(path, {"inputs": "Hi", "parameters": {"adapter_id": "bard"}})
    assert status == 404
    assert reply["error"] == (
        "the adapter `bard` does not exist here; this server has `pirate`, `poet`"
    )
    assert [request.adapter for request in two.engine.requests] == ["poet"]


async def test_a_server_without_adapters_says_how_to_load_one(site: Site) -> None:
    body = {"inputs": "Hi", "parameters": {"adapter_id": "poet"}}
    status, reply, _ = await site.post("/generate", body)
    assert status == 404
    assert reply["error"].startswith("the adapter `poet` does not exist here; this server has none")
    assert "--lora-adapters" in reply["error"]


async def test_vertex_takes_both(two: Site) -> None:
    instances = [
        {"inputs": "Hi", "parameters": {"adapter_id": "poet"}},
        {**CHAT, "model": "pirate"},
        CHAT,
    ]
    status, reply, _ = await two.post("/vertex", {"instances": instances})
    assert status == 200, reply
    assert sorted(request.adapter for request in two.engine.requests) == ["", "pirate", "poet"]


async def test_models_lists_adapters_with_their_parent(two: Site) -> None:
    async with two.session.get("/v1/models") as response:
        entries = (await response.json())["data"]
    assert [(entry["id"], entry["parent"]) for entry in entries] == [
        ("base", None),
        ("pirate", "base"),
        ("poet", "base"),
    ]
    assert entries[2]["root"] == "org/poet"
    for entry in entries:
        async with two.session.get(f"/v1/models/{entry['id']}") as response:
            assert await response.json() == entry
    async with two.session.get("/v1/models/bard") as response:
        assert response.status == 404
        assert "`pirate`, `poet`" in (await response.json())["error"]["message"]


async def test_info_lists_adapters(two: Site) -> None:
    async with two.session.get("/info") as response:
        adapters = (await response.json())["adapters"]
    assert [(each["name"], each["rank"]) for each in adapters] == [("pirate", 8), ("poet", 8)]
