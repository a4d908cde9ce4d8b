"""What is to be done: method, bits, groups and layout, checked before any work.

Refuses what common servers do not load, and groups that do not fit the model's matrices. Knows
shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tgi_cli.errors import UsageError
from tgi_cli.model.spec import DecoderSpec
from tgi_cli.quantize.convert.awq_layout import AwqLayout
from tgi_cli.quantize.convert.compressed_layouts import Fp8Layout, Int8Layout, PackedLayout
from tgi_cli.quantize.convert.gptq_layout import GptqLayout
from tgi_cli.quantize.convert.layout import Layout

MethodName = Literal["gptq", "awq", "fp8", "int8"]
LayoutName = Literal["gptq", "awq", "compressed-tensors"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)

GROUP_SIZES = (128, 64, 32)
_BITS = {"gptq": (4, 8), "awq": (4,), "fp8": (8,), "int8": (8,)}
_LAYOUTS: dict[str, dict[str, type[Layout]]] = {
    "gptq": {"gptq": GptqLayout, "compressed-tensors": PackedLayout},
    "awq": {"awq": AwqLayout},
    "fp8": {"compressed-tensors": Fp8Layout},
    "int8": {"compressed-tensors": Int8Layout},
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked choice; made by `choose`. `group_size` -1: one group per output row."""

    method: MethodName
    bits: int
    group_size: int
    layout_name: LayoutName

    @property
    def layout(self) -> Layout:
        """How the result is stored."""
        return _LAYOUTS[self.method][self.layout_name]()

    @property
    def needs_text(self) -> bool:
        """Whether the method cannot do without activations to look at."""
        return self.method != "fp8"

    @property
    def label(self) -> str:
        """The recipe in a few words."""
        groups = "" if self.group_size == -1 else f", groups of {self.group_size}"
        return f"{self.method}, {self.bits} bits{groups}, {self.layout_name} layout"

    @classmethod
    def choose(
        cls,
        method: str,
        bits: int | None = None,
        group_size: int | None = None,
        layout: str | None = None,
    ) -> Recipe:
        """Fill in and check what the user asked for; None means the method's own default.

        Raises:
            UsageError: no such method, or one that common servers would not load.
        """
        if method not in METHODS:
            raise UsageError(f"unknown method `{method}`", hint=f"use {', '.join(METHODS)}")
        allowed = _BITS[method]
        if bits is not None and bits not in allowed:
            known = " or ".join(map(str, allowed))
            raise UsageError(
                f"--method {method} with {bits} bits is not written, as other servers do not "
                f"load it; it has {known} bits",
                hint=f"use --bits {allowed[0]}, or another method",
            )
        grouped = method in ("gptq", "awq")
        if group_size is not None and not grouped:
            raise UsageError(
                f"--method {method} has one scale per output row and takes no --group-size",
                hint="leave --group-size out",
            )
        sizes = (*GROUP_SIZES, -1) if method == "gptq" else GROUP_SIZES
        if grouped and group_size is not None and group_size not in sizes:
            raise UsageError(
                f"a group size of {group_size} is not written, as other servers do not load it",
                hint=f"use one of {', '.join(map(str, sizes))} with --method {method}",
            )
        layouts = _LAYOUTS[method]
        if layout is not None and layout not in layouts:
            raise UsageError(
                f"--method {method} is not stored in the layout `{layout}`",
                hint=f"use --layout {' or '.join(layouts)}",
            )
        return cls(
            method=method,
            bits=bits or allowed[0],
            group_size=(group_size or GROUP_SIZES[0]) if grouped else -1,
            layout_name=layout or next(iter(layouts)),  # type: ignore[arg-type]
        )

    def check(self, spec: DecoderSpec) -> None:
        """Check that every matrix of the model can be stored so.

        Raises:
            UsageError: the group size does not divide an input, or a dimension cannot be packed.
        """
        if self.layout_name == "compressed-tensors" and self.group_size == -1 and self.bits == 8:
            return  # one code a byte and one scale a row: any shape will do
        for name, outputs, inputs in _shapes(spec):
            size = self.group_size
            if size != -1 and inputs % size:
                fitting = [other for other in GROUP_SIZES if _divides(other, spec)]
                way_out = (
                    f"use --group-size {fitting[0]}, which divides every matrix of this model"
                    if fitting
                    else "use --method fp8 or int8, which have one scale per output row"
                )
                raise UsageError(
                    f"a group size of {size} does not divide the {inputs} inputs of {name}",
                    hint=way_out,
                )
            for what, dimension in (("inputs", inputs), ("outputs", outputs)):
                if dimension % 32:
                    raise UsageError(
                        f"{name} has {dimension} {what}, and {self.method} is stored in "
                        "blocks of 32",
                        hint="use --method fp8 or int8, which take any size",
                    )


def _shapes(spec: DecoderSpec) -> list[tuple[str, int, int]]:
    """Name, outputs and inputs of the different matrices of the layers."""
    names, hidden = spec.names, spec.hidden_size
    shapes: dict[tuple[str, int, int], None] = {}
    for layer in spec.layers:
        part, feed = layer.attention, layer.feed
        queries, keys = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
        for shape in (
            (names.q, queries, hidden),
            (names.k, keys, hidden),
            (names.v, keys, hidden),
            (names.o, hidden, queries),
            (names.gate, feed.intermediate_size, hidden),
            (names.up, feed.intermediate_size, hidden),
            (names.down, hidden, feed.intermediate_size),
        ):
            shapes[shape] = None
    return list(shapes)


def _divides(size: int, spec: DecoderSpec) -> bool:
    return not any(inputs % size for _, _, inputs in _shapes(spec))
