"""Sums and gathers over shared memory: values, order of summation, pieces, aborts."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from tests.golden.ranks import on_ranks
from tgi_cli.errors import EngineError
from tgi_cli.kernels.collective import ALONE, Collective
from tgi_cli.kernels.cpu import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")


def values(rank: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator) * 10.0 ** (rank % 3)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("size", [1, 7, 576, 5000])
def test_sums_are_added_in_the_order_of_ranks(world_size: int, size: int) -> None:
    expected = values(0, size)
    for rank in range(1, world_size):
        expected = expected + values(rank, size)
    # A slot of 1,000 floats makes the longest message go in pieces.
    found = on_ranks(
        world_size,
        lambda end: [end.all_reduce(values(end.rank, size)) for _ in range(5)],
        capacity=4000,
    )
    assert all(torch.equal(total, expected) for totals in found for total in totals)


def test_a_sum_leaves_its_argument_alone_and_keeps_its_dtype() -> None:
    def work(end: Collective) -> tuple[Tensor, Tensor]:
        x = values(end.rank, 3, 5).bfloat16()
        return end.all_reduce(x), x

    for rank, (total, x) in enumerate(on_ranks(2, work)):
        assert torch.equal(x, values(rank, 3, 5).bfloat16())
        parts = [values(each, 3, 5).bfloat16().float() for each in range(2)]
        assert torch.equal(total, (parts[0] + parts[1]).bfloat16())


@pytest.mark.parametrize("rows", [0, 1, 4, 37])
@pytest.mark.parametrize("columns", [(4, 4), (1, 300, 2), (171, 170, 171)])
def test_gathers_put_columns_side_by_side(rows: int, columns: tuple[int, ...]) -> None:
    parts = [values(rank, rows, width) for rank, width in enumerate(columns)]
    found = on_ranks(
        len(columns), lambda end: end.all_gather(parts[end.rank], columns), capacity=400
    )
    assert all(torch.equal(each, torch.cat(parts, 1)) for each in found)


def test_calls_of_both_kinds_in_turn() -> None:
    def work(end: Collective) -> list[Tensor]:
        found = []
        for turn in range(200):
            if turn % 3 == end.rank:
                time.sleep(0.0005)  # ranks fall behind each other in turns
            found.append(end.all_reduce(torch.full((turn + 1,), float(end.rank + turn))))
            found.append(end.all_gather(torch.full((1, 2), float(end.rank)), [2, 2, 2]))
        return found

    for found in on_ranks(3, work):
        for turn in range(200):
            assert torch.equal(found[2 * turn], torch.full((turn + 1,), 3.0 * turn + 3.0))
            assert found[2 * turn + 1].tolist() == [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]


def test_an_abort_ends_waiting_and_every_later_call() -> None:
    def work(end: Collective) -> int:
        if end.rank == 0:
            threading.Timer(0.2, end.abort).start()
            with pytest.raises(EngineError, match="rank 0 was left by another rank"):
                end.all_reduce(torch.ones(4))  # rank 1 never comes
            with pytest.raises(EngineError, match="left by another rank"):
                end.check()
        return end.progress()

    assert on_ranks(2, work) == [1, 0]


def test_ranks_that_run_different_programs_are_noticed() -> None:
    with pytest.raises(EngineError, match="left by another rank"):
        on_ranks(2, lambda end: end.all_reduce(torch.ones(3 + end.rank)))


def test_the_only_rank_adds_nothing() -> None:
    x = torch.ones(2, 3)
    assert ALONE.all_reduce(x) is x
    assert ALONE.all_gather(x, [3]) is x
    ALONE.abort()
    ALONE.check()
