from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from tests.hub_server.client import Drivers, Outcome, environment
from tests.hub_server.server import File, Hub, Repo, serve


@pytest.fixture(scope="session")
def running_hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def hub(running_hub: Hub) -> Hub:
    """A hub with nothing on it and no faults."""
    fresh = Hub(url=running_hub.url, storage_url=running_hub.storage_url)
    for field in fields(Hub):
        setattr(running_hub, field.name, getattr(fresh, field.name))
    return running_hub


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    running = Drivers(tmp_path_factory.mktemp("home"))
    yield running
    running.close()


@dataclass
class Client:
    """`tgi download` against the test's hub with a cache of the test's own."""

    drivers: Drivers
    home: Path
    endpoint: str

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def download(self, *arguments: str, **variables: str) -> Outcome:
        command = ["download", "--json", "--cache-dir", str(self.cache), *arguments]
        return self.drivers.run(command, self.home, {"HF_ENDPOINT": self.endpoint} | variables)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start a process of its own, under the environment's cache folder."""
        return subprocess.Popen(
            [sys.executable, "-m", "tgi_cli", "download", *arguments],
            env=environment(self.endpoint, self.home, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def client(tmp_path: Path, drivers: Drivers, hub: Hub) -> Client:
    return Client(drivers, tmp_path, hub.url)


def blob(size: int, seed: int = 0) -> File:
    """A large file whose bytes differ everywhere, so that a misplaced piece shows."""
    words = (size + 31) // 32
    data = b"".join(f"{seed:08x}{number:024x}".encode() for number in range(words))
    return File(data[:size], lfs=True)


def text(value: str = "{}") -> File:
    return File(value.encode())


@pytest.fixture
def model(hub: Hub) -> Repo:
    """A usual repository: sharded safetensors with everything around them."""
    repo = Repo(
        {
            ".gitattributes": text("*.safetensors filter=lfs"),
            "README.md": text("# model"),
            "config.json": text('{"model_type": "llama"}'),
            "generation_config.json": text(),
            "tokenizer.json": text('{"version": "1.0"}'),
            "tokenizer_config.json": text('{"a": 1}'),
            "chat_template.jinja": text("{{ messages }}"),
            "model-00001-of-00002.safetensors": blob(3_000_000, 1),
            "model-00002-of-00002.safetensors": blob(2_000_000, 2),
            "model.safetensors.index.json": text('{"weight_map": {}}'),
            "pytorch_model-00001-of-00001.bin": blob(1_000, 3),
            "pytorch_model.bin.index.json": text('{"weight_map": {"a": "b"}}'),
            "original/consolidated.00.pth": blob(1_000, 4),
            "onnx/model.onnx": blob(1_000, 5),
            "onnx/config.json": text('{"onnx": 1}'),
        }
    )
    hub.repos["org/model"] = repo
    return repo
