"""The clock of one request, and the response headers in which TGI reports it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tgi_cli.engine.messages import ModelFacts
from tgi_cli.serve.answer import Answer
from tgi_cli.serve.frontdoor import Prompt


class Timing:
    """Starts when made; `validated` ends the validation part."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._validation = 0.0

    def validated(self) -> None:
        """Checks, template and tokenizer are done."""
        self._validation = time.perf_counter() - self._started

    def stream_headers(self, facts: ModelFacts, prompts: Sequence[Prompt]) -> dict[str, str]:
        """What is known when a stream begins."""
        return {
            "x-compute-type": f"{facts.device}+optimized",
            "x-compute-characters": str(sum(len(prompt.text) for prompt in prompts)),
        }

    def headers(
        self, facts: ModelFacts, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> dict[str, str]:
        """The whole report: times in whole milliseconds, `x-compute-time` in seconds."""
        total = time.perf_counter() - self._started
        queue = max((answer.queue_time for answer in answers), default=0.0)
        inference = max((answer.inference_time for answer in answers), default=0.0)
        generated = sum(len(answer.output_ids) for answer in answers)
        longest = max((len(answer.output_ids) for answer in answers), default=0)
        return {
            **self.stream_headers(facts, prompts),
            "x-compute-time": f"{total:.6f}",
            "x-total-time": _milliseconds(total),
            "x-validation-time": _milliseconds(self._validation),
            "x-queue-time": _milliseconds(queue),
            "x-inference-time": _milliseconds(inference),
            "x-time-per-token": _milliseconds(inference / max(1, longest)),
            "x-prompt-tokens": str(sum(len(prompt.ids) for prompt in prompts)),
            "x-generated-tokens": str(generated),
        }


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
