"""Models that lie here are found without the hub's client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tgi_cli import hub
from tgi_cli.config import ModelConfig
from tgi_cli.model_path import local_checkpoint, resolve


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_folders_with_safetensors_are_opened_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    (tmp_path / "other-Q4_K_M.gguf").touch()
    assert local_checkpoint(str(tmp_path)) == tmp_path == hub.resolve(str(tmp_path))


def test_gguf_files_are_opened_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert local_checkpoint(str(file)) == file == hub.resolve(str(file))


@pytest.mark.parametrize("model_id", ["", "org/name", "demo", "/nowhere/x.gguf"])
def test_all_else_is_the_hubs(model_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_checkpoint(model_id) is None
    monkeypatch.setattr(hub, "resolve", lambda found, **options: Path("fetched") / found)
    assert resolve(ModelConfig(model_id=model_id)) == Path("fetched") / model_id


def test_a_folder_of_gguf_files_is_the_hubs_choice(tmp_path: Path) -> None:
    file = tmp_path / "model-Q4_0.gguf"
    file.touch()
    assert local_checkpoint(str(tmp_path)) is None
    assert resolve(ModelConfig(model_id=str(tmp_path))) == file


def test_the_hubs_client_is_not_imported_for_a_path(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    program = (
        "import sys\n"
        "from tgi_cli.config import ModelConfig\n"
        "from tgi_cli.model_path import resolve\n"
        f"resolve(ModelConfig(model_id={str(tmp_path)!r}))\n"
        "assert not {'huggingface_hub', 'httpx2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
