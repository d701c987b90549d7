"""Readings of an answer's tokens and of samples, against float64 formulas on the model's own logits."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from calibtrain.confidence import sampling
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.confidence.source import Asker
from calibtrain.confidence.sources import SOURCES, score
from calibtrain.confidence.spread import likelihoods
from calibtrain.config import EvaluationConfig
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.records import Message, Record
from tests.tiny import CITIES, tiny_model, tiny_tokenizer

RECORDS = [Record(prompt=(Message("user", f"Where is {city}?"),), accepted=(country,)) for city, country in CITIES]


@pytest.fixture(scope="module")
def asker():
    return Asker(
        LossModel(Policy(tiny_model(initializer_range=0.3, max_position_embeddings=2048))).eval(),
        Template("plain", tiny_tokenizer()),
        EvaluationConfig(batch_size=4, max_new_tokens=4),
        seed=3,
    )


@pytest.fixture(scope="module")
def answered(asker):
    return answer_questions(asker.module, asker.template, RECORDS, asker.settings)


@torch.no_grad()
def test_likelihoods_are_their_formulas_on_the_models_own_distributions(asker, answered):
    found = likelihoods(asker, RECORDS, answered)
    ids = answered.features.targets.split(torch.bincount(answered.features.sequence_ids).tolist())
    for i, (record, tokens) in enumerate(zip(RECORDS, ids, strict=True)):
        prompt = asker.template.prompt_ids(record)
        logits = asker.module.policy.causal_model(input_ids=torch.tensor([[*prompt, *tokens.tolist()]])).logits
        p = logits[0, len(prompt) - 1 : -1].double().softmax(-1)
        own = p[torch.arange(len(tokens)), tokens].numpy()
        top = p.topk(2).values.numpy()
        expected = {
            "likelihood": own.prod(),
            "likelihood_mean": math.exp(np.log(own).mean()),
            "likelihood_min": own.min(),
            "likelihood_margin": (top[:, 0] - top[:, 1]).mean(),
            "likelihood_entropy": math.exp(-np.mean([entropy(row) for row in p.numpy()])),
        }
        for name, value in expected.items():
            assert found[name].values[i] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert all(scores.cost.forward_passes.sum() == 0 for scores in found.values())
    assert [name for name, scores in found.items() if scores.probability] == ["likelihood"]


def test_samples_give_consistency_and_entropies(asker, answered):
    found = sampling.sampled(asker, RECORDS, answered, samples=16)
    again = sampling.sampled(asker, RECORDS, answered, samples=16)
    for name, scores in found.items():
        assert np.array_equal(scores.values, again[name].values)
        assert ((scores.values > 0) & (scores.values <= 1)).all()
        assert (scores.cost.forward_passes >= 16).all()
    # (m + 1) / (k + 2): consistency comes in steps of 1 / 18
    assert np.allclose(found["self_consistency"].values * 18, np.round(found["self_consistency"].values * 18))


def test_two_meanings_weighed_by_count_and_by_likelihood():
    texts = ["Paris", "paris", "Paris", "Rome"]
    labels = sampling.normalized("q", texts)
    assert labels[0] == labels[1] == labels[2] != labels[3]
    assert sampling.count_entropy(labels) == pytest.approx(entropy([3, 1]))
    logprobs = np.log([0.5, 0.2, 0.5, 0.1])
    assert sampling.semantic_entropy(labels, texts, logprobs) == pytest.approx(entropy([0.5 + 0.2, 0.1]))
    assert sampling.semantic_entropy([0], ["x"], [-700.0]) == 0.0
    assert sampling.exact("q", texts).max() == 2


def test_entropy_of_samples_approaches_that_of_the_meanings():
    """Over many draws from a known distribution both estimates converge to its entropy."""
    rng = np.random.default_rng(0)
    p = np.array([0.6, 0.3, 0.1])
    drawn = rng.choice(3, size=20_000, p=p)
    texts = [f"t{i}" for i in drawn]
    labels = sampling.exact("q", texts)
    assert sampling.count_entropy(labels) == pytest.approx(entropy(p), abs=0.01)
    assert sampling.semantic_entropy(labels, texts, np.log(p[drawn])) == pytest.approx(entropy(p))


def test_meanings_are_components_whatever_the_order():
    same = np.zeros((4, 4), dtype=bool)
    same[0, 2] = same[2, 0] = same[2, 3] = same[3, 2] = True
    labels = sampling.components(same)
    assert labels[0] == labels[2] == labels[3] != labels[1]


@pytest.fixture(scope="module")
def nli(tmp_path_factory):
    """A tiny classifier, and whether it finds that one text entails another."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=3, id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("nli")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_nli_model_joins_texts_that_entail_each_other(nli):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["Paris", "in Paris", "Rome", "paris", "Bern", "the city of Bern"]
    labels = sampling.nli_equivalence(str(nli))("Where?", texts)
    assert labels[0] == labels[3]  # the same text needs no model
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(nli).eval(),
        AutoTokenizer.from_pretrained(nli),
    )

    @torch.no_grad()
    def entails(a, b):
        return model(**tokenizer(f"Where? {a}", f"Where? {b}", return_tensors="pt")).logits.argmax().item() == 2

    distinct = [0, 1, 2, 4, 5]
    mutual = np.array(
        [[entails(texts[a], texts[b]) and entails(texts[b], texts[a]) for b in distinct] for a in distinct]
    )
    expected = sampling.components(mutual | np.eye(len(distinct), dtype=bool))
    ours = labels[distinct]
    assert [(ours[i] == ours[j]) == (expected[i] == expected[j]) for i in range(5) for j in range(5)] == [True] * 25


def test_an_nli_model_that_cannot_say_entailment_is_refused(nli, tmp_path):
    from transformers import AutoConfig

    with pytest.raises(UserError, match="cannot be loaded"):
        sampling.nli_equivalence(str(tmp_path / "nothing"))
    for file in nli.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(tmp_path)
    config.id2label = {0: "yes", 1: "no", 2: "maybe"}
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="one of them must be entailment"):
        sampling.nli_equivalence(str(tmp_path))


def test_sources_are_scored_by_name_in_their_order(asker, answered):
    found = score(asker, RECORDS, answered, ["self_consistency", "likelihood"])
    assert list(found) == ["self_consistency", "likelihood"]
    assert Counter(SOURCES).most_common(1)[0][1] == 1
    with pytest.raises(UserError, match="likelyhood"):
        score(asker, RECORDS, answered, ["likelyhood"])
