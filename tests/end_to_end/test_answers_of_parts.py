"""JSON and paragraphs of claims through the whole job on a tiny model: trained, calibrated, reported, asked."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from calibtrain.abstention.claims import certify_claims
from calibtrain.config_file import load_config
from tests.distributed.jobs import write_job

SIZES = {"train": 400, "calibration": 8, "temperature": 90, "certification": 90, "test": 60}
SCHEMA = {
    "type": "object",
    "properties": {"last": {"type": "integer"}, "kind": {"enum": ["even", "odd"]}},
    "required": ["last", "kind"],
    "additionalProperties": False,
}


def rows():
    """What is asked of a number, with the answer of both kinds."""
    for i in range(900):
        kind = "odd" if i % 2 else "even"
        facts = [f"It ends in {i % 10}.", f"It is {kind}."]
        yield i, {"last": i % 10, "kind": kind}, facts


def job(folder, name, task, line):
    made = write_job(
        folder,
        name,
        task=task,
        data={"splits": SIZES, "few_shot_raw": 0, "max_length": 64, "source": {"kind": "file", "path": str(folder / f"{name}.jsonl")}},
        penalties=[],
        training={"zero_stage": 1, "max_steps": 160, "learning_rate": 1e-2, "micro_batch_size": 16, "global_batch_size": 16,
                  "log_every": 40, "checkpoint_every": None},
        evaluation={"batch_size": 120, "max_new_tokens": 36},
        abstention={"target_risk": 0.5, "delta": 0.2, "report_risks": [0.2, 0.5, 0.8]},
    )  # fmt: skip
    lines = [json.dumps({"question": f"What of {i}?", **line(value, facts)}) for i, value, facts in rows()]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return load_config(made)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of both kinds that start from the same model."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import calibrate, collect, evaluate, train

    folder = tmp_path_factory.mktemp("parts")
    made = {
        "json": job(folder, "json", {"kind": "json", "schema": SCHEMA}, lambda value, facts: {"answers": value}),
        "claims": job(
            folder, "claims", {"kind": "claims"}, lambda value, facts: {"completion": " ".join(facts), "answers": facts}
        ),
    }
    for config in made.values():
        train.run(config)
        output = config.output_dir
        evaluate.run(config, model=output / "model", split="test", output=output / "answers" / "test.jsonl")
        calibrate.run(output)
        collect.run(output)
    return made


def content(config):
    return json.loads((config.output_dir / "calibration.json").read_text())
def test_print(finished):
    from calibtrain.pipeline.evaluate import read_measurement
    from calibtrain.pipeline.answer import load
    for kind, config in finished.items():
        answers = read_measurement(config.output_dir / "answers" / "test.jsonl").answers
        print(kind, np.mean([a.correct for a in answers]), np.mean([a.found for a in answers]), np.mean([p.correct for a in answers for p in a.parts]))
        for a in answers[:6]: print(a.text, [p.correct for p in a.parts], a.confidence)
        print(json.dumps(content(config)["claims"])[:600], content(config)["answer_parts"]["fields"].keys())
        print(load(config.output_dir).answer("What of 777?").told())
