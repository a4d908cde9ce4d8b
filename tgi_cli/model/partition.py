"""How a decoder is divided over ranks: which part of every tensor one rank holds.

Megatron's scheme (Shoeybi et al., 2019): q, k, v, gate and up are cut along their outputs, output
and down along their inputs, so that a layer needs two sums over the ranks; the token table and the
head are cut along the vocabulary. Whole heads stay together, and a rank has the key/value heads its
query heads look at: where there are more ranks than those, several ranks hold the same one.
Knows tensors by name alone, and no format beyond the width of its groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tgi_cli.errors import UsageError
from tgi_cli.model.spec import AttentionSpec, DecoderSpec
from tgi_cli.quantize.formats.base import WHOLE, Shard

#: Features of a feed-forward part that stay together at least: what native kernels take at once.
_FEED_UNIT = 32

#: For the name of a matrix, how many of its inputs are stored together.
ColumnUnit = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Partition:
    """The part of `spec` (a whole decoder) that `rank` of `world_size` holds.

    Feed-forward features are shared out `feed_unit` at a time.
    """

    spec: DecoderSpec
    rank: int = 0
    world_size: int = 1
    feed_unit: int = _FEED_UNIT

    @classmethod
    def of(
        cls, spec: DecoderSpec, rank: int, world_size: int, column_unit: ColumnUnit
    ) -> Partition:
        """Divide a decoder whose matrices are stored in groups.

        Raises:
            UsageError: it does not divide into so many ranks; names what is in the way and the
                numbers that work.
        """
        if world_size == 1:
            return cls(spec)
        feed_unit = _feed_unit(spec, column_unit)
        reason = _reason_against(spec, world_size, feed_unit, column_unit)
        if reason is None:
            return cls(spec, rank, world_size, feed_unit)
        most = max(layer.attention.num_heads for layer in spec.layers)
        possible = [
            n
            for n in range(1, most + 1)
            if _reason_against(spec, n, feed_unit, column_unit) is None
        ]
        raise UsageError(
            f"the model does not divide into {world_size} shards: {reason}",
            hint=_way_out(possible, world_size),
        )

    @property
    def local(self) -> DecoderSpec:
        """The decoder as this rank computes it: its own heads and hidden features."""
        if self.world_size == 1:
            return self.spec
        layers = []
        for layer in self.spec.layers:
            size = self._length(self._feed(), layer.feed.intermediate_size)
            layers.append(
                replace(
                    layer,
                    attention=self.attention(layer.attention),
                    feed=replace(layer.feed, intermediate_size=size),
                )
            )
        return replace(self.spec, layers=tuple(layers))

    def attention(self, whole: AttentionSpec) -> AttentionSpec:
        """The same attention with this rank's heads."""
        if self.world_size == 1:
            return whole
        return replace(
            whole,
            num_heads=whole.num_heads // self.world_size,
            num_kv_heads=self._length(self._kv(whole), whole.num_kv_heads),
        )

    @property
    def first(self) -> bool:
        """Whether this rank adds what is to be added once, such as a bias to a sum."""
        return self.rank == 0

    @property
    def vocabulary(self) -> tuple[tuple[int, int], ...]:
        """First and last-plus-one token id of every rank's rows of the token table."""
        size = self.spec.vocab_size
        return tuple(
            Shard(0, rank, self.world_size, unit=1).bounds(size) for rank in range(self.world_size)
        )

    def shard(self, key: str) -> Shard:
        """The part of tensor `key` (a `….weight`, `….bias` or table) that this rank reads."""
        if self.world_size == 1:
            return WHOLE
        names = self.spec.names
        if key in (names.embedding, names.head):
            return Shard(0, self.rank, self.world_size, unit=1)
        for index, layer in enumerate(self.spec.layers):
            prefix = names.layer.format(index=index)
            if key.startswith(prefix):
                return self._in_layer(key.removeprefix(prefix), layer.attention)
        return WHOLE

    def shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this rank's part of a tensor of `shape`."""
        shard = self.shard(key)
        if shard.dim is None:
            return shape
        length = self._length(shard, shape[shard.dim])
        return (*shape[: shard.dim], length, *shape[shard.dim + 1 :])

    def _in_layer(self, key: str, attention: AttentionSpec) -> Shard:
        names = self.spec.names
        if key == names.sinks:
            return Shard(0, self.rank, self.world_size)
        stem, _, kind = key.rpartition(".")
        if stem == names.q:
            return Shard(0, self.rank, self.world_size)
        if stem in (names.k, names.v):
            return self._kv(attention)
        if stem in (names.gate, names.up):
            return self._feed()
        if kind == "bias":
            return WHOLE  # of a sum: added once
        if stem == names.o:
            return Shard(1, self.rank, self.world_size)
        if stem == names.down:
            return replace(self._feed(), dim=1)
        return WHOLE

    def _kv(self, attention: AttentionSpec) -> Shard:
        heads = attention.num_kv_heads
        if heads % self.world_size == 0:
            return Shard(0, self.rank, self.world_size)
        return Shard(0, self.rank * heads // self.world_size, heads)

    def _feed(self) -> Shard:
        return Shard(0, self.rank, self.world_size, unit=self.feed_unit)

    @staticmethod
    def _length(shard: Shard, size: int) -> int:
        first, last = shard.bounds(size)
        return last - first


def _feed_unit(spec: DecoderSpec, column_unit: ColumnUnit) -> int:
    names = spec.names
    return math.lcm(
        _FEED_UNIT,
        *(
            column_unit(f"{names.layer.format(index=index)}{names.down}.weight")
            for index in range(len(spec.layers))
        ),
    )


def _reason_against(
    spec: DecoderSpec, world_size: int, feed_unit: int, column_unit: ColumnUnit
) -> str | None:
    if world_size == 1:
        return None
    names = spec.names
    for index, layer in enumerate(spec.layers):
        attention, size = layer.attention, layer.feed.intermediate_size
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        if heads % world_size or (kv_heads % world_size and world_size % kv_heads):
            return f"it has {heads} attention heads and {kv_heads} key/value heads"
        if -(-size // feed_unit) < world_size:
            return f"its {size} feed-forward features are shared out {feed_unit} at a time"
        output = f"{names.layer.format(index=index)}{names.o}"
        unit, width = column_unit(f"{output}.weight"), heads // world_size * attention.head_dim
        if width % unit:
            return (
                f"the {heads // world_size} of {heads} heads of a shard have {width} features, "
                f"and `{output}` is quantized in groups of {unit}"
            )
    if spec.vocab_size < world_size:
        return f"its vocabulary has {spec.vocab_size} tokens"
    return None


def _way_out(possible: list[int], world_size: int) -> str:
    """Propose the number nearest to the one asked for, the larger of two."""
    several = [n for n in possible if n > 1]
    if not several:
        return "leave --num-shard away: no number of shards works for this model"
    nearest = min(several, key=lambda n: (abs(n - world_size), -n))
    listed = ", ".join(map(str, possible[:-1]))
    return f"use --num-shard {nearest} ({listed} and {possible[-1]} work)"
