"""The pool and the collective under the thread sanitizer, which knows no order but C++'s own.

`races.cpp` is built with the two as they are, and with one order taken away from each: then it must
find a race, or it would prove nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "tgi_cli" / "kernels" / "cpu" / "csrc"
COMPILER = shutil.which("g++")
#: Its shadow memory does not bear every layout that the kernel draws for a process.
FIXED = ["setarch", "-R"]
RACE = 66  # the sanitizer's exit code

#: What `memory_order` of a source is made weaker, and which part then races.
WEAKENED = {
    "a message is published relaxed": (
        "collective.cpp",
        ("sent.store(next_ + 1, std::memory_order_release)", "release"),
        "collective",
    ),
    "a message is read relaxed": (
        "collective.cpp",
        ("sent.load(std::memory_order_acquire)", "acquire"),
        "collective",
    ),
    "a job is published relaxed": (
        "pool.cpp",
        ("ticket_.store(static_cast<uint64_t>(epoch) << 32, std::memory_order_seq_cst)", "seq_cst"),
        "pool",
    ),
    "a task is handed over relaxed": (
        "pool.cpp",
        ("delegated_.exchange(kAsked, std::memory_order_seq_cst)", "seq_cst"),
        "delegated",
    ),
    "the end of a task is told relaxed": (
        "pool.cpp",
        ("compare_exchange_strong(running, kNone, std::memory_order_seq_cst)", "seq_cst"),
        "delegated",
    ),
}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def built(folder: Path, **sources: str) -> Path:
    """The program with these sources in the place of the files of those names."""
    paths = [Path(__file__).with_name("races.cpp")]
    for name in ("collective", "pool"):
        path = CSRC / f"{name}.cpp"
        if name in sources:
            path = folder / path.name
            path.write_text(sources[name])
        paths.append(path)
    program = folder / "races"
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread", f"-I{CSRC}"]
    done = run([str(COMPILER), *flags, *map(str, paths), "-o", str(program)])
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module", autouse=True)
def sanitizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where there is no thread sanitizer that runs."""
    if COMPILER is None or shutil.which("setarch") is None:
        pytest.skip("no g++ or no setarch")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() { return 0; }")
    program = str(folder / "probe")
    made = run([COMPILER, "-fsanitize=thread", f"{program}.cpp", "-o", program])
    if made.returncode != 0 or run([*FIXED, program]).returncode != 0:
        pytest.skip("g++ has no thread sanitizer that runs here")


def test_no_data_race(tmp_path: Path) -> None:
    program = str(built(tmp_path))
    for part in ("pool", "delegated", "collective"):
        done = run([*FIXED, program, part])
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", WEAKENED)
def test_a_weaker_order_is_found(name: str, tmp_path: Path) -> None:
    file, (place, order), part = WEAKENED[name]
    source = (CSRC / file).read_text()
    assert source.count(place) == 1
    weaker = source.replace(place, place.replace(f"memory_order_{order}", "memory_order_relaxed"))
    program = str(built(tmp_path, **{Path(file).stem: weaker}))
    done = run([*FIXED, program, part])
    assert done.returncode == RACE, done.stderr[-2000:]
    assert "ThreadSanitizer: data race" in done.stderr
