"""Routes of hosting platforms, `/detokenize`, and the document that describes every route."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from aiohttp import web

from tests.http.conftest import Serve, Site
from tgi_cli.serve.keys import DOOR

MESSAGES = [{"role": "user", "content": "Hi"}]


async def test_detokenize_undoes_tokenize(site: Site) -> None:
    text = "naïve 🎈"
    _, tokens, _ = await site.post("/tokenize", {"inputs": text})
    ids = [token["id"] for token in tokens]
    status, body, _ = await site.post("/detokenize", {"tokens": [256, *ids], "model": "tgi"})
    assert (status, body) == (200, {"prompt": f"<s>{text}"})
    assert (await site.post("/detokenize", {"tokens": []}))[1] == {"prompt": ""}
    for bad, status, says in (
        ({}, 422, "`tokens` is required"),
        ({"tokens": ["a"]}, 422, "`tokens"),
        ({"tokens": [258]}, 422, "Given: 258"),
        ({"tokens": [1], "model": "other"}, 404, "`other`"),
    ):
        answered, body, _ = await site.post("/detokenize", bad)
        assert answered == status
        assert says in body["error"]


async def test_tokenize_in_vllms_shape(site: Site) -> None:
    tokenizer = site.app[DOOR].texts.tokenizer
    hi = tokenizer.encode("Hi", True)
    _, body, headers = await site.post("/tokenize", {"prompt": "Hi", "model": "tgi"})
    assert body == {"count": len(hi), "max_model_len": 512, "tokens": hi, "token_strs": None}
    assert "x-tgi-ignored-fields" not in headers
    bare = {"prompt": " Hi", "add_special_tokens": False, "return_token_strs": True}
    _, body, _ = await site.post("/tokenize", bare)
    assert (body["count"], body["tokens"]) == (3, tokenizer.encode(" Hi", False))
    assert body["token_strs"] == ["Ġ", "H", "i"]
    assert (await site.post("/detokenize", {"tokens": body["tokens"]}))[1] == {"prompt": " Hi"}
    assert (await site.post("/tokenize", {"prompt": ""}))[1]["count"] == 0

    _, chat, _ = await site.post("/tokenize", {"messages": MESSAGES})
    await site.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1})
    assert chat["tokens"] == site.engine.requests[-1].prompt_ids
    left_open = {"messages": MESSAGES, "add_generation_prompt": False}
    _, shorter, _ = await site.post("/tokenize", left_open)
    assert shorter["tokens"] == chat["tokens"][: shorter["count"]]
    assert 0 < shorter["count"] < chat["count"]
    # With `inputs` it is TGI's body, whatever else is there.
    _, tokens, _ = await site.post("/tokenize", {"inputs": "a", "prompt": "b"})
    assert [token["text"] for token in tokens][-1] == "a"
    for bad, status, says in (
        ({}, 422, "`inputs` is required"),
        ({"prompt": 3}, 422, "`prompt`"),
        ({"prompt": "a", "model": "other"}, 404, "`other`"),
        ({"messages": []}, 422, "at least one message"),
        ({"messages": MESSAGES, "continue_final_message": True}, 422, "exclude each other"),
        ({"messages": MESSAGES, "chat_template": "x"}, 422, "--chat-template"),
    ):
        answered, body, _ = await site.post("/tokenize", bad)
        assert answered == status, body
        assert says in body["error"]


async def test_invocations_takes_every_kind_of_body(site: Site) -> None:
    _, native, _ = await site.post("/invocations", {"inputs": "Say: "})
    assert native == [{"generated_text": "Say: Hello, world"}]
    _, chat, _ = await site.post("/invocations", {"messages": MESSAGES, "inputs": None})
    assert chat["choices"][0]["message"]["content"] == "Hello, world"
    _, completion, _ = await site.post("/invocations", {"prompt": "Say: ", "max_tokens": 5})
    assert completion["choices"][0]["text"] == "Hello"
    events = await site.stream("/invocations", {"inputs": "Say: ", "stream": True})
    assert events[-1]["generated_text"] == "Say: Hello, world"
    events = await site.stream("/invocations", {"messages": MESSAGES, "stream": True})
    assert events[-1] == "[DONE]"
    for bad, says in (
        ({}, "`inputs`"),
        ([], "`inputs`"),
        ("text", "`messages`"),
        ({"messages": []}, "at least one message"),
        ({"inputs": 3}, "`inputs`"),
    ):
        status, body, _ = await site.post("/invocations", bad)
        assert status == 422
        assert says in body["error"]
        assert body["error_type"] == "validation"


async def test_vertex_answers_every_instance(site: Site) -> None:
    site.engine.reply = lambda request: f"{len(request.prompt_ids)}"
    instances: list[dict[str, Any]] = [
        {"inputs": "abc"},
        {"messages": MESSAGES},
        {"inputs": "abcde", "parameters": {"max_new_tokens": 1, "seed": 5, "top_k": 2}, "x": 1},
    ]
    status, body, headers = await site.post("/vertex", {"instances": instances, "parameters": {}})
    assert status == 200
    assert body == {"predictions": ["3", str(len("[user]Hi\n[assistant]")), "5"]}
    assert set(headers["x-tgi-ignored-fields"].split(",")) == {"parameters", "instances[].x"}
    last = site.engine.requests[-1].sampling
    assert (last.max_tokens, last.seed, last.top_k) == (1, 5, 2)


@pytest.mark.parametrize(
    ("instances", "says"),
    [
        ([], "at least one instance"),
        ([1], "instances"),
        ([{}], "in `instances[0]`: `messages` is required"),
        ([{"inputs": "a"}, {"inputs": ""}], "in `instances[1]`: `inputs` cannot be empty"),
        ([{"inputs": "a", "stream": True}], "`instances[0].stream`"),
        ([{"messages": MESSAGES, "n": 2}], "`instances[0].n`"),
        ([{"messages": MESSAGES, "max_tokens": 0}], "in `instances[0]`: `max_tokens`"),
    ],
)
async def test_bad_vertex(site: Site, instances: list[Any], says: str) -> None:
    status, body, _ = await site.post("/vertex", {"instances": instances})
    assert status == 422
    assert says in body["error"]
    assert site.engine.requests == []


async def test_vertex_counts_against_the_house(serve: Serve) -> None:
    site = await serve(max_concurrent_requests=2)
    status, _, _ = await site.post("/vertex", {"instances": [{"inputs": "a"}] * 3})
    assert status == 422
    status, body, _ = await site.post("/vertex", {"instances": [{"inputs": "a"}] * 2})
    assert (status, len(body["predictions"])) == (200, 2)


def registered(app: web.Application) -> set[tuple[str, str]]:
    """Method and path of every route in the application, as the document would spell them."""
    return {
        (route.method.lower(), re.sub(r":[^}]*\}", "}", route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }


def references(value: Any) -> set[str]:
    """Every `$ref` inside a document."""
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


async def test_every_route_is_in_the_document(serve: Serve) -> None:
    site = await serve(api_key="sesame")
    async with site.session.get("/openapi.json") as response:
        assert response.status == 200
        document = await response.json()
    async with site.session.get("/api-doc/openapi.json") as response:
        assert await response.json() == document
    described = {(m, path) for path, methods in document["paths"].items() for m in methods}
    assert described == registered(site.app)
    operations = [o for methods in document["paths"].values() for o in methods.values()]
    assert len({o["operationId"] for o in operations}) == len(operations)
    assert all(o["summary"] and o["responses"] for o in operations)
    schemas = document["components"]["schemas"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}


async def test_the_document_says_which_routes_need_the_key(serve: Serve) -> None:
    site = await serve(api_key="sesame")
    async with site.session.get("/openapi.json") as response:
        paths = (await response.json())["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            async with site.session.request(method, path.replace("{id}", "tgi")) as response:
                assert (response.status == 401) is ("security" in operation), (method, path)
                assert (response.status == 401) <= ("401" in operation["responses"])


class Links(HTMLParser):
    """Collects what a page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.targets += [value or "" for name, value in attributes if name in ("src", "href")]


async def test_docs_page_loads_nothing_from_elsewhere(site: Site) -> None:
    async with site.session.get("/docs") as response:
        assert response.content_type == "text/html"
        page = await response.text()
    links = Links()
    links.feed(page)
    assert {target for target in links.targets if target[0] != "#"} == {"openapi.json"}
    assert all(f'id="{target[1:]}"' in page for target in links.targets if target[0] == "#")
    for method, path in registered(site.app):
        assert f"<code>{method.upper()} {path}</code>" in page
    assert "<code>max_new_tokens</code>" in page
