"""Who is served next: the least-served tenant, and within it the least-served user.

The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024):
each tenant counts the tokens it was served, output tokens double, divided by its weight; the
lowest counter goes next, and one that comes back from idleness is lifted to the lowest active
counter, so that nobody saves up. Lower `priority` goes before all that. Knows no blocks.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import TypeVar

from tgi_cli.engine.sequence import Sequence

#: Cost of an output token in prompt tokens, as in the paper.
OUTPUT_WEIGHT = 2


class _User:
    """One user of a tenant: what it was served and what waits, first come first."""

    __slots__ = ("counter", "num_live", "waiting")

    def __init__(self) -> None:
        self.counter = 0.0
        self.num_live = 0  # waiting or running
        self.waiting: list[Sequence] = []  # by (priority, order of arrival)


class _Tenant:
    """One tenant, its users, and its preempted sequences, which go before all of its others."""

    __slots__ = ("counter", "num_live", "preempted", "users", "weight")

    def __init__(self) -> None:
        self.counter = 0.0
        self.weight = 1.0
        self.num_live = 0
        self.users: dict[str, _User] = {}
        self.preempted: list[Sequence] = []  # by (priority, order of arrival)

    def head(self) -> Sequence | None:
        """Next of this tenant."""
        best: Sequence | None = self.preempted[0] if self.preempted else None
        best_key = (best.rank[0], -1.0, 0) if best is not None else None
        for user in self.users.values():
            if user.waiting:
                head = user.waiting[0]
                key = (head.rank[0], user.counter, head.rank[1])
                if best_key is None or key < best_key:
                    best, best_key = head, key
        return best


_Account = TypeVar("_Account", _User, _Tenant)


class FairQueue:
    """Waiting sequences, and the counters of everyone who has work here.

    The head stays the head until it leaves, or one with a better claim comes (a lower priority
    number, or a preempted one): what waits for blocks is not overtaken by something smaller.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._num_live = 0
        self._num_waiting = 0
        self._head: Sequence | None = None

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        """Enqueue an arrival; its request's weight becomes the tenant's."""
        request = sequence.request
        tenant = _arrive(self._tenants, request.tenant, _Tenant)
        tenant.weight = request.weight
        user = _arrive(tenant.users, request.user, _User)
        insort(user.waiting, sequence, key=_rank)
        self._num_live += 1
        self._num_waiting += 1
        if self._head is not None and sequence.rank[0] < self._head.rank[0]:
            self._head = None

    def push_front(self, sequence: Sequence) -> None:
        """Enqueue a preempted sequence, before all others of its tenant and priority."""
        insort(self._account(sequence)[0].preempted, sequence, key=_rank)
        self._num_waiting += 1
        self._head = None

    def head(self) -> Sequence | None:
        """Next to be admitted, None if nothing waits."""
        if self._head is None and self._num_waiting:
            best_key = None
            for tenant in self._tenants.values():
                head = tenant.head()
                if head is not None:
                    key = (head.rank[0], tenant.counter, head.rank[1])
                    if best_key is None or key < best_key:
                        self._head, best_key = head, key
        return self._head

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out: it is admitted or aborted."""
        tenant, user = self._account(sequence)
        waiting = tenant.preempted if sequence in tenant.preempted else user.waiting
        waiting.remove(sequence)
        self._num_waiting -= 1
        if self._head is sequence:
            self._head = None

    def charge(self, sequence: Sequence, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Count tokens as served."""
        tenant, user = self._account(sequence)
        cost = prompt_tokens + OUTPUT_WEIGHT * output_tokens
        tenant.counter += cost / tenant.weight
        user.counter += cost

    def counter(self, sequence: Sequence) -> float:
        """Service of its tenant so far, the measure by which memory is taken back."""
        return self._account(sequence)[0].counter

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended and does not wait."""
        tenant, user = self._account(sequence)
        user.num_live -= 1
        tenant.num_live -= 1
        self._num_live -= 1
        if tenant.num_live == 0:
            tenant.users.clear()
        if self._num_live == 0:  # all idle: nobody is owed anything
            self._tenants.clear()

    def _account(self, sequence: Sequence) -> tuple[_Tenant, _User]:
        tenant_name, user_name = sequence.account
        tenant = self._tenants[tenant_name]
        return tenant, tenant.users[user_name]


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _arrive(accounts: dict[str, _Account], name: str, kind: type[_Account]) -> _Account:
    """Count one more live sequence of `name`, lifted if it was idle."""
    account = accounts.get(name)
    if account is None:
        account = accounts[name] = kind()
    if account.num_live == 0:
        floor = _floor(accounts.values())
        if floor is not None:
            account.counter = max(account.counter, floor)
            # An idle account at or below the floor would be lifted anyway: forget it.
            for idle in [
                key
                for key, other in accounts.items()
                if other is not account and other.num_live == 0 and other.counter <= floor
            ]:
                del accounts[idle]
    account.num_live += 1
    return account


def _floor(accounts: Iterable[_User] | Iterable[_Tenant]) -> float | None:
    return min((account.counter for account in accounts if account.num_live), default=None)
