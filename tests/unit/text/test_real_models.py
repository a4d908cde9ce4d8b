"""Ids of real GGUF vocabularies equal transformers' on a Unicode corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from tests.unit.text.corpus import CASES, fuzz
from tgi_cli import config
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.demo_model import demo_model_path
from tgi_cli.detokenizer import Detokenizer
from tgi_cli.tokenizer import Tokenizer, load_tokenizer

SPECIALS = ("<|im_end|>", "<|im_start|>", "<eos>", "<start_of_turn>", "<end_of_turn>")
TEXTS = [*CASES, *fuzz(11, 400, SPECIALS)]


def transformers_tokenizer(path: Path) -> Backend:
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer


def assert_same(ours: Tokenizer, theirs: Backend) -> None:
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text).ids, repr(text)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not in the cache folder; `tgi download demo` puts it there")
    return path


@pytest.mark.real_model
def test_smollm2(smollm2: Path) -> None:
    ours, theirs = load_tokenizer(str(smollm2)), transformers_tokenizer(smollm2)
    # transformers knows no `smollm` rule and joins digits. This is the published pre-tokenizer.
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert_same(ours, theirs)
    assert ours.vocab_size == 49152
    assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert ours.eos_token_ids == (2, 0)


@pytest.mark.real_model
def test_smollm2_chat(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    prompt = ChatTemplate.of(tokenizer).render([{"role": "user", "content": "Hi 😀"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi 😀<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids.count(1) == 3
    stream = Detokenizer(tokenizer, ())
    pieces = [stream.push([token_id]).text for token_id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert "😀" in pieces


@pytest.mark.slow  # transformers takes a minute to read this vocabulary
@pytest.mark.real_model
def test_gemma_3() -> None:
    path = config.cache_dir() / "models" / "gemma-3-270m-q4_k_m.gguf"
    if not path.is_file():
        pytest.skip(f"the GGUF file of Gemma 3 270M is not at {path}")
    ours = load_tokenizer(str(path))
    assert_same(ours, transformers_tokenizer(path))
    assert ours.vocab_size == 262144
    assert (ours.bos_token_id, ours.eos_token_ids) == (2, (1, 106))
