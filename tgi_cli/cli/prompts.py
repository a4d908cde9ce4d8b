"""Prompts of an exact length for any server, without its tokenizer.

Common words are cut out of a fixed list until the server itself counts the wanted number of prompt
tokens; every request then gets the same words in another order. Tokenizers split at spaces, so the
order does not change the count, while different beginnings keep a prefix cache out of the figures.
The report shows the counts the server gave, should a tokenizer behave otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from tgi_cli.errors import RemoteError, UsageError

_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water "
    "been call who oil its now find long down day did get come made may part"
)
_FILLER = "a"  # the shortest step: one token in every vocabulary
_MEASUREMENTS = 12


class Prompts:
    """An endless supply: prompt `index` is always the same text for the same seed."""

    def __init__(self, words: list[str], seed: int, num_tokens: int) -> None:
        self._words = words
        self._seed = seed
        self.num_tokens = num_tokens  # as the server counted them

    def prompt(self, index: int) -> str:
        """The words in the order of `index`."""
        # The first word stays: without a space before it, it may be another number of tokens.
        first, *others = self._words
        random.Random(f"{self._seed}/{index}").shuffle(others)
        return " ".join([first, *others])


async def calibrate(count: Callable[[str], Awaitable[int]], num_tokens: int, seed: int) -> Prompts:
    """Find words that the server counts as `num_tokens`, or as close as a dozen tries get.

    `count` asks the server for the prompt tokens of a text. Raises `UsageError` when even one word
    is too long because of what the server adds, and whatever `count` raises.
    """
    supply = random.Random(seed).choices(_TEXT.split(), k=num_tokens)
    num_words, num_fillers, filler_tokens = num_tokens, 0, 1.0
    tried: dict[tuple[int, int], int] = {}
    best: tuple[list[str], int] | None = None
    while (num_words, num_fillers) not in tried and len(tried) < _MEASUREMENTS:
        words = supply[:num_words] + [_FILLER] * num_fillers
        measured = await count(" ".join(words))
        if measured < 1:
            raise RemoteError("the server counts no prompt tokens in `usage`", kind="bad answer")
        if best is None or abs(measured - num_tokens) < abs(best[1] - num_tokens):
            best = (words, measured)
        tried[num_words, num_fillers] = measured
        missing = num_tokens - measured
        without = tried.get((num_words, 0))
        if num_fillers and without is not None:
            filler_tokens = max((measured - without) / num_fillers, 0.5)
        if missing == 0:
            break
        if missing > 0 or num_fillers:
            step = round(missing / filler_tokens) or (1 if missing > 0 else -1)
            num_fillers = max(num_fillers + step, 0)
        elif num_words == 1:
            raise UsageError(
                f"--input-tokens is {num_tokens} but the server counts {measured} tokens for a "
                "single word",
                hint=f"give at least {measured}, or --endpoint completions for no chat template",
            )
        else:
            # Exact when words are one token each; else in proportion. Fillers make up the rest.
            fewer = num_words + missing
            num_words = fewer if fewer > 0 else max(num_words * num_tokens // measured, 1)
    assert best is not None
    return Prompts(best[0], seed, best[1])
