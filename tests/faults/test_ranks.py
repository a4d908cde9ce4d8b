"""Ranks that die, stop, fail or are left behind: named at once, and nothing stays."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec
import psutil
import pytest
import torch

from tests.faults.engine_process import EngineChild, config_of, connected, running
from tests.faults.frozen import frozen
from tests.faults.test_engine_process import endless, short, tokens_of
from tests.faults.test_server_faults import FLAGS, SHORT, open_streams
from tests.http.live import LiveServer, gone, wait_until
from tgi_cli.cli import env_report
from tgi_cli.engine.messages import Failed, Heartbeat
from tgi_cli.kernels.cpu import library

WORKER = "tgi_cli.engine.worker"

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")


def workers(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if WORKER in child.cmdline()]


def shared_memory(family: list[psutil.Process]) -> set[str]:
    """Names in `/dev/shm` of what these processes map."""
    found = set()
    for process in family:
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
            _, shown, name = line.partition("/dev/shm/")
            if shown:
                found.add(name.removesuffix(" (deleted)"))
    return found


def failure(child: EngineChild) -> Failed:
    while True:
        status = child.next_status()
        if isinstance(status, Failed):
            return status
        assert isinstance(status, Heartbeat), status


class Ticker:
    """Seconds as a process of this machine lives them: on a busy one all sleep longer."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            self.seconds += 0.05


def twice(attempt: Callable[[], float], limit: float) -> None:
    """One of two attempts takes less than `limit` seconds."""
    if (first := attempt()) >= limit:
        assert attempt() < limit, f"and {first} before"


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGSTOP, "gave no sign of life for 1.5 seconds: its process is stopped"),
    ],
)
def test_a_rank_that_goes_is_named_and_ends_the_engine(
    sent: signal.Signals,
    said: str,
    busy: bool,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = config_of(tiny_checkpoint("llama"), num_shard=2)

    async def attempt() -> float:
        with running(config, tmp_path) as (child, ready):
            client = connected(ready)
            (worker,) = workers(child.process.pid)
            assert worker.pid == ready.facts.ranks[1].pid
            if busy:
                await anext(client.generate(endless("r")))
            else:
                assert len(await tokens_of(client, short("r"))) == 3
            with Ticker() as ticker:
                worker.send_signal(sent)
                status = failure(child)
            assert status.message == f"rank 1 (process {worker.pid}) {said}"
            assert child.process.wait(10) == 1
            wait_until(lambda: gone([worker]))
            client.disconnect("gone")
            await client.close()
        return ticker.seconds

    twice(lambda: asyncio.run(attempt()), 2.0)


def test_a_rank_that_hangs_in_native_code_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its main thread is held inside the kernels; its heartbeats go on, its counter does not."""
    config = config_of(tiny_checkpoint("llama", dtype=torch.bfloat16), num_shard=2)
    parallel = msgspec.structs.replace(config.parallel, step_timeout=3.0)
    config = msgspec.structs.replace(config, parallel=parallel)

    async def hang() -> None:
        with running(config, tmp_path) as (child, ready):
            client = connected(ready)
            (worker,) = workers(child.process.pid)
            # Enough work for the minute that it may take to catch the thread in the right place.
            crowd = [asyncio.create_task(tokens_of(client, endless(f"{i}"))) for i in range(200)]
            await anext(client.generate(endless("r")))
            try:
                with frozen(worker.pid, "_native"):
                    status = failure(child)
                    assert child.process.wait(20) == 1
            except PermissionError as error:
                pytest.skip(f"ptrace is not allowed: {error}")
            assert status.message == (
                f"rank 1 (process {worker.pid}) made no progress in a step for 3 seconds "
                "(--step-timeout)"
            )
            wait_until(lambda: gone([worker]))
            client.disconnect("gone")
            await asyncio.gather(*crowd, return_exceptions=True)
            await client.close()

    asyncio.run(hang())


def test_a_rank_that_dies_while_loading_ends_the_start(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_checkpoint("llama")

    def attempt() -> float:
        child = EngineChild(tmp_path)
        try:
            child.start(config_of(model, num_shard=2))
            wait_until(lambda: len(workers(child.process.pid)) == 1)
            family = workers(child.process.pid)
            with Ticker() as ticker:
                family[0].kill()
                status = child.failed()
            assert status.message == f"rank 1 (process {family[0].pid}) was killed by SIGKILL"
            assert child.process.wait(20) == 1
            wait_until(lambda: gone(family))
        finally:
            child.end()
        return ticker.seconds

    twice(attempt, 2.0)


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_follow_a_killed_engine(
    stopped: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with running(config_of(tiny_checkpoint("llama"), num_shard=2), tmp_path) as (child, _):
        family = workers(child.process.pid)
        if stopped:
            family[0].send_signal(signal.SIGSTOP)
        child.process.kill()
        wait_until(lambda: gone(family))


async def test_a_server_says_which_rank_it_lost(tiny_checkpoint: Callable[..., Path]) -> None:
    """Every rank is killed and stopped under load; at the fourth fault the server gives up."""
    model = tiny_checkpoint("llama", max_position_embeddings=16384)
    named: set[str] = set()
    flags = (*FLAGS, "--num-shard", "2", "--max-engine-restarts", "3")
    everyone: list[psutil.Process] = []
    with LiveServer(model, *flags) as server:
        for rank, sent, said in (
            (1, signal.SIGKILL, "was killed by SIGKILL"),
            (0, signal.SIGSTOP, "its process is stopped"),
            (1, signal.SIGSTOP, "its process is stopped"),
            (0, signal.SIGKILL, "was killed by SIGKILL"),
        ):
            engine = server.child("tgi_cli.engine.process")
            (worker,) = workers(engine.pid)
            everyone.extend((engine, worker))
            named |= shared_memory(server.family())
            name = f"rank 1 (process {worker.pid})" if rank == 1 else "the engine"
            async with aiohttp.ClientSession(server.url) as session:
                streams = await open_streams(session, 3)
                (engine, worker)[rank].send_signal(sent)
                for stream in streams:
                    await stream.closed()
                    message = stream.events[-1]["error"]["message"]
                    assert name in message
                    assert said in message
            wait_until(lambda: gone(everyone))
            if len(everyone) == 8:
                break
            status, body = server.get("/health")
            assert status == 503
            assert name in body["error"]
            server.wait_ready()
            assert server.post("/v1/completions", SHORT)[0] == 200
            info = server.get("/info")[1]
            assert info["num_shard"] == 2
            ranks = [(rank["rank"], rank["pid"]) for rank in info["ranks"]]
            assert [rank for rank, _ in ranks] == [0, 1]
            assert all(psutil.pid_exists(pid) for _, pid in ranks)
            held = [name for name in server.metrics() if name.startswith("tgi_rank_weights_bytes{")]
            assert len(held) == 2
            shown = [(each["rank"], each["pid"]) for each in env_report.ranks()]
            assert set(ranks) <= set(shown)
        family = server.family()
        assert server.process.wait(30) == 1
        for process in everyone[1:6:4]:
            assert f"rank 1 (process {process.pid})" in server.stderr
    wait_until(lambda: gone(family))
    pids = {str(process.pid) for process in (*everyone, *family)}
    left = os.listdir("/dev/shm")  # where processes of others come and go too
    assert not [each for each in left if each in named or pids & set(re.findall(r"\d+", each))]
