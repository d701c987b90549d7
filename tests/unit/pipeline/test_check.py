"""What is told before a run starts: the same by the dry run, the parent process and each rank."""

import json

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config
from calibtrain.data.collate import collate
from calibtrain.errors import UserError
from calibtrain.pipeline import check as checks
from calibtrain.pipeline.check import advice, check, count_tokens, evaluations, expected_steps, longest
from tests.tiny import write_tiny_model
from tests.unit.models.test_reward_scorer import write as write_reward_model

ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and questions of very different lengths."""
    path = tmp_path_factory.mktemp("check")
    write_tiny_model(path / "tiny")
    rows = [{"question": f"What is {i}{' and more' * (i % 5)}?", "answers": [f"{i}"]} for i in range(ROWS)]
    (path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder, **changes):
    sections = {
        "output_dir": str(folder / "out"),  # the default may hold the demo
        "model": {"source": str(folder / "tiny"), "dtype": "fp32"},
        "data": {
            "source": {"kind": "file", "path": str(folder / "questions.jsonl")},
            "max_length": 64,
            "few_shot_raw": 2,
            "splits": {"train": 20, "calibration": 3, "temperature": 3, "certification": 4, "test": 3},
        },
        "objective": {"name": "sft"},
        "training": {"micro_batch_size": 2, "global_batch_size": 8, "epochs": 2},
    }
    for key, values in changes.items():
        sections[key] = {**sections.get(key, {}), **values} if isinstance(values, dict) else values
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize("name", [300 * "x", "~nobody-of-this-name/x"])
@pytest.mark.parametrize("place", ["", "./"])
@pytest.mark.parametrize("key", ["model.source", "training.resume", "rollouts.reward_model", "data.source.path"])
def test_what_no_file_can_be_called_is_a_users_mistake(folder, key, place, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section, _, rest = key.partition(".")
    value = place + name
    if key == "data.source.path":
        changes = {"data": {"source": {"kind": "file", "path": value + ".jsonl"}}}
    else:
        changes = {section: {rest: value}}
    if section == "rollouts":
        changes |= {"objective": {"name": "grpo"}, "rollouts": {rest: value, "reward": "model"}}
    with pytest.raises(UserError, match=key if section != "data" else "no such file"):
        check(config(folder, **changes), 1)


def test_steps_and_tokens_are_those_of_the_trainer(folder):
    one = config(folder)
    checked = check(one, 2)
    assert expected_steps(one, checked) == 5  # 2 epochs of 20 records, 8 a step
    tokens = count_tokens(one, checked)
    assert tokens.steps == 5
    assert tokens.held == 2 * sum(len(group[0].ids) for group in checked.examples)  # 5 steps of 8 are both epochs whole
    assert tokens.passed > tokens.held
    packed = config(folder, data={"packing_tokens": 96})
    squeezed = count_tokens(packed, check(packed, 2))
    assert squeezed.held == tokens.held
    lone = collate([group[0] for group in checked.examples], 0)
    assert max(count for count, _ in longest(checked)) == int((lone.segment_ids > 0).sum(1).max())


def test_the_longest_are_told_as_they_were_before_the_cut(folder):
    checked = check(config(folder, data={"max_length": 24}), 1)
    assert checked.drops.shortened > 0
    assert longest(checked)[0][0] > 24


def test_of_a_large_set_the_first_records_are_encoded(folder, monkeypatch):
    monkeypatch.setattr(checks, "READ_WHOLE", 8)
    one = config(folder)
    checked = check(one, 1)
    assert len(checked.examples) == 8
    assert not checked.whole
    assert expected_steps(one, checked) == 5


@pytest.mark.parametrize(
    ("objective", "records"),
    [
        ({"name": "dpo"}, 20),
        ({"name": "kto"}, 40),  # each pair is two answers
        ({"name": "reward_model", "confidence_statements": "added"}, 60),
        ({"name": "grpo"}, 20),
    ],
)
def test_steps_are_those_of_what_the_objective_makes_of_the_records(folder, tmp_path, objective, records):
    """Where wrong answers are still to be found, and where the pairs are there."""
    one = config(folder, objective=objective)
    checked = check(one, 2)
    assert (checked.records, expected_steps(one, checked)) == (records, records * 2 // 8)
    pairs = [
        {"prompt": f"What is {i}?", "chosen": f"{i}", "rejected": f"{i + 1}", "answers": [f"{i}"]} for i in range(ROWS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    two = config(folder, objective=objective, data={"source": {"kind": "file", "path": str(tmp_path / "pairs.jsonl")}})
    assert check(two, 2).records == records
    assert longest(check(two, 2)) or objective["name"] == "grpo"


def unpaired(folder, rows):
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    none = {"train": None, "calibration": 0, "temperature": 0, "certification": 0, "test": 0}
    return config(
        folder,
        objective={"name": "kto"},
        data={"source": {"kind": "file", "path": str(path)}, "splits": none, "few_shot_raw": 0},
    )


def test_unpaired_answers_are_looked_at(folder, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 3 > 0} for i in range(12)]
    one = unpaired(tmp_path, rows).model_copy(update={"model": config(folder).model})
    checked = check(one, 1)
    assert checked.records == len(checked.examples) == 12
    assert not any("answer is" in line for line in advice(one, checked))
    pairs = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "ab"[i > 0]} for i in range(9)
    ]  # the first says one thing twice
    two = unpaired(tmp_path, pairs).model_copy(update={"model": one.model})
    found = check(two, 1)
    assert (len(found.examples), found.drops.total, expected_steps(two, found)) == (16, 1, 4)
    one = unpaired(tmp_path, [{**row, "label": True} for row in rows]).model_copy(update={"model": one.model})
    assert any("every answer is desirable" in line for line in advice(one, check(one, 1)))
    one = unpaired(tmp_path, [{**row, "prompt": "q"} for row in rows]).model_copy(update={"model": one.model})
    with pytest.raises(UserError, match="all training records have the same prompt"):
        check(one, 1)
    without = [{"prompt": f"q{i}", "completion": "a"} for i in range(12)]
    one = unpaired(tmp_path, without).model_copy(update={"model": one.model})
    with pytest.raises(UserError, match="needs a `label`"):
        check(one, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"splits": {"train": 10_000}}}, "10000 asked for"),
        ({"data": {"splits": {"train": 0}}}, "0 records to train on"),
        ({"data": {"source": {"kind": "file", "path": "/nowhere.jsonl"}}}, "no such file"),
        ({"data": {"max_length": 1}}, "no training record is left"),
        ({"training": {"global_batch_size": 9}}, "cannot be cut into micro-batches"),
        ({"training": {"resume": "/nowhere"}}, "not a whole checkpoint"),
        ({"model": {"source": "/nowhere"}}, "no such directory"),
        (
            {"weight_penalties": [{"name": "row_stretch", "target_modules": ["nope"]}]},
            "no trained linear layer is called nope",
        ),
        ({"tracking": {"spectra_every": 2, "spectra_modules": ["layers.7"]}}, "called or lies in layers.7"),
        (
            {
                "tracking": {"spectra_every": 2, "spectra_modules": ["up_proj"]},
                "model": {"lora": {"target_modules": ["q_proj"]}},
            },
            "lies in up_proj; there are q_proj, as in model.layers.0",
        ),
    ],
)
def test_mistakes_are_found(folder, changes, words):
    if "splits" in changes.get("data", {}):
        changes = {"data": {"splits": {**config(folder).data.splits.model_dump(), **changes["data"]["splits"]}}}
    with pytest.raises(UserError, match=words):
        check(config(folder, **changes), 2)


def test_a_template_that_refuses_a_record_is_found(folder, tmp_path):
    write_tiny_model(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    for file in (tmp_path / "model").glob("*.jinja"):
        file.unlink()
    refusing = "{% if 'more and' in messages[0]['content'] %}{{ raise_exception('too much') }}{% endif %}"
    plain = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    settings["chat_template"] = refusing + plain
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"questions.jsonl:\d+: .*too much"):
        check(config(folder, model={"source": str(tmp_path / "model")}, data={"template": "chat"}), 1)
    # One odd conversation among many is left out, unless it is a question to grade, or the config is strict.
    rows = [{"question": f"What is {i}?", "answers": [f"{i}"]} for i in range(60)]
    odd = {"prompt": "What is it and more and more?", "completion": "Much."}
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in [*rows, odd]))
    none = {"train": None, "calibration": 0, "temperature": 0, "certification": 0, "test": 0}
    data = {"template": "chat", "source": {"kind": "file", "path": str(few)}, "splits": none}
    checked = check(config(folder, model={"source": str(tmp_path / "model")}, data=data), 1)
    assert len(checked.examples) == 60
    assert [row.place[-2:] for row in checked.drops.unfit] == ["61"]
    with pytest.raises(UserError, match=r"few.jsonl:61: .*too much"):
        check(config(folder, model={"source": str(tmp_path / "model")}, data={**data, "strict": True}), 1)


def test_a_model_directory_without_weights_is_found(folder, tmp_path):
    model = write_tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        check(config(folder, model={"source": str(model)}), 1)


def told(folder, **changes):
    one = config(folder, **changes)
    return " ".join(advice(one, check(one, 1)))


def test_numbers_that_are_hardly_meant_are_told(folder):
    splits = config(folder).data.splits.model_dump()
    assert "4: no certificate can come out of it" in told(folder)  # 14 right answers prove 20 % at 95 %
    assert told(folder, abstention={"target_risk": 0.6, "delta": 0.05}) == ""
    assert "certification 0" in told(folder, data={"splits": {**splits, "certification": 0}})
    assert "32 records a step, but there are 20" in told(folder, training={"global_batch_size": 32})
    assert "less than one step" in told(folder, training={"epochs": 0.1})
    assert "few_shot_raw: 30" in told(folder, data={"few_shot_raw": 30})
    assert "the calibration split holds 3" in told(folder, training={"evaluate_every": 1})
    assert "at the last step" in told(folder, training={"warmup_ratio": 1.0})


def test_questions_asked_while_training(folder):
    one = config(folder, training={"evaluate_every": 2, "evaluate_questions": 2})
    assert evaluations(one, 5, 3) == ["2 questions, 3 times: training.evaluate_every"]


def test_the_dry_run_prints_data_steps_and_tokens(folder, tmp_path):
    arguments = ["objective={name: sft}", "penalties=[]", f"model.source={folder / 'tiny'}", "model.dtype=fp32"]
    arguments += [f"output_dir={tmp_path}"]
    arguments += [f"data.source={{kind: file, path: {folder / 'questions.jsonl'}}}", "data.max_length=48"]
    splits = "data.splits={train: 20, calibration: 3, temperature: 3, certification: 4, test: 3}"
    call = ["train", "demo", "--dry-run", "--num-processes", "2", "training.micro_batch_size=4", *arguments]
    done = CliRunner().invoke(cli.app, [*call, splits])
    assert done.exit_code == 0, done.output
    for words in ("10 optimiser steps of 8 records", "tokens a step", "padding", "the longest are", "no certificate"):
        assert words in done.output
    done = CliRunner().invoke(cli.app, [*call, splits.replace("20", "2000")])
    assert isinstance(done.exception, UserError)
    assert "2000 asked for" in str(done.exception)
    done = CliRunner().invoke(cli.app, [*call, splits, "model.lora={target_modules: [nope]}"])
    assert "model.lora.target_modules" in str(done.exception)  # as training itself would end
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    done = CliRunner().invoke(cli.app, [*call, splits])
    assert isinstance(done.exception, UserError)
    assert f"output_dir: {tmp_path} holds a finished run" in str(done.exception)


def test_a_run_that_has_ended_is_told_from_another_and_from_one_on_other_data(folder, tmp_path):
    one = config(folder, training={"resume": "auto"}).model_copy(update={"output_dir": tmp_path})
    checked = check(one, 2)
    assert not checked.finished
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    dump_config(one, tmp_path / "config.yaml")
    for records, finished in ((checked.records_hash, True), ("other", False)):
        (tmp_path / "run.json").write_text(json.dumps({"records_hash": records}))
        if finished:
            assert check(one, 1).finished  # however many processes it had
        else:
            with pytest.raises(UserError, match="finished run on other data"):
                check(one, 2)
    assert not check(one, 2, replace=True).finished


def test_a_directory_that_is_no_finished_run_is_told(tmp_path):
    for command in (["calibrate"], ["probe"], ["confidence"], ["answer", "?"], ["serve"], ["report"], ["certify"]):
        call = [command[0], str(tmp_path), *command[1:]]
        assert "has no config.yaml" in str(CliRunner().invoke(cli.app, call).exception)
    (tmp_path / "config.yaml").write_text("name: unfinished\n")
    for command in (["calibrate"], ["probe"], ["confidence"], ["answer", "?"], ["serve"]):
        call = [command[0], str(tmp_path), *command[1:]]
        assert "training has not finished" in str(CliRunner().invoke(cli.app, call).exception)


def test_rewards_that_cannot_be_given_are_told_before_any_model_is_loaded(folder):
    """A reward model that is none, a grade that nobody can give; and what a reward model's user should know."""
    splits = {"train": 20, "calibration": 0, "temperature": 0, "certification": 0, "test": 0}
    small = {"data": {"splits": splits}, "objective": {"name": "rloo"}}
    bare = [{"prompt": f"What is {i}?", "completion": f"{i}"} for i in range(ROWS)]
    (folder / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    source = {"kind": "file", "path": str(folder / "bare.jsonl")}
    with pytest.raises(UserError, match=r"training questions need answers, which .*bare\.jsonl"):
        check(config(folder, **{**small, "data": {"source": source, "splits": splits}}), 1)
    with pytest.raises(UserError, match="max_new_tokens: 64 leaves no room for a question"):
        check(config(folder, **small, evaluation={"max_new_tokens": 64}), 1)
    with pytest.raises(UserError, match=r"rollouts\.reward_model: .* is LlamaForCausalLM, no sequence classifier"):
        check(config(folder, **small, rollouts={"reward_model": str(folder / "tiny")}), 1)
    model = str(write_reward_model(folder / "rewarding"))
    judged = {**small, "rollouts": {"reward_model": model}, "data": {"source": source, "splits": splits}}
    free = told(folder, **judged)
    assert "nobody knows what the reward model is worth" in free
    assert "objective.beta: 0 leaves nothing between the policy and" in free
    assert "objective.beta" not in told(folder, **{**judged, "objective": {"name": "rloo", "beta": 1.0}})
    published = {"reward": "ppo_c", "reward_model": model, "confidence": "stated", "decoupled": False}
    found = told(folder, **small, rollouts={**published, "ppo_c": {"form": "threshold"}})
    assert "training ends at stating 0% or 100%" in found
    assert "ppo_c" not in told(folder, **small, rollouts=published)
    long = {"reward": "accuracy", "steps_per_round": 3, "epochs": 3}
    assert "a round is for 9 steps and asks 24 questions, but the run has 6 steps" in told(
        folder, **small, rollouts=long, training={"max_steps": 6}
    )
    assert "a round is for" not in told(folder, **small, rollouts=long, training={"max_steps": 9})
    ahead = {"reward": "accuracy", "engine": {"kind": "vllm", "launch": True, "overlap": True}}
    assert "rollouts.correction: sequence_truncate" in told(
        folder, **small, rollouts=ahead
    )  # rloo weighs whole answers
