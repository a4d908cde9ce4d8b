"""Cores are shared out in runs of neighbours, NUMA node by NUMA node."""

from __future__ import annotations

import os
from pathlib import Path

from tgi_cli.engine.cores import bind, cores_by_node, share_out


def test_shares_are_equal_and_apart() -> None:
    assert share_out(range(8), 2) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert share_out([0, 4, 1, 5, 2], 2) == [(0, 4), (1, 5)]
    assert share_out([0, 1], 3) == [(), (), ()]


def test_cores_of_a_node_stand_together(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert cores_by_node(tmp_path) == allowed
    for number, cores in ((0, allowed[1:]), (1, allowed[:1])):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(",".join(map(str, cores)) + "\n")
    assert cores_by_node(tmp_path) == [*allowed[1:], allowed[0]]
    (tmp_path / "node1" / "cpulist").write_text("0-4095\n")
    assert set(cores_by_node(tmp_path)) == set(allowed)


def test_binding_to_nothing_changes_nothing() -> None:
    before = os.sched_getaffinity(0)
    bind(())
    assert os.sched_getaffinity(0) == before
    bind(sorted(before)[:1])
    assert len(os.sched_getaffinity(0)) == 1
    bind(sorted(before))
