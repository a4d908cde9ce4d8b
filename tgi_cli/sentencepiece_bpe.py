"""A SentencePiece BPE vocabulary (pieces with scores) as a `tokenizers.Tokenizer`.

SentencePiece BPE (Kudo and Richardson 2018) has no merge list: of all neighbouring pieces whose
concatenation is a piece, the best-scored one merges first, and what is no piece falls apart into
bytes. The merge list that does the same is derived here. Both a GGUF file and a `tokenizer.model`
end up here. Unigram models are not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tgi_cli.errors import CheckpointError

#: SentencePiece's mark for a space.
SPACE_MARK: Final = "\u2581"


class PieceType(IntEnum):
    """What a vocabulary entry is, numbered as in GGUF and in SentencePiece's protobuf."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def checked_vocab(pieces: Sequence[str], source: str) -> dict[str, int]:
    """Ids by piece.

    Raises:
        CheckpointError: A piece occurs twice; one of its ids could never be produced or read.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        twice = next(index for index, piece in enumerate(pieces) if vocab[piece] != index)
        raise CheckpointError(
            f"the vocabulary of `{source}` is corrupt: ids {twice} and {vocab[pieces[twice]]} "
            f"are both {pieces[twice]!r}"
        )
    return vocab


def added_tokens(pieces: Sequence[str], types: Sequence[int]) -> tuple[list[AddedToken], ...]:
    """The pieces that are matched whole in the text: control tokens, then user-defined ones."""
    control, user_defined = [], []
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN):
            control.append(AddedToken(piece, normalized=False, special=True))
        elif kind == PieceType.USER_DEFINED:
            user_defined.append(AddedToken(piece, normalized=False, special=False))
    return control, user_defined


def build_sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_space_prefix: bool,
    source: str,
) -> Tokenizer:
    """Build the tokenizer; ids are positions in `pieces`.

    Args:
        pieces: The vocabulary, spaces written as `SPACE_MARK` (or, in user-defined pieces, plain).
        scores: One a piece; higher merges earlier.
        types: One `PieceType` a piece.
        add_space_prefix: Whether every stretch of text gets a leading space.
        source: The file, for messages.

    Raises:
        CheckpointError: The lists differ in length, a piece occurs twice or bytes are missing.
    """
    if not len(pieces) == len(scores) == len(types):
        raise CheckpointError(
            f"the vocabulary of `{source}` is corrupt: {len(pieces)} pieces, {len(scores)} scores "
            f"and {len(types)} types"
        )
    pieces, types, ranks = _respell_spaces(pieces, scores, types)
    vocab = checked_vocab(pieces, source)
    unknown = next((p for p, t in zip(pieces, types, strict=True) if t == PieceType.UNKNOWN), None)
    missing = next((b for b in range(256) if f"<0x{b:02X}>" not in vocab), None)
    if missing is not None and unknown is None:
        raise CheckpointError(
            f"the vocabulary of `{source}` has neither an unknown token nor byte {missing:#04x}"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces, types, ranks, vocab),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    decoding: list[decoders.Decoder] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if add_space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE_MARK))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(decoding)
    control, user_defined = added_tokens(pieces, types)
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)
    return tokenizer


def _respell_spaces(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> tuple[list[str], list[int], list[tuple[float, int]]]:
    """Turn user-defined runs of plain spaces into ordinary pieces that merge before all others.

    Gemma declares its runs of spaces as user-defined. Its published merge list has them first, so
    a run longer than the longest piece is split as merging splits it, not longest piece first.
    """
    spelled, kinds = list(pieces), list(types)
    ranks = [(-score, index) for index, score in enumerate(scores)]
    for index, piece in enumerate(pieces):
        if types[index] == PieceType.USER_DEFINED and len(piece) > 1 and not piece.strip(" "):
            spelled[index] = SPACE_MARK * len(piece)
            kinds[index] = PieceType.NORMAL
            ranks[index] = (float("-inf"), index)
    return spelled, kinds, ranks


def _merges(
    pieces: Sequence[str],
    types: Sequence[int],
    ranks: Sequence[tuple[float, int]],
    vocab: dict[str, int],
) -> list[tuple[str, str]]:
    """Every pair that makes a piece, best piece first, for one piece longest left part first."""
    mergeable = (PieceType.NORMAL, PieceType.UNUSED)
    order = sorted(
        (index for index, kind in enumerate(types) if kind in mergeable), key=ranks.__getitem__
    )
    merges = []
    for index in order:
        piece = pieces[index]
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in vocab:
                right = piece[cut:]
                if right in vocab:
                    merges.append((left, right))
    return merges
