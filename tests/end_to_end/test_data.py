"""Data as people have it, from a YAML file to a trained model: mixtures, odd rows, prompts, held-out records, a stream."""

from __future__ import annotations

import gzip
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from calibtrain.config_file import load_config
from calibtrain.data.templates import template_of
from calibtrain.errors import UserError
from calibtrain.pipeline import examples
from tests.distributed.jobs import metrics, write_job

SIZES = {"train": 24, "validation": 5, "calibration": 6, "temperature": 4, "certification": 4, "test": 4}
TRAINING = {"max_steps": 4, "checkpoint_every": None, "zero_stage": 1, "evaluate_loss_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of questions in one prompt of the user's own, each with an odd row."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    folder = tmp_path_factory.mktemp("data")
    for name in ("sums", "cities"):
        rows = [
            {"question": f"{name} {i}?", "answers": [f"{i % 10}"], "passage": f"It is {i % 10}, they say."}
            for i in range(200)
        ]
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines[:90], "{odd", *lines[90:]]) + "\n")
    (folder / "ask.j2").write_text("{{ system }}\n{% for one in examples %}{{ one.question }}={{ one.answer }}\n{% endfor %}"
                                   "{{ context | join(' ') }} {{ question }}=")  # fmt: skip
    return folder


def trained(folder, monkeypatch, name, data, **training):
    from calibtrain.pipeline import train

    monkeypatch.chdir(folder)
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(folder / "cache"))
    data = {"splits": SIZES, "max_length": 96, "few_shot_raw": 1, **data}
    job = write_job(folder, name, data=data, training={**TRAINING, **training}, penalties=[])
    output = train.run(load_config(job))
    return metrics(folder / name), load_file(output / "model.safetensors")


def test_a_mixture_asked_by_a_template_of_the_users_own(folder, monkeypatch):
    columns = {"context": "passage"}
    parts = [
        {"source": {"kind": "file", "path": str(folder / f"{name}.jsonl"), "columns": columns}, "weight": weight}
        for name, weight in (("sums", 2), ("cities", 1))
    ]
    prompt = {"template": "jinja", "prompt_template": str(folder / "ask.j2"), "system": "Digits.", "few_shot": 2}
    lines, _ = trained(
        folder, monkeypatch, "mixed", {"source": {"kind": "mixture", "sources": parts}, **prompt}, profile_steps=1
    )
    held_out = [line for line in lines if line["event"] == "evaluation" and line["split"] == "validation"]
    assert [line["step"] for line in held_out] == [2, 4]
    assert all(0 < line["eval/loss"] < 20 for line in held_out)
    assert held_out[1]["eval/loss"] < held_out[0]["eval/loss"]
    steps = [json.loads(line) for line in (folder / "mixed" / "metrics.jsonl").read_text().splitlines()]
    rates = [line[key] for line in steps for key in line if key == "train/tflops_per_second_and_device"]
    assert len(rates) == 4
    assert min(rates) > 0
    trace = json.loads(gzip.decompress((folder / "mixed" / "profile" / "rank0.json.gz").read_bytes()))
    assert any("AdamW" in event.get("name", "") for event in trace["traceEvents"])
    dropped = [json.loads(line) for line in (folder / "mixed" / "dropped.jsonl").read_text().splitlines()]
    assert sorted(row["place"].rpartition("/")[2] for row in dropped) == ["cities.jsonl:91", "sums.jsonl:91"]
    facts = json.loads((folder / "mixed" / "run.json").read_text())
    assert facts["splits"] == {**SIZES, "examples": 2}
    assert facts["records_read"] == 402

    from calibtrain.pipeline.evaluate import Loaded

    config = load_config(folder / "mixed" / "config.yaml")
    assert len(config.data.examples) == 2
    loaded = Loaded(config, folder / "mixed" / "model")
    assert loaded.template.hash == facts["template_hash"]
    # The prompt of this run is in what its calibration stands for.
    other = config.model_copy(update={"data": config.data.model_copy(update={"system": "Words."})})
    assert Loaded(other, folder / "mixed" / "model").template.hash != facts["template_hash"]
    unsettled = load_config(folder / "mixed.yaml")
    with pytest.raises(UserError, match="examples of this run are not known"):
        template_of(unsettled, loaded.template.tokenizer)


def test_a_streamed_file_trains_as_one_in_memory(folder, monkeypatch):
    source = {"kind": "file", "path": str(folder / "sums.jsonl")}
    lines, weights = trained(folder, monkeypatch, "memory", {"source": source})
    monkeypatch.setattr(examples, "ENCODED_ANEW", 0)  # so that the tokens lie on disk
    for name, streaming in (("stream", True), ("mapped", False)):
        if not streaming:  # made by the run before
            monkeypatch.setattr(examples, "make_cache", None)
        again, same = trained(folder, monkeypatch, name, {"source": {**source, "streaming": streaming}})
        assert again == lines
        assert all(torch.equal(same[key], tensor) for key, tensor in weights.items())
