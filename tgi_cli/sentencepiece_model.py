"""Reads a SentencePiece `tokenizer.model` without the sentencepiece library.

The file is a protobuf message (`sentencepiece_model.proto`); only the vocabulary, the model type
and the normalizer are taken. BPE models without a character map are supported: those of the
Llama, Mistral and Gemma families.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from tokenizers import Tokenizer

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.sentencepiece_bpe import SPACE_MARK, PieceType, build_sentencepiece_bpe

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_BPE: Final = 2  # TrainerSpec.ModelType
_HINT: Final = (
    "make `tokenizer.json` with `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` "
    "where transformers and sentencepiece are installed"
)


def load_sentencepiece_model(path: str) -> tuple[Tokenizer, dict[str, int]]:
    """Build the tokenizer of a `tokenizer.model` file.

    Returns:
        The tokenizer, without BOS and EOS, and the ids of `bos`, `eos`, `unk` and `pad`.

    Raises:
        CheckpointError: The file cannot be read or is no SentencePiece model.
        UnsupportedModel: It is no BPE model or rewrites characters.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror or error}") from error
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                piece, score, kind = _piece(value)
                pieces.append(piece)
                scores.append(score)
                types.append(kind)
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"`{path}` is not a SentencePiece model or is truncated") from error
    if not pieces:
        raise CheckpointError(f"`{path}` is not a SentencePiece model: it has no vocabulary")
    if trainer.get(3, 1) != _BPE:
        raise UnsupportedModel(f"`{path}` is no SentencePiece BPE model", hint=_HINT)
    if normalizer.get(2) or normalizer.get(4, 1):
        raise UnsupportedModel(
            f"`{path}` rewrites characters or removes spaces before tokenizing", hint=_HINT
        )
    tokenizer = build_sentencepiece_bpe(
        pieces, scores, types, add_space_prefix=bool(normalizer.get(3, 1)), source=path
    )
    ids = {}
    for role, number, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        token_id = _signed(trainer.get(number, default))
        if 0 <= token_id < len(pieces):
            ids[role] = token_id
    return tokenizer, ids


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    piece, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not (isinstance(piece, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
        raise IndexError("a field of another type")
    text = piece.decode("utf-8")
    if kind == PieceType.USER_DEFINED:
        text = text.replace(SPACE_MARK, " ")  # these are matched before spaces are marked
    return text, struct.unpack("<f", score)[0], kind


def _signed(value: int | bytes) -> int:
    if isinstance(value, bytes):
        return -1
    return value - (1 << 64) if value >> 63 else value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one protobuf message; fixed-width values as bytes.

    Raises:
        IndexError: The message is cut off or has a wire type that no longer exists.
    """
    offset = 0
    while offset < len(message):
        tag, offset = _varint(message, offset)
        wire = tag & 7
        if wire == _VARINT:
            number, offset = _varint(message, offset)
            yield tag >> 3, number
            continue
        if wire == _BYTES:
            length, offset = _varint(message, offset)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire}")
        if offset + length > len(message):
            raise IndexError("the message is cut off")
        yield tag >> 3, message[offset : offset + length]
        offset += length


def _varint(message: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
        if shift > 63:
            raise IndexError("an integer of more than 64 bits")
