"""Many streams at once over a live server: each gets its own answer, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.http.live import LiveServer, wait_until


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Callable[..., Path]) -> Iterator[LiveServer]:
    folder = tiny_checkpoint("llama", max_position_embeddings=4096)
    with LiveServer(folder, "--dtype", "float32", "--kv-cache-tokens", "8192") as server:
        yield server


def requests(count: int) -> list[dict[str, Any]]:
    """Prompts and answers of mixed lengths, greedy and sampled."""
    rng = random.Random(0)
    return [
        {
            "prompt": [rng.randrange(3, 512) for _ in range(rng.randrange(1, 100))],
            "max_tokens": rng.randrange(1, 40),
            "temperature": rng.choice([0, 1]),
            "seed": number,
            "ignore_eos": True,
            "stream": True,
        }
        for number in range(count)
    ]


async def stream(session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
    async with session.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        lines = (await response.text()).split("\n")
    assert lines[-3:] == ["data: [DONE]", "", ""]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events)


async def test_32_streams_equal_their_solo_answers(server: LiveServer) -> None:
    bodies = requests(32)
    async with aiohttp.ClientSession(server.url) as session:
        solo = [await stream(session, body) for body in bodies]
        async with asyncio.timeout(120):
            together = await asyncio.gather(*(stream(session, body) for body in bodies))
    assert len(set(solo)) > 24  # answers that are all alike would prove nothing
    assert together == solo


async def test_disconnects_leak_no_block(server: LiveServer) -> None:
    rng = random.Random(1)

    async def leave_early(session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        response = await session.post("/v1/completions", json=body)
        for _ in range(rng.randrange(4)):
            await response.content.readline()
        response.close()

    async def never_wait(session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await stream(session, body)

    bodies = [{**body, "max_tokens": 2000} for body in requests(30)]
    async with aiohttp.ClientSession(server.url) as session:
        await asyncio.gather(
            *(rng.choice([leave_early, never_wait])(session, body) for body in bodies)
        )
        # The engine's counters come with a step: one more answer brings the news.
        await stream(session, {**bodies[0], "max_tokens": 2})

    def clean() -> bool:
        metrics = server.metrics()
        running = metrics["tgi_running_sequences"] + metrics["tgi_queue_size"]
        return running == 0 and metrics["tgi_kv_blocks_used"] == 0

    wait_until(clean, why=lambda: str(server.metrics()))
    assert server.metrics()["tgi_http_requests_in_flight"] == 1
    assert server.get("/health")[0] == 200
