"""A live HTTP worker application over a scripted engine, on a free port of the loopback."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.http.byte_tokenizer import write_byte_tokenizer
from tests.http.scripted import ScriptedClient, byte_facts
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.config import ServerConfig
from tgi_cli.engine.messages import Request
from tgi_cli.serve.app import build_app
from tgi_cli.serve.frontdoor import Texts
from tgi_cli.serve.keys import DOOR
from tgi_cli.tokenizer import load_tokenizer


class Site:
    """One application being served: its address, its engine, and short ways to talk to it."""

    def __init__(self, app: web.Application, engine: ScriptedClient, base_url: str) -> None:
        self.app = app
        self.engine = engine
        self.base_url = base_url
        self.session = aiohttp.ClientSession(base_url=base_url)

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any, Any]:
        """Status, decoded JSON and headers of a POST of JSON."""
        async with self.session.post(path, json=body, **kwargs) as response:
            return response.status, await response.json(), response.headers

    async def stream(self, path: str, body: Any) -> list[Any]:
        """All `data:` payloads of a streamed answer, `[DONE]` as that string."""
        async with self.session.post(path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            text = await response.text()
        payloads = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        return [p if p == "[DONE]" else json.loads(p) for p in payloads]

    def prompt_text(self, request: Request) -> str:
        """The prompt of a request that reached the engine, as text."""
        return self.app[DOOR].texts.tokenizer.decode(request.prompt_ids, False)

    async def metrics(self) -> dict[str, float]:
        """Every sample of `/metrics` by its name and labels as written."""
        async with self.session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}


Serve = Callable[..., Awaitable[Site]]


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))


async def start_site(
    byte_folder: Path,
    *,
    opened: bool = True,
    max_model_len: int = 512,
    adapters: Sequence[str] = (),
    **options: Any,
) -> tuple[Site, Callable[[], Awaitable[None]]]:
    """A running application and how to stop it; options of ServerConfig."""
    tokenizer = load_tokenizer(str(byte_folder))
    facts = byte_facts(str(byte_folder), max_model_len=max_model_len, adapters=adapters)
    engine = ScriptedClient(lambda text: tokenizer.encode(text, False), facts)
    app = build_app(ServerConfig(**options), engine, model_id="org/bytes")
    if opened:
        app[DOOR].open(Texts(tokenizer, ChatTemplate.of(tokenizer)), facts)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    site = Site(app, engine, f"http://127.0.0.1:{runner.addresses[0][1]}")

    async def stop() -> None:
        await site.session.close()
        await runner.cleanup()

    return site, stop


@pytest.fixture
async def serve(byte_folder: Path) -> AsyncIterator[Serve]:
    """Start an application: `await serve(max_concurrent_requests=2)`; options of ServerConfig."""
    stops: list[Callable[[], Awaitable[None]]] = []

    async def start(**options: Any) -> Site:
        site, stop = await start_site(byte_folder, **options)
        stops.append(stop)
        return site

    yield start
    for stop in stops:
        await stop()


@pytest.fixture
async def site(serve: Serve) -> Site:
    """One application with default options."""
    return await serve()
