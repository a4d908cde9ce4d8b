"""Tenants: whom a request is counted against, and what each of them has used lately.

A tenant is what an API key stands for. Its limits come from the key file (`serve.api_keys`); this
module counts and refuses, in a `Ledger` that all HTTP workers share. It knows neither HTTP nor
keys.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from tgi_cli.errors import Overloaded
from tgi_cli.serve.ledger import Ledger, Row

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

    It may go below zero, because what an answer costs is known only when it is over. What has been
    used, and when that was, are the two cells from `at` on.
    """

    __slots__ = ("_at", "_cells", "_clock", "limit")

    def __init__(
        self, limit: float, clock: Callable[[], float], cells: memoryview[float], at: int
    ) -> None:
        self.limit = limit
        self._clock = clock
        self._cells = cells
        self._at = at

    @property
    def used(self) -> float:
        """What has been used and has not come back yet."""
        passed = self._clock() - self._cells[self._at + 1]
        return max(0.0, self._cells[self._at] - passed * self.limit / _MINUTE)

    @property
    def level(self) -> float:
        """What may still be used now."""
        return self.limit - self.used

    def resize(self, limit: float) -> None:
        """Change the limit; what has been used stays used."""
        self.use(0)
        self.limit = limit

    def use(self, amount: float) -> None:
        """Count `amount` as used."""
        self._cells[self._at] = self.used + amount
        self._cells[self._at + 1] = self._clock()

    def seconds_until(self, amount: float) -> float:
        """How long until the level is at least `amount`."""
        return max(0.0, (amount - self.level) * _MINUTE / self.limit)


class Tenant:
    """One tenant's limits and what it has used of them, in all HTTP workers."""

    def __init__(
        self,
        name: str,
        limits: TenantLimits,
        ledger: Ledger | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.limits = limits
        self._ledger = ledger or Ledger()
        self._clock = clock
        self._row: Row | None = None  # without limits nothing is counted
        self.requests: Allowance | None = None
        self.tokens: Allowance | None = None
        self.limit(limits)

    def limit(self, limits: TenantLimits) -> None:
        """Take other limits; what has been used stays used."""
        self.limits = limits
        limited = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency)
        if self._row is None and any(limit is not None for limit in limited):
            self._row = self._ledger.row(self.name)
        with self._ledger.locked():
            self.requests = self._allowance(self.requests, limits.requests_per_minute, 0)
            self.tokens = self._allowance(self.tokens, limits.tokens_per_minute, 2)

    def _allowance(
        self, current: Allowance | None, limit: int | None, cell: int
    ) -> Allowance | None:
        if limit is None or self._row is None:
            return None
        if current is None:
            return Allowance(limit, self._clock, self._row.cells, self._row.amounts + cell)
        current.resize(limit)
        return current

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request from its beginning to its end.

        Raises `Overloaded` with the limit, what was used of it and when to come back.
        """
        row = self._row
        if row is None:
            yield
            return
        with self._ledger.locked():
            self._check(row)
            if self.requests is not None:
                self.requests.use(1)
            row.take(1)
        try:
            yield
        finally:
            row.give_back(1)

    def spend(self, tokens: int) -> None:
        """Count tokens of a prompt and its answer, finished or not."""
        if self.tokens is not None:
            with self._ledger.locked():
                self.tokens.use(tokens)

    def _check(self, row: Row) -> None:
        limits = self.limits
        most = limits.concurrency
        if most is not None and row.in_use >= most:
            raise self._refusal(
                f"may have {most} requests answered at once and has {row.in_use}", 1.0
            )
        if self.requests is not None and self.requests.level < 1:
            raise self._refusal(
                f"may make {limits.requests_per_minute} requests per minute and has made them",
                self.requests.seconds_until(1),
            )
        if self.tokens is not None and self.tokens.level <= 0:
            raise self._refusal(
                f"may use {limits.tokens_per_minute} tokens per minute and has used "
                f"{self.tokens.used:.0f}",
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
    """All tenants by name; an unknown name is a tenant without limits."""

    def __init__(
        self, ledger: Ledger | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger = ledger or Ledger()
        self._clock = clock
        self._tenants: dict[str, Tenant] = {}

    def __getitem__(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = Tenant(name, TenantLimits(), self._ledger, clock=self._clock)
            self._tenants[name] = tenant
        return tenant

    def limit(self, limits: Mapping[str, TenantLimits]) -> None:
        """Take the limits of all tenants; one that is not named any more has none."""
        for name in {*self._tenants, *limits}:
            self[name].limit(limits.get(name, TenantLimits()))
