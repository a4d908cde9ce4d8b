"""The tokenizer of a Hugging Face model folder, from its JSON files alone.

`tokenizer.json` is taken as it is; `tokenizer_config.json` and `special_tokens_map.json` add the
special tokens it lacks; `generation_config.json` and `config.json` say what ends an answer. With
no `tokenizer.json`, SentencePiece's `tokenizer.model` is read. Runs no code from the folder.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from tgi_cli.errors import CheckpointError
from tgi_cli.sentencepiece_model import load_sentencepiece_model
from tgi_cli.tokenizer_source import TokenizerSource, frame_with_special_tokens

_ROLES: Final = ("bos", "eos", "unk", "pad")
_DEFAULT: Final = "default"


def load_folder_tokenizer(folder: str) -> TokenizerSource:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: There is no tokenizer in it, or a file is corrupt.
        UnsupportedModel: Its SentencePiece model is of a kind that is not supported.
    """
    config = read_json(os.path.join(folder, "tokenizer_config.json"))
    tokenizer, special_ids, framed = _load_vocabulary(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_missing_tokens(tokenizer, config)
    names = read_json(os.path.join(folder, "special_tokens_map.json")) | config
    model_config = read_json(os.path.join(folder, "config.json"))
    generation = read_json(os.path.join(folder, "generation_config.json"))
    for role in _ROLES:
        if f"{role}_token" in names:  # null means that there is none
            token_id = _named_token(tokenizer, names[f"{role}_token"])
        else:
            token_id = _first_id(generation, model_config, key=f"{role}_token_id")
        if token_id is not None:
            special_ids[role] = token_id
    if not framed:  # `tokenizer.json` says itself what frames a text, and it is right
        frame_with_special_tokens(
            tokenizer,
            special_ids.get("bos") if config.get("add_bos_token", True) else None,
            special_ids.get("eos") if config.get("add_eos_token", False) else None,
        )
    ends = [special_ids["eos"]] if "eos" in special_ids else []
    for source in (generation, model_config, model_config.get("text_config") or {}):
        ends.extend(_ids(source.get("eos_token_id")))
    return TokenizerSource(
        tokenizer,
        special_ids,
        tuple(dict.fromkeys(ends)),
        _chat_templates(folder, config),
    )


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file; empty where the file does not exist.

    Raises:
        CheckpointError: The file cannot be read or holds no JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` is not valid JSON: {error}", hint="download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` holds a JSON {type(value).__name__} instead of an object")
    return value


def read_text(path: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        CheckpointError: The file cannot be read or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"`{path}` is not UTF-8 text") from error


def named_templates(value: object, source: str) -> dict[str, str]:
    """Templates by name from a `chat_template` field: one source, or a list of named ones.

    Raises:
        CheckpointError: The field is neither.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return dict(value)
    if isinstance(value, list):
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in value}
        except (TypeError, KeyError):
            pass
    raise CheckpointError(
        f"`chat_template` in `{source}` is neither a text nor a list of named templates"
    )


def _load_vocabulary(folder: str) -> tuple[Tokenizer, dict[str, int], bool]:
    """The tokenizer, the special ids its own file names, and whether it frames texts itself."""
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        try:
            return Tokenizer.from_file(path), {}, True
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(
                f"`{path}` is corrupt: {error}", hint="download it again"
            ) from error
    sentencepiece = os.path.join(folder, "tokenizer.model")
    if os.path.exists(sentencepiece):
        tokenizer, ids = load_sentencepiece_model(sentencepiece)
        return tokenizer, ids, False
    raise CheckpointError(
        f"`{folder}` has no tokenizer: neither `tokenizer.json` nor `tokenizer.model`",
        hint="make `tokenizer.json` with "
        "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` in transformers",
    )


def _add_missing_tokens(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Add what `tokenizer_config.json` lists and `tokenizer.json` lacks, in id order."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    entries: list[Any] = [listed[key] for key in sorted(listed, key=_as_int)]
    extra = [
        *_as_list(config, "additional_special_tokens"),
        *_as_list(config, "extra_special_tokens"),
    ]
    entries += [{"content": token, "special": True} for token in map(_content, extra) if token]
    for entry in entries:
        content = _content(entry)
        if content is None or content in known:
            continue
        known.add(content)
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        chosen = {flag: bool(entry[flag]) for flag in flags if flag in entry}
        token = AddedToken(content, **chosen)
        if chosen.get("special"):
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])


def _named_token(tokenizer: Tokenizer, value: object) -> int | None:
    """Id of a named special token; one that is not yet matched whole in texts becomes so."""
    content = _content(value)
    if content is None:
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    if all(token.content != content or not token.special for token in added):
        tokenizer.add_special_tokens([AddedToken(content, normalized=False, special=True)])
    return tokenizer.token_to_id(content)


def _chat_templates(folder: str, config: dict[str, Any]) -> dict[str, str]:
    """`chat_template.jinja` wins over `chat_template.json`, and that over the configuration."""
    templates = named_templates(config.get("chat_template"), "tokenizer_config.json")
    path = os.path.join(folder, "chat_template.json")
    templates |= named_templates(read_json(path).get("chat_template"), path)
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        templates[_DEFAULT] = read_text(path)
    more = os.path.join(folder, "additional_chat_templates")
    if os.path.isdir(more):
        for name in sorted(os.listdir(more)):
            stem, extension = os.path.splitext(name)
            if extension == ".jinja":
                templates[stem] = read_text(os.path.join(more, name))
    return templates


def _content(value: object) -> str | None:
    """A token's text, given as itself or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _as_list(config: dict[str, Any], key: str) -> list[Any]:
    value = config.get(key) or []
    return list(value.values()) if isinstance(value, dict) else list(value)


def _as_int(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise CheckpointError(
            f"`added_tokens_decoder` in `tokenizer_config.json` has the id {key!r}"
        ) from None


def _ids(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [entry for entry in value if isinstance(entry, int)] if isinstance(value, list) else []


def _first_id(*sources: dict[str, Any], key: str) -> int | None:
    for source in sources:
        ids = _ids(source.get(key))
        if ids:
            return ids[0]
    return None
