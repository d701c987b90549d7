"""JSON and paragraphs of claims through the whole job on a tiny model: trained, calibrated, reported, asked."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibtrain.abstention.claims import claims_threshold, conformal_scores
from calibtrain.config_file import load_config
from calibtrain.data.templates import Template
from calibtrain.pipeline import certify
from calibtrain.pipeline.answer import load
from calibtrain.pipeline.answer_parts import part_probabilities
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.measurement import read_measurement
from calibtrain.pipeline.reply import REFUSAL
from calibtrain.records import Message, Record
from tests.distributed.jobs import write_job

SIZES = {"train": 60, "calibration": 8, "temperature": 50, "certification": 50, "test": 40}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["even", "odd"]}, "size": {"type": "integer"}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}


def rows(kind):
    """Questions of one kind about numbers, of which most say the same; and the reply to each."""
    for i in range(620):
        parity, size = "odd" if i % 10 < 7 else "even", 4 if i % 5 < 3 else 17
        facts = [f"It is {parity}.", f"Its size is {size}."]
        value = {"kind": parity, "size": size}
        if kind == "json":
            yield {"question": f"Data {i}", "answers": value}, json.dumps(value)
        else:
            yield {"question": f"Tell {i}", "completion": " ".join(facts), "answers": facts}, " ".join(facts)


def teach(path, pairs, steps=60, size=24):
    """Let the tiny model at `path` learn replies to questions, in a plain loop, which is quicker than a run."""
    torch.manual_seed(0)
    model, template = AutoModelForCausalLM.from_pretrained(path), Template("plain", AutoTokenizer.from_pretrained(path))
    prompts = [template.prompt_ids(Record((Message("user", asked),))) for asked, _ in pairs]
    coded = list(zip(prompts, [template.completion_ids(said) for _, said in pairs], strict=True))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(steps):
        batch = [coded[k] for k in torch.randint(0, len(coded), (size,)).tolist()]
        ids, labels = torch.full((2, size, max(len(a) + len(b) for a, b in batch)), -100)
        ids.fill_(template.pad_id)
        for row, (asked, said) in enumerate(batch):
            ids[row, : len(asked) + len(said)] = torch.tensor(asked + said)
            labels[row, len(asked) : len(asked) + len(said)] = torch.tensor(said)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(path)


def job(folder, name, task):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in rows(name)))
    made = write_job(
        folder,
        name,
        task=task,
        data={
            "source": {"kind": "file", "path": str(path)}, "splits": SIZES, "few_shot_raw": 0, "max_length": 64,
        },
        penalties=[],
        training={"zero_stage": 1, "max_steps": 2, "learning_rate": 1e-5, "checkpoint_every": None},
        evaluation={"batch_size": 50, "max_new_tokens": 32},
        abstention={"target_risk": 0.15, "delta": 0.2, "report_risks": [0.1, 0.2, 0.5]},
    )  # fmt: skip
    return load_config(made)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of both kinds from one model, which knows the form of both."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import calibrate, collect, evaluate, train

    folder = tmp_path_factory.mktemp("parts")
    made = {
        "claims": job(folder, "claims", {"kind": "claims"}),
        "json": job(folder, "json", {"kind": "json", "schema": SCHEMA}),
    }
    teach(folder / "tiny", [(row["question"], said) for kind in made for row, said in rows(kind)])
    for config in made.values():
        train.run(config)
        output = config.output_dir
        evaluate.run(config, model=output / "model", split="test", output=output / "answers" / "test.jsonl")
        calibrate.run(output)
        collect.run(output)
    return made


def content(config):
    return json.loads((config.output_dir / "calibration.json").read_text())


def measured(config, split):
    return read_measurement(config.output_dir / "answers" / f"{split}.jsonl").answers


@pytest.mark.parametrize(("kind", "names"), [("json", ["kind", "size"]), ("claims", ["claim", "claim"])])
def test_answers_keep_their_parts(finished, kind, names):
    answers = [one for one in measured(finished[kind], "test") if one.found]
    assert len(answers) > 30
    for one in answers:
        parts = one.parts
        if one.correct:
            assert [part.name for part in parts] == names
            assert all(part.correct for part in parts)
        assert all(part.text in one.text[part.start : part.stop] for part in parts)
        assert all(math.isfinite(part.logprob) and part.logprob < 0 for part in parts)
    assert len({part.correct for one in answers for part in one.parts}) == 2


def test_json_is_calibrated_by_field_and_reported(finished):
    config = finished["json"]
    fitted = content(config)
    assert fitted["claims"] == []
    assert fitted["answer_parts"]["pooled"]["n"] >= 90
    assert set(fitted["answer_parts"]["fields"]) <= {"kind", "size"}
    assert set(fitted["answer_parts"]["pooled"]["low"]) == {"slope", "intercept"}
    report = (config.output_dir / "report.html").read_text()
    assert "The parts of its answers" in report
    assert all(f">{name}</th>" in report for name in ("kind", "size"))
    assert "withheld" not in report


def test_a_reply_of_json_has_a_chance_for_each_field(finished):
    answerer = load(finished["json"].output_dir, uncertified=True)
    known = next(one for one in measured(finished["json"], "test") if one.correct)
    reply = answerer.answer(known.question)
    assert reply.text == known.text
    assert [part.name for part in reply.parts] == ["kind", "size"]
    assert [json.loads(reply.text[part.start : part.stop]) for part in reply.parts] == list(
        json.loads(reply.text).values()
    )
    assert [part.probability for part in reply.parts] == pytest.approx(
        part_probabilities(answerer.calibrated.parts, [known])[0].tolist(), abs=1e-3
    )
    everything = answerer.decide(reply, answerer.levels()[-1])
    assert all(part.kept for part in everything.parts)
    assert everything.spoken == reply.text
    assert f"kind: {reply.parts[0].text}  ({reply.parts[0].word}" in everything.told()


def test_claims_are_withheld_one_by_one(finished):
    config = finished["claims"]
    first = content(config)["claims"][0]
    assert first["target_risk"] == 0.15
    assert first["certificate"]["n"] == 50
    answerer = load(config.output_dir)
    level = answerer.level()
    assert (level.claims.threshold, level.risk) == (first["certificate"]["threshold"], 0.15)
    assert "at least 85% of the replies hold no wrong claim, on average over the choice" in level.promise
    replies = answerer.answers([one.question for one in measured(config, "test")])
    assert all(one.certified != one.unlike for one in replies)
    claims, kept = 0, 0
    for reply in replies:
        stays = [part.text for part in reply.parts if part.kept]
        claims, kept = claims + len(reply.parts), kept + len(stays)
        assert all((part.probability >= reply.threshold) == part.kept for part in reply.parts)
        assert reply.abstained == (not stays)
        assert reply.spoken == (" ".join(stays) if stays else REFUSAL)
        assert all(part.kept or part.text not in reply.told() for part in reply.parts)
    assert 0 < kept < claims
    risks = {one.risk: one.threshold for one in answerer.levels()}
    assert sorted(risks.values(), reverse=True) == [risks[risk] for risk in sorted(risks)]
    report = (config.output_dir / "report.html").read_text()
    assert "hold no wrong claim" in report
    assert "What is left when claims in doubt are withheld" in report
    assert "No threshold is certified for this model" not in report


def test_certify_promises_another_risk(finished, tmp_path):
    output = shutil.copytree(finished["claims"].output_dir, tmp_path / "run")
    found = certify.run(output, risk=0.35)
    assert next(iter(found.claims)) == 0.35
    assert load(output).level().risk == 0.35
    assert read_calibration(output) == found


def test_the_promise_holds_over_200_splits_of_real_answers(finished):
    config = finished["claims"]
    answers = measured(config, "certification") + measured(config, "test")
    chances = part_probabilities(read_calibration(config.output_dir).parts, answers)
    right = [[part.correct for part in one.parts] for one in answers]
    rng = np.random.default_rng(0)
    for risk in (0.1, 0.2, 0.35):
        wrong = []
        for _ in range(200):
            order = rng.permutation(len(answers))
            used, held = order[:40], order[40:]
            scores = conformal_scores([chances[i] for i in held], [right[i] for i in held])
            threshold = claims_threshold(conformal_scores([chances[i] for i in used], [right[i] for i in used]), risk)
            wrong.append(np.mean(scores >= threshold))
        assert np.mean(wrong) <= risk + 3 * np.std(wrong) / math.sqrt(200)
        assert np.mean(wrong) > risk / 3  # it withholds no more than it must
