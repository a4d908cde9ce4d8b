"""tgi: download, quantize, launch, bench and chat with language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgi_cli.grammar import Grammar as Grammar
    from tgi_cli.llm import LLM as LLM
    from tgi_cli.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Grammar", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the Python API on first use: the command line must not pay for torch."""
    if name == "LLM":
        from tgi_cli.llm import LLM

        return LLM
    if name == "Grammar":
        from tgi_cli.grammar import Grammar

        return Grammar
    if name == "SamplingParams":
        from tgi_cli.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
