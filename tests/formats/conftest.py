from __future__ import annotations

import pytest
import torch

from tests.formats.gguf_models import TinyModel, tiny_model

FAMILIES = ["llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma3"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama() -> TinyModel:
    return tiny_model("llama")
