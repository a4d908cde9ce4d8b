"""How adapters are named on the command line."""

from __future__ import annotations

import pytest

from tgi_cli.adapter_names import parse_adapters
from tgi_cli.config import AdapterSource
from tgi_cli.errors import UsageError


def test_forms() -> None:
    items = ["a=/some/where", "b=org/repo@v1", "org/two", "org/three@main"]
    assert parse_adapters(items, flag="--lora-adapters") == (
        AdapterSource("a", "/some/where"),
        AdapterSource("b", "org/repo", "v1"),
        AdapterSource("org/two", "org/two"),
        AdapterSource("org/three", "org/three", "main"),
    )


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("a=b=c", "more than one `=` or `@`"),
        ("a=b@c@d", "more than one `=` or `@`"),
        ("=path", "a part is empty"),
        ("name=", "a part is empty"),
        ("name=path@", "a part is empty"),
        ('{"name": "a"', "JSON is not read here"),
    ],
)
def test_what_is_none_of_them(item: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_adapters([item], flag="--lora-modules")
    assert says in caught.value.message
    assert caught.value.message.startswith("--lora-modules is ")


def test_names_are_unique() -> None:
    with pytest.raises(UsageError, match="--lora-adapters names two adapters `a`"):
        parse_adapters(["a=/x", "a=/y"], flag="--lora-adapters")
