"""A body of Anthropic's as the `ChatRequest` that asks the same.

Turns of one role in a row become one, as Anthropic says; `tool_result` blocks become messages of
the role `tool`. What cannot be carried over is refused by the client's own name for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tgi_cli.chat_template import ChatTemplate
from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.anthropic.schema import (
    CountTokensRequest,
    InputBlock,
    InputMessage,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
)
from tgi_cli.serve.openai.conversation import effort_kwargs
from tgi_cli.serve.openai.reasoning import CLOSE
from tgi_cli.serve.openai.schema import ChatMessage, ChatRequest, stop_strings
from tgi_cli.serve.openai.tools.declared import FunctionDefinition, Tool
from tgi_cli.serve.openai.tools.history import CalledFunction, ToolCall

_ROLES = ("user", "assistant", "system")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
#: Between blocks of text that become one text.
_BETWEEN = "\n\n"


def conversation(body: CountTokensRequest, template: ChatTemplate) -> tuple[ChatRequest, list[str]]:
    """The chat, and the names of fields that this model's template leaves without effect."""
    if not body.messages:
        raise InvalidRequest("`messages` must hold at least one message", param="messages")
    messages: list[ChatMessage] = []
    if body.system:
        messages.append(ChatMessage(role="system", content=_plain(body.system, "system")))
    for i, (role, blocks) in _turns(body.messages):
        messages += _turn(role, blocks, f"messages[{i}].content")
    choice, parallel = _tool_choice(body.tool_choice)
    chat = ChatRequest(
        messages=messages,
        model=body.model,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)],
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    return chat, [*_thinking(body, chat, template), *_output(body, chat, template)]


def generation(
    body: MessagesRequest, template: ChatTemplate, *, max_stop_sequences: int
) -> tuple[ChatRequest, list[str]]:
    """Like `conversation`, with the fields that say how to answer."""
    chat, ignored = conversation(body, template)
    chat.max_tokens = body.max_tokens
    chat.stop = list(stop_strings(body.stop_sequences, max_stop_sequences, field="stop_sequences"))
    chat.stream = body.stream
    chat.temperature = body.temperature
    chat.top_p = body.top_p
    chat.top_k = body.top_k
    chat.user = None if body.metadata is None else body.metadata.user_id
    return chat, ignored


def _turns(messages: list[InputMessage]) -> Iterator[tuple[int, tuple[str, list[InputBlock]]]]:
    """Messages of one role in a row as one list of blocks, with the index of the first."""
    role, first, blocks = "", 0, list[InputBlock]()
    for i, message in enumerate(messages):
        if message.role not in _ROLES:
            raise InvalidRequest(
                f"`messages[{i}].role` must be `user`, `assistant` or `system`. "
                f"Given: {message.role!r}",
                param=f"messages[{i}].role",
            )
        if message.role != role and blocks:
            yield first, (role, blocks)
            blocks = []
        if not blocks:
            role, first = message.role, i
        content = message.content
        blocks += [InputBlock(type="text", text=content)] if isinstance(content, str) else content
    yield first, (role, blocks)


def _turn(role: str, blocks: list[InputBlock], where: str) -> list[ChatMessage]:
    if role == "assistant":
        return [_assistant(blocks, where)]
    messages: list[ChatMessage] = []
    texts: list[str] = []

    def said() -> None:
        if texts:
            messages.append(ChatMessage(role=role, content=_BETWEEN.join(texts)))
            texts.clear()

    for i, block in enumerate(blocks):
        if block.type == "tool_result" and role == "user":
            said()
            messages.append(_result(block, f"{where}[{i}]"))
        else:
            texts.append(_text(block, f"{where}[{i}]"))
    said()
    if not messages:
        raise InvalidRequest(f"`{where}` cannot be empty", param=where)
    return messages


def _assistant(blocks: list[InputBlock], where: str) -> ChatMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(blocks):
        at = f"{where}[{i}]"
        if block.type == "thinking":
            thoughts.append(_required(block.thinking, f"{at}.thinking"))
        elif block.type == "tool_use":
            name = _required(block.name, f"{at}.name")
            function = CalledFunction(name=name, arguments=block.input or {})
            calls.append(ToolCall(id=_required(block.id, f"{at}.id"), function=function))
        else:
            texts.append(_text(block, at))
    return ChatMessage(
        role="assistant",
        content="".join(texts),
        tool_calls=calls or None,
        reasoning_content=_BETWEEN.join(thoughts) or None,
    )


def _result(block: InputBlock, where: str) -> ChatMessage:
    content = _plain(block.content or "", f"{where}.content")
    # Templates know no failed result; a model understands the word.
    return ChatMessage(
        role="tool",
        tool_call_id=_required(block.tool_use_id, f"{where}.tool_use_id"),
        content=f"Error: {content}" if block.is_error else content,
    )


def _plain(content: str | list[InputBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    return _BETWEEN.join(_text(block, f"{where}[{i}]") for i, block in enumerate(content))


def _text(block: InputBlock, where: str) -> str:
    if block.type == "text":
        return _required(block.text, f"{where}.text")
    raise InvalidRequest(
        f"`{where}.type` is {block.type!r}, which this server cannot read",
        hint="it reads `text`, `tool_result` of users, `thinking` and `tool_use` of assistants",
        param=f"{where}.type",
    )


def _required(value: str | None, where: str) -> str:
    if value is None:
        raise InvalidRequest(f"`{where}` is required", param=where)
    return value


def _tool(tool: MessagesTool, where: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(
            f"`{where}.type` is {tool.type!r}: this server runs no tools, it only calls the "
            "client's own",
            param=f"{where}.type",
        )
    return Tool(
        function=FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema
        )
    )


def _tool_choice(choice: MessagesToolChoice | None) -> tuple[Any, bool]:
    """`tool_choice` in OpenAI's form, and whether several calls may come at once."""
    if choice is None:
        return None, True
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        name = _required(choice.name, "tool_choice.name")
        return {"type": "function", "function": {"name": name}}, parallel
    if choice.type not in _CHOICES:
        raise InvalidRequest(
            f"`tool_choice.type` must be `auto`, `any`, `tool` or `none`. Given: {choice.type!r}",
            param="tool_choice.type",
        )
    return _CHOICES[choice.type], parallel


def _thinking(body: CountTokensRequest, chat: ChatRequest, template: ChatTemplate) -> list[str]:
    """Tell the template whether to reason; name the field where it cannot be told."""
    if body.thinking is None:
        return []
    wanted = body.thinking.type != "disabled"
    if template.mentions("enable_thinking"):
        chat.chat_template_kwargs = {"enable_thinking": wanted}
        return []
    return [] if wanted == template.mentions(CLOSE) else ["thinking"]


def _output(body: CountTokensRequest, chat: ChatRequest, template: ChatTemplate) -> list[str]:
    config = body.output_config
    if config is None:
        return []
    if config.format is not None:
        form = config.format
        if not isinstance(form, dict) or form.get("type") != "json_schema" or "schema" not in form:
            raise InvalidRequest(
                '`output_config.format` must be `{"type": "json_schema", "schema": ...}`',
                param="output_config.format",
            )
        schema = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
        chat.response_format = schema
    if config.effort is None:
        return []
    chat.reasoning_effort = config.effort
    return [] if effort_kwargs(template, chat) is not None else ["output_config.effort"]
