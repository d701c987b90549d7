"""The stream of the model's own graded answers that feeds the calibration term (docs/calibration-term.md)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from calibtrain.calibration.temperature import optimal_temperature
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.likelihood import Answered, logprob_table
from calibtrain.config import AnswerScoreConfig
from calibtrain.data.encode import Encoded, encode_answer
from calibtrain.data.records import Record
from calibtrain.training.answering import Answerer
from calibtrain.training.distributed import World, gather_rows, shard

TEMPERATURES = tuple(2.0 ** (step / 3) for step in range(-6, 7))
"""Where answers are scored before solving for the scale: 1/4 to 4."""


class AnswerStream:
    """Asks the calibration set every `refresh_every` steps and does with the graded answers what the term's config says.

    `moves: scale` solves for the logit scale after a round; `moves: all` hands each micro-batch its share of the answers.
    Which questions are asked and which answers enter a step are pure functions of (seed, step); the last answers and the
    scale are the only state, kept in checkpoints so that a resume continues bit for bit.
    """

    def __init__(
        self, config: AnswerScoreConfig, answerer: Answerer, questions: Sequence[Record], seed: int, max_length: int
    ) -> None:
        self.config = config
        self.answerer = answerer
        self.questions = list(questions)
        self.seed = seed
        self.max_length = max_length
        self.asked: list[int] = []
        self.texts: list[str] = []
        self.correct: list[bool] = []

    def before_step(self, step: int) -> None:
        """Answer anew before step `step` (from 0) when a term in the loss is due. Collective."""
        if self.config.moves == "all" and step % self.config.refresh_every == 0:
            self._ask(step // self.config.refresh_every)

    def is_due(self, step: int) -> bool:
        """Whether the scale is to be solved for after `step` finished steps."""
        return self.config.moves == "scale" and step % self.config.refresh_every == 0

    def round(self, step: int) -> list[Answer] | None:
        """Answer, solve for the logit scale and return the answers at it; None when no scale is asked for. Collective."""
        if self.config.moves != "scale":
            return None
        policy = self.answerer.module.policy
        policy.scale = 1.0
        answered = self._ask(-(-step // self.config.refresh_every) - 1)
        table = self._table(answered)
        temperature = optimal_temperature(table.numpy(), self.correct, TEMPERATURES, score=self.config.score)
        policy.scale = 1.0 / temperature
        return self._rescored(answered)

    def share(self, step: int, micro_batch: int, micro_batches: int, world: World) -> list[Encoded]:
        """Answers of one micro-batch, as token sequences; all ranks' shares make up the step's answers."""
        count = min(self.config.answers_per_step, len(self.asked))
        order = _order(len(self.asked), f"answers {self.seed} {step}")[:count]
        parts = world.size * micro_batches
        index = world.rank * micro_batches + micro_batch
        chosen = order[index * count // parts : (index + 1) * count // parts]
        encoded = [
            encode_answer(
                self.questions[self.asked[i]],
                self.texts[i],
                self.correct[i],
                self.answerer.template,
                self.max_length,
                self.asked[i],
            )
            for i in chosen
        ]
        return [one for one in encoded if one is not None]

    def state_dict(self) -> dict[str, object]:
        """JSON values of the last round, for a checkpoint."""
        scale = self.answerer.module.policy.scale
        return {"asked": self.asked, "texts": self.texts, "correct": self.correct, "scale": scale}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up the last round from a checkpoint."""
        self.asked, self.texts, self.correct = (list(state[name]) for name in ("asked", "texts", "correct"))  # type: ignore[call-overload]
        self.answerer.module.policy.scale = float(state["scale"])  # type: ignore[arg-type]

    def _ask(self, round_number: int) -> Answered:
        count = min(self.config.questions_per_refresh, len(self.questions))
        order = _order(len(self.questions), f"questions {self.seed}")
        start = round_number * count
        self.asked = [order[(start + i) % len(order)] for i in range(count)]
        answered = self.answerer([self.questions[i] for i in self.asked])
        self.texts = [answer.text for answer in answered.answers]
        self.correct = [bool(answer.correct) for answer in answered.answers]
        return answered

    def _table(self, answered: Answered) -> torch.Tensor:
        """Log-prob of every answer at each temperature, each rank scoring its share. (answers, temperatures) float64."""
        world = self.answerer.world
        mine = torch.tensor(shard(range(len(answered.answers)), world), dtype=torch.int64)
        table = logprob_table(self.answerer.module, answered.features.select(mine), TEMPERATURES, world.device)
        return gather_rows(table, world.device)

    def _rescored(self, answered: Answered) -> list[Answer]:
        """The answers with their log-prob at the solved scale, as one number."""
        world = self.answerer.world
        mine = torch.tensor(shard(range(len(answered.answers)), world), dtype=torch.int64)
        table = logprob_table(self.answerer.module, answered.features.select(mine), (1.0,), world.device)
        logprobs = gather_rows(table, world.device)[:, 0].tolist()
        return [
            replace(answer, token_logprobs=(logprob,))
            for answer, logprob in zip(answered.answers, logprobs, strict=True)
        ]


def _order(n: int, key: str) -> list[int]:
    draw = random.Random(key).random
    keys = [draw() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)
