"""The training processes themselves draw the answers, by the weights that they hold."""

from __future__ import annotations

from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.generation import generate, keep_none
from calibtrain.engines import Completion, Draws


class OwnSampling:
    """A SamplingEngine whose weights are always those of the step; evaluation.batch_size samples at once on one rank."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.metrics: dict[str, float] = {}

    def push(self, version: int) -> None:
        """Nothing: they are in place."""

    def sample(self, draws: Draws, version: int) -> list[list[Completion]]:
        """The completions of each prompt. Collective."""
        answerer = self.answerer
        found = generate(
            answerer.module,
            draws.prompts,
            stop_ids=draws.stop_ids,
            goes_on=draws.goes_on,
            pad_id=answerer.template.pad_id,
            max_new_tokens=draws.max_new_tokens,
            batch_size=max(1, answerer.settings.batch_size // draws.samples),
            samples=draws.samples,
            streams=draws.seeds,
            device=answerer.world.device,
            all_done=answerer.all_done if answerer.lockstep else bool,
            share_prefix=not answerer.lockstep,
            keep=keep_none,
        )
        return [
            [Completion(one.tokens, one.logprobs, one.finished, version=version) for one in group] for group in found
        ]

    def start(self, draws: Draws) -> None:
        """Nothing: what would draw is what trains."""

    def started(self) -> None:
        """None: nothing was."""

    def restore(self, draws: Draws, version: int, groups: list[list[Completion]]) -> None:
        """Nothing: it is drawn when its turn comes."""

    def close(self) -> None:
        """Nothing was started."""
