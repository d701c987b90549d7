"""Whether a server answers by the weights that it was given: its log-probs of fixed texts, and of draws, against ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibtrain.confidence.answering import Answerer
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.engines import Completion, Draws, VLLMServer
from calibtrain.losses.terms import ANSWER
from calibtrain.models.loss_model import LogprobStep

PROBES = 4
DRAWN_TOKENS = 8
FOLLOWS = 0.1
"""A server moves by at least this share of what the trainer's log-probs move by (root mean squares); a stale one stays."""
NOTICED = {"fp32": 1e-5, "bf16": 1e-2}
"""A move of the trainer's own log-probs, in nats, that is more than rounding."""


@dataclass(frozen=True, slots=True)
class Told:
    """A server's side: log-probs of the probes' own tokens, all but the first of each; and a draw for each of them."""

    scores: list[list[float]]
    drawn: list[Completion]


class WeightProof:
    """texts: the probes as token ids, two at least in each; prompts: what to draw after, one for each.

    tolerance: most that log-probs may differ by, nats: the largest difference in fp32; in bf16, where two ways of rounding
    differ by a nat at tokens that are improbable, the mean. exact: whether the server gets the very numbers that train, so
    that it must move where they do; LoRA that is merged in bf16 rounds them.
    """

    def __init__(
        self,
        answerer: Answerer,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]],
        *,
        dtype: str,
        tolerance: float,
        exact: bool,
    ) -> None:
        self.answerer, self.dtype, self.tolerance, self.exact = answerer, dtype, tolerance, exact
        self.texts, self.prompts = [tuple(one) for one in texts], [tuple(one) for one in prompts]
        self._before: tuple[Tensor, Tensor] | None = None  # theirs and ours, of the weights before
        self.found: dict[str, float] = {}
        """engine_gap, engine_gap_mean: the largest and the mean difference that were found last; policy_moved: by how much
        the trainer's log-probs of the probes moved since the weights before, root mean square."""

    def ask(self, server: VLLMServer, salt: str, stop_ids: Sequence[int]) -> Told:
        """The server's side. Rank 0 asks."""
        draws = Draws(self.prompts, range(len(self.prompts)), 1, stop_ids, DRAWN_TOKENS)
        return Told([server.scores(one, salt) for one in self.texts], [one for (one,) in server.sample(draws, salt)])

    def ours(self, told: Told) -> list[list[float]]:
        """Our log-probs of the same tokens: those of the probes, then those of the draws. Collective under ZeRO-3."""
        drawn = [(*prompt, *one.tokens) for prompt, one in zip(self.prompts, told.drawn, strict=True)]
        # Apart from each other: weights that did not move give the probes the same to the last bit.
        return self._logprobs(self.texts, [1] * len(self.texts)) + self._logprobs(drawn, list(map(len, self.prompts)))

    @torch.no_grad()
    def _logprobs(self, texts: Sequence[tuple[int, ...]], starts: Sequence[int]) -> list[list[float]]:
        encoded = [Encoded(ids, start, ANSWER, 0) for ids, start in zip(texts, starts, strict=True)]
        module = self.answerer.module
        was_training = module.training
        module.eval()
        try:
            batch = collate(encoded, self.answerer.template.pad_id).to(self.answerer.world.device)
            logprobs = module(LogprobStep(batch))[0].float().cpu()
        finally:
            module.train(was_training)
        return [row.tolist() for row in logprobs.split([one.completion_length for one in encoded])]

    def problem(self, told: Told, ours: Sequence[Sequence[float]]) -> str | None:
        """What is amiss, in words; None where the server answers by our weights. Rank 0 compares."""
        count = len(self.texts)
        theirs, own = _flat(told.scores), _flat(ours[:count])
        drawn, own_drawn = _flat([one.logprobs for one in told.drawn]), _flat(ours[count:])
        gaps = torch.cat([theirs - own, drawn - own_drawn]).abs()
        before, self._before = self._before, (theirs, own)
        self.found = {"engine_gap": float(gaps.max()), "engine_gap_mean": float(gaps.mean())}
        if before is not None:
            self.found["policy_moved"] = _rms(own - before[1])
        most, name = ("mean", "engine_gap_mean") if self.dtype == "bf16" else ("largest", "engine_gap")
        if not self.found[name] <= self.tolerance:
            return (
                f"its log-probs differ from the trainer's after the weights were handed over, the {most} difference is "
                f"{self.found[name]:.2g} nats (at most {self.tolerance:g}, rollouts.engine.tolerance): its weights are "
                "stale, or it serves another model, in another dtype, or by logit processors of its own"
            )
        if before is None or not self.exact:
            return None
        theirs_moved, own_moved = _rms(theirs - before[0]), self.found["policy_moved"]
        if own_moved > NOTICED[self.dtype] and theirs_moved < FOLLOWS * own_moved:
            return (
                f"its weights are stale: the trainer's log-probs moved by {own_moved:.2g} nats since they were handed over "
                f"before, and the server's by {theirs_moved:.2g}"
            )
        return None


def _flat(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
