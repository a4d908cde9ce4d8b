"""Rules of the tree that no linter knows: file sizes, environment reads, names, imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "tgi_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600
#: Imported without being a dependency of its own, and why.
COMES_WITH = {
    "httpx2": "huggingface-hub: the types of its exceptions",
    "tqdm": "huggingface-hub: the progress bars it asks for",
    "filelock": "huggingface-hub: the locks of its cache",
    "grpc": "opentelemetry-exporter-otlp-proto-grpc: the transport under test",
    "pydantic": "openai: what structured answers are parsed into",
}
#: Extras that a module may import where it needs them.
FEATURES = ("otel", "datasets")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.module and not node.level else []


def test_there_are_sources() -> None:
    assert len(SOURCES) > 100


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in SOURCES
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_only_config_reads_the_environment() -> None:
    reads = re.compile(r"os\.(environ|getenv)|from os import .*(environ|getenv)")
    readers = {path.name for path in SOURCES if reads.search(path.read_text())}
    assert readers == {"config.py"}


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [path for path in SOURCES if path.stem in drawers]


def test_every_module_says_what_it_is_for() -> None:
    assert not [path for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]


def undeclared(names: Iterator[str], requirements: list[str]) -> set[str]:
    """Top-level modules that none of these requirements installs."""
    declared = {
        re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")
        for requirement in requirements
    }
    distributions = packages_distributions()
    missing = set()
    for name in names:
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in {"tgi_cli", "tests", *COMES_WITH}:
            continue
        owners = {owner.lower().replace("_", "-") for owner in distributions.get(top, [top])}
        if not owners & declared:
            missing.add(top)
    return missing


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # What only one feature needs is imported by it alone, and it says what to install.
    extras = [each for name in FEATURES for each in project["optional-dependencies"][name]]
    names = (name for path in SOURCES for name in imports(path))
    assert not undeclared(names, [*project["dependencies"], *extras])


def test_what_tests_import_comes_with_the_dev_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    extras = [each for name in (*FEATURES, "dev") for each in optional[name]]
    names = (
        name
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.parse(path.read_text()).body  # what is imported when a test is collected
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
    )
    assert not undeclared(names, [*project["dependencies"], *extras])


def test_every_header_is_a_reason_to_compile_again() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    [extension] = build["ext-modules"]
    folder = PACKAGE / "kernels" / "cpu" / "csrc"
    for suffix, listed in (("h", extension["depends"]), ("cpp", extension["sources"])):
        found = {str(path.relative_to(ROOT)) for path in folder.glob(f"*.{suffix}")}
        assert found == set(listed)


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    names = [re.split(r"[<>=!~\[; ]", each)[0] for each in project["dependencies"]]
    assert not [name for name in names if name not in reasons]
