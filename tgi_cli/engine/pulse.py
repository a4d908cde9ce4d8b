"""Which rank is dead or stuck, from heartbeats and counters of progress. Pure: no clock, no thread.

Whoever owns it calls `tick` at a fixed interval. Silence is counted in ticks, so that a machine too
busy to run anything does not look like a rank that has stopped.
"""

from __future__ import annotations

from collections.abc import Sequence


class Pulse:
    """Signs of life of the ranks 0 .. n - 1; rank 0 is the owner's own and never silent.

    Args:
        num_ranks: how many there are.
        interval: seconds between ticks.
        silence: seconds without a heartbeat after which a rank counts as gone.
        step_timeout: seconds without progress in a step after which it counts as stuck.
    """

    def __init__(
        self, num_ranks: int, *, interval: float, silence: float, step_timeout: float
    ) -> None:
        self.silence = silence
        self.step_timeout = step_timeout
        self._interval = interval
        self._quiet = [0] * num_ranks  # ticks since the last heartbeat
        self._still = [0] * num_ranks  # ticks in a step since progress was last made
        self._progress = [0] * num_ranks
        self._seen = [0] * num_ranks

    def beat(self, rank: int, progress: int) -> None:
        """Note a heartbeat; from any thread."""
        self._quiet[rank] = 0
        self._progress[rank] = progress

    def tick(self, *, in_step: bool) -> tuple[Sequence[int], str] | None:
        """Let one interval pass; returns ranks that have failed and how, if any."""
        for rank, progress in enumerate(self._progress):
            moved = progress != self._seen[rank] or not in_step
            self._seen[rank] = progress
            self._still[rank] = 0 if moved else self._still[rank] + 1
        for rank in range(1, len(self._quiet)):
            self._quiet[rank] += 1
            if self._quiet[rank] * self._interval > self.silence:
                return [rank], f"gave no sign of life for {self.silence:g} seconds"
        behind = [rank for rank, n in enumerate(self._progress) if n == min(self._progress)]
        if all(self._still[rank] * self._interval > self.step_timeout for rank in behind):
            return behind, (
                f"made no progress in a step for {self.step_timeout:g} seconds (--step-timeout)"
            )
        return None
