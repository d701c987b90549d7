"""Answers among options against lm-evaluation-harness's multiple choice, and prediction sets against MAPIE's."""

import json
import sys
import types

import numpy as np
import pytest

from calibtrain.abstention.prediction_sets import fit_prediction_sets

pytestmark = pytest.mark.peer
WORDS = ("Japan", "Kenya", "United States", "France or Spain", "Poland")


class Prefit:
    """A classifier that says the probabilities it is given."""

    def __init__(self, classes):
        self.classes_ = np.arange(classes)

    def fit(self, x, y):
        return self

    def predict_proba(self, x):
        return np.asarray(x)

    def predict(self, x):
        return np.asarray(x).argmax(1)

    def __sklearn_is_fitted__(self):
        return True


class NoDraw(np.random.RandomState):
    """Takes the randomisation out of MAPIE's APS, which ours is without."""

    def uniform(self, *args, **kwargs):
        return np.zeros(kwargs["size"])


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize(("score", "seed"), [("lac", 0), ("lac", 1), ("aps", 2), ("aps", 3)])
def test_prediction_sets_are_mapies(score, seed, alpha):
    pytest.importorskip("mapie.classification", reason="oracle for prediction sets")
    from mapie.classification import SplitConformalClassifier

    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (700, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    theirs = SplitConformalClassifier(
        Prefit(5), confidence_level=1 - alpha, conformity_score=score, prefit=True, random_state=NoDraw()
    ).conformalize(p[:300], y[:300])
    options = {"conformity_score_params": {"include_last_label": False}} if score == "aps" else {}
    found = theirs.predict_set(p[300:], **options)[1][:, :, 0]
    ours = fit_prediction_sets(p[:300], np.eye(5, dtype=bool)[y[:300]], alpha, score).members(p[300:])
    rows = ours.any(1) if score == "aps" else slice(None)  # theirs fills with the likeliest one what would be empty
    assert ours.any(1).mean() > 0.6
    assert np.array_equal(ours[rows], found[rows])


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The harness's samples of a tiny model on questions with options, whose texts carry the end token."""
    pytest.importorskip("lm_eval", reason="oracle for multiple choice")
    try:
        import sacrebleu  # noqa: F401
    except ImportError:  # translation's metric, which asks for more packages; multiple choice asks for none of it
        sys.modules["sacrebleu"] = types.ModuleType("sacrebleu")
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    from tests.tiny import CITIES, EOS, tiny_model, tiny_tokenizer

    tokenizer, model = tiny_tokenizer(), tiny_model(initializer_range=0.3)
    rows = [
        {
            "question": f"In which country is {city}?",
            "options": list(WORDS[: 3 + i % 3]),
            "choices": [word + EOS for word in WORDS[: 3 + i % 3]],
            "answer": i % 3,
        }
        for i, (city, _) in enumerate(CITIES)
    ]
    folder = tmp_path_factory.mktemp("harness")
    (folder / "rows.json").write_text(json.dumps(rows))
    task = ConfigurableTask(
        config={
            "task": "options",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=256, device="cpu")
    found = simple_evaluate(model=lm, tasks=[task], log_samples=True, bootstrap_iters=0)
    return rows, tokenizer, model, found


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_answers_among_options_are_the_harnesss(harness, score, tmp_path):
    from calibtrain.confidence.likelihood import answer_questions
    from calibtrain.config import EvaluationConfig
    from calibtrain.config_tasks import ChoiceTask
    from calibtrain.data.templates import Template
    from calibtrain.models.loss_model import LossModel
    from calibtrain.models.policy import Policy
    from calibtrain.pipeline.lm_eval import read_samples
    from calibtrain.records import Message, Record
    from calibtrain.tasks.choice import Choice

    rows, tokenizer, model, found = harness
    task = Choice(ChoiceTask(show="texts", score=score, answers_are="index_from_0"))
    template = Template("plain", tokenizer, task=task)
    records = [
        task.asked(
            Record((Message("user", row["question"]),), accepted=(str(row["answer"]),), options=tuple(row["options"]))
        )
        for row in rows
    ]
    answered = answer_questions(LossModel(Policy(model)).eval(), template, records, EvaluationConfig(batch_size=8))
    samples = sorted(found["samples"]["options"], key=lambda one: one["doc_id"])
    for record, answer, sample in zip(records, answered.answers, samples, strict=True):
        sums = np.array([float(one[0]) for one in sample["filtered_resps"]])
        if score == "mean":  # ours by tokens, theirs (acc_norm) by characters or bytes of the text
            sums = sums / [len(template.completion_ids(option)) for option in record.options]
        expected = np.exp(sums - sums.max())
        assert np.exp(answer.option_logprobs) == pytest.approx(expected / expected.sum(), abs=2e-5)
        assert score == "mean" or answer.correct == bool(sample["acc"])
    if score == "sum":
        assert np.mean([one.correct for one in answered.answers]) == found["results"]["options"]["acc,none"]
        path = tmp_path / "samples_options_x.jsonl"
        path.write_text("".join(json.dumps(one, default=str) + "\n" for one in samples))
        for ours, theirs in zip(answered.answers, read_samples(path).answers, strict=True):
            assert theirs.confidence == pytest.approx(ours.confidence, abs=2e-5)
            assert theirs.correct == ours.correct
