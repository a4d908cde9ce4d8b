"""Reading `layer_types`: which layers attend to everything and which to a window."""

from __future__ import annotations

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.model.config_reader import ConfigReader


def read_windows(config: ConfigReader, window: int, default: list[int | None]) -> list[int | None]:
    """The window of each layer, None for all keys; `default` where the key is absent.

    Raises:
        CheckpointError: the list has another length than the layers.
        UnsupportedModel: a kind of layer we do not have.
    """
    kinds = config.words("layer_types")
    if kinds is None:
        return default
    if len(kinds) != len(default):
        raise CheckpointError(
            f"{config.where} has {len(kinds)} `layer_types` for {len(default)} layers"
        )
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise UnsupportedModel(
                f"{config.where} has a layer of type {kind!r}; this build runs {', '.join(known)}"
            )
    return [known[kind] for kind in kinds]
