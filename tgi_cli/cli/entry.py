"""Where the programs begin: ahead of everything else, a server's engine is started.

Its process imports torch, for longer than this one takes to read its arguments. Imports nothing
itself that takes time, and knows no command but `launch`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from tgi_cli.serve.early_engine import EarlyEngine

#: With these a server is not started.
_NO_SERVER = frozenset({"--help", "--dry-run", "--show-config", "--version"})


def main() -> NoReturn:
    """Run `tgi`."""
    early = _early(sys.argv[2:]) if sys.argv[1:2] == ["launch"] else None
    from tgi_cli.cli.app import main

    main(early)


def launcher() -> NoReturn:
    """Run `text-generation-launcher`: `tgi launch` under TGI's name, open to the network."""
    early = _early(sys.argv[1:])
    from tgi_cli.cli.app import launcher

    launcher(early)


def _early(arguments: Sequence[str]) -> EarlyEngine | None:
    return None if _NO_SERVER.intersection(arguments) else EarlyEngine.start()
