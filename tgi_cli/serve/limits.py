"""What this server lets one request, and all of them together, ask for.

`Limits` are the numbers in force once the model is known; `Admission` bounds what is in the house
(validated, queued or running) and refuses the rest with an estimate of when to come back.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from tgi_cli.config import ServerConfig
from tgi_cli.engine.messages import ModelFacts
from tgi_cli.errors import ContextLengthExceeded, InvalidRequest, Overloaded, UsageError
from tgi_cli.serve.ledger import Ledger

#: Finished sequences that the service rate is taken from, and how old they may be (seconds).
_RATE_SAMPLES = 64
_RATE_WINDOW = 60.0
_MAX_RETRY_AFTER = 60
#: The row of what is in the house; no tenant's name holds a line break.
_HOUSE = "\nhouse"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Resolved limits: the flags where given, otherwise what the model and its cache allow."""

    max_input_tokens: int
    max_total_tokens: int

    @classmethod
    def resolve(cls, config: ServerConfig, facts: ModelFacts) -> Limits:
        """Fit the flags to the loaded model. Raises `UsageError` if they ask for more than it has.

        The engine's `max_model_len` already respects the cache size.
        """
        total = config.max_total_tokens or facts.max_model_len
        if total > facts.max_model_len:
            raise UsageError(
                f"--max-total-tokens {total} is more than the {facts.max_model_len} tokens that "
                f"the model's context and the KV cache hold",
                hint=f"use --max-total-tokens {facts.max_model_len} or leave it out",
            )
        longest = config.max_input_tokens or total - 1
        if longest >= total:
            raise UsageError(
                f"--max-input-tokens {longest} must be less than the {total} tokens that prompt "
                "and answer may have together",
                hint=f"use --max-input-tokens {total - 1} or leave it out",
            )
        return cls(max_input_tokens=longest, max_total_tokens=total)

    def max_tokens(
        self, num_prompt_tokens: int, asked: int | None, *, prompt_field: str, tokens_field: str
    ) -> int:
        """New tokens a prompt of this length may have: what was asked, or all that is left.

        Raises `ContextLengthExceeded` with both numbers, in the calling API's field names.
        """
        total = self.max_total_tokens
        if asked is not None and num_prompt_tokens + asked > total:
            raise ContextLengthExceeded(
                f"`{prompt_field}` tokens + `{tokens_field}` must be <= {total}. Given: "
                f"{num_prompt_tokens} `{prompt_field}` tokens and {asked} `{tokens_field}`",
                param=prompt_field if num_prompt_tokens >= total else tokens_field,
            )
        if num_prompt_tokens > self.max_input_tokens:
            raise ContextLengthExceeded(
                f"`{prompt_field}` must have less than {self.max_input_tokens + 1} tokens. "
                f"Given: {num_prompt_tokens}",
                param=prompt_field,
            )
        return total - num_prompt_tokens if asked is None else asked


class Admission:
    """Counts sequences in the house against `max_concurrent_requests`; never waits.

    The house is that of all HTTP workers that share the ledger. `clock` gives seconds and may jump
    only forward.
    """

    def __init__(
        self,
        limit: int,
        clock: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
    ) -> None:
        self.limit = limit
        self._clock = clock
        self._ledger = ledger or Ledger()
        self._row = self._ledger.row(_HOUSE)
        self._finished: deque[float] = deque(maxlen=_RATE_SAMPLES)
        self._started: dict[int, float] = {}
        self._tickets = 0

    @property
    def in_use(self) -> int:
        """Permits held in all workers."""
        return self._row.in_use

    @contextmanager
    def permits(self, count: int) -> Iterator[None]:
        """Hold `count` permits. Raises `Overloaded` at once when they are not free."""
        if count > self.limit:
            raise InvalidRequest(
                f"one request may ask for at most {self.limit} sequences "
                f"(`--max-concurrent-requests`). Given: {count}",
                param="n",
            )
        with self._ledger.locked():
            in_use = self.in_use
            if in_use + count > self.limit:
                raise Overloaded(
                    f"model is overloaded: {in_use} of {self.limit} places are taken",
                    retry_after=self.retry_after(count),
                    hint="come back after the seconds in `Retry-After`",
                )
            self._row.take(count)
        self._tickets += 1
        ticket = self._tickets
        self._started[ticket] = self._clock()
        try:
            yield
        finally:
            self._row.give_back(count)
            del self._started[ticket]
            self._finished.extend([self._clock()] * count)

    def retry_after(self, count: int) -> int:
        """Whole seconds until `count` places are likely free, at least 1.

        From the rate of recent departures, taking that of the other workers for the same; before
        there are any, as long as the oldest guest has already stayed.
        """
        now = self._clock()
        recent = [moment for moment in self._finished if now - moment <= _RATE_WINDOW]
        if recent:
            rate = self._ledger.num_workers * len(recent) / max(now - recent[0], 1e-3)
            wait = count / rate
        else:
            wait = now - min(self._started.values(), default=now)
        return max(1, min(_MAX_RETRY_AFTER, math.ceil(wait)))
