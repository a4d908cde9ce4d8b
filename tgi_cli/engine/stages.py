"""Stages between raw logits and the draw: masks, bias, penalties, temperature, truncation.

Each stage keeps its parameter per runner row with a neutral value, works on whole blocks of logit
rows at once and touches only the logit rows that use it, so that a row's result never depends on
its neighbours. None keeps anything that is not a function of (request, output ids): counts are
taken from the token history, where drafts before a logit row count like outputs. Knows no model
and draws nothing.

For the same reason sums over a row use `log_softmax` and sequential `cumsum`: `torch.sum` splits a
lone row over threads and would round differently there than in a batch. Top-p weighs tokens in
float64, where sums in another order, as a fused kernel makes them, choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgi_cli.engine.messages import Request
from tgi_cli.engine.rows import IntArray, LogitRows, RowState

NEG_INF = float("-inf")
#: Sorted candidates looked at first for top-p; widened until the nucleus is inside.
NUCLEUS_WIDTH = 256


class LogitsStage(RowState, Protocol):
    """One transformation of logits. `apply` works in place on [n, vocab_size] float32."""

    def uses(self, row: int) -> bool:
        """Whether the stage may ever be active for what is in `row`."""
        ...

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Which logit rows the stage changes, [n]."""
        ...

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Change every row of `logits`; all of them are active."""
        ...


class TokenMask:
    """Forbids end-of-sequence and stop tokens until `min_tokens` outputs exist."""

    def __init__(self, max_rows: int) -> None:
        self._min_tokens = np.zeros(max_rows, np.int64)
        self._ids = [torch.empty(0, dtype=torch.int64)] * max_rows

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Note which ids end this request and from when on they may."""
        sampling = request.sampling
        eos = () if sampling.ignore_eos else request.eos_token_ids
        ids = sorted({*eos, *sampling.stop_token_ids})
        self._ids[row] = torch.tensor(ids, dtype=torch.int64)
        self._min_tokens[row] = sampling.min_tokens if ids else 0

    def remove(self, row: int) -> None:
        """Allow everything."""
        self._min_tokens[row] = 0

    def uses(self, row: int) -> bool:
        """Whether it has a minimum."""
        return bool(self._min_tokens[row] > 0)

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows below their minimum."""
        return batch.output_positions < self._min_tokens[batch.rows]

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Set the ids to minus infinity."""
        for i, row in enumerate(batch.rows.tolist()):
            logits[i, self._ids[row]] = NEG_INF


class GreenList:
    """Watermark of Kirchenbauer et al. 2023: tokens of a list that follows from the one before.

    The list is the first share `gamma` of a permutation seeded by the last token times
    `HASH_KEY`; its tokens get `delta` more. These are TGI's numbers and those of transformers'
    `WatermarkingConfig`, whose `WatermarkDetector` finds the mark. The permutation is drawn on the
    CPU, so that it does not depend on the device.
    """

    HASH_KEY = 15485863

    def __init__(self, max_rows: int) -> None:
        self._gamma = np.zeros(max_rows, np.float64)
        self._delta = np.zeros(max_rows, np.float32)
        self._generator = torch.Generator()  # seeded anew for every list

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Keep the two numbers."""
        mark = request.sampling.watermark
        self._gamma[row] = 0.0 if mark is None else mark.gamma
        self._delta[row] = 0.0 if mark is None else mark.delta

    def remove(self, row: int) -> None:
        """No mark."""
        self._gamma[row] = 0.0

    def uses(self, row: int) -> bool:
        """Whether it has a mark."""
        return bool(self._gamma[row] > 0.0)

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows with a mark."""
        marked: NDArray[np.bool_] = self._gamma[batch.rows] > 0.0
        return marked

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Add `delta` to each row's list."""
        last = batch.history.tokens[batch.rows, batch.history_lens - 1]
        for i, (row, token) in enumerate(zip(batch.rows.tolist(), last.tolist(), strict=True)):
            self._generator.manual_seed(self.HASH_KEY * token)
            order = torch.randperm(logits.shape[-1], generator=self._generator)
            green = order[: int(logits.shape[-1] * self._gamma[row])].to(logits.device)
            logits[i, green] += float(self._delta[row])


class LogitBias:
    """Adds the request's bias to single tokens (OpenAI's `logit_bias`)."""

    def __init__(self, max_rows: int) -> None:
        self._biased = np.zeros(max_rows, np.bool_)
        self._ids = [torch.empty(0, dtype=torch.int64)] * max_rows
        self._values = [torch.empty(0)] * max_rows

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Keep ids and values as tensors."""
        bias = request.sampling.logit_bias
        self._biased[row] = bool(bias)
        if bias:
            self._ids[row] = torch.tensor(list(bias), dtype=torch.int64)
            self._values[row] = torch.tensor(list(bias.values()), dtype=torch.float32)

    def remove(self, row: int) -> None:
        """No bias."""
        self._biased[row] = False

    def uses(self, row: int) -> bool:
        """Whether it has a bias."""
        return bool(self._biased[row])

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows with a bias."""
        return self._biased[batch.rows]

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Add the values; ids within a request are distinct."""
        for i, row in enumerate(batch.rows.tolist()):
            logits[i, self._ids[row]] += self._values[row].to(logits.device)


class Penalties:
    """Repetition penalty (CTRL, Keskar et al. 2019) and OpenAI's frequency and presence penalties.

    The repetition penalty sees prompt and outputs: a positive logit is divided by it, a negative
    one multiplied. Then frequency is subtracted per occurrence and presence once, both from
    outputs only.
    """

    def __init__(self, max_rows: int) -> None:
        self.repetition = np.ones(max_rows, np.float32)
        self.frequency = np.zeros(max_rows, np.float32)
        self.presence = np.zeros(max_rows, np.float32)
        self._additive = np.zeros(max_rows, np.bool_)  # whether frequency or presence is set

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Keep the three numbers."""
        sampling = request.sampling
        self.repetition[row] = sampling.repetition_penalty
        self.frequency[row] = sampling.frequency_penalty
        self.presence[row] = sampling.presence_penalty
        self._additive[row] = bool(sampling.frequency_penalty or sampling.presence_penalty)

    def remove(self, row: int) -> None:
        """Back to neutral."""
        self.repetition[row] = 1.0
        self.frequency[row] = self.presence[row] = 0.0
        self._additive[row] = False

    def uses(self, row: int) -> bool:
        """Whether any of the three is set."""
        return bool(self.repetition[row] != 1.0 or self._additive[row])

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows with any of the three."""
        repetition: NDArray[np.bool_] = self.repetition[batch.rows] != 1.0
        return repetition | self._additive[batch.rows]

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Repetition, frequency, presence, in this order (as vLLM)."""
        self._apply_repetition(logits, batch)
        self._apply_additive(logits, batch)

    def _apply_repetition(self, logits: Tensor, batch: LogitRows) -> None:
        penalty = self.repetition[batch.rows]
        if not (penalty != 1.0).any():
            return
        # Padding repeats a real token, and writing one value twice changes nothing.
        ids = torch.from_numpy(batch.tokens()[0]).to(logits.device)
        factor = torch.from_numpy(penalty).to(logits.device)[:, None]
        seen = logits.gather(1, ids)
        logits.scatter_(1, ids, torch.where(seen < 0, seen * factor, seen / factor))

    def _apply_additive(self, logits: Tensor, batch: LogitRows) -> None:
        index = np.flatnonzero(self._additive[batch.rows] & (batch.output_positions > 0))
        if not len(index):
            return
        frequency = self.frequency[batch.rows[index]]
        presence = self.presence[batch.rows[index]]
        token_ids, valid = batch.select(index).tokens(outputs_only=True)
        ids = torch.from_numpy(token_ids).to(logits.device)
        rows = torch.from_numpy(index).to(logits.device)
        part = logits[rows]
        # Every addend of one element is the same number, so their order cannot matter.
        addends = np.where(valid, -frequency[:, None], np.float32(0))
        part.scatter_add_(1, ids, torch.from_numpy(addends).to(logits.device))
        once = torch.from_numpy(presence).to(logits.device)[:, None]
        part.scatter_(1, ids, part.gather(1, ids) - once)
        logits[rows] = part


class Temperature:
    """Divides logits by the temperature. Greedy rows (0) and 1 are left alone."""

    def __init__(self, max_rows: int) -> None:
        self.temperature = np.ones(max_rows, np.float32)

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Keep the temperature, 1 for a greedy request."""
        self.temperature[row] = request.sampling.temperature or 1.0

    def remove(self, row: int) -> None:
        """Back to 1."""
        self.temperature[row] = 1.0

    def uses(self, row: int) -> bool:
        """Whether it is another than 1."""
        return bool(self.temperature[row] != 1.0)

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows with another temperature than 1."""
        changed: NDArray[np.bool_] = self.temperature[batch.rows] != 1.0
        return changed

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Divide."""
        logits /= torch.from_numpy(self.temperature[batch.rows]).to(logits.device)[:, None]


class Truncation:
    """Top-k, then top-p (Holtzman et al. 2020) over what is left, then min-p (Nguyen et al. 2024).

    All three keep the tokens above a threshold, so one partial sort gives the highest of the three
    and equal logits stay or go together. Greedy requests are not truncated.
    """

    def __init__(self, max_rows: int) -> None:
        self.top_k = np.zeros(max_rows, np.int64)
        self.top_p = np.ones(max_rows, np.float64)
        self.min_p = np.zeros(max_rows, np.float64)

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Keep the three numbers."""
        sampling = request.sampling
        if sampling.greedy:
            self.remove(row)
            return
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p

    def remove(self, row: int) -> None:
        """Back to neutral."""
        self.top_k[row] = 0
        self.top_p[row] = 1.0
        self.min_p[row] = 0.0

    def uses(self, row: int) -> bool:
        """Whether any of the three is set."""
        return bool(self.top_k[row] > 0 or self.top_p[row] < 1.0 or self.min_p[row] > 0.0)

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows with any of the three."""
        return (
            (self.top_k[batch.rows] > 0)
            | (self.top_p[batch.rows] < 1.0)
            | (self.min_p[batch.rows] > 0.0)
        )

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Set everything below each row's threshold to minus infinity."""
        min_p = torch.from_numpy(self.min_p[batch.rows]).to(logits.device)
        # log(0) is minus infinity: no threshold.
        threshold = logits.amax(-1) + min_p.log().to(logits.dtype)
        top_k, top_p = self.top_k[batch.rows], self.top_p[batch.rows]
        index = np.flatnonzero((top_k > 0) | (top_p < 1.0))
        if len(index):
            rows = torch.from_numpy(index).to(logits.device)
            part = logits if len(index) == len(batch) else logits[rows]
            ranked = _rank_threshold(part, top_k[index], top_p[index])
            threshold[rows] = torch.maximum(threshold[rows], ranked)
        logits.masked_fill_(logits < threshold[:, None], NEG_INF)


class Typical:
    """Locally typical sampling (Meister et al. 2023): keeps tokens of near-average surprise."""

    def __init__(self, max_rows: int) -> None:
        self._mass = np.ones(max_rows, np.float64)

    def add(self, row: int, request: Request, output_ids: Sequence[int]) -> None:
        """Keep the mass; greedy requests have none."""
        self._mass[row] = 1.0 if request.sampling.greedy else request.sampling.typical_p

    def remove(self, row: int) -> None:
        """Back to everything."""
        self._mass[row] = 1.0

    def uses(self, row: int) -> bool:
        """Whether it keeps less than the whole mass."""
        return bool(self._mass[row] < 1.0)

    def active(self, batch: LogitRows) -> NDArray[np.bool_]:
        """Rows that keep less than the whole mass."""
        truncated: NDArray[np.bool_] = self._mass[batch.rows] < 1.0
        return truncated

    def apply(self, logits: Tensor, batch: LogitRows) -> None:
        """Keep the smallest set nearest to the entropy that reaches the mass."""
        logprobs = torch.log_softmax(logits, -1)
        probs = logprobs.exp()
        surprise = torch.nan_to_num(probs * logprobs, nan=0.0)  # 0 * -inf of removed tokens
        entropy = -torch.cumsum(surprise, -1, dtype=torch.float64)[:, -1:].to(logits.dtype)
        distance = (-logprobs - entropy).abs()
        ordered, order = torch.sort(distance, dim=-1, stable=True)
        cumulative = torch.cumsum(probs.gather(1, order), -1, dtype=torch.float64)
        mass = torch.from_numpy(self._mass[batch.rows]).to(logits.device)[:, None]
        last = (cumulative < mass).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
        logits.masked_fill_(distance > ordered.gather(1, last), NEG_INF)


class Stages:
    """All stages in the order in which they apply; iterates over them.

    Masks (further ones given as `masks`), watermark, bias and penalties on raw logits, then
    temperature, top-k, top-p, min-p, typical: the order of TGI's and transformers' warpers (vLLM
    has min-p before top-k). A fused kernel may stand for those between `early` and `late`, and the
    draw.
    """

    def __init__(self, max_rows: int, *masks: LogitsStage) -> None:
        self.early: tuple[LogitsStage, ...] = (
            TokenMask(max_rows),
            *masks,
            GreenList(max_rows),
            LogitBias(max_rows),
        )
        self.penalties = Penalties(max_rows)
        self.temperature = Temperature(max_rows)
        self.truncation = Truncation(max_rows)
        self.late: tuple[LogitsStage, ...] = (Typical(max_rows),)
        self.from_penalties: tuple[LogitsStage, ...] = (
            self.penalties,
            self.temperature,
            self.truncation,
            *self.late,
        )

    def __iter__(self) -> Iterator[LogitsStage]:
        return iter((*self.early, *self.from_penalties))


def users(stages: Iterable[LogitsStage], batch: LogitRows) -> IntArray:
    """The logit rows that any of the stages changes, in order."""
    active = np.zeros(len(batch), np.bool_)
    for stage in stages:
        active |= stage.active(batch)
    return np.flatnonzero(active)


def apply_stages(stages: Iterable[LogitsStage], logits: Tensor, batch: LogitRows) -> bool:
    """Run every stage on those rows of `logits` that use it; tell whether any did."""
    changed = False
    for stage in stages:
        active = stage.active(batch)
        if not active.any():
            continue
        changed = True
        if active.all():
            stage.apply(logits, batch)
        else:
            index = np.flatnonzero(active)
            rows = torch.from_numpy(index).to(logits.device)
            part = logits[rows]
            stage.apply(part, batch.select(index))
            logits[rows] = part
    return changed


def _rank_threshold(logits: Tensor, top_k: IntArray, top_p: NDArray[np.float64]) -> Tensor:
    """Smallest logit of each row that top-k followed by top-p keeps, [n].

    How wide the partial sort is depends on all rows, so nothing may depend on the width.
    """
    vocab_size = logits.shape[-1]
    k = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size)
    limited = k < vocab_size
    width = int(k[limited].max(initial=1))
    last = torch.from_numpy(k - 1).to(logits.device)[:, None]
    if not (top_p < 1.0).any():
        values = torch.topk(logits, width, dim=-1).values
        threshold = values.gather(1, last.clamp(max=width - 1))[:, 0]
        return threshold.masked_fill_(torch.from_numpy(~limited).to(logits.device), NEG_INF)
    mass = torch.from_numpy(top_p).to(logits.device)[:, None]
    highest = logits.amax(-1, keepdim=True).double()
    # The whole is what top-k leaves, known once it is ranked, or everything.
    whole = torch.full_like(highest, np.inf)
    index = np.flatnonzero(~limited & (top_p < 1.0))
    if len(index):
        rows = torch.from_numpy(index).to(logits.device)
        part = logits if len(index) == len(logits) else logits[rows]
        whole[rows] = part.double().sub_(highest[rows]).exp_().cumsum_(-1)[:, -1:]
    width = max(width, NUCLEUS_WIDTH)
    while True:
        width = min(width, vocab_size)
        values = torch.topk(logits, width, dim=-1).values
        weights = values.double().sub_(highest).exp_()
        cumulative = torch.cumsum(weights, -1)
        inside = (cumulative[:, -1:] >= mass * whole) | (last < width) | (mass >= 1.0)
        if width == vocab_size or bool(inside.all()):
            break
        width *= 8
    by_k = cumulative.gather(1, last.clamp(max=width - 1))
    whole = torch.where(last < vocab_size - 1, by_k, whole)
    kept = (cumulative - weights < mass * whole).sum(-1, keepdim=True)
    kept = torch.where(mass < 1.0, torch.minimum(kept, last + 1), last + 1).clamp_(min=1)
    threshold = values.gather(1, (kept - 1).clamp_(max=width - 1))
    return threshold.masked_fill_(kept == vocab_size, NEG_INF)[:, 0]
