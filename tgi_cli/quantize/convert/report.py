"""What a finished conversion says of itself: as data for `--json`, as text for the model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tgi_cli import __version__
from tgi_cli.hub_faults import gigabytes
from tgi_cli.quantize.convert.job import Outcome
from tgi_cli.quantize.convert.recipe import Recipe
from tgi_cli.quantize.convert.reload import Verdict


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was done and found.

    Attributes:
        base_model: what the user called the original.
        recipe: what was done.
        calibration: name and shape of the calibration samples, or None.
        held_out: name and shape of the samples it was measured on.
        outcome: sizes, quality and errors.
        verdicts: of the loaders.
    """

    base_model: str
    recipe: Recipe
    calibration: str | None
    held_out: str
    outcome: Outcome
    verdicts: list[Verdict]

    def data(self) -> dict[str, Any]:
        """The report as JSON values."""
        outcome, quality = self.outcome, self.outcome.quality
        return {
            "base_model": self.base_model,
            "method": self.recipe.method,
            "bits": self.recipe.bits,
            "group_size": self.recipe.group_size,
            "layout": self.recipe.layout_name,
            "calibration": self.calibration,
            "held_out": self.held_out,
            "bytes_before": outcome.bytes_before,
            "bytes_after": outcome.bytes_after,
            "perplexity_before": quality.perplexity_before,
            "perplexity_after": quality.perplexity_after,
            "kl_divergence": quality.divergence,
            "top1_agreement": quality.agreement,
            "tokens_measured": quality.tokens,
            "worst": [{"module": name, "error": error} for name, error in outcome.worst()],
            "errors": outcome.errors,
            "seconds": outcome.seconds,
            "peak_bytes": outcome.peak_bytes,
            "verification": [
                {
                    "loader": verdict.loader,
                    "state": verdict.state,
                    "detail": verdict.detail,
                    "agreement": verdict.agreement,
                }
                for verdict in self.verdicts
            ],
        }

    def rows(self) -> list[tuple[str, str]]:
        """The main figures as names and texts, in the order people read them."""
        outcome, quality = self.outcome, self.outcome.quality
        smaller = outcome.bytes_before / outcome.bytes_after
        change = quality.perplexity_after / quality.perplexity_before - 1
        return [
            (
                "size",
                f"{gigabytes(outcome.bytes_before)} -> {gigabytes(outcome.bytes_after)} "
                f"({smaller:.1f} times smaller)",
            ),
            (
                "perplexity",
                f"{quality.perplexity_before:.3f} -> {quality.perplexity_after:.3f} "
                f"({change:+.1%})",
            ),
            ("KL divergence", f"{quality.divergence:.4f} nats per token"),
            ("same best token", f"{quality.agreement:.1%}"),
            ("measured on", f"{quality.tokens:,} tokens of {self.held_out}"),
            ("calibrated on", self.calibration or "no text; rounded to nearest"),
            ("took", f"{outcome.seconds:.0f} s, at most {gigabytes(outcome.peak_bytes)} of memory"),
        ]

    def model_card(self) -> str:
        """README.md of the written folder."""
        label = self.recipe.label
        figures = "\n".join(f"| {name} | {text} |" for name, text in self.rows())
        worst = "\n".join(f"| `{name}` | {error:.4f} |" for name, error in self.outcome.worst())
        loaders = "\n".join(
            f"| {verdict.loader} | {verdict.state} | {verdict.detail} |"
            for verdict in self.verdicts
        )
        meaning = (
            "relative error of its output on the calibration text"
            if self.calibration is not None
            else "relative error of its weights"
        )
        return f"""---
base_model: {self.base_model}
tags:
- {self.recipe.method}
- quantized
---

# {self.base_model}, quantized: {label}

Made with `tgi quantize` {__version__}. Embeddings, norms and output head are as in the original.

| | |
|---|---|
{figures}

The matrices that lost most ({meaning}):

| matrix | error |
|---|---|
{worst}

Loaded again after it was written:

| loader | | |
|---|---|---|
{loaders}
"""
