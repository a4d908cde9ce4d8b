"""Reasoning is told from content where the model's template knows `<think>`, and only there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.http.conftest import Site
from tests.http.test_tools import SAID, WEATHER
from tgi_cli.chat_template import ChatTemplate
from tgi_cli.serve.frontdoor import Texts
from tgi_cli.serve.keys import DOOR
from tgi_cli.serve.openai.reasoning import ReasoningSplit

PATH = "/v1/chat/completions"
QWEN = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
R1 = QWEN + "{% if add_generation_prompt %}<think>\n{% endif %}"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def use(site: Site, template: str, says: str) -> None:
    door = site.app[DOOR]
    rendered = ChatTemplate(template, bos_token=None, eos_token=None)
    door.open(Texts(door.texts.tokenizer, rendered), door.facts)
    site.engine.reply = lambda request: says


async def streamed(site: Site, **options: Any) -> tuple[str, str]:
    events = await site.stream(PATH, {**HELLO, **options, "stream": True})
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    return reasoning, "".join(delta.get("content", "") for delta in deltas)


@pytest.mark.parametrize(
    ("template", "says", "reasoning", "content"),
    [
        (QWEN, "<think>\nHm, well.\n</think>\n\nHello", "Hm, well.", "Hello"),
        (QWEN, "Hello <think>", None, "Hello <think>"),
        (QWEN, "<think>never ends", "never ends", ""),
        (QWEN, "<think>\n\n</think>\n\nHello", None, "Hello"),
        (R1, "Hm, well.\n</think>\n\nHello", "Hm, well.", "Hello"),
    ],
)
async def test_reasoning_is_apart(
    site: Site, template: str, says: str, reasoning: str | None, content: str
) -> None:
    use(site, template, says)
    _, body, _ = await site.post(PATH, HELLO)
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (reasoning, content)
    assert await streamed(site) == (reasoning or "", content)
    _, body, _ = await site.post(PATH, {**HELLO, "include_reasoning": False})
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": content}
    assert await streamed(site, include_reasoning=False) == ("", content)


async def test_other_models_are_left_alone(site: Site) -> None:
    says = "<think>Hm</think>Hello"
    use(site, "{{ messages[-1].content }}", says)
    _, body, _ = await site.post(PATH, HELLO)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": says}


async def test_thinking_can_be_turned_off_in_the_template(site: Site) -> None:
    use(site, QWEN, "Hello")
    body = {**HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    _, answer, _ = await site.post("/chat_tokenize", body)
    assert answer["templated_text"].endswith("<think>\n\n</think>\n\n")
    _, answer, _ = await site.post(PATH, body)
    assert answer["choices"][0]["message"]["content"] == "Hello"


async def test_reasoning_of_earlier_turns_reaches_the_template(site: Site) -> None:
    use(site, QWEN, "Hello")
    earlier = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    body = {"messages": [*HELLO["messages"], earlier, *HELLO["messages"]]}
    _, answer, _ = await site.post("/chat_tokenize", body)
    assert "[assistant]4(2 + 2)" in answer["templated_text"]


async def test_reasoning_before_tool_calls(site: Site) -> None:
    (said,) = (text for text in SAID.values() if "</tool_call>" in text)
    use(site, QWEN, f"<think>Which tool? <tool_call></think>\n{said}")
    body = {**HELLO, "tools": [WEATHER]}
    _, answer, _ = await site.post(PATH, body)
    choice = answer["choices"][0]
    assert choice["message"]["reasoning_content"] == "Which tool? <tool_call>"
    assert choice["message"]["content"] == "Let me look."
    assert len(choice["message"]["tool_calls"]) == 2
    assert choice["finish_reason"] == "tool_calls"


def split(texts: list[str], inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplit(inside=inside)
    parts = [*(splitter.push(text) for text in texts), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


pieces = st.sampled_from(["<think>", "</think>", "<think", "</", ">", " ", "\n", "a", "b c", "🎈"])


@given(st.lists(pieces, max_size=12), st.booleans(), st.lists(st.integers(0, 60), max_size=8))
def test_cuts_never_matter_and_nothing_is_lost(
    parts: list[str], inside: bool, places: list[int]
) -> None:
    text = "".join(parts)
    reasoning, content = split([text], inside)
    assert split(list(text), inside) == (reasoning, content)
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    pieces_ = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert split(pieces_, inside) == (reasoning, content)
    if not inside and not text.lstrip(" \t\r\n").startswith("<think>"):
        assert (reasoning, content) == ("", text)
    rest = text if inside else text.replace("<think>", "", 1)
    given_back = "".join((reasoning + content).split())
    assert given_back in (
        "".join(text.split()),
        "".join(rest.split()),
        "".join(rest.replace("</think>", "", 1).split()),
    )


async def test_forced_answers_have_no_reasoning(site: Site) -> None:
    use(site, R1, '{"city": "Paris"}')
    body = {**HELLO, "tools": [WEATHER], "tool_choice": "get_weather"}
    _, answer, _ = await site.post(PATH, body)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


async def test_effort_goes_to_templates_that_take_one(site: Site) -> None:
    use(site, "{{ messages[-1].content }}{{ reasoning_effort }}", "Hello")
    body = {**HELLO, "reasoning_effort": "low"}
    _, answer, _ = await site.post("/chat_tokenize", body)
    assert answer["templated_text"] == "Hilow"
    use(site, QWEN, "Hello")
    _, answer, headers = await site.post(PATH, {**HELLO, "reasoning_effort": "none"})
    assert "x-tgi-ignored-fields" not in headers
    assert answer["usage"]["prompt_tokens"] == len("[user]Hi<think>\n\n</think>\n\n")
    _, _, headers = await site.post(PATH, body)
    assert headers["x-tgi-ignored-fields"] == "reasoning_effort"
