"""Features are hidden states of an unbatched pass, whatever the batch; shards resume and refuse what is not theirs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from calibtrain.confidence.features import (
    POSITIONS,
    Fingerprint,
    collect_features,
    default_layers,
    depth_of,
    features_of,
    read_features,
)
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.records import Message, Record
from tests.tiny import CITIES, tiny_model, tiny_tokenizer

ALONE = World(0, 1, 0, torch.device("cpu"))
PRINT = Fingerprint("a" * 64, "b" * 64)
RECORDS = [
    Record(prompt=(Message("user", f"Where is {city}{' or so' * (i % 3)}?"),)) for i, (city, _) in enumerate(CITIES)
]
TEXTS = ["", *(country for _, country in CITIES[1:])]


@pytest.fixture(scope="module")
def model():
    return LossModel(Policy(tiny_model(initializer_range=0.3))).eval()


@pytest.fixture(scope="module")
def template():
    return Template("plain", tiny_tokenizer())


def collect(model, template, folder, **changes):
    given = {"layers": (0, 1, 2), "depth": 2, "fingerprint": PRINT, "world": ALONE, "shard_size": 4}
    return collect_features(model, template, RECORDS, changes.pop("texts", TEXTS), folder, **{**given, **changes})


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@torch.no_grad()
def test_features_are_the_hidden_states_of_each_answer_on_its_own(model, template, tmp_path, batch_size):
    found = collect(model, template, tmp_path, batch_size=batch_size)
    assert len(found) == len(RECORDS)
    assert depth_of(model) == 2
    assert all(isinstance(shard, np.memmap) for shard in found.shards)
    assert [len(shard) for shard in found.shards] == [4, 4, 2]
    for i, (record, text) in enumerate(zip(RECORDS, TEXTS, strict=True)):
        prompt, answer = template.prompt_ids(record), template.completion_ids(text)
        states = model.policy.causal_model(
            input_ids=torch.tensor([[*prompt, *answer]]), output_hidden_states=True
        ).hidden_states
        assert found.tokens[i] == len(prompt) + len(answer)
        end = len(answer) - 1 if text else 1
        span = slice(len(prompt), len(prompt) + end)
        for layer in (0, 1, 2):
            one = states[layer][0]
            expected = {
                "question_last": one[len(prompt) - 1],
                "answer_last": one[span][-1],
                "answer_mean": one[span].mean(0),
            }
            for position in POSITIONS:
                np.testing.assert_allclose(found.at(layer, position)[i], expected[position], atol=2e-5, rtol=1e-4)


def test_in_memory_features_are_the_shards(model, template, tmp_path):
    kept = collect(model, template, tmp_path)
    found = features_of(model, template, RECORDS[:3], TEXTS[:3], layers=(2,), fingerprint=PRINT)
    np.testing.assert_allclose(found.at(2, "answer_mean"), kept.at(2, "answer_mean")[:3], atol=2e-5, rtol=1e-4)


def test_collection_resumes_after_an_interruption(model, template, tmp_path):
    whole = collect(model, template, tmp_path / "whole")
    passes = []

    def interrupted(step):
        passes.append(step)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return model(step)

    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        collect(interrupted, template, folder, batch_size=2)
    assert [path.name for path in folder.glob("*.npy")] == ["shard-00000.npy"]
    with pytest.raises(UserError, match="2 of 3 shards are missing"):
        read_features(folder, PRINT)
    (folder / "shard-00001.npy.partial").write_bytes(b"half")
    again = []
    resumed = collect(lambda step: again.append(step) or model(step), template, folder, batch_size=2)
    assert len(again) == 3  # two batches of the second shard, one of the third: the first is kept
    for one, other in zip(resumed.shards, whole.shards, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)


def test_a_folder_of_other_answers_or_another_model_is_refused(model, template, tmp_path):
    collect(model, template, tmp_path)
    with pytest.raises(UserError, match="other answers_hash"):
        collect(model, template, tmp_path, texts=["Mars", *TEXTS[1:]])
    with pytest.raises(UserError, match="other layers"):
        collect(model, template, tmp_path, layers=(1,))
    with pytest.raises(UserError, match="other weights_hash"):
        collect(model, template, tmp_path, fingerprint=Fingerprint("c" * 64, "b" * 64))
    with pytest.raises(UserError, match="made with prompt template bbb"):
        read_features(tmp_path, Fingerprint("a" * 64, "c" * 64))


def test_mistakes_are_named(model, template, tmp_path):
    with pytest.raises(UserError, match=r"from 0 .* to 2"):
        collect(model, template, tmp_path, layers=(1, 3))
    with pytest.raises(UserError, match="10 questions, 1 answers"):
        collect(model, template, tmp_path, texts=["Mars"])
    found = collect(model, template, tmp_path)
    with pytest.raises(UserError, match="no layer 7"):
        found.at(7, "answer_last")
    index = Path(tmp_path / "index.json")
    index.write_text(json.dumps({"layers": [1]}))
    with pytest.raises(UserError, match="not an index"):
        read_features(tmp_path, PRINT)


def test_default_layers_are_spread_and_end_with_the_last():
    assert default_layers(2) == (1, 2)
    assert default_layers(30)[-1] == 30
    assert len(default_layers(30)) == 8
