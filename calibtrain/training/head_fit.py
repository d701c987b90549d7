"""The end of a confidence head's training: the final weights answer once more, and the head is solved for on that."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from deepspeed.utils import safe_get_full_fp32_param

from calibtrain.calibration.metrics import summary_of
from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead, HeadInputs, fit_head, trained_head
from calibtrain.config import RunConfig
from calibtrain.data.loader import step_indices
from calibtrain.data.templates import Template
from calibtrain.distributed import World, on_main, wait_for_main
from calibtrain.errors import UserError
from calibtrain.models.export import gathered_weights
from calibtrain.records import Record
from calibtrain.training.engine import Engine

logger = logging.getLogger(__name__)
NOT_YET = Fingerprint("", "")
"""Of weights that are not exported yet."""


@dataclass(frozen=True)
class HeadFit:
    """Which questions a run's head is solved on, by whom they are answered."""

    engine: Engine
    answerer: Answerer
    questions: Sequence[Record]
    layers: tuple[int, ...]
    seed: int
    world: World

    def solve(self) -> tuple[FittedHead | None, dict[str, float]]:
        """The head, on rank 0 and without its fingerprint, and how well it tells right answers from wrong ones by
        cross-validation. Where too few answers are right, or wrong, it is the one that was trained, if any was. Collective.
        """
        trained = _weights(self.engine, keep=self.world.is_main)
        found: list[tuple[FittedHead, dict[str, float]]] = []
        if self.world.is_main and self.questions:
            logger.info("the confidence head: answering %d questions that no step learnt from", len(self.questions))
        answered = self.answerer(self.questions, layers=self.layers) if self.questions else None

        def solve() -> None:
            if answered is not None:
                correct = [bool(one.correct) for one in answered.answers]
                inputs = HeadInputs.of(answered)
                try:
                    head, held_out = fit_head(inputs, correct, self.layers, NOT_YET, seed=self.seed)
                    told = summary_of(held_out, correct)
                    found.append((head, {f"calib/calibration/head/{key}": x for key, x in told.items()}))
                    return
                except UserError as error:
                    instead = "what was trained along the run is kept" if trained else "the run has none"
                    logger.warning("%s: %s", error, instead)
            if trained:
                found.append((trained_head(trained, self.layers, NOT_YET), {}))

        wait_for_main(solve)
        return found[0][0] if found else None, on_main(lambda: found[0][1] if found else {})


def fresh_questions(config: RunConfig, records: Sequence[Record], steps: int, batch: int) -> list[Record]:
    """Training records that no step learns from; none where that is only known as they are taken."""
    chosen_anew = config.trains_on_rollouts and config.rollouts.dynamic_sampling > 0
    return [] if config.data.streams or chosen_anew else unasked(records, steps, batch, config.seed)


def askable(records: Iterable[Record], template: Template, most: int) -> list[Record]:
    """The first `most` that can be graded and asked: one that cannot is not to end a run behind its last step."""

    def fits(record: Record) -> bool:
        try:
            return template.task.gradable(record) and bool(template.prompt_ids(record))
        except UserError:
            return False

    return list(islice(filter(fits, records), most))


def unasked(records: Sequence[Record], steps: int, batch: int, seed: int) -> list[Record]:
    """Those of the training records that no step of a run takes, without the questions that those which are taken teach:
    their own under any system text or order of options, and those of a conversation's earlier turns.
    """
    if steps * batch >= len(records):
        return []
    taken = {index for step in range(steps) for index in step_indices(step, batch, len(records), seed)}
    known = {key for index in taken for key in records[index].taught}
    return [one for index, one in enumerate(records) if index not in taken and one.key not in known]


def _weights(engine: Engine, *, keep: bool) -> dict[str, torch.Tensor]:
    """The parameters of a head that learns along the run, in float32 where the optimiser keeps them so. Collective."""
    module = engine.module.confidence_head
    if module is None:
        return {}
    engine.module.settle()
    plain = gathered_weights(module, keep=True)
    found = {}
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if engine.stage or engine.deepspeed.bfloat16_enabled() else None
        found[name] = plain[name] if master is None else master.detach().cpu().view_as(plain[name])
    return found if keep else {}
