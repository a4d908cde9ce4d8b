"""Compiles the kernels' sources side by side: an instruction set takes half a minute of a core."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class SideBySide(build_ext):
    """`build_ext`, but for the sources of one extension on all cores."""

    def build_extension(self, ext: Extension) -> None:
        """Build as always, with a compiler that takes the sources apart."""
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], *arguments: Any, **options: Any) -> list[str]:
            def compile_one(source: str) -> list[str]:
                objects: list[str] = compile_all([source], *arguments, **options)
                return objects

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [made for objects in pool.map(compile_one, sources) for made in objects]

        self.compiler.compile = compile_each
        super().build_extension(ext)


setup(cmdclass={"build_ext": SideBySide})
