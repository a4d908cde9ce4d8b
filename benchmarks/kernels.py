"""Each kernel against its roofline: what this machine reads and multiplies, in the same run.

    python -m benchmarks.kernels [--hidden 576 --intermediate 1536 --heads 9 --kv-heads 3]
        [--vocab 49152] [--json kernels.json]

Prints the time of a layer's products, its attention and the kernels between them for several
numbers of rows, what share that is of the bound by memory or by arithmetic (whichever is slower),
and oneDNN's time through `torch.nn.functional.linear` in bf16. Weights, keys and values take turns,
so that they come from memory as in a model; so do the rows of some layers, which caches hold.
Minima of several runs, all measured in turns. `--peaks` prints what the machine reads and
multiplies, as JSON, and ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.library import (
    Attention,
    Context,
    Embed,
    Gemm,
    Probe,
    RmsNorm,
    RopeStore,
    pointer,
)
from tgi_cli.kernels.cpu.packed import PackedWeight
from tgi_cli.kernels.cpu.program import KV_FORMS
from tgi_cli.kernels.cpu.sampling import NativeSampling
from tgi_cli.kernels.grouped import INT4, INT8, Grouped, GroupScheme, wide
from tgi_cli.kernels.kv_rows import KV_DTYPES, row_width
from tgi_cli.kernels.sampling import RowParameters

ROWS = (1, 8, 32, 512)
LAYERS = 24
#: Bytes of the matrices that take turns, several times what caches hold.
TURNING = 1 << 27
REPEATS = 7


@dataclass(frozen=True)
class Peaks:
    """Bytes a second read from memory, and operations a second with bf16 and int8."""

    read: float
    bf16: float
    int8: float

    def line(self) -> str:
        """For people."""
        return (
            f"reads {self.read / 1e9:.1f} GB/s, bf16 {self.bf16 / 1e9:.0f} GFLOP/s, "
            f"int8 {self.int8 / 1e9:.0f} GOP/s"
        )


@dataclass(frozen=True)
class Timing:
    """One kernel at one size: seconds a call, and the share of its bound that it reaches."""

    kernel: str
    form: str
    work: str
    seconds: float
    share: float
    gigabytes_per_second: float
    gigaflops_per_second: float
    onednn_seconds: float | None = None

    def cell(self) -> str:
        """For a table, in microseconds."""
        return f"{self.seconds * 1e6:.0f} ({self.share:.0%})"


def timing(
    kernel: str,
    form: str,
    work: str,
    seconds: float,
    amounts: tuple[float, float],
    peaks: tuple[float, float],
    onednn_seconds: float | None = None,
) -> Timing:
    """From the bytes and operations of a call, and how many of each a second could be."""
    (size, operations), (read, rate) = amounts, peaks
    share = max(size / read, operations / rate) / seconds
    speeds = (size / seconds / 1e9, operations / seconds / 1e9)
    return Timing(kernel, form, work, seconds, share, *speeds, onednn_seconds)


def weight_bytes(scheme: GroupScheme | None, n: int, k: int) -> int:
    """Of a packed matrix, its scales left out."""
    return n * k * (16 if scheme is None else scheme.bits) // 8


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


def products(
    context: Context, console: Console, shapes: dict[str, tuple[int, int]]
) -> list[Timing]:
    """One table for each way to hold weights."""
    schemes = {
        "bf16": None,
        "int8": INT8,
        "int4": INT4,
        "int4 g64": wide(4, 64, minimum=True),
        "nf4 g64": wide(4, 64, codes="nf4"),
        "e4m3 g64": wide(8, 64, codes="e4m3"),
    }
    found = []
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
            copies = max(3, TURNING // weight_bytes(scheme, n, k))
            source = torch.randn(n, k).bfloat16() if scheme is None else RandomRows(scheme, n, k)
            dense = [source.clone() for _ in range(copies)] if isinstance(source, Tensor) else []
            packed = [
                PackedWeight.dense(context, source)
                if isinstance(source, Tensor)
                else PackedWeight.grouped(context, source)
                for _ in range(copies)
            ]
            cells = []
            for rows in ROWS:
                x = torch.randn(rows, k).bfloat16()
                out = torch.empty(rows, n, dtype=torch.bfloat16)
                turns = copies if rows <= 8 else min(copies, LAYERS)
                calls = [
                    Gemm(pointer(x), weight.matrix, None, pointer(out), rows, k, n, 1)
                    for weight in packed[:turns]
                ]
                spent = shortest(lambda calls=calls: [context.call("gemm", c) for c in calls])
                other = None
                if scheme is None:
                    turning = dense[:turns]
                    other = shortest(
                        lambda x=x, turning=turning: [
                            torch.nn.functional.linear(x, w) for w in turning
                        ]
                    )
                    other /= turns
                one = timing(
                    f"{label} {n}x{k}", name, f"M={rows}", spent / turns,
                    (packed[0].nbytes, 2 * rows * n * k), (peaks.read, rate), other,
                )  # fmt: skip
                cells.append(one.cell())
                if other is not None:
                    cells.append(f"{other * 1e6:.0f}")
                found.append(one)
            table.add_row(f"{label} {n}x{k}", *cells)
        console.print(peaks.line(), highlight=False)
        console.print(table)
    return found


def attention(
    context: Context, console: Console, heads: int, kv_heads: int, dim: int
) -> list[Timing]:
    """Decode at several contexts, and a prefill, in several forms of the cache.

    Every byte of the caches is 0x3c, which is an ordinary number in all of them.
    """
    peaks = measured_peaks(context)
    found = []
    shapes = ((1, 1, 2048), (8, 1, 512), (32, 1, 256), (32, 1, 1024), (1, 2048, 2048))
    for (seqs, queries, length), name in itertools.product(shapes, KV_DTYPES):
        blocks, dtype = -(-length // 16), KV_DTYPES[name]
        width = row_width(dim, dtype) * dtype.itemsize
        shape = (seqs * blocks + 1, 16, kv_heads, width)
        turns = 8 if queries > 1 else max(8, TURNING // (2 * seqs * length * kv_heads * width))
        size = math.prod(shape)
        caches = [
            [context.buffer(size).fill_(0x3C) for _ in range(2)] for _ in range(turns)
        ]  # on huge pages, as an engine's
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
        spent = shortest(lambda calls=calls: [context.call("attention", c) for c in calls])
        spent /= turns
        read = 2 * seqs * length * kv_heads * width
        work = sum(4 * seqs * heads * dim * (length - queries + 1 + i) for i in range(queries))
        found.append(
            timing(
                "attention", name, f"{seqs} x {queries} of {length}", spent,
                (read, work), (peaks.read, peaks.bf16),
            )
        )  # fmt: skip
    console.print(peaks.line(), highlight=False)
    title = f"attention, {heads} heads, {kv_heads} of keys, {dim} wide"
    console.print(as_table(title, "cache", found))
    return found


def between(context: Context, console: Console, sizes: argparse.Namespace) -> list[Timing]:
    """Norm, rotary embedding with the store of keys and values, embedding, and the draw."""
    peaks = measured_peaks(context)
    hidden, dim, vocab = sizes.hidden, sizes.head_dim, sizes.vocab
    width = (sizes.heads + 2 * sizes.kv_heads) * dim
    embedding = PackedWeight.dense(context, torch.randn(vocab, hidden).bfloat16())
    norm, angles = torch.ones(hidden), torch.randn(2048, dim).sin()
    found = []
    for rows in ROWS:
        positions = torch.arange(rows)
        ids = torch.randint(0, vocab, (rows,))
        cache = (rows // 16 + 1, 16, sizes.kv_heads, dim)
        norms, ropes, gathers, kept = [], [], [], []
        for _ in range(LAYERS):
            x, qkv = torch.randn(rows, hidden), torch.randn(rows, width)
            keys, values = (torch.zeros(cache, dtype=torch.bfloat16) for _ in range(2))
            narrow = torch.empty(rows, max(hidden, sizes.heads * dim), dtype=torch.bfloat16)
            kept += [x, qkv, keys, values, narrow]
            norms.append(
                RmsNorm(pointer(x), pointer(norm), pointer(narrow), rows, hidden, hidden, 1e-5, 0)
            )
            ropes.append(
                RopeStore(
                    pointer(qkv), pointer(angles), None, None, pointer(positions),
                    pointer(positions), pointer(narrow), pointer(keys), pointer(values),
                    rows, sizes.heads, sizes.kv_heads, dim, dim, 1e-5, KV_FORMS[torch.bfloat16],
                )
            )  # fmt: skip
            gathers.append(Embed(embedding.matrix, pointer(ids), pointer(x), rows, 1.0))
        for name, kernel, calls, size in (
            ("norm", "rms_norm", norms, rows * hidden * 6),
            ("rotary embedding and store", "rope_store", ropes, rows * width * 6),
            ("embedding", "embed", gathers, rows * hidden * 6),
        ):
            spent = shortest(
                lambda kernel=kernel, calls=calls: [context.call(kernel, c) for c in calls]
            )
            found.append(
                timing(name, "", f"M={rows}", spent / LAYERS, (size, 0), (peaks.read, peaks.bf16))
            )
    for rows, greedy in itertools.product((1, 32), (True, False)):
        spent = drawing(context, rows, vocab, greedy=greedy)
        form = "greedy" if greedy else "top-k 50, top-p 0.95, repetition 1.1"
        amounts = (rows * vocab * 4, 0)
        found.append(timing("draw", form, f"M={rows}", spent, amounts, (peaks.read, peaks.bf16)))
    console.print(peaks.line(), highlight=False)
    console.print(as_table(f"between products, {hidden} wide, {vocab} tokens", "form", found))
    return found


def drawing(context: Context, rows: int, vocab: int, *, greedy: bool) -> float:
    """Seconds of a draw for so many rows, each with a history of 64 tokens."""
    sampling = NativeSampling(
        context,
        RowParameters(
            repetition=np.full(rows, 1.0 if greedy else 1.1, np.float32),
            frequency=np.zeros(rows, np.float32),
            presence=np.zeros(rows, np.float32),
            temperature=np.full(rows, 1.0 if greedy else 0.8, np.float32),
            top_k=np.full(rows, 0 if greedy else 50),
            top_p=np.full(rows, 1.0 if greedy else 0.95),
            min_p=np.zeros(rows),
            seeds=np.arange(rows),
            greedy=np.full(rows, greedy),
        ),
    )
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, 64), np.int32)
    places, lens = np.arange(rows), np.full(rows, 64)
    found = []
    for _ in range(REPEATS):
        logits = torch.randn(rows, vocab) * 4  # a draw overwrites them
        began = time.perf_counter()
        sampling.sample(logits, tokens, places, lens, lens // 2)
        found.append(time.perf_counter() - began)
    return min(found)


def as_table(title: str, form: str, timings: Sequence[Timing]) -> Table:
    """A line for each."""
    table = Table(title=title)
    for column in ("kernel", form):
        table.add_column(column)
    for column in ("work", "microseconds", "GB/s", "GFLOP/s", "share of the bound"):
        table.add_column(column, justify="right")
    for one in timings:
        table.add_row(
            one.kernel, one.form, one.work, f"{one.seconds * 1e6:.1f}",
            f"{one.gigabytes_per_second:.1f}", f"{one.gigaflops_per_second:.0f}",
            f"{one.share:.0%}",
        )  # fmt: skip
    return table


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"hidden": 576, "intermediate": 1536, "heads": 9, "kv-heads": 3, "head-dim": 64}
    for name, value in {**sizes, "vocab": 49152, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--variant", help="one of this CPU's, the best if not given")
    parser.add_argument("--peaks", action="store_true", help="what the machine can do, alone")
    parser.add_argument("--json", type=Path)
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
    timings = products(
        context,
        console,
        {
            "qkv": (width, options.hidden),
            "output": (options.hidden, options.heads * options.head_dim),
            "gate and up": (2 * options.intermediate, options.hidden),
            "down": (options.hidden, options.intermediate),
            "head": (options.vocab, options.hidden),
        },
    )
    timings += attention(context, console, options.heads, options.kv_heads, options.head_dim)
    timings += between(context, console, options)
    if options.json is not None:
        result = {
            "machine": platform.platform(),
            "torch": torch.__version__,
            "variant": context.variant,
            "threads": context.num_threads,
            "peaks": asdict(measured_peaks(context)),
            "timings": [asdict(one) for one in timings],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
