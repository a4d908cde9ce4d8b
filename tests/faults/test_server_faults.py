"""A live server under faults: killed, hung and stopped processes, drains, failed starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.http.live import ENGINE, WORKER, LiveServer, gone, interrupt, wait_until

#: Long enough that a stream is still open when the fault comes.
LONG = {"prompt": "one two", "max_tokens": 15000, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "one two", "max_tokens": 5}


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", max_position_embeddings=16384)


@pytest.fixture
def server(model: Path) -> Iterator[LiveServer]:
    with LiveServer(model, "--dtype", "float32", "--kv-cache-tokens", "70000") as server:
        yield server


class OpenStream:
    """A stream being read in the background."""

    def __init__(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        self.events: list[Any] = []
        self._task = asyncio.create_task(self._read(session, body))

    async def _read(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        async with session.post("/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    self.events.append(json.loads(line[6:]))
                elif line.startswith(b"data: "):
                    self.events.append(line[6:].decode().strip())

    async def begun(self) -> None:
        async with asyncio.timeout(30):
            while not self.events:
                await asyncio.sleep(0.01)

    async def closed(self, timeout: float = 30) -> None:
        await asyncio.wait_for(self._task, timeout)


async def open_streams(session: aiohttp.ClientSession, count: int) -> list[OpenStream]:
    streams = [OpenStream(session, LONG) for _ in range(count)]
    for stream in streams:
        await stream.begun()
    return streams


async def test_engine_killed_in_mid_stream(server: LiveServer) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        streams = await open_streams(session, 4)
        server.child(ENGINE).kill()
        for stream in streams:
            await stream.closed()
            assert "SIGKILL" in stream.events[-1]["error"]["message"]
            assert "error" not in stream.events[0]
    status, body = server.get("/health")
    assert status == 503
    assert "restarting" in body["error"] or "SIGKILL" in body["error"]
    server.wait_ready()
    assert server.post("/v1/completions", SHORT)[0] == 200
    assert server.metrics()["tgi_engine_restarts_total"] == 1
    assert "restarting it (1 of 3)" in server.stderr


async def test_hung_engine_is_killed(model: Path) -> None:
    with LiveServer(model, "--dtype", "float32", "--step-timeout", "3") as server:
        async with aiohttp.ClientSession(server.url) as session:
            (stream,) = await open_streams(session, 1)
            hung = server.child(ENGINE)
            hung.send_signal(signal.SIGSTOP)
            await stream.closed()
            assert "sign of life" in stream.events[-1]["error"]["message"]
        wait_until(lambda: gone([hung]))
        server.wait_ready()


async def test_sigterm_loses_no_accepted_answer(server: LiveServer) -> None:
    body = {**LONG, "max_tokens": 600}
    async with aiohttp.ClientSession(server.url) as session:
        streams = [OpenStream(session, body) for _ in range(8)]
        whole = asyncio.create_task(session.post("/v1/completions", json={**body, "stream": False}))
        for stream in streams:
            await stream.begun()
        family = server.family()
        interrupt(server, signal.SIGTERM)
        for stream in streams:
            await stream.closed()
            assert stream.events[-1] == "[DONE]"
            assert stream.events[-2]["choices"][0]["finish_reason"] == "length"
        async with await whole as response:
            assert response.status == 200
            assert (await response.json())["usage"]["completion_tokens"] == 600
    assert server.process.wait(20) == 0
    wait_until(lambda: gone(family))


async def test_new_requests_are_refused_while_draining(server: LiveServer) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        (stream,) = await open_streams(session, 1)
        async with session.get("/health") as response:
            assert response.status == 200
        interrupt(server, signal.SIGTERM)
        for _ in range(1000):
            try:
                async with session.post("/v1/completions", json=SHORT) as response:
                    if response.status == 503:
                        assert "shutting down" in await response.text()
                        break
            except aiohttp.ClientConnectionError:
                break
        else:
            pytest.fail("a draining server kept accepting")
        interrupt(server, signal.SIGINT)  # in a hurry now
        with contextlib.suppress(aiohttp.ClientError):
            await stream.closed()
    assert server.process.wait(20) == 130


async def test_drain_has_an_end(model: Path) -> None:
    with LiveServer(model, "--dtype", "float32", "-g", "0.5") as server:
        async with aiohttp.ClientSession(server.url) as session:
            (stream,) = await open_streams(session, 1)
            interrupt(server, signal.SIGTERM)
            await stream.closed()
            assert "error" in stream.events[-1]
        assert server.process.wait(20) == 0


def test_http_worker_is_replaced(server: LiveServer) -> None:
    server.child(WORKER).kill()
    wait_until(lambda: any(WORKER in p.cmdline() for p in server.family()[1:]))
    server.wait_ready()
    assert server.post("/v1/completions", SHORT)[0] == 200


def test_children_follow_a_killed_supervisor(server: LiveServer) -> None:
    family = server.family()
    server.process.kill()
    server.process.wait()
    wait_until(lambda: gone(family[1:]))


def test_endless_failures_end_the_server(model: Path) -> None:
    flags = ("--dtype", "float32", "--max-engine-restarts", "1")
    with LiveServer(model, *flags) as server:
        server.child(ENGINE).kill()
        wait_until(lambda: "restarting it (1 of 1)" in server.stderr)
        server.wait_ready()
        family = server.family()
        server.child(ENGINE).kill()
        assert server.process.wait(30) == 1
        assert "after 1 restarts" in server.stderr
        wait_until(lambda: gone(family))


def test_failed_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "architectures": ["X"]}')
    with LiveServer(tmp_path, ready=False) as server:
        family = server.family()
        assert server.process.wait(60) == 1
        stderr = server.stderr
        assert "error: " in stderr
        assert "Traceback" not in stderr
        wait_until(lambda: gone(family))


def test_taken_port(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with LiveServer(model, "--port", port, ready=False) as server:
            assert server.process.wait(30) == 1
            assert f"port {port} on 127.0.0.1 is already in use" in server.stderr
            assert "--port 0" in server.stderr


def test_two_http_workers(model: Path) -> None:
    with LiveServer(model, "--dtype", "float32", "--http-workers", "2") as server:
        assert len([p for p in server.family() if WORKER in p.cmdline()]) == 2
        for _ in range(6):
            assert server.post("/v1/completions", SHORT)[0] == 200
        assert all("worker=" in name for name in server.metrics())


def test_idle_server_uses_no_cpu(server: LiveServer) -> None:
    assert server.post("/v1/completions", SHORT)[0] == 200

    def busy() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in server.family())

    psutil.wait_procs([], timeout=0)
    before = busy()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(server.process.pid).wait(timeout=2)
    assert busy() - before < 0.06
