"""Tenants: whom a request is counted against, and what each of them has used lately.

A tenant is what an API key stands for. Its limits come from the key file (`serve.api_keys`); this
module counts and refuses. It knows neither HTTP nor keys. Every HTTP worker counts for itself and
allows its share of each limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from tgi_cli.errors import Overloaded

_MINUTE = 60.0


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant may ask for; None is without limit. `weight` scales its share of the engine.

    `tokens_per_minute` counts prompts and answers, `concurrency` requests being answered.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    weight: float = 1.0


class Allowance:
    """A token bucket of one minute's worth: `limit` at once, then `limit` / 60 a second.

    It may go below zero, because what an answer costs is known only when it is over.
    """

    __slots__ = ("_clock", "_level", "_seen", "limit")

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._level = limit
        self._seen = clock()

    @property
    def level(self) -> float:
        """What may still be used now."""
        now = self._clock()
        self._level = min(self.limit, self._level + (now - self._seen) * self.limit / _MINUTE)
        self._seen = now
        return self._level

    def resize(self, limit: float) -> None:
        """Change the limit; what has been used stays used."""
        used = self.limit - self.level
        self.limit = limit
        self._level = limit - used

    def use(self, amount: float) -> None:
        """Count `amount` as used."""
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """How long until the level is at least `amount`."""
        return max(0.0, (amount - self.level) * _MINUTE / self.limit)


class Tenant:
    """One tenant's limits and usage in this HTTP worker, which allows `share` of each limit."""

    def __init__(
        self,
        name: str,
        limits: TenantLimits,
        *,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.limits = limits
        self.in_flight = 0
        self._share = share
        self._clock = clock
        self.requests: Allowance | None = None
        self.tokens: Allowance | None = None
        self.limit(limits)

    def limit(self, limits: TenantLimits) -> None:
        """Take other limits; what has been used stays used."""
        self.limits = limits
        self.requests = self._allowance(self.requests, limits.requests_per_minute)
        self.tokens = self._allowance(self.tokens, limits.tokens_per_minute)

    def _allowance(self, current: Allowance | None, limit: int | None) -> Allowance | None:
        if limit is None:
            return None
        mine = max(1.0, limit * self._share)
        if current is None:
            return Allowance(mine, self._clock)
        current.resize(mine)
        return current

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request from its beginning to its end.

        Raises `Overloaded` with the limit, what was used of it and when to come back.
        """
        self._check()
        if self.requests is not None:
            self.requests.use(1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def spend(self, tokens: int) -> None:
        """Count tokens of a prompt and its answer, finished or not."""
        if self.tokens is not None:
            self.tokens.use(tokens)

    def _check(self) -> None:
        limits = self.limits
        most = limits.concurrency
        if most is not None and self.in_flight >= max(1, int(most * self._share)):
            raise self._refusal(
                f"may have {most} requests answered at once and has {self.in_flight} here", 1.0
            )
        if self.requests is not None and self.requests.level < 1:
            raise self._refusal(
                f"may make {limits.requests_per_minute} requests per minute and has made them",
                self.requests.seconds_until(1),
            )
        if self.tokens is not None and self.tokens.level <= 0:
            used = self.tokens.limit - self.tokens.level
            raise self._refusal(
                f"may use {limits.tokens_per_minute} tokens per minute and has used {used:.0f}",
                self.tokens.seconds_until(1),
            )

    def _refusal(self, what: str, wait: float) -> Overloaded:
        return Overloaded(
            f"the API key of `{self.name}` {what}",
            retry_after=max(1, math.ceil(wait)),
            hint="come back after the seconds in `Retry-After`",
        )

    def headers(self) -> dict[str, str]:
        """Limits and what is left of them, under OpenAI's header names."""
        headers: dict[str, str] = {}
        for kind, allowance in (("requests", self.requests), ("tokens", self.tokens)):
            if allowance is not None:
                headers[f"x-ratelimit-limit-{kind}"] = f"{allowance.limit:.0f}"
                headers[f"x-ratelimit-remaining-{kind}"] = f"{max(0.0, allowance.level):.0f}"
                wait = allowance.seconds_until(allowance.limit)
                headers[f"x-ratelimit-reset-{kind}"] = f"{wait:.3f}s"
        return headers


class Tenants:
    """All tenants of this worker by name; an unknown name is a tenant without limits."""

    def __init__(self, *, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._clock = clock
        self._tenants: dict[str, Tenant] = {}

    def __getitem__(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(
                name, TenantLimits(), share=self._share, clock=self._clock
            )
        return tenant

    def limit(self, limits: Mapping[str, TenantLimits]) -> None:
        """Take the limits of all tenants; one that is not named any more has none."""
        for name in {*self._tenants, *limits}:
            self[name].limit(limits.get(name, TenantLimits()))
