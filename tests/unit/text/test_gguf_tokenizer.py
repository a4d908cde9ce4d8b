from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tests.unit.text.corpus import CASES, fuzz
from tests.unit.text.factories import (
    byte_level,
    gguf_bpe,
    gguf_gemma,
    gguf_sentencepiece,
    pieces_of,
    sentencepiece_vocab,
    write_gguf,
)
from tgi_cli.errors import CheckpointError, TgiError, UnsupportedModel
from tgi_cli.gguf_metadata import read_gguf_metadata
from tgi_cli.gguf_tokenizer import build_gguf_tokenizer
from tgi_cli.pretokenizers import word_split
from tgi_cli.tokenizer_source import TokenizerSource

SPECIALS = ("<|im_end|>", "<|endoftext|>", "<s>", "</s>")
TEXTS = [*CASES, *fuzz(1, 300, SPECIALS)]


def load(path: Path) -> TokenizerSource:
    return build_gguf_tokenizer(read_gguf_metadata(str(path)))


def transformers_tokenizer(path: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer


def byte_level_last(*splits: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, last])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# As published in the `tokenizer.json` of a model of each kind.
PUBLISHED = {
    "gpt-2": GPT2,
    "olmo": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "refact": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "command-r": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "deepseek-coder": byte_level_last(
        pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
    ),
} | {
    name: byte_level_last(pre_tokenizers.Split(Regex(pattern), "isolated"))
    for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()
    if name != "jina-v5-nano"  # an embedding model
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_words_are_cut_as_published(name: str) -> None:
    ours, published = word_split(name).build(), PUBLISHED[name]
    for text in TEXTS:
        assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("default", ["It", "'", "s", "Ġ", "123", "45", ".", "67", "Ġx", "++"]),
        ("falcon", ["It", "'", "s", "Ġ", "123", "45", ".", "67", "Ġx", "++"]),
        ("stablelm2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", ".", "6", "7", "Ġx", "++"]),
        ("deepseek-llm", ["It", "'", "s", "Ġ", "12345", ".", "67", "Ġx", "++"]),
        ("deepseek-v3", ["It", "'s", "Ġ", "123", "45", ".", "67", "Ġx", "++"]),
        ("dbrx", ["It", "'s", "Ġ", "123", "45", ".", "67", "Ġx", "++"]),
        ("bloom", ["It's", "Ġ12345", ".", "67", "Ġx++"]),
        ("viking", ["It's", "Ġ", "1", "2", "3", "4", "5", ".", "6", "7", "Ġx++"]),
        ("tiny_aya", ["It's", "Ġ", "12", "345", ".", "67", "Ġx", "++"]),
        ("seed-coder", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", ".", "6", "7", "Ġx", "++"]),
    ],
)
def test_words_of_one_sentence(name: str, words: list[str]) -> None:
    cut = word_split(name).build().pre_tokenize_str("It's 12345.67 x++")
    assert [word for word, _ in cut] == words


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "gpt-2", "dbrx"])
def test_byte_level_ids_equal_transformers(tmp_path: Path, pre: str) -> None:
    path = gguf_bpe(tmp_path / "model.gguf", pre, user_defined=("<think>",))
    ours, theirs = load(path).tokenizer, transformers_tokenizer(path)
    # transformers never takes a word that is an entry whole; merges reach all entries here.
    for text in [*TEXTS, "a<think>b"]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids, repr(text)


def test_user_defined_tokens_match_whole_even_with_a_space(tmp_path: Path) -> None:
    """llama.cpp matches them as spelled; transformers respells those with a space and misses."""
    path = gguf_bpe(tmp_path / "model.gguf", "qwen2", user_defined=("<tool call>",))
    source = load(path)
    vocab_size = source.tokenizer.get_vocab_size()
    assert source.tokenizer.encode("a<tool call>").ids[-1] == vocab_size - 1
    assert source.tokenizer.decode([vocab_size - 1]) == "<tool call>"


def test_digits_of_smollm_stand_alone_unlike_in_transformers(tmp_path: Path) -> None:
    """transformers reads no `smollm` rule and joins digits; the published tokenizer does not."""
    path = gguf_bpe(tmp_path / "model.gguf", "smollm")
    ours, theirs = load(path).tokenizer, transformers_tokenizer(path)
    text = "in 100 years, 12345"
    assert ours.encode(text).ids != theirs.encode(text, add_special_tokens=False).ids
    theirs.pre_tokenizer = PUBLISHED["smollm"]
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids


def test_ignore_merges_takes_whole_words(tmp_path: Path) -> None:
    pieces, types, merges = pieces_of(byte_level())
    whole = "".join(["Ġ", "xyzzyx"])
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*pieces, whole],
        "tokenizer.ggml.token_type": [*types, 1],
        "tokenizer.ggml.merges": merges,
    }
    for pre, is_whole in (("llama-bpe", True), ("qwen2", False)):
        path = write_gguf(tmp_path / f"{pre}.gguf", values | {"tokenizer.ggml.pre": pre})
        ids = load(path).tokenizer.encode(" xyzzyx", add_special_tokens=False).ids
        assert (ids == [len(pieces)]) is is_whole


def test_gemma_ids_equal_transformers(tmp_path: Path) -> None:
    path = gguf_gemma(tmp_path / "model.gguf")
    ours, theirs = load(path).tokenizer, transformers_tokenizer(path)
    specials = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    for text in [*TEXTS, *fuzz(3, 300, specials), " " * 40, "a" + " " * 7 + "b"]:
        assert ours.encode(text).ids == theirs.encode(text).ids, repr(text)


def sentencepiece_reference(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """SentencePiece BPE from its definition, on one stretch of text without special tokens."""
    vocab = {piece: index for index, piece in enumerate(pieces)}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        best = None
        for at in range(len(symbols) - 1):
            index = vocab.get(symbols[at] + symbols[at + 1])
            if index is not None and (best is None or scores[index] > scores[best[1]]):
                best = (at, index)
        if best is None:
            break
        at = best[0]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        if symbol in vocab:
            ids.append(vocab[symbol])
        else:
            ids.extend(vocab[f"<0x{byte:02X}>"] for byte in symbol.encode())
    return ids


def test_sentencepiece_ids_follow_its_definition(tmp_path: Path) -> None:
    pieces, scores, _ = sentencepiece_vocab()
    ours = load(gguf_sentencepiece(tmp_path / "model.gguf")).tokenizer
    texts = [text for text in [*CASES, *fuzz(2, 300)] if text and "<" not in text]
    for text in texts:
        expected = sentencepiece_reference(text, pieces, scores)
        assert ours.encode(text, add_special_tokens=False).ids == expected, repr(text)


def test_space_prefix_is_the_one_of_llama_cpp_not_of_transformers(tmp_path: Path) -> None:
    """SentencePiece puts its space before a leading space too; transformers' GGUF path does not."""
    path = gguf_sentencepiece(tmp_path / "model.gguf")
    ours, theirs = load(path).tokenizer, transformers_tokenizer(path)
    assert "".join(ours.encode(" hello").tokens) == "<s>▁▁hello"
    assert "".join(theirs.encode(" hello").tokens) == "<s>▁hello"
    # A text after a control token is a new stretch and gets its own space.
    assert ours.encode("<s>the", add_special_tokens=False).tokens == ["<s>", "▁the"]
    for text in TEXTS:
        # Where both mean the same: no leading space or mark, no special token inside.
        if text and text[0] not in " ▁" and not any(special in text for special in SPECIALS):
            assert ours.encode(text).ids == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ({}, [1, 9]),
        ({"ggml.add_bos_token": False}, [9]),
        ({"ggml.add_bos_token": True, "ggml.add_eos_token": True}, [1, 9, 2]),
        ({"ggml.add_bos_token": False, "ggml.add_eos_token": True}, [9, 2]),
    ],
)
def test_bos_and_eos_flags(tmp_path: Path, flags: dict[str, bool], ids: list[int]) -> None:
    source = load(gguf_sentencepiece(tmp_path / "model.gguf", **flags))
    (word,) = source.tokenizer.encode("the", add_special_tokens=False).ids
    expected = [word if token_id == 9 else token_id for token_id in ids]
    assert source.tokenizer.encode("the").ids == expected


def test_byte_level_bos_default_follows_the_pre_tokenizer(tmp_path: Path) -> None:
    for pre, begins in (("llama-bpe", True), ("tekken", True), ("qwen2", False)):
        tokenizer = load(gguf_bpe(tmp_path / f"{pre}.gguf", pre)).tokenizer
        assert (tokenizer.encode("x").ids[0] == 1) is begins


def test_special_ids_and_every_end_of_turn(tmp_path: Path) -> None:
    source = load(gguf_bpe(tmp_path / "a.gguf", "qwen2"))
    assert source.special_ids == {"bos": 1, "eos": 2}
    # The file names <|im_end|>; <|endoftext|> ends an answer too.
    assert source.eos_token_ids == (2, 0)
    source = load(gguf_bpe(tmp_path / "b.gguf", "qwen2", **{"ggml.eot_token_id": 5}))
    assert source.eos_token_ids == (2, 5, 0)


def test_harmony_end_is_no_end_of_answer(tmp_path: Path) -> None:
    pieces, types, merges = pieces_of(byte_level(specials=("<|return|>", "<|call|>", "<|end|>")))
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert load(write_gguf(tmp_path / "m.gguf", values)).eos_token_ids == (0, 1)


def test_control_tokens_outside_the_byte_alphabet_are_kept(tmp_path: Path) -> None:
    """transformers drops such control tokens as mislabelled; DeepSeek's are all of this kind."""
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    pieces, types, merges = pieces_of(byte_level(specials=(end,)))
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    source = load(write_gguf(tmp_path / "m.gguf", values))
    assert source.tokenizer.encode(f"the{end}").ids[-1] == pieces.index(end)
    assert source.eos_token_ids == (pieces.index(end),)


def test_chat_templates(tmp_path: Path) -> None:
    more = {"chat_template": "main", "chat_template.tool_use": "tools"}
    source = load(gguf_bpe(tmp_path / "m.gguf", "qwen2", **more))
    assert source.chat_templates == {"default": "main", "tool_use": "tools"}


BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.token_type": [1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pre": "no-such"}, UnsupportedModel, "pre-tokenizer `no-such`"),
        ({"model": "t5"}, UnsupportedModel, "tokenizer `t5`"),
        ({"tokens": ["a", "b", "a"]}, CheckpointError, "ids 0 and 2 are both 'a'"),
        ({"token_type": [1]}, CheckpointError, "3 tokens and 1 token types"),
        ({"merges": ["a c"]}, CheckpointError, "do not fit its vocabulary"),
        ({"eos_token_id": 3}, CheckpointError, "is 3, but the vocabulary has 3 tokens"),
        ({"model": "llama", "scores": [0.0]}, CheckpointError, "3 pieces, 1 scores"),
        ({"model": "llama", "scores": [0.0] * 3}, CheckpointError, "nor byte 0x0"),
        ({"model": "llama"}, CheckpointError, "lacks the key `tokenizer.ggml.scores`"),
    ],
)
def test_bad_vocabularies(
    tmp_path: Path, change: dict[str, object], error: type[TgiError], message: str
) -> None:
    values = BPE | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    path = write_gguf(tmp_path / "m.gguf", values)
    with pytest.raises(error, match=message):
        load(path)
