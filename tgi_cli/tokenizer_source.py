"""What a checkpoint says about text, whichever files it says it in.

The GGUF reader and the folder reader fill it in, `tokenizer.py` wraps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, processors


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The parts of a tokenizer as loaded.

    Attributes:
        tokenizer: Encodes; adds BOS and EOS as the checkpoint asks.
        special_ids: Ids by role: `bos`, `eos`, `unk`, `pad`, where the checkpoint names them.
        eos_token_ids: Every id that ends an answer, the tokenizer's own EOS first.
        chat_templates: Jinja sources by name; the main one is `default`.
    """

    tokenizer: Tokenizer
    special_ids: dict[str, int]
    eos_token_ids: tuple[int, ...]
    chat_templates: dict[str, str]


def frame_with_special_tokens(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> None:
    """Make `tokenizer` put `bos` before and `eos` after a text, each where it is not None."""
    before = [] if bos is None else [str(tokenizer.id_to_token(bos))]
    after = [] if eos is None else [str(tokenizer.id_to_token(eos))]
    ids = {token: tokenizer.token_to_id(token) for token in (*before, *after)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1"],
        special_tokens=list(ids.items()),
    )
