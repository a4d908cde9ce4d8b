"""What node 0 and the other nodes say to each other: msgspec structs, never pickle.

A node opens one connection to `--master-addr` for itself, and two for each of its ranks: the two
channels of `rank_messages`, which it hands to the rank's process. The first frame of each says
which it is.
"""

from __future__ import annotations

import msgspec


class NodeHello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First frame of a node: what it was told on its command line."""

    version: str  # of tgi
    node_rank: int
    nnodes: int
    num_shard: int


class Link(msgspec.Struct, frozen=True, kw_only=True, tag="link"):
    """First frame of a rank's connection; `token` comes from the `Welcome`."""

    token: str
    rank: int
    purpose: str  # control | steps


Opening = NodeHello | Link


class NodeReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The node has the model. `address` is its own, by which it reaches node 0."""

    fingerprint: str
    model_path: str
    address: str
    cores: list[tuple[int, ...]]  # of each of its ranks; empty: anywhere
    num_threads: int  # of each of its ranks


class RankEnded(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """A rank's process is gone; `code` is negative for a signal."""

    rank: int
    code: int


class NodeLeaves(msgspec.Struct, frozen=True, kw_only=True, tag="leaves"):
    """The node was told to stop and takes its ranks with it."""


FromNode = NodeReady | RankEnded | NodeLeaves


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """All nodes are there: start these ranks."""

    token: str
    ranks: list[int]


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The node cannot take part."""

    message: str
    hint: str | None = None


class Serving(msgspec.Struct, frozen=True, kw_only=True, tag="serving"):
    """Every rank is loaded."""


class Farewell(msgspec.Struct, frozen=True, kw_only=True, tag="farewell"):
    """The engine ends: stopped, or because of `failure`; `again` if it will be started anew."""

    failure: str | None = None
    again: bool = False


ToNode = Welcome | Refused | Serving | Farewell
