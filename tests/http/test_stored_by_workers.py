"""Responses kept by several HTTP workers: whichever a client reaches, it finds its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.http.live import WORKER, LiveServer
from tests.http.test_access import bearer, entry, write_keys
from tests.http.test_two_workers import worker_of
from tests.unit.text.templates import CHATML

PATH = "/v1/responses"
SHORT = {"input": "one two", "max_output_tokens": 3, "temperature": 0}
LONG = {"input": "one", "max_output_tokens": 8000, "background": True, "stop": "\x00never\x00"}

Sessions = list[aiohttp.ClientSession]


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("given")
    keys = write_keys(
        folder / "keys.toml", ann=entry("ann"), bob=entry("bob", requests_per_minute=60)
    )
    (folder / "chat.jinja").write_text(CHATML)
    model = tiny_checkpoint("llama", max_position_embeddings=16384)
    flags = ("--dtype", "float32", "--kv-cache-tokens", "70000", "--http-workers", "2")
    flags += ("--api-key-file", keys, "--chat-template", str(folder / "chat.jinja"))
    with LiveServer(model, *flags) as server:
        yield server


async def sessions_of(server: LiveServer, key: str) -> Sessions:
    """A kept connection to each worker."""
    found: dict[str, aiohttp.ClientSession] = {}
    while len(found) < 2:
        connector = aiohttp.TCPConnector(limit=1)
        session = aiohttp.ClientSession(server.url, headers=bearer(key), connector=connector)
        worker = await worker_of(session)
        if worker in found:
            await session.close()
        else:
            found[worker] = session
    return [found["0"], found["1"]]


@pytest.fixture
async def workers(server: LiveServer) -> AsyncIterator[Sessions]:
    sessions = await sessions_of(server, "ann")
    yield sessions
    for session in sessions:
        await session.close()


@pytest.mark.parametrize("first", [0, 1])
async def test_what_one_keeps_the_other_finds(workers: Sessions, first: int) -> None:
    mine, other = workers[first], workers[1 - first]
    async with mine.post(PATH, json=SHORT) as reply:
        made = await reply.json()
        assert (reply.status, made["store"]) == (200, True)
    where = f"{PATH}/{made['id']}"
    async with other.get(where, headers={"x-request-id": "abc"}) as reply:
        assert await reply.json() == made
        assert reply.headers.getall("x-request-id") == ["abc"]
    async with other.get(f"{where}/input_items") as reply:
        [item] = (await reply.json())["data"]
        assert item["content"] == [{"type": "input_text", "text": "one two"}]
    # A conversation goes on where it is kept, whole or streamed.
    going_on = {**SHORT, "previous_response_id": made["id"], "input": "three"}
    async with other.post(PATH, json=going_on) as reply:
        second = await reply.json()
    async with mine.post(PATH, json=going_on) as reply:
        again = await reply.json()
    assert second["output"][0]["content"] == again["output"][0]["content"]
    assert second["usage"]["input_tokens"] == again["usage"]["input_tokens"]
    assert second["usage"]["input_tokens"] > made["usage"]["input_tokens"]
    async with other.post(PATH, json={**going_on, "stream": True}) as reply:
        assert reply.content_type == "text/event-stream"
        events = [json.loads(line[6:]) async for line in reply.content if line[:5] == b"data:"]
    assert events[-1]["response"]["usage"]["input_tokens"] == again["usage"]["input_tokens"]
    async with other.delete(where) as reply:
        assert (await reply.json())["deleted"] is True
    for session in workers:
        async with session.get(where) as reply:
            assert reply.status == 404
        async with session.post(PATH, json=going_on) as reply:
            assert reply.status == 404


async def test_the_background_is_followed_and_ended_from_elsewhere(workers: Sessions) -> None:
    mine, other = workers
    async with mine.post(PATH, json=LONG) as reply:
        where = f"{PATH}/{(await reply.json())['id']}"
    async with other.get(where, params={"stream": "true"}) as reply:
        numbers = []
        async for line in reply.content:
            if line.startswith(b"data:"):
                numbers.append(json.loads(line[6:])["sequence_number"])
            if len(numbers) == 6:
                break
    assert numbers == [0, 1, 2, 3, 4, 5]
    async with other.post(f"{where}/cancel") as reply:
        assert (await reply.json())["status"] == "cancelled"
    async with mine.get(where) as reply:
        assert (await reply.json())["status"] == "cancelled"


async def test_keys_hold_where_it_is_kept(server: LiveServer, workers: Sessions) -> None:
    async with workers[0].post(PATH, json=SHORT) as reply:
        made = await reply.json()
    where = f"{PATH}/{made['id']}"
    others = await sessions_of(server, "bob")
    for session in others:
        async with session.get(where) as reply:
            assert reply.status == 404
    async with aiohttp.ClientSession(server.url) as nobody:
        for _ in range(8):
            async with nobody.get(where, headers={"Connection": "close"}) as reply:
                assert reply.status == 401
    # Passed on or not, a request counts once against its key.
    async with others[0].post(PATH, json=SHORT) as reply:
        own = await reply.json()
        before = int(reply.headers["x-ratelimit-remaining-requests"])
    going_on = {**SHORT, "previous_response_id": own["id"]}
    async with others[1].post(PATH, json=going_on) as reply:
        assert reply.status == 200
        assert int(reply.headers["x-ratelimit-remaining-requests"]) >= before - 1
    for session in others:
        await session.close()


async def test_who_hangs_up_leaves_no_traceback(server: LiveServer, workers: Sessions) -> None:
    mine, _ = workers
    async with mine.post(PATH, json=LONG) as reply:
        where = f"{PATH}/{(await reply.json())['id']}?stream=true"
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = f"GET {where} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer ann\r\n\r\n"
    for _ in range(60):  # half of them reach the other worker
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode())
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"sequence_number")
        writer.transport.abort()  # a reset, and not a farewell
    async with mine.post(f"{where.partition('?')[0]}/cancel") as reply:
        assert reply.status == 200, await reply.text()
    assert "Traceback" not in server.stderr


async def test_what_is_not_http_leaves_no_traceback(server: LiveServer) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/9.9\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    async with asyncio.timeout(10):
        while "not HTTP" not in server.stderr:
            await asyncio.sleep(0.05)
    assert "Traceback" not in server.stderr


def oldest_worker(server: LiveServer) -> psutil.Process:
    """Number 0, until it is replaced."""
    found = (p for p in server.family() if WORKER in p.cmdline())
    return min(found, key=psutil.Process.create_time)


async def test_an_answer_whose_worker_dies_does_not_look_whole(
    server: LiveServer, workers: Sessions
) -> None:
    mine, other = workers
    async with mine.post(PATH, json=LONG) as reply:
        where = f"{PATH}/{(await reply.json())['id']}"
    async with other.get(where, params={"stream": "true"}) as reply:
        assert b"event" in await reply.content.readline()
        oldest_worker(server).kill()
        with pytest.raises(aiohttp.ClientPayloadError):
            await reply.read()
    assert "worker 0 was lost in the middle of an answer" in server.stderr
    assert "Traceback" not in server.stderr


async def test_a_worker_that_dies_takes_its_own_along(
    server: LiveServer, workers: Sessions
) -> None:
    made = []
    for session in workers:
        async with session.post(PATH, json=SHORT) as reply:
            made.append((await reply.json())["id"])
    oldest_worker(server).kill()
    statuses = set()
    async with asyncio.timeout(60):
        while 404 not in statuses:
            for session in workers:
                try:
                    for name in made:
                        async with session.get(f"{PATH}/{name}") as reply:
                            statuses.add(reply.status)
                except aiohttp.ClientConnectionError:
                    continue  # it was the one that died
            await asyncio.sleep(0.05)
    assert statuses <= {200, 404, 503}
    assert 200 in statuses
