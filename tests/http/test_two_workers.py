"""Limits hold for the server as a whole, whichever HTTP worker a connection reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.http.live import LiveServer
from tests.http.test_access import bearer, entry, write_keys

PATH = "/v1/completions"
SHORT = {"prompt": "one two", "max_tokens": 1}
LONG = {"prompt": "one two", "max_tokens": 6000, "ignore_eos": True, "stream": True}
PLACES = 6


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    keys = write_keys(
        tmp_path_factory.mktemp("keys") / "keys.toml",
        few=entry("few", requests_per_minute=5),
        narrow=entry("narrow", concurrency=3),
        free=entry("free"),
    )
    model = tiny_checkpoint("llama", max_position_embeddings=16384)
    flags = ("--dtype", "float32", "--kv-cache-tokens", "70000", "--http-workers", "2")
    flags += ("--api-key-file", keys, "--max-concurrent-requests", str(PLACES))
    with LiveServer(model, *flags) as server:
        yield server


class Crowd:
    """Requests on connections of their own, so that both workers get some."""

    def __init__(self, server: LiveServer, key: str) -> None:
        self._url = server.url
        self._key = key
        self._open: list[aiohttp.ClientSession] = []
        self._responses: list[aiohttp.ClientResponse] = []

    async def __aenter__(self) -> Crowd:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for response in self._responses:
            response.close()
        for session in self._open:
            await session.close()

    async def send(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        session = aiohttp.ClientSession(self._url, headers=bearer(self._key))
        self._open.append(session)
        self._responses.append(await session.post(PATH, json=body))
        return self._responses[-1]

    async def statuses(self, body: dict[str, Any], count: int) -> Counter[int]:
        return Counter([(await self.send(body)).status for _ in range(count)])


async def worker_of(session: aiohttp.ClientSession) -> str:
    async with session.get("/metrics") as response:
        line = next(line for line in (await response.text()).splitlines() if "worker=" in line)
    return line.partition('worker="')[2].partition('"')[0]


async def test_both_workers_answer(server: LiveServer) -> None:
    seen = set()
    for _ in range(64):
        async with aiohttp.ClientSession(server.url) as session:
            seen.add(await worker_of(session))
    assert seen == {"0", "1"}


async def test_requests_per_minute(server: LiveServer) -> None:
    async with Crowd(server, "few") as crowd:
        statuses = await crowd.statuses(SHORT, 16)
    assert statuses.keys() == {200, 429}
    assert 5 <= statuses[200] <= 6  # one comes back in 12 seconds


@pytest.mark.parametrize(("key", "most", "says"), [("narrow", 3, "at once"), ("free", PLACES, "")])
async def test_at_once(server: LiveServer, key: str, most: int, says: str) -> None:
    async with Crowd(server, key) as crowd:
        streams = [await crowd.send(LONG) for _ in range(most)]
        assert [stream.status for stream in streams] == [200] * most
        for _ in range(6):
            refused = await crowd.send(SHORT)
            assert refused.status == 429
            assert says in (await refused.json())["error"]["message"]
            assert int(refused.headers["Retry-After"]) >= 1
    async with Crowd(server, key) as crowd:
        for _ in range(100):  # the places are free again once the clients have left
            response = await crowd.send(SHORT)
            if response.status == 200:
                return
    pytest.fail("the places were not given back")
