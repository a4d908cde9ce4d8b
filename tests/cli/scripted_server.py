"""An OpenAI-compatible server on loopback whose answers, delays and faults a test decides.

It counts a prompt's tokens as its words plus `extra_prompt_tokens`, like a chat template would add.
It runs in a thread, so that clients in this process and in others can be tested with it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class ScriptedServer:
    text: str = "one two three"  # sent word by word, again and again up to `max_tokens`
    first_delay: float = 0.0
    delay: float = 0.0
    extra_prompt_tokens: int = 0
    send_usage: bool = True
    fail_every: int = 0  # every n-th streaming request gets a 503
    break_after: int | None = None  # pieces after which the connection is cut
    api_key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    answers_cut: int = 0  # streams whose reader went away
    streaming: threading.Event = field(default_factory=threading.Event)
    disconnected: threading.Event = field(default_factory=threading.Event)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted"}]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        body = await request.json()
        self.requests.append(body)
        chat = request.path.endswith("chat/completions")
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        prompt_tokens = len(prompt.split()) + self.extra_prompt_tokens
        words = [word + " " for word in self.text.split(" ")]
        count = body.get("max_tokens") or len(words)
        if not body.get("ignore_eos"):
            count = min(count, len(words))
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
        if not body.get("stream"):
            return web.json_response({"choices": [], "usage": usage})
        streams = sum(bool(seen.get("stream")) for seen in self.requests)
        if self.fail_every and streams % self.fail_every == 0:
            return web.json_response({"error": {"message": "busy"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            if chat:
                await self._send(response, {"delta": {"role": "assistant", "content": ""}})
            await asyncio.sleep(self.first_delay)
            for number in range(count):
                if number == self.break_after:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if number:
                    await asyncio.sleep(self.delay)
                word = words[number % len(words)]
                await self._send(response, {"delta": {"content": word}} if chat else {"text": word})
                self.streaming.set()
            await self._send(response, {"delta": {}, "text": "", "finish_reason": "length"})
            if self.send_usage:
                await response.write(b": keep-alive\r\n\r\n")
                await response.write(_event({"choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionResetError, asyncio.CancelledError):
            self.answers_cut += 1
            self.disconnected.set()
            raise
        return response

    async def _send(self, response: web.StreamResponse, choice: dict[str, Any]) -> None:
        await response.write(_event({"choices": [{"index": 0, **choice}]}))


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@contextmanager
def running(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """Serve on a free port of 127.0.0.1 until the block is left."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
