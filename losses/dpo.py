"""DPO: preferences learnt as a reward that is the log ratio to a reference (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

from torch import Tensor, nn

from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.log_ratios import log_ratios, reference_known
from calibtrain.losses.pairs import check_label_smoothing, check_positive, find_pairs, preference_loss
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.ops import TokenStats, at_least_float32


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of each pair (eq. 7 of arXiv 2305.18290), or its smoothed form (cDPO).

    Least, on average over preferences that follow Bradley and Terry's model, where pi is proportional to
    pi_ref exp(r / beta), r the reward behind them. Where one answer always wins there is no such r: beta times the margin
    grows for ever, and with `label_smoothing` e ends at log((1 - e) / e) (see `preference_loss`).

    Both (P,) floating: log pi(y|x) - log pi_ref(y|x) of whole completions, summed over tokens. Returns (P,) float32 or
    float64.
    """
    return preference_loss(beta * (at_least_float32(chosen) - at_least_float32(rejected)), label_smoothing)


class DPOLoss(nn.Module):
    """DPO's loss of the pairs; reads `batch.reference_logprob` (N,), the completions' log-probs under the reference.

    A pair counts when it has exactly one chosen and one rejected completion, neither empty, with reference log-probs at
    all tokens. ANSWER sequences are ignored.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: share of preferences taken to be wrong, in [0, 0.5).
    """

    name = "dpo"

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_positive(beta=beta)
        check_label_smoothing(label_smoothing)
        self.beta = beta
        self.label_smoothing = label_smoothing

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`dpo`: the complete pairs. () int64."""
        return {"dpo": find_pairs(batch, reference_known(batch)).complete.sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `dpo`. Raises UserError for a batch without reference log-probs."""
        known = reference_known(batch)
        pairs = find_pairs(batch, known)
        chosen, rejected = pairs.split(log_ratios(stats, batch, known), fill=0.0)
        return {"dpo": pairs.term(dpo_loss(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing))}


CATALOG = (
    LossEntry(
        name="dpo",
        kind="objective",
        title="Direct preference optimisation, with label smoothing (cDPO)",
        paper='Rafailov et al. 2023, arXiv 2305.18290; Mitchell 2023, "A note on DPO with noisy preferences"',
        equation="-log sigmoid(beta (h_w - h_l)), h = log pi(y|x) - log pi_ref(y|x) (eq. 7)",
        cost="none a step: reads TokenStats; one forward pass of the untrained model over the pairs, once",
        compared_with="TRL 1.16.0 DPOTrainer; CPOTrainer for label smoothing",
        largest_deviation="1e-6 (value), 1e-5 (gradient)",
        differs=(
            "One global mean over pairs, where TRL averages micro-batch means; empty completions are left out; log ratios "
            "are taken token by token, and a prompt may be passed once for both answers"
        ),
    ),
)
