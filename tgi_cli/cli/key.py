"""`tgi key`: make an API key; its hash and limits go to stdout, the key itself to stderr.

Writes no file: the entry is appended to the key file by whoever runs it. See `docs/access.md`.
"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from tgi_cli.cli.console import invocation
from tgi_cli.errors import UsageError
from tgi_cli.serve.api_keys import hash_of, new_key

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def command(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The tenant: letters, digits, `-` and `_`.")],
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests it may make in a minute.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompts and answers in a minute.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests it may have answered at once.")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Its share of the engine beside others', 1 is normal.")
    ] = None,
) -> None:
    """Make an API key and its entry for --api-key-file.

    `tgi key team-a >> keys.toml` appends the entry; the key is shown on stderr, once.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"the tenant's name is {name!r} but must be 1 to 64 letters, digits, `-` and `_`"
        )
    if weight is not None and not 0 < weight < float("inf"):
        raise UsageError(f"--weight is {weight} but must be more than 0")
    printer = invocation(ctx).printer
    key = new_key()
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
        "weight": weight,
    }
    lines = [f"[{name}]", f'key = "{hash_of(key)}"']
    lines += [f"{field} = {value}" for field, value in limits.items() if value is not None]
    printer.data("\n".join(lines) + "\n")
    # Not `say`: --quiet must not lose the only copy.
    typer.echo(f"the key of {name}, shown this once: {key}", err=True)
