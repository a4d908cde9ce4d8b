"""How long steps take and what they were for: the numbers behind TGI's `tgi_batch_*` metrics.

Kept by the engine's thread as plain counts, read whole by its heartbeat. Knows neither Prometheus
nor what a step computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from tgi_cli.engine.messages import DURATION_BOUNDS, Spread, StepRecord, StepTimes
from tgi_cli.engine.step import Step

#: TGI's names: a step that computes prompt tokens, and one that only adds tokens to answers.
PREFILL, DECODE = "prefill", "decode"


class StepClock:
    """Times the parts of each step: `scheduled`, then `computed`, then `booked`.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times = {PREFILL: _no_times(), DECODE: _no_times()}
        self._joined = Spread({}, 0.0)
        self._joining = Spread({}, 0.0)
        self._num_joins = 0
        self._method = DECODE
        self._marks = (0.0, 0.0, 0.0)  # scheduling began, computing began, computing ended
        self.running_since: float | None = None
        self.last_seconds = 0.0

    def scheduled(self, step: Step, began: float) -> None:
        """A step is about to be computed; deciding on it began at `began`."""
        now = self._clock()
        num_new = len(step.new_rows)
        prompt = num_new or any(
            row.num_tokens > 1 + len(row.draft_ids) or not row.sample for row in step.rows
        )
        self._method = PREFILL if prompt else DECODE
        if num_new:
            _count(self._joined, num_new, float(num_new))
            if num_new < len(step.rows):
                self._num_joins += 1
                _count(self._joining, _bucket(now - began), now - began)
        self._times[self._method].begun += 1
        self._marks = (began, now, now)
        self.running_since = now

    def computed(self) -> None:
        """The step's output is there."""
        began, computing, _ = self._marks
        now = self._clock()
        self._marks = (began, computing, now)
        self.last_seconds = now - computing
        self.running_since = None
        _add(self._times[self._method].forward, now - computing)

    def booked(self, *, ended: bool) -> None:
        """The step's output is booked; `ended`: some sequence came to its end by it."""
        began, _, computed = self._marks
        now = self._clock()
        times = self._times[self._method]
        times.done += 1
        _add(times.inference, now - began)
        _add(times.filter if ended else times.decode, now - computed)

    @property
    def step_age(self) -> float:
        """Seconds that the step now being computed has been, 0 when there is none."""
        since = self.running_since
        return 0.0 if since is None else self._clock() - since

    def record(self) -> StepRecord:
        """All of it so far; may be asked from another thread."""
        return StepRecord(
            times={name: times.copy() for name, times in self._times.items()},
            joined=self._joined.copy(),
            joining=self._joining.copy(),
            num_joins=self._num_joins,
        )


def _no_times() -> StepTimes:
    return StepTimes(Spread({}, 0.0), Spread({}, 0.0), Spread({}, 0.0), Spread({}, 0.0))


def _bucket(seconds: float) -> int:
    return bisect_left(DURATION_BOUNDS, seconds)


def _add(spread: Spread, seconds: float) -> None:
    _count(spread, _bucket(seconds), seconds)


def _count(spread: Spread, bucket: int, value: float) -> None:
    spread.counts[bucket] = spread.counts.get(bucket, 0) + 1
    spread.total += value
