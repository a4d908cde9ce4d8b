"""Model ids that need no network, and what `resolve` reports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server.client import environment
from tests.hub_server.server import Repo
from tests.unit.hub.conftest import Client
from tgi_cli import hub
from tgi_cli.errors import ModelMissing


def test_local_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelMissing, match="no weights in a format"):
        hub.resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_local_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert hub.resolve(str(file)) == file
    assert hub.resolve(str(tmp_path)) == file, "a folder with one GGUF model is that model"
    (tmp_path / "other-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelMissing, match="has 2 GGUF models") as caught:
        hub.resolve(str(tmp_path))
    assert f"{tmp_path}:QUANT" in (caught.value.hint or "")
    assert hub.resolve(f"{tmp_path}:q8_0") == tmp_path / "other-Q8_0.gguf"


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("./nowhere", "there is no file or folder './nowhere'"),
        ("/nowhere/model.gguf", "there is no file or folder"),
        ("a/b/c", "is neither a file or folder here nor a model id"),
        ("org/na me", "is neither a file or folder here nor a model id"),
        ("", "is neither a file or folder here nor a model id"),
    ],
)
def test_not_a_model_id(model_id: str, said: str) -> None:
    with pytest.raises(ModelMissing) as caught:
        hub.resolve(model_id)
    assert said in caught.value.message
    assert caught.value.hint


def test_other_file(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").touch()
    with pytest.raises(ModelMissing, match=r"is a file, but not a \.gguf one"):
        hub.resolve(str(tmp_path / "weights.txt"))


def test_progress_is_the_fraction_of_all_bytes_and_needs_no_torch(
    client: Client, model: Repo
) -> None:
    code = (
        "import sys; from tgi_cli import hub; seen = [];"
        "path = hub.resolve('org/model', progress=seen.append);"
        "assert (path / 'config.json').is_file();"
        "assert seen[-1] == 1.0 and 0 <= min(seen) < 1 and seen[8:] == sorted(seen[8:]), seen;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], env=environment(client.endpoint, client.home), check=True
    )
