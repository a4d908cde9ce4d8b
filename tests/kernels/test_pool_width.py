"""The pool gives up threads whose cores others need, and only then."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "tgi_cli" / "kernels" / "cpu" / "csrc"
COMPILER = shutil.which("g++")


def outcome(folder: Path, pool: str) -> subprocess.CompletedProcess[str]:
    """Of `pool_width.cpp` with this source of the pool."""
    (folder / "pool.cpp").write_text(pool)
    sources = [Path(__file__).with_name("pool_width.cpp"), folder / "pool.cpp"]
    program = folder / "pool_width"
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{CSRC}"]
    subprocess.run([str(COMPILER), *flags, *map(str, sources), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_threads_take_part_that_have_their_core(tmp_path: Path) -> None:
    source = (CSRC / "pool.cpp").read_text()
    done = outcome(tmp_path, source)
    assert done.returncode == 0, done.stderr
    # Waiting for who has its core must not count.
    counted = "if (waited > item) slept_ += waited - item;"
    assert source.count(counted) == 1
    done = outcome(tmp_path, source.replace(counted, "slept_ += waited;"))
    assert "long items are no lost core" in done.stderr


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no scheduler figures")
def test_threads_that_wait_for_a_core_are_given_up(tmp_path: Path) -> None:
    source = (CSRC / "pool.cpp").read_text()
    rule = " || delay > counted * kDelayShare"
    assert source.count(rule) == 1
    done = outcome(tmp_path, source.replace(rule, ""))
    assert "two threads on one core" in done.stderr
