"""Adapters by name: opened and checked before weights are read, and the slot of every row.

Slots count from 1 in the order of the configuration, the same on all ranks. Knows no scheduling:
rows of one step may have any adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from tgi_cli.config import AdapterConfig, AdapterSource, EngineConfig, ModelConfig
from tgi_cli.engine.messages import AdapterFacts, Request
from tgi_cli.errors import (
    CheckpointError,
    HubError,
    InvalidRequest,
    UnsupportedModel,
    UsageError,
)
from tgi_cli.model.adapter_files import OpenedAdapter
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.model.lora import AdapterBank
from tgi_cli.model.partition import Partition

log = logging.getLogger(__name__)


def fetched(config: EngineConfig) -> AdapterConfig:
    """The adapters with folders on this machine as their sources, fetched if they are not here.

    Raises `HubError` for one that cannot be found or fetched; names it.
    """
    model, adapters = config.model, []
    for each in config.lora.adapters:
        folder = each.source
        if not Path(folder).is_dir():
            folder = _from_hub(each, model)
        adapters.append(AdapterSource(each.name, folder))
    return msgspec.structs.replace(config.lora, adapters=tuple(adapters))


def _from_hub(adapter: AdapterSource, model: ModelConfig) -> str:
    from tgi_cli import hub  # its client takes long to import

    try:
        folder = hub.resolve(
            adapter.source, revision=adapter.revision, token=model.token, cache_dir=model.cache_dir
        )
    except HubError as error:
        raise type(error)(f"adapter `{adapter.name}`: {error.message}", hint=error.hint) from None
    return str(folder)


class OpenedAdapters:
    """The adapters of a configuration, their headers checked against the model.

    Args:
        config: its sources are folders on this machine.
        checkpoint: the model they are for.

    Raises:
        EngineError: one is broken, does not fit or is of a kind that is not served; names it.
        UsageError: one has a rank above the limit.
    """

    def __init__(self, config: AdapterConfig, checkpoint: Checkpoint) -> None:
        self.names = tuple(each.name for each in config.adapters)
        self._opened: list[OpenedAdapter] = []
        for each in config.adapters:
            try:
                opened = OpenedAdapter(Path(each.source), checkpoint.spec)
            except (CheckpointError, UnsupportedModel) as error:
                raise type(error)(
                    f"adapter `{each.name}`: {error.message}", hint=error.hint
                ) from None
            rank = opened.config.max_rank
            if config.max_rank is not None and rank > config.max_rank:
                raise UsageError(
                    f"adapter `{each.name}` has rank {rank}, more than --max-lora-rank "
                    f"{config.max_rank}",
                    hint="raise --max-lora-rank, or leave it away: no rank is too large then",
                )
            self._opened.append(opened)

    def nbytes(self, dtype: torch.dtype, partition: Partition) -> int:
        """Memory of a rank's part of all of them."""
        return sum(opened.nbytes(dtype, partition) for opened in self._opened)

    def load(
        self, partition: Partition, dtype: torch.dtype, device: torch.device
    ) -> AdapterBank | None:
        """Read a rank's part; None where there are none."""
        if not self._opened:
            return None
        return AdapterBank([each.load(partition, dtype, device) for each in self._opened])

    def facts(
        self, config: AdapterConfig, dtype: torch.dtype, parts: Sequence[Partition]
    ) -> list[AdapterFacts]:
        """What `/v1/models` and `/info` say; `config` names the sources as the user did."""
        return [
            AdapterFacts(
                name=each.name,
                source=each.source,
                path=str(opened.folder),
                rank=opened.config.max_rank,
                base_model=opened.config.base_model,
                bytes=sum(opened.nbytes(dtype, part) for part in parts),
            )
            for each, opened in zip(config.adapters, self._opened, strict=True)
        ]

    def warn_of_other_bases(self, model_id: str) -> None:
        """Log which adapters say that they were trained on a model of another name."""
        for name, opened in zip(self.names, self._opened, strict=True):
            base = opened.config.base_model
            if base is not None and _last(base) != _last(model_id):
                log.warning(
                    "adapter `%s` says it was trained on `%s`, and this is `%s`",
                    name,
                    base,
                    model_id,
                )


class AdapterRows:
    """The adapter's slot of every row: [max_rows] int32, 0 for none."""

    def __init__(self, names: Sequence[str], max_rows: int) -> None:
        self.slots = np.zeros(max_rows, np.int32)
        self._slot_of = {"": 0, **{name: slot for slot, name in enumerate(names, 1)}}

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Look the slot up. Raises `InvalidRequest` for a name that is not served."""
        slot = self._slot_of.get(request.adapter)
        if slot is None:
            raise InvalidRequest(f"there is no adapter `{request.adapter}` here")
        self.slots[row] = slot

    def remove(self, row: int) -> None:
        """Put the row back to none."""
        self.slots[row] = 0


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
