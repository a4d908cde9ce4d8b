"""The tools a chat declares and what it asks of them: `tools`, `tool_choice`, and the rest.

Decides, before anything runs, which functions may be called, how the model writes calls, and
which schema a forced call has. Nothing is put into the prompt but by the model's own template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from tgi_cli.chat_template import ChatTemplate
from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.openai.tools.calls import CallParser
from tgi_cli.serve.openai.tools.formats import PLAIN_JSON, CallFormat, format_of
from tgi_cli.serve.openai.tools.parser import NamedCallParser, ToolParser

Mode = Literal["none", "auto", "required", "named"]
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function the model may call; `arguments` is TGI's other name for `parameters`."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments."""
        given = self.arguments if self.parameters is None else self.parameters
        return _NO_PARAMETERS if given is None else given


class Tool(msgspec.Struct, kw_only=True):
    """One of `tools`."""

    type: str = "function"
    function: FunctionDefinition | None = None


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one chat does with tools; without tools everything is empty and `mode` is `none`.

    `schema` is that of the whole answer where a call is forced, else None. `form` is how the
    model writes calls.
    """

    mode: Mode = "none"
    functions: tuple[FunctionDefinition, ...] = ()
    forced: str | None = None
    parallel: bool = True
    form: CallFormat | None = None

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """The declarations as templates expect them."""
        if self.mode == "none":
            return None
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    "description": function.description or "",
                    "parameters": function.schema,
                },
            }
            for function in self.functions
        ]

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON Schema that the answer must satisfy, where `tool_choice` forces a call."""
        if self.mode == "named":
            return next(f.schema for f in self.functions if f.name == self.forced)
        if self.mode != "required":
            return None
        return (calls_schema if self.parallel else call_schema)(self.functions)

    def parser(self) -> ToolParser | None:
        """A parser for one answer, None where all of it is content."""
        names = frozenset(function.name for function in self.functions)
        if self.mode == "named" and self.forced is not None:
            return NamedCallParser(self.forced)
        if self.mode == "required":
            return CallParser(PLAIN_JSON, names)
        return None if self.form is None else CallParser(self.form, names)


def call_schema(
    functions: Sequence[FunctionDefinition], arguments: str = "arguments"
) -> dict[str, Any]:
    """JSON Schema of one call: its `name`, and under the key `arguments` the function's own."""
    one = [
        {
            "type": "object",
            "properties": {"name": {"const": f.name}, arguments: {"$ref": f"#/$defs/{i}"}},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for i, f in enumerate(functions)
    ]
    # A schema's references count from its own root, so each becomes a definition of the whole.
    definitions = {str(i): _moved(f.schema, i) for i, f in enumerate(functions)}
    return {"anyOf": one, "$defs": definitions}


def calls_schema(
    functions: Sequence[FunctionDefinition],
    arguments: str = "arguments",
    at_most: int | None = None,
) -> dict[str, Any]:
    """JSON Schema of an array of calls, at least one."""
    one = call_schema(functions, arguments)
    definitions = one.pop("$defs")
    most = {} if at_most is None else {"maxItems": at_most}
    return {"type": "array", "items": one, "minItems": 1, **most, "$defs": definitions}


def use_of_tools(tools: list[Tool], choice: Any, parallel: bool, template: ChatTemplate) -> ToolUse:
    """Resolve the fields of one chat. Raises `InvalidRequest` for what cannot be done."""
    functions = _functions(tools)
    mode, forced = _mode(choice, bool(tools))
    if mode == "none":
        return ToolUse()
    if forced is not None and forced not in {function.name for function in functions}:
        raise InvalidRequest(
            f"`tool_choice` names `{forced}`, which is not among `tools`", param="tool_choice"
        )
    form = _template_format(template)
    return ToolUse(mode=mode, functions=functions, forced=forced, parallel=parallel, form=form)


def _functions(tools: list[Tool]) -> tuple[FunctionDefinition, ...]:
    functions: list[FunctionDefinition] = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if tool.type != "function":
            raise InvalidRequest(
                f"`{where}.type` must be `function`. Given: {tool.type!r}", param=f"{where}.type"
            )
        if tool.function is None or not tool.function.name:
            raise InvalidRequest(f"`{where}.function` needs a name", param=f"{where}.function")
        if tool.function.name in {function.name for function in functions}:
            raise InvalidRequest(
                f"`tools` declares `{tool.function.name}` twice", param=f"{where}.function.name"
            )
        functions.append(tool.function)
    return tuple(functions)


def _moved(schema: Any, index: int) -> Any:
    """A schema with its references as they are when it stands at `#/$defs/<index>`."""
    if isinstance(schema, list):
        return [_moved(item, index) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, index) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = f"#/$defs/{index}{target[1:]}"
    return moved


def _mode(choice: Any, any_tools: bool) -> tuple[Mode, str | None]:
    if choice in (None, "auto"):
        return ("auto", None) if any_tools else ("none", None)
    if choice == "none":
        return "none", None
    if not any_tools:
        raise InvalidRequest("`tool_choice` needs `tools` to choose from", param="tool_choice")
    if choice == "required":
        return "required", None
    if isinstance(choice, str):  # TGI's form of a named function
        return "named", choice
    name: Any = None
    if isinstance(choice, dict) and choice.get("type", "function") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            "`tool_choice` must be `none`, `auto`, `required`, or "
            '`{"type": "function", "function": {"name": ...}}`',
            param="tool_choice",
        )
    return "named", name


def _template_format(template: ChatTemplate) -> CallFormat:
    source = template.tool_source
    if source is None:
        raise InvalidRequest(
            "the model's chat template knows no tools, so it cannot be told of `tools`",
            hint="use a model made for tools, give a template with `--chat-template`, "
            "or send `tool_choice: none`",
            param="tools",
        )
    form = format_of(source)
    if form is None:
        raise InvalidRequest(
            "this model writes tool calls in a format that is not supported yet", param="tools"
        )
    return form
