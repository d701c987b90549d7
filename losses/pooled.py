"""Calibration errors of pooled answers as penalties: MMCE and soft-binned ECE, against a memory of earlier answers.

Both are functions of all answers together, not sums over them; computed within a micro-batch they measure its size (a
calibrated model seems off by 0.27 ECE at 8 answers), and their gradient pushes confidences to the extremes. So each
answer of a step is compared with a memory bank: the (confidence, grade) of the answers of earlier steps, from all ranks,
without gradient. That makes the penalty a sum over the step's answers: its value and gradient do not depend on
micro-batches or ranks, and no answer is compared with itself.

What the bank costs: its confidences are those of the steps they came from. A larger bank means less noise and older
numbers. Take one that holds a few dozen steps; where the learning rate is so high that confidences change within them,
take a smaller one or a proper score (answer_score), which needs no bank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import answer_logprob, own_answers, sum_term
from calibtrain.ops import TokenStats, at_least_float32

logger = logging.getLogger(__name__)

LEAST_MASS = 1e-12
"""Bins with less soft mass count as empty."""
MOST_PENDING = 64
"""Micro-batches that a first step may have, before `after_step` is asked for."""


def mmce_squared(confidence: Tensor, correct: Tensor, width: float = 0.4) -> Tensor:
    """MMCE^2 as a U-statistic: mean over i != j of (c_i - r_i)(c_j - r_j) exp(-|r_i - r_j| / width).

    Kumar, Sarawagi, Jain 2018 (ICML) without the diagonal: unbiased, so it may be negative. `confidence` (M,)
    floating and `correct` (M,), both in [0, 1]; returns (). Differentiable in `confidence`. Raises UserError for fewer
    than two answers, which make no pair.
    """
    if confidence.shape[0] < 2:
        raise UserError(
            f"mmce_squared compares answers with each other, and got {confidence.shape[0]}; where a micro-batch holds so "
            "few, MMCELoss compares them with those of earlier steps"
        )
    confidence = at_least_float32(confidence)
    residual = correct - confidence
    pairs = residual[:, None] * residual * torch.exp(-(confidence[:, None] - confidence).abs() / width)
    size = confidence.shape[0]
    return (pairs.sum() - pairs.diagonal().sum()) / (size * (size - 1))


def mmce_against(confidence: Tensor, correct: Tensor, bank: Tensor, comparable: Tensor, width: float = 0.4) -> Tensor:
    """Share of each answer in the MMCE^2 between two samples: (c_i - r_i) mean_j (c_j - r_j) exp(-|r_i - r_j| / width).

    `confidence`, `correct` (M,); `bank` (B, 2): confidences and grades of other answers; `comparable` (M, B) bool: which
    of them to average over. Returns (M,), 0 where there is none to compare with.
    """
    kernel = torch.exp(-(confidence[:, None] - bank[:, 0]).abs() / width) * comparable
    others = (kernel * (bank[:, 1] - bank[:, 0])).sum(dim=1) / comparable.sum(dim=1).clamp(min=1)
    return (correct - confidence) * others


def soft_bins(confidence: Tensor, bins: int, temperature: float) -> Tensor:
    """softmax_k(-(r - (k - 1/2)/bins)^2 / temperature): membership of each confidence (M,) in each bin. (M, bins)."""
    anchors = (torch.arange(bins, device=confidence.device, dtype=confidence.dtype) + 0.5) / bins
    return (-(confidence[:, None] - anchors).square() / temperature).softmax(dim=1)


def soft_binned_ece_squared(confidence: Tensor, correct: Tensor, bins: int = 15, temperature: float = 0.01) -> Tensor:
    """Square of the soft-binned ECE: sum_k S_k/M (conf_k - acc_k)^2 (Karandikar et al. 2021, arXiv 2108.00106, eq. 11).

    Without the root, whose gradient is infinite at 0. `confidence` (M,) floating and `correct` (M,), both in [0, 1];
    returns (). Biased upward by the number of answers, like every binned ECE. Raises UserError without answers.
    """
    if confidence.shape[0] == 0:
        raise UserError("soft_binned_ece_squared got no answers; SoftBinnedECELoss has a memory of earlier ones")
    confidence = at_least_float32(confidence)
    membership = soft_bins(confidence, bins, temperature)
    mass = membership.sum(dim=0)
    excess = (membership * (confidence - correct)[:, None]).sum(dim=0)
    return (excess * excess / mass.clamp(min=LEAST_MASS)).sum() / confidence.shape[0]


def soft_binned_ece_against(
    confidence: Tensor, correct: Tensor, bank: Tensor, comparable: Tensor, bins: int = 15, temperature: float = 0.01
) -> Tensor:
    """Share of each answer in the square of the soft-binned ECE, with the bins' gaps taken from a bank.

    SB-ECE^2 = sum_k E_k^2 / S_k is the largest value over g of sum_k (2 g_k E_k - g_k^2 S_k), reached at the gaps
    g_k = E_k / S_k = conf_k - acc_k; the expression in brackets is a sum over answers. With g from the bank it touches
    SB-ECE^2, with its gradient, where bank and answers agree, and is below it elsewhere. Arguments as in `mmce_against`.
    Returns (M,).
    """
    membership = soft_bins(bank[:, 0], bins, temperature)
    mass = comparable.to(membership.dtype) @ membership
    gaps = comparable.to(membership.dtype) @ (membership * (bank[:, 0] - bank[:, 1])[:, None])
    gaps = gaps / mass.clamp(min=LEAST_MASS)
    own = soft_bins(confidence, bins, temperature)
    return (own * (2.0 * gaps * (confidence - correct)[:, None] - gaps.square())).sum(dim=1)


class MemoryBank:
    """The last `capacity` answers of finished steps, the same on every rank; `items` (B, 3) float64 without gradient.

    Columns are confidence, grade and record id. The items of one step are in an order that their hashes give, so that the
    bank does not depend on which rank or micro-batch they came from, and what it has no room for is any of them.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"capacity (bank_size) must be at least 1, got {capacity}")
        self.capacity = capacity
        self.items = torch.zeros((0, 3), dtype=torch.float64)
        self._ended = False
        self._pending: list[Tensor] = []
        self._device = self.items.device  # where answers come from: all ranks gather there, also one that has none

    def add(self, confidence: Tensor, correct: Tensor, record_ids: Tensor) -> None:
        """Note answers (M,) of the running step; what is not finite is left out. Does not wait for the device.

        Logs once that `end_step` is never called, without which the bank stays empty and every comparison with it 0.
        """
        if not self._ended and len(self._pending) == MOST_PENDING:
            logger.warning(
                "%d micro-batches have ended no step: call the loss's after_step() after each optimiser step, or it has no "
                "earlier answers to compare with and stays 0",
                MOST_PENDING,
            )
        self._device = confidence.device
        self._pending.append(torch.stack([one.detach().double() for one in (confidence, correct, record_ids)], dim=1))

    def forget_step(self) -> None:
        """Leave out what was noted in the running step: another rank has noted the same."""
        self._pending = []

    def end_step(self) -> None:
        """Take in all ranks' answers of the step that ended. Collective over the default process group."""
        self._ended = True
        rows = self.items[:0].to(self._device)
        if self._pending:
            noted = torch.cat(self._pending)
            rows = noted[noted.isfinite().all(dim=1)]
        self._pending = []
        rows = _gather_rows(rows)
        for column in (0, 1, 2):  # by hash of record and step, of which record, grade and confidence settle ties
            rows = rows[rows[:, column].argsort(stable=True)]
        rows = rows[_scattered(rows[:, 2], self.items[:, 2].to(rows.device)).argsort(stable=True)]
        self.items = torch.cat([self.items.to(rows.device), rows])[-self.capacity :]

    def compared_with(self, record_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`bank` (B, 2) and `comparable` (M, B) for answers to `record_ids` (M,): never an answer to the same record."""
        items = self.items.to(record_ids.device)
        return items[:, :2], record_ids[:, None] != items[:, 2]


def _scattered(record_ids: Tensor, before: Tensor) -> Tensor:
    """Hashes (M,) int64 of records, others for each step, which the records in the bank before it (B,) stand for."""
    return _mixed(record_ids.long() ^ _mixed(before.long()).sum())


def _mixed(x: Tensor) -> Tensor:
    """Integers scattered over all of int64, neighbours too, in the manner of splitmix64; the same on every device."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31)


def _signed(bits: int) -> int:
    """64 bits as an int64 reads them."""
    return bits - (bits >> 63 << 64)


def _gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, whose numbers may differ. (sum of lengths, 3)."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    length = torch.tensor([rows.shape[0]], device=rows.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(one) for one in lengths]
    padded = rows.new_zeros((max(sizes), rows.shape[1]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _PooledPenalty(nn.Module):
    """A penalty on the graded ANSWER sequences against a memory bank, which is in the module's state.

    `shares(confidence (S,), correct (S,), bank (B, 2), comparable (S, B))` gives each answer's share of it, (S,).
    """

    name: str

    def __init__(
        self, shares: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], weight: float, bank_size: int
    ) -> None:
        super().__init__()
        self.shares = shares
        self.weight = weight
        self.bank = MemoryBank(bank_size)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Graded answers. () int64."""
        return {self.name: own_answers(batch, graded=True).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term; in training its answers are noted for the bank."""
        graded = own_answers(batch, graded=True)
        confidence = answer_logprob(stats, batch, graded).exp()
        if self.training:
            self.bank.add(confidence, torch.where(graded, batch.correct, torch.nan), batch.record_ids)
        correct = torch.where(graded, batch.correct, 0.0).to(confidence.dtype)
        bank, comparable = self.bank.compared_with(batch.record_ids)
        shares = self.shares(confidence, correct, bank.to(confidence), comparable)
        return {self.name: sum_term(shares, graded, self.weight)}

    def forget_step(self) -> None:
        """Leave out this rank's answers of the step, which another rank has as well; `after_step` comes next."""
        self.bank.forget_step()

    def after_step(self) -> None:
        """Take the step's answers into the bank. Collective: every rank, after every optimiser step."""
        self.bank.end_step()

    def get_extra_state(self) -> Tensor:
        """The bank, for `state_dict`."""
        return self.bank.items.cpu()

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the bank of a `state_dict`."""
        self.bank.items = state[-self.bank.capacity :]


class MMCELoss(_PooledPenalty):
    """Penalty: MMCE^2 of the model's own graded answers, unbiased, in expectation over answers and bank.

    Args:
        weight: of the term in the loss.
        width: of the Laplace kernel.
        bank_size: answers of earlier steps to compare with.
    """

    name = "mmce"

    def __init__(self, *, weight: float = 1.0, width: float = 0.4, bank_size: int = 512) -> None:
        if width <= 0:
            raise UserError(f"width must be positive, got {width}")
        super().__init__(partial(_mmce_shares, width=width), weight, bank_size)


def _mmce_shares(confidence: Tensor, correct: Tensor, bank: Tensor, comparable: Tensor, width: float) -> Tensor:
    """Values of `mmce_against` with twice their gradient: both answers of a pair would move, the bank's cannot."""
    values = mmce_against(confidence, correct, bank, comparable, width)
    return 2.0 * values - values.detach()


class SoftBinnedECELoss(_PooledPenalty):
    """Penalty: square of the soft-binned ECE of the model's own graded answers, the bins' gaps from the bank.

    Args:
        weight: of the term in the loss.
        bins: number of them.
        temperature: of the membership in them.
        bank_size: answers of earlier steps that the gaps are measured on.
    """

    name = "soft_binned_ece"

    def __init__(self, *, weight: float = 1.0, bins: int = 15, temperature: float = 0.01, bank_size: int = 512) -> None:
        if bins < 1 or temperature <= 0:
            raise UserError(f"bins must be at least 1 and temperature positive, got {bins} and {temperature}")
        super().__init__(partial(soft_binned_ece_against, bins=bins, temperature=temperature), weight, bank_size)


CATALOG = (
    LossEntry(
        name="mmce",
        kind="penalty",
        title="Maximum mean calibration error of own answers, squared, as a U-statistic against a memory bank",
        paper="Kumar, Sarawagi, Jain 2018, ICML (PMLR 80)",
        equation="mean over i != j of (c_i - r_i)(c_j - r_j) exp(-|r_i - r_j| / 0.4)",
        cost="answers x bank numbers; one small all-gather a step",
        compared_with="netcal 1.4.0 (value; gradient of its weighted form) and the authors' formula, diagonal added back",
        largest_deviation="1e-12 (value and gradient, float64)",
        differs=(
            "Off-diagonal pairs only: the public code's diagonal adds E[r(1-r)]/N, a bias that rewards extreme "
            "confidences. Named for what it is, the square: the code returns it as MMCE. Pooled over ranks and steps "
            "instead of a micro-batch; no scale that shrinks with the batch, as in the code's weighted form."
        ),
    ),
    LossEntry(
        name="soft_binned_ece",
        kind="penalty",
        title="Soft-binned ECE of own answers, squared, against a memory bank",
        paper="Karandikar et al. 2021, arXiv 2108.00106",
        equation="sum_k S_k/M (conf_k - acc_k)^2 (eq. 11, squared)",
        cost="answers x bank x bins numbers; one small all-gather a step",
        compared_with="the authors' formula, written out in float64",
        largest_deviation="1e-6 (value and gradient: their floor on a bin's mass is 1e-5)",
        differs=(
            "Two products instead of nested scans; the square, since the root's gradient is infinite at 0; no label "
            "binning, whose bins start at 1/classes; pooled over ranks and steps, its bias that of the bank and not of "
            "a micro-batch."
        ),
    ),
)
