"""One chat on its way: from a `ChatRequest` to answers that are being generated and read.

What chat completions, Anthropic's messages and the responses API have in common. Knows the fields
of a chat, but no reply's shape.
"""

from __future__ import annotations

from typing import Any

from tgi_cli.chat_template import ChatTemplate
from tgi_cli.errors import InvalidRequest
from tgi_cli.grammar import Grammar
from tgi_cli.serve.answer import Answer
from tgi_cli.serve.frontdoor import Caller, FrontDoor, Prompt
from tgi_cli.serve.grammars import AskedGrammar, asked_grammar
from tgi_cli.serve.openai.message import MessageReader
from tgi_cli.serve.openai.reasoning import CLOSE, OPEN, ReasoningSplit, begins_inside
from tgi_cli.serve.openai.schema import (
    ChatRequest,
    chat_messages,
    check_reports,
    check_top,
    refuse_unsupported,
    sampling_params,
)
from tgi_cli.serve.openai.tools.call_grammar import answer_or_calls
from tgi_cli.serve.openai.tools.declared import ToolUse, use_of_tools
from tgi_cli.serve.openai.tools.history import shorten_ids


class Conversation:
    """A chat whose prompt is made and whose `answers` run when they are read."""

    def __init__(
        self,
        door: FrontDoor,
        body: ChatRequest,
        prompt: Prompt,
        answers: list[Answer],
        use: ToolUse,
    ) -> None:
        self.prompt = prompt
        self.answers = answers
        self.use = use
        self._show_reasoning = body.include_reasoning
        # An answer that must be a text of a grammar has no room for reasoning before it.
        free = all(answer.request.grammar is None for answer in answers)
        self._reasons = free and door.texts.template.mentions(CLOSE)

    @classmethod
    async def begin(
        cls,
        door: FrontDoor,
        body: ChatRequest,
        *,
        count: int,
        tenant: str,
        adapter: str = "",
        tokens_field: str = "max_tokens",
    ) -> Conversation:
        """Check the fields, render and tokenize the messages, and make `count` answers.

        `adapter` is the name of one, or empty; `tokens_field` is the client's name of `max_tokens`.
        Raises `InvalidRequest` or `TemplateFailed` for what cannot be answered.
        """
        refuse_unsupported(body)
        use = chat_tools(door, body)
        prompt = await render_chat(door, body, use)
        answers = await _answers(door, body, prompt, count, tenant, use, adapter, tokens_field)
        return cls(door, body, prompt, answers, use)

    def reader(self) -> MessageReader:
        """A fresh reader for one of the answers."""
        return MessageReader(
            ReasoningSplit(inside=begins_inside(self.prompt.text)) if self._reasons else None,
            self.use.parser(),
            parallel=self.use.parallel,
            show_reasoning=self._show_reasoning,
        )


def chat_tools(door: FrontDoor, body: ChatRequest) -> ToolUse:
    """Decide what this conversation does with tools."""
    return use_of_tools(body.tools, body.tool_choice, body.parallel_tool_calls, door.texts.template)


def effort_kwargs(template: ChatTemplate, body: ChatRequest) -> dict[str, Any] | None:
    """`reasoning_effort` as this model's template takes it, None where it takes none."""
    effort = body.reasoning_effort
    if effort is not None and template.mentions("reasoning_effort"):
        return {"reasoning_effort": effort}
    if effort == "none" and template.mentions("enable_thinking"):
        return {"enable_thinking": False}
    return None


async def render_chat(door: FrontDoor, body: ChatRequest, use: ToolUse) -> Prompt:
    """Messages to tokens. A conversation that ends with the assistant is continued, as in TGI."""
    messages = chat_messages(body.messages)
    if not door.texts.template.mentions("developer"):  # OpenAI's newer name of `system`
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    if use.form is not None and use.form.short_ids:
        shorten_ids(messages)
    continued = body.continue_final_message
    if continued is None:
        last = messages[-1]
        said = last["role"] == "assistant" and "tool_calls" not in last
        continued = said and not body.add_generation_prompt
    if continued and body.add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` exclude each other",
            param="continue_final_message",
        )
    prompted = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    given = use.for_template
    prompt = await door.render(
        messages,
        add_generation_prompt=prompted,
        continue_final_message=continued,
        template_kwargs={
            **(effort_kwargs(door.texts.template, body) or {}),
            **body.chat_template_kwargs,
        },
        tools=given,
    )
    if given and not any(function.name in prompt.text for function in use.functions):
        raise InvalidRequest(
            "the model's chat template left `tools` out of this prompt",
            hint="it may want them under another name, in `chat_template_kwargs`, or a message "
            "of another role to put them into",
            param="tools",
        )
    return prompt


async def _answers(
    door: FrontDoor,
    body: ChatRequest,
    prompt: Prompt,
    count: int,
    tenant: str,
    use: ToolUse,
    adapter: str,
    tokens_field: str,
) -> list[Answer]:
    """Make the `count` answers to a rendered conversation; they run when they are read."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    check_top("top_logprobs", body.top_logprobs, door.config.max_top_n_tokens)
    check_reports(body, door.config.max_top_n_tokens)
    asked, field = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, field = body.max_tokens, tokens_field
    if asked is not None and asked < 1:
        raise InvalidRequest(f"`{field}` must be >= 1. Given: {asked}", param=field)
    sampling = sampling_params(
        body,
        door.config,
        max_tokens=door.max_tokens(prompt, asked, field),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    caller = Caller(
        tenant=tenant,
        user=body.user or "",
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    grammar = await _grammar(door, body, use)
    marks = () if use.form is None else use.form.marks
    if door.texts.template.mentions(CLOSE):
        marks = (*marks, OPEN, CLOSE)
    return door.answers(
        prompt,
        sampling,
        caller=caller,
        count=count,
        marks=marks,
        grammar=grammar,
        adapter=adapter,
    )


async def _grammar(door: FrontDoor, body: ChatRequest, use: ToolUse) -> Grammar | None:
    """What the answer must look like: as the client says, a call where one is forced, or either."""
    asked = asked_grammar(body)
    if asked is None or use.mode == "none":
        if use.schema is not None:
            asked = AskedGrammar(Grammar.json_schema(use.schema), "tools")
        return await door.check_grammar(asked)
    await door.check_grammar(asked)  # by itself first, so that the field at fault is named
    if use.schema is not None:  # no text beside a forced call
        either = Grammar.json_schema(use.schema)
    else:
        assert use.form is not None
        either = answer_or_calls(
            asked.grammar, use.form, use.functions, door.texts.tokenizer, parallel=use.parallel
        )
    return await door.check_grammar(AskedGrammar(either, "tools"))
