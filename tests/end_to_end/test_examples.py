"""Every example runs on a tiny model, learns, and logs what its page promises."""

from __future__ import annotations

import csv
import difflib
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from calibtrain.losses import SFTLoss
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TOKEN_KEYS = {"calib/train/token/ece15", "calib/train/token/acc", "calib/train/token/brier", "train/token/entropy"}
ANSWER_KEYS = {"calib/calibration/likelihood/ece15", "calib/calibration/likelihood/acc"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("examples") / "tiny"))


@pytest.fixture
def example(monkeypatch):
    """An example as a module; its neighbours are importable, as they are for who runs it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = set(sys.modules)
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


def test_every_example_is_tested():
    tested = set(re.findall(r'example\("(\w+)"\)', Path(__file__).read_text("utf-8")))
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested | {"facts"}


def test_plain_pytorch(example, model):
    losses = example("plain_pytorch").main(model, steps=4)
    assert losses[-1] < losses[0]


def test_accelerate(example, model):
    losses = example("accelerate_loop").main(model, steps=3)
    assert losses[-1] < losses[0]
    # The same data, loss and optimiser as the plain loop's: cut otherwise, the step is the same.
    assert losses == pytest.approx(example("plain_pytorch").main(model, steps=3), rel=1e-4)


def single_rank(monkeypatch):
    from calibtrain.distributed import start_world

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    start_world()


def test_deepspeed_script(example, model, monkeypatch):
    single_rank(monkeypatch)
    before, after = example("deepspeed_before").main(model, steps=3), example("deepspeed_after").main(model, steps=3)
    assert after[-1] < after[0] < before[0]  # focal loss is below cross-entropy
    changed = example("deepspeed_after")
    monkeypatch.setattr(changed, "FocalLoss", SFTLoss)
    assert changed.main(model, steps=3) == pytest.approx(before, rel=1e-4)  # with cross-entropy it is the same script


def test_the_diff_in_the_docs_is_the_examples_and_has_three_lines():
    before, after = (
        (EXAMPLES / f"deepspeed_{name}.py").read_text("utf-8").split('"""\n', 1)[1].splitlines()
        for name in ("before", "after")
    )
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ") and line[2:].strip()]
    assert [line[0] for line in changed] == ["+", "+", "-", "+"]
    page = (ROOT / "docs" / "losses-in-your-trainer.md").read_text("utf-8")
    block = re.search(r"^```diff\n(.*?)^```", page, re.M | re.S)[1].splitlines()
    shown = [line[0] + line[1:].strip() for line in block if line.startswith(("+", "-"))]
    assert shown == [line[0] + line[2:].strip() for line in changed]


def rows_of(log, key):
    return [row for row in log if key in row]


def test_huggingface_trainer(example, model):
    log = example("huggingface_trainer").main(model, steps=4, eval_steps=2, use_cpu=True)
    training, evaluations = rows_of(log, "loss"), rows_of(log, "eval_loss")
    assert [row["step"] for row in training] == [2, 4]
    assert all(row.keys() >= TOKEN_KEYS for row in training)
    assert [row["step"] for row in evaluations] == [2, 4]
    assert all(row.keys() >= ANSWER_KEYS for row in evaluations)
    assert training[-1]["loss"] < training[0]["loss"]
    # Six rows a step: every target of the data is counted once a step, two steps an interval.
    facts = example("facts")
    targets = sum(label != -100 for row in facts.rows(facts.load(model)[1]) for label in row["labels"])
    assert training[0]["train/token/n"] == 2 * targets
    # The plain loop sees the same steps; the Trainer logs the mean of two.
    plain = example("plain_pytorch").main(model, steps=2)
    flat = example("huggingface_trainer").main(
        model, steps=2, use_cpu=True, lr_scheduler_type="constant", weight_decay=0.01
    )
    assert rows_of(flat, "loss")[0]["loss"] == pytest.approx(sum(plain) / 2, rel=1e-3)


@pytest.mark.peer
def test_trl_sft(example, model):
    pytest.importorskip("trl", reason="TRL is the plug under test")
    log = example("trl_sft").main(model, steps=4, use_cpu=True, gradient_accumulation_steps=2)
    training = rows_of(log, "loss")
    assert len(training) == 2
    assert all(row.keys() >= TOKEN_KEYS for row in training)
    assert training[-1]["loss"] < training[0]["loss"]


@pytest.mark.peer
def test_trl_preference(example, model):
    pytest.importorskip("trl", reason="TRL is the plug under test")
    log = example("trl_preference").main(model, steps=4, use_cpu=True)
    training = rows_of(log, "loss")
    assert len(training) == 2
    assert all(row.keys() >= {*TOKEN_KEYS, "train/preference/accuracy"} for row in training)
    assert training[-1]["loss"] < training[0]["loss"]


@pytest.mark.peer
def test_lightning(example, model, tmp_path):
    pytest.importorskip("lightning", reason="Lightning is the plug under test")
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    options = {"accelerator": "cpu", "logger": logger, "enable_progress_bar": False, "enable_model_summary": False}
    metrics = example("lightning_module").main(model, steps=6, **options)
    assert metrics.keys() >= {*ANSWER_KEYS, "validation_loss"}
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for wanted in (["train_loss"], TOKEN_KEYS):
        assert [row["step"] for row in rows if all(row[key] for key in wanted)] == ["1", "3", "5"]


def test_stated_confidences_that_know_nothing(example, tmp_path):
    path = example("stated_confidence").write(300, tmp_path / "stated.jsonl", seed=3)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = [re.fullmatch(r"(.+) \(confidence: (\d+)%\)", row["completion"]) for row in rows]
    assert len(rows) == 300
    assert {int(one[2]) for one in found} == set(range(0, 101, 10))
    assert len({row["prompt"] for row in rows}) == 300
