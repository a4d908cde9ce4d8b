"""Open answers: what a reader gets, and what a shortcut takes in its place."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.runtime.harness import make_request
from tgi_cli.engine.client import Shortcut
from tgi_cli.engine.messages import Delta
from tgi_cli.engine.streams import StreamTable


class Reading:
    """Reads one answer in a task of its own, as the HTTP side does."""

    def __init__(self, table: StreamTable, name: str, shortcut: Shortcut | None = None) -> None:
        self.aborted: list[str] = []
        self.read: list[int] = []
        self.resume = asyncio.Event()
        self.resume.set()
        request = make_request([1], request_id=name, max_tokens=60)
        deltas = table.read(
            request, send=lambda _: None, abort=self.aborted.append, shortcut=shortcut
        )

        async def read() -> None:
            async for delta in deltas:
                self.read += delta.token_ids
                await self.resume.wait()

        self.task = asyncio.create_task(read())


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def delta(name: str, token: int, finish: str | None = None) -> Delta:
    return Delta(id=name, token_ids=[token], finish=finish)


async def test_a_shortcut_is_offered_only_what_a_waiting_reader_would_get() -> None:
    table = StreamTable()
    taken: list[int] = []

    def shortcut(delta: Delta) -> bool:
        if delta.token_ids[0] % 5 == 0:
            return False
        taken.extend(delta.token_ids)
        return True

    reading = Reading(table, "a", shortcut)
    await turns()
    table.feed([delta("a", 1), delta("a", 2)])
    assert (taken, reading.read) == ([1, 2], [])
    # One that it leaves wakes the reader; what comes before the reader has run waits behind it.
    table.feed([delta("a", 5), delta("a", 6)])
    reading.resume.clear()
    await turns()
    assert (taken, reading.read) == ([1, 2], [5, 6])
    table.feed([delta("a", 7)])  # the reader is busy
    assert taken == [1, 2]
    reading.resume.set()
    await turns()
    table.feed([delta("a", 8)])
    assert (taken, reading.read) == ([1, 2, 8], [5, 6, 7])
    [stream] = table.open_streams()
    assert stream.received == [1, 2, 5, 6, 7, 8]
    table.feed([delta("a", 10, "length")])
    await reading.task
    assert reading.read == [5, 6, 7, 10]
    assert not reading.aborted


async def test_a_shortcut_that_fails_ends_its_own_answer() -> None:
    table = StreamTable()

    def shortcut(delta: Delta) -> bool:
        raise ZeroDivisionError

    bad, good = Reading(table, "bad", shortcut), Reading(table, "good")
    await turns()
    table.feed([delta("bad", 1), delta("good", 1, "length")])
    with pytest.raises(ZeroDivisionError):
        await bad.task
    await good.task
    assert (bad.aborted, good.read) == (["bad"], [1])
