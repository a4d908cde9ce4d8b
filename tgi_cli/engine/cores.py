"""Cores for each rank on this machine: neighbours, and of one NUMA node where that divides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def share_out(cores: Sequence[int], num_ranks: int) -> list[tuple[int, ...]]:
    """Divide `cores`, in this order, into equal runs; what is left over belongs to nobody.

    With fewer cores than ranks nobody gets any of their own: the kernel does better.
    """
    each = len(cores) // num_ranks
    return [tuple(cores[rank * each : (rank + 1) * each]) for rank in range(num_ranks)]


def cores_by_node(nodes: Path = _NODES) -> list[int]:
    """The cores this thread may run on, those of one NUMA node together."""
    node_of = {core: node for node, cores in numa_nodes(nodes).items() for core in cores}
    return sorted(os.sched_getaffinity(0), key=lambda core: (node_of.get(core, 0), core))


def numa_nodes(nodes: Path = _NODES) -> dict[int, list[int]]:
    """The cores of each NUMA node; empty where the kernel does not say."""
    found: dict[int, list[int]] = {}
    for path in nodes.glob("node[0-9]*"):
        number = int(path.name.removeprefix("node"))
        try:
            listed = (path / "cpulist").read_text()
        except OSError:
            continue
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed):
            found.setdefault(number, []).extend(range(int(first), int(last or first) + 1))
    return dict(sorted(found.items()))


def bind(cores: Sequence[int]) -> None:
    """Keep this thread, and those it starts from now on, on `cores`; none means anywhere."""
    if cores:
        os.sched_setaffinity(0, cores)
