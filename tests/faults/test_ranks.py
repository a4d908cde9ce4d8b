"""Ranks that die, stop, fail or are left behind: named at once, and nothing stays."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.faults.engine_process import EngineChild, config_of, connected, running
from tests.faults.test_engine_process import endless, short, tokens_of
from tests.faults.test_server_faults import FLAGS, SHORT, open_streams
from tests.http.live import LiveServer, gone, wait_until
from tgi_cli.engine.messages import Failed, Heartbeat
from tgi_cli.kernels.cpu import library

WORKER = "tgi_cli.engine.worker"

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")


def workers(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if WORKER in child.cmdline()]


def failure(child: EngineChild) -> Failed:
    while True:
        status = child.next_status()
        if isinstance(status, Failed):
            return status
        assert isinstance(status, Heartbeat), status


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGSTOP, "gave no sign of life for 1.5 seconds: its process is stopped"),
    ],
)
async def test_a_rank_that_goes_is_named_and_ends_the_engine(
    sent: signal.Signals,
    said: str,
    busy: bool,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = config_of(tiny_checkpoint("llama"), num_shard=2)
    with running(config, tmp_path) as (child, ready):
        client = connected(ready)
        (worker,) = workers(child.process.pid)
        assert worker.pid == ready.facts.ranks[1].pid
        if busy:
            await anext(client.generate(endless("r")))
        else:
            assert len(await tokens_of(client, short("r"))) == 3
        moment = time.monotonic()
        worker.send_signal(sent)
        status = failure(child)
        assert time.monotonic() - moment < 10  # 2 on a machine of its own
        assert status.message == f"rank 1 (process {worker.pid}) {said}"
        assert child.process.wait(10) == 1
        wait_until(lambda: gone([worker]))
        client.disconnect("gone")
        await client.close()


def test_a_rank_that_dies_while_loading_ends_the_start(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    child = EngineChild(tmp_path)
    try:
        child.start(config_of(tiny_checkpoint("llama"), num_shard=2))
        wait_until(lambda: len(workers(child.process.pid)) == 1)
        family = workers(child.process.pid)
        family[0].kill()
        status = child.failed()
        assert status.message == f"rank 1 (process {family[0].pid}) was killed by SIGKILL"
        assert child.process.wait(20) == 1
        wait_until(lambda: gone(family))
    finally:
        child.end()


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
    model = tiny_checkpoint("llama", max_position_embeddings=16384)
    with LiveServer(model, *FLAGS, "--num-shard", "2") as server:
        engine = next(p for p in server.family() if "tgi_cli.engine.process" in p.cmdline())
        (worker,) = workers(engine.pid)
        async with aiohttp.ClientSession(server.url) as session:
            streams = await open_streams(session, 3)
            worker.kill()
            for stream in streams:
                await stream.closed()
                assert "rank 1" in stream.events[-1]["error"]["message"]
                assert "SIGKILL" in stream.events[-1]["error"]["message"]
        server.wait_ready()
        assert server.post("/v1/completions", SHORT)[0] == 200
        info = server.get("/info")[1]
        assert info["num_shard"] == 2
        ranks = [(rank["rank"], rank["pid"]) for rank in info["ranks"]]
        assert [rank for rank, _ in ranks] == [0, 1]
        assert all(psutil.pid_exists(pid) for _, pid in ranks)
        held = [name for name in server.metrics() if name.startswith("tgi_rank_weights_bytes{")]
        assert len(held) == 2
        assert "ERROR" in server.stderr
        wait_until(lambda: gone([worker, engine]))
        family = server.family()
    wait_until(lambda: gone(family))
