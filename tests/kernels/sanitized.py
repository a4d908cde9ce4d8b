"""`python -m tests.kernels.sanitized LIBRARY VARIANT CHECKPOINT...`: kernels on awkward shapes.

Run by `test_sanitizers.py` in a process of its own, where a library built with sanitizers takes the
place of the installed one. Results are compared elsewhere; here a read or write outside an array,
or arithmetic that C++ leaves undefined, ends the process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.golden.native import Stepped
from tests.golden.paged import Paged
from tests.kernels.grouped_weights import RandomGroups
from tests.kernels.test_native_sampling import CASES, Pair
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.packed import FORMS, PackedWeight
from tgi_cli.kernels.cpu.program import NativeStep
from tgi_cli.kernels.grouped import wide
from tgi_cli.kernels.kv_rows import KV_DTYPES
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder

TOKENS = (0, 1, 2, 5, 7, 13, 16, 17, 33, 97)
WIDE = [
    wide(4, 64, minimum=True),
    wide(8, 96, minimum=False),
    wide(4, 32, codes="nf4"),
    wide(8, 96, codes="e4m3"),
]


def multiply(weight: PackedWeight) -> None:
    """Products of several heights, and rows looked up."""
    for tokens in TOKENS:
        x = torch.ones((tokens, weight.in_features), dtype=torch.bfloat16)
        weight.matmul(x, None)
        weight.matmul_float(x)
    ids = torch.tensor([0, weight.out_features - 1, weight.out_features // 2])
    weight.embed(ids, 1.0)
    weight.dequantize()


def matrices(context: library.Context) -> None:
    """Rows that fill no panel and inputs that fill no vector, in every form."""
    for rows, columns in ((1, 2), (31, 6), (33, 64), (77, 130), (96, 48), (2080, 32)):
        multiply(PackedWeight.dense(context, torch.ones((rows, columns), dtype=torch.bfloat16)))
    for scheme in (*FORMS, *WIDE):
        for rows, columns in ((1, 96), (32, 192), (77, 576), (1100, 96)):
            if columns % scheme.group == 0:
                multiply(PackedWeight.grouped(context, RandomGroups(scheme, rows, columns)))


def steps(context: library.Context, path: str) -> None:
    """Prompts, chunks and decodes of a whole decoder, mixed, in every form of the cache."""
    backend = select("cpu")
    decoder = Decoder.build(open_checkpoint(path), backend, torch.bfloat16)
    stepped = Stepped(NativeStep(context, decoder), decoder)
    for dtype in KV_DTYPES.values():
        driver = Paged(
            stepped,  # type: ignore[arg-type]
            backend,
            torch.bfloat16,
            num_seqs=4,
            max_len=96,
            block_size=16,
            kv_dtype=dtype,
        )
        prompt = list(range(3, 99))
        driver.step([(0, prompt[:37]), (1, prompt[:1]), (2, prompt[:16])])
        driver.step([(2, prompt[16:17]), (0, prompt[37:75]), (1, prompt[1:2]), (3, prompt[:95])])
        driver.step([(0, prompt[75:76]), (1, prompt[2:18]), (3, prompt[95:96])])


def samples(context: library.Context) -> None:
    """Every way to draw, over vocabularies with and without a rest."""
    for vocab_size in (41, 64, 1000, 16500):
        pair = Pair(context, vocab_size, [*CASES.values()])
        pair.compare(torch.randn((len(CASES), vocab_size)))
        pair.compare(torch.zeros((len(CASES), vocab_size)))


def overrun(context: library.Context) -> None:
    """Read behind an array: proof that the sanitizer watches the kernels' memory."""
    weight = PackedWeight.dense(context, torch.ones((32, 64), dtype=torch.bfloat16))
    weight.embed(torch.tensor([64]), 1.0)


def main(path: str, variant: str, *checkpoints: str) -> None:
    """Drive one variant of the library at `path`; with the checkpoint `overrun`, misuse it."""
    torch.set_num_threads(1)
    context = library.Library(Path(path)).context(variant, 2)
    # Of malloc's memory, whose ends are guarded, and not cut from large mappings.
    context.buffer = lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)
    if checkpoints == ("overrun",):
        overrun(context)
        return
    matrices(context)
    samples(context)
    for checkpoint in checkpoints:
        steps(context, checkpoint)
    context.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
