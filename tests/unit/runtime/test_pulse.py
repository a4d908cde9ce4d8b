"""Silent and stuck ranks, from heartbeats and counters alone."""

from __future__ import annotations

import pytest

from tgi_cli.engine.pulse import Pulse


def pulse(num_ranks: int = 3) -> Pulse:
    return Pulse(num_ranks, interval=0.1, silence=1.5, step_timeout=2.0)


def test_a_silent_rank_is_found_within_two_seconds() -> None:
    watched = pulse()
    for tick in range(20):
        watched.beat(1, 0)
        found = watched.tick(in_step=False)
        if found is not None:
            assert found == ([2], "gave no sign of life for 1.5 seconds")
            assert tick == 15
            return
    pytest.fail("not found")


def test_ranks_that_beat_are_left_alone() -> None:
    watched = pulse()
    for tick in range(200):
        if tick % 5 == 0:
            watched.beat(1, tick)
            watched.beat(2, tick)
        watched.beat(0, tick)
        assert watched.tick(in_step=True) is None


def test_the_rank_that_is_behind_is_the_stuck_one() -> None:
    watched = pulse()
    for tick in range(60):
        # The others have sent one message more and wait for rank 1.
        watched.beat(0, min(tick, 11))
        watched.beat(1, min(tick, 10))
        watched.beat(2, min(tick, 11))
        found = watched.tick(in_step=True)
        if found is not None:
            assert list(found[0]) == [1]
            assert found[1] == "made no progress in a step for 2 seconds (--step-timeout)"
            assert tick == 31
            return
    pytest.fail("not found")


def test_standing_still_between_steps_is_no_fault() -> None:
    watched = pulse()
    for _ in range(100):
        for rank in range(3):
            watched.beat(rank, 7)
        assert watched.tick(in_step=False) is None
    for _ in range(20):  # and time in a step counts from its beginning
        for rank in range(3):
            watched.beat(rank, 7)
        assert watched.tick(in_step=True) is None
