"""A model behind an address that answers as a run's own does: the same template, spans, grades and confidence."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibtrain.confidence.generation import Generation
from calibtrain.confidence.likelihood import graded_answers
from calibtrain.config import RunConfig
from calibtrain.data.templates import template_of
from calibtrain.engines import Completion, CompletionsServer, Identity, identify
from calibtrain.errors import UserError
from calibtrain.models.loading import answering_config, load_tokenizer
from calibtrain.pipeline.calibration_file import made_by
from calibtrain.pipeline.measurement import Measurement
from calibtrain.pipeline.prepare import with_examples
from calibtrain.pipeline.scope import plain
from calibtrain.records import Message, Record

PROBES = (
    "In which country is the city of Lyon?",
    "What is the capital of Japan?",
    "Who wrote the play Hamlet?",
    "How many legs does a spider have?",
)
"""Questions by whose answers an engine is known again."""
STALE = 300.0
"""Seconds after which an engine that is asked again must first show that it is the same."""


class Served:
    """A model behind an OpenAI-compatible server, asked with the template of a run."""

    def __init__(
        self,
        config: RunConfig,
        model: Path | None = None,
        *,
        url: str,
        name: str | None = None,
        timeout: float = 300.0,
    ) -> None:
        """Meet the server, and see that it reads tokens as the tokenizer of `model`, or of the config's start, does.

        name: the model's id on the server, which need not be given where it has one. Raises UserError where the server is
        not there or does not return what confidence needs.
        """
        self.config = config = with_examples(config)
        self.graded = True
        self.server = CompletionsServer(url, name, timeout=timeout)
        self.name = f"{plain(self.server.model)} at {self.server.url}"
        self.template = template_of(config, load_tokenizer(answering_config(config.model, model)))
        self._prompts = [self.template.prompt_ids(Record(prompt=(Message("user", one),))) for one in PROBES]
        self.identity, made = identify(self.server, self._prompts, self.template.stop_ids)
        self._check_tokenizer(made)
        self._seen = time.monotonic()

    def measure(
        self, records: Sequence[Record], shots: Sequence[Record] = (), on_batch: Any = lambda questions_done: None
    ) -> Measurement:
        """Answer and grade `records`; the log-probs are at temperature 1 alone."""
        if time.monotonic() - self._seen > STALE:
            self.check_same()
        settings, template = self.config.evaluation, self.template
        if any(template.task.options(record) for record in records):
            raise UserError(
                f"{self.server.url}: a server does not score given options, which task.answer_by: likelihood asks for; "
                "leave out the engine, or train and calibrate with task.answer_by: generation"
            )
        made = self.server.complete(
            [template.prompt_ids(record, shots) for record in records],
            stop_ids=template.stop_ids,
            max_new_tokens=settings.max_new_tokens,
            goes_on=template.goes_on,
            on_done=on_batch,
        )
        generations = [Generation(one.tokens, one.logprobs, _no_states(one), one.finished) for one in made]
        answers = graded_answers(records, generations, template, settings, graded=self.graded).answers
        return Measurement(answers, np.zeros((len(answers), 0)))

    def mark(self) -> str:
        """Mark of the engine and template, once it has shown that it is still the same: of what of it is exact."""
        self.check_same()
        known = {key: value for key, value in self.identity.as_dict().items() if key != "probes"}
        known["probes"] = [list(one.tokens) for one in self.identity.probes]
        return made_by(
            "engine " + hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest(), self.template.hash
        )

    def check_same(self, certified: Identity | None = None) -> None:
        """UserError where another engine answers now than at the start, or than the `certified` one."""
        if certified is None:
            certified, now = self.identity, identify(self.server, self._prompts, self.template.stop_ids)[0]
        else:
            now = self.identity
        if changed := certified.differences(now):
            raise UserError(
                f"{self.server.url}: another engine than the one that was measured: {changed}; what is certified holds for "
                f"that one alone: serve it again, or calibrate this one with --engine"
            )
        self._seen = time.monotonic()

    def _check_tokenizer(self, made: Sequence[Completion]) -> None:
        """UserError where the server reads most of its own answers' tokens otherwise than our tokenizer."""
        texts = [(_comparable(one.text), _comparable(self._text(one))) for one in made]
        other = [both for both in texts if both[0] != both[1]]
        if 2 * len(other) > len(texts):
            raise UserError(
                f"{self.server.url}: the server's tokenizer is another one: what it reads as {other[0][0][:40]!r} is "
                f"{other[0][1][:40]!r} here; give the directory that it serves (--model), or serve the one of this run"
            )

    def _text(self, one: Completion) -> str:
        """A completion as our tokenizer reads it."""
        return "".join(self.template.token_texts(one.tokens[:-1] if one.finished else one.tokens))


def serving(url: str, name: str | None = None) -> Callable[[RunConfig, Path | None], Served]:
    """What makes a Served of a config and the directory that the server serves: `load` of `pipeline.evaluate.run`."""
    return partial(Served, url=url, name=name)


def _no_states(one: Completion) -> torch.Tensor:
    """Hidden states (T, 0): a server keeps its own."""
    return torch.zeros(len(one.tokens), 0)


def _comparable(text: str) -> str:
    """Text without what detokenizers differ in: spaces at the ends, and halves of characters."""
    return text.replace("\N{REPLACEMENT CHARACTER}", "").strip()
