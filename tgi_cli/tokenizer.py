"""Text to token ids and back, over the `tokenizers` library.

The one tokenizer of the program: the HTTP worker encodes prompts and decodes answers with it, the
grammar compiler reads its vocabulary as bytes. Loads a Hugging Face folder or a GGUF file; knows
nothing of requests, streams (`detokenizer.py`) or how a template is rendered (`chat_template.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from tgi_cli.errors import CheckpointError, InvalidRequest
from tgi_cli.gguf_metadata import read_gguf_metadata
from tgi_cli.gguf_tokenizer import build_gguf_tokenizer
from tgi_cli.hf_tokenizer import load_folder_tokenizer, named_templates, read_json, read_text
from tgi_cli.token_bytes import TokenBytes, token_bytes_of
from tgi_cli.tokenizer_source import TokenizerSource

_DEFAULT: Final = "default"
_TOOL_USE: Final = "tool_use"


class Tokenizer:
    """Encodes prompts, decodes answers, knows the special tokens.

    Safe to use from several threads. Decoding is byte-exact: the bytes of all tokens are joined
    and read as UTF-8, invalid sequences becoming U+FFFD. On valid text that is what `tokenizers`
    returns; where byte-fallback tokens do not form characters it keeps those that do, as
    SentencePiece itself, so that a stream and the whole text agree.

    Attributes:
        chat_templates: Jinja sources by name, as the checkpoint has them.
        eos_token_ids: Every id that ends an answer.
    """

    def __init__(self, source: TokenizerSource, name: str) -> None:
        self._tokenizer = source.tokenizer
        self._bytes: TokenBytes = token_bytes_of(source.tokenizer, name)
        self._ids = dict(source.special_ids)
        self.chat_templates = dict(source.chat_templates)
        self.eos_token_ids = source.eos_token_ids
        added = source.tokenizer.get_added_tokens_decoder()
        named = {token_id for role, token_id in self._ids.items() if role != "unk"}
        self._special = frozenset(i for i, token in added.items() if token.special) | named
        vocab = source.tokenizer.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocab.values(), default=-1) + 1
        self._cache: dict[int, bytes] = {}
        self._plain: dict[int, str | None] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; the model's embedding may have more rows."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token a text begins with, if there is one."""
        return self._ids.get("bos")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's own end token; `eos_token_ids` has all that end an answer."""
        return self._ids.get("eos")

    @property
    def bos_token(self) -> str | None:
        """Text of the token a text begins with, if there is one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the tokenizer's own end token."""
        return self.special_tokens.get("eos_token")

    @property
    def special_tokens(self) -> dict[str, str]:
        """Named special tokens as templates see them: `bos_token`, `eos_token`, ..."""
        return {f"{role}_token": self.token_content(i) for role, i in self._ids.items()}

    @property
    def chat_template(self) -> str | None:
        """The main chat template's Jinja source."""
        return self.chat_templates.get(_DEFAULT)

    @property
    def tool_use_template(self) -> str | None:
        """The template for requests with tools, where the checkpoint has a separate one."""
        return self.chat_templates.get(_TOOL_USE)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        Args:
            text: Any Unicode text.
            add_special_tokens: Whether BOS (and EOS) are added as the checkpoint asks; not for
                text from a chat template, which writes them itself.

        Raises:
            InvalidRequest: The text holds half of a surrogate pair.
        """
        return self.encode_with_offsets(text, add_special_tokens)[0]

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Like `encode`, and for each token its first and past-the-end character in `text`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds a lone surrogate at character {error.start}, which is no Unicode"
            ) from error
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool) -> str:
        """Text of `token_ids`; ids outside the vocabulary stand for nothing."""
        parts: list[bytes] = []
        begun = False
        for token_id in token_ids:
            if skip_special_tokens and token_id in self._special:
                continue
            raw = self.token_bytes(token_id)
            parts.append(raw if begun else self.first_bytes(raw))
            begun = begun or self.begins_text(raw)
        return b"".join(parts).decode("utf-8", "replace")

    def token_content(self, token_id: int) -> str:
        """The vocabulary entry as spelled there, such as `Ġthe`, `▁the` or `<s>`."""
        return self._tokenizer.id_to_token(token_id) or "" if 0 <= token_id < 2**32 else ""

    def token_text(self, token_id: int) -> str:
        """Text of one token in the middle of a text; U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds in the middle of a text; empty outside the vocabulary."""
        raw = self._cache.get(token_id)
        if raw is None:
            content = self.token_content(token_id)
            raw = self._bytes.convert(content) if content else b""
            self._cache[token_id] = raw
        return raw

    def plain_text(self, token_id: int) -> str | None:
        """Text of a token that is neither special nor other than ASCII, as most are; else None."""
        text = self._plain.get(token_id, "")
        if text == "":
            raw = self.token_bytes(token_id)
            plain = bool(raw) and raw.isascii() and token_id not in self._special
            text = self._plain[token_id] = raw.decode("ascii") if plain else None
        return text

    def first_bytes(self, raw: bytes) -> bytes:
        """`raw` without the space that SentencePiece vocabularies drop where a text begins."""
        return self._bytes.first(raw)

    def begins_text(self, raw: bytes) -> bool:
        """Whether a text that so far is `raw` has begun, so that later spaces are kept."""
        return bool(raw) or self._bytes.strip == "token"

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of answers: control tokens, not words."""
        return token_id in self._special

    def token_id(self, content: str) -> int | None:
        """Id of the vocabulary entry spelled `content`, if there is one."""
        token_id: int | None = self._tokenizer.token_to_id(content)
        return token_id


def load_tokenizer(
    model_path: str,
    *,
    tokenizer_config_path: str | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        model_path: A Hugging Face model folder or a `.gguf` file.
        tokenizer_config_path: A `tokenizer_config.json` or `.jinja` file whose chat template
            replaces the checkpoint's.
        chat_template: A template's file or its source itself; wins over all others.

    Raises:
        CheckpointError: Files are missing or corrupt.
        UnsupportedModel: The kind of tokenizer is not supported.
    """
    if os.path.isdir(model_path):
        source = load_folder_tokenizer(model_path)
    elif os.path.isfile(model_path):
        source = build_gguf_tokenizer(read_gguf_metadata(model_path))
    else:
        raise CheckpointError(f"`{model_path}` is neither a folder nor a file")
    tokenizer = Tokenizer(source, model_path)
    for override in (tokenizer_config_path, chat_template):
        if override is not None:
            tokenizer.chat_templates = read_chat_templates(override)
    return tokenizer


def read_chat_templates(path_or_source: str) -> dict[str, str]:
    """Chat templates by name from a JSON file, a Jinja file or a source given as it is.

    Raises:
        CheckpointError: The file is missing, unreadable or holds no template.
    """
    if "{" in path_or_source and not os.path.exists(path_or_source):
        return {_DEFAULT: path_or_source}
    if not path_or_source.endswith(".json"):
        return {_DEFAULT: read_text(path_or_source)}
    if not os.path.exists(path_or_source):
        raise CheckpointError(f"the tokenizer configuration `{path_or_source}` does not exist")
    templates = named_templates(read_json(path_or_source).get("chat_template"), path_or_source)
    if not templates:
        raise CheckpointError(f"`{path_or_source}` has no `chat_template`")
    return templates
