"""From the JSON text of one or several calls to their names and arguments.

Formats differ in what they call the arguments; both usual names are read. Arguments stay the text
that the model wrote: numbers keep their digits, keys their order.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from tgi_cli.serve.openai.tools.parser import Arguments, CallStart, Piece


class _WrittenCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_read_call = msgspec.json.Decoder(_WrittenCall).decode
_read_calls = msgspec.json.Decoder(list[_WrittenCall]).decode
_read_object = msgspec.json.Decoder(dict[str, Any]).decode
_read_string = msgspec.json.Decoder(str).decode


def read_calls(text: str, names: Collection[str]) -> list[Piece] | None:
    """Read an object, or an array of objects, each with `name` and arguments.

    None unless all of it is calls of functions in `names` with an object as arguments (or a
    string that holds one; absent is empty).
    """
    try:
        raw = text.encode()
        written = _read_calls(raw) if text.lstrip()[:1] == "[" else [_read_call(raw)]
        pieces: list[Piece] = []
        for call in written:
            if call.name not in names:
                return None
            pieces += [CallStart(call.name), Arguments(_arguments(call))]
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
    return pieces or None


def read_arguments(text: str) -> str | None:
    """The text of one call's arguments where the name stands outside, None if it is no object."""
    try:
        _read_object(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
    return text


def _arguments(call: _WrittenCall) -> str:
    raw = call.arguments if call.arguments is not msgspec.UNSET else call.parameters
    if raw is msgspec.UNSET:
        return "{}"
    data = bytes(raw).strip()
    if data == b"null":
        return "{}"
    if data[:1] == b'"':
        data = _read_string(data).encode()
    _read_object(data)
    return data.decode()
