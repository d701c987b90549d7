"""Reading configs: overrides, places of mistakes, shipped files."""

import json
import re
from pathlib import Path

import pytest

from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config, load_config, shipped_configs
from calibtrain.errors import UserError
from calibtrain.training.deepspeed_config import deepspeed_dict


def problem(tmp_path, text, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def test_every_shipped_config_loads_survives_a_round_trip_and_gives_a_deepspeed_config(tmp_path):
    known = {"demo", "sft", "orpo", "dpo", "orpo_8b_zero3", "sft_8b_qlora", "sft_32b_lora", "sft_70b_2nodes"}
    assert known <= set(shipped_configs())
    for name in shipped_configs():
        config = load_config(name)
        dump_config(config, tmp_path / "deep" / f"{name}.yaml")
        assert load_config(tmp_path / "deep" / f"{name}.yaml") == config
        deepspeed = deepspeed_dict(
            config, config.training.global_batch_size // config.training.micro_batch_size, hidden_size=4096
        )
        assert deepspeed["train_batch_size"] == config.training.global_batch_size
        assert "auto" not in json.dumps(deepspeed)


def test_demo_is_the_regime_of_400_pairs_and_4_epochs():
    demo = load_config("demo")
    assert (demo.data.splits.train, demo.training.epochs, demo.training.zero_stage) == (400, 4, 2)
    assert demo.objective.name == "orpo"
    assert [p.name for p in demo.penalties] == ["answer_score"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate=3e-5", lambda c: c.training.learning_rate == 3e-5),
        ("penalties.0.weight=2", lambda c: c.penalties[0].weight == 2.0),
        ("objective={name: sft}", lambda c: c.objective.name == "sft"),
        ("data.source.min_population=5", lambda c: c.data.source.min_population == 5),
        ("model.lora.r=4", lambda c: c.model.lora.r == 4),
        ("training.max_steps=null", lambda c: c.training.max_steps is None),
        ("tracking.tags=[a, b]", lambda c: c.tracking.tags == ("a", "b")),
    ],
)
def test_overrides(override, expected):
    assert expected(load_config("demo", [override]))


def test_later_override_wins():
    assert load_config("demo", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  learning_rat: 1\n", ["training.learning_rat", "run.yaml:2", "did you mean `learning_rate`"]),
        ("traning: {}\n", ["traning", "did you mean `training`"]),
        ("seed: 1\n\nseed: 2\n", ["seed", "run.yaml:3", "written twice", "line 1"]),
        ("objective:\n  name: orpoo\n", ["objective", "none of sft, orpo", "did you mean `orpo`"]),
        ("objective: {beta: 1}\n", ["needs `name`", "sft, orpo"]),
        ("data:\n  source: {kind: hub, nam: x}\n", ["data.source.nam", "did you mean `name`", "data.source.name"]),
        ("model: 3\n", ["model", "section"]),
        ("name: 12\n", ["put it in quotes"]),
        ("training: {zero_stage: 7}\n", ["7 is none of 0, 1, 2, 3"]),
        ("training: {resume: 3}\n", ["training.resume", "auto, or a path"]),
        ("training: {offload_parameters: true}\n", ["zero_stage: 3"]),
        ("training: {micro_batch_size: 9}\n", ["micro_batch_size: 9 is more than"]),
        ("penalties: {name: answer_score}\n", ["penalties", "is a list"]),
        ("penalties: [{name: answer_score}]\ndata: {splits: {calibration: 0}}\n", ["needs questions"]),
        ("data: {packing_tokens: 9}\n", ["packing_tokens: 9 is less than"]),
        ("a: [\n", ["not valid YAML"]),
        ("- 1\n", ["mapping"]),
    ],
)
def test_mistakes_name_the_place_and_the_way_out(tmp_path, text, words):
    message = problem(tmp_path, text)
    assert not [word for word in words if word not in message], message
    assert "pydantic" not in message
    assert "function-" not in message


def test_a_list_is_not_called_short_for_an_item_that_is_wrong(tmp_path):
    message = problem(tmp_path, "rollouts: {sources: [{kind: format, pattern: '('}]}\n")
    assert "has a problem" in message
    assert "no regular expression" in message
    assert "holds 1 at least, got []" in problem(tmp_path, "rollouts: {sources: []}\n")


def test_all_mistakes_are_told_at_once(tmp_path):
    message = problem(tmp_path, "seeds: 1\ntraining:\n  epochs: -1\n  zero_stage: 9\n", "data.template=cha")
    for place in ("seeds (", "training.epochs (", "training.zero_stage (", "data.template (command line"):
        assert place in message
    assert "4 problems" in message


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", "seed=[", "penalties.3.weight=1", "seed.x=1"])
def test_bad_overrides_are_named(tmp_path, override):
    assert repr(override) in problem(tmp_path, "seed: 1\n", override)


def test_input_paths_count_from_the_yaml_file_and_overrides_from_here(tmp_path, monkeypatch):
    file = tmp_path / "configs" / "run.yaml"
    file.parent.mkdir()
    file.write_text(
        "data: {source: {kind: file, path: rows.jsonl}}\ntraining: {deepspeed: ds.json}\nmodel: {source: ./m}\n"
    )
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load_config(file, ["training.deepspeed=mine.json"])
    assert config.data.source.path == tmp_path / "configs" / "rows.jsonl"
    assert config.training.deepspeed == here / "mine.json"
    assert config.model.source == str(tmp_path / "configs" / "m")
    assert config.output_dir == Path("out")


def test_reward_models_count_from_the_yaml_file_unless_they_are_hub_names(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "objective: {name: rloo}\nrollouts:\n  sources:\n    - {kind: model, path: ./judge}\n"
        "    - {kind: model, path: owner/name}\n    - {kind: grade}\n"
    )
    first, second, _ = load_config(file).rollouts.sources
    assert first.path == str(tmp_path / "judge")
    assert second.path == "owner/name"
    file.write_text("objective: {name: rloo}\nrollouts: {reward_model: ./judge}\n")
    assert load_config(file).rollouts.reward_model == str(tmp_path / "judge")
    assert load_config(file, ["rollouts.reward_model=out/rm/model"]).rollouts.reward_model == "out/rm/model"


def test_a_missing_file_names_the_shipped_configs():
    with pytest.raises(UserError, match=r"Did you mean the shipped config `demo`.*orpo"):
        load_config("no/such/demoo.yaml")


def test_every_field_is_described():
    def bare(model, where=""):
        for name, field in model.model_fields.items():
            if name not in ("name", "kind") and not field.description:
                yield f"{where}{model.__name__}.{name}"

    import calibtrain.config as module

    sections = [m for m in vars(module).values() if isinstance(m, type) and issubclass(m, module.Section)]
    assert RunConfig in sections
    assert not [name for section in sections for name in bare(section)]


@pytest.mark.parametrize(
    "text", ['name: "a\\0b"', 'output_dir: "\\uD800"', 'data: {source: {kind: file, path: "\\0"}}']
)
def test_what_is_no_character_of_a_text_is_told_with_its_place(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml:1\): .* holds what is no character of a text"):
        load_config(tmp_path / "run.yaml")


def test_a_long_value_is_told_in_short(tmp_path):
    (tmp_path / "run.yaml").write_text(f"objective: {'x' * 5000}\ntraining: {{zero_stage: {'y' * 5000}}}")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "run.yaml", [f"model.dtype={'z' * 5000}"])
    assert len(str(caught.value)) < 1200
    assert all(f"'{letter * 56}..." in str(caught.value) for letter in "xyz")


def test_keys_of_another_section_are_told_so_and_what_is_known_here_once(tmp_path):
    path = tmp_path / "moved.yaml"
    path.write_text("model: {source: x}\ntracking: {adam_betas: [1, 2], epochs: 1, proect: x, qqq: y}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    first, *others = [
        line.partition("unknown key")[2] for line in str(caught.value).splitlines() if "tracking." in line
    ]
    assert first.startswith("; it is a key of `training`; Known here: entity, group, ")
    assert others == ["; it is a key of `rollouts` and `training`", "; did you mean `project`?", ""]


def test_of_many_problems_the_first_are_told(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text("model: {source: x}\n" + "".join(f"key{i}: 1\n" for i in range(90)))
    with pytest.raises(UserError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert re.match(r"The config has 9\d problems", lines[0])
    assert (len(lines), lines[-1].strip()[:3], lines[-1].strip()[-4:]) == (22, "and", "more")
    assert len(str(caught.value)) < 5000
