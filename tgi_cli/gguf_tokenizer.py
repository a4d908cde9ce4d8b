"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer`.

Reads the `tokenizer.*` keys of the GGUF specification and gives the ids llama.cpp gives: byte-level
BPE (`gpt2`, with the word split the file names) and SentencePiece BPE (`llama`, merges derived from
scores). Knows no weights and no chat; `tokenizer.py` wraps the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.gguf_metadata import GGUFMetadata
from tgi_cli.pretokenizers import word_split
from tgi_cli.sentencepiece_bpe import (
    PieceType,
    added_tokens,
    build_sentencepiece_bpe,
    checked_vocab,
)
from tgi_cli.tokenizer_source import TokenizerSource, frame_with_special_tokens

_KEY: Final = "tokenizer.ggml."
#: Control tokens that end a turn whatever the file's keys say; many files name only one of them.
_END_OF_TURN: Final = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "[EOT]",
        "<|END_OF_TURN_TOKEN|>",
        "<end_of_utterance>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)


def build_gguf_tokenizer(metadata: GGUFMetadata) -> TokenizerSource:
    """Build the tokenizer of a GGUF file.

    Raises:
        CheckpointError: A key is missing or the vocabulary is inconsistent.
        UnsupportedModel: The tokenizer model or pre-tokenizer is not supported.
    """
    model = metadata[f"{_KEY}model"]
    pieces: list[str] = metadata[f"{_KEY}tokens"]
    types: list[int] = metadata.get(f"{_KEY}token_type") or [PieceType.NORMAL] * len(pieces)
    if len(types) != len(pieces):
        raise CheckpointError(
            f"the vocabulary of `{metadata.path}` is corrupt: {len(pieces)} tokens and "
            f"{len(types)} token types"
        )
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, pieces, types)
    elif model == "llama":
        scores = metadata[f"{_KEY}scores"]
        prefix = bool(metadata.get(f"{_KEY}add_space_prefix", True))
        tokenizer = build_sentencepiece_bpe(
            pieces, scores, types, add_space_prefix=prefix, source=metadata.path
        )
        add_bos = True
    else:
        raise UnsupportedModel(
            f"the GGUF file has the tokenizer `{model}`, supported are `gpt2` (byte-level BPE) "
            f"and `llama` (SentencePiece BPE)",
            hint="use the model's folder with `tokenizer.json` instead of the GGUF file",
        )
    special_ids = _special_ids(metadata, len(pieces))
    add_bos = bool(metadata.get(f"{_KEY}add_bos_token", add_bos))
    add_eos = bool(metadata.get(f"{_KEY}add_eos_token", False))
    frame_with_special_tokens(
        tokenizer,
        special_ids.get("bos") if add_bos else None,
        special_ids.get("eos") if add_eos else None,
    )
    return TokenizerSource(
        tokenizer,
        {role: special_ids[role] for role in ("bos", "eos", "unk", "pad") if role in special_ids},
        _eos_token_ids(special_ids, pieces, types),
        _chat_templates(metadata),
    )


def _byte_level(
    metadata: GGUFMetadata, pieces: list[str], types: Sequence[int]
) -> tuple[Tokenizer, bool]:
    split = word_split(metadata.get(f"{_KEY}pre", ""))
    pairs = (merge.partition(" ") for merge in metadata[f"{_KEY}merges"])
    try:
        model = models.BPE(
            vocab=checked_vocab(pieces, metadata.path),
            merges=[(left, right) for left, _, right in pairs],
            ignore_merges=split.ignore_merges,
        )
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(
            f"the merges of `{metadata.path}` do not fit its vocabulary: {error}"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split.build()
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = added_tokens(pieces, types)
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)
    return tokenizer, split.add_bos


def _special_ids(metadata: GGUFMetadata, vocab_size: int) -> dict[str, int]:
    keys = {
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "eot": "eot_token_id",
        "eom": "eom_token_id",
        "unk": "unknown_token_id",
        "pad": "padding_token_id",
    }
    found = {}
    for role, key in keys.items():
        token_id: Any = metadata.get(_KEY + key)
        if token_id is None:
            continue
        if not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"`{_KEY}{key}` in `{metadata.path}` is {token_id}, "
                f"but the vocabulary has {vocab_size} tokens"
            )
        found[role] = int(token_id)
    return found


def _eos_token_ids(
    special_ids: dict[str, int], pieces: Sequence[str], types: Sequence[int]
) -> tuple[int, ...]:
    ids = [special_ids[role] for role in ("eos", "eot", "eom") if role in special_ids]
    ends = {
        piece: index
        for index, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind == PieceType.CONTROL and piece in _END_OF_TURN
    }
    if {"<|return|>", "<|call|>"} <= ends.keys():
        ends.pop("<|end|>", None)  # in the harmony format it ends a part, not the answer
    return tuple(dict.fromkeys([*ids, *ends.values()]))


def _chat_templates(metadata: GGUFMetadata) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).removeprefix(".") or "default": metadata[key]
        for key in metadata
        if key == prefix or key.startswith(f"{prefix}.")
    }
    return {name: source for name, source in templates.items() if isinstance(source, str)}
