"""LossModel: the one module that DeepSpeed wraps. Everything that touches a parameter happens inside its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.losses.terms import Batch, LossTerm, Objective, sequence_token_counts
from calibtrain.models.confidence_head import ConfidenceHead
from calibtrain.models.policy import Policy
from calibtrain.models.sequence_parallel import SequenceGroup
from calibtrain.ops import TokenStats


@dataclass(frozen=True, slots=True)
class AnswerFeatures:
    """The model's own graded answers as final hidden states: all it takes to score them at any logit scale."""

    hidden: Tensor  # (N, H) in the model's dtype, before the calibrated scale
    targets: Tensor  # (N,) int64: the answers' tokens with their end token
    sequence_ids: Tensor  # (N,) int64 in [0, S), ascending
    correct: Tensor  # (S,) float32 grade, 0 or 1; NaN without one

    def select(self, sequences: Tensor) -> AnswerFeatures:
        """The answers at `sequences` (K,) int64, in that order."""
        position = torch.full((self.correct.shape[0],), -1, dtype=torch.int64)
        position[sequences] = torch.arange(sequences.shape[0])
        owner = position[self.sequence_ids]
        order = torch.argsort(owner, stable=True)
        order = order[owner[order] >= 0]
        return AnswerFeatures(self.hidden[order], self.targets[order], owner[order], self.correct[sequences])


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One micro-batch; `divisors` holds () float tensors, the global count of each term / (ranks x accumulation)."""

    batch: Batch
    divisors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One decoding step: `inputs` go to the backbone; the last position's hidden state and logits come back.

    With `layers` also that position's states there, numbered as in a HiddenStep.
    """

    inputs: Mapping[str, Any]
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StatesStep:
    """Final hidden states of the last `count` positions of each row: `inputs` go to the backbone."""

    inputs: Mapping[str, Any]
    count: int = 1


@dataclass(frozen=True, slots=True)
class HiddenStep:
    """Hidden states of whole rows: `inputs` go to the backbone; layer 0 is the embeddings, layer k follows block k."""

    inputs: Mapping[str, Any]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreStep:
    """Log-probs of known answers at `temperatures` (K,), from their hidden states."""

    hidden: Tensor
    targets: Tensor
    temperatures: Tensor


@dataclass(frozen=True, slots=True)
class SpreadStep:
    """How spread the next-token distributions are, from their hidden states (N, H)."""

    hidden: Tensor


@dataclass(frozen=True, slots=True)
class LogprobStep:
    """Log-probs of a batch's targets (and values, with a scalar head), without a loss.

    `base`: with LoRA switched off. `after`: behind the values also those of the states after each sequence's last token,
    (N + S,); rows must hold whole sequences.
    """

    batch: Batch
    base: bool = False
    after: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """Anything else that reads weights: `function` of the module itself, as all ranks must call it."""

    function: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """What one micro-batch gives beside its loss."""

    terms: Mapping[str, LossTerm]  # detached
    batch: Batch
    stats: TokenStats  # detached
    measures: Mapping[str, LossTerm] = field(default_factory=dict)  # of the terms, to be logged and not learnt


class LossModel(nn.Module):
    """Policy, objective and penalties in one forward pass. Penalties read the batch's ANSWER sequences.

    A confidence head is put into it afterwards: any LossModel may have one, also one with a value head.
    """

    def __init__(
        self,
        policy: Policy,
        objective: nn.Module | None = None,
        penalties: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.policy = policy
        self.objective = objective
        self.penalties = nn.ModuleList(penalties)
        self.confidence_head: ConfidenceHead | None = None
        self.release: Callable[[], None] | None = None  # of the engine that shards it
        self.shared_by: SequenceGroup | None = None  # the ranks that share each row of a TrainStep

    def settle(self) -> None:
        """Give back the weights that ZeRO-3 fetched ahead for a pass that did not come.

        Call it before weights are gathered or loaded: DeepSpeed can part with none that are on their way. Collective.
        """
        if self.release is not None:
            self.release()

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts of every loss term in one micro-batch, from the data alone."""
        counts: dict[str, Tensor] = {}
        for term in self._terms():
            counts.update(term.counts(batch))
        if self.confidence_head is not None:
            counts.update(self.confidence_head.counts(batch))
        return counts

    def forward(
        self, step: TrainStep | DecodeStep | StatesStep | HiddenStep | ScoreStep | SpreadStep | LogprobStep | Call
    ) -> Any:
        """Run one step; a single entry for all kinds, because ZeRO-3 gathers parameters only inside it.

        A TrainStep gives (loss (), StepStatistics), a DecodeStep (hidden (B, H), logits (B, V), cache) and, where it names
        layers, their states (B, layers, H), a StatesStep (hidden (B, count, H), cache), a ScoreStep log-probs (N, K), a
        LogprobStep log-probs (N,) and values (N,) or None, a HiddenStep a tuple of (B, T, H), one for each layer, a
        SpreadStep the entropy (N,) in nats and the two largest log-probs (N, 2), float32, a Call what its function returns.
        """
        if self.shared_by is not None:
            self.shared_by.active = False  # only a TrainStep's rows are in parts
        if isinstance(step, TrainStep):
            return self._train(step)
        if isinstance(step, LogprobStep):
            return self._logprobs(step)
        if isinstance(step, Call):
            return step.function(self)
        if isinstance(step, HiddenStep):
            states = self.policy.backbone(**step.inputs, use_cache=False, output_hidden_states=True).hidden_states
            return tuple(states[layer] for layer in step.layers)
        if isinstance(step, DecodeStep):
            more = {"output_hidden_states": True} if step.layers else {}
            output = self.policy.backbone(**step.inputs, **more)
            hidden = output.last_hidden_state[:, -1]
            found = hidden, self.policy.logits(self.policy.scaled(hidden)), output.past_key_values
            if not step.layers:
                return found
            return *found, torch.stack([output.hidden_states[layer][:, -1] for layer in step.layers], dim=1)
        if isinstance(step, StatesStep):
            output = self.policy.backbone(**step.inputs)
            return output.last_hidden_state[:, -step.count :], output.past_key_values
        if isinstance(step, SpreadStep):
            logprobs = self.policy.logits(self.policy.scaled(step.hidden)).log_softmax(-1)
            return torch.special.entr(logprobs.exp()).sum(-1), logprobs.topk(2).values
        return self.policy.answer_logprobs(step.hidden, step.targets, step.temperatures)

    def after_step(self) -> None:
        """Tell the terms that keep something between steps that one has ended. Collective."""
        repeats = self.shared_by is not None and self.shared_by.rank > 0  # what the first of its group has seen
        for term in self._terms():
            if repeats and hasattr(term, "forget_step"):
                term.forget_step()
            if hasattr(term, "after_step"):
                term.after_step()

    def _train(self, step: TrainStep) -> tuple[Tensor, StepStatistics]:
        head, shared = self.confidence_head, self.shared_by
        layers = () if head is None else head.layers
        if shared is None:
            hidden, states = self.policy.states_at_targets(step.batch, layers)
            batch, targets = self.scored(hidden, step.batch), step.batch.targets
        else:  # the loss reads the whole batch, of which this rank passes its part
            part, given = shared.part(step.batch, self.policy.model)
            hidden, states = self.policy.states_at_targets(part, layers, given)
            batch, targets = step.batch, part.targets
        read = self.policy.token_stats(hidden, targets)
        stats = read if shared is None else shared.joined_stats(read)
        terms: dict[str, LossTerm] = {}
        for term in self._terms():
            more: tuple[Tensor, ...] = ()
            if (token_set := getattr(term, "token_set", None)) is not None:
                found = self.policy.token_set_logprobs(hidden, targets, read, token_set)
                more = (found if shared is None else shared.joined(found),)
            terms.update(term(stats, batch, *more))
        if head is not None:
            terms.update(head.terms(head(stats, states, batch), batch))
        measures: dict[str, LossTerm] = {}
        for term in self._terms():
            if getattr(term, "measured", ()):
                measures.update(term.measures(stats, batch))  # type: ignore[attr-defined]
        loss, output = self._normalized(step, terms, stats, stats.logprob)
        return loss, replace(output, measures=measures)

    def scored(self, hidden: Tensor, batch: Batch) -> Batch:
        """The batch with the output of a scalar head at `target_positions`, where a model has one; `hidden` (N, H)."""
        return batch

    def _normalized(
        self, step: TrainStep, terms: Mapping[str, LossTerm], stats: TokenStats, anchor: Tensor
    ) -> tuple[Tensor, StepStatistics]:
        # The empty product keeps a micro-batch without any item in the graph: every rank must run backward.
        parts = [term.weight * term.total / step.divisors[name] for name, term in terms.items()]
        loss = torch.stack([anchor.sum() * 0.0, *parts]).sum()
        # A plain tuple, because hooks of ZeRO-3 look for the loss in nothing else.
        return loss, StepStatistics(
            terms={name: LossTerm(term.total.detach(), term.count, term.weight) for name, term in terms.items()},
            batch=step.batch,
            stats=TokenStats(*(value.detach() for value in stats)),
        )

    @torch.no_grad()
    def _logprobs(self, step: LogprobStep) -> tuple[Tensor, Tensor | None]:
        batch, count = step.batch, step.batch.targets.shape[0]
        if step.after:
            batch = replace(batch, target_positions=torch.cat([batch.target_positions, last_positions(batch)]))
        with self.policy.model.disable_adapter() if step.base else nullcontext():
            hidden = self.policy.hidden_at_targets(batch)
            logprob = self.policy.token_stats(hidden[:count], batch.targets).logprob
        return logprob, None if step.base else self.scored(hidden, batch).scores

    def _terms(self) -> list[Objective]:
        return [*([] if self.objective is None else [self.objective]), *self.penalties]  # type: ignore[list-item]


def last_positions(batch: Batch) -> Tensor:
    """Flat position of the last token of each sequence, (S,) int64: one behind the state that predicts it.

    Rows must hold whole sequences: with a shared prompt the last token is not in the batch. A sequence without targets
    gets position 0.
    """
    count = batch.roles.shape[0]
    tokens = sequence_token_counts(torch.ones_like(batch.is_completion), batch.sequence_ids, count)
    last = (tokens.cumsum(0) - 1).clamp(min=0)
    if not batch.targets.numel():
        return torch.zeros_like(tokens)
    return torch.where(tokens > 0, batch.target_positions[last] + 1, 0)
