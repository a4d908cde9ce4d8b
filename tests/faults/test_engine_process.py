"""What happens to streams and processes when one end of the engine's sockets goes away."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from tests.faults.engine_process import EngineChild, config_of, connected, running
from tgi_cli.engine.messages import Ready, Request, Starting
from tgi_cli.engine.process_client import ProcessClient
from tgi_cli.errors import EngineUnavailable
from tgi_cli.sampling import SamplingParams


def endless(request_id: str, num_prompt: int = 5) -> Request:
    sampling = SamplingParams(max_tokens=500, ignore_eos=True, seed=1)
    return Request(id=request_id, prompt_ids=[7] * num_prompt, sampling=sampling)


def short(request_id: str) -> Request:
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.0)
    return Request(id=request_id, prompt_ids=[7, 8], sampling=sampling)


async def tokens_of(client: ProcessClient, request: Request) -> list[int]:
    async with aclosing(client.generate(request)) as deltas:
        return [token async for delta in deltas for token in delta.token_ids]


@pytest.fixture(scope="module")
def shared_engine(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[EngineChild, Ready]]:
    """For tests that leave the engine alive."""
    with running(config_of(tiny_checkpoint("llama")), tmp_path_factory.mktemp("run")) as started:
        yield started


async def test_answers_and_statistics_arrive(shared_engine: tuple[EngineChild, Ready]) -> None:
    child, ready = shared_engine
    assert isinstance(child.statuses[0], Starting)
    assert ready.facts.max_model_len == 512
    client = connected(ready)
    first, second = await asyncio.gather(
        tokens_of(client, short("a")), tokens_of(client, short("b"))
    )
    assert first == second
    assert len(first) == 3
    assert client.stats.generated_tokens >= 6
    assert client.stats.kv_blocks_used == 0
    await client.close()


async def test_an_idle_engine_uses_no_processor(shared_engine: tuple[EngineChild, Ready]) -> None:
    child, ready = shared_engine
    client = connected(ready)
    await tokens_of(client, short("a"))
    process = psutil.Process(child.process.pid)
    before = process.cpu_times()
    await asyncio.sleep(1.0)
    after = process.cpu_times()
    used = (after.user + after.system) - (before.user + before.system)
    assert used <= 0.02  # two ticks of the clock that counts it
    await client.close()


async def test_leaving_a_stream_frees_its_blocks(shared_engine: tuple[EngineChild, Ready]) -> None:
    client = connected(shared_engine[1])
    async with aclosing(client.generate(endless("left"))) as deltas:
        async for _ in deltas:
            break
    assert client.num_open == 0
    await tokens_of(client, short("after"))
    assert client.stats.num_running == 0
    assert client.stats.kv_blocks_used == 0
    await client.close()


async def test_a_worker_that_vanishes_is_forgotten(
    shared_engine: tuple[EngineChild, Ready],
) -> None:
    """Its socket closes without an abort, as when the worker's process is killed."""
    ready = shared_engine[1]
    gone, other = connected(ready), connected(ready)
    streams = [gone.generate(endless(f"orphan-{i}")) for i in range(3)]
    for stream in streams:
        await anext(stream)
    gone._socket.close()  # type: ignore[union-attr]
    gone._socket = None
    deadline = time.monotonic() + 20
    while True:
        await tokens_of(other, short("probe"))
        if other.stats.num_running == 0 and other.stats.kv_blocks_used == 0:
            break
        assert time.monotonic() < deadline, other.stats
    for stream in streams:
        await stream.aclose()
    await gone.close()
    await other.close()


async def test_a_request_the_engine_refuses_ends_alone(
    shared_engine: tuple[EngineChild, Ready],
) -> None:
    client = connected(shared_engine[1])
    good = asyncio.create_task(tokens_of(client, short("good")))
    deltas = [delta async for delta in client.generate(endless("long", num_prompt=600))]
    assert [delta.finish for delta in deltas] == ["error"]
    assert "600 tokens" in (deltas[0].error or "")
    bad_id = Request(id="bad", prompt_ids=[10**6], sampling=SamplingParams())
    deltas = [delta async for delta in client.generate(bad_id)]
    assert deltas[-1].finish == "error"
    assert "1000000" in (deltas[-1].error or "")
    assert len(await good) == 3
    await client.close()


async def test_signals_are_left_to_the_supervisor(shared_engine: tuple[EngineChild, Ready]) -> None:
    child, ready = shared_engine
    child.process.send_signal(signal.SIGTERM)
    child.process.send_signal(signal.SIGINT)
    client = connected(ready)
    assert len(await tokens_of(client, short("still here"))) == 3
    await client.close()


async def test_a_killed_engine_ends_every_stream_at_once(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with running(config_of(tiny_checkpoint("llama")), tmp_path) as (child, ready):
        client = connected(ready)
        streams = [client.generate(endless(f"r{i}")) for i in range(4)]
        for stream in streams:
            await anext(stream)
        child.process.kill()
        # What a supervisor does: it reads the end of the channel and tells the workers.
        while await asyncio.to_thread(child.next_status) is not None:
            pass
        client.disconnect("restarting: the engine was killed")
        for stream in streams:
            with pytest.raises(EngineUnavailable, match="was killed"):
                async for _ in stream:
                    pass
        assert client.state == "restarting: the engine was killed"
        with pytest.raises(EngineUnavailable, match="was killed"):
            await anext(client.generate(short("too early")))
        await client.close()


@pytest.mark.parametrize("busy", [False, True])
async def test_the_engine_ends_with_its_channel(
    busy: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with running(config_of(tiny_checkpoint("llama")), tmp_path) as (child, ready):
        client = connected(ready)
        if busy:
            stream = client.generate(endless("r"))
            await anext(stream)
        child.control.close()
        assert await asyncio.to_thread(child.process.wait, 10) == 0
        client.disconnect("gone")
        await client.close()


def test_a_broken_folder_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    child = EngineChild(tmp_path)
    try:
        child.start(config_of(folder))
        status = child.failed()
        assert status.error in {"CheckpointError", "UnsupportedModel", "ModelMissing"}
        assert "\n" not in status.message
        assert child.process.wait(20) == 1
        assert child.process.stderr is not None
        assert b"Traceback" not in child.process.stderr.read()
    finally:
        child.end()


def test_shards_that_cannot_work_are_refused_before_any_is_started(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    child = EngineChild(tmp_path)
    try:
        child.start(config_of(tiny_checkpoint("llama"), num_shard=3))
        status = child.failed()
        assert status.error == "UsageError"
        assert status.message == (
            "the model does not divide into 3 shards: it has 4 attention heads and 2 key/value "
            "heads"
        )
        assert status.hint == "use --num-shard 2 (1 and 2 work)"
    finally:
        child.end()


def test_torch_is_not_imported_before_the_first_status() -> None:
    code = (
        "import sys, tgi_cli.engine.process, tgi_cli.engine.process_client;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
