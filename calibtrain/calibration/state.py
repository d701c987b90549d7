"""The mergeable state all calibration metrics are functions of: constant memory, one all-reduce, any sample size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calibtrain.errors import UserError

UNIFORM_CELLS = 4800
"""Equal cells of [0, 1]; a multiple of 60 and 100: 10, 15, 20 or 30 bins and whole percents are unions of cells."""
TAIL_CELLS = 120
"""Extra cells inside the first and inside the last equal cell, where token and sequence probabilities pile up."""
DEEP_CELLS = 960
"""Cells below the tail at 0, where the answers of many tokens lie: from 2^-24 to 2^-1000 each exponent is .4% larger."""
DEEPEST = -1000.0
NUM_CELLS = UNIFORM_CELLS + 2 * TAIL_CELLS + DEEP_CELLS
SHALLOW = NUM_CELLS - DEEP_CELLS
"""Cells of states that earlier versions stored, whose first one held all below 2^-24."""
LOG_LOSS_CLIP = 1e-6
"""The log score is taken of confidences clipped to [1e-6, 1 - 1e-6]; how many were clipped is counted."""


def _grid() -> tuple[Tensor, Tensor]:
    """Edges (NUM_CELLS + 1,) float64 of the cells (lo, hi], and for each cell the equal cell it lies in."""
    # k / UNIFORM_CELLS is correctly rounded, hence the same float as k' / bins for every edge the two share.
    uniform = torch.arange(UNIFORM_CELLS + 1, dtype=torch.float64) / UNIFORM_CELLS
    # Down to 2^-24, half the spacing of float32 just below 1: a float32 softmax is resolved as far as it goes.
    tail = torch.logspace(-24.0, -float(torch.log2(torch.tensor(UNIFORM_CELLS, dtype=torch.float64))), TAIL_CELLS + 1,
                          base=2.0, dtype=torch.float64)[:-1]  # fmt: skip
    # Spread of log-probs grows with their size, and so do these cells: in steps of the exponent's own logarithm.
    ratio = torch.arange(DEEP_CELLS, 0, -1, dtype=torch.float64) / DEEP_CELLS
    deep = torch.exp2(-24.0 * (DEEPEST / -24.0) ** ratio)
    edges = torch.cat([uniform[:1], deep, tail, uniform[1:-1], (1 - tail).flip(0), uniform[-1:]])
    inner = torch.arange(1, UNIFORM_CELLS - 1)
    first, last = torch.zeros(TAIL_CELLS + 1 + DEEP_CELLS), torch.full((TAIL_CELLS + 1,), UNIFORM_CELLS - 1)
    return edges, torch.cat([first.long(), inner, last.long()])


EDGES, UNIFORM_INDEX = _grid()
"""EDGES (NUM_CELLS + 1,) float64; UNIFORM_INDEX (NUM_CELLS,) int64, the equal cell that holds each cell."""


class CalibrationState:
    """Additive sums of (confidence, correct) samples on a fixed fine grid of confidence, on the CPU.

    Cells are (lo, hi]; a confidence of 0 falls in the first, of 1 in the last. All fields add up over samples,
    micro-batches and ranks, so that metrics of the merged state equal those of the concatenated samples:

    - `count`, `correct` (NUM_CELLS,) int64: samples and correct samples of each cell
    - `confidence` (NUM_CELLS,) float64: sum of confidences of each cell
    - `moments` (3,) float64: sums of confidence**2, (confidence - correct)**2 and clipped log loss (nats)
    - `clipped` (1,) int64: samples whose confidence the log loss clipped
    """

    FIELDS = ("count", "correct", "confidence", "moments", "clipped")

    def __init__(self) -> None:
        self.count = torch.zeros(NUM_CELLS, dtype=torch.int64)
        self.correct = torch.zeros(NUM_CELLS, dtype=torch.int64)
        self.confidence = torch.zeros(NUM_CELLS, dtype=torch.float64)
        self.moments = torch.zeros(3, dtype=torch.float64)
        self.clipped = torch.zeros(1, dtype=torch.int64)

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(self.count.sum())

    @torch.no_grad()
    def update(self, confidence: Tensor, correct: Tensor, weight: Tensor | None = None) -> CalibrationState:
        """Add samples in place and return self.

        confidence (M,) probabilities in [0, 1]; correct (M,) bool or 0/1; weight (M,) bool or non-negative integers,
        default 1: a sample of weight 0 (padding, or repeated to fill a batch) is not looked at, one of weight w counts
        w times.
        Raises UserError for NaN or out-of-range confidences and for grades other than 0 and 1.
        """
        q = torch.as_tensor(confidence).detach().to("cpu", torch.float64).reshape(-1)
        y = torch.as_tensor(correct).detach().to("cpu", torch.float64).reshape(-1)
        w = torch.ones(q.shape, dtype=torch.int64) if weight is None else _integer_weights(weight)
        if not q.numel() == y.numel() == w.numel():
            raise UserError(
                f"calibration state: {q.numel()} confidences, {y.numel()} grades and {w.numel()} weights; "
                "they must be equally many"
            )
        q, y, w = q[w > 0], y[w > 0], w[w > 0]
        _check(q, y)
        cell = torch.bucketize(q, EDGES[1:-1])  # right=False: an edge belongs to the cell below it, (lo, hi]
        weights = w.to(torch.float64)
        self.count.index_add_(0, cell, w)
        self.correct.index_add_(0, cell, w * y.long())
        self.confidence.index_add_(0, cell, weights * q)
        inside = q.clamp(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP)
        log_loss = -torch.where(y > 0, inside.log(), torch.log1p(-inside))
        self.moments += torch.stack([(weights * v).sum() for v in (q * q, (q - y) ** 2, log_loss)])
        self.clipped += (w * (inside != q)).sum()
        return self

    def merge(self, other: CalibrationState) -> CalibrationState:
        """New state of both states' samples."""
        return CalibrationState.from_tensors({name: getattr(self, name) + getattr(other, name) for name in self.FIELDS})

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> CalibrationState:
        """New state of the samples of all ranks of `group`, by one collective; this rank's own state stays as it is.

        Every rank must call it, also one without samples. A copy where torch.distributed is not initialised.
        """
        tensors = self.tensors()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return CalibrationState.from_tensors(tensors)
        # One float64 vector for one collective: integers stay exact below 2**53 samples.
        flat = torch.cat([tensor.to(torch.float64) for tensor in tensors.values()])
        on_gpu = torch.distributed.get_backend(group) == "nccl"
        flat = flat.to(torch.cuda.current_device() if on_gpu else "cpu")
        torch.distributed.all_reduce(flat, group=group)
        parts = flat.cpu().split([tensor.numel() for tensor in tensors.values()])
        return CalibrationState.from_tensors(dict(zip(tensors, parts, strict=True)))

    def tensors(self) -> dict[str, Tensor]:
        """The additive tensors by name, always of the same shapes and order; copies, for a caller to reduce."""
        return {name: getattr(self, name).clone() for name in self.FIELDS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CalibrationState:
        """State of sums named as in `tensors()`, on any device and of any dtype that holds them exactly.

        Those of earlier versions, of SHALLOW cells, are placed: what lay in their first cell ties in the one below 2^-24.
        """
        state = cls()
        if set(tensors) != set(cls.FIELDS):
            raise UserError(f"calibration state: expected the tensors {list(cls.FIELDS)}, got {list(tensors)}")
        for name in cls.FIELDS:
            own, given = getattr(state, name), tensors[name]
            if len(own) == NUM_CELLS and tuple(given.shape) == (SHALLOW,):
                given = torch.cat([given.new_zeros(DEEP_CELLS), given])
            if tuple(given.shape) != tuple(own.shape):
                raise UserError(
                    f"calibration state: {name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}; "
                    "it was made on another grid"
                )
            own.copy_(given)
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors, for a checkpoint."""
        return self.tensors()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over the sums of a `state_dict()`; raises UserError for one of another grid."""
        loaded = CalibrationState.from_tensors(state_dict)
        for name in self.FIELDS:
            setattr(self, name, getattr(loaded, name))


def state_of(confidence: Tensor, correct: Tensor, weight: Tensor | None = None) -> CalibrationState:
    """State of these samples; arguments as in `CalibrationState.update`."""
    return CalibrationState().update(confidence, correct, weight)


def _integer_weights(weight: Tensor) -> Tensor:
    """Weights (M,) as int64; UserError when negative or fractional."""
    given = torch.as_tensor(weight).detach().to("cpu").reshape(-1)
    w = torch.nan_to_num(given, nan=-1.0).long() if given.is_floating_point() else given.long()
    if bool((w < 0).any()) or bool((w != given).any()):
        raise UserError("calibration state: weights must be whole numbers, 0 or more; 0 leaves a sample out")
    return w


def _check(confidence: Tensor, correct: Tensor) -> None:
    """UserError for values that are no probability or no grade, naming the first."""
    bad = ~((confidence >= 0) & (confidence <= 1))  # also true for NaN
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise UserError(
            f"calibration state: confidence {float(confidence[index])} (sample {index}, {int(bad.sum())} such) is "
            "not a probability in [0, 1]; pass probabilities, not logits or log-probs, and weight 0 for padding"
        )
    bad = (correct != 0) & (correct != 1)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise UserError(
            f"calibration state: grade {float(correct[index])} (sample {index}) is neither 0 nor 1; leave "
            "ungraded answers out with weight 0"
        )
