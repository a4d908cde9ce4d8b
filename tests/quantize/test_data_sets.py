"""Data sets of the hub as calibration text: from the protocol to the samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from huggingface_hub import HfApi, constants
from pyarrow import parquet

from tests.hub_server.server import File, Hub, Repo, serve
from tgi_cli import hub_datasets
from tgi_cli.cli.app import load_command
from tgi_cli.cli.console import Invocation
from tgi_cli.errors import GatedModel, HubError, HubOffline, ModelMissing, TgiError, UsageError
from tgi_cli.hub_datasets import DatasetName, _chosen, parquet_files
from tgi_cli.quantize.convert.dataset_text import dataset_text

BRANCH = "refs/convert/parquet"
LINE = "The server takes a prompt and gives an answer. "


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def endpoint(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub's client asks the test's hub, without anything of the user's."""
    monkeypatch.setattr(hub_datasets, "HfApi", partial(HfApi, endpoint=hub.url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    hub.repos.clear()
    hub.served.clear()
    return hub


def test_a_split_of_the_hub(
    endpoint: Hub,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {}
    for number in range(3):
        written = table(tmp_path / f"{number}.parquet", [{"id": number, "text": LINE * 40}] * 10)
        files[f"small/train/{number:04d}.parquet"] = File(written.read_bytes(), lfs=True)
    files["small/test/0000.parquet"] = File(b"not asked for", lfs=True)
    endpoint.repos["datasets/org/prose"] = Repo(files, refs={BRANCH: "a" * 40})
    arguments = [
        tiny_checkpoint("llama"), tmp_path / "out", "--method", "gptq", "--group-size", 32,
        "--samples", 4, "--seqlen", 512, "--calibration", "org/prose",
        "--cache-dir", tmp_path / "cache", "--no-verify", "--json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        load_command("quantize").main([str(each) for each in arguments], obj=Invocation())
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert json.loads(said.out)["calibration"] == "org/prose (4 x 512 tokens)"
    # A file holds 19,000 characters, 8 are read for each of 2,048 tokens: no second one is needed.
    assert [answer.name for answer in endpoint.served] == ["small/train/0000.parquet"]


@pytest.mark.parametrize(
    ("repo", "error", "words"),
    [
        (None, ModelMissing, "there is no data set 'org/prose' on"),
        (Repo({}), HubError, "has no Parquet form"),
        (Repo({}, gated=True, refs={BRANCH: "a" * 40}), UsageError, "has no config 'small'"),
        (
            Repo({"small/train/0.parquet": File(b"")}, gated=True, refs={BRANCH: "a" * 40}),
            GatedModel,
            "'datasets/org/prose' is gated",
        ),
    ],
)
def test_what_the_hub_refuses(
    repo: Repo | None, error: type[TgiError], words: str, endpoint: Hub, tmp_path: Path
) -> None:
    if repo is not None:
        endpoint.repos["datasets/org/prose"] = repo
    with pytest.raises(error, match=words):
        list(parquet_files(DatasetName("org/prose", "small"), cache_dir=tmp_path))


def test_offline(endpoint: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOffline, match="'org/prose' cannot be asked for, as HF_HUB_OFFLINE"):
        next(parquet_files(DatasetName("org/prose")))
    assert endpoint.served == []


PATHS = [
    "README.md",
    "de/test/0000.parquet",
    "de/train/0001.parquet",
    "de/train/0000.parquet",
    "en/partial-train/0000.parquet",
    "en/validation/0000.parquet",
]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a/b:de", PATHS[3:1:-1]),
        ("a/b:de:test", PATHS[1:2]),
        ("a/b:en", PATHS[4:5]),
        ("a/b:en:validation", PATHS[5:]),
    ],
)
def test_files_of_a_split(name: str, found: list[str]) -> None:
    parsed = DatasetName.parse(name)
    assert parsed is not None
    assert _chosen(parsed, PATHS) == found


@pytest.mark.parametrize(
    ("name", "paths", "words"),
    [
        ("a/b", PATHS, "has several; name one config"),
        ("a/b:fr", PATHS, "has no config 'fr'"),
        ("a/b:en:test", PATHS, "has no split 'test'"),
        ("a/b:en", ["en/one/0.parquet", "en/two/0.parquet"], "has several; name one split"),
        ("a/b", [], "has several; name one config"),
    ],
)
def test_no_such_split(name: str, paths: list[str], words: str) -> None:
    parsed = DatasetName.parse(name)
    assert parsed is not None
    with pytest.raises(UsageError, match=words):
        _chosen(parsed, paths)


@pytest.mark.parametrize("name", ["text", "a/b/c", "a/b:", "/a/b", "a/b:c:d:e", "a b/c"])
def test_what_is_no_name(name: str) -> None:
    assert DatasetName.parse(name) is None


def test_text_of_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    file = table(tmp_path / "x.parquet", [{"score": 1.0, "messages": turns}] * 3)
    assert dataset_text("a/b", [file], 10**6) == "\n\n".join(["Why?\nSo."] * 3)
    assert dataset_text("a/b", [file], 11) == "\n\n".join(["Why?\nSo."] * 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"title": "x", "score": 1}], "neither `text` nor `messages` .* columns title, score"),
        ([{"text": "x"}, {"text": None}], "row 1 of the data set `a/b` has no text in `text`"),
        ([{"text": 3}], "row 0 of the data set `a/b` has no text"),
    ],
)
def test_rows_without_text(rows: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    with pytest.raises(TgiError, match=words):
        dataset_text("a/b", [table(tmp_path / "x.parquet", rows)], 10**6)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="need pyarrow, which is not installed"):
        dataset_text("a/b", [tmp_path / "x.parquet"], 1)
