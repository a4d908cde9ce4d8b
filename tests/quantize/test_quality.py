"""Both ends of a conversion, a part of the vocabulary at a time: the same as all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.quantize.conversion import samples
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.embedding import load_embedding
from tgi_cli.quantize.convert.loading import float_loader
from tgi_cli.quantize.convert.quality import End, embed
from tgi_cli.quantize.convert.stream import Stream

BACKEND = select("cpu", num_threads=1)
SHAPE = (3, 20, 64)


def states(checkpoint: Checkpoint, folder: Path, name: str, seed: int) -> Stream:
    """A stream of noise behind the last layer."""
    writer = Stream(folder, name, SHAPE, 0).writer(len(checkpoint.spec.layers))
    generator = torch.Generator().manual_seed(seed)
    writer.put(slice(0, SHAPE[0]), torch.randn(SHAPE, generator=generator))
    return writer.finish()


@pytest.mark.parametrize("family", ["llama", "llama-biased-tied", "gemma3"])
def test_parts_of_the_vocabulary_and_of_the_rows_give_what_the_whole_gives(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    tokens = samples(*SHAPE[:2], seed=3).tokens
    before, after = (states(checkpoint, tmp_path, name, i) for i, name in enumerate("ba"))
    end = End(checkpoint, BACKEND)
    some = torch.randn(5, SHAPE[2])
    whole, logits = end.compare(tokens, before, after), end.logits(some)
    monkeypatch.setattr("tgi_cli.quantize.convert.quality.ROWS", 7)
    monkeypatch.setattr("tgi_cli.quantize.convert.quality.VOCABULARY", 13)
    parts = end.compare(tokens, before, after)
    torch.testing.assert_close(end.logits(some), logits)
    assert parts.tokens == whole.tokens == SHAPE[0] * (SHAPE[1] - 1)
    assert parts.perplexity_before == pytest.approx(whole.perplexity_before, rel=1e-5)
    assert parts.perplexity_after == pytest.approx(whole.perplexity_after, rel=1e-5)
    assert parts.divergence == pytest.approx(whole.divergence, rel=1e-4)
    assert whole.perplexity_before != whole.perplexity_after
    assert whole.divergence > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_rows_that_a_text_uses_are_those_of_the_table(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    tokens = samples(*SHAPE[:2], seed=3).tokens
    stream = embed(checkpoint, BACKEND, tokens, Stream(tmp_path, "states", SHAPE, 0))
    table = load_embedding(float_loader(checkpoint, BACKEND), checkpoint.spec)
    got = torch.cat([rows for _, rows in stream.batches()])
    assert torch.equal(got, table.forward(tokens.reshape(-1)).view(SHAPE))
