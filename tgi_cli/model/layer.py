"""How a layer's norms, attention and feed-forward part are wired.

Between layers travels a pair: the residual stream, and what the last part wants added to it. So
addition and the next norm are one operation, and a layer ends without a pass over memory.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tgi_cli.model.attention import Attention, load_attention
from tgi_cli.model.batch import Batch
from tgi_cli.model.loader import Loader
from tgi_cli.model.mlp import GatedMLP
from tgi_cli.model.norm import Norm
from tgi_cli.model.spec import DecoderSpec


class Layer(Protocol):
    """One layer of a decoder."""

    attention: Attention
    mlp: GatedMLP

    def forward(
        self, delta: Tensor, residual: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[tokens, hidden_size] twice -> the next pair."""
        ...

    def attend(
        self, delta: Tensor, residual: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first half of `forward`: the pair in front of the feed-forward part."""
        ...

    def feed(self, delta: Tensor, residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The second half."""
        ...


class PreNormLayer:
    """A norm before each part: Llama's wiring."""

    def __init__(
        self, attention: Attention, mlp: GatedMLP, before_attention: Norm, before_feed: Norm
    ) -> None:
        self.attention = attention
        self.mlp = mlp
        self.before_attention = before_attention
        self.before_feed = before_feed

    def forward(
        self, delta: Tensor, residual: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Layer.forward`."""
        return self.feed(*self.attend(delta, residual, batch, k_cache, v_cache), batch)

    def attend(
        self, delta: Tensor, residual: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Layer.attend`."""
        x, residual = self.before_attention.add_forward(delta, residual)
        return self.attention.forward(x, batch, k_cache, v_cache), residual

    def feed(self, delta: Tensor, residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Layer.feed`."""
        x, residual = self.before_feed.add_forward(delta, residual)
        return self.mlp.forward(x, batch), residual


class SandwichLayer:
    """A norm before and after each part: Gemma's wiring."""

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMLP,
        before_attention: Norm,
        after_attention: Norm,
        before_feed: Norm,
        after_feed: Norm,
    ) -> None:
        self.attention = attention
        self.mlp = mlp
        self.before_attention = before_attention
        self.after_attention = after_attention
        self.before_feed = before_feed
        self.after_feed = after_feed

    def forward(
        self, delta: Tensor, residual: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Layer.forward`."""
        return self.feed(*self.attend(delta, residual, batch, k_cache, v_cache), batch)

    def attend(
        self, delta: Tensor, residual: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Layer.attend`."""
        x, residual = self.before_attention.add_forward(delta, residual)
        delta = self.attention.forward(x, batch, k_cache, v_cache)
        return self.after_attention.forward(delta), residual

    def feed(self, delta: Tensor, residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Layer.feed`."""
        x, residual = self.before_feed.add_forward(delta, residual)
        return self.after_feed.forward(self.mlp.forward(x, batch)), residual


def load_layer(
    loader: Loader, spec: DecoderSpec, index: int, group: int, rope_table: Tensor
) -> Layer:
    """Read layer `index`; its spec selects the class."""
    layer, names, size = spec.layers[index], spec.names, spec.hidden_size
    prefix = names.layer.format(index=index)

    def norm(name: str) -> Norm:
        return Norm.load(loader, prefix + name, size, layer.norm)

    before_attention = norm(names.before_attention)
    attention = load_attention(loader, layer.attention, names, prefix, size, group, rope_table)
    before_feed = norm(names.before_feed)
    mlp = GatedMLP.load(loader, layer.feed, names, prefix, size)
    if layer.wiring == "pre_norm":
        return PreNormLayer(attention, mlp, before_attention, before_feed)
    return SandwichLayer(
        attention,
        mlp,
        before_attention,
        norm(names.after_attention),
        before_feed,
        norm(names.after_feed),
    )
