"""A server around a model that echoes: quick, and a crossed reply shows."""

import socket
import threading
import time

import numpy as np
import pytest

from calibtrain.calibration.scores import TEMPERATURE_GRID
from calibtrain.confidence.answer import Answer
from calibtrain.pipeline.answer import Answerer
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.measurement import Measurement
from calibtrain.tasks.short_answer import SHORT_ANSWER
from tests.unit.pipeline.conftest import made, out  # noqa: F401
from tests.unit.pipeline.test_calibrate import config_of


class Template:
    """A token is a word."""

    control_tokens = ("<|im_end|>",)
    task = SHORT_ANSWER

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


@pytest.fixture
def address(answerer):
    """A real server on loopback around the echoing model."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'calibtrain[serve]')")
    from calibtrain.app.limits import Limits
    from calibtrain.app.protocol import PatientProtocol
    from calibtrain.app.server import LOOPBACK, create_app

    app = create_app(
        answerer,
        name="demo",
        limits=Limits(requests_per_minute=0, body_seconds=0.5),
        hosts=LOOPBACK,
        examples=["what is it", "why is it"],
    )
    config = uvicorn.Config(app, log_level="warning", http=PatientProtocol, ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
