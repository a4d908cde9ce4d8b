"""The kernels under the address and the undefined-behaviour sanitizer, and calls they refuse.

The sources are built as they are, without optimization, into a temporary folder: the variant that
this machine runs, and AVX2, whose tails and tables differ.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.kernels.grouped_weights import RandomGroups
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.packed import PackedWeight
from tgi_cli.kernels.grouped import INT4

CSRC = Path(library.__file__).parent / "csrc"
COMPILER = shutil.which("g++")
LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
CHOSEN = sorted({VARIANTS[0], VARIANTS[-1]}) if VARIANTS else []
FLAGS = [
    *("-std=c++17", "-O0", "-g1", "-fPIC", "-pthread", "-w"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
]

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


def run_time() -> list[str]:
    """The sanitizers' own libraries, empty where the compiler has none."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            [COMPILER or "g++", f"-print-file-name={name}"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        if Path(path).is_absolute():
            found.append(path)
    return found if len(found) == 2 else []


def compile_one(source: Path, folder: Path) -> Path:
    target = folder / f"{source.name}.o"
    subprocess.run([str(COMPILER), *FLAGS, "-c", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built with sanitizers; variants that are not driven are left out."""
    if COMPILER is None or not run_time():
        pytest.skip("no compiler with sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    stub = folder / "others.cpp"
    sources, missing = [stub], []
    for source in sorted(CSRC.glob("*.cpp")):
        name = source.stem.removeprefix("variant_")
        if name == source.stem or name in CHOSEN:
            sources.append(source)
        else:
            missing.append(f"const Kernels* kernels_{name}() {{ return nullptr; }}")
    stub.write_text("namespace tgi {\nstruct Kernels;\n" + "\n".join(missing) + "\n}\n")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(each) for each in pool.map(compile_one, sources, [folder] * len(sources))]
    path = folder / "sanitized.so"
    link = [str(COMPILER), "-shared", "-pthread", "-fsanitize=address,undefined", *objects]
    subprocess.run([*link, "-lrt", "-o", str(path)], check=True)
    return path


def drive(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(run_time()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.kernels.sanitized", *arguments]
    return subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )


@pytest.mark.parametrize("variant", CHOSEN)
def test_no_kernel_leaves_its_arrays(
    variant: str, sanitized: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    paths = [str(tiny_checkpoint(each, dtype=torch.bfloat16)) for each in ("llama", "gemma3")]
    done = drive(str(sanitized), variant, *paths)
    assert done.returncode == 0, done.stderr[-4000:]


def test_an_overrun_is_seen(sanitized: Path) -> None:
    done = drive(str(sanitized), VARIANTS[-1], "overrun")
    assert done.returncode != 0
    # Which of the two depends on what lies behind the matrix.
    assert any(f"heap-{kind}" in done.stderr for kind in ("buffer-overflow", "use-after-free"))


@pytest.fixture
def context() -> Iterator[library.Context]:
    assert LOADED is not None
    made = LOADED.context(VARIANTS[0], 1)
    yield made
    made.close()


def test_hostile_shapes_are_refused(context: library.Context) -> None:
    weight = PackedWeight.dense(context, torch.ones((32, 64), dtype=torch.bfloat16))
    for shape in ((3, 32), (3, 128), (64,), (2, 3, 64)):
        with pytest.raises(ValueError, match=r"activations must be bfloat16 \[tokens, 64\]"):
            weight.matmul(torch.ones(shape, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match="not float32"):
        weight.matmul(torch.ones((3, 64)), None)
    with pytest.raises(ValueError, match="no multiple"):
        PackedWeight.grouped(context, RandomGroups(INT4, 32, 48))
