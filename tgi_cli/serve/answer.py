"""One sequence on its way to a client: engine deltas in, text events out.

The only place that turns token ids back into text for a client, so both APIs stop, hold back and
count alike. An `Answer` keeps the prompt, the parameters and every token received from the engine,
also those whose text is still held back. Knows neither JSON nor SSE.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple

import msgspec

from tgi_cli.detokenizer import Detokenizer
from tgi_cli.engine.client import EngineClient
from tgi_cli.engine.messages import Delta, Request, TokenLogprobs
from tgi_cli.errors import GenerationFailed
from tgi_cli.serve.prometheus import Metrics
from tgi_cli.tokenizer import Tokenizer


class TextEvent(msgspec.Struct, gc=False):
    """What one step added to one answer.

    `text` is new text that can no longer change; `token_texts` and `logprobs` go with `token_ids`.
    `finish` is None, or `length`, `eos`, `stop` (a stop token id) or `stop_string`.
    """

    text: str
    token_ids: Sequence[int]
    token_texts: Sequence[str]
    logprobs: list[TokenLogprobs] | None
    finish: str | None


class Sink(NamedTuple):
    """Where events go at once, while the reader of `Answer.events` waits for the next.

    Attributes:
        ready: Whether it can take one now; if not, the reader gets it.
        take: Takes one that is neither the first nor the last.
    """

    ready: Callable[[], bool]
    take: Callable[[TextEvent], None]


class Answer:
    """Runs one `Request` and remembers what came of it.

    `continues`: the text goes on where the prompt's ends, unlike a new turn of a chat. `marks`
    are special tokens that are part of the text. `on_end` is called once when it is over, also when
    it was left or failed. `finish`, `stop_string` (the one found) and the times (seconds) are
    complete once `events` has been read to its end. `sink` may take events in the reader's place.
    """

    def __init__(
        self,
        request: Request,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        on_end: Callable[[Answer], None],
        continues: bool,
        include_stop: bool,
        marks: Sequence[str] = (),
    ) -> None:
        self.request = request
        self.output_ids: list[int] = []
        self.token_texts: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.num_cached_tokens = 0
        self.text = ""
        self.finish: str | None = None
        self.stop_string: str | None = None
        self.sink: Sink | None = None
        self.queue_time = 0.0
        self.first_token_time = 0.0
        self.total_time = 0.0
        self._client = client
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._detokenizer: Detokenizer
        self._pieces: list[str] = []
        self._started = self._last = 0.0
        self._on_end = on_end
        self._continues = continues
        self._include_stop = include_stop
        ids = (tokenizer.token_id(mark) for mark in marks)
        self._keep = frozenset(token for token in ids if token is not None)

    @property
    def inference_time(self) -> float:
        """Seconds from the first step to the last token."""
        return max(0.0, self.total_time - self.queue_time)

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of the generated tokens: what `best_of` compares."""
        if not self.logprobs:
            return float("-inf")
        return sum(entry.logprob for entry in self.logprobs) / len(self.logprobs)

    async def events(self) -> AsyncGenerator[TextEvent, None]:
        """Yield one event a step. Closing the iterator early aborts the request in the engine.

        Raises `GenerationFailed` if the engine gives up on it, `EngineUnavailable` if it dies.
        """
        self._detokenizer = Detokenizer(
            self._tokenizer,
            self.request.prompt_ids if self._continues else (),
            stop=self.request.sampling.stop,
            include_stop=self._include_stop,
            keep=self._keep,
        )
        self._started = self._last = time.perf_counter()
        try:
            reading = self._client.generate(self.request, self._shortcut)
            async with aclosing(reading) as deltas:
                async for delta in deltas:
                    event = self._take(delta)
                    yield event
                    if event.finish is not None:
                        return
            raise GenerationFailed("the engine's answer ended before its end")
        finally:
            self._on_end(self)

    def _shortcut(self, delta: Delta) -> bool:
        """Hand a delta to the sink, unless it is the first one or may be the last."""
        sink = self.sink
        if sink is None or delta.finish is not None or not self.output_ids or not sink.ready():
            return False
        if self.request.sampling.stop:
            return False
        sink.take(self._take(delta))
        return True

    def _take(self, delta: Delta) -> TextEvent:
        """Add what one step brought. Runs for every token of every client: nothing is idle here."""
        finish = delta.finish
        if finish == "error" or finish == "abort":
            raise GenerationFailed(delta.error or "the engine aborted this request")
        ids = delta.token_ids
        now = time.perf_counter()
        if not self.output_ids:
            self._first(delta, now)
        elif ids:
            self._metrics.next_tokens(len(ids), now - self._last)
        self._last = now
        read = self._detokenizer.push(ids)
        text = read.text
        if finish is not None:
            text += self._detokenizer.finish()
        if read.stopped is not None:
            finish = "stop_string"
            ids = ids[: len(read.token_texts)]  # what follows a stop string does not count
        logprobs = None
        if delta.logprobs:
            logprobs = delta.logprobs[: len(ids)]
            self.logprobs += logprobs
        self.output_ids += ids
        self.token_texts += read.token_texts
        self._pieces.append(text)
        if finish is not None:
            self._finish(finish, now)
        return TextEvent(text, ids, read.token_texts, logprobs, finish)

    def _first(self, delta: Delta, now: float) -> None:
        """Take what comes once, with the first token."""
        self.queue_time = delta.queue_time
        self.num_cached_tokens = delta.num_cached_tokens
        self.prompt_logprobs = delta.prompt_logprobs
        if delta.token_ids:
            self.first_token_time = now - self._started
            self._metrics.first_token(self.first_token_time)

    def _finish(self, finish: str, now: float) -> None:
        """The answer is complete."""
        self.total_time = now - self._started
        self.text = "".join(self._pieces)
        self.finish = finish
        self.stop_string = self._detokenizer.stopped
        self._metrics.finished(
            self.request,
            num_generated=len(self.output_ids),
            queue_time=self.queue_time,
            total_time=self.total_time,
        )

    async def complete(self) -> None:
        """Run to the end without looking at the events."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass


async def complete_all(answers: Sequence[Answer]) -> None:
    """Run several answers side by side; the first failure aborts the others and is raised."""
    if len(answers) == 1:
        await answers[0].complete()
        return
    try:
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(answer.complete())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def merge(answers: Sequence[Answer]) -> AsyncGenerator[list[tuple[int, TextEvent]], None]:
    """Yield (index, event) pairs of several answers, all that are there at once in one list."""
    if len(answers) == 1:
        async with aclosing(answers[0].events()) as events:
            async for event in events:
                yield [(0, event)]
        return
    inbox: asyncio.Queue[tuple[int, TextEvent] | Exception | None] = asyncio.Queue()

    async def forward(index: int, answer: Answer) -> None:
        try:
            async with aclosing(answer.events()) as events:
                async for event in events:
                    inbox.put_nowait((index, event))
            inbox.put_nowait(None)
        except Exception as error:
            inbox.put_nowait(error)

    tasks = [asyncio.create_task(forward(i, answer)) for i, answer in enumerate(answers)]
    open_streams = len(tasks)
    try:
        while open_streams:
            items = [await inbox.get()]
            while not inbox.empty():
                items.append(inbox.get_nowait())
            events_now: list[tuple[int, TextEvent]] = []
            for item in items:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    events_now.append(item)
            if events_now:
                yield events_now
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
