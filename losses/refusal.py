"""Refusal tuning: learn to say what is known and to refuse the rest, in a mix that is set (Zhang et al. 2024, 2311.09677).

R-Tuning is cross-entropy on data built from the model's own graded answers; calibtrain.data.refusal builds it, with labels
that are fresh whenever it is called.
"""

from __future__ import annotations

from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.sft import nll_token_sum
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import NLLScope, learned_tokens
from calibtrain.ops import TokenStats


class RefusalTuningLoss(nn.Module):
    """Objective: cross-entropy of the CHOSEN sequences, known and unknown ones each over their own tokens.

    (1 - share) * NLL of the sequences with `correct` 1 (or without a grade) + share * NLL of those with `correct` 0. The
    weight of refusals is `share` whatever their number, which changes as the model learns: that is what keeps it from
    refusing too much or too little.

    Args:
        refusal_share: weight of the refusals, in [0, 1].
        nll_scope: "completion", or "full" for prompt and completion.
    """

    name = "refusal"

    def __init__(self, *, refusal_share: float = 0.5, nll_scope: NLLScope = "completion") -> None:
        super().__init__()
        if not 0 <= refusal_share <= 1:
            raise UserError(f"refusal_share must be in [0, 1], got {refusal_share}")
        self.refusal_share = refusal_share
        self.nll_scope = nll_scope

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`nll_known` and `nll_refusal`: the tokens of each. () int64."""
        return {name: mask.sum() for name, (mask, _) in self._parts(batch).items()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """Two terms, `nll_known` and `nll_refusal`."""
        return {
            name: LossTerm(nll_token_sum(stats.logprob, mask), mask.sum(), weight)
            for name, (mask, weight) in self._parts(batch).items()
        }

    def _parts(self, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        learned = learned_tokens(batch, self.nll_scope)
        refused = (batch.correct == 0.0)[batch.sequence_ids]
        return {
            "nll_known": (learned & ~refused, 1.0 - self.refusal_share),
            "nll_refusal": (learned & refused, self.refusal_share),
        }


CATALOG = (
    LossEntry(
        name="refusal",
        kind="objective",
        title="Refusal tuning on the model's own graded answers (R-Tuning)",
        paper="Zhang et al. 2024, arXiv 2311.09677",
        equation="(1 - s) NLL(known) + s NLL(refusals)",
        cost="none: reads TokenStats; a round of answering whenever the labels are made anew",
        compared_with="its formula",
        largest_deviation="1e-12 (value, float64)",
        differs=(
            "Labels come from whole graded answers, not from the gold text being a substring of the output ('Niger' in "
            "'Nigeria'), and are made anew as the model learns. The question is not learnt, only what is said. Known "
            "and unknown are weighted apart, so that their mix does not drift. The statement of certainty follows the "
            "answer that was graded; the public code puts it after the gold answer."
        ),
    ),
)
