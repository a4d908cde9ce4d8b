"""Load on a server: who sends when, and what each request experienced.

Closed loop: a fixed number of clients, each sending its next request when the last one ended. Open
loop: requests arrive by a Poisson process whether or not earlier ones have ended, and latency
counts from the planned arrival, so that a slow server cannot hide its queue (the "coordinated
omission" of Gil Tene). Knows nothing of statistics, terminals or files.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec

from tgi_cli.cli.openai_client import OpenAIClient, Usage
from tgi_cli.errors import RemoteError


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much load, and when it ends: after `requests` or `duration`, whichever comes first.

    With `rate` (requests/s) the loop is open and `concurrency` bounds what is in flight; without
    it the loop is closed with `concurrency` clients. Seconds everywhere.
    """

    concurrency: int | None
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None
    timeout: float = 600.0
    seed: int = 0


class RequestRecord(msgspec.Struct, kw_only=True):
    """One finished request. Times in seconds; `start` counts from the beginning of the load.

    `lag` is how late the request was sent; it is part of `ttft` and `e2e` (to the last event, or
    to the failure). `itl` holds the gaps between pieces of text. `error` is a kind to count by,
    `message` the sentence.
    """

    index: int
    start: float
    lag: float = 0.0
    ttft: float | None = None
    e2e: float | None = None
    itl: list[float] = []
    prompt_tokens: int = 0
    completion_tokens: int = 0
    counted_by_server: bool = True
    error: str | None = None
    message: str | None = None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if not self.itl or self.completion_tokens < 2:
            return None
        return sum(self.itl) / (self.completion_tokens - 1)


class Load:
    """One run of a plan. `records` grows while it runs; `stop` ends it early."""

    def __init__(
        self,
        client: OpenAIClient,
        plan: LoadPlan,
        path: str,
        body: Callable[[int], dict[str, Any]],
    ) -> None:
        self.records: list[RequestRecord] = []
        self.in_flight = 0
        self.unfinished = 0  # requests that `stop` cut off
        self._client = client
        self._plan = plan
        self._path = path
        self._body = body
        self._began = time.perf_counter()
        self._next = 0
        self._main: asyncio.Task[None] | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self._began

    @property
    def span(self) -> float:
        """Seconds from the beginning to the last answer, or to now if `stop` cut some off."""
        if self.unfinished or not self.records:
            return self.elapsed
        return max(record.start + (record.e2e or 0.0) for record in self.records)

    async def run(self) -> None:
        """Send everything and wait for the last answer; returns early after `stop`."""
        self._began = time.perf_counter()
        loop = self._closed_loop() if self._plan.rate is None else self._open_loop(self._plan.rate)
        self._main = asyncio.ensure_future(loop)
        try:
            await asyncio.wait([self._main])
        finally:
            self._main.cancel()
        if not self._main.cancelled():
            self._main.result()

    def stop(self) -> None:
        """Cut off what is in flight; the records of finished requests remain."""
        if self._main is not None:
            self._main.cancel()

    def _take(self) -> int | None:
        """The next request's index, None when the plan is fulfilled."""
        plan = self._plan
        if plan.requests is not None and self._next >= plan.requests:
            return None
        if plan.duration is not None and self.elapsed >= plan.duration:
            return None
        self._next += 1
        return self._next - 1

    async def _closed_loop(self) -> None:
        async def client() -> None:
            while (index := self._take()) is not None:
                await self._send(index, self.elapsed)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._plan.concurrency or 1):
                group.create_task(client())

    async def _open_loop(self, rate: float) -> None:
        arrivals = random.Random(self._plan.seed)
        arrival = 0.0
        bound = self._plan.concurrency
        places = asyncio.Semaphore(bound) if bound else contextlib.nullcontext()

        async def send(index: int, planned: float) -> None:
            async with places:
                await self._send(index, planned)

        async with asyncio.TaskGroup() as group:
            while True:
                arrival += arrivals.expovariate(rate)
                if self._plan.duration is not None and arrival >= self._plan.duration:
                    return
                await asyncio.sleep(max(arrival - self.elapsed, 0.0))
                index = self._take()
                if index is None:
                    return
                group.create_task(send(index, arrival))

    async def _send(self, index: int, planned: float) -> None:
        record = RequestRecord(index=index, start=planned)
        self.in_flight += 1
        try:
            async with asyncio.timeout(self._plan.timeout):
                await self._receive(record, planned)
        except TimeoutError:
            record.error = "timeout"
            record.message = f"no complete answer within {self._plan.timeout:g} s"
        except RemoteError as error:
            record.error, record.message = error.kind, error.message
        except asyncio.CancelledError:
            self.unfinished += 1
            raise
        finally:
            self.in_flight -= 1
        if record.error is not None:
            record.e2e = self.elapsed - planned
        self.records.append(record)

    async def _receive(self, record: RequestRecord, planned: float) -> None:
        record.lag = self.elapsed - planned
        usage: Usage | None = None
        pieces = 0
        last = 0.0
        stream = self._client.stream(self._path, self._body(record.index))
        async with contextlib.aclosing(stream) as chunks:
            async for chunk in chunks:
                now = self.elapsed
                record.e2e = now - planned
                usage = chunk.usage or usage
                if not (chunk.text or chunk.reasoning):
                    continue
                pieces += 1
                if record.ttft is None:
                    record.ttft = now - planned
                else:
                    record.itl.append(now - last)
                last = now
        record.counted_by_server = usage is not None
        record.prompt_tokens = usage.prompt_tokens if usage else 0
        record.completion_tokens = usage.completion_tokens if usage else pieces
