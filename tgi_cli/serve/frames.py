"""From the events of answers to the frames of one stream, by the shortest way.

A single answer's events become bytes and are written in the callback that brings them, while the
stream's task sleeps; it wakes for the first event, the last one, failures and slow clients. Several
answers are merged in their tasks. Knows no shape: the route gives the function that makes bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from tgi_cli.serve.answer import Answer, Sink, TextEvent, merge
from tgi_cli.serve.sse import Outlet

#: Bytes for events of several answers, by index; empty where they bring nothing to show.
MakeFrame = Callable[[list[tuple[int, TextEvent]]], bytes]


async def frames_of(
    answers: Sequence[Answer], make: MakeFrame, outlet: Outlet
) -> AsyncGenerator[bytes, None]:
    """Yield the frames that did not go through `outlet`; what it took came before the next."""
    if len(answers) == 1:

        def take(event: TextEvent) -> None:
            frame = make([(0, event)])
            if frame:
                outlet.write(frame)

        answers[0].sink = Sink(outlet.ready, take)
    async with aclosing(merge(answers)) as merged:
        async for events in merged:
            frame = make(events)
            if frame:
                yield frame
