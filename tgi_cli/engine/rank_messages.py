"""What rank 0 and the other ranks say to each other: msgspec structs, never pickle.

Each rank has two channels. `control` carries its start, then its state and its heartbeat, and is
its death pipe; `steps` carries the agreed sizes and then the work. No tensors: those travel through
the collective.
"""

from __future__ import annotations

import msgspec

from tgi_cli.config import EngineConfig
from tgi_cli.engine.messages import RankFacts
from tgi_cli.engine.step import Step


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """First frame to a rank. `config` names the model by its path on this machine.

    `store` is where torch.distributed's ranks meet, empty where they share memory; `address` is
    then the one of this machine that the other nodes reach, empty on one machine. An empty tuple of
    `cores` leaves the rank where the kernel puts it.
    """

    config: EngineConfig
    rank: int
    cores: tuple[int, ...]
    num_threads: int
    store: str = ""
    address: str = ""


class Planned(msgspec.Struct, frozen=True, kw_only=True, tag="planned"):
    """What fits on this rank; no weight has been read. `backend` is what it computes with."""

    kv_cache_tokens: int
    max_model_len: int
    backend: str


class RankReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The rank's part of the model is loaded."""

    facts: RankFacts


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The rank's own error; it exits after sending this."""

    error: str  # class name in `tgi_cli.errors`
    message: str
    hint: str | None = None


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat"):
    """A sign of life from a thread of its own; `progress` counts the rank's messages to others."""

    progress: int


RankStatus = Planned | RankReady | RankFailed | Beat


class Agreed(msgspec.Struct, frozen=True, kw_only=True, tag="agreed"):
    """The least of what fits on any rank: every rank allocates this."""

    kv_cache_tokens: int
    max_model_len: int


class Work(msgspec.Struct, frozen=True, kw_only=True, tag="work"):
    """A step to run, after adding what rank 0 drew in each step it has finished since the last.

    Rows that rank 0 could not prepare are left out, and so is what only drawing needs.
    """

    step: Step
    drawn: list[dict[int, list[int]]] = []  # token ids by row


ToRank = Agreed | Work
