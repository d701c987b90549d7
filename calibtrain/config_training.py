"""The optimiser, the schedule and the engine of a run, and which of its weights are exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from calibtrain.config_base import BelowOne, Count, Fraction, Positive, Section, Weight

if TYPE_CHECKING:
    from calibtrain.config import RunConfig


class BestConfig(Section):
    """Export the weights that an evaluation in training found best; they are kept as a checkpoint until then.

    What chooses is not what certifies: evaluations in training ask the calibration split, or measure the validation split.
    """

    metric: str = "eval/loss"
    """What an evaluation logs: `eval/loss`, `eval/loss/TERM`, or of the answers `calib/calibration/likelihood/brier` and its
    like."""
    goal: Literal["lowest", "highest"] = "lowest"
    """Which value of it is best."""
    patience: Count | None = None
    """Evaluations behind the best one after which training ends; null goes on to the last step."""


class TrainingConfig(Section):
    """The optimiser, the schedule and the DeepSpeed engine."""

    micro_batch_size: Count = 4
    """Records (pairs, where preferences are compared) in one forward pass of one rank, or of those that share rows."""
    global_batch_size: Count = 8
    """Records in one optimiser step over all ranks; gradient accumulation is derived."""
    sequence_parallel_size: Count = 1
    """Ranks that share each row, 1/N of its positions on each (Ulysses, arXiv 2309.14509): for rows whose activations are
    too many for one GPU; must divide the attention heads (docs/scale.md)."""
    epochs: Positive = 1.0
    """Passes over the training split; a fraction is allowed."""
    max_steps: Count | None = None
    """Optimiser steps, in the place of `epochs`, fewer or more."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` holds the moments of matrices in eight bits, 2 bytes a parameter in the place of 8 (arXiv 2110.02861, by
    bitsandbytes); those of embeddings and small tensors stay in 32 bits (docs/scale.md)."""
    learning_rate: Positive = 2e-5
    """Peak of the schedule."""
    adam_betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW's denominator is never smaller."""
    weight_decay: Weight = 0.0
    """Decoupled; biases and norms are left out."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warmup; cosine and linear end at 0."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    max_grad_norm: Weight = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the ranks: 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer states in CPU memory."""
    offload_parameters: bool = False
    """Keep the parameters in CPU memory (ZeRO-3)."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON of your own; its batch sizes, precision and stage must agree with this file's, or say "auto"."""
    average_last: Fraction = 0.0
    """Export the mean of the weights over this last share of the steps (arXiv 1803.05407); 0 exports the last ones."""
    log_every: Count = 5
    """Optimiser steps between two lines of metrics."""
    evaluate_every: Count | None = None
    """Optimiser steps between two evaluations; null evaluates only after training."""
    evaluate_loss_every: Count | None = None
    """Optimiser steps between two measurements of the loss on data.splits.validation; null measures at the end alone."""
    evaluate_questions: Count = 128
    """Questions of the calibration split answered at each evaluation during training."""
    best: BestConfig | None = None
    """Export the weights of the evaluation that was best; null exports the last ones."""
    checkpoint_every: Count | None = None
    """Optimiser steps between two checkpoints; null writes none."""
    checkpoint_in_background: bool = False
    """Write checkpoints while training goes on: what they hold is copied first, 12 bytes a trained parameter of host memory
    over all ranks. The end of a run, and of one that is asked to stop, wait until the last one is whole."""
    keep_checkpoints: Count = 2
    """Older checkpoints are deleted once a newer one is complete."""
    resume: Path | Literal["auto"] | None = None
    """A checkpoint directory, or `auto`: the newest complete one of output_dir, if any; null refuses one with a run."""
    new_trajectory: bool = False
    """Go on from a checkpoint although learning rate, schedule or number of steps are others than it was made with; what
    changed, and at which step, is kept in the checkpoints that follow."""
    profile_steps: Count | None = None
    """Trace so many optimiser steps with torch's profiler, from the third of a launch on, into profile/rank<k>.json.gz of
    output_dir (for chrome://tracing or Perfetto); null traces none."""
    max_skipped_steps: Count = 10
    """Consecutive steps with non-finite gradients before training gives up."""

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> TrainingConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage: 1, 2 or 3")
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} is more than global_batch_size: {self.global_batch_size}"
            )
        return self


MEASURED = {
    "eval/": ("evaluate_loss_every", "loss on held-out records"),
    "calib/calibration/": ("evaluate_every", "answers to questions"),
}
"""How a metric's name begins, with what has it measured."""
LOSS = "eval/loss"
HIGHER = ("acc", "auroc", "brier_skill", "res", "cov@")
LOWER = (
    *("ece10", "ece15", "ece20", "ece_debiased", "ece_over", "ece_rms", "ece_rms_debiased", "ece_squared_debiased"),
    *("ece_max", "smece", "brier", "rel", "nll", "aurc", "e_aurc", "augrc", "risk@"),
)
"""Metrics of answers of which more, or less, is better: by the other goal the worst weights would be exported."""


def _better(metric: str) -> str | None:
    """Which value of a metric is best; None where neither is."""
    name = metric.rpartition("/")[2]
    if metric == LOSS or metric.startswith(f"{LOSS}/"):
        return "lowest"
    kinds = {"highest": HIGHER, "lowest": LOWER}
    known = ((goal, one) for goal, names in kinds.items() for one in names)
    return next((goal for goal, one in known if name == one or (one.endswith("@") and name.startswith(one))), None)


def unfit_best(config: RunConfig) -> str | None:
    """What keeps `training.best` from being found."""
    training = config.training
    if training.best is None:
        return None
    metric = training.best.metric
    found = [one for start, one in MEASURED.items() if metric.startswith(start)]
    if not found:
        starts = " or ".join(f"{start}..." for start in MEASURED)
        return f"training.best.metric: {metric} is no metric of an evaluation in training: take one of {starts}"
    goal, better = training.best.goal, _better(metric)
    if better not in (None, goal):
        return f"training.best.goal: of {metric} the {better} is best, and {goal} is asked for: set goal: {better}"
    key, told = found[0]
    if getattr(training, key) is None:
        return f"training.best.metric: {metric} is measured by {told}: set training.{key}"
    if training.average_last:
        return "training.best and training.average_last each say which weights are exported: set one of them"
    return None
