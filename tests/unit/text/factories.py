"""Small real tokenizers and GGUF files, made in a moment and the same every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it? ",
    "def main(argument: int) -> None:\n    return argument * 2  # comment\n\n",
    "Ünïcödé naïve café — “quotes” … 你好 世界 日本語 한국어 Привет мир emoji 😀 👍 ",
    "user assistant system hello world tokenizer tokenizing tokens the the the 100 200 300 ",
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(vocab_size: int = 420, *, specials: Sequence[str] = SPECIALS) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


def pieces_of(
    tokenizer: Tokenizer, user_defined: Sequence[str] = ()
) -> tuple[list[str], list[int], list[str]]:
    """Vocabulary in id order, GGUF token types and merges of a BPE tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = tokenizer.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    types = [3 if piece in added else 1 for piece in pieces]
    pieces += user_defined
    types += [4] * len(user_defined)
    return pieces, types, [" ".join(merge) for merge in model["merges"]]


def sentencepiece_vocab(size: int = 700) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of a Llama-like SentencePiece vocabulary trained on `TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    vocab = tokenizer.get_vocab()
    learned = sorted(vocab, key=vocab.__getitem__)
    longer = [piece for piece in learned if len(piece) > 1]
    longer += ["▁▁", "▁▁▁▁"]
    single = [piece for piece in learned if len(piece) == 1]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(pieces)
    pieces += longer
    scores += [-float(rank) for rank in range(len(longer))]
    pieces += single
    scores += [-float(len(longer) + rank) for rank in range(len(single))]
    types += [1] * (len(longer) + len(single))
    return pieces, scores, types


def write_gguf(path: Path, values: dict[str, Any], architecture: str = "llama") -> Path:
    """Write a GGUF file with these keys and one small tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(8, 8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_bpe(path: Path, pre: str, *, user_defined: Sequence[str] = (), **more: Any) -> Path:
    """A GGUF file with the vocabulary of `byte_level`."""
    pieces, types, merges = pieces_of(byte_level(), user_defined)
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    values |= {f"tokenizer.{key}": value for key, value in more.items()}
    return write_gguf(path, values)


def gguf_sentencepiece(path: Path, architecture: str = "llama", **more: Any) -> Path:
    """A GGUF file with the vocabulary of `sentencepiece_vocab`."""
    pieces, scores, types = sentencepiece_vocab()
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    values |= {f"tokenizer.{key}": value for key, value in more.items()}
    return write_gguf(path, values, architecture)


def gguf_gemma(path: Path) -> Path:
    """A GGUF file laid out as Gemma 3's: its control tokens, runs of newlines and of spaces."""
    pieces, scores, types = sentencepiece_vocab()
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    runs = ["\n" * count for count in range(1, 6)] + [" " * count for count in range(2, 9)]
    kept = [i for i, piece in enumerate(pieces) if types[i] in (1, 6) and piece.strip("▁\n")]
    kept += [pieces.index("▁")]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*control, *runs, *(pieces[i] for i in kept)],
        "tokenizer.ggml.scores": [-1000.0] * (len(control) + len(runs)) + [scores[i] for i in kept],
        "tokenizer.ggml.token_type": [3] * len(control)
        + [4] * len(runs)
        + [types[i] for i in kept],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return write_gguf(path, values, "gemma3")
