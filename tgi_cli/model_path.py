"""Where a model lies: a path as it is, anything else by way of the hub.

A path that needs nothing but to be opened is told without importing the hub's client, which takes
longer than opening it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tgi_cli.config import ModelConfig

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def local_checkpoint(model_id: str) -> Path | None:
    """The `.gguf` file or the folder with safetensors that `model_id` names; None for all else.

    What is found is what `hub.resolve` gives for it.
    """
    if not model_id:
        return None
    path = Path(model_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    return path if any((path / name).is_file() for name in _WEIGHTS) else None


def resolve(model: ModelConfig, progress: Callable[[float], None] | None = None) -> Path:
    """The folder or file of the model, fetched if it is not here; see `hub.resolve`.

    Raises:
        HubError: it cannot be found or fetched.
    """
    local = local_checkpoint(model.model_id)
    if local is not None:
        return local
    from tgi_cli import hub

    return hub.resolve(
        model.model_id,
        revision=model.revision,
        token=model.token,
        cache_dir=model.cache_dir,
        progress=progress,
    )
