"""Sources of confidence against lm-polygraph's estimators, on the same log-probs, entropies and samples."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from calibtrain.confidence import sampling
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.confidence.source import Asker
from calibtrain.confidence.spread import likelihoods
from calibtrain.config import EvaluationConfig
from calibtrain.data.templates import Template
from calibtrain.models.loss_model import LossModel, SpreadStep
from calibtrain.models.policy import Policy
from calibtrain.records import Message, Record
from tests.tiny import CITIES, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.peer


@pytest.fixture
def polygraph(monkeypatch):
    """Module of lm-polygraph by name, without its packages' own imports: they want spaCy and more, the estimators do not."""
    found = importlib.util.find_spec("lm_polygraph")
    if found is None:
        pytest.skip("lm-polygraph is not installed (make peers)")
    (root,) = found.submodule_search_locations
    for name in ("lm_polygraph", "lm_polygraph.estimators", "lm_polygraph.utils"):
        package = types.ModuleType(name)
        package.__path__ = [root + name.removeprefix("lm_polygraph").replace(".", "/")]
        monkeypatch.setitem(sys.modules, name, package)
    return lambda name: importlib.import_module(f"lm_polygraph.estimators.{name}")


def test_likelihoods(polygraph):
    asker = Asker(
        LossModel(Policy(tiny_model(initializer_range=0.3))).eval(),
        Template("plain", tiny_tokenizer()),
        EvaluationConfig(batch_size=4, max_new_tokens=4),
    )
    records = [Record(prompt=(Message("user", f"Where is {city}?"),), accepted=(country,)) for city, country in CITIES]
    answered = answer_questions(asker.module, asker.template, records, asker.settings)
    ours = likelihoods(asker, records, answered)
    lengths = torch.bincount(answered.features.sequence_ids).tolist()
    with torch.no_grad():
        entropies = asker.module(SpreadStep(answered.features.hidden))[0].double().split(lengths)
    stats = {
        "greedy_log_likelihoods": [list(answer.token_logprobs) for answer in answered.answers],
        "entropy": [one.numpy() for one in entropies],
    }
    theirs = {
        "likelihood": polygraph("max_probability").MaximumSequenceProbability(),
        "likelihood_mean": polygraph("perplexity").Perplexity(),
        "likelihood_entropy": polygraph("token_entropy").MeanTokenEntropy(),
    }
    for name, estimator in theirs.items():
        np.testing.assert_allclose(ours[name].values, np.exp(-estimator(stats)), rtol=1e-6, err_msg=name)


def meanings(labels):
    """lm-polygraph's two maps between samples and classes."""
    classes = [np.flatnonzero(labels == one).tolist() for one in range(labels.max() + 1)]
    return {"class_to_sample": [classes], "sample_to_class": [dict(enumerate(labels.tolist()))]}


def test_semantic_entropy_by_count(polygraph):
    rng = np.random.default_rng(0)
    estimator = polygraph("semantic_entropy").SemanticEntropy(class_probability_estimation="frequency")
    for _ in range(20):
        texts = [f"t{i}" for i in rng.integers(0, 5, 10)]
        labels = sampling.exact("q", texts)
        stats = {"sample_texts": [texts], "semantic_classes_entail": meanings(labels)}
        assert estimator(stats)[0] == pytest.approx(sampling.count_entropy(labels), abs=1e-12)


def test_semantic_entropy_by_likelihood_where_samples_are_the_whole_distribution(polygraph):
    """Theirs averages log p(C) over the samples, ours takes the expectation: the same where the shares are the chances."""
    chances = {"Paris": 0.5, "paris": 0.1, "Rome": 0.3, "Bern": 0.1}
    texts = [text for text, p in chances.items() for _ in range(round(10 * p))]
    logprobs = np.log([chances[text] for text in texts])
    labels = sampling.normalized("q", texts)
    stats = {"sample_texts": [texts], "sample_log_probs": [logprobs], "semantic_classes_entail": meanings(labels)}
    estimator = polygraph("semantic_entropy").SemanticEntropy(use_unique_responses=True)
    assert estimator(stats)[0] == pytest.approx(sampling.semantic_entropy(labels, texts, logprobs), abs=1e-12)
