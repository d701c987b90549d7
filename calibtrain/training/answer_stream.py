"""The stream of the model's own graded answers that feeds the calibration terms (docs/calibration-term.md)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from calibtrain.calibration.temperature import optimal_temperature
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answered import Answered, ReplyTokens, answer_table
from calibtrain.confidence.answering import Answerer
from calibtrain.config import AnswerScoreConfig, OwnAnswersConfig
from calibtrain.data.encode import Encoded, encode_answer, encode_reply
from calibtrain.data.loader import permutation
from calibtrain.data.queries import confidence_queries, correctness_queries
from calibtrain.distributed import World, gather_lists, gather_rows
from calibtrain.errors import UserError
from calibtrain.records import Record

logger = logging.getLogger(__name__)

TEMPERATURES = tuple(2.0 ** (step / 3) for step in range(-6, 7))
"""Where answers are scored before solving for the scale: 1/4 to 4."""


class AnswerStream:
    """Asks the calibration set every `refresh_every` steps and gives the graded answers to the penalties that read them.

    answer_score with `moves: scale` has the logit scale solved for after a round; the others get each micro-batch's share
    of the answers, as ANSWER sequences or as the QUERY sequences that ask about them. For calibration_aware every second
    question is held out: its answers never enter the loss. Which questions are asked and which answers enter a step are
    pure functions of (seed, step); the last answers and the scale are the only state, kept in checkpoints so that a resume
    continues bit for bit.
    """

    def __init__(
        self,
        penalties: Sequence[OwnAnswersConfig],
        answerer: Answerer,
        questions: Sequence[Record],
        seed: int,
        max_length: int,
    ) -> None:
        self.config = penalties[0]  # what they have in common
        self.scale: AnswerScoreConfig | None = next(
            (one for one in penalties if isinstance(one, AnswerScoreConfig) and one.moves == "scale"), None
        )
        self.in_loss: dict[str, Any] = {one.name: one for one in penalties if one is not self.scale}  # type: ignore[attr-defined]
        self.answerer = answerer
        self.questions = list(questions)
        self.seed = seed
        self.max_length = max_length
        self.asked: list[int] = []
        self.texts: list[str] = []
        self.replies: list[ReplyTokens] = []  # as they were generated; empty where they were chosen among options
        self.correct: list[bool] = []
        self._told = False  # that some are too long
        order = permutation(len(self.questions), f"questions {seed}")
        self.held_out = set(order[1::2]) if "calibration_aware" in self.in_loss else set()
        if "calibration_aware" in self.in_loss and not self.held_out:
            raise UserError(
                f"penalties.calibration_aware holds out every second question of the calibration split, which has "
                f"{len(self.questions)}: set data.splits.calibration to 128..512"
            )

    def before_step(self, step: int) -> None:
        """Answer anew before step `step` (from 0) when a term in the loss is due. Collective."""
        if self.in_loss and step % self.config.refresh_every == 0:
            self._ask(step // self.config.refresh_every)

    def is_due(self, step: int) -> bool:
        """Whether the scale is to be solved for after `step` finished steps."""
        return self.scale is not None and step % self.config.refresh_every == 0

    def round(self, step: int) -> list[Answer] | None:
        """Answer, solve for the logit scale and return the answers at it; None when no scale is asked for. Collective."""
        if self.scale is None:
            return None
        policy = self.answerer.module.policy
        policy.scale = 1.0
        answers, own = self._ask(-(-step // self.config.refresh_every) - 1)
        table = self._table(own, TEMPERATURES)
        temperature = optimal_temperature(table.numpy(), self.correct, TEMPERATURES, score=self.scale.score)
        policy.scale = 1.0 / temperature
        rescored = self._table(own, (1.0,))[:, 0].tolist()  # at the solved scale, as one number an answer
        return [one.rescored(logprob) for one, logprob in zip(answers, rescored, strict=True)]

    def share(self, step: int, micro_batch: int, micro_batches: int, world: World) -> list[Encoded]:
        """Sequences of one micro-batch's answers; all ranks' shares make up the step's answers."""
        free = [i for i, question in enumerate(self.asked) if question not in self.held_out]
        count = min(self.config.answers_per_step, len(free))
        order = [free[i] for i in permutation(len(free), f"answers {self.seed} {step}")[:count]]
        parts = world.size * micro_batches
        index = world.rank * micro_batches + micro_batch
        chosen = order[index * count // parts : (index + 1) * count // parts]
        return [sequence for i in chosen for sequence in self._sequences(i)]

    def state_dict(self) -> dict[str, object]:
        """JSON values of the last round, for a checkpoint."""
        scale = self.answerer.module.policy.scale
        replies = [[one.tokens, one.span] for one in self.replies]
        said = {"asked": self.asked, "texts": self.texts, "replies": replies, "correct": self.correct}
        return {**said, "scale": scale}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up the last round from a checkpoint."""
        self.asked, self.texts, self.correct = (list(state[name]) for name in ("asked", "texts", "correct"))  # type: ignore[call-overload]
        # A checkpoint of before has texts alone.
        self.replies = [ReplyTokens(tuple(ids), tuple(span)) for ids, span in state.get("replies", ())]  # type: ignore[attr-defined]
        self.answerer.module.policy.scale = float(state["scale"])  # type: ignore[arg-type]

    def _ask(self, round_number: int) -> tuple[list[Answer], Answered]:
        """All ranks' answers at scale 1, and this one's own with their states. Collective.

        What enters the loss is at scale 1, and so is what `calibration_aware` measures its targets on.
        """
        count = min(self.config.questions_per_refresh, len(self.questions))
        order = permutation(len(self.questions), f"questions {self.seed}")
        start = round_number * count
        self.asked = [order[(start + i) % len(order)] for i in range(count)]
        policy = self.answerer.module.policy
        scale, policy.scale = policy.scale, 1.0
        try:
            own = self.answerer.share([self.questions[i] for i in self.asked])
        finally:
            policy.scale = scale
        answers = gather_lists(own.answers)
        self.replies = gather_lists(list(own.replies or ()))
        self.texts = [answer.said for answer in answers]
        self.correct = [bool(answer.correct) for answer in answers]
        self._fit(answers)
        return answers, own

    def _fit(self, answers: Sequence[Answer]) -> None:
        """Tell calibration_aware what the held-out answers were worth."""
        held = [i for i, question in enumerate(self.asked) if question in self.held_out]
        confidence = torch.tensor([answers[i].confidence for i in held], dtype=torch.float64)
        correct = torch.tensor([self.correct[i] for i in held], dtype=torch.float64)
        for penalty in self.answerer.module.penalties if held else ():
            if hasattr(penalty, "fit"):
                penalty.fit(confidence, correct)

    def _sequences(self, i: int) -> list[Encoded]:
        """What the penalties read of the i-th answer; nothing where max_length leaves no room."""
        record, text, correct, place = self.questions[self.asked[i]], self.texts[i], self.correct[i], self.asked[i]
        template, room = self.answerer.template, self.max_length
        found: list[Encoded] = []
        if self.in_loss.keys() - {"correctness_query", "tokenized_brier"}:
            if self.replies:
                reply = self.replies[i]
                answer = encode_reply(record, reply.tokens, reply.span, correct, template, room, place)
            else:
                answer = encode_answer(record, text, correct, template, room, place)
            if answer is None and not self._told:
                self._told = True
                logger.warning(
                    "an own answer of %d characters leaves no room for its question in data.max_length: %d; such are "
                    "left out of the penalties",
                    len(text),
                    room,
                )
            found += [] if answer is None else [answer]
        if asked := self.in_loss.get("correctness_query"):
            found += correctness_queries([record], [text], [correct], template, room, asked.choices)
        if asked := self.in_loss.get("tokenized_brier"):
            found += confidence_queries([record], [text], [correct], template, room, asked.levels)
        return [replace(one, record_id=place) for one in found]

    def _table(self, own: Answered, temperatures: Sequence[float]) -> torch.Tensor:
        """Log-prob of every answer at each temperature, each rank scoring its `own`. (answers, temperatures) float64."""
        device = self.answerer.world.device
        return gather_rows(answer_table(self.answerer.module, own, temperatures, device), device)
