"""Training examples of refusal tuning, labelled by what the model knows at the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibtrain.confidence.answering import Answerer
from calibtrain.config import RefusalConfig
from calibtrain.data.encode import Encoded
from calibtrain.data.refusal import refusal_examples
from calibtrain.errors import UserError
from calibtrain.losses.terms import Batch
from calibtrain.records import Record


class RefusalExamples(Sequence[tuple[Encoded, ...]]):
    """Item i: what the model learns from training question i; empty where data.max_length leaves no room for it.

    Every `relabel_every` steps the model answers all training questions, and the examples are made anew from the grades.
    The last answers are in checkpoints, so that a resume continues bit for bit.
    """

    def __init__(self, config: RefusalConfig, answerer: Answerer, records: Sequence[Record], max_length: int) -> None:
        without = next((record for record in records if not answerer.template.task.gradable(record)), None)
        if without is not None:
            place = without.origin or without.question
            raise UserError(f"objective.name: refusal grades the model's answers: {place} has no accepted answers")
        self.config, self.answerer, self.records, self.max_length = config, answerer, list(records), max_length
        self.metrics: dict[str, float] = {}
        self._texts: list[str] = []
        self._known: list[bool] = []
        self._tokens: list[tuple[int, ...]] = []  # as they were generated; empty where they were chosen among options
        self._examples: dict[int, tuple[Encoded, ...]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Encoded, ...]:  # type: ignore[override]
        return self._examples.get(index, ())

    def before_step(self, step: int) -> None:
        """Answer and label anew where a round begins at `step` (from 0). Collective."""
        if step % self.config.relabel_every == 0:
            answers, replies = self.answerer.replies(self.records)
            said, known = [answer.said for answer in answers], [bool(answer.correct) for answer in answers]
            learned = replies if self.config.kind == "refusal" else []
            self._take(said, known, [reply.tokens for reply in learned])

    def fill(self, batch: Batch, indices: Sequence[int]) -> Batch:
        """The batch as it is: its sequences say everything."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """JSON values of the present labels."""
        return {"texts": self._texts, "known": self._known, "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the labels of a checkpoint."""
        # A checkpoint of before has texts alone.
        self._take(list(state["texts"]), list(state["known"]), [tuple(ids) for ids in state.get("tokens", ())])

    def close(self) -> None:
        """Nothing was started."""

    def _take(self, texts: list[str], known: list[bool], tokens: list[tuple[int, ...]]) -> None:
        self._texts, self._known, self._tokens = texts, known, tokens
        template, kind = self.answerer.template, self.config.kind
        made = refusal_examples(self.records, texts, known, template, self.max_length, kind, tokens or None)
        self._examples = {one[0].record_id: one for one in made}
        self.metrics = {"known": sum(known) / len(known)}
