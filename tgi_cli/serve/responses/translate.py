"""A body of the responses API as the `ChatRequest` that asks the same, and its items as messages.

Items of one assistant turn (reasoning, message, calls) become one message. What cannot be carried
over is refused by the client's own name for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from tgi_cli.chat_template import ChatTemplate
from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.openai.conversation import effort_kwargs
from tgi_cli.serve.openai.schema import ChatMessage, ChatRequest
from tgi_cli.serve.openai.tools.declared import FunctionDefinition, Tool
from tgi_cli.serve.openai.tools.history import CalledFunction, ToolCall
from tgi_cli.serve.responses.schema import (
    InputItem,
    InputPart,
    InputTokensRequest,
    ResponsesRequest,
    ResponsesTool,
)

T = TypeVar("T")

LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def conversation(
    body: InputTokensRequest, earlier: Sequence[ChatMessage], template: ChatTemplate
) -> tuple[ChatRequest, list[str]]:
    """The chat that follows `earlier`, and the names of fields without effect for this model."""
    _refuse(body)
    messages = [*earlier, *input_messages(body.input)]
    if body.instructions:
        messages = [ChatMessage(role="system", content=body.instructions), *messages]
    tools, choice = _tools(body)
    chat = ChatRequest(
        messages=messages,
        model=body.model,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_text_format(body),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    chat.reasoning_effort = None if body.reasoning is None else body.reasoning.effort
    told = chat.reasoning_effort is None or effort_kwargs(template, chat) is not None
    return chat, [] if told else ["reasoning.effort"]


def generation(
    body: ResponsesRequest, earlier: Sequence[ChatMessage], template: ChatTemplate
) -> tuple[ChatRequest, list[str]]:
    """Like `conversation`, with the fields that say how to answer."""
    chat, ignored = conversation(body, earlier, template)
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "stream",
        "user",
        "priority",
        "cache_salt",
    ):
        setattr(chat, name, getattr(body, name))
    chat.max_tokens = body.max_output_tokens
    chat.logprobs = LOGPROBS in body.include or bool(body.top_logprobs)
    chat.top_logprobs = body.top_logprobs if chat.logprobs else None
    if any(name != LOGPROBS for name in body.include):
        ignored.append("include")
    return chat, ignored


def _refuse(body: InputTokensRequest) -> None:
    for name in ("conversation", "prompt"):
        if getattr(body, name) is not None:
            raise InvalidRequest(
                f"`{name}` is not supported: this server keeps responses, no {name}s", param=name
            )
    if body.truncation not in (None, "disabled"):
        raise InvalidRequest(
            "`truncation` must be `disabled`: this server drops nothing of a conversation. "
            f"Given: {body.truncation!r}",
            param="truncation",
        )


def input_messages(given: str | list[InputItem]) -> list[ChatMessage]:
    """The items of one turn as messages. Raises `InvalidRequest` for what cannot be read."""
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    messages: list[ChatMessage] = []
    open_turn: ChatMessage | None = None  # the assistant's, while its items follow one another
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if _is_assistants(item):
            if open_turn is None:
                open_turn = ChatMessage(role="assistant", content="")
                messages.append(open_turn)
            _extend(open_turn, item, where)
            continue
        open_turn = None
        messages.append(_message(item, where))
    return messages


def _is_assistants(item: InputItem) -> bool:
    return item.type in ("function_call", "reasoning") or (
        item.type == "message" and item.role == "assistant"
    )


def _message(item: InputItem, where: str) -> ChatMessage:
    if item.type == "function_call_output":
        return ChatMessage(
            role="tool",
            tool_call_id=_required(item.call_id, f"{where}.call_id"),
            content=_content(item.output, f"{where}.output"),
        )
    if item.type != "message":
        raise InvalidRequest(
            f"`{where}.type` is {item.type!r}, which this server cannot read",
            hint="it reads `message`, `function_call`, `function_call_output` and `reasoning`",
            param=f"{where}.type",
        )
    if item.role not in _ROLES:
        raise InvalidRequest(
            f"`{where}.role` must be `user`, `assistant`, `system` or `developer`. "
            f"Given: {item.role!r}",
            param=f"{where}.role",
        )
    content = _content(item.content, f"{where}.content")
    return ChatMessage(role=item.role, content=content)


def _extend(turn: ChatMessage, item: InputItem, where: str) -> None:
    """Add one item to an assistant's turn."""
    if item.type == "function_call":
        call = ToolCall(
            id=_required(item.call_id, f"{where}.call_id"),
            function=CalledFunction(
                name=_required(item.name, f"{where}.name"),
                arguments=_required(item.arguments, f"{where}.arguments"),
            ),
        )
        turn.tool_calls = [*(turn.tool_calls or []), call]
    elif item.type == "reasoning":
        thought = item.content or item.summary or []
        turn.reasoning_content = (turn.reasoning_content or "") + _text(thought, where)
    else:
        content = _content(item.content, f"{where}.content")
        turn.content = f"{turn.content}{content}"


def _content(content: str | list[InputPart] | None, where: str) -> str:
    if content is None:
        raise InvalidRequest(f"`{where}` is required", param=where)
    return _text(content, where)


def _text(content: str | list[InputPart], where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: InputPart, where: str) -> str:
    if part.type in _TEXTS:
        return _required(part.text, f"{where}.text")
    if part.type == "refusal":
        return _required(part.refusal, f"{where}.refusal")
    raise InvalidRequest(
        f"`{where}.type` is {part.type!r}: this server reads text alone", param=f"{where}.type"
    )


def _required(value: T | None, where: str) -> T:
    if value is None:
        raise InvalidRequest(f"`{where}` is required", param=where)
    return value


def _tools(body: InputTokensRequest) -> tuple[list[Tool], Any]:
    """Tools and `tool_choice` as a chat has them."""
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return tools, choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        names = {tool.get("name") for tool in choice["tools"] if isinstance(tool, dict)}
        return [t for t in tools if t.function and t.function.name in names], choice.get("mode")
    if choice.get("type") == "function":
        return tools, {"type": "function", "function": {"name": choice.get("name")}}
    raise InvalidRequest(
        "`tool_choice` must be `none`, `auto`, `required`, "
        '`{"type": "function", "name": ...}` or `{"type": "allowed_tools", ...}`',
        param="tool_choice",
    )


def _tool(tool: ResponsesTool, where: str) -> Tool:
    if tool.type != "function":
        raise InvalidRequest(
            f"`{where}.type` is {tool.type!r}: this server runs no tools, it only calls the "
            "client's own functions",
            param=f"{where}.type",
        )
    return Tool(
        function=FunctionDefinition(
            name=_required(tool.name, f"{where}.name"),
            description=tool.description,
            parameters=tool.parameters,
        )
    )


def _text_format(body: InputTokensRequest) -> dict[str, Any] | None:
    """`text.format` as `response_format` has it."""
    form = None if body.text is None else body.text.format
    if form is None:
        return None
    if isinstance(form, dict):
        if form.get("type") in ("text", "json_object"):
            return {"type": form["type"]}
        if form.get("type") == "json_schema" and "schema" in form:
            return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    raise InvalidRequest(
        '`text.format` must be `{"type": "text"}`, `{"type": "json_object"}` or '
        '`{"type": "json_schema", "name": ..., "schema": ...}`',
        param="text.format",
    )


def output_messages(items: Iterable[dict[str, Any]]) -> list[ChatMessage]:
    """The output of a finished response as the message that a later turn builds on."""
    turn = ChatMessage(role="assistant", content="")
    items = list(items)
    for item in items:
        if item["type"] == "function_call":
            function = CalledFunction(name=item["name"], arguments=item["arguments"])
            call = ToolCall(id=item["call_id"], function=function)
            turn.tool_calls = [*(turn.tool_calls or []), call]
        else:
            text = "".join(part["text"] for part in item["content"])
            if item["type"] == "reasoning":
                turn.reasoning_content = (turn.reasoning_content or "") + text
            else:
                turn.content = f"{turn.content}{text}"
    return [turn] if items else []
