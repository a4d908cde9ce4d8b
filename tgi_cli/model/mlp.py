"""The gated feed-forward part: gate and up in one matrix, activation, down."""

from __future__ import annotations

from torch import Tensor

from tgi_cli.kernels.ops import Ops
from tgi_cli.model.batch import Batch
from tgi_cli.model.linear import Linear, load_linear, load_summed_linear
from tgi_cli.model.loader import Loader
from tgi_cli.model.spec import DenseSpec, TensorNames


class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, ops: Ops, spec: DenseSpec, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activate = {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_tanh_mul}[spec.activation]

    @classmethod
    def load(
        cls, loader: Loader, spec: DenseSpec, names: TensorNames, prefix: str, hidden_size: int
    ) -> GatedMLP:
        """Read one layer's feed-forward part from the tensors below `prefix`."""
        size = spec.intermediate_size
        gate_up = load_linear(
            loader,
            [prefix + names.gate, prefix + names.up],
            [size, size],
            hidden_size,
            bias=spec.bias,
            gated=True,
        )
        down = load_summed_linear(loader, prefix + names.down, hidden_size, size, bias=spec.bias)
        return cls(loader.ops, spec, gate_up, down)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]."""
        return self.down.forward(self.activate(self.gate_up.forward(x, batch)), batch)
