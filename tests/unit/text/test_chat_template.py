from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.unit.text.templates import CHATML, GEMMA, LLAMA3, MISTRAL, PARTS, REASONING
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.errors import TemplateFailed
from tgi_cli.template_sandbox import MAX_STEPS

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Wetter für <eine> "Stadt" & mehr',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi {{ there }}"}],
    "system": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "What is 2 < 3 & 4?"},
    ],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b  "},
        {"role": "user", "content": "c 😀"},
    ],
}
TOOL_CHAT = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": '{"t": 20}'},
]


def template(source: str | None, **more: Any) -> ChatTemplate:
    return ChatTemplate(source, **TOKENS, **more)


def reference(source: str, chat: list[dict[str, Any]], **kwargs: Any) -> str:
    rendered, _ = render_jinja_template([chat], chat_template=source, **TOKENS, **kwargs)
    return rendered[0]


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL, REASONING])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("prompted", [False, True])
def test_renders_as_transformers(source: str, chat: list[dict[str, Any]], prompted: bool) -> None:
    ours = template(source).render(chat, add_generation_prompt=prompted)
    assert ours == reference(source, chat, add_generation_prompt=prompted)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL])
@pytest.mark.parametrize("chat", [CHATS["system"], TOOL_CHAT], ids=["declared", "called"])
def test_tools_render_as_in_transformers(source: str, chat: list[dict[str, Any]]) -> None:
    ours = template(source).render(chat, tools=[WEATHER])
    assert ours == reference(source, chat, tools=[WEATHER], add_generation_prompt=True)
    assert "Wetter für <eine>" in ours


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL, REASONING])
@pytest.mark.parametrize("end", ["", " ", " \n"])
def test_continues_the_last_message_as_transformers(source: str, end: str) -> None:
    chat = [{"role": "user", "content": "count"}, {"role": "assistant", "content": f"1, 2,{end}"}]
    ours = template(source).render(chat, continue_final_message=True)
    assert ours == reference(source, chat, continue_final_message=True)
    assert ours.rstrip().endswith("1, 2,")


def test_variables_reach_the_template() -> None:
    source = "{{ enable_thinking }} {{ documents }} {{ tools }} {{ pad_token }} {{ bos_token }}"
    ours = template(source, special_tokens={"pad_token": "<pad>"})
    assert ours.render([], enable_thinking=False) == "False None None <pad> <s>"


def test_reasoning_has_every_name() -> None:
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    for name in ("reasoning", "thinking", "reasoning_content"):
        chat = [{"role": "assistant", "content": "x", name: "why"}]
        assert template(source).render(chat) == "why|why" == reference(source, chat)


def test_clock_and_json() -> None:
    source = "{{ strftime_now('%Y') }} {{ {'a': 'ü<'} | tojson }} {{ [1] | tojson(indent=2) }}"
    year = str(datetime.now().year)
    assert template(source).render([]) in (f'{year} {{"a": "ü<"}} [\n  1\n]',)


def test_loop_controls_and_generation_tag() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    )
    chat = [{"role": role, "content": role} for role in ("skip", "a", "b")]
    assert template(source).render(chat) == reference(source, chat) == "a"


def test_tool_use_template_is_for_requests_with_tools() -> None:
    both = template("plain", tool_use_source="tools")
    assert both.render([]) == "plain"
    assert both.render([], tools=[]) == "plain"
    assert both.render([], tools=[WEATHER]) == "tools"
    assert template("plain").render([], tools=[WEATHER]) == "plain"


TEXT_PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_parts_are_joined_for_a_template_of_texts() -> None:
    chat = [{"role": "user", "content": TEXT_PARTS}]
    for source in (CHATML, GEMMA):
        joined = [{"role": "user", "content": "ab"}]
        assert template(source).render(chat) == template(source).render(joined)
    picture = [{"role": "user", "content": [*TEXT_PARTS, {"type": "image_url"}]}]
    with pytest.raises(TemplateFailed, match="'image_url', but the model's chat template takes"):
        template(CHATML).render(picture)


def test_parts_go_whole_to_a_template_of_parts() -> None:
    chat = [{"role": "user", "content": [*TEXT_PARTS, {"type": "image"}]}]
    assert template(PARTS).render(chat) == reference(PARTS, chat, add_generation_prompt=True)
    assert "a b <image>" in template(PARTS).render(chat)
    # It looks at the type, so a text stays a text.
    assert "user: x" in template(PARTS).render([{"role": "user", "content": "x"}])
    only_parts = "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}"
    only_parts += "{% endfor %}"
    assert template(only_parts).render([{"role": "user", "content": "xy"}]) == "[xy]"


def test_template_that_refuses_speaks_for_itself() -> None:
    source = "{{ raise_exception('Conversation roles must alternate user/assistant') }}"
    with pytest.raises(TemplateFailed) as raised:
        template(source).render([])
    assert raised.value.message == "Conversation roles must alternate user/assistant"
    assert raised.value.tgi_type == "template_error"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_template_that_breaks(source: str, message: str) -> None:
    with pytest.raises(TemplateFailed, match=message):
        template(source).render([{"role": "user", "content": "x"}])


def test_no_template_names_the_way_out() -> None:
    none = template(None)
    assert not none.available
    with pytest.raises(TemplateFailed, match="has no chat template") as raised:
        none.render([{"role": "user", "content": "x"}])
    assert "--chat-template" in str(raised.value.hint)
    assert "--tokenizer-config-path" in str(raised.value.hint)


def test_template_that_is_no_jinja() -> None:
    with pytest.raises(TemplateFailed, match="not valid Jinja: line 2"):
        template("ok\n{% if %}")
    with pytest.raises(TemplateFailed, match=r"nested too deeply|not valid Jinja"):
        template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


@pytest.mark.parametrize("content", [None, 5, [], [{"type": "image"}]])
def test_continuing_needs_a_text(content: object) -> None:
    chat = [{"role": "assistant", "content": content}]
    with pytest.raises(TemplateFailed, match=r"needs a last message with text|takes text only"):
        template(PARTS).render(chat, continue_final_message=True)
    with pytest.raises(TemplateFailed, match="needs a last message"):
        template(PARTS).render([], continue_final_message=True)
    with pytest.raises(TemplateFailed, match="cannot be continued"):
        template("nothing").render(CHATS["one"], continue_final_message=True)


BIG = "range(99999)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{{% for i in {BIG} %}}{{% for j in {BIG} %}}{{% endfor %}}{{% endfor %}}", "passes"),
        (
            f"{{% for i in {BIG} %}}{{% for j in {BIG} if 0 %}}{{% endfor %}}{{% endfor %}}",
            "passes",
        ),
        (
            f"{{% for i in {BIG} recursive %}}{{{{ loop({BIG}) }}}}{{% endfor %}}",
            "recursion|passes",
        ),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion|passes"),
        (f"{{% for i in {BIG} %}}{{{{ 'x' * 1000 }}}}{{% endfor %}}", "limit is 20000"),
        ("{{ 'x' * 10 ** 9 }}", "limit is 20000"),
        ("{{ (10 ** 9) * [1] }}", "limit is 20000"),
        ("{{ 2 ** (10 ** 9) }}", "bits"),
        ("{{ 10 ** 4000 * 10 ** 4000 }}", "bits"),
        (
            "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}",
            "limit is 20000",
        ),
        (
            "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
            "{% endfor %}",
            "limit is 20000",
        ),
    ],
)
def test_runaway_templates_end(source: str, message: str) -> None:
    with pytest.raises(TemplateFailed, match=message):
        template(source, max_output_chars=20_000).render([])


def test_counting_changes_no_result() -> None:
    source = (
        "{% set n = namespace(s='') %}{% for i in range(30) if i % 2 %}"
        "{% set n.s = n.s ~ loop.index ~ '/' ~ (loop.length + 1) %}{% if loop.last %}!{% endif %}"
        "{% endfor %}{{ n.s }}{% macro twice(x) %}{{ x * 2 }}{% endmacro %}{{ twice('ab') }}"
        "{{ 3 * 4 + 2 ** 3 }}{{ [1] + [2] }}{{ (1, 2) * 2 }}"
        "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}none{% endfor %}"
        "{% for t in [{'c': [{'c': []}]}] recursive %}<{{ loop(t.c) }}>{% endfor %}"
    )
    assert template(source).render([]) == reference(source, [])


def test_long_chats_are_within_the_limits() -> None:
    chat = [
        {"role": role, "content": "word " * 20}
        for _ in range(2000)
        for role in ("user", "assistant")
    ]
    rendered = template(GEMMA).render(chat)
    assert len(re.findall("<start_of_turn>", rendered)) == len(chat) + 1
    assert len(chat) < MAX_STEPS


def test_input_is_not_changed() -> None:
    message = {"role": "user", "content": TEXT_PARTS}
    template(PARTS).render([message], continue_final_message=True)
    assert message == {"role": "user", "content": TEXT_PARTS}
    assert TEXT_PARTS[1] == {"type": "text", "text": "b"}
