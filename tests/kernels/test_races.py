"""What threads share, under the thread sanitizer, which knows no order but C++'s own.

`races.cpp` is built with the pool and the collective as they are, `attention_races.cpp` with the
attention of decoding rows, and each with one order taken away: then it must find a race, or it
would prove nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "tgi_cli" / "kernels" / "cpu" / "csrc"
COMPILER = shutil.which("g++")
#: Its shadow memory does not bear every layout that the kernel draws for a process.
FIXED = ["setarch", "-R"]
RACE = 66  # the sanitizer's exit code
UNWATCHED = 77  # that of a program which this CPU cannot run

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

#: Of attention_streams.inc.h: what is changed, and to what.
ATTENTION = {
    "as it is": ("", ""),
    "who ends a head does not see the others' tiles": ("acq_rel", "release"),
    "who reads a key has not stored it": ("t + 1 == item.tiles()) store_key", "t == 0) store_key"),
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
    return compiled(folder / "races", paths, CSRC)


def compiled(program: Path, sources: list[Path], headers: Path) -> Path:
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread", f"-I{headers}"]
    done = run([str(COMPILER), *flags, *map(str, sources), "-o", str(program)])
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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for AVX2")
@pytest.mark.parametrize("name", ATTENTION)
def test_threads_that_share_out_attention(name: str, tmp_path: Path) -> None:
    place, changed = ATTENTION[name]
    folder = shutil.copytree(CSRC, tmp_path / "csrc")
    path = folder / "attention_streams.inc.h"
    source = path.read_text()
    assert not place or source.count(place) == 1
    path.write_text(source.replace(place, changed) if place else source)
    sources = [Path(__file__).with_name("attention_races.cpp"), folder / "pool.cpp"]
    done = run([*FIXED, str(compiled(tmp_path / "attention", sources, folder))])
    if done.returncode == UNWATCHED:
        pytest.skip("this CPU has no AVX2")
    if place:
        assert done.returncode == RACE, done.stderr[-2000:]
        assert "ThreadSanitizer: data race" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-4000:]
