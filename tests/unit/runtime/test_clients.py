"""Both clients over an engine without a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest

from tests.unit.runtime.harness import make_request
from tests.unit.runtime.test_core import FACTS, CountingExecutor, make_core
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.inline_client import InlineClient
from tgi_cli.engine.messages import Delta, Ready, Request, Starting, TokenLogprobs
from tgi_cli.engine.process import ZmqTransport
from tgi_cli.engine.process_client import ProcessClient
from tgi_cli.engine.streams import StreamTable, merge
from tgi_cli.errors import EngineUnavailable, InvalidRequest


class Stoppable(ZmqTransport):
    """The engine's own transport, with an end for its thread."""

    stopped = False

    def receive(self, *, wait: bool):
        while wait and not self.stopped and not self._socket.poll(20):
            pass
        return None if self.stopped else super().receive(wait=False)


@pytest.fixture(params=["inline", "process"])
async def client(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[InlineClient | ProcessClient, CountingExecutor]]:
    core, executor = make_core()
    if request.param == "inline":
        inline = InlineClient(core)
        yield inline, executor
        await inline.close()
        assert executor.closed
        return
    endpoint = f"ipc://{tmp_path}/engine.sock"
    transport = Stoppable(endpoint)
    thread = threading.Thread(target=run_quietly, args=(core, transport))
    thread.start()
    process = ProcessClient()
    process.connect(Ready(endpoint=endpoint, facts=FACTS))
    yield process, executor
    await process.close()
    transport.stopped = True
    await asyncio.to_thread(thread.join)
    transport._socket.close()
    transport._context.term()


def run_quietly(core: EngineCore, transport: Stoppable) -> None:
    try:
        core.run(transport)
    except RuntimeError:
        transport.stopped = True


@contextmanager
def held_after(executor: CountingExecutor, num_steps: int) -> Iterator[threading.Semaphore]:
    """Hold the engine inside the step after `num_steps`, until the block is left."""
    executor.allowance = allowance = threading.Semaphore(num_steps)
    try:
        yield allowance
    finally:
        executor.allowance = None
        allowance.release(100)


async def collect(client: InlineClient | ProcessClient, request: Request) -> list[Delta]:
    async with aclosing(client.generate(request)) as deltas:
        return [delta async for delta in deltas]


async def test_answers_do_not_mix(client) -> None:
    client, _ = client
    requests = [
        make_request([1] * (1 + i % 7), request_id=f"r{i}", max_tokens=1 + i % 5) for i in range(30)
    ]
    answers = await asyncio.gather(*(collect(client, request) for request in requests))
    for request, deltas in zip(requests, answers, strict=True):
        first = len(request.prompt_ids)
        expected = list(range(first, first + request.sampling.max_tokens))
        assert [token for delta in deltas for token in delta.token_ids] == expected
        assert deltas[-1].finish == "length"
    assert client.stats.generated_tokens == sum(r.sampling.max_tokens for r in requests)
    assert client.facts == FACTS
    assert client.state == "ready"


async def test_leaving_early_aborts(client) -> None:
    client, executor = client
    with held_after(executor, 1):
        stream = client.generate(make_request([1], request_id="left", max_tokens=60))
        await anext(stream)
        await stream.aclose()
    await collect(client, make_request([1, 2], request_id="other", max_tokens=3))
    assert client.stats.num_running == 0
    assert client.stats.kv_blocks_used == 0


async def test_an_id_in_use_is_refused(client) -> None:
    client, executor = client
    with held_after(executor, 1):
        stream = client.generate(make_request([1], request_id="a", max_tokens=60))
        await anext(stream)
        with pytest.raises(InvalidRequest, match="in use"):
            await collect(client, make_request([1], request_id="a"))
    assert await anext(stream)  # the first one is unharmed
    await stream.aclose()


async def test_closing_ends_open_streams(client) -> None:
    client, executor = client
    with held_after(executor, 1) as allowance:
        stream = client.generate(make_request([1], request_id="a", max_tokens=60))
        await anext(stream)
        closing = asyncio.ensure_future(client.close())
        await asyncio.sleep(0)
        allowance.release(100)
        await closing
    with pytest.raises(EngineUnavailable, match="shutting down"):
        async for _ in stream:
            pass
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await collect(client, make_request([1], request_id="b"))


async def test_an_inline_engine_that_dies_says_so(caplog: pytest.LogCaptureFixture) -> None:
    core, executor = make_core()
    client = InlineClient(core)
    executor.error = RuntimeError("out of luck")
    for request_id in ("a", "b"):
        with pytest.raises(EngineUnavailable, match="out of luck"):
            await collect(client, make_request([1], request_id=request_id))
    assert "out of luck" in client.state
    await client.close()


async def test_a_client_without_an_engine_says_what_it_is_doing() -> None:
    client = ProcessClient()
    assert client.facts is None
    client.starting(Starting(phase="downloading", fraction=0.413))
    assert client.state == "downloading 41 %"
    with pytest.raises(EngineUnavailable, match="downloading 41 %"):
        await collect(client, make_request([1]))
    client.starting(Starting(phase="warming up"))
    assert client.state == "warming up"
    await client.close()


async def test_a_new_engine_takes_over(tmp_path: Path) -> None:
    client = ProcessClient()
    transports, threads = [], []
    for epoch in range(2):
        core, executor = make_core()
        endpoint = f"ipc://{tmp_path}/engine-{epoch}.sock"
        transport = Stoppable(endpoint)
        thread = threading.Thread(target=core.run, args=(transport,))
        thread.start()
        transports.append(transport)
        threads.append(thread)
        client.connect(Ready(endpoint=endpoint, facts=FACTS))
        deltas = await collect(client, make_request([1], request_id="same", max_tokens=2))
        assert deltas[-1].finish == "length"
        if epoch == 0:
            with held_after(executor, 1):
                stream = client.generate(make_request([1], request_id="open", max_tokens=60))
                await anext(stream)
                client.disconnect("restarting: tested")
                with pytest.raises(EngineUnavailable, match="tested"):
                    async for _ in stream:
                        pass
    await client.close()
    for transport, thread in zip(transports, threads, strict=True):
        transport.stopped = True
        thread.join()
        transport._socket.close()
        transport._context.term()


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=-1.0, rank=1)


def test_merged_deltas_lose_nothing() -> None:
    first = Delta(
        id="r",
        token_ids=[1],
        logprobs=[entry(1)],
        prompt_logprobs=[None, entry(9)],
        num_cached_tokens=4,
        queue_time=0.5,
    )
    second = Delta(id="r", token_ids=[2, 3], logprobs=[entry(2), entry(3)], finish="eos")
    merged = merge(first, second)
    assert merged == Delta(
        id="r",
        token_ids=[1, 2, 3],
        logprobs=[entry(1), entry(2), entry(3)],
        prompt_logprobs=[None, entry(9)],
        num_cached_tokens=4,
        queue_time=0.5,
        finish="eos",
    )
    assert merge(Delta(id="r", token_ids=[1]), Delta(id="r", token_ids=[2])).logprobs is None


async def test_a_slow_reader_gets_everything_as_one_delta() -> None:
    table = StreamTable()
    stream = table.read(make_request([1]), send=lambda _: None, abort=lambda _: None)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    for token in range(500):
        table.feed([Delta(id="r", token_ids=[token])])
    taken = (await first).token_ids
    table.feed([Delta(id="r", finish="length")])
    rest = await anext(stream)
    assert taken + rest.token_ids == list(range(500))
    assert rest.finish == "length"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert len(table) == 0


async def test_what_arrived_is_read_before_the_failure() -> None:
    table = StreamTable()
    aborted: list[str] = []
    stream = table.read(make_request([1]), send=lambda _: None, abort=aborted.append)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    table.feed([Delta(id="r", token_ids=[5])])
    table.fail(EngineUnavailable("gone"))
    assert (await first).token_ids == [5]
    with pytest.raises(EngineUnavailable, match="gone"):
        await anext(stream)
    assert not aborted  # there is nobody to tell


def test_tokens_received_are_kept_beside_the_request() -> None:
    table = StreamTable()

    async def scenario(check: Callable[[StreamTable], None]) -> None:
        request = make_request([1], [7, 8])
        stream = table.read(request, send=lambda _: None, abort=lambda _: None)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        table.feed([Delta(id="r", token_ids=[9])])
        table.feed([Delta(id="r", token_ids=[10, 11])])
        check(table)
        await first
        await stream.aclose()

    def check(table: StreamTable) -> None:
        [opened] = table.open_streams()
        assert opened.request.prompt_ids == [1]
        assert opened.received == [7, 8, 9, 10, 11]

    asyncio.run(scenario(check))
