"""One turn of a chat: ask, show the answer as it comes, keep it.

Shared by the interactive chat and the one-shot mode; knows neither prompt nor terminal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from tgi_cli.cli.chat_session import AnswerStats, ChatSession
from tgi_cli.cli.openai_client import OpenAIClient, Usage


async def ask(
    client: OpenAIClient, session: ChatSession, question: str, show: Callable[[str], None]
) -> AnswerStats:
    """Send `question`, pass the answer's text to `show` as it comes, and keep the turn.

    When cancelled, what has come so far is kept as the answer. Raises `RemoteError`.
    """
    start = time.perf_counter()
    first: float | None = None
    usage: Usage | None = None
    pieces: list[str] = []
    try:
        stream = client.stream("/v1/chat/completions", session.body(question))
        async with contextlib.aclosing(stream) as chunks:
            async for chunk in chunks:
                usage = chunk.usage or usage
                if chunk.text:
                    first = first or time.perf_counter() - start
                    pieces.append(chunk.text)
                    show(chunk.text)
    finally:
        stats = AnswerStats(
            seconds=time.perf_counter() - start,
            first_token=first,
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
        )
        session.add(question, "".join(pieces), stats)
    return stats
