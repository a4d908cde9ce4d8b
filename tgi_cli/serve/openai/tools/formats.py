"""The ways models write tool calls, and which one a chat template is for.

Each is an instance of the same grammar (see `calls.CallParser`): marks around JSON. A template
shows the model's format where it writes the calls of earlier turns back.
"""

from __future__ import annotations

from typing import Final

import msgspec


class CallFormat(msgspec.Struct, frozen=True, kw_only=True):
    """One way to write calls.

    `opening` announces calls, `closing` may follow each value. `bare`: calls may also begin the
    answer without the opening. `separators`: characters that may stand between values that share
    an opening. `array`: the calls behind one opening are an array. `arguments`: the key of a
    call's arguments. `named`: the function's name may stand before its arguments. `short_ids`:
    the template takes only ids of nine letters and digits.
    """

    name: str
    opening: str | None = None
    closing: str | None = None
    bare: bool = False
    separators: str = ""
    array: bool = False
    arguments: str = "arguments"
    named: bool = False
    short_ids: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens, which must then be shown to the parser."""
        marks = (self.opening, self.closing, *((ARGS, CALL_ID) if self.named else ()))
        return tuple(mark for mark in marks if mark is not None)


#: Mistral's marks after a function's name.
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"

#: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, repeated: Hermes, Qwen 2.5 and 3.
HERMES: Final = CallFormat(name="hermes", opening="<tool_call>", closing="</tool_call>")
#: `{"name": ..., "parameters": ...}` as the answer, perhaps after `<|python_tag|>`, perhaps
#: several with `;` between them: Llama 3.1 to 3.3.
LLAMA3: Final = CallFormat(
    name="llama3",
    opening="<|python_tag|>",
    bare=True,
    separators=";,",
    arguments="parameters",
)
#: `[TOOL_CALLS] [{"name": ..., "arguments": ...}]`, later `[TOOL_CALLS]name[ARGS]{...}`.
MISTRAL: Final = CallFormat(
    name="mistral", opening="[TOOL_CALLS]", array=True, named=True, short_ids=True
)
#: `<|tool_call|>[{"name": ..., "arguments": ...}]`: Granite 3, and with a closing mark Phi 4 mini.
GRANITE: Final = CallFormat(
    name="granite", opening="<|tool_call|>", closing="<|/tool_call|>", array=True
)
#: `<TOOLCALL>[{"name": ..., "arguments": ...}]</TOOLCALL>`: Nemotron Nano 2.
NEMOTRON: Final = CallFormat(
    name="nemotron", opening="<TOOLCALL>", closing="</TOOLCALL>", array=True
)
#: `<tool_calls>[{"name": ..., "arguments": ...}]</tool_calls>`: Apriel.
APRIEL: Final = CallFormat(
    name="apriel", opening="<tool_calls>", closing="</tool_calls>", array=True
)
#: The answer is one object, an array of them, or several on end.
PLAIN_JSON: Final = CallFormat(name="json", bare=True, separators=";,")

#: Looked for in this order; what only names a format's words in its instructions comes last.
_SIGNS: Final = (
    ("[TOOL_CALLS]", MISTRAL),
    ("<|python_tag|>", LLAMA3),
    ("<|tool_call|>", GRANITE),
    ("<TOOLCALL>[", NEMOTRON),
    ("<tool_calls>[", APRIEL),
    ("<tool_call>", HERMES),
    ("Environment: ipython", LLAMA3),
    ('"parameters": dictionary of argument name', LLAMA3),
)
#: Formats that are not JSON: calls in them would pass unseen.
_UNKNOWN: Final = (
    *("<function=", "tool▁calls▁begin", "<|channel|>", "```tool_code"),
    *(
        "<start_function_call>",
        "<|python_start|>",
        "<function name=",
        ":invoke name=",
        "<invoke name=",
    ),
    *("<arg_key>", "DSML", "<|tool_call>call:", "<|tool_call_start|>", "<|tool_call_begin|>"),
    *("<|START_ACTION|>", "<|tools_prefix|>", "<tool_calls:", "<|tool_call:begin|>", "]<]minimax["),
    *("<|function_call|>", "<|open|>", "Action:```json", ">>>all"),
)


def format_of(template: str) -> CallFormat | None:
    """The format a template is written for; None for a known one that cannot be read here."""
    if any(sign in template for sign in _UNKNOWN):
        return None
    return next((form for sign, form in _SIGNS if sign in template), PLAIN_JSON)
