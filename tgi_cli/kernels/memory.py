"""How much memory this process may still take, as its control groups see it.

Containers and service managers set limits that the machine's own figures do not show. Knows Linux
control groups, versions 2 and 1, and nothing of tensors.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
#: Version 1 writes "no limit" as a number near 2**63.
_UNLIMITED = 2**60


def cgroup_headroom(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes left below the tightest memory limit of this process's groups; None without one.

    Each ancestor's limit counts, and file cache that the kernel can drop counts as free.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    found: list[int] = []
    for line in ["0::/", "1:memory:/", *lines]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        folder = top / path.lstrip("/")
        while folder.is_relative_to(top):
            room = _headroom(folder)
            if room is not None:
                found.append(room)
            if folder == top:
                break
            folder = folder.parent
    return min(found, default=None)


def _headroom(folder: Path) -> int | None:
    """Bytes left in one group, or None if it has no limit or no such files."""
    for limit_name, usage_name, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max" and int(limit) < _UNLIMITED:
            return max(0, int(limit) - usage + int(stat.get(cache_key, 0)))
    return None
