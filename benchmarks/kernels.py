"""Each kernel against its roofline: what this machine reads and multiplies, in the same run.

    python -m benchmarks.kernels [--hidden 576 --intermediate 1536 --heads 9 --kv-heads 3]

Prints the time of a layer's products and its attention for several numbers of rows, what share that
is of the bound by memory or by arithmetic (whichever is slower), and oneDNN's time through
`torch.nn.functional.linear` in bf16. Weights of several layers take turns, so that they come from
memory as in a model. Minima of several runs, all measured in turns. `--peaks` prints what the
machine reads and multiplies, as JSON, and ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.library import Attention, Context, Gemm, Probe, pointer
from tgi_cli.kernels.cpu.packed import PackedWeight
from tgi_cli.kernels.cpu.program import KV_FORMS
from tgi_cli.kernels.grouped import INT4, INT8, Grouped, GroupScheme, wide
from tgi_cli.kernels.kv_rows import KV_DTYPES, row_width

ROWS = (1, 8, 32, 512)
LAYERS = 24
REPEATS = 7


@dataclass(frozen=True)
class Peaks:
    """Bytes a second read from memory, and operations a second with bf16 and int8."""

    read: float
    bf16: float
    int8: float


class RandomRows:
    """Random codes of a scheme, as `kernels.grouped.GroupedRows`."""

    wide_activations = False
    order: Tensor | None = None

    def __init__(self, scheme: GroupScheme, rows: int, columns: int) -> None:
        self.scheme, self.out_features, self.in_features = scheme, rows, columns

    def rows(self, start: int, end: int) -> Grouped:
        """Random each time."""
        groups = (end - start, self.in_features // self.scheme.group)
        codes = torch.randint(0, 1 << self.scheme.bits, (end - start, self.in_features))
        scales = (torch.rand(groups) / 100).to(self.scheme.scale)
        return Grouped(codes.byte(), scales, scales.clone() if self.scheme.minimum else None)


def shortest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def measured_peaks(context: Context) -> Peaks:
    """What the machine reaches now."""
    lanes = 8 if context.variant == "avx2" else 16
    memory = torch.ones(1 << 29, dtype=torch.uint8)
    sink = torch.zeros(context.num_threads)

    def seconds(kind: int, amount: int) -> float:
        probe = Probe(kind, pointer(memory), pointer(sink), amount)
        return shortest(lambda: context.call("probe", probe))

    rounds = 200_000
    products = rounds * 12 * context.num_threads * lanes * 2
    return Peaks(
        len(memory) / seconds(0, len(memory)),
        products * 2 / seconds(1, rounds),
        products * 4 / seconds(2, rounds),
    )


def products(context: Context, console: Console, shapes: dict[str, tuple[int, int]]) -> None:
    """One table for each way to hold weights."""
    schemes = {
        "bf16": None,
        "int8": INT8,
        "int4": INT4,
        "int4 g64": wide(4, 64, minimum=True),
        "nf4 g64": wide(4, 64, codes="nf4"),
        "e4m3 g64": wide(8, 64, codes="e4m3"),
    }
    for name, scheme in schemes.items():
        peaks = measured_peaks(context)
        rate = peaks.int8 if scheme and scheme.codes == "integer" else peaks.bf16
        table = Table(title=f"{name} weights: microseconds a product (share of the bound)")
        table.add_column("product")
        for rows in ROWS:
            table.add_column(f"M={rows}", justify="right")
            if scheme is None:
                table.add_column("oneDNN", justify="right")
        for label, (n, k) in shapes.items():
            dense = [torch.randn(n, k).bfloat16() for _ in range(LAYERS if scheme is None else 1)]
            packed = [
                PackedWeight.dense(context, dense[i])
                if scheme is None
                else PackedWeight.grouped(context, RandomRows(scheme, n, k))
                for i in range(LAYERS)
            ]
            cells = []
            for rows in ROWS:
                x = torch.randn(rows, k).bfloat16()
                out = torch.empty(rows, n, dtype=torch.bfloat16)
                calls = [
                    Gemm(pointer(x), weight.matrix, None, pointer(out), rows, k, n, 1)
                    for weight in packed
                ]
                spent = shortest(lambda calls=calls: [context.call("gemm", c) for c in calls])
                spent /= LAYERS
                bound = max(packed[0].nbytes / peaks.read, 2 * rows * n * k / rate)
                cells.append(f"{spent * 1e6:.0f} ({bound / spent:.0%})")
                if scheme is None:
                    other = shortest(
                        lambda x=x, dense=dense: [torch.nn.functional.linear(x, w) for w in dense]
                    )
                    cells.append(f"{other / LAYERS * 1e6:.0f}")
            table.add_row(f"{label} {n}x{k}", *cells)
        console.print(
            f"reads {peaks.read / 1e9:.1f} GB/s, bf16 {peaks.bf16 / 1e9:.0f} GFLOP/s, "
            f"int8 {peaks.int8 / 1e9:.0f} GOP/s",
            highlight=False,
        )
        console.print(table)


def attention(context: Context, console: Console, heads: int, kv_heads: int, dim: int) -> None:
    """Decode at several contexts, and a prefill, in several forms of the cache.

    Every byte of the caches is 0x3c, which is an ordinary number in all of them.
    """
    peaks = measured_peaks(context)
    table = Table(title=f"attention, {heads} heads, {kv_heads} of keys, {dim} wide")
    for column in (
        "work",
        "cache",
        "microseconds",
        "GB/s of keys and values",
        "GFLOP/s",
        "share of the bound",
    ):
        table.add_column(column, justify="right")
    shapes = ((1, 1, 2048), (8, 1, 512), (32, 1, 256), (32, 1, 1024), (1, 2048, 2048))
    for (seqs, queries, length), name in itertools.product(shapes, KV_DTYPES):
        blocks, dtype = -(-length // 16), KV_DTYPES[name]
        width = row_width(dim, dtype) * dtype.itemsize
        shape = (seqs * blocks + 1, 16, kv_heads, width)
        caches = [[torch.full(shape, 0x3C, dtype=torch.uint8) for _ in range(2)] for _ in range(8)]
        q = torch.randn(seqs * queries, heads, dim).bfloat16()
        out = torch.empty_like(q)
        tables = torch.arange(1, seqs * blocks + 1, dtype=torch.int32).view(seqs, -1)
        lens = torch.full((seqs,), length, dtype=torch.int32)
        starts = torch.arange(seqs + 1, dtype=torch.int32) * queries
        calls = [
            Attention(
                *map(pointer, (q, keys, values, tables, lens, starts, out)),
                seqs, blocks, heads, kv_heads, dim, 0, dim**-0.5, 0.0, KV_FORMS[dtype],
            )
            for keys, values in caches
        ]  # fmt: skip
        spent = shortest(lambda calls=calls: [context.call("attention", c) for c in calls]) / 8
        read = 2 * seqs * length * kv_heads * width
        work = sum(4 * seqs * heads * dim * (length - queries + 1 + i) for i in range(queries))
        bound = max(read / peaks.read, work / peaks.bf16)
        table.add_row(
            f"{seqs} x {queries} of {length}", name,
            f"{spent * 1e6:.0f}", f"{read / spent / 1e9:.1f}",
            f"{work / spent / 1e9:.0f}", f"{bound / spent:.0%}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 576), ("intermediate", 1536), ("heads", 9), ("kv-heads", 3),
                        ("head-dim", 64), ("threads", os.cpu_count())):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--variant", help="one of this CPU's, the best if not given")
    parser.add_argument("--peaks", action="store_true", help="what the machine can do, alone")
    options = parser.parse_args()
    found = library.load()
    if found is None:
        raise SystemExit("error: the native kernels are not built")
    torch.set_num_threads(options.threads)
    context = found.context(options.variant or found.variants()[0], options.threads)
    if options.peaks:
        print(json.dumps(asdict(measured_peaks(context))))
        return
    console = Console(width=130)
    console.print(f"{context.variant}, {context.num_threads} threads", highlight=False)
    width = (options.heads + 2 * options.kv_heads) * options.head_dim
    products(
        context,
        console,
        {
            "qkv": (width, options.hidden),
            "output": (options.hidden, options.heads * options.head_dim),
            "gate and up": (2 * options.intermediate, options.hidden),
            "down": (options.hidden, options.intermediate),
        },
    )
    attention(context, console, options.heads, options.kv_heads, options.head_dim)


if __name__ == "__main__":
    main()
