"""From logits to tokens: stages, the draw, verification of drafts, log probabilities.

There is one path. A sequence with k drafts brings 1 + k logit rows; each draws the token the model
would have produced there, and drafts are accepted while they equal it. Without drafts that is
plain sampling. Knows no blocks and no queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgi_cli.engine.draw import argmax, draw_gumbel
from tgi_cli.engine.grammar import GrammarMask
from tgi_cli.engine.logprobs import token_logprobs
from tgi_cli.engine.messages import Request, TokenLogprobs
from tgi_cli.engine.rows import IntArray, LogitRows
from tgi_cli.engine.stages import LogitsStage, Stages, apply_stages, users
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.kernels.ops import Ops
from tgi_cli.kernels.sampling import RowParameters, RowSampling


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the logit rows of one step drew.

    `valid` is False where the logits were not finite or nothing was allowed; the token there means
    nothing. `logprobs` has an entry for each logit row whose request asked for them.
    """

    token_ids: IntArray  # [n]
    valid: NDArray[np.bool_]  # [n]
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Stages in their order, and each row's seed, greediness and wish for log probabilities.

    Args:
        ops: where noise comes from.
        max_rows: number of rows.
        grammars: compiler; without it requests with a grammar are refused.
        fused: gives a kernel for everything from the penalties to the draw. Rows that use a stage
            behind these, and all rows without a kernel, take the stages, which are its oracle.
    """

    def __init__(
        self,
        ops: Ops,
        max_rows: int,
        grammars: GrammarCompiler | None = None,
        fused: Callable[[RowParameters], RowSampling] | None = None,
    ) -> None:
        self._ops = ops
        self._grammar = GrammarMask(max_rows, grammars)
        self.stages = stages = Stages(max_rows, self._grammar)
        self._seeds = np.zeros(max_rows, np.int64)
        self._greedy = np.ones(max_rows, np.bool_)
        self._num_top = np.full(max_rows, -1, np.int64)  # -1: no log probabilities
        self._describing: set[int] = set()  # rows with log probabilities
        self._staged: set[int] = set()  # rows that use a stage the kernel has not
        self._fused: RowSampling | None = None
        if fused is not None:
            parameters = RowParameters(
                repetition=stages.penalties.repetition,
                frequency=stages.penalties.frequency,
                presence=stages.penalties.presence,
                temperature=stages.temperature.temperature,
                top_k=stages.truncation.top_k,
                top_p=stages.truncation.top_p,
                min_p=stages.truncation.min_p,
                seeds=self._seeds,
                greedy=self._greedy,
            )
            self._fused = fused(parameters)

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Fill the row here and in every stage."""
        sampling = request.sampling
        self._seeds[row] = np.uint64(sampling.seed).astype(np.int64)
        self._greedy[row] = sampling.greedy
        self._num_top[row] = -1 if sampling.logprobs is None else sampling.logprobs
        if sampling.logprobs is not None:
            self._describing.add(row)
        for stage in self.stages:
            stage.add(row, request, output_ids)
        if any(stage.uses(row) for stage in (*self.stages.early, *self.stages.late)):
            self._staged.add(row)

    def remove(self, row: int) -> None:
        """Make the row neutral here and in every stage."""
        self._greedy[row] = True
        self._num_top[row] = -1
        self._describing.discard(row)
        self._staged.discard(row)
        for stage in self.stages:
            stage.remove(row)

    def prepare(self, batch: LogitRows) -> None:
        """Begin with what needs no logits of a step that `sample` will be called for."""
        self._grammar.prepare(batch)

    @property
    def sole_kernel(self) -> RowSampling | None:
        """The kernel, if at present it alone draws for all rows, and nobody asks how likely."""
        if self._staged or self._describing or self._grammar.in_use:
            return None
        return self._fused

    @property
    def has_grammars(self) -> bool:
        """Whether any row has a grammar, and so is to be told what it drew."""
        return self._grammar.in_use

    def accept(self, row: int, token_ids: Sequence[int]) -> int | None:
        """Take note of what a row drew and kept; see `GrammarMask.accept`."""
        return self._grammar.accept(row, token_ids)

    def failure(self, row: int) -> str | None:
        """Why a row could draw nothing valid, where it was not the model's fault."""
        return self._grammar.failure(row)

    def sample(self, logits: Tensor, batch: LogitRows) -> Sampled:
        """Draw one token per logit row. `logits` [n, vocab_size] float32 are overwritten."""
        raw = wanted = None
        if self._describing:
            num_top = self._num_top[batch.rows]
            wanted = np.flatnonzero(num_top >= 0)
            raw = logits[torch.from_numpy(wanted).to(logits.device)]
        if self._fused is None:
            token_ids, valid = self._in_torch(self.stages, logits, batch)
        else:
            token_ids, valid = self._natively(self._fused, logits, batch)
        logprobs: dict[int, TokenLogprobs] = {}
        if raw is not None and wanted is not None and len(wanted):
            entries = token_logprobs(raw, token_ids[wanted].tolist(), num_top[wanted].tolist())
            logprobs = dict(zip(wanted.tolist(), entries, strict=True))
        return Sampled(token_ids, valid, logprobs)

    def _in_torch(
        self, stages: Iterable[LogitsStage], logits: Tensor, batch: LogitRows
    ) -> tuple[IntArray, NDArray[np.bool_]]:
        """These stages, then the draw: token ids, and which of them mean anything."""
        best = argmax(logits)
        finite = torch.isfinite(logits.gather(1, best[:, None]))[:, 0]
        if apply_stages(stages, logits, batch):
            best = argmax(logits)
            finite &= torch.isfinite(logits.gather(1, best[:, None]))[:, 0]
        valid = finite.numpy(force=True)
        random = np.flatnonzero(~self._greedy[batch.rows] & valid)
        if len(random):
            rows = torch.from_numpy(random).to(best.device)
            best[rows] = self._draw(logits, best[rows], batch, random)
        return best.numpy(force=True), valid

    def _natively(
        self, kernel: RowSampling, logits: Tensor, batch: LogitRows
    ) -> tuple[IntArray, NDArray[np.bool_]]:
        """The stages before the kernel, the kernel, and in torch rows that use a later stage."""
        if not self._staged:
            return kernel.sample(
                logits, batch.history.tokens, batch.rows, batch.history_lens, batch.output_positions
            )
        early = users(self.stages.early, batch)
        finite = None
        if len(early):  # masks hide what is not finite
            hidden = logits if len(early) == len(logits) else logits[torch.from_numpy(early)]
            finite = torch.isfinite(hidden.amax(-1)).numpy()
            apply_stages(self.stages.early, logits, batch)
        late = users(self.stages.late, batch)
        rest = logits[torch.from_numpy(late)] if len(late) else None
        token_ids, valid = kernel.sample(
            logits, batch.history.tokens, batch.rows, batch.history_lens, batch.output_positions
        )
        if rest is not None:
            later = self._in_torch(self.stages.from_penalties, rest, batch.select(late))
            token_ids[late], valid[late] = later
        if finite is not None:
            valid[early] &= finite
        return token_ids, valid

    def _draw(self, logits: Tensor, best: Tensor, batch: LogitRows, index: IntArray) -> Tensor:
        """Draw for the logit rows at `index`, whose likeliest ids are `best`."""
        device = logits.device
        if len(index) < len(batch):
            logits = logits[torch.from_numpy(index).to(device)]
        return draw_gumbel(
            logits,
            torch.from_numpy(self._seeds[batch.rows[index]]).to(device),
            torch.from_numpy(batch.output_positions[index]).to(device),
            self._ops,
            best=best,
        )


def num_accepted(draft_ids: Sequence[int], drawn_ids: Sequence[int]) -> int:
    """How many drafts, from the first, equal the tokens drawn in their places."""
    for i, draft_id in enumerate(draft_ids):
        if draft_id != drawn_ids[i]:
            return i
    return len(draft_ids)
