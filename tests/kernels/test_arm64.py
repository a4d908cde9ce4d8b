"""The kernels for arm64: built with a cross compiler, run in an emulator.

No arm machine takes part. The conformance tests of the kernels run as they are, in a Python of this
machine; only the kernels run in the emulator (`tests/kernels/emulated`). Their integer products are
compared bit for bit with those of this machine's instruction sets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.emulated.library import GUEST
from tgi_cli.kernels.cpu import library

CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
NATIVE = shutil.which("gcc")
SYSROOT = "/usr/aarch64-linux-gnu"  # of Debian's and Ubuntu's cross compiler
ROOT = Path(__file__).parents[2]
CSRC = Path(library.__file__).parent / "csrc"
EMULATED = Path(__file__).parent / "emulated"

pytestmark = pytest.mark.skipif(
    CROSS is None, reason="g++ for arm64 is not installed (Debian: g++-aarch64-linux-gnu)"
)
emulator = pytest.mark.skipif(
    QEMU is None or NATIVE is None, reason="qemu-aarch64 (Debian: qemu-user) or gcc is missing"
)


def compile_arguments() -> list[str]:
    """What the package's own build gives the compiler."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (module,) = project["tool"]["setuptools"]["ext-modules"]
    return [*module["extra-compile-args"], "-fPIC", "-Wall", "-Wno-missing-field-initializers"]


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cpp")), ids=lambda path: path.stem)
def test_sources_are_valid_for_arm64(source: Path) -> None:
    run(str(CROSS), *compile_arguments(), "-Werror", "-fsyntax-only", source)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library and the guest for arm64, and the heap for this machine."""
    folder = tmp_path_factory.mktemp("arm64")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run(str(CROSS), *compile_arguments(), "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(CSRC.glob("*.cpp"), reverse=True)))
    run(str(CROSS), "-shared", "-pthread", *objects, "-o", folder / "native.so")
    run(str(CROSS), "-std=c++17", "-O1", EMULATED / "guest.cpp", "-ldl", "-o", folder / "guest")
    heap = ["-O2", "-fno-builtin", "-fPIC", "-shared", EMULATED / "shared_heap.c"]
    run(str(NATIVE), *heap, "-o", folder / "heap.so")
    return folder


def guest(built: Path, processor: str) -> list[str]:
    start = [str(QEMU), "-L", SYSROOT, "-cpu", processor]
    return [*start, str(built / "guest"), str(built / "native.so")]


@emulator
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "variants"),
    [("cortex-a53", "neon"), ("neoverse-n1", "neondot,neon"), ("max", "neonbf16,neondot,neon")],
)
def test_variants_are_those_the_processor_has(processor: str, variants: str, built: Path) -> None:
    assert run(*guest(built, processor), "-1").strip() == variants


@emulator
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "leave"),
    [
        ("quantized", "2080"),  # the largest shape
        ("attention", "none"),
        ("sampling", "none"),
        ("step", "idle_pool or unknown_variants"),  # of this process, not of kernels
    ],
)
def test_conformance(tests: str, leave: str, built: Path) -> None:
    environment = {
        **os.environ,
        GUEST: "\n".join(guest(built, "max")),
        "LD_PRELOAD": str(built / "heap.so"),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    plugin = ["-q", "-p", "tests.kernels.emulated.library", "-p", "no:cacheprovider"]
    path = f"tests/kernels/test_native_{tests}.py"
    command = [sys.executable, "-m", "pytest", *plugin, "-k", f"not avx and not ({leave})", path]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
