"""One decoder layer on the bench: its weights by name, its inputs observed, its parts replaced.

The layer that runs is the model's own `Layer`, built from the checkpoint with replaced tensors laid
over it, so that nothing here knows how a family wires its parts; `points_of` reads from the spec
which matrices share an input and where that input comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from tgi_cli.kernels.backend import Backend
from tgi_cli.model.batch import Batch, GroupTables
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.model.layer import Layer, load_layer
from tgi_cli.model.linear import Linear
from tgi_cli.model.rope import rope_table
from tgi_cli.model.spec import DecoderSpec
from tgi_cli.quantize.convert.loading import float_loader
from tgi_cli.quantize.convert.stream import Stream, StreamWriter
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource
from tgi_cli.quantize.methods.statistics import InputStatistics

Role = Literal["qkv", "o", "gate_up", "down"]
#: Those behind the middle of a layer, where the residual stream has what attention adds.
_FEED: frozenset[Role] = frozenset({"gate_up", "down"})
#: Rows [n, columns] -> rows of the same shape.
Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Producer:
    """What makes an input: the gain of a norm, or the output rows of a matrix.

    `repeats`: each head of `head_dim` outputs feeds so many consecutive heads of the input, as
    values do under grouped queries.
    """

    name: str
    kind: Literal["norm", "matrix"]
    unit_offset: bool = False
    repeats: int = 1
    head_dim: int = 1


@dataclass(frozen=True, slots=True)
class Point:
    """Matrices that read the same input. `parts` are module names, without `.weight`."""

    role: Role
    parts: tuple[str, ...]
    producer: Producer


def points_of(spec: DecoderSpec, index: int) -> tuple[Point, ...]:
    """The points of a layer, in the order in which they run."""
    layer, names = spec.layers[index], spec.names
    prefix = names.layer.format(index=index)
    part, offset = layer.attention, layer.norm.unit_offset
    return (
        Point(
            "qkv",
            (prefix + names.q, prefix + names.k, prefix + names.v),
            Producer(prefix + names.before_attention, "norm", unit_offset=offset),
        ),
        Point(
            "o",
            (prefix + names.o,),
            Producer(
                prefix + names.v,
                "matrix",
                repeats=part.num_heads // part.num_kv_heads,
                head_dim=part.head_dim,
            ),
        ),
        Point(
            "gate_up",
            (prefix + names.gate, prefix + names.up),
            Producer(prefix + names.before_feed, "norm", unit_offset=offset),
        ),
        Point("down", (prefix + names.down,), Producer(prefix + names.up, "matrix")),
    )


class Overlay:
    """A source with some tensors replaced."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.replaced: dict[str, Tensor] = {}

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        return self.source.keys()

    def __contains__(self, key: str) -> bool:
        return key in self.source

    def shape(self, key: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.source.shape(key)

    def nbytes(self, key: str) -> int:
        """Bytes on disk."""
        return self.source.nbytes(key)

    def read(self, key: str, shard: Shard = WHOLE) -> Tensor:
        """The replacement, or what is stored."""
        return self.replaced[key] if key in self.replaced else self.source.read(key, shard)

    def release(self, key: str) -> None:
        """See `TensorSource.release`."""
        self.source.release(key)


class StatisticsOptions(TypedDict, total=False):
    """See `InputStatistics`."""

    moments: bool
    every: int


class _Reached(Exception):
    """Every point that is asked for has seen the batch."""


class _Tap(Linear):
    """A linear layer that shows its input to a function before it multiplies."""

    def __init__(self, inner: Linear, show: Callable[[Tensor], None]) -> None:
        super().__init__(inner.ops, inner.weight)
        self.inner = inner
        self.show = show

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """See `Linear.forward`."""
        self.show(x)
        return self.inner.forward(x, batch)


class _RoundedLinear(Linear):
    """A linear layer whose input is rounded before it multiplies."""

    def __init__(self, inner: Linear, rounding: Rounding) -> None:
        super().__init__(inner.ops, inner.weight)
        self.inner = inner
        self.rounding = rounding

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """See `Linear.forward`."""
        return self.inner.forward(self.rounding(x), batch)


class LayerWork:
    """Layer `index` of a checkpoint, in float32.

    Args:
        checkpoint: the unquantized model, for contexts of the samples' length.
        backend: where it runs.
        index: which layer.
    """

    def __init__(self, checkpoint: Checkpoint, backend: Backend, index: int) -> None:
        self.spec, self.index, self.backend = checkpoint.spec, index, backend
        self.points = points_of(self.spec, index)
        self._checkpoint = checkpoint
        self._overlay = Overlay(checkpoint.source)
        self._layer: Layer | None = None
        self._rounding: Rounding | None = None
        self._middle: Stream | None = None  # of the stream that is observed

    @property
    def prefix(self) -> str:
        """What the names of this layer's tensors begin with."""
        return self.spec.names.layer.format(index=self.index)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, in which norms are stored again."""
        return self._checkpoint.stored_dtype

    @property
    def tensor_names(self) -> list[str]:
        """All tensors of this layer in the checkpoint."""
        ignored = self.spec.names.ignored
        names = (key for key in self._overlay.keys() if key.startswith(self.prefix))  # noqa: SIM118
        return sorted(key for key in names if not key.endswith(ignored))

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is now, in float32, on the backend's device."""
        stored = self._overlay.read(name)
        return stored.to(self.backend.device, torch.float32)

    def weight(self, point: Point) -> Tensor:
        """The matrices of a point, stacked along the output: [out, in] float32."""
        return torch.cat([self.tensor(f"{part}.weight") for part in point.parts])

    def sizes(self, point: Point) -> list[int]:
        """Outputs of each part of a point."""
        return [self._overlay.shape(f"{part}.weight")[0] for part in point.parts]

    def replace(self, name: str, value: Tensor) -> None:
        """Let `value` stand for a tensor from now on."""
        self._overlay.replaced[name] = value
        self._layer = None
        names = self.spec.names
        if name not in {
            self.prefix + part + ".weight" for part in (names.gate, names.up, names.down)
        }:
            self._forget_middle()

    def round_inputs(self, rounding: Rounding) -> None:
        """Let every matrix see its input rounded from now on."""
        self._rounding = rounding
        self._layer = None
        self._forget_middle()

    def has(self, name: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return name in self._overlay

    def observe(
        self, stream: Stream, points: Sequence[Point], **options: Unpack[StatisticsOptions]
    ) -> list[InputStatistics]:
        """Run the samples up to the last of `points`; statistics of the inputs of each.

        `options` are those of `InputStatistics`.
        For points behind the middle of the layer, what the first half gives is kept on the disk
        until that changes.
        """
        half = all(point.role in _FEED for point in points)
        source = self._halfway(stream) if half else stream
        layer = self._built()
        run = self._feed if half else self._forward
        homes = _homes(layer)
        gathered: dict[Role, InputStatistics] = {}
        waiting: set[Role] = set()

        def show(role: Role, rows: Tensor) -> None:
            if role not in gathered:
                gathered[role] = InputStatistics(rows.shape[1], rows.device, **options)
            gathered[role].add(rows)
            waiting.discard(role)
            if not waiting:
                raise _Reached

        plain = {}
        for point in points:
            home, place = homes[point.role]
            plain[point.role] = getattr(home, place)
            tap = _Tap(plain[point.role], partial(show, point.role))
            setattr(home, place, tap)
        try:
            for _, states in source.batches():
                waiting.update(point.role for point in points)
                try:
                    run(layer, states)
                except _Reached:
                    continue
        finally:
            for point in points:
                home, place = homes[point.role]
                setattr(home, place, plain[point.role])
        return [gathered[point.role] for point in points]

    def advance(self, stream: Stream) -> Stream:
        """Run the samples through the layer as it is now; the states in front of the next one."""
        if self._middle is not None and self._middle.name == _middle_name(stream):
            states = self._run(self._middle, stream.writer(self.index + 1), self._feed)
            self._forget_middle()
            return states
        return self._run(stream, stream.writer(self.index + 1), self._forward)

    def _halfway(self, stream: Stream) -> Stream:
        """The states in the middle of the layer."""
        if self._middle is None or self._middle.name != _middle_name(stream):
            self._forget_middle()
            middle = Stream(stream.folder, _middle_name(stream), stream.shape, self.index)
            self._middle = self._run(stream, StreamWriter(middle), self._attend)
        return self._middle

    def _forget_middle(self) -> None:
        if self._middle is not None:
            self._middle.remove()
            self._middle = None

    def _run(
        self, stream: Stream, writer: StreamWriter, part: Callable[[Layer, Tensor], Tensor]
    ) -> Stream:
        layer = self._built()
        for rows, states in stream.batches():
            writer.put(rows, part(layer, states))
        return writer.finish()

    def _built(self) -> Layer:
        if self._layer is None:
            spec = self.spec
            loader = float_loader(self._checkpoint, self.backend, self._overlay)
            rope = spec.layers[self.index].attention.rope
            table = rope_table(rope, torch.float32, self.backend.device)
            group = next(
                number for number, each in enumerate(spec.kv_groups) if self.index in each.layers
            )
            self._layer = load_layer(loader, spec, self.index, group, table)
            if self._rounding is not None:
                round_inputs(self._layer, self._rounding)
        return self._layer

    def _forward(self, layer: Layer, states: Tensor) -> Tensor:
        """States [n, length, width] through the layer, each sample on its own."""
        return self._feed(layer, self._attend(layer, states))

    def _attend(self, layer: Layer, states: Tensor) -> Tensor:
        """The first half."""
        count, length, _ = states.shape
        part = self.spec.layers[self.index].attention
        # One block holds a whole sample.
        caches = self.backend.allocate_kv(
            count, length, part.num_kv_heads, part.head_dim, torch.float32
        )
        return self._through(
            states, lambda rows, batch: layer.attend(rows, torch.zeros_like(rows), batch, *caches)
        )

    def _feed(self, layer: Layer, states: Tensor) -> Tensor:
        """The second half."""
        return self._through(
            states, lambda rows, batch: layer.feed(rows, torch.zeros_like(rows), batch)
        )

    def _through(
        self, states: Tensor, part: Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
    ) -> Tensor:
        device = self.backend.device
        count, length, width = states.shape
        batch = _batch(count, length, len(self.spec.kv_groups), device)
        delta, residual = part(states.reshape(count * length, width).to(device), batch)
        return (delta + residual).view(count, length, width)


def _middle_name(stream: Stream) -> str:
    return f"{stream.name}-middle"


def round_inputs(layer: Layer, rounding: Rounding) -> None:
    """Let every matrix of `layer` see its input rounded from now on."""
    for home, place in _homes(layer).values():
        setattr(home, place, _RoundedLinear(getattr(home, place), rounding))


def _homes(layer: Layer) -> dict[Role, tuple[object, str]]:
    """Where a layer keeps the linear layer of each role: the object and its attribute."""
    return {
        "qkv": (layer.attention, "qkv"),
        "o": (layer.attention, "output"),
        "gate_up": (layer.mlp, "gate_up"),
        "down": (layer.mlp, "down"),
    }


def _batch(count: int, length: int, num_groups: int, device: torch.device) -> Batch:
    """`count` prompts of `length` tokens; sample i lies in block i."""
    tokens = count * length
    tables = GroupTables(
        slot_mapping=torch.arange(tokens, device=device),
        block_tables=torch.arange(count, dtype=torch.int32, device=device)[:, None],
    )
    return Batch(
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.arange(length, device=device).repeat(count),
        query_start=torch.arange(count + 1, dtype=torch.int32, device=device) * length,
        seq_lens=torch.full((count,), length, dtype=torch.int32, device=device),
        groups=(tables,) * num_groups,
        logit_rows=torch.zeros(0, dtype=torch.int64, device=device),
        adapter_slots=torch.zeros(count, dtype=torch.int32, device=device),
        query_lens=(length,) * count,
        key_lens=(length,) * count,
    )
