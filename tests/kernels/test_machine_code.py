"""Accumulators of the integer kernels stay in registers: a compiler that spills halves their speed.

Reads the built library with `objdump`. What a tile stores once at its end is allowed for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import pytest

from tgi_cli.kernels.cpu import library

OBJDUMP = shutil.which("objdump")
PATH = library.library_path()
MANY = 40  # dot products of a whole unrolled tile

pytestmark = [
    pytest.mark.skipif(OBJDUMP is None, reason="objdump is not installed"),
    pytest.mark.skipif(PATH is None, reason="the native kernels are not built here"),
]


def test_integer_tiles_do_not_spill() -> None:
    listing = subprocess.run(
        [str(OBJDUMP), "-d", "--no-show-raw-insn", str(PATH)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    dots, stack = Counter[str](), Counter[str]()
    function = ""
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = header[1]
        elif "zmm" in line:
            dots[function] += "vpdpbusd" in line
            stack[function] += bool(re.search(r"\(%r[sb]p", line))
    tiles = [name for name, count in dots.items() if count >= MANY]
    assert tiles
    spilled = {name: stack[name] for name in tiles if stack[name] > 0.35 * dots[name]}
    assert not spilled
