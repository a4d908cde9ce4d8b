"""A Jinja environment for chat templates: the usual globals, no way out, no endless work.

Templates come with checkpoints, so they are code of strangers. Jinja's sandbox keeps them from
Python's internals; on top of it every pass through a loop or macro, every repeated or joined text
and the time of a rendering are bounded. The globals and filters are those that templates on the
Hub are written against (transformers' `apply_chat_template`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tgi_cli.errors import TemplateFailed

MAX_OUTPUT_CHARS: Final = 8_000_000
MAX_STEPS: Final = 250_000
MAX_SECONDS: Final = 20.0
_LARGEST_NUMBER: Final = 4096  # bits


class TemplateRefused(jinja2.TemplateError):
    """The template itself refused the messages with `raise_exception`."""


@dataclass(slots=True)
class Budget:
    """What one rendering may still use.

    Attributes:
        steps: Passes through loop and macro bodies.
        chars: Characters of output, and of any text built on the way.
        deadline: `time.monotonic()` seconds.
    """

    steps: int = MAX_STEPS
    chars: int = MAX_OUTPUT_CHARS
    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)

    def step(self) -> bool:
        """Count one pass; always true, so that it can stand in a condition."""
        self.steps -= 1
        if self.steps < 0:
            raise TemplateFailed(f"the chat template ran more than {MAX_STEPS} loop passes")
        if time.monotonic() > self.deadline:
            raise TemplateFailed(f"the chat template ran longer than {MAX_SECONDS:g} seconds")
        return True

    def check_size(self, length: int) -> None:
        """Refuse a text or list of `length` items before it is built."""
        if length > self.chars:
            raise TemplateFailed(
                f"the chat template builds a text of {length} characters, the limit is {self.chars}"
            )


_budget: ContextVar[Budget] = ContextVar("_budget")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Sandboxed environment whose templates count their work against the current `Budget`."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        # Read by the compiled code through `nodes.EnvironmentAttribute`.
        self.count_step: Callable[[], bool] = lambda: _budget.get().step()
        self.join_texts: Callable[..., str] = _join_texts

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse operations whose result would be huge; everything else as usual."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                    _budget.get().check_size(len(sequence) * times)
            bits = left.bit_length() + right.bit_length() if numbers else 0
        elif operator == "**":
            bits = left.bit_length() * right if numbers else 0
        else:
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                _budget.get().check_size(len(left) + len(right))
            bits = 0
        if bits > _LARGEST_NUMBER:
            raise TemplateFailed(f"the chat template computes a number of {bits} bits")
        return super().call_binop(context, operator, left, right)


def render(template: jinja2.Template, variables: dict[str, Any], budget: Budget) -> str:
    """Render within `budget`.

    Raises:
        TemplateFailed: A limit was reached.
    """
    token = _budget.set(budget)
    try:
        pieces = []
        length = 0
        for piece in template.generate(variables):
            length += len(piece)
            budget.check_size(length)
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _budget.reset(token)


class _Metering(NodeTransformer):
    """Rewrites a parsed template so that repeated parts and `~` count against the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _step_statement(node.lineno))
        if node.test is not None:
            node.test = nodes.And(_step_call(node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _step_statement(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(
            nodes.EnvironmentAttribute("join_texts", lineno=node.lineno),
            node.nodes,
            [],
            None,
            None,
            lineno=node.lineno,
        )


def _step_call(lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute("count_step", lineno=lineno)
    return nodes.Call(function, [], [], None, None, lineno=lineno)


def _step_statement(lineno: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_step_call(lineno), lineno=lineno)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own attribute)

    def parse(self, parser: Parser) -> nodes.Scope:
        """Give back the body alone; what it sets stays inside, as in a macro's body."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _join_texts(*values: Any) -> str:
    texts = [str(value) for value in values]
    _budget.get().check_size(sum(map(len, texts)))
    return "".join(texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateRefused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
