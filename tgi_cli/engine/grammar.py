"""The stage that holds answers to their grammars: a matcher per row, masks while the model runs.

A matcher is rebuilt from (request, output ids) by consuming them, so preempted rows need nothing
kept. Masks depend on tokens alone, not on logits: they are filled by a thread beside the forward
pass. Knows no text and no schema; see `tgi_cli.grammar_compiler`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgi_cli.engine.messages import Request
from tgi_cli.engine.rows import LogitRows
from tgi_cli.errors import InvalidRequest
from tgi_cli.grammar_compiler import GrammarCompiler, GrammarMatcher


@dataclass(frozen=True, slots=True)
class _Constraint:
    """The grammar of one row. `eos_ids` end the answer where the grammar lets it end.

    They are offered unless the request ignores them; where the text is whole and nothing else may
    follow, they are offered whatever the request says.
    """

    matcher: GrammarMatcher
    eos_ids: NDArray[np.int64]
    offer_eos: bool


@dataclass(frozen=True, slots=True)
class _Masks:
    """What some logit rows may not draw, and those that can only end, with what they end."""

    forbidden: NDArray[np.bool_]  # [n, vocab_size]
    ends: list[tuple[int, NDArray[np.int64]]]


class GrammarMask:
    """Sets every token to minus infinity that the request's grammar does not allow next."""

    def __init__(self, max_rows: int, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._constrained = np.zeros(max_rows, np.bool_)
        self._constraints: dict[int, _Constraint] = {}
        self._failures: dict[int, str] = {}  # of matchers that gave up, by row
        self._prepared: deque[Future[_Masks]] = deque()  # of submitted steps, oldest first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tgi-grammar")

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Put the row's matcher where `output_ids` lead.

        Raises `InvalidRequest` if they break the grammar or complete it.
        """
        self.remove(row)
        if request.grammar is None:
            return
        if self._compiler is None:
            raise InvalidRequest("grammar is not supported")
        matcher = self._compiler.compile(request.grammar).start()
        taken = matcher.consume(output_ids)
        if taken < len(output_ids):
            raise InvalidRequest(f"output token {taken} does not follow the grammar")
        if matcher.complete:
            raise InvalidRequest("the output satisfies its grammar already: nothing can follow")
        eos_ids = np.array(
            [i for i in request.eos_token_ids if i < self._compiler.vocab_size], np.int64
        )
        self._constraints[row] = _Constraint(matcher, eos_ids, not request.sampling.ignore_eos)
        self._constrained[row] = True

    def remove(self, row: int) -> None:
        """Allow everything."""
        self._constrained[row] = False
        self._constraints.pop(row, None)
        self._failures.pop(row, None)

    @property
    def in_use(self) -> bool:
        """Whether any row has a grammar."""
        return bool(self._constraints)

    def uses(self, row: int) -> bool:
        """Whether the row has a grammar."""
        return row in self._constraints

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows with a grammar."""
        active: NDArray[np.bool_] = self._constrained[batch.rows]
        return active

    def prepare(self, batch: LogitRows) -> None:
        """Begin to fill the masks of a step; the next `apply` that has none waits for them."""
        if not self.in_use:
            return
        index = np.flatnonzero(self.active(batch))
        if len(index):
            self._prepared.append(self._thread.submit(self._fill, batch.select(index)))

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Mask; a row that can only end is left with its end tokens alone."""
        masks = self._prepared.popleft().result() if self._prepared else self._fill(batch)
        logits.masked_fill_(torch.from_numpy(masks.forbidden).to(logits.device), float("-inf"))
        for i, eos_ids in masks.ends:
            logits[i, torch.from_numpy(eos_ids).to(logits.device)] = 0.0

    def accept(self, row: int, token_ids: Sequence[int]) -> int | None:
        """Advance a row by what it drew.

        Returns how many of the tokens belong to the answer if it is complete with them, else None.
        """
        constraint = self._constraints.get(row)
        if constraint is None:
            return None
        taken = constraint.matcher.consume(token_ids)
        if constraint.matcher.complete:
            return taken
        # The first token that is not of the text was an end token, where the text may end.
        return taken + 1 if taken < len(token_ids) else None

    def failure(self, row: int) -> str | None:
        """Why the row's grammar could not be followed any further, if that was so."""
        return self._failures.get(row)

    def _fill(self, batch: LogitRows) -> _Masks:
        """Masks of constrained logit rows, those behind drafts included."""
        assert self._compiler is not None
        vocab_size = self._compiler.vocab_size
        words = np.full((len(batch), self._compiler.num_words), -1, np.int32)
        rows = batch.rows.tolist()
        first = 0
        while first < len(rows):
            last = first
            while last + 1 < len(rows) and rows[last + 1] == rows[first]:
                last += 1
            self._fill_row(batch, first, last, words)
            first = last + 1
        bits = np.unpackbits(~words.view(np.uint8), axis=1, bitorder="little")
        may_end = bits[:, vocab_size] == 0
        forbidden = bits[:, :vocab_size].view(np.bool_)
        ends = []
        for i in np.flatnonzero(may_end).tolist():
            constraint = self._constraints[rows[i]]
            if forbidden[i].all():
                ends.append((i, constraint.eos_ids))
            elif constraint.offer_eos:
                forbidden[i, constraint.eos_ids] = False
        return _Masks(forbidden, ends)

    def _fill_row(self, batch: LogitRows, first: int, last: int, words: NDArray[np.int32]) -> None:
        """Masks of one sequence: after its tokens, then after each draft that may follow.

        What stands behind a draft that may not is never drawn from; it stays unmasked.
        """
        row = int(batch.rows[first])
        matcher = self._constraints[row].matcher
        length = int(batch.history_lens[first])
        drafts = batch.history.tokens[row, length : length + last - first].tolist()
        taken = 0
        for i in range(first, last + 1):
            matcher.fill(words[i])
            if matcher.failed is not None:
                self._failures[row] = f"the grammar cannot be followed further: {matcher.failed}"
                words[first : last + 1] = 0
                return
            if i == last or not matcher.consume(drafts[taken : taken + 1]):
                break
            taken += 1
        matcher.rollback(taken)
