"""Virtual environments of their own for clients that cannot live beside our dependencies.

Kept in pytest's cache, one for each set of requirements and Python version.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

import pytest

_PATIENCE = 300  # seconds that a client's script may take


def python_with(config: pytest.Config, *requirements: str) -> Path:
    """The interpreter of an environment with these packages, made when it is not there."""
    assert config.cache is not None
    name = hashlib.blake2b(" ".join(requirements).encode(), digest_size=6).hexdigest()
    folder = config.cache.mkdir(f"venv-{name}") / sys.version.split()[0]
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
        done.write_text("\n".join(requirements))
    return python


def run_script(python: Path, script: str, *arguments: str) -> None:
    """Run a client's script; it must print `done` last."""
    result = subprocess.run(
        [python, "-c", script, *arguments], capture_output=True, text=True, timeout=_PATIENCE
    )
    assert result.stdout.endswith("done\n"), result.stdout[-2000:] + result.stderr[-4000:]
