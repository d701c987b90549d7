"""The stream of the model's own graded answers that feeds the calibration term."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from calibtrain.config import AnswerScoreConfig
from calibtrain.data.encode import Encoded, encode_answer
from calibtrain.data.records import Record
from calibtrain.models.loss_model import AnswerFeatures
from calibtrain.training.answering import Answerer, features_to
from calibtrain.training.distributed import World

NO_ANSWERS = AnswerFeatures(
    torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
)


class AnswerStream:
    """Asks the calibration set every `refresh_every` steps and hands each micro-batch its share of the answers.

    Which questions are asked and which answers enter a step are pure functions of (seed, step); the answers themselves
    are the only state, kept in checkpoints so that a resume continues bit for bit.
    """

    def __init__(
        self, config: AnswerScoreConfig, answerer: Answerer, questions: Sequence[Record], seed: int, max_length: int
    ) -> None:
        self.config = config
        self.answerer = answerer
        self.questions = list(questions)
        self.seed = seed
        self.max_length = max_length
        self.features = NO_ANSWERS
        self.texts: list[str] = []
        self.asked: list[int] = []

    def refresh_if_due(self, step: int) -> bool:
        """Answer anew before step `step` (from 0) when it is time. Collective."""
        if step % self.config.refresh_every:
            return False
        count = min(self.config.questions_per_refresh, len(self.questions))
        order = _order(len(self.questions), f"questions {self.seed}")
        start = (step // self.config.refresh_every) * count
        self.asked = [order[(start + i) % len(order)] for i in range(count)]
        answered = self.answerer([self.questions[i] for i in self.asked])
        self.features = answered.features
        self.texts = [answer.text for answer in answered.answers]
        return True

    def share(self, step: int, micro_batch: int, micro_batches: int, world: World) -> list[int]:
        """Positions in the last round's answers for one micro-batch; all ranks' shares make up the step's answers."""
        count = min(self.config.answers_per_step, len(self.asked))
        order = _order(len(self.asked), f"answers {self.seed} {step}")[:count]
        parts = world.size * micro_batches
        index = world.rank * micro_batches + micro_batch
        return order[index * count // parts : (index + 1) * count // parts]

    def features_at(self, positions: Sequence[int], device: torch.device) -> AnswerFeatures:
        """Hidden states of some answers, for a term that moves only the logit scale."""
        return features_to(self.features.select(torch.tensor(positions, dtype=torch.int64)), device)

    def sequences_at(self, positions: Sequence[int]) -> list[Encoded]:
        """Some answers as token sequences, for a term that moves all weights."""
        encoded = [
            encode_answer(
                self.questions[self.asked[i]],
                self.texts[i],
                bool(self.features.correct[i]),
                self.answerer.template,
                self.max_length,
                self.asked[i],
            )
            for i in positions
        ]
        return [one for one in encoded if one is not None]

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The last round, for a checkpoint."""
        return {
            "hidden": self.features.hidden,
            "targets": self.features.targets,
            "sequence_ids": self.features.sequence_ids,
            "correct": self.features.correct,
            "asked": torch.tensor(self.asked, dtype=torch.int64),
        }

    def load(self, tensors: dict[str, torch.Tensor], texts: list[str]) -> None:
        """Take up the last round from a checkpoint."""
        self.features = AnswerFeatures(*(tensors[name] for name in ("hidden", "targets", "sequence_ids", "correct")))
        self.asked = tensors["asked"].tolist()
        self.texts = list(texts)


def _order(n: int, key: str) -> list[int]:
    draw = random.Random(key).random
    keys = [draw() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)
