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
FLAGS = ("--dtype", "float32", "--kv-cache-tokens", "70000")
SHORT = {"prompt": "one two", "max_tokens": 5}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", max_position_embeddings=16384)


@pytest.fixture(scope="module")
def lasting(model: Path) -> Iterator[LiveServer]:
    """A server that the tests leave in good health."""
    with LiveServer(model, *FLAGS) as server:
        yield server


@pytest.fixture
def mortal(model: Path) -> Iterator[LiveServer]:
    """A server that the test ends."""
    with LiveServer(model, *FLAGS) as server:
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

    async def closed(self, timeout: float = 60) -> None:
        await asyncio.wait_for(self._task, timeout)


async def open_streams(session: aiohttp.ClientSession, count: int) -> list[OpenStream]:
    streams = [OpenStream(session, LONG) for _ in range(count)]
    for stream in streams:
        await stream.begun()
    return streams


def test_idle_server_uses_no_cpu(lasting: LiveServer) -> None:
    assert lasting.post("/v1/completions", SHORT)[0] == 200

    def busy() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in lasting.family())

    before = busy()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(lasting.process.pid).wait(timeout=2)
    assert busy() - before < 0.06


async def test_engine_killed_in_mid_stream(lasting: LiveServer) -> None:
    async with aiohttp.ClientSession(lasting.url) as session:
        streams = await open_streams(session, 4)
        lasting.child(ENGINE).kill()
        for stream in streams:
            await stream.closed()
            assert "SIGKILL" in stream.events[-1]["error"]["message"]
            assert "error" not in stream.events[0]
    status, body = lasting.get("/health")
    assert status == 503
    assert "restarting" in body["error"] or "SIGKILL" in body["error"]

    def says_why_it_loads() -> bool:
        state = lasting.get("/health")[1]["error"]
        assert "SIGKILL" in state, state
        return "load" in state

    wait_until(says_why_it_loads)
    lasting.wait_ready()
    assert lasting.post("/v1/completions", SHORT)[0] == 200
    assert lasting.metrics()["tgi_engine_restarts_total"] == 1
    assert "restarting it (1 of 3)" in lasting.stderr


def test_http_worker_is_replaced(lasting: LiveServer) -> None:
    lasting.child(WORKER).kill()
    wait_until(lambda: any(WORKER in p.cmdline() for p in lasting.family()[1:]))
    lasting.wait_ready()
    assert lasting.post("/v1/completions", SHORT)[0] == 200


async def test_hung_engine_with_two_http_workers(model: Path) -> None:
    flags = (*FLAGS, "--step-timeout", "5", "--http-workers", "2")
    with LiveServer(model, *flags, ready=False) as server:
        status, body = server.get("/health")  # the port is open before anything is loaded
        assert status == 503
        assert body["error"].split()[0] in ("starting", "loading", "warming")
        server.wait_ready()
        assert len([p for p in server.family() if WORKER in p.cmdline()]) == 2
        for _ in range(6):
            assert server.post("/v1/completions", SHORT)[0] == 200
        assert all("worker=" in name for name in server.metrics())
        async with aiohttp.ClientSession(server.url) as session:
            streams = await open_streams(session, 4)
            hung = server.child(ENGINE)
            hung.send_signal(signal.SIGSTOP)
            for stream in streams:
                await stream.closed()
                said = stream.events[-1]["error"]["message"]
                assert "no sign of life for 1.5 seconds: its process is stopped" in said
        wait_until(lambda: gone([hung]))
        server.wait_ready()


async def test_sigterm_loses_no_accepted_answer(mortal: LiveServer) -> None:
    body = {**LONG, "max_tokens": 120}
    async with aiohttp.ClientSession(mortal.url) as session:
        streams = [OpenStream(session, body) for _ in range(8)]
        whole = asyncio.create_task(session.post("/v1/completions", json={**body, "stream": False}))
        for stream in streams:
            await stream.begun()
        family = mortal.family()
        interrupt(mortal, signal.SIGTERM)
        for stream in streams:
            await stream.closed()
            assert stream.events[-1] == "[DONE]"
            assert stream.events[-2]["choices"][0]["finish_reason"] == "length"
        async with await whole as response:
            assert response.status == 200
            assert (await response.json())["usage"]["completion_tokens"] == 120
    assert mortal.process.wait(20) == 0
    wait_until(lambda: gone(family))


async def test_new_requests_are_refused_while_draining(mortal: LiveServer) -> None:
    async with aiohttp.ClientSession(mortal.url) as session:
        (stream,) = await open_streams(session, 1)
        async with session.get("/health") as response:
            assert response.status == 200
        interrupt(mortal, signal.SIGTERM)
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
        interrupt(mortal, signal.SIGINT)  # in a hurry now
        with contextlib.suppress(aiohttp.ClientError):
            await stream.closed()
    assert mortal.process.wait(20) == 130


async def test_drain_has_an_end(model: Path) -> None:
    with LiveServer(model, "--dtype", "float32", "-g", "0.5") as server:
        async with aiohttp.ClientSession(server.url) as session:
            (stream,) = await open_streams(session, 1)
            interrupt(server, signal.SIGTERM)
            await stream.closed()
            assert "error" in stream.events[-1]
        assert server.process.wait(20) == 0


def test_children_follow_a_killed_supervisor(mortal: LiveServer) -> None:
    family = mortal.family()
    mortal.process.kill()
    mortal.process.wait()
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


def test_what_an_http_worker_cannot_load_ends_the_start(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for message in messages %}")
    with LiveServer(model, *FLAGS, "--chat-template", str(broken), ready=False) as server:
        family = server.family()
        assert server.process.wait(60) == 1
        assert "error: the chat template is not valid Jinja" in server.stderr
        assert "hint: " in server.stderr
        assert "Traceback" not in server.stderr
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
