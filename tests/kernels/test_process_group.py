"""Sums and gathers over torch.distributed: ranks are threads, gloo and its sockets are real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from tests.kernels.test_collective import values
from tgi_cli.errors import UsageError
from tgi_cli.kernels import backend, process_group
from tgi_cli.kernels.process_group import ProcessGroup

T = TypeVar("T")


def on_ranks(
    folder: Path, world_size: int, work: Callable[[ProcessGroup], T], **more: str
) -> list[T]:
    device = torch.device(more.pop("device", "cpu"))
    found: dict[int, T] = {}

    def run(rank: int) -> None:
        end = ProcessGroup(device, f"file://{folder}/store", rank, world_size, **more)
        found[rank] = work(end)

    threads = [
        threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(world_size)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_and_gathers(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On `cuda` with gloo in NCCL's place: the same calls, but nobody waits on the host."""
    monkeypatch.setattr(
        process_group, "GROUPS", {"cpu": process_group.GROUPS["cpu"], "cuda": process_group._gloo}
    )
    columns, rows = (5, 1, 4), 7

    def work(end: ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, int]:
        total = end.all_reduce(values(end.rank, rows, 33).bfloat16())
        side_by_side = end.all_gather(values(end.rank, rows, columns[end.rank]), columns)
        return total, side_by_side, end.progress()

    found = on_ranks(tmp_path, 3, work, device=device, address="127.0.0.1")
    parts = [values(rank, rows, 33).bfloat16().float() for rank in range(3)]
    total = ((parts[0] + parts[1]) + parts[2]).bfloat16()
    gathered = torch.cat([values(rank, rows, width) for rank, width in enumerate(columns)], 1)
    for got_total, got_gathered, progress in found:
        assert torch.equal(got_total, total)
        assert torch.equal(got_gathered, gathered)
        assert progress == 2


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = backend.select("auto", local_rank=1)
    assert chosen.device == torch.device("cuda", 1)
    assert process_group.GROUPS[chosen.device.type] is process_group._nccl
    with pytest.raises(UsageError, match="rank 2 of this machine has no GPU: torch sees 2"):
        backend.select("cuda", local_rank=2)
