"""Memory limits of control groups, version 2 and 1, of the group itself and of its ancestors."""

from __future__ import annotations

from pathlib import Path

from tgi_cli.kernels.memory import cgroup_headroom


def group(folder: Path, limit: str, usage: int, cache: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def member(folder: Path, *lines: str) -> Path:
    path = folder / "membership"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_cache_counts_as_free(tmp_path: Path) -> None:
    group(tmp_path, "1000", 700, 150)
    assert cgroup_headroom(tmp_path, member(tmp_path, "0::/")) == 450


def test_over_the_limit_is_zero(tmp_path: Path) -> None:
    group(tmp_path / "memory", "2000", 2500, 100, version=1)
    assert cgroup_headroom(tmp_path, member(tmp_path, "3:cpu,memory:/")) == 0


def test_no_limit(tmp_path: Path) -> None:
    group(tmp_path, "max", 700, 150)
    group(tmp_path / "memory", str(2**63 - 4096), 700, 150, version=1)
    assert cgroup_headroom(tmp_path, member(tmp_path, "0::/", "4:memory:/")) is None
    assert cgroup_headroom(tmp_path / "absent", tmp_path / "absent") is None


def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    group(tmp_path / "a", "1000", 900, 0)
    group(tmp_path / "a/b", "5000", 100, 0)
    group(tmp_path / "a/b/c", "max", 50, 0)
    assert cgroup_headroom(tmp_path, member(tmp_path, "0::/a/b/c")) == 100
    group(tmp_path / "memory/a/b", "3000", 2950, 0, version=1)
    both = member(tmp_path, "7:cpu:/elsewhere", "4:memory:/a/b", "0::/a/b/c")
    assert cgroup_headroom(tmp_path, both) == 50


def test_a_path_outside_what_is_mounted_falls_back_to_the_top(tmp_path: Path) -> None:
    """In a container the listed path may be the host's."""
    group(tmp_path, "1000", 400, 0)
    assert cgroup_headroom(tmp_path, member(tmp_path, "0::/docker/0123")) == 600
