from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors
from transformers import AutoTokenizer

from tests.unit.text.corpus import CASES, fuzz
from tests.unit.text.factories import (
    byte_level,
    gguf_bpe,
    gguf_gemma,
    gguf_sentencepiece,
    sentencepiece_vocab,
)
from tgi_cli.errors import CheckpointError, InvalidRequest, TgiError, UnsupportedModel
from tgi_cli.tokenizer import load_tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = [*CASES, *fuzz(7, 300, SPECIALS)]


def folder(path: Path, backend: Backend | None = None, **files: Any) -> str:
    """A model folder: `backend` as tokenizer.json, other files as JSON or text by name."""
    path.mkdir(exist_ok=True)
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        stem, _, extension = name.rpartition("_")
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{stem}.{extension}").write_text(text, encoding="utf-8")
    return str(path)


CHATML = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    "pad_token": "<|endoftext|>",
}


def test_ids_and_text_equal_transformers(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", byte_level(), tokenizer_config_json=CHATML)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs(text)["input_ids"]
        assert ids == ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token, ours.bos_token_id) == ("<|im_start|>", 1)
    assert (ours.eos_token, ours.eos_token_id) == ("<|im_end|>", 2)
    assert ours.special_tokens["pad_token"] == "<|endoftext|>"
    assert [i for i in range(ours.vocab_size) if ours.is_special(i)] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["byte level", "gguf", "sentencepiece", "gemma"])
def test_bytes_of_tokens_join_to_the_text(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "m.gguf")
    if kind == "byte level":
        path = folder(tmp_path / "m", byte_level(), tokenizer_config_json=CHATML)
    elif kind == "gguf":
        gguf_bpe(Path(path), "qwen2")
    elif kind == "gemma":
        gguf_gemma(Path(path))
    else:
        gguf_sentencepiece(Path(path))
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        # SentencePiece cannot tell its own space mark from a space.
        written = text if kind in ("byte level", "gguf") else text.replace("▁", " ")
        if kind == "sentencepiece" and ("<s>" in text or "</s>" in text):
            continue  # a space is put after each special token
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        prefix = " " if kind == "sentencepiece" and text else ""
        assert joined == prefix + written
        assert tokenizer.decode(ids, skip_special_tokens=False) == written


def test_byte_fallback_keeps_the_characters_that_are_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_gemma(tmp_path / "m.gguf")))
    euro = [tokenizer.token_id(f"<0x{byte:02X}>") or -1 for byte in "€".encode()]
    assert tokenizer.decode(euro, True) == "€"
    assert tokenizer.decode([*euro, euro[0]], True) == "€\ufffd"
    assert tokenizer.token_bytes(euro[0]) == b"\xe2"
    assert tokenizer.token_text(euro[0]) == "\ufffd"


def test_ids_outside_the_vocabulary_are_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_bpe(tmp_path / "m.gguf", "qwen2")))
    for token_id in (tokenizer.vocab_size, 10**6, 2**40, -1):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.decode([token_id], True) == ""
        assert not tokenizer.is_special(token_id)


def test_offsets_are_characters(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_bpe(tmp_path / "m.gguf", "qwen2")))
    text = "naïve 世界 the"
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert len(ids) == len(offsets)
    assert text[offsets[-1][0] : offsets[-1][1]] == " the"
    assert offsets[0][0] == 0
    assert offsets[-1][1] == len(text)


def test_lone_surrogate_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_bpe(tmp_path / "m.gguf", "qwen2")))
    with pytest.raises(InvalidRequest, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800b", add_special_tokens=False)


def test_truncation_and_padding_in_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = load_tokenizer(folder(tmp_path / "m", backend, tokenizer_config_json=CHATML))
    text = "hello world " * 10
    assert tokenizer.decode(tokenizer.encode(text, True), False) == text


def test_tokens_only_the_configuration_lists_are_added(tmp_path: Path) -> None:
    config = CHATML | {
        "eos_token": "<|done|>",
        "added_tokens_decoder": {
            "421": {"content": "<think>", "special": False},
            "420": {"content": "<|tool|>", "special": True},
        },
        "additional_special_tokens": ["<|more|>"],
    }
    path = folder(tmp_path / "m", byte_level(), tokenizer_config_json=config)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("<|tool|><think><|more|><|done|>", add_special_tokens=False)
    assert ids == [420, 421, 422, 423]
    assert [tokenizer.is_special(token_id) for token_id in ids] == [True, False, True, True]
    assert tokenizer.eos_token_ids == (423,)


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("framed", [False, True])
def test_bos_and_eos_as_transformers_adds_them(
    tmp_path: Path, add_bos: bool | None, add_eos: bool | None, framed: bool
) -> None:
    backend = byte_level()
    if framed:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config = CHATML | {name: flag for name, flag in flags.items() if flag is not None}
    path = folder(tmp_path / "m", backend, tokenizer_config_json=config)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert ours.encode("the", True) == theirs("the")["input_ids"]


def test_every_source_of_eos(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "m",
        byte_level(),
        tokenizer_config_json=CHATML,
        config_json={"eos_token_id": 5, "text_config": {"eos_token_id": [6]}},
        generation_config_json={"eos_token_id": [2, 0]},
    )
    assert load_tokenizer(path).eos_token_ids == (2, 0, 5, 6)


def test_ids_in_the_model_configuration_name_the_tokens(tmp_path: Path) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = load_tokenizer(folder(tmp_path / "a", byte_level(), config_json=ids))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    none = {"bos_token": None, "eos_token": "<|im_end|>"}
    path = folder(tmp_path / "b", byte_level(), config_json=ids, tokenizer_config_json=none)
    assert load_tokenizer(path).bos_token is None


def test_chat_template_sources(tmp_path: Path) -> None:
    def templates(**files: Any) -> dict[str, str]:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        return load_tokenizer(folder(place, byte_level(), **files)).chat_templates

    config = {"chat_template": "from config"}
    assert templates() == {}
    assert templates(tokenizer_config_json=config) == {"default": "from config"}
    more = {"chat_template_json": {"chat_template": "from json"}}
    assert templates(tokenizer_config_json=config, **more) == {"default": "from json"}
    more["chat_template_jinja"] = "from jinja"
    assert templates(tokenizer_config_json=config, **more) == {"default": "from jinja"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    both = {"default": "a", "tool_use": "b"}
    assert templates(tokenizer_config_json={"chat_template": named}) == both
    with pytest.raises(CheckpointError, match="neither a text nor a list"):
        templates(tokenizer_config_json={"chat_template": [1]})


def test_chat_template_overrides(tmp_path: Path) -> None:
    config = {"chat_template": "from config"}
    path = folder(tmp_path / "m", byte_level(), tokenizer_config_json=config)
    other = folder(tmp_path / "o", tokenizer_config_json={"chat_template": "other"}, t_jinja="jin")

    def template(**override: str) -> str | None:
        return load_tokenizer(path, **override).chat_template

    assert template(tokenizer_config_path=f"{other}/tokenizer_config.json") == "other"
    assert template(tokenizer_config_path=f"{other}/t.jinja") == "jin"
    assert template(chat_template=f"{other}/t.jinja") == "jin"
    assert template(chat_template="{{ messages }}") == "{{ messages }}"
    for missing in ("none.json", "none.jinja"):
        with pytest.raises(CheckpointError, match=r"does not exist|No such file"):
            template(tokenizer_config_path=f"{other}/{missing}")
    with pytest.raises(CheckpointError, match="has no `chat_template`"):
        template(tokenizer_config_path=f"{folder(tmp_path / 'e', x_json={})}/x.json")


def test_other_decoders(tmp_path: Path) -> None:
    vocab = {"▁hi": 0, "▁": 1, "▁▁you": 2, "!": 3}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    for scheme in ("always", "first", "never"):
        backend.decoder = decoders.Metaspace("▁", scheme)
        tokenizer = load_tokenizer(folder(tmp_path / scheme, backend))
        for ids in ([0, 1, 2, 3], [2, 0], [1, 0], [3, 0], []):
            assert tokenizer.decode(ids, False) == backend.decode(ids)
    backend.decoder = None  # type: ignore[assignment]
    tokenizer = load_tokenizer(folder(tmp_path / "none", backend))
    assert tokenizer.decode([3, 0, 1], False) == backend.decode([3, 0, 1]) == "! ▁hi ▁"
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="decoder step `WordPiece`"):
        load_tokenizer(folder(tmp_path / "wordpiece", backend))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer"),
        ({"tokenizer_json": "{"}, "tokenizer.json` is corrupt"),
        ({"tokenizer_model": "nonsense"}, "not a SentencePiece model"),
        ({"tokenizer_config_json": "{"}, "is not valid JSON"),
        ({"tokenizer_config_json": "[]"}, "holds a JSON list instead of an object"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder(tmp_path / "m", **files))


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a file"):
        load_tokenizer(str(tmp_path / "none"))


def protobuf(number: int, value: int | bytes | float) -> bytes:
    """One field of a protobuf message, with a small number or length."""

    def varint(rest: int) -> bytes:
        out = bytearray()
        while rest >= 0x80:
            out.append(rest & 0x7F | 0x80)
            rest >>= 7
        return bytes([*out, rest])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(*, model_type: int = 2, charsmap: bytes = b"") -> bytes:
    """A `tokenizer.model` with the vocabulary of `sentencepiece_vocab`."""
    message = b""
    for piece, score, kind in zip(*sentencepiece_vocab(), strict=True):
        body = protobuf(1, piece.encode()) + protobuf(2, score)
        message += protobuf(1, body + (protobuf(3, kind) if kind != 1 else b""))
    message += protobuf(2, protobuf(3, model_type) + protobuf(43, -1))
    normalizer = protobuf(2, charsmap) if charsmap else b""
    return message + protobuf(3, normalizer + protobuf(3, 1) + protobuf(4, 0))


def test_sentencepiece_model_alone(tmp_path: Path) -> None:
    place = tmp_path / "m"
    path = folder(place, tokenizer_config_json={"eos_token": "</s>"})
    (place / "tokenizer.model").write_bytes(sentencepiece_model())
    ours = load_tokenizer(path)
    same = load_tokenizer(str(gguf_sentencepiece(tmp_path / "m.gguf")))
    for text in TEXTS:
        assert ours.encode(text, True) == same.encode(text, True)
        ids = ours.encode(text, True)
        assert ours.decode(ids, True) == same.decode(ids, True)
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert ours.encode("", True) == [1]
    flags = {"add_bos_token": False, "add_eos_token": True}
    assert load_tokenizer(folder(place, tokenizer_config_json=flags)).encode("", True) == [2]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (sentencepiece_model(model_type=1), UnsupportedModel, "no SentencePiece BPE model"),
        (sentencepiece_model(charsmap=b"x"), UnsupportedModel, "rewrites characters"),
        (sentencepiece_model()[:-7], CheckpointError, "truncated"),
        (b"", CheckpointError, "has no vocabulary"),
    ],
)
def test_other_sentencepiece_models(
    tmp_path: Path, data: bytes, error: type[TgiError], message: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(error, match=message) as raised:
        load_tokenizer(str(tmp_path))
    if error is UnsupportedModel:
        assert raised.value.hint is not None
        assert "save_pretrained" in raised.value.hint
