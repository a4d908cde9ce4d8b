"""Chat messages to prompt text, with the checkpoint's own Jinja template.

Renders as transformers' `apply_chat_template` does, in a sandbox with bounded work. It knows
neither the HTTP API's schema nor tokens: messages are plain JSON values, the result is text, and
special tokens in it are written out (encode it without adding more).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2
from jinja2 import nodes

from tgi_cli.errors import TemplateFailed
from tgi_cli.template_sandbox import (
    MAX_OUTPUT_CHARS,
    Budget,
    TemplateEnvironment,
    TemplateRefused,
    render,
)
from tgi_cli.tokenizer import Tokenizer

_MISSING_HINT: Final = (
    "give one with `--chat-template FILE` or `--tokenizer-config-path FILE`, "
    "or use `/v1/completions` or `/generate`, which need none"
)
#: Marks where the last message ends, so that the template's closing words can be cut.
_CONTINUE_HERE: Final = "\ue000continue here\ue001"
#: Follows the mark; where it is gone the template trims, and the message's end is trimmed too.
_TRIMMED: Final = " "
#: Names a message's reasoning goes by; templates read the first, gpt-oss templates the second.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    r"""A compiled chat template.

    Example:
        >>> source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        >>> template = ChatTemplate(source, bos_token=None, eos_token=None)
        >>> template.render([{"role": "user", "content": "hi"}])
        'user: hi\n'

    Args:
        source: The Jinja source; None where the checkpoint has no template.
        bos_token: Text of the BOS token, for the template.
        eos_token: Text of the EOS token, for the template.
        tool_use_source: A separate template for requests with tools.
        special_tokens: More named tokens for the template, such as `pad_token`.
        max_output_chars: The longest prompt it may render.

    Raises:
        TemplateFailed: A source is not valid Jinja.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str | None,
        eos_token: str | None,
        tool_use_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        max_output_chars: int = MAX_OUTPUT_CHARS,
    ) -> None:
        environment = TemplateEnvironment()
        self._main = None if source is None else _Compiled(environment, source)
        self._tool_use = (
            None if tool_use_source is None else _Compiled(environment, tool_use_source)
        )
        named = dict(special_tokens or {}) | {"bos_token": bos_token, "eos_token": eos_token}
        self._special_tokens = {name: text for name, text in named.items() if text is not None}
        self._max_output_chars = max_output_chars

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that belongs to `tokenizer`."""
        return cls(
            tokenizer.chat_template,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            tool_use_source=tokenizer.tool_use_template,
            special_tokens=tokenizer.special_tokens,
        )

    @property
    def available(self) -> bool:
        """Whether there is a template at all."""
        return self._main is not None or self._tool_use is not None

    @property
    def tool_source(self) -> str | None:
        """Source of the template that requests with tools go to, None if it ignores `tools`."""
        compiled = self._tool_use or self._main
        return compiled.source if compiled is not None and compiled.reads_tools else None

    def mentions(self, text: str) -> bool:
        """Whether `text` stands in a source."""
        return any(text in c.source for c in (self._main, self._tool_use) if c is not None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`.

        Content given as a list of parts goes to the template as it is if the template walks
        through lists; otherwise its texts are joined. A template that only walks through lists
        gets a plain text as one part.

        Args:
            messages: Objects with `role` and `content`, as in OpenAI's API.
            tools: Function declarations, for templates that know tools.
            add_generation_prompt: End with the words that open the assistant's answer.
            continue_final_message: End inside the last message instead, without its closing words.
            **kwargs: More variables for the template, such as `documents` or `enable_thinking`.

        Raises:
            TemplateFailed: There is no template, it refused the messages (its own sentence), it
                failed on them, or its work or output exceeds the limits.
        """
        compiled = (self._tool_use or self._main) if tools else (self._main or self._tool_use)
        if compiled is None:
            raise TemplateFailed("the model has no chat template", hint=_MISSING_HINT)
        chat = [_with_reasoning(compiled.shape_content(message)) for message in messages]
        if continue_final_message:
            chat = [*chat[:-1], _with_marker(chat[-1] if chat else None)]
            add_generation_prompt = False
        variables = {
            "messages": chat,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            **kwargs,
        }
        text = self._run(compiled, variables)
        return _cut_at_marker(text) if continue_final_message else text

    def _run(self, compiled: _Compiled, variables: dict[str, Any]) -> str:
        try:
            return render(compiled.template, variables, Budget(chars=self._max_output_chars))
        except TemplateFailed:
            raise
        except TemplateRefused as error:
            raise TemplateFailed(str(error) or "the chat template refused the messages") from error
        except Exception as error:  # a template can raise whatever its expressions raise
            raise TemplateFailed(f"the chat template failed on these messages: {error}") from error


class _Compiled:
    """One source: its compiled form and how it takes a message's content."""

    def __init__(self, environment: TemplateEnvironment, source: str) -> None:
        try:
            self.template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
                hint=_MISSING_HINT,
            ) from error
        except RecursionError as error:
            raise TemplateFailed("the chat template is nested too deeply") from error
        self.source = source
        self.reads_tools = any(
            name.name == "tools" and name.ctx == "load" for name in tree.find_all(nodes.Name)
        )
        content = _ContentUse(tree)
        self._takes_lists = content.iterated
        self._takes_only_lists = content.iterated and not content.tested

    def shape_content(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of `message` whose content has the form the template expects."""
        content = message.get("content")
        if isinstance(content, str) and self._takes_only_lists:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, (list, tuple)) and not self._takes_lists:
            return {**message, "content": "".join(map(_part_text, content))}
        return dict(message)


class _ContentUse:
    """Finds out whether a template walks through `content` and whether it looks at its type."""

    _TYPE_TESTS: Final = frozenset({"string", "iterable", "sequence", "mapping"})

    def __init__(self, tree: nodes.Template) -> None:
        self._names = {"content"}
        # A name given to the content, perhaps through another one, stands for it.
        for _ in range(2):
            for assign in tree.find_all(nodes.Assign):
                if isinstance(assign.target, nodes.Name) and self._is_content(assign.node):
                    self._names.add(assign.target.name)
        self.iterated = any(self._is_content(loop.iter) for loop in tree.find_all(nodes.For))
        self.tested = any(
            test.name in self._TYPE_TESTS and self._is_content(test.node)
            for test in tree.find_all(nodes.Test)
        )

    def _is_content(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._names
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        if isinstance(node, nodes.Filter) and node.node is not None:
            return node.name in ("list", "selectattr", "rejectattr") and self._is_content(node.node)
        return False


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise TemplateFailed(
        f"a message has a content part of type {kind!r}, but the model's chat template takes "
        f"text only"
    )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give reasoning under every name that templates look for."""
    reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_marker(message: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the last message whose last text ends with the marker."""
    content = None if message is None else message.get("content")
    if message is not None and isinstance(content, str):
        return {**message, "content": content + _CONTINUE_HERE + _TRIMMED}
    if message is not None and isinstance(content, (list, tuple)):
        parts = list(content)
        for index in range(len(parts) - 1, -1, -1):
            if isinstance(parts[index], Mapping) and isinstance(parts[index].get("text"), str):
                text = parts[index]["text"] + _CONTINUE_HERE + _TRIMMED
                parts[index] = {**parts[index], "text": text}
                return {**message, "content": parts}
    raise TemplateFailed(
        "`continue_final_message` needs a last message with text", hint="add the text to continue"
    )


def _cut_at_marker(text: str) -> str:
    at = text.rfind(_CONTINUE_HERE)
    if at < 0:
        raise TemplateFailed(
            "the chat template does not show the end of the last message, so it cannot be continued"
        )
    spaced = text.startswith(_TRIMMED, at + len(_CONTINUE_HERE))
    return text[:at] if spaced else text[:at].rstrip()
