"""A loss that finds nothing to learn from is 0.0, which looks like one that is learnt perfectly: say which it is.

What can never learn raises. Where a micro-batch or a step may be empty by chance, counts are watched and a message is
logged, once. A GPU is not waited for: its counts are read when they have arrived.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from calibtrain.errors import UserError

if TYPE_CHECKING:
    from calibtrain.losses.terms import Batch, Objective

logger = logging.getLogger(__name__)

PATIENCE = 20
"""Steps that a term may find nothing in from the first on, before that is said."""

_CHOSEN = "labels that are not -100 (completion tokens of CHOSEN sequences)"
_GRADED = "ANSWER sequences with tokens and a grade: dataclasses.replace(batch, roles=..., correct=...)"
_QUERY = "graded QUERY sequences whose first completion token is of the token_set"
_SAMPLED = "completions of ANSWER sequences: dataclasses.replace(batch, roles=..., advantages=...)"
_PAIRS = "pairs of a chosen and a rejected completion: batch_from_labels(..., pairs=True)"
_COMPARED = "with reference log-probs at all their tokens: dataclasses.replace(batch, reference_logprob=...)"
READS: Mapping[str, str] = {
    **dict.fromkeys(("nll", "focal", "label_smoothing", "idk", "token_brier", "confidence_penalty"), _CHOSEN),
    **dict.fromkeys(("answer_score", "confidence_head", "mmce", "soft_binned_ece"), _GRADED),
    **dict.fromkeys(("tokenized_brier", "correctness_query"), _QUERY),
    **dict.fromkeys(("policy", "kl", "value"), _SAMPLED),
    **dict.fromkeys(("odds_ratio", "preference", "centering", "simpo"), _PAIRS),
    **dict.fromkeys(("dpo", "ipo"), f"{_PAIRS}, both {_COMPARED}"),
    "kto": f"completions of CHOSEN and REJECTED sequences {_COMPARED}",
    "calibration_aware": "ANSWER sequences with tokens: dataclasses.replace(batch, roles=...)",
    "divergence_anchor": "targets with a reference log-prob: dataclasses.replace(batch, reference_logprob=...)",
    "nll_known": "CHOSEN sequences that are right or not graded",
    "nll_refusal": "CHOSEN sequences that are graded as wrong: dataclasses.replace(batch, correct=...)",
    "advantages": "completions of one group that earn different rewards",
    "smoothed": "targets that are of the token_set",
}
"""What a term is made of, for messages."""


def reads(names: Any) -> str:
    """What the terms `names` look for, in words."""
    return "; ".join(f"{name} reads {READS.get(name, 'what its counts(batch) says')}" for name in sorted(names))


class Watch:
    """Counts of one loss, step by step: on a CPU a look at each, on a GPU one small copy that is not waited for."""

    def __init__(self) -> None:
        self._missed: dict[str, int] = {}  # of terms not found yet
        self._done: set[str] = set()  # found, or complained about
        self._empty_told = False
        self._coming: tuple[list[str], Tensor, Any] | None = None

    def see(self, counts: Mapping[str, Tensor], where: str | None = None) -> None:
        """Look at the counts () of one step. A GPU's are looked at a step later.

        `where` names what must not be empty even once; without it a step may be, and only the first ones all together not.
        """
        if torch.compiler.is_compiling() or ((where is None or self._empty_told) and counts.keys() <= self._done):
            return
        if self._coming is not None:
            names, values, event = self._coming
            if not event.query():
                return
            self._coming = None
            self._take(names, values, where)
        names = sorted(counts)
        values = torch.stack([counts[name].detach().double() for name in names])
        host, event = _on_its_way(values)
        if event is None:
            self._take(names, host, where)
        else:
            self._coming = names, host, event

    def leave(self, name: str) -> None:
        """Say nothing of this count: it is 0 on purpose."""
        self._done.add(name)

    def _take(self, names: list[str], values: Tensor, where: str | None) -> None:
        found = dict(zip(names, values.tolist(), strict=True))
        if where is not None and not self._empty_told and not any(found.values()):
            self._empty_told = True
            self._done |= found.keys()
            _tell(f"{where} found nothing to learn from, and its loss is 0: {reads(names)}")
        for name, count in found.items():
            if name in self._done:
                continue
            self._missed[name] = self._missed.get(name, 0) + 1
            if count:
                self._done.add(name)
            elif self._missed[name] == PATIENCE:
                self._done.add(name)
                _tell(f"{name} has found nothing in {PATIENCE} steps, and counts as 0: {reads([name])}")


def _on_its_way(values: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and the event after which it is there; None where it is already."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


_watches: WeakKeyDictionary[Any, Watch] = WeakKeyDictionary()
_named: dict[tuple[str, ...], Watch] = {}
_found: WeakSet[Any] = WeakSet()


def watch_of(loss: Any) -> Watch:
    """The watch of a loss, or of the terms with these names."""
    if isinstance(loss, tuple):
        return _named.setdefault(loss, Watch())
    return _watches.setdefault(loss, Watch())


def check_learns(loss: Objective, batch: Batch) -> None:
    """Raise UserError where a batch of labels alone holds nothing that `loss` reads; log a term that finds nothing.

    Labels tell every batch the same roles and grades, so that it is looked at until one holds something, and no longer.
    """
    if not batch.targets.numel():
        raise UserError(
            "labels: there is nothing to learn: every label is -100, or stands at the first token of its sequence. Look at "
            "the collator and at what truncation leaves of the completions; where single micro-batches may be empty, divide "
            "by global_counts"
        )
    if loss in _found:
        return
    counts = {name: int(count) for name, count in loss.counts(batch).items()}
    missing = [name for name, count in counts.items() if not count]
    if len(missing) == len(counts) and all(name in READS for name in missing):
        raise UserError(f"{loss.name}: a batch of labels alone has nothing that it could learn from: {reads(missing)}")
    if len(missing) < len(counts):
        _found.add(loss)
    if missing and loss not in _told:
        _told.add(loss)
        _tell(f"{loss.name}: a batch of labels alone has nothing for {', '.join(missing)}: {reads(missing)}")


_told: WeakSet[Any] = WeakSet()


def _tell(message: str) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        logger.warning("%s", message)
