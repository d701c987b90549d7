"""A server around a model that echoes: quick, and a crossed reply shows."""

import threading
import time

import numpy as np
import pytest

from calibtrain.calibration.scores import TEMPERATURE_GRID
from calibtrain.confidence.answer import Answer
from calibtrain.pipeline.answer import Answerer
from calibtrain.pipeline.calibrate import read_calibration
from calibtrain.pipeline.evaluate import Measurement
from tests.unit.pipeline.conftest import out  # noqa: F401
from tests.unit.pipeline.test_calibrate import config_of


class Template:
    """A token is a word."""

    control_tokens = ("<|im_end|>",)

    def prompt_ids(self, record):
        return record.question.split()


class EchoModel:
    """Answers "echo QUESTION", surely unless the question holds "doubt", fails on "broken", takes `seconds` a batch."""

    def __init__(self, seconds=0.0):
        self.template, self.config = Template(), config_of("temperature", target_risk=0.1)
        self.seconds = seconds
        self.batches = []
        self.go = threading.Event()
        self.go.set()

    def measure(self, records):
        assert self.go.wait(20)
        time.sleep(self.seconds)
        self.batches.append(len(records))
        questions = [record.question for record in records]
        if "broken" in questions:
            raise RuntimeError("a fault of the model")
        logprobs = [np.log(0.03 if "doubt" in question else 0.97) for question in questions]
        answers = [
            Answer(record.id, question, f"echo {question}", (logprob / 2,) * 2 + (0.0,),
                   tokens=(" echo", f" {question}", ""))
            for record, question, logprob in zip(records, questions, logprobs, strict=True)
        ]  # fmt: skip
        return Measurement(answers, np.repeat(np.array(logprobs)[:, None], len(TEMPERATURE_GRID), axis=1))


@pytest.fixture
def model():
    return EchoModel()


@pytest.fixture
def answerer(model, out):  # noqa: F811
    return Answerer(model, read_calibration(out))
